"""Resuming: which run folder, from which checkpoint, and whether config, data and machine are still the same."""

import json
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

# Keys of a config that may differ when a run goes on: they do not change what is learnt.
CHANGEABLE_KEYS = (
    "resume", "resume_force", "max_time", "logger", "dataset.num_workers", "dataset.timeout", "dataset.root",
    "trainer.activation_checkpointing", "dataset.cache", "dataset.cache_size", "dataset.checksums",
)  # fmt: skip


# Going on: which run, and whether it is the same.


def find_run(config: Mapping[str, Any], run: Path, runs: Path | None) -> Path:
    """The folder of the run that a checked config means: the one that its `resume` names or finds, or else `run`.

    runs: where resume=auto looks for the newest unfinished run of the same config; None where `run` is the one.
    """
    resume = config["resume"]
    if resume not in (None, "auto"):
        path = Path(resume)
        folder = path if path.is_dir() else path.parent
        if not path.exists() or not (folder / "config.yaml").is_file():
            raise UsageError(f"resume={resume} is no run - give resume=auto or a folder that train.py wrote")
        return folder
    for folder in sorted(runs.glob("*/"), reverse=True) if resume and runs else ():
        begun = (folder / "config.yaml").is_file() and any(folder.glob("*.ckpt"))
        if begun and not finished(folder) and _is_of(folder, config):
            return folder
    return run


def finished(run: Path) -> bool:
    """Whether a run has come to its end, and not to that of its time."""
    try:
        report = json.loads((run / "report.json").read_text())
    except (FileNotFoundError, ValueError):  # ValueError: it is damaged, and written anew at the end
        return False
    return isinstance(report, dict) and bool(report.get("complete", True))


def _is_of(run: Path, config: Mapping[str, Any]) -> bool:
    try:
        return not differing_keys(read_config(run), config)
    except UsageError:  # a folder that nobody named: it is passed over
        return False


def read_config(run: Path) -> dict[str, Any]:
    """Return the config that a run was started with: plain data, from which nothing is built."""
    path = run / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        said = str(getattr(error, "problem", None) or type(error).__name__)
        raise UsageError(f"{path} is not the config of a run ({said}) - choose another hydra.run.dir") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} is not the config of a run - choose another hydra.run.dir")
    return rename_keys(config, path)


def open_run(run: Path, config: Mapping[str, Any]) -> Checkpoint | None:
    """Make the folder of a run ready; the checkpoint to go on from, or None to start.

    Raises UsageError if the folder holds a run and nothing was said about going on, if its config was another, or if
    another process is at it.
    """
    lock_run(run)
    config_file = run / "config.yaml"
    begun = config_file.is_file() and any(run.glob("*.ckpt"))  # or it failed before it had learnt anything
    if begun and config["resume"] is None:
        raise UsageError(f"{run} already holds a run - go on with resume=auto or choose another hydra.run.dir")
    resumed = None
    if begun:
        differing = differing_keys(read_config(run), config)
        if differing and not config["resume_force"]:
            raise UsageError(
                f"{run} was started with other values of {', '.join(differing)} - give those, or resume_force=true"
            )
        resumed = usable_checkpoint(run)
    if rank_from_outside() == 0:  # every process that torchrun starts comes by here
        replace_text(config_file, yaml.safe_dump(dict(config), sort_keys=False))
    return resumed


def usable_checkpoint(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run to go on from; a damaged newest one is named and passed over.

    None where there is none yet. Raises CheckpointError where there are some and none can be used.
    """
    refused = None
    for path in (run / "last.ckpt", run / "previous.ckpt"):
        if not path.is_file():
            continue
        try:
            read = checkpoint.read(path, trust=AnyName())
            checkpoint.require_resumable(read)
        except CheckpointError as error:
            print(f"passed over: {error}")
            refused = refused or error
            continue
        return read
    if refused is not None:
        raise refused
    return None


def compare(resumed: Checkpoint, classes: Classes, fingerprints: Mapping[str, str]) -> None:
    """Say what no key of the config does: that the files of a split are not what they were.

    Raises UsageError if the data has other classes than it had.
    """
    before = resumed.classes
    if before.names != classes.names:
        raise UsageError(
            f"{resumed.path} was trained for {len(before)} classes ({', '.join(before.names)}) and the data now has "
            f"{len(classes)} ({', '.join(classes.names)}) - restore the data, or start another run with "
            f"init_from={resumed.path}, which keeps what it knows and begins the other classes anew"
        )
    known = resumed.facts.get("fingerprints", {})  # earlier versions wrote none
    for split in [name for name, value in fingerprints.items() if known.get(name, value) != value]:
        print(
            f"watch: the files of the {split} split are not those, or not where, they were when {resumed.path} was "
            "written; the run goes on with what is there now, and not to the same bits"
        )


def compare_machines(resumed: Checkpoint, device: torch.device) -> None:
    """Say what of the machine is not as it was, for rounding depends on it."""
    known, now = resumed.content["segdeconv"].get("machine", {}), machine(device)
    differing = [f"{name} {known[name]} -> {value}" for name, value in now.items() if known.get(name, value) != value]
    if differing:
        print(f"watch: going on, but not to the same bits: {', '.join(differing)}")


class AnyName(frozenset[str]):
    """Contains every name: nothing that a checkpoint names is built when a run goes on, its config is composed anew."""

    def __contains__(self, name: object) -> bool:
        return True


def without_changeable_keys(node: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """A config without the keys that may differ; MLflow, for one, refuses to change a parameter when a run goes on."""
    return {
        name: without_changeable_keys(value, f"{where}{name}.") if isinstance(value, Mapping) else value
        for name, value in node.items()
        if f"{where}{name}" not in CHANGEABLE_KEYS
    }


def differing_keys(before: Any, now: Any, where: str = "") -> list[str]:
    """The keys in which two configs differ, those that change nothing left out."""
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
