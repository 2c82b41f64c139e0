"""Soft switches: weights of the four cells of a window in place of the position of the maximum.

Unpooling with them spreads a value over its window in proportion to a softmax of the values that were pooled, and a
gradient flows through the softmax to these values: the encoder learns where the decoder needs its values. With its
temperature, the softmax tends to the hard switch, 1 at the maximum and 0 elsewhere (annealed as by Jang, Gu, Poole
2017, section 2.2, https://arxiv.org/abs/1611.01144, here without noise).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_switches(x: Tensor, maxima: Tensor, temperature: Tensor | float) -> Tensor:
    """Return the softmax of x / temperature over each 2x2 window, (N, C, H, W).

    Args:
        x: (N, C, H, W), the map that was pooled.
        maxima: (N, C, ceil(H/2), ceil(W/2)), the maximum of each window.
        temperature: Above 0.

    Examples:
        >>> soft_switches(torch.tensor([[[[0., 0., 1., 0.]]]]), torch.tensor([[[[0., 1.]]]]), 1.0)
        tensor([[[[0.5000, 0.5000, 0.7311, 0.2689]]]])
    """
    size = x.shape[-2:]
    exponentials = ((x.float() - _spread(maxima.detach().float(), size)) / temperature).exp()
    padded = F.pad(exponentials, (0, size[1] % 2, 0, size[0] % 2))
    return (exponentials / _spread(4 * F.avg_pool2d(padded, 2), size)).to(x.dtype)


def soft_unpool(x: Tensor, switches: Tensor) -> Tensor:
    """Spread every value of x over its window in proportion to soft switches.

    Args:
        x: (N, C, h, w).
        switches: (N, C, H, W) from `soft_switches`.

    Returns:
        (N, C, H, W).
    """
    return _spread(x, switches.shape[-2:]) * switches


def _spread(x: Tensor, size: torch.Size) -> Tensor:
    """Repeat every value of x over its 2x2 window of a map of a size."""
    return F.interpolate(x, scale_factor=2, mode="nearest")[..., : size[0], : size[1]]
