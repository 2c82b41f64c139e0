"""Object proposals: boxes of an image that may contain an object of any class, the most likely first.

DeconvNet processes each image in such boxes. Its authors used Edge Boxes (Zitnick and Dollar 2014) with edges from
structured forests. This module offers `windows`, which has no further dependencies; OpenCV's selective search and Edge
Boxes, if its contributed modules are installed; and boxes that another program wrote to a file.
"""

import csv
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from segdeconv.data.boxes import EMPTY, non_maximum_suppression
from segdeconv.drawing.draw import to_rgb
from segdeconv.errors import UsageError
from segdeconv.system.plain_data import Limits, PlainDataError, read_json

# A function of an image (H, W, C) and its name that returns (N, 4) boxes as in boxes.py, the most likely first.
Source = Callable[[np.ndarray, str], np.ndarray]

MAX_PROPOSALS = 1000  # per image
BUILT_IN = ("windows", "selective_search", "edge_boxes")


def source(name: str, *, all_windows: bool = False) -> Source:
    """Return the source of proposals that `--proposals` or `dataset.proposals` names.

    Args:
        name: One of BUILT_IN, or the path of a file or folder, see `read_boxes`.
        all_windows: Return all windows, even overlapping ones, for training on many crops of each object.

    Raises:
        UsageError: The source is unknown, cannot be read, or needs a module that is not installed.
    """
    if name == "windows":
        return lambda image, _: windows(image, max_boxes=None if all_windows else MAX_PROPOSALS)
    if name in BUILT_IN:
        require_ximgproc()  # before the first image
        find = selective_search if name == "selective_search" else edge_boxes
        return lambda image, _: find(image)
    return read_boxes(Path(os.path.expanduser(name)))


# Windows: a grid of boxes, ranked by the contrast of their colours to the surroundings

ASPECTS = (0.5, 0.71, 1.0, 1.41, 2.0)  # width : height
GROWTH = 1.4  # from one scale to the next
MIN_SIDE = 0.1  # relative to the image's shorter side
LEVELS = (4, 2, 2)  # of lightness and the two colour axes: 16 colours
FRAME_WIDTH = 0.2  # of the frame around a box, relative to its sides
OVERLAP = 0.5  # largest IoU of two windows
HISTOGRAM_SIDE = 256  # longer side in pixels of the image whose colours are counted


def windows(image: np.ndarray, *, max_boxes: int | None = MAX_PROPOSALS) -> np.ndarray:
    """Return boxes of a grid of positions, scales and aspects, ranked by the contrast to a frame around them.

    The contrast is half the chi-square distance of two colour histograms (as in Alexe et al. 2010, "What is an
    object?"), times the square root of the area, since small boxes often have a large random distance. Histograms
    are computed from integral images, for all boxes at once.

    Args:
        image: (H, W, C) uint8 or uint16.
        max_boxes: Maximum number of boxes after non-maximum suppression; None for all boxes without suppression.

    Returns:
        (N, 4) boxes, the best first.
    """
    rgb = to_rgb(image)
    scale = min(1.0, HISTOGRAM_SIDE / max(rgb.shape[:2]))
    if scale < 1:
        rgb = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    boxes = grid(rgb.shape[0], rgb.shape[1])
    best = np.argsort(-contrast(rgb, boxes), kind="stable")
    boxes = boxes[best]
    if max_boxes is not None:
        boxes = boxes[non_maximum_suppression(boxes, OVERLAP, max_boxes)]
    return np.rint(boxes / scale).astype(np.int64).clip(0, [image.shape[1], image.shape[0]] * 2)


def grid(height: int, width: int) -> np.ndarray:
    """Return boxes of all scales and aspects inside an image; neighbours of a size have an IoU of about a half."""
    boxes = [np.array([[0, 0, width, height]])]
    step = 1 / 3  # of a side; the IoU is then (1 - 1/3) / (1 + 1/3), a half
    side = max(4.0, MIN_SIDE * min(height, width))
    while side < max(height, width):
        for aspect in ASPECTS:
            wide, high = round(side * aspect**0.5), round(side / aspect**0.5)
            if 2 <= wide <= width and 2 <= high <= height:
                x = np.linspace(0, width - wide, 1 + int(np.ceil((width - wide) / (wide * step))))
                y = np.linspace(0, height - high, 1 + int(np.ceil((height - high) / (high * step))))
                low = np.stack(np.meshgrid(np.rint(x), np.rint(y)), axis=-1).reshape(-1, 2)
                boxes.append(np.concatenate([low, low + np.array([wide, high])], axis=1).astype(np.int64))
        side *= GROWTH
    return np.concatenate(boxes)


