"""The numbers of a report.json, computed again: from its own counts, and from predictions of some of its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from segdeconv.classes import Classes
from segdeconv.evaluation import report
from segdeconv.evaluation.breakdown import Breakdown, ImageCounts
from segdeconv.evaluation.metrics import scores
from segdeconv.evaluation.verdict import Overlap

# They need the masks or the config, or are missing in reports of earlier versions.
NOT_DERIVED = ("truth_sha256", "by_boundary_distance", "trained_on", "images_trained_on", "selected_on")
CALIBRATION_TOLERANCE = 1e-9  # of a sum of 15 products


def first_difference(recorded: Any, computed: Any, where: str = "") -> str:
    """Return the first value of `computed` that is not in `recorded`, as a phrase; empty if all are.

    Args:
        recorded: Plain data; further keys of mappings are accepted.
        computed: Plain data.
        where: The key of both, for the phrase.

    Examples:
        >>> first_difference({"a": [1, 2], "b": 0}, {"a": [1, 3]})
        'a.1 is 2, and 3 by the count'
    """
    if isinstance(computed, Mapping):
        if not isinstance(recorded, Mapping):
            return f"{where or 'the report'} is not a mapping"
        pairs = [(str(key), recorded.get(key), value) for key, value in computed.items()]
    elif isinstance(computed, Sequence) and not isinstance(computed, str):
        if not isinstance(recorded, Sequence) or isinstance(recorded, str) or len(recorded) != len(computed):
            return f"{where} does not have {len(computed)} entries"
        pairs = [(str(index), *values) for index, values in enumerate(zip(recorded, computed, strict=True))]
    else:
        same = type(recorded) is type(computed) and recorded == computed
        return "" if same else f"{where} is {_short(recorded)}, and {_short(computed)} by the count"
    for key, value, expected in pairs:
        if difference := first_difference(value, expected, f"{where}.{key}" if where else key):
            return difference
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def inconsistency(content: Mapping[str, Any], classes: Classes) -> str:
    """Return the first number of a report that does not follow from the counts of its images; empty if all do.

    The confusion matrices of the images have to sum to the one of the report, and all scores have to be those of these
    counts. Boundary scores, the uncertainty of images, the bins of the calibration and the bands of pixels by their
    distance from a boundary do not follow from them; only their sums are checked.

    Args:
        content: The content of report.json.
        classes: The classes of the network.
    """
    try:
        breakdown = counts_of(content, len(classes), classes.ignore_index)
        confusion = confusion_of(breakdown.images, len(classes))
        derived = report.report(
            confusion,
            len(breakdown.images),
            classes,
            breakdown=breakdown,
            split=content.get("split"),
            overlap=_overlap(content, len(breakdown.images)),
        )
        for name in NOT_DERIVED:
            del derived[name]
        for name in ("boundary_f1", "boundary_f1_dilated", "boundary_iou"):
            del derived[name]
            for entry in derived["classes"]:
                del entry[name]
        if difference := first_difference(content, derived):
            return difference
        return _inconsistent_sums(content, int(confusion.sum()))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        return f"it does not have the form of a report ({type(error).__name__}: {error})"


def _overlap(content: Mapping[str, Any], num_images: int) -> Overlap:
    """Return which images training has used; reports of earlier versions say so of the whole split, or not at all."""
    if "images_trained_on" in content:
        return Overlap(num_images, content["images_trained_on"], content["selected_on"])
    split = content.get("split")
    trained = content.get("trained_on", split == "train")
    return Overlap(num_images, num_images if trained else 0, split == "val" and not trained)


def _inconsistent_sums(content: Mapping[str, Any], num_pixels: int) -> str:
    """Return what is wrong with the numbers that need the pixels, as far as their sums show."""
    bands = sum(band["pixels"] for band in content["by_boundary_distance"])
    if bands != num_pixels:
        return f"by_boundary_distance has {bands} pixels, and {num_pixels} by the count"
    calibration = content["calibration"]
    bins = calibration["bins"]
    pixels = sum(bin_["pixels"] for bin_ in bins)
    if pixels != num_pixels:
        return f"calibration.bins has {pixels} pixels, and {num_pixels} by the count"
    gaps = sum(bin_["pixels"] * abs(bin_["confidence"] - bin_["accuracy"]) for bin_ in bins if bin_["pixels"])
    error = calibration["expected_calibration_error"]
    if pixels and abs(error - gaps / pixels) > CALIBRATION_TOLERANCE:
        return f"calibration.expected_calibration_error is {error}, and {gaps / pixels} by its bins"
    by_class = [entry["boundary_iou"] for entry in content["classes"] if entry["boundary_iou"] is not None]
    if by_class and abs(content["boundary_iou"] - sum(by_class) / len(by_class)) > CALIBRATION_TOLERANCE:
        return f"boundary_iou is {content['boundary_iou']}, and {sum(by_class) / len(by_class)} by its classes"
    return ""


def counts_of(content: Mapping[str, Any], num_classes: int, ignore_index: int) -> Breakdown:
    """Return the counts of the images of a report.

    Args:
        content: The content of report.json.
        num_classes: The number of classes.
        ignore_index: The value of ignored pixels in masks.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: The report has another form.
    """
    breakdown = Breakdown(num_classes, ignore_index)
    for image in content["images"]:
        cells = np.array([[int(n) for n in cell.split(",")] for cell in image["cells"].split()], dtype=np.int64)
        cells = cells.reshape(-1, 3)
        confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
        if (cells < 0).any() or (cells[:, :2] >= num_classes).any():
            raise ValueError(f"cells of {image['name']}")
        np.add.at(confusion, (cells[:, 0], cells[:, 1]), cells[:, 2])
        height, width = image["size"]
        uncertainty = float("nan") if image["uncertainty"] is None else image["uncertainty"]
        counts = (np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0))
        breakdown.images.append(ImageCounts(image["name"], (height, width), *counts, uncertainty, b"", cells))
    return breakdown


def confusion_of(images: Sequence[ImageCounts], num_classes: int) -> np.ndarray:
    """Return the confusion matrix of some images, (C, C) int64, rows = ground truth."""
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    for image in images:
        np.add.at(confusion, (image.cells[:, 0], image.cells[:, 1]), image.cells[:, 2])
    return confusion


def largest_gap(recorded: Sequence[ImageCounts], counted: Sequence[ImageCounts], num_classes: int) -> float:
    """Return the largest difference of a score between two counts of the same images, over all of them."""
    first, second = (scores(confusion_of(images, num_classes)) for images in (recorded, counted))
    names = ("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted")
    gaps = [abs(getattr(first, name) - getattr(second, name)) for name in names]
    by_class = np.abs(first.iou - second.iou)
    return max([0.0, *(gap for gap in gaps if gap == gap), *by_class[~np.isnan(by_class)].tolist()])
