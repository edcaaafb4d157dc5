"""pytest from the project's folder. One thread, tiny sizes, and everything in one process."""
import importlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
METHODS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "common")
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]
torch.set_num_threads(1)

import common  # noqa: E402 - after the path


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds; runs with --slow, in .ci/run")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: give --slow"))


def main_of(method):
    """The main function of a method's file."""
    return importlib.import_module(method).main


def draw_small_phantom(folder, size=32):
    """The phantom with 6 training patients, one each for validation and test: runs of a second."""
    common.draw_phantom(folder, size)
    lists = {"train": ["p00", "p01", "p02", "p03", "p04", "p05"], "val": ["p30"], "test": ["p36"]}
    kept = sum(lists.values(), [])
    for path in [*folder.glob("images/*"), *folder.glob("masks/*")]:
        if path.name[:3] not in kept:
            path.unlink()
    for part, units in lists.items():
        (folder / f"{part}.txt").write_text("\n".join(units))
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """The small phantom, drawn once for all tests, which must not change it."""
    return draw_small_phantom(tmp_path_factory.mktemp("drawn") / "phantom")


@pytest.fixture
def phantom(drawn, tmp_path):
    """A copy of the small phantom's folder, to be changed by a test."""
    return shutil.copytree(drawn, tmp_path / "phantom")


def draw_case(rng, size, classes, channels):
    """An image and its mask: one disk a class, brightness tells the class."""
    y, x = np.mgrid[:size, :size]
    mask = np.zeros((size, size), np.uint8)
    for c in range(1, classes):
        cy, cx = rng.integers(size // 4, 3 * size // 4, 2)
        mask[(y - cy) ** 2 + (x - cx) ** 2 < (size // 5) ** 2] = c
    image = mask * (200.0 / classes) + rng.normal(40, 10, mask.shape)
    image = np.clip(image, 0, 255).astype(np.uint8)
    if channels == 3:
        image = np.stack([image] * 3, -1)
    return image, mask


@pytest.fixture
def make_dataset(tmp_path):
    """make_dataset(...) -> a dataset folder with `units` images of their own, or with slices."""
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
def options(drawn, tmp_path):
    """options(...) -> the argv of a tiny run; without `data`, on the small phantom."""
    def make(*more, data=None, steps=4, out="runs", width=4):
        argv = ["--data", str(data or drawn), "--size", "32", "--width", str(width),
                "--steps", str(steps), "--val-every", "100", "--batch-size", "2",
                "--unlabeled-batch", "2", "--device", "cpu", "--precision", "fp32",
                "--out", str(tmp_path / out), "--cache", str(tmp_path / "cache")]
        if "--labeled" not in more:
            argv += ["--labeled", "3"]
        return argv + [str(word) for word in more]
    return make


def run_folder(out):
    """The newest run folder below `out`."""
    return max(out.glob("*/*"), key=lambda path: path.stat().st_mtime_ns)


def last_of(folder):
    """What the last checkpoint of a run folder holds, but for the seconds that it took."""
    state = torch.load(folder / "last.pt", weights_only=True)
    del state["seconds"]
    return state


def equal(a, b):
    """Bit for bit, through dictionaries, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if torch.is_tensor(a):
        return torch.equal(a, b)
    return a == b
