"""How steady the switches of an image are: whether maxima stay where they are when next to nothing changes.

The image is seen again as its mirror image, moved by a pixel to each of four sides, and with a little noise. Where the
network is sure of what it sees the same places win again; where several are as good as each other, others do.

Windows do not lie on each other in two such views: a pixel's step moves every window border, and mirrored, windows of
an odd map pair other neighbours. So places are compared, not codes. A cell of the map before pool k lies over 2^(k-1)
pixels of the image, and what won there is *found again* if a cell whose middle is at most half a cell away, in each
direction and in pixels of the image, won in the other view, in the same channel. For the first pool that is the same
pixel; for deeper ones, the same cell, or either of two where a step of one pixel falls halfway between them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from segdeconv.analysis.switch_paths import over_windows
from segdeconv.switches.ops import Pooling
from segdeconv.system.seeding import key

NOISE = 2 / 255  # of the range of the stored numbers: the standard deviation of what is added
STEPS = ((0, 1), (0, -1), (1, 0), (-1, 0))
NUM_NOISY = 2


class PerturbedImage(NamedTuple):
    """An image as it is seen again.

    image: (N, C, H, W). mirrored: whether columns are turned round. step: (dy, dx), by which the content was moved.
    """

    image: Tensor
    mirrored: bool = False
    step: tuple[int, int] = (0, 0)


def views(image: Tensor, noise: Tensor, *, seed: int = 0) -> Iterator[PerturbedImage]:
    """Mirrored, four times moved by a pixel, twice with noise.

    image: (N, C, H, W), normalised. noise: (C,), the standard deviation of each channel, in the same units. seed: of
        the noise, which is the same for every image of a size. What moves in repeats the edge.
    """
    height, width = image.shape[-2:]
    yield PerturbedImage(image.flip(-1), mirrored=True)
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    for dy, dx in STEPS:
        yield PerturbedImage(padded[..., 1 - dy : 1 - dy + height, 1 - dx : 1 - dx + width], step=(dy, dx))
    for index in range(NUM_NOISY):
        generator = torch.Generator().manual_seed(key(seed, "noise", index))
        added = torch.randn(image.shape[1:], generator=generator).to(image.device)
        yield PerturbedImage(image + added * noise.to(image.device)[:, None, None])


class Instability(NamedTuple):
    """(levels, N, H, W) float32 each, the finest level first; a pixel has the value of its window in a level's pool.

    changed: 0..1, the share of the maxima that are not found again, over all channels and views.
    moved: from 0, how much of what the window holds is not found again: the sum of those maxima, of a view and over the
        channels, in units of what a window of this image and level holds on average. A window in which nothing is seen
        may change all its switches and moves nothing.
    """

    changed: Tensor
    moved: Tensor


def instability(
    pools: Callable[[Tensor], Sequence[Pooling]], image: Tensor, *, noise: Tensor, seed: int = 0
) -> Instability:
    """What becomes of the maxima of an image in its other views. A maximum that left the image does not count.

    pools: the poolings of an encoder for a batch of images, the finest first. image, noise, seed: see `views`.
    """
    size = (image.shape[-2], image.shape[-1])
    pooled = pools(image)
    places = [won(pooling) for pooling in pooled]
    sums = [torch.zeros(3, *place.shape[:1], *place.shape[2:], device=place.device) for place in places]
    num_views = 0
    for view in views(image, noise, seed=seed):
        num_views += 1
        for level, pooling in enumerate(pools(view.image)):
            here, there = places[level], won(pooling)
            found, inside = is_preserved(there, size, level + 1, view)
            lost = here & ~found & inside
            sums[level][0] += lost.sum(dim=1)
            sums[level][1] += (here & inside).sum(dim=1)
            sums[level][2] += (lost * over_windows(pooled[level].features, pooled[level].size)).sum(dim=1)
    changed, moved = [], []
    for level, (pooling, (some, all_, lost_sum)) in enumerate(zip(pooled, map(_window_sums, sums), strict=True), 1):
        held = pooling.features.float().sum(dim=1).mean(dim=(1, 2), keepdim=True)
        changed.append(over_windows(some / all_.clamp(min=1), size, level))
        moved.append(over_windows(lost_sum / (num_views * held.clamp(min=1e-12)), size, level))
    return Instability(torch.stack(changed), torch.stack(moved))


def won(pooling: Pooling) -> Tensor:
    """(N, C, H, W) bool: the cells, of the map that was pooled, which won their window."""
    codes = pooling.codes
    rows, columns = (torch.arange(side, device=codes.device) % 2 for side in pooling.size)
    return over_windows(codes, pooling.size) == (rows[:, None] * 2 + columns).to(torch.uint8)


def is_preserved(there: Tensor, size: tuple[int, int], level: int, view: PerturbedImage) -> tuple[Tensor, Tensor]:
    """Which cells have a winner of a view at their place.

    there: (N, C, h, w) bool, of the view, the cells before pool `level` that won; size: (H, W) of the image.
    Returns (N, C, h, w) bool, and (h, w) bool: whether a cell's place is in the view at all.
    """
    inside = []
    for axis, mirrored in ((2, False), (3, view.mirrored)):
        candidates = _same_place(there.shape[axis], size[axis - 2], 2 ** (level - 1), mirrored, view.step[axis - 2])
        candidates = [one.to(there.device) for one in candidates]
        inside.append(torch.stack(candidates).amax(dim=0) >= 0)
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        parts = [there.index_select(axis, one.clamp(min=0)) & (one >= 0).view(shape) for one in candidates]
        there = parts[0] if len(parts) == 1 else parts[0] | parts[1]
    return there, inside[0][:, None] & inside[1]


def _same_place(cells: int, length: int, side: int, mirrored: bool, step: int) -> list[Tensor]:
    """Along one axis: of every cell of the image, the cells of a view no further than half a cell away; -1 for none.

    One list, or two where some cells have two.
    """
    here = torch.arange(cells)
    # Twice the place of a middle, in the image's pixels, so that all numbers are whole.
    middle = 2 * here * side + side - 1
    seen = (2 * (length - 1) - middle) if mirrored else middle - 2 * step
    near = (middle[:, None] - seen).abs() <= side
    near[(middle - (side - 1) > 2 * (length - 1))] = False  # a cell of what the image was padded with
    found = [torch.where(near.any(dim=1), near.int().argmax(dim=1), -1)]
    if int(near.sum(dim=1).max()) > 1:
        last = cells - 1 - near.flip(1).int().argmax(dim=1)
        found.append(torch.where(near.any(dim=1), last, -1))
    return found


def _window_sums(cells: Tensor) -> Tensor:
    """(K, N, H, W) -> (K, N, ceil(H/2), ceil(W/2)), of 2x2 windows."""
    padded = F.pad(cells, (0, cells.shape[-1] % 2, 0, cells.shape[-2] % 2))
    return F.avg_pool2d(padded, 2) * 4
