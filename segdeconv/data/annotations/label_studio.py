"""Label Studio's exports JSON and JSON-MIN, https://labelstud.io/guide/export.html. Later regions are drawn on top.

Regions are brush strokes, polygons, rectangles and ellipses; coordinates are percent of the image's width and height.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree

import numpy as np

from segdeconv.classes import Classes, hex_colour
from segdeconv.data.annotations.shapes import (
    AnnotatedImage,
    Annotations,
    Ellipse,
    LabelledImage,
    Polygon,
    RunLengths,
    Shape,
    Size,
    polygon,
    rotate,
    written_labels,
)

NAME = "Label Studio JSON"
WITHOUT_AREA = {"keypoint": "points", "choices": "image tags", "textarea": "texts", "relation": "relations"}
MAX_PIXELS = 1 << 28


def recognise(content: Any) -> bool:
    """Return whether the content of a JSON file is one of the two exports."""
    return (
        isinstance(content, list)
        and bool(content)
        and isinstance(content[0], dict)
        and (
            (isinstance(content[0].get("data"), dict) and "annotations" in content[0])
            or "annotator" in content[0]
            or "annotation_id" in content[0]
        )
    )


def read(path: Path, content: Any, split: str | None) -> Annotations:
    """Return the annotations of a file; the classes are sorted by name. See `coco.read`."""
    left_out: Counter[str] = Counter()
    images: list[AnnotatedImage] = []
    warnings: list[str] = []
    several = 0
    for task in content:
        if "annotations" in task:
            kept = [entry for entry in task["annotations"] if not entry.get("was_cancelled")]
            several += len(kept) > 1
            kept.sort(key=lambda entry: not entry.get("ground_truth"))
            if not kept:
                left_out["skipped tasks"] += 1
                continue
            file, values = _image(task["data"]), list(_regions(kept[0]["result"]))
        else:
            file = _image(task)
            regions = [value for value in task.values() if isinstance(value, list)]
            values = [region for each in regions for region in each if isinstance(region, dict)]
        shapes: list[Shape] = []
        size: Size | None = None
        for value in values:
            kind = _kind(value)
            if kind in WITHOUT_AREA:
                left_out[WITHOUT_AREA[kind]] += 1
                continue
            label = _label(value)
            if label is None:
                left_out["regions without a label"] += 1
                continue
            if value.get("image_rotation"):
                raise ValueError(f"the image {file} was rotated in Label Studio; rotate its file and label it again")
            size = int(value["original_height"]), int(value["original_width"])
            shapes.append(_shape(kind, label, value, size))
        images.append(AnnotatedImage(file, tuple(shapes), path, size, split))
    if several:
        warnings.append(
            f"{path}: {several} images have several annotations, of which the one marked as ground truth is used, else "
            "the first - remove the others in Label Studio to choose"
        )
    labels = sorted({shape.label for image in images for shape in image.shapes})
    return Annotations(tuple(images), tuple(labels), {}, left_out, tuple(warnings))


def _image(data: Mapping[str, Any]) -> str:
    """Return the path of the image of a task, from the address under which Label Studio shows it."""
    texts = [value for key, value in data.items() if isinstance(value, str) and (key == "image" or "/" in value)]
    address = urlsplit(data.get("image") if isinstance(data.get("image"), str) else texts[0] if texts else "")
    if not address.path:
        raise ValueError("a task has no image")
    if local := parse_qs(address.query).get("d"):  # /data/local-files/?d=images/a.jpg
        return local[0].replace("\\", "/")
    return unquote(address.path)


def _regions(result: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield one mapping for each region, whose shape and label can be two entries with one id."""
    merged: dict[Any, dict[str, Any]] = {}
    for number, entry in enumerate(result):
        value = entry.get("value")
        if not isinstance(value, dict):
            merged[number] = {"type": entry.get("type", "relation")}
            continue
        region = merged.setdefault(entry.get("id", number), {})
        region |= {key: entry[key] for key in ("original_width", "original_height", "image_rotation") if key in entry}
        region |= value
    yield from merged.values()


def _kind(value: Mapping[str, Any]) -> str:
    if "rle" in value:
        return "brush"
    if "points" in value:
        return "polygon"
    if "radiusX" in value:
        return "ellipse"
    if "x" in value:
        return "rectangle" if "height" in value else "keypoint"
    return next((key for key in ("choices", "text") if key in value), str(value.get("type", "relation"))).replace(
        "text", "textarea"
    )


