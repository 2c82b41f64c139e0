"""Resuming: finding the run folder and its checkpoint, and comparing config, data and machine."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from segdeconv.checkpoints import checkpoint
from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.classes import Classes
from segdeconv.config import current_name, rename_keys
from segdeconv.errors import CheckpointError, UsageError
from segdeconv.system.devices import machine
from segdeconv.system.files import replace_text
from segdeconv.training.processes import rank_from_outside
from segdeconv.training.run_folder import lock_run

# Keys that may change when a run resumes, since they do not affect the result of training.
CHANGEABLE_KEYS = (
    "resume", "resume_force", "max_time", "logger", "dataset.num_workers", "dataset.timeout", "dataset.root",
    "trainer.activation_checkpointing", "dataset.cache", "dataset.cache_size", "dataset.checksums",
)  # fmt: skip


def find_run(config: Mapping[str, Any], run: Path, runs: Path | None) -> Path:
    """Return the run folder for a checked config: the one that its `resume` key selects, or else `run`.

    Args:
        config: The checked config.
        run: The folder of a new run.
        runs: The folder in which resume=auto searches for the newest unfinished run with the same config; None to
            use `run`.

    Raises:
        UsageError: `resume` names a path that is not a run.
    """
    resume = config["resume"]
    if resume not in (None, "auto"):
        path = Path(os.path.expanduser(resume))
        folder = path if path.is_dir() else path.parent
        if not path.exists() or not (folder / "config.yaml").is_file():
            raise UsageError(f"resume={resume} is not a run folder - give resume=auto or a folder that train.py wrote")
        return folder
    for folder in sorted(runs.glob("*/"), reverse=True) if resume and runs else ():
        started = (folder / "config.yaml").is_file() and any(folder.glob("*.ckpt"))
        if started and not finished(folder) and _has_config(folder, config):
            return folder
    return run


def finished(run: Path) -> bool:
    """Return whether a run is complete: trained to its end, not stopped by max_time, and evaluated."""
    try:
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # ValueError: it is damaged and will be rewritten
        return False
    return isinstance(report, dict) and bool(report.get("complete", True))


def _has_config(run: Path, config: Mapping[str, Any]) -> bool:
    try:
        return not differing_keys(read_config(run), config)
    except UsageError:  # not a run; it was not named by the user, so skip it
        return False


def read_config(run: Path) -> dict[str, Any]:
    """Return the config that a run was started with: plain data, from which nothing is built."""
    path = run / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = str(getattr(error, "problem", None) or type(error).__name__)
        raise UsageError(f"{path} is not the config of a run ({reason}) - choose another hydra.run.dir") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} is not the config of a run - choose another hydra.run.dir")
    return rename_keys(config, path)


def open_run(run: Path, config: Mapping[str, Any]) -> Checkpoint | None:
    """Lock the run folder, write config.yaml, and return the checkpoint to resume from, or None for a new run.

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
        raise UsageError(f"{run} already contains a run - resume it with resume=auto or choose another hydra.run.dir")
    resumed = None
    if started:
        differing = differing_keys(read_config(run), config)
        if differing and not config["resume_force"]:
            raise UsageError(
                f"{run} was started with other values of {', '.join(differing)} - use those, or set resume_force=true"
            )
        resumed = usable_checkpoint(run)
    if rank_from_outside() == 0:  # torchrun runs this in every process
        replace_text(config_file, yaml.safe_dump(dict(config), sort_keys=False))
    return resumed


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


def without_changeable_keys(node: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return a config without the keys that may change on resuming; MLflow refuses to change a logged parameter.

    Args:
        node: The config, or a node of it.
        where: The node's key with a trailing dot, empty for the config.
    """
    return {
        name: without_changeable_keys(value, f"{where}{name}.") if isinstance(value, Mapping) else value
        for name, value in node.items()
        if f"{where}{name}" not in CHANGEABLE_KEYS
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
        keys = sorted({*before, *now})
        return [
            key
            for name in keys
            for key in differing_keys(before.get(name), now.get(name), f"{where}.{name}" if where else str(name))
        ]
    return [] if current_name(before) == current_name(now) else [where]
