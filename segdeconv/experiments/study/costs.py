"""Costs of a network of the decoder study: parameters, time, and the memory that the encoder keeps for the decoder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from segdeconv.experiments.benchmarks.harness import median_time
from segdeconv.models import build_model
from segdeconv.models.basic import BasicModel

FULL_WIDTH, FULL_CLASSES = 64, 11  # of the published networks
MAX_FORWARDS = 50  # timed forward passes, as many as in the paper
MAX_SECONDS = 5.0  # fewer passes are timed if they take longer than this


@dataclass(frozen=True)
class Costs:
    """Costs of one network at one input size.

    Attributes:
        parameters: Number of parameters of the network as it is trained here.
        full_parameters: Number of parameters in full width and with CamVid's classes.
        forward_ms: Median time of a forward pass of one image, in milliseconds.
        kept: Bytes that the encoder keeps for the decoder per image, in addition to the deepest map.
        packed: The same number of bytes if every switch took two bits; by default it takes eight.
    """

    parameters: int
    full_parameters: int
    forward_ms: float
    kept: int
    packed: int


def measure(
    node: Mapping[str, Any], num_classes: int, in_channels: int, size: tuple[int, int], device: torch.device
) -> Costs:
    """Measure the costs of a network.

    Args:
        node: The `model` node of a checked config.
        num_classes: Number of classes.
        in_channels: Number of channels of the image.
        size: Input size (H, W).
        device: Device of the forward passes.
    """
    model = build_model(node, num_classes, in_channels).eval().to(device).to(memory_format=torch.channels_last)
    assert isinstance(model, BasicModel)
    with torch.device("meta"):
        full = build_model({**node, "width": FULL_WIDTH}, FULL_CLASSES, 3)
    image = torch.rand(1, in_channels, *size, device=device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        _, levels = model.encode(image)
        forward = median_time(lambda: model(image).flatten()[0].item(), seconds=MAX_SECONDS, max_calls=MAX_FORWARDS)
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