def contrast(rgb: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return (N,) float32 contrasts of (N, 4) boxes to the frames around them, 0 for boxes without a frame.

    Args:
        rgb: (H, W, 3) uint8.
        boxes: Boxes inside the image.
    """
    height, width = rgb.shape[:2]
    counts = _colour_counts(rgb)
    frame = np.maximum(1, np.rint((boxes[:, 2:] - boxes[:, :2]) * FRAME_WIDTH)).astype(np.int64)
    outer = np.concatenate(
        [np.maximum(boxes[:, :2] - frame, 0), np.minimum(boxes[:, 2:] + frame, [width, height])], axis=1
    )
    inside = _sums(counts, boxes)
    around = _sums(counts, outer) - inside
    area, frame_area = inside.sum(axis=1, keepdims=True), around.sum(axis=1, keepdims=True)
    share, other = inside / area, around / np.maximum(frame_area, 1)
    distance = ((share - other) ** 2 / np.maximum(share + other, 1e-6)).sum(axis=1) / 2
    return np.where(frame_area[:, 0] > 0, distance * np.sqrt(area[:, 0]), 0).astype(np.float32)


def _colour_counts(rgb: np.ndarray) -> np.ndarray:
    """Return (H + 1, W + 1, colours) int32 integral images of the pixels of each colour.

    Each channel of Lab is quantised at its own quantiles, so that the colours adapt to the image.
    """
    lab = cv2.cvtColor(cv2.GaussianBlur(rgb, (0, 0), 1.0), cv2.COLOR_RGB2Lab)
    colour = np.zeros(lab.shape[:2], dtype=np.int64)
    for channel, levels in enumerate(LEVELS):
        edges = np.quantile(lab[:, :, channel], np.arange(1, levels) / levels)
        colour = colour * levels + np.searchsorted(edges, lab[:, :, channel].ravel(), side="right").reshape(
            colour.shape
        )
    counts = np.zeros((colour.shape[0] + 1, colour.shape[1] + 1, int(np.prod(LEVELS))), dtype=np.int32)
    counts[1:, 1:] = colour[:, :, None] == np.arange(counts.shape[2])
    return counts.cumsum(axis=0, dtype=np.int32).cumsum(axis=1, dtype=np.int32)


def _sums(counts: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    x1, y1, x2, y2 = boxes.T
    return (counts[y2, x2] - counts[y1, x2] - counts[y2, x1] + counts[y1, x1]).astype(np.float32)


# OpenCV's contributed modules


def require_ximgproc() -> Any:
    """Return OpenCV's module ximgproc.

    Raises:
        UsageError: It is not installed.
    """
    module = getattr(cv2, "ximgproc", None)
    if module is None:
        raise UsageError(
            "proposals selective_search and edge_boxes need OpenCV's module ximgproc - install "
            "opencv-contrib-python-headless in place of opencv-python-headless, or use windows"
        )
    return module


def selective_search(image: np.ndarray, *, max_boxes: int = MAX_PROPOSALS) -> np.ndarray:
    """Return (N, 4) boxes of the fast variant of OpenCV's selective search (Uijlings et al. 2013), in its order."""
    search = require_ximgproc().segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(to_rgb(image)[:, :, ::-1]))
    search.switchToSelectiveSearchFast()
    return _corners(search.process())[:max_boxes]


def edge_boxes(image: np.ndarray, *, max_boxes: int = MAX_PROPOSALS) -> np.ndarray:
    """Return (N, 4) boxes of OpenCV's Edge Boxes, on thinned gradients instead of edges from structured forests."""
    finder = require_ximgproc().createEdgeBoxes()
    finder.setMaxBoxes(max_boxes)
    edges, orientation = _edges(to_rgb(image))
    rectangles, _ = finder.getBoundingBoxes(edges, orientation)
    return _corners(rectangles)


