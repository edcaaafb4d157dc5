"""MLDS: multi-label deep supervision, from masks, boxes, image-level labels and no labels at all.

"Every annotation counts: Multi-label deep supervision for medical image segmentation", S. Reiß,
C. Seibold, A. Freytag, E. Rodner, R. Stiefelhagen, CVPR 2021, https://arxiv.org/abs/2104.13243

Idea
    A position of the bottleneck or of a decoder stage, a cell, stands for a square of pixels. A
    small classifier at each, a head, says which classes are in the square. A label map whose
    borders are wrong by a pixel mostly gives the same sets, so these targets may come from labels
    that are not quite right: a slowly moving teacher labels the images without masks, and chooses
    among the classes that boxes or image-level labels allow, if there are any. A separate "clean"
    head is trained on true masks only. The teacher's clean head makes the pseudo-labels, and makes
    the final segmentation.

        x_l -> student -> clean head <--- L_sup --- y;   heads <--- BCE --- y, max-pooled
        x_u, strong view -> student -> heads <--- BCE --- Ŷ, max-pooled
        x_u, weak view -> teacher (the student's average) -> clean head -> Ŷ: best allowed class

    Why two heads at the finest stage? A cell is one pixel there, so a wrong pseudo-label is a
    wrong target, which must not reach the head that segments. Do regions come out too large, since
    a class counts in every cell that it touches? Those of coarse heads do, but these heads only
    shape the features. How does this differ from joining the stages' features before one
    classifier? There one loss at full resolution trains all stages, as the clean head's does here;
    here each stage also has a loss of its own, with a target that is exact at its resolution.

Run
    python mlds.py                                         # the built-in phantom
    python mlds.py --data PATH --labeled 10%               # uses PATH/boxes, PATH/tags, if any
    python mlds.py --labeled 10% --boxes 20% --tags 30%    # computed from masks that it hides
    python mlds.py --variant deep    # or nearest, or mlds: uses labelled images alone

Equations (numbers are this file's)
    Eq. (1)  multi_label_target  which classes are in a cell
    Eq. (2)  mlds_loss           binary cross-entropy of the heads of all depths
    Eq. (3)  deep_loss           usual deep supervision: heads with one label a pixel, or a cell
    Eq. (4)  allowed_map         the classes that an image's annotation allows at each pixel
    Eq. (5)  pseudo_label        the most probable allowed class
    Eq. (6)  ema_decay           α, the share that the teacher keeps: 0 at first, then up to 0.99
    Eq. (7)  ema_update          teacher weights: running average of the student's
    Eq. (8)  main                L = L_sup(y) + L_MLDS(y) + λ(t) L_MLDS(Ŷ)
                                 --variant deep, nearest: L_sup(y) + L_deep(y);  mlds: without Ŷ

Differences
    paper or authors' code               | here                                 | does it matter?
    -------------------------------------+--------------------------------------+-------------------
    The clean head has cross-entropy     | It has CE + Dice, as in all six      | CE alone gave 56
    alone.                               | files.                               | Dice, both gave 82
                                         |                                      | (--seed 10)
    The clean head has two layers, as    | It is one 1×1 convolution.           | ?
    the others (code).                   |                                      |
    BCE is summed over the batch (code). | A mean, so that the rate does not    | ?
                                         | depend on the batch size.            |
    (λ and its ramp are not the          | λ(t) is that of mean_teacher.py with | λ 1: 49, 0.3: 56,
    paper's.)                            | 0.3 in the place of 5 [ours].        | 0.05: 53, CE alone
    (BatchNorm in the teacher is not     | It labels normalised by the batch,   | as in
    described.)                          | scores by the student's statistics;  | mean_teacher.py
                                         | with self, weak views enter them.    |
    (The paper's opponents, for labelled | The clean head and the heads stay,   | deep 75.6, 68.7 †
    images alone: deep, nearest.)        | L_deep is in the place of L_MLDS.    | nearest 75.8, 74.2
                                         | --variant mlds: L_MLDS, without Ŷ.   | mlds 75.5, 71.4
                                         | The default: with Ŷ, too.            | default 83.1, 81.7
    (Other code draws labelled images    | The unlabelled batch holds no        | ?
    for the unlabelled batch, too.)      | labelled image, unless all are; Ŷ is |
                                         | then their mask.                     |
    Other networks and optimizers.       | U-Net, AdamW, common.strong as in    | ?
                                         | all six files; labelled and          |
                                         | unlabelled images in two passes.     |
    ?: not tried. Dice is that of validation patients, after 800 steps on an older phantom (64 px, 3
    labelled patients) with an older augmentation (rotation to 20 degrees, scale to 1.25, no shift),
    where nothing else is said. †: Dice on today's phantom, --seed 10 and 11.
    README's ACDC table of 7 patients: 0.5 Dice below labelled-only, with boxes 1.5; it starts late.
"""
import copy
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import (
    Data,
    Run,
    UNet,
    choose_images,
    list_files,
    mixed_precision,
    number,
    parse,
    parser,
    place,
    plural,
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
HIDDEN = 64  # [code] channels inside a multi-label head

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
        if len(x) == 0:  # BatchNorm refuses an empty batch; --variant mlds, say, has one
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
    losses = []
    for z in multi:
        target = multi_label_target(y, z.shape[1], z.shape[2])  # (B, C, s, s)
        losses.append(F.binary_cross_entropy_with_logits(z, target))
    return sum(losses)


def deep_loss(multi, y, nearest=False):
    """Eq. (3): L_deep = Σ_d CE(z_d enlarged to y's size, y); nearest: Σ_d CE(z_d, y at its size).

    The two ways to supervise a coarse head with one label each. Shapes and gradient: Eq. (2).
    """
    losses = []
    for z in multi:
        if nearest:  # a cell has the label of one pixel, small structures may vanish
            shrunk = F.interpolate(y[:, None].float(), z.shape[2:], mode="nearest-exact")
            losses.append(F.cross_entropy(z, shrunk[:, 0].long()))
        else:
            enlarged = F.interpolate(z, y.shape[1:], mode="bilinear")
            losses.append(F.cross_entropy(enlarged, y))
    return sum(losses)


def allowed_map(size, classes, limits, mask=None):
    """Eq. (4): A(p) = {y(p)} with a mask, else {0} ∪ ⋂_limits {c : p in a box of c}; bit c: c ∈ A.

    limits: [boxes, tags] or fewer, lists of (c, cx, cy, w, h) in shares of the side; a tag is a box
    around everything; without limits all classes. mask: (size, size) long. -> (size, size) uint8,
    no gradient. Example, 3 classes: nothing 7 (1 + 2 + 4), tag 2 gives 5 (1 + 4), mask 2 gives 4.
    """
    if mask is not None:
        return (1 << mask).to(torch.uint8)
    allowed = torch.full((size, size), 2**classes - 1, dtype=torch.uint8)
    for boxes in limits:
        inside = torch.ones_like(allowed)  # background
        for c, cx, cy, w, h in boxes:
            # all pixels that the box touches; [ours] 0.01 of a pixel is rounding
            top, left = size * (cy - h / 2) + 0.01, size * (cx - w / 2) + 0.01
            bottom, right = size * (cy + h / 2) - 0.01, size * (cx + w / 2) - 0.01
            rows = slice(max(0, math.floor(top)), math.ceil(bottom))
            columns = slice(max(0, math.floor(left)), math.ceil(right))
            inside[rows, columns] |= 1 << c
        allowed &= inside
    return allowed


def pseudo_label(logits, allowed):
    """Eq. (5): Ŷ(p) = argmax over c ∈ A(p) of z_c(p); background where A is empty.

    logits (B, C, H, W), allowed (B, H, W) uint8, 0 (empty) where weak moved in the outside of the
    image -> (B, H, W) long. No gradient.
    """
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    forbidden = (allowed[:, None].int() >> classes) % 2 == 0  # (B, C, H, W)
    # max, not argmax, which is ten times slower on this layout; of equal ones it takes the first
    return logits.masked_fill(forbidden, -torch.inf).max(1).indices


def ema_decay(step, decay):
    """Eq. (6): α = min(1 − 1/(t + 1), decay), t = 0, 1, 2, ...; at first 0, 1/2, 2/3, ... [ours].

    numbers -> number.
    """
    return min(1 - 1 / (step + 1), decay)


def ema_update(teacher, student, alpha):
    """Eq. (7): θ_t ← α θ_t + (1 − α) θ_s, in place, for every parameter.

    teacher, student: modules of one architecture. No gradient. The student's BatchNorm statistics
    are copied.
    """
    with torch.no_grad():
        for p_t, p_s in zip(teacher.parameters(), student.parameters(), strict=True):
            p_t.lerp_(p_s, 1 - alpha)
        for b_t, b_s in zip(teacher.buffers(), student.buffers(), strict=True):
            b_t.copy_(b_s)


# -------------------------------------------------------------------------------------- Annotations

WHOLE = (0.5, 0.5, 1, 1)  # [ours] cx, cy, w, h: a tag is a box around the whole image


def connected_regions(mask):
    """Class numbers (H, W) -> region numbers (H, W): 4-connected pixels of one class share one."""
    padded = np.pad(mask.astype(int), 1, constant_values=-1)  # so that no region wraps around
    region = np.arange(padded.size).reshape(padded.shape)
    while True:  # the smallest number spreads to the neighbours of the same class
        smallest = region.copy()
        for axis in (0, 1):
            for shift in (-1, 1):
                same = np.roll(padded, shift, axis) == padded
                neighbour = np.roll(region, shift, axis)
                smallest = np.where(same, np.minimum(smallest, neighbour), smallest)
        smallest = smallest.ravel()[smallest]  # a number is a pixel: what this one holds by now
        if np.array_equal(smallest, region):
            return region[1:-1, 1:-1]
        region = smallest


def boxes_of(mask):
    """Class numbers (H, W) -> [(c, cx, cy, w, h)], a box for each connected region but of 0."""
    height, width = mask.shape
    region, boxes = connected_regions(mask), []
    for k in np.unique(region[mask > 0]):
        y, x = np.nonzero(region == k)
        left, right = x.min() / width, (x.max() + 1) / width
        top, bottom = y.min() / height, (y.max() + 1) / height
        c = int(mask[y[0], x[0]])
        boxes.append((c, (left + right) / 2, (top + bottom) / 2, right - left, bottom - top))
    return boxes


def tags_of(mask):
    """Class numbers (H, W) -> [(c, 0.5, 0.5, 1, 1)] of the classes that are there, but 0."""
    return [(int(c), *WHOLE) for c in np.unique(mask[mask > 0])]


def read_rows(path, kind):
    """Lines of boxes/NAME.txt or tags/NAME.txt: [(where, [class, cx, cy, w, h])], class a text."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{path} cannot be read as a text file: {error}")
    rows = []
    for n, line in enumerate(lines, 1):
        where, words = f"{path}, line {n}: {line[:80]!r}", line.split()
        if kind == "tags":
            rows += [(where, [word, *WHOLE]) for word in words]
        elif words:
            rows.append((where, words))
    return rows


def read_boxes(path, kind, classes):
    """boxes/NAME.txt or tags/NAME.txt -> [(c, cx, cy, w, h)] in shares of width and height."""
    form = {"boxes": "class cx cy w h", "tags": "class"}[kind]
    boxes = []
    for where, words in read_rows(path, kind):
        try:
            c = int(words[0])
            cx, cy, w, h = map(float, words[1:])  # ValueError, too, if these are not four
        except ValueError:
            stop(f"{where}; expected: {form}")
        if not 0 < c < classes:
            stop(f"{where}: class {str(c)[:20]}; expected 1 to {classes - 1}, as in masks "
                 "(YOLO counts from 0? add 1; more classes? --classes)")
        sides = cx - w / 2, cx + w / 2, cy - h / 2, cy + h / 2
        inside = all(-1e-3 < side < 1 + 1e-3 for side in sides)  # 0.001 is rounding
        if not (inside and w > 0 and h > 0):
            stop(f"{where}: the box is empty or leaves the image; expected {form}, from 0 to 1, "
                 "shares of the image's width and height")
        boxes.append((c, cx, cy, w, h))
    return boxes


def annotations(data, kind, spec):
    """Boxes or tags: those of PATH/kind, and those made from the masks of `spec` hidden units.

    -> {image number: [(c, cx, cy, w, h)]}. Of hidden masks, only those of `spec` are opened.
    """
    number_of = {item.name: i for i, item in enumerate(data.items)}
    found = {}
    folder = Path(data.args.data, kind)
    files = {}
    if folder.is_dir():
        files = list_files(folder, (".txt",))
    for name, path in files.items():
        if path.suffix != ".txt":
            stop(f"{path}: expected the ending .txt. Rename it.")
        if name not in number_of:
            stop(f"{path}: no image has this name. Rename or remove it.")
        found[number_of[name]] = read_boxes(path, kind, data.classes)
    if not spec:
        return found
    hidden = [i for i in data.indices("unlabeled") if data.items[i].mask is not None]
    hidden_units = {data.items[i].unit for i in hidden}
    every_unit = sorted({item.unit for item in data.items})
    order = np.random.default_rng(data.args.split_seed).permutation(every_unit).tolist()
    units = [unit for unit in order if unit in hidden_units]
    if kind == "tags":
        units.reverse()  # from the other end: few images have both
    for i in choose_images(spec, units, hidden, data.items, f"--{kind}", "hidden units"):
        try:
            mask = data.truth(i)
        except ValueError as error:
            stop(f"bad file among the hidden masks: {error}")
        if mask.max() >= data.classes:
            stop(f"the mask of {data.items[i].name} holds class {mask.max()}. Give --classes.")
        if i not in found:
            found[i] = boxes_of(mask) if kind == "boxes" else tags_of(mask)
    return found


def check_folder(data):
    """For `common.py check`: stops on what a run with these boxes and tags would stop on."""
    for kind in ("boxes", "tags"):
        found = annotations(data, kind, None)
        if found:
            print(f"{kind}: {plural(len(found), 'image')}")


def allowed_maps(data, boxes_spec, tags_spec):
    """Eq. (4) of all training images: uint8 (N, S, S); prints how many have which annotation."""
    if data.classes > 8:
        stop(f"{data.classes} classes, but a pixel's allowed ones are 8 bits. Merge some classes.")
    found = {"boxes": annotations(data, "boxes", boxes_spec),
             "tags": annotations(data, "tags", tags_spec)}
    size = data.args.size
    maps = torch.zeros(len(data.items), size, size, dtype=torch.uint8)
    counts = {"masks": 0, "boxes": 0, "tags": 0, "boxes and tags": 0, "none": 0}
    for i in data.indices("labeled"):
        maps[i] = allowed_map(size, data.classes, [], data.labels[i].long())
        counts["masks"] += 1
    for i in data.indices("unlabeled"):
        known = {kind: images[i] for kind, images in found.items() if i in images}
        maps[i] = allowed_map(size, data.classes, known.values())
        counts[" and ".join(known) or "none"] += 1
    print("training images with", ", ".join(f"{kind}: {n}" for kind, n in counts.items()))
    return maps


# ----------------------------------------------------------------------------------------- Networks


def build(channels, classes, width):
    """The student, and the teacher, its copy at the start, not trained itself: {name: network}."""
    unet, widths = UNet(channels, classes, width), [width * 2**i for i in (4, 3, 2, 1, 0)]
    student = MultiLabelNet(unet.encoder, unet.decoder, widths, HIDDEN, classes)
    return {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}


def predict(networks, x):
    """Images (B, channels, H, W) -> probabilities {name: (B, C, H, W)}."""
    return {name: network(x)[0].softmax(1) for name, network in networks.items()}


def paint(m, size):
    """Scores (B, C, s, s) -> classes 1, 2, 3 in red, green, blue (B, 3, *size); several mix."""
    b, classes, *side = m.shape
    colours = m.new_zeros(b, 3, *side)
    colours[:, :min(3, classes - 1)] = m[:, 1:4]
    return F.interpolate(colours, size)


def pictures(networks, x, softmax):
    """Columns of preview.png: cells by the student's segmentation (8 pixels), its heads (8, 2)."""
    clean, multi = networks["student"](x)
    if softmax:  # deep and nearest: their heads give a cell one class, not a set
        coarse, fine = multi[1].softmax(1), multi[3].softmax(1)
    else:
        coarse, fine = multi[1].sigmoid(), multi[3].sigmoid()
    held = multi_label_target(clean.argmax(1), coarse.shape[1], coarse.shape[2])
    legend = "1 red, 2 green, 3 blue"
    return {f"segmentation, cells of 8\n{legend}": paint(held, x.shape[2:]),
            f"heads, cells of 8\n{legend}": paint(coarse, x.shape[2:]),
            f"heads, cells of 2\n{legend}": paint(fine, x.shape[2:])}


def main(argv=None):
    # options
    options = parser(__doc__)
    add = options.own.add_argument
    add("--variant", choices=["deep", "nearest", "mlds", "self", "mean"], default="mean",
        help="labelled images alone: deep, nearest (Eq. 3) or mlds (Eq. 2); all images: self, the "
        "paper's self-taught (the student labels), or mean, mean-taught (the teacher labels) "
        "(%(default)s)")
    add("--weight", type=number(float, 0), default=0.3, help="λ of L_MLDS(Ŷ) (%(default)s) [ours]")
    add("--boxes", metavar="SPEC",
        help="20%%, say, of the units whose masks are hidden get boxes, computed from these masks")
    add("--tags", metavar="SPEC", help="30%%, say, of them get image-level labels")
    args = parse(options, argv)
    deep = args.variant in ("deep", "nearest")
    labeled_only = deep or args.variant == "mlds"
    if labeled_only and (args.boxes or args.tags):
        stop(f"--variant {args.variant} uses labelled images alone; --boxes and --tags are for "
             "self and mean. Leave one of them out.")

    # data, networks, optimizer, run
    data = Data(args)
    weight = args.weight
    if labeled_only:  # labelled images alone: the other batch is empty, its maps say nothing
        weight = 0.0
        data.unlabeled_batch = 0
        maps = torch.zeros(len(data.items), args.size, args.size, dtype=torch.uint8)
    else:
        maps = allowed_maps(data, args.boxes, args.tags)
    torch.manual_seed(args.seed)
    networks = place(build(data.channels, data.classes, args.width), args)
    if args.variant == "mean":
        headline = "teacher"
    else:  # the student labels the images itself
        headline = "student"
        del networks["teacher"]
    student, labeler = networks["student"], networks[headline]
    optimizer = torch.optim.AdamW(student.parameters(), args.lr, weight_decay=WEIGHT_DECAY)
    autocast, scaler = mixed_precision(args)
    show = partial(pictures, softmax=deep)
    run = Run(__file__, args, data, networks, [optimizer, scaler], predict, headline, show)

    for step in run.steps():
        # 1 batch
        x_l, y_l, x_u, allowed, _ = data.batch(maps)

        # 2 views
        x_ls, x_us = strong(x_l), strong(x_u)

        # 3 targets
        with torch.no_grad(), autocast():
            label_u = pseudo_label(labeler(x_u)[0], allowed)  # (B, H, W)

        # 4 losses
        with autocast():
            logits_l, multi_l = student(x_ls)
            logits_u, multi_u = student(x_us)
        loss_sup = supervised_loss(logits_l, y_l)
        if deep:
            loss_heads = deep_loss(multi_l, y_l, nearest=args.variant == "nearest")
        else:
            loss_heads = mlds_loss(multi_l, y_l)
        loss_pseudo = mlds_loss(multi_u, label_u)  # never the clean head
        lam = weight * ramp_up(step, RAMP * args.steps)
        loss = loss_sup + loss_heads + lam * loss_pseudo  # Eq. (8)

        # 5 step
        lr = set_lr(optimizer, args.lr * poly_decay(step, args.steps))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # 6 teacher
        if args.variant == "mean":
            ema_update(networks["teacher"], student, ema_decay(step, EMA_DECAY))

        # 7 log, validate, save
        agreement = (logits_u.argmax(1) == label_u).float().mean().nan_to_num()  # no x_u: 0
        run.log(loss=loss, sup=loss_sup, heads=loss_heads, pseudo=loss_pseudo, lam=lam,
                agreement=agreement, lr=lr)
        run.save(step)

    return run.finish()


if __name__ == "__main__":
    main()
