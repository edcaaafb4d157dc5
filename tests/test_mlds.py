"""Every equation of mlds.py: by hand, by a naive loop, in closed form; what its heads learn from.

Boxes and tags, from files to the maps of Eq. (4), are in test_annotations.py.
"""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import last_of
from make_traces import rows_of
from PIL import Image

import mlds
from common import Data, draw_phantom, parse, parser, strong, supervised_loss

DRAWN = torch.tensor([[[0, 0, 1, 1],  # by hand: class 1 in the corner, one pixel of class 2
                       [0, 2, 1, 1],
                       [0, 0, 0, 0],
                       [0, 0, 0, 0]]])


def classes_in(bits):
    """A number whose bit c says whether class c is in a set -> the sorted classes of the set."""
    return [c for c in range(8) if int(bits) >> c & 1]


def words(allowed):
    """A map of bits -> at each pixel the string of its classes."""
    return [["".join(map(str, classes_in(bits))) for bits in row] for row in allowed]


def all_equal(parameters, others):
    return all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


# --- Equations ------------------------------------------------------------------------------------

def test_eq1_multi_label_target_by_hand():
    half = mlds.multi_label_target(DRAWN, 3, 2)  # cells of 2 x 2: {0, 2}, {1} above, {0}, {0} below
    assert half[0].tolist() == [[[1, 0], [1, 1]], [[0, 1], [0, 0]], [[1, 0], [0, 0]]]
    whole = mlds.multi_label_target(DRAWN, 4, 1)  # one cell; class 3 is absent
    assert whole[0, :, 0, 0].tolist() == [1, 1, 1, 0]
    full = mlds.multi_label_target(DRAWN, 3, 4)  # full resolution: the one-hot mask
    assert torch.equal(full.argmax(1), DRAWN)
    assert torch.equal(full.sum(1), torch.ones(1, 4, 4))


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_eq1_multi_label_target_naive_loop(side):
    y, k = torch.randint(5, (2, 16, 16)), 16 // side
    y[0, :8] = 0
    target = mlds.multi_label_target(y, 5, side)
    assert target.shape == (2, 5, side, side)
    for b in range(2):
        for i in range(side):
            for j in range(side):
                cell = y[b, i * k:(i + 1) * k, j * k:(j + 1) * k].flatten().tolist()
                assert target[b, :, i, j].tolist() == [float(c in cell) for c in range(5)]


def test_eq2_mlds_loss_by_hand():
    for depths in (1, 3):  # σ(0) = 1/2 costs log 2, whatever the target; depths add up
        zeros = [torch.zeros(2, 3, 2**d, 2**d) for d in range(depths)]
        loss = mlds.mlds_loss(zeros, torch.randint(3, (2, 4, 4)))
        assert loss.item() == pytest.approx(depths * math.log(2))
    # one cell of the classes {0, 2}, probabilities (1/2, 1/4, 3/4): -log of 1/2, 3/4 and 3/4
    z = torch.tensor([0.5, 0.25, 0.75]).logit().view(1, 3, 1, 1)
    y = torch.tensor([[[0, 0], [0, 2]]])
    expected = (math.log(2) - 2 * math.log(0.75)) / 3
    assert mlds.mlds_loss([z], y).item() == pytest.approx(expected)
    sure = [100 * mlds.multi_label_target(y, 3, side) - 50 for side in (1, 2)]
    assert mlds.mlds_loss(sure, y).item() < 1e-6  # right and sure at both depths
    assert mlds.mlds_loss([], y[:0]) == 0  # --variant mlds: no unlabelled image


