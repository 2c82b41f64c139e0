"""Evaluations of parts of a data set, packed as plain arrays, which put together are exactly that of the whole."""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.resizing import ResizedImages
from segdeconv.drawing.thumbnails import Encoded, Gallery
from segdeconv.errors import UsageError
from segdeconv.evaluation.boundary import Boundaries
from segdeconv.evaluation.breakdown import Breakdown, ImageCounts
from segdeconv.evaluation.calibration import Calibration
from segdeconv.evaluation.evaluate import (
    Evaluation,
    Predicted,
    batches,
    class_scores,
    largest_uncertainty,
    progress_bar,
)
from segdeconv.evaluation.progress import DAMAGED, EvaluationLog, stamp_digest
from segdeconv.inference import distributed
from segdeconv.inference.predictors import PredictionSettings
from segdeconv.inference.segmenter import Segmenter

CALIBRATION = ("counts", "confidences", "by_confidence", "by_uncertainty")


def pack(evaluation: Evaluation, places: Sequence[int]) -> bytes:
    """Return the counts and thumbnails of an evaluation of some images as an .npz file.

    Args:
        evaluation: The evaluation.
        places: The indices of its images in the data set.
    """
    images, boundaries = evaluation.breakdown.images, evaluation.boundaries
    num_classes = len(evaluation.dataset.classes)
    stamps = [stamp_digest(evaluation.dataset, place) for place in places]
    arrays: dict[str, Any] = {
        "places": np.array(places, dtype=np.int64),
        "confusion": evaluation.confusion,
        **{name: getattr(evaluation.calibration, name).cpu().numpy() for name in CALIBRATION},
        "bands": evaluation.breakdown.bands,
        "sizes": np.array([image.size for image in images], dtype=np.int64).reshape(-1, 2),
        "counts_by_image": np.array(
            [(image.correct, image.truth, image.predicted) for image in images], dtype=np.int64
        ).reshape(-1, 3, num_classes),
        "uncertainty": np.array([image.uncertainty for image in images], dtype=np.float64),
        "cells": np.concatenate([np.zeros((0, 3), np.int64), *(image.cells for image in images)]),
        "cell_ends": np.array([len(image.cells) for image in images], dtype=np.int64).cumsum(),
        "stamps": np.array([list(stamp) for stamp in stamps], dtype=np.uint8).reshape(-1, 32),
        "digests": np.array([list(image.digest) for image in images], dtype=np.uint8).reshape(-1, 32),
    }
    if boundaries is not None:
        arrays["boundary_bands"] = boundaries.bands
        for name in ("f1", "f1_dilated"):
            arrays[name] = np.array(getattr(boundaries, name), dtype=np.float64).reshape(-1, num_classes)
    for name in Encoded._fields:
        files = [getattr(image, name) for image in evaluation.gallery.images]
        arrays[f"{name}_bytes"] = np.concatenate([np.zeros(0, np.uint8), *(file.ravel() for file in files)])
        arrays[f"{name}_ends"] = np.array([file.size for file in files], dtype=np.int64).cumsum()
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def combine(
    packed: Mapping[str, bytes],
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    *,
    outlines: bool,
    wanted: Iterable[int] | None = None,
) -> Evaluation:
    """Put evaluations of parts together: the evaluation of their images, in the order of the data set.

    Args:
        packed: The .npz file of each part by its name for messages.
        segmenter: The network with the prediction settings of all parts.
        dataset: The split.
        outlines: Whether the parts have boundary scores.
        wanted: The indices of the images that the parts must have; None for all.

    Raises:
        UsageError: A part is damaged, or not every image is in exactly one part.
    """
    classes = dataset.classes
    num_classes = len(classes)
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    calibration = Calibration(classes.ignore_index)
    boundaries = Boundaries(num_classes, classes.ignore_index) if outlines else None
    breakdown = Breakdown(num_classes, classes.ignore_index)
    gallery = Gallery(classes, largest_uncertainty(num_classes, segmenter.settings.samples))
    f1 = np.full((2, len(dataset), num_classes), np.nan)
    images: dict[int, tuple[ImageCounts, Encoded]] = {}
    for name, content in packed.items():
        try:
            part = dict(np.load(io.BytesIO(content), allow_pickle=False))
            places = part["places"].tolist()
            if any(place in images or not 0 <= place < len(dataset) for place in places):
                raise ValueError("an image of another part, or of no data set")
            confusion += part["confusion"]
            for field in CALIBRATION:
                getattr(calibration, field).add_(torch.from_numpy(part[field]))
            breakdown.bands += part["bands"]
            if boundaries is not None:
                boundaries.bands += part["boundary_bands"]
                f1[:, places] = part["f1"], part["f1_dilated"]
            cells = np.split(part["cells"], part["cell_ends"])[:-1]
            counts = zip(
                part["sizes"], part["counts_by_image"], part["uncertainty"], part["digests"], cells, strict=True
            )
            thumbnails = zip(*(_split(part, field) for field in Encoded._fields), strict=True)
            for place, (size, of_image, uncertainty, digest, of_pairs), files in zip(
                places, counts, thumbnails, strict=True
            ):
                height, width = map(int, size)
                image_name, (correct, truth, predicted) = dataset.names[place], of_image
                images[place] = (
                    ImageCounts(
                        image_name,
                        (height, width),
                        correct,
                        truth,
                        predicted,
                        float(uncertainty),
                        digest.tobytes(),
                        of_pairs,
                    ),
                    Encoded(*files),
                )
        except (*DAMAGED, RuntimeError) as error:  # torch raises the last
            raise UsageError(f"{name} is not a part of this evaluation ({error}) - evaluate this part again") from error
    if missing := sorted(set(range(len(dataset)) if wanted is None else wanted) - set(images)):
        raise UsageError(
            f"the parts lack {len(missing)} of {len(dataset)} images, such as {dataset.names[missing[0]]} - evaluate "
            "all parts again with the same data set"
        )
    for place in sorted(images):
        breakdown.images.append(images[place][0])
        gallery.images.append(images[place][1])
    if boundaries is not None:
        boundaries.f1, boundaries.f1_dilated = (list(scores[sorted(images)]) for scores in f1)
    return Evaluation(segmenter, dataset, confusion, calibration, boundaries, breakdown, gallery)


