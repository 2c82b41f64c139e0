"""Maps of 8-bit codes in place of float tensors, and the modules and functions that compute on them.

A map is stored as codes 0..255 with value = scale * (code - zero_point): one scale for each map, and for each filter.
Pooling, unpooling, ReLU, concatenation and cropping work on the codes, so a switch is decided by the very numbers that
are pooled. Any other operation gets the float values.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeconv.switches.modules import MaxPool, Unpool
from segdeconv.switches.ops import Pooling
from segdeconv.switches.packing import pack, unpack_if_packed
from segdeconv.switches.torch_kernels import place_eager

Range = tuple[float, float]  # the smallest and the largest value, 0 included

CODES = 255
MAX_FILTER_CODE = 127  # of a filter's value, and of the sum of two neighbouring ones


class Unequal(Exception):
    """Maps with different scales are joined, so their ranges have been widened to a common one."""


class Codes:
    """A map of 8-bit codes, (N, C, H, W) uint8, which torch's functions accept in place of a float tensor.

    Attributes:
        codes: The codes.
        scale: Difference between the values of two neighbouring codes.
        zero_point: The code of the value 0.
        makers: The convolutions that determine the scale.
    """

    is_cuda = False
    requires_grad = False
    dtype = torch.float32  # that of the values

    def __init__(self, codes: Tensor, scale: float, zero_point: int, makers: tuple["QuantizedConv", ...]) -> None:
        self.codes, self.scale, self.zero_point, self.makers = codes, scale, zero_point, makers

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def values(self) -> Tensor:
        """Return the float values, (N, C, H, W)."""
        return (self.codes.float() - self.zero_point) * self.scale

    def like(self, codes: Tensor) -> "Codes":
        """Return other codes of the same scale."""
        return Codes(codes, self.scale, self.zero_point, self.makers)

    def __add__(self, other: Any) -> Tensor:
        return torch.add(self, other)  # type: ignore[call-overload]

    __radd__ = __add__

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        on_codes = ON_CODES.get(function)
        if on_codes is not None and (result := on_codes(*args, **kwargs)) is not None:
            return result
        return function(*_as_floats(args), **_as_floats(kwargs))


def _as_floats(value: Any) -> Any:
    if isinstance(value, Codes):
        return value.values()
    if isinstance(value, list | tuple):
        return type(value)(_as_floats(item) for item in value)
    return {key: _as_floats(item) for key, item in value.items()} if isinstance(value, dict) else value


# Functions on codes. Each returns None for arguments that it does not support.


def _relu(x: Codes, inplace: bool = False) -> Codes:
    if x.zero_point == 0:
        return x
    return Codes(x.codes.clamp(min=x.zero_point).sub_(x.zero_point), x.scale, 0, x.makers)


def _cat(maps: Sequence[Any], dim: int = 0) -> Codes | None:
    if not all(isinstance(part, Codes) for part in maps):
        return None
    makers = tuple(dict.fromkeys(maker for part in maps for maker in part.makers))
    if len({(part.scale, part.zero_point) for part in maps}) > 1:
        low, high = (choose(maker.output_range[side] for maker in makers) for side, choose in ((0, min), (1, max)))
        if all(maker.output_range == (low, high) for maker in makers):
            return None  # one of them passed a ReLU on codes
        for maker in makers:
            maker.output_range = (low, high)
        raise Unequal
    return Codes(torch.cat([part.codes for part in maps], dim), maps[0].scale, maps[0].zero_point, makers)


def _pad(x: Codes, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Codes | None:
    if max(pad) > 0:
        return None
    return x.like(F.pad(x.codes, list(pad)))


def _dropout(x: Codes, p: float = 0.5, training: bool = True, inplace: bool = False) -> Codes | None:
    return None if training else x


def _max_pool(
    x: Codes, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Codes | None:  # fmt: skip
    windows = kernel_size in (2, [2, 2], (2, 2)) and stride in (None, [], 2, [2, 2], (2, 2))
    if not windows or not ceil_mode or padding not in (0, [0, 0], (0, 0)) or dilation not in (1, [1, 1], (1, 1)):
        return None
    upper_left, *others = _cells(x.codes)
    return x.like(torch.maximum(torch.maximum(upper_left, others[0]), torch.maximum(others[1], others[2])))


ON_CODES: dict[Callable[..., Any], Callable[..., Codes | None]] = {
    torch.relu: _relu, F.relu: _relu, torch.cat: _cat, F.pad: _pad, F.dropout: _dropout, torch.max_pool2d: _max_pool,
    F.max_pool2d: _max_pool,
}  # fmt: skip


def _cells(codes: Tensor) -> list[Tensor]:
    """Return the four cells of every 2x2 window, in the order of the switches, (N, C, ceil(H/2), ceil(W/2)) each."""
    height, width = codes.shape[-2:]
    if height % 2 or width % 2:
        codes = F.pad(codes, (0, width % 2, 0, height % 2))  # 0 never exceeds the cell before it
    return [codes[..., dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)]


class QuantizedConv(nn.Module):
    """A convolution with 8-bit filters, and the ReLU after it.

    Args:
        conv: The float convolution, without padding modes other than zeros.
        ranges: The `input` and `output` of the convolution, from `measure_ranges`.
        relu: Apply a ReLU.

    Attributes:
        output_range: The range of the output.
        as_float: Return float values instead of codes, for the scores of a network.
    """

    def __init__(self, conv: nn.Conv2d, ranges: Mapping[str, Sequence[float]], *, relu: bool) -> None:
        super().__init__()
        weight = conv.weight.detach().float()
        self.filter_scale = filter_scales(weight)
        codes = (weight / self.filter_scale[:, None, None, None]).round().clamp(-MAX_FILTER_CODE, MAX_FILTER_CODE)
        self.filters = codes.to(torch.int8)
        self.filter_zero = torch.zeros(len(weight), dtype=torch.int32)
        self.bias = None if conv.bias is None else conv.bias.detach().float()
        self.geometry = list(conv.stride), [int(side) for side in conv.padding], list(conv.dilation), conv.groups
        self.input_range, self.output_range = _range(ranges["input"]), _range(ranges["output"])
        self.relu, self.as_float = relu, False
        self.packed: Any = None
        self.packed_for: tuple[float, int] | None = None
        self.pixels = 0

    def forward(self, x: Tensor | Codes) -> Tensor | Codes:  # (N, C, H, W)
        if not isinstance(x, Codes):
            scale, zero_point = affine(self.input_range)
            codes = torch.round(x * (1 / scale)).add_(zero_point).clamp_(0, CODES).to(torch.uint8)
            x = Codes(codes, scale, zero_point, ())
        if self.packed_for != (x.scale, x.zero_point) or not self.pixels / 4 <= _pixels(x) <= 4 * self.pixels:
            self._pack(x)
        stride, padding, dilation, groups = self.geometry
        scale, zero_point = (1.0, 0) if self.as_float else affine(self.output_range)
        result = torch.ops.onednn.qconv2d_pointwise(
            x.codes.contiguous(memory_format=torch.channels_last), x.scale, x.zero_point, self.packed,
            self.filter_scale, self.filter_zero, self.bias, stride, padding, dilation, groups, scale, zero_point,
            torch.float32 if self.as_float else torch.uint8, "relu" if self.relu else "none", [], "",
        )  # fmt: skip
        return result if self.as_float else Codes(result, scale, zero_point, (self,))

    def _pack(self, x: Codes) -> None:
        stride, padding, dilation, groups = self.geometry
        # oneDNN chooses the layout of the filters by the size of the map; with that of another size, it would reorder
        # the filters at every call, which for many channels takes a hundred times as long as the convolution.
        self.packed = torch.ops.onednn.qconv_prepack(
            self.filters, self.filter_scale, x.scale, x.zero_point, stride, padding, dilation, groups, list(x.shape)
        )
        self.packed_for, self.pixels = (x.scale, x.zero_point), _pixels(x)


def _pixels(x: Codes) -> int:
    return x.shape[0] * x.shape[-2] * x.shape[-1]


def _range(values: Sequence[float]) -> Range:
    return min(0.0, float(values[0])), max(0.0, float(values[1]))


def filter_scales(weight: Tensor) -> Tensor:
    """Return the scale of each filter of a convolution, with which no processor saturates its sums, (O,).

    x86 processors without VNNI add the products of two neighbouring values in 16 bits (VPMADDUBSW), and cut off what
    does not fit: 2 * 255 * 127 does not. So the sum of two neighbours is limited like one value, to 127, or 128 after
    rounding: 255 * 128 < 2**15. Sums are then exact on all processors.

    Args:
        weight: (O, I, H, W) filters.

    Examples:
        >>> filter_scales(torch.tensor([[127.0, -127.0, 127.0], [127.0, 127.0, 0.0]])[:, :, None, None])
        tensor([1., 2.])
    """
    values = weight.permute(0, 2, 3, 1).flatten(1)  # in the order of kernels, in which channels are neighbours
    sums = F.pad(values, (0, 1)) + F.pad(values, (1, 0))
    return (torch.maximum(values.abs().amax(dim=1), sums.abs().amax(dim=1)) / MAX_FILTER_CODE).clamp(min=1e-12)


def affine(values: Range) -> tuple[float, int]:
    """Return the scale and the code of 0 for a range of values.

    Examples:
        >>> affine((-51.0, 204.0))
        (1.0, 51)
    """
    scale = max(values[1] - values[0], 1e-6) / CODES
    return scale, round(-values[0] / scale)


class QuantizedEnlarge(nn.Module):
    """A transposed convolution whose stride is its kernel: a 1x1 convolution to one map for each cell of a window."""

    def __init__(self, conv: QuantizedConv, factor: int) -> None:
        super().__init__()
        self.conv, self.factor = conv, factor

    def forward(self, x: Tensor | Codes) -> Tensor | Codes:
        maps = self.conv(x)
        if isinstance(maps, Codes):
            return maps.like(F.pixel_shuffle(maps.codes, self.factor))
        return F.pixel_shuffle(maps, self.factor)


class QuantizedMaxPool(nn.Module):
    """`MaxPool` on codes; ties go to the first cell, as there."""

    def __init__(self, pool: MaxPool) -> None:
        super().__init__()
        self.level, self.is_packed, self.on_floats = pool.level, pool.packed, pool

    def forward(self, x: Tensor | Codes) -> Pooling:
        if not isinstance(x, Codes):
            return self.on_floats(x)
        best: Tensor | None = None
        # The two lowest bits are the cell, counted downwards, so that the largest number is the first of equal codes.
        for cell, codes in enumerate(_cells(x.codes)):
            candidate = codes.to(torch.int16).bitwise_left_shift_(2).bitwise_or_(3 - cell)
            best = candidate if best is None else torch.maximum(best, candidate, out=best)
        assert best is not None
        switches = (best & 3).neg_().add_(3).to(torch.uint8)
        features: Any = x.like(best.bitwise_right_shift_(2).to(torch.uint8))
        height, width = x.shape[-2:]
        return Pooling(features, pack(switches) if self.is_packed else switches, (height, width))


class QuantizedUnpool(nn.Module):
    """`Unpool` on codes: the other cells get the code of 0."""

    def __init__(self, unpool: Unpool) -> None:
        super().__init__()
        self.level, self.on_floats = unpool.level, unpool

    def forward(self, x: Tensor | Codes, switches: Tensor, size: tuple[int, int]) -> Tensor | Codes:
        if not isinstance(x, Codes):
            return self.on_floats(x, switches, size)
        zero, codes = x.zero_point, x.codes
        placed = place_eager(codes ^ zero if zero else codes, unpack_if_packed(switches, x.shape[1]), *size)
        return x.like(placed.bitwise_xor_(zero) if zero else placed)
