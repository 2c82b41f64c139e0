"""Pooling, unpooling and picking by switches with torch operations: eager, and plain expressions for graphs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from segdeconv.switches.packing import layout

# Eager. Values are viewed as integers of the same size, which selects bits exactly (no -0.0, no NaN * 0) and runs
# vectorised, unlike `torch.where` on strided views. Comparisons write integers too, because bools would be converted
# for every product.

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # the integer type of a value's size in bytes


def pool_eager(x: Tensor) -> tuple[Tensor, Tensor]:
    features, indices = F.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)
    height, width = features.shape[-2:]
    # An index is row * W + column in the plane; minus the index of its window's first cell it is 0, 1, W or W + 1.
    rows = torch.arange(height, dtype=torch.int32, device=x.device) * (2 * x.shape[-1])
    columns = torch.arange(width, dtype=torch.int32, device=x.device) * 2
    within = indices.to(torch.int32).sub_(rows[:, None] + columns)
    lower = within >= x.shape[-1]
    within.sub_(lower.to(torch.int32).mul_(x.shape[-1]))
    return features, within.to(torch.uint8).add_(lower.view(torch.uint8).mul(2))


def place_eager(x: Tensor, switches: Tensor, height: int, width: int) -> Tensor:
    out = torch.empty((*x.shape[:2], height, width), dtype=x.dtype, device=x.device, memory_format=layout(x))
    bits = _BITS[x.element_size()]
    values, cells, codes = x.view(bits), out.view(bits), switches.to(bits)
    here = torch.empty_like(codes)
    for code in range(4):
        cell = cells[..., code // 2 :: 2, code % 2 :: 2]
        h, w = cell.shape[-2:]
        torch.eq(codes, code, out=here)
        torch.mul(values[..., :h, :w], here[..., :h, :w], out=cell)
    return out


def pick_eager(x: Tensor, switches: Tensor) -> Tensor:
    if x.shape[-2] % 2 or x.shape[-1] % 2:
        x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
    bits = _BITS[x.element_size()]
    cells = x.view(bits)
    # a ^ ((a ^ b) & mask) is b where the mask is all ones, else a: first the column, then the row.
    column, row = (switches & 1).to(bits).neg_(), (switches >> 1).to(bits).neg_()
    upper, lower = (
        (left ^ right).bitwise_and_(column).bitwise_xor_(left)
        for left, right in ((cells[..., y::2, 0::2], cells[..., y::2, 1::2]) for y in (0, 1))
    )
    return lower.bitwise_xor_(upper).bitwise_and_(row).bitwise_xor_(upper).view(x.dtype)


# Plain. The parity of H and W is unknown while a graph is traced. So cells are read from a map padded by one row and
# one column that cannot win, and values are placed into four times as many channels, shuffled into windows and cropped.


def _cells(x: Tensor, fill: float) -> list[Tensor]:
    """Return the four cells of every window in the order of their codes, each (N, C, ceil(H/2), ceil(W/2))."""
    height, width = x.shape[-2:]
    wider = F.pad(x, (0, 1, 0, 1), value=fill)
    return [wider[..., dy : height + dy : 2, dx : width + dx : 2] for dy in (0, 1) for dx in (0, 1)]


def pool_plain(x: Tensor) -> tuple[Tensor, Tensor]:
    features, *others = _cells(x, float("-inf"))
    switches = torch.zeros_like(features, dtype=torch.uint8)
    for code, cell in enumerate(others, start=1):
        wins = (cell > features) | (cell != cell)
        features = torch.where(wins, cell, features)
        switches = torch.where(wins, code, switches)
    return features, switches.to(torch.uint8)


def place_plain(x: Tensor, switches: Tensor, height: int, width: int) -> Tensor:
    codes = torch.arange(4, dtype=torch.uint8, device=x.device)[:, None, None]
    cells = torch.where(switches[:, :, None] == codes, x[:, :, None], 0)  # (N, C, 4, h, w)
    placed = F.pixel_shuffle(cells.flatten(1, 2), 2)
    # Cropped by negative padding: for a slice, torch.export would not infer that the result has this size.
    return F.pad(placed, (0, width - placed.shape[-1], 0, height - placed.shape[-2]))


def pick_plain(x: Tensor, switches: Tensor) -> Tensor:
    picked, *others = _cells(x, 0.0)
    for code, cell in enumerate(others, start=1):
        picked = torch.where(switches == code, cell, picked)
    return picked
