"""Where the scores of a data set come from: from which images, of what size, how far from a boundary."""

import hashlib
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from segdeconv.evaluation.metrics import number, scores_of

BANDS = (0, 2, 4, 8, 16, 32)  # where each band of distances from a boundary begins, in pixels
MOST_SIZES = 6  # of images, that are each scored by itself
GROUPS = 5  # of images by size, where there are more


@dataclass(frozen=True)
class ImageCounts:
    """What one image adds to the scores; its ignored pixels count nowhere.

    right, truth, predicted: (C,) pixels of each class that are right, that the truth has, that the prediction has.
    uncertainty: the mean over its pixels; NaN if none counts.
    """

    name: str
    size: tuple[int, int]
    right: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    uncertainty: float


class Breakdown:
    """Counts of every image of a data set, and of bands of pixels by their distance from the nearest boundary.

    A boundary is where two neighbouring pixels of the truth, by a side or a corner, have different labels; ignored is
    a label too, the edge of the image is no boundary. The distance of a pixel is the number of steps to the nearest
    pixel at a boundary, a step going to any of eight neighbours: 0 touches a pixel of another label. Band i holds the
    distances BANDS[i] to BANDS[i + 1] - 1, the last all others, also images without a boundary. After the trimaps of
    Kohli, Ladicky, Torr 2009 (https://doi.org/10.1007/s11263-008-0202-0), whose bands start at the boundary and grow;
    ours do not overlap.
    """

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.images: list[ImageCounts] = []
        self.bands = np.zeros((len(BANDS), 3, num_classes), dtype=np.int64)
        self._digest = hashlib.sha256()

    def update(self, name: str, prediction: np.ndarray, mask: np.ndarray, uncertainty: np.ndarray) -> None:
        """prediction: (H, W) uint8, class indices; mask: (H, W) uint8, class indices or ignore_index; uncertainty:
        (H, W) float32.
        """
        counted = mask != self.ignore_index
        truth, found = mask[counted], prediction[counted]
        first = self.num_classes * np.digitize(boundary_distance(mask)[counted], BANDS[1:])  # place of its band
        places = (first[truth == found] + truth[truth == found], first + truth, first + found)
        counts = np.stack([np.bincount(one, minlength=self.bands[:, 0].size) for one in places])
        counts = counts.reshape(3, len(BANDS), self.num_classes)
        self.bands += counts.swapaxes(0, 1)
        mean = float(uncertainty[counted].mean(dtype=np.float64)) if truth.size else float("nan")
        size = (mask.shape[0], mask.shape[1])
        right, true, predicted = counts.sum(axis=1)
        self.images.append(ImageCounts(name, size, right, true, predicted, mean))
        self._digest.update(f"{name!a} {mask.shape}".encode())
        self._digest.update(np.ascontiguousarray(mask).data)

    @property
    def images_by_class(self) -> list[int]:
        """The number of images in whose truth each class is."""
        return [int(count) for count in sum((one.truth > 0 for one in self.images), np.zeros(self.num_classes, int))]

    def report(self) -> dict[str, Any]:
        """As plain data for report.json: fractions in 0..1, null where there is nothing to score.

        truth_sha256: of the names and masks that were counted, in their order: equal where the truth was.
        """
        return {
            "images": [
                {
                    "name": one.name,
                    "size": list(one.size),
                    **_scored(one.right, one.truth, one.predicted),
                    "uncertainty": number(one.uncertainty),
                }
                for one in self.images
            ],
            "by_size": [self._of_group(group) for group in _by_size(self.images)],
            "by_boundary_distance": [
                {
                    "from": first,
                    "to": None if first == BANDS[-1] else after - 1,
                    **_scored(*counts),
                }
                for first, after, counts in zip(BANDS, (*BANDS[1:], 0), self.bands, strict=True)
            ],
            "truth_sha256": self._digest.hexdigest(),
        }

    def _of_group(self, group: list[ImageCounts]) -> dict[str, Any]:
        counts = [sum(getattr(one, kind) for one in group) for kind in ("right", "truth", "predicted")]
        sizes = sorted((one.size for one in group), key=_area)
        return {
            "smallest": list(sizes[0]),
            "largest": list(sizes[-1]),
            "num_images": len(group),
            **_scored(*counts),
        }


def boundary_distance(labels: np.ndarray) -> np.ndarray:
    """(H, W) uint8 -> (H, W) float32, whole numbers: the steps from each pixel to the nearest at a boundary.

    >>> boundary_distance(np.array([[1, 1, 1, 1, 2]], dtype=np.uint8))
    array([[3., 2., 1., 0., 0.]], dtype=float32)
    """
    kernel = np.ones((3, 3), dtype=np.uint8)
    inside = cv2.dilate(labels, kernel) == cv2.erode(labels, kernel)  # outside the image nothing is compared
    if inside.all():
        return np.full(labels.shape, np.inf, dtype=np.float32)
    return cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_C, 3)


def _by_size(images: list[ImageCounts]) -> list[list[ImageCounts]]:
    """Images of one size together if there are few sizes, else as many images in each group as can be."""
    sizes = sorted({one.size for one in images}, key=_area)
    if len(sizes) <= MOST_SIZES:
        groups = [[one for one in images if one.size == size] for size in sizes]
    else:
        areas = np.array([_area(one.size)[0] for one in images])
        ends = np.quantile(areas, np.arange(1, GROUPS) / GROUPS)
        numbers = np.searchsorted(ends, areas)
        groups = [[images[place] for place in np.flatnonzero(numbers == number)] for number in range(GROUPS)]
    return [group for group in groups if group]


def _area(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] * size[1], size[0]


def _scored(right: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """Of these pixels alone: their mean IoU is that of the classes in their truth or their prediction."""
    result = scores_of(right, truth, predicted)
    return {
        "pixels": int(truth.sum()),
        "miou": number(result.miou),
        "pixel_accuracy": number(result.pixel_accuracy),
    }
