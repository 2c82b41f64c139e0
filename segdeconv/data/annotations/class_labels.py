"""The classes of annotations: those of the tool, or of a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from segdeconv.classes import BLACK, Classes, Colour, default_colours, distinct_colours
from segdeconv.data.annotations.finding import AnnotatedFolder
from segdeconv.data.class_file import IGNORE, MAX_CLASSES
from segdeconv.errors import UsageError

BACKGROUNDS = {"background", "_background_", "__background__"}
IGNORED = {"ignore", "__ignore__"}

Unlabelled = Literal["background", "ignore"]


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
    source = min(image.source for image in found.entries.values())
    used = {shape.label for image in found.entries.values() for shape in image.shapes}
    labels = [label for label in dict.fromkeys((*found.labels, *sorted(used))) if label.casefold() not in IGNORED]
    as_background = [label for label in labels if label.casefold() in BACKGROUNDS]
    objects = [label for label in labels if label not in as_background]
    needed = unlabelled == "background" or any(label in used for label in as_background)
    if table is None:
        names = (*(["background"] if needed else []), *objects)
        if not 2 <= len(names) <= MAX_CLASSES:
            raise UsageError(
                f"{source}: {len(names)} classes are annotated{f', {names[0]}' if len(names) == 1 else ''}; a network "
                f"needs 2 to {MAX_CLASSES} - annotate another class, or leave out dataset.unlabelled=ignore"
            )
        table = Classes(names, _colours(names, found.colours), IGNORE, by_colour=False)
    else:
        if unknown := [label for label in objects if label in used and label not in table.names]:
            more = f" and {len(unknown) - 1} more" if unknown[1:] else ""
            raise UsageError(
                f"{source}: the annotations have the class '{unknown[0]}'{more}"
                f", and the table of classes has {', '.join(table.names)} - add it to the table, as it is spelt there"
            )
        if needed and not any(name.casefold() == "background" for name in table.names):
            raise UsageError(
                f"{source}: the table of classes has no 'background', which pixels without annotation are - add it to "
                "the table, or set dataset.unlabelled=ignore"
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
