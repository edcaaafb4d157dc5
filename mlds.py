"""MLDS: multi-label deep supervision, from masks, boxes, image-level labels and no labels at all.

"Every annotation counts: Multi-label deep supervision for medical image segmentation", S. Reiß,
C. Seibold, A. Freytag, E. Rodner, R. Stiefelhagen, CVPR 2021, https://arxiv.org/abs/2104.13243

Idea
    A cell of a coarse decoder stage covers many pixels, so its target is the set of classes in it;
    a head at each stage says which are there. Such targets forgive small errors, so they may come
    from labels that are not quite right: a slowly moving teacher labels the images without masks,
    choosing among the classes that boxes or image-level labels allow, where there are any. A clean
    head learns from true masks alone; it makes those labels. The teacher's is used in the end.

        x_l -> student -> clean head <--- L_sup --- y;   heads <--- BCE --- y, max-pooled
        x_u, strong view -> student -> heads <--- BCE --- Ŷ, max-pooled
        x_u, weak view -> teacher (the student's average) -> clean head -> Ŷ: best allowed class

Run
    python mlds.py                                         # the built-in phantom
    python mlds.py --data PATH --labeled 10%               # uses PATH/boxes, PATH/tags, if any
    python mlds.py --labeled 10% --boxes 20% --tags 30%    # derived from hidden masks

Equations (numbers are this file's)
    Eq. (1)  multi_label_target  which classes are in a cell
    Eq. (2)  mlds_loss           binary cross-entropy of the heads of all depths
    Eq. (3)  allowed_map         the classes that an image's annotation allows at each pixel
    Eq. (4)  pseudo_label        the most probable allowed class
    Eq. (5)  ema_decay           the teacher's memory, short at first
    Eq. (6)  ema_update          teacher weights: running average of the student's
    Eq. (7)  main                L = L_sup(y) + L_MLDS(y) + λ(t) L_MLDS(Ŷ)

Differences
    1. From the paper: U-Net, AdamW, batches and common.strong as in all six files; the clean head
       has CE + Dice as they have, not CE alone; λ = 0.3 and its ramp are [ours]. Dice matters in
       short training: with CE alone the phantom's small class was not found (49, 56, 53 validation
       Dice with λ = 1, 0.3, 0.05, seed 10), and --variant mlds ended at 69; with CE + Dice and
       λ = 0.3 it ended at 82 (labelled-only, CE + Dice: 77).
    2. From the authors' code: BCE is a mean over images, not a sum, so that the learning rate does
       not depend on the batch size. EMA as in mean_teacher.py: parameters only; whoever labels is
       in train mode. Not measured.
    3. Labelled and unlabelled images pass separately, so that no batch statistics mix them. The
       unlabelled stream holds no labelled image (at 100% all, and Ŷ is their mask).
"""
import copy

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import (
    Data,
    Run,
    UNet,
    annotations,
    parse,
    parser,
    poly_decay,
    ramp_up,
    set_lr,
    stop,
    strong,
    supervised_loss,
)

WEIGHT_DECAY = 1e-2  # [ours] AdamW's, the same in all six files
EMA_DECAY = 0.99  # [ours] as in mean_teacher.py
RAMP = 0.3  # [ours] share of the steps over which lambda grows, as in mean_teacher.py
HIDDEN = 64  # [paper] channels inside a multi-label head

# ------------------------------------------------------------------------------------------ Modules


class MultiLabelNet(nn.Module):
    """Images (B, channels, S, S) -> clean logits (B, C, S, S), multi-label logits [(B, C, s, s)].

    encoder: image -> features, bottleneck last; decoder: features -> stages, coarsest first;
    widths: channels of the bottleneck and the stages, which each get a multi-label head.
    """

    def __init__(self, encoder, decoder, widths, hidden, classes):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.clean = nn.Conv2d(widths[-1], classes, 1)
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(True),
            nn.Conv2d(hidden, classes, 1)) for width in widths)

    def forward(self, x):
        if len(x) == 0:  # BatchNorm refuses an empty batch; --variant mlds has one
            return x.new_zeros(0, self.clean.out_channels, *x.shape[2:]), []
        features = self.encoder(x)
        stages = [features[-1], *self.decoder(features)]
        multi = [head(stage).float() for head, stage in zip(self.heads, stages, strict=True)]
        return self.clean(stages[-1]).float(), multi


# ---------------------------------------------------------------------------------------- Equations


