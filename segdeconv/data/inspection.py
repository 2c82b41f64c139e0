"""Look at every file of a split before anything is trained on it: is it readable, and what is in it."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
from tqdm import tqdm

from segdeconv.classes import Classes
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.errors import UsageError, command
from segdeconv.system.files import replace_text

VERSION = 3  # of what an inspection holds; a new number forgets the remembered ones
MOST_SHOWN = 20
LARGEST = 3  # images of each class whose numbers are kept


Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Inspection:
    """What one split holds. Counts are by class; the last entry of each is the ignored pixels'.

    pixels: of each class. image_pixels: of the images in which it occurs. images: those images.
    sizes: how many images of each (H, W), the most frequent first.
    bits: of the channels of every image, 8 or 16. mean, std: of each channel over all pixels, in stored units.
    problems: one sentence for each file that cannot be used.
    largest: for each class, the indices of the few images with the most pixels of it, the first the largest.
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


def inspect(dataset: SegmentationDataset, *, remember: bool = True) -> Inspection:
    """Read every whole image and mask once. Remembered by the files' sizes and times, in the user's cache."""
    dataset = dataset.whole
    text = f"{VERSION}\n{dataset.kind} {dataset.split}\n{dataset.fingerprint}"
    memory = cache("inspections") / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    if remember and memory.is_file():
        try:
            content = json.loads(memory.read_text())
            return Inspection(**{**content, "sizes": [tuple(size) for size in content["sizes"]]})
        except (ValueError, TypeError, KeyError):
            memory.unlink(missing_ok=True)  # cut short by a crash of the machine: look again
    inspection = _inspect(dataset)
    if remember and not inspection.problems:
        with suppress(OSError):  # a home that cannot be written costs the next run the same look, nothing else
            replace_text(memory, json.dumps(asdict(inspection)))
    return inspection


def cache(kind: str) -> Path:
    """The folder of what is remembered between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segdeconv" / kind


def map_with_progress(count: int, look: Callable[[int], Seen], about: str) -> list[Seen]:
    """What `look` says of each index, with a progress bar."""
    # Threads suffice: decoding and counting release the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(tqdm(pool.map(look, range(count)), total=count, desc=about, leave=False, disable=None))


class _Look(NamedTuple):
    """One image's share: counts by class, the ignored last; size; bits; sums of each channel and of its squares."""

    counts: np.ndarray
    size: tuple[int, int]
    bits: int
    sums: np.ndarray


def _inspect(dataset: SegmentationDataset) -> Inspection:
    num_classes, ignored = len(dataset.classes), dataset.classes.ignore_index

    def look(index: int) -> _Look | str:
        try:
            image, mask, name = dataset[index]
        except UsageError as error:
            return str(error)
        if image.shape[2] != dataset.channels:
            return f"{name} has {image.shape[2]} channels and its data set {dataset.channels} - give all as many"
        counts = np.bincount(mask.ravel(), minlength=256)
        counts = np.append(counts[:num_classes], counts[ignored])
        return _Look(counts, (mask.shape[0], mask.shape[1]), 8 * image.dtype.itemsize, _moments(image) * mask.size)

    pixels = np.zeros(num_classes + 1, dtype=np.int64)
    image_pixels, images = pixels.copy(), pixels.copy()
    sums = np.zeros((2, dataset.channels))
    sizes: Counter[tuple[int, int]] = Counter()
    of_bits: dict[int, list[str]] = {}
    problems = []
    largest: list[list[tuple[int, int]]] = [[] for _ in range(num_classes)]  # (pixels, -index)
    for index, (name, seen) in enumerate(
        zip(dataset.names, map_with_progress(len(dataset), look, f"inspecting {dataset.split}"), strict=True)
    ):
        if isinstance(seen, str):
            problems.append(seen)
            continue
        pixels += seen.counts
        image_pixels[seen.counts > 0] += seen.size[0] * seen.size[1]
        images += seen.counts > 0
        for label in np.flatnonzero(seen.counts[:-1]):
            largest[label] = sorted([*largest[label], (int(seen.counts[label]), -index)], reverse=True)[:LARGEST]
        sizes[seen.size] += 1
        of_bits.setdefault(seen.bits, []).append(name)
        sums += seen.sums
    if len(of_bits) > 1:
        problems.append(f"{of_bits[8][0]} has 8 bit and {of_bits[16][0]} 16 bit per channel - save all images alike")
    mean, square = sums / max(1, sum(height * width * count for (height, width), count in sizes.items()))
    return Inspection(
        dataset.split,
        len(dataset),
        pixels.tolist(),
        image_pixels.tolist(),
        images.tolist(),
        [(*size, count) for size, count in sizes.most_common()],
        max(of_bits, default=8),
        [_readable(value) for value in mean],
        [_readable(value) for value in np.sqrt(np.maximum(0, square - mean**2))],
        problems,
        [[-place for _, place in found] for found in largest],
    )


