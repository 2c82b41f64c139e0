"""All uses of Lightning beyond its documented interface.

tests/training/test_lightning_internals.py checks them against the installed release.
"""

import logging
import math
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher

from segdeconv.errors import SegdeconvError
from segdeconv.training.processes import launched_from_outside

TIMEOUT = timedelta(seconds=120)  # for one process waiting for another


class Processes(DDPStrategy):
    """Distributed data parallel training.

    The other processes are spawned when the fit begins, so that Hydra runs in one process only: one run folder, and
    each job of a multirun once. If a launcher (torchrun, SLURM) has started the processes, each runs the whole command
    and Lightning determines its rank.
    """

    def __init__(self) -> None:
        super().__init__(start_method="popen" if launched_from_outside() else "spawn", timeout=TIMEOUT)

    def setup_environment(self) -> None:
        quieten()  # settings of this process only
        super().setup_environment()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        # Not through DistributedDataParallel, whose forward waits for all processes: they may have different numbers
        # of validation images, since no image is counted twice.
        assert self.lightning_module is not None
        with self.precision_plugin.val_step_context():
            return self.lightning_module.validation_step(*args, **kwargs)

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if not isinstance(exception, SegdeconvError):
            # It may be a consequence of another process's error: let that one be reported first.
            time.sleep(3)


def spawning_launcher(trainer: Trainer) -> _MultiProcessingLauncher | None:
    """Return the launcher that spawns this run's processes, or None with one process or an external launcher."""
    launcher = trainer.strategy.launcher
    return launcher if isinstance(launcher, _MultiProcessingLauncher) else None


def quieten() -> None:
    """Silence Lightning's messages and tips, which repeat or contradict ours."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning.callbacks").setLevel(logging.INFO)  # what a callback of the user reports
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*resuming from a checkpoint that ended before the epoch.*",  # our sampler resumes: it reads global_step
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*smaller than the logging interval.*",
        ".*in eval mode at the start of training.*",  # frozen norms and averaged weights are in eval mode
        ".*callbacks used to create the checkpoint need to be provided.*",  # resume_force asks for others
        ".*`weights_only` was not set.*",  # our reader sets it
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # pytorch#160843; Lightning 2.6.6 still does so
    ):
        warnings.filterwarnings("ignore", message)


def expect_equal_values() -> None:
    """Silence Lightning's advice to average logged values over processes, for values that all of them share."""
    warnings.filterwarnings("ignore", ".*It is recommended to use `self.log.*sync_dist=True.*")


def resume_at_epoch_start(trainer: Trainer) -> None:
    """Let a resumed run begin an epoch; Lightning treats every restart as being in the middle of one."""
    trainer.fit_loop.epoch_loop.restarting = False


def canonical_loops(
    loops: Mapping[str, Any], global_step: int, batches_per_epoch: int, accumulate: int
) -> tuple[int, dict[str, Any]]:
    """Return Lightning's epoch and loop counters at a step, independent of the hook that saves the checkpoint.

    Lightning's own counters depend on the hook in which they are read, and a run resumed from them can skip or repeat
    an epoch (7 of 100 random kills, with 2.6.6); these depend on global_step alone.

    Args:
        loops: Lightning's loop state, of which other entries are kept.
        global_step: Optimizer steps done.
        batches_per_epoch: Batches of an epoch in this process.
        accumulate: Batches per optimizer step.

    Returns:
        The epoch and the loop state.
    """
    epoch, steps = divmod(global_step, math.ceil(batches_per_epoch / accumulate))
    batch = steps * accumulate
    started = epoch + (batch > 0)
    total = epoch * batches_per_epoch + batch
    fit = dict(loops["fit_loop"])
    epochs = {"ready": started, "started": started, "processed": epoch, "completed": epoch}
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
