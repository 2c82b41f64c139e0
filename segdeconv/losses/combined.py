"""Sums of losses, and the `loss` node of a config."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from segdeconv.config import Node, build, check, deal, locate
from segdeconv.errors import UsageError
from segdeconv.losses.base import LogitAdjusted, PixelLoss
from segdeconv.losses.class_weights import class_weights as class_weighting


class Sum(PixelLoss):
    """Several losses, each times its factor, added.

    parts: by a name, what each part is: a node with `_target_`, its arguments, and `factor` (1 where it is left out).
        Each gets the class weights and the ignore_index of the whole.

    Where a batch comes in pieces, each piece counts by its number of pixels that are not ignored: exact for parts
    that are means over these pixels.

    >>> parts = {"ce": {"_target_": "segdeconv.losses.CrossEntropy", "factor": 2.0}}
    >>> Sum(parts=parts)(torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)).item()  # 2 log 4
    2.7725887298583984
    """

    def __init__(
        self,
        *,
        parts: dict[str, dict[str, Any]],
        class_weights: Sequence[float] | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.factors = {name: float(node.get("factor", 1.0)) for name, node in parts.items()}
        self.parts = nn.ModuleDict()
        for name, node in parts.items():
            arguments = {key: value for key, value in node.items() if key != "factor"}
            self.parts[name] = build(
                arguments, f"loss.parts.{name}", class_weights=class_weights, ignore_index=ignore_index
            )

    def sums(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        counted = (mask != self.ignore_index).sum().float()
        values = [factor * self.parts[name](logits, mask) for name, factor in self.factors.items()]
        return torch.stack(values).sum() * counted, counted


# Who takes the keys of a `loss` node beside the loss itself.
SCHEMAS = (class_weighting, LogitAdjusted)


def check_loss(node: Mapping[str, Any]) -> Node:
    """The `loss` node of a config: arguments of the loss, of the class weighting, and of the
    adjustment that takes them out of the scores.
    """
    return _check(node, "loss", *SCHEMAS, supplied=["pixels", "image_pixels", "loss"])


def balance(node: Mapping[str, Any], pixels: Sequence[int], image_pixels: Sequence[int]) -> list[float] | None:
    """Class weights by the class weighting of a checked `loss` node; see `class_weights`."""
    return class_weighting(pixels, image_pixels, **deal(node, SCHEMAS)[0])


def build_loss(node: Mapping[str, Any], *, class_weights: Sequence[float] | None, ignore_index: int) -> nn.Module:
    """The loss of a checked `loss` node, given the class weights that `balance` finds."""
    _, settings, own = deal(node, SCHEMAS)
    loss: nn.Module = build(own, "loss", class_weights=class_weights, ignore_index=ignore_index)
    return LogitAdjusted(loss, class_weights=class_weights, **settings) if settings["logit_adjustment"] else loss


def _check(node: Mapping[str, Any], where: str, *beside: Any, supplied: Sequence[str] = ()) -> Node:
    """One loss, in a sum or by itself. beside: whose arguments stand in the same node."""
    schema = locate(node, where)
    checked = check(node, where, [schema, *beside], supplied=["class_weights", "ignore_index", *supplied])
    if schema is Sum:
        if not checked["parts"]:
            raise UsageError(f"{where}.parts is empty - name at least one loss, as configs/loss/ce_dice.yaml does")
        checked["parts"] = {
            name: _check(part, f"{where}.parts.{name}", _factor) for name, part in checked["parts"].items()
        }
    return checked


def _factor(*, factor: Annotated[float, Field(ge=0)] = 1.0) -> None:
    """The schema of what a part of a sum has beside its own arguments."""
