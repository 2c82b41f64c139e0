"""Validation of a whole config. Only nodes of Lightning's classes import it, so they are checked last."""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from segdeconv.config import OBJECT, TARGET, check, locate, rename_keys, suggest_key, without_defaults, written
from segdeconv.data.module import SCHEMAS as DATASET_SCHEMAS
from segdeconv.data.module import SUPPLIED as DATASET_SUPPLIED
from segdeconv.data.module import check_dataset
from segdeconv.data.transforms import check_augment
from segdeconv.errors import UsageError
from segdeconv.losses import check_loss
from segdeconv.losses.adapter import TORCH_SUPPLIED
from segdeconv.losses.combined import SCHEMAS as LOSS_SCHEMAS
from segdeconv.losses.combined import SUPPLIED as LOSS_SUPPLIED
from segdeconv.models import check_model
from segdeconv.models.base import SUPPLIED as MODEL_SUPPLIED
from segdeconv.optimization import SUPPLIED as OPTIMIZER_SUPPLIED
from segdeconv.optimization import check_optimizer, check_schedule
from segdeconv.system.plain_data import PlainDataError, check_plain
from segdeconv.training.autoconfig import check_keys
from segdeconv.training.settings import INSTEAD, TrainerSettings

TIME_BUDGET = "8m"

# The default of each group, as in configs/train.yaml, for configs from Python.
DEFAULTS: dict[str, dict[str, Any]] = {
    "dataset": {TARGET: "segdeconv.data.Shapes", "batch_size": 16, "size": [64, 64]},
    "augment": {"flip": {TARGET: "albumentations.HorizontalFlip", "p": 0.5}},
    "model": {TARGET: "segdeconv.models.SegNet"},
    "loss": {TARGET: "segdeconv.losses.CrossEntropy"},
    "optimizer": {TARGET: "segdeconv.optimization.adamw"},
    "schedule": {TARGET: "segdeconv.optimization.Poly"},
    "trainer": {},
    "logger": {TARGET: "segdeconv.training.loggers.TensorBoard"},
    "callbacks": {},
}


def check_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Check a config against the constructors it names and fill in the defaults.

    Args:
        config: Nodes `dataset`, `model` and so on, each with `_target_` and arguments.

    Returns:
        A new config with the defaults of the constructors and of DEFAULTS.

    Raises:
        UsageError: A key is unknown or its value invalid; the message names the key.
    """
    config = {**DEFAULTS, **rename_keys(config, "the config")}
    require_known(config)
    known = {*DEFAULTS, *inspect.signature(_scalars).parameters}
    for group in DEFAULTS:
        if group != "callbacks" and not isinstance(config[group], Mapping):
            raise UsageError(f"{group}={config[group]} - give the name of a file in configs/{group}")
    for name in INSTEAD:
        if name in config["trainer"]:
            raise UsageError(f"trainer.{name} is an argument of Lightning's Trainer, not of a run - {INSTEAD[name]}")
    checked = {
        "dataset": check_dataset(config["dataset"]),
        "augment": check_augment(config["augment"]),
        "model": check_model(config["model"]),
        "loss": check_loss(config["loss"]),
        "optimizer": check_optimizer(config["optimizer"]),
        "schedule": check_schedule(config["schedule"]),
        "trainer": check(config["trainer"], "trainer", [TrainerSettings]),
    }
    others = check({name: config[name] for name in known - set(DEFAULTS) if name in config}, "", [_scalars])
    for key in ("max_time", "time_budget"):
        if others[key] is not None:
            seconds(others[key], key)
    check_keys(others["auto"])
    for where, node in lightning_nodes(checked["trainer"]):
        check_lightning(node, where)
    groups = {"logger": check_logger(config["logger"]), "callbacks": check_callbacks(config["callbacks"])}
    return {**checked, **groups, **others}


def lightning_nodes(trainer: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the nodes of a `trainer` node that name classes of Lightning, with their keys."""
    profiler, plugins = trainer["profiler"], trainer["plugins"] or []
    nodes = [("trainer.profiler", profiler)] if isinstance(profiler, Mapping) else []
    return nodes + [(f"trainer.plugins.{index}", node) for index, node in enumerate(plugins)]


def check_callbacks(group: Any) -> dict[str, Any]:
    """Check the `callbacks` group and return it as nodes by name.

    Args:
        group: Nodes by name, a list of nodes, or one node. A name set to null is left out.

    Raises:
        UsageError: An entry is not a node, or a node does not fit the constructor that it names.
    """
    if isinstance(group, Mapping) and TARGET in group:
        group = [group]
    if isinstance(group, list):
        group = nodes_by_name(group)
    if not isinstance(group, Mapping):
        raise UsageError(f"callbacks={group} - give the name of a file in configs/callbacks, or several in brackets")
    for name, node in group.items():
        if node is not None and not isinstance(node, Mapping):
            nodes = [key for key, other in group.items() if isinstance(other, Mapping)]
            raise UsageError(
                f"callbacks.{name}={node} is not a callback, which has a {TARGET} - "
                + (f"write callbacks.{nodes[0]}.{name}={node}" if nodes else "choose one in configs/callbacks")
            )
    return {name: check_lightning(node, f"callbacks.{name}") for name, node in group.items() if node is not None}


