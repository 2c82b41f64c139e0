"""Warnings during training: one predicted class, small batches for batch norm, slow input."""

import time
from typing import Any

import numpy as np
from pytorch_lightning import Callback, Trainer
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from segdeconv.classes import Classes

MIN_IMAGES = 4  # with fewer, batch norm's statistics are too noisy
MAX_WAIT = 0.1  # fraction of an epoch's time spent waiting for images, above which a warning is given
MIN_SECONDS = 5.0  # of waiting in an epoch, below which there is no warning


class LoaderWait(Callback):
    """Measures the time of an epoch that training waits for images: loading, transfer and normalisation."""

    def __init__(self) -> None:
        self.waited = self.trained = 0.0  # seconds
        self._mark: float | None = None

    @property
    def fraction(self) -> float:
        """Fraction of the epoch's time so far that was spent waiting, 0..1."""
        return self.waited / max(1e-9, self.waited + self.trained)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._mark = None  # the first batch of a run also waits for the workers to start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.waited = self.trained = 0.0
        if self._mark is not None:  # validation took place since the last batch
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
    """Warns if one class is predicted everywhere, batch norm sees too few images, or training waits for input.

    A loss that is not finite ends the run, see `StepLoss.sync_loss`.

    Args:
        wait: Measures the time spent waiting for images.
    """

    def __init__(self, wait: LoaderWait) -> None:
        self.wait = wait
        self._collapsed: str | None = None
        self._epochs = 0
        self._warned_of_waiting = False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        statistics = any(isinstance(module, _BatchNorm) and module.training for module in pl_module.model.modules())
        images = trainer.datamodule.pipeline.batch_size * (trainer.world_size if pl_module.norm == "sync" else 1)  # type: ignore[attr-defined]
        if statistics and images < MIN_IMAGES:
            synced = trainer.world_size > 1 and trainer.strategy.root_device.type != "cpu"
            _warn(
                trainer,
                f"batch norm computes its statistics from {images} image{'s' if images > 1 else ''} at a time, which "
                "makes them noisy and validation scores worse than training scores; raise dataset.batch_size "
                "(trainer.accumulate_grad_batches does not help here), or set trainer.norm=frozen with trained weights"
                + (" or trainer.norm=sync" * synced),
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._epochs += 1
        if self.wait.fraction > MAX_WAIT and self.wait.waited > MIN_SECONDS and not self._warned_of_waiting:
            cached = trainer.datamodule.pipeline.cache_plan.kind != "none"  # type: ignore[attr-defined]
            if not cached or self._epochs > 1:  # in the next epoch cached images are decoded already
                self._warned_of_waiting = True
                workers = pl_module.trainer.train_dataloader.num_workers
                _warn(
                    trainer,
                    f"input is the bottleneck: {100 * self.wait.fraction:.0f} % of the epoch was spent waiting for "
                    f"images; raise dataset.num_workers (now {workers}) where there are cores, "
                    + ("set dataset.cache_size=GiB if not all images fit, " if cached else "set dataset.cache=memory, ")
                    + "remove slow augmentations, or store images at the size used for training",
                )
        val = pl_module.results("val")  # summed over all processes, so every process has to request it
        if val is not None:
            collapsed = collapse(val.confusion, pl_module.classes)
            if collapsed != self._collapsed and collapsed is not None:
                _warn(
                    trainer,
                    f"the network predicts '{collapsed}' for every pixel, with a mIoU of {val.scores.miou:.4f}; "
                    f"if this persists, the usual causes are the learning rate (now {pl_module.lr:.2g}), rare classes "
                    "with too little weight in the loss (set loss.class_weighting=median_frequency) and wrong masks "
                    "(see inspect_data)",
                )
            self._collapsed = collapsed


def collapse(confusion: np.ndarray, classes: Classes) -> str | None:
    """Return the name of the class that is predicted for every pixel although the truth has others, else None.

    Args:
        confusion: (C, C) counts, rows are truth, columns prediction.
        classes: The classes, in the order of the rows.
    """
    predicted, present = np.flatnonzero(confusion.sum(axis=0)), np.flatnonzero(confusion.sum(axis=1))
    return classes.names[predicted[0]] if len(predicted) == 1 and len(present) > 1 else None


def _warn(trainer: Trainer, message: str) -> None:
    if trainer.is_global_zero:
        tqdm.write(f"warning: {message}")
