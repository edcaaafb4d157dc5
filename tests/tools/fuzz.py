"""Damaged datasets, caches and runs, as many as told, end with status 0 or 2, never a traceback or
a hang:

    python tests/tools/fuzz.py 500
"""
import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import torch
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


def write_plain_set(root):
    """6 grey images, each with a mask of three classes."""
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for k in range(6):
        noise = np.random.default_rng(k)
        for part, most in (("images", 255), ("masks", 3)):
            array = noise.integers(0, most, SHAPE, dtype=np.uint8)
            Image.fromarray(array).save(root / part / f"case{k}.png")


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
        np.full(SHAPE, 1e300), np.zeros((*SHAPE, 0)), np.zeros((*SHAPE, 4), np.uint8),
        np.zeros((*SHAPE, 2), np.uint8), np.zeros((3, *SHAPE), np.uint8)])


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


# --- Accidents that were found on other people's data ---------------------------------------------

def other_palette(rng, root, path, name):
    """A mask whose table has the colours of the classes in another order."""
    mask = np.random.default_rng(1).integers(0, 3, SHAPE, dtype=np.uint8)
    picture = Image.fromarray(mask)
    colours = [[0, 0, 0], [255, 0, 0], [0, 255, 0], [255, 255, 255]]
    rng.shuffle(colours)
    picture.putpalette(sum(colours, []))
    (root / "masks" / f"{name}.png").unlink(missing_ok=True)
    picture.save(root / "masks" / f"{name}{rng.choice(['.png', '.gif'])}")


def jpeg_levels(rng, root, path, name):
    """A JPEG mask of more than black and white, or in colours."""
    (root / "masks" / f"{name}.png").unlink(missing_ok=True)
    levels = rng.choice([[0, 128, 255], [0, 100, 200], [0, 1, 2], [0, 250]])
    mask = np.random.default_rng(1).choice(np.array(levels, np.uint8), SHAPE)
    if rng.random() < 0.3:
        mask = np.stack([mask, 255 - mask, mask], -1)
    Image.fromarray(mask).save(root / "masks" / f"{name}.jpg")


def turned(rng, root, path, name):
    """A photograph that is to be shown turned or mirrored."""
    exif = Image.Exif()
    exif[0x0112] = rng.randrange(0, 10)
    image = np.random.default_rng(3).integers(0, 255, SHAPE, dtype=np.uint8)
    Image.fromarray(image).save(root / "images" / f"{name}.png", exif=exif)


def two_frames(rng, root, path, name):
    """An MPO photograph, or a TIFF with a thumbnail."""
    (root / "images" / f"{name}.png").unlink(missing_ok=True)
    frames = [Image.new("RGB", SHAPE[::-1], colour) for colour in ("red", "blue")]
    if rng.random() < 0.5:
        frames[0].save(root / "images" / f"{name}.jpg", "MPO", save_all=True,
                       append_images=frames[1:])
    else:
        small = frames[1].resize((6, 5))
        frames[0].save(root / "images" / f"{name}.tif", save_all=True, append_images=[small])


def odd_tiff(rng, root, path, name):
    """A TIFF of signed or unsigned samples of 8 to 64 bits, or with more or fewer channels."""
    folder = root / rng.choice(["images", "masks"])
    (folder / f"{name}.png").unlink(missing_ok=True)
    dtype = np.dtype(rng.choice(["i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8", "u8"]))
    samples = rng.choice([1, 1, 3, 4, 5])
    content = np.zeros((*SHAPE, samples), dtype).tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[dtype.kind]
    tags = {256: SHAPE[1], 257: SHAPE[0], 258: 8 * dtype.itemsize, 259: 1, 262: 1, 273: 8,
            277: samples, 278: SHAPE[0], 279: len(content), 339: kind}
    block = struct.pack("<H", len(tags))
    for tag, value in tags.items():
        block += struct.pack("<HHII", tag, 4, 1, value)
    header = b"II*\0" + struct.pack("<I", 8 + len(content))
    (folder / f"{name}.tif").write_bytes(header + content + block + struct.pack("<I", 0))


def early_png(rng, root, path, name):
    """A PNG whose compressed data ends after a few rows."""
    header = struct.pack(">IIBBBBB", SHAPE[1], SHAPE[0], 8, 0, 0, 0, 0)
    rows = (b"\0" + b"\1" * SHAPE[1]) * rng.randrange(SHAPE[0])
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    content += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (root / rng.choice(["images", "masks"]) / f"{name}.png").write_bytes(content)


def padded(rng, root, path, name):
    """A slice in Hounsfield units with a margin of padding."""
    array = np.random.default_rng(4).normal(0, 100, SHAPE).astype(np.int16)
    array[:4] = rng.choice([-2000, -3024, -32768, 32767])
    (root / "images" / f"{name}.png").unlink(missing_ok=True)
    np.save(root / "images" / f"{name}.npy", array)


