"""Search for a learning rate and a batch size before training."""

import math
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch

from segdeconv.data.loading import collate_training, training_loader
from segdeconv.errors import UsageError
from segdeconv.system.memory import available, peak
from segdeconv.training.autoconfig import run_step
from segdeconv.training.memory import estimate
from segdeconv.training.prepare import Prepared

DIVERGED = 4.0  # times the lowest smoothed loss, at which the range test ends


class Rate(NamedTuple):
    """A learning rate of the range test, with the loss of its batch and the smoothed loss up to it."""

    lr: float
    loss: float
    smoothed: float


def try_rates(
    prepared: Prepared,
    device: torch.device,
    precision: str,
    *,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 100,
    num_workers: int = 0,
) -> list[Rate]:
    """Run a learning rate range test: one training step at each of `steps` rising rates, until the loss diverges.

    Smith 2017, section 3.3, https://arxiv.org/abs/1506.01186. The test changes the network.

    Args:
        prepared: Network, loss, optimizer and data.
        device: The device to train on.
        precision: Lightning's precision, such as `bf16-mixed`.
        lowest: First learning rate.
        highest: Last learning rate.
        steps: Number of rates, evenly spaced on a logarithmic scale.
        num_workers: Loader workers.

    Raises:
        UsageError: The loss diverges within ten steps.
    """
    prepared.model.to(device).to(memory_format=torch.channels_last).train()
    prepared.loss.to(device)
    rates: list[Rate] = []
    average = best = 0.0
    batches = _batches(prepared, num_workers)
    for step in range(steps):
        lr = lowest * (highest / lowest) ** (step / (steps - 1))
        for group in prepared.optimizer.param_groups:
            group["lr"] = lr * group["base_lr"] / prepared.optimizer.defaults["lr"]
        loss = _step(prepared, next(batches), device, precision)
        average = 0.9 * average + 0.1 * loss if math.isfinite(loss) else math.inf
        smoothed = average / (1 - 0.9 ** (step + 1))
        best = smoothed if step == 0 else min(best, smoothed)
        if not math.isfinite(loss) or smoothed > DIVERGED * best:
            break
        rates.append(Rate(lr, loss, smoothed))
    if len(rates) < 10:
        raise UsageError(
            f"the loss diverges after {len(rates)} steps, at a learning rate of {lr:.1e} - check the data "
            "(inspect_data), dataset.mean and dataset.std"
        )
    return rates


def best_rate(rates: list[Rate]) -> float:
    """Return the learning rate at which the smoothed loss falls fastest, before its minimum."""
    lowest = min(range(len(rates)), key=lambda index: rates[index].smoothed)
    width = max(2, len(rates) // 20)
    indices = range(width, min(max(width + 1, lowest - width + 1), len(rates) - width))
    steepest = min(
        indices, key=lambda index: rates[index + width].smoothed - rates[index - width].smoothed, default=lowest
    )
    return rates[steepest].lr


class Fit(NamedTuple):
    """A batch size that fits, with the seconds of a training step and its peak memory in bytes (estimated on a CPU)."""

    batch_size: int
    seconds: float
    memory: int


def try_batch_sizes(prepared: Prepared, device: torch.device, precision: str, *, averaged: bool) -> Iterator[Fit]:
    """Run training steps of 1, 2, 4, ... images until memory or the data set is exhausted.

    Args:
        prepared: Network, loss, optimizer and data.
        device: The device to train on.
        precision: Lightning's precision, such as `bf16-mixed`.
        averaged: Whether an average of the weights is kept.

    Yields:
        Each batch size that fits.
    """
    sample = prepared.data.samples[0, 0]
    size = sample["mask"].shape
    needed = partial(
        estimate,
        prepared.model,
        prepared.loss,
        prepared.optimizer,
        (size[0], size[1]),
        device=device,
        precision=precision,
        averaged=averaged,
    )
    prepared.model.to(device).to(memory_format=torch.channels_last).train()
    prepared.loss.to(device)
    batch_size = 1
    while batch_size <= len(prepared.data.train):
        free = available(device)
        memory = None if device.type == "cuda" else needed(batch_size=batch_size)
        if memory is not None and free is not None and memory.total - memory.program > 0.8 * free:
            return  # a CPU would swap instead of failing
        batch = collate_training([sample] * batch_size)
        try:
            _step(prepared, batch, device, precision)  # the first step also allocates memory
            peak(reset=True)
            start = time.perf_counter()
            for _ in range(2):
                _step(prepared, batch, device, precision)
            seconds = (time.perf_counter() - start) / 2
        except torch.OutOfMemoryError:
            return
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            batch_size *= 2  # batch norm needs more values
            continue
        yield Fit(batch_size, seconds, peak())
        batch_size *= 2


def _batches(prepared: Prepared, num_workers: int) -> Iterator[dict[str, Any]]:
    """Yield training batches without end."""
    for epoch in count():
        yield from training_loader(
            prepared.data.samples,
            batch_size=prepared.data.batch_size,
            seed=prepared.data.seed,
            position=partial(_start_of, epoch),
            num_workers=num_workers,
            timeout=0,
        )


def _start_of(epoch: int) -> tuple[int, int]:
    return epoch, 0


def _step(prepared: Prepared, batch: dict[str, Any], device: torch.device, precision: str) -> float:
    """Run one training step and return the loss."""
    return run_step(
        prepared.model, prepared.loss, prepared.optimizer, batch, prepared.data.preprocessing, device, precision
    )
