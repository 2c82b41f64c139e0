"""Evaluation of a network on a split: every image predicted, every pixel that is not ignored counted."""

import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from segdeconv import __version__
from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.classes import match_classes
from segdeconv.config import TARGET
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.loading import EvaluationSamples, evaluation_loader, explain_loader_errors, for_network
from segdeconv.data.relabelled import in_order_of
from segdeconv.drawing.thumbnails import Gallery
from segdeconv.errors import UsageError
from segdeconv.evaluation import report
from segdeconv.evaluation.boundary import Boundaries
from segdeconv.evaluation.breakdown import Breakdown
from segdeconv.evaluation.calibration import Calibration
from segdeconv.evaluation.metrics import ConfusionMatrix
from segdeconv.inference.predictors import whole_image
from segdeconv.inference.scorers import ClassScores, entropy, labels_and_confidence
from segdeconv.inference.segmenter import Segmenter
from segdeconv.system.devices import machine

LIBRARIES = ("numpy", "opencv-python-headless", "pillow", "albumentations")  # that change pixels


def restore_dataset(checkpoint: Checkpoint, split_name: str) -> SegmentationDataset:
    """The split of the data set that a checkpoint's config names, with the network's classes in the network's order.

    Raises:
        UsageError: The data set has other classes, or images of another number of channels.
    """
    from segdeconv.data.module import build_split, check_dataset  # late: albumentations takes a second to import

    node = check_dataset(checkpoint.config["dataset"])
    dataset = build_split(node, split_name)
    class_order(
        checkpoint,
        dataset,
        owner=node[TARGET],
        way_out="use its own data set, or rename, merge and ignore classes with dataset.label_map={theirs: its, other: "
        "ignore}",
    )
    ours, theirs = checkpoint.classes, dataset.classes
    if (theirs.names, theirs.ignore_index) != (ours.names, ours.ignore_index):
        dataset = in_order_of(dataset, ours)
    channels = len(checkpoint.facts["preprocessing"]["mean"])
    if dataset.channels != channels:
        raise UsageError(
            f"{checkpoint.path} was trained on images of {channels} channel(s) and {node[TARGET]} gives "
            f"{dataset.channels} - leave dataset.channels as it was"
        )
    return dataset


def class_order(
    checkpoint: Checkpoint,
    dataset: SegmentationDataset,
    *,
    owner: str = "the data",
    way_out: str = "compare networks of the same classes, which are matched by their names",
) -> list[int]:
    """The network's index of each class of a data set, see `match_classes`. owner: of the data set's classes."""
    return match_classes(dataset.classes, checkpoint.classes, owners=(owner, str(checkpoint.path)), way_out=way_out)


class Predicted(NamedTuple):
    """The prediction of one image of a data set.

    mask, prediction: (H, W) uint8, exactly as counted. uncertainty: (H, W) float32, the variance of its samples if
    there are some, averaged over the classes, otherwise the entropy of its class probabilities, in nats.
    """

    dataset: SegmentationDataset
    place: int
    mask: np.ndarray
    prediction: np.ndarray
    uncertainty: np.ndarray


OnPrediction = Callable[[Predicted], None]


def evaluate(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    *,
    calibration: Calibration | None = None,
    boundaries: Boundaries | None = None,
    on_prediction: OnPrediction | None = None,
) -> np.ndarray:
    """Predict every image of a split and count against its mask, at the mask's own size.

    Args:
        dataset: Of the network's classes, in any order; counted is in the data set's.
        calibration: Counts the pixels too.
        boundaries: Compares the outlines too.
        on_prediction: Called with each image.

    Returns:
        The (C, C) int64 confusion matrix, rows = truth.
    """
    order, device = class_order(segmenter.checkpoint, dataset), segmenter.network.device
    if calibration is not None:
        calibration.to(device)
    matrix = ConfusionMatrix(len(dataset.classes), dataset.classes.ignore_index).to(device)
    bar = tqdm(total=len(dataset), desc=f"evaluating {dataset.split}", unit="image", disable=None)
    with explain_loader_errors(), bar:
        for index, (scores, stored) in enumerate(_scores(segmenter, dataset)):
            mask = stored.to(device)
            if order != sorted(order):
                scores = scores._replace(values=scores.values[:, order])
            (prediction,), (confidence,) = labels_and_confidence(scores)
            matrix.update(prediction, mask)
            if calibration is not None:
                uncertainty = None if scores.uncertainty is None else scores.uncertainty[0]
                calibration.update(prediction, confidence, mask, uncertainty)
            predicted = prediction.cpu().numpy()
            if boundaries is not None:
                boundaries.update(predicted, stored.numpy())
            if on_prediction is not None:
                (spread,) = entropy(scores) if scores.uncertainty is None else scores.uncertainty
                on_prediction(Predicted(dataset, index, stored.numpy(), predicted, spread.float().cpu().numpy()))
            bar.update()
    return matrix.compute()


