"""Crops of single objects and of object proposals, on which DeconvNet is trained.

Noh, Hong, Han 2015, section 4.2, https://arxiv.org/abs/1505.04366. The first stage trains on crops of single objects,
each in the centre and with everything else as background; the second stage trains on crops of object proposals.
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from segdeconv.classes import Classes
from segdeconv.data import proposals as object_proposals
from segdeconv.data.boxes import EMPTY, bounding_box, clipped, cut, expanded, iou, squared
from segdeconv.data.dataset import DatasetView, Sample, SegmentationDataset
from segdeconv.data.inspection import cache_folder, map_with_progress
from segdeconv.errors import UsageError
from segdeconv.system.files import hash_text, replacing

VERSION = 1  # of the cached tables; a new number invalidates them
BLACK = 0
BACKGROUND = "background"


class Objects(NamedTuple):
    """The objects of one image.

    Attributes:
        boxes: (N, 4), tight.
        numbers: (N,), the numbers of the objects in the instances of the image.
        classes: (N,), their class indices.
    """

    boxes: np.ndarray
    numbers: np.ndarray
    classes: np.ndarray


class Crops(DatasetView):
    """The crops of objects or proposals of a data set that numbers its objects, one sample per crop.

    The paper has about 0.2 million crops of objects and 2.7 million proposals. It does not give the number of repeats
    nor, for objects, the treatment of ignored pixels and of the part outside the image; these are our choices.

    Args:
        dataset: The data set to wrap.
        examples: `objects` crops the tight box of each object, enlarged and clipped to the image, and turns all other
            pixels into background. `proposals` crops the boxes of `proposals` that overlap an object, enlarged and
            extended to a square, with all classes; the part of a square outside the image is black and ignored. Ignored
            pixels stay ignored in both.
        context: Side of a crop relative to its box.
        proposals: `windows`, `selective_search`, `edge_boxes`, or a file of boxes; see `proposals.source`.
        overlap: Smallest intersection over union of a proposal and an object.
        most: Maximum number of proposals per object, by score; None for all. Splits other than train use one, the
            proposal with the largest overlap.
        repeats: Maximum number of times that a crop of a rare class is repeated in train. Classes are repeated up to
            the median number of crops per class, where a crop has the class of its object.

    Raises:
        UsageError: The data set has no background, no object numbers or no such crops, or `proposals` cannot be read.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        *,
        examples: Literal["images", "objects", "proposals"] = "images",
        context: Annotated[float, Field(ge=1, le=10)] = 1.2,
        proposals: str = "windows",
        overlap: Annotated[float, Field(gt=0, le=1)] = 0.5,
        most: Annotated[int, Field(ge=1)] | None = None,
        repeats: Annotated[int, Field(ge=1)] = 1,
    ) -> None:
        assert examples != "images", "whole images need no crops"
        if BACKGROUND not in dataset.classes.names:
            raise UsageError(
                f"dataset.examples={examples} needs a class '{BACKGROUND}' for the surroundings of objects, but "
                f"{dataset.kind} has {', '.join(dataset.classes.names[:4])}, ... - use examples=images"
            )
        super().__init__(dataset)
        self.examples, self.context, self.overlap = examples, context, overlap
        self.proposals, self.most = proposals, most
        self._settings = f"{examples} {context} {proposals} {overlap} {most} {repeats}"
        # (N, 7): image, x1, y1, x2, y2, number of the object, its class
        unique = self._load_or_find()
        if not len(unique):
            raise UsageError(
                f"{dataset.split} of {dataset.kind} has no {examples} - check its masks, or use examples=images"
            )
        times = _repeats(unique[:, 6], len(self.classes), repeats if self.split == "train" else 1)
        self.table = np.repeat(unique, times, axis=0)
        numbers = np.arange(len(self.table)) - np.searchsorted(self.table[:, 0], self.table[:, 0])
        self.names = [f"{dataset.names[row[0]]}_{number:04d}" for row, number in zip(self.table, numbers, strict=True)]
        if dataset.locality is not None:
            self.locality = dataset.locality._replace(groups=dataset.locality.groups[self.table[:, 0]])
            self.lookahead = dataset.lookahead * len(self.table) // len(dataset)
        more = f", repeated to {len(self.table)}" if len(self.table) > len(unique) else ""
        self.notes = (
            *dataset.notes,
            f"{self.split}: {len(unique)} crops of {examples}{more}, from {len(np.unique(unique[:, 0]))} of "
            f"{len(dataset)} images; the table below counts whole images",
        )

    def __getitem__(self, index: int) -> Sample:
        image_index, box, number = int(self.table[index, 0]), self.table[index, 1:5], self.table[index, 5]
        image, mask, _ = self.dataset[image_index]
        ignored = self.classes.ignore_index
        if self.examples == "objects":
            others = (self.dataset.instances(image_index) != number) & (mask != ignored)
            mask = np.where(others, np.uint8(self.classes.names.index(BACKGROUND)), mask)
        return Sample(cut(image, box, BLACK), cut(mask, box, ignored), self.names[index])

    @property
    def whole(self) -> SegmentationDataset:
        return self.dataset.whole

    def wrap(self, view: Callable[[SegmentationDataset], SegmentationDataset]) -> SegmentationDataset:
        crops = copy.copy(self)
        crops.dataset = self.dataset.wrap(view)
        return crops

    def stamp(self, index: int) -> str:
        return self.dataset.stamp(int(self.table[index, 0]))

    def prefetch(self, indices: Iterable[int]) -> None:
        self.dataset.prefetch(int(self.table[index, 0]) for index in indices)

    instances = SegmentationDataset.instances  # crops have no object numbers

    @property
    def fingerprint(self) -> str:
        return f"{self.kind} {self._settings} {self.dataset.fingerprint}"

    def _load_or_find(self) -> np.ndarray:
        """Return the table of crops from the cache, since finding those of ten thousand images takes minutes."""
        boxes = Path(self.proposals)
        status = boxes.stat() if boxes.exists() and self.examples == "proposals" else None
        text = f"{VERSION} {self.split} {status and (status.st_size, status.st_mtime_ns)} {self.fingerprint}"
        path = cache_folder("crops") / f"{hash_text(text)[:32]}.npy"
        if path.is_file():
            try:
                return np.load(path, allow_pickle=False)
            except (ValueError, EOFError):
                path.unlink(missing_ok=True)  # truncated by a crash of the machine
        table = self._find()
        with suppress(OSError), replacing(path) as file:  # without the file, the next run finds them again
            np.save(file, table)
        return table

    def _find(self) -> np.ndarray:
        propose = object_proposals.source(self.proposals, all_windows=True) if self.examples == "proposals" else None

        def find_in_image(index: int) -> np.ndarray:
            image, mask, name = self.dataset[index]
            objects = objects_of(mask, self.dataset.instances(index), self.classes, name)
            if propose is None:
                boxes, owners = objects.boxes, np.arange(len(objects.boxes))
                boxes = clipped(expanded(boxes, self.context), mask.shape)
            else:
                boxes, owners = self._overlapping(propose(image, name), objects)
                boxes = squared(expanded(boxes, self.context))
            images = np.full(len(boxes), index)
            columns = (images, *boxes.T, objects.numbers[owners], objects.classes[owners])
            return np.stack(columns, axis=1).astype(np.int32)

        return np.concatenate(
            map_with_progress(len(self.dataset), find_in_image, f"finding {self.examples} in {self.split}")
        )

    def _overlapping(self, boxes: np.ndarray, objects: Objects) -> tuple[np.ndarray, np.ndarray]:
        """Return the proposals that overlap an object, and for each the index of the object it overlaps most."""
        if not len(boxes) or not len(objects.boxes):
            return EMPTY, np.zeros(0, dtype=np.int64)
        overlaps = iou(boxes, objects.boxes)
        owners, best = overlaps.argmax(axis=1), overlaps.max(axis=1)
        selected = []
        for owner in range(len(objects.boxes)):
            candidates = np.flatnonzero((owners == owner) & (best >= self.overlap))
            if self.split != "train":
                candidates = candidates[np.argsort(-best[candidates], kind="stable")][:1]
            selected.append(candidates[: self.most])
        indices = np.sort(np.concatenate(selected))
        return boxes[indices], owners[indices]


