"""Ultralytics' YOLO format for segmentation, https://docs.ultralytics.com/datasets/segment/: one text file an image.

Each line is the number of a class and the corners of a polygon, as fractions of the image's width and height. Small
polygons are drawn over large ones, as Ultralytics does. An image without a text file has no objects.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import yaml

from segdeconv.classes import Classes
from segdeconv.data.annotations.shapes import (
    AnnotatedImage,
    Annotations,
    LabelledImage,
    Polygon,
    by_area,
    malformed,
    polygon,
    written_labels,
)
from segdeconv.data.files.finding import find_files
from segdeconv.data.files.reading import read_list
from segdeconv.system.plain_data import read_yaml

NAME = "YOLO text files"
BOX = 5  # numbers in a line of a box, which is not a polygon


def read_folder(root: Path) -> Annotations | None:
    """Return the annotations of a folder of images/ and labels/, or None if it has no text file of labels."""
    left_out: Counter[str] = Counter()
    found = [(image, text) for image in find_files(root).files if (text := _label_file(image, root))]
    with_labels = [text for _, text in found if text.is_file()]
    if not with_labels:
        return None
    names, names_file = _names(root, with_labels)
    images = []
    for image, text in found:
        if text.is_file():
            with malformed(text):
                images.append(_read(text, str(image), names, left_out))
        else:
            images.append(AnnotatedImage(str(image), (), text.parent))
    empty = sum(not text.is_file() for _, text in found)
    line = f"{root}: {empty} of {len(found)} images have no text file of labels, so they have no objects - remove them"
    return Annotations(
        tuple(images),
        tuple(names.values()),
        {},
        left_out,
        (f"{line} if they were never labelled",) if empty else (),
        names_file,
    )


def _label_file(image: Path, root: Path) -> Path | None:
    parts = list(image.relative_to(root).parts)
    places = [place for place, part in enumerate(parts[:-1]) if part == "images"]
    if not places:
        return None
    parts[places[-1]] = "labels"
    text = root.joinpath(*parts).with_suffix(".txt")
    return text if text.parent.is_dir() else None


def _names(root: Path, files: Sequence[Path]) -> tuple[dict[int, str], Path | None]:
    """Return the names of a YAML file with `names`, of classes.txt or obj.names, or made of numbers, and this file."""
    for path in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        with malformed(path):
            content = read_yaml(path, as_text=True)
            names = content.get("names") if isinstance(content, dict) else None
            if isinstance(names, list):
                return {number: str(name) for number, name in enumerate(names)}, path
            if isinstance(names, dict):
                return {
                    int(number): str(name) for number, name in sorted(names.items(), key=lambda item: int(item[0]))
                }, path
    for path in (root / "classes.txt", root / "obj.names"):
        if path.is_file():
            return {number: name for number, (_, name) in enumerate(read_list(path))}, path
    numbers = set()
    for path in files:
        with malformed(path):
            numbers |= {
                int(line.split()[0]) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.split()
            }
    return {number: f"class_{number}" for number in sorted(numbers)}, None


def _read(path: Path, image: str, names: dict[int, str], left_out: Counter[str]) -> AnnotatedImage:
    """Return the annotations of an image.

    Args:
        path: The text file.
        image: The path of the image.
        names: Name of each class by its number.
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
    return AnnotatedImage(image, by_area(shapes), path)


def write(out: Path, images: Sequence[LabelledImage], classes: Classes) -> None:
    """Write labels/SPLIT/NAME.txt for every image, and data.yaml."""
    labels = {label: number for number, label in enumerate(written_labels(images, classes))}
    for image in images:
        path = out.joinpath("labels", *image.file.parts[1:]).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = image.size
        lines = [
            f"{labels[region.label]} " + " ".join(f"{x / width!r} {y / height!r}" for x, y in region.ring.tolist())
            for region in image.regions
        ]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    splits = {split: f"images/{split}" for split in dict.fromkeys(image.split for image in images)}
    content = {"path": ".", **splits, "names": {number: label for label, number in labels.items()}}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    (out / "data.yaml").write_text(text, encoding="utf-8")
