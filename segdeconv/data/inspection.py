"""Inspection of a data set before training: every file is read, and pixels, sizes and channels are counted."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
from pydantic import TypeAdapter
from tqdm import tqdm

from segdeconv.classes import Classes, count_values, hex_colour, is_grey, pack_colours
from segdeconv.data.dataset import FileDataset, ImageContents, Sample, SegmentationDataset
from segdeconv.data.files.geo import band_names, describe_shift, nodata_pixels
from segdeconv.data.files.reading import StoredMask, stored_format
from segdeconv.errors import UsageError, command
from segdeconv.system.files import cache_root, file_identity, hash_text, replace_text
from segdeconv.system.plain_data import Limits, read_json

VERSION = 7  # of the fields of an inspection; a new number invalidates cached ones
CACHE_LIMITS = Limits(size=1 << 28, nodes=10_000_000)
DIGEST = 16  # bytes of the hash of an image or a mask
MAX_SHOWN = 20
NUM_LARGEST = 3  # images listed for each class
MAX_VALUES = 300  # labels or colours of mask files that are kept
MIN_CONTRAST = 16  # difference between the darkest and the brightest value of an 8-bit image

Result = TypeVar("Result")


class StoredValue(NamedTuple):
    """A label or colour in the mask files of a split.

    Attributes:
        value: The label, or the colour as '#rrggbb'.
        pixels: Number of pixels.
        images: Number of images in which it occurs.
        largest: The index of the image with the most pixels of it.
    """

    value: int | str
    pixels: int
    images: int
    largest: int


@dataclass(frozen=True)
class Inspection:
    """The contents of one split. Counts are by class; the last entry is for ignored pixels.

    Attributes:
        split: Name of the split.
        num_images: Number of images.
        pixels: Number of pixels of each class.
        image_pixels: Number of pixels of the images in which a class occurs.
        images: Number of images in which a class occurs.
        sizes: (H, W, number of images) of each size, the most frequent first.
        bits: Bits of the channels of every image, 8 or 16.
        mean: Mean of each channel over all pixels that have data, in the units of the stored numbers.
        std: Standard deviation of each channel, like `mean`.
        problems: An error message for each unusable file.
        largest: For each class, the indices of the images with the most pixels of it, the largest first.
        values: The labels or colours of the mask files before they become classes, the most frequent first.
        formats: (bits, channels, alpha, number of images) of each format of the image files that are read as RGB.
        flat: Indices of images with (nearly) no contrast.
        empty: Indices of images in which every pixel is ignored.
        digests: A hash of the pixels of every image, by which identical images are recognised; "" for unusable files.
        mask_digests: A hash of the values of every mask file, or of the class indices where there are no files; "" for
            unusable files and for shards of earlier versions.
        first_of_size: The index of the first image of each size of `sizes`.
        bands: The names of the channels that files give, with the number of images and the index of the first.
        nodata: Number of pixels with the nodata value of the image file, and of images with such pixels.
        mask_nodata: The nodata values of mask files, with the number of masks.
    """

    split: str
    num_images: int
    pixels: list[int]
    image_pixels: list[int]
    images: list[int]
    sizes: list[tuple[int, int, int]]
    bits: int
    mean: list[float]
    std: list[float]
    problems: list[str]
    largest: list[list[int]] = field(default_factory=list)
    values: list[StoredValue] = field(default_factory=list)
    formats: list[tuple[int, int, bool, int]] = field(default_factory=list)
    flat: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    mask_digests: list[str] = field(default_factory=list)
    first_of_size: list[int] = field(default_factory=list)
    bands: list[tuple[list[str], int, int]] = field(default_factory=list)
    nodata: tuple[int, int] = (0, 0)
    mask_nodata: list[tuple[int, int]] = field(default_factory=list)


def inspect(dataset: SegmentationDataset, *, use_cache: bool = True) -> Inspection:
    """Read every whole image and mask of a split and count its contents.

    Args:
        dataset: The split.
        use_cache: Read and write the result in the user's cache, under the sizes, times and inodes of the files.
            Inspections with problems are not cached.
    """
    dataset = dataset.whole
    # The inodes too, since a file that is moved over another can have its size and time.
    inodes = [file_identity(path)[2] for path in dataset.files]
    text = f"{VERSION}\n{dataset.kind} {dataset.split}\n{dataset.fingerprint}\n{inodes}"
    path = cache_folder("inspections") / f"{hash_text(text)[:32]}.json"
    if use_cache and path.is_file():
        try:
            cached = TypeAdapter(Inspection).validate_python(read_json(path, CACHE_LIMITS))
            if _fits(cached, dataset):
                return cached
        except ValueError:  # truncated by a crash of the machine
            pass
        path.unlink(missing_ok=True)
    inspection = _inspect(dataset)
    if use_cache and not inspection.problems:
        with suppress(OSError):  # without the file, the next run only inspects again
            replace_text(path, json.dumps(asdict(inspection)))
    return inspection


def _fits(inspection: Inspection, dataset: SegmentationDataset) -> bool:
    """Return whether a cached inspection has the numbers of classes, channels and images of its data set."""
    counts = (inspection.pixels, inspection.image_pixels, inspection.images)
    return (
        {len(count) for count in counts} == {len(dataset.classes) + 1}
        and len(inspection.largest) in (0, len(dataset.classes))
        and len(inspection.mean) == len(inspection.std) == dataset.channels
        and inspection.num_images == len(dataset)
        and len(inspection.digests) <= len(dataset)
        and len(inspection.mask_digests) <= len(dataset)
        and len(inspection.first_of_size) == len(inspection.sizes)
        and all(
            0 <= index < len(dataset)
            for group in (*inspection.largest, inspection.flat, inspection.empty, inspection.first_of_size)
            for index in group
        )
        and all(0 <= value.largest < len(dataset) for value in inspection.values)
    )


def cache_folder(kind: str) -> Path:
    """Return the folder of a kind of files that are cached between runs."""
    return cache_root() / "segdeconv" / kind


def map_with_progress(count: int, function: Callable[[int], Result], description: str) -> list[Result]:
    """Return `function` of the indices 0..count - 1, computed in parallel with a progress bar."""
    # Threads suffice, since decoding and counting release the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(tqdm(pool.map(function, range(count)), total=count, desc=description, leave=False, disable=None))


def _is_sample(value: Any) -> bool:
    """Return whether a data set of the user's own returns what it should."""
    if not isinstance(value, tuple) or len(value) != 3:
        return False
    image, mask, _ = value
    return (
        isinstance(image, np.ndarray)
        and isinstance(mask, np.ndarray)
        and (image.ndim, mask.ndim, mask.dtype) == (3, 2, np.uint8)
        and image.dtype in (np.uint8, np.uint16)
    )


