"""Cityscapes, with label ids or with train ids."""

from pathlib import Path
from typing import Literal

import numpy as np

from segdeconv.classes import Classes
from segdeconv.data.dataset import FileDataset, Pair, require_split
from segdeconv.data.files.reading import MAX_PIXELS, Exif, read_labels
from segdeconv.errors import UsageError

DEFAULT_ROOT = "data/cityscapes"
IMAGES, MASKS = "leftImg8bit", "gtFine"
IMAGE_ENDING = "_leftImg8bit.png"
ENDINGS = {"ids": "_gtFine_labelIds.png", "train_ids": "_gtFine_labelTrainIds.png"}

# Names, train ids (their order), label ids and colours: mcordts/cityscapesScripts, cityscapesscripts/helpers/labels.py.
TRAIN_IDS = Classes(
    names=(
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic_light", "traffic_sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    ),
    colours=(
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
        (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
        (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    ),
    ignore_colour=(0, 0, 0),
)  # fmt: skip
IDS = Classes(
    TRAIN_IDS.names,
    TRAIN_IDS.colours,
    ignore_colour=(0, 0, 0),
    labels=(7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33),
    ignored_labels=(0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30),
)
CLASSES = {"ids": IDS, "train_ids": TRAIN_IDS}


class Cityscapes(FileDataset):
    """Streets of fifty cities, seen from a car.

    **What**: 2975 train and 500 val images of 1024x2048, finely annotated; the labels of the test images are not
    public.

    **Layout** (as its two archives unpack): `leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png`, masks
    `gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png`, or `..._labelTrainIds.png` beside them or instead.

    **Classes**: the 19 that are scored, in the order of their train ids; everything else is ignored.

    **Cite**: Cordts, Omran, Ramos, Rehfeld, Enzweiler, Benenson, Franke, Roth, Schiele: The Cityscapes dataset for
    semantic urban scene understanding, 2016.

    root: the folder that holds leftImg8bit and gtFine; data/cityscapes without one. It needs a login to fetch.
    labels: which masks to read: `ids`, the published *_labelIds.png (7 is road), `train_ids`, the *_labelTrainIds.png
        that createTrainIdLabelImgs.py makes of them (0 is road), or `auto`: label ids where they are.
    """

    split_names = ("train", "val")

    def __init__(
        self,
        split: str,
        root: str | None = None,
        *,
        labels: Literal["auto", "ids", "train_ids"] = "auto",
        exif: Exif = "refuse",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if split == "test":
            raise UsageError(
                "the labels of Cityscapes' test images are not public: gtFine/test is all ignored - use val"
            )
        require_split(split, self.split_names)
        folder = Path(DEFAULT_ROOT if root is None else root).expanduser()
        for part in (IMAGES, MASKS):
            if not (folder / part / split).is_dir():
                raise UsageError(f"{folder} does not hold {part}/{split} - {_by_hand(folder)}")
        images = sorted((folder / IMAGES / split).glob(f"*/[!.]*{IMAGE_ENDING}"))
        if not images:
            raise UsageError(f"{folder / IMAGES / split} holds no CITY/NAME{IMAGE_ENDING} - {_by_hand(folder)}")
        names = [image.name.removesuffix(IMAGE_ENDING) for image in images]
        stems = [folder / MASKS / split / image.parent.name / name for image, name in zip(images, names, strict=True)]
        kinds = ENDINGS if labels == "auto" else (labels,)
        masks = {kind: [Path(f"{stem}{ENDINGS[kind]}") for stem in stems] for kind in kinds}
        there = {kind: sum(mask.is_file() for mask in paths) for kind, paths in masks.items()}
        kind = max(there, key=lambda kind: there[kind])  # of as many, the first: what was published
        if not there[kind]:
            endings = " or ".join(f"*{ENDINGS[kind]}" for kind in masks)
            raise UsageError(f"{folder / MASKS / split} holds no {endings} for its images - {_by_hand(folder)}")
        _require_kind(next(mask for mask in masks[kind] if mask.is_file()), kind, max_pixels)
        pairs = [Pair(*files) for files in zip(images, masks[kind], names, strict=True)]
        super().__init__(split, CLASSES[kind], pairs, exif=exif, max_pixels=max_pixels)
        read = "label ids, of which 19 are classes" if kind == "ids" else "train ids"
        self.notes = (f"masks: *{ENDINGS[kind]}, {read}; everything else is ignored",)


def _require_kind(mask: Path, kind: str, max_pixels: int) -> None:
    """One sentence if a mask holds what masks of the other kind hold: most values are legal in both.

    Train ids have 255 and end at 18; label ids go to 33 and never have 255.
    """
    found = np.unique(read_labels(mask, max_pixels=max_pixels)).tolist()
    inner = [label for label in found if label != 255]
    if kind == "ids" and 255 in found and max(inner, default=0) < len(TRAIN_IDS):
        raise UsageError(
            f"{mask} holds train ids (255 is in it, and nothing between 18 and 255) - restore the published label ids, "
            f"or name such masks *{ENDINGS['train_ids']}"
        )
    if kind == "train_ids" and any(label >= len(TRAIN_IDS) for label in inner):
        raise UsageError(
            f"{mask} holds label ids (up to {max(inner)}) - make train ids with createTrainIdLabelImgs.py, or name "
            f"such masks *{ENDINGS['ids']}"
        )


def _by_hand(folder: Path) -> str:
    return (
        "register at https://www.cityscapes-dataset.com/register, download leftImg8bit_trainvaltest.zip (11 GB) and "
        f"gtFine_trainvaltest.zip (241 MB) from its page of downloads, unpack both into {folder.resolve()}, or give "
        "their folder as dataset.root=DIR"
    )
