"""Triton kernels for the end of an encoder stage: batch norm, ReLU and max-pool, forward and backward.

Only `fused.py` calls them, under the same conditions as `triton_kernels.py`, whose tiles of windows they share. All
arithmetic is in float32. Values are rounded to the type of the map before they are compared, as the separate steps
would write them, so that they tie here exactly where they tie there. The kernels use no atomics, so results are
reproducible bit for bit.

Bytes moved per window after the statistics, for values of b bytes (4 for float32, 2 for float16 and bfloat16) and
switches of s bytes (1, or 1/4 if packed). The last column has the bytes of the separate steps, with the ReLU after or
before the pool:

    forward     4 b read, 2 b + s written       13 of float16    31 or 43
    sums        3 b read                         6
    gradient    6 b + s read, 4 b written       21               57 or 75 with the sums
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from segdeconv.switches.packing import pack
from segdeconv.switches.triton_kernels import (
    _better,
    _comparable,
    _dense,
    _empty_pooling,
    _launch,
    _read_codes,
    _read_two,
    _tiles,
    _windows,
    _write_codes,
    _write_two,
)

# Pointer arguments in addition to those of triton_kernels.py.
POINTERS = {"gradient": None, "winners": None, "channels": "*fp32", "sums": "*fp32"}

SUM_TILE = 4096  # windows per program of the summing kernel; large, so that few partial sums remain


@triton.jit
def _of_channel(channels, outer, inner, h, C, CHANNELS_LAST: tl.constexpr):
    """Load one value per channel, broadcast to the windows of a tile."""
    if CHANNELS_LAST:
        values = tl.load(channels + inner, mask=inner < C, other=0.0)[None, :]
    else:
        values = tl.load(channels + outer // h % C)[:, None]
    return values


@triton.jit
def _rectified(x):
    return tl.where(_comparable(x) <= 0, tl.zeros_like(x), x)


@triton.jit
def _normalised(cells, mean, scale, shift, exists, RELU: tl.constexpr):
    """Return cells as the separate steps would have written them, and -inf for cells outside the map."""
    values = ((cells.to(tl.float32) - mean) * scale + shift).to(cells.dtype)
    if RELU:
        values = _rectified(values)
    # Cast, since Triton 3.6 cannot interpret a constant of bfloat16.
    return tl.where(exists, values, tl.full(values.shape, float("-inf"), tl.float32).to(values.dtype))


@triton.jit
def _norm_pool_kernel(
    x, channels, features, winners, switches, total, h, w, H, W, C,
    OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr, PACKED: tl.constexpr,
    RELU_BEFORE: tl.constexpr,
):  # fmt: skip
    outer, inner, rows, lower_rows, inside, right, upper, lower, places, mask = _windows(
        total, h, w, H, W, C, OUTER, INNER, CHANNELS_LAST
    )
    mean = _of_channel(channels, outer, inner, h, C, CHANNELS_LAST)
    scale = _of_channel(channels + C, outer, inner, h, C, CHANNELS_LAST)
    shift = _of_channel(channels + 2 * C, outer, inner, h, C, CHANNELS_LAST)
    zero, one = _read_two(x, upper, rows, right, inner, inside, W, C, 0.0, OUTER, INNER, CHANNELS_LAST)
    two, three = _read_two(x, lower, lower_rows, right, inner, inside, W, C, 0.0, OUTER, INNER, CHANNELS_LAST)

    below = lower_rows[:, None]
    right = right[:, None] if CHANNELS_LAST else (2 * inner + 1 < W)[None, :]
    best = _normalised(zero, mean, scale, shift, rows[:, None], RELU_BEFORE)
    codes = tl.zeros((OUTER, INNER), tl.int32)
    best, codes = _better(best, codes, _normalised(one, mean, scale, shift, right, RELU_BEFORE), 1)
    best, codes = _better(best, codes, _normalised(two, mean, scale, shift, below, RELU_BEFORE), 2)
    best, codes = _better(best, codes, _normalised(three, mean, scale, shift, below & right, RELU_BEFORE), 3)
    winner = tl.where(codes == 1, one, zero)
    winner = tl.where(codes == 2, two, winner)
    winner = tl.where(codes == 3, three, winner)

    tl.store(features + places, _rectified(best), mask=mask)
    tl.store(winners + places, winner, mask=mask)
    _write_codes(switches, codes, outer, rows, places, mask, C, OUTER, INNER, PACKED)


@triton.jit
def _gradient_of_maxima(gradient, features, places, mask):
    """Return the gradient of the features after the backward pass of the ReLU, float32."""
    incoming = tl.load(gradient + places, mask=mask, other=0.0).to(tl.float32)
    return tl.where(tl.load(features + places, mask=mask, other=0.0).to(tl.float32) <= 0, 0.0, incoming)


@triton.jit
def _norm_pool_sums_kernel(
    gradient, features, winners, channels, sums, total, h, w, H, W, C,
    OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    outer, inner, rows, _, inside, _, _, _, windows, mask = _windows(total, h, w, H, W, C, OUTER, INNER, CHANNELS_LAST)
    dy = _gradient_of_maxima(gradient, features, windows, mask)
    winner = tl.load(winners + windows, mask=mask, other=0.0)
    deviation = winner.to(tl.float32) - _of_channel(channels, outer, inner, h, C, CHANNELS_LAST)
    # Windows beyond the map have dy = 0. Each program writes one row of channels, or one column of rows.
    if CHANNELS_LAST:
        places = sums + tl.program_id(0) * C + inner
        second = tl.num_programs(0) * C
        tl.store(places, tl.sum(dy, axis=0), mask=inside)
        tl.store(places + second, tl.sum(dy * deviation, axis=0), mask=inside)
    else:
        places = sums + outer * tl.num_programs(1) + tl.program_id(1)
        second = total * tl.num_programs(1)
        tl.store(places, tl.sum(dy, axis=1), mask=rows)
        tl.store(places + second, tl.sum(dy * deviation, axis=1), mask=rows)


@triton.jit
def _norm_pool_gradient_kernel(
    x, gradient, features, switches, channels, out, total, h, w, H, W, C,
    OUTER: tl.constexpr, INNER: tl.constexpr, CHANNELS_LAST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    outer, inner, rows, lower_rows, inside, right, upper, lower, places, mask = _windows(
        total, h, w, H, W, C, OUTER, INNER, CHANNELS_LAST
    )
    mean = _of_channel(channels, outer, inner, h, C, CHANNELS_LAST)
    scale = _of_channel(channels + C, outer, inner, h, C, CHANNELS_LAST)
    offset = _of_channel(channels + 2 * C, outer, inner, h, C, CHANNELS_LAST)
    slope = _of_channel(channels + 3 * C, outer, inner, h, C, CHANNELS_LAST)
    won = scale * _gradient_of_maxima(gradient, features, places, mask)
    codes = _read_codes(switches, outer, inner, places, mask, h, w, C, CHANNELS_LAST, PACKED)

    zero, one = _read_two(x, upper, rows, right, inner, inside, W, C, 0.0, OUTER, INNER, CHANNELS_LAST)
    zero = tl.where(codes == 0, won, 0.0) - (offset + slope * (zero.to(tl.float32) - mean))
    one = tl.where(codes == 1, won, 0.0) - (offset + slope * (one.to(tl.float32) - mean))
    zero, one = zero.to(out.dtype.element_ty), one.to(out.dtype.element_ty)
    _write_two(out, upper, rows, right, inner, inside, W, C, zero, one, OUTER, INNER, CHANNELS_LAST)
    two, three = _read_two(x, lower, lower_rows, right, inner, inside, W, C, 0.0, OUTER, INNER, CHANNELS_LAST)
    two = tl.where(codes == 2, won, 0.0) - (offset + slope * (two.to(tl.float32) - mean))
    three = tl.where(codes == 3, won, 0.0) - (offset + slope * (three.to(tl.float32) - mean))
    two, three = two.to(out.dtype.element_ty), three.to(out.dtype.element_ty)
    _write_two(out, lower, lower_rows, right, inner, inside, W, C, two, three, OUTER, INNER, CHANNELS_LAST)


def norm_pool(x: Tensor, channels: Tensor, *, relu_before: bool, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Pool relu((x - mean) * scale + shift).

    Args:
        x: (N, C, H, W).
        channels: Mean, scale and shift, (3, C) float32.
        relu_before: Search for the maxima after the ReLU.
        packed: Return packed switches.

    Returns:
        The features, (N, C, h, w); the switches, packed or not; and the winning cells of x, (N, C, h, w).
    """
    x, layout = _dense(x)
    features, switches, packs = _empty_pooling(x, layout, packed)
    winners = torch.empty_like(features)
    _launch(
        _norm_pool_kernel, x, channels, features, winners, switches, x.shape[2:], features, layout,
        PACKED=packs, RELU_BEFORE=relu_before,
    )  # fmt: skip
    return features, pack(switches) if packed and not packs else switches, winners


