"""The checkpoints of a run, written through Lightning: last.ckpt, previous.ckpt, best.ckpt and those that are kept."""

import math
import os
import time
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.plugins import CheckpointIO
from torch.nn import Module
from tqdm import tqdm

from segdeconv.checkpoints import checkpoint
from segdeconv.system.files import replace_link
from segdeconv.training.lightning_internals import canonical_loops, resume_at_epoch_start
from segdeconv.training.own_callbacks import require_plain_state
from segdeconv.training.processes import agreed
from segdeconv.training.run_folder import require_run_folder

KEPT = "kept-{}.ckpt"  # with the step
QUICK = 0.1  # seconds; a checkpoint that takes less is written after every epoch
AUTO_KEPT, AUTO_BYTES = 3, 2 << 30  # spaced checkpoints by default, and bytes that they may take together
INTERVAL = 20  # times the seconds of a slower write, between two validations: the writes take a twentieth of the time


class VerifiedCheckpoints(CheckpointIO):
    """Lightning's interface to verified checkpoint files, see `segdeconv.checkpoints.checkpoint`.

    Args:
        resumed: A checkpoint that has been read already; its content is returned once and then released.
    """

    def __init__(self, resumed: checkpoint.Checkpoint | None = None) -> None:
        self._resumed = resumed

    def save_checkpoint(self, checkpoint_: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        require_plain_state(checkpoint_)
        Path(path).parent.mkdir(parents=True, exist_ok=True)  # that of ModelCheckpoint
        checkpoint.write(checkpoint_, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        resumed, self._resumed = self._resumed, None
        return resumed.content if resumed and resumed.path == path else checkpoint.load_plain(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
        checkpoint.sidecar_of(Path(path)).unlink(missing_ok=True)


class Checkpoints(Callback):
    """Writes last.ckpt, previous.ckpt and best.ckpt (highest validation mIoU) to the run folder.

    They are written after an epoch's validation, never between its last batch and its validation, so that a resumed
    run has the scores and the best checkpoint of an uninterrupted one. An epoch without validation that follows a write
    too closely is not saved, see `is_due`.

    Args:
        run: The run folder.
        resumed: The checkpoint that training resumes from.
        patience: See `TrainerSettings`.
        forced: Whether the run resumes with another config, so that a callback that ended it may do so no more.
        keep: See `TrainerSettings`.
    """

    def __init__(
        self,
        run: Path,
        *,
        resumed: Path | None = None,
        patience: int | None = None,
        forced: bool = False,
        keep: int | Literal["auto"] = 0,
    ) -> None:
        self.run, self.patience, self.forced, self.count = run, patience, forced, keep
        self._resumed = resumed
        # A damaged last.ckpt, which was skipped, must not replace the intact previous.ckpt.
        self._last_is_intact = resumed == self.last_path
        self.best = -1.0
        self.waited = 0
        self.ended = False  # by a callback, which may keep no record of it
        self._written = -math.inf  # time.monotonic() of the last write of last.ckpt, and its duration in seconds
        self._seconds = 0.0

    @property
    def last_path(self) -> Path:
        """Path of the checkpoint that training resumes from."""
        return self.run / "last.ckpt"

    @property
    def best_path(self) -> Path:
        """Path of the checkpoint with the highest validation mIoU."""
        return self.run / "best.ckpt"

    def keep(self, trainer: Trainer, miou: float | None) -> None:
        """Write last.ckpt, and best.ckpt if the mIoU is the highest so far.

        Args:
            trainer: The trainer at this step.
            miou: Mean IoU of the validation, 0..1 or NaN; None without validation.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        require_run_folder(self.run)
        self.ended = trainer.should_stop and not 0 < trainer.max_steps <= trainer.global_step
        if self.ended and trainer.is_global_zero:
            reasons = (getattr(callback, "stopping_reason_message", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            reason = next((f" ({reason})" for reason in reasons if reason), "")
            tqdm.write(f"training ends: a callback stopped it at step {trainer.global_step}{reason}")
        if miou is not None:
            better = miou > self.best
            self.best, self.waited = (miou, 0) if better else (self.best, self.waited + 1)
            if better:
                trainer.save_checkpoint(self.best_path)
            self._end_early(trainer)
        if trainer.is_global_zero and self._last_is_intact and self.last_path.is_file():
            _keep_previous(self.last_path)
        started = time.monotonic()
        trainer.save_checkpoint(self.last_path)
        self._written = time.monotonic()
        self._seconds = self._written - started
        self._last_is_intact = True

    def spaced(self, trainer: Trainer) -> list[int]:
        """Return the steps of the checkpoints that are kept by now, at ends of epochs, this one included.

        They depend on the number of steps alone, so that a resumed run keeps those of an uninterrupted one.
        """
        count = kept_count(self.count, trainer.lightning_module)
        length = steps_per_epoch(trainer)
        return [length * epoch for epoch in spaced_epochs(trainer.global_step // length, count)]

    def keep_spaced(self, trainer: Trainer, source: Path) -> None:
        """Keep the checkpoint of this step if it is one of `spaced`, and remove those that no longer are.

        A link to last.ckpt takes no time, and no space until the next last.ckpt is written.

        Args:
            trainer: The trainer at this step.
            source: The checkpoint of this step, if one has been written.
        """
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        names = {kept_path(self.run, step): step for step in self.spaced(trainer)}
        for path in set(self.run.glob(KEPT.format("*"))) - set(names):
            if path.stem.rpartition("-")[2].isdecimal():  # else it is not one of ours
                VerifiedCheckpoints().remove_checkpoint(path)
        for path, step in names.items():
            if step == trainer.global_step and not path.is_file() and source.is_file():
                _link(path, source)

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether last.ckpt is to be written after an epoch without validation.

        That is so if it is one of `spaced`, or unless writing it takes long and it was written a short time ago. Every
        process has to call this, since it is a collective operation.
        """
        if trainer.global_step in self.spaced(trainer):
            return True
        age = time.monotonic() - self._written
        return bool(agreed(trainer, int(self._seconds < QUICK or age >= INTERVAL * self._seconds)))

    def _end_early(self, trainer: Trainer) -> None:
        if self.patience is not None and self.waited >= self.patience:
            trainer.should_stop = True
            if trainer.is_global_zero:
                tqdm.write(f"training ends: no mIoU above {self.best:.4f} in {self.waited} validations")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "ended": self.ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.waited = state_dict["best"], state_dict.get("waited", 0)
        self.ended = state_dict.get("ended", False) and not self.forced

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, content: dict[str, Any]) -> None:
        root = pl_module.metadata["config"]["dataset"].get("root")
        if isinstance(root, str) and not os.path.isabs(os.path.expanduser(root)):
            content[checkpoint.FOLDER] = checkpoint.relative_folder(Path.cwd(), self.run)
        batches = trainer.num_training_batches
        content["epoch"], content["loops"] = canonical_loops(
            content["loops"], trainer.global_step, int(batches), trainer.accumulate_grad_batches
        )

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step % steps_per_epoch(trainer) == 0:
            resume_at_epoch_start(trainer)
        if self._resumed is not None:  # a kill may have come before the link
            self.keep_spaced(trainer, self._resumed)
        states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}  # type: ignore[attr-defined]
        require_plain_state({"callbacks": states})
        if self.ended:
            trainer.should_stop = True
            if trainer.is_global_zero:
                tqdm.write("training ends: a callback stopped it here; to train on, change it with resume_force=true")
        self._end_early(trainer)


def steps_per_epoch(trainer: Trainer) -> int:
    """Return the number of optimizer steps of an epoch."""
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


def spaced_epochs(epoch: int, count: int) -> list[int]:
    """Return the epochs whose checkpoints are kept once `epoch` epochs are done.

    They are the multiples of the smallest power of two of which at most `count` lie before `epoch`, so that none that
    was removed is needed again, however long a run becomes: from half of `count` to `count` of them, and `epoch` itself
    if it is a multiple.

    Examples:
        >>> [spaced_epochs(epoch, 3) for epoch in (3, 4, 5, 20)]
        [[1, 2, 3], [1, 2, 3, 4], [2, 4], [8, 16]]
    """
    stride = 1
    while count and (epoch - 1) // stride > count:
        stride *= 2
    return list(range(stride, epoch + 1, stride)) if count else []


def kept_count(keep: int | Literal["auto"], task: Module) -> int:
    """Return the number of spaced checkpoints: `keep`, or as many of `AUTO_KEPT` as fit into `AUTO_BYTES`.

    A checkpoint counts as three times the weights, since most optimizers have two numbers for each.
    """
    if keep != "auto":
        return keep
    weights = sum(tensor.numel() * tensor.element_size() for tensor in task.state_dict().values())
    return min(AUTO_KEPT, AUTO_BYTES // max(1, 3 * weights))


def kept_path(run: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step that is kept."""
    return run / KEPT.format(step)


def _keep_previous(path: Path) -> None:
    _link(path.with_name(f"previous{path.suffix}"), path)


def _link(link: Path, path: Path) -> None:
    # The sidecar first: it also contains the hash of the file that `link` still names at that moment.
    if checkpoint.sidecar_of(path).is_file():
        replace_link(checkpoint.sidecar_of(link), checkpoint.sidecar_of(path))
    replace_link(link, path)
