"""Every equation of cps.py: by hand, by a naive loop, in closed form; where its gradient goes."""
import math
from pathlib import Path

import pytest
import torch
from conftest import last_of
from make_traces import rows_of

import cps


def test_eq1_cps_loss_by_hand():
    for classes in (2, 3, 5):
        zeros = torch.zeros(2, classes, 3, 4)
        label = torch.randint(classes, (2, 3, 4))
        expected = 2 * math.log(classes)
        assert cps.cps_loss(zeros, zeros, label, label).item() == pytest.approx(expected)
    # one pixel, P_1 = (3/4, 1/4), P_2 = (1/5, 4/5): Ŷ_1 = 0, Ŷ_2 = 1
    logits_1 = torch.tensor([0.75, 0.25]).log().view(1, 2, 1, 1)
    logits_2 = torch.tensor([0.2, 0.8]).log().view(1, 2, 1, 1)
    label_1, label_2 = logits_1.argmax(1), logits_2.argmax(1)
    loss = cps.cps_loss(logits_1, logits_2, label_1, label_2)
    assert loss.item() == pytest.approx(-math.log(0.25) - math.log(0.2))
    assert cps.cps_loss(50 * logits_1, 50 * logits_1, label_1, label_1).item() < 1e-6


def test_eq1_cps_loss_naive_loop():
    logits_1, logits_2 = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    label_1, label_2 = logits_1.argmax(1), logits_2.argmax(1)
    total = 0.0
    for b in range(2):
        for i in range(4):
            for j in range(5):
                total -= logits_1[b, :, i, j].softmax(0)[label_2[b, i, j]].log().item()
                total -= logits_2[b, :, i, j].softmax(0)[label_1[b, i, j]].log().item()
    found = cps.cps_loss(logits_1, logits_2, label_1, label_2).item()
    assert found == pytest.approx(total / 40, rel=1e-5)


def test_eq1_cps_loss_gradient():
    """Each network learns from the other's labels alone: (P_1 - onehot Ŷ_2) / N."""
    logits_1, logits_2 = (torch.randn(1, 3, 2, 2, requires_grad=True) for _ in range(2))
    label_1, label_2 = logits_1.argmax(1), logits_2.argmax(1)
    cps.cps_loss(logits_1, logits_2, label_1, label_2).backward()
    for logits, label in ((logits_1, label_2), (logits_2, label_1)):
        onehot = torch.nn.functional.one_hot(label, 3).movedim(-1, 1)
        torch.testing.assert_close(logits.grad, (logits.detach().softmax(1) - onehot) / 4)


# Checks of the CutMix equations, which cps.py and ucmt.py both have; method: one of these modules.

def check_cutmix_mask_naive_loop(method):
    """The same random numbers, box by box and pixel by pixel."""
    torch.manual_seed(3)
    mask = method.cutmix_mask(2, 24, 16, 3, (0.25, 0.5), "cpu")
    torch.manual_seed(3)
    share = torch.empty(2, 1).uniform_(0.25, 0.5)
    aspect, top, left = torch.empty(2, 3).uniform_(-0.5, 0.5), torch.rand(2, 3), torch.rand(2, 3)
    expected = torch.zeros(2, 24, 16, dtype=torch.bool)
    for b in range(2):
        for k in range(3):
            side = math.sqrt(share[b].item() / 3)
            h = min(24, 24 * side * math.exp(aspect[b, k]))
            w = min(16, 16 * side * math.exp(-aspect[b, k]))
            y0, x0 = top[b, k].item() * (24 - h), left[b, k].item() * (16 - w)
            for i in range(24):
                for j in range(16):
                    if y0 <= i + 0.5 < y0 + h and x0 <= j + 0.5 < x0 + w:
                        expected[b, i, j] = True
    assert torch.equal(mask, expected) and mask.any()


