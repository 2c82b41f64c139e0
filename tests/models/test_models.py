"""SegNet compared with the original tables, properties of all networks, and export."""

import copy
import inspect
import pickle
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segdeconv.errors import UsageError
from segdeconv.models import FCN, FPN, DeconvNet, DeepLabLargeFOV, FCNBasic, SegNet, SegNetBasic, UNet, create_model
from segdeconv.models.vgg import VGG_STAGES
from segdeconv.switches import MaxPool

SLIM = 0.0625
SOURCES = ("pre_relu", "post_relu")
NETWORKS = {
    "SegNet": lambda **options: SegNet(3, width=SLIM, **options),
    "SegNetBasic": lambda **o: SegNetBasic(3, **o),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def applied(model, image):
    """Return (module, input, output shape) of every module without children, in the order of execution."""
    calls, handles = [], []

    def note(module, inputs, output):
        map_ = output.features if isinstance(module, MaxPool) else output
        calls.append((module, inputs[0].shape, map_.shape))

    for module in model.modules():
        if not list(module.children()):
            handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    return calls


def of_type(calls, kind):
    return [call for call in calls if isinstance(call[0], kind)]


# The numbers of the original networks.


@pytest.mark.parametrize(("num_classes", "parameters"), [(11, 29_449_355), (21, 29_455_125)])
def test_segnet_has_the_originals_parameters(num_classes, parameters):
    model = SegNet(num_classes)
    assert count(model.parameters()) == parameters
    convolutions = [module for module in model.encoder.modules() if isinstance(module, nn.Conv2d)]
    assert count(p for convolution in convolutions for p in convolution.parameters()) == 14_714_688


@pytest.mark.parametrize(("bias", "parameters"), [(True, 1_416_587), (False, 1_416_064)])
def test_segnet_basic_has_the_originals_parameters(bias, parameters):
    assert count(SegNetBasic(11, bias=bias).parameters()) == parameters


@pytest.mark.parametrize("source", SOURCES)
def test_segnet_runs_26_convolutions_and_25_norms(source):
    calls = applied(SegNet(3, width=SLIM, switch_source=source).eval(), torch.randn(1, 3, 32, 32))
    kinds = Counter(type(module) for module, *_ in calls)
    assert kinds[nn.Conv2d] == 26
    assert kinds[nn.BatchNorm2d] == 25
    # With pre_relu, the maxima of the five pools are rectified outside of modules.
    assert kinds[nn.ReLU] == (25 if source == "post_relu" else 20)
    assert isinstance(calls[-1][0], nn.Conv2d)  # the classifier, nothing after it


def test_segnet_basic_runs_9_convolutions_8_norms_and_4_relus():
    calls = applied(SegNetBasic(3, switch_source="post_relu").eval(), torch.randn(1, 3, 32, 32))
    kinds = Counter(type(module) for module, *_ in calls)
    assert (kinds[nn.Conv2d], kinds[nn.BatchNorm2d], kinds[nn.ReLU]) == (9, 8, 4)
    order = [type(module).__name__ for module, *_ in calls if not isinstance(module, nn.Identity)]
    encoder = ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool"] * 4
    decoder = ["Unpool", "Conv2d", "BatchNorm2d"] * 4
    assert order == ["LocalResponseNorm", *encoder, *decoder, "Conv2d"]


def test_segnet_basic_with_pre_relu_applies_relu_4_times_too(monkeypatch):
    relus = []
    relu = torch.relu
    monkeypatch.setattr(torch, "relu", lambda x: relus.append(x.shape) or relu(x))
    calls = applied(SegNetBasic(3, switch_source="pre_relu").eval(), torch.randn(1, 3, 32, 32))
    assert not of_type(calls, nn.ReLU)
    assert [tuple(shape[-2:]) for shape in relus] == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_segnet_has_the_layer_table_of_the_original():
    encoder = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    decoder = [512, 512, 512, 512, 512, 256, 256, 256, 128, 128, 64, 64, 11]
    outputs = encoder + decoder
    expected = [(before, after, (3, 3)) for before, after in zip([3, *outputs], outputs, strict=False)]
    calls = of_type(applied(SegNet(11).eval(), torch.randn(1, 3, 32, 32)), nn.Conv2d)
    assert [(module.in_channels, module.out_channels, module.kernel_size) for module, *_ in calls] == expected
    assert all(module.bias is not None and module.padding == (1, 1) for module, *_ in calls)


def test_segnet_basic_has_the_layer_table_of_the_original():
    expected = [(3, 64, (7, 7))] + [(64, 64, (7, 7))] * 7 + [(64, 11, (1, 1))]
    calls = of_type(applied(SegNetBasic(11).eval(), torch.randn(1, 3, 32, 32)), nn.Conv2d)
    assert [(module.in_channels, module.out_channels, module.kernel_size) for module, *_ in calls] == expected


def test_segnet_has_the_map_sizes_of_the_original_at_360x480():
    model = SegNet(3, width=SLIM).eval()
    sizes = [tuple(shape[-2:]) for _, shape, _ in of_type(applied(model, torch.randn(1, 3, 360, 480)), nn.Conv2d)]
    stages = [((360, 480), 2), ((180, 240), 2), ((90, 120), 3), ((45, 60), 3), ((23, 30), 3)]
    encoder = [size for size, length in stages for _ in range(length)]
    assert sizes == encoder + encoder[::-1]
    with torch.no_grad():
        assert tuple(model.encoder(torch.randn(1, 3, 360, 480)).features.shape[-2:]) == (12, 15)


def test_segnet_basic_has_the_map_sizes_of_the_original_at_360x480():
    sizes = [(360, 480), (180, 240), (90, 120), (45, 60)]
    calls = of_type(applied(SegNetBasic(3).eval(), torch.randn(1, 3, 360, 480)), nn.Conv2d)
    assert [tuple(shape[-2:]) for _, shape, _ in calls] == [*sizes, *sizes[::-1], (360, 480)]


def test_receptive_field_of_segnet_basic_after_pool4_is_106():
    # With positive weights, the last cell of every window wins on a rising ramp, and the first on a falling one.
    # Together the gradients of one unit reach every pixel of its receptive field.
    encoder = SegNetBasic(3, width=4).encoder.eval().double()
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    ramp = torch.arange(240.0, dtype=torch.float64)
    reached = torch.zeros(240, 240, dtype=torch.bool)
    for image in (ramp[:, None] + ramp, 480 - ramp[:, None] - ramp):
        image = image.expand(1, 3, -1, -1).clone().requires_grad_()
        encoder(image).features[0, 0, 7, 7].backward()
        reached |= image.grad[0].abs().sum(dim=0) > 0
    rows, columns = reached.any(dim=1).nonzero(), reached.any(dim=0).nonzero()
    assert (rows.max() - rows.min() + 1).item() == 106
    assert (columns.max() - columns.min() + 1).item() == 106


def test_segnet_basic_normalises_the_response_by_the_formula_of_the_original():
    image = torch.rand(2, 3, 5, 7) * 255
    expected = image / (1 + 2e-5 * image.square().sum(dim=1, keepdim=True)) ** 0.75
    torch.testing.assert_close(SegNetBasic(3).normalise(image), expected)


def test_weights_start_as_caffes_msra_and_biases_at_zero():
    for module in SegNet(11).modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.in_channels * 9
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)
            assert module.bias.eq(0).all()


