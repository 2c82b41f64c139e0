"""Networks in 8-bit integers: every operation on codes against torch's own on the values that the codes stand for."""

import copy
import dataclasses
from collections import defaultdict, deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from real_data import REAL_CAMVID, needs_camvid
from torch import nn

from segdeconv import models
from segdeconv.checkpoints import checkpoint
from segdeconv.errors import UsageError
from segdeconv.evaluation.quantization import calibrate
from segdeconv.inference.codes import Codes, QuantizedConv, QuantizedEnlarge, QuantizedMaxPool, QuantizedUnpool, affine
from segdeconv.inference.network import Network, prepare_for_inference
from segdeconv.inference.predictors import PredictionSettings
from segdeconv.inference.quantization import _as_conv, is_supported, measure_ranges, quantize
from segdeconv.inference.segmenter import Segmenter
from segdeconv.switches.modules import MaxPool, Unpool

pytestmark = pytest.mark.skipif(not is_supported(), reason="torch has no integer convolutions for this machine")
CPU = torch.device("cpu")


def random_codes(*shape, zero_point=37, scale=0.05, most=255, seed=0):
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, most + 1, shape, dtype=torch.uint8, generator=random)
    return Codes(codes.contiguous(memory_format=torch.channels_last), scale, zero_point, ())


LAYERS = {
    "3x3": lambda: nn.Conv2d(5, 7, 3, padding=1),
    "1x1 without bias": lambda: nn.Conv2d(5, 7, 1, bias=False),
    "7x7": lambda: nn.Conv2d(5, 7, 7, padding=3),
    "dilated": lambda: nn.Conv2d(5, 7, 3, padding=12, dilation=12),
    "strided": lambda: nn.Conv2d(5, 7, 3, padding=1, stride=2),
    "grouped": lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(5, 7, 3, padding=1),
    "transposed 7x7": lambda: nn.ConvTranspose2d(5, 7, 7),
    "up": lambda: nn.ConvTranspose2d(5, 7, 2, stride=2),
}


