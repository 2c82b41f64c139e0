"""Projections, checked against the paper's steps in torch operations and against torch's gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segdeconv.analysis.unit_projection import (
    METHODS,
    StrongestActivations,
    Unit,
    project,
    receptive_fields,
    scale_to_grey,
)
from segdeconv.errors import UsageError
from segdeconv.models import FPN, SegNet, SegNetBasic, UNet
from segdeconv.models.layers import ConvBlock

SIZE = (37, 50)


def network_with_statistics(*, switch_source="pre_relu", norm=True):
    """Return a SegNet with nontrivial batch norms."""
    torch.manual_seed(0)
    network = SegNet(3, stages=((6, 6), (8, 8), (8,)), switch_source=switch_source, norm=norm).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(-0.5, 2)
            module.bias.data.normal_()
    return network


def image(seed=1):
    return torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def strongest_units(network, layer, x, count=4):
    maps = []
    hook = dict(network.named_modules())[layer].register_forward_hook(lambda module, args, output: maps.append(output))
    with torch.no_grad():
        network(x)
    hook.remove()
    order = maps[0].flatten().topk(count).indices
    return [Unit(*map(int, np.unravel_index(int(index), maps[0].shape[1:]))) for index in order], maps[0]


def by_the_steps_of_the_paper(network, x, units, *, rectified=True):
    """Unpool with switches, rectify and convolve with the transposed filters, by max_unpool2d and conv_transpose2d.

    The units are those before the pool of the last stage of `network.encoder`.
    """
    steps = []
    stages = [[block for block in stage.modules() if isinstance(block, ConvBlock)] for stage in network.encoder.stages]
    for index, stage in enumerate(stages):
        for block in stage:
            steps.append(("filter", block))
            pre_relu = block.norm(block.conv(x))
            x = F.relu(pre_relu)
        if index + 1 < len(stages):
            size = x.shape
            pool_input = pre_relu if network.encoder.switch_source == "pre_relu" else x
            _, indices = F.max_pool2d(pool_input, 2, ceil_mode=True, return_indices=True)
            x = F.max_pool2d(x, 2, ceil_mode=True)
            steps.append(("pool", (indices, size)))
    projections = []
    for unit in units:
        signal = torch.zeros_like(x)
        signal[0, unit.map, unit.row, unit.column] = x[0, unit.map, unit.row, unit.column]
        for kind, step in reversed(steps):
            if kind == "pool":
                indices, size = step
                signal = F.max_unpool2d(signal, indices, 2, output_size=size)
            else:
                scale = 1.0
                if isinstance(step.norm, nn.BatchNorm2d):
                    scale = step.norm.weight / torch.sqrt(step.norm.running_var + step.norm.eps)
                    scale = scale[None, :, None, None]
                signal = F.relu(signal) if rectified else signal
                signal = F.conv_transpose2d(signal * scale, step.conv.weight, padding=1)
        projections.append(signal)
    return torch.cat(projections)


@pytest.mark.parametrize("switch_source", ["pre_relu", "post_relu"])
@pytest.mark.parametrize("norm", [True, False])
def test_a_projection_equals_the_steps_of_the_paper(switch_source, norm):
    network, x = network_with_statistics(switch_source=switch_source, norm=norm), image()
    units, _ = strongest_units(network, "encoder.stages.2", x)
    with torch.no_grad():
        expected = by_the_steps_of_the_paper(network, x, units)
    projections = project(network, x, "encoder.stages.2", units)["deconvnet"]
    torch.testing.assert_close(projections, expected, rtol=1e-4, atol=1e-5)
    assert (projections[0] - projections[1]).abs().max() > 1e-3  # each unit has its own projection


@pytest.mark.parametrize("layer", ["encoder.stages.1", "decoder.stages.0", "decoder.stages.1.1"])
def test_the_gradient_method_equals_the_gradient_of_torch(layer):
    network, x = network_with_statistics(), image()
    units, _ = strongest_units(network, layer, x)
    x.requires_grad_()
    outputs = []
    hook = dict(network.named_modules())[layer].register_forward_hook(
        lambda module, args, output: outputs.append(output.clone())
    )
    network(x)
    hook.remove()
    projections = project(network, x, layer, units, methods=["gradient"])["gradient"]
    for unit, projection in zip(units, projections, strict=True):
        value = outputs[0][0, unit.map, unit.row, unit.column]
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
        torch.testing.assert_close(projection, gradient[0] * value.detach(), rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_all_methods_equal_the_gradient_with_positive_filters_and_active_relus():
    network, x = network_with_statistics(norm=False), image().abs()
    for parameter in network.parameters():
        parameter.data.abs_()
    units, _ = strongest_units(network, "encoder.stages.2", x)
    projections = project(network, x, "encoder.stages.2", units, methods=METHODS)
    gradient = projections["gradient"]
    for method in ("deconvnet", "guided"):
        torch.testing.assert_close(projections[method], gradient)
    expected = by_the_steps_of_the_paper(network, x, units, rectified=False)
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-4, atol=1e-6)


def test_guided_backpropagation_rectifies_and_masks():
    # One ReLU between two 1x1 convolutions, computed by hand: h = (x, -x, x), y = relu(h) @ (2, 3, -4).
    network = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.ReLU(inplace=True), nn.Conv2d(3, 1, 1, bias=False))
    network[0].weight.data[:] = torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1, 1)
    network[2].weight.data[:] = torch.tensor([2.0, 3.0, -4.0]).view(1, 3, 1, 1)
    x = torch.full((1, 1, 1, 1), 2.0)  # h = (2, -2, 2), y = 4 - 8 = -4
    projections = project(network, x, "2", [Unit(0, 0, 0)], methods=METHODS)
    factors = {method: projection.item() / -4 for method, projection in projections.items()}
    # The signal at h is (2, 3, -4). The ReLU is active at the first and last; rectification removes the last.
    assert factors == {"deconvnet": 2 - 3, "guided": 2, "gradient": 2 - 4}


@pytest.mark.parametrize("build", [
    lambda: FPN(3, stages=((4,), (8,), (8,)), num_levels=2),
    lambda: UNet(3, stages=((4,), (8,), (8,))),
    lambda: SegNetBasic(3, width=4),
])  # fmt: skip
def test_other_networks_are_projected_through_their_pools(build):
    torch.manual_seed(0)
    network, x = build().eval(), torch.randn(1, 3, *SIZE)
    layer = "encoder.stages.2"
    (unit,), _ = strongest_units(network, layer, x, count=1)
    top, left, bottom, right = receptive_fields(network, layer, SIZE)(unit.row, unit.column)
    for (projection,) in project(network, x, layer, [unit], methods=METHODS).values():
        assert projection.abs().max() > 0
        outside = projection.clone()
        outside[:, top:bottom, left:right] = 0
        assert outside.abs().max() == 0  # the projection is zero outside the receptive field


def test_a_receptive_field_is_the_region_of_nonzero_gradients():
    network = network_with_statistics(norm=False)
    for parameter in network.parameters():
        parameter.data.fill_(0.01)
    x = torch.rand(1, 3, *SIZE)
    # The gradient of one image follows the winning cells only, so many images are combined.
    for row, column in ((0, 0), (4, 7), (9, 12)):
        reached = torch.zeros(SIZE, dtype=torch.bool)
        for seed in range(12):
            x = image(seed).abs()
            reached |= (
                project(network, x, "encoder.stages.2", [Unit(0, row, column)])["deconvnet"][0].abs().amax(dim=0) > 0
            )
        top, left, bottom, right = receptive_fields(network, "encoder.stages.2", SIZE)(row, column)
        rows, columns = reached.any(dim=1).nonzero()[:, 0], reached.any(dim=0).nonzero()[:, 0]
        assert (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1) == (top, bottom, left, right)


@pytest.mark.parametrize("per_image", [1, 3])
def test_the_strongest_activations_are_kept(per_image):
    network, images = network_with_statistics(), [image(seed) for seed in range(7)]
    layers = ["encoder.stages.0", "encoder.stages.2"]
    strongest = StrongestActivations(network, layers, num=5, per_image=per_image)
    for index, x in enumerate(images):
        strongest.update(x, index)
    maps = torch.cat([strongest_units(network, layers[1], x)[1] for x in images])
    for channel in strongest.active_maps(layers[1]):
        activations = strongest.strongest(layers[1], channel)
        values = [activation.value for activation in activations]
        assert values == sorted(values, reverse=True)
        for value, index, unit in activations:
            assert maps[index, channel, unit.row, unit.column].item() == pytest.approx(value)
        if per_image == 1:
            expected = maps[:, channel].flatten(1).amax(dim=1).sort(descending=True).values[:5]
            assert values == pytest.approx([value for value in expected.tolist() if value > 0])
        else:
            assert values[0] == pytest.approx(maps[:, channel].max().item())
            counts = np.bincount([activation.image for activation in activations])
            assert counts.max() <= per_image


def test_zero_is_grey_and_the_largest_values_are_black_and_white():
    projection = torch.zeros(2, 10, 100)
    projection[0, 0, :20], projection[1, 5, :5], projection[0, 9, 9] = 2.0, -4.0, 1.0
    grey = scale_to_grey(projection, torch.tensor([2.0, 1.0]))  # in pixels 4, -4 and 2
    assert grey[0, 0, 0] == 1
    assert grey[1, 5, 0] == 0
    assert grey[0, 9, 9] == 0.75
    assert (grey[1, 0] == 0.5).all()


def test_an_unknown_layer_is_reported():
    with pytest.raises(UsageError, match=r"no layer 'encoder.stages.9' - did you mean 'encoder.stages"):
        project(network_with_statistics(), image(), "encoder.stages.9", [Unit(0, 0, 0)])
    with pytest.raises(UsageError, match=r"layer 'encoder' does not have the shape \(1, channels"):
        project(network_with_statistics(), image(), "encoder", [Unit(0, 0, 0)])
