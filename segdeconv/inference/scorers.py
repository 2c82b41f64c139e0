"""From scores to labels, and functions of one type, image batch -> class scores, that wrap each other."""

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

# (N, C, H, W) normalised images -> (N, K, H, W) scores: logits, or anything whose largest channel wins.
Scorer = Callable[[Tensor], Tensor]


class ClassScores(NamedTuple):
    """Class scores of a batch of images, or of a part of one image.

    Attributes:
        values: (N, K, H, W), logits, or probabilities if `is_probability`.
        is_probability: whether softmax has been taken.
        uncertainty: (N, H, W) float32, the variance over dropout samples, averaged over the classes; None without.
        information: (N, H, W) float32, the mutual information of dropout samples, in nats; None without.
    """

    values: Tensor
    is_probability: bool
    uncertainty: Tensor | None = None
    information: Tensor | None = None

    def probabilities(self) -> Tensor:
        """Class probabilities, (N, K, H, W); float32 where softmax is taken here."""
        return self.values if self.is_probability else self.values.float().softmax(dim=1)

    def of_image(self, index: int, size: tuple[int, int]) -> ClassScores:
        """The scores of one image of the batch, resized to (H, W): N is 1."""
        part = slice(index, index + 1)
        maps = (None if map_ is None else resized(map_[part, None], size)[:, 0] for map_ in self[2:])
        return ClassScores(resized(self.values[part], size), self.is_probability, *maps)


# (an image (H, W, C) as stored, its name) -> its scores at its own size, in parts that cover it once. Prediction in
# tiles, by regions, with two networks and refined by a CRF are such functions, and some wrap others.
Predictor = Callable[[np.ndarray, str], Iterator[tuple[Part, ClassScores]]]


def with_padding(scorer: Scorer, minimum: int) -> Scorer:
    """Pad images smaller than the network takes below and right, and cut the scores back."""

    def score(image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        below, right = max(0, minimum - height), max(0, minimum - width)
        if below or right:
            # Zeros are the mean colour after normalisation.
            image = F.pad(image, (0, right, 0, below))
        return scorer(image)[..., :height, :width]

    return score


def with_flip(scorer: Scorer) -> Scorer:
    """Average the softmax over the image and its mirror image, turned back."""

    def score(image: Tensor) -> Tensor:
        straight = scorer(image).float().softmax(dim=1)
        mirrored = scorer(image.flip(-1)).float().softmax(dim=1).flip(-1)
        return (straight + mirrored) / 2

    return score


def with_oom_fallback(scorer: Scorer) -> Scorer:
    """Score a batch in halves where memory runs out."""

    def score(image: Tensor) -> Tensor:
        try:
            return scorer(image)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        # Out here, since the error holds what was computed until then.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(image) > 1:
            return torch.cat([score(half) for half in image.chunk(2)])
        height, width = image.shape[-2:]
        raise UsageError(
            f"memory ran out on one image of {height}x{width} - give a smaller dataset.size=[H,W], or a machine with "
            "more"
        )

    return score


def resized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (N, C, h, w) scores to (N, C, *size), bilinearly; unchanged where the size is theirs."""
    if tuple(scores.shape[-2:]) == tuple(size):
        return scores
    return F.interpolate(scores.float(), size=size, mode="bilinear", align_corners=False)


def labels(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) scores -> (N, *size) uint8 class indices; scores are resized, labels never."""
    # Not argmax, which takes up to 4 times as long on a CPU; of equal scores both take the first.
    return resized(scores, size).max(dim=1).indices.to(torch.uint8)


def labels_and_confidence(scores: ClassScores) -> tuple[Tensor, Tensor]:
    """(N, H, W) uint8 class indices, and (N, H, W) float32 their probabilities."""
    top, index = scores.values.float().max(dim=1)
    if not scores.is_probability:
        top = 1 / (scores.values - top[:, None]).exp_().sum(dim=1)
    return index.to(torch.uint8), top


def entropy(scores: ClassScores) -> Tensor:
    """(N, H, W) float32: the entropy of the class probabilities of each pixel, in nats."""
    values = scores.values.float()
    if scores.is_probability:
        return entropy_of(values)
    # The logarithm of a sum in place of one for every class.
    below = values - values.max(dim=1, keepdim=True).values
    weights = below.exp()
    total = weights.sum(dim=1)
    return (total.log() - below.mul_(weights).sum(dim=1) / total).clamp_(min=0)


def entropy_of(probabilities: Tensor) -> Tensor:
    """(N, K, H, W) probabilities -> (N, H, W) their entropy, in nats."""
    return torch.special.entr(probabilities).sum(dim=1)
