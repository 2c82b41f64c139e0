"""The Triton kernels compared bit for bit with torch's pooling and unpooling on the CPU.

test_triton_kernels.py runs this file in its own process: on a GPU if there is one, else in Triton's interpreter, which
has to be selected before Triton is imported.
"""

import pytest
import torch
from test_ops import LAYOUTS, assert_same_bits, gradient_like, places, random_input, torch_pool, torch_unpool

from segdeconv.models import SegNet
from segdeconv.switches import fused, ops, triton_kernels
from segdeconv.switches.ops import max_pool, unpool
from segdeconv.switches.packing import pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _through_the_kernels(monkeypatch):
    monkeypatch.setattr(ops, "_kernels", lambda x: triton_kernels)
    monkeypatch.setattr(fused, "_runs_on_its_device", lambda x: False)  # see fused_stage_cases.py
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", ["no ties", "ties", "minus infinity"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_positions_and_gradients_equal_torch(dtype, layout, kind):
    for size in ((1, 1), (7, 1), (4, 6), (5, 7)):
        x = random_input(kind, size, dtype, layout).to(DEVICE)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        pooling, (features, indices) = max_pool(ours), torch_pool(theirs)
        assert_same_bits(pooling.features, features)
        assert torch.equal(places(pooling.switches, size), indices)
        gradient = gradient_like(features).contiguous(memory_format=layout)
        gradient[0, 0, 0, 0] = -0.0
        pooling.features.backward(gradient.to(DEVICE))
        features.backward(gradient)
        assert_same_bits(ours.grad, theirs.grad)

        ours, theirs = (features.detach().to(place, copy=True).requires_grad_() for place in (DEVICE, "cpu"))
        restored, expected = unpool(ours, pooling.switches, size), torch_unpool(theirs, indices, size)
        assert_same_bits(restored, expected)
        gradient = gradient_like(expected).contiguous(memory_format=layout)
        restored.backward(gradient.to(DEVICE))
        expected.backward(gradient)
        assert_same_bits(ours.grad, theirs.grad)


@pytest.mark.parametrize("channels", [1, 3, 4, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_switches_equal_the_unpacked_ones_and_give_the_same_results(layout, channels):
    for size in ((1, 1), (5, 7), (6, 4)):
        x = torch.randn(2, channels, *size).contiguous(memory_format=layout).to(DEVICE)
        unpacked, packed = max_pool(x), max_pool(x, packed=True)
        assert_same_bits(packed.features, unpacked.features)
        assert torch.equal(packed.switches, pack(unpacked.switches))
        values = torch.randn(unpacked.features.shape).to(DEVICE).contiguous(memory_format=layout)
        placed = (triton_kernels.place(values, pooling.switches, *size) for pooling in (packed, unpacked))
        assert_same_bits(*placed)
        assert_same_bits(triton_kernels.pick(x, packed.switches), triton_kernels.pick(x, unpacked.switches))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", range(4))
def test_a_window_with_a_nan_gives_nan(cell, layout):
    x = torch.randn(1, 2, 5, 5).contiguous(memory_format=layout)
    x[0, 0, 2 + cell // 2, 2 + cell % 2] = float("nan")
    features, codes = triton_kernels.pool(x.to(DEVICE))
    assert features.isnan().nonzero().tolist() == [[0, 0, 1, 1]]
    assert codes.max() <= 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_larger_than_a_tile_have_no_seams(layout):
    x = torch.randn(1, 300, 3, 5) if layout == torch.channels_last else torch.randn(2, 3, 9, 600)
    x = x.double().contiguous(memory_format=layout).to(DEVICE)
    pooling, (features, indices) = max_pool(x), torch_pool(x)
    assert_same_bits(pooling.features, features)
    assert torch.equal(places(pooling.switches, pooling.size), indices)
    restored = unpool(pooling.features, pooling.switches, pooling.size)
    assert_same_bits(restored, torch_unpool(features, indices, pooling.size))
    assert_same_bits(triton_kernels.pick(restored, pooling.switches), features)


def test_other_and_mixed_memory_formats_are_read_correctly():
    base = torch.randn(2, 3, 12, 14).to(DEVICE)
    for x in (base[:, :, ::2, 1::2], base.transpose(2, 3), base[:, 1:2], base[:0], base.permute(1, 0, 2, 3)):
        pooling, (features, indices) = max_pool(x), torch_pool(x.contiguous())
        assert_same_bits(pooling.features, features)
        assert torch.equal(places(pooling.switches, pooling.size), indices)
    x = base.contiguous(memory_format=torch.channels_last)
    pooling = max_pool(x)
    assert pooling.features.is_contiguous(memory_format=torch.channels_last)
    expected = torch_unpool(*torch_pool(base), pooling.size)
    assert_same_bits(unpool(pooling.features.contiguous(), pooling.switches, pooling.size), expected)
    assert_same_bits(unpool(pooling.features, pooling.switches.contiguous(), pooling.size), expected)


def test_deterministic_algorithms_allow_them():
    torch.use_deterministic_algorithms(True)
    try:
        x = torch.randn(1, 2, 5, 7, device=DEVICE, requires_grad=True)
        pooling = max_pool(x)
        unpool(pooling.features, pooling.switches, pooling.size).square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert (x.grad != 0).sum() == pooling.switches.numel()


@pytest.mark.parametrize("packed", [False, True])
def test_a_network_computes_the_same_bits_with_and_without_the_kernels(monkeypatch, packed):
    network = SegNet(3, stages=((4,), (6, 5)), packed_switches=packed).to(DEVICE, memory_format=torch.channels_last)
    image = torch.randn(2, 3, 13, 10).to(DEVICE).contiguous(memory_format=torch.channels_last)

    def gradients():
        network.zero_grad()
        network(image).square().sum().backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    ours = gradients()
    monkeypatch.setattr(ops, "_kernels", lambda x: None)
    for one, other in zip(ours, gradients(), strict=True):
        assert_same_bits(one, other)
