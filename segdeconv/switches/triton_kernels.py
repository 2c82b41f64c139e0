"""Triton kernels for CUDA: pooling, unpooling and picking by switches, each in one pass over memory.

Only `ops.py` calls them, and it imports this file only for tensors on a GPU, because Triton may not be installed. The
results equal those of `ops.py` without them bit for bit. They use no atomics, so results are reproducible.

A *tile* is OUTER x INNER windows, and neighbours in a tile are neighbours in memory:

    layout           outer                          inner      cells of a window
    channels_last    windows, (n, i, j) in a row    channels   four positions, each a run of channels
    contiguous       rows of windows, (n, c, i)     columns    two rows, read whole and split into even and odd

Bytes moved per window, for values of b bytes (4 for float32, 2 for float16 and bfloat16) and switches of s bytes (1,
or 1/4 if packed). The gradient of pooling is `place`, that of unpooling is `pick`:

    pool    4 b read, b + s written          11 of float16
    place   b + s read, 4 b written          11
    pick    4 b + s read, b written          11
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdeconv.switches.packing import pack

# Types of the kernels' pointer arguments; None is the type of the values.
POINTERS = {"x": None, "features": None, "out": None, "switches": "*u8"}

TILE = 1024  # windows per program: eight, or 16 bytes of float16, per thread of four warps


@triton.jit
def _windows(total, h, w, H, W, C, OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Return the positions of this program's windows.

    Returns outer, inner, the masks of outer for windows and for windows with lower cells, the mask of inner, whether
    right cells exist, the offsets of the upper left and the lower left cells, and, (OUTER, INNER) each, offset and mask
    of the windows in a map with one value per window.
    """
    outer = tl.program_id(0) * OUTER + tl.arange(0, OUTER)
    inner = tl.program_id(1) * INNER + tl.arange(0, INNER)
    if CHANNELS_LAST:
        row, j = outer // w, outer % w
        n, i = row // h, row % h
        first = ((n.to(tl.int64) * H + 2 * i) * W + 2 * j) * C
        right = 2 * j + 1 < W
        length, below = C, W * C
    else:
        plane, i = outer // h, outer % h
        first = (plane.to(tl.int64) * H + 2 * i) * W
        right = outer >= 0  # always true: the column masks of the rows decide
        length, below = w, W
    rows, inside = outer < total, inner < length
    places = (outer.to(tl.int64) * length)[:, None] + inner[None, :]
    lower_rows, mask = rows & (2 * i + 1 < H), rows[:, None] & inside[None, :]
    return outer, inner, rows, lower_rows, inside, right, first, first + below, places, mask


