"""Callbacks that report a run: progress, metrics.csv and the logger's scalars and images."""

import csv
import io
import math
import os
import re
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
from segdeconv.drawing.thumbnails import smaller, smaller_labels
from segdeconv.evaluation.learning_curve import METRICS_LIMITS
from segdeconv.system.files import replace_text
from segdeconv.system.plain_data import read_bytes
from segdeconv.training.checkpointing import Checkpoints
from segdeconv.training.diagnostics import LoaderWait
from segdeconv.training.loggers import images_are_due, log_image
from segdeconv.training.run_folder import require_run_folder
from segdeconv.training.stopping import Stopping
from segdeconv.training.task import SegmentationTask, scalars

MAX_SIDE = 256  # of logged images, in pixels


class MetricsFile:
    """The file metrics.csv: one row per epoch, appended; truncated to the resumed step when a run resumes.

    Args:
        path: The file, which is created with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut_back(self, step: int) -> None:
        """Remove the rows of steps after `step`, which the resumed run repeats."""
        if not self.path.is_file():
            return
        try:
            header, *rows = list(csv.reader(read_bytes(self.path, METRICS_LIMITS).decode().splitlines())) or [[]]
        except (csv.Error, ValueError):  # not a table of metrics
            header, rows = [], []
        # A row that was truncated by a kill has too few fields.
        rows = [row for row in rows if row and len(row) == len(header)]
        complete = [row for row in rows if re.fullmatch("[0-9]{1,18}", row[0]) and int(row[0]) <= step]
        if not complete:  # the header may be truncated, or that of another config
            self.path.unlink()
            return
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *complete])
        replace_text(self.path, text.getvalue())

    def append(self, row: Mapping[str, float | int]) -> None:
        """Append one row in a single write and flush it to disk.

        Args:
            row: Value by column name; the first row defines the columns.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row), lineterminator="\n")
        if not self.path.is_file() or not self.path.stat().st_size:
            writer.writeheader()
        writer.writerow(row)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())


class Recorder(Checkpoint):  # Lightning calls callbacks of this base class last, when all counts are complete
    """Writes scalars to metrics.csv and the logger, the confusion matrix and the checkpoints after an epoch.

    Args:
        run: The run folder.
        checkpoints: Writes the checkpoints, after every validation and where they are due.
        stopping: Ends the run, if requested, after they are written.
    """

    def __init__(self, run: Path, checkpoints: Checkpoints, stopping: Stopping) -> None:
        self.checkpoints, self.stopping = checkpoints, stopping
        self.metrics = MetricsFile(run / "metrics.csv")
        self.miou: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.metrics.cut_back(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # Lightning then validates before it stops in the middle of an epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        task: SegmentationTask = pl_module
        row: dict[str, float | int] = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "lr": task.lr,
        }
        train, val = task.results("train"), task.results("val")
        row |= scalars("train", train, task.classes) | scalars("val", val, task.classes)
        self.miou = val.scores.miou if val else None
        task.reset("train")
        task.reset("val")
        if trainer.is_global_zero:
            require_run_folder(self.checkpoints.run)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self.metrics.append(row)
            for logger in trainer.loggers:
                numbers = {name: value for name, value in row.items() if name != "step" and value == value}
                logger.log_metrics(numbers, step=trainer.global_step)
                if val and images_are_due(trainer):
                    image = draw.confusion_picture(val.confusion, task.classes)
                    log_image(logger, "confusion", image, trainer.global_step)
        done = trainer.should_stop or trainer.global_step >= task.total_steps
        saved = self.miou is not None or done or self.checkpoints.is_due(trainer)
        if saved:
            self.checkpoints.keep(trainer, self.miou)
            self.checkpoints.keep_spaced(trainer, self.checkpoints.last_path)
        self.stopping.at_epoch_end(trainer, task.total_steps, saved=saved)


class LastValidation(Callback):
    """Lets a run validate after its last epoch, whatever `trainer.check_val_every_n_epoch` is.

    The weights at the end of a schedule are usually the best ones, and must not go without a score.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if (trainer.current_epoch + 1) * steps >= pl_module.total_steps:
            trainer.check_val_every_n_epoch = 1


class ImageLogging(Callback):
    """Logs image, truth, prediction and error of a few validation images, reduced to `MAX_SIDE`, when images are due.

    Args:
        dataset: The validation split.
        count: Number of images.
    """

    def __init__(self, dataset: SegmentationDataset, count: int = 4) -> None:
        self.dataset, self.count = dataset, count
        self.selected: set[int] = set()
        self._index = 0

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._index = 0
        self.selected = set()
        if not images_are_due(trainer):
            return
        # Process r of n predicts images r, r + n, ...; only the first process logs, so only its images are selected.
        last = (len(self.dataset) - 1) // trainer.world_size
        self.selected = {int(step) * trainer.world_size for step in np.linspace(0, last, self.count)}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.is_global_zero:
            return
        for prediction in outputs["predictions"]:
            if self._index in self.selected:
                image, mask, name = self.dataset[self._index]
                small, truth = smaller(image, mask, MAX_SIDE)
                predicted = smaller_labels(prediction, MAX_SIDE)
                figure = draw.comparison(small, truth, predicted, self.dataset.classes)
                for logger in trainer.loggers:
                    log_image(logger, f"image, truth, prediction, error/{name}", figure, trainer.global_step)
            self._index += trainer.world_size


class Progress(Callback):
    """A progress bar over the whole run with loss, mIoU, time left and the fraction of time spent waiting for images.

    Prints a line per epoch instead if stdout is not a terminal.

    Args:
        recorder: Provides the last mIoU.
        wait: Provides the time spent waiting for images.
    """

    def __init__(self, recorder: Recorder, wait: LoaderWait) -> None:
        self.recorder, self.wait = recorder, wait
        self.bar: tqdm[Any] | None = None
        self._loss: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.bar = tqdm(
                total=pl_module.total_steps, initial=trainer.global_step, unit="step", disable=None, smoothing=0.05,
                dynamic_ncols=True, file=sys.stdout,
            )  # fmt: skip
            self._start_time, self._start_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.bar is None or not pl_module.step_loss.step_is_complete:
            return
        # Averaged over about twenty steps, since the loss of one batch is noisy.
        loss = pl_module.step_loss.last
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        best = f" miou {self.recorder.miou:.3f}" if self.recorder.miou is not None else ""
        self.bar.set_description(f"epoch {trainer.current_epoch + 1} loss {self._loss:.3f}{best}", refresh=False)
        self.bar.set_postfix_str(f"waiting {100 * self.wait.fraction:.0f} %", refresh=False)
        self.bar.update()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        # Lightning calls this before the Recorder, which resets the results. Results are summed over all processes, so
        # every process has to request them.
        train, val = pl_module.results("train"), pl_module.results("val")
        if self.bar is None or not self.bar.disable:
            return
        done = trainer.global_step - self._start_step
        left = (pl_module.total_steps - trainer.global_step) * (time.monotonic() - self._start_time) / max(1, done)
        print(
            f"epoch {trainer.current_epoch + 1}  step {trainer.global_step}/{pl_module.total_steps}  "
            f"train loss {train.loss:.3f}  "
            + (f"val loss {val.loss:.3f}  val miou {val.scores.miou:.4f}  " if val else "")
            + f"waiting for images {100 * self.wait.fraction:.0f} %  left {left / 60:.1f} min",
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
