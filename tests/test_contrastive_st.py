"""Every equation of contrastive_st.py, by hand, by naive loops, in closed form, and where its gradient goes."""
import csv
import math

import numpy as np
import pytest
import torch
from conftest import equal, run_folder
from PIL import Image

import common
import contrastive_st as st
from common import Data, UNet, parse, parser

TAU = 0.1


def draw_batch(classes, b=4, d=6, size=5, missing=((0, 1), (3, -1))):
    """Embeddings (B, D, H, W) and masks (B, K, H, W); pairs (image, class) of `missing` have no pixel."""
    torch.manual_seed(classes + b)
    label = torch.randint(classes + 1, (b, size, size))  # `classes` itself: a pixel of no class
    masks = label[:, None] == torch.arange(classes)[:, None, None]
    for image, k in missing:
        masks[image, k] = False
    return torch.randn(b, d, size, size), masks


def parts(z, masks, n=3):
    torch.manual_seed(1)
    anchors, found = st.sample_anchors(z, masks, n)
    return anchors, found, st.class_means(z, masks), masks.any(3).any(2)


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def naive(z, masks, partner, n=3):
    """Pixel by pixel and in plain numbers: mean of -log share over the anchors and their positives.

    partner(b): the other image of b's pair, or None. Anchors are found by their embedding.
    """
    anchors, found, _, _ = parts(z, masks, n)
    mean = {(b, k): z[b][:, masks[b, k]].mean(1) for b in range(len(z)) for k in range(masks.shape[1]) if masks[b, k].any()}
    terms = []
    for b, k in mean:
        images = [b] if partner(b) is None else [b, partner(b)]
        for a in range(n):
            if found[b, k, a]:
                share = {key: math.exp(cosine(anchors[b, k, a], m) / TAU) for key, m in mean.items()}
                total = sum(v for i in images for key, v in share.items() if key[0] == i)
                terms += [-math.log(share[i, k] / total) for i in images if (i, k) in mean]
    return sum(terms) / len(terms)


def test_eq1_class_means_by_hand():
    z = torch.tensor([[1.0, 3.0], [8.0, 5.0]]).view(1, 1, 2, 2)
    masks = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [1, 0]], [[0, 0], [0, 0]]]).bool()[None]
    assert st.class_means(z, masks).flatten().tolist() == [2, 8, 0]  # the last class is absent


def test_eq1_class_means_naive_loop_and_gradient():
    z, masks = draw_batch(3)
    z.requires_grad_()
    means = st.class_means(z, masks)
    for b in range(4):
        for k in range(3):
            pixels = [z[b, :, i, j] for i in range(5) for j in range(5) if masks[b, k, i, j]]
            torch.testing.assert_close(means[b, k], sum(pixels) / len(pixels) if pixels else torch.zeros(6))
    means[2, 1].sum().backward()  # every pixel of the class gets its share, no other pixel anything
    torch.testing.assert_close(z.grad[2], (masks[2, 1] / masks[2, 1].sum()).expand(6, 5, 5))
    assert not z.grad[[0, 1, 3]].any()


def test_eq2_sample_anchors_are_pixels_of_their_class():
    z, masks = draw_batch(3)
    masks[1, 0] = False
    masks[1, 0, 2, 3] = masks[1, 0, 4, 4] = True  # two pixels only, three are wanted
    anchors, found = st.sample_anchors(z, masks, 3)
    assert anchors.shape == (4, 3, 3, 6) and found.shape == (4, 3, 3)
    assert torch.equal(found.sum(2), masks.sum((2, 3)).clamp_max(3)) and found[1, 0].tolist() == [True, True, False]
    for b in range(4):
        for k in range(3):
            inside = [tuple(v) for v in z[b][:, masks[b, k]].T.tolist()]
            drawn = [tuple(v) for v in anchors[b, k][found[b, k]].tolist()]
            assert set(drawn) <= set(inside) and len(set(drawn)) == len(drawn)  # no pixel twice


def test_eq2_sample_anchors_are_uniform():
    """Each of 5 pixels of a class comes in 3 of 5 draws; the draw follows torch's seed."""
    z = torch.arange(9.0).view(1, 1, 3, 3).expand(2000, 1, 3, 3)
    masks = (z % 2 == 0)
    torch.manual_seed(0)
    anchors, found = st.sample_anchors(z, masks, 3)
    counts = torch.bincount(anchors.flatten().long(), minlength=9) / 2000
    assert found.all() and not counts[1::2].any() and (counts[::2] - 0.6).abs().max() < 0.04
    torch.manual_seed(0)
    assert torch.equal(anchors, st.sample_anchors(z, masks, 3)[0])


