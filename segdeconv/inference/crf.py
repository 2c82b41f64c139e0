"""The fully connected conditional random field with which DeconvNet and DeepLab sharpen their probabilities.

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

# (P, C) values of P pixels -> (P, C): every pixel's become a weighted sum over all pixels.
Filter = Callable[[Tensor], Tensor]

CLIP = 1e-5  # probabilities below it count as it, as in pydensecrf
BLOCK = 32  # rows or columns of pixels to one matrix product
PAIRS = 2**24  # pixel pairs whose weights the exact filter holds at once: 64 MB


@dataclass(frozen=True, kw_only=True)
class CRF:
    """Two pixels should have the same class if they are close (spatial), and if near and alike in colour (bilateral).

    The defaults are those of DeconvNet's released code. Deviations in pixels, for colours in steps of 0..255.
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
    """(C, H, W) probabilities of the classes, and the image (H, W, channels) uint8 -> (C, H, W) float32, refined.

    Mean field with Potts compatibility: q <- softmax(log p + sum of weight * K q over the kernels), all pixels and
    classes at once. Each K is normalised from both sides, D^-1/2 K D^-1/2 with D the row sums of K, and a pixel counts
    itself: what pydensecrf does by default (NORMALIZE_SYMMETRIC). The paper's own code divided by D after filtering.

    The spatial kernel is exact. The bilateral one is a permutohedral lattice, within 10 % of exact weighted sums and as
    a rule 5 % (root mean square), or itself exact, in a time that grows with the square of the pixels, if `exact`.

    Runs where `probabilities` are; the same input gives the same bits. Memory grows with the pixels: 2 kB each with 21
    classes (0.4 GB for 500x375), 6 kB with 150, half as much again if each pixel has a colour of its own. An image of
    16 bit is made one of 8 by `draw.shown`.
    """
    settings = settings or CRF()
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image.copy())  # one that is read-only, as Pillow's are, makes torch warn
    if probabilities.ndim != 3 or image.ndim != 3 or probabilities.shape[1:] != image.shape[:2]:
        raise UsageError(
            f"a CRF was given probabilities of shape {tuple(probabilities.shape)} and an image of shape "
            f"{tuple(image.shape)} - they are (C, H, W) and (H, W, channels), of equal H and W"
        )
    if image.dtype != torch.uint8:
        raise UsageError(f"a CRF was given an image of {image.dtype} - its colours must be uint8, 0 to 255")
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
        log = probabilities.float().clamp(CLIP, 1).log().flatten(1).T.contiguous()
        q = log.softmax(dim=1)
        for _ in range(settings.iterations):
            scores = log.clone()
            for weight, kernel in kernels:
                scores.add_(kernel(q), alpha=weight)
            q = scores.softmax(dim=1)
    return q.T.reshape(num_classes, height, width)


def _features(image: Tensor, settings: CRF) -> Tensor:
    """(H, W, channels) uint8 -> (H * W, 2 + channels): place and colour, in standard deviations."""
    height, width = image.shape[:2]
    rows, columns = torch.meshgrid(
        *(torch.arange(size, device=image.device) for size in (height, width)), indexing="ij"
    )
    place = torch.stack([columns, rows], dim=2) / settings.bilateral_std
    return torch.cat([place, image / settings.colour_std], dim=2).flatten(0, 1)


def _symmetric(kernel: Filter, features: Tensor) -> Filter:
    """The filter with its kernel K as D^-1/2 K D^-1/2, D = its row sums."""
    scale = kernel(torch.ones_like(features[:, :1])).rsqrt()
    return lambda values: kernel(values * scale) * scale


def _exact(features: Tensor) -> Filter:
    """The sum over all pixels weighted by exp(-distance**2 / 2)."""
    rows = max(1, PAIRS // len(features))

    def kernel(values: Tensor) -> Tensor:
        return torch.cat([_gaussian(block, features) @ values for block in torch.split(features, rows)])

    return kernel


def _gaussian(rows: Tensor, columns: Tensor) -> Tensor:
    """(R, d) and (C, d) points -> (R, C), exp(-distance**2 / 2)."""
    # Not by a matrix product, in which the squares of far points cancel.
    return (torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist").square() / -2).exp()


def _spatial(height: int, width: int, std: float, device: torch.device) -> Filter:
    """The normalised filter exp(-distance**2 / 2 std**2) of a grid of pixels: one along columns, one along rows."""
    along_column, along_row = (_band(size, std, device) for size in (height, width))

    def kernel(values: Tensor) -> Tensor:
        values = torch.cat([weights @ values.view(height, -1)[span] for span, weights in along_column])
        values = values.view(height, width, -1)
        return torch.cat([weights @ values[:, span] for span, weights in along_row], dim=1).flatten(0, 1)

    return kernel


def _band(size: int, std: float, device: torch.device) -> list[tuple[slice, Tensor]]:
    """D^-1/2 K D^-1/2 of a line of pixels, by blocks of rows: the columns that are not 0, and the block.

    The kernel of a grid is the product of its lines' kernels, and so are its row sums and its normalised kernel.
    """
    places = torch.arange(size, device=device)[:, None] / std
    # Beyond six deviations the weights are lost in float32's rounding.
    reach = math.ceil(6 * std)
    spans = [slice(max(0, start - reach), start + BLOCK + reach) for start in range(0, size, BLOCK)]
    blocks = [_gaussian(block, places[span]) for block, span in zip(torch.split(places, BLOCK), spans, strict=True)]
    scale = torch.cat([block.sum(dim=1) for block in blocks]).rsqrt()
    return [
        (span, rows[:, None] * block * scale[span])
        for rows, block, span in zip(torch.split(scale, BLOCK), blocks, spans, strict=True)
    ]
