"""The networks of the SegNet paper's decoder study compared with hand counts, torch's functions, and each other."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segdeconv.cli.overrides import compose
from segdeconv.models import BilinearBasic, FCNBasic, SegNetBasic, build_model, check_model
from segdeconv.models.layers import BilinearDeconv, bilinear_kernel

CONFIGS = Path(__file__).parents[2] / "configs"
# For K = 11 classes and 64 channels, without biases and norms: the encoder, 7x7x(3 + 3 x 64)x64, plus the decoder.
ENCODER = 611_520
CLASSIFIER = 64 * 11
WEIGHTS = {
    "bilinear_interpolation": ENCODER + CLASSIFIER,
    "segnet_basic": ENCODER + 4 * 64 * 64 * 49 + CLASSIFIER,
    "segnet_basic_encoder_addition": ENCODER + 4 * 64 * 64 * 49 + CLASSIFIER,
    "segnet_basic_single_channel_decoder": ENCODER + 4 * 64 * 49 + CLASSIFIER,
    "fcn_basic": ENCODER + 4 * 64 * 11 + 4 * 11 * 11 * 64,
    "fcn_basic_no_addition": ENCODER + 64 * 11 + 4 * 11 * 11 * 64,
    "fcn_basic_no_dim_reduction": ENCODER + 4 * 64 * 64 * 64 + CLASSIFIER,
    "fcn_basic_no_addition_no_dim_reduction": ENCODER + 4 * 64 * 64 * 64 + CLASSIFIER,
}
# Parameters of norms and biases: (2 + 1) x 64 for each of the encoder's four layers, and those of the decoder.
NORMS_AND_BIASES = {
    "bilinear_interpolation": 768 + 11,
    "segnet_basic": 768 + 768 + 11,
    "segnet_basic_encoder_addition": 768 + 768 + 11,
    "segnet_basic_single_channel_decoder": 768 + 768 + 11,
    "fcn_basic": 768 + 4 * 11 + 3 * 22,
    "fcn_basic_no_addition": 768 + 11 + 3 * 22,
    "fcn_basic_no_dim_reduction": 768 + 4 * 128 + 11,
    "fcn_basic_no_addition_no_dim_reduction": 768 + 4 * 128 + 11,
}
MILLIONS = {  # table 1 of the paper
    "bilinear_interpolation": 0.625,
    "segnet_basic": 1.425,
    "segnet_basic_encoder_addition": 1.425,
    "segnet_basic_single_channel_decoder": 0.625,
    "fcn_basic": 0.65,
    "fcn_basic_no_addition": 0.65,
    "fcn_basic_no_dim_reduction": 1.625,
    "fcn_basic_no_addition_no_dim_reduction": 1.625,
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(name, *overrides, num_classes=11, in_channels=3):
    node = compose([f"model={name}", *overrides], CONFIGS)[0]["model"]
    return build_model(check_model(node), num_classes, in_channels)


def slim(name, **options):
    return build(name, "model.width=4", *(f"model.{key}={value}" for key, value in options.items()), num_classes=5)


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


# The paper's numbers.


@pytest.mark.parametrize("name", WEIGHTS)
def test_parameters_equal_the_hand_count_and_the_rounded_numbers_of_the_paper(name):
    assert count(build(name).parameters()) == WEIGHTS[name] + NORMS_AND_BIASES[name]
    plain = build(name, "model.bias=false")
    weights = [parameter for parameter in plain.parameters() if parameter.ndim > 1]
    assert count(weights) == WEIGHTS[name]
    assert count(plain.encoder.parameters()) - 2 * 4 * 64 == ENCODER
    assert WEIGHTS[name] / 1e6 == pytest.approx(MILLIONS[name], rel=0.025)


def test_the_hand_counts_follow_from_the_paper():
    sums = [612_224, 1_415_040, 1_415_040, 624_768, 645_312, 643_200, 1_660_800, 1_660_800]
    assert list(WEIGHTS.values()) == sums


def test_parameters_of_segnet_basic_have_the_names_of_earlier_checkpoints():
    names = [f"encoder.stages.{stage}.0.{part}" for stage in range(4) for part in ("conv.weight", "conv.bias")]
    names += [f"decoder.{stage}.{part}" for stage in range(4) for part in ("conv.weight", "norm.running_var")]
    assert {*names, "classifier.weight", "classifier.bias"} <= set(SegNetBasic(11).state_dict())
    assert len(SegNetBasic(11).state_dict()) == 8 * 7 + 2


@pytest.mark.parametrize("name", WEIGHTS)
def test_decoders_have_the_map_sizes_of_the_paper_at_360x480(name):
    model = slim(name).eval()
    with torch.no_grad():
        deepest, levels = model.encode(torch.zeros(1, 3, 360, 480))
    assert tuple(deepest.shape[-2:]) == (23, 30)
    assert [level.size for level in levels] == [(45, 60), (90, 120), (180, 240), (360, 480)]
    channels = 5 if name == "fcn_basic" else 4
    for level in levels:
        if level.features is not None:
            assert tuple(level.features.shape) == (1, channels, *level.size)
        if level.switches is not None:
            half = ((level.size[0] + 1) // 2, (level.size[1] + 1) // 2)
            assert tuple(level.switches.shape) == (1, 4, *half)
    switched = name.startswith("segnet")
    added = name in ("segnet_basic_encoder_addition", "fcn_basic", "fcn_basic_no_dim_reduction")
    assert [level.switches is not None for level in levels] == [switched] * 4
    assert [level.features is not None for level in levels] == [added] * 3 + [False]


# Properties of all networks.


@pytest.mark.parametrize("source", ["pre_relu", "post_relu"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_logits_have_the_size_of_the_image(name, source):
    model = slim(name, switch_source=source).eval()
    for size in ((1, 1), (32, 32), (33, 47), (45, 60), (65, 32)):
        with torch.no_grad():
            assert model(torch.randn(1, 3, *size)).shape == (1, 5, *size)


@pytest.mark.parametrize("name", WEIGHTS)
def test_images_may_have_any_number_of_channels_and_be_channels_last(name):
    model = build(name, "model.width=4", in_channels=2).eval()
    image = torch.randn(2, 2, 33, 47)
    with torch.no_grad():
        plain = model(image)
        last = model.to(memory_format=torch.channels_last)(image.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, plain)


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_parameter_gets_a_gradient(name):
    model = slim(name)
    model(torch.rand(2, 3, 45, 50) * 255).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        if not key.endswith("conv.bias"):  # the batch norm after it cancels it
            assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", WEIGHTS)
def test_thirty_steps_at_the_papers_learning_rate_lower_the_loss(name):
    model = slim(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    image, mask = torch.rand(4, 3, 45, 50) * 255, torch.randint(0, 5, (4, 45, 50))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(image), mask)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# One forward pass of each kind with torch's functions.


def randomised(model):
    """Randomise norms and deconvolutions, and return the model in evaluation mode and float64."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (module.bias, module.running_mean):
                nn.init.normal_(tensor)
        if isinstance(module, BilinearDeconv):
            nn.init.normal_(module.weight, std=0.1)
    return model.double().eval()


