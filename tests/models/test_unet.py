"""U-Net compared with the paper's numbers and with torch's functions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segdeconv.models import SegNet, UNet

PAPER = ((64, 64), (128, 128), (256, 256), (512, 512), (1024, 1024))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def slim(num_classes=3, **options):
    return UNet(num_classes, **{"width": 0.0625, **options})


def test_with_the_papers_table_it_has_23_convolutions_and_the_parameters_counted_by_hand():
    with torch.device("meta"):
        model = UNet(2, in_channels=1, norm=False, stages=PAPER)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(layers) == 23
    # By hand: 3x3 convolutions down and up, four 2x2 up-convolutions, a 1x1 classifier; a bias for each output.
    down = [(1, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 1024)]
    up = [(1024, 512), (512, 512), (512, 256), (256, 256), (256, 128), (128, 128), (128, 64), (64, 64)]
    expected = sum((9 * before + 1) * after for before, after in [*down, (1024, 1024), *up])
    expected += sum((4 * before + 1) * before // 2 for before in (1024, 512, 256, 128))
    expected += (64 + 1) * 2
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == 31_030_658


def reference(model, image):
    """Compute U-Net without norm in evaluation mode from its state dict with torch's functions."""
    state = model.state_dict()

    def conv(x, name):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).relu()

    x, copies = image, []
    stages = model.encoder.channels
    for stage, widths in enumerate(stages):
        if stage:
            x = F.max_pool2d(x, 2, 2, ceil_mode=True)
        for layer in range(len(widths)):
            x = conv(x, f"encoder.stages.{stage}.{layer}.conv")
        copies.append(x)
    for step, copied in enumerate(reversed(copies[:-1])):
        # A 2x2 kernel with stride 2 writes every pixel of the result once.
        weight = state[f"ups.{step}.0.weight"]
        n, _, h, w = x.shape
        x = torch.einsum("nchw,cdij->ndhiwj", x, weight).reshape(n, -1, 2 * h, 2 * w)
        x = (x + state[f"ups.{step}.0.bias"][:, None, None]).relu()[..., : copied.shape[-2], : copied.shape[-1]]
        x = torch.cat([x, copied], dim=1)
        for layer in range(2):
            x = conv(x, f"decoder.{step}.{layer}.conv")
    return F.conv2d(x, state["classifier.weight"], state["classifier.bias"])


@pytest.mark.parametrize("size", [(32, 32), (37, 50), (65, 33), (1, 7)])
def test_logits_equal_those_of_torchs_functions_at_any_size(size):
    model = slim(norm=False).double().eval()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        logits, expected = model(image), reference(model, image)
    assert logits.shape == (2, 3, *size)
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits, expected)


def test_every_stage_is_copied_to_the_decoder():
    """The copy reaches the decoder even when the up-convolutions give zeros."""
    model = slim().eval()
    for position, up in enumerate(model.ups):
        maps = []
        handles = [other.register_forward_hook(lambda m, i, output: output * 0) for other in model.ups]
        handles.append(model.decoder[position][0].register_forward_hook(lambda m, i, o, maps=maps: maps.append(i[0])))
        model(torch.randn(1, 3, 40, 40))
        for handle in handles:
            handle.remove()
        half = maps[0].shape[1] // 2
        assert up[0].out_channels == half
        assert maps[0][:, :half].eq(0).all()
        assert maps[0][:, half:].abs().sum() > 0


def test_dropout_is_at_the_end_of_the_two_deepest_stages_before_the_copy():
    model = slim(dropout=0.5)
    drops = []
    model.dropout.register_forward_hook(lambda module, inputs, output: drops.append((inputs[0].shape[1:], output)))
    copies = []
    model.decoder[0][0].register_forward_hook(lambda module, inputs, output: copies.append(inputs[0]))
    model(torch.randn(2, 3, 64, 64))
    assert [shape for shape, _ in drops] == [(32, 8, 8), (32, 4, 4)]
    assert torch.equal(copies[0][:, 32:], drops[0][1])
    assert 0.4 < (drops[0][1] == 0).float().mean() < 1


@pytest.mark.parametrize("norm", [True, False])
def test_every_parameter_gets_a_gradient(norm):
    model = slim(norm=norm)
    model(torch.randn(2, 3, 45, 50)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if not (norm and name.endswith("conv.bias")):
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("depth", [11, 13, 19])
def test_its_encoder_can_have_any_depth_and_has_the_names_of_segnet(depth):
    with torch.device("meta"):
        model = UNet(5, depth=depth, in_channels=2).eval()
        assert model(torch.zeros(1, 2, 45, 60)).shape == (1, 5, 45, 60)
        other = SegNet(5, depth=depth, in_channels=2)
    names = {name: value.shape for name, value in model.state_dict().items() if name.startswith("encoder.")}
    assert names == {name: value.shape for name, value in other.state_dict().items() if name.startswith("encoder.")}
