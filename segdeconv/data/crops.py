"""Crops of single objects and of object proposals: what DeconvNet is trained on.

Noh, Hong, Han 2015, section 4.2, https://arxiv.org/abs/1505.04366. First objects are learnt one at a time, each in the
middle of its picture and everything else as background; then parts of images as they come.
"""

import copy
import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from segdeconv.classes import Classes
from segdeconv.data import proposals as object_proposals
from segdeconv.data.boxes import EMPTY, bounding, clipped, cut, expanded, iou, squared
from segdeconv.data.dataset import DatasetView, Sample, SegmentationDataset
from segdeconv.data.inspection import cache, map_with_progress
from segdeconv.errors import UsageError
from segdeconv.system.files import replacing

VERSION = 1  # of what is remembered; a new number forgets it
BLACK = 0
BACKGROUND = "background"


class Objects(NamedTuple):
    """The objects of one image. boxes: (N, 4), tight; numbers: (N,) in its instances; classes: (N,)."""

    boxes: np.ndarray
    numbers: np.ndarray
    classes: np.ndarray


class Crops(DatasetView):
    """A view of a data set that says which pixels are of one object: parts of its images, an index each.

    examples: `objects`, the tight box of each object, enlarged and cut at the image's border, in which all other pixels
        become background; or `proposals`, the boxes of `proposals` that meet the box of an object, enlarged and
        extended to a square, in which all classes stay. Void stays void in both. What of a square lies outside the
        image is black and void.
    context: how much longer than its box a crop is.
    proposals: see `proposals.source`: windows, selective_search, edge_boxes, or a file of boxes.
    overlap: smallest intersection over union of a proposal's box and an object's.
    most: proposals of each object, the most likely first; null for all. In other splits than train it is one, the one
        that meets the object best.
    repeats: how often a crop of a rare class is repeated in train, at most: as often as brings the class to the median
        number of crops of a class. A crop is of the class of its object.

    The paper has about 0.2 million crops of objects and 2.7 million proposals; it gives neither the number of repeats
    nor, for objects, what becomes of void and of the part outside the image: those are choices of ours.
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
        assert examples != "images", "whole images are the data set itself"
        if BACKGROUND not in dataset.classes.names:
            raise UsageError(
                f"dataset.examples={examples} needs a class '{BACKGROUND}', which is what lies around an object, and "
                f"{dataset.kind} has {', '.join(dataset.classes.names[:4])}, ... - use examples=images"
            )
        super().__init__(dataset)
        self.examples, self.context, self.overlap = examples, context, overlap
        self.proposals, self.most = proposals, most
        self._settings = f"{examples} {context} {proposals} {overlap} {most} {repeats}"
        # (N, 7): image, x1, y1, x2, y2, number of the object, its class
        found = self._remembered()
        if not len(found):
            raise UsageError(f"{dataset.split} of {dataset.kind} has no {examples} - check its masks, or use images")
        times = _repeats(found[:, 6], len(self.classes), repeats if self.split == "train" else 1)
        self.table = np.repeat(found, times, axis=0)
        places = np.arange(len(self.table)) - np.searchsorted(self.table[:, 0], self.table[:, 0])
        self.names = [f"{dataset.names[row[0]]}_{place:04d}" for row, place in zip(self.table, places, strict=True)]
        more = f", repeated to {len(self.table)}" if len(self.table) > len(found) else ""
        self.notes = (
            *dataset.notes,
            f"{self.split}: {len(found)} crops of {examples}{more}, from {len(np.unique(found[:, 0]))} of "
            f"{len(dataset)} images, which the table below counts whole",
        )

    def __getitem__(self, index: int) -> Sample:
        place, box, number = int(self.table[index, 0]), self.table[index, 1:5], self.table[index, 5]
        image, mask, _ = self.dataset[place]
        ignored = self.classes.ignore_index
        if self.examples == "objects":
            others = (self.dataset.instances(place) != number) & (mask != ignored)
            mask = np.where(others, np.uint8(self.classes.names.index(BACKGROUND)), mask)
        return Sample(cut(image, box, BLACK), cut(mask, box, ignored), self.names[index])

    @property
    def whole(self) -> SegmentationDataset:
        return self.dataset.whole

    def through(self, view: Callable[[SegmentationDataset], SegmentationDataset]) -> SegmentationDataset:
        crops = copy.copy(self)
        crops.dataset = self.dataset.through(view)
        return crops

    def stamp(self, index: int) -> str:
        return self.dataset.stamp(int(self.table[index, 0]))

    instances = SegmentationDataset.instances  # a crop has none

    @property
    def fingerprint(self) -> str:
        return f"{self.kind} {self._settings} {self.dataset.fingerprint}"

    def _remembered(self) -> np.ndarray:
        """The crops; looked for once, since proposals of ten thousand images take minutes."""
        given = Path(self.proposals)
        status = given.stat() if given.exists() and self.examples == "proposals" else None
        text = f"{VERSION} {self.split} {status and (status.st_size, status.st_mtime_ns)} {self.fingerprint}"
        memory = cache("crops") / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"
        if memory.is_file():
            try:
                return np.load(memory, allow_pickle=False)
            except (ValueError, EOFError):
                memory.unlink(missing_ok=True)  # cut short by a crash of the machine: look again
        found = self._find()
        with suppress(OSError), replacing(memory) as file:  # or the next run has to look again
            np.save(file, found)
        return found

    def _find(self) -> np.ndarray:
        propose = object_proposals.source(self.proposals, every=True) if self.examples == "proposals" else None

        def look(index: int) -> np.ndarray:
            image, mask, name = self.dataset[index]
            objects = objects_of(mask, self.dataset.instances(index), self.classes, name)
            if propose is None:
                boxes, owners = objects.boxes, np.arange(len(objects.boxes))
                boxes = clipped(expanded(boxes, self.context), mask.shape)
            else:
                boxes, owners = self._met(propose(image, name), objects)
                boxes = squared(expanded(boxes, self.context))
            images = np.full(len(boxes), index)
            columns = (images, *boxes.T, objects.numbers[owners], objects.classes[owners])
            return np.stack(columns, axis=1).astype(np.int32)

        return np.concatenate(
            map_with_progress(len(self.dataset), look, f"looking for {self.examples} in {self.split}")
        )

    def _met(self, boxes: np.ndarray, objects: Objects) -> tuple[np.ndarray, np.ndarray]:
        """The proposals that meet an object, and which object each is of: the one that it meets best."""
        if not len(boxes) or not len(objects.boxes):
            return EMPTY, np.zeros(0, dtype=np.int64)
        shared = iou(boxes, objects.boxes)
        owners, best = shared.argmax(axis=1), shared.max(axis=1)
        chosen = []
        for owner in range(len(objects.boxes)):
            meeting = np.flatnonzero((owners == owner) & (best >= self.overlap))
            if self.split != "train":
                meeting = meeting[np.argsort(-best[meeting], kind="stable")][:1]
            chosen.append(meeting[: self.most])
        kept = np.sort(np.concatenate(chosen))
        return boxes[kept], owners[kept]


def objects_of(mask: np.ndarray, instances: np.ndarray, classes: Classes, name: str) -> Objects:
    """The objects of an image's mask and instances, both (H, W); of each the class that most of its pixels have.

    Objects without a class, because it is ignored or background, are left out.
    """
    if instances.shape != mask.shape:
        raise UsageError(
            f"the mask of {name} has shape {mask.shape} and its objects {instances.shape} - both are numbers per pixel"
        )
    boxes, numbers, labels = [], [], []
    for number in np.unique(instances):
        if number in (0, classes.ignore_index):
            continue
        inside = instances == number
        counts = np.bincount(mask[inside], minlength=256)[: len(classes)]
        counts[classes.names.index(BACKGROUND)] = 0
        if counts.any():
            boxes.append(bounding(inside))
            numbers.append(int(number))
            labels.append(int(counts.argmax()))
    return Objects(np.array(boxes).reshape(-1, 4), np.array(numbers, dtype=np.int64), np.array(labels, dtype=np.int64))


def _repeats(labels: np.ndarray, num_classes: int, most: int) -> np.ndarray:
    """(N,) classes of crops -> (N,) how often each is used: 1, or up to `most` where its class is rarer than others."""
    counts = np.bincount(labels, minlength=num_classes)
    median = np.median(counts[counts > 0])
    times = np.rint(median / np.maximum(counts, 1)).clip(1, most).astype(np.int64)
    return times[labels]
