"""Losses of Python programs, such as torch's, as losses of a run."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segdeconv.config import OBJECT, TARGET, stand_in, type_name
from segdeconv.errors import UsageError
from segdeconv.losses.base import PixelLoss


class Adapter(nn.Module):
    """A loss of another library. Ignored pixels have the index that the loss itself ignores, if it has an ignore_index.

    Args:
        loss: Maps logits, (N, C, H, W), and class indices, (N, H, W) int64, to a scalar.
        ignore_index: The value of ignored pixels in masks.
    """

    def __init__(self, loss: Callable[..., Tensor], ignore_index: int) -> None:
        super().__init__()
        self.loss, self.ignore_index = loss, ignore_index

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        own = getattr(self.loss, "ignore_index", None)
        if isinstance(own, int) and own != self.ignore_index:
            mask = mask.masked_fill(mask == self.ignore_index, own)
        try:
            value = self.loss(logits, mask)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # another library may raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"loss ({type(self.loss).__name__}) fails: {reason} - it is called with logits (N, C, H, W) and class "
                f"indices (N, H, W), {self.ignore_index} for ignored pixels"
            ) from error
        if not isinstance(value, Tensor) or value.ndim:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"loss ({type(self.loss).__name__}) returns {shape}, not a scalar - let it average")
        return value


def loss_node(loss: Callable[..., Tensor]) -> dict[str, Any]:
    """Return the `loss` node of a loss, of which a copy is used.

    Args:
        loss: A `PixelLoss`, or another function of logits, (N, C, H, W), and class indices, (N, H, W).
    """

    def loss_given(*, ignore_index: int, class_weights: Sequence[float] | None = None, object: str = "") -> nn.Module:
        if class_weights is not None:
            raise UsageError("loss is an object, which has its own weights - leave out loss.class_weighting")
        own = copy.deepcopy(loss)
        return own if isinstance(own, PixelLoss) else Adapter(own, ignore_index)

    return {TARGET: stand_in(loss_given), OBJECT: type_name(loss)}
