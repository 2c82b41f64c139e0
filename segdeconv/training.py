"""How a run runs: Lightning's Trainer, its checkpoints, and going on exactly where it stopped."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from lightning_fabric.plugins import CheckpointIO
from pydantic import Field
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import Logger

from segdeconv import checkpoint
from segdeconv.balancing import class_weights
from segdeconv.config import TARGET, check, locate
from segdeconv.data.module import DataModule, check_augment, check_dataset
from segdeconv.errors import CheckpointError, UsageError, did_you_mean
from segdeconv.inference import fast_precision
from segdeconv.task import SegmentationTask

Count = Annotated[int, Field(ge=1)]

# Keys of a recipe that may differ when a run goes on: they do not change what is learnt.
HARMLESS = ("resume", "resume_force", "dataset.num_workers", "dataset.timeout", "dataset.root")


def make_trainer(
    run: Path,
    callbacks: list[Callback],
    logger: Logger,
    *,
    max_epochs: Count = 20,
    max_steps: Annotated[int, Field(ge=-1)] = -1,
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto",
    devices: int | str = "auto",
    num_nodes: Count = 1,
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto",
    gradient_clip: Annotated[float, Field(gt=0)] | None = None,
    validate_every: Count = 1,
    deterministic: bool = False,
) -> Trainer:
    """Lightning's Trainer with what this project needs and nothing that talks.

    max_epochs, max_steps: training ends at whichever comes first; -1 is no limit of steps.
    precision: auto is bf16-mixed where the machine is fast at it, else 32-true.
    gradient_clip: largest norm of the gradient, None for no clipping.
    validate_every: epochs between validations. deterministic: refuse operations that may differ from run to run.
    """
    quieten()
    if accelerator == "auto" and not torch.cuda.is_available():
        accelerator = "mps" if torch.backends.mps.is_available() else "cpu"
    if accelerator == "cpu" and devices == "auto":
        devices = 1
    return Trainer(
        default_root_dir=run,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        precision=fast_precision() if precision == "auto" else precision,  # type: ignore[arg-type]
        max_epochs=max_epochs,
        max_steps=max_steps,
        gradient_clip_val=gradient_clip,
        check_val_every_n_epoch=validate_every,
        deterministic=deterministic,
        callbacks=callbacks,
        logger=logger,
        plugins=[VerifiedCheckpoints()],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # our sampler slices by rank itself
        enable_checkpointing=any(isinstance(callback, Checkpoints) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def quieten() -> None:
    """Lightning's own lines and tips: our header and progress say what matters."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*resuming from a checkpoint that ended before the epoch.*",  # ours resumes: its sampler asks global_step
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*smaller than the logging interval.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # pytorch#160843; Lightning 2.6.6 still asks that way
    ):
        warnings.filterwarnings("ignore", message)


