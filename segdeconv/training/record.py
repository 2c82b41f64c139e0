"""What a run records so that it can be verified: losses and weights after some checkpoints, and hashes of its files."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from torch import Tensor

from segdeconv.system.files import hash_file, hash_text, replace_text
from segdeconv.training.checkpointing import KEPT, Checkpoints, steps_per_epoch
from segdeconv.training.resume import CHANGEABLE_KEYS, LENGTH_KEYS, without_keys

SUMS = "SHA256SUMS"
FILES = (
    "config.yaml", "data.csv", "metrics.csv", "report.html", "report.json",
    "best.ckpt", "last.ckpt", "previous.ckpt", KEPT.format("*"),
)  # fmt: skip
STATE = "StepRecord"  # the key of the state in checkpoints: the name of the class
LENGTH = 100  # steps that are recorded after a checkpoint
DISTANCES = (0, 1, 2, 5, 10, 20, 50, 100)  # steps after a checkpoint at which the weights are hashed


class StepRecord(Callback):
    """Records what follows each spaced checkpoint of a run: the losses of up to `LENGTH` steps, and hashes of weights.

    The record is a part of the checkpoints, so a run that is killed and resumed has that of one that was not. It begins
    at the start of training and at every checkpoint of `Checkpoints.spaced`, and ends with the epoch: a repetition then
    needs no validation. It also ends where the run resumes under other conditions.

    Args:
        checkpoints: Decides which checkpoints are kept.

    Attributes:
        conditions: What the bits of a step depend on, see `conditions`; the number of processes and of all steps are
            added.
        stretches: For each beginning: `start` (its step), `conditions`, `open` (whether it may go on), `losses` (of
            the steps after it) and `weights` (hash by distance from it).
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.conditions: dict[str, Any] = {}
        self.stretches: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.conditions |= {"processes": trainer.world_size, "total_steps": pl_module.total_steps}
        for stretch in self.stretches:
            stretch["open"] = stretch["open"] and stretch["conditions"] == self.conditions
        self._drop_unneeded(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if batch_idx or step % steps_per_epoch(trainer):
            return
        known = {stretch["start"] for stretch in self.stretches}
        if step in {0, *self.checkpoints.spaced(trainer)} - known:
            weights = {"0": hash_weights(pl_module.state_dict())}
            self.stretches.append(
                {"start": step, "conditions": dict(self.conditions), "open": True, "losses": [], "weights": weights}
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.stretches or not pl_module.step_loss.step_is_complete:
            return
        stretch = self.stretches[-1]
        distance = trainer.global_step - stretch["start"]
        if not stretch["open"] or distance > min(LENGTH, steps_per_epoch(trainer)):
            return
        pl_module.step_loss.sync_loss()
        stretch["losses"].append(pl_module.step_loss.last)
        if distance in DISTANCES:
            stretch["weights"][str(distance)] = hash_weights(pl_module.state_dict())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._drop_unneeded(trainer)

    def _drop_unneeded(self, trainer: Trainer) -> None:
        """Drop the stretches after checkpoints that are no longer kept."""
        starts = (0, *self.checkpoints.spaced(trainer))
        self.stretches = [stretch for stretch in self.stretches if stretch["start"] in starts]

    def state_dict(self) -> dict[str, Any]:
        return {"stretches": self.stretches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stretches = state_dict["stretches"]


def conditions(
    config: Mapping[str, Any], data: Mapping[str, str], precision: str, versions: Mapping[str, str]
) -> dict[str, Any]:
    """Return what the bits of a step depend on, as plain data.

    Args:
        config: The config as it is saved in checkpoints.
        data: The hash of the images and masks of each split.
        precision: The precision of training.
        versions: The versions of libraries and the machine.
    """
    return {"config": hash_config(config), "data": dict(data), "precision": precision, "versions": dict(versions)}


def hash_config(config: Mapping[str, Any]) -> str:
    """Return the sha256 of a config without its length and the keys that do not affect the result."""
    return hash_text(json.dumps(without_keys(config, (*CHANGEABLE_KEYS, *LENGTH_KEYS)), sort_keys=True))


def hash_weights(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the names, types, shapes and bits of the tensors of a state dict, in hex."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_sums(run: Path, texts: Mapping[str, str]) -> str:
    """Write the hashes of the files of a finished run, in the format of `sha256sum`.

    Args:
        run: The run folder.
        texts: The content of files that will be written afterwards, by name.

    Returns:
        The sha256 of the list.
    """
    paths = {path.name: path for pattern in FILES for path in run.glob(pattern)}
    sums = {name: hash_file(path) for name, path in paths.items() if name not in texts}
    sums |= {name: hash_text(text) for name, text in texts.items()}
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    replace_text(run / SUMS, text)
    return hash_text(text)
