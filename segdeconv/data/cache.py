"""Cache of decoded images and masks, in shared memory or on disk, within a limit."""

import hashlib
import os
import shutil
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from segdeconv.data.dataset import DatasetView, Sample, SegmentationDataset
from segdeconv.data.inspection import cache_folder
from segdeconv.data.preprocessing import Size, resize_image, resize_mask
from segdeconv.data.store import IN_MEMORY, ON_DISK, STAMP, Store
from segdeconv.errors import UsageError
from segdeconv.system.memory import available

Kind = Literal["auto", "none", "memory", "disk"]

VERSION = 1  # of the files on disk and of the decoding; a new number invalidates them
SHARE = 0.25  # fraction of the available memory or free disk that is the default limit
_HEAD = struct.Struct("<6I")  # image: height, width, channels, bytes of each; mask: height, width


class Cached(DatasetView):
    """A data set whose samples are decoded once and then read from a store.

    A sample is decoded again if the size or time of its image or mask file has changed.

    Args:
        dataset: The data set to wrap.
        store: The store of the decoded samples.
        first: Number of the first sample in the store.
        size: (H, W) of the cached images, or None for their own size.
        resize_masks: Resize masks to `size` as well.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        store: Store,
        *,
        first: int = 0,
        size: Size | None = None,
        resize_masks: bool = True,
    ) -> None:
        super().__init__(dataset)
        self.store, self.first, self.size, self.resize_masks = store, first, size, resize_masks

    def __getitem__(self, index: int) -> Sample:
        stamp = self._stamp(index)
        cached = self.store.get(self.first + index, stamp)
        if cached is not None:
            return Sample(*_unpack(cached), self.names[index])
        image, mask, name = self.dataset[index]
        if self.size is not None:
            image = resize_image(image, self.size)
            mask = resize_mask(mask, self.size) if self.resize_masks else mask
        self.store.put(self.first + index, stamp, _pack(image, mask))
        return Sample(image, mask, name)

    def prefetch(self, indices: Iterable[int]) -> None:
        self.dataset.prefetch(
            index for index in indices if not self.store.holds(self.first + index, self._stamp(index))
        )

    def _stamp(self, index: int) -> bytes:
        text = self.dataset.stamp(index).encode(errors="surrogateescape")
        return hashlib.blake2b(text, digest_size=STAMP).digest()

    @property
    def fingerprint(self) -> str:
        return self.dataset.fingerprint


def _pack(image: np.ndarray, mask: np.ndarray) -> bytes:
    return _HEAD.pack(*image.shape, image.itemsize, *mask.shape) + image.tobytes() + mask.tobytes()


def _unpack(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    height, width, channels, itemsize, rows, columns = _HEAD.unpack_from(content)
    size = height * width * channels
    dtype = np.uint8 if itemsize == 1 else np.uint16
    image = np.frombuffer(content, dtype, size, _HEAD.size).reshape(height, width, channels)
    mask = np.frombuffer(content, np.uint8, rows * columns, _HEAD.size + size * itemsize).reshape(rows, columns)
    return image, mask


@dataclass(frozen=True)
class CachePlan:
    """Location and size of the cache of decoded images.

    Attributes:
        kind: `none`, `memory` or `disk`.
        needed: Estimated bytes of all samples.
        capacity: Limit of the cache in bytes.
        folder: Folder of the cache on disk, or None.
    """

    kind: Literal["none", "memory", "disk"]
    needed: int = 0
    capacity: int = 0
    folder: Path | None = None


def plan_cache(
    kind: Kind, gibibytes: float | None, splits: Sequence[SegmentationDataset], sizes: Sequence[Size | None]
) -> CachePlan:
    """Decide where to cache the decoded images of a data set.

    Args:
        kind: `auto` is memory for images in files, if the system can share memory (Linux). It is never the disk, which
            should not be filled unasked.
        gibibytes: Limit of the cache; None for SHARE of the available memory or free disk. Memory is divided among the
            processes that torchrun or SLURM starts on this machine.
        splits: The splits.
        sizes: (H, W) of the cached images of each split, or None for their own size.

    Raises:
        UsageError: The system does not support `kind`.
    """
    if kind == "auto":
        kind = "memory" if IN_MEMORY and all(split.image_files for split in splits) else "none"
    if kind == "none":
        return CachePlan("none")
    if not (IN_MEMORY if kind == "memory" else ON_DISK):
        others = "disk or none" if kind == "memory" and ON_DISK else "none"
        raise UsageError(f"dataset.cache={kind} is not possible on {sys.platform} - use dataset.cache={others}")
    needed = sum(len(split) * _sample_bytes(split, size) for split, size in zip(splits, sizes, strict=True))
    folder = cache_folder("decoded") if kind == "disk" else None
    if gibibytes is not None:
        capacity = int(gibibytes * 2**30)
    elif folder is not None:
        existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        cached = sum(size for _, size, _ in _cache_files(folder))
        capacity = int(SHARE * (shutil.disk_usage(existing).free + cached))
    else:
        capacity = int(SHARE * (available(torch.device("cpu")) or 0) / _local_processes())
    return CachePlan("memory" if folder is None else "disk", needed, capacity, folder)


def _sample_bytes(split: SegmentationDataset, size: Size | None) -> int:
    """Estimate the bytes of a sample from the first one."""
    image, mask, _ = split[0]
    pixels = size[0] * size[1] if size else mask.size
    return _HEAD.size + pixels * image.shape[2] * image.itemsize + max(pixels, mask.size)


def open_store(plan: CachePlan, splits: Sequence[SegmentationDataset], sizes: Sequence[Size | None]) -> Store | None:
    """Open the store of a plan for the samples of all splits, in order; None if nothing is cached.

    Args:
        plan: The result of `plan_cache`.
        splits: The splits.
        sizes: (H, W) of the cached images of each split, or None for their own size.
    """
    count = sum(map(len, splits))
    if plan.kind == "none":
        return None
    if plan.folder is None:
        return Store(count, plan.capacity)
    # Another data set, label_map or size uses another file.
    identity = [str(VERSION)]
    for split, size in zip(splits, sizes, strict=True):
        identity += [split.kind, split.split, str(split.classes), str(size), _code(split), split.fingerprint]
    path = plan.folder / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.images"
    _remove_oldest(plan.folder, path, plan.capacity - plan.needed)
    store = Store(count, plan.capacity, path)
    os.utime(path)
    return store


def _code(dataset: SegmentationDataset) -> str:
    """Return a text that changes when the module of a data set's class is edited."""
    file = getattr(sys.modules.get(type(dataset).__module__), "__file__", None)
    status = os.stat(file) if file and os.path.exists(file) else None
    return f"{type(dataset).__qualname__} {status and (status.st_size, status.st_mtime_ns)}"


def _remove_oldest(folder: Path, keep: Path, limit: int) -> None:
    """Remove the least recently used files except `keep` until the others have at most `limit` bytes."""
    files = sorted((time, size, path) for path, size, time in _cache_files(folder) if path != keep)
    total = sum(size for _, size, _ in files)
    for _, size, path in files:
        if total <= limit:
            return
        path.unlink(missing_ok=True)  # a run that has it open can use it until it ends
        total -= size


def _cache_files(folder: Path) -> list[tuple[Path, int, int]]:
    """Return (path, bytes on disk, time of the last use) of each file."""
    files = [(path, path.stat()) for path in folder.glob("*.images")]
    return [(path, status.st_blocks * 512, status.st_mtime_ns) for path, status in files]


def _local_processes() -> int:
    """Return the number of processes that a launcher started on this machine, which do not share the memory."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1))
