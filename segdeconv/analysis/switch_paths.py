"""Paths along switches: from a window of the deepest pool down to the one pixel that won at every level.

A cell of the map before pool k covers a square of 2^(k-1) pixels of the image. A window of pool k consists of four
cells, its switch selects the one that won, and that cell is a window of pool k - 1. Each pixel thus lies in one window
of the deepest pool, from which the switches lead down to a single pixel. Unpooling follows the same path: it places the
value of the window there. All pixels in one window of the deepest pool lead to the same pixel.

Every channel has its own switches, and convolutions mix the channels between two pools, so that no channel of one pool
corresponds to a channel of the next. A `Rule` therefore selects the cell from all channels, separately in every pool.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from segdeconv.models.encoders import Encoder
from segdeconv.switches.ops import Pooling

# majority: the cell that wins in most of the channels whose maximum in the window is above zero or, if there are none,
#     of all channels; the first in reading order among equals. (A channel without a value above zero carries no
#     activation, and after a ReLU its switch is the first cell.)
# strongest: the cell that wins in the channel with the largest maximum of the window; the first channel among equals.
Rule = Literal["majority", "strongest"]


class Step(NamedTuple):
    """The part of a pixel's path in one pool.

    Attributes:
        level: The level of the pool; 1 is the first, which pools the finest map.
        window: (row, column) in the pooled map.
        cell: The winning cell, `2*dy + dx` in 0..3.
        box: (top, left, bottom, right) of the winning cell in pixels of the image, bottom and right excluded: a square
            of 2^(level-1) pixels, smaller at the end of the image.
        place: (y, x), the centre of the box; at level 1 the pixel itself.
        share: The fraction of the votes of the window that this cell has, 0..1; see `votes`.
    """

    level: int
    window: tuple[int, int]
    cell: int
    box: tuple[int, int, int, int]
    place: tuple[float, float]
    share: float


def path(pooled: Sequence[Pooling], pixel: tuple[int, int], *, rule: Rule = "majority", image: int = 0) -> list[Step]:
    """Return the path of a pixel, from the deepest pool down; it ends at the `place` of the last step.

    Args:
        pooled: The poolings of the encoder, the finest first (`Encoding.pooled`). Paths start at the last one.
        pixel: (y, x) in the image.
        rule: The rule that selects the winning cell from all channels.
        image: The index of the image in the batch.

    Raises:
        ValueError: The pixel is not in the image.

    Examples:
        >>> from segdeconv.switches import max_pool
        >>> finest = max_pool(torch.tensor([[[[0., 0., 3., 0.], [0., 1., 0., 0.]]]]))
        >>> deepest = max_pool(finest.features)  # its only window contains 1 and 3
        >>> [(step.level, step.cell, step.place) for step in path([finest, deepest], (1, 0))]
        [(2, 1, (0.5, 2.5)), (1, 0, (0.0, 2.0))]
    """
    height, width = pooled[0].size
    y, x = pixel
    if not (0 <= y < height and 0 <= x < width):
        raise ValueError(f"pixel {pixel} is not in an image of {height}x{width} (HxW)")
    y, x = y >> len(pooled), x >> len(pooled)
    steps = []
    for level in range(len(pooled), 0, -1):
        window = (y, x)
        pooling = pooled[level - 1]
        one_window = pooling._replace(
            features=pooling.features[image : image + 1, :, y : y + 1, x : x + 1],
            switches=pooling.switches[image : image + 1, :, y : y + 1, x : x + 1],
        )
        cell, counts = int(winners(one_window, rule=rule)), votes(one_window).flatten()
        y, x = 2 * y + cell // 2, 2 * x + cell % 2
        side = 2 ** (level - 1)
        box = (y * side, x * side, min(height, (y + 1) * side), min(width, (x + 1) * side))
        place = ((box[0] + box[2] - 1) / 2, (box[1] + box[3] - 1) / 2)
        steps.append(Step(level, window, cell, box, place, float(counts[cell] / counts.sum())))
    return steps


def sources(pooled: Sequence[Pooling], *, rule: Rule = "majority", image: int = 0) -> Tensor:
    """Return the pixel at which the path of every pixel ends; see `path`.

    Args:
        pooled: The poolings of the encoder, the finest first.
        rule: The rule that selects the winning cell from all channels.
        image: The index of the image in the batch.

    Returns:
        (H, W, 2) int64, (y, x).
    """
    deepest = pooled[-1].features
    places = torch.stack(
        torch.meshgrid(*(torch.arange(side, device=deepest.device) for side in deepest.shape[-2:]), indexing="ij"), -1
    )
    for pooling in reversed(pooled):
        cell = winners(pooling, rule=rule, image=image)[places[..., 0], places[..., 1]].long()
        places = 2 * places + torch.stack([cell // 2, cell % 2], dim=-1)
    return over_windows(places.permute(2, 0, 1), pooled[0].size, len(pooled)).permute(1, 2, 0)


def over_windows(x: Tensor, size: tuple[int, int], levels: int = 1) -> Tensor:
    """Expand the values of windows to the cells or pixels that they contain.

    Args:
        x: (..., h, w), the values of the windows.
        size: The (H, W) of the result.
        levels: The number of pools between the two sizes.

    Returns:
        (..., *size).
    """
    rows, columns = (torch.arange(side, device=x.device) >> levels for side in size)
    return x[..., rows[:, None], columns]


def winners(pooling: Pooling, *, rule: Rule = "majority", image: int = 0) -> Tensor:
    """Return the winning cell of every window of one image.

    Args:
        pooling: A pooling of a batch.
        rule: The rule that selects the winning cell from all channels.
        image: The index of the image in the batch.

    Returns:
        (h, w) uint8, 0..3.
    """
    if rule == "strongest":
        strongest = pooling.features[image].argmax(dim=0, keepdim=True)
        return pooling.codes[image].gather(0, strongest)[0]
    return votes(pooling, image=image).argmax(dim=0).to(torch.uint8)


def votes(pooling: Pooling, *, image: int = 0) -> Tensor:
    """Count the channels in which each cell of a window wins.

    Only channels whose maximum in the window is above zero vote or, if there are none, all channels.

    Args:
        pooling: A pooling of a batch.
        image: The index of the image in the batch.

    Returns:
        (4, h, w) int64.
    """
    codes, voting = pooling.codes[image], pooling.features[image] > 0
    voting = voting | ~voting.any(dim=0)
    return torch.stack([((codes == cell) & voting).sum(dim=0) for cell in range(4)])


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[Pooling]]:
    """Record the poolings of a network's encoder in the yielded list, the finest first.

    The list contains those of the last forward pass. It stays empty if the network has no encoder whose pools keep
    switches (U-Net, DeepLab-LargeFOV).

    Examples:
        >>> from segdeconv.models import SegNet
        >>> network = SegNet(2, stages=((4,), (8,))).eval()
        >>> with torch.no_grad(), recorded(network) as pooled:
        ...     logits = network(torch.zeros(1, 3, 9, 12))
        >>> [tuple(pooling.switches.shape) for pooling in pooled]
        [(1, 4, 5, 6), (1, 8, 3, 3)]
    """
    pooled: list[Pooling] = []

    def record(module: nn.Module, args: Any, encoding: Any) -> None:
        pooled[:] = encoding.pooled

    with ExitStack() as hooks:
        for module in network.modules():
            if isinstance(module, Encoder):
                hooks.enter_context(module.register_forward_hook(record))
        yield pooled
