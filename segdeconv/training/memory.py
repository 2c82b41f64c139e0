"""An estimate of the memory that training needs."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segdeconv.errors import UsageError, command
from segdeconv.losses import CrossEntropy, loss_sums
from segdeconv.models import SegmentationModel
from segdeconv.system.devices import autocast
from segdeconv.system.memory import ran_out_of_memory, resident

# Beyond the tensors, on a CPU: oneDNN's generated kernels and buffers, and gaps between allocations; docs/lab-notes.md.
CPU_BUFFERS = 150 << 20
CPU_FRAGMENTATION = 1.05


@dataclass(frozen=True)
class Memory:
    """Peak memory of training in one process, in bytes.

    Attributes:
        weights: Parameters, gradients, optimizer state and averaged weights.
        batch: Everything else that a training step allocates for a batch of `batch_size` images.
        batch_size: The number of images.
        program: What the process uses without the network: Python and its libraries. 0 on a GPU.
        without_loss: True if the loss could not be run, so that cross entropy takes its place.
    """

    weights: int
    batch: int
    batch_size: int
    program: int = 0
    without_loss: bool = False

    @property
    def total(self) -> int:
        """The bytes needed in all."""
        return self.weights + self.batch + self.program


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
    batch_size: int,
    device: torch.device,
    precision: str,
    averaged: bool = False,
) -> Memory | None:
    """Estimate the memory of training by running a training step on tensors without data.

    Every operation of the forward and backward pass runs on torch's fake tensors, which have shapes but no memory, and
    the bytes of those alive at the same time are counted. Activation checkpointing, mixed precision and any network are
    thereby included, and any loss in which no shape depends on the data.

    Args:
        model: The network.
        loss: The loss.
        optimizer: The optimizer, for its state.
        size: (height, width) of the training images.
        batch_size: Images per step.
        device: The device that training runs on, whether the network is there already or not.
        precision: Lightning's precision, such as `bf16-mixed`.
        averaged: Whether an average of the weights is kept.

    Returns:
        The estimate; None if shapes in the network depend on the data.
    """
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    momentum = int(optimizer.param_groups[0].get("momentum", 0) > 0)
    adaptive = "betas" in optimizer.param_groups[0]
    slots = 2 if adaptive and not momentum else momentum  # Muon has AdamW state for vectors only
    slots += not (adaptive or isinstance(optimizer, SGD))  # such as the mean square of RMSprop
    on_cpu = device.type == "cpu"
    step = _Step(model, loss, precision)
    peak = _peak_of_step(step, size, batch_size)
    if peak is None:
        return None
    if on_cpu:
        peak = round(CPU_FRAGMENTATION * peak) + CPU_BUFFERS
    return Memory(
        weights=parameters * (2 if averaged else 1) + trained * (1 + slots),
        batch=peak - trained,  # the gradients are part of the step
        batch_size=batch_size,
        program=max(0, resident() - parameters) if on_cpu else 0,
        without_loss=step.failed,
    )


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations return, for as long as the tensors exist.

    Attributes:
        peak: The largest count so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self._now + _workspace(func, args))
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, self._forget(key, size))
            self._now += size

    def _forget(self, key: int, size: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            self._now -= size
            del self._storages[key]

        return forget


def _workspace(func: Any, args: Sequence[Any]) -> int:
    """Return the bytes that a convolution allocates besides its results, as measured with oneDNN.

    The weights are reordered; the gradient of weights in half precision is summed in float32, from a transposed copy of
    a map.
    """
    if func is torch.ops.aten.convolution.default:
        return int(args[1].nbytes)
    if func is torch.ops.aten.convolution_backward.default:
        return int(2 * args[2].nbytes + (args[0].nbytes if args[0].itemsize == 2 else 0))
    return 0


class _Step(nn.Module):
    """A training step without the optimizer.

    Attributes:
        failed: True once the loss could not be run.
    """

    def __init__(self, model: SegmentationModel, loss: nn.Module, precision: str) -> None:
        super().__init__()
        self.model, self.loss, self.precision, self.failed = model, loss, precision, False

    def forward(self, image: Tensor, mask: Tensor) -> None:
        with autocast(self.precision, image.device):
            logits = self.model.supervised(image)
            try:
                total, normaliser = loss_sums(self.loss, logits, mask)
            except RuntimeError:  # such as the shapes of OHEM and Lovász-Softmax, which depend on the data
                self.failed = True
                total, normaliser = loss_sums(CrossEntropy(), logits, mask)
        (total / normaliser).backward()  # type: ignore[no-untyped-call]


def _peak_of_step(step: _Step, size: tuple[int, int], batch_size: int) -> int | None:
    """Return the peak bytes of the tensors of a step, gradients included, parameters and optimizer state not."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # imported late: it takes a second

    model, live = step.model, _LiveBytes()
    device, training = next(model.parameters()).device, model.training
    with FakeTensorMode() as fake:
        state: dict[str, Tensor] = {
            name: fake.from_tensor(tensor) for name, tensor in (*step.named_parameters(), *step.named_buffers())
        }
        image = torch.empty(batch_size, model.in_channels, *size, device=device)
        mask = torch.empty(batch_size, *size, dtype=torch.int64, device=device)
        model.train()
        try:
            with live:
                functional_call(step, state, (image.contiguous(memory_format=torch.channels_last), mask))
        except (RuntimeError, ValueError):  # training itself reports what is wrong, if anything is
            return None
        finally:
            model.train(training)
    return live.peak
