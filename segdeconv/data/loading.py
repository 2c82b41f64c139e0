"""Batches of tensors for training and evaluation, and the worker processes that load them."""

import os
import re
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.utils.data import DataLoader, Dataset, Sampler

from segdeconv.data.augmentation import Augmentation
from segdeconv.data.dataset import Sample, SegmentationDataset
from segdeconv.data.mixing import Mixing
from segdeconv.data.preprocessing import Preprocessing, resize_image, resize_mask, stacked
from segdeconv.data.sampler import StatelessBatches
from segdeconv.errors import UsageError

PREFETCH = 2  # batches that each worker prepares in advance


class TrainingBatches(Dataset[dict[str, Any]]):
    """Augmented training samples by (epoch, index), with pixels as stored; `for_network` normalises them on the device.

    Args:
        dataset: The train split.
        preprocessing: The preprocessing of the network.
        augmentation: The augmentation of the samples.
        mixing: The mixing with other samples, or None.
    """

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

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        image, mask, name = self._augmented(index, epoch, index)
        partner = self.mixing.partner(epoch, index, len(self)) if self.mixing else None
        if self.mixing and partner is not None:
            # The partner is augmented with other draws, since it may also be a sample of the batch, or this image.
            other, labels, _ = self._augmented(partner, epoch, len(self) + index)
            image, mask = self.mixing(image, mask, other, labels, epoch, index)
        return {"image": image, "mask": mask, "name": name}

    def _augmented(self, index: int, epoch: int, draw: int) -> Sample:
        image, mask, name = self.dataset[index]
        size = self.preprocessing.size
        if size is not None:
            image, mask = resize_image(image, size), resize_mask(mask, size)
        image, mask = self.augmentation(image, mask, epoch, draw)
        return Sample(self.preprocessing.checked(image, name), mask, name)


class EvaluationSamples(Dataset[Sample]):
    """Evaluation samples: images at the input size and masks at their stored size, on which scores are computed.

    Args:
        dataset: The split.
        preprocessing: The preprocessing of the network.
    """

    def __init__(self, dataset: SegmentationDataset, preprocessing: Preprocessing) -> None:
        self.dataset, self.preprocessing = dataset, preprocessing

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        image, mask, name = self.dataset[index]
        image = self.preprocessing.checked(image, name)
        size = self.preprocessing.size
        return Sample(image if size is None else resize_image(image, size), mask, name)


