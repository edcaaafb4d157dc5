"""The course part of common.py: its contents, metrics, formulas, U-Net, augmentation, batches."""
import ast
import itertools
import math
import re
import time
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.nn import functional as F

import common
from common import Data, UNet, evaluate, mask_scores, parse, parser, strong, weak

# --- Table of contents ----------------------------------------------------------------------------


def listed_sections():
    """The docstring's table of contents: [(title, names)], as it reads."""
    table = common.__doc__.split("Course part", 1)[1].split("\n\n", 1)[0]
    table = re.sub(r"^Tools  ", "       ", table, flags=re.MULTILINE)
    entries = re.split(r"\n|\s{3,}", table)
    sections = []
    for entry in filter(None, map(str.strip, entries)):
        title, names = entry.split(": ")
        sections.append((title, names.split()))
    return sections


def found_sections():
    """The file's sections: [(the line `# --- Title` without its dashes, names defined there)]."""
    text = (ROOT / "common.py").read_text(encoding="utf-8")
    lines = {}  # {line number: title}
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("# --- "):
            lines[number] = line.strip("#- ")
    names = {number: [] for number in lines}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[max(number for number in lines if number < node.lineno)].append(node.name)
    return [(title, names[number]) for number, title in lines.items()]


def test_the_table_of_contents_is_true():
    listed, found = listed_sections(), found_sections()
    assert len(listed) == len(found) > 15
    for (title, names), (line, defined) in zip(listed, found, strict=True):
        assert re.match(rf"{title}\b", line), f"{title} is listed where the file has {line}"
        assert names, title
        for name in names:
            assert name in defined, f"{name} is not in section {title}"


# --- Metrics --------------------------------------------------------------------------------------


def surface_of(points, dimensions):
    """The points, tuples, that have a neighbour which is none of them."""
    steps = []
    for axis, sign in itertools.product(range(dimensions), (-1, 1)):
        step = [0] * dimensions
        step[axis] = sign
        steps.append(step)
    surface = []
    for point in points:
        neighbours = {tuple(map(sum, zip(point, step, strict=True))) for step in steps}
        if not neighbours <= points:
            surface.append(point)
    return surface


def nearest_distances(points, targets):
    """For each of the points the distance to the nearest of the targets."""
    return [min(math.dist(point, target) for target in targets) for point in points]


def brute_force(pred, truth):
    """Dice, Jaccard, HD95, ASD straight from their definitions, pixel by pixel."""
    a, b = {tuple(p) for p in np.argwhere(pred)}, {tuple(p) for p in np.argwhere(truth)}
    if not a and not b:
        return None
    if not a or not b:
        diagonal = math.sqrt(sum(n * n for n in pred.shape))
        empty = "truth" if a else "prediction"
        return {"dice": 0, "jaccard": 0, "hd95": diagonal, "asd": diagonal, "empty": empty}
    surface_a, surface_b = surface_of(a, pred.ndim), surface_of(b, pred.ndim)
    to_b = nearest_distances(surface_a, surface_b)
    to_a = nearest_distances(surface_b, surface_a)
    return {"dice": 200 * len(a & b) / (len(a) + len(b)), "jaccard": 100 * len(a & b) / len(a | b),
            "hd95": np.percentile(to_b + to_a, 95), "asd": sum(to_b) / len(to_b)}


@pytest.mark.parametrize("shape", [(9, 7), (12, 12), (4, 6, 5), (1, 5, 5)])
def test_metrics_equal_brute_force(shape):
    rng = np.random.default_rng(0)
    for share_a, share_b in itertools.product((0, 0.05, 0.5, 0.95, 1), repeat=2):
        pred, truth = rng.random(shape) < share_a, rng.random(shape) < share_b
        expected, found = brute_force(pred, truth), mask_scores(pred, truth)
        if expected is None:
            assert found is None
            continue
        assert found.pop("empty", None) == expected.pop("empty", None)
        assert found == pytest.approx(expected, rel=1e-9)


def test_metrics_by_hand():
    pred, truth = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    pred[2, 2], truth[2, 5] = True, True
    assert mask_scores(pred, truth) == {"dice": 0, "jaccard": 0, "hd95": 3, "asd": 3}
    assert mask_scores(pred, truth, distances=False) == {"dice": 0, "jaccard": 0}
    truth[:] = False
    scores = mask_scores(pred, truth)
    assert scores["hd95"] == pytest.approx(math.sqrt(128))  # not 0, the trap elsewhere
    assert scores["empty"] == "truth" and mask_scores(truth, pred)["empty"] == "prediction"
    overlaps = mask_scores(pred, truth, distances=False)
    assert overlaps == {"dice": 0, "jaccard": 0, "empty": "truth"}
    assert mask_scores(truth, truth) is None


