"""Boundary scores: boundary F1 and boundary IoU.

A boundary that is one pixel off along a large object hardly changes the object's IoU, but is clearly visible. These
scores measure the boundaries alone.
"""

import math
from dataclasses import dataclass, field

import cv2
import numpy as np

Pixels = tuple[np.ndarray, np.ndarray]  # rows and columns

TOLERANCE = 0.0075  # fraction of the image's diagonal: 4.5 pixels at 360x480
BAND = 0.02  # fraction of the image's diagonal: the width of the band of boundary IoU


@dataclass(frozen=True)
class BoundaryScores:
    """Boundary scores of a data set: fractions in 0..1, NaN where there is nothing to score.

    Attributes:
        f1: Boundary F1 as the papers define it.
        f1_dilated: Boundary F1 without the one-to-one matching.
        iou: Boundary IoU.
        f1_by_class: (C,), the mean of F1 over the images in which the class has a boundary.
        f1_dilated_by_class: (C,), the same mean of dilated F1.
        iou_by_class: (C,), the boundary IoU of each class.
    """

    f1: float
    f1_dilated: float
    iou: float
    f1_by_class: np.ndarray
    f1_dilated_by_class: np.ndarray
    iou_by_class: np.ndarray


@dataclass
class Boundaries:
    """Accumulator of the boundary scores of a data set, image by image.

    **F1**: Csurka, Larlus, Perronnin 2013, section 3; Badrinarayanan et al. 2017, section 4,
    https://arxiv.org/abs/1511.00561. For each image and class, as many boundary pixels of the prediction and the ground
    truth as possible are matched one to one, at a distance of at most 0.75 % of the diagonal. With precision = matched
    / predicted and recall = matched / true boundary pixels, F1 = 2PR / (P + R). The score of an image is the mean over
    the classes that have a boundary in its ground truth; the score of the data set is the mean over the images with at
    least one of these classes. Ignored pixels belong to no class: a class that ends at them has a boundary there, and
    predictions among them count.

    **Dilated F1**: the same without the one-to-one matching. A boundary pixel is correct if any boundary pixel of the
    other side is near enough, so that one pixel can match many. Many programs call this boundary F1; it is never lower
    than F1.

    **IoU**: Cheng et al. 2021, section 4, https://arxiv.org/abs/2103.16562. The IoU of a class, counted over the data
    set, restricted to the pixels of the class within 2 % of the diagonal of its boundary or of the image's edge.
    Ignored pixels do not count, and the predicted and the true class both end at them.

    Args:
        num_classes: The number of classes C.
        ignore_index: The value of ignored pixels in masks.

    Attributes:
        f1: (C,) of each image, NaN where the class is not scored.
        f1_dilated: (C,) of each image, NaN where the class is not scored.
        bands: (2, C) int64, intersection and union for boundary IoU.
    """

    num_classes: int
    ignore_index: int
    f1: list[np.ndarray] = field(default_factory=list)
    f1_dilated: list[np.ndarray] = field(default_factory=list)
    bands: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.bands = np.zeros((2, self.num_classes), dtype=np.int64)

    def update(self, prediction: np.ndarray, mask: np.ndarray) -> None:
        """Add an image.

        Args:
            prediction: (H, W) uint8, class indices.
            mask: (H, W) uint8, class indices or ignore_index.
        """
        predicted, true = BoundaryPixels(prediction), BoundaryPixels(mask)
        has_boundary = np.bincount(true.blocks.ravel(), minlength=self.num_classes)[: self.num_classes] > 0
        f1 = np.full((2, self.num_classes), np.nan)
        for label in map(int, np.flatnonzero(has_boundary)):
            f1[:, label] = boundary_f1(predicted.of(label), true.of(label), (mask.shape[0], mask.shape[1]))
        self.f1.append(f1[0])
        self.f1_dilated.append(f1[1])
        self.bands += _bands(np.where(mask == self.ignore_index, mask, prediction), mask, self.num_classes)

    def compute(self) -> BoundaryScores:
        """Return the scores of all images added so far."""
        f1, f1_dilated = (
            np.stack(values) if values else np.full((1, self.num_classes), np.nan)
            for values in (self.f1, self.f1_dilated)
        )
        with np.errstate(invalid="ignore"):
            iou = self.bands[0] / self.bands[1]
        return BoundaryScores(
            f1=float(_mean(_mean(f1, axis=1))),
            f1_dilated=float(_mean(_mean(f1_dilated, axis=1))),
            iou=float(_mean(iou)),
            f1_by_class=_mean(f1, axis=0),
            f1_dilated_by_class=_mean(f1_dilated, axis=0),
            iou_by_class=iou,
        )