def _moments(image: np.ndarray) -> np.ndarray:
    """(2, C): the mean of each channel and of its squares."""
    groups = range(0, image.shape[2], 4)  # as many channels as OpenCV takes
    found = [np.hstack(cv2.meanStdDev(np.ascontiguousarray(image[:, :, first : first + 4]))) for first in groups]
    mean, std = np.concatenate(found).T
    return np.stack([mean, std**2 + mean**2])


def _readable(value: float) -> float:
    return float(f"{value:.6g}")


def inspect_all(datasets: Iterable[SegmentationDataset], *, remember: bool = True) -> list[Inspection]:
    """Inspect several splits of one data set; raises UsageError if anything in them cannot be used.

    Also if an image is in two splits: scores on images that were trained on mean nothing.
    """
    datasets = list(datasets)
    inspections = [inspect(dataset, remember=remember) for dataset in datasets]
    problems = [problem for inspection in inspections for problem in inspection.problems] + overlaps(datasets)
    if not problems and len({inspection.bits for inspection in inspections}) > 1:
        found = ", ".join(f"{inspection.split} {inspection.bits} bit" for inspection in inspections)
        problems = [f"the splits differ: {found} per channel - save all images alike"]
    if problems:
        more = f" (and {len(problems) - 1} more: {command('inspect_data')} lists them)" if problems[1:] else ""
        raise UsageError(problems[0] + more)
    return inspections


def overlaps(datasets: Iterable[SegmentationDataset]) -> list[str]:
    """One sentence for each image file that two splits share."""
    owner: dict[Path, str] = {}
    sentences = []
    for dataset in datasets:
        for image in dataset.image_files:
            path = Path(os.path.realpath(image))  # resolve() raises for a link that leads to itself
            if owner.setdefault(path, dataset.split) != dataset.split:
                sentences.append(
                    f"{path} is in {owner[path]} and in {dataset.split}: its score would mean nothing - "
                    f"{dataset.way_out_of_overlap}"
                )
    return sentences


def class_table(inspection: Inspection, classes: Classes, weights: list[float] | None) -> str:
    """The counts of one split, for reading.

    weights: by class, shown as a last column.
    """
    total = max(1, sum(inspection.pixels))
    width = max(len(name) for name in (*classes.names, "(ignored)"))
    sizes = ", ".join(f"{count} of {h}x{w}" for h, w, count in inspection.sizes[:3])
    more = f" and {len(inspection.sizes) - 3} other sizes" if len(inspection.sizes) > 3 else ""
    lines = [
        f"{inspection.split}: {inspection.num_images} images ({sizes}{more})",
        f"  {'class':<{width}} label  colour       images  {'pixels':>12}   share  weight",
    ]
    if len(inspection.mean) != 3 or inspection.bits != 8:
        lines.insert(1, f"  {len(inspection.mean)} channel(s) of {inspection.bits} bit")
        for what, values in (("mean", inspection.mean), ("std", inspection.std)):
            numbers = ", ".join(f"{value:g}" for value in values[:MOST_SHOWN])
            lines[1] += f", {what} {numbers}" + (", ..." if len(values) > MOST_SHOWN else "")
    several = len(classes.ignored_labels) > 1
    labels: list[object] = [*classes.labels, "other" if several else classes.ignored_labels[0]]
    colours = [*classes.colours, classes.ignore_colour]
    for index, name in enumerate((*classes.names, "(ignored)")):
        shown = colours[index]
        colour = f"#{shown[0]:02x}{shown[1]:02x}{shown[2]:02x}" if shown else "-"
        weight = f"{weights[index]:7.4f}" if weights is not None and index < len(weights) else "      -"
        absent = "   <- no pixel in this split" if index < len(classes) and not inspection.pixels[index] else ""
        lines.append(
            f"  {name:<{width}} {labels[index]!s:>5}  {colour:<11} {inspection.images[index]:>7}  "
            f"{inspection.pixels[index]:>12}  {100 * inspection.pixels[index] / total:5.2f}% {weight}{absent}"
        )
    return "\n".join(lines)
