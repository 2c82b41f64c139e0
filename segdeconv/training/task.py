"""The Lightning module: loss, scores, learning rate, and the content of checkpoints."""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.distributed
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from segdeconv import __version__
from segdeconv.checkpoints import checkpoint as checkpoints
from segdeconv.checkpoints.checkpoint import FORMAT, without_measurements
from segdeconv.classes import Classes
from segdeconv.config import ABSENT, TARGET, build, written
from segdeconv.data.class_file import indexed_classes
from segdeconv.data.loading import collate_training
from segdeconv.data.module import IMAGENET_MEAN, IMAGENET_STD, DataPipeline
from segdeconv.data.preprocessing import Preprocessing
from segdeconv.data.sampler import StatelessBatches
from segdeconv.errors import CheckpointError, DivergedError, UsageError, did_you_mean, warn
from segdeconv.evaluation.metrics import ConfusionMatrix, Scores, scores
from segdeconv.inference.network import Network
from segdeconv.inference.scorers import labels, resized
from segdeconv.losses import build_loss, loss_sums
from segdeconv.models import SegmentationModel, build_model
from segdeconv.models.activation_checkpointing import checkpoint_activations
from segdeconv.models.instance_batch_norm import has_instance_statistics, set_instance_statistics
from segdeconv.optimization import Schedule, average, build_optimizer
from segdeconv.switches.modules import SoftMaxPool
from segdeconv.switches.ops import load_triton_kernels
from segdeconv.system.devices import autocast, machine
from segdeconv.system.memory import keep_freed
from segdeconv.system.seeding import key
from segdeconv.training.arguments import read_arguments
from segdeconv.training.batches import as_batch, check_batch
from segdeconv.training.batchnorm_recalibration import recompute_statistics
from segdeconv.training.config_check import check_config
from segdeconv.training.lightning_internals import expect_equal_values
from segdeconv.training.own_callbacks import require_suitable
from segdeconv.training.processes import summed
from segdeconv.training.settings import TrainerSettings
from segdeconv.training.step_loss import LOWER, StepLoss

# Sums over pixels are divided by this before the backward pass, so that float16 can represent their gradients; a power
# of two, so that no rounding occurs.
UNIT = 2.0**18

TASK_KEYS = ("model", "loss", "optimizer", "schedule", "trainer", "seed")  # of a config


class Results(NamedTuple):
    """Results of one split.

    Attributes:
        loss: Mean loss over the pixels.
        scores: The scores.
        confusion: (C, C) counts from which the scores are computed, rows are truth.
    """

    loss: float
    scores: Scores
    confusion: np.ndarray


def scalars(split: str, results: Results | None, classes: Classes) -> dict[str, float]:
    """Return the loss and scores of a split by their names in metrics.csv, such as `val/miou`.

    Args:
        split: The first part of the names.
        results: The results; None gives the same names with NaN, so that metrics.csv has the same columns in every
            epoch.
        classes: The classes.
    """
    loss = results.loss if results else float("nan")
    values = results.scores if results else scores(np.zeros((len(classes), len(classes)), dtype=np.int64))
    return {
        f"{split}/loss": loss,
        f"{split}/miou": values.miou,
        f"{split}/pixel_accuracy": values.pixel_accuracy,
        f"{split}/mean_accuracy": values.mean_accuracy,
        f"{split}/frequency_weighted_iou": values.frequency_weighted,
    } | {f"{split}/iou/{name}": float(values.iou[index]) for index, name in enumerate(classes.names)}


