"""UCMT: uncertainty-guided collaborative mean teacher.

"Co-training with high-confidence pseudo labels for semi-supervised medical image segmentation",
Z. Shen, P. Cao, H. Yang, X. Liu, J. Yang, O. Zaiane, IJCAI 2023, https://arxiv.org/abs/2301.04465

Idea
    Two networks that teach each other soon make the same mistakes. Here two students, each
    with a strong view of its own, learn from each other's hard labels and from those of one
    teacher, which sees the weak view. The teacher's weights are a running average of (mostly)
    student 1's. Then the same images come a second time, mixed (UMIX): the patches where one
    student is least certain are overwritten by patches of the same image where the other student
    is most certain, and all three predict this X' anew. The teacher is used in the end.

        strong view 1 ---> student 1 ---> P_1 <--- Dice --- Ŷ_2, Ŷ_T
        weak view     ---> teacher   ---> P_T ---> Ŷ_T     (no gradient through any Ŷ)
        strong view 2 ---> student 2 ---> P_2 <--- Dice --- Ŷ_1, Ŷ_T   (x_l: supervised loss, y)
        U_m: entropy of (P_m + P_T) / 2, by patch ---> X' = UMIX(X; U_1, U_2) ---> the same again

Run
    python ucmt.py                                       # the built-in phantom
    python ucmt.py --data PATH --labeled 10%
    python ucmt.py --data PATH --labeled 10% --teacher-mix 0.5  # see Differences, first row
    python ucmt.py --data PATH --labeled 10% --mix cutmix       # or none, for comparison

Equations (numbers are this file's)
    Eq. (1)  dice_loss    soft Dice loss of a network's probabilities with hard labels
    Eq. (2)  cps_loss     each student with the other's labels
    Eq. (3)  mts_loss     both students with the teacher's labels
    Eq. (4)  uncertainty  entropy of student and teacher together, averaged over each patch
    Eq. (5)  umix         uncertain patches receive certain ones
    Eq. (6)  cutmix_mask  --mix cutmix, for comparison: boxes of another image
    Eq. (7)  cutmix       the image, or label map, that is mixed so
    Eq. (8)  ema_decay    α, the share that the teacher keeps: 0 at first, then up to 0.99
    Eq. (9)  ema_update   teacher weights: running average of the students'
    Eq. (10) main         L = L_s + w λ(t) L_u, L_u = (L_cps + L_mts) / 2; a step on X, one on X';
                          L_s: both students'; λ(t) = exp(−5 (1 − t/T)²) up to T, then 1

Differences
    paper or authors' code               | here                                 | does it matter?
    -------------------------------------+--------------------------------------+-------------------
    The teacher averages 0.99 θ_1 + 0.01 | The same: --teacher-mix 0.99.        | 0.5: students 54,
    θ_2 (code).                          |                                      | 52 Dice, teacher
                                         |                                      | 10 (240 steps)
    w = 0.1 (code).                      | The same. (ACDC, 7 patients: w = 1   | 1: 83 Dice, 0.1:
                                         | gave 65, 0.1 gave 68.)               | 79 (--seed 10)
    Strong view 2 is made from view 1    | Both are drawn independently.        | ?
    (code).                              |                                      |
    Step 1 sees labelled images weak; in | Both steps give each student a       | ?
    step 2 both students see one image:  | strong view of its own.              |
    strong view 1, mixed (code).         |                                      |
    The teacher's label map of X is      | The teacher predicts X' anew.        | ?
    mixed like X (code).                 |                                      |
    The least sure of the k sure patches | The surest overwrites the least      | ?
    comes first (code).                  | sure patch, and so on by rank.       |
    The teacher keeps BatchNorm          | For scores it takes student 1's      | as in
    statistics of its own (code).        | [ours]; in training it is normalised | mean_teacher.py
                                         | by its own batch.                    |
    The encoder is pretrained, L_s is    | U-Nets from random weights; CE +     | CE in L_u: 80.9,
    Dice alone (code).                   | Dice, as in all six files. L_u is    | 79.4, Dice alone
                                         | Dice alone, as there.                | 80.7, 78.7 †
    The rate is 1e-4, constant; t of λ   | Poly decay; t of α counts optimizer  | README, 3 patients
    and t of α count batches; T is 5 of  | steps; T: 0.3 of all. Gradients of a | of ACDC: +0.7
    25 epochs (code).                    | batch's two steps have cosine 0.72   | (seed 0: -0.3),
                                         | (two batches: 0.3).                  | 7 patients: -3.4
    The checkpoint with the lowest       | The last one is reported.            | ?
    training loss is reported (code).    |                                      |
    The unlabelled batch is drawn from   | It holds no labelled image, unless   | ?
    all training images (code).          | all are.                             |
    (The paper's ablation: X' by UMIX,   | --mix umix, cutmix, none.            | 80.7 and 78.7,
    by CutMix, or not mixed.)            |                                      | 76.8 and 74.8,
                                         |                                      | 82.1 and 78.2 †
    ?: not tried. Dice is that of validation patients, after 800 steps on an older phantom (64 px, 3
    labelled patients) with an older augmentation (rotation to 20 degrees, scale to 1.25, no shift),
    where nothing else is said. †: Dice on today's phantom, --seed 10 and 11.
"""
import argparse
import copy
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
    ramp_up,
    set_lr,
    stop,
    strong,
    supervised_loss,
)

