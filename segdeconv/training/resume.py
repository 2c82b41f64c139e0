"""Resuming: finding the run folder and its checkpoint, and comparing config, data and machine."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import yaml

from segdeconv import config as configs
from segdeconv.checkpoints import checkpoint, locate
from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.classes import Classes
from segdeconv.errors import CheckpointError, UsageError, run_folder_argument, warn
from segdeconv.evaluation.report import read_report
from segdeconv.system.devices import machine
from segdeconv.system.files import replace_text
from segdeconv.system.plain_data import PlainDataError, read_yaml, require_mapping
from segdeconv.training.config_check import DEFAULTS, SCHEMAS
from segdeconv.training.processes import rank_from_outside
from segdeconv.training.run_folder import lock_run
from segdeconv.training.settings import TrainerSettings

if TYPE_CHECKING:
    from segdeconv.training.task import SegmentationTask

# Keys that may change when a run resumes, since they do not affect the result of training.
CHANGEABLE_KEYS = (
    "resume", "resume_force", "max_time", "logger", "dataset.num_workers", "dataset.timeout", "dataset.root",
    "trainer.activation_checkpointing", "trainer.keep", "dataset.cache", "dataset.cache_size", "dataset.checksums",
    "auto", "dataset.shard_cache", "dataset.shard_cache_size",
    "time_budget", "trainer.enable_progress_bar", "trainer.log_every_n_steps", "trainer.profiler", "trainer.plugins",
)  # fmt: skip

# Keys that checkpoints do not contain: they concern only their run, and could name classes that predicting needs not.
NOT_IN_CHECKPOINTS = (
    *(key for key in CHANGEABLE_KEYS if "." not in key), "callbacks", "trainer.profiler", "trainer.plugins",
)  # fmt: skip

LENGTH_KEYS = ("trainer.max_epochs", "trainer.max_steps")  # they may change too: a run continues to its new end


class Opened(NamedTuple):
    """A run folder that is locked for this process.

    Attributes:
        config: The config; that of a run which has begun has the values that were chosen then.
        checkpoint: The checkpoint to resume from, or None for a new run.
        finished: The run is complete, and the config asks for no more.
        new_length: The config gives the run another length; `record_config` has to record it.
        changed: The other keys with new values, which `resume_force` admits.
    """

    config: dict[str, Any]
    checkpoint: Checkpoint | None
    finished: bool
    new_length: bool = False
    changed: Sequence[str] = ()


def find_run(config: Mapping[str, Any], run: Path, runs: Path | None) -> Path:
    """Return the run folder for a checked config: the one that its `resume` key selects, or else `run`.

    Args:
        config: The checked config.
        run: The folder of a new run.
        runs: The folder in which resume=auto searches for the newest run with the same config that is unfinished or
            shorter; None to use `run`.

    Raises:
        UsageError: `resume` names a path that is not a run, or a folder of several.
    """
    resume = config["resume"]
    if resume not in (None, "auto"):
        path = Path(os.path.expanduser(resume))
        folder = path.parent if path.is_file() else path
        if not (folder / "config.yaml").is_file() and (path.is_dir() or path.name == locate.LATEST):
            folder = locate.find_run(path)
        if not (folder / "config.yaml").is_file():
            raise UsageError(f"resume={resume} is not a run folder - give resume=auto or a folder that train.py wrote")
        return folder
    for folder in sorted(runs.glob("*/"), reverse=True) if resume and runs else ():
        started = (folder / "config.yaml").is_file() and any(folder.glob("*.ckpt"))
        if started and _continues(folder, config):
            return folder
    return run


def finished(run: Path) -> bool:
    """Return whether a run is complete: trained to its end, not stopped by max_time, and evaluated."""
    try:
        return read_report(run / "report.json").get("complete", True)
    except (FileNotFoundError, PlainDataError):  # a damaged one will be rewritten
        return False


def _continues(run: Path, config: Mapping[str, Any]) -> bool:
    try:
        before = with_new_keys(read_config(run), config)
    except UsageError:  # not a run; it was not named by the user, so skip it
        return False
    differing = differing_keys(before, adopt(before, config))
    if differing:
        return set(differing) <= set(LENGTH_KEYS) and is_longer(before, config)
    return not finished(run)


def is_longer(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether a config asks for more epochs or steps than another one."""
    old, new = (_length(config) for config in (before, now))
    return new[0] > old[0] or new[1] > old[1]


