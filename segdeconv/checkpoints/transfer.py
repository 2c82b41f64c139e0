"""Transfer of weights from another network's checkpoint, with the head matched class by class."""

import inspect
import json
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch

from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.classes import Classes
from segdeconv.config import TARGET, locate
from segdeconv.errors import UsageError
from segdeconv.models import SegmentationModel
from segdeconv.models.vgg import adapt_channels

MAX_SHOWN = 6


@torch.no_grad()
def transfer_weights(model: SegmentationModel, classes: Classes, source: Checkpoint) -> str:
    """Copy into a network the weights of a checkpoint that have the same names and shapes.

    The rows of a head (`SegmentationModel.heads`), and the columns of a head that maps classes to classes, are matched
    by class name, regardless of the order and number of classes. A first convolution for other channels is adapted.

    Args:
        model: The network to copy into.
        classes: The classes of the network.
        source: The checkpoint to copy from.

    Returns:
        A summary in a few lines: what was copied and what was not.

    Raises:
        UsageError: No tensor outside the head fits.
    """
    weights = source.weights
    source_rows = {name: index for index, name in enumerate(source.classes.names)}
    rows = [(index, source_rows[name]) for index, name in enumerate(classes.names) if name in source_rows]
    head, body = 0, 0
    not_copied = []
    channels = len(source.facts["preprocessing"]["mean"])
    for name, tensor in model.state_dict().items():
        old = weights.get(name)
        class_dims = min(model.class_dimensions(name), tensor.ndim)
        if old is None:
            not_copied.append(f"{name} (not in the checkpoint)")
        elif (
            class_dims
            and tensor.shape[:class_dims] == (len(classes),) * class_dims
            and old.shape[class_dims:] == tensor.shape[class_dims:]
        ):
            for matched in product(rows, repeat=class_dims):
                target, origin = zip(*matched, strict=True)
                tensor[target] = old[origin]
            head += 1
        elif old.shape == tensor.shape:
            tensor.copy_(old)
            body += 1
        elif tensor.ndim == 4 and old.shape == (len(tensor), channels, *tensor.shape[2:]):
            tensor.copy_(adapt_channels(old, tensor.shape[1]))
            body += 1
        else:
            not_copied.append(f"{name} ({_shape(old)} in the checkpoint, {_shape(tensor)} here)")
    if not body:
        raise UsageError(
            f"init_from={source.path} has no layer in common with this network - choose the model that it was "
            f"trained with, {source.config['model']['_target_']}"
        )
    fresh = [name for name in classes.names if name not in source_rows]
    lines = [
        f"started from {source.path}: {head + body} of {head + body + len(not_copied)} tensors copied",
        f"  classes copied: {', '.join(classes.names[row] for row, _ in rows) or 'none'}",
    ]
    if fresh:
        lines.append(f"  new classes: {', '.join(fresh)}")
    if temperature := source.facts.get("temperature"):
        lines.append(f"  its temperature of {temperature['value']:.3f} does not hold after training: calibrate again")
    if source.facts.get("instance_statistics"):
        lines.append("  its instance statistics are left out: add them after training with calibrate")
    if len(not_copied) > head + body:
        lines.append(f"  the other {len(not_copied)} have other shapes or names{_way_out(source.config['model'])}")
    elif words := _other_arguments(model, source.config["model"]):
        lines.append(f"  trained with {' '.join(words)}, unlike this network: the same weights compute something else")
    if 0 < len(not_copied) <= head + body:
        more = f" and {len(not_copied) - MAX_SHOWN} more" if len(not_copied) > MAX_SHOWN else ""
        lines.append(f"  not copied: {', '.join(not_copied[:MAX_SHOWN])}{more}")
    return "\n".join(lines)


def _other_arguments(model: SegmentationModel, node: Mapping[str, Any]) -> list[str]:
    """Return the arguments of a `model` node that a network of the same class was built without."""
    own = model.node
    if own is None or own[TARGET] != node[TARGET]:
        return []
    others = {
        name: node.get(name, parameter.default)
        for name, parameter in inspect.signature(type(model)).parameters.items()
        if name in own and name != "pretrained" and (name in node or parameter.default is not parameter.empty)
    }
    return [_word(name, value) for name, value in others.items() if _word(name, value) != _word(name, own[name])]


def _word(name: str, value: Any) -> str:
    return f"model.{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"


def _way_out(node: Mapping[str, Any]) -> str:
    """Return the arguments of train.py that give the network of a `model` node, if it is one of segdeconv's."""
    if not str(node[TARGET]).startswith("segdeconv.models."):  # a class of somebody else is not imported
        return ""
    defaults = inspect.signature(locate(node, "model")).parameters
    words = [f"model.{TARGET}={node[TARGET]}"]
    for name, value in node.items():
        if name in defaults and defaults[name].default != value:
            words.append(_word(name, value))
    return f"; its network is {' '.join(words)}"


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
