"""MLDS: multi-label deep supervision, from masks, boxes, image-level labels and no labels at all.

"Every annotation counts: Multi-label deep supervision for medical image segmentation", S. Reiß,
C. Seibold, A. Freytag, E. Rodner, R. Stiefelhagen, CVPR 2021, https://arxiv.org/abs/2104.13243

Idea
    Deep supervision puts a loss on every stage of the decoder. A cell of a coarse stage covers many
    pixels, so its target is the set of classes inside it, and each head answers "which of them are
    here?". Such targets forgive small errors, so they may come from labels that are not quite
    right: a slowly moving teacher labels the images without masks. Where boxes or image-level
    labels are known, the teacher may only choose among the classes that they allow. A separate
    clean head is trained on true masks alone; it makes the labels, and is the one used in the end.

        x_l ---> student --+-- multi-label heads <--- BCE --- max-pooled y (each resolution)
                    |      +-- clean head <---------- CE ---- y
                 average
                    v
        x_u ---> teacher ----- clean head, argmax over allowed classes ---> Ŷ  (no gradient)
        strong(x_u) -> student -- multi-label heads <--- BCE --- max-pooled Ŷ

Run
    python mlds.py                                     # the built-in phantom
    python mlds.py --data PATH --labeled 10%           # uses PATH/boxes, PATH/tags where they are
    python mlds.py --data PATH --labeled 10% --boxes 20% --tags 30%   # derived from hidden masks

Equations (numbers are this file's)
    Eq. (1)  multi_label_target  which classes are in a cell
    Eq. (2)  mlds_loss           binary cross-entropy of the heads of all depths
    Eq. (3)  allowed_map         the classes that an image's annotation allows at each pixel
    Eq. (4)  pseudo_label        the most probable allowed class
    Eq. (5)  ema_decay           the teacher's memory, short at first
    Eq. (6)  ema_update          teacher weights: running average of the student's
    Eq. (7)  main                L = CE + L_MLDS + λ L_MLDS(Ŷ)

Differences
    1. From the paper: U-Net, AdamW, batches and common.strong as in all six files; no ramp of λ.
    2. Like the paper, the clean head learns by CE alone: a labelled-only run of the other files (CE
       + Dice) is no ablation of this one; --variant mlds is.
    3. From the authors' code: BCE is a mean over images, not a sum, so that the learning rate does
       not depend on the batch size; the teacher averages parameters, its BatchNorm has statistics
       of its own, as in mean_teacher.py. Neither was measured.
    4. Labelled and unlabelled images pass separately; the unlabelled stream holds no labelled image
       (with --labeled 100% it holds them all, labelled by their masks).
"""
import argparse
import copy
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import (
    COLORS,
    DEPTH,
    Bad,
    Data,
    Decoder,
    Encoder,
    Run,
    parse,
    parser,
    poly_decay,
    read_each,
    set_lr,
    stop,
    strong,
)

WEIGHT_DECAY = 1e-2  # [ours] AdamW's, the same in all six files
EMA_DECAY = 0.99  # [ours] as in mean_teacher.py
HIDDEN = 64  # [paper] channels inside a multi-label head

# ------------------------------------------------------------------------------------------ Modules


class MultiLabelNet(nn.Module):
    """Multi-label heads on the bottleneck and every decoder stage, and a clean head on the last.

    encoder: image -> features, the bottleneck's last; decoder: features -> stages, coarsest first;
    widths: channels of bottleneck and stages.
    """

    def __init__(self, encoder, decoder, widths, hidden, classes):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.heads = nn.ModuleList(nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(True),
            nn.Conv2d(hidden, classes, 1)) for width in widths)
        self.clean = nn.Conv2d(widths[-1], classes, 1)

    def forward(self, x):
        """(B, channels, H, W) -> clean logits (B, C, H, W), [multi-label logits (B, C, h, w)]."""
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

    multi: the heads' logits [(B, C, h, h)]; y: (B, S, S) long -> scalar. Gradient: into all logits.
    Example: logits of 0 give log 2 a depth, whatever y.
    """
    return sum(F.binary_cross_entropy_with_logits(z, multi_label_target(y, *z.shape[1:3]))
               for z in multi)


def allowed_map(size, classes, mask=None, boxes=None, tags=None):
    """Eq. (3): A(p) = {y(p)} with a mask, else {0} ∪ {c in tags, p in a box of c}; bit c: c ∈ A.

    mask: (size, size) long; boxes: [(c, cx, cy, w, h)], shares of the side; tags: [c]; None: not
    known, so no limit. A pixel that a box touches is in it. -> (size, size) uint8. No gradient.
    """
    if mask is not None:
        return (1 << mask).to(torch.uint8)
    allowed = torch.full((size, size), 2**classes - 1 if boxes is None else 1, dtype=torch.uint8)
    for c, cx, cy, w, h in boxes or []:  # 0.01 pixels are rounding errors of the file
        left, right = int((cx - w / 2) * size + 0.01), int((cx + w / 2) * size + 0.99)
        top, bottom = int((cy - h / 2) * size + 0.01), int((cy + h / 2) * size + 0.99)
        allowed[top:bottom, left:right] |= 1 << c
    return allowed if tags is None else allowed & (1 | sum(1 << c for c in set(tags)))


def pseudo_label(logits, allowed):
    """Eq. (4): Ŷ(p) = argmax over c ∈ A(p) of z_c(p); background where A is empty.

    logits (B, C, H, W), allowed (B, H, W) uint8, bit c for class c -> (B, H, W) long. No gradient.
    """
    allowed = allowed + (allowed == 0)  # 0: from outside the image
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    forbidden = (allowed[:, None].int() >> classes) % 2 == 0  # (B, C, H, W)
    return logits.masked_fill(forbidden, -torch.inf).argmax(1)


def ema_decay(step, decay):
    """Eq. (5): α = min(1 − 1/(t + 1), decay), t = 0, 1, 2, ... Short at first: 0, 1/2, 2/3

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


