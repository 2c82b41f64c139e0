"""Max-pooling with switches and unpooling as modules without parameters, so that hooks can be registered on them."""

import torch
from torch import Tensor, nn

from segdeconv.switches.ops import Pooling, max_pool, unpool
from segdeconv.switches.soft import soft_switches, soft_unpool

HARD_FROM = 0.75  # fraction of the steps after which soft switches are hard


class MaxPool(nn.Module):
    """2x2 max-pool with stride 2 that also returns its switches, see `max_pool`.

    Args:
        level: Position among the pools of the network; 1 is the first, which pools the finest map.
        packed: Store each switch in two bits instead of a byte, see `pack`.

    Examples:
        >>> import torch
        >>> MaxPool(1)(torch.zeros(1, 4, 5, 6)).features.shape
        torch.Size([1, 4, 3, 3])
    """

    def __init__(self, level: int, *, packed: bool = False) -> None:
        super().__init__()
        self.level, self.packed = level, packed

    def forward(self, x: Tensor) -> Pooling:  # (N, C, H, W)
        return max_pool(x, packed=self.packed)


class SoftMaxPool(MaxPool):
    """A `MaxPool` whose switches are soft at the beginning of training, see `soft_switches`, and hard at its end.

    In training, the temperature of their softmax falls linearly from 1, in the units of the pooled map (to which batch
    norm gives unit variance), to 0 after three quarters of the steps. From there on, and in evaluation mode at any
    time, this is a `MaxPool`: the last quarter trains the network that predicts. `Unpool` accepts both kinds of
    switches.

    Args:
        level: See `MaxPool`.
        packed: See `MaxPool`; only hard switches can be packed.

    Attributes:
        is_soft: Whether the switches are soft in training.
        temperature: The temperature, a scalar, so that compiled code does not depend on its value.
    """

    temperature: Tensor

    def __init__(self, level: int, *, packed: bool = False) -> None:
        super().__init__(level, packed=packed)
        self.is_soft = True
        self.register_buffer("temperature", torch.ones(()), persistent=False)

    def set_progress(self, progress: float) -> None:
        """Set the temperature of a step of training, given the fraction of the steps before it, 0..1."""
        temperature = max(0.0, 1 - progress / HARD_FROM)
        self.is_soft = temperature > 0
        self.temperature.fill_(temperature)

    def forward(self, x: Tensor) -> Pooling:  # (N, C, H, W)
        pooling = super().forward(x)
        if not (self.training and self.is_soft):
            return pooling
        return pooling._replace(switches=soft_switches(x, pooling.features, self.temperature))


class Unpool(nn.Module):
    """Counterpart of the `MaxPool` of the same level: puts values back where the maxima were, see `unpool`.

    Args:
        level: Level of the pool whose switches it uses; 1 is the first, which pools the finest map.

    Examples:
        >>> import torch
        >>> features, switches, size = MaxPool(1)(torch.zeros(1, 4, 5, 6))
        >>> Unpool(1)(features, switches, size).shape
        torch.Size([1, 4, 5, 6])
    """

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level

    def forward(self, x: Tensor, switches: Tensor, size: tuple[int, int]) -> Tensor:  # (N, C, h, w) -> (N, C, *size)
        if switches.is_floating_point():
            return soft_unpool(x, switches)
        return unpool(x, switches, size)
