"""Contrastive self-training.

"Local contrastive loss with pseudo-label based self-training for semi-supervised medical image
segmentation", K. Chaitanya, E. Erdil, N. Karani, E. Konukoglu, Medical Image Analysis 2023,
https://arxiv.org/abs/2112.09645

Idea
    Stage 1 trains a network on labelled images alone. Then it labels the unlabelled ones. These
    pseudo-labels are wrong in places, so they never train the classifier, only the features below
    it. A small head gives every pixel an embedding. A few pixels of each foreground class are
    pulled towards the mean embedding of their class, in their own image and in another one, and
    away from the means of other classes. A class mean hardly changes when a few of its pixels are
    wrong. Three rounds follow, with new labels before the last two. The last network is the result.

        x_u ---> labeler, the network when the round began ---> ŷ_u, kept for the round
        x_l ------> network ---> P ----- supervised loss ------ y
        x_l, x_u -> network without its last layer ---> head ---> z --- contrastive loss --- y, ŷ_u

Run
    python contrastive_st.py                                     # the built-in phantom
    python contrastive_st.py --data PATH --labeled 10%
    python contrastive_st.py --data PATH --labeled 10% --init FOLDER/last.pt   # skips stage 1
    python contrastive_st.py --data PATH --labeled 10% --matching none   # plain self-training

Equations (numbers are this file's)
    Eq. (1)  class_means     z̄_k, the mean embedding of each class in each image
    Eq. (2)  sample_anchors  a few pixels of each class in each image
    Eq. (3)  log_match       log q_k(z): which of the means z is like
    Eq. (4)  intra_loss      anchors and the means of their own image
    Eq. (5)  inter_loss      anchors and the means of a pair of images
    Eq. (6)  dice_agreement  how alike two label maps are, for --agreement
    Eq. (7)  main            L = L_sup(x_l, y) + λ L_cont(x_l, y, x_u, ŷ_u)
                             --matching none, plain self-training: L_sup(x_l, y) + L_sup(x_u, ŷ_u)

Differences
    paper or authors' code               | here                                 | does it matter?
    -------------------------------------+--------------------------------------+-------------------
    The network best on validation       | The network at the end of the stage  | ?
    labels the images.                   | labels them; the learning rate is    |
                                         | near 0 then, and restarts.           |
    A dense CRF cleans pseudo-labels.    | No CRF.                              | ?
    The sum over pairs is divided again  | All terms count alike. Had the code  | ?
    after every pair: the last of ten    | divided once, its loss would be      |
    has weight 0.2, the one before 0.011 | twice ours.                          |
    (code).                              |                                      |
    Classes are the foreground's.        | In binary data background counts,    | ?
                                         | too [ours]; one class alone would    |
                                         | make Eq. (4) constant.               |
    Images hold every class (code).      | A class that an image lacks is left  | ?
                                         | out of its terms.                    |
    Volumes whose views, turned and      | --agreement compares the labels of   | ?
    flipped, get other labels can go.    | two strong views of an image.        |
    Round 1 starts with a new            | It goes on with all weights and      | ?
    classifier, later ones from the      | Adam's state; stages' lengths are    |
    checkpoint best on validation (code).| [ours].                              |
    Ten pairs are of labelled, unlabelled| A pair is a labelled and an          | ?
    and both kinds (code).               | unlabelled image, if both batches    |
                                         | have one size.                       |
    (Other code draws labelled images    | The unlabelled batch holds no        | ?
    for the unlabelled batch, too.)      | labelled image, unless all are.      |
    Other networks, optimizers and       | U-Net, AdamW, CE + Dice, as in all   | ?
    losses.                              | six files; x_l and x_u in two passes.|
    (The paper's opponent is plain self- | --matching none has it; the default  | none 79.9, 74.6
    training.)                           | is inter.                            | inter 79.4, 77.9
    ?: not tried. The numbers are Dice of the phantom's validation patients, --seed 10 and 11.
    README's ACDC table of 7 patients, 1500 steps: 1.9 Dice below labelled-only, whose rate falls
    once; here it restarts every 375 steps (75 Dice on validation after round 2 and after round 3).
"""
import copy

