"""What the six method files share: U-Net, shared formulas, metrics, augmentation, batches.

Read down to the line "Tools"; the rest is plumbing that no paper is about. A command too:

    python common.py check --data PATH       look at a dataset before training on it
    python common.py phantom --out FOLDER    write the built-in phantom as files, to see the layout

Shapes: B images, C classes, H x W pixels. Images are floats in [0, 1], label maps are integers.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import draw_segmentation_masks, make_grid
from tqdm import tqdm

# --- U-Net (Ronneberger et al., MICCAI 2015, 1505.04597), with BatchNorm and padding --------------

DEPTH = 4  # times that the U-Net halves the image; its side must be a multiple of 2**DEPTH


def conv_block(c_in, c_out):
    """Twice a 3x3 convolution, BatchNorm, ReLU: (B, c_in, H, W) -> (B, c_out, H, W)."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(True),
        nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(True))


class Encoder(nn.Module):
    """Image (B, channels, H, W) -> DEPTH + 1 features (B, width * 2**i, H / 2**i, W / 2**i)."""

    def __init__(self, channels, width):
        super().__init__()
        widths = [width * 2**i for i in range(DEPTH + 1)]
        self.blocks = nn.ModuleList(map(conv_block, [channels, *widths], widths))

    def forward(self, x):
        features = [self.blocks[0](x)]
        for block in self.blocks[1:]:
            features.append(block(F.max_pool2d(features[-1], 2)))
        return features


class DecoderBlock(nn.Module):
    """Double the resolution of x, join the encoder's feature `skip` of that size, convolve."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
        self.block = conv_block(2 * c_out, c_out)

    def forward(self, x, skip):
        return self.block(torch.cat([skip, self.up(x)], 1))


class Decoder(nn.Module):
    """The encoder's features -> list of DEPTH features, coarsest first, full resolution last."""

    def __init__(self, width):
        super().__init__()
        widths = [width * 2**i for i in range(DEPTH, -1, -1)]
        self.blocks = nn.ModuleList(map(DecoderBlock, widths, widths[1:]))

    def forward(self, features):
        outputs = [features[-1]]
        for block, skip in zip(self.blocks, features[-2::-1], strict=True):
            outputs.append(block(outputs[-1], skip))
        return outputs[1:]