def test_eq2_sample_anchors_gradient():
    z, masks = draw_batch(2, b=2, missing=())
    z.requires_grad_()
    anchors, found = st.sample_anchors(z, masks, 3)
    anchors[found].sum().backward()
    assert z.grad.sum((2, 3)).tolist() == [[found[b].sum()] * 6 for b in range(2)]  # 1 for each sampled pixel
    assert not z.grad[~masks.any(1)[:, None].expand_as(z)].any()


def test_eq3_log_match_by_hand():
    """z = (2, 0) against the directions (1, 0), (0, 1) and (-1, 0): cosines 1, 0, -1 whatever the lengths."""
    anchors, means = torch.tensor([2.0, 0]).view(1, 1, 1, 2), torch.tensor([[[3.0, 0], [0, 0.5], [-1, 0]]])
    total = math.exp(1 / 0.5) + 1 + math.exp(-1 / 0.5)
    log_q = st.log_match(anchors, means, torch.tensor([[True, True, True]]), 0.5).flatten()
    assert log_q.tolist() == pytest.approx([math.log(math.exp(c / 0.5) / total) for c in (1, 0, -1)], abs=1e-6)
    log_q = st.log_match(anchors, means, torch.tensor([[True, False, True]]), 0.5).flatten()
    assert log_q[0].item() == pytest.approx(math.log(math.exp(2) / (math.exp(2) + math.exp(-2))), abs=1e-6)
    assert log_q[1] < -1e3  # an absent class has no share


def test_eq3_log_match_naive_loop():
    anchors, means, present = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 4), torch.rand(2, 5) < 0.6
    log_q = st.log_match(anchors, means, present, TAU)
    for b in range(2):
        for k in range(3):
            for a in range(2):
                values = [math.exp(cosine(anchors[b, k, a], means[b, m]) / TAU) for m in range(5)]
                total = sum(v for v, p in zip(values, present[b], strict=True) if p)
                for m in range(5):
                    if present[b, m]:
                        assert log_q[b, k, a, m].item() == pytest.approx(math.log(values[m] / total), abs=1e-4)


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_eq4_intra_loss_naive_loop(classes):
    z, masks = draw_batch(classes)
    assert st.intra_loss(*parts(z, masks), TAU).item() == pytest.approx(naive(z, masks, lambda b: None), rel=1e-4)


def test_eq4_intra_loss_closed_forms():
    z, masks = draw_batch(3, d=3, missing=())
    assert st.intra_loss(*parts(torch.ones(4, 3, 5, 5), masks), TAU).item() == pytest.approx(math.log(3))
    # perfect clusters: each class its own axis, cosines 1 and 0
    z = torch.einsum("bkhw,kd->bdhw", masks.float(), 7 * torch.eye(3))
    minimum = -math.log(math.exp(10) / (math.exp(10) + 2))
    assert st.intra_loss(*parts(z, masks), TAU).item() == pytest.approx(minimum, rel=1e-2)
    # a class alone in its image has the whole softmax: nothing to learn, whatever z
    assert st.intra_loss(*parts(torch.randn(4, 3, 5, 5), masks[:, :1]), TAU).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("b", [1, 3, 4])
def test_eq5_inter_loss_naive_loop(classes, b):
    """With an odd number of images the middle one is its own partner."""
    z, masks = draw_batch(classes, b=b, missing=((0, 1), (b - 1, -1)))
    expected = naive(z, masks, lambda i: b - 1 - i)
    assert st.inter_loss(*parts(z, masks), TAU).item() == pytest.approx(expected, rel=1e-4)


def test_eq5_inter_loss_closed_forms():
    _, masks = draw_batch(3, missing=())
    assert st.inter_loss(*parts(torch.ones(4, 3, 5, 5), masks), TAU).item() == pytest.approx(math.log(6))
    z = torch.einsum("bkhw,kd->bdhw", masks.float(), 7 * torch.eye(3))
    minimum = -math.log(math.exp(10) / (2 * math.exp(10) + 4))  # both positives are in the denominator
    assert st.inter_loss(*parts(z, masks), TAU).item() == pytest.approx(minimum, rel=1e-4)


