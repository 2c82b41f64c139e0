"""FPN compared with torchvision's pyramid; its levels, its shared head, and their training."""

import copy
import csv

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

from segdeconv.checkpoints import checkpoint
from segdeconv.errors import UsageError
from segdeconv.losses import CrossEntropy, loss_sums
from segdeconv.models import FPN, SegNet
from segdeconv.train import train
from segdeconv.training.task import SegmentationTask

SIZES = [(90, 120), (45, 60), (23, 30), (12, 15)]  # of the levels at 360x480


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def slim(num_classes=3, **options):
    return FPN(num_classes, **{"width": 0.0625, "channels": 16, **options})


def test_parameters_are_those_counted_by_hand():
    with torch.device("meta"):
        model = FPN(11)
    laterals = sum((width + 1) * 256 for width in (128, 256, 512, 512))
    smooths = 4 * (9 * 256 + 1) * 256
    head = (9 * 256 + 1) * 128 + 2 * 128 + (128 + 1) * 11
    norms = 2 * sum(map(sum, model.encoder.channels))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == 14_714_688 + norms + laterals + smooths + head


@pytest.mark.parametrize("size", [(64, 64), (360, 480), (45, 51)])
def test_the_pyramid_equals_torchvision(size):
    model = slim().double().eval()
    widths = [stage[-1] for stage in model.encoder.channels[1:]]
    theirs = FeaturePyramidNetwork(widths, 16).double()
    for level in range(4):
        theirs.inner_blocks[level][0].load_state_dict(model.laterals[level].state_dict())
        theirs.layer_blocks[level][0].load_state_dict(model.smooths[level].state_dict())
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        pooled = model.encoder(image).pooled
        expected = theirs({str(level): pooling.features for level, pooling in enumerate(pooled[1:])})
        model.head = nn.Identity()
        levels = model.levels(image)
    assert len(levels) == len(expected) == 4
    for level, other in zip(levels, expected.values(), strict=True):
        assert other.std() > 1e-6
        torch.testing.assert_close(level, other)


def test_levels_have_the_sizes_of_the_pooled_maps_and_logits_the_size_of_the_image():
    model = slim().eval()
    with torch.no_grad():
        levels = model.levels(torch.randn(1, 3, 360, 480))
        assert [tuple(level.shape) for level in levels] == [(1, 3, *size) for size in SIZES]
        for size in [(32, 32), (33, 47), (37, 50), (1, 1), (97, 64)]:
            assert model(torch.randn(1, 3, *size)).shape == (1, 3, *size)


# The shared head.


def test_there_is_one_head_and_it_is_applied_to_every_level():
    model = slim()
    heads = [name for name, _ in model.named_parameters() if "head" in name or "classifier" in name]
    assert heads == [f"head.{name}" for name, _ in model.head.named_parameters()]
    sizes = []
    model.head.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(inputs[0].shape[-2:])))
    model(torch.randn(1, 3, 360, 480))
    assert sizes == SIZES[::-1]


def test_the_gradient_of_the_head_is_the_sum_over_the_levels():
    model = slim().double()
    image = torch.randn(2, 3, 64, 80, dtype=torch.float64)
    weights = model.head.conv.weight
    gradients = []
    for level in range(4):
        (gradient,) = torch.autograd.grad(model.levels(image)[level].square().sum(), weights)
        assert gradient.abs().sum() > 0
        gradients.append(gradient)
    (total,) = torch.autograd.grad(sum(level.square().sum() for level in model.levels(image)), weights)
    torch.testing.assert_close(total, sum(gradients))


def test_the_norm_of_the_head_keeps_images_and_levels_independent():
    model = slim()  # in training
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images = torch.randn(2, 3, 40, 40)
    both = model.levels(images)
    for index in range(2):
        for level, alone in zip(both, model.levels(images[index : index + 1]), strict=True):
            torch.testing.assert_close(level[index : index + 1], alone)


# Combining the levels.


def test_constant_levels_are_averaged():
    model = slim()
    image = torch.zeros(1, 3, 360, 480)
    levels = [torch.full((1, 3, *size), float(value)) for value, size in zip((1, 2, 4, 9), SIZES, strict=True)]
    assert torch.equal(model.combine(levels, image), torch.full((1, 3, 360, 480), 4.0))


