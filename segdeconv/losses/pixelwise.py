"""Losses that are a sum over pixels: cross entropy, and two that listen to hard pixels more."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from segdeconv.losses.base import PixelLoss, weights_buffer


class CrossEntropy(PixelLoss):
    """Mean over the pixels that are not ignored of weight[class] * -log softmax.

    normalisation: what the weighted sum is divided by. `pixels`: the number of pixels that count, as Caffe's
        softmax loss does and so the published configs; `weights`: the sum of their weights, as
        `torch.nn.functional.cross_entropy` does. The same without class weights; with them the gradient differs by
        the mean weight, which acts as another learning rate.
    label_smoothing: share of each pixel's truth that is spread evenly over all classes, each with its own weight, as
        torch does it. Szegedy et al. 2016, section 7, https://arxiv.org/abs/1512.00567.

    A batch in which every pixel is ignored has loss 0 and gradient 0.

    >>> CrossEntropy()(torch.zeros(1, 4, 2, 2), torch.full((1, 2, 2), 255)).item()
    0.0
    """

    weights: Tensor | None

    def __init__(
        self,
        *,
        normalisation: Literal["pixels", "weights"] = "pixels",
        label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        class_weights: Sequence[float] | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.normalisation, self.label_smoothing, self.ignore_index = normalisation, label_smoothing, ignore_index
        self.register_buffer("weights", weights_buffer(class_weights), persistent=False)

    def sums(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        total = F.cross_entropy(
            logits.float(),  # the sum over a batch of pixels is beyond bfloat16
            mask,
            self.weights,
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        counts = mask != self.ignore_index
        if self.normalisation == "weights" and self.weights is not None:
            normaliser = (self.weights[mask.where(counts, 0)] * counts).sum()
        else:
            normaliser = counts.sum().to(total.dtype)
        return total, normaliser


class Focal(PixelLoss):
    """Mean over the pixels that are not ignored of weight[class] * (1 - p)**gamma * -log p, p the true class's softmax.

    Pixels that are right already count less. Lin et al. 2017, section 3, https://arxiv.org/abs/1708.02002; their
    alpha is the class weights here.

    gamma: 0 is cross entropy, 2 the paper's choice.
    """

    weights: Tensor | None

    def __init__(
        self,
        *,
        gamma: Annotated[float, Field(ge=0)] = 2.0,
        class_weights: Sequence[float] | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.gamma, self.ignore_index = gamma, ignore_index
        self.register_buffer("weights", weights_buffer(class_weights), persistent=False)

    def sums(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        counts = mask != self.ignore_index
        surprise = F.cross_entropy(logits.float(), mask, ignore_index=self.ignore_index, reduction="none")
        # 1 - p without cancellation. Where p rounds to 1 a power below 1 has no slope: the clamp passes none on.
        doubt = (-torch.expm1(-surprise)).clamp_min(1e-12)
        each = doubt**self.gamma * surprise  # 0 where ignored, as surprise is
        if self.weights is not None:
            each = each * self.weights[mask.where(counts, 0)]
        return each.sum(), counts.sum().to(each.dtype)


class OHEM(PixelLoss):
    """Cross entropy of the hardest pixels alone: online hard example mining.

    Shrivastava, Gupta, Girshick 2016, section 4, https://arxiv.org/abs/1604.03540, with pixels for their regions. The
    hardest are those whose true class has the lowest probability; they are looked for in each batch of one process.

    share: of the pixels that are not ignored, how many are kept at least; pixels as hard as the last one too.
    threshold: all pixels whose true class has a lower probability than this are kept as well.

    The weighted sum is divided by the number of pixels kept. Class weights do not take part in the choice.
    """

    weights: Tensor | None

    def __init__(
        self,
        *,
        share: Annotated[float, Field(gt=0, le=1)] = 0.25,
        threshold: Annotated[float, Field(gt=0, lt=1)] | None = None,
        class_weights: Sequence[float] | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.share, self.threshold, self.ignore_index = share, threshold, ignore_index
        self.register_buffer("weights", weights_buffer(class_weights), persistent=False)

    def sums(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        counts = mask != self.ignore_index
        surprise = F.cross_entropy(logits.float(), mask, ignore_index=self.ignore_index, reduction="none")
        seen = surprise.detach()[counts]
        kept = counts
        if len(seen):
            easiest = seen.topk(math.ceil(self.share * len(seen)), sorted=False).values.min()
            kept = counts & (surprise >= easiest)
            if self.threshold is not None:
                kept |= counts & (surprise > -math.log(self.threshold))
        each = surprise if self.weights is None else surprise * self.weights[mask.where(counts, 0)]
        return (each * kept).sum(), kept.sum().to(each.dtype)
