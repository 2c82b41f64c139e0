"""Writing of a data set's images and masks in the formats of labelling tools."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from segdeconv.classes import Classes
from segdeconv.data.annotations import coco, cvat, label_studio, labelme, supervisely, via, yolo
from segdeconv.data.annotations.class_labels import BACKGROUNDS
from segdeconv.data.annotations.polygons import regions
from segdeconv.data.annotations.shapes import LabelledImage, LabelledRegion
from segdeconv.data.class_file import class_file
from segdeconv.data.dataset import FileDataset, SegmentationDataset
from segdeconv.data.inspection import map_with_progress
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.system.files import creating_folder

IMAGES = ("copy", "link", "none")  # what is done with the image files


class Layout(NamedTuple):
    """Where a format has its files, below the output folder.

    Attributes:
        images: Folder of the images of a split; {} stands for the split.
        write: Writes the annotations.
        flat: Images have no sub-folders.
        ignored: The label of ignored pixels.
    """

    images: str
    write: Callable[[Path, Sequence[LabelledImage], Classes], None]
    flat: bool = False
    ignored: str = "ignore"


FORMATS: Mapping[str, Layout | None] = {
    "masks": None,
    "coco": Layout("images/{}", coco.write),
    "labelme": Layout("{}", labelme.write, ignored="__ignore__"),
    "cvat": Layout("images/{}", cvat.write),
    "yolo": Layout("images/{}", yolo.write),
    "label_studio": Layout("images/{}", label_studio.write),
    "supervisely": Layout("{}/img", supervisely.write, flat=True),
    "via": Layout("images/{}", via.write),
}


def convert(
    splits: Sequence[SegmentationDataset], out: Path, kind: str, *, simplify: float = 0.0, images: str = "copy"
) -> list[LabelledImage]:
    """Write the splits of a data set to a new folder, which appears under its name when it is complete.

    Regions are the 4-connected components of the classes without the background, whose outlines follow the edges of
    pixels: reading them gives the same masks, unless they are simplified.

    Args:
        splits: The splits, whose classes are equal.
        out: The output folder; it must not exist, or be empty.
        kind: A key of `FORMATS`.
        simplify: Largest distance in pixels by which an outline may change to have fewer corners.
        images: One of `IMAGES`: copy the image files, link to them, or write annotations only.

    Returns:
        What was written for each image.

    Raises:
        UsageError: The output folder is not empty, or two images would have one file.
    """
    layout = FORMATS[kind]
    with creating_folder(out, "--out") as partial:
        written: list[LabelledImage] = []
        for dataset in splits:
            converter = _Converter(dataset, partial, layout, simplify, images)
            written += map_with_progress(len(dataset), converter, f"converting {dataset.split}")
        classes = splits[0].classes
        if layout is None:
            (partial / "classes.yaml").write_text(class_file(_with_indices(classes), {}), encoding="utf-8")
        else:
            layout.write(partial, written, classes)
    return written


def _with_indices(classes: Classes) -> Classes:
    """Return classes whose labels are the class indices, as `draw.save_mask` writes them."""
    return Classes(classes.names, classes.colours, classes.ignore_index, by_colour=False)


class _Converter:
    """Writes the image, and for masks the mask, of one sample, and returns its regions."""

    def __init__(
        self, dataset: SegmentationDataset, out: Path, layout: Layout | None, simplify: float, images: str
    ) -> None:
        self.dataset, self.out, self.layout, self.simplify, self.images = dataset, out, layout, simplify, images
        self.names = [name.replace("/", "_") for name in dataset.names] if layout and layout.flat else dataset.names
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise UsageError(f"two images would be {twice}, since this format has no folders - rename one of them")

    def __call__(self, index: int) -> LabelledImage:
        dataset, name = self.dataset, self.names[index]
        sample = dataset[index]
        files = dataset.unwrapped
        file = files.pairs[index].image if isinstance(files, FileDataset) and files.names == dataset.names else None
        folder = "images/{}" if self.layout is None else self.layout.images
        target = Path(folder.format(dataset.split), f"{name}{file.suffix if file else '.png'}")
        self._write_image(file, sample.image, self.out / target)
        size = sample.mask.shape[0], sample.mask.shape[1]
        if self.layout is None:
            path = self.out / "masks" / dataset.split / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw.save_mask(sample.mask, dataset.classes, path)
            return LabelledImage(target, size, dataset.split, ())
        return LabelledImage(target, size, dataset.split, tuple(self._regions(sample.mask)))

    def _write_image(self, file: Path | None, image: np.ndarray, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.images == "none":
            return
        if file is None:
            draw.save_image(image, target)
        elif self.images == "link":
            target.symlink_to(os.path.realpath(file))
        else:
            shutil.copyfile(file, target)

    def _regions(self, mask: np.ndarray) -> list[LabelledRegion]:
        assert self.layout is not None
        names = dict(enumerate(self.dataset.classes.names))
        names = {index: name for index, name in names.items() if name.casefold() not in BACKGROUNDS}
        if len(names) < len(self.dataset.classes):  # otherwise pixels without annotation are the ignored ones
            names[self.dataset.classes.ignore_index] = self.layout.ignored
        return [
            LabelledRegion(names[region.class_index], self._simplified(region.polygon), region.area, region.box)
            for region in regions(mask)
            if region.class_index in names
        ]

    def _simplified(self, ring: np.ndarray) -> np.ndarray:
        if not self.simplify:
            return ring
        short = cv2.approxPolyDP(ring.astype(np.int32)[:, None], self.simplify, closed=True)[:, 0]
        return short if len(short) >= 3 else ring
