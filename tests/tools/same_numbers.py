"""Are results bit-identical to another commit's? python tests/tools/same_numbers.py OTHER_TREE

    git worktree add ../other COMMIT && python tests/tools/same_numbers.py ../other

Runs all methods in both trees, one thread, fp32: on the phantom, and on folders of 16-bit volumes
with palette masks, float arrays with images without masks, and colour JPEGs with JPEG masks. Then
compares networks (last and best), optimizer, random state, log and test scores, bit for bit.
"""
import csv
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent.parent.parent
METHODS = ("mean_teacher", "cps", "ucmt", "cdma", "mlds", "contrastive_st")
METRICS = ("dice", "jaccard", "hd95", "asd")


def draw(rng, height, width, classes):
    """An image (H, W) float and its mask: one disk a class."""
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), np.uint8)
    for c in range(1, classes):
        cy = rng.integers(height // 4, 3 * height // 4)
        cx = rng.integers(width // 4, 3 * width // 4)
        mask[(y - cy) ** 2 + (x - cx) ** 2 < (width // 5) ** 2] = c
    return mask * (200.0 / classes) + rng.normal(40, 10, mask.shape), mask


def write_volumes(root, rng):
    """16-bit TIFF slices of ten patients in two frames; masks with a palette."""
    for patient in range(10):
        for frame in (1, 12):
            for number in (0, 2, 10):
                name = f"patient{patient:03d}_frame{frame:02d}_slice_{number}"
                image, mask = draw(rng, 36, 40, 4)
                deep = (image.clip(0) * 37).astype(np.uint16)
                Image.fromarray(deep).save(root / "images" / f"{name}.tif")
                coloured = Image.fromarray(mask)
                coloured.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255] + [9] * 756)
                coloured.save(root / "masks" / f"{name}.png")


def write_arrays(root, rng):
    """Float arrays, three of them without a mask."""
    for i in range(19):
        image, mask = draw(rng, 44, 44, 3)
        np.save(root / "images" / f"im{i}.npy", image.astype(np.float32) - 77.5)
        if i < 16:
            np.save(root / "masks" / f"im{i}_mask.npy", mask)


def write_photographs(root, rng):
    """Colour JPEGs, and binary masks as JPEGs."""
    for i in range(16):
        image, mask = draw(rng, 48, 48, 2)
        colour = np.stack([image, image * 0.7 + 20, 255 - image], -1).clip(0, 255)
        Image.fromarray(colour.astype(np.uint8)).save(root / "images" / f"ISIC_{i:04d}.jpg")
        name = f"ISIC_{i:04d}_segmentation.jpg"
        Image.fromarray(mask * np.uint8(255)).save(root / "masks" / name)


WRITERS = {"volumes": write_volumes, "arrays": write_arrays, "photographs": write_photographs}


def all_runs(data):
    """{title: (method, argv)}."""
    runs = {method: (method, []) for method in METHODS}
    runs["supervised"] = ("mean_teacher", ["--supervised"])
    runs["full labels"] = ("mean_teacher", ["--labeled", "100%"])
    runs["cps --no-cutmix"] = ("cps", ["--no-cutmix"])
    runs["ucmt, k = 3"] = ("ucmt", ["--no-mix-labeled", "--top-k", "3"])
    runs["mlds self"] = ("mlds", ["--variant", "self"])
    runs["mlds mlds"] = ("mlds", ["--variant", "mlds"])
    runs["mlds tags"] = ("mlds", ["--tags", "50%"])
    runs["intra"] = ("contrastive_st", ["--matching", "intra", "--agreement", "0.05"])
    size = ["--size", "64", "--width", "4", "--steps", "24", "--val-every", "8"]
    runs = {title: (method, [*size, *words]) for title, (method, words) in runs.items()}
    size = ["--size", "32", "--width", "4", "--steps", "12", "--val-every", "4", "--labeled", "30%"]
    for name in WRITERS:
        for method in ("mean_teacher", "ucmt", "mlds", "contrastive_st"):
            runs[f"{name} {method}"] = (method, ["--data", str(data / name), *size])
    return runs


def scores_of(results):
    """{network: {"last" or "best": means and scores by volume}}."""
    scores = {}
    for name, checkpoints in results["networks"].items():
        for when in ("last", "best"):
            volumes = {}
            for volume, classes in checkpoints[when]["volumes"].items():
                for c, values in classes.items():
                    volumes[volume, c] = values and {m: values[m] for m in METRICS}
            means = {metric: checkpoints[when][metric] for metric in METRICS}
            scores[name, when] = (means, volumes)
    return scores


def numbers_of(folder):
    """Everything in a run folder that training and scoring computed."""
    last = torch.load(folder / "last.pt", weights_only=True)
    best = torch.load(folder / "best.pt", weights_only=True)
    with open(folder / "log.csv") as file:
        log = list(csv.DictReader(file))
    if "parts" in last:
        optimizer, random = last["parts"][0], last["random"][0]["cpu"]
    else:  # the layout before common.py was rewritten
        optimizer, random = last["optimizer 0"], last["rng"][0][0]
    return {"networks": last["networks"], "best": best["networks"], "best step": best["step"],
            "optimizer": optimizer["state"], "random state": random, "batches": last["drawn"],
            "log": log, "scores": scores_of(json.loads((folder / "results.json").read_text()))}


def record(tree, data, path):
    """Do all runs with the code of a tree; their numbers go to a file."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(tree))
    numbers = {}
    for title, (method, words) in all_runs(data).items():
        with tempfile.TemporaryDirectory() as out:
            argv = ["--device", "cpu", "--precision", "fp32", "--out", out, "--cache", f"{out}/c"]
            importlib.import_module(method).main([*argv, *words])
            [last] = Path(out).glob("*/*/last.pt")
            numbers[title] = numbers_of(last.parent)
    torch.save(numbers, path)


def equal(a, b):
    """Bit for bit, through dictionaries, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if torch.is_tensor(a):
        return torch.equal(a, b)
    return a == b


def main(other):
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        for name, write in WRITERS.items():
            for part in ("images", "masks"):
                (data / name / part).mkdir(parents=True)
            write(data / name, np.random.default_rng(0))
        numbers = []
        for k, tree in enumerate((HERE, Path(other).resolve())):
            path = Path(folder, f"{k}.pt")
            command = [sys.executable, __file__, "--record", str(tree), str(data), str(path)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            numbers.append(torch.load(path, weights_only=False))  # written above
    different = 0
    for title in numbers[0]:
        ours, theirs = numbers[0][title], numbers[1][title]
        parts = [part for part in ours if not equal(ours[part], theirs[part])]
        different += len(parts) > 0
        print(f"{title:28}", "DIFFERENT: " + ", ".join(parts) if parts else "equal")
    print(f"{len(numbers[0])} runs, {different} differ")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    if sys.argv[1] == "--record":
        record(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        main(sys.argv[1])
