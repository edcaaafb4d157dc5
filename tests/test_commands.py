"""common.py's commands check, predict and compare; load_run and segment."""
import csv
import json
import math
import re
import shutil
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import METHODS, draw_case, main_of
from PIL import Image
from torch.nn import functional as F

import common
import cps
import mean_teacher


class Trained(NamedTuple):
    """A finished run's folder, and its dataset's."""

    folder: Path
    data: Path


def train(main, root, channels, *more):
    """A short run on 14 images of 40 x 40 pixels with class names; its learning rate is so large
    that the network says more than one class."""
    data = root / "set"
    for part in ("images", "masks"):
        (data / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(14):
        image, mask = draw_case(rng, 40, 3, channels)
        Image.fromarray(image).save(data / "images" / f"case{number:02d}.png")
        Image.fromarray(mask).save(data / "masks" / f"case{number:02d}.png")
    (data / "classes.txt").write_text("background\nlung\nheart\n")
    argv = ["--data", data, "--labeled", "3", "--size", "32", "--width", "4", "--steps", "16",
            "--lr", "0.02", "--batch-size", "2", "--unlabeled-batch", "2", "--device", "cpu",
            "--val-every", "16", "--out", root / "runs", "--cache", root / "cache", *more]
    return Trained(Path(main([str(word) for word in argv])["folder"]), data)


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """A run of cps.py on colour images, for all tests, which must not change it."""
    return train(cps.main, tmp_path_factory.mktemp("colour"), 3)


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """A labelled-only run on grey images, for all tests, which must not change it."""
    return train(mean_teacher.main, tmp_path_factory.mktemp("grey"), 1, "--supervised")


def run_command(*words):
    common.main([str(word) for word in words])


def predict(*words):
    run_command("predict", *words, "--device", "cpu")


def stopped(capsys, status, function, *words):
    """The message with which a command stops."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        function(*words)
    assert error.value.code == status
    return capsys.readouterr().err


def mask_in(out, name):
    return np.array(Image.open(out / "masks" / f"{name}.png"))


# --- The command line -----------------------------------------------------------------------------

def test_an_unknown_command_gets_the_list_of_commands(capsys):
    message = stopped(capsys, 2, run_command, "pedict", "--run", "x")
    assert "unknown command pedict" in message
    assert "check, phantom, predict, compare" in message


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(words, capsys):
    run_command(*words)
    assert "python common.py check | phantom | predict | compare" in capsys.readouterr().out


@pytest.mark.parametrize("command, options", [
    ("check", ["--data", "--labeled", "--size", "--out"]), ("phantom", ["--out", "--size"]),
    ("predict", ["--run", "--images", "--out", "--network", "--device"]),
    ("compare", ["RUN", "--out"])])
def test_every_command_has_help(command, options, capsys):
    with pytest.raises(SystemExit) as error:
        run_command(command, "--help")
    assert error.value.code == 0
    out = capsys.readouterr().out
    for option in options:
        assert option in out


# --- check ----------------------------------------------------------------------------------------

def check(data, tmp_path, *more):
    run_command("check", "--data", data, "--size", "32", "--out", tmp_path / "checked",
                "--cache", tmp_path / "cache", *more)


def classes_in(out):
    """The table of classes that check and a run print: {"1 lung": [share, images of each part]}."""
    lines = out.splitlines()
    [first] = [number for number, line in enumerate(lines) if line.startswith("class  ")]
    assert re.split("  +", lines[first]) == [
        "class", "of pixels", "in labeled images", "in val images", "in test images"]
    rows = {}
    for line in lines[first + 1:]:
        name, *cells = re.split("  +", line)
        if len(cells) != 4:
            break
        rows[name] = cells
    return rows


def test_check_prints_classes_with_shares_and_numbers_of_images(phantom, tmp_path, capsys):
    """Over all masks that are there: one is missing."""
    (phantom / "masks" / "p01_frame02_slice_03.png").unlink()
    names = ["background", "right ventricle", "class 2", "class 3"]
    (phantom / "classes.txt").write_text("\n".join(names))
    check(phantom, tmp_path)
    out = capsys.readouterr().out
    masks = {"labeled": [], "val": [], "test": []}
    for path in phantom.glob("masks/*"):
        part = {"p30": "val", "p36": "test"}.get(path.name[:3], "labeled")
        masks[part].append(np.array(Image.open(path)))
    every = np.stack(sum(masks.values(), []))
    assert len(every) == 63
    expected = {}
    for c, name in enumerate(names):
        expected[f"{c} {name}"] = [f"{(every == c).mean():.2%}"]
        for part in masks.values():
            images = sum(int((mask == c).any()) for mask in part)
            expected[f"{c} {name}"].append(str(images))
    assert classes_in(out) == expected
    assert ("phantom: 64 images, 63 with masks, 8 units (patients, or images that are no slices), "
            "16 volumes\n") in out
    assert "p00_frame01_slice_00: unit p00, volume p00_frame01\n" in out
    assert "sizes: 32 x 32; channels: 1\nintensities of" in out
    labeled = "labeled: 47 images in 12 volumes of 6 units: p00, p01, p02, p03, ..."
    assert f"\n{labeled}\n" in out  # without --labeled
    assert "\nunlabeled: 1 image: p01\n" in out
    assert "\nval: 8 images in 2 volumes of 1 unit: p30\n" in out
    assert "\ntest: 8 images in 2 volumes of 1 unit: p36\n" in out
    path = tmp_path / "checked" / "phantom" / "check.png"
    assert f"no problem found; look at {path}" in out
    with Image.open(path) as sheet:
        assert sheet.width > 2 * 160


def test_check_of_binary_masks_speaks_of_class_1(make_dataset, tmp_path, capsys):
    root = make_dataset(classes=2, scale=255, size=48)
    check(root, tmp_path, "--labeled", "3")
    out = capsys.readouterr().out
    rows = classes_in(out)
    assert list(rows) == ["0 background", "1 class 1"]
    share, *images = rows["1 class 1"]
    assert float(share.rstrip("%")) > 1 and images == ["3", "1", "3"]
    assert "class 255" not in out and "sizes: 48 x 48" in out
    assert "\nlabeled: 3 images: case" in out


def test_check_shows_a_class_that_hidden_masks_alone_have(make_dataset, options, tmp_path, capsys):
    root = make_dataset(classes=2)
    data = common.Data(common.parse(common.parser(""), options(data=root)))
    hidden = data.items[data.indices("unlabeled")[0]]
    Image.fromarray(np.full((32, 32), 3, np.uint8)).save(hidden.mask)
    check(root, tmp_path, "--labeled", "3")
    out = capsys.readouterr().out
    assert "\nwarning: masks that a run does not see hold class 3\n" in out
    assert "no problem found" not in out


@pytest.mark.parametrize("content", ["garbage", "colours"])
def test_check_names_a_broken_hidden_mask(content, make_dataset, options, tmp_path, capsys):
    """A run never opens it; the data doctor does, and names every one."""
    root = make_dataset()
    data = common.Data(common.parse(common.parser(""), options(data=root)))
    broken = [data.items[i].mask for i in data.indices("unlabeled")[:2]]
    for path in broken:
        if content == "garbage":
            path.write_bytes(b"garbage")
        else:
            picture = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(picture).save(path)
    message = stopped(capsys, 2, check, root, tmp_path, "--labeled", "3")
    assert "2 bad files among the masks" in message
    for path in broken:
        assert f"\n  {path.name}: " in message


# --- predict --------------------------------------------------------------------------------------

def test_predict_a_folder_at_each_images_own_size(colour, tmp_path, capsys):
    images = tmp_path / "mine"
    images.mkdir()
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 255, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(drawn).save(images / "a.png")
    Image.fromarray(rng.integers(0, 255, (20, 20), dtype=np.uint8)).save(images / "b.jpg")
    np.save(images / "c_slice_01.npy", rng.normal(size=(24, 24)).astype(np.float32))
    deep = rng.integers(0, 60000, (24, 26), dtype=np.uint16)
    Image.fromarray(deep).save(images / "d.tif")
    predict("--run", colour.folder, "--images", images, "--out", tmp_path / "out")
    sizes = {"a": (50, 30), "b": (20, 20), "c_slice_01": (24, 24), "d": (26, 24)}
    for name, size in sizes.items():
        mask = Image.open(tmp_path / "out" / "masks" / f"{name}.png")
        assert mask.size == size and mask.mode == "L" and np.max(mask) < 3
        overlay = Image.open(tmp_path / "out" / "overlays" / f"{name}.png")
        assert overlay.height == size[1] + 2 * 16  # a line of legend for each of two classes
    assert "4 of 4 images segmented by network 1" in capsys.readouterr().out


def test_predict_scales_a_volume_as_a_whole(grey, tmp_path):
    """Also if the names of its slices, sorted as text, have another volume between them.

    The overlay shows the image as the network saw it.
    """
    images, rng = tmp_path / "mine", np.random.default_rng(0)
    images.mkdir()
    volumes = [["p_slice_1", "p_slice_10", "p_slice_2"], ["p_slice_2 (copy)"]]
    values = {}
    for number, name in enumerate(sum(volumes, [])):
        values[name] = rng.normal(10 * number, 1, (24, 24))
        np.save(images / f"{name}.npy", values[name])
    predict("--run", grey.folder, "--images", images, "--out", tmp_path / "out")
    run = common.load_run(grey.folder)
    for names in volumes:
        low, high = np.percentile([values[name] for name in names], [0.5, 99.5])
        for name in names:
            scaled = ((values[name] - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)
            mask = mask_in(tmp_path / "out", name)
            assert np.array_equal(mask, common.segment(run, scaled))
            x = torch.from_numpy(scaled)[None, None] / 255
            picture = common.overlay(x, torch.from_numpy(mask)[None])[0].movedim(0, -1)
            overlay = np.array(Image.open(tmp_path / "out" / "overlays" / f"{name}.png"))
            assert np.array_equal(overlay[:24, :24], picture)


def test_predict_equals_the_networks_own_labels(colour, tmp_path):
    """The headline's, or those of the network that is named."""
    for name in ("network 1", "ensemble"):
        more = ["--images", colour.data, "--out", tmp_path / name]
        if name == "ensemble":
            more += ["--network", name]
        predict("--run", colour.folder, *more)
        assert len(list((tmp_path / name / "masks").iterdir())) == 14
    image = Image.open(colour.data / "images" / "case03.png")
    small = np.array(image.resize((32, 32), Image.BILINEAR))
    x = torch.from_numpy(small).movedim(-1, 0)[None] / 255
    run = common.load_run(colour.folder)
    with torch.no_grad():
        probs = run.predict(run.networks, x)
    masks = []
    for name in ("network 1", "ensemble"):
        expected = F.interpolate(probs[name], (40, 40), mode="bilinear").argmax(1)[0]
        masks.append(mask_in(tmp_path / name, "case03"))
        assert np.array_equal(masks[-1], expected)
    assert len(np.unique(masks[0])) > 1 and not np.array_equal(*masks)


def test_predict_from_a_copied_checkpoint_alone(colour, tmp_path):
    shutil.copy(colour.folder / "last.pt", tmp_path / "mine.pt")
    image = colour.data / "images" / "case00.png"
    predict("--run", tmp_path / "mine.pt", "--images", image, "--out", tmp_path / "copy")
    predict("--run", colour.folder, "--images", image, "--out", tmp_path / "run")
    for part in ("masks", "overlays"):
        copy, run = (tmp_path / out / part / "case00.png" for out in ("copy", "run"))
        assert copy.read_bytes() == run.read_bytes()


def test_predict_names_and_skips_what_it_cannot_read(colour, tmp_path, capsys):
    images = tmp_path / "mine"
    shutil.copytree(colour.data / "images", images)
    (images / "case05.png").write_bytes((images / "case05.png").read_bytes()[:200])
    (images / "text.jpg").write_text("hello")
    message = stopped(capsys, 1, predict, "--run", colour.folder, "--images", images,
                      "--out", tmp_path / "out")
    assert "2 files could not be read" in message
    assert "\n  case05.png: " in message and "\n  text.jpg: " in message
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 13


def test_predict_counts_the_masks_that_it_writes(grey, tmp_path, capsys):
    """Slices of 8 and of 16 bits in one volume: named; the message says what was skipped."""
    images = tmp_path / "mine"
    images.mkdir()
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(images / "p_slice_1.png")
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(images / "p_slice_2.png")
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(images / "q.png")
    with pytest.raises(SystemExit) as error:
        predict("--run", grey.folder, "--images", images, "--out", tmp_path / "out")
    assert error.value.code == 1
    out, err = capsys.readouterr()
    assert "p_slice_1.png: 8 bits, but p_slice_2.png of the same volume has more" in err
    written = len(list((tmp_path / "out" / "masks").iterdir()))
    assert f"{written} of 3 images segmented" in out


@pytest.mark.parametrize("words, message", [
    (["--run", "nowhere"], "nowhere cannot be used"), (["--images", "nowhere"], "no images there"),
    (["--network", "teacher"], "network 1, network 2, ensemble"),
    (["--run", "text.pt"], "cannot be used"), (["--device", "tpu9"], "cannot be used")])
def test_predict_with_wrong_words(colour, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("text.pt").write_text("hello")
    given = ["--run", colour.folder, "--images", colour.data, "--out", "out", *words]
    assert message in stopped(capsys, 2, run_command, "predict", *given)
    assert not Path("out").exists()


def test_predict_refuses_masks_that_it_did_not_write(colour, tmp_path, capsys):
    """A dataset's masks, say, given as --out by mistake. A second time on its own is fine."""
    mine = shutil.copytree(colour.data, tmp_path / "mine")
    before = {path: path.read_bytes() for path in mine.rglob("*.png")}
    words = ["--run", colour.folder, "--images", mine, "--out"]
    message = stopped(capsys, 2, predict, *words, mine)
    assert f"--out {mine}" in message and "predict did not write" in message
    assert {path: path.read_bytes() for path in mine.rglob("*.png")} == before
    assert not (mine / "overlays").exists()
    out = tmp_path / "out"
    predict(*words, out)
    first = mask_in(out, "case03")
    (out / "masks" / "case03.png").unlink()
    predict(*words, out)
    assert np.array_equal(mask_in(out, "case03"), first)


def test_predict_twice_into_one_folder_whatever_the_names_unicode_form(grey, tmp_path):
    image = tmp_path / "images" / f"{unicodedata.normalize('NFD', 'é')}.png"
    image.parent.mkdir()
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(image)
    for given in (image.parent, image.parent, image):
        predict("--run", grey.folder, "--images", given, "--out", tmp_path / "out")


def test_supervised_predicts_with_the_student(grey, tmp_path, capsys):
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "a.png")
    predict("--run", grey.folder, "--images", tmp_path / "a.png", "--out", tmp_path / "out")
    assert "segmented by student of" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_each_methods_run_can_be_loaded_and_predicts_what_was_scored(method, drawn, options,
                                                                      tmp_path):
    """The Dice of the masks that predict writes of test images is that of results.json."""
    results = main_of(method)(options("--lr", "0.02", steps=4))
    run = common.load_run(results["folder"])
    assert run.state["method"] == method and run.device == "cpu"
    assert set(results["networks"]) == set(run.predict(run.networks, torch.zeros(1, 1, 32, 32)))
    for network in run.networks.values():
        assert not any(module.training for module in network.modules())
    tested = tmp_path / "tested"
    tested.mkdir()
    for path in drawn.glob("images/p36_*"):
        shutil.copy(path, tested)
    predict("--run", results["folder"], "--images", tested, "--out", tmp_path / "out")
    scores = {c: [] for c in (1, 2, 3)}
    for frame in ("p36_frame01", "p36_frame02"):
        names = [path.stem for path in sorted(tested.glob(f"{frame}_*"))]
        found = np.stack([mask_in(tmp_path / "out", name) for name in names])
        truth = np.stack([mask_in(drawn, name) for name in names])
        for c, dice in scores.items():
            dice.append(200 * ((found == c) & (truth == c)).sum()
                        / ((found == c).sum() + (truth == c).sum()))
    assert np.mean(list(scores.values())) == pytest.approx(results["headline"]["dice"])


# --- load_run and segment -------------------------------------------------------------------------

def test_load_run_takes_a_folder_or_a_checkpoint(colour):
    last = torch.load(colour.folder / "last.pt", weights_only=True)
    for path in (colour.folder, str(colour.folder), colour.folder / "last.pt"):
        run = common.load_run(path)
        assert run.state["step"] == last["step"] == 16
        assert list(run.networks) == ["network 1", "network 2"]
        for name, network in run.networks.items():
            assert torch.equal(network.head.weight, last["networks"][name]["head.weight"])
    assert common.load_run(colour.folder / "best.pt").state["class_names"] == [
        "background", "lung", "heart"]


def test_load_runs_networks_are_in_evaluation_mode(colour):
    """So using them changes nothing in them."""
    run = common.load_run(colour.folder)
    for network in run.networks.values():
        assert not any(module.training for module in network.modules())
    run.predict(run.networks, torch.rand(4, 3, 32, 32))
    saved = torch.load(colour.folder / "last.pt", weights_only=True)["networks"]
    for name, network in run.networks.items():
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, saved[name][key])