@pytest.mark.parametrize("level", range(4))
def test_a_cell_stays_aligned_with_its_pixels_up_to_the_far_edge(level):
    """The centre of an upsampled cell is the centre of the pixels that were pooled into it."""
    model = slim(1)
    image = torch.zeros(1, 3, 360, 480)
    stride, size = 4 * 2**level, SIZES[level]
    for row, column in [(2, 3), (size[0] - 3, size[1] - 4)]:
        levels = [torch.zeros(1, 1, *size) for size in SIZES]
        levels[level][0, 0, row, column] = 1
        combined = model.combine(levels, image)[0, 0]
        assert combined.sum() > 0
        for side, cell in ((0, row), (1, column)):
            profile = combined.sum(dim=1 - side)
            centre = (profile * torch.arange(len(profile))).sum() / profile.sum()
            assert centre.item() == pytest.approx(stride * cell + (stride - 1) / 2, abs=0.01)


def test_more_levels_than_stages_are_refused():
    with pytest.raises(UsageError, match=r"model.num_levels=4: the encoder has only 2 stages - use 2 or less"):
        FPN(3, stages=((4,), (8,)))


# Supervised levels.


def test_other_networks_are_supervised_by_their_logits_only():
    image = torch.randn(1, 3, 32, 32)
    for model in (SegNet(3, stages=((4,),)).eval(), slim().eval()):
        (logits,) = model.supervised(image)
        assert torch.equal(logits, model(image))


def test_supervised_levels_are_upsampled_to_the_image_and_aligned_with_the_combined_logits():
    model = slim(supervise_levels=True).eval()
    image = torch.randn(2, 3, 45, 70)
    maps = model.supervised(image)
    assert [tuple(logits.shape) for logits in maps] == [(2, 3, 45, 70)] * 5
    assert torch.equal(maps[0], model(image))
    finest = F.interpolate(model.levels(image)[0], scale_factor=4, mode="bilinear")[..., :45, :70]
    torch.testing.assert_close(maps[1], finest)


def test_the_loss_of_several_maps_is_the_mean_over_them():
    loss, mask = CrossEntropy(), torch.randint(0, 3, (2, 8, 9))
    mask[0, :5] = 255
    maps = [torch.randn(2, 3, 8, 9) for _ in range(4)]
    total, normaliser = loss_sums(loss, maps, mask)
    torch.testing.assert_close(total / normaliser, torch.stack([loss(logits, mask) for logits in maps]).mean())
    single = loss_sums(loss, [maps[0]], mask)
    assert all(torch.equal(a, b) for a, b in zip(single, loss_sums(loss, maps[0], mask), strict=True))


def test_a_step_follows_the_gradient_of_the_mean_over_all_maps(tmp_path, monkeypatch):
    config = {
        "dataset": {
            "_target_": "segdeconv.data.Shapes", "num_train": 4, "num_val": 2, "size": [32, 32], "batch_size": 4,
            "num_workers": 0,
        },
        "model": {"_target_": "segdeconv.models.FPN", "width": 0.0625, "channels": 16, "supervise_levels": True},
        "optimizer": {"_target_": "segdeconv.optimization.sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0},
        "schedule": {"_target_": "segdeconv.optimization.Constant"},
        "trainer": {"max_steps": 1, "precision": "32-true"},
        "logger": {},
    }  # fmt: skip
    before = []
    step = SegmentationTask.training_step

    def record(self, batch, batch_idx):
        before.append((copy.deepcopy(self.model), batch))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SegmentationTask, "training_step", record)
    train(config, tmp_path)
    ((model, batch),) = before
    maps = model.supervised(batch["image"])
    loss = torch.stack([F.cross_entropy(logits, batch["mask"], ignore_index=255) for logits in maps]).mean()
    loss.backward()
    trained = checkpoint.read(tmp_path / "best.ckpt").model()
    for (name, start), (_, end) in zip(model.named_parameters(), trained.named_parameters(), strict=True):
        torch.testing.assert_close(end, start - 0.1 * start.grad, msg=name, rtol=1e-4, atol=1e-6)
    with (tmp_path / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["train/loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert len(maps) == 5
