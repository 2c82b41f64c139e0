"""Bounded readers of plain data: JSON and YAML text, and data that another reader has returned.

Plain data is text, numbers, booleans and None in lists and mappings. A small file can describe a huge or endless
structure, by nesting or by references to one object, so size, depth and the number of values are checked while or right
after a file is parsed, before anything uses its content.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from segdeconv.errors import first_line

MERGE, TIME, DEFAULT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value"


# Halves of surrogate pairs, except those that stand for the bytes of a file name that is not UTF-8 (surrogateescape).
NOT_UNICODE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


class PlainDataError(ValueError):
    """Content that is not plain data, or exceeds a limit; the message is a phrase that follows the name of the file."""


@dataclass(frozen=True)
class Limits:
    """Limits of plain data.

    Attributes:
        size: Bytes of the text.
        depth: Levels of lists and mappings.
        nodes: Number of values, keys included, with every reference to a shared object counted as a copy of it. Each
            hundred characters of a text count as a further value.
    """

    size: int = 1 << 24
    depth: int = 64
    nodes: int = 200_000


LIMITS = Limits()
YAML_LIMITS = Limits(size=1 << 20, nodes=20_000)  # PyYAML reads a megabyte in seconds


def check_plain(
    data: Any, limits: Limits = LIMITS, *, leaves: tuple[type, ...] = (), tuples: bool = False, finite: bool = True
) -> Any:
    """Return a copy of plain data that contains no shared objects, in time linear in the size of the original.

    Args:
        data: The data; `dict` and `list` and their subclasses are copied as `dict` and `list`.
        limits: Depth and number of values; the size is not checked.
        leaves: Further types that are kept as they are.
        tuples: Whether tuples are kept; otherwise they become lists.
        finite: Whether to refuse numbers that are not finite.

    Raises:
        PlainDataError: The data contains itself, exceeds a limit, or has values of other types.
    """
    checker = _Checker(limits, leaves, finite)
    checker.measure(data, 0)
    return _copy(data, tuples)


@dataclass
class _Checker:
    limits: Limits
    leaves: tuple[type, ...]
    finite: bool
    seen: dict[int, tuple[int, int]] = field(default_factory=dict)  # id of a container -> its nodes and height

    def measure(self, value: Any, depth: int) -> tuple[int, int]:
        """Return the number of nodes and the height of a value; containers are visited once."""
        if not isinstance(value, dict | list | tuple):
            return self._measure_scalar(value), 0
        if id(value) in self.seen:
            nodes, height = self.seen[id(value)]
        else:
            nodes, height = 1, 0
            if depth >= self.limits.depth:
                raise PlainDataError(f"is nested deeper than {self.limits.depth} levels or contains itself")
            for item in _items(value):
                if type(item) is float and math.isfinite(item):  # most values of a large file are coordinates
                    nodes += 1
                    continue
                item_nodes, item_height = self.measure(item, depth + 1)
                nodes, height = nodes + item_nodes, max(height, item_height)
                self._require_few(nodes)
            self._require_few(nodes)
            height += 1
            self.seen[id(value)] = nodes, height
        if depth + height > self.limits.depth:
            raise PlainDataError(f"is nested deeper than {self.limits.depth} levels or contains itself")
        return nodes, height

    def _measure_scalar(self, value: Any) -> int:
        if isinstance(value, str):
            if not value.isascii() and NOT_UNICODE.search(value):
                raise PlainDataError("contains text that is not Unicode (half of a surrogate pair)")
            return 1 + len(value) // 100
        if type(value) is int and not -(2**63) <= value < 2**64:
            raise PlainDataError("contains an integer of more than 64 bits")
        if type(value) is float and self.finite and not math.isfinite(value):
            raise PlainDataError(f"contains the number {value}")
        if value is not None and type(value) not in (int, float, bool) and not isinstance(value, self.leaves):
            raise PlainDataError(f"contains a value of type {type(value).__name__}")
        return 1

    def _require_few(self, nodes: int) -> None:
        if nodes > self.limits.nodes:
            raise PlainDataError(f"contains more than {self.limits.nodes:,} values, counting each reference")


def _items(value: Any) -> Sequence[Any]:
    """Return the items of a container, and those keys of a mapping that need a check."""
    if not isinstance(value, dict):
        return value
    for key in dict.keys(value):
        if type(key) not in (str, int, float, bool, type(None)):
            raise PlainDataError(f"contains a key of type {type(key).__name__}")
    # The methods of dict, because an object that was read from a file can have attributes with the same names.
    return [*dict.keys(value), *dict.values(value)]


def _copy(value: Any, tuples: bool) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item, tuples) for key, item in dict.items(value)}
    if isinstance(value, list | tuple):
        items = [_copy(item, tuples) for item in value]
        return tuple(items) if tuples and isinstance(value, tuple) else items
    return value


def read_bytes(path: Path, limits: Limits = LIMITS) -> bytes:
    """Return the content of a file.

    Raises:
        PlainDataError: The file is larger than the limit.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(limits.size + 1)
    if len(content) > limits.size:
        raise PlainDataError(f"is larger than {limits.size / 2**20:g} MiB")
    return content


