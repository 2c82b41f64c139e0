"""Training in several processes: signals, ranks and reductions."""

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
RESUME_HINT = "resume with the same command and resume=auto"


def interrupted(number: int, saved: str = "") -> Interrupted:
    """Return the exception for a run that a signal stopped.

    Args:
        number: The signal.
        saved: Step and path of the saved checkpoint, to append to the message; empty if nothing was saved.
    """
    return Interrupted(f"stopped by {signal.Signals(number).name}{saved} - {RESUME_HINT}", STOP_SIGNALS[number])


def launched_from_outside() -> bool:
    """Return whether torchrun or SLURM has started several processes, by the same rules as Lightning."""
    if torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        return int(os.environ["WORLD_SIZE"]) > 1
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return not interactive and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def rank_from_outside() -> int:
    """Return the rank that torchrun or SLURM gave this process; 0 without them."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def agreed(trainer: Trainer, number: int) -> int:
    """Return the maximum of a number over all processes."""
    if trainer.world_size == 1:
        return number
    numbers = torch.tensor(number, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return int(numbers)


def summed(trainer: Trainer, values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    values = values.clone()
    if trainer.world_size > 1:
        torch.distributed.all_reduce(values)
    return values
