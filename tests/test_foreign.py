"""Optimizers, losses and networks of other libraries, named by `_target_`, and things that cannot be used as such."""

import copy
import json
import shutil
from types import SimpleNamespace

import foreign_parts
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from segdeconv.checkpoints import checkpoint
from segdeconv.cli import own_code
from segdeconv.config import build
from segdeconv.errors import UsageError
from segdeconv.losses import build_loss, check_loss, loss_sums
from segdeconv.losses.adapter import TORCH_LOSSES
from segdeconv.models import build_model, check_model
from segdeconv.optimization import TORCH_OPTIMIZERS, build_optimizer, check_optimizer
from segdeconv.training.config_check import check_config
from segdeconv.training.loggers import build_logger
from segdeconv.training.prepare import prepare

SMALL = (
    "dataset.num_train=4", "dataset.num_val=2", "dataset.batch_size=2", "dataset.num_workers=0",
    "trainer.precision=32-true",
)  # fmt: skip
LRASPP = "torchvision.models.segmentation.lraspp_mobilenet_v3_large"


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_an_optimizer_of_torch_updates_as_torch_itself(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
    model[1].bias.requires_grad_(False)
    other = copy.deepcopy(model)
    node = check_optimizer(
        {"_target_": f"torch.optim.{name}", "weight_decay": 0.01}
        if name != "Rprop"
        else {"_target_": "torch.optim.Rprop"}
    )
    assert set(node) == {"_target_", "lr"} | ({"weight_decay"} if name != "Rprop" else set())  # no other defaults
    optimizer = build_optimizer(node, model)
    settings = {key: value for key, value in node.items() if key not in ("_target_", "lr")}
    reference = getattr(torch.optim, name)([p for p in other.parameters() if p.requires_grad], **settings)
    assert [group["base_lr"] for group in optimizer.param_groups] == [reference.defaults["lr"]]
    image = torch.randn(2, 3, 8, 8)
    for network, stepper in ((model, optimizer), (other, reference)):
        for _ in range(2):
            stepper.zero_grad()
            network(image).square().mean().backward()
            stepper.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def by_hand(name, logits, mask, weights):
    """Return the loss of the pixels that are not ignored, one at a time, from its definition."""
    values, total, normaliser = [], 0.0, 0.0
    for image, row, column in (mask != 255).nonzero().tolist():
        scores, label = logits[image, :, row, column].double(), int(mask[image, row, column])
        probabilities, target = scores.softmax(0), F.one_hot(torch.tensor(label), 3).double()
        weight = torch.ones(3).double() if weights is None else torch.tensor(weights).double()
        difference = (probabilities - target).abs()
        normaliser += float(weight[label]) if name in ("CrossEntropyLoss", "NLLLoss") else 1.0
        if name in ("CrossEntropyLoss", "NLLLoss"):
            value = -weight[label] * probabilities[label].log()
        elif name == "MultiMarginLoss":
            margins = [max(0.0, 1 - float(scores[label]) + float(scores[k])) for k in range(3) if k != label]
            value = float(weight[label]) * sum(margins) / 3
        elif name in ("BCEWithLogitsLoss", "MultiLabelSoftMarginLoss"):
            sure = scores.sigmoid()
            value = -(weight * (target * sure.log() + (1 - target) * (1 - sure).log())).mean()
        elif name == "MSELoss":
            value = difference.square().mean()
        elif name == "L1Loss":
            value = difference.mean()
        else:  # both with delta 1, which no difference of probabilities exceeds
            value = (difference.square() / 2).mean()
        values.append(float(value))
    total = sum(values)
    return total, normaliser


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", TORCH_LOSSES)
def test_a_loss_of_torch_is_the_mean_over_the_pixels_that_are_not_ignored(name, weighted):
    torch.manual_seed(1)
    logits, mask = torch.randn(2, 3, 3, 4, requires_grad=True), torch.randint(3, (2, 3, 4))
    mask[0, 0] = 255
    node = check_loss({"_target_": f"torch.nn.{name}"})
    weights = [1.0, 2.0, 0.5] if weighted else None
    if weighted and not hasattr(getattr(nn, name)(), "weight"):
        with pytest.raises(UsageError, match=r"has no class weights - set loss.class_weighting=none"):
            build_loss(node, class_weights=weights, ignore_index=255)
        return
    loss = build_loss(node, class_weights=weights, ignore_index=255)
    assert [value.item() for value in loss_sums(loss, logits.detach(), mask)] == pytest.approx(
        by_hand(name, logits.detach(), mask, weights), rel=1e-5
    )
    assert not loss.state_dict()  # weights describe the data
    total, normaliser = loss_sums(loss, logits, torch.full_like(mask, 255))
    total.backward()
    assert (float(total.detach()), float(normaliser), float(logits.grad.abs().sum())) == (0, 0, 0)


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "NLLLoss", "MultiMarginLoss"])
def test_pixels_of_weight_zero_alone_give_a_loss_and_a_gradient_of_zero(name):
    logits, mask = torch.randn(1, 3, 2, 2, requires_grad=True), torch.zeros(1, 2, 2, dtype=torch.int64)
    node = check_loss({"_target_": f"torch.nn.{name}"})
    loss = build_loss(node, class_weights=[0.0, 1.0, 1.0], ignore_index=255)
    value = loss(logits, mask)
    value.backward()
    assert value.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_network_of_torchvision_gives_its_own_scores_at_any_size():
    torch.manual_seed(0)
    node = check_model({"_target_": LRASPP})
    assert node == {"_target_": LRASPP}
    model = build_model(node, 5, 3).eval()
    own = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=5)
    own.load_state_dict({name.removeprefix("network."): value for name, value in model.state_dict().items()})
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model(image), own.eval()(image)["out"])
        assert model(image[..., :50, :33]).shape == (1, 5, 50, 33)


