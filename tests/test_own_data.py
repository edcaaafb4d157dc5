"""What a folder means: it is read as its owner meant it, or refused, or a warning says so."""
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_data import data_of, save, stopped_with
from torch.nn import functional as F

import common
import mean_teacher
import mlds


def check(argv):
    """python common.py check ..."""
    common.main(["check", *argv])


pytestmark = pytest.mark.slow
BOTH = pytest.mark.parametrize("command", [check, mean_teacher.main], ids=["check", "run"])


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def printed(capsys, command, argv):
    """What a command prints that ends well."""
    command(argv)
    return capsys.readouterr().out


def masks_of(root):
    """{path: array} of all masks."""
    masks = {}
    for path in sorted((root / "masks").iterdir()):
        masks[path] = np.array(Image.open(path))
    return masks


def name_in(data, part):
    """The name of a part's first image."""
    return data.items[data.indices(part)[0]].name


# --- An ignore label ------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("palette", [False, True])
def test_an_ignore_label_is_refused(make_dataset, options, tmp_path, capsys, command, palette):
    """0, 1, 2, 255, as in PASCAL VOC: the message says what 255 is and how to rewrite it."""
    root = make_dataset()
    for path, mask in masks_of(root).items():
        mask[0] = 255
        image = Image.fromarray(mask)
        if palette:
            image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + 252 * [0] + 252 * [50, 60])
        image.save(path)
    message = stopped_with(capsys, command, options(data=root))
    assert re.search(r"255 \(in case\d\d\.png\)", message)
    assert "255 marks pixels to ignore: that is not supported; write another class" in message
    assert not list(tmp_path.glob("runs/*/*"))


# --- Classes --------------------------------------------------------------------------------------


@BOTH
def test_classes_by_part_and_one_that_the_labelled_images_lack(make_dataset, options, capsys,
                                                               command):
    root = make_dataset()
    data = data_of(options(data=root))
    tested = [data.items[i].name for i in data.indices("test")]
    total = np.zeros(4, int)
    for path, mask in masks_of(root).items():
        mask[0] = 0
        if path.stem in tested:
            mask[0] = 3
        save(path, mask)
        if path.stem not in [data.items[i].name for i in data.indices("unlabeled")]:
            total += np.bincount(mask.ravel(), minlength=4)
    write(root / "classes.txt", "ground\nring\ndisk\nline\n")
    out = printed(capsys, command, options(data=root, steps=1))
    lines = [line.split() for line in out.splitlines()]
    assert "class of pixels in labeled images in val images in test images".split() in lines
    shares = total / total.sum()
    for c, name in enumerate(["ground", "ring", "disk"]):
        assert [str(c), name, f"{shares[c]:.2%}", "3", "1", "3"] in lines
    assert ["3", "line", f"{shares[3]:.2%}", "0", "0", "3"] in lines
    assert "warning: no labelled image has line" in out


def test_classes_that_all_parts_have_get_no_warning(make_dataset, options, capsys):
    out = printed(capsys, mean_teacher.main, options(data=make_dataset(), steps=1))
    assert "warning" not in out and "run folder" in out


def number_rows(root, classes):
    """In all masks row 1 is class 1, row 2 class 2, and so on."""
    for path, mask in masks_of(root).items():
        mask[:] = 0
        for c in range(1, classes):
            mask[c] = c
        save(path, mask)


def test_more_than_8_classes_may_be_instances(make_dataset, options, capsys):
    root = make_dataset()
    number_rows(root, 9)
    out = printed(capsys, check, options(data=root))
    rows = [line for line in out.splitlines() if re.match(r"\d+ (class|background)", line)]
    assert len(rows) == 9  # every class
    assert re.search(r"warning: 9 classes.*instances.*README, From other formats", out)


def test_8_classes_are_classes(make_dataset, options, capsys):
    root = make_dataset()
    number_rows(root, 8)
    assert "no problem found" in printed(capsys, check, options(data=root))


@pytest.mark.parametrize("count", [1, 2])
def test_a_class_in_one_image_alone_may_be_an_instance(make_dataset, options, capsys, count):
    root = make_dataset()
    data = data_of(options(data=root))
    for i in data.indices("labeled")[:count]:
        path = root / "masks" / f"{data.items[i].name}.png"
        mask = np.array(Image.open(path))
        mask[0] = 3
        save(path, mask)
    out = printed(capsys, check, options(data=root))
    found = re.search(r"warning: in one image alone: class 3\..*README, From other formats", out)
    assert bool(found) == (count == 1)