def _mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return the mean of the values that are not NaN, or NaN without any."""
    counted = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(counted, values, 0).sum(axis) / counted.sum(axis)


class BoundaryPixels:
    """The boundary pixels of every class in one array of class indices.

    A pixel is on the boundary of a class if the 2x2 block that extends from it to the right and down contains pixels
    of the class and pixels of others: the image-sized boundary map of the Berkeley segmentation benchmark, which the
    paper's script uses. The boundary is one pixel wide and lies half a pixel up and to the left of the true position.
    The edge of the image is not a boundary.

    Args:
        labels: (H, W) uint8, class indices or ignore_index.

    Examples:
        >>> BoundaryPixels(np.array([[0, 0, 0], [0, 1, 1], [0, 1, 1]], dtype=np.uint8)).of(1)
        (array([0, 0, 0, 1, 2]), array([0, 1, 2, 0, 0]))
    """

    def __init__(self, labels: np.ndarray) -> None:
        padded = np.pad(labels, ((0, 1), (0, 1)), mode="edge")
        block = (padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:])
        self.rows, self.columns = np.nonzero((block[0] != block[1]) | (block[0] != block[2]) | (block[0] != block[3]))
        self.blocks = np.stack([corner[self.rows, self.columns] for corner in block])

    def of(self, label: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows, columns) of the boundary pixels of a class, in reading order."""
        selected = (self.blocks == label).any(axis=0)
        return self.rows[selected], self.columns[selected]


def boundary_f1(predicted: Pixels, true: Pixels, size: tuple[int, int]) -> tuple[float, float]:
    """Return (F1 with one-to-one matching, dilated F1) of one class in one image; see `Boundaries`.

    Args:
        predicted: (rows, columns) of the predicted boundary pixels.
        true: (rows, columns) of the true boundary pixels.
        size: (H, W) of the image.

    Returns:
        Both scores in 0..1, (NaN, NaN) without true boundary pixels.
    """
    num_predicted, num_true = len(predicted[0]), len(true[0])
    if not num_true:
        return math.nan, math.nan
    if not num_predicted:
        return 0.0, 0.0
    starts, partners = _find_near(predicted, true, size, TOLERANCE * math.hypot(*size))
    matched = _count_matched(starts, partners, num_true)
    near_predicted, near_true = int((np.diff(starts) > 0).sum()), len(np.unique(partners))
    return _f1(matched / num_predicted, matched / num_true), _f1(near_predicted / num_predicted, near_true / num_true)


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _find_near(pixels: Pixels, others: Pixels, size: tuple[int, int], distance: float) -> tuple[np.ndarray, np.ndarray]:
    """Find the pixels of `others` that are at most `distance` from each pixel, as the rows of a CSR matrix.

    Returns:
        (starts, partners): the partners of pixel i are partners[starts[i] : starts[i + 1]].
    """
    reach = int(distance)
    width = size[1] + 2 * reach
    indices = np.full((size[0] + 2 * reach) * width, -1, dtype=np.int32)  # the index of each pixel of `others`
    indices[(others[0] + reach) * width + others[1] + reach] = np.arange(len(others[0]), dtype=np.int32)
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    offsets = (dy * width + dx)[dy**2 + dx**2 <= distance**2]
    partners = indices[((pixels[0] + reach) * width + pixels[1] + reach)[:, None] + offsets]
    near = partners >= 0
    return np.concatenate([[0], near.sum(axis=1).cumsum()]).astype(np.int32), partners[near]


def _count_matched(starts: np.ndarray, partners: np.ndarray, num_true: int) -> int:
    """Return the size of the largest one-to-one matching, computed as a maximum flow with unit capacities.

    SciPy's maximum_bipartite_matching returns the same number, but takes seconds where nearly all pixels match.
    """
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]  # imported late: prediction does not need it
    from scipy.sparse.csgraph import maximum_flow  # type: ignore[import-untyped]

    num_predicted = len(starts) - 1
    # The nodes are a source, the predicted pixels, the true pixels and a sink.
    sink = num_predicted + num_true + 1
    heads = np.concatenate(
        [np.arange(1, num_predicted + 1), partners + num_predicted + 1, np.full(num_true, sink)], dtype=np.int32
    )
    tails = np.concatenate(
        [[0], num_predicted + starts, num_predicted + starts[-1] + np.arange(1, num_true + 1), [len(heads)]],
        dtype=np.int32,
    )
    graph = csr_matrix((np.ones(len(heads), dtype=np.int32), heads, tails), shape=(sink + 1, sink + 1))
    return int(maximum_flow(graph, 0, sink, method="dinic").flow_value)


def _bands(prediction: np.ndarray, mask: np.ndarray, num_classes: int) -> np.ndarray:
    """Return (2, C): the pixels of each class that lie in its band in both arrays, and in either; not ignored ones."""
    width = max(1, round(BAND * math.hypot(*mask.shape)))
    counts = np.zeros((2, num_classes), dtype=np.int64)
    in_band = [_in_band(labels, width) for labels in (prediction, mask)]
    both = in_band[0] & in_band[1] & (prediction == mask)
    for labels, inside, sign in ((prediction, in_band[0], 1), (mask, in_band[1], 1), (mask, both, -1)):
        counts[1] += sign * np.bincount(labels[inside], minlength=256)[:num_classes]
    counts[0] = np.bincount(mask[both], minlength=256)[:num_classes]
    return counts


def _in_band(labels: np.ndarray, width: int) -> np.ndarray:
    """Return (H, W) bool: the pixels that are at most `width` steps from another label or from outside the image.

    Steps go to any of the eight neighbours. Equals repeated 3x3 erosion, for all classes at once.
    """
    kernel = np.ones((2 * width + 1, 2 * width + 1), dtype=np.uint8)
    varied = cv2.dilate(labels, kernel) != cv2.erode(labels, kernel)  # pixels outside the image are not compared
    varied[:width] = varied[-width:] = True
    varied[:, :width] = varied[:, -width:] = True
    return varied