@triton.jit
def _read_two(
    x, place, rows, right, inner, inside, W, C, fill,
    OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Return the left and right cells of one row of the windows, (OUTER, INNER) each; `fill` beyond the map."""
    if CHANNELS_LAST:
        cells = x + place[:, None] + inner[None, :]
        left = tl.load(cells, mask=rows[:, None] & inside[None, :], other=fill)
        right_cells = tl.load(cells + C, mask=(rows & right)[:, None] & inside[None, :], other=fill)
    else:
        column = tl.program_id(1) * (2 * INNER) + tl.arange(0, 2 * INNER)
        both = tl.load(x + place[:, None] + column[None, :], mask=rows[:, None] & (column < W)[None, :], other=fill)
        left, right_cells = tl.split(tl.reshape(both, (OUTER, INNER, 2)))
    return left, right_cells


@triton.jit
def _write_two(
    x, place, rows, right, inner, inside, W, C, left, right_cells,
    OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    if CHANNELS_LAST:
        cells = x + place[:, None] + inner[None, :]
        tl.store(cells, left, mask=rows[:, None] & inside[None, :])
        tl.store(cells + C, right_cells, mask=(rows & right)[:, None] & inside[None, :])
    else:
        column = tl.program_id(1) * (2 * INNER) + tl.arange(0, 2 * INNER)
        both = tl.reshape(tl.join(left, right_cells), (OUTER, 2 * INNER))
        tl.store(x + place[:, None] + column[None, :], both, mask=rows[:, None] & (column < W)[None, :])


@triton.jit
def _read_codes(switches, outer, inner, places, mask, h, w, C, CHANNELS_LAST: tl.constexpr, PACKED: tl.constexpr):
    """Return the switch of each window, 0 to 3, from its own byte, or if PACKED from two bits of a shared byte."""
    if PACKED:
        groups = (C + 3) // 4
        if CHANNELS_LAST:
            places = (outer.to(tl.int64) * groups)[:, None] + (inner // 4)[None, :]
            shift = (inner % 4 * 2)[None, :]
        else:
            plane, i = outer // h, outer % h
            n, c = plane // C, plane % C
            places = (((n * groups + c // 4).to(tl.int64) * h + i) * w)[:, None] + inner[None, :]
            shift = (c % 4 * 2)[:, None]
        codes = (tl.load(switches + places, mask=mask, other=0).to(tl.int32) >> shift) & 3
    else:
        codes = tl.load(switches + places, mask=mask, other=0).to(tl.int32)
    return codes


@triton.jit
def _write_codes(
    switches, codes, outer, rows, places, mask, C, OUTER: tl.constexpr, INNER: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Write switches. PACKED puts four neighbours into a byte: four channels of a window only in channels_last."""
    if PACKED:
        groups = (C + 3) // 4
        group = tl.program_id(1) * (INNER // 4) + tl.arange(0, INNER // 4)
        shift = (tl.arange(0, 4) * 2)[None, None, :]
        packed = tl.sum(tl.reshape(codes, (OUTER, INNER // 4, 4)) << shift, axis=2)
        places = (outer.to(tl.int64) * groups)[:, None] + group[None, :]
        tl.store(switches + places, packed.to(tl.uint8), mask=rows[:, None] & (group < groups)[None, :])
    else:
        tl.store(switches + places, codes.to(tl.uint8), mask=mask)


@triton.jit
def _comparable(x):
    """Return x in a type that every GPU, and Triton's interpreter, can compare."""
    return x.to(tl.float32) if x.dtype.is_bf16() else x


@triton.jit
def _better(best, codes, cell, code: tl.constexpr):
    """Return the larger of two cells, the first of equals and the later of NaNs, by selection without arithmetic."""
    a, b = _comparable(cell), _comparable(best)
    wins = (a > b) | (a != a)
    return tl.where(wins, cell, best), tl.where(wins, code, codes)


@triton.jit
def _pool_kernel(
    x, features, switches, total, h, w, H, W, C,
    OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    outer, inner, rows, lower_rows, inside, right, upper, lower, places, mask = _windows(
        total, h, w, H, W, C, OUTER, INNER, CHANNELS_LAST
    )
    fill = float("-inf")
    best, one = _read_two(x, upper, rows, right, inner, inside, W, C, fill, OUTER, INNER, CHANNELS_LAST)
    two, three = _read_two(x, lower, lower_rows, right, inner, inside, W, C, fill, OUTER, INNER, CHANNELS_LAST)
    codes = tl.zeros((OUTER, INNER), tl.int32)
    best, codes = _better(best, codes, one, 1)
    best, codes = _better(best, codes, two, 2)
    best, codes = _better(best, codes, three, 3)
    tl.store(features + places, best, mask=mask)
    _write_codes(switches, codes, outer, rows, places, mask, C, OUTER, INNER, PACKED)


@triton.jit
def _place_kernel(
    x, switches, out, total, h, w, H, W, C,
    OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr, PACKED: tl.constexpr,
    UNSIGNED_ZERO: tl.constexpr,
):  # fmt: skip
    outer, inner, rows, lower_rows, inside, right, upper, lower, places, mask = _windows(
        total, h, w, H, W, C, OUTER, INNER, CHANNELS_LAST
    )
    value = tl.load(x + places, mask=mask, other=0.0)
    codes = _read_codes(switches, outer, inner, places, mask, h, w, C, CHANNELS_LAST, PACKED)
    zero = tl.zeros_like(value)
    if UNSIGNED_ZERO:
        value = tl.where(_comparable(value) == 0, zero, value)
    left, right_cells = tl.where(codes == 0, value, zero), tl.where(codes == 1, value, zero)
    _write_two(out, upper, rows, right, inner, inside, W, C, left, right_cells, OUTER, INNER, CHANNELS_LAST)
    left, right_cells = tl.where(codes == 2, value, zero), tl.where(codes == 3, value, zero)
    _write_two(out, lower, lower_rows, right, inner, inside, W, C, left, right_cells, OUTER, INNER, CHANNELS_LAST)


@triton.jit
def _pick_kernel(
    x, switches, out, total, h, w, H, W, C,
    OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    outer, inner, rows, lower_rows, inside, right, upper, lower, places, mask = _windows(
        total, h, w, H, W, C, OUTER, INNER, CHANNELS_LAST
    )
    codes = _read_codes(switches, outer, inner, places, mask, h, w, C, CHANNELS_LAST, PACKED)
    picked, one = _read_two(x, upper, rows, right, inner, inside, W, C, 0.0, OUTER, INNER, CHANNELS_LAST)
    two, three = _read_two(x, lower, lower_rows, right, inner, inside, W, C, 0.0, OUTER, INNER, CHANNELS_LAST)
    picked = tl.where(codes == 1, one, picked)
    picked = tl.where(codes == 2, two, picked)
    picked = tl.where(codes == 3, three, picked)
    tl.store(out + places, picked, mask=mask)


def pool(x: Tensor, *, packed: bool = False) -> tuple[Tensor, Tensor]:
    """Return the maxima and switches of x, (N, C, H, W); see `switches.max_pool`, and `switches.pack` for `packed`."""
    x, layout = _dense(x)
    features, switches, packs = _empty_pooling(x, layout, packed)
    _launch(_pool_kernel, x, features, switches, x.shape[2:], features, layout, PACKED=packs)
    return features, pack(switches) if packed and not packs else switches


def _empty_pooling(x: Tensor, layout: torch.memory_format, packed: bool) -> tuple[Tensor, Tensor, bool]:
    """Return empty features and switches, and whether the kernel packs the switches itself.

    A kernel packs in channels_last only; contiguous switches are packed afterwards with `pack`.
    """
    n, c, height, width = x.shape
    pooled = ((height + 1) // 2, (width + 1) // 2)
    packs = packed and layout == torch.channels_last
    features = torch.empty((n, c, *pooled), dtype=x.dtype, device=x.device, memory_format=layout)
    shape = (n, (c + 3) // 4 if packs else c, *pooled)
    return features, torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=layout), packs


def place(x: Tensor, switches: Tensor, height: int, width: int, *, unsigned_zero: bool = False) -> Tensor:
    """Unpool x, (N, C, h, w), to (N, C, height, width); see `switches.unpool`.

    Args:
        x: (N, C, h, w).
        switches: (N, C, h, w) uint8, or packed.
        height: Rows of the result.
        width: Columns of the result.
        unsigned_zero: Write 0.0 for -0.0.
    """
    x, layout = _dense(x)
    switches = switches.contiguous(memory_format=layout)
    out = torch.empty((*x.shape[:2], height, width), dtype=x.dtype, device=x.device, memory_format=layout)
    packed = switches.shape[1] != x.shape[1]
    _launch(_place_kernel, x, switches, out, (height, width), x, layout, PACKED=packed, UNSIGNED_ZERO=unsigned_zero)
    return out


def pick(x: Tensor, switches: Tensor) -> Tensor:
    """Return the cell of x, (N, C, H, W), that each switch selects, (N, C, h, w)."""
    x, layout = _dense(x)
    switches = switches.contiguous(memory_format=layout)
    shape = (*x.shape[:2], *switches.shape[2:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    packed = switches.shape[1] != x.shape[1]
    _launch(_pick_kernel, x, switches, out, x.shape[2:], out, layout, PACKED=packed)
    return out


def _dense(x: Tensor) -> tuple[Tensor, torch.memory_format]:
    """Return the tensor in the memory format that is closest to its strides, and that format."""
    if x.is_contiguous():
        return x, torch.contiguous_format
    if x.stride(1) == 1:  # channels_last, or a slice of a channels_last map
        return x.contiguous(memory_format=torch.channels_last), torch.channels_last
    return x.contiguous(), torch.contiguous_format


def _tiles(small: Tensor, layout: torch.memory_format, tile: int) -> tuple[int, int, int, tuple[int, int]]:
    """Return the outer length, OUTER, INNER and the grid for a tensor that has one value per window."""
    n, c, h, w = small.shape
    total, length = (n * h * w, c) if layout == torch.channels_last else (n * c * h, w)
    inner = max(4, min(256, triton.next_power_of_2(length)))
    outer = tile // inner
    return total, outer, inner, (triton.cdiv(total, outer), triton.cdiv(length, inner))


def _launch(
    kernel: Any,
    *arguments: Any,  # tensors, the (H, W) of the larger map, the tensor with one value per window, the memory format
    tile: int = TILE,
    **constants: bool,
) -> None:
    *tensors, (height, width), small, layout = arguments
    _, c, h, w = small.shape
    if small.numel() == 0:
        return
    total, outer, inner, grid = _tiles(small, layout, tile)
    with torch.cuda.device_of(small):  # Triton launches on the current device
        kernel[grid](
            *tensors, total, h, w, height, width, c,
            OUTER=outer, INNER=inner, CHANNELS_LAST=layout == torch.channels_last, **constants,
        )  # fmt: skip