def test_more_instances_than_class_numbers_are_refused_with_the_same_advice(make_dataset, options,
                                                                            capsys):
    root = make_dataset()
    for path, mask in masks_of(root).items():
        mask[:10, :10] = np.arange(100).reshape(10, 10)
        save(path, mask)
    message = stopped_with(capsys, mean_teacher.main, options(data=root))
    assert "99 in case" in message
    assert "instances" in message and "README, From other formats" in message


def test_readme_has_the_recipe_that_the_warnings_name():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "Instance numbers" in text.split("### From other formats")[1]


# --- What only other files say --------------------------------------------------------------------


@pytest.mark.parametrize("name, text, message", [
    ("tags/{name}.txt", "banana", r"tags/{name}\.txt, line 1: 'banana'"),
    ("tags/nobody.txt", "1", r"tags/nobody\.txt: no image has this name"),
    ("boxes/{name}.txt", "1 0.9 0.5 0.5 0.5", r"boxes/{name}\.txt, line 1.*leaves the image"),
    ("boxes/{name}.txt", "3 0.5 0.5 0.5 0.5", "class 3; expected 1 to 2")])
def test_check_reads_boxes_and_tags_as_a_run_does(make_dataset, options, capsys, name, text,
                                                  message):
    root = make_dataset()
    image = name_in(data_of(options(data=root)), "unlabeled")
    write(root / name.format(name=image), text)
    messages = []
    for command in (mlds.main, check):
        messages.append(stopped_with(capsys, command, options(data=root)))
    assert re.search(message.format(name=image), messages[0])
    assert messages[0] == messages[1]


@BOTH
@pytest.mark.parametrize("names", ["back\nheart\n", "back\nheart\nlung\nliver\n", "\n"])
def test_other_numbers_of_class_names_are_refused(make_dataset, options, tmp_path, capsys, command,
                                                  names):
    root = make_dataset()
    write(root / "classes.txt", names)
    message = stopped_with(capsys, command, options(data=root))
    count = len(names.split())
    assert f"classes.txt: {count} names, but there are 3 classes" in message
    assert (f"--classes {count}" in message) == (count > 3)  # fewer than masks hold would not do
    assert not list(tmp_path.glob("runs/*/*"))


def test_check_counts_boxes_and_tags(make_dataset, options, capsys):
    root = make_dataset()
    for name in ("boxes/case00.txt", "boxes/case01.txt"):
        write(root / name, "1 0.5 0.5 0.5 0.5")
    write(root / "tags" / "case01.txt", "2")
    out = printed(capsys, check, options(data=root))
    assert "boxes: 2 images\n" in out and "tags: 1 image\n" in out
    assert "no problem found" in out


@pytest.mark.parametrize("kind", ["boxes", "tags"])
@pytest.mark.parametrize("command", [check, mlds.main], ids=["check", "run"])
def test_capital_endings_of_boxes_and_tags_are_not_passed_over(make_dataset, options, tmp_path,
                                                              capsys, kind, command):
    root = make_dataset()
    name = name_in(data_of(options(data=root)), "unlabeled")
    write(root / kind / f"{name}.TXT", {"boxes": "1 0.5 0.5 0.5 0.5", "tags": "1"}[kind])
    message = stopped_with(capsys, command, options(data=root, steps=1))
    assert f"{name}.TXT" in message
    assert not list(tmp_path.glob("runs/*/set/mlds*"))


# --- Masks ----------------------------------------------------------------------------------------

COLOURS = {0: (0, 0, 0), 1: (255, 0, 0), 2: (0, 255, 0)}


def save_with_table(path, mask, order):
    """Save class numbers as a palette: number i of the file is class order[i], in its colour."""
    numbers = np.argsort(order)[mask].astype(np.uint8)
    image = Image.fromarray(numbers)
    image.putpalette([value for c in order for value in COLOURS[c]])
    image.save(path)


@pytest.mark.parametrize("part", ["labeled", "val", "test", "unlabeled"])
def test_palettes_that_exchange_classes_are_refused_with_two_names(make_dataset, options, capsys,
                                                                   part):
    """Hidden masks are read by check alone."""
    root = make_dataset()
    name = name_in(data_of(options(data=root)), part)
    for path, mask in masks_of(root).items():
        mask[0, :3] = 0, 1, 2
        order = (0, 2, 1) if path.stem == name else (0, 1, 2)
        save_with_table(path, mask, order)
    command = check if part == "unlabeled" else mean_teacher.main
    message = stopped_with(capsys, command, options(data=root))
    assert f"{name}.png" in message
    assert len(set(re.findall(r"case\d\d\.png", message))) > 1
    assert "number 1 of its palette is the colour (" in message


