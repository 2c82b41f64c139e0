"""labelme's JSON, one file for each image, https://github.com/wkentaro/labelme. Later shapes are drawn over earlier.

`__ignore__` stands for ignored pixels and `_background_` for the background, as in labelme's own lists of labels.
"""

import base64
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segdeconv.classes import Classes
from segdeconv.data.annotations.shapes import (
    AnnotatedImage,
    Annotations,
    Ellipse,
    LabelledImage,
    RunLengths,
    Shape,
    polygon,
    rectangle,
    written_labels,
)
from segdeconv.data.files.decoding import decode_flags

NAME = "labelme JSON"
WITHOUT_AREA = {"line": "lines", "linestrip": "lines", "point": "points", "points": "points"}


def recognise(content: Any) -> bool:
    """Return whether the content of a JSON file has this format."""
    return isinstance(content, dict) and isinstance(content.get("shapes"), list) and "imagePath" in content


def read(path: Path, content: Any, split: str | None) -> Annotations:
    """Return the annotations of the one image of a file. The classes are sorted by name. See `coco.read`."""
    left_out: Counter[str] = Counter()
    shapes: list[Shape] = []
    for entry in content["shapes"]:
        kind = entry.get("shape_type") or "polygon"
        if kind in WITHOUT_AREA:
            left_out[WITHOUT_AREA[kind]] += 1
        else:
            shapes.append(_shape(kind, str(entry["label"]), entry))
    height, width = content.get("imageHeight"), content.get("imageWidth")
    size = (int(height), int(width)) if height and width else None
    image = AnnotatedImage(str(content["imagePath"]).replace("\\", "/"), tuple(shapes), path, size, split)
    return Annotations((image,), tuple(sorted({shape.label for shape in shapes})), {}, left_out)


def _shape(kind: str, label: str, entry: dict[str, Any]) -> Shape:
    points = [(float(x), float(y)) for x, y in entry["points"]]
    if kind in ("polygon", "oriented_rectangle"):
        return polygon(label, points)
    first, second = points
    if kind == "rectangle":
        (left, right), (top, bottom) = (sorted(values) for values in zip(first, second, strict=True))
        return rectangle(label, left, top, right, bottom)
    if kind == "circle":  # the centre and a point on the circle
        radius = math.dist(first, second)
        return Ellipse(label, first, (radius, radius))
    if kind == "mask":
        corner = int(min(first[0], second[0])), int(min(first[1], second[1]))
        return RunLengths.of(label, decode_flags(base64.b64decode(entry["mask"])), corner)
    raise ValueError(f"the shape type '{kind}' of '{label}' is unknown")


def write(out: Path, images: Sequence[LabelledImage], classes: Classes) -> None:
    """Write NAME.json beside every image, and labels.txt, which `labelme --labels labels.txt` reads."""
    for image in images:
        shapes = [
            {
                "label": region.label,
                "points": region.ring.tolist(),
                "group_id": None,
                "description": "",
                "shape_type": "polygon",
                "flags": {},
                "mask": None,
            }
            for region in image.regions
        ]
        content: dict[str, Any] = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": image.file.name,
            "imageData": None,
            "imageHeight": image.size[0],
            "imageWidth": image.size[1],
        }
        (out / image.file).with_suffix(".json").write_text(json.dumps(content), encoding="utf-8")
    labels = [label for label in written_labels(images, classes) if label != "__ignore__"]
    lines = "".join(f"{label}\n" for label in ("__ignore__", "_background_", *labels))
    (out / "labels.txt").write_text(lines, encoding="utf-8")
