"""The keys of `trainer`, in one place that imports no Lightning, so that a config is checked without it."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How a run trains.

    Taken by `make_trainer`:
        max_epochs, max_steps: Training ends at whichever comes first; -1 is no limit of steps.
        accelerator, num_nodes, deterministic: As in Lightning; deterministic refuses operations that may differ from
            run to run.
        devices: Processes of one machine, each with batches of its own; auto is every GPU, or one process on a CPU.
        accumulate: Batches whose gradients make one step; each is as large as dataset.batch_size.
        precision: auto is bf16-mixed where the machine is fast at it, else 32-true.
        gradient_clip: Largest norm of the gradient, None for no clipping.
        validate_every: Epochs between validations.

    Taken by `make_trainer` and `SegmentationTask`:
        norm: Where batch norm takes its statistics in training: `batch`, this process's images; `sync`, the images of
            all processes (accelerators only); `frozen`, nowhere: the running averages stay as they are. The norms of
            frozen parts (`optimizer.part_lr`) are frozen too.

    Taken by `SegmentationTask`:
        ema: Decay of an exponential moving average of the weights, such as 0.999, which is then what is validated and
            used. Running statistics of batch norm are averaged alike, since those of the last steps belong to other
            weights. Over the first steps the decay is smaller, (1 + step) / (10 + step), to forget the start.
        compile: Train through torch.compile; `auto` on GPUs alone, since for a CPU it takes minutes. Checkpoints are
            the same files, and what validates or uses them compiles nothing.
        recompute: Keep only the inputs of each stage and compute it again in the backward pass; see
            `checkpoint_activations`.

    Taken by `Checkpoints`:
        patience: Validations in a row without a better mIoU after which training ends; None for no such end.
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
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    compile: Literal["auto", True, False] = "auto"
    activation_checkpointing: bool = False
    patience: Count | None = None