class UNet(nn.Module):
    """Image (B, channels, H, W) in [0, 1] -> logits (B, classes, H, W), always float32."""

    def __init__(self, channels, classes, width):
        super().__init__()
        self.encoder = Encoder(channels, width)
        self.decoder = Decoder(width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        if len(x) == 0:  # BatchNorm refuses an empty batch; mean_teacher.py --supervised has one
            return x.new_zeros(0, self.head.out_channels, *x.shape[2:])
        return self.head(self.decoder(self.encoder(x))[-1]).float()


# --- Shared formulas ------------------------------------------------------------------------------

def supervised_loss(logits, y):
    """0.5 cross-entropy + 0.5 soft Dice loss: logits (B, C, H, W), y (B, H, W) long -> scalar.

    Dice: each image and class, background too, no squares, ε = 1e-5, mean. Gradient: into logits.
    """
    probs = logits.softmax(1)
    target = F.one_hot(y, logits.shape[1]).movedim(-1, 1).to(probs.dtype)  # (B, C, H, W)
    overlap, total = (probs * target).sum((2, 3)), (probs + target).sum((2, 3))  # (B, C)
    dice_loss = 1 - ((2 * overlap + 1e-5) / (total + 1e-5)).mean()
    return 0.5 * F.cross_entropy(logits, y) + 0.5 * dice_loss


def ramp_up(step, length):
    """exp(-5 (1 - t/T)²) for t < T, then 1 (Laine & Aila, ICLR 2017, 1610.02242)."""
    return math.exp(-5 * (1 - min(step / length, 1)) ** 2) if length > 0 else 1.0


def poly_decay(step, steps):
    """(1 - t/T)^0.9, the learning rate's share at step t of T (DeepLab, 1606.00915)."""
    return (1 - step / steps) ** 0.9


def set_lr(optimizer, lr):
    """Set all parameter groups' learning rate; returns it, for the log."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


# --- Metrics: equal to medpy's dc, jc, hd95 and asd, with one rule for empty masks ----------------

METRICS = ("dice", "jaccard", "hd95", "asd")


def surface_points(mask):
    """Pixels of a bool mask, 2-D or 3-D, that touch the outside by a face: (N, 2 or 3) numbers."""
    padded, inner = np.pad(mask, 1), mask.copy()
    for axis in range(mask.ndim):
        for shift in (-1, 1):
            inner &= np.roll(padded, shift, axis)[(slice(1, -1),) * mask.ndim]
    return np.argwhere(mask & ~inner)


def distances_to(target, points):
    """Euclidean distance from each point (N, 2 or 3) to the nearest of the target points: (N,).

    Exact, an axis at a time (Felzenszwalb & Huttenlocher 2012): squared distances along the first
    by two scans, in 3-D along the second for all pixels, along the last at the points alone.
    """
    shape = np.maximum(target.max(0), points.max(0)) + 1
    mask = np.zeros(shape, bool)
    mask[tuple(target.T)] = True
    first = np.arange(shape[0]).reshape(-1, *[1] * (mask.ndim - 1))
    above = np.maximum.accumulate(np.where(mask, first, -np.inf))
    below = np.minimum.accumulate(np.where(mask, first, np.inf)[::-1])[::-1]
    squares = np.minimum(first - above, below - first) ** 2
    if mask.ndim == 3:
        second, columns = np.arange(shape[1])[:, None], squares
        for k in range(shape[1]):
            squares = np.minimum(squares, columns[:, k:k + 1] + (second - k) ** 2)
    nearest = []
    for p in np.array_split(points, 1 + len(points) * shape[-1] // 2**22):  # bounded memory
        rows = squares[tuple(p.T[:-1])] + (p[:, -1:] - np.arange(shape[-1])) ** 2
        nearest.append(rows.min(1))
    return np.sqrt(np.concatenate(nearest))


def mask_scores(pred, truth, distances=True):
    """One class, bool arrays (2-D or 3-D) -> {dice, jaccard (%), hd95, asd (pixels)} or None.

    HD95 pools both directions' surface distances; ASD goes from prediction to truth. Both masks
    empty: None, not scored. One empty: Dice and Jaccard 0, distances the image's diagonal (not 0,
    which would make an empty prediction look perfect).
    """
    both, total = int((pred & truth).sum()), int(pred.sum()) + int(truth.sum())
    if total == 0:
        return None
    scores = {"dice": 200 * both / total, "jaccard": 100 * both / (total - both)}
    if distances and pred.any() and truth.any():
        a, b = surface_points(pred), surface_points(truth)
        corner = np.minimum(a.min(0), b.min(0))  # the work is in the masks' common box
        a, b = a - corner, b - corner
        to_truth, to_pred = distances_to(b, a), distances_to(a, b)
        scores["hd95"] = float(np.percentile(np.concatenate([to_truth, to_pred]), 95))
        scores["asd"] = float(to_truth.mean())
    elif distances:
        scores["hd95"] = scores["asd"] = math.hypot(*pred.shape)
    return scores


@contextlib.contextmanager
def evaluating(networks):
    """All networks in evaluation mode and without gradients; afterwards each as it was."""
    modes = [(network, network.training) for network in networks.values()]
    for network, _ in modes:
        network.eval()
    with torch.no_grad():
        yield
    for network, training in modes:
        network.train(training)


def evaluate(predict, networks, data, part, distances=True):
    """Score every network on all volumes of `part` ("val" or "test"): {network: summary}.

    predict(networks, x) -> {name: probabilities (B, C, h, w)}, resized to the images' original size
    before the argmax. A volume's slices are scored together, in 3-D. A summary: for each metric the
    mean over foreground classes of the mean over volumes (None: undefined), its parts in "classes"
    and "volumes"; in "empty", for each class, in how many volumes both masks were empty, the
    prediction alone ("missed") or the truth alone ("false").
    """
    def mean(values):
        values = [v for v in values if v is not None]
        return sum(values) / len(values) if values else None

    summaries, names = {}, [str(c) for c in range(1, data.classes)]
    for volume, indices in data.volumes(part).items():
        truth, labels = np.stack([data.truth(i) for i in indices]), {}  # (D, H, W)
        with evaluating(networks):
            for chunk in torch.as_tensor(indices).split(16):
                for name, probs in predict(networks, data.load_images(chunk)).items():
                    probs = F.interpolate(probs, truth.shape[1:], mode="bilinear")
                    labels.setdefault(name, []).append(probs.argmax(1).to(torch.uint8).cpu())
        for name, chunks in labels.items():
            pred = torch.cat(chunks).numpy()  # (D, H, W)
            empty = {c: {"both": 0, "missed": 0, "false": 0} for c in names}
            summary = summaries.setdefault(name, {"classes": {}, "empty": empty, "volumes": {}})
            scores = summary["volumes"][volume] = {}
            for c in names:
                a, b = pred == int(c), truth == int(c)
                a, b = (a[0], b[0]) if len(b) == 1 else (a, b)  # one image is scored in 2-D
                scores[c] = mask_scores(a, b, distances)
                if not (a.any() and b.any()):
                    kind = "false" if a.any() else "missed" if b.any() else "both"
                    summary["empty"][c][kind] += 1
    for name, summary in summaries.items():
        for c in names:
            scored = [scores[c] for scores in summary["volumes"].values() if scores[c]]
            summary["classes"][c] = {m: mean(scores.get(m) for scores in scored) for m in METRICS}
        means = {m: mean(s[m] for s in summary["classes"].values()) for m in METRICS}
        summaries[name] = {**means, **summary}
    return summaries


# --- Augmentation: on the device, for a whole batch, drawn for each image -------------------------

def weak(x, *maps, flip=True):
    """Random flips, rotation (to 20 degrees), scale (0.8 to 1.25) of x (B, channels, H, W) [ours].

    maps: integer maps (B, H, W), moved alike, nearest neighbour; 0 from outside. -> [x, *maps].
    """
    if len(x) == 0:
        return [x, *maps]
    angle = (torch.rand(len(x), device=x.device) * 2 - 1) * math.radians(20)
    zoom = 1.25 ** (torch.rand(len(x), device=x.device) * 2 - 1)
    mirror = torch.rand(len(x), 2, device=x.device) >= 0.5
    sign_x, sign_y = (1 - 2.0 * (mirror & flip)).unbind(1)
    cos, sin, zero = angle.cos() / zoom, angle.sin() / zoom, torch.zeros_like(angle)
    rows = [cos * sign_x, -sin * sign_y, zero, sin * sign_x, cos * sign_y, zero]
    theta = torch.stack(rows, 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    out = [F.grid_sample(x, grid, align_corners=False)]
    for m in maps:
        moved = F.grid_sample(m[:, None].float(), grid, "nearest", align_corners=False)
        out.append(moved[:, 0].to(m.dtype))
    return out


def strong(x):
    """Contrast, brightness, gamma, blur, noise of x (B, channels, H, W); stays in [0, 1] [ours]."""
    def uniform(low, high):
        return torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(low, high)

    if len(x) == 0:
        return x
    mean = x.mean((1, 2, 3), keepdim=True)
    x = ((x - mean) * uniform(0.5, 1.5) + mean + uniform(-0.2, 0.2)).clamp(1e-4, 1)
    x = x ** torch.exp2(uniform(-0.7, 0.7))
    x = x.lerp(tvf.gaussian_blur(x, [5, 5], [1.5, 1.5]), uniform(0, 1))
    return (x + uniform(0, 0.08) * torch.randn_like(x)).clamp(0, 1)


# --- Batches --------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """What one step trains on, weakly augmented."""

    x_l: torch.Tensor  # labelled images (B_l, channels, H, W)
    y_l: torch.Tensor  # their masks (B_l, H, W), long
    x_u: torch.Tensor  # unlabelled images (B_u, channels, H, W)
    map_u: torch.Tensor  # a uint8 map for each unlabelled image (B_u, H, W), or None
    index_u: torch.Tensor  # which images they are (B_u,), on the CPU


class Shuffled:
    """Endless stream of image numbers: all in random order, then all again in another order.

    Has its own generator, in checkpoints: resumed runs and all methods see the same batches.
    """

    def __init__(self, indices, seed):
        self.indices = torch.as_tensor(indices, dtype=torch.long)
        self.generator = torch.Generator().manual_seed(seed)
        self.queue = self.indices[:0]

    def take(self, n):
        while len(self.queue) < n:
            order = torch.randperm(len(self.indices), generator=self.generator)
            self.queue = torch.cat([self.queue, self.indices[order]])
        taken, self.queue = self.queue[:n], self.queue[n:]
        return taken

    def state_dict(self):
        return {"queue": self.queue.clone(), "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.queue = state["queue"]
        self.generator.set_state(state["generator"])


class Data:
    """A dataset: the split, decoded images at --size, masks where training may see them, batches.

    names[i] is image i, units[i] its patient (or itself), volumes_of[i] its volume; split is
    {"labeled": units, "unlabeled": units, "val": units, "test": units}. decode() adds channels,
    classes, images (N, channels, S, S) uint8 and truth(i), mask i (H, W) uint8 at its own size. It
    opens labelled, validation and test masks; call truth for others only to show hidden masks.
    """

    def __init__(self, args):
        self.args = args
        find_files(self, args)  # in the tools below: names, checks, split
        self.labeled = Shuffled(self.indices("labeled"), args.seed)
        # With every unit labelled, the unlabelled stream is the same images without their masks.
        unlabeled = self.indices("unlabeled") or self.indices("labeled")
        self.unlabeled = Shuffled(unlabeled, args.seed + 1)

    def decode(self):
        """Read images and visible masks, or find them in the cache; a Run does it first."""
        decode(self)

    def indices(self, part):
        """Image numbers of a part; a labelled patient's slices without masks are unlabelled."""
        images = [(i, u, self.has_mask[i]) for i, u in enumerate(self.units)]
        units, labeled = set(self.split[part]), set(self.split["labeled"])
        if part != "unlabeled":
            return [i for i, u, masked in images if masked and u in units]
        return [i for i, u, masked in images if u in units or (u in labeled and not masked)]

    def volumes(self, part):
        """{volume: image numbers in slice order} of a part."""
        volumes = {}
        for i in self.indices(part):
            volumes.setdefault(self.volumes_of[i], []).append(i)
        return volumes

    def load_images(self, indices):
        """Image numbers (B,) -> floats in [0, 1] (B, channels, S, S) on the device."""
        x = torch.from_numpy(self.images[np.asarray(indices)]).to(self.args.device)
        return (x / 255).contiguous(memory_format=torch.channels_last)

    def load_labels(self, indices):
        """Numbers of images with visible masks (B,) -> masks (B, S, S), long, on the device."""
        rows = [self.label_rows[int(i)] for i in indices]
        return torch.from_numpy(self.labels[rows]).to(self.args.device).long()

    def batch(self, maps=None):
        """The next Batch. maps: optional uint8 array (N, S, S), one for each image."""
        index_l = self.labeled.take(self.args.batch_size)
        index_u = self.unlabeled.take(self.args.unlabeled_batch)
        flip, device = self.args.flip, self.args.device
        maps_u = [] if maps is None else [torch.from_numpy(maps[index_u.numpy()]).to(device)]
        x_l, y_l = weak(self.load_images(index_l), self.load_labels(index_l), flip=flip)
        x_u, *maps_u = weak(self.load_images(index_u), *maps_u, flip=flip)
        return Batch(x_l, y_l, x_u, maps_u[0] if maps_u else None, index_u)