class VerifiedCheckpoints(CheckpointIO):
    """Lightning's door to our checkpoint files: see checkpoint.py."""

    def save_checkpoint(self, checkpoint_: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        checkpoint.write(checkpoint_, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        return checkpoint.load_plain(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(Callback):
    """Keeps last.ckpt, the one before it, and best.ckpt (highest validation mIoU) in the run's folder.

    Written after an epoch's validation, never between the last batch and it, so that the scores and the best
    checkpoint of a run that was cut are those of a run that was not.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.best = -1.0

    @property
    def last_path(self) -> Path:
        """Where training goes on from."""
        return self.run / "last.ckpt"

    @property
    def best_path(self) -> Path:
        """What to use afterwards."""
        return self.run / "best.ckpt"

    def keep(self, trainer: Trainer, miou: float | None) -> None:
        """Write last.ckpt, and best.ckpt if this validation's mIoU is the highest; NaN never is."""
        better = miou is not None and miou > self.best
        if better and miou is not None:
            self.best = miou
            trainer.save_checkpoint(self.best_path)
        if self.last_path.is_file():
            _keep_previous(self.last_path)
        trainer.save_checkpoint(self.last_path)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, content: dict[str, Any]) -> None:
        batches = trainer.num_training_batches
        content["epoch"], content["loops"] = canonical_loops(
            content["loops"], trainer.global_step, int(batches), trainer.accumulate_grad_batches
        )

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        # Lightning takes a restart as being in the middle of an epoch; at an epoch's start nothing is to be finished.
        batches = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if trainer.global_step % batches == 0:
            trainer.fit_loop.epoch_loop.restarting = False


def _keep_previous(path: Path) -> None:
    previous = path.with_name(f"previous{path.suffix}")
    for source, target in (
        (path, previous),
        (path.with_name(path.name + ".sha256"), previous.with_name(previous.name + ".sha256")),
    ):
        if source.is_file():
            partial = target.with_name(f".tmp-{os.getpid()}-{target.name}")
            partial.unlink(missing_ok=True)
            os.link(source, partial)
            partial.replace(target)


def canonical_loops(
    loops: Mapping[str, Any], global_step: int, batches_per_epoch: int, accumulate: int
) -> tuple[int, dict[str, Any]]:
    """(epoch, loop counters) of Lightning as they are at a step, whatever hook the checkpoint was taken in.

    Lightning's own counters depend on where in its hooks they are read, and a run resumed from them can skip or repeat
    an epoch (7 of 100 random kills, with 2.6.6); these are a function of global_step alone.
    """
    epoch, steps = divmod(global_step, math.ceil(batches_per_epoch / accumulate))
    batch = steps * accumulate
    begun = epoch + (batch > 0)
    total = epoch * batches_per_epoch + batch
    fit = dict(loops["fit_loop"])
    epochs = {"ready": begun, "started": begun, "processed": epoch, "completed": epoch}
    fit["epoch_progress"] = {"total": dict(epochs), "current": dict(epochs)}
    fit["epoch_loop.state_dict"] = {"_batches_that_stepped": global_step}
    fit["epoch_loop.batch_progress"] = {
        "total": _four(total),
        "current": _four(batch),
        "is_last_batch": False,
    }
    fit["epoch_loop.scheduler_progress"] = {"total": _two(0), "current": _two(0)}
    fit["epoch_loop.automatic_optimization.optim_progress"] = {
        "optimizer": {
            "step": {"total": _two(global_step), "current": _two(steps)},
            "zero_grad": {
                "total": {**_two(global_step), "started": global_step},
                "current": {**_two(steps), "started": steps},
            },
        }
    }
    fit["epoch_loop.val_loop.batch_progress"] = {"total": _four(0), "current": _four(0), "is_last_batch": False}
    return epoch, {**loops, "fit_loop": fit}


def _two(count: int) -> dict[str, int]:
    return {"ready": count, "completed": count}


def _four(count: int) -> dict[str, int]:
    return {"ready": count, "started": count, "processed": count, "completed": count}


# What a recipe may say.

GROUPS = ("dataset", "augment", "model", "loss", "optimizer", "schedule", "trainer")


def check_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Hold a composed recipe against the constructors it names; returns it with their defaults written in."""
    known = {*GROUPS, "seed", "resume", "resume_force"}
    for name in recipe:
        if name not in known:
            raise UsageError(f"there is no key {name} - {did_you_mean(str(name), known | {'experiment'})}")
    for group in GROUPS:
        if not isinstance(recipe.get(group), Mapping):
            raise UsageError(f"{group}={recipe.get(group)} - give the name of a file in configs/{group}")
    loss = [locate(recipe["loss"], "loss"), class_weights]
    checked = {
        "dataset": check_dataset(recipe["dataset"]),
        "augment": check_augment(recipe["augment"]),
        "model": check(recipe["model"], "model", [locate(recipe["model"], "model")], supplied=["num_classes"]),
        "loss": check(
            recipe["loss"], "loss", loss, supplied=["class_weights", "ignore_index", "pixels", "image_pixels"]
        ),
        "optimizer": check(
            recipe["optimizer"], "optimizer", [locate(recipe["optimizer"], "optimizer")], supplied=["model"]
        ),
        "schedule": check(recipe["schedule"], "schedule", [locate(recipe["schedule"], "schedule")]),
        "trainer": check(recipe["trainer"], "trainer", [make_trainer], supplied=["run", "callbacks", "logger"]),
    }
    return checked | check({name: recipe[name] for name in known - set(GROUPS) if name in recipe}, "", [_scalars])


def _scalars(*, seed: Annotated[int, Field(ge=0)] = 0, resume: str | None = None, resume_force: bool = False) -> None:
    """The schema of a recipe's keys that are in no group."""


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
        unfinished = config.is_file() and any(folder.glob("*.ckpt")) and not (folder / "report.json").is_file()
        if unfinished and not differing_keys(yaml.safe_load(config.read_text()), recipe):
            return folder
    return None


def open_run(run: Path, recipe: Mapping[str, Any]) -> Path | None:
    """Make the folder of a run ready; the checkpoint to go on from, or None to start.

    Raises UsageError if the folder holds a run and nothing was said about going on, or if its recipe was another.
    """
    config = run / "config.yaml"
    if config.is_file() and recipe["resume"] is None:
        raise UsageError(f"{run} already holds a run - go on with resume=auto or choose another hydra.run.dir")
    resumed = None
    if config.is_file():
        differing = differing_keys(yaml.safe_load(config.read_text()), recipe)
        if differing and not recipe["resume_force"]:
            raise UsageError(
                f"{run} was started with other values of {', '.join(differing)} - give those, or resume_force=true"
            )
        resumed = usable_checkpoint(run)
    run.mkdir(parents=True, exist_ok=True)
    partial = run / ".tmp-config.yaml"
    partial.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
    partial.replace(config)
    return resumed


def count_steps(data: DataModule, trainer: Trainer) -> int:
    """Optimizer steps of the whole run."""
    data.trainer = trainer
    assert trainer.max_epochs is not None
    steps = math.ceil(data.batches_per_epoch / trainer.accumulate_grad_batches) * trainer.max_epochs
    return min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps


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
    rows = {
        "data": f"{type(data.train).__name__}: {len(data.train)} train, {len(data.val)} val images seen at {seen}"
        + (f", crops of {crop[0]}x{crop[1]}" if crop else ""),
        "classes": f"{len(task.classes)}: {', '.join(task.classes.names)}",
        "network": f"{type(task.model).__name__}, {parameters:,} parameters",
        "optimizer": f"{recipe['optimizer'][TARGET].rpartition('.')[2]}, learning rate {recipe['optimizer']['lr']:g}, "
        f"{recipe['schedule'][TARGET].rpartition('.')[2].lower()}",
        "training": f"{trainer.max_epochs} epochs, {task.total_steps} steps of {data.batch_size} x "
        f"{trainer.world_size} images on {trainer.strategy.root_device}, precision {trainer.precision}",
        "run": f"{run}" + (f", going on from {resumed.name}" if resumed else ""),
    }
    return "\n".join(f"{name + ':':<11}{text}" for name, text in rows.items())


def usable_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run to go on from; a damaged newest one is named and passed over."""
    for path in (run / "last.ckpt", run / "previous.ckpt"):
        if not path.is_file():
            continue
        try:
            checkpoint.read(path, trust=AnyName())
        except CheckpointError as error:
            print(f"passed over: {error}")
            continue
        return path
    return None


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
