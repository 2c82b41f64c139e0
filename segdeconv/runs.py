"""Runs: what a recipe may say, the folder a run lives in, and finding the one to go on with."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import Field
from pytorch_lightning import Trainer

from segdeconv import checkpoint
from segdeconv.classes import Classes
from segdeconv.config import TARGET, check, locate
from segdeconv.data.module import DataModule, check_augment, check_dataset
from segdeconv.durable import replace_text
from segdeconv.errors import CheckpointError, UsageError, did_you_mean
from segdeconv.loggers import check_logger
from segdeconv.losses import check_loss
from segdeconv.machine import machine
from segdeconv.memory import available, estimate, readable
from segdeconv.models import check_model
from segdeconv.processes import rank_from_outside
from segdeconv.run_folder import claim
from segdeconv.task import SegmentationTask
from segdeconv.training import Checkpoints, make_trainer

# Keys of a recipe that may differ when a run goes on: they do not change what is learnt.
HARMLESS = (
    "resume", "resume_force", "max_time", "logger", "dataset.num_workers", "dataset.timeout", "dataset.root",
    "trainer.recompute", "dataset.cache", "dataset.cache_size", "dataset.checksums",
)  # fmt: skip

# Who shares the keys of `trainer`, and what each of them gets from the program.
TRAINER = (make_trainer, SegmentationTask, Checkpoints)
SUPPLIED = (
    "run", "resumed", "callbacks", "logger", "model", "loss", "optimizer", "schedule", "classes", "seed", "total_steps",
    "remembered",
)  # fmt: skip

# The groups, and what each is where a recipe leaves it out: the defaults of configs/train.yaml, for use from Python.
DEFAULTS: dict[str, dict[str, Any]] = {
    "dataset": {TARGET: "segdeconv.data.Shapes", "batch_size": 16, "size": [64, 64]},
    "augment": {"flip": {TARGET: "albumentations.HorizontalFlip", "p": 0.5}},
    "model": {TARGET: "segdeconv.models.SegNet"},
    "loss": {TARGET: "segdeconv.losses.CrossEntropy"},
    "optimizer": {TARGET: "segdeconv.optimization.adamw"},
    "schedule": {TARGET: "segdeconv.optimization.Poly"},
    "trainer": {},
    "logger": {TARGET: "segdeconv.loggers.TensorBoard"},
}


def check_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Hold a recipe against the constructors it names; returns it with their defaults, and those above, written in."""
    recipe = {**DEFAULTS, **recipe}
    known = {*DEFAULTS, "seed", "resume", "resume_force", "init_from", "max_time"}
    for name in recipe:
        if name not in known:
            raise UsageError(f"there is no key {name} - {did_you_mean(str(name), known | {'experiment'})}")
    for group in DEFAULTS:
        if not isinstance(recipe[group], Mapping):
            raise UsageError(f"{group}={recipe[group]} - give the name of a file in configs/{group}")
    checked = {
        "dataset": check_dataset(recipe["dataset"]),
        "augment": check_augment(recipe["augment"]),
        "model": check_model(recipe["model"]),
        "loss": check_loss(recipe["loss"]),
        "optimizer": check(
            recipe["optimizer"], "optimizer", [locate(recipe["optimizer"], "optimizer")], supplied=["model"]
        ),
        "schedule": check(recipe["schedule"], "schedule", [locate(recipe["schedule"], "schedule")]),
        "trainer": check(recipe["trainer"], "trainer", TRAINER, supplied=SUPPLIED),
        "logger": check_logger(recipe["logger"]),
    }
    others = check({name: recipe[name] for name in known - set(DEFAULTS) if name in recipe}, "", [_scalars])
    if others["max_time"] is not None:
        seconds(others["max_time"])
    return checked | others


