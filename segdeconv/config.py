"""Configs: plain data that names classes and their arguments, with the constructors' signatures as schemas.

A config node is a mapping with `_target_`, the dotted name of a class or function, and arguments for it. `check` checks
them against the signature (names, types, ranges) and fills in the defaults; `build` calls it. In Python `_target_` may
also be a function that returns an object, see `stand_in`. This module imports none of segdeconv's classes by name;
checkpoint.py decides which classes a checkpoint may name.
"""

import copy
import difflib
import enum
import importlib
import importlib.util
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from segdeconv.errors import SegdeconvError, UsageError, command, did_you_mean, warn
from segdeconv.system.plain_data import PlainDataError, check_plain, parse_yaml, read_yaml, require_mapping

TARGET = "_target_"
OBJECT = "object"  # the key of a node that names an object, see `stand_in`
ABSENT = "segdeconv.config.absent"
Node = dict[str, Any]

_PACKAGE = Path(__file__).resolve().parent
# The shipped config files, which an installed package contains; in a clone they are next to the package.
CONFIGS = (_PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent) / "configs"

# Classes that have moved: former name -> current name. A config may use either.
RENAMED = {"segdeconv.loggers.TensorBoard": "segdeconv.training.loggers.TensorBoard"}

# Keys that were renamed: former name -> current name. A config may use either, but not both; files are written with
# the current name.
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

# Names that other tools give to a key, for error messages only: name -> key.
OTHER_NAMES = {
    name: key
    for key, names in {
        "augment": "aug augmentation augmentations transform transforms",
        "dataset.batch_size": "batch batch_size batchsize bs train_batch_size",
        "dataset.crop": "crop crop_size",
        "dataset.num_workers": "jobs n_workers num_workers workers",
        "dataset.root": "data data_dir data_path data_root root",
        "dataset.size": "image_size img_size imgsz input_size resize size",
        "hydra.run.dir": "log_dir out out_dir output output_dir run_dir save_dir",
        "init_from": "checkpoint ckpt finetune load_from weights",
        "loss": "criterion loss_fn loss_function",
        "loss.class_weighting": "class_weight class_weighting class_weights",
        "loss.label_smoothing": "label_smoothing smoothing",
        "model": "arch architecture backbone net network",
        "model.pretrained": "pretrained",
        "optimizer": "optim opt",
        "optimizer.lr": "base_lr learning_rate lr lr0",
        "optimizer.momentum": "momentum",
        "optimizer.weight_decay": "wd weight_decay",
        "schedule": "lr_schedule lr_scheduler sched scheduler",
        "schedule.warmup_steps": "warmup warmup_steps",
        "seed": "random_seed",
        "trainer.accelerator": "accelerator device",
        "trainer.accumulate_grad_batches": "accumulate accumulate_grad_batches grad_accum gradient_accumulation_steps",
        "trainer.check_val_every_n_epoch": "check_val_every_n_epoch eval_every val_every val_interval",
        "trainer.devices": "devices gpu gpus n_gpus ngpus num_gpus",
        "trainer.ema": "ema",
        "trainer.gradient_clip_val": "clip clip_grad clip_grad_norm grad_clip gradient_clip_val max_grad_norm",
        "trainer.max_epochs": "epoch epochs max_epoch max_epochs n_epochs num_epochs",
        "trainer.max_steps": "iterations iters max_iter max_iters max_steps num_steps steps",
        "trainer.num_nodes": "nodes num_nodes",
        "trainer.patience": "early_stopping patience",
        "trainer.precision": "amp fp16 mixed_precision precision",
    }.items()
    for name in names.split()
}


def suggest_key(name: str, options: Iterable[str], group: str = "") -> str:
    """Return the part of an error message that suggests a key for an unknown one.

    Args:
        name: The unknown key, without its group.
        options: The keys of the group.
        group: The group; empty for a key outside of all groups.

    >>> suggest_key("learning-rate", ["dataset", "optimizer"])
    "did you mean 'optimizer.lr'? All keys: python scripts/train.py --keys"
    >>> suggest_key("epochs", ["max_epochs", "max_steps"], "trainer")
    "did you mean 'max_epochs'? Available: max_epochs, max_steps"
    """
    names = list(options)
    key = OTHER_NAMES.get(name.lower().replace("-", "_"))
    if key is None or (group and difflib.get_close_matches(name, names, n=1, cutoff=0.8)):
        return did_you_mean(name, names)
    inner = key.removeprefix(f"{group}.")
    if inner in names:
        return f"did you mean '{inner}'? Available: {', '.join(sorted(names))}"
    return f"did you mean '{key}'? All keys: {command('train', ['--keys'])}"


def current_name(value: Any) -> Any:
    """Return the current name of a class that has moved, and any other value unchanged."""
    return RENAMED.get(value, value) if isinstance(value, str) else value


