"""Whether a network is as often right as it says, over a whole data set.

Everything is counted into histograms of fixed size, so that the pixels of a data set need not be kept. A pixel's
*confidence* is the largest of its class probabilities, its *prediction* that class.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from segdeconv.evaluation.metrics import number

BINS = 15
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)

# Pixels are put in order by the upper half of a float32's bits, which for numbers from 0 grow with the number: steps of
# less than 1 % at any magnitude, so that 1 - 1e-5 and 1 - 1e-6 are as distinct as 0.5 and 0.9.
RANKS = 1 << 15
UNIT = 1 << 24  # confidences are summed as whole numbers: exactly, in any order, on any device


@dataclass(frozen=True)
class Bin:
    """The pixels with confidence in (low, high]: how many, their mean confidence, and the share that is right.

    A point of the reliability curve; NaN where there is no pixel.
    """

    low: float
    high: float
    pixels: int
    confidence: float
    accuracy: float


class Calibration:
    """Counts of confidence, uncertainty and rightness over the pixels of a data set that are not ignored."""

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index
        self.counts = torch.zeros(BINS, 2, dtype=torch.int64)  # wrong, right
        self.confidences = torch.zeros(BINS, dtype=torch.int64)  # sums, in UNIT
        self.by_confidence = torch.zeros(RANKS, 2, dtype=torch.int64)
        self.by_uncertainty = torch.zeros(RANKS, 2, dtype=torch.int64)

    def to(self, device: torch.device) -> Self:
        """Count there, where the probabilities are."""
        for name in ("counts", "confidences", "by_confidence", "by_uncertainty"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def update(self, prediction: Tensor, confidence: Tensor, mask: Tensor, uncertainty: Tensor | None = None) -> None:
        """All of one shape. prediction, mask: class indices, in mask or ignore_index; confidence: float32, 0..1.

        uncertainty: any number from 0 that is larger where the prediction is less certain.
        """
        kind = torch.where(mask == self.ignore_index, 2, (prediction == mask).long()).flatten()
        confidence = confidence.flatten().clamp(max=1.0)  # which a sum of probabilities may pass by a rounding
        place = (confidence * BINS).ceil().long().sub_(1).clamp_(min=0)
        self.counts += _histogram(place, kind, BINS)
        self.confidences.index_add_(0, place, (confidence * UNIT).round().long() * (kind < 2))
        self.by_confidence += _histogram(_rank(1 - confidence), kind, RANKS)
        if uncertainty is not None:
            self.by_uncertainty += _histogram(_rank(uncertainty.flatten()), kind, RANKS)

    @property
    def bins(self) -> list[Bin]:
        """The reliability curve, in 15 equal steps of confidence."""
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

        Guo et al. 2017, equation 3, https://arxiv.org/abs/1706.04599, with their 15 equal bins, closed above. Over all
        pixels at once; a mean of the errors of images is another, larger number. NaN without a pixel.
        """
        filled = [one for one in self.bins if one.pixels]
        total = sum(one.pixels for one in filled)
        gaps = sum(one.pixels * abs(one.confidence - one.accuracy) for one in filled)
        return gaps / total if total else float("nan")

    def accuracy_at_coverage(self, share: float, *, by: str = "confidence") -> float:
        """The accuracy of this share of the pixels, those with the highest confidence or the lowest uncertainty.

        Bayesian SegNet's table of accuracy by percentile: `share` 0.1 is its 90th. Pixels that differ by less than 1 %
        in 1 - confidence, or in uncertainty, count as equal, and where the share ends among equals it takes the mean
        of them. NaN without a pixel.

        by: `confidence` or `uncertainty`.
        """
        histogram = (self.by_confidence if by == "confidence" else self.by_uncertainty).cpu().numpy()
        pixels = histogram.sum(axis=1)
        wanted = share * pixels.sum()
        if not wanted:
            return float("nan")
        before = np.concatenate([[0], pixels.cumsum()[:-1]])
        taken = np.clip(wanted - before, 0, pixels)  # of each rank; a part of the last
        return float((histogram[:, 1] * taken / np.maximum(pixels, 1)).sum() / wanted)

    def report(self) -> dict[str, Any]:
        """As plain data for report.json: fractions in 0..1, null where there is no pixel."""
        kinds = [kind for kind in ("confidence", "uncertainty") if getattr(self, f"by_{kind}").any()]
        return {
            "expected_calibration_error": number(self.error),
            "accuracy_at_coverage": {
                f"by_{kind}": {f"{share:g}": number(self.accuracy_at_coverage(share, by=kind)) for share in SHARES}
                for kind in kinds
            },
            "bins": [
                {
                    "confidence_from": one.low,
                    "confidence_to": one.high,
                    "pixels": one.pixels,
                    "confidence": number(one.confidence),
                    "accuracy": number(one.accuracy),
                }
                for one in self.bins
            ],
        }

    def sentence(self) -> str:
        """The line of a printed table."""
        kind = "uncertainty" if self.by_uncertainty.any() else "confidence"
        surest = ", ".join(
            f"{100 * share:.0f} %: {100 * self.accuracy_at_coverage(share, by=kind):.1f}%" for share in SHARES
        )
        return f"calibration error {100 * self.error:.1f}%; accuracy of the surest pixels by {kind}: {surest}"


def _histogram(place: Tensor, kind: Tensor, size: int) -> Tensor:
    """(size, 2) int64: how many pixels at each place are wrong, kind 0, and right, kind 1."""
    return torch.bincount(place * 3 + kind, minlength=3 * size).view(size, 3)[:, :2]


def _rank(value: Tensor) -> Tensor:
    """Values from 0, ordered and grouped: an index in 0..RANKS - 1 that grows with the value."""
    return (value.float().clamp(min=0).contiguous().view(torch.int32) >> 16).long()
