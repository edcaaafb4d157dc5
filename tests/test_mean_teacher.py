"""Every equation of mean_teacher.py, by hand, by a naive loop, in closed form, and where its gradient goes."""
import csv

import pytest
import torch
from conftest import run_folder

import mean_teacher as mt
from common import UNet


def test_eq1_consistency_loss_by_hand():
    probs_s = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(3, 2, 4, 5)
    assert mt.consistency_loss(probs_s, torch.full((3, 2, 4, 5), 0.5)).item() == 0.25
    assert mt.consistency_loss(probs_s, probs_s).item() == 0  # equal networks: nothing to learn
    assert mt.consistency_loss(probs_s, probs_s.flip(1)).item() == 1  # opposite and sure: the maximum


def test_eq1_consistency_loss_naive_loop():
    probs_s, probs_t = torch.rand(2, 3, 4, 5).softmax(1), torch.rand(2, 3, 4, 5).softmax(1)
    total = 0.0
    for b in range(2):
        for c in range(3):
            for i in range(4):
                for j in range(5):
                    total += (probs_s[b, c, i, j].item() - probs_t[b, c, i, j].item()) ** 2
    assert mt.consistency_loss(probs_s, probs_t).item() == pytest.approx(total / (2 * 3 * 4 * 5), rel=1e-5)


def test_eq1_consistency_loss_gradient():
    probs_s = torch.rand(2, 3, 4, 4, requires_grad=True)
    probs_t = torch.rand(2, 3, 4, 4)
    mt.consistency_loss(probs_s, probs_t).backward()
    torch.testing.assert_close(probs_s.grad, 2 * (probs_s.detach() - probs_t) / probs_s.numel())


def test_eq2_ema_decay():
    assert [mt.ema_decay(t, 0.99) for t in (0, 1, 2, 3)] == [0, 1 / 2, 1 - 1 / 3, 3 / 4]
    assert mt.ema_decay(99, 0.99) == pytest.approx(0.99) and mt.ema_decay(10**6, 0.99) == 0.99


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
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))


def test_eq3_ema_update_leaves_batchnorm_buffers_and_gradients_alone():
    student, teacher = UNet(1, 2, 4), UNet(1, 2, 4)
    student(torch.rand(2, 1, 16, 16)).sum().backward()  # moves the student's running statistics
    mt.ema_update(teacher, student, 0.5)
    assert all(not b.any() for name, b in teacher.named_buffers() if "running_mean" in name)
    assert all(p.grad is None for p in teacher.parameters())


def test_eq4_main_total_objective(options, tmp_path):
    mt.main(options("phantom", "--weight", "7", "--val-every", "1", steps=4))
    rows = list(csv.DictReader(open(run_folder(tmp_path / "runs") / "log.csv")))
    assert len(rows) == 4
    for row in rows:
        row = {k: float(v) for k, v in row.items()}
        assert row["loss"] == pytest.approx(row["sup"] + row["lam"] * row["cons"], rel=1e-5)
    assert float(rows[0]["lam"]) == pytest.approx(7 * 2.718281828 ** -5) and float(rows[3]["lam"]) == 7


def test_teacher_is_an_average_with_statistics_of_its_own(options, tmp_path):
    mt.main(options("phantom", steps=3))
    nets = torch.load(run_folder(tmp_path / "runs") / "last.pt", weights_only=True)["networks"]
    student, teacher = nets["student"], nets["teacher"]
    mean = next(k for k in teacher if "running_mean" in k)
    assert teacher[mean].any() and not torch.equal(teacher[mean], student[mean])
    assert not torch.equal(teacher["head.weight"], student["head.weight"])


def test_supervised_sees_no_unlabelled_image(make_dataset, options, tmp_path):
    """Noise in place of the unlabelled images leaves the baseline's trace as it is, and changes Mean Teacher's."""
    import numpy as np
    from PIL import Image

    from common import Data, parse, parser
    root = make_dataset()
    argv = options(root, "--val-every", "1")
    data = Data(parse(parser(""), argv))
    texts = {}
    for content in ("given", "noise"):
        if content == "noise":
            for i in data.indices("unlabeled"):
                noise = np.random.default_rng(i).integers(0, 255, (32, 32), dtype=np.uint8)
                Image.fromarray(noise).save(root / "images" / f"{data.names[i]}.png")
        for more in ((), ("--supervised",)):
            mt.main([*argv, *more])
            texts[content, more] = (run_folder(tmp_path / "runs") / "log.csv").read_text()
    assert texts["given", ("--supervised",)] == texts["noise", ("--supervised",)]
    assert texts["given", ()] != texts["noise", ()]


def test_supervised_reports_the_student_first(options):
    results = mt.main(options("phantom", "--supervised", steps=2))
    assert results["method"] == "supervised" and results["headline"]["network"] == "student"
    assert list(results["networks"]) == ["student", "teacher"]
    assert mt.main(options("phantom", steps=2))["headline"]["network"] == "teacher"
