"""A project of Supervisely: meta.json, and the folders img/ and ann/ of each data set.

https://developer.supervisely.com/getting-started/supervisely-annotation-format. Later objects are drawn over earlier.
The coordinates of its polygons name pixels, and the outline belongs to the object.
"""

import base64
import io
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from segdeconv.classes import Classes, hex_colour, parse_hex_colour
from segdeconv.data.annotations.shapes import (
    AnnotatedImage,
    Annotations,
    LabelledImage,
    LabelledRegion,
    RunLengths,
    Shape,
    Size,
    fill,
    written_labels,
)
from segdeconv.data.files.decoding import decode_flags

NAME = "Supervisely project"
WITHOUT_AREA = {
    "line": "lines", "polyline": "lines", "point": "points", "graph": "key points", "cuboid": "cuboids",
}  # fmt: skip
MAX_BITMAP = 1 << 28  # bytes of a decompressed PNG


def recognise_meta(content: Any) -> bool:
    """Return whether the content of a meta.json has this format."""
    return isinstance(content, dict) and isinstance(content.get("classes"), list) and "tags" in content


def read_meta(content: Any) -> Annotations:
    """Return the classes of a project, without images."""
    colours = {
        str(entry["title"]): parse_hex_colour(str(entry["color"])) for entry in content["classes"] if entry.get("color")
    }
    return Annotations((), tuple(str(entry["title"]) for entry in content["classes"]), colours, {})


def recognise(content: Any) -> bool:
    """Return whether the content of a JSON file is the annotation of one image."""
    return (
        isinstance(content, dict) and isinstance(content.get("objects"), list) and isinstance(content.get("size"), dict)
    )


def read(path: Path, content: Any, split: str | None) -> Annotations:
    """Return the annotations of one image, whose file is img/NAME for ann/NAME.json. See `coco.read`."""
    size = int(content["size"]["height"]), int(content["size"]["width"])
    left_out: Counter[str] = Counter()
    shapes: list[Shape] = []
    for entry in content["objects"]:
        kind = str(entry["geometryType"])
        if kind in WITHOUT_AREA:
            left_out[WITHOUT_AREA[kind]] += 1
        else:
            shapes.append(_shape(kind, str(entry["classTitle"]), entry, size))
    file = path.parent.parent / "img" / path.name.removesuffix(".json")
    image = AnnotatedImage(file.as_posix(), tuple(shapes), path, size, split)
    return Annotations((image,), tuple(dict.fromkeys(shape.label for shape in shapes)), {}, left_out)


def _shape(kind: str, label: str, entry: dict[str, Any], size: Size) -> RunLengths:
    if kind == "bitmap":
        png = zlib.decompressobj().decompress(base64.b64decode(entry["bitmap"]["data"]), MAX_BITMAP)
        x, y = entry["bitmap"]["origin"]
        return RunLengths.of(label, decode_flags(png), (int(x), int(y)))
    points = entry["points"]
    exterior = [[float(x), float(y)] for x, y in points["exterior"]]
    if kind == "rectangle":
        (left, top), (right, bottom) = exterior
        exterior = [[left, top], [right, top], [right, bottom], [left, bottom]]
    elif kind != "polygon":
        raise ValueError(f"the geometry '{kind}' of '{label}' is unknown")
    return _inside(label, exterior, [[[float(x), float(y)] for x, y in hole] for hole in points["interior"]], size)


def _inside(label: str, exterior: list[list[float]], holes: list[list[list[float]]], size: Size) -> RunLengths:
    """Fill the pixels on and inside the exterior, without those on and inside the holes, as Supervisely does."""
    rings = [np.array(ring, dtype=np.float64).reshape(-1, 2).round() for ring in (exterior, *holes)]
    if not all(np.isfinite(ring).all() and (np.abs(ring) < 1 << 30).all() for ring in rings):
        raise ValueError(f"a polygon of '{label}' has a coordinate that is not a number of a pixel")
    canvas = np.zeros(size, dtype=np.uint8)
    for value, ring in zip((1, *[0] * len(holes)), rings, strict=True):
        if len(ring):
            cv2.fillPoly(canvas, [ring.astype(np.int32)], value)
    rows, columns = (np.flatnonzero(canvas.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return RunLengths(label, np.zeros(1, dtype=np.int64), (0, 0))
    top, left = int(rows[0]), int(columns[0])
    return RunLengths.of(label, canvas[top : rows[-1] + 1, left : columns[-1] + 1] > 0, (left, top))


def write(out: Path, images: Sequence[LabelledImage], classes: Classes) -> None:
    """Write meta.json and SPLIT/ann/NAME.json; regions are bitmaps, since polygons name pixels rather than edges."""
    colours = dict(zip(classes.names, map(hex_colour, classes.colours), strict=True))
    entries = [
        {"title": label, "shape": "bitmap", "color": colours.get(label, "#808080").upper(), "id": number}
        for number, label in enumerate(written_labels(images, classes), start=1)
    ]
    (out / "meta.json").write_text(json.dumps({"classes": entries, "tags": []}), encoding="utf-8")
    for image in images:
        path = out / image.file.parent.parent / "ann" / f"{image.file.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = {"height": image.size[0], "width": image.size[1]}
        objects = [_object(region, image.size) for region in image.regions]
        content = {"description": "", "tags": [], "size": size, "objects": objects}
        path.write_text(json.dumps(content), encoding="utf-8")


def _object(region: LabelledRegion, size: Size) -> dict[str, Any]:
    covered = fill([region.ring.astype(np.float64)], size)
    png = io.BytesIO()
    Image.fromarray(covered.inside).save(png, "PNG")
    data = base64.b64encode(zlib.compress(png.getvalue())).decode()
    return {
        "classTitle": region.label,
        "geometryType": "bitmap",
        "tags": [],
        "description": "",
        "bitmap": {"data": data, "origin": [covered.columns.start, covered.rows.start]},
    }
