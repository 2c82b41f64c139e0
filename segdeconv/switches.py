"""Switches: which cell of each 2x2 window won, and putting a value back into that cell.

A 2x2 max-pool loses the place of the maximum. Kept as a *switch*, two bits per window, it lets the decoder put a
value back where the maximum was: the other three cells get zeros. Zeiler & Fergus 2013, section 2.1,
https://arxiv.org/abs/1311.2901; Noh et al. 2015, section 3.2, https://arxiv.org/abs/1505.04366; Badrinarayanan et
al. 2017, section 3, https://arxiv.org/abs/1511.00561.

Pooling is ceil-mode, as in the originals: an odd side keeps its last row or column as a window of its own (45 -> 23),
so any H, W works. Bit for bit the results are those of `max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)`
and `max_unpool2d(..., output_size=size)`, in values, places, ties (the first cell wins) and gradients, but the
switches take 1 byte instead of 8 and unpooling is legal under `torch.use_deterministic_algorithms(True)`.

Each operation exists three times. *Eager*: the fastest that torch's own kernels give. *Plain*: one tensor expression
with no indices and no scatter, for torch.compile and torch.export, with free sizes. On a GPU with Triton, *kernels.py*:
one pass over memory. Pooling, unpooling and reading by switches are each other's gradients, so three small autograd
functions close the circle and no input is kept for the backward pass.

Switches come one to a byte, or *packed*, four channels to a byte: wherever switches are taken, both are, told apart by
the number of channels (of a single channel they are the same).
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pooling(NamedTuple):
    """What a max-pool returns.

    features: (N, C, ceil(H/2), ceil(W/2)), the maxima.
    switches: same shape, uint8, `2*dy + dx` in 0..3: the winning cell of each window; packed, (N, ceil(C/4), h, w).
    size: (H, W) before pooling; unpooling needs it, since 45 and 46 both pool to 23.
    """

    features: Tensor
    switches: Tensor
    size: tuple[int, int]


def max_pool(x: Tensor, *, packed: bool = False) -> Pooling:
    """2x2 max-pool with stride 2 that remembers where each maximum was.

    x: (N, C, H, W), any floating dtype, any H, W >= 1. A window with a NaN gives NaN; which cell it names is
    unspecified.
    packed: switches of two bits, see `pack`; what is kept for the backward pass is packed too.

    >>> max_pool(torch.tensor([[[[1., 5., 2.], [3., 4., 9.], [8., 7., 6.]]]])).switches
    tensor([[[[1, 2],
              [0, 0]]]], dtype=torch.uint8)
    """
    features, switches = _MaxPool.apply(x, packed)
    return Pooling(features, switches, (x.shape[-2], x.shape[-1]))


def unpool(x: Tensor, switches: Tensor, size: tuple[int, int]) -> Tensor:
    """Put every value of x into the cell its switch names, and zeros into the other three.

    x: (N, C, h, w); switches: (N, C, h, w) uint8 from `max_pool`, or packed; size: the (H, W) that was pooled.
    Returns (N, C, H, W).

    >>> unpool(torch.tensor([[[[7.]]]]), torch.tensor([[[[3]]]], dtype=torch.uint8), (2, 2))
    tensor([[[[0., 0.],
              [0., 7.]]]])
    """
    if not torch.compiler.is_compiling():
        _check(x, switches, size)
    return _Unpool.apply(x, switches, size[0], size[1], False)


def pack(switches: Tensor) -> Tensor:
    """Four to a byte: (N, C, h, w) uint8 in 0..3 -> (N, ceil(C/4), h, w) uint8, in the same memory format.

    Channel c is in byte c // 4, at bits 2 (c % 4) and 2 (c % 4) + 1; bits of channels that are not there are 0.

    >>> pack(torch.tensor([3, 2, 1, 0, 3], dtype=torch.uint8).view(1, 5, 1, 1)).flatten().tolist()  # 0b00011011
    [27, 3]
    """
    missing = -switches.shape[1] % 4
    if missing:
        switches = F.pad(switches, (0, 0, 0, 0, 0, missing))
    packed = switches[:, 0::4]
    for position in range(1, 4):
        packed = packed | (switches[:, position::4] << 2 * position)
    return packed


def unpack(packed: Tensor, channels: int) -> Tensor:
    """What `pack` was given, of so many channels.

    >>> unpack(torch.tensor([27, 3], dtype=torch.uint8).view(1, 2, 1, 1), 5).flatten().tolist()
    [3, 2, 1, 0, 3]
    """
    codes = [(packed >> 2 * position) & 3 for position in range(4)]
    if torch.compiler.is_compiling():
        return torch.stack(codes, dim=2).flatten(1, 2)[:, :channels]
    # In place, since stacking would lose the memory format.
    shape = (packed.shape[0], channels, *packed.shape[2:])
    switches = torch.empty(shape, dtype=torch.uint8, device=packed.device, memory_format=_layout(packed))
    for position, code in enumerate(codes):
        part = switches[:, position::4]
        part.copy_(code[:, : part.shape[1]])
    return switches


def _layout(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _check(x: Tensor, switches: Tensor, size: tuple[int, int]) -> None:
    n, c, h, w = x.shape
    shapes = ((n, c, h, w), (n, (c + 3) // 4, h, w))
    pooled = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    if switches.dtype != torch.uint8 or tuple(switches.shape) not in shapes or (h, w) != pooled:
        raise ValueError(
            f"cannot unpool values of shape {tuple(x.shape)} to size {tuple(size)} with {switches.dtype} switches of "
            f"shape {tuple(switches.shape)}: switches are uint8, of the shape of the values or four channels to a "
            f"byte, and pool size to {pooled}"
        )


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
        kernels = _kernels(x)
        if kernels is not None:
            return kernels.pool(x, packed=packed)
        features, switches = _pool_plain(x) if torch.compiler.is_compiling() else _pool_eager(x)
        return features, pack(switches) if packed else switches

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
        (x, _), (_, switches) = inputs, output
        ctx.mark_non_differentiable(switches)
        ctx.save_for_backward(switches)
        ctx.size = (x.shape[-2], x.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (switches,) = ctx.saved_tensors
        return _Unpool.apply(gradient, switches, *ctx.size, True), None


class _Unpool(torch.autograd.Function):
    """unsigned_zero: torch adds gradients into zeros, so that of -0.0 becomes 0.0; the gradient of pooling does too."""

    @staticmethod
    def forward(x: Tensor, switches: Tensor, height: int, width: int, unsigned_zero: bool) -> Tensor:
        kernels = _kernels(x)
        if kernels is not None:
            return kernels.place(x, switches, height, width, unsigned_zero=unsigned_zero)
        place = _place_plain if torch.compiler.is_compiling() else _place_eager
        return place(x + 0.0 if unsigned_zero else x, _bytes(switches, x), height, width)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int, bool], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (switches,) = ctx.saved_tensors
        return _Pick.apply(gradient, switches), None, None, None, None


class _Pick(torch.autograd.Function):
    """Read the cell each switch names: the gradient of unpooling, and the transpose of it."""

    @staticmethod
    def forward(x: Tensor, switches: Tensor) -> Tensor:
        kernels = _kernels(x)
        if kernels is not None:
            return kernels.pick(x, switches)
        pick = _pick_plain if torch.compiler.is_compiling() else _pick_eager
        return pick(x, _bytes(switches, x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, switches = inputs
        ctx.save_for_backward(switches)
        ctx.size = (x.shape[-2], x.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (switches,) = ctx.saved_tensors
        return _Unpool.apply(gradient, switches, *ctx.size, False), None


def _bytes(switches: Tensor, x: Tensor) -> Tensor:
    """Switches one to a byte, for the channels of x."""
    return switches if switches.shape[1] == x.shape[1] else unpack(switches, x.shape[1])


def _kernels(x: Tensor) -> ModuleType | None:
    return None if torch.compiler.is_compiling() or not x.is_cuda else triton_kernels(x.device)


@functools.cache
def triton_kernels(device: torch.device) -> ModuleType | None:
    """The module `kernels` where a GPU can run it, else None: then torch's own kernels do the work, more slowly."""
    if importlib.util.find_spec("triton") is None:
        return None
    one = torch.zeros(1, 1, 1, 1, device=device)
    try:
        from segdeconv import kernels

        kernels.pool(one)
    except Exception as error:  # no C compiler, no Python headers, too old a GPU: each of its own type
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"Triton does not run on {device} ({type(error).__name__}: {reason}), so pooling and unpooling take "
            "torch's slower kernels - Triton needs a C compiler and a GPU of compute capability 7.0 or more",
            stacklevel=2,
        )
        return None
    return kernels


