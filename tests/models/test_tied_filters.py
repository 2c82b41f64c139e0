"""DeconvNet with tied filters, compared with the untied network and with finite differences."""

import copy
import pickle

import pytest
import torch
from torch import nn

from segdeconv.checkpoints import checkpoint
from segdeconv.checkpoints.transfer import transfer_weights
from segdeconv.classes import Classes
from segdeconv.models import DeconvNet
from segdeconv.models.layers import TiedDeconv, fold_norms
from segdeconv.train import train


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def slim(num_classes=3, **options):
    return DeconvNet(num_classes, **{"depth": 11, "width": 0.0625, "fc_width": 16, "tied": True, **options})


def twin(model, **options):
    """Return an untied network whose decoder has copies of the encoder's filters."""
    state = model.state_dict()
    other = slim(tied=False, **options).to(next(model.parameters()).dtype)
    for name, module in model.named_modules():
        if isinstance(module, TiedDeconv):
            state[f"{name}.weight"] = module.mirrored[0].weight.detach().clone()
    other.load_state_dict(state)
    return other.train(model.training)


def mirrored(model):
    """Map the name of each tied deconvolution to that of the convolution whose filters it uses."""
    convs = {id(module): name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    return {
        name: convs[id(module.mirrored[0])] for name, module in model.named_modules() if isinstance(module, TiedDeconv)
    }


def test_parameters_are_those_of_the_original_without_the_mirrored_filters():
    with torch.device("meta"):
        model = DeconvNet(21, tied=True)
    convolutions = [(64, 64), (64, 128), (128, 128), (128, 256), *[(256, 256)] * 2, (256, 512), *[(512, 512)] * 5]
    saved = 512 * 7 * 7 * 4096 + sum(9 * before * after for before, after in convolutions)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == 251_805_653 - saved == 134_336_469
    assert parameters == sum(value.numel() for name, value in model.state_dict().items() if "running" not in name) - 29


def test_deconvolutions_mirror_the_encoder_from_its_end():
    with torch.device("meta"):
        model = DeconvNet(21, tied=True)
    stages = [2, 2, 3, 3, 3]
    expected = {"fc6_deconv.deconv": "fc6.conv"}
    for step, stage in enumerate(reversed(range(5))):
        for layer in range(stages[stage]):
            expected[f"decoder.{step}.{layer}.deconv"] = f"encoder.stages.{stage}.{stages[stage] - 1 - layer}.conv"
    last = expected.popitem()
    assert last == ("decoder.4.1.deconv", "encoder.stages.0.0.conv")  # its input is the image
    assert mirrored(model) == expected
    assert isinstance(model.decoder[4][1].deconv, nn.ConvTranspose2d)


@pytest.mark.parametrize("depth", [11, 13, 19])
def test_encoders_of_any_depth_are_mirrored(depth):
    with torch.device("meta"):
        model = DeconvNet(5, depth=depth, tied=True).eval()
        assert model(torch.zeros(1, 3, 200, 300)).shape == (1, 5, 200, 300)
    assert len(mirrored(model)) == depth - 3


@pytest.mark.parametrize("norm", [True, False])
def test_it_computes_the_same_as_the_network_with_copied_filters(norm):
    model = slim(norm=norm).eval()
    image = torch.randn(2, 3, 200, 193)
    with torch.no_grad():
        logits = model(image)
        assert logits.std() > 1e-6
        assert torch.equal(logits, twin(model, norm=norm)(image))


def test_the_gradient_of_a_filter_is_the_sum_over_the_two_places_where_it_is_used():
    model = slim().double()
    other = twin(model)
    image = torch.randn(2, 3, 200, 193, dtype=torch.float64)
    for network in (model, other):
        network(image).square().mean().backward()
    theirs = dict(other.named_parameters())
    pairs = {conv: deconv for deconv, conv in mirrored(model).items()}
    for name, parameter in model.named_parameters():
        expected = theirs[name].grad
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer in pairs:
            second = theirs[f"{pairs[layer]}.weight"].grad
            assert expected.abs().sum() > 0
            assert second.abs().sum() > 0
            expected = expected + second
        torch.testing.assert_close(parameter.grad, expected, msg=name)


@pytest.mark.parametrize("layer", ["fc6", "encoder.stages.4.0", "encoder.stages.1.0"])
def test_the_gradient_of_a_filter_equals_finite_differences(layer):
    model = slim(norm=False).double().eval()
    image = torch.randn(1, 3, 193, 193, dtype=torch.float64)
    weight = model.get_submodule(layer).conv.weight
    model(image).square().sum().backward()
    direction = torch.randn_like(weight)
    expected = (weight.grad * direction).sum().item()
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            weight += step * direction
            values.append(model(image).square().sum().item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(expected, rel=1e-4)


# Copies and files.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_tied_to_itself(copied):
    model = slim().eval()
    other = copied(model)
    assert mirrored(other) == mirrored(model)
    image = torch.randn(1, 3, 193, 193)
    with torch.no_grad():
        before = other(image)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(other(image), before)
        other.fc6.conv.weight.zero_()
        assert not torch.equal(other(image), before)


def test_conversion_to_another_precision_and_memory_format_reaches_the_tied_filters():
    model = slim().eval().to(torch.float64, memory_format=torch.channels_last)
    assert model(torch.randn(1, 3, 193, 193, dtype=torch.float64)).dtype == torch.float64


def test_folding_norms_scales_the_filters_of_encoder_and_decoder_separately():
    model = slim().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    image = torch.randn(1, 3, 193, 193)
    with torch.no_grad():
        torch.testing.assert_close(fold_norms(model)(image), model(image), rtol=1e-3, atol=1e-5)


def test_its_checkpoint_has_every_filter_once_and_restores_the_network(tmp_path):
    config = {
        "dataset": {
            "_target_": "segdeconv.data.Shapes", "num_train": 4, "num_val": 2, "size": [193, 193], "batch_size": 2,
            "num_workers": 0,
        },
        "model": {
            "_target_": "segdeconv.models.DeconvNet", "depth": 11, "width": 0.0625, "fc_width": 16, "tied": True,
        },
        "optimizer": {"_target_": "segdeconv.optimization.sgd", "lr": 0.1},
        "trainer": {"max_epochs": 1, "precision": "32-true", "ema": 0.9},
        "logger": {},
    }  # fmt: skip
    train(config, tmp_path)
    best = checkpoint.read(tmp_path / "best.ckpt")
    model = best.model()
    assert len(mirrored(model)) == 8
    pointers = [value.untyped_storage().data_ptr() for value in best.weights.values()]
    assert len(pointers) == len(set(pointers))
    for name in mirrored(model):
        assert f"{name}.weight" not in best.weights
        assert f"{name}.bias" in best.weights
    torch.manual_seed(0)
    assert not torch.equal(model.fc6.conv.weight, slim().fc6.conv.weight)


def test_an_untied_network_starts_from_a_tied_one_with_its_biases_and_norms():
    classes = Classes(("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)))
    tied, untied = slim(), slim(tied=False)
    nn.init.normal_(tied.fc6_deconv.deconv.bias)
    source = checkpoint.Checkpoint(
        "tied.ckpt",
        {"model": {"_target_": "segdeconv.models.DeconvNet"}},
        {"classes": classes.to_dict(), "preprocessing": {"mean": [0.0] * 3}},
        {"state_dict": {f"model.{name}": value for name, value in tied.state_dict().items()}},
    )
    report = transfer_weights(untied, classes, source)
    assert torch.equal(untied.fc6_deconv.deconv.bias, tied.fc6_deconv.deconv.bias)
    assert "fc6_deconv.deconv.weight (not in the checkpoint)" in report


def test_pretrained_weights_of_vgg_are_in_encoder_and_decoder(tmp_path):
    from torchvision.models.vgg import cfgs, make_layers

    network = nn.Module()
    network.features = make_layers(cfgs["A"])
    torch.save(network.state_dict(), tmp_path / "vgg.pth")
    model = DeconvNet(2, depth=11, fc_width=16, tied=True, pretrained=str(tmp_path / "vgg.pth"))
    (filters,) = model.decoder[0][0].deconv.mirrored
    assert torch.equal(filters.weight, network.features[18].weight)
