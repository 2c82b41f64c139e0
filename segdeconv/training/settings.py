"""The keys of `trainer`, in one place that imports no Lightning, so that a config is checked without it."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """Settings of the trainer.

    Taken by `make_trainer`:
        max_epochs, max_steps: Training ends at whichever comes first; -1 means no limit on steps.
        accelerator, num_nodes, deterministic: As in Lightning; deterministic forbids operations whose results vary
            between runs.
        devices: Number of processes per machine, each with its own batches; auto uses every GPU, or one CPU process.
        accumulate_grad_batches: Batches of dataset.batch_size images per optimizer step.
        precision: auto uses bf16-mixed where the machine supports it well, else 32-true.
        gradient_clip_val: Maximum norm of the gradient; None for no clipping.
        check_val_every_n_epoch: Epochs between validations.

    Taken by `make_trainer` and `SegmentationTask`:
        norm: Statistics of batch norm in training: `batch`, over the images of this process; `sync`, over those of all
            processes (accelerators only); `frozen`, the running averages, which stay unchanged. The norms of frozen
            parts (`optimizer.part_lr`) are frozen too.

    Taken by `SegmentationTask`:
        recalibration_batches: Batches of training samples over which the statistics of batch norm are computed anew
            before each validation; 0 keeps the running averages, which lag behind the weights in short trainings.
        ema: Decay of an exponential moving average of the weights, such as 0.999. Validation and later commands use
            the average. Running statistics of batch norm are averaged too. During the first steps the decay is
            smaller, (1 + step) / (10 + step).
        compile: Train with torch.compile; `auto` on GPUs only, since compilation for a CPU takes minutes. Checkpoints
            are the same, and validation does not compile.
        activation_checkpointing: Keep only the inputs of each stage and compute it again in the backward pass; see
            `checkpoint_activations`.

    Taken by `Checkpoints`:
        patience: Number of validations without a better mIoU after which training ends; None for no early stopping.
    """

    max_epochs: Count = 20
    max_steps: Annotated[int, Field(ge=-1)] = -1
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    devices: int | str = "auto"
    num_nodes: Count = 1
    accumulate_grad_batches: Count = 1
    norm: Literal["batch", "sync", "frozen"] = "batch"
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    gradient_clip_val: Annotated[float, Field(gt=0)] | None = None
    check_val_every_n_epoch: Count = 1
    deterministic: bool = False
    recalibration_batches: Annotated[int, Field(ge=0)] = 0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    compile: Literal["auto", True, False] = "auto"
    activation_checkpointing: bool = False
    patience: Count | None = None
