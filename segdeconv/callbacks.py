"""What a run shows and writes while it trains: progress, metrics.csv, TensorBoard, pictures; and how it stops."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import Checkpoint
from tqdm import tqdm

from segdeconv import draw
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.durable import replace_text
from segdeconv.errors import Interrupted, TimeUp
from segdeconv.loggers import show_picture
from segdeconv.metrics import scores
from segdeconv.processes import STOP_SIGNALS, agreed
from segdeconv.run_folder import require_there
from segdeconv.task import Results, SegmentationTask
from segdeconv.training import Checkpoints
from segdeconv.watch import Waiting

TIME_IS_UP = 1000  # beside the numbers of signals


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
        if not kept:  # nor may a header be left that is of another recipe, or cut short
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
        task.forget("train")
        task.forget("val")
        if trainer.is_global_zero:
            require_there(self.checkpoints.run)
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

    def __init__(self, recorder: Recorder, waiting: Waiting) -> None:
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
        if self.bar is None:
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches and batch_idx + 1 != trainer.num_training_batches:
            return
        # Averaged over about twenty steps: one batch's loss says little.
        loss = pl_module.last_loss
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        best = f" miou {self.recorder.miou:.3f}" if self.recorder.miou is not None else ""
        self.bar.set_description(f"epoch {trainer.current_epoch + 1} loss {self._loss:.3f}{best}", refresh=False)
        self.bar.set_postfix_str(f"waiting {100 * self.waiting.share:.0f} %", refresh=False)
        self.bar.update()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        # Called before the Recorder forgets: Lightning calls its kind last. Every process has to ask for results.
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


def _kill_workers() -> None:
    """So that they do not say that this process is gone."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
    for child in multiprocessing.active_children():
        child.kill()


class Stopping(Callback):
    """Signals and the clock set a flag; the step boundary saves and leaves. A second interrupt leaves at once.

    Between an epoch's last batch and the end of its validation nothing is saved: there the boundary is the epoch's end.

    deadline: in seconds of time.time(), after which training ends; None for no such end.
    """

    def __init__(self, checkpoints: Checkpoints, *, deadline: float | None = None) -> None:
        self.checkpoints, self.deadline = checkpoints, deadline
        self.received = 0
        self._before: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_before": {}}  # which are this process's own

    def listen(self) -> None:
        """From here on signals are a wish that is granted at the next step boundary."""
        # A notebook or server that trains in a thread keeps its own handlers: Python allows them to the main one only.
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored, a shell's `&` SIGINT
                self._before.setdefault(number, signal.getsignal(number))
                signal.signal(number, self._receive)

    def listen_no_more(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.listen()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.listen()  # again: Lightning has put its own handlers in between

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            _kill_workers()
            os.write(2, b"segdeconv: error: interrupted twice, nothing more was saved - go on with resume=auto\n")
            os._exit(130)
        self.received = number

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # After an epoch's last batch comes its validation, and `at_epoch_end` after that. Between the batches that make
        # one step there is nothing that could be saved.
        last = batch_idx + 1 == trainer.num_training_batches or 0 < trainer.max_steps <= trainer.global_step
        if last or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if reason := self._reason(trainer):
            self.checkpoints.keep(trainer, None)
            self._leave(reason, trainer.global_step)

    def at_epoch_end(self, trainer: Trainer, total_steps: int) -> None:
        """For the Recorder, when it has saved."""
        reason = self._reason(trainer)
        done = trainer.should_stop or trainer.global_step >= total_steps
        if reason and not (reason == TIME_IS_UP and done):
            self._leave(reason, trainer.global_step)

    def _reason(self, trainer: Trainer) -> int:
        late = self.deadline is not None and time.time() > self.deadline
        return agreed(trainer, self.received or (TIME_IS_UP if late else 0))

    def _leave(self, reason: int, step: int) -> None:
        saved = f"at step {step}, saved in {self.checkpoints.last_path} - go on with the same command and resume=auto"
        if reason == TIME_IS_UP:
            raise TimeUp(f"max_time is over {saved}")
        raise Interrupted(f"stopped by {signal.Signals(reason).name} {saved}", STOP_SIGNALS[reason])

    def leave_if_asked(self) -> None:
        """Outside of training, where there is nothing new to save."""
        if self.received:
            raise Interrupted(
                f"stopped by {signal.Signals(self.received).name} - go on with the same command and resume=auto",
                STOP_SIGNALS[self.received],
            )

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.listen_no_more()
