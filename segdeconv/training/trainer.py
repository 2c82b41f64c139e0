"""How a run runs: Lightning's Trainer, its checkpoints, and going on exactly where it stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pydantic import Field
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import Logger

from segdeconv.data.module import DataModule
from segdeconv.errors import UsageError
from segdeconv.system.devices import fast_precision
from segdeconv.training.checkpointing import Checkpoints, Count, VerifiedCheckpoints
from segdeconv.training.processes import Processes, count_processes, quieten


def make_trainer(
    run: Path,
    callbacks: list[Callback],
    logger: Logger | Literal[False],
    *,
    max_epochs: Count = 20,
    max_steps: Annotated[int, Field(ge=-1)] = -1,
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto",
    devices: int | str = "auto",
    num_nodes: Count = 1,
    accumulate: Count = 1,
    norm: Literal["batch", "sync", "frozen"] = "batch",
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto",
    gradient_clip: Annotated[float, Field(gt=0)] | None = None,
    validate_every: Count = 1,
    deterministic: bool = False,
) -> Trainer:
    """Lightning's Trainer with what this project needs and nothing that talks.

    max_epochs, max_steps: training ends at whichever comes first; -1 is no limit of steps.
    devices: processes of one machine, each with batches of its own; auto is every GPU, or one process on a CPU.
    accumulate: batches whose gradients make one step; each is as large as dataset.batch_size.
    norm: see SegmentationTask.
    precision: auto is bf16-mixed where the machine is fast at it, else 32-true.
    gradient_clip: largest norm of the gradient, None for no clipping.
    validate_every: epochs between validations. deterministic: refuse operations that may differ from run to run.
    """
    quieten()
    if accelerator == "auto" and not torch.cuda.is_available():
        accelerator = "mps" if torch.backends.mps.is_available() else "cpu"
    if accelerator == "cpu" and devices == "auto":
        devices = 1
    if norm == "sync" and accelerator == "cpu":
        raise UsageError(
            "trainer.norm=sync: torch synchronises batch norm on accelerators only - on a CPU use trainer.norm=batch "
            "(each process its own statistics) or trainer.norm=frozen"
        )
    try:
        return Trainer(
            default_root_dir=run,
            accelerator=accelerator,
            strategy=Processes() if count_processes(accelerator, devices, num_nodes) > 1 else "auto",
            accumulate_grad_batches=accumulate,
            sync_batchnorm=norm == "sync",
            devices=devices,
            num_nodes=num_nodes,
            precision=fast_precision() if precision == "auto" else precision,  # type: ignore[arg-type]
            max_epochs=max_epochs,
            max_steps=max_steps,
            gradient_clip_val=gradient_clip,
            check_val_every_n_epoch=validate_every,
            deterministic=deterministic,
            callbacks=callbacks,
            logger=logger,
            plugins=[VerifiedCheckpoints()],
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # our sampler slices by rank itself
            enable_checkpointing=any(isinstance(callback, Checkpoints) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except MisconfigurationException as error:
        raise UsageError(f"trainer: {error} - change trainer.accelerator or trainer.devices") from error


def count_steps(data: DataModule, trainer: Trainer) -> int:
    """Optimizer steps of the whole run."""
    data.trainer = trainer
    assert trainer.max_epochs is not None
    steps = math.ceil(data.batches_per_epoch / trainer.accumulate_grad_batches) * trainer.max_epochs
    return min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps
