"""The fused batch norm, ReLU and pool compared with the separate modules.

test_triton_kernels.py runs this file in its own process: on a GPU if there is one, else in Triton's interpreter.
"""

import copy

import pytest
import torch
from test_ops import LAYOUTS
from torch import nn
from triton_kernel_cases import DEVICE

from segdeconv.models import SegNet, encoders
from segdeconv.models.activation_checkpointing import checkpoint_activations
from segdeconv.switches import fused, ops
from segdeconv.switches.fused import norm_relu_pool
from segdeconv.switches.ops import max_pool
from segdeconv.switches.packing import pack

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative to the largest compared value. Both sides compute in float32, in a different order, and round the result;
# torch's norm of a half type also rounds intermediate values.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def _through_the_kernel(monkeypatch):
    monkeypatch.setattr(fused, "_runs_on_its_device", lambda x: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # it keeps only three digits of a convolution
    torch.manual_seed(0)


def assert_within(ours, theirs, tolerance):
    ours, theirs = ours.double(), theirs.double()
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * max(theirs.abs().max(), 1e-3)


def make_norm(channels):
    """Return a norm in the middle of training, with some negative scales, so that maxima come from minima."""
    norm = nn.BatchNorm2d(channels).to(DEVICE)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(channels))
        norm.bias.copy_(torch.randn(channels) / 2)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


def separate(x, norm, *, relu_before):
    """Apply the modules one after the other in float32, and round to x's type after the norm."""
    y = norm(x.float()).to(x.dtype)
    pooling = max_pool(torch.relu(y) if relu_before else y)
    return pooling if relu_before else pooling._replace(features=torch.relu(pooling.features))


def grid(shape, dtype, layout):
    """Return values so far apart that rounding decides no maximum, and so few that many tie."""
    return torch.randint(-3, 4, shape).to(dtype).contiguous(memory_format=layout).to(DEVICE)


@pytest.mark.parametrize("relu_before", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_switches_gradients_and_statistics_equal_those_of_the_separate_modules(dtype, layout, relu_before):
    for size in ((1, 2), (7, 1), (4, 6), (5, 7)):
        x = grid((2, 5, *size), dtype, layout)
        norm = make_norm(5)
        other = copy.deepcopy(norm)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        pooling = norm_relu_pool(ours, norm, relu_before=relu_before)
        expected = separate(theirs, other, relu_before=relu_before)
        assert pooling.size == expected.size == size
        assert pooling.features.dtype == dtype
        assert pooling.features.is_contiguous(memory_format=layout)
        assert_within(pooling.features, expected.features, TOLERANCES[dtype])
        assert torch.equal(pooling.switches, expected.switches)

        gradient = torch.randn(pooling.features.shape).to(DEVICE, dtype)
        pooling.features.backward(gradient)
        expected.features.backward(gradient)
        assert ours.grad.dtype == dtype
        assert ours.grad.is_contiguous(memory_format=layout)
        assert_within(ours.grad, theirs.grad, 4 * TOLERANCES[dtype])
        assert_within(norm.weight.grad, other.weight.grad, 4 * TOLERANCES[dtype])
        assert_within(norm.bias.grad, other.bias.grad, TOLERANCES[dtype])
        for name, buffer in norm.named_buffers():
            assert_within(buffer, dict(other.named_buffers())[name], 1e-6)
        assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("relu_before", [False, True])
def test_gradients_equal_those_of_the_definition_in_double(relu_before):
    """The expected gradients come from autograd through the definition, without a norm, pool or unpooling module."""
    x, norm = torch.randn(2, 3, 6, 4).to(DEVICE), make_norm(3)
    ours = x.clone().requires_grad_()
    features = norm_relu_pool(ours, norm, relu_before=relu_before).features
    gradient = torch.randn(features.shape).to(DEVICE)
    features.backward(gradient)

    theirs = x.double().requires_grad_()
    weight, bias = (parameter.detach().double().requires_grad_() for parameter in (norm.weight, norm.bias))
    mean = theirs.mean((0, 2, 3), keepdim=True)
    variance = (theirs - mean).square().mean((0, 2, 3), keepdim=True)
    y = (theirs - mean) / (variance + norm.eps).sqrt() * weight[:, None, None] + bias[:, None, None]
    expected = y.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).amax(4).clamp(min=0)
    expected.backward(gradient.double())
    assert_within(features, expected, 1e-6)
    for one, other in ((ours, theirs), (norm.weight, weight), (norm.bias, bias)):
        assert_within(one.grad, other.grad, 2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_running_variance_is_unbiased_and_moves_by_the_momentum(layout):
    x = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 1, 2, 2).expand(1, 4, 2, 2).contiguous(memory_format=layout)
    norm = nn.BatchNorm2d(4, momentum=0.25).to(DEVICE)
    norm_relu_pool(x.to(DEVICE), norm, relu_before=False)
    # By hand: mean 3, variance (4 + 1 + 0 + 9) / 3 = 14 / 3; a quarter of each plus three quarters of the old value.
    torch.testing.assert_close(norm.running_mean.cpu(), torch.full((4,), 0.75))
    torch.testing.assert_close(norm.running_var.cpu(), torch.full((4,), 0.75 + 14 / 12))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_that_round_to_the_same_tie_and_the_first_cell_wins(dtype, layout):
    """With a tiny scale all values round to the shift: in float16 already at a scale where float32 values differ."""
    x = torch.randn(2, 4, 5, 7).to(dtype).contiguous(memory_format=layout).to(DEVICE)
    norm = nn.BatchNorm2d(4).to(DEVICE)
    nn.init.constant_(norm.weight, {torch.float32: 1e-9, torch.float16: 1e-5}[dtype])
    nn.init.constant_(norm.bias, 0.5)
    pooling = norm_relu_pool(x, norm, relu_before=False)
    assert pooling.features.eq(0.5).all()
    assert pooling.switches.eq(0).all()

    nn.init.constant_(norm.weight, 1.0)
    nn.init.constant_(norm.bias, -100.0)
    assert norm_relu_pool(x, norm, relu_before=True).switches.eq(0).all()  # windows of zeros
    assert norm_relu_pool(x, norm, relu_before=False).switches.ne(0).any()