def multi_label_target(y, classes, side):
    """Eq. (1): m*(c, cell) = max over the cell's pixels of [y = c], for side x side cells.

    y: (B, S, S) long, S a multiple of side -> (B, C, side, side) of 0 and 1. No gradient.
    Example: a cell of the pixels 0, 0, 0, 2 has the target (1, 0, 1) of three classes.
    """
    onehot = y[:, None] == torch.arange(classes, device=y.device)[:, None, None]  # (B, C, S, S)
    return F.max_pool2d(onehot.float(), y.shape[1] // side)


def mlds_loss(multi, y):
    """Eq. (2): L_MLDS = Σ_d BCE(σ(z_d), m*_d), each a mean over images, classes and cells.

    multi: logits [(B, C, s, s)], y: (B, S, S) long -> scalar. Gradient flows into all logits.
    Example: logits of 0 give log 2 a depth, whatever y.
    """
    targets = [multi_label_target(y, *z.shape[1:3]) for z in multi]
    return sum(map(F.binary_cross_entropy_with_logits, multi, targets))


def allowed_map(size, classes, limits, mask=None):
    """Eq. (3): A(p) = {y(p)} with a mask, else {0} ∪ ⋂_limits {c : p in a box of c}; bit c: c ∈ A.

    limits: [boxes, tags] or fewer, lists of (c, cx, cy, w, h) in shares of the side; a tag is a box
    around everything. mask: (size, size) long. -> (size, size) uint8. No gradient.
    """
    if mask is not None:
        return (1 << mask).to(torch.uint8)
    allowed = torch.full((size, size), 2**classes - 1, dtype=torch.uint8)
    for boxes in limits:
        inside = torch.ones_like(allowed)  # background
        for c, *box in boxes:  # all pixels that it touches; [ours] 0.01 pixels are rounding
            cx, cy, w, h = (size * v for v in box)
            rows = slice(max(0, int(cy - h / 2 + 0.01)), int(cy + h / 2 + 0.99))
            inside[rows, max(0, int(cx - w / 2 + 0.01)):int(cx + w / 2 + 0.99)] |= 1 << c
        allowed &= inside
    return allowed


def pseudo_label(logits, allowed):
    """Eq. (4): Ŷ(p) = argmax over c ∈ A(p) of z_c(p); background where A is empty.

    logits (B, C, H, W), allowed (B, H, W) uint8, 0 (empty) where weak moved in the outside of the
    image -> (B, H, W) long. No gradient.
    """
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    forbidden = (allowed[:, None].int() >> classes) % 2 == 0  # (B, C, H, W)
    # max, not argmax, which is ten times slower on this layout; of equal ones it takes the first
    return logits.masked_fill(forbidden, -torch.inf).max(1).indices


def ema_decay(step, decay):
    """Eq. (5): α = min(1 − 1/(t + 1), decay), t = 0, 1, 2, ...; at first 0, 1/2, 2/3, ... [code].

    numbers -> number.
    """
    return min(1 - 1 / (step + 1), decay)


def ema_update(teacher, student, alpha):
    """Eq. (6): θ_t ← α θ_t + (1 − α) θ_s, in place, for every parameter.

    teacher, student: modules of one architecture. No gradient. BatchNorm's buffers are left alone.
    """
    with torch.no_grad():
        for p_t, p_s in zip(teacher.parameters(), student.parameters(), strict=True):
            p_t.lerp_(p_s, 1 - alpha)


# -------------------------------------------------------------------------------------- Annotations


def allowed_maps(data, args):
    """Eq. (3) of all training images: uint8 (N, S, S); prints how many have which annotation."""
    data.decode()  # before Run does: what stops here leaves no run folder
    if data.classes > 8:
        stop(f"{data.classes} classes, but a pixel's allowed ones are 8 bits. Merge some classes.")
    known = {kind: annotations(data, kind, getattr(args, kind)) for kind in ("boxes", "tags")}
    maps = np.zeros((len(data.names), args.size, args.size), np.uint8)
    counts = dict.fromkeys(("masks", "boxes", "tags", "boxes and tags", "none"), 0)
    for i in data.indices("labeled") + data.indices("unlabeled"):
        mask = data.load_labels([i])[0].cpu() if i in data.label_rows else None
        limits = {kind: boxes[i] for kind, boxes in known.items() if i in boxes}
        maps[i] = allowed_map(args.size, data.classes, limits.values(), mask)
        counts["masks" if mask is not None else " and ".join(limits) or "none"] += 1
    print("training images with", ", ".join(f"{kind}: {n}" for kind, n in counts.items()))
    return maps


# ----------------------------------------------------------------------------------------- Networks


def build(channels, classes, width):
    """The student, and the teacher, its copy at the start, not trained itself: {name: network}."""
    unet, widths = UNet(channels, classes, width), [width * 2**i for i in (4, 3, 2, 1, 0)]
    student = MultiLabelNet(unet.encoder, unet.decoder, widths, HIDDEN, classes)
    return {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}


def predict(networks, x):
    """Images (B, channels, H, W) -> probabilities {name: (B, C, H, W)}, the reported one first."""
    names = [name for name in ("teacher", "student") if name in networks]
    return {name: networks[name](x)[0].softmax(1) for name in names}


def pictures(networks, x):
    """Columns of preview.png: classes 1, 2, 3 of a cell in red, green, blue; several are mixed."""
    def paint(m):  # (B, C, s, s) -> (B, 3, S, S)
        return F.interpolate(F.pad(m, [0] * 5 + [2])[:, 1:4], x.shape[2:])

    label = next(iter(predict(networks, x).values())).argmax(1)
    coarse, fine = (networks["student"](x)[1][d].sigmoid() for d in (1, 3))
    return {"labels, cells of 8": paint(multi_label_target(label, *coarse.shape[1:3])),
            "heads, cells of 8": paint(coarse), "heads, cells of 2": paint(fine)}


def main(argv=None):
    # options
    options = parser(__doc__)
    add = options.own.add_argument
    add("--variant", choices=["mlds", "self", "mean"], default="mean",
        help="mlds: labelled images only; self (STDS): student labels; mean (MTDS): teacher labels")
    add("--weight", type=float, default=0.3, help="λ of L_MLDS(Ŷ) (%(default)s) [ours]")
    add("--boxes", metavar="SPEC", help="hidden units to derive boxes for, such as 20%%")
    add("--tags", metavar="SPEC", help="hidden units to derive image labels for, such as 30%%")
    args = parse(options, argv)
    if args.variant == "mlds":  # the loop below has no branch for it
        args.unlabeled_batch, args.weight, args.boxes, args.tags = 0, 0.0, None, None

    # data, run, networks, optimizer
    data = Data(args)
    maps = allowed_maps(data, args)
    run = Run("mlds", args, data)
    networks = run.place(build(data.channels, data.classes, args.width))
    if args.variant != "mean":  # the student is its own teacher: Eq. (6) changes nothing
        networks.pop("teacher")
    student, teacher = networks["student"], networks.get("teacher", networks["student"])
    optimizer = torch.optim.AdamW(student.parameters(), args.lr, weight_decay=WEIGHT_DECAY)
    run.keep(networks, [optimizer], predict, pictures)

    for step in run.steps():
        # 1 batch
        x_l, y_l, x_u, allowed, _ = data.batch(maps)

        # 2 views
        x_ls, x_us = strong(x_l), strong(x_u)

        # 3 targets
        with torch.no_grad(), run.autocast():
            label_u = pseudo_label(teacher(x_u)[0], allowed)  # (B, H, W)

        # 4 losses
        with run.autocast():
            logits_l, multi_l = student(x_ls)
            logits_u, multi_u = student(x_us)
        loss_sup = supervised_loss(logits_l, y_l)
        loss_mlds = mlds_loss(multi_l, y_l)
        loss_pseudo = mlds_loss(multi_u, label_u)  # never the clean head
        lam = args.weight * ramp_up(step, RAMP * args.steps)
        loss = loss_sup + loss_mlds + lam * loss_pseudo  # Eq. (7)

        # 5 step
        lr = set_lr(optimizer, args.lr * poly_decay(step, args.steps))
        optimizer.zero_grad(set_to_none=True)
        run.backward(loss)
        run.update(optimizer)

        # 6 teacher
        ema_update(teacher, student, ema_decay(step, EMA_DECAY))

        # 7 log, validate, save
        agreement = (logits_u.argmax(1) == label_u).float().mean().nan_to_num()  # no x_u: 0
        run.log(loss=loss, sup=loss_sup, mlds=loss_mlds, pseudo=loss_pseudo, lam=lam,
                agreement=agreement, lr=lr)
        run.save(step)

    return run.finish()


if __name__ == "__main__":
    main()
