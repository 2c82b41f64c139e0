"""A watch over training that says in words what a curve would show too late."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from pytorch_lightning import Callback, Trainer
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from segdeconv.classes import Classes

FEW_IMAGES = 4  # fewer, and the statistics of batch norm say more about the batch than about the data
WAITING = 0.3  # share of an epoch's time that training may wait for images before it is said
NOTICEABLE = 5.0  # seconds of waiting in an epoch below which nothing is said


class Watch(Callback):
    """Says when one class is all that is predicted, when batch norm sees too few images, when training waits for input.

    A loss that is not finite ends the run: see `SegmentationTask.on_before_optimizer_step`.
    """

    def __init__(self) -> None:
        self._collapsed: str | None = None
        self._waited = self._trained = 0.0
        self._mark: float | None = None
        self._said_waiting = False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        statistics = any(isinstance(module, _BatchNorm) and module.training for module in pl_module.model.modules())
        images = trainer.datamodule.batch_size * (trainer.world_size if pl_module.norm == "sync" else 1)  # type: ignore[attr-defined]
        if statistics and images < FEW_IMAGES:
            synced = trainer.world_size > 1 and trainer.strategy.root_device.type != "cpu"
            _say(
                trainer,
                f"batch norm takes its statistics from {images} image{'s' if images > 1 else ''} at a time, which makes"
                " them noisy and validation worse than training; raise dataset.batch_size (trainer.accumulate does not "
                "help here), or set trainer.norm=frozen with trained weights" + (" or trainer.norm=sync" * synced),
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._waited = self._trained = 0.0
        self._mark = None  # the first batch of an epoch waits for the workers to start

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.monotonic()
        if self._mark is not None:
            self._waited += now - self._mark
        self._mark = now

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.monotonic()
        if self._mark is not None:
            self._trained += now - self._mark
        self._mark = now

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        share = self._waited / max(1e-9, self._waited + self._trained)
        if share > WAITING and self._waited > NOTICEABLE and not self._said_waiting:
            self._said_waiting = True
            workers = pl_module.trainer.train_dataloader.num_workers
            _say(
                trainer,
                f"input is the bottleneck: {100 * share:.0f} % of the epoch was spent waiting for images; raise "
                f"dataset.num_workers (now {workers}), leave out slow augmentations, or store images at the size that "
                "is trained on",
            )
        val = pl_module.results("val")  # every process has to ask
        if val is not None:
            now = collapse(val.confusion, pl_module.classes)
            if now != self._collapsed and now is not None:
                lr = pl_module.optimizer.param_groups[0]["lr"]
                _say(
                    trainer,
                    f"the network predicts '{now}' for every pixel: mIoU {val.scores.miou:.4f} equals all-{now}; "
                    f"if that stays, the usual causes are the learning rate (now {lr:.2g}), rare classes that the loss "
                    "does not hear (loss.balancing=median_frequency) and masks that are not what they should be "
                    "(inspect_data shows them)",
                )
            self._collapsed = now


def collapse(confusion: np.ndarray, classes: Classes) -> str | None:
    """The name of the class that is predicted for every pixel, if there is one and the truth has others.

    confusion: (C, C) counts, rows = truth.
    """
    predicted, present = np.flatnonzero(confusion.sum(axis=0)), np.flatnonzero(confusion.sum(axis=1))
    return classes.names[predicted[0]] if len(predicted) == 1 and len(present) > 1 else None


def _say(trainer: Trainer, sentence: str) -> None:
    if trainer.is_global_zero:
        tqdm.write(f"watch: {sentence}")