import torch
from torch import nn
from torch.nn import functional as F

from common import (
    Data,
    Run,
    UNet,
    average_statistics,
    heat,
    load_network,
    mixed_precision,
    number,
    overlay,
    parse,
    parser,
    place,
    poly_decay,
    set_lr,
    stop,
    strong,
    supervised_loss,
)

WEIGHT_DECAY = 1e-2  # [ours] AdamW's, the same in all six files
EMBEDDING = 16  # [paper] channels of the projection head
TAU = 0.1  # [paper] temperature
ANCHORS = 3  # [paper] pixels sampled for each class and image
ROUNDS = 3  # [paper] after stage 1, which trains on labelled images alone

# ------------------------------------------------------------------------------------------ Modules


def projection_head(c_in, c_out):
    """h_φ: features (B, c_in, H, W) -> embeddings z (B, c_out, H, W), each pixel for itself."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out),
                         nn.ReLU(True), nn.Conv2d(c_out, c_out, 1))


# ---------------------------------------------------------------------------------------- Equations


def class_means(z, masks):
    """Eq. (1): z̄_k = Σ_{p in Ω_k} z_p / |Ω_k|.

    z (B, D, H, W), masks (B, K, H, W) bool, the Ω_k -> (B, K, D), 0 where an image lacks the class.
    Gradient flows into all pixels of Ω_k. Example: pixels 1, 3 and 8, the class at 1 and 3: 2.
    """
    sums = torch.einsum("bdhw,bkhw->bkd", z, masks.to(z.dtype))
    return sums / masks.sum((2, 3)).clamp_min(1)[:, :, None]


def sample_anchors(z, masks, n):
    """Eq. (2): z_a = z[p_a], a = 1..n, p_a ~ U(Ω_k) without repetition, for each image and class.

    z (B, D, H, W), masks (B, K, H, W) bool -> (B, K, n, D), found (B, K, n) bool: False for the
    anchors that a class of fewer than n pixels lacks. Gradient flows into the sampled pixels.
    """
    random = torch.rand(masks.shape, device=z.device).masked_fill(~masks, -1)  # (B, K, H, W)
    largest, pixels = random.flatten(2).topk(n)  # (B, K, n): the pixels of the largest numbers
    image = torch.arange(len(z), device=z.device)[:, None, None]
    return z.flatten(2).movedim(1, 2)[image, pixels], largest >= 0  # from (B, H W, D)


def log_match(anchors, means, present, tau):
    """Eq. (3): log q_k(z) = cos(z, z̄_k) / τ − log Σ_j exp(cos(z, z̄_j) / τ), j the present means.

    anchors (B, K, n, D), means (B, M, D), present (B, M) bool -> (B, K, n, M). Gradient: into both.
    """
    cosine = F.cosine_similarity(anchors[:, :, :, None], means[:, None, None], dim=-1)
    return (cosine / tau).masked_fill(~present[:, None, None], -1e4).log_softmax(-1)  # e^-1e4 = 0


def intra_loss(anchors, found, means, present, tau):
    """Eq. (4): L_intra = mean of −log q_c(z) over the anchors z, c being z's class.

    anchors (B, K, n, D), found (B, K, n), means (B, K, D), present (B, K) -> scalar, 0 without an
    anchor. Gradient flows into anchors and means. Example: K present classes, equal means: log K.
    """
    log_q = log_match(anchors, means, present, tau)  # (B, K, n, K)
    own = log_q.diagonal(dim1=1, dim2=3).mT  # (B, K, n): of each anchor's own class
    return -own.where(found, 0).sum() / found.sum().clamp_min(1)


def inter_loss(anchors, found, means, present, tau):
    """Eq. (5): L_inter = mean of −log q_c(z) and −log q_c'(z) over pairs x, x' and their anchors z.

    c: z's class in its own image, c': in the other, if it has the class; both images' means are in
    the denominator. Pairs: first and last, and so on (the middle image of an odd number is its own
    partner). Arguments: Eq. (4). Equal means: log 2K.
    """
    means = torch.cat([means, means.flip(0)], 1)  # (B, 2K, D): own, then the partner's
    present = torch.cat([present, present.flip(0)], 1)  # (B, 2K)
    same = torch.eye(anchors.shape[1], device=means.device).bool().repeat(1, 2)  # (K, 2K)
    positive = found[..., None] & same[:, None] & present[:, None, None]  # (B, K, n, 2K)
    log_q = log_match(anchors, means, present, tau)
    return -log_q.where(positive, 0).sum() / positive.sum().clamp_min(1)


def dice_agreement(label_1, label_2, classes):
    """Eq. (6): A = mean over foreground classes of 2 |a ∩ b| / (|a| + |b|), 1 if both are empty.

    label maps (B, H, W) twice -> (B,); no gradient. Example: a of 3 pixels inside b of 5: 3/4.
    """
    k = torch.arange(1, classes, device=label_1.device)[:, None, None]
    a, b = label_1[:, None] == k, label_2[:, None] == k  # (B, K, H, W)
    overlap, total = (a & b).sum((2, 3)), a.sum((2, 3)) + b.sum((2, 3))  # (B, K)
    return (2 * overlap / total).masked_fill(total == 0, 1).mean(1)


# ----------------------------------------------------------------------------------------- Networks


def build(channels, classes, width):
    """The network, its projection head, the network at the round's begin: {name: network}."""
    network = UNet(channels, classes, width)
    labeler = copy.deepcopy(network).requires_grad_(False).eval()
    return {"network": network, "projection": projection_head(width, EMBEDDING), "labeler": labeler}


