"""Dataset folders: names, lists, splits, pixels of every kind, the cache, the phantom, check."""
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import Data, Item, evaluate, parse, parser


def data_of(argv):
    """The Data of a command line."""
    return Data(parse(parser(""), argv))


def save(path, array):
    """Write an image or a .npy file."""
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)


def stopped_with(capsys, function, *arguments):
    """Call what must stop the program with status 2: its message."""
    with pytest.raises(SystemExit) as stopped:
        function(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


# --- Names ----------------------------------------------------------------------------------------


def test_names_of_slices():
    assert common.parse_name("patient001_frame01_slice_03") == ("patient001", "patient001_frame01",
                                                                3)
    assert common.parse_name("p_slice12") == ("p", "p", 12)
    assert common.parse_name("ISIC_0000001") == ("ISIC_0000001", "ISIC_0000001", -1)


def test_slices_are_stacked_by_number(tmp_path, options):
    root = tmp_path / "stack"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for p in range(4):
        for s in (10, 9, 1, 2):
            name = f"p{p}_slice_{s}.png"
            save(root / "images" / name, np.full((16, 16), s, np.uint8))
            save(root / "masks" / name, np.full((16, 16), 1, np.uint8))
    data = data_of(options("--labeled", "1", data=root))
    [indices] = data.volumes("test").values()
    assert [int(data.images[i].max()) for i in indices] == [1, 2, 9, 10]


@pytest.mark.parametrize("suffix", ["_mask", "_segmentation", "_anno", "_label", "_seg", "_GT"])
def test_suffixes_of_masks_are_no_part_of_their_names(make_dataset, suffix):
    root = make_dataset(units=3)
    for path in (root / "masks").iterdir():
        path.rename(path.with_stem(path.stem + suffix))
    items = common.find_items(root)
    assert [item.mask.name for item in items] == [f"{item.name}{suffix}.png" for item in items]


def test_other_files_in_the_folders_are_left_alone(make_dataset):
    root = make_dataset(units=3)
    (root / "images" / "readme.txt").write_text("text")
    (root / "images" / ".hidden.png").write_text("text")
    assert [item.name for item in common.find_items(root)] == ["case00", "case01", "case02"]


# --- Splits ---------------------------------------------------------------------------------------


def split_of(names, folder, masked=None, labeled="10%", seed=0):
    """A split of images of these names, by the lists in a folder: {part: image names}."""
    items = []
    for name in names:
        unit, volume, _ = common.parse_name(name)
        mask = None
        if masked is None or name in masked:
            mask = Path(name)
        items.append(Item(name, unit, volume, Path(name), mask))
    split = common.make_split(items, folder, labeled, seed)
    return {part: [items[i].name for i in numbers] for part, numbers in split.items()}


def units_of(split):
    """{part: image names} -> {part: sorted units}."""
    units = {}
    for part, names in split.items():
        units[part] = sorted({common.parse_name(name)[0] for name in names})
    return units


def write_lists(folder, **lists):
    for part, ids in lists.items():
        (folder / f"{part}.txt").write_text("\n".join(ids))


def test_split_is_nested_seeded_and_independent_of_order(tmp_path):
    names = [f"p{u:03d}_slice_{s}" for u in range(100) for s in range(3)]
    splits = {}
    for spec in ("5%", "10%", "20%", "7", "100%"):
        splits[spec] = units_of(split_of(names, tmp_path, labeled=spec))
    counts = {part: len(units) for part, units in splits["10%"].items()}
    assert counts == {"labeled": 7, "unlabeled": 63, "val": 10, "test": 20}
    labeled = [set(splits[spec]["labeled"]) for spec in ("5%", "10%", "20%")]
    assert labeled[0] < labeled[1] < labeled[2]
    assert splits["7"] == splits["10%"] and len(labeled[0]) == 4
    assert not splits["100%"]["unlabeled"]
    assert units_of(split_of(names[::-1], tmp_path)) == splits["10%"]
    assert units_of(split_of(names, tmp_path, seed=1)) != splits["10%"]
    every_unit = sorted({name[:4] for name in names})
    for split in splits.values():
        assert sorted(sum(split.values(), [])) == every_unit  # every patient once


def test_split_draws_validation_and_test_from_units_with_masks(tmp_path):
    names = [f"im{i:02d}" for i in range(40)]
    split = split_of(names, tmp_path, masked=names[:10], labeled=None)
    assert len(split["val"]) == 1 and len(split["test"]) == 2 and len(split["labeled"]) == 7
    assert set(split["val"] + split["test"]) < set(names[:10])
    assert set(names[10:]) == set(split["unlabeled"])


def test_split_from_lists(tmp_path):
    names = [f"im{i:02d}" for i in range(20)]
    write_lists(tmp_path, train=names[:10], val=names[10:12], test=names[12:14])
    split = split_of(names, tmp_path, labeled="5")
    assert split["val"] == names[10:12]
    assert sorted(split["labeled"] + split["unlabeled"]) == names[:10]


def test_split_from_one_list(tmp_path):
    names = [f"im{i:02d}" for i in range(20)]
    write_lists(tmp_path, test=names[:4])
    split = split_of(names, tmp_path, labeled="5")
    assert split["test"] == names[:4] and len(split["val"]) == 2
    assert len(split["labeled"] + split["unlabeled"]) == 14


def slices_of(patients, frames=(1, 2), slices=3):
    """Names of slices, in order."""
    names = []
    for patient in patients:
        for frame in frames:
            names += [f"{patient}_frame{frame:02d}_slice_{s:02d}" for s in range(slices)]
    return names


@pytest.mark.parametrize("identity, count", [
    ("p1", 6), ("p1_frame02", 3), ("p1_frame02_slice_01", 1)])
@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_an_id_in_a_list_stands_for_exactly_its_images(tmp_path, part, identity, count):
    names = slices_of([f"p{u}" for u in range(8)])
    write_lists(tmp_path, **{part: [identity]})
    split = split_of(names, tmp_path, labeled="100%")
    split["train"] = split["labeled"] + split["unlabeled"]
    expected = [name for name in names if name.startswith(identity)]
    assert split[part] == expected and len(expected) == count
    elsewhere = {"train", "val", "test"} - {part}
    for other in elsewhere:  # the rest of the patient is in no part
        assert split[other] and not [name for name in split[other] if name.startswith("p1")]


@pytest.mark.parametrize("ids, count", [
    (["p1"], 6), (["p1_frame02"], 3), (["p1_frame02_slice_01"], 1),
    (["p1_frame01", "p2_frame01_slice_00"], 4), (["p1_frame02", "p1_frame02_slice_01"], 3)])
def test_an_id_of_labeled_stands_for_exactly_its_images(tmp_path, ids, count):
    names = slices_of([f"p{u}" for u in range(6)])
    write_lists(tmp_path, train=["p0", "p1", "p2"], val=["p3"], test=["p4"])
    (tmp_path / "mine.txt").write_text("\n".join(ids))
    split = split_of(names, tmp_path, labeled=str(tmp_path / "mine.txt"))
    expected = [name for name in names if name.startswith(tuple(ids))]
    assert split["labeled"] == expected and len(expected) == count
    training = slices_of(["p0", "p1", "p2"])  # the rest of a labelled patient is unlabelled
    assert sorted(split["labeled"] + split["unlabeled"]) == training


@pytest.mark.parametrize("ids", [["p1_frame02"], ["p0", "p1_frame02"]])
def test_an_id_of_labeled_that_is_not_in_training_is_refused(tmp_path, capsys, ids):
    """Also where another image of the same patient is in training; it has a mask, too."""
    names = slices_of([f"p{u}" for u in range(6)])
    write_lists(tmp_path, train=["p0", "p1_frame01"], val=["p3"], test=["p4"])
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(ids))
    message = stopped_with(capsys, split_of, names, tmp_path, None, str(path))
    assert f"--labeled {path}: not" in message and "p1" in message


