"""Losses compared with torch, torchvision and kornia, with values computed by hand, and with loops over pixels."""

import itertools
import math
import re
from pathlib import Path

import kornia.losses
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from segdeconv.checkpoints.checkpoint import foreign
from segdeconv.cli.overrides import compose
from segdeconv.errors import UsageError
from segdeconv.losses import (
    OHEM,
    CrossEntropy,
    Dice,
    Focal,
    LogitAdjusted,
    LovaszSoftmax,
    PixelLoss,
    Sum,
    build_loss,
    check_loss,
    compute_class_weights,
    loss_sums,
)
from segdeconv.losses.regions import _gradient
from segdeconv.training.config_check import check_config

WEIGHTS = (0.2, 1.0, 5.0)
CE, DICE, LOVASZ = ({"_target_": f"segdeconv.losses.{name}"} for name in ("CrossEntropy", "Dice", "LovaszSoftmax"))
EVERY = {
    "cross_entropy": CrossEntropy,
    "smoothed": lambda **arguments: CrossEntropy(label_smoothing=0.1, **arguments),
    "adjusted": lambda **arguments: adjusted(CrossEntropy, 0.75, **arguments),
    "adjusted_lovasz": lambda **arguments: adjusted(LovaszSoftmax, 0.75, **arguments),
    "focal": Focal,
    "ohem": OHEM,
    "ohem_threshold": lambda **arguments: OHEM(share=0.1, threshold=0.5, **arguments),
    "dice": Dice,
    "dice_all": lambda **arguments: Dice(classes="all", smooth=0.0, **arguments),
    "dice_per_image": lambda **arguments: Dice(per_image=True, **arguments),
    "lovasz": LovaszSoftmax,
    "sum": lambda **arguments: Sum(parts={"ce": {**CE, "factor": 0.5}, "dice": DICE, "lovasz": LOVASZ}, **arguments),
}


def adjusted(loss, adjustment, *, class_weights=None, **arguments):
    return LogitAdjusted(
        loss(class_weights=class_weights, **arguments), logit_adjustment=adjustment, class_weights=class_weights
    )


every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 7, generator=generator)
    mask = torch.randint(0, 3, (2, 5, 7), generator=generator)
    mask[0, :2] = 255
    return logits, mask


def brute_force(logits, mask, weights, by_weights):
    """Compute the loss pixel by pixel in float64."""
    total, divisor = 0.0, 0.0
    for n, y, x in np.ndindex(*mask.shape):
        label = int(mask[n, y, x])
        if label == 255:
            continue
        scores = logits[n, :, y, x].double().numpy()
        total += weights[label] * (np.log(np.exp(scores).sum()) - scores[label])
        divisor += weights[label] if by_weights else 1
    return total / divisor


@pytest.mark.parametrize("normalisation", ["pixels", "weights"])
def test_cross_entropy_without_class_weights_equals_the_mean_of_torch(batch, normalisation):
    logits, mask = batch
    expected = F.cross_entropy(logits, mask, ignore_index=255)
    torch.testing.assert_close(CrossEntropy(normalisation=normalisation)(logits, mask), expected)


def test_normalisation_by_weights_equals_the_weighted_mean_of_torch(batch):
    logits, mask = batch
    expected = F.cross_entropy(logits, mask, torch.tensor(WEIGHTS), ignore_index=255)
    loss = CrossEntropy(normalisation="weights", class_weights=WEIGHTS)
    torch.testing.assert_close(loss(logits, mask), expected)


@pytest.mark.parametrize("normalisation", ["pixels", "weights"])
def test_cross_entropy_equals_a_loop_over_the_pixels(batch, normalisation):
    logits, mask = batch
    expected = brute_force(logits, mask, WEIGHTS, normalisation == "weights")
    loss = CrossEntropy(normalisation=normalisation, class_weights=WEIGHTS)
    assert loss(logits, mask).item() == pytest.approx(expected, rel=1e-5)


