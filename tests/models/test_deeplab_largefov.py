"""DeepLab-LargeFOV compared with the paper's numbers and torch's functions, and the alignment of its maps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segdeconv.models import DeepLabLargeFOV


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def slim(num_classes=3, **options):
    return DeepLabLargeFOV(num_classes, **{"width": 0.0625, "fc_width": 16, **options})


def test_it_has_the_papers_20_5_million_parameters():
    with torch.device("meta"):
        model = DeepLabLargeFOV(21)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == 14_714_688 + (512 * 9 + 1) * 1024 + (1024 + 1) * 1024 + (1024 + 1) * 21
    assert round(parameters / 1e6, 1) == 20.5  # table 2


# Kernel, dilation, padding, channels and side of the result at 321x321, as in the authors' training file.
TABLE = [
    *[(3, 1, 1, 64, 321)] * 2,
    *[(3, 1, 1, 128, 161)] * 2,
    *[(3, 1, 1, 256, 81)] * 3,
    *[(3, 1, 1, 512, 41)] * 3,
    *[(3, 2, 2, 512, 41)] * 3,
    (3, 12, 12, 1024, 41),
    (1, 1, 0, 1024, 41),
    (1, 1, 0, 21, 41),
]


def test_it_has_the_layer_table_of_the_original():
    rows = []

    def record(module, inputs, output):
        kernel, dilation, padding = module.kernel_size[0], module.dilation[0], module.padding[0]
        rows.append((kernel, dilation, padding, output.shape[1], output.shape[-1]))

    with torch.device("meta"):
        model = DeepLabLargeFOV(21).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(record)
        assert model(torch.zeros(1, 3, 321, 321)).shape == (1, 21, 321, 321)
    assert rows == TABLE
    assert model.dropout.p == 0.5


def reference(model, image):
    """Compute the scores at an eighth, without norm in evaluation mode, from the state dict with torch's functions."""
    state = model.state_dict()

    def conv(x, name, dilation=1):
        weight = state[f"{name}.conv.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, state[f"{name}.conv.bias"], padding=padding, dilation=dilation).relu()

    def windows(x, step, fill):
        """Return 3x3 windows around every cell or every second one, with one more at the end of an even side."""
        x = F.pad(x, (1, step, 1, step), value=fill)
        return x.unfold(2, 3, step).unfold(3, 3, step)

    x = image
    for stage, widths in enumerate(model.encoder.channels):
        for layer in range(len(widths)):
            x = conv(x, f"encoder.stages.{stage}.{layer}", 2 if stage == 4 else 1)
        x = windows(x, 2 if stage < 3 else 1, -torch.inf).amax(dim=(-1, -2))
    x = windows(x, 1, 0.0).mean(dim=(-1, -2))
    x = conv(conv(x, "fc6", 12), "fc7")
    return F.conv2d(x, state["classifier.weight"], state["classifier.bias"])


@pytest.mark.parametrize("size", [(33, 65), (40, 64), (37, 50), (97, 34)])
def test_scores_equal_those_of_torchs_functions_and_cell_i_is_on_pixel_8i(size):
    model = slim(norm=False, dilation=12).double().eval()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        logits, cells = model(image), reference(model, image)
    assert logits.shape == (2, 3, *size)
    assert cells.std() > 1e-6
    on_cells = logits[..., ::8, ::8]
    torch.testing.assert_close(on_cells, cells[..., : on_cells.shape[-2], : on_cells.shape[-1]])
    between = (logits[..., 0, 0] + logits[..., 0, 8]) / 2
    torch.testing.assert_close(logits[..., 0, 4], between)


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (33, 47), (65, 100)])
def test_logits_have_the_size_of_the_image(size):
    with torch.no_grad():
        assert slim(in_channels=2, norm=True).eval()(torch.randn(1, 2, *size)).shape == (1, 3, *size)


def test_every_parameter_gets_a_gradient():
    model = slim()
    model(torch.randn(2, 3, 64, 70)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_fc6_and_fc7_start_as_decimated_layers_of_vgg(tmp_path):
    """Output a, input c, row i and column j come from output 4 a, input c, row 3 i and column 3 j of 7x7."""
    torch.manual_seed(1)
    from torchvision.models.vgg import cfgs, make_layers

    theirs = nn.Module()
    theirs.features = make_layers(cfgs["A"])
    theirs.classifier = nn.Sequential(nn.Linear(512 * 49, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 16))
    torch.save(theirs.state_dict(), tmp_path / "vgg.pth")
    ours = DeepLabLargeFOV(2, depth=11, fc_width=4, pretrained=str(tmp_path / "vgg.pth"))
    assert torch.equal(ours.encoder.stages[4][1].conv.weight, theirs.features[18].weight)
    for a, c, i, j in [(0, 0, 0, 0), (3, 511, 2, 1), (1, 40, 1, 2), (2, 7, 2, 2)]:
        flat = c * 49 + 3 * i * 7 + 3 * j
        assert ours.fc6.conv.weight[a, c, i, j] == theirs.classifier[0].weight[4 * a, flat]
    for a, b in [(0, 0), (3, 1), (2, 3)]:
        assert ours.fc7.conv.weight[a, b, 0, 0] == theirs.classifier[3].weight[4 * a, 4 * b]
        assert ours.fc7.conv.bias[a] == theirs.classifier[3].bias[4 * a]
    fresh = DeepLabLargeFOV(2, depth=11, fc_width=32, pretrained=str(tmp_path / "vgg.pth"))
    assert fresh.fc7.conv.weight.std().item() == pytest.approx((2 / 32) ** 0.5, rel=0.1)
