"""Base classes of data sets: the images, masks, names and classes of one split."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from segdeconv.classes import Classes
from segdeconv.data.files.geo import band_names, nodata_pixels
from segdeconv.data.files.reading import (
    MAX_PIXELS,
    Exif,
    StoredMask,
    read_image,
    read_labels,
    read_mask,
    read_stored_mask,
)
from segdeconv.errors import UsageError


class Sample(NamedTuple):
    """An image, its mask and its name.

    Attributes:
        image: (H, W, channels) uint8 or uint16, RGB unless the data set states other channels.
        mask: (H, W) uint8 of class indices or ignore_index.
        name: Unique within the split.
    """

    image: np.ndarray
    mask: np.ndarray
    name: str


class Pair(NamedTuple):
    """The files of one sample.

    Attributes:
        image: The image file.
        mask: The mask file.
        name: The name of the sample, unique within the split.
        instances: The file that numbers the objects of the image, if the data set has such files.
    """

    image: Path
    mask: Path
    name: str
    instances: Path | None = None


class ImageContents(NamedTuple):
    """The counted contents of one image and its mask, from which a split is inspected.

    Attributes:
        counts: Pixels by class, the ignored last.
        size: (H, W).
        bits: Bits of each channel as the data set gives them.
        sums: Sums of each channel over the pixels that have data, and of its squares.
        contrast: Difference between the smallest and the largest number of the image.
        digest: Hash of the pixels.
        format: (bits, channels, alpha) as stored; None without files, or if images are read as they are stored.
        values: Pixels by label or colour of the mask file.
        bands: Names of the channels.
        nodata: Number of pixels with the nodata value of the image file.
        mask_nodata: The nodata value of the mask file.
        mask_digest: Hash of the values of the mask file.
    """

    counts: tuple[int, ...]
    size: tuple[int, int]
    bits: int
    sums: tuple[tuple[float, ...], tuple[float, ...]]
    contrast: int
    digest: str
    format: tuple[int, int, bool] | None
    values: tuple[tuple[int | str, int], ...]
    bands: tuple[str, ...] = ()
    nodata: int = 0
    mask_nodata: int | None = None
    mask_digest: str = ""


class Locality(NamedTuple):
    """Which samples are stored together, so that an order can read them at about the same time.

    Attributes:
        groups: (N,) number of the group of each sample; 0 to the number of groups - 1.
        window: Number of groups whose samples are shuffled together.
    """

    groups: np.ndarray
    window: int


class PublishedScores(NamedTuple):
    """Scores of a network on a data set as published, in percent; None where the paper gives none.

    Attributes:
        network: Name of the network.
        source: The paper, and the table in it.
        url: Address of the paper.
        split: The evaluated split, as the data set names it.
        miou: Mean intersection over union.
        pixel_accuracy: Fraction of correct pixels.
        mean_accuracy: Mean of the accuracies of the classes.
        boundary_f1: Boundary F1 with one-to-one matching.
        accuracy: Accuracy of each class by name.
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
    """Base class of a split of a data set.

    A subclass is one data set: its constructor takes `split` and what is needed to find the data (usually `root`), it
    defines the classes, and a YAML file in configs/dataset names it.

    Attributes:
        split_names: Names of the splits.
        channels: Number of channels of every image.
        as_stored: True if images are read exactly as stored, in prediction too; otherwise every image is read as 8-bit
            RGB.
        notes: Facts about the split that the user should see, one line each.
        band_names: Names of the channels, if the files of images read as stored name them.
        warnings: Facts that may not be meant, one line each: files that are left out, assumptions about classes.
        inventory: Kinds of files and their number.
        own_classes: True if the classes are those of a user, who may have mistaken a label: training is refused if a
            class has no pixel while others are ignored.
        inferred_classes: True if the classes were inferred from the masks, because no table names them.
        published: Published scores on these classes.
        locality: Which samples are stored together, if the order of training must respect it.
        lookahead: Number of samples ahead of the current one that loaders announce to `prefetch`.
        overlap_hint: Suggestion in the error message for an image that two splits share.
        classes: The classes of the masks.
        split: Name of this split.
        names: Names of the samples, in order.
    """

    split_names: tuple[str, ...] = ("train", "val", "test")
    channels: int = 3
    as_stored: bool = False
    notes: tuple[str, ...] = ()
    band_names: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    inventory: tuple[tuple[str, int], ...] = ()
    own_classes: bool = False
    inferred_classes: bool = False
    published: tuple[PublishedScores, ...] = ()
    locality: Locality | None = None
    lookahead: int = 0
    overlap_hint: str = "list it once"
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
        """Text that changes when the data changes, under which its inspection is cached."""

    def stamp(self, index: int) -> str:
        """Return a text that changes when the files of an image change, checked each time before it is read."""
        return ""

    def contents(self, index: int) -> ImageContents | None:
        """Return the contents of an image where they are stored, so that inspection need not read it."""
        return None

    def prefetch(self, indices: Iterable[int]) -> None:
        """Fetch samples that are about to be read, in the background, if they are far away."""
        return

    @property
    def kind(self) -> str:
        """Name of the data set."""
        return type(self).__name__

    def instances(self, index: int) -> np.ndarray:
        """Return (H, W) numbers of the objects of an image: 0 for background, ignore_index for ignored pixels.

        Raises:
            UsageError: The data set has no object numbers.
        """
        raise UsageError(
            f"{self.kind} has no masks of single objects, which dataset.examples=objects and proposals need - "
            "use dataset=voc, voc_aug or shapes, or examples=images"
        )

    @property
    def whole(self) -> SegmentationDataset:
        """The data set of whole images, if this one has crops of them; it is inspected before training."""
        return self

    @property
    def unwrapped(self) -> SegmentationDataset:
        """The data set without views that change its samples."""
        return self

    def wrap(self, view: Callable[[SegmentationDataset], SegmentationDataset]) -> SegmentationDataset:
        """Return the same data set with a view applied to its whole images."""
        return view(self)

    @property
    def image_files(self) -> list[Path]:
        """Image files, if the data set has files; two splits must not share one."""
        return []

    @property
    def files(self) -> list[Path]:
        """All files of the split."""
        return []

    @property
    def stored_classes(self) -> Classes:
        """The classes of the mask files, before merging or renaming."""
        return self.classes


