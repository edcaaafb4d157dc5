"""Mean Teacher.

"Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised
deep learning results", A. Tarvainen, H. Valpola, NeurIPS 2017, https://arxiv.org/abs/1703.01780

Idea
    A good segmentation does not change when the image gets a little noise. So an image without a
    mask can teach, too: two networks see it under different noise, and the student learns to give
    the teacher's probabilities. The teacher is not trained. Its weights are a running average of
    the student's weights, in which the errors of single steps average out; that should make it a
    little better than the student. Better targets make a better student, and a better student
    makes a better teacher. The teacher is the network that is used in the end.

        η: changes of intensity and noise, η': noise alone

        x + η  ---> student ---> P_s ---- supervised loss <---- y  (labelled images)
                       |          |
                    average       +------ mean squared difference  (all images)
                       v          |
        x + η' ---> teacher ---> P_t      (no gradient)

Run
    python mean_teacher.py                                         # the built-in phantom
    python mean_teacher.py --data PATH --labeled 10%
    python mean_teacher.py --data PATH --labeled 10% --supervised  # labelled-only baseline

Equations (numbers are this file's)
    Eq. (1)  consistency_loss  mean squared difference of the two networks' probabilities
    Eq. (2)  ema_decay         α, the share that the teacher keeps: 0 at first, then up to 0.99
    Eq. (3)  ema_update        teacher weights: running average of the student's
    Eq. (4)  main              L = L_sup + λ(t) L_cons, λ(t) = 5 exp(−5 (1 − t/T)²) up to step T,
                               then 5

Differences
    paper or authors' code               | here                                 | does it matter?
    -------------------------------------+--------------------------------------+-------------------
    An image is classified.              | Every pixel is classified.           | ?
    Both networks see shifts, flips and  | Both see the image turned and moved  | ?
    Gaussian noise, and drop half of     | alike. η is common.strong, η' is     |
    some layers' features.               | Gaussian noise. There is no dropout. |
    One batch holds labelled and         | They go through in two passes, each  | one pass gave 72
    unlabelled images.                   | normalised by its own statistics.    | Dice, two 82
                                         |                                      | (--seed 10)
    Beside the mean supervised loss of   | The weight is 5 [ours]. With 1 the   | 15: 75 Dice, 5: 79
    labelled images the weight amounts   | teacher also learns in seed 1, which | (--seed 11)
    to 100 (code, CIFAR-10).             | starts late with 5 (12 Dice after    | 1: 79, 77, 77 †
                                         | 320 steps; labelled-only 63).        | 5: 79, 78, 70 †
    The ramp takes 40000 of 150000 steps | T is 0.3 of the steps.               | ?
    (CIFAR-10).                          |                                      |
    The decay is 0.99, then 0.999 (code, | The decay is 0.99.                   | ?
    CIFAR-10: 0.999 all the time).       |                                      |
    The first α is 1/2 (code).           | The first α is 0: the teacher        | ?
                                         | becomes a copy of the student.       |
    The teacher keeps BatchNorm          | In training it is normalised by its  | own gave 75 Dice,
    statistics of its own, of its own    | own batch, as there; for scores it   | the student's 77
    views (code).                        | takes the student's statistics, of   | (--seed 10 --steps
                                         | strong views [ours].                 | 400, today's
                                         |                                      | augmentation)
    (Other code draws labelled images    | The unlabelled batch holds no        | ?
    for the unlabelled batch, too.)      | labelled image, unless all are.      |
    (SSL4MIS, a collection of methods,   | L_cons is on all images, as in the   | ?
    has L_cons on unlabelled images      | paper; the teacher is reported.      |
    alone, with weight 0.1, and reports  |                                      |
    the student.)                        |                                      |
    The teacher is better (paper).       | After training with L_cons it is not | student − teacher:
                                         | on the phantom, about equal on ACDC  | +1.6, +2.1, +0.3
                                         | with 3 patients (with 7 it is not);  | test Dice, seeds
                                         | labelled-only's average is better on | 0, 1, 2
                                         | both.                                |
    ?: not tried. Dice is that of validation patients, after 800 steps on an older phantom (64 px, 3
    labelled patients) with an older augmentation (rotation to 20 degrees, scale to 1.25, no shift),
    where nothing else is said. †: today's phantom, --seed 10, 11 and 1.
    README's ACDC table of 7 patients, 1500 steps: 2.4 Dice below labelled-only. It starts later (64
    Dice after 600 steps, labelled-only 74, on validation) and still rises at the end.
"""
import copy

import torch

from common import (
    Data,
    Run,
    UNet,
    heat,
    mixed_precision,
    number,
    parse,
    parser,
    place,
    poly_decay,
    ramp_up,
    set_lr,
    strong,
    supervised_loss,
)

WEIGHT_DECAY = 1e-2  # [ours] AdamW's, the same in all six files
EMA_DECAY = 0.99  # [paper] during the ramp-up; its 0.999 afterwards is not tried
NOISE = 0.05  # [ours] standard deviation of the teacher's noise, on intensities from 0 to 1
RAMP = 0.3  # [ours] share of the steps over which lambda grows; [paper] 40000 of 150000 on CIFAR-10

# ------------------------------------------------------------------------------------------ Modules

# none: two plain U-Nets

# ---------------------------------------------------------------------------------------- Equations


