"""All that one evaluation finds out about a network: scores, calibration, outlines, where they come from, pictures."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Self

import numpy as np
import torch

from segdeconv import __version__
from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.drawing.thumbnails import Gallery
from segdeconv.evaluation import evaluate, report
from segdeconv.evaluation.boundary import Boundaries
from segdeconv.evaluation.breakdown import Breakdown
from segdeconv.evaluation.calibration import Calibration
from segdeconv.system.devices import machine

LIBRARIES = ("numpy", "opencv-python-headless", "pillow", "albumentations")  # that change pixels


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint on a split.

    confusion: (C, C) int64, rows = truth. samples: passes with dropout, 0 for one without.
    """

    checkpoint: Checkpoint
    dataset: SegmentationDataset
    device: torch.device
    samples: int
    confusion: np.ndarray
    calibration: Calibration
    boundaries: Boundaries | None
    breakdown: Breakdown
    gallery: Gallery

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        dataset: SegmentationDataset,
        *,
        device: torch.device,
        samples: int = 0,
        outlines: bool = True,
        on_prediction: evaluate.OnPrediction | None = None,
        **looks: Any,
    ) -> Self:
        """outlines: compare them too. looks: further arguments of `scoring.evaluate`."""
        classes = dataset.classes
        calibration = Calibration(classes.ignore_index)
        boundaries = Boundaries(len(classes), classes.ignore_index) if outlines else None
        breakdown = Breakdown(len(classes), classes.ignore_index)
        gallery = Gallery(classes, largest_uncertainty(len(classes), samples))

        def keep(one: evaluate.Predicted) -> None:
            breakdown.update(dataset.names[one.place], one.prediction, one.mask, one.uncertainty)
            gallery.update(one.prediction, one.uncertainty)
            if on_prediction is not None:
                on_prediction(one)

        confusion, _ = evaluate.evaluate(
            checkpoint,
            dataset.split,
            device=device,
            samples=samples,
            calibration=calibration,
            boundaries=boundaries,
            on=dataset,
            on_prediction=keep,
            **looks,
        )
        return cls(checkpoint, dataset, device, samples, confusion, calibration, boundaries, breakdown, gallery)

    def report(self, **facts: Any) -> dict[str, Any]:
        """The content of report.json; facts: what else to note."""
        return report.report(
            self.confusion,
            len(self.dataset),
            self.dataset.classes,
            boundaries=self.boundaries,
            breakdown=self.breakdown,
            checkpoint=str(self.checkpoint.path),
            checkpoint_sha256=self.checkpoint.sha256,
            config=self.checkpoint.config,
            versions=_versions(self.device),
            split=self.dataset.split,
            samples=self.samples,
            calibration=self.calibration.report(),
            uncertainty_of_pixels=(
                f"variance of {self.samples} samples, averaged over the classes"
                if self.samples
                else "entropy of the class probabilities, in nats"
            ),
            **facts,
        )

    def table(self) -> str:
        """The scores for reading."""
        return report.table(self.confusion, self.dataset.classes, self.calibration, self.boundaries)


def largest_uncertainty(num_classes: int, samples: int) -> float:
    """Of a pixel: all classes equally likely, or, of samples, each for another class.

    >>> largest_uncertainty(2, 0), largest_uncertainty(2, 50)
    (0.6931471805599453, 0.25)
    """
    return (1 - 1 / num_classes) / num_classes if samples else math.log(num_classes)


def _versions(device: torch.device) -> dict[str, str]:
    return {
        "segdeconv": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in LIBRARIES},
        **machine(device),
    }
