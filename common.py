"""What the six method files share. Read the course part; the tools are for looking things up.

Course part  U-Net: conv_block Encoder DecoderBlock Decoder UNet
             Shared formulas: supervised_loss ramp_up poly_decay set_lr
             Metrics: mask_scores mean_score summarize evaluating segment_volume evaluate
             Augmentation: weak uniform strong
             Data and batches: shuffled Item Data
Tools        Messages and files: stop write_aside    Several processes: join_processes start_alike
             Command line: parser parse              Device: mixed_precision place
             Dataset folder: find_items              Split: read_ids make_split
             Pixels: read_pixels read_volume read_mask check_values
             Cache: decode_images decode_masks       Phantom: draw_phantom
             Distances: distances_to                 Run: Run
             Finished runs: load_run segment         Pictures: overlay heat save_sheet
             Tables: print_table                     Data doctor: warnings_of
             Commands: check_data predict_images compare_runs main

Four commands: python common.py check | phantom | predict | compare, each with --help.
Shapes: B images, C classes, H x W pixels. Images are floats in [0, 1], label maps are integers.
"""
import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import unicodedata
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
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
    """Image (B, c_in, H, W) -> DEPTH + 1 features (B, width * 2**i, H / 2**i, W / 2**i)."""

    def __init__(self, c_in, width):
        super().__init__()
        self.blocks = nn.ModuleList()
        for i in range(DEPTH + 1):
            c_out = width * 2**i
            self.blocks.append(conv_block(c_in, c_out))
            c_in = c_out

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
        self.blocks = nn.ModuleList()
        for i in range(DEPTH, 0, -1):
            self.blocks.append(DecoderBlock(width * 2**i, width * 2 ** (i - 1)))

    def forward(self, features):
        *skips, x = features
        outputs = []
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            x = block(x, skip)
            outputs.append(x)
        return outputs


class UNet(nn.Module):
    """Image (B, channels, H, W) -> logits (B, classes, H, W), always float32."""

    def __init__(self, channels, classes, width):
        super().__init__()
        self.encoder = Encoder(channels, width)
        self.decoder = Decoder(width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        if len(x) == 0:  # training on labelled images alone; BatchNorm refuses an empty batch
            return x.new_zeros(0, self.head.out_channels, *x.shape[2:])
        finest = self.decoder(self.encoder(x))[-1]  # (B, width, H, W)
        return self.head(finest).float()


# --- Shared formulas ------------------------------------------------------------------------------

def supervised_loss(logits, y):
    """0.5 cross-entropy + 0.5 soft Dice loss: logits (B, C, H, W), y (B, H, W) long -> scalar.

    Dice loss: 1 − mean over images and classes of (2 Σ P Y + ε) / (Σ P + Σ Y + ε), Σ over pixels.
    """
    probs = logits.softmax(1)
    target = F.one_hot(y, logits.shape[1]).movedim(-1, 1).to(probs.dtype)  # (B, C, H, W)
    overlap, total = (probs * target).sum((2, 3)), (probs + target).sum((2, 3))  # (B, C)
    dice_loss = 1 - ((2 * overlap + 1e-5) / (total + 1e-5)).mean()
    return 0.5 * F.cross_entropy(logits, y) + 0.5 * dice_loss


def ramp_up(step, length):
    """exp(-5 (1 - t/T)²) for t < T, then 1 (Laine & Aila, ICLR 2017, 1610.02242)."""
    if step >= length:
        return 1.0
    return math.exp(-5 * (1 - step / length) ** 2)


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


def mask_scores(pred, truth, distances=True):
    """One class, bool arrays (2-D or 3-D) -> {dice, jaccard (%), hd95, asd (pixels)} or None.

    HD95 pools both directions' surface distances; ASD goes from prediction to truth. Both masks
    empty: None, not scored. One empty: Dice 0, distances the diagonal (0 would look perfect), and
    "empty" says which. distances=False: Dice and Jaccard alone, much faster.
    """
    overlap = int((pred & truth).sum())
    total = int(pred.sum()) + int(truth.sum())
    if total == 0:
        return None
    scores = {"dice": 200 * overlap / total, "jaccard": 100 * overlap / (total - overlap)}
    if not pred.any() or not truth.any():
        scores["empty"] = "prediction" if truth.any() else "truth"
        if distances:
            scores["hd95"] = scores["asd"] = math.hypot(*pred.shape)
    elif distances:
        surface_p = surface_points(pred)
        surface_t = surface_points(truth)
        to_truth = distances_to(surface_t, surface_p)
        to_pred = distances_to(surface_p, surface_t)
        scores["hd95"] = float(np.percentile(np.concatenate([to_truth, to_pred]), 95))
        scores["asd"] = float(to_truth.mean())
    return scores


def mean_score(scores, metric):
    """Mean of a metric over the scores (dictionaries or None) that have it; None if none has."""
    values = [s[metric] for s in scores if s is not None and s.get(metric) is not None]
    if not values:
        return None
    return sum(values) / len(values)


def summarize(volumes, classes):
    """{volume: {class: scores}} -> each metric's mean over the classes of its mean over volumes.

    With its parts, "classes" and "volumes", and for each class in how many volumes both masks, the
    prediction's alone (the class was missed) or the truth's alone (invented) are "empty".
    """
    summary = {"classes": {}, "empty": {}, "volumes": volumes}
    for c in map(str, range(1, classes)):
        scores = [volume[c] for volume in volumes.values()]
        empty = ["both" if s is None else s.get("empty") for s in scores]
        summary["classes"][c] = {metric: mean_score(scores, metric) for metric in METRICS}
        summary["empty"][c] = {e: empty.count(e) for e in ("both", "prediction", "truth")}
    for metric in METRICS:
        summary[metric] = mean_score(summary["classes"].values(), metric)
    return summary


@contextlib.contextmanager
def evaluating(networks):
    """All networks in evaluation mode and without gradients; afterwards each as it was."""
    modes = {name: network.training for name, network in networks.items()}
    try:
        with torch.no_grad():
            for network in networks.values():
                network.eval()
            yield
    finally:
        for name, network in networks.items():
            network.train(modes[name])


def segment_volume(predict, networks, data, indices):
    """Image numbers of one volume -> {network: class numbers (D, H, W) uint8 at original size}.

    predict(networks, x) -> {name: probabilities (B, C, h, w)}; resized first, argmax then.
    """
    labels = {}
    for chunk in torch.tensor(indices).split(16):
        for name, probs in predict(networks, data.load_images(chunk)).items():
            probs = F.interpolate(probs, data.sizes[indices[0]], mode="bilinear")
            labels.setdefault(name, []).append(probs.argmax(1).byte().cpu())
    return {name: torch.cat(chunks).numpy() for name, chunks in labels.items()}


def evaluate(predict, networks, data, part, distances=True):
    """Score all that predict returns on the volumes of `part`, "val" or "test": {name: summary}."""
    results = {}  # {name: {volume: {class: scores}}}
    with evaluating(networks):
        for volume, indices in tqdm(data.volumes(part).items(), part, leave=False, disable=None):
            truth = np.stack([data.truth(i) for i in indices])  # (D, H, W)
            for name, pred in segment_volume(predict, networks, data, indices).items():
                scores = results.setdefault(name, {}).setdefault(volume, {})
                for c in range(1, data.classes):
                    pred_c, truth_c = pred == c, truth == c
                    if len(truth) == 1:  # a single image is scored in 2-D
                        pred_c, truth_c = pred_c[0], truth_c[0]
                    scores[str(c)] = mask_scores(pred_c, truth_c, distances)
    return {name: summarize(volumes, data.classes) for name, volumes in results.items()}


# --- Augmentation: on the device, for a whole batch, drawn for each image -------------------------

def weak(x, *maps, flip=True, rotation=180):
    """Rotate to ±`rotation` degrees, scale by 1/1.4 to 1.4, flip, shift by up to 10% [ours].

    x: (B, channels, H, W); integer maps (B, H, W) move alike; the outside is 0. -> [x, *maps].
    """
    if len(x) == 0:
        return [x, *maps]
    angle = (torch.rand(len(x), device=x.device) * 2 - 1) * math.radians(rotation)
    zoom = 1.4 ** (torch.rand(len(x), device=x.device) * 2 - 1)
    mirrored = torch.rand(len(x), 1, 2, device=x.device) >= 0.5  # horizontally, vertically
    shift = torch.rand(len(x), 2, 1, device=x.device) * 0.4 - 0.2  # a side is 2 long
    cos, sin = angle.cos() / zoom, angle.sin() / zoom  # from the result back to x, so divided
    matrix = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    if flip:
        matrix = torch.where(mirrored, -matrix, matrix)
    grid = F.affine_grid(torch.cat([matrix, shift], 2), list(x.shape), align_corners=False)
    moved = [F.grid_sample(x, grid, align_corners=False)]
    for m in maps:
        sampled = F.grid_sample(m[:, None].float(), grid, "nearest", align_corners=False)
        moved.append(sampled[:, 0].to(m.dtype))
    return moved


def uniform(x, low, high):
    """A random number for each image of x (B, channels, H, W): (B, 1, 1, 1) in [low, high)."""
    return torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(low, high)


def strong(x):
    """Contrast, brightness, gamma, blur, noise of x (B, channels, H, W); stays in [0, 1] [ours]."""
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * uniform(x, 0.5, 1.5) + mean  # contrast
    x = x + uniform(x, -0.2, 0.2)  # brightness
    x = x.clamp(1e-4, 1) ** torch.exp2(uniform(x, -0.7, 0.7))  # gamma
    x = x.lerp(tvf.gaussian_blur(x, [5, 5], [1.5, 1.5]), uniform(x, 0, 1))  # blur
    return (x + uniform(x, 0, 0.08) * torch.randn_like(x)).clamp(0, 1)  # noise


# --- Data and batches -----------------------------------------------------------------------------

def shuffled(indices, seed):
    """Endless stream of image numbers: all in random order, then all again in another order.

    It has its own generator, so that resumed runs and all methods see the same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        for k in torch.randperm(len(indices), generator=generator).tolist():
            yield indices[k]


class Item(NamedTuple):
    """One image of the dataset, and what its name says about it."""

    name: str
    unit: str  # its patient, or itself: what is labelled, validated or tested as a whole
    volume: str  # its patient and frame, or itself: what is scored as a whole
    image: Path
    mask: Path | None


class Data:
    """A dataset: items, split, decoded images at --size, masks that training may see, batches.

    items: [Item]; everywhere else an image is its number in this list.
    split: {"labeled", "unlabeled", "val", "test": image numbers}.
    images: (N, channels, S, S) uint8; sizes: (H, W) of each image as it lies on disk.
    labels: {image number: mask (S, S) uint8} of the labelled, validation and test images alone.
    """

    def __init__(self, args):
        folder = Path(args.data)
        self.args = args
        self.name = folder.resolve().name
        self.items = find_items(folder)
        self.split = make_split(self.items, folder, args.labeled, args.split_seed)
        self.images, self.sizes = decode_images(self.items, args)
        visible = self.split["labeled"] + self.split["val"] + self.split["test"]
        self.labels, self.binary, self.classes = decode_masks(self, visible)
        self.channels = self.images.shape[1]
        self.class_names = read_class_names(folder, self.classes)
        self.unlabeled = self.split["unlabeled"] or self.split["labeled"]  # at 100% the same images
        self.stream_l = shuffled(self.split["labeled"], args.seed)
        self.stream_u = shuffled(self.unlabeled, args.seed + 1)
        self.unlabeled_batch = args.unlabeled_batch
        self.drawn = 0  # batches so far; --resume draws as many again

    def indices(self, part):
        """Image numbers of "labeled", "unlabeled", "val" or "test"."""
        return self.split[part]

    def units(self, part):
        """Names of the units in a part, sorted."""
        return sorted({self.items[i].unit for i in self.split[part]})

    def volumes(self, part):
        """{volume: image numbers in slice order} of a part."""
        volumes = {}
        for i in self.split[part]:
            volumes.setdefault(self.items[i].volume, []).append(i)
        return volumes

    def truth(self, i):
        """Mask of image i at its original size: class numbers (H, W) uint8, read from disk."""
        return to_class_numbers(read_mask(self.items[i].mask), self.binary)

    def load_images(self, indices):
        """Image numbers (B,) -> floats in [0, 1] (B, channels, S, S) on the device."""
        return self.images[torch.as_tensor(indices)].to(self.args.device) / 255

    def load_labels(self, indices):
        """Numbers of images with visible masks (B,) -> masks (B, S, S), long, on the device."""
        return torch.stack([self.labels[int(i)] for i in indices]).to(self.args.device).long()

    def draw(self):
        """Numbers of the next batch's labelled and of its unlabelled images: (B_l,), (B_u,)."""
        self.drawn += 1
        index_l = list(itertools.islice(self.stream_l, self.args.batch_size))
        index_u = list(itertools.islice(self.stream_u, self.unlabeled_batch))
        return torch.tensor(index_l, dtype=torch.long), torch.tensor(index_u, dtype=torch.long)

    def batch(self, maps=None):
        """What a step trains on, weakly augmented: x_l, y_l, x_u, map_u, index_u.

        x_l (B_l, channels, S, S), y_l (B_l, S, S) long: labelled images and their masks;
        x_u (B_u, channels, S, S): unlabelled images; index_u (B_u,): their numbers, on the CPU;
        map_u (B_u, S, S): moved like x_u, their maps out of `maps` (N, S, S) uint8, or None.
        """
        index_l, index_u = map(my_share, self.draw())  # under torchrun a process's share
        geometry = {"flip": self.args.flip, "rotation": self.args.rotation}
        x_l, y_l = weak(self.load_images(index_l), self.load_labels(index_l), **geometry)
        x_u = self.load_images(index_u)
        if maps is None:
            [x_u] = weak(x_u, **geometry)
            return x_l, y_l, x_u, None, index_u
        x_u, map_u = weak(x_u, maps[index_u].to(self.args.device), **geometry)
        return x_l, y_l, x_u, map_u, index_u


# ==================== Tools: no need to read these to understand a method =========================

# --- Messages and files ---------------------------------------------------------------------------

def stop(message, status=2):
    """End the program with a message: what was found, what was expected, what to do."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def explain(kind, error, trace):
    """For sys.excepthook: Ctrl-C and a closed pipe end with a word, other errors as ever."""
    if kind is KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
    elif kind is BrokenPipeError:  # `| head` has seen enough
        print("stopped: what read the output has ended", file=sys.stderr)
        os._exit(1)  # Python would try to flush the output once more
    else:
        sys.__excepthook__(kind, error, trace)


def prepare_output():
    """Lines reach a log at once, ± any console; Ctrl-C and a closed pipe get a message."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="replace")
    sys.excepthook = explain


def some(items, most=4, between=", "):
    """The first items of a list, for a message: "a, b, c, d, ..."."""
    words = [str(item) for item in items]
    if len(words) > most:
        words[most:] = ["..."]
    return between.join(words)


def plural(number, word):
    """"1 unit", "2 units"."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def count_words(data, part):
    """How many images, volumes and units a part has, in words."""
    images, units = len(data.indices(part)), len(data.units(part))
    volumes = len(data.volumes(part))
    if images == units:
        return plural(images, "image")
    return f"{plural(images, 'image')} in {plural(volumes, 'volume')} of {plural(units, 'unit')}"


def write_aside(path, content, write):
    """write(content, temporary path), then rename: readers find the old or the new file, whole."""
    if not is_first():
        return
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(content, aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())  # onto the disk, before the old file goes
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's
        stop(f"{path} cannot be written ({error}); what was there before is still there.", status=1)


def write_text(text, path):
    path.write_text(text, encoding="utf-8", errors="replace")


def write_json(content, path):
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_tensors(content, path):
    with open(path, "wb") as file:  # torch.save itself would not say that the disk is full
        torch.save(content, file)


def write_png(image, path):
    image.save(path, "PNG")


# --- Several processes: torchrun; what it starts is one run, and the first process speaks for it --

def processes():
    """(number of this process, count of those that torchrun started); (0, 1) without it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first():
    return processes()[0] == 0


def join_processes(device):
    """Join the processes that torchrun started, if it did; the device that this one is to use."""
    if "LOCAL_RANK" not in os.environ:
        return device
    backend = "gloo"
    if device.startswith("cuda"):
        backend, device = "nccl", f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(backend)
    if not is_first():
        sys.stdout = open(os.devnull, "w")
    return device


def my_share(values):
    """This process's part of a batch's image numbers, or of a list with an entry for each."""
    number, count = processes()
    return values[number::count]


def gather(value):
    """The values of all processes, in the order of their numbers."""
    values = [value] * processes()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def average(tensor):
    """Replace a tensor by its mean over the processes."""
    if processes()[1] > 1:
        dist.all_reduce(tensor)
        tensor /= processes()[1]


def average_gradient(parameter):
    average(parameter.grad)


def average_statistics(networks):
    """Replace BatchNorm's running statistics by their mean over the processes."""
    for network in networks.values():
        for buffer in network.buffers():
            if buffer.is_floating_point():
                average(buffer)


def start_alike(networks, seed):
    """Give all the first one's weights, average gradients from now on, seed each process apart."""
    number, count = processes()
    if count == 1:
        return
    for network in networks.values():
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(average_gradient)
    torch.manual_seed(seed + 1000 * number)


# --- Command line ---------------------------------------------------------------------------------

UNNAMED = {"data", "labeled", "seed", "supervised", "out", "resume", "device", "val_every", "cache"}
AGAIN = {"device", "precision", "resume"}  # what may be typed again with --resume
PATHS = {"data", "init"}  # files or folders
SPECS = {"labeled", "boxes", "tags"}  # a share, a number, or a file of ids


def number(kind, minimum, maximum=math.inf):
    """An argparse type: a finite number of this kind, from minimum to maximum."""
    def convert(text):
        value = kind(text)
        if minimum <= value <= maximum and value < math.inf:
            return value
        limits = f"at least {minimum}"
        if maximum < math.inf:
            limits = f"{minimum} to {maximum}"
        raise argparse.ArgumentTypeError(f"{text} was given, {limits} is needed")
    convert.__name__ = kind.__name__  # for argparse's message: invalid int value
    return convert


def default_cache():
    """The user's cache folder; without a home the system's folder for temporary files."""
    try:
        parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        parent = tempfile.gettempdir()
    return str(Path(parent, "ssl-segmentation"))


def parser(doc):
    """An ArgumentParser with the options that all methods share; methods add to its group `own`."""
    as_written = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=doc, formatter_class=as_written)
    p.own = p.add_argument_group("options of this paper")
    add = p.add_argument_group("shared options").add_argument
    add("--data", metavar="PATH", help="dataset folder (default: the phantom, drawn for you)")
    add("--labeled", metavar="SPEC", help="a share of the training units that have masks (10%%), a "
        "number of them (7), or a text file of ids; a unit is a patient, or an image that is no "
        "slice (default: 10%% on the phantom; all masks where some images have none)")
    add("--size", type=number(int, 1),
        help="side that images are resized to (256; without a GPU 96; phantom: 48)")
    add("--width", type=number(int, 1),
        help="channels of the U-Net's first stage (32; without a GPU, or on the phantom, 16)")
    add("--classes", type=number(int, 2, MAX_CLASS + 1),
        help="number of classes, if it cannot be seen from the masks")
    add("--steps", type=number(int, 1),
        help="optimizer steps (10000; without a GPU 2000; phantom: 800)")
    add("--batch-size", type=number(int, 1), default=8, help="labelled images a step (%(default)s)")
    add("--unlabeled-batch", type=number(int, 1), default=8,
        help="unlabelled images a step (%(default)s)")
    add("--lr", type=number(float, 0), default=1e-3, help="first learning rate (%(default)s)")
    add("--flip", action=argparse.BooleanOptionalAction, default=True,
        help="mirror images (yes); --no-flip where left and right are different classes")
    add("--rotation", type=number(float, 0, 180), default=180.0, metavar="DEGREES",
        help="rotate images by up to so much (%(default)s); 20, say, for chest films")
    add("--seed", type=number(int, 0, 2**31), default=0, help="training randomness (%(default)s)")
    add("--split-seed", type=number(int, 0, 2**31), default=0, help="which units are labelled, and "
        "without lists which are validated and tested (%(default)s)")
    add("--device", default="auto",
        help="auto: cuda, else mps, else cpu; or a name such as cuda:1 (%(default)s)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="auto: bf16 where GPU or CPU have it, fp16 with a scaler on older GPUs, else fp32 "
        "(%(default)s)")
    add("--out", default="runs", metavar="FOLDER", help="where run folders go (%(default)s)")
    add("--resume", metavar="RUN", help="continue the run of this folder, with its own options")
    add("--val-every", type=number(int, 1), help="steps between validations (a tenth of --steps)")
    add("--cache", default=default_cache(), metavar="FOLDER",
        help="for decoded images, may be deleted at any time (%(default)s)")
    return p


