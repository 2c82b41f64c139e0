"""Several processes: one run, trained by all of them, told in one voice."""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from segdeconv.errors import Interrupted, SegdeconvError, UsageError, raised_elsewhere

TIMEOUT = timedelta(seconds=120)  # of one process waiting for another
STOP_SIGNALS: dict[int, int] = {
    getattr(signal, name): code
    for name, code in (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143))
    if hasattr(signal, name)  # Windows has no SIGHUP
}


class Processes(DDPStrategy):
    """Data parallel training: gradients are averaged, everything else is each process's own or said so.

    The processes are copies of this one (`spawn`), started when the fit begins, so that Hydra runs in one process only:
    one run directory, each job of a multirun once. Where a launcher has started them already (torchrun, SLURM), every
    one runs the whole command and Lightning finds its rank.
    """

    def __init__(self) -> None:
        super().__init__(start_method="popen" if launched_from_outside() else "spawn", timeout=TIMEOUT)

    def setup_environment(self) -> None:
        quieten()  # each process for itself
        super().setup_environment()

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        # Not through DistributedDataParallel, whose forward waits for all processes: their slices of the validation
        # images are of unequal length, since no image is counted twice.
        assert self.lightning_module is not None
        with self.precision_plugin.val_step_context():
            return self.lightning_module.validation_step(*args, **kwargs)

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if not isinstance(exception, SegdeconvError):
            # Perhaps only the echo of another process's end: let that one be heard first.
            time.sleep(3)


def quieten() -> None:
    """Lightning's own lines and tips: our header and progress say what matters."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*resuming from a checkpoint that ended before the epoch.*",  # ours resumes: its sampler asks global_step
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*smaller than the logging interval.*",
        ".*in eval mode at the start of training.*",  # frozen norms and averaged weights are
        ".*`weights_only` was not set.*",  # ours are read with it
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",  # pytorch#160843; Lightning 2.6.6 still asks that way
    ):
        warnings.filterwarnings("ignore", message)


def launched_from_outside() -> bool:
    """Whether torchrun or SLURM has started several processes."""
    if TorchElasticEnvironment.detect():
        return int(os.environ["WORLD_SIZE"]) > 1
    return SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1


def rank_from_outside() -> int:
    """The place among all processes that torchrun or SLURM gave this one."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def count_processes(accelerator: str, devices: int | str, num_nodes: int) -> int:
    """How many processes a Trainer with these settings has."""
    if accelerator == "gpu":
        indices = CUDAAccelerator.parse_devices(-1 if devices == "auto" else devices)
        return len(indices or []) * num_nodes
    if accelerator == "mps" or devices == "auto":
        return num_nodes
    if not str(devices).isdecimal() or int(devices) < 1:
        raise UsageError(f"trainer.devices={devices} on the CPU - give the number of processes")
    return int(devices) * num_nodes


def agreed(trainer: Trainer, number: int) -> int:
    """The largest of the processes' numbers, in every one of them."""
    if trainer.world_size == 1:
        return number
    numbers = torch.tensor(number, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return int(numbers)


def summed(trainer: Trainer, values: Tensor) -> Tensor:
    """The sum over all processes, in each of them."""
    values = values.clone()
    if trainer.world_size > 1:
        torch.distributed.all_reduce(values)
    return values


def fit(trainer: Trainer, task: LightningModule, data: LightningDataModule, *, resumed: Path | None) -> None:
    """trainer.fit, with what a process said when it ended raised here as if it had been this one."""
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _MultiProcessingLauncher):
        trainer.fit(task, datamodule=data, ckpt_path=resumed, weights_only=True)
        return
    try:
        with _signals_passed_on(launcher) as received:
            trainer.fit(task, datamodule=data, ckpt_path=resumed, weights_only=True)
        if received:
            raise _stopped(received[0])
    except ProcessRaisedException as error:
        said = raised_elsewhere(str(error))
        if isinstance(said, Interrupted) and received:
            said.exit_code = STOP_SIGNALS[received[0]]
        if said is None and received:  # before it could answer to a signal, or of the same one
            raise _stopped(received[0]) from None
        if said is None:
            raise
        raise said from None
    except ProcessExitedException as error:
        if received:  # before it could answer to a signal
            raise _stopped(received[0]) from None
        raise UsageError(
            f"a training process was ended from outside ({error}) - if the machine's memory ran out, lower "
            "dataset.batch_size; go on with the same command and resume=auto"
        ) from None


def _stopped(number: int) -> Interrupted:
    name = signal.Signals(number).name
    return Interrupted(f"stopped by {name} - go on with the same command and resume=auto", STOP_SIGNALS[number])


@contextmanager
def _signals_passed_on(launcher: _MultiProcessingLauncher) -> Iterator[list[int]]:
    """While the processes train, this one hands them the signals that it gets; they save and leave."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if received.count(signal.SIGINT) == 2:
            os._exit(130)
        # Never SIGINT: a terminal has sent it to the processes too, and to them a second one means `at once`.
        launcher.kill(signal.SIGTERM)

    listened = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as nohup has SIGHUP
    before = {number: signal.signal(number, pass_on) for number in listened}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