def _length(config: Mapping[str, Any]) -> tuple[int, float]:
    settings = TrainerSettings()
    node = config.get("trainer", {})
    steps = node.get("max_steps", settings.max_steps)
    return node.get("max_epochs", settings.max_epochs), steps if steps > 0 else math.inf


def read_config(run: Path) -> dict[str, Any]:
    """Return the config that a run was started with: plain data, from which nothing is built."""
    path = run / "config.yaml"
    try:
        return configs.rename_keys(require_mapping(read_yaml(path)), path)
    except PlainDataError as error:
        raise UsageError(
            f"{path} is not the config of a run: it {error} - choose another {run_folder_argument()}"
        ) from error


def open_run(run: Path, config: Mapping[str, Any]) -> Opened:
    """Lock the run folder; write config.yaml into a new one.

    Args:
        run: The run folder, which is created if needed.
        config: The checked config.

    Raises:
        UsageError: The folder contains a run and `resume` is not set, or has another config, or is in use.
    """
    lock_run(run)
    config_file = run / "config.yaml"
    started = config_file.is_file() and any(run.glob("*.ckpt"))  # without a checkpoint there is nothing to resume
    if started and config["resume"] is None:
        raise UsageError(
            f"{run} already contains a run - resume it with resume=auto or choose another {run_folder_argument()}"
        )
    if not started:
        complete = finished(run)
        if not complete:
            write_config(run, config)
        return Opened(dict(config), None, complete)
    before, complete = with_new_keys(read_config(run), config), finished(run)
    config = adopt(before, config)
    differing = differing_keys(before, config)
    new_length = any(key in LENGTH_KEYS for key in differing)
    others = [key for key in differing if key not in LENGTH_KEYS]
    force = "to train further with these, set resume_force=true and more trainer.max_epochs"
    if others and config["resume_force"] and complete and not is_longer(before, config):
        raise UsageError(
            f"{run} is finished, so other values of {', '.join(others)} have no effect - give more "
            f"trainer.max_epochs, or choose another {run_folder_argument()}"
        )
    if others and not config["resume_force"]:
        raise UsageError(
            f"{run} was started with other values of {', '.join(others)} - use those, or "
            + (
                f"choose another {run_folder_argument()}; {force}"
                if complete and not new_length
                else "set resume_force=true"
            )
        )
    resumed = usable_checkpoint(run)
    complete = complete and not (new_length and is_longer(before, config))
    if resumed is None and not complete:
        write_config(run, config)
    return Opened(config, resumed, complete, new_length, others)


def adopt(before: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config in which the keys that were to be chosen have the values of a run that has begun.

    Args:
        before: The config of the run.
        config: The config now.
    """
    adopted = {**config, "auto": before.get("auto", [])}
    for key in config.get("auto", []):
        group, _, name = key.partition(".")
        if not name:
            adopted[group] = before.get(group, config[group])
        elif name in before.get(group, {}):
            adopted[group] = {**adopted[group], name: before[group][name]}
    return adopted


def with_new_keys(before: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of an earlier version's run with the defaults of keys that it did not have.

    Args:
        before: The config of the run.
        config: The checked config now, whose classes declare the keys.
    """
    completed = {**{group: DEFAULTS[group] for group in DEFAULTS.keys() & config.keys()}, **before}
    for group, node in config.items():
        old = before.get(group)
        if (
            isinstance(node, Mapping)
            and isinstance(old, Mapping)
            and old.get(configs.TARGET) == node.get(configs.TARGET)
        ):
            schemas = [*SCHEMAS.get(group, ()), *([configs.locate(node, group)] if configs.TARGET in node else [])]
            declared = {name: key for schema in schemas for name, key in inspect.signature(schema).parameters.items()}
            missing = {name: declared[name].default for name in node if name not in old and name in declared}
            completed[group] = {**old, **missing}
    return completed


def write_config(run: Path, config: Mapping[str, Any]) -> None:
    """Write config.yaml into a run folder, from the first process."""
    if rank_from_outside() == 0:  # torchrun runs this in every process
        replace_text(run / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))