def parse(parser, argv=None):
    """The options, checked and complete."""
    prepare_output()
    words = sys.argv[1:] if argv is None else argv
    if "--supervised" in words and "--supervised" not in parser.format_help():
        stop("the labelled-only baseline is that of all methods: mean_teacher.py --supervised")
    args = parser.parse_args(words)
    if args.resume:
        args = load_args(parser, words, args.resume)
    else:
        fill_defaults(parser, args)
    args.device = choose_device(args.device)
    args.precision = choose_precision(args.precision, args.device)
    count = processes()[1]
    for batch in (args.batch_size, args.unlabeled_batch):
        if batch % count:
            stop(f"--batch-size, --unlabeled-batch: {count} processes cannot share {batch} images "
                 f"alike. Expected a multiple of {count}.")
        if args.size == 2**DEPTH and batch == count:
            stop(f"--size {args.size}: one image (in each process) leaves one value a channel at "
                 "the bottleneck, which BatchNorm cannot normalise. Give larger batches or a "
                 "larger --size.")
    return args


def absolute(option, value):
    """An option's value; of a file or folder the absolute path, so that --resume finds it again."""
    if value is None:
        return None
    is_path = option in PATHS and os.path.exists(value)
    is_file_of_ids = option in SPECS and os.path.isfile(value)
    if is_path or is_file_of_ids:
        return str(Path(value).resolve())
    return value


def phantom_folder(cache, size):
    """Where the phantom of runs without --data lies."""
    return Path(cache, f"phantom-{size}")


def fill_defaults(parser, args):
    """Fill in the options that depend on others; args.options: those off their defaults."""
    with_gpu = {"size": 256, "width": 32, "steps": 10000}
    if args.data is None:
        defaults = {"size": 48, "width": 16, "steps": 800}
    elif torch.device(choose_device(args.device)).type == "cpu":
        defaults = {"size": 96, "width": 16, "steps": 2000}
        left_out = [option for option in defaults if getattr(args, option) is None]
        if left_out:
            small = " ".join(f"--{option} {defaults[option]}" for option in left_out)
            large = ", ".join(str(with_gpu[option]) for option in left_out)
            print(f"no GPU: small defaults, {small} (with one {large})")
    else:
        defaults = with_gpu
    options = {}
    for option, value in vars(args).items():
        default = defaults.get(option, parser.get_default(option))
        if value is None and option in defaults:
            setattr(args, option, default)
        elif value != default and option not in UNNAMED:
            options[option] = value
    args.options = options
    args.val_every = args.val_every or max(2, args.steps // 20 * 2)  # even, for UCMT
    if args.size % 2**DEPTH:
        low = args.size // 2**DEPTH * 2**DEPTH
        stop(f"--size {args.size}: expected a multiple of {2**DEPTH}, since the U-Net halves the "
             f"image {DEPTH} times. Try {low or 2**DEPTH} or {low + 2**DEPTH}.")
    if args.data is None:
        args.data = draw_phantom(phantom_folder(args.cache, args.size), args.size)
        args.labeled = args.labeled or "10%"
    for option, value in vars(args).items():
        setattr(args, option, absolute(option, value))


def check_saved(parser, saved, path):
    """Stops if args.json holds a value that its option cannot have: the words are parsed again."""
    options = parser.format_help()
    words = []
    for option, value in saved.items():
        word = "--" + option.replace("_", "-")
        if option == "options" or value is None:
            continue
        if value is True:
            words.append(word)
        elif value is not False:
            words.append(f"{word}={value}")
        elif f"--no-{word[2:]}" in options:
            words.append(f"--no-{word[2:]}")
    parsed = vars(parser.parse_args(words))
    filled_in = {"data", "size", "width", "steps", "val_every"}  # by fill_defaults
    for option, value in parsed.items():
        if value != saved[option] or (value is None and option in filled_in):
            stop(f"--resume: {path} is damaged: {option} is {str(saved[option])[:40]!r}. Start "
                 "anew.")


def load_args(parser, argv, run):
    """--resume RUN: that run's options; of those typed beside it device and precision count."""
    path = Path(run, "args.json")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        args = argparse.Namespace(**saved)
    except (OSError, ValueError, TypeError) as error:
        stop(f"--resume {run}: {path} cannot be read ({error}). Expected a run's folder.")
    args = parser.parse_args(argv, args)  # options that are not typed stay as they are
    if set(vars(args)) != set(saved):
        stop(f"--resume {run} has other options than this file. Resume it with its own.")
    check_saved(parser, saved, path)
    for option, value in vars(args).items():
        value = absolute(option, value)
        if option not in AGAIN and value != saved[option]:
            stop(f"--resume goes on with the run's own options: --{option.replace('_', '-')} is "
                 f"{saved[option]} there, {value} was typed. Leave it out.")
    phantom = phantom_folder(saved["cache"], saved["size"])
    if saved["data"] == str(phantom.resolve()):
        draw_phantom(phantom, saved["size"])  # again, if the cache was deleted
    return argparse.Namespace(**saved | {option: getattr(args, option) for option in AGAIN})


# --- Device ---------------------------------------------------------------------------------------

def choose_device(name):
    """"auto" -> cuda, else mps, else cpu; under torchrun a GPU a process. The device is tried."""
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
    name = join_processes(name)
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        stop(f"--device {name} cannot be used: {reason} Expected auto, cpu, cuda, cuda:1 or mps, "
             "on a machine that has it.")
    return name


def cpu_capabilities():
    """What the CPU has in hardware, and its name: {"avx2": True, ...}; {} before torch 2.9."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    return {}


def device_name(device):
    """The name of the GPU or CPU, for results.json; where it is not known, the device's."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if device == "cpu":
        return cpu_capabilities().get("cpu_name", device)
    return device


def choose_precision(name, device):
    """"auto" -> bf16 on GPUs and CPUs that have it, fp16 on older GPUs, else fp32."""
    cuda = device.startswith("cuda:") or device == "cuda"
    if name == "fp16" and not cuda:
        stop(f"--precision fp16 needs a CUDA GPU, the device is {device}. Use fp32.")
    if name != "auto":
        return name
    if device == "cpu":
        has = cpu_capabilities()
        if has.get("avx512_bf16") or has.get("amx_bf16"):  # 0.6 of the time of fp32
            return "bf16"
    if not cuda:
        return "fp32"
    if torch.cuda.get_device_capability(device)[0] >= 8:
        return "bf16"
    return "fp16"


def mixed_precision(args):
    """autocast(), the context of forward passes, and the gradient scaler; in fp32 both do nothing.

    bf16 and fp16 are computed faster than fp32; fp16 alone needs the scaler, lest small gradients
    become 0.
    """
    device_type = torch.device(args.device).type
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    autocast = functools.partial(torch.autocast, device_type, dtype, enabled=dtype is not None)
    scaler = torch.amp.GradScaler(device_type, enabled=args.precision == "fp16")
    return autocast, scaler


def place(networks, args):
    """Move {name: network} to the device; with several processes, prepare what they share."""
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last  # faster on CPUs and with bf16
    if torch.device(args.device).type == "mps":
        layout = torch.contiguous_format  # there BatchNorm's gradient fails with channels-last
    for network in networks.values():
        network.to(args.device, memory_format=layout)
    start_alike(networks, args.seed)
    return networks


# --- Dataset folder -------------------------------------------------------------------------------

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".npy")
ENDINGS_IN = {"images": ENDINGS, "masks": ENDINGS, "boxes": (".txt",), "tags": (".txt",)}
MASK_SUFFIX = re.compile("_(mask|segmentation|seg|anno|label|gt)$", re.IGNORECASE)
SLICE = re.compile(r"^(?P<volume>(?P<patient>.+?)(_frame\d+)?)_slice_?(?P<slice>\d+)$")
LAYOUT = (f"Expected PATH/images/NAME.png and PATH/masks/NAME.png, with the endings "
          f"{' '.join(ENDINGS)}; see README, Your own data.")