def test_auxiliary_scores_are_supervised_too():
    class Two(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.main, self.other = nn.Conv2d(3, num_classes, 2, 2), nn.Conv2d(3, num_classes, 1)

        def forward(self, image):
            return {"out": self.main(image), "aux": self.other(image)}

    model = build_model({"_target_": Two}, 4, 3)
    maps = model.supervised(torch.randn(2, 3, 40, 70))
    assert [tuple(scores.shape) for scores in maps] == [(2, 4, 40, 70)] * 2
    assert torch.equal(maps[0], model(torch.zeros(2, 3, 40, 70)) * 0 + maps[0])


def test_feature_maps_are_scored_and_added_at_the_resolution_of_the_finest():
    class Features(nn.Module):
        """A network with the interface of timm's for features_only=True."""

        def __init__(self, num_classes):
            super().__init__()
            self.layer = nn.Conv2d(3, 2, 2, stride=2)
            self.feature_info = SimpleNamespace(channels=lambda: [2, 3])

        def forward(self, image):
            return [self.layer(image), image[..., ::4, ::4]]

    torch.manual_seed(0)
    model = build_model({"_target_": Features}, 5, 3).eval()
    image = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        scores = model(image)
        network, (fine, coarse) = model.network.network, model.network.classifier
        upsampled = F.interpolate(coarse(image[..., ::4, ::4]), (16, 32), mode="bilinear")
        expected = F.interpolate(fine(network.layer(image)) + upsampled, (32, 64), mode="bilinear")
    assert torch.allclose(scores, expected, atol=1e-6)


def test_a_run_with_parts_of_other_libraries_is_evaluated_from_its_checkpoint(tmp_path, commands):
    shutil.copy(foreign_parts.__file__, tmp_path)
    network = "foreign_parts.Half"
    parts = (f"model._target_={network}", "optimizer._target_=torch.optim.RMSprop", "loss._target_=torch.nn.MSELoss")
    words = (*SMALL, "dataset.size=[32,40]", "trainer.max_epochs=1", "logger=none", "hydra.run.dir=run")
    done = commands("train", *parts, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert f"--trust={network} IMAGE" in done.out
    assert checkpoint.foreign(checkpoint.load_plain(tmp_path / "run" / "best.ckpt")["hyper_parameters"]) == [network]
    done = commands("evaluate", "run", "--trust", network, cwd=tmp_path)
    assert done.code == 0, done.err
    reports = (tmp_path / "run" / "report.json", tmp_path / "run" / "evaluation" / "report.json")
    scores = [json.loads(report.read_text())["miou"] for report in reports]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert commands("evaluate", "run", cwd=tmp_path).code == 4


@pytest.mark.parametrize(
    "word",
    [
        "dataset._target_=torch.utils.data.Dataset", "dataset._target_=torch.utils", "dataset._target_=builtins.dict",
        "dataset._target_=foreign_parts.NoLength", "dataset._target_=foreign_parts.function",
        "dataset._target_=foreign_parts.NoNames", "dataset._target_=foreign_parts.NoSample",
        "dataset._target_=torch.nn.Conv2d", "dataset._target_=os.getcwd",
        "model._target_=torch.nn", "model._target_=torch.nn.ReLU", "model._target_=torch.nn.Module",
        "model._target_=torch.nn.Identity", "model._target_=torch.optim.SGD", "model._target_=builtins.print",
        "model._target_=torch.nn.functional.relu", "model._target_=foreign_parts.function", "model._target_=os.getcwd",
        "model._target_=foreign_parts.Broken", "model._target_=foreign_parts.Pooled",
        "model._target_=foreign_parts.Text", "model._target_=foreign_parts.FewClasses",
        "model._target_=foreign_parts.Unbuildable", "model._target_=foreign_parts.MissingPackage",
        "model._target_=torchvision.models.segmentation", "model._target_=torchvision.models.resnet18",
        "loss._target_=torch.nn.functional.cross_entropy", "loss._target_=torch.nn.CTCLoss", "loss._target_=torch.nn",
        "loss._target_=torch.nn.Linear", "loss._target_=foreign_parts.function", "loss._target_=builtins.max",
        "loss._target_=foreign_parts.BrokenLoss", "loss._target_=foreign_parts.MapLoss", "loss._target_=os.path",
        "optimizer._target_=torch.optim", "optimizer._target_=torch.optim.Optimizer",
        "optimizer._target_=torch.optim.LBFGS", "optimizer._target_=torch.optim.SparseAdam",
        "optimizer._target_=torch.optim.lr_scheduler.StepLR", "optimizer._target_=torch.nn.ReLU",
        "optimizer._target_=foreign_parts.function", "optimizer._target_=builtins.print",
        "schedule._target_=torch.optim.lr_scheduler.StepLR", "schedule._target_=math.sqrt", "schedule._target_=math",
        "augment.flip._target_=torch.nn.ReLU", "augment.flip._target_=builtins.dict",
        "augment.flip._target_=torchvision.transforms.v2.RandomErasing", "augment.flip._target_=albumentations",
        "augment.flip._target_=foreign_parts.function",
        "logger._target_=torch.nn.ReLU", "logger._target_=os.getcwd", "logger._target_=pytorch_lightning.loggers",
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line_that_names_it(word, tmp_path):
    key, _, target = word.partition("=")
    small = [text for text in SMALL if not (key.startswith("dataset") and "dataset.num_" in text)]
    removed = ["~augment.flip.p"] if key.startswith("augment") else []
    if not key.startswith("model"):
        small.append("model.stages=[[4],[8]]")
    with pytest.raises(UsageError) as caught:
        use([word, *small, *removed], tmp_path)
    message = str(caught.value)
    assert key.partition(".")[0] in message or "NoSample" in message
    assert target.rpartition(".")[2] in message or "model (ResNet)" in message
    assert "\n" not in message


def use(words, folder):
    """Do what a run does with the parts of its config, up to the first step."""
    config = check_config(own_code.compose(words)[0])
    prepared = prepare(config)
    build(config["schedule"], "schedule")
    build_logger(config["logger"], folder)
    image = torch.zeros(1, 3, 64, 64)
    prepared.model.check_input(image)
    loss_sums(prepared.loss, prepared.model.eval()(image), torch.zeros(1, 64, 64, dtype=torch.int64))
