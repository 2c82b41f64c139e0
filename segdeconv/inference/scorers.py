"""Scorers, which map a batch of images to class scores and can wrap each other; class indices from scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segdeconv.errors import UsageError
from segdeconv.inference.tiling import Part
from segdeconv.system.memory import ran_out_of_memory

# (N, C, H, W) normalised images -> (N, K, H, W) scores: logits, or other values whose largest channel is predicted.
Scorer = Callable[[Tensor], Tensor]


class ClassScores(NamedTuple):
    """Class scores of a batch of images, or of a part of one image.

    Attributes:
        values: (N, K, H, W), logits, or probabilities if `is_probability`.
        is_probability: True if `values` are probabilities, False if they are logits.
        uncertainty: (N, H, W) float32, the variance over dropout samples, averaged over the classes; None without
            samples.
        information: (N, H, W) float32, the mutual information of dropout samples, in nats; None without samples.
    """

    values: Tensor
    is_probability: bool
    uncertainty: Tensor | None = None
    information: Tensor | None = None

    def probabilities(self) -> Tensor:
        """Return the class probabilities, (N, K, H, W); float32 if computed from logits."""
        return self.values if self.is_probability else self.values.float().softmax(dim=1)

    def of_image(self, index: int, size: tuple[int, int]) -> ClassScores:
        """Return the scores of one image of the batch (N = 1), resized to (H, W)."""
        part = slice(index, index + 1)
        maps = (None if map_ is None else resized(map_[part, None], size)[:, 0] for map_ in self[2:])
        return ClassScores(resized(self.values[part], size), self.is_probability, *maps)


# (an image (H, W, C) as stored, its name) -> its scores at its own size, in parts that cover it exactly once. There are
# predictors for tiles, regions, ensembles and CRFs; some of them wrap others.
Predictor = Callable[[np.ndarray, str], Iterator[tuple[Part, ClassScores]]]


def with_padding(scorer: Scorer, minimum: int) -> Scorer:
    """Return a scorer that pads images smaller than `minimum` at the bottom and right, and crops the scores again."""

    def score(image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        below, right = max(0, minimum - height), max(0, minimum - width)
        if below or right:
            # Zero is the mean colour after normalisation.
            image = F.pad(image, (0, right, 0, below))
        return scorer(image)[..., :height, :width]

    return score


def with_flip(scorer: Scorer) -> Scorer:
    """Return a scorer that averages the softmax over the image and its mirror image, mirrored back."""

    def score(image: Tensor) -> Tensor:
        straight = scorer(image).float().softmax(dim=1)
        mirrored = scorer(image.flip(-1)).float().softmax(dim=1).flip(-1)
        return (straight + mirrored) / 2

    return score


def with_oom_fallback(scorer: Scorer) -> Scorer:
    """Return a scorer that splits a batch into halves if memory runs out.

    Raises:
        UsageError: Memory runs out on a single image.
    """

    def score(image: Tensor) -> Tensor:
        try:
            return scorer(image)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        # Outside the except block, since the exception keeps the tensors of the failed pass alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(image) > 1:
            return torch.cat([score(half) for half in image.chunk(2)])
        height, width = image.shape[-2:]
        raise UsageError(
            f"memory ran out on one image of {height}x{width} - set a smaller dataset.size=[H,W], or use a machine "
            "with more memory"
        )

    return score


def resized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (N, C, h, w) scores to (N, C, *size) bilinearly; scores of that size are returned unchanged."""
    if tuple(scores.shape[-2:]) == tuple(size):
        return scores
    return F.interpolate(scores.float(), size=size, mode="bilinear", align_corners=False)


def labels(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the (N, *size) uint8 class indices of (N, C, h, w) scores; the scores are resized, never the indices."""
    # `argmax` takes up to 4 times as long on a CPU; of equal scores, both choose the first.
    return resized(scores, size).max(dim=1).indices.to(torch.uint8)


def labels_and_confidence(scores: ClassScores) -> tuple[Tensor, Tensor]:
    """Return (N, H, W) uint8 class indices and (N, H, W) float32 confidence, the probabilities of these classes."""
    top, index = scores.values.float().max(dim=1)
    if not scores.is_probability:
        top = 1 / (scores.values - top[:, None]).exp_().sum(dim=1)
    return index.to(torch.uint8), top


def entropy(scores: ClassScores) -> Tensor:
    """Return the entropy of each pixel's class probabilities in nats, (N, H, W) float32."""
    values = scores.values.float()
    if scores.is_probability:
        return entropy_of(values)
    # From logits, one logarithm per pixel suffices, instead of one per class.
    below = values - values.max(dim=1, keepdim=True).values
    weights = below.exp()
    total = weights.sum(dim=1)
    return (total.log() - below.mul_(weights).sum(dim=1) / total).clamp_(min=0)


def entropy_of(probabilities: Tensor) -> Tensor:
    """Return the entropy of (N, K, H, W) probabilities in nats, (N, H, W)."""
    return torch.special.entr(probabilities).sum(dim=1)
