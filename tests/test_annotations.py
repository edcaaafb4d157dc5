"""Boxes and tags of mlds.py: read from files, derived from masks, and the maps made of them."""
import math
import re

import numpy as np
import pytest
import torch

import mlds
from common import Data, parse, parser

SPIRAL = """\
1111111
0000001
1111101
1000101
1011101
1000001
1111111"""


def load(argv):
    """The dataset of a run with these shared options."""
    return Data(parse(parser(""), argv))


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


# --- Connected regions ----------------------------------------------------------------------------

def spiral():
    return np.array([list(map(int, row)) for row in SPIRAL.split()], np.uint8)


def some_masks():
    rng = np.random.default_rng(0)
    masks = [np.zeros((5, 7), np.uint8), np.ones((4, 4), np.uint8), np.eye(6, dtype=np.uint8)]
    for classes in (2, 3, 5):
        for shape in ((1, 9), (9, 1), (20, 20), (16, 30)):
            masks.append(rng.integers(0, classes, shape).astype(np.uint8))
        coarse = rng.integers(0, classes, (6, 6)).astype(np.uint8)
        masks.append(coarse.repeat(4, 0).repeat(5, 1))
    return [*masks, spiral(), spiral().T, spiral()[::-1]]


def flood(mask, start):
    """The pixels (y, x) of the 4-connected region of one class around a pixel, one at a time."""
    region, stack = {start}, [start]
    while stack:
        y, x = stack.pop()
        for neighbour in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = 0 <= neighbour[0] < mask.shape[0] and 0 <= neighbour[1] < mask.shape[1]
            if inside and neighbour not in region and mask[neighbour] == mask[y, x]:
                region.add(neighbour)
                stack.append(neighbour)
    return region


def regions_of(mask):
    """All 4-connected regions, background's too, by flood fill: [set of pixels]."""
    left, regions = {tuple(p) for p in np.argwhere(mask >= 0).tolist()}, []
    while left:
        region = flood(mask, min(left))
        regions.append(region)
        left -= region
    return regions


@pytest.mark.parametrize("mask", some_masks())
def test_connected_regions_and_boxes_brute_force(mask):
    numbers = mlds.connected_regions(mask)
    assert numbers.shape == mask.shape
    used, boxes = set(), []
    for region in regions_of(mask):
        ys, xs = zip(*region, strict=True)
        [number] = set(numbers[ys, xs].tolist())
        assert number not in used, "two regions share a number"
        used.add(number)
        c = int(mask[ys[0], xs[0]])
        if c > 0:
            boxes.append((c, min(ys), min(xs), max(ys) + 1, max(xs) + 1))
    found = []
    height, width = mask.shape
    for c, cx, cy, w, h in mlds.boxes_of(mask):
        corners = [(cy - h / 2) * height, (cx - w / 2) * width,
                   (cy + h / 2) * height, (cx + w / 2) * width]
        assert np.allclose(corners, np.round(corners), atol=1e-6)
        found.append((c, *np.round(corners).astype(int).tolist()))
    assert sorted(found) == sorted(boxes)


def test_boxes_and_tags_by_hand():
    assert mlds.boxes_of(spiral()) == [(1, 0.5, 0.5, 1, 1)]
    assert len(mlds.boxes_of(np.eye(6, dtype=np.uint8))) == 6  # corners do not connect
    mask = np.zeros((4, 8), np.uint8)
    mask[1:3, 2:6] = 2
    mask[0, 7] = 5
    assert sorted(mlds.boxes_of(mask)) == [(2, 0.5, 0.5, 0.5, 0.5), (5, 0.9375, 0.125, 0.125, 0.25)]
    assert mlds.tags_of(mask) == [(2, 0.5, 0.5, 1, 1), (5, 0.5, 0.5, 1, 1)]
    assert mlds.tags_of(0 * mask) == mlds.boxes_of(0 * mask) == []


# --- Files ----------------------------------------------------------------------------------------