def norm_pool_sums(gradient: Tensor, features: Tensor, winners: Tensor, channels: Tensor) -> Tensor:
    """Sum, per channel, the gradient that passes the ReLU, and that gradient times the winners' x - mean.

    Args:
        gradient: Gradient of the features, (N, C, h, w).
        features: (N, C, h, w).
        winners: Winning cells of x, (N, C, h, w).
        channels: (k, C) float32, the mean first.

    Returns:
        Both sums, (2, C) float32.
    """
    features, layout = _dense(features)
    gradient, winners = (tensor.contiguous(memory_format=layout) for tensor in (gradient, winners))
    n, c, h, _ = features.shape
    *_, (first, second) = _tiles(features, layout, SUM_TILE)
    shape = (2, first, c) if layout == torch.channels_last else (2, n, c, h, second)
    sums = torch.empty(shape, dtype=torch.float32, device=features.device)
    size = (2 * h, 2 * features.shape[3])  # unused: this kernel reads no cells
    _launch(_norm_pool_sums_kernel, gradient, features, winners, channels, sums, size, features, layout, tile=SUM_TILE)
    return sums.sum(dim=1 if layout == torch.channels_last else (1, 3, 4))


def norm_pool_gradient(x: Tensor, gradient: Tensor, features: Tensor, switches: Tensor, channels: Tensor) -> Tensor:
    """Return the gradient of x, scale * dy - offset - slope * (x - mean), (N, C, H, W).

    dy is the gradient of the features in the winning cells that pass the ReLU, and 0 in all others.

    Args:
        x: (N, C, H, W).
        gradient: Gradient of the features, (N, C, h, w).
        features: (N, C, h, w).
        switches: Packed or not.
        channels: Mean, scale, offset and slope, (4, C) float32.
    """
    x, layout = _dense(x)
    gradient, features, switches = (
        tensor.contiguous(memory_format=layout) for tensor in (gradient, features, switches)
    )  # fmt: skip
    out = torch.empty_like(x)
    _launch(
        _norm_pool_gradient_kernel, x, gradient, features, switches, channels, out, x.shape[2:], features,
        layout, PACKED=switches.shape[1] != x.shape[1],
    )  # fmt: skip
    return out