def objects_of(mask: np.ndarray, instances: np.ndarray, classes: Classes, name: str) -> Objects:
    """Find the objects of an image; each has the class of most of its pixels.

    Objects without a class, because all their pixels are ignored or background, are left out.

    Args:
        mask: (H, W) class indices.
        instances: (H, W) object numbers.
        classes: The classes of the mask.
        name: Name of the image, for the error message.

    Raises:
        UsageError: `mask` and `instances` differ in shape.
    """
    if instances.shape != mask.shape:
        raise UsageError(
            f"the mask of {name} has shape {mask.shape} and its object numbers {instances.shape} - both need one "
            "value per pixel"
        )
    boxes, numbers, labels = [], [], []
    for number in np.unique(instances):
        if number in (0, classes.ignore_index):
            continue
        inside = instances == number
        counts = np.bincount(mask[inside], minlength=256)[: len(classes)]
        counts[classes.names.index(BACKGROUND)] = 0
        if counts.any():
            boxes.append(bounding_box(inside))
            numbers.append(int(number))
            labels.append(int(counts.argmax()))
    return Objects(np.array(boxes).reshape(-1, 4), np.array(numbers, dtype=np.int64), np.array(labels, dtype=np.int64))


def _repeats(labels: np.ndarray, num_classes: int, max_repeats: int) -> np.ndarray:
    """Return (N,) how often to use each crop, given its (N,) class: 1, or up to `max_repeats` for rare classes."""
    counts = np.bincount(labels, minlength=num_classes)
    median = np.median(counts[counts > 0])
    times = np.rint(median / np.maximum(counts, 1)).clip(1, max_repeats).astype(np.int64)
    return times[labels]
