"""Scores over a whole data set, from one confusion matrix."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Fractions in 0..1 over all pixels of a data set that are not ignored; NaN where there is nothing to score.

    miou: mean over classes of intersection / union; a class absent from truth and prediction is left out.
    pixel_accuracy: right pixels / all pixels (the papers' G).
    mean_accuracy: mean over the classes in the truth of right pixels / their pixels (the papers' C).
    frequency_weighted: mean of the IoUs, each weighted with its class's share of the pixels.
    iou, accuracy, precision: (C,) by class. pixels: (C,) int64, in the truth.
    """

    miou: float
    pixel_accuracy: float
    mean_accuracy: float
    frequency_weighted: float
    iou: np.ndarray
    accuracy: np.ndarray
    precision: np.ndarray
    pixels: np.ndarray

    @property
    def absent(self) -> list[int]:
        """Classes in neither truth nor prediction."""
        return [int(index) for index in np.flatnonzero(np.isnan(self.iou))]


def scores(confusion: np.ndarray) -> Scores:
    """confusion: (C, C) pixel counts, rows = truth, columns = prediction.

    >>> scores(np.array([[3, 1], [0, 4]])).miou  # IoU 3/4 and 4/5
    0.775
    """
    return scores_of(np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0))


def scores_of(right: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> Scores:
    """The scores of (C,) pixel counts by class: those that are right, of the truth, of the prediction."""
    right = right.astype(np.float64)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: nothing to score
        iou = right / (truth + predicted - right)
        accuracy, precision = right / truth, right / predicted
    total = truth.sum()
    seen = truth > 0
    return Scores(
        miou=_mean(iou[~np.isnan(iou)]),
        pixel_accuracy=float(right.sum() / total) if total else float("nan"),
        mean_accuracy=_mean(accuracy[seen]),
        frequency_weighted=float((truth[seen] * iou[seen]).sum() / total) if total else float("nan"),
        iou=iou,
        accuracy=accuracy,
        precision=precision,
        pixels=truth,
    )


def number(value: float) -> float | None:
    """A score as plain data for a report: None for NaN."""
    return None if math.isnan(value) else float(value)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _counted_without_waiting(values: Tensor, minlength: int, lanes: int = 64) -> Tensor:
    """torch.bincount of values below `minlength`, which on a GPU asks for the largest value and waits for the answer.

    lanes: as many copies of each count, because most pixels are of few classes and would queue for the same count.
    """
    lane = torch.arange(len(values), device=values.device) % lanes
    counts = torch.zeros(lanes * minlength, dtype=torch.int64, device=values.device)
    counts.scatter_add_(0, lane * minlength + values, torch.ones_like(values))
    return counts.view(lanes, minlength).sum(dim=0)


class ConfusionMatrix:
    """Counts of (truth, prediction) over a data set: exact, in int64, whatever the batches were.

    Dataset-level scores need this: a mean of per-image or per-batch IoUs is another, batch-dependent number. No module:
    the buffers of a module are copied from the first process to the others at every step.

    counts: (C, C) int64 of this process.
    """

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def to(self, device: torch.device) -> Self:
        """Count there, where the predictions are; in a copy, since processes that are copies share their tensors."""
        self.counts = self.counts.to(device, copy=True)
        return self

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        """prediction: class indices; mask: class indices or ignore_index; integers of one shape."""
        size = self.num_classes**2
        # Ignored pixels are counted at a place of their own: picking out the others takes 5 times as long.
        pairs = torch.where(mask == self.ignore_index, size, mask.long() * self.num_classes + prediction)
        count = _counted_without_waiting if pairs.is_cuda else torch.bincount
        self.counts += count(pairs.flatten(), minlength=size + 1)[:size].view(self.num_classes, self.num_classes)

    def compute(self) -> np.ndarray:
        """(C, C) int64, rows = truth, columns = prediction."""
        return self.counts.cpu().numpy().copy()

    def reset(self) -> None:
        """Forget everything counted."""
        self.counts.zero_()