def beside(rng, root, path, name):
    """Something that is no image beside the images, or no mask beside the masks."""
    folder = root / rng.choice(["images", "masks"])
    what = rng.choice(["_superpixels.png", "_mask.png", ".webp", ".dcm", "/x.png", ".nii.gz"])
    target = folder / f"{name}{what}"
    target.parent.mkdir(exist_ok=True)
    Image.new("L", SHAPE[::-1]).save(target, "PNG")


def near_miss(rng, root, path, name):
    """A folder or a list whose name is nearly the right one."""
    old, new = rng.choice([("masks", "labels"), ("masks", "Masks"), ("images", "imgs"),
                           ("boxes", "bboxes"), ("tags", "TAGS")])
    if rng.random() < 0.4:
        old, new = "train.txt", "Train.TXT"
        (root / old).write_text(name)
    (root / old).rename(root / new)


def no_list(rng, root, path, name):
    """A list, or a folder of annotations, that is of another kind than it should be."""
    target = root / rng.choice(["train.txt", "val.txt", "classes.txt", "boxes", "tags", "masks"])
    if target.is_dir():
        shutil.rmtree(target)
    make = rng.choice([a_broken_link, a_folder, empty, a_loop])
    make(rng, root, target, name)


def capital_ending(rng, root, path, name):
    folder = root / rng.choice(["boxes", "tags"])
    (folder / f"{name}.TXT").write_text("1 0.5 0.5 0.3 0.3")


def orphan(rng, root, path, name):
    """Boxes, tags or a mask of an image that is not there."""
    target = root / rng.choice(["boxes/nobody.txt", "tags/nobody.txt", "masks/nobody.png"])
    target.write_text(rng.choice(["1", "banana", "1 0.5 0.5 0.3 0.3"]))


def long_lines(rng, root, path, name):
    line = rng.choice(["x", "9", "1 ", "é"]) * rng.choice([100, 4000, 5000, 100000])
    target = rng.choice([f"boxes/{name}.txt", f"tags/{name}.txt", "train.txt", "classes.txt"])
    (root / target).write_text(line, encoding="utf-8")


def odd_names(rng, root, path, name):
    """An image and its mask in two Unicode forms, in none, or with names as of slices."""
    words = ["é", "é", "caf", "p00-z000", "a_slice_1", "x_slice_99999999999999999999"]
    stem = rng.choice(words)
    for part in ("images", "masks"):
        new = unicodedata.normalize(rng.choice(["NFC", "NFD"]), stem)
        if stem == "caf":
            new = os.fsdecode(b"caf\xe9")
        file = root / part / f"{name}.png"
        if file.exists():
            file.rename(file.with_stem(new))


def suffixes(rng, root, path, name):
    suffix = rng.choice(["_Segmentation", "_seg", "_GT", "_MASK", "_anno", "_other"])
    for file in list((root / "masks").iterdir()):
        file.rename(file.with_stem(file.stem + suffix))


def some_slices(rng, root, path, name):
    """Lists of single images, which are not all of their patients'."""
    names = sorted(file.stem for file in (root / "images").iterdir())
    rng.shuffle(names)
    for part in ("train", "val", "test"):
        chosen = [names.pop() for _ in range(min(len(names), rng.randrange(1, 4)))]
        (root / f"{part}.txt").write_text("\n".join(chosen))


def no_rights(rng, root, path, name):
    """Without effect on root."""
    rng.choice([path, path.parent]).chmod(rng.choice([0, 0o444]))


def instances(rng, root, path, name):
    """A mask that numbers objects."""
    mask = np.arange(SHAPE[0] * SHAPE[1]).reshape(SHAPE) // rng.choice([5, 20, 100])
    Image.fromarray(mask.astype(np.uint8)).save(root / "masks" / f"{name}.png")


ACCIDENTS = [truncate, flip_bytes, empty, delete, rename, other_ending, a_folder, a_broken_link,
             a_loop, text, array_beside, array_instead, a_bomb, other_size, other_kind,
             other_values, jpeg_mask, a_list, class_names, boxes, tags, no_images, no_masks,
             images_is_a_file, a_page_more, other_palette, jpeg_levels, turned, two_frames,
             odd_tiff, early_png, padded, beside, near_miss, no_list, capital_ending, orphan,
             long_lines, odd_names, suffixes, some_slices, no_rights, instances]


def damage(root, names, rng):
    """One of the accidents, to a random file: its name."""
    folder = root / rng.choice(["images", "masks", "masks", "boxes", "tags", "."])
    files = []
    with contextlib.suppress(OSError):  # an accident before has taken the folder or its rights
        files = [path for path in sorted(folder.glob("*")) if path.is_file()]
    path, name = rng.choice(files or [root / "train.txt"]), rng.choice(names)
    accident = rng.choice(ACCIDENTS)
    with contextlib.suppress(OSError):
        accident(rng, root, path, name)
    return accident.__name__