@pytest.mark.parametrize("zero_point", [0, 37])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_convolution_is_that_of_the_values_rounded_to_its_codes(name, relu, zero_point):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    conv = _as_conv(layer)
    with torch.no_grad():  # filters of which 8 bits are exact, so that only the result is rounded
        step = 0.01
        layer.weight.copy_((layer.weight / layer.weight.abs().amax() * 60).round() * step)
        rebuilt = _as_conv(layer)
        rebuilt.weight[:, :2, 0, 0] = torch.tensor([127 * step, 0])
        if conv is layer:
            layer.weight.copy_(rebuilt.weight)
        else:  # the same change seen through the rearrangement
            probe = LAYERS[name]()
            index = torch.arange(probe.weight.numel(), dtype=torch.float32).reshape(probe.weight.shape)
            probe.weight.copy_(index)
            moved = _as_conv(probe).weight[:, :2, 0, 0].long()
            layer.weight.view(-1)[moved] = torch.tensor([127 * step, 0])
    x = random_codes(2, layer.in_channels, 9, 11, zero_point=zero_point)
    with torch.inference_mode():
        expected = layer(x.values())
        expected = expected.relu() if relu else expected
        low, high = float(expected.min()), float(expected.max())
        quantized = QuantizedConv(_as_conv(layer), {"input": [0, 1], "output": [low, high]}, relu=relu)
        module = QuantizedEnlarge(quantized, 2) if name == "up" else quantized
        result = module(x)
        scale, _ = affine((min(low, 0.0), high))
        assert result.codes.dtype == torch.uint8
        # Half a step of rounding, and another half since the zero point is a whole code.
        assert float((result.values() - expected).abs().max()) <= 1.01 * scale
        assert float((result.values() - expected).abs().mean()) <= 0.3 * scale
        quantized.as_float = True
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("pattern", ["equal", "alternating", "random"])
@pytest.mark.parametrize(
    ("channels", "kernel", "groups"), [(3, 3, 1), (16, 3, 1), (21, 3, 1), (64, 1, 1), (32, 7, 1), (8, 3, 2)]
)
def test_sums_of_the_largest_codes_are_exact(channels, kernel, groups, pattern):
    # On processors without VNNI, pairs of products are added in 16 bits; see filter_scales.
    random = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(channels, 8, kernel, padding=kernel // 2, groups=groups, bias=False)
    with torch.no_grad():
        if pattern == "random":
            conv.weight.copy_(torch.randn(conv.weight.shape, generator=random))
        else:
            conv.weight.fill_(1.0)
            conv.weight[:, ::2] *= -1 if pattern == "alternating" else 1
    codes = torch.full((1, channels, 9, 11), 255, dtype=torch.uint8)
    codes[:, :, 4:] = torch.randint(0, 256, codes[:, :, 4:].shape, dtype=torch.uint8, generator=random)
    module = QuantizedConv(conv, {"input": [0, 255], "output": [0, 1]}, relu=False)
    module.as_float = True
    with torch.inference_mode():
        result = module(Codes(codes.contiguous(memory_format=torch.channels_last), 1.0, 0, ()))
        filters = module.filters.double() * module.filter_scale.double()[:, None, None, None]
        expected = F.conv2d(codes.double(), filters, padding=kernel // 2, groups=groups)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("size", [(8, 10), (7, 9), (1, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_pooling_and_unpooling_codes_is_that_of_their_values(size, packed):
    x = random_codes(2, 6, *size, most=9)  # few codes, so that there are ties
    pool, unpool = MaxPool(1, packed=packed), Unpool(1)
    expected, result = pool(x.values()), QuantizedMaxPool(pool)(x)
    torch.testing.assert_close(result.features.values(), expected.features)
    torch.testing.assert_close(result.switches, expected.switches)
    assert result.size == expected.size
    placed = QuantizedUnpool(unpool)(result.features, result.switches, result.size)
    torch.testing.assert_close(placed.values(), unpool(expected.features, expected.switches, expected.size))
    pooled = F.max_pool2d(x, 2, ceil_mode=True)
    assert isinstance(pooled, Codes)
    torch.testing.assert_close(pooled.values(), F.max_pool2d(x.values(), 2, ceil_mode=True))


FUNCTIONS = {
    "relu": (torch.relu, True),
    "crop": (lambda x: F.pad(x, (-1, -2, 0, -1)), True),
    "cat": (lambda x: torch.cat([x, x], dim=1), True),
    "dropout": (lambda x: F.dropout(x, 0.5, training=False), True),
    "pad": (lambda x: F.pad(x, (1, 1, 1, 1)), False),
    "add": (lambda x: x + x, False),
    "interpolate": (lambda x: F.interpolate(x, size=(9, 9), mode="bilinear"), False),
    "pool 3": (lambda x: F.max_pool2d(x, 3, stride=1), False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_get_codes_or_values(name):
    function, on_codes = FUNCTIONS[name]
    x = random_codes(1, 4, 6, 8)
    result = function(x)
    assert isinstance(result, Codes) == on_codes
    torch.testing.assert_close(result.values() if on_codes else result, function(x.values()))


NETWORKS = {
    "SegNet": lambda: models.SegNet(5, width=0.125),
    "SegNet with addition": lambda: models.SegNet(5, width=0.125, encoder_addition=True),
    "SegNet with concatenation": lambda: models.SegNet(5, width=0.125, encoder_concatenation=True),
    "SegNet-Basic": lambda: models.SegNetBasic(5),
    "U-Net": lambda: models.UNet(5, width=0.125),
    "FCN": lambda: models.FCN(5, width=0.125, fc_width=32),
    "FPN": lambda: models.FPN(5, width=0.125),
}


def rounded(values, scale, zero_point):
    return ((values / scale).round() + zero_point).clamp(0, 255).sub(zero_point).mul(scale)


def rounds_every_map(network, quantized, image):
    """Check each convolution of a quantised network, and what lies between two, in float64 on the codes before it.

    Small differences would otherwise grow: a rounded half goes either way, and so does the switch of a tie.

    Returns:
        The share of codes that differ, by one at most.
    """
    recorded, total, unequal = defaultdict(deque), 0, 0  # a head that levels share is called for each
    network = copy.deepcopy(network).double()

    def compare(values, expected, scale):
        nonlocal total, unequal
        codes = ((values - expected) / scale).round().abs()
        assert codes.max() <= 1
        total, unequal = total + codes.numel(), unequal + int(codes.sum())

    def values_of(codes):
        return (codes.values() if isinstance(codes, Codes) else codes).double()

    for name, conv in quantized.named_modules():
        if not isinstance(conv, QuantizedConv):
            continue
        parent = name.rpartition(".")[0]
        if isinstance(quantized.get_submodule(parent), QuantizedEnlarge):
            name = parent
            layer = network.get_submodule(name)
            filters = conv.filters[..., 0, 0] * conv.filter_scale.double()[:, None]
            layer.weight.data = filters.T.reshape(layer.weight.shape)
        else:
            layer = network.get_submodule(name)
            layer.weight.data = conv.filters * conv.filter_scale.double()[:, None, None, None]

        def record(module, inputs, output, name=name, conv=conv):
            codes = inputs[0]
            grid = (codes.scale, codes.zero_point) if isinstance(codes, Codes) else affine(conv.input_range)
            recorded[name].append((rounded(values_of(codes), *grid), grid, values_of(output)))

        def before(module, inputs, name=name):
            expected, grid, _ = recorded[name][0]
            compare(rounded(inputs[0], *grid), expected, grid[0])
            return (expected,)

        def after(module, inputs, output, name=name, conv=conv):
            _, _, expected = recorded[name].popleft()
            output = output.relu() if conv.relu else output
            if conv.as_float:
                torch.testing.assert_close(expected, output, rtol=1e-4, atol=1e-4 * float(output.abs().max()))
            else:
                compare(rounded(output, *affine(conv.output_range)), expected, affine(conv.output_range)[0])
            return expected

        quantized.get_submodule(name).register_forward_hook(record)
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)
    result = quantized(image)
    torch.testing.assert_close(
        network(image.double()).float(), result, rtol=1e-4, atol=1e-4 * float(result.abs().max())
    )
    return unequal / total


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compute_what_rounding_every_map_gives(name):
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    if name == "FCN":  # its scores begin at zero
        for score in (model.score, *model.skips.values()):
            nn.init.normal_(score.weight)
    network = prepare_for_inference(model, CPU, "32-true")
    images = [torch.randn(1, 3, 65, 97) for _ in range(2)]
    quantized = quantize(network, measure_ranges(network, images))
    assert not any(isinstance(layer, nn.Conv2d) for layer in quantized.modules())
    with torch.inference_mode():
        result = quantized(images[0])
        assert result.dtype == torch.float32
        if not any(isinstance(layer, Unpool) for layer in network.modules()):
            assert float((result - network(images[0])).norm() / network(images[0]).norm()) < 0.1
        assert rounds_every_map(network, quantized, images[0]) < 0.0001


def test_ranges_of_another_network_are_refused():
    network = prepare_for_inference(models.SegNet(5, width=0.125), CPU, "32-true")
    with pytest.raises(UsageError, match="the ranges lack"):
        quantize(network, {})


@pytest.mark.parametrize("name", ["samples", "second"])
def test_settings_that_need_floats_are_refused(name):
    value = 4 if name == "samples" else checkpoint.read("camvid-basic")
    with pytest.raises(UsageError, match=f"^{name} is not supported in precision int8"):
        PredictionSettings(precision="int8", **{name: value})


def test_other_devices_are_refused():
    with pytest.raises(UsageError, match="precision=int8 is for CPUs"):
        Network.of(checkpoint.read("camvid-small"), device=torch.device("meta"), precision="int8")


def test_the_shipped_network_predicts_in_integers_without_its_data():
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    segmenter = Segmenter(checkpoint.read("camvid-small"), PredictionSettings(precision="int8"))
    assert any(isinstance(layer, QuantizedConv) for layer in segmenter.network.model.modules())
    assert segmenter.predict(image).mask.shape == (64, 96)


@needs_camvid
def test_the_shipped_network_gives_nearly_the_same_masks():
    source = checkpoint.read("camvid-small")
    files = sorted((REAL_CAMVID / "val").glob("*.png"))[::50]
    masks = [
        [Segmenter(source, PredictionSettings(precision=precision)).predict(file).mask for file in files]
        for precision in ("32-true", "int8")
    ]
    assert np.mean(np.array(masks[0]) == np.array(masks[1])) > 0.98


def test_a_loss_beyond_the_limit_is_refused():
    source = checkpoint.read("camvid-small")
    lines = []
    assert calibrate(source, report=lines.append).loss < 0.3
    assert lines[0].startswith(f"int8: mIoU {100 * source.facts['int8']['int8']:.2f} %")
    worse = {**source.facts["int8"], "int8": source.facts["int8"]["float32"] - 0.006}
    source = dataclasses.replace(source, facts={**source.facts, "int8": worse})
    with pytest.raises(UsageError, match=r"8 bits cost 0.60 points of mIoU, more than 0.5"):
        calibrate(source)
    assert calibrate(source, max_loss=1).loss == pytest.approx(0.6)