def image_of(kind):
    """An image (H, W) or (H, W, 3) of 8 or 16 bits or floats, with some structure."""
    y, x = np.mgrid[:37, :52]
    values = 120 + 100 * np.sin(x / 6) * np.cos(y / 5)
    if kind == "colour":
        return np.stack([values, 0.5 * values, 255 - values], -1).astype(np.uint8)
    if kind == "16 bits":
        return (values * 200).astype(np.uint16)
    if kind == "floats":
        return (values / 1000 - 3).astype(np.float32)
    return values.astype(np.uint8)


@pytest.mark.parametrize("network", ["grey", "colour"])
def test_segment_equals_what_predict_writes(network, grey, colour, tmp_path):
    folder = {"grey": grey, "colour": colour}[network].folder
    images, masks = tmp_path / "mine", {}
    images.mkdir()
    run = common.load_run(folder)
    for kind in ("grey", "colour", "16 bits", "floats"):
        image = image_of(kind)
        if kind == "floats":
            np.save(images / f"{kind}.npy", image)
        else:
            Image.fromarray(image).save(images / f"{kind}.png")
        masks[kind] = common.segment(run, image)
        assert masks[kind].shape == (37, 52) and masks[kind].dtype == np.uint8
    predict("--run", folder, "--images", images, "--out", tmp_path / "out")
    for kind, mask in masks.items():
        assert len(np.unique(mask)) > 1
        assert np.array_equal(mask, mask_in(tmp_path / "out", kind))


