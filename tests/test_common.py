"""common.py: metrics against brute force, losses against loops, splits, files, augmentation, cache."""
import itertools
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import full_phantom
from PIL import Image

import common
from common import Data, Run, UNet, evaluate, mask_scores, parse, parser, strong, weak

# --- Metrics --------------------------------------------------------------------------------------


def brute_force(pred, truth):
    """Dice, Jaccard, HD95, ASD straight from their definitions, pixel by pixel."""
    a, b = {tuple(p) for p in np.argwhere(pred)}, {tuple(p) for p in np.argwhere(truth)}
    if not a and not b:
        return None
    diagonal = math.sqrt(sum(n * n for n in pred.shape))
    if not a or not b:
        return {"dice": 0, "jaccard": 0, "hd95": diagonal, "asd": diagonal}

    def surface(points):
        steps = [tuple(s * (k == axis) for k in range(pred.ndim)) for axis in range(pred.ndim) for s in (-1, 1)]
        return [p for p in points if any(tuple(map(sum, zip(p, s, strict=True))) not in points for s in steps)]

    to_b = [min(math.dist(p, q) for q in surface(b)) for p in surface(a)]
    to_a = [min(math.dist(p, q) for q in surface(a)) for p in surface(b)]
    return {"dice": 200 * len(a & b) / (len(a) + len(b)), "jaccard": 100 * len(a & b) / len(a | b),
            "hd95": np.percentile(to_b + to_a, 95), "asd": sum(to_b) / len(to_b)}


@pytest.mark.parametrize("shape", [(9, 7), (12, 12), (4, 6, 5), (1, 5, 5)])
def test_metrics_equal_brute_force(shape):
    rng = np.random.default_rng(0)
    for share_a, share_b in itertools.product((0, 0.05, 0.5, 0.95, 1), repeat=2):
        pred, truth = rng.random(shape) < share_a, rng.random(shape) < share_b
        expected, found = brute_force(pred, truth), mask_scores(pred, truth)
        assert found == (None if expected is None else pytest.approx(expected, rel=1e-9))


def test_metrics_by_hand():
    pred, truth = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    pred[2, 2], truth[2, 5] = True, True
    assert mask_scores(pred, truth) == {"dice": 0, "jaccard": 0, "hd95": 3, "asd": 3}
    truth[:] = False
    assert mask_scores(pred, truth)["hd95"] == pytest.approx(math.sqrt(128))  # not 0, the trap elsewhere
    assert mask_scores(truth, truth) is None


def test_metrics_far_apart_use_bounded_memory():
    truth = np.zeros((600, 600), bool)
    truth[::2, ::2] = True  # 90000 surface pixels
    pred = truth[::-1, ::-1]
    assert mask_scores(pred[:, :120], truth[:, :120])["hd95"] == math.sqrt(2)


class FakeData:
    """Two volumes of two slices; the network is given the answer as its image."""

    classes = 3

    def __init__(self, masks, predictions):
        self.masks, self.predictions = masks, predictions

    def volumes(self, part):
        return {"a": [0, 1], "b": [2, 3]}

    def truth(self, i):
        return self.masks[i]

    def load_images(self, indices):
        return torch.nn.functional.one_hot(torch.stack([self.predictions[i] for i in indices]), 3).movedim(-1, 1).float()


def test_evaluate_scores_volumes_not_slices():
    masks = np.zeros((4, 4, 4), np.uint8)
    masks[0, 0] = 1  # 4 pixels; the other slice of volume a has 1
    masks[1, 0, 0] = 1
    masks[2, 1, 1] = 2
    predictions = torch.from_numpy(masks).long().clone()
    predictions[1, 0, 0], predictions[1, 3, 3] = 0, 1  # one slice all wrong
    summary = evaluate(lambda nets, x: {"net": x}, {}, FakeData(masks, predictions), "test")["net"]
    one = summary["volumes"]["a"]["1"]
    assert one["dice"] == pytest.approx(200 * 4 / 10)  # the mean of the slices' scores would be 50
    assert summary["volumes"]["b"]["1"] is None and summary["classes"]["1"]["dice"] == one["dice"]
    assert summary["dice"] == pytest.approx((80 + 100) / 2)  # class 2 is in volume b alone
    assert summary["empty"] == {"1": {"both": 1, "missed": 0, "false": 0}, "2": {"both": 1, "missed": 0, "false": 0}}


