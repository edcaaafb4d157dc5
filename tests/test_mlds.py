"""Every equation of mlds.py, by hand, by a naive loop, in closed form; boxes and tags, from files to pseudo-labels."""
import csv
import math
import re

import numpy as np
import pytest
import torch
from conftest import full_phantom, run_folder
from PIL import Image

import common
import mlds

DRAWN = torch.tensor([[[0, 0, 1, 1],  # by hand: class 1 in the corner, one pixel of class 2
                       [0, 2, 1, 1],
                       [0, 0, 0, 0],
                       [0, 0, 0, 0]]])


def bits(allowed):
    """A map of bits -> at each pixel the string of its classes."""
    return [["".join(str(c) for c in range(8) if int(v) >> c & 1) for v in row] for row in allowed]


def write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def make_data(argv, own=("--boxes", "--tags")):
    options = common.parser("")
    for name in own:
        options.add_argument(name)
    args = common.parse(options, argv)
    return common.Data(args), args


def test_eq1_multi_label_target_by_hand():
    half = mlds.multi_label_target(DRAWN, 3, 2)  # cells of 2 x 2 pixels: {0, 2}, {1} above, {0}, {0} below
    assert half[0].tolist() == [[[1, 0], [1, 1]], [[0, 1], [0, 0]], [[1, 0], [0, 0]]]
    assert mlds.multi_label_target(DRAWN, 4, 1)[0, :, 0, 0].tolist() == [1, 1, 1, 0]  # the whole image; class 3 absent
    full = mlds.multi_label_target(DRAWN, 3, 4)  # full resolution: the one-hot mask
    assert torch.equal(full.argmax(1), DRAWN) and torch.equal(full.sum(1), torch.ones(1, 4, 4))


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_eq1_multi_label_target_naive_loop(side):
    y, k = torch.randint(5, (2, 16, 16)), 16 // side
    y[0, :8] = 0
    target = mlds.multi_label_target(y, 5, side)
    assert target.shape == (2, 5, side, side)
    for b in range(2):
        for i in range(side):
            for j in range(side):
                cell = set(y[b, i * k:(i + 1) * k, j * k:(j + 1) * k].flatten().tolist())
                assert target[b, :, i, j].tolist() == [float(c in cell) for c in range(5)]


def test_eq2_mlds_loss_by_hand():
    for depths in (1, 3):  # σ(0) = 1/2 costs log 2, whatever the target; depths add up
        zeros = [torch.zeros(2, 3, 2**d, 2**d) for d in range(depths)]
        assert mlds.mlds_loss(zeros, torch.randint(3, (2, 4, 4))).item() == pytest.approx(depths * math.log(2))
    # one cell of the classes {0, 2}, probabilities (1/2, 1/4, 3/4): mean of -log 1/2, -log 3/4, -log 3/4
    z = torch.tensor([0.5, 0.25, 0.75]).logit().view(1, 3, 1, 1)
    y = torch.tensor([[[0, 0], [0, 2]]])
    assert mlds.mlds_loss([z], y).item() == pytest.approx((math.log(2) - 2 * math.log(0.75)) / 3)
    sure = [100 * mlds.multi_label_target(y, 3, side) - 50 for side in (1, 2)]
    assert mlds.mlds_loss(sure, y).item() < 1e-6  # right and sure at both depths
    assert mlds.mlds_loss([], y[:0]) == 0  # --variant mlds: no unlabelled image


def test_eq2_mlds_loss_naive_loop():
    y, multi, total = torch.randint(3, (2, 8, 8)), [torch.randn(2, 3, s, s) for s in (2, 4, 8)], 0.0
    for z in multi:
        s, k, depth = z.shape[2], 8 // z.shape[2], 0.0
        for b in range(2):
            for c in range(3):
                for i in range(s):
                    for j in range(s):
                        p = torch.sigmoid(z[b, c, i, j]).item()
                        here = (y[b, i * k:(i + 1) * k, j * k:(j + 1) * k] == c).any()
                        depth -= math.log(p if here else 1 - p)
        total += depth / (2 * 3 * s * s)
    assert mlds.mlds_loss(multi, y).item() == pytest.approx(total, rel=1e-5)
    twice = [torch.cat([z, z]) for z in multi]  # a mean over images: the batch size does not matter
    assert mlds.mlds_loss(twice, torch.cat([y, y])).item() == pytest.approx(total, rel=1e-5)


