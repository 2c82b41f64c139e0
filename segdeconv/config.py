"""Configs: plain data naming a class and its arguments. The constructor's signature is the schema.

A config node is a mapping with `_target_`, the dotted name of a class or function, and arguments for it. `check` holds
it against the signature (names, types, ranges) and writes the defaults in; `build` calls it. Nothing here imports
segdeconv's own classes by name, and what may be named in a checkpoint is checkpoint.py's to say.
"""

import copy
import importlib
import importlib.util
import inspect
import os
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from segdeconv.errors import UsageError, did_you_mean

TARGET = "_target_"
Node = dict[str, Any]

# Classes that have moved: former name -> current name. A config may use either.
RENAMED = {"segdeconv.loggers.TensorBoard": "segdeconv.training.loggers.TensorBoard"}

# Keys that were renamed: former name -> current name. A config may use either, not both; files are written with the
# current one.
RENAMED_KEYS = {
    "dataset.mix_share": "dataset.mix_probability",
    "loss.adjustment": "loss.logit_adjustment",
    "loss.balancing": "loss.class_weighting",
    "loss.temper": "loss.class_weighting_power",
    "trainer.accumulate": "trainer.accumulate_grad_batches",
    "trainer.gradient_clip": "trainer.gradient_clip_val",
    "trainer.recompute": "trainer.activation_checkpointing",
    "trainer.validate_every": "trainer.check_val_every_n_epoch",
}
_warned_keys: set[str] = set()  # one warning per process and key


def current_name(value: Any) -> Any:
    """Return the current name of a class that has moved, and any other value unchanged."""
    return RENAMED.get(value, value) if isinstance(value, str) else value


def rename_keys(config: Mapping[str, Any], source: str | Path) -> Node:
    """Return a config in which renamed keys have their current names, and warn once about those that had not.

    Args:
        config: Nested mappings, which stay unchanged.
        source: Where the config comes from, for messages.

    Raises:
        UsageError: A key is given under both names.
    """
    renamed = dict(config)
    former_keys = []
    for former, current in RENAMED_KEYS.items():
        group, _, old = former.partition(".")
        new = current.partition(".")[2]
        node = renamed.get(group)
        if not isinstance(node, Mapping) or old not in node:
            continue
        if new in node:
            raise UsageError(f"{source} sets {current} and its former name {former} - remove {former}")
        renamed[group] = {new if name == old else name: value for name, value in node.items()}
        former_keys.append(former)
    _warn_of_former(former_keys, source)
    return renamed


def _warn_of_former(keys: Sequence[str], source: str | Path) -> None:
    new = [key for key in keys if key not in _warned_keys]
    _warned_keys.update(new)
    if new:
        names = ", ".join(f"{key} is now {RENAMED_KEYS[key]}" for key in new)
        print(f"segdeconv: warning: {source} uses former key names, which are deprecated: {names}", file=sys.stderr)


def targets(config: Any) -> Iterator[str]:
    """Every `_target_` anywhere in a config, whatever its type."""
    if isinstance(config, Mapping):
        if TARGET in config:
            yield str(config[TARGET])
        for value in config.values():
            yield from targets(value)
    elif isinstance(config, Sequence) and not isinstance(config, str):
        for value in config:
            yield from targets(value)


def locate(node: Mapping[str, Any], where: str) -> Callable[..., Any]:
    """Import what a node's `_target_` names. Only for nodes that the user typed, or that were found admissible."""
    name = current_name(node.get(TARGET))
    if not isinstance(name, str) or "." not in name:
        group = where.partition(".")[0]
        raise UsageError(f"{where}.{TARGET} is {name!r} - give the dotted name of a class, as in configs/{group}")
    module_name, _, attribute = name.rpartition(".")
    own = module_name.partition(".")[0]
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # a module of the user's own may raise anything
        missing = isinstance(error, ModuleNotFoundError) and error.name == own
        place = f", or start in the folder that holds {own}.py" if missing else ""
        raise UsageError(f"{where}.{TARGET}={name} cannot be imported ({error}) - correct the name{place}") from error
    if not callable(found):
        raise UsageError(f"{where}.{TARGET}={name} is not a class or function - correct the name")
    return typing.cast(Callable[..., Any], found)


