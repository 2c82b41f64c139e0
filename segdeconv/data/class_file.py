"""Tables of classes: the classes.yaml or text file of names that a person writes, and tables of colours of others."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segdeconv.classes import Classes, Colour, default_colours, parse_hex_colour
from segdeconv.data.files.reading import read_list
from segdeconv.errors import UsageError
from segdeconv.system.plain_data import PlainDataError, read_yaml

NAMES = ("classes.yaml", "classes.yml", "classes.txt")  # in this order
COLOUR_TABLES = ("class_dict.csv", "class_dict_seg.csv", "label_colors.txt", "labelmap.txt")  # of other programs
CSV_HEADER = re.compile(r"\W*name\W*,\W*r\W*,\W*g\W*,\W*b\W*", re.IGNORECASE)
COLOUR_LINES = (
    re.compile(r"\"?(?P<name>[^,]*[^,\s\"])\"?\s*,\s*(?P<r>\d+)\s*,\s*(?P<g>\d+)\s*,\s*(?P<b>\d+)"),  # class_dict.csv
    re.compile(r"(?P<r>\d+)\s+(?P<g>\d+)\s+(?P<b>\d+)\s+(?P<name>.+)"),  # label_colors.txt of CamVid
    re.compile(r"(?P<name>[^:]+):(?P<r>\d+),(?P<g>\d+),(?P<b>\d+)(:[^:]*){0,2}"),  # labelmap.txt of CVAT
)
IGNORE = 255
IGNORED = "ignore"  # the name that stands for ignored pixels
MAX_CLASSES = 255
WAY_OUT = "write one class per line: 'name: label' or 'name: [red, green, blue]'"


def find_class_file(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the table of classes in a folder, or None, and a warning for each further one, which is not read."""
    present = [*(folder / name for name in NAMES if (folder / name).is_file()), *find_colour_tables(folder)]
    unread = [
        f"{path}: not read, since {present[0].name} names the classes - remove one of them" for path in present[1:]
    ]
    return (present[0] if present else None), unread


def find_colour_tables(folder: Path) -> list[Path]:
    """Return the files in a folder that have the name and the form of a table of colours of another program."""
    return [
        folder / name
        for name in COLOUR_TABLES
        if (folder / name).is_file() and _read_colours(folder / name) is not None
    ]


def _read_colours(path: Path) -> list[tuple[str, list[int]]] | None:
    """Return the names and colours of a text file of lines such as `name,r,g,b`, or None if it has another form."""
    try:
        lines = [line for _, line in read_list(path) if not line.startswith("#")]
    except UsageError:
        return None
    if lines and CSV_HEADER.fullmatch(lines[0]):
        del lines[0]
    for form in COLOUR_LINES:
        matches = [match for line in lines if (match := form.fullmatch(line))]
        if lines and len(matches) == len(lines):
            return [(match["name"].strip(), [int(match[channel]) for channel in "rgb"]) for match in matches]
    return None


def given_classes(value: str | Mapping[Any, Any] | list[str]) -> Classes:
    """Return the classes that the key `dataset.classes` gives.

    Args:
        value: A file, the content of one, or `Classes.to_dict` of a checkpoint.

    Raises:
        UsageError: It does not describe classes.
    """
    if isinstance(value, Mapping) and {"names", "colours", "labels"} <= set(value):
        return Classes.from_dict(value)
    if not isinstance(value, str):
        return parse_classes(value, "dataset.classes")
    path = Path(os.path.expanduser(value))
    if not path.is_file():
        raise UsageError(f"dataset.classes={value} is not a file - give a YAML file of class names")
    return read_class_file(path)


def indexed_classes(value: Classes | Sequence[str] | Mapping[Any, Any]) -> Classes:
    """Return the classes of a network, whose masks hold class indices.

    Args:
        value: The classes, their names in the order of their indices, or a mapping between names and indices.

    Raises:
        UsageError: It is not one of these, or the indices are not 0, 1, 2, ...
    """
    if isinstance(value, Classes):
        return value
    ignore_index = IGNORE
    if isinstance(value, Mapping):
        parsed = parse_classes(value, "classes")
        if parsed.by_colour or sorted(parsed.labels) != list(range(len(parsed))):
            raise UsageError(f"classes is {dict(value)} - give each name its index in the masks, 0, 1, 2, ...")
        value = [name for _, name in sorted(zip(parsed.labels, parsed.names, strict=True))]
        ignore_index = parsed.ignore_index
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise UsageError(f"classes is {value!r} - give the names in the order of their indices, or {{index: name}}")
    names = tuple(map(str, value))
    return Classes(names, default_colours(names, range(len(names))), ignore_index)


def read_class_file(path: Path) -> Classes:
    """Read a YAML file of classes, or a text file with one name per line for the labels 0, 1, 2, ... or with colours.

    Raises:
        UsageError: The file cannot be read, or does not describe classes; the message names the file.
    """
    ending = path.suffix.lower()
    if ending in (".txt", ".csv") and (colours := _read_colours(path)) is not None:
        if len(dict(colours)) < len(colours):
            names = [name for name, _ in colours]
            raise UsageError(f"{path}: the class names {names} are not all different - rename the duplicates")
        return parse_classes(dict(colours), str(path))
    if ending == ".txt":
        return parse_classes([line for _, line in read_list(path) if not line.startswith("#")], str(path))
    try:
        # As text, since YAML reads no and off as booleans and 010 as 8, but a class can have any name.
        content = read_yaml(path, as_text=True)
    except PlainDataError as error:
        raise UsageError(f"{path} {error} - write one class per line: 'name: label'") from error
    return parse_classes(content, str(path))


