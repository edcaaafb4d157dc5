"""What the six method files share: U-Net, shared formulas, metrics, augmentation, batches.

Read down to the line "Tools"; the rest is plumbing that no paper is about. Four commands, too:
python common.py check | phantom | predict | compare, each with its own --help.

Shapes: B images, C classes, H x W pixels. Images are floats in [0, 1], label maps are integers.
"""
import argparse
import contextlib
import csv
import hashlib
import importlib
import io
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

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import distributed as dist
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
    """Pixels of a bool mask (H, W) or (D, H, W) touching the outside by a face: (N, 3) z, y, x."""
    padded = np.pad(mask, 1)
    inner = padded.copy()
    for axis in range(mask.ndim):
        inner &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
    return np.argwhere((padded & ~inner).reshape(-1, *padded.shape[-2:]))


def distances_to(target, points):
    """Euclidean distance from each of the points (N, 3) to the nearest of the target points: (N,).

    Exact, an axis at a time (Felzenszwalb & Huttenlocher 2012): squared distances within columns,
    then across slices, then along the rows of the points alone.
    """
    low = np.minimum(target.min(0), points.min(0))
    target, points = target - low, points - low
    mask = np.zeros(np.maximum(target.max(0), points.max(0)) + 1, bool)  # the common box (D, H, W)
    mask[tuple(target.T)] = True
    z, y, x = np.ogrid[tuple(map(slice, mask.shape))]
    above = np.maximum.accumulate(np.where(mask, y, -np.inf), 1)
    below = np.minimum.accumulate(np.where(mask, y, np.inf)[:, ::-1], 1)[:, ::-1]
    columns = np.minimum(y - above, below - y) ** 2
    squares = np.full(mask.shape, np.inf)
    for k, column in enumerate(columns):
        squares = np.minimum(squares, column + (z - k) ** 2)
    nearest = []
    for p in np.array_split(points, 1 + len(points) * x.size // 2**22):  # bounded memory
        nearest.append((squares[p[:, 0], p[:, 1]] + (p[:, 2:] - x[0]) ** 2).min(1))
    return np.sqrt(np.concatenate(nearest))


def mask_scores(pred, truth, distances=True):
    """One class, bool arrays (2-D or 3-D) -> {dice, jaccard (%), hd95, asd (pixels)} or None.

    HD95 pools both directions' surface distances; ASD goes from prediction to truth. Both masks
    empty: None, not scored. One empty: Dice 0, distances the diagonal (0 would look perfect).
    """
    both, total = int((pred & truth).sum()), int(pred.sum()) + int(truth.sum())
    if total == 0:
        return None
    scores = {"dice": 200 * both / total, "jaccard": 100 * both / (total - both)}
    if distances and pred.any() and truth.any():
        a, b = surface_points(pred), surface_points(truth)
        to_truth, to_pred = distances_to(b, a), distances_to(a, b)
        scores["hd95"] = float(np.percentile(np.concatenate([to_truth, to_pred]), 95))
        scores["asd"] = float(to_truth.mean())
    elif distances:
        scores["hd95"] = scores["asd"] = math.hypot(*pred.shape)
    return scores


@contextlib.contextmanager
def evaluating(networks):
    """All networks in evaluation mode and without gradients; afterwards each as it was."""
    modes = {network: network.training for network in networks.values()}
    try:
        with torch.no_grad():
            for network in modes:
                network.eval()
            yield
    finally:
        for network, training in modes.items():
            network.train(training)


def evaluate(predict, networks, data, part, distances=True):
    """Score every network on all volumes of `part` ("val" or "test"): {network: summary}.

    predict(networks, x) -> {name: probabilities (B, C, h, w)}, resized to the original size before
    the argmax; a volume's slices are scored together, in 3-D. Summary: each metric's mean over the
    foreground classes of its mean over volumes (None: undefined), with its parts; "empty": in how
    many volumes both masks of a class, the prediction's ("missed") or the truth's ("false") were.
    """
    def mean(scores, metric):
        values = [s[metric] for s in scores if s and s.get(metric) is not None]
        return sum(values) / len(values) if values else None

    results, names = {}, [str(c) for c in range(1, data.classes)]
    for volume, indices in data.volumes(part).items():
        truth, labels = np.stack([data.truth(i) for i in indices]), {}  # (D, H, W)
        with evaluating(networks):
            for chunk in torch.tensor(indices).split(16):
                for name, probs in predict(networks, data.load_images(chunk)).items():
                    probs = F.interpolate(probs, truth.shape[1:], mode="bilinear")
                    labels.setdefault(name, []).append(probs.argmax(1).byte().cpu())
        for name, chunks in labels.items():
            pred = torch.cat(chunks).numpy()  # (D, H, W)
            result = results.setdefault(name, {"classes": {}, "empty": {}, "volumes": {}})
            for c in names:
                a, b = pred == int(c), truth == int(c)
                a, b = (a[0], b[0]) if len(b) == 1 else (a, b)  # one image is scored in 2-D
                result["volumes"].setdefault(volume, {})[c] = mask_scores(a, b, distances)
                empty = result["empty"].setdefault(c, {"both": 0, "missed": 0, "false": 0})
                if not (a.any() and b.any()):
                    empty["false" if a.any() else "missed" if b.any() else "both"] += 1
    for result in results.values():
        for c in names:
            scores = [volume[c] for volume in result["volumes"].values()]
            result["classes"][c] = {m: mean(scores, m) for m in METRICS}
        result.update({m: mean(result["classes"].values(), m) for m in METRICS})
    return results


# --- Augmentation: on the device, for a whole batch, drawn for each image -------------------------

def weak(x, *maps, flip=True):
    """Random flips, rotation (to 20 degrees), scale (0.8 to 1.25) of x (B, channels, H, W) [ours].

    maps: integer maps (B, H, W), moved alike, nearest neighbour; 0 from outside. -> [x, *maps].
    """
    if len(x) == 0:
        return [x, *maps]
    angle = (torch.rand(len(x), device=x.device) * 2 - 1) * math.radians(20)
    zoom = 1.25 ** (torch.rand(len(x), device=x.device) * 2 - 1)
    mirror = torch.rand(len(x), 1, 2, device=x.device) >= 0.5
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    theta = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2) * (1 - 2.0 * (mirror & flip))
    grid = F.affine_grid(F.pad(theta, (0, 1)), list(x.shape), align_corners=False)
    out = [F.grid_sample(x, grid, align_corners=False)]
    for m in maps:
        moved = F.grid_sample(m[:, None].float(), grid, "nearest", align_corners=False)
        out.append(moved[:, 0].to(m.dtype))
    return out


def strong(x):
    """Contrast, brightness, gamma, blur, noise of x (B, channels, H, W); stays in [0, 1] [ours]."""
    def uniform(low, high):
        return torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(low, high)

    mean = x.mean((1, 2, 3), keepdim=True)
    x = ((x - mean) * uniform(0.5, 1.5) + mean + uniform(-0.2, 0.2)).clamp(1e-4, 1)
    x = x ** torch.exp2(uniform(-0.7, 0.7))
    x = x.lerp(tvf.gaussian_blur(x, [5, 5], [1.5, 1.5]), uniform(0, 1))
    return (x + uniform(0, 0.08) * torch.randn_like(x)).clamp(0, 1)


# --- Batches --------------------------------------------------------------------------------------

