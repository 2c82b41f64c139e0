"""Statistics of switches: frequency of each cell, tie rate, and flip rate between two states of a network."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeconv.analysis.switch_paths import over_windows
from segdeconv.switches import MaxPool, Pooling, max_pool


def shares(pooling: Pooling) -> list[float]:
    """Return the fraction of the windows that each of the four cells won, over channels and images; their sum is 1."""
    counts = torch.bincount(pooling.codes.flatten().long(), minlength=4)
    return (counts / counts.sum()).tolist()


def flip_rate(before: Pooling, now: Pooling) -> float:
    """Return the fraction of the windows, over all channels and images, whose winner has changed: 0..1."""
    return float((before.codes != now.codes).float().mean())


def tie_rate(x: Tensor) -> float:
    """Return the fraction of the 2x2 windows whose maximum is in more than one cell: 0..1.

    There the first cell wins, independently of the image. Incomplete windows at the end of a map count with the cells
    that they have.

    Args:
        x: Maps (N, C, H, W) before a pool.

    Examples:
        >>> tie_rate(torch.tensor([[[[0., 0., 1.], [0., 0., 2.]]]]))
        0.5
    """
    highest = max_pool(x).features
    height, width = x.shape[-2:]
    best = (x == over_windows(highest, (height, width))).float()
    counts = F.avg_pool2d(F.pad(best, (0, width % 2, 0, height % 2)), 2) * 4
    return float((counts > 1.5).float().mean())


@contextmanager
def ties_counted(network: nn.Module) -> Iterator[list[float]]:
    """Record the tie rates of a network's `MaxPool` modules in the last forward pass, by level, in the yielded list."""
    rates: list[float] = []

    def count(pool: MaxPool, args: Any) -> None:
        rates[pool.level - 1 :] = [tie_rate(*args)]

    with ExitStack() as hooks:
        for module in network.modules():
            if isinstance(module, MaxPool):
                hooks.enter_context(module.register_forward_pre_hook(count))
        yield rates
