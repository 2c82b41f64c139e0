"""How well the outlines of classes are met: boundary F1 and boundary IoU.

Two outlines that are one pixel apart along a large object change its IoU by next to nothing and what a person sees by
much; these scores look at the outlines alone.
"""

import math
from dataclasses import dataclass, field

import cv2
import numpy as np

Pixels = tuple[np.ndarray, np.ndarray]  # rows and columns

TOLERANCE = 0.0075  # of the image's diagonal: 4.5 pixels at 360x480
BAND = 0.02  # of the image's diagonal: the width that boundary IoU looks at


@dataclass(frozen=True)
class BoundaryScores:
    """Fractions in 0..1; NaN where there is nothing to score.

    f1: boundary F1 as the papers define it; f1_dilated: the same without the one-to-one matching; iou: boundary IoU.
    f1_by_class, f1_dilated_by_class: (C,), means over the images in which the class has a boundary. iou_by_class: (C,).
    """

    f1: float
    f1_dilated: float
    iou: float
    f1_by_class: np.ndarray
    f1_dilated_by_class: np.ndarray
    iou_by_class: np.ndarray


@dataclass
class Boundaries:
    """The boundary scores of a data set, image by image.

    F1. Csurka, Larlus, Perronnin 2013, section 3; Badrinarayanan et al. 2017, section 4,
    https://arxiv.org/abs/1511.00561. For each image and class, boundary pixels of the prediction and of the truth
    are matched one to one, as many as possible, no further apart than 0.75 % of the diagonal. With precision = matched
    / predicted and recall = matched / true ones, F1 = 2PR / (P + R). An image's score is the mean over the classes
    that have a boundary in its truth, the data set's the mean over the images that have such a class. Ignored pixels
    are no class: where a class ends at them it has a boundary, and what is predicted among them counts.

    F1 dilated. The same, but a boundary pixel is right if any of the other side is near enough, so that a pixel can
    vouch for many. Many programs that say boundary F1 compute this; it is never the lower of the two.

    IoU. Cheng et al. 2021, section 4, https://arxiv.org/abs/2103.16562: the IoU of a class, counted over the data set,
    of the pixels of the class that lie within 2 % of the diagonal of its outline or of the image's edge. Ignored
    pixels do not count, and both sides end where they begin.
    """

    num_classes: int
    ignore_index: int
    f1: list[np.ndarray] = field(default_factory=list)  # (C,) of each image, NaN where the class is not scored
    f1_dilated: list[np.ndarray] = field(default_factory=list)
    bands: np.ndarray = field(init=False)  # (2, C) int64: intersection and union

    def __post_init__(self) -> None:
        self.bands = np.zeros((2, self.num_classes), dtype=np.int64)

    def update(self, prediction: np.ndarray, mask: np.ndarray) -> None:
        """prediction: (H, W) uint8, class indices; mask: (H, W) uint8, class indices or ignore_index."""
        predicted, true = Outlines(prediction), Outlines(mask)
        seen = np.bincount(true.blocks.ravel(), minlength=self.num_classes)[: self.num_classes] > 0
        f1 = np.full((2, self.num_classes), np.nan)
        for label in map(int, np.flatnonzero(seen)):
            f1[:, label] = boundary_f1(predicted.of(label), true.of(label), (mask.shape[0], mask.shape[1]))
        self.f1.append(f1[0])
        self.f1_dilated.append(f1[1])
        self.bands += _bands(np.where(mask == self.ignore_index, mask, prediction), mask, self.num_classes)

    def compute(self) -> BoundaryScores:
        """The scores of all images so far."""
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
    """The mean of those that are numbers; NaN where none is."""
    counted = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(counted, values, 0).sum(axis) / counted.sum(axis)