def name_of(path):
    """An image's name: its file's, without the ending, in one of the two forms that é, say, has."""
    return unicodedata.normalize("NFC", path.stem)


def parse_name(name):
    """Image name -> (unit, volume, slice number); a name that is not a slice's is its own unit."""
    match = SLICE.match(name)
    if match is None:
        return name, name, -1
    return match["patient"], match["volume"], int(match["slice"])


def slice_order(name):
    """Sorts names by volume, then by slice number, then as text."""
    unit, volume, number = parse_name(name)
    return volume, number, name


def list_files(folder, endings=ENDINGS):
    """A folder's files with these endings {name: path}, slices of a volume in order."""
    files = {}
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        stop(f"{folder} cannot be read ({error.strerror}). {LAYOUT}")
    for path in paths:
        if path.suffix.lower() not in endings or path.name.startswith("."):
            continue
        if not path.is_file():
            stop(f"{path} is a folder or a broken link, not a file. Remove it.")
        check_readable(path)
        name = name_of(path)
        if name in files:
            stop(f"two files for {name}: {files[name].name} and {path.name}. Keep one.")
        files[name] = path
    return {name: files[name] for name in sorted(files, key=slice_order)}


def pair_masks(images, files):
    """{image name: mask path}: a mask has its image's name, or that with a suffix like _mask."""
    masks, orphans = {}, []
    for stem, path in files.items():
        name = stem
        if name not in images:
            name = MASK_SUFFIX.sub("", stem)
        if name not in images:
            orphans.append(path.name)
        elif name in masks:
            stop(f"two files for {name}: {masks[name].name} and {path.name}. Keep one.")
        masks[name] = path
    if orphans:
        stop(f"--data: {len(orphans)} masks have no image of their name: {some(orphans)}; images "
             f"are {some(images)}. {LAYOUT}")
    return masks


FOLDERS = set(ENDINGS_IN)
LISTS = {"train.txt", "val.txt", "test.txt", "classes.txt"}
NEAR_MISSES = {"image": "images", "imgs": "images", "img": "images", "mask": "masks",
               "labels": "masks", "label": "masks", "annotations": "masks", "gt": "masks",
               "ground_truth": "masks", "segmentations": "masks", "box": "boxes", "bbox": "boxes",
               "bboxes": "boxes", "tag": "tags", "valid.txt": "val.txt",
               "validation.txt": "val.txt"}


def check_readable(path):
    """Stops if a file or folder may not be read."""
    rights = os.R_OK
    if path.is_dir():
        rights = os.R_OK | os.X_OK
    if not os.access(path, rights, effective_ids=os.access in os.supports_effective_ids):
        stop(f"{path} may not be read (Permission denied). Give yourself the right to read it.")


def check_names(folder):
    """Stops on names in the dataset folder that nearly are what a run looks for, or of no use."""
    try:
        found = sorted(os.listdir(folder))
    except OSError as error:
        stop(f"--data: no folder images in {folder} (found: no such folder, or it may not be read: "
             f"{error.strerror}). {LAYOUT}")
    check_readable(folder)
    for name in found:
        path, lower = folder / name, name.lower()
        meant = lower if lower in FOLDERS | LISTS else NEAR_MISSES.get(lower)
        if meant is not None and name != meant and meant not in found:
            stop(f"--data: {path} looks like {meant}, which is not there. Rename it to {meant}, or "
                 "to something else if it is not that.")
        if name in FOLDERS and not path.is_dir():
            stop(f"--data: {path} is a file or a broken link; expected a folder.")
        if name in LISTS and not path.is_file():
            stop(f"--data: {path} is a folder or a broken link; expected a text file.")
        if name in FOLDERS | LISTS:
            check_readable(path)
    if "images" not in found:
        stop(f"--data: no folder images in {folder} (found: {some(found) or 'nothing'}). {LAYOUT}")


def find_items(folder):
    """The images of a dataset folder and their masks, if they have one: [Item], slices in order."""
    check_names(folder)
    images = list_files(folder / "images")
    if not images:
        found = some(sorted(os.listdir(folder / "images"))) or "nothing"
        stop(f"--data: no images in {folder / 'images'} (found: {found}). {LAYOUT}")
    masks = {}
    if (folder / "masks").exists():
        masks = pair_masks(images, list_files(folder / "masks"))
    items = []
    for name, path in images.items():
        unit, volume, _ = parse_name(name)
        items.append(Item(name, unit, volume, path, masks.get(name)))
    units = {item.unit for item in items}
    if len(units) == 1:
        stop(f"all {len(items)} images belong to one patient, {units.pop()}: nothing is left to "
             "test on. NAME_slice_03 means a slice of patient NAME; rename what is a separate "
             "image.")
    return items


def read_class_names(folder, classes):
    """The names in classes.txt, background first; without the file "class 1" and so on."""
    path = folder / "classes.txt"
    if not path.exists():
        return ["background"] + [f"class {c}" for c in range(1, classes)]
    try:
        lines = path.read_text("utf-8-sig", "replace").splitlines()
    except OSError as error:
        stop(f"{path} cannot be read ({error.strerror}).")
    names = [line.strip() for line in lines if line.strip()]
    if len(names) != classes:
        advice = ""
        if len(names) > classes:
            advice = f"; --classes {len(names)} if the masks that are seen lack some"
        stop(f"{path}: {len(names)} names, but there are {classes} classes, the background among "
             f"them. Expected a name a line, background first{advice}.")
    return names


# --- Split ----------------------------------------------------------------------------------------

def read_ids(path, items):
    """A text file of ids, one a line -> the numbers of exactly the images that they name, sorted.

    An id is a patient, a volume or an image name.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{path} cannot be read as a text file of ids, one a line: {error}")
    ids = [unicodedata.normalize("NFC", line.strip()) for line in lines if line.strip()]
    numbers = {}  # {id: image numbers}
    for i, item in enumerate(items):
        for key in {item.unit, item.volume, item.name}:
            numbers.setdefault(key, []).append(i)
    unknown = [i for i in ids if i not in numbers]
    if unknown or not ids:
        units = sorted({item.unit for item in items})
        stop(f"{path}: {len(unknown)} of {len(ids)} ids are not in the dataset: {some(unknown)}. "
             f"Expected at least one id, such as {some(units)}")
    return sorted({number for i in ids for number in numbers[i]})


def read_lists(folder, items):
    """train.txt, val.txt, test.txt -> {"train": image numbers, ...} for each that exists."""
    lists, owner = {}, {}
    for part in ("train", "val", "test"):
        path = folder / f"{part}.txt"
        if not os.path.lexists(path):
            continue
        lists[part] = read_ids(path, items)
        units = {items[i].unit for i in lists[part]}
        both = sorted(unit for unit in units if unit in owner)
        if both:
            stop(f"{some(both)}: in {owner[both[0]]}.txt and in {part}.txt. A patient may be in "
                 "one list only.")
        owner.update(dict.fromkeys(units, part))
    return lists


def count_units(spec, total, option, what):
    """A share such as "10%" or a number such as "7" -> a number of units, at least 1 of `total`."""
    if total == 0:
        stop(f"{option} {spec}: there are no {what}.")
    share = re.fullmatch(r"(\d+(\.\d+)?)%", spec)
    if share and 0 < float(share[1]) <= 100:
        return max(1, math.floor(total * float(share[1]) / 100 + 0.5))
    if spec.isdecimal() and 0 < int(spec) <= total:
        return int(spec)
    if re.fullmatch(r"0?\.\d*[1-9]\d*", spec):
        percent = float(spec) * 100
        stop(f"{option} {spec}: did you mean {percent:g}%? Give a share (10%) or units (7).")
    stop(f"{option} {spec}: expected a share above 0% and up to 100%, a number of units from 1 to "
         f"{total} (the {what}), or a text file of ids, of which there is none of this name.")


def choose_images(spec, units, candidates, items, option, what):
    """The candidates (image numbers) that --labeled SPEC, or an option like it, selects.

    spec: a share or a number of the `units`, of which the first are taken, so that 5% lies inside
    10%; or a text file of ids, which stands for exactly the images that it names.
    """
    if not os.path.isfile(spec):
        chosen_units = set(units[:count_units(spec, len(units), option, what)])
        return [i for i in candidates if items[i].unit in chosen_units]
    chosen = [i for i in read_ids(spec, items) if items[i].mask is not None]
    outside = [items[i].name for i in chosen if i not in candidates]
    if outside:
        stop(f"{option} {spec}: not {what}: {some(outside)}. Expected some of {some(units)}")
    if not chosen:
        stop(f"{option} {spec}: none of the images that it names has a mask.")
    return chosen


def images_of(units, items):
    """Numbers of all images of some units."""
    units = set(units)
    return [i for i, item in enumerate(items) if item.unit in units]


def draw_parts(items, folder, order):
    """{"train", "val", "test": sorted image numbers}, from lists or by the drawn order of units.

    Without a list, a tenth of the units with masks validates and a fifth tests, at least one each;
    units without masks that are in no list train.
    """
    lists = read_lists(folder, items)
    listed = {items[i].unit for numbers in lists.values() for i in numbers}
    masked = {item.unit for item in items if item.mask is not None}
    free = [unit for unit in order if unit in masked and unit not in listed]
    parts = dict(lists)
    for part, share in (("val", 0.1), ("test", 0.2)):
        if part not in lists:
            count = max(1, round(share * len(masked)))
            parts[part] = images_of(free[:count], items)
            free = free[count:]
    if "train" not in lists:
        parts["train"] = images_of(free, items)
    unmasked = [unit for unit in order if unit not in masked and unit not in listed]
    parts["train"] = sorted(parts["train"] + images_of(unmasked, items))
    for part, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        if all(items[i].mask is None for i in parts[part]):
            stop(f"no {name} units with masks are left: {len(masked)} units have masks, "
                 f"{len(listed)} are in lists. Annotate more, or change the lists: each needs one.")
    return parts


def make_split(items, folder, labeled, seed):
    """{"labeled", "unlabeled", "val", "test": sorted image numbers}.

    It depends on the sorted ids, the lists in the folder, --labeled and --split-seed alone.
    """
    units = sorted({item.unit for item in items})
    order = np.random.default_rng(seed).permutation(units).tolist()
    parts = draw_parts(items, folder, order)
    if labeled is None and all(item.mask is not None for item in items):
        stop("--labeled is needed, since all images have masks: 10%, 7 units, or a file of ids.")
    candidates = [i for i in parts["train"] if items[i].mask is not None]
    candidate_units = {items[i].unit for i in candidates}
    units = [unit for unit in order if unit in candidate_units]
    chosen = choose_images(labeled or "100%", units, candidates, items, "--labeled",
                           "training units with masks")
    unlabeled = sorted(set(parts["train"]) - set(chosen))
    split = {"labeled": chosen, "unlabeled": unlabeled}
    for part in ("val", "test"):
        split[part] = [i for i in parts[part] if items[i].mask is not None]
    return split


# --- Pixels ---------------------------------------------------------------------------------------

RECIPES = "see README, From other formats"
MAX_CLASS = 31  # a larger number in a mask is no class number (but 255 in a binary mask is class 1)


def check_tiff(image):
    """ValueError on what Pillow would misread: signed 8 bits, unsigned 32 bits, four channels."""
    tags = getattr(image, "tag_v2", {})
    bits, kind = tags.get(258, (8,)), tags.get(339, (1,))  # BitsPerSample, SampleFormat
    if len(bits) > 3 and tags.get(338, (2,))[0] == 0:  # ExtraSamples: not an alpha channel
        raise ValueError(f"{len(bits)} channels; expected grey or colour")
    if (bits[0], kind[0]) in ((8, 2), (32, 1), (64, 1), (64, 2)):
        name = {1: "unsigned", 2: "signed"}[kind[0]]
        raise ValueError(f"{bits[0]} bits, {name}; expected 8 or 16 bits unsigned, or float")


def palette_colours(path):
    """{number: (red, green, blue)} of the palette entries that a mask uses.

    Empty without a palette, and for black and white, which are read as colours.
    """
    if path.suffix.lower() == ".npy":
        return {}
    with Image.open(path) as image:
        if image.mode != "P":
            return {}
        palette = image.getpalette("RGB")
        used = np.unique(np.asarray(image)).tolist()
    colours = {number: tuple(palette[3 * number:3 * number + 3]) for number in used}
    if set(colours.values()) <= {(0, 0, 0), (255, 255, 255)}:
        return {}
    return colours


def check_png(path):
    """Raise ValueError if a PNG holds fewer pixels than its header says; Pillow would not."""
    content = path.read_bytes()  # the header: width, height, bits, kind of colour, interlacing
    width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    depth, colour, interlaced = content[24], content[25], content[28]
    packed, start = b"", 8
    while start < len(content):  # a chunk: its content's length, type, content, checksum
        length = int.from_bytes(content[start:start + 4], "big")
        if content[start + 4:start + 8] == b"IDAT":
            packed += content[start + 8:start + 8 + length]
        start += length + 12
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]  # of a pixel: 3 channels, say
    row = 1 + math.ceil(width * bits / 8)  # bytes; the first one names the row's filter
    if not interlaced and len(zlib.decompress(packed)) < height * row:
        raise ValueError("its pixels end early")


def read_picture(path, mask):
    """What Pillow reads: (H, W) or (H, W, 3). Of a palette: colours; of a mask's: numbers.

    A mask with a palette of which it uses black and white alone is read as colours, too.
    """
    with Image.open(path) as image:
        pages = getattr(image, "n_frames", 1)
        if pages > 1 and image.format != "MPO":  # a camera's MPO holds one photograph twice
            raise ValueError(f"{pages} pages in a file; expected one file a slice")
        check_tiff(image)
        if image.format == "PNG":
            check_png(path)
        colour = image.mode in ("RGB", "RGBA", "LA")
        if colour and any(";16" in str(tile[3]) for tile in image.tile):
            raise ValueError("16 bits in colour, of which Pillow reads 8; save it as .npy")
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16 or 32 bits, or float
            return np.asarray(image)
        if image.mode in ("1", "L", "LA"):
            return np.asarray(image.convert("L"))
        colours = np.asarray(image.convert("RGB"))
        black_and_white = not np.ptp(colours, 2).any() and not (colours % 255).any()
        if mask and image.mode == "P" and not black_and_white:
            return np.asarray(image)
        return colours


def check_array(array):
    """An image or mask (H, W), (H, W, 1) or (H, W, 3) -> (H, W) or (H, W, 3), or ValueError."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if not array.size or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise ValueError(f"an array of shape {array.shape}; expected (H, W) or (H, W, 3)")
    if array.dtype.kind not in "buif" or not np.isfinite(array).all():
        raise ValueError(f"values of type {array.dtype} or not finite; expected numbers")
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    return array