def _corners(rectangles: Any) -> np.ndarray:
    """Convert (N, 4) x, y, width, height to boxes."""
    boxes = np.asarray(rectangles, dtype=np.int64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _edges(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (H, W) float32 edges, 0..1 and one pixel wide, and the direction across them, 0..pi."""
    smooth = cv2.GaussianBlur(rgb, (0, 0), 1.5).astype(np.float32)
    across, down = cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1)
    strength = np.hypot(across, down)
    channel = strength.argmax(axis=2)[:, :, None]
    across, down, strength = (np.take_along_axis(a, channel, axis=2)[:, :, 0] for a in (across, down, strength))
    orientation = np.arctan2(down, across) % np.float32(np.pi)
    octant = np.rint(orientation / (np.pi / 4)).astype(int) % 4
    padded = np.pad(strength, 1)
    thin = np.zeros(strength.shape, dtype=bool)
    for index, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead, behind = (
            padded[1 + s * dy : padded.shape[0] - 1 + s * dy, 1 + s * dx : padded.shape[1] - 1 + s * dx]
            for s in (1, -1)
        )
        thin |= (octant == index) & (strength >= ahead) & (strength > behind)
    return np.where(thin, strength / max(float(strength.max()), 1e-6), 0).astype(np.float32), orientation


# Boxes of another program

FORMATS = (
    "a .csv with the header name,x1,y1,x2,y2,score, a .json {name: [[x1, y1, x2, y2, score], ...]}, or a folder of "
    "NAME.npy of shape (boxes, 4 or 5); the score is optional, x2 and y2 are exclusive"
)


def read_boxes(path: Path) -> Source:
    """Return a source of the boxes in a file or folder, sorted by score, or in their order without scores.

    Coordinates are pixels of the stored image. A box may extend beyond it, but must overlap it.

    Args:
        path: A file or folder in one of FORMATS.

    Raises:
        UsageError: The file does not exist or cannot be read.
    """
    if path.is_dir():
        return lambda image, name: _ranked(_array(path / f"{name}.npy"), path / f"{name}.npy", image)
    if not path.is_file():
        raise UsageError(f"proposals {path}: file not found - give {', '.join(BUILT_IN)}, or {FORMATS}")
    readers = {".csv": _read_csv, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise UsageError(f"proposals {path} has an unknown suffix - give {FORMATS}")
    boxes = readers[path.suffix.lower()](path)

    def boxes_of(image: np.ndarray, name: str) -> np.ndarray:
        if name not in boxes:
            raise UsageError(f"{path} has no boxes of {name} - add them under the image's name without suffix")
        return _ranked(boxes[name], f"{path}, {name}", image)

    return boxes_of


def _read_csv(path: Path) -> dict[str, Any]:
    boxes: dict[str, Any] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = ["x1", "y1", "x2", "y2", *(["score"] if "score" in (rows.fieldnames or ()) else [])]
            if missing := {"name", *columns} - set(rows.fieldnames or ()):
                raise UsageError(f"{path} has no column {', '.join(sorted(missing))} - give {FORMATS}")
            for row in rows:
                try:
                    values = [float(row[column]) for column in columns]
                except (TypeError, ValueError):
                    raise UsageError(f"{path}, line {rows.line_num}: not a number - give {FORMATS}") from None
                boxes.setdefault(row["name"], []).append(values)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is not a text table ({error}) - give {FORMATS}") from error
    return boxes


BOX_LIMITS = Limits(size=1 << 28, nodes=20_000_000)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, BOX_LIMITS)
    except PlainDataError as error:
        raise UsageError(f"{path} {error} - give {FORMATS}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} contains a {type(content).__name__} - give {FORMATS}")
    return content


def _array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UsageError(f"{path} is missing - add the boxes of every image, or use windows")
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise UsageError(f"{path} is not a .npy file of numbers ({error}) - give {FORMATS}") from error


def _ranked(rows: Any, where: object, image: np.ndarray) -> np.ndarray:
    """Convert rows of 4 or 5 numbers to boxes, the best score first; raises UsageError if they are invalid."""
    if isinstance(rows, Iterable) and not len(list(rows)):
        return EMPTY
    try:
        values = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.zeros(0)
    if values.ndim != 2 or values.shape[1] not in (4, 5) or not np.isfinite(values).all():
        raise UsageError(f"{where}: the boxes are not rows of 4 or 5 finite numbers - give {FORMATS}")
    height, width = image.shape[:2]
    x1, y1, x2, y2 = values[:, :4].T
    invalid = (x2 - x1 < 1) | (y2 - y1 < 1) | (x1 >= width) | (y1 >= height) | (x2 <= 0) | (y2 <= 0)
    invalid |= (np.abs(values[:, :4]) > 10 * max(height, width)).any(axis=1)
    if invalid.any():
        box = ", ".join(f"{value:g}" for value in values[invalid.argmax(), :4])
        raise UsageError(f"{where}: the box ({box}) is empty or outside the image of {height}x{width} - give {FORMATS}")
    order = np.argsort(-values[:, 4], kind="stable") if values.shape[1] == 5 else np.arange(len(values))
    return np.rint(values[order, :4]).astype(np.int64)