def test_an_id_of_labeled_shows_the_masks_of_its_images_alone(make_dataset, options, tmp_path):
    """Hidden masks are not opened: those of the same patient, too, may be anything."""
    root = make_dataset(units=8, slices=3)
    write_lists(root, train=[f"p{u:02d}" for u in range(6)], val=["p06"], test=["p07"])
    shown = ["p00_frame01_slice_01", "p02_frame01_slice_00"]
    (tmp_path / "mine.txt").write_text("\n".join(shown))
    for path in (root / "masks").glob("p0[0-5]*"):
        if path.stem not in shown:
            path.write_text("not a mask")
    data = data_of(options("--labeled", tmp_path / "mine.txt", data=root))
    assert [data.items[i].name for i in data.indices("labeled")] == shown
    assert len(data.indices("unlabeled")) == 6 * 3 - 2
    assert len(data.labels) == 2 + 3 + 3
    assert set(data.draw()[0].tolist()) <= set(data.indices("labeled"))


def test_patients_with_some_masks_missing(tmp_path):
    """Slices without a mask: unlabelled in training, in no part of a validation or test patient."""
    names = slices_of([f"p{u}" for u in range(6)])
    masked = [name for name in names if not name.endswith("_00")]
    write_lists(tmp_path, val=["p4"], test=["p5"])
    split = split_of(names, tmp_path, masked=masked, labeled=None)
    for part, patients in (("labeled", "p0 p1 p2 p3"), ("val", "p4"), ("test", "p5")):
        expected = [name for name in slices_of(patients.split()) if name in masked]
        assert split[part] == expected, part
    assert split["unlabeled"] == [name for name in slices_of(["p0", "p1", "p2", "p3"])
                                  if name not in masked]


