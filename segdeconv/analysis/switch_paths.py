"""Where switches lead: the path of a pixel from the deepest pool down to the one pixel that won at every level.

A cell of the map before pool k lies over a square of 2^(k-1) pixels of the image. A window of pool k is four such
cells, its switch names the one that won, and that cell is a window of pool k - 1: so a pixel has one window in the
deepest pool, and from there the switches lead down to a single pixel. Unpooling goes the same way: what the decoder
says for the window is put there. All pixels under one window of the deepest pool lead to the same pixel.

Every channel has switches of its own, and convolutions mix the channels between two pools, so that no channel of one
pool goes on as a channel of the next. `Rule` says whose word counts, in every pool anew.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from segdeconv.models.encoders import Encoder
from segdeconv.switches.ops import Pooling

# majority: the cell that wins in most channels of the window, of those whose maximum is above zero; where none is, of
#     all channels. Of equals the first in reading order. (A channel with nothing above zero carries no value, and after
#     a ReLU names the first cell.)
# strongest: the cell that wins in the channel whose maximum is the largest of the window; of equals the first channel.
Rule = Literal["majority", "strongest"]


class Step(NamedTuple):
    """One pool on the path of a pixel.

    level: of the pool; 1 is the first, which pools the finest map.
    window: (row, column) in the pooled map.
    cell: the one that won there, `2*dy + dx` in 0..3.
    box: (top, left, bottom, right) of the winning cell in pixels of the image, bottom and right excluded: 2^(level-1)
        pixels a side, less where the image ends.
    place: (y, x), the middle of that box; at level 1 the pixel itself.
    share: of the channels that have a say in the window, those that name this cell, 0..1; see `votes`.
    """

    level: int
    window: tuple[int, int]
    cell: int
    box: tuple[int, int, int, int]
    place: tuple[float, float]
    share: float


def path(pooled: Sequence[Pooling], pixel: tuple[int, int], *, rule: Rule = "majority", image: int = 0) -> list[Step]:
    """The path of a pixel (y, x), from the deepest of the pools down; the last step's place is where it ends.

    pooled: of the encoder, the finest first (`Encoding.pooled`), of images of one batch. image: which of them.
    To start higher up, give fewer pools. Raises ValueError for a pixel that is not in the image.

    >>> from segdeconv.switches import max_pool
    >>> finest = max_pool(torch.tensor([[[[0., 0., 3., 0.], [0., 1., 0., 0.]]]]))
    >>> deepest = max_pool(finest.features)  # whose window holds 1 and 3
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
        here = pooling._replace(
            features=pooling.features[image : image + 1, :, y : y + 1, x : x + 1],
            switches=pooling.switches[image : image + 1, :, y : y + 1, x : x + 1],
        )
        cell, counts = int(winners(here, rule=rule)), votes(here).flatten()
        y, x = 2 * y + cell // 2, 2 * x + cell % 2
        side = 2 ** (level - 1)
        box = (y * side, x * side, min(height, (y + 1) * side), min(width, (x + 1) * side))
        place = ((box[0] + box[2] - 1) / 2, (box[1] + box[3] - 1) / 2)
        steps.append(Step(level, window, cell, box, place, float(counts[cell] / counts.sum())))
    return steps


def sources(pooled: Sequence[Pooling], *, rule: Rule = "majority", image: int = 0) -> Tensor:
    """Where the path of every pixel ends: (H, W, 2) int64, (y, x). What `path` says, of all pixels at once."""
    deepest = pooled[-1].features
    places = torch.stack(
        torch.meshgrid(*(torch.arange(side, device=deepest.device) for side in deepest.shape[-2:]), indexing="ij"), -1
    )
    for pooling in reversed(pooled):
        cell = winners(pooling, rule=rule, image=image)[places[..., 0], places[..., 1]].long()
        places = 2 * places + torch.stack([cell // 2, cell % 2], dim=-1)
    return over_windows(places.permute(2, 0, 1), pooled[0].size, len(pooled)).permute(1, 2, 0)


def over_windows(x: Tensor, size: tuple[int, int], levels: int = 1) -> Tensor:
    """(..., h, w) -> (..., *size): of every cell or pixel, the value of its window, so many pools deeper."""
    rows, columns = (torch.arange(side, device=x.device) >> levels for side in size)
    return x[..., rows[:, None], columns]


def winners(pooling: Pooling, *, rule: Rule = "majority", image: int = 0) -> Tensor:
    """(h, w) uint8: the cell, 0..3, of every window of one image that a rule names."""
    if rule == "strongest":
        strongest = pooling.features[image].argmax(dim=0, keepdim=True)
        return pooling.codes[image].gather(0, strongest)[0]
    return votes(pooling, image=image).argmax(dim=0).to(torch.uint8)


def votes(pooling: Pooling, *, image: int = 0) -> Tensor:
    """(4, h, w) int64: in how many channels each cell of a window wins, of those whose maximum is above zero; where
    none is, of all."""
    codes, counted = pooling.codes[image], pooling.features[image] > 0
    counted = counted | ~counted.any(dim=0)
    return torch.stack([((codes == cell) & counted).sum(dim=0) for cell in range(4)])


@contextmanager
def recorded(network: nn.Module) -> Iterator[list[Pooling]]:
    """While this is open every pass of a network leaves the poolings of its encoder, the finest first, in the list.

    Of the last pass alone; empty if the network has no encoder whose pools keep switches (U-Net, DeepLab-LargeFOV).

    >>> from segdeconv.models import SegNet
    >>> network = SegNet(2, stages=((4,), (8,))).eval()
    >>> with torch.no_grad(), recorded(network) as pooled:
    ...     logits = network(torch.zeros(1, 3, 9, 12))
    >>> [tuple(pooling.switches.shape) for pooling in pooled]
    [(1, 4, 5, 6), (1, 8, 3, 3)]
    """
    pooled: list[Pooling] = []

    def keep(module: nn.Module, given: Any, encoding: Any) -> None:
        pooled[:] = encoding.pooled

    with ExitStack() as hooks:
        for module in network.modules():
            if isinstance(module, Encoder):
                hooks.enter_context(module.register_forward_hook(keep))
        yield pooled
