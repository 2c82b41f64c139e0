"""What every data set is: images, masks and names of one split, and the classes."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from segdeconv.classes import Classes
from segdeconv.data.files.reading import MAX_PIXELS, Exif, read_image, read_labels, read_mask
from segdeconv.errors import UsageError


class Sample(NamedTuple):
    """image: (H, W, channels) uint8 or uint16, RGB if nothing else is said; mask: (H, W) uint8, class index or
    ignore_index; name: unique in its split.
    """

    image: np.ndarray
    mask: np.ndarray
    name: str


class Pair(NamedTuple):
    """An image file, its mask file, and the name they share.

    instances: a file that says which pixels are of one object, if the data set has such files.
    """

    image: Path
    mask: Path
    name: str
    instances: Path | None = None


class PublishedScores(NamedTuple):
    """What a paper says of a network on a data set, in percent as it is printed; None where it says nothing.

    split: that was scored, in the data set's own words. source: the paper, and where in it; url: its address.
    boundary_f1: with one-to-one matching. accuracy: of each class by name.
    """

    network: str
    source: str
    url: str
    split: str
    miou: float
    pixel_accuracy: float | None = None
    mean_accuracy: float | None = None
    boundary_f1: float | None = None
    accuracy: Mapping[str, float] = MappingProxyType({})


class SegmentationDataset(ABC):
    """One split of a data set.

    A subclass is one data set: its constructor takes `split` and whatever finds the data (usually `root`), it states
    its classes, and a YAML file in configs/dataset names it.

    channels: of every image. as_stored: whether images are what their files hold, so that a picture to be predicted is
        read as it is stored too; otherwise any picture becomes 8-bit RGB.
    notes: what a person should know about how the data was taken, a sentence each.
    published: scores of others on these classes.
    """

    split_names: tuple[str, ...] = ("train", "val", "test")
    channels: int = 3
    as_stored: bool = False
    notes: tuple[str, ...] = ()
    published: tuple[PublishedScores, ...] = ()
    way_out_of_overlap: str = "list it once"  # of an image that two splits share
    classes: Classes
    split: str
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes when the data changes: what an inspection of it is remembered under."""

    def stamp(self, index: int) -> str:
        """Changes when what an image is read from changes while a run lasts; asked each time before it is read."""
        return ""

    @property
    def kind(self) -> str:
        """What data set it is."""
        return type(self).__name__

    def instances(self, index: int) -> np.ndarray:
        """(H, W): a number for each object of an image, 0 where there is none, ignore_index where it is not known."""
        raise UsageError(
            f"{self.kind} does not say which pixels are of one object, which dataset.examples=objects or proposals "
            "needs - use dataset=voc, voc_aug or shapes, or examples=images"
        )

    @property
    def whole(self) -> SegmentationDataset:
        """The data set of whole images, where this one has parts of them: what is looked at before training."""
        return self

    def through(self, view: Callable[[SegmentationDataset], SegmentationDataset]) -> SegmentationDataset:
        """The same data set, with its whole images seen through a view of them."""
        return view(self)

    @property
    def image_files(self) -> list[Path]:
        """The files that the images lie in, if they do: two splits must not share one."""
        return []

    @property
    def files(self) -> list[Path]:
        """All files that the split is read from."""
        return []

    @property
    def stored_classes(self) -> Classes:
        """The classes that the masks were drawn with."""
        return self.classes


class DatasetView(SegmentationDataset):
    """A data set seen in another way: its images are those of `dataset`, and what is not said anew is what they say."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset, self.split, self.split_names = dataset, dataset.split, dataset.split_names
        self.names, self.classes, self.notes = dataset.names, dataset.classes, dataset.notes
        self.channels, self.as_stored = dataset.channels, dataset.as_stored
        self.way_out_of_overlap = dataset.way_out_of_overlap

    def stamp(self, index: int) -> str:
        return self.dataset.stamp(index)

    def instances(self, index: int) -> np.ndarray:
        return self.dataset.instances(index)

    @property
    def kind(self) -> str:
        return self.dataset.kind

    @property
    def image_files(self) -> list[Path]:
        return self.dataset.image_files

    @property
    def files(self) -> list[Path]:
        return self.dataset.files

    @property
    def stored_classes(self) -> Classes:
        return self.dataset.stored_classes


class FileDataset(SegmentationDataset):
    """A split that lies in files. The subclass finds the pairs; this reads and checks them.

    channels, exif, max_pixels: see `reading.read_image`.
    """

    def __init__(
        self,
        split: str,
        classes: Classes,
        pairs: list[Pair],
        *,
        channels: int | None = None,
        exif: Exif = "refuse",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.split, self.classes, self.pairs = split, classes, pairs
        self.names = [pair.name for pair in pairs]
        self.channels, self.as_stored = channels or 3, channels is not None
        self.exif: Exif = exif
        self.max_pixels = max_pixels

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        channels = self.channels if self.as_stored else None
        image = read_image(pair.image, channels=channels, exif=self.exif, max_pixels=self.max_pixels)
        mask = self.read_mask(index)
        if image.shape[:2] != mask.shape:
            raise UsageError(
                f"mask {pair.mask} is {mask.shape[0]}x{mask.shape[1]} and its image {pair.image} "
                f"{image.shape[0]}x{image.shape[1]} (HxW) - a mask has one label per pixel of its image"
            )
        return Sample(image, mask, pair.name)

    def read_mask(self, index: int) -> np.ndarray:
        """(H, W) uint8 class indices or ignore_index. Overridden where a mask's file alone does not say its classes."""
        return read_mask(self.pairs[index].mask, self.classes, max_pixels=self.max_pixels)

    def instances(self, index: int) -> np.ndarray:
        path = self.pairs[index].instances
        return super().instances(index) if path is None else read_labels(path, max_pixels=self.max_pixels)

    def stamp(self, index: int) -> str:
        pair = self.pairs[index]
        try:
            found = [(file, file.stat()) for file in (pair.image, pair.mask)]
        except OSError:
            return ""  # reading says in a sentence what is wrong with it
        return " ".join(f"{file} {status.st_size} {status.st_mtime_ns}" for file, status in found)

    @property
    def image_files(self) -> list[Path]:
        return [pair.image for pair in self.pairs]

    @property
    def files(self) -> list[Path]:
        return [file for pair in self.pairs for file in (pair.image, pair.mask, pair.instances) if file is not None]

    @property
    def fingerprint(self) -> str:
        lines = [repr((self.classes, self.channels, self.as_stored, self.exif, self.max_pixels))]
        for path in self.files:
            status = path.stat() if path.exists() else None
            lines.append(f"{os.path.realpath(path)} {status and (status.st_size, status.st_mtime_ns)}")
        return "\n".join(lines)


def require_root(root: str | Path, expected: str, way_out: str = "give its place as dataset.root=DIR") -> Path:
    """The folder of a data set, or one sentence that says what was expected in it."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UsageError(f"dataset.root={root} is not a folder; it should hold {expected} - {way_out}")
    return folder


def require_split(split: str, names: tuple[str, ...]) -> None:
    """Raise UsageError unless `split` is one of `names`."""
    if split not in names:
        raise UsageError(f"unknown split '{split}' - the splits are {', '.join(names)}")