def test_eq2_mlds_loss_naive_loop():
    y, total = torch.randint(3, (2, 8, 8)), 0.0
    multi = [torch.randn(2, 3, side, side) for side in (2, 4, 8)]
    for z in multi:
        side, k, depth = z.shape[2], 8 // z.shape[2], 0.0
        for b in range(2):
            for c in range(3):
                for i in range(side):
                    for j in range(side):
                        p = torch.sigmoid(z[b, c, i, j]).item()
                        cell = y[b, i * k:(i + 1) * k, j * k:(j + 1) * k]
                        if not (cell == c).any():
                            p = 1 - p
                        depth -= math.log(p)
        total += depth / (2 * 3 * side * side)
    assert mlds.mlds_loss(multi, y).item() == pytest.approx(total, rel=1e-5)
    twice = [torch.cat([z, z]) for z in multi]  # a mean over images: batch size does not matter
    loss = mlds.mlds_loss(twice, torch.cat([y, y]))
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_eq2_mlds_loss_gradient():
    y = torch.randint(3, (2, 4, 4))
    multi = [torch.randn(2, 3, side, side, requires_grad=True) for side in (1, 4)]
    mlds.mlds_loss(multi, y).backward()
    for z in multi:
        target = mlds.multi_label_target(y, 3, z.shape[2])
        torch.testing.assert_close(z.grad, (z.detach().sigmoid() - target) / z.numel())


def test_eq3_deep_loss_by_hand():
    y = torch.tensor([[[0, 0], [0, 1]]])
    z = torch.tensor([0.75, 0.25]).log().view(1, 2, 1, 1)  # one cell for four pixels
    expected = -(3 * math.log(0.75) + math.log(0.25)) / 4  # enlarged: the same at every pixel
    assert mlds.deep_loss([z], y).item() == pytest.approx(expected)
    assert mlds.deep_loss([z, z], y).item() == pytest.approx(2 * expected)  # depths add up
    expected = -math.log(0.25)  # shrunk: the cell has the label of its pixel below the middle
    assert mlds.deep_loss([z], y, nearest=True).item() == pytest.approx(expected)


def test_eq3_deep_loss_naive_loop():
    y, z = torch.randint(3, (2, 6, 6)), torch.randn(2, 3, 2, 2)
    enlarged = torch.nn.functional.interpolate(z, (6, 6), mode="bilinear")
    deep = shrunk = 0.0
    for b in range(2):
        for i in range(6):
            for j in range(6):
                deep -= enlarged[b, :, i, j].log_softmax(0)[y[b, i, j]].item()
        for i in range(2):
            for j in range(2):  # cells of three pixels: the middle one
                shrunk -= z[b, :, i, j].log_softmax(0)[y[b, 3 * i + 1, 3 * j + 1]].item()
    assert mlds.deep_loss([z], y).item() == pytest.approx(deep / 72, rel=1e-5)
    assert mlds.deep_loss([z], y, nearest=True).item() == pytest.approx(shrunk / 8, rel=1e-5)
    fine = torch.randn(2, 3, 6, 6)  # at full resolution both are the plain cross-entropy
    plain = torch.nn.functional.cross_entropy(fine, y).item()
    assert mlds.deep_loss([fine], y).item() == pytest.approx(plain)
    assert mlds.deep_loss([fine], y, nearest=True).item() == pytest.approx(plain)


def test_eq4_allowed_map_by_hand():
    left = (1, 0.25, 0.5, 0.5, 1)  # a box of class 1: the left half
    top = (2, 0.5, 0.25, 1, 0.5)
    tag = (2, 0.5, 0.5, 1, 1)
    assert words(mlds.allowed_map(2, 3, [])) == [["012", "012"]] * 2  # nothing is known
    assert words(mlds.allowed_map(2, 3, [[left]])) == [["01", "0"]] * 2
    assert words(mlds.allowed_map(2, 3, [[tag]])) == [["02", "02"]] * 2
    assert words(mlds.allowed_map(2, 3, [[]])) == [["0", "0"]] * 2  # empty file: background only
    assert words(mlds.allowed_map(2, 3, [[left, top]])) == [["012", "02"], ["01", "0"]]
    both = mlds.allowed_map(2, 3, [[left, top], [tag]])  # boxes of 1 and 2, tag 2: what both allow
    assert words(both) == [["02", "02"], ["0", "0"]]
    mask = torch.tensor([[0, 1], [2, 7]])
    assert words(mlds.allowed_map(2, 8, [], mask)) == [["0", "1"], ["2", "7"]]
    assert mlds.allowed_map(2, 8, []).tolist() == [[255, 255]] * 2  # eight classes fill the uint8


