"""Several processes: one run, trained by all of them, told in one voice."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from segdeconv.errors import Interrupted

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

STOP_SIGNALS: dict[int, int] = {
    getattr(signal, name): code
    for name, code in (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143))
    if hasattr(signal, name)  # Windows has no SIGHUP
}
GO_ON = "go on with the same command and resume=auto"


def interrupted(number: int, saved: str = "") -> Interrupted:
    """The end of a run that a signal stopped. saved: at which step and where, if anything was."""
    return Interrupted(f"stopped by {signal.Signals(number).name}{saved} - {GO_ON}", STOP_SIGNALS[number])


def launched_from_outside() -> bool:
    """Whether torchrun or SLURM has started several processes, as Lightning recognises them."""
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        return int(os.environ["WORLD_SIZE"]) > 1
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return not interactive and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def rank_from_outside() -> int:
    """The place among all processes that torchrun or SLURM gave this one."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


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
