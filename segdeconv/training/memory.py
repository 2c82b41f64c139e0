"""An estimate of the memory that training needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import SGD, Optimizer

from segdeconv.errors import UsageError, command
from segdeconv.losses import loss_sums
from segdeconv.models import SegmentationModel
from segdeconv.system.devices import autocast
from segdeconv.system.memory import ran_out_of_memory

# Peak memory of a training step relative to what its forward pass keeps: 1.19 to 1.26 on a CPU (docs/lab-notes.md).
PEAK_FACTOR = 1.25


@dataclass(frozen=True)
class Memory:
    """Peak memory of training in one process, in bytes.

    Attributes:
        weights: Parameters, gradients, optimizer state, copies in half precision and averaged weights.
        image: Activations that the forward pass keeps for the backward pass, per image.
    """

    weights: int
    image: int

    def total(self, batch_size: int) -> int:
        """Return the bytes needed with a batch of this size."""
        return self.weights + batch_size * self.image


@contextmanager
def explain_out_of_memory(batch_size: int) -> Iterator[None]:
    """Turn out-of-memory errors into a UsageError that names the keys to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        half = max(1, batch_size // 2)
        fewer = f"dataset.batch_size={half} (with trainer.accumulate_grad_batches=2 the training is equivalent), "
        raise UsageError(
            f"memory ran out with dataset.batch_size={batch_size} - try {fewer if batch_size > 1 else ''}a smaller "
            f"dataset.crop or dataset.size, or model.width; {command('find', ['batch_size'])} finds one that fits"
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
    """Estimate the memory of training from forward passes of one and of two small images on the CPU.

    The tensors that autograd saves are counted: those that the second image adds are scaled by the number of pixels,
    the rest is constant. PEAK_FACTOR accounts for temporary tensors of the backward pass.

    Args:
        model: The network.
        loss: The loss.
        optimizer: The optimizer, for its state.
        size: (height, width) of the training images.
        precision: Lightning's precision, such as `bf16-mixed`.
        averaged: Whether an average of the weights is kept.
    """
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    momentum = int(optimizer.param_groups[0].get("momentum", 0) > 0)
    adaptive = "betas" in optimizer.param_groups[0]
    slots = 2 if adaptive and not momentum else momentum  # Muon has AdamW state for vectors only
    slots += not (adaptive or isinstance(optimizer, SGD))  # such as the mean square of RMSprop
    side = max(64, model.minimum_size)
    one_image, two_images = (_saved_bytes(model, loss, images, side, precision) for images in (1, 2))
    return Memory(
        weights=parameters * (2 if averaged else 1) + trained * (1 + slots) + 2 * one_image - two_images,
        image=round(PEAK_FACTOR * (two_images - one_image) * size[0] * size[1] / side**2),
    )


def _saved_bytes(model: SegmentationModel, loss: nn.Module, images: int, side: int, precision: str) -> int:
    """Return the bytes that autograd saves for the backward pass of images of side x side."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}  # by the address of their storage, and held so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    training = model.training
    model.eval()  # changes no running statistics and draws no random numbers
    image = torch.zeros(images, model.in_channels, side, side).contiguous(memory_format=torch.channels_last)
    mask = torch.zeros(images, side, side, dtype=torch.int64)
    try:
        with autocast(precision, torch.device("cpu")), saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_sums(loss, model.supervised(image), mask)
    finally:
        model.train(training)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in own)
