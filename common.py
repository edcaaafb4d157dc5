"""What the six method files share: the U-Net, shared formulas, metrics, batches and augmentation.

Read the first part, down to the line "Tools". The rest is plumbing (command line, files, run folders) that no
paper is about. `common.py` is a command too:

    python common.py check --data PATH       look at a dataset before training on it
    python common.py phantom --out FOLDER    write the built-in phantom as files, to see the layout

Shapes: B images, C classes, H x W pixels. Images are floats in [0, 1], label maps are integers.
"""
import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import re
import shutil
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

# ---------------------------------------------------------------------------------------------------
# U-Net (Ronneberger et al., MICCAI 2015, 1505.04597), with BatchNorm and padded convolutions
# ---------------------------------------------------------------------------------------------------

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
        return self.head(self.decoder(self.encoder(x))[-1]).float()


# ---------------------------------------------------------------------------------------------------
# Shared formulas
# ---------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------
# Metrics: equal to medpy's dc, jc, hd95 and asd, with one rule for empty masks
# ---------------------------------------------------------------------------------------------------


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


@torch.no_grad()
def evaluate(predict, networks, data, part, distances=True):
    """Score every network on all volumes of `part` ("val" or "test"): {network: summary}.

    predict(networks, x) -> {name: probabilities (B, C, h, w)}. They are resized bilinearly to each image's original
    size, then argmax; slices of one volume are scored together, in 3-D. A summary holds the means over foreground
    classes of the means over volumes (None where no volume defines them), "classes" and "volumes" the parts of it,
    and per class how many volumes were empty in both, missed (only the prediction empty) or false (only the truth).
    """
    was_training = {name: network.training for name, network in networks.items()}
    for network in networks.values():
        network.eval()
    volumes = {}  # network -> volume -> class -> scores
    empty = {}  # network -> class -> counts
    for volume, indices in data.volumes(part).items():
        truth = np.stack([data.truth(i) for i in indices]).squeeze(0 if len(indices) == 1 else ())  # (D, H, W) or (H, W)
        labels = {}
        for chunk in torch.as_tensor(indices).split(16):
            for name, probs in predict(networks, data.load_images(chunk)).items():
                probs = F.interpolate(probs, truth.shape[-2:], mode="bilinear", align_corners=False)
                labels.setdefault(name, []).append(probs.argmax(1).to(torch.uint8).cpu())
        for name, chunks in labels.items():
            pred = torch.cat(chunks).numpy().reshape(truth.shape)
            for c in range(1, data.classes):
                scores = mask_scores(pred == c, truth == c, distances)
                volumes.setdefault(name, {}).setdefault(volume, {})[str(c)] = scores
                counts = empty.setdefault(name, {}).setdefault(str(c), {"both": 0, "missed": 0, "false": 0})
                if scores is None:
                    counts["both"] += 1
                elif scores["dice"] == 0:
                    counts["missed"] += int(not (pred == c).any())
                    counts["false"] += int(not (truth == c).any())
    for name, network in networks.items():
        network.train(was_training[name])
    return {name: summarize(volumes[name], empty[name]) for name in volumes}


def mean_defined(values):
    """Mean of the values that are not None; None if there is none."""
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def summarize(volumes, empty):
    """{volume: {class: scores}} -> per class the mean over volumes, then the mean over classes."""
    metrics = next((tuple(s) for v in volumes.values() for s in v.values() if s), ("dice", "jaccard", "hd95", "asd"))
    classes = {c: {m: mean_defined(v[c] and v[c][m] for v in volumes.values()) for m in metrics}
               for c in next(iter(volumes.values()))}
    return {**{m: mean_defined(scores[m] for scores in classes.values()) for m in metrics},
            "classes": classes, "empty": empty, "volumes": volumes}


# ---------------------------------------------------------------------------------------------------
# Augmentation: on the device, for a whole batch, with parameters of its own for each image
# ---------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------


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
    """A dataset: decoded images at --size, masks where training may see them, the split, and batches.

    names[i] is image i, units[i] the patient (or the image itself) and volumes_of[i] the volume that it belongs to;
    split is {"labeled": units, "unlabeled": units, "val": units, "test": units}; images (N, channels, S, S) uint8.
    Only labelled, validation and test masks are opened; `read_mask(i)` is for what says that it reads hidden ones.
    """

    def __init__(self, args):
        open_dataset(self, args)  # in the tools below: files, checks, split, cache
        self.device, self.flip = args.device, args.flip
        self.batch_size, self.unlabeled_batch = args.batch_size, args.unlabeled_batch
        self.labeled = Shuffled(self.indices("labeled"), args.seed)
        # With every unit labelled, the unlabelled stream is the labelled images without their masks.
        self.unlabeled = Shuffled(self.indices("unlabeled") or self.indices("labeled"), args.seed + 1)

    def indices(self, part):
        """Image numbers of a part of the split. A labelled patient's slices without a mask are unlabelled."""
        units = set(self.split[part])
        if part == "unlabeled":
            labeled = set(self.split["labeled"])
            return [i for i, u in enumerate(self.units) if u in units or (u in labeled and not self.has_mask[i])]
        return [i for i, u in enumerate(self.units) if u in units and self.has_mask[i]]

    def volumes(self, part):
        """{volume: image numbers in slice order} of one part of the split."""
        volumes = {}
        for i in self.indices(part):
            volumes.setdefault(self.volumes_of[i], []).append(i)
        return volumes

    def load_images(self, indices):
        """Image numbers (B,) -> floats in [0, 1] (B, channels, S, S) on the device, channels-last."""
        x = torch.from_numpy(self.images[np.asarray(indices)]).to(self.device)
        return (x / 255).contiguous(memory_format=torch.channels_last)

    def load_labels(self, indices):
        """Numbers of labelled images (B,) -> masks (B, S, S), long, on the device."""
        rows = [self.label_rows[int(i)] for i in indices]
        return torch.from_numpy(self.labels[rows]).to(self.device).long()

    def batch(self, maps=None):
        """The next Batch. maps: optional uint8 array (N, S, S), a map for each image of the dataset."""
        index_l, index_u = self.labeled.take(self.batch_size), self.unlabeled.take(self.unlabeled_batch)
        x_l, y_l = weak(self.load_images(index_l), self.load_labels(index_l), flip=self.flip)
        if maps is None:
            return Batch(x_l, y_l, weak(self.load_images(index_u), flip=self.flip), None, index_u)
        map_u = torch.from_numpy(maps[index_u.numpy()]).to(self.device)
        x_u, map_u = weak(self.load_images(index_u), map_u, flip=self.flip)
        return Batch(x_l, y_l, x_u, map_u, index_u)


