"""Pooling and unpooling as modules: they compute what the functions do, have a level and hooks, and no state."""

import copy

import pytest
import torch

from segdeconv.models import FCN, DeconvNet, SegNet, SegNetBasic
from segdeconv.switches import MaxPool, Unpool, max_pool, unpool

NETWORKS = {
    "SegNet": lambda: SegNet(2, stages=((4,), (4, 6), (6,))),
    "SegNetBasic": lambda: SegNetBasic(2, width=4),
    "DeconvNet": lambda: DeconvNet(2, depth=11, width=0.0625, fc_width=8),
    "FCN": lambda: FCN(2, depth=11, width=0.0625, fc_width=8),
}


@pytest.mark.parametrize("packed", [False, True])
def test_they_compute_what_the_functions_compute_and_have_no_state(packed):
    x = torch.randn(2, 5, 7, 10)
    pool, inverse = MaxPool(1, packed=packed), Unpool(1)
    expected = max_pool(x, packed=packed)
    pooling = pool(x)
    assert torch.equal(pooling.features, expected.features)
    assert torch.equal(pooling.switches, expected.switches)
    assert torch.equal(inverse(*pooling), unpool(*expected))
    assert not pool.state_dict()
    assert not inverse.state_dict()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_pool_and_its_unpooling_have_the_same_level_and_size(name):
    network = copy.deepcopy(NETWORKS[name]()).eval()
    sizes, levels = {}, []

    def pooled(module, inputs, output):
        sizes[module.level] = output.size

    def unpooled(module, inputs, output):
        levels.append(module.level)
        assert output.shape[-2:] == sizes[module.level]

    for module in network.modules():
        if isinstance(module, MaxPool | Unpool):
            module.register_forward_hook(pooled if isinstance(module, MaxPool) else unpooled)
    side = network.minimum_size
    with torch.no_grad():
        network(torch.randn(1, 3, side, side + 9))
    assert list(sizes) == list(range(1, len(sizes) + 1))
    assert sizes[1] == (side, side + 9)
    assert levels == ([] if name == "FCN" else list(sizes)[::-1])
    assert not [key for key in network.state_dict() if "pools." in key or "unpool" in key]
