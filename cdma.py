"""CDMA: cross distillation of multiple attentions.

"Semi-supervised pathological image segmentation via cross distillation of multiple attentions",
L. Zhong, X. Liao, S. Zhang, G. Wang, MICCAI 2023, https://arxiv.org/abs/2305.18830

Idea
    One encoder feeds three decoders that differ in their attention. One weighs channels (CA), one
    weighs places (SA), and one does both in turn (CSA). The three decoders make different
    mistakes, and cost only 1.8 times the weights of one network. On all images, each decoder learns
    from the probabilities of the other two; a temperature flattens these, so that less likely
    classes count, too. A last loss lowers the entropy of the three decoders' mean. The CSA branch
    is used in the end.

                        +---> decoder with CA  ---> P_CA ----+    each is pulled towards the other
        x ---> encoder -+---> decoder with SA  ---> P_SA ----+--- two at temperature T (all images);
                        +---> decoder with CSA ---> P_CSA ---+    the entropy of their mean falls

        labelled images: the mean of the three supervised losses with y

Run
    python cdma.py                                      # the built-in phantom
    python cdma.py --data PATH --labeled 10%
    python cdma.py --data PATH --labeled 10% --distill-weight 0   # without cross distillation

Equations (numbers are this file's)
    Eq. (1)  kd_loss      how far a student's softened probabilities are from a teacher's
    Eq. (2)  cdkd_loss    each branch the student of the two others
    Eq. (3)  um_loss      entropy of the branches' mean
    Eq. (4)  main         L = L_sup + λ(t) (λ_1 L_cdkd + λ_2 L_um),
                          λ(t) = 0 for the first 10% of the steps, then 1

Differences
    paper or authors' code               | here                                 | does it matter?
    -------------------------------------+--------------------------------------+-------------------
    The distillation is written for two  | Any number of classes.               | ?
    classes (code).                      |                                      |
    The decoder is DeepLabv3+'s.         | A U-Net's, with attention after its  | attention before
                                         | three coarse blocks, as the authors  | the last layer,
                                         | have it in a U-Net of theirs (code). | too: CSA missed a
                                         |                                      | class (--seed 2)
    Dropout is 0.5 on the shared         | None.                                | with it 79.4 and
    features, 0.5 and 0.1 in decoders    |                                      | 77.8, without 79.2
    (code).                              |                                      | and 80.6 †
    The encoder is pretrained and does   | A U-Net's, with BatchNorm; labelled  | ?
    not use batch statistics.            | and unlabelled images go through in  |
                                         | two passes.                          |
    SGD, whose rate falls at 1/4, 1/2,   | AdamW with poly decay, as in all six | ?
    3/4 to a tenth or half (code, by     | files.                               |
    version).                            |                                      |
    The Dice loss squares probabilities  | CE + Dice, as in all six files.      | ?
    and sums over the batch (code).      |                                      |
    Images are flipped, turned by 90     | All branches see one common.strong   | ?
    degrees, and get a little noise.     | view.                                |
    The checkpoint best on validation is | The last one is reported; the best   | ?
    reported (code).                     | stands beside it.                    |
    (Other code draws labelled images    | The unlabelled batch holds no        | ?
    for the unlabelled batch, too.)      | labelled image, unless all are.      |
    ?: not tried. †: Dice of the phantom's validation patients, --seed 10 and 11.
    README's ACDC table, --seed 2: 0.7 Dice below labelled-only, by one of 20 patients (-14); on
    validation patients 1.2 above. With 7 patients, 1500 steps: 0.2 below, equal on validation.
"""
import math

import torch
from torch import nn

from common import (
    Data,
    Decoder,
    Encoder,
    Run,
    heat,
    mixed_precision,
    number,
    parse,
    parser,
    place,
    poly_decay,
    set_lr,
    strong,
    supervised_loss,
)

WEIGHT_DECAY = 1e-2  # [ours] AdamW's, the same in all six files
START = 0.1  # [code] share of the steps before L_cdkd and L_um begin: 15 of 150 epochs

# ------------------------------------------------------------------------------------------ Modules


