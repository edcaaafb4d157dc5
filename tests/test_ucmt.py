"""Every equation of ucmt.py: by hand, by a naive loop, in closed form; where its gradient goes."""
import math
from pathlib import Path

import pytest
import torch
from conftest import last_of
from make_traces import rows_of
from test_cps import (
    check_cutmix_by_hand,
    check_cutmix_mask_area,
    check_cutmix_mask_naive_loop,
    check_cutmix_naive_loop,
)

import ucmt
from common import UNet


def test_eq1_dice_loss_by_hand():
    # one row of four pixels, P of class 1 = (1, 0.5, 0, 0), Ŷ = (1, 1, 0, 0)
    p = torch.tensor([1.0, 0.5, 0.0, 0.0])
    probs, label = torch.stack([1 - p, p]).view(1, 2, 1, 4), torch.tensor([[[1, 1, 0, 0]]])
    dice = (2 * 2 / (2.5 + 2) + 2 * 1.5 / (1.5 + 2)) / 2  # background, foreground
    assert ucmt.dice_loss(probs, label).item() == pytest.approx(1 - dice, rel=1e-5)
    onehot = torch.nn.functional.one_hot(label, 2).movedim(-1, 1).float()
    assert ucmt.dice_loss(onehot, label).item() == 0  # both right, an absent class would count as 1
    assert ucmt.dice_loss(onehot.flip(1), label).item() == pytest.approx(1, abs=1e-5)


def test_eq1_dice_loss_naive_loop():
    probs, label = torch.randn(2, 3, 4, 5).softmax(1), torch.randint(3, (2, 4, 5))
    total = 0.0
    for b in range(2):
        for c in range(3):
            both = size = 0.0
            for i in range(4):
                for j in range(5):
                    found, expected = probs[b, c, i, j].item(), float(label[b, i, j].item() == c)
                    both += found * expected
                    size += found + expected
            total += (2 * both + 1e-5) / (size + 1e-5)
    assert ucmt.dice_loss(probs, label).item() == pytest.approx(1 - total / 6, rel=1e-5)


def test_eq1_dice_loss_gradient():
    """Raises the label's probability and lowers the others'."""
    probs = torch.full((1, 2, 3, 3), 0.5, requires_grad=True)
    label = torch.zeros(1, 3, 3, dtype=torch.long)
    label[0, 1, 1] = 1
    ucmt.dice_loss(probs, label).backward()
    onehot = torch.nn.functional.one_hot(label, 2).movedim(-1, 1).bool()
    assert (probs.grad[onehot] < 0).all() and (probs.grad[~onehot] > 0).all()


def losses_of(probs_1, probs_2, a, b):
    return ucmt.dice_loss(probs_1, a).item() + ucmt.dice_loss(probs_2, b).item()


def test_eq2_cps_loss_crosses_the_labels():
    probs_1, probs_2 = torch.randn(2, 3, 4, 4).softmax(1), torch.randn(2, 3, 4, 4).softmax(1)
    label_1, label_2 = probs_1.argmax(1), probs_2.argmax(1)
    found = ucmt.cps_loss(probs_1, probs_2, label_1, label_2).item()
    assert found == pytest.approx(losses_of(probs_1, probs_2, label_2, label_1))
    assert found > losses_of(probs_1, probs_2, label_1, label_2)  # one's own labels are easier
    probs_1.requires_grad_()
    probs_2.requires_grad_()
    ucmt.cps_loss(probs_1, probs_2, label_1, label_2).backward()
    assert probs_1.grad.any() and probs_2.grad.any()


def test_eq3_mts_loss_takes_the_teachers_labels():
    probs_1, probs_2 = torch.randn(2, 3, 4, 4).softmax(1), torch.randn(2, 3, 4, 4).softmax(1)
    probs_t = torch.randn(2, 3, 4, 4, requires_grad=True)
    label_t = probs_t.argmax(1)
    found = ucmt.mts_loss(probs_1, probs_2, label_t).item()
    assert found == pytest.approx(losses_of(probs_1, probs_2, label_t, label_t))
    onehot = torch.nn.functional.one_hot(label_t, 3).movedim(-1, 1).float()
    assert ucmt.mts_loss(onehot, onehot, label_t).item() == pytest.approx(0, abs=1e-6)
    probs_1.requires_grad_()
    ucmt.mts_loss(probs_1, probs_2, label_t).backward()
    assert probs_1.grad.any() and probs_t.grad is None


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_eq4_uncertainty_bounds(classes):
    even = torch.full((2, classes, 8, 8), 1 / classes)
    largest = torch.full((2, 4, 4), math.log(classes))
    torch.testing.assert_close(ucmt.uncertainty(even, even, 4), largest)
    label = torch.randint(classes, (2, 8, 8))
    sure = torch.nn.functional.one_hot(label, classes).movedim(-1, 1).float()
    assert not ucmt.uncertainty(sure, sure, 4).any()  # 0 log 0 = 0, no NaN


