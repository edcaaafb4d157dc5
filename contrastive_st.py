"""Contrastive self-training.

"Local contrastive loss with pseudo-label based self-training for semi-supervised medical image
segmentation", K. Chaitanya, E. Erdil, N. Karani, E. Konukoglu, Medical Image Analysis 87, 2023,
https://arxiv.org/abs/2112.09645

Idea
    A network trained on the labelled images labels the unlabelled ones. Such pseudo-labels are
    wrong in places, so they do not train the classifier; they train its features: a small head
    gives every pixel an embedding, and pixels of one class are pulled towards the mean embedding of
    that class, in their own image and in another one, and away from those of the other classes.
    A mean over a region and a few sampled pixels forgive wrong labels. Better features make a
    better network, which labels anew: three rounds, each ending with a learning rate near zero.

        round r:  network ---> labels ŷ_u of all unlabelled images, fixed for the round
        x_l ---> network ---> logits ------- supervised loss ------- y
        x_l, x_u ---> network ---> features ---> head ---> z ------- contrastive loss --- y, ŷ_u

Run
    python contrastive_st.py                                      # the built-in phantom
    python contrastive_st.py --data PATH --labeled 10%
    python contrastive_st.py --data PATH --labeled 10% --init FOLDER/last.pt  # instead of stage 1

Equations (numbers are this file's)
    Eq. (1)  class_means     mean embedding of each class in each image
    Eq. (2)  sample_anchors  a few pixels of each class in each image
    Eq. (3)  log_match       how well an embedding matches each mean, against all others
    Eq. (4)  intra_loss      each anchor with the mean of its class in its own image
    Eq. (5)  inter_loss      and in the next image, against both images' classes
    Eq. (6)  dice_agreement  mean Dice of two label maps (for --agreement)
    Eq. (7)  schedule        stage 1 and the rounds
    Eq. (8)  main            L = L_sup(x_l, y) + λ L_cont(x_l, y; x_u, ŷ_u)

Differences
    1. From the paper: the network at the end of a round labels, its learning rate being near zero;
       the paper takes the best on validation. Its clean-up of labels by a CRF is left out.
    2. TODO
"""
import copy

import torch
from torch import nn
from torch.nn import functional as F

from common import (
    Data,
    Run,
    UNet,
    evaluating,
    parse,
    parser,
    poly_decay,
    read_each,
    set_lr,
    stop,
    strong,
    supervised_loss,
)

WEIGHT_DECAY = 1e-2  # [ours] AdamW's, the same in all six files
EMBEDDING = 16  # [paper] channels of the projection head
TAU = 0.1  # [paper] temperature of the similarities
ANCHORS = 3  # [paper] pixels sampled for each class and image
ROUNDS = 3  # [paper] of labelling and training
STAGE_1 = 0.25  # [ours] share of the steps before the first round

# ------------------------------------------------------------------------------------------ Modules


