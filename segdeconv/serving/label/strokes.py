"""Strokes of a person: validated as they arrive, and drawn into masks of any size."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import cv2
import numpy as np

from segdeconv.data.preprocessing import Size
from segdeconv.errors import UsageError

IGNORE = 255  # the mask value of pixels that nobody painted, in memory and in files
MAX_POINTS = 20_000  # of a stroke
MAX_RADIUS = 2_000.0  # of the brush, in pixels of the photo
MAX_COORDINATE = 1e6  # beyond the side of any photo
FLOOD_SIDE = 2_048  # pixels around the point, in each direction, that a flood may reach
MIN_FLOOD_AREA = 12  # pixels of the parts and holes of a flooded region that are kept
FRACTION_BITS = 4  # of coordinates as OpenCV takes them, in sixteenths of a pixel

Stroke = dict[str, Any]  # as in the log: `tool`, `class` (None erases), and the points of the tool


def checked_stroke(content: Any, labels: Iterable[int]) -> Stroke:
    """Check a stroke that the page sent, and return it with nothing but known keys.

    Args:
        content: `tool` is `brush` (`points` and `radius`), `polygon` (`rings`) or `flood` (`point` and `tolerance`).
            `class` is a label, or None for the eraser. Coordinates are x, y in pixels of the upright photo.
        labels: The labels that exist.

    Raises:
        UsageError: The stroke is not valid.
    """
    if not isinstance(content, Mapping):
        raise UsageError("a stroke is not an object - reload the page")
    tool, label = content.get("tool"), content.get("class")
    if label is not None and (isinstance(label, bool) or not isinstance(label, int) or label not in set(labels)):
        raise UsageError(f"the stroke's class {label!r} does not exist - reload the page")
    if tool == "brush":
        points, radius = _points(content.get("points"), 1), _number(content.get("radius"), "radius", MAX_RADIUS)
        if radius < 0.25:
            raise UsageError(f"the brush's radius {radius:g} is too small - give at least 0.25 pixels")
        return {"tool": tool, "class": label, "radius": radius, "points": points}
    if tool == "polygon":
        rings = content.get("rings")
        if not isinstance(rings, list) or not rings:
            raise UsageError("the polygon has no ring - draw at least three points")
        checked = [_points(ring, 3) for ring in rings]
        if sum(map(len, checked)) > MAX_POINTS:
            raise UsageError(f"the polygon has more than {MAX_POINTS} points - draw it in parts")
        return {"tool": tool, "class": label, "rings": checked}
    if tool == "flood":
        (point,) = _points([content.get("point")], 1)
        tolerance = abs(_number(content.get("tolerance"), "tolerance", 255))
        return {"tool": tool, "class": label, "point": point, "tolerance": tolerance}
    raise UsageError(f"the tool {tool!r} is unknown - use brush, polygon or flood")


def _points(content: Any, least: int) -> list[list[float]]:
    if not isinstance(content, list) or not least <= len(content) <= MAX_POINTS:
        raise UsageError(f"a stroke needs {least} to {MAX_POINTS} points - draw it again")
    if any(not isinstance(point, list) or len(point) != 2 for point in content):
        raise UsageError("a point of a stroke is not a pair of numbers - reload the page")
    return [[_number(value, "coordinate", MAX_COORDINATE) for value in point] for point in content]


def _number(value: Any, name: str, largest: float) -> float:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or abs(value) > largest:
        raise UsageError(f"the stroke's {name} is {value!r}, not a number up to {largest:g} - reload the page")
    return round(float(value), 2)


def draw_stroke(mask: np.ndarray, stroke: Stroke, photo: Size) -> None:
    """Draw a stroke into a mask of any size, in which even a thin stroke is at least a pixel wide.

    Args:
        mask: (h, w) uint8, changed in place.
        stroke: A checked stroke.
        photo: (H, W) of the photo, to whose pixels the coordinates refer.
    """
    value = IGNORE if stroke["class"] is None else stroke["class"]
    scale = np.array([mask.shape[1] / photo[1], mask.shape[0] / photo[0]])

    def fixed(points: list[list[float]]) -> np.ndarray:  # the centre of the first pixel is 0.5 on the page, 0 in OpenCV
        return np.round((np.array(points) * scale - 0.5) * 2**FRACTION_BITS).astype(np.int32)

    if stroke["tool"] == "brush":
        points = fixed(stroke["points"])
        radius = max(0.5, stroke["radius"] * float(scale.mean()))
        thickness = max(1, round(2 * radius))
        cv2.polylines(mask, [points], False, value, thickness, cv2.LINE_8, FRACTION_BITS)
        for x, y in (points[0], points[-1]):
            cv2.circle(mask, (int(x), int(y)), round(radius * 2**FRACTION_BITS), value, -1, cv2.LINE_8, FRACTION_BITS)
    else:
        cv2.fillPoly(mask, [fixed(ring) for ring in stroke["rings"]], value, cv2.LINE_8, FRACTION_BITS)


def flood(image: np.ndarray, stroke: Stroke) -> Stroke:
    """Return the polygon of the region of like colour around a point: connected, each channel within the tolerance.

    The region is found once and stored as a polygon, so that a mask drawn from the log does not depend on the photo.

    Args:
        image: (H, W, 3) uint8, the upright photo.
        stroke: A checked `flood`.

    Raises:
        UsageError: The point lies outside the photo.
    """
    x, y = (math.floor(value) for value in stroke["point"])
    height, width = image.shape[:2]
    if not (0 <= x < width and 0 <= y < height):
        raise UsageError(f"the point x={x}, y={y} is outside the photo of {width}x{height} pixels - click inside it")
    top, left = max(0, y - FLOOD_SIDE), max(0, x - FLOOD_SIDE)
    window = cv2.medianBlur(np.ascontiguousarray(image[top : y + FLOOD_SIDE, left : x + FLOOD_SIDE]), 3)
    filled = np.zeros((window.shape[0] + 2, window.shape[1] + 2), dtype=np.uint8)
    flags = 4 | cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE | (1 << 8)
    tolerance = (stroke["tolerance"],) * 3
    cv2.floodFill(window, filled, (x - left, y - top), 0, tolerance, tolerance, flags)
    contours, _ = cv2.findContours(filled[1:-1, 1:-1], cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    shapes = [cv2.approxPolyDP(contour, 0.75, True) for contour in contours]
    shapes = [shape for shape in shapes if len(shape) > 2 and cv2.contourArea(shape) >= MIN_FLOOD_AREA]
    kept, count = [], 0
    for shape in sorted(shapes, key=cv2.contourArea, reverse=True):
        count += len(shape)
        if count <= MAX_POINTS:
            kept.append(shape)
    rings = [(shape[:, 0] + np.array([left, top]) + 0.5).tolist() for shape in kept]
    if not rings:  # a few pixels only
        rings = [[[x, y], [x + 1, y], [x + 1, y + 1], [x, y + 1]]]
    return {"tool": "polygon", "class": stroke["class"], "rings": rings}
