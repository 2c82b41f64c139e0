"""The shapes that labelling tools store, and the pixels they cover.

The pixel in row y and column x covers the square from (x, y) to (x + 1, y + 1), so that an image reaches from 0 to its
width and height. It belongs to a shape if its centre (x + 0.5, y + 0.5) does. A centre that lies on an edge belongs to
the shape on the right of the edge or below it, so polygons with a common edge neither share pixels nor leave any out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from segdeconv.classes import Classes, Colour
from segdeconv.errors import UsageError, first_line
from segdeconv.system.plain_data import PlainDataError

MAX_CROSSINGS = 1 << 27  # of the edges of one polygon with the rows of the image
Size = tuple[int, int]


class Covered(NamedTuple):
    """The pixels of a shape: a rectangle of the image, and which of its pixels belong to the shape.

    Attributes:
        rows: Rows of the image.
        columns: Columns of the image.
        inside: (rows, columns) bool.
    """

    rows: slice
    columns: slice
    inside: np.ndarray


@dataclass(frozen=True, eq=False)
class Shape(ABC):
    """A shape with a label.

    Attributes:
        label: Name of the class.
    """

    label: str

    @abstractmethod
    def cover(self, size: Size) -> Covered:
        """Return the pixels of the shape inside an image.

        Args:
            size: (H, W) of the image.
        """


@dataclass(frozen=True, eq=False)
class Polygon(Shape):
    """The area inside one or several closed rings, by the even-odd rule: a ring inside another is a hole.

    Attributes:
        rings: (n, 2) float64 of x and y each, in pixels.
        relative: The coordinates are fractions of the width and the height of the image.
    """

    rings: tuple[np.ndarray, ...]
    relative: bool = False

    def cover(self, size: Size) -> Covered:
        scale = np.array([size[1], size[0]], dtype=np.float64) if self.relative else 1.0
        return fill([ring * scale for ring in self.rings], size)

    @property
    def area(self) -> float:
        """The area of a polygon of one ring that does not intersect itself, in the unit of its coordinates."""
        total = 0.0
        for ring in self.rings:
            x, y = ring.T
            total += abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
        return total


def fill(rings: Sequence[np.ndarray], size: Size) -> Covered:
    """Return the pixels of an image whose centres are inside closed rings, by the even-odd rule.

    Args:
        rings: (n, 2) float64 of x and y each.
        size: (H, W) of the image; what lies outside it is clipped.

    Raises:
        UsageError: The edges cross more than `MAX_CROSSINGS` rows.
    """
    height, width = size
    ends = np.concatenate([np.hstack([ring, np.roll(ring, -1, axis=0)]) for ring in rings])
    # Every edge goes down, so that one that is followed in both directions crosses a row at the same place twice.
    ends = np.where((ends[:, 3] < ends[:, 1])[:, None], ends[:, [2, 3, 0, 1]], ends)
    x, y, end_x, end_y = ends.T
    top, bottom = (np.clip(np.ceil(value - 0.5), 0, height).astype(np.int64) for value in (y, end_y))
    count = bottom - top
    if (total := int(count.sum())) > MAX_CROSSINGS:
        raise UsageError(f"a polygon has edges that cross {total} rows of pixels in all - split or simplify it")
    if not total:
        return Covered(slice(0, 0), slice(0, 0), np.zeros((0, 0), dtype=bool))
    edge = np.repeat(np.arange(len(count)), count)
    row = np.arange(total) - np.repeat(np.cumsum(count) - count, count) + top[edge]
    slope = (end_x - x)[edge] / (end_y - y)[edge]
    crossing = x[edge] + (row + 0.5 - y[edge]) * slope
    column = np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)
    first_row, first = int(row.min()), int(column.min())
    rows, columns = int(row.max()) + 1 - first_row, int(column.max()) - first
    place = (row - first_row) * (columns + 1) + column - first
    toggles = (np.bincount(place, minlength=rows * (columns + 1)) & 1).astype(np.uint8).reshape(rows, columns + 1)
    inside = np.bitwise_xor.accumulate(toggles, axis=1)[:, :-1].view(bool)
    return Covered(slice(first_row, first_row + rows), slice(first, first + columns), inside)


@dataclass(frozen=True, eq=False)
class Ellipse(Shape):
    """An ellipse.

    Attributes:
        centre: x and y in pixels.
        radii: Half of the width and of the height before the rotation, in pixels.
        angle: Clockwise rotation around the centre, in degrees.
    """

    centre: tuple[float, float]
    radii: tuple[float, float]
    angle: float = 0.0

    def cover(self, size: Size) -> Covered:
        reach = max(self.radii) + 1
        (left, right), (top, bottom) = (
            np.clip([centre - reach, centre + reach], 0, limit).astype(int)
            for centre, limit in zip(self.centre, (size[1], size[0]), strict=True)
        )
        x = np.arange(left, right) + 0.5 - self.centre[0]
        y = (np.arange(top, bottom) + 0.5 - self.centre[1])[:, None]
        cos, sin = np.cos(np.radians(self.angle)), np.sin(np.radians(self.angle))
        across, down = (x * cos + y * sin) / self.radii[0], (y * cos - x * sin) / self.radii[1]
        return Covered(slice(top, bottom), slice(left, right), across**2 + down**2 <= 1)


@dataclass(frozen=True, eq=False)
class RunLengths(Shape):
    """The pixels of a rectangle as lengths of runs, of pixels outside and inside the shape in turn, outside first.

    Attributes:
        counts: (n,) int64 lengths.
        block: (H, W) of the rectangle.
        corner: x and y of its upper left pixel.
        by_column: Pixels are numbered column by column, as in COCO, otherwise row by row.
    """

    counts: np.ndarray
    block: Size
    corner: tuple[int, int] = (0, 0)
    by_column: bool = False

    def __post_init__(self) -> None:
        if min(self.counts, default=0) < 0 or int(self.counts.sum()) != self.block[0] * self.block[1]:
            raise ValueError(
                f"its run lengths add up to {int(self.counts.sum())} pixels instead of {self.block[0]}x{self.block[1]}"
            )

    @classmethod
    def of(cls, label: str, inside: np.ndarray, corner: tuple[int, int] = (0, 0)) -> RunLengths:
        """Return the run lengths of a mask.

        Args:
            label: Name of the class.
            inside: (H, W) bool.
            corner: x and y of its upper left pixel.
        """
        return cls(label, run_lengths(inside.ravel()), (inside.shape[0], inside.shape[1]), corner)

    def cover(self, size: Size) -> Covered:
        values = np.repeat(np.arange(len(self.counts)) % 2 == 1, self.counts)
        inside = values.reshape(self.block[::-1]).T if self.by_column else values.reshape(self.block)
        (left, top), (height, width) = self.corner, self.block
        place = []
        for start, extent, limit in ((top, height, size[0]), (left, width, size[1])):
            first = min(max(start, 0), limit)
            place.append((first, min(max(start + extent, first), limit), start))
        (first_row, last_row, row), (first_column, last_column, column) = place
        return Covered(
            slice(first_row, last_row),
            slice(first_column, last_column),
            inside[first_row - row : last_row - row, first_column - column : last_column - column],
        )


def run_lengths(inside: np.ndarray) -> np.ndarray:
    """Return the lengths of the runs of a (n,) bool array, False first.

    Examples:
        >>> run_lengths(np.array([True, True, False]))
        array([0, 2, 1])
    """
    changes = np.flatnonzero(np.diff(inside.astype(np.int8), prepend=0))
    return np.diff(np.concatenate([[0], changes, [len(inside)]]))


def rectangle(label: str, left: float, top: float, right: float, bottom: float, *, angle: float = 0.0) -> Polygon:
    """Return a rectangle, turned clockwise by `angle` degrees around its centre."""
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)], dtype=np.float64)
    return Polygon(label, (rotate(corners, corners.mean(axis=0), angle) if angle else corners,))


def rotate(points: np.ndarray, centre: np.ndarray, angle: float) -> np.ndarray:
    """Turn (n, 2) points clockwise, as seen on the screen, by `angle` degrees around a centre."""
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return (points - centre) @ np.array([[cos, sin], [-sin, cos]]) + centre


def polygon(label: str, *rings: Iterable[Iterable[float]], relative: bool = False) -> Polygon:
    """Return a polygon of rings of (x, y).

    Raises:
        ValueError: A ring has fewer than three points, or a coordinate is not a finite number.
    """
    arrays = tuple(np.array(list(ring), dtype=np.float64) for ring in rings)
    for ring in arrays:
        if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < 3:
            raise ValueError(f"a polygon of '{label}' has {len(ring)} points; it needs three pairs of x and y")
        if not np.isfinite(ring).all():
            raise ValueError(f"a polygon of '{label}' has a coordinate that is not a finite number")
    return Polygon(label, arrays, relative)


@dataclass(frozen=True, eq=False)
class AnnotatedImage:
    """The shapes of one image.

    Attributes:
        file: Path or name of the image file as the tool wrote it, with `/` between folders.
        shapes: The shapes in drawing order: where two overlap, the later one counts.
        source: The annotation file.
        size: (H, W) of the image according to the tool, or None.
        split: train, val or test, if the annotations say so.
    """

    file: str
    shapes: tuple[Shape, ...]
    source: Path
    size: Size | None = None
    split: str | None = None

    def draw(self, indices: Mapping[str, int], size: Size, background: int) -> np.ndarray:
        """Return the mask, (H, W) uint8 class indices.

        Args:
            indices: Class index by label.
            size: (H, W) of the image.
            background: Value of pixels that no shape covers.
        """
        mask = np.full(size, background, dtype=np.uint8)
        for shape in self.shapes:
            covered = shape.cover(size)
            mask[covered.rows, covered.columns][covered.inside] = indices[shape.label]
        return mask


@dataclass(frozen=True)
class Annotations:
    """The annotations of several images.

    Attributes:
        images: The images in the order of the file.
        labels: The classes in the order of the tool, also those without a shape.
        colours: RGB of a class, if the tool stores it.
        left_out: Number of annotations without an area, by kind.
        warnings: Further lines for the user.
        names_file: The list of classes beside the annotations that was read, or None.
    """

    images: tuple[AnnotatedImage, ...]
    labels: tuple[str, ...]
    colours: Mapping[str, Colour]
    left_out: Mapping[str, int]
    warnings: tuple[str, ...] = ()
    names_file: Path | None = None


def merge(parts: Sequence[Annotations]) -> Annotations:
    """Join the annotations of several files; the classes are in the order of their first occurrence."""
    left_out: dict[str, int] = {}
    for part in parts:
        for kind, number in part.left_out.items():
            left_out[kind] = left_out.get(kind, 0) + number
    return Annotations(
        tuple(image for part in parts for image in part.images),
        tuple(dict.fromkeys(label for part in parts for label in part.labels)),
        {label: colour for part in reversed(parts) for label, colour in part.colours.items()},
        left_out,
        tuple(line for part in parts for line in part.warnings),
        next((part.names_file for part in parts if part.names_file), None),
    )


def by_area(shapes: Iterable[Polygon]) -> tuple[Polygon, ...]:
    """Return polygons with the largest first, so that small ones are drawn over large ones."""
    return tuple(sorted(shapes, key=lambda shape: -shape.area))


def pairs_of(numbers: Sequence[float]) -> list[tuple[float, float]]:
    """Return the points of a flat list x, y, x, y, ...

    Raises:
        ValueError: The number of values is odd.

    Examples:
        >>> pairs_of([1, 2, 3, 4])
        [(1, 2), (3, 4)]
    """
    if len(numbers) % 2:
        raise ValueError(f"a list of x and y has {len(numbers)} numbers, an odd number")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


class LabelledRegion(NamedTuple):
    """A region to write.

    Attributes:
        label: Name of the class.
        ring: (n, 2) int, x and y of the corners, which lie between pixels.
        area: Number of pixels.
        box: (x, y, width, height) in pixels.
    """

    label: str
    ring: np.ndarray
    area: int
    box: tuple[int, int, int, int]


class LabelledImage(NamedTuple):
    """An image to write.

    Attributes:
        file: Path of the image file in the output folder.
        size: (H, W).
        split: Name of the split.
        regions: The regions, which do not overlap.
    """

    file: Path
    size: Size
    split: str
    regions: tuple[LabelledRegion, ...]


def written_labels(images: Sequence[LabelledImage], classes: Classes) -> list[str]:
    """Return the labels of written images: the classes except the background, and the label of ignored pixels."""
    used = {region.label for image in images for region in image.regions}
    names = [name for name in classes.names if name.casefold() != "background"]
    return [*names, *sorted(used - set(names))]


@contextmanager
def malformed(path: Path) -> Iterator[None]:
    """Turn what a reader raises for invalid content into a UsageError that names the file."""
    way_out = "correct or export the annotations again, or move the file away"
    try:
        yield
    except UsageError:
        raise
    except PlainDataError as error:
        raise UsageError(f"{path} {error} - {way_out}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {(error.strerror or str(error)).lower()} - {way_out}") from error
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise UsageError(f"{path}: invalid annotations: {reason} - {way_out}") from error