def record_config(run: Path, config: Mapping[str, Any]) -> None:
    """Record that a resumed run is unfinished, and its config.

    Called right before training, so that an error before it leaves the run as it was.
    """
    if finished(run) and rank_from_outside() == 0:
        report = read_report(run / "report.json")
        replace_text(run / "report.json", json.dumps({**report, "complete": False}, indent=1) + "\n")
    write_config(run, config)


def require_compatible(resumed: Checkpoint, task: SegmentationTask, run: Path, changed: Sequence[str]) -> None:
    """Check that a task with new values of some keys can take over the state of a checkpoint.

    Args:
        resumed: The checkpoint.
        task: The task, before training.
        run: The run folder.
        changed: The keys with new values.

    Raises:
        UsageError: The weights of the checkpoint, or the state of its optimizer, have another form.
    """
    (saved,), optimizer = resumed.content["optimizer_states"], task.optimizer.state_dict()
    fits = {
        "weights": _shapes(resumed.content["state_dict"]) == _shapes(task.state_dict()),
        "optimizer": "optimizer._target_" not in changed and _has_form(saved, optimizer),
    }
    for part in [part for part, fitting in fits.items() if not fitting]:
        keys = [key for key in changed if key.startswith("optimizer.") == (part == "optimizer")] or changed
        raise UsageError(
            f"{run}: its {part} cannot be continued with other values of {', '.join(keys)}, and nothing was changed - "
            f"use the values of the run, or start a new run from its weights with init_from={resumed.path}"
        )


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in state.items()}