def nodes_by_name(nodes: Sequence[Any]) -> dict[str, Any]:
    """Return nodes by the names of their classes; a second one of a class has its index in the list too."""
    named: dict[str, Any] = {}
    for index, node in enumerate(nodes):
        known = isinstance(node, Mapping)
        name = str(node.get(OBJECT, node.get(TARGET))).rpartition(".")[2] if known else str(index)
        named[f"{name}_{index}" if name in named else name] = node
    return named


def check_lightning(node: Mapping[str, Any], where: str, *, supplied: Collection[str] = ()) -> dict[str, Any]:
    """Check a node against the constructor of a class of Lightning or of the user.

    Defaults are not filled in: they change with the library's version, and some come from the environment.
    """
    target = locate(node, where)
    given = without_defaults(check(node, where, [target], supplied=supplied), node, target)
    try:
        check_plain(written(given))
    except PlainDataError as error:
        raise UsageError(f"{where} {error}, which config.yaml cannot hold - give plain data only") from error
    return given


def require_known(names: Iterable[str]) -> None:
    """Raise UsageError if a name is neither a group nor a key without a group."""
    known = {*DEFAULTS, *inspect.signature(_scalars).parameters}
    for name in names:
        if name == "experiment":
            raise UsageError(
                "experiment is a key of the command line, where Hydra puts its file together with the others - give "
                "the groups and keys of configs/experiment/NAME.yaml"
            )
        if name not in known:
            raise UsageError(f"unknown key {name} - {suggest_key(str(name), known | {'experiment'})}")


def schemas_of(config: Mapping[str, Any]) -> dict[str, tuple[list[Callable[..., Any]], Collection[str]]]:
    """Return for each node of a config the callables that take its keys, and the arguments that a config may not set.

    Args:
        config: A config with all groups, whose classes are imported. The nodes are those of its groups, or of the
            names in a group such as `augment`; keys without a group have the empty name.
    """
    nodes: dict[str, Mapping[str, Any]] = {}
    for group in DEFAULTS:
        if TARGET in config[group]:
            nodes[group] = config[group]
        elif group != "trainer" and isinstance(config[group], Mapping):  # nodes by name, as in `augment`
            nodes |= {f"{group}.{name}": node for name, node in config[group].items() if node}
    schemas = {where: [locate(node, where)] for where, node in nodes.items()}
    of_torch = TORCH_SUPPLIED if str(config["loss"].get(TARGET)).startswith("torch.nn.") else ()
    return {
        where: (
            [*schemas.get(where, ()), *SCHEMAS.get(where, ())],
            [*SUPPLIED.get(where, ()), *(of_torch if where == "loss" else ())],
        )
        for where in (*schemas, "trainer", "")
    }


def check_logger(node: Mapping[str, Any]) -> dict[str, Any]:
    """Check a `logger` node against the logger's constructor; an empty node means no logger."""
    if not node:
        return {}
    return check_lightning(node, "logger", supplied=SUPPLIED["logger"])


def _scalars(
    *,
    seed: Annotated[int, Field(ge=0)] = 0,
    resume: str | None = None,
    resume_force: bool = False,
    init_from: str | None = None,
    max_time: str | int | None = None,
    auto: list[str] = [],  # noqa: B006 - a schema, which is never called
    time_budget: str | int = TIME_BUDGET,
) -> None:
    """Schema of the keys that belong to no group.

    Args:
        seed: Seed of all random numbers.
        resume: `auto`, `latest` or a run folder: the run to resume.
        resume_force: Resume although the config differs.
        init_from: A checkpoint, a run folder or `latest`, whose weights training starts from.
        max_time: Time after which training ends and is evaluated, such as 8h.
        auto: Keys whose values are chosen from the images and the machine.
        time_budget: Time of training from which `auto` chooses the number of steps.
    """


# The callables that take keys of a group besides its `_target_`; those without a group have the empty name.
SCHEMAS: dict[str, tuple[Callable[..., Any], ...]] = {
    "": (_scalars,),
    "dataset": DATASET_SCHEMAS,
    "loss": LOSS_SCHEMAS,
    "trainer": (TrainerSettings,),
}
# Arguments of a group's callables that the program supplies.
SUPPLIED: dict[str, Collection[str]] = {
    "dataset": DATASET_SUPPLIED,
    "logger": ("save_dir",),
    "loss": LOSS_SUPPLIED,
    "model": MODEL_SUPPLIED,
    "optimizer": OPTIMIZER_SUPPLIED,
}

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(max_time: str | int, key: str = "max_time") -> float:
    """Return the seconds that a duration, such as the value of `max_time`, stands for.

    Examples:
        >>> seconds("1:30:00"), seconds("90m"), seconds(5400)
        (5400.0, 5400.0, 5400.0)
    """
    text = str(max_time).strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?[smhd]?", text):
        return float(text.rstrip("smhd")) * UNITS.get(text[-1], 1)
    if re.fullmatch(r"(\d+:)?\d{1,2}:\d{2}:\d{2}", text):
        return float(
            sum(int(part) * unit for part, unit in zip(reversed(text.split(":")), UNITS.values(), strict=False))
        )
    raise UsageError(f"{key}={max_time} is not a duration - write hours:minutes:seconds, or a number with s, m, h or d")
