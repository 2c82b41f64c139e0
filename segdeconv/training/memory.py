"""How much memory training takes, before it is taken."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import AdamW, Optimizer

from segdeconv.errors import UsageError, command
from segdeconv.losses import loss_sums
from segdeconv.models import SegmentationModel
from segdeconv.system.devices import autocast
from segdeconv.system.memory import ran_out_of_memory

# A training step's peak over what its forward pass keeps: 1.19 to 1.26 on a CPU (docs/lab-notes.md).
PASSING = 1.25


@dataclass(frozen=True)
class Memory:
    """Bytes that training holds at its peak, by one process.

    weights: parameters, their gradients, the optimizer's state, copies in half precision, the average if there is one.
    image: what the forward pass keeps of one image for the backward pass.
    """

    weights: int
    image: int

    def total(self, batch_size: int) -> int:
        """Of a batch."""
        return self.weights + batch_size * self.image


@contextmanager
def explain_out_of_memory(batch_size: int) -> Iterator[None]:
    """Training that runs out of memory as one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        half = max(1, batch_size // 2)
        fewer = f"dataset.batch_size={half} (with trainer.accumulate_grad_batches=2 it learns the same), "
        raise UsageError(
            f"memory ran out with dataset.batch_size={batch_size} - try {fewer if batch_size > 1 else ''}a smaller "
            f"dataset.crop or dataset.size, or model.width; {command('find', ['batch_size'])} finds what fits"
        ) from error


def estimate(
    model: SegmentationModel,
    loss: nn.Module,
    optimizer: Optimizer,
    size: tuple[int, int],
    *,
    precision: str,
    averaged: bool = False,
) -> Memory:
    """What training images of a (H, W) would hold, from forward passes of one and of two small images on the CPU.

    What autograd keeps is counted while it keeps it: what the second image adds grows with the number of pixels, the
    rest does not. What passes through on the way back is a share of that (PASSING).
    """
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    momentum = int(optimizer.param_groups[0].get("momentum", 0) > 0)
    slots = 2 if isinstance(optimizer, AdamW) and not momentum else momentum  # Muon has AdamW's for vectors alone
    side = max(64, model.minimum_size)
    one, two = (_kept(model, loss, images, side, precision) for images in (1, 2))
    return Memory(
        weights=parameters * (2 if averaged else 1) + trained * (1 + slots) + 2 * one - two,
        image=round(PASSING * (two - one) * size[0] * size[1] / side**2),
    )


def _kept(model: SegmentationModel, loss: nn.Module, images: int, side: int, precision: str) -> int:
    """Bytes that images of side x side leave behind for their backward pass."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # by the place of their storage; held, so that no place is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    training = model.training
    model.eval()  # no running statistics are touched and no random number is drawn
    image = torch.zeros(images, model.in_channels, side, side).contiguous(memory_format=torch.channels_last)
    mask = torch.zeros(images, side, side, dtype=torch.int64)
    try:
        with autocast(precision, torch.device("cpu")), saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_sums(loss, model.supervised(image), mask)
    finally:
        model.train(training)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