def test_caffe_divides_by_pixels_and_torch_by_weights():
    # The logits are equal, so every pixel costs log 3. There is one pixel of each class, and one is ignored.
    logits, mask = torch.zeros(1, 3, 2, 2), torch.tensor([[[0, 1], [2, 255]]])
    pixels = CrossEntropy(class_weights=WEIGHTS)(logits, mask)
    weights = CrossEntropy(class_weights=WEIGHTS, normalisation="weights")(logits, mask)
    assert pixels.item() == pytest.approx((0.2 + 1 + 5) * math.log(3) / 3)
    assert weights.item() == pytest.approx(math.log(3))


def test_weights_of_one_give_the_unweighted_loss(batch):
    torch.testing.assert_close(CrossEntropy(class_weights=(1, 1, 1))(*batch), CrossEntropy()(*batch))


@pytest.mark.parametrize("ignore_index", [255, 11, 0, -1])
def test_ignored_pixels_change_nothing_and_get_no_gradient(batch, ignore_index):
    logits, mask = batch
    ignored = (mask == 255) | (mask == 0)
    mask = mask.masked_fill(ignored, ignore_index)
    logits.requires_grad_()
    loss = CrossEntropy(ignore_index=ignore_index, class_weights=WEIGHTS, normalisation="weights")(logits, mask)
    loss.backward()
    valid_logits = logits.detach().movedim(1, -1)[~ignored]
    torch.testing.assert_close(loss.detach(), F.cross_entropy(valid_logits, mask[~ignored], torch.tensor(WEIGHTS)))
    by_pixel = logits.grad.abs().sum(dim=1)
    assert by_pixel[ignored].eq(0).all()
    assert by_pixel[~ignored].gt(0).all()


@pytest.mark.parametrize("normalisation", ["pixels", "weights"])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_cross_entropy_of_an_ignored_batch_has_loss_and_gradient_zero(normalisation, class_weights):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = CrossEntropy(normalisation=normalisation, class_weights=class_weights)
    value = loss(logits, torch.full((2, 4, 4), 255))
    value.backward()
    assert value.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_only_classes_of_weight_zero_give_zero_not_nan():
    logits = torch.randn(1, 2, 3, 3, requires_grad=True)
    loss = CrossEntropy(normalisation="weights", class_weights=(0.0, 1.0))
    value = loss(logits, torch.zeros(1, 3, 3, dtype=torch.int64))
    value.backward()
    assert value.item() == 0
    assert logits.grad.eq(0).all()


def test_bfloat16_logits_are_summed_in_float32():
    logits = torch.zeros(1, 2, 400, 500, dtype=torch.bfloat16, requires_grad=True)
    loss = CrossEntropy()(logits, torch.zeros(1, 400, 500, dtype=torch.int64))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)  # 200,000 pixels; bfloat16 stops counting at 256
    assert logits.grad.dtype == torch.bfloat16
    assert logits.grad.float().abs().mean().item() == pytest.approx(0.5 / 200_000, rel=1e-2)


def test_class_weights_move_with_the_module_but_are_not_in_its_state_dict():
    loss = CrossEntropy(class_weights=WEIGHTS)
    assert not loss.state_dict()
    assert loss.to("meta").weights.device.type == "meta"


# All losses.


@every
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_a_batch_of_ignored_pixels_has_loss_and_gradient_zero_and_is_finite(make, class_weights):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    value = make(class_weights=class_weights)(logits, torch.full((2, 4, 4), 255))
    value.backward()
    assert value.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@every
@pytest.mark.parametrize("ignore_index", [11, -1])
def test_the_logits_of_ignored_pixels_change_nothing_and_get_no_gradient(make, ignore_index, batch):
    logits, mask = batch
    loss, ignored = make(class_weights=WEIGHTS, ignore_index=ignore_index), mask == 255
    mask = mask.masked_fill(ignored, ignore_index)
    other = torch.where(ignored[:, None], 9 * torch.randn_like(logits), logits).requires_grad_()
    value = loss(other, mask)
    torch.testing.assert_close(value, loss(logits, mask))
    value.backward()
    assert other.grad.movedim(1, -1)[ignored].eq(0).all()
    assert other.grad.movedim(1, -1)[~ignored].ne(0).any()


