"""What a network of the decoder study costs: parameters, time, and what the encoder has to keep for the decoder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from segdeconv.experiments.benchmarks.harness import median_time
from segdeconv.models import build_model
from segdeconv.models.basic import BasicModel

FULL_WIDTH, FULL_CLASSES = 64, 11  # of the published networks
FORWARDS = 50  # as many as in the paper,
ENOUGH = 5.0  # or as many as take so many seconds


@dataclass(frozen=True)
class Costs:
    """Of one network at one size of images.

    parameters: of the network as it is trained here; full_parameters: in full width and for CamVid's classes.
    forward_ms: median time of a forward pass of one image.
    kept: bytes of one image that cross from the encoder to the decoder beside the deepest map, as they are held;
    packed: the same with two bits for a switch, which is held in eight.
    """

    parameters: int
    full_parameters: int
    forward_ms: float
    kept: int
    packed: int


def measure(
    node: Mapping[str, Any], num_classes: int, in_channels: int, size: tuple[int, int], device: torch.device
) -> Costs:
    """node: the `model` node of a checked config; size: (H, W) of the image."""
    model = build_model(node, num_classes, in_channels).eval().to(device).to(memory_format=torch.channels_last)
    assert isinstance(model, BasicModel)
    with torch.device("meta"):
        full = build_model({**node, "width": FULL_WIDTH}, FULL_CLASSES, 3)
    image = torch.rand(1, in_channels, *size, device=device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        _, levels = model.encode(image)
        forward = median_time(lambda: model(image).flatten()[0].item(), seconds=ENOUGH, most=FORWARDS)
    switches = [level.switches for level in levels if level.switches is not None]
    maps = sum(level.features.nbytes for level in levels if level.features is not None)
    return Costs(
        parameters=_count(model),
        full_parameters=_count(full),
        forward_ms=1000 * forward,
        kept=maps + sum(switch.nbytes for switch in switches),
        packed=maps
        + sum(switch.nbytes if model.encoder.packed_switches else math.ceil(switch.numel() / 4) for switch in switches),
    )


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
