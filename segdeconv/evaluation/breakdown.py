"""Breakdown of the scores of a data set by image, by image size and by distance from a boundary."""

import hashlib
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from segdeconv.evaluation.metrics import number, scores_of

BANDS = (0, 2, 4, 8, 16, 32)  # the first distance of each band, in pixels
MAX_SIZES = 6  # up to as many image sizes are scored separately
GROUPS = 5  # groups of images by size, where there are more sizes


@dataclass(frozen=True)
class ImageCounts:
    """The counts of one image, without its ignored pixels.

    Attributes:
        name: The name of the image.
        size: (H, W) of its mask.
        correct: (C,), the correct pixels of each class.
        truth: (C,), the pixels of each class in the ground truth.
        predicted: (C,), the pixels of each class in the prediction.
        uncertainty: The mean over the pixels, NaN if all are ignored.
        digest: The sha256 of name and mask.
        cells: (cells, 3) int64, the confusion matrix: truth, prediction and pixels of every pair that occurs.
    """

    name: str
    size: tuple[int, int]
    correct: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    uncertainty: float
    digest: bytes
    cells: np.ndarray


class Breakdown:
    """Counts of every image of a data set, and of bands of pixels by their distance from the nearest boundary.

    A boundary lies between two neighbouring pixels of the ground truth (by side or corner) with different labels.
    Ignored counts as a label here; the edge of the image is not a boundary. The distance of a pixel is the number of
    8-connected steps to the nearest pixel at a boundary; 0 touches another label. Band i contains the distances
    BANDS[i] to BANDS[i + 1] - 1, the last band all larger ones and images without a boundary. After the trimaps of
    Kohli, Ladicky, Torr 2009 (https://doi.org/10.1007/s11263-008-0202-0), but with bands that do not overlap.

    Args:
        num_classes: The number of classes C.
        ignore_index: The value of ignored pixels in masks.

    Attributes:
        images: The counts of each image, in the order of the updates.
        bands: (bands, 3, C) int64: correct pixels, pixels of the ground truth, pixels of the prediction.
    """

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.images: list[ImageCounts] = []
        self.bands = np.zeros((len(BANDS), 3, num_classes), dtype=np.int64)

    def update(self, name: str, prediction: np.ndarray, mask: np.ndarray, uncertainty: np.ndarray) -> None:
        """Add an image.

        Args:
            name: The name of the image.
            prediction: (H, W) uint8, class indices.
            mask: (H, W) uint8, class indices or ignore_index.
            uncertainty: (H, W) float32.
        """
        valid = mask != self.ignore_index
        truth, predicted = mask[valid], prediction[valid]
        pairs = np.bincount(self.num_classes * truth.astype(np.int64) + predicted)
        present = np.flatnonzero(pairs)
        cells = np.stack([*np.divmod(present, self.num_classes), pairs[present]], axis=1)
        offset = self.num_classes * np.digitize(boundary_distance(mask)[valid], BANDS[1:])  # of the pixel's band
        indices = (offset[truth == predicted] + truth[truth == predicted], offset + truth, offset + predicted)
        counts = np.stack([np.bincount(index, minlength=self.bands[:, 0].size) for index in indices])
        counts = counts.reshape(3, len(BANDS), self.num_classes)
        self.bands += counts.swapaxes(0, 1)
        mean = float(uncertainty[valid].mean(dtype=np.float64)) if truth.size else float("nan")
        size = (mask.shape[0], mask.shape[1])
        correct, true, predicted = counts.sum(axis=1)
        digest = hashlib.sha256(f"{name!a} {mask.shape}".encode())
        digest.update(np.ascontiguousarray(mask).data)
        self.images.append(ImageCounts(name, size, correct, true, predicted, mean, digest.digest(), cells))

    @property
    def images_by_class(self) -> list[int]:
        """The number of images whose ground truth contains each class."""
        return [
            int(count) for count in sum((image.truth > 0 for image in self.images), np.zeros(self.num_classes, int))
        ]

    def report(self) -> dict[str, Any]:
        """Return the plain data for report.json: fractions in 0..1, null where there is nothing to score.

        `truth_sha256` is the hash of those of the names and masks of each image, in order: equal for the same ground
        truth. `cells` is the confusion matrix of an image, as text, since a report has thousands:
        `truth,prediction,pixels` of every pair of classes that occurs, by their indices.
        """
        return {
            "images": [
                {
                    "name": image.name,
                    "size": list(image.size),
                    **_score(image.correct, image.truth, image.predicted),
                    "uncertainty": number(image.uncertainty),
                    "cells": " ".join(",".join(map(str, cell)) for cell in image.cells.tolist()),
                }
                for image in self.images
            ],
            "by_size": [_group_report(group) for group in _group_by_size(self.images)],
            "by_boundary_distance": [
                {
                    "from": first,
                    "to": None if first == BANDS[-1] else end - 1,
                    **_score(*counts),
                }
                for first, end, counts in zip(BANDS, (*BANDS[1:], 0), self.bands, strict=True)
            ],
            "truth_sha256": hashlib.sha256(b"".join(image.digest for image in self.images)).hexdigest(),
        }


def boundary_distance(labels: np.ndarray) -> np.ndarray:
    """Return the number of steps from each pixel to the nearest pixel at a boundary; see `Breakdown`.

    Args:
        labels: (H, W) uint8.

    Returns:
        (H, W) float32, whole numbers, infinite without a boundary.

    Examples:
        >>> boundary_distance(np.array([[1, 1, 1, 1, 2]], dtype=np.uint8))
        array([[3., 2., 1., 0., 0.]], dtype=float32)
    """
    kernel = np.ones((3, 3), dtype=np.uint8)
    inside = cv2.dilate(labels, kernel) == cv2.erode(labels, kernel)  # pixels outside the image are not compared
    if inside.all():
        return np.full(labels.shape, np.inf, dtype=np.float32)
    return cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_C, 3)


def _group_by_size(images: list[ImageCounts]) -> list[list[ImageCounts]]:
    """Group the images by size if there are few sizes, else by area into groups of about equal numbers of images."""
    sizes = sorted({image.size for image in images}, key=_area)
    if len(sizes) <= MAX_SIZES:
        groups = [[image for image in images if image.size == size] for size in sizes]
    else:
        areas = np.array([_area(image.size)[0] for image in images])
        limits = np.quantile(areas, np.arange(1, GROUPS) / GROUPS)
        group_indices = np.searchsorted(limits, areas)
        groups = [[images[index] for index in np.flatnonzero(group_indices == group)] for group in range(GROUPS)]
    return [group for group in groups if group]


def _group_report(group: list[ImageCounts]) -> dict[str, Any]:
    counts = [sum(getattr(image, kind) for image in group) for kind in ("correct", "truth", "predicted")]
    sizes = sorted((image.size for image in group), key=_area)
    return {
        "smallest": list(sizes[0]),
        "largest": list(sizes[-1]),
        "num_images": len(group),
        **_score(*counts),
    }


def _area(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] * size[1], size[0]


def _score(correct: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """Score some pixels alone: their mean IoU covers the classes in their ground truth or their prediction."""
    result = scores_of(correct, truth, predicted)
    return {
        "pixels": int(truth.sum()),
        "miou": number(result.miou),
        "pixel_accuracy": number(result.pixel_accuracy),
    }
