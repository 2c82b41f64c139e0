"""Sums of losses, and the `loss` node of a config."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from segdeconv.config import OBJECT, TARGET, Node, check, locate, split_arguments, without_defaults
from segdeconv.errors import UsageError, warn
from segdeconv.losses.adapter import TORCH_SUPPLIED, build_target, check_target
from segdeconv.losses.base import ClassWeights, LogitAdjusted, PixelLoss
from segdeconv.losses.class_weights import class_weights as compute_weights


class Sum(PixelLoss):
    """Weighted sum of several losses.

    The parts of a split batch are weighted by their numbers of pixels that are not ignored, which is exact for losses
    that are means over these pixels.

    Args:
        parts: By name, a node with `_target_`, arguments of the loss, and its `factor` (1 by default). Each loss gets
            the class weights and the ignore_index of the sum.
        class_weights: One per class; None for equal weights.
        ignore_index: Mask value of ignored pixels.

    Examples:
        >>> parts = {"ce": {"_target_": "segdeconv.losses.CrossEntropy", "factor": 2.0}}
        >>> Sum(parts=parts)(torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64)).item()  # 2 log 4
        2.7725887298583984
    """

    def __init__(
        self,
        *,
        parts: dict[str, dict[str, Any]],
        class_weights: ClassWeights = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.factors = {name: float(node.get("factor", 1.0)) for name, node in parts.items()}
        self.parts = nn.ModuleDict()
        for name, node in parts.items():
            arguments = {key: value for key, value in node.items() if key != "factor"}
            self.parts[name] = build_target(
                arguments, f"loss.parts.{name}", class_weights=class_weights, ignore_index=ignore_index
            )

    def sums(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        counted = (mask != self.ignore_index).sum().float()
        values = [factor * self.parts[name](logits, mask) for name, factor in self.factors.items()]
        return torch.stack(values).sum() * counted, counted


# Schemas that share the keys of a `loss` node with the loss itself.
SCHEMAS = (compute_weights, LogitAdjusted)
OWN_SUPPLIED = ("class_weights", "ignore_index")  # arguments of a loss that a config may not set
SUPPLIED = (*OWN_SUPPLIED, "pixels", "image_pixels", "loss")


def check_loss(node: Mapping[str, Any]) -> Node:
    """Check the `loss` node of a config and return it with defaults filled in.

    It holds the arguments of the loss, of the class weighting, and of the logit adjustment.

    Raises:
        UsageError: A key is unknown or a value is invalid.
    """
    return _check(node, "loss", *SCHEMAS, supplied=SUPPLIED)


def compute_class_weights(
    node: Mapping[str, Any], pixels: Sequence[int], image_pixels: Sequence[int]
) -> list[float] | None:
    """Return the class weights that a checked `loss` node asks for; see `class_weights.class_weights`."""
    return compute_weights(pixels, image_pixels, **split_arguments(node, SCHEMAS)[0])


def build_loss(node: Mapping[str, Any], *, class_weights: Sequence[float] | None, ignore_index: int) -> nn.Module:
    """Build the loss of a checked `loss` node, with the class weights of `compute_class_weights`.

    The program warns of learnable parameters, because optimizers have those of the network only.
    """
    _, settings, own = split_arguments(node, SCHEMAS)
    loss = build_target(own, "loss", class_weights=class_weights, ignore_index=ignore_index)
    if count := sum(parameter.numel() for parameter in loss.parameters() if parameter.requires_grad):
        warn(
            f"loss ({node.get(OBJECT, node[TARGET])}) has {count} learnable parameters, which keep their values: only "
            "those of the network are trained - move them into the network, or set requires_grad=False"
        )
    return LogitAdjusted(loss, class_weights=class_weights, **settings) if settings["logit_adjustment"] else loss


def _check(node: Mapping[str, Any], where: str, *other_schemas: Any, supplied: Sequence[str] = ()) -> Node:
    """Check the node of one loss, alone or in a sum; other_schemas share its keys."""
    schema = locate(node, where)
    of_torch = TORCH_SUPPLIED if check_target(schema, str(node[TARGET]), where) else ()
    checked = check(node, where, [schema, *other_schemas], supplied=[*OWN_SUPPLIED, *supplied, *of_torch])
    if of_torch:
        checked = without_defaults(checked, node, schema)
    if schema is Sum:
        if not checked["parts"]:
            raise UsageError(f"{where}.parts is empty - give at least one loss, as in configs/loss/ce_dice.yaml")
        checked["parts"] = {
            name: _check(part, f"{where}.parts.{name}", _factor) for name, part in checked["parts"].items()
        }
    return checked


def _factor(*, factor: Annotated[float, Field(ge=0)] = 1.0) -> None:
    """Serve as the schema of the key that each part of a sum has in addition to the arguments of its loss."""
