"""Losses: modules from (logits, mask) to a scalar, none of which counts ignored pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossEntropy(nn.Module):
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

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """logits: (N, C, H, W); mask: (N, H, W) int64, class indices or ignore_index."""
        logits = logits.float()  # the sum over a batch of pixels is beyond bfloat16
        total = F.cross_entropy(logits, mask, self.weights, ignore_index=self.ignore_index, reduction="sum")
        counts = mask != self.ignore_index
        if self.normalisation == "weights" and self.weights is not None:
            normaliser = (self.weights[mask.where(counts, 0)] * counts).sum()
        else:
            normaliser = counts.sum().to(total.dtype)
        return total / torch.where(normaliser > 0, normaliser, 1.0)
