"""VGG encoders compared with torchvision's VGG, and first convolutions for images with any number of channels."""

import pytest
import torch
from torch import nn
from torchvision.models import get_weight
from torchvision.models.vgg import cfgs, make_layers

from segdeconv.errors import CheckpointError, UsageError
from segdeconv.models import SegNet
from segdeconv.models.vgg import VGG_STAGES, adapt_channels, load_vgg, vgg_encoder

SOURCES = ("pre_relu", "post_relu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# VGG weights.

LETTERS = {11: "A", 13: "B", 16: "D", 19: "E"}  # the columns of VGG's table 1, as torchvision names them


def torchvision_vgg(depth, norm):
    """Return torchvision's `vgg*.features`, with norms that are not at their initial values, and its state dict."""
    features = make_layers(cfgs[LETTERS[depth]], batch_norm=norm).eval()
    for module in features.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                nn.init.normal_(tensor, std=0.1)
            for tensor in (module.running_var, module.weight.data):
                nn.init.uniform_(tensor, 0.5, 1.5)
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    return features, state | {"classifier.0.weight": torch.zeros(4, 4), "classifier.0.bias": torch.zeros(4)}


@pytest.fixture(scope="module")
def vgg11():
    return {norm: torchvision_vgg(11, norm)[1] for norm in (True, False)}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("depth", VGG_STAGES)
def test_an_encoder_with_torchvisions_weights_equals_torchvisions_vgg(depth, norm):
    theirs, state = torchvision_vgg(depth, norm)
    image = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        expected = theirs(image)
        assert expected.std() > 0
        for source in SOURCES:
            ours = vgg_encoder(depth, norm=norm, switch_source=source).eval()
            load_vgg(ours, state, source="torchvision")
            torch.testing.assert_close(ours(image).features, expected)


def test_weights_without_batch_norm_load_into_an_encoder_whose_norms_keep_their_initial_values(vgg11):
    encoder = vgg_encoder(11, norm=True)
    load_vgg(encoder, vgg11[False], source="plain.pth")
    blocks = [block for stage in encoder.stages for block in stage]
    for block, key in zip(blocks, [k for k, v in vgg11[False].items() if v.ndim == 4], strict=True):
        assert torch.equal(block.conv.weight, vgg11[False][key])
        assert torch.equal(block.conv.bias, vgg11[False][key.replace("weight", "bias")])
        assert block.norm.weight.eq(1).all()
        assert block.norm.running_mean.eq(0).all()


def test_batch_norm_weights_are_refused_by_an_encoder_without_batch_norm(vgg11):
    with pytest.raises(
        CheckpointError, match=r"bn\.pth was trained with batch norm, but the encoder has none - use model"
    ):
        load_vgg(vgg_encoder(11, norm=False), vgg11[True], source="bn.pth")


def test_weights_of_another_depth_are_refused(vgg11):
    with pytest.raises(
        CheckpointError, match=r"vgg11\.pth is not .*: it has 8 convolutions and the encoder has 13, .* model\.depth"
    ):
        load_vgg(vgg_encoder(16), vgg11[True], source="vgg11.pth")


def test_a_refused_file_leaves_the_encoder_as_it_was(vgg11):
    encoder = vgg_encoder(11, norm=False)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_vgg(encoder, vgg11[True], source="bn.pth")
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_pretrained_takes_the_path_of_a_torchvision_file(tmp_path, vgg11):
    path = tmp_path / "vgg11_bn.pth"
    torch.save(vgg11[True], path)
    model = SegNet(2, depth=11, pretrained=str(path))
    expected = vgg_encoder(11)
    load_vgg(expected, vgg11[True], source="memory")
    for key, value in expected.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("content", "message"), [(b"not weights", "read safely"), ([1, 2], "not a state dict of tensors")]
)
def test_a_file_without_weights_is_refused(tmp_path, content, message):
    path = tmp_path / "vgg.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"vgg\.pth .*{message}.* - use a torchvision VGG state dict"):
        vgg_encoder(11, pretrained=str(path))


def test_a_file_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match=r"model\.pretrained=nowhere\.pth is not a file - use none, imagenet, "):
        vgg_encoder(11, pretrained="nowhere.pth")


@pytest.mark.parametrize("pretrained", ["imagenet", "imagenet_plain", "some.pth"])
def test_pretrained_weights_are_refused_for_a_slim_network(pretrained):
    message = (
        rf"model\.pretrained={pretrained} with model\.width=0\.5: .* use model\.width=1\.0 or model\.pretrained=none"
    )
    with pytest.raises(UsageError, match=message):
        SegNet(2, width=0.5, pretrained=pretrained)


@pytest.mark.parametrize(
    ("pretrained", "norm", "name"),
    [
        ("imagenet", True, "VGG16_BN_Weights"),
        ("imagenet", False, "VGG16_Weights"),
        ("imagenet_plain", True, "VGG16_Weights"),
        ("imagenet_plain", False, "VGG16_Weights"),
    ],
)
def test_imagenet_selects_torchvisions_weights_with_or_without_batch_norm(monkeypatch, pretrained, norm, name):
    requested = []
    monkeypatch.setattr("segdeconv.models.vgg._download", lambda name: requested.append(name) or {})
    monkeypatch.setattr("segdeconv.models.vgg.load_vgg", lambda encoder, state, *, source: None)
    vgg_encoder(16, norm=norm, pretrained=pretrained)
    assert requested == [name]
    assert get_weight(f"{name}.IMAGENET1K_V1").url.startswith("https://")


# Images with other numbers of channels than three.


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("channels", [1, 2, 4, 5, 6, 13])
def test_a_grey_image_in_every_channel_gives_the_same_features_as_in_rgb(vgg11, channels, norm):
    grey = torch.randn(2, 1, 37, 50)
    features = []
    for count in (3, channels):
        encoder = vgg_encoder(11, in_channels=count, norm=norm).eval()
        load_vgg(encoder, vgg11[norm], source="torchvision")
        with torch.no_grad():
            features.append(encoder(grey.expand(-1, count, -1, -1)).features)
    assert features[0].std() > 0
    torch.testing.assert_close(features[1], features[0])


def test_one_channel_gets_the_sum_and_more_channels_get_the_colours_in_turn():
    red, green, blue = (torch.randn(8, 1, 3, 3) for _ in range(3))
    rgb = torch.cat([red, green, blue], dim=1)
    expected = {
        1: [red + green + blue],
        2: [red + blue, green],
        3: [red, green, blue],
        4: [red / 2, green, blue, red / 2],
        6: [red / 2, green / 2, blue / 2] * 2,
        7: [red / 3, green / 2, blue / 2, red / 3, green / 2, blue / 2, red / 3],
    }
    for channels, parts in expected.items():
        torch.testing.assert_close(adapt_channels(rgb, channels), torch.cat(parts, dim=1), rtol=1e-5, atol=1e-6)
    grey = adapt_channels(rgb, 1)
    torch.testing.assert_close(adapt_channels(grey, 3), grey.expand(-1, 3, -1, -1) / 3)
    assert torch.equal(adapt_channels(rgb, 3), rgb)


def test_adapting_does_not_change_its_input(vgg11):
    before = vgg11[False]["features.0.weight"].clone()
    load_vgg(vgg_encoder(11, in_channels=5, norm=False), vgg11[False], source="torchvision")
    assert torch.equal(vgg11[False]["features.0.weight"], before)
