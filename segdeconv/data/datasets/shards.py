"""A data set in tar files, in a folder or in an object storage."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, overload

import numpy as np
from pydantic import Field

from segdeconv.data.dataset import FileDataset, ImageContents, Locality, Pair, require_root, require_split
from segdeconv.data.files.reading import MAX_PIXELS
from segdeconv.data.shard_files import PackedFile, ShardFolder
from segdeconv.data.shard_index import (
    INDEX,
    WAY_OUT,
    ListFile,
    Member,
    Shard,
    ShardSample,
    read_contents,
    read_head,
    read_shards,
)
from segdeconv.errors import UsageError
from segdeconv.system.files import hash_file

AHEAD = 2  # shards that are fetched before the first of their samples is needed


class Shards(FileDataset):
    """A data set that `segdeconv convert SET --shards DIR` has packed into tar files of about equal size.

    **Content**: the images of the converted data set as they were stored, byte by byte, and its masks.

    **Layout**: `index.json`, and for each split a list `SPLIT.json` and shards `SPLIT-00000.tar`, `SPLIT-00001.tar`,
    ... of images `SPLIT/images/NAME.*` and masks `SPLIT/masks/NAME.png`: unpacked, they are a data set of `Folder`. The
    lists have the offsets, sizes and hashes of all files, and `SPLIT-contents.json` what is counted in each image, so
    that a split is inspected without reading it.

    **Classes**: those of the converted data set, in the index; masks are palette PNGs of class indices.

    **Cite**: the publication of the converted data set.

    Args:
        split: `train` or `val`, or `test` if the data set has it.
        root: The folder, or its address: `s3://BUCKET/FOLDER`, `gs://`, `az://` or `https://`. Credentials are those in
            the environment. Shards of an address are fetched whole when they are needed.
        window: Number of shards whose samples are shuffled together in training. With no more shards than that, the
            order is that of any other data set. The window is shared among the processes of a run.
        shard_cache: Folder of fetched shards; by default segdeconv/shards in the user's cache folder.
        shard_cache_size: Its limit in GiB; None for a quarter of the free disk.
        max_pixels: Largest number of pixels of an image.

    Raises:
        UsageError: The index or a shard is missing, cut or changed, the window does not fit into the cache, or `split`
            is unknown.
    """

    def __init__(
        self,
        split: str,
        root: str,
        *,
        window: Annotated[int, Field(ge=1)] = 16,
        shard_cache: str | None = None,
        shard_cache_size: Annotated[float, Field(gt=0)] | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        folder = ShardFolder(root, shard_cache, shard_cache_size)
        if not folder.remote:
            require_root(root, f"{INDEX} and shards", "write it with segdeconv convert SET --shards DIR")
        shown = folder.address(INDEX)
        head, classes = read_head(folder.head(INDEX), shown)
        require_split(split, tuple(head.splits))
        stated = head.splits[split]
        shards = read_shards(*_listed(folder, stated.shards), stated.num_images)
        self.folder, self.shards, self.head = folder, shards, head
        self.numbers = np.repeat(np.arange(len(shards)), [len(shard.samples) for shard in shards])
        self.packed = _Pairs(split, folder, shards, self.numbers)
        super().__init__(split, classes, self.packed, exif=head.exif, max_pixels=max_pixels)
        self.channels, self.as_stored, self.band_names = head.channels, head.as_stored, tuple(head.band_names)
        self.split_names, self.own_classes = tuple(head.splits), head.own_classes
        self.locality = Locality(self.numbers, window)
        size = sum(shard.size for shard in shards)
        in_all = f"{len(shards)} of {size / 2**30:.3g} GiB"
        self.notes = (f"data: {head.source} in shards, {split} in {in_all}, from {root}",)
        if folder.remote:
            self.lookahead = -(-AHEAD * len(self) // len(shards))
            _require_room(folder, shards, window)
        else:
            _require_whole(folder, shards)

    def contents(self, index: int) -> ImageContents | None:
        return self._contents[index]

    @cached_property
    def _contents(self) -> list[ImageContents]:
        stated = self.head.splits[self.split]
        return read_contents(*_listed(self.folder, stated.contents), self.head, stated.num_images)

    def prefetch(self, indices: Iterable[int]) -> None:
        self.folder.prefetch(self.shards[number] for number in sorted({int(self.numbers[index]) for index in indices}))

    def stamp(self, index: int) -> str:
        sample = self.packed.sample(index)[1]
        return f"{sample.image.sha256} {sample.mask.sha256}"

    @property
    def files(self) -> list[Path]:
        if self.folder.remote:
            return []
        return [Path(self.folder.address(shard.file)) for shard in self.shards]

    @property
    def fingerprint(self) -> str:
        return f"{self.head.splits[self.split].shards.sha256} {self.classes} {self.max_pixels}"


class _Pairs(Sequence[Pair]):
    """The files of each sample, made when they are asked for: millions of paths would take gigabytes."""

    def __init__(self, split: str, folder: ShardFolder, shards: list[Shard], numbers: np.ndarray) -> None:
        self.split, self.folder, self.shards, self.numbers = split, folder, shards, numbers
        self.starts = [0, *accumulate(len(shard.samples) for shard in shards)]

    def __len__(self) -> int:
        return len(self.numbers)

    def sample(self, index: int) -> tuple[Shard, ShardSample]:
        """Return the shard of a sample, and the sample."""
        number = int(self.numbers[index])
        return self.shards[number], self.shards[number].samples[index % len(self) - self.starts[number]]

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        shard, sample = self.sample(index)

        def path(kind: str, member: Member) -> Path:
            file = f"{self.split}/{kind}/{sample.name}{member.suffix}"
            return PackedFile.of(self.folder, shard, member, file)

        instances = path("instances", sample.instances) if sample.instances else None
        return Pair(path("images", sample.image), path("masks", sample.mask), sample.name, instances)


def packed_images(root: str) -> Iterator[tuple[Path, str]]:
    """Yield the path of every image of a folder of shards, and its name, `SPLIT/NAME`.

    Args:
        root: The folder, or its address.

    Raises:
        UsageError: The index is missing or damaged, or the address does not answer.
    """
    folder = ShardFolder(root)
    head, _ = read_head(folder.head(INDEX), folder.address(INDEX))
    for split, stated in head.splits.items():
        for shard in read_shards(*_listed(folder, stated.shards), stated.num_images):
            for sample in shard.samples:
                file = f"{split}/images/{sample.name}{sample.image.suffix}"
                yield PackedFile.of(folder, shard, sample.image, file), f"{split}/{sample.name}"


def _listed(folder: ShardFolder, stated: ListFile) -> tuple[Path, str]:
    """Return a verified local copy of a list, and what messages call it.

    Raises:
        UsageError: It cannot be fetched, or has another hash.
    """
    path, shown = folder.path(stated.file, stated.size, stated.sha256), folder.address(stated.file)
    if not folder.remote and not path.is_file():
        raise UsageError(f"{shown} is missing - {WAY_OUT}")
    if not folder.remote and (path.stat().st_size != stated.size or hash_file(path) != stated.sha256):
        raise UsageError(f"{shown} does not have the hash in {INDEX} - {WAY_OUT}")
    return path, shown


def _require_whole(folder: ShardFolder, shards: list[Shard]) -> None:
    """Raise UsageError if a local shard is missing or does not have its size."""
    for shard in shards:
        path = Path(folder.address(shard.file))
        size = path.stat().st_size if path.is_file() else None
        if size != shard.size:
            state = "is missing" if size is None else f"has {size} of {shard.size} bytes"
            raise UsageError(f"{path} {state} - {WAY_OUT}")


def _require_room(folder: ShardFolder, shards: list[Shard], window: int) -> None:
    """Raise UsageError if the cache does not hold the shards that are read at a time, which would be fetched again."""
    largest = sorted((shard.size for shard in shards), reverse=True)
    needed = sum(largest[: window + AHEAD])
    if needed > folder.limit:
        raise UsageError(
            f"dataset.shard_cache_size={folder.limit / 2**30:.3g} (GiB) is less than the {needed / 2**30:.3g} of the "
            f"dataset.window={window} shards that are shuffled together and {AHEAD} ahead - raise it, or lower "
            "dataset.window, which changes the order of training"
        )
