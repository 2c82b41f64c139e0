"""Summaries compared with hooks, torch's own counter, gradients and the published tables."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segdeconv import models
from segdeconv.models import SegmentationModel
from segdeconv.summary.summary import MARGINS, describe, layer_table
from segdeconv.switches import ops

ROOT = Path(__file__).parents[2]
SIZE = (360, 480)

# Networks so slim that their gradients are computed quickly.
SLIM = {
    "SegNet": lambda: models.SegNet(2, width=1 / 64),
    "SegNet, VGG11": lambda: models.SegNet(2, width=1 / 64, depth=11),
    "SegNet, concatenated": lambda: models.SegNet(2, width=1 / 64, depth=11, encoder_concatenation=True),
    "SegNetBasic": lambda: models.SegNetBasic(2, width=1),
    "SegNetBasic, added": lambda: models.SegNetBasic(2, width=1, encoder_addition=True),
    "FCNBasic": lambda: models.FCNBasic(2, width=1),
    "BilinearBasic": lambda: models.BilinearBasic(2, width=1),
    "DeconvNet": lambda: models.DeconvNet(2, width=1 / 64, fc_width=1),
    "UNet": lambda: models.UNet(2, width=1 / 64),
    "FCN": lambda: models.FCN(2, width=1 / 64, fc_width=1),
    "DeepLabLargeFOV": lambda: models.DeepLabLargeFOV(2, width=1 / 64, fc_width=1),
    "FPN": lambda: models.FPN(2, width=1 / 64, channels=16),
}


@pytest.fixture(scope="module")
def segnet():
    return describe(lambda: models.SegNet(11), SIZE)


def test_segnet_has_the_published_table(segnet):
    weighted = [layer for layer in segnet.layers if layer.filter_depth]
    assert [layer.output[0] for layer in weighted] == [
        64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512,
        512, 512, 512, 512, 512, 256, 256, 256, 128, 128, 64, 64, 11,
    ]  # fmt: skip
    assert (segnet.weight_layers, segnet.parameters) == (26, 29_449_355)
    assert sum(layer.parameters for layer in segnet.layers) == segnet.parameters
    pools = [layer for layer in segnet.layers if layer.kind == "max_pool"]
    assert [layer.output[1:] for layer in pools] == [(180, 240), (90, 120), (45, 60), (23, 30), (12, 15)]
    assert [layer.field for layer in pools] == [(side, side) for side in (6, 16, 44, 100, 212)]  # VGG16's
    assert segnet.paper is not None
    assert segnet.paper.weight_layers == 26


def test_operations_are_sums_over_the_published_table(segnet):
    # Channels of every stage and the size of its map: 9 products for every pair of channels at every position.
    stages = [(3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512)]
    decoder = [(512, 512, 512, 512), (512, 512, 512, 256), (256, 256, 256, 128), (128, 128, 64), (64, 64, 11)]
    sides = [(360, 480), (180, 240), (90, 120), (45, 60), (23, 30)]
    expected = 0
    for channels, (height, width) in [*zip(stages, sides, strict=True), *zip(decoder, reversed(sides), strict=True)]:
        expected += sum(9 * a * b * height * width for a, b in pairwise(channels))
    assert segnet.multiply_adds == expected == 106_712_432_640


def test_memory_of_maps_and_switches_is_counted_in_bytes(segnet):
    assert segnet.layers[0].memory == 64 * 360 * 480 * 4
    pooled = [(64, 180, 240), (128, 90, 120), (256, 45, 60), (512, 23, 30), (512, 12, 15)]
    assert segnet.switches == sum(channels * height * width for channels, height, width in pooled)
    assert next(layer.kept for layer in segnet.layers if layer.kept) == 64 * 180 * 240
    # In the first stage, the input of a layer and the outputs of its convolution and its norm exist together.
    assert segnet.peak >= 3 * 64 * 360 * 480 * 4


def test_unpooling_names_the_pool_whose_switches_it_uses(segnet):
    sources = [layer.then[0] for layer in segnet.layers if layer.kind == "unpool"]
    pools = [number for number, layer in enumerate(segnet.layers, 1) if layer.kind == "max_pool"]
    assert sources == [f"switches of {number}" for number in reversed(pools)]


def test_segnet_basic_and_deconvnet_have_the_published_numbers():
    basic = describe(lambda: models.SegNetBasic(11), SIZE)
    fields = [layer.field[0] for layer in basic.layers if layer.kind in ("conv", "max_pool")][:8]
    assert fields == [7, 8, 20, 22, 46, 50, 98, 106]
    assert (basic.parameters, basic.weight_layers) == (1_416_587, 9)
    deconvnet = describe(lambda: models.DeconvNet(21), (224, 224))
    assert (deconvnet.parameters, deconvnet.weight_layers) == (251_805_653, 30)
    shapes = {layer.name: layer.output for layer in deconvnet.layers}
    assert (shapes["fc7.conv"], shapes["fc6_deconv.deconv"]) == ((4096, 1, 1), (512, 7, 7))


def networks():
    exported = [getattr(models, name) for name in models.__all__]
    return [item for item in exported if isinstance(item, type) and item is not SegmentationModel]


@pytest.mark.parametrize("network", networks(), ids=lambda network: network.__name__)
def test_the_summary_of_every_network_agrees_with_hooks_and_with_torchs_counter(network):
    description = describe(lambda: network(5), (227, 290))
    with torch.device("meta"):
        model = network(5).eval()
    executed = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: executed.setdefault(name, []).append(
                    (tuple(inputs[0].shape[1:]), tuple(nn.Module.__call__(nn.Identity(), output).shape[1:]))
                )
            )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = model(torch.empty(1, 3, 227, 290, device="meta"))
    assert 2 * description.multiply_adds == counter.get_total_flops()
    last = description.layers[-1]
    assert tuple(logits.shape[1:]) == (5, 227, 290)
    assert last.output == (5, 227, 290) or last.then == ["cut to 227x290"]
    assert description.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sum(layer.parameters for layer in description.layers) == description.parameters
    described = {}
    for layer in description.layers:
        described.setdefault(layer.name, []).append((layer.input, layer.output))
    assert executed
    for name, shapes in executed.items():
        assert described[name] == shapes
    assert all(layer.field is not None for layer in description.layers)


def reach(model, rows, height, width):
    """Return the largest number of image rows that get a gradient from one of the given rows of the output."""
    widest = 0
    for row in rows:
        image = torch.rand(1, 3, height, width, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(image)[0, 0, row].sum(), image)
        reached = gradient.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
        assert reached.min() > 0
        assert reached.max() < height - 1
        widest = max(widest, int(reached.max() - reached.min()) + 1)
    return widest


def mean_pool(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    pooled = F.avg_pool2d(x, kernel_size, stride, padding, ceil_mode)
    return (pooled, torch.zeros(pooled.shape, dtype=torch.int64)) if return_indices else pooled


@pytest.fixture
def dense_windows(monkeypatch):
    """Make pools depend on all cells of a window, and unpools write a value into all of them."""

    def pool(x, packed):
        pooled = F.avg_pool2d(x, 2, ceil_mode=True)
        return pooled, torch.zeros(pooled.shape, dtype=torch.uint8)

    def unpool(x, codes, height, width, unsigned_zero):
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[..., :height, :width]

    monkeypatch.setattr(ops._MaxPool, "apply", pool)
    monkeypatch.setattr(ops._Unpool, "apply", unpool)
    monkeypatch.setattr(F, "max_pool2d", mean_pool)


def positive(model):
    """Make all weights positive and remove the norms, so that no gradient vanishes."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm | nn.BatchNorm2d | nn.LocalResponseNorm):
                setattr(module, name, nn.Identity())
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data.uniform_(0.5, 1.0)
        else:
            tensor.data.zero_()
    return model.double().eval()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "DeconvNet" else name for name in SLIM]
)
def test_the_receptive_field_is_the_reach_of_the_gradients(name, dense_windows):
    torch.manual_seed(0)
    height, width = {"DeconvNet": (1696, 200), "SegNet": (1056, 32)}.get(name, (704 if "Basic" in name else 1184, 32))
    period = 16 if "Basic" in name else 32  # receptive fields repeat after this number of rows
    expected = reach(positive(SLIM[name]()), range(height // 2, height // 2 + period), height, width)
    assert describe(SLIM[name], (228, 228)).layers[-1].field == (expected, expected)


class Mixed(SegmentationModel):
    """User-defined network with strides, dilations, groups, skips, every kind of upsampling, functions and modules."""

    def __init__(self, num_classes, *, in_channels=3):
        super().__init__(num_classes, in_channels=in_channels)
        self.stem = nn.Conv2d(in_channels, 4, 5, stride=2, padding=2)
        self.dilated = nn.Conv2d(4, 4, 3, padding=6, dilation=6, groups=2)
        self.even = nn.Conv2d(4, 4, (2, 4), stride=(2, 4), padding=1)
        self.wide = nn.ConvTranspose2d(4, 4, (6, 7), stride=(2, 4), padding=1)
        self.pool = nn.AvgPool2d(3, 2, 1)
        self.shuffle = nn.PixelShuffle(2)
        self.lone = nn.Parameter(torch.ones(4, 4, 3, 3))
        self.classifier = nn.Conv2d(9, num_classes, 1)

    def forward(self, image):
        first = F.relu(self.stem(image))
        x = self.dilated(first) + first
        deep = F.gelu(self.even(F.pad(x, (1, 2, 3, 0))))
        deep = self.wide(deep)[..., : first.shape[-2], : first.shape[-1]]
        pooled = F.interpolate(self.pool(x), size=first.shape[-2:], mode="nearest")
        last = F.conv2d(pooled, self.lone, padding=1)
        x = torch.cat([deep, last, self.shuffle(x[..., ::2, ::2])[..., : first.shape[-2], : first.shape[-1]]], dim=1)
        return F.interpolate(self.classifier(x), size=image.shape[-2:], mode="bilinear", align_corners=False)


def test_a_user_defined_network_is_described(dense_windows):
    torch.manual_seed(0)
    model = positive(Mixed(2))
    height, width = 192, 192
    description = describe(lambda: Mixed(2), (height, width))
    field = {"rows": 0, "columns": 0}
    for axis, (name, dims) in enumerate({"rows": (0, 1, 3), "columns": (0, 1, 2)}.items()):
        for position in range(80, 112):
            image = torch.rand(1, 3, height, width, dtype=torch.float64, requires_grad=True)
            (gradient,) = torch.autograd.grad(model(image)[0, 0].select(axis, position).sum(), image)
            reached = gradient.abs().sum(dim=dims).nonzero().flatten()
            field[name] = max(field[name], int(reached.max() - reached.min()) + 1)
    by_name = {layer.name: layer for layer in description.layers}
    assert by_name["dilated"].filter_depth == 2
    assert by_name["even"].kernel == (2, 4)
    assert description.layers[-1].field == tuple(field.values())
    assert field["rows"] != field["columns"]
    assert sum(layer.parameters for layer in description.layers) == description.parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, height, width, dtype=torch.float64))
    assert 2 * description.multiply_adds == counter.get_total_flops()
    kinds = [layer.kind for layer in description.layers]
    assert {"conv", "deconv", "add", "avg_pool", "nearest", "bilinear", "cat", "pixelshuffle"} <= {
        kind.replace("_shuffle", "shuffle") for kind in kinds
    }


