"""Mixing of two training images: part of another image is pasted into an image, with its labels.

Mixing breaks up correlations within one recording (its light, its houses, its cars), and shows rare classes in more
contexts than the images contain.
"""

from typing import Literal

import numpy as np

from segdeconv.errors import UsageError
from segdeconv.system.seeding import key

Mix = Literal["classes", "box"]


class Mixing:
    """Random mixing of training images, which depends only on (seed, epoch, index).

    Args:
        mix: `classes` pastes all pixels of half of the other image's classes, rounded up: ClassMix, Olsson et al. 2021,
            section 3.1, https://arxiv.org/abs/2007.07936, with true masks in place of predicted ones. `box` pastes a
            rectangle with the aspect ratio of the image and a tenth to a half of its area: CutMix, Yun et al. 2019,
            section 3.1, https://arxiv.org/abs/1905.04899.
        probability: Probability that an image is mixed, 0..1.
        ignore_index: Index of ignored pixels, which `classes` never pastes.
        seed: Seed of the random draws.
    """

    def __init__(self, mix: Mix, probability: float, *, ignore_index: int, seed: int) -> None:
        self.mix, self.probability, self.ignore_index, self.seed = mix, probability, ignore_index, seed

    def partner(self, epoch: int, index: int, count: int) -> int | None:
        """Return the index, below `count`, of the image to mix an image with in this epoch, or None for no mixing."""
        random = np.random.default_rng(key(self.seed, "partner", epoch, index))
        return int(random.integers(count)) if random.random() < self.probability else None

    def pasted(self, mask: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """Return (H, W) bool, true for the pixels to paste, from the partner's (H, W) uint8 mask."""
        random = np.random.default_rng(key(self.seed, "pasted", epoch, index))
        if self.mix == "classes":
            present = np.unique(mask[mask != self.ignore_index])
            return np.isin(mask, random.permutation(present)[: (len(present) + 1) // 2])
        side = np.sqrt(random.uniform(0.1, 0.5))
        height, width = (max(1, round(side * length)) for length in mask.shape)
        top, left = random.integers(mask.shape[0] - height + 1), random.integers(mask.shape[1] - width + 1)
        pasted = np.zeros(mask.shape, dtype=bool)
        pasted[top : top + height, left : left + width] = True
        return pasted

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, other: np.ndarray, labels: np.ndarray, epoch: int, index: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Paste part of a partner into an image.

        Args:
            image: (H, W, C).
            mask: (H, W) uint8, of the image.
            other: (H, W, C), the partner.
            labels: (H, W) uint8, of the partner.
            epoch: Index of the epoch.
            index: Index of the image.

        Returns:
            The mixed image and mask.

        Raises:
            UsageError: The two images differ in size.
        """
        if image.shape != other.shape:
            raise UsageError(
                f"dataset.mix={self.mix} needs training images of the same size, but two of them are "
                f"{image.shape[:2]} and {other.shape[:2]} (HxW) - set dataset.size=[H,W] or dataset.crop=[H,W], or "
                "dataset.mix=none"
            )
        pasted = self.pasted(labels, epoch, index)
        return np.where(pasted[:, :, None], other, image), np.where(pasted, labels, mask)