def test_masks_of_one_palette_are_read_by_their_numbers(make_dataset, options):
    root = make_dataset()
    masks = masks_of(root)
    for path, mask in masks.items():
        save_with_table(path, mask, (0, 1, 2))
    data = data_of(options(data=root))
    assert data.classes == 3
    for i, label in data.labels.items():
        assert np.array_equal(label, masks[data.items[i].mask])


def as_gifs(root, masks):
    """Replace masks {path: array} by .gif files as plain Pillow makes them, with own tables."""
    for path, mask in masks.items():
        path.unlink()
        Image.fromarray(mask).save(path.with_suffix(".gif"))


def test_gifs_with_tables_of_their_own_are_refused_with_two_names(make_dataset, options, capsys):
    """In a file of classes 0 and 2 alone plain Pillow gives number 1 to class 2."""
    root = make_dataset()
    name = name_in(data_of(options(data=root)), "labeled")
    masks = masks_of(root)
    for path, mask in masks.items():
        mask[0, :3] = 0, 1, 2
        if path.stem == name:
            mask[mask == 1] = 0
    as_gifs(root, masks)
    message = stopped_with(capsys, mean_teacher.main, options(data=root))
    assert f"{name}.gif" in message
    assert len(set(re.findall(r"case\d\d\.gif", message))) > 1


def test_gifs_of_black_and_white_are_binary_whatever_their_tables(make_dataset, options):
    """In a mask that is white all over, number 0 is white; elsewhere it is black."""
    root = make_dataset(classes=2, scale=255)
    name = name_in(data_of(options(data=root)), "labeled")
    masks = masks_of(root)
    masks[root / "masks" / f"{name}.png"][:] = 255
    as_gifs(root, masks)
    data = data_of(options(data=root))
    assert data.binary and data.classes == 2
    for i, label in data.labels.items():
        path = data.items[i].mask.with_suffix(".png")
        assert np.array_equal(label, masks[path] // 255)


def two_squares(first, second, side):
    """A mask 128 x 128: a square of `side` pixels of one value or colour, and one of 50."""
    mask = np.zeros((128, 128, *np.shape(first)), np.uint8)
    mask[8:8 + side, 8:8 + side] = first
    mask[70:120, 70:120] = second
    return mask


@pytest.mark.parametrize("quality", [75, 95])
@pytest.mark.parametrize("first, second, side", [
    (128, 255, 40), (128, 255, 16), (100, 200, 40), (50, 255, 40), ((255, 0, 0), (0, 255, 0), 40),
    (1, 2, 40), (1, 31, 16),
    ((255, 255, 255), (0, 64, 0), 40)])
def test_jpeg_masks_of_more_than_black_and_white_are_refused(tmp_path, first, second, side,
                                                            quality):
    path = tmp_path / "mask.jpg"
    Image.fromarray(two_squares(first, second, side)).save(path, quality=quality)
    with pytest.raises(ValueError, match=r"mask\.jpg: a "):
        common.read_mask(path)


@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_masks_of_black_and_white_are_read(tmp_path, quality, mode):
    mask = two_squares(255, 255, 12)
    mask[:, 3:6] = 255
    path = tmp_path / "mask.jpg"
    Image.fromarray(mask).convert(mode).save(path, quality=quality)
    read = common.read_mask(path)
    assert set(np.unique(read)) == {0, 255} and (read != mask).mean() < 0.01


# --- Photographs ----------------------------------------------------------------------------------

TURNS = {3: 2, 6: 1, 8: 3}  # {EXIF orientation: quarter turns to the left from shown to stored}


def photograph(path, shown, orientation):
    """Save as a camera does that was held in another way: turned, with a note how to show it."""
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.rot90(shown, TURNS[orientation])
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, quality=95)


@pytest.mark.parametrize("orientation", TURNS)
def test_a_turned_photograph_lies_on_its_mask(make_dataset, options, orientation):
    root = make_dataset(units=6, classes=2)
    before = data_of(options("--labeled", 1, data=root))
    for path in list((root / "images").iterdir()):
        shown = np.array(Image.open(path))
        path.unlink()
        photograph(path.with_suffix(".jpg"), shown, orientation)
    after = data_of(options("--labeled", 1, data=root))
    difference = (after.images.int() - before.images.int()).abs().float()
    assert difference.mean() < 5
    turned = torch.rot90(before.images, 2, (2, 3)).int()
    assert (turned - before.images.int()).abs().float().mean() > 15