def test_eq5_inter_loss_is_symmetric_and_pairs_first_with_last():
    z, masks = draw_batch(3)
    anchors, found, means, present = parts(z, masks)
    loss = st.inter_loss(anchors, found, means, present, TAU)
    flipped = st.inter_loss(*(t.flip(0) for t in (anchors, found, means, present)), TAU)
    torch.testing.assert_close(loss, flipped)
    means = means.clone().requires_grad_()
    st.inter_loss(anchors[:1].expand(4, -1, -1, -1), found & torch.tensor([1, 0, 0, 0]).bool()[:, None, None], means, present, TAU).backward()
    assert means.grad[0].any() and means.grad[3].any() and not means.grad[1:3].any()  # anchors of image 0 alone


@pytest.mark.parametrize("loss, number", [(st.intra_loss, 4), (st.inter_loss, 5)])
def test_eq4_intra_loss_and_eq5_gradient_reaches_pixels_and_means(loss, number):
    z, masks = draw_batch(3)
    anchors, found, means, present = (t.detach().requires_grad_() if t.is_floating_point() else t for t in parts(z, masks))
    loss(anchors, found, means, present, TAU).backward()
    assert torch.equal(anchors.grad.abs().sum(3) > 0, found)  # every anchor found, no other
    assert torch.equal(means.grad.abs().sum(2) > 0, present)
    z.requires_grad_()
    loss(*parts(z, masks), TAU).backward()
    assert torch.equal(z.grad.abs().sum(1) > 0, masks.any(1))  # through the means every pixel of a class


@pytest.mark.parametrize("loss", [st.intra_loss, st.inter_loss])
def test_without_foreground_the_loss_is_a_finite_zero(loss):
    z = torch.randn(2, 4, 5, 5, requires_grad=True)
    value = loss(*parts(z, torch.zeros(2, 3, 5, 5, dtype=torch.bool)), TAU)
    assert value.item() == 0
    value.backward()
    assert z.grad is not None and not z.grad.any()
    masks = torch.zeros(2, 3, 5, 5, dtype=torch.bool)
    masks[0, :, 0, :3] = torch.eye(3).bool()  # one pixel a class, in one image: fewer than three anchors
    value = loss(*parts(z, masks), TAU)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(z.grad).all()
    dead = torch.zeros(2, 4, 5, 5, requires_grad=True)  # embeddings of length 0 have no direction
    loss(*parts(dead, masks), TAU).backward()
    assert torch.isfinite(dead.grad).all()


def test_eq6_dice_agreement_by_hand():
    a, b, zeros = torch.zeros(3, 2, 4, dtype=torch.long), torch.zeros(3, 2, 4, dtype=torch.long), torch.zeros(1, 2, 4)
    a[0, 0, :3], b[0, 0, :3], b[0, 1, :2] = 1, 1, 1  # 3 pixels inside 5
    a[1], b[1] = 1, 2  # nothing in common
    assert st.dice_agreement(a[:1], b[:1], 2).item() == pytest.approx(3 / 4)
    assert st.dice_agreement(a, b, 3).tolist() == pytest.approx([(3 / 4 + 1) / 2, 0, 1])  # the last: background only
    assert st.dice_agreement(zeros, zeros, 4).item() == 1


def test_eq6_dice_agreement_naive_loop():
    a, b = torch.randint(4, (5, 6, 6)), torch.randint(4, (5, 6, 6))
    for i, value in enumerate(st.dice_agreement(a, b, 4).tolist()):
        scores = [common.mask_scores((a[i] == c).numpy(), (b[i] == c).numpy(), False)["dice"] for c in (1, 2, 3)]
        assert value == pytest.approx(sum(scores) / 300)


def weights_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)["networks"]


def rows_of(folder):
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(open(folder / "log.csv"))]


@pytest.mark.parametrize("matching, weight", [("inter", 0.1), ("intra", 2)])
def test_eq7_main_total_objective_stages_and_learning_rate(make_dataset, options, tmp_path, matching, weight):
    argv = options(make_dataset(), "--matching", matching, "--weight", str(weight), "--val-every", "1", steps=11)
    results = st.main(argv)
    assert list(results["networks"]) == ["network", "labeler"] and results["headline"]["network"] == "network"
    rows = rows_of(run_folder(tmp_path / "runs"))
    assert [row["round"] for row in rows] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    within = [t / n for n in (2, 3, 3, 3) for t in range(n)]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 * (1 - t) ** 0.9 for t in within])
    for row in rows:
        assert row["lam"] == pytest.approx(weight if row["round"] else 0)
        assert row["loss"] == pytest.approx(row["sup"] + row["lam"] * row["cont"], rel=1e-5)
        assert (row["cont"] > 0) == (row["trusted"] == 1) == (row["round"] > 0)