def _scalars(
    *,
    seed: Annotated[int, Field(ge=0)] = 0,
    resume: str | None = None,
    resume_force: bool = False,
    init_from: str | None = None,
    max_time: str | int | None = None,
) -> None:
    """The schema of a recipe's keys that are in no group."""


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(max_time: str | int) -> float:
    """What `max_time=` means.

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
    raise UsageError(f"max_time={max_time} is no time - write hours:minutes:seconds, or a number with s, m, h or d")


# Going on: which run, and whether it is the same.


def find_run(resume: str, recipe: Mapping[str, Any], named: Path | None, runs: Path) -> Path | None:
    """The folder of the run that `resume=` means, or None where there is nothing to go on with.

    resume: `auto` takes `named` (the folder that hydra.run.dir gives) or else the newest unfinished run in `runs` of
        the same recipe; otherwise the path of a run's folder or of a checkpoint in it.
    """
    if resume != "auto":
        path = Path(resume)
        folder = path if path.is_dir() else path.parent
        if not path.exists() or not (folder / "config.yaml").is_file():
            raise UsageError(f"resume={resume} is no run - give resume=auto or a folder that train.py wrote")
        return folder
    if named is not None:
        return named
    for folder in sorted(runs.glob("*/"), reverse=True):
        config = folder / "config.yaml"
        begun = config.is_file() and any(folder.glob("*.ckpt"))
        if begun and not finished(folder) and _is_of(folder, recipe):
            return folder
    return None


def finished(run: Path) -> bool:
    """Whether a run has come to its end, and not to that of its time."""
    try:
        report = json.loads((run / "report.json").read_text())
    except (FileNotFoundError, ValueError):  # ValueError: it is damaged, and written anew at the end
        return False
    return isinstance(report, dict) and bool(report.get("complete", True))


def _is_of(run: Path, recipe: Mapping[str, Any]) -> bool:
    try:
        return not differing_keys(_recipe_of(run), recipe)
    except UsageError:  # a folder that nobody named: it is passed over
        return False


def _recipe_of(run: Path) -> Any:
    """What a run was started with: plain data, of which nothing is built."""
    path = run / "config.yaml"
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        said = str(getattr(error, "problem", None) or type(error).__name__)
        raise UsageError(f"{path} is not the recipe of a run ({said}) - choose another hydra.run.dir") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"{path} is not the recipe of a run - choose another hydra.run.dir")
    return recipe


def open_run(run: Path, recipe: Mapping[str, Any]) -> Path | None:
    """Make the folder of a run ready; the checkpoint to go on from, or None to start.

    Raises UsageError if the folder holds a run and nothing was said about going on, if its recipe was another, or if
    another process is at it.
    """
    claim(run)
    config = run / "config.yaml"
    begun = config.is_file() and any(run.glob("*.ckpt"))  # or it failed before it had learnt anything
    if begun and recipe["resume"] is None:
        raise UsageError(f"{run} already holds a run - go on with resume=auto or choose another hydra.run.dir")
    resumed = None
    if begun:
        differing = differing_keys(_recipe_of(run), recipe)
        if differing and not recipe["resume_force"]:
            raise UsageError(
                f"{run} was started with other values of {', '.join(differing)} - give those, or resume_force=true"
            )
        resumed = usable_checkpoint(run)
    if rank_from_outside() == 0:  # every process that torchrun starts comes by here
        replace_text(config, yaml.safe_dump(dict(recipe), sort_keys=False))
    return resumed


def header(
    recipe: Mapping[str, Any],
    data: DataModule,
    task: SegmentationTask,
    trainer: Trainer,
    run: Path,
    resumed: Path | None,
) -> str:
    """What is about to be trained, on what, and where it goes."""
    size, crop = data.preprocessing.size, recipe["dataset"]["crop"]
    seen = "x".join(map(str, size)) if size else "its own size"
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    frozen = sum(parameter.numel() for parameter in task.model.parameters() if not parameter.requires_grad)
    seen_at = crop or size
    memory = seen_at and estimate(
        task.model, task.loss, task.optimizer, seen_at, precision=str(trainer.precision), averaged=task.ema is not None
    )
    free = available(trainer.strategy.root_device)
    rows = {
        "data": f"{data.train.kind}: {len(data.train)} train, {len(data.val)} val images seen at {seen}"
        + (f", crops of {crop[0]}x{crop[1]}" if crop else ""),
        "classes": f"{len(task.classes)}: {', '.join(task.classes.names)}",
        "network": f"{type(task.model).__name__}, {parameters:,} parameters"
        + (f", {frozen:,} of them frozen" if frozen else ""),
        "optimizer": f"{recipe['optimizer'][TARGET].rpartition('.')[2]}, learning rate {recipe['optimizer']['lr']:g}, "
        f"{recipe['schedule'][TARGET].rpartition('.')[2].lower()}",
        "training": f"{trainer.max_epochs} epochs, {task.total_steps} steps of {_batch(data, trainer)} on "
        f"{trainer.strategy.root_device}, precision {trainer.precision}, channels last"
        + (", compiled" if task.compiles(trainer.strategy.root_device) else ", not compiled")
        + (", stages computed again in the backward pass" if task.recompute else ""),
        "memory": f"about {readable(memory.total(data.batch_size))} a process: {readable(memory.weights)} for weights, "
        f"gradients and optimizer, {readable(memory.image)} for each image"
        + (f"; {readable(free)} are free" if free else "")
        if memory
        else "",
        "loading": _loading(data),
        "run": f"{run}" + (f", going on from {resumed.name}" if resumed else ""),
    }
    return "\n".join(f"{name + ':':<11}{text}" for name, text in rows.items() if text)


def _loading(data: DataModule) -> str:
    """Who makes the batches, and where decoded images stay."""
    workers, ahead = data.loaders["num_workers"], data.loaders["prefetch_factor"]
    made = f"{workers} worker{'s' if workers > 1 else ''}, {ahead} batches ahead each" if workers else "no workers"
    room = data.room
    if room.kind == "none":
        return f"{made}; images are decoded every time"
    where = f"on disk in {room.folder}" if room.folder else "in memory"
    if room.needed <= room.capacity:
        return f"{made}; decoded images are kept {where}, about {readable(room.needed)}"
    return (
        f"{made}; decoded images are kept {where}, {readable(room.capacity)} of about {readable(room.needed)}: the "
        "others are decoded every time; dataset.cache_size=GiB"
        + (" or dataset.cache=disk" * (room.folder is None))
        + " keeps more"
    )


def _batch(data: DataModule, trainer: Trainer) -> str:
    """How many images make a step; whoever uses more of them chooses the learning rate for them."""
    factors = {
        "processes": trainer.world_size,
        "batches": trainer.accumulate_grad_batches,
    }
    several = [f"{count} {name}" for name, count in factors.items() if count > 1]
    one = f"{data.batch_size} images"
    if not several:
        return one
    total = data.batch_size * math.prod(factors.values())
    return f"{total} images ({' x '.join([*several, one])}; the learning rate is not scaled by them)"


def usable_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run to go on from; a damaged newest one is named and passed over.

    None where there is none yet. Raises CheckpointError where there are some and none can be used.
    """
    refused = None
    for path in (run / "last.ckpt", run / "previous.ckpt"):
        if not path.is_file():
            continue
        try:
            checkpoint.require_to_go_on(checkpoint.read(path, trust=AnyName()))
        except CheckpointError as error:
            print(f"passed over: {error}")
            refused = refused or error
            continue
        return path
    if refused is not None:
        raise refused
    return None


