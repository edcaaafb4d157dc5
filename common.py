"""What the six method files share: the U-Net, shared formulas, metrics, batches and augmentation.

Read the first part, down to the line "Tools". The rest is plumbing (command line, files, run folders) that no
paper is about. `common.py` is a command too:

    python common.py check --data PATH       look at a dataset before training on it
    python common.py phantom --out FOLDER    write the built-in phantom as files, to see the layout

Shapes: B images, C classes, H x W pixels. Images are floats in [0, 1], label maps are integers.
"""
import argparse
import contextlib
import copy
import glob
import hashlib
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

# --- U-Net (Ronneberger et al., MICCAI 2015, 1505.04597), with BatchNorm and padded convolutions --

DEPTH = 4  # times that the U-Net halves the image; the side must be a multiple of 2**DEPTH


def conv_block(c_in, c_out):
    """Two 3x3 convolutions with BatchNorm and ReLU: (B, c_in, H, W) -> (B, c_out, H, W)."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True),
        nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class Encoder(nn.Module):
    """Image (B, channels, H, W) -> list of DEPTH + 1 features, full resolution first, bottleneck last.

    Feature i has width * 2**i channels and H / 2**i rows.
    """

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
    """Doubles the resolution of x, joins the encoder's feature `skip` of that resolution, convolves."""

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
        self.blocks = nn.ModuleList(DecoderBlock(width * 2 ** (i + 1), width * 2**i) for i in reversed(range(DEPTH)))

    def forward(self, features):
        x, outputs = features[-1], []
        for block, skip in zip(self.blocks, features[-2::-1], strict=True):
            x = block(x, skip)
            outputs.append(x)
        return outputs


