"""CPS: cross pseudo supervision.

"Semi-supervised semantic segmentation with cross pseudo supervision", X. Chen, Y. Yuan, G. Zeng,
J. Wang, CVPR 2021, https://arxiv.org/abs/2106.01226

Idea
    Two networks of one architecture start from different random weights, so they make different
    mistakes. On an image without a mask, the most probable classes of each network are the other
    network's target. Where the two disagree, they correct each other. Where they agree, the label
    is more training data. CutMix makes the task harder: boxes of one unlabelled image are pasted
    into another, and the networks train on the mixed image, with the labels of the two unmixed
    images mixed alike. Network 1 is used in the end.

        x'  ---> network 1 ---> P_1 <-- cross-entropy -- Ŷ_2, mixed <--- network 2 <--- x_u
        x'  ---> network 2 ---> P_2 <-- cross-entropy -- Ŷ_1, mixed <--- network 1 <--- x_u
        x_l ---> both networks ---> supervised loss <--- y     (no gradient through any Ŷ)
        x': x_u mixed by CutMix, then its strong view

Run
    python cps.py                                      # the built-in phantom
    python cps.py --data PATH --labeled 10%
    python cps.py --data PATH --labeled 10% --no-cutmix

Equations (numbers are this file's)
    Eq. (1)  cps_loss     each network's cross-entropy with the other's hard labels
    Eq. (2)  cutmix_mask  where an image shows its partner: three boxes
    Eq. (3)  cutmix       the mixed image, or the mixed label map
    Eq. (4)  main         L = Σ_k L_sup(P_k, y) + λ L_cps(x_u);  --no-cutmix: + λ L_cps(x_l), too

Differences
    paper or authors' code               | here                                 | does it matter?
    -------------------------------------+--------------------------------------+-------------------
    DeepLabv3+, SGD, cross-entropy.      | U-Nets, AdamW, CE + Dice, as in all  | ?
                                         | six files.                           |
    One view of an image for targets and | Networks train on a common.strong    | ?
    training.                            | view; labels come from the weak one  |
                                         | [ours] (--no-cutmix: of labelled     |
                                         | images from the strong one).         |
    Both networks start from the same    | All weights are random and differ.   | ?
    pretrained backbone; only the layers |                                      |
    after it differ (code).              |                                      |
    λ is 1.5 on VOC, 6 on Cityscapes; 1  | λ = 0.3 [ours].                      | 1: 74, 83 Dice,
    with CutMix on VOC (code).           |                                      | 0.3: 82, 83
                                         |                                      | (--seed 10, 11)
    Without CutMix, one mean over        | The means over labelled and over     | ?
    labelled and unlabelled images       | unlabelled images are added [paper], |
    (code).                              | which is about twice as much.        |
    The partner in CutMix comes from a   | It is the image before in the same   | ?
    second batch (code).                 | batch.                               |
    Boxes have areas of their own; where | The boxes of an image have one area  | ?
    two overlap, the image itself shows  | and sides of up to 2.7 to 1; where   |
    again (code).                        | two overlap, the partner is shown.   |
    Networks label in train mode (code). | The same, normalised by the batch;   | ?
                                         | labelled and unlabelled images go    |
                                         | through in two passes.               |
    (Other code draws labelled images    | The unlabelled batch holds no        | ?
    for the unlabelled batch, too.)      | labelled image, unless all are.      |
    ?: not tried. Dice is that of validation patients, after 800 steps on an older phantom (64 px, 3
    labelled patients) with an older augmentation (rotation to 20 degrees, scale to 1.25, no shift),
    where nothing else is said.
"""
import argparse
from functools import partial

import torch
from torch.nn import functional as F

from common import (
    Data,
    Run,
    UNet,
    heat,
    mixed_precision,
    number,
    overlay,
    parse,
    parser,
    place,
    poly_decay,
    set_lr,
    strong,
    supervised_loss,
)

WEIGHT_DECAY = 1e-2  # [ours] AdamW's, the same in all six files
BOXES = 3  # [code] boxes of CutMix
AREA = (0.25, 0.5)  # [code] their total share of the image, before overlap

# ------------------------------------------------------------------------------------------ Modules

# none: two plain U-Nets

# ---------------------------------------------------------------------------------------- Equations


def cps_loss(logits_1, logits_2, label_1, label_2):
    """Eq. (1): L_cps = CE(P_1, Ŷ_2) + CE(P_2, Ŷ_1), means over images and pixels.

    logits (B, C, H, W), labels (B, H, W) long -> scalar. Gradient flows into both logits.
    Example: uniform logits of C classes give 2 log C, whatever the labels.
    """
    return F.cross_entropy(logits_1, label_2) + F.cross_entropy(logits_2, label_1)


