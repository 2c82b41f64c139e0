"""Contributions, checked against finite differences, an explicit affine matrix, and the parts of each network."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segdeconv.analysis.contributions import AffineGraph, non_affine_operations
from segdeconv.models import SegNet, UNet, create_model, list_models
from segdeconv.models.layers import fold_norms

FLOAT64 = torch.float64


def randomised(network):
    """Give every norm and bias values that matter, and return the network in evaluation mode."""
    generator = torch.Generator().manual_seed(7)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 2, generator=generator)
                module.bias.data.normal_(generator=generator)
        elif isinstance(getattr(module, "bias", None), nn.Parameter):
            module.bias.data.normal_(std=0.3, generator=generator)
        if isinstance(module, nn.Conv2d) and not module.weight.data.any():
            module.weight.data.normal_(std=0.1, generator=generator)  # FCN's scores start at zero
    return network.eval()


def segnet(dtype=FLOAT64, **arguments):
    torch.manual_seed(0)
    return randomised(SegNet(3, stages=((4, 4), (6,)), **arguments)).to(dtype)


def image(height=9, width=11, dtype=FLOAT64, seed=1):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_contributions_equal_a_matrix_of_finite_differences_and_the_rest():
    """Within a region of constant switches and signs, differences of outputs are the columns of the affine map."""
    network, x = segnet(), image()
    graph = AffineGraph(network, x)
    found = graph.contributions(graph.logits[0, 1, 4, 5])
    step = 1e-7  # small enough that no switch and no sign changes, for this seed
    with torch.no_grad():
        value = network(x)[0, 1, 4, 5]
        moved = x + step * torch.eye(x.numel(), dtype=FLOAT64).view(-1, *x.shape[1:])  # one pixel and channel each
        slopes = (network(moved)[:, 1, 4, 5] - value) / step
    expected = slopes.view(x.shape[1:]) * x[0]
    torch.testing.assert_close(found.pixels, expected, rtol=1e-5, atol=1e-6)
    assert found.value == float(value)
    assert found.from_biases == pytest.approx(float(value - expected.sum()), abs=1e-4)
    assert found.exact
    assert found.magnitude > abs(found.value)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("switch_source", ["pre_relu", "post_relu"])
def test_the_contribution_of_each_bias_equals_a_finite_difference(folded, switch_source):
    network, x = segnet(switch_source=switch_source), image()
    network = fold_norms(network) if folded else network
    graph = AffineGraph(network, x)
    found = graph.contributions(graph.logits[0, 1, 4, 5] - graph.logits[0, 2, 4, 5])
    modules = dict(network.named_modules())

    def value():
        with torch.no_grad():
            logits = network(x)[0, :, 4, 5]
        return float(logits[1] - logits[2])

    step, before = 1e-7, value()
    assert len(found.biases) == (6 if folded else 11)
    for share in found.biases:
        module = modules[share.operation.partition(" ")[0]]
        bias = module.bias.data
        shift = bias.clone()
        if isinstance(module, nn.BatchNorm2d):
            shift -= module.running_mean * module.weight.data / torch.sqrt(module.running_var + module.eps)
        own = bias.clone()
        bias += step * shift  # the value changes by step times the contribution
        assert (value() - before) / step == pytest.approx(share.total, rel=1e-4, abs=1e-5)
        bias.copy_(own)


def test_what_passes_through_each_pool_and_unpooling_adds_up_with_later_biases():
    network, x = segnet(), image()
    graph = AffineGraph(network, x)
    found = graph.contributions(graph.logits[0, 0].sum())
    assert [map_.name for map_ in found.maps] == ["pool 1", "pool 2", "unpool 2", "unpool 1"]
    assert [tuple(map_.values.shape) for map_ in found.maps] == [(9, 11), (5, 6), (5, 6), (9, 11)]
    for map_ in found.maps:
        assert map_.whole
        assert map_.total + map_.later == pytest.approx(found.value, rel=1e-12)
    assert found.maps[-1].later == pytest.approx(
        sum(
            share.total
            for share in found.biases
            if share.operation.startswith(("decoder.stages.1", "decoder.classifier"))
        )
    )
    # Contributions that pass through a pool lie in the cells that its switches select.
    with torch.no_grad():
        pooling = network.encoder(x).pooled[0]
    cells = torch.zeros(9, 11, dtype=torch.bool)
    for _, y, x_ in itertools.product(*map(range, pooling.codes[0].shape)):
        for code in pooling.codes[0, :, y, x_]:
            cells[2 * y + code // 2, 2 * x_ + code % 2] = True
    assert not found.maps[0].values[~cells].any()
    assert found.maps[0].values[cells].any()


def test_levels_are_those_of_the_maps():
    torch.manual_seed(0)
    network = randomised(SegNet(3, stages=((4,), (4,), (4,))))
    graph = AffineGraph(network, image(32, 40, torch.float32))
    found = graph.contributions(graph.logits[0, 0, 3, 3])
    levels = [
        "pixels", "encoder 1/1", "encoder 1/2", "encoder 1/4", "decoder 1/4", "decoder 1/2", "decoder 1/1"
    ]  # fmt: skip
    assert list(found.by_level()) == levels
    assert sum(found.by_level().values()) == pytest.approx(found.total)


def test_a_skip_connection_lets_contributions_pass_beside_the_pools():
    torch.manual_seed(0)
    network = randomised(UNet(3, stages=((4,), (4,), (4,)))).double()
    x = image(16, 16)
    graph = AffineGraph(network, x)
    found = graph.contributions(graph.logits[0, 1, 8, 8])
    assert [map_.name for map_ in found.maps] == ["pool 1", "pool 2"]
    assert not any(map_.whole for map_ in found.maps)
    assert found.exact
    # The deepest map is an image of its own to the rest of the network, with the copies of the finer ones as constants.
    kept = []
    hook = network.encoder.stages[2].register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    value = network(x.requires_grad_())[0, 1, 8, 8]
    hook.remove()
    (gradient,) = torch.autograd.grad(value, kept[0])
    assert found.maps[1].total == pytest.approx(float((gradient * kept[0].detach()).sum()), rel=1e-10)


class Normalising(nn.Module):
    """A network that normalises its input itself and adds constants in every way of writing them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.3, -0.2, 0.1])[:, None, None])
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, affine=False)

    def forward(self, x):
        x = (x - self.mean) / 0.7
        x = torch.relu(self.norm(self.conv(x)) + 0.25)
        x = 1 - x
        x += 0.5
        x = torch.add(x, torch.ones_like(x), alpha=-0.5)
        x = self.mean[:1] + torch.cat([x, F.avg_pool2d(x, 3, 1, 1)], dim=1)
        x = F.interpolate(F.adaptive_avg_pool2d(x, 1), size=x.shape[-2:]) + x
        return F.interpolate(F.interpolate(x, scale_factor=0.5, mode="bilinear"), size=x.shape[-2:], mode="bicubic")


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_constants_within_the_network_count_as_biases(dtype):
    torch.manual_seed(0)
    network, x = randomised(Normalising()).to(dtype), image(dtype=dtype)
    assert non_affine_operations(network, x) == []
    graph = AffineGraph(network, x)
    found = graph.contributions(graph.logits[0, 1].sum())
    assert found.exact
    with torch.no_grad():
        assert torch.equal(graph.logits.detach(), network(x))
    names = [share.operation for share in found.biases]
    assert names[:3] == ["the network (sub)", "conv (Conv2d)", "norm (BatchNorm2d)"]
    assert len(names) == 8


