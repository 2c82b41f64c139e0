"""Scores, checked against torchmetrics and values computed by hand."""

import math
import re

import numpy as np
import pytest
import torch
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MulticlassPrecision,
)

from segdeconv.errors import UsageError
from segdeconv.evaluation.metrics import ConfusionMatrix, _bincount_without_sync, scores
from segdeconv.losses import CrossEntropy
from segdeconv.models import SegNet

CLASSES = 5


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, CLASSES, (6, 20, 30), generator=generator)
    mask = torch.where(
        torch.rand(6, 20, 30, generator=generator) < 0.6,
        prediction,
        torch.randint(0, CLASSES, (6, 20, 30), generator=generator),
    )
    mask[torch.rand(6, 20, 30, generator=generator) < 0.1] = 255
    return prediction, mask


def confusion_of(prediction, mask, num_classes=CLASSES, ignore_index=255):
    matrix = ConfusionMatrix(num_classes, ignore_index)
    matrix.update(prediction, mask)
    return matrix.compute()


def test_confusion_equals_torchmetrics(batch):
    reference = MulticlassConfusionMatrix(CLASSES, ignore_index=255)
    reference.update(*batch)
    assert np.array_equal(confusion_of(*batch), reference.compute().numpy())


def test_rows_are_truth_and_columns_prediction():
    confusion = confusion_of(torch.tensor([1, 1, 2]), torch.tensor([0, 0, 0]), num_classes=3)
    assert confusion.tolist() == [[0, 2, 1], [0, 0, 0], [0, 0, 0]]


def test_scores_equal_torchmetrics(batch):
    result = scores(confusion_of(*batch))

    def reference(metric, average):
        return metric(CLASSES, ignore_index=255, average=average)(*batch).numpy()

    tolerance = {"rtol": 0, "atol": 1e-6}
    np.testing.assert_allclose(result.iou, reference(MulticlassJaccardIndex, "none"), **tolerance)
    np.testing.assert_allclose(result.miou, reference(MulticlassJaccardIndex, "macro"), **tolerance)
    np.testing.assert_allclose(result.dice, reference(MulticlassF1Score, "none"), **tolerance)
    np.testing.assert_allclose(result.mean_dice, reference(MulticlassF1Score, "macro"), **tolerance)
    np.testing.assert_allclose(result.frequency_weighted, reference(MulticlassJaccardIndex, "weighted"), **tolerance)
    np.testing.assert_allclose(result.pixel_accuracy, reference(MulticlassAccuracy, "micro"), **tolerance)
    np.testing.assert_allclose(result.mean_accuracy, reference(MulticlassAccuracy, "macro"), **tolerance)
    np.testing.assert_allclose(result.accuracy, reference(MulticlassAccuracy, "none"), **tolerance)
    np.testing.assert_allclose(result.precision, reference(MulticlassPrecision, "none"), **tolerance)
    assert result.pixels.tolist() == torch.bincount(batch[1][batch[1] != 255]).tolist()


def test_scores_do_not_depend_on_batches(batch):
    whole = confusion_of(*batch)
    matrix = ConfusionMatrix(CLASSES, 255)
    for prediction, mask in zip(*(tensor.split([1, 3, 2]) for tensor in batch), strict=True):
        matrix.update(prediction, mask)
    assert np.array_equal(matrix.compute(), whole)
    one_by_one = np.mean([scores(confusion_of(*pair)).miou for pair in zip(*batch, strict=True)])
    assert one_by_one != pytest.approx(scores(whole).miou, abs=1e-6)  # a mean over images, which is not reported


def test_perfect_prediction_scores_one():
    mask = torch.tensor([0, 1, 2, 2, 255])
    result = scores(confusion_of(mask.where(mask != 255, 1), mask, num_classes=3))
    assert (result.miou, result.pixel_accuracy, result.mean_accuracy, result.frequency_weighted) == (1, 1, 1, 1)


def test_worst_prediction_scores_zero():
    result = scores(confusion_of(torch.tensor([1, 0]), torch.tensor([0, 1]), num_classes=2))
    assert (result.miou, result.pixel_accuracy, result.mean_accuracy, result.frequency_weighted) == (0, 0, 0, 0)


def test_half_of_each_class_correct_gives_one_third():
    # Two pixels of each class, one of them correct: intersection 1, union 3.
    result = scores(confusion_of(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1]), num_classes=2))
    assert result.miou == pytest.approx(1 / 3)
    assert result.frequency_weighted == pytest.approx(1 / 3)
    assert result.pixel_accuracy == result.mean_accuracy == 0.5


def test_unequal_classes_equal_hand_computed_values():
    # Truth: 6 pixels of class 0, 2 of class 1. Correct: 3 and 2; 3 of class 0 are predicted as class 1.
    result = scores(np.array([[3, 3], [0, 2]]))
    assert result.iou == pytest.approx([3 / 6, 2 / 5])
    assert result.miou == pytest.approx((1 / 2 + 2 / 5) / 2)
    assert result.dice == pytest.approx([2 * 3 / (6 + 3), 2 * 2 / (2 + 5)])  # 2 correct / (truth + predicted)
    assert result.dice == pytest.approx(2 * result.iou / (1 + result.iou))
    assert result.mean_dice == pytest.approx((2 / 3 + 4 / 7) / 2)
    assert result.pixel_accuracy == pytest.approx(5 / 8)
    assert result.mean_accuracy == pytest.approx((1 / 2 + 1) / 2)
    assert result.frequency_weighted == pytest.approx(6 / 8 * 1 / 2 + 2 / 8 * 2 / 5)
    assert result.precision == pytest.approx([1, 2 / 5])


