"""Base classes of losses, which are modules that map (logits, mask) to a scalar.

A mean over pixels is kept as a sum and its normaliser, because a batch may be split (into accumulated micro-batches or
over several processes). The mean over the whole batch is the sum of the sums divided by the sum of the normalisers;
the mean of the parts' means differs from it where the parts have different numbers of ignored pixels.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from segdeconv.config import checked_arguments, is_foreign
from segdeconv.errors import UsageError


def _as_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor | np.ndarray) else value


ClassWeights = Annotated[Sequence[float] | None, BeforeValidator(_as_list)]


class Loss(nn.Module):
    """Base class of segdeconv's losses, whose constructors check their arguments against their annotations."""

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "__init__" in vars(cls) and not is_foreign(cls):
            cls.__init__ = checked_arguments(cls.__init__)  # type: ignore[method-assign]


class PixelLoss(Loss, ABC):
    """Loss that is a sum over pixels divided by a normaliser. Subclasses define both in `sums`.

    A loss that is computed from a whole map can be any other module that maps (logits, mask) to a scalar. The parts of
    a split batch are then averaged with their numbers of pixels as weights.
    """

    @abstractmethod
    def sums(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum over pixels and its normaliser, both scalars.

        Args:
            logits: (N, C, H, W).
            mask: Class indices or ignore_index, (N, H, W) int64.
        """

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the mean loss, a scalar.

        Args:
            logits: (N, C, H, W).
            mask: Class indices or ignore_index, (N, H, W) int64.
        """
        total, normaliser = self.sums(logits, mask)
        return total / torch.where(normaliser > 0, normaliser, 1.0)


class LogitAdjusted(PixelLoss):
    """Wrapper that adds `logit_adjustment * log weight` of each class to the logits before any loss.

    With class weights a network predicts weight * p instead of p: it learns rare classes early, but also predicts them
    where they are absent. With the adjustment it learns in the same way, but its own scores become
    weight**(1 - logit_adjustment) * p: 0 keeps the weights in the scores, 1 removes them. Menon et al. 2021, section 4,
    https://arxiv.org/abs/2007.07314, with weights in place of their priors.

    Args:
        loss: The wrapped loss, built with the same class weights.
        logit_adjustment: Factor on the logarithm of the weights, 0..1.
        class_weights: One per class; the logits of a class of weight 0 are not changed.
    """

    shift: Tensor

    def __init__(
        self,
        loss: nn.Module,
        *,
        logit_adjustment: Annotated[float, Field(ge=0, le=1)] = 0.0,
        class_weights: ClassWeights = None,
    ) -> None:
        super().__init__()
        self.loss = loss
        shift = [logit_adjustment * math.log(weight) if weight else 0.0 for weight in class_weights or [1.0]]
        self.register_buffer("shift", weights_buffer(shift), persistent=False)

    def sums(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return loss_sums(self.loss, logits.float() + self.shift[:, None, None], mask)


def loss_sums(loss: nn.Module, logits: Tensor | Sequence[Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum and the normaliser of any loss; see PixelLoss.

    Args:
        loss: A PixelLoss or any other module that maps (logits, mask) to a scalar.
        logits: (N, C, H, W), or several such maps for one mask, whose sums and normalisers are added.
        mask: Class indices or ignore_index, (N, H, W) int64.
    """
    if not isinstance(logits, Tensor):
        total, normaliser = torch.stack([torch.stack(loss_sums(loss, output, mask)) for output in logits]).sum(dim=0)
        return total, normaliser
    if isinstance(loss, PixelLoss):
        return loss.sums(logits, mask)
    return loss(logits, mask) * mask.numel(), torch.tensor(float(mask.numel()), device=mask.device)


def check_input(logits: Tensor, mask: Tensor, *, class_weights: Tensor | None, ignore_index: int) -> None:
    """Check the input of a loss, which would otherwise be broadcast, or compared with classes that do not exist.

    Args:
        logits: (N, C, H, W).
        mask: Class indices or ignore_index, (N, H, W) int64.
        class_weights: One per class; None for equal weights.
        ignore_index: The value of ignored pixels in masks.

    Raises:
        UsageError: Shapes, labels or the number of class weights do not fit the logits.
    """
    num_classes = logits.shape[1] if logits.ndim == 4 else 0
    if not num_classes or mask.shape != (len(logits), *logits.shape[2:]) or mask.is_floating_point():
        raise UsageError(
            f"a loss compares logits of shape {tuple(logits.shape)} with a {mask.dtype} mask of shape "
            f"{tuple(mask.shape)} - give logits (N, C, H, W) and class indices (N, H, W), integers"
        )
    if class_weights is not None and len(class_weights) != num_classes:
        raise UsageError(
            f"a loss has {len(class_weights)} class weights, but the logits have {num_classes} classes - give one "
            "weight per class"
        )
    # Reading the values would wait for a GPU; tensors of the estimate of memory, a subclass, have none.
    if mask.device.type == "cpu" and type(mask) is Tensor and not torch.compiler.is_compiling():
        check_labels(mask, num_classes, ignore_index)


def check_labels(mask: Tensor, num_classes: int, ignore_index: int) -> None:
    """Check the values of a mask.

    Args:
        mask: Class indices or ignore_index, integers.
        num_classes: The number of classes.
        ignore_index: The value of ignored pixels.

    Raises:
        UsageError: A label is neither a class nor the ignored one.
    """
    wrong = ((mask < 0) | (mask >= num_classes)) & (mask != ignore_index)
    if bool(wrong.any()):
        raise UsageError(
            f"a mask has label {int(mask[wrong][0])}, but there are classes 0..{num_classes - 1} and the ignored "
            f"label {ignore_index} - map the labels in the data set, or set ignore_index"
        )


def weights_buffer(class_weights: Sequence[float] | None) -> Tensor | None:
    """Return class weights as a float32 tensor to register as a non-persistent buffer.

    They stay out of the state dict because they describe the data and are saved in the checkpoint's `facts`.
    """
    return None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)