# ###################################################################################################
# Tools: no need to read these to understand a method
# ###################################################################################################


def stop(message, status=2):
    """End the program with a message for the user: what was found, what was expected, what to do."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


# ---------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------

# Options that may differ between a run and its --resume, and that do not name the run's folder
FREE = ("data", "out", "resume", "device", "val_every", "cache")


def at_least(minimum, kind=int):
    """An argparse type: a number of this kind, not below the minimum."""
    def number(text):
        value = kind(text)
        if not minimum <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} was given, a number of at least {minimum} is needed")
        return value
    number.__name__ = "number"
    return number


def parser(doc):
    """The options that all methods share; a method adds its own to the group `parser.own`."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.own = p.add_argument_group("options of this paper")
    add = p.add_argument_group("shared options").add_argument
    add("--data", default="phantom", metavar="PATH", help="dataset folder (default: phantom, a built-in one)")
    add("--labeled", metavar="SPEC", help="10%% of the training units with masks, or 7 units, or a text file of ids")
    add("--size", type=at_least(1), help="side in pixels that images are resized to (256; phantom: 64)")
    add("--width", type=at_least(1), help="channels of the U-Net's first stage (32; phantom: 16)")
    add("--classes", type=at_least(2), help="number of classes, background included (seen from the masks)")
    add("--steps", type=at_least(1), help="optimizer steps (10000; phantom: 800)")
    add("--batch-size", type=at_least(1), default=8, help="labelled images a step (%(default)s)")
    add("--unlabeled-batch", type=at_least(1), default=8, help="unlabelled images a step (%(default)s)")
    add("--lr", type=at_least(0, float), default=1e-3, help="AdamW's first learning rate (%(default)s)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True,
        help="mirror images at random; --no-flip where left and right are different classes")
    add("--seed", type=at_least(0), default=0, help="training randomness (%(default)s)")
    add("--split-seed", type=at_least(0), default=0, help="which units are labelled (%(default)s)")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu) or a name such as cuda:1")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="auto: bf16 where the GPU has it, fp16 with a gradient scaler on older GPUs, else fp32")
    add("--out", default="runs", metavar="FOLDER", help="where run folders go (%(default)s)")
    add("--resume", action="store_true", help="continue the run that these options name")
    add("--val-every", type=at_least(1), help="steps between validations and checkpoints (a tenth of --steps)")
    add("--cache", default=str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssl-segmentation"),
        metavar="FOLDER", help="where decoded images are kept (%(default)s)")
    return p


def parse(parser, argv=None):
    """Parse and resolve the options: a plain Namespace, with every default filled in."""
    args = parser.parse_args(argv)
    phantom = args.data == "phantom"
    args.options = {k: v for k, v in vars(args).items() if v != parser.get_default(k) and k not in FREE}
    args.size, args.width = args.size or (64 if phantom else 256), args.width or (16 if phantom else 32)
    args.steps = args.steps or (800 if phantom else 10000)
    args.val_every = args.val_every or max(1, args.steps // 10)
    if args.size % 2**DEPTH:
        low = args.size // 2**DEPTH * 2**DEPTH
        stop(f"--size {args.size}: the U-Net halves the image {DEPTH} times, so the size must be a multiple of "
             f"{2**DEPTH}. Try {low or 2**DEPTH} or {low + 2**DEPTH}.")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        stop(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}. Expected cpu, cuda, cuda:1, mps "
             "or auto, on a machine that has it.")
    cuda = torch.device(args.device).type == "cuda"
    if args.precision == "auto":
        args.precision = ("bf16" if torch.cuda.get_device_capability(args.device)[0] >= 8 else "fp16") if cuda else "fp32"
    elif args.precision == "fp16" and not cuda:
        stop(f"--precision fp16 needs a CUDA GPU, the device is {args.device}. Use --precision fp32.")
    return args


# ---------------------------------------------------------------------------------------------------
# Files and checks
# ---------------------------------------------------------------------------------------------------

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".npy")
MASK_SUFFIX = re.compile("_(mask|segmentation|anno|label)$")
SLICE = re.compile(r"^(?P<patient>.+?)(_frame\d+)?_slice_?(?P<slice>\d+)$")
MAX_CLASS = 31  # larger numbers in a mask are no class numbers (but 255 in a binary mask is)


class Bad(Exception):
    """One file that cannot be used, and why."""


def listing(folder, of):
    """{name: path} of the files with a known extension; two files of one name are an error."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
            name = path.stem
            if of == "masks" and MASK_SUFFIX.search(name):
                name = MASK_SUFFIX.sub("", name)
            if name in found:
                stop(f"two files of one name in {folder}: {found[name].name} and {path.name}. Keep one.")
            found[name] = path
    return found


def scan(root):
    """A dataset folder's files: (image paths by name, mask paths by name), in the order of volumes and slices."""
    root = Path(root)
    if not (root / "images").is_dir():
        found = sorted(p.name for p in root.iterdir())[:5] if root.is_dir() else None
        stop(f"--data {root}: " + ("there is no such folder." if found is None else
             f"no folder named images in it (found: {', '.join(found) or 'nothing'}).")
             + " Expected PATH/images/NAME.png and PATH/masks/NAME.png; see README, Your own data.")
    images = listing(root / "images", "images")
    masks = listing(root / "masks", "masks") if (root / "masks").is_dir() else {}
    if not images:
        others = {p.suffix or p.name for p in (root / "images").iterdir()}
        stop(f"no images in {root / 'images'} (found: {', '.join(sorted(others)[:5]) or 'nothing'}). "
             f"Expected files that end in {' '.join(EXTENSIONS)}.")
    # A mask goes with the image of its own name; an image may itself be called NAME_mask.
    orphans = [masks[name].name for name in masks if name not in images]
    if orphans:
        stop(f"{len(orphans)} masks have no image of their name, such as {', '.join(orphans[:3])}. "
             f"Expected masks/NAME.png (or NAME_mask.png) beside images/NAME.*; images are called "
             f"{', '.join(list(images)[:3])}, ...")

    def order(name):
        match = SLICE.match(name)
        return (name[:match.start("slice")], int(match["slice"]), name) if match else (name, -1, name)
    return {name: images[name] for name in sorted(images, key=order)}, masks