class Whole(SegmentationModel):
    """Network with a branch that depends on the whole image, or with an operation of unknown receptive field."""

    def __init__(self, num_classes, *, in_channels=3, odd=False):
        super().__init__(num_classes, in_channels=in_channels)
        self.near, self.far, self.odd = nn.Conv2d(in_channels, 4, 3, padding=1), nn.Linear(4, 4), odd
        self.classifier = nn.Conv2d(4, num_classes, 1)

    def forward(self, image):
        x = self.near(image)
        if self.odd:
            return self.classifier(x.flip(dims=(2,)))
        return self.classifier(x * torch.sigmoid(self.far(x.mean(dim=(2, 3))))[:, :, None, None])


def test_a_field_of_the_whole_image_is_all_and_an_unknown_one_is_a_question_mark():
    whole = describe(lambda: Whole(2), (40, 50))
    assert whole.layers[0].field == (3, 3)
    assert whole.layers[-1].field == (None, None)
    assert "allxall" in layer_table(whole)
    odd = describe(lambda: Whole(2, odd=True), (40, 50))
    assert odd.layers[-1].field is None
    assert [layer.kind for layer in odd.layers] == ["conv", "flip", "conv"]
    assert layer_table(odd).splitlines()[3].split()[6] == "?"


class Writing(SegmentationModel):
    """Network that writes into a part of a tensor, whose dependences are then unknown."""

    def __init__(self, num_classes, *, in_channels=3):
        super().__init__(num_classes, in_channels=in_channels)
        self.first, self.classifier = nn.Conv2d(in_channels, 4, 3, padding=1), nn.Conv2d(4, num_classes, 1)

    def forward(self, image):
        x = self.first(image)
        out = torch.zeros_like(x)
        out[..., 1:, :] = x[..., :-1, :]
        return self.classifier(out)