# ==================== Tools: no need to read these to understand a method =========================

def stop(message, status=2):
    """End the program with a message: what was found, what was expected, what to do."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def some(items):
    """The first items of a list, for a message."""
    return ", ".join(map(str, list(items)[:4])) + ", ..." * (len(items) > 4)


# --- Command line ---------------------------------------------------------------------------------

def number(kind, minimum):
    """An argparse type: a finite number of this kind, not below the minimum."""
    def convert(text):
        if minimum <= kind(text) < math.inf:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} was given, at least {minimum} is needed")
    return convert


def parser(doc):
    """An ArgumentParser with the options that all methods share; methods add to its group `own`."""
    raw, one, zero = argparse.RawDescriptionHelpFormatter, number(int, 1), number(int, 0)
    p = argparse.ArgumentParser(description=doc, formatter_class=raw)
    p.own = p.add_argument_group("options of this paper")
    add = p.add_argument_group("shared options").add_argument
    add("--data", default="phantom", metavar="PATH", help="dataset folder (default: a phantom)")
    add("--labeled", metavar="SPEC", help="10%% of the units with masks, 7 units, or a file of ids")
    add("--size", type=one, help="side that images are resized to (256; phantom: 64)")
    add("--width", type=one, help="channels of the U-Net's first stage (32; phantom: 16)")
    add("--classes", type=number(int, 2), help="classes, if they cannot be seen from the masks")
    add("--steps", type=one, help="optimizer steps (10000; phantom: 800)")
    add("--batch-size", type=one, default=8, help="labelled images a step (%(default)s)")
    add("--unlabeled-batch", type=one, default=8, help="unlabelled images a step (%(default)s)")
    add("--lr", type=number(float, 0), default=1e-3, help="first learning rate (%(default)s)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True,
        help="mirror images; --no-flip where left and right are different classes")
    add("--seed", type=zero, default=0, help="training randomness (%(default)s)")
    add("--split-seed", type=zero, default=0, help="which units are labelled (%(default)s)")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu) or a name such as cuda:1")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="auto: bf16 where the GPU has it, fp16 with a scaler on older ones, else fp32")
    add("--out", default="runs", metavar="FOLDER", help="where run folders go (%(default)s)")
    add("--resume", action="store_true", help="continue the run that these options name")
    add("--val-every", type=one, help="steps between validations (a tenth of --steps)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssl-segmentation"
    add("--cache", default=str(cache), metavar="FOLDER", help="for decoded images (%(default)s)")
    return p


def parse(parser, argv=None):
    """Parse, and fill in every default; args.options holds what the run folder's name spells."""
    args, unit = parser.parse_args(argv), 2**DEPTH
    if hasattr(sys.stdout, "reconfigure"):  # lines reach a log file at once, on every console
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    other = "data labeled seed supervised out resume device val_every cache".split()
    args.options = {k: v for k, v in vars(args).items()
                    if k not in other and v != parser.get_default(k)}
    size, width, steps = (64, 16, 800) if args.data == "phantom" else (256, 32, 10000)
    args.size, args.width, args.steps = args.size or size, args.width or width, args.steps or steps
    args.val_every = args.val_every or max(1, args.steps // 10)
    if args.size % unit:
        low = args.size // unit * unit
        stop(f"--size {args.size}: expected a multiple of {unit}, since the U-Net halves the image "
             f"{DEPTH} times. Try {low or unit} or {low + unit}.")
    if args.device == "auto":
        mps = torch.backends.mps.is_available()
        args.device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        cuda = torch.zeros(1, device=args.device).is_cuda
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        stop(f"--device {args.device} cannot be used: {str(error).splitlines()[0]} Expected auto, "
             "cpu, cuda, cuda:1 or mps, on a machine that has it.")
    if args.precision == "fp16" and not cuda:
        stop(f"--precision fp16 needs a CUDA GPU, the device is {args.device}. Use fp32.")
    if args.precision == "auto":
        new = cuda and torch.cuda.get_device_capability(args.device)[0] >= 8
        args.precision = "bf16" if new else "fp16" if cuda else "fp32"
    return args


# --- Files, checks, split -------------------------------------------------------------------------

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".npy")
MASK_SUFFIX = re.compile("_(mask|segmentation|anno|label)$")
SLICE = re.compile(r"^(?P<volume>(?P<patient>.+?)(_frame\d+)?)_slice_?(?P<slice>\d+)$")
MAX_CLASS = 31  # a larger number in a mask is no class number (but 255 in a binary mask is)


def parse_name(name):
    """Image name -> (unit, volume, slice number); a name that is not a slice's is its own unit."""
    match = SLICE.match(name)
    return (match["patient"], match["volume"], int(match["slice"])) if match else (name, name, -1)


