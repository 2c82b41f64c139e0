"""Training in several processes: signals, ranks and reductions."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from segdeconv.errors import Interrupted
from segdeconv.system.interruption import EXIT_CODES

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

STOP_SIGNALS = EXIT_CODES
READER_ENDED = 13  # SIGPIPE, which Windows does not have
RESUME_HINT = "resume with resume=auto"


def interrupted(number: int, saved: str = "") -> Interrupted:
    """Return the exception for a run that a signal stopped.

    Args:
        number: The signal, or READER_ENDED.
        saved: Step and path of the saved checkpoint, to append to the message; empty if nothing was saved.
    """
    if number == READER_ENDED:
        return Interrupted(f"stopped because the reader of the output has ended{saved} - {RESUME_HINT}", 141)
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
