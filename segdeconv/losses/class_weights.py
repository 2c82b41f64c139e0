"""Class weights computed from pixel counts, so that rare classes count in the loss."""

from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from segdeconv.errors import UsageError, did_you_mean

# Published in the training files of the original authors, one per label in their order. They cannot be reproduced
# exactly from the published labels: SignSymbol differs by a factor of 2.7.
PRESETS: dict[str, tuple[float, ...]] = {
    "camvid": (0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826, 9.6446, 1.8418, 0.6823, 6.2478, 7.3614),
    "sunrgbd": (
        0.382592, 0.447844, 0.634237, 0.375678, 0.582794, 0.476692, 0.776787, 0.980661, 1.020118, 0.623396, 2.596563,
        0.974491, 0.920240, 0.663878, 1.173357, 0.861062, 0.919955, 2.147320, 1.190958, 1.164314, 1.854754, 1.446550,
        2.853078, 0.768276, 1.651721, 4.456313, 2.205633, 1.116695, 2.781543, 0.705917, 4.005834, 2.208329, 0.967071,
        1.475710, 5.347752, 0.745528, 4.017548,
    ),
}  # fmt: skip


def median_frequency(pixels: Sequence[int], image_pixels: Sequence[int]) -> list[float]:
    """Return class weights by median frequency balancing: weight(c) = median of all freq / freq(c).

    Eigen & Fergus 2015, section 6.3.2, https://arxiv.org/abs/1411.4734: freq(c) is the number of pixels of class c
    divided by the number of pixels of all images in which c occurs. A class without pixels gets weight 0.

    To include the ignored pixels in the median, as the published weights do, append them as a last entry and drop its
    weight.

    Args:
        pixels: Number of pixels of each class.
        image_pixels: For each class, number of pixels of all images in which it occurs, including ignored pixels.

    Examples:
        >>> median_frequency([50, 25, 25], [100, 100, 50])
        [1.0, 2.0, 1.0]
    """
    present = np.asarray(pixels) > 0
    frequency = np.asarray(pixels, dtype=np.float64) / np.maximum(image_pixels, 1)
    weights = np.zeros(len(frequency))
    if present.any():
        weights[present] = np.median(frequency[present]) / frequency[present]
    return [float(weight) for weight in weights]


def inverse_frequency(pixels: Sequence[int], image_pixels: Sequence[int]) -> list[float]:
    """Return class weights by inverse frequency: weight(c) = 1 / (number of classes present * fraction of c).

    Every class present then has the same total weight. A class without pixels gets weight 0.

    Args:
        pixels: Number of pixels of each class.
        image_pixels: Unused; makes the signature that of `median_frequency`.

    Examples:
        >>> inverse_frequency([75, 25], [100, 100])
        [0.6666666666666666, 2.0]
    """
    counts = np.asarray(pixels, dtype=np.float64)
    present = counts > 0
    weights = np.zeros(len(counts))
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return [float(weight) for weight in weights]


FORMULAS: dict[str, Callable[[Sequence[int], Sequence[int]], list[float]]] = {
    "median_frequency": median_frequency,
    "inverse_frequency": inverse_frequency,
}


def class_weights(
    pixels: Sequence[int],
    image_pixels: Sequence[int],
    *,
    class_weighting: str = "none",
    class_weighting_power: Annotated[float, Field(gt=0, le=1)] = 1.0,
) -> list[float] | None:
    """Return the class weights selected by `loss.class_weighting=NAME`, or None for `none`.

    Args:
        pixels: Number of pixels of each class.
        image_pixels: For each class, number of pixels of all images in which it occurs, including ignored pixels.
        class_weighting: `none`, the name of a formula, or the name of a published preset.
        class_weighting_power: Exponent on the weights. Full weights improve rare classes at the price of false
            positives; 0.5 halves the range of the weights on a logarithmic scale.

    Raises:
        UsageError: The name is unknown, or a preset has another number of classes.
    """
    if class_weighting == "none":
        return None
    if class_weighting not in FORMULAS and class_weighting not in PRESETS:
        choices = ["none", *FORMULAS, *PRESETS]
        raise UsageError(
            f"loss.class_weighting={class_weighting} is unknown - {did_you_mean(class_weighting, choices)}"
        )
    formula = FORMULAS.get(class_weighting)
    weights = list(PRESETS[class_weighting]) if formula is None else formula(pixels, image_pixels)
    if len(weights) != len(pixels):
        raise UsageError(
            f"loss.class_weighting={class_weighting} has {len(weights)} weights, but the data set has {len(pixels)} "
            "classes - use loss.class_weighting=median_frequency to compute the weights"
        )
    return [weight**class_weighting_power for weight in weights]
