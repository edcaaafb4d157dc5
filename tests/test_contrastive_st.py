"""Every equation of contrastive_st.py: by hand, by naive loops, in closed form; its gradient."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal, last_of, run_folder
from make_traces import rows_of
from PIL import Image

import common
import contrastive_st as st
import mean_teacher
from common import Data, UNet, parse, parser

TAU = 0.1


def draw_batch(classes, b=4, d=6, size=5, missing=((0, 1), (3, -1))):
    """Embeddings (B, D, H, W), masks (B, K, H, W); no pixel in the (image, class) of `missing`."""
    torch.manual_seed(classes + b)
    label = torch.randint(classes + 1, (b, size, size))  # `classes` itself: a pixel of no class
    masks = label[:, None] == torch.arange(classes)[:, None, None]
    for image, k in missing:
        masks[image, k] = False
    return torch.randn(b, d, size, size), masks


def parts(z, masks, n=3):
    """What Eq. (4) and (5) need of a batch: anchors, found, means, present."""
    torch.manual_seed(1)
    anchors, found = st.sample_anchors(z, masks, n)
    return anchors, found, st.class_means(z, masks), masks.any(3).any(2)


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def naive(z, masks, images_of, n=3):
    """Pixel by pixel and in plain numbers: mean of -log share over the anchors and their positives.

    images_of(b): the images whose means an anchor of image b is compared with.
    """
    anchors, found, _, _ = parts(z, masks, n)
    means = {}
    for b in range(len(z)):
        for k in range(masks.shape[1]):
            if masks[b, k].any():
                means[b, k] = z[b][:, masks[b, k]].mean(1)
    terms = []
    for b, k in means:
        for a in range(n):
            if not found[b, k, a]:
                continue
            share = {}
            for (image, other), mean in means.items():
                share[image, other] = math.exp(cosine(anchors[b, k, a], mean) / TAU)
            total = 0.0
            for image in images_of(b):
                total += sum(value for key, value in share.items() if key[0] == image)
            terms += [-math.log(share[i, k] / total) for i in images_of(b) if (i, k) in means]
    return sum(terms) / len(terms)


# --- Equations ------------------------------------------------------------------------------------

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
            total, count = torch.zeros(6), 0
            for i in range(5):
                for j in range(5):
                    if masks[b, k, i, j]:
                        total = total + z[b, :, i, j]
                        count += 1
            torch.testing.assert_close(means[b, k], total / max(1, count))
    means[2, 1].sum().backward()  # every pixel of the class gets its share, no other pixel anything
    share = masks[2, 1] / masks[2, 1].sum()
    torch.testing.assert_close(z.grad[2], share.expand(6, 5, 5))
    assert not z.grad[[0, 1, 3]].any()


def test_eq2_sample_anchors_are_pixels_of_their_class():
    z, masks = draw_batch(3)
    masks[1, 0] = False
    masks[1, 0, 2, 3] = masks[1, 0, 4, 4] = True  # two pixels only, three are wanted
    anchors, found = st.sample_anchors(z, masks, 3)
    assert anchors.shape == (4, 3, 3, 6) and found.shape == (4, 3, 3)
    assert torch.equal(found.sum(2), masks.sum((2, 3)).clamp_max(3))
    assert found[1, 0].tolist() == [True, True, False]
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
    assert found.all() and not counts[1::2].any()
    assert (counts[::2] - 0.6).abs().max() < 0.04
    torch.manual_seed(0)
    assert torch.equal(anchors, st.sample_anchors(z, masks, 3)[0])


def test_eq2_sample_anchors_gradient():
    z, masks = draw_batch(2, b=2, missing=())
    z.requires_grad_()
    anchors, found = st.sample_anchors(z, masks, 3)
    anchors[found].sum().backward()
    sampled = [[found[b].sum()] * 6 for b in range(2)]
    assert z.grad.sum((2, 3)).tolist() == sampled  # 1 for each sampled pixel
    assert not z.grad[~masks.any(1)[:, None].expand_as(z)].any()


def test_eq3_log_match_by_hand():
    """z = (2, 0) against (3, 0), (0, 1/2), (-1, 0): cosines 1, 0, -1 whatever the lengths."""
    anchors = torch.tensor([2.0, 0]).view(1, 1, 1, 2)
    means = torch.tensor([[[3.0, 0], [0, 0.5], [-1, 0]]])
    total = math.exp(1 / 0.5) + 1 + math.exp(-1 / 0.5)
    expected = [math.log(math.exp(c / 0.5) / total) for c in (1, 0, -1)]
    present = torch.tensor([[True, True, True]])
    log_q = st.log_match(anchors, means, present, 0.5).flatten()
    assert log_q.tolist() == pytest.approx(expected, abs=1e-6)
    present = torch.tensor([[True, False, True]])
    log_q = st.log_match(anchors, means, present, 0.5).flatten()
    expected = math.log(math.exp(2) / (math.exp(2) + math.exp(-2)))
    assert log_q[0].item() == pytest.approx(expected, abs=1e-6)
    assert log_q[1] < -1e3  # an absent class has no share


def test_eq3_log_match_naive_loop():
    anchors, means = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 4)
    present = torch.rand(2, 5) < 0.6
    log_q = st.log_match(anchors, means, present, TAU)
    for b in range(2):
        for k in range(3):
            for a in range(2):
                values = [math.exp(cosine(anchors[b, k, a], means[b, m]) / TAU) for m in range(5)]
                total = sum(values[m] for m in range(5) if present[b, m])
                for m in range(5):
                    if present[b, m]:
                        expected = math.log(values[m] / total)
                        assert log_q[b, k, a, m].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_eq4_intra_loss_naive_loop(classes):
    z, masks = draw_batch(classes)
    expected = naive(z, masks, lambda b: [b])
    assert st.intra_loss(*parts(z, masks), TAU).item() == pytest.approx(expected, rel=1e-4)


def test_eq4_intra_loss_closed_forms():
    z, masks = draw_batch(3, d=3, missing=())
    loss = st.intra_loss(*parts(torch.ones(4, 3, 5, 5), masks), TAU)
    assert loss.item() == pytest.approx(math.log(3))
    # perfect clusters: each class its own axis, cosines 1 and 0
    z = torch.einsum("bkhw,kd->bdhw", masks.float(), 7 * torch.eye(3))
    minimum = -math.log(math.exp(10) / (math.exp(10) + 2))
    assert st.intra_loss(*parts(z, masks), TAU).item() == pytest.approx(minimum, rel=1e-2)
    # a class alone in its image has the whole softmax: nothing to learn, whatever z
    loss = st.intra_loss(*parts(torch.randn(4, 3, 5, 5), masks[:, :1]), TAU)
    assert loss.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("b", [1, 3, 4])
def test_eq5_inter_loss_naive_loop(classes, b):
    """With an odd number of images the middle one is its own partner."""
    z, masks = draw_batch(classes, b=b, missing=((0, 1), (b - 1, -1)))
    expected = naive(z, masks, lambda image: [image, b - 1 - image])
    assert st.inter_loss(*parts(z, masks), TAU).item() == pytest.approx(expected, rel=1e-4)


def test_eq5_inter_loss_closed_forms():
    _, masks = draw_batch(3, missing=())
    loss = st.inter_loss(*parts(torch.ones(4, 3, 5, 5), masks), TAU)
    assert loss.item() == pytest.approx(math.log(6))
    z = torch.einsum("bkhw,kd->bdhw", masks.float(), 7 * torch.eye(3))
    minimum = -math.log(math.exp(10) / (2 * math.exp(10) + 4))  # the denominator has both positives
    assert st.inter_loss(*parts(z, masks), TAU).item() == pytest.approx(minimum, rel=1e-4)


def test_eq5_inter_loss_is_symmetric_and_pairs_first_with_last():
    z, masks = draw_batch(3)
    anchors, found, means, present = parts(z, masks)
    loss = st.inter_loss(anchors, found, means, present, TAU)
    flipped = st.inter_loss(anchors.flip(0), found.flip(0), means.flip(0), present.flip(0), TAU)
    torch.testing.assert_close(loss, flipped)
    means = means.clone().requires_grad_()
    found = found & torch.tensor([1, 0, 0, 0]).bool()[:, None, None]  # of image 0 alone
    anchors = anchors[:1].expand(4, -1, -1, -1)
    st.inter_loss(anchors, found, means, present, TAU).backward()
    assert means.grad[0].any() and means.grad[3].any() and not means.grad[1:3].any()


@pytest.mark.parametrize("loss", [st.intra_loss, st.inter_loss])
def test_eq4_intra_loss_and_eq5_gradient_reaches_pixels_and_means(loss):
    z, masks = draw_batch(3)
    anchors, found, means, present = parts(z, masks)
    anchors, means = anchors.detach().requires_grad_(), means.detach().requires_grad_()
    loss(anchors, found, means, present, TAU).backward()
    assert torch.equal(anchors.grad.abs().sum(3) > 0, found)  # every anchor found, no other
    assert torch.equal(means.grad.abs().sum(2) > 0, present)
    z.requires_grad_()
    loss(*parts(z, masks), TAU).backward()
    reached = z.grad.abs().sum(1) > 0
    assert torch.equal(reached, masks.any(1))  # through the means every pixel of a class


@pytest.mark.parametrize("loss", [st.intra_loss, st.inter_loss])
def test_without_foreground_the_loss_is_a_finite_zero(loss):
    z = torch.randn(2, 4, 5, 5, requires_grad=True)
    value = loss(*parts(z, torch.zeros(2, 3, 5, 5, dtype=torch.bool)), TAU)
    assert value.item() == 0
    value.backward()
    assert z.grad is not None and not z.grad.any()
    masks = torch.zeros(2, 3, 5, 5, dtype=torch.bool)
    masks[0, :, 0, :3] = torch.eye(3).bool()  # a pixel a class, in one image: too few anchors
    value = loss(*parts(z, masks), TAU)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(z.grad).all()
    dead = torch.zeros(2, 4, 5, 5, requires_grad=True)  # embeddings of length 0: no direction
    loss(*parts(dead, masks), TAU).backward()
    assert torch.isfinite(dead.grad).all()


def test_eq6_dice_agreement_by_hand():
    a, b = torch.zeros(3, 2, 4, dtype=torch.long), torch.zeros(3, 2, 4, dtype=torch.long)
    a[0, 0, :3], b[0, 0, :3], b[0, 1, :2] = 1, 1, 1  # 3 pixels inside 5
    a[1], b[1] = 1, 2  # nothing in common; the last: background only
    assert st.dice_agreement(a[:1], b[:1], 2).item() == pytest.approx(3 / 4)
    assert st.dice_agreement(a, b, 3).tolist() == pytest.approx([(3 / 4 + 1) / 2, 0, 1])
    zeros = torch.zeros(1, 2, 4)
    assert st.dice_agreement(zeros, zeros, 4).item() == 1


def test_eq6_dice_agreement_naive_loop():
    a, b = torch.randint(4, (5, 6, 6)), torch.randint(4, (5, 6, 6))
    for i, value in enumerate(st.dice_agreement(a, b, 4).tolist()):
        total = 0.0
        for c in (1, 2, 3):
            total += common.mask_scores((a[i] == c).numpy(), (b[i] == c).numpy(), False)["dice"]
        assert value == pytest.approx(total / 300)


@pytest.mark.parametrize("matching, weight", [("inter", 0.1), ("intra", 2), ("none", 1)])
def test_eq7_main_total_objective_stages_and_learning_rate(options, matching, weight):
    argv = options("--matching", matching, "--weight", weight, "--val-every", "1", steps=11)
    results = st.main(argv)
    assert list(results["networks"]) == ["network", "labeler"]
    assert results["headline"]["network"] == "network"
    rows = rows_of(results["folder"])
    assert [row["round"] for row in rows] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    expected = []
    for length in (2, 3, 3, 3):
        expected += [1e-3 * (1 - t / length) ** 0.9 for t in range(length)]
    assert [row["lr"] for row in rows] == pytest.approx(expected)
    for row in rows:
        lam = 0
        if row["round"] > 0:
            lam = weight
        assert row["lam"] == pytest.approx(lam)
        assert row["loss"] == pytest.approx(row["sup"] + row["lam"] * row["cont"], rel=1e-5)
        assert (row["cont"] > 0) == (row["trusted"] == 1) == (row["round"] > 0)


def test_plain_self_training_trains_the_classifier_and_not_the_head(options):
    """--matching none: L_sup with the pseudo-labels; the projection head stays as it was."""
    results = st.main(options("--matching", "none", "--val-every", "8", steps=8))
    saved = last_of(Path(results["folder"]))
    torch.manual_seed(0)
    projection = st.build(1, 4, 4)["projection"].state_dict()
    for name, value in saved["networks"]["projection"].items():
        if "weight" in name:  # no gradient: not even weight decay moves it
            assert torch.equal(value, projection[name])


def test_agreement_in_percent_is_refused(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        st.main(options("--agreement", "80"))
    assert stopped.value.code == 2 and "--agreement" in capsys.readouterr().err


def test_agreement_without_contrast_is_refused(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        st.main(options("--matching", "none", "--agreement", "0.8"))
    assert stopped.value.code == 2 and "Leave one of them out" in capsys.readouterr().err


# --- Stages and rounds ----------------------------------------------------------------------------

def networks_of(folder):
    """{network: its weights and statistics} in a run folder's last checkpoint."""
    return last_of(Path(folder))["networks"]


def interrupt(argv, steps, monkeypatch):
    """Run main, with Ctrl-C in the middle of the step after so many."""
    done = 0

    def set_lr(optimizer, lr):
        nonlocal done
        if done == steps:
            raise KeyboardInterrupt
        done += 1
        return common.set_lr(optimizer, lr)

    with monkeypatch.context() as patch:
        patch.setattr(st, "set_lr", set_lr)
        with pytest.raises(KeyboardInterrupt):
            st.main(argv)


def test_labels_come_from_the_network_at_the_end_of_the_stage_before(make_dataset, options,
                                                                     tmp_path, monkeypatch):
    """Stages begin at 0, 2, 4, 6. Interrupted there and within a round, a run ends as it would.

    The labeler keeps the statistics of its BatchNorm too: it labels in evaluation mode.
    """
    argv = options("--lr", "0.01", "--val-every", "1", data=make_dataset(), steps=8)
    whole = st.main([*argv, "--out", str(tmp_path / "whole")])
    argv += ["--out", str(tmp_path / "parts")]
    states, step = {}, 0
    for steps in (2, 1, 1, 2):
        interrupt(argv, steps, monkeypatch)
        folder = run_folder(tmp_path / "parts")
        argv = ["--resume", str(folder)]
        step += steps
        assert last_of(folder)["step"] == step
        states[step] = networks_of(folder)
    st.main(argv)
    assert equal(networks_of(folder), networks_of(whole["folder"]))
    assert rows_of(folder) == rows_of(whole["folder"])
    states[8] = networks_of(folder)
    for step, start in ((3, 2), (4, 2), (6, 4), (8, 6)):
        assert equal(states[step]["labeler"], states[start]["network"])
        assert not equal(states[step]["labeler"], states[step]["network"])