def test_metrics_far_apart_use_bounded_memory():
    truth = np.zeros((600, 600), bool)
    truth[::2, ::2] = True  # 90000 surface pixels
    pred = truth[::-1, ::-1]
    tracemalloc.start()
    scores = mask_scores(pred, truth)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert scores["hd95"] == math.sqrt(2)
    assert peak < 200e6  # all points with a row of 600 pixels each would take 880e6 bytes


def test_distances_equal_brute_force_in_3d():
    rng = np.random.default_rng(0)
    for _ in range(30):
        size = rng.integers(1, 12, 3)
        target, points = (rng.integers(0, size, (rng.integers(1, 40), 3)) for _ in range(2))
        points = points + rng.integers(-20, 20, 3)  # their boxes overlap, or do not
        found = common.distances_to(target, points)
        assert found == pytest.approx(nearest_distances(points, target), rel=1e-12)


def test_distances_take_time_in_proportion_to_slices():
    rng = np.random.default_rng(0)
    seconds = {}
    for slices in (10, 80):
        target = np.argwhere(rng.random((slices, 64, 64)) < 0.05)
        points = np.argwhere(rng.random((slices, 64, 64)) < 0.05)
        times = []
        for _ in range(3):
            start = time.process_time()
            common.distances_to(target, points)
            times.append(time.process_time() - start)
        seconds[slices] = min(times)
    assert seconds[80] < 3 * 8 * seconds[10]  # each slice with each: 64 times as much


class FakeData:
    """Two volumes of two slices; the network is given the answer as its image."""

    classes = 3

    def __init__(self, masks, predictions):
        self.masks, self.predictions = masks, predictions
        self.sizes = [mask.shape for mask in masks]

    def volumes(self, part):
        return {"a": [0, 1], "b": [2, 3]}

    def truth(self, i):
        return self.masks[i]

    def load_images(self, indices):
        return F.one_hot(self.predictions[indices], 3).movedim(-1, 1).float()


def echo(networks, x):
    """A predict whose probabilities are the image."""
    return {"net": x}


def test_evaluate_scores_volumes_not_slices():
    masks = np.zeros((4, 4, 4), np.uint8)
    masks[0, 0] = 1  # 4 pixels; the other slice of volume a has 1
    masks[1, 0, 0] = 1
    masks[2, 1, 1] = 2
    predictions = torch.from_numpy(masks).long().clone()
    predictions[1, 0, 0], predictions[1, 3, 3] = 0, 1  # one slice all wrong
    summary = evaluate(echo, {}, FakeData(masks, predictions), "test")["net"]
    one = summary["volumes"]["a"]["1"]
    assert one["dice"] == pytest.approx(200 * 4 / 10)  # the mean of the slices' scores would be 50
    assert summary["volumes"]["b"]["1"] is None
    assert summary["classes"]["1"]["dice"] == one["dice"]
    assert summary["dice"] == pytest.approx((80 + 100) / 2)  # class 2 is in volume b alone
    assert summary["empty"] == {"1": {"both": 1, "prediction": 0, "truth": 0},
                                "2": {"both": 1, "prediction": 0, "truth": 0}}


def test_evaluate_counts_missed_and_invented():
    masks = np.zeros((4, 4, 4), np.uint8)
    masks[0, 0, 0] = 1
    predictions = torch.zeros(4, 4, 4, dtype=torch.long)
    predictions[3, 2, 2] = 1
    summary = evaluate(echo, {}, FakeData(masks, predictions), "test")["net"]
    assert summary["empty"]["1"] == {"both": 0, "prediction": 1, "truth": 1}
    assert summary["classes"]["2"]["dice"] is None and summary["dice"] == 0
    assert summary["hd95"] == pytest.approx(math.sqrt(2 * 2 + 4 * 4 + 4 * 4))


def test_evaluate_without_distances_has_the_overlaps_alone():
    masks = np.ones((4, 4, 4), np.uint8)
    fake = FakeData(masks, torch.from_numpy(masks).long())
    summary = evaluate(echo, {}, fake, "val", distances=False)["net"]
    assert summary["dice"] == summary["jaccard"] == 100
    assert summary["hd95"] is None and summary["asd"] is None


def test_evaluating_gives_every_network_its_mode_back():
    a, b = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2).eval()
    with pytest.raises(MemoryError), common.evaluating({"a": a, "b": b}):
        assert not a.training and not b.training and not torch.is_grad_enabled()
        raise MemoryError
    assert a.training and not b.training and torch.is_grad_enabled()


# --- Formulas and U-Net ---------------------------------------------------------------------------