@every
def test_class_weights_of_one_equal_no_weights(make, batch):
    torch.testing.assert_close(make(class_weights=(1, 1, 1))(*batch), make()(*batch))


@every
def test_class_weights_change_the_loss(make, batch):
    assert make(class_weights=WEIGHTS)(*batch).item() != pytest.approx(make()(*batch).item(), rel=1e-3)


@every
def test_bfloat16_logits_give_the_loss_of_their_float32_copies(make, batch):
    logits, mask = batch[0].bfloat16().requires_grad_(), batch[1]
    value = make()(logits, mask)
    assert value.dtype == torch.float32
    assert value.item() == make()(logits.detach().float(), mask).item()
    value.backward()
    assert logits.grad.dtype == torch.bfloat16
    assert logits.grad.isfinite().all()


@every
def test_confident_and_correct_costs_nothing_and_confident_and_wrong_is_finite(make):
    mask = torch.tensor([[[0, 1, 2, 0]]])
    correct = 200 * F.one_hot(mask, 3).movedim(-1, 1).float()
    smoothed = make is EVERY["smoothed"]
    for logits, low, high in ((correct, 0, 1e-3), (correct.roll(1, dims=1), 0.3, 1000)):
        logits.requires_grad_()
        value = make()(logits, mask)
        value.backward()
        assert low <= value.item() <= (high + 14 if smoothed else high)  # 0.1 / 3 * 2 * 200 = 13.3
        assert logits.grad.isfinite().all()


SHAPES = {
    "a dimension of channels": lambda mask: mask[:, None],
    "one-hot": lambda mask: F.one_hot(mask, 3).movedim(-1, 1),
    "one mask for two images": lambda mask: mask[:1],
    "half the size": lambda mask: mask[:, ::2, ::2],
    "a single row": lambda mask: mask[:, :1],
    "no dimension of images": lambda mask: mask[0],
    "floating point": lambda mask: mask.float(),
}


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_of_another_shape_is_refused_with_both_shapes(make, shape):
    mask = SHAPES[shape](torch.zeros(2, 8, 8, dtype=torch.int64))
    message = rf"logits of shape (2, 3, 8, 8) with a {mask.dtype} mask of shape {tuple(mask.shape)} - give logits"
    with pytest.raises(UsageError, match=re.escape(message)):
        make()(torch.randn(2, 3, 8, 8), mask)


@every
@pytest.mark.parametrize("label", [3, 7, 254, -1, -100])
def test_a_label_that_is_not_a_class_is_refused(make, label):
    mask = torch.full((2, 8, 8), 255)
    mask[1, 7, 7] = label
    message = f"a mask has label {label}, but there are classes 0..2 and the ignored label 255 - map the labels"
    with pytest.raises(UsageError, match=re.escape(message)):
        make()(torch.randn(2, 3, 8, 8), mask)


@pytest.mark.parametrize(("loss", "arguments", "message"), [
    (Dice, {"classes": "alll"}, "Dice.classes=alll: input should be 'present' or 'all'"),
    (CrossEntropy, {"normalisation": "foo"}, "CrossEntropy.normalisation=foo: input should be 'pixels' or 'weights'"),
    (CrossEntropy, {"label_smoothing": 1}, "CrossEntropy.label_smoothing=1: input should be less than 1"),
    (CrossEntropy, {"class_weights": ["a"]}, "CrossEntropy.class_weights=['a']: input should be a valid number"),
    (Focal, {"gamma": -1}, "Focal.gamma=-1: input should be greater than or equal to 0"),
    (OHEM, {"threshold": 2}, "OHEM.threshold=2: input should be less than 1"),
    (LovaszSoftmax, {"ignore_index": "void"}, "LovaszSoftmax.ignore_index=void: input should be a valid integer"),
])  # fmt: skip
def test_constructors_refuse_values_of_another_type_or_range(loss, arguments, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        loss(**arguments)


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, torch.tensor])
def test_class_weights_may_be_any_sequence_or_array(kind, batch):
    assert torch.equal(Dice(class_weights=kind(WEIGHTS))(*batch), Dice(class_weights=WEIGHTS)(*batch))