def draw_boxes(rng):
    """Three boxes (c, cx, cy, w, h) of classes 1 to 3, of any place and size."""
    boxes = []
    for _ in range(3):
        left, right = np.sort(rng.random(2)).tolist()
        top, bottom = np.sort(rng.random(2)).tolist()
        centre = (left + right) / 2, (top + bottom) / 2
        boxes.append((int(rng.integers(1, 4)), *centre, right - left, bottom - top))
    return boxes


def touches(i, size, centre, extent):
    """Is more than 0.01 of pixel i inside a box, along one side?"""
    first, end = size * (centre - extent / 2), size * (centre + extent / 2)
    return i + 0.01 < end and i + 0.99 > first


def test_eq4_allowed_map_naive_loop():
    """A pixel that a box touches is inside it."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        limits = [draw_boxes(rng), draw_boxes(rng)]
        allowed = mlds.allowed_map(16, 4, limits)
        for i in range(16):
            for j in range(16):
                expected = {0, 1, 2, 3}
                for boxes in limits:
                    inside = {0}
                    for c, cx, cy, w, h in boxes:
                        if touches(i, 16, cy, h) and touches(j, 16, cx, w):
                            inside.add(c)
                    expected &= inside
                assert classes_in(allowed[i, j]) == sorted(expected)


def test_eq4_allowed_map_of_derived_boxes_holds_the_mask(tmp_path):
    """At any size: the resized mask lies inside its own boxes."""
    draw_phantom(tmp_path / "one", 100, patients=1)
    masks = [Image.open(path) for path in sorted(tmp_path.glob("one/masks/*"))]
    assert len(masks) == 8
    for mask in masks:
        boxes = mlds.boxes_of(np.asarray(mask))
        for size in (32, 48, 100, 128):
            resized = np.asarray(mask.resize((size, size), Image.NEAREST))
            allowed = mlds.allowed_map(size, 4, [boxes]).numpy()
            assert resized.any() and ((allowed >> resized) & 1).all()
            assert (allowed[:, 0] == 1).any()
    written = [(c, *(round(value, 6) for value in box)) for c, *box in boxes]  # as a file has them
    assert written != boxes
    exact = mlds.allowed_map(100, 4, [boxes])
    assert torch.equal(mlds.allowed_map(100, 4, [written]), exact)


def test_eq5_pseudo_label_by_hand():
    logits = torch.tensor([1.0, 3.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 1, 5)  # 1, then 2, then 0
    allowed = torch.tensor([[[0b111, 0b101, 0b011, 0b001, 0]]], dtype=torch.uint8)
    assert mlds.pseudo_label(logits, allowed).tolist() == [[[1, 2, 1, 0, 0]]]
    logits, y = torch.randn(2, 8, 4, 4), torch.randint(8, (2, 4, 4))
    assert torch.equal(mlds.pseudo_label(logits, (1 << y).to(torch.uint8)), y)  # a mask: itself
    everything = torch.full((2, 4, 4), 255, dtype=torch.uint8)
    assert torch.equal(mlds.pseudo_label(logits, everything), logits.argmax(1))


def test_eq5_pseudo_label_naive_loop():
    logits = torch.randn(2, 8, 6, 6)
    allowed = torch.randint(256, (2, 6, 6), dtype=torch.uint8)
    label = mlds.pseudo_label(logits, allowed)
    for b in range(2):
        for i in range(6):
            for j in range(6):
                classes = classes_in(allowed[b, i, j]) or [0]
                assert label[b, i, j] in classes
                assert logits[b, label[b, i, j], i, j] == logits[b, classes, i, j].max()


def test_eq6_ema_decay():
    assert [mlds.ema_decay(t, 0.99) for t in (0, 1, 2, 3)] == [0, 1 / 2, 1 - 1 / 3, 3 / 4]
    assert mlds.ema_decay(99, 0.99) == pytest.approx(0.99)
    assert mlds.ema_decay(10**6, 0.99) == 0.99


def test_eq7_ema_update_by_hand_and_naive_loop():
    networks = mlds.build(1, 2, 4)
    student, teacher = networks["student"], networks["teacher"]
    assert all_equal(teacher.parameters(), student.parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    before = [p.clone() for p in teacher.parameters()]
    student(torch.rand(2, 1, 16, 16))  # moves the student's running statistics
    mlds.ema_update(teacher, student, 0.75)
    for old, new in zip(before, teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25)
    assert all_equal(teacher.buffers(), student.buffers())
    assert all(b.any() for b in teacher.buffers())
    before = [p.clone() for p in student.parameters()]
    mlds.ema_update(student, student, 0.9)  # Self-Taught: its own teacher, nothing changes
    assert all_equal(before, student.parameters())


@pytest.mark.parametrize("variant, lam, networks", [
    ("mean", 3.0, ["teacher", "student"]), ("self", 3.0, ["student"]), ("mlds", 0.0, ["student"]),
    ("deep", 0.0, ["student"]), ("nearest", 0.0, ["student"])])
def test_eq8_main_total_objective(variant, lam, networks, options):
    argv = options("--variant", variant, "--weight", "3", "--val-every", "1", steps=2)
    results = mlds.main(argv)
    rows = rows_of(results["folder"])
    assert len(rows) == 2
    for row in rows:
        assert (row["lam"] > 0) == (lam > 0)
        assert (row["pseudo"] > 0) == (row["agreement"] > 0) == (lam > 0)
        total = row["sup"] + row["heads"] + row["lam"] * row["pseudo"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)
    assert rows[-1]["lam"] == lam  # after the ramp
    assert sorted(results["networks"]) == sorted(networks)
    assert results["headline"]["network"] == networks[0]
    saved = last_of(Path(results["folder"]))["networks"]
    assert set(saved) == set(networks)
    if variant == "mean":  # the student's batch statistics, weights behind the student's
        student, teacher = saved["student"], saved["teacher"]
        key = next(key for key in teacher if "running_mean" in key)
        assert teacher[key].any() and torch.equal(teacher[key], student[key])
        assert not torch.equal(teacher["clean.weight"], student["clean.weight"])


# --- What learns from what ------------------------------------------------------------------------

def test_variants_for_masks_differ_in_their_loss_alone(options):
    """Of one batch and one network, L_sup is the same; deep, nearest and mlds differ."""
    rows = {}
    for variant in ("deep", "nearest", "mlds"):
        argv = options("--variant", variant, "--val-every", "1", steps=1)
        [rows[variant]] = rows_of(mlds.main(argv)["folder"])
    assert rows["deep"]["sup"] == rows["nearest"]["sup"] == rows["mlds"]["sup"]
    assert len({row["heads"] for row in rows.values()}) == 3


@pytest.mark.parametrize("variant", ["mlds", "deep"])
def test_variants_for_masks_see_no_unlabelled_image(make_dataset, options, variant):
    root = make_dataset()
    argv = options("--variant", variant, "--val-every", "1", data=root, steps=2)
    given = mlds.main(argv)
    data = Data(parse(parser(""), options(data=root)))
    rng = np.random.default_rng(0)
    for i in data.indices("unlabeled"):
        noise = rng.integers(0, 255, (32, 32), dtype=np.uint8)
        Image.fromarray(noise).save(data.items[i].image)
    noisy = mlds.main(argv)
    assert rows_of(given["folder"]) == rows_of(noisy["folder"])
    assert given["networks"] == noisy["networks"]


def test_network_has_a_head_for_the_bottleneck_and_every_stage():
    network = mlds.build(3, 5, 4)["student"]
    clean, multi = network(torch.rand(2, 3, 32, 32))
    assert clean.shape == (2, 5, 32, 32)
    assert [z.shape for z in multi] == [(2, 5, side, side) for side in (2, 4, 8, 16, 32)]
    for head in network.heads:  # 1x1 conv to 64, BN, ReLU, 1x1 conv
        kinds = [type(module).__name__ for module in head]
        assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d"]
        assert head[0].kernel_size == head[3].kernel_size == (1, 1)
        assert head[0].out_channels == 64
    for depth in range(5):  # each trains the stages before it, the bottleneck's the encoder alone
        network.zero_grad()
        network(torch.rand(2, 3, 32, 32))[1][depth].square().mean().backward()
        assert network.encoder.blocks[4][0].weight.grad.any()
        trained = [block.up.weight.grad is not None for block in network.decoder.blocks]
        assert trained == [depth > k for k in range(4)]
    clean, multi = network(torch.rand(0, 3, 32, 32))
    assert clean.shape == (0, 5, 32, 32) and multi == []


def test_pseudo_labels_never_reach_the_clean_head():
    network = mlds.build(1, 3, 4)["student"]
    _, multi = network(torch.rand(2, 1, 16, 16))
    mlds.mlds_loss(multi, torch.randint(3, (2, 16, 16))).backward()
    assert network.clean.weight.grad is None and network.clean.bias.grad is None
    shared = [*network.encoder.parameters(), *network.decoder.parameters()]
    for p in [*network.heads.parameters(), *shared]:
        assert p.grad is not None
    assert all(head[3].weight.grad.any() for head in network.heads)
    assert any(p.grad.any() for p in shared)
    network.zero_grad()
    clean, _ = network(torch.rand(2, 1, 16, 16))
    torch.nn.functional.cross_entropy(clean, torch.randint(3, (2, 16, 16))).backward()
    assert network.clean.weight.grad.any()
    assert all(p.grad is None for p in network.heads.parameters())


def first_step(argv):
    """A run's first step, by hand: the student, its losses L_sup and L_MLDS(y), multi_u."""
    args = parse(parser(""), argv)
    data = Data(args)
    torch.manual_seed(args.seed)
    student = mlds.build(data.channels, data.classes, args.width)["student"]
    x_l, y_l, x_u, _, _ = data.batch()
    x_ls, x_us = strong(x_l), strong(x_u)
    logits_l, multi_l = student(x_ls)
    _, multi_u = student(x_us)
    return student, supervised_loss(logits_l, y_l), mlds.mlds_loss(multi_l, y_l), multi_u