def test_supervised_loss_naive_loop():
    logits, y = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    probs, ce, dice = logits.softmax(1), 0.0, 0.0
    pixels = list(itertools.product(range(4), range(5)))
    for b in range(2):
        for c in range(3):
            overlap = sum(probs[b, c, i, j].item() for i, j in pixels if y[b, i, j] == c)
            total = probs[b, c].sum().item() + (y[b] == c).sum().item()
            dice += (1 - (2 * overlap + 1e-5) / (total + 1e-5)) / 6
        ce -= sum(probs[b, y[b, i, j], i, j].log().item() for i, j in pixels) / 40
    loss = common.supervised_loss(logits, y).item()
    assert loss == pytest.approx(0.5 * ce + 0.5 * dice, rel=1e-5)
    sure = 60 * F.one_hot(y, 3).movedim(-1, 1).float()
    assert common.supervised_loss(sure, y).item() == pytest.approx(0, abs=1e-6)


def test_schedules():
    assert common.ramp_up(0, 10) == pytest.approx(math.exp(-5))
    assert common.ramp_up(5, 10) == math.exp(-1.25)
    assert common.ramp_up(10, 10) == common.ramp_up(99, 10) == common.ramp_up(0, 0) == 1
    assert common.poly_decay(0, 10) == 1 and common.poly_decay(5, 10) == 0.5**0.9


