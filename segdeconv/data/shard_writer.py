"""Writing of a data set as shards: tar files of about equal size, with an index."""

from __future__ import annotations

import hashlib
import io
import itertools
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from segdeconv.classes import Classes
from segdeconv.data.dataset import FileDataset, ImageContents, SegmentationDataset
from segdeconv.data.inspection import count_image, hash_pixels, overlaps
from segdeconv.data.shard_index import (
    FORMAT,
    INDEX,
    VERSION,
    Head,
    ListFile,
    Member,
    Shard,
    ShardSample,
    SplitFiles,
    as_json,
)
from segdeconv.drawing.png import Png
from segdeconv.errors import UsageError
from segdeconv.system.files import creating_folder, hash_file

SHARD_SIZE = 64 << 20  # bytes; a shard is complete once it has as many
AT_ONCE = 16  # images that are read at once


class _Packed(NamedTuple):
    """The files of one sample.

    Attributes:
        name: The name of the sample.
        files: The folder in the shard, the suffix and the bytes of the image, of the mask, and of the object numbers if
            there are any.
        contents: What is counted in the image.
    """

    name: str
    files: list[tuple[str, str, bytes]]
    contents: ImageContents


def write_shards(
    splits: Sequence[SegmentationDataset], out: Path, *, shard_size: int = SHARD_SIZE
) -> list[list[Shard]]:
    """Write the splits of a data set to a new folder, which appears under its name when it is complete.

    Every image and mask is read, and counted as in an inspection. Image files are copied byte by byte; images that are
    no files become PNG, or .npy if they are not 8-bit RGB. Masks become palette PNGs of class indices.

    Args:
        splits: The splits, whose classes are equal.
        out: The output folder; it must not exist, or be empty.
        shard_size: Bytes after which a shard is complete.

    Returns:
        The shards of each split.

    Raises:
        UsageError: The output folder is not empty, an image cannot be used, or two splits share one.
    """
    if problems := overlaps(splits):
        raise UsageError(problems[0])
    first = splits[0]
    if first.whole is not first:
        raise UsageError(
            "dataset.examples: shards hold whole images, from which training cuts crops - convert with "
            "dataset.examples=images, and set it in training"
        )
    files = first.unwrapped
    from_files = isinstance(files, FileDataset) and files.names == first.names
    # Arrays of other channels are stored as such, so that they must be read as such.
    as_stored = first.as_stored or (not from_files and not _is_rgb(first))
    with creating_folder(out, "--shards") as partial:
        written = [_write_split(dataset, partial, shard_size) for dataset in splits]
        entries = {}
        for dataset, (shards, contents) in zip(splits, written, strict=True):
            entries[dataset.split] = SplitFiles(
                len(dataset),
                _write_list(partial / f"{dataset.split}.json", as_json(shards)),
                _write_list(partial / f"{dataset.split}-contents.json", as_json(contents)),
            )
        head = Head(
            FORMAT,
            VERSION,
            first.kind,
            _as_stored_in_shards(first.classes).to_dict(),
            first.own_classes,
            first.channels,
            as_stored,
            list(first.band_names),
            files.exif if isinstance(files, FileDataset) and from_files else "ignore",
            entries,
        )
        (partial / INDEX).write_bytes(as_json(head))
    return [shards for shards, _ in written]


def _write_list(path: Path, content: bytes) -> ListFile:
    path.write_bytes(content)
    return ListFile(path.name, len(content), hashlib.sha256(content).hexdigest())


def _is_rgb(dataset: SegmentationDataset) -> bool:
    return dataset.channels == 3 and dataset[0].image.dtype == np.uint8


def _as_stored_in_shards(classes: Classes) -> Classes:
    """Return the classes with their indices as labels."""
    names, colours, colour = classes.names, classes.colours, classes.ignore_colour
    return Classes(names, colours, classes.ignore_index, ignore_colour=colour, by_colour=False)


def _write_split(
    dataset: SegmentationDataset, folder: Path, shard_size: int
) -> tuple[list[Shard], list[ImageContents]]:
    shards: list[Shard] = []
    contents: list[ImageContents] = []
    packed = _packed(dataset)
    while (first := next(packed, None)) is not None:
        path = folder / f"{dataset.split}-{len(shards):05d}.tar"
        samples: list[ShardSample] = []
        with tarfile.open(path, "x", format=tarfile.PAX_FORMAT) as tar:
            for sample in itertools.chain([first], packed):
                image, mask, *instances = [
                    _add(tar, f"{dataset.split}/{kind}/{sample.name}", suffix, content)
                    for kind, suffix, content in sample.files
                ]
                samples.append(ShardSample(sample.name, image, mask, instances[0] if instances else None))
                contents.append(sample.contents)
                if tar.offset >= shard_size:
                    break
        shards.append(Shard(path.name, path.stat().st_size, hash_file(path), samples))
    return shards, contents


def _add(tar: tarfile.TarFile, stem: str, suffix: str, content: bytes) -> Member:
    """Append a file without a time or an owner, so that the same data set gives the same bytes."""
    entry = tarfile.TarInfo(stem + suffix)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
    blocks = -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return Member(suffix, tar.offset - blocks, len(content), hashlib.sha256(content).hexdigest())


def _packed(dataset: SegmentationDataset) -> Iterator[_Packed]:
    """Yield the files of the samples in order; some are read at once, so that only these are in memory."""
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(dataset), desc=f"packing {dataset.split}", leave=False, disable=None) as bar,
    ):
        for start in range(0, len(dataset), AT_ONCE):
            indices = range(start, min(start + AT_ONCE, len(dataset)))
            for sample in pool.map(lambda index: _pack(dataset, index), indices):
                yield sample
                bar.update()


def _pack(dataset: SegmentationDataset, index: int) -> _Packed:
    sample = dataset[index]
    contents = count_image(dataset, index, sample)
    files = dataset.unwrapped
    pair = files.pairs[index] if isinstance(files, FileDataset) and files.names == dataset.names else None
    if pair is not None:
        suffix, image = pair.image.suffix, pair.image.read_bytes()
    else:
        suffix, image = _encoded(sample.image)
    mask = _png(sample.mask, dataset.classes.palette)
    packed = [("images", suffix, image), ("masks", ".png", mask)]
    if pair is not None and pair.instances is not None and pair.instances.is_file():
        packed.append(("instances", pair.instances.suffix, pair.instances.read_bytes()))
    # The mask in the shard has labels of its own, and no nodata value.
    counts = [(value, count) for value, count in enumerate(contents.counts[:-1]) if count]
    ignored = [(dataset.classes.ignore_index, contents.counts[-1])] if contents.counts[-1] else []
    stored = contents._replace(values=(*counts, *ignored), mask_nodata=None, mask_digest=hash_pixels(sample.mask))
    return _Packed(sample.name, packed, stored)


def _encoded(image: np.ndarray) -> tuple[str, bytes]:
    if image.shape[2] == 3 and image.dtype == np.uint8:
        return ".png", _png(image, None)
    content = io.BytesIO()
    np.save(content, image, allow_pickle=False)
    return ".npy", content.getvalue()


def _png(array: np.ndarray, palette: np.ndarray | None) -> bytes:
    content = io.BytesIO()
    png = Png(
        content, (array.shape[0], array.shape[1]), channels=array.shape[2] if array.ndim == 3 else 1, palette=palette
    )
    png.write(array)
    png.close()
    return content.getvalue()
