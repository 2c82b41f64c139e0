"""Evaluation of a network on a split: every image is predicted, every pixel that is not ignored counted."""

import math
import os
import platform
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from segdeconv import __version__
from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.classes import Classes, match_classes
from segdeconv.config import TARGET
from segdeconv.data.adapter import Adapter
from segdeconv.data.class_file import COLOUR_TABLES, find_class_file
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.loading import EvaluationSamples, evaluation_loader, explain_loader_errors, for_network
from segdeconv.data.relabelled import in_order_of
from segdeconv.drawing.thumbnails import Gallery
from segdeconv.errors import DivergedError, UsageError, warn
from segdeconv.evaluation import report
from segdeconv.evaluation.boundary import Boundaries
from segdeconv.evaluation.breakdown import Breakdown
from segdeconv.evaluation.calibration import Calibration
from segdeconv.evaluation.metrics import ConfusionMatrix
from segdeconv.evaluation.overlap import overlap
from segdeconv.evaluation.verdict import Overlap, Verdict, verdict
from segdeconv.inference.predictors import whole_image
from segdeconv.inference.scorers import ClassScores, entropy, labels_and_confidence
from segdeconv.inference.segmenter import Segmenter
from segdeconv.inference.small_regions import merge_small_regions
from segdeconv.system.devices import machine
from segdeconv.system.installed import albumentations_version
from segdeconv.system.interruption import raise_again

SAMPLED_VALUES = 1 << 24  # logits of a sample of pixels that calibrate keeps, 64 MiB
LIBRARIES = ("numpy", "opencv-python-headless", "pillow")  # versions that affect pixels


def restore_dataset(checkpoint: Checkpoint, split_name: str) -> SegmentationDataset:
    """Return a split of the data set in a checkpoint's config, with the classes in the order of the network.

    Args:
        checkpoint: The checkpoint.
        split_name: The name of the split.

    Raises:
        UsageError: The data set has other classes, or images with another number of channels.
    """
    from segdeconv.data.module import build_split, check_dataset  # imported late: albumentations takes a second

    node = check_dataset(_with_own_classes(checkpoint.dataset_node(), checkpoint.overridden))
    dataset = build_split(node, split_name)
    for line in dataset.warnings:
        warn(line)
    class_order(
        checkpoint,
        dataset,
        owner=node[TARGET],
        way_out="use the data set of the checkpoint, or rename, merge and ignore classes with "
        "dataset.label_map={theirs: its, other: ignore}",
    )
    classes = checkpoint.classes
    if (dataset.classes.names, dataset.classes.ignore_index) != (classes.names, classes.ignore_index):
        dataset = in_order_of(dataset, classes)
    _require_channels(checkpoint, dataset, node[TARGET], "keep dataset.channels as in training")
    return dataset


def _with_own_classes(node: dict[str, Any], overridden: Collection[str]) -> dict[str, Any]:
    """Return a `dataset` node without the classes of training if another folder is evaluated that names its own."""
    if "dataset.root" not in overridden or "dataset.classes" in overridden or not node.get("classes"):
        return node
    path, _ = find_class_file(Path(os.path.expanduser(str(node["root"]))))
    if path is None or path.name in COLOUR_TABLES:  # of which training may have read none
        return node
    print(f"classes:    those of {path}, matched with the network's by name")
    return {**node, "classes": None}


def given_dataset(data: Any, checkpoint: Checkpoint, split_name: str = "test") -> SegmentationDataset:
    """Return a data set of a program, such as a list of pairs (image, mask), as a split with the network's classes.

    Args:
        data: A data set that `train` takes, of which masks hold the class indices of the network.
        checkpoint: The checkpoint of the network.
        split_name: The name of the split.

    Raises:
        UsageError: It is not such a data set, or has other labels or channels than the network.
    """
    if isinstance(data, SegmentationDataset):
        return data
    dataset, classes = Adapter(data, split_name), checkpoint.classes
    dataset.name_classes(Classes(classes.names, classes.colours), dataset.labels)
    _require_channels(checkpoint, dataset, "the data set", "give images like those of training")
    return dataset