def test_evaluate_counts_missed_and_false():
    masks = np.zeros((4, 4, 4), np.uint8)
    masks[0, 0, 0] = 1
    predictions = torch.zeros(4, 4, 4, dtype=torch.long)
    predictions[3, 2, 2] = 1
    summary = evaluate(lambda nets, x: {"net": x}, {}, FakeData(masks, predictions), "test")["net"]
    assert summary["empty"]["1"] == {"both": 0, "missed": 1, "false": 1}
    assert summary["classes"]["2"]["dice"] is None and summary["dice"] == 0
    assert summary["hd95"] == pytest.approx(math.sqrt(2 * 2 + 4 * 4 + 4 * 4))


def test_evaluating_gives_every_network_its_mode_back():
    a, b = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2).eval()
    with pytest.raises(MemoryError), common.evaluating({"a": a, "b": b}):
        assert not a.training and not b.training and not torch.is_grad_enabled()
        raise MemoryError
    assert a.training and not b.training and torch.is_grad_enabled()


@pytest.mark.parametrize("dice, scored", [((10, 20), 1), ((20, 10), 2)])
def test_the_best_checkpoint_is_scored_unless_it_is_the_last(options, monkeypatch, capsys, dice, scored):
    import mean_teacher
    parts, values, real = [], list(dice), common.evaluate

    def spy(predict, networks, data, part, distances=True):
        parts.append(part)
        results = real(predict, networks, data, part, distances)
        if part == "val":
            results["teacher"]["dice"] = values.pop(0)
        return results
    monkeypatch.setattr(common, "evaluate", spy)
    results = mean_teacher.main(options("phantom", "--val-every", "2", steps=4))
    assert parts == ["val", "val"] + ["test"] * scored and results["best_step"] == (4 if scored == 1 else 2)
    best, last = (results["networks"]["teacher"][k] for k in ("best", "last"))
    assert (best == last or scored == 2) and capsys.readouterr().out.count("headline") == 1


# --- Formulas -------------------------------------------------------------------------------------


def test_supervised_loss_naive_loop():
    logits, y = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    probs, ce, dice = logits.softmax(1), 0.0, 0.0
    for b in range(2):
        for c in range(3):
            overlap = sum(probs[b, c, i, j].item() for i in range(4) for j in range(5) if y[b, i, j] == c)
            total = probs[b, c].sum().item() + (y[b] == c).sum().item()
            dice += (1 - (2 * overlap + 1e-5) / (total + 1e-5)) / 6
        ce -= sum(probs[b, y[b, i, j], i, j].log().item() for i in range(4) for j in range(5)) / 40
    assert common.supervised_loss(logits, y).item() == pytest.approx(0.5 * ce + 0.5 * dice, rel=1e-5)
    sure = 60 * torch.nn.functional.one_hot(y, 3).movedim(-1, 1).float()
    assert common.supervised_loss(sure, y).item() == pytest.approx(0, abs=1e-6)


def test_schedules():
    assert common.ramp_up(0, 10) == pytest.approx(math.exp(-5)) and common.ramp_up(5, 10) == math.exp(-1.25)
    assert common.ramp_up(10, 10) == common.ramp_up(99, 10) == common.ramp_up(0, 0) == 1
    assert common.poly_decay(0, 10) == 1 and common.poly_decay(5, 10) == 0.5**0.9


