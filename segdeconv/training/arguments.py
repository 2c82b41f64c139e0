"""The arguments of `train` as one config: names of config files, classes, objects, and keys."""

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import nn
from torch.optim import Optimizer

from segdeconv.config import OBJECT, TARGET, choice, leaves, public_name, stand_in, type_name
from segdeconv.data.adapter import dataset_node
from segdeconv.data.augmentation import is_transform
from segdeconv.data.transforms import transform_node
from segdeconv.errors import UsageError
from segdeconv.losses.adapter import loss_node
from segdeconv.models.adapter import network_node
from segdeconv.optimization import optimizer_node
from segdeconv.training.autoconfig import unset_keys
from segdeconv.training.config_check import DEFAULTS, nodes_by_name

SEPARATOR = "__"  # stands for the dot of a key
NAMES = {"dataset": "shapes", "model": "segnet"}  # the files that configs/train.yaml chooses


class Arguments(NamedTuple):
    """The config that the arguments of `train` describe.

    Attributes:
        config: The config, which has not been checked; objects stand in it, see `config.stand_in`.
        name: The beginning of the run's folder: the names of the data set and of the network.
        note: A line about the objects that the run's checkpoint will not contain; empty if there are none.
    """

    config: dict[str, Any]
    name: str
    note: str


def read_arguments(config: Mapping[str, Any], keywords: Mapping[str, Any]) -> Arguments:
    """Return the config that a dictionary and keyword arguments describe together.

    Args:
        config: Values by group or key: a node, or anything that a keyword may be.
        keywords: By group, the name of a file in configs/, a class or an object; by key, such as `dataset__root` for
            `dataset.root`, a value.

    Raises:
        UsageError: A group or key is given twice, or an object is of a kind that the group does not take.
    """
    values = dict(config)
    keys: dict[str, Any] = {}
    for name, value in keywords.items():
        (keys if SEPARATOR in name else values)[name.replace(SEPARATOR, ".")] = value
        if name in config:
            raise UsageError(f"{name} is given twice, in the config and as a keyword - give it once")
    network = values.get("model")
    composed: dict[str, Any] = {}
    given: dict[str, Any] = {}  # without the keys that a file in configs/ sets
    for group, value in values.items():
        if group not in DEFAULTS:
            composed[group] = _plain(value)
            continue
        composed[group] = _node(group, value, network if isinstance(network, nn.Module) else None)
        given[group] = None if isinstance(value, str) else composed[group]
    for key, value in keys.items():
        group, *inner = key.split(".")
        if group == "model" and isinstance(network, nn.Module):
            raise UsageError(
                f"{key} has no effect on the {type(network).__name__} object that is given as model - build it with "
                "this value, or give its class"
            )
        composed[group] = _with_key(composed.get(group, DEFAULTS.get(group, {})), inner, _plain(value), key)
    if values.get("dataset") == "folder" and "auto" not in composed:
        composed["auto"] = unset_keys({*keys, *leaves(given)})
    dataset, model = (_name(group, values, composed, default) for group, default in NAMES.items())
    return Arguments(composed, f"{dataset}-{model}", _note(composed))


def _name(group: str, values: Mapping[str, Any], composed: Mapping[str, Any], default: str) -> str:
    """Return the name of the chosen file of a group or, without a file, of the class."""
    value = values.get(group, default)
    if isinstance(value, str):
        return value
    if isinstance(value, nn.Module):
        return type(value).__name__.lower()
    node = composed[group]
    return str(node.get(OBJECT, node.get(TARGET))).rpartition(".")[2].lower()