def _label(value: Mapping[str, Any]) -> str | None:
    """Return the only label of a region, or None.

    Raises:
        ValueError: It has several.
    """
    labels: Sequence[object] = next((entry for key, entry in value.items() if key.endswith("labels") and entry), [])
    if len(labels) > 1:
        raise ValueError(f"a region has the labels {', '.join(map(str, labels))}; a pixel has one class")
    return str(labels[0]) if labels else None


def _shape(kind: str, label: str, value: Mapping[str, Any], size: Size) -> Shape:
    height, width = size
    if kind == "brush":
        flags = decode_brush(bytes(value["rle"]), size)
        return RunLengths.of(label, flags)
    scale = np.array([width, height]) / 100
    if kind == "polygon":
        shape = polygon(label, value["points"])
        return Polygon(label, tuple(ring * scale for ring in shape.rings))
    x, y = float(value["x"]) * scale[0], float(value["y"]) * scale[1]
    angle = float(value.get("rotation", 0.0))
    if kind == "ellipse":
        radii = float(value["radiusX"]) * scale[0], float(value["radiusY"]) * scale[1]
        return Ellipse(label, (x, y), radii, angle)
    right, bottom = x + float(value["width"]) * scale[0], y + float(value["height"]) * scale[1]
    corners = np.array([(x, y), (right, y), (right, bottom), (x, bottom)])
    return Polygon(label, (rotate(corners, corners[0], angle),))  # around the upper left corner


def decode_brush(content: bytes, size: Size) -> np.ndarray:
    """Decode the mask of brush strokes: the alpha channel of an RGBA image, compressed by the library rle-pack.

    32 bits hold the number of values, 5 the bits of a value less one, and four times 4 the bits of a length less one.
    Blocks follow: a bit that says whether one value is repeated, 2 bits that choose among the four lengths, the length
    less one, and the value or values. https://github.com/thi-ng/umbrella/tree/develop/packages/rle-pack

    Returns:
        (H, W) bool.

    Raises:
        ValueError: The code is cut off, or has another size.
    """
    height, width = size
    if height * width > MAX_PIXELS:
        raise ValueError(f"a mask of {height}x{width} pixels is too large")
    bits = np.unpackbits(np.frombuffer(content, dtype=np.uint8))
    place = 0

    def number(count: int) -> int:
        nonlocal place
        if place + count > len(bits):
            raise ValueError("a mask of brush strokes is cut off")
        value = int("".join(map(str, bits[place : place + count].tolist())), 2)
        place += count
        return value

    total, word = number(32), number(5) + 1
    lengths = [number(4) + 1 for _ in range(4)]
    if total != height * width * 4 or word != 8:
        raise ValueError(f"a mask of brush strokes holds {total} values of {word} bit, not {height}x{width}x4 bytes")
    values = np.zeros(total, dtype=np.uint8)
    done = 0
    while done < total:
        repeated = number(1)
        count = min(number(lengths[number(2)]) + 1, total - done)
        if repeated:
            values[done : done + count] = number(word)
        else:
            if place + word * count > len(bits):
                raise ValueError("a mask of brush strokes is cut off")
            values[done : done + count] = np.packbits(bits[place : place + word * count])
            place += word * count
        done += count
    return values.reshape(height, width, 4)[:, :, 3] > 0


def write(out: Path, images: Sequence[LabelledImage], classes: Classes) -> None:
    """Write tasks.json, whose images are local files below the output folder, and config.xml, the interface."""
    tasks = []
    for image in images:
        height, width = image.size
        result = [
            {
                "id": f"region{number}",
                "type": "polygonlabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "value": {
                    "points": (region.ring * 100 / [width, height]).tolist(),
                    "closed": True,
                    "polygonlabels": [region.label],
                },
            }
            for number, region in enumerate(image.regions)
        ]
        address = f"/data/local-files/?d={quote(image.file.as_posix())}"
        tasks.append({"data": {"image": address}, "annotations": [{"result": result}]})
    (out / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", {"name": "image", "value": "$image"})
    labels = ElementTree.SubElement(view, "PolygonLabels", {"name": "label", "toName": "image"})
    colours = dict(zip(classes.names, map(hex_colour, classes.colours), strict=True))
    for label in written_labels(images, classes):
        ElementTree.SubElement(labels, "Label", {"value": label, "background": colours.get(label, "#808080")})
    ElementTree.indent(view)
    ElementTree.ElementTree(view).write(out / "config.xml", encoding="utf-8")