def regions(mask):
    """Connected regions of equal values, 4 neighbours: integers (H, W) -> region numbers (H, W).

    Runs along the rows are joined (union-find) where they touch an equal run of the row above.
    """
    start = np.ones(mask.shape, bool)
    start[:, 1:] = mask[:, 1:] != mask[:, :-1]
    run = start.cumsum().reshape(mask.shape) - 1  # each pixel's run
    touch = (mask[1:] == mask[:-1]) & (start[1:] | start[:-1])  # once a pair of runs
    parent = list(range(run[-1, -1] + 1))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for a, b in zip(run[:-1][touch].tolist(), run[1:][touch].tolist(), strict=True):
        parent[root(b)] = root(a)
    return np.array([root(i) for i in range(len(parent))])[run]


def boxes_of(mask):
    """A mask (H, W) -> [(c, cx, cy, w, h)], one box for each region of each class but background."""
    region, (h, w), boxes = regions(mask), mask.shape, []
    for number in np.unique(region[mask > 0]):
        y, x = np.nonzero(region == number)
        (top, left), (bottom, right) = (y.min(), x.min()), (y.max() + 1, x.max() + 1)
        boxes.append((int(mask[y[0], x[0]]), (left + right) / 2 / w, (top + bottom) / 2 / h,
                      (right - left) / w, (bottom - top) / h))
    return boxes


def read_annotation(path, kind, classes):
    """A boxes file -> [(c, cx, cy, w, h)], a tags file -> [c]; a bad line stops the run."""
    form, rows = {"boxes": "class cx cy w h", "tags": "class"}[kind], []
    for n, line in enumerate(path.read_text("utf-8-sig", "replace").splitlines(), 1):
        words, wrong = line.split(), None
        for row in [words] * bool(words) if kind == "boxes" else [[word] for word in words]:
            try:
                c, *box = int(row[0]), *map(float, row[1:])
                if len(row) != len(form.split()):
                    raise ValueError
            except ValueError:
                wrong = f"expected numbers: {form}"
            else:
                ends = [m + s * side / 2 for m, s in zip(box[:2], box[2:], strict=True)
                        for side in (-1, 1)]
                if not 0 < c < classes:
                    wrong = (f"class {c}, expected 1 to {classes - 1}, the masks' numbers"
                             + ". YOLO counts from 0? add 1" * (c == 0))
                elif not all(-1e-3 < end < 1.001 for end in ends) or min(box[2:], default=1) <= 0:
                    wrong = "the box is empty or not inside the image; expected shares, 0 to 1"
            if wrong:
                stop(f"{path}, line {n}: {line!r}: {wrong}. Mend the line, or remove the file.")
            rows.append((c, *box) if kind == "boxes" else c)
    return rows


def share(text):
    """An argparse type: a share of the hidden training units, "20%"."""
    if not re.fullmatch(r"\d+(\.\d+)?%", text) or float(text[:-1]) > 100:
        raise argparse.ArgumentTypeError(f"{text}: expected a share from 0% to 100%, such as 20%")
    return text


