"""Cross entropy against torch's, Caffe's normalisation worked by hand, and a loop over pixels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segdeconv.losses import CrossEntropy

WEIGHTS = (0.2, 1.0, 5.0)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, 7, generator=generator)
    mask = torch.randint(0, 3, (2, 5, 7), generator=generator)
    mask[0, :2] = 255
    return logits, mask


def brute_force(logits, mask, weights, by_weights):
    """Pixel by pixel in float64."""
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
def test_without_class_weights_it_is_torchs_mean(batch, normalisation):
    logits, mask = batch
    expected = F.cross_entropy(logits, mask, ignore_index=255)
    torch.testing.assert_close(CrossEntropy(normalisation=normalisation)(logits, mask), expected)


def test_weights_normalisation_is_torchs_weighted_mean(batch):
    logits, mask = batch
    expected = F.cross_entropy(logits, mask, torch.tensor(WEIGHTS), ignore_index=255)
    loss = CrossEntropy(normalisation="weights", class_weights=WEIGHTS)
    torch.testing.assert_close(loss(logits, mask), expected)


@pytest.mark.parametrize("normalisation", ["pixels", "weights"])
def test_it_equals_a_loop_over_the_pixels(batch, normalisation):
    logits, mask = batch
    expected = brute_force(logits, mask, WEIGHTS, normalisation == "weights")
    loss = CrossEntropy(normalisation=normalisation, class_weights=WEIGHTS)
    assert loss(logits, mask).item() == pytest.approx(expected, rel=1e-5)


def test_caffe_divides_by_pixels_and_torch_by_weights():
    # Equal logits: every pixel costs log 3. One pixel of each class, one ignored.
    logits, mask = torch.zeros(1, 3, 2, 2), torch.tensor([[[0, 1], [2, 255]]])
    pixels = CrossEntropy(class_weights=WEIGHTS)(logits, mask)
    weights = CrossEntropy(class_weights=WEIGHTS, normalisation="weights")(logits, mask)
    assert pixels.item() == pytest.approx((0.2 + 1 + 5) * math.log(3) / 3)
    assert weights.item() == pytest.approx(math.log(3))


def test_all_weights_one_is_the_unweighted_loss(batch):
    torch.testing.assert_close(CrossEntropy(class_weights=(1, 1, 1))(*batch), CrossEntropy()(*batch))


@pytest.mark.parametrize("ignore_index", [255, 11, 0, -1])
def test_ignored_pixels_change_nothing_and_get_no_gradient(batch, ignore_index):
    logits, mask = batch
    ignored = (mask == 255) | (mask == 0)
    mask = mask.masked_fill(ignored, ignore_index)
    logits.requires_grad_()
    loss = CrossEntropy(ignore_index=ignore_index, class_weights=WEIGHTS, normalisation="weights")(logits, mask)
    loss.backward()
    seen = logits.detach().movedim(1, -1)[~ignored]
    torch.testing.assert_close(loss.detach(), F.cross_entropy(seen, mask[~ignored], torch.tensor(WEIGHTS)))
    by_pixel = logits.grad.abs().sum(dim=1)
    assert by_pixel[ignored].eq(0).all()
    assert by_pixel[~ignored].gt(0).all()


@pytest.mark.parametrize("normalisation", ["pixels", "weights"])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_all_ignored_batch_has_loss_and_gradient_zero(normalisation, class_weights):
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


def test_class_weights_move_with_the_module_but_are_not_in_its_state():
    loss = CrossEntropy(class_weights=WEIGHTS)
    assert not loss.state_dict()
    assert loss.to("meta").weights.device.type == "meta"