def shuffled(indices, seed):
    """Endless stream of image numbers: all in random order, then all again in another order.

    It has its own generator, so that resumed runs and all methods see the same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        for k in torch.randperm(len(indices), generator=generator).tolist():
            yield indices[k]


class Data:
    """A dataset: the split, decoded images at --size, masks where training may see them, batches.

    names[i] is image i, units[i] its patient (or itself), volumes_of[i] its volume; split is
    {"labeled": units, "unlabeled": ..., "val": ..., "test": ...}. decode() adds channels, classes,
    images (N, channels, S, S) uint8 and truth(i), mask i (H, W) uint8 at its own size.
    """

    def __init__(self, args):
        self.args, self.images, self.drawn = args, None, 0
        find_files(self, args)  # in the tools below: names, checks, split
        labeled = self.indices("labeled")
        # With every unit labelled, the unlabelled stream is the same images without their masks.
        self.unlabeled = self.indices("unlabeled") or labeled
        self.streams = shuffled(labeled, args.seed), shuffled(self.unlabeled, args.seed + 1)

    def decode(self, hidden=False):
        """Read, once, the images and the labelled, validation, test masks; `hidden`: all masks."""
        if self.images is None:
            decode(self, hidden)

    def indices(self, part):
        """Image numbers of a part; a labelled patient's slices without masks are unlabelled."""
        units, labeled = set(self.split[part]), set(self.split["labeled"])
        images = list(zip(range(len(self.names)), self.units, self.has_mask, strict=True))
        if part == "unlabeled":
            return [i for i, u, masked in images if u in units or (u in labeled and not masked)]
        return [i for i, u, masked in images if u in units and masked]

    def volumes(self, part):
        """{volume: image numbers in slice order} of a part."""
        groups = itertools.groupby(self.indices(part), lambda i: self.volumes_of[i])
        return {volume: list(indices) for volume, indices in groups}

    def on_device(self, array):
        """An array as a tensor on the device; to a GPU it travels while the CPU goes on."""
        x, cuda = torch.from_numpy(array), "cuda" in self.args.device
        return (x.pin_memory() if cuda else x).to(self.args.device, non_blocking=cuda)

    def load_images(self, indices):
        """Image numbers (B,) -> floats in [0, 1] (B, channels, S, S) on the device."""
        indices = np.asarray(indices)
        if torch.is_tensor(self.images):  # all of them are on the GPU
            return self.images[self.on_device(indices)] / 255
        return self.on_device(self.images[indices]) / 255

    def load_labels(self, indices):
        """Numbers of images with visible masks (B,) -> masks (B, S, S), long, on the device."""
        rows = [self.label_rows[int(i)] for i in indices]
        return self.on_device(self.labels[rows]).long()

    def draw(self):
        """Numbers of the next batch's labelled and of its unlabelled images, two tensors."""
        self.drawn += 1
        sizes = self.args.batch_size, self.args.unlabeled_batch
        return [torch.tensor(list(itertools.islice(stream, n)), dtype=torch.long)
                for stream, n in zip(self.streams, sizes, strict=True)]

    def batch(self, maps=None):
        """What a step trains on, weakly augmented: x_l, y_l, x_u, map_u, index_u.

        Labelled images (B_l, channels, H, W), their masks (B_l, H, W) long, unlabelled images
        (B_u, channels, H, W), and of those the maps (B_u, H, W) uint8, moved alike, out of the
        optional array maps (N, H, W), and their numbers (B_u,) on the CPU.
        """
        rank, processes = world()  # under torchrun each takes its share of the batch
        index_l, index_u = (index[rank::processes] for index in self.draw())
        map_u = [] if maps is None else [self.on_device(maps[index_u.numpy()])]
        flip = self.args.flip
        x_l, y_l = weak(self.load_images(index_l), self.load_labels(index_l), flip=flip)
        x_u, *map_u = weak(self.load_images(index_u), *map_u, flip=flip)
        return x_l, y_l, x_u, map_u[0] if map_u else None, index_u


# ==================== Tools: no need to read these to understand a method =========================

def stop(message, status=2):
    """End the program with a message: what was found, what was expected, what to do."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def some(items, most=4, between=", "):
    """The first items of a list, for a message."""
    return between.join([*map(str, list(items)[:most]), *["..."] * (len(items) > most)])


def explain(kind, error, trace):
    """sys.excepthook: an exhausted memory gets a message, other errors their traceback."""
    words = f"{kind.__name__}: {error}"
    if not re.search("MemoryError|out of memory|not enough memory|t allocate memory", words):
        return sys.__excepthook__(kind, error, trace)
    print("error: out of memory. Lower --batch-size and --unlabeled-batch, --size or --width; "
          "--resume continues from the last checkpoint.", file=sys.stderr)


def world():
    """(rank, number) of this process among those that torchrun started; (0, 1) without it."""
    started = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if started else (0, 1)


def write_aside(path, write):
    """write(temporary path), then rename: readers of `path` find the old or the new file, whole.

    Under torchrun the first process alone writes; everything in a run folder comes through here.
    """
    if world()[0]:
        return
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        if path.suffix in (".pt", ".json"):  # onto the disk, before the old one goes
            with open(aside, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's
        stop(f"{path} cannot be written ({error}); what was there before is still there.", status=1)


def write_json(path, content):
    write_aside(path, lambda aside: aside.write_text(json.dumps(content, indent=1)))


def write_png(path, image):
    write_aside(path, lambda aside: image.save(aside, "PNG"))


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
    add("--compile", action="store_true", help="torch.compile the networks (GPU; slow start)")
    add("--out", default="runs", metavar="FOLDER", help="where run folders go (%(default)s)")
    add("--resume", action="store_true", help="continue the run that these options name")
    add("--val-every", type=one, help="steps between validations (a tenth of --steps)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssl-segmentation"
    add("--cache", default=str(cache), metavar="FOLDER", help="for decoded images (%(default)s)")
    return p


def choose_device(name):
    """"auto" -> cuda, else mps, else cpu; other names are tried."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:  # started by torchrun
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        stop(f"--device {name} cannot be used: {str(error).splitlines()[0]} Expected auto, "
             "cpu, cuda, cuda:1 or mps, on a machine that has it.")
    return name


