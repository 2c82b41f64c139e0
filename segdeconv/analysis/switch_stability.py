"""Stability of the switches of an image: changes of the maxima under minimal perturbations of the image.

The perturbed views of an image are its mirror image, shifts by one pixel to each of four sides, and the image with a
little noise. Where the network is certain, the same positions win again; where several are almost equal, others win.

The windows of two views do not coincide: a shift by a pixel moves every window border, and in a mirrored map of odd
size other neighbours share a window. Therefore positions are compared, not codes. A cell of the map before pool k
covers 2^(k-1) pixels of the image, and its maximum is *preserved* if in the other view, in the same channel, a cell won
whose centre is at most half a cell away in each direction, in pixels of the image. For the first pool this is the same
pixel; for deeper pools the same cell, or either of two cells if a shift by one pixel falls halfway between them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segdeconv.analysis.switch_paths import over_windows
from segdeconv.switches.ops import Pooling
from segdeconv.system.seeding import key

NOISE = 2 / 255  # standard deviation of the noise, as a fraction of the range of stored values
STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))
NUM_NOISY = 2


class PerturbedImage(NamedTuple):
    """A perturbed view of an image.

    Attributes:
        image: (N, C, H, W).
        mirrored: Whether the columns are reversed.
        step: (dy, dx), the shift of the content.
    """

    image: Tensor
    mirrored: bool = False
    step: tuple[int, int] = (0, 0)


def views(image: Tensor, noise: Tensor, *, seed: int = 0) -> Iterator[PerturbedImage]:
    """Yield the mirrored image, four shifts by one pixel, which repeat the edge, and two noisy copies.

    Args:
        image: (N, C, H, W), normalised.
        noise: (C,), the standard deviation of the noise per channel, in the same units.
        seed: Seed of the noise, which is the same for every image of a size.
    """
    height, width = image.shape[-2:]
    yield PerturbedImage(image.flip(-1), mirrored=True)
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    for dy, dx in STEPS:
        yield PerturbedImage(padded[..., 1 - dy : 1 - dy + height, 1 - dx : 1 - dx + width], step=(dy, dx))
    for index in range(NUM_NOISY):
        generator = torch.Generator().manual_seed(key(seed, "noise", index))
        unit_noise = torch.randn(image.shape[1:], generator=generator).to(image.device)
        yield PerturbedImage(image + unit_noise * noise.to(image.device)[:, None, None])


class Instability(NamedTuple):
    """Measures of instability, (levels, N, H, W) float32, the finest level first; a pixel has the value of its window.

    Attributes:
        changed: The fraction of the maxima that are not preserved, over all channels and views, 0..1.
        moved: The activation that is not preserved, >= 0: the sum of those maxima over the channels, averaged over the
            views, in units of the mean activation of a window of this image and level. A window without activations
            can change all of its switches without moving any activation.
    """

    changed: Tensor
    moved: Tensor


def instability(
    pools: Callable[[Tensor], Sequence[Pooling]], image: Tensor, *, noise: Tensor, seed: int = 0
) -> Instability:
    """Measure how the maxima of an image change in its perturbed views. Maxima shifted out of the image do not count.

    Args:
        pools: A function that returns the poolings of an encoder for a batch of images, the finest first.
        image: See `views`.
        noise: See `views`.
        seed: See `views`.
    """
    size = (image.shape[-2], image.shape[-1])
    pooled = pools(image)
    winners = [winning_cells(pooling) for pooling in pooled]
    sums = [torch.zeros(3, *cells.shape[:1], *cells.shape[2:], device=cells.device) for cells in winners]
    num_views = 0
    for view in views(image, noise, seed=seed):
        num_views += 1
        for level, pooling in enumerate(pools(view.image)):
            preserved, inside = is_preserved(winning_cells(pooling), size, level + 1, view)
            lost = winners[level] & ~preserved & inside
            sums[level][0] += lost.sum(dim=1)
            sums[level][1] += (winners[level] & inside).sum(dim=1)
            sums[level][2] += (lost * over_windows(pooled[level].features, pooled[level].size)).sum(dim=1)
    changed, moved = [], []
    totals = [_window_sums(cells) for cells in sums]
    for level, (pooling, (num_lost, num_all, lost_sum)) in enumerate(zip(pooled, totals, strict=True), start=1):
        mean_activation = pooling.features.float().sum(dim=1).mean(dim=(1, 2), keepdim=True)
        changed.append(over_windows(num_lost / num_all.clamp(min=1), size, level))
        moved.append(over_windows(lost_sum / (num_views * mean_activation.clamp(min=1e-12)), size, level))
    return Instability(torch.stack(changed), torch.stack(moved))


def winning_cells(pooling: Pooling) -> Tensor:
    """Return (N, C, H, W) bool: the cells of the map before the pool that won their window."""
    codes = pooling.codes
    rows, columns = (torch.arange(side, device=codes.device) % 2 for side in pooling.size)
    return over_windows(codes, pooling.size) == (rows[:, None] * 2 + columns).to(torch.uint8)


def is_preserved(won: Tensor, size: tuple[int, int], level: int, view: PerturbedImage) -> tuple[Tensor, Tensor]:
    """Return the cells of an image at whose position a cell of a view won.

    Args:
        won: (N, C, h, w) bool, the cells of the view before pool `level` that won.
        size: (H, W) of the image.
        level: The level of the pool, from 1.
        view: The view.

    Returns:
        (N, C, h, w) bool, and (h, w) bool: the cells whose position lies in the view.
    """
    inside = []
    for axis, mirrored in ((2, False), (3, view.mirrored)):
        candidates = _same_position(won.shape[axis], size[axis - 2], 2 ** (level - 1), mirrored, view.step[axis - 2])
        candidates = [indices.to(won.device) for indices in candidates]
        inside.append(torch.stack(candidates).amax(dim=0) >= 0)
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        parts = [won.index_select(axis, index.clamp(min=0)) & (index >= 0).view(shape) for index in candidates]
        won = parts[0] if len(parts) == 1 else parts[0] | parts[1]
    return won, inside[0][:, None] & inside[1]


def _same_position(cells: int, length: int, side: int, mirrored: bool, step: int) -> list[Tensor]:
    """Return for every cell along one axis the cell of a view at most half a cell away, or -1.

    The list has a second entry if some cells have two.
    """
    # Twice the position of the centres, in pixels of the image, so that all numbers are integers.
    centre = 2 * torch.arange(cells) * side + side - 1
    view_centre = (2 * (length - 1) - centre) if mirrored else centre - 2 * step
    near = (centre[:, None] - view_centre).abs() <= side
    near[(centre - (side - 1) > 2 * (length - 1))] = False  # a cell of the padding
    candidates = [torch.where(near.any(dim=1), near.int().argmax(dim=1), -1)]
    if int(near.sum(dim=1).max()) > 1:
        last = cells - 1 - near.flip(1).int().argmax(dim=1)
        candidates.append(torch.where(near.any(dim=1), last, -1))
    return candidates


def _window_sums(cells: Tensor) -> Tensor:
    """Sum (K, N, H, W) over 2x2 windows to (K, N, ceil(H/2), ceil(W/2))."""
    padded = F.pad(cells, (0, cells.shape[-1] % 2, 0, cells.shape[-2] % 2))
    return F.avg_pool2d(padded, 2) * 4