# --- Accidents to what a run has written: its folder and the cache --------------------------------

ODD_VALUES = [None, -1, 0, 3.5, "x", [], [1], {}, True, "../../x", 10**9]


def random_bytes(rng, root, path, name):
    path.write_bytes(rng.randbytes(rng.choice([10, 1000, 100000])))


def cut_to_half(rng, root, path, name):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def other_entry(rng, root, path, name):
    """One entry of a checkpoint or of a JSON file is taken away, or in JSON is another."""
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=True)
    else:
        content = json.loads(path.read_text())
    inner = content
    while True:
        key = rng.choice(list(inner))
        if not isinstance(inner[key], dict) or not inner[key] or rng.random() < 0.3:
            break
        inner = inner[key]
    if path.suffix == ".pt":
        del inner[key]
        torch.save(content, path)
        return
    if rng.random() < 0.3:
        del inner[key]
    else:
        inner[key] = rng.choice(ODD_VALUES)
    path.write_text(json.dumps(content))


WRITTEN = ["args.json", "split.json", "last.pt", "last.pt", "best.pt", "results.json", "cache"]
RUN_ACCIDENTS = [truncate, flip_bytes, empty, delete, a_folder, a_broken_link, text, random_bytes,
                 cut_to_half, other_entry, other_entry, other_entry]


def damage_run(folder, run, rng):
    """An accident to a run's file or to a file in its cache: its name."""
    path = run / rng.choice(WRITTEN)
    accident = rng.choice(RUN_ACCIDENTS)
    if path.name == "cache":
        path = rng.choice(sorted(Path(folder, "cache").glob("*.pt")))
        accident = rng.choice([truncate, empty, random_bytes, cut_to_half, a_folder])
    if path.name == "results.json" and accident in (a_folder, a_broken_link):
        accident = other_entry  # a run that goes on could not write it, which has status 1
    accident(rng, run, path, "")
    return f"{accident.__name__} of {path.name}"


# --- Cases ----------------------------------------------------------------------------------------

def command_line(folder, rng):
    """A main function and its words: check, or a run of one step."""
    labeled = rng.choice(["1", "2", "30%", "100%", f"{folder}/set/train.txt"])
    argv = ["--data", f"{folder}/set", "--size", "32", "--out", f"{folder}/out",
            "--cache", f"{folder}/cache", "--labeled", labeled, "--device", "cpu"]
    run = [*argv, "--width", "2", "--steps", "1", "--batch-size", "2", "--unlabeled-batch", "2"]
    calls = [(common.main, ["check", *argv]), (mean_teacher.main, run),
             (mlds.main, [*run, "--boxes", "50%"])]
    return rng.choice(calls)


def next_command(folder, run, rng):
    """A main function and its words, after a run: --resume, predict, compare or the same again."""
    argv = ["--images", f"{folder}/set", "--out", f"{folder}/predicted", "--device", "cpu"]
    calls = [(mean_teacher.main, ["--resume", f"{run}"]),
             (common.main, ["predict", "--run", f"{run}", *argv]),
             (common.main, ["compare", f"{run}", f"{run}-copy", "--out", f"{folder}/compared"]),
             (mean_teacher.main, first_run(folder))]
    return rng.choice(calls)


def first_run(folder):
    return ["--data", f"{folder}/set", "--size", "32", "--out", f"{folder}/out", "--labeled", "2",
            "--cache", f"{folder}/cache", "--device", "cpu", "--width", "2", "--steps", "2",
            "--val-every", "1", "--batch-size", "2", "--unlabeled-batch", "2"]


def damaged_set(folder, rng):
    """Damage a dataset: accidents, main function, words."""
    root = Path(folder, "set")
    names = write_dataset(root, rng)
    kinds = [damage(root, names, rng) for _ in range(rng.randrange(1, 4))]
    return kinds, *command_line(folder, rng)


def damaged_run(folder, rng):
    """Damage a finished run: accidents, main function, words."""
    write_plain_set(Path(folder, "set"))
    run = Path(mean_teacher.main(first_run(folder))["folder"])
    shutil.copytree(run, f"{run}-copy")
    kinds = [damage_run(folder, run, rng)]
    return kinds, *next_command(folder, run, rng)


def case(seed):
    """Damage a dataset or a run, then run one command on it: (status, accidents, output)."""
    rng, output = random.Random(seed), io.StringIO()
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            make = rng.choice([damaged_set, damaged_set, damaged_set, damaged_run])
            kinds, main, words = make(folder, rng)
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