def test_a_turned_photograph_that_is_not_square_has_the_size_of_its_mask(make_dataset, options):
    root = make_dataset(units=6, classes=2)
    for path in list((root / "images").iterdir()):
        shown = np.array(Image.open(path).resize((40, 24)))
        path.unlink()
        photograph(path.with_suffix(".jpg"), shown, 6)
    for path in (root / "masks").iterdir():
        Image.open(path).resize((40, 24), Image.NEAREST).save(path)
    data = data_of(options("--labeled", 1, data=root))
    assert set(data.sizes) == {(24, 40)}


def with_random_weights(path):
    """A checkpoint's networks say something else at each pixel, not one class everywhere."""
    state = torch.load(path, weights_only=True)
    for weights in state["networks"].values():
        for tensor in weights.values():
            if tensor.ndim > 1:
                torch.nn.init.normal_(tensor)
    torch.save(state, path)


def test_predict_turns_a_photograph_too(make_dataset, options, tmp_path):
    folder = mean_teacher.main(options(steps=1))["folder"]
    with_random_weights(Path(folder, "last.pt"))
    images = tmp_path / "new"
    images.mkdir()
    shown = np.random.default_rng(0).integers(0, 255, (3, 5), np.uint8).repeat(9, 0).repeat(9, 1)
    save(images / "plain.png", shown)
    photograph(images / "turned.png", shown, 6)
    out = tmp_path / "out"
    common.main(["predict", "--run", folder, "--images", str(images), "--out", str(out),
                 "--device", "cpu"])
    plain = np.array(Image.open(out / "masks" / "plain.png"))
    assert plain.shape == (27, 45) and len(np.unique(plain)) > 1
    assert np.array_equal(np.array(Image.open(out / "masks" / "turned.png")), plain)


def test_of_an_mpo_photograph_the_first_frame_is_taken(make_dataset, options):
    root = make_dataset(units=6, classes=2, channels=3)
    before = data_of(options("--labeled", 1, data=root))
    for path in list((root / "images").iterdir()):
        first = Image.open(path).convert("RGB")
        second = Image.new("RGB", (8, 8), "white")
        path.unlink()
        first.save(path.with_suffix(".jpg"), format="MPO", save_all=True, append_images=[second],
                   quality=95)
        assert Image.open(path.with_suffix(".jpg")).format == "MPO"
    after = data_of(options("--labeled", 1, data=root))
    assert after.images.shape == before.images.shape
    assert (after.images.int() - before.images.int()).abs().float().mean() < 5


# --- Channels and intensities ---------------------------------------------------------------------


def write_tiff(path, array, kind, more=()):
    """A TIFF of one strip; kind: of its samples, 1 unsigned, 2 signed; more: other tags."""
    height, width = array.shape[:2]
    samples = array.size // (height * width)
    bits = 8 * array.itemsize
    content = array.tobytes()
    after = 8 + len(content)
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: samples, 278: height,
            279: len(content), 339: kind, **dict(more)}
    block = struct.pack("<H", len(tags))
    for tag in sorted(tags):
        block += struct.pack("<HHII", tag, 4, 1, tags[tag])
    block += struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", after) + content + block)


def write_four_bands(path, array):
    """A TIFF of red, green, blue and one more channel that is no transparency."""
    write_tiff(path, array, 1, {262: 2, 338: 0})
    content = path.read_bytes()
    offset = len(content)
    place = content.rindex(struct.pack("<HHII", 258, 4, 1, 8))
    entry = struct.pack("<HHII", 258, 3, 4, offset)  # four numbers of bits lie at the end
    content = content[:place] + entry + content[place + 12:]
    path.write_bytes(content + struct.pack("<4H", 8, 8, 8, 8))