WEIGHT_DECAY = 1e-2  # [ours] AdamW's, the same in all six files
EMA_DECAY = 0.99  # [paper]
RAMP = 0.3  # [ours] share of the steps over which lambda grows
BOXES = 3  # [code] boxes of --mix cutmix, as in cps.py
AREA = (0.25, 0.5)  # [code] their total share of the image, before overlap, as in cps.py

# ------------------------------------------------------------------------------------------ Modules

# none: three plain U-Nets

# ---------------------------------------------------------------------------------------- Equations


def dice_loss(probs, label):
    """Eq. (1): Dice(P, Ŷ) = 1 − mean over images and classes of (2 Σ P Ŷ + ε) / (Σ P + Σ Ŷ + ε).

    probs (B, C, H, W), label (B, H, W) long -> scalar; sums over pixels, background too, ε = 1e-5
    [code]. Gradient flows into probs. Example: probs one-hot at the label give 0.
    """
    target = F.one_hot(label, probs.shape[1]).movedim(-1, 1).to(probs.dtype)  # (B, C, H, W)
    overlap, total = (probs * target).sum((2, 3)), (probs + target).sum((2, 3))  # (B, C)
    return 1 - ((2 * overlap + 1e-5) / (total + 1e-5)).mean()


def cps_loss(probs_1, probs_2, label_1, label_2):
    """Eq. (2): L_cps = Dice(P_1, Ŷ_2) + Dice(P_2, Ŷ_1), shapes and gradient as in Eq. (1)."""
    return dice_loss(probs_1, label_2) + dice_loss(probs_2, label_1)


def mts_loss(probs_1, probs_2, label_t):
    """Eq. (3): L_mts = Dice(P_1, Ŷ_T) + Dice(P_2, Ŷ_T), shapes and gradient as in Eq. (1)."""
    return dice_loss(probs_1, label_t) + dice_loss(probs_2, label_t)


def uncertainty(probs_m, probs_t, grid):
    """Eq. (4): U_m = mean over each patch of H((P_m + P_T) / 2), H(P) = −Σ_c P log P.

    probs (B, C, H, W) -> (B, grid, grid). No gradient. Example: P_m (1, 0), P_t (0, 1) give log 2.
    """
    mean = ((probs_m + probs_t) / 2).detach()
    entropy = -torch.xlogy(mean, mean).sum(1, keepdim=True)  # (B, 1, H, W); 0 log 0 = 0
    return F.adaptive_avg_pool2d(entropy, grid)[:, 0]


def umix(x, u_1, u_2, k):
    """Eq. (5): x'[top-k U_1] = x[bottom-k U_2], then x'[top-k U_2] = x[bottom-k U_1], by rank.

    x: images (B, channels, H, W) or label maps (B, H, W); u: (B, grid, grid), the grid divides H
    and W -> the shape of x, to which gradient flows. What is read is unmixed; where both write, the
    second stands; of equals the first. Example: k = 1, U_1 = U_2 = (0, 1; ½, ½): b of (a, b; c, d)
    becomes a.
    """
    grid = u_1.shape[-1]
    h, w = x.shape[-2] // grid, x.shape[-1] // grid  # of a patch
    patches = x.unflatten(-1, (grid, w)).unflatten(-3, (grid, h))  # (B, ..., grid, h, grid, w)
    patches = patches.movedim((-4, -2), (1, 2)).flatten(1, 2)  # (B, grid², ..., h, w)
    low_1 = u_1.flatten(1).argsort(dim=1, stable=True)  # (B, grid²), certain patches first
    low_2 = u_2.flatten(1).argsort(dim=1, stable=True)
    top_1 = u_1.flatten(1).argsort(dim=1, stable=True, descending=True)  # uncertain ones first
    top_2 = u_2.flatten(1).argsort(dim=1, stable=True, descending=True)
    shown = torch.arange(grid * grid, device=x.device).repeat(len(x), 1)  # each place shows itself
    shown.scatter_(1, top_1[:, :k], low_2[:, :k])  # an uncertain place shows a certain patch
    shown.scatter_(1, top_2[:, :k], low_1[:, :k])
    image = torch.arange(len(x), device=x.device)[:, None]
    mixed = patches[image, shown].unflatten(1, (grid, grid)).movedim((1, 2), (-4, -2))
    return mixed.reshape(x.shape)


