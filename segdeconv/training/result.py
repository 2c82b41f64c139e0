"""The result of a run, for a Python program."""

import csv
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from segdeconv.checkpoints import checkpoint, locate
from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.errors import UsageError
from segdeconv.evaluation.report import read_report
from segdeconv.inference.segmenter import Segmenter
from segdeconv.models import SegmentationModel
from segdeconv.training.resume import AnyName

SHOWN = {
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "boundary_f1": "boundary F1",
}


class TrainingResult:
    """The files and scores of a run, and its best network.

    Args:
        folder: The run folder.
        objects: The functions that stood in the config for objects, by group.

    Attributes:
        folder: The run folder.
    """

    def __init__(self, folder: Path, objects: Mapping[str, Callable[..., Any]] | None = None) -> None:
        self.folder, self._objects = folder, dict(objects or {})

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint with the best mIoU on the val split; the last one if training ended before a validation."""
        best, last = self.folder / locate.BEST, self.folder / locate.LAST
        return best if best.is_file() else last

    @property
    def report(self) -> Path:
        """The page about the run, an HTML file."""
        return self.folder / "report.html"

    @cached_property
    def scores(self) -> dict[str, Any]:
        """The content of report.json: `miou`, `pixel_accuracy` and others in 0..1, and `classes` with those of each.

        Raises:
            UsageError: The run is not finished.
        """
        try:
            return read_report(self.folder / "report.json")
        except FileNotFoundError:
            raise UsageError(f"{self.folder} has no report.json yet - resume the run with resume=auto") from None

    @cached_property
    def history(self) -> list[dict[str, float]]:
        """The rows of metrics.csv, one for each epoch, as numbers by the name of the column; NaN without a value."""
        with (self.folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            return [{name: float(text or "nan") for name, text in row.items()} for row in csv.DictReader(file)]

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The content of the best checkpoint."""
        best = checkpoint.read(self.best_checkpoint, trust=AnyName())  # classes of the program that trained it
        return replace(best, objects=self._objects)

    @cached_property
    def segmenter(self) -> Segmenter:
        """The best network with its preprocessing, which predicts images; see `Segmenter.predict`."""
        return Segmenter(self.checkpoint, at_once=True)

    @property
    def model(self) -> SegmentationModel:
        """The best network: a new copy, on the CPU, in evaluation mode."""
        return self.checkpoint.model()

    def __repr__(self) -> str:
        try:
            scores = self.scores
        except UsageError:
            return f"TrainingResult({str(self.folder)!r}), not finished"
        shown = ", ".join(
            f"{name} {100 * scores[key]:.1f} %" for key, name in SHOWN.items() if scores.get(key) is not None
        )
        split = scores.get("split") or "val"
        lines = [
            f"TrainingResult({str(self.folder)!r})",
            f"  {split}: {shown or 'nothing to score'}",
            f"  best checkpoint: {self.best_checkpoint}",
            f"  report: {self.report}",
        ]
        return "\n".join(lines)
