"""Max-pooling with switches and unpooling as modules without parameters, so that hooks can be registered on them."""

from torch import Tensor, nn

from segdeconv.switches.ops import Pooling, max_pool, unpool


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
        return unpool(x, switches, size)
