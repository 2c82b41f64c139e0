"""Early end of a run: signals and max_time set a flag; at the next step boundary the run saves and exits."""

import multiprocessing
import signal
import threading
import time
from types import FrameType
from typing import Any

from pytorch_lightning import Callback, Trainer

from segdeconv.errors import TimeUp
from segdeconv.system.interruption import INTERRUPTION, exit_at_once, raise_again
from segdeconv.system.output import reader_ended
from segdeconv.training.checkpointing import Checkpoints
from segdeconv.training.processes import READER_ENDED, RESUME_HINT, STOP_SIGNALS, agreed, interrupted

TIME_IS_UP = 1000  # not the number of any signal


def _kill_workers() -> None:
    """Kill the loader workers, so that they print no errors about the end of this process."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
    for child in multiprocessing.active_children():
        child.kill()


class Stopping(Callback):
    """Saves and ends the run at a step boundary after a signal, the deadline or the end of the reader of stdout.

    A second SIGINT more than a second later, and a third signal, exit at once.

    Between an epoch's last batch and the end of its validation nothing can be saved, so the run ends after that epoch.

    Args:
        checkpoints: Saves the run.
        deadline: Time, as of time.time(), after which training ends; None for no limit.
    """

    def __init__(self, checkpoints: Checkpoints, *, deadline: float | None = None) -> None:
        self.checkpoints, self.deadline = checkpoints, deadline
        self.received = 0
        self._before: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_before": {}}  # handlers belong to this process

    def listen(self) -> None:
        """Install signal handlers that request an end at the next step boundary."""
        raise_again()
        # Python allows signal handlers in the main thread only; elsewhere the application keeps its own.
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, a shell's `&` SIGINT
                self._before.setdefault(number, signal.getsignal(number))
                signal.signal(number, self._receive)

    def stop_listening(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.listen()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.listen()  # again, since Lightning has installed its own handlers

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if INTERRUPTION.again(number):
            _kill_workers()
            exit_at_once(number, "interrupted twice, nothing more was saved - resume with resume=auto")
        self.received = self.received or number

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # After an epoch's last batch comes its validation, and then `at_epoch_end`. Between the micro-batches of a step
        # nothing can be saved.
        last = batch_idx + 1 == trainer.num_training_batches or 0 < trainer.max_steps <= trainer.global_step
        if last or not pl_module.step_loss.step_is_complete:
            return
        if reason := self._reason(trainer):
            self.checkpoints.keep(trainer, None)
            self._leave(reason, trainer.global_step)

    def at_epoch_end(self, trainer: Trainer, total_steps: int, *, saved: bool) -> None:
        """End the run if requested; called by the Recorder.

        Args:
            trainer: The trainer at this step.
            total_steps: Optimizer steps of the whole run.
            saved: Whether the Recorder has saved this step; otherwise it is saved before the run ends.
        """
        reason = self._reason(trainer)
        done = trainer.should_stop or trainer.global_step >= total_steps
        if reason and not (reason == TIME_IS_UP and done):
            if not saved:
                self.checkpoints.keep(trainer, None)
            self._leave(reason, trainer.global_step)

    def _reason(self, trainer: Trainer) -> int:
        late = self.deadline is not None and time.time() > self.deadline
        unread = READER_ENDED if reader_ended() else 0
        return agreed(trainer, self.received or unread or (TIME_IS_UP if late else 0))

    def _leave(self, reason: int, step: int) -> None:
        saved = f" at step {step}, saved in {self.checkpoints.last_path}"
        if reason == TIME_IS_UP:
            raise TimeUp(f"max_time is over{saved} - {RESUME_HINT}")
        raise interrupted(reason, saved)

    def raise_if_requested(self) -> None:
        """Raise Interrupted if a signal was received outside training, where there is nothing to save."""
        if self.received:
            raise interrupted(self.received)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.stop_listening()
