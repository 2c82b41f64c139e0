"""DeconvNet compared with the original's table, torch's functions and torchvision's VGG16."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import vgg16
from torchvision.models.vgg import cfgs, make_layers

from segdeconv.errors import UsageError
from segdeconv.models import DeconvNet
from segdeconv.models.layers import DeconvBlock

SOURCES = ("pre_relu", "post_relu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def slim(num_classes=3, **options):
    return DeconvNet(num_classes, **{"width": 0.125, "fc_width": 32, **options})


# The numbers of the original, on the meta device, because the full network takes 1 GB.


@pytest.mark.parametrize(("norm", "parameters"), [(True, 251_805_653), (False, 251_772_245)])
def test_it_has_the_parameters_layers_and_norms_of_the_original(norm, parameters):
    with torch.device("meta"):
        model = DeconvNet(21, norm=norm)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    kinds = Counter(type(module) for module in model.modules())
    assert (kinds[nn.Conv2d], kinds[nn.ConvTranspose2d]) == (13 + 2 + 1, 1 + 13)
    assert kinds[nn.BatchNorm2d] == (29 if norm else 0)


# One row per layer with weights: kind, kernel, padding, channels and side of the result.
TABLE = [
    *[("C", 3, 1, 64, 224)] * 2,
    *[("C", 3, 1, 128, 112)] * 2,
    *[("C", 3, 1, 256, 56)] * 3,
    *[("C", 3, 1, 512, 28)] * 3,
    *[("C", 3, 1, 512, 14)] * 3,
    ("C", 7, 0, 4096, 1),  # fc6
    ("C", 1, 0, 4096, 1),  # fc7
    ("T", 7, 0, 512, 7),  # fc6-deconv
    *[("T", 3, 1, 512, 14)] * 3,
    *[("T", 3, 1, 512, 28)] * 2,
    ("T", 3, 1, 256, 28),  # deconv4_3
    *[("T", 3, 1, 256, 56)] * 2,
    ("T", 3, 1, 128, 56),  # deconv3_3
    ("T", 3, 1, 128, 112),
    ("T", 3, 1, 64, 112),  # deconv2_2
    *[("T", 3, 1, 64, 224)] * 2,
    ("C", 1, 0, 21, 224),  # seg-score-voc
]


@pytest.mark.parametrize("source", SOURCES)
def test_it_has_the_layer_table_of_the_original(source):
    rows, order = [], []

    def record(module, inputs, output):
        order.append(type(module).__name__)
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            kind = "T" if isinstance(module, nn.ConvTranspose2d) else "C"
            assert module.stride == (1, 1)
            assert module.bias is not None
            assert output.shape[-1] == output.shape[-2]
            rows.append((kind, module.kernel_size[0], module.padding[0], output.shape[1], output.shape[-1]))

    with torch.device("meta"):
        model = DeconvNet(21, switch_source=source).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d | nn.ReLU):
                module.register_forward_hook(record)
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 21, 224, 224)
    assert rows == TABLE
    pools_rectify = 5 if source == "pre_relu" else 0
    assert Counter(order)["ReLU"] == 29 - pools_rectify
    decoder = ["ConvTranspose2d", "BatchNorm2d", "ReLU"] * 14
    assert order[-len(decoder) - 1 :] == [*decoder, "Conv2d"]


# Torch's functions.


def reference(state, image, source, stages=(2, 2, 3, 3, 3)):
    """Compute DeconvNet in evaluation mode with torch's pooling and transposed convolutions by their definition."""

    def norm(x, name):
        mean, var, weight, bias = (
            state[f"{name}.norm.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias)

    def conv(x, name, padding):
        return norm(F.conv2d(x, state[f"{name}.conv.weight"], state[f"{name}.conv.bias"], padding=padding), name)

    def deconv(x, name, padding):
        # A transposed convolution is a convolution with the kernel turned by 180 degrees.
        weight = state[f"{name}.deconv.weight"].transpose(0, 1).flip(-1, -2)
        convolved = F.conv2d(x, weight, state[f"{name}.deconv.bias"], padding=weight.shape[-1] - 1 - padding)
        return norm(convolved, name).relu()

    x, pools = image, []
    for stage, length in enumerate(stages):
        for layer in range(length):
            x = conv(x, f"encoder.stages.{stage}.{layer}", 1)
            if layer < length - 1 or source == "post_relu":
                x = x.relu()
        size = x.shape[-2:]
        x, indices = F.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)
        x = x.relu()
        pools.append((indices, size))
    x = conv(x, "fc6", 0).relu()
    x = conv(x, "fc7", 0).relu()
    x = deconv(x, "fc6_deconv", 0)
    for stage, length in enumerate(reversed(stages)):
        indices, size = pools.pop()
        x = F.max_unpool2d(x, indices, 2, 2, output_size=size)
        for layer in range(length):
            x = deconv(x, f"decoder.{stage}.{layer}", 1)
    return F.conv2d(x, state["classifier.weight"], state["classifier.bias"])


@pytest.mark.parametrize("size", [(193, 193), (203, 239), (230, 420)])
@pytest.mark.parametrize("source", SOURCES)
def test_logits_equal_those_of_torchs_functions(source, size):
    model = slim(switch_source=source).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.01)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.uniform_(module.running_var, 0.05, 0.5)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        logits, expected = model(image), reference(model.state_dict(), image, source)
    assert logits.shape == (2, 3, *size)
    assert expected.std() > 1e-4
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-12)