def test_unet_shapes_and_empty_batch():
    net, x = UNet(3, 5, 4), torch.rand(2, 3, 48, 32)
    features = net.encoder(x)
    assert [tuple(f.shape[1:]) for f in features] == [(4 * 2**i, 48 // 2**i, 32 // 2**i) for i in range(5)]
    assert [tuple(f.shape[1:]) for f in net.decoder(features)] == [(4 * 2**i, 48 // 2**i, 32 // 2**i) for i in (3, 2, 1, 0)]
    assert net(x).shape == (2, 5, 48, 32) and net(x[:0]).shape == (0, 5, 48, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net(x).dtype == torch.float32


# --- Augmentation ---------------------------------------------------------------------------------


def test_weak_moves_image_and_maps_together():
    torch.manual_seed(0)
    label = torch.zeros(64, 32, 32, dtype=torch.uint8)
    label[:, 6:14, 10:26] = 200
    image = label[:, None].float() / 200
    x, moved, again = weak(image, label, label.long())
    assert moved.dtype == torch.uint8 and set(moved.unique().tolist()) == {0, 200}
    assert torch.equal(again, moved.long())
    assert ((x[:, 0] > 0.5) == (moved == 200)).float().mean() > 0.99
    assert ((x[:, 0] > 0.5) != (image[:, 0] > 0.5)).flatten(1).any(1).float().mean() > 0.9  # it does move
    areas = (moved == 200).float().sum((1, 2)) / 128
    assert 0.6 < areas.min() < 0.75 and 1.3 < areas.max() < 1.65  # zoom 0.8 to 1.25, squared


def test_weak_without_flip_keeps_left_left():
    torch.manual_seed(0)
    label = torch.zeros(64, 32, 32, dtype=torch.long)
    label[:, 12:20, 2:10] = 1
    image = label[:, None].float()
    side = weak(image, label, flip=False)[1][:, :, :16].sum((1, 2)) > 0
    assert side.all() and not (weak(image, label)[1][:, :, :16].sum((1, 2)) > 0).all()
    assert weak(image[:0])[0].shape == (0, 1, 32, 32)


def test_strong_changes_intensities_not_places():
    torch.manual_seed(0)
    x = torch.full((32, 1, 32, 32), 0.2)
    x[:, :, 8:24, 8:24] = 0.8
    y = strong(x)
    assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1
    means = y.mean((1, 2, 3))
    assert means.std() > 0.05  # drawn for each image
    inner, outer = y[:, :, 10:22, 10:22].mean((1, 2, 3)), y[:, :, :6].mean((1, 2, 3))
    assert (inner > outer + 0.05).all()
    assert strong(x[:0]).shape == (0, 1, 32, 32)


def test_shuffled_is_endless_and_fair():
    stream = common.shuffled([3, 5, 7, 9, 11], seed=1)
    epochs = [[next(stream) for _ in range(5)] for _ in range(20)]
    assert all(sorted(epoch) == [3, 5, 7, 9, 11] for epoch in epochs) and len(set(map(tuple, epochs))) > 10
    again, other = (list(itertools.islice(common.shuffled([3, 5, 7, 9, 11], seed), 100)) for seed in (1, 2))
    assert again == sum(epochs, []) != other


# --- Splits ---------------------------------------------------------------------------------------


def split_of(names, masked=None, lists=None, labeled="10%", seed=0):
    return common.make_split(names, names if masked is None else masked, lists or {}, labeled, seed)


def test_split_is_nested_seeded_and_independent_of_order():
    names = [f"p{u:03d}_slice_{s}" for u in range(100) for s in range(3)]
    splits = {spec: split_of(names, labeled=spec) for spec in ("5%", "10%", "20%", "7", "100%")}
    assert [len(splits["10%"][k]) for k in ("labeled", "unlabeled", "val", "test")] == [7, 63, 10, 20]
    assert set(splits["5%"]["labeled"]) < set(splits["10%"]["labeled"]) < set(splits["20%"]["labeled"])
    assert splits["7"] == splits["10%"] and len(splits["5%"]["labeled"]) == 4
    assert not splits["100%"]["unlabeled"]
    assert split_of(names[::-1]) == splits["10%"] and split_of(names, seed=1) != splits["10%"]
    for split in splits.values():
        assert sorted(sum(split.values(), [])) == sorted({n[:4] for n in names})  # every patient once


def test_split_draws_validation_and_test_from_units_with_masks():
    names = [f"im{i:02d}" for i in range(40)]
    split = split_of(names, masked=names[:10], labeled=None)
    assert len(split["val"]) == 1 and len(split["test"]) == 2 and len(split["labeled"]) == 7
    assert set(split["val"] + split["test"]) < set(names[:10]) and set(names[10:]) == set(split["unlabeled"])


def test_split_from_lists():
    names = [f"im{i:02d}" for i in range(20)]
    lists = {"train": names[:10], "val": names[10:12], "test": names[12:14]}
    split = split_of(names, lists=lists, labeled="5")
    assert split["val"] == names[10:12] and sorted(split["labeled"] + split["unlabeled"]) == names[:10]
    part = split_of(names, lists={"test": names[:4]}, labeled="5")
    assert part["test"] == names[:4] and len(part["val"]) == 2 and len(part["labeled"] + part["unlabeled"]) == 14


def test_split_ignores_the_order_of_the_file_system(make_dataset, options, monkeypatch):
    root = make_dataset(units=12, slices=2)
    first = Data(parse(parser(""), options(root)))
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(listed(self))))
    second = Data(parse(parser(""), options(root)))
    assert first.names == second.names and first.split == second.split


def test_names_of_slices():
    assert common.parse_name("patient001_frame01_slice_03") == ("patient001", "patient001_frame01", 3)
    assert common.parse_name("p_slice12") == ("p", "p", 12)
    assert common.parse_name("ISIC_0000001") == ("ISIC_0000001", "ISIC_0000001", -1)


def test_slices_are_stacked_by_number(tmp_path, options):
    root = tmp_path / "stack"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
        for p in range(4):
            for s in (10, 9, 1, 2):
                Image.fromarray(np.full((16, 16), s if part == "images" else 1, np.uint8)).save(root / part / f"p{p}_slice_{s}.png")
    data = Data(parse(parser(""), options(root, "--labeled", "1")))
    data.decode()
    indices = data.volumes("test")[data.split["test"][0]]
    assert [int(data.images[i].max()) for i in indices] == [1, 2, 9, 10]


# --- Files ----------------------------------------------------------------------------------------


def test_images_of_every_kind(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    colour = np.stack([grey, grey[::-1], grey.T], -1)
    files = {"a.png": grey, "b.png": colour, "c.bmp": grey, "d.tif": grey, "e.gif": grey, "f.npy": grey}
    for name, array in files.items():
        np.save(tmp_path / name, array) if name.endswith("npy") else Image.fromarray(array).save(tmp_path / name)
        pixels = common.read_pixels(tmp_path / name)
        assert np.array_equal(pixels if pixels.ndim == array.ndim else pixels[..., 0], array), name
    Image.fromarray(np.dstack([colour, grey])).save(tmp_path / "rgba.png")
    assert np.array_equal(common.read_pixels(tmp_path / "rgba.png"), colour)
    Image.fromarray(grey > 100).save(tmp_path / "bit.png")
    assert np.array_equal(common.read_pixels(tmp_path / "bit.png"), (grey > 100) * 255)
    Image.fromarray(colour).quantize(200).save(tmp_path / "palette.png")
    assert common.read_pixels(tmp_path / "palette.png").shape == (8, 8, 3)


def test_deep_images_are_scaled_by_their_volume(tmp_path):
    dark, bright = np.linspace(0, 1000, 256).reshape(16, 16), np.linspace(1000, 4000, 256).reshape(16, 16)
    for name, array in (("a", dark), ("b", bright)):
        Image.fromarray(array.astype(np.uint16)).save(tmp_path / f"{name}.png")
        np.save(tmp_path / f"{name}.npy", array.astype(np.float32))
    for ending in ("png", "npy"):
        a, b = common.read_volume([tmp_path / f"{name}.{ending}" for name in "ab"], []).values()
        assert a.dtype == np.uint8 and a.max() <= b.min() + 1  # one scale for both
        assert a.min() == 0 and b.max() == 255
        assert common.read_volume([tmp_path / f"a.{ending}"], [])[tmp_path / f"a.{ending}"].max() == 255


def test_masks_of_every_kind(tmp_path):
    classes = np.zeros((8, 8), np.uint8)
    classes[2:4], classes[5:7] = 1, 2
    binary, noise = np.minimum(classes, 1), np.random.default_rng(0).integers(0, 9, (8, 8))
    palette = Image.fromarray(classes)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    white = Image.fromarray(1 - binary)  # index 0 is white: the colours count
    white.putpalette([255, 255, 255, 0, 0, 0])
    cases = {
        "classes.png": (Image.fromarray(classes), classes, "classes"),
        "binary.png": (Image.fromarray(binary * np.uint8(255)), binary, "binary"),
        "bit.png": (Image.fromarray(binary > 0), binary, "binary"),
        "palette.png": (palette, classes, "classes"),
        "white.png": (white, binary, "binary"),
        "rgb.png": (Image.fromarray(np.stack([binary * 255] * 3, -1).astype(np.uint8)), binary, "binary"),
        "noisy.png": (Image.fromarray((binary * 240 + noise).astype(np.uint8)), binary, "binary"),
        "deep.png": (Image.fromarray(classes.astype(np.uint16)), classes, "classes"),
        "empty.png": (Image.fromarray(0 * classes), 0 * classes, "empty"),
    }
    for name, (image, expected, kind) in cases.items():
        image.save(tmp_path / name)
        mask, found = common.read_mask(tmp_path / name)
        assert np.array_equal(mask, expected) and found == kind and mask.dtype == np.uint8, name
    big = np.kron(binary, np.ones((8, 8), np.uint8))
    Image.fromarray(big * np.uint8(255)).save(tmp_path / "lossy.jpg", quality=60)
    assert (common.read_mask(tmp_path / "lossy.jpg")[0] != big).mean() < 0.01
    np.save(tmp_path / "float.npy", classes.astype(float))
    assert np.array_equal(common.read_mask(tmp_path / "float.npy")[0], classes)


def test_validation_reads_masks_at_their_own_size(make_dataset, options):
    root = make_dataset(size=50)
    data = Data(parse(parser(""), options(root)))
    data.decode()
    i = data.indices("test")[0]
    assert data.truth(i).shape == (50, 50) and data.images.shape == (14, 1, 32, 32)
    assert np.array_equal(data.truth(i), np.asarray(Image.open(root / "masks" / f"{data.names[i]}.png")))


def test_images_that_are_not_square(make_dataset, options):
    root = make_dataset()
    for path in root.glob("*/*.png"):
        Image.open(path).resize((40, 24), Image.NEAREST).save(path)
    data = Data(parse(parser(""), options(root)))
    data.decode()
    assert set(data.sizes) == {(24, 40)} and data.truth(0).shape == (24, 40) and data.images.shape[2:] == (32, 32)
    scores = evaluate(lambda nets, x: {"net": torch.rand(len(x), 3, 32, 32)}, {}, data, "test")
    assert 0 < scores["net"]["dice"] < 60


def test_cache_is_used_renewed_and_whole(make_dataset, options, tmp_path, monkeypatch):
    root, args = make_dataset(), None

    def decoded():
        calls.clear()
        data = Data(parse(parser(""), options(root)))
        data.decode()
        return data

    calls, read = [], common.read_pixels
    monkeypatch.setattr(common, "read_pixels", lambda *a, **k: calls.append(a) or read(*a, **k))
    first = decoded()
    assert calls and isinstance(first.images, np.memmap) and isinstance(first.labels, np.memmap)
    before = first.images.copy()
    assert np.array_equal(decoded().images, before) and not calls  # the second start reads no image
    path = root / "images" / f"{first.names[0]}.png"
    Image.fromarray(np.full((32, 32), 9, np.uint8)).save(path)
    os.utime(path, (time.time() + 5, time.time() + 5))
    assert (decoded().images[0] == 9).all()
    assert not list((tmp_path / "cache").glob("building-*")), args


@pytest.mark.parametrize("left", [0, 1000])
def test_cache_that_lost_its_end_says_so(make_dataset, options, tmp_path, capsys, left):
    root = make_dataset()
    Data(parse(parser(""), options(root))).decode()
    for path in (tmp_path / "cache").iterdir():
        os.truncate(path, left)
    with pytest.raises(SystemExit) as stopped:
        Data(parse(parser(""), options(root))).decode()
    assert stopped.value.code == 2 and "--cache FOLDER, or delete that one" in capsys.readouterr().err


def test_cache_that_fails_leaves_nothing(make_dataset, options, tmp_path, monkeypatch, capsys):
    resize, calls = Image.Image.resize, []

    def full(image, *more):
        calls.append(image)
        if len(calls) == 5:
            raise OSError("No space left on device")
        return resize(image, *more)
    monkeypatch.setattr(Image.Image, "resize", full)
    with pytest.raises(SystemExit) as stopped:
        Data(parse(parser(""), options(make_dataset()))).decode()
    assert stopped.value.code == 2 and "No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "cache").iterdir())


def test_two_builders_of_one_cache(make_dataset, options, tmp_path, monkeypatch):
    replace, others = os.replace, []

    def slow(*arguments):
        if not others:
            others.append(Data(parse(parser(""), options(tmp_path / "set"))))
            others[0].decode()  # the other run, which is faster
        replace(*arguments)
    monkeypatch.setattr(os, "replace", slow)
    data = Data(parse(parser(""), options(make_dataset())))
    data.decode()
    assert np.array_equal(data.images, others[0].images) and np.array_equal(data.labels, others[0].labels)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # images, masks, nothing half built


def test_phantom_as_files_is_the_phantom(tmp_path, options, capsys, monkeypatch):
    monkeypatch.setattr(common, "phantom", full_phantom)
    common.main(["phantom", "--out", str(tmp_path / "ph"), "--size", "32"])
    memory = Data(parse(parser(""), options()))
    files = Data(parse(parser(""), options(tmp_path / "ph")))
    for data in (memory, files):
        data.decode()
    assert memory.split == files.split and np.array_equal(memory.images, files.images)
    assert np.array_equal(memory.labels, files.labels) and memory.classes == files.classes == 4
    start = time.perf_counter()
    full_phantom(64)
    assert time.perf_counter() - start < 4  # two seconds on a quiet machine


def test_check_reports_a_dataset(make_dataset, options, tmp_path, capsys):
    root = make_dataset(units=12, slices=2)
    common.main(["check", *options(root)])
    out = capsys.readouterr().out
    assert "24 images, 24 with masks, 12 units" in out and "unit p00, volume p00_frame01" in out
    assert "no problem found" in out and Image.open(tmp_path / "runs" / "set" / "check.png").size[0] > 300


# --- Run folder -----------------------------------------------------------------------------------


def test_two_runs_never_share_a_folder(options, tmp_path):
    args = parse(parser(""), options())
    folders = [Run("x", args, Data(args)).folder.name for _ in range(3)]
    assert folders == [f"x-3-seed0-batch_size_2-size_32-steps_4-unlabeled_batch_2-width_4{s}" for s in ("", "-2", "-3")]
    saved = json.loads((tmp_path / "runs" / "phantom" / folders[0] / "args.json").read_text())
    assert saved["steps"] == 4 and saved["precision"] == "fp32" and saved["device"] == "cpu"


def test_runs_from_two_files_of_one_name_have_two_folders(options):
    names = set()
    for init in ("a/last.pt", "b/last.pt", "/x:y\\z"):
        args = parse(parser(""), options())
        args.options = {"init": init}
        names.add(Run("x", args, Data(args)).folder.name)
    assert names == {"x-3-seed0-init_a_last.pt", "x-3-seed0-init_b_last.pt", "x-3-seed0-init__x_y_z"}


def test_checkpoint_is_whole_or_old(tmp_path):
    path = tmp_path / "last.pt"
    common.write_aside(path, lambda p: torch.save({"step": 1}, p))

    def killed(p):
        p.write_bytes(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        common.write_aside(path, killed)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_a_term_that_is_not_finite_stops_the_run(options, tmp_path, capsys):
    args = parse(parser(""), options("phantom", "--val-every", "4"))
    run = Run("x", args, Data(args))
    net = UNet(1, 4, 4)
    run.keep({"net": net}, [], lambda nets, x: {"net": nets["net"](x).softmax(1)}, None)
    with pytest.raises(SystemExit) as stopped:
        for step in run.steps():
            run.log(loss=1.0, cons=torch.tensor(float("nan" if step == 2 else 0)))
            run.save(step)
    assert stopped.value.code == 1 and "cons is nan between steps 0 and 4" in capsys.readouterr().err
    assert not (run.folder / "last.pt").exists()


def test_a_batch_carries_indices_and_maps(options):
    args = parse(parser(""), options())
    data = Data(args)
    data.decode()
    maps = np.zeros(data.images[:, 0].shape, np.uint8) + np.arange(len(data.names), dtype=np.uint8)[:, None, None] % 250 + 1
    x_l, y_l, x_u, map_u, index_u = data.batch(maps)
    assert x_l.shape == (2, 1, 32, 32) and y_l.shape == (2, 32, 32) and y_l.dtype == torch.long
    for i, m in zip(index_u, map_u, strict=True):
        assert data.units[i] in data.split["unlabeled"] and set(m.unique().tolist()) <= {0, int(i) % 250 + 1}
    assert data.batch()[3] is None and 0 <= x_u.min() and x_u.max() <= 1