def parse_classes(content: Any, source: str) -> Classes:
    """Parse a list of names, or a mapping from names to labels, [r, g, b] or '#rrggbb'.

    The name `ignore` stands for ignored pixels: a colour, any integer label or a list of labels.

    Args:
        content: The list or mapping; numbers may be text.
        source: Its file or key, for messages.

    Raises:
        UsageError: The content is not such a table.
    """
    if isinstance(content, list):
        if any(isinstance(name, list | dict) for name in content):
            raise UsageError(f"{source}: {content} is not a list of names - write one name per line, or 'name: label'")
        if len({str(name) for name in content}) != len(content):
            raise UsageError(f"{source}: the class names {content} are not all different - rename the duplicates")
        content = {name: label for label, name in enumerate(content)}
    if not isinstance(content, Mapping) or not content:
        raise UsageError(f"{source} contains no classes - {WAY_OUT}")
    # `Ignore` is hardly a class of that name.
    content = {IGNORED if str(name).casefold() == IGNORED else str(name): value for name, value in content.items()}
    if all(_integer(name) is not None and _is_name(value) for name, value in content.items()):
        if len(set(content.values())) < len(content):
            raise UsageError(f"{source}: the class names are not all different - rename the duplicates")
        content = {str(name): label for label, name in content.items()}  # `0: road`, as other programs write it
    if set(content) == {IGNORED}:
        raise UsageError(f"{source} contains no classes besides ignore - {WAY_OUT}")
    ignored = _ignored(content.pop(IGNORED), source) if IGNORED in content else ()
    entries = {name: _label_or_colour(value, name, source) for name, value in content.items()}
    kinds = {type(entry) for entry in (*entries.values(), *ignored)}
    if len(kinds) > 1:
        raise UsageError(f"{source} mixes labels and colours - give every class a label, or every class a colour")
    names = tuple(entries)
    if both := [entry for entry in ignored if entry in entries.values()]:
        raise UsageError(f"{source}: {both[0]} is both a class and ignore - give it one meaning")
    colours = tuple(entry for entry in entries.values() if isinstance(entry, tuple))
    if colours:
        ignored_colour = next((entry for entry in ignored if isinstance(entry, tuple)), None)
        return Classes(names, colours, IGNORE, ignore_colour=ignored_colour, by_colour=True)
    labels = tuple(entry for entry in entries.values() if isinstance(entry, int))
    void = tuple(entry for entry in ignored if isinstance(entry, int))
    # Class indices are 0..C-1, so any other ignored label of 8 bits can also serve as ignore_index.
    index = next((label for label in void if len(names) <= label <= 255), IGNORE)
    return Classes(names, default_colours(names, labels), index, labels, ignored_labels=void, by_colour=False)


def _ignored(value: Any, source: str) -> tuple[int | Colour, ...]:
    """Parse the value of `ignore`: a colour, a label, or a list of labels."""
    numbers = [_integer(item) for item in value] if isinstance(value, list | tuple) else [_integer(value)]
    labels = [number for number in numbers if number is not None]
    is_colour = isinstance(value, list | tuple) and len(value) == 3 and all(0 <= label <= 255 for label in labels)
    if is_colour or (isinstance(value, str) and value.startswith("#")):
        return (_label_or_colour(value, "ignore", source),)
    if not labels or len(labels) < len(numbers):
        raise UsageError(
            f"{source}: ignore is {value!r} - give a label, such as 255 or -9999, a list of labels, or a colour"
        )
    return tuple(labels)


def _label_or_colour(value: Any, name: str, source: str) -> int | Colour:
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return parse_hex_colour(value)
    if isinstance(value, list | tuple) and len(value) == 3:
        red, green, blue = (_integer(channel) for channel in value)
        if (
            red is not None
            and green is not None
            and blue is not None
            and 0 <= min(red, green, blue) <= max(red, green, blue) <= 255
        ):
            return red, green, blue
    label = _integer(value)
    if label is not None and 0 <= label <= 65535:
        return label
    if value in (None, ""):
        raise UsageError(f"{source}: class '{name}' has no value - give a label, or a colour in quotes: '#rrggbb'")
    raise UsageError(
        f"{source}: class '{name}' is {value!r} - give a label 0..65535, a colour [red, green, blue] or '#rrggbb'"
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and _integer(value) is None and not value.startswith("#")


def _integer(value: Any) -> int | None:
    """Return an integer, or text of one, as an int, and None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    # int() does not strip all that str.strip() does: separators such as \x1f remain.
    text = value.strip() if isinstance(value, str) else ""
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else None


def class_file(classes: Classes, comments: Mapping[str, str]) -> str:
    """Return classes as the text of a classes.yaml.

    Args:
        classes: The classes.
        comments: A remark for each name.
    """
    values = [f"[{', '.join(map(str, colour))}]" for colour in classes.colours]
    ignored = f"[{', '.join(map(str, classes.ignore_colour))}]" if classes.ignore_colour else None
    if not classes.by_colour:
        values = [str(label) for label in classes.labels]
        void = [label for label in classes.ignored_labels if label not in classes.labels]
        ignored = str(void[0] if len(void) == 1 else void) if void else None
    lines = [
        (yaml_name(name), value, comments.get(name, "")) for name, value in zip(classes.names, values, strict=True)
    ]
    lines += [("ignore", ignored, "these pixels are not used")] if ignored else []
    return "".join(f"{name}: {value}{f'  # {comment}' if comment else ''}\n" for name, value, comment in lines)


def yaml_name(name: str) -> str:
    """Return a name as it can be written before a colon in YAML."""
    return name if re.fullmatch(r"\w([\w ./-]*[\w./-])?", name) else "'" + name.replace("'", "''") + "'"