def read_pixels(path, mask=False):
    """An image file -> (H, W) or (H, W, 3) as stored. ValueError: what is wrong with the file."""
    try:
        if path.suffix.lower() == ".npy":
            array = check_array(np.load(path, allow_pickle=False))
        else:
            array = check_array(read_picture(path, mask))
    except Exception as error:  # Pillow and NumPy raise a dozen types on damaged files
        problem = f"{path.name}: cannot be used ({type(error).__name__}: {error})"
        raise ValueError(problem) from None
    return array


def used_range(values):
    """The 0.5 and 99.5 percentiles of intensities (N,), padding left out.

    Padding: many pixels of one value far below all others, such as -2000 in CT.
    """
    lowest = values == values.min()
    rest = values[~lowest]
    spread = np.ptp(rest) if rest.size else 0
    if lowest.mean() > 0.005 and spread > 0 and rest.min() - values.min() > 0.1 * spread:
        values = rest
    return np.percentile(values, [0.5, 99.5])


def to_bytes(arrays):
    """A volume's images -> uint8: others are scaled together, each channel by its used range."""
    if all(array.dtype == np.uint8 for array in arrays):
        return list(arrays)
    channels = [array[..., None] if array.ndim == 2 else array for array in arrays]  # (H, W, c)
    pixels = np.concatenate([array.reshape(-1, array.shape[2]) for array in channels])
    ranges = [used_range(values) for values in pixels.astype(float).T]
    low, high = np.transpose(ranges)  # (c,)
    scaled = [(array - low) / np.maximum(high - low, 1e-12) * 255 for array in channels]
    whole = [array.clip(0, 255).astype(np.uint8) for array in scaled]
    return [new.reshape(old.shape) for new, old in zip(whole, arrays, strict=True)]


def read_volume(paths):
    """A volume's image files -> {path: (H, W) or (H, W, 3) uint8}, [what is wrong with others].

    8-bit images stay as they are, others are scaled together.
    """
    arrays, bad = {}, []
    for path in paths:
        try:
            arrays[path] = read_pixels(path)
        except ValueError as error:
            bad.append(str(error))
    deep = [path.name for path, array in arrays.items() if array.dtype != np.uint8]
    shallow = [path.name for path, array in arrays.items() if array.dtype == np.uint8]
    if deep and shallow:
        for path in [path for path in arrays if path.name in shallow]:
            bad.append(f"{path.name}: 8 bits, but {deep[0]} of the same volume has more; save all "
                       "slices of a volume alike")
            del arrays[path]
    colour = [path.name for path, array in arrays.items() if array.ndim == 3]
    if deep and 0 < len(colour) < len(arrays):
        bad.append(f"{colour[0]}: in colour, others of its volume are grey; save all alike")
        return {}, bad
    return dict(zip(arrays, to_bytes(list(arrays.values())), strict=True)), bad


def read_mask(path):
    """A mask file -> (H, W) uint8, as stored. ValueError: what is wrong with the file.

    A JPEG, which blurs values, is cut at 127 into 0 and 255.
    """
    array = read_pixels(path, mask=True)
    lossy = path.suffix.lower() in (".jpg", ".jpeg")
    if array.ndim == 3:
        if np.ptp(array, 2).max() > (64 if lossy else 0):
            raise ValueError(f"{path.name}: a mask in colours; expected class numbers, or 0 and "
                             "255")
        array = array[..., 0]
    if lossy:
        between = (array >= 40) & (array < 216)
        inside = between[1:-1, 1:-1] & between[:-2, 1:-1] & between[2:, 1:-1]
        inside &= between[1:-1, :-2] & between[1:-1, 2:]
        numbers = 0 < array.max() <= 127  # 0, 1, 2, ..., of which nothing would be left
        if numbers or inside.sum() > 0.02 * (array >= 40).sum():  # areas between, not edges
            raise ValueError(f"{path.name}: a JPEG of other values than 0 and 255, which it blurs; "
                             "save masks as PNG")
        return np.where(array > 127, 255, 0).astype(np.uint8)
    if array.min() < 0 or array.max() > 255 or (array % 1).any():
        values = some([f"{value:g}" for value in np.unique(array)])
        raise ValueError(f"{path.name}: mask values {values}; expected class numbers 0, 1, 2, ... "
                         f"up to {MAX_CLASS}, or 0 and 255")
    return array.astype(np.uint8)


def to_class_numbers(mask, binary):
    """A mask as stored -> class numbers; binary: 255 becomes class 1. ValueError: other values."""
    if not binary:
        return mask
    if (mask % 255).any():
        raise ValueError(f"values {some(np.unique(mask))} in a mask; visible ones hold 0 and 255")
    return mask // 255


def check_values(files):
    """{value: the first mask file that holds it} -> are masks binary, 0 and 255? Stops on others.

    All visible masks are looked at together: {0, 255} is binary, {0, 1, 2, ...} are class numbers.
    """
    values = sorted(files)
    if values[-1] == 0:
        stop("labelled, validation and test masks hold background only; expected 1, 2, ... or "
             "255.")
    if set(values) <= {0, 255}:
        return True
    if values[-1] <= MAX_CLASS:
        return False
    if values[-1] == 255 and values[-2] <= MAX_CLASS:
        stop(f"masks hold class numbers ({values[-2]} in {files[values[-2]]}) and also 255 (in "
             f"{files[255]}). If masks are binary, write 0 and 255 in all of them. If 255 marks "
             "pixels to ignore: that is not supported; write another class there, such as 0. "
             "(A palette mask of black and white alone counts as 0 and 255; save class numbers "
             "without a palette.)")
    stop(f"mask values {some(values)} ({values[-1]} in {files[values[-1]]}); expected class "
         f"numbers 0, 1, 2, ... up to {MAX_CLASS}, or 0 and 255. If they number objects "
         f"(instances): {RECIPES}.")


# --- Cache: images are decoded once, into one file that is then mapped into memory ----------------

def fingerprint(path):
    """What tells a file from another, or from itself after a change; with a hash of both ends."""
    status = path.stat()
    with open(path, "rb") as file:
        head = file.read(4096)
        file.seek(max(0, status.st_size - 4096))
        tail = file.read(4096)
    ends = hashlib.sha256(head + tail).hexdigest()
    return str(path.resolve()), status.st_size, status.st_mtime_ns, ends


def cache_path(what, files, args):
    """Where the decoded files lie, or will lie: a name made of all that they depend on."""
    content = ("v7", what, args.size, [fingerprint(path) for path in files])
    key = hashlib.sha256(repr(content).encode()).hexdigest()[:20]
    return Path(args.cache, f"{key}.pt")