def test_segment_with_another_network_of_the_run(colour, tmp_path):
    image = colour.data / "images" / "case03.png"
    run = common.load_run(colour.folder)
    for name in ("network 2", "ensemble"):
        out = tmp_path / name
        predict("--run", colour.folder, "--images", image, "--out", out, "--network", name)
        labels = common.segment(run, np.array(Image.open(image)), name)
        assert np.array_equal(labels, mask_in(out, "case03"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_checkpoint_with_weights_that_are_not_finite_is_refused(value, colour, tmp_path, capsys):
    state = torch.load(colour.folder / "last.pt", weights_only=True)
    state["networks"]["network 2"]["head.bias"][1] = value
    file = tmp_path / "bad.pt"
    torch.save(state, file)
    words = ["--run", file, "--images", colour.data, "--out", tmp_path / "out"]
    for message in (stopped(capsys, 2, predict, *words), stopped(capsys, 2, common.load_run, file)):
        assert f"{file} cannot be used" in message
        assert "head.bias of network 2 is not finite" in message


def test_a_checkpoint_imports_no_other_module(colour, tmp_path, capsys):
    """Only files beside common.py: a checkpoint from elsewhere must not choose what is run."""
    state = torch.load(colour.folder / "last.pt", weights_only=True)
    for file in ("os", "tests.ranks", "../x"):
        torch.save({**state, "file": file}, tmp_path / "bad.pt")
        message = stopped(capsys, 2, predict, "--run", tmp_path / "bad.pt",
                          "--images", colour.data, "--out", tmp_path / "out")
        assert "is not here" in message


# --- compare --------------------------------------------------------------------------------------

GAIN = "gain in Dice (95% interval)"
ARGS = {"size": 48, "width": 16, "steps": 800, "batch_size": 8, "unlabeled_batch": 8, "lr": 0.001,
        "flip": True, "rotation": 20.0, "precision": "fp32"}


def mean_of(values):
    """The mean of those that are not None; None if all are."""
    defined = [value for value in values if value is not None]
    if not defined:
        return None
    return sum(defined) / len(defined)


def fake_run(folder, method, seed, dice, *, labeled="10%", options=None, units=None, split=None,
             args=None, dataset="hearts"):
    """A finished run's results.json. dice: (volumes, classes), None where undefined.

    units: the volumes' patients; each volume is one of its own, if they are not given.
    """
    volumes = {}
    for number, row in enumerate(dice):
        scores = {}
        for c, value in enumerate(row, 1):
            scores[str(c)] = None
            if value is not None:
                scores[str(c)] = {"dice": value}
        volumes[f"v{number:02d}"] = scores
    headline = mean_of([mean_of(column) for column in zip(*dice, strict=True)])
    results = {
        "file": method, "method": method, "dataset": dataset, "labeled": labeled, "seed": seed,
        "options": options or {}, "args": ARGS | (args or {}),
        "split": {"labeled": labeled, "unlabeled": "u", "val": "v", "test": "t"} | (split or {}),
        "headline": {"network": "n", "dice": headline, "jaccard": 1.0, "hd95": 2.0, "asd": 3.0},
        "units": dict(zip(volumes, units or volumes, strict=True)),
        "networks": {"n": {"last": {"volumes": volumes}, "best": {"volumes": {}}}}}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def compare(out, *runs):
    """The rows of the table that compare writes: [{column: text}]."""
    run_command("compare", *runs, "--out", out)
    with open(out / "comparison.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers_in(gain):
    """"+1.23 (+0.45 to +2.01)" -> 1.23, 0.45, 2.01."""
    match = re.fullmatch(r"([+-]\d+\.\d\d) \(([+-]\d+\.\d\d) to ([+-]\d+\.\d\d)\)", gain)
    assert match is not None, gain
    return tuple(map(float, match.groups()))


def test_compare_means_order_and_gain(tmp_path, capsys):
    rng = np.random.default_rng(1)
    base = rng.uniform(50, 70, (2, 20, 2))
    better = base + 5 + rng.normal(0, 1, (2, 20, 2))
    full = [[90.0, 90.0]] * 20
    runs = [fake_run(tmp_path / "r1", "ucmt", 0, better[0].tolist()),
            fake_run(tmp_path / "r2", "ucmt", 1, better[1].tolist()),
            fake_run(tmp_path / "full", "supervised", 0, full, labeled="100%"),
            fake_run(tmp_path / "s1", "supervised", 1, base[1].tolist()),
            fake_run(tmp_path / "s0", "supervised", 0, base[0].tolist())]
    rows = compare(tmp_path / "out", *runs)
    assert [row["method"] for row in rows] == ["supervised", "ucmt", "supervised"]
    assert [row["labelled"] for row in rows] == ["10%", "10%", "100%"]
    assert [row["seeds"] for row in rows] == ["0 1", "0 1", "0"]
    assert rows[2]["Dice %"] == "90.00" and rows[2]["HD95 px"] == "2.00"
    means = better.mean((1, 2))
    assert rows[1]["Dice %"] == f"{means.mean():.2f} ± {means.std(ddof=1):.2f}"
    assert rows[1]["ASD px"] == "3.00 ± 0.00"
    gain = (better - base).mean()
    found, low, high = numbers_in(rows[1][GAIN])
    assert found == pytest.approx(gain, abs=0.01)
    difference = (better - base).mean((0, 2))  # paired: the volumes' differences
    spread = 1.96 * difference.std() / 20**0.5
    assert low == pytest.approx(gain - spread, abs=0.15)
    assert high == pytest.approx(gain + spread, abs=0.15)
    assert rows[0][GAIN] == rows[2][GAIN] == ""
    printed = capsys.readouterr().out
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert printed.startswith(text) and len(text.splitlines()) == 2 + 3


def test_compare_gain_is_that_of_the_headlines_with_undefined_volumes(tmp_path):
    rows = compare(
        tmp_path / "out",
        fake_run(tmp_path / "a", "supervised", 0, [[50.0, None], [60.0, 40.0], [70.0, 50.0]]),
        fake_run(tmp_path / "b", "cps", 0, [[55.0, None], [66.0, 48.0], [77.0, 50.0]]))
    gain = float(rows[1]["Dice %"]) - float(rows[0]["Dice %"])
    assert numbers_in(rows[1][GAIN])[0] == pytest.approx(gain, abs=0.011)


def test_compare_interval_leaves_undefined_samples_out(tmp_path):
    """One lesion in three images: samples without it say nothing, and do not say 0."""
    rows = compare(tmp_path / "out",
                   fake_run(tmp_path / "a", "supervised", 0, [[None], [None], [60.0]]),
                   fake_run(tmp_path / "b", "cps", 0, [[None], [None], [65.0]]))
    assert rows[1][GAIN] == "+5.00 (+5.00 to +5.00)"


def test_compare_gain_over_seeds_in_which_a_class_is_undefined(tmp_path):
    runs = []
    for method, dice in (("supervised", 40.0), ("cps", 80.0)):
        for seed, second in ((0, None), (1, 0.0)):
            runs.append(fake_run(tmp_path / f"{method}{seed}", method, seed, [[dice, second]]))
    rows = compare(tmp_path / "out", *runs)
    gain = float(rows[1]["Dice %"].split()[0]) - float(rows[0]["Dice %"].split()[0])
    assert gain == 30  # (80 + 40) / 2 - (40 + 20) / 2
    assert rows[1][GAIN].startswith("+30.00")


def test_compare_resamples_patients_not_volumes(tmp_path):
    """Gains of 0, 3 and 6 in two volumes each, which are of three patients or of six.

    Three patients: of 27 equally likely samples one has the first alone, 1/27 > 2.5%, so the
    interval ends at 0, and at 6 alike. Six: the mean of a sample is 3 + S/2, S the sum of six
    numbers out of -1, 0, 1; P(S <= -5) = 7/729 < 2.5% < 28/729 = P(S <= -4), so it ends at 1.
    """
    base, better = [[50.0]] * 6, [[50.0], [50.0], [53.0], [53.0], [56.0], [56.0]]
    found = {}
    for units in ("aabbcc", "abcdef"):
        root = tmp_path / units
        rows = compare(root / "out",
                       fake_run(root / "base", "supervised", 0, base, units=units),
                       fake_run(root / "better", "cps", 0, better, units=units))
        found[units] = rows[1][GAIN]
    assert found == {"aabbcc": "+3.00 (+0.00 to +6.00)", "abcdef": "+3.00 (+1.00 to +5.00)"}


def test_compare_weights_a_patients_volumes_alike(tmp_path):
    """A patient of three volumes counts three times: the gain is that of the headlines.

    Samples are aa, ab, ba, bb: gains of 0, 6/4, 6/4 and 6.
    """
    rows = compare(
        tmp_path / "out",
        fake_run(tmp_path / "base", "supervised", 0, [[50.0]] * 4, units="aaab"),
        fake_run(tmp_path / "better", "cps", 0, [[50.0]] * 3 + [[56.0]], units="aaab"))
    assert rows[1][GAIN] == "+1.50 (+0.00 to +6.00)"


@pytest.mark.parametrize("option, value", [
    ("size", 32), ("width", 32), ("steps", 20), ("batch_size", 4), ("lr", 0.01), ("flip", False),
    ("rotation", 0.0), ("precision", "bf16")])
def test_compare_gives_no_gain_between_other_settings_and_says_which(option, value, tmp_path):
    """Between 800 and 20 steps, say; but it does where a run of the same settings is there."""
    other = fake_run(tmp_path / "base", "supervised", 0, [[50.0]], args={option: value},
                     options={option: value})
    run = fake_run(tmp_path / "run", "cps", 0, [[60.0]])
    rows = compare(tmp_path / "out", other, run)
    [row] = [row for row in rows if row["method"].startswith("cps")]
    assert row[GAIN].startswith("labelled-only") and row[GAIN].endswith(f" {option}")
    same = fake_run(tmp_path / "same", "supervised", 1, [[58.0]])
    rows = compare(tmp_path / "out", other, run, same)
    assert [row[GAIN] for row in rows if row["method"].startswith("cps")] == [
        "+2.00 (+2.00 to +2.00)"]


@pytest.mark.parametrize("base", [
    {"split": {"labeled": "x"}}, {"split": {"unlabeled": "x"}}, {"dataset": "lungs"}])
def test_compare_gives_no_gain_between_other_splits_and_datasets(base, tmp_path):
    rows = compare(tmp_path / "out", fake_run(tmp_path / "run", "cps", 0, [[60.0]]),
                   fake_run(tmp_path / "base", "supervised", 0, [[50.0]], **base))
    [row] = [row for row in rows if row["method"] == "cps"]
    assert len(rows) == 2 and "labelled-only" in row[GAIN] and "(" not in row[GAIN]


def test_compare_without_a_labelled_only_run_says_so(tmp_path):
    rows = compare(tmp_path / "out", fake_run(tmp_path / "run", "cps", 0, [[60.0]]))
    assert [row[GAIN] for row in rows] == ["no labelled-only run"]


def test_compare_shows_both_of_two_runs_of_one_seed(tmp_path):
    rows = compare(tmp_path / "out", fake_run(tmp_path / "a", "cps", 3, [[50.0]]),
                   fake_run(tmp_path / "b", "cps", 3, [[60.0]]),
                   fake_run(tmp_path / "c", "cps", 1, [[70.0]]))
    assert [row["seeds"] for row in rows] == ["1 3 3"]
    assert rows[0]["Dice %"] == "60.00 ± 10.00"


def test_compare_tells_runs_apart_by_the_options_that_differ(tmp_path):
    runs = []
    for weight in (1, 2):
        options = {"size": 96, "weight": weight}
        runs.append(fake_run(tmp_path / str(weight), "cps", 0, [[50.0]], options=options))
    rows = compare(tmp_path / "out", *runs)
    assert [row["method"] for row in rows] == ["cps weight=1", "cps weight=2"]


def test_compare_tells_runs_apart_by_the_labelled_units(tmp_path):
    rows = compare(tmp_path / "out", fake_run(tmp_path / "a", "cps", 0, [[50.0]]),
                   fake_run(tmp_path / "b", "cps", 1, [[60.0]], split={"labeled": "x"}))
    assert sorted(row["seeds"] for row in rows) == ["0", "1"]


def test_compare_tells_runs_apart_by_settings_that_differ_by_default(tmp_path):
    """The built-in phantom has 800 steps where the same folder, given as --data, has 10000."""
    rows = compare(tmp_path / "out", fake_run(tmp_path / "a", "cps", 0, [[50.0]]),
                   fake_run(tmp_path / "b", "cps", 1, [[60.0]], args={"steps": 10000}))
    assert sorted(row["seeds"] for row in rows) == ["0", "1"]


@pytest.mark.parametrize("part", ["val", "test"])
def test_compare_refuses_other_validation_or_test_units_and_says_which(part, tmp_path, capsys):
    one = fake_run(tmp_path / "one", "cps", 0, [[50.0]])
    two = fake_run(tmp_path / "two", "cps", 1, [[50.0]], split={part: "x"})
    message = stopped(capsys, 2, compare, tmp_path / "out", one, two)
    assert str(one) in message and str(two) in message
    assert "different validation or test units" in message
    assert not (tmp_path / "out").exists()


def test_compare_allows_other_units_in_other_datasets(tmp_path):
    rows = compare(tmp_path / "out", fake_run(tmp_path / "one", "cps", 0, [[50.0]]),
                   fake_run(tmp_path / "two", "cps", 0, [[60.0]] * 2, dataset="lungs",
                            split={"val": "x", "test": "x"}))
    assert [row["dataset"] for row in rows] == ["hearts", "lungs"]


KEYS = ["method", "dataset", "labeled", "seed", "options", "args", "split", "headline", "units",
        "networks"]


def without(folder, key):
    """Take a key out of a run's results.json: the layout of an earlier version."""
    results = json.loads((folder / "results.json").read_text())
    del results[key]
    (folder / "results.json").write_text(json.dumps(results))


@pytest.mark.parametrize("bad", ["no folder", "unfinished", "half", "a list", *KEYS])
def test_compare_names_and_leaves_out_what_is_no_finished_run(bad, tmp_path, capsys):
    good = fake_run(tmp_path / "good", "cps", 0, [[50.0]])
    folder = tmp_path / "bad"
    if bad != "no folder":
        fake_run(folder, "cps", 1, [[90.0]])
    if bad == "unfinished":
        (folder / "results.json").unlink()
    elif bad == "half":
        (folder / "results.json").write_text((folder / "results.json").read_text()[:100])
    elif bad == "a list":
        (folder / "results.json").write_text("[1, 2]")
    elif bad in KEYS:
        without(folder, bad)
    rows = compare(tmp_path / "out", folder, good)
    assert f"{folder}: left out, not the folder of a finished run" in capsys.readouterr().out
    assert [row["Dice %"] for row in rows] == ["50.00"]
    message = stopped(capsys, 2, compare, tmp_path / "other", folder)
    assert "no finished run" in message and "Expected" in message


def test_compare_cannot_write(tmp_path, capsys):
    run, file = fake_run(tmp_path / "a", "cps", 0, [[50.0]]), tmp_path / "file"
    file.write_text("x")
    message = stopped(capsys, 1, run_command, "compare", run, "--out", file)
    assert "cannot be written" in message
    assert file.read_text() == "x"


def test_compare_real_runs_from_any_directory_by_results_json_alone(phantom, options, tmp_path,
                                                                    monkeypatch):
    """The dataset and all other files of the runs are gone."""
    results, copies = [], []
    for main, more in ((cps.main, []), (mean_teacher.main, ["--supervised"])):
        results.append(main(options("--lr", "0.02", *more, data=phantom, steps=4)))
        copies.append(tmp_path / "elsewhere" / results[-1]["method"])
        copies[-1].mkdir(parents=True)
        shutil.copy(Path(results[-1]["folder"], "results.json"), copies[-1])
    shutil.rmtree(phantom)
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "elsewhere")
    rows = compare(Path("out"), "cps", "supervised")
    assert [row["method"] for row in rows] == ["supervised", "cps"]
    for row, result in zip(rows, reversed(results), strict=True):
        assert row["Dice %"] == f"{result['headline']['dice']:.2f}"
    gain = results[0]["headline"]["dice"] - results[1]["headline"]["dice"]
    assert numbers_in(rows[1][GAIN])[0] == pytest.approx(gain, abs=0.011)


def picture_of(out, *logs):
    """comparison.png (H, W, 3) of runs with these texts as log.csv."""
    folders = []
    for number, text in enumerate(logs):
        folders.append(fake_run(out / f"run{number}", "cps", number, [[50.0]]))
        (folders[-1] / "log.csv").write_text(text)
    compare(out / "out", *folders)
    return np.array(Image.open(out / "out" / "comparison.png"))


def places_of(picture, number):
    """Where the line of a run's colour is: rows and columns."""
    colour = tuple(bytes.fromhex(common.LINES[number][1:]))
    return np.nonzero((picture == colour).all(2))


def test_compare_draws_validation_dice_agreement_and_uncertainty(tmp_path):
    rising = "step,agreement,lr,val_dice\n20,0.5,1,\n40,0.6,1,10\n80,0.9,1,90\n"
    level = "step,agreement,lr,val_dice\n40,0.9,1,50\n80,0.9,1,50\n"
    picture = picture_of(tmp_path, rising, level)
    assert picture.shape == (220 * 2 + 16 * 2 + 8, 640, 3)  # two diagrams, two names
    diagram = picture[:220]
    rows, columns = places_of(diagram, 0)
    assert abs(columns.min() - 335) < 4 and abs(columns.max() - 620) < 4  # step 40 of 80, to 80
    assert rows[columns < 350].min() > rows[columns > 600].max()  # upwards
    rows, columns = places_of(diagram, 1)
    assert np.ptp(rows) < 4 and abs(rows.mean() - 107) < 4  # half way between 10 and 90
    with_uncertainty = picture_of(tmp_path / "more", "step,uncertainty\n20,0.5\n40,0.25\n")
    assert with_uncertainty.shape[0] == 220 + 16 + 8


def test_a_diagram_spans_the_second_half_of_the_steps(tmp_path):
    """Else what all runs do at the start hides how they differ at the end."""
    late = "step,val_dice\n20,0\n40,70\n80,80\n"
    picture = picture_of(tmp_path, late, "step,val_dice\n20,75\n40,75\n80,75\n")[:220]
    rows, columns = places_of(picture, 0)
    assert abs(rows[columns < 300].min() - 190) < 4  # 0: along the frame, to the step that has 70
    assert abs(rows[columns > 610].min() - 24) < 8  # 80
    rows, _ = places_of(picture, 1)
    assert np.ptp(rows) < 4 and abs(rows.mean() - 107) < 4  # half way between 70 and 80


def test_compare_draws_no_agreement_and_uncertainty_of_steps_without_targets(tmp_path):
    """Labelled-only runs and contrastive_st.py's stage 1 log 0; a validation Dice of 0 is one."""
    without = "step,agreement,uncertainty,val_dice\n20,0,0,0\n40,0,0,20\n"
    staged = "step,agreement,uncertainty,val_dice\n20,0,0,30\n40,0.8,0,30\n60,0.9,0,30\n"
    picture = picture_of(tmp_path, without, staged)
    assert picture.shape[0] == 220 * 2 + 16 * 2 + 8  # no uncertainty
    assert abs(places_of(picture[:220], 0)[1].min() - 240) < 4  # from step 20 of 60
    assert not len(places_of(picture[220:440], 0)[0])
    assert places_of(picture[220:440], 1)[1].min() > 400  # from step 40 of 60


@pytest.mark.parametrize("text", [
    "garbage", "", "step,val_dice\nx,y\n", "step,val_dice\nnan,nan\n"])
def test_compare_without_a_log_says_so_and_draws_the_others(tmp_path, capsys, text):
    picture = picture_of(tmp_path, text, "step,val_dice\n40,50\n80,60\n")
    assert "run0: its log.csv is not drawn" in capsys.readouterr().out
    assert len(places_of(picture[:220], 1)[0]) > 100 and not len(places_of(picture[:220], 0)[0])


def test_compare_draws_runs_of_one_folder_name_apart(tmp_path):
    """The same method on two datasets: its folders have one name."""
    folders = []
    for dataset in ("hearts", "lungs"):
        folders.append(fake_run(tmp_path / dataset / "run", "cps", 0, [[50.0]], dataset=dataset))
        (folders[-1] / "log.csv").write_text("step,val_dice\n40,50\n80,60\n")
    (folders[1] / "log.csv").write_text("step,val_dice\n40,60\n80,50\n")
    compare(tmp_path / "out", *folders)
    picture = np.array(Image.open(tmp_path / "out" / "comparison.png"))
    assert picture.shape[0] == 220 + 16 * 2 + 8
    assert len(places_of(picture[:220], 0)[0]) > 100 and len(places_of(picture[:220], 1)[0]) > 100