def compare(resumed: Path, classes: Classes, fingerprints: Mapping[str, str]) -> None:
    """Say what no key of the recipe does: that the files of a split are not what they were.

    Raises UsageError if the data has other classes than it had.
    """
    read = checkpoint.read(resumed, trust=AnyName())
    before = read.classes
    if before.names != classes.names:
        raise UsageError(
            f"{resumed} was trained for {len(before)} classes ({', '.join(before.names)}) and the data now has "
            f"{len(classes)} ({', '.join(classes.names)}) - restore the data, or start another run with "
            f"init_from={resumed}, which keeps what it knows and begins the other classes anew"
        )
    known = read.facts.get("fingerprints", {})  # earlier versions wrote none
    for split in [name for name, value in fingerprints.items() if known.get(name, value) != value]:
        print(
            f"watch: the files of the {split} split are not those, or not where, they were when {resumed} was written; "
            "the run goes on with what is there now, and not to the same bits"
        )


def compare_machines(resumed: Path, device: torch.device) -> None:
    """Say what of the machine is not as it was, for rounding depends on it."""
    known, now = checkpoint.read(resumed, trust=AnyName()).content["segdeconv"].get("machine", {}), machine(device)
    differing = [f"{name} {known[name]} -> {value}" for name, value in now.items() if known.get(name, value) != value]
    if differing:
        print(f"watch: going on, but not to the same bits: {', '.join(differing)}")


class AnyName(frozenset[str]):
    """Contains every name: nothing that a checkpoint names is built when a run goes on, its recipe is composed anew."""

    def __contains__(self, name: object) -> bool:
        return True


def differing_keys(before: Any, now: Any, where: str = "") -> list[str]:
    """The keys in which two recipes differ, those that change nothing left out."""
    if where in HARMLESS:
        return []
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = sorted({*before, *now})
        return [
            key
            for name in keys
            for key in differing_keys(before.get(name), now.get(name), f"{where}.{name}" if where else str(name))
        ]
    return [] if before == now else [where]
