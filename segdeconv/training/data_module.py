"""The data pipeline as a Lightning data module whose loaders start at the trainer's step."""

import math
from typing import Any

from pytorch_lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from segdeconv.data.loading import evaluation_loader, for_network, training_loader
from segdeconv.data.module import DataPipeline
from segdeconv.training.trainer import batches_per_epoch


class DataModule(LightningDataModule):
    """Training and validation batches of a pipeline, for the trainer's process and from its current step.

    Args:
        pipeline: The samples of both splits.
        same_batches: Whether every epoch repeats the batches of the first one, as with `trainer.overfit_batches`.
    """

    def __init__(self, pipeline: DataPipeline, *, same_batches: bool = False) -> None:
        super().__init__()
        self.pipeline, self.same_batches = pipeline, same_batches

    @property
    def _run(self) -> Trainer:
        assert self.trainer is not None, "the data module needs a trainer before it makes batches"
        return self.trainer

    def _position(self) -> tuple[int, int]:
        """Return (epoch, batches of it that are done), computed from global_step alone."""
        accumulate = self._run.accumulate_grad_batches
        whole = self.pipeline.batches_per_epoch(self._run.world_size)
        batches = batches_per_epoch(whole, self._run.limit_train_batches)
        epoch, steps = divmod(self._run.global_step, math.ceil(batches / accumulate))
        return 0 if self.same_batches else epoch, steps * accumulate

    @property
    def _settings(self) -> dict[str, Any]:
        """Arguments of both loaders."""
        ranks = {"rank": self._run.global_rank, "world_size": self._run.world_size}
        return {"batch_size": self.pipeline.batch_size, **ranks, **self.pipeline.workers}

    def train_dataloader(self) -> DataLoader[Any]:
        pipeline = self.pipeline
        return training_loader(pipeline.samples, seed=pipeline.seed, position=self._position, **self._settings)

    def val_dataloader(self) -> DataLoader[Any]:
        return evaluation_loader(self.pipeline.val_samples, **self._settings)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return for_network(batch, self.pipeline.preprocessing)