def test_eq2_mlds_loss_gradient():
    y, multi = torch.randint(3, (2, 4, 4)), [torch.randn(2, 3, s, s, requires_grad=True) for s in (1, 4)]
    mlds.mlds_loss(multi, y).backward()
    for z in multi:
        target = mlds.multi_label_target(y, 3, z.shape[2])
        torch.testing.assert_close(z.grad, (z.detach().sigmoid() - target) / z.numel())


def test_eq3_allowed_map_by_hand():
    left, everywhere = (1, 0.25, 0.5, 0.5, 1), 2 * (0.5,) + (1, 1)  # a box of class 1: the left half
    assert bits(mlds.allowed_map(2, 3, [])) == [["012", "012"]] * 2  # nothing is known
    assert bits(mlds.allowed_map(2, 3, [[left]])) == [["01", "0"]] * 2
    assert bits(mlds.allowed_map(2, 3, [[(2, *everywhere)]])) == [["02", "02"]] * 2  # a tag
    assert bits(mlds.allowed_map(2, 3, [[]])) == [["0", "0"]] * 2  # an empty file: background only
    top = (2, 0.5, 0.25, 1, 0.5)
    assert bits(mlds.allowed_map(2, 3, [[left, top]])) == [["012", "02"], ["01", "0"]]
    both = mlds.allowed_map(2, 3, [[left, top], [(2, *everywhere)]])  # boxes of 1 and 2, tag 2: the intersection
    assert bits(both) == [["02", "02"], ["0", "0"]]
    mask = torch.tensor([[0, 1], [2, 7]])
    assert bits(mlds.allowed_map(2, 8, [], mask)) == [["0", "1"], ["2", "7"]]
    assert mlds.allowed_map(2, 8, []).tolist() == [[255, 255]] * 2  # eight classes fill the uint8


