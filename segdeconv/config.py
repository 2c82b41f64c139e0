"""Configs: plain data that names classes and their arguments, with the constructors' signatures as schemas.

A config node is a mapping with `_target_`, the dotted name of a class or function, and arguments for it. `check` checks
them against the signature (names, types, ranges) and fills in the defaults; `build` calls it. In Python `_target_` may
also be a function that returns an object, see `stand_in`. This module imports none of segdeconv's classes by name;
checkpoint.py decides which classes a checkpoint may name.
"""

import copy
import difflib
import enum
import functools
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

from segdeconv.errors import SegdeconvError, UsageError, command, did_you_mean, first_line, for_caller, warn
from segdeconv.system import CONFIGS
from segdeconv.system.plain_data import PlainDataError, check_plain, parse_yaml, read_yaml, require_mapping

TARGET = "_target_"
OBJECT = "object"  # the key of a node that names an object, see `stand_in`
ABSENT = "segdeconv.config.absent"
Node = dict[str, Any]

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

    Examples:
        >>> suggest_key("learning-rate", ["dataset", "optimizer"])
        "did you mean 'optimizer.lr'? All keys: python scripts/train.py --keys"
        >>> suggest_key("epochs", ["max_epochs", "max_steps"], "trainer")
        "did you mean 'max_epochs'? Available: max_epochs, max_steps"
        >>> suggest_key("warmup_steps", ["power"], "schedule").partition(". ")[0]
        'schedule=constant, cosine, poly, restarts and step have it'
    """
    names = list(options)
    others = choices_with(group, name)
    if others:
        listed = " and ".join(part for part in (", ".join(others[:-1]), others[-1]) if part)
        return f"{group}={listed} {'have' if len(others) > 1 else 'has'} it. Available here: {', '.join(sorted(names))}"
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
    found = former_keys(config)
    for group, old, new in found:
        if new in renamed[group]:
            raise UsageError(f"{source} sets {group}.{new} and its former name {group}.{old} - remove {group}.{old}")
        renamed[group] = {new if name == old else name: value for name, value in renamed[group].items()}
    _warn_of_former([f"{group}.{old}" for group, old, _ in found], source)
    return renamed


def former_keys(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (group, former name, current name) of the former keys that a config sets."""
    names = []
    for former, current in RENAMED_KEYS.items():
        group, _, old = former.partition(".")
        node = config.get(group)
        if isinstance(node, Mapping) and old in node:
            names.append((group, old, current.partition(".")[2]))
    return names


def current_key(key: str) -> str:
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
        raise unknown_choice(group, name, names)
    node = require_mapping(read_yaml(CONFIGS / group / f"{name}.yaml") or {})
    return {key: value for key, value in node.items() if value != "???"}  # Hydra's mark of a value that has to be given


# Objects in a config. A config is plain data, which a run folder and a checkpoint keep. An object of a Python program
# stands in it as a function, which returns the object when the node is built; what is written has `absent` instead.


def choices_with(group: str, key: str) -> list[str]:
    """Return the shipped config files of a group whose classes take a key."""
    names = []
    for name in list_groups(CONFIGS).get(group, []):
        node = choice(group, name)
        with suppress(UsageError):  # a logger whose package is not installed
            if TARGET in node and key in parameters_of([locate(node, group)], group)[0]:
                names.append(name)
    return names


def unknown_choice(group: str, name: str, names: Iterable[str]) -> UsageError:
    """Return the error for a name that is no config file of a group.

    Args:
        group: The name of the folder below configs/.
        name: What was given.
        names: The files.
    """
    if group == "dataset" and os.path.isdir(name):
        way_out = for_caller(f"dataset='folder', dataset__root={name!r}", f"dataset=folder dataset.root={name}")
        return UsageError(f"dataset={name} is a folder - for your own images and masks in it, {way_out}")
    return UsageError(f"unknown {group} '{name}' - {did_you_mean(name, names)}")


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
    """Return a written config in which functions stand for objects again, by group; checkpoints lack the logger's."""
    nodes = {group: {**config[group], TARGET: function} for group, function in objects.items() if group in config}
    return {**config, **nodes}


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

    Examples:
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
            if callable(node.get(TARGET)):
                way_out += f". {where} is an object of {node.get(OBJECT, 'the program')}, which has been built"
            elif not str(node.get(TARGET, "segdeconv.")).startswith("segdeconv."):
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