# Eager. Values are handled as integers of their size, which selects bits exactly (no -0.0, no NaN * 0) and runs
# vectorised, as `torch.where` on strided views does not; and comparisons write such integers, because a bool would be
# converted for every product.

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # the integer type of a value's size in bytes


def _pool_eager(x: Tensor) -> tuple[Tensor, Tensor]:
    features, indices = F.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)
    height, width = features.shape[-2:]
    # An index is row * W + column in the plane; less that of its window's first cell it is 0, 1, W or W + 1.
    rows = torch.arange(height, dtype=torch.int32, device=x.device) * (2 * x.shape[-1])
    columns = torch.arange(width, dtype=torch.int32, device=x.device) * 2
    within = indices.to(torch.int32).sub_(rows[:, None] + columns)
    lower = within >= x.shape[-1]
    within.sub_(lower.to(torch.int32).mul_(x.shape[-1]))
    return features, within.to(torch.uint8).add_(lower.view(torch.uint8).mul(2))


def _place_eager(x: Tensor, switches: Tensor, height: int, width: int) -> Tensor:
    out = torch.empty((*x.shape[:2], height, width), dtype=x.dtype, device=x.device, memory_format=_layout(x))
    bits = _BITS[x.element_size()]
    values, cells, codes = x.view(bits), out.view(bits), switches.to(bits)
    here = torch.empty_like(codes)
    for code in range(4):
        cell = cells[..., code // 2 :: 2, code % 2 :: 2]
        h, w = cell.shape[-2:]
        torch.eq(codes, code, out=here)
        torch.mul(values[..., :h, :w], here[..., :h, :w], out=cell)
    return out


def _pick_eager(x: Tensor, switches: Tensor) -> Tensor:
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


# Plain. Parity of H and W is unknown while a graph is traced: the cells of all windows come from a map that is wider by
# one row and column of what cannot win, and windows are spread over four times the channels, shuffled into place and
# cut to size.


def _cells(x: Tensor, fill: float) -> list[Tensor]:
    """The four cells of every window, by code: four of (N, C, ceil(H/2), ceil(W/2))."""
    height, width = x.shape[-2:]
    wider = F.pad(x, (0, 1, 0, 1), value=fill)
    return [wider[..., dy : height + dy : 2, dx : width + dx : 2] for dy in (0, 1) for dx in (0, 1)]


def _pool_plain(x: Tensor) -> tuple[Tensor, Tensor]:
    features, *others = _cells(x, float("-inf"))
    switches = torch.zeros_like(features, dtype=torch.uint8)
    for code, cell in enumerate(others, start=1):
        wins = (cell > features) | (cell != cell)
        features = torch.where(wins, cell, features)
        switches = torch.where(wins, code, switches)
    return features, switches.to(torch.uint8)


def _place_plain(x: Tensor, switches: Tensor, height: int, width: int) -> Tensor:
    codes = torch.arange(4, dtype=torch.uint8, device=x.device)[:, None, None]
    cells = torch.where(switches[:, :, None] == codes, x[:, :, None], 0)  # (N, C, 4, h, w)
    placed = F.pixel_shuffle(cells.flatten(1, 2), 2)
    # By a negative padding: of a slice torch.export would keep its bounds, and not know that the size is this.
    return F.pad(placed, (0, width - placed.shape[-1], 0, height - placed.shape[-2]))


def _pick_plain(x: Tensor, switches: Tensor) -> Tensor:
    picked, *others = _cells(x, 0.0)
    for code, cell in enumerate(others, start=1):
        picked = torch.where(switches == code, cell, picked)
    return picked
