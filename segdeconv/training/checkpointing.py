"""Lightning and checkpoints: our files behind its door, and its loop counters as they are at a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from lightning_fabric.plugins import CheckpointIO
from pydantic import Field
from pytorch_lightning import Callback, Trainer
from tqdm import tqdm

from segdeconv.checkpoints import checkpoint
from segdeconv.system.files import replace_link
from segdeconv.training.run_folder import require_there

Count = Annotated[int, Field(ge=1)]


class VerifiedCheckpoints(CheckpointIO):
    """Lightning's door to our checkpoint files: see checkpoint.py."""

    def save_checkpoint(self, checkpoint_: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        checkpoint.write(checkpoint_, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        return checkpoint.load_plain(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(Callback):
    """Keeps last.ckpt, the one before it, and best.ckpt (highest validation mIoU) in the run's folder.

    Written after an epoch's validation, never between the last batch and it, so that the scores and the best
    checkpoint of a run that was cut are those of a run that was not.

    resumed: the checkpoint that training goes on from.
    patience: validations in a row without a better mIoU after which training ends; None for no such end.
    """

    def __init__(self, run: Path, *, resumed: Path | None = None, patience: Count | None = None) -> None:
        self.run, self.patience = run, patience
        # What was passed over as damaged must not take the place of the one that is whole.
        self._last_is_whole = resumed == self.last_path
        self.best = -1.0
        self.waited = 0

    @property
    def last_path(self) -> Path:
        """Where training goes on from."""
        return self.run / "last.ckpt"

    @property
    def best_path(self) -> Path:
        """What to use afterwards."""
        return self.run / "best.ckpt"

    def keep(self, trainer: Trainer, miou: float | None) -> None:
        """Write last.ckpt, and best.ckpt if this validation's mIoU is the highest; NaN never is."""
        require_there(self.run)
        if miou is not None:
            better = miou > self.best
            self.best, self.waited = (miou, 0) if better else (self.best, self.waited + 1)
            if better:
                trainer.save_checkpoint(self.best_path)
            self._end_early(trainer)
        if trainer.is_global_zero and self._last_is_whole and self.last_path.is_file():
            _keep_previous(self.last_path)
        trainer.save_checkpoint(self.last_path)
        self._last_is_whole = True

    def _end_early(self, trainer: Trainer) -> None:
        if self.patience is not None and self.waited >= self.patience:
            trainer.should_stop = True
            if trainer.is_global_zero:
                tqdm.write(f"{self.waited} validations without a better mIoU than {self.best:.4f}: training ends here")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.waited = state_dict["best"], state_dict.get("waited", 0)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, content: dict[str, Any]) -> None:
        batches = trainer.num_training_batches
        content["epoch"], content["loops"] = canonical_loops(
            content["loops"], trainer.global_step, int(batches), trainer.accumulate_grad_batches
        )

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        # Lightning takes a restart as being in the middle of an epoch; at an epoch's start nothing is to be finished.
        batches = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if trainer.global_step % batches == 0:
            trainer.fit_loop.epoch_loop.restarting = False
        self._end_early(trainer)


def _keep_previous(path: Path) -> None:
    previous = path.with_name(f"previous{path.suffix}")
    # The sidecar first: it also knows the file that came before this one, which is the one that has the name till then.
    if checkpoint.sidecar_of(path).is_file():
        replace_link(checkpoint.sidecar_of(previous), checkpoint.sidecar_of(path))
    replace_link(previous, path)


def canonical_loops(
    loops: Mapping[str, Any], global_step: int, batches_per_epoch: int, accumulate: int
) -> tuple[int, dict[str, Any]]:
    """(epoch, loop counters) of Lightning as they are at a step, whatever hook the checkpoint was taken in.

    Lightning's own counters depend on where in its hooks they are read, and a run resumed from them can skip or repeat
    an epoch (7 of 100 random kills, with 2.6.6); these are a function of global_step alone.
    """
    epoch, steps = divmod(global_step, math.ceil(batches_per_epoch / accumulate))
    batch = steps * accumulate
    begun = epoch + (batch > 0)
    total = epoch * batches_per_epoch + batch
    fit = dict(loops["fit_loop"])
    epochs = {"ready": begun, "started": begun, "processed": epoch, "completed": epoch}
    fit["epoch_progress"] = {"total": dict(epochs), "current": dict(epochs)}
    fit["epoch_loop.state_dict"] = {"_batches_that_stepped": global_step}
    fit["epoch_loop.batch_progress"] = {
        "total": _four(total),
        "current": _four(batch),
        "is_last_batch": False,
    }
    fit["epoch_loop.scheduler_progress"] = {"total": _two(0), "current": _two(0)}
    fit["epoch_loop.automatic_optimization.optim_progress"] = {
        "optimizer": {
            "step": {"total": _two(global_step), "current": _two(steps)},
            "zero_grad": {
                "total": {**_two(global_step), "started": global_step},
                "current": {**_two(steps), "started": steps},
            },
        }
    }
    fit["epoch_loop.val_loop.batch_progress"] = {"total": _four(0), "current": _four(0), "is_last_batch": False}
    return epoch, {**loops, "fit_loop": fit}


def _two(count: int) -> dict[str, int]:
    return {"ready": count, "completed": count}


def _four(count: int) -> dict[str, int]:
    return {"ready": count, "started": count, "processed": count, "completed": count}