def test_set_lr_sets_every_group():
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [w]} for w in weights], lr=1)
    assert common.set_lr(optimizer, 0.25) == 0.25
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_unet_shapes_and_empty_batch():
    net, x = UNet(3, 5, 4), torch.rand(2, 3, 48, 32)
    features = net.encoder(x)
    shapes = [(4 * 2**i, 48 // 2**i, 32 // 2**i) for i in range(5)]
    assert [tuple(f.shape[1:]) for f in features] == shapes
    assert [tuple(f.shape[1:]) for f in net.decoder(features)] == shapes[3::-1]
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
    differs = ((x[:, 0] > 0.5) != (image[:, 0] > 0.5)).flatten(1).any(1)
    assert differs.float().mean() > 0.9  # it does move
    areas = (moved == 200).float().sum((1, 2)) / 128
    assert 0.45 < areas.min() < 0.6 and 1.6 < areas.max() < 2.1  # zoom 1/1.4 to 1.4, squared


def test_weak_shifts_by_up_to_a_tenth_of_the_side():
    torch.manual_seed(0)
    image = torch.zeros(256, 1, 40, 80)
    image[:, :, 19:21, 39:41] = 1  # in the middle, which neither zoom nor rotation moves
    [moved] = weak(image, flip=False, rotation=0)
    total = moved.sum((1, 2, 3))
    x = (moved.sum((1, 2)) * (torch.arange(80) + 0.5)).sum(1) / total - 40
    y = (moved.sum((1, 3)) * (torch.arange(40) + 0.5)).sum(1) / total - 20
    zoom = (total / 4).sqrt()  # the content is enlarged after it is shifted
    for shift, side in ((x / zoom, 80), (y / zoom, 40)):
        share = shift / side
        assert -0.115 < share.min() < -0.08 and 0.08 < share.max() < 0.115
        assert abs(share.mean()) < 0.02


def test_weak_without_flip_keeps_left_left():
    torch.manual_seed(0)
    label = torch.zeros(64, 32, 32, dtype=torch.long)
    label[:, 12:20, 2:10] = 1
    image = label[:, None].float()
    side = weak(image, label, flip=False, rotation=20)[1][:, :, :16].sum((1, 2)) > 0
    mirrored = weak(image, label, rotation=20)[1][:, :, :16].sum((1, 2)) > 0
    assert side.all() and not mirrored.all()
    assert weak(image[:0])[0].shape == (0, 1, 32, 32)


def test_weak_turns_by_up_to_the_rotation():
    torch.manual_seed(0)
    label = torch.zeros(64, 64, 64, dtype=torch.long)
    label[:, 30:34] = 1  # a level bar, which stays level without a rotation
    image = label[:, None].float()
    slopes = {}
    for rotation in (0, 30):
        [moved] = weak(image, flip=False, rotation=rotation)
        height = torch.arange(64.0)[:, None]
        left, right = moved[:, 0, :, 22:26], moved[:, 0, :, 38:42]
        y_left = (left * height).sum((1, 2)) / left.sum((1, 2))
        y_right = (right * height).sum((1, 2)) / right.sum((1, 2))
        slopes[rotation] = ((y_right - y_left) / 16).atan().rad2deg().abs()
    assert slopes[0].max() < 0.01
    assert 25 < slopes[30].max() < 31


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


# --- Data and batches -----------------------------------------------------------------------------


def test_shuffled_is_endless_and_fair():
    stream = common.shuffled([3, 5, 7, 9, 11], seed=1)
    epochs = [list(itertools.islice(stream, 5)) for _ in range(20)]
    assert all(sorted(epoch) == [3, 5, 7, 9, 11] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 10
    again = list(itertools.islice(common.shuffled([3, 5, 7, 9, 11], 1), 100))
    other = list(itertools.islice(common.shuffled([3, 5, 7, 9, 11], 2), 100))
    assert again == sum(epochs, []) != other


def test_data_is_complete_and_shows_no_hidden_mask(options):
    data = Data(parse(parser(""), options()))
    parts = {part: data.indices(part) for part in ("labeled", "unlabeled", "val", "test")}
    assert data.split == parts
    assert sorted(sum(parts.values(), [])) == list(range(64))  # 8 patients of 8 slices
    assert list(map(len, parts.values())) == [24, 24, 8, 8]
    assert sorted(data.labels) == sorted(parts["labeled"] + parts["val"] + parts["test"])
    assert data.units("val") == ["p30"] and list(data.volumes("test")) == ["p36_frame01",
                                                                         "p36_frame02"]
    assert data.images.shape == (64, 1, 32, 32) and data.images.dtype == torch.uint8
    assert data.sizes == [(32, 32)] * 64
    assert (data.channels, data.classes, data.binary) == (1, 4, False)
    assert data.class_names == ["background", "class 1", "class 2", "class 3"]


def test_images_and_labels_are_those_of_their_numbers(options, drawn):
    data = Data(parse(parser(""), options()))
    chosen = data.indices("val")[:3]
    images, labels = data.load_images(chosen), data.load_labels(chosen)
    for k, i in enumerate(chosen):
        name = data.items[i].name
        image = np.asarray(Image.open(drawn / "images" / f"{name}.png"))
        mask = np.asarray(Image.open(drawn / "masks" / f"{name}.png"))
        assert np.array_equal((images[k, 0] * 255).round().byte(), image)
        assert np.array_equal(labels[k], mask) and labels.dtype == torch.long
        assert np.array_equal(data.truth(i), mask)


def test_draws_are_seeded_counted_and_of_their_parts(options):
    first, second = (Data(parse(parser(""), options())) for _ in range(2))
    other = Data(parse(parser(""), options("--seed", 1)))
    draws = [[data.draw() for _ in range(20)] for data in (first, second, other)]
    texts = [str(batches) for batches in draws]
    assert texts[0] == texts[1] != texts[2] and first.drawn == 20
    for index_l, index_u in draws[0]:
        assert set(index_l.tolist()) <= set(first.indices("labeled"))
        assert set(index_u.tolist()) <= set(first.indices("unlabeled"))


def test_with_all_labelled_the_unlabelled_stream_has_the_same_images(options):
    data = Data(parse(parser(""), options("--labeled", "100%")))
    assert data.indices("unlabeled") == []
    drawn = [data.draw()[1].tolist() for _ in range(24)]
    assert sorted(sum(drawn, [])) == sorted(data.indices("labeled"))


def test_a_batch_carries_indices_and_maps(options):
    data = Data(parse(parser(""), options()))
    numbers = torch.arange(len(data.items), dtype=torch.uint8) % 250 + 1
    maps = numbers[:, None, None].expand(-1, 32, 32)
    x_l, y_l, x_u, map_u, index_u = data.batch(maps)
    assert x_l.shape == (2, 1, 32, 32)
    assert y_l.shape == (2, 32, 32) and y_l.dtype == torch.long
    for i, m in zip(index_u.tolist(), map_u, strict=True):
        assert data.items[i].unit in data.units("unlabeled")
        assert set(m.unique().tolist()) <= {0, i % 250 + 1}
    assert data.batch()[3] is None and 0 <= x_u.min() and x_u.max() <= 1


def test_a_batch_moves_as_the_options_say(options):
    """With neither flips nor rotation only scale and place change: rows stay level, in order."""
    args = parse(parser(""), options("--no-flip", "--rotation", 0, "--unlabeled-batch", 24))
    data = Data(args)
    rows = torch.arange(32, dtype=torch.uint8)[:, None].expand(32, 32) + 1
    maps = rows.expand(len(data.items), -1, -1)
    map_u = data.batch(maps)[3].long()
    inside = map_u[:, 8:24, 8:24]
    assert (inside == inside[:, :, :1]).all()  # no row is turned
    assert (inside.diff(dim=1) >= 0).all()  # and none mirrored
    turned = Data(parse(parser(""), options("--no-flip", "--unlabeled-batch", 24))).batch(maps)[3]
    mirrored = Data(parse(parser(""), options("--rotation", 0, "--unlabeled-batch", 24)))
    mirrored = mirrored.batch(maps)[3].long()[:, 8:24, 8:24]
    assert not (turned[:, 8:24, 8:24] == turned[:, 8:24, 8:9]).all()
    assert not (mirrored.diff(dim=1) >= 0).all()