def normed(x, norm):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)


def encoded(model, image):
    """Return (pooled map, indices, size before) of every stage with torch's pooling."""
    x = image / (1 + 2e-5 * image.square().sum(dim=1, keepdim=True)) ** 0.75
    stages = []
    for (block,) in model.encoder.stages:
        before = torch.relu(normed(F.conv2d(x, block.conv.weight, block.conv.bias, padding=3), block.norm))
        x, indices = F.max_pool2d(before, 2, 2, ceil_mode=True, return_indices=True)
        stages.append((x, indices, before.shape[-2:]))
    return stages


def alone(x, weight, bias):
    """Filter each map by its own filter, one after the other."""
    maps = [F.conv2d(x[:, [c]], weight[[c]], bias[[c]], padding=3) for c in range(x.shape[1])]
    return torch.cat(maps, dim=1)


@pytest.mark.parametrize("size", [(45, 61), (64, 48)])
@pytest.mark.parametrize(
    "options", [{}, {"encoder_addition": True}, {"decoder": "single_channel"}], ids=["plain", "addition", "single"]
)
def test_segnet_basics_equal_torchs_unpooling_and_convolutions(options, size):
    model = randomised(SegNetBasic(5, width=6, switch_source="post_relu", **options))
    image = torch.rand(2, 3, *size, dtype=torch.float64) * 255
    stages = encoded(model, image)
    x = stages[-1][0]
    for step, block in enumerate(model.decoder):
        _, indices, before = stages[3 - step]
        x = F.max_unpool2d(x, indices, 2, 2, output_size=before)
        filtered = alone if "decoder" in options else lambda *arguments: F.conv2d(*arguments, padding=3)
        x = normed(filtered(x, block.conv.weight, block.conv.bias), block.norm)
        if options.get("encoder_addition") and step < 3:
            x = x + stages[2 - step][0]
    expected = F.conv2d(x, model.classifier.weight, model.classifier.bias)
    torch.testing.assert_close(model(image), expected)