def check_cutmix_mask_area(method):
    torch.manual_seed(0)
    one = method.cutmix_mask(200, 64, 64, 1, (0.25, 0.5), "cpu").float().mean((1, 2))
    assert 0.22 < one.min() < 0.3 and 0.45 < one.max() < 0.53  # one box: the share that was drawn
    three = method.cutmix_mask(200, 64, 64, 3, (0.25, 0.5), "cpu").float().mean((1, 2))
    assert three.max() < 0.53 and 0.2 < three.mean() < 0.375  # overlap makes the union smaller
    assert len(set(three.tolist())) > 100  # another mask for each image


def check_cutmix_by_hand(method):
    x = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 2, 2)  # image b holds b everywhere
    mask = torch.tensor([[True, False], [False, False]]).expand(3, 2, 2)
    mixed = method.cutmix(x, mask)
    assert mixed[:, 0, 0, 0].tolist() == [2, 0, 1] and mixed[:, 1, 1, 1].tolist() == [0, 1, 2]
    labels = method.cutmix(x[:, 0].long(), mask)
    assert torch.equal(labels, mixed[:, 0].long())  # image and label map stay aligned
    assert torch.equal(method.cutmix(x, mask & False), x)


def check_cutmix_naive_loop(method):
    x, mask = torch.rand(4, 2, 5, 6), torch.rand(4, 5, 6) < 0.5
    mixed = method.cutmix(x, mask)
    for b in range(4):
        for i in range(5):
            for j in range(6):
                source = b
                if mask[b, i, j]:
                    source = (b - 1) % 4
                assert torch.equal(mixed[b, :, i, j], x[source, :, i, j])


def test_eq2_cutmix_mask_naive_loop():
    check_cutmix_mask_naive_loop(cps)


def test_eq2_cutmix_mask_area():
    check_cutmix_mask_area(cps)


def test_eq3_cutmix_by_hand():
    check_cutmix_by_hand(cps)


def test_eq3_cutmix_naive_loop():
    check_cutmix_naive_loop(cps)


@pytest.mark.parametrize("more, lam", [
    ((), 0.3), (("--no-cutmix",), 0.3), (("--weight", "3"), 3.0)])
def test_eq4_main_total_objective(options, more, lam):
    rows = rows_of(cps.main(options(*more, "--val-every", "1", steps=2))["folder"])
    assert len(rows) == 2
    for row in rows:
        assert row["lam"] == pytest.approx(lam) and row["cps"] > 0
        assert row["loss"] == pytest.approx(row["sup"] + row["lam"] * row["cps"], rel=1e-5)


def test_without_cutmix_labelled_images_count_too(options):
    """In the first step both runs have the same networks and images, one has about twice L_cps."""
    argv = options("--val-every", "1", steps=1)
    [mixed] = rows_of(cps.main(argv)["folder"])
    [plain] = rows_of(cps.main([*argv, "--no-cutmix"])["folder"])
    assert 1.5 < plain["cps"] / mixed["cps"] < 2.5


def test_without_cutmix_the_preview_shows_none():
    networks, x = cps.build(1, 3, 4), torch.rand(2, 1, 16, 16)
    titles = {mix: " ".join(cps.pictures(networks, x, mix)) for mix in (True, False)}
    assert "CutMix" in titles[True] and "its labels" in titles[True]
    assert "disagreement" in titles[False] and "CutMix" not in titles[False]


def test_both_networks_differ_from_the_start_and_learn(options):
    torch.manual_seed(0)
    first = {name: network.state_dict() for name, network in cps.build(1, 4, 4).items()}
    assert not torch.equal(first["network 1"]["head.weight"], first["network 2"]["head.weight"])
    results = cps.main(options(steps=2))  # its seed is 0 too
    assert list(results["networks"]) == ["network 1", "network 2", "ensemble"]
    last = last_of(Path(results["folder"]))["networks"]
    for name, weights in first.items():
        change = (last[name]["head.weight"] - weights["head.weight"]).abs()
        assert 0 < change.max() < 0.01


def test_ensemble_is_the_mean_of_both():
    networks = cps.build(1, 3, 4)
    probs = cps.predict(networks, torch.rand(2, 1, 16, 16))
    torch.testing.assert_close(probs["ensemble"], (probs["network 1"] + probs["network 2"]) / 2)
    torch.testing.assert_close(probs["ensemble"].sum(1), torch.ones(2, 16, 16))