def count_image(dataset: SegmentationDataset, index: int, sample: Sample) -> ImageContents:
    """Count the contents of one image.

    Args:
        dataset: The split.
        index: The index of the image.
        sample: `dataset[index]`.

    Raises:
        UsageError: The sample cannot be used.
    """
    if not _is_sample(sample):
        raise UsageError(
            f"sample {index} of {dataset.kind} is not a Sample(image, mask, name) of arrays (H, W, C) uint8 or "
            "uint16 and (H, W) uint8 - correct its __getitem__"
        )
    image, mask, name = sample
    if image.shape[2] != dataset.channels:
        raise UsageError(
            f"{name} has {image.shape[2]} channels, but its data set has {dataset.channels} - make them equal"
        )
    counts = np.bincount(mask.ravel(), minlength=256)
    files = dataset.unwrapped
    pair = files.pairs[index] if isinstance(files, FileDataset) else None
    if pair is not None and (shift := describe_shift(pair.image, pair.mask)):
        raise UsageError(
            f"{shift} - resample the mask to the pixels of the image, or remove the georeference that is wrong "
            "(gdal_edit.py -unsetgt)"
        )
    file_format, values, mask_nodata, stored = _stored(dataset, index)
    missing = None if pair is None else nodata_pixels(pair.image, image)
    without_data = 0 if missing is None else int(missing.sum())
    sums = _moments(image, missing) * (mask.size - without_data)
    return ImageContents(
        (*counts[: len(dataset.classes)].tolist(), int(counts[dataset.classes.ignore_index])),
        (mask.shape[0], mask.shape[1]),
        8 * image.dtype.itemsize,
        (tuple(sums[0].tolist()), tuple(sums[1].tolist())),
        int(np.ptp(image)),
        hash_pixels(image),
        file_format,
        tuple(values.items()),
        band_names(pair.image, dataset.channels) if pair is not None and dataset.as_stored else (),
        without_data,
        mask_nodata,
        hash_pixels(mask if stored is None else stored),
    )


