"""The Lightning module: loss, scores, learning rate, and the content of checkpoints."""

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.distributed
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from segdeconv import __version__
from segdeconv.checkpoints.checkpoint import FORMAT
from segdeconv.classes import Classes
from segdeconv.data.loading import collate_training
from segdeconv.data.module import DataPipeline
from segdeconv.data.sampler import StatelessBatches
from segdeconv.errors import DivergedError, UsageError
from segdeconv.evaluation.metrics import ConfusionMatrix, Scores, scores
from segdeconv.inference.network import Network
from segdeconv.inference.scorers import labels, resized
from segdeconv.losses import loss_sums
from segdeconv.models import SegmentationModel
from segdeconv.models.activation_checkpointing import checkpoint_activations
from segdeconv.optimization import Schedule, average
from segdeconv.switches.ops import load_triton_kernels
from segdeconv.system.devices import autocast, machine
from segdeconv.system.memory import keep_freed
from segdeconv.system.seeding import key
from segdeconv.training.batchnorm_recalibration import recompute_statistics
from segdeconv.training.lightning_internals import expect_equal_values
from segdeconv.training.own_callbacks import require_suitable
from segdeconv.training.processes import summed
from segdeconv.training.settings import TrainerSettings
from segdeconv.training.step_loss import LOWER, StepLoss

# Sums over pixels are divided by this before the backward pass, so that float16 can represent their gradients; a power
# of two, so that no rounding occurs.
UNIT = 2.0**18


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
    """Trains a network with a loss and an optimizer.

    Args:
        model: The network.
        loss: A `PixelLoss`, or a module from (logits, mask) to a scalar.
        optimizer: Its parameter groups have a `base_lr`.
        schedule: Factor on the learning rate by step.
        classes: The classes of the data set.
        seed: Seed of dropout and other random operations, together with the step.
        total_steps: Optimizer steps of the whole run, for the schedule.
        metadata: Config and metadata of the data, as plain data for checkpoints.
        settings: The settings of the trainer.
        log_to_loggers: Whether `self.log` passes the scores to the trainer's loggers too, not only to callbacks.

    Attributes:
        lr: Learning rate of the first parameter group in the last step.
    """

    averaged: SegmentationModel | None
    validation_network: Network | None = None  # during a validation

    def __init__(
        self,
        model: SegmentationModel,
        loss: nn.Module,
        optimizer: Optimizer,
        schedule: Schedule,
        classes: Classes,
        *,
        seed: int,
        total_steps: int,
        metadata: Mapping[str, Any],
        settings: TrainerSettings,
        log_to_loggers: bool = True,
    ) -> None:
        super().__init__()
        if settings.compile is True and settings.activation_checkpointing:
            raise UsageError(
                "trainer.compile=true and trainer.activation_checkpointing=true: torch.compile chooses by itself what "
                "to recompute - set only one of them"
            )
        self.model = model.to(memory_format=torch.channels_last)
        self.loss = loss
        self.optimizer, self.schedule = optimizer, schedule
        self.classes, self.seed, self.total_steps, self.metadata = classes, seed, total_steps, dict(metadata)
        self.log_to_loggers = log_to_loggers
        self.lr: float = optimizer.param_groups[0]["lr"]
        self.norm, self.ema, self.recalibration_batches = settings.norm, settings.ema, settings.recalibration_batches
        self.compilation, self.activation_checkpointing = settings.compile, settings.activation_checkpointing
        if self.activation_checkpointing:
            checkpoint_activations(self.model)
        self._supervised: Callable[[Tensor], tuple[Tensor, ...]] = self.model.supervised
        self.averaged = copy.deepcopy(model).requires_grad_(False) if self.ema is not None else None
        self.train_matrix = ConfusionMatrix(len(classes), classes.ignore_index)
        self.val_matrix = ConfusionMatrix(len(classes), classes.ignore_index)
        self.step_loss = StepLoss()
        self.val_sums: list[Tensor] = []  # [sum, normaliser] of the loss on each of this process's validation images
        self._results: dict[str, Results] = {}
        self._validated = False
        self.train()  # Lightning keeps the modes of the modules

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
        self.lr = self.optimizer.param_groups[0]["lr"]

    def _set_learning_rate(self, step: int) -> None:
        """Set the learning rates of a step; those of the last step stay when there is no further one."""
        if step < self.total_steps:
            factor = self.schedule(step, self.total_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
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
        self.step_loss.sync_loss()
        self._validated = True
        self._recompute_statistics()
        # Running statistics differ between processes; those of the first process are saved.
        if self.trainer.world_size > 1:
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, 0)
        # The same preparation as in evaluate, so that both give the same scores.
        self.validation_network = Network(self.network, self.device, str(self.trainer.precision))

    def _recompute_statistics(self) -> None:
        """Compute the statistics of batch norm over the first batches of the epoch, if the settings ask for it.

        They depend on the weights, the seed and the epoch alone, and training does not use them, so that a resumed run
        repeats them.
        """
        pipeline: DataPipeline = self.trainer.datamodule.pipeline  # type: ignore[attr-defined]
        trained = {
            name
            for name, module in self.model.named_modules()
            if isinstance(module, _BatchNorm) and any(p.requires_grad for p in module.parameters(recurse=False))
        }
        if not self.recalibration_batches or self.norm == "frozen" or not trained:
            return
        order = StatelessBatches(
            len(pipeline.samples), pipeline.batch_size, seed=self.seed, position=lambda: (self.current_epoch, 0)
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
        self._log("val")

    def on_train_epoch_end(self) -> None:
        self._log("train")

    def _log(self, split: Literal["train", "val"]) -> None:
        """Pass the results of a split to callbacks, as `trainer.callback_metrics`, under the names of metrics.csv.

        They are computed once per epoch from sums over all processes, so that every process logs the same value, and no
        process waits for another.
        """
        expect_equal_values()
        for name, value in scalars(split, self.results(split), self.classes).items():
            # In float64, to the last bit; on the host, since logging would otherwise copy each to the device.
            number = torch.tensor(value, dtype=torch.float64)
            self.log(name, number, logger=self.log_to_loggers, prog_bar=name in ("train/loss", "val/loss", "val/miou"))

    def on_validation_end(self) -> None:
        self.validation_network = None

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list[np.ndarray]]:
        """Count the stored pixels, as evaluate does, and return the predicted masks for logging."""
        assert self.validation_network is not None
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
        checkpoint["hyper_parameters"] = self.metadata
        checkpoint["segdeconv"] = {
            "format": FORMAT,
            "version": __version__,
            "machine": machine(self.device),
            # So that an epoch that was interrupted has the scores of an uninterrupted one.
            "train_counts": summed(self.trainer, self.train_matrix.counts).cpu(),
            "train_loss": self.step_loss.sums,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        counts = checkpoint["segdeconv"]["train_counts"]  # summed over all processes
        self.train_matrix.counts = counts if self.global_rank == 0 else torch.zeros_like(counts)
        self.step_loss.sums = list(checkpoint["segdeconv"]["train_loss"])