def parse_json(text: str | bytes, limits: Limits = LIMITS, *, finite: bool = True) -> Any:
    """Parse JSON.

    Args:
        text: The JSON.
        limits: Its limits.
        finite: Whether to refuse NaN and Infinity, which are not JSON but which Python writes.

    Raises:
        PlainDataError: The text is not JSON in UTF-8, or exceeds a limit.
    """
    if len(text) > limits.size:
        raise PlainDataError(f"is larger than {limits.size / 2**20:g} MiB")
    try:
        content = json.loads(
            text.decode() if isinstance(text, bytes) else text,
        )
    except RecursionError:
        raise PlainDataError(f"is nested deeper than {limits.depth} levels") from None
    except ValueError as error:
        raise PlainDataError(f"is not JSON ({first_line(error)})") from error
    _Checker(limits, (), finite).measure(content, 0)  # without a copy, since a parser shares no objects
    return content


def read_json(path: Path, limits: Limits = LIMITS, *, finite: bool = True) -> Any:
    """Read a JSON file, see `parse_json`.

    Raises:
        PlainDataError: The file is not JSON in UTF-8, or exceeds a limit.
        OSError: The file cannot be read.
    """
    return parse_json(read_bytes(path, limits), limits, finite=finite)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without tags, merge keys, dates and repeated keys, and with limits.

    Dates stay text, as in the files that Hydra reads.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name and form that the base class defines
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (MERGE, TIME, DEFAULT)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str, limits: Limits) -> None:
        super().__init__(text)
        self.limits, self.depth, self.nodes = limits, 0, 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if getattr(event, "tag", None) is not None:
            raise PlainDataError(
                f"is not YAML of plain values (line {event.start_mark.line + 1} has the tag "
                f"{event.tag.replace('tag:yaml.org,2002:', '!!')})"
            )
        if self.depth > self.limits.depth + 1:
            raise PlainDataError(f"is nested deeper than {self.limits.depth} levels")
        if self.nodes > self.limits.nodes:
            raise PlainDataError(f"contains more than {self.limits.nodes:,} values")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise PlainDataError(f"has the key '{key.value}' in line {lines[key.value]} and again in line {line}")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


class _TextLoader(_Loader):
    """A loader that keeps every value as the text in the file.

    YAML 1.1 reads no, off and yes as booleans, 010 as 8 and 2020-01-01 as a date, but a class can have any name.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 - the name and form that the base class defines


def parse_yaml(text: str, limits: Limits = YAML_LIMITS, *, as_text: bool = False, finite: bool = True) -> Any:
    """Parse YAML without tags, merge keys, dates and repeated keys; aliases count as copies.

    Args:
        text: The YAML.
        limits: Its limits.
        as_text: Whether every scalar stays the text in the file.
        finite: Whether to refuse `.nan` and `.inf`.

    Raises:
        PlainDataError: The text is not such YAML, or exceeds a limit.
    """
    if len(text) > limits.size:
        raise PlainDataError(f"is larger than {limits.size / 2**20:g} MiB")
    try:
        loader = (_TextLoader if as_text else _Loader)(text, limits)
        try:
            content = loader.get_single_data()
        finally:
            loader.dispose()
    except PlainDataError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise PlainDataError(f"is not YAML ({problem}{where})") from error
    return check_plain(content, limits, finite=finite)


def read_yaml(path: Path, limits: Limits = YAML_LIMITS, *, as_text: bool = False) -> Any:
    """Read a YAML file, see `parse_yaml`.

    Raises:
        PlainDataError: The file is not such YAML in UTF-8, or exceeds a limit.
        OSError: The file cannot be read.
    """
    try:
        text = read_bytes(path, limits).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlainDataError(f"is not YAML (not UTF-8, byte {error.start})") from error
    return parse_yaml(text, limits, as_text=as_text)


def require_mapping(data: Any) -> Mapping[str, Any]:
    """Return data that is a mapping with text as keys.

    Raises:
        PlainDataError: It is not.
    """
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise PlainDataError("is not a mapping with names as keys")
    return data
