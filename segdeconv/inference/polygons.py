"""Regions of a mask as polygons along the edges of pixels, and back.

A region is what hangs together over the sides of pixels (4-connected) in one class. Its polygon goes clockwise around
its outermost pixels, through their corners, so that its area is the number of pixels. A hole is entered along a line
and left on the same line, which encloses nothing: one polygon tells the whole region to any reader of COCO's format,
https://cocodataset.org/#format-data, which knows no holes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from segdeconv.drawing.draw import pixel_counts

# Directions along the edges of pixels, each a right turn from the one before: east, south, west, north.
STEPS = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])
ROWS = 1 << 9  # of an image that are summed at once


@dataclass(frozen=True)
class Region:
    """class_index; area: pixels; box: (x, y, width, height); polygon: (n, 2) int, x and y of corners of pixels.

    score: the mean confidence of its pixels; 1.0 where none was given.
    """

    class_index: int
    area: int
    box: tuple[int, int, int, int]
    polygon: np.ndarray
    score: float

    def annotation(self, identity: int, image: int) -> dict[str, Any]:
        """As COCO writes it. identity, image: ids; the category's is the class index plus one, since 0 means none."""
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


def regions(mask: np.ndarray, *, least: int = 1, confidence: np.ndarray | None = None) -> Iterator[Region]:
    """The regions of a (H, W) uint8 mask of at least so many pixels, class by class, from the top.

    confidence: (H, W), of each pixel's class. Holds 4 bytes for each pixel, and more for each on an outline.
    """
    for index in (value for value, count in enumerate(pixel_counts(mask)) if count >= least):
        count, numbered, stats, _ = cv2.connectedComponentsWithStats((mask == index).view(np.uint8), connectivity=4)
        stats[0, cv2.CC_STAT_AREA] = 0  # what is not of this class
        kept = stats[:, cv2.CC_STAT_AREA] >= least
        kept[0] = False
        if not kept.any():
            continue
        sums = np.zeros(count)
        if confidence is not None:
            for top in range(0, len(mask), ROWS):
                place = slice(top, top + ROWS)
                sums += np.bincount(numbered[place].ravel(), confidence[place].ravel(), minlength=count)
        loops = _loops(numbered, kept)
        for number in np.flatnonzero(kept).tolist():
            x, y, width, height, area = (int(value) for value in stats[number])
            score = sums[number] / area if confidence is not None else 1.0
            yield Region(index, area, (x, y, width, height), _joined(loops[number]), float(score))


def _loops(numbered: np.ndarray, kept: np.ndarray) -> dict[int, list[np.ndarray]]:
    """All outlines of the components that are kept, by their numbers: (n, 2) corners (x, y), the outermost first."""
    inside = np.pad(kept[numbered], 1)  # of two neighbours in a class both are, in one component, or neither
    width = numbered.shape[1]
    corners_wide = width + 1
    middle = inside[1:-1, 1:-1]
    # Of a pixel's four sides, those to another component; with the pixel on the right of the way along the side.
    sides = (
        (inside[:-2, 1:-1], 0),
        (inside[1:-1, 2:], 1),
        (inside[2:, 1:-1], corners_wide + 1),
        (inside[1:-1, :-2], corners_wide),
    )
    starts, ways, owners = [], [], []
    for direction, (beside, corner) in enumerate(sides):
        y, x = np.divmod(np.flatnonzero(middle & ~beside), width)
        starts.append(y * corners_wide + x + corner)
        ways.append(np.full(len(y), direction))
        owners.append(numbered[y, x])
    start, way, owner = (np.concatenate(values) for values in (starts, ways, owners))
    key = start * 4 + way
    order = np.argsort(key)
    start, way, owner, key = start[order], way[order], owner[order], key[order]
    end = start + STEPS[way, 0] * corners_wide + STEPS[way, 1]
    following = np.full(len(key), -1)
    # Where two pixels of a region touch at a corner, the right turn stays with the pixel: over corners nothing hangs
    # together.
    for turn in (3, 0, 1):
        wanted = end * 4 + (way + turn) % 4
        place = np.searchsorted(key, wanted).clip(0, len(key) - 1)
        there = (key[place] == wanted) & (owner[place] == owner)
        following = np.where(there, place, following)
    corner_y, corner_x = np.divmod(start, corners_wide)
    turns = way != way[np.argsort(following)]  # an edge that goes on straight adds no corner
    found: dict[int, list[np.ndarray]] = {int(number): [] for number in np.flatnonzero(kept)}
    after, straight, seen = following.tolist(), (~turns).tolist(), bytearray(len(key))
    for first in range(len(after)):
        if seen[first]:
            continue
        corners, at = [], first
        while not seen[at]:
            seen[at] = 1
            if not straight[at]:
                corners.append(at)
            at = after[at]
        # The first edge in reading order is the top of the uppermost pixel, so the outermost outline comes first.
        found[int(owner[first])].append(np.stack([corner_x[corners], corner_y[corners]], axis=1))
    return found


def _joined(loops: list[np.ndarray]) -> np.ndarray:
    """One polygon: the outermost outline, from whose first corner every hole is entered and left."""
    whole = [loops[0]]
    for hole in loops[1:]:
        whole += [loops[0][:1], hole, hole[:1]]
    return np.concatenate([*whole, loops[0][:1]]) if len(loops) > 1 else loops[0]