def brightness(x):
    """Logits of three classes by brightness, a labeler on which strong views disagree."""
    return -(x - torch.tensor([0.15, 0.4, 0.7]).view(1, 3, 1, 1)).abs()


def test_pseudo_labels_are_of_unlabelled_images_as_they_are(make_dataset, options):
    data = Data(parse(parser(""), options(data=make_dataset())))
    labels, trusted = st.pseudo_labels(brightness, data, 0, 1)
    index = torch.tensor(data.indices("unlabeled"))
    expected = brightness(data.load_images(index)).argmax(1)  # not augmented
    assert labels.dtype == torch.uint8 and torch.equal(labels[index].long(), expected)
    for part in ("labeled", "val", "test"):
        assert not labels[data.indices(part)].any()
    assert trusted.all()


def draw_noise(argv):
    """Noise in place of a dataset's unlabelled images."""
    data = Data(parse(parser(""), argv))
    rng = np.random.default_rng(0)
    for i in data.indices("unlabeled"):
        noise = rng.integers(0, 255, (32, 32), dtype=np.uint8)
        Image.fromarray(noise).save(data.items[i].image)


def test_stage_1_sees_no_unlabelled_image(phantom, options):
    """Of 2 steps the first is stage 1; the network after it is the last round's labeler."""
    argv = options("--val-every", "1", data=phantom, steps=2)
    given = st.main(argv)
    draw_noise(options(data=phantom))
    noisy = st.main(argv)
    one, other = networks_of(given["folder"]), networks_of(noisy["folder"])
    assert equal(one["labeler"], other["labeler"])
    assert not equal(one["network"], other["network"])  # from the first round on they count
    one, other = rows_of(given["folder"]), rows_of(noisy["folder"])
    assert one[0] == other[0] and one[1] != other[1]


