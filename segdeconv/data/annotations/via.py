"""The JSON of the VGG Image Annotator 1 and 2, https://www.robots.ox.ac.uk/~vgg/software/via/: projects and exports.

Later regions are drawn over earlier ones. The class of a region is the region attribute that names it.
"""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segdeconv.classes import Classes
from segdeconv.data.annotations.shapes import (
    AnnotatedImage,
    Annotations,
    Ellipse,
    LabelledImage,
    Shape,
    polygon,
    rectangle,
    written_labels,
)

NAME = "VGG Image Annotator JSON"
PROJECT = "_via_img_metadata"
WITHOUT_AREA = {"polyline": "lines", "point": "points"}
CLASS_ATTRIBUTES = ("class", "label", "category", "name", "type", "object")  # in this order
ONLY_CLASS = "object"  # of regions without attributes


def recognise(content: Any) -> bool:
    """Return whether the content of a JSON file has this format."""
    if not isinstance(content, dict):
        return False
    images = content.get(PROJECT, content)
    return (
        isinstance(images, dict)
        and bool(images)
        and all(isinstance(image, dict) and "filename" in image and "regions" in image for image in images.values())
    )


def read(path: Path, content: Any, split: str | None) -> Annotations:
    """Return the annotations of a file. See `coco.read`."""
    entries = list(content.get(PROJECT, content).values())
    regions = [_regions(entry) for entry in entries]
    attribute = _class_attribute([region for each in regions for region in each])
    left_out: Counter[str] = Counter()
    images = []
    for entry, each in zip(entries, regions, strict=True):
        shapes: list[Shape] = []
        for region in each:
            shape = region["shape_attributes"]
            kind = str(shape["name"])
            if kind in WITHOUT_AREA:
                left_out[WITHOUT_AREA[kind]] += 1
            elif (label := _label(region.get("region_attributes", {}), attribute)) is None:
                left_out[f"regions without '{attribute}'"] += 1
            else:
                shapes.append(_shape(kind, label, shape))
        images.append(AnnotatedImage(str(entry["filename"]).replace("\\", "/"), tuple(shapes), path, None, split))
    options = content.get("_via_attributes", {}).get("region", {}).get(attribute, {}).get("options", {})
    labels = [*options, *sorted({shape.label for image in images for shape in image.shapes})]
    return Annotations(tuple(images), tuple(dict.fromkeys(map(str, labels))), {}, left_out)


def _regions(entry: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    regions = entry["regions"]
    return list(regions.values()) if isinstance(regions, dict) else regions  # version 1 numbers them as keys


def _class_attribute(regions: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the region attribute that holds the class, or None if no region has an attribute.

    Raises:
        ValueError: There are several, and none has a name of `CLASS_ATTRIBUTES`.
    """
    names = sorted({name for region in regions for name in region.get("region_attributes", {})})
    if len(names) < 2:
        return names[0] if names else None
    for wanted in CLASS_ATTRIBUTES:
        if match := [name for name in names if name.lower() == wanted]:
            return match[0]
    raise ValueError(
        f"its regions have the attributes {', '.join(names)}; the one with the class has to be called "
        f"{' or '.join(CLASS_ATTRIBUTES)}"
    )


def _label(attributes: Mapping[str, Any], attribute: str | None) -> str | None:
    if attribute is None:
        return ONLY_CLASS
    value = attributes.get(attribute)
    if isinstance(value, dict):  # check boxes
        chosen = [name for name, state in value.items() if state]
        value = chosen[0] if len(chosen) == 1 else None
    return str(value).strip() or None if value is not None else None


def _shape(kind: str, label: str, shape: Mapping[str, Any]) -> Shape:
    if kind == "polygon":
        return polygon(label, zip(shape["all_points_x"], shape["all_points_y"], strict=True))
    if kind == "rect":
        left, top, width, height = (float(shape[name]) for name in ("x", "y", "width", "height"))
        return rectangle(label, left, top, left + width, top + height)
    if kind in ("circle", "ellipse"):
        across, down = (float(shape["r" if kind == "circle" else name]) for name in ("rx", "ry"))
        angle = math.degrees(float(shape.get("theta", 0.0)))
        return Ellipse(label, (float(shape["cx"]), float(shape["cy"])), (across, down), angle)
    raise ValueError(f"the shape '{kind}' of '{label}' is unknown")


def parse_csv(text: str) -> dict[str, Any]:
    """Return the content of VIA's CSV export in the form of its JSON export.

    Raises:
        ValueError: The text is not VIA's CSV.
    """
    images: dict[str, Any] = {}
    rows = csv.DictReader(io.StringIO(text))
    if "region_shape_attributes" not in (rows.fieldnames or ()):
        raise ValueError("it is not a CSV file of the VGG Image Annotator")
    name = next(field for field in rows.fieldnames or () if field.strip("#") == "filename")
    for row in rows:
        image = images.setdefault(row[name], {"filename": row[name], "regions": []})
        shape = json.loads(row["region_shape_attributes"])
        if shape:
            attributes = json.loads(row["region_attributes"] or "{}")
            image["regions"].append({"shape_attributes": shape, "region_attributes": attributes})
    return images


def write(out: Path, images: Sequence[LabelledImage], classes: Classes) -> None:
    """Write via_project.json, which VIA 2 opens; file names are relative to images/."""
    entries = {}
    for image in images:
        file, path = image.file.relative_to("images").as_posix(), out / image.file
        size = path.stat().st_size if path.exists() else -1
        regions = [
            {
                "shape_attributes": {
                    "name": "polygon",
                    "all_points_x": region.ring[:, 0].tolist(),
                    "all_points_y": region.ring[:, 1].tolist(),
                },
                "region_attributes": {"class": region.label},
            }
            for region in image.regions
        ]
        entries[f"{file}{size}"] = {"filename": file, "size": size, "regions": regions, "file_attributes": {}}
    options = dict.fromkeys(written_labels(images, classes), "")
    content = {
        "_via_settings": {"core": {"default_filepath": "images/"}, "project": {"name": out.name}},
        PROJECT: entries,
        "_via_attributes": {"region": {"class": {"type": "dropdown", "options": options}}, "file": {}},
        "_via_data_format_version": "2.0.10",
        "_via_image_id_list": list(entries),
    }
    (out / "via_project.json").write_text(json.dumps(content), encoding="utf-8")
