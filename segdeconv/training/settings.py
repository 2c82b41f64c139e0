"""The keys of `trainer`, in one place that imports no Lightning, so that a config is checked without it."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Batches = Count | Annotated[float, Field(gt=0, le=1)]  # a number, or a fraction of an epoch

# Arguments of Lightning's Trainer that are no keys of a run, and what to use instead.
INSTEAD = {
    "callbacks": "choose callbacks=NAME, or write callbacks.NAME._target_=CLASS",
    "logger": "choose logger=NAME",
    "strategy": "set trainer.devices and trainer.num_nodes; several processes use DDP",
    "sync_batchnorm": "set trainer.norm=sync",
    "max_time": "set max_time=8h",
    "gradient_clip_algorithm": "the gradient is clipped by its norm, see trainer.gradient_clip_val",
    "val_check_interval": "set trainer.check_val_every_n_epoch; a run validates at the end of epochs",
    "limit_predict_batches": "a run has no predict loop; `predict` takes the images to predict",
    "num_sanity_val_steps": "set trainer.fast_dev_run=true for a short trial of all steps",
    "enable_checkpointing": "a run always writes its checkpoints; trainer.fast_dev_run=true writes none",
    "default_root_dir": "set hydra.run.dir",
    "benchmark": "cuDNN's choice would differ between runs; trainer.compile=true is faster",
}


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
        check_val_every_n_epoch: Epochs between validations; the last epoch has one in any case.
        limit_train_batches, limit_val_batches: Batches of an epoch and of a validation in each process, or a fraction
            of them; 1 is one batch, 1.0 all, and 0 leaves validation out. The scores after training are those of all
            images.
        limit_test_batches: The same for a test, which a run does not have.
        fast_dev_run: Train and validate on that many batches, to find errors, and write nothing; true is one batch.
        log_every_n_steps: Steps between those at which callbacks that log steps do so.
        profiler: Write Lightning's profile of the run to the file fit-profile.txt: simple, advanced, pytorch, or a node
            with the `_target_` of a profiler.
        plugins: Nodes with the `_target_` of Lightning plugins, such as cluster environments.

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

    Taken by `make_trainer` and `DataModule`:
        overfit_batches: Batches, or a fraction of an epoch, that every epoch repeats with the same augmentation, and of
            a validation: a network that cannot learn them has an error. 0 trains on all.

    Taken by `train`:
        enable_progress_bar: Whether to show the progress of training.

    Taken by `Checkpoints`:
        patience: Number of validations without a better mIoU after which training ends; None for no early stopping.
        keep: Number of checkpoints kept at ends of epochs, spaced evenly over the run, from which `verify` repeats
            steps: at most so many, and at least half. auto keeps three, or as many as fit into 2 GiB together; 0 none.
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
    keep: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    limit_train_batches: Batches = 1.0
    limit_val_batches: Batches | Literal[0] = 1.0
    limit_test_batches: Batches | Literal[0] = 1.0
    overfit_batches: Batches | Literal[0] = 0
    fast_dev_run: bool | Count = False
    log_every_n_steps: Count = 50
    enable_progress_bar: bool = True
    profiler: Literal["simple", "advanced", "pytorch"] | dict[str, Any] | None = None
    plugins: list[dict[str, Any]] | None = None

    @property
    def train_batches(self) -> int | float:
        """Batches of an epoch, or a fraction of them, after all limits."""
        return int(self.fast_dev_run) or self.overfit_batches or self.limit_train_batches

    @property
    def val_batches(self) -> int | float:
        """Batches of a validation, or a fraction of them, after all limits."""
        return int(self.fast_dev_run) or self.overfit_batches or self.limit_val_batches
