"""Regions of a mask as polygons along pixel edges.

A region is a 4-connected component of the pixels of one class. Its polygon runs clockwise around the outermost pixels,
through their corners, so that its area equals the number of pixels. Each hole is connected to the outer boundary by a
line that is followed in both directions and so encloses no area: one polygon describes the whole region in COCO's
format, https://cocodataset.org/#format-data, which has no holes.
"""

from collections.abc import Iterator
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
        polygon: (n, 2) int, x and y of pixel corners.
        score: Mean confidence of its pixels; 1.0 without a confidence map.
    """

    class_index: int
    area: int
    box: tuple[int, int, int, int]
    polygon: np.ndarray
    score: float

    def annotation(self, identity: int, image: int) -> dict[str, Any]:
        """Return the region as a COCO annotation; its category id is the class index plus one, since 0 means none.

        Args:
            identity: Id of the annotation.
            image: Id of the image.
        """
        return {
            "id": identity,
            "image_id": image,
            "category_id": self.class_index + 1,
            "segmentation": [self.polygon.ravel().tolist()],
            "area": self.area,
            "bbox": list(self.box),
            "iscrowd": 0,
            "score": round(self.score, 4),
        }


def regions(mask: np.ndarray, *, confidence: np.ndarray | None = None) -> Iterator[Region]:
    """Find the regions of a mask, ordered by class index, then from top to bottom.

    Memory is 4 bytes for each pixel, and more for each pixel on a boundary.

    Args:
        mask: (H, W) uint8 class indices.
        confidence: (H, W), the confidence of each pixel.
    """
    for index in (value for value, count in enumerate(pixel_counts(mask)) if count):
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
            yield Region(index, area, (x, y, width, height), _joined(loops[number]), float(score))


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
