"""Triton kernels for CUDA: pooling, unpooling and reading by switches, each in one pass over memory.

Only `ops.py` calls them, and imports this file only once a tensor lies on a GPU: Triton is not everywhere. Bit for
bit they give what `ops.py` gives without them. No atomics, so the same bits every time.

A *tile* is OUTER x INNER windows, and what lies side by side in it lies side by side in memory:

    layout           outer                          inner      cells of a window
    channels_last    windows, (n, i, j) in a row    channels   four places, each a run of channels
    contiguous       rows of windows, (n, c, i)     columns    two rows, read whole and split into even and odd

Bytes that must move for one window of values of b bytes (4 of float32, 2 of float16 and bfloat16), s = 1, or 1/4 of
packed switches; the gradient of pooling is a placing and that of unpooling a picking:

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

# What the kernels take pointers to, and of which type; None is the type of the values.
POINTERS = {"x": None, "features": None, "out": None, "switches": "*u8"}

TILE = 1024  # windows of a program: eight in each thread of four warps, 16 bytes of float16


@triton.jit
def _windows(total, h, w, H, W, C, OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where the windows of this program are.

    Returns outer, inner, the masks of outer for windows and for those that have lower cells, the mask of inner, whether
    right cells exist, the places of the upper and the lower cells on the left, and (OUTER, INNER) each, place and mask
    of a window in a map that has one value a window.
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
        right = outer >= 0  # the mask of a row says it, column by column
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
    """The left and the right cells of one row of the windows, (OUTER, INNER) each; `fill` where there is none."""
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
    """The switch of each window, 0 to 3, from a byte of its own or from two bits of one that four channels share."""
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
    """PACKED: four neighbours into a byte, which are four channels of a window in channels_last alone."""
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
    """The same number in a type that every GPU, and Triton's interpreter, compares."""
    return x.to(tl.float32) if x.dtype.is_bf16() else x


@triton.jit
def _better(best, codes, cell, code: tl.constexpr):
    """The larger of two cells, the first of equals, the later of NaNs; a value is moved as it is, never computed."""
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
    """The maxima and switches of (N, C, H, W): see `switches.max_pool`, and `switches.pack` for `packed`."""
    x, layout = _dense(x)
    features, switches, within = _empty_pooling(x, layout, packed)
    _launch(_pool_kernel, x, features, switches, x.shape[2:], features, layout, PACKED=within)
    return features, pack(switches) if packed and not within else switches


def _empty_pooling(x: Tensor, layout: torch.memory_format, packed: bool) -> tuple[Tensor, Tensor, bool]:
    """Features and switches for a kernel to write, and whether it packs these; in contiguous ones `pack` has to."""
    n, c, height, width = x.shape
    pooled = ((height + 1) // 2, (width + 1) // 2)
    within = packed and layout == torch.channels_last
    features = torch.empty((n, c, *pooled), dtype=x.dtype, device=x.device, memory_format=layout)
    shape = (n, (c + 3) // 4 if within else c, *pooled)
    return features, torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=layout), within


def place(x: Tensor, switches: Tensor, height: int, width: int, *, unsigned_zero: bool = False) -> Tensor:
    """(N, C, h, w) -> (N, C, height, width): see `switches.unpool`.

    unsigned_zero: write 0.0 for -0.0.
    """
    x, layout = _dense(x)
    switches = switches.contiguous(memory_format=layout)
    out = torch.empty((*x.shape[:2], height, width), dtype=x.dtype, device=x.device, memory_format=layout)
    packed = switches.shape[1] != x.shape[1]
    _launch(_place_kernel, x, switches, out, (height, width), x, layout, PACKED=packed, UNSIGNED_ZERO=unsigned_zero)
    return out


def pick(x: Tensor, switches: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, h, w): the cell that each switch names."""
    x, layout = _dense(x)
    switches = switches.contiguous(memory_format=layout)
    shape = (*x.shape[:2], *switches.shape[2:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    packed = switches.shape[1] != x.shape[1]
    _launch(_pick_kernel, x, switches, out, x.shape[2:], out, layout, PACKED=packed)
    return out


def _dense(x: Tensor) -> tuple[Tensor, torch.memory_format]:
    """The tensor in the layout that it comes nearest to, and that layout."""
    if x.is_contiguous():
        return x, torch.contiguous_format
    if x.stride(1) == 1:  # channels_last, or a part of such a map
        return x.contiguous(memory_format=torch.channels_last), torch.channels_last
    return x.contiguous(), torch.contiguous_format


def _tiles(small: Tensor, layout: torch.memory_format, tile: int) -> tuple[int, int, int, tuple[int, int]]:
    """How many outer there are, OUTER, INNER and the numbers of programs for a tensor that has one value a window."""
    n, c, h, w = small.shape
    total, length = (n * h * w, c) if layout == torch.channels_last else (n * c * h, w)
    inner = max(4, min(256, triton.next_power_of_2(length)))
    outer = tile // inner
    return total, outer, inner, (triton.cdiv(total, outer), triton.cdiv(length, inner))


def _launch(
    kernel: Any,
    *given: Any,  # tensors, the (H, W) of the larger map, the tensor that has one value a window, the layout
    tile: int = TILE,
    **constants: bool,
) -> None:
    *tensors, (height, width), small, layout = given
    _, c, h, w = small.shape
    if small.numel() == 0:
        return
    total, outer, inner, grid = _tiles(small, layout, tile)
    with torch.cuda.device_of(small):  # Triton launches on the current one
        kernel[grid](
            *tensors, total, h, w, height, width, c,
            OUTER=outer, INNER=inner, CHANNELS_LAST=layout == torch.channels_last, **constants,
        )  # fmt: skip
