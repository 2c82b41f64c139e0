"""Pooling with switches, which record the winning cell of each 2x2 window, and unpooling into that cell.

A 2x2 max-pool loses the position of the maximum. Kept as a *switch*, two bits per window, it lets the decoder put a
value back where the maximum was; the other three cells become zero. Zeiler & Fergus 2013, section 2.1,
https://arxiv.org/abs/1311.2901; Noh et al. 2015, section 3.2, https://arxiv.org/abs/1505.04366; Badrinarayanan et
al. 2017, section 3, https://arxiv.org/abs/1511.00561.

Pooling is ceil-mode, as in the original implementations: the last row or column of an odd side is a window of its own
(45 -> 23), so any H and W work. The results equal those of `max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)`
and `max_unpool2d(..., output_size=size)` bit for bit, in values, positions, ties (the first cell wins) and gradients,
but the switches take 1 byte instead of 8 and unpooling works under `torch.use_deterministic_algorithms(True)`.

Each operation has three implementations. *Eager* is the fastest that torch's own kernels allow. *Plain* is one tensor
expression without indices or scatter, for torch.compile, torch.export with dynamic sizes, and
torch.jit.trace. On a GPU with Triton,
*triton_kernels.py* needs one pass over memory. Pooling, unpooling and picking the cells that the switches select are
each other's gradients, so three small autograd functions suffice and no input is kept for the backward pass.

Switches take one byte each or are *packed*, four channels per byte. Every function that takes switches accepts both
and distinguishes them by the number of channels (for a single channel both forms are the same).
"""

import functools
import importlib.util
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from segdeconv.switches.packing import is_tracing, pack, unpack_if_packed
from segdeconv.switches.torch_kernels import pick_eager, pick_plain, place_eager, place_plain, pool_eager, pool_plain


class Pooling(NamedTuple):
    """Result of a max-pool.

    Attributes:
        features: The maxima, (N, C, ceil(H/2), ceil(W/2)).
        switches: The winning cell of each window, `2*dy + dx` in 0..3, uint8 of the same shape; if packed,
            (N, ceil(C/4), h, w). In the training of a `SoftMaxPool`, weights of all cells, (N, C, H, W) floating point.
        size: (H, W) before pooling; unpooling needs it, because 45 and 46 both pool to 23.
    """

    features: Tensor
    switches: Tensor
    size: tuple[int, int]

    @property
    def codes(self) -> Tensor:
        """The switches in unpacked form, (N, C, h, w) uint8."""
        return unpack_if_packed(self.switches, self.features.shape[1])


def max_pool(x: Tensor, *, packed: bool = False) -> Pooling:
    """Max-pool 2x2 windows with stride 2 and record where each maximum was.

    Args:
        x: (N, C, H, W), any floating dtype, any H, W >= 1. A window with a NaN gives NaN and an unspecified switch.
        packed: Store each switch in two bits, see `pack`, also for the backward pass.

    Examples:
        >>> max_pool(torch.tensor([[[[1., 5., 2.], [3., 4., 9.], [8., 7., 6.]]]])).switches
        tensor([[[[1, 2],
                  [0, 0]]]], dtype=torch.uint8)
    """
    if is_tracing():  # a trace cannot record autograd functions
        features, switches = pool_plain(x)
        switches = pack(switches) if packed else switches
    else:
        features, switches = _MaxPool.apply(x, packed)
    return Pooling(features, switches, (x.shape[-2], x.shape[-1]))


def unpool(x: Tensor, switches: Tensor, size: tuple[int, int]) -> Tensor:
    """Put every value of x into the cell that its switch selects, and zeros into the other three.

    Args:
        x: (N, C, h, w).
        switches: (N, C, h, w) uint8 from `max_pool`, or packed.
        size: The (H, W) that was pooled.

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: The switches or the size do not fit x.

    Examples:
        >>> unpool(torch.tensor([[[[7.]]]]), torch.tensor([[[[3]]]], dtype=torch.uint8), (2, 2))
        tensor([[[[0., 0.],
                  [0., 7.]]]])
    """
    if is_tracing():
        return place_plain(x, unpack_if_packed(switches, x.shape[1]), size[0], size[1])
    if not torch.compiler.is_compiling():
        _check(x, switches, size)
    return _Unpool.apply(x, switches, size[0], size[1], False)


def _check(x: Tensor, switches: Tensor, size: tuple[int, int]) -> None:
    n, c, h, w = x.shape
    shapes = ((n, c, h, w), (n, (c + 3) // 4, h, w))
    pooled = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    if switches.dtype != torch.uint8 or tuple(switches.shape) not in shapes or (h, w) != pooled:
        raise ValueError(
            f"cannot unpool values of shape {tuple(x.shape)} to size {tuple(size)} with {switches.dtype} switches of "
            f"shape {tuple(switches.shape)}: switches must be uint8, have the shape of the values (or four channels "
            f"per byte) and pool size to {pooled}"
        )


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
        triton_kernels = _kernels(x)
        if triton_kernels is not None:
            return triton_kernels.pool(x, packed=packed)
        features, switches = pool_plain(x) if torch.compiler.is_compiling() else pool_eager(x)
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
    """Unpooling. With `unsigned_zero`, -0.0 becomes 0.0, as in torch's gradient of pooling, which adds into zeros."""

    @staticmethod
    def forward(x: Tensor, switches: Tensor, height: int, width: int, unsigned_zero: bool) -> Tensor:
        triton_kernels = _kernels(x)
        if triton_kernels is not None:
            return triton_kernels.place(x, switches, height, width, unsigned_zero=unsigned_zero)
        place = place_plain if torch.compiler.is_compiling() else place_eager
        return place(x + 0.0 if unsigned_zero else x, unpack_if_packed(switches, x.shape[1]), height, width)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int, bool], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (switches,) = ctx.saved_tensors
        return _Pick.apply(gradient, switches), None, None, None, None


class _Pick(torch.autograd.Function):
    """Picking the cell that each switch selects: the gradient of unpooling, and its transpose."""

    @staticmethod
    def forward(x: Tensor, switches: Tensor) -> Tensor:
        triton_kernels = _kernels(x)
        if triton_kernels is not None:
            return triton_kernels.pick(x, switches)
        pick = pick_plain if torch.compiler.is_compiling() else pick_eager
        return pick(x, unpack_if_packed(switches, x.shape[1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, switches = inputs
        ctx.save_for_backward(switches)
        ctx.size = (x.shape[-2], x.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (switches,) = ctx.saved_tensors
        return _Unpool.apply(gradient, switches, *ctx.size, False), None


def _kernels(x: Tensor) -> ModuleType | None:
    return None if torch.compiler.is_compiling() or not x.is_cuda else load_triton_kernels(x.device)


@functools.cache
def load_triton_kernels(device: torch.device) -> ModuleType | None:
    """Return the module `triton_kernels` if the GPU can run it, else None: the slower torch kernels are used."""
    if importlib.util.find_spec("triton") is None:
        return None
    x = torch.zeros(1, 1, 1, 1, device=device)
    try:
        from segdeconv.switches import triton_kernels

        triton_kernels.pool(x)
    except Exception as error:  # no C compiler, no Python headers and too old a GPU raise different types
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"Triton does not run on {device} ({type(error).__name__}: {reason}), so pooling and unpooling use "
            "torch's slower kernels - Triton needs a C compiler and a GPU of compute capability 7.0 or more",
            stacklevel=2,
        )
        return None
    return triton_kernels