def unit_of(name):
    """The patient of a slice; the name itself if it is not called like a slice."""
    match = SLICE.match(name)
    return match["patient"] if match else name


def volume_of(name):
    """PATIENT_FRAME of a slice: its name without _slice_03; the name itself if it is not called like a slice."""
    return re.sub(r"_slice_?\d+$", "", name) if SLICE.match(name) else name


def read_list(path, names):
    """The units that a text file of ids (patients or names, one a line) stands for, sorted."""
    units = set(map(unit_of, names))
    by_name = {name: unit_of(name) for name in names}
    by_name |= {volume_of(name): unit_of(name) for name in names} | {unit: unit for unit in units}
    try:
        ids = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{path} cannot be read as a text file of ids: {error}")
    unknown = [i for i in ids if i not in by_name]
    if unknown:
        stop(f"{path}: {len(unknown)} of {len(ids)} ids are not in the dataset, such as {', '.join(unknown[:3])!r}. "
             f"Expected patients or image names, such as {', '.join(sorted(units)[:3])}.")
    return sorted({by_name[i] for i in ids})


def choose_labeled(spec, units, names):
    """--labeled -> the labelled units. Prefixes of one seeded order, so 5% lies inside 10% inside 20%.

    units: the training units with masks in that order; names: all image names, for a list of ids.
    """
    if Path(spec).is_file():
        chosen = read_list(spec, names)
        outside = [u for u in chosen if u not in units]
        if outside or not chosen:
            stop(f"--labeled {spec}: {', '.join(outside[:3]) or 'no id in it'}" +
                 (" is no training unit with masks." if outside else ". Expected ids, one a line."))
        return chosen
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", spec.strip())
    value = float(match[1]) if match else 0
    if match and not match[2] and not value.is_integer():
        stop(f"--labeled {spec}: did you mean {value * 100:g}%? Give a share such as 10% or a number of units such as 7.")
    if not match or value <= 0 or (match[2] and value > 100):
        stop(f"--labeled {spec}: expected a share above 0% and up to 100%, a number of units from 1 to {len(units)}, "
             "or a text file of ids.")
    count = max(1, math.floor(len(units) * value / 100 + 0.5)) if match[2] else int(value)
    if count > len(units):
        stop(f"--labeled {spec}: there are only {len(units)} training units with masks. Use at most that, or 100%.")
    return sorted(units[:count])


def make_split(names, masked, lists, labeled, split_seed):
    """{"labeled": units, "unlabeled": units, "val": units, "test": units}, sorted.

    names: image names; masked: those with masks; lists: {"train": units, ...} as far as given. It depends on the
    sorted ids and split_seed alone.
    """
    units, with_mask = sorted(set(map(unit_of, names))), {unit_of(n) for n in masked}
    if len(units) == 1:
        stop(f"all {len(names)} images belong to one patient, {units[0]}: nothing is left to validate and test on. "
             "Names like NAME_slice_03 are slices of patient NAME; rename them if they are separate images.")
    split = {part: list(lists[part]) for part in ("train", "val", "test") if part in lists}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        both = sorted(set(split.get(a, [])) & set(split.get(b, [])))
        if both:
            stop(f"{both[0]} is in {a}.txt and in {b}.txt (as are {len(both)} in all). A patient may be in one of them only.")
    listed = {u for part in split.values() for u in part}
    order = [sorted(units)[i] for i in np.random.default_rng(split_seed).permutation(len(units))]
    free = [u for u in order if u in with_mask and u not in listed]
    for part, share in (("val", 0.1), ("test", 0.2)):
        if part not in split:
            count = max(1, round(share * len(with_mask)))
            split[part], free = free[:count], free[count:]
        if not any(u in with_mask for u in split[part]):
            stop(f"no {'validation' if part == 'val' else 'test'} units left: of {len(with_mask)} units with masks, "
                 f"{len(listed)} are in lists. Expected at least one each to train, validate and test on; annotate more "
                 f"images or give the lists train.txt, val.txt and test.txt.")
    train = split.get("train", free)
    train_masked = [u for u in order if u in with_mask and u in train]
    if not train_masked:
        stop(f"no training unit has masks ({len(with_mask)} units with masks in all). Annotate at least three units.")
    if labeled is None:
        if len(with_mask) == len(units):
            stop("--labeled is needed, since all images have masks: a share such as 10%, a number of units such as 7, "
                 "or a text file of ids.")
        labeled = "100%"
    chosen = choose_labeled(labeled, train_masked, names)
    unlabeled = set(train) | {u for u in units if u not in with_mask and u not in listed}
    return {"labeled": chosen, "unlabeled": sorted(unlabeled - set(chosen)),
            "val": sorted(split["val"]), "test": sorted(split["test"])}