class Outlines:
    """The boundary pixels of every class in one map of labels.

    A pixel is on the boundary of a class if, of the 2x2 block to its right and below, some pixels are of the class and
    some are not: the image-sized outline of the Berkeley segmentation benchmark, which the paper's script uses. It is
    one pixel wide and lies half a pixel up and to the left of the true place. The edge of the image is no boundary.

    >>> Outlines(np.array([[0, 0, 0], [0, 1, 1], [0, 1, 1]], dtype=np.uint8)).of(1)
    (array([0, 0, 0, 1, 2]), array([0, 1, 2, 0, 0]))
    """

    def __init__(self, labels: np.ndarray) -> None:
        padded = np.pad(labels, ((0, 1), (0, 1)), mode="edge")
        block = (padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:])
        self.rows, self.columns = np.nonzero((block[0] != block[1]) | (block[0] != block[2]) | (block[0] != block[3]))
        self.blocks = np.stack([corner[self.rows, self.columns] for corner in block])

    def of(self, label: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, columns) of the boundary pixels of a class, in reading order."""
        on = (self.blocks == label).any(axis=0)
        return self.rows[on], self.columns[on]


def boundary_f1(predicted: Pixels, true: Pixels, size: tuple[int, int]) -> tuple[float, float]:
    """(F1 with one-to-one matching, F1 dilated) of one class in one image; see Boundaries.

    predicted, true: (rows, columns) of boundary pixels; size: (H, W) of the image.
    (NaN, NaN) where the truth has no boundary.
    """
    num_predicted, num_true = len(predicted[0]), len(true[0])
    if not num_true:
        return math.nan, math.nan
    if not num_predicted:
        return 0.0, 0.0
    starts, partners = _near(predicted, true, size, TOLERANCE * math.hypot(*size))
    matched = _matched(starts, partners, num_true)
    vouched = int((np.diff(starts) > 0).sum()), len(np.unique(partners))
    return _f1(matched / num_predicted, matched / num_true), _f1(vouched[0] / num_predicted, vouched[1] / num_true)


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _near(one: Pixels, other: Pixels, size: tuple[int, int], distance: float) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels of `other` are no further than `distance` from each of `one`, as the rows of a CSR matrix.

    Returns (starts, partners): those of pixel i are partners[starts[i] : starts[i + 1]].
    """
    reach = int(distance)
    width = size[1] + 2 * reach
    numbers = np.full((size[0] + 2 * reach) * width, -1, dtype=np.int32)  # of each pixel of `other`
    numbers[(other[0] + reach) * width + other[1] + reach] = np.arange(len(other[0]), dtype=np.int32)
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    offsets = (dy * width + dx)[dy**2 + dx**2 <= distance**2]
    found = numbers[((one[0] + reach) * width + one[1] + reach)[:, None] + offsets]
    near = found >= 0
    return np.concatenate([[0], near.sum(axis=1).cumsum()]).astype(np.int32), found[near]


def _matched(starts: np.ndarray, partners: np.ndarray, num_true: int) -> int:
    """The size of the largest one-to-one matching, as the largest flow through pipes of width one.

    SciPy's maximum_bipartite_matching gives the same number, but takes seconds where nearly all can be matched.
    """
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]  # late: prediction does without
    from scipy.sparse.csgraph import maximum_flow  # type: ignore[import-untyped]

    num_predicted = len(starts) - 1
    # A source, the predicted pixels, the true ones, and a sink.
    sink = num_predicted + num_true + 1
    heads = np.concatenate(
        [np.arange(1, num_predicted + 1), partners + num_predicted + 1, np.full(num_true, sink)], dtype=np.int32
    )
    tails = np.concatenate(
        [[0], num_predicted + starts, num_predicted + starts[-1] + np.arange(1, num_true + 1), [len(heads)]],
        dtype=np.int32,
    )
    pipes = csr_matrix((np.ones(len(heads), dtype=np.int32), heads, tails), shape=(sink + 1, sink + 1))
    return int(maximum_flow(pipes, 0, sink, method="dinic").flow_value)


def _bands(prediction: np.ndarray, mask: np.ndarray, num_classes: int) -> np.ndarray:
    """(2, C): pixels in the band of a class in both maps, and in either; those that the mask ignores left out."""
    width = max(1, round(BAND * math.hypot(*mask.shape)))
    counts = np.zeros((2, num_classes), dtype=np.int64)
    in_band = [_in_band(labels, width) for labels in (prediction, mask)]
    both = in_band[0] & in_band[1] & (prediction == mask)
    for labels, inside, sign in ((prediction, in_band[0], 1), (mask, in_band[1], 1), (mask, both, -1)):
        counts[1] += sign * np.bincount(labels[inside], minlength=256)[:num_classes]
    counts[0] = np.bincount(mask[both], minlength=256)[:num_classes]
    return counts


def _in_band(labels: np.ndarray, width: int) -> np.ndarray:
    """(H, W) uint8 -> (H, W) bool: pixels from which another label, or the outside, is at most `width` steps away.

    A step goes to any of eight neighbours. As repeated erosion by 3x3 does, for all classes at once.
    """
    kernel = np.ones((2 * width + 1, 2 * width + 1), dtype=np.uint8)
    varied = cv2.dilate(labels, kernel) != cv2.erode(labels, kernel)  # outside the image nothing is compared
    varied[:width] = varied[-width:] = True
    varied[:, :width] = varied[:, -width:] = True
    return varied