def scan(root):
    """A dataset folder -> ({name: image path} by volume and slice, {name: mask path})."""
    layout = "Expected PATH/images/NAME.png and PATH/masks/NAME.png; see README, Your own data."
    files = {"images": {}, "masks": {}}
    for part, paths in files.items():
        for path in sorted((root / part).iterdir()) if (root / part).is_dir() else ():
            name = MASK_SUFFIX.sub("", path.stem) if part == "masks" else path.stem
            if path.suffix.lower() in ENDINGS and not name.startswith("."):
                other = paths.setdefault(name, path)
                if other != path:
                    stop(f"two files for {name}: {other.name} and {path.name} in {part}. Keep one.")
    images, masks = files.values()
    if not images:
        inner = (root / "images").is_dir()
        place = root / "images" if inner else root
        found = some(sorted(os.listdir(place))) or "nothing" if root.is_dir() else "no such folder"
        stop(f"--data: no {'images' if inner else 'folder images'} in {place} (found: {found}). "
             f"{layout} Endings: {' '.join(ENDINGS)}")
    orphans = [path.name for name, path in masks.items() if name not in images]
    if orphans:
        stop(f"{len(orphans)} masks have no image of their name: {some(orphans)}. Images are "
             f"{some(images)}. Rename or remove those masks. {layout}")
    order = sorted(images, key=lambda name: (*parse_name(name)[1:], name))
    return {name: images[name] for name in order}, masks


def read_ids(path, names):
    """A text file of ids (patients, volumes or image names, one a line) -> its units, sorted."""
    unit_of = {key: parse_name(n)[0] for n in names for key in (n, *parse_name(n)[:2])}
    try:
        ids = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{path} cannot be read as a text file of ids, one a line: {error}")
    unknown = [i for i in ids if i not in unit_of]
    if unknown or not ids:
        stop(f"{path}: {len(unknown)} of {len(ids)} ids are not in the dataset: {some(unknown)}. "
             f"Expected at least one id, such as {some(sorted(set(unit_of.values())))}")
    return sorted({unit_of[i] for i in ids})


def choose_labeled(spec, units, names):
    """--labeled -> units: a file's, or the first of the (seeded) `units`, so 5% is inside 10%."""
    if Path(spec).is_file():
        chosen = read_ids(spec, names)
        outside = sorted(set(chosen) - set(units))
        if outside:
            stop(f"--labeled {spec}: not training units with masks: {some(outside)}. Expected some "
                 f"of {some(sorted(units))}")
        return chosen
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", spec)
    value, percent = (float(match[1]), match[2]) if match else (0, "")
    if not percent and value % 1:
        stop(f"--labeled {spec}: did you mean {value * 100:g}%? Give a share (10%) or units (7).")
    if value <= 0 or value > (100 if percent else len(units)):
        stop(f"--labeled {spec}: expected a share above 0% and up to 100%, a number of units from "
             f"1 to {len(units)} (the training units with masks), or a text file of ids.")
    count = max(1, math.floor(len(units) * value / 100 + 0.5)) if percent else int(value)
    return sorted(units[:count])


def make_split(names, masked, lists, labeled, split_seed):
    """{"labeled", "unlabeled", "val", "test": sorted units}, from sorted ids and split_seed alone.

    names: all images; masked: those with masks; lists: {"train", "val", "test": units} or fewer.
    """
    units = sorted({parse_name(name)[0] for name in names})
    with_mask = {parse_name(name)[0] for name in masked}
    if len(units) == 1:
        stop(f"all {len(names)} images belong to one patient, {units[0]}: nothing is left to test "
             "on. NAME_slice_03 means a slice of patient NAME; rename what is a separate image.")
    for a, b in itertools.combinations(lists, 2):
        both = sorted(set(lists[a]) & set(lists[b]))
        if both:
            stop(f"{some(both)}: in {a}.txt and in {b}.txt. A patient may be in one list only.")
    listed = set(itertools.chain(*lists.values()))
    order = [units[i] for i in np.random.default_rng(split_seed).permutation(len(units))]
    free, split = [u for u in order if u in with_mask and u not in listed], {}
    for part, share in (("val", 0.1), ("test", 0.2)):
        count = 0 if part in lists else max(1, round(share * len(with_mask)))
        split[part], free = sorted(lists.get(part) or free[:count]), free[count:]
    train = set(lists.get("train", free)) | set(units) - with_mask - listed
    train_masked = [unit for unit in order if unit in train and unit in with_mask]
    parts = {"validation": split["val"], "test": split["test"], "training": train_masked}
    for part, found in parts.items():
        if not with_mask & set(found):
            stop(f"no {part} units with masks are left: {len(with_mask)} units have masks, "
                 f"{len(listed)} are in lists. Annotate more, or change the lists: each needs one.")
    if labeled is None and len(with_mask) == len(units):
        stop("--labeled is needed, since all images have masks: 10%, 7 units, or a file of ids.")
    split["labeled"] = choose_labeled(labeled or "100%", train_masked, names)
    split["unlabeled"] = sorted(train - set(split["labeled"]))
    return split


def find_files(data, args):
    """Fill in a Data object's names, files and split, without opening an image."""
    if args.data == "phantom":
        args.labeled = args.labeled or "10%"
        names, *data.phantom, lists = phantom(args.size)
        data.name, masks = "phantom", set(names)
    else:
        root, data.phantom = Path(args.data), None
        images, masks = scan(root)
        names, data.name = list(images), root.resolve().name
        data.image_files, data.mask_files = list(images.values()), [masks.get(n) for n in names]
        lists = {part: read_ids(root / f"{part}.txt", names) for part in ("train", "val", "test")
                 if (root / f"{part}.txt").is_file()}
    data.names, data.has_mask = names, [name in masks for name in names]
    data.units, data.volumes_of, _ = zip(*map(parse_name, names), strict=True)
    data.split = make_split(names, masks, lists, args.labeled, args.split_seed)
    args.labeled = args.labeled or "100%"
    text = json.dumps(data.split, sort_keys=True)
    data.split_hash = hashlib.sha256(text.encode()).hexdigest()[:8]


# --- Decoding, once -------------------------------------------------------------------------------

class Bad(Exception):
    """A file that cannot be used, and why."""


def read_pixels(path, mask=False):
    """(H, W) or (H, W, 3) as stored; of palettes the colours, in masks (if not 0/255) indices."""
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                if getattr(image, "n_frames", 1) > 1:
                    raise ValueError(f"{image.n_frames} pages in a file; expected one file a slice")
                grey = image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16")
                mode = image.mode if grey else "L" if image.mode == "LA" else "RGB"
                array, palette = np.asarray(image.convert(mode)), mask and image.mode == "P"
                if palette and (np.ptp(array, 2).any() or {*np.unique(array)} - {0, 255}):
                    array = np.asarray(image)
        array = array[..., 0] if array.shape[2:] == (1,) else array
        if array.ndim not in (2, 3) or not array.size or array.shape[2:] not in ((), (3,), (4,)):
            raise ValueError(f"an array of shape {array.shape}; expected (H, W) or (H, W, 3)")
        if array.dtype.kind not in "buif" or not np.isfinite(array).all():
            raise ValueError(f"values of type {array.dtype} or not finite; expected numbers")
    except Exception as error:  # Pillow and NumPy raise a dozen types on damaged files
        raise Bad(f"{path.name}: cannot be used ({type(error).__name__}: {error})") from None
    array = array[..., :3] if array.ndim == 3 else array
    return array.astype(np.uint8) * 255 if array.dtype == bool else array