def test_parts_of_one_patient_may_not_be_in_two_lists(tmp_path, capsys):
    write_lists(tmp_path, train=["p0_frame01", "p1"], test=["p0_frame02"])
    names = slices_of(["p0", "p1", "p2"])
    message = stopped_with(capsys, split_of, names, tmp_path)
    assert "p0: in train.txt and in test.txt" in message


def test_split_ignores_the_order_of_the_file_system(make_dataset, options, monkeypatch):
    root = make_dataset(units=12, slices=2)
    first = data_of(options(data=root))
    listed = Path.iterdir

    def reversed_order(folder):
        return reversed(list(listed(folder)))
    monkeypatch.setattr(Path, "iterdir", reversed_order)
    second = data_of(options(data=root))
    assert first.items == second.items and first.split == second.split


# --- Images ---------------------------------------------------------------------------------------


def test_images_of_every_kind(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    colour = np.stack([grey, grey[::-1], grey.T], -1)
    files = {"a.png": grey, "b.png": colour, "c.bmp": grey, "d.tif": grey, "e.gif": grey,
             "f.npy": grey, "g.npy": colour, "h.TIFF": colour}
    for name, array in files.items():
        save(tmp_path / name, array)
        pixels = common.read_pixels(tmp_path / name)
        if pixels.ndim > array.ndim:
            pixels = pixels[..., 0]
        assert np.array_equal(pixels, array), name
    np.save(tmp_path / "one.npy", grey[..., None])
    assert np.array_equal(common.read_pixels(tmp_path / "one.npy"), grey)
    save(tmp_path / "rgba.png", np.dstack([colour, grey]))
    assert np.array_equal(common.read_pixels(tmp_path / "rgba.png"), colour)
    save(tmp_path / "bit.png", grey > 100)
    assert np.array_equal(common.read_pixels(tmp_path / "bit.png"), (grey > 100) * 255)
    Image.fromarray(colour).quantize(200).save(tmp_path / "palette.png")
    assert common.read_pixels(tmp_path / "palette.png").shape == (8, 8, 3)


def test_deep_images_are_scaled_by_their_volume(tmp_path):
    dark = np.linspace(0, 1000, 256).reshape(16, 16)
    bright = np.linspace(1000, 4000, 256).reshape(16, 16)
    for name, array in (("a", dark), ("b", bright)):
        save(tmp_path / f"{name}.png", array.astype(np.uint16))
        save(tmp_path / f"{name}.npy", array.astype(np.float32))
    for ending in ("png", "npy"):
        paths = [tmp_path / f"{name}.{ending}" for name in "ab"]
        arrays, bad = common.read_volume(paths)
        a, b = arrays.values()
        assert a.dtype == np.uint8 and a.max() <= b.min() + 1  # one scale for both
        assert a.min() == 0 and b.max() == 255 and not bad
        alone, _ = common.read_volume(paths[:1])
        assert alone[paths[0]].max() == 255


def mixed_volume(folder):
    """A volume of two 16-bit slices and one of 8 bits: the paths."""
    ramp = np.arange(256).reshape(16, 16)
    paths = [folder / f"p00_slice_{s}.png" for s in range(3)]
    save(paths[0], (ramp * 200).astype(np.uint16))
    save(paths[1], ramp.astype(np.uint8))
    save(paths[2], (ramp * 100).astype(np.uint16))
    return paths


def test_a_shallow_slice_in_a_deep_volume_is_none_of_its_images(tmp_path):
    paths = mixed_volume(tmp_path)
    arrays, [problem] = common.read_volume(paths)
    assert "p00_slice_1.png: 8 bits, but p00_slice_0.png of the same volume has more" in problem
    assert list(arrays) == [paths[0], paths[2]]  # what is bad is not also a good image


def test_a_shallow_slice_in_a_deep_volume_is_refused(make_dataset, options, capsys):
    root = make_dataset(units=6, slices=3, size=16)
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 200
    for s in (0, 2):
        save(root / "images" / f"p03_frame01_slice_{s:02d}.png", deep)
    message = stopped_with(capsys, data_of, options(data=root))
    assert "1 bad files among the images" in message
    assert "p03_frame01_slice_01.png: 8 bits, but p03_frame01_slice_00.png" in message


def test_images_that_are_not_square(make_dataset, options):
    root = make_dataset()
    for path in root.glob("*/*.png"):
        Image.open(path).resize((40, 24), Image.NEAREST).save(path)
    data = data_of(options(data=root))
    assert set(data.sizes) == {(24, 40)} and data.truth(0).shape == (24, 40)
    assert data.images.shape[2:] == (32, 32)

    def guess(networks, x):
        return {"net": torch.rand(len(x), 3, 32, 32)}
    scores = evaluate(guess, {}, data, "test")
    assert 0 < scores["net"]["dice"] < 60


# --- Masks ----------------------------------------------------------------------------------------


def kinds_of_masks():
    """{file name: (what is saved, what is read)}."""
    classes = np.zeros((8, 8), np.uint8)
    classes[2:4], classes[5:7] = 1, 2
    bits = np.minimum(classes, 1)
    black_white = bits * np.uint8(255)
    palette = Image.fromarray(classes)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    white = Image.fromarray(1 - bits)  # index 0 is white: the colours count
    white.putpalette([255, 255, 255, 0, 0, 0])
    return {
        "classes.png": (Image.fromarray(classes), classes),
        "binary.png": (Image.fromarray(black_white), black_white),
        "bit.png": (Image.fromarray(bits > 0), black_white),
        "palette.png": (palette, classes),
        "white.png": (white, black_white),
        "rgb.png": (Image.fromarray(np.stack([black_white] * 3, -1)), black_white),
        "deep.png": (Image.fromarray(classes.astype(np.uint16)), classes),
        "empty.png": (Image.fromarray(0 * classes), 0 * classes),
    }


@pytest.mark.parametrize("name", kinds_of_masks())
def test_masks_of_every_kind(tmp_path, name):
    image, expected = kinds_of_masks()[name]
    image.save(tmp_path / name)
    mask = common.read_mask(tmp_path / name)
    assert np.array_equal(mask, expected) and mask.dtype == np.uint8


def test_masks_in_arrays_and_jpegs(tmp_path):
    _, classes = kinds_of_masks()["classes.png"]
    np.save(tmp_path / "float.npy", classes.astype(float))
    assert np.array_equal(common.read_mask(tmp_path / "float.npy"), classes)
    big = np.kron(np.minimum(classes, 1), np.ones((20, 20), np.uint8)) * np.uint8(255)
    Image.fromarray(big).save(tmp_path / "lossy.jpg", quality=60)  # edges within blocks of 8 x 8
    assert len(np.unique(np.asarray(Image.open(tmp_path / "lossy.jpg")))) > 2
    mask = common.read_mask(tmp_path / "lossy.jpg")
    assert (mask != big).mean() < 0.01 and set(np.unique(mask)) == {0, 255}


@pytest.mark.parametrize("scale, ending, binary, wrong", [  # wrong: the share of pixels
    (1, ".png", False, 0), (255, ".png", True, 0), (255, ".npy", True, 0),
    (255, ".jpg", True, 0.02)])
def test_binary_masks_are_those_of_0_and_255(make_dataset, options, scale, ending, binary, wrong):
    root = make_dataset(classes=2, scale=scale)
    truth = {}
    for path in sorted((root / "masks").iterdir()):
        mask = np.asarray(Image.open(path))
        truth[path.stem] = mask // scale
        path.unlink()
        save(path.with_suffix(ending), mask)
    data = data_of(options(data=root))
    assert data.binary == binary and data.classes == 2
    for i, label in data.labels.items():
        assert np.mean(label.numpy() != truth[data.items[i].name]) <= wrong
        assert np.array_equal(data.truth(i), label)  # 32 x 32 as it lies on disk


def write_class_255(root, name):
    """One pixel of a mask becomes 255."""
    path = root / "masks" / f"{name}.png"
    mask = np.array(Image.open(path))
    mask[0, 0] = 255
    save(path, mask)


@pytest.mark.parametrize("part", ["labeled", "val", "test"])
def test_255_beside_class_numbers_is_refused(make_dataset, options, capsys, part):
    root = make_dataset()
    data = data_of(options(data=root))
    name = data.items[data.indices(part)[0]].name
    write_class_255(root, name)
    message = stopped_with(capsys, data_of, options(data=root))
    assert f"255 (in {name}.png)" in message and "class numbers (2 in case" in message


def test_255_in_every_mask_of_classes_is_refused(make_dataset, options, capsys):
    root = make_dataset()
    for path in (root / "masks").iterdir():
        write_class_255(root, path.stem)
    message = stopped_with(capsys, data_of, options(data=root))
    assert "also 255 (in case" in message and "not supported" in message


def test_values_that_are_no_class_numbers_are_refused(make_dataset, options, capsys):
    """A noisy 0/255 mask in a format without losses is a mistake of whoever made it."""
    root = make_dataset(classes=2, scale=240)
    message = stopped_with(capsys, data_of, options(data=root))
    assert "mask values 0, 240 (240 in case" in message and "expected class numbers" in message


def test_validation_reads_masks_at_their_own_size(make_dataset, options):
    root = make_dataset(size=50)
    data = data_of(options(data=root))
    i = data.indices("test")[0]
    assert data.truth(i).shape == (50, 50) and data.images.shape == (14, 1, 32, 32)
    mask = np.asarray(Image.open(root / "masks" / f"{data.items[i].name}.png"))
    assert np.array_equal(data.truth(i), mask)


def test_class_names(make_dataset, options):
    root = make_dataset(classes=4)
    names = ["background", "class 1", "class 2", "class 3"]
    assert data_of(options(data=root)).class_names == names
    data = data_of(options("--classes", 6, data=root))
    assert data.classes == 6 and data.class_names == [*names, "class 4", "class 5"]
    text = "\ufeffback\n\n lung \r\nheart\nleft liver\n"
    (root / "classes.txt").write_bytes(text.encode())
    assert data_of(options(data=root)).class_names == ["back", "lung", "heart", "left liver"]


# --- Cache ----------------------------------------------------------------------------------------


def cache_files(tmp_path):
    """The cache's files by what they hold: {"images" or "masks": path}."""
    files = {}
    for path in (tmp_path / "cache").iterdir():
        what = "images"
        if "binary" in torch.load(path, weights_only=True):
            what = "masks"
        files[what] = path
    return files


def test_cache_is_used_renewed_and_whole(make_dataset, options, tmp_path):
    root = make_dataset()
    first = data_of(options(data=root))
    files = cache_files(tmp_path)
    assert sorted(files) == ["images", "masks"]
    assert torch.equal(data_of(options(data=root)).images, first.images)
    before = first.images.clone()
    for path in files.values():  # what lies there is shown: no image is decoded again
        content = torch.load(path, weights_only=True)
        content["pixels"] = content["pixels"] + 1
        torch.save(content, tmp_path / "changed.pt")
        os.replace(tmp_path / "changed.pt", path)
    second = data_of(options(data=root))
    assert torch.equal(second.images, before + 1)
    assert all(torch.equal(second.labels[i], label + 1) for i, label in first.labels.items())
    assert torch.equal(first.images, before)  # a run that has the file open keeps its pixels
    path = root / "images" / f"{first.items[0].name}.png"
    save(path, np.full((32, 32), 9, np.uint8))
    os.utime(path, (time.time() + 5, time.time() + 5))
    third = data_of(options(data=root))
    assert (third.images[0] == 9).all() and torch.equal(third.images[1:], before[1:])
    assert not list((tmp_path / "cache").glob("building-*"))


@pytest.mark.parametrize("rows, later", [(slice(0, 8), 0), (slice(-8, None), 0),
                                         (slice(60, 68), 1)], ids=["start", "end", "time"])
def test_cache_sees_a_file_that_changed_in_place(make_dataset, options, rows, later):
    """Of equal size: by its first and last 4096 bytes, or by its time, in nanoseconds."""
    root = make_dataset(size=128)
    data = data_of(options(data=root))
    i = data.indices("labeled")[0]
    path = root / "masks" / f"{data.items[i].name}.npy"
    path.with_suffix(".png").unlink()
    mask = np.ones((128, 128), np.uint8)
    np.save(path, mask)
    status = path.stat()
    assert (data_of(options(data=root)).labels[i] == 1).all()
    mask[rows] = 2
    np.save(path, mask)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + later))
    assert path.stat().st_size == status.st_size
    small = Image.fromarray(mask).resize((32, 32), Image.NEAREST)
    assert np.array_equal(data_of(options(data=root)).labels[i], np.asarray(small))