def test_eq4_uncertainty_by_hand_and_naive_loop():
    # student sure of class 0, teacher of class 1: their mean is even, log 2
    a = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    expected = torch.full((1, 2, 2), math.log(2))
    torch.testing.assert_close(ucmt.uncertainty(a, a.flip(1), 2), expected)
    p = torch.randn(2, 3, 8, 12).softmax(1).requires_grad_()
    q = torch.randn(2, 3, 8, 12).softmax(1)
    found = ucmt.uncertainty(p, q, 4)
    for b in range(2):
        for row in range(4):
            for column in range(4):
                total = 0.0
                for i in range(2 * row, 2 * row + 2):
                    for j in range(3 * column, 3 * column + 3):
                        for c in range(3):
                            m = (p[b, c, i, j].item() + q[b, c, i, j].item()) / 2
                            total -= m * math.log(m)
                assert found[b, row, column].item() == pytest.approx(total / 6, rel=1e-4)
    assert not found.requires_grad


def ranked(u, sign):
    """Patch numbers by sign * uncertainty, the smallest first, of equal ones the first patch."""
    return sorted(range(len(u)), key=lambda patch: (sign * u[patch], patch))


def naive_umix(x, u_1, u_2, k):
    """Patch by patch, one image at a time."""
    grid, out = u_1.shape[-1], x.clone()
    h, w = x.shape[-2] // grid, x.shape[-1] // grid
    for b in range(len(x)):
        one, two = u_1[b].flatten().tolist(), u_2[b].flatten().tolist()
        for targets, sources in ((ranked(one, -1), ranked(two, 1)),
                                 (ranked(two, -1), ranked(one, 1))):
            for target, source in zip(targets[:k], sources[:k], strict=True):
                (ti, tj), (si, sj) = divmod(target, grid), divmod(source, grid)
                patch = x[b, ..., si * h:si * h + h, sj * w:sj * w + w]
                out[b, ..., ti * h:ti * h + h, tj * w:tj * w + w] = patch
    return out


def test_eq5_umix_with_more_patches_to_mix_than_there_are():
    """All change places; one patch an image stays where it is."""
    x = torch.arange(16.0).view(1, 1, 4, 4)
    one = torch.zeros(1, 1, 1)
    assert torch.equal(ucmt.umix(x, one, one, 2), x)
    u = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    rows = torch.tensor([2, 3, 0, 1])
    assert torch.equal(ucmt.umix(x, u, u, 99), x[:, :, rows][:, :, :, rows])


def test_eq5_umix_by_hand():
    """4 x 4 patches of 2 x 2 pixels; every patch holds its number, its pixels differ by tenths."""
    number = torch.arange(16.0).view(1, 4, 4)
    tenths = torch.tensor([[0.0, 0.1], [0.2, 0.3]]).repeat(4, 4)
    x = (number.repeat_interleave(2, 1).repeat_interleave(2, 2) + tenths)[:, None]  # (1, 1, 8, 8)
    u_1, u_2 = torch.full((1, 16), 0.5), torch.full((1, 16), 0.5)
    u_1[0, [3, 10]], u_1[0, [0, 7]] = torch.tensor([0.9, 0.8]), torch.tensor([0.1, 0.2])
    u_2[0, [10, 6]], u_2[0, [15, 3]] = torch.tensor([0.9, 0.8]), torch.tensor([0.1, 0.2])
    # first: 3 <- 15, 10 <- 3 (the unmixed 3, not the 15 that now lies there);
    # then: 10 <- 0 (both wrote 10: the second stands), 6 <- 7
    expected = list(range(16))
    expected[3], expected[10], expected[6] = 15, 0, 7
    mixed = ucmt.umix(x, u_1.view(1, 4, 4), u_2.view(1, 4, 4), 2)
    assert mixed[0, 0, ::2, ::2].flatten().tolist() == expected
    inside = mixed[0, 0] - mixed[0, 0].floor()
    torch.testing.assert_close(inside, tenths)  # the inside of a patch stays in order
    labels = ucmt.umix(x[:, 0].long(), u_1.view(1, 4, 4), u_2.view(1, 4, 4), 2)
    assert torch.equal(labels, mixed[:, 0].long())  # image and label map stay aligned