def _scores(segmenter: Segmenter, dataset: SegmentationDataset) -> Iterator[tuple[ClassScores, Tensor]]:
    """(scores at the size of the mask, N = 1; mask) of every image; in batches where one forward pass is all."""
    if not segmenter.settings.single_pass:
        for index in range(len(dataset)):
            image, mask, name = dataset[index]
            scores = whole_image(segmenter.predictor, image, name)
            yield scores.of_image(0, (mask.shape[0], mask.shape[1])), torch.tensor(mask)
        return
    settings, preprocessing = segmenter.checkpoint.config["dataset"], segmenter.preprocessing
    loader = evaluation_loader(
        EvaluationSamples(dataset, preprocessing),
        batch_size=settings["batch_size"],
        num_workers=settings["num_workers"],
        timeout=settings["timeout"],
    )
    for batch in loader:
        on_device = {**batch, "image": batch["image"].to(segmenter.network.device)}
        scores = segmenter.network(for_network(on_device, preprocessing)["image"])
        for position, mask in enumerate(batch["mask"]):
            yield scores.of_image(position, (mask.shape[0], mask.shape[1])), mask


@dataclass(frozen=True)
class Evaluation:
    """A network on a split, with all that report.json and report.html show.

    confusion: (C, C) int64, rows = truth.
    """

    segmenter: Segmenter
    dataset: SegmentationDataset
    confusion: np.ndarray
    calibration: Calibration
    boundaries: Boundaries | None
    breakdown: Breakdown
    gallery: Gallery

    @classmethod
    def of(
        cls,
        segmenter: Segmenter,
        dataset: SegmentationDataset,
        *,
        outlines: bool = True,
        on_prediction: OnPrediction | None = None,
    ) -> Self:
        """Evaluate once. outlines: compare them too. on_prediction: called with each image."""
        classes = dataset.classes
        calibration = Calibration(classes.ignore_index)
        boundaries = Boundaries(len(classes), classes.ignore_index) if outlines else None
        breakdown = Breakdown(len(classes), classes.ignore_index)
        gallery = Gallery(classes, largest_uncertainty(len(classes), segmenter.settings.samples))

        def keep(one: Predicted) -> None:
            breakdown.update(dataset.names[one.place], one.prediction, one.mask, one.uncertainty)
            gallery.update(one.prediction, one.uncertainty)
            if on_prediction is not None:
                on_prediction(one)

        confusion = evaluate(segmenter, dataset, calibration=calibration, boundaries=boundaries, on_prediction=keep)
        return cls(segmenter, dataset, confusion, calibration, boundaries, breakdown, gallery)

    def report(self, **facts: Any) -> dict[str, Any]:
        """The content of report.json; facts: what else to note."""
        return report.report(
            self.confusion,
            len(self.dataset),
            self.dataset.classes,
            boundaries=self.boundaries,
            breakdown=self.breakdown,
            checkpoint=str(self.segmenter.checkpoint.path),
            checkpoint_sha256=self.segmenter.checkpoint.sha256,
            config=self.segmenter.checkpoint.config,
            versions=_versions(self.segmenter.network.device),
            split=self.dataset.split,
            samples=self.segmenter.settings.samples,
            calibration=self.calibration.report(),
            uncertainty_of_pixels=(
                f"variance of {self.segmenter.settings.samples} samples, averaged over the classes"
                if self.segmenter.settings.samples
                else "entropy of the class probabilities, in nats"
            ),
            **facts,
        )

    def score_table(self) -> str:
        """The scores for reading."""
        return report.score_table(self.confusion, self.dataset.classes, self.calibration, self.boundaries)


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