class SegmentationTask(LightningModule):
    """Trains a network with a loss and an optimizer, in a run of `train` or in a Trainer of the user.

    Batches are those of `DataModule`, or of any DataLoader of (image, mask): image (N, C, H, W), normalised float32 or
    uint8 as stored, and mask (N, H, W), class indices or ignore_index. `trainer.predict` returns (N, H, W) uint8 class
    indices for each batch.

    Args:
        model: The network.
        loss: A `PixelLoss`, or a module from (logits, mask) to a scalar.
        optimizer: An optimizer of the network's parameters.
        schedule: Factor on the learning rate by step.
        classes: The classes of the data set, their names, or a mapping between names and class indices.
        seed: Seed of dropout and other random operations, together with the step.
        total_steps: Optimizer steps of the whole run, for the schedule; None for those of the Trainer.
        metadata: Config and metadata of the data, as plain data for checkpoints; None for checkpoints that only
            Lightning reads. `from_config` supplies it.
        settings: The settings of the trainer.
        log_to_loggers: Whether `self.log` passes the scores to the trainer's loggers too, not only to callbacks.

    Attributes:
        lr: Learning rate of the first parameter group in the last step.

    Raises:
        UsageError: An argument has the wrong type, or two settings exclude each other.
    """

    averaged: SegmentationModel | None
    restores_options = True  # of the optimizer, such as weight_decay; else those of a checkpoint are left out
    validation_network: Network | None = None  # during a validation

    def __init__(
        self,
        model: SegmentationModel,
        loss: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule,
        classes: Classes | Sequence[str] | Mapping[Any, Any],
        *,
        seed: int = 0,
        total_steps: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        settings: TrainerSettings | None = None,
        log_to_loggers: bool = True,
    ) -> None:
        super().__init__()
        settings = settings or TrainerSettings()
        if not isinstance(model, SegmentationModel):
            raise UsageError(
                f"model is a {type(model).__name__}, not a segdeconv.models.SegmentationModel - give it to "
                "SegmentationTask.from_config({'model': model}, classes), or inherit from that class"
            )
        if not isinstance(optimizer, Optimizer):
            raise UsageError(f"optimizer is a {type(optimizer).__name__} - give an optimizer of model.parameters()")
        named = indexed_classes(classes)
        if len(named) != model.num_classes:
            raise UsageError(f"{len(named)} classes are given, but the network has {model.num_classes} - give all")
        facts = (metadata or {}).get("facts", {})
        if has_instance_statistics(model) and not facts.get("instance_statistics"):  # its checkpoints would lack them
            set_instance_statistics(model, {})
            warn("the instance statistics of the network are left out: add them after training with calibrate")
        for group in optimizer.param_groups:
            group.setdefault("base_lr", group["lr"])
        if settings.compile is True and settings.activation_checkpointing:
            raise UsageError(
                "trainer.compile=true and trainer.activation_checkpointing=true: torch.compile chooses by itself what "
                "to recompute - set only one of them"
            )
        self.model = model.to(memory_format=torch.channels_last)
        self.loss = loss
        self.optimizer, self.schedule = optimizer, schedule
        self.classes, self.seed, self.metadata = named, seed, dict(metadata or {})
        # Those of the Trainer are known when it begins to fit.
        self.total_steps, self._steps_of_trainer = total_steps or 0, total_steps is None
        self.log_to_loggers = log_to_loggers
        self.lr: float = optimizer.param_groups[0]["lr"]
        self.norm, self.ema, self.recalibration_batches = settings.norm, settings.ema, settings.recalibration_batches
        self.compilation, self.activation_checkpointing = settings.compile, settings.activation_checkpointing
        if self.activation_checkpointing:
            checkpoint_activations(self.model)
        self._supervised: Callable[[Tensor], tuple[Tensor, ...]] = self.model.supervised
        self.averaged = copy.deepcopy(model).requires_grad_(False) if self.ema is not None else None
        self.train_matrix = ConfusionMatrix(len(named), named.ignore_index)
        self.val_matrix = ConfusionMatrix(len(named), named.ignore_index)
        self.step_loss = StepLoss()
        self.val_sums: list[Tensor] = []  # [sum, normaliser] of the loss on each of this process's validation images
        self._results: dict[str, Results] = {}
        self._validated = False
        self.train()  # Lightning keeps the modes of the modules

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        classes: Classes | Sequence[str] | Mapping[Any, Any],
        *,
        preprocessing: Preprocessing | None = None,
        total_steps: int | None = None,
    ) -> Self:
        """Build a task from groups of a config, for a Trainer and data loaders of the user.

        Its checkpoints are read by `load_from_checkpoint`, `segdeconv.load` and the commands.

        Args:
            config: Any of the groups model, loss, optimizer, schedule and trainer (of which `TrainerSettings` names
                the keys that a task takes), and `seed`. A group is the name of a file in configs/, a class, a mapping
                or an object, as in `segdeconv.train.train`.
            classes: The classes of the data set, their names, or a mapping between names and class indices.
            preprocessing: How images of the data set are normalised; by default as 8-bit RGB with the mean and standard
                deviation of ImageNet.
            total_steps: Optimizer steps of the whole run, for the schedule; None for those of the Trainer.

        Raises:
            UsageError: A key is unknown or its value invalid.
        """
        for name in config:
            if name not in TASK_KEYS:
                raise UsageError(f"unknown key {name} of a task - {did_you_mean(str(name), TASK_KEYS)}")
        named = indexed_classes(classes)
        checked = check_config(read_arguments(config, {}).config)
        preprocessing = preprocessing or Preprocessing(None, IMAGENET_MEAN, IMAGENET_STD)
        kept = {name: checked[name] for name in TASK_KEYS}
        torch.manual_seed(checked["seed"])
        model = build_model(checked["model"], len(named), preprocessing.channels)
        return cls.built(
            model,
            kept,
            {"dataset": {"size": preprocessing.size}, **written(kept)},
            {
                "classes": named.to_dict(),
                "preprocessing": preprocessing.to_dict(),
                "class_weights": None,
                "precision": "32-true",
            },
            total_steps=total_steps,
        )

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: torch.device | str | None = None,
        *,
        trust: Collection[str] = (),
        **arguments: Any,
    ) -> Self:
        """Read the task of a checkpoint, as the commands read it: verified, and without running code from the file.

        Args:
            checkpoint_path: A .ckpt file of a run or of a task of `from_config`, a run folder, `latest`, a .safetensors
                file with its card, or the name of a shipped network.
            map_location: The device for the task; None for the CPU.
            trust: Names of classes that the checkpoint may use beside those of segdeconv.
            **arguments: Arguments of Lightning's method, of which none applies.

        Raises:
            CheckpointError: The file is damaged, or not a checkpoint of segdeconv, or names a class that is not
                trusted.
            UsageError: The path does not exist, or an argument does not apply.
        """
        if set_arguments := sorted(name for name, value in arguments.items() if value is not None):
            raise UsageError(
                f"SegmentationTask.load_from_checkpoint takes no {', '.join(set_arguments)}: the checkpoint describes "
                "its network and loss, and is always read with weights_only - leave it out"
            )
        source = checkpoints.read(checkpoint_path, trust=trust)
        model = source.model()
        nodes: dict[str, Any] = {name: source.config[name] for name in TASK_KEYS if name in source.config}
        for group in ("loss", "optimizer"):  # not needed to predict
            if isinstance(nodes.get(group), Mapping) and nodes[group].get(TARGET) == ABSENT:
                warn(f"{source.path} has no {group}, which was an object of a program; the task has the default one")
                del nodes[group]
        settings = nodes.get("trainer")
        if isinstance(settings, Mapping):  # versions to come may have more
            nodes["trainer"] = {name: value for name, value in settings.items() if name in vars(TrainerSettings())}
        try:
            task = cls.built(model, check_config(nodes), source.config, source.facts)
            state = task.state_dict()
            state |= {name: value for name, value in source.content["state_dict"].items() if name in state}
            task.load_state_dict(state)
        except (UsageError, RuntimeError, OverflowError, MemoryError) as error:
            reason = " ".join(str(error).partition(" - ")[0].split())
            raise CheckpointError(
                f"{source.path} does not describe a task that can be built ({reason}) - use another copy"
            ) from error
        return task if map_location is None else task.to(map_location)

    @classmethod
    def built(
        cls,
        model: SegmentationModel,
        checked: Mapping[str, Any],
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
        *,
        total_steps: int | None = None,
        settings: TrainerSettings | None = None,
        log_to_loggers: bool = True,
    ) -> Self:
        """Build the loss, optimizer and schedule of checked nodes for a network, with a config and metadata to save.

        Without `settings`, those of the nodes apply.
        """
        classes = Classes.from_dict(facts["classes"])
        return cls(
            model,
            build_loss(checked["loss"], class_weights=facts.get("class_weights"), ignore_index=classes.ignore_index),
            build_optimizer(checked["optimizer"], model),
            build(checked["schedule"], "schedule"),
            classes,
            seed=checked["seed"],
            total_steps=total_steps,
            metadata={"config": dict(config), "facts": dict(facts)},
            settings=settings or TrainerSettings(**checked["trainer"]),
            log_to_loggers=log_to_loggers,
        )

    @property
    def preprocessing(self) -> Preprocessing | None:
        """The preprocessing of the metadata, which normalises batches of uint8 images; None without metadata."""
        facts = self.metadata.get("facts")
        return None if facts is None else Preprocessing.from_dict({**facts["preprocessing"], "size": None})

    def forward(self, image: Tensor) -> Tensor:
        """Compute the (N, num_classes, H, W) logits of (N, C, H, W) normalised images with `network`."""
        logits: Tensor = self.network(image)
        return logits

    @property
    def network(self) -> SegmentationModel:
        """The network to validate and to use: the averaged weights if there are any."""
        return self.model if self.averaged is None else self.averaged

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for frozen norms and the averaged weights."""
        super().train(mode)
        for module in self.model.modules():
            frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
            if isinstance(module, _BatchNorm) and (self.norm == "frozen" or frozen):
                module.eval()
        if self.averaged is not None:
            self.averaged.eval()
        return self

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer

    def compiles(self, device: torch.device) -> bool:
        """Return whether training on this device uses torch.compile."""
        if self.compilation == "auto":
            return (
                not self.activation_checkpointing and device.type == "cuda" and load_triton_kernels(device) is not None
            )
        return self.compilation

    def on_fit_start(self) -> None:
        require_suitable(self.trainer.callbacks)  # type: ignore[attr-defined]
        if self._steps_of_trainer:
            steps = self.trainer.estimated_stepping_batches
            if not math.isfinite(steps):
                raise UsageError("the schedule needs the number of steps - give the Trainer max_epochs or max_steps")
            self.total_steps = int(steps)
        if self.recalibration_batches and self._pipeline is None:
            raise UsageError("recalibration_batches needs segdeconv's DataModule - set task.recalibration_batches = 0")
        if self.metadata:
            self.metadata = {**self.metadata, "facts": without_measurements(self.metadata["facts"])}
        if not self.activation_checkpointing:  # kept memory is fragmented: up to a third more at the peak
            keep_freed(self.device)
        if self.compiles(self.device):
            # The method, not the module: compiling the module would rename the parameters in checkpoints.
            self._supervised = torch.compile(self.model.supervised)
        self.train_matrix.to(self.device)
        self.val_matrix.to(self.device)

    def on_train_start(self) -> None:
        self._set_learning_rate(self.global_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Random numbers and schedule depend on the step alone, so that a resumed run repeats them.
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(key(self.seed, "step", self.global_step, micro_batch, self.global_rank))
        self._set_learning_rate(self.global_step)
        for module in self.model.modules():
            if isinstance(module, SoftMaxPool):
                module.set_progress(self.global_step / self.total_steps)
        self.lr = self.optimizer.param_groups[0]["lr"]

    def _set_learning_rate(self, step: int) -> None:
        """Set the learning rates of a step; those of the last step stay when there is no further one."""
        if step < self.total_steps:
            factor = self.schedule(step, self.total_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor

    @property
    def _pipeline(self) -> DataPipeline | None:
        """The pipeline of segdeconv's data module; None for data of the user."""
        pipeline = getattr(self.trainer.datamodule, "pipeline", None)  # type: ignore[attr-defined]
        return pipeline if isinstance(pipeline, DataPipeline) else None

    def _for_network(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Return a batch as the network needs it, on the device of the batch, after checks of data of the user."""
        if self._pipeline is not None and isinstance(batch, dict) and "name" in batch:
            parts = dict(batch)
        else:
            parts = as_batch(batch, batch_idx, masks=not self.trainer.predicting)
            # Reading the values of a mask waits for a GPU, so training reads only those of the first batch.
            waits = self.device.type != "cpu" and self.trainer.training and batch_idx > 0
            check_batch(parts, self.classes, self.model.in_channels, self.preprocessing, values=not waits)
        image, mask = parts["image"], parts.get("mask")
        if image.dtype == torch.uint8 and (preprocessing := self.preprocessing) is not None:
            image = preprocessing.normalised(image)
        # Lightning casts neither what is normalised here, nor batches of other types than those of the precision.
        parts["image"] = image.to(next(self.model.parameters()).dtype)
        if isinstance(mask, Tensor):
            parts["mask"] = mask.long()
        return parts

    def on_train_epoch_start(self) -> None:
        self.reset("train")  # not when an epoch resumes, whose counts were restored

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = self._for_network(batch, batch_idx)
        maps = self._forward(batch["image"])
        total, normaliser = loss_sums(self.loss, maps, batch["mask"])
        self.train_matrix.update(maps[0].detach().argmax(dim=1), batch["mask"])
        self.step_loss.add(total, normaliser, batch["name"])
        # This undoes Lightning's division by the number of micro-batches; see on_before_optimizer_step.
        return total * (self.trainer.accumulate_grad_batches / UNIT)

    def _forward(self, image: Tensor) -> tuple[Tensor, ...]:
        self.model.check_input(image)
        try:
            return self._supervised(image)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise UsageError(
                    f"batch norm has a single value per channel in a batch of {len(image)} - raise dataset.batch_size "
                    "or dataset.crop, or set trainer.norm=frozen"
                ) from error
            raise

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Scale the gradient of the summed loss to that of its mean over all micro-batches and processes."""
        sums = self.step_loss.reduce(self.trainer, self.lr)
        # Gradients are averaged over processes, so their sum is world_size times as large.
        scale = torch.where(sums[1] > 0, UNIT * self.trainer.world_size / sums[1], 0.0)
        torch._foreach_mul_([parameter.grad for parameter in self.parameters() if parameter.grad is not None], scale)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Callbacks, such as LearningRateMonitor, read the rates before `on_train_batch_start` of this module is called.
        self._set_learning_rate(self.global_step + 1)
        if self.averaged is not None and self.ema is not None:
            average(self.averaged, self.model, decay=min(self.ema, (1 + self.global_step) / (10 + self.global_step)))

    def on_validation_start(self) -> None:
        self._begin_validation(recompute=self.trainer.state.fn == "fit" and not self.trainer.sanity_checking)

    def on_test_start(self) -> None:
        self._begin_validation(recompute=False)

    def _begin_validation(self, *, recompute: bool) -> None:
        self.step_loss.sync_loss()
        self.reset("val")
        self.val_matrix.to(self.device)
        self._validated = True
        if recompute:
            self._recompute_statistics()
        # Running statistics differ between processes; those of the first process are saved.
        if self.trainer.world_size > 1:
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, 0)
        self._prepare_network()

    def _prepare_network(self) -> None:
        # The same preparation as in evaluate, so that both give the same scores.
        self.validation_network = Network(self.network, self.device, str(self.trainer.precision))

    def _recompute_statistics(self) -> None:
        """Compute the statistics of batch norm over the first batches of the epoch, if the settings ask for it.

        They depend on the weights, the seed and the epoch alone, and training does not use them, so that a resumed run
        repeats them.
        """
        pipeline = self._pipeline
        trained = {
            name
            for name, module in self.model.named_modules()
            if isinstance(module, _BatchNorm) and any(p.requires_grad for p in module.parameters(recurse=False))
        }
        if not self.recalibration_batches or self.norm == "frozen" or not trained or pipeline is None:
            return
        order = StatelessBatches(
            len(pipeline.samples),
            pipeline.batch_size,
            seed=self.seed,
            position=lambda: (self.current_epoch, 0),
            locality=pipeline.samples.dataset.locality,
        )

        def batches() -> Iterator[Tensor]:
            for samples in islice(order, self.recalibration_batches):
                batch = collate_training([pipeline.samples[sample] for sample in samples])
                yield pipeline.preprocessing.normalised(batch["image"].to(self.device))

        def forward(images: Tensor) -> None:
            with autocast(str(self.trainer.precision), self.device):
                self.network(images)

        norms = {name: module for name, module in self.network.named_modules() if isinstance(module, _BatchNorm)}
        recompute_statistics([norms[name] for name in sorted(trained)], forward, batches())

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self._log("val")

    def on_test_epoch_end(self) -> None:
        self._log("test")

    def on_train_epoch_end(self) -> None:
        self._log("train")

    def _log(self, split: Literal["train", "val", "test"]) -> None:
        """Pass the results of a split to callbacks, as `trainer.callback_metrics`, under the names of metrics.csv.

        They are computed once per epoch from sums over all processes, so that every process logs the same value, and no
        process waits for another.
        """
        expect_equal_values()
        results = self.results("train" if split == "train" else "val")
        for name, value in scalars(split, results, self.classes).items():
            # In float64, to the last bit; on the host, since logging would otherwise copy each to the device.
            number = torch.tensor(value, dtype=torch.float64)
            self.log(name, number, logger=self.log_to_loggers, prog_bar=name in ("train/loss", "val/loss", "val/miou"))

    def on_validation_end(self) -> None:
        self.validation_network = None
        if self.trainer.sanity_checking:
            self.reset("val")

    def on_test_end(self) -> None:
        self.validation_network = None

    def on_predict_start(self) -> None:
        self._prepare_network()

    def on_predict_end(self) -> None:
        self.validation_network = None

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return (N, H, W) uint8 class indices, on the CPU; a batch may be the images alone."""
        assert self.validation_network is not None
        image = self._for_network(batch, batch_idx)["image"]
        size = (image.shape[2], image.shape[3])
        return labels(self.validation_network.logits(image), size).cpu()

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, list[np.ndarray]]:
        """Count the pixels of a test batch as those of a validation."""
        return self.validation_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, list[np.ndarray]]:
        """Count the stored pixels, as evaluate does, and return the predicted masks for logging."""
        assert self.validation_network is not None
        batch = self._for_network(batch, batch_idx)
        logits = self.validation_network.logits(batch["image"])
        predictions = []
        for position, mask in enumerate(batch["mask"]):
            size = (mask.shape[0], mask.shape[1])
            resized_logits = resized(logits[position : position + 1], size)
            self.val_sums.append(torch.stack(loss_sums(self.loss, resized_logits, mask[None].long())))
            prediction = labels(resized_logits, size)[0]
            self.val_matrix.update(prediction, mask)
            predictions.append(prediction.cpu().numpy())
        return {"predictions": predictions}

    def results(self, split: Literal["train", "val"]) -> Results | None:
        """Return the results of a split since `reset`, over all processes; None if there was no validation.

        Every process has to call this, since it is a collective operation.
        """
        if split == "val" and not self._validated:
            return None
        self.step_loss.sync_loss()
        if split not in self._results:
            matrix = self.train_matrix if split == "train" else self.val_matrix
            confusion = summed(self.trainer, matrix.counts).cpu().numpy()
            total, normaliser = self.step_loss.sums
            if split == "val":
                sums = torch.stack([*self.val_sums, torch.zeros(2, device=self.device)]).cpu().double().sum(dim=0)
                total, normaliser = summed(self.trainer, sums.float().to(self.device)).tolist()
            self._results[split] = Results(total / normaliser if normaliser else 0.0, scores(confusion), confusion)
        return self._results[split]

    def reset(self, split: Literal["train", "val"]) -> None:
        """Reset the loss and the counts of a split for a new epoch."""
        self._results.pop(split, None)
        if split == "train":
            self.train_matrix.reset()
            self.step_loss.reset()
        else:
            self.val_matrix.reset()
            self.val_sums = []
            self._validated = False

    def _require_finite(self) -> None:
        """Raise DivergedError if a weight is not finite, which can happen with a finite loss."""
        for name, tensor in self.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise DivergedError(
                    f"{name} is not finite after step {self.global_step} with learning rate "
                    f"{self.lr:.3g} on {', '.join(self.step_loss.names[:4])} - {LOWER}"
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.step_loss.sync_loss()
        self._require_finite()
        if self.metadata:
            precision = {"precision": str(self.trainer.precision)}
            checkpoint["hyper_parameters"] = {**self.metadata, "facts": {**self.metadata["facts"], **precision}}
        checkpoint["segdeconv"] = {
            "format": FORMAT,
            "version": __version__,
            "machine": machine(self.device),
            # So that an epoch that was interrupted has the scores of an uninterrupted one.
            "train_counts": summed(self.trainer, self.train_matrix.counts).cpu(),
            "train_loss": self.step_loss.sums,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "segdeconv" not in checkpoint:
            raise CheckpointError("the checkpoint was not written by a SegmentationTask - give one that was")
        counts = checkpoint["segdeconv"]["train_counts"]  # summed over all processes
        self.train_matrix.counts = counts if self.global_rank == 0 else torch.zeros_like(counts)
        self.step_loss.sums = list(checkpoint["segdeconv"]["train_loss"])
        if not self.restores_options:
            (state,) = checkpoint["optimizer_states"]
            for saved, group in zip(state["param_groups"], self.optimizer.param_groups, strict=True):
                saved.update({name: value for name, value in group.items() if name != "params"})
