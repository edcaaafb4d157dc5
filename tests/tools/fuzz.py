"""Damaged dataset folders, as many as told, end with status 0 or 2, never a traceback or a hang:

    python tests/tools/fuzz.py 500
"""
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

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import conftest  # noqa: E402, F401 - after the path; it finds common

import common  # noqa: E402
import mean_teacher  # noqa: E402
import mlds  # noqa: E402

SHAPE = (20, 24)  # of all images


class Hang(BaseException):
    """A command took a minute; no Exception, so that the code under test cannot catch it."""


def ring(*_):
    raise Hang


def write_dataset(root, rng):
    """8 units of one image each, or 5 patients with 3 slices; grey or colour; some no masks."""
    names = [f"case{u}" for u in range(8)]
    if rng.random() < 0.4:
        names = [f"p{u}_slice_{s}" for u in range(5) for s in range(3)]
    shape = SHAPE
    if rng.random() < 0.3:
        shape = (*SHAPE, 3)
    classes, scale = 3, 1
    if rng.random() < 0.4:
        classes, scale = 2, 255
    for part in ("images", "masks", "boxes", "tags"):
        (root / part).mkdir(parents=True)
    for k, name in enumerate(names):
        noise = np.random.default_rng(k)
        image = noise.integers(0, 255, shape, dtype=np.uint8)
        mask = noise.integers(0, classes, SHAPE, dtype=np.uint8) * np.uint8(scale)
        Image.fromarray(image).save(root / "images" / f"{name}.png")
        if rng.random() < 0.8:
            Image.fromarray(mask).save(root / "masks" / f"{name}.png")
        if rng.random() < 0.1:
            (root / "boxes" / f"{name}.txt").write_text("1 0.5 0.5 0.3 0.3\n")
        if rng.random() < 0.1:
            (root / "tags" / f"{name}.txt").write_text("1\n")
    return names


def chunk(kind, content):
    """A piece of a PNG file."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def bomb(side):
    """A PNG whose header claims side x side pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


# --- Accidents: each damages one file of the folder, mostly `path`, or what is named `name` -------

def truncate(rng, root, path, name):
    content = path.read_bytes()
    path.write_bytes(content[:rng.randrange(len(content) + 1)])


def flip_bytes(rng, root, path, name):
    content = bytearray(path.read_bytes())
    for i in range(len(content)):
        if rng.random() < 0.05:
            content[i] ^= rng.randrange(256)
    path.write_bytes(content)


def empty(rng, root, path, name):
    path.write_bytes(b"")


def delete(rng, root, path, name):
    path.unlink()


def rename(rng, root, path, name):
    stem = rng.choice(["x", "é ü", "_mask", ".hidden", "a" * 200])
    path.rename(path.with_name(stem + path.suffix))


def other_ending(rng, root, path, name):
    path.rename(path.with_suffix(rng.choice([".jpg", ".npy", ".TIF", ".gif", ".txt", ""])))


def a_folder(rng, root, path, name):
    path.unlink(missing_ok=True)
    path.mkdir()


def a_broken_link(rng, root, path, name):
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


def a_loop(rng, root, path, name):
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def text(rng, root, path, name):
    path.write_text(rng.choice(["hello", "case1\ncase2\n", "../../etc/passwd\n", "\x00\x00",
                                "p1\n\n p2 \n"]))


def random_array(rng):
    """An array that is no image, or no mask, or an odd one."""
    return rng.choice([
        np.zeros(SHAPE, object), np.full(SHAPE, np.nan), np.zeros((0, 5)), np.zeros(7),
        np.zeros((2, *SHAPE)), np.zeros(SHAPE, complex), np.full(SHAPE, -1), np.full(SHAPE, 0.5),
        np.zeros(SHAPE, bool), np.array("text"), np.full(SHAPE, np.inf),
        np.random.default_rng(0).normal(size=SHAPE), np.full(SHAPE, 2**40),
        np.zeros((*SHAPE, 3), np.float32), np.zeros(SHAPE, "M8[s]"), np.zeros((*SHAPE, 1)),
        np.full(SHAPE, 1e300), np.zeros((*SHAPE, 0))])


def array_beside(rng, root, path, name):
    folder = root / rng.choice(["images", "masks"])
    np.save(folder / f"{name}.npy", random_array(rng), allow_pickle=True)


def array_instead(rng, root, path, name):
    folder = root / rng.choice(["images", "masks"])
    (folder / f"{name}.png").unlink(missing_ok=True)
    np.save(folder / f"{name}.npy", random_array(rng), allow_pickle=True)


def a_bomb(rng, root, path, name):
    path.write_bytes(bomb(rng.choice([9000, 15000, 60000, 2**31 - 1])))


def other_size(rng, root, path, name):
    mode = rng.choice(["L", "RGB", "1", "P", "RGBA", "I;16", "CMYK", "F"])
    if path.suffix == ".png":
        Image.new(mode, (rng.randrange(1, 50), 7)).save(path, "TIFF")


def other_kind(rng, root, path, name):
    """A slice of more bits, in colour or in a palette."""
    noise = np.random.default_rng(2)
    image = rng.choice([
        Image.fromarray(noise.integers(0, 60000, SHAPE, dtype=np.uint16)),
        Image.fromarray(noise.integers(0, 256, (*SHAPE, 3), dtype=np.uint8)),
        Image.fromarray(noise.integers(0, 256, (*SHAPE, 4), dtype=np.uint8)),
        Image.fromarray(noise.integers(0, 2, SHAPE, dtype=np.uint8) > 0),
        Image.fromarray(noise.integers(0, 3, SHAPE, dtype=np.uint8)).convert("P")])
    image.save(root / rng.choice(["images", "masks"]) / f"{name}.png")