def rename_keys(config: Mapping[str, Any], source: str | Path) -> Node:
    """Return a config in which all keys have their current names, and warn once about each former name.

    Args:
        config: Nested mappings; not changed.
        source: Where the config comes from, for messages.

    Raises:
        UsageError: A key is given under both names.
    """
    renamed = dict(config)
    former_keys = _former_keys(config)
    for group, old, new in former_keys:
        if new in renamed[group]:
            raise UsageError(f"{source} sets {group}.{new} and its former name {group}.{old} - remove {group}.{old}")
        renamed[group] = {new if name == old else name: value for name, value in renamed[group].items()}
    _warn_of_former([f"{group}.{old}" for group, old, _ in former_keys], source)
    return renamed


def _former_keys(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (group, former name, current name) of the former keys that a config sets."""
    names = []
    for former, current in RENAMED_KEYS.items():
        group, _, old = former.partition(".")
        node = config.get(group)
        if isinstance(node, Mapping) and old in node:
            names.append((group, old, current.partition(".")[2]))
    return names


def _current_key(key: str) -> str:
    """Return the current name of a key of the command line, and warn if the key is a former one."""
    if key in RENAMED_KEYS:
        _warn_of_former([key], "the command line")
    return RENAMED_KEYS.get(key, key)


def _warn_of_former(keys: Sequence[str], source: str | Path) -> None:
    new = [key for key in keys if key not in _warned_keys]
    _warned_keys.update(new)
    if new:
        names = ", ".join(f"{key} is now {RENAMED_KEYS[key]}" for key in new)
        warn(f"{source} uses former key names, which are deprecated: {names}")


def targets(config: Any) -> Iterator[str]:
    """Yield every `_target_` in a config, also in nested mappings and lists."""
    if isinstance(config, Mapping):
        if TARGET in config:
            yield str(config[TARGET])
        for value in config.values():
            yield from targets(value)
    elif isinstance(config, Sequence) and not isinstance(config, str):
        for value in config:
            yield from targets(value)


def locate(node: Mapping[str, Any], where: str) -> Callable[..., Any]:
    """Import the class or function that a node's `_target_` names.

    Call it only for nodes that come from the user or have passed the checks of a checkpoint, because importing runs
    code.

    Args:
        node: The config node.
        where: Its key, for messages.

    Raises:
        UsageError: The name is missing, cannot be imported, or is not callable.
    """
    name = current_name(node.get(TARGET))
    if callable(name):
        return typing.cast(Callable[..., Any], name)
    if not isinstance(name, str) or "." not in name:
        group = where.partition(".")[0]
        raise UsageError(f"{where}.{TARGET} is {name!r} - use the dotted name of a class, as in configs/{group}")
    module_name, _, attribute = name.rpartition(".")
    own = module_name.partition(".")[0]
    try:
        target = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # a user's module may raise anything
        missing = isinstance(error, ModuleNotFoundError) and error.name == own
        hint = f", or run the command in the folder that contains {own}.py" if missing else ""
        raise UsageError(f"{where}.{TARGET}={name} cannot be imported ({error}) - correct the name{hint}") from error
    if not callable(target):
        raise UsageError(f"{where}.{TARGET}={name} is not a class or function - correct the name")
    return typing.cast(Callable[..., Any], target)


def choice(group: str, name: str) -> Node:
    """Return the node of a shipped config file.

    Args:
        group: The name of the folder below configs/, such as `model`.
        name: The name of the file, without its ending.

    Raises:
        UsageError: The group has no such file.
    """
    names = list_groups(CONFIGS)[group]
    if name not in names:
        raise UsageError(f"unknown {group} '{name}' - {did_you_mean(name, names)}")
    node = require_mapping(read_yaml(CONFIGS / group / f"{name}.yaml") or {})
    return {key: value for key, value in node.items() if value != "???"}  # Hydra's mark of a value that has to be given


# Objects in a config. A config is plain data, which a run folder and a checkpoint keep. An object of a Python program
# stands in it as a function, which returns the object when the node is built; what is written has `absent` instead.


def stand_in(function: Callable[..., Any], target: str | None = None) -> Callable[..., Any]:
    """Mark a function that stands in a config as a `_target_`, in place of the name of a class.

    Args:
        function: Called in place of the class; its signature is the schema of the node.
        target: The dotted name that is written in its place; `absent` if the config cannot describe the object.
    """
    function.written_as = target or ABSENT  # type: ignore[attr-defined]
    return function


def absent(*, object: str, **arguments: Any) -> Any:
    """Stand in a written config for an object that it cannot describe.

    Raises:
        UsageError: Always.
    """
    raise UsageError(
        f"{object} was an object of a Python program, which no config describes - give it there again: "
        "segdeconv.load(CHECKPOINT, model=...) for a network, train(..., resume='auto') to resume; the "
        "scores of a run are in its report.json"
    )


def objects_in(config: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """Return the functions that stand in a config for objects, by group."""
    nodes = {group: node for group, node in config.items() if isinstance(node, Mapping)}
    return {group: node[TARGET] for group, node in nodes.items() if callable(node.get(TARGET))}


def with_objects(config: Mapping[str, Any], objects: Mapping[str, Callable[..., Any]]) -> Node:
    """Return a written config in which functions stand for objects again, by group."""
    return {**config, **{group: {**config[group], TARGET: function} for group, function in objects.items()}}


def written(config: Mapping[str, Any]) -> Node:
    """Return a config as it is written: plain data, without objects."""
    plain: Node = {}
    for name, value in config.items():
        if name == TARGET and callable(value):
            plain[name] = getattr(value, "written_as", "")
        else:
            plain[name] = written(value) if isinstance(value, Mapping) else value
    return plain


def type_name(value: Any) -> str:
    """Return the dotted name of the class of an object."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def public_name(target: Any) -> str | None:
    """Return the dotted name under which a class or function can be imported, the shortest one.

    >>> import torch
    >>> public_name(torch.optim.SGD)
    'torch.optim.SGD'

    Returns:
        The name; None if there is none, as for a class that is defined in a function.
    """
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", "")
    parts = str(module).split(".")
    for length in range(1, len(parts) + 1):
        owner = sys.modules.get(".".join(parts[:length]))
        if owner is not None and vars(owner).get(name) is target:
            return f"{owner.__name__}.{name}"
    return None


def check(
    node: Mapping[str, Any], where: str, schemas: Sequence[Callable[..., Any]], *, supplied: Iterable[str] = ()
) -> Node:
    """Check a node's arguments against signatures and return the node with defaults filled in.

    Keys that no signature has are accepted only if one of the callables takes `**arguments`; it must check them itself.

    Args:
        node: The config node.
        where: Its key, for messages.
        schemas: Callables that share the node's keys.
        supplied: Arguments that the program supplies and a config may not set.

    Raises:
        UsageError: A key is unknown or missing, or a value has the wrong type or range.
    """
    reserved = set(supplied)
    prefix = f"{where}." if where else ""
    parameters, hints, takes_any = parameters_of(schemas, where, supplied=reserved)
    for name in node:
        if name in reserved or (name != TARGET and name not in parameters and not takes_any):
            way_out = suggest_key(str(name), parameters, where)
            if not str(node.get(TARGET, "segdeconv.")).startswith("segdeconv."):
                way_out += f". {node[TARGET]} takes no {name}: if a YAML file sets it, remove it with ~{prefix}{name}"
            raise UsageError(f"unknown key {prefix}{name} - {way_out}")
    checked = {name: current_name(value) for name, value in node.items() if name not in parameters}
    for name, parameter in parameters.items():
        if name in node:
            checked[name] = _typed(node[name], hints.get(name, Any), f"{prefix}{name}")
        elif parameter.default is not parameter.empty:
            with suppress(PlainDataError):  # such as a function, which the constructor fills in by itself
                checked[name] = check_plain(_jsonable(parameter.default), finite=False)
        else:
            raise UsageError(f"{prefix}{name} has no value - give {prefix}{name}=VALUE")
    return checked


def parameters_of(
    schemas: Sequence[Callable[..., Any]], where: str, *, supplied: Iterable[str] = ()
) -> tuple[dict[str, inspect.Parameter], dict[str, Any], bool]:
    """Return the keys that several callables declare.

    Args:
        schemas: Callables that share the keys of a node.
        where: The key of the node, for messages.
        supplied: Arguments that the program supplies and a config may not set.

    Returns:
        The parameters by name, their annotations by name, and whether one of the callables takes any keyword.

    Raises:
        UsageError: A callable does not declare its arguments.
    """
    reserved = set(supplied)
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    takes_any = False
    for schema in schemas:
        try:
            signature = inspect.signature(schema)
        except (ValueError, TypeError) as error:  # of some classes and functions that are not written in Python
            name = getattr(schema, "__name__", schema)
            raise UsageError(f"{where}.{TARGET}: {name} does not declare its arguments - choose another one") from error
        takes_any |= any(parameter.kind == parameter.VAR_KEYWORD for parameter in signature.parameters.values())
        parameters |= {
            name: parameter
            for name, parameter in signature.parameters.items()
            if name not in reserved and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        hints |= _hints(schema)
    return parameters, hints, takes_any


def _hints(schema: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a constructor or function, or none if they cannot be evaluated."""
    try:
        return typing.get_type_hints(schema.__init__ if inspect.isclass(schema) else schema, include_extras=True)
    except (NameError, TypeError, AttributeError):  # annotations of another library, which only type checkers evaluate
        return {}


def _adapter(annotation: Any) -> TypeAdapter[Any] | None:
    """Return the validator of an annotation, or None for one that only another library's constructor can check."""
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
    except (PydanticSchemaGenerationError, TypeError):
        return None


def _typed(value: Any, annotation: Any, where: str) -> Any:
    adapter = _adapter(annotation)
    if adapter is None:
        return value
    try:
        return _jsonable(adapter.validate_python(value))
    except ValidationError as error:
        members = [member for kind in (annotation, *typing.get_args(annotation)) for member in _members(kind)]
        if value in members:  # of an enumeration of another library, which accepts the names
            return value
        # A union reports an error for each member; the last one is the simplest.
        message = error.errors()[-1]["msg"]
        quotes = " or put it in quotes" if isinstance(value, int | float) and _accepts(annotation, str(value)) else ""
        raise UsageError(f"{where}={value}: {message[0].lower() + message[1:]} - correct the value{quotes}") from None


def _members(annotation: Any) -> list[str]:
    """Return the names in an enumeration."""
    return list(annotation.__members__) if isinstance(annotation, enum.EnumMeta) else []


def _accepts(annotation: Any, value: Any) -> bool:
    adapter = _adapter(annotation)
    if adapter is None:
        return True
    try:
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True


def _jsonable(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_jsonable(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    return value


def build(node: Mapping[str, Any], where: str, **supplied: Any) -> Any:
    """Call the class or function that a node names, with the node's arguments and the supplied ones.

    Args:
        node: The config node.
        where: Its key, for messages.
        **supplied: Arguments that the program supplies.

    Raises:
        UsageError: The target cannot be imported or refuses its arguments.
    """
    target = locate(node, where)
    arguments = {name: value for name, value in node.items() if name != TARGET}
    try:
        return target(**arguments, **supplied)
    except SegdeconvError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where} ({node[TARGET]}) rejects its arguments: {error} - correct them") from error
    except ModuleNotFoundError as error:
        package = missing_package(error)
        raise UsageError(f"{where} ({node[TARGET]}) needs the package {package} - pip install {package}") from error
    except Exception as error:
        if not is_foreign(target) or isinstance(error, MemoryError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{where} ({node[TARGET]}) fails: {reason} - correct its arguments") from error


def missing_package(error: ModuleNotFoundError) -> str:
    """Return the name of the package that a class of another library needs."""
    match = re.search(r"(?:'|pip install -U )([\w-]+)", str(error))
    return match[1] if match else "that it imports"


def is_foreign(target: Any) -> bool:
    """Return whether a class or function is not part of segdeconv."""
    return str(getattr(target, "__module__", "")).partition(".")[0] != "segdeconv"


def without_defaults(checked: Mapping[str, Any], node: Mapping[str, Any], target: Callable[..., Any]) -> Node:
    """Return a checked node without the defaults of another library's callable, which change between its versions.

    Args:
        checked: The node as `check` returns it.
        node: The node before.
        target: The callable.
    """
    own = inspect.signature(target).parameters
    return {name: value for name, value in checked.items() if name in node or name not in own}


def split_arguments(node: Mapping[str, Any], schemas: Sequence[Callable[..., Any]]) -> tuple[Node, ...]:
    """Split a node's arguments by the schemas that take them.

    Returns:
        One node per schema, and last a node of the arguments that no schema takes, with the `_target_`. An argument
        that several schemas take is in each of their nodes.
    """
    keys = [set(inspect.signature(schema).parameters) for schema in schemas]
    keys.append(set(node).difference(*keys))
    return tuple({name: value for name, value in node.items() if name in names} for names in keys)


Schemas = Mapping[str, Sequence[Callable[..., Any]]]  # callables that take a group's keys; "" for keys without a group


def override(config: Mapping[str, Any], arguments: Iterable[str], schemas: Schemas | None = None) -> dict[str, Any]:
    """Return a copy of a restored config with the `key=value` arguments of a command line set in it.

    Only values can be set, not `_target_`. Unknown keys of a node are reported later, when it is checked.

    Args:
        config: The config, whose classes may be imported.
        arguments: The `key=value` arguments.
        schemas: See `read_as_declared`.

    Raises:
        UsageError: An argument has the wrong form, is given twice, or sets an unknown group or a `_target_`.
    """
    changed = copy.deepcopy(dict(config))
    set_keys: set[str] = set()
    for argument in arguments:
        path, equals, text = argument.partition("=")
        path = _current_key(path)
        if path in set_keys:
            raise UsageError(f"{path} is given twice - give it once")
        set_keys.add(path)
        keys = path.split(".")
        if not equals or not all(keys):
            raise UsageError(f"'{argument}' is not key=value - write for example dataset.root=DIR")
        _require_one_line(argument)
        if keys[-1] == TARGET:
            raise UsageError(f"{path} cannot be changed, because the checkpoint was trained with it - leave it out")
        node = changed
        for depth, name in enumerate(keys):
            if depth == 0 and name not in node:
                raise UsageError(f"unknown key {path} - {did_you_mean(name, node)}")
            if depth == len(keys) - 1:
                node[name] = _choose(changed, keys, _readings(text), schemas or {})
            else:
                node = node.setdefault(name, {})
                if not isinstance(node, dict):
                    raise UsageError(f"{'.'.join(keys[: depth + 1])} is a value, so it has no key {keys[depth + 1]}")
    return changed


# Values as typed. A command line has only text, and its grammar reads `20`, `[a]` and `null` as a number, a list and
# nothing. The type that the constructor declares for the key decides whether the text itself is meant.


def read_as_declared(config: Mapping[str, Any], arguments: Iterable[str], schemas: Schemas) -> Node:
    """Return a composed config in which each value of the command line has the type that its key declares.

    A value that the key accepts stays as Hydra read it. Otherwise the text as typed is taken if the key accepts it
    (`dataset.root=20`), and otherwise its content as YAML (`dataset.label_map={straße: weg}`).

    Args:
        config: The config, whose classes may be imported.
        arguments: The arguments that the config was composed from, in the form of `hydra_overrides`.
        schemas: Callables that take keys of a group besides its `_target_`, by the name of the group.

    Raises:
        UsageError: A value is a sweep, and the key does not accept its text.
    """
    changed = copy.deepcopy(dict(config))
    for argument in arguments:
        key, equals, text = argument.partition("=")
        keys = key.lstrip("+").split(".")
        *parents, last = keys
        node: Any = changed
        for name in parents:
            node = node.get(name) if isinstance(node, dict) else None
        if argument[0] in "-~" or not equals or not isinstance(node, dict) or last not in node:
            continue
        value = node[last]
        resolved = "${" in text and not isinstance(value, str)  # an interpolation, such as ${seed}
        readings = [value, str(value)] if resolved else _readings(value if isinstance(value, str) else text)
        if not (isinstance(value, str) and isinstance(readings[0], dict | list)) or os.path.exists(value):
            readings.insert(0, value)
        node[last] = _choose(changed, keys, readings, schemas)
    return changed


def _choose(config: Node, keys: Sequence[str], readings: Sequence[Any], schemas: Schemas) -> Any:
    """Return the first reading of a value that its key accepts, or the first one if none is accepted."""
    owner = _declaration(config, keys, schemas)
    if owner is None:
        return readings[0]
    depth, annotation = owner
    for reading in readings:
        value: Any = reading
        if depth < len(keys):  # a key of a mapping, which only the annotation of the mapping describes
            node: Any = config
            for name in keys[:depth]:
                node = node[name]
            value = nested = copy.deepcopy(node) if isinstance(node, dict) else {}
            for name in keys[depth:-1]:
                nested = nested.setdefault(name, {})
            nested[keys[-1]] = reading
        if _accepts(annotation, value):
            return reading
    if isinstance(readings[0], str) and _is_sweep(readings[0]):
        key = ".".join(keys)
        raise UsageError(f"{key}={readings[0]} is a sweep - add -m to train with each value, or give one value")
    return readings[0]


def _declaration(config: Node, keys: Sequence[str], schemas: Schemas) -> tuple[int, Any] | None:
    """Find the declared type of a key.

    Returns:
        The number of leading keys that name the parameter, and its annotation; None if there is no annotation.
    """
    node: Any = config
    for depth, name in enumerate(keys):
        if not isinstance(node, Mapping):
            return None
        hints: dict[str, Any] = {}
        for schema in schemas.get(".".join(keys[:depth]), ()):
            hints |= _hints(schema)
        if TARGET in node:
            try:
                hints |= _hints(locate(node, ".".join(keys[:depth])))
            except UsageError:
                return None  # reported when the node is checked
        if name in hints:
            return depth + 1, hints[name]
        node = node.get(name)
    return None


def _readings(text: str) -> list[Any]:
    """Return the readings of a value on the command line: Hydra's, the text itself, and lists and mappings of YAML."""
    readings: list[Any] = []
    parsed = _parse(f"key={text}")
    if parsed is not None and not parsed.is_sweep_override():
        value = parsed.value()
        if isinstance(value, str):
            value = (text if text.strip() == value else value).replace(r"\${", "${")
        readings.append(value)
    readings.append(text)
    for as_text in (False, True):  # all scalars as text, as in {no: 20}
        try:
            value = parse_yaml(text, as_text=as_text, finite=False)
        except PlainDataError:
            continue
        if isinstance(value, dict | list) and text.lstrip()[:1] in "[{":
            readings.append(value)
    if parsed is None and isinstance(readings[-1], dict | list):  # without a declared type, what YAML reads
        readings.insert(0, readings[1])
    return readings


def _parse(argument: str) -> Any:
    """Return Hydra's reading of an argument, or None if its grammar does not allow it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _is_sweep(text: str) -> bool:
    parsed = _parse(f"key={text}")
    return parsed is not None and parsed.is_sweep_override()


def _require_one_line(argument: str) -> None:
    if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", argument):
        raise UsageError(f"{argument!r} has a line break or control character - rename the file, or leave it out")


# Composing with Hydra, for train.py. Hydra's errors of several lines are replaced by UsageErrors of one line.


def to_plain(composed: Any, arguments: Sequence[str], *, incomplete: bool = False) -> dict[str, Any]:
    """Convert a composed config to plain data, with interpolations resolved and keys under their current names.

    Args:
        composed: A DictConfig.
        arguments: The command line that it was composed from.
        incomplete: Keep `???` for a value that has to be given.

    Raises:
        UsageError: A value is missing or cannot be resolved, or a user's files set a key under both names.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

    try:
        config = typing.cast(
            dict[str, Any], OmegaConf.to_container(composed, resolve=True, throw_on_missing=not incomplete)
        )
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the config"
        reason = str(error).splitlines()[0].lower()
        way_out = f"give {key}=VALUE"
        if isinstance(error, InterpolationResolutionError | GrammarParseError):
            way_out += r", in which \${ stands for the characters ${"
        raise UsageError(f"{key}: {reason} - {way_out}") from error
    user_dir = user_config_dir(arguments)
    return rename_keys(_resolve_former(config, arguments, user_dir), f"a file in {user_dir}") if user_dir else config


def _resolve_former(config: Node, arguments: Sequence[str], user_dir: Path) -> Node:
    """Keep one value where a user's file or the command line sets a key under its former name.

    Hydra merges the former name next to the current one. The command line takes precedence over a user's file, and that
    over a shipped file.
    """
    both = [(group, old, new) for group, old, new in _former_keys(config) if new in config[group]]
    if not both:
        return config
    typed = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(user_dir.rglob("*.yaml")))
    resolved = copy.deepcopy(config)
    for group, old, new in both:
        if typed & {f"{group}.{old}", f"{group}.{new}"}:
            del resolved[group][old]
        elif f"{new}:" not in text:  # a shipped file has set it
            del resolved[group][new]
    return resolved


def compose(
    arguments: Sequence[str], folder: Path, *, incomplete: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """Compose a config from a command line and a folder of YAML files.

    Args:
        arguments: The command line. `--config-dir DIR` adds a folder of the user, `--config-name NAME` starts from
            another file than train.yaml.
        folder: The shipped configs.
        incomplete: Keep `???` for a value that has to be given.

    Returns:
        The config, and the choice of each group.

    Raises:
        UsageError: The command line is wrong, or Hydra cannot compose it.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import open_dict
    from omegaconf.errors import OmegaConfBaseException

    flags = parse_flags(arguments)
    for word in _flag_words(flags):
        if not word.startswith(("--config-dir=", "--config-name=")):
            raise UsageError(f"{word.partition('=')[0]} is an option of {command('train')} - leave it out")
    words = [word for word in hydra_overrides(arguments, folder) if not word.startswith(("hydra.", "hydra/", "-"))]
    main, name = os.path.abspath(folder), (flags.config_name or "train").removesuffix(".yaml")
    if flags.config_dir is not None:
        other = os.path.abspath(flags.config_dir)
        if os.path.isfile(os.path.join(other, f"{name}.yaml")):  # Hydra finds the main file only in the first folder
            main, other = other, main
        words.append(f"hydra.searchpath=[{quote(f'file://{other}')}]")
    try:
        with initialize_config_dir(main, version_base="1.3"):
            composed = hydra_compose(name, words, return_hydra_config=True)
            choices = dict(composed.hydra.runtime.choices)
            with open_dict(composed):
                del composed["hydra"]
            return to_plain(composed, arguments, incomplete=incomplete), choices
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"the config cannot be composed: {error} - correct the override") from error


def keys_set(arguments: Sequence[str], folder: Path) -> set[str]:
    """Return the keys and groups that a command line sets, also through its experiment and its own main file.

    Args:
        arguments: The arguments, in the form of `hydra_overrides`.
        folder: The shipped configs.
    """
    flags = parse_flags(arguments)
    keys = {word.partition("=")[0].lstrip("+~") for word in flags.overrides}
    folders = [folder, *([Path(flags.config_dir)] if flags.config_dir is not None else [])]
    names = [f"experiment/{word.partition('=')[2]}" for word in flags.overrides if word.startswith("experiment=")]
    if flags.config_name is not None:
        names.append(flags.config_name.removesuffix(".yaml"))
    while names:
        name = names.pop()
        for path in (folder / f"{name}.yaml" for folder in folders):
            if not path.is_file() or name == "train":
                continue
            content = dict(require_mapping(read_yaml(path)))
            for entry in content.pop("defaults", []):
                if isinstance(entry, str):
                    names.append(f"{name.rpartition('/')[0]}/{entry}".lstrip("/"))  # another file, or _self_
                else:
                    keys |= {group.removeprefix("override ").lstrip("/") for group in entry}
            keys |= set(leaves(content))
    return keys


def leaves(node: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Yield the dotted keys of all values of nested mappings."""
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{where}{name}.")
        else:
            yield f"{where}{name}"


# Flags of Hydra that the commands do not support, and what to do instead.
UNSUPPORTED_FLAGS = {
    "config_path": "it would replace segdeconv's config files - add a folder of your own with --config-dir DIR",
    "experimental_rerun": "it would unpickle a file - run the same command again, or resume a run with resume=RUN",
}


def parse_flags(arguments: Sequence[str]) -> Any:
    """Parse the flags of a command line with Hydra's own parser.

    Args:
        arguments: The command line, with flags and overrides in any order.

    Returns:
        A namespace with an attribute for each flag of Hydra, such as `config_dir`; `keys`, the group of `--keys`
        (empty for all groups, None without the flag); and the list `overrides`.

    Raises:
        UsageError: A flag is unknown, not supported, given twice, or contradicts another one.
    """
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> None:
        raise UsageError(f"{message} - see {command('train', ['--help'])}")

    parser = get_args_parser()
    parser.add_argument("--keys", nargs="?", const="")
    parser.allow_abbrev = False
    parser.error = refuse  # type: ignore[method-assign, assignment]
    words = list(arguments)
    for position, word in enumerate(words):  # the optional value of a flag is never an override
        if word in ("--keys", "--info", "-i") and "=" in "".join(words[position + 1 : position + 2]):
            words[position] = "--keys=" if word == "--keys" else "--info=all"
    flags, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        raise UsageError(_unknown_flag(unknown[0], words))
    for name, reason in UNSUPPORTED_FLAGS.items():
        if getattr(flags, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is not supported: {reason}")
    modes = [name for name in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(flags, name)]
    if len(modes) > 1:
        raise UsageError(f"{_flag(modes[0])} and {_flag(modes[1])} exclude each other - give one of them")
    if (flags.resolve or flags.package is not None) and not flags.cfg:
        raise UsageError(f"{'--resolve' if flags.resolve else '--package'} belongs to --cfg - add --cfg job")
    if flags.config_dir is not None and not Path(flags.config_dir or "-").is_dir():
        raise UsageError(f"--config-dir={flags.config_dir} does not name a folder - write --config-dir DIR")
    if sum(word.partition("=")[0] in ("--config-dir", "-cd") for word in words) > 1:
        raise UsageError("--config-dir is given twice - give it once")
    return flags


def _unknown_flag(flag: str, words: Sequence[str]) -> str:
    """Return the error message for an unknown flag, with the override to write instead if there is one."""
    name, equals, value = flag.partition("=")
    following = words[words.index(flag) + 1 :] if flag in words else []
    if not equals and following and not following[0].startswith("-") and "=" not in following[0]:
        value = following[0]
    name = name.lstrip("-").replace("-", "_")
    key = OTHER_NAMES.get(name.lower(), name)
    return f"unknown option {flag.partition('=')[0]} - write {key}={value or 'VALUE'}, without dashes, or see --keys"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def user_config_dir(arguments: Sequence[str]) -> Path | None:
    """Return the folder of `--config-dir DIR`, which has the user's configs in the layout of the shipped ones, or None.

    Raises:
        UsageError: See `parse_flags`.
    """
    path = parse_flags(arguments).config_dir
    return None if path is None else Path(path)


def list_groups(folder: Path) -> dict[str, list[str]]:
    """Return the choices of each group in a folder of YAML files."""
    return {
        path.name: sorted(file.stem for file in path.glob("*.yaml"))
        for path in folder.iterdir()
        if path.is_dir() and path.name != "hydra"  # groups of Hydra's own, such as hydra/sweeper
    }


def available_choices(arguments: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """Return the choices of each group on this command line, both shipped ones and those of the user's folder.

    Raises:
        UsageError: A user's file has the name of a shipped one.
    """
    shipped, user_dir = list_groups(folder), user_config_dir(arguments)
    added = list_groups(user_dir) if user_dir else {}
    for group, names in added.items():
        if both := sorted(set(names) & set(shipped.get(group, []))):
            raise UsageError(
                f"{user_dir}/{group}/{both[0]}.yaml has the name of a shipped file, which takes precedence - rename it"
            )
    return {group: sorted([*names, *added.get(group, [])]) for group, names in shipped.items()}


def hydra_overrides(arguments: Sequence[str], folder: Path) -> list[str]:
    """Check a command line and return its overrides in a form that Hydra accepts.

    An argument of a constructor need not be in a YAML file to be set, so `model.depth=13` becomes `++model.depth=13`;
    `check` reports unknown arguments later.

    Args:
        arguments: The command line.
        folder: The shipped configs.

    Returns:
        The flags, each as one word, and then the overrides: Hydra accepts no flags between overrides.

    Raises:
        UsageError: A flag is wrong (see `parse_flags`), or an argument has the wrong form, is given twice, names an
            unknown choice of a group, or reads environment variables.
    """
    flags = parse_flags(arguments)
    groups = available_choices(arguments, folder)
    overrides, set_keys = [], set()
    for argument in flags.overrides:
        _require_one_line(argument)
        typed, (argument, override) = argument, _parse_as_typed(argument, sweeps=flags.multirun, groups=groups)
        if "${" in argument and "oc.env" in argument:
            raise UsageError(
                f"'{typed}' would write an environment variable into config.yaml and the checkpoints - give the "
                "value itself"
            )
        key = _current_key(override.key_or_group)
        argument = argument.replace(override.key_or_group, key, 1)
        if key in set_keys:
            raise UsageError(f"{key} is given twice - give it once")
        set_keys.add(key)
        if key in groups:
            sweep = override.is_sweep_override()
            chosen = override.value()
            several = chosen if isinstance(chosen, list) and key in SEVERAL else [chosen]
            for choice in override.sweep_string_iterator() if sweep else map(str, several):
                if choice not in groups[key] and choice != "None":
                    raise UsageError(f"unknown {key} '{choice}' - {did_you_mean(choice, groups[key])}")
            # Every group has a default, experiment=null among them, so +experiment=NAME replaces one too.
            overrides.append(argument.lstrip("+"))
        elif key.startswith("hydra") or argument[0] == "~":
            overrides.append(argument)
        else:
            overrides.append("++" + argument.lstrip("+"))
    return [*_flag_words(flags), *overrides]


def _flag_words(flags: Any) -> list[str]:
    """Return the flags of `parse_flags` as words of a command line, without the overrides."""
    return [
        _flag(name) if value is True else f"{_flag(name)}={value}"
        for name, value in vars(flags).items()
        if name != "overrides" and value is not None and value is not False
    ]


def fixed_overrides(arguments: Sequence[str]) -> list[str]:
    """Return the overrides of a command line that are no sweeps, in the form in which Hydra gives them to each job."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides([word for word in arguments if not word.startswith("-")])
    return [
        f"{word.get_key_element()}={word.get_value_element_as_str()}" for word in parsed if not word.is_sweep_override()
    ]


def first_values(arguments: Sequence[str]) -> list[str]:
    """Return the overrides of a command line with the first value of each sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = []
    for word in OverridesParser.create().parse_overrides(list(arguments)):
        parsed: Any = word.value()
        if word.is_interval_sweep():
            value = str(parsed.start)
        elif word.is_sweep_override():
            value = next(word.sweep_string_iterator(), "")
        else:
            value = word.get_value_element_as_str()
        words.append(f"{word.get_key_element()}={value}")
    return words


SEVERAL = ("callbacks",)  # groups of which several files can be chosen at once: callbacks=[a,b]
HYDRA_PATHS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")


def _parse_as_typed(argument: str, *, sweeps: bool, groups: Iterable[str]) -> tuple[str, Any]:
    """Parse an argument, whose value is taken as typed where Hydra's grammar does not allow it.

    Args:
        argument: `key=value`, or `~key`.
        sweeps: Whether the values of a sweep are wanted; otherwise a comma is a part of the text.
        groups: Names of the config groups, whose sweeps Hydra reports.

    Returns:
        The argument as Hydra accepts it, and Hydra's reading of it.

    Raises:
        UsageError: The argument has another form.
    """
    key, equals, text = argument.partition("=")
    name = key.lstrip("+")
    if name in HYDRA_PATHS and text.startswith("~/"):
        text = os.path.expanduser(text)
    parsed = _parse(f"{key}{equals}{text}")
    if parsed is not None:
        value = parsed.value()
        if parsed.is_sweep_override():
            literal = not sweeps and name not in groups
        elif isinstance(value, str):
            literal = value == text.strip() != text and "${" not in text  # spaces at the ends
        else:
            literal = name in HYDRA_PATHS
    else:
        literal = True
    if name in HYDRA_PATHS and (r"\${" in text or (literal and "${" in text)):
        raise UsageError(f"'{argument}' names a folder with the characters ${{, which Hydra resolves - use other ones")
    if not literal:
        return f"{key}{equals}{text}", parsed
    quoted = f"{key}={quote(text)}"
    parsed = _parse(quoted) if equals else None
    if parsed is None:
        raise UsageError(f"'{argument}' is not key=value - write for example dataset=camvid model.depth=13")
    return quoted, parsed


def quote(text: str) -> str:
    """Quote a text so that Hydra and OmegaConf read it as it is.

    >>> quote("it's ${x}")
    "'it\\\\'s \\\\${x}'"
    """
    from hydra.core.override_parser.types import Quote, QuotedString

    escaped = re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", text)
    return str(QuotedString(text=escaped, quote=Quote.single).with_quotes())
