"""pytest from the project's folder. One thread, tiny sizes, and everything in one process."""
import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["mean_teacher", "cps", "ucmt", "cdma", "mlds", "contrastive_st"]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

import common  # noqa: E402 - after the path

full_phantom = common.phantom


@functools.cache
def small_phantom(size):
    """The phantom with 6 training patients, one each for validation and test, drawn once: runs of a second."""
    names, images, masks, lists = full_phantom(size)
    lists = {"train": lists["train"][:6], "val": lists["val"][:1], "test": lists["test"][:1]}
    kept = [i for i, name in enumerate(names) if name.split("_")[0] in sum(lists.values(), [])]
    return [names[i] for i in kept], images[kept], masks[kept], lists


common.phantom = small_phantom


def draw_case(rng, size, classes, channels):
    """An image and its mask: one disk a class, brightness tells the class."""
    y, x = np.mgrid[:size, :size]
    mask = np.zeros((size, size), np.uint8)
    for c in range(1, classes):
        cy, cx = rng.integers(size // 4, 3 * size // 4, 2)
        mask[(y - cy) ** 2 + (x - cx) ** 2 < (size // 5) ** 2] = c
    image = mask * (200.0 / classes) + rng.normal(40, 10, mask.shape)
    image = np.clip(image, 0, 255).astype(np.uint8)
    return (np.stack([image] * 3, -1) if channels == 3 else image), mask


@pytest.fixture
def make_dataset(tmp_path):
    """make_dataset(...) -> a dataset folder with `units` images of their own, or patients with slices."""
    def make(units=14, slices=0, size=32, classes=3, channels=1, name="set", scale=1):
        rng = np.random.default_rng(0)
        root = tmp_path / name
        for part in ("images", "masks"):
            (root / part).mkdir(parents=True)
        for u in range(units):
            for s in range(slices or 1):
                stem = f"p{u:02d}_frame01_slice_{s:02d}" if slices else f"case{u:02d}"
                image, mask = draw_case(rng, size, classes, channels)
                Image.fromarray(image).save(root / "images" / f"{stem}.png")
                Image.fromarray(mask * np.uint8(scale)).save(root / "masks" / f"{stem}.png")
        return root
    return make


@pytest.fixture
def options(tmp_path):
    """options(data, ...) -> the argv of a tiny run."""
    def make(data="phantom", *more, steps=4, out="runs", width=4):
        return ["--data", str(data), "--size", "32", "--width", str(width), "--steps", str(steps), "--device", "cpu",
                "--val-every", "100", "--batch-size", "2", "--unlabeled-batch", "2", "--out", str(tmp_path / out),
                "--cache", str(tmp_path / "cache"), *(["--labeled", "3"] if "--labeled" not in more else []), *more]
    return make


def run_folder(out):
    """The newest run folder below `out`."""
    return max(out.glob("*/*"), key=lambda p: p.stat().st_mtime_ns)


def equal(a, b):
    """Bit for bit, through dictionaries, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b