def write_cache(path, tensors):
    """Save {name: tensor} in a file of its own, then rename: two runs may do this at once."""
    aside = path.with_name(f"building-{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        write_tensors(tensors, aside)
        with contextlib.suppress(PermissionError):  # Windows: another run has it open already
            os.replace(aside, path)
        print(f"decoded images are kept in {path.parent} ({path.stat().st_size / 2**20:.1f} MiB "
              "more); it may be deleted at any time")
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's
        stop(f"the cache of decoded images, {path.parent}, cannot be written ({error}). Free some "
             "space, or choose another folder with --cache FOLDER.")
    finally:  # after Ctrl-C, too
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def remove_leftovers(folder):
    """Delete half-written files and folders of the cache that are older than a day."""
    for path in folder.glob("building-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 86400:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def open_cache(path):
    try:
        return torch.load(path, mmap=True, weights_only=True)
    except Exception as error:  # torch.load raises a dozen types
        stop(f"the cache file {path} cannot be read ({type(error).__name__}). Delete it, it will "
             "be made again; or choose another folder with --cache FOLDER.")


def stop_if_bad(bad, what):
    if bad:
        stop(f"{len(bad)} bad files among the {what}; mend or remove them:\n  "
             + some(bad, 10, "\n  "))


def read_images(items, size):
    """All images at size x size: {"pixels": (N, channels, S, S) uint8, "sizes": [(H, W)]}."""
    volumes = {}
    for item in items:
        volumes.setdefault(item.volume, []).append(item.image)
    pixels, sizes, bad = [], [], []
    mode = None  # of the first image; grey or colour for all
    for paths in tqdm(volumes.values(), "decoding images", leave=False, disable=None):
        arrays, problems = read_volume(paths)
        bad += problems
        for path, array in arrays.items():
            mode = mode or {2: "L", 3: "RGB"}[array.ndim]
            if mode == "L" and array.ndim == 3:
                bad.append(f"{path.name}: in colour, the first image is grey; save all alike")
            image = Image.fromarray(array).convert(mode)
            sizes.append(array.shape[:2])
            small = np.array(image.resize((size, size), Image.BILINEAR))
            if mode == "L":
                small = small[..., None]  # (S, S, channels)
            pixels.append(torch.from_numpy(small).movedim(2, 0))
    stop_if_bad(bad, "images")
    return {"pixels": torch.stack(pixels), "sizes": sizes}


def decode_images(items, args):
    """-> images (N, channels, S, S) uint8, mapped from the cache; [(H, W)] of the originals."""
    path = cache_path("images", [item.image for item in items], args)
    if not path.exists():
        write_cache(path, read_images(items, args.size))
    content = open_cache(path)
    return content["pixels"], content["sizes"]


def read_masks(data, visible):
    """Masks at --size: {"pixels": class numbers (M, S, S) uint8, "binary", "largest" class}."""
    pixels, bad = [], []
    files, colours = {}, {}  # {value: the first file that holds it}, {value: (colour, file)}
    for i in tqdm(visible, "decoding masks", leave=False, disable=None):
        path = data.items[i].mask
        try:
            mask = read_mask(path)
        except ValueError as error:
            bad.append(str(error))
            continue
        if mask.shape != data.sizes[i]:
            height, width = data.sizes[i]
            bad.append(f"{path.name}: {mask.shape[0]} x {mask.shape[1]} pixels, but its image has "
                       f"{height} x {width}")
        for value in np.unique(mask).tolist():
            files.setdefault(value, path.name)
        for value, colour in palette_colours(path).items():
            first, name = colours.setdefault(value, (colour, path.name))
            if colour != first:
                bad.append(f"{path.name}: number {value} of its palette is the colour {colour}, in "
                           f"{name} {first}; save class numbers without a palette")
        small = Image.fromarray(mask).resize((data.args.size, data.args.size), Image.NEAREST)
        pixels.append(torch.from_numpy(np.array(small)))
    stop_if_bad(bad, "masks")
    binary = check_values(files)
    largest = 1 if binary else max(files)
    labels = to_class_numbers(torch.stack(pixels), binary)
    return {"pixels": labels, "binary": binary, "largest": largest}


def decode_masks(data, visible):
    """-> {image number: mask (S, S) uint8}, are masks binary?, number of classes."""
    for part in ("val", "test"):
        for volume, indices in data.volumes(part).items():
            sizes = sorted({data.sizes[i] for i in indices})
            if len(sizes) > 1:
                stop(f"the slices of {volume} differ in size: {some(sizes)}. Expected one size.")
    files = []
    for i in visible:
        files += [data.items[i].image, data.items[i].mask]
    path = cache_path("masks", files, data.args)
    if not path.exists():
        write_cache(path, read_masks(data, visible))
    content = open_cache(path)
    labels = dict(zip(visible, content["pixels"], strict=True))
    largest = content["largest"]
    classes = data.args.classes or largest + 1
    if largest >= classes:
        stop(f"--classes {classes}, but the masks hold class {largest}. Expected at least "
             f"{largest + 1}.")
    return labels, content["binary"], classes


# --- Phantom: an ordinary dataset folder of drawn, cardiac-like slices ----------------------------

def texture(rng, scale, size):
    """Smooth noise (size, size): `scale` x `scale` normal numbers, interpolated."""
    coarse = Image.fromarray(rng.normal(size=(scale, scale)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.BICUBIC))


def draw_slice(rng, patient, x, y, radius, wall, level):
    """Image and mask (size, size) uint8 of one slice.

    Classes as in ACDC: 1 right ventricle, 2 myocardium, 3 left ventricle.
    """
    size = len(x)
    cos, sin = math.cos(patient["turn"]), math.sin(patient["turn"])
    dx, dy = x - patient["cx"], y - patient["cy"]
    u = (dx * cos + dy * sin) * patient["aspect"]
    v = dy * cos - dx * sin
    distance = np.hypot(u, v) * (1 + 0.06 * texture(rng, 5, size))
    side = np.hypot((u + radius + wall) / 1.15, v / 1.25) * (1 + 0.06 * texture(rng, 5, size))
    mask = np.where(side < (radius + 0.5 * wall) * (1.0 - 0.08 * level), 1, 0)
    mask = np.where(distance < radius + wall, 2, mask)
    mask = np.where(distance < radius, 3, mask)
    image = patient["fat"] * 0.35 + 0.08 * texture(rng, 7, size)
    for bx, by, a, b, brightness in patient["distractors"]:
        image = np.where(np.hypot((x - bx) / a, (y - by) / b) < 1, brightness, image)
    blood, muscle = patient["blood"], patient["muscle"]
    image = np.choose(mask, [image, blood * 0.95, muscle, blood])
    image = image + 0.06 * texture(rng, size // 4, size)
    image = image + patient["slope"][0] * x + patient["slope"][1] * y  # bias field
    image = np.clip(image, 0.01, 1) ** patient["gamma"] + rng.normal(size=(size, size)) * 0.05
    return (image.clip(0, 1) * 255).astype(np.uint8), mask.astype(np.uint8)


def draw_patient(rng):
    """What all slices of a patient share: pose, shape, contrast, bias field, distractors."""
    ranges = {"cx": (-0.2, 0.2), "cy": (-0.2, 0.2), "turn": (-0.6, 0.6), "radius": (0.28, 0.40),
              "wall": (0.09, 0.15), "aspect": (0.8, 1.25), "blood": (0.5, 0.95),
              "muscle": (0.1, 0.5), "fat": (0.0, 1.2), "gamma": (0.6, 1.6)}
    low, high = zip(*ranges.values(), strict=True)
    patient = dict(zip(ranges, rng.uniform(low, high).tolist(), strict=True))
    patient["slope"] = rng.normal(size=2) * 0.2
    patient["distractors"] = []
    for _ in range(7):
        centre, radii = rng.uniform(-0.9, 0.9, 2), rng.uniform(0.08, 0.25, 2)
        patient["distractors"].append((*centre, *radii, rng.uniform(0.1, 0.95)))
    return patient


def draw_phantom(folder, size, patients=48, seed=0):
    """Draw the phantom into a folder, unless it is there: two frames of four slices a patient.

    The first 14 patients are for training, the next 10 for validation, the other 24 for test.
    -> the folder's name.
    """
    if folder.exists():
        return str(folder)
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    aside = folder.with_name(f"building-{os.urandom(4).hex()}.tmp")
    try:
        for part in ("images", "masks"):
            (aside / part).mkdir(parents=True)
        for number in range(patients):
            patient = draw_patient(rng)
            for frame, squeeze in ((1, 1.0), (2, rng.uniform(0.6, 0.8))):
                for level in range(4):
                    radius = patient["radius"] * squeeze * (1 - 0.13 * level)
                    wall = patient["wall"] * (1.5 - 0.5 * squeeze)
                    image, mask = draw_slice(rng, patient, x, y, radius, wall, level)
                    name = f"p{number:02d}_frame{frame:02d}_slice_{level:02d}.png"
                    Image.fromarray(image).save(aside / "images" / name)
                    Image.fromarray(mask).save(aside / "masks" / name)
        units = [f"p{number:02d}\n" for number in range(patients)]
        lists = {"train": units[:14], "val": units[14:24], "test": units[24:]}
        for part, names in lists.items():
            (aside / f"{part}.txt").write_text("".join(names))
        os.rename(aside, folder)
    except OSError as error:
        if not folder.exists():  # otherwise a run beside this one was faster
            stop(f"the phantom cannot be drawn into {folder} ({error}). Free some space, or choose "
                 "another folder with --cache FOLDER.")
    finally:  # after Ctrl-C, too
        shutil.rmtree(aside, ignore_errors=True)
    return str(folder)


# --- Distances ------------------------------------------------------------------------------------

def surface_points(mask):
    """Pixels of a bool mask (H, W) or (D, H, W) touching the outside by a face: (N, 3) z, y, x."""
    padded = np.pad(mask, 1)
    inner = padded.copy()
    for axis in range(mask.ndim):
        inner &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
    surface = padded & ~inner
    return np.argwhere(surface.reshape(-1, *padded.shape[-2:]))


def column_squares(mask):
    """Squared distance from each pixel (D, H, W) to the nearest True in its column (along H)."""
    y = np.arange(mask.shape[1])[:, None]
    above = np.maximum.accumulate(np.where(mask, y, -np.inf), 1)
    below = np.minimum.accumulate(np.where(mask, y, np.inf)[:, ::-1], 1)[:, ::-1]
    return np.minimum(y - above, below - y) ** 2


def nearest_squares(columns, slices, z, y, x):
    """Squared distance from the points (z, y[i], x[i]) of one slice to the nearest target: (N,).

    slices: the numbers of the slices that hold targets; columns: their column_squares. Slices are
    visited by their distance from z. A point is done when no slice that is left can be nearer.
    """
    every_x = np.arange(columns.shape[2])
    nearest = np.full(len(y), np.inf)
    searched = np.arange(len(y))
    for k in np.argsort(abs(slices - z), kind="stable"):
        square = (slices[k] - z) ** 2
        searched = searched[nearest[searched] > square]
        if len(searched) == 0:
            break
        in_rows = columns[k, y[searched]]  # (N, W)
        in_slice = (in_rows + (x[searched, None] - every_x) ** 2).min(1)
        nearest[searched] = np.minimum(nearest[searched], in_slice + square)
    return nearest


def distances_to(target, points):
    """Euclidean distance from each of the points (N, 3) to the nearest target point (M, 3): (N,).

    Exact, an axis at a time: along columns for all pixels of the box that holds both sets, then
    along rows and slices for the points alone.
    """
    low = np.minimum(target.min(0), points.min(0))
    target, points = target - low, points - low
    mask = np.zeros(np.maximum(target.max(0), points.max(0)) + 1, bool)  # (D, H, W)
    mask[tuple(target.T)] = True
    slices = np.flatnonzero(mask.any((1, 2)))
    columns = column_squares(mask[slices])
    squares = np.empty(len(points))
    for z in np.unique(points[:, 0]):
        here = np.flatnonzero(points[:, 0] == z)
        parts = 1 + len(here) * mask.shape[2] // 2**22  # bounded memory
        for part in np.array_split(here, parts):
            squares[part] = nearest_squares(columns, slices, z, points[part, 1],
                                            points[part, 2])
    return np.sqrt(squares)


# --- Run: folder, log, checkpoints, resume, results -----------------------------------------------

LOG_EVERY = 20  # steps in a row of log.csv
LABELED_ONLY_DICE, ALL_LABELS_DICE = 69.0, 84.5  # on the phantom, from tests/results/phantom.csv


def digest(names):
    """Eight letters that stand for a list of names."""
    text = "\n".join(names).encode(errors="surrogateescape")  # some names are not UTF-8
    return hashlib.sha256(text).hexdigest()[:8]


def new_folder(parent, title):
    """Make parent/title, or title-2, title-3, ... if it exists: no run overwrites another.

    -> the folder, the same one in all processes of a run.
    """
    folder = parent / title
    for n in itertools.count(2):
        if not is_first():
            break
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            folder = parent / f"{title}-{n}"
        except OSError as error:
            stop(f"--out: {folder} cannot be made ({error}). Choose another folder.")
    return gather(folder)[0]


class Run:
    """One training run: its folder, the loop's steps, log, checkpoints and scores.

    file: the method's __file__, after which the run is named. networks: {name: network}. parts:
    what else a checkpoint holds, the optimizer and the gradient scaler. predict(networks, x) ->
    {name: probabilities (B, C, H, W)}. headline: the name that the paper deploys.
    pictures(networks, x) -> further columns of preview.png, {title: images (B, 1 or 3, H, W)}.
    """

    def __init__(self, file, args, data, networks, parts, predict, headline, pictures):
        self.file = self.method = Path(file).stem
        if getattr(args, "supervised", False):
            self.method = "supervised"
        self.args, self.data, self.networks, self.parts = args, data, networks, parts
        self.predict, self.headline, self.pictures = predict, headline, pictures
        self.labeled = Path(args.labeled or "100%").name.removesuffix(".txt")
        self.first_step, self.saved_step, self.best = 0, 0, -1.0
        self.start = time.time()
        self.sums, self.count, self.rows = {}, 0, []
        self.split = {}  # {part: image names}
        for part in ("labeled", "unlabeled", "val", "test"):
            self.split[part] = [data.items[i].name for i in data.indices(part)]
        self.split_digest = digest([json.dumps(self.split)])
        if args.resume:
            self.folder = Path(args.resume)
            self.check_split()
            self.load_last()
        else:
            self.folder = new_folder(Path(args.out, data.name), self.title())
            content = {"digest": self.split_digest, **self.split}
            write_aside(self.folder / "split.json", content, write_json)
            write_aside(self.folder / "args.json", vars(args), write_json)
        self.introduce()
        sys.excepthook = self.explain

    def title(self):
        """The folder's name: method, labelled share, seed, each other option off its default."""
        words = [self.method, self.labeled, f"seed{self.args.seed}"]
        for option, value in sorted(self.args.options.items()):
            value = re.sub(r"[\\/:]", "_", str(value))[-40:]
            words.append(f"{option}_{value}")
        return "-".join(words)

    def introduce(self):
        """Print what is trained, on what, and where it goes."""
        data, args = self.data, self.args
        print(f"{self.method} on {data.name}: {data.classes} classes; {args.device}, "
              f"{args.precision}, {torch.get_num_threads()} threads")
        for part in self.split:
            print(f"{part}: {count_words(data, part)}: {some(data.units(part))}")
        print_classes(data)
        for warning in warnings_of(data):
            print(f"warning: {warning}")
        print(f"split {self.split_digest}; run folder: {self.folder}")

    def explain(self, kind, error, trace):
        """For sys.excepthook: Ctrl-C gets a message, other errors their traceback."""
        if kind is not KeyboardInterrupt:
            explain(kind, error, trace)
        elif self.saved_step > 0:
            print(f"\ninterrupted. To continue after step {self.saved_step}, the last checkpoint: "
                  f'python {self.file}.py --resume "{self.folder}"')
        else:
            print("\ninterrupted before the first checkpoint; to start anew: "
                  f'python {self.file}.py --resume "{self.folder}"')

    def steps(self):
        """0, 1, ... below --steps, with a progress bar; --resume begins at the checkpoint."""
        first, total = self.first_step, self.args.steps
        disable = None if is_first() else True  # None: no bar where the output is no terminal
        with tqdm(total=total, initial=first, desc=self.method, disable=disable) as self.bar:
            for step in range(first, total):
                if step == first + 2:  # the first steps are slower than the others
                    start = time.time()
                if step == first + 12:
                    seconds = (time.time() - start) / 10
                    minutes = math.ceil(seconds * (total - step) / 60)
                    left = plural(minutes, "minute")
                    self.say(f"{seconds:.2g} seconds a step, about {left} left")
                yield step
                self.bar.update()

    def say(self, text):
        """Print a line, above the progress bar if there is one."""
        tqdm.write(text, sys.stdout)

    def log(self, **terms):
        """Add a step's loss terms and diagnostics (scalars) without waiting for the device."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + torch.as_tensor(value).detach()
        self.count += 1

    def save(self, step):
        """End of a step. Every 20 steps: a row of log.csv. Every --val-every: validate, checkpoint.

        A term that is not finite ends the run, and nothing is saved after that.
        """
        done = step + 1
        validate = done % self.args.val_every == 0 or done == self.args.steps
        if done % LOG_EVERY and not validate:
            return
        row = {"step": done, **self.mean_terms(done), "val_dice": ""}
        better = False
        if validate:
            row["val_dice"] = self.validate(done, row["loss"])
            better = row["val_dice"] > self.best
            self.best = max(row["val_dice"], self.best)
        self.rows.append(row)
        self.write_log()
        if validate:
            self.write_checkpoints(done, better)

    def mean_terms(self, done):
        """The logged terms' means since the last row: {name: float}."""
        means = {}
        for name, total in self.sums.items():
            means[name] = total.item() / self.count
            if not math.isfinite(means[name]):
                kept = "There is no checkpoint yet."
                if (self.folder / "last.pt").exists():
                    kept = f"{self.folder} has the last checkpoint before that."
                stop(f"{name} is {means[name]} between steps {done - self.count} and {done}. "
                     f"{kept} Lower --lr.", status=1)
        self.sums, self.count = {}, 0
        shown = {name: f"{means[name]:.3f}" for name in ("loss", "lam") if name in means}
        self.bar.set_postfix(shown, best=f"{self.best:.1f}")
        return means

    def validate(self, done, loss):
        """Score the validation units; the Dice of the headline's network."""
        average_statistics(self.networks)
        scores = evaluate(self.predict, self.networks, self.data, "val", distances=False)
        dice = {name: summary["dice"] or 0.0 for name, summary in scores.items()}
        words = ", ".join(f"{name} {value:.1f}" for name, value in dice.items())
        self.say(f"step {done}/{self.args.steps}  loss {loss:.3f}  validation Dice {words}")
        return dice[self.headline]

    def write_log(self):
        """Write all rows of log.csv again, so that a resumed run has no row twice."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_aside(self.folder / "log.csv", text.getvalue(), write_text)

    def write_checkpoints(self, done, better):
        """best.pt has what predicting needs, last.pt also what --resume needs."""
        data, args = self.data, self.args
        state = {"file": self.file, "method": self.method, "step": done, "headline": self.headline,
                 "predict": self.predict.__name__, "size": args.size, "width": args.width,
                 "channels": data.channels, "classes": data.classes,
                 "class_names": data.class_names,
                 "networks": {name: net.state_dict() for name, net in self.networks.items()}}
        if better:
            write_aside(self.folder / "best.pt", state, write_tensors)
        random = {"cpu": torch.get_rng_state()}
        if args.device.startswith("cuda"):
            random["cuda"] = torch.cuda.get_rng_state(args.device)
        state["parts"] = [part.state_dict() for part in self.parts]
        state["random"] = gather(random)
        state["drawn"] = data.drawn
        state["rows"] = self.rows
        state["best"] = self.best
        state["seconds"] = time.time() - self.start
        write_aside(self.folder / "last.pt", state, write_tensors)
        self.saved_step = done

    def check_split(self):
        """--resume: stops if the dataset's split is not the run's any more."""
        path = self.folder / "split.json"
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))["digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            stop(f"--resume: {path} cannot be read ({error!r}). Start a new run.")
        if saved != self.split_digest:
            stop(f"--resume: {self.folder} has split {saved}, the dataset now has "
                 f"{self.split_digest}. Restore the dataset's files and lists.")

    def load_last(self):
        """--resume: networks, optimizer, random numbers (CPU, CUDA), batches and log of last.pt."""
        path = self.folder / "last.pt"
        if not path.exists():
            print(f"--resume: no checkpoint yet in {self.folder}, starting at step 0")
            return
        state = load_checkpoint(path, "--resume", TO_RESUME)
        if state["file"] != self.file:
            stop(f"--resume {self.folder}: a run of {state['file']}.py. Resume it with that file.")
        for name in ("channels", "classes"):
            if state[name] != getattr(self.data, name):
                stop(f"--resume: the run had {state[name]} {name}, the dataset now has "
                     f"{getattr(self.data, name)}. Restore the dataset's files.")
        count = processes()[1]
        if len(state["random"]) != count:
            stop(f"--resume: the run had {len(state['random'])} processes, now {count}.")
        load_weights(self.networks, state, path)
        for part, saved in zip(self.parts, state["parts"], strict=True):
            if saved:  # {}: a gradient scaler that was off
                part.load_state_dict(saved)
        [random] = my_share(state["random"])
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and self.args.device.startswith("cuda"):
            torch.cuda.set_rng_state(random["cuda"], self.args.device)
        for _ in range(state["drawn"]):
            self.data.draw()
        self.first_step = self.saved_step = state["step"]
        self.best, self.rows = state["best"], state["rows"]
        self.start = time.time() - state["seconds"]
        print(f"--resume: continuing at step {self.first_step}")

    def finish(self):
        """Score the test units, once, with the last and the best networks; returns the results.

        They are written to results.json, with preview.png beside it, and printed as a table.
        """
        if not is_first():  # the first process scores alone
            return {}
        self.write_preview()
        data, args = self.data, self.args
        last = evaluate(self.predict, self.networks, data, "test")
        last = {self.headline: last[self.headline]} | last  # first in the table
        best, best_step = last, args.steps
        state = {"step": args.steps}
        if self.saved_step > 0:  # then there must be one: a missing best.pt is not passed over
            state = load_checkpoint(self.folder / "best.pt", "best.pt")
        if state["step"] < args.steps:
            networks = copy.deepcopy(self.networks)  # the last ones stay in place
            load_weights(networks, state, self.folder / "best.pt")
            best, best_step = evaluate(self.predict, networks, data, "test"), state["step"]
        headline = {metric: last[self.headline][metric] for metric in METRICS}
        volumes = data.volumes("test")
        results = {
            "file": self.file, "method": self.method, "dataset": data.name,
            "labeled": self.labeled, "seed": args.seed, "options": args.options,
            "args": vars(args), "split": {part: digest(self.split[part]) for part in self.split},
            "headline": {"network": self.headline, **headline}, "best_step": best_step,
            "seconds": round(time.time() - self.start), "device": device_name(args.device),
            "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
            "units": {volume: data.items[i[0]].unit for volume, i in volumes.items()},
            "networks": {name: {"last": last[name], "best": best[name]} for name in last}}
        write_aside(self.folder / "results.json", results, write_json)
        self.print_results(results)
        return results | {"folder": str(self.folder)}

    def write_preview(self):
        """Write preview.png: images, true masks, predictions, and the method's own pictures."""
        chosen = examples(self.data, "val")
        x = self.data.load_images(chosen)
        y = self.data.load_labels(chosen)
        columns = {"image": x, "truth": overlay(x, y)}
        with evaluating(self.networks):
            predicted = self.predict(self.networks, x)
            for name, probs in predicted.items():
                columns[name] = overlay(x, probs.argmax(1))
            columns |= self.pictures(self.networks, x)
        captions = []
        for i, pred, truth in zip(chosen, predicted[self.headline].argmax(1), y, strict=True):
            scores = []
            for c in range(1, self.data.classes):
                masks = (pred == c).cpu().numpy(), (truth == c).cpu().numpy()
                scores.append(mask_scores(*masks, distances=False))
            dice = cell(mean_score(scores, "dice"))
            captions.append(f"{self.data.items[i].name}\n{self.headline}: Dice {dice}")
        save_sheet(self.folder / "preview.png", columns, self.data.class_names, captions)

    def print_results(self, results):
        """The table at the end of a run."""
        data = self.data
        print(f"\nTest: {count_words(data, 'test')}")
        rows = [["network, checkpoint", "Dice %", "Jaccard %", "HD95 px", "ASD px", ""]]
        for name, scores in results["networks"].items():
            for when in ("last", "best"):
                title = when
                if when == "best":
                    title = f"best on val ({results['best_step']})"
                mark = ""
                if (name, when) == (self.headline, "last"):
                    mark = "<- headline"
                cells = [cell(scores[when][metric]) for metric in METRICS]
                rows.append([f"{name}, {title}", *cells, mark])
        print_table(rows)
        head = results["networks"][self.headline]["last"]
        for c, scores in head["classes"].items():
            empty = head["empty"][c]
            absent = empty["both"] + empty["truth"]
            words = f"{data.class_names[int(c)]}: Dice {cell(scores['dice'])}"
            what = "volume"
            if len(head["volumes"]) == len(data.indices("test")):
                what = "image"
            if empty["prediction"] > 0:
                words += f"; not found in {empty['prediction']} of "
                words += f"{plural(len(head['volumes']) - absent, what)} with it"
            if empty["truth"] > 0:
                words += f"; found in {empty['truth']} of {plural(absent, what)} without it"
            print(words)
        self.print_comparison()
        print(f"results.json, preview.png, log.csv, last.pt and best.pt are in {self.folder}")

    def print_comparison(self):
        """What the Dice of a run is to be compared with, if README's table has its settings."""
        changed = set(self.args.options) & {*SETTINGS, "split_seed"}
        if self.data.name == "phantom-48" and self.labeled == "10%" and not changed:
            print("for comparison, means of three seeds (README, Results): labelled images "
                  f"alone {LABELED_ONLY_DICE:.1f}, all labels {ALL_LABELS_DICE:.1f}")


# --- Finished runs --------------------------------------------------------------------------------

class LoadedRun(NamedTuple):
    """What load_run returns: a checkpoint's content, its networks, and the method's predict."""

    state: dict
    networks: dict
    predict: object
    device: str


TO_PREDICT = ("file", "method", "step", "headline", "predict", "size", "width", "channels",
              "classes", "class_names", "networks")
TO_RESUME = (*TO_PREDICT, "parts", "random", "drawn", "rows", "best", "seconds")


def checkpoint_file(path):
    """A run folder's last.pt; a checkpoint file itself."""
    path = Path(path)
    if path.is_dir():
        return path / "last.pt"
    return path


def load_checkpoint(path, what, keys=TO_PREDICT):
    """A checkpoint file's content; stops with a message if it is none, or damaged."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = [key for key in keys if key not in state]
        if missing:
            raise ValueError(f"no checkpoint of this project, it lacks {some(missing)}")
        for name, weights in state["networks"].items():
            for key, tensor in weights.items():
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{key} of {name} is not finite")
    except Exception as error:  # torch.load raises a dozen types on damaged files
        reason = str(error).partition("\n")[0].partition(". ")[0][:200]
        if "weights_only" in str(error) or "Weights only" in str(error):
            reason = "it holds more than weights"  # torch would advise to run what it holds
        stop(f"{what}: {path} cannot be used ({type(error).__name__}: {reason}). Expected a run "
             "folder, or its last.pt or best.pt.")
    return state


def load_weights(networks, state, path):
    """Copy a checkpoint's weights into {name: network}; stops if they do not fit."""
    try:
        for name, network in networks.items():
            network.load_state_dict(state["networks"][name])
    except (KeyError, RuntimeError, TypeError, AttributeError):
        stop(f"{path} cannot be used: its networks have other names, layers or sizes than "
             f"{state['file']}.py builds. Was it made by another version?")


def load_run(path, device="cpu"):
    """A run folder or a checkpoint file -> LoadedRun, its networks in evaluation mode.

    The networks are built by the method's file, which must lie beside this one.
    """
    path = checkpoint_file(path)
    state = load_checkpoint(path, "run")
    file = state["file"]
    if not (re.fullmatch(r"[\w -]+", file) and Path(__file__).with_name(f"{file}.py").exists()):
        stop(f"run: {path} was made by {file}.py, which is not here.")
    method = importlib.import_module(file)
    try:
        built = method.build(state["channels"], state["classes"], state["width"])
    except (RuntimeError, TypeError, ValueError) as error:  # numbers that build no network
        stop(f"run: {path} cannot be used: its networks cannot be built ({error}).")
    networks = {name: built[name] for name in state["networks"] if name in built}
    load_weights(networks, state, path)
    for network in networks.values():
        network.to(device).eval()
    predict = getattr(method, state["predict"], None)
    if not state["predict"].startswith("predict"):
        predict = None
    if predict is None or not networks or len(networks) < len(state["networks"]):
        stop(f"run: {path} cannot be used: it was made by another version of {file}.py.")
    return LoadedRun(state, networks, predict, device)


def load_network(args, network):
    """--init: copy the weights of a run's headline network into this one, if they fit.

    Not when the run resumes from a checkpoint of its own: that has newer ones.
    """
    if args.resume and Path(args.resume, "last.pt").exists():
        return
    state = load_checkpoint(checkpoint_file(args.init), "--init", ("headline", "networks"))
    try:
        network.load_state_dict(state["networks"][state["headline"]])
    except (KeyError, RuntimeError):  # KeyError: a branch of a network, not a network
        stop(f"--init {args.init}: its {state['headline']} has other layers or sizes than this "
             "run. Expected the U-Net of a run on the same dataset and with the same --width.")
    print(f"--init: starting from {state['headline']} of {args.init}")


def segment(run, image, network=None):
    """A LoadedRun and an image (H, W) or (H, W, 3) of any size -> class numbers (H, W) uint8.

    As `predict` writes them. An image that is not uint8 is scaled by its own percentiles.
    ValueError: another shape, or values that are no finite numbers.
    """
    mode = {1: "L", 3: "RGB"}[run.state["channels"]]
    size = run.state["size"]
    [image] = to_bytes([check_array(image)])
    small = Image.fromarray(image).convert(mode).resize((size, size), Image.BILINEAR)
    x = tvf.to_image(small)[None].to(run.device) / 255  # (1, channels, S, S)
    with torch.no_grad():
        probs = run.predict(run.networks, x)
    network = network or run.state["headline"]
    if network not in probs:
        stop(f"--network {network}: the run has {', '.join(probs)}.")
    probs = F.interpolate(probs[network], image.shape[:2], mode="bilinear")
    return probs.argmax(1)[0].byte().cpu().numpy()


# --- Pictures -------------------------------------------------------------------------------------

COLORS = ["#00e5ff", "#a6ff00", "#e6194b", "#ffe119", "#4363d8", "#f032e6", "#f58231", "#3cb44b"]
TILE = 160  # pixels of a picture in a sheet


def overlay(x, labels):
    """Images (B, channels, H, W) in [0, 1], label maps (B, H, W) over them: (B, 3, H, W) uint8."""
    pictures = []
    for image, label in zip(x.cpu(), labels.cpu(), strict=True):
        classes = torch.arange(1, max(2, int(label.max()) + 1))
        masks = label == classes[:, None, None]  # (C - 1, H, W)
        image = (image.expand(3, -1, -1) * 255).byte()
        pictures.append(draw_segmentation_masks(image, masks, 0.5, COLORS * 4))
    return torch.stack(pictures)


def heat(title, values):
    """Maps (B, H, W), 0 or larger -> a column for save_sheet: {title and maximum: grey images}."""
    largest = values.max().clamp_min(1e-8).item()
    return {f"{title}\nwhite: {largest:.2g}": (values / largest)[:, None]}


def examples(data, part):
    """The middle slices of at most four volumes of a part, for pictures: image numbers."""
    volumes = list(data.volumes(part).values())
    some_volumes = volumes[::max(1, len(volumes) // 4)][:4]
    return [indices[len(indices) // 2] for indices in some_volumes]


def draw_legend(sheet, names, top):
    """Write the names of the classes but the background in their colours, a line each."""
    for i, name in enumerate(names[1:]):
        color = COLORS[i % len(COLORS)]
        font = ImageFont.load_default(12)
        ImageDraw.Draw(sheet).text((4, top + 16 * i), name, color, font)


def save_sheet(path, columns, names, captions):
    """A PNG of titled columns {title: images (B, 1 or 3, H, W), in [0, 1] or uint8}, and a legend.

    names: of the classes, background first. captions: a line for each row, over its first image.
    """
    tiles = []
    for images in columns.values():
        if images.is_floating_point():
            images = (images * 255).byte()
        images = images.cpu().expand(-1, 3, -1, -1)
        tiles.append(F.interpolate(images, (TILE, TILE)))
    rows = torch.stack(tiles, 1).flatten(0, 1)  # row by row
    grid = make_grid(rows, nrow=len(columns), pad_value=255)
    below = 16 * len(names)
    sheet = tvf.to_pil_image(F.pad(grid, (0, 0, 40, below), value=255))
    ImageDraw.Draw(sheet).rectangle((0, sheet.height - below, sheet.width, sheet.height), "black")
    draw_legend(sheet, names, sheet.height - below + 4)
    for i, title in enumerate(columns):
        xy = (4 + i * (TILE + 2), 3)
        ImageDraw.Draw(sheet).text(xy, title, "black", ImageFont.load_default(13))
    for i, caption in enumerate(captions):
        xy = (5, 44 + i * (TILE + 2))
        ImageDraw.Draw(sheet).text(xy, caption, "white", ImageFont.load_default(11),
                                   stroke_width=2, stroke_fill="black")
    write_aside(path, sheet, write_png)


# --- Tables ---------------------------------------------------------------------------------------

def cell(value):
    """A number for a table."""
    if value is None or math.isnan(value):
        return "n/a"
    return f"{value:.2f}"


def print_table(rows):
    """Print rows of texts in aligned columns, the first to the left, the others to the right."""
    widths = [max(len(text) for text in column) for column in zip(*rows, strict=True)]
    for row in rows:
        words = [row[0].ljust(widths[0])]
        for text, width in zip(row[1:], widths[1:], strict=True):
            words.append(text.rjust(width))
        print("  ".join(words).rstrip())


# --- Data doctor: what a run prints at its start, and check in full -------------------------------

def class_counts(data, part):
    """Of the masks of a part: pixels of each class (C,), images that have it (C,)."""
    pixels, images = np.zeros(data.classes, int), np.zeros(data.classes, int)
    for i in data.indices(part):
        count = np.bincount(data.labels[i].numpy().ravel(), minlength=data.classes)
        pixels += count
        images += count > 0
    return pixels, images


def print_classes(data):
    """A table: of each class the share of pixels, and how many images of each part have it."""
    counts = {part: class_counts(data, part) for part in ("labeled", "val", "test")}
    pixels = sum(pixels for pixels, _ in counts.values())
    rows = [["class", "of pixels", *(f"in {part} images" for part in counts)]]
    for c, name in enumerate(data.class_names):
        share = f"{pixels[c] / pixels.sum():.2%}"
        rows.append([f"{c} {name}", share, *(str(images[c]) for _, images in counts.values())])
    print_table(rows)


def class_warnings(data):
    """Sentences about classes: too many, in one image alone, not in the labelled images."""
    _, labeled = class_counts(data, "labeled")
    images = labeled + class_counts(data, "val")[1] + class_counts(data, "test")[1]
    found = []
    if data.classes > 8:
        found.append(f"{data.classes} classes. If masks number objects (instances), not classes: "
                     f"{RECIPES}.")
    rare = [data.class_names[c] for c in range(data.classes) if images[c] == 1]
    if rare and len(data.labels) > 3:
        found.append(f"in one image alone: {some(rare)}. If masks number objects (instances), not "
                     f"classes: {RECIPES}.")
    missing = [data.class_names[c] for c in range(data.classes) if labeled[c] == 0]
    if missing:
        found.append(f"no labelled image has {some(missing)} (at --size {data.args.size}), so it "
                     "cannot be learned. Label other units (--labeled, --split-seed), or enlarge "
                     "--size.")
    return found


def unused_warnings(data):
    """Sentences about what was passed over: files with other endings, images that no list names."""
    found = []
    for part, endings in ENDINGS_IN.items():
        folder = Path(data.args.data, part)
        if not folder.is_dir():
            continue
        names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
        passed = sorted(name for name in names if Path(name).suffix.lower() not in endings)
        if passed:
            found.append(f"passed over in {part}: {len(passed)} that do not end in "
                         f"{' '.join(endings)} ({some(passed)}).")
    used = {i for part in data.split.values() for i in part}
    unused = [item.name for i, item in enumerate(data.items) if item.mask and i not in used]
    if unused:
        found.append(f"not used at all: {plural(len(unused), 'image')} with masks, in no list "
                     f"({some(unused)}). In train.txt they would be unlabelled images.")
    return found


def name_warnings(data):
    """Sentences about names that may mean something else."""
    found = []
    names = {item.name for item in data.items}
    longer = [name for name in sorted(names) if name.rpartition("_")[0] in names]
    if longer:
        found.append(f"{plural(len(longer), 'image')} named like another with a suffix "
                     f"({some(longer)}). If they are masks or the like, move them out of images.")
    groups = {}
    for item in data.items:
        if item.unit == item.name:
            stem = re.sub(r"\d+(?=\D*$)", "", item.name)  # without its last number
            groups.setdefault(stem, []).append(item.name)
    stacks = [names for names in groups.values() if len(names) > 1]
    if len(stacks) > 2:
        found.append(f"{len(stacks)} groups of images differ in their last number alone "
                     f"({some(stacks[0], 2)}). If they are slices or frames of one patient, name "
                     "them PATIENT_slice_000, so that they stay in one part of the split.")
    moments = {}  # {patient: units}, of slices named patient001_ED_slice_00, patient001_ES_slice_00
    for unit in sorted({item.unit for item in data.items if item.unit != item.name}):
        patient, _, word = unit.rpartition("_")
        if word.isalpha():
            moments.setdefault(patient, []).append(unit)
    doubled = [units for units in moments.values() if len(units) > 1]
    if len(doubled) > 1:
        found.append(f"{len(doubled)} patients in several units ({some(doubled[0])})? Then name "
                     "them PATIENT_frame01_slice_00, PATIENT_frame02_slice_00, so that a patient "
                     "stays in one part of the split.")
    return found


def warnings_of(data):
    """The sentences that a run says at its start; check adds others."""
    return [*class_warnings(data), *unused_warnings(data), *name_warnings(data)]


def intensity_warnings(data):
    """Prints the stored range of a sample of images and what a network sees; warns of dark ones."""
    sample = range(0, len(data.items), max(1, len(data.items) // 50))
    arrays = [read_pixels(data.items[i].image) for i in sample]
    low, high = min(array.min() for array in arrays), max(array.max() for array in arrays)
    used = data.images[list(sample)]
    print(f"intensities of {len(arrays)} images: stored as {arrays[0].dtype} from {low:g} to "
          f"{high:g}, used from {used.min()} to {used.max()}, mean {used.float().mean():.0f}")
    share = np.percentile(used.numpy(), 99.5) / 255
    if arrays[0].dtype == np.uint8 and share < 0.2:
        return [f"the images use {share:.0%} of the range of intensities. Stored as 16-bit, they "
                "are scaled to it (README, Your own data)."]
    return []


def print_reachable_dice(data):
    """Of some test masks, for each class: the Dice of the mask itself, reduced to --size and back.

    A network that gives what it was taught cannot be better: thin structures need a larger --size.
    """
    dice = {c: [] for c in range(1, data.classes)}
    for i in data.indices("test")[:50]:
        truth = data.truth(i)
        onehot = F.one_hot(data.labels[i].long(), data.classes).movedim(2, 0)[None].float()
        again = F.interpolate(onehot, truth.shape, mode="bilinear").argmax(1)[0].numpy()
        for c in dice:
            scores = mask_scores(again == c, truth == c, distances=False)
            if scores is not None:
                dice[c].append(scores["dice"])
    words = []
    for c, values in dice.items():
        if values:
            words.append(f"{data.class_names[c]} {sum(values) / len(values):.1f}")
    print(f"best Dice that --size {data.args.size} allows: {', '.join(words)}")


def folder_checks():
    """The functions check_folder(data) of the method files beside this one that have such."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        has_one = "\ndef check_folder(" in path.read_text("utf-8", "replace")
        if has_one and path != Path(__file__):  # no other file is imported: it may do anything
            found.append(importlib.import_module(path.stem).check_folder)
    return found


# --- Commands -------------------------------------------------------------------------------------

def check_data(args):
    """The data doctor: everything about a dataset that a run depends on. Reads hidden masks too."""
    data = Data(args)
    items = data.items
    masked = [i for i, item in enumerate(items) if item.mask is not None]
    everything = read_masks(data, masked)
    volumes = {item.volume for item in items}
    units = {item.unit for item in items}
    print(f"{data.name}: {len(items)} images, {len(masked)} with masks, {len(units)} units "
          f"(patients, or images that are no slices), {len(volumes)} volumes")
    for i in sorted({0, len(items) // 2, len(items) - 1}):
        print(f"  {items[i].name}: unit {items[i].unit}, volume {items[i].volume}")
    sizes = [f"{h} x {w}" for h, w in sorted(set(data.sizes))]
    print(f"sizes: {some(sizes)}; channels: {data.channels}")
    dark = intensity_warnings(data)
    for part in data.split:
        print(f"{part}: {count_words(data, part)}: {some(data.units(part))}")
    print_classes(data)
    print_reachable_dice(data)
    for check_folder in folder_checks():
        check_folder(data)
    warnings_found = [*warnings_of(data), *dark]
    if everything["largest"] >= data.classes:
        warnings_found.append(f"masks that a run does not see hold class {everything['largest']}")
    for warning in warnings_found:
        print(f"warning: {warning}")
    labeled = data.indices("labeled")
    chosen = labeled[::max(1, len(labeled) // 6)][:6]
    x = data.load_images(chosen)
    path = Path(args.out, data.name, "check.png")
    columns = {"image": x, "mask": overlay(x, data.load_labels(chosen))}
    captions = [data.items[i].name for i in chosen]
    save_sheet(path, columns, data.class_names, captions)
    words = "no problem found"
    if warnings_found:
        words = f"{plural(len(warnings_found), 'warning')}, no error"
    print(f"{words}; look at {path}")


def write_prediction(run, image, labels, name, out):
    """OUT/masks/NAME.png, class numbers, and OUT/overlays/NAME.png, colours with a legend."""
    write_aside(out / "masks" / f"{name}.png", Image.fromarray(labels), write_png)
    x = tvf.to_image(Image.fromarray(image))[None] / 255
    picture = tvf.to_pil_image(overlay(x, torch.from_numpy(labels)[None])[0])
    names = run.state["class_names"]
    size = max(picture.width, 150), picture.height + 16 * (len(names) - 1)
    sheet = Image.new("RGB", size)
    sheet.paste(picture)
    draw_legend(sheet, names, picture.height)
    write_aside(out / "overlays" / f"{name}.png", sheet, write_png)


def predict_images(args):
    """Segment images with a run's network; write masks (class numbers) and overlays at their size.

    Files that cannot be read are named and skipped; the exit status is then 1.
    """
    run = load_run(args.run, choose_device(args.device))
    source = args.images
    if (source / "images").is_dir():
        source = source / "images"
    files = {}
    if source.is_dir():
        files = list_files(source)
    elif source.is_file():
        files = {name_of(source): source}
    if not files:
        stop(f"--images {args.images}: no images there. Expected files {' '.join(ENDINGS)}.")
    mark = args.out / "predicted.txt"  # the names of the masks that predict wrote
    written = set()
    if mark.exists():
        written = set(mark.read_text("utf-8", "replace").splitlines())
    for path in sorted(args.out.glob("masks/*")):
        if name_of(path) not in written:
            stop(f"--out {args.out}: predict did not write {path.name} in its masks. Name another "
                 "folder.")
    network = args.network or run.state["headline"]
    volumes = {}
    for name, path in files.items():
        volumes.setdefault(parse_name(name)[1], []).append(path)
    bad = []
    with tqdm(total=len(files), desc="predicting", disable=None) as bar:
        for paths in volumes.values():
            arrays, problems = read_volume(paths)
            bad += problems
            for path, image in arrays.items():
                labels = segment(run, image, network)
                if bar.n == 0:  # before the first mask, so that a stopped run's are known, too
                    write_aside(mark, "\n".join(sorted(written | set(files))), write_text)
                write_prediction(run, image, labels, path.stem, args.out)
                bar.update()
    print(f"{len(files) - len(bad)} of {len(files)} images segmented by {network} of {args.run}, "
          f"{run.state['method']} at step {run.state['step']}: {args.out}/masks and "
          f"{args.out}/overlays")
    if bad:
        stop(f"{len(bad)} files could not be read and were skipped:\n  "
             + some(bad, 10, "\n  "), status=1)


SETTINGS = ("size", "width", "steps", "batch_size", "unlabeled_batch", "lr", "flip", "rotation",
            "precision")  # a gain is given between runs that share these, data and split


def settings_of(run):
    """What two runs must share so that their difference is the method's."""
    settings = {name: run["args"][name] for name in SETTINGS}
    return settings | {"dataset": run["dataset"]} | run["split"]


def row_of(run, differing):
    """What names and orders a run's row of the table; `differing` names settings to be shown."""
    words = [run["method"]]
    for option, value in run["options"].items():
        if option not in SETTINGS:
            words.append(f"{option}={value}")
    for name in differing:
        words.append(f"{name}={run['args'][name]}")
    full = run["labeled"] == "100%"
    return run["dataset"], full, run["labeled"], run["method"] != "supervised", " ".join(words)


def check_results(results):
    """Raises where a results.json lacks something that a table needs, or has it in another form."""
    texts = [results["dataset"], results["labeled"], results["method"], *results["units"].values()]
    texts += [results["split"][part] for part in ("labeled", "unlabeled", "val", "test")]
    if not all(isinstance(text, str) for text in texts) or not isinstance(results["seed"], int):
        raise ValueError("a name is no text, or the seed no number")
    volumes = results["networks"][results["headline"]["network"]]["last"]["volumes"]
    if dice_by_volume(results).ndim != 2 or set(volumes) != set(results["units"]):
        raise ValueError("volumes and units do not match")
    for metric in METRICS:
        value = results["headline"][metric]
        if value is not None:
            float(value)
    for value in settings_of(results).values():
        if not isinstance(value, str | int | float):
            raise ValueError("a setting is no text and no number")
    row_of(results, [])


def read_results(folders):
    """Load results.json of each folder; name and leave out those without one."""
    runs = []
    for folder in map(Path, folders):
        try:
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            check_results(results)
            runs.append(results | {"folder": folder})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, LookupError) as error:
            print(f"{folder}: left out, not the folder of a finished run ({error!r})")
    if not runs:
        stop("no finished run among the folders. Expected run folders, such as runs/DATASET/*/")
    tested = {}
    for run in runs:
        part = run["split"]["val"], run["split"]["test"]
        first = tested.setdefault(run["dataset"], run)
        if part != (first["split"]["val"], first["split"]["test"]):
            stop(f"{run['folder']} and {first['folder']} have different validation or test units. "
                 "Compare runs on the same units.")
    return runs


def dice_by_volume(run):
    """Test Dice of a run's headline (volumes, classes), NaN where undefined."""
    volumes = run["networks"][run["headline"]["network"]]["last"]["volumes"]
    rows = []
    for volume in sorted(run["units"]):
        scores = volumes[volume].values()
        rows.append([math.nan if s is None else s["dice"] for s in scores])
    return np.array(rows, float)


def mean_dice(dice):
    """(seeds, volumes, classes), NaN where undefined -> mean over volumes, classes, then seeds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, on a class that no volume defines: NaN, left out
        return np.nanmean(np.nanmean(np.nanmean(dice, 1), 1))


def bootstrap_gain(ours, theirs, groups):
    """Gain in Dice of ours over theirs (seeds, volumes, classes), and its 95% interval: 3 numbers.

    A paired bootstrap over test units, groups of places of volumes: 2000 times as many units as
    there are, drawn with repetition, each with all its volumes.
    """
    rng, gains = np.random.default_rng(0), []
    for _ in range(2000):
        drawn = rng.integers(len(groups), size=len(groups))
        volumes = np.concatenate([groups[k] for k in drawn])
        gains.append(mean_dice(ours[:, volumes]) - mean_dice(theirs[:, volumes]))
    gain = mean_dice(ours) - mean_dice(theirs)
    return gain, *np.nanpercentile(gains, [2.5, 97.5])


def gain_of(runs, base):
    """Gain in Dice of runs over labelled-only runs, and its interval: "+1.23 (+0.45 to +2.01)"."""
    unit_of = runs[0]["units"]
    volumes_of = {}  # {unit: places of its volumes}
    for place, volume in enumerate(sorted(unit_of)):
        volumes_of.setdefault(unit_of[volume], []).append(place)
    groups = [np.array(places) for places in volumes_of.values()]
    ours = np.stack([dice_by_volume(run) for run in runs])  # (seeds, volumes, classes)
    theirs = np.stack([dice_by_volume(run) for run in base])
    gain, low, high = bootstrap_gain(ours, theirs, groups)
    return f"{gain:+.2f} ({low:+.2f} to {high:+.2f})"


def find_base(run, runs):
    """The labelled-only runs that a run may be compared with; if there is none, why."""
    base, reasons = [], []
    for other in runs:
        if other["method"] != "supervised":
            continue
        settings, others = settings_of(run), settings_of(other)
        different = [name for name in settings if settings[name] != others[name]]
        if different:
            reasons.append(different)
        else:
            base.append(other)
    if not reasons:
        return base, "no labelled-only run"
    nearest = min(reasons, key=len)
    return base, f"labelled-only: other {', '.join(nearest)}"


def compare_runs(folders, out):
    """A table of finished runs, as Markdown and CSV: mean ± standard deviation over seeds.

    Gain: in Dice over the labelled-only runs (--supervised) of the same split and settings. With a
    picture of their curves: validation Dice, agreement and uncertainty against steps.
    """
    runs = read_results(folders)
    differing = [name for name in SETTINGS if len({run["args"][name] for run in runs}) > 1]
    rows = {}
    for run in runs:
        key = (*row_of(run, differing), run["split"]["labeled"])
        rows.setdefault(key, []).append(run)
    table = [["dataset", "labelled", "method", "seeds", "Dice %", "Jaccard %", "HD95 px", "ASD px",
              "gain in Dice (95% interval)"]]
    for key in sorted(rows):
        dataset, _, labeled, _, name, _ = key
        row = sorted(rows[key], key=lambda run: run["seed"])
        values = np.array([[run["headline"][m] for m in METRICS] for run in row], float)
        cells = [cell(mean) for mean in values.mean(0)]
        if len(row) > 1:
            cells = [f"{c} ± {s:.2f}" for c, s in zip(cells, values.std(0, ddof=1), strict=True)]
        gain = ""
        if row[0]["method"] != "supervised":
            base, gain = find_base(row[0], runs)
            if base:
                gain = gain_of(row, base)
        seeds = " ".join(str(run["seed"]) for run in row)
        table.append([dataset, labeled, name, seeds, *cells, gain])
    write_table(table, out)
    curves = [(run["folder"].name, read_curves(run["folder"])) for run in runs]
    draw_curves(curves, out / "comparison.png")
    print(f"comparison.md, comparison.csv and comparison.png, the curves, are in {out}")


def read_curves(folder):
    """A run's log.csv -> {column: [(step, value)]}; {} where it cannot be read."""
    curves = {}
    try:
        with open(folder / "log.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for column, text in row.items():
                    if not text:  # not validated at this step
                        continue
                    value = float(text)
                    no_targets = value == 0 and column in ("agreement", "uncertainty")
                    if math.isfinite(value) and not no_targets:
                        curves.setdefault(column, []).append((int(row["step"]), value))
        if not curves:
            raise ValueError("no rows")
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{folder}: its log.csv is not drawn ({error!r})")
        return {}
    return curves


DIAGRAMS = {"val_dice": "validation Dice %", "agreement": "agreement: share of pixels",
            "uncertainty": "uncertainty: mean entropy on unlabelled images, where it is logged"}
LINES = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f",
         "#bcbd22", "#17becf"]  # colours that can be seen on white


def draw_diagram(sheet, top, title, curves):
    """Draw one diagram of curves, [(step, value)] each, 640 x 220 pixels, from `top` of a sheet.

    Upwards it spans the values of the second half of the steps, where runs differ by little; a
    curve that is outside runs along the frame.
    """
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    left, right, upper, lower = 50, 620, top + 24, top + 190
    points = np.array([point for curve in curves for point in curve])
    last = points[:, 0].max()
    steps = max(last, 1)
    late = points[points[:, 0] >= last / 2, 1]
    low, high = late.min(), max(late.max(), late.min() + 1e-6)
    draw.text((left, top + 4), title, "black", font)
    draw.rectangle((left, upper, right, lower), outline="black")
    for k in range(5):  # ticks
        x, y = left + (right - left) * k / 4, lower - (lower - upper) * k / 4
        draw.line((x, lower, x, lower + 4), "black")
        draw.line((left - 4, y, left, y), "black")
        draw.text((x, lower + 5), f"{steps * k / 4:g}", "black", font, "ma")
        draw.text((left - 6, y), f"{low + (high - low) * k / 4:.3g}", "black", font, "rm")
    for i, curve in enumerate(curves):
        line = []
        for step, value in curve:
            inside = min(max(value, low), high)
            line.append((left + (right - left) * step / steps,
                         lower - (lower - upper) * (inside - low) / (high - low)))
        draw.line(line, LINES[i % len(LINES)], 2)


def draw_curves(runs, path):
    """Draw [(run's name, its curves)] into a PNG: validation Dice and two more over steps."""
    shown = {}  # {column: a curve for each run}
    for column in DIAGRAMS:
        curves = [run.get(column, []) for _, run in runs]
        if any(curves):
            shown[column] = curves
    sheet = Image.new("RGB", (640, 220 * len(shown) + 16 * len(runs) + 8), "white")
    for i, (column, curves) in enumerate(shown.items()):
        draw_diagram(sheet, 220 * i, DIAGRAMS[column], curves)
    for i, (name, _) in enumerate(runs):
        xy = (50, 220 * len(shown) + 16 * i)
        ImageDraw.Draw(sheet).text(xy, name, LINES[i % len(LINES)], ImageFont.load_default(12))
    write_aside(path, sheet, write_png)


def write_table(table, out):
    """comparison.md and comparison.csv; printed as Markdown, too."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|-" * len(table[0]) + "|")
    text = "\n".join(lines) + "\n"
    cells = io.StringIO()
    csv.writer(cells, lineterminator="\n").writerows(table)
    print(text, end="")
    write_aside(out / "comparison.md", text, write_text)
    write_aside(out / "comparison.csv", cells.getvalue(), write_text)


COMMANDS = "check, phantom, predict, compare"


def main(argv=None):
    """python common.py COMMAND ...: see COMMANDS."""
    prepare_output()
    words = sys.argv[1:] if argv is None else argv
    command, rest = (words or ["--help"])[0], words[1:]
    p = argparse.ArgumentParser(f"common.py {command}")
    add = p.add_argument
    if command == "check":
        args = parse(parser(check_data.__doc__), rest)
        args.labeled = args.labeled or "100%"
        check_data(args)
    elif command == "phantom":
        p.description = draw_phantom.__doc__
        add("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
        add("--size", type=number(int, 16), default=48, help="side in pixels (%(default)s)")
        args = p.parse_args(rest)
        if args.out.exists():
            stop(f"--out {args.out} exists. Name a new folder.")
        draw_phantom(args.out, args.size)
        print(f"{len(list((args.out / 'images').iterdir()))} images in {args.out}. Try:\n"
              f'python mean_teacher.py --data "{args.out}" --size {args.size} --width 16 '
              "--steps 800 --labeled 10%")
    elif command == "predict":
        p.description = predict_images.__doc__
        add("--run", required=True, metavar="RUN", help="a run folder, or its best.pt or last.pt")
        add("--images", type=Path, required=True, metavar="PATH", help="a folder, or one image")
        add("--out", type=Path, required=True, metavar="FOLDER", help="for masks and overlays")
        add("--network", help="which network of the run (default: the one its paper deploys)")
        add("--device", default="auto", help="auto (cuda, else mps, else cpu), or a name")
        predict_images(p.parse_args(rest))
    elif command == "compare":
        p.description = compare_runs.__doc__
        add("runs", nargs="+", metavar="RUN", help="folders of finished runs")
        add("--out", type=Path, default="comparison", metavar="FOLDER", help="(%(default)s)")
        args = p.parse_args(rest)
        compare_runs(args.runs, args.out)
    elif command in ("-h", "--help"):
        print(__doc__)
    else:
        stop(f"unknown command {command}. Expected one of {COMMANDS}.")


if __name__ == "__main__":
    main()