def read_volume(paths):
    """A volume's images, (H, W) or (H, W, 3) uint8; not 8-bit: from its 0.5-99.5 percentiles."""
    arrays = [read_pixels(path) for path in paths]
    if all(array.dtype == np.uint8 for array in arrays):
        return arrays
    values = np.concatenate([array.ravel() for array in arrays]).astype(float)
    low, high = np.percentile(values, [0.5, 99.5])
    scaled = [(array - low) / max(high - low, 1e-12) * 255 for array in arrays]
    return [array.clip(0, 255).astype(np.uint8) for array in scaled]


def read_mask(path):
    """A mask -> class numbers (H, W) uint8 and "binary" (0/255, cut at 127), "classes", "empty"."""
    array, lossy = read_pixels(path, mask=True), path.suffix.lower() in (".jpg", ".jpeg")
    if array.ndim == 3 and np.ptp(array, 2).any() and not lossy:
        raise Bad(f"{path.name}: a mask in colours; expected class numbers, or 0 and 255")
    array = array[..., 0] if array.ndim == 3 else array
    values = np.unique(array)
    near_ends = (values <= MAX_CLASS) | (values >= 255 - MAX_CLASS)
    if lossy or (MAX_CLASS < values[-1] <= 255 and near_ends.all()):
        return (array > 127).astype(np.uint8), "binary" if values[-1] > 127 else "empty"
    if values[0] < 0 or values[-1] > MAX_CLASS or (values % 1).any():
        found = some([f"{v:g}" for v in values])
        raise Bad(f"{path.name}: mask values {found}; expected class numbers 0, 1, 2, ... "
                  f"up to {MAX_CLASS}, or 0 and 255")
    return array.astype(np.uint8), "classes" if values[-1] else "empty"


def read_each(items, read, what):
    """Yield read(item), with a progress bar. Bad files stop the run, after all were read."""
    bad = []
    for item in tqdm(items, f"decoding {what}", leave=False, disable=None):
        try:
            yield read(item)
        except Bad as error:
            bad.append(str(error))
    if bad:
        listed = "\n  ".join([*bad[:10], "..."] if len(bad) > 10 else bad)
        stop(f"{len(bad)} bad files among the {what}; mend or remove them:\n  {listed}")


def cached(root, key, build):
    """The folder root/<hash of key>, filled once by build(folder), aside and then renamed."""
    folder = Path(root) / hashlib.sha256(repr(("v3", key)).encode()).hexdigest()[:20]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            with tempfile.TemporaryDirectory(prefix="building-", dir=root) as aside:
                new = Path(aside, "new")
                new.mkdir()
                build(new)
                with contextlib.suppress(OSError):  # another run was faster, its folder is as good
                    new.rename(folder)
        folder.stat()  # OSError if the folder is not there
    except OSError as error:
        stop(f"the cache of decoded images, {root}, cannot be written ({error}). Choose another "
             "with --cache FOLDER, or free some space.")
    return folder


def decode(data):
    """Fill in a Data object's pixels, from the cache if it has them. Opens visible masks only."""
    visible = [i for part in ("labeled", "val", "test") for i in data.indices(part)]
    data.label_rows = {i: row for row, i in enumerate(visible)}
    size, kinds, colour, volumes = data.args.size, {}, [], {}

    def read_images(paths):
        arrays = read_volume(paths)
        for path, array in zip(paths, arrays, strict=True):
            colour.append(array.ndim == 3)
            if colour[-1] and not colour[0]:
                raise Bad(f"{path.name}: in colour, the first image is grey; save all alike")
        return [Image.fromarray(array).convert("RGB" if colour[0] else "L") for array in arrays]

    def read_label(i):
        path, (h, w) = data.mask_files[i], data.sizes[i]
        mask, kind = read_mask(path)
        if mask.shape != (h, w):
            found = "{} x {}".format(*mask.shape)
            raise Bad(f"{path.name}: {found} pixels, but its image has {h} x {w}")
        kinds.setdefault(kind, path.name)
        return [Image.fromarray(mask)]

    def entry(what, items, read, resample, files):
        """All items' pictures, resized, (N, channels, S, S); their sizes; their largest value."""
        def build(folder):
            sizes, largest = [], 0
            with open(folder / "array.u8", "wb") as file:
                for picture in itertools.chain.from_iterable(read_each(items, read, what)):
                    array = np.atleast_3d(picture.resize((size, size), resample))
                    file.write(array.transpose(2, 0, 1).tobytes())
                    sizes.append((picture.height, picture.width))
                    largest = max(largest, int(np.max(picture)))
            if "binary" in kinds and "classes" in kinds:
                stop(f"some masks are binary 0/255 ({kinds['binary']}), others hold class numbers "
                     f"({kinds['classes']}). Write all of them in one of the two ways.")
            meta = (len(sizes), array.shape[2], size, size), sizes, largest
            (folder / "meta.json").write_text(json.dumps(meta))

        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        folder = cached(data.args.cache, (what, size, data.names, stats), build)
        shape, sizes, largest = json.loads((folder / "meta.json").read_text())
        array = np.memmap(folder / "array.u8", np.uint8, "r", shape=tuple(shape))
        return array, list(map(tuple, sizes)), largest

    if data.phantom:
        data.images, masks = data.phantom
        data.sizes, data.labels = [masks.shape[1:]] * len(masks), masks[visible]
        data.truth, largest = masks.__getitem__, int(masks.max())
    else:
        for path, volume in zip(data.image_files, data.volumes_of, strict=True):
            volumes.setdefault(volume, []).append(path)
        items, files = list(volumes.values()), data.image_files
        data.images, data.sizes, _ = entry("images", items, read_images, Image.BILINEAR, files)
        files = [path for i in visible for path in (data.image_files[i], data.mask_files[i])]
        labels, _, largest = entry("masks", visible, read_label, Image.NEAREST, files)
        data.labels, data.truth = labels[:, 0], lambda i: read_mask(data.mask_files[i])[0]
    data.channels, data.classes = data.images.shape[1], data.args.classes or largest + 1
    for volume, indices in [*data.volumes("val").items(), *data.volumes("test").items()]:
        found = {data.sizes[i] for i in indices}
        if len(found) > 1:
            stop(f"the slices of {volume} differ in size: {some(found)}. Expected one size.")
    if largest == 0:
        stop("labelled, validation and test masks hold background only; expected 1, 2, ... or 255.")
    if largest >= data.classes:
        expected = f"Expected at least {largest + 1}."
        stop(f"--classes {data.classes}, but the masks hold class {largest}. {expected}")