class ChannelAttention(nn.Module):
    """CA: F · σ(MLP(avgpool F) + MLP(maxpool F)), one weight for each channel (Woo et al. 2018).

    F (B, C, H, W) -> the same shape. The MLP is shared, its hidden width max(1, C // 16).
    """

    def __init__(self, channels):
        super().__init__()
        hidden = max(1, channels // 16)  # [code]
        self.mlp = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.ReLU(True),
                                 nn.Conv2d(hidden, channels, 1, bias=False))  # no biases: [code]

    def forward(self, x):
        average, largest = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return x * (self.mlp(average) + self.mlp(largest)).sigmoid()  # weights (B, C, 1, 1)


class SpatialAttention(nn.Module):
    """SA: F · σ(conv7×7[mean_c F ⊕ max_c F]), one weight for each pixel: (B, C, H, W) -> same."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)  # 7: [code]; a version has 3 in SA

    def forward(self, x):
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)  # (B, 2, H, W)
        return x * self.conv(pooled).sigmoid()  # weights (B, 1, H, W)


BRANCHES = ("CSA", "CA", "SA")  # [paper]


def attention(branch, channels):
    """A branch's attention for features of that many channels; CSA is CA, then SA."""
    if branch == "CA":
        return ChannelAttention(channels)
    if branch == "SA":
        return SpatialAttention()
    return nn.Sequential(ChannelAttention(channels), SpatialAttention())


class ThreeBranches(nn.Module):
    """Image (B, channels, H, W) -> {branch: logits (B, classes, H, W), float32}: CSA, CA and SA.

    encoder(x): features from fine to coarse; decoders: one a branch, with `blocks` that join a
    coarse and a skip feature, of `widths` channels, coarsest first. Attention follows every block
    but the finest: before the classifier a gate shrinks features, and nothing repairs that.
    """

    def __init__(self, encoder, decoders, widths, classes):
        super().__init__()
        self.encoder = encoder
        self.decoders = nn.ModuleDict(zip(BRANCHES, decoders, strict=True))
        self.attentions, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for branch in BRANCHES:
            self.attentions[branch] = nn.ModuleList(attention(branch, c) for c in widths[:-1])
            self.heads[branch] = nn.Conv2d(widths[-1], classes, 1)

    def forward(self, x):
        *skips, bottleneck = self.encoder(x)  # skips: from fine to coarse
        logits = {}
        for branch, decoder in self.decoders.items():
            features = bottleneck
            for stage, attend in enumerate(self.attentions[branch]):
                features = decoder.blocks[stage](features, skips[-1 - stage])
                features = attend(features)
            features = decoder.blocks[-1](features, skips[0])  # the finest: no attention
            logits[branch] = self.heads[branch](features).float()
        return logits


# ---------------------------------------------------------------------------------------- Equations


def kd_loss(logits_s, logits_t, temperature):
    """Eq. (1): L_kd = T² mean over images and pixels of KL(softmax(z_t / T) ‖ softmax(z_s / T)).

    logits (B, C, H, W) of student and teacher -> scalar. Gradient flows into the student's alone.
    Example: equal logits give 0, and T² keeps the gradient's size when T grows.
    """
    log_s = (logits_s / temperature).log_softmax(1)
    log_t = (logits_t.detach() / temperature).log_softmax(1)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(1).mean()


def cdkd_loss(logits, temperature):
    """Eq. (2): L_cdkd = mean over students s of the sum over t ≠ s of L_kd(z_s, z_t).

    logits: list of (B, C, H, W), one a branch -> scalar. Gradient: of each term into its student.
    """
    total = 0
    for s in range(len(logits)):
        for t in range(len(logits)):
            if t != s:
                total = total + kd_loss(logits[s], logits[t], temperature)
    return total / len(logits)


def um_loss(logits):
    """Eq. (3): L_um = mean over images and pixels of H(P̄) / log C, P̄ the mean of the softmaxes.

    logits: list of (B, C, H, W), one a branch -> scalar from 0 (certain) to 1. Gradient: into all.
    """
    mean = torch.stack(logits).softmax(2).mean(0)  # (B, C, H, W)
    entropy = -(mean * mean.clamp_min(1e-8).log()).sum(1)  # 1e-8: finite gradient at 0 [ours]
    return entropy.mean() / math.log(mean.shape[1])


