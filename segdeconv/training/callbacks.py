"""What a run shows and writes while it trains: progress, metrics.csv, TensorBoard, pictures; and how it stops."""

import csv
import io
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import Checkpoint
from tqdm import tqdm

from segdeconv.data.dataset import SegmentationDataset
from segdeconv.drawing import draw
from segdeconv.evaluation.metrics import scores
from segdeconv.system.files import replace_text
from segdeconv.training.checkpointing import Checkpoints
from segdeconv.training.diagnostics import LoaderWait
from segdeconv.training.loggers import show_picture
from segdeconv.training.run_folder import require_run_folder
from segdeconv.training.stopping import Stopping
from segdeconv.training.task import Results, SegmentationTask


class MetricsFile:
    """metrics.csv: one row per epoch, only ever appended to, and cut back to the step a run goes on from."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut_back(self, step: int) -> None:
        """Drop the rows of steps after `step`, which the run will take again."""
        if not self.path.is_file():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        # A row that a kill cut short has too few fields.
        kept = [row for row in rows if len(row) == len(header) and row[0].isdecimal() and int(row[0]) <= step]
        if not kept:  # nor may a header be left that is of another config, or cut short
            self.path.unlink()
            return
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *kept])
        replace_text(self.path, text.getvalue())

    def append(self, row: Mapping[str, float | int]) -> None:
        """Write one row, in one piece, to the disk."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row), lineterminator="\n")
        if not self.path.is_file() or not self.path.stat().st_size:
            writer.writeheader()
        writer.writerow(row)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())


class Recorder(Checkpoint):  # Lightning calls callbacks of this base last, when everything is counted
    """After every epoch: scalars to metrics.csv and to the logger, the confusion matrix, then the checkpoints."""

    def __init__(self, run: Path, checkpoints: Checkpoints, stopping: Stopping) -> None:
        self.checkpoints, self.stopping = checkpoints, stopping
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
        train, val = task.results("train"), task.results("val")
        row |= _scalars("train", train, task) | _scalars("val", val, task)
        self.miou = val.scores.miou if val else None
        task.reset("train")
        task.reset("val")
        if trainer.is_global_zero:
            require_run_folder(self.checkpoints.run)
            self.metrics.append(row)
            for logger in trainer.loggers:
                numbers = {name: value for name, value in row.items() if name != "step" and value == value}
                logger.log_metrics(numbers, step=trainer.global_step)
                if val:
                    picture = draw.confusion_picture(val.confusion, task.classes)
                    show_picture(logger, "confusion", picture, trainer.global_step)
        self.checkpoints.keep(trainer, self.miou)
        self.stopping.at_epoch_end(trainer, task.total_steps)


def _scalars(split: str, results: Results | None, task: SegmentationTask) -> dict[str, float]:
    # The columns of metrics.csv are the same in an epoch without validation.
    loss = results.loss if results else float("nan")
    found = results.scores if results else scores(np.zeros((len(task.classes), len(task.classes)), dtype=np.int64))
    return {
        f"{split}/loss": loss,
        f"{split}/miou": found.miou,
        f"{split}/pixel_accuracy": found.pixel_accuracy,
        f"{split}/mean_accuracy": found.mean_accuracy,
        f"{split}/frequency_weighted_iou": found.frequency_weighted,
    } | {f"{split}/iou/{name}": float(found.iou[index]) for index, name in enumerate(task.classes.names)}


class Pictures(Callback):
    """Image, truth, prediction and error of a few validation images, to the logger at every validation."""

    def __init__(self, dataset: SegmentationDataset, count: int = 4) -> None:
        self.dataset, self.count = dataset, count
        self.chosen: set[int] = set()
        self._seen = 0

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._seen = 0
        # Several processes take turns through the images; only the first one draws, and only what it has predicted.
        last = (len(self.dataset) - 1) // trainer.world_size
        self.chosen = {int(turn) * trainer.world_size for turn in np.linspace(0, last, self.count)}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.is_global_zero:
            return
        for prediction in outputs["predictions"]:
            if self._seen in self.chosen:
                image, mask, name = self.dataset[self._seen]
                picture = draw.comparison(image, mask, prediction, self.dataset.classes)
                for logger in trainer.loggers:
                    show_picture(logger, f"image, truth, prediction, error/{name}", picture, trainer.global_step)
            self._seen += trainer.world_size


class Progress(Callback):
    """One bar over the whole run with loss, mIoU, time left and the share of time that training waits for images; where
    nobody watches, a line per epoch.
    """

    def __init__(self, recorder: Recorder, waiting: LoaderWait) -> None:
        self.recorder, self.waiting = recorder, waiting
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
        if self.bar is None or not pl_module.step_loss.step_is_complete:
            return
        # Averaged over about twenty steps: one batch's loss says little.
        loss = pl_module.step_loss.last
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        best = f" miou {self.recorder.miou:.3f}" if self.recorder.miou is not None else ""
        self.bar.set_description(f"epoch {trainer.current_epoch + 1} loss {self._loss:.3f}{best}", refresh=False)
        self.bar.set_postfix_str(f"waiting {100 * self.waiting.share:.0f} %", refresh=False)
        self.bar.update()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        # Called before the Recorder resets: Lightning calls its kind last. Every process has to ask for results.
        train, val = pl_module.results("train"), pl_module.results("val")
        if self.bar is None or not self.bar.disable:
            return
        done = trainer.global_step - self._begun
        left = (pl_module.total_steps - trainer.global_step) * (time.monotonic() - self._start) / max(1, done)
        print(
            f"epoch {trainer.current_epoch + 1}  step {trainer.global_step}/{pl_module.total_steps}  "
            f"train loss {train.loss:.3f}  "
            + (f"val loss {val.loss:.3f}  val miou {val.scores.miou:.4f}  " if val else "")
            + f"waiting for images {100 * self.waiting.share:.0f} %  left {left / 60:.1f} min",
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