def phantom(size, patients=48, seed=0):
    """Cardiac-like slices: names, images (N, 1, size, size), masks (N, size, size) uint8, lists.

    Classes as in ACDC: 1 right ventricle, 2 myocardium, 3 left ventricle; two frames of four slices
    a patient. Patients differ in pose, shape, contrast, bias field, texture and distractors.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    names, images, masks = [], [], []

    def texture(scale):
        coarse = Image.fromarray(rng.normal(size=(scale, scale)).astype(np.float32))
        return np.asarray(coarse.resize((size, size), Image.BICUBIC))

    for patient in range(patients):
        cx, cy, turn = *rng.uniform(-0.2, 0.2, 2), rng.uniform(-0.6, 0.6)
        radius, wall = rng.uniform(0.24, 0.36), rng.uniform(0.09, 0.15)
        aspect, blood = rng.uniform(0.8, 1.25), rng.uniform(0.6, 0.95)
        muscle, fat = rng.uniform(0.25, 0.5), rng.uniform(0.1, 0.8)
        gamma, slope = rng.uniform(0.6, 1.6), rng.normal(size=2) * 0.25
        blobs = [(*rng.uniform(-0.9, 0.9, 2), *rng.uniform(0.08, 0.25, 2), rng.uniform(0.1, 0.95))
                 for _ in range(7)]
        u = ((x - cx) * math.cos(turn) + (y - cy) * math.sin(turn)) * aspect
        v = (y - cy) * math.cos(turn) - (x - cx) * math.sin(turn)
        for frame, squeeze in ((1, 1.0), (2, rng.uniform(0.6, 0.8))):
            for level in range(4):
                r, thick = radius * squeeze * (1 - 0.17 * level), wall * (1.5 - 0.5 * squeeze)
                distance = np.hypot(u, v) * (1 + 0.06 * texture(5))
                side = np.hypot((u + r + thick) / 1.15, v / 1.25) * (1 + 0.06 * texture(5))
                mask = np.where(side < r * (1.0 - 0.1 * level), 1, 0)
                mask = np.where(distance < r, 3, np.where(distance < r + thick, 2, mask))
                image = fat * 0.35 + 0.08 * texture(7)
                for bx, by, a, b, value in blobs:
                    image = np.where(np.hypot((x - bx) / a, (y - by) / b) < 1, value, image)
                image = np.choose(mask, [image, blood * 0.95, muscle, blood])
                image = image + 0.06 * texture(size // 4) + slope[0] * x + slope[1] * y
                image = np.clip(image, 0.01, 1) ** gamma + rng.normal(size=(size, size)) * 0.05
                names.append(f"p{patient:02d}_frame{frame:02d}_slice_{level:02d}")
                images.append((image.clip(0, 1) * 255).astype(np.uint8)[None])
                masks.append(mask.astype(np.uint8))
    units = [f"p{patient:02d}" for patient in range(patients)]
    lists = {"train": units[:-18], "val": units[-18:-12], "test": units[-12:]}
    return names, np.stack(images), np.stack(masks), lists


# --- Run folder: log, checkpoints, resume, results ------------------------------------------------

def write_aside(path, write):
    """write(temporary path), then rename: readers of `path` find the old or the new file, whole."""
    aside = path.with_name(path.name + ".tmp")
    write(aside)
    with open(aside, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def load_network(path, network):
    """Copy the first network of a checkpoint that has the layers and sizes of `network`."""
    shapes = {k: v.shape for k, v in network.state_dict().items()}
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)["networks"]
        fits = [k for k, v in saved.items() if {n: w.shape for n, w in v.items()} == shapes]
    except Exception as error:  # torch.load raises a dozen types
        stop(f"--init {path} is not a checkpoint ({type(error).__name__}: {error}). Expected the "
             "last.pt or best.pt of a run, such as that of mean_teacher.py --supervised.")
    if not fits:
        stop(f"--init {path} holds {some(saved)}, none with this run's layers and sizes. Expected "
             "the U-Net of a run on the same dataset and with the same --width.")
    network.load_state_dict(saved[fits[0]])
    print(f"--init: starting from {fits[0]} of {path}")


def hidden_dice(labels, data):
    """For --debug-oracle, to print: label maps (N, S, S) against hidden masks, if there are any."""
    def dice(i):
        truth = np.asarray(Image.fromarray(data.truth(i)).resize(labels.shape[:0:-1], 0))
        pairs = [(labels[i] == c, truth == c) for c in range(1, data.classes)]
        return [s["dice"] for s in (mask_scores(*pair, distances=False) for pair in pairs) if s]

    known = [i for i in data.unlabeled.indices.tolist() if data.has_mask[i]]
    found = list(itertools.chain(*read_each(known, dice, "hidden masks")))
    mean = f"{sum(found) / len(found):.2f}" if found else "unknown"
    return f"Dice of pseudo-labels {mean} ({len(known)} images with hidden masks)"


class Run:
    """One training run: device and precision, the loop's steps, log, checkpoints and scores."""

    def __init__(self, name, args, data):
        self.name, self.args, self.data = name, args, data
        labeled = Path(args.labeled).stem if Path(args.labeled).is_file() else args.labeled
        start, parent = f"{name}-{labeled}-seed{args.seed}", Path(args.out) / data.name
        options = {k: Path(str(v)).stem if os.sep in str(v) else v for k, v in args.options.items()}
        title = start + "".join(f"-{k}_{v}" for k, v in sorted(options.items()))
        similar = sorted(p.name for p in parent.glob("*")
                         if p.name == start or p.name.startswith(f"{start}-"))
        taken = [n for n in similar if re.fullmatch(re.escape(title) + r"(-\d+)?", n)]
        self.resumed = args.resume and bool(taken)
        if args.resume and similar and not taken:
            stop(f"--resume: no run {title}; there is {some(similar)}. Repeat the run's options "
                 "(only --out, --device and --val-every may change), or leave --resume out.")
        if self.resumed:
            self.folder = parent / max(taken, key=lambda n: (len(n), n))  # -10 is newer than -9
            split = self.folder / "split.json"
            found = json.loads(split.read_text())["hash"] if split.exists() else data.split_hash
            if found != data.split_hash:
                stop(f"--resume: {self.folder} has split {found}, the dataset {data.split_hash}. "
                     "Restore the dataset's files and lists, or leave --resume out.")
        data.decode()
        try:
            for count in range(1, 1 if self.resumed else 10**6):
                self.folder = parent / (title if count == 1 else f"{title}-{count}")
                with contextlib.suppress(FileExistsError):
                    self.folder.mkdir(parents=True)
                    break
            self.write_json("args.json", {k: v for k, v in vars(args).items() if k != "options"})
            self.write_json("split.json", {"hash": data.split_hash, **data.split})
        except OSError as error:
            stop(f"--out {args.out} cannot be written ({error}). Choose another folder.")
        torch.manual_seed(args.seed)
        torch.backends.cudnn.benchmark = True
        self.device_type = torch.device(args.device).type
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=args.precision == "fp16")
        self.first_step, self.best, self.interrupted = 0, -1.0, False
        self.sums, self.count = {}, 0

    def write_json(self, name, content):
        text = json.dumps(content, indent=1)
        write_aside(self.folder / name, lambda path: path.write_text(text))

    def autocast(self):
        """Context for the networks' forward passes: bf16 or fp16 on GPUs, float32 elsewhere."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[self.args.precision]
        return torch.autocast(self.device_type, dtype=dtype, enabled=dtype is not None)

    def place(self, networks):
        """Move {name: network} to the device, channels-last (twice as fast on CPUs)."""
        to = {"device": self.args.device, "memory_format": torch.channels_last}
        return {name: network.to(**to) for name, network in networks.items()}

    def keep(self, networks, optimizers, predict, pictures):
        """What checkpoints hold and evaluation uses. Prints the set-up; on --resume loads last.pt.

        predict(networks, x) -> {name: probabilities (B, C, H, W)}, the one that the paper deploys
        first; pictures(networks, x) -> columns of preview.png: {title: label maps (B, H, W) long,
        or heat (B, H, W) float, or images (B, channels, H, W), or (images, label maps)}.
        """
        self.networks, self.optimizers = networks, optimizers
        self.predict, self.pictures = predict, pictures
        data, args, log = self.data, self.args, self.folder / "log.csv"
        units = [f"{k} {len(u)} ({len(data.indices(k))} images)" for k, u in data.split.items()]
        sizes = [f"{k} {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M"
                 for k, network in networks.items()]
        print(f"{self.name} on {data.name}: {data.classes} classes, {data.channels} x {args.size} "
              f"x {args.size}; {args.device}, {args.precision}, {torch.get_num_threads()} threads\n"
              f"units: {', '.join(units)}; split {data.split_hash}\n"
              f"labelled: {some(data.split['labeled'])}\nparameters: {', '.join(sizes)}\n"
              f"run folder: {self.folder}")
        if self.resumed and (self.folder / "last.pt").exists():
            state = torch.load(self.folder / "last.pt", map_location="cpu", weights_only=True)
            for k, network in networks.items():
                network.load_state_dict(state["networks"][k])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.scaler.load_state_dict(state["scaler"])
            data.labeled.load_state_dict(state["labeled"])
            data.unlabeled.load_state_dict(state["unlabeled"])
            torch.set_rng_state(state["rng"])
            if self.device_type == "cuda" and "cuda_rng" in state:
                torch.cuda.set_rng_state(state["cuda_rng"], args.device)
            self.first_step, self.best, self.count = state["step"], state["best"], state["count"]
            self.sums = {k: v.to(args.device) for k, v in state["sums"].items()}
        if args.resume:
            what = "continuing at" if self.first_step else "no checkpoint yet, starting at"
            print(f"--resume: {what} step {self.first_step}")
        if log.exists():  # cut the rows after the checkpoint, a half-written one included
            header, *rows = log.read_text().splitlines(keepends=True) or [""]
            rows = [r for r in rows if r[-1] == "\n" and int(r.split(",")[0]) <= self.first_step]
            write_aside(log, lambda path: path.write_text("".join([header, *rows] if rows else "")))

    def steps(self):
        """Step numbers 0 to --steps - 1, with a progress bar. Ctrl-C ends the run after a step."""
        def interrupt(*_):
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        previous, first, total, start = {}, self.first_step, self.args.steps, time.perf_counter()
        with contextlib.suppress(ValueError):  # not in the main thread: leave signals alone
            previous = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tqdm(total=total, initial=first, desc=self.name, disable=None) as self.bar:
                for step in range(first, total):
                    start = time.perf_counter() if step <= first + 2 else start
                    hours = (time.perf_counter() - start) / 8 * (total - step) / 3600
                    if step == first + 10 and hours > 1:
                        tqdm.write(f"This run will take about {hours:.1f} hours on this machine. "
                                   "A short one: --size 96 --width 16 --steps 1500", sys.stdout)
                    yield step
                    self.bar.update()
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    def backward(self, loss):
        """loss.backward(), scaled where the precision is fp16."""
        self.scaler.scale(loss).backward()

    def update(self, optimizer):
        """optimizer.step(), skipped by the gradient scaler where fp16 overflowed."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def log(self, **terms):
        """Add a step's loss terms and diagnostics (scalars) without waiting for the device."""
        for k, v in terms.items():
            self.sums[k] = self.sums.get(k, 0) + torch.as_tensor(v).detach()
        self.count += 1

    def save(self, step):
        """End of a step: every 20 a row of log.csv, every --val-every validation and checkpoints.
        A term that is not finite ends the run, and nothing is saved after that."""
        done, args, data, log = step + 1, self.args, self.data, self.folder / "log.csv"
        validate = done % args.val_every == 0 or done == args.steps
        if not (done % 20 == 0 or validate or self.interrupted):
            return
        row, better = {k: v.item() / self.count for k, v in self.sums.items()}, False
        for k, value in row.items():
            if not math.isfinite(value):
                stop(f"{k} is {value} between steps {done - self.count} and {done}; {self.folder} "
                     "has the checkpoint before that. Lower --lr.", status=1)
        shown = {k: f"{row[k]:.3f}" for k in ("loss", "lam") if k in row}
        self.bar.set_postfix(**shown, best=f"{self.best:.1f}")
        row["val_dice"] = ""
        if validate:
            scores = evaluate(self.predict, self.networks, data, "val", distances=False)
            dice = {k: s["dice"] or 0.0 for k, s in scores.items()}
            tqdm.write(f"step {done}/{args.steps}  loss {row['loss']:.3f}  validation Dice "
                       + ", ".join(f"{k} {d:.1f}" for k, d in dice.items()), sys.stdout)
            row["val_dice"] = reported = next(iter(dice.values()))
            better, self.best = reported > self.best, max(reported, self.best)
        if validate or done % 20 == 0:
            header = "" if log.exists() and log.stat().st_size else ",".join(["step", *row]) + "\n"
            with open(log, "a") as file:
                print(header + ",".join(map(str, [done, *row.values()])), file=file)
            self.sums, self.count = {}, 0
        if validate or self.interrupted:  # best.pt: what predicting needs, last.pt: what --resume
            state = {"method": self.name, "step": done, "best": self.best, "size": args.size,
                     "width": args.width, "channels": data.channels, "classes": data.classes,
                     "scaling": "8 bit / 255, others by their volume's 0.5 to 99.5 percentiles",
                     "networks": {k: network.state_dict() for k, network in self.networks.items()}}
            if better:
                write_aside(self.folder / "best.pt", lambda path: torch.save(state, path))
            state |= {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                      "scaler": self.scaler.state_dict(), "rng": torch.get_rng_state(),
                      "labeled": data.labeled.state_dict(), "sums": self.sums,
                      "unlabeled": data.unlabeled.state_dict(), "count": self.count}
            if self.device_type == "cuda":
                state["cuda_rng"] = torch.cuda.get_rng_state(args.device)
            write_aside(self.folder / "last.pt", lambda path: torch.save(state, path))
        if self.interrupted:
            self.bar.close()
            command = shlex.join(word for word in sys.argv if word != "--resume")
            print(f"stopped; saved at step {done}. To continue: python {command} --resume")
            sys.exit(130)

    def finish(self):
        """Score the test units, once, with the best and last networks; write and return results."""
        data, args, table, states = self.data, self.args, {}, {}
        save_preview(self)
        for which in ("best", "last"):
            path = self.folder / f"{which}.pt"
            states[which] = torch.load(path, map_location="cpu", weights_only=True)
            for k, network in self.networks.items():
                network.load_state_dict(states[which]["networks"][k])
            for k, scores in evaluate(self.predict, self.networks, data, "test").items():
                table.setdefault(k, {})[which] = scores
        name, best_step = next(iter(table)), states["best"]["step"]
        head = table[name]["last"]
        results = {"method": self.name, "dataset": data.name, "labeled": args.labeled,
                   "seed": args.seed, "steps": args.steps, "split": data.split_hash,
                   "headline": {"network": name, **{m: head[m] for m in METRICS}},
                   "best_step": best_step, "networks": table}
        self.write_json("results.json", results)
        print(f"\nTest: {len(data.volumes('test'))} volumes of {len(data.split['test'])} units\n"
              f"{'network, checkpoint':32}  Dice % Jaccard %  HD95 px ASD px")
        for k, scores in table.items():
            for which, label in (("last", "last"), ("best", f"best on val ({best_step})")):
                cells = [scores[which][m] for m in METRICS]
                cells = ["n/a" if cell is None else f"{cell:.2f}" for cell in cells]
                mark = "  <- headline" * (k == name and which == "last")
                print("{:32}{:>8}{:>10}{:>9}{:>7}".format(f"{k}, {label}", *cells) + mark)
        dice = [f"{c}: {'n/a' if s['dice'] is None else round(s['dice'], 1)}"
                for c, s in head["classes"].items()]
        counts = [counts.values() for counts in head["empty"].values()]
        both, missed, false = map(sum, zip(*counts, strict=True))
        print(f"Dice by class {', '.join(dice)}. Of {both + false} cases of a class absent from a "
              f"volume, {both} predicted empty (not scored); {missed} present ones were missed\n"
              f"results.json, preview.png, log.csv, last.pt and best.pt are in {self.folder}")
        return results


