"""Prediction of many images by the workers of a Ray cluster."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.data.resizing import ResizedImages
from segdeconv.inference.batch import BatchPrediction
from segdeconv.inference.distributed import chunks_of, described, run, sendable
from segdeconv.inference.outputs import Outputs
from segdeconv.inference.predictors import PredictionSettings
from segdeconv.inference.progress_log import EntriesOfWorker, ProgressLog
from segdeconv.inference.segmenter import Segmenter


@dataclass(frozen=True)
class PredictionWork:
    """Prediction of images by the `BatchPrediction` of each worker.

    Attributes:
        log: Path of the progress log, which the worker does not write; None if only the first machine has it.
    """

    checkpoint: Checkpoint
    settings: PredictionSettings
    outputs: Outputs
    log: Path | None

    def start(self, report: Callable[[str], None]) -> Callable[[Any], Any]:
        """Load the network."""
        segmenter = Segmenter(self.checkpoint, self.settings, report=report)
        if note := segmenter.precision_note():
            report(note)

        def process(images: list[tuple[str, Path]]) -> _Predicted:
            entries = EntriesOfWorker(self.outputs.folder, self.log)
            batch = BatchPrediction(segmenter, self.outputs, entries, report)
            for _ in batch.run(dict(images)):
                pass
            resized, segmenter.resized = segmenter.resized, ResizedImages(segmenter.resized.target)
            return _Predicted(entries.entries, batch.failed, batch.without_crs, resized)

        return process

    def describe(self, chunk: Any) -> str:
        """Return the first image of a chunk, and the number of others."""
        return described([str(path) for _, path in chunk])


class _Predicted(NamedTuple):
    entries: list[dict[str, Any]]
    failed: int
    without_crs: list[Path]
    resized: ResizedImages


@dataclass
class DistributedPrediction:
    """Prediction of many images by the workers of a `cluster`, with the progress log written here.

    The attributes are those of `BatchPrediction`; `segmenter` is not used for prediction, and only counts the images
    whose scale changes.
    """

    segmenter: Segmenter
    outputs: Outputs
    progress_log: ProgressLog
    report: Callable[[str], None]
    workers: int
    failed: int = 0
    without_crs: list[Path] = field(default_factory=list)

    def is_done(self, name: str, path: Path) -> bool:
        """See `BatchPrediction.is_done`."""
        return BatchPrediction(self.segmenter, self.outputs, self.progress_log).is_done(name, path)

    def run(self, images: Mapping[str, Path]) -> Iterator[str]:
        """Predict the images missing from the progress log; see `BatchPrediction.run`."""
        waiting = [(name, path) for name, path in images.items() if not self.is_done(name, path)]
        chunks = chunks_of(waiting, self.workers)
        checkpoint, settings = self.segmenter.checkpoint, self.segmenter.settings
        log = self.progress_log.path if self.outputs.folder.on_disk else None
        work = PredictionWork(sendable(checkpoint), settings, self.outputs, log)
        for index, predicted in run(work, chunks, self.workers, self.report):
            for entry in predicted.entries:
                self.progress_log.append(entry)
            self.failed += predicted.failed
            self.without_crs += predicted.without_crs
            self.segmenter.resized.merge(predicted.resized)
            yield from (name for name, _ in chunks[index])
        self.progress_log.remove_partial_files()  # of workers that were lost