def test_files_of_boxes_and_tags(make_dataset, options, capsys):
    """Own files come before derived ones, both intersect, an empty one is background.

    A labelled image keeps its mask, whatever its files say.
    """
    root = make_dataset()
    data = load(options(data=root))
    a, b, c, d, *_ = data.units("unlabeled")
    write(root / "boxes" / f"{a}.txt", "2 0.25 0.5 0.5 1\n\n 1 0.75 .25 .5 .5 \r\n")
    write(root / "tags" / f"{a}.txt", "\ufeff2\n")
    write(root / "boxes" / f"{b}.txt", "")
    write(root / "tags" / f"{c}.txt", "1 2\n")
    for part in ("labeled", "test"):
        write(root / "boxes" / f"{data.units(part)[0]}.txt", "")
    write(root / "tags" / ".hidden.txt", "what a file browser leaves")
    capsys.readouterr()
    maps = mlds.allowed_maps(data, None, None)
    hidden = len(data.indices("unlabeled"))
    start = "training images with masks: 3, "
    expected = f"{start}boxes: 1, tags: 1, boxes and tags: 1, none: {hidden - 3}\n"
    assert capsys.readouterr().out == expected
    number = {item.name: i for i, item in enumerate(data.items)}
    assert (maps[number[a]][:, :16] == 0b101).all() and (maps[number[a]][:, 16:] == 1).all()
    assert (maps[number[b]] == 1).all()
    assert (maps[number[c]] == 0b111).all() and (maps[number[d]] == 0b111).all()
    i = data.indices("labeled")[0]
    assert torch.equal(maps[i].long(), 1 << data.load_labels([i])[0])
    maps = mlds.allowed_maps(data, "100%", "100%")
    assert (maps[number[b]] == 1).all()  # its file, not its mask
    expected = f"{start}boxes: 0, tags: 0, boxes and tags: {hidden}, none: 0\n"
    assert capsys.readouterr().out == expected


BAD_FILES = [  # file, its text, what the message must say
    ("boxes/{u}.txt", "1 0.5 0.5 1 1\n0 0.5 0.5 0.2 0.2",
     r"boxes/{u}\.txt, line 2: .*: class 0; expected 1 to 2, .*YOLO counts from 0\? add 1"),
    ("boxes/{u}.txt", "3 0.5 0.5 0.2 0.2", r"boxes/{u}\.txt, line 1: .*: class 3; expected 1 to 2"),
    ("boxes/{u}.txt", "-1 0.5 0.5 0.2 0.2", "line 1: .*: class -1; expected 1 to 2"),
    ("boxes/{u}.txt", "1 0.9 0.5 0.3 0.2", "line 1: '1 0.9 0.5 0.3 0.2': .*leaves the image"),
    ("boxes/{u}.txt", "1 0.5 0.05 0.3 0.2", "leaves the image"),
    ("boxes/{u}.txt", "1 120 80 40 30", "leaves the image; expected .* from 0 to 1, shares"),
    ("boxes/{u}.txt", "1 0.5 0.5 0 0.2", "box is empty"),
    ("boxes/{u}.txt", "1 0.5 0.5 0.2 -0.2", "box is empty"),
    ("boxes/{u}.txt", "1 0.5 nan 0.2 0.2", "line 1: '1 0.5 nan 0.2 0.2'"),
    ("boxes/{u}.txt", "\n1 0.5 0.5 0.2", "line 2: '1 0.5 0.5 0.2'; expected: class cx cy w h"),
    ("boxes/{u}.txt", "1 0.5 0.5 0.2 0.2 0.9", "expected: class cx cy w h"),
    ("boxes/{u}.txt", "heart 0.5 0.5 0.2 0.2", "expected: class cx cy w h"),
    ("boxes/{u}.txt", "1.0 0.5 0.5 0.2 0.2", "expected: class cx cy w h"),
    ("boxes/{u}.txt", "1, 0.5, 0.5, 0.2, 0.2", "expected: class cx cy w h"),
    ("tags/{u}.txt", "1\n2 0\n",
     r"tags/{u}\.txt, line 2: .*: class 0; .*YOLO counts from 0\? add 1"),
    ("tags/{u}.txt", "1\n9", "line 2: .*: class 9; expected 1 to 2"),
    ("tags/{u}.txt", "1\nheart", r"tags/{u}\.txt, line 2: 'heart'; expected: class"),
    ("boxes/classes.txt", "heart", r"boxes/classes\.txt: no image has this name")]


def refused(argv, tmp_path, capsys):
    """The message with which mlds.py stops, before it makes a run folder."""
    with pytest.raises(SystemExit) as stopped:
        mlds.main(argv)
    assert stopped.value.code == 2
    assert not list(tmp_path.glob("runs/*/*")), "a run folder is left behind"
    return capsys.readouterr().err


