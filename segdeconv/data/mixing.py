"""One training image from two: part of another is pasted into it, with its labels.

What belongs together in one drive (its light, its houses, its cars) is torn apart, and a rare class is met in more
places than the images have of it.
"""

from typing import Literal

import numpy as np

from segdeconv.errors import UsageError
from segdeconv.system.seeding import key

Mix = Literal["classes", "box"]


class Mixing:
    """Which image is mixed with which, and what of it is pasted; drawn from (seed, epoch, index) alone.

    mix: `classes`, all pixels of half of the other image's classes, rounded up: ClassMix, Olsson et al. 2021, section
        3.1, https://arxiv.org/abs/2007.07936, with true masks in place of predicted ones. `box`, a rectangle of the
        image's own shape, of a tenth to a half of its area: CutMix, Yun et al. 2019, section 3.1,
        https://arxiv.org/abs/1905.04899.
    probability: that an image is mixed, 0..1.
    """

    def __init__(self, mix: Mix, probability: float, *, ignore_index: int, seed: int) -> None:
        self.mix, self.probability, self.ignore_index, self.seed = mix, probability, ignore_index, seed

    def partner(self, epoch: int, index: int, count: int) -> int | None:
        """The one of `count` images that this one is mixed with in this epoch, or None if it stays as it is."""
        random = np.random.default_rng(key(self.seed, "partner", epoch, index))
        return int(random.integers(count)) if random.random() < self.probability else None

    def pasted(self, mask: np.ndarray, epoch: int, index: int) -> np.ndarray:
        """mask: (H, W) uint8 of the partner -> (H, W) bool: which of its pixels are pasted."""
        random = np.random.default_rng(key(self.seed, "pasted", epoch, index))
        if self.mix == "classes":
            present = np.unique(mask[mask != self.ignore_index])
            return np.isin(mask, random.permutation(present)[: (len(present) + 1) // 2])
        side = np.sqrt(random.uniform(0.1, 0.5))
        height, width = (max(1, round(side * whole)) for whole in mask.shape)
        top, left = random.integers(mask.shape[0] - height + 1), random.integers(mask.shape[1] - width + 1)
        pasted = np.zeros(mask.shape, dtype=bool)
        pasted[top : top + height, left : left + width] = True
        return pasted

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, other: np.ndarray, labels: np.ndarray, epoch: int, index: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """image, other: (H, W, C); mask, labels: (H, W) uint8, of the image and of its partner -> image and mask."""
        if image.shape != other.shape:
            raise UsageError(
                f"dataset.mix={self.mix} needs training images of one size, and two of them are {image.shape[:2]} and "
                f"{other.shape[:2]} (HxW) - set dataset.size=[H,W] or dataset.crop=[H,W], or dataset.mix=none"
            )
        pasted = self.pasted(labels, epoch, index)
        return np.where(pasted[:, :, None], other, image), np.where(pasted, labels, mask)