def _split(part: Mapping[str, np.ndarray], name: str) -> list[np.ndarray]:
    return np.split(part[f"{name}_bytes"], part[f"{name}_ends"])[:-1]


class Saver(Protocol):
    """Writer of the files of each prediction; it is pickled and sent to the workers of a cluster."""

    def __call__(self, predicted: Predicted) -> None:
        """Write the files of an image."""
        ...

    def flush(self) -> None:
        """Deliver all files that were written."""
        ...


@dataclass(frozen=True)
class EvaluationWork:
    """Evaluation of some images of a data set by each worker of a Ray cluster."""

    checkpoint: Checkpoint
    settings: PredictionSettings
    dataset: SegmentationDataset
    outlines: bool
    save: Saver | None

    def start(self, report: Callable[[str], None]) -> Callable[[Any], Any]:
        """Load the network."""
        segmenter = Segmenter(self.checkpoint, self.settings, report=report)

        def process(chunk: list[range]) -> bytes:
            (content,) = _in_this_process(segmenter, self.dataset, [chunk], outlines=self.outlines, save=self.save)
            return content

        return process

    def describe(self, chunk: Any) -> str:
        """Return the first image of a chunk, and the number of others."""
        return distributed.described([self.dataset.names[place] for place in _places(chunk)])


def _in_this_process(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    chunks: Sequence[Sequence[range]],
    *,
    outlines: bool,
    save: Saver | None,
    on_image: Callable[[], object] = lambda: None,
) -> Iterator[bytes]:
    """Yield the packed evaluation of each chunk of `batches`, which are read in one go."""

    def on_prediction(predicted: Predicted) -> None:
        if save is not None:
            save(predicted)
        on_image()

    with closing(class_scores(segmenter, dataset, _places(batch for chunk in chunks for batch in chunk))) as scored:
        for chunk in chunks:
            places = _places(chunk)
            evaluation = Evaluation.of(
                segmenter,
                dataset,
                outlines=outlines,
                on_prediction=on_prediction,
                places=places,
                scored=scored,
                shown=False,
            )
            if save is not None:
                save.flush()
            yield pack(evaluation, places)


def _by_workers(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    chunks: Sequence[Sequence[range]],
    workers: int,
    *,
    outlines: bool,
    save: Saver | None,
    report: Callable[[str], None],
) -> Iterator[tuple[int, bytes]]:
    """Yield the index and the packed evaluation of each chunk, which the workers of a `distributed.cluster` compute."""
    checkpoint = distributed.sendable(segmenter.checkpoint)
    dataset_settings = {**checkpoint.config["dataset"], "num_workers": 0}  # a Ray worker starts no others
    checkpoint = replace(checkpoint, config={**checkpoint.config, "dataset": dataset_settings})
    work = EvaluationWork(checkpoint, segmenter.settings, dataset, outlines, save)
    yield from distributed.run(work, chunks, workers, report)


def evaluate_logged(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    log: EvaluationLog,
    name: str,
    *,
    outlines: bool,
    chosen: Sequence[range] | None = None,
    save: Saver | None = None,
    workers: int = 0,
    report: Callable[[str], None] = print,
) -> Evaluation:
    """Evaluate a network on those images of a split that a log lacks, and add them to it; see `Evaluation.of`.

    Args:
        segmenter: The network with its prediction settings, which is not used for prediction if there are workers.
        dataset: A split with the classes of the network, in any order.
        log: The log.
        name: The name of the network in it.
        outlines: Whether to compute boundary scores.
        chosen: The `batches` to evaluate; None for all.
        save: Writes files of each prediction, in the workers if there are some.
        workers: The number of workers of a `distributed.cluster`; 0 to evaluate in this process.
        report: Called with messages.

    Raises:
        UsageError: The data set has other classes, or a chunk ended its worker several times.
    """
    chosen = batches(segmenter, dataset) if chosen is None else chosen
    wanted = _places(chosen)
    done = log.scored(name)
    if done:
        report(f"{len(done)} of {len(wanted)} {'is' if len(done) == 1 else 'are'} already evaluated and skipped")
    chunks = distributed.chunks_of([batch for batch in chosen if not done.issuperset(batch)], workers or 1)
    with progress_bar(dataset, len(wanted), done=len(done)) as bar:
        if workers:
            packed = _by_workers(segmenter, dataset, chunks, workers, outlines=outlines, save=save, report=report)
        else:
            packed = enumerate(
                _in_this_process(segmenter, dataset, chunks, outlines=outlines, save=save, on_image=bar.update)
            )
        for index, content in packed:
            places = _places(chunks[index])
            log.add(name, places, content)
            if workers:
                bar.update(len(places))
    evaluation = combine(log.of(name), segmenter, dataset, outlines=outlines, wanted=wanted)
    segmenter.resized = ResizedImages(segmenter.resized.target)
    if dataset.whole is dataset:  # crops of objects are meant to be resized
        for image in evaluation.breakdown.images:
            segmenter.resized.add(image.name, image.size)
    return evaluation


def _places(chunk: Iterable[range]) -> list[int]:
    return [place for batch in chunk for place in batch]
