"""Ultralytics' YOLO format for segmentation, https://docs.ultralytics.com/datasets/segment/: one text file an image.

Each line is the number of a class and the corners of a polygon, as fractions of the image's width and height. Small
polygons are drawn over large ones, as Ultralytics does. An image without a text file has no objects.
"""

from collections import Counter
from pathlib import Path

from segdeconv.data.annotations.shapes import AnnotatedImage, Polygon, by_area, polygon

NAME = "YOLO text files"
BOX = 5  # numbers in a line of a box, which is not a polygon


def read(path: Path, image: str, names: dict[int, str], split: str | None, left_out: Counter[str]) -> AnnotatedImage:
    """Return the annotations of an image.

    Args:
        path: The text file.
        image: The path of the image.
        names: Name of each class by its number.
        split: The split that the folder states, or None.
        left_out: Receives the number of boxes.

    Raises:
        ValueError: A line is invalid.
    """
    shapes: list[Polygon] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        try:
            label, values = int(words[0]), [float(word) for word in words[1:]]
        except ValueError:
            raise ValueError(f"line {number} is not the number of a class and coordinates") from None
        if label not in names:
            raise ValueError(f"line {number} has class {label}, and the names are {', '.join(names.values())}")
        if len(words) == BOX:
            left_out["boxes without a polygon"] += 1
            continue
        try:
            shapes.append(polygon(names[label], zip(values[::2], values[1::2], strict=True), relative=True))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return AnnotatedImage(image, by_area(shapes), path, None, split)
