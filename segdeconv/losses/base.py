"""What every loss is: a module from (logits, mask) to a scalar.

A mean over pixels is kept as a sum and its normaliser, because a batch may come in pieces (accumulated micro-batches,
several processes): the mean over the whole is the sum of the sums by the sum of the normalisers, and a mean of means
is another number wherever the pieces have unequal shares of ignored pixels.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
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


class LogitAdjusted(PixelLoss):
    """Any loss, of logits to which `logit_adjustment * log weight` of each class is added.

    With class weights a network predicts weight * p in place of p: rare classes are learned early, and predicted where
    they are not. The adjustment keeps what is learned, but the network's own scores are weight**(1 - logit_adjustment)
    * p: 0 keeps the weights in its scores, 1 removes them. Menon et al. 2021, section 4,
    https://arxiv.org/abs/2007.07314, with weights in place of their priors.

    loss: has the same class weights. A class of weight 0 is left as it is.
    """

    shift: Tensor

    def __init__(
        self,
        loss: nn.Module,
        *,
        logit_adjustment: Annotated[float, Field(ge=0, le=1)] = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.loss = loss
        shift = [logit_adjustment * math.log(weight) if weight else 0.0 for weight in class_weights or [1.0]]
        self.register_buffer("shift", weights_buffer(shift), persistent=False)

    def sums(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return loss_sums(self.loss, logits.float() + self.shift[:, None, None], mask)


def loss_sums(loss: nn.Module, logits: Tensor | Sequence[Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, normaliser) of any loss; see PixelLoss. Of several maps of logits for one mask, those of all together."""
    if not isinstance(logits, Tensor):
        total, normaliser = torch.stack([torch.stack(loss_sums(loss, one, mask)) for one in logits]).sum(dim=0)
        return total, normaliser
    if isinstance(loss, PixelLoss):
        return loss.sums(logits, mask)
    return loss(logits, mask) * mask.numel(), torch.tensor(float(mask.numel()), device=mask.device)


def weights_buffer(class_weights: Sequence[float] | None) -> Tensor | None:
    """Class weights as a tensor to register as a buffer, not in the state dict: they are facts of the data, kept in
    the checkpoint's facts.
    """
    return None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)