# --- Options --------------------------------------------------------------------------------------

def test_init_replaces_stage_1(options, capsys):
    """With a learning rate of 0 the network stays as it was given."""
    given = mean_teacher.main(options("--supervised", steps=2, out="first"))
    file = Path(given["folder"], "last.pt")
    results = st.main(options("--init", file, "--val-every", "1", "--lr", "0", steps=3))
    assert f"starting from student of {file}" in capsys.readouterr().out
    assert [row["round"] for row in rows_of(results["folder"])] == [1, 2, 3]
    student = networks_of(file.parent)["student"]
    network = networks_of(results["folder"])["network"]
    for name, _ in UNet(1, 4, 4).named_parameters():  # all but BatchNorm's running statistics
        assert torch.equal(network[name], student[name])


def test_init_takes_the_headline_network(options):
    """A mean teacher's is the teacher, not the student."""
    given = mean_teacher.main(options("--lr", "0.01", steps=3, out="first"))
    file = Path(given["folder"], "best.pt")
    results = st.main(options("--init", file, "--lr", "0", steps=1))
    saved = torch.load(file, weights_only=True)["networks"]
    network = networks_of(results["folder"])["network"]
    assert torch.equal(network["head.weight"], saved["teacher"]["head.weight"])
    assert not torch.equal(network["head.weight"], saved["student"]["head.weight"])