@pytest.mark.parametrize("path, text, message", BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_files_of_boxes_and_tags(path, text, message, make_dataset, options, tmp_path, capsys):
    root = make_dataset()
    argv = options(data=root)
    unit = load(argv).units("unlabeled")[0]
    write(root / path.format(u=unit), text)
    error = refused(argv, tmp_path, capsys)
    assert re.search(message.format(u=unit), error), error


def test_a_file_that_is_no_text_and_a_folder(phantom, options, tmp_path, capsys):
    name = "p00_frame01_slice_00.txt"
    (phantom / "boxes").mkdir()
    (phantom / "boxes" / name).write_bytes(b"\xff\xfe\x00\x80")
    error = refused(options(data=phantom), tmp_path, capsys)
    assert f"{name} cannot be read as a text file" in error
    (phantom / "boxes" / name).unlink()
    (phantom / "boxes" / name).mkdir()
    assert "is a folder or a broken link" in refused(options(data=phantom), tmp_path, capsys)


@pytest.mark.parametrize("more, message", [
    (["--boxes", "0.2"], "--boxes 0.2: did you mean 20%"),
    (["--tags", "150%"], "--tags 150%: expected a share"),
    (["--boxes", "20%", "--labeled", "100%"], "--boxes 20%: there are no hidden units"),
    (["--classes", "9"], "9 classes, but .* 8 bits")], ids=range(4))
def test_bad_options(more, message, options, tmp_path, capsys):
    error = refused(options(*more), tmp_path, capsys)
    assert re.search(message, error), error


# --- Derived from hidden masks --------------------------------------------------------------------

def test_derived_annotations_are_the_masks(make_dataset, options, capsys):
    data = load(options(data=make_dataset()))
    boxes = mlds.annotations(data, "boxes", "100%")
    tags = mlds.annotations(data, "tags", "100%")
    assert set(boxes) == set(tags) == set(data.indices("unlabeled"))
    for i in data.indices("unlabeled"):
        present = set(data.truth(i).flatten().tolist()) - {0}
        assert {c for c, *_ in tags[i]} == {c for c, *_ in boxes[i]} == present
    data.classes = 2  # a hidden mask with a class that no visible one has
    with pytest.raises(SystemExit):
        mlds.annotations(data, "tags", "100%")
    assert "holds class 2. Give --classes." in capsys.readouterr().err


def units_of(data, found):
    return {data.items[i].unit for i in found}


@pytest.fixture
def half_masked(make_dataset):
    """9 patients of 2 slices; slice 1 of each has no mask."""
    root = make_dataset(units=9, slices=2)
    for path in (root / "masks").glob("*_slice_01.png"):
        path.unlink()
    return root


@pytest.mark.parametrize("kind", ["boxes", "tags"])
def test_derived_sets_are_nested(kind, half_masked, options):
    """Slice 1 of a hidden patient has no mask, so it gets nothing."""
    data = load(options("--labeled", "2", data=half_masked))
    hidden = set(data.units("unlabeled")) - set(data.units("labeled"))
    sets = {}
    for share in (None, "20%", "50%", "100%"):
        found = mlds.annotations(data, kind, share)
        for i in found:
            assert data.items[i].unit in hidden and data.items[i].name.endswith("_slice_00")
        sets[share] = units_of(data, found)
        assert len(found) == len(sets[share])
    assert set() == sets[None] < sets["20%"] < sets["50%"] < sets["100%"] == hidden
    assert len(sets["20%"]) == math.floor(0.2 * len(hidden) + 0.5)


def test_boxes_and_tags_are_of_other_units(half_masked, options):
    """They are taken from the two ends of the hidden units."""
    data = load(options("--labeled", "2", data=half_masked))
    boxes = units_of(data, mlds.annotations(data, "boxes", "20%"))
    assert boxes and not boxes & units_of(data, mlds.annotations(data, "tags", "20%"))


@pytest.mark.parametrize("kind", ["boxes", "tags"])
def test_of_hidden_masks_only_the_chosen_are_opened(kind, make_dataset, options, tmp_path, capsys):
    """The others may be garbage; one of the chosen may not, and is named."""
    root = make_dataset(units=9, slices=2)
    argv = options("--labeled", "2", data=root)
    data = load(argv)
    chosen = mlds.annotations(data, kind, "50%")
    others = set(data.indices("unlabeled")) - set(chosen)
    assert chosen and others
    for i in others:
        data.items[i].mask.write_bytes(b"garbage")
    assert mlds.annotations(data, kind, "50%") == chosen
    assert mlds.annotations(data, kind, None) == {}
    broken = data.items[min(chosen)].mask
    broken.write_bytes(b"garbage")
    error = refused([*argv, f"--{kind}", "50%"], tmp_path, capsys)
    assert f"bad file among the hidden masks: {broken.name}: " in error


def test_a_file_of_ids_stands_for_exactly_the_images_that_it_names(drawn, options, tmp_path,
                                                                   capsys):
    data = load(options(data=drawn))
    unit, other = data.units("unlabeled")[:2]
    ids = tmp_path / "ids.txt"
    ids.write_text(f"{unit}_frame01_slice_02\n{other}_frame02\n")  # an image and a volume
    names = {data.items[i].name for i in mlds.annotations(data, "boxes", str(ids))}
    volume = {f"{other}_frame02_slice_{level:02d}" for level in range(4)}
    assert names == volume | {f"{unit}_frame01_slice_02"}
    ids.write_text(data.units("labeled")[0])
    with pytest.raises(SystemExit):
        mlds.annotations(data, "boxes", str(ids))
    assert "not hidden units" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["boxes", "tags"])