def test_a_transposed_convolution_adds_its_kernel_for_each_value():
    block = DeconvBlock(2, 3, norm=False)
    nn.init.zeros_(block.deconv.bias)
    x = torch.zeros(1, 2, 5, 5)
    x[0, 1, 2, 3] = 2.0
    expected = torch.zeros(1, 3, 5, 5)
    expected[0, :, 1:4, 2:5] = 2.0 * block.deconv.weight[1].detach()
    torch.testing.assert_close(block(x), expected.relu())


# Properties of all networks.


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("source", SOURCES)
def test_every_parameter_gets_a_gradient_in_training(source, norm):
    model = slim(switch_source=source, norm=norm)
    model(torch.randn(2, 3, 203, 239)).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        if not (norm and key.endswith("conv.bias")):  # the batch norm after it cancels it
            assert parameter.grad.abs().sum() > 0, key


def test_decoder_and_encoder_share_no_weights():
    model = slim()
    parts = [model.encoder, model.fc6, model.fc7, model.fc6_deconv, model.decoder, model.classifier]
    pointers = [parameter.data_ptr() for part in parts for parameter in part.parameters()]
    assert len(pointers) == len(set(pointers)) == len(list(model.parameters()))


@pytest.mark.parametrize("norm", [True, False])
def test_logits_can_be_negative_and_positive_in_every_class(norm):
    with torch.no_grad():
        logits = slim(norm=norm)(torch.randn(2, 3, 224, 224))
    assert (logits < 0).any(dim=3).any(dim=2).any(dim=0).all()
    assert (logits > 0).any(dim=3).any(dim=2).any(dim=0).all()


@pytest.mark.parametrize("depth", [11, 13, 19])
def test_decoder_mirrors_an_encoder_of_any_depth(depth):
    with torch.device("meta"):
        model = DeconvNet(5, depth=depth).eval()
        assert model(torch.zeros(1, 3, 200, 300)).shape == (1, 5, 200, 300)
    kinds = Counter(type(module) for module in model.modules())
    assert (kinds[nn.Conv2d], kinds[nn.ConvTranspose2d]) == (depth, depth - 2)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_may_have_any_number_of_channels(channels):
    with torch.no_grad():
        assert slim(in_channels=channels).eval()(torch.randn(1, channels, 193, 200)).shape == (1, 3, 193, 200)


@pytest.mark.parametrize("size", [(192, 193), (400, 192), (32, 32)])
def test_an_image_without_seven_pixels_after_five_pools_is_refused(size):
    message = (
        rf"an image of {size[0]}x{size[1]} \(HxW\) is too small for DeconvNet, .* at least 193 - increase dataset\.size"
    )
    with pytest.raises(UsageError, match=message):
        slim().eval()(torch.zeros(1, 3, *size))


def test_a_single_image_is_refused_only_if_batch_norm_would_get_a_single_value():
    model = slim()
    with pytest.raises(UsageError, match=r"a batch of one image of 224x200 .* - use dataset\.batch_size=2 or more"):
        model(torch.randn(1, 3, 224, 200))
    assert model(torch.randn(1, 3, 225, 200)).shape[-2:] == (225, 200)
    assert slim(norm=False)(torch.randn(1, 3, 224, 200)).shape[-2:] == (224, 200)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # frozen, in a network in training mode
    assert model(torch.randn(1, 3, 224, 200)).shape[-2:] == (224, 200)


# Initial weights.


def deconvolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.ConvTranspose2d)]


