"""Starting from another network's checkpoint: what fits is taken over, the head class by class."""

from itertools import product

import torch

from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.classes import Classes
from segdeconv.errors import UsageError
from segdeconv.models import SegmentationModel
from segdeconv.models.vgg import adapt_channels

MOST_SHOWN = 6


@torch.no_grad()
def transfer_weights(model: SegmentationModel, classes: Classes, source: Checkpoint) -> str:
    """Copy into a network what a checkpoint has under the same names in the same shapes.

    The rows of a head (`SegmentationModel.heads`), and the columns of one that goes from classes to classes, are
    matched by the names of the classes, whatever their order and number; a first convolution that has seen other
    channels is adapted. Returns what was done, in words.
    """
    given = source.weights
    before = {name: index for index, name in enumerate(source.classes.names)}
    rows = [(index, before[name]) for index, name in enumerate(classes.names) if name in before]
    head, body = 0, 0
    left = []
    channels = len(source.facts["preprocessing"]["mean"])
    for name, tensor in model.state_dict().items():
        old = given.get(name)
        ways = min(model.class_dimensions(name), tensor.ndim)
        if old is None:
            left.append(f"{name} (not in it)")
        elif ways and tensor.shape[:ways] == (len(classes),) * ways and old.shape[ways:] == tensor.shape[ways:]:
            for matched in product(rows, repeat=ways):
                here, there = zip(*matched, strict=True)
                tensor[here] = old[there]
            head += 1
        elif old.shape == tensor.shape:
            tensor.copy_(old)
            body += 1
        elif tensor.ndim == 4 and old.shape == (len(tensor), channels, *tensor.shape[2:]):
            tensor.copy_(adapt_channels(old, tensor.shape[1]))
            body += 1
        else:
            left.append(f"{name} ({_shape(old)} there, {_shape(tensor)} here)")
    if not body:
        raise UsageError(
            f"init_from={source.path} and this network have no layer in common - choose the model that it was trained "
            f"with, {source.config['model']['_target_']}"
        )
    fresh = [name for name in classes.names if name not in before]
    lines = [
        f"started from {source.path}: {head + body} of {head + body + len(left)} tensors taken over",
        f"  classes it knows: {', '.join(classes.names[row] for row, _ in rows) or 'none'}",
    ]
    if fresh:
        lines.append(f"  classes that start anew: {', '.join(fresh)}")
    if left:
        more = f" and {len(left) - MOST_SHOWN} more" if len(left) > MOST_SHOWN else ""
        lines.append(f"  not taken over: {', '.join(left[:MOST_SHOWN])}{more}")
    return "\n".join(lines)


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