def collate_training(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return image (N, C, H, W) as stored, see `stacked`; mask (N, H, W) uint8; and name, a list."""
    names = [sample["name"] for sample in samples]
    return {
        "image": _stack([sample["image"] for sample in samples], names),
        "mask": torch.from_numpy(np.stack([sample["mask"] for sample in samples])),
        "name": names,
    }


def collate_evaluation(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return image (N, C, h, w) as stored, see `stacked`; mask, a list of (H, W) uint8; and name, a list."""
    names = [sample.name for sample in samples]
    return {
        "image": _stack([sample.image for sample in samples], names),
        "mask": [torch.from_numpy(np.array(sample.mask)) for sample in samples],
        "name": names,
    }


def for_network(batch: dict[str, Any], preprocessing: Preprocessing) -> dict[str, Any]:
    """Return a batch as the network needs it, on the device of the batch.

    Args:
        batch: A batch of `collate_training` or `collate_evaluation`.
        preprocessing: The preprocessing of the network.

    Returns:
        The batch with image (N, C, H, W) float32, normalised, in channels-last memory, and for training with mask
        (N, H, W) int64.
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
                f"{names[0]} is {images[0].shape[:2]} and {name} {image.shape[:2]} (HxW), but a batch needs one "
                "size - set dataset.size=[H,W] (all images) or dataset.crop=[H,W] (training), or dataset.batch_size=1"
            )
    return stacked(images)


HANDLED_SIGNALS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}


class Announced(Sampler[Any]):
    """An order whose items are announced a while before they are read.

    Args:
        order: The items in order.
        announce: Called with each item, in the process that iterates.
        ahead: Number of items between an item that is announced and the one that is read.
    """

    def __init__(self, order: Sequence[Any] | Sampler[Any], announce: Callable[[Any], None], ahead: int) -> None:
        self.order, self.announce, self.ahead = order, announce, ahead

    def __len__(self) -> int:
        return len(self.order)  # type: ignore[arg-type]  # every sampler here has a length

    def __iter__(self) -> Iterator[Any]:
        announced: deque[Any] = deque()
        for item in self.order:
            self.announce(item)
            announced.append(item)
            if len(announced) > self.ahead:
                yield announced.popleft()
        yield from announced


class Loader(DataLoader[Any]):
    """DataLoader whose workers start with signals blocked, since a signal before `prepare_worker` would end them."""

    def __iter__(self) -> Any:
        if not self.num_workers or not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def check_worker_number_rationality(self) -> None:
        """Suppress torch's warning about many workers, since `worker_settings` already checks their number."""


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
    """Build the loader of shuffled, augmented batches.

    Args:
        samples: The training samples.
        batch_size: Batch size per process.
        seed: Seed of the order.
        position: See `StatelessBatches`.
        rank: Index of this process.
        world_size: Number of processes.
        workers: `num_workers` and `timeout` of `worker_settings`.

    Raises:
        UsageError: There are fewer images than a batch, too many workers, or too little shared memory.
    """
    batches = StatelessBatches(
        len(samples),
        batch_size,
        seed=seed,
        position=position,
        rank=rank,
        world_size=world_size,
        locality=samples.dataset.locality,
    )
    if len(batches) == 0:
        raise UsageError(
            f"the train split has {len(samples)} images, fewer than one batch of {batch_size} x {world_size} - set "
            f"dataset.batch_size={max(1, len(samples) // world_size)} or less"
        )
    settings = worker_settings(world_size=world_size, **workers)
    _require_shared_memory(samples, batch_size, settings["num_workers"])
    order: Sampler[Any] = batches
    if samples.dataset.lookahead:
        order = Announced(
            batches,
            lambda batch: samples.dataset.prefetch(index for _, index in batch),
            -(-samples.dataset.lookahead // batch_size),
        )
    return Loader(samples, batch_sampler=order, collate_fn=collate_training, **settings)


def evaluation_loader(
    samples: EvaluationSamples,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    places: Sequence[int] | None = None,
    **workers: Any,
) -> DataLoader[Any]:
    """Build the loader of every image in order; each process loads every `world_size`-th image.

    Args:
        samples: The evaluation samples.
        batch_size: Batch size per process; it is 1 if images have different sizes.
        rank: Index of this process.
        world_size: Number of processes.
        places: The indices of the images to load, None for all.
        workers: `num_workers` and `timeout` of `worker_settings`.
    """
    if samples.preprocessing.size is None:
        batch_size = 1
    order: Sequence[int] | Sampler[int] = (range(len(samples)) if places is None else places)[rank::world_size]
    if samples.dataset.lookahead:
        ahead = -(-samples.dataset.lookahead // world_size)
        order = Announced(order, lambda index: samples.dataset.prefetch([index]), ahead)
    return Loader(
        samples,
        batch_size=batch_size,
        sampler=order,
        collate_fn=collate_evaluation,
        **worker_settings(world_size=world_size, **workers),
    )


def worker_settings(*, num_workers: int | None, timeout: float, world_size: int = 1) -> dict[str, Any]:
    """Return the arguments of a DataLoader that concern its workers.

    Args:
        num_workers: Number of workers; None chooses it from the cores per process.
        timeout: Seconds to wait for a batch.
        world_size: Number of processes that share the cores.

    Raises:
        UsageError: `num_workers` is much larger than the number of cores.
    """
    # A container may allow fewer cores than the machine has.
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, usable // world_size)
    if num_workers is None:
        # Without an accelerator, the cores also train.
        num_workers = min(16, cores) if torch.cuda.is_available() else min(2, cores)
    limit = max(64, 8 * cores)
    if num_workers > limit:
        raise UsageError(
            f"dataset.num_workers={num_workers} is too many for the {cores} cores of this process - set at most "
            f"{limit}, or leave it out to choose the number for the machine"
        )
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "prefetch_factor": PREFETCH if num_workers else None,
        "timeout": timeout if num_workers else 0,
        "worker_init_fn": prepare_worker,
        "pin_memory": torch.cuda.is_available(),
    }


SHARED_MEMORY = Path("/dev/shm")  # through which workers pass their batches, on Linux


def _require_shared_memory(samples: TrainingBatches, batch_size: int, num_workers: int) -> None:
    """Raise UsageError if batches do not fit into the shared memory, since torch would wait for them forever."""
    if not num_workers or not SHARED_MEMORY.is_dir():
        return
    sample = samples[(0, 0)]
    needed = num_workers * batch_size * (sample["image"].nbytes + sample["mask"].nbytes)
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise UsageError(
            f"the batches of {num_workers} workers need {needed >> 20} MiB of shared memory, but {SHARED_MEMORY} has "
            f"{free >> 20} - increase it (in a container --shm-size), or lower dataset.num_workers or "
            "dataset.batch_size"
        )


@contextmanager
def explain_loader_errors() -> Iterator[None]:
    """Turn torch's errors about workers that died, hang or ran out of shared memory into a UsageError."""
    try:
        yield
    except (RuntimeError, ProcessRaisedException) as error:  # the latter from another training process
        message = f"{error} {error.__cause__}"
        if "shared memory" in message:
            cause = "the shared memory for batches ran out (/dev/shm, in a container --shm-size)"
        elif "DataLoader timed out" in message:
            reason = str(error).partition(".")[0]
            cause = f"a worker delivered no batch in time; it hangs or {SHARED_MEMORY} is full ({reason})"
        elif "killed by signal: Killed" in message:
            cause = "a worker was killed, probably by the system because memory ran out"
        elif "DataLoader worker" in message and ("killed by signal" in message or "exited unexpectedly" in message):
            match = re.search(r"DataLoader worker \(pid[^)]*\)+( is killed by signal: [\w ]+)?", message)
            cause = f"a worker died ({match[0] if match else 'the reason is unknown'})"
        else:
            raise
        raise UsageError(
            f"{cause} - lower dataset.num_workers or dataset.batch_size, or raise dataset.timeout; then resume with "
            "resume=auto"
        ) from error


def prepare_worker(_: int) -> None:
    """Limit a worker to one thread and let it ignore signals, which the main process handles.

    The main process may need another batch before it saves. A worker still ends when the main process terminates it, as
    torch does when a worker hangs.
    """
    cv2.setNumThreads(0)  # torch already uses one thread in a worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sender_is_known = hasattr(signal, "sigwaitinfo")  # Linux
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(
            signal.SIG_UNBLOCK, HANDLED_SIGNALS - {signal.SIGTERM} if sender_is_known else HANDLED_SIGNALS
        )
    if sender_is_known:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_signal_of_parent, args=(os.getppid(),), daemon=True).start()


def _exit_on_signal_of_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
