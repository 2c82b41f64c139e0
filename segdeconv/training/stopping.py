"""How a run ends early: signals and the clock set a flag, the step boundary saves and leaves."""

import multiprocessing
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from pytorch_lightning import Callback, Trainer

from segdeconv.errors import TimeUp
from segdeconv.training.checkpointing import Checkpoints
from segdeconv.training.processes import GO_ON, STOP_SIGNALS, agreed, interrupted

TIME_IS_UP = 1000  # beside the numbers of signals


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

    def stop_listening(self) -> None:
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
        if last or not pl_module.step_loss.step_is_complete:
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
        saved = f" at step {step}, saved in {self.checkpoints.last_path}"
        if reason == TIME_IS_UP:
            raise TimeUp(f"max_time is over{saved} - {GO_ON}")
        raise interrupted(reason, saved)

    def raise_if_requested(self) -> None:
        """Outside of training, where there is nothing new to save."""
        if self.received:
            raise interrupted(self.received)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.stop_listening()
