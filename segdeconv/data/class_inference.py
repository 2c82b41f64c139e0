"""Inference of the classes of a person's own masks from their content, where no table names them."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np

from segdeconv.classes import Classes, Colour, count_values, default_colours, hex_colour, is_grey, pack_colours
from segdeconv.data.class_file import IGNORE, MAX_CLASSES
from segdeconv.data.files.reading import read_stored_mask, require_opaque
from segdeconv.data.inspection import cache_folder, map_with_progress
from segdeconv.errors import UsageError
from segdeconv.system.files import file_identity, hash_text, replace_text
from segdeconv.system.plain_data import PlainDataError, read_json, require_mapping

VERSION = 1  # of the rules of inference; a new number invalidates what is cached

MAX_VALUES = 64  # a mask with more different values is probably a photograph or a resized mask
LEVEL_GAP = (
    16  # labels at least so far apart, such as 0, 128 and 255, are levels of grey rather than numbers of classes
)
BORDER_SHARE = 0.9  # a level with this share of its pixels between two other levels comes from interpolation
BINARY = ("background", "foreground")  # of masks of two labels or colours, black and white
FEW = 1e-3  # share of all pixels


@dataclass
class Occurrence:
    """Where a label or colour occurs.

    Attributes:
        pixels: Number of pixels.
        masks: Number of masks.
        between: Number of pixels with both a smaller and a larger value among their eight neighbours.
        example: The mask with the most pixels of it.
        most: Number of its pixels in this mask.
    """

    pixels: int = 0
    masks: int = 0
    between: int = 0
    example: Path = Path()
    most: int = 0

    def add(self, path: Path, pixels: int, between: int) -> None:
        """Count the pixels in another mask."""
        self.pixels, self.masks, self.between = self.pixels + pixels, self.masks + 1, self.between + between
        if pixels > self.most:
            self.example, self.most = path, pixels

    def __str__(self) -> str:
        return f"{self.pixels} pixel{'s'[: self.pixels > 1]} in {self.masks} mask{'s'[: self.masks > 1]}"


@dataclass
class Survey:
    """The contents of mask files.

    Attributes:
        labels: Occurrences by label, of masks of one channel.
        colours: Occurrences by packed colour, of masks of three channels.
        grey: The label masks stored as RGB are among `labels` too; this is one of them.
        palette: For each label of palette masks, the packed colours that palettes give it, each with one mask.
        plain: A mask of one channel without palette.
        extremes: The smallest and largest number of the integer types of the masks.
        nodata: The nodata values of the masks.
    """

    labels: dict[int, Occurrence] = field(default_factory=dict)
    colours: dict[int, Occurrence] = field(default_factory=dict)
    grey: Path | None = None
    palette: dict[int, dict[int, Path]] = field(default_factory=dict)
    plain: Path | None = None
    extremes: set[int] = field(default_factory=set)
    nodata: set[int] = field(default_factory=set)

    @property
    def pixels(self) -> int:
        return sum(entry.pixels for entry in (*self.labels.values(), *self.colours.values()))


def infer_classes(masks: Sequence[Path]) -> tuple[Classes, tuple[str, ...]]:
    """Infer the classes from the labels or colours of mask files.

    The result is kept in the user's cache, under the paths, sizes, times and inodes of the files.

    Returns:
        The classes, and a line for every assumption about them.

    Raises:
        UsageError: The masks mix labels and colours, have too many different values, or values that are probably no
            classes.
    """
    return _infer(tuple((path, *file_identity(path)) for path in masks))


@lru_cache(maxsize=4)  # the data set is built once for each split
def _infer(files: tuple[tuple[Path, int, int, int], ...]) -> tuple[Classes, tuple[str, ...]]:
    # The path as given is in the lines.
    text = "\n".join(f"{path} {os.path.realpath(path)} {identity}" for path, *identity in files)
    cached = cache_folder("classes") / f"{hash_text(f'{VERSION} {text}')[:32]}.json"
    with suppress(OSError, PlainDataError, TypeError, KeyError, UsageError):  # not there, or cut off by a crash
        content = require_mapping(read_json(cached))
        return Classes.from_dict(content["classes"]), tuple(map(str, content["lines"]))
    classes, lines = _classes_of([path for path, *_ in files])
    with suppress(OSError):  # without the file, the next run only reads the masks again
        replace_text(cached, json.dumps({"classes": classes.to_dict(), "lines": lines}))
    return classes, lines


def _classes_of(masks: Sequence[Path]) -> tuple[Classes, tuple[str, ...]]:
    survey = _survey(masks)
    if survey.colours and (survey.plain or survey.palette) and not _coloured(survey):
        labels = next(iter(survey.labels.values())).example
        colours = next(iter(survey.colours.values())).example
        raise UsageError(f"mask {labels} holds labels and mask {colours} colours - save all masks in the same way")
    if survey.colours or (survey.palette and _coloured(survey)):
        return _classes_of_colours(survey)
    return _classes_of_labels(survey)


def _survey(masks: Sequence[Path]) -> Survey:
    stored: Survey = Survey()
    greys: list[tuple[Path, dict[int, tuple[int, int]]]] = []
    contents = map_with_progress(len(masks), lambda index: _content(masks[index]), "reading masks")
    for path, content in zip(masks, contents, strict=True):
        if content.kind == "grey":  # whether these are labels is known at the end
            greys.append((path, content.values))
            continue
        stored.nodata |= content.nodata
        target = stored.colours if content.kind == "colours" else stored.labels
        _add(target, path, content.values)
        if content.kind == "palette":
            for label, colour in content.palette.items():
                stored.palette.setdefault(label, {}).setdefault(colour, path)
        elif content.kind == "labels":
            stored.plain = stored.plain or path
            stored.extremes |= content.extremes
        _require_few(path, len(target), content.kind, MAX_CLASSES)
    for path, values in greys:
        if stored.colours:
            _add(stored.colours, path, {value * 0x010101: count for value, count in values.items()})
        else:
            _add(stored.labels, path, values)
            stored.grey = stored.grey or path
            stored.plain = stored.plain or path
    return stored


def _add(target: dict[int, Occurrence], path: Path, values: dict[int, tuple[int, int]]) -> None:
    for value, (pixels, between) in values.items():
        target.setdefault(value, Occurrence()).add(path, pixels, between)


def _require_few(path: Path, count: int, kind: str, most: int) -> None:
    if count > most:
        raise UsageError(
            f"mask {path} has {count} different {'colours' if kind == 'colours' else 'labels'}, too many to be classes "
            "- it seems to be a photograph or a mask that was resized with interpolation; name the classes in "
            "classes.yaml or save labels"
        )


@dataclass(frozen=True)
class _Content:
    """The content of one mask: its kind, and (pixels, pixels between two others) of each label or packed colour."""

    kind: str  # labels, palette, grey (RGB of three equal channels) or colours
    values: dict[int, tuple[int, int]]
    palette: dict[int, int] = field(default_factory=dict)
    extremes: set[int] = field(default_factory=set)
    nodata: set[int] = field(default_factory=set)


def _content(path: Path) -> _Content:
    content = _read_content(path)
    _require_few(path, len(content.values), content.kind, MAX_VALUES)
    return content


def _read_content(path: Path) -> _Content:
    stored = read_stored_mask(path)
    require_opaque(path, stored)
    values = stored.values
    if values.ndim == 3:
        if is_grey(values):
            return _Content("grey", _counts(values[:, :, 0]))
        return _Content("colours", _counts(values))
    nodata = set() if stored.nodata is None else {stored.nodata}
    if stored.palette is not None:
        packed = pack_colours(stored.palette)
        counts = _counts(values)
        return _Content("palette", counts, {label: int(packed[label]) for label in counts}, nodata=nodata)
    limits = np.iinfo(values.dtype) if values.dtype.kind in "iu" else np.iinfo(np.uint8)
    extremes = {int(limits.min), int(limits.max)} - {0, 255}
    return _Content("labels", _counts(values), extremes=extremes, nodata=nodata)


def _counts(values: np.ndarray) -> dict[int, tuple[int, int]]:
    """Return (pixels, pixels between a smaller and a larger neighbour) of each label, or of each packed colour.

    A colour lies between its neighbours if no channel exceeds theirs and one lies strictly within.

    Args:
        values: (H, W) labels, or (H, W, 3) colours.
    """
    numbers = values if values.ndim == 2 else pack_colours(values)
    present, counts = count_values(numbers)
    between = [0] * len(present)
    if 3 <= len(present) <= MAX_VALUES:
        # Ranks instead of labels, since OpenCV's filters do not take every integer type.
        place = np.searchsorted(present, numbers).astype(np.uint8)
        maps = place if values.ndim == 2 else values
        square = np.ones((3, 3), np.uint8)
        inner = (cv2.erode(maps, square) < maps) & (maps < cv2.dilate(maps, square))
        between = np.bincount(place[inner if inner.ndim == 2 else inner.any(axis=2)], minlength=len(present)).tolist()
    return {int(value): (int(count), soft) for value, count, soft in zip(present, counts, between, strict=True)}


def _coloured(survey: Survey) -> bool:
    """Return whether the palettes, rather than the labels, have to tell the classes: they differ between masks.

    Raises:
        UsageError: The palettes differ, but do not tell the labels apart.
    """
    differing = [label for label, colours in survey.palette.items() if len(colours) > 1]
    if not differing and not survey.colours:
        return False
    by_mask: dict[Path, list[int]] = {}
    for colours in survey.palette.values():
        for colour, path in colours.items():
            by_mask.setdefault(path, []).append(colour)
    if survey.plain or any(len(set(colours)) < len(colours) for colours in by_mask.values()):
        if not differing:
            return False
        one, other = list(survey.palette[differing[0]].values())[:2]
        raise UsageError(
            f"masks {one} and {other} have different colours for label {differing[0]}, so their labels may mean "
            "different classes - save all masks with one palette, or name the classes by label in classes.yaml"
        )
    return True


def _classes_of_labels(survey: Survey) -> tuple[Classes, tuple[str, ...]]:
    labels, missing, lines = _without_nodata(survey)
    beyond = [label for label in labels if label > IGNORE]
    for label in labels:
        # One label beyond 8 bits among smaller ones is a mark, several are large numbers of classes.
        if label < 0 or label in survey.extremes or label > 65535 or beyond == [label] != labels:
            raise UsageError(
                f"mask {survey.labels[label].example} has label {label} ({survey.labels[label]}), which is probably no "
                f"class but marks pixels without data - write a classes.yaml with the classes and 'ignore: {label}'"
            )
    _refuse_interpolated({label: survey.labels[label] for label in labels}, "label")
    if survey.grey:
        lines.append(f"{survey.grey}: masks stored as RGB have three equal channels, which are read as labels")
    if labels == [0, IGNORE]:
        names, colours = BINARY, ((0, 0, 0), (255, 255, 255))
        return Classes(names, colours, labels=(0, IGNORE), ignored_labels=missing, by_colour=False), tuple(lines)
    if _are_levels(labels):
        lines.append(
            f"masks: the labels {', '.join(map(str, labels))} are read as {len(labels)} classes, levels of grey - if "
            f"{labels[-1]} marks ignored pixels, write a classes.yaml with 'ignore: {labels[-1]}'"
        )
    elif IGNORE in labels:
        void = survey.labels[IGNORE]
        labels = [label for label in labels if label != IGNORE]
        if len(labels) < 2:
            only = f"label {labels[0]}" if labels else "it too"
            raise UsageError(
                f"mask {void.example} has label {IGNORE} ({void}), which is ignored, and all other pixels have {only}, "
                "so there is nothing to learn - name both labels in classes.yaml"
            )
        lines.append(
            f"masks: label {IGNORE} ({void}, {void.pixels / survey.pixels:.2%} of all) is ignored - if it is a "
            f"class, name it in classes.yaml"
        )
    class_names = tuple(f"class_{label}" for label in labels)
    packed = {next(iter(survey.palette[label])) for label in labels if label in survey.palette}
    shown = default_colours(class_names, labels)
    if len(packed) == len(labels):  # the palette tells all labels apart
        shown = tuple(_unpack(next(iter(survey.palette[label]))) for label in labels)
    ignored = (IGNORE, *missing) if missing else ()
    return Classes(class_names, shown, labels=tuple(labels), ignored_labels=ignored, by_colour=False), tuple(lines)


def _without_nodata(survey: Survey) -> tuple[list[int], tuple[int, ...], list[str]]:
    """Return the labels without the nodata values of the masks, these values, and a line about them.

    A nodata value is a class if fewer than two labels would remain, as in masks of 0 and 1 with nodata 0.
    """
    labels = sorted(survey.labels)
    missing = tuple(label for label in labels if label in survey.nodata)
    if not missing:
        return labels, (), []
    entry = survey.labels[missing[0]]
    subject = f"masks: label {missing[0]} ({entry}, {entry.pixels / survey.pixels:.2%} of all), their nodata value,"
    others = [label for label in labels if label not in missing]
    if len(others) < 2:
        line = f"{subject} is read as a class, since only label {others[0] if others else missing[0]} would remain"
        return labels, (), [f"{line} - if it marks pixels without data, write a classes.yaml with 'ignore: "
                            f"{missing[0]}'"]  # fmt: skip
    return others, missing, [f"{subject} is ignored - if it is a class, name it in classes.yaml"]


def _are_levels(labels: Sequence[int]) -> bool:
    """Return whether labels are levels of grey, such as 0, 128, 255, rather than numbers of classes.

    Examples:
        >>> _are_levels([0, 128, 255]), _are_levels([0, 1, 2, 255]), _are_levels([7, 11, 26, 255])
        (True, False, False)
    """
    return len(labels) > 2 and min(after - before for before, after in pairwise(labels)) >= LEVEL_GAP


def _refuse_interpolated(values: Mapping[int, Occurrence], kind: str) -> None:
    """Refuse values that lie between two others in both value and place, as interpolation makes them.

    A thin class may do so too, so that one or two of many are accepted; between levels of grey none is.

    Raises:
        UsageError: There are such values.
    """
    between = [value for value, entry in values.items() if entry.between >= BORDER_SHARE * entry.pixels]
    levels = kind == "label" and _are_levels(sorted(values))
    if between and (levels or (len(between) > 2 and 2 * len(between) >= len(values))):
        entry = values[between[0]]
        shown = between[0] if kind == "label" else _unpack(between[0])
        others = f", like {len(between) - 1} others," if between[1:] else ""
        raise UsageError(
            f"mask {entry.example} has {kind} {shown} ({entry}){others} only where a smaller value meets a larger one: "
            "the masks were resized or smoothed with interpolation, which mixes classes - save them without, or name "
            "the classes in classes.yaml"
        )


def _classes_of_colours(survey: Survey) -> tuple[Classes, tuple[str, ...]]:
    occurrences = dict(survey.colours)
    lines: list[str] = []
    for label, colours in survey.palette.items():
        for colour in colours:
            occurrences.setdefault(colour, survey.labels[label])
        if len(colours) > 1 and not lines:
            one, other = list(colours.values())[:2]
            lines.append(
                f"{one} and {other}: their palettes give label {label} different colours, so the classes are the "
                "colours of the palettes, not the labels - name the classes by colour, or by label, in classes.yaml"
            )
    _refuse_interpolated(survey.colours, "colour")
    few = [colour for colour, entry in survey.colours.items() if entry.pixels < FEW * survey.pixels]
    if len(few) > 2 and 2 * len(few) > len(survey.colours):
        example = survey.colours[few[0]]
        raise UsageError(
            f"mask {example.example} has colour {_unpack(few[0])}, one of {len(few)} colours of {len(survey.colours)} "
            f"with fewer than {FEW:.1%} of all pixels each: the masks were probably saved with loss - save them "
            "without, or name the classes by colour in classes.yaml"
        )
    colours_ = tuple(_unpack(packed) for packed in sorted(occurrences))
    if set(colours_) == {(0, 0, 0), (255, 255, 255)}:
        return Classes(BINARY, colours_, by_colour=True), tuple(lines)
    names = tuple(f"colour_{hex_colour(colour)[1:]}" for colour in colours_)
    return Classes(names, colours_, by_colour=True), tuple(lines)


def _unpack(packed: int) -> Colour:
    return packed >> 16, packed >> 8 & 255, packed & 255
