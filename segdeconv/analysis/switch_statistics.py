"""Numbers about switches: how often each cell wins, how often two are as good, how many windows changed their mind."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeconv.analysis.switch_paths import over_windows
from segdeconv.switches import MaxPool, Pooling, max_pool


def shares(pooling: Pooling) -> list[float]:
    """How often each of the four cells won, over all windows, channels and images: 0..1, the sum is 1."""
    counts = torch.bincount(pooling.codes.flatten().long(), minlength=4)
    return (counts / counts.sum()).tolist()


def flip_rate(before: Pooling, now: Pooling) -> float:
    """The share of windows, over all channels and images, whose winner is another one than before: 0..1."""
    return float((before.codes != now.codes).float().mean())


def tie_rate(x: Tensor) -> float:
    """The share of the 2x2 windows of maps (N, C, H, W) whose maximum is in more than one cell: 0..1.

    There the first cell wins, whatever the image. Windows that the end cuts count by the cells that they have.

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
    """While this is open every pass of a network leaves the tie rates of its `MaxPool` modules, level by level."""
    rates: list[float] = []

    def count(pool: MaxPool, given: Any) -> None:
        rates[pool.level - 1 :] = [tie_rate(*given)]

    with ExitStack() as hooks:
        for module in network.modules():
            if isinstance(module, MaxPool):
                hooks.enter_context(module.register_forward_pre_hook(count))
        yield rates