# Properties of all networks.


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient(name, source):
    model = NETWORKS[name](switch_source=source)
    model(torch.randn(2, 3, 45, 50)).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        if not key.endswith("conv.bias"):  # the batch norm after it cancels it
            assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", NETWORKS)
def test_decoder_and_encoder_share_no_weights(name):
    model = NETWORKS[name]()
    pointers = {part: {p.data_ptr() for p in getattr(model, part).parameters()} for part in ("encoder", "decoder")}
    assert pointers["encoder"]
    assert pointers["decoder"]
    assert pointers["encoder"].isdisjoint(pointers["decoder"])


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_can_be_negative_and_positive_in_every_class(name):
    with torch.no_grad():
        logits = NETWORKS[name]()(torch.randn(2, 3, 64, 64))
    assert (logits < 0).any(dim=3).any(dim=2).any(dim=0).all()
    assert (logits > 0).any(dim=3).any(dim=2).any(dim=0).all()


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (37, 50), (65, 32), (360, 480)])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_have_the_size_of_the_image(name, source, size):
    model = NETWORKS[name](switch_source=source).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("name", NETWORKS)
def test_images_may_have_any_number_of_channels(name, channels):
    model = NETWORKS[name](in_channels=channels).eval()
    assert model.in_channels == channels
    with torch.no_grad():
        assert model(torch.randn(1, channels, 33, 47)).shape == (1, 3, 33, 47)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("depth", VGG_STAGES)
