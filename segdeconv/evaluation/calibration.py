"""Calibration of a network over a whole data set: agreement of confidence and accuracy.

All pixels are counted into histograms of fixed size, so that they need not be stored. The *confidence* of a pixel is
the largest of its class probabilities, its *prediction* the class that has it.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from segdeconv.evaluation.metrics import number

BINS = 15
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)

# Pixels are ranked by the upper half of the bits of a float32, which increase with the value for values >= 0. The steps
# are below 1 % at any magnitude, so that 1 - 1e-5 and 1 - 1e-6 are as distinct as 0.5 and 0.9.
RANKS = 1 << 15
UNIT = 1 << 24  # confidences are summed as integers: exactly, in any order, on any device


@dataclass(frozen=True)
class Bin:
    """A point of the reliability curve: the pixels with confidence in (low, high].

    Attributes:
        low: Lower limit of the confidence, exclusive.
        high: Upper limit of the confidence, inclusive.
        pixels: Number of pixels.
        confidence: Their mean confidence, NaN without pixels.
        accuracy: The fraction of them that is correct, NaN without pixels.
    """

    low: float
    high: float
    pixels: int
    confidence: float
    accuracy: float


class Calibration:
    """Counts of confidence, uncertainty and correctness over the pixels of a data set that are not ignored.

    Args:
        ignore_index: The value of ignored pixels in masks.
    """

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index
        self.counts = torch.zeros(BINS, 2, dtype=torch.int64)  # wrong, correct
        self.confidences = torch.zeros(BINS, dtype=torch.int64)  # sums, in UNIT
        self.by_confidence = torch.zeros(RANKS, 2, dtype=torch.int64)
        self.by_uncertainty = torch.zeros(RANKS, 2, dtype=torch.int64)

    def to(self, device: torch.device) -> Self:
        """Move the counts to a device, that of the predictions, and return self."""
        for name in ("counts", "confidences", "by_confidence", "by_uncertainty"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def update(self, prediction: Tensor, confidence: Tensor, mask: Tensor, uncertainty: Tensor | None = None) -> None:
        """Add pixels; all tensors have the same shape.

        Args:
            prediction: Class indices.
            confidence: float32, 0..1.
            mask: Class indices or ignore_index.
            uncertainty: Any numbers >= 0 that are larger where the prediction is less certain.
        """
        kind = torch.where(mask == self.ignore_index, 2, (prediction == mask).long()).flatten()
        confidence = confidence.flatten().clamp(max=1.0)  # rounding can raise a sum of probabilities above 1
        index = (confidence * BINS).ceil().long().sub_(1).clamp_(min=0)
        self.counts += _histogram(index, kind, BINS)
        self.confidences.index_add_(0, index, (confidence * UNIT).round().long() * (kind < 2))
        self.by_confidence += _histogram(_rank(1 - confidence), kind, RANKS)
        if uncertainty is not None:
            self.by_uncertainty += _histogram(_rank(uncertainty.flatten()), kind, RANKS)

    @property
    def bins(self) -> list[Bin]:
        """The reliability curve, in 15 equal bins of confidence."""
        counts, sums = self.counts.cpu().numpy(), self.confidences.cpu().numpy() / UNIT
        pixels = counts.sum(axis=1)
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: an empty bin
            confidence, accuracy = sums / pixels, counts[:, 1] / pixels
        return [
            Bin(index / BINS, (index + 1) / BINS, int(pixels[index]), float(confidence[index]), float(accuracy[index]))
            for index in range(BINS)
        ]

    @property
    def error(self) -> float:
        """Expected calibration error: the mean over pixels of |mean confidence - accuracy| of the pixel's bin.

        Guo et al. 2017, equation 3, https://arxiv.org/abs/1706.04599, with their 15 equal bins, closed above. Computed
        over all pixels at once; a mean over images would be another, larger number. NaN without pixels.
        """
        filled = [bin_ for bin_ in self.bins if bin_.pixels]
        total = sum(bin_.pixels for bin_ in filled)
        gaps = sum(bin_.pixels * abs(bin_.confidence - bin_.accuracy) for bin_ in filled)
        return gaps / total if total else float("nan")

    def accuracy_at_coverage(self, share: float, *, by: str = "confidence") -> float:
        """Return the accuracy of the pixels with the highest confidence or the lowest uncertainty.

        Bayesian SegNet's table of accuracy by percentile: `share` 0.1 is its 90th percentile. Pixels that differ by
        less than 1 % in 1 - confidence, or in uncertainty, count as equal; where the limit falls among equal pixels,
        their mean accuracy is used.

        Args:
            share: The fraction of the pixels, 0..1.
            by: `confidence` or `uncertainty`.

        Returns:
            The accuracy in 0..1, NaN without pixels.
        """
        histogram = (self.by_confidence if by == "confidence" else self.by_uncertainty).cpu().numpy()
        pixels = histogram.sum(axis=1)
        num_selected = share * pixels.sum()
        if not num_selected:
            return float("nan")
        before = np.concatenate([[0], pixels.cumsum()[:-1]])
        selected = np.clip(num_selected - before, 0, pixels)  # of each rank; only part of the last
        return float((histogram[:, 1] * selected / np.maximum(pixels, 1)).sum() / num_selected)

    def report(self) -> dict[str, Any]:
        """Return the plain data for report.json: fractions in 0..1, null without pixels."""
        kinds = [kind for kind in ("confidence", "uncertainty") if getattr(self, f"by_{kind}").any()]
        return {
            "expected_calibration_error": number(self.error),
            "accuracy_at_coverage": {
                f"by_{kind}": {f"{share:g}": number(self.accuracy_at_coverage(share, by=kind)) for share in SHARES}
                for kind in kinds
            },
            "bins": [
                {
                    "confidence_from": bin_.low,
                    "confidence_to": bin_.high,
                    "pixels": bin_.pixels,
                    "confidence": number(bin_.confidence),
                    "accuracy": number(bin_.accuracy),
                }
                for bin_ in self.bins
            ],
        }

    def summary(self) -> str:
        """Return one line for the printed table."""
        kind = "uncertainty" if self.by_uncertainty.any() else "confidence"
        accuracies = ", ".join(
            f"{100 * share:.0f} %: {100 * self.accuracy_at_coverage(share, by=kind):.1f}%" for share in SHARES
        )
        return f"calibration error {100 * self.error:.1f}%; accuracy of the most certain pixels by {kind}: {accuracies}"


def _histogram(index: Tensor, kind: Tensor, size: int) -> Tensor:
    """Return (size, 2) int64: the number of wrong (kind 0) and correct (kind 1) pixels at each index."""
    return torch.bincount(index * 3 + kind, minlength=3 * size).view(size, 3)[:, :2]


def _rank(value: Tensor) -> Tensor:
    """Return the rank of each value >= 0: an index in 0..RANKS - 1 that increases with the value."""
    return (value.float().clamp(min=0).contiguous().view(torch.int32) >> 16).long()
