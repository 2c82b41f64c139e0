"""The training loss over the micro-batches and processes of an optimizer step, and over the steps of an epoch."""

import math
from typing import NamedTuple

import torch
from pytorch_lightning import Trainer
from torch import Tensor

from segdeconv.errors import DivergedError
from segdeconv.training.processes import summed

LOWER = "lower optimizer.lr, add schedule.warmup_steps or clip with trainer.gradient_clip_val"


class Pending(NamedTuple):
    """A step's loss on its way to the host: [sum, normaliser], the event of its arrival, and what made it."""

    sums: Tensor
    arrived: torch.cuda.Event | None
    step: int
    lr: float
    names: list[str]


class StepLoss:
    """Sums the loss of a step's micro-batches in all processes, and those of an epoch's steps.

    On a GPU the host does not wait for the loss of the step that it has just launched. `reduce` takes note of the step
    before; `sync_loss` waits, and is called before anything is shown, scored or saved.

    Attributes:
        sums: [sum, normaliser] over all processes and finished steps since `reset`.
        last: The mean loss of the last step.
        names: The names of the last step's images in this process.
    """

    def __init__(self) -> None:
        self.last = 0.0
        self.names: list[str] = []
        self._micro_batches: list[tuple[Tensor, Tensor, list[str]]] = []
        self._pending_loss: Pending | None = None
        self.reset()

    def reset(self) -> None:
        """Start the sums of another epoch."""
        self.sums = [0.0, 0.0]

    @property
    def step_is_complete(self) -> bool:
        """Whether the last micro-batch was the last of its step."""
        return not self._micro_batches

    def add(self, total: Tensor, normaliser: Tensor, names: list[str]) -> None:
        """Add a micro-batch: sum and normaliser of its loss, and the names of its images."""
        self._micro_batches.append((total.detach(), normaliser.detach(), names))

    def reduce(self, trainer: Trainer, lr: float) -> Tensor:
        """End the step; return [sum, normaliser] of its loss over all micro-batches and processes, on the device."""
        totals, normalisers, names = zip(*self._micro_batches, strict=True)
        self._micro_batches = []
        sums = summed(trainer, torch.stack([torch.stack(totals).sum(), torch.stack(normalisers).sum()]).float())
        self.sync_loss()  # of the step before, on a GPU
        arrived, on_host = None, sums
        if sums.is_cuda:
            on_host = torch.empty(2, pin_memory=True).copy_(sums, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._pending_loss = Pending(
            on_host, arrived, trainer.global_step, lr, [name for some in names for name in some]
        )
        if arrived is None:
            self.sync_loss()
        return sums

    def sync_loss(self) -> None:
        """Take note of the last step's loss.

        Raises:
            DivergedError: It is not finite. Nothing is saved after that.
        """
        if self._pending_loss is None:
            return
        sums, arrived, step, lr, names = self._pending_loss
        self._pending_loss = None
        if arrived is not None:
            arrived.synchronize()
        total, normaliser = sums.tolist()
        if not math.isfinite(total):
            raise DivergedError(
                f"the loss is {total} at step {step} with learning rate {lr:.3g} on {', '.join(names[:4])} - {LOWER}"
            )
        self.names = names
        self.last = total / normaliser if normaliser else 0.0
        self.sums = [self.sums[0] + total, self.sums[1] + normaliser]
