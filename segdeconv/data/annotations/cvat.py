"""CVAT's XML "for images 1.1", https://docs.cvat.ai/docs/manual/advanced/formats/format-cvat/. Drawn by z_order."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from segdeconv.classes import Classes, hex_colour, parse_hex_colour
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
from segdeconv.data.splits import SPLIT_OF_WORD

NAME = "CVAT XML"
WITHOUT_AREA = {"polyline": "lines", "points": "points", "skeleton": "skeletons", "tag": "tags", "cuboid": "cuboids"}
MAX_SIZE = 1 << 30  # bytes of the file


class _Builder(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        """Refuse a document type, since its entities can describe endless texts."""
        raise ValueError("it has a document type, which CVAT does not write")


def parse(path: Path) -> Any:
    """Return the root element of an XML file.

    Raises:
        ValueError: The file is not XML, has a document type, or more than `MAX_SIZE` bytes.
    """
    if path.stat().st_size > MAX_SIZE:
        raise ValueError(f"it is larger than {MAX_SIZE >> 20} MiB")
    try:
        return ElementTree.parse(path, ElementTree.XMLParser(target=_Builder())).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"it is not XML: {error}") from error


def recognise(content: Any) -> bool:
    """Return whether the root element of an XML file is of this format."""
    return isinstance(content, ElementTree.Element) and content.tag == "annotations"


def read(path: Path, content: Any, split: str | None) -> Annotations:
    """Return the annotations of a file. See `coco.read`."""
    if content.find("track") is not None:
        raise ValueError("it has the tracks of a video; export it as 'CVAT for images' instead")
    labels = {str(entry.findtext("name")): entry.findtext("color") for entry in content.findall("meta//labels/label")}
    left_out: Counter[str] = Counter()
    images = []
    for image in content.findall("image"):
        drawn: list[tuple[int, Shape]] = []
        for entry in image:
            if entry.tag in WITHOUT_AREA:
                left_out[WITHOUT_AREA[entry.tag]] += 1
            else:
                drawn.append((int(entry.get("z_order", 0)), _shape(entry)))
        drawn.sort(key=lambda pair: pair[0])  # stable: the later of one order is on top
        images.append(
            AnnotatedImage(
                image.attrib["name"].replace("\\", "/"),
                tuple(shape for _, shape in drawn),
                path,
                (int(image.attrib["height"]), int(image.attrib["width"])),
                SPLIT_OF_WORD.get(image.get("subset", "").lower(), split),
            )
        )
    for shape in (shape for image in images for shape in image.shapes):
        labels.setdefault(shape.label, None)
    colours = {label: parse_hex_colour(text) for label, text in labels.items() if text}
    return Annotations(tuple(images), tuple(labels), colours, left_out)


def _shape(entry: ElementTree.Element) -> Shape:
    label = entry.attrib["label"]
    number = {name: float(text) for name, text in entry.attrib.items() if _is_number(text)}
    if entry.tag == "polygon":
        points = [point.split(",") for point in entry.attrib["points"].split(";")]
        return polygon(label, [(float(x), float(y)) for x, y in points])
    if entry.tag == "box":
        left, top, right, bottom = (number[name] for name in ("xtl", "ytl", "xbr", "ybr"))
        return rectangle(label, left, top, right, bottom, angle=number.get("rotation", 0.0))
    if entry.tag == "ellipse":
        centre, radii = (number["cx"], number["cy"]), (number["rx"], number["ry"])
        return Ellipse(label, centre, radii, number.get("rotation", 0.0))
    if entry.tag == "mask":
        counts = np.array([int(count) for count in entry.attrib["rle"].split(",")], dtype=np.int64)
        left, top, width, height = (int(number[name]) for name in ("left", "top", "width", "height"))
        return RunLengths(label, counts, (height, width), (left, top))
    raise ValueError(f"the shape '{entry.tag}' of '{label}' is unknown")


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def write(out: Path, images: Sequence[LabelledImage], classes: Classes) -> None:
    """Write annotations.xml; names are relative to images/ and each split is a subset."""
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    labels = ElementTree.SubElement(ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task"), "labels")
    colours = dict(zip(classes.names, map(hex_colour, classes.colours), strict=True))
    for label in written_labels(images, classes):
        entry = ElementTree.SubElement(labels, "label")
        ElementTree.SubElement(entry, "name").text = label
        ElementTree.SubElement(entry, "color").text = colours.get(label, "#000000")
    for number, image in enumerate(images):
        height, width = map(str, image.size)
        name = image.file.relative_to("images").as_posix()
        attributes = {"id": str(number), "name": name, "subset": image.split, "width": width, "height": height}
        parent = ElementTree.SubElement(root, "image", attributes)
        for region in image.regions:
            points = ";".join(f"{x},{y}" for x, y in region.ring.tolist())
            shape = {"label": region.label, "source": "manual", "occluded": "0", "points": points, "z_order": "0"}
            ElementTree.SubElement(parent, "polygon", shape)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(out / "annotations.xml", encoding="utf-8", xml_declaration=True)