# --- Pictures and commands ------------------------------------------------------------------------

COLORS = ["#e6194b", "#3cb44b", "#4363d8", "#ffe119", "#f58231", "#911eb4", "#46f0f0", "#f032e6"]


def overlay(image, labels):
    """Image (channels, H, W) in [0, 1] with a label map (H, W) over it -> (3, H, W) uint8."""
    masks = labels == torch.arange(1, max(1, int(labels.max())) + 1)[:, None, None]
    return draw_segmentation_masks((image.expand(3, -1, -1) * 255).byte(), masks, 0.5, COLORS * 4)


def save_sheet(path, columns):
    """Titles over a grid of pictures: {title: list of (3, H, W) uint8}, all of one length."""
    rows = zip(*columns.values(), strict=True)
    tiles = [F.interpolate(tile[None], (160, 160))[0] for row in rows for tile in row]
    grid = make_grid(tiles, nrow=len(columns), pad_value=255)
    sheet = Image.new("RGB", (grid.shape[2], grid.shape[1] + 20), "white")
    sheet.paste(tvf.to_pil_image(grid), (0, 20))
    for i, title in enumerate(columns):
        ImageDraw.Draw(sheet).text((4 + i * 162, 3), title, "black", ImageFont.load_default(13))
    write_aside(path, lambda aside: sheet.save(aside, "PNG"))