def check(
    node: Mapping[str, Any], where: str, schemas: Sequence[Callable[..., Any]], *, supplied: Iterable[str] = ()
) -> Node:
    """Hold a node's arguments against the signatures of what will take them; returns it with defaults written in.

    where: the node's key, for messages. schemas: one callable, or several that share the node's keys.
    supplied: arguments that the program gives itself and nobody may set.
    Keys that no signature names pass only to a callable that takes `**arguments`, whose they are to judge.
    """
    given = set(supplied)
    prefix = f"{where}." if where else ""
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    takes_any = False
    for schema in schemas:
        signature = inspect.signature(schema)
        takes_any |= any(parameter.kind == parameter.VAR_KEYWORD for parameter in signature.parameters.values())
        parameters |= {
            name: parameter
            for name, parameter in signature.parameters.items()
            if name not in given and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        hints |= _hints(schema)
    for name in node:
        if name in given or (name != TARGET and name not in parameters and not takes_any):
            way_out = did_you_mean(str(name), parameters)
            if not str(node.get(TARGET, "segdeconv.")).startswith("segdeconv."):
                way_out += f". {node[TARGET]} takes no {name}: if a YAML file sets it, take it out with ~{prefix}{name}"
            raise UsageError(f"there is no key {prefix}{name} - {way_out}")
    checked = {name: current_name(value) for name, value in node.items() if name not in parameters}
    for name, parameter in parameters.items():
        if name in node:
            checked[name] = _typed(node[name], hints.get(name, Any), f"{prefix}{name}")
        elif parameter.default is not parameter.empty:
            checked[name] = _jsonable(parameter.default)
        else:
            raise UsageError(f"{prefix}{name} has no value - give {prefix}{name}=VALUE")
    return checked


def _hints(schema: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a constructor or function, where they can be read."""
    try:
        return typing.get_type_hints(schema.__init__ if inspect.isclass(schema) else schema, include_extras=True)
    except NameError:  # a foreign library's, imported for type checkers only
        return {}


def _typed(value: Any, annotation: Any, where: str) -> Any:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(
            annotation, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
        )
    except (PydanticSchemaGenerationError, TypeError):
        return value  # a foreign library's annotation that only its own constructor can judge
    try:
        return _jsonable(adapter.validate_python(value))
    except ValidationError as error:
        # A union reports each of its members; the last is the plainest.
        message = error.errors()[-1]["msg"]
        raise UsageError(f"{where}={value}: {message[0].lower() + message[1:]} - correct the value") from None


def _jsonable(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_jsonable(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    return value


def build(node: Mapping[str, Any], where: str, **supplied: Any) -> Any:
    """Call what a node names with its arguments and the supplied ones.

    What the called constructor refuses becomes one sentence that names the node.
    """
    target = locate(node, where)
    arguments = {name: value for name, value in node.items() if name != TARGET}
    try:
        return target(**arguments, **supplied)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where} ({node[TARGET]}) refuses its arguments: {error} - correct them") from error


def split_arguments(node: Mapping[str, Any], schemas: Sequence[Callable[..., Any]]) -> tuple[Node, ...]:
    """Each schema's share of a node's arguments, in order, and last what none of them takes, with its `_target_`.

    A key that several schemas name goes to each of them.
    """
    shares = [set(inspect.signature(schema).parameters) for schema in schemas]
    shares.append(set(node).difference(*shares))
    return tuple({name: value for name, value in node.items() if name in share} for share in shares)


def override(config: Mapping[str, Any], arguments: Iterable[str]) -> dict[str, Any]:
    """A copy of a restored config with `key=value` arguments of a command line set in it.

    Only values: what is built, `_target_`, stays. Unknown keys are found when the node is checked.
    """
    import yaml

    changed = copy.deepcopy(dict(config))
    given: set[str] = set()
    for argument in arguments:
        path, equals, text = argument.partition("=")
        _warn_of_former([path] if path in RENAMED_KEYS else [], "the command line")
        path = RENAMED_KEYS.get(path, path)
        if path in given:
            raise UsageError(f"{path} is given twice - give it once")
        given.add(path)
        keys = path.split(".")
        if not equals or not all(keys):
            raise UsageError(f"'{argument}' is not key=value - write for example dataset.root=DIR")
        if keys[-1] == TARGET:
            raise UsageError(f"{path} is what the checkpoint was trained with and stays - leave it out")
        node = changed
        for depth, name in enumerate(keys):
            if depth == 0 and name not in node:
                raise UsageError(f"there is no key {path} - {did_you_mean(name, node)}")
            if depth == len(keys) - 1:
                try:
                    node[name] = yaml.safe_load(text)
                except yaml.YAMLError:
                    raise UsageError(f"'{argument}' cannot be read - put what is no plain value in quotes") from None
            else:
                node = node.setdefault(name, {})
                if not isinstance(node, dict):
                    raise UsageError(f"{'.'.join(keys[: depth + 1])} is a value and has no {keys[depth + 1]}")
    return changed


# Composing: the front door of train.py. Hydra does the work; its many-line errors are replaced by one of ours.


def to_plain(composed: Any, arguments: Iterable[str]) -> dict[str, Any]:
    """Return what Hydra composed as plain data, interpolations resolved and renamed keys under their current names.

    Args:
        composed: A DictConfig.
        arguments: The command line that it was composed from.

    Raises:
        UsageError: A value is missing or cannot be resolved, or a user's files set a key under both names.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        reason = str(error).splitlines()[0].lower()
        raise UsageError(f"{key}: {reason} - give {key}=VALUE") from error
    arguments = list(arguments)
    user_dir = user_config_dir(arguments)
    return rename_keys(_resolve_former(config, arguments, user_dir), f"a file in {user_dir}") if user_dir else config


def _resolve_former(config: Node, arguments: Sequence[str], user_dir: Path) -> Node:
    """Let a key that a user's file sets under its former name override a shipped file, and the command line it.

    Hydra merges the former name beside the current one, where only one of the two may count.
    """
    typed = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(user_dir.rglob("*.yaml")))
    resolved = copy.deepcopy(config)
    for former, current in RENAMED_KEYS.items():
        group, _, old = former.partition(".")
        new = current.partition(".")[2]
        node = resolved.get(group)
        if isinstance(node, dict) and old in node and new in node:
            if current in typed or former in typed:
                del node[old]
            elif f"{new}:" not in text:  # a shipped file has set it
                del node[new]
    return resolved


def compose(arguments: Sequence[str], folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(config, choice of each group) that a command line means, composed from a folder of YAML files.

    `--config-dir=DIR` on the command line adds a folder of the user's own.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import open_dict
    from omegaconf.errors import OmegaConfBaseException

    ready = hydra_overrides(arguments, folder)
    overrides = [argument for argument in ready if not argument.startswith(("hydra.", "--config-dir=", "-cd="))]
    if own := user_config_dir(arguments):
        place = os.path.abspath(own).replace("'", "\\'")
        overrides.append(f"hydra.searchpath=['file://{place}']")
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = hydra_compose("train", overrides, return_hydra_config=True)
            choices = dict(composed.hydra.runtime.choices)
            with open_dict(composed):
                del composed["hydra"]
            return to_plain(composed, arguments), choices
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"the configuration cannot be composed: {error} - correct the override") from error


def user_config_dir(arguments: Iterable[str]) -> Path | None:
    """The folder of `--config-dir=DIR`, where a user keeps configurations of his own, laid out like ours."""
    found = None
    for argument in arguments:
        flag, _, place = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            if found or not Path(place).is_dir() or not place:
                raise UsageError(f"{argument} names no folder - write --config-dir=DIR, once, in one word")
            found = Path(place)
    return found


def list_groups(folder: Path) -> dict[str, list[str]]:
    """The names that each group of a folder of YAML files offers."""
    return {path.name: sorted(file.stem for file in path.glob("*.yaml")) for path in folder.iterdir() if path.is_dir()}


def available_choices(arguments: Iterable[str], folder: Path) -> dict[str, list[str]]:
    """The names that each group offers on this command line: ours, and those of the user's own folder."""
    ours, own = list_groups(folder), user_config_dir(arguments)
    theirs = list_groups(own) if own else {}
    for group, names in theirs.items():
        if both := sorted(set(names) & set(ours.get(group, []))):
            raise UsageError(f"{own}/{group}/{both[0]}.yaml is the name of one of ours, which would win - rename it")
    return {group: sorted([*names, *theirs.get(group, [])]) for group, names in ours.items()}


def hydra_overrides(arguments: Sequence[str], folder: Path) -> list[str]:
    """A command line's overrides, made such that Hydra takes them, or one sentence why not.

    An argument of a constructor need not stand in a YAML file to be set, so `model.depth=13` becomes
    `++model.depth=13`; whether there is such an argument is for `check` to say.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    groups = available_choices(arguments, folder)
    ready, seen = [], set()
    for argument in arguments:
        if argument.startswith("-"):
            ready.append(argument)
            continue
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            raise UsageError(
                f"'{argument}' is not key=value - write for example dataset=camvid model.depth=13"
            ) from None
        if "oc.env" in argument:
            raise UsageError(
                f"'{argument}' would write what the environment holds into config.yaml and the checkpoints - give the "
                "value itself"
            )
        former = override.key_or_group
        key = RENAMED_KEYS.get(former, former)
        if key != former:
            _warn_of_former([former], "the command line")
            argument = argument.replace(former, key, 1)
        if key in seen:
            raise UsageError(f"{key} is given twice - give it once")
        seen.add(key)
        if key in groups:
            sweep = override.is_sweep_override()
            for choice in override.sweep_string_iterator() if sweep else [str(override.value())]:
                if choice not in groups[key] and choice != "None":
                    raise UsageError(f"there is no {key} '{choice}' - {did_you_mean(choice, groups[key])}")
            ready.append(argument)
        elif key.startswith("hydra") or argument[0] == "~":
            ready.append(argument)
        else:
            ready.append("++" + argument.lstrip("+"))
    # Hydra wants its flags before or after the overrides, not between them.
    return sorted(ready, key=lambda word: not word.startswith("-"))