def test_eq5_umix_ties_by_index():
    x = torch.arange(16).view(1, 4, 4)
    even = torch.zeros(1, 4, 4)  # all tie: top 2 and bottom 2 are patches 0 and 1
    assert torch.equal(ucmt.umix(x, even, even, 2), x)
    u = even.clone()
    u[0, 0, 0] = 1.0  # U_1: top 0, 1; bottom 1, 2. U_2: top 0, 1; bottom 0, 1
    expected = x.flatten().tolist()
    expected[0], expected[1] = 1, 2  # the second assignment, from bottom-k(U_1), stands
    assert ucmt.umix(x, u, even, 2).flatten().tolist() == expected


@pytest.mark.parametrize("k", [0, 1, 2, 5, 16])
def test_eq5_umix_naive_loop(k):
    u_1, u_2 = torch.randint(6, (5, 4, 4)) / 6, torch.randint(6, (5, 4, 4)) / 6  # with ties
    x = torch.rand(5, 3, 8, 12)
    mixed = ucmt.umix(x, u_1, u_2, k)
    assert torch.equal(mixed, naive_umix(x, u_1, u_2, k))
    assert torch.equal(ucmt.umix(x[:, 0], u_1, u_2, k), mixed[:, 0])
    assert k > 0 or torch.equal(mixed, x)


def test_eq5_umix_gradient_goes_to_the_patch_that_is_shown():
    x = torch.rand(1, 1, 4, 4, requires_grad=True)
    u = torch.arange(16.0).view(1, 4, 4)  # 15 receives 0, twice
    ucmt.umix(x, u, u, 1).sum().backward()
    expected = torch.ones(4, 4)
    expected[3, 3], expected[0, 0] = 0, 2
    assert torch.equal(x.grad[0, 0], expected)


def test_eq6_cutmix_mask_naive_loop():
    check_cutmix_mask_naive_loop(ucmt)


def test_eq6_cutmix_mask_area():
    check_cutmix_mask_area(ucmt)


def test_eq7_cutmix_by_hand():
    check_cutmix_by_hand(ucmt)


def test_eq7_cutmix_naive_loop():
    check_cutmix_naive_loop(ucmt)


def test_eq8_ema_decay():
    assert [ucmt.ema_decay(t, 0.99) for t in (0, 1, 2, 3)] == [0, 1 / 2, 1 - 1 / 3, 3 / 4]
    assert ucmt.ema_decay(99, 0.99) == pytest.approx(0.99)
    assert ucmt.ema_decay(10**6, 0.99) == 0.99


def test_eq9_ema_update_by_hand_and_naive_loop():
    teacher, student_1, student_2 = (torch.nn.Linear(1, 1) for _ in range(3))
    with torch.no_grad():
        for network, value in ((teacher, 1.0), (student_1, 2.0), (student_2, 6.0)):
            network.weight.fill_(value)
    ucmt.ema_update(teacher, student_1, student_2, 0.75, 0.5)
    assert teacher.weight.item() == 0.5 * 1 + 0.5 * (0.75 * 2 + 0.25 * 6)
    assert (student_1.weight.item(), student_2.weight.item()) == (2, 6)
    teacher, student_1, student_2 = (UNet(1, 2, 4) for _ in range(3))
    before = [p.clone() for p in teacher.parameters()]
    student_1(torch.rand(2, 1, 16, 16)).sum().backward()
    ucmt.ema_update(teacher, student_1, student_2, 0.99, 0.9)
    after = (network.parameters() for network in (teacher, student_1, student_2))
    for old, new, a, b in zip(before, *after, strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * (0.99 * a + 0.01 * b))
        assert new.grad is None
    for b_t, b_1 in zip(teacher.buffers(), student_1.buffers(), strict=True):
        assert torch.equal(b_t, b_1) and b_t.any()  # moved by the pass above


@pytest.mark.parametrize("more, weight", [
    ((), 0.1), (("--no-mix-labeled",), 0.1), (("--mix", "none"), 0.1),
    (("--weight", "3", "--top-k", "0", "--grid", "8"), 3)])
def test_eq10_main_total_objective(options, more, weight):
    """A row holds the means of a batch's two steps, which have one weight."""
    rows = rows_of(ucmt.main(options(*more, "--val-every", "2", steps=8))["folder"])
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for row in rows:
        assert row["cps"] > 0 and row["mts"] > 0
        unsupervised = (row["cps"] + row["mts"]) / 2
        assert row["loss"] == pytest.approx(row["sup"] + row["lam"] * unsupervised, rel=1e-5)
    assert rows[0]["lam"] == pytest.approx(weight * math.exp(-5))
    assert rows[3]["lam"] == pytest.approx(weight)