def _node(group: str, value: Any, network: nn.Module | None) -> dict[str, Any]:
    """Return the node of a group for a name, a mapping, a class, or an object."""
    if group == "callbacks":
        return _nodes(group, value, _callback)
    if group == "augment":
        return _augment(value)
    if isinstance(value, str | os.PathLike):
        return choice(group, os.fspath(value))
    if isinstance(value, Mapping):
        splits = [name for name, part in value.items() if hasattr(part, "__len__") and not isinstance(part, str)]
        if group == "dataset" and TARGET not in value and "train" in splits:
            raise UsageError(
                f"dataset has the data sets {', '.join(splits)} - give two of them, such as "
                f"(data['train'], data[{splits[-1]!r}]), or one of which a fifth becomes val"
            )
        return {name: _plain(inner) for name, inner in value.items()}
    if group == "logger" and (value is None or value is False):  # False as for Lightning's Trainer
        return {}
    if isinstance(value, partial):
        if value.args:
            raise UsageError(f"{group} is a partial with arguments that have no name - give them by name")
        return {TARGET: _target(group, value.func), **{name: _plain(inner) for name, inner in value.keywords.items()}}
    if inspect.isclass(value):
        return {TARGET: _target(group, value)}
    if group == "logger" and _is_logger(value):
        return _itself(value)
    if group == "dataset" and value is not None:
        return dataset_node(value)
    if group == "model" and isinstance(value, nn.Module):
        return network_node(value)
    if group == "loss" and callable(value):
        return loss_node(value)
    if group == "optimizer" and isinstance(value, Optimizer):
        return optimizer_node(value, network)
    kinds = {
        "model": ", a class or a torch.nn.Module",
        "loss": ", a class, a torch.nn.Module or a function of logits and mask",
        "optimizer": ", a class or a torch.optim.Optimizer",
        "logger": ", a class, one logger of Lightning, or False",
    }
    kind = f"the module {value.__name__}" if inspect.ismodule(value) else f"of type {type(value).__name__}"
    further = kinds.get(group, " or a mapping with its keys")
    raise UsageError(f"{group} is {kind} - give the name of a file in configs/{group}{further}")


def _nodes(group: str, value: Any, node: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Return the nodes of a group of several parts by name, for one or several names, nodes, classes or objects."""
    if value is None:
        return {}
    if isinstance(value, Mapping) and TARGET not in value:
        return {name: node(item) if item is not None else None for name, item in value.items()}
    items = value if isinstance(value, list | tuple) else [value]
    nodes: dict[str, Any] = {}
    for name, item in nodes_by_name([item if isinstance(item, str) else node(item) for item in items]).items():
        nodes |= choice(group, item) if isinstance(item, str) else {name: item}
    return nodes


def _augment(value: Any) -> dict[str, Any]:
    """Return the nodes of transforms by name; those of a single Compose that only joins them become the group's own."""
    nodes = _nodes("augment", value, _transform)
    match list(nodes.values()):
        case [{"_target_": "albumentations.Compose", "transforms": [*transforms], **others}] if not others:
            return nodes_by_name(transforms)
    return nodes


def _transform(value: Any) -> dict[str, Any]:
    """Return the node of a transform of albumentations."""
    if is_transform(value):
        return transform_node(value)
    if isinstance(value, Mapping | partial) or inspect.isclass(value):
        return _node("transform", value, None)
    raise UsageError(
        f"augment is of type {type_name(value)} - give transforms of albumentations, or the name of a file in "
        "configs/augment"
    )


def _callback(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping | partial) or inspect.isclass(value):
        return _node("callback", value, None)
    return _itself(value)


def _is_logger(value: Any) -> bool:
    """Return whether a value is a logger of Lightning, without importing Lightning."""
    return any(base.__name__ == "Logger" and ".loggers." in base.__module__ for base in type(value).__mro__)


def _itself(value: Any) -> dict[str, Any]:
    """Return the node of an object that is used itself, since a program reads its attributes after training."""

    def object_given(*, object: str = "") -> Any:
        return value

    return {TARGET: stand_in(object_given), OBJECT: type_name(value)}


def _target(group: str, value: Callable[..., Any]) -> str:
    name = public_name(value)
    if name is None:
        raise UsageError(
            f"{group} is {value.__qualname__}, which is defined in a function, so that no checkpoint could name it - "
            "define it in a module, or give an instance"
        )
    return name


def _with_key(node: Mapping[str, Any], keys: list[str], value: Any, where: str) -> dict[str, Any]:
    changed = copy.copy(dict(node))
    name, *inner = keys
    if inner:
        nested = changed.get(name, {})
        if not isinstance(nested, Mapping):
            raise UsageError(f"{where}: {name} is a value, so it has no key {inner[0]} - correct the name")
        value = _with_key(nested, inner, value, where)
    changed[name] = value
    return changed


def _plain(value: Any) -> Any:
    """Return a value as plain data, where it is a path or a number of NumPy."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, np.generic) else value


def _note(config: Mapping[str, Any]) -> str:
    """Return the line about the objects of a config that no checkpoint describes."""
    objects = {group: node[OBJECT] for group, node in config.items() if isinstance(node, Mapping) and OBJECT in node}
    if not objects:
        return ""
    listed = ", ".join(f"{group} ({name})" for group, name in objects.items())
    several = len(objects) > 1
    ways = [f"to resume the run, give {'them' if several else 'it'} again"]
    if "model" in objects:
        ways.append("to load the checkpoint, segdeconv.load(CHECKPOINT, model=NETWORK)")
    return (
        f"{listed} {'are' if several else 'is'} not in the checkpoint, since no config describes an object - "
        + "; ".join(ways)
    )
