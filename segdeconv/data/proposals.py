"""Object proposals: boxes of an image that may hold an object of any class, the most likely first.

DeconvNet looks at each image through such boxes. Its authors took Edge Boxes (Zitnick and Dollar 2014) with edges by
structured forests. Here are: `windows`, which needs nothing beyond this package; OpenCV's selective search and Edge
Boxes, where its contributed modules are installed; and boxes that another program wrote into a file.
"""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from segdeconv.data.boxes import EMPTY, spread
from segdeconv.drawing.draw import shown
from segdeconv.errors import UsageError

# (an image (H, W, C), its name) -> (N, 4) boxes as in boxes.py, the most likely first.
Source = Callable[[np.ndarray, str], np.ndarray]

MOST = 1000  # proposals of an image
BUILT_IN = ("windows", "selective_search", "edge_boxes")


def source(name: str, *, every: bool = False) -> Source:
    """What `--proposals` and `dataset.proposals` mean: one of BUILT_IN, or a file or folder that `read` takes.

    every: all windows, however they overlap: for training, which takes many crops of each object.
    """
    if name == "windows":
        return lambda image, _: windows(image, most=None if every else MOST)
    if name in BUILT_IN:
        contributed()  # or the first image would say that it is missing
        find = selective_search if name == "selective_search" else edge_boxes
        return lambda image, _: find(image)
    return read_boxes(Path(name))


# Windows: a grid of boxes, ranked by how much their colours differ from those around them.

ASPECTS = (0.5, 0.71, 1.0, 1.41, 2.0)  # width : height
GROWTH = 1.4  # from one scale to the next
SMALLEST = 0.1  # of the image's shorter side
LEVELS = (4, 2, 2)  # of lightness and two hues: 16 colours
AROUND = 0.2  # of the box's sides: how wide a frame it is compared with
OVERLAP = 0.5  # IoU that two windows may have
SEEN_AT = 256  # pixels of the longer side, at which colours are counted


def windows(image: np.ndarray, *, most: int | None = MOST) -> np.ndarray:
    """Boxes on a grid of places, scales and aspects, ranked by the contrast of their colours to a frame around them.

    The contrast is half the chi-square distance of two histograms of colours (that of Alexe et al. 2010, "What is an
    object?"), times the square root of the area, since small boxes have a large one by chance. Histograms are read off
    integral images, all boxes at once.

    most: of boxes that overlap the best stays, until there are so many; None for all of them.
    """
    picture = shown(image)
    scale = min(1.0, SEEN_AT / max(picture.shape[:2]))
    if scale < 1:
        picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    boxes = grid(picture.shape[0], picture.shape[1])
    best = np.argsort(-contrast(picture, boxes), kind="stable")
    boxes = boxes[best]
    if most is not None:
        boxes = boxes[spread(boxes, OVERLAP, most)]
    return np.rint(boxes / scale).astype(np.int64).clip(0, [image.shape[1], image.shape[0]] * 2)


def grid(height: int, width: int) -> np.ndarray:
    """Boxes of all scales and aspects inside an image; neighbours of one size have an IoU of about a half."""
    found = [np.array([[0, 0, width, height]])]
    step = 1 / 3  # of a side: (1 - 1/3) / (1 + 1/3) is a half
    side = max(4.0, SMALLEST * min(height, width))
    while side < max(height, width):
        for aspect in ASPECTS:
            wide, high = round(side * aspect**0.5), round(side / aspect**0.5)
            if 2 <= wide <= width and 2 <= high <= height:
                x = np.linspace(0, width - wide, 1 + int(np.ceil((width - wide) / (wide * step))))
                y = np.linspace(0, height - high, 1 + int(np.ceil((height - high) / (high * step))))
                low = np.stack(np.meshgrid(np.rint(x), np.rint(y)), axis=-1).reshape(-1, 2)
                found.append(np.concatenate([low, low + np.array([wide, high])], axis=1).astype(np.int64))
        side *= GROWTH
    return np.concatenate(found)