def probe(path):
    """Height, width and channels (1 or 3) from a file's header, without decoding it."""
    try:
        if path.suffix.lower() == ".npy":
            shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
            if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)) or 0 in shape:
                raise Bad(f"{path.name}: an array of shape {shape}; expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
            return *shape[:2], 3 if len(shape) == 3 and shape[2] > 1 else 1
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise Bad(f"{path.name}: holds {image.n_frames} pages; expected one file a slice")
            return image.height, image.width, 1 if image.mode in ("1", "L", "LA", "I", "F") or "I;16" in image.mode else 3
    except Bad:
        raise
    except Exception as error:  # Pillow raises a dozen types on damaged files
        raise Bad(f"{path.name}: not an image that can be read ({type(error).__name__}: {error})") from None


def read_pixels(path):
    """Pixels as stored: (H, W), or (H, W, 3 or 4) in colour; palette images by their colours."""
    probe(path)
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, allow_pickle=False)
            array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
            if array.dtype.kind not in "buif" or not np.isfinite(array).all():
                raise Bad(f"{path.name}: values of type {array.dtype}, or not finite; expected finite numbers")
            return array
        with Image.open(path) as image:
            grey = image.mode in ("1", "L", "I", "F") or "I;16" in image.mode
            mode = None if grey else "L" if image.mode == "LA" else "RGB"
            array = np.asarray(image.convert(mode) if mode else image)
            return array * np.uint8(255) if array.dtype == bool else array
    except Bad:
        raise
    except Exception as error:
        raise Bad(f"{path.name}: truncated or damaged ({type(error).__name__}: {error})") from None


def read_volume(paths, channels, size):
    """The images of one volume -> (N, channels, size, size) uint8.

    8-bit images stay as they are; others are scaled from the volume's 0.5 to 99.5 percentiles.
    """
    arrays = [read_pixels(p) for p in paths]
    if any(a.dtype not in (np.uint8, bool) for a in arrays):
        values = np.concatenate([a.ravel() for a in arrays]).astype(np.float64)
        low, high = np.percentile(values, [0.5, 99.5])
        arrays = [((a - low) / max(high - low, 1e-12) * 255).clip(0, 255).astype(np.uint8) for a in arrays]
    out = np.empty((len(paths), channels, size, size), np.uint8)
    for i, array in enumerate(arrays):
        array = array.astype(np.uint8) * 255 if array.dtype == bool else array[..., :3]if array.ndim == 3 else array
        image = Image.fromarray(np.ascontiguousarray(array)).convert("L" if channels == 1 else "RGB")
        resized = np.asarray(image.resize((size, size), Image.BILINEAR))
        out[i] = resized[None] if channels == 1 else resized.transpose(2, 0, 1)
    return out


def read_mask(path):
    """A mask file -> class numbers (H, W) uint8, and its kind: "empty", "classes" or "binary" (0/255 made 0/1).

    Palette masks hold class numbers as indices, unless their only colours are black and white. JPEG-noisy binary
    masks are cut above 127. Raises Bad, with the values found, for anything else.
    """
    array = read_pixels(path)
    lossy = path.suffix.lower() in (".jpg", ".jpeg")
    if path.suffix.lower() != ".npy":
        with Image.open(path) as image:
            if image.mode == "P" and not np.isin(array, (0, 255)).all():
                array = np.asarray(image)
            elif image.mode == "1":
                array = array // 255
    if array.ndim == 3:
        if not (array[..., :1] == array[..., 1:3]).all() and not lossy:
            raise Bad(f"{path.name}: a mask in colours; expected one class number a pixel, or 0 and 255")
        array = array[..., 0]
    values = np.unique(array)
    high = values.max()
    if lossy or (high > MAX_CLASS and high <= 255 and not ((values > MAX_CLASS) & (values < 255 - MAX_CLASS)).any()):
        return (array > 127).astype(np.uint8), "binary" if high > 127 else "empty"
    if values.min() < 0 or high > MAX_CLASS or (values != values.astype(np.uint8)).any():
        shown = ", ".join(f"{v:g}" for v in values[:8]) + (", ..." if len(values) > 8 else "")
        raise Bad(f"{path.name}: mask values {shown}; expected class numbers 0, 1, 2, ... (at most {MAX_CLASS}), or 0 and 255")
    return array.astype(np.uint8), "classes" if high else "empty"


def each_file(items, read, what):
    """Yield read(item) for each item with a progress bar; all bad files are collected, named (ten) and stop the run."""
    bad = []
    for item in tqdm(items, f"decoding {what}", leave=False, disable=None):
        try:
            yield item, read(item)
        except Bad as error:
            bad.append(str(error))
    if bad:
        stop(f"{len(bad)} bad files among the {what}:\n  " + "\n  ".join(bad[:10]) + ("\n  ..." if len(bad) > 10 else "")
             + "\nMend or remove them. `python common.py check --data PATH` shows the whole dataset.")


def cached(root, key, build):
    """The folder root/<hash of key>, filled once by build(folder), aside and then renamed: whole or absent."""
    root = Path(root)
    folder = root / hashlib.sha256(repr(("v1", key)).encode()).hexdigest()[:20]
    if not folder.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix="building-", dir=root))
        except OSError as error:
            stop(f"the cache folder {root} cannot be written ({error}). Choose another with --cache FOLDER.")
        try:
            build(aside)
            with contextlib.suppress(OSError):  # another run was faster: its folder is as good
                aside.rename(folder)
        except OSError as error:
            stop(f"the cache in {root} could not be written ({error}). Free some space, or use --cache FOLDER.")
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def fingerprint(paths):
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths]


def memory_map(path, shape):
    return np.memmap(path, np.uint8, "r", shape=tuple(shape)) if math.prod(shape) else np.empty(shape, np.uint8)


def decode_images(paths, volumes_of, size, cache):
    """All images, decoded once -> (memory-mapped array (N, channels, size, size) uint8, original (H, W) of each)."""
    def build(folder):
        shapes = [shape for _, shape in each_file(paths, probe, "images")]
        channels = max(c for *_, c in shapes)
        volumes = {}
        for path, volume in zip(paths, volumes_of, strict=True):
            volumes.setdefault(volume, []).append(path)
        with open(folder / "images.u8", "wb") as file:
            for _, block in each_file(list(volumes.values()), lambda v: read_volume(v, channels, size), "images"):
                file.write(block.tobytes())
        meta = {"shape": [len(paths), channels, size, size], "sizes": [s[:2] for s in shapes]}
        (folder / "meta.json").write_text(json.dumps(meta))

    folder = cached(cache, ("images", size, fingerprint(paths)), build)
    meta = json.loads((folder / "meta.json").read_text())
    return memory_map(folder / "images.u8", meta["shape"]), [tuple(s) for s in meta["sizes"]]