def hash_pixels(array: np.ndarray, size: int = DIGEST) -> str:
    """Return a hash of the values, the shape and the dtype of an image or a mask, in hex.

    Args:
        array: The pixels.
        size: Bytes of the hash.
    """
    digest = hashlib.blake2b(f"{array.shape} {array.dtype.str}".encode(), digest_size=size)
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _inspect(dataset: SegmentationDataset) -> Inspection:
    def contents(index: int) -> ImageContents | str:
        try:
            return dataset.contents(index) or count_image(dataset, index, dataset[index])
        except UsageError as error:
            return str(error)

    num_classes = len(dataset.classes)
    pixels = np.zeros(num_classes + 1, dtype=np.int64)
    image_pixels, images = pixels.copy(), pixels.copy()
    sums = np.zeros((2, dataset.channels))
    sizes: Counter[tuple[int, int]] = Counter()
    first_of_size: dict[tuple[int, int], int] = {}
    names_by_bits: dict[int, list[str]] = {}
    problems = []
    formats: Counter[tuple[int, int, bool]] = Counter()
    stored_values: dict[int | str, list[int]] = {}  # pixels, images, most pixels, index of the image with the most
    flat, empty, digests, mask_digests = [], [], [], []
    bands: dict[tuple[str, ...], list[int]] = {}  # images, index of the first
    mask_nodata: Counter[int] = Counter()
    nodata: list[int] = []
    largest: list[list[tuple[int, int]]] = [[] for _ in range(num_classes)]  # (pixels, -index)
    results = map_with_progress(len(dataset), contents, f"inspecting {dataset.split}")
    for index, (name, result) in enumerate(zip(dataset.names, results, strict=True)):
        if isinstance(result, str):
            problems.append(result)
            digests.append("")
            mask_digests.append("")
            continue
        counts = np.array(result.counts)
        pixels += counts
        image_pixels[counts > 0] += result.size[0] * result.size[1]
        images += counts > 0
        for label in np.flatnonzero(counts[:-1]):
            largest[label] = sorted([*largest[label], (int(counts[label]), -index)], reverse=True)[:NUM_LARGEST]
        for value, count in result.values:
            entry = stored_values.setdefault(value, [0, 0, 0, index])
            entry[0], entry[1] = entry[0] + count, entry[1] + 1
            if count > entry[2]:
                entry[2:] = count, index
        if result.format is not None:
            formats[result.format] += 1
        if result.bands:
            bands.setdefault(result.bands, [0, index])[0] += 1
        if result.nodata:
            nodata.append(result.nodata)
        if result.mask_nodata is not None:
            mask_nodata[result.mask_nodata] += 1
        if result.contrast < (MIN_CONTRAST if result.bits == 8 else 1):
            flat.append(index)
        if not counts[:-1].any():
            empty.append(index)
        digests.append(result.digest)
        mask_digests.append(result.mask_digest)
        sizes[result.size] += 1
        first_of_size.setdefault(result.size, index)
        names_by_bits.setdefault(result.bits, []).append(name)
        sums += np.array(result.sums)
    if len(names_by_bits) > 1:
        first_8, first_16 = names_by_bits[8][0], names_by_bits[16][0]
        problems.append(f"{first_8} has 8 bit and {first_16} 16 bit per channel - save all images with the same bits")
    total = sum(height * width * count for (height, width), count in sizes.items()) - sum(nodata)
    mean, square = sums / max(1, total)
    return Inspection(
        dataset.split,
        len(dataset),
        pixels.tolist(),
        image_pixels.tolist(),
        images.tolist(),
        [(*size, count) for size, count in sizes.most_common()],
        max(names_by_bits, default=8),
        [_readable(value) for value in mean],
        [_readable(value) for value in np.sqrt(np.maximum(0, square - mean**2))],
        problems,
        [[-negative_index for _, negative_index in entries] for entries in largest],
        sorted(
            (StoredValue(value, count, images, index) for value, (count, images, _, index) in stored_values.items()),
            key=lambda entry: -entry.pixels,
        )[:MAX_VALUES],
        [(*stored_format, count) for stored_format, count in formats.most_common()],
        flat,
        empty,
        digests,
        mask_digests,
        [first_of_size[size] for size, _ in sizes.most_common()],
        sorted(((list(names), count, first) for names, (count, first) in bands.items()), key=lambda entry: -entry[1]),
        (sum(nodata), len(nodata)),
        mask_nodata.most_common(),
    )