def test_in_training_the_clean_head_learns_from_masks_alone(options):
    """In a run whose λ is large its gradient is that of L_sup, the other heads' is not.

    The run's gradients are read from AdamW's state: its first mean of them is 0.1 of the first.
    """
    argv = options(steps=1)
    results = mlds.main([*argv, "--weight", "300"])
    optimizer, _ = last_of(Path(results["folder"]))["parts"]
    student, loss_sup, loss_mlds, _ = first_step(argv)
    (loss_sup + loss_mlds).backward()
    assert rows_of(results["folder"])[0]["lam"] > 1
    clean, heads = 0, 0
    for number, (name, p) in enumerate(student.named_parameters()):
        gradient = optimizer["state"][number]["exp_avg"] / 0.1
        alike = torch.allclose(gradient, p.grad, rtol=1e-3, atol=1e-5)
        if name.startswith("clean."):
            assert gradient.any() and alike
            clean += 1
        if name.startswith("heads.") and name.endswith("3.weight"):
            assert not alike
            heads += 1
    assert (clean, heads) == (2, 5)


def test_training_uses_the_annotations(phantom, options):
    """Background-only files: the pseudo-labels of a run are background, whatever the teacher."""
    argv = options("--val-every", "1", data=phantom, steps=1)
    without = rows_of(mlds.main(argv)["folder"])[0]
    (phantom / "tags").mkdir()
    for path in phantom.glob("images/*"):
        (phantom / "tags" / f"{path.stem}.txt").write_text("")
    row = rows_of(mlds.main(argv)["folder"])[0]
    _, loss_sup, loss_mlds, multi_u = first_step(argv)
    background = torch.zeros(2, 32, 32, dtype=torch.long)
    expected = mlds.mlds_loss(multi_u, background).item()
    assert row["pseudo"] == pytest.approx(expected, rel=1e-4)
    assert without["pseudo"] != pytest.approx(expected, rel=1e-2)
    for other in (row, without):  # what masks teach stays the same
        assert other["sup"] == pytest.approx(loss_sup.item(), rel=1e-4)
        assert other["heads"] == pytest.approx(loss_mlds.item(), rel=1e-4)