@pytest.mark.parametrize("size", [(45, 61), (64, 48)])
@pytest.mark.parametrize("reduction", [True, False])
@pytest.mark.parametrize("addition", [True, False])
def test_fcn_basics_equal_torchs_transposed_convolutions_and_sums(addition, reduction, size):
    model = randomised(FCNBasic(5, width=6, addition=addition, reduction=reduction))
    image = torch.rand(2, 3, *size, dtype=torch.float64) * 255
    stages = encoded(model, image)

    def reduced(features, index):
        layer = model.reduction[index]
        return F.conv2d(features, layer.weight, layer.bias) if reduction else features

    x = reduced(stages[-1][0], 0)
    for step in range(4):
        height, width = stages[3 - step][2]
        x = F.conv_transpose2d(x, model.decoder[step].weight, stride=2, padding=3)[:, :, :height, :width]
        if step < 3 or not reduction:
            x = normed(x, model.norms[step])
        if addition and step < 3:
            x = x + reduced(stages[2 - step][0], step + 1)
    expected = x if reduction else F.conv2d(x, model.classifier.weight, model.classifier.bias)
    torch.testing.assert_close(model(image), expected)


def test_bilinear_interpolation_equals_torchs_interpolation_of_the_deepest_scores():
    model = randomised(BilinearBasic(5, width=6))
    image = torch.rand(2, 3, 48, 64, dtype=torch.float64) * 255
    x = F.conv2d(encoded(model, image)[-1][0], model.classifier.weight, model.classifier.bias)
    for _ in range(4):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(image), x)
    decoder = set(model.state_dict()) - {f"encoder.{name}" for name in model.encoder.state_dict()}
    assert decoder == {"classifier.weight", "classifier.bias"}


def test_a_learned_decoder_without_addition_starts_as_bilinear_interpolation():
    model = FCNBasic(5, width=6, addition=False).eval()
    fixed = BilinearBasic(5, width=6).eval()
    state = model.encoder.state_dict()
    fixed.encoder.load_state_dict(state)
    fixed.classifier.load_state_dict(model.reduction[0].state_dict())
    image = torch.rand(1, 3, 160, 192)
    with torch.no_grad():
        ours, theirs = model(image), fixed(image)
    # Norms start with mean 0 and variance 1. Borders differ, because one pads with zeros and the other repeats.
    torch.testing.assert_close(ours[..., 40:-40, 40:-40], theirs[..., 40:-40, 40:-40], rtol=1e-3, atol=1e-3)


# The transposed convolution that starts as bilinear interpolation.


@pytest.mark.parametrize(("kernel", "stride"), [(4, 2), (8, 2), (16, 8), (6, 2), (32, 16)])
def test_bilinear_deconvolution_starts_as_interpolation_in_the_interior(kernel, stride):
    x = torch.randn(2, 3, 9, 11)
    expected = F.interpolate(x, scale_factor=stride, mode="bilinear", align_corners=False)
    ours = BilinearDeconv(3, kernel=kernel, stride=stride)(x, (9 * stride, 11 * stride))
    assert ours.shape == expected.shape
    edge = stride
    inside = (..., slice(edge, -edge), slice(edge, -edge))
    torch.testing.assert_close(ours[inside], expected[inside])
    odd = BilinearDeconv(3, kernel=kernel, stride=stride)(x, (9 * stride - 1, 11 * stride))
    assert torch.equal(odd, ours[..., :-1, :])


def test_bilinear_kernel_is_dense_and_zero_between_different_channels():
    weight = bilinear_kernel(3, 8, stride=2)
    assert tuple(weight.shape) == (3, 3, 8, 8)
    triangle = torch.tensor([0, 0, 0.25, 0.75, 0.75, 0.25, 0, 0])
    for before in range(3):
        for after in range(3):
            expected = triangle[:, None] * triangle if before == after else torch.zeros(8, 8)
            assert torch.equal(weight[before, after], expected)
    assert BilinearDeconv(3, kernel=8).bias is None
