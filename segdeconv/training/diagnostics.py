"""A watch over training that says in words what a curve would show too late."""

import time
from typing import Any

import numpy as np
from pytorch_lightning import Callback, Trainer
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from segdeconv.classes import Classes

FEW_IMAGES = 4  # fewer, and the statistics of batch norm say more about the batch than about the data
WAITING = 0.1  # share of an epoch's time that training may wait for images before advice is given
NOTICEABLE = 5.0  # seconds of waiting in an epoch below which nothing is said


class LoaderWait(Callback):
    """Measures how much of an epoch's training is spent waiting for images: for the loader, and until they are on the
    device and normalised.
    """

    def __init__(self) -> None:
        self.waited = self.trained = 0.0  # seconds
        self._mark: float | None = None

    @property
    def share(self) -> float:
        """Of the epoch's time so far."""
        return self.waited / max(1e-9, self.waited + self.trained)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._mark = None  # the first batch of a run waits for the workers to start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.waited = self.trained = 0.0
        if self._mark is not None:  # what is not the first: validation lay between
            self._mark = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.monotonic()
        if self._mark is not None:
            self.waited += now - self._mark
        self._mark = now

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.monotonic()
        if self._mark is not None:
            self.trained += now - self._mark
        self._mark = now


class TrainingDiagnostics(Callback):
    """Says when one class is all that is predicted, when batch norm sees too few images, when training waits for input.

    A loss that is not finite ends the run: see `StepLoss.sync_loss`.
    """

    def __init__(self, waiting: LoaderWait) -> None:
        self.waiting = waiting
        self._collapsed: str | None = None
        self._epochs = 0
        self._said_waiting = False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        statistics = any(isinstance(module, _BatchNorm) and module.training for module in pl_module.model.modules())
        images = trainer.datamodule.pipeline.batch_size * (trainer.world_size if pl_module.norm == "sync" else 1)  # type: ignore[attr-defined]
        if statistics and images < FEW_IMAGES:
            synced = trainer.world_size > 1 and trainer.strategy.root_device.type != "cpu"
            _say(
                trainer,
                f"batch norm takes its statistics from {images} image{'s' if images > 1 else ''} at a time, which makes"
                " them noisy and validation worse than training; raise dataset.batch_size "
                "(trainer.accumulate_grad_batches does not help here), or set trainer.norm=frozen with trained weights"
                + (" or trainer.norm=sync" * synced),
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._epochs += 1
        if self.waiting.share > WAITING and self.waiting.waited > NOTICEABLE and not self._said_waiting:
            kept = trainer.datamodule.pipeline.room.kind != "none"  # type: ignore[attr-defined]
            if not kept or self._epochs > 1:  # or the next epoch has its images decoded
                self._said_waiting = True
                workers = pl_module.trainer.train_dataloader.num_workers
                _say(
                    trainer,
                    f"input is the bottleneck: {100 * self.waiting.share:.0f} % of the epoch was spent waiting for "
                    f"images; raise dataset.num_workers (now {workers}) where there are cores, "
                    + ("give dataset.cache_size=GiB if not all images fit, " if kept else "set dataset.cache=memory, ")
                    + "leave out slow augmentations, or store images at the size that is trained on",
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
                    "does not hear (loss.class_weighting=median_frequency) and masks that are not what they should be "
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
