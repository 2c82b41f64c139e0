"""Annotations of labelling tools in a folder of images: which files they are, and the image file of each entry."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from segdeconv.classes import Colour
from segdeconv.data.annotations import coco, cvat, label_studio, labelme, supervisely, via, yolo
from segdeconv.data.annotations.shapes import AnnotatedImage, Annotations, malformed, merge
from segdeconv.data.files.finding import Listing, describe_skipped, find_files
from segdeconv.data.files.reading import read_list
from segdeconv.data.splits import SPLIT_OF_WORD
from segdeconv.errors import UsageError
from segdeconv.system.files import file_identity
from segdeconv.system.plain_data import Limits, read_json

TOOLS = (coco, labelme, supervisely, via, label_studio, cvat)
ONE_IMAGE = (labelme, supervisely)  # tools that write a file for each image
FORMATS = "COCO, labelme, CVAT, YOLO, Label Studio, Supervisely and VGG Image Annotator"
LIMITS = Limits(size=1 << 31, nodes=200_000_000)
ENDINGS = {".json", ".xml", ".csv"}
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLIT_OF_WORD, key=len, reverse=True))})(?![a-z])")
UPLOADED = re.compile(r"[0-9a-f]{8}-(.+)")  # Label Studio writes a random number before the name of an uploaded file


class AnnotatedFolder(NamedTuple):
    """The annotated images of a folder.

    Attributes:
        tool: Name of the format.
        labels: The classes in the order of the tool.
        colours: RGB of a class, if the tool stores it.
        images: The image file of each sample, by the name of the sample.
        entries: The annotations of each sample.
        warnings: A line for everything that is left out.
        sources: The annotation files and the lists of names that were read.
    """

    tool: str
    labels: tuple[str, ...]
    colours: Mapping[str, Colour]
    images: dict[str, Path]
    entries: dict[str, AnnotatedImage]
    warnings: tuple[str, ...]
    sources: frozenset[Path]


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
    stamps = tuple((path, *file_identity(path)) for _, place in files for path in _files_of(place))
    return _find(root, files, stamps, given is not None)


def _given_path(root: Path, name: str) -> Path:
    typed = Path(os.path.expanduser(name))
    for path in (root / typed, typed):
        if path.exists():
            return path
    raise UsageError(f"dataset.annotations={name} not found in {root} - give a file or folder of annotations")


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
    stamps: tuple[tuple[Path, int, int, int], ...],
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
    annotations = merge(found)
    names = root / "labels.txt"
    if tool == labelme.NAME and names.is_file():  # labelme's own list of labels, which has an order
        listed = [name for _, name in read_list(names)]
        annotations = replace(annotations, labels=(*dict.fromkeys([*listed, *annotations.labels]),), names_file=names)
    return _with_images(root, tool, annotations)


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
    if place.is_dir() and (labels := yolo.read_folder(place)):
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
                    yield (
                        tool.NAME,
                        tool.read(path, content, split or (None if tool in ONE_IMAGE else _split_of_file(path, root))),
                    )
                    break
            else:
                if place.is_file():
                    raise ValueError(f"it is not a file of {FORMATS}")


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


def _split_of_file(path: Path, root: Path) -> str | None:
    """Return the split that the name of an annotation file, or else one of its folders, states.

    Examples:
        >>> _split_of_file(Path("mine/annotations/instances_val2017.json"), Path("mine"))
        'val'
    """
    match = SPLIT_WORD.search(path.stem.lower())
    return SPLIT_OF_WORD[match[1]] if match else _split_of_folder(path, root)


def _split_of_folder(path: Path, root: Path) -> str | None:
    """Return the split that a folder of a file states, the innermost first, such as train or val2017."""
    inside = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
    for part in reversed(inside.parts[:-1]):
        match = SPLIT_WORD.match(part.lower())
        if match and not part[match.end() :].strip("0123456789"):
            return SPLIT_OF_WORD[match[1]]
    return None


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
            located[file] = replace(image, split=image.split or _split_of_folder(file, root))
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
    sources = {entry.source for entry in entries.values()} | {path for path in (annotations.names_file,) if path}
    labels, colours = annotations.labels, annotations.colours
    return AnnotatedFolder(tool, labels, colours, images, entries, tuple(lines), frozenset(sources))


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
        return count, image.split is not None and _split_of_folder(path, root) == image.split

    best = max(map(common, candidates))
    matches = [path for path in candidates if common(path) == best]
    if len(matches) > 1:
        raise UsageError(
            f"{image.source}: the image {image.file} may be {matches[0]} or {matches[1]} - rename one of them"
        )
    return matches[0]