def write_colour_png(path, array):
    """A PNG of 16 bits a channel, which Pillow cannot write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, chunk in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(name + chunk))
        content += struct.pack(">I", len(chunk)) + name + chunk + crc
    path.write_bytes(content)


@pytest.mark.parametrize("ending", [".npy", ".tif"])
def test_four_channels_are_refused(make_dataset, options, capsys, ending):
    root = make_dataset(channels=3)
    array = np.random.default_rng(0).integers(0, 255, (32, 32, 4), np.uint8)
    (root / "images" / "case03.png").unlink()
    path = root / "images" / f"case03{ending}"
    if ending == ".npy":
        save(path, array)
    else:
        write_four_bands(path, array)
        assert np.array_equal(np.array(Image.open(path))[..., :3], array[..., :3])
    message = stopped_with(capsys, mean_teacher.main, options(data=root))
    assert f"case03{ending}: cannot be used" in message


@pytest.mark.parametrize("dtype, kind, what", [
    (np.int8, 2, "8 bits, signed"), (np.uint32, 1, "32 bits, unsigned")])
@pytest.mark.parametrize("part", ["images", "masks"])
def test_tiffs_that_pillow_misreads_are_refused(make_dataset, options, capsys, dtype, kind, what,
                                                part):
    root = make_dataset()
    name = name_in(data_of(options(data=root)), "labeled")
    (root / part / f"{name}.png").unlink()
    array = np.linspace(np.iinfo(dtype).min, np.iinfo(dtype).max, 32 * 32).reshape(32, 32)
    write_tiff(root / part / f"{name}.tif", array.astype(dtype), kind)
    message = stopped_with(capsys, mean_teacher.main, options(data=root))
    assert f"{name}.tif: cannot be used" in message and what in message


@pytest.mark.parametrize("dtype, kind", [
    (np.uint8, 1), (np.uint16, 1), (np.int16, 2), (np.int32, 2), (np.float32, 3)])
def test_other_tiffs_are_read(tmp_path, dtype, kind):
    array = np.arange(64).reshape(8, 8).astype(dtype)
    write_tiff(tmp_path / "image.tif", array, kind)
    assert np.array_equal(common.read_pixels(tmp_path / "image.tif"), array)


def replace_images(root, make):
    """Each image becomes make(its pixels), as .npy."""
    for path in list((root / "images").iterdir()):
        array = np.array(Image.open(path))
        path.unlink()
        np.save(path.with_suffix(".npy"), make(array))


@pytest.mark.parametrize("padding, width", [(-2000, 12), (-3024, 12), (-32768, 12), (-32768, 1)])
def test_padding_does_not_flatten_the_body(make_dataset, options, capsys, padding, width):
    """CT from -1000 to 1000, as used with padding outside the scanner's circle and without."""
    root = make_dataset(units=6)
    body = np.linspace(-1000, 1000, 32 * 32).reshape(32, 32).astype(np.int16)
    padded = body.copy()
    padded[12:20, 32 - width:] = padding  # 9% or 0.8% of the pixels
    replace_images(root, lambda array: body)
    plain = data_of(options("--labeled", 1, data=root)).images
    for path in (root / "images").iterdir():
        np.save(path, padded)
    argv = options("--labeled", 1, data=root)
    used = data_of(argv).images
    outside = torch.from_numpy(padded == padding)
    assert (used[:, 0, outside] == 0).all()
    difference = used[:, 0, ~outside].int() - plain[:, 0, ~outside].int()
    assert difference.abs().max() <= 2
    assert f"stored as int16 from {padding} to 1000, used from 0 to 255" in printed(capsys, check,
                                                                                 argv)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_deep_images_of_two_values_do_not_turn_black(make_dataset, options, dtype):
    """The darker value is far below the only other one, and still it is no padding."""
    root = make_dataset(units=6)
    replace_images(root, lambda array: (array > 60).astype(dtype))
    data = data_of(options("--labeled", 1, data=root))
    assert set(data.images.unique().tolist()) == {0, 255}


def test_channels_of_different_ranges_are_scaled_by_themselves(make_dataset, options):
    """Three sequences of an MRI in one array; or they are refused."""
    root = make_dataset(units=6)
    replace_images(root, lambda array: array[..., None] * np.array([1.0, 30.0, 1000.0]))
    images = data_of(options("--labeled", 1, data=root)).images
    for channel in range(3):
        assert torch.equal(images[:, channel], images[:, 0]) and images[:, channel].max() > 200


