"""The task that Lightning trains: loss, scores, learning rate, and what a checkpoint remembers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from segdeconv import __version__
from segdeconv.checkpoint import FORMAT
from segdeconv.classes import Classes
from segdeconv.errors import DivergedError
from segdeconv.inference import Scorer, labels, padded, resized
from segdeconv.metrics import ConfusionMatrix, Scores, scores
from segdeconv.models import SegmentationModel
from segdeconv.optimization import Schedule
from segdeconv.seeding import key


class SegmentationTask(LightningModule):
    """A network, a loss and an optimizer, learning one data set.

    remembered: the recipe and the facts of the data, plain, as a checkpoint keeps them.
    """

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
        remembered: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.loss = loss
        self.optimizer, self.schedule = optimizer, schedule
        self.classes, self.seed, self.total_steps, self.remembered = classes, seed, total_steps, dict(remembered)
        self.train_matrix = ConfusionMatrix(len(classes), classes.ignore_index)
        self.val_matrix = ConfusionMatrix(len(classes), classes.ignore_index)
        self.loss_sums = {"train": 0.0, "val": 0.0}
        self.loss_counts = {"train": 0, "val": 0}

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Everything random or scheduled is a function of the step, so that a resumed run repeats it.
        torch.manual_seed(key(self.seed, "step", self.global_step))
        factor = self.schedule(self.global_step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        logits = self.model(batch["image"])
        loss: Tensor = self.loss(logits, batch["mask"])
        if not torch.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss.item()} at step {self.global_step} with learning rate "
                f"{self.optimizer.param_groups[0]['lr']:.3g} on {', '.join(batch['name'][:4])} - lower optimizer.lr, "
                "add schedule.warmup_steps or clip with trainer.gradient_clip"
            )
        self.train_matrix.update(logits.detach().argmax(dim=1), batch["mask"])
        self._count_loss("train", loss)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, list[np.ndarray]]:
        """Scores stored pixels, as scripts/evaluate.py does; the predicted masks are for pictures."""
        logits = self.scorer(batch["image"])
        predictions = []
        for position, mask in enumerate(batch["mask"]):
            size = (mask.shape[0], mask.shape[1])
            one = resized(logits[position : position + 1], size)
            self._count_loss("val", self.loss(one, mask[None].long()))
            prediction = labels(one, size)[0]
            self.val_matrix.update(prediction, mask)
            predictions.append(prediction.cpu().numpy())
        return {"predictions": predictions}

    @property
    def scorer(self) -> Scorer:
        """The network for images of any size."""
        return padded(self.model, self.model.minimum_size)

    def _count_loss(self, split: str, loss: Tensor) -> None:
        self.loss_sums[split] += float(loss.detach())
        self.loss_counts[split] += 1

    def results(self, split: str) -> tuple[float, Scores, np.ndarray]:
        """(mean loss, scores, confusion) of a split since `forget`."""
        matrix = self.train_matrix if split == "train" else self.val_matrix
        confusion = matrix.compute()
        return self.loss_sums[split] / max(1, self.loss_counts[split]), scores(confusion), confusion

    def forget(self, split: str) -> None:
        """Start a split's scores anew."""
        (self.train_matrix if split == "train" else self.val_matrix).reset()
        self.loss_sums[split], self.loss_counts[split] = 0.0, 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hyper_parameters"] = self.remembered
        checkpoint["segdeconv"] = {
            "format": FORMAT,
            "version": __version__,
            # So that the scores of an epoch that is cut in two are those of the epoch in one piece.
            "train_counts": self.train_matrix.counts.cpu(),
            "train_loss": [self.loss_sums["train"], self.loss_counts["train"]],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.train_matrix.counts.copy_(checkpoint["segdeconv"]["train_counts"])
        self.loss_sums["train"], self.loss_counts["train"] = checkpoint["segdeconv"]["train_loss"]
