"""Repetition of some optimizer steps of a finished run, to compare their losses and weights with the recorded ones."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer

from segdeconv.checkpoints import checkpoint as checkpoints
from segdeconv.checkpoints import transfer
from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.config import ABSENT, TARGET
from segdeconv.data.loading import explain_loader_errors
from segdeconv.data.module import build_pipeline, build_split
from segdeconv.errors import MismatchError, SegdeconvError, UsageError, first_line
from segdeconv.models import SegmentationModel, build_model
from segdeconv.models.build import PRETRAINED
from segdeconv.training.config_check import check_config
from segdeconv.training.data_module import DataModule
from segdeconv.training.lightning_internals import resume_at_epoch_start
from segdeconv.training.record import hash_weights
from segdeconv.training.resume import AnyName
from segdeconv.training.settings import TrainerSettings
from segdeconv.training.task import SegmentationTask
from segdeconv.training.trainer import fit, make_trainer

GROUPS = ("augment", "model", "loss", "optimizer", "schedule", "trainer", "seed", "init_from")


@dataclass
class Stretch:
    """Some consecutive steps of a run, as its checkpoints record them; see `StepRecord`.

    Attributes:
        start: The step that they follow.
        conditions: What their bits depend on.
        losses: The mean loss of each step.
        weights: The hash of the weights by distance from `start`.
    """

    start: int
    conditions: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    weights: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, recorded: Any) -> Stretch:
        """Return the stretch of an entry in a checkpoint.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: It has another form.
        """
        conditions = dict(recorded["conditions"])
        conditions |= {
            "precision": str(conditions["precision"]),
            "processes": int(conditions["processes"]),
            "total_steps": int(conditions["total_steps"]),
            "versions": {str(name): str(value) for name, value in conditions["versions"].items()},
        }
        return cls(
            int(recorded["start"]),
            conditions,
            [float(loss) for loss in recorded["losses"]],
            {int(distance): str(digest) for distance, digest in recorded["weights"].items()},
        )

    def difference(self, repeated: Stretch) -> str:
        """Return the first difference of a repetition, as a phrase; empty if all its bits are the same."""
        for distance in range(len(repeated.losses) + 1):
            if distance and repeated.losses[distance - 1] != self.losses[distance - 1]:
                return (
                    f"the loss of step {self.start + distance} is {repeated.losses[distance - 1]!r}, and "
                    f"{self.losses[distance - 1]!r} in the record"
                )
            if self.weights.get(distance, repeated.weights[distance]) != repeated.weights[distance]:
                when = f"after step {self.start + distance}" if distance else f"at step {self.start}"
                return f"the weights {when} have other bits than in the record"
        return ""

    def gap(self, repeated: Stretch) -> float:
        """Return the largest relative difference of a loss of a repetition."""
        pairs = zip(self.losses, repeated.losses, strict=False)
        return max((abs(first - second) / max(abs(first), 1e-12) for first, second in pairs), default=0.0)


class _Steps(Callback):
    """Collects the losses and hashes of weights of repeated steps."""

    def __init__(self, stretch: Stretch) -> None:
        self.stretch = stretch

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.stretch.start:
            resume_at_epoch_start(trainer)
        self.stretch.weights[0] = hash_weights(pl_module.state_dict())

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.step_loss.step_is_complete:
            pl_module.step_loss.sync_loss()
            self.stretch.losses.append(pl_module.step_loss.last)
            self.stretch.weights[trainer.global_step - self.stretch.start] = hash_weights(pl_module.state_dict())


@contextmanager
def threads_of(conditions: Mapping[str, str]) -> Iterator[None]:
    """Compute with the number of threads of a run, on which the order of sums depends.

    Args:
        conditions: The versions and the machine of the run.
    """
    before, recorded = torch.get_num_threads(), conditions.get("threads", "")
    try:
        if recorded.isdecimal() and 0 < int(recorded) <= 1024:
            torch.set_num_threads(int(recorded))
        yield
    finally:
        torch.set_num_threads(before)


def obstacle(recorded: Stretch) -> str:
    """Return why a stretch cannot be repeated to the bit in this process; empty if it can."""
    versions, processes = recorded.conditions["versions"], recorded.conditions["processes"]
    if processes != 1:
        return f"it was trained by {processes} processes, of which each has its own batches"
    device = str(versions.get("device", "")).partition(" ")[0]
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device, False):
        return f"it was trained on {versions.get('device')}, which this machine does not have"
    return ""


def absent_groups(config: Mapping[str, Any]) -> list[str]:
    """Return the groups of a config that were objects of a program."""
    return [name for name, node in config.items() if isinstance(node, Mapping) and node.get(TARGET) == ABSENT]


def other_start(config: Mapping[str, Any]) -> str:
    """Return the key of a config by which training began with weights that are not here; empty for those of the seed.

    They are never downloaded.
    """
    start, model = config.get("init_from"), config["model"]
    if start is not None and not Path(os.path.expanduser(str(start))).is_file():
        return f"init_from={start}"
    for name in ("pretrained", *PRETRAINED):
        if model.get(name) not in (None, False, "none"):
            return f"model.{name}={model[name]}"
    return ""


def repeat(source: Checkpoint, recorded: Stretch, steps: int, folder: Path, *, beginning: bool) -> Stretch:
    """Train some steps again and return their losses and the hashes of the weights after each.

    Callbacks, plugins and the profiler of the run are left out, and nothing is written.

    Args:
        source: The checkpoint to begin from, or any checkpoint of the run to begin from its seed.
        recorded: The record of the steps.
        steps: The number of steps, at most those that are recorded.
        folder: The run folder.
        beginning: Whether to begin from the seed.

    Raises:
        UsageError: The config names objects of a program, or the data or the start cannot be read.
        MismatchError: The checkpoint does not have the state of this training.
        SegdeconvError: The steps cannot be trained.
    """
    nodes = {name: source.config[name] for name in GROUPS if name in source.config}
    if absent := absent_groups({**nodes, "dataset": source.config["dataset"]}):
        raise UsageError(f"{absent[0]} was an object of a program, which no file describes")
    trainer = nodes.get("trainer", {})
    nodes["trainer"] = {name: value for name, value in trainer.items() if name in vars(TrainerSettings())}
    node = {**source.dataset_node(), "cache": "none", "num_workers": 0}
    config = check_config({**nodes, "dataset": node, "logger": {}})
    facts, classes = source.facts, source.classes
    train, val = (build_split(config["dataset"], split) for split in ("train", "val"))
    if train.classes.names != classes.names:
        raise UsageError(f"the data set has the classes {', '.join(train.classes.names)} - restore it")
    pipeline = build_pipeline(config["dataset"], config["augment"], train, val, seed=config["seed"])
    model = _first_model(config, source) if beginning else source.model()
    given = TrainerSettings(**config["trainer"])
    settings = replace(
        given,
        accelerator={"cuda": "gpu"}.get(_device(recorded), _device(recorded)),  # type: ignore[arg-type]
        devices=1,
        precision=recorded.conditions["precision"],
        max_steps=recorded.start + steps,
        max_epochs=recorded.start + steps + 1,  # no fewer than the epochs of these steps
        limit_val_batches=0,
        enable_progress_bar=False,
        profiler=None,
        plugins=None,
    )
    total_steps = int(recorded.conditions["total_steps"])
    task = SegmentationTask.built(
        model, config, source.config, facts, total_steps=total_steps, settings=settings, log_to_loggers=False
    )
    repeated = Stretch(recorded.start, recorded.conditions)
    resumed = None if beginning else source
    fitter = make_trainer(folder, [_Steps(repeated)], False, settings, resumed)
    data = DataModule(pipeline, same_batches=bool(settings.overfit_batches))
    try:
        with explain_loader_errors():
            fit(fitter, task, data, resumed=None if beginning else source.path)
    except (KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, SegdeconvError) or beginning:
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise MismatchError(f"{source.path.name} does not have the state of this training ({reason})") from error
    return repeated


def _device(recorded: Stretch) -> str:
    return str(recorded.conditions["versions"]["device"]).partition(" ")[0]


def _first_model(config: Mapping[str, Any], source: Checkpoint) -> SegmentationModel:
    """Build the network with the weights that training began with, as `prepare` does."""
    start = config["init_from"] and checkpoints.read(config["init_from"], trust=AnyName())
    torch.manual_seed(config["seed"])
    channels = len(source.facts["preprocessing"]["mean"])
    model = build_model(config["model"], len(source.classes), channels, fresh=bool(start))
    if start:
        transfer.transfer_weights(model, source.classes, start)
    return model
