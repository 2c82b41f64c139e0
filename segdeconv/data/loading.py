"""Data sets -> batches of tensors, for training and for evaluation."""

import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.data import DataLoader, Dataset

from segdeconv.data.augmentation import Augmentation
from segdeconv.data.dataset import Sample, SegmentationDataset
from segdeconv.data.mixing import Mixing
from segdeconv.data.preprocessing import Preprocessing, resize_image, resize_mask, stacked
from segdeconv.data.sampler import StatelessBatches
from segdeconv.errors import UsageError

AHEAD = 2  # batches that each worker makes before they are asked for


class TrainingBatches(Dataset[dict[str, Any]]):
    """Augmented samples, by (epoch, index): numbers as stored, which `for_network` normalises on the device."""

    def __init__(
        self,
        dataset: SegmentationDataset,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        mixing: Mixing | None = None,
    ) -> None:
        self.dataset, self.preprocessing, self.augmentation = dataset, preprocessing, augmentation
        self.mixing = mixing

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        epoch, index = place
        image, mask, name = self._augmented(index, epoch, index)
        partner = self.mixing.partner(epoch, index, len(self)) if self.mixing else None
        if self.mixing and partner is not None:
            # Draws of its own: the partner may be in the batch by itself too, or be this very image.
            other, labels, _ = self._augmented(partner, epoch, len(self) + index)
            image, mask = self.mixing(image, mask, other, labels, epoch, index)
        return {"image": image, "mask": mask, "name": name}

    def _augmented(self, index: int, epoch: int, draw: int) -> Sample:
        image, mask, name = self.dataset[index]
        size = self.preprocessing.size
        if size is not None:
            image, mask = resize_image(image, size), resize_mask(mask, size)
        image, mask = self.augmentation(image, mask, epoch, draw)
        return Sample(self.preprocessing.required(image, name), mask, name)


class EvaluationSamples(Dataset[Sample]):
    """Images of the size that the network sees, masks as they are stored: scores count stored pixels."""

    def __init__(self, dataset: SegmentationDataset, preprocessing: Preprocessing) -> None:
        self.dataset, self.preprocessing = dataset, preprocessing

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        image, mask, name = self.dataset[index]
        image = self.preprocessing.required(image, name)
        size = self.preprocessing.size
        return Sample(image if size is None else resize_image(image, size), mask, name)


def collate_training(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """-> image (N, C, H, W) as stored, see `stacked`; mask (N, H, W) uint8; name: list."""
    names = [sample["name"] for sample in samples]
    return {
        "image": _stack([sample["image"] for sample in samples], names),
        "mask": torch.from_numpy(np.stack([sample["mask"] for sample in samples])),
        "name": names,
    }


def collate_evaluation(samples: Sequence[Sample]) -> dict[str, Any]:
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


HELD = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}


class Loader(DataLoader[Any]):
    """torch's, whose workers are born deaf to the signals that `prepare_worker` sees to: before it they would die."""

    def __iter__(self) -> Any:
        if not self.num_workers or not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def check_worker_number_rationality(self) -> None:
        """Torch's warning of more workers than cores, several lines long: `worker_settings` says what is too many."""


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
    _require_shared_memory(samples, batch_size, settings["num_workers"])
    return Loader(samples, batch_sampler=batches, collate_fn=collate_training, **settings)


def evaluation_loader(
    samples: EvaluationSamples, *, batch_size: int, rank: int = 0, world_size: int = 1, **workers: Any
) -> DataLoader[Any]:
    """Every image once, in order; of several processes each takes every world_size-th. Without a common size, one at a
    time.
    """
    if samples.preprocessing.size is None:
        batch_size = 1
    return Loader(
        samples,
        batch_size=batch_size,
        sampler=range(rank, len(samples), world_size),
        collate_fn=collate_evaluation,
        **worker_settings(world_size=world_size, **workers),
    )


def worker_settings(*, num_workers: int | None, timeout: float, world_size: int = 1) -> dict[str, Any]:
    """num_workers: None for as many as suit this machine, which has only so many cores for each process of ours.
    timeout: seconds a batch may take before we give up.
    """
    # In a container a process may use fewer cores than the machine has.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, usable // world_size)
    if num_workers is None:
        # With an accelerator the cores have only the data to do; without one they also train.
        num_workers = min(16, cores) if torch.cuda.is_available() else min(2, cores)
    most = max(64, 8 * cores)
    if num_workers > most:
        raise UsageError(
            f"dataset.num_workers={num_workers} and this process has {cores} cores - give {most} or fewer, or leave it "
            "out for as many as suit the machine"
        )
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "prefetch_factor": AHEAD if num_workers else None,
        "timeout": timeout if num_workers else 0,
        "worker_init_fn": prepare_worker,
        "pin_memory": torch.cuda.is_available(),
    }


SHARED = Path("/dev/shm")  # where workers put their batches, on Linux


def _require_shared_memory(samples: TrainingBatches, batch_size: int, num_workers: int) -> None:
    """torch waits for ever for a batch that found no room there; so it is counted before."""
    if not num_workers or not SHARED.is_dir():
        return
    sample = samples[(0, 0)]
    needed = num_workers * batch_size * (sample["image"].nbytes + sample["mask"].nbytes)
    free = shutil.disk_usage(SHARED).free
    if needed > free:
        raise UsageError(
            f"the batches of {num_workers} workers take {needed >> 20} MiB of shared memory and {SHARED} has "
            f"{free >> 20} - give it more (in a container --shm-size), or lower dataset.num_workers or "
            "dataset.batch_size"
        )


@contextmanager
def explain_loader_errors() -> Iterator[None]:
    """What torch says of loader workers that die, hang or run out of shared memory, as one sentence of ours."""
    try:
        yield
    except (RuntimeError, ProcessRaisedException) as error:  # here, or in another training process
        said = f"{error} {error.__cause__}"
        if "shared memory" in said:
            what = "the shared memory for batches ran out (/dev/shm, in a container --shm-size)"
        elif "DataLoader timed out" in said:
            what = f"a worker brought no batch in time, it hangs or {SHARED} is full ({str(error).partition('.')[0]})"
        elif "killed by signal: Killed" in said:
            what = "a worker was killed, which the system does where memory runs out"
        elif "DataLoader worker" in said and ("killed by signal" in said or "exited unexpectedly" in said):
            found = re.search(r"DataLoader worker \(pid[^)]*\)+( is killed by signal: [\w ]+)?", said)
            what = f"a worker died ({found[0] if found else 'it does not say how'})"
        else:
            raise
        raise UsageError(
            f"{what} - lower dataset.num_workers or dataset.batch_size, or raise dataset.timeout; then go on with "
            "resume=auto"
        ) from error


def prepare_worker(_: int) -> None:
    """One thread per worker; signals are the main process's to answer, which may want another batch before it saves.

    A worker still ends when the main process terminates it, which torch does with one that hangs.
    """
    cv2.setNumThreads(0)  # torch's are one in a worker already
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):  # Windows has none
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    known = hasattr(signal, "sigwaitinfo")  # Linux: only this says who has sent a signal
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD - {signal.SIGTERM} if known else HELD)
    if known:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_the_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
