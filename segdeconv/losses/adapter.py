"""Losses of other libraries, such as torch's: objects of a program, and classes that a config names."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeconv.config import OBJECT, TARGET, build, is_foreign, locate, stand_in, type_name
from segdeconv.errors import UsageError, first_line
from segdeconv.losses.base import PixelLoss, check_input, weights_buffer


class _Form(NamedTuple):
    """The form in which a loss of torch.nn compares N pixels.

    Attributes:
        values: What it gets of the logits, (N, C).
        one_hot: True if it compares with (N, C) one-hot vectors, False for (N,) class indices.
        weighted: True if its mean is divided by the sum of the pixels' class weights.
    """

    values: Callable[[Tensor], Tensor]
    one_hot: bool
    weighted: bool = False


def _logits(values: Tensor) -> Tensor:
    return values


def _log_softmax(values: Tensor) -> Tensor:
    return values.log_softmax(dim=1)


def _softmax(values: Tensor) -> Tensor:
    return values.softmax(dim=1)


TORCH_LOSSES = {
    "CrossEntropyLoss": _Form(_logits, one_hot=False, weighted=True),
    "NLLLoss": _Form(_log_softmax, one_hot=False, weighted=True),
    "MultiMarginLoss": _Form(_logits, one_hot=False),
    "BCEWithLogitsLoss": _Form(_logits, one_hot=True),
    "MultiLabelSoftMarginLoss": _Form(_logits, one_hot=True),
    "MSELoss": _Form(_softmax, one_hot=True),
    "L1Loss": _Form(_softmax, one_hot=True),
    "SmoothL1Loss": _Form(_softmax, one_hot=True),
    "HuberLoss": _Form(_softmax, one_hot=True),
}
# Their arguments that the program decides: the mean over pixels that are not ignored, with the run's class weights.
TORCH_SUPPLIED = ("weight", "ignore_index", "reduction", "size_average", "reduce", "pos_weight")


class TorchLoss(PixelLoss):
    """A loss of torch.nn, over the pixels that are not ignored.

    Cross-entropy, NLLLoss and MultiMarginLoss compare scores with class indices, the others each class with a one-hot
    vector: BCEWithLogitsLoss and MultiLabelSoftMarginLoss logits, MSELoss and those like it probabilities.

    Args:
        loss: One of TORCH_LOSSES that returns the mean.
        class_weights: One per class; None for equal weights.
        ignore_index: The value of ignored pixels in masks.

    Raises:
        UsageError: The loss has no class weights.
    """

    class_weights: Tensor | None

    def __init__(self, loss: nn.Module, *, class_weights: Sequence[float] | None, ignore_index: int) -> None:
        super().__init__()
        name = type(loss).__name__
        self.loss, self.form, self.ignore_index = loss, TORCH_LOSSES[name], ignore_index
        if class_weights is not None and not hasattr(loss, "weight"):
            raise UsageError(f"loss (torch.nn.{name}) has no class weights - set loss.class_weighting=none")
        self.register_buffer("class_weights", weights_buffer(class_weights), persistent=False)
        if class_weights is not None:
            loss.register_buffer("weight", weights_buffer(class_weights), persistent=False)
        if self.form.weighted:  # torch's mean is 0 / 0 where all weights are 0, and so is its gradient
            loss.reduction = "sum"  # type: ignore[assignment]

    def sums(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        check_input(logits, mask, class_weights=self.class_weights, ignore_index=self.ignore_index)
        counted = mask != self.ignore_index
        labels = mask[counted]
        values = self.form.values(logits.movedim(1, -1)[counted].float())
        if not len(labels):
            return values.sum(), values.sum().detach()
        target = F.one_hot(labels, values.shape[1]).float() if self.form.one_hot else labels
        normaliser = torch.tensor(float(len(labels)), device=logits.device)
        if self.form.weighted and self.class_weights is not None:
            normaliser = self.class_weights[labels].sum()
        value = self.loss.float()(values, target)  # in true half or double precision its weights are cast
        return value if self.form.weighted else value * normaliser, normaliser


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
        try:
            value = self.loss(logits, _ignored_as(self.loss, mask, self.ignore_index))
        except (torch.OutOfMemoryError, UsageError):
            raise
        except Exception as error:  # another library may raise anything
            raise UsageError(
                f"loss ({type(self.loss).__name__}) fails: {first_line(error)} - it is called with logits (N, C, H, W) "
                f"and class indices (N, H, W), {self.ignore_index} for ignored pixels"
            ) from error
        if not isinstance(value, Tensor) or value.ndim:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"loss ({type(self.loss).__name__}) returns {shape}, not a scalar - let it average")
        return value


class PixelAdapter(PixelLoss):
    """A `PixelLoss` of a program. Ignored pixels have the index that the loss itself ignores, see `Adapter`.

    Args:
        loss: The loss.
        ignore_index: The value of ignored pixels in masks.
    """

    def __init__(self, loss: PixelLoss, ignore_index: int) -> None:
        super().__init__()
        self.loss, self.ignore_index = loss, ignore_index

    def sums(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss.sums(logits, _ignored_as(self.loss, mask, self.ignore_index))


def _ignored_as(loss: Callable[..., Tensor], mask: Tensor, ignore_index: int) -> Tensor:
    """Return a mask in which ignored pixels have the ignore_index of a loss, if it has one."""
    own = getattr(loss, "ignore_index", None)
    return mask.masked_fill(mask == ignore_index, own) if isinstance(own, int) and own != ignore_index else mask


def check_target(target: Callable[..., Any], name: str, where: str) -> bool:
    """Check that a class or function can be a loss, and return whether it is one of TORCH_LOSSES.

    Args:
        target: What `_target_` names.
        name: Its dotted name.
        where: The key of the node.

    Raises:
        UsageError: It is not a module, or a loss of torch that cannot compare scores with class indices.
    """
    usable = not inspect.isclass(target) or issubclass(target, nn.Module)
    if usable and not str(getattr(target, "__module__", "")).startswith("torch."):
        return False
    own = getattr(nn, target.__name__, None) if target.__name__ in TORCH_LOSSES else None
    if own is not target:
        raise UsageError(
            f"{where}._target_={name} cannot be used as a loss - use a module of (logits, mask), a file of "
            f"configs/loss, or of torch.nn {', '.join(TORCH_LOSSES)}"
        )
    return True


def build_target(
    node: Mapping[str, Any], where: str, *, class_weights: Sequence[float] | None, ignore_index: int
) -> nn.Module:
    """Build the loss that a node names, segdeconv's own, a user's, or one of another library.

    A constructor gets the class weights and the ignore_index if it takes them.

    Args:
        node: The node with arguments of the loss only.
        where: Its key, for messages.
        class_weights: One per class; None for equal weights.
        ignore_index: The value of ignored pixels in masks.

    Raises:
        UsageError: The loss takes no class weights, rejects its arguments, or is not a module.
    """
    target = locate(node, where)
    if check_target(target, str(node[TARGET]), where):
        return TorchLoss(build(node, where), class_weights=class_weights, ignore_index=ignore_index)
    parameters = inspect.signature(target).parameters
    takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    supplied = {"class_weights": class_weights, "ignore_index": ignore_index}
    supplied = {name: value for name, value in supplied.items() if name in parameters or takes_any}
    if class_weights is not None and "class_weights" not in supplied:
        raise UsageError(f"{where} ({node[TARGET]}) takes no class_weights - set loss.class_weighting=none")
    loss = build(node, where, **supplied)
    if not isinstance(loss, nn.Module):
        raise UsageError(f"{where} ({node[TARGET]}) is a {type(loss).__name__}, not a torch.nn.Module")
    return Adapter(loss, ignore_index) if is_foreign(loss) and not isinstance(loss, PixelLoss) else loss


def loss_node(loss: Callable[..., Tensor]) -> dict[str, Any]:
    """Return the `loss` node of a loss, of which a copy is used.

    Args:
        loss: A `PixelLoss`, or another function of logits, (N, C, H, W), and class indices, (N, H, W).
    """

    def loss_given(*, ignore_index: int, class_weights: Sequence[float] | None = None, object: str = "") -> nn.Module:
        if class_weights is not None:
            raise UsageError("loss is an object, which has its own weights - leave out loss.class_weighting")
        own = copy.deepcopy(loss)
        return PixelAdapter(own, ignore_index) if isinstance(own, PixelLoss) else Adapter(own, ignore_index)

    return {TARGET: stand_in(loss_given), OBJECT: type_name(loss)}
