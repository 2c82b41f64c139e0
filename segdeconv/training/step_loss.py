"""Training loss of an optimizer step, over micro-batches and processes, and of an epoch."""

import math
from typing import NamedTuple

import torch
from pytorch_lightning import Trainer
from torch import Tensor

from segdeconv.errors import DivergedError
from segdeconv.training.processes import summed

LOWER = "lower optimizer.lr, add schedule.warmup_steps or clip with trainer.gradient_clip_val"


class Pending(NamedTuple):
    """A step's loss in transfer to the host.

    Attributes:
        sums: [sum, normaliser].
        arrived: CUDA event that marks the end of the transfer; None on a CPU.
        step, lr, names: Step, learning rate and names of the images, for error messages.
    """

    sums: Tensor
    arrived: torch.cuda.Event | None
    step: int
    lr: float
    names: list[str]


class StepLoss:
    """Sums the loss of a step's micro-batches in all processes, and those of an epoch's steps.

    On a GPU the host does not wait for the loss of the step that it has just launched: `reduce` records the previous
    step's loss. `sync_loss` waits for the last one, and is called before anything is shown, scored or saved.

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
        """Reset the sums for a new epoch."""
        self.sums = [0.0, 0.0]

    @property
    def step_is_complete(self) -> bool:
        """True if the last micro-batch completed its optimizer step."""
        return not self._micro_batches

    def add(self, total: Tensor, normaliser: Tensor, names: list[str]) -> None:
        """Add a micro-batch: sum and normaliser of its loss, and the names of its images."""
        self._micro_batches.append((total.detach(), normaliser.detach(), names))

    def reduce(self, trainer: Trainer, lr: float) -> Tensor:
        """Complete the step.

        Args:
            trainer: The trainer, for the processes and the step.
            lr: The learning rate, for error messages.

        Returns:
            [sum, normaliser] of the loss over all micro-batches and processes, (2,) float32 on the device.
        """
        totals, normalisers, names = zip(*self._micro_batches, strict=True)
        self._micro_batches = []
        sums = summed(trainer, torch.stack([torch.stack(totals).sum(), torch.stack(normalisers).sum()]).float())
        self.sync_loss()  # the previous step's, on a GPU
        arrived, on_host = None, sums
        if sums.is_cuda:
            on_host = torch.empty(2, pin_memory=True).copy_(sums, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._pending_loss = Pending(
            on_host, arrived, trainer.global_step, lr, [name for batch in names for name in batch]
        )
        if arrived is None:
            self.sync_loss()
        return sums

    def sync_loss(self) -> None:
        """Wait for the last step's loss and add it to the sums.

        Raises:
            DivergedError: It is not finite. Nothing is saved afterwards.
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
