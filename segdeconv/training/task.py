"""The task that Lightning trains: loss, scores, learning rate, and what a checkpoint remembers."""

import copy
from collections.abc import Callable, Mapping
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
from segdeconv.errors import DivergedError, UsageError
from segdeconv.evaluation.metrics import ConfusionMatrix, Scores, scores
from segdeconv.inference.network import Network
from segdeconv.inference.scorers import labels, resized
from segdeconv.losses import loss_sums
from segdeconv.models import SegmentationModel
from segdeconv.models.activation_checkpointing import checkpoint_activations
from segdeconv.optimization import Schedule, average
from segdeconv.switches.ops import load_triton_kernels
from segdeconv.system.devices import machine
from segdeconv.system.memory import keep_freed
from segdeconv.system.seeding import key
from segdeconv.training.processes import summed
from segdeconv.training.settings import TrainerSettings
from segdeconv.training.step_loss import LOWER, StepLoss

# Sums over pixels are divided by this before the backward pass, so that float16 can hold their gradients; a power of
# two, which changes no digit.
UNIT = 2.0**18


class Results(NamedTuple):
    """Of one split: the mean loss, the scores, and the (C, C) confusion matrix that they come from."""

    loss: float
    scores: Scores
    confusion: np.ndarray


class SegmentationTask(LightningModule):
    """A network, a loss and an optimizer, learning one data set.

    metadata: the config and the facts of the data, plain, as a checkpoint keeps them.
    """

    averaged: SegmentationModel | None
    validation_network: Network | None = None  # of a validation that is running

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
    ) -> None:
        super().__init__()
        if settings.compile is True and settings.activation_checkpointing:
            raise UsageError(
                "trainer.compile=true and trainer.activation_checkpointing=true: torch.compile chooses by itself what "
                "to compute again - leave one of them out"
            )
        self.model = model.to(memory_format=torch.channels_last)
        self.loss = loss
        self.optimizer, self.schedule = optimizer, schedule
        self.classes, self.seed, self.total_steps, self.metadata = classes, seed, total_steps, dict(metadata)
        self.norm, self.ema = settings.norm, settings.ema
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
        self.train()  # Lightning takes the modes as they are

    @property
    def network(self) -> SegmentationModel:
        """What is validated and used: the average of the weights if there is one."""
        return self.model if self.averaged is None else self.averaged

    def train(self, mode: bool = True) -> Self:
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
        """Whether training on this device goes through torch.compile."""
        if self.compilation == "auto":
            return (
                not self.activation_checkpointing and device.type == "cuda" and load_triton_kernels(device) is not None
            )
        return self.compilation

    def on_fit_start(self) -> None:
        keep_freed(self.device)
        if self.compiles(self.device):
            # The method, not the module, whose parameters would get other names in checkpoints.
            self._supervised = torch.compile(self.model.supervised)
        self.train_matrix.to(self.device)
        self.val_matrix.to(self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Everything random or scheduled is a function of the step, so that a resumed run repeats it.
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(key(self.seed, "step", self.global_step, micro_batch, self.global_rank))
        factor = self.schedule(self.global_step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        maps = self._forward(batch["image"])
        total, normaliser = loss_sums(self.loss, maps, batch["mask"])
        self.train_matrix.update(maps[0].detach().argmax(dim=1), batch["mask"])
        self.step_loss.add(total, normaliser, batch["name"])
        # Lightning divides by the number of micro-batches, which on_before_optimizer_step does not count on.
        return total * (self.trainer.accumulate_grad_batches / UNIT)

    def _forward(self, image: Tensor) -> tuple[Tensor, ...]:
        try:
            return self._supervised(image)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise UsageError(
                    f"batch norm sees a single value per channel in a batch of {len(image)} - raise dataset.batch_size "
                    "or dataset.crop, or set trainer.norm=frozen"
                ) from error
            raise

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """From the gradient of the sum of the loss to that of its mean over all micro-batches and processes."""
        sums = self.step_loss.reduce(self.trainer, self.optimizer.param_groups[0]["lr"])
        # Several processes average their gradients, so the sum is world_size times that.
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
        if self.averaged is not None and self.ema is not None:
            average(self.averaged, self.model, decay=min(self.ema, (1 + self.global_step) / (10 + self.global_step)))

    def on_validation_start(self) -> None:
        self.step_loss.sync_loss()
        self._validated = True
        # Running statistics are each process's own; the first one's are those that are kept.
        if self.trainer.world_size > 1:
            for buffer in self.network.buffers():
                torch.distributed.broadcast(buffer, 0)
        # As evaluate makes it, so that both give the same scores.
        self.validation_network = Network(self.network, self.device, str(self.trainer.precision))

    def on_validation_end(self) -> None:
        self.validation_network = None

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list[np.ndarray]]:
        """Scores stored pixels, as scripts/evaluate.py does; the predicted masks are for pictures."""
        assert self.validation_network is not None
        logits = self.validation_network.logits(batch["image"])
        predictions = []
        for position, mask in enumerate(batch["mask"]):
            size = (mask.shape[0], mask.shape[1])
            one = resized(logits[position : position + 1], size)
            self.val_sums.append(torch.stack(loss_sums(self.loss, one, mask[None].long())))
            prediction = labels(one, size)[0]
            self.val_matrix.update(prediction, mask)
            predictions.append(prediction.cpu().numpy())
        return {"predictions": predictions}

    def results(self, split: Literal["train", "val"]) -> Results | None:
        """What a split has given since `reset`, in all processes; None if there was no validation.

        Processes wait for each other here: every one has to ask.
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
        """Start the loss and the scores of a split for another epoch."""
        self._results.pop(split, None)
        if split == "train":
            self.train_matrix.reset()
            self.step_loss.reset()
        else:
            self.val_matrix.reset()
            self.val_sums = []
            self._validated = False

    def _require_finite(self) -> None:
        """A finite loss can still have a gradient that is not: what it has made of the weights is not kept."""
        for name, tensor in self.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise DivergedError(
                    f"{name} is not finite after step {self.global_step} with learning rate "
                    f"{self.optimizer.param_groups[0]['lr']:.3g} on {', '.join(self.step_loss.names[:4])} - {LOWER}"
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.step_loss.sync_loss()
        self._require_finite()
        checkpoint["hyper_parameters"] = self.metadata
        checkpoint["segdeconv"] = {
            "format": FORMAT,
            "version": __version__,
            "machine": machine(self.device),
            # So that the scores of an epoch that is cut in two are those of the epoch in one piece.
            "train_counts": summed(self.trainer, self.train_matrix.counts).cpu(),
            "train_loss": self.step_loss.sums,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        counts = checkpoint["segdeconv"]["train_counts"]  # of all processes
        self.train_matrix.counts = counts if self.global_rank == 0 else torch.zeros_like(counts)
        self.step_loss.sums = list(checkpoint["segdeconv"]["train_loss"])