def predict(networks, x):
    """Images (B, channels, H, W) -> probabilities {name: (B, C, H, W)}."""
    return {name: networks[name](x).softmax(1) for name in ("network", "labeler")}


def embed(networks, x):
    """Images (B, channels, H, W) -> logits (B, C, H, W), embeddings (B, D, H, W), float32."""
    network, projection = networks["network"], networks["projection"]
    features = network.decoder(network.encoder(x))[-1]
    return network.head(features).float(), projection(features).float()


def pictures(networks, x):
    """Columns of preview.png: which class mean each embedding is most like, and how unlike it."""
    logits, z = embed(networks, x)
    masks = F.one_hot(logits.argmax(1), logits.shape[1]).movedim(-1, 1).bool()
    cosine = F.cosine_similarity(z[:, None], class_means(z, masks)[..., None, None], dim=2)
    cosine = cosine.masked_fill(~masks.any(3).any(2)[:, :, None, None], -1)  # absent classes
    nearest = overlay(x, cosine.argmax(1))
    return {"nearest class mean": nearest} | heat("distance to it", 1 - cosine.amax(1))


def pseudo_labels(labeler, data, agreement, seed):
    """-> labels (N, S, S) uint8 of unlabelled images, unaugmented; trusted (N,) bool: Eq. (6)."""
    labels = torch.zeros(len(data.items), *data.images.shape[2:], dtype=torch.uint8)
    trusted = torch.ones(len(labels), dtype=torch.bool)
    gpus = [data.args.device] if data.args.device.startswith("cuda") else []
    with torch.no_grad(), torch.random.fork_rng(gpus):
        torch.manual_seed(seed)  # the same views after --resume
        for chunk in torch.tensor(data.unlabeled).split(16):
            x = data.load_images(chunk)
            labels[chunk] = labeler(x).argmax(1).byte().cpu()
            if agreement > 0:
                label_1, label_2 = labeler(strong(x)).argmax(1), labeler(strong(x)).argmax(1)
                trusted[chunk] = dice_agreement(label_1, label_2, data.classes).cpu() >= agreement
    return labels, trusted