def test_init_takes_a_run_folder(options, capsys):
    given = mean_teacher.main(options("--supervised", steps=1, out="first"))["folder"]
    st.main(options("--init", given, steps=1))
    assert f"starting from student of {given}" in capsys.readouterr().out


def test_a_run_with_init_resumes_without_the_file_once_it_has_a_checkpoint(options, capsys):
    given = mean_teacher.main(options("--supervised", steps=1, out="first"))["folder"]
    file = Path(given, "last.pt")
    folder = st.main(options("--init", file, steps=2))["folder"]
    file.rename(f"{file}.moved")
    capsys.readouterr()
    assert st.main(["--resume", folder])["folder"] == folder
    assert "starting from" not in capsys.readouterr().out
    Path(folder, "last.pt").unlink()
    with pytest.raises(SystemExit):
        st.main(["--resume", folder])
    assert f"--init: {file} cannot be used" in capsys.readouterr().err


def test_a_run_with_init_resumes_from_any_directory(options, tmp_path, monkeypatch):
    given = mean_teacher.main(options("--supervised", steps=1, out="first"))
    monkeypatch.chdir(given["folder"])
    folder = st.main(options("--init", "last.pt", steps=2))["folder"]
    monkeypatch.chdir(tmp_path)
    assert st.main(["--resume", folder])["folder"] == folder


def checkpoint(classes=4, headline="student"):
    return {"headline": headline, "predict": "predict",
            "networks": {"student": UNet(1, classes, 4).state_dict()}}


def with_nan():
    state = checkpoint()
    state["networks"]["student"]["head.bias"][1] = math.nan
    return state