# ----------------------------------------------------------------------------------------- Networks


def build(channels, classes, width):
    """The U-Net's encoder and three of its decoders, with attention: {name: network}."""
    decoders = [Decoder(width) for _ in BRANCHES]  # each with random weights of its own
    widths = [8 * width, 4 * width, 2 * width, width]  # of Decoder's blocks, coarsest first
    return {"three branches": ThreeBranches(Encoder(channels, width), decoders, widths, classes)}


def predict(networks, x):
    """Images (B, channels, H, W) -> probabilities {name: (B, C, H, W)}."""
    probs = {branch: z.softmax(1) for branch, z in networks["three branches"](x).items()}
    return probs | {"mean": sum(probs.values()) / len(probs)}


def pictures(networks, x):
    """Columns of preview.png: where the branches contradict each other, and what they doubt."""
    probs = predict(networks, x)
    labels = torch.stack([probs[branch].argmax(1) for branch in BRANCHES])  # (3, B, H, W)
    disagreement = (labels.amax(0) != labels.amin(0)).float()
    entropy = -torch.xlogy(probs["mean"], probs["mean"]).sum(1)
    return heat("disagreement", disagreement) | heat("entropy of mean", entropy)


def main(argv=None):
    # options
    options = parser(__doc__)
    add = options.own.add_argument
    add("--distill-weight", type=number(float, 0), default=0.1,
        help="λ_1 of L_cdkd (%(default)s) [paper]")
    add("--entropy-weight", type=number(float, 0), default=0.1,
        help="λ_2 of L_um (%(default)s) [paper]")
    add("--temperature", type=number(float, 0.01), default=10.0,
        help="T of L_kd (%(default)s) [paper]")
    args = parse(options, argv)

    # data, networks, optimizer, run
    data = Data(args)
    torch.manual_seed(args.seed)
    networks = place(build(data.channels, data.classes, args.width), args)
    network = networks["three branches"]
    optimizer = torch.optim.AdamW(network.parameters(), args.lr, weight_decay=WEIGHT_DECAY)
    autocast, scaler = mixed_precision(args)
    run = Run(__file__, args, data, networks, [optimizer, scaler], predict, "CSA", pictures)

    for step in run.steps():
        # 1 batch
        x_l, y_l, x_u, *_ = data.batch()

        # 2 views
        x_ls, x_us = strong(x_l), strong(x_u)  # one view for all three branches

        # 3 targets
        # none here: each branch's logits are the others' targets, detached in Eq. (1)

        # 4 losses
        with autocast():
            logits_l, logits_u = network(x_ls), network(x_us)  # {branch: (B, C, H, W)}
        # of each branch (B_l + B_u, C, H, W)
        logits = [torch.cat([logits_l[branch], logits_u[branch]]) for branch in BRANCHES]
        loss_sup = sum(supervised_loss(z, y_l) for z in logits_l.values()) / len(logits_l)
        loss_cdkd, loss_um = cdkd_loss(logits, args.temperature), um_loss(logits)
        lam = 0.0 if step < START * args.steps else 1.0  # λ(t): off, then on
        loss_unsup = args.distill_weight * loss_cdkd + args.entropy_weight * loss_um
        loss = loss_sup + lam * loss_unsup  # Eq. (4)

        # 5 step
        lr = set_lr(optimizer, args.lr * poly_decay(step, args.steps))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # 6 teacher
        # none: the branches teach each other

        # 7 log, validate, save
        labels = torch.stack(logits).argmax(2)  # (3, B, H, W)
        agreement = (labels.amax(0) == labels.amin(0)).float().mean()
        run.log(loss=loss, sup=loss_sup, cdkd=loss_cdkd, um=loss_um, lam=lam, agreement=agreement,
                lr=lr)
        run.save(step)

    return run.finish()


if __name__ == "__main__":
    main()