def contrast(picture: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 and (N, 4) boxes in it -> (N,) float32 scores; 0 where there is no frame around a box."""
    height, width = picture.shape[:2]
    counts = _colour_counts(picture)
    frame = np.maximum(1, np.rint((boxes[:, 2:] - boxes[:, :2]) * AROUND)).astype(np.int64)
    outer = np.concatenate(
        [np.maximum(boxes[:, :2] - frame, 0), np.minimum(boxes[:, 2:] + frame, [width, height])], axis=1
    )
    inside = _sums(counts, boxes)
    around = _sums(counts, outer) - inside
    area, left = inside.sum(axis=1, keepdims=True), around.sum(axis=1, keepdims=True)
    share, other = inside / area, around / np.maximum(left, 1)
    distance = ((share - other) ** 2 / np.maximum(share + other, 1e-6)).sum(axis=1) / 2
    return np.where(left[:, 0] > 0, distance * np.sqrt(area[:, 0]), 0).astype(np.float32)


def _colour_counts(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H + 1, W + 1, colours) int32: how many pixels of each colour lie above and left.

    Each channel of Lab is cut at its own quantiles, so that every image has its own colours.
    """
    lab = cv2.cvtColor(cv2.GaussianBlur(picture, (0, 0), 1.0), cv2.COLOR_RGB2Lab)
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


# What OpenCV's contributed modules offer


def contributed() -> Any:
    """OpenCV's module ximgproc, or one sentence."""
    module = getattr(cv2, "ximgproc", None)
    if module is None:
        raise UsageError(
            "proposals selective_search and edge_boxes: this OpenCV lacks its module ximgproc - install "
            "opencv-contrib-python-headless in place of opencv-python-headless, or use windows"
        )
    return module


def selective_search(image: np.ndarray, *, most: int = MOST) -> np.ndarray:
    """OpenCV's selective search (Uijlings et al. 2013), its fast variant, in the order that it gives."""
    search = contributed().segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(shown(image)[:, :, ::-1]))
    search.switchToSelectiveSearchFast()
    return _corners(search.process())[:most]


def edge_boxes(image: np.ndarray, *, most: int = MOST) -> np.ndarray:
    """OpenCV's Edge Boxes, on thinned gradients in place of the authors' edges by structured forests."""
    finder = contributed().createEdgeBoxes()
    finder.setMaxBoxes(most)
    edges, orientation = _edges(shown(image))
    found, _ = finder.getBoundingBoxes(edges, orientation)
    return _corners(found)


def _corners(found: Any) -> np.ndarray:
    """(N, 4) x, y, width, height -> boxes."""
    boxes = np.asarray(found, dtype=np.int64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _edges(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 -> (H, W) float32 twice: edges of 0..1, one pixel wide, and the direction across them, 0..pi."""
    smooth = cv2.GaussianBlur(picture, (0, 0), 1.5).astype(np.float32)
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
    "NAME.npy of shape (boxes, 4 or 5); the score may be missing, x2 and y2 lie one beyond the box"
)


def read_boxes(path: Path) -> Source:
    """Boxes of images by name, from a file or folder as FORMATS says; sorted by score, or in their order without one.

    Pixels of the image as it is stored; a box may leave it, but must share a pixel with it.
    """
    if path.is_dir():
        return lambda image, name: _ranked(_array(path / f"{name}.npy"), path / f"{name}.npy", image)
    if not path.is_file():
        raise UsageError(f"proposals {path}: there is no such file - give {', '.join(BUILT_IN)}, or {FORMATS}")
    readers = {".csv": _read_csv, ".json": _read_json}
    if path.suffix.lower() not in readers:
        raise UsageError(f"proposals {path} has an unknown suffix - give {FORMATS}")
    boxes = readers[path.suffix.lower()](path)

    def of(image: np.ndarray, name: str) -> np.ndarray:
        if name not in boxes:
            raise UsageError(f"{path} has no boxes of {name} - add them, by the image's name without suffix")
        return _ranked(boxes[name], f"{path}, {name}", image)

    return of


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
        raise UsageError(f"{path} is not a table as text ({error}) - give {FORMATS}") from error
    return boxes


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}) - give {FORMATS}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__} - give {FORMATS}")
    return content


def _array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UsageError(f"{path} is missing - every image needs its boxes there, or use windows")
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise UsageError(f"{path} is not a .npy file of numbers ({error}) - give {FORMATS}") from error


def _ranked(rows: Any, where: object, image: np.ndarray) -> np.ndarray:
    """Rows of 4 or 5 numbers -> boxes, the best score first; one sentence if they are nonsense."""
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
    wrong = (x2 - x1 < 1) | (y2 - y1 < 1) | (x1 >= width) | (y1 >= height) | (x2 <= 0) | (y2 <= 0)
    wrong |= (np.abs(values[:, :4]) > 10 * max(height, width)).any(axis=1)
    if wrong.any():
        box = ", ".join(f"{value:g}" for value in values[wrong.argmax(), :4])
        raise UsageError(f"{where}: the box ({box}) is empty or outside the image of {height}x{width} - give {FORMATS}")
    order = np.argsort(-values[:, 4], kind="stable") if values.shape[1] == 5 else np.arange(len(values))
    return np.rint(values[order, :4]).astype(np.int64)
