"""Classes of a data set: their names, their colours, and their labels and colours in mask files."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from segdeconv.errors import UsageError

Colour = tuple[int, int, int]

BLACK: Colour = (0, 0, 0)
BACKGROUND = "background"
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: controls, halves of characters, ends of lines
FOUND_BACKGROUNDS = ("class_0", "colour_000000")  # the names that label 0 and black get where no table names classes
# Each is as far as possible from those before it and from black, by CIEDE2000, for eyes of any colour vision: the least
# distance between any two of the first 3, 5, 8, 12, 16 and 24 is 38, 15.8, 15.3, 14.5, 10.3 and 8.4, for normal vision
# or simulated protanopia, deuteranopia or tritanopia (Machado et al. 2009), whichever is least.
DISTINCT: tuple[Colour, ...] = (
    (255, 96, 0), (64, 208, 255), (0, 16, 224), (0, 80, 0), (128, 128, 255), (240, 144, 176),
    (176, 48, 80), (224, 224, 0), (176, 96, 160), (96, 48, 112), (192, 255, 176), (112, 176, 112),
    (48, 128, 112), (128, 64, 255), (160, 208, 112), (144, 96, 16), (112, 48, 80), (144, 128, 80),
    (112, 80, 160), (160, 144, 208), (192, 80, 112), (255, 192, 224), (208, 112, 144), (160, 16, 32),
)  # fmt: skip


def voc_colours(count: int) -> tuple[Colour, ...]:
    """Return the first `count` colours of PASCAL VOC's palette, which are bit-interleaved, far apart and all different.

    Examples:
        >>> voc_colours(3)
        ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    """
    colours = []
    for index in range(count):
        channels = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                channels[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        colours.append((channels[0], channels[1], channels[2]))
    return tuple(colours)


def distinct_colours(count: int) -> tuple[Colour, ...]:
    """Return `count` colours that can be told apart, also by colour-blind people: `DISTINCT`, then colours of VOC's.

    Examples:
        >>> distinct_colours(2)
        ((255, 96, 0), (64, 208, 255))
    """
    further = [
        colour
        for colour in voc_colours(count + 128)
        if all(max(abs(a - b) for a, b in zip(colour, other, strict=True)) >= 32 for other in (BLACK, *DISTINCT))
    ]
    return (*DISTINCT, *further)[:count]


def default_colours(names: Sequence[str], labels: Sequence[int]) -> tuple[Colour, ...]:
    """Return the colours of classes for which nobody gave any: black for the background, then `distinct_colours`.

    Args:
        names: Name of each class.
        labels: Label of each class in the mask files.

    Examples:
        >>> default_colours(("background", "cell"), (0, 255))
        ((0, 0, 0), (255, 96, 0))
    """
    candidates = [index for index, name in enumerate(names) if len(names) == 2 or name in FOUND_BACKGROUNDS]
    return _coloured(len(names), _background(names, candidates, labels))


def _coloured(count: int, background: int | None) -> tuple[Colour, ...]:
    colours = list(distinct_colours(count))
    if background is not None:
        colours.insert(background, BLACK)
    return tuple(colours[:count])


def _background(names: Sequence[str], candidates: Iterable[int], order: Sequence[int]) -> int | None:
    """Return the class named background, otherwise the candidate that is first by `order`, or None."""
    named = [index for index, name in enumerate(names) if name.casefold() == BACKGROUND]
    return min(named or candidates, key=order.__getitem__, default=None)


@dataclass(frozen=True)
class Classes:
    """Names and colours by class index, and their labels and colours in mask files.

    Attributes:
        names: One per class, class index 0 first.
        colours: RGB, 0..255, one per class; also the colour table of RGB-coloured mask files.
        ignore_index: Mask value of pixels that count neither in the loss nor in the scores.
        labels: Label of each class in a label mask file; 0, 1, 2, ... by default.
        ignore_colour: Colour of ignored pixels in RGB-coloured mask files, None if they have none.
        ignored_labels: Labels of ignored pixels in a label mask file, any integers; only ignore_index by default.
        by_colour: Whether the colours of mask files determine the classes, also those of a palette, whose indices may
            have another order. False: labels do, and an RGB mask whose three channels are equal has them in each. None:
            the labels of grey and palette files, and the colours of RGB files.

    Raises:
        UsageError: There are fewer than two classes, the lists differ in length, entries are not unique, or a name has
            a control character, such as the end of a line or the start of a terminal's command.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    ignore_index: int = 255
    labels: tuple[int, ...] = ()
    ignore_colour: Colour | None = None
    ignored_labels: tuple[int, ...] = ()
    by_colour: bool | None = None

    def __post_init__(self) -> None:
        if not self.labels:
            object.__setattr__(self, "labels", tuple(range(len(self.names))))
        if not self.ignored_labels:
            object.__setattr__(self, "ignored_labels", (self.ignore_index,))
        if len(self.names) < 2:
            raise UsageError(
                f"{len(self.names)} class(es) {list(self.names)}: a network needs at least two classes "
                "- add the background as a class"
            )
        if not len(self.names) == len(self.colours) == len(self.labels):
            raise UsageError(
                f"{len(self.names)} class names, {len(self.colours)} colours and {len(self.labels)} labels: "
                "each class needs one of each - complete the shorter list"
            )
        if self.ignore_index in range(len(self.names)):
            raise UsageError(
                f"ignore_index {self.ignore_index} is also a class ('{self.names[self.ignore_index]}') - use a number "
                "above the class indices, such as 255"
            )
        for kind, values in (("name", self.names), ("label", self.labels), ("colour", self.colours)):
            if len(set(values)) != len(values):
                raise UsageError(f"the class {kind}s {list(values)} are not all different - give each class its own")
        for name in self.names:
            if any(unicodedata.category(letter) in UNPRINTABLE for letter in name):
                raise UsageError(f"the class name {name!r} has a control character - use one line of text")

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def palette(self) -> np.ndarray:
        """Colour of every mask value, (256, 3) uint8; black for values without a class."""
        colours = np.zeros((256, 3), dtype=np.uint8)
        if self.ignore_colour is not None:
            colours[self.ignore_index] = self.ignore_colour
        colours[: len(self)] = self.colours
        return colours

    @cached_property
    def background(self) -> int | None:
        """Index of the class that overlays leave clear, None if every class is drawn.

        It is the class named `background`. Otherwise, where nobody named the classes, it is the one of label 0 or of
        black pixels, if it is black. Otherwise, of two classes, it is the grey one; if both are, that of the lower
        label, or the darker one of classes given by colour. Black and white are grey.
        """
        greys = [index for index, colour in enumerate(self.colours) if len(set(colour)) == 1]
        if len(self) > 2:
            greys = [i for i in greys if self.colours[i] == BLACK and self.names[i] in FOUND_BACKGROUNDS]
        order = [sum(colour) for colour in self.colours] if self.by_colour else self.labels
        return _background(self.names, greys, order)

    @cached_property
    def display_colours(self) -> tuple[Colour, ...]:
        """RGB of each class in pictures, legends and pages.

        These are `colours`, unless all of them are greys, such as black and white. Greys tell how mask files are
        stored, and over an image they cannot be seen.
        """
        if any(len(set(colour)) > 1 for colour in self.colours):
            return self.colours
        return _coloured(len(self), self.background)

    @cached_property
    def display_palette(self) -> np.ndarray:
        """Colour of every mask value in pictures, (256, 3) uint8; see `display_colours` and `palette`."""
        colours = self.palette.copy()
        colours[: len(self)] = self.display_colours
        return colours

    @cached_property
    def _indices(self) -> np.ndarray:
        """Class index or ignore_index of every label, (65536,) int32; -1 for unknown labels."""
        indices = np.full(65536, -1, dtype=np.int32)
        indices[[label for label in self.ignored_labels if 0 <= label <= 65535]] = self.ignore_index
        # After the ignored labels, so that a class whose label is 255 (0/255 masks) stays a class.
        for index, label in enumerate(self.labels):
            indices[label] = index
        return indices

    def from_mask(self, values: np.ndarray, palette: np.ndarray | None = None) -> np.ndarray:
        """Convert the content of a mask file to class indices, (H, W) uint8.

        Args:
            values: (H, W) integers, or (H, W, 3) uint8 colours.
            palette: (256, 3) uint8 colours of the integers, if the file has a palette.

        Raises:
            UsageError: A label or colour belongs to no class; the message names the first one.
        """
        if self.by_colour and values.ndim == 2:
            if palette is None:  # grey, which is a colour with three equal channels
                greys = [
                    colour[0] for colour in (*self.colours, self.ignore_colour) if colour and len(set(colour)) == 1
                ]
                unknown = values[~np.isin(values, greys)]
                if unknown.size:
                    raise UsageError(
                        f"has label {int(unknown[0])}, but the classes are given by colour: {self.colour_table}; give "
                        "them labels"
                    )
                palette = np.arange(256, dtype=np.uint8).repeat(3).reshape(256, 3)
            values = palette[values]
        if values.ndim == 2:
            return self.from_labels(values)
        if self.by_colour is False and is_grey(values):
            return self.from_labels(values[:, :, 0])
        return self.from_colours(values)

    def from_labels(self, labels: np.ndarray) -> np.ndarray:
        """Convert the labels of a mask file, (H, W) integers, to class indices, (H, W) uint8.

        Raises:
            UsageError: A label belongs to no class; the message names the first one.
        """
        if labels.dtype.itemsize > 2 or labels.dtype.kind == "i":
            outside = (labels < 0) | (labels > 65535)
            ignored = np.isin(labels, self.ignored_labels) if outside.any() else None
            if ignored is not None:
                self._require_known(labels, outside & ~ignored)
                labels = np.where(ignored, 0, labels)
            indices = self._indices[labels]
            if ignored is not None:
                indices[ignored] = self.ignore_index
        else:
            indices = self._indices[labels]
        self._require_known(labels, indices < 0)
        return indices.astype(np.uint8)

    def _require_known(self, labels: np.ndarray, unknown: np.ndarray) -> None:
        if unknown.any():
            values = np.unique(labels[unknown])
            more = f" (and {len(values) - 1} more)" if len(values) > 1 else ""
            raise UsageError(f"has label {int(values[0])}{more}; {self.rule}")

    def from_colours(self, image: np.ndarray) -> np.ndarray:
        """Convert an RGB-coloured mask, (H, W, 3) uint8, to class indices, (H, W) uint8; colours must match exactly.

        Raises:
            UsageError: A colour is not in the colour table; the message names the first one.
        """
        packed = pack_colours(image)
        mask = np.full(packed.shape, -1, dtype=np.int32)
        if self.ignore_colour is not None:
            mask[packed == pack_colours(np.array(self.ignore_colour))] = self.ignore_index
        for index, colour in enumerate(self.colours):
            mask[packed == pack_colours(np.array(colour))] = index
        if (mask < 0).any():
            y, x = np.argwhere(mask < 0)[0]
            raise UsageError(
                f"has colour {tuple(int(v) for v in image[y, x, :3])} at row {y}, column {x}, which belongs to no "
                f"class; the colour table is {self.colour_table}"
            )
        return mask.astype(np.uint8)

    @property
    def rule(self) -> str:
        """The labels that a mask file may have, as part of an error message."""
        ignored = [label for label in self.ignored_labels if label not in self.labels]
        void = f" and {_format_ranges(ignored)} for ignored pixels" if ignored else ""
        return f"the classes have labels {_format_ranges(self.labels)}{void}"

    @property
    def colour_table(self) -> str:
        """The colours of the classes, as part of an error message."""
        rows = [f"{name} {colour}" for name, colour in zip(self.names, self.colours, strict=True)]
        return ", ".join(rows + ([f"ignored {self.ignore_colour}"] if self.ignore_colour else []))

    def to_dict(self) -> dict[str, Any]:
        """Return the classes as plain data for a checkpoint."""
        return {
            "names": list(self.names),
            "colours": [list(colour) for colour in self.colours],
            "ignore_index": self.ignore_index,
            "labels": list(self.labels),
            "ignore_colour": list(self.ignore_colour) if self.ignore_colour else None,
            "ignored_labels": list(self.ignored_labels),
            "by_colour": self.by_colour,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Classes:
        """Restore classes from the output of `to_dict`."""
        return cls(
            names=tuple(data["names"]),
            colours=tuple(_colour(colour) for colour in data["colours"]),
            ignore_index=data["ignore_index"],
            labels=tuple(data["labels"]),
            ignore_colour=_colour(data["ignore_colour"]) if data["ignore_colour"] else None,
            ignored_labels=tuple(data.get("ignored_labels", ())),  # absent in files of older versions
            by_colour=data.get("by_colour"),  # likewise
        )


def match_classes(classes: Classes, others: Classes, *, owners: tuple[str, str], way_out: str) -> list[int]:
    """Match classes by name and return, for each of `classes`, the index of its counterpart among `others`.

    Args:
        classes: The classes to match.
        others: The classes to find them in.
        owners: Names of the owners of both, for the error message.
        way_out: Way out, for the error message.

    Raises:
        UsageError: A class is in only one of the two.
    """
    if different := [
        name for name in (*classes.names, *others.names) if (name in classes.names) != (name in others.names)
    ]:
        described = (
            f"{owner} has {len(owned)} classes ({', '.join(owned.names[:3])}{', ...' if len(owned) > 3 else ''})"
            for owner, owned in zip(owners, (classes, others), strict=True)
        )
        raise UsageError(f"{' and '.join(described)}; '{different[0]}' is in only one of them - {way_out}")
    return [others.names.index(name) for name in classes.names]


def hex_colour(colour: Iterable[int]) -> str:
    """Format an RGB colour as in CSS.

    Examples:
        >>> hex_colour((255, 0, 16))
        '#ff0010'
    """
    return "#{:02x}{:02x}{:02x}".format(*colour)


def parse_hex_colour(text: str) -> Colour:
    """Parse an RGB colour as in CSS.

    Examples:
        >>> parse_hex_colour("#ff0010")
        (255, 0, 16)
    """
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def count_values(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of an integer array in ascending order, and the number of each."""
    if values.dtype != np.uint8:
        return np.unique(values, return_counts=True)
    counts = np.bincount(values.ravel(), minlength=256)  # np.unique sorts, which takes three times as long
    present = np.flatnonzero(counts)
    return present, counts[present]


def is_grey(colours: np.ndarray) -> bool:
    """Return whether the three channels of (H, W, 3) colours are equal."""
    return bool((colours[..., 0] == colours[..., 1]).all() and (colours[..., 0] == colours[..., 2]).all())


def pack_colours(image: np.ndarray) -> np.ndarray:
    """Pack RGB colours, (..., 3), into one number per colour, (...,) int32."""
    image = image.astype(np.int32)
    return (image[..., 0] << 16) | (image[..., 1] << 8) | image[..., 2]


def _colour(values: Sequence[int]) -> Colour:
    red, green, blue = (int(value) for value in values)
    return red, green, blue


def _format_ranges(labels: Sequence[int]) -> str:
    """Format sorted numbers, abbreviating consecutive ones.

    Examples:
        >>> _format_ranges((0, 1, 2, 3, 7))
        '0..3, 7'
    """
    runs: list[list[int]] = []
    for label in labels:
        if runs and label == runs[-1][-1] + 1:
            runs[-1].append(label)
        else:
            runs.append([label])
    return ", ".join(f"{run[0]}..{run[-1]}" if run[1:] else str(run[0]) for run in runs)
