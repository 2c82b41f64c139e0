"""The classes of a labelling session, which a person names as they go."""

import re
import unicodedata
from typing import Any

import numpy as np

from segdeconv.classes import Classes, Colour, distinct_colours, hex_colour, parse_hex_colour
from segdeconv.data.class_file import IGNORED, class_file, parse_classes
from segdeconv.errors import UsageError
from segdeconv.serving.label.strokes import IGNORE
from segdeconv.system.plain_data import PlainDataError, parse_yaml

MAX_CLASSES = 99
MAX_NAME = 60  # characters


class LabelClasses:
    """Classes with labels that never change, so that masks stay valid; a class that any mask has cannot be removed.

    Args:
        entries: What `to_list` returned.

    Raises:
        UsageError: An entry is invalid.
    """

    def __init__(self, entries: list[Any]) -> None:
        self.names: dict[int, str] = {}
        self.colours: dict[int, Colour] = {}
        for entry in entries:
            try:
                label, name, colour = int(entry["label"]), str(entry["name"]), parse_hex_colour(str(entry["colour"]))
            except (KeyError, TypeError, ValueError):
                raise UsageError(f"session.json: {entry!r} is not a class - restore the file from a copy") from None
            if not 0 <= label < IGNORE or label in self.names:
                raise UsageError(f"session.json: the label {label} is used twice or not in 0..254 - restore the file")
            self.names[label] = self._checked_name(name)
            self.colours[label] = colour

    @property
    def labels(self) -> list[int]:
        """The labels, in order of the classes' indices."""
        return sorted(self.names)

    def add(self, name: Any, colour: Any = None) -> int:
        """Add a class and return its label.

        Raises:
            UsageError: The name or colour is invalid, or there are too many classes.
        """
        if len(self.names) >= MAX_CLASSES:
            raise UsageError(f"there are {MAX_CLASSES} classes already - remove one that is not used")
        name = self._checked_name(name)
        label = max(self.names, default=-1) + 1
        if label >= IGNORE:
            raise UsageError("no label below 255 is left - start a new session with another --out")
        free = [each for each in distinct_colours(MAX_CLASSES + 1) if each not in self.colours.values()]
        self.colours[label] = self._checked_colour(colour) if colour else free[0]
        self.names[label] = name
        return label

    def change(self, label: Any, *, name: Any = None, colour: Any = None) -> None:
        """Rename or recolour a class.

        Raises:
            UsageError: The class does not exist, or the name or colour is invalid.
        """
        self._require(label)
        if name is not None and name != self.names[label]:
            self.names[label] = self._checked_name(name, besides=label)
        if colour is not None:
            self.colours[label] = self._checked_colour(colour, besides=label)

    def remove(self, label: Any, used: set[int]) -> None:
        """Remove a class.

        Raises:
            UsageError: The class does not exist, or a mask has it.
        """
        self._require(label)
        if label in used:
            raise UsageError(f"{self.names[label]} has strokes - undo or erase them first, or rename the class")
        del self.names[label], self.colours[label]

    def to_list(self) -> list[dict[str, Any]]:
        """Return the classes as plain data."""
        return [
            {"label": label, "name": self.names[label], "colour": hex_colour(self.colours[label])}
            for label in self.labels
        ]

    def classes(self) -> Classes | None:
        """Return the classes as those of a data set, None if there are fewer than two."""
        if len(self.names) < 2:
            return None
        names = tuple(self.names[label] for label in self.labels)
        colours = tuple(self.colours[label] for label in self.labels)
        return Classes(names, colours, IGNORE, tuple(self.labels), ignored_labels=(IGNORE,), by_colour=False)

    def table(self) -> str | None:
        """Return the text of classes.yaml, None if there are fewer than two classes."""
        classes = self.classes()
        return None if classes is None else class_file(classes, {})

    def palette(self) -> np.ndarray:
        """Return the colours of mask files, (256, 3) uint8."""
        palette = np.zeros((256, 3), dtype=np.uint8)
        for label, colour in self.colours.items():
            palette[label] = colour
        return palette

    def _require(self, label: Any) -> None:
        if isinstance(label, bool) or not isinstance(label, int) or label not in self.names:
            raise UsageError(f"the class {label!r} does not exist - reload the page")

    def _checked_name(self, name: Any, besides: int | None = None) -> str:
        if not isinstance(name, str):
            raise UsageError("the name of a class is not a text - reload the page")
        name = unicodedata.normalize("NFC", name).strip()
        if not name or len(name) > MAX_NAME:
            raise UsageError(f"the name of a class has 1 to {MAX_NAME} characters - choose a shorter one")
        if any(unicodedata.category(character)[0] in "CZ" and character != " " for character in name):
            raise UsageError(f"{name!r} contains invisible characters - type the name")
        if name.casefold() == IGNORED:
            raise UsageError(f"'{name}' stands for pixels that are not used - choose another name")
        others = {other.casefold() for label, other in self.names.items() if label != besides}
        if name.casefold() in others:
            raise UsageError(f"there is a class '{name}' already - choose another name")
        example = Classes((name, f"{name}_"), ((0, 0, 0), (1, 1, 1)), IGNORE)
        try:
            read = parse_classes(parse_yaml(class_file(example, {}), as_text=True), "classes.yaml").names
        except PlainDataError:
            read = ()
        if read != example.names:
            raise UsageError(f"'{name}' cannot be written to classes.yaml - choose another name")
        return name

    def _checked_colour(self, colour: Any, besides: int | None = None) -> Colour:
        if not isinstance(colour, str) or not re.fullmatch(r"#[0-9a-fA-F]{6}", colour):
            raise UsageError(f"the colour {colour!r} is not of the form #rrggbb - choose another")
        parsed = parse_hex_colour(colour)
        if any(parsed == other for label, other in self.colours.items() if label != besides):
            raise UsageError("another class has this colour already - choose another")
        return parsed