def test_decoder_mirrors_an_encoder_of_any_depth(depth, norm):
    model = SegNet(3, depth=depth, norm=norm, width=SLIM).eval()
    calls = applied(model, torch.randn(1, 3, 33, 47))
    assert len(of_type(calls, nn.Conv2d)) == 2 * (depth - 3)
    assert len(of_type(calls, nn.BatchNorm2d)) == (2 * (depth - 3) - 1 if norm else 0)
    assert calls[-1][2] == (1, 3, 33, 47)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("options", ["addition", "concatenation", "addition concatenation"])
def test_segnet_with_maps_of_the_encoder_equals_torchs_layers(options, source):
    stages = ((4, 4), (6, 6), (8,))
    options = {f"encoder_{option}": True for option in options.split()}
    model = SegNet(3, stages=stages, switch_source=source, **options).eval()
    image = x = torch.rand(2, 3, 37, 50)
    pooled = []
    for stage in model.encoder.stages:
        before = stage(x)
        _, indices = F.max_pool2d(before, 2, ceil_mode=True, return_indices=True)
        x = F.max_pool2d(before.relu(), 2, ceil_mode=True)
        pooled.append((x, indices, before.relu()))
    for number, stage in enumerate(model.decoder.stages):
        _, indices, copy = pooled[2 - number]
        x = F.max_unpool2d(x, indices, 2, output_size=copy.shape[-2:])
        if "encoder_concatenation" in options:
            x = torch.cat([x, copy], dim=1)
        for block in list(stage)[:-1]:
            x = block(x)
        if "encoder_addition" in options and number < 2:
            x = x + pooled[1 - number][0]
    torch.testing.assert_close(model(image), model.decoder.classifier(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_pooled_values_and_gradients_are_the_same_before_and_after_the_relu(name):
    before, after = (NETWORKS[name](switch_source=source) for source in SOURCES)
    after.load_state_dict(before.state_dict())
    image = torch.randn(2, 3, 45, 51)
    encodings = [model.encoder(image) for model in (before, after)]
    for first, second in zip(*(encoding.pooled for encoding in encodings), strict=True):
        assert torch.equal(first.features.view(torch.int32), second.features.view(torch.int32))
        # Where the maximum is positive, both switches select its cell.
        assert torch.equal(first.switches[first.features > 0], second.switches[first.features > 0])
        assert second.switches[second.features == 0].eq(0).all()
        assert first.switches[first.features == 0].unique().tolist() == [0, 1, 2, 3]
    for encoding in encodings:
        encoding.features.square().sum().backward()
    for first, second in zip(before.encoder.parameters(), after.encoder.parameters(), strict=True):
        assert torch.equal(first.grad, second.grad)


# The networks without switches.

BASELINES = {
    "FCN": lambda **o: FCN(3, fc_width=16, depth=11, width=SLIM, **o),
    "FCN of padding 100": lambda **o: FCN(3, fc_width=16, depth=11, width=SLIM, padding=100, **o),
    "DeepLabLargeFOV": lambda **o: DeepLabLargeFOV(3, fc_width=16, depth=11, width=SLIM, **o),
    "UNet": lambda **o: UNet(3, depth=11, width=SLIM, norm=False, **o),
}


def deterministic(name):
    """Return a baseline whose dropout has probability 0 and whose scores do not start at zero."""
    model = BASELINES[name](dropout=0.0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.eq(0).all():
            nn.init.normal_(module.weight)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BASELINES, "FPN"])
def test_every_baseline_exports_with_dynamic_sizes(name):
    model = (FPN(3, depth=11, width=SLIM, channels=16) if name == "FPN" else deterministic(name)).eval()
    free = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    exported = torch.export.export(model, (torch.randn(1, 3, 64, 80),), dynamic_shapes=(free,)).module()
    for size in [(71, 45), (64, 96), (33, 40)]:
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(exported(image), model(image))


# Traces, which TensorBoard's add_graph records too.


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore:Converting a tensor to a Python")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("make", [
    lambda: SegNet(3, width=SLIM, switch_source="soft"),
    lambda: SegNet(3, width=SLIM, packed_switches=True),
    lambda: SegNetBasic(3, width=6, packed_switches=True),
    lambda: FCNBasic(3, width=4),
    lambda: DeconvNet(3, width=SLIM, fc_width=16),
])  # fmt: skip
def test_a_trace_computes_what_the_network_computes(make, train):
    network = make().train(train)
    sizes = [(224, 224)] if isinstance(network, DeconvNet) else [(37, 50), (64, 48)]  # the second is not the traced one
    images = [torch.randn(2, 3, *size) for size in sizes]
    with torch.no_grad():
        traced = torch.jit.trace(network, images[0], check_trace=False)
        for image in images:
            assert torch.equal(traced(image), network(image))