def _require_channels(checkpoint: Checkpoint, dataset: SegmentationDataset, owner: str, way_out: str) -> None:
    channels = len(checkpoint.facts["preprocessing"]["mean"])
    if dataset.channels != channels:
        raise UsageError(
            f"{checkpoint.path} was trained on images with {channels} channel(s), but {owner} has "
            f"{dataset.channels} - {way_out}"
        )


def class_order(
    checkpoint: Checkpoint,
    dataset: SegmentationDataset,
    *,
    owner: str = "the data set",
    way_out: str = "compare networks with the same classes, which are matched by name",
) -> list[int]:
    """Return the network's index of each class of a data set, matched by name; see `match_classes`.

    Args:
        checkpoint: The checkpoint of the network.
        dataset: The data set.
        owner: The owner of the data set's classes, for the error message.
        way_out: The way out, for the error message.

    Raises:
        UsageError: The classes differ.
    """
    return match_classes(dataset.classes, checkpoint.classes, owners=(owner, str(checkpoint.path)), way_out=way_out)


class Predicted(NamedTuple):
    """The prediction of one image of a data set.

    Attributes:
        dataset: The data set.
        place: The index of the image in the data set.
        mask: (H, W) uint8, class indices or ignore_index.
        prediction: (H, W) uint8, class indices, exactly as counted.
        uncertainty: (H, W) float32: with sampling, the variance of the samples, averaged over the classes; otherwise
            the entropy of the class probabilities, in nats.
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
    places: Sequence[int] | None = None,
    scored: Iterator[tuple[ClassScores, Tensor]] | None = None,
    shown: bool = True,
) -> np.ndarray:
    """Predict every image of a split and compare it with its mask, at the size of the mask.

    Args:
        segmenter: The network with its prediction settings.
        dataset: A split with the classes of the network, in any order.
        calibration: Updated with all pixels, if given; with the most probable class of each, since small regions that
            were merged into others have no probability of their own.
        boundaries: Updated with all images, if given.
        on_prediction: Called with the prediction of each image.
        places: The indices of the images, whole `batches` in order; None for all.
        scored: The `class_scores` of these images and others after them; None to compute them here.
        shown: Whether to show a progress bar.

    Returns:
        The confusion matrix, (C, C) int64, rows = ground truth, in the class order of the data set.

    Raises:
        UsageError: The data set has other classes.
        DivergedError: The network's scores are not finite.
    """
    order, device = class_order(segmenter.checkpoint, dataset), segmenter.network.device
    if calibration is not None:
        calibration.to(device)
    matrix = ConfusionMatrix(len(dataset.classes), dataset.classes.ignore_index).to(device)
    indices = range(len(dataset)) if places is None else places
    scored = class_scores(segmenter, dataset, indices) if scored is None else islice(scored, len(indices))
    with explain_loader_errors(), progress_bar(dataset, len(indices), shown=shown) as bar:
        for index, (scores, stored) in zip(indices, scored, strict=True):
            mask = stored.to(device)
            if dataset.whole is dataset:  # crops of objects are meant to be resized
                segmenter.resized.add(dataset.names[index], (mask.shape[0], mask.shape[1]))
            if order != sorted(order):
                scores = scores._replace(values=scores.values[:, order])
            (prediction,), (confidence,) = labels_and_confidence(scores)
            if not bool(torch.isfinite(confidence).all()):
                raise DivergedError(
                    f"the network's scores of {dataset.names[index]} are not finite, since its weights are too large - "
                    "use an earlier checkpoint, or train again with a lower optimizer.lr"
                )
            if calibration is not None:
                uncertainty = None if scores.uncertainty is None else scores.uncertainty[0]
                calibration.update(prediction, confidence, mask, uncertainty)
            predicted = merge_small_regions(prediction.cpu().numpy(), segmenter.settings.min_area)
            matrix.update(torch.as_tensor(predicted, device=device), mask)
            if boundaries is not None:
                boundaries.update(predicted, stored.numpy())
            if on_prediction is not None:
                (spread,) = entropy(scores) if scores.uncertainty is None else scores.uncertainty
                on_prediction(Predicted(dataset, index, stored.numpy(), predicted, spread.float().cpu().numpy()))
            bar.update()
    return matrix.compute()


def progress_bar(dataset: SegmentationDataset, total: int, *, done: int = 0, shown: bool = True) -> Any:
    """Return the progress bar of an evaluation of `total` images, of which `done` are scored already."""
    disable = None if shown else True
    return tqdm(total=total, initial=done, desc=f"evaluating {dataset.split}", unit="image", disable=disable)


def batches(segmenter: Segmenter, dataset: SegmentationDataset) -> list[range]:
    """Return the indices of the images that go through the network together.

    Parts of an evaluation consist of whole batches, so that their scores are those of one process to the last bit.
    """
    single = not segmenter.settings.single_pass or segmenter.preprocessing.size is None
    size = 1 if single else segmenter.checkpoint.config["dataset"]["batch_size"]
    return [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]


def class_scores(
    segmenter: Segmenter, dataset: SegmentationDataset, places: Sequence[int] | None = None
) -> Generator[tuple[ClassScores, Tensor], None, None]:
    """Yield (scores at the size of the mask with N = 1, mask) of every image, in batches if a single pass is enough.

    Args:
        segmenter: The network with its prediction settings.
        dataset: A split.
        places: The indices of the images, whole `batches` in order; None for all.
    """
    if not segmenter.settings.single_pass:
        for index in range(len(dataset)) if places is None else places:
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
        places=places,
    )
    for batch in loader:
        raise_again()
        on_device = {**batch, "image": batch["image"].to(segmenter.network.device)}
        scores = segmenter.network(for_network(on_device, preprocessing)["image"])
        for position, mask in enumerate(batch["mask"]):
            yield scores.of_image(position, (mask.shape[0], mask.shape[1])), mask


def finite_scores(
    segmenter: Segmenter, dataset: SegmentationDataset
) -> Generator[tuple[ClassScores, Tensor], None, None]:
    """Yield the `class_scores` of every image with a progress bar, after a check that they are finite.

    Raises:
        DivergedError: They are not.
    """
    with explain_loader_errors(), progress_bar(dataset, len(dataset)) as bar:
        for index, (predicted, mask) in enumerate(class_scores(segmenter, dataset)):
            if not bool(torch.isfinite(predicted.values).all()):
                raise DivergedError(
                    f"the network's scores of {dataset.names[index]} are not finite, since its weights are too large - "
                    "use an earlier checkpoint, or train again with a lower optimizer.lr"
                )
            yield predicted, mask
            bar.update()


def sampled_per_image(dataset: SegmentationDataset) -> int:
    """Return of how many pixels of each image `SAMPLED_VALUES` logits can be kept; at least 1."""
    return max(1, SAMPLED_VALUES // (len(dataset.classes) * max(1, len(dataset))))


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a network on a split, with the content of report.json and report.html.

    Attributes:
        segmenter: The network with its prediction settings.
        dataset: The split.
        confusion: (C, C) int64, rows = ground truth.
        calibration: The calibration counts.
        boundaries: The boundary counts, None if they were not computed.
        breakdown: The counts by image and by distance from a boundary.
        gallery: The pictures for the page.
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
        dataset: Any,
        *,
        outlines: bool = True,
        on_prediction: OnPrediction | None = None,
        places: Sequence[int] | None = None,
        scored: Iterator[tuple[ClassScores, Tensor]] | None = None,
        shown: bool = True,
    ) -> Self:
        """Evaluate a network on a split.

        Args:
            segmenter: The network with its prediction settings.
            dataset: A split with the classes of the network, in any order, or what `given_dataset` takes.
            outlines: Whether to compute boundary scores.
            on_prediction: Called with the prediction of each image.
            places: The indices of the images, whole `batches` in order; None for all.
            scored: See `evaluate`.
            shown: Whether to show a progress bar.

        Raises:
            UsageError: The data set has other classes.
        """
        dataset = given_dataset(dataset, segmenter.checkpoint)
        classes = dataset.classes
        calibration = Calibration(classes.ignore_index)
        boundaries = Boundaries(len(classes), classes.ignore_index) if outlines else None
        breakdown = Breakdown(len(classes), classes.ignore_index)
        gallery = Gallery(classes, largest_uncertainty(len(classes), segmenter.settings.samples))

        def record(predicted: Predicted) -> None:
            breakdown.update(
                dataset.names[predicted.place], predicted.prediction, predicted.mask, predicted.uncertainty
            )
            gallery.update(predicted.prediction, predicted.uncertainty)
            if on_prediction is not None:
                on_prediction(predicted)

        confusion = evaluate(
            segmenter,
            dataset,
            calibration=calibration,
            boundaries=boundaries,
            on_prediction=record,
            places=places,
            scored=scored,
            shown=shown,
        )
        return cls(segmenter, dataset, confusion, calibration, boundaries, breakdown, gallery)

    @cached_property
    def overlap(self) -> Overlap:
        """Which of the images training has used."""
        return overlap(self.segmenter.checkpoint, self.dataset)

    def report(self, **facts: Any) -> dict[str, Any]:
        """Return the content of report.json; `facts` are further entries."""
        return report.report(
            self.confusion,
            len(self.dataset),
            self.dataset.classes,
            boundaries=self.boundaries,
            breakdown=self.breakdown,
            checkpoint=str(self.segmenter.checkpoint.path),
            checkpoint_sha256=self.segmenter.checkpoint.sha256,
            config=self.segmenter.checkpoint.config,
            versions=versions(self.segmenter.network.device),
            split=self.dataset.split,
            overlap=self.overlap,
            samples=self.segmenter.settings.samples,
            min_area=self.segmenter.settings.min_area,
            calibration=self.calibration.report(),
            temperature=self.segmenter.checkpoint.facts.get("temperature"),
            class_offsets=self.segmenter.checkpoint.facts.get("class_offsets"),
            instance_statistics=self.segmenter.checkpoint.facts.get("instance_statistics"),
            uncertainty_of_pixels=(
                f"variance of {self.segmenter.settings.samples} samples, averaged over the classes"
                if self.segmenter.settings.samples
                else "entropy of the class probabilities, in nats"
            ),
            **facts,
        )

    def verdict(self) -> Verdict:
        """Return the scores beside those of a constant prediction, in sentences."""
        return verdict(
            self.confusion,
            self.dataset.classes,
            num_images=len(self.dataset),
            split=self.dataset.split,
            overlap=self.overlap,
        )

    def score_table(self) -> str:
        """Return the scores as a text table."""
        table = report.score_table(self.confusion, self.dataset.classes, self.calibration, self.boundaries)
        facts = self.segmenter.checkpoint.facts
        if recorded := facts.get("temperature"):
            table += f"\n{report.describe_temperature(recorded)}"
        if recorded := facts.get("class_offsets"):
            table += f"\n{report.describe_class_offsets(recorded)}"
        if recorded := facts.get("instance_statistics"):
            table += f"\n{report.describe_instance_statistics(recorded)}"
        return table


def largest_uncertainty(num_classes: int, samples: int) -> float:
    """Return the largest possible uncertainty of a pixel.

    It is reached if all classes are equally probable or, with samples, equally many samples are certain of each class.

    Args:
        num_classes: The number of classes.
        samples: The number of samples; 0 for the entropy of the class probabilities, in nats.

    Examples:
        >>> largest_uncertainty(2, 0), largest_uncertainty(2, 50)
        (0.6931471805599453, 0.25)
    """
    return (1 - 1 / num_classes) / num_classes if samples else math.log(num_classes)


def versions(device: torch.device) -> dict[str, str]:
    """Return the versions that affect pixels or rounding, and the machine."""
    return {
        "segdeconv": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in LIBRARIES},
        **dict([albumentations_version()]),
        **machine(device),
    }
