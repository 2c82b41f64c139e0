"""Receptive fields: which rows and columns of the image each place of a map can depend on.

Along one axis every place of a map has a first and a last place of the image that it can see. An operation makes new
such pairs from those of its inputs: a convolution the union over its window, an addition or a concatenation the union
of its two maps. So the field is exact through pools, unpools, strides, dilations, skips and odd sizes, and the largest
over all paths. `after` knows the operations that torch networks are made of, by their names in ATen; of any other it
says None, which means unknown and stays so.
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
    """What each place of one axis sees of the image. first, last: (length,) int64; (NOTHING, -NOTHING) for nothing."""

    first: np.ndarray
    last: np.ndarray

    @staticmethod
    def of_image(length: int) -> Span:
        """Of the image itself: each place sees itself."""
        return Span(np.arange(length), np.arange(length))

    def __len__(self) -> int:
        return len(self.first)

    def at(self, places: np.ndarray) -> Span:
        """The places named; nothing where they lie outside."""
        inside = (places >= 0) & (places < len(self))
        places = places.clip(0, len(self) - 1)
        return Span(np.where(inside, self.first[places], NOTHING), np.where(inside, self.last[places], -NOTHING))

    def __or__(self, other: Span) -> Span:
        """The union; an axis of length 1 goes with every place of the other."""
        return Span(np.minimum(self.first, other.first), np.maximum(self.last, other.last))

    def over(self, windows: Sequence[np.ndarray]) -> Span:
        """The union of the places that several lists name."""
        return reduce(or_, map(self.at, windows))

    def whole(self) -> Span:
        """All places as one."""
        return Span(self.first.min(keepdims=True), self.last.max(keepdims=True))

    def largest(self, length: int) -> int | None:
        """The most that a place sees of an image of this length; None if all places see one of its ends."""
        free = (self.first > 0) & (self.last < length - 1)
        return int((self.last - self.first)[free].max()) + 1 if free.any() else None


@dataclass(frozen=True)
class Field:
    """spans: of the rows and of the columns. dims: which dimension of the tensor they run along, None for none.

    Both along one dimension: rows and columns are flattened into it.
    """

    spans: tuple[Span, Span]
    dims: tuple[int | None, int | None]

    def __or__(self, other: Field) -> Field:
        spans = (self.spans[0] | other.spans[0], self.spans[1] | other.spans[1])
        return Field(spans, (_either(self.dims[0], other.dims[0]), _either(self.dims[1], other.dims[1])))

    def equals(self, other: Field) -> bool:
        """Whether both see the same."""
        return all(
            np.array_equal(one.first, two.first) and np.array_equal(one.last, two.last)
            for one, two in zip(self.spans, other.spans, strict=True)
        )

    @property
    def flat(self) -> bool:
        """Whether rows and columns are flattened into one dimension."""
        return self.dims[0] is not None and self.dims[0] == self.dims[1]

    def moved(self, where: Callable[[int], int | None]) -> Field:
        """With every dimension where a rearrangement puts it."""
        rows, columns = (None if dim is None else where(dim) for dim in self.dims)
        return replace(self, dims=(rows, columns))

    def along(self, dim: int, change: Callable[[Span], Span]) -> Field:
        """With the span that runs along a dimension changed."""
        rows, columns = (change(span) if at == dim else span for span, at in zip(self.spans, self.dims, strict=True))
        return replace(self, spans=(rows, columns))


def _either(one: int | None, other: int | None) -> int | None:
    return other if one is None else one


class Unknown(Exception):
    """An operation of which nothing is known."""


def after(func: Any, args: Sequence[Any], fields: Sequence[Field], output: Tensor) -> Field:
    """The field of a tensor that an ATen operation gave.

    fields: of those of its tensor arguments that depend on the image, in their order; at least one.
    Raises Unknown.
    """
    name = func.overloadpacket.__name__.removesuffix("_")
    if torch.Tag.pointwise in func.tags or name in _PLACEWISE:
        found = _together(fields, args, output)
    elif name not in {*_BY_AXIS, *_RULES} or (fields[0].flat and name not in _OF_FLAT):
        raise Unknown
    else:
        found = _each(name, fields, args, output) if name in _BY_AXIS else _RULES[name](fields, args, output)
    spans = [_fitted(span, dim, found, output) for span, dim in zip(found.spans, found.dims, strict=True)]
    return Field((spans[0], spans[1]), found.dims)


def _fitted(span: Span, dim: int | None, field: Field, output: Tensor) -> Span:
    """A span as long as its dimension: one place may have been broadcast over it."""
    if dim is None or field.flat or (dim < output.ndim and len(span) == output.shape[dim]):
        return span
    if len(span) > 1 or dim >= output.ndim:
        raise Unknown
    return span.at(np.zeros(output.shape[dim], dtype=np.int64))


def _together(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    """The union of maps that are broadcast with each other, whose dimensions count from the last."""
    if len(fields) > 1 and any(arg.ndim != output.ndim for arg in args if isinstance(arg, Tensor) and arg.ndim):
        raise Unknown
    return reduce(or_, fields)


# What each operation makes of one axis, 0 for rows or 1 for columns, given its span and its new length.


def _gathered(span: Span, out: int, kernel: int, stride: int, padding: int, dilation: int) -> Span:
    """A convolution or a pool: place o hears the places o * stride - padding + tap * dilation."""
    starts = np.arange(out) * stride - padding
    return span.over([starts + tap * dilation for tap in range(kernel)])


def _spread(span: Span, out: int, kernel: int, stride: int, padding: int, dilation: int) -> Span:
    """A transposed convolution: place o hears place i if o = i * stride - padding + tap * dilation."""
    places = np.arange(out)
    windows = []
    for tap in range(kernel):
        source, rest = np.divmod(places + padding - tap * dilation, stride)
        windows.append(np.where(rest == 0, source, -1))
    return span.over(windows)


def _pair(value: Any) -> list[int]:
    """A setting of both axes, as ATen writes it: one number or two, or the last two of three."""
    value = [value] if isinstance(value, int) else list(value)
    return value * 2 if len(value) == 1 else value[-2:]


def _convolution(span: Span, out: int, axis: int, args: Sequence[Any]) -> Span:
    stride, padding, dilation = (_pair(value)[axis] for value in args[3:6])
    return (_spread if args[6] else _gathered)(span, out, args[1].shape[2 + axis], stride, padding, dilation)


def _pool(span: Span, out: int, axis: int, args: Sequence[Any]) -> Span:
    given = dict(enumerate(args))
    kernel = _pair(given[1])
    stride, padding = _pair(given.get(2) or kernel), _pair(given.get(3, 0))
    # The fifth argument of a max-pool is its dilation, of an average pool whether sizes are rounded up.
    dilation = [1, 1] if isinstance(given.get(4, False), bool) else _pair(given[4])
    return _gathered(span, out, kernel[axis], stride[axis], padding[axis], dilation[axis])


def _adaptive(span: Span, out: int, axis: int, args: Sequence[Any]) -> Span:
    places = np.arange(out)
    first, last = places * len(span) // out, -(-(places + 1) * len(span) // out) - 1
    return span.over([np.minimum(first + tap, last) for tap in range(int((last - first).max()) + 1)])


def _nearest(span: Span, out: int, axis: int, args: Sequence[Any]) -> Span:
    source = np.floor(np.arange(out) * _ratio(args[2:4], axis, len(span), out) + 1e-9).astype(np.int64)
    return span.at(source.clip(0, len(span) - 1))


def _bilinear(span: Span, out: int, axis: int, args: Sequence[Any]) -> Span:
    places = np.arange(out)
    if args[2]:  # corners on corners
        source = places * ((len(span) - 1) / max(1, out - 1))
    else:
        source = ((places + 0.5) * _ratio(args[3:5], axis, len(span), out) - 0.5).clip(0)
    before, after = np.floor(source + 1e-9), np.ceil(source - 1e-9)
    return span.over([side.astype(np.int64).clip(0, len(span) - 1) for side in (before, after)])


def _shuffle(span: Span, out: int, axis: int, args: Sequence[Any]) -> Span:
    return span.at(np.arange(out) // args[1])


def _ratio(scales: Sequence[float | None], axis: int, length: int, out: int) -> float:
    """Old places per new one: as the caller gave it, else as the sizes have it."""
    scale = scales[axis] if axis < len(scales) else None
    return 1 / scale if scale else length / out


def _each(name: str, fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    """Both axes changed by a rule of `_BY_AXIS`."""
    if len(fields) > 1 or (name == "convolution" and args[1].ndim != 4):
        raise Unknown
    spans = []
    for axis, (span, dim) in enumerate(zip(fields[0].spans, fields[0].dims, strict=True)):
        spans.append(span if dim is None else _BY_AXIS[name](span, output.shape[dim], axis, args))
    return Field((spans[0], spans[1]), fields[0].dims)


# What each operation makes of both axes together.


def _slice(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    start, end, step = (dict(enumerate(args)).get(place, default) for place, default in ((2, 0), (3, None), (4, 1)))
    dim = args[1] % args[0].ndim
    places = np.arange(args[0].shape[dim])[start:end:step]
    return fields[0].along(dim, lambda span: span.at(places))


def _pad(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    found = fields[0]
    for index, before in enumerate(args[1][::2]):  # the last dimension first
        dim = output.ndim - 1 - index
        places = np.arange(output.shape[dim]) - before
        found = found.along(dim, lambda span, places=places: span.at(places))  # type: ignore[misc]
    return found


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
    rank, found = args[0].ndim, fields[0]
    given = args[1] if len(args) > 1 else None
    dims = {dim % rank for dim in ([given] if isinstance(given, int) else given or range(rank))}
    for dim in dims:
        found = found.along(dim, Span.whole)
    if output.ndim == rank:
        return found
    return found.moved(lambda dim: None if dim in dims else dim - sum(other < dim for other in dims))


def _permute(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    return fields[0].moved([dim % output.ndim for dim in args[1]].index)


def _transpose(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    one, other = (dim % output.ndim for dim in args[1:3])
    return fields[0].moved(lambda dim: {one: other, other: one}.get(dim, dim))


def _unsqueeze(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    new = args[1] % output.ndim
    return fields[0].moved(lambda dim: dim + (dim >= new))


def _view(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    """A dimension stays where its length and the number of elements behind it do; rows and columns may be flattened."""
    field, before, now = fields[0], args[0].shape, output.shape
    if None in field.dims or not output.numel():
        raise Unknown
    rows, columns = (dim for dim in field.dims if dim is not None)
    behind = math.prod(before[columns + 1 :])
    height, width = (len(span) for span in field.spans)

    def find(length: int, rest: int) -> int | None:
        matching = [dim for dim in range(len(now)) if now[dim] == length and math.prod(now[dim + 1 :]) == rest]
        return matching[-1] if matching else None

    apart = find(height, width * behind if field.flat else math.prod(before[rows + 1 :])), find(width, behind)
    if None not in apart:
        return replace(field, dims=apart)
    flat = find(height * width, behind)
    if flat is None or columns - rows != int(not field.flat):
        raise Unknown
    return replace(field, dims=(flat, flat))


def _product(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    """A matrix product: rows of the first matrix stay where they are; what is summed over is not known by place."""
    first = next(arg for arg in args if arg.ndim == 2)  # addmm's first argument is a bias
    if len(fields) > 1 or first.ndim - 1 in fields[0].dims:
        raise Unknown
    return fields[0]


def _softmax(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    dim = args[1] % output.ndim
    return fields[0].along(dim, lambda span: span.whole().at(np.zeros(len(span), dtype=np.int64)))


def _squeeze(fields: Sequence[Field], args: Sequence[Any], output: Tensor) -> Field:
    gone = [dim % args[0].ndim for dim in ([args[1]] if isinstance(args[1], int) else args[1])]
    gone = [dim for dim in gone if args[0].shape[dim] == 1]
    return fields[0].moved(lambda dim: None if dim in gone else dim - sum(other < dim for other in gone))


# Place by place, whatever they do there. That a group norm hears the statistics of the whole map is left aside.
_PLACEWISE = {
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
_OF_FLAT = {"view", "_unsafe_view", "addmm", "mm"}
