"""The lines that a run prints before training: data, network, optimizer, memory, input."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer

from segdeconv.config import OBJECT, TARGET
from segdeconv.data.loading import worker_settings
from segdeconv.data.module import DataPipeline
from segdeconv.system.memory import available, readable
from segdeconv.training.memory import estimate
from segdeconv.training.task import SegmentationTask


def header(
    config: Mapping[str, Any],
    data: DataPipeline,
    task: SegmentationTask,
    trainer: Trainer,
    run: Path,
    resumed: Path | None,
) -> str:
    """Return the lines that describe a run, one per topic.

    Args:
        config: The checked config.
        data: The data pipeline.
        task: The network, loss and optimizer.
        trainer: The trainer.
        run: The run folder.
        resumed: The checkpoint that the run resumes from.
    """
    size, crop = data.preprocessing.size, config["dataset"]["crop"]
    input_size = f"resized to {size[0]}x{size[1]}" if size else "not resized"
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    frozen = sum(parameter.numel() for parameter in task.model.parameters() if not parameter.requires_grad)
    trained_size = crop or size
    memory = trained_size and estimate(
        task.model,
        task.loss,
        task.optimizer,
        trained_size,
        batch_size=data.batch_size,
        device=trainer.strategy.root_device,
        precision=str(trainer.precision),
        averaged=task.ema is not None,
    )
    free = available(trainer.strategy.root_device)
    network, optimizer = (
        config[group].get(OBJECT, name).rpartition(".")[2]
        for group, name in ((group, config[group][TARGET]) for group in ("model", "optimizer"))
    )
    rows = {
        "data": f"{data.train.kind}: {len(data.train)} train, {len(data.val)} val images, {input_size}"
        + (f", crops of {crop[0]}x{crop[1]}" if crop else "")
        + (f", bands {', '.join(data.train.band_names)}" if data.train.band_names else ""),
        "classes": f"{len(task.classes)}: {', '.join(task.classes.names)}",
        "network": f"{network}, {parameters:,} parameters" + (f", {frozen:,} of them frozen" if frozen else ""),
        "optimizer": f"{optimizer}, learning rate {config['optimizer']['lr']:g}, "
        f"{config['schedule'][TARGET].rpartition('.')[2].lower()}",
        "training": f"{trainer.max_epochs} epoch{'s' * (trainer.max_epochs != 1)}, "
        f"{task.total_steps} step{'s' * (task.total_steps != 1)} of {_batch(data, trainer)} on "
        f"{trainer.strategy.root_device}, precision {trainer.precision}, channels last"
        + (", compiled" if task.compiles(trainer.strategy.root_device) else ", not compiled")
        + (", activation checkpointing" if task.activation_checkpointing else "")
        + _left_out(len(data.train), data.batch_size * trainer.world_size),
        "memory": f"about {readable(memory.total)} per process: {readable(memory.weights)} for weights, gradients and "
        f"optimizer, {readable(memory.batch)} for {data.batch_size} image{'s' * (data.batch_size != 1)}"
        + (f", {readable(memory.program)} for the program" if memory.program else "")
        + (", with cross entropy in place of the loss" if memory.without_loss else "")
        + (f"; {readable(free)} are available" if free else "")
        if memory
        else "",
        "loading": _loading(data, trainer.world_size),
        "run": f"{run}" + (f", resumed from {resumed.name}" if resumed else ""),
    }
    return "\n".join(f"{name + ':':<11}{text}" for name, text in rows.items() if text)


def _left_out(num_images: int, batch: int) -> str:
    """Say how many images the last, incomplete batch of an epoch leaves out."""
    left = num_images % batch
    return f"; {left} of {num_images} images are left out of each epoch, others each time" if left else ""


def _loading(data: DataPipeline, world_size: int) -> str:
    """Describe the loader workers and the cache of decoded images."""
    loader = worker_settings(world_size=world_size, **data.workers)
    workers, ahead = loader["num_workers"], loader["prefetch_factor"]
    loading = f"{workers} worker{'s' if workers > 1 else ''}, {ahead} batches ahead each" if workers else "no workers"
    cache = data.cache_plan
    if cache.kind == "none":
        return f"{loading}; images are decoded every time"
    where = f"on disk in {cache.folder}" if cache.folder else "in memory"
    if cache.needed <= cache.capacity:
        return f"{loading}; decoded images are kept {where}, about {readable(cache.needed)}"
    return (
        f"{loading}; decoded images are kept {where}, {readable(cache.capacity)} of about {readable(cache.needed)}: "
        "the others are decoded every time; dataset.cache_size=GiB"
        + (" or dataset.cache=disk" * (cache.folder is None))
        + " caches more"
    )


def _batch(data: DataPipeline, trainer: Trainer) -> str:
    """Describe the number of images in an optimizer step, and that the learning rate is not scaled by it."""
    factors = {
        "processes": trainer.world_size,
        "batches": trainer.accumulate_grad_batches,
    }
    several = [f"{count} {name}" for name, count in factors.items() if count > 1]
    images = f"{data.batch_size} images"
    if not several:
        return images
    total = data.batch_size * math.prod(factors.values())
    return f"{total} images ({' x '.join([*several, images])}; the learning rate is not scaled by them)"