INIT = {  # what the file holds, and the message
    "missing": (None, "No such file"),
    "text": ("no checkpoint", "cannot be used"),
    "other": ({"weights": 1}, "no checkpoint of this project"),
    "classes": (checkpoint(classes=3), "its student has"),
    "nan": (with_nan(), "head.bias of student is not finite"),
    "headline": (checkpoint(headline="CSA"), "CSA")}  # a branch of cdma.py's network, say


@pytest.mark.parametrize("content, message", INIT.values(), ids=INIT)
def test_init_says_what_is_wrong(options, tmp_path, capsys, content, message):
    file = tmp_path / "given.pt"
    if isinstance(content, str):
        file.write_text(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(SystemExit) as stopped:
        st.main(options("--init", file, steps=3))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error
    assert "--init" in error and "Expected" in error


def nobody_agrees(monkeypatch):
    """Every image is left out, whatever share --agreement asks for."""
    monkeypatch.setattr(st, "dice_agreement", lambda label_1, *_: torch.zeros(len(label_1)))


def test_agreement_leaves_images_out(make_dataset, options, monkeypatch):
    """Where no unlabelled image is trusted, labelled ones still count.

    So the network's weights stay the same with noise in place of the unlabelled images; its
    BatchNorm's running statistics do not.
    """
    nobody_agrees(monkeypatch)
    root, weights = make_dataset(), {}
    for images in ("given", "noise"):
        if images == "noise":
            draw_noise(options(data=root))
        for agreement in (0, 0.8):
            argv = options("--agreement", agreement, "--val-every", "1", data=root, steps=3)
            results = st.main(argv)
            weights[images, agreement] = networks_of(results["folder"])["network"]
            rows = rows_of(results["folder"])
            assert all(row["cont"] > 0 for row in rows[1:])
            if agreement > 0:
                assert [row["trusted"] for row in rows] == [0] * 3
            else:
                assert [row["trusted"] for row in rows] == [0, 1, 1]
    for agreement in (0, 0.8):
        one, other = weights["given", agreement], weights["noise", agreement]
        same = [torch.equal(one[name], other[name]) for name, _ in UNet(1, 3, 4).named_parameters()]
        assert all(same) == (agreement > 0)
        assert not equal(one, other)


def test_agreement_draws_the_same_views_after_resume_and_leaves_the_stream_alone(make_dataset,
                                                                                 options):
    data = Data(parse(parser(""), options(data=make_dataset())))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    labels, trusted = st.pseudo_labels(brightness, data, 0.3, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    labels_2, trusted_2 = st.pseudo_labels(brightness, data, 0.3, 5)
    assert torch.equal(labels, labels_2) and torch.equal(trusted, trusted_2)
    torch.manual_seed(5)
    x = data.load_images(data.unlabeled)
    label_1 = brightness(common.strong(x)).argmax(1)
    label_2 = brightness(common.strong(x)).argmax(1)
    kept = trusted[data.unlabeled]
    assert torch.equal(kept, st.dice_agreement(label_1, label_2, 3) >= 0.3)
    assert kept.any() and not kept.all()


@pytest.mark.parametrize("classes", [2, 3])
def test_binary_data_counts_background_as_a_class(make_dataset, options, classes, monkeypatch):
    """Images with one foreground class each: over the foreground alone Eq. (4) is 0.

    No unlabelled image is trusted: masks alone count, not what a network makes of other images.
    """
    nobody_agrees(monkeypatch)
    root = make_dataset(classes=2)
    for number, path in enumerate(sorted(root.glob("masks/*"))):
        mask = np.array(Image.open(path))
        Image.fromarray(mask * np.uint8(number % (classes - 1) + 1)).save(path)
    argv = options("--matching", "intra", "--agreement", "0.8", "--val-every", "1",
                   "--classes", classes, data=root)
    rows = rows_of(st.main(argv)["folder"])
    for row in rows[1:]:
        if classes == 2:
            assert row["cont"] > 0.01
        else:
            assert row["cont"] == pytest.approx(0, abs=1e-6)