class ProjectionHead(nn.Module):
    """h_φ: decoder features (B, c_in, H, W) -> embeddings z (B, c_out, H, W), always float32."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out),
                                    nn.ReLU(True), nn.Conv2d(c_out, c_out, 1))

    def forward(self, features):
        return self.layers(features).float()


# ---------------------------------------------------------------------------------------- Equations


def class_means(z, masks):
    """Eq. (1): z̄_k = (1 / |Ω_k|) Σ_{p in Ω_k} z_p, the mean embedding of class k in an image.

    z (B, D, H, W), masks (B, K, H, W) bool, the Ω_k -> (B, K, D), 0 where an image lacks a class.
    Gradient flows into the z of all pixels in a mask.
    """
    sums = torch.einsum("bdhw,bkhw->bkd", z, masks.to(z.dtype))
    return sums / masks.sum((2, 3)).clamp_min(1)[:, :, None]


def sample_anchors(z, masks, n):
    """Eq. (2): z_a = z[p_a], a = 1..n, p_a ~ U(Ω_k) without repetition, for each image and class.

    z (B, D, H, W), masks (B, K, H, W) bool -> anchors (B, K, n, D) and found (B, K, n) bool, which
    is False where a class has fewer than n pixels. Gradient flows into the sampled pixels.
    """
    scores = torch.rand(masks.shape, device=z.device).masked_fill(~masks, -1)
    scores, pixels = scores.flatten(2).topk(n)  # (B, K, n): the largest of random numbers
    index = pixels.flatten(1)[:, None].expand(-1, z.shape[1], -1)  # (B, D, K n)
    anchors = z.flatten(2).gather(2, index).movedim(1, 2)  # (B, K n, D)
    return anchors.unflatten(1, pixels.shape[1:]), scores >= 0


def log_match(anchors, means, present, tau):
    """Eq. (3): log q_k(z) = log [exp(cos(z, z̄_k) / τ) / Σ_j exp(cos(z, z̄_j) / τ)].

    anchors (B, K, n, D), means (B, M, D), present (B, M) bool: the j to sum over -> (B, K, n, M).
    Gradient flows into the anchors and the means.
    """
    cosine = torch.einsum("bknd,bmd->bknm", F.normalize(anchors, dim=-1), F.normalize(means, dim=-1))
    absent = ~present[:, None, None]
    return (cosine / tau).masked_fill(absent, -1e4).log_softmax(-1)  # exp(-1e4) is 0


def intra_loss(anchors, found, means, present, tau):
    """Eq. (4): L_intra = mean over anchors z of class c of −log q_c(z), the j of its own image.

    anchors (B, K, n, D), found (B, K, n), means (B, K, D), present (B, K) -> scalar. Gradient flows
    into anchors and means. Without any anchor 0. Example: K equal means give log K.
    """
    log_q = log_match(anchors, means, present, tau).diagonal(dim1=1, dim2=3).movedim(2, 1)
    return -log_q.where(found, 0).sum() / found.sum().clamp_min(1)


def inter_loss(anchors, found, means, present, tau):
    """Eq. (5): L_inter = mean over x, x', z of −log q_c(z) and −log q_c'(z), the j of x and x'.

    The positives of an anchor z of class c in x are the means c of x and c' of x', if x' has the
    class. Pairs: each image and the next of the batch, both ways round. Arguments as in Eq. (4).
    """
    terms = count = 0
    same = torch.eye(means.shape[1], dtype=torch.bool, device=means.device).repeat(1, 2)  # (K, 2K)
    for shift in (-1, 1):
        both = torch.cat([present, present.roll(shift, 0)], 1)  # (B, 2K)
        log_q = log_match(anchors, torch.cat([means, means.roll(shift, 0)], 1), both, tau)
        positive = found[..., None] & same[:, None] & both[:, None, None]  # (B, K, n, 2K)
        terms, count = terms - log_q.where(positive, 0).sum(), count + positive.sum()
    return terms / count.clamp_min(1)


def dice_agreement(label_1, label_2, classes):
    """Eq. (6): A = mean over the foreground classes seen of 2 |a ∩ b| / (|a| + |b|).

    label maps (B, H, W) -> (B,); 1 where neither map has a foreground class. No gradient.
    """
    k = torch.arange(1, classes, device=label_1.device)[:, None, None]
    a, b = label_1[:, None] == k, label_2[:, None] == k  # (B, K, H, W)
    both, total = (a & b).sum((2, 3)), a.sum((2, 3)) + b.sum((2, 3))
    dice, seen = 2 * both / total.clamp_min(1), (total > 0).sum(1)
    return torch.where(seen > 0, dice.sum(1) / seen.clamp_min(1), 1.0)


def schedule(step, steps, first, rounds):
    """Eq. (7): r = #{k = 0..R: t >= b_k}, b_k = first + floor(k (T − first) / R); 0 is stage 1.

    numbers -> round r, the first step of the round, its length. Each has a poly decay of its own.
    """
    bounds = [0] + [first + k * (steps - first) // rounds for k in range(rounds + 1)]
    r = sum(step >= b for b in bounds[1:])
    return r, bounds[r], bounds[r + 1] - bounds[r]


# ----------------------------------------------------------------------------------------- Networks


def build(channels, classes, width):
    """The network, its projection head, and the network of the round before, which labels."""
    network = UNet(channels, classes, width)
    labeler = copy.deepcopy(network).requires_grad_(False)
    return {"network": network, "head": ProjectionHead(width, EMBEDDING), "labeler": labeler}


def predict(networks, x):
    """Images (B, channels, H, W) -> probabilities {name: (B, C, H, W)}, the reported one first."""
    return {name: networks[name](x).softmax(1) for name in ("network", "labeler")}


def embed(networks, x):
    """Images (B, channels, H, W) -> logits (B, C, H, W) and embeddings z (B, 16, H, W)."""
    features = networks["network"].decoder(networks["network"].encoder(x))[-1]
    return networks["network"].head(features).float(), networks["head"](features)


def class_masks(label, classes):
    """Label map (B, H, W) -> Ω_k (B, K, H, W) bool, k = 1..C-1; with two classes k = 0, 1."""
    k = torch.arange(0 if classes == 2 else 1, classes, device=label.device)
    return label[:, None] == k[:, None, None]


def pictures(networks, x):
    """Columns of preview.png: the classes in embedding space, class 0 included."""
    logits, z = embed(networks, x)
    masks = F.one_hot(logits.argmax(1), logits.shape[1]).movedim(-1, 1) > 0
    means = F.normalize(class_means(z, masks), dim=-1)
    cosine = torch.einsum("bdhw,bkd->bkhw", F.normalize(z, dim=1), means)
    return {"cosine to class 1": cosine[:, 1].clamp_min(0), "nearest class mean": cosine.argmax(1)}


def load_unet(path, network):
    """--init: copy the first network of a checkpoint that has the same layers and sizes."""
    shapes = {k: v.shape for k, v in network.state_dict().items()}
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)["networks"]
    except Exception as error:  # torch.load raises many types
        stop(f"--init {path} is no checkpoint ({type(error).__name__}: {error}). Expected the "
             "best.pt or last.pt of a run, of mean_teacher.py --supervised say.")
    fits = [k for k, v in saved.items() if {n: w.shape for n, w in v.items()} == shapes]
    if not fits:
        stop(f"--init {path} holds {', '.join(saved)}, none of them a U-Net with this run's "
             "channels, classes and width. Give its --width and the same dataset.")
    network.load_state_dict(saved[fits[0]])
    print(f"--init: {fits[0]} of {path}")


def pseudo_labels(labeler, data, agreement, seed):
    """Labels (N, S, S) uint8 of all unlabelled images, unaugmented, and which to trust (N,) bool.

    With --agreement from labels of two strong views, drawn from `seed`: the same after --resume.
    """
    n, side = len(data.names), data.images.shape[-1]
    labels = torch.zeros(n, side, side, dtype=torch.uint8)
    trusted = torch.ones(n, dtype=torch.bool)
    gpus = [data.args.device] if "cuda" in data.args.device else []
    with evaluating({"labeler": labeler}), torch.random.fork_rng(gpus):
        torch.manual_seed(seed)
        for chunk in data.unlabeled.indices.split(16):
            x = data.load_images(chunk)
            labels[chunk] = labeler(x).argmax(1).byte().cpu()
            if agreement > 0:
                views = [labeler(strong(x)).argmax(1) for _ in range(2)]
                trusted[chunk] = dice_agreement(*views, data.classes).cpu() >= agreement
    return labels.numpy(), trusted


def oracle(labels, data):
    """--debug-oracle: mean Dice (%) of the pseudo-labels with the hidden masks. Prints only."""
    def dice(i):
        truth = torch.from_numpy(data.truth(i))[None, None].float()
        truth = F.interpolate(truth, labels.shape[1:])[0]
        return dice_agreement(torch.from_numpy(labels[i])[None], truth, data.classes).item()
    known = [i for i in data.unlabeled.indices.tolist() if data.has_mask[i]]
    scores = list(read_each(known, dice, "hidden masks"))
    return f"{100 * sum(scores) / max(1, len(scores)):.1f} on {len(scores)} images"


def main(argv=None):
    # options
    options = parser(__doc__)
    add = options.own.add_argument
    add("--weight", type=float, default=0.1, help="λ of L_cont (%(default)s) [paper]")
    add("--matching", choices=["inter", "intra"], default="inter", help="Eq. (5) or Eq. (4)")
    add("--init", metavar="FILE", help="a run's best.pt or last.pt in place of stage 1")
    add("--agreement", type=float, default=0.0,
        help="trust pseudo-labels whose two views agree to this Dice, 0.8 say (0: all)")
    add("--debug-oracle", action="store_true",
        help="print the pseudo-labels' Dice with the hidden masks; training never sees it")
    args = parse(options, argv)

    # data, run, networks, optimizer
    data = Data(args)
    run = Run("contrastive_st", args, data)
    networks = run.place(build(data.channels, data.classes, args.width))
    network, head, labeler = networks.values()
    first = max(1, int(STAGE_1 * args.steps))
    if args.init:
        first = 0
        load_unet(args.init, network)
    loss_pair = inter_loss if args.matching == "inter" else intra_loss
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=WEIGHT_DECAY)
    run.keep(networks, [optimizer], predict, pictures)
    labels = None

    for step in run.steps():
        # new round: the network becomes the labeler, which after --resume labels as before
        r, start, length = schedule(step, args.steps, first, ROUNDS)
        if r > 0 and (step == start or labels is None):
            if step == start:
                labeler.load_state_dict(network.state_dict())
            labels, trusted = pseudo_labels(labeler, data, args.agreement, args.seed + r)
            if args.debug_oracle:
                run.bar.write(f"round {r}: pseudo-labels' Dice {oracle(labels, data)}")

        # 1 batch
        x_l, y_l, x_u, map_u, index_u = data.batch(maps=labels)

        # 2 views
        x_ls, x_us = strong(x_l), strong(x_u)

        # 3 targets
        # none: map_u, moved as x_u is, comes from the start of the round

        # 4 losses
        with run.autocast():
            logits_l, z_l = embed(networks, x_ls)
        loss_sup = supervised_loss(logits_l, y_l)
        loss_cont, lam, agreement, trust = logits_l.new_zeros(()), 0.0, 0.0, 0.0
        if r > 0:  # stage 1 sees no unlabelled image, BatchNorm included
            with run.autocast():
                logits_u, z_u = embed(networks, x_us)
            trust_u = trusted[index_u].to(map_u.device)
            masks_u = class_masks(map_u, data.classes) & trust_u[:, None, None, None]
            masks, z = torch.cat([class_masks(y_l, data.classes), masks_u]), torch.cat([z_l, z_u])
            anchors, found = sample_anchors(z, masks, ANCHORS)
            means, present = class_means(z, masks), masks.any(3).any(2)
            loss_cont = loss_pair(anchors, found, means, present, TAU)
            lam, trust = args.weight, trust_u.float().mean()
            agreement = (logits_u.argmax(1) == map_u).float().mean()
        loss = loss_sup + lam * loss_cont  # Eq. (8)

        # 5 step
        lr = set_lr(optimizer, args.lr * poly_decay(step - start, length))
        optimizer.zero_grad(set_to_none=True)
        run.backward(loss)
        run.update(optimizer)

        # 6 teacher
        # none: the network of the round before is the teacher

        # 7 log, validate, save
        run.log(loss=loss, sup=loss_sup, cont=loss_cont, lam=lam, round=r, agreement=agreement,
                trusted=trust, lr=lr)
        run.save(step)

    return run.finish()


if __name__ == "__main__":
    main()