def _stored(
    dataset: SegmentationDataset, index: int
) -> tuple[tuple[int, int, bool] | None, dict[int | str, int], int | None, np.ndarray | None]:
    """Return the format of an image file, the pixels of each label or colour in its mask file, nodata and values."""
    files = dataset.unwrapped
    if not isinstance(files, FileDataset):
        return None, {}, None, None
    mask = files.stored_mask(index)
    values, coloured = stored_values(mask, files.classes)
    present, counts = count_values(values)
    names = [f"#{packed:06x}" for packed in present.tolist()] if coloured else present.tolist()
    counted: dict[int | str, int] = dict(zip(names, counts.tolist(), strict=True))
    if files.as_stored:
        return None, counted, mask.nodata, mask.values
    stored = stored_format(files.pairs[index].image)
    return (stored.bits, stored.channels, stored.alpha), counted, mask.nodata, mask.values


def stored_values(mask: StoredMask, classes: Classes) -> tuple[np.ndarray, bool]:
    """Return what determines the class of each pixel of a mask file: labels, or packed colours.

    Returns:
        (H, W) integers, and whether they are colours.
    """
    values = mask.values
    if classes.by_colour and values.ndim == 2 and mask.palette is not None:
        values = mask.palette[values]
    if classes.by_colour is False and values.ndim == 3 and is_grey(values):
        values = values[:, :, 0]
    return (values, False) if values.ndim == 2 else (pack_colours(values), True)


def _moments(image: np.ndarray, missing: np.ndarray | None) -> np.ndarray:
    """Return (2, C), the mean of each channel and of its squares, without the missing pixels, (H, W) bool."""
    groups = range(0, image.shape[2], 4)  # OpenCV processes at most four channels
    used = None if missing is None else (~missing).view(np.uint8)
    parts = [
        np.hstack(cv2.meanStdDev(np.ascontiguousarray(image[:, :, first : first + 4]), mask=used)) for first in groups
    ]
    mean, std = np.concatenate(parts).T
    return np.stack([mean, std**2 + mean**2])


def _readable(value: float) -> float:
    return float(f"{value:.6g}")