ARCHITECTURES = {
    "bayesian_segnet": {"width": 0.0625}, "bayesian_segnet_basic": {"width": 4},
    "bilinear_interpolation": {"width": 4}, "deconvnet": {"width": 0.0625, "fc_width": 16},
    "deeplab_largefov": {"width": 0.0625, "fc_width": 16}, "fcn": {"width": 0.0625, "fc_width": 16},
    "fpn": {"width": 0.0625, "channels": 16}, "segnet": {"width": 0.0625}, "unet": {"width": 0.0625},
}  # fmt: skip
ENDS_AT = {"fpn": ["head.norm (GroupNorm)"]}  # SegNet-Basic and its variants: normalise (LocalResponseNorm)


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("name", list_models())
def test_every_architecture_adds_up_or_names_the_operation_at_which_exactness_ends(name, dtype):
    torch.manual_seed(0)
    narrow = ARCHITECTURES.get(name, {} if name.endswith("net_small") else {"width": 4})
    network = randomised(create_model(name, 3, **narrow)).to(dtype)
    side = max(64, network.minimum_size)
    x = 100 * image(side, side + 1, dtype)  # SegNet-Basic's normalisation is meant for raw pixels
    ends_at = ENDS_AT.get(name, ["normalise (LocalResponseNorm)"] if hasattr(network, "normalise") else [])
    assert non_affine_operations(network, x) == ends_at
    graph = AffineGraph(network, x)
    with torch.no_grad():
        assert torch.equal(graph.logits.detach(), network(x))
    found = graph.contributions(graph.logits[0, 1, side // 2, side // 3])
    assert found.exact == (not ends_at)
    if ends_at == ["normalise (LocalResponseNorm)"]:
        graph = AffineGraph(network, x, start="normalise")
        found = graph.contributions(graph.logits[0, 1, side // 2, side // 3])
        assert found.exact
        assert found.pixels.shape == (3, side, side + 1)
    # Nothing has changed in the network.
    assert all(parameter.requires_grad for parameter in network.parameters())


class Gated(nn.Module):
    """A network with one operation that may not be affine."""

    def __init__(self, operation):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.operation = operation

    def forward(self, x):
        return self.head(self.operation(self.conv(x)))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


AFFINE = [nn.ReLU(inplace=True), nn.LeakyReLU(), nn.PReLU(), nn.Dropout(0.5), nn.AvgPool2d(3, 1, 1),
          nn.MaxPool2d(3, 1, 1), Function(torch.abs), Function(lambda x: x.clamp(min=0)), nn.Identity()]  # fmt: skip
NOT_AFFINE = [
    (nn.Sigmoid(), "operation (Sigmoid)"), (nn.GELU(), "operation (GELU)"), (nn.SiLU(), "operation (SiLU)"),
    (nn.Softmax(1), "operation (Softmax)"), (nn.GroupNorm(2, 4), "operation (GroupNorm)"),
    (nn.InstanceNorm2d(4), "operation (InstanceNorm2d)"), (nn.ReLU6(), "operation (ReLU6)"),
    (nn.LocalResponseNorm(3), "operation (LocalResponseNorm)"), (Function(lambda x: x * x), "operation (mul)"),
    (Function(lambda x: F.pad(x, (1, 1, 1, 1), value=1.0)), "operation (pad)"),
    (Function(F.normalize), "operation (normalize)"),
    (nn.BatchNorm2d(4, track_running_stats=False), "operation (BatchNorm2d)"),
]  # fmt: skip


@pytest.mark.parametrize("operation", AFFINE, ids=lambda operation: type(operation).__name__)
def test_operations_that_keep_exactness(operation):
    torch.manual_seed(0)
    network, x = Gated(operation).eval(), 9 * image(dtype=torch.float32)
    assert non_affine_operations(network, x) == []
    graph = AffineGraph(network, x)
    assert graph.contributions(graph.logits[0, 1, 4, 5]).exact


@pytest.mark.parametrize(("operation", "name"), NOT_AFFINE, ids=[name for _, name in NOT_AFFINE])
def test_operations_that_end_exactness_are_named_and_the_sum_misses_the_logit(operation, name):
    torch.manual_seed(0)
    network, x = Gated(operation).eval(), 9 * image(dtype=torch.float32)
    assert non_affine_operations(network, x) == [name]
    graph = AffineGraph(network, x)
    weights = torch.linspace(-1, 2, graph.logits[0, 1].numel()).view_as(graph.logits[0, 1])  # a norm keeps plain sums
    assert not graph.contributions((weights * graph.logits[0, 1]).sum()).exact


def test_an_autograd_function_that_is_not_affine_fails_the_sum_but_is_not_named():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * ctx.saved_tensors[0] * gradient

    torch.manual_seed(0)
    network, x = Gated(Function(Square.apply)).eval(), image(dtype=torch.float32)
    assert non_affine_operations(network, x) == []
    graph = AffineGraph(network, x)
    assert not graph.contributions(graph.logits[0, 1, 4, 5]).exact


def test_a_sum_that_is_not_a_number_is_not_exact():
    network, x = segnet(), image()
    x[0, 0, 4, 5] = np.nan
    graph = AffineGraph(network, x)
    assert not graph.contributions(graph.logits[0, 1, 4, 5]).exact


def test_images_below_the_minimum_size_are_padded():
    torch.manual_seed(0)
    network = randomised(create_model("segnet", 3, width=0.0625))
    graph = AffineGraph(network, image(20, 25, torch.float32), minimum_size=network.minimum_size)
    assert graph.logits.shape == (1, 3, 20, 25)
    found = graph.contributions(graph.logits[0, 1, 4, 5])
    assert found.exact
    assert found.pixels.shape == (3, 20, 25)


@pytest.mark.extras
def test_contributions_of_pixels_equal_captums_input_times_gradient():
    captum = pytest.importorskip("captum.attr")
    network, x = segnet(torch.float32), image(dtype=torch.float32)
    graph = AffineGraph(network, x)
    found = graph.contributions(graph.logits[0, 1, 4, 5])
    expected = captum.InputXGradient(lambda images: network(images)[:, :, 4, 5]).attribute(x.requires_grad_(), target=1)
    torch.testing.assert_close(found.pixels, expected[0].detach())
