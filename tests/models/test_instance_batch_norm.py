"""Batch norm with the statistics of each image: against a formula in numpy, and in everything that uses norms."""

import numpy as np
import pytest
import torch
from torch import nn

from segdeconv.analysis.contributions import AffineGraph
from segdeconv.errors import UsageError
from segdeconv.inference.network import Network, prepare_for_inference
from segdeconv.inference.tiling import geometry_of
from segdeconv.models import FPN, SegNet, SegNetBasic
from segdeconv.models.instance_batch_norm import InstanceBatchNorm2d, set_instance_statistics

CPU = torch.device("cpu")
SMALL = {"stages": ((4,), (6, 6), (8,))}


def used(network):
    """Give every batch norm running statistics and parameters as after training."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    return network.eval()


def segnet(weights=None):
    torch.manual_seed(0)
    network = used(SegNet(3, **SMALL))
    if weights:
        set_instance_statistics(network, weights)
    return network


def norm(weight, channels=5):
    return used(nn.Sequential(InstanceBatchNorm2d(channels, instance_weight=weight)))[0]


def images(count=3, channels=5, height=7, width=6):
    scale = torch.arange(1, count + 1)[:, None, None, None]  # each image has statistics of its own
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(1)) * scale


@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_image_is_normalised_by_the_mixture_of_both_statistics(weight, layout):
    module, x = norm(weight), images().contiguous(memory_format=layout)
    mean, variance, scale, shift = (
        tensor.detach().double().numpy()[:, None, None]
        for tensor in (module.running_mean, module.running_var, module.weight, module.bias)
    )
    for image, found in zip(x.double().numpy(), module(x).detach().numpy(), strict=True):
        own_mean, own_variance = (moment(image, axis=(1, 2), keepdims=True) for moment in (np.mean, np.var))
        mixed = (1 - weight) * variance + weight * own_variance
        expected = (image - (1 - weight) * mean - weight * own_mean) / np.sqrt(mixed + module.eps) * scale + shift
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_statistics_of_16_bit_maps_have_32_bits():
    """In 16 bits, a mean of 100 would be off by up to 0.25, a quarter of the deviation."""
    x = images(count=1, height=40, width=50) + 100
    module = norm(1.0)
    found = module(x.bfloat16()).float()
    torch.testing.assert_close(found, module(x.bfloat16().float()), rtol=0.01, atol=0.02)


def test_training_is_that_of_batch_norm():
    module, plain = norm(0.3).train(), nn.BatchNorm2d(5)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(images()), plain(images()), rtol=0, atol=0)
    for name, buffer in plain.named_buffers():
        assert torch.equal(module.get_buffer(name), buffer)


def test_evaluation_leaves_the_running_statistics_as_they_are():
    module = norm(0.3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module(images() * float("inf"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_parts_are_named_and_the_longest_name_counts():
    network = segnet({"encoder": 0.2, "encoder.stages.1": 0.4, "encoder.stages.1.1": 0})
    modules = network.named_modules()
    found = {name: module.instance_weight for name, module in modules if isinstance(module, InstanceBatchNorm2d)}
    assert found == {
        "encoder.stages.0.0.norm": 0.2,
        "encoder.stages.1.0.norm": 0.4,
        "encoder.stages.2.0.norm": 0.2,
    }
    assert network.state_dict().keys() == segnet().state_dict().keys()


def test_a_norm_with_two_names_mixes_under_both():
    network = nn.Sequential(norm(0.0), nn.ReLU())
    network.append(network[0])
    set_instance_statistics(network, {"": 0.3})
    assert [module.instance_weight for module in network if isinstance(module, InstanceBatchNorm2d)] == [0.3, 0.3]


def test_setting_them_again_replaces_them_and_no_weight_gives_plain_batch_norm():
    network, x = segnet({"": 0.5}), torch.randn(1, 3, 33, 40)
    set_instance_statistics(network, {"decoder": 0.1})
    torch.testing.assert_close(network(x), segnet({"decoder": 0.1})(x))
    set_instance_statistics(network, {})
    assert torch.equal(network(x), segnet()(x))


@pytest.mark.parametrize(
    ("network", "part", "message"),
    [
        (lambda: SegNet(3, **SMALL), "encodr", "SegNet has no batch norm with running statistics in 'encodr' - did you "
         "mean 'encoder'"),
        (lambda: SegNet(3, **SMALL), "decoder.classifier", "in 'decoder.classifier' - "),
        (lambda: SegNet(3, norm=False, **SMALL), "", "no batch norm with running statistics, so none to mix into"),
        (lambda: SegNet(3, norm=False, **SMALL), "encoder", "no batch norm with running statistics, so none to mix"),
    ],
)  # fmt: skip
def test_a_part_without_batch_norm_is_refused(network, part, message):
    with pytest.raises(UsageError, match=message):
        set_instance_statistics(network(), {part: 0.2})


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_inference_folds_the_other_norms_and_keeps_the_scores(precision):
    network, x = segnet({"encoder.stages.0": 0.3}), torch.randn(2, 3, 45, 60)
    copy = prepare_for_inference(network, CPU, precision)
    assert [name for name, module in copy.named_modules() if isinstance(module, nn.BatchNorm2d)] == [
        "encoder.stages.0.0.norm"
    ]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        found, expected = copy(x.contiguous(memory_format=torch.channels_last)), network(x)
        rounding = segnet()(x).float() - prepare_for_inference(segnet(), CPU, precision)(x).float()
    assert (found.float() - expected.float()).abs().mean() <= 2 * rounding.abs().mean() + 1e-6


def test_images_of_a_batch_do_not_depend_on_each_other():
    network, x = Network(segnet({"": 0.5}), CPU, "32-true"), images(channels=3, height=40, width=50)
    together = network.logits(x)
    torch.testing.assert_close(together, torch.cat([network.logits(image) for image in x.split(1)]))
    assert not torch.allclose(together[:1], Network(segnet(), CPU, "32-true").logits(x[:1]), atol=0.01)


def test_a_traced_network_takes_any_number_of_images_of_any_size():
    network, dynamic = segnet({"": 0.3}), torch.export.Dim.DYNAMIC
    x = torch.randn(2, 3, 48, 64)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: dynamic, 2: dynamic(min=33), 3: dynamic(min=33)},))
    for other in (x, torch.randn(3, 3, 37, 50)):
        torch.testing.assert_close(program.module()(other), network(other), rtol=1e-4, atol=1e-5)


def test_contributions_add_up_with_the_statistics_of_the_image():
    x = torch.randn(1, 3, 17, 22, dtype=torch.float64)
    plain, mixed = (AffineGraph(network.double(), x) for network in (segnet(), segnet({"": 0.3})))
    expected, found = (graph.contributions(graph.logits[0, 1, 4, 5]) for graph in (plain, mixed))
    assert found.exact
    assert float(found.pixels.sum()) + found.from_biases == pytest.approx(found.value, rel=1e-9)
    assert len(found.biases) == len(expected.biases)


def test_the_receptive_field_is_that_of_the_convolutions_but_tiles_are_not_exact():
    plain, mixed = (geometry_of(network.to("meta"), 8) for network in (segnet(), segnet({"encoder.stages.0": 0.2})))
    assert (plain.rows.stride, plain.rows.overlap) == (mixed.rows.stride, mixed.rows.overlap)
    assert plain.exact
    assert not mixed.exact


@pytest.mark.parametrize("build", [lambda: SegNetBasic(3, width=8), lambda: FPN(3, depth=11, width=0.125)])
def test_other_networks_take_them_too(build):
    network = used(build())
    x = torch.randn(1, 3, 64, 70)
    before = network(x)
    set_instance_statistics(network, {"encoder": 0.3})
    assert not torch.allclose(network(x), before, atol=1e-3)
