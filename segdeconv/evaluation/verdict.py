"""The verdict on a network: its scores beside those of a constant prediction, in plain sentences."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from segdeconv.classes import Classes
from segdeconv.evaluation.metrics import Scores, scores, scores_of

FEW_IMAGES = 30  # with fewer, single images change the scores by points
MIN_GAIN = 0.001  # of the mean IoU; a smaller gain would be printed as +0.0 points
BACKGROUND = "background"


class Verdict(NamedTuple):
    """Whether a network is better than predicting one class everywhere, and on what this was measured.

    Attributes:
        better: Whether its mean IoU is higher than that of the constant prediction; None if they cannot be compared.
        sentence: The comparison as one sentence.
        details: Further sentences: the foreground of two classes or the worst class, the images of the measurement.
    """

    better: bool | None
    sentence: str
    details: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.sentence}\n{' '.join(self.details)}".rstrip()


@dataclass(frozen=True)
class Overlap:
    """The images of an evaluation that training has used.

    Attributes:
        num_images: The number of images or crops that were scored.
        trained_on: How many of them the network was trained on; None if that is unknown.
        selected: Whether all of them selected the best checkpoint of the run.
    """

    num_images: int
    trained_on: int | None = None
    selected: bool = False

    def sentence(self, split: str | None) -> str:
        """Return what this means for new images as a sentence; empty if it means nothing."""
        if self.trained_on:
            part = "them" if self.trained_on == self.num_images else f"{self.trained_on} of them"
            return f"The network was trained on {part}, so new images score lower."
        if self.selected:
            return f"{split} also selects the best checkpoint of a run, so new images tend to score lower."
        return ""

    def part_of(self, split: str) -> str:
        """Return the images that the network was trained on as text."""
        return split if self.trained_on == self.num_images else f"{self.trained_on} images of {split}"


def constant_prediction(confusion: np.ndarray) -> tuple[int, Scores]:
    """Return the most frequent class of the ground truth, and the scores of predicting it for every pixel.

    Args:
        confusion: (C, C) pixel counts, rows = ground truth, columns = prediction.

    Examples:
        >>> commonest, baseline = constant_prediction(np.array([[2, 4], [1, 1]]))  # 6 and 2 pixels in the ground truth
        >>> commonest, baseline.miou, baseline.pixel_accuracy  # IoU 6/8 and 0
        (0, 0.375, 0.75)
    """
    truth = confusion.sum(axis=1)
    commonest = int(truth.argmax())
    chosen = np.arange(len(truth)) == commonest
    return commonest, scores_of(truth * chosen, truth, truth.sum() * chosen)


def foreground(classes: Classes) -> int | None:
    """Return the index of the foreground of two classes: the second, unless it is called background; else None."""
    if len(classes) != 2:
        return None
    return 0 if classes.names[1].casefold() == BACKGROUND else 1


def verdict(
    confusion: np.ndarray,
    classes: Classes,
    *,
    num_images: int,
    split: str | None = None,
    overlap: Overlap | None = None,
) -> Verdict:
    """Compare a network with the constant prediction of the most frequent class.

    Args:
        confusion: (C, C) pixel counts of the network, rows = ground truth, columns = prediction.
        classes: The classes of the confusion matrix.
        num_images: The number of images.
        split: The split they are from, if known.
        overlap: Which of them training has used, if known.
    """
    measured = _measured(num_images, split, overlap)
    if not confusion.any():
        return Verdict(None, "Nothing could be scored: every pixel of the masks is ignored.", measured)
    result = scores(confusion)
    commonest, baseline = constant_prediction(confusion)
    details = (*_of_classes(result, classes), *measured)
    miou = f"mean IoU {_percent(result.miou)}"
    if np.count_nonzero(result.pixels) == 1:
        name = classes.names[commonest]
        text = f"The masks contain only '{name}', so the scores do not show whether the network tells classes apart"
        return Verdict(None, f"{text}: {miou}.", measured)
    constant = f"predicting '{classes.names[commonest]}' everywhere"
    against = f"against {_percent(baseline.miou)}"
    predicted = np.flatnonzero(confusion.sum(axis=0))
    if len(predicted) == 1:
        name = classes.names[predicted[0]]
        text = f"The network predicts '{name}' for every pixel: {miou}"
        return Verdict(False, f"{text}{'' if predicted[0] == commonest else f' {against} of {constant}'}.", details)
    if result.miou - baseline.miou < MIN_GAIN:
        return Verdict(False, f"Not better than {constant}: {miou} {against}.", details)
    text = f"Better than {constant}: {miou} {against} ({100 * (result.miou - baseline.miou):+.1f} points)"
    if result.pixel_accuracy < baseline.pixel_accuracy:
        fewer = f"{_percent(result.pixel_accuracy)} against {_percent(baseline.pixel_accuracy)}"
        text += f", though fewer pixels are correct ({fewer})"
    return Verdict(True, f"{text}.", details)


def _of_classes(result: Scores, classes: Classes) -> tuple[str, ...]:
    """Return a sentence about the foreground of two classes, or else about the worst class."""
    index = foreground(classes)
    if index is not None:
        if index in result.absent:
            return ()
        return (f"'{classes.names[index]}': IoU {_percent(result.iou[index])}, Dice {_percent(result.dice[index])}.",)
    worst = int(
        np.nanargmin(np.where(result.pixels > 0, result.iou, np.nan))
    )  # a class without pixels scores 0 at most
    return (f"Worst class: '{classes.names[worst]}', IoU {_percent(result.iou[worst])}.",)


def _measured(num_images: int, split: str | None, overlap: Overlap | None) -> tuple[str, ...]:
    images = f"{num_images} image{'' if num_images == 1 else 's'}{f' of {split}' if split else ''}"
    few = num_images < FEW_IMAGES
    size = f"Measured on only {images}, so the scores are rough." if few else f"Measured on {images}."
    return tuple(filter(None, (size, overlap.sentence(split) if overlap else "")))


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