def test_weights_start_as_in_the_training_files():
    model = slim(21, width=0.25)
    for module in [*deconvolutions(model), model.classifier]:
        assert module.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert module.bias.eq(0).all()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0.001).all()
    for module, fan_in in ((model.fc6.conv, 128 * 49), (model.fc7.conv, 32)):
        assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.1)


def test_without_norm_a_deconvolution_preserves_the_mean_square_of_rectified_values():
    model = slim(norm=False, width=0.5)
    block = model.decoder[1][2]  # deconv4_3: 256 -> 128, so that inputs and outputs cannot be confused
    assert (block.deconv.in_channels, block.deconv.out_channels) == (256, 128)
    x = torch.randn(2, 256, 20, 20).relu()
    with torch.no_grad():
        inner = block(x)[..., 1:-1, 1:-1]
    assert inner.square().mean().item() == pytest.approx(x.square().mean().item(), rel=0.1)


# VGG's pretrained weights.


def small_vgg(width, *, batch_norm=False):
    """Return VGG11 in torchvision's layout, with fully connected layers of `width` and norms that are not initial."""
    network = nn.Module()
    network.features = make_layers(cfgs["A"], batch_norm=batch_norm)
    first, second = nn.Linear(512 * 7 * 7, width), nn.Linear(width, width)
    network.classifier = nn.Sequential(first, nn.ReLU(), nn.Dropout(), second, nn.ReLU())
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network.eval()


def assert_fc7_is(theirs, ours):
    """Compare torchvision's VGG up to its second fully connected layer with fc7."""
    image = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.classifier[:5](theirs.features(image).flatten(1))
        features = ours.fc7(ours.fc6(ours.encoder(image).features))
    assert expected.std() > 1e-3
    torch.testing.assert_close(features[..., 0, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def saved(tmp_path):
    def save(network, *, classifier=True):
        state = {key: value for key, value in network.state_dict().items() if classifier or "classifier" not in key}
        torch.save(state, tmp_path / "vgg.pth")
        return str(tmp_path / "vgg.pth")

    return save


def test_fc6_and_fc7_start_as_the_fully_connected_layers_of_vgg(saved):
    theirs = small_vgg(16)
    for module in theirs.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    assert_fc7_is(theirs, DeconvNet(2, depth=11, norm=False, fc_width=16, pretrained=saved(theirs)).eval())


@pytest.mark.slow
def test_with_the_weights_of_vgg16_fc7_equals_torchvision(monkeypatch):
    theirs = vgg16().eval()
    monkeypatch.setattr("segdeconv.models.vgg._download", lambda name: theirs.state_dict())
    assert_fc7_is(theirs, DeconvNet(21, norm=False, pretrained="imagenet").eval())


def test_fully_connected_layers_of_another_width_are_initialised_randomly(saved):
    theirs = small_vgg(16)
    model = DeconvNet(2, depth=11, norm=False, fc_width=24, pretrained=saved(theirs))
    assert torch.equal(model.encoder.stages[0][0].conv.weight, theirs.features[0].weight)
    assert model.fc6.conv.weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 49)), rel=0.05)


def test_fully_connected_layers_that_the_file_lacks_are_initialised_randomly(saved):
    theirs = small_vgg(16)
    path = saved(theirs, classifier=False)
    model = DeconvNet(2, depth=11, norm=False, fc_width=16, pretrained=path)
    assert torch.equal(model.encoder.stages[0][0].conv.weight, theirs.features[0].weight)
    assert model.fc6.conv.weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 49)), rel=0.05)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_only_norms_without_pretrained_weights_start_with_the_shift_of_the_original(saved, batch_norm):
    theirs = small_vgg(16, batch_norm=batch_norm)
    model = DeconvNet(2, depth=11, fc_width=16, pretrained=saved(theirs))
    encoder = model.encoder.stages[0][0].norm
    if batch_norm:
        assert torch.equal(encoder.weight, theirs.features[1].weight)
        assert encoder.bias.eq(0).all()
    else:
        assert encoder.bias.eq(0.001).all()
    assert torch.equal(model.fc6.conv.weight.flatten(1), theirs.classifier[0].weight)
    assert model.fc6.norm.bias.eq(0.001).all()


def test_pretrained_weights_are_refused_for_a_slim_network():
    with pytest.raises(UsageError, match=r"model\.pretrained=imagenet with model\.width=0\.125: .* full width"):
        slim(pretrained="imagenet")
