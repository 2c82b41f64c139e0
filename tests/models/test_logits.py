"""Temperatures and class offsets in the weights of the last layers: all networks, and those of other libraries."""

import pytest
import torch
from torch import nn

from segdeconv.config import choice
from segdeconv.errors import UsageError
from segdeconv.models import SegmentationModel, create_model, list_models
from segdeconv.models.adapter import adapted
from segdeconv.models.build import check_model
from segdeconv.models.logits import divide_logits, logit_bias, logit_parameters, shift_logits

SLIM = {"width": 0.0625, "fc_width": 8, "depth": 11, "channels": 16, "pretrained": "none"}
NUM_CLASSES = 5


def slim(name, **arguments):
    """Return a narrow network of a name, with nontrivial batch norms and without weights of zero, in float64."""
    keys = check_model(choice("model", name))
    settings = {**SLIM, "width": 4} if "basic" in name or name == "bilinear_interpolation" else SLIM
    torch.manual_seed(0)
    chosen = {key: value for key, value in settings.items() if key in keys and key not in choice("model", name)}
    model = create_model(name, NUM_CLASSES, **{**chosen, **arguments})
    with torch.no_grad():
        for part, value in model.state_dict().items():
            if part.endswith(("running_mean", "running_var", "bias")):
                value.copy_(torch.rand_like(value) + 0.5)
            elif value.is_floating_point() and not value.any():
                value.copy_(torch.randn_like(value))
    return model.double().eval()


VARIANTS = [
    *((name, {}) for name in list_models()),
    *(("fcn", {"stride": stride, "learnt": learnt}) for stride in (8, 32) for learnt in ("none", "all")),
    ("fcn", {"padding": 100}),
    ("fpn", {"supervise_levels": True}),
    ("deconvnet", {"tied": True}),
]


@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_every_networks_logits_are_divided_and_nothing_else_changes(name, arguments):
    model = slim(name, **arguments)
    size = (max(model.minimum_size, 33), max(model.minimum_size, 40))
    image = torch.randn(2, 3, *size, dtype=torch.double)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(image)
        parameters = logit_parameters(model, size=size)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        divide_logits(model, 1.7, size=size)
        assert logits.std() > 0
        torch.testing.assert_close(model(image), logits / 1.7, rtol=1e-11, atol=1e-11 * float(logits.abs().max()))
    changed = {id(parameter) for parameter in parameters}
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name] / 1.7 if id(value) in changed else before[name])


UPSAMPLED_LAST = {"fcn", "fcn_basic", "fcn_basic_no_addition"}  # by a transposed convolution, which has no bias


@pytest.mark.parametrize(("name", "arguments"), [each for each in VARIANTS if each[0] not in UPSAMPLED_LAST])
def test_every_networks_logits_are_shifted_by_class_and_only_one_bias_changes(name, arguments):
    model = slim(name, **arguments)
    size = (max(model.minimum_size, 33), max(model.minimum_size, 40))
    image = torch.randn(2, 3, *size, dtype=torch.double)
    offsets = torch.tensor([0.5, -1.0, 0.0, 2.0, -0.25], dtype=torch.double)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(image)
        shift_logits(model, offsets, size=size)
        expected = logits + offsets[:, None, None]
        torch.testing.assert_close(model(image), expected, rtol=1e-11, atol=1e-11 * float(logits.abs().max()))
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == 1
    assert changed[0].endswith("bias")


class Foreign(nn.Module):
    """A network with two maps of class scores, of which `use` makes one output."""

    def __init__(self, use):
        super().__init__()
        self.body, self.use = nn.Conv2d(3, 4, 3, padding=1), use
        self.main, self.aux = nn.Conv2d(4, NUM_CLASSES, 1), nn.Conv2d(4, NUM_CLASSES, 3, padding=1)

    def forward(self, image):
        x = self.body(image).relu()
        return self.use(self.main(x), self.aux(x))


@pytest.mark.parametrize(
    ("use", "changed"),
    [
        (lambda main, aux: {"out": main, "aux": aux}, {"main"}),  # as torchvision's
        (lambda main, aux: [aux], {"aux"}),
        (lambda main, aux: main + nn.functional.avg_pool2d(aux, 3, 1, 1), {"main", "aux"}),
    ],
)
def test_the_layers_that_compute_the_scores_of_another_librarys_network_are_found(use, changed):
    torch.manual_seed(0)
    model = adapted(Foreign(use), NUM_CLASSES, 3).double().eval()
    image = torch.randn(1, 3, 32, 32, dtype=torch.double)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(image)
        divide_logits(model, 0.3, size=(32, 32))
        torch.testing.assert_close(model(image), logits / 0.3)
    state = model.state_dict()
    assert {name.split(".")[1] for name in state if not torch.equal(state[name], before[name])} == changed


def test_a_network_without_a_linear_last_layer_is_refused_and_left_as_it_was():
    model = adapted(Foreign(lambda main, aux: (main + aux).sigmoid()), NUM_CLASSES, 3).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match="logits of Adapter are not computed by a linear last layer"):
        divide_logits(model, 2.0, size=(32, 32))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", sorted(UPSAMPLED_LAST))
def test_a_network_without_a_bias_of_its_logits_is_refused(name):
    model = slim(name)
    with pytest.raises(UsageError, match=f"no bias of {type(model).__name__} shifts all logits of a class"):
        shift_logits(model, torch.ones(NUM_CLASSES), size=(33, 40))


def test_a_head_that_is_used_twice_counts_twice():
    class Own(SegmentationModel):
        def __init__(self, num_classes: int):
            super().__init__(num_classes)
            self.scores = nn.Conv2d(3, num_classes, 1)

        def forward(self, image):
            return self.scores(image) + self.scores(image.flip(-1))

    model = Own(3).eval()
    bias, factor = logit_bias(model, size=(8, 8))
    assert bias is model.scores.bias
    assert factor == pytest.approx(2)


def test_a_network_of_ones_own_is_divided_by_its_heads():
    class Own(SegmentationModel):
        heads = ("scores",)

        def __init__(self, num_classes: int):
            super().__init__(num_classes)
            self.hidden = nn.Conv2d(3, num_classes, 1)  # has a map per class, and is none of the heads
            self.scores = nn.Conv2d(num_classes, num_classes, 1)

        def forward(self, image):
            return self.scores(self.hidden(image))

    model = Own(3).eval()
    assert {id(p) for p in logit_parameters(model, size=(8, 8))} == {id(p) for p in model.scores.parameters()}
