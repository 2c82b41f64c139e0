"""The one LightningDataModule: any data set, as training and validation batches."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from pytorch_lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from segdeconv.config import TARGET, build, check, locate, split
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.loading import (
    EvaluationSamples,
    TrainingBatches,
    evaluation_loader,
    training_loader,
)
from segdeconv.data.transforms import Augmentation, Preprocessing, Transform, border_arguments

Side = Annotated[int, Field(ge=1)]
Channels = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class DataModule(LightningDataModule):
    """Train and val split of one data set.

    size: (H, W) that the network sees, in training and prediction; None for each image's own.
    crop: (H, W) of training batches, cut at random after augmentation; None for `size`.
    batch_size: images per process and step. num_workers: None for as many as suit the machine.
    timeout: seconds after which a batch that does not come ends the run.
    mean, std: of each colour channel, in the units of pixels 0..255; ImageNet's by default. The originals feed
        SegNet raw pixels: mean=[0,0,0], std=[1,1,1].
    """

    def __init__(
        self,
        train: SegmentationDataset,
        val: SegmentationDataset,
        transforms: Sequence[Transform],
        seed: int,
        *,
        size: tuple[Side, Side] | None = None,
        crop: tuple[Side, Side] | None = None,
        batch_size: Side = 4,
        num_workers: Annotated[int, Field(ge=0)] | None = None,
        timeout: Annotated[float, Field(ge=0)] = 120.0,
        mean: Channels = IMAGENET_MEAN,
        std: tuple[Positive, Positive, Positive] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.train, self.val, self.seed, self.batch_size = train, val, seed, batch_size
        self.preprocessing = Preprocessing(_size(size), (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
        augmentation = Augmentation(
            transforms,
            crop=_size(crop) or _size(size),
            ignore_index=train.classes.ignore_index,
            fill=self.preprocessing.mean,
            seed=seed,
        )
        self.samples = TrainingBatches(train, self.preprocessing, augmentation)
        self.workers = {"num_workers": num_workers, "timeout": timeout}

    @property
    def _run(self) -> Trainer:
        assert self.trainer is not None, "the data module belongs to a trainer before it makes batches"
        return self.trainer

    @property
    def batches_per_epoch(self) -> int:
        """Training batches of one epoch in one process."""
        return len(self.train) // (self.batch_size * self._run.world_size)

    def _position(self) -> tuple[int, int]:
        """(epoch, batches of it done): global_step is the only truth."""
        accumulate = self._run.accumulate_grad_batches
        epoch, steps = divmod(self._run.global_step, math.ceil(self.batches_per_epoch / accumulate))
        return epoch, steps * accumulate

    def train_dataloader(self) -> DataLoader[Any]:
        return training_loader(
            self.samples,
            batch_size=self.batch_size,
            seed=self.seed,
            position=self._position,
            rank=self._run.global_rank,
            world_size=self._run.world_size,
            **self.workers,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return evaluation_loader(
            EvaluationSamples(self.val, self.preprocessing), batch_size=self.batch_size, **self.workers
        )


def _size(size: Sequence[int] | None) -> tuple[int, int] | None:
    return (size[0], size[1]) if size else None


def build_split(node: Mapping[str, Any], split_name: str) -> SegmentationDataset:
    """One split of the data set that a checked `dataset` node names."""
    return typing.cast(SegmentationDataset, build(split(node, DataModule)[1], "dataset", split=split_name))


SUPPLIED = ("train", "val", "transforms", "seed")


def check_dataset(node: dict[str, Any]) -> dict[str, Any]:
    """The `dataset` node of a recipe: the data set's own arguments and the data module's, held against both."""
    return check(node, "dataset", [locate(node, "dataset"), DataModule], supplied=[*SUPPLIED, "split"])


def check_augment(nodes: dict[str, Any]) -> dict[str, Any]:
    """The `augment` node: transforms by name, in order; a name set to null is left out."""
    checked = {}
    for name, node in nodes.items():
        if node is not None:
            where = f"augment.{name}"
            schema = locate(node, where)
            # Against the signature, since albumentations only warns of arguments it does not know. Its own
            # defaults are not written in: they change with its version and this is the user's choice.
            defaults = check(node, where, [schema])
            checked[name] = {key: defaults[key] for key in (TARGET, *node) if key in defaults}
    return checked


def build_transforms(nodes: dict[str, Any], *, ignore_index: int, mean: Sequence[float]) -> list[Transform]:
    """The transforms of a checked `augment` node, told to fill masks with ignore_index."""
    transforms = []
    for name, node in nodes.items():
        where = f"augment.{name}"
        told = border_arguments(locate(node, where), node, ignore_index=ignore_index, fill=mean)
        transforms.append(build({key: node[key] for key in node if key not in told}, where, **told))
    return transforms
