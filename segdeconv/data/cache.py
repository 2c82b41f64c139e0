"""Decoded images and masks, kept so that each is decoded once, and how much of the machine they may take."""

import hashlib
import os
import shutil
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from segdeconv.data.dataset import DatasetView, Sample, SegmentationDataset
from segdeconv.data.inspection import cache
from segdeconv.data.preprocessing import Size, resize_image, resize_mask
from segdeconv.data.store import IN_MEMORY, ON_DISK, STAMP, Store
from segdeconv.errors import UsageError

Kind = Literal["auto", "none", "memory", "disk"]

VERSION = 1  # of what is kept on disk, and of how it was decoded; a new number forgets it
SHARE = 0.25  # of the memory or disk that is free: the bound where nobody gave one
_HEAD = struct.Struct("<6I")  # image: height, width, channels, bytes of each; mask: height, width


class Cached(DatasetView):
    """A view of a data set that decodes an image the first time and takes it from `store` from then on.

    first: the store's number for image 0. size: (H, W) that images are kept at, None for their own; with `masks_too`
    masks as well. An image whose file, or whose mask's file, has another size or time than when it was decoded is
    decoded again.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        store: Store,
        *,
        first: int = 0,
        size: Size | None = None,
        masks_too: bool = True,
    ) -> None:
        super().__init__(dataset)
        self.store, self.first, self.size, self.masks_too = store, first, size, masks_too

    def __getitem__(self, index: int) -> Sample:
        stamp = hashlib.blake2b(self.dataset.stamp(index).encode(), digest_size=STAMP).digest()
        kept = self.store.get(self.first + index, stamp)
        if kept is not None:
            return Sample(*_unpacked(kept), self.names[index])
        image, mask, name = self.dataset[index]
        if self.size is not None:
            image = resize_image(image, self.size)
            mask = resize_mask(mask, self.size) if self.masks_too else mask
        self.store.put(self.first + index, stamp, _packed(image, mask))
        return Sample(image, mask, name)

    @property
    def fingerprint(self) -> str:
        return self.dataset.fingerprint


def _packed(image: np.ndarray, mask: np.ndarray) -> bytes:
    return _HEAD.pack(*image.shape, image.itemsize, *mask.shape) + image.tobytes() + mask.tobytes()


def _unpacked(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    height, width, channels, itemsize, rows, columns = _HEAD.unpack_from(content)
    size = height * width * channels
    dtype = np.uint8 if itemsize == 1 else np.uint16
    image = np.frombuffer(content, dtype, size, _HEAD.size).reshape(height, width, channels)
    mask = np.frombuffer(content, np.uint8, rows * columns, _HEAD.size + size * itemsize).reshape(rows, columns)
    return image, mask


@dataclass(frozen=True)
class CachePlan:
    """What is kept where. needed: bytes of all images, about. capacity: bytes that they may take."""

    kind: Literal["none", "memory", "disk"]
    needed: int = 0
    capacity: int = 0
    folder: Path | None = None


def make_room(
    kind: Kind, gibibytes: float | None, splits: Sequence[SegmentationDataset], sizes: Sequence[Size | None]
) -> CachePlan:
    """Where the decoded images of whole data sets go.

    kind: `auto` is memory for images that lie in files, where the system can share it (Linux); never the disk, which
        nobody expects to be filled. gibibytes: the bound; None for SHARE of what is free, divided among the processes
        that torchrun or SLURM starts on this machine.
    sizes: (H, W) that the images of each split are kept at, None for their own.
    """
    if kind == "auto":
        kind = "memory" if IN_MEMORY and all(split.image_files for split in splits) else "none"
    if kind == "none":
        return CachePlan("none")
    if not (IN_MEMORY if kind == "memory" else ON_DISK):
        others = "disk or none" if kind == "memory" and ON_DISK else "none"
        raise UsageError(f"dataset.cache={kind} is not possible on {sys.platform} - use dataset.cache={others}")
    needed = sum(len(split) * _bytes_of_one(split, size) for split, size in zip(splits, sizes, strict=True))
    folder = cache("decoded") if kind == "disk" else None
    if gibibytes is not None:
        capacity = int(gibibytes * 2**30)
    elif folder is not None:
        there = next(place for place in (folder, *folder.parents) if place.is_dir())
        capacity = int(SHARE * (shutil.disk_usage(there).free + sum(size for _, size, _ in _kept_files(folder))))
    else:
        capacity = int(SHARE * free_memory() / _processes_here())
    return CachePlan("memory" if folder is None else "disk", needed, capacity, folder)


def _bytes_of_one(split: SegmentationDataset, size: Size | None) -> int:
    """By its first image, which may be larger or smaller than the others."""
    image, mask, _ = split[0]
    pixels = size[0] * size[1] if size else mask.size
    return _HEAD.size + pixels * image.shape[2] * image.itemsize + max(pixels, mask.size)


def open_store(room: CachePlan, splits: Sequence[SegmentationDataset], sizes: Sequence[Size | None]) -> Store | None:
    """The store of all splits, one after another; None where nothing is kept."""
    count = sum(map(len, splits))
    if room.kind == "none":
        return None
    if room.folder is None:
        return Store(count, room.capacity)
    # All that decides what is decoded, beside the files: another data set, label_map or size is another file.
    about = [str(VERSION)]
    for split, size in zip(splits, sizes, strict=True):
        about += [split.kind, split.split, str(split.classes), str(size), _code(split), split.fingerprint]
    path = room.folder / f"{hashlib.sha256(repr(about).encode()).hexdigest()[:32]}.images"
    _forget_oldest(room.folder, path, room.capacity - room.needed)
    store = Store(count, room.capacity, path)
    os.utime(path)
    return store


def _code(dataset: SegmentationDataset) -> str:
    """Changes when the file is edited in which a data set's class, perhaps somebody's own, is written."""
    file = getattr(sys.modules.get(type(dataset).__module__), "__file__", None)
    status = os.stat(file) if file and os.path.exists(file) else None
    return f"{type(dataset).__qualname__} {status and (status.st_size, status.st_mtime_ns)}"


def _forget_oldest(folder: Path, kept: Path, room: int) -> None:
    """Remove the files that were used longest ago, until the others leave enough of the bound to `kept`."""
    files = sorted((time, size, path) for path, size, time in _kept_files(folder) if path != kept)
    total = sum(size for _, size, _ in files)
    for _, size, path in files:
        if total <= room:
            return
        path.unlink(missing_ok=True)  # a run that has it open keeps it until it ends
        total -= size


def _kept_files(folder: Path) -> list[tuple[Path, int, int]]:
    """(path, bytes on disk, time of the last use)."""
    found = [(path, path.stat()) for path in folder.glob("*.images")]
    return [(path, status.st_blocks * 512, status.st_mtime_ns) for path, status in found]


def free_memory() -> int:
    """Bytes that this process and others may still take before the machine, or the container, has none left."""
    with open("/proc/meminfo", encoding="ascii") as file:
        rows = dict(line.split(":", 1) for line in file)
    free = int(rows["MemAvailable"].split()[0]) * 1024
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if os.path.exists(limit) and os.path.exists(used):
            most, now = Path(limit).read_text().strip(), Path(used).read_text().strip()
            if most.isdecimal():
                free = min(free, max(0, int(most) - int(now)))
    return free


def _processes_here() -> int:
    """Processes of this run on this machine that do not share memory, because a launcher started each for itself."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1))