def other_values(rng, root, path, name):
    values = rng.choice([range(256), [0, 1, 2, 255], [0, 255], [0, 1], [0, 30], [0, 128, 255], [0]])
    mask = np.random.default_rng(1).choice(np.array(values, np.uint8), SHAPE)
    Image.fromarray(mask).save(root / "masks" / f"{name}.png")


def jpeg_mask(rng, root, path, name):
    (root / "masks" / f"{name}.png").unlink(missing_ok=True)
    mask = np.random.default_rng(1).integers(0, 2, SHAPE, dtype=np.uint8) * np.uint8(255)
    Image.fromarray(mask).save(root / "masks" / f"{name}.jpg")


def a_list(rng, root, path, name):
    content = rng.choice([b"", b"\xff\xfe\x00", b"case1\np1\n", b"../images\n", b"case0\n" * 3,
                          f"{name}\n".encode(), f"{name[:2]}\n".encode()])
    (root / rng.choice(["train.txt", "val.txt", "test.txt"])).write_bytes(content)


def class_names(rng, root, path, name):
    (root / "classes.txt").write_bytes(rng.choice([b"", b"\xff\xfe", b"a\n\n\nb\n" * 50, b"\x00"]))


def boxes(rng, root, path, name):
    (root / "boxes" / f"{name}.txt").write_text(rng.choice([
        "0 .5 .5 .1 .1", "1 nan 0 0 0", "1 .5 .5 9 9", "99 .5 .5 .1 .1", "1 2", "",
        "1e9 .5 .5 .1 .1", "1 inf .5 .1 .1"]))


def tags(rng, root, path, name):
    words = ["0", "-1", "99", "x", "", "1 2 2", "1.0", "٣"]
    (root / "tags" / f"{name}.txt").write_text(rng.choice(words), encoding="utf-8")


def no_images(rng, root, path, name):
    shutil.rmtree(root / "images", ignore_errors=True)


def no_masks(rng, root, path, name):
    shutil.rmtree(root / "masks", ignore_errors=True)


def images_is_a_file(rng, root, path, name):
    shutil.rmtree(root / "images", ignore_errors=True)
    (root / "images").write_text("x")


def a_page_more(rng, root, path, name):
    pages = [Image.new("L", SHAPE[::-1]) for _ in range(2)]
    pages[0].save(root / "images" / f"{name}.tif", save_all=True, append_images=pages[1:])


ACCIDENTS = [truncate, flip_bytes, empty, delete, rename, other_ending, a_folder, a_broken_link,
             a_loop, text, array_beside, array_instead, a_bomb, other_size, other_kind,
             other_values, jpeg_mask, a_list, class_names, boxes, tags, no_images, no_masks,
             images_is_a_file, a_page_more]


def damage(root, names, rng):
    """One of the accidents, to a random file: its name."""
    folder = root / rng.choice(["images", "masks", "masks", "boxes", "tags", "."])
    files = [path for path in sorted(folder.glob("*")) if path.is_file()]
    path, name = rng.choice(files or [root / "train.txt"]), rng.choice(names)
    accident = rng.choice(ACCIDENTS)
    with contextlib.suppress(OSError):  # an accident before has taken the file
        accident(rng, root, path, name)
    return accident.__name__


# --- Cases ----------------------------------------------------------------------------------------

def command_line(folder, rng):
    """A main function and its words: check, or a run of one step."""
    labeled = rng.choice(["1", "2", "30%", "100%"])
    argv = ["--data", f"{folder}/set", "--size", "32", "--out", f"{folder}/out",
            "--cache", f"{folder}/cache", "--labeled", labeled, "--device", "cpu"]
    run = [*argv, "--width", "2", "--steps", "1", "--batch-size", "2", "--unlabeled-batch", "2"]
    calls = [(common.main, ["check", *argv]), (mean_teacher.main, run),
             (mlds.main, [*run, "--boxes", "50%"])]
    return rng.choice(calls)


def case(seed):
    """Damage a dataset, run one command on it: (status, accidents, output)."""
    rng, output = random.Random(seed), io.StringIO()
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "set")
        names = write_dataset(root, rng)
        kinds = [damage(root, names, rng) for _ in range(rng.randrange(1, 4))]
        main, words = command_line(folder, rng)
        signal.signal(signal.SIGALRM, ring)
        signal.alarm(60)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                main(words)
        except SystemExit as stopped:
            status = stopped.code or 0
        finally:
            signal.alarm(0)
    return status, kinds, output.getvalue()


def fuzz(count):
    """Do that many cases, print what went wrong and how often each status came."""
    statuses = {}
    for seed in range(count):
        try:
            status, kinds, output = case(seed)
            if status not in (0, 2):
                print(f"seed {seed}: status {status}, {kinds}: {output[-300:]}", flush=True)
        except (Exception, Hang) as error:
            print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
            status = "traceback"
        statuses[status] = statuses.get(status, 0) + 1
    print(statuses)
    return statuses


if __name__ == "__main__":
    sys.exit(set(fuzz(int(sys.argv[1]))) - {0, 2} != set())
