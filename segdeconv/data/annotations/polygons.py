"""Regions of a mask as polygons along pixel edges.

A region is a 4-connected component of the pixels of one class. Its outer ring runs clockwise around the outermost
pixels, through their corners, and the rings of its holes run counterclockwise, so that the area between them equals the
number of pixels. No ring touches itself, as the simple features of GIS require. In COCO's format,
https://cocodataset.org/#format-data, which has no holes, one polygon describes the whole region: each hole is connected
to the outer boundary by a line that is followed in both directions and so encloses no area.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from segdeconv.drawing.draw import pixel_counts

# Directions along pixel edges, each a right turn from the previous one: east, south, west, north.
STEPS = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])
ROWS = 1 << 9  # image rows whose confidence is summed at once


@dataclass(frozen=True)
class Region:
    """A connected region of one class.

    Attributes:
        area: Number of pixels.
        box: (x, y, width, height) in pixels.
        loops: Boundaries, the outermost first: (n, 2) int, x and y of pixel corners. They touch themselves where two
            pixels of the region touch only at a corner.
        score: Mean confidence of its pixels; 1.0 without a confidence map.
    """

    class_index: int
    area: int
    box: tuple[int, int, int, int]
    loops: list[np.ndarray]
    score: float

    @property
    def polygon(self) -> np.ndarray:
        """(n, 2) int, one polygon that visits each hole from the first corner of the outermost loop."""
        return _joined(self.loops)

    @property
    def rings(self) -> list[np.ndarray]:
        """(n, 2) int each, the outer ring and those of the holes, none of which touches itself."""
        rings = [ring for loop in self.loops for ring in _split(loop)]
        outer = next(index for index, ring in enumerate(rings) if signed_area(ring) > 0)
        return [rings[outer], *rings[:outer], *rings[outer + 1 :]]

    def annotation(self, identity: int, image: int, pixel_area: float | None = None) -> dict[str, Any]:
        """Return the region as a COCO annotation; its category id is the class index plus one, since 0 means none.

        Args:
            identity: Id of the annotation.
            image: Id of the image.
            pixel_area: Area of a pixel in square metres, if known, for the area in `area_m2`.
        """
        metres = {} if pixel_area is None else {"area_m2": float(f"{self.area * pixel_area:.9g}")}
        return {
            "id": identity,
            "image_id": image,
            "category_id": self.class_index + 1,
            "segmentation": [self.polygon.ravel().tolist()],
            "area": self.area,
            **metres,
            "bbox": list(self.box),
            "iscrowd": 0,
            "score": round(self.score, 4),
        }


def regions(
    mask: np.ndarray, *, confidence: np.ndarray | None = None, without: Collection[int] = ()
) -> Iterator[Region]:
    """Find the regions of a mask, ordered by class index, then from top to bottom.

    Memory is 4 bytes for each pixel, and more for each pixel on a boundary.

    Args:
        mask: (H, W) uint8 class indices.
        confidence: (H, W), the confidence of each pixel.
        without: Values of the mask that are left out, such as the background.
    """
    for index in (value for value, count in enumerate(pixel_counts(mask)) if count and value not in without):
        count, numbered, stats, _ = cv2.connectedComponentsWithStats((mask == index).view(np.uint8), connectivity=4)
        sums = np.zeros(count)
        if confidence is not None:
            for top in range(0, len(mask), ROWS):
                place = slice(top, top + ROWS)
                sums += np.bincount(numbered[place].ravel(), confidence[place].ravel(), minlength=count)
        loops = _loops(numbered, count)
        for number in range(1, count):  # component 0 holds the pixels of all other classes
            x, y, width, height, area = (int(value) for value in stats[number])
            score = sums[number] / area if confidence is not None else 1.0
            yield Region(index, area, (x, y, width, height), loops[number], float(score))


def _loops(numbered: np.ndarray, count: int) -> dict[int, list[np.ndarray]]:
    """Trace the boundaries of components 1 to `count` - 1: (n, 2) corners (x, y), the outermost loop first."""
    inside = np.pad(numbered > 0, 1)  # two neighbours of one class are in the same component
    width = numbered.shape[1]
    corners_wide = width + 1
    middle = inside[1:-1, 1:-1]
    # The sides of pixels that border on another component, directed so that the pixel lies to the right.
    sides = (
        (inside[:-2, 1:-1], 0),
        (inside[1:-1, 2:], 1),
        (inside[2:, 1:-1], corners_wide + 1),
        (inside[1:-1, :-2], corners_wide),
    )
    starts, directions, owners = [], [], []
    for direction, (beside, corner) in enumerate(sides):
        y, x = np.divmod(np.flatnonzero(middle & ~beside), width)
        starts.append(y * corners_wide + x + corner)
        directions.append(np.full(len(y), direction))
        owners.append(numbered[y, x])
    start, heading, owner = (np.concatenate(values) for values in (starts, directions, owners))
    key = start * 4 + heading
    order = np.argsort(key)
    start, heading, owner, key = start[order], heading[order], owner[order], key[order]
    end = start + STEPS[heading, 0] * corners_wide + STEPS[heading, 1]
    following = np.full(len(key), -1)
    # Where two pixels of a region touch only at a corner, a right turn stays with the same pixel, since regions are
    # 4-connected. Later turns override earlier ones: left, straight on, right.
    for turn in (3, 0, 1):
        wanted = end * 4 + (heading + turn) % 4
        place = np.searchsorted(key, wanted).clip(0, len(key) - 1)
        exists = (key[place] == wanted) & (owner[place] == owner)
        following = np.where(exists, place, following)
    corner_y, corner_x = np.divmod(start, corners_wide)
    turns = heading != heading[np.argsort(following)]  # a straight continuation adds no corner
    loops: dict[int, list[np.ndarray]] = {number: [] for number in range(1, count)}
    successors, straight, visited = following.tolist(), (~turns).tolist(), bytearray(len(key))
    for first in range(len(successors)):
        if visited[first]:
            continue
        corners, edge = [], first
        while not visited[edge]:
            visited[edge] = 1
            if not straight[edge]:
                corners.append(edge)
            edge = successors[edge]
        # The first edge in reading order is the top of the uppermost pixel, so the outermost loop comes first.
        loops[int(owner[first])].append(np.stack([corner_x[corners], corner_y[corners]], axis=1))
    return loops


def _joined(loops: list[np.ndarray]) -> np.ndarray:
    """Join the loops of a region into one polygon, which visits each hole from the outermost loop's first corner."""
    pieces = [loops[0]]
    for hole in loops[1:]:
        pieces += [loops[0][:1], hole, hole[:1]]
    return np.concatenate([*pieces, loops[0][:1]]) if len(loops) > 1 else loops[0]


def _split(loop: np.ndarray) -> list[np.ndarray]:
    """Split a loop at the corners that it visits twice into rings, each of which visits every corner once."""
    rings: list[np.ndarray] = []
    corners: list[tuple[int, int]] = []
    place: dict[tuple[int, int], int] = {}
    for x, y in loop.tolist():
        if (first := place.get((x, y))) is not None:
            rings.append(np.array(corners[first:]))
            for corner in corners[first + 1 :]:
                del place[corner]
            del corners[first + 1 :]
            continue
        place[x, y] = len(corners)
        corners.append((x, y))
    return [*rings, np.array(corners)]


def signed_area(ring: np.ndarray) -> float:
    """Return the area of a ring of (n, 2) points; positive if it is clockwise where y points down."""
    x, y = (ring - ring[0]).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
