"""Small pictures of what a network predicted, and the choice of those that a page shows."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from segdeconv.classes import Classes
from segdeconv.drawing import draw

SIDE = 480  # pixels of the longer side of a kept picture, at most
EACH = 8  # images of each kind: the best, the median, the worst


class Kept(NamedTuple):
    """What is kept of one image, encoded: its prediction without loss, its uncertainty as a JPEG of roots."""

    prediction: np.ndarray
    uncertainty: np.ndarray


class Gallery:
    """Predictions and uncertainties of a whole split, small: about 15 kB an image of 360x480.

    Which images are the worst is known when all are scored; predicting those again would, with samples, draw others.

    top: the largest uncertainty that can be.
    """

    def __init__(self, classes: Classes, top: float) -> None:
        self.classes, self.top = classes, top
        self.kept: list[Kept] = []

    def update(self, prediction: np.ndarray, uncertainty: np.ndarray) -> None:
        """prediction: (H, W) uint8; uncertainty: (H, W) float32, 0..top."""
        size = small(prediction.shape)
        labels = cv2.resize(prediction, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        # Roots, since most pixels are far more certain than can be.
        roots = np.sqrt((uncertainty / self.top).clip(0, 1))
        grey = (255 * cv2.resize(roots, size[::-1], interpolation=cv2.INTER_AREA)).round().astype(np.uint8)
        self.kept.append(Kept(cv2.imencode(".png", labels)[1], cv2.imencode(".jpg", grey)[1]))

    def prediction(self, index: int) -> np.ndarray:
        """(h, w) uint8 class indices."""
        return _decoded(self.kept[index].prediction)

    def uncertainty(self, index: int) -> np.ndarray:
        """(h, w) float32, of 0..top."""
        roots = _decoded(self.kept[index].uncertainty).astype(np.float32) / 255
        return self.top * roots**2


def _decoded(content: np.ndarray) -> np.ndarray:
    found = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    assert found is not None, "it was encoded here"
    return found


def small(shape: tuple[int, ...]) -> tuple[int, int]:
    """(h, w) of a picture of an (H, W) image: no side longer than SIDE, the same proportions.

    >>> small((720, 960)), small((1, 1)), small((1, 2000))
    ((360, 480), (1, 1), (1, 480))
    """
    factor = min(1.0, SIDE / max(shape[:2]))
    return max(1, round(factor * shape[0])), max(1, round(factor * shape[1]))


def smaller(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An image of any kind that `draw.shown` takes, and its mask, as pictures: (h, w, 3) and (h, w), both uint8."""
    size = small(mask.shape)
    picture = cv2.resize(draw.shown(image), size[::-1], interpolation=cv2.INTER_AREA)
    return picture, cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


class Choice(NamedTuple):
    """An image by its place in the data set, why it is shown (`worst`, `median`, `best`; `all` where all are), and its
    rank, 1 the worst.
    """

    place: int
    kind: str
    rank: int


def choose(scores: Sequence[float | None], each: int = EACH) -> list[Choice]:
    """The worst, the median and the best of scored images, each once, the worst first; those without a score never,
    unless all are shown.

    >>> [choice.place for choice in choose([0.5, 0.1, None, 0.9, 0.7], each=1)]
    [1, 0, 3]
    """
    scored = sorted((score, index) for index, score in enumerate(scores) if score is not None)
    order = [index for _, index in scored]
    if len(scores) <= 3 * each:
        order += [index for index, score in enumerate(scores) if score is None]
        return [Choice(index, "all", place + 1) for place, index in enumerate(order)]
    middle = max(0, (len(order) - each) // 2)
    kinds = {
        **dict.fromkeys(range(middle, min(middle + each, len(order))), "median"),
        **dict.fromkeys(range(max(0, len(order) - each), len(order)), "best"),
        **dict.fromkeys(range(min(each, len(order))), "worst"),
    }
    return [Choice(order[place], kind, place + 1) for place, kind in sorted(kinds.items())]