def cutmix_mask(b, h, w, boxes, area, device):
    """Eq. (6): M = 1 inside any of `boxes` random boxes of share r / boxes each, r ~ U(area).

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
    """Eq. (7): x' = (1 − M) x + M x_partner, the partner being x.roll(1, 0).

    x: images (B, channels, H, W) or label maps (B, H, W); mask: bool (B, H, W). -> the shape of x.
    Gradient flows into x. Example: rows (1, 2) and (3, 4), M = (1, 0) for both: (3, 2) and (1, 4).
    """
    if x.dim() == 4:
        mask = mask[:, None]  # the same for all channels
    return torch.where(mask, x.roll(1, 0), x)


def ema_decay(step, decay):
    """Eq. (8): α = min(1 − 1/(t + 1), decay), t = 0, 1, 2, ...; at first 0, 1/2, 2/3, ... [code].

    numbers -> number.
    """
    return min(1 - 1 / (step + 1), decay)


def ema_update(teacher, student_1, student_2, mix, alpha):
    """Eq. (9): θ_T ← α θ_T + (1 − α) (β θ_1 + (1 − β) θ_2), in place, β = mix, for every parameter.

    teacher, student_1, student_2: modules of one architecture; mix, alpha: numbers. No gradient.
    Student 1's BatchNorm statistics are copied. Example: θ_T 1, θ_1 2, θ_2 3, α = 0.9, β = 1: 1.1.
    """
    with torch.no_grad():
        for p_t, p_1, p_2 in zip(teacher.parameters(), student_1.parameters(),
                                 student_2.parameters(), strict=True):
            p_t.lerp_(p_2.lerp(p_1, mix), 1 - alpha)
        for b_t, b_1 in zip(teacher.buffers(), student_1.buffers(), strict=True):
            b_t.copy_(b_1)


# ----------------------------------------------------------------------------------------- Networks


def build(channels, classes, width):
    """Two students of different random weights; the teacher, student 1's copy: {name: network}."""
    student_1, student_2 = UNet(channels, classes, width), UNet(channels, classes, width)
    teacher = copy.deepcopy(student_1).requires_grad_(False)
    return {"student 1": student_1, "student 2": student_2, "teacher": teacher}


def predict(networks, x):
    """Images (B, channels, H, W) -> probabilities {name: (B, C, H, W)}."""
    return {name: networks[name](x).softmax(1) for name in ("teacher", "student 1", "student 2")}


def pictures(networks, x, grid, k, mix):
    """Columns of preview.png: both uncertainty maps, and what is mixed."""
    probs = predict(networks, x)
    u_1 = uncertainty(probs["student 1"], probs["teacher"], grid)
    u_2 = uncertainty(probs["student 2"], probs["teacher"], grid)
    columns = heat("uncertainty 1", F.interpolate(u_1[:, None], x.shape[2:])[:, 0])  # (B, H, W)
    columns |= heat("uncertainty 2", F.interpolate(u_2[:, None], x.shape[2:])[:, 0])
    if mix == "umix":
        pixel = torch.arange(x[:, 0].numel(), device=x.device).view(-1, *x.shape[2:])  # its number
        overwritten = umix(pixel, u_1, u_2, k) != pixel
        columns["UMIX, patches"] = overlay(umix(x, u_1, u_2, k), overwritten.long())
    elif mix == "cutmix":
        mask = cutmix_mask(len(x), *x.shape[2:], BOXES, AREA, x.device)
        columns["CutMix image"] = cutmix(x, mask)
    return columns