def decode_masks(paths, sizes, size, cache):
    """Masks, decoded once -> (labels at `size` (N, size, size), original pixels in one flat array), memory-mapped."""
    def build(folder):
        def read(item):
            mask, kind = read_mask(item[0])
            if mask.shape != item[1]:
                raise Bad(f"{item[0].name}: {mask.shape[0]} x {mask.shape[1]} pixels, its image has "
                          f"{item[1][0]} x {item[1][1]}")
            return mask, kind
        example = {}
        with open(folder / "labels.u8", "wb") as small, open(folder / "truth.u8", "wb") as full:
            for (path, _), (mask, kind) in each_file(list(zip(paths, sizes, strict=True)), read, "masks"):
                example.setdefault(kind, path.name)
                small.write(np.asarray(Image.fromarray(mask).resize((size, size), Image.NEAREST)).tobytes())
                full.write(mask.tobytes())
        if "binary" in example and "classes" in example:
            stop(f"some masks are binary 0/255 ({example['binary']}), others hold class numbers ({example['classes']}). "
                 "Write all of them in one of the two ways.")

    folder = cached(cache, ("masks", size, fingerprint(paths), sizes), build)
    return (memory_map(folder / "labels.u8", (len(paths), size, size)),
            memory_map(folder / "truth.u8", (sum(h * w for h, w in sizes),)))


def open_dataset(data, args):
    """Fill a Data object from the phantom or a folder; every check on files and splits is here."""
    if args.data == "phantom":
        names, images, masks, lists = phantom(args.size)
        args.labeled = args.labeled or "10%"
        masked, data.images, sizes = names, images, [(args.size, args.size)] * len(names)
        data.root, data.name = None, "phantom"
        data.read_mask = lambda i: masks[i]
    else:
        data.root = Path(args.data)
        paths, mask_paths = scan(data.root)
        names, masked = list(paths), [name for name in paths if name in mask_paths]
        data.name = data.root.resolve().name
        data.read_mask = lambda i: read_mask(mask_paths[names[i]])[0]
        lists = {part: read_list(data.root / f"{part}.txt", names) for part in ("train", "val", "test")
                 if (data.root / f"{part}.txt").is_file()}
    data.names, data.units, data.volumes_of = names, list(map(unit_of, names)), list(map(volume_of, names))
    data.split = make_split(names, masked, lists, args.labeled, args.split_seed)
    args.labeled = args.labeled or "100%"
    data.split_hash = hashlib.sha256(json.dumps(data.split, sort_keys=True).encode()).hexdigest()[:8]
    if data.root:
        data.images, sizes = decode_images(list(paths.values()), data.volumes_of, args.size, args.cache)
    masked = set(masked)
    data.has_mask = [name in masked for name in names]
    # Training opens these masks and no others.
    visible = [i for part in ("labeled", "val", "test") for i in data.indices(part)]
    data.label_rows = {i: row for row, i in enumerate(visible)}
    if data.root:
        visible_sizes = [sizes[i] for i in visible]
        data.labels, truth = decode_masks([mask_paths[names[i]] for i in visible], visible_sizes, args.size, args.cache)
        ends = np.cumsum([h * w for h, w in visible_sizes])
        data.truth = lambda i: truth[ends[data.label_rows[i]] - math.prod(sizes[i]):
                                     ends[data.label_rows[i]]].reshape(sizes[i])
        largest = int(truth.max())
    else:
        data.labels, data.truth, largest = masks[visible], data.read_mask, int(masks[visible].max())
    for part in ("val", "test"):
        for volume, indices in data.volumes(part).items():
            if len({sizes[i] for i in indices}) > 1:
                stop(f"the slices of {volume} differ in size: {sorted({sizes[i] for i in indices})}. Expected one size a volume.")
    data.channels, data.classes = data.images.shape[1], args.classes or largest + 1
    if largest == 0:
        stop("the labelled, validation and test masks hold background only. Expected class numbers 1, 2, ... or 255.")
    if largest >= data.classes:
        stop(f"--classes {args.classes}, but the masks hold class {largest}. Expected at least {largest + 1}.")


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
    units = sorted({unit_of(n) for n in names})
    lists = {"train": units[:-18], "val": units[-18:-12], "test": units[-12:]}
    return names, np.stack(images), np.stack(masks), lists


# ---------------------------------------------------------------------------------------------------
# Run folder: log, checkpoints, resume, results
# ---------------------------------------------------------------------------------------------------


def write_aside(path, write):
    """write(temporary path), then rename: whoever reads `path` finds the old or the new file, whole."""
    aside = path.with_name(path.name + ".tmp")
    write(aside)
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def find_folder(args, name, data):
    """The run's folder: a new one, or with --resume the newest of these options. Returns (folder, resumed)."""
    parent = Path(args.out) / data.name
    label = Path(args.labeled).stem if Path(args.labeled).is_file() else args.labeled
    stem = f"{name}-{label}-seed{args.seed}"
    full = stem + "".join(f"-{k}_{Path(str(v)).stem if os.sep in str(v) else v}" for k, v in sorted(args.options.items())
                          if k not in ("labeled", "seed", "supervised"))
    taken = [p for p in parent.glob(stem + "*") if re.fullmatch(re.escape(full) + r"(-\d+)?", p.name)]
    taken.sort(key=lambda p: int(p.name[len(full) + 1:] or 1))
    if not args.resume:
        for count in range(len(taken) + 1, 10**6):
            folder = parent / (full if count == 1 else f"{full}-{count}")
            with contextlib.suppress(FileExistsError):  # another run, started at the same time, may take it
                folder.mkdir(parents=True)
                return folder, False
    if not taken:
        other = sorted(p.name for p in parent.glob(stem + "*"))
        if other:
            stop(f"--resume: no run {full} in {parent}; there is {', '.join(other[:3])}. Only --out, --device and "
                 "--val-every may change: repeat the run's other options, or leave --resume out to start anew.")
        (parent / full).mkdir(parents=True)
        return parent / full, True
    split = json.loads((taken[-1] / "split.json").read_text()) if (taken[-1] / "split.json").exists() else {}
    if split and split["hash"] != data.split_hash:
        stop(f"--resume: {taken[-1]} was trained on another split ({split['hash']}, now {data.split_hash}). Restore the "
             "dataset's files, or leave --resume out to start anew.")
    return taken[-1], True