def checked_arguments(constructor: Callable[..., None]) -> Callable[..., None]:
    """Return a constructor that checks its arguments against its annotations, as `check` does those of a config.

    Raises:
        UsageError: A value has the wrong type or range.
    """

    @functools.wraps(constructor)
    def construct(self: Any, *arguments: Any, **named: Any) -> None:
        signature, adapters = _declared(constructor)
        bound = None
        with suppress(TypeError):  # a wrong call, which the constructor itself reports
            bound = signature.bind(self, *arguments, **named)
        if bound is None:
            constructor(self, *arguments, **named)
            return
        for name, value in bound.arguments.items():
            if name in adapters:
                bound.arguments[name] = _validated(value, *adapters[name], f"{type(self).__name__}.{name}")
        constructor(*bound.args, **bound.kwargs)

    return construct


@functools.cache
def _declared(constructor: Callable[..., None]) -> tuple[inspect.Signature, dict[str, tuple[Any, TypeAdapter[Any]]]]:
    """Return the signature of a constructor, and the annotations that can be checked with their validators."""
    validators = {name: (annotation, _adapter(annotation)) for name, annotation in _hints(constructor).items()}
    adapters = {name: (annotation, adapter) for name, (annotation, adapter) in validators.items() if adapter}
    return inspect.signature(constructor), adapters


def _typed(value: Any, annotation: Any, where: str) -> Any:
    adapter = _adapter(annotation)
    return value if adapter is None else _jsonable(_validated(value, annotation, adapter, where))


def _validated(value: Any, annotation: Any, adapter: TypeAdapter[Any], where: str) -> Any:
    try:
        return adapter.validate_python(value)
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
        if callable(node[TARGET]):  # an object of the program, whose own traceback says more
            raise
        raise UsageError(f"{where} ({node[TARGET]}) rejects its arguments: {error} - correct them") from error
    except ModuleNotFoundError as error:
        package = missing_package(error)
        raise UsageError(f"{where} ({node[TARGET]}) needs the package {package} - pip install {package}") from error
    except Exception as error:
        if not is_foreign(target) or isinstance(error, MemoryError):
            raise
        raise UsageError(f"{where} ({node[TARGET]}) fails: {first_line(error)} - correct its arguments") from error


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
        path = current_key(path)
        if path in set_keys:
            raise UsageError(f"{path} is given twice - give it once")
        set_keys.add(path)
        keys = path.split(".")
        if not equals or not all(keys):
            raise UsageError(f"'{argument}' is not key=value - write for example dataset.root=DIR")
        require_one_line(argument)
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
    parsed = parse_override(f"key={text}")
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


def parse_override(argument: str) -> Any:
    """Return Hydra's reading of an argument, or None if its grammar does not allow it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _is_sweep(text: str) -> bool:
    parsed = parse_override(f"key={text}")
    return parsed is not None and parsed.is_sweep_override()


def require_one_line(argument: str) -> None:
    if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", argument):
        raise UsageError(f"{argument!r} has a line break or control character - rename the file, or leave it out")


def leaves(node: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Yield the dotted keys of all values of nested mappings."""
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{where}{name}.")
        else:
            yield f"{where}{name}"


def list_groups(folder: Path) -> dict[str, list[str]]:
    """Return the choices of each group in a folder of YAML files."""
    return {
        path.name: sorted(file.stem for file in path.glob("*.yaml"))
        for path in folder.iterdir()
        if path.is_dir() and path.name != "hydra"  # groups of Hydra's own, such as hydra/sweeper
    }
