"""Randomly damaged dataset folders end with status 0 or 2, never a traceback or a hang: python tests/fuzz.py 500"""
import contextlib
import io
import random
import shutil
import signal
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import conftest  # noqa: F401 - finds common
import numpy as np
from PIL import Image

import common
import mean_teacher
import mlds


def write_dataset(root, rng):
    """8 units of one image each, or 5 patients with 3 slices; grey or colour; some without masks."""
    slices, colour, binary = rng.random() < 0.4, rng.random() < 0.3, rng.random() < 0.4
    names = [f"p{u}_slice_{s}" for u in range(5) for s in range(3)] if slices else [f"case{u}" for u in range(8)]
    for part in ("images", "masks", "boxes", "tags"):
        (root / part).mkdir(parents=True)
    for k, name in enumerate(names):
        noise = np.random.default_rng(k)
        image = noise.integers(0, 255, (20, 24, 3) if colour else (20, 24), dtype=np.uint8)
        mask = noise.integers(0, 2 if binary else 3, (20, 24), dtype=np.uint8) * np.uint8(255 if binary else 1)
        Image.fromarray(image).save(root / "images" / f"{name}.png")
        if rng.random() < 0.8:
            Image.fromarray(mask).save(root / "masks" / f"{name}.png")
        if rng.random() < 0.1:
            (root / "boxes" / f"{name}.txt").write_text("1 0.5 0.5 0.3 0.3\n")
        if rng.random() < 0.1:
            (root / "tags" / f"{name}.txt").write_text("1\n")
    return names


def bomb(side):
    """A PNG whose header claims side x side pixels."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def damage(root, names, rng):
    """One of many accidents to one file."""
    folder = root / rng.choice(["images", "masks", "masks", "boxes", "tags", "."])
    files = sorted(path for path in folder.glob("*") if path.is_file()) or [root / "train.txt"]
    path, name = rng.choice(files), rng.choice(names)
    content = path.read_bytes() if path.is_file() else b""
    arrays = [np.zeros((20, 24), object), np.full((20, 24), np.nan), np.zeros((0, 5)), np.zeros(7), np.zeros((2, 20, 24)),
              np.zeros((20, 24), complex), np.full((20, 24), -1), np.full((20, 24), 0.5), np.zeros((20, 24), bool),
              np.array("text"), np.full((20, 24), np.inf), np.random.default_rng(0).normal(size=(20, 24)),
              np.full((20, 24), 2**40), np.zeros((20, 24, 3), np.float32), np.zeros((20, 24), "M8[s]")]
    accidents = {
        "truncate": lambda: path.write_bytes(content[:rng.randrange(len(content) + 1)]),
        "flip bytes": lambda: path.write_bytes(bytes(b ^ (rng.random() < 0.05) * rng.randrange(256) for b in content)),
        "empty": lambda: path.write_bytes(b""), "delete": lambda: path.unlink(missing_ok=True),
        "rename": lambda: path.exists() and path.rename(path.with_name(rng.choice(["x", "é ü", "_mask", ".hidden", "a" * 200]) + path.suffix)),
        "other ending": lambda: path.exists() and path.rename(path.with_suffix(rng.choice([".jpg", ".npy", ".TIF", ".gif", ".txt", ""]))),
        "a folder": lambda: (path.unlink(missing_ok=True), path.mkdir()),
        "a broken link": lambda: (path.unlink(missing_ok=True), path.symlink_to("nowhere")),
        "a loop": lambda: (path.unlink(missing_ok=True), path.symlink_to(path.name)),
        "text": lambda: path.write_text(rng.choice(["hello", "case1\ncase2\n", "../../etc/passwd\n", "\x00\x00", "p1\n\n p2 \n"])),
        "array": lambda: np.save(root / rng.choice(["images", "masks"]) / f"{name}.npy", rng.choice(arrays), allow_pickle=True),
        "array alone": lambda: [p.unlink() for p in (root / folder.name).glob(f"{name}.png")]
        + [np.save((root / folder.name) / f"{name}.npy", rng.choice(arrays), allow_pickle=True)],
        "bomb": lambda: path.write_bytes(bomb(rng.choice([9000, 15000, 60000, 2**31 - 1]))),
        "other size": lambda: Image.new(rng.choice(["L", "RGB", "1", "P", "RGBA", "I;16", "CMYK", "F"]), (rng.randrange(1, 50), 7)).save(
            path, "TIFF") if path.suffix == ".png" else None,
        "other values": lambda: Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 24), dtype=np.uint8)).save(
            root / "masks" / f"{name}.png"),
        "list": lambda: (root / rng.choice(["train.txt", "val.txt", "test.txt"])).write_bytes(
            rng.choice([b"", b"\xff\xfe\x00", b"case1\np1\n", "\n".join(names).encode(), b"../images\n", b"case0\n" * 3])),
        "boxes": lambda: (root / "boxes" / f"{name}.txt").write_text(rng.choice(
            ["0 .5 .5 .1 .1", "1 nan 0 0 0", "1 .5 .5 9 9", "99 .5 .5 .1 .1", "1 2", "", "1e9 .5 .5 .1 .1", "1 inf .5 .1 .1"])),
        "tags": lambda: (root / "tags" / f"{name}.txt").write_text(rng.choice(["0", "-1", "99", "x", "", "1 2 2", "1.0", "٣"])),
        "no images": lambda: shutil.rmtree(root / "images", ignore_errors=True),
        "no masks": lambda: shutil.rmtree(root / "masks", ignore_errors=True),
        "images is a file": lambda: (shutil.rmtree(root / "images", ignore_errors=True), (root / "images").write_text("x")),
        "a page more": lambda: Image.new("L", (24, 20)).save(root / "images" / f"{name}.tif", save_all=True,
                                                                 append_images=[Image.new("L", (24, 20))]),
    }
    kind = rng.choice(sorted(accidents))
    with contextlib.suppress(OSError):
        accidents[kind]()
    return kind


def case(seed):
    """Damage a dataset, run one command on it: (status, accidents, output)."""
    rng, text = random.Random(seed), io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "set")
        names = write_dataset(root, rng)
        kinds = [damage(root, names, rng) for _ in range(rng.randrange(1, 4))]
        argv = ["--data", str(root), "--size", "32", "--out", f"{folder}/out", "--cache", f"{folder}/cache",
                "--labeled", rng.choice(["1", "2", "30%", "100%"]), "--device", "cpu"]
        run = [*argv, "--width", "2", "--steps", "1", "--batch-size", "2", "--unlabeled-batch", "2"]
        calls = [(common.main, ["check", *argv]), (mean_teacher.main, run), (mlds.main, [*run, "--boxes", "50%"])]
        command, words = rng.choice(calls)
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("hangs")))
        signal.alarm(60)
        try:
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                command(words)
            status = 0
        except SystemExit as stopped:
            status = stopped.code or 0
        finally:
            signal.alarm(0)
    return status, kinds, text.getvalue()


if __name__ == "__main__":
    statuses = []
    for seed in range(int(sys.argv[1])):
        try:
            status, kinds, text = case(seed)
        except BaseException as error:
            print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
            statuses.append("traceback")
            continue
        statuses.append(status)
        if status not in (0, 2):
            print(f"seed {seed}: status {status}, {kinds}: {text[-300:]}")
    print({status: statuses.count(status) for status in set(statuses)})
