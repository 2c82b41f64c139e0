"""Receptive fields: the rows and columns of the image that each position of a map can depend on.

Along one axis, every position of a map depends on the image from a first to a last position. Each operation computes
these pairs from those of its inputs: a convolution takes the union over its window, an addition or a concatenation the
union of its two maps. The field is therefore exact for pools, unpools, strides, dilations, skips and odd sizes, and the
largest over all paths. `propagate` supports the operations of common torch networks by their names in ATen; it raises
Unknown for all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
import torch
from torch import Tensor

NOTHING = np.iinfo(np.int64).max // 4


@dataclass(frozen=True)
class Span:
    """Range of the image, along one axis, that each position of a map depends on.

    Attributes:
        first: First position in the image, (length,) int64; NOTHING where a position depends on nothing.
        last: Last position in the image, (length,) int64; -NOTHING where a position depends on nothing.
    """

    first: np.ndarray
    last: np.ndarray

    @staticmethod
    def of_image(length: int) -> Span:
        """Return the span of the image itself, where each position depends on itself."""
        return Span(np.arange(length), np.arange(length))

    def __len__(self) -> int:
        return len(self.first)

    def at(self, places: np.ndarray) -> Span:
        """Select positions; those outside depend on nothing."""
        inside = (places >= 0) & (places < len(self))
        places = places.clip(0, len(self) - 1)
        return Span(np.where(inside, self.first[places], NOTHING), np.where(inside, self.last[places], -NOTHING))

    def __or__(self, other: Span) -> Span:
        """Return the union; an axis of length 1 is broadcast."""
        return Span(np.minimum(self.first, other.first), np.maximum(self.last, other.last))

    def over(self, taps: Sequence[np.ndarray]) -> Span:
        """Return the union over the taps of a window, given the positions that each tap reads."""
        return reduce(or_, map(self.at, taps))

    def whole(self) -> Span:
        """Return the union of all positions as a span of length 1."""
        return Span(self.first.min(keepdims=True), self.last.max(keepdims=True))

    def largest(self, length: int) -> int | None:
        """Return the size of the largest range that reaches no end of an image of this length, or None if all do."""
        free = (self.first > 0) & (self.last < length - 1)
        return int((self.last - self.first)[free].max()) + 1 if free.any() else None


@dataclass(frozen=True)
class Field:
    """Receptive field of each position of a tensor.

    Attributes:
        spans: Spans of the rows and of the columns.
        dims: Dimensions of the tensor that they run along, None for no dimension. If both are the same, rows and
            columns are flattened into that dimension.
    """

    spans: tuple[Span, Span]
    dims: tuple[int | None, int | None]

    def __or__(self, other: Field) -> Field:
        spans = (self.spans[0] | other.spans[0], self.spans[1] | other.spans[1])
        return Field(spans, (_either(self.dims[0], other.dims[0]), _either(self.dims[1], other.dims[1])))

    def equals(self, other: Field) -> bool:
        """Return whether both fields have the same spans."""
        return all(
            np.array_equal(mine.first, theirs.first) and np.array_equal(mine.last, theirs.last)
            for mine, theirs in zip(self.spans, other.spans, strict=True)
        )

    @property
    def flat(self) -> bool:
        """True if rows and columns are flattened into one dimension."""
        return self.dims[0] is not None and self.dims[0] == self.dims[1]

    def moved(self, new_dim: Callable[[int], int | None]) -> Field:
        """Return the field after a rearrangement that maps dimensions to new ones."""
        rows, columns = (None if dim is None else new_dim(dim) for dim in self.dims)
        return replace(self, dims=(rows, columns))

    def along(self, dim: int, change: Callable[[Span], Span]) -> Field:
        """Return the field with the span along a dimension changed."""
        rows, columns = (change(span) if at == dim else span for span, at in zip(self.spans, self.dims, strict=True))
        return replace(self, spans=(rows, columns))


def _either(dim: int | None, other: int | None) -> int | None:
    return other if dim is None else dim


class Unknown(Exception):
    """The receptive field of an operation cannot be computed."""


def propagate(func: Any, args: Sequence[Any], fields: Sequence[Field], output: Tensor) -> Field:
    """Compute the field of the output of an ATen operation.

    Args:
        func: The operation.
        args: Its arguments.
        fields: Fields of those tensor arguments that depend on the image, in their order; at least one.
        output: Its output, or one of its outputs.

    Raises:
        Unknown: The operation is not supported.
    """
    name = func.overloadpacket.__name__.removesuffix("_")
    if torch.Tag.pointwise in func.tags or name in _POINTWISE:
        field = _union(fields, args, output)
    elif name not in {*_BY_AXIS, *_RULES} or (fields[0].flat and name not in _SUPPORTS_FLAT):
        raise Unknown
    else:
        field = _each_axis(name, fields, args, output) if name in _BY_AXIS else _RULES[name](fields, args, output)
    spans = [_broadcast(span, dim, field, output) for span, dim in zip(field.spans, field.dims, strict=True)]
    return Field((spans[0], spans[1]), field.dims)


def _broadcast(span: Span, dim: int | None, field: Field, output: Tensor) -> Span:
    """Extend a span of length 1 to the length of its dimension."""
    if dim is None or field.flat or (dim < output.ndim and len(span) == output.shape[dim]):
        return span
    if len(span) > 1 or dim >= output.ndim:
        raise Unknown
    return span.at(np.zeros(output.shape[dim], dtype=np.int64))


def _union(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    """Return the union over maps that are broadcast with each other."""
    if len(fields) > 1 and any(arg.ndim != output.ndim for arg in args if isinstance(arg, Tensor) and arg.ndim):
        raise Unknown
    return reduce(or_, fields)


# Rules that transform the span of one axis, 0 for rows or 1 for columns, to a new length.


def _window(span: Span, out: int, kernel: int, stride: int, padding: int, dilation: int) -> Span:
    """Apply a convolution or a pool: output o depends on the inputs o * stride - padding + tap * dilation."""
    starts = np.arange(out) * stride - padding
    return span.over([starts + tap * dilation for tap in range(kernel)])


def _transposed(span: Span, out: int, kernel: int, stride: int, padding: int, dilation: int) -> Span:
    """Apply a transposed convolution: output o depends on input i if o = i * stride - padding + tap * dilation."""
    outputs = np.arange(out)
    taps = []
    for tap in range(kernel):
        source, rest = np.divmod(outputs + padding - tap * dilation, stride)
        taps.append(np.where(rest == 0, source, -1))
    return span.over(taps)


def _pair(value: Any) -> list[int]:
    """Return a setting of both axes, which ATen writes as one or two numbers, or as the last two of three."""
    value = [value] if isinstance(value, int) else list(value)
    return value * 2 if len(value) == 1 else value[-2:]


def _convolution(span: Span, out: int, axis: int, args: Sequence[Any]) -> Span:
    stride, padding, dilation = (_pair(value)[axis] for value in args[3:6])
    return (_transposed if args[6] else _window)(span, out, args[1].shape[2 + axis], stride, padding, dilation)


def _pool(span: Span, out: int, axis: int, args: Sequence[Any]) -> Span:
    arguments = dict(enumerate(args))
    kernel = _pair(arguments[1])
    stride, padding = _pair(arguments.get(2) or kernel), _pair(arguments.get(3, 0))
    # The fifth argument is the dilation of a max-pool, but ceil_mode of an average pool.
    dilation = [1, 1] if isinstance(arguments.get(4, False), bool) else _pair(arguments[4])
    return _window(span, out, kernel[axis], stride[axis], padding[axis], dilation[axis])


def _adaptive(span: Span, out: int, axis: int, args: Sequence[Any]) -> Span:
    outputs = np.arange(out)
    first, last = outputs * len(span) // out, -(-(outputs + 1) * len(span) // out) - 1
    return span.over([np.minimum(first + tap, last) for tap in range(int((last - first).max()) + 1)])


def _nearest(span: Span, out: int, axis: int, args: Sequence[Any]) -> Span:
    source = np.floor(np.arange(out) * _ratio(args[2:4], axis, len(span), out) + 1e-9).astype(np.int64)
    return span.at(source.clip(0, len(span) - 1))


def _bilinear(span: Span, out: int, axis: int, args: Sequence[Any]) -> Span:
    outputs = np.arange(out)
    if args[2]:  # align_corners
        source = outputs * ((len(span) - 1) / max(1, out - 1))
    else:
        source = ((outputs + 0.5) * _ratio(args[3:5], axis, len(span), out) - 0.5).clip(0)
    before, after = np.floor(source + 1e-9), np.ceil(source - 1e-9)
    return span.over([side.astype(np.int64).clip(0, len(span) - 1) for side in (before, after)])


def _shuffle(span: Span, out: int, axis: int, args: Sequence[Any]) -> Span:
    return span.at(np.arange(out) // args[1])


def _ratio(scales: Sequence[float | None], axis: int, length: int, out: int) -> float:
    """Return the number of inputs per output, from the given scale or else from the sizes."""
    scale = scales[axis] if axis < len(scales) else None
    return 1 / scale if scale else length / out


def _each_axis(name: str, fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    """Apply a rule of `_BY_AXIS` to both axes."""
    if len(fields) > 1 or (name == "convolution" and args[1].ndim != 4):
        raise Unknown
    spans = []
    for axis, (span, dim) in enumerate(zip(fields[0].spans, fields[0].dims, strict=True)):
        spans.append(span if dim is None else _BY_AXIS[name](span, output.shape[dim], axis, args))
    return Field((spans[0], spans[1]), fields[0].dims)


# Rules that transform both axes together.


def _slice(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    start, end, step = (dict(enumerate(args)).get(index, default) for index, default in ((2, 0), (3, None), (4, 1)))
    dim = args[1] % args[0].ndim
    positions = np.arange(args[0].shape[dim])[start:end:step]
    return fields[0].along(dim, lambda span: span.at(positions))


def _pad(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    field = fields[0]
    for index, before in enumerate(args[1][::2]):  # the last dimension first
        dim = output.ndim - 1 - index
        positions = np.arange(output.shape[dim]) - before
        field = field.along(dim, lambda span, positions=positions: span.at(positions))  # type: ignore[misc]
    return field


def _concatenation(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    dim = (args[1] if len(args) > 1 else 0) % output.ndim
    if dim in fields[0].dims:
        raise Unknown
    return reduce(or_, fields)


def _split(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    if (args[2] if len(args) > 2 else 0) % output.ndim in fields[0].dims:
        raise Unknown
    return fields[0]


def _reduction(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    rank, field = args[0].ndim, fields[0]
    reduced = args[1] if len(args) > 1 else None
    dims = {dim % rank for dim in ([reduced] if isinstance(reduced, int) else reduced or range(rank))}
    for dim in dims:
        field = field.along(dim, Span.whole)
    if output.ndim == rank:
        return field
    return field.moved(lambda dim: None if dim in dims else dim - sum(other < dim for other in dims))


def _permute(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    return fields[0].moved([dim % output.ndim for dim in args[1]].index)


def _transpose(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    first, second = (dim % output.ndim for dim in args[1:3])
    return fields[0].moved(lambda dim: {first: second, second: first}.get(dim, dim))


def _unsqueeze(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    new = args[1] % output.ndim
    return fields[0].moved(lambda dim: dim + (dim >= new))


def _view(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    """Find rows and columns in the new shape by their lengths and the number of elements behind them.

    Rows and columns may also be flattened into one dimension, or separated again.
    """
    field, before, now = fields[0], args[0].shape, output.shape
    if None in field.dims or not output.numel():
        raise Unknown
    rows, columns = (dim for dim in field.dims if dim is not None)
    behind = math.prod(before[columns + 1 :])
    height, width = (len(span) for span in field.spans)

    def find(length: int, rest: int) -> int | None:
        matching = [dim for dim in range(len(now)) if now[dim] == length and math.prod(now[dim + 1 :]) == rest]
        return matching[-1] if matching else None

    separate = find(height, width * behind if field.flat else math.prod(before[rows + 1 :])), find(width, behind)
    if None not in separate:
        return replace(field, dims=separate)
    flat = find(height * width, behind)
    if flat is None or columns - rows != int(not field.flat):
        raise Unknown
    return replace(field, dims=(flat, flat))


def _product(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    """Apply a matrix product, which keeps the rows of the first matrix; sums over rows or columns are not supported."""
    first = next(arg for arg in args if arg.ndim == 2)  # addmm's first argument is a bias
    if len(fields) > 1 or first.ndim - 1 in fields[0].dims:
        raise Unknown
    return fields[0]


def _softmax(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    dim = args[1] % output.ndim
    return fields[0].along(dim, lambda span: span.whole().at(np.zeros(len(span), dtype=np.int64)))


def _squeeze(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    removed = [dim % args[0].ndim for dim in ([args[1]] if isinstance(args[1], int) else args[1])]
    removed = [dim for dim in removed if args[0].shape[dim] == 1]
    return fields[0].moved(lambda dim: None if dim in removed else dim - sum(other < dim for other in removed))


# Operations that act on each position separately. The dependence of group norm on the statistics of the whole map is
# ignored.
_POINTWISE = {
    "clone", "_to_copy", "detach", "alias", "lift_fresh", "native_dropout", "native_batch_norm",
    "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "native_group_norm", "native_layer_norm",
    "_prelu_kernel", "expand",
}  # fmt: skip
_BY_AXIS: dict[str, Callable[..., Span]] = {
    "convolution": _convolution, "max_pool2d_with_indices": _pool, "avg_pool2d": _pool, "avg_pool3d": _pool,
    "_adaptive_avg_pool2d": _adaptive, "adaptive_max_pool2d": _adaptive,
    "upsample_nearest2d": _nearest, "upsample_bilinear2d": _bilinear, "pixel_shuffle": _shuffle,
}  # fmt: skip
_RULES: dict[str, Callable[..., Field]] = {
    "addmm": _product, "mm": _product,
    "mean": _reduction, "sum": _reduction, "amax": _reduction,
    "constant_pad_nd": _pad, "slice": _slice, "split": _split, "split_with_sizes": _split, "cat": _concatenation,
    "_softmax": _softmax, "_log_softmax": _softmax,
    "permute": _permute, "transpose": _transpose, "unsqueeze": _unsqueeze, "squeeze": _squeeze,
    "view": _view, "_unsafe_view": _view,
}  # fmt: skip
_SUPPORTS_FLAT = {"view", "_unsafe_view", "addmm", "mm"}