def test_colour_of_16_bits_is_scaled_or_refused(make_dataset, options, capsys):
    """Pillow keeps the upper 8 bits, so that 12 bits a channel would turn black."""
    root = make_dataset(units=6)
    for path in (root / "images").iterdir():
        array = np.array(Image.open(path)).astype(int)
        write_colour_png(path, np.stack([array, array, array], -1))
    try:
        data = data_of(options("--labeled", 1, data=root))
    except SystemExit:
        assert "case00.png: cannot be used" in capsys.readouterr().err
    else:
        assert data.images.max() > 200


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif", ".bmp"])
@pytest.mark.parametrize("side", [16, 116, 160])
def test_colour_of_8_bits_is_read_at_any_size(tmp_path, ending, side):
    path = tmp_path / f"image{ending}"
    save(path, np.full((side, side, 3), 200, np.uint8))
    assert (common.read_pixels(path) == 200).all()


# --- Which file is what ---------------------------------------------------------------------------


def masks_among_images(root):
    for name in ("case01_superpixels.png", "case02_mask.png"):
        Image.open(root / "images" / "case00.png").save(root / "images" / name)


def strangers_among_images(root):
    (root / "images" / "more").mkdir()
    for name in ("case90.webp", "case91.dcm"):
        write(root / "images" / name, "passed over")
    write(root / "images" / ".hidden", "what a file browser leaves")


def strangers_among_masks(root):
    (root / "masks" / "old").mkdir()
    write(root / "masks" / "case03.webp", "passed over")


def boxes_of_another_kind(root):
    write(root / "boxes" / "case03.xml", "<annotation/>")


def lists_that_leave_images_out(root):
    """They name 8 of 14."""
    write(root / "train.txt", "case00\ncase01\ncase02\ncase03\n")
    write(root / "val.txt", "case10\n")
    write(root / "test.txt", "case11\ncase12\ncase13\n")


def a_patient_in_two_units(root):
    rename_all(root, lambda number: f"p{number // 2:02d}_{('ED', 'ES')[number % 2]}_slice_00")


ODD = [(masks_among_images, r"2 images .*\(case01_superpixels, case02_mask\)"),
       (strangers_among_images, r"passed over in images: 3 .*\(case90.webp, case91.dcm, more\)"),
       (strangers_among_masks, r"passed over in masks: 2 .*\(case03.webp, old\)"),
       (boxes_of_another_kind, r"passed over in boxes: 1 .* \.txt \(case03\.xml\)"),
       (lists_that_leave_images_out, r"not used at all: 6 images .*\(case04, case05, "),
       (a_patient_in_two_units, r"7 patients in several units \(p00_ED, p00_ES\)\?")]


@pytest.mark.parametrize("change, message", ODD, ids=[change.__name__ for change, _ in ODD])
def test_what_was_passed_over_and_what_looks_odd_is_said(make_dataset, options, capsys, change,
                                                         message):
    root = make_dataset()
    change(root)
    out = printed(capsys, check, options(data=root))
    assert re.search(f"warning: {message}", out)
    assert "no problem found" not in out


def rename_all(root, name_of):
    """Give the images of a dataset, and their masks, new names."""
    for part in ("images", "masks"):
        for number, path in enumerate(sorted((root / part).iterdir())):
            path.rename(path.with_stem(name_of(number)))


@pytest.mark.parametrize("pattern, slices", [
    ("p{:02d}-z{:03d}", 6), ("p{:02d}-z{:03d}", 2), ("p{:02d}_z{:03d}_flair", 6)])