class DatasetView(SegmentationDataset):
    """Base class of data sets that change the samples of another data set; everything else is delegated to it.

    Args:
        dataset: The data set to wrap.
    """

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset, self.split, self.split_names = dataset, dataset.split, dataset.split_names
        self.names, self.classes, self.notes = dataset.names, dataset.classes, dataset.notes
        self.channels, self.as_stored, self.band_names = dataset.channels, dataset.as_stored, dataset.band_names
        self.overlap_hint, self.own_classes = dataset.overlap_hint, dataset.own_classes
        self.warnings, self.inventory = dataset.warnings, dataset.inventory
        self.locality, self.lookahead = dataset.locality, dataset.lookahead

    def prefetch(self, indices: Iterable[int]) -> None:
        self.dataset.prefetch(indices)

    @property
    def unwrapped(self) -> SegmentationDataset:
        return self.dataset.unwrapped

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
    """Base class of data sets whose images and masks are files. Subclasses find the pairs; this class reads them.

    Args:
        split: Name of the split.
        classes: The classes of the masks.
        pairs: The files of each sample, in order.
        channels: See `read_image`.
        exif: See `read_image`.
        max_pixels: Largest number of pixels of an image or mask.
    """

    def __init__(
        self,
        split: str,
        classes: Classes,
        pairs: Sequence[Pair],
        *,
        channels: int | None = None,
        exif: Exif = "refuse",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.split, self.classes, self.pairs = split, classes, pairs
        self.names = [pair.name for pair in pairs]
        self.channels, self.as_stored = channels or 3, channels is not None
        self.band_names = band_names(pairs[0].image, channels) if channels is not None and pairs else ()
        self.exif: Exif = exif
        self.max_pixels = max_pixels

    def __getitem__(self, index: int) -> Sample:
        pair = self.pairs[index]
        channels = self.channels if self.as_stored else None
        image = read_image(pair.image, channels=channels, exif=self.exif, max_pixels=self.max_pixels)
        mask = self.read_mask(index)
        if image.shape[:2] != mask.shape:
            raise UsageError(
                f"{self.describe_mask(index)} is {mask.shape[0]}x{mask.shape[1]} and its image {pair.image} "
                f"{image.shape[0]}x{image.shape[1]} (HxW) - give a mask with one label per pixel of its image"
            )
        if (missing := nodata_pixels(pair.image, image)) is not None:
            mask[missing] = self.classes.ignore_index
        return Sample(image, mask, pair.name)

    def describe_mask(self, index: int) -> str:
        """Return what a message calls the mask of a sample."""
        return f"mask {self.pairs[index].mask}"

    def stored_mask(self, index: int) -> StoredMask:
        """Return the mask of a sample as it is stored."""
        return read_stored_mask(self.pairs[index].mask, max_pixels=self.max_pixels)

    def read_mask(self, index: int) -> np.ndarray:
        """Return (H, W) uint8 class indices or ignore_index of a sample.

        Subclasses override this if the mask file alone does not determine the classes.
        """
        return read_mask(self.pairs[index].mask, self.classes, max_pixels=self.max_pixels)

    def instances(self, index: int) -> np.ndarray:
        path = self.pairs[index].instances
        return super().instances(index) if path is None else read_labels(path, max_pixels=self.max_pixels)

    def stamp(self, index: int) -> str:
        pair = self.pairs[index]
        try:
            statuses = [(file, file.stat()) for file in (pair.image, pair.mask)]
        except OSError:
            return ""  # reading the file will report the error
        return " ".join(f"{file} {status.st_size} {status.st_mtime_ns}" for file, status in statuses)

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


def require_root(root: str | Path, expected: str, way_out: str = "give its folder as dataset.root=DIR") -> Path:
    """Return the folder of a data set.

    Args:
        root: `dataset.root`.
        expected: For the error message, the expected contents of the folder.
        way_out: For the error message, what to do.

    Raises:
        UsageError: `root` is not a folder.
    """
    folder = Path(os.path.expanduser(root))  # unlike Path.expanduser, keeps a `~` that is no account's
    if not folder.is_dir():
        if "://" in str(root):
            way_out = "only dataset=shards reads from addresses: convert SET --shards DIR packs a data set for it"
        raise UsageError(f"dataset.root={root} is not a folder; it should hold {expected} - {way_out}")
    return folder


def require_split(split: str, names: tuple[str, ...]) -> None:
    """Raise UsageError unless `split` is one of `names`."""
    if split not in names:
        raise UsageError(f"unknown split '{split}' - the splits are {', '.join(names)}")