class UNet(nn.Module):
    """Image (B, channels, H, W) in [0, 1] -> logits (B, classes, H, W), float32 also under autocast."""

    def __init__(self, channels, classes, width):
        super().__init__()
        self.encoder = Encoder(channels, width)
        self.decoder = Decoder(width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        if len(x) == 0:  # BatchNorm refuses an empty batch (mean_teacher.py --supervised has one)
            return x.new_zeros(0, self.head.out_channels, *x.shape[2:])
        return self.head(self.decoder(self.encoder(x))[-1]).float()


# --- Shared formulas ------------------------------------------------------------------------------


def supervised_loss(logits, y):
    """0.5 cross-entropy + 0.5 soft Dice loss: logits (B, C, H, W), y (B, H, W) long -> scalar.

    Dice per image and class, background included, with 1e-5 against division by zero and no squares;
    then the mean over classes and images. Gradient flows into the logits.
    """
    probs = logits.softmax(1)
    target = F.one_hot(y, logits.shape[1]).movedim(-1, 1).to(probs.dtype)  # (B, C, H, W)
    overlap, total = (probs * target).sum((2, 3)), (probs + target).sum((2, 3))  # (B, C)
    dice_loss = 1 - ((2 * overlap + 1e-5) / (total + 1e-5)).mean()
    return 0.5 * F.cross_entropy(logits, y) + 0.5 * dice_loss


def ramp_up(step, length):
    """exp(-5 (1 - t/T)^2) for t < T, then 1 (Laine & Aila, ICLR 2017, 1610.02242; Mean Teacher uses it)."""
    return math.exp(-5 * (1 - min(step / length, 1)) ** 2) if length > 0 else 1.0


def poly_decay(step, steps):
    """(1 - t/T)^0.9, the learning rate's share at step t of T (DeepLab, 1606.00915)."""
    return (1 - step / steps) ** 0.9


def set_lr(optimizer, lr):
    """Set the learning rate of all parameter groups; returns it, for the log."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


# --- Metrics: equal to medpy's dc, jc, hd95 and asd, with one rule for empty masks ----------------


METRICS = ("dice", "jaccard", "hd95", "asd")


def surface_points(mask):
    """Pixels of a bool mask (any number of axes) that touch the outside or the border by a face: (N, axes)."""
    padded = np.pad(mask, 1)
    inner = mask.copy()
    for axis in range(mask.ndim):
        for start in (0, 2):
            inner &= padded[tuple(slice(start if a == axis else 1, (start if a == axis else 1) + n)
                                  for a, n in enumerate(mask.shape))]
    return torch.from_numpy(np.argwhere(mask & ~inner)).double()


def surface_distances(pred, truth):
    """From each surface pixel to the other mask's surface: (pred -> truth (N,), truth -> pred (M,)) in pixels."""
    a, b = surface_points(pred), surface_points(truth)
    to_b, to_a = [], torch.full((len(b),), math.inf, dtype=a.dtype)
    for chunk in a.split(max(1, 2**21 // len(b))):  # bounded memory: 2 million distances at a time
        distances = torch.cdist(chunk, b)
        to_b.append(distances.amin(1))
        to_a = torch.minimum(to_a, distances.amin(0))
    return torch.cat(to_b).numpy(), to_a.numpy()


def mask_scores(pred, truth, distances=True):
    """One class of one image or volume: bool arrays of equal shape -> {dice, jaccard (%), hd95, asd (pixels)}.

    HD95 pools both directions' surface distances; ASD goes from prediction to truth. Both masks empty: no score
    (None). One empty: Dice and Jaccard 0, both distances the diagonal of the image (an empty prediction must not
    look perfect).
    """
    if not pred.any() and not truth.any():
        return None
    both = int((pred & truth).sum())
    total = int(pred.sum()) + int(truth.sum())
    scores = {"dice": 200 * both / total, "jaccard": 100 * both / (total - both)}
    if distances and pred.any() and truth.any():
        to_truth, to_pred = surface_distances(pred, truth)
        scores |= {"hd95": float(np.percentile(np.concatenate([to_truth, to_pred]), 95)), "asd": float(to_truth.mean())}
    elif distances:
        scores |= dict.fromkeys(("hd95", "asd"), math.dist(pred.shape, [0] * pred.ndim))
    return scores


@contextlib.contextmanager
def evaluating(networks):
    """All networks in evaluation mode and without gradients; afterwards each in the mode it was in."""
    modes = {name: network.training for name, network in networks.items()}
    for network in networks.values():
        network.eval()
    with torch.no_grad():
        yield
    for name, network in networks.items():
        network.train(modes[name])


def evaluate(predict, networks, data, part, distances=True):
    """Score every network on all volumes of `part` ("val" or "test"): {network: summary}.

    predict(networks, x) -> {name: probabilities (B, C, h, w)}. They are resized bilinearly to each
    image's original size, then argmax; slices of one volume are scored together, in 3-D. A summary
    holds the means over foreground classes of the means over volumes (None where no volume defines
    them), the parts of it in "classes" and "volumes", and in "empty", per class, in how many volumes
    both masks were empty, the prediction alone ("missed") or the truth alone ("false").
    """
    volumes, empty = {}, {}  # network -> volume -> class -> scores; network -> class -> counts
    for volume, indices in data.volumes(part).items():
        truth = np.stack([data.truth(i) for i in indices])  # (D, H, W)
        labels = {}
        with evaluating(networks):
            for chunk in torch.as_tensor(indices).split(16):
                for name, probs in predict(networks, data.load_images(chunk)).items():
                    probs = F.interpolate(probs, truth.shape[1:], mode="bilinear", align_corners=False)
                    labels.setdefault(name, []).append(probs.argmax(1).to(torch.uint8).cpu())
        truth = truth[0] if len(truth) == 1 else truth
        for name, chunks in labels.items():
            pred = torch.cat(chunks).numpy().reshape(truth.shape)
            for c in range(1, data.classes):
                scores = mask_scores(pred == c, truth == c, distances)
                volumes.setdefault(name, {}).setdefault(volume, {})[str(c)] = scores
                counts = empty.setdefault(name, {}).setdefault(str(c), dict(both=0, missed=0, false=0))
                counts["both"] += scores is None
                counts["missed"] += int(scores is not None and not (pred == c).any())
                counts["false"] += int(scores is not None and not (truth == c).any())
    return {name: summarize(volumes[name], empty[name]) for name in volumes}


def mean_defined(values):
    """Mean of the values that are not None; None if there is none."""
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def summarize(volumes, empty):
    """{volume: {class: scores}} -> per class the mean over volumes, then the mean over classes."""
    scored = [s for by_class in volumes.values() for s in by_class.values() if s]
    metrics = scored[0] if scored else METRICS
    classes = {c: {m: mean_defined(v[c] and v[c][m] for v in volumes.values()) for m in metrics}
               for c in next(iter(volumes.values()))}
    return {**{m: mean_defined(scores[m] for scores in classes.values()) for m in metrics},
            "classes": classes, "empty": empty, "volumes": volumes}


# --- Augmentation: on the device, for a whole batch, with parameters of its own for each image ----


def weak(x, *maps, flip=True):
    """Random flips, rotation (up to 20 degrees) and scale (0.8 to 1.25) of images (B, channels, H, W).

    maps: label maps (B, H, W) of any integer type that get the same geometry, by nearest neighbour; outside is 0.
    Returns the images, or [images, *maps]. The paper-independent view that all methods call weak [ours].
    """
    b = len(x)
    if b == 0:  # mean_teacher.py --supervised has no unlabelled images
        return [x, *maps] if maps else x
    angle = (torch.rand(b, device=x.device) * 2 - 1) * math.radians(20)
    zoom = 1.25 ** (torch.rand(b, device=x.device) * 2 - 1)
    sign = (torch.rand(b, 2, device=x.device) < 0.5) * 2.0 - 1 if flip else torch.ones(b, 2, device=x.device)
    cos, sin, zero = angle.cos() / zoom, angle.sin() / zoom, torch.zeros_like(angle)
    rows = [cos * sign[:, 0], -sin * sign[:, 1], zero, sin * sign[:, 0], cos * sign[:, 1], zero]
    grid = F.affine_grid(torch.stack(rows, 1).view(b, 2, 3), list(x.shape), align_corners=False)
    out = [F.grid_sample(x, grid, align_corners=False)]
    for m in maps:
        out.append(F.grid_sample(m[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0].to(m.dtype))
    return out if maps else out[0]


def strong(x):
    """Random contrast, brightness, gamma, blur and noise of images (B, channels, H, W) in [0, 1]: same shape, [0, 1].

    No geometry, so label maps stay aligned. Strengths are drawn for each image [ours].
    """
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

    x_l: torch.Tensor  # labelled images (B_l, channels, H, W), floats in [0, 1]
    y_l: torch.Tensor  # their masks (B_l, H, W), long
    x_u: torch.Tensor  # unlabelled images (B_u, channels, H, W)
    map_u: torch.Tensor  # a uint8 map for each unlabelled image (B_u, H, W), or None
    index_u: torch.Tensor  # which images they are (B_u,), on the CPU


class Shuffled:
    """Endless stream of image numbers: all once in random order, then all again in another order.

    It draws from a generator of its own and is part of every checkpoint, so a resumed run sees the same batches,
    and all methods see the same labelled images in the same order.
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
    """A dataset: the split, decoded images at --size, masks where training may see them, and batches.

    names[i] is image i; units[i] its patient (or the image itself), volumes_of[i] its volume. split is
    {"labeled": units, "unlabeled": units, "val": units, "test": units}. After decode(), images is
    (N, channels, S, S) uint8, and channels and classes are known. Only labelled, validation and test
    masks are opened; read_mask(i) is for what says that it reads hidden ones.
    """

    def __init__(self, args):
        self.args = args
        find_files(self, args)  # in the tools below: names, checks, split
        self.labeled = Shuffled(self.indices("labeled"), args.seed)
        # With every unit labelled, the unlabelled stream is the labelled images without their masks.
        self.unlabeled = Shuffled(self.indices("unlabeled") or self.indices("labeled"), args.seed + 1)

    def indices(self, part):
        """Image numbers of a part of the split. A labelled patient's slices without a mask are unlabelled."""
        units = set(self.split[part])
        if part == "unlabeled":
            units_l = set(self.split["labeled"])
            return [i for i, u in enumerate(self.units) if u in units or (u in units_l and not self.has_mask[i])]
        return [i for i, u in enumerate(self.units) if u in units and self.has_mask[i]]

    def decode(self):
        """Decode images and visible masks, or find them in the cache. A Run does this once it may start."""
        decode(self)

    def volumes(self, part):
        """{volume: image numbers in slice order} of one part of the split."""
        volumes = {}
        for i in self.indices(part):
            volumes.setdefault(self.volumes_of[i], []).append(i)
        return volumes

    def load_images(self, indices):
        """Image numbers (B,) -> floats in [0, 1] (B, channels, S, S) on the device, channels-last."""
        x = torch.from_numpy(self.images[np.asarray(indices)]).to(self.args.device)
        return (x / 255).contiguous(memory_format=torch.channels_last)

    def load_labels(self, indices):
        """Numbers of images with visible masks (B,) -> masks (B, S, S), long, on the device."""
        rows = [self.label_rows[int(i)] for i in indices]
        return torch.from_numpy(self.labels[rows]).to(self.args.device).long()

    def batch(self, maps=None):
        """The next Batch. maps: optional uint8 array (N, S, S), a map for each image of the dataset."""
        index_l, index_u = self.labeled.take(self.args.batch_size), self.unlabeled.take(self.args.unlabeled_batch)
        x_l, y_l = weak(self.load_images(index_l), self.load_labels(index_l), flip=self.args.flip)
        if maps is None:
            return Batch(x_l, y_l, weak(self.load_images(index_u), flip=self.args.flip), None, index_u)
        map_u = torch.from_numpy(maps[index_u.numpy()]).to(self.args.device)
        x_u, map_u = weak(self.load_images(index_u), map_u, flip=self.args.flip)
        return Batch(x_l, y_l, x_u, map_u, index_u)


# ##################################################################################################
# Tools: no need to read these to understand a method
# ##################################################################################################


def stop(message, status=2):
    """End the program with a message for its user: what was found, what was expected, what to do."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


# --- Command line ---------------------------------------------------------------------------------

FREE = ("data", "out", "resume", "device", "val_every", "cache")  # these do not name a run's folder


def number(kind, minimum):
    """An argparse type: a finite number of this kind, not below the minimum."""
    def convert(text):
        if not minimum <= kind(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} was given, a number of at least {minimum} is needed")
        return kind(text)
    convert.__name__ = "number"
    return convert


def parser(doc):
    """An ArgumentParser with the options that all methods share; a method adds to its group `own`."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.own = p.add_argument_group("options of this paper")
    add = p.add_argument_group("shared options").add_argument
    add("--data", default="phantom", metavar="PATH", help="dataset folder (default: a built-in phantom)")
    add("--labeled", metavar="SPEC", help="10%% of the training units with masks, 7 units, or a file of ids")
    add("--size", type=number(int, 1), help="side that images are resized to (256; phantom: 64)")
    add("--width", type=number(int, 1), help="channels of the U-Net's first stage (32; phantom: 16)")
    add("--classes", type=number(int, 2), help="classes with background (default: seen from the masks)")
    add("--steps", type=number(int, 1), help="optimizer steps (10000; phantom: 800)")
    add("--batch-size", type=number(int, 1), default=8, help="labelled images a step (%(default)s)")
    add("--unlabeled-batch", type=number(int, 1), default=8, help="unlabelled images a step (%(default)s)")
    add("--lr", type=number(float, 0), default=1e-3, help="AdamW's first learning rate (%(default)s)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True,
        help="mirror images at random; --no-flip where left and right are different classes")
    add("--seed", type=number(int, 0), default=0, help="training randomness (%(default)s)")
    add("--split-seed", type=number(int, 0), default=0, help="which units are labelled (%(default)s)")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu) or a name such as cuda:1")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="auto: bf16 where the GPU has it, fp16 with a gradient scaler on older GPUs, else fp32")
    add("--out", default="runs", metavar="FOLDER", help="where run folders go (%(default)s)")
    add("--resume", action="store_true", help="continue the run that these options name")
    add("--val-every", type=number(int, 1), help="steps between validations (a tenth of --steps)")
    add("--cache", default=os.path.join(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ssl-seg"),
        metavar="FOLDER", help="where decoded images are kept (%(default)s)")
    return p


def parse(parser, argv=None):
    """Parse the options and fill in every default; args.options holds those that name the folder."""
    args = parser.parse_args(argv)
    given = {k: v for k, v in vars(args).items() if v != parser.get_default(k) and k not in FREE}
    phantom = args.data == "phantom"
    args.options = {k: v for k, v in given.items() if k not in ("labeled", "seed", "supervised")}
    args.size, args.width = args.size or (64 if phantom else 256), args.width or (16 if phantom else 32)
    args.steps = args.steps or (800 if phantom else 10000)
    args.val_every = args.val_every or max(1, args.steps // 10)
    if args.size % 2**DEPTH:
        low = args.size // 2**DEPTH * 2**DEPTH
        stop(f"--size {args.size}: the U-Net halves the image {DEPTH} times, so the size must be a multiple "
             f"of {2**DEPTH}. Try {f'{low} or ' if low else ''}{low + 2**DEPTH}.")
    if args.device == "auto":
        mps = torch.backends.mps.is_available()
        args.device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        stop(f"--device {args.device} cannot be used: {str(error).splitlines()[0]} Expected cpu, cuda, "
             "cuda:1, mps or auto, on a machine that has it.")
    cuda = torch.device(args.device).type == "cuda"
    if args.precision == "fp16" and not cuda:
        stop(f"--precision fp16 needs a CUDA GPU, the device is {args.device}. Use --precision fp32.")
    if args.precision == "auto":
        new = cuda and torch.cuda.get_device_capability(args.device)[0] >= 8
        args.precision = "bf16" if new else "fp16" if cuda else "fp32"
    return args


# --- Files, checks, split -------------------------------------------------------------------------

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".npy")
MASK_SUFFIX = re.compile("_(mask|segmentation|anno|label)$")
SLICE = re.compile(r"^(?P<volume>(?P<patient>.+?)(_frame\d+)?)_slice_?(?P<slice>\d+)$")
MAX_CLASS = 31  # a larger number in a mask is no class number (but 255 in a binary mask is)


class Bad(Exception):
    """One file that cannot be used, and why."""


def parse_name(name):
    """Image name -> (unit, volume, slice number); a name that is not a slice's is its own unit."""
    match = SLICE.match(name)
    return (match["patient"], match["volume"], int(match["slice"])) if match else (name, name, -1)


def listing(folder):
    """{name: path} of the files with a known extension; two files of one name end the program."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
            name = MASK_SUFFIX.sub("", path.stem) if folder.name == "masks" else path.stem
            if name in found:
                stop(f"{folder} has two files for {name}: {found[name].name} and {path.name}. Keep one.")
            found[name] = path
    return found


def scan(root):
    """A dataset folder -> ({name: image path} in the order of volumes and slices, {name: mask path})."""
    layout = "Expected PATH/images/NAME.png and PATH/masks/NAME.png; see README, Your own data."
    if not root.is_dir():
        stop(f"--data {root}: there is no such folder. {layout}")
    images, masks = listing(root / "images"), listing(root / "masks")
    if not images:
        found = sorted(p.name for p in (root / "images" if (root / "images").is_dir() else root).iterdir())
        stop(f"no images in {root / 'images'} (found: {', '.join(found[:5]) or 'nothing'}). {layout} "
             f"Extensions: {' '.join(EXTENSIONS)}.")
    orphans = [masks[name].name for name in masks if name not in images]
    if orphans:
        stop(f"{len(orphans)} masks have no image of their name, such as {', '.join(orphans[:3])}; images "
             f"are called {', '.join(list(images)[:3])}, ... Rename or remove those masks. {layout}")
    order = sorted(images, key=lambda name: (*parse_name(name)[1:], name))
    return {name: images[name] for name in order}, masks


def read_ids(path, names):
    """A text file of ids (patients, volumes or image names, one a line) -> its units, sorted."""
    unit_of = {key: parse_name(name)[0] for name in names for key in (name, *parse_name(name)[:2])}
    try:
        ids = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{path} cannot be read as a text file of ids, one a line: {error}")
    unknown = [i for i in ids if i not in unit_of]
    if unknown or not ids:
        stop(f"{path}: {len(unknown)} of {len(ids)} ids are not in the dataset: {unknown[:3]}. Expected at "
             f"least one id, patients or image names such as {', '.join(sorted(set(unit_of.values()))[:3])}.")
    return sorted({unit_of[i] for i in ids})


def choose_labeled(spec, units, names):
    """--labeled -> labelled units. units: the training units with masks, in a seeded order.

    A share or a number takes the order's first units, so 5% lies inside 10% inside 20%.
    """
    if Path(spec).is_file():
        chosen = read_ids(spec, names)
        outside = [unit for unit in chosen if unit not in units]
        if outside:
            stop(f"--labeled {spec}: {', '.join(outside[:3])} cannot be labelled: not a training unit with "
                 f"masks. Expected some of {', '.join(sorted(units)[:3])}, ...")
        return chosen
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", spec)
    value, percent = (float(match[1]), match[2]) if match else (0, "")
    if not percent and value % 1:
        stop(f"--labeled {spec}: did you mean {value * 100:g}%? Give a share (10%) or a number of units (7).")
    if value <= 0 or value > (100 if percent else len(units)):
        stop(f"--labeled {spec}: expected a share above 0% and up to 100%, a number of units from 1 to "
             f"{len(units)} (the training units with masks), or a text file of ids.")
    return sorted(units[:max(1, math.floor(len(units) * value / 100 + 0.5)) if percent else int(value)])


def make_split(names, masked, lists, labeled, split_seed):
    """{"labeled": units, "unlabeled": units, "val": units, "test": units}, each sorted.

    names: all images; masked: those with masks; lists: units of "train", "val", "test" as far as given.
    Depends on the sorted ids and split_seed alone, not on the order of files.
    """
    units = sorted({parse_name(name)[0] for name in names})
    with_mask = {parse_name(name)[0] for name in masked}
    if len(units) == 1:
        stop(f"all {len(names)} images belong to one patient, {units[0]}: nothing is left to validate and "
             "test on. NAME_slice_03 means a slice of patient NAME; rename what is a separate image.")
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        both = sorted(set(lists.get(a, ())) & set(lists.get(b, ())))
        if both:
            stop(f"{', '.join(both[:3])}: in {a}.txt and in {b}.txt. A patient may be in one list only.")
    listed = {unit for part in lists.values() for unit in part}
    order = [units[i] for i in np.random.default_rng(split_seed).permutation(len(units))]
    free = [unit for unit in order if unit in with_mask and unit not in listed]
    split = {}
    for part, share in (("val", 0.1), ("test", 0.2)):
        count = max(1, round(share * len(with_mask)))
        split[part] = sorted(lists.get(part) or free[:count])
        free = free if part in lists else free[count:]
    train = set(lists.get("train", free)) | {u for u in units if u not in with_mask and u not in listed}
    train_masked = [unit for unit in order if unit in train and unit in with_mask]
    for part, found in (("validation", split["val"]), ("test", split["test"]), ("training", train_masked)):
        if not with_mask & set(found):
            stop(f"no {part} units with masks are left ({len(with_mask)} units have masks, {len(listed)} "
                 "units are in lists). Expected at least one each to train, validate and test on: annotate "
                 "more images, or change train.txt, val.txt and test.txt.")
    if labeled is None and len(with_mask) == len(units):
        stop("--labeled is needed, since all images have masks: a share such as 10%, a number of units such "
             "as 7, or a text file of ids.")
    split["labeled"] = choose_labeled(labeled or "100%", train_masked, names)
    split["unlabeled"] = sorted(train - set(split["labeled"]))
    return split


def find_files(data, args):
    """Fill in a Data object's names, files and split, without opening an image."""
    if args.data == "phantom":
        data.name, args.labeled = "phantom", args.labeled or "10%"
        names, *data.phantom, lists = phantom(args.size)
        masked = names
    else:
        root = Path(args.data)
        paths, masks = scan(root)
        data.name, names, masked = root.resolve().name, list(paths), masks
        data.image_files, data.mask_files = list(paths.values()), [masks.get(name) for name in names]
        lists = {part: read_ids(root / f"{part}.txt", names) for part in ("train", "val", "test")
                 if (root / f"{part}.txt").is_file()}
    data.names, data.has_mask = names, [name in masked for name in names]
    data.units, data.volumes_of = ([parse_name(name)[k] for name in names] for k in (0, 1))
    data.split = make_split(names, masked, lists, args.labeled, args.split_seed)
    args.labeled = args.labeled or "100%"
    data.split_hash = hashlib.sha256(json.dumps(data.split, sort_keys=True).encode()).hexdigest()[:8]


# --- Decoding, once -------------------------------------------------------------------------------


def read_pixels(path, mask=False):
    """Pixels as stored, (H, W) or in colour (H, W, 3). Raises Bad. Palette images: their colours; as a
    mask, their indices (unless the palette is black and white)."""
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, allow_pickle=False)
            array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
        else:
            with Image.open(path) as image:
                if getattr(image, "n_frames", 1) > 1:
                    raise Bad(f"{path.name}: {image.n_frames} pages in one file; expected one file a slice")
                grey = image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16")
                array = np.asarray(image if grey else image.convert("L" if image.mode == "LA" else "RGB"))
                if mask and image.mode == "P" and (np.ptp(array, 2).any() or not np.isin(array, (0, 255)).all()):
                    array = np.asarray(image)
    except Bad:
        raise
    except Exception as error:  # Pillow and NumPy raise a dozen types on damaged files
        raise Bad(f"{path.name}: damaged, truncated or no image ({type(error).__name__}: {error})") from None
    if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise Bad(f"{path.name}: an array of shape {array.shape}; expected (H, W), (H, W, 3) or (H, W, 4)")
    if array.dtype.kind not in "buif" or not np.isfinite(array).all():
        raise Bad(f"{path.name}: values of type {array.dtype}, or not finite; expected finite numbers")
    array = array[..., :3] if array.ndim == 3 else array
    return array.astype(np.uint8) * 255 if array.dtype == bool else array


def read_volume(paths, channels, size):
    """The images of one volume -> (N, channels, size, size) uint8, and their original sizes.

    8-bit images stay as they are; others are scaled from the volume's 0.5 to 99.5 percentiles.
    """
    arrays = [read_pixels(path) for path in paths]
    if any(array.dtype != np.uint8 for array in arrays):
        low, high = np.percentile(np.concatenate([a.ravel() for a in arrays]).astype(float), [0.5, 99.5])
        arrays = [((a - low) / max(high - low, 1e-12) * 255).clip(0, 255).astype(np.uint8) for a in arrays]
    out = np.empty((len(paths), channels, size, size), np.uint8)
    for i, array in enumerate(arrays):
        if array.ndim == 3 and channels == 1:
            raise Bad(f"{paths[i].name}: in colour, but the dataset's first image is grey; save all alike")
        image = Image.fromarray(array).convert("L" if channels == 1 else "RGB")
        pixels = np.asarray(image.resize((size, size), Image.BILINEAR))
        out[i] = pixels if channels == 1 else pixels.transpose(2, 0, 1)
    return out, [array.shape[:2] for array in arrays]


def read_mask(path):
    """A mask file -> class numbers (H, W) uint8, and "binary" (0 and 255), "classes" or "empty".

    Binary masks may be noisy from JPEG: they are cut above 127. Raises Bad with the values found.
    """
    array, lossy = read_pixels(path, mask=True), path.suffix.lower() in (".jpg", ".jpeg")
    if array.ndim == 3 and np.ptp(array, 2).any() and not lossy:
        raise Bad(f"{path.name}: a mask in colours; expected one class number a pixel, or 0 and 255")
    array = array[..., 0] if array.ndim == 3 else array
    values = np.unique(array)
    near_ends = (values <= MAX_CLASS) | (values >= 255 - MAX_CLASS)
    if lossy or (MAX_CLASS < values[-1] <= 255 and near_ends.all()):
        return (array > 127).astype(np.uint8), "binary" if values[-1] > 127 else "empty"
    if values[0] < 0 or values[-1] > MAX_CLASS or (values % 1).any():
        shown = ", ".join(f"{v:g}" for v in values[:8]) + (", ..." if len(values) > 8 else "")
        raise Bad(f"{path.name}: mask values {shown}; expected class numbers 0, 1, 2, ... up to "
                  f"{MAX_CLASS}, or 0 and 255")
    return array.astype(np.uint8), "classes" if values[-1] else "empty"


def read_each(items, read, what):
    """Yield read(item) with a progress bar. All bad files are collected; then they end the program."""
    bad = []
    for item in tqdm(items, f"decoding {what}", leave=False, disable=None):
        try:
            yield read(item)
        except Bad as error:
            bad.append(str(error))
    if bad:
        stop(f"{len(bad)} bad files among the {what}; mend or remove them:\n  " + "\n  ".join(bad[:10])
             + ("\n  ..." if len(bad) > 10 else ""))


def cached(root, key, build):
    """The folder root/<hash of key>, filled once by build(folder), aside and then renamed."""
    folder = Path(root) / hashlib.sha256(repr(("v1", key)).encode()).hexdigest()[:20]
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="building-", dir=root, ignore_cleanup_errors=True) as aside:
                build(Path(aside))
                try:
                    os.rename(aside, folder)
                except OSError:  # another run was faster, and its folder is as good
                    if not folder.exists():
                        raise
    except OSError as error:
        stop(f"the cache of decoded images, {root}, cannot be written ({error}). Choose another folder "
             "with --cache FOLDER, or free some space.")
    return folder


def cache_files(data, visible):
    """Decode a folder's images and visible masks into the cache -> memory maps: images, their original
    sizes, labels (len(visible), S, S), and the visible masks' original pixels in one flat array."""
    size, cache = data.args.size, data.args.cache

    def fingerprint(files):
        return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]

    def build_images(folder):
        volumes = {}
        for path, volume in zip(data.image_files, data.volumes_of, strict=True):
            volumes.setdefault(volume, []).append(path)
        channels = 3 if any(a.ndim == 3 for a in read_each(data.image_files[:1], read_pixels, "images")) else 1
        sizes = []
        with open(folder / "images.u8", "wb") as file:
            for pixels, shapes in read_each(list(volumes.values()),
                                            lambda files: read_volume(files, channels, size), "images"):
                file.write(pixels.tobytes())
                sizes += shapes
        (folder / "meta.json").write_text(json.dumps({"channels": channels, "sizes": sizes}))

    def build_masks(folder):
        def read(i):
            mask, kind = read_mask(data.mask_files[i])
            if mask.shape != sizes[i]:
                raise Bad(f"{data.mask_files[i].name}: {mask.shape[0]} x {mask.shape[1]} pixels, but its "
                          f"image has {sizes[i][0]} x {sizes[i][1]}")
            seen.setdefault(kind, data.mask_files[i].name)
            return mask

        seen = {}
        with open(folder / "labels.u8", "wb") as small, open(folder / "truth.u8", "wb") as full:
            for mask in read_each(visible, read, "masks"):
                small.write(np.asarray(Image.fromarray(mask).resize((size, size), Image.NEAREST)).tobytes())
                full.write(mask.tobytes())
        if "binary" in seen and "classes" in seen:
            stop(f"some masks are binary 0/255 ({seen['binary']}), others hold class numbers "
                 f"({seen['classes']}). Write all of them in one of the two ways.")

    folder = cached(cache, ("images", size, data.names, fingerprint(data.image_files)), build_images)
    meta = json.loads((folder / "meta.json").read_text())
    sizes = [tuple(shape) for shape in meta["sizes"]]
    shape = (len(sizes), meta["channels"], size, size)
    images = np.memmap(folder / "images.u8", np.uint8, "r", shape=shape)
    files = [data.mask_files[i] for i in visible]
    folder = cached(cache, ("masks", size, [sizes[i] for i in visible], fingerprint(files)), build_masks)
    labels = np.memmap(folder / "labels.u8", np.uint8, "r", shape=(len(visible), size, size))
    return images, sizes, labels, np.memmap(folder / "truth.u8", np.uint8, "r")


def decode(data):
    """Fill in a Data object's pixels and number of classes. Opens no mask but the visible ones."""
    visible = [i for part in ("labeled", "val", "test") for i in data.indices(part)]
    row = data.label_rows = {i: r for r, i in enumerate(visible)}
    if data.name == "phantom" and data.args.data == "phantom":
        data.images, masks = data.phantom
        sizes, data.labels = [masks.shape[1:]] * len(masks), masks[visible]
        truth, data.read_mask = data.labels.ravel(), masks.__getitem__
    else:
        data.images, sizes, data.labels, truth = cache_files(data, visible)
        data.read_mask = lambda i: read_mask(data.mask_files[i])[0]
    ends = np.cumsum([0] + [math.prod(sizes[i]) for i in visible])
    data.truth = lambda i: truth[ends[row[i]]:ends[row[i] + 1]].reshape(sizes[i])
    for volume, indices in [*data.volumes("val").items(), *data.volumes("test").items()]:
        if len({sizes[i] for i in indices}) > 1:
            stop(f"the slices of {volume} differ in size: {sorted({sizes[i] for i in indices})}. Expected one "
                 "size in a volume, since it is scored in 3-D.")
    largest = int(truth.max())
    data.channels, data.classes = data.images.shape[1], data.args.classes or largest + 1
    if largest == 0:
        stop("the labelled, validation and test masks hold background only. Expected 1, 2, ... or 255 in them.")
    if largest >= data.classes:
        stop(f"--classes {data.classes}, but the masks hold class {largest}. Expected at least {largest + 1}.")


def phantom(size, patients=48, seed=0):
    """Cardiac-like slices: names, images (N, 1, size, size) uint8, masks (N, size, size) uint8, lists.

    Classes as in ACDC: 1 right ventricle, 2 myocardium, 3 left ventricle; two frames (relaxed, contracted) of four
    slices a patient. Patients differ in pose, shape, contrast, bias field, texture and in bright distractors.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    names, images, masks = [], [], []

    def texture(scale):
        coarse = Image.fromarray(rng.normal(size=(scale, scale)).astype(np.float32))
        return np.asarray(coarse.resize((size, size), Image.BICUBIC))

    for patient in range(patients):
        cx, cy, turn = *rng.uniform(-0.2, 0.2, 2), rng.uniform(-0.6, 0.6)
        radius, wall, aspect = rng.uniform(0.24, 0.36), rng.uniform(0.09, 0.15), rng.uniform(0.8, 1.25)
        blood, muscle, fat = rng.uniform(0.6, 0.95), rng.uniform(0.25, 0.5), rng.uniform(0.1, 0.8)
        gamma, slope = rng.uniform(0.6, 1.6), rng.normal(size=2) * 0.25
        blobs = [(*rng.uniform(-0.9, 0.9, 2), *rng.uniform(0.08, 0.25, 2), rng.uniform(0.1, 0.95)) for _ in range(7)]
        for frame, squeeze in ((1, 1.0), (2, rng.uniform(0.6, 0.8))):
            for level in range(4):
                r = radius * squeeze * (1 - 0.17 * level)
                u = ((x - cx) * math.cos(turn) + (y - cy) * math.sin(turn)) * aspect
                v = (y - cy) * math.cos(turn) - (x - cx) * math.sin(turn)
                distance = np.hypot(u, v) * (1 + 0.06 * texture(5))
                thick = wall * (1.5 - 0.5 * squeeze)
                mask = np.zeros((size, size), np.uint8)
                right = np.hypot((u + r + thick) / 1.15, v / 1.25) * (1 + 0.06 * texture(5)) < r * (1.0 - 0.1 * level)
                mask[right] = 1
                mask[distance < r + thick] = 2
                mask[distance < r] = 3
                image = fat * 0.35 + 0.08 * texture(7)
                for bx, by, a, b, value in blobs:
                    image = np.where(np.hypot((x - bx) / a, (y - by) / b) < 1, value, image)
                for c, value in ((1, blood * 0.95), (2, muscle), (3, blood)):
                    image = np.where(mask == c, value, image)
                image = image + 0.06 * texture(size // 4) + slope[0] * x + slope[1] * y
                image = np.clip(image, 0.01, 1) ** gamma + rng.normal(size=(size, size)) * 0.05
                names.append(f"p{patient:02d}_frame{frame:02d}_slice_{level:02d}")
                images.append((image.clip(0, 1) * 255).astype(np.uint8)[None])
                masks.append(mask)
    units = sorted({parse_name(name)[0] for name in names})
    lists = {"train": units[:-18], "val": units[-18:-12], "test": units[-12:]}
    return names, np.stack(images), np.stack(masks), lists


# --- Run folder: log, checkpoints, resume, results -------------------------------------------------


def write_aside(path, write):
    """write(temporary path), then rename: whoever reads `path` finds the old or the new file, whole."""
    aside = path.with_name(path.name + ".tmp")
    write(aside)
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


class Run:
    """One training run: device and precision, the loop's steps, log, checkpoints and scores.

    In a method's main: run = Run("name", args, data); networks = run.place(build(...)); run.keep(...);
    for step in run.steps(): ... run.backward, run.update, run.log, run.save; then return run.finish().
    """

    def __init__(self, name, args, data):
        self.name, self.args, self.data = name, args, data
        labeled = Path(args.labeled).stem if Path(args.labeled).is_file() else args.labeled
        start = f"{name}-{labeled}-seed{args.seed}"
        self.title = start + "".join(f"-{k}_{Path(str(v)).stem if os.sep in str(v) else v}"
                                     for k, v in sorted(args.options.items()))
        parent = Path(args.out) / data.name
        taken = [p for p in parent.glob(glob.escape(start) + "*")
                 if re.fullmatch(re.escape(self.title) + r"(-\d+)?", p.name)]
        taken.sort(key=lambda p: int(p.name[len(self.title) + 1:] or 1))
        self.resumed = args.resume and bool(taken)
        if args.resume:
            self._check_resume(taken, sorted(p.name for p in parent.glob(glob.escape(start) + "*")))
        data.decode()
        try:
            self.folder = taken[-1] if self.resumed else self._new_folder(parent, len(taken))
            plain = {k: v for k, v in vars(args).items() if k != "options"} | {"method": name}
            for file, content in (("args.json", plain), ("split.json", {"hash": data.split_hash, **data.split})):
                if not (self.folder / file).exists():
                    write_aside(self.folder / file, lambda p, c=content: p.write_text(json.dumps(c, indent=1)))
        except OSError as error:
            stop(f"--out {args.out} cannot be written ({error}). Choose another folder.")
        torch.manual_seed(args.seed)
        torch.backends.cudnn.benchmark = True
        self.device_type = torch.device(args.device).type
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=args.precision == "fp16")
        self.first_step, self.best, self.sums, self.count, self.interrupted = 0, -1.0, {}, 0, False

    def _check_resume(self, taken, others):
        if not taken and others:
            stop(f"--resume: no run {self.title}; there is {', '.join(others[:3])}. Only --out, --device and "
                 "--val-every may change: repeat the run's other options, or start anew without --resume.")
        if taken and (taken[-1] / "split.json").exists():
            found = json.loads((taken[-1] / "split.json").read_text())["hash"]
            if found != self.data.split_hash:
                stop(f"--resume: {taken[-1]} has split {found}, the dataset now gives {self.data.split_hash}. "
                     "Restore the dataset's files and lists, or start anew without --resume.")

    def _new_folder(self, parent, taken):
        while True:  # another run, started at the same moment, may take the name first
            taken += 1
            folder = parent / (self.title if taken == 1 else f"{self.title}-{taken}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder

    def autocast(self):
        """Context for the networks' forward passes: bf16 or fp16 on GPUs, float32 elsewhere."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[self.args.precision]
        return torch.autocast(self.device_type, dtype=dtype, enabled=dtype is not None)

    def place(self, networks):
        """Move {name: network} to the device, in the channels-last layout (twice as fast on CPUs)."""
        device = self.args.device
        return {k: net.to(device, memory_format=torch.channels_last) for k, net in networks.items()}

    def keep(self, networks, optimizers, predict, pictures):
        """What checkpoints hold and evaluation uses; prints what will happen; loads last.pt on --resume.

        predict(networks, x) -> {name: probabilities (B, C, H, W)}, the network that the paper deploys first;
        pictures(networks, x) -> columns of preview.png {title: label maps (B, H, W) long, or heat (B, H, W)
        float, or images (B, channels, H, W), or (images, label maps)}.
        """
        self.networks, self.optimizers, self.predict, self.pictures = networks, optimizers, predict, pictures
        data, args = self.data, self.args
        units = ", ".join(f"{k} {len(u)} ({len(data.indices(k))} images)" for k, u in data.split.items())
        sizes = ", ".join(f"{k} {sum(p.numel() for p in n.parameters()) / 1e6:.2f} M" for k, n in networks.items())
        print(f"{self.name} on {data.name}: {data.channels} x {args.size} x {args.size} pixels, {data.classes} "
              f"classes; {args.device}, {args.precision}, {torch.get_num_threads()} CPU threads\n"
              f"units: {units}; split {data.split_hash}\n"
              f"labeled: {' '.join(data.split['labeled'][:12])}{' ...' * (len(data.split['labeled']) > 12)}\n"
              f"parameters: {sizes}\nrun folder: {self.folder}")
        last = self.folder / "last.pt"
        if self.resumed and last.exists():
            state = torch.load(last, map_location="cpu", weights_only=True)
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
            print(f"--resume: continuing at step {self.first_step}" if self.first_step
                  else "--resume: no checkpoint yet, starting at step 0")
        log = self.folder / "log.csv"
        if log.exists():  # cut rows after the checkpoint, a half-written one included
            header, *rows = log.read_text().splitlines(keepends=True) or [""]
            rows = [r for r in rows if r.endswith("\n") and int(r.split(",")[0]) <= self.first_step]
            write_aside(log, lambda p: p.write_text(header + "".join(rows) if rows else ""))

    def steps(self):
        """The step numbers, 0 to --steps - 1, with a progress bar. Ctrl-C ends the run after its step."""
        def interrupt(*_):
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        previous, first, total = {}, self.first_step, self.args.steps
        with contextlib.suppress(ValueError):  # not in the main thread: leave signals alone
            previous = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tqdm(total=total, initial=first, desc=self.name, disable=None) as self.bar:
                for step in range(first, total):
                    if step == first + 2:
                        start = time.perf_counter()
                    elif step == first + 10 and (time.perf_counter() - start) / 8 * (total - step) > 3600:
                        hours = (time.perf_counter() - start) / 8 * (total - step) / 3600
                        tqdm.write(f"This run will take about {hours:.1f} hours on {self.args.device}. Minutes: "
                                   "--size 96 --width 16 --steps 1500, or a machine with a GPU.", sys.stdout)
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
        """Add a step's loss terms and diagnostics, scalar tensors or numbers. No step waits for the device."""
        for k, v in terms.items():
            v = v.detach().double() if torch.is_tensor(v) and self.device_type != "mps" else v
            self.sums[k] = self.sums[k] + v if k in self.sums else torch.as_tensor(v).clone()
        self.count += 1

    def save(self, step):
        """End of a step. Every 20 steps a row of the log; every --val-every steps also a validation and
        checkpoints. A term that is not finite ends the run with its name; nothing is saved after that."""
        done, args = step + 1, self.args
        validate = done % args.val_every == 0 or done == args.steps
        if not (done % 20 == 0 or validate or self.interrupted):
            return
        row = {k: v.item() / self.count for k, v in self.sums.items()}
        for k, v in row.items():
            if not math.isfinite(v):
                stop(f"{k} is {v} between steps {done - self.count} and {done}. Nothing is saved after that; "
                     f"checkpoints are in {self.folder}. Lower --lr or the unsupervised weight.", status=1)
        self.bar.set_postfix({k: f"{row[k]:.3f}" for k in ("loss", "lam") if k in row}, best=f"{self.best:.1f}")
        row["val_dice"] = ""
        if validate:
            scores = evaluate(self.predict, self.networks, self.data, "val", distances=False)
            row["val_dice"] = next(iter(scores.values()))["dice"] or 0.0
            tqdm.write(f"step {done}/{args.steps}  loss {row['loss']:.3f}  validation Dice " + ", ".join(
                f"{k} {s['dice'] or 0:.1f}" for k, s in scores.items()), sys.stdout)
        if validate or done % 20 == 0:
            log = self.folder / "log.csv"
            new = not log.exists() or not log.stat().st_size
            with open(log, "a") as file:
                file.write(",".join(["step", *row]) + "\n" if new else "")
                file.write(",".join(map(str, [done, *row.values()])) + "\n")
            self.sums, self.count = {}, 0
        state = {"method": self.name, "step": done, "best": max(self.best, row["val_dice"] or -1.0),
                 "channels": self.data.channels, "classes": self.data.classes, "size": args.size,
                 "width": args.width, "scaling": "8 bit / 255, others by a volume's 0.5 to 99.5 percentiles",
                 "networks": {k: net.state_dict() for k, net in self.networks.items()}}
        if state["best"] > self.best:
            write_aside(self.folder / "best.pt", lambda p: torch.save(state, p))
        self.best = state["best"]
        if validate or self.interrupted:
            cuda = self.device_type == "cuda"
            state |= {"cuda_rng": torch.cuda.get_rng_state(args.device)} if cuda else {}
            state |= {"optimizers": [o.state_dict() for o in self.optimizers], "rng": torch.get_rng_state(),
                      "scaler": self.scaler.state_dict(), "labeled": self.data.labeled.state_dict(),
                      "unlabeled": self.data.unlabeled.state_dict(), "sums": self.sums, "count": self.count}
            write_aside(self.folder / "last.pt", lambda p: torch.save(state, p))
        if self.interrupted:
            self.bar.close()
            command = " ".join(shlex.quote(word) for word in sys.argv if word != "--resume")
            print(f"stopped; saved at step {done}. To continue: python {command} --resume")
            sys.exit(130)

    def finish(self):
        """Score the test units, once: every network, last and best. Writes results.json and preview.png,
        prints the table, returns what results.json holds."""
        data, table = self.data, {}
        save_preview(self)
        best = torch.load(self.folder / "best.pt", map_location="cpu", weights_only=True)
        last = {k: copy.deepcopy(net.state_dict()) for k, net in self.networks.items()}
        for which, states in (("best", best["networks"]), ("last", last)):
            for k, network in self.networks.items():
                network.load_state_dict(states[k])
            for k, scores in evaluate(self.predict, self.networks, data, "test").items():
                table.setdefault(k, {})[which] = scores
        name, head = next((k, v["last"]) for k, v in table.items())
        headline = {"network": name, **{m: head[m] for m in METRICS}}
        results = {"method": self.name, "dataset": data.name, "labeled": self.args.labeled,
                   "seed": self.args.seed, "steps": self.args.steps, "split": data.split_hash,
                   "headline": headline, "best_step": best["step"], "networks": table}
        write_aside(self.folder / "results.json", lambda p: p.write_text(json.dumps(results, indent=1)))
        print(f"\nTest: {len(data.volumes('test'))} volumes of {len(data.split['test'])} units\n"
              f"{'network, checkpoint':34}{'Dice %':>9}{'Jaccard %':>11}{'HD95 px':>9}{'ASD px':>9}")
        for k, v in table.items():
            for which, label in (("last", "last"), ("best", f"best on validation ({best['step']})")):
                cells = [f"{v[which][m]:.2f}" if v[which][m] is not None else "n/a" for m in METRICS]
                print(f"{k + ', ' + label:34}{cells[0]:>9}{cells[1]:>11}{cells[2]:>9}{cells[3]:>9}"
                      + "  <- headline" * (k == name and which == "last"))
        both, missed, false = (sum(c[key] for c in head["empty"].values()) for key in ("both", "missed", "false"))
        dice = ", ".join(f"{c}: {s['dice'] or 0:.1f}" for c, s in head["classes"].items() if s["dice"] is not None)
        print(f"{name}, last: Dice per class {dice}; {both} class volumes empty in prediction and truth (not "
              f"scored), {missed} missed, {false} false\nresults.json, preview.png, log.csv, last.pt, best.pt are "
              f"in {self.folder}")
        return results


# --- Pictures and commands -------------------------------------------------------------------------

COLORS = ["#e6194b", "#3cb44b", "#4363d8", "#ffe119", "#f58231", "#911eb4", "#46f0f0", "#f032e6"]


def overlay(image, labels):
    """Image (channels, H, W) in [0, 1] with a label map (H, W) drawn over it -> (3, H, W) uint8."""
    image, classes = (image.expand(3, -1, -1) * 255).byte(), range(1, max(2, int(labels.max()) + 1))
    masks = torch.stack([labels == c for c in classes])
    return draw_segmentation_masks(image, masks, 0.5, [COLORS[(c - 1) % len(COLORS)] for c in classes])


def save_sheet(path, columns):
    """Titles over a grid of pictures. columns: {title: list of (3, H, W) uint8}, all of one length."""
    tiles = [F.interpolate(tile[None], (160, 160))[0] for row in zip(*columns.values(), strict=True) for tile in row]
    grid = make_grid(tiles, nrow=len(columns), pad_value=255)
    sheet = Image.new("RGB", (grid.shape[2], grid.shape[1] + 20), "white")
    sheet.paste(tvf.to_pil_image(grid), (0, 20))
    for i, title in enumerate(columns):
        ImageDraw.Draw(sheet).text((4 + i * 162, 3), title, "black", ImageFont.load_default(13))
    write_aside(Path(path), lambda p: sheet.save(p, "PNG"))


def save_preview(run):
    """preview.png: image, truth, each network's labels and the paper's own columns, for four validation
    volumes (their middle slices)."""
    volumes = list(run.data.volumes("val").values())
    chosen = [v[len(v) // 2] for v in volumes[::max(1, len(volumes) // 4)]][:4]
    x = run.data.load_images(chosen)
    columns = {"image": x, "truth": run.data.load_labels(chosen)}
    with evaluating(run.networks):
        columns |= {k: probs.argmax(1) for k, probs in run.predict(run.networks, x).items()}
        columns |= run.pictures(run.networks, x)
    sheet = {}
    for title, column in columns.items():
        images, labels = column if isinstance(column, tuple) else (x, column)
        if labels.dim() == 3 and not labels.is_floating_point():
            sheet[title] = [overlay(i, m) for i, m in zip(images.cpu(), labels.cpu(), strict=True)]
        else:  # images, or heat between 0 and its largest value
            heat = labels if labels.dim() == 4 else (labels / labels.amax().clamp_min(1e-8))[:, None]
            sheet[title] = list((heat.cpu().expand(-1, 3, -1, -1) * 255).byte())
    save_sheet(run.folder / "preview.png", sheet)


def check(args):
    """The data doctor: everything about a dataset that a run depends on. Reads hidden masks too."""
    data = Data(args)
    data.decode()
    with_mask = [i for i, has in enumerate(data.has_mask) if has]
    counts = np.zeros(256, int)
    for mask in read_each(with_mask, data.read_mask, "masks"):
        counts += np.bincount(mask.ravel(), minlength=256)
    sample = data.images[::max(1, len(data.names) // 100)]
    print(f"{data.name}: {len(data.names)} images, {len(with_mask)} with masks, {len(set(data.units))} units "
          f"(patients, or single images), {len(set(data.volumes_of))} volumes")
    for i in sorted({0, len(data.names) // 2, len(data.names) - 1}):
        print(f"  {data.names[i]}: unit {data.units[i]}, volume {data.volumes_of[i]}")
    print(f"channels: {data.channels}; intensities {sample.min()} to {sample.max()}, mean {sample.mean():.0f} "
          f"of 255\nclasses: " + ", ".join(f"{c} ({n / counts.sum():.2%} of pixels)" for c, n in
                                           enumerate(counts) if n))
    for part, units in data.split.items():
        print(f"{part}: {len(units)} units, {len(data.indices(part))} images: {' '.join(units[:5])}")
    chosen = data.indices("labeled")[::max(1, len(data.indices("labeled")) // 6)][:6]
    x, y = data.load_images(chosen).cpu(), data.load_labels(chosen).cpu()
    folder = Path(args.out) / data.name
    folder.mkdir(parents=True, exist_ok=True)
    save_sheet(folder / "check.png", {"image": [overlay(i, 0 * m) for i, m in zip(x, y, strict=True)],
                                      "mask": [overlay(i, m) for i, m in zip(x, y, strict=True)]})
    print(f"no problem found; look at {folder / 'check.png'}")


def write_phantom(args):
    """Write the phantom as a dataset folder."""
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


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["check"]:
        args = parse(parser("Look at a dataset: counts, sizes, values, patients, split."), argv[1:])
        args.labeled = args.labeled or "10%"
        check(args)
    elif argv[:1] == ["phantom"]:
        p = argparse.ArgumentParser(prog="common.py phantom", description=write_phantom.__doc__)
        p.add_argument("--out", type=Path, required=True, metavar="FOLDER")
        p.add_argument("--size", type=number(int, 16), default=64)
        write_phantom(p.parse_args(argv[1:]))
    else:
        print(__doc__)
        sys.exit(0 if argv in ([], ["-h"], ["--help"]) else 2)


if __name__ == "__main__":
    main()
