"""Annotations of labelling tools in a folder of images: which files they are, and the image file of each entry."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from segdeconv.classes import BLACK, Classes, Colour, default_colours, distinct_colours
from segdeconv.data.annotations import coco, cvat, label_studio, labelme, supervisely, via, yolo
from segdeconv.data.annotations.shapes import AnnotatedImage, Annotations, merge
from segdeconv.data.class_file import IGNORE, MAX_CLASSES
from segdeconv.data.files.finding import Listing, describe_skipped, find_files
from segdeconv.data.files.reading import read_list
from segdeconv.errors import UsageError, first_line
from segdeconv.system.plain_data import Limits, PlainDataError, read_json, read_yaml

TOOLS = (coco, labelme, supervisely, via, label_studio, cvat)
FORMATS = "COCO, labelme, CVAT, YOLO, Label Studio, Supervisely and VGG Image Annotator"
LIMITS = Limits(size=1 << 31, nodes=200_000_000)
ENDINGS = {".json", ".xml", ".csv"}
BACKGROUNDS = {"background", "_background_", "__background__"}
IGNORED = {"ignore", "__ignore__"}
SPLIT_WORDS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?![a-z])")
UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")  # Label Studio writes a random number before the name of an uploaded file

Unlabelled = Literal["background", "ignore"]


class AnnotatedFolder(NamedTuple):
    """The annotated images of a folder.

    Attributes:
        tool: Name of the format.
        labels: The classes in the order of the tool.
        colours: RGB of a class, if the tool stores it.
        images: The image file of each sample, by the name of the sample.
        entries: The annotations of each sample.
        warnings: A line for everything that is left out.
    """

    tool: str
    labels: tuple[str, ...]
    colours: Mapping[str, Colour]
    images: dict[str, Path]
    entries: dict[str, AnnotatedImage]
    warnings: tuple[str, ...]


def find_annotations(root: Path, given: str | Mapping[str, str] | None) -> AnnotatedFolder | None:
    """Find the annotations of the images in a folder, and the images.

    Args:
        root: The folder.
        given: A file or folder of annotations, or a file for each split; None searches in `root`.

    Returns:
        The annotations; None if none were given and the folder has none.

    Raises:
        UsageError: The annotations are invalid, are of several tools, or name no image in the folder.
    """
    files: tuple[tuple[str | None, Path], ...] = ((None, root),)
    if isinstance(given, Mapping):
        files = tuple((split, _given_path(root, name)) for split, name in given.items())
        if wrong := sorted(set(given) - {"train", "val", "test"}):
            raise UsageError(f"dataset.annotations has the split '{wrong[0]}' - the splits are train, val and test")
    elif given is not None:
        files = ((None, _given_path(root, given)),)
    stamps = tuple((path, *_stamp(path)) for _, place in files for path in _files_of(place))
    return _find(root, files, stamps, given is not None)


def _given_path(root: Path, name: str) -> Path:
    typed = Path(os.path.expanduser(name))
    for path in (root / typed, typed):
        if path.exists():
            return path
    raise UsageError(f"dataset.annotations={name} not found in {root} - give a file or folder of annotations")


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _files_of(place: Path) -> list[Path]:
    """Return the files in a folder that may be annotations, or the file itself."""
    if place.is_file():
        return [place]
    found = []
    for folder, inner, names in os.walk(place):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        endings = {*ENDINGS, ".txt", ".yaml", ".yml"}
        found += [
            Path(folder, name)
            for name in sorted(names)
            if os.path.splitext(name)[1].lower() in endings and not name.startswith(".")
        ]
    return found


@lru_cache(maxsize=2)  # the data set is built once for each split
def _find(
    root: Path,
    places: tuple[tuple[str | None, Path], ...],
    stamps: tuple[tuple[Path, int, int], ...],
    required: bool,
) -> AnnotatedFolder | None:
    parts: dict[str, list[Annotations]] = {}
    for split, place in places:
        for tool, annotations in _read(root, place, split, required):
            parts.setdefault(tool, []).append(annotations)
    if len(parts) > 1:
        examples = [f"{tool} ({found[0].images[0].source})" for tool, found in parts.items() if found[0].images]
        raise UsageError(
            f"{root} has annotations of several tools: {' and '.join(examples)} - set dataset.annotations=FILE"
        )
    if not parts:
        if required:
            raise UsageError(
                f"dataset.annotations={places[0][1]} has no annotations of {FORMATS} - give such a file or folder"
            )
        return None
    (tool, found), *_ = parts.items()
    if tool == coco.NAME and not places[0][0]:
        _require_one_file_a_split(found)
    return _with_images(root, tool, merge(found))


def _require_one_file_a_split(parts: Sequence[Annotations]) -> None:
    """Refuse several COCO files of one split: objects, key points and panoptic segments of the same images."""
    files: dict[str | None, Path] = {}
    for image in (part.images[0] for part in parts if part.images):
        other = files.setdefault(image.split, image.source)
        if other != image.source:
            raise UsageError(
                f"{other} and {image.source} are both annotations of {image.split or 'all images'} - choose with "
                f"dataset.annotations={image.source.name}, or '{{train: FILE, val: FILE}}'"
            )


def _read(root: Path, place: Path, split: str | None, required: bool) -> Iterator[tuple[str, Annotations]]:
    """Yield the name of the tool and the annotations of every file of a folder, or of one file."""
    if place.is_dir() and (labels := _yolo(place)):
        yield yolo.NAME, labels
        return
    meta = place / "meta.json"
    for path in _files_of(place):
        if place.is_dir() and path.suffix.lower() not in ENDINGS:
            continue
        with malformed(path):
            content = _content(path)
            if supervisely.recognise_meta(content):
                if path == meta or place.is_file():
                    yield supervisely.NAME, supervisely.read_meta(content)
                continue
            for tool in TOOLS:
                if tool.recognise(content):
                    yield tool.NAME, tool.read(path, content, split or _split_of(path, root))
                    break
            else:
                if place.is_file():
                    raise ValueError(f"it is not a file of {FORMATS}")


@contextmanager
def malformed(path: Path) -> Iterator[None]:
    """Turn what a reader raises for invalid content into a UsageError that names the file."""
    way_out = "correct or export the annotations again, or move the file away"
    try:
        yield
    except UsageError:
        raise
    except PlainDataError as error:
        raise UsageError(f"{path} {error} - {way_out}") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {(error.strerror or str(error)).lower()} - {way_out}") from error
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise UsageError(f"{path}: invalid annotations: {reason} - {way_out}") from error


def _content(path: Path) -> Any:
    ending = path.suffix.lower()
    if ending == ".xml":
        return cvat.parse(path)
    if ending == ".csv":
        try:
            return via.parse_csv(path.read_text(encoding="utf-8-sig"))
        except ValueError:
            return None  # any other table
    return read_json(path, LIMITS)


def _split_of(path: Path, root: Path) -> str | None:
    """Return the split that the name of a file or of one of its folders states, the innermost first.

    Examples:
        >>> _split_of(Path("mine/annotations/instances_val2017.json"), Path("mine"))
        'val'
    """
    inside = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    for part in (inside.stem, *reversed(inside.parts[:-1])):
        if match := SPLIT_WORD.search(part.lower()):
            return SPLIT_WORDS[match[1]]
    return None


# YOLO


def _yolo(root: Path) -> Annotations | None:
    """Return the annotations of a folder of images/ and labels/, or None if it has no text file of labels."""
    left_out: Counter[str] = Counter()
    found = [(image, text) for image in find_files(root).files if (text := _label_file(image, root))]
    with_labels = [text for _, text in found if text.is_file()]
    if not with_labels:
        return None
    names = _yolo_names(root, with_labels)
    images = []
    for image, text in found:
        split = _split_of(image, root)
        if text.is_file():
            with malformed(text):
                images.append(yolo.read(text, str(image), names, split, left_out))
        else:
            images.append(AnnotatedImage(str(image), (), text.parent, None, split))
    empty = sum(not text.is_file() for _, text in found)
    line = f"{root}: {empty} of {len(found)} images have no text file of labels, so they have no objects - remove them "
    return Annotations(
        tuple(images), tuple(names.values()), {}, left_out, (line + "if they were never labelled",) if empty else ()
    )


def _label_file(image: Path, root: Path) -> Path | None:
    parts = list(image.relative_to(root).parts)
    places = [place for place, part in enumerate(parts[:-1]) if part == "images"]
    if not places:
        return None
    parts[places[-1]] = "labels"
    text = root.joinpath(*parts).with_suffix(".txt")
    return text if text.parent.is_dir() else None


def _yolo_names(root: Path, files: Sequence[Path]) -> dict[int, str]:
    """Return the names of a YAML file with `names`, of classes.txt or obj.names, else the numbers of the classes."""
    for path in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        with malformed(path):
            content = read_yaml(path, as_text=True)
            names = content.get("names") if isinstance(content, dict) else None
            if isinstance(names, list):
                return {number: str(name) for number, name in enumerate(names)}
            if isinstance(names, dict):
                return {int(number): str(name) for number, name in sorted(names.items(), key=lambda item: int(item[0]))}
    for path in (root / "classes.txt", root / "obj.names"):
        if path.is_file():
            return {number: name for number, (_, name) in enumerate(read_list(path))}
    numbers = set()
    for path in files:
        with malformed(path):
            numbers |= {
                int(line.split()[0]) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.split()
            }
    return {number: f"class_{number}" for number in sorted(numbers)}


# Images


def _with_images(root: Path, tool: str, annotations: Annotations) -> AnnotatedFolder:
    listing = find_files(root)
    by_name: dict[str, list[Path]] = {}
    for path in listing.files:
        by_name.setdefault(path.name, []).append(path)
    located: dict[Path, AnnotatedImage] = {}
    missing: list[AnnotatedImage] = []
    for image in annotations.images:
        if (file := _locate(image, root, by_name)) is None:
            missing.append(image)
        elif file in located:
            raise UsageError(
                f"{image.source}: the image {file} is annotated twice, also in {located[file].source} - keep one"
            )
        else:
            located[file] = image
    if not located:
        what = f"{len(missing)} annotated images, such as {missing[0].file}," if missing else "annotated images"
        raise UsageError(f"{root}: none of the {what} is there - put the images into this folder")
    lines = list(annotations.warnings)
    if missing:
        lines.append(
            f"{missing[0].source}: {len(missing)} of {len(annotations.images)} annotated images, such as "
            f"{missing[0].file}, are not in {root} - add them"
        )
    lines += _describe_left_out(root, tool, annotations.left_out)
    lines += _describe_unlabelled(root, listing, located)
    images: dict[str, Path] = {}
    base = os.path.commonpath([path.parent for path in located])
    for path in located:
        name = path.relative_to(base).with_suffix("").as_posix()
        if name in images:
            raise UsageError(f"{path} and {images[name]} have the same name; a name identifies one image - rename one")
        images[name] = path
    entries = {name: located[path] for name, path in images.items()}
    return AnnotatedFolder(tool, annotations.labels, annotations.colours, images, entries, tuple(lines))


def _describe_left_out(root: Path, tool: str, left_out: Mapping[str, int]) -> list[str]:
    if not left_out:
        return []
    kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(left_out.items()))
    return [f"{root}: annotations without an area are left out ({tool}: {kinds}) - draw polygons or masks to use them"]


def _describe_unlabelled(root: Path, listing: Listing, located: Mapping[Path, AnnotatedImage]) -> list[str]:
    others = [
        path for path in listing.others if path.suffix.lower() not in {*ENDINGS, ".txt", ".yaml", ".yml", ".names"}
    ]
    lines = describe_skipped(listing._replace(others=others), root)
    without = [path.relative_to(root).as_posix() for path in listing.files if path not in located]
    if without:
        lines.append(
            f"{root}: {len(without)} images that the annotations do not list are left out, such as {without[0]} - "
            "annotate them, or remove them"
        )
    return lines


def _locate(image: AnnotatedImage, root: Path, by_name: Mapping[str, Sequence[Path]]) -> Path | None:
    """Return the file of an annotated image: by its path, else the only file whose path ends most like it.

    Raises:
        UsageError: Several files match equally well.
    """
    file = PurePosixPath(image.file)
    uploaded = UPLOADED.fullmatch(file.name)
    candidates = by_name.get(file.name) or (by_name.get(uploaded[1], ()) if uploaded else ())
    for folder in (image.source.parent, root, root / "images"):
        path = Path(os.path.normpath(folder / file))
        if path in candidates:
            return path
    if not candidates:
        return None

    def common(path: Path) -> tuple[int, bool]:
        parts = zip(reversed(path.parts[:-1]), reversed(file.parts[:-1]), strict=False)
        count = 0
        for one, other in parts:
            if one != other:
                break
            count += 1
        return count, image.split is not None and _split_of(path.parent / "_", root) == image.split

    best = max(map(common, candidates))
    matches = [path for path in candidates if common(path) == best]
    if len(matches) > 1:
        raise UsageError(
            f"{image.source}: the image {image.file} may be {matches[0]} or {matches[1]} - rename one of them"
        )
    return matches[0]


# Classes


@dataclass(frozen=True)
class Labels:
    """The class of each label.

    Attributes:
        classes: The classes.
        indices: Class index by label; the ignore_index for labels that mean ignored pixels.
        background: Value of pixels that no shape covers.
    """

    classes: Classes
    indices: Mapping[str, int]
    background: int


def classes_of(found: AnnotatedFolder, table: Classes | None, unlabelled: Unlabelled) -> Labels:
    """Return the classes of annotations: those of a table, otherwise the background and the labels of the tool.

    Args:
        found: The annotations.
        table: The classes, if the user or a checkpoint names them.
        unlabelled: What pixels are that no shape covers.

    Raises:
        UsageError: A label is not in the table, the table has no background, or there are too few or many classes.
    """
    used = {shape.label for image in found.entries.values() for shape in image.shapes}
    labels = [label for label in dict.fromkeys((*found.labels, *sorted(used))) if label.casefold() not in IGNORED]
    as_background = [label for label in labels if label.casefold() in BACKGROUNDS]
    objects = [label for label in labels if label not in as_background]
    needed = bool(as_background) or unlabelled == "background"
    if table is None:
        names = (*(["background"] if needed else []), *objects)
        if not 2 <= len(names) <= MAX_CLASSES:
            raise UsageError(
                f"the annotations have {len(names)} classes{f', {names[0]}' if len(names) == 1 else ''}; a network "
                f"needs 2 to {MAX_CLASSES} - annotate another class, or leave out dataset.unlabelled=ignore"
            )
        table = Classes(names, _colours(names, found.colours), IGNORE, by_colour=False)
    else:
        if unknown := [label for label in objects if label in used and label not in table.names]:
            raise UsageError(
                f"the annotations have the class '{unknown[0]}'{f' and {len(unknown) - 1} more' if unknown[1:] else ''}"
                f" and the table of classes has {', '.join(table.names)} - add it to the table, as it is spelt there"
            )
        if needed and not any(name.casefold() == "background" for name in table.names):
            raise UsageError(
                "the table of classes has no 'background', which pixels without annotation are - add it to the "
                "table, or set dataset.unlabelled=ignore"
            )
        own_labels = () if table.by_colour else table.labels
        table = Classes(table.names, table.colours, table.ignore_index, own_labels, by_colour=False)
    background = next((index for index, name in enumerate(table.names) if name.casefold() == "background"), None)
    indices = {label: table.names.index(label) for label in objects if label in table.names}
    indices |= {label: background for label in as_background if background is not None}
    indices |= {label: table.ignore_index for label in used if label.casefold() in IGNORED}
    empty = table.ignore_index if unlabelled == "ignore" or background is None else background
    return Labels(table, indices, empty)


def _colours(names: Sequence[str], stored: Mapping[str, Colour]) -> tuple[Colour, ...]:
    """Return the colours of a tool, and default ones for classes whose colour is missing or taken."""
    defaults = default_colours(names, range(len(names)))
    colours: list[Colour] = []
    for name, default in zip(names, defaults, strict=True):
        colour = BLACK if name == "background" else stored.get(name, default)
        free = [colour, default, *distinct_colours(MAX_CLASSES)]
        colours.append(next(candidate for candidate in free if candidate not in colours))
    return tuple(colours)
