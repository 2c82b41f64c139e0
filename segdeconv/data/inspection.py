"""Look at every file of a split before anything is trained on it: is it readable, and what is in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from segdeconv.classes import Classes
from segdeconv.data.dataset import FileDataset, SegmentationDataset
from segdeconv.errors import UsageError

VERSION = 1  # of what an inspection holds; a new number forgets the remembered ones
MOST_SHOWN = 20


@dataclass(frozen=True)
class Inspection:
    """What one split holds. Counts are by class; the last entry of each is the ignored pixels'.

    pixels: of each class. image_pixels: of the images in which it occurs. images: those images.
    sizes: how many images of each (H, W), the most frequent first.
    problems: one sentence for each file that cannot be used.
    """

    split: str
    num_images: int
    pixels: list[int]
    image_pixels: list[int]
    images: list[int]
    sizes: list[tuple[int, int, int]]
    problems: list[str]


def inspect(dataset: SegmentationDataset, *, remember: bool = True) -> Inspection:
    """Read every image and mask of a split once. Remembered by the files' sizes and times, in the user's cache."""
    text = f"{VERSION}\n{type(dataset).__qualname__} {dataset.split}\n{dataset.fingerprint}"
    memory = _cache() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    if remember and memory.is_file():
        try:
            content = json.loads(memory.read_text())
            return Inspection(**{**content, "sizes": [tuple(size) for size in content["sizes"]]})
        except (ValueError, TypeError, KeyError):
            memory.unlink(missing_ok=True)  # cut short by a crash of the machine: look again
    inspection = _inspect(dataset)
    if remember and not inspection.problems:
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            partial = memory.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(asdict(inspection)))
            partial.replace(memory)
        except OSError:
            pass  # a home that cannot be written costs the next run the same look, nothing else
    return inspection


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segdeconv" / "inspections"


def _inspect(dataset: SegmentationDataset) -> Inspection:
    num_classes, ignored = len(dataset.classes), dataset.classes.ignore_index

    def look(index: int) -> tuple[np.ndarray, tuple[int, int]] | str:
        try:
            mask = dataset[index].mask
        except UsageError as error:
            return str(error)
        counts = np.bincount(mask.ravel(), minlength=256)
        return np.append(counts[:num_classes], counts[ignored]), mask.shape

    pixels = np.zeros(num_classes + 1, dtype=np.int64)
    image_pixels, images = pixels.copy(), pixels.copy()
    sizes: Counter[tuple[int, int]] = Counter()
    problems = []
    # Threads suffice: decoding releases the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        looks = pool.map(look, range(len(dataset)))
        for seen in tqdm(looks, total=len(dataset), desc=f"inspecting {dataset.split}", leave=False, disable=None):
            if isinstance(seen, str):
                problems.append(seen)
                continue
            counts, size = seen
            pixels += counts
            image_pixels[counts > 0] += size[0] * size[1]
            images += counts > 0
            sizes[size] += 1
    return Inspection(
        dataset.split,
        len(dataset),
        pixels.tolist(),
        image_pixels.tolist(),
        images.tolist(),
        [(*size, count) for size, count in sizes.most_common()],
        problems,
    )


def inspect_all(datasets: Iterable[SegmentationDataset], *, remember: bool = True) -> list[Inspection]:
    """Inspect several splits of one data set; raises UsageError if anything in them cannot be used.

    Also if an image is in two splits: scores on images that were trained on mean nothing.
    """
    datasets = list(datasets)
    inspections = [inspect(dataset, remember=remember) for dataset in datasets]
    problems = [problem for inspection in inspections for problem in inspection.problems] + overlaps(datasets)
    if problems:
        more = f" (and {len(problems) - 1} more: python scripts/inspect_data.py lists them)" if problems[1:] else ""
        raise UsageError(problems[0] + more)
    return inspections


def overlaps(datasets: Iterable[SegmentationDataset]) -> list[str]:
    """One sentence for each image file that two splits share."""
    owner: dict[Path, str] = {}
    sentences = []
    for dataset in datasets:
        if not isinstance(dataset, FileDataset):
            continue
        for pair in dataset.pairs:
            path = pair.image.resolve()
            if owner.setdefault(path, dataset.split) != dataset.split:
                sentences.append(
                    f"{path} is in {owner[path]} and in {dataset.split}: its score would mean nothing - list it once"
                )
    return sentences


def table(inspection: Inspection, classes: Classes, weights: list[float] | None) -> str:
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
    labels: list[object] = [*classes.labels, classes.ignore_index]
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
