"""Data sets of Python programs, such as torch's, as splits of a `SegmentationDataset`."""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from segdeconv.classes import Classes, default_colours
from segdeconv.config import OBJECT, TARGET, stand_in, type_name
from segdeconv.data.class_file import given_classes
from segdeconv.data.dataset import Sample, SegmentationDataset
from segdeconv.data.files.decoding import is_array, read_array
from segdeconv.data.files.reading import MAX_PIXELS, read_stored_mask, read_upright, require_opaque
from segdeconv.data.pixels import as_image, from_tensor
from segdeconv.data.splits import choose_val
from segdeconv.errors import UsageError, warn

SPLITS = ("train", "val")
VAL_SHARE = 0.2
IGNORED = 255
VISION_DATASET = "torchvision.datasets.vision"  # the base class alone, which has no classes of its own

ClassNames = str | list[str] | dict[str | int, Any] | None


class Adapter(SegmentationDataset):
    """A split of a data set that gives pairs of an image and a mask, such as a torch Dataset.

    Args:
        dataset: Has a length. An item is a pair (image, mask), or a mapping with `image` and `mask`: an image as
            `as_image` takes it, not normalised, and a mask of (H, W) integers: class indices, and 255 or a negative
            number for ignored pixels. Both may be paths of files.
        split: The name of the split.
        indices: The indices of the items that belong to the split; None for all.

    Raises:
        UsageError: An item has another form.
    """

    def __init__(self, dataset: Any, split: str, indices: Sequence[int] | None = None) -> None:
        self.dataset, self.split = dataset, split
        count = length_of(dataset, split)
        self.indices = range(count) if indices is None else indices
        self.names = [f"{split}_{index}" for index in self.indices]
        if not self.names:
            raise UsageError(f"dataset: the {split} data set has no items - give at least one")
        digest = hashlib.sha256()
        self.labels: set[int] = set()
        self.ignores = False
        first = self._read(0)
        if any(not np.array_equal(a, b) for a, b in zip(first, self._read(0), strict=True)):
            warn(
                f"dataset: the {split} data set gives other pixels each time it is read, so no run can be reproduced "
                "- give it without random transforms, and choose them with augment"
            )
        for position in range(len(self)):
            image, mask = self._read(position)
            digest.update(f"{image.shape} {image.dtype}".encode() + image.tobytes() + mask.tobytes())
            labels = {int(label) for label in np.unique(mask)}
            self.labels |= labels - {IGNORED}
            self.ignores |= IGNORED in labels
        self.channels = first[0].shape[2]
        self.as_stored = self.channels != 3 or first[0].dtype != np.uint8
        self.digest = digest.hexdigest()

    def name_classes(self, names: ClassNames | Classes, labels: set[int]) -> None:
        """Set the classes.

        Args:
            names: See `given_classes`; None for those of `_own_classes`, or numbers.
            labels: The labels of the masks.

        Raises:
            UsageError: A mask has a label without a name, or the labels of the classes are not 0, 1, 2, ...
        """
        if labels <= {0} and self.ignores:
            raise UsageError(
                "dataset: the masks have no labels but 0 and 255, and 255 marks pixels to ignore - give 0 and 1, such "
                "as mask // 255"
            )
        own = _own_classes(self.dataset) if names is None else names
        if isinstance(own, Classes):
            self.classes = own
        elif own is None:
            texts = tuple(f"class_{label}" for label in range(max(labels, default=0) + 1))
            self.classes = Classes(texts, default_colours(texts, range(len(texts))))
            self.notes = (f"classes: labels 0..{len(texts) - 1} of the masks - name them with dataset.classes",)
        else:
            self.classes = _by_index(given_classes(own if isinstance(own, str | Mapping) else list(map(str, own))))
            if names is None and isinstance(own, Mapping):
                note = f"classes: by the labels in {self.kind}.classes - if masks have others, set dataset.classes"
                self.notes = (note,)
        if labels and max(labels) >= len(self.classes):
            raise UsageError(
                f"dataset: a mask has label {max(labels)}, but there are {len(self.classes)} classes, "
                f"0..{len(self.classes) - 1} - name all with dataset.classes, or write 255 for pixels to ignore"
            )

    def __getitem__(self, index: int) -> Sample:
        return Sample(*self._read(index), self.names[index])

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        name = self.names[index]
        item = self.dataset[self.indices[index]]
        if isinstance(item, Mapping) and {"image", "mask"} <= set(item):
            item = item["image"], item["mask"]
        if not isinstance(item, tuple | list) or len(item) < 2:
            keys = f" with the keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else ""
            raise UsageError(
                f"dataset: {name} is of type {type(item).__name__}{keys}, not a pair (image, mask) - give pairs, or "
                "mappings with image and mask (of Hugging Face: data.rename_column('label', 'mask'))"
            )
        mask = _mask(item[1], name)
        given = _image_file(Path(os.fsdecode(item[0]))) if isinstance(item[0], str | os.PathLike) else item[0]
        image = as_image(given, name, size=mask.shape)
        if image.shape[:2] != mask.shape:
            shape = tuple(getattr(given, "shape", image.shape))
            raise UsageError(
                f"dataset: the mask of {name} has shape {mask.shape} (H, W) and its image {shape} - give one label for "
                "each pixel"
            )
        return image, mask

    @property
    def kind(self) -> str:
        return type(self.dataset).__name__

    @property
    def fingerprint(self) -> str:
        return f"{self.digest} {self.classes}"