def inspect_all(datasets: Iterable[SegmentationDataset], *, use_cache: bool = True) -> list[Inspection]:
    """Inspect several splits of one data set.

    Args:
        datasets: The splits.
        use_cache: See `inspect`.

    Raises:
        UsageError: A file cannot be used, the splits have different bits, or an image is in two splits.
    """
    datasets = list(datasets)
    inspections = [inspect(dataset, use_cache=use_cache) for dataset in datasets]
    problems = [problem for inspection in inspections for problem in inspection.problems] + overlaps(datasets)
    if not problems and len({inspection.bits for inspection in inspections}) > 1:
        bits = ", ".join(f"{inspection.split} {inspection.bits} bit" for inspection in inspections)
        problems = [f"the splits differ: {bits} per channel - save all images with the same bits"]
    if problems:
        more = f" (and {len(problems) - 1} more: {command('inspect_data')} lists them)" if problems[1:] else ""
        raise UsageError(problems[0] + more)
    return inspections


def overlaps(datasets: Iterable[SegmentationDataset]) -> list[str]:
    """Return an error message for each image file that is in two splits, since scores on it would be meaningless."""
    owner: dict[Path, str] = {}
    messages = []
    for dataset in datasets:
        for image in dataset.image_files:
            path = Path(os.path.realpath(image))  # resolve() raises for a link to itself
            if owner.setdefault(path, dataset.split) != dataset.split:
                messages.append(
                    f"{path} is in {owner[path]} and in {dataset.split}, so its score would be meaningless - "
                    f"{dataset.overlap_hint}"
                )
    return messages


def class_table(inspection: Inspection, classes: Classes, weights: list[float] | None) -> str:
    """Format the counts of one split as a table.

    Args:
        inspection: The inspection of the split.
        classes: Its classes.
        weights: Weight of each class, for the last column; None for no such column.
    """
    total = max(1, sum(inspection.pixels))
    width = max(len(name) for name in (*classes.names, "(ignored)"))
    sizes = ", ".join(f"{count} of {h}x{w}" for h, w, count in inspection.sizes[:3])
    more = f" and {len(inspection.sizes) - 3} other sizes" if len(inspection.sizes) > 3 else ""
    lines = [
        f"{inspection.split}: {inspection.num_images} images ({sizes}{more})",
        f"  {'class':<{width}} label  colour       images  {'pixels':>12}   share" + ("  weight" if weights else ""),
    ]
    if len(inspection.mean) != 3 or inspection.bits != 8:
        names = f" ({', '.join(inspection.bands[0][0][:MAX_SHOWN])})" if inspection.bands else ""
        lines.insert(1, f"  {len(inspection.mean)} channel(s) of {inspection.bits} bit{names}")
        for statistic, values in (("mean", inspection.mean), ("std", inspection.std)):
            numbers = ", ".join(f"{value:g}" for value in values[:MAX_SHOWN])
            lines[1] += f", {statistic} {numbers}" + (", ..." if len(values) > MAX_SHOWN else "")
    ignored = classes.ignored_labels
    void = "other" if len(ignored) > 1 else "-" if ignored[0] in classes.labels else ignored[0]
    labels: list[object] = ["-"] * (len(classes) + 1) if classes.by_colour else [*classes.labels, void]
    colours = [*classes.colours, classes.ignore_colour]
    for index, name in enumerate((*classes.names, "(ignored)")):
        rgb = colours[index]
        colour = hex_colour(rgb) if rgb else "-"
        weight = "" if not weights else f" {weights[index]:7.4f}" if index < len(classes) else "       -"
        absent = "   <- no pixel in this split" if index < len(classes) and not inspection.pixels[index] else ""
        lines.append(
            f"  {name:<{width}} {labels[index]!s:>5}  {colour:<11} {inspection.images[index]:>7}  "
            f"{inspection.pixels[index]:>12}  {100 * inspection.pixels[index] / total:5.2f}%{weight}{absent}"
        )
    return "\n".join(lines)
