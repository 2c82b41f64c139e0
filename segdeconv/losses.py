"""Losses: modules from (logits, mask) to a scalar, none of which counts ignored pixels.

A mean over pixels is kept as a sum and its normaliser, because a batch may come in pieces (accumulated micro-batches,
several processes): the mean over the whole is the sum of the sums by the sum of the normalisers, and a mean of means
is another number wherever the pieces have unequal shares of ignored pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PixelLoss(nn.Module, ABC):
    """A loss that is a sum over pixels, divided by a normaliser. A subclass gives both.

    A loss that is none (one number from a whole map) can be any module from (logits, mask) to a scalar; the pieces of
    a batch are then averaged by their numbers of pixels.
    """

    @abstractmethod
    def sums(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """logits: (N, C, H, W); mask: (N, H, W) int64, class indices or ignore_index -> (sum, normaliser), scalars."""

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """logits: (N, C, H, W); mask: (N, H, W) int64, class indices or ignore_index -> the mean, a scalar."""
        total, normaliser = self.sums(logits, mask)
        return total / torch.where(normaliser > 0, normaliser, 1.0)


def loss_sums(loss: nn.Module, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, normaliser) of any loss; see PixelLoss."""
    if isinstance(loss, PixelLoss):
        return loss.sums(logits, mask)
    return loss(logits, mask) * mask.numel(), torch.tensor(float(mask.numel()), device=mask.device)


class CrossEntropy(PixelLoss):
    """Mean over the pixels that are not ignored of weight[class] * -log softmax.

    normalisation: what the weighted sum is divided by. `pixels`: the number of pixels that count, as Caffe's
        softmax loss does and so the published recipes; `weights`: the sum of their weights, as
        `torch.nn.functional.cross_entropy` does. The same without class weights; with them the gradient differs by
        the mean weight, which acts as another learning rate.

    A batch in which every pixel is ignored has loss 0 and gradient 0.

    >>> CrossEntropy()(torch.zeros(1, 4, 2, 2), torch.full((1, 2, 2), 255)).item()
    0.0
    """

    weights: Tensor | None

    def __init__(
        self,
        *,
        normalisation: Literal["pixels", "weights"] = "pixels",
        class_weights: Sequence[float] | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.normalisation = normalisation
        self.ignore_index = ignore_index
        weights = None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)
        # Not in the state dict: the weights are facts of the data, kept in the checkpoint's facts.
        self.register_buffer("weights", weights, persistent=False)

    def sums(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.float()  # the sum over a batch of pixels is beyond bfloat16
        total = F.cross_entropy(logits, mask, self.weights, ignore_index=self.ignore_index, reduction="sum")
        counts = mask != self.ignore_index
        if self.normalisation == "weights" and self.weights is not None:
            normaliser = (self.weights[mask.where(counts, 0)] * counts).sum()
        else:
            normaliser = counts.sum().to(total.dtype)
        return total, normaliser