def _has_form(saved: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """Return whether an optimizer can take over a state: the same groups, and no option switched on or off."""
    groups, others = saved["param_groups"], state["param_groups"]
    return [group["params"] for group in groups] == [group["params"] for group in others] and all(
        bool(group[name]) == bool(other[name])
        for group, other in zip(groups, others, strict=True)
        for name in (group.keys() & other.keys()) - {"params", "lr", "base_lr", "weight_decay"}
    )


def require_more_steps(run: Path, steps: int, total_steps: int, complete: bool) -> None:
    """Check that a run of a new length has steps left.

    Args:
        run: The run folder.
        steps: Steps that the run has trained.
        total_steps: Steps of the new length.
        complete: The run was finished.

    Raises:
        UsageError: The run has trained more steps already.
    """
    if total_steps < steps or (complete and total_steps == steps):
        raise UsageError(
            f"{run} has already trained {steps} steps, and trainer.max_epochs and trainer.max_steps now end it at "
            f"{total_steps}; nothing was changed - give more, or choose another {run_folder_argument()}"
        )


def warn_of_schedule(
    schedule: Callable[[int, int], float], lr: Sequence[float], steps: int, old_total: int, new_total: int
) -> None:
    """Print by how much the learning rate jumps where a run of a new length resumes, if it does.

    Args:
        schedule: The factor on the learning rate by step and total steps.
        lr: The learning rates of the old config and of the new one.
        steps: Steps that the run has trained.
        old_total: Steps of the old length.
        new_total: Steps of the new length.
    """
    last = max(0, steps - 1)
    before, after = schedule(last, old_total), schedule(last, new_total)
    if not math.isclose(before, after, rel_tol=1e-6):
        jump = f"{lr[0] * before:.3g} to {lr[1] * schedule(steps, new_total):.3g}"
        warn(
            f"trainer.max_epochs: the run ends at step {new_total} instead of {old_total}, and the "
            f"schedule now covers all {new_total} steps, so the learning rate at the restart jumps from "
            f"{jump} - start a new run for an unbroken schedule"
        )


def usable_checkpoint(run: Path) -> Checkpoint | None:
    """Return the newest intact checkpoint of a run; print and skip a damaged one.

    Returns:
        The checkpoint, or None if the run has none yet.

    Raises:
        CheckpointError: The run has checkpoints, but none is usable.
    """
    first_error = None
    for path in (run / "last.ckpt", run / "previous.ckpt"):
        if not path.is_file():
            continue
        try:
            candidate = checkpoint.read(path, trust=AnyName())
            checkpoint.require_resumable(candidate)
        except CheckpointError as error:
            print(f"skipped: {error}")
            first_error = first_error or error
            continue
        return candidate
    if first_error is not None:
        raise first_error
    return None


def compare(resumed: Checkpoint, classes: Classes, fingerprints: Mapping[str, str]) -> None:
    """Compare the data of a resumed run with that of its checkpoint; warn if files have changed.

    Args:
        resumed: The checkpoint.
        classes: The classes of the data now.
        fingerprints: Hash of the data by split, now.

    Raises:
        UsageError: The data has other classes than the checkpoint.
    """
    before = resumed.classes
    if before.names != classes.names:
        raise UsageError(
            f"{resumed.path} was trained for {len(before)} classes ({', '.join(before.names)}) and the data now has "
            f"{len(classes)} ({', '.join(classes.names)}) - restore the data, or start a new run with "
            f"init_from={resumed.path}, which copies the weights of the common classes"
        )
    recorded = resumed.facts.get("fingerprints", {})  # missing in checkpoints of earlier versions
    for split in [name for name, value in fingerprints.items() if recorded.get(name, value) != value]:
        print(
            f"warning: files of the {split} split have changed or moved since {resumed.path} was written; the run "
            "resumes with the current files, so its result will not be bit-identical"
        )


def compare_machines(resumed: Checkpoint, device: torch.device) -> None:
    """Warn about differences between the machine of a checkpoint and this one, which affect rounding."""
    recorded, now = resumed.content["segdeconv"].get("machine", {}), machine(device)
    differing = [
        f"{name} {recorded[name]} -> {value}" for name, value in now.items() if recorded.get(name, value) != value
    ]
    if differing:
        print(f"warning: the resumed run will not be bit-identical: {', '.join(differing)}")


class AnyName(frozenset[str]):
    """A set that contains every name, to trust a checkpoint from which nothing is built.

    A resumed run builds its objects from the config that was composed for it, not from its checkpoint.
    """

    def __contains__(self, name: object) -> bool:
        return True


def without_keys(node: Mapping[str, Any], keys: Collection[str], where: str = "") -> dict[str, Any]:
    """Return a config without the keys that may change on resuming; MLflow refuses to change a logged parameter.

    Args:
        node: The config, or a node of it.
        keys: The keys, such as `dataset.root`.
        where: The node's key with a trailing dot, empty for the config.
    """
    return {
        name: without_keys(value, keys, f"{where}{name}.") if isinstance(value, Mapping) else value
        for name, value in node.items()
        if f"{where}{name}" not in keys
    }


def differing_keys(before: Any, now: Any, where: str = "") -> list[str]:
    """Return the keys in which two configs differ, except those that may change on resuming.

    Args:
        before: A config, or a node or value of it.
        now: The other one.
        where: The node's key, empty for the config.
    """
    if where in CHANGEABLE_KEYS:
        return []
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = sorted({*before, *now}, key=str)
        return [
            key
            for name in keys
            for key in differing_keys(before.get(name), now.get(name), f"{where}.{name}" if where else str(name))
        ]
    return [] if configs.current_name(before) == configs.current_name(now) else [where]
