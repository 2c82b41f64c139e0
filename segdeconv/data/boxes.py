"""Boxes of an image: (N, 4) int64 of x1, y1, x2, y2 in pixels; x2 and y2 are exclusive, so x2 - x1 is the width.

A box may extend beyond its image; crops are padded there.
"""

import numpy as np

EMPTY = np.zeros((0, 4), dtype=np.int64)


def bounding_box(inside: np.ndarray) -> np.ndarray:
    """Return the tight box (4,) around the true pixels of a (H, W) bool mask with at least one.

    Examples:
        >>> bounding_box(np.eye(4, 6, k=2, dtype=bool)).tolist()
        [2, 0, 6, 4]
    """
    columns, rows = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def expanded(boxes: np.ndarray, factor: float) -> np.ndarray:
    """Return boxes with sides `factor` times as long and the same centres, rounded outwards to whole pixels.

    Examples:
        >>> expanded(np.array([[10, 0, 20, 5]]), 1.2).tolist()
        [[9, -1, 21, 6]]
    """
    grown = (boxes[:, 2:] - boxes[:, :2]) * (factor - 1) / 2
    # 1.2 has no exact binary representation: without the margin, 10 pixels would become 13.
    low = np.floor(boxes[:, :2] - grown + 1e-6)
    return np.concatenate([low, np.ceil(boxes[:, 2:] + grown - 1e-6)], axis=1).astype(np.int64)


def squared(boxes: np.ndarray) -> np.ndarray:
    """Return square boxes: the shorter side is extended equally at both ends, or by one pixel more at the far end.

    Examples:
        >>> squared(np.array([[0, 10, 20, 15]])).tolist()
        [[0, 3, 20, 23]]
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    longest = sides.max(axis=1, keepdims=True)
    low = boxes[:, :2] - (longest - sides) // 2
    return np.concatenate([low, low + longest], axis=1)


def clipped(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return boxes clipped to an image of size (H, W)."""
    height, width = size
    return np.clip(boxes, 0, [width, height, width, height])


def cut(array: np.ndarray, box: np.ndarray, fill: int) -> np.ndarray:
    """Crop a (H, W) or (H, W, C) array to a box, with `fill` where the box extends beyond the array."""
    x1, y1, x2, y2 = (int(value) for value in box)
    inside = array[max(0, y1) : max(0, y2), max(0, x1) : max(0, x2)]
    if inside.shape[:2] == (y2 - y1, x2 - x1):
        return inside.copy()
    result = np.full((y2 - y1, x2 - x1, *array.shape[2:]), fill, dtype=array.dtype)
    top, left = max(0, -y1), max(0, -x1)
    result[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return result


def iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the (N, M) float32 intersection over union of (N, 4) and (M, 4) boxes."""
    first, second = boxes[:, None].astype(np.float32), others[None].astype(np.float32)
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])
    shared = sides.clip(min=0).prod(axis=2)
    area, other = ((box[..., 2:] - box[..., :2]).prod(axis=2) for box in (first, second))
    return shared / (area + other - shared)


def non_maximum_suppression(boxes: np.ndarray, overlap: float, max_boxes: int) -> np.ndarray:
    """Select boxes in their order, skipping those that overlap a selected one.

    Args:
        boxes: (N, 4), the best first.
        overlap: Largest intersection over union of two selected boxes.
        max_boxes: Maximum number of selected boxes.

    Returns:
        (M,) int64 indices of the selected boxes.
    """
    selected: list[int] = []
    # One array per side, since whole rows of boxes would be copied for every selected box.
    x1, y1, x2, y2 = np.ascontiguousarray(boxes.T, dtype=np.float32)
    area, remaining = (x2 - x1) * (y2 - y1), np.arange(len(boxes))
    while len(remaining) and len(selected) < max_boxes:
        selected.append(int(remaining[0]))
        width = np.minimum(x2, x2[0]) - np.maximum(x1, x1[0])
        height = np.minimum(y2, y2[0]) - np.maximum(y1, y1[0])
        shared = np.maximum(width, 0) * np.maximum(height, 0)
        free = shared <= overlap * (area + area[0] - shared)
        free[0] = False
        x1, y1, x2, y2, area, remaining = (values[free] for values in (x1, y1, x2, y2, area, remaining))
    return np.array(selected, dtype=np.int64)