def test_a_batch_has_two_optimizer_steps_and_checkpoints_lie_between_batches(options):
    results = ucmt.main(options("--val-every", "6", steps=8))
    state = last_of(Path(results["folder"]))
    assert state["step"] == 8 and state["drawn"] == 4
    assert {int(moments["step"]) for moments in state["parts"][0]["state"].values()} == {8}
    assert [row["step"] for row in rows_of(results["folder"])] == [6, 8]


@pytest.mark.parametrize("more, steps, message", [
    ((), 7, "--steps 7: expected an even number"),
    (("--val-every", "3"), 8, "--val-every 3: expected an even number"),
    (("--grid", "5"), 8, "--grid 5 does not divide --size 32"),
    (("--grid", "0"), 8, "at least 1"), (("--top-k", "-1"), 8, "at least 0")])
def test_options_that_do_not_fit(options, capsys, more, steps, message):
    with pytest.raises(SystemExit) as stopped:
        ucmt.main(options(*more, steps=steps))
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_students_differ_and_the_teacher_follows_the_first(options):
    networks = ucmt.build(1, 3, 4)
    heads = [networks[name].head.weight for name in ("student 1", "student 2", "teacher")]
    assert torch.equal(heads[0], heads[2]) and not torch.equal(heads[0], heads[1])
    results = ucmt.main(options("--teacher-mix", "1", steps=2))
    networks = last_of(Path(results["folder"]))["networks"]
    head = networks["teacher"]["head.weight"]  # after steps 0 and 1: (θ_1(0) + θ_1(1)) / 2
    to_1 = (head - networks["student 1"]["head.weight"]).norm()
    to_2 = (head - networks["student 2"]["head.weight"]).norm()
    assert 0 < to_1 < to_2 / 10


def test_views_are_independent_and_the_second_step_sees_mixed_images(options, monkeypatch):
    """Every strong view is drawn anew: two students, two streams, two steps."""
    weak_views, views = [], []
    strong = ucmt.strong

    def recorded(x):
        weak_views.append(x)
        views.append(strong(x))
        return views[-1]
    monkeypatch.setattr(ucmt, "strong", recorded)
    ucmt.main(options(steps=2))
    assert len(views) == 8  # x_l, x_l, x_u, x_u, and again
    for first in (0, 2, 4, 6):
        assert torch.equal(weak_views[first], weak_views[first + 1])
        assert not torch.equal(views[first], views[first + 1])
    for plain, mixed in ((0, 4), (2, 6)):
        changed = (weak_views[plain] != weak_views[mixed]).float().mean()
        assert 0 < changed <= 4 / 256  # at most 4 of 16 x 16 patches


@pytest.mark.parametrize("mix", ["umix", "cutmix", "none"])
@pytest.mark.parametrize("flag", ["--mix-labeled", "--no-mix-labeled"])
def test_labelled_images_are_mixed_with_their_masks_or_not_at_all(options, monkeypatch, mix, flag):
    """The masks are those that the labelled images would give, before and after mixing."""
    batches = []
    strong, supervised_loss = ucmt.strong, ucmt.supervised_loss

    def views(x):
        batches.append(x)
        return strong(x)

    def losses(logits, y):
        batches.append(y)
        return supervised_loss(logits, y)
    monkeypatch.setattr(ucmt, "strong", views)
    monkeypatch.setattr(ucmt, "supervised_loss", losses)
    monkeypatch.setattr(ucmt.Data, "batch", tell_tale_batch)
    ucmt.main(options("--mix", mix, flag, steps=2))
    x_l, _, x_u, _, y_l, _, mixed_l, _, mixed_u, _, mixed_y, _ = batches
    assert torch.equal((x_l[:, 0] * 4).round().long(), y_l)
    assert torch.equal((mixed_l[:, 0] * 4).round().long(), mixed_y)
    assert torch.equal(x_l, mixed_l) == (mix == "none" or flag == "--no-mix-labeled")
    assert torch.equal(x_u, mixed_u) == (mix == "none")


def tell_tale_batch(self, maps=None):
    """A batch as Data's, in which an image's intensities, times four, are its mask."""
    y = torch.randint(4, (2, 32, 32))
    x = y[:, None] / 4
    return x, y, x.flip(3), None, torch.tensor([0, 1])
