"""Trying out before training: which learning rate, which batch size."""

import math
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch

from segdeconv.data.loading import collate_training, for_network, training_loader
from segdeconv.errors import UsageError
from segdeconv.losses import loss_sums
from segdeconv.system.devices import autocast
from segdeconv.system.memory import available
from segdeconv.training.memory import estimate
from segdeconv.training.prepare import Prepared

DIVERGED = 4.0  # times the lowest smoothed loss: beyond that there is nothing to learn about learning rates


class Rate(NamedTuple):
    """lr; loss: of its batch; smoothed: over the batches so far, at lower rates."""

    lr: float
    loss: float
    smoothed: float


def try_rates(
    made: Prepared,
    device: torch.device,
    precision: str,
    *,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 100,
    num_workers: int = 0,
) -> list[Rate]:
    """Train one step at each of `steps` rising learning rates, from `lowest` to `highest`, until the loss explodes.

    Smith 2017, section 3.3 (the range test), https://arxiv.org/abs/1506.01186. The network is changed by it.
    """
    made.model.to(device).to(memory_format=torch.channels_last).train()
    made.loss.to(device)
    tried: list[Rate] = []
    average = best = 0.0
    batches = _batches(made, num_workers)
    for step in range(steps):
        lr = lowest * (highest / lowest) ** (step / (steps - 1))
        for group in made.optimizer.param_groups:
            group["lr"] = lr * group["base_lr"] / made.optimizer.defaults["lr"]
        loss = _step(made, next(batches), device, precision)
        average = 0.9 * average + 0.1 * loss if math.isfinite(loss) else math.inf
        smoothed = average / (1 - 0.9 ** (step + 1))
        best = smoothed if step == 0 else min(best, smoothed)
        if not math.isfinite(loss) or smoothed > DIVERGED * best:
            break
        tried.append(Rate(lr, loss, smoothed))
    if len(tried) < 10:
        raise UsageError(
            f"the loss explodes after {len(tried)} steps, at a learning rate of {lr:.1e} - look at the data "
            "(inspect_data) and at dataset.mean and dataset.std"
        )
    return tried


def best_rate(tried: list[Rate]) -> float:
    """Where the smoothed loss falls fastest, per factor of learning rate, before it is lowest."""
    lowest = min(range(len(tried)), key=lambda place: tried[place].smoothed)
    width = max(2, len(tried) // 20)
    places = range(width, min(max(width + 1, lowest - width + 1), len(tried) - width))
    steepest = min(
        places, key=lambda place: tried[place + width].smoothed - tried[place - width].smoothed, default=lowest
    )
    return tried[steepest].lr


class Fit(NamedTuple):
    """batch_size; seconds: of a training step; memory: bytes at its peak, estimated where there is no counter."""

    batch_size: int
    seconds: float
    memory: int


def try_batch_sizes(made: Prepared, device: torch.device, precision: str, *, averaged: bool) -> Iterator[Fit]:
    """Training steps of 1, 2, 4, ... images until memory or the data set ends; yields each size that fits."""
    sample = made.data.samples[0, 0]
    size = sample["mask"].shape
    needed = estimate(made.model, made.loss, made.optimizer, (size[0], size[1]), precision=precision, averaged=averaged)
    made.model.to(device).to(memory_format=torch.channels_last).train()
    made.loss.to(device)
    batch_size = 1
    while batch_size <= len(made.data.train):
        free = available(device)
        if device.type != "cuda" and free is not None and needed.total(batch_size) > 0.8 * free:
            return  # without an accelerator the machine would swap instead of refusing
        batch = collate_training([sample] * batch_size)
        try:
            _step(made, batch, device, precision)  # the first step of a size also makes room for it
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            begun = time.perf_counter()
            for _ in range(2):
                _step(made, batch, device, precision)
            seconds = (time.perf_counter() - begun) / 2
        except torch.OutOfMemoryError:
            return
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            batch_size *= 2  # batch norm needs more than this
            continue
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else needed.total(batch_size)
        yield Fit(batch_size, seconds, peak)
        batch_size *= 2


def _batches(made: Prepared, num_workers: int) -> Iterator[dict[str, Any]]:
    """Training batches without end."""
    for epoch in count():
        yield from training_loader(
            made.data.samples,
            batch_size=made.data.batch_size,
            seed=made.data.seed,
            position=partial(_start_of, epoch),
            num_workers=num_workers,
            timeout=0,
        )


def _start_of(epoch: int) -> tuple[int, int]:
    return epoch, 0


def _step(made: Prepared, batch: dict[str, Any], device: torch.device, precision: str) -> float:
    """One training step; returns the loss."""
    on_device = {name: batch[name].to(device) for name in ("image", "mask")}
    seen = for_network(on_device, made.data.preprocessing)
    with autocast(precision, device):
        total, normaliser = loss_sums(made.loss, made.model.supervised(seen["image"]), seen["mask"])
    loss = total / normaliser.clamp(min=1.0)
    made.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    made.optimizer.step()
    return float(loss.detach())