def test_a_run_with_a_file_of_ids_resumes_from_any_directory(drawn, options, tmp_path, kind,
                                                             monkeypatch):
    unit = load(options(data=drawn)).units("unlabeled")[0]
    (tmp_path / "ids.txt").write_text(unit)
    monkeypatch.chdir(tmp_path)
    folder = mlds.main(options(f"--{kind}", "ids.txt", data=drawn, steps=1))["folder"]
    monkeypatch.chdir("/")
    assert mlds.main(["--resume", folder])["folder"] == folder


def test_a_folder_named_like_a_number_is_no_file_of_ids(drawn, options, tmp_path, monkeypatch):
    (tmp_path / "2").mkdir()
    monkeypatch.chdir(tmp_path)
    args = parse(parser(""), options("--labeled", "2", data=drawn))
    assert args.labeled == "2"
    mlds.main(options("--boxes", "2", data=drawn, steps=1))


def test_split_seed_chooses_the_units_and_lists_the_split(half_masked, options):
    """With lists the split is the same for every --split-seed, but other units have boxes."""
    data = load(options("--labeled", "2", data=half_masked))
    lists = {part: data.units(part) for part in ("labeled", "val", "test")}
    lists["train"] = data.units("labeled") + data.units("unlabeled")
    for part, units in lists.items():
        write(half_masked / f"{part}.txt", "\n".join(units))
    chosen = set()
    for seed in range(4):
        labeled = half_masked / "labeled.txt"
        other = load(options("--split-seed", seed, "--labeled", labeled, data=half_masked))
        chosen.add(frozenset(units_of(other, mlds.annotations(other, "boxes", "50%"))))
        for part in data.split:
            assert set(other.split[part]) == set(data.split[part])
    assert len(chosen) > 1


# --- In batches -----------------------------------------------------------------------------------

@pytest.mark.parametrize("boxes, tags", [("100%", None), (None, "100%")])
def test_pseudo_labels_never_leave_their_boxes_and_tags(boxes, tags, make_dataset, options):
    """The image shows where its class is allowed, so after augmentation it tells it still."""
    data = load(options("--unlabeled-batch", "8", data=make_dataset(classes=4)))
    maps = mlds.allowed_maps(data, boxes, tags)
    for c in (1, 2, 3):
        data.images = (maps[:, None] >> c & 1) * 255
        torch.manual_seed(c)
        for _ in range(4):
            _, _, x_u, map_u, index_u = data.batch(maps)
            label = mlds.pseudo_label(10 * torch.randn(8, 4, 32, 32), map_u)
            assert not (label[x_u[:, 0] == 0] == c).any() and (label == c).any()
            inside = x_u[:, 0] == 1  # and inside it the class may still be chosen
            sure = torch.zeros(8, 4, 32, 32)
            sure[:, c] = 9
            assert inside.any() and (mlds.pseudo_label(sure, map_u)[inside] == c).all()
            for k, i in enumerate(index_u.tolist()):
                allowed = {b for b in range(4) if (maps[i] >> b & 1).any()}
                assert set(label[k].unique().tolist()) <= allowed


def test_a_run_prints_how_many_images_have_which_annotation(phantom, options, capsys):
    """8 images a patient: 3 patients with masks, one with boxes, one with tags, one with a file."""
    data = load(options(data=phantom))
    boxes = units_of(data, mlds.annotations(data, "boxes", "1"))
    tags = units_of(data, mlds.annotations(data, "tags", "1"))
    [other] = set(data.units("unlabeled")) - boxes - tags
    write(phantom / "boxes" / f"{other}_frame01_slice_00.txt", "1 0.5 0.5 0.5 0.5")
    mlds.main(options("--boxes", "1", "--tags", "1", data=phantom, steps=1))
    line = "training images with masks: 24, boxes: 9, tags: 8, boxes and tags: 0, none: 7\n"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["deep", "nearest", "mlds"])
@pytest.mark.parametrize("kind", ["--boxes", "--tags"])
def test_boxes_and_tags_are_refused_where_no_unlabelled_image_is_used(options, capsys, variant,
                                                                      kind):
    with pytest.raises(SystemExit) as stopped:
        mlds.main(options("--variant", variant, kind, "1"))
    assert stopped.value.code == 2 and "Leave one of them out" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["deep", "nearest", "mlds"])
def test_variants_for_masks_open_no_boxes_and_tags(phantom, options, variant):
    name = max(phantom.glob("images/*")).stem
    for kind in ("boxes", "tags"):
        write(phantom / kind / f"{name}.txt", "garbage")
    mlds.main(options("--variant", variant, data=phantom, steps=1))
