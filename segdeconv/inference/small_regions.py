"""Removal of small regions from a mask.

A region is a 4-connected component of the pixels of one class, as in `polygons`.
"""

import heapq
from collections import Counter

import cv2
import numpy as np

from segdeconv.drawing.draw import pixel_counts

MAX_CLASSES = 256  # of a uint8 mask


def merge_small_regions(mask: np.ndarray, min_area: int) -> np.ndarray:
    """Give every region of fewer than `min_area` pixels the class that borders on most of its outline.

    The smallest region is first, of equal ones the one whose first pixel is further up or, in the same row, further
    left. It becomes part of its neighbours of that class, and the grown region is treated like any other. Of classes
    with equal parts of an outline, the one with the lower index is chosen. Afterwards no region is smaller, unless the
    whole mask is.

    Args:
        mask: (H, W) uint8 class indices.
        min_area: Minimum area of a region in pixels.

    Returns:
        (H, W) uint8; `mask` itself if it has no small region.
    """
    numbers, first = _number_small(mask, min_area)
    if numbers is None:
        return mask
    inside = np.flatnonzero(numbers >= MAX_CLASSES)
    small = numbers.ravel()[inside] - MAX_CLASSES
    regions = _Regions(
        areas=np.bincount(small, minlength=len(first)).tolist(),
        classes=mask.ravel()[first].tolist(),
        borders=_borders(numbers, len(first)),
    )
    merged = mask.copy()
    merged.ravel()[inside] = regions.merge(min_area)[small]
    return merged


def _number_small(mask: np.ndarray, min_area: int) -> tuple[np.ndarray | None, np.ndarray]:
    """Number the small regions of a mask.

    Returns:
        (H, W) int32: 256 plus the number of a small region, counted in the order of their first pixels, and the class
        index of every other pixel. None if there is no small region. And the flat index of each one's first pixel.
    """
    numbers, count = None, 0
    for index in (value for value, pixels in enumerate(pixel_counts(mask)) if pixels and min_area > 1):
        _, components, stats, _ = cv2.connectedComponentsWithStats((mask == index).view(np.uint8), connectivity=4)
        small = stats[:, cv2.CC_STAT_AREA] < min_area
        small[0] = False  # the pixels of all other classes
        if not small.any():
            continue
        if numbers is None:
            numbers = mask.astype(np.int32)
        renumbered = np.zeros(len(small), dtype=np.int32)
        renumbered[small] = MAX_CLASSES + count + np.arange(small.sum())
        count += int(small.sum())
        pixels = np.flatnonzero(small[components])
        numbers.ravel()[pixels] = renumbered[components.ravel()[pixels]]
    if numbers is None:
        return None, np.zeros(0, dtype=np.int64)
    inside = np.flatnonzero(numbers >= MAX_CLASSES)
    first = np.zeros(count, dtype=np.int64)
    first[(numbers.ravel()[inside] - MAX_CLASSES)[::-1]] = inside[::-1]  # of several, the last assignment stays
    order = np.argsort(first)
    place = np.empty(count, dtype=np.int32)
    place[order] = MAX_CLASSES + np.arange(count)
    numbers.ravel()[inside] = place[numbers.ravel()[inside] - MAX_CLASSES]
    return numbers, first[order]


def _borders(numbers: np.ndarray, count: int) -> list[dict[int, int]]:
    """Return the length of the border of each small region with each number beside it, in pixel edges."""
    pairs = []
    for one, other in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:])):
        edge = (one != other) & ((one >= MAX_CLASSES) | (other >= MAX_CLASSES))
        pairs += [np.stack([one[edge], other[edge]]), np.stack([other[edge], one[edge]])]
    inner, outer = np.concatenate(pairs, axis=1).astype(np.int64)
    keys, lengths = np.unique((inner * (MAX_CLASSES + count) + outer)[inner >= MAX_CLASSES], return_counts=True)
    borders: list[dict[int, int]] = [{} for _ in range(count)]
    inner, outer = np.divmod(keys, MAX_CLASSES + count)
    for one, other, length in zip(inner.tolist(), outer.tolist(), lengths.tolist(), strict=True):
        borders[one - MAX_CLASSES][other] = length
    return borders


class _Regions:
    """The small regions of a mask, by number; a neighbour below 256 stands for all large regions of that class.

    Args:
        areas: Number of pixels.
        classes: Class index.
        borders: Length of the border with each neighbour, whose number is a class index, or 256 plus that of a region.
    """

    def __init__(self, areas: list[int], classes: list[int], borders: list[dict[int, int]]) -> None:
        self.areas, self.classes, self.borders = areas, classes, borders
        self.parents = list(range(len(areas)))  # the region each one was merged into; itself if none
        self.first = list(range(len(areas)))  # the number of the merged region whose first pixel comes first

    def merge(self, min_area: int) -> np.ndarray:
        """Merge all regions below `min_area` and return the (n,) uint8 class index of each."""
        waiting = [(area, number, number) for number, area in enumerate(self.areas)]
        heapq.heapify(waiting)
        while waiting:
            area, _, number = heapq.heappop(waiting)
            if self.parents[number] != number or area != self.areas[number] or not self.borders[number]:
                continue  # it was merged, has grown since, or is the whole mask
            chosen = self._majority(number)
            grown = self._adopt(number, chosen)
            if grown is not None and self.areas[grown] < min_area:
                heapq.heappush(waiting, (self.areas[grown], self.first[grown], grown))
        return np.array([self.classes[self._root(number)] for number in range(len(self.parents))], dtype=np.uint8)

    def _class_of(self, neighbour: int) -> int:
        return neighbour if neighbour < MAX_CLASSES else self.classes[neighbour - MAX_CLASSES]

    def _majority(self, number: int) -> int:
        votes: Counter[int] = Counter()
        for neighbour, length in self.borders[number].items():
            votes[self._class_of(neighbour)] += length
        return min(votes, key=lambda index: (-votes[index], index))

    def _adopt(self, number: int, chosen: int) -> int | None:
        """Merge a region with its neighbours of a class; return the result, or None if a large region is part of it."""
        same = [neighbour for neighbour in self.borders[number] if self._class_of(neighbour) == chosen]
        members = [number, *(neighbour - MAX_CLASSES for neighbour in same if neighbour >= MAX_CLASSES)]
        large = len(members) == len(same)
        base = max(members, key=lambda member: len(self.borders[member]))  # so that few borders move
        target = chosen if large else MAX_CLASSES + base
        for member in members:
            if member == base and not large:
                continue
            for neighbour, length in self.borders[member].items():
                if neighbour >= MAX_CLASSES:
                    other = self.borders[neighbour - MAX_CLASSES]
                    del other[MAX_CLASSES + member]
                    if neighbour != target:
                        other[target] = other.get(target, 0) + length
                if not large and neighbour != target:
                    self.borders[base][neighbour] = self.borders[base].get(neighbour, 0) + length
            self.borders[member] = {}
        for member in members:
            self.parents[member] = base
        self.classes[base] = chosen
        if large:
            self.borders[base] = {}
            return None
        self.areas[base] = sum(self.areas[member] for member in members)
        self.first[base] = min(self.first[member] for member in members)
        return base

    def _root(self, number: int) -> int:
        while self.parents[number] != number:
            self.parents[number] = number = self.parents[self.parents[number]]
        return number