def main(argv=None):
    # options
    options = parser(__doc__)
    add = options.own.add_argument
    add("--weight", type=number(float, 0), default=0.1, help="λ of L_cont (%(default)s) [paper]")
    add("--matching", choices=["inter", "intra", "none"], default="inter",
        help="L_cont: Eq. (5) or Eq. (4); none: plain self-training, L_sup(x_u, ŷ_u) in the place "
        "of λ L_cont (%(default)s) [paper]")
    add("--init", metavar="RUN", help="start with the weights of a run, without stage 1")
    add("--agreement", type=number(float, 0, 1), default=0.0,
        help="keep images whose two views' labels have at least this Dice, Eq. (6) (0: all)")
    args = parse(options, argv)
    if args.matching == "none" and args.agreement > 0:
        stop("--agreement chooses images for L_cont, which --matching none does not have. Leave "
             "one of them out.")

    # data, networks, optimizer, run
    data = Data(args)
    torch.manual_seed(args.seed)
    networks = place(build(data.channels, data.classes, args.width), args)
    network, labeler = networks["network"], networks["labeler"]
    if args.init:
        load_network(args, network)
    parameters = [*network.parameters(), *networks["projection"].parameters()]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=WEIGHT_DECAY)
    autocast, scaler = mixed_precision(args)
    run = Run(__file__, args, data, networks, [optimizer, scaler], predict, "network", pictures)
    classes = torch.arange(1, data.classes, device=args.device)
    if data.classes == 2:  # with two classes background counts too: see Differences
        classes = torch.arange(2, device=args.device)
    first = max(1, args.steps // 4)  # [ours] steps of stage 1
    if args.init:
        first = 0
    starts = [0, first]  # where stage 1 and the rounds begin; last, the end
    for k in range(1, ROUNDS + 1):
        starts.append(first + k * (args.steps - first) // ROUNDS)
    labels = None

    for step in run.steps():
        # new round: the network becomes the labeler, unlabelled images get labels
        stage = max(k for k in range(ROUNDS + 1) if step >= starts[k])  # 0: stage 1; then rounds
        start, end = starts[stage], starts[stage + 1]
        if stage > 0 and step == start:
            average_statistics(networks)  # several processes must compute the same labels
            labeler.load_state_dict(network.state_dict())
        if stage > 0 and (step == start or labels is None):  # None: --resume within a round
            labels, trusted = pseudo_labels(labeler, data, args.agreement, args.seed + stage)

        # 1 batch
        x_l, y_l, x_u, map_u, index_u = data.batch(labels)

        # 2 views
        x_ls, x_us = strong(x_l), strong(x_u)

        # 3 targets
        # none to compute: map_u holds the labels of this round, moved like x_u

        # 4 losses
        with autocast():
            logits_l, z_l = embed(networks, x_ls)
        loss_sup = supervised_loss(logits_l, y_l)
        loss_cont = lam = agreement = trust = 0.0
        if stage > 0:  # stage 1 passes no unlabelled image, for BatchNorm's sake
            with autocast():
                logits_u, z_u = embed(networks, x_us)
            mask_l = y_l[:, None] == classes[:, None, None]  # (B_l, K, H, W)
            mask_u = map_u[:, None] == classes[:, None, None]
            trusted_u = trusted[index_u].to(args.device)  # (B_u,)
            mask_u = mask_u & trusted_u[:, None, None, None]
            z, masks = torch.cat([z_l, z_u]), torch.cat([mask_l, mask_u])
            anchors, found = sample_anchors(z, masks, ANCHORS)
            means, present = class_means(z, masks), masks.any(3).any(2)
            lam, trust = args.weight, trusted_u.float().mean()
            if args.matching == "inter":
                loss_cont = inter_loss(anchors, found, means, present, TAU)
            elif args.matching == "intra":
                loss_cont = intra_loss(anchors, found, means, present, TAU)
            else:  # plain self-training: wrong pseudo-labels reach the classifier
                loss_cont, lam = supervised_loss(logits_u, map_u.long()), 1.0
            agreement = (logits_u.argmax(1) == map_u).float().mean()
        loss = loss_sup + lam * loss_cont  # Eq. (7); with --matching none loss_cont is L_sup(ŷ_u)

        # 5 step
        lr = set_lr(optimizer, args.lr * poly_decay(step - start, end - start))
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # 6 teacher
        # none within a round: the labeler waits for the next one

        # 7 log, validate, save
        run.log(loss=loss, sup=loss_sup, cont=loss_cont, lam=lam, round=stage, agreement=agreement,
                trusted=trust, lr=lr)
        run.save(step)

    return run.finish()


if __name__ == "__main__":
    main()