class Run:
    """One training run: device and precision, the loop's steps, log, checkpoints and scores.

    In a method's main: run = Run("name", args, data); networks = run.place(build(...)); run.keep(...);
    for step in run.steps(): ... run.backward, run.update, run.log, run.save; return run.finish().
    """

    def __init__(self, name, args, data):
        self.name, self.args, self.data = name, args, data
        try:
            self.folder, self.resumed = find_folder(args, name, data)
        except OSError as error:
            stop(f"--out {args.out} cannot be written ({error}). Choose another folder.")
        plain = {k: v for k, v in vars(args).items() if k != "options"}
        if not (self.folder / "args.json").exists():
            write_aside(self.folder / "split.json", lambda p: p.write_text(json.dumps(
                {"hash": data.split_hash, **data.split}, indent=1)))
            write_aside(self.folder / "args.json", lambda p: p.write_text(json.dumps(plain, indent=1)))
        torch.manual_seed(args.seed)
        torch.backends.cudnn.benchmark = True
        self.device_type = torch.device(args.device).type
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=args.precision == "fp16")
        self.first_step, self.best, self.sums, self.count, self.interrupted = 0, -1.0, {}, 0, False

    def autocast(self):
        """Context for the networks' forward passes: bf16 or fp16 on GPUs, float32 elsewhere."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.args.precision]
        return torch.autocast(self.device_type, dtype=dtype, enabled=self.args.precision != "fp32")

    def place(self, networks):
        """Move {name: network} to the device, in the channels-last layout (twice as fast on CPUs)."""
        return {k: n.to(self.args.device, memory_format=torch.channels_last) for k, n in networks.items()}

    def keep(self, networks, optimizers, predict, pictures):
        """What checkpoints hold and evaluation uses; loads last.pt when resuming.

        predict(networks, x) -> {name: probabilities}, the network that the paper deploys first;
        pictures(networks, x) -> further columns of preview.png {title: labels (B, H, W) long or heat (B, H, W) float}.
        """
        self.networks, self.optimizers, self.predict, self.pictures = networks, optimizers, predict, pictures
        data, args = self.data, self.args
        parts = {k: f"{len(units)} ({len(data.indices(k))} images)" for k, units in data.split.items()}
        print(f"{self.name} on {data.name}: {data.channels} x {args.size} x {args.size} pixels, {data.classes} classes; "
              f"{args.device}, {args.precision}, {torch.get_num_threads()} CPU threads\n"
              f"units: {', '.join(f'{k} {v}' for k, v in parts.items())}; split {data.split_hash}\n"
              f"labeled: {' '.join(data.split['labeled'][:12])}{' ...' if len(data.split['labeled']) > 12 else ''}\n"
              f"networks: " + ", ".join(f"{k} {sum(p.numel() for p in n.parameters()) / 1e6:.2f} M"
                                        for k, n in networks.items()) + f"; run folder {self.folder}")
        last = self.folder / "last.pt"
        if self.resumed and not last.exists():
            print("--resume: no checkpoint yet, starting at step 0")
        elif self.resumed:
            state = torch.load(last, map_location=args.device, weights_only=True)
            for k, network in networks.items():
                network.load_state_dict(state["networks"][k])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.scaler.load_state_dict(state["scaler"])
            data.labeled.load_state_dict({k: v.cpu() for k, v in state["labeled"].items()})
            data.unlabeled.load_state_dict({k: v.cpu() for k, v in state["unlabeled"].items()})
            torch.set_rng_state(state["rng"].cpu())
            if self.device_type == "cuda" and "cuda_rng" in state:
                torch.cuda.set_rng_state(state["cuda_rng"].cpu(), args.device)
            self.first_step, self.best, self.count = state["step"], state["best"], state["count"]
            self.sums = {k: v.to(args.device) for k, v in state["sums"].items()}
            print(f"--resume: continuing at step {self.first_step}")
        self._cut_log()

    def _cut_log(self):
        """Drop the log's rows after the checkpoint, a half-written one included."""
        log = self.folder / "log.csv"
        if log.exists():
            header, *rows = log.read_text().splitlines(keepends=True) or [""]
            rows = [r for r in rows if r.endswith("\n") and int(r.split(",")[0]) <= self.first_step]
            write_aside(log, lambda p: p.write_text(header + "".join(rows) if rows else ""))

    def steps(self):
        """The step numbers, 0 to --steps - 1, with a progress bar. Ctrl-C ends the run after its step, saved."""
        def interrupt(*_):
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
        previous = {}
        with contextlib.suppress(ValueError):  # not in the main thread: leave signals alone
            previous = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tqdm(total=self.args.steps, initial=self.first_step, desc=self.name, disable=None) as self.bar:
                start = None
                for step in range(self.first_step, self.args.steps):
                    yield step
                    self.bar.update()
                    if step == self.first_step + 2:
                        start = time.perf_counter()
                    elif step == self.first_step + 10:
                        self._estimate((time.perf_counter() - start) / 8 * (self.args.steps - step))
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    def _estimate(self, seconds):
        if seconds > 3600:
            tqdm.write(f"This run will take about {seconds / 3600:.1f} hours on {self.args.device}. Shorter: --size 96 "
                       "--width 16 --steps 1500 (minutes on a CPU), or a machine with a GPU.", file=sys.stdout)

    def backward(self, loss):
        """loss.backward(), scaled where the precision is fp16."""
        self.scaler.scale(loss).backward()

    def update(self, optimizer):
        """optimizer.step(), skipped by the gradient scaler where fp16 overflowed."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def log(self, **terms):
        """Add this step's loss terms and diagnostics (scalar tensors or numbers); no step waits for the device."""
        for k, v in terms.items():
            value = v.detach() if torch.is_tensor(v) else torch.tensor(float(v), device=self.args.device)
            self.sums[k] = self.sums[k] + value if k in self.sums else value.clone()
        self.count += 1

    def _means(self, done):
        """The terms' means since the last log row; a term that is not finite ends the run."""
        if not self.count:
            return {}
        means = dict(zip(self.sums, (torch.stack(list(self.sums.values())) / self.count).tolist(), strict=True))
        for k, v in means.items():
            if not math.isfinite(v):
                stop(f"{k} is {v} between steps {done - self.count} and {done}; nothing was saved after that. "
                     f"Lower --lr or the unsupervised weight; the last checkpoint is in {self.folder}.", status=1)
        return means

    def save(self, step):
        """End of a step: log every 20 steps; every --val-every steps, and at the end, validate and save."""
        done, row = step + 1, {}
        validate = done % self.args.val_every == 0 or done == self.args.steps
        if done % 20 == 0 or validate or self.interrupted:
            row = self._means(done)
            self.bar.set_postfix({k: f"{row[k]:.3f}" for k in ("loss", "lam") if k in row} | {"best": f"{self.best:.1f}"})
        if validate:
            scores = evaluate(self.predict, self.networks, self.data, "val", distances=False)
            row |= {f"val_{k}": s["dice"] for k, s in scores.items()}
            dice = next(iter(scores.values()))["dice"] or 0.0
            tqdm.write(f"step {done}/{self.args.steps}  loss {row.get('loss', 0):.3f}  validation Dice " + ", ".join(
                f"{k} {s['dice'] or 0:.1f}" for k, s in scores.items()), file=sys.stdout)
        if done % 20 == 0 or validate:
            self._write_row(done, row)
            self.sums, self.count = {}, 0
        if validate and dice > self.best:
            self.best = dice
            write_aside(self.folder / "best.pt", lambda p: torch.save(self._state(done), p))
        if validate or self.interrupted:
            optimizers = [o.state_dict() for o in self.optimizers]
            cuda = {"cuda_rng": torch.cuda.get_rng_state(self.args.device)} if self.device_type == "cuda" else {}
            state = self._state(done) | cuda | {
                "optimizers": optimizers, "scaler": self.scaler.state_dict(), "rng": torch.get_rng_state(),
                "labeled": self.data.labeled.state_dict(), "unlabeled": self.data.unlabeled.state_dict(),
                "sums": self.sums, "count": self.count}
            write_aside(self.folder / "last.pt", lambda p: torch.save(state, p))
        if self.interrupted:
            self.bar.close()
            words = [w for w in sys.argv if w != "--resume"]
            print(f"\nstopped; saved at step {done}. To continue: python {' '.join(words)} --resume")
            sys.exit(130)

    def _state(self, done):
        """What a copied checkpoint needs to predict."""
        return {"method": self.name, "step": done, "best": self.best, "channels": self.data.channels,
                "classes": self.data.classes, "size": self.args.size, "width": self.args.width,
                "scaling": "8-bit / 255; others by the volume's 0.5 to 99.5 percentiles",
                "networks": {k: n.state_dict() for k, n in self.networks.items()}}

    def _write_row(self, done, row):
        names = ["step", *row]
        log = self.folder / "log.csv"
        header = log.read_text().splitlines()[0].split(",") if log.exists() and log.stat().st_size else []
        if set(names) - set(header):  # the first validation adds its columns
            rows = list(csv.DictReader(log.open())) if header else []
            header += [n for n in names if n not in header]
            with open(log.with_suffix(".tmp"), "w", newline="") as file:
                writer = csv.DictWriter(file, header, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            os.replace(log.with_suffix(".tmp"), log)
        with open(log, "a", newline="") as file:
            csv.DictWriter(file, header, lineterminator="\n").writerow({"step": done, **row})

    def finish(self):
        """Score the test units, once: every network, last and best. Writes results.json and preview.png; returns scores."""
        results = {"method": self.name, "dataset": self.data.name, "split": self.data.split_hash, "steps": self.args.steps,
                   "labeled": self.args.labeled, "seed": self.args.seed, "networks": {}}
        save_preview(self)
        last = {k: {n: v.clone() for n, v in net.state_dict().items()} for k, net in self.networks.items()}
        best = torch.load(self.folder / "best.pt", map_location=self.args.device, weights_only=True)
        for which, states in (("last", last), ("best", best["networks"])):
            for k, network in self.networks.items():
                network.load_state_dict(states[k])
            for k, scores in evaluate(self.predict, self.networks, self.data, "test").items():
                results["networks"].setdefault(k, {})[which] = scores
        for k, network in self.networks.items():
            network.load_state_dict(last[k])
        name, head = next((k, v["last"]) for k, v in results["networks"].items())
        results["headline"] = {"network": name, **{m: head[m] for m in ("dice", "jaccard", "hd95", "asd")}}
        write_aside(self.folder / "results.json", lambda p: p.write_text(json.dumps(results, indent=1)))
        units = len(self.data.split["test"])
        print(f"\nTest: {len(self.data.volumes('test'))} volumes of {units} units. Headline: {name}, last checkpoint.")
        print(f"{'':32}{'Dice %':>8}{'Jaccard %':>11}{'HD95 px':>9}{'ASD px':>8}")
        for k, both in results["networks"].items():
            for which, label in (("last", "last"), ("best", f"best on validation, {best['step']}")):
                print(f"{k + ', ' + label:32}" + "".join(f"{'n/a' if both[which][m] is None else f'{both[which][m]:.2f}':>{w}}"
                      for m, w in (("dice", 8), ("jaccard", 11), ("hd95", 9), ("asd", 8))))
        counts = {key: sum(c[key] for c in head["empty"].values()) for key in ("both", "missed", "false")}
        print("Dice per class: " + ", ".join(f"{c} {s['dice']:.1f}" if s["dice"] is not None else f"{c} n/a"
                                             for c, s in head["classes"].items())
              + f". Empty: {counts['both']} in both (left out), {counts['missed']} missed, {counts['false']} false; of the "
              f"{counts['both'] + counts['false']} lesion-free, {counts['both']} were predicted empty.")
        print(f"Written: {self.folder / 'results.json'}, preview.png, log.csv, last.pt, best.pt")
        return results


# ---------------------------------------------------------------------------------------------------
# Pictures and commands
# ---------------------------------------------------------------------------------------------------

COLORS = ["black", "#e6194b", "#3cb44b", "#4363d8", "#ffe119", "#f58231", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c"]


def overlay(image, labels):
    """Image (channels, H, W) in [0, 1] with labels (H, W) drawn over it -> (3, H, W) uint8."""
    image = (image.expand(3, -1, -1) * 255).to(torch.uint8)
    masks = torch.stack([labels == c for c in range(1, max(2, int(labels.max()) + 1))])
    return draw_segmentation_masks(image, masks, 0.5, [COLORS[c % len(COLORS)] for c in range(1, len(masks) + 1)])


def save_sheet(path, columns, rows):
    """Titles over a grid of pictures: columns is {title: list of (3, H, W) uint8}."""
    tiles = [F.interpolate(column[r][None].float(), (160, 160))[0].byte() for r in range(rows) for column in columns.values()]
    grid = make_grid(tiles, nrow=len(columns), padding=2, pad_value=255)
    sheet = Image.new("RGB", (grid.shape[2], grid.shape[1] + 20), "white")
    sheet.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (0, 20))
    for i, title in enumerate(columns):
        ImageDraw.Draw(sheet).text((4 + i * 162, 3), title, "black", ImageFont.load_default(13))
    write_aside(Path(path), lambda p: sheet.save(p, "PNG"))


@torch.no_grad()
def save_preview(run):
    """preview.png: image, truth, every network's labels, and the paper's own columns, for four validation images."""
    data = run.data
    volumes = list(data.volumes("val").values())
    chosen = [v[len(v) // 2] for v in volumes[::max(1, len(volumes) // 4)]][:4]
    for network in run.networks.values():
        network.eval()
    x = data.load_images(chosen)
    columns = {"image": x, "truth": data.load_labels(chosen)}
    columns |= {k: p.argmax(1) for k, p in run.predict(run.networks, x).items()} | run.pictures(run.networks, x)
    for network in run.networks.values():
        network.train()
    x = x.cpu()
    sheet = {}
    for title, column in columns.items():
        if isinstance(column, tuple):
            sheet[title] = [overlay(i.cpu(), c.cpu()) for i, c in zip(*column, strict=True)]
            continue
        column = column.cpu()
        if column.dim() == 4:
            sheet[title] = [(c.expand(3, -1, -1) * 255).to(torch.uint8) for c in column]
        elif column.is_floating_point():
            scaled = (column / column.amax().clamp_min(1e-8) * 255).to(torch.uint8)
            sheet[title] = [c.expand(3, -1, -1) for c in scaled]
        else:
            sheet[title] = [overlay(i, c) for i, c in zip(x, column, strict=True)]
    save_sheet(run.folder / "preview.png", sheet, len(chosen))


def check(args):
    """The data doctor: everything about a dataset that a run depends on. Reads all masks, hidden ones too."""
    data = Data(args)
    print(f"{data.name}: {len(data.names)} images, {sum(data.has_mask)} with masks, {len(set(data.units))} units "
          f"(patients or single images), {len(set(data.volumes_of))} volumes")
    for name in (data.names[0], data.names[len(data.names) // 2], data.names[-1]):
        print(f"  {name}: unit {unit_of(name)}, volume {volume_of(name)}")
    counts = {}
    hidden = [i for i in range(len(data.names)) if data.has_mask[i]]
    for _, mask in each_file(hidden, data.read_mask, "masks"):
        for value, count in zip(*np.unique(mask, return_counts=True), strict=True):
            counts[int(value)] = counts.get(int(value), 0) + int(count)
    total = sum(counts.values())
    print("classes: " + ", ".join(f"{c} ({100 * n / total:.1f}% of pixels)" for c, n in sorted(counts.items())))
    sample = np.asarray(data.images[:: max(1, len(data.names) // 100)])
    print(f"intensities: {sample.min()} to {sample.max()}, mean {sample.mean():.0f} of 255; {data.channels} channels")
    for part, units in data.split.items():
        print(f"{part}: {len(units)} units, {len(data.indices(part))} images: {' '.join(units[:6])} ...")
    chosen = data.indices("labeled")[:: max(1, len(data.indices("labeled")) // 6)][:6]
    x, y = data.load_images(chosen).cpu(), data.load_labels(chosen).cpu()
    folder = Path(args.out) / data.name
    folder.mkdir(parents=True, exist_ok=True)
    save_sheet(folder / "check.png", {"image": [(i.expand(3, -1, -1) * 255).byte() for i in x],
                                      "mask": [overlay(i, m) for i, m in zip(x, y, strict=True)]}, len(chosen))
    print(f"No problem found. Look at {folder / 'check.png'}")


def write_phantom(folder, size):
    """Write the phantom as a dataset folder."""
    names, images, masks, lists = phantom(size)
    for part, arrays in (("images", images[:, 0]), ("masks", masks)):
        (folder / part).mkdir(parents=True)
        for name, array in zip(names, arrays, strict=True):
            Image.fromarray(array).save(folder / part / f"{name}.png")
    for part, units in lists.items():
        (folder / f"{part}.txt").write_text("\n".join(units) + "\n")
    print(f"{len(names)} images in {folder}. Try: python mean_teacher.py --data {folder} --size {size} --labeled 10%")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["phantom"]:
        p = argparse.ArgumentParser(prog="common.py phantom")
        p.add_argument("--out", type=Path, required=True, metavar="FOLDER")
        p.add_argument("--size", type=at_least(16), default=64)
        args = p.parse_args(argv[1:])
        if args.out.exists():
            stop(f"--out {args.out} exists. Name a new folder.")
        write_phantom(args.out, args.size)
    elif argv[:1] == ["check"]:
        args = parse(parser("Look at a dataset: counts, sizes, values, patients, split."), argv[1:])
        args.labeled = args.labeled or "10%"
        check(args)
    else:
        print(__doc__)
        sys.exit(0 if argv in ([], ["-h"], ["--help"]) else 2)


if __name__ == "__main__":
    main()