def test_a_map_that_is_written_in_parts_has_an_unknown_field():
    description = describe(lambda: Writing(2), (40, 50))
    assert [layer.field for layer in description.layers if layer.kind == "conv"] == [(3, 3), None]


class ChannelsLast(SegmentationModel):
    """Network like ConvNeXt, with a linear layer over the channels of every position."""

    def __init__(self, num_classes, *, in_channels=3):
        super().__init__(num_classes, in_channels=in_channels)
        self.patches = nn.Conv2d(in_channels, 8, 4, stride=4)
        self.mix, self.norm, self.near = nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv2d(8, 8, 3, padding=1)
        self.classifier = nn.Conv2d(8, num_classes, 1)

    def forward(self, image):
        x = self.norm(self.patches(image).permute(0, 2, 3, 1))
        x = self.near(F.gelu(self.mix(x)).permute(0, 3, 1, 2))
        return F.interpolate(self.classifier(x), scale_factor=4, mode="nearest")


def test_linear_layers_over_channels_keep_the_field():
    description = describe(lambda: ChannelsLast(2), (64, 96))
    fields = [layer.field for layer in description.layers if layer.filter_depth]
    assert fields == [(4, 4), (4, 4), (12, 12), (12, 12)]
    assert sum(layer.parameters for layer in description.layers) == description.parameters
    assert description.weight_layers == 4