def _own_classes(dataset: Any) -> Classes | str | Mapping[Any, Any] | list[str] | None:
    """Return what a data set's attribute `classes` says of the labels of its masks, or None.

    It may be a list of names, in the order of the labels, or of objects with a `name` and an `id`, the label, as
    torchvision's Cityscapes has. Names in the other data sets of torchvision are those of whole images, such as breeds.
    """
    own = getattr(dataset, "classes", None)
    if own is None or isinstance(own, Classes | str | Mapping):
        return own
    items = list(own) if isinstance(own, Iterable) else []
    ids = [getattr(item, "id", None) for item in items]
    if items and all(isinstance(number, int) for number in ids) and all(hasattr(item, "name") for item in items):
        return {item.name: item.id for item in items if item.id >= 0}  # Cityscapes: -1 for a mask without this label
    in_class = "classes" not in getattr(dataset, "__dict__", ())
    definers = [base for base in type(dataset).__mro__ if in_class and "classes" in vars(base)]
    modules = [base.__module__ for base in (definers[:1] or type(dataset).__mro__)]
    of_images = any(module.startswith("torchvision.datasets.") and module != VISION_DATASET for module in modules)
    names = items and not of_images and all(isinstance(item, str) for item in items)
    return list(map(str, items)) if names else None


def _by_index(classes: Classes) -> Classes:
    """Return classes in the order of their labels, which are those of the masks.

    Raises:
        UsageError: The labels are not 0, 1, 2, ...
    """
    order = sorted(range(len(classes)), key=lambda index: classes.labels[index])
    in_order = [classes.labels[index] for index in order] == list(range(len(classes)))
    if classes.by_colour or not in_order or classes.ignore_index != IGNORED:
        raise UsageError(
            f"dataset.classes: {', '.join(classes.names)} must have the labels 0..{len(classes) - 1}, and ignore "
            f"{IGNORED} - masks are class indices; change them, or leave out dataset.classes"
        )
    names = tuple(classes.names[index] for index in order)
    return replace(
        classes, names=names, colours=tuple(classes.colours[index] for index in order), labels=tuple(range(len(names)))
    )


def _is_item(value: Any) -> bool:
    """Return whether a value is a pair of an image and a mask, or a mapping of them."""
    if isinstance(value, Mapping):
        return {"image", "mask"} <= set(value)
    first = value[0] if isinstance(value, tuple | list) and len(value) == 2 else None
    return isinstance(first, np.ndarray | Tensor | Image.Image | str | os.PathLike)