def allowed_maps(data, args):
    """Eq. (3) of every training image -> uint8 (N, S, S); prints how many have which annotation.

    Files first; then --boxes and --tags: the first and the last of the shuffled hidden units.
    """
    data.decode()
    if data.classes > 8:
        stop(f"{data.classes} classes; MLDS keeps the allowed classes in 8 bits. Merge some.")
    found, number = {"boxes": {}, "tags": {}}, {name: i for i, name in enumerate(data.names)}
    for kind, rows in found.items():
        for path in [] if data.phantom else sorted(Path(args.data, kind).glob("[!.]*.txt")):
            if path.stem not in number:
                stop(f"{path}: there is no image of this name. Rename or remove the file.")
            rows[number[path.stem]] = read_annotation(path, kind, data.classes)
    hidden = [i for i in data.indices("unlabeled") if data.has_mask[i]]
    order = np.random.default_rng(args.split_seed).permutation(sorted(set(data.units))).tolist()
    order = [u for u in order if u in {data.units[i] for i in hidden}]  # nested: 10% in 20%
    n_boxes, n_tags = (round(len(order) * float(s[:-1]) / 100 + 1e-6) for s in (args.boxes, args.tags))
    boxed, tagged = set(order[:n_boxes]), set(order[len(order) - n_tags:])

    def read(i):
        mask = data.truth(i)
        if mask.max() >= data.classes:
            raise Bad(f"{data.names[i]}: class {mask.max()}, expected up to {data.classes - 1}")
        return i, mask

    chosen = [i for i in hidden if data.units[i] in boxed | tagged]
    for i, mask in read_each(chosen, read, "hidden masks"):
        if data.units[i] in boxed:
            found["boxes"].setdefault(i, boxes_of(mask))
        if data.units[i] in tagged:
            found["tags"].setdefault(i, np.unique(mask[mask > 0]).tolist())
    maps, counts = np.zeros((len(data.names), args.size, args.size), np.uint8), Counter()
    labeled = set(data.indices("labeled"))
    for i in [*labeled, *data.indices("unlabeled")]:
        mask = data.load_labels([i])[0].cpu() if i in labeled else None
        known = {kind: rows.get(i) for kind, rows in found.items()}
        maps[i] = allowed_map(args.size, data.classes, mask, **known)
        kinds = [kind for kind, rows in known.items() if rows is not None]
        counts["masks" if i in labeled else " and ".join(kinds) or "none"] += 1
    listed = (f"{kind} {counts[kind]}" for kind in ("masks", "boxes", "tags", "boxes and tags", "none"))
    print(f"annotations of the {counts.total()} training images: {', '.join(listed)}")
    return maps


# ----------------------------------------------------------------------------------------- Networks


def build(channels, classes, width):
    """The student, and the teacher, which starts as its copy, untrained: {name: network}."""
    widths = [width * 2**i for i in range(DEPTH, -1, -1)]
    encoder, decoder = Encoder(channels, width), Decoder(width)
    student = MultiLabelNet(encoder, decoder, widths, HIDDEN, classes)
    return {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}


def predict(networks, x):
    """Images (B, channels, H, W) -> probabilities {name: (B, C, H, W)}, the reported one first."""
    names = [name for name in ("teacher", "student") if name in networks]
    return {name: networks[name](x)[0].softmax(1) for name in names}


def pictures(networks, x):
    """Columns of preview.png: the classes found in coarse and fine cells, in the mask's colours."""
    label = next(iter(predict(networks, x).values())).argmax(1)
    _, multi = networks["student"](x)
    colors = [list(bytes.fromhex(color[1:])) for color in COLORS[:multi[0].shape[1] - 1]]

    def paint(probs):  # (B, C, h, w) -> (B, 3, H, W); a cell of several classes mixes their colours
        rgb = torch.einsum("bchw,cr->brhw", probs[:, 1:], torch.tensor(colors).to(probs) / 255)
        return F.interpolate(rgb.clamp(max=1), x.shape[2:])

    columns = {"Ŷ in cells of 8": paint(multi_label_target(label, *multi[1].shape[1:3]))}
    return columns | {f"head, cells of {2**d}": paint(multi[DEPTH - d].sigmoid()) for d in (3, 1)}


def main(argv=None):
    # options
    options = parser(__doc__)
    add = options.own.add_argument
    add("--variant", choices=["mlds", "self", "mean"], default="mean",
        help="labelled images only; student labels; EMA teacher labels (%(default)s)")
    add("--weight", type=float, default=1.0, help="λ of L_MLDS(Ŷ) (%(default)s) [ours]")
    add("--boxes", type=share, default="0%", help="hidden units to derive boxes for, such as 20%%")
    add("--tags", type=share, default="0%", help="hidden units to derive image-level labels for")
    args = parse(options, argv)
    if args.variant == "mlds":  # the loop below has no branch for it
        args.unlabeled_batch, args.weight = 0, 0.0

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
            clean_t, _ = teacher(x_u)
        label_u = pseudo_label(clean_t, allowed)  # (B, H, W)

        # 4 losses
        with run.autocast():
            clean_l, multi_l = student(x_ls)
            clean_u, multi_u = student(x_us)
        loss_sup = F.cross_entropy(clean_l, y_l)
        loss_mlds = mlds_loss(multi_l, y_l)
        loss_pseudo = mlds_loss(multi_u, label_u)  # never the clean head
        loss = loss_sup + loss_mlds + args.weight * loss_pseudo  # Eq. (7)

        # 5 step
        lr = set_lr(optimizer, args.lr * poly_decay(step, args.steps))
        optimizer.zero_grad(set_to_none=True)
        run.backward(loss)
        run.update(optimizer)

        # 6 teacher
        ema_update(teacher, student, ema_decay(step, EMA_DECAY))

        # 7 log, validate, save
        agreement = (clean_u.argmax(1) == label_u).float().mean().nan_to_num()
        run.log(loss=loss, sup=loss_sup, mlds=loss_mlds, pseudo=loss_pseudo, lam=args.weight,
                agreement=agreement, lr=lr)
        run.save(step)

    return run.finish()


if __name__ == "__main__":
    main()