class OneSize(SegmentationModel):
    """Network that accepts only 32x32 images and whose constructor reads its weights."""

    def __init__(self, num_classes, *, in_channels=3):
        super().__init__(num_classes, in_channels=in_channels)
        self.classifier = nn.Conv2d(in_channels, num_classes, 1)
        self.scale = float(self.classifier.weight.abs().max())

    def forward(self, image):
        if image.shape[-1] != 32:
            raise ValueError("32x32")
        return self.classifier(image)


def test_a_network_of_one_size_is_described_without_fields():
    description = describe(lambda: OneSize(2), (32, 32))
    assert description.layers[0].output == (2, 32, 32)
    assert description.layers[0].field is None


def test_weights_take_no_memory_and_the_model_is_not_changed():
    built = []

    def build():
        built.append(models.SegNet(2, width=0.25))
        return built[-1]

    describe(build, (64, 64))
    assert len(built) == 1
    assert all(parameter.device.type == "meta" for parameter in built[0].parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in built[0].modules())
    x = torch.rand(1, 1, 4, 4)
    assert ops.unpool(*ops.max_pool(x)).shape == x.shape  # pooling works as before


def test_a_table_fits_the_terminal_and_names_the_columns_that_it_leaves_out(segnet):
    for width in (200, 110, 90, 80):
        table = layer_table(segnet, width)
        rows = table.split("\n\n")[0].splitlines()
        assert max(map(len, rows)) <= width
        assert len(rows) == 37
        assert ("without" in table) == (width < 200)
    assert "29,449,355" in layer_table(segnet)
    assert "117 MB" in layer_table(segnet)


def test_the_margins_keep_the_same_sides_odd():
    assert all(margin % 2**11 == 0 for margin in MARGINS)


def test_the_command_takes_classes_and_size_from_the_data_set_without_its_files(tmp_path, commands):
    done = commands("describe", "dataset=camvid", "model=segnet_basic", "--json", "basic.json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "SegNetBasic, 11 classes, one image of 360x480" in done.out
    content = json.loads((tmp_path / "basic.json").read_text())
    assert content["parameters"] == 1_416_587
    assert content["layers"][1]["kernel"] == [7, 7]
    assert content["paper"]["name"] == "SegNet-Basic"
    assert [path.name for path in tmp_path.iterdir()] == ["basic.json"]  # nothing was downloaded
    assert commands("describe", "dataset=camvid", "model=unet", "--json", "basic.json", cwd=tmp_path).code == 0
    assert json.loads((tmp_path / "basic.json").read_text())["network"] == "UNet"


@pytest.mark.parametrize("content", ["MINE", "[]", '{"layers": []}', ""])
def test_a_file_that_is_not_a_summary_is_not_replaced(tmp_path, commands, content):
    (tmp_path / "mine.json").write_text(content)
    done = commands("describe", "dataset=camvid", "--json", "mine.json", cwd=tmp_path)
    assert done.code == 2
    message = "mine.json exists and was not written by segdeconv; it would be overwritten - choose another --json"
    assert message in done.error_message
    assert (tmp_path / "mine.json").read_text() == content


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["size=360"], "size=360 is not a height and width"),
        (["classes=some"], "classes=some is not a number of classes"),
        (["clases=3"], "unknown key clases - did you mean 'classes'?"),
        (["model.widht=2"], "unknown key model.widht - did you mean 'width'?"),
        (["dataset=oxford_pets"], "the classes of segdeconv.data.OxfordPets are read from its files"),
        (["--json"], "--json has no value"),
    ],
)
def test_a_wrong_command_line_gives_an_error_message_of_one_line(tmp_path, words, message, monkeypatch, capsys):
    import runpy

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["describe.py", *words])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(ROOT / "scripts" / "describe.py"), run_name="__main__")
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