# Arguments of constructors.


@pytest.mark.parametrize(("construct", "message"), [
    (lambda: SegNet(2, switch_source="post-relu"), "SegNet.switch_source=post-relu: input should be 'pre_relu'"),
    (lambda: SegNetBasic(2, switch_source="post-relu"), "SegNetBasic.switch_source=post-relu: input should be"),
    (lambda: SegNet(2, depth=12), "SegNet.depth=12: input should be 11, 13, 16 or 19"),
    (lambda: SegNet(2, dropout_at="foo"), "SegNet.dropout_at=foo: input should be 'none', 'central'"),
    (lambda: SegNet(2, stages=[]), "SegNet.stages=[]: tuple should have at least 1 item"),
    (lambda: UNet(2, stages=[[8], []]), "UNet.stages=[[8], []]: tuple should have at least 1 item"),
    (lambda: UNet(2, width=-1), "UNet.width=-1: input should be greater than 0"),
    (lambda: FCN(2, learnt="some"), "FCN.learnt=some: input should be 'none', 'inner' or 'all'"),
    (lambda: UNet(0), "UNet.num_classes=0: input should be greater than 0"),
    (lambda: FPN("five"), "FPN.num_classes=five: input should be a valid integer"),
    (lambda: create_model("unet", num_classes=0), "num_classes=0: input should be greater than 0"),
    (lambda: create_model("unet", num_classes=-1), "num_classes=-1: input should be greater than 0"),
    (lambda: create_model("unet", num_classes=2, in_channels=0), "in_channels=0: input should be greater than 0"),
    (lambda: create_model("unet", num_classes=2, width=-1), "model.width=-1: input should be greater than 0"),
])  # fmt: skip
def test_constructors_refuse_values_of_another_type_or_range(construct, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        construct()


def test_a_number_in_quotes_is_read_as_in_a_config():
    network = create_model("unet", num_classes="5", width="0.0625")
    assert (network.num_classes, network.classifier.out_channels) == (5, 5)


def test_a_checked_constructor_keeps_its_signature_and_its_own_errors():
    names = list(inspect.signature(SegNet).parameters)
    assert names[:4] == ["num_classes", "in_channels", "depth", "norm"]
    with pytest.raises(TypeError, match=re.escape("SegNet.__init__() missing 1 required positional argument")):
        SegNet()
    network = SegNet(2, width=SLIM, stages=((8,), [16]))
    for copy_ in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert copy_.node == network.node


def test_a_network_of_a_user_takes_what_its_own_constructor_takes():
    class Own(SegNet):
        def __init__(self, num_classes: int, *, width: int = 3) -> None:
            super().__init__(num_classes, width=width / 16)

    assert Own(2, width=0.5).num_classes == 2
    with pytest.raises(UsageError, match=r"Own\.width=-1\.0: input should be greater than 0"):
        Own(2, width=-16)
