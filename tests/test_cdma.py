"""Every equation and module of cdma.py: by hand, by a naive loop, in closed form; gradients."""
import math

import pytest
import torch
from make_traces import rows_of

import cdma
from common import Decoder, Encoder, UNet


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_channel_attention_naive_loop():
    module, x = cdma.ChannelAttention(32), torch.randn(2, 32, 3, 5)
    assert module.mlp[0].weight.shape == (2, 32, 1, 1)  # C / 16
    first, second = module.mlp[0].weight[:, :, 0, 0], module.mlp[2].weight[:, :, 0, 0]
    found = module(x)
    for b in range(2):
        total = [0.0] * 32
        for pooled in (x[b].mean((1, 2)).tolist(), x[b].amax((1, 2)).tolist()):
            hidden = []
            for i in range(2):
                z = sum(first[i, c].item() * pooled[c] for c in range(32))
                hidden.append(max(0.0, z))
            for c in range(32):
                total[c] += sum(second[c, i].item() * hidden[i] for i in range(2))
        for c in range(32):
            expected = x[b, c] * sigmoid(total[c])
            torch.testing.assert_close(found[b, c], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels, hidden", [(4, 1), (16, 1), (48, 3)])
def test_channel_attention_hidden_width(channels, hidden):
    assert cdma.ChannelAttention(channels).mlp[0].out_channels == hidden


def test_spatial_attention_naive_loop():
    module, x = cdma.SpatialAttention(), torch.randn(2, 3, 4, 6)
    weight, found = module.conv.weight[0], module(x)
    for b in range(2):
        for i in range(4):
            for j in range(6):
                z = 0.0
                for di in range(-3, 4):
                    for dj in range(-3, 4):
                        if 0 <= i + di < 4 and 0 <= j + dj < 6:
                            pixel = x[b, :, i + di, j + dj]
                            z += weight[0, di + 3, dj + 3].item() * pixel.mean().item()
                            z += weight[1, di + 3, dj + 3].item() * pixel.max().item()
                expected = x[b, :, i, j] * sigmoid(z)
                torch.testing.assert_close(found[b, :, i, j], expected, rtol=1e-4, atol=1e-5)


def test_csa_is_channel_then_spatial_attention():
    both, x = cdma.attention("CSA", 16), torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(both(x), both[1](both[0](x)))
    assert isinstance(both[0], cdma.ChannelAttention) and isinstance(both[1], cdma.SpatialAttention)
    assert isinstance(cdma.attention("CA", 16), cdma.ChannelAttention)
    assert isinstance(cdma.attention("SA", 16), cdma.SpatialAttention)


def parts_of(named_parameters):
    """{"encoder.blocks", "heads.CA", ...}: the first two words of parameters' names."""
    return {".".join(name.split(".")[:2]) for name, _ in named_parameters}


def test_three_branches_share_the_encoder_alone():
    network = cdma.build(1, 3, 4)["three branches"]
    logits = network(torch.rand(2, 1, 32, 32))
    assert list(logits) == ["CSA", "CA", "SA"]
    assert all(z.shape == (2, 3, 32, 32) for z in logits.values())
    logits["CA"].sum().backward()
    moved = parts_of((name, p) for name, p in network.named_parameters() if p.grad is not None)
    encoder = parts_of((f"encoder.{name}", p) for name, p in network.encoder.named_parameters())
    assert moved == encoder | {"decoders.CA", "attentions.CA", "heads.CA"}


def test_decoders_start_from_weights_of_their_own_and_attention_has_no_biases():
    network = cdma.build(1, 3, 4)["three branches"]
    first = [decoder.blocks[0].up.weight for decoder in network.decoders.values()]
    assert not first[0].equal(first[1]) and not first[1].equal(first[2])
    assert not first[0].equal(first[2])
    assert not any("bias" in name for name, _ in network.attentions.named_parameters())


def test_attention_follows_every_decoder_block_but_the_finest():
    """A branch, written out: each stage's block, then its attention, but for the last stage."""
    encoder, decoders = Encoder(1, 4), [Decoder(4) for _ in range(3)]
    network = cdma.ThreeBranches(encoder, decoders, [32, 16, 8, 4], 2).eval()
    x = torch.rand(1, 1, 32, 32)
    features = encoder(x)
    for branch, decoder in zip(("CSA", "CA", "SA"), decoders, strict=True):
        z = features[4]
        for stage in range(4):
            z = decoder.blocks[stage](z, features[3 - stage])
            if stage < 3:
                z = network.attentions[branch][stage](z)
        assert len(network.attentions[branch]) == 3
        torch.testing.assert_close(network(x)[branch], network.heads[branch](z))


def test_eq1_kd_loss_by_hand():
    # one pixel, T = 2: P_t = (0.9, 0.1), P_s = (0.5, 0.5)
    z_t = 2 * torch.tensor([0.9, 0.1]).log().view(1, 2, 1, 1)
    z_s = 2 * torch.tensor([0.5, 0.5]).log().view(1, 2, 1, 1)
    kl = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert cdma.kd_loss(z_s, z_t, 2).item() == pytest.approx(4 * kl, rel=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_eq1_kd_loss_naive_loop(classes):
    z_s, z_t = torch.randn(2, classes, 3, 4), torch.randn(2, classes, 3, 4)
    total = 0.0
    for b in range(2):
        for i in range(3):
            for j in range(4):
                p, q = (z_t[b, :, i, j] / 10).softmax(0), (z_s[b, :, i, j] / 10).softmax(0)
                for c in range(classes):
                    total += p[c].item() * math.log(p[c].item() / q[c].item())
    assert cdma.kd_loss(z_s, z_t, 10).item() == pytest.approx(100 * total / 24, rel=1e-3)
    assert cdma.kd_loss(z_s, z_s, 10).item() == 0
    same_probabilities = z_s + 3
    assert cdma.kd_loss(z_s, same_probabilities, 10).item() == pytest.approx(0, abs=1e-4)
    assert cdma.kd_loss(z_s, z_t, 10).item() > 0


def test_eq1_kd_loss_temperature_scaling():
    """T² keeps the gradient: for large T it tends to (z_s - z_t, centred) / C, whatever T."""
    z_t, z = torch.randn(1, 4, 1, 1), torch.randn(1, 4, 1, 1)
    for temperature in (50.0, 500.0):
        z_s = z.clone().requires_grad_()
        cdma.kd_loss(z_s, z_t, temperature).backward()
        difference = z - z_t
        expected = (difference - difference.mean()) / 4
        torch.testing.assert_close(z_s.grad, expected, rtol=0.1, atol=2e-2)


def test_eq1_kd_loss_gradient_in_the_student_alone():
    z_s = torch.randn(2, 3, 4, 4, requires_grad=True)
    z_t = torch.randn(2, 3, 4, 4, requires_grad=True)
    cdma.kd_loss(z_s, z_t, 10).backward()
    assert z_t.grad is None
    difference = (z_s / 10).softmax(1) - (z_t / 10).softmax(1)
    expected = 10 * difference / 32  # T² · (1/T) (P_s - P_t) / pixels
    torch.testing.assert_close(z_s.grad, expected, rtol=1e-3, atol=1e-6)


def test_eq2_cdkd_loss_naive_loop_and_gradient():
    z = [torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(3)]
    loss = cdma.cdkd_loss(z, 10)
    total = 0.0
    for s in range(3):
        for t in range(3):
            if s != t:
                total += cdma.kd_loss(z[s], z[t], 10).item()
    assert loss.item() == pytest.approx(total / 3, rel=1e-5)
    loss.backward()
    p = [(x.detach() / 10).softmax(1) for x in z]
    for s in range(3):  # each branch is moved as a student of the two others, not as their teacher
        expected = 10 / 3 * (2 * p[s] - p[(s + 1) % 3] - p[(s + 2) % 3]) / 32
        torch.testing.assert_close(z[s].grad, expected, rtol=1e-3, atol=1e-6)
    assert cdma.cdkd_loss([z[0]] * 3, 10).item() == 0


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_eq3_um_loss_bounds(classes):
    zeros = torch.zeros(2, classes, 3, 3)
    assert cdma.um_loss([zeros] * 3).item() == pytest.approx(1)  # H = log C
    label = torch.randint(classes, (2, 3, 3))
    sure = 100 * torch.nn.functional.one_hot(label, classes).movedim(-1, 1).float()
    assert cdma.um_loss([sure] * 3).item() == pytest.approx(0, abs=1e-6)
    other = sure.roll(1, 1)  # each sure, but of different classes: the mean is not
    mean = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(classes)
    assert cdma.um_loss([sure, sure, other]).item() == pytest.approx(mean, rel=1e-4)


def test_eq3_um_loss_naive_loop_and_gradient():
    z = [torch.randn(2, 3, 2, 4, requires_grad=True) for _ in range(3)]
    loss, total = cdma.um_loss(z), 0.0
    for b in range(2):
        for i in range(2):
            for j in range(4):
                mean = sum(x[b, :, i, j].softmax(0) for x in z) / 3
                total -= sum(m.item() * math.log(m.item()) for m in mean)
    assert loss.item() == pytest.approx(total / 16 / math.log(3), rel=1e-5)
    loss.backward()
    assert all(x.grad.any() for x in z)
    sure = [torch.tensor([200.0, 0.0]).view(1, 2, 1, 1).requires_grad_() for _ in range(3)]
    cdma.um_loss(sure).backward()
    assert all(x.grad.isfinite().all() for x in sure)  # a probability of 0 spoils no gradient


def test_eq4_main_total_objective(options):
    weights = ["--distill-weight", "0.3", "--entropy-weight", "0.7"]
    rows = rows_of(cdma.main(options(*weights, "--val-every", "1", steps=10))["folder"])
    assert [row["lam"] for row in rows] == [0.0] + [1.0] * 9  # off for the first 10% of the steps
    for row in rows:
        unsupervised = 0.3 * row["cdkd"] + 0.7 * row["um"]
        assert row["loss"] == pytest.approx(row["sup"] + row["lam"] * unsupervised, rel=1e-5)


def test_a_temperature_of_zero_is_refused(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        cdma.main(options("--temperature", "0"))
    assert stopped.value.code == 2 and "at least 0.01 is needed" in capsys.readouterr().err


def test_every_branch_and_the_mean_are_reported_csa_is_the_headline(options):
    results = cdma.main(options(steps=2))
    assert list(results["networks"]) == ["CSA", "CA", "SA", "mean"]
    assert results["headline"]["network"] == "CSA"


def test_three_branches_have_the_weights_of_1_8_networks():
    """As the card says, at the default width."""
    three = cdma.build(1, 4, 32)["three branches"]
    weights = sum(p.numel() for p in three.parameters())
    of_one = sum(p.numel() for p in UNet(1, 4, 32).parameters())
    assert weights / of_one == pytest.approx(1.8, abs=0.05)


def test_mean_is_the_mean_of_the_branches():
    networks = cdma.build(1, 3, 4)
    csa, ca, sa, mean = cdma.predict(networks, torch.rand(2, 1, 16, 16)).values()
    torch.testing.assert_close(mean, (csa + ca + sa) / 3)
    torch.testing.assert_close(mean.sum(1), torch.ones(2, 16, 16))