def length_of(dataset: Any, name: str) -> int:
    """Return the number of items of a data set.

    Raises:
        UsageError: It has no items that can be counted and indexed.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UsageError(
            f"dataset: {name} is of type {type_name(dataset)}, which has no length or no items - give a data set with "
            "__len__ and __getitem__ (of a DataLoader, its .dataset), or the name of one"
        )
    try:
        return len(dataset)
    except TypeError as error:
        raise UsageError(f"dataset: {name} ({type_name(dataset)}) has no length - give one with a length") from error


def _image_file(path: Path) -> np.ndarray:
    """Read an image as RGB, or an array of a .npy file as it is.

    Raises:
        UsageError: The file cannot be read, or is stored rotated.
    """
    if is_array(path):
        return read_array(path, MAX_PIXELS)
    image, orientation = read_upright(path)
    if orientation != 1:
        raise UsageError(
            f"{path} is stored rotated (EXIF orientation {orientation}) and its mask may or may not be - give images "
            "instead of paths, such as PIL.ImageOps.exif_transpose(image)"
        )
    return image


def _mask_file(path: Path) -> np.ndarray:
    """Read the labels of a mask file, with IGNORED where a GeoTIFF has no data and says so by what is no class index.

    Raises:
        UsageError: The file cannot be read, or cannot hold labels.
    """
    stored = read_stored_mask(path)
    require_opaque(path, stored)
    if stored.nodata is None or 0 <= stored.nodata <= IGNORED:
        return stored.values
    return np.where(stored.values == stored.nodata, IGNORED, stored.values)


def _mask(value: Any, name: str) -> np.ndarray:
    """Return a mask as (H, W) uint8 class indices or IGNORED."""
    if isinstance(value, str | os.PathLike):
        value = _mask_file(Path(os.fsdecode(value)))
    array = from_tensor(value) if isinstance(value, Tensor) else np.asarray(value)
    if isinstance(value, Image.Image) and value.mode not in ("L", "P", "1", "I", "I;16"):
        raise UsageError(f"dataset: the mask of {name} is a {value.mode} image - give class indices, (H, W)")
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[:, :, 0]
    if array.ndim == 2 and array.dtype.kind == "f" and np.isfinite(array).all() and not np.mod(array, 1).any():
        array = array.astype(np.int64)  # whole numbers, as losses of two classes take them
    if array.ndim != 2 or array.dtype.kind not in "iub":
        raise UsageError(
            f"dataset: the mask of {name} has shape {array.shape} and {array.dtype} values - give class indices, "
            "(H, W) integers"
        )
    if array.size and int(array.max()) > IGNORED:
        raise UsageError(f"dataset: the mask of {name} has label {array.max()} - give class indices 0..254, or 255")
    return np.where(array < 0, IGNORED, array).astype(np.uint8) if array.dtype.kind == "i" else array.astype(np.uint8)


def dataset_node(data: Any) -> dict[str, Any]:
    """Return the `dataset` node of data sets of a program.

    Args:
        data: The train and the val data set; or one, of which a fifth becomes val, such as a list of items.

    Raises:
        UsageError: It is not a data set.
    """
    single = not isinstance(data, tuple | list) or (len(data) != len(SPLITS) and all(map(_is_item, data)))
    given = (data,) if single else tuple(data)
    if not single and len(given) != len(SPLITS):
        raise UsageError(f"dataset has {len(given)} data sets - give (train, val), or one to split")
    for name, dataset in zip(SPLITS, given, strict=False):
        if isinstance(dataset, type):
            raise UsageError(f"dataset: {name} is the class {dataset.__name__} - give an instance of it")
        length_of(dataset, name)
    splits: dict[str, SegmentationDataset] = {}

    def dataset_given(*, split: str, classes: ClassNames = None, object: str = "") -> SegmentationDataset:
        if not splits:
            splits.update(_build_splits(given, classes))
        if split not in splits:
            raise UsageError(f"split {split} was not given to train() - it has the splits {', '.join(SPLITS)}")
        return splits[split]

    return {TARGET: stand_in(dataset_given), OBJECT: type_name(given[0])}


def _build_splits(given: tuple[Any, ...], classes: ClassNames) -> dict[str, SegmentationDataset]:
    if len(given) == len(SPLITS) and given[0] is given[1]:
        warn(
            "dataset: train and val are the same data set, so scores on val show how well the training images are "
            "remembered - give other images as val for scores that hold for new ones"
        )
    if len(given) == len(SPLITS) and all(isinstance(dataset, SegmentationDataset) for dataset in given):
        return dict(zip(SPLITS, given, strict=True))
    parts: list[Sequence[int] | None] = [None, None]
    note: tuple[str, ...] = ()
    if len(given) == 1:
        names = [str(index) for index in range(length_of(given[0], SPLITS[0]))]
        drawn, _ = choose_val(names, VAL_SHARE, None, 0, pattern=None, seed=0)
        parts = [[index for index in range(len(names)) if (str(index) in drawn) == is_val] for is_val in (False, True)]
        note = (f"val: {len(parts[1] or [])} of the {len(names)} items, drawn at random - give (train, val) to choose",)
    pair = (given[0], given[-1])
    adapters = [Adapter(dataset, split, part) for dataset, split, part in zip(pair, SPLITS, parts, strict=True)]
    labels = adapters[0].labels | adapters[1].labels
    for adapter in adapters:
        adapter.name_classes(classes, labels)
    adapters[0].notes = (*adapters[0].notes, *note)
    return dict(zip(SPLITS, adapters, strict=True))
