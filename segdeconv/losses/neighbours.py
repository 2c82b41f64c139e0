"""A term for partial labels: neighbouring pixels of like colour have the same class."""

import torch.nn.functional as F
from torch import Tensor


def like_neighbours(logits: Tensor, images: Tensor, *, radius: int = 4, sigma: float = 20.0, stride: int = 4) -> Tensor:
    """Return the loss of pixels whose neighbours of like colour have another class.

    The gated pairwise term of Obukhov et al. 2019, equation 5, https://arxiv.org/abs/1906.04651, without a gate and on
    maps that are reduced by `stride`: the mean over pairs of weight * (1 - p_i . p_j), with the weight
    exp(-|colour_i - colour_j|^2 / (2 sigma^2)).

    Args:
        logits: (N, C, H, W).
        images: (N, 3, H, W), RGB in 0..255.
        radius: Largest distance of neighbours in reduced pixels.
        sigma: Standard deviation of the difference of colours.
        stride: Factor of the reduction.
    """
    probabilities = F.avg_pool2d(logits.softmax(dim=1), stride)
    colours = F.avg_pool2d(images.float(), stride)
    total, weight_sum = logits.new_zeros(()), logits.new_zeros(())
    height, width = colours.shape[-2:]
    for dy, dx in [(dy, dx) for dy in range(radius + 1) for dx in range(-radius, radius + 1) if (dy, dx) > (0, 0)]:
        rows, other_rows = slice(0, height - dy), slice(dy, height)
        columns, other_columns = (slice(max(0, -s * dx), width - max(0, s * dx)) for s in (1, -1))
        first, second = (..., rows, columns), (..., other_rows, other_columns)
        weight = (-(colours[first] - colours[second]).square().sum(dim=1) / (2 * sigma**2)).exp()
        agreement = (probabilities[first] * probabilities[second]).sum(dim=1)
        total = total + (weight * (1 - agreement)).sum()
        weight_sum = weight_sum + weight.sum()
    return total / weight_sum.clamp(min=1e-6)
