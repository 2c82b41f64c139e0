"""Soft switches compared with torch's softmax over windows, and their way to hard ones."""

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import config

from segdeconv.models import DeconvNet, SegNet, SegNetBasic
from segdeconv.switches import max_pool, unpool
from segdeconv.switches.modules import HARD_FROM, MaxPool, SoftMaxPool, Unpool
from segdeconv.switches.soft import soft_switches, soft_unpool
from segdeconv.train import train

NETWORKS = {
    "SegNet": lambda **options: SegNet(3, stages=((4,), (8,)), **options),
    "SegNetBasic": lambda **options: SegNetBasic(3, width=4, **options),
    "DeconvNet": lambda **options: DeconvNet(3, width=0.0625, fc_width=8, depth=11, **options),
}


def reference(x, temperature):
    """Return the softmax over windows, window by window."""
    height, width = x.shape[-2:]
    padded = F.pad(x / temperature, (0, width % 2, 0, height % 2), value=-torch.inf)
    windows = padded.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).movedim(-3, -2)  # (N, C, h, w, 2, 2)
    weights = windows.flatten(-2).softmax(dim=-1).view_as(windows)
    return weights.movedim(-2, -3).flatten(-4, -3).flatten(-2)[..., :height, :width]


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 1)])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_soft_switches_and_their_gradient_are_those_of_a_softmax_over_each_window(size, temperature):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, requires_grad=True)
    factors = torch.randn(2, 3, *size)
    expected = reference(x, temperature)
    weights = soft_switches(x, max_pool(x).features, torch.tensor(temperature))
    torch.testing.assert_close(weights, expected)
    gradients = [torch.autograd.grad((map_ * factors).sum(), x)[0] for map_ in (weights, expected)]
    torch.testing.assert_close(*gradients)
    assert bool(gradients[0].any()) == (size != (1, 1))


def test_a_value_is_spread_over_its_window():
    x, weights = torch.randn(2, 3, 2, 3), torch.rand(2, 3, 3, 6)
    spread = soft_unpool(x, weights)
    for row in range(3):
        for column in range(6):
            expected = x[:, :, row // 2, column // 2] * weights[:, :, row, column]
            torch.testing.assert_close(spread[:, :, row, column], expected)


def test_at_a_low_temperature_soft_switches_are_hard_ones():
    x = torch.randn(1, 2, 7, 6)
    pooling = max_pool(x)
    spread = soft_unpool(pooling.features, soft_switches(x, pooling.features, 1e-6))
    torch.testing.assert_close(spread, unpool(pooling.features, pooling.switches, pooling.size))


def test_the_temperature_falls_linearly_and_pools_become_hard():
    pool, x = SoftMaxPool(1), torch.randn(1, 2, 5, 6)
    for progress, temperature in ((0, 1), (HARD_FROM / 2, 0.5), (HARD_FROM * 0.9, 0.1)):
        pool.set_progress(progress)
        expected = reference(x, temperature)
        torch.testing.assert_close(pool(x).switches, expected, rtol=1e-4, atol=1e-5)
    pool.set_progress(HARD_FROM)
    assert torch.equal(pool(x).switches, MaxPool(1)(x).switches)
    pool.set_progress(0)
    assert torch.equal(pool.eval()(x).switches, MaxPool(1)(x).switches)
    assert not pool.state_dict()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_soft_in_training_only_and_hard_in_its_last_quarter(name):
    torch.manual_seed(0)
    soft, hard = NETWORKS[name](switch_source="soft"), NETWORKS[name]()
    hard.load_state_dict(soft.state_dict())
    image = torch.randn(2, 3, *((225, 229) if name == "DeconvNet" else (33, 47)))
    spread = soft(image)
    assert not torch.allclose(spread, hard(image))
    for pool in soft.encoder.pools:
        pool.set_progress(HARD_FROM)
    assert torch.equal(soft(image), hard(image))
    for pool in soft.encoder.pools:
        pool.set_progress(0)
    hard.load_state_dict(soft.state_dict())  # the running statistics of soft passes
    with torch.no_grad():
        assert torch.equal(soft.eval()(image), hard.eval()(image))


def test_the_encoder_gets_a_gradient_through_the_switches_alone():
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    pooling = SoftMaxPool(1)(x)
    Unpool(1)(torch.ones(1, 2, 3, 3), pooling.switches, pooling.size).square().sum().backward()
    assert x.grad.abs().min() > 0


def test_training_sets_the_temperature_of_every_step(tmp_path, monkeypatch):
    progress = []
    original = SoftMaxPool.set_progress
    monkeypatch.setattr(SoftMaxPool, "set_progress", lambda pool, done: progress.append(done) or original(pool, done))
    nodes = config(trainer__max_steps=4)
    nodes["model"]["switch_source"] = "soft"
    train(nodes, tmp_path / "run")
    assert progress == [done for step in range(4) for done in [step / 4] * 2]