@pytest.mark.parametrize("loss", [CrossEntropy, Focal, OHEM, Dice, LovaszSoftmax])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_another_number_of_class_weights_than_classes_is_refused(loss, count, batch):
    with pytest.raises(UsageError, match=rf"a loss has {count} class weights, but the logits have 3 classes - give"):
        loss(class_weights=[1.0] * count)(*batch)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "ohem_threshold"])  # it jumps at its threshold
def test_the_gradient_equals_finite_differences(name):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 2, 3, generator=generator).double().requires_grad_()
    mask = torch.randint(0, 3, (2, 2, 3), generator=generator)
    mask[0, 0, 0] = 255
    loss = EVERY[name](class_weights=WEIGHTS)
    value = loss(logits, mask)
    (gradient,) = torch.autograd.grad(value, logits)
    step, differences = 1e-2, torch.empty_like(logits)
    with torch.no_grad():
        for place in itertools.product(*map(range, logits.shape)):
            moved = logits.detach().clone()
            moved[place] += step
            up = loss(moved, mask).item()
            moved[place] -= 2 * step
            differences[place] = (up - loss(moved, mask).item()) / (2 * step)
    torch.testing.assert_close(gradient, differences, rtol=1e-2, atol=2e-4)


# Label smoothing.


@pytest.mark.parametrize("normalisation", ["pixels", "weights"])
def test_label_smoothing_equals_torch(batch, normalisation):
    logits, mask = batch
    counted, weights = mask != 255, torch.tensor(WEIGHTS)
    loss = CrossEntropy(label_smoothing=0.2, class_weights=WEIGHTS, normalisation=normalisation)
    expected = F.cross_entropy(logits, mask, weights, ignore_index=255, label_smoothing=0.2)
    if normalisation == "pixels":
        expected = expected * weights[mask[counted]].sum() / counted.sum()
    torch.testing.assert_close(loss(logits, mask), expected)


def test_label_smoothing_by_hand():
    # One pixel with probabilities 1/4 and 3/4, of the first class: 0.9 log 4 + 0.1 (log 4 + log(4/3)) / 2.
    logits, mask = torch.tensor([[1.0, 3.0]]).log().view(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64)
    expected = 0.9 * math.log(4) + 0.05 * (math.log(4) + math.log(4 / 3))
    assert CrossEntropy(label_smoothing=0.1)(logits, mask).item() == pytest.approx(expected, rel=1e-6)


# Logit adjustment.


