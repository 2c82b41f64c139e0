"""Losses that look at the region of each class as a whole: how it overlaps with the truth."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from segdeconv.losses.base import weights_buffer


class Dice(nn.Module):
    """Mean over classes of 1 - (2 sum(p y) + smooth) / (sum(p) + sum(y) + smooth): p softmax, y truth, 0 or 1.

    Milletari, Navab, Ahmadi 2016, section 3, https://arxiv.org/abs/1606.04797, without their squares and for several
    classes; the mean is weighted with the class weights.

    classes: `present`, those that occur in the mask; `all`, where a class that does not occur costs what is
        predicted of it.
    per_image: a value for each image, and their mean over the images in which a pixel counts; otherwise sums run over
        the whole batch.

    A batch in which every pixel is ignored has loss 0 and gradient 0.
    """

    weights: Tensor | None

    def __init__(
        self,
        *,
        classes: Literal["present", "all"] = "present",
        per_image: bool = False,
        smooth: Annotated[float, Field(ge=0)] = 1.0,
        class_weights: Sequence[float] | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.classes, self.per_image, self.smooth, self.ignore_index = classes, per_image, smooth, ignore_index
        self.register_buffer("weights", weights_buffer(class_weights), persistent=False)

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """logits: (N, C, H, W); mask: (N, H, W) int64, class indices or ignore_index -> a scalar."""
        counts = (mask != self.ignore_index)[:, None]
        labels = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
        truth = (mask[:, None] == labels) & counts  # (N, C, H, W)
        probabilities = logits.float().softmax(dim=1) * counts
        over = (2, 3) if self.per_image else (0, 2, 3)
        pixels = truth.sum(over).float()  # (N, C) or (C,), as everything below
        overlap, predicted = (probabilities * truth).sum(over), probabilities.sum(over)
        cost = 1 - (2 * overlap + self.smooth) / (predicted + pixels + self.smooth).clamp_min(1e-12)
        heard = pixels > 0 if self.classes == "present" else pixels.sum(-1, keepdim=True).expand_as(pixels) > 0
        return _mean_over_classes(cost, heard, self.weights)


class LovaszSoftmax(nn.Module):
    """Mean over the classes in the mask of the Lovász extension of 1 - IoU: the IoU, made smooth to train on.

    Berman, Triki, Blaschko 2018, section 3, https://arxiv.org/abs/1705.08790; over all pixels of the batch, classes
    that do not occur left out. With errors e = |y - p| of one class sorted from the largest, the loss is sum(e * g),
    where g is what each pixel adds to 1 - IoU if all before it are wrong and it becomes wrong too. The mean is
    weighted with the class weights.

    A batch in which every pixel is ignored has loss 0 and gradient 0.
    """

    weights: Tensor | None

    def __init__(self, *, class_weights: Sequence[float] | None = None, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.register_buffer("weights", weights_buffer(class_weights), persistent=False)

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """logits: (N, C, H, W); mask: (N, H, W) int64, class indices or ignore_index -> a scalar."""
        counted = (mask != self.ignore_index).flatten().nonzero().squeeze(1)
        probabilities = logits.float().movedim(1, 0).flatten(1).index_select(1, counted).softmax(dim=0)  # (C, pixels)
        truth = mask.flatten().index_select(0, counted)
        cost = probabilities.sum(dim=1) * 0.0
        heard = torch.bincount(truth, minlength=len(cost)) > 0
        of_class = probabilities.unbind()  # indexing in the loop would leave C gradients of C classes each
        for label in heard.nonzero().flatten().tolist():
            member = truth == label
            errors = torch.where(member, 1 - of_class[label], of_class[label])
            cost[label] = errors @ _gradient(errors.detach(), member)
        return _mean_over_classes(cost, heard, self.weights)


def _gradient(errors: Tensor, member: Tensor) -> Tensor:
    """What each pixel adds to 1 - IoU when pixels become wrong one by one, the largest error first.

    errors: (pixels,) float32, none negative, member: (pixels,) bool, in the class. Returns (pixels,).
    A member leaves the intersection, another pixel joins the union. Written out, since the difference of neighbouring
    values of 1 - IoU, near 1 and a millionth apart in a large batch, is mostly rounding in float32.
    """
    # One number holds a pixel's error (the bits of floats that are not negative grow with them), its place and whether
    # it is a member: numpy sorts such numbers on a CPU seven times as fast as torch sorts errors and their places.
    places = torch.arange(len(errors), device=errors.device)
    keys = ((~errors.view(torch.int32)).long() << 32) | (places << 1) | member
    if keys.device.type == "cpu":
        keys.numpy().sort()
    else:
        keys = keys.sort().values
    order, lost = (keys & 0xFFFFFFFF) >> 1, keys & 1
    found = lost.cumsum(0)
    left = found[-1:] - found
    union = places + 1 + left
    steps = torch.where(lost > 0, 1.0 / union, left.float() / union / (union - 1).clamp_min(1))
    return torch.empty_like(errors).index_copy_(0, order, steps)


def _mean_over_classes(cost: Tensor, heard: Tensor, weights: Tensor | None) -> Tensor:
    """cost, heard: ([N,] C), heard bool -> the weighted mean over heard classes, then over rows that have one."""
    shares = heard.float() if weights is None else heard * weights
    total = shares.sum(dim=-1)
    rows = (cost * shares).sum(dim=-1) / torch.where(total > 0, total, 1.0)
    return rows.sum() / (total > 0).sum().clamp_min(1)
