"""Thumbnails of predictions, and the choice of images that a page shows."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from segdeconv.classes import Classes
from segdeconv.drawing import draw

SIDE = 480  # maximum length of the longer side of a thumbnail, in pixels
EACH = 8  # images of each kind: worst, median, best


class Encoded(NamedTuple):
    """The encoded thumbnails of one image.

    Attributes:
        prediction: PNG file as uint8 bytes.
        uncertainty: JPEG file of the square roots, as uint8 bytes.
    """

    prediction: np.ndarray
    uncertainty: np.ndarray


class Gallery:
    """Thumbnails of the predictions and uncertainties of a split, about 15 kB for an image of 360x480.

    All images are stored, because the worst ones are only known at the end, and because predicting them again with
    dropout samples would give other results.

    Args:
        classes: The classes.
        top: The largest possible uncertainty.
    """

    def __init__(self, classes: Classes, top: float) -> None:
        self.classes, self.top = classes, top
        self.images: list[Encoded] = []

    def update(self, prediction: np.ndarray, uncertainty: np.ndarray) -> None:
        """Add the next image.

        Args:
            prediction: (H, W) uint8 class indices.
            uncertainty: (H, W) float32, 0..top.
        """
        labels = smaller_labels(prediction)
        # Square roots, because most uncertainties are far below the maximum.
        roots = np.sqrt((uncertainty / self.top).clip(0, 1))
        grey = (255 * cv2.resize(roots, labels.shape[::-1], interpolation=cv2.INTER_AREA)).round().astype(np.uint8)
        self.images.append(Encoded(cv2.imencode(".png", labels)[1], cv2.imencode(".jpg", grey)[1]))

    def prediction(self, index: int) -> np.ndarray:
        """Return the prediction of an image as (h, w) uint8 class indices."""
        return _decoded(self.images[index].prediction)

    def uncertainty(self, index: int) -> np.ndarray:
        """Return the uncertainty of an image as (h, w) float32, 0..top."""
        roots = _decoded(self.images[index].uncertainty).astype(np.float32) / 255
        return self.top * roots**2


def _decoded(content: np.ndarray) -> np.ndarray:
    decoded = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    assert decoded is not None, "it was encoded by Gallery.update"
    return decoded


def thumbnail_size(shape: tuple[int, ...], side: int = SIDE) -> tuple[int, int]:
    """Return the size (h, w) of the thumbnail of an (H, W) image, with the same proportions and at most `side`.

    Examples:
        >>> thumbnail_size((720, 960)), thumbnail_size((1, 1)), thumbnail_size((1, 2000))
        ((360, 480), (1, 1), (1, 480))
    """
    factor = min(1.0, side / max(shape[:2]))
    return max(1, round(factor * shape[0])), max(1, round(factor * shape[1]))


def smaller(image: np.ndarray, mask: np.ndarray, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Reduce an image and its mask to thumbnails.

    Args:
        image: (H, W, C) image, as in `draw.to_rgb`.
        mask: (H, W) uint8.
        side: Maximum length of the longer side.

    Returns:
        The image, (h, w, 3) uint8, and the mask, (h, w) uint8.
    """
    size = thumbnail_size(mask.shape, side)
    picture = cv2.resize(draw.to_rgb(image), size[::-1], interpolation=cv2.INTER_AREA)
    return picture, smaller_labels(mask, side)


def smaller_labels(labels: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Reduce (H, W) uint8 labels to a thumbnail by taking the nearest pixels."""
    size = thumbnail_size(labels.shape, side)
    return cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


class Choice(NamedTuple):
    """An image that a page shows.

    Attributes:
        place: Index of the image in the data set.
        kind: `worst`, `median` or `best`; `all` if all images are shown.
        rank: Rank of its score; 1 is the worst.
    """

    place: int
    kind: str
    rank: int


def choose(scores: Sequence[float | None], each: int = EACH) -> list[Choice]:
    """Choose the worst, the median and the best images by their scores.

    If there are few images, all are chosen. Otherwise images without a score are not.

    Args:
        scores: Score of every image, None for an image without one.
        each: Number of images of each kind.

    Returns:
        The images, each once, ordered from the worst to the best; images without a score come last.

    Examples:
        >>> [choice.place for choice in choose([0.5, 0.1, None, 0.9, 0.7], each=1)]
        [1, 0, 3]
    """
    scored = sorted((score, index) for index, score in enumerate(scores) if score is not None)
    order = [index for _, index in scored]
    if len(scores) <= 3 * each:
        order += [index for index, score in enumerate(scores) if score is None]
        return [Choice(index, "all", rank) for rank, index in enumerate(order, start=1)]
    middle = max(0, (len(order) - each) // 2)
    kinds = {
        **dict.fromkeys(range(middle, min(middle + each, len(order))), "median"),
        **dict.fromkeys(range(max(0, len(order) - each), len(order)), "best"),
        **dict.fromkeys(range(min(each, len(order))), "worst"),
    }
    return [Choice(order[position], kind, position + 1) for position, kind in sorted(kinds.items())]
