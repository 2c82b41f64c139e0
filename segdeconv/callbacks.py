"""What a run shows and writes while it trains: progress, metrics.csv, TensorBoard, pictures; and how it stops."""

from __future__ import annotations

import csv
import io
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import numpy as np
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from tqdm import tqdm

from segdeconv import draw
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.errors import Interrupted
from segdeconv.metrics import Scores
from segdeconv.task import SegmentationTask
from segdeconv.training import Checkpoints


class MetricsFile:
    """metrics.csv: one row per epoch, only ever appended to, and cut back to the step a run goes on from."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut_back(self, step: int) -> None:
        """Drop the rows of steps after `step`, which the run will take again."""
        if not self.path.is_file():
            return
        with self.path.open(newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        # A row that a kill cut short has too few fields.
        kept = [row for row in rows if len(row) == len(header) and int(row[0]) <= step]
        partial = self.path.with_name(f".tmp-{self.path.name}")
        with partial.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *kept])
        partial.replace(self.path)

    def append(self, row: Mapping[str, float | int]) -> None:
        """Write one row, in one piece, to the disk."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row), lineterminator="\n")
        if not self.path.is_file():
            writer.writeheader()
        writer.writerow(row)
        with self.path.open("a") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())


class Recorder(Checkpoint):  # Lightning calls callbacks of this base last, when everything is counted
    """After every epoch: scalars to metrics.csv and to the logger, the confusion matrix, then the checkpoints."""

    def __init__(self, run: Path, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.metrics = MetricsFile(run / "metrics.csv")
        self.miou: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.metrics.cut_back(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # so that Lightning validates before it stops in the middle of an epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        task: SegmentationTask = pl_module
        row: dict[str, float | int] = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "lr": task.optimizer.param_groups[0]["lr"],
        }
        train_loss, train_scores, _ = task.results("train")
        row |= _scalars("train", train_loss, train_scores, task)
        task.forget("train")
        val_loss, val_scores, confusion = task.results("val")
        validated = task.loss_counts["val"] > 0
        row |= _scalars("val", val_loss, val_scores, task)
        self.miou = val_scores.miou if validated else None
        task.forget("val")
        if trainer.is_global_zero:
            self.metrics.append(row)
        for logger in trainer.loggers:
            numbers = {name: value for name, value in row.items() if name != "step" and value == value}
            logger.log_metrics(numbers, step=trainer.global_step)
            if validated:
                _picture(logger, "confusion", draw.confusion_picture(confusion, task.classes), trainer.global_step)
        self.checkpoints.keep(trainer, self.miou)


def _scalars(split: str, loss: float, scores: Scores, task: SegmentationTask) -> dict[str, float]:
    return {
        f"{split}/loss": loss,
        f"{split}/miou": scores.miou,
        f"{split}/pixel_accuracy": scores.pixel_accuracy,
        f"{split}/mean_accuracy": scores.mean_accuracy,
        f"{split}/frequency_weighted_iou": scores.frequency_weighted,
    } | {f"{split}/iou/{name}": float(scores.iou[index]) for index, name in enumerate(task.classes.names)}


def _picture(logger: Logger, name: str, picture: np.ndarray, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, picture, step, dataformats="HWC")


class Pictures(Callback):
    """Image, truth, prediction and error of a few validation images, to TensorBoard at every validation."""

    def __init__(self, dataset: SegmentationDataset, count: int = 4) -> None:
        self.dataset = dataset
        self.chosen = {int(index) for index in np.linspace(0, len(dataset) - 1, count)}
        self._seen = 0

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._seen = 0

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        for prediction in outputs["predictions"]:
            if self._seen in self.chosen and trainer.is_global_zero:
                image, mask, name = self.dataset[self._seen]
                picture = draw.comparison(image, mask, prediction, self.dataset.classes)
                for logger in trainer.loggers:
                    _picture(logger, f"image, truth, prediction, error/{name}", picture, trainer.global_step)
            self._seen += 1


class Progress(Callback):
    """One bar over the whole run with loss, mIoU and time left; where nobody watches, a line per epoch."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.bar: tqdm[Any] | None = None
        self._loss: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.bar = tqdm(
                total=pl_module.total_steps, initial=trainer.global_step, unit="step", disable=None, smoothing=0.05,
                dynamic_ncols=True, file=sys.stdout,
            )  # fmt: skip
            self._start, self._begun = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.bar is None:
            return
        loss = float(outputs["loss"].detach())
        # Averaged over about twenty steps: one batch's loss says little.
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        best = f" miou {self.recorder.miou:.3f}" if self.recorder.miou is not None else ""
        self.bar.set_description(f"epoch {trainer.current_epoch + 1} loss {self._loss:.3f}{best}", refresh=False)
        self.bar.update()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        # Called before the Recorder forgets: Lightning calls its kind last.
        if self.bar is None or not self.bar.disable:
            return
        train_loss, _, _ = pl_module.results("train")
        val_loss, val_scores, _ = pl_module.results("val")
        validated = pl_module.loss_counts["val"] > 0
        done = trainer.global_step - self._begun
        left = (pl_module.total_steps - trainer.global_step) * (time.monotonic() - self._start) / max(1, done)
        print(
            f"epoch {trainer.current_epoch + 1}  step {trainer.global_step}/{pl_module.total_steps}  "
            f"train loss {train_loss:.3f}  "
            + (f"val loss {val_loss:.3f}  val miou {val_scores.miou:.4f}  " if validated else "")
            + f"left {left / 60:.1f} min",
            flush=True,
        )

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Stopping(Callback):
    """Signals set a flag; the step boundary saves and leaves. A second interrupt leaves at once."""

    CODES: ClassVar[dict[int, int]] = {
        getattr(signal, name): code
        for name, code in (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143))
        if hasattr(signal, name)  # Windows has no SIGHUP
    }

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._before = {number: signal.signal(number, self._receive) for number in self.CODES}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            os._exit(130)
        self.received = number

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # After an epoch's last batch comes its validation; the next step boundary is the one after that.
        if self.received is None or batch_idx + 1 == trainer.num_training_batches:
            return
        self.checkpoints.keep(trainer, None)
        raise Interrupted(
            f"stopped by {signal.Signals(self.received).name} at step {trainer.global_step}, saved in "
            f"{self.checkpoints.last_path} - go on with the same command and resume=auto",
            self.CODES[self.received],
        )

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