def cutmix_mask(b, h, w, boxes, area, device):
    """Eq. (2): M = 1 inside any of `boxes` random boxes of share r / boxes each, r ~ U(area).

    -> bool (B, H, W), drawn for each image; no gradient. A box of share s has the sides H √s e^a
    and W √s e^-a, a ~ U(-1/2, 1/2) [ours], at most the image's, and lies wholly inside.
    Example: one box, area (0.25, 0.25) of 48 × 48 pixels: 24 × 24 of them if a is 0.
    """
    low, high = area
    shape = b, boxes, 1, 1
    share = torch.empty(b, 1, 1, 1, device=device).uniform_(low, high) / boxes
    stretch = torch.empty(shape, device=device).uniform_(-0.5, 0.5).exp()
    box_h = (h * share.sqrt() * stretch).clamp(max=h)
    box_w = (w * share.sqrt() / stretch).clamp(max=w)
    top = torch.rand(shape, device=device) * (h - box_h)
    left = torch.rand(shape, device=device) * (w - box_w)
    row = torch.arange(h, device=device)[:, None] + 0.5  # centres of pixels
    column = torch.arange(w, device=device) + 0.5
    in_rows = (row >= top) & (row < top + box_h)  # (B, boxes, H, 1)
    in_columns = (column >= left) & (column < left + box_w)  # (B, boxes, 1, W)
    return (in_rows & in_columns).any(1)


def cutmix(x, mask):
    """Eq. (3): x' = (1 − M) x + M x_partner, the partner being x.roll(1, 0).

    x: images (B, channels, H, W) or label maps (B, H, W); mask: bool (B, H, W). -> the shape of x.
    Gradient flows into x. Example: rows (1, 2) and (3, 4), M = (1, 0) for both: (3, 2) and (1, 4).
    """
    if x.dim() == 4:
        mask = mask[:, None]  # the same for all channels
    return torch.where(mask, x.roll(1, 0), x)


# ----------------------------------------------------------------------------------------- Networks


def build(channels, classes, width):
    """Two U-Nets with different random weights: {name: network}."""
    return {name: UNet(channels, classes, width) for name in ("network 1", "network 2")}


def predict(networks, x):
    """Images (B, channels, H, W) -> probabilities {name: (B, C, H, W)}."""
    probs = {name: networks[name](x).softmax(1) for name in ("network 1", "network 2")}
    return probs | {"ensemble": (probs["network 1"] + probs["network 2"]) / 2}


def pictures(networks, x, mix):
    """Columns of preview.png: where the networks correct each other, and what CutMix makes."""
    label_1, label_2 = networks["network 1"](x).argmax(1), networks["network 2"](x).argmax(1)
    columns = heat("disagreement", (label_1 != label_2).float())
    if mix:
        mask = cutmix_mask(len(x), *x.shape[2:], BOXES, AREA, x.device)
        mixed = cutmix(x, mask)
        columns["CutMix image"] = mixed
        columns["its labels by 2"] = overlay(mixed, cutmix(label_2, mask))
    return columns


def main(argv=None):
    # options
    options = parser(__doc__)
    add = options.own.add_argument
    add("--weight", type=number(float, 0), default=0.3, help="λ of L_cps (%(default)s) [ours]")
    add("--cutmix", action=argparse.BooleanOptionalAction, default=True,
        help="mix unlabelled images (yes) [paper]")
    args = parse(options, argv)

    # data, networks, optimizer, run
    data = Data(args)
    torch.manual_seed(args.seed)
    networks = place(build(data.channels, data.classes, args.width), args)
    network_1, network_2 = networks["network 1"], networks["network 2"]
    parameters = [*network_1.parameters(), *network_2.parameters()]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=WEIGHT_DECAY)
    autocast, scaler = mixed_precision(args)
    show = partial(pictures, mix=args.cutmix)
    run = Run(__file__, args, data, networks, [optimizer, scaler], predict, "network 1", show)

    for step in run.steps():
        # 1 batch
        x_l, y_l, x_u, *_ = data.batch()

        # 2 views
        mask = cutmix_mask(len(x_u), *x_u.shape[2:], BOXES, AREA, x_u.device)  # (B, H, W)
        if not args.cutmix:
            mask = torch.zeros_like(mask)  # nothing is mixed
        x_ls, x_us = strong(x_l), strong(cutmix(x_u, mask))

        # 3 targets
        with torch.no_grad(), autocast():
            logits_1, logits_2 = network_1(x_u), network_2(x_u)
            label_1 = cutmix(logits_1.argmax(1), mask)  # (B, H, W)
            label_2 = cutmix(logits_2.argmax(1), mask)

        # 4 losses
        with autocast():
            logits_l1, logits_u1 = network_1(x_ls), network_1(x_us)
            logits_l2, logits_u2 = network_2(x_ls), network_2(x_us)
        loss_sup = supervised_loss(logits_l1, y_l) + supervised_loss(logits_l2, y_l)
        loss_cps = cps_loss(logits_u1, logits_u2, label_1, label_2)
        if not args.cutmix:  # [paper] labelled images too; [code] with CutMix unlabelled ones only
            label_l1, label_l2 = logits_l1.argmax(1), logits_l2.argmax(1)
            loss_cps = loss_cps + cps_loss(logits_l1, logits_l2, label_l1, label_l2)
        loss = loss_sup + args.weight * loss_cps  # Eq. (4)

        # 5 step
        lr = set_lr(optimizer, args.lr * poly_decay(step, args.steps))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # 6 teacher
        # none: each network is the other's teacher

        # 7 log, validate, save
        agreement = (label_1 == label_2).float().mean()
        probs_1 = logits_1.softmax(1)
        entropy = -torch.xlogy(probs_1, probs_1).sum(1)  # of network 1 on x_u
        run.log(loss=loss, sup=loss_sup, cps=loss_cps, lam=args.weight, agreement=agreement,
                uncertainty=entropy.mean(), lr=lr)
        run.save(step)

    return run.finish()


if __name__ == "__main__":
    main()
