"""Losses that are a sum over pixels: cross entropy, focal loss and online hard example mining."""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from segdeconv.losses.base import ClassWeights, PixelLoss, check_input, weights_buffer


class CrossEntropy(PixelLoss):
    """Cross entropy: mean over the pixels that are not ignored of weight[class] * -log softmax.

    A batch in which every pixel is ignored has loss 0 and gradient 0.

    Args:
        normalisation: Divisor of the weighted sum. `pixels` is the number of pixels that are not ignored, as in
            Caffe's softmax loss and therefore in the published configs; `weights` is the sum of their weights, as in
            `torch.nn.functional.cross_entropy`. Without class weights both are the same; with them the gradients
            differ by the mean weight, which acts like another learning rate.
        label_smoothing: Fraction of each pixel's target that is spread evenly over all classes, each with its own
            weight, as in torch. Szegedy et al. 2016, section 7, https://arxiv.org/abs/1512.00567.
        class_weights: One per class; None for equal weights.
        ignore_index: Mask value of ignored pixels.

    Examples:
        >>> CrossEntropy()(torch.zeros(1, 4, 2, 2), torch.full((1, 2, 2), 255)).item()
        0.0
    """

    weights: Tensor | None

    def __init__(
        self,
        *,
        normalisation: Literal["pixels", "weights"] = "pixels",
        label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        class_weights: ClassWeights = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.normalisation, self.label_smoothing, self.ignore_index = normalisation, label_smoothing, ignore_index
        self.register_buffer("weights", weights_buffer(class_weights), persistent=False)

    def sums(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        check_input(logits, mask, class_weights=self.weights, ignore_index=self.ignore_index)
        total = F.cross_entropy(
            logits.float(),  # bfloat16 cannot hold the sum over the pixels of a batch
            mask,
            None if self.weights is None else self.weights.float(),  # in true half or double precision they are cast
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        valid = mask != self.ignore_index
        if self.normalisation == "weights" and self.weights is not None:
            normaliser = (self.weights[mask.where(valid, 0)] * valid).sum()
        else:
            normaliser = valid.sum().to(total.dtype)
        return total, normaliser


class Focal(PixelLoss):
    """Focal loss: mean of weight[class] * (1 - p)**gamma * -log p, where p is the softmax of the true class.

    The mean is over the pixels that are not ignored. Pixels that are already correct count less. Lin et al. 2017,
    section 3, https://arxiv.org/abs/1708.02002; the paper's alpha corresponds to the class weights.

    Args:
        gamma: 0 gives cross entropy; the paper uses 2.
        class_weights: One per class; None for equal weights.
        ignore_index: Mask value of ignored pixels.
    """

    weights: Tensor | None

    def __init__(
        self,
        *,
        gamma: Annotated[float, Field(ge=0)] = 2.0,
        class_weights: ClassWeights = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.gamma, self.ignore_index = gamma, ignore_index
        self.register_buffer("weights", weights_buffer(class_weights), persistent=False)

    def sums(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        check_input(logits, mask, class_weights=self.weights, ignore_index=self.ignore_index)
        valid = mask != self.ignore_index
        losses = F.cross_entropy(logits.float(), mask, ignore_index=self.ignore_index, reduction="none")
        # 1 - p without cancellation. The clamp blocks the infinite gradient of a power below 1 where p rounds to 1.
        error = (-torch.expm1(-losses)).clamp_min(1e-12)
        losses = error**self.gamma * losses  # cross entropy is 0 at ignored pixels, so this is too
        if self.weights is not None:
            losses = losses * self.weights[mask.where(valid, 0)]
        return losses.sum(), valid.sum().to(losses.dtype)


class OHEM(PixelLoss):
    """Online hard example mining (OHEM): cross entropy of the hardest pixels only.

    Shrivastava, Gupta, Girshick 2016, section 4, https://arxiv.org/abs/1604.03540, with pixels in place of regions. The
    hardest pixels are those whose true class has the lowest probability; they are selected in each batch of one
    process, without regard to the class weights. The weighted sum is divided by the number of selected pixels.

    Args:
        share: Minimum fraction of the pixels that are not ignored to select; pixels that tie with the easiest of them
            are selected too.
        threshold: Also select all pixels whose true class has a probability below this; None for no threshold.
        class_weights: One per class; None for equal weights.
        ignore_index: Mask value of ignored pixels.
    """

    weights: Tensor | None

    def __init__(
        self,
        *,
        share: Annotated[float, Field(gt=0, le=1)] = 0.25,
        threshold: Annotated[float, Field(gt=0, lt=1)] | None = None,
        class_weights: ClassWeights = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.share, self.threshold, self.ignore_index = share, threshold, ignore_index
        self.register_buffer("weights", weights_buffer(class_weights), persistent=False)

    def sums(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        check_input(logits, mask, class_weights=self.weights, ignore_index=self.ignore_index)
        valid = mask != self.ignore_index
        losses = F.cross_entropy(logits.float(), mask, ignore_index=self.ignore_index, reduction="none")
        candidates = losses.detach()[valid]
        selected = valid
        if len(candidates):
            easiest = candidates.topk(math.ceil(self.share * len(candidates)), sorted=False).values.min()
            selected = valid & (losses >= easiest)
            if self.threshold is not None:
                selected |= valid & (losses > -math.log(self.threshold))
        if self.weights is not None:
            losses = losses * self.weights[mask.where(valid, 0)]
        return (losses * selected).sum(), selected.sum().to(losses.dtype)
