"""COCO's JSON of instances, https://cocodataset.org/#format-data, as CVAT, Roboflow, Label Studio and others export it.

Later annotations of the file are drawn over earlier ones, since the format has no order of its own. A crowd counts as
its class. Regions are polygons or run lengths.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segdeconv.classes import Classes, Colour
from segdeconv.data.annotations.shapes import (
    AnnotatedImage,
    Annotations,
    LabelledImage,
    RunLengths,
    Shape,
    pairs_of,
    polygon,
    written_labels,
)

NAME = "COCO JSON"


def recognise(content: Any) -> bool:
    """Return whether the content of a JSON file has this format."""
    return isinstance(content, dict) and all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    )


def read(path: Path, content: Any, split: str | None) -> Annotations:
    """Return the annotations of a file.

    Args:
        path: The file.
        content: Its content.
        split: The split that its name states, or None.

    Raises:
        ValueError, LookupError, TypeError: The content is invalid.
    """
    categories = sorted(content["categories"], key=lambda category: int(category["id"]))
    parents = {category.get("supercategory") for category in categories}
    used = {annotation["category_id"] for annotation in content["annotations"]}
    # Roboflow adds the name of the project as a category 0, of which the others are a part.
    dummies = {
        category["id"]
        for category in categories
        if category["id"] == 0 and 0 not in used and category["name"] in parents and len(categories) > 1
    }
    names = {category["id"]: str(category["name"]) for category in categories if category["id"] not in dummies}
    images = {image["id"]: image for image in content["images"]}
    shapes: dict[Any, list[Shape]] = {identity: [] for identity in images}
    left_out: Counter[str] = Counter()
    for annotation in content["annotations"]:
        identity, image, category = annotation["id"], annotation["image_id"], annotation["category_id"]
        if image not in images:
            raise ValueError(f"annotation {identity} is of image {image}, which 'images' does not list")
        if category not in names:
            raise ValueError(f"annotation {identity} has the category {category}, which 'categories' does not list")
        segmentation = annotation.get("segmentation")
        if not segmentation:
            left_out["boxes without a segmentation"] += 1
            continue
        size = int(images[image]["height"]), int(images[image]["width"])
        try:
            shapes[image] += _shapes(names[category], segmentation, size)
        except ValueError as error:
            raise ValueError(f"annotation {identity}: {error}") from error
    return Annotations(
        tuple(
            AnnotatedImage(
                str(image["file_name"]).replace("\\", "/"),
                tuple(shapes[identity]),
                path,
                (int(image["height"]), int(image["width"])),
                split,
            )
            for identity, image in images.items()
        ),
        tuple(names.values()),
        {str(entry["name"]): _colour(entry["color"]) for entry in categories if "color" in entry},
        left_out,
    )


def _colour(value: Sequence[int]) -> Colour:
    red, green, blue = value
    return int(red), int(green), int(blue)


def _shapes(label: str, segmentation: Any, size: tuple[int, int]) -> Iterator[Shape]:
    if isinstance(segmentation, list):
        for ring in segmentation:
            yield polygon(label, pairs_of(ring))
        return
    height, width = (int(side) for side in segmentation["size"])
    if (height, width) != size:
        raise ValueError(f"its run lengths are of {height}x{width} pixels and the image has {size[0]}x{size[1]} (HxW)")
    counts = segmentation["counts"]
    counts = parse_counts(counts) if isinstance(counts, str) else np.array(counts, dtype=np.int64)
    yield RunLengths(label, counts, size, by_column=True)


def parse_counts(text: str) -> np.ndarray:
    """Parse COCO's compressed run lengths: six bits a letter, from the third on the difference to the last but one.

    Raises:
        ValueError: The text ends inside a number, or has a letter that does not occur in such texts.

    Examples:
        >>> parse_counts("05000")
        array([0, 5, 0, 5, 0])
    """
    counts: list[int] = []
    value = shift = 0
    for letter in text.encode():
        bits = letter - 48
        if not 0 <= bits < 64:
            raise ValueError(f"its run lengths contain the letter {chr(letter)!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("its run lengths are cut off")
    return np.array(counts, dtype=np.int64)


def write(out: Path, images: Sequence[LabelledImage], classes: Classes) -> None:
    """Write annotations/instances_SPLIT.json; file names are relative to images/."""
    labels = {label: number for number, label in enumerate(written_labels(images, classes), start=1)}
    (out / "annotations").mkdir()
    for split in dict.fromkeys(image.split for image in images):
        entries: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image in (image for image in images if image.split == split):
            file = image.file.relative_to("images").as_posix()
            entries.append({"id": len(entries) + 1, "file_name": file, "height": image.size[0], "width": image.size[1]})
            annotations += [
                {
                    "id": len(annotations) + number,
                    "image_id": len(entries),
                    "category_id": labels[region.label],
                    "segmentation": [region.ring.ravel().tolist()],
                    "area": region.area,
                    "bbox": list(region.box),
                    "iscrowd": 0,
                }
                for number, region in enumerate(image.regions, start=1)
            ]
        categories: list[dict[str, Any]] = [
            {"id": number, "name": label, "supercategory": ""} for label, number in labels.items()
        ]
        for category in categories:
            if category["name"] in classes.names:
                category["color"] = list(classes.colours[classes.names.index(category["name"])])
        content = {"images": entries, "annotations": annotations, "categories": categories}
        (out / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
