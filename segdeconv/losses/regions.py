"""Losses that measure the overlap of each class's predicted region with its true region."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from segdeconv.losses.base import ClassWeights, Loss, check_input, weights_buffer


class Dice(Loss):
    """Dice loss: mean over classes of 1 - (2 sum(p y) + smooth) / (sum(p) + sum(y) + smooth).

    p is the softmax and y the truth, 0 or 1. Milletari, Navab, Ahmadi 2016, section 3,
    https://arxiv.org/abs/1606.04797, without the squares and for several classes; the mean is weighted with the class
    weights. A batch in which every pixel is ignored has loss 0 and gradient 0.

    Args:
        classes: `present` averages over the classes that occur in the mask; `all` over all classes, so that
            predictions of an absent class are penalised.
        per_image: Compute the loss of each image and average over the images that have pixels to count; otherwise
            the sums run over the whole batch.
        smooth: Added to numerator and denominator.
        class_weights: One per class; None for equal weights.
        ignore_index: Mask value of ignored pixels.
    """

    weights: Tensor | None

    def __init__(
        self,
        *,
        classes: Literal["present", "all"] = "present",
        per_image: bool = False,
        smooth: Annotated[float, Field(ge=0)] = 1.0,
        class_weights: ClassWeights = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.classes, self.per_image, self.smooth, self.ignore_index = classes, per_image, smooth, ignore_index
        self.register_buffer("weights", weights_buffer(class_weights), persistent=False)

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            logits: (N, C, H, W).
            mask: Class indices or ignore_index, (N, H, W) int64.
        """
        check_input(logits, mask, class_weights=self.weights, ignore_index=self.ignore_index)
        valid = (mask != self.ignore_index)[:, None]
        labels = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
        truth = (mask[:, None] == labels) & valid  # (N, C, H, W)
        probabilities = logits.float().softmax(dim=1) * valid
        over = (2, 3) if self.per_image else (0, 2, 3)
        pixels = truth.sum(over).float()  # (N, C) or (C,), like everything below
        overlap, predicted = (probabilities * truth).sum(over), probabilities.sum(over)
        cost = 1 - (2 * overlap + self.smooth) / (predicted + pixels + self.smooth).clamp_min(1e-12)
        counted = pixels > 0 if self.classes == "present" else pixels.sum(-1, keepdim=True).expand_as(pixels) > 0
        return _mean_over_classes(cost, counted, self.weights)


class LovaszSoftmax(Loss):
    """Lovász-softmax loss: mean over the classes in the mask of the Lovász extension of 1 - IoU.

    It is a surrogate of the IoU that can be trained on. Berman, Triki, Blaschko 2018, section 3,
    https://arxiv.org/abs/1705.08790; computed over all pixels of the batch, without the classes that do not occur.
    With the errors e = |y - p| of one class in descending order, the loss is sum(e * g), where g is the increase of
    1 - IoU when a pixel becomes wrong after all pixels before it. The mean is weighted with the class weights. A batch
    in which every pixel is ignored has loss 0 and gradient 0.

    Args:
        class_weights: One per class; None for equal weights.
        ignore_index: Mask value of ignored pixels.
    """

    weights: Tensor | None

    def __init__(self, *, class_weights: ClassWeights = None, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.register_buffer("weights", weights_buffer(class_weights), persistent=False)

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            logits: (N, C, H, W).
            mask: Class indices or ignore_index, (N, H, W) int64.
        """
        check_input(logits, mask, class_weights=self.weights, ignore_index=self.ignore_index)
        counted = (mask != self.ignore_index).flatten().nonzero().squeeze(1)
        probabilities = logits.float().movedim(1, 0).flatten(1).index_select(1, counted).softmax(dim=0)  # (C, pixels)
        truth = mask.flatten().index_select(0, counted)
        cost = probabilities.sum(dim=1) * 0.0
        present = torch.bincount(truth, minlength=len(cost)) > 0
        by_class = probabilities.unbind()  # indexing in the loop would create C gradients of C classes each
        for label in present.nonzero().flatten().tolist():
            member = truth == label
            errors = torch.where(member, 1 - by_class[label], by_class[label])
            cost[label] = errors @ _gradient(errors.detach(), member)
        return _mean_over_classes(cost, present, self.weights)


def _gradient(errors: Tensor, member: Tensor) -> Tensor:
    """Return the increase of 1 - IoU at each pixel when pixels become wrong in order of descending error.

    A member of the class leaves the intersection; any other pixel joins the union. The increase has a closed form
    here, because the difference of neighbouring values of 1 - IoU, near 1 and a millionth apart in a large batch, is
    mostly rounding error in float32.

    Args:
        errors: (pixels,) float32, none negative.
        member: Whether each pixel is in the class, (pixels,) bool.

    Returns:
        (pixels,) float32.
    """
    # One integer holds a pixel's error (the bit patterns of non-negative floats are ordered like the floats), its
    # position and its membership. numpy sorts these on a CPU seven times as fast as torch sorts errors and positions.
    positions = torch.arange(len(errors), device=errors.device)
    keys = ((~errors.view(torch.int32)).long() << 32) | (positions << 1) | member
    if keys.device.type == "cpu":
        keys.numpy().sort()
    else:
        keys = keys.sort().values
    order, sorted_member = (keys & 0xFFFFFFFF) >> 1, keys & 1
    lost = sorted_member.cumsum(0)  # members that are wrong so far
    intersection = lost[-1:] - lost
    union = positions + 1 + intersection
    steps = torch.where(sorted_member > 0, 1.0 / union, intersection.float() / union / (union - 1).clamp_min(1))
    return torch.empty_like(errors).index_copy_(0, order, steps)


def _mean_over_classes(cost: Tensor, counted: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weighted mean of cost, ([N,] C), over the counted classes, then over the rows that have any."""
    factors = counted.float() if weights is None else counted * weights
    total = factors.sum(dim=-1)
    rows = (cost * factors).sum(dim=-1) / torch.where(total > 0, total, 1.0)
    return rows.sum() / (total > 0).sum().clamp_min(1)