def main(argv=None):
    # options
    options = parser(__doc__)
    add = options.own.add_argument
    add("--weight", type=number(float, 0), default=0.1, help="w of L_u (%(default)s) [code]")
    add("--teacher-mix", type=number(float, 0, 1), default=0.99, metavar="β",
        help="student 1's share in the teacher (%(default)s) [code]")
    add("--grid", type=number(int, 1), default=16, help="UMIX patches a side (%(default)s) [paper]")
    add("--top-k", type=number(int, 0), default=2, help="k of UMIX (%(default)s) [paper]")
    add("--mix", choices=["umix", "cutmix", "none"], default="umix",
        help="how X' is made: umix Eq. (5), cutmix Eq. (6) and (7), none: X itself (%(default)s)")
    add("--mix-labeled", action=argparse.BooleanOptionalAction, default=True,
        help="mix labelled images too, with their masks (yes) [code]")
    args = parse(options, argv)
    for option, value in (("--steps", args.steps), ("--val-every", args.val_every)):
        if value % 2:
            stop(f"{option} {value}: expected an even number, since a batch is used for two steps.")
    if args.size % args.grid:
        stop(f"--grid {args.grid} does not divide --size {args.size}. Expected 8 or 16, say.")

    # data, networks, optimizer, run
    data = Data(args)
    torch.manual_seed(args.seed)
    networks = place(build(data.channels, data.classes, args.width), args)
    student_1, student_2 = networks["student 1"], networks["student 2"]
    teacher = networks["teacher"]
    grid, k = args.grid, args.top_k
    parameters = [*student_1.parameters(), *student_2.parameters()]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=WEIGHT_DECAY)
    autocast, scaler = mixed_precision(args)
    show = partial(pictures, grid=grid, k=k, mix=args.mix)
    run = Run(__file__, args, data, networks, [optimizer, scaler], predict, "teacher", show)

    for step in run.steps():
        # 1 batch: an even step draws one, the step after it sees the same one mixed
        if step % 2 == 0:
            x_l, y_l, x_u, *_ = data.batch()

        # 2 views
        x_l1, x_l2, x_u1, x_u2 = strong(x_l), strong(x_l), strong(x_u), strong(x_u)

        # 3 targets
        with torch.no_grad(), autocast():
            if step % 2 == 0:
                probs_lt = teacher(x_l).softmax(1)  # (B, C, H, W), for its uncertainties alone
            probs_t = teacher(x_u).softmax(1)  # in an odd step of X', anew

        # 4 losses
        with autocast():
            logits_l1, logits_u1 = student_1(x_l1), student_1(x_u1)
            logits_l2, logits_u2 = student_2(x_l2), student_2(x_u2)
        probs_1, probs_2 = logits_u1.softmax(1), logits_u2.softmax(1)
        loss_sup = supervised_loss(logits_l1, y_l) + supervised_loss(logits_l2, y_l)
        loss_cps = cps_loss(probs_1, probs_2, probs_1.argmax(1), probs_2.argmax(1))
        loss_mts = mts_loss(probs_1, probs_2, probs_t.argmax(1))
        lam = args.weight * ramp_up(step - step % 2, RAMP * args.steps)  # w λ(t), of both steps
        loss = loss_sup + lam * (loss_cps + loss_mts) / 2  # Eq. (10)

        # 5 step
        lr = set_lr(optimizer, args.lr * poly_decay(step, args.steps))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # 6 teacher
        ema_update(teacher, student_1, student_2, args.teacher_mix, ema_decay(step, EMA_DECAY))

        # UMIX or CutMix: the next step's batch
        if step % 2 == 0 and args.mix == "umix":
            u_1, u_2 = uncertainty(probs_1, probs_t, grid), uncertainty(probs_2, probs_t, grid)
            x_u = umix(x_u, u_1, u_2, k)
            if args.mix_labeled:
                u_l1 = uncertainty(logits_l1.softmax(1), probs_lt, grid)
                u_l2 = uncertainty(logits_l2.softmax(1), probs_lt, grid)
                x_l, y_l = umix(x_l, u_l1, u_l2, k), umix(y_l, u_l1, u_l2, k)
        elif step % 2 == 0 and args.mix == "cutmix":
            x_u = cutmix(x_u, cutmix_mask(len(x_u), *x_u.shape[2:], BOXES, AREA, x_u.device))
            if args.mix_labeled:
                mask = cutmix_mask(len(x_l), *x_l.shape[2:], BOXES, AREA, x_l.device)
                x_l, y_l = cutmix(x_l, mask), cutmix(y_l, mask)

        # 7 log, validate, save
        agreement = (probs_1.argmax(1) == probs_2.argmax(1)).float().mean()
        entropy = -torch.xlogy(probs_t, probs_t).sum(1)  # of the teacher on x_u, or X' of it
        run.log(loss=loss, sup=loss_sup, cps=loss_cps, mts=loss_mts, lam=lam, agreement=agreement,
                uncertainty=entropy.mean(), lr=lr)
        run.save(step)

    return run.finish()


if __name__ == "__main__":
    main()