def test_class_absent_from_truth_and_prediction_is_left_out():
    result = scores(np.array([[4, 0, 0], [0, 0, 0], [0, 0, 4]]))
    assert result.miou == result.mean_accuracy == 1
    assert math.isnan(result.iou[1])
    assert math.isnan(result.dice[1])
    assert result.mean_dice == 1
    assert result.absent == [1]


def test_a_class_that_is_only_predicted_counts_zero_in_miou_and_not_in_mean_accuracy():
    result = scores(np.array([[3, 1], [0, 0]]))
    assert result.iou == pytest.approx([0.75, 0])
    assert result.miou == pytest.approx(0.375)
    assert result.mean_accuracy == pytest.approx(0.75)
    assert result.absent == []


def test_scores_without_pixels_are_nan_without_a_warning(recwarn):
    result = scores(confusion_of(torch.tensor([0, 1]), torch.tensor([255, 255]), num_classes=2))
    assert all(map(math.isnan, (result.miou, result.pixel_accuracy, result.mean_accuracy, result.frequency_weighted)))
    assert result.absent == [0, 1]
    assert not recwarn.list


def test_uint8_masks_count_without_overflow():
    # 20 * 21 + 20 = 440 is beyond uint8.
    prediction, mask = torch.full((3,), 20, dtype=torch.uint8), torch.full((3,), 20, dtype=torch.uint8)
    assert confusion_of(prediction, mask, num_classes=21)[20, 20] == 3


def test_reset_clears_the_counts_and_compute_returns_a_copy(batch):
    matrix = ConfusionMatrix(CLASSES, 255)
    matrix.update(*batch)
    first = matrix.compute()
    matrix.update(*batch)
    assert np.array_equal(matrix.compute(), 2 * first)
    matrix.reset()
    assert matrix.compute().sum() == 0
    assert first.sum() > 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize(("prediction", "mask", "message"), [
    (3, 1, "a prediction has label 3, but there are classes 0..2 - where an image has no data, set the mask to 255"),
    (255, 0, "a prediction has label 255"),
    (-1, 2, "a prediction has label -1"),
    (0, 3, "a mask has label 3, but there are classes 0..2 and the ignored label 255 - map the labels"),
    (2, 3, "a mask has label 3"),
    (1, 254, "a mask has label 254"),
    (0, -1, "a mask has label -1"),
    (2, -1, "a mask has label -1"),
])  # fmt: skip
def test_values_that_are_no_classes_are_refused_and_not_counted(prediction, mask, message, dtype):
    if dtype == torch.uint8 and min(prediction, mask) < 0:
        pytest.skip("uint8 has no negative values")
    matrix = ConfusionMatrix(3, 255)
    with pytest.raises(UsageError, match=re.escape(message)):
        matrix.update(torch.tensor([0, 1, prediction], dtype=dtype), torch.tensor([0, 255, mask], dtype=dtype))
    assert matrix.compute().sum() == 0


def test_pixels_without_prediction_may_be_ignored():
    assert confusion_of(torch.tensor([2, 255, -1]), torch.tensor([2, 255, 255]), num_classes=3).tolist() == [
        [0, 0, 0], [0, 0, 0], [0, 0, 1]
    ]  # fmt: skip
    assert confusion_of(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)).sum() == 0


@pytest.mark.parametrize(("prediction", "mask"), [
    (torch.zeros(2, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, dtype=torch.uint8)),
    (torch.zeros(8, 8, dtype=torch.int64), torch.zeros(2, 8, 8, dtype=torch.int64)),
    (torch.zeros(2, 1, 8, 8, dtype=torch.int64), torch.zeros(2, 8, 8, dtype=torch.int64)),
    (torch.zeros(8, 8), torch.zeros(8, 8, dtype=torch.int64)),
    (torch.zeros(8, 8, dtype=torch.int64), torch.zeros(8, 8)),
])  # fmt: skip
def test_predictions_and_masks_of_different_forms_are_refused(prediction, mask):
    message = (
        f"a {prediction.dtype} prediction of shape {tuple(prediction.shape)} cannot be compared with a {mask.dtype} "
        f"mask of shape {tuple(mask.shape)} - give class indices, integers of the same shape"
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        confusion_of(prediction, mask)


@pytest.mark.parametrize("lanes", [1, 64])
def test_the_counts_for_gpus_equal_bincount(lanes):
    values = torch.randint(0, 10, (1000,))  # 10 and 11 do not occur
    expected = torch.bincount(values, minlength=12)
    assert torch.equal(_bincount_without_sync(values, minlength=12, lanes=lanes), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_loss_and_counts_of_a_training_step_never_synchronise_with_the_gpu():
    network = SegNet(5, stages=((8,), (8,))).cuda()
    image, mask = torch.randn(2, 3, 32, 48, device="cuda"), torch.randint(0, 5, (2, 32, 48), device="cuda")
    matrix, loss = ConfusionMatrix(5, 255).to(torch.device("cuda")), CrossEntropy(class_weights=[1, 2, 3, 4, 5]).cuda()
    for mode in ("default", "error"):  # the first pass only initialises
        torch.cuda.set_sync_debug_mode(mode)
        try:
            logits = network(image)
            total, _ = loss.sums(logits, mask)
            total.backward()
            matrix.update(logits.argmax(dim=1), mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