def save_preview(run):
    """preview.png: image, truth, labels, the paper's columns for slices of 4 validation volumes."""
    volumes, sheet = list(run.data.volumes("val").values()), {}
    chosen = [v[len(v) // 2] for v in volumes[::max(1, len(volumes) // 4)]][:4]
    x = run.data.load_images(chosen)
    columns = {"image": x, "truth": run.data.load_labels(chosen)}
    with evaluating(run.networks):
        columns |= {k: p.argmax(1) for k, p in run.predict(run.networks, x).items()}
        columns |= run.pictures(run.networks, x)
    for title, column in columns.items():
        images, labels = column if isinstance(column, tuple) else (x, column)
        if labels.dim() == 3 and not labels.is_floating_point():
            sheet[title] = list(map(overlay, images.cpu(), labels.cpu()))
        else:  # images, or heat between 0 and its largest value
            heat = labels[:, None] / labels.amax().clamp_min(1e-8) if labels.dim() == 3 else labels
            sheet[title] = list((heat.cpu().expand(-1, 3, -1, -1) * 255).byte())
    save_sheet(run.folder / "preview.png", sheet)


def check(args):
    """The data doctor: everything about a dataset that a run depends on. Reads hidden masks too."""
    data, counts = Data(args), np.zeros(256, int)
    data.decode()
    names, with_mask = data.names, np.flatnonzero(data.has_mask)
    for mask in read_each(with_mask, data.truth, "masks"):
        counts += np.bincount(mask.ravel(), minlength=256)
    print(f"{data.name}: {len(names)} images, {len(with_mask)} with masks, {len(set(data.units))} "
          f"units (patients or images), {len(set(data.volumes_of))} volumes")
    for i in sorted({0, len(names) // 2, len(names) - 1}):
        print(f"  {names[i]}: unit {data.units[i]}, volume {data.volumes_of[i]}")
    sample, sizes = data.images[::max(1, len(names) // 100)], sorted(set(data.sizes))
    shares = [f"{c} ({n / counts.sum():.2%} of pixels)" for c, n in enumerate(counts) if n]
    print(f"sizes: {some([f'{h} x {w}' for h, w in sizes])}; channels: {data.channels}; intensity "
          f"{sample.min()} to {sample.max()}, mean {sample.mean():.0f}\nclasses: {some(shares)}")
    for part, units in data.split.items():
        print(f"{part}: {len(units)} units, {len(data.indices(part))} images: {some(units)}")
    chosen = data.indices("labeled")[::max(1, len(data.indices("labeled")) // 6)][:6]
    x, y = data.load_images(chosen).cpu(), data.load_labels(chosen).cpu()
    path = Path(args.out) / data.name / "check.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_sheet(path, {"image": list(map(overlay, x, 0 * y)), "mask": list(map(overlay, x, y))})
    print(f"no problem found; look at {path}")


def main(argv=None):
    command, *argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command == "check":
        args = parse(parser(check.__doc__), argv)
        args.labeled = args.labeled or "10%"
        check(args)
    elif command == "phantom":
        p = argparse.ArgumentParser("common.py phantom", description="Write the phantom as files.")
        p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
        p.add_argument("--size", type=number(int, 16), default=64)
        args = p.parse_args(argv)
        if args.out.exists():
            stop(f"--out {args.out} exists. Name a new folder.")
        names, images, masks, lists = phantom(args.size)
        for part, arrays in (("images", images[:, 0]), ("masks", masks)):
            (args.out / part).mkdir(parents=True)
            for name, array in zip(names, arrays, strict=True):
                Image.fromarray(array).save(args.out / part / f"{name}.png")
        for part, units in lists.items():
            (args.out / f"{part}.txt").write_text("\n".join(units) + "\n")
        print(f"{len(names)} images in {args.out}. Try:\n"
              f"python mean_teacher.py --data {args.out} --size {args.size} --labeled 10%")
    else:
        print(__doc__)
        sys.exit(0 if command in ("-h", "--help") else 2)


if __name__ == "__main__":
    main()