def consistency_loss(probs_s, probs_t):
    """Eq. (1): L_cons = mean over images, pixels and classes of (P_s(x + η) − P_t(x + η'))².

    probs_s, probs_t: (B, C, H, W) -> scalar. Gradient flows into both; into the student alone if
    probs_t was made under no_grad, as in main.
    Example: P_s = (1, 0), P_t = (0.5, 0.5) at every pixel gives 0.25.
    """
    return (probs_s - probs_t).square().mean()


def ema_decay(step, decay):
    """Eq. (2): α = min(1 − 1/(t + 1), decay), t = 0, 1, 2, ...; at first 0, 1/2, 2/3, ...

    numbers -> number. [code], where t starts at 1.
    """
    return min(1 - 1 / (step + 1), decay)


def ema_update(teacher, student, alpha):
    """Eq. (3): θ_t ← α θ_t + (1 − α) θ_s, in place, for every parameter.

    teacher, student: modules of one architecture; alpha: number. No gradient. The student's
    BatchNorm statistics are copied. Example: θ_t = 1, θ_s = 2 and α = 0.75 give 1.25.
    """
    with torch.no_grad():
        for p_t, p_s in zip(teacher.parameters(), student.parameters(), strict=True):
            p_t.lerp_(p_s, 1 - alpha)
        for b_t, b_s in zip(teacher.buffers(), student.buffers(), strict=True):
            b_t.copy_(b_s)


# ----------------------------------------------------------------------------------------- Networks


def build(channels, classes, width):
    """The student, and the teacher, its copy at the start, not trained itself: {name: network}."""
    student = UNet(channels, classes, width)
    return {"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)}


def predict(networks, x):
    """Images (B, channels, H, W) -> probabilities {name: (B, C, H, W)}."""
    return {name: networks[name](x).softmax(1) for name in ("teacher", "student")}


def predict_supervised(networks, x):
    """The same for --supervised, where the teacher teaches nobody: it is the student's average."""
    probs = predict(networks, x)
    return {"student": probs["student"], "its EMA": probs["teacher"]}


def pictures(networks, x):
    """Columns of preview.png: what is left to teach, and where the teacher is not sure itself."""
    probs = predict(networks, x)
    difference = (probs["student"] - probs["teacher"]).square().mean(1)
    entropy = -torch.xlogy(probs["teacher"], probs["teacher"]).sum(1)
    return heat("squared difference", difference) | heat("teacher's entropy", entropy)


def main(argv=None):
    # options
    options = parser(__doc__)
    add = options.own.add_argument
    add("--weight", type=number(float, 0), default=5.0, help="λ of L_cons (%(default)s) [ours]")
    add("--supervised", action="store_true", help="labelled-only baseline; headline: the student")
    args = parse(options, argv)

    # data, networks, optimizer, run
    data = Data(args)
    weight = args.weight
    headline, reported = "teacher", predict
    if args.supervised:  # labelled images alone; the loop below has no branch for it
        weight = 0.0
        data.unlabeled_batch = 0
        headline, reported = "student", predict_supervised
    torch.manual_seed(args.seed)
    networks = place(build(data.channels, data.classes, args.width), args)
    student, teacher = networks["student"], networks["teacher"]
    optimizer = torch.optim.AdamW(student.parameters(), args.lr, weight_decay=WEIGHT_DECAY)
    autocast, scaler = mixed_precision(args)
    run = Run(__file__, args, data, networks, [optimizer, scaler], reported, headline, pictures)

    for step in run.steps():
        # 1 batch
        x_l, y_l, x_u, *_ = data.batch()

        # 2 views
        x_ls, x_us = strong(x_l), strong(x_u)  # η
        x_lt = x_l + NOISE * torch.randn_like(x_l)  # η', independent of η
        x_ut = x_u + NOISE * torch.randn_like(x_u)

        # 3 targets
        with torch.no_grad(), autocast():
            logits_t = torch.cat([teacher(x_lt), teacher(x_ut)])  # (B_l + B_u, C, H, W)
            probs_t = logits_t.softmax(1)

        # 4 losses
        with autocast():
            logits_l, logits_u = student(x_ls), student(x_us)
        logits_s = torch.cat([logits_l, logits_u])  # (B_l + B_u, C, H, W)
        loss_sup = supervised_loss(logits_l, y_l)
        loss_cons = consistency_loss(logits_s.softmax(1), probs_t)
        lam = weight * ramp_up(step, RAMP * args.steps)
        loss = loss_sup + lam * loss_cons  # Eq. (4)

        # 5 step
        lr = set_lr(optimizer, args.lr * poly_decay(step, args.steps))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # 6 teacher
        ema_update(teacher, student, ema_decay(step, EMA_DECAY))

        # 7 log, validate, save
        agreement = (logits_s.argmax(1) == probs_t.argmax(1)).float().mean()
        entropy = -torch.xlogy(probs_t, probs_t).sum(1)[len(x_l):]  # of the teacher on x_u + η'
        uncertainty = entropy.mean().nan_to_num()  # no x_u: 0
        run.log(loss=loss, sup=loss_sup, cons=loss_cons, lam=lam, agreement=agreement,
                uncertainty=uncertainty, lr=lr)
        run.save(step)

    return run.finish()


if __name__ == "__main__":
    main()