def parse(parser, argv=None):
    """Parse, and fill in every default; args.options holds what the run folder's name spells."""
    if hasattr(sys.stdout, "reconfigure"):  # lines reach a log file at once, on every console
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    sys.excepthook, args, unit = explain, parser.parse_args(argv), 2**DEPTH
    other = ("data labeled seed supervised out resume device val_every cache compile "
             "debug_oracle").split()
    args.options = {k: v for k, v in vars(args).items()
                    if k not in other and v != parser.get_default(k)}
    size, width, steps = (64, 16, 800) if args.data == "phantom" else (256, 32, 10000)
    args.size, args.width, args.steps = args.size or size, args.width or width, args.steps or steps
    args.val_every = args.val_every or max(1, args.steps // 10)
    if args.size % unit:
        low = args.size // unit * unit
        stop(f"--size {args.size}: expected a multiple of {unit}, since the U-Net halves the image "
             f"{DEPTH} times. Try {low or unit} or {low + unit}.")
    args.device = choose_device(args.device)
    cuda = args.device.startswith("cuda")
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():  # started by torchrun
        if cuda:
            torch.cuda.set_device(args.device)  # NCCL gathers objects through the current device
        dist.init_process_group("nccl" if cuda else "gloo")
        if dist.get_rank():  # the first process speaks for all
            sys.stdout = open(os.devnull, "w")
    if args.batch_size % world()[1] or args.unlabeled_batch % world()[1]:
        stop(f"--batch-size {args.batch_size}, --unlabeled-batch {args.unlabeled_batch}: expected "
             f"multiples of the number of processes, {world()[1]}, which share a batch.")
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
WHOLE = 0.5, 0.5, 1, 1  # the box cx, cy, w, h around an image, in shares of its sides
MAX_CLASS = 31  # a larger number in a mask is no class number (but 255 in a binary mask is)


def parse_name(name):
    """Image name -> (unit, volume, slice number); a name that is not a slice's is its own unit."""
    match = SLICE.match(name)
    return (match["patient"], match["volume"], int(match["slice"])) if match else (name, name, -1)


def list_files(folder, suffix=re.compile("$")):
    """A folder's images {name: path}, by volume and slice; `suffix` is no part of a name."""
    files = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = suffix.sub("", path.stem)
        if path.suffix.lower() in ENDINGS and name[:1] != ".":
            if not path.is_file():
                stop(f"{path} is a folder or a broken link, not an image. Remove it.")
            if (other := files.setdefault(name, path)) != path:
                stop(f"two files for {name}: {other.name} and {path.name}. Keep one.")
    return dict(sorted(files.items(), key=lambda item: (*parse_name(item[0])[1:], item[0])))


def read_ids(path, names):
    """A text file of ids (patients, volumes or image names, one a line) -> its units, sorted."""
    unit_of = {key: parse_name(n)[0] for n in names for key in (n, *parse_name(n)[:2])}
    try:
        ids = list(filter(None, map(str.strip, Path(path).read_text("utf-8-sig").splitlines())))
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{path} cannot be read as a text file of ids, one a line: {error}")
    unknown = [i for i in ids if i not in unit_of]
    if unknown or not ids:
        stop(f"{path}: {len(unknown)} of {len(ids)} ids are not in the dataset: {some(unknown)}. "
             f"Expected at least one id, such as {some(sorted(set(unit_of.values())))}")
    return sorted({unit_of[i] for i in ids})


def choose_labeled(spec, units, names, option="--labeled", what="training units with masks"):
    """An option's share -> units: a file's, or the first of the (seeded) `units`: 5% inside 10%."""
    if Path(spec).is_file():
        chosen = read_ids(spec, names)
        if outside := sorted(set(chosen) - set(units)):
            stop(f"{option} {spec}: not {what}: {some(outside)}. Expected some of {some(units)}")
        return chosen
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", spec)
    value, percent = (float(match[1]), match[2]) if match else (0, "")
    if not percent and value % 1:
        stop(f"{option} {spec}: did you mean {value * 100:g}%? Give a share (10%) or units (7).")
    if value <= 0 or value > (100 if percent else len(units)) or not units:
        stop(f"{option} {spec}: expected a share above 0% and up to 100%, a number of units from "
             f"1 to {len(units)} (the {what}), or a text file of ids.")
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
        if both := sorted(set(lists[a]) & set(lists[b])):
            stop(f"{some(both)}: in {a}.txt and in {b}.txt. A patient may be in one list only.")
    listed = set().union(*lists.values())
    order = np.random.default_rng(split_seed).permutation(units).tolist()
    free, split = [u for u in order if u in with_mask - listed], {}
    for part, share in (("val", 0.1), ("test", 0.2)):
        count = 0 if part in lists else max(1, round(share * len(with_mask)))
        split[part], free = sorted(lists.get(part, free[:count])), free[count:]
    train = set(lists.get("train", free)) | set(units) - with_mask - listed
    candidates = [unit for unit in order if unit in train & with_mask]
    for part, found in (("validation", split["val"]), ("test", split["test"]),
                        ("training", candidates)):
        if not with_mask & set(found):
            stop(f"no {part} units with masks are left: {len(with_mask)} units have masks, "
                 f"{len(listed)} are in lists. Annotate more, or change the lists: each needs one.")
    if labeled is None and len(with_mask) == len(units):
        stop("--labeled is needed, since all images have masks: 10%, 7 units, or a file of ids.")
    split["labeled"] = choose_labeled(labeled or "100%", candidates, names)
    split["unlabeled"] = sorted(train - set(split["labeled"]))
    return split


def find_files(data, args):
    """Fill in a Data object's names, files and split, without opening an image."""
    root, data.phantom, lists = Path(args.data), None, {}
    if args.data == "phantom":
        args.labeled = args.labeled or "10%"
        names, *data.phantom, lists = phantom(args.size)
        images = masks = dict.fromkeys(names)
    else:
        images, masks = list_files(root / "images"), list_files(root / "masks", MASK_SUFFIX)
        layout = ("Expected PATH/images/NAME.png and PATH/masks/NAME.png, with the endings "
                  f"{' '.join(ENDINGS)}; see README, Your own data.")
        if not images:
            place = root / "images" if (root / "images").is_dir() else root
            listed = some(sorted(os.listdir(place))) if root.is_dir() else "no such folder"
            stop(f"--data: no {'folder ' * (place == root)}images in {place} (found: "
                 f"{listed or 'nothing'}). {layout}")
        if orphans := [path.name for name, path in masks.items() if name not in images]:
            stop(f"--data: {len(orphans)} masks have no image of their name: {some(orphans)}; "
                 f"images are {some(images)}. {layout}")
        for part in ("train", "val", "test"):
            if (root / f"{part}.txt").is_file():
                lists[part] = read_ids(root / f"{part}.txt", images)
    data.name = root.resolve().name
    data.names, data.image_files = list(images), list(images.values())
    data.mask_files = [masks.get(name) for name in images]
    data.has_mask = [name in masks for name in images]
    data.units, data.volumes_of, _ = zip(*map(parse_name, data.names), strict=True)
    data.split = make_split(data.names, masks, lists, args.labeled, args.split_seed)
    args.labeled = args.labeled or "100%"
    text = json.dumps(data.split, sort_keys=True)
    data.split_hash = hashlib.sha256(text.encode()).hexdigest()[:8]


# --- Decoding, once -------------------------------------------------------------------------------

def read_pixels(path, mask=False):
    """(H, W) or (H, W, 3) as stored; of palettes the colours, in masks (if not 0/255) indices."""
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                if getattr(image, "n_frames", 1) > 1:
                    raise ValueError(f"{image.n_frames} pages in a file; expected one file a slice")
                grey = "L" if image.mode in ("1", "L", "LA") else "RGB"
                array = np.asarray(image.convert(image.mode if image.mode[0] in "IF" else grey))
                if mask and image.mode == "P" and (np.ptp(array, 2).any() or (array % 255).any()):
                    array = np.asarray(image)
        if array.ndim < 2 or not array.size or array.shape[2:] not in ((), (1,), (3,), (4,)):
            raise ValueError(f"an array of shape {array.shape}; expected (H, W) or (H, W, 3)")
        if array.dtype.kind not in "buif" or not np.isfinite(array).all():
            raise ValueError(f"values of type {array.dtype} or not finite; expected numbers")
        array = array.astype(np.uint8) * 255 if array.dtype == bool else array
    except Exception as error:  # Pillow and NumPy raise a dozen types on damaged files
        problem = f"{path.name}: cannot be used ({type(error).__name__}: {error})"
        raise ValueError(problem) from None
    return array if array.ndim == 2 else array[..., 0] if array.shape[2] == 1 else array[..., :3]


def read_volume(paths, bad):
    """{path: image, (H, W) or (H, W, 3) uint8} of a volume; what cannot be read is told to `bad`.

    8-bit images stay as they are, others are scaled together by their 0.5-99.5 percentiles.
    """
    arrays = {}
    for path in paths:
        try:
            arrays[path] = read_pixels(path)
        except ValueError as error:
            bad.append(str(error))
    if any(array.dtype != np.uint8 for array in arrays.values()):
        values = np.concatenate([array.ravel() for array in arrays.values()]).astype(float)
        low, high = np.percentile(values, [0.5, 99.5])
        for path, array in arrays.items():
            scaled = (array - low) / max(high - low, 1e-12) * 255
            arrays[path] = scaled.clip(0, 255).astype(np.uint8)
    return arrays


def read_mask(path):
    """A mask -> class numbers (H, W) uint8 and "binary" (0/255, cut at 127), "classes", "empty"."""
    array, lossy = read_pixels(path, mask=True), path.suffix.lower() in (".jpg", ".jpeg")
    if array.ndim == 3 and np.ptp(array, 2).any() and not lossy:
        raise ValueError(f"{path.name}: a mask in colours; expected class numbers, or 0 and 255")
    array = array[..., 0] if array.ndim == 3 else array
    values = np.unique(array)
    near_ends = (values <= MAX_CLASS) | (values >= 255 - MAX_CLASS)
    if lossy or (MAX_CLASS < values[-1] <= 255 and near_ends.all()):
        return (array > 127).astype(np.uint8), "binary" if values[-1] > 127 else "empty"
    if values[0] < 0 or values[-1] > MAX_CLASS or (values % 1).any():
        raise ValueError(f"{path.name}: mask values {some([f'{v:g}' for v in values])}; expected "
                         f"class numbers 0, 1, 2, ... up to {MAX_CLASS}, or 0 and 255")
    return array.astype(np.uint8), "classes" if values[-1] else "empty"


def cached(args, what, files, count, read, resample):
    """`count` pictures (N, channels, S, S) uint8, memory-mapped, and (N, 3) height, width, maximum.

    read(bad) yields PIL images and tells the list `bad` what is wrong with files. The cache file
    is named after the files' names, sizes and times, built aside and renamed.
    """
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(repr(("v5", what, args.size, stats)).encode()).hexdigest()[:20]
    path, bad = Path(args.cache, key), []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with tempfile.TemporaryDirectory("", "building-", path.parent, True) as folder:
                with open(Path(folder, key), "wb") as file:
                    for image in tqdm(read(bad), f"decoding {what}", count, leave=False,
                                      disable=None):
                        small = np.atleast_3d(image.resize((args.size, args.size), resample))
                        facts = np.array([image.height, image.width, np.max(image)], np.uint32)
                        file.write(facts.tobytes() + small.transpose(2, 0, 1).tobytes())
                if bad:
                    stop(f"{len(bad)} bad files among the {what}; mend or remove them:\n  "
                         + some(bad, 10, "\n  "))
                with contextlib.suppress(PermissionError):  # Windows: another run has it already
                    os.replace(Path(folder, key), path)
        rows = np.memmap(path, np.uint8, "r").reshape(count, -1)
    except (OSError, ValueError) as error:  # ValueError: a file that lost its end in a power cut
        stop(f"the cache of decoded images, {path.parent}, cannot be used ({error}). Free "
             "some space, choose another with --cache FOLDER, or delete that one.")
    return rows[:, 12:].reshape(count, -1, args.size, args.size), rows[:, :12].copy().view("u4")


def decode(data, hidden):
    """Fill in a Data object's pixels, from the cache if it has them. Opens visible masks only."""
    shown = [i for part in ("labeled", "val", "test") for i in data.indices(part)]
    shown = list(np.flatnonzero(data.has_mask)) if hidden else shown
    data.label_rows, first = {i: row for row, i in enumerate(shown)}, {}

    def read_images(bad):
        for _, paths in itertools.groupby(data.image_files, lambda p: parse_name(p.stem)[1]):
            for path, array in read_volume(paths, bad).items():
                if array.ndim > first.setdefault("dimensions", array.ndim):
                    bad.append(f"{path.name}: in colour, the first image is grey; save all alike")
                yield Image.fromarray(array).convert("RGB" if first["dimensions"] == 3 else "L")

    def read_masks(bad):
        for i in shown:
            try:
                mask, kind = read_mask(path := data.mask_files[i])
                if mask.shape != data.sizes[i]:
                    raise ValueError("{}: {} x {} pixels, but its image has {} x {}".format(
                        path.name, *mask.shape, *data.sizes[i]))
            except ValueError as error:
                bad.append(str(error))
                continue
            first.setdefault(kind, path.name)
            if "binary" in first and "classes" in first:
                stop(f"some masks are binary 0/255 ({first['binary']}), others hold class numbers "
                     f"({first['classes']}). Write all of them in one of the two ways.")
            yield Image.fromarray(mask)

    def read_truth(i):
        try:
            return read_mask(data.mask_files[i])[0]
        except ValueError as error:  # of a visible mask it was raised, and told, when decoding
            stop(f"bad file among the hidden masks: {error}")

    if data.phantom:
        data.images, masks = data.phantom
        data.sizes, data.labels = [masks.shape[1:]] * len(masks), masks[shown]
        data.truth, largest = masks.__getitem__, int(masks.max())
    else:
        data.images, facts = cached(data.args, "images", data.image_files, len(data.names),
                                    read_images, Image.BILINEAR)
        data.sizes = [(h, w) for h, w, _ in facts.tolist()]
        files = [path for i in shown for path in (data.image_files[i], data.mask_files[i])]
        labels, facts = cached(data.args, "masks", files, len(shown), read_masks, Image.NEAREST)
        data.labels, largest = labels[:, 0], int(facts[:, 2].max())
        data.truth = read_truth
    data.channels, data.classes = data.images.shape[1], data.args.classes or largest + 1
    if "cuda" in data.args.device:  # kept on the GPU where they take little of it
        if data.images.nbytes < torch.cuda.mem_get_info(data.args.device)[0] / 4:
            data.images = torch.from_numpy(np.array(data.images)).to(data.args.device)
    known = Path(data.args.data, "classes.txt")  # names for people, one a line, background first
    text = known.read_text("utf-8", "replace") if known.is_file() else "background"
    named = [line.strip() for line in text.split("\n") if line.strip()][:data.classes]
    data.class_names = named + [f"class {c}" for c in range(len(named), data.classes)]
    for volume, indices in [*data.volumes("val").items(), *data.volumes("test").items()]:
        if len(found := {data.sizes[i] for i in indices}) > 1:
            stop(f"the slices of {volume} differ in size: {some(found)}. Expected one size.")
    if largest == 0:
        stop("labelled, validation and test masks hold background only; expected 1, 2, ... or 255.")
    if largest >= data.classes:
        stop(f"--classes {data.classes}, but the masks hold class {largest}. Expected at least "
             f"{largest + 1}.")


def boxes_of(mask):
    """Class numbers (H, W) -> [(c, cx, cy, w, h)], a box for each 4-connected region but of 0."""
    start, (h, w), boxes = np.ones(mask.shape, bool), mask.shape, []
    start[:, 1:] = mask[:, 1:] != mask[:, :-1]  # a run of equal pixels along a row starts
    run = start.cumsum().reshape(h, w) - 1
    touch = (mask[1:] == mask[:-1]) & (start[1:] | start[:-1])  # a run touches one in the next row
    a, b, region = run[:-1][touch], run[1:][touch], np.arange(run.max() + 1)
    while (region[a] != region[b]).any():  # the smallest number of a region spreads
        low = np.minimum(region[a], region[b])
        np.minimum.at(region, region[a], low)
        np.minimum.at(region, region[b], low)
        region = region[region]
    region = region[run]
    for number in np.unique(region[mask > 0]):
        y, x = np.nonzero(region == number)
        x0, x1, y0, y1 = x.min() / w, (x.max() + 1) / w, y.min() / h, (y.max() + 1) / h
        boxes.append((int(mask[y[0], x[0]]), (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0))
    return boxes


def read_boxes(path, kind, classes):
    """boxes/NAME.txt or tags/NAME.txt -> [(c, cx, cy, w, h)]; a tag is a box around everything."""
    boxes, form = [], {"boxes": "class cx cy w h", "tags": "class"}[kind]
    for number, line in enumerate(path.read_text("utf-8-sig", "replace").splitlines(), 1):
        words = line.split()
        for row in [[word, *WHOLE] for word in words] if kind == "tags" else filter(None, [words]):
            try:
                c, cx, cy, w, h = int(row[0]), *map(float, row[1:])
            except ValueError:
                stop(f"{path}, line {number}: {line!r}; expected: {form}")
            if not 0 < c < classes:
                stop(f"{path}, line {number}: class {c}; expected 1 to {classes - 1}, as in masks"
                     + (". YOLO counts from 0? add 1" if c == 0 else " (--classes gives more)"))
            if not (-1e-3 < cx - w / 2 < cx + w / 2 < 1.001 > cy + h / 2 > cy - h / 2 > -1e-3):
                stop(f"{path}, line {number}: {line!r}: the box is empty or leaves the image; "
                     f"expected {form}, from 0 to 1, shares of the image's width and height")
            boxes.append((c, cx, cy, w, h))
    return boxes


def annotations(data, kind, spec):
    """Boxes or tags: those of PATH/kind, and for `spec` of the hidden units derived from masks.

    -> {image number: [(c, cx, cy, w, h)] in shares of width and height}; a tag is a box around
    everything. Call data.decode() first. Of hidden masks, only those of `spec` are opened.
    """
    found, number = {}, {name: i for i, name in enumerate(data.names)}
    for path in [] if data.phantom else sorted(Path(data.args.data, kind).glob("[!.]*.txt")):
        if path.stem not in number or not path.is_file():
            stop(f"{path}: no image has this name, or it is no file. Rename or remove it.")
        found[number[path.stem]] = read_boxes(path, kind, data.classes)
    hidden = [i for i in data.indices("unlabeled") if data.has_mask[i]]
    order, has = np.random.default_rng(data.args.split_seed), {data.units[i] for i in hidden}
    units = [u for u in order.permutation(sorted(set(data.units))).tolist() if u in has]
    units = units[::-1] if kind == "tags" else units  # from the other end: few have both
    units = choose_labeled(spec, units, data.names, f"--{kind}", "hidden units") if spec else []
    chosen = set(units)
    hidden = [i for i in hidden if data.units[i] in chosen]
    for i in tqdm(hidden, f"reading masks for {kind}", leave=False, disable=None):
        mask = data.truth(i)
        if mask.max() >= data.classes:
            stop(f"the mask of {data.names[i]} holds class {mask.max()}. Give --classes.")
        tags = [(int(c), *WHOLE) for c in np.unique(mask[mask > 0])]
        found.setdefault(i, tags if kind == "tags" else boxes_of(mask))
    return found


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
        cx, cy, turn, radius, wall, aspect, blood, muscle, fat, gamma = rng.uniform(
            [-0.2, -0.2, -0.6, 0.24, 0.09, 0.8, 0.6, 0.25, 0.1, 0.6],
            [0.2, 0.2, 0.6, 0.36, 0.15, 1.25, 0.95, 0.5, 0.8, 1.6]).tolist()
        slope = rng.normal(size=2) * 0.25
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

class Run:
    """One training run: device and precision, the loop's steps, log, checkpoints and scores."""

    def __init__(self, name, args, data):
        self.name, self.args, self.data = name, args, data
        self.labeled = Path(args.labeled).name.removesuffix(".txt")
        parent, start = Path(args.out, data.name), f"{name}-{self.labeled}-seed{args.seed}"
        options = sorted((k, re.sub(r"[\\/:]", "_", str(v))) for k, v in args.options.items())
        title = start + "".join(f"-{k}_{v[-40:]}" for k, v in options)
        found = sorted(p.name for p in parent.glob("*") if f"{p.name}-".startswith(f"{start}-"))
        same = [re.fullmatch(re.escape(title) + r"(?:-(\d+))?", folder) for folder in found]
        numbers = [int(match[1] or 1) for match in same if match]
        resumed = args.resume and bool(numbers)
        if args.resume and found and not numbers:
            stop(f"--resume: no run {title}; there is {some(found)}. Repeat the run's options "
                 "(only --out, --device and --val-every may change), or leave --resume out.")
        data.decode()  # before the folder: a dataset that stops leaves none behind
        self.rank, self.processes = world()
        try:
            for n in itertools.count(max(numbers, default=0) + (not resumed)):
                folder = parent / (title if n == 1 else f"{title}-{n}")
                with contextlib.suppress(FileExistsError):  # another run may have taken it now
                    if not self.rank:
                        folder.mkdir(parents=True, exist_ok=resumed)
                    break
            self.folder, self.resumed = self.gather((folder, resumed))[0]
            split = self.folder / "split.json"
            old = json.loads(split.read_text())["hash"] if split.exists() else data.split_hash
        except OSError as error:
            stop(f"--out {args.out} cannot be written ({error}). Choose another folder.")
        if old != data.split_hash:
            stop(f"--resume: {self.folder} has split {old}, the dataset {data.split_hash}. Restore "
                 "the dataset's files and lists, or leave --resume out.")
        write_json(split, {"hash": data.split_hash, **data.split})
        write_json(self.folder / "args.json", vars(args))
        torch.manual_seed(args.seed + 1000 * self.rank)
        torch.backends.cudnn.benchmark = True
        self.device_type = torch.device(args.device).type
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=args.precision == "fp16")
        self.first_step, self.best, self.interrupted = 0, -1.0, False
        self.sums, self.count, self.rows = {}, 0, []

    def gather(self, value):
        """[value] of this process, or under torchrun of all, by rank."""
        values = [value] * self.processes
        if self.processes > 1:
            dist.all_gather_object(values, value)
        return values

    def average(self, tensors):
        """Under torchrun: replace each tensor by its mean over the processes; else do nothing."""
        for tensor in tensors if self.processes > 1 else ():
            dist.all_reduce(tensor)
            tensor /= self.processes

    def average_statistics(self):
        """Under torchrun: the mean of the processes' BatchNorm statistics, in all networks."""
        self.average(buffer for network in self.networks.values() for buffer in network.buffers()
                     if buffer.is_floating_point())

    def load(self, name):
        """Load a checkpoint's networks; returns all that it holds."""
        state = torch.load(self.folder / name, map_location="cpu", weights_only=True)
        for k, network in self.networks.items():
            network.load_state_dict(state["networks"][k])
        return state

    def autocast(self):
        """Context for the networks' forward passes: bf16 or fp16 on GPUs, float32 elsewhere."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[self.args.precision]
        return torch.autocast(self.device_type, dtype=dtype, enabled=dtype is not None)

    def place(self, networks):
        """Move {name: network} to the device."""
        for network in networks.values():
            # channels-last is faster on CPUs; on MPS BatchNorm's gradient fails with it
            form = torch.contiguous_format if self.device_type == "mps" else torch.channels_last
            network.to(self.args.device, memory_format=form)
            for tensor in network.state_dict().values() if self.processes > 1 else ():
                dist.broadcast(tensor, 0)  # all processes start alike
            for module in (network, *network.children()) if self.args.compile else ():
                module.compile()  # parts, too: a method may call an encoder alone
        return networks

    def keep(self, networks, optimizers, predict, pictures):
        """What checkpoints hold and evaluation uses. Prints the set-up; on --resume loads last.pt.

        predict(networks, x) -> {name: probabilities (B, C, H, W)}, the one that the paper deploys
        first; pictures(networks, x) -> columns of preview.png, as save_sheet takes them.
        """
        self.networks, self.predict, self.pictures = networks, predict, pictures
        data, args = self.data, self.args
        with evaluating(networks):
            self.reported = list(predict(networks, data.load_images([0])))
        self.parts = {f"optimizer {i}": optimizer for i, optimizer in enumerate(optimizers)}
        self.parts["scaler"] = self.scaler
        units = ", ".join(f"{len(data.indices(k))} images of {len(units)} units {k}"
                          for k, units in data.split.items())
        print(f"{self.name} on {data.name}: {data.classes} classes; {args.device}, "
              f"{args.precision}, {torch.get_num_threads()} threads\n{units}; split "
              f"{data.split_hash}\nlabelled: {some(data.split['labeled'])}\n"
              f"run folder: {self.folder}")
        if self.resumed and (self.folder / "last.pt").exists():
            try:
                state = self.load("last.pt")
                self.rows = state["rows"]
            except Exception as error:  # torch.load raises a dozen types
                stop(f"--resume: {self.folder}/last.pt cannot be used ({type(error).__name__}: "
                     f"{str(error)[:200]}). Leave --resume out to start anew.")
            if len(state["rng"]) != self.processes:
                stop(f"--resume: the run had {len(state['rng'])} processes, now {self.processes}.")
            for k, part in self.parts.items():
                if state[k]:  # {}: a gradient scaler that was off, on another device
                    part.load_state_dict(state[k])
            cpu, cuda = state["rng"][self.rank]
            torch.set_rng_state(cpu)
            if self.device_type == "cuda" and cuda is not None:
                torch.cuda.set_rng_state(cuda, args.device)
            self.first_step, self.best, self.count = state["step"], state["best"], state["count"]
            self.sums = {k: v.to(args.device) for k, v in state["sums"].items()}
            for _ in range(state["drawn"]):
                data.draw()
        if args.resume:
            what = "continuing" if self.first_step else "no checkpoint yet, starting"
            print(f"--resume: {what} at step {self.first_step}")

    def steps(self, stride=1):
        """0, stride, ... below --steps, with a progress bar. Ctrl-C ends the run after a turn."""
        def interrupt(*_):
            if self.interrupted and self.processes == 1:  # torchrun repeats signals itself
                raise KeyboardInterrupt
            self.interrupted = True

        first, total, start, self.stride = self.first_step, self.args.steps, time.time(), stride
        handlers = {}
        with contextlib.suppress(ValueError):  # not in the main thread: leave signals alone
            handlers = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(total=total, initial=first, desc=self.name,
                        disable=True if self.rank else None)  # None: if output is no terminal
        try:
            for step in range(first, total, stride):
                start = time.time() if step <= first + 2 else start
                hours = (time.time() - start) / 8 * (total - step) / 3600
                if step == first + 10 and hours > 1:
                    tqdm.write(f"This run will take about {hours:.1f} hours on this machine. "
                               "A short one: --size 96 --width 16 --steps 1500", sys.stdout)
                yield step
                self.bar.update(stride)
        finally:
            self.bar.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)

    def backward(self, loss):
        """loss.backward(), scaled where the precision is fp16; under torchrun, mean gradients."""
        self.scaler.scale(loss).backward()
        self.average(p.grad for network in self.networks.values() for p in network.parameters()
                     if p.grad is not None)

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
        args, data, done = self.args, self.data, step + self.stride
        validate = done % args.val_every < self.stride or done == args.steps
        write = done % 20 < self.stride or validate
        if not (write or (self.interrupted and self.processes == 1)):
            return
        self.interrupted = any(self.gather(self.interrupted))
        row, better = {k: v.item() / self.count for k, v in self.sums.items()}, False
        for k, value in row.items():
            if not math.isfinite(value):
                stop(f"{k} is {value} between steps {done - self.count * self.stride} and {done}; "
                     f"{self.folder} has the checkpoint before that. Lower --lr.", status=1)
        self.bar.set_postfix({k: f"{row[k]:.3f}" for k in ("loss", "lam") if k in row},
                             best=f"{self.best:.1f}")
        row = {"step": done, **row, "val_dice": ""}
        if validate or self.interrupted:
            self.average_statistics()
        if validate:
            scores = evaluate(self.predict, self.networks, data, "val", distances=False)
            dice = {k: s["dice"] or 0.0 for k, s in scores.items()}
            tqdm.write(f"step {done}/{args.steps}  loss {row['loss']:.3f}  validation Dice "
                       + ", ".join(f"{k} {d:.1f}" for k, d in dice.items()), sys.stdout)
            row["val_dice"] = reported = next(iter(dice.values()))
            better, self.best = reported > self.best, max(reported, self.best)
        if write:
            self.rows.append(list(map(str, row.values())))
            self.sums, self.count = {}, 0
        lines = "".join(",".join(cells) + "\n" for cells in [list(row), *self.rows])
        write_aside(self.folder / "log.csv", lambda aside: aside.write_text(lines))
        if validate or self.interrupted:  # best.pt: what predicting needs, last.pt: what --resume
            state = {"method": self.name, "step": done, "best": self.best, "size": args.size,
                     "width": args.width, "channels": data.channels, "classes": data.classes,
                     "class_names": data.class_names, "reported": self.reported,
                     "scaling": "8 bit / 255, others by their volume's 0.5 to 99.5 percentiles",
                     "networks": {k: network.state_dict() for k, network in self.networks.items()}}
            if better:
                write_aside(self.folder / "best.pt", lambda aside: torch.save(state, aside))
            cuda = torch.cuda.get_rng_state(args.device) if self.device_type == "cuda" else None
            state |= {k: part.state_dict() for k, part in self.parts.items()}
            state |= {"rng": self.gather((torch.get_rng_state(), cuda)), "sums": self.sums,
                      "count": self.count, "rows": self.rows, "drawn": data.drawn}
            write_aside(self.folder / "last.pt", lambda aside: torch.save(state, aside))
        if self.interrupted:
            self.bar.close()
            words, n = shlex.join(word for word in sys.argv if word != "--resume"), self.processes
            start = f"torchrun --nproc-per-node {n}" if n > 1 else "python"
            print(f"stopped; saved at step {done}. To continue: {start} {words} --resume")
            sys.exit(130)

    def finish(self):
        """Score the test units, once, with the best and last networks; write and return results."""
        data, args = self.data, self.args
        if self.rank:  # no one waits for the first process, which may have a disk of its own
            return {}
        chosen = examples(data, "val")
        x = data.load_images(chosen)
        with evaluating(self.networks):
            columns = {"image": x, "truth": data.load_labels(chosen)}
            columns |= {k: p.argmax(1) for k, p in self.predict(self.networks, x).items()}
            columns |= self.pictures(self.networks, x)
        save_sheet(self.folder / "preview.png", x, columns)
        last = evaluate(self.predict, self.networks, data, "test")
        best_step = self.load("best.pt")["step"]
        best = last  # the same networks, unless an earlier step was better
        if best_step < args.steps:
            best = evaluate(self.predict, self.networks, data, "test")
        name, head = next(iter(last.items()))
        results = {"method": self.name, "dataset": data.name, "labeled": self.labeled,
                   "options": args.options, "seed": args.seed, "steps": args.steps,
                   "split": data.split_hash,
                   "headline": {"network": name, **{m: head[m] for m in METRICS}},
                   "best_step": best_step,
                   "networks": {k: {"best": best[k], "last": last[k]} for k in last}}
        write_json(self.folder / "results.json", results)
        print(f"\nTest: {len(data.volumes('test'))} volumes of {len(data.split['test'])} units\n"
              f"{'network, checkpoint':32}  Dice % Jaccard %  HD95 px ASD px")
        for k in last:
            for label, scores in (("last", last[k]), (f"best on val ({best_step})", best[k])):
                cells = ["n/a" if scores[m] is None else f"{scores[m]:.2f}" for m in METRICS]
                mark = "  <- headline" * ((k, label) == (name, "last"))
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


def examples(data, part):
    """The middle slices of at most four volumes of a part, for pictures: image numbers."""
    volumes = list(data.volumes(part).values())
    return [v[len(v) // 2] for v in volumes[::max(1, len(volumes) // 4)]][:4]


def save_sheet(path, x, columns):
    """A PNG of titled columns about images x (B, channels, H, W): {title: label maps (B, H, W) over
    x, or heat (B, H, W) float, or other images (B, channels, H, W), or (images, label maps)}."""
    tiles = []
    for column in columns.values():
        images, labels = column if isinstance(column, tuple) else (x, column)
        if labels.dim() == 3 and labels.is_floating_point():  # heat, from 0 to its largest value
            labels = labels[:, None] / labels.amax().clamp_min(1e-8)
        if labels.dim() == 4:  # images
            images, labels = labels, torch.zeros_like(labels[:, 0], dtype=torch.long)
        tiles.append(list(map(overlay, images.cpu(), labels.cpu())))
    tiles = [F.interpolate(tile[None], (160, 160))[0] for row in zip(*tiles, strict=True)
             for tile in row]
    grid = make_grid(tiles, nrow=len(columns), pad_value=255)
    sheet = tvf.to_pil_image(F.pad(grid, (0, 0, 40, 0), value=255))
    for i, title in enumerate(columns):
        ImageDraw.Draw(sheet).text((4 + i * 162, 3), title, "black", ImageFont.load_default(13))
    write_png(path, sheet)


def check(args):
    """The data doctor: everything about a dataset that a run depends on. Reads hidden masks too."""
    data = Data(args)
    data.decode(hidden=True)
    names, labels = data.names, data.labels
    counts = sum(np.bincount(mask.ravel(), minlength=256) for mask in labels)
    print(f"{data.name}: {len(names)} images, {len(labels)} with masks, {len(set(data.units))} "
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
    x, path = data.load_images(chosen), Path(args.out) / data.name / "check.png"
    save_sheet(path, x, {"image": x, "mask": data.load_labels(chosen)})
    print(f"no problem found; look at {path}")


def load_run(path, device, what="run"):
    """A run folder or a checkpoint file -> (its contents, networks, the method's predict)."""
    path = Path(path, "last.pt") if Path(path).is_dir() else Path(path)
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        method = {"supervised": "mean_teacher"}.get(state["method"], state["method"])
        if not (method.isidentifier() and Path(__file__).with_name(f"{method}.py").exists()):
            raise ValueError(f"made by {method}, which is not here")
        module = importlib.import_module(method)
        networks = module.build(state["channels"], state["classes"], state["width"])
        networks = {k: networks[k].to(device) for k in state["networks"]}
        for k, network in networks.items():
            network.load_state_dict(state["networks"][k])
    except Exception as error:  # torch.load raises a dozen types on damaged files
        stop(f"{what} {path} cannot be used ({type(error).__name__}: {str(error)[:200]}). Expected "
             "a run folder, or its last.pt or best.pt.")
    return state, networks, module.predict


def load_network(path, network):
    """--init: copy the first network of a run that has this one's layers and sizes."""
    state, found, _ = load_run(path, "cpu", "--init")
    for name in sorted(found, key=lambda name: name != state["reported"][0]):
        with contextlib.suppress(RuntimeError):  # another architecture, or other sizes
            network.load_state_dict(found[name].state_dict())
            return print(f"--init: starting from {name} of {path}")
    stop(f"--init {path} holds {some(found)}, none with this run's layers and sizes. Expected the "
         "U-Net of a run on the same dataset and with the same --width.")


def hidden_dice(labels, data):
    """For --debug-oracle, to print: label maps (N, S, S) against hidden masks, if there are any."""
    known, found = [i for i in data.unlabeled if data.has_mask[i]], []
    for i in known:
        mask = Image.fromarray(data.truth(i)).resize(labels.shape[:0:-1], Image.NEAREST)
        for c in range(1, data.classes):
            scores = mask_scores(labels[i] == c, np.asarray(mask) == c, distances=False)
            found += [scores["dice"]] if scores else []
    mean = f"{sum(found) / len(found):.2f}" if found else "unknown"
    return f"Dice of pseudo-labels {mean} ({len(known)} images with hidden masks)"


def predict_images(args):
    """Segment images with a run's network: masks of class numbers at each image's size, overlays.

    Files that cannot be read are named and skipped; the exit status is then 1.
    """
    state, networks, predict = load_run(args.run, args.device)
    source = args.images / "images" if (args.images / "images").is_dir() else args.images
    files = list(list_files(source).values()) if source.is_dir() else [source] * source.is_file()
    if not files:
        stop(f"--images {args.images}: no images there. Expected files {' '.join(ENDINGS)}.")
    network = args.network or state["reported"][0]
    if network not in state["reported"]:
        stop(f"--network {network}: the run has {', '.join(state['reported'])}.")
    size, names, bad = (state["size"],) * 2, state["class_names"][1:], []
    mode = "L" if state["channels"] == 1 else "RGB"
    flips = [(), (2,), (3,), (2, 3)] if args.tta else [()]

    images = ((path.stem, Image.fromarray(array).convert(mode))
              for _, paths in itertools.groupby(files, lambda path: parse_name(path.stem)[1])
              for path, array in read_volume(paths, bad).items())
    with tqdm(total=len(files), desc="predicting", disable=None) as bar, evaluating(networks):
        while chunk := list(itertools.islice(images, 16)):
            x = [tvf.to_image(image.resize(size, Image.BILINEAR)) for _, image in chunk]
            x = torch.stack(x).to(args.device) / 255
            probs = sum(predict(networks, x.flip(f))[network].flip(f) for f in flips)
            for (name, image), p in zip(chunk, probs, strict=True):
                p = F.interpolate(p[None], image.size[::-1], mode="bilinear")
                label = p.argmax(1)[0].to(torch.uint8).cpu()
                picture = tvf.to_pil_image(overlay(tvf.to_image(image) / 255, label))
                sheet = Image.new("RGB", (max(image.width, 150), image.height + 16 * len(names)))
                sheet.paste(picture)
                for c, title in enumerate(names):  # the legend
                    ImageDraw.Draw(sheet).text((4, image.height + 16 * c), title,
                                               COLORS[c % len(COLORS)], ImageFont.load_default(12))
                mask, file = Image.fromarray(label.numpy()), f"{name}.png"
                write_png(args.out / "masks" / file, mask)
                write_png(args.out / "overlays" / file, sheet)
                bar.update()
    print(f"{len(files) - len(bad)} of {len(files)} images segmented by {network} of {args.run}, "
          f"{state['method']} at step {state['step']}: {args.out}/masks and {args.out}/overlays")
    if bad:
        stop(f"{len(bad)} files could not be read and were skipped:\n  "
             + some(bad, 10, "\n  "), status=1)


def save_strips(rows, out):
    """For each dataset a picture of the same test images by each row's run of the lowest seed."""
    for dataset in {key[0] for key in rows}:
        columns = {}
        for key in sorted(key for key in rows if key[0] == dataset):
            run = rows[key][min(rows[key])]
            if not columns:
                args = json.loads((run["folder"] / "args.json").read_text()) | {"device": "cpu"}
                data = Data(argparse.Namespace(**args))
                data.decode()
                chosen = examples(data, "test")
                x = data.load_images(chosen)
                columns = {"image": x, "truth": data.load_labels(chosen)}
            state, networks, predict = load_run(run["folder"], "cpu")
            with evaluating(networks):
                labels = predict(networks, x)[state["reported"][0]].argmax(1)
            dice = run["headline"]["dice"]
            columns[f"{key[-1]}\n{key[2]}, Dice {math.nan if dice is None else dice:.1f}"] = labels
        save_sheet(out / f"{dataset}.png", x, columns)


def compare(folders, out):
    """A table of runs as Markdown and CSV, and a strip of test images; see the README."""
    runs, known, rows = [], {}, {}
    for folder in map(Path, folders):
        try:
            run, split = (json.loads((folder / name).read_text())
                          for name in ("results.json", "split.json"))
            runs.append(run | {"folder": folder, "options": list(run["options"].items())})
        except (OSError, ValueError, KeyError) as error:  # KeyError: of an earlier version
            stop(f"{folder} is not the folder of a finished run: {error!r}")
        for key, value in ((run["dataset"], split["val"] + split["test"]),
                           ((run["dataset"], run["labeled"]), split["hash"])):
            first, expected = known.setdefault(key, (folder, value))
            if value != expected:
                stop(f"{folder} and {first} have different splits. Compare runs on the same units.")
    shared = set.intersection(*(set(run["options"]) for run in runs))
    for run in runs:  # a row is named by the options that not all runs share
        options = [f"{k}={v}" for k, v in run["options"] if (k, v) not in shared]
        key = (run["dataset"], run["labeled"] == "100%", run["labeled"],
               run["method"] != "supervised", " ".join([run["method"], *options]))
        rows.setdefault(key, {})[run["seed"]] = run

    def scores(row):
        """Dice (seeds, volumes, classes), masked where undefined, in one order of volumes."""
        heads = [r["networks"][r["headline"]["network"]]["last"]["volumes"] for r in row.values()]
        return np.ma.masked_invalid([[[(s or {"dice": np.nan})["dice"] for s in head[v].values()]
                                      for v in sorted(head)] for head in heads])

    def dice(a, chosen):
        """Mean over chosen volumes (R, V), then over classes, then over seeds: (R,)."""
        return a[:, chosen].mean(2).mean(2).mean(0).filled(np.nan)

    table = [["dataset", "labelled", "method", "seeds", "Dice %", "Jaccard %", "HD95 px", "ASD px",
              "gain in Dice (95% interval)"]]
    for key, row in sorted(rows.items()):
        values = np.array([[run["headline"][m] for m in METRICS] for run in row.values()], float)
        cells = [f"{m:.2f} ± {s:.2f}" if len(row) > 1 else f"{m:.2f}" for m, s in
                 zip(values.mean(0), values.std(0, ddof=len(row) > 1), strict=True)]
        base, gain = rows.get((*key[:3], False, "supervised")), ""
        if base and key[3]:
            a, b = scores(row), scores(base)
            chosen = np.random.default_rng(0).integers(a.shape[1], size=(2000, a.shape[1]))
            low, high = np.nanpercentile(dice(a, chosen) - dice(b, chosen), [2.5, 97.5])
            every = np.arange(a.shape[1])[None]
            gain = f"{(dice(a, every) - dice(b, every))[0]:+.2f} ({low:+.2f} to {high:+.2f})"
        table.append([key[0], key[2], key[4], " ".join(map(str, sorted(row))), *cells, gain])
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|-" * len(table[0]) + "|")
    text, cells = "\n".join(lines) + "\n", io.StringIO()
    csv.writer(cells, lineterminator="\n").writerows(table)
    write_aside(out / "comparison.md", lambda aside: aside.write_text(text, "utf-8"))
    write_aside(out / "comparison.csv", lambda aside: aside.write_text(cells.getvalue(), "utf-8"))
    print("\n".join(lines))
    save_strips(rows, out)
    print(f"comparison.md, comparison.csv and a picture of each dataset are in {out}")


def main(argv=None):
    command, *argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    p = argparse.ArgumentParser(f"common.py {command}")
    add = p.add_argument
    if command == "check":
        args = parse(parser(check.__doc__), argv)
        args.labeled, args.device = args.labeled or "", "cpu"  # "": all masks, but on the phantom
        check(args)
    elif command == "phantom":
        add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
        add("--size", type=number(int, 16), default=64)
        args = p.parse_args(argv)
        if args.out.exists():
            stop(f"--out {args.out} exists. Name a new folder.")
        names, images, masks, lists = phantom(args.size)
        for part, arrays in (("images", images[:, 0]), ("masks", masks)):
            for name, array in zip(names, arrays, strict=True):
                write_png(args.out / part / f"{name}.png", Image.fromarray(array))
        for part, units in lists.items():
            (args.out / f"{part}.txt").write_text("\n".join(units) + "\n")
        print(f"{len(names)} images in {args.out}. Try:\n"
              f"python mean_teacher.py --data {args.out} --size {args.size} --width 16 --steps 800 "
              "--labeled 10%")
    elif command == "predict":
        p.description = predict_images.__doc__
        add("--run", required=True, metavar="RUN", help="a run folder, or its best.pt or last.pt")
        add("--images", type=Path, required=True, metavar="PATH", help="a folder, or one image")
        add("--out", type=Path, required=True, metavar="FOLDER", help="for masks and overlays")
        add("--network", help="which network of the run (default: the one its paper deploys)")
        add("--tta", action="store_true", help="mean over the image and its three mirror images")
        add("--device", default="auto", help="auto (cuda, else mps, else cpu), or a name")
        args = p.parse_args(argv)
        args.device = choose_device(args.device)
        predict_images(args)
    elif command == "compare":
        p.description = compare.__doc__
        add("runs", nargs="+", metavar="RUN", help="folders of finished runs")
        add("--out", type=Path, default="comparison", metavar="FOLDER")
        args = p.parse_args(argv)
        compare(args.runs, args.out)
    else:
        print(__doc__)
        sys.exit(0 if command in ("-h", "--help") else 2)


if __name__ == "__main__":
    main()