@pytest.mark.parametrize("channels", [1, 3, 4, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_switches_equal_the_unpacked_ones_and_give_the_same_gradients(layout, channels):
    for size in ((1, 2), (5, 7), (6, 4)):
        x = torch.randn(2, channels, *size).contiguous(memory_format=layout).to(DEVICE)
        poolings, gradients = [], []
        for packed in (False, True):
            torch.manual_seed(1)
            norm, ours = make_norm(channels), x.clone().requires_grad_()
            poolings.append(norm_relu_pool(ours, norm, relu_before=False, packed=packed))
            poolings[-1].features.square().sum().backward()
            gradients.append([ours.grad, norm.weight.grad, norm.bias.grad])
        assert torch.equal(poolings[1].features, poolings[0].features)
        assert torch.equal(poolings[1].switches, pack(poolings[0].switches))
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_larger_than_a_tile_have_no_seams(layout):
    x = torch.randn(1, 300, 3, 5) if layout == torch.channels_last else torch.randn(2, 3, 19, 600)
    x = x.contiguous(memory_format=layout).to(DEVICE)
    norm = make_norm(x.shape[1])
    other, ours, theirs = copy.deepcopy(norm), x.clone().requires_grad_(), x.clone().requires_grad_()
    pooling, expected = norm_relu_pool(ours, norm, relu_before=False), separate(theirs, other, relu_before=False)
    assert_within(pooling.features, expected.features, 2e-6)
    gradient = torch.randn(pooling.features.shape).to(DEVICE)
    pooling.features.backward(gradient)
    expected.features.backward(gradient)
    same = ops.unpool((pooling.switches == expected.switches).float(), expected.switches, expected.size) != 0
    assert same.sum() >= pooling.switches.numel() - 1  # the last bit may decide one of them
    assert_within(ours.grad[same], theirs.grad[same], 1e-5)
    assert_within(norm.weight.grad, other.weight.grad, 1e-5)
    assert_within(norm.bias.grad, other.bias.grad, 1e-5)


def test_other_memory_formats_are_read_correctly():
    base = torch.randn(2, 3, 12, 14).to(DEVICE)
    for x in (base[:, :, ::2, 1::2], base.transpose(2, 3), base[:, 1:2]):
        results = []
        for kind in (x, x.contiguous()):
            torch.manual_seed(1)
            norm, inputs = make_norm(x.shape[1]), kind.detach().requires_grad_()
            features = norm_relu_pool(inputs, norm, relu_before=False).features
            features[..., 1:].square().sum().backward()
            results.append((features, inputs.grad, norm.weight.grad))
        for one, other in zip(*results, strict=True):
            assert_within(one, other, 2e-6)


def test_a_window_with_a_nan_is_not_hidden_by_the_relu():
    x = torch.randn(1, 2, 4, 4)
    x[0, 0, 1, 2] = float("nan")
    features = norm_relu_pool(x.to(DEVICE), nn.BatchNorm2d(2).to(DEVICE), relu_before=False).features
    assert features[0, 0].isnan().all()  # the statistics are NaN
    assert not features[0, 1].isnan().any()


def test_a_second_derivative_is_refused():
    x = torch.randn(1, 2, 4, 4, device=DEVICE, requires_grad=True)
    features = norm_relu_pool(x, nn.BatchNorm2d(2).to(DEVICE), relu_before=False).features
    (gradient,) = torch.autograd.grad(features.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# Networks.


def make_network(**settings):
    torch.manual_seed(0)
    network = SegNet(3, stages=((4,), (6, 5)), **settings)
    return network.to(DEVICE, memory_format=torch.channels_last)


def trained(network, *, autocast=False):
    """Return the logits, gradients and statistics of a step, and the types of the maps that took the fused pass."""
    passes = []
    torch.manual_seed(0)
    image = torch.randn(2, 3, 13, 10).to(DEVICE).contiguous(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patch, torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        patch.setattr(
            encoders, "norm_relu_pool", lambda x, *a, **k: passes.append(x.dtype) or norm_relu_pool(x, *a, **k)
        )
        logits = network(image)
    logits.float().square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return logits, {**gradients, **dict(network.named_buffers())}, passes


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("switch_source", ["pre_relu", "post_relu"])
def test_a_network_computes_the_same_with_and_without_the_fused_pass(monkeypatch, switch_source, recompute):
    results = []
    for runs in (True, False):
        monkeypatch.setattr(fused, "_runs_on_its_device", lambda x, runs=runs: runs)
        network = make_network(switch_source=switch_source)
        if recompute:
            checkpoint_activations(network)
        *numbers, passes = trained(network)
        results.append(numbers)
        assert len(passes) == (2 if runs else 0)
    (logits, numbers), (expected, others) = results
    assert_within(logits, expected, 1e-5)
    for name, number in numbers.items():
        if not name.endswith("conv.bias"):  # before a norm its gradient is only rounding error
            assert_within(number, others[name], 2e-5)
    assert network.encoder.stages[1][1].norm.num_batches_tracked == 1


def test_under_autocast_maps_are_bfloat16_and_statistics_float32():
    _, tensors, passes = trained(make_network(), autocast=True)
    assert passes == [torch.bfloat16] * 2
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.int64}


def evaluated(network):
    network.encoder.stages[1][1].norm.eval()


def hooked(network):
    network.encoder.stages[1][1].register_forward_hook(lambda *_: None)


def hooked_norm(network):
    network.encoder.stages[1][1].norm.register_full_backward_hook(lambda *_: None)


def hooked_stage(network):
    network.encoder.stages[1].register_forward_pre_hook(lambda *_: None)


def hooked_pool(network):
    network.encoder.pools[1].register_forward_hook(lambda *_: None)


def cumulative(network):
    network.encoder.stages[1][1].norm.momentum = None


def another_norm(network):
    network.encoder.stages[1][1].norm.__class__ = type("OtherNorm", (nn.BatchNorm2d,), {})


def without_scale(network):
    network.encoder.stages[1][1].norm = nn.BatchNorm2d(5, affine=False).to(DEVICE)


def without_statistics(network):
    network.encoder.stages[1][1].norm = nn.BatchNorm2d(5, track_running_stats=False).to(DEVICE)


def stopped_statistics(network):
    network.encoder.stages[1][1].norm.track_running_stats = False


def without_norm(network):
    network.encoder.stages[1][1].norm = nn.Identity()


def dropping(network):
    network.encoder.dropouts["stage2"] = nn.Dropout(0.5)


UNUSUAL = (
    evaluated, hooked, hooked_norm, hooked_stage, hooked_pool, cumulative, another_norm, without_scale,
    without_statistics, stopped_statistics, without_norm, dropping,
)  # fmt: skip


@pytest.mark.parametrize("change", UNUSUAL, ids=lambda change: change.__name__)
def test_unusual_stages_take_the_separate_steps(change):
    network = make_network()
    change(network)
    _, _, passes = trained(network)
    assert len(passes) == 1  # the other stage


def test_networks_of_another_type_take_the_separate_steps(monkeypatch):
    monkeypatch.setattr(encoders, "norm_relu_pool", None)
    network = make_network().double()
    network(torch.randn(2, 3, 8, 8, dtype=torch.float64, device=DEVICE)).sum().backward()


def test_a_single_pixel_raises_torchs_error():
    network = SegNet(3, stages=((4,),)).to(DEVICE)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        network.encoder(torch.randn(1, 3, 1, 1).to(DEVICE))


def test_changing_the_features_in_place_is_detected():
    """The features are saved for the backward pass."""
    x = torch.randn(1, 2, 4, 4, device=DEVICE, requires_grad=True)
    features = norm_relu_pool(x, nn.BatchNorm2d(2).to(DEVICE), relu_before=False).features
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        features.mul_(2).sum().backward()
