"""Data sets -> batches of tensors, for training and for evaluation."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.sampler import StatelessBatches
from segdeconv.data.transforms import Augmentation, Preprocessing, resize_image, resize_mask, stacked
from segdeconv.errors import UsageError

AHEAD = 2  # batches that each worker makes before they are asked for


class TrainingBatches(Dataset[dict[str, Any]]):
    """Augmented samples, by (epoch, index): numbers as stored, which `for_network` normalises on the device."""

    def __init__(self, dataset: SegmentationDataset, preprocessing: Preprocessing, augmentation: Augmentation) -> None:
        self.dataset, self.preprocessing, self.augmentation = dataset, preprocessing, augmentation

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        epoch, index = place
        image, mask, name = self.dataset[index]
        size = self.preprocessing.size
        if size is not None:
            image, mask = resize_image(image, size), resize_mask(mask, size)
        image, mask = self.augmentation(image, mask, epoch, index)
        return {"image": self.preprocessing.required(image, name), "mask": mask, "name": name}


class EvaluationSample(NamedTuple):
    """image: (h, w, C) uint8 or uint16, of the size that the network sees; mask: (H, W) uint8 as stored; name."""

    image: np.ndarray
    mask: np.ndarray
    name: str


class EvaluationSamples(Dataset[EvaluationSample]):
    """Images as the network sees them, masks as they are stored: scores count stored pixels."""

    def __init__(self, dataset: SegmentationDataset, preprocessing: Preprocessing) -> None:
        self.dataset, self.preprocessing = dataset, preprocessing

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> EvaluationSample:
        image, mask, name = self.dataset[index]
        image = self.preprocessing.required(image, name)
        size = self.preprocessing.size
        return EvaluationSample(image if size is None else resize_image(image, size), mask, name)


def collate_training(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """-> image (N, C, H, W) as stored, see `stacked`; mask (N, H, W) uint8; name: list."""
    names = [sample["name"] for sample in samples]
    return {
        "image": _stack([sample["image"] for sample in samples], names),
        "mask": torch.from_numpy(np.stack([sample["mask"] for sample in samples])),
        "name": names,
    }


def collate_evaluation(samples: Sequence[EvaluationSample]) -> dict[str, Any]:
    """-> image (N, C, h, w) as stored, see `stacked`; mask: list of (H, W) uint8, each of its own size; name: list."""
    names = [sample.name for sample in samples]
    return {
        "image": _stack([sample.image for sample in samples], names),
        "mask": [torch.from_numpy(np.array(sample.mask)) for sample in samples],
        "name": names,
    }


def for_network(batch: dict[str, Any], preprocessing: Preprocessing) -> dict[str, Any]:
    """A batch of either kind, on its device, as training and validation take it.

    image: (N, C, H, W) float32, normalised, in channels-last memory. mask: (N, H, W) int64 of a training batch.
    """
    mask = batch["mask"]
    return {
        **batch,
        "image": preprocessing.normalised(batch["image"]),
        "mask": mask.long() if isinstance(mask, Tensor) else mask,
    }


def _stack(images: Sequence[np.ndarray], names: Sequence[str]) -> Tensor:
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            raise UsageError(
                f"{names[0]} is {images[0].shape[:2]} and {name} {image.shape[:2]} (HxW), which make no "
                "batch - set dataset.size=[H,W] (all images) or dataset.crop=[H,W] (training), or dataset.batch_size=1"
            )
    return stacked(images)


def training_loader(
    samples: TrainingBatches,
    *,
    batch_size: int,
    seed: int,
    position: Callable[[], tuple[int, int]],
    rank: int = 0,
    world_size: int = 1,
    **workers: Any,
) -> DataLoader[Any]:
    """Endless epochs of shuffled, augmented batches; see StatelessBatches for `position`."""
    batches = StatelessBatches(len(samples), batch_size, seed=seed, position=position, rank=rank, world_size=world_size)
    if len(batches) == 0:
        raise UsageError(
            f"the train split has {len(samples)} images, fewer than one batch of {batch_size} x {world_size} - set "
            f"dataset.batch_size={max(1, len(samples) // world_size)} or less"
        )
    settings = worker_settings(world_size=world_size, **workers)
    return DataLoader(samples, batch_sampler=batches, collate_fn=collate_training, **settings)


def evaluation_loader(
    samples: EvaluationSamples, *, batch_size: int, rank: int = 0, world_size: int = 1, **workers: Any
) -> DataLoader[Any]:
    """Every image once, in order; of several processes each takes every world_size-th. Without a common size, one at a
    time.
    """
    if samples.preprocessing.size is None:
        batch_size = 1
    turns = range(rank, len(samples), world_size)
    return DataLoader(
        samples,
        batch_size=batch_size,
        sampler=turns,
        collate_fn=collate_evaluation,
        **worker_settings(world_size=world_size, **workers),
    )


def worker_settings(*, num_workers: int | None, timeout: float, world_size: int = 1) -> dict[str, Any]:
    """num_workers: None for as many as suit this machine; never more than it has cores for each process of ours.
    timeout: seconds a batch may take before we give up.
    """
    cores = cores_each(world_size)
    if num_workers is None:
        # With an accelerator the cores have only the data to do; without one they also train.
        num_workers = min(16, cores) if torch.cuda.is_available() else min(2, cores)
    num_workers = min(num_workers, cores)
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "prefetch_factor": AHEAD if num_workers else None,
        "timeout": timeout if num_workers else 0,
        "worker_init_fn": prepare_worker,
        "pin_memory": torch.cuda.is_available(),
    }


def cores_each(processes: int) -> int:
    """The cores that each of so many processes may use, which in a container are fewer than the machine has."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // processes)


def prepare_worker(_: int) -> None:
    """One thread per worker; signals are the main process's to answer."""
    cv2.setNumThreads(0)  # torch's are one in a worker already
    signal.signal(signal.SIGINT, signal.SIG_IGN)
