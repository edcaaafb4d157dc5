"""Every equation of mean_teacher.py: by hand, by a naive loop, in closed form; its gradient."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import last_of
from make_traces import rows_of
from PIL import Image

import mean_teacher as mt
from common import Data, UNet, parse, parser


def test_eq1_consistency_loss_by_hand():
    probs_s = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(3, 2, 4, 5)
    assert mt.consistency_loss(probs_s, torch.full((3, 2, 4, 5), 0.5)).item() == 0.25
    assert mt.consistency_loss(probs_s, probs_s).item() == 0  # equal networks: nothing to learn
    assert mt.consistency_loss(probs_s, probs_s.flip(1)).item() == 1  # opposite and sure: the most


def test_eq1_consistency_loss_naive_loop():
    probs_s, probs_t = torch.rand(2, 3, 4, 5).softmax(1), torch.rand(2, 3, 4, 5).softmax(1)
    total = 0.0
    for b in range(2):
        for c in range(3):
            for i in range(4):
                for j in range(5):
                    total += (probs_s[b, c, i, j].item() - probs_t[b, c, i, j].item()) ** 2
    expected = total / (2 * 3 * 4 * 5)
    assert mt.consistency_loss(probs_s, probs_t).item() == pytest.approx(expected, rel=1e-5)


def test_eq1_consistency_loss_gradient():
    probs_s = torch.rand(2, 3, 4, 4, requires_grad=True)
    probs_t = torch.rand(2, 3, 4, 4)
    mt.consistency_loss(probs_s, probs_t).backward()
    torch.testing.assert_close(probs_s.grad, 2 * (probs_s.detach() - probs_t) / probs_s.numel())


def test_eq2_ema_decay():
    assert [mt.ema_decay(t, 0.99) for t in (0, 1, 2, 3)] == [0, 1 / 2, 1 - 1 / 3, 3 / 4]
    assert mt.ema_decay(99, 0.99) == pytest.approx(0.99)
    assert mt.ema_decay(10**6, 0.99) == 0.99


def test_eq3_ema_update_by_hand_and_naive_loop():
    student, teacher = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with torch.no_grad():
        student.weight.fill_(2.0)
        teacher.weight.fill_(1.0)
    mt.ema_update(teacher, student, 0.75)
    assert teacher.weight.item() == 1.25 and student.weight.item() == 2.0

    student, teacher = UNet(1, 2, 4), UNet(1, 2, 4)
    before = [p.clone() for p in teacher.parameters()]
    mt.ema_update(teacher, student, 0.9)
    for old, new, s in zip(before, teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * s)
    mt.ema_update(teacher, student, 0.0)  # no memory: a copy
    for p_t, p_s in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(p_t, p_s)


def test_eq3_ema_update_copies_batchnorm_statistics_and_leaves_gradients_alone():
    student, teacher = UNet(1, 2, 4), UNet(1, 2, 4)
    student(torch.rand(2, 1, 16, 16)).sum().backward()  # moves the student's running statistics
    mt.ema_update(teacher, student, 0.5)
    pairs = zip(teacher.named_buffers(), student.buffers(), strict=True)
    moved = [name for (name, b_t), b_s in pairs if torch.equal(b_t, b_s) and b_t.any()]
    assert len(moved) == len(list(teacher.buffers()))
    assert next(teacher.buffers()) is not next(student.buffers())
    assert all(p.grad is None for p in teacher.parameters())


def test_eq4_main_total_objective(options):
    results = mt.main(options("--weight", "7", "--val-every", "1", steps=4))
    rows = rows_of(results["folder"])
    assert len(rows) == 4
    for row in rows:
        assert row["loss"] == pytest.approx(row["sup"] + row["lam"] * row["cons"], rel=1e-5)
    assert rows[0]["lam"] == pytest.approx(7 * math.exp(-5)) and rows[3]["lam"] == 7


def test_teacher_is_an_average_with_the_students_statistics(options):
    networks = last_of(Path(mt.main(options(steps=3))["folder"]))["networks"]
    student, teacher = networks["student"], networks["teacher"]
    mean = next(name for name in teacher if "running_mean" in name)
    assert teacher[mean].any() and torch.equal(teacher[mean], student[mean])
    assert not torch.equal(teacher["head.weight"], student["head.weight"])


def test_supervised_sees_no_unlabelled_image(make_dataset, options):
    """Noise for the unlabelled images leaves the baseline's trace alone, not Mean Teacher's."""
    root = make_dataset()
    argv = options("--val-every", "1", data=root)
    data = Data(parse(parser(""), argv))
    texts = {}
    for content in ("given", "noise"):
        if content == "noise":
            for i in data.indices("unlabeled"):
                noise = np.random.default_rng(i).integers(0, 255, (32, 32), dtype=np.uint8)
                Image.fromarray(noise).save(data.items[i].image)
        for more in ((), ("--supervised",)):
            results = mt.main([*argv, *more])
            texts[content, more] = Path(results["folder"], "log.csv").read_text()
    assert texts["given", ("--supervised",)] == texts["noise", ("--supervised",)]
    assert texts["given", ()] != texts["noise", ()]


def test_supervised_reports_the_student(options):
    results = mt.main(options("--supervised", steps=2))
    assert results["method"] == "supervised" and results["headline"]["network"] == "student"
    assert list(results["networks"]) == ["student", "its EMA"]
    results = mt.main(options(steps=2))
    assert results["method"] == "mean_teacher" and results["headline"]["network"] == "teacher"