def test_two_folders_of_equal_names_sizes_and_times_have_their_own_pixels(options, tmp_path):
    """The files differ in their middles alone, of which the cache's key knows nothing."""
    for number, name in ((1, "one"), (2, "two")):
        root = tmp_path / name / "set"
        for part in ("images", "masks"):
            (root / part).mkdir(parents=True)
            for u in range(6):
                array = np.zeros((128, 128), np.uint8)
                array[56:72] = number
                np.save(root / part / f"case{u}.npy", array)
                os.utime(root / part / f"case{u}.npy", (10**9, 10**9))
    for number, name in ((1, "one"), (2, "two")):
        root = tmp_path / name / "set"
        data = data_of(options("--classes", 3, "--labeled", "1", data=root))
        assert int(data.images.max()) == number
        assert {int(label.max()) for label in data.labels.values()} == {number}


def damaged(content, how):
    """A file's content after an accident."""
    if how == "random bytes":
        return np.random.default_rng(0).bytes(len(content))
    return content[:{"empty": 0, "the start": 1000, "half": len(content) // 2}[how]]


@pytest.mark.parametrize("how", ["empty", "the start", "half", "random bytes"])
@pytest.mark.parametrize("what", ["images", "masks"])
def test_a_damaged_cache_says_so(make_dataset, options, tmp_path, capsys, what, how):
    root = make_dataset()
    before = data_of(options(data=root)).images.clone()
    path = cache_files(tmp_path)[what]
    path.write_bytes(damaged(path.read_bytes(), how))
    message = stopped_with(capsys, data_of, options(data=root))
    assert str(path) in message and "Delete it" in message and "--cache FOLDER" in message
    path.unlink()
    assert torch.equal(data_of(options(data=root)).images, before)


def test_a_cache_that_cannot_be_written_leaves_nothing(make_dataset, options, tmp_path, capsys):
    """Files may not be longer than 5000 bytes for a while, as if the disk were full."""
    resource = pytest.importorskip("resource")
    argv = options(data=make_dataset())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        message = stopped_with(capsys, data_of, argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in message and "--cache FOLDER" in message
    assert not list((tmp_path / "cache").iterdir())  # no half of a file that no one deletes


def test_two_builders_of_one_cache(make_dataset, options, tmp_path):
    """A run that was slower replaces the file that a faster one has already mapped."""
    data = data_of(options(data=make_dataset()))
    before = data.images.clone()
    path = cache_files(tmp_path)["images"]
    common.write_cache(path, common.read_images(data.items, 32))
    assert torch.equal(data.images, before)
    assert torch.equal(data_of(options(data=tmp_path / "set")).images, before)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # images, masks, nothing half built


# --- Phantom and check ----------------------------------------------------------------------------


def files_in(folder):
    """{path below the folder: content}."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder)] = path.read_bytes()
    return files


def test_the_phantom_is_an_ordinary_folder_and_always_the_same(tmp_path, capsys):
    common.main(["phantom", "--out", str(tmp_path / "mine"), "--size", "16"])
    assert "384 images in" in capsys.readouterr().out
    argv = ["--size", "16", "--device", "cpu", "--cache", str(tmp_path / "cache")]
    data = data_of(argv)  # without --data
    assert data.name == "phantom-16"
    assert files_in(Path(data.args.data)) == files_in(tmp_path / "mine")
    parts = {part: len(data.units(part)) for part in data.split}
    assert parts == {"labeled": 1, "unlabeled": 13, "val": 10, "test": 24}
    assert data.classes == 4 and len(data.items) == 384
    os.utime(data.args.data, (10**9, 10**9))
    data_of(argv)
    assert os.stat(data.args.data).st_mtime == 10**9  # it is there: not drawn again
    assert not list((tmp_path / "cache").glob("building-*"))


def test_the_phantom_is_drawn_in_seconds(tmp_path):
    start = time.perf_counter()
    common.draw_phantom(tmp_path / "phantom", 48)
    assert time.perf_counter() - start < 4  # two seconds on a quiet machine


def test_check_reports_a_dataset(make_dataset, options, tmp_path, capsys):
    root = make_dataset(units=12, slices=2)
    common.main(["check", *options(data=root)])
    out = capsys.readouterr().out
    assert "24 images, 24 with masks, 12 units" in out
    assert "unit p00, volume p00_frame01" in out
    assert "no problem found" in out
    assert Image.open(tmp_path / "runs" / "set" / "check.png").size[0] > 300


def without_labeled(argv):
    """The options without --labeled SPEC."""
    cut = argv.index("--labeled")
    return argv[:cut] + argv[cut + 2:]


def test_check_counts_pixels_and_parts_of_all_masks(make_dataset, options, capsys):
    root = make_dataset()
    pixels = np.zeros(3, int)
    for path in (root / "masks").iterdir():
        pixels += np.bincount(np.asarray(Image.open(path)).ravel(), minlength=3)
    argv = options(data=root)
    common.main(["check", *without_labeled(argv)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    shares = pixels / pixels.sum()
    for c, name in enumerate(["background", "class 1", "class 2"]):
        assert [str(c), *name.split(), f"{shares[c]:.2%}", "10", "1", "3"] in rows
    common.main(["check", *argv])
    out = capsys.readouterr().out
    assert "labeled: 3 images: case" in out and "unlabeled: 7 images: case" in out
    assert "val: 1 image: case" in out and "test: 3 images: case" in out


def hide_size(root, name):
    save(root / "masks" / f"{name}.png", np.ones((20, 30), np.uint8))


def hide_text(root, name):
    (root / "masks" / f"{name}.png").write_text("no mask")


def hide_colours(root, name):
    colours = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    save(root / "masks" / f"{name}.png", colours)


@pytest.mark.parametrize("hide, what", [
    (hide_text, "cannot be used"), (hide_colours, "a mask in colours"),
    (hide_size, "20 x 30 pixels, but its image has 32 x 32"), (write_class_255, "255")])
def test_check_finds_what_is_wrong_with_hidden_masks(make_dataset, options, capsys, hide, what):
    root = make_dataset()
    data = data_of(options(data=root))
    name = data.items[data.indices("unlabeled")[0]].name
    hide(root, name)
    data_of(options(data=root))  # a run does not look at it
    message = stopped_with(capsys, common.main, ["check", *options(data=root)])
    assert what in message and f"{name}.png" in message


def test_check_without_labeled_shows_all_masks(make_dataset, options, capsys):
    common.main(["check", *without_labeled(options(data=make_dataset()))])
    assert "labeled: 10 images: case" in capsys.readouterr().out


def test_check_counts_images_volumes_and_units(make_dataset, options, capsys):
    root = make_dataset(units=6, slices=2)
    common.main(["check", *options("--labeled", 1, data=root)])
    out = capsys.readouterr().out
    assert "labeled: 2 images in 1 volume of 1 unit: p0" in out
    assert "unlabeled: 6 images in 3 volumes of 3 units: p0" in out
