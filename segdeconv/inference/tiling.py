"""Scores of an image part by part: which window of the image the network must see for them to be the same.

A place of the scores hears nothing beyond its receptive field (fields.py). So a part of them is computed from a window
that covers the fields of all its places; beyond the window lies nothing that they hear. Two things have to be kept:
the window begins where a pooling window of the whole image begins, at a multiple of the product of the network's
strides, or pools would see other cells together; and it ends at such a multiple, or at the end of the image, or
ceil-mode pools would round where the whole image goes on. Zeros are padded around the window as around the image, but
where its edge is none of the image's they reach only places that are thrown away.

A network that normalises by statistics of what it sees (FPN's group norm), or stretches a map by a ratio that depends
on the image's size, has no such windows; its scores by parts are near those of the whole, and `exact` says so.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from segdeconv.errors import UsageError
from segdeconv.summary.receptive_field import Span
from segdeconv.summary.tracing import Trace

# Sides of the image that the network is traced on: larger than fields are, and multiples of any product of strides.
SIDES = (2048, 8192)

# Layers whose outputs depend on the mean of all that is seen, which `fields` leaves aside.
STATISTICS = (nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm)

Extent = tuple[int, int]  # [start, stop) along an axis
Part = tuple[Extent, Extent]  # rows, columns
Size = tuple[int, int]  # (H, W)


@dataclass(frozen=True)
class Axis:
    """What places of the scores hear along one axis.

    stride: the product of strides. before, after: (stride,), how far place p hears, by p modulo the stride.
    least: the shortest window that the network takes; a shorter one would be padded where the image goes on.
    """

    stride: int
    before: np.ndarray
    after: np.ndarray
    least: int = 1

    def window(self, part: Extent, length: int) -> Extent:
        """What of an axis of this length the network must see for a part of the scores."""
        start, stop = part
        firsts = np.arange(start, min(stop, start + self.stride))
        lasts = np.arange(max(start, stop - self.stride), stop)
        first = min(start, int((firsts - self.before[firsts % self.stride]).min()))
        last = max(stop, int((lasts + self.after[lasts % self.stride]).max()) + 1)
        first = max(0, first)
        last = max(last, first + self.least)
        if last >= length:
            first = min(first, length - self.least)
        return max(0, first // self.stride * self.stride), min(length, -(-last // self.stride) * self.stride)

    @property
    def overlap(self) -> int:
        """How many pixels a window has beyond a part that begins and ends at multiples of the stride."""
        far = self.stride << 20
        start, stop = self.window((far, far + self.stride), far << 1)
        return stop - start - self.stride

    def step(self, window: int) -> int:
        """The longest part, a multiple of the stride, whose window is no longer than this; 0 for none."""
        step = (window - self.overlap) // self.stride * self.stride
        return max(0, step if self.overlap + step >= self.least else 0)


@dataclass(frozen=True)
class Geometry:
    """How a network can be used by parts. bytes_per_pixel: of all its maps alive at once, in float32.

    exact: whether scores by parts are those of the whole, up to rounding.
    """

    network: str
    rows: Axis
    columns: Axis
    bytes_per_pixel: float
    exact: bool

    def window(self, part: Part, size: Size) -> Part:
        """What the network must see of an image of this size for a part of the scores."""
        return self.rows.window(part[0], size[0]), self.columns.window(part[1], size[1])

    def needed(self, size: Size) -> int:
        """Bytes that the network takes to see so many pixels at once."""
        return math.ceil(self.bytes_per_pixel * size[0] * size[1])

    @property
    def smallest(self) -> Size:
        """The smallest window that gives scores for anything."""
        return self.rows.overlap + self.rows.stride, self.columns.overlap + self.columns.stride

    def steps(self, tile: Size, size: Size) -> Size:
        """The size of the parts whose windows are no larger than a tile; an axis that the tile covers is one part.

        Raises UsageError where the tile has no room for what the parts hear around them.
        """
        steps = [
            length if length <= window else axis.step(window)
            for axis, window, length in zip((self.rows, self.columns), tile, size, strict=True)
        ]
        if min(steps) < 1:
            raise UsageError(
                f"tiles of {tile[0]}x{tile[1]} are too small: {self.network} hears {self.rows.overlap // 2} pixels "
                f"and more on every side - give tiles of {self.smallest[0]}x{self.smallest[1]} or larger"
            )
        return steps[0], steps[1]

    def tile(self, size: Size, memory: int) -> Size | None:
        """The tile that fits into so many bytes, as near to a square as the image lets it be; None for the whole.

        Never smaller than `smallest`, which takes more than `memory` says where that is too little for anything.
        """
        if self.needed(size) <= memory:
            return None
        pixels = memory / self.bytes_per_pixel
        height, width = self.smallest
        narrow = size[1] * size[1] <= pixels  # then all of its width is seen, and as many rows as may be
        rows = min(size[0], max(height, int(pixels / size[1]) if narrow else math.isqrt(int(pixels))))
        columns = min(size[1], max(width, int(pixels / rows)))
        return rows, columns


def whole(size: Size) -> Part:
    """All of an image."""
    return (0, size[0]), (0, size[1])


def parts(size: Size, step: Size) -> Iterator[Part]:
    """An image in parts of this size, row by row; those at the lower and right end are what is left."""
    for top in range(0, size[0], step[0]):
        for left in range(0, size[1], step[1]):
            yield (top, min(size[0], top + step[0])), (left, min(size[1], left + step[1]))


def geometry_of(skeleton: nn.Module, least: int) -> Geometry:
    """How a network can be used by parts, from a run without data.

    skeleton: the network on torch's meta device. least: the smallest side in pixels that it takes.
    Raises UsageError for one whose scores hear all of the image everywhere, or do what `fields` does not know.
    """
    name = type(skeleton).__name__
    for side in SIDES:
        seen = Trace(skeleton)
        logits = seen.run((side, side))
        field = seen.fields[logits]
        if field is None or any(spans is None for spans in seen.spans):
            raise UsageError(
                f"what {name} hears of an image is not known, so it cannot be cut into tiles - "
                "leave out --tile, or give a smaller dataset.size"
            )
        every = [[spans[axis] for spans in seen.spans if spans is not None] for axis in (0, 1)]
        axes = [_axis(field.spans[axis], every[axis], side, least) for axis in (0, 1)]
        if axes[0] is not None and axes[1] is not None:
            (rows, exact), (columns, also) = axes[0], axes[1]
            alike = not any(isinstance(module, STATISTICS) for module in skeleton.modules())
            return Geometry(name, rows, columns, seen.peak / side**2, exact and also and alike)
    raise UsageError(
        f"every score of {name} hears all of the image, so it cannot be cut into tiles - leave out "
        "--tile, or give a smaller dataset.size"
    )


def _axis(span: Span, layers: list[Span], side: int, least: int) -> tuple[Axis, bool] | None:
    """(an axis, whether windows are exact), from the fields of the scores and of all layers; None if the image ends
    within every field.
    """
    stride = math.lcm(*(_stride(layer, side) for layer in layers))
    places = np.flatnonzero((span.first > 0) & (span.last < side - 1))
    if len(places) < 3 * stride:
        return None
    before, after = places - span.first[places], span.last[places] - places
    near = [np.full(stride, heard.max()) for heard in (before, after)]
    exact = True
    for heard, farthest in zip((before, after), near, strict=True):
        for rest in range(stride):
            values = heard[places % stride == rest]
            exact &= bool((values == values[0]).all())
            farthest[rest] = values.max()
    return Axis(stride, near[0], near[1], least), exact


def _stride(span: Span, side: int) -> int:
    """How many pixels lie between two places of a map; 1 for a map that was made larger again."""
    free = (span.first > 0) & (span.last < side - 1)
    steps = np.unique(np.diff(span.first[free]))
    return int(steps[0]) if len(steps) == 1 and steps[0] > 0 else 1
