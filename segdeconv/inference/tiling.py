"""The geometry of exact tiling: for each part of the scores, the crop of the image from which it can be computed.

A score depends on nothing outside its receptive field (summary/receptive_field.py), so a part of the scores is computed
from a crop that covers the receptive fields of all its pixels. The crop must also be aligned. It begins at a multiple
of the product of the network's strides, where a pooling window of the whole image begins; otherwise pools would group
other pixels. It ends at such a multiple or at the end of the image; otherwise ceil-mode pools would round where the
whole image continues. Crops are zero-padded like the image, but at an edge inside the image the padding affects only
scores that are discarded.

Exact tiling is impossible for a network that normalises by statistics of its input (FPN's group norm, instance
statistics), or resizes a feature map by a ratio that depends on the image's size. Its scores in tiles approximate those
of the whole image, and `Geometry.exact` is False.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from segdeconv.errors import UsageError
from segdeconv.models.instance_batch_norm import InstanceBatchNorm2d
from segdeconv.summary.receptive_field import Span
from segdeconv.summary.tracing import Trace

# Sides of the images on which the network is traced: larger than receptive fields, and multiples of any product of
# strides.
SIDES = (2048, 8192)

# Layers whose outputs depend on statistics of the whole input, which receptive fields do not include.
STATISTICS = (nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm, InstanceBatchNorm2d)

Extent = tuple[int, int]  # [start, stop) along an axis
Part = tuple[Extent, Extent]  # rows, columns
Size = tuple[int, int]  # (H, W)


@dataclass(frozen=True)
class Axis:
    """The extent of the receptive fields along one axis.

    Attributes:
        stride: Product of the strides.
        before: (stride,), the pixels of the receptive field before pixel p, indexed by p modulo the stride.
        after: (stride,), likewise the pixels after p.
        min_window: Shortest window that the network accepts; a shorter one would be padded where the image continues.
    """

    stride: int
    before: np.ndarray
    after: np.ndarray
    min_window: int = 1

    def window(self, part: Extent, length: int) -> Extent:
        """Return the window, along an axis of this length, from which a part of the scores is computed."""
        start, stop = part
        firsts = np.arange(start, min(stop, start + self.stride))
        lasts = np.arange(max(start, stop - self.stride), stop)
        first = min(start, int((firsts - self.before[firsts % self.stride]).min()))
        last = max(stop, int((lasts + self.after[lasts % self.stride]).max()) + 1)
        first = max(0, first)
        last = max(last, first + self.min_window)
        if last >= length:
            first = min(first, length - self.min_window)
        return max(0, first // self.stride * self.stride), min(length, -(-last // self.stride) * self.stride)

    @property
    def overlap(self) -> int:
        """Number of pixels by which a window exceeds a part that begins and ends at multiples of the stride."""
        far = self.stride << 20
        start, stop = self.window((far, far + self.stride), far << 1)
        return stop - start - self.stride

    def step(self, window: int) -> int:
        """Return the longest part, a multiple of the stride, whose window fits into `window`; 0 for none."""
        step = (window - self.overlap) // self.stride * self.stride
        return max(0, step if self.overlap + step >= self.min_window else 0)


@dataclass(frozen=True)
class Geometry:
    """The tiling of a network along both axes, and its memory.

    Attributes:
        network: Name of the network, for messages.
        bytes_per_pixel: Peak of the feature maps in memory at once, in float32, divided by the pixels of the input.
        exact: True if the scores in tiles equal those of the whole image, up to rounding.
    """

    network: str
    rows: Axis
    columns: Axis
    bytes_per_pixel: float
    exact: bool

    def window(self, part: Part, size: Size) -> Part:
        """Return the window of an image of this size from which a part of the scores is computed."""
        return self.rows.window(part[0], size[0]), self.columns.window(part[1], size[1])

    def needed(self, size: Size) -> int:
        """Return the bytes of memory of a forward pass over an image of this size."""
        return math.ceil(self.bytes_per_pixel * size[0] * size[1])

    @property
    def smallest(self) -> Size:
        """Size of the smallest window from which scores can be computed."""
        return self.rows.overlap + self.rows.stride, self.columns.overlap + self.columns.stride

    def steps(self, tile: Size, size: Size) -> Size:
        """Return the size of the parts whose windows fit into a tile.

        An axis along which the tile covers the image is not divided.

        Raises:
            UsageError: The tile is too small for the network's receptive field.
        """
        steps = [
            length if length <= window else axis.step(window)
            for axis, window, length in zip((self.rows, self.columns), tile, size, strict=True)
        ]
        if min(steps) < 1:
            raise UsageError(
                f"tiles of {tile[0]}x{tile[1]} are too small: the receptive field of {self.network} extends at least "
                f"{self.rows.overlap // 2} pixels to every side - give tiles of {self.smallest[0]}x{self.smallest[1]} "
                "or larger"
            )
        return steps[0], steps[1]

    def tile(self, size: Size, memory: int) -> Size | None:
        """Return the tile that fits into `memory` bytes, as close to a square as possible; None for the whole image.

        The tile is never smaller than `smallest`, even if that exceeds `memory`.
        """
        if self.needed(size) <= memory:
            return None
        pixels = memory / self.bytes_per_pixel
        height, width = self.smallest
        narrow = size[1] * size[1] <= pixels  # then tiles have the full width, and as many rows as fit
        rows = min(size[0], max(height, int(pixels / size[1]) if narrow else math.isqrt(int(pixels))))
        columns = min(size[1], max(width, int(pixels / rows)))
        return rows, columns


def whole(size: Size) -> Part:
    """Return the part that covers an image of this size."""
    return (0, size[0]), (0, size[1])


def parts(size: Size, step: Size) -> Iterator[Part]:
    """Divide an image into parts of size `step`, row by row; parts at the bottom and right may be smaller."""
    for top in range(0, size[0], step[0]):
        for left in range(0, size[1], step[1]):
            yield (top, min(size[0], top + step[0])), (left, min(size[1], left + step[1]))


def geometry_of(skeleton: nn.Module, minimum_size: int) -> Geometry:
    """Derive the tiling of a network from a forward pass without data.

    Args:
        skeleton: The network on torch's meta device.
        minimum_size: Smallest side in pixels that the network accepts.

    Raises:
        UsageError: The receptive field is unknown, or every score depends on the whole image.
    """
    name = type(skeleton).__name__
    for side in SIDES:
        trace = Trace(skeleton)
        logits = trace.run((side, side))
        field = trace.fields[logits]
        if field is None or any(spans is None for spans in trace.spans):
            raise UsageError(
                f"the receptive field of {name} is unknown, so images cannot be divided into tiles - "
                "leave out --tile, or set a smaller dataset.size"
            )
        layers = [[spans[axis] for spans in trace.spans if spans is not None] for axis in (0, 1)]
        multiple = getattr(skeleton, "size_multiple", 1)
        axes = [_axis(field.spans[axis], layers[axis], side, minimum_size, multiple) for axis in (0, 1)]
        if axes[0] is not None and axes[1] is not None:
            (rows, exact_rows), (columns, exact_columns) = axes[0], axes[1]
            local = not any(isinstance(module, STATISTICS) for module in skeleton.modules())
            return Geometry(name, rows, columns, trace.peak / side**2, exact_rows and exact_columns and local)
    raise UsageError(
        f"every score of {name} depends on the whole image, so images cannot be divided into tiles - leave out "
        "--tile, or set a smaller dataset.size"
    )


def _axis(span: Span, layers: list[Span], side: int, min_window: int, multiple: int) -> tuple[Axis, bool] | None:
    """Derive an axis, and True if its windows are exact, from the receptive fields of the scores and of all layers.

    Windows start at multiples of `multiple` too. None if every receptive field reaches the border of the image.
    """
    stride = math.lcm(multiple, *(_stride(layer, side) for layer in layers))
    interior = np.flatnonzero((span.first > 0) & (span.last < side - 1))
    if len(interior) < 3 * stride:
        return None
    distances = interior - span.first[interior], span.last[interior] - interior
    extents = [np.full(stride, distance.max()) for distance in distances]
    exact = True
    for distance, extent in zip(distances, extents, strict=True):
        for rest in range(stride):
            values = distance[interior % stride == rest]
            exact &= bool((values == values[0]).all())
            extent[rest] = values.max()
    return Axis(stride, extents[0], extents[1], min_window), exact


def _stride(span: Span, side: int) -> int:
    """Return the number of input pixels between neighbours of a feature map; 1 for an upsampled map."""
    interior = (span.first > 0) & (span.last < side - 1)
    steps = np.unique(np.diff(span.first[interior]))
    return int(steps[0]) if len(steps) == 1 and steps[0] > 0 else 1
