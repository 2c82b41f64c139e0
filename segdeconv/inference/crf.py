"""The fully connected conditional random field (CRF) with which DeconvNet and DeepLab refine their probabilities.

Kraehenbuehl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials" (NIPS 2011).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from segdeconv.errors import UsageError
from segdeconv.inference.permutohedral import Lattice

# Map (P, C) values of P pixels to (P, C) weighted sums over all pixels.
Filter = Callable[[Tensor], Tensor]

MIN_PROBABILITY = 1e-5  # smaller probabilities are raised to it, as in pydensecrf
BLOCK = 32  # rows or columns of pixels in one matrix product
MAX_PAIRS = 2**24  # pixel pairs whose weights the exact filter holds at once: 64 MB


@dataclass(frozen=True, kw_only=True)
class CRF:
    """Settings of a fully connected CRF with a spatial and a bilateral kernel.

    The spatial kernel favours one class for pixels that are close, the bilateral kernel for pixels that are close and
    have similar colours. The defaults are those of DeconvNet's released code.

    Args:
        spatial_weight: Weight of the spatial kernel; 0 disables it.
        spatial_std: Standard deviation of the spatial kernel, in pixels.
        bilateral_weight: Weight of the bilateral kernel; 0 disables it.
        bilateral_std: Standard deviation of the bilateral kernel over positions, in pixels.
        colour_std: Standard deviation of the bilateral kernel over colours, which are in 0..255.
        iterations: Mean field iterations.
    """

    spatial_weight: Annotated[float, Field(ge=0)] = 3.0
    spatial_std: Annotated[float, Field(gt=0)] = 3.0
    bilateral_weight: Annotated[float, Field(ge=0)] = 5.0
    bilateral_std: Annotated[float, Field(gt=0)] = 20.0
    colour_std: Annotated[float, Field(gt=0)] = 3.0
    iterations: Annotated[int, Field(ge=0)] = 10


@torch.no_grad()
def refine(
    probabilities: Tensor, image: Tensor | np.ndarray, *, settings: CRF | None = None, exact: bool = False
) -> Tensor:
    """Refine class probabilities by mean field inference in a fully connected CRF.

    Mean field with Potts compatibility: q <- softmax(log p + sum of weight * K q over the kernels), all pixels and
    classes at once. Each K is normalised from both sides, D^-1/2 K D^-1/2 with D the row sums of K, and a pixel counts
    itself, as pydensecrf does by default (NORMALIZE_SYMMETRIC). The paper's own code divided by D after filtering.

    The spatial kernel is exact. The bilateral kernel is approximated on a permutohedral lattice, within 10 % of the
    exact weighted sums and usually 5 % (root mean square).

    Runs on the device of `probabilities`; the result is bitwise reproducible. Memory grows with the number of pixels: 2
    kB each with 21 classes (0.4 GB for 500x375), 6 kB with 150, and 1.5 times as much if every pixel has a different
    colour.

    Args:
        probabilities: (C, H, W) class probabilities.
        image: (H, W, channels) uint8; `draw.to_rgb` converts a 16-bit image.
        exact: Compute the bilateral kernel exactly, in a time that grows with the square of the number of pixels.

    Returns:
        (C, H, W) float32 refined probabilities.

    Raises:
        UsageError: The shapes do not match, or the image is not uint8.
    """
    settings = settings or CRF()
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image.copy())  # torch warns about read-only arrays, such as Pillow's
    if probabilities.ndim != 3 or image.ndim != 3 or probabilities.shape[1:] != image.shape[:2]:
        raise UsageError(
            f"the CRF received probabilities of shape {tuple(probabilities.shape)} and an image of shape "
            f"{tuple(image.shape)} - give (C, H, W) and (H, W, channels) with the same H and W"
        )
    if image.dtype != torch.uint8:
        raise UsageError(f"the CRF received an image of {image.dtype} - give uint8 colours, 0 to 255")
    num_classes, height, width = probabilities.shape
    device = probabilities.device

    # Mixed precision would round the weights of the kernels.
    with torch.autocast(device.type, enabled=False):
        kernels: list[tuple[float, Filter]] = []
        if settings.spatial_weight:
            kernels.append((settings.spatial_weight, _spatial(height, width, settings.spatial_std, device)))
        if settings.bilateral_weight:
            features = _features(image, settings).to(device)
            bilateral = _symmetric(_exact(features) if exact else Lattice(features), features)
            kernels.append((settings.bilateral_weight, bilateral))
        log = probabilities.float().clamp(MIN_PROBABILITY, 1).log().flatten(1).T.contiguous()
        q = log.softmax(dim=1)
        for _ in range(settings.iterations):
            scores = log.clone()
            for weight, kernel in kernels:
                scores.add_(kernel(q), alpha=weight)
            q = scores.softmax(dim=1)
    return q.T.reshape(num_classes, height, width)


def _features(image: Tensor, settings: CRF) -> Tensor:
    """Map an (H, W, channels) uint8 image to (H * W, 2 + channels): position and colour, in standard deviations."""
    height, width = image.shape[:2]
    rows, columns = torch.meshgrid(
        *(torch.arange(size, device=image.device) for size in (height, width)), indexing="ij"
    )
    positions = torch.stack([columns, rows], dim=2) / settings.bilateral_std
    return torch.cat([positions, image / settings.colour_std], dim=2).flatten(0, 1)


def _symmetric(kernel: Filter, features: Tensor) -> Filter:
    """Return the filter with its kernel K normalised to D^-1/2 K D^-1/2, where D holds the row sums of K."""
    scale = kernel(torch.ones_like(features[:, :1])).rsqrt()
    return lambda values: kernel(values * scale) * scale


def _exact(features: Tensor) -> Filter:
    """Return the filter that sums over all pixels, weighted by exp(-distance**2 / 2)."""
    rows = max(1, MAX_PAIRS // len(features))

    def kernel(values: Tensor) -> Tensor:
        return torch.cat([_gaussian(block, features) @ values for block in torch.split(features, rows)])

    return kernel


def _gaussian(rows: Tensor, columns: Tensor) -> Tensor:
    """Return exp(-distance**2 / 2), (R, C), of (R, d) and (C, d) points."""
    # Distances by matrix multiplication would lose precision to cancellation for distant points.
    return (torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist").square() / -2).exp()


def _spatial(height: int, width: int, std: float, device: torch.device) -> Filter:
    """Return the normalised filter exp(-distance**2 / 2 std**2) of a grid of pixels, as two separable filters."""
    along_column, along_row = (_band(size, std, device) for size in (height, width))

    def kernel(values: Tensor) -> Tensor:
        values = torch.cat([weights @ values.view(height, -1)[span] for span, weights in along_column])
        values = values.view(height, width, -1)
        return torch.cat([weights @ values[:, span] for span, weights in along_row], dim=1).flatten(0, 1)

    return kernel


def _band(size: int, std: float, device: torch.device) -> list[tuple[slice, Tensor]]:
    """Return D^-1/2 K D^-1/2 of a line of pixels, as blocks of rows: the span of non-zero columns, and the block.

    The kernel of a grid is the product of the kernels of its lines, and so are its row sums and its normalised kernel.
    """
    positions = torch.arange(size, device=device)[:, None] / std
    # Beyond six standard deviations the weights vanish in float32 rounding.
    reach = math.ceil(6 * std)
    spans = [slice(max(0, start - reach), start + BLOCK + reach) for start in range(0, size, BLOCK)]
    blocks = [
        _gaussian(block, positions[span]) for block, span in zip(torch.split(positions, BLOCK), spans, strict=True)
    ]
    scale = torch.cat([block.sum(dim=1) for block in blocks]).rsqrt()
    return [
        (span, rows[:, None] * block * scale[span])
        for rows, block, span in zip(torch.split(scale, BLOCK), blocks, spans, strict=True)
    ]