@pytest.mark.parametrize("adjustment", [0.0, 0.5, 1.0])
def test_the_optimal_scores_are_the_frequencies_times_the_weights_to_one_minus_the_adjustment(adjustment):
    frequency, weights = torch.tensor([0.7, 0.2, 0.1]), torch.tensor(WEIGHTS)
    mask = torch.arange(3).repeat_interleave(torch.tensor([70, 20, 10])).view(1, 10, 10)
    best = (frequency * weights ** (1 - adjustment)).log()[None, :, None, None].repeat(1, 1, 10, 10).requires_grad_()
    adjusted(CrossEntropy, adjustment, class_weights=WEIGHTS)(best, mask).backward()
    torch.testing.assert_close(best.grad.sum((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", [CrossEntropy, OHEM, Dice, LovaszSoftmax])
def test_an_adjusted_loss_equals_the_loss_of_shifted_logits(batch, loss):
    logits, mask = batch
    shifted = logits + 0.5 * torch.tensor(WEIGHTS).log()[:, None, None]
    expected = loss(class_weights=WEIGHTS)(shifted, mask)
    torch.testing.assert_close(adjusted(loss, 0.5, class_weights=WEIGHTS)(logits, mask), expected)


def test_without_weights_or_for_a_class_of_weight_zero_nothing_is_adjusted(batch):
    logits, mask = batch
    torch.testing.assert_close(adjusted(CrossEntropy, 1.0)(logits, mask), CrossEntropy()(logits, mask))
    mask[mask == 1] = 255
    weights = (1.0, 0.0, 1.0)
    expected = CrossEntropy(class_weights=weights)(logits, mask)
    torch.testing.assert_close(adjusted(CrossEntropy, 1.0, class_weights=weights)(logits, mask), expected)


@pytest.mark.parametrize("name", ["cross_entropy", "ce_lovasz"])
def test_the_command_line_adjusts_any_loss_by_its_class_weights(name):
    words = [f"loss={name}", "loss.class_weighting=median_frequency", "loss.logit_adjustment=0.5"]
    node = composed(*words)
    weights = compute_class_weights(node, [90, 10], [100, 100])
    built = build_loss(node, class_weights=weights, ignore_index=255)
    assert isinstance(built, LogitAdjusted)
    torch.testing.assert_close(built.shift, 0.5 * torch.tensor(weights).log())
    plain = build_loss({**node, "logit_adjustment": 0.0}, class_weights=weights, ignore_index=255)
    assert not isinstance(plain, LogitAdjusted)


# Focal.


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_with_two_classes_equals_torchvision(gamma):
    scores, mask = torch.randn(3, 4, 5), torch.randint(2, (3, 4, 5))
    logits = torch.stack([torch.zeros_like(scores), scores], dim=1)
    expected = sigmoid_focal_loss(scores, mask.float(), alpha=-1, gamma=gamma, reduction="mean")
    torch.testing.assert_close(Focal(gamma=gamma)(logits, mask), expected)


def test_focal_equals_kornia(batch):
    logits, mask = batch
    theirs = kornia.losses.focal_loss(
        logits, mask, alpha=None, gamma=2.0, reduction="sum", weight=torch.tensor(WEIGHTS), ignore_index=255
    )
    total, normaliser = Focal(class_weights=WEIGHTS).sums(logits, mask)
    torch.testing.assert_close(total, theirs)
    assert normaliser.item() == (mask != 255).sum().item()


def test_focal_without_gamma_is_cross_entropy(batch):
    torch.testing.assert_close(
        Focal(gamma=0.0, class_weights=WEIGHTS)(*batch), CrossEntropy(class_weights=WEIGHTS)(*batch)
    )


def test_focal_by_hand():
    # True class at 1/4: (3/4)**2 log 4; at 3/4: (1/4)**2 log(4/3).
    logits = torch.tensor([[1.0, 3.0]]).log().view(1, 2, 1, 1).expand(1, 2, 1, 2)
    expected = (9 / 16 * math.log(4) + 1 / 16 * math.log(4 / 3)) / 2
    assert Focal()(logits, torch.tensor([[[0, 1]]])).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_has_a_finite_gradient_where_the_probability_is_exactly_one(gamma):
    logits = torch.tensor([500.0, -500.0]).view(1, 2, 1, 1).requires_grad_()
    Focal(gamma=gamma)(logits, torch.zeros(1, 1, 1, dtype=torch.int64)).backward()
    assert logits.grad.eq(0).all()


# OHEM.


def hardest(logits, mask, share, threshold, weights):
    """Compute the loss by sorting a list of all pixels."""
    pixels = []
    for n, y, x in np.ndindex(*mask.shape):
        label = int(mask[n, y, x])
        if label != 255:
            probability = logits[n, :, y, x].double().softmax(0)[label].item()
            pixels.append((-math.log(probability), weights[label]))
    pixels.sort(reverse=True)
    count = math.ceil(share * len(pixels))
    if threshold is not None:
        count = max(count, sum(loss > -math.log(threshold) for loss, _ in pixels))
    return sum(loss * weight for loss, weight in pixels[:count]) / count


@pytest.mark.parametrize("threshold", [None, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("share", [0.01, 0.25, 1.0])
def test_ohem_is_the_mean_over_the_start_of_the_sorted_list(batch, share, threshold):
    loss = OHEM(share=share, threshold=threshold, class_weights=WEIGHTS)
    assert loss(*batch).item() == pytest.approx(hardest(*batch, share, threshold, WEIGHTS), rel=1e-5)


def test_ohem_of_all_pixels_is_cross_entropy(batch):
    torch.testing.assert_close(OHEM(share=1.0)(*batch), CrossEntropy()(*batch))


def test_ohem_gives_the_easy_pixels_no_gradient(batch):
    logits, mask = batch[0].requires_grad_(), batch[1]
    OHEM(share=0.2)(logits, mask).backward()
    losses = F.cross_entropy(logits, mask, ignore_index=255, reduction="none")
    selected = logits.grad.abs().sum(dim=1) > 0
    assert selected.sum().item() == math.ceil(0.2 * (mask != 255).sum().item())
    assert losses[selected].min() >= losses[(mask != 255) & ~selected].max()


def test_ohem_selects_every_pixel_of_a_tie():
    mask = torch.zeros(1, 2, 4, dtype=torch.int64)
    total, selected = OHEM(share=0.25).sums(torch.zeros(1, 2, 2, 4), mask)
    assert (total.item(), selected.item()) == (pytest.approx(8 * math.log(2)), 8)


# Dice.


def probabilities_for(*rows):
    """Return logits of shape (1, 2, 1, pixels) whose softmax gives class 1 these probabilities."""
    probabilities = torch.tensor(rows).double()
    return torch.stack([(1 - probabilities).log(), probabilities.log()])[None, :, None].float()


def test_dice_by_hand():
    # Class 1: p = .8, .4, .2, y = 1, 1, 0: 2 * 1.2 / (1.4 + 2); class 0: 2 * .8 / (1.6 + 1).
    logits, mask = probabilities_for(0.8, 0.4, 0.2), torch.tensor([[[1, 1, 0]]])
    one, zero = 1 - 2 * 1.2 / 3.4, 1 - 2 * 0.8 / 2.6
    assert Dice(smooth=0.0)(logits, mask).item() == pytest.approx((one + zero) / 2, rel=1e-5)
    weighted = Dice(smooth=0.0, class_weights=(1.0, 3.0))(logits, mask).item()
    assert weighted == pytest.approx((zero + 3 * one) / 4, rel=1e-5)
    smooth = (1 - 3.4 / 4.4 + 1 - 2.6 / 3.6) / 2
    assert Dice(smooth=1.0)(logits, mask).item() == pytest.approx(smooth, rel=1e-5)


def test_dice_of_an_absent_class():
    # All pixels are of class 0, so class 1 costs nothing, or 1 - smooth / (sum(p) + smooth) with classes="all".
    logits, mask = probabilities_for(0.5, 0.25, 0.25), torch.zeros(1, 1, 3, dtype=torch.int64)
    zero = 1 - (2 * 2.0 + 1) / (2.0 + 3 + 1)
    assert Dice()(logits, mask).item() == pytest.approx(zero, rel=1e-5)
    assert Dice(classes="all")(logits, mask).item() == pytest.approx((zero + 1 - 1 / (1.0 + 1)) / 2, rel=1e-5)


@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_dice_per_image_equals_kornia(batch, class_weights):
    logits, mask = batch
    mask[1][mask[1] == 2] = 0  # a class that is present in one image only
    weight = None if class_weights is None else torch.tensor(class_weights)
    theirs = kornia.losses.dice_loss(logits, mask, average="macro", weight=weight, ignore_index=255)
    ours = Dice(per_image=True, smooth=0.0, class_weights=class_weights)
    torch.testing.assert_close(ours(logits, mask), theirs)


def test_dice_of_a_batch_equals_that_of_its_images_joined_side_by_side(batch):
    logits, mask = batch
    joined = Dice(per_image=True)(torch.cat([*logits.split(1)], dim=-1), torch.cat([*mask.split(1)], dim=-1))
    torch.testing.assert_close(Dice()(logits, mask), joined)


def test_an_image_of_ignored_pixels_is_left_out_of_the_mean_over_images(batch):
    logits, mask = batch
    mask[0] = 255
    torch.testing.assert_close(Dice(per_image=True)(logits, mask), Dice()(logits[1:], mask[1:]))


# Lovász-softmax.


def jaccard_extension(errors, member):
    """Compute the Lovász extension of 1 - IoU by its definition: sets grow by the pixel of the next smaller error."""

    def cost(wrong):
        if not wrong:
            return 0.0
        inside = {index for index, is_member in enumerate(member) if is_member}
        return 1 - len(inside - wrong) / len(inside | wrong)

    value, wrong = 0.0, set()
    for index in sorted(range(len(errors)), key=lambda index: -errors[index]):
        value += errors[index] * (cost(wrong | {index}) - cost(wrong))
        wrong = wrong | {index}
    return value


@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_lovasz_equals_the_definition_of_the_extension(batch, class_weights):
    logits, mask = batch[0].double(), batch[1].clone()
    mask[mask == 1] = 255  # class 1 does not occur
    probabilities = logits.softmax(1).movedim(1, -1)[mask != 255].numpy()
    truth = mask[mask != 255].numpy()
    costs = {
        label: jaccard_extension(np.abs((truth == label) - probabilities[:, label]).tolist(), (truth == label).tolist())
        for label in (0, 2)
    }
    weights = class_weights or (1, 1, 1)
    expected = sum(weights[label] * cost for label, cost in costs.items()) / (weights[0] + weights[2])
    assert LovaszSoftmax(class_weights=class_weights)(logits, mask).item() == pytest.approx(expected, rel=1e-5)


def test_lovasz_by_hand():
    # Class 1: p = .8, .4, .2, y = 1, 1, 0. Errors .6 (member), .2, .2. The costs of the growing sets are 1/2, then 1
    # and 1 or 1/2 and 1, depending on which .2 comes first: .6 / 2 + .2 / 2. Class 0: errors .2 (member), .6, .2
    # (others). After .6 the union has 2 pixels and the intersection 1, so the cost is 1/2; at the end it is 1 in
    # either order: .6 / 2 + .2 / 2.
    logits, mask = probabilities_for(0.8, 0.4, 0.2), torch.tensor([[[1, 1, 0]]])
    assert LovaszSoftmax()(logits, mask).item() == pytest.approx(0.4, rel=1e-5)


def test_lovasz_equals_kornia_where_every_class_occurs():
    generator = torch.Generator().manual_seed(5)
    logits, mask = torch.randn(1, 4, 9, 11, generator=generator), torch.randint(4, (1, 9, 11), generator=generator)
    torch.testing.assert_close(LovaszSoftmax()(logits, mask), kornia.losses.lovasz_softmax_loss(logits, mask))
    logits = logits.requires_grad_()
    (ours,) = torch.autograd.grad(LovaszSoftmax()(logits, mask), logits)
    (theirs,) = torch.autograd.grad(kornia.losses.lovasz_softmax_loss(logits, mask), logits)
    torch.testing.assert_close(ours, theirs)


def test_lovasz_of_confident_predictions_is_one_minus_iou(batch):
    mask = batch[1]
    predicted = torch.randint(3, mask.shape, generator=torch.Generator().manual_seed(7))
    logits = 1000 * F.one_hot(predicted, 3).movedim(-1, 1).float()
    counted = mask != 255
    ious = [
        ((predicted == label) & (mask == label) & counted).sum()
        / (((predicted == label) | (mask == label)) & counted).sum()
        for label in range(3)
    ]
    assert LovaszSoftmax()(logits, mask).item() == pytest.approx(1 - float(sum(ious)) / 3, rel=1e-5)


def test_lovasz_keeps_its_precision_in_a_large_batch():
    # Steps of 1 - IoU are a millionth here; as differences in float32 they would be mostly rounding error.
    generator = torch.Generator().manual_seed(0)
    errors = (torch.rand(1_000_000, generator=generator) * 1e5).round() / 1e5  # equal errors keep the pixels' order
    member = torch.rand(1_000_000, generator=generator) < 0.3
    order = errors.argsort(descending=True, stable=True)
    lost = member[order].double()
    exact = 1 - (lost.sum() - lost.cumsum(0)) / (lost.sum() + (1 - lost).cumsum(0))
    exact = torch.diff(exact, prepend=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(_gradient(errors, member)[order].double(), exact, rtol=1e-6, atol=1e-14)


# Sums.


def test_a_sum_adds_its_parts_times_their_factors(batch):
    parts = {"ce": {**CE, "normalisation": "weights", "factor": 0.5}, "dice": {**DICE, "factor": 2}, "lovasz": LOVASZ}
    expected = (
        0.5 * CrossEntropy(normalisation="weights", class_weights=WEIGHTS)(*batch)
        + 2 * Dice(class_weights=WEIGHTS)(*batch)
        + LovaszSoftmax(class_weights=WEIGHTS)(*batch)
    )
    torch.testing.assert_close(Sum(parts=parts, class_weights=WEIGHTS)(*batch), expected)


def test_a_sum_of_means_over_pixels_is_exact_for_a_split_batch(batch):
    logits, mask = batch  # two images with unequal numbers of ignored pixels
    loss = Sum(parts={"ce": CE, "focal": {"_target_": "segdeconv.losses.Focal", "factor": 3.0}}, class_weights=WEIGHTS)
    pieces = [loss_sums(loss, *piece) for piece in zip(logits.split(1), mask.split(1), strict=True)]
    assert pieces[0][1] != pieces[1][1]
    whole = sum(total for total, _ in pieces) / sum(normaliser for _, normaliser in pieces)
    torch.testing.assert_close(whole, loss(logits, mask))


def test_losses_that_are_sums_over_pixels_are_pixel_losses():
    assert all(issubclass(loss, PixelLoss) for loss in (CrossEntropy, Focal, OHEM, Sum))
    assert not any(issubclass(loss, PixelLoss) for loss in (Dice, LovaszSoftmax))


def composed(*arguments):
    return check_config(compose(arguments, Path(__file__).parents[2] / "configs")[0])["loss"]


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "ohem", "dice", "lovasz", "ce_dice", "ce_lovasz"])
def test_every_shipped_config_builds_and_is_allowed_in_a_checkpoint(name, batch):
    node = composed(f"loss={name}")
    assert foreign(node) == []
    loss = build_loss(node, class_weights=WEIGHTS, ignore_index=255)
    assert 0 < loss(*batch).item() < 10


def test_the_command_line_sets_keys_inside_a_sum_and_defaults_are_filled_in():
    node = composed("loss=ce_dice", "loss.parts.dice.factor=0.5", "loss.parts.cross_entropy.label_smoothing=0.1")
    assert node["parts"]["dice"] == {
        **DICE, "classes": "present", "per_image": False, "smooth": 1.0, "factor": 0.5,
    }  # fmt: skip
    assert node["parts"]["cross_entropy"]["label_smoothing"] == 0.1
    assert list(composed("loss=ce_dice", "~loss.parts.dice")["parts"]) == ["cross_entropy"]
    added = composed("loss=ce_dice", "loss.parts.own._target_=segdeconv.losses.Focal", "loss.parts.own.gamma=1")
    assert added["parts"]["own"] == {"_target_": "segdeconv.losses.Focal", "gamma": 1.0, "factor": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dice": {**DICE, "smoth": 1}}, "unknown key loss.parts.dice.smoth - did you mean 'smooth'?"),
        ({"dice": {**DICE, "factor": -1}}, "loss.parts.dice.factor=-1: input should be greater than or equal to 0"),
        ({"dice": {**DICE, "ignore_index": 3}}, "unknown key loss.parts.dice.ignore_index"),
        ({"dice": {**DICE, "class_weighting": "camvid"}}, "unknown key loss.parts.dice.class_weighting"),
        ({"dice": {"factor": 1}}, "loss.parts.dice._target_ is None - use the dotted name of a class, as in"),
        ({}, "loss.parts is empty - give at least one loss"),
        ({"all": {"_target_": "segdeconv.losses.Sum", "parts": {"ce": {**CE, "x": 1}}}}, "loss.parts.all.parts.ce.x"),
    ],
)  # fmt: skip
def test_an_error_in_a_part_of_a_sum_names_its_key(changes, message):
    with pytest.raises(UsageError) as caught:
        check_loss({"_target_": "segdeconv.losses.Sum", "parts": changes})
    assert message in str(caught.value)


def test_foreign_classes_inside_a_sum_are_found():
    node = {"_target_": "segdeconv.losses.Sum", "parts": {"own": {"_target_": "mine.Poly"}, "dice": DICE}}
    assert foreign({"loss": node}) == ["mine.Poly"]
