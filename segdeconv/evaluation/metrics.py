"""Scores over a whole data set, from one confusion matrix."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from segdeconv.errors import UsageError
from segdeconv.losses.base import check_labels


@dataclass(frozen=True)
class Scores:
    """Scores over the pixels of a data set that are not ignored: fractions in 0..1, NaN where nothing can be scored.

    Attributes:
        miou: Mean over classes of intersection / union, without classes absent from ground truth and prediction.
        mean_dice: Mean of the Dice coefficients of the same classes.
        pixel_accuracy: Correct pixels / all pixels (the papers' G).
        mean_accuracy: Mean over the classes in the ground truth of correct pixels / their pixels (the papers' C).
        frequency_weighted: Mean of the IoUs, each weighted with the fraction of the pixels that its class has.
        iou: (C,), intersection / union of each class.
        dice: (C,), 2 * intersection / (pixels in the ground truth + predicted pixels), which is 2 * iou / (1 + iou).
        accuracy: (C,), correct pixels / pixels in the ground truth.
        precision: (C,), correct pixels / predicted pixels.
        pixels: (C,) int64, pixels in the ground truth.
    """

    miou: float
    mean_dice: float
    pixel_accuracy: float
    mean_accuracy: float
    frequency_weighted: float
    iou: np.ndarray
    dice: np.ndarray
    accuracy: np.ndarray
    precision: np.ndarray
    pixels: np.ndarray

    @property
    def absent(self) -> list[int]:
        """The indices of the classes in neither ground truth nor prediction."""
        return [int(index) for index in np.flatnonzero(np.isnan(self.iou))]


def scores(confusion: np.ndarray) -> Scores:
    """Return the scores of a confusion matrix.

    Args:
        confusion: (C, C) pixel counts, rows = ground truth, columns = prediction.

    Examples:
        >>> scores(np.array([[3, 1], [0, 4]])).miou  # IoU 3/4 and 4/5
        0.775
    """
    return scores_of(np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0))


def scores_of(correct: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> Scores:
    """Return the scores of pixel counts by class.

    Args:
        correct: (C,), the correct pixels.
        truth: (C,), the pixels in the ground truth.
        predicted: (C,), the pixels in the prediction.
    """
    correct = correct.astype(np.float64)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: nothing to score
        iou = correct / (truth + predicted - correct)
        dice = 2 * correct / (truth + predicted)
        accuracy, precision = correct / truth, correct / predicted
    total = truth.sum()
    in_truth = truth > 0
    return Scores(
        miou=_mean(iou[~np.isnan(iou)]),
        mean_dice=_mean(dice[~np.isnan(dice)]),
        pixel_accuracy=float(correct.sum() / total) if total else float("nan"),
        mean_accuracy=_mean(accuracy[in_truth]),
        frequency_weighted=float((truth[in_truth] * iou[in_truth]).sum() / total) if total else float("nan"),
        iou=iou,
        dice=dice,
        accuracy=accuracy,
        precision=precision,
        pixels=truth,
    )


def number(value: float) -> float | None:
    """Return a score as plain data for a report: None for NaN."""
    return None if math.isnan(value) else float(value)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _bincount_without_sync(values: Tensor, minlength: int, lanes: int = 64) -> Tensor:
    """Return torch.bincount of values below `minlength`, without its synchronisation with the GPU.

    Args:
        values: Integers.
        minlength: The number of counts.
        lanes: Number of copies of each count: most pixels belong to few classes and would contend for one counter.
    """
    lane = torch.arange(len(values), device=values.device) % lanes
    counts = torch.zeros(lanes * minlength, dtype=torch.int64, device=values.device)
    counts.scatter_add_(0, lane * minlength + values, torch.ones_like(values))
    return counts.view(lanes, minlength).sum(dim=0)


class ConfusionMatrix:
    """Confusion matrix of a data set, counted exactly in int64 regardless of batches.

    Scores of a data set need it: a mean of per-image or per-batch IoUs is another number, which depends on the batches.
    Not a torch module, because the buffers of a module are copied from the first process to the others at every step.

    Args:
        num_classes: The number of classes C.
        ignore_index: The value of ignored pixels in masks.

    Attributes:
        counts: (C, C) int64 of this process, rows = ground truth.
    """

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def to(self, device: torch.device) -> Self:
        """Move the counts to a device, that of the predictions, and return self.

        The counts are always copied, since forked processes share their tensors.
        """
        self.counts = self.counts.to(device, copy=True)
        return self

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        """Add pixels.

        Args:
            prediction: Class indices, integers. The masks that predictors return have ignore_index where an image has
                no data; set the mask to ignore_index there, because such pixels have no prediction to count.
            mask: Class indices or ignore_index, integers of the same shape.

        Raises:
            UsageError: The shapes differ, or on a CPU a value is not a class. A GPU would have to be waited for.
        """
        if prediction.shape != mask.shape or prediction.is_floating_point() or mask.is_floating_point():
            raise UsageError(
                f"a {prediction.dtype} prediction of shape {tuple(prediction.shape)} cannot be compared with a "
                f"{mask.dtype} mask of shape {tuple(mask.shape)} - give class indices, integers of the same shape"
            )
        size = self.num_classes**2
        ignored = mask == self.ignore_index
        # Ignored pixels get a count of their own: selecting the other pixels takes 5 times as long.
        pairs = (mask.long() * self.num_classes).add_(prediction).masked_fill_(ignored, size)
        checked = pairs.device.type == "cpu" and pairs.numel() > 0
        if checked:
            self._check_predictions(prediction, ignored)
            if pairs.min() < 0:
                check_labels(mask, self.num_classes, self.ignore_index)
        count = _bincount_without_sync if pairs.is_cuda else torch.bincount
        counts = count(pairs.flatten(), minlength=size + 1)[:size]
        if checked and counts.sum() + ignored.count_nonzero() < pairs.numel():
            check_labels(mask, self.num_classes, self.ignore_index)
        self.counts += counts.view(self.num_classes, self.num_classes)

    def _check_predictions(self, prediction: Tensor, ignored: Tensor) -> None:
        low, high = prediction.aminmax()
        if low >= 0 and high < self.num_classes:
            return
        wrong = prediction[~ignored & ((prediction < 0) | (prediction >= self.num_classes))]
        if len(wrong):
            raise UsageError(
                f"a prediction has label {int(wrong[0])}, but there are classes 0..{self.num_classes - 1} - where an "
                f"image has no data, set the mask to {self.ignore_index}"
            )

    def compute(self) -> np.ndarray:
        """Return a copy of the counts: (C, C) int64, rows = ground truth, columns = prediction."""
        return self.counts.cpu().numpy().copy()

    def reset(self) -> None:
        """Set all counts to zero."""
        self.counts.zero_()