@pytest.fixture
def states(monkeypatch):
    """The network's weights and statistics after every step of the runs in a test."""
    states, networks, keep, save = [], {}, common.Run.keep, common.Run.save

    def keep_them(run, nets, *rest):
        networks.update(nets)
        keep(run, nets, *rest)

    def save_them(run, step):
        states.append({k: v.clone() for k, v in networks["network"].state_dict().items()})
        save(run, step)
    monkeypatch.setattr(common.Run, "keep", keep_them)
    monkeypatch.setattr(common.Run, "save", save_them)
    return states


def test_labels_come_from_the_network_at_the_end_of_the_stage_before(make_dataset, options, tmp_path, states, monkeypatch):
    """Also after a run that was killed in step 5, when its round had begun at 3 and its checkpoint was of 4."""
    labelers, label, save = [], st.pseudo_labels, common.Run.save

    def spy(labeler, data, agreement, seed):
        labels, trusted = label(labeler, data, agreement, seed)
        index = torch.tensor(data.unlabeled)
        expected = labeler(data.load_images(index)).argmax(1)  # in evaluation mode, not augmented
        assert not labeler.training and torch.equal(torch.from_numpy(labels[index]).long(), expected)
        assert not labels[data.indices("labeled")].any() and not labels[data.indices("test")].any()
        labelers.append({k: v.clone() for k, v in labeler.state_dict().items()})
        return labels, trusted

    def killed(run, step):
        if step == 4:
            raise KeyboardInterrupt
        save(run, step)
    monkeypatch.setattr(st, "pseudo_labels", spy)
    argv = options(make_dataset(), "--lr", "0.01", "--val-every", "4", steps=12)
    st.main(argv)
    assert len(labelers) == 3 and all(equal(a, states[t]) for a, t in zip(labelers, (2, 5, 8), strict=True))
    monkeypatch.setattr(common.Run, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        st.main([*argv, "--out", str(tmp_path / "killed")])
    monkeypatch.setattr(common.Run, "save", save)
    st.main([*argv, "--out", str(tmp_path / "killed"), "--resume"])
    assert len(labelers) == 7 and all(equal(labelers[i], labelers[j]) for i, j in ((3, 0), (4, 0), (5, 1), (6, 2)))
    assert equal(*(weights_of(run_folder(tmp_path / out)) for out in ("runs", "killed")))


def test_stage_1_sees_no_unlabelled_image(make_dataset, options, states):
    """Noise in place of the unlabelled images: BatchNorm's statistics show it, from the first round on."""
    root = make_dataset()
    argv = options(root, steps=2)
    data = Data(parse(parser(""), argv))
    st.main(argv)
    for i in data.indices("unlabeled"):
        noise = np.random.default_rng(i).integers(0, 255, (32, 32), dtype=np.uint8)
        Image.fromarray(noise).save(root / "images" / f"{data.names[i]}.png")
    st.main(argv)
    assert equal(states[0], states[2]) and not equal(states[1], states[3])


def test_init_replaces_stage_1(make_dataset, options, tmp_path, capsys):
    import mean_teacher
    root = make_dataset()
    mean_teacher.main(options(root, "--supervised", steps=2, out="first"))
    file = run_folder(tmp_path / "first") / "last.pt"
    st.main(options(root, "--init", str(file), "--val-every", "1", "--lr", "0", steps=3))
    assert "starting from student" in capsys.readouterr().out
    assert [row["round"] for row in rows_of(run_folder(tmp_path / "runs"))] == [1, 2, 3]
    parameters = dict(UNet(1, 3, 4).named_parameters())  # all but BatchNorm's running statistics
    student = torch.load(file, weights_only=True)["networks"]["student"]
    nets = weights_of(run_folder(tmp_path / "runs"))
    assert all(torch.equal(nets["network"][k], student[k]) for k in parameters)  # lr 0: as they were given


@pytest.mark.parametrize("content, message", [
    (None, "No such file"), ("text", "cannot be used"), ("other", "holds student, teacher, none with"), ("dict", "KeyError")])
def test_init_says_what_is_wrong(make_dataset, options, tmp_path, capsys, content, message):
    file = tmp_path / "given.pt"
    if content == "text":
        file.write_text("no checkpoint")
    elif content == "dict":
        torch.save({"weights": 1}, file)
    elif content == "other":
        networks = {name: UNet(1, 4, 4).state_dict() for name in ("student", "teacher")}  # 4 classes, not 3
        torch.save({"method": "mean_teacher", "channels": 1, "classes": 4, "width": 4, "reported": ["teacher"], "networks": networks}, file)
    with pytest.raises(SystemExit) as stopped:
        st.main(options(make_dataset(), "--init", str(file), steps=3))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "Expected" in error and "--init" in error


def test_agreement_leaves_images_out(make_dataset, options, tmp_path, monkeypatch):
    """Nobody agrees to more than 1: no unlabelled image is trusted, labelled ones still count."""
    used, sample = [], st.sample_anchors

    def spy(z, masks, n):
        used.append(masks.flatten(1).any(1).tolist())
        return sample(z, masks, n)
    monkeypatch.setattr(st, "sample_anchors", spy)
    st.main(options(make_dataset(classes=2), "--agreement", "1.1", "--val-every", "1", steps=5))
    assert used == [[True, True, False, False]] * 4
    assert [row["trusted"] for row in rows_of(run_folder(tmp_path / "runs"))] == [0] * 5


def test_agreement_draws_the_same_views_after_resume_and_leaves_the_stream_alone(make_dataset, options):
    data = Data(parse(parser(""), options(make_dataset())))
    data.decode()

    def labeler(x):  # three classes by brightness, so that strong views disagree
        return -(x - torch.tensor([0.15, 0.4, 0.7]).view(1, 3, 1, 1)).abs()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    labels, trusted = st.pseudo_labels(labeler, data, 0.3, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    labels_2, trusted_2 = st.pseudo_labels(labeler, data, 0.3, 5)
    assert np.array_equal(labels, labels_2) and torch.equal(trusted, trusted_2)
    torch.manual_seed(5)
    x = data.load_images(torch.tensor(data.unlabeled))
    a, b = (labeler(common.strong(x)).argmax(1) for _ in range(2))
    kept = trusted[torch.tensor(data.unlabeled)]
    assert torch.equal(kept, st.dice_agreement(a, b, 3) >= 0.3) and kept.any() and not kept.all()


def test_debug_oracle_only_prints(make_dataset, options, tmp_path, capsys):
    root = make_dataset()
    data = Data(parse(parser(""), options(root)))
    hidden = [data.names[i] for i in data.indices("unlabeled")]
    (root / "masks" / f"{hidden[0]}.png").unlink()  # images without a mask are skipped
    weights, logs = [], []
    for name, more in (("plain", ()), ("oracle", ("--debug-oracle",)), ("garbage", ())):
        if name == "garbage":
            for stem in hidden[1:]:
                (root / "masks" / f"{stem}.png").write_bytes(b"garbage")
        st.main(options(root, *more, steps=4, out=name))
        out = capsys.readouterr().out
        assert out.count("Dice of pseudo-labels") == (3 if more else 0)
        assert (f"({len(hidden) - 1} images with hidden masks)" in out) == bool(more)
        weights.append(weights_of(run_folder(tmp_path / name)))
        logs.append((run_folder(tmp_path / name) / "log.csv").read_bytes())
    assert equal(weights[0], weights[1]) and equal(weights[0], weights[2]) and logs[0] == logs[1] == logs[2]
    with pytest.raises(SystemExit):
        st.main(options(root, "--debug-oracle", steps=2))
    assert "bad file among the hidden masks" in capsys.readouterr().err


def test_debug_oracle_dice_by_hand(options):
    data = Data(parse(parser(""), options("phantom")))
    data.decode()
    truth = np.stack([data.truth(i) for i in range(len(data.names))])
    assert common.hidden_dice(truth, data).startswith("Dice of pseudo-labels 100.00 (")
    assert common.hidden_dice(0 * truth, data).startswith("Dice of pseudo-labels 0.00 (")
    data.has_mask = [False] * len(data.names)
    assert common.hidden_dice(truth, data) == "Dice of pseudo-labels unknown (0 images with hidden masks)"


@pytest.mark.parametrize("classes", [2, 4])
def test_binary_data_counts_background_as_a_class(make_dataset, options, monkeypatch, classes):
    shapes, sample = [], st.sample_anchors

    def spy(z, masks, n):
        shapes.append((tuple(masks.shape[:2]), masks.any(1).float().mean().item()))
        return sample(z, masks, n)
    monkeypatch.setattr(st, "sample_anchors", spy)
    st.main(options(make_dataset(classes=classes), steps=2))
    expected = 2 if classes == 2 else classes - 1
    assert all(shape == (4, expected) for shape, _ in shapes)
    assert all((covered == 1) == (classes == 2) for _, covered in shapes)  # with two, every pixel has a class