def test_names_that_differ_in_their_last_number_alone(make_dataset, options, capsys, pattern,
                                                      slices):
    root = make_dataset(units=24)
    rename_all(root, lambda number: pattern.format(number // slices, number % slices))
    out = printed(capsys, check, options(data=root))
    first = pattern.format(0, 0)
    assert re.search(rf"warning: \d+ groups .*last number alone \({first}, .*_slice_", out)


def warnings_in(out):
    """The warnings among a command's lines."""
    return [line for line in out.splitlines() if line.startswith("warning: ")]


def test_a_run_says_at_its_start_what_check_says(make_dataset, options, capsys):
    root = make_dataset(units=24)
    rename_all(root, lambda number: f"p{number // 6}-z{number % 6}")
    for number, (path, mask) in enumerate(masks_of(root).items()):
        mask[0, :20] = np.arange(20)
        mask[1] = min(31, 20 + number)
        save(path, mask)
    for name in ("p0-z0_mask.png", "p1-z1_mask.png"):
        Image.open(root / "images" / "p0-z0.png").save(root / "images" / name)
    strangers_among_images(root)
    strangers_among_masks(root)
    found = warnings_in(printed(capsys, check, options(data=root)))
    words = ["32 classes", "in one image alone", "no labelled image has", "passed over in images",
             "passed over in masks", "named like another with a suffix", "last number alone"]
    for word in words:
        assert [line for line in found if word in line], word
    out = printed(capsys, mean_teacher.main, options(data=root, steps=1))
    assert warnings_in(out) == found
    assert out.index(found[-1]) < out.index("validation Dice")


@pytest.mark.parametrize("pattern", ["case{:02d}", "ISIC_{:07d}", "p{:02d}_slice_00", "{:x}a",
                                     "site_{:02d}_slice_00"])
def test_names_of_separate_images_get_no_warning(make_dataset, options, capsys, pattern):
    root = make_dataset()
    rename_all(root, lambda number: pattern.format(number * 7919))
    assert "no problem found" in printed(capsys, check, options(data=root))


@pytest.mark.parametrize("name, meant", [
    ("labels", "masks"), ("label", "masks"), ("mask", "masks"), ("Masks", "masks"),
    ("annotations", "masks"), ("imgs", "images"), ("IMAGES", "images"), ("bboxes", "boxes"),
    ("bbox", "boxes"), ("Boxes", "boxes"), ("TAGS", "tags"), ("tag", "tags")])
@BOTH
def test_folders_that_almost_have_the_right_name(make_dataset, options, tmp_path, capsys, command,
                                                 name, meant):
    root = make_dataset()
    (root / "boxes").mkdir()
    (root / "tags").mkdir()
    (root / meant).rename(root / name)
    message = stopped_with(capsys, command, options(data=root))
    assert f"{root / name} looks like {meant}" in message and f"Rename it to {meant}" in message
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_list_that_almost_has_the_right_name(make_dataset, options, capsys):
    root = make_dataset()
    write(root / "valid.txt", "case00\n")
    message = stopped_with(capsys, check, options(data=root))
    assert f"{root / 'valid.txt'} looks like val.txt" in message


def test_one_is_no_plural(make_dataset, options, capsys):
    root = make_dataset(units=6)
    Image.open(root / "images" / "case00.png").save(root / "images" / "case00_mask.png")
    write(root / "images" / "readme.webp", "passed over")
    out = printed(capsys, check, options("--labeled", 1, data=root))
    assert "readme.webp" in out and "case00_mask" in out
    assert not re.search(r"\b1 (images|files|warnings|units|volumes|masks)\b", out)


# --- Lists, folders and options that are none -----------------------------------------------------


def broken_link(path):
    path.symlink_to(path.with_name("gone"))


def a_folder(path):
    path.mkdir()


def a_file(path):
    path.write_text("case00")


@pytest.mark.parametrize("make", [broken_link, a_folder])
@pytest.mark.parametrize("name", ["train.txt", "val.txt", "test.txt", "classes.txt"])
def test_lists_that_are_no_files(make_dataset, options, capsys, name, make):
    root = make_dataset()
    make(root / name)
    message = stopped_with(capsys, mean_teacher.main, options(data=root))
    assert f"{root / name} is a folder or a broken link; expected a text file" in message


@pytest.mark.parametrize("name", ["Train.TXT", "train.TXT", "Val.txt", "TEST.txt", "Classes.txt"])
def test_lists_with_capitals(make_dataset, options, capsys, name):
    root = make_dataset()
    write(root / name, "case00\n")
    if (root / name.lower()).exists():
        pytest.skip("this file system does not tell capitals")
    message = stopped_with(capsys, mean_teacher.main, options(data=root))
    assert f"{root / name} looks like {name.lower()}" in message


@pytest.mark.parametrize("make", [broken_link, a_file])
@pytest.mark.parametrize("name", ["images", "masks", "boxes", "tags"])
def test_folders_that_are_none(make_dataset, options, capsys, name, make):
    root = make_dataset()
    if (root / name).exists():
        (root / name).rename(root / "elsewhere")
    make(root / name)
    message = stopped_with(capsys, mlds.main, options(data=root))
    assert f"{root / name} is a file or a broken link; expected a folder" in message


@pytest.mark.parametrize("more, message", [
    (["--classes", "300"], "--classes: 300 was given, 2 to 32 is needed"),
    (["--classes", "33"], "2 to 32 is needed"),
    (["--seed", str(2**64)], "--seed: 18446744073709551616 was given, 0 to 2147483648 is needed"),
    (["--seed", "-1"], "0 to 2147483648 is needed"),
    (["--split-seed", str(2**64)], "0 to 2147483648 is needed")])
def test_numbers_that_are_too_large_are_refused_at_once(options, tmp_path, capsys, more, message):
    error = stopped_with(capsys, mean_teacher.main, options(*more))
    assert message in error
    assert not list(tmp_path.iterdir())


def test_the_largest_numbers_work(options):
    largest = str(2**31)
    argv = options("--classes", "32", "--seed", largest, "--split-seed", largest, steps=1)
    results = mean_teacher.main(argv)
    assert results["seed"] == 2**31


# --- What a size and a range allow ----------------------------------------------------------------


def stripes_and_a_half(root):
    """Class 1 is the lower half of 64 x 64 pixels, class 2 are lines of one pixel above it."""
    for path, mask in masks_of(root).items():
        mask[:] = 0
        mask[32:] = 1
        mask[2:30:4] = 2
        save(path, mask)


def reachable(capsys, argv):
    """What check prints of the best Dice: {class: number}."""
    line = re.search(r"best Dice that --size \d+ allows: (.*)", printed(capsys, check, argv))[1]
    return {name: float(value) for name, value in re.findall(r"(class \d) ([\d.]+)", line)}


def test_the_best_dice_of_thin_structures_is_low_at_a_small_size(make_dataset, options, capsys):
    root = make_dataset(units=6, size=64)
    stripes_and_a_half(root)
    best = {}
    for size in (16, 32, 64):
        argv = options("--labeled", 1, "--size", size, data=root)
        best[size] = reachable(capsys, argv)
    assert best[16]["class 1"] == 100 and best[64] == {"class 1": 100, "class 2": 100}
    assert best[16]["class 2"] < 60 and best[32]["class 2"] < 90


def test_no_network_is_better_than_the_best_dice(make_dataset, options, capsys):
    """One that gives back the masks which training sees, at --size."""
    root = make_dataset(units=6, size=64)
    stripes_and_a_half(root)
    argv = options("--labeled", 1, "--size", 16, data=root)
    best = reachable(capsys, argv)
    data = data_of(argv)
    [tested] = data.indices("test")

    def knows_the_mask(networks, x):
        onehot = F.one_hot(data.labels[tested].long(), 3)
        return {"net": onehot.movedim(2, 0)[None].float()}
    scores = common.evaluate(knows_the_mask, {}, data, "test", distances=False)["net"]
    for c in (1, 2):
        assert scores["classes"][str(c)]["dice"] <= best[f"class {c}"] + 0.05


def test_a_class_that_vanishes_at_this_size_is_not_called_unlabelled(make_dataset, options,
                                                                     capsys):
    """Other units would not help: a larger --size would."""
    root = make_dataset(units=6, size=64)
    for path, mask in masks_of(root).items():
        mask[::16] = 3
        save(path, mask)
    argv = options("--labeled", 1, "--size", 32, data=root)
    assert 3 not in [int(label.max()) for label in data_of(argv).labels.values()]
    [found] = warnings_in(printed(capsys, check, argv))
    assert "class 3" in found and "--size" in found


def darken(root):
    """Pixels of 8 bits from 0 to 12: 5% of the range."""
    for path in (root / "images").iterdir():
        save(path, np.array(Image.open(path)) // 20)


def test_dark_images_get_a_warning(make_dataset, options, capsys):
    root = make_dataset()
    darken(root)
    out = printed(capsys, check, options(data=root))
    high = max(np.array(Image.open(path)).max() for path in (root / "images").iterdir())
    low = min(np.array(Image.open(path)).min() for path in (root / "images").iterdir())
    assert f"stored as uint8 from {low} to {high}" in out
    assert re.search(r"warning: .*range.*16-bit", out)
    assert "no problem found" not in out


def test_dark_images_of_16_bits_are_scaled(make_dataset, options, capsys):
    root = make_dataset()
    darken(root)
    for path in (root / "images").iterdir():
        save(path, np.array(Image.open(path)).astype(np.uint16))
    out = printed(capsys, check, options(data=root))
    assert "used from 0 to 255" in out and "no problem found" in out


def test_readme_says_how_to_store_dark_images_as_16_bit(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    line = re.search(r"[Dd]ark(.|\n)*?`numpy.save\(NAME, (.*)\)` makes `NAME.npy`", text)
    path = tmp_path / "dark.jpg"
    Image.new("RGB", (4, 5), (9, 9, 9)).save(path)
    array = eval(line[2], {"numpy": np, "Image": Image, "path": path})
    assert array.dtype == np.uint16 and array.shape == (5, 4, 3) and (array == 9).all()