def test_eq3_allowed_map_naive_loop():
    """A pixel that a box touches is inside it, for boxes of any place and size."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        limits = []
        for _ in range(2):
            x, y = np.sort(rng.random((3, 2))), np.sort(rng.random((3, 2)))
            limits.append([(int(rng.integers(1, 4)), *(x[k].mean(), y[k].mean()), np.ptp(x[k]), np.ptp(y[k])) for k in range(3)])
        allowed = mlds.allowed_map(16, 4, limits)
        for i in range(16):
            for j in range(16):
                expected = {0, 1, 2, 3}
                for boxes in limits:
                    expected &= {0} | {c for c, cx, cy, w, h in boxes if (j + 0.01) / 16 < cx + w / 2 and (j + 0.99) / 16 > cx - w / 2
                                       and (i + 0.01) / 16 < cy + h / 2 and (i + 0.99) / 16 > cy - h / 2}
                assert int(allowed[i, j]) == sum(1 << c for c in expected)


def test_eq3_allowed_map_of_derived_boxes_holds_the_mask():
    """At any size: the resized mask lies inside its own boxes and tags."""
    _, _, masks, _ = full_phantom(100, patients=1)
    for mask in masks:
        for size in (32, 48, 100, 128):
            resized = np.asarray(Image.fromarray(mask).resize((size, size), Image.NEAREST))
            allowed = mlds.allowed_map(size, 4, [common.boxes_of(mask)]).numpy()
            assert ((allowed >> resized) & 1).all() and (allowed[:, 0] == 1).any()
    written = [(c, *(round(v, 6) for v in box)) for c, *box in common.boxes_of(masks[0])]  # as a file has them
    assert torch.equal(mlds.allowed_map(100, 4, [written]), mlds.allowed_map(100, 4, [common.boxes_of(masks[0])]))


def test_eq4_pseudo_label_by_hand():
    logits = torch.tensor([1.0, 3.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 1, 5)  # class 1 before 2 before 0
    allowed = torch.tensor([[[0b111, 0b101, 0b011, 0b001, 0]]], dtype=torch.uint8)
    assert mlds.pseudo_label(logits, allowed).tolist() == [[[1, 2, 1, 0, 0]]]
    y = torch.randint(8, (2, 4, 4))  # a mask allows itself alone
    assert torch.equal(mlds.pseudo_label(torch.randn(2, 8, 4, 4), (1 << y).to(torch.uint8)), y)
    everything = torch.full((2, 4, 4), 255, dtype=torch.uint8)
    logits = torch.randn(2, 8, 4, 4)
    assert torch.equal(mlds.pseudo_label(logits, everything), logits.argmax(1))


def test_eq4_pseudo_label_naive_loop():
    logits, allowed = torch.randn(2, 8, 6, 6), torch.randint(256, (2, 6, 6), dtype=torch.uint8)
    label = mlds.pseudo_label(logits, allowed)
    for b in range(2):
        for i in range(6):
            for j in range(6):
                classes = [c for c in range(8) if int(allowed[b, i, j]) >> c & 1] or [0]
                assert label[b, i, j] == max(classes, key=lambda c: logits[b, c, i, j])


def test_eq5_ema_decay():
    assert [mlds.ema_decay(t, 0.99) for t in (0, 1, 2, 3)] == [0, 1 / 2, 1 - 1 / 3, 3 / 4]
    assert mlds.ema_decay(99, 0.99) == pytest.approx(0.99) and mlds.ema_decay(10**6, 0.99) == 0.99


def test_eq6_ema_update_by_hand_and_naive_loop():
    nets = mlds.build(1, 2, 4)
    student, teacher = nets["student"], nets["teacher"]
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    before = [p.clone() for p in teacher.parameters()]
    student(torch.rand(2, 1, 16, 16))  # moves the student's running statistics
    mlds.ema_update(teacher, student, 0.75)
    for old, new in zip(before, teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25)
    assert all(not b.any() for name, b in teacher.named_buffers() if "running_mean" in name)
    before = [p.clone() for p in student.parameters()]
    mlds.ema_update(student, student, 0.9)  # Self-Taught: its own teacher, nothing changes
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


@pytest.mark.parametrize("variant, lam", [("mean", 3.0), ("self", 3.0), ("mlds", 0.0)])
def test_eq7_main_total_objective(variant, lam, make_dataset, options, tmp_path):
    results = mlds.main(options(make_dataset(), "--variant", variant, "--weight", "3", "--val-every", "1", steps=2))
    for row in csv.DictReader(open(run_folder(tmp_path / "runs") / "log.csv")):
        row = {k: float(v) for k, v in row.items()}
        assert (row["lam"] > 0) == (lam > 0) and (row["pseudo"] > 0) == (row["agreement"] > 0) == (variant != "mlds")
        assert row["loss"] == pytest.approx(row["sup"] + row["mlds"] + row["lam"] * row["pseudo"], rel=1e-5)
    assert row["lam"] == lam  # after the ramp
    assert list(results["networks"]) == (["teacher", "student"] if variant == "mean" else ["student"])
    saved = torch.load(run_folder(tmp_path / "runs") / "last.pt", weights_only=True)["networks"]
    assert set(saved) == set(results["networks"])
    if variant == "mean":  # batch statistics of its own, weights behind the student's
        key = next(k for k in saved["teacher"] if "running_mean" in k)
        assert saved["teacher"][key].any() and not torch.equal(saved["teacher"][key], saved["student"][key])
        assert not torch.equal(saved["teacher"]["clean.weight"], saved["student"]["clean.weight"])


def test_variant_mlds_sees_no_unlabelled_image(make_dataset, options, tmp_path):
    root, texts = make_dataset(), []
    for content in ("given", "noise"):
        if content == "noise":
            data, _ = make_data(options(root))
            for i in data.indices("unlabeled"):
                noise = np.random.default_rng(i).integers(0, 255, (32, 32), dtype=np.uint8)
                Image.fromarray(noise).save(root / "images" / f"{data.names[i]}.png")
        mlds.main(options(root, "--variant", "mlds", "--val-every", "1", steps=2))
        texts.append((run_folder(tmp_path / "runs") / "log.csv").read_text())
    assert texts[0] == texts[1]


def test_network_has_a_head_for_the_bottleneck_and_every_stage():
    net = mlds.build(3, 5, 4)["student"]
    clean, multi = net(torch.rand(2, 3, 32, 32))
    assert clean.shape == (2, 5, 32, 32) and [z.shape for z in multi] == [(2, 5, s, s) for s in (2, 4, 8, 16, 32)]
    for head in net.heads:  # 1x1 conv to 64, BN, ReLU, 1x1 conv
        assert [type(m).__name__ for m in head] == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d"]
        assert head[0].kernel_size == head[3].kernel_size == (1, 1) and head[0].out_channels == 64
    for d in range(5):  # each trains the stages before it, the bottleneck's the encoder alone
        net.zero_grad()
        net(torch.rand(2, 3, 32, 32))[1][d].square().mean().backward()
        assert net.encoder.blocks[4][0].weight.grad.any()
        assert [block.up.weight.grad is not None for block in net.decoder.blocks] == [d > k for k in range(4)]
    clean, multi = net(torch.rand(0, 3, 32, 32))
    assert clean.shape == (0, 5, 32, 32) and multi == []


def test_pseudo_labels_never_reach_the_clean_head():
    net = mlds.build(1, 3, 4)["student"]
    clean, multi = net(torch.rand(2, 1, 16, 16))
    mlds.mlds_loss(multi, torch.randint(3, (2, 16, 16))).backward()
    assert net.clean.weight.grad is None and net.clean.bias.grad is None
    shared = [*net.encoder.parameters(), *net.decoder.parameters()]
    for p in [*net.heads.parameters(), *shared]:
        assert p.grad is not None
    assert all(head[3].weight.grad.any() for head in net.heads) and any(p.grad.any() for p in shared)
    net.zero_grad()
    clean, multi = net(torch.rand(2, 1, 16, 16))
    torch.nn.functional.cross_entropy(clean, torch.randint(3, (2, 16, 16))).backward()
    assert net.clean.weight.grad.any() and all(p.grad is None for p in net.heads.parameters())


def test_in_training_the_clean_head_learns_from_masks_alone(make_dataset, options, tmp_path, monkeypatch):
    """With the supervised terms at zero, a whole run leaves the clean head at its start."""
    monkeypatch.setattr(mlds, "supervised_loss", lambda logits, y: 0 * logits.sum())
    starts, build = [], mlds.build

    def remember(*shape):
        nets = build(*shape)
        starts.extend((nets["student"].clean.weight.clone(), nets["student"].heads[0][3].weight.clone()))
        return nets
    monkeypatch.setattr(mlds, "build", remember)
    monkeypatch.setattr(mlds, "WEIGHT_DECAY", 0.0)
    mlds.main(options(make_dataset(), "--weight", "3", steps=2))
    saved = torch.load(run_folder(tmp_path / "runs") / "last.pt", weights_only=True)["networks"]["student"]
    torch.testing.assert_close(saved["clean.weight"], starts[0], rtol=0, atol=0)
    assert not torch.equal(saved["heads.0.3.weight"], starts[1])


def brute_force(mask):
    """Flood fill, a pixel at a time -> {(class, top, left, bottom, right)}."""
    left, boxes = {tuple(p) for p in np.argwhere(mask > 0)}, []
    while left:
        stack, region = [left.pop()], []
        while stack:
            y, x = stack.pop()
            region.append((y, x))
            for q in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if q in left and mask[q] == mask[y, x]:
                    left.remove(q)
                    stack.append(q)
        ys, xs = zip(*region, strict=True)
        boxes.append((int(mask[region[0]]), min(ys), min(xs), max(ys) + 1, max(xs) + 1))
    return sorted(boxes)


def test_boxes_of_brute_force():
    rng, masks = np.random.default_rng(0), [np.zeros((5, 7), np.uint8), np.ones((4, 4), np.uint8), np.eye(6, dtype=np.uint8)]
    for classes in (2, 3, 5):
        masks += [rng.integers(0, classes, (h, w)).astype(np.uint8) for h, w in ((1, 9), (9, 1), (20, 20), (16, 30))]
        coarse = rng.integers(0, classes, (6, 6)).astype(np.uint8)
        masks.append(coarse.repeat(4, 0).repeat(5, 1))
    spiral = np.array([list(map(int, row)) for row in ("1111111", "0000001", "1111101", "1000101", "1011101", "1000001", "1111111")], np.uint8)
    masks += [spiral, spiral.T, spiral[::-1]]
    for mask in masks:
        h, w = mask.shape
        found = [(c, (cy - bh / 2) * h, (cx - bw / 2) * w, (cy + bh / 2) * h, (cx + bw / 2) * w) for c, cx, cy, bw, bh in common.boxes_of(mask)]
        assert sorted((c, *map(round, box)) for c, *box in found) == brute_force(mask)
        assert np.allclose(found, np.round(found), atol=1e-6)
    assert [b[0] for b in common.boxes_of(spiral)] == [1] and len(common.boxes_of(np.eye(6, dtype=np.uint8))) == 6  # 4-connected


def test_files_of_boxes_and_tags(make_dataset, options, capsys):
    """Own files come before derived ones, both intersect, an empty one is background, a labelled image keeps its mask."""
    root = make_dataset()
    data, args = make_data(options(root))
    a, b, c, d, *_ = (data.names[i] for i in data.indices("unlabeled"))
    write(root / "boxes" / f"{a}.txt", "2 0.25 0.5 0.5 1\n\n 1 0.75 .25 .5 .5 \r\n")
    write(root / "tags" / f"{a}.txt", "\ufeff2\n")
    write(root / "boxes" / f"{b}.txt", "")
    write(root / "tags" / f"{c}.txt", "1 2\n")
    write(root / "boxes" / f"{data.split['labeled'][0]}.txt", "")
    write(root / "boxes" / f"{data.split['test'][0]}.txt", "")
    write(root / "tags" / ".hidden.txt", "what a file browser leaves")
    maps = mlds.allowed_maps(data, args)
    number = {name: i for i, name in enumerate(data.names)}
    assert (maps[number[a]][:, :16] == 0b101).all() and (maps[number[a]][:, 16:] == 1).all()
    assert (maps[number[b]] == 1).all() and (maps[number[c]] == 0b111).all() and (maps[number[d]] == 0b111).all()
    i = data.indices("labeled")[0]
    assert np.array_equal(maps[i], 1 << data.load_labels([i])[0].numpy())
    hidden = len(data.indices("unlabeled"))
    assert capsys.readouterr().out == f"training images with masks: 3, boxes: 1, tags: 1, boxes and tags: 1, none: {hidden - 3}\n"
    args.boxes = args.tags = "100%"
    assert (mlds.allowed_maps(data, args)[number[b]] == 1).all()  # its file, not its mask
    assert capsys.readouterr().out == f"training images with masks: 3, boxes: 0, tags: 0, boxes and tags: {hidden}, none: 0\n"


CASES = [  # file, its text, what the message must say
    ("boxes/{u}.txt", "1 0.5 0.5 1 1\n0 0.5 0.5 0.2 0.2", r"boxes/{u}\.txt, line 2: class 0; expected 1 to 2, .*YOLO counts from 0\? add 1"),
    ("boxes/{u}.txt", "3 0.5 0.5 0.2 0.2", r"boxes/{u}\.txt, line 1: class 3; expected 1 to 2"),
    ("boxes/{u}.txt", "-1 0.5 0.5 0.2 0.2", "line 1: class -1; expected 1 to 2"),
    ("boxes/{u}.txt", "1 0.9 0.5 0.3 0.2", "line 1: '1 0.9 0.5 0.3 0.2': .*leaves the image"),
    ("boxes/{u}.txt", "1 0.5 0.05 0.3 0.2", "leaves the image"),
    ("boxes/{u}.txt", "1 120 80 40 30", "leaves the image; expected .* from 0 to 1, shares"),
    ("boxes/{u}.txt", "1 0.5 0.5 0 0.2", "box is empty"),
    ("boxes/{u}.txt", "1 0.5 0.5 0.2 -0.2", "box is empty"),
    ("boxes/{u}.txt", "1 0.5 nan 0.2 0.2", "line 1: '1 0.5 nan 0.2 0.2'"),
    ("boxes/{u}.txt", "\n1 0.5 0.5 0.2", r"line 2: '1 0.5 0.5 0.2'; expected: class cx cy w h"),
    ("boxes/{u}.txt", "1 0.5 0.5 0.2 0.2 0.9", "expected: class cx cy w h"),
    ("boxes/{u}.txt", "heart 0.5 0.5 0.2 0.2", "expected: class cx cy w h"),
    ("boxes/{u}.txt", "1.0 0.5 0.5 0.2 0.2", "expected: class cx cy w h"),
    ("boxes/{u}.txt", "1, 0.5, 0.5, 0.2, 0.2", "expected: class cx cy w h"),
    ("tags/{u}.txt", "1\n2 0\n", r"tags/{u}\.txt, line 2: class 0; .*YOLO counts from 0\? add 1"),
    ("tags/{u}.txt", "1\n9", "line 2: class 9; expected 1 to 2"),
    ("tags/{u}.txt", "1\nheart", r"tags/{u}\.txt, line 2: 'heart'; expected: class"),
    ("boxes/classes.txt", "heart", r"boxes/classes\.txt: no image has this name"),
]


@pytest.mark.parametrize("path, text, message", CASES, ids=range(len(CASES)))
def test_bad_files_of_boxes_and_tags(path, text, message, make_dataset, options, tmp_path, capsys):
    root = make_dataset()
    unit = make_data(options(root))[0].split["unlabeled"][0]
    write(root / path.format(u=unit), text)
    with pytest.raises(SystemExit) as stopped:
        mlds.main(options(root))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(message.format(u=unit), error), error
    assert not list(tmp_path.glob("runs/*/*")), "no run folder is left behind"


@pytest.mark.parametrize("more, message", [
    (["--boxes", "0.2"], "--boxes 0.2: did you mean 20%"), (["--tags", "150%"], "--tags 150%: expected a share"),
    (["--boxes", "20%", "--labeled", "100%"], r"--boxes 20%: .*from 1 to 0 \(the hidden units\)"),
    (["--classes", "9"], "9 classes, but .* 8 bits")], ids=range(4))
def test_bad_options(more, message, make_dataset, options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        mlds.main(options(make_dataset(), *more))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and re.search(message, error), error
    assert not list(tmp_path.glob("runs/*/*"))


def test_derived_sets_are_nested_and_only_those_masks_are_opened(make_dataset, options, monkeypatch):
    """6 patients of 2 slices; slice 1 of each hidden one has no mask, so it gets nothing."""
    root, opened = make_dataset(units=9, slices=2), []
    for path in (root / "masks").glob("*_slice_01.png"):
        path.unlink()
    read_mask = common.read_mask

    def record(path):
        opened.append(path.stem)
        return read_mask(path)
    sets = {}
    for share in (None, "20%", "50%", "100%"):
        data, args = make_data(options(root, *(["--boxes", share, "--tags", share] if share else []), "--labeled", "2"))
        data.decode()
        monkeypatch.setattr(common, "read_mask", record)
        found = {kind: common.annotations(data, kind, share) for kind in ("boxes", "tags")}
        monkeypatch.undo()
        assert sorted(set(opened)) == sorted({data.names[i] for images in found.values() for i in images})
        assert all(data.units[i] in data.split["unlabeled"] for images in found.values() for i in images)
        sets[share], opened = {kind: {data.units[i] for i in images} for kind, images in found.items()}, []
    hidden = len(data.split["unlabeled"])
    for kind in ("boxes", "tags"):
        assert set() == sets[None][kind] < sets["20%"][kind] < sets["50%"][kind] < sets["100%"][kind]
        assert len(sets["100%"][kind]) == hidden and len(sets["20%"][kind]) == math.floor(0.2 * hidden + 0.5)
    assert not sets["20%"]["boxes"] & sets["20%"]["tags"]  # from the two ends
    for part in ("train", "val", "test", "labeled"):  # lists: the same split for every --split-seed
        write(root / f"{part}.txt", "\n".join(data.split.get(part, data.split["labeled"] + data.split["unlabeled"])))
    chosen = set()
    for seed in range(4):
        other, _ = make_data(options(root, "--split-seed", str(seed), "--labeled", str(root / "labeled.txt")))
        other.decode()
        chosen.add(frozenset(other.units[i] for i in common.annotations(other, "boxes", "50%")))
        assert other.split == data.split
    assert len(chosen) > 1


def test_derived_annotations_are_the_masks(make_dataset, options):
    data, args = make_data(options(make_dataset(), "--boxes", "100%", "--tags", "100%"))
    data.decode()
    boxes, tags = (common.annotations(data, kind, "100%") for kind in ("boxes", "tags"))
    for i in data.indices("unlabeled"):
        assert {c for c, *_ in tags[i]} == {c for c, *_ in boxes[i]} == set(data.truth(i).flatten().tolist()) - {0}
    args.classes = data.classes = 2  # a hidden mask with a class that no visible one has
    with pytest.raises(SystemExit):
        common.annotations(data, "tags", "100%")


@pytest.mark.parametrize("more", [("--boxes", "100%"), ("--tags", "100%")])
def test_pseudo_labels_never_leave_their_boxes_and_tags(more, make_dataset, options):
    """The image shows where its class is allowed, so after augmentation it tells it still."""
    data, args = make_data(options(make_dataset(classes=4), *more, "--unlabeled-batch", "8", "--labeled", "3"))
    maps = mlds.allowed_maps(data, args)
    for c in (1, 2, 3):
        data.images = ((maps[:, None] >> c & 1) * 255).astype(np.uint8)
        torch.manual_seed(c)
        for _ in range(4):
            _, _, x_u, map_u, index_u = data.batch(maps)
            label = mlds.pseudo_label(10 * torch.randn(8, 4, 32, 32), map_u)
            assert not (label[x_u[:, 0] == 0] == c).any() and (label == c).any()
            inside = x_u[:, 0] == 1  # and inside it the class may still be chosen
            sure = torch.zeros(8, 4, 32, 32)
            sure[:, c] = 9
            assert (mlds.pseudo_label(sure, map_u)[inside] == c).all() and inside.any()
            for k, i in enumerate(index_u.tolist()):
                assert set(label[k].unique().tolist()) <= {b for b in range(4) if (maps[i] >> b & 1).any()}


def test_training_uses_the_annotations(make_dataset, options, monkeypatch):
    """Background-only files: every pseudo-label of a run is background."""
    root, seen, pseudo_label = make_dataset(), [], mlds.pseudo_label
    for path in (root / "images").iterdir():
        write(root / "tags" / f"{path.stem}.txt", "")

    def record(logits, allowed):
        seen.append(pseudo_label(logits, allowed))
        return seen[-1]
    monkeypatch.setattr(mlds, "pseudo_label", record)
    mlds.main(options(root, steps=2))
    assert len(seen) == 2 and not torch.cat(seen).any()
