"""The keys of a config with defaults, types and meanings, from the signatures and docstrings of what it names."""

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from segdeconv.config import TARGET, parameters_of
from segdeconv.errors import UsageError, did_you_mean
from segdeconv.models.build import PRETRAINED
from segdeconv.training.config_check import DEFAULTS, schemas_of

REQUIRED = "???"  # in a config file, a value that has to be given
MAX_WIDTH = 44  # of a column; a longer text only moves the rest of its line
NAMES = {str: "text", type(None): "null", Any: "any", dict: "{...}", list: "[...]", tuple: "[...]"}


class Key(NamedTuple):
    """A key of a config.

    Attributes:
        name: Its name with its group, such as `trainer.max_epochs`.
        default: Its value if it is not given, as on a command line; `???` if it has to be given.
        type: The accepted values, such as `int >= 1`.
        text: The first sentence of its description; empty if it has none.
    """

    name: str
    default: str
    type: str
    text: str


def keys(config: Mapping[str, Any], group: str = "") -> dict[str, list[Key]]:
    """Return the keys of a composed config, by node.

    Args:
        config: A config with all groups; values may be missing.
        group: The group whose keys are returned; all if empty.

    Raises:
        UsageError: There is no such group.
    """
    schemas = schemas_of(config)
    if group and group not in DEFAULTS:
        raise UsageError(f"unknown group '{group}' - {did_you_mean(group, DEFAULTS)}")
    found = {}
    for where, (callables, supplied) in schemas.items():
        if group not in ("", where.partition(".")[0]):
            continue
        parameters, hints, _ = parameters_of(callables, where, supplied=supplied)
        texts: dict[str, str] = {}
        for schema in reversed(callables):
            texts |= descriptions(schema)
        node: Any = config
        for name in where.split(".") if where else ():
            node = node[name]
        found[where] = [
            Key(
                f"{where}.{name}" if where else name,
                _value(node.get(name, None if where == "model" and name in PRETRAINED else parameter.default)),
                type_name(hints.get(name, Any)),
                texts.get(name, ""),
            )
            for name, parameter in parameters.items()
        ]
    return found


def table(found: Mapping[str, Sequence[Key]], config: Mapping[str, Any]) -> str:
    """Return the printed form of keys, one line for each."""
    if not found:
        return "nothing is chosen in this group, so it has no keys"
    everything = [(f"{key.name}={key.default}", key.type) for listed in found.values() for key in listed]
    widths = [min(MAX_WIDTH, max(map(len, column))) for column in zip(*everything, strict=True)]
    lines = []
    for where, listed in found.items():
        node: Any = config
        for name in where.split(".") if where else ():
            node = node[name]
        target = node.get(TARGET, "") if where else ""
        lines.append(f"\n{where or 'without a group'}{f' ({target})' if target else ''}")
        for key in listed:
            columns = (f"{key.name}={key.default}", key.type)
            padded = "  ".join(text.ljust(width) for text, width in zip(columns, widths, strict=True))
            lines.append(f"  {padded}  {key.text}".rstrip())
    return "\n".join(lines).lstrip("\n")


def descriptions(schema: Callable[..., Any]) -> dict[str, str]:
    """Return the first sentence of the description of each argument, from the docstrings of a function or class.

    Entries may name several arguments. A class inherits the descriptions of its bases.
    """
    texts: dict[str, str] = {}
    owners = list(inspect.getmro(schema)) if inspect.isclass(schema) else [schema]
    for owner in reversed(owners):
        for names, text in _entries(inspect.cleandoc(owner.__doc__ or "")):
            for name in names:
                texts[name] = _resolved(text, name, owners)
    return texts


def _resolved(text: str, name: str, owners: Sequence[Any]) -> str:
    """Return a description; that of another object if it is a reference, as "See `read_image`." """
    reference = re.match(r"See `(\w+)`", text)
    for owner in owners if reference else ():
        other = getattr(inspect.getmodule(owner), reference[1], None) if reference else None
        if callable(other) and name in (found := descriptions(other)):
            return found[name]
    return text


def _entries(docstring: str) -> Iterator[tuple[list[str], str]]:
    """Yield the names and the first sentence of the entries below `Args:` and similar lines."""
    pattern = r"^( +)([A-Za-z_]\w*(?:, \w+)*)(?: \(.*?\))?: +(.*(?:\n\1 +.*)*)"
    for match in re.finditer(pattern, docstring, re.MULTILINE):
        text = " ".join(match[3].split())
        yield match[2].split(", "), re.split(r"(?<=\.) (?=[A-Z`(])", text)[0]


def _value(value: Any) -> str:
    """Return a default as it is written on a command line."""
    if value is inspect.Parameter.empty:
        return REQUIRED
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(_value(item) for item in value)}]"
    if isinstance(value, Mapping):
        return "{...}" if value else "{}"
    if isinstance(value, float):
        text = f"{value:g}"
        return text if set(text) & set(".en") else f"{text}.0"  # 1.0 may mean another thing than 1
    return str(value)


def type_name(annotation: Any) -> str:
    """Return the accepted values of an annotation.

    Examples:
        >>> from typing import Annotated, Literal; from pydantic import Field
        >>> type_name(Annotated[int, Field(ge=1)] | None), type_name(Literal["batch", "sync"])
        ('int >= 1 | null', 'batch | sync')
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        bounds = [bound for field in arguments[1:] for bound in getattr(field, "metadata", ())]
        signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        ranges = [
            f"{sign} {getattr(bound, name):g}" for bound in bounds for name, sign in signs if hasattr(bound, name)
        ]
        return " ".join([type_name(arguments[0]), *ranges])
    if origin is typing.Literal:
        return " | ".join(_value(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_name(argument) for argument in arguments))
    if origin is tuple and arguments and arguments[-1] is not ...:
        return f"[{', '.join(type_name(argument) for argument in arguments)}]"
    return NAMES.get(origin or annotation, getattr(origin or annotation, "__name__", str(annotation)).lower())
