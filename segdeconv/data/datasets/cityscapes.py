"""Cityscapes, with masks of label ids or train ids."""

import os
from pathlib import Path
from typing import Literal

import numpy as np

from segdeconv.classes import Classes
from segdeconv.data.dataset import FileDataset, Pair, require_split
from segdeconv.data.files.reading import MAX_PIXELS, Exif, read_labels
from segdeconv.data.submission import Submission
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

SUBMISSION = Submission(
    title="Cityscapes",
    source="https://github.com/mcordts/cityscapesScripts, evaluation/evalPixelLevelSemanticLabeling.py",
    classes=IDS,
    image_name=r"[a-zA-Z-]+_\d{6}_\d{6}_leftImg8bit",
    example="berlin_000000_000019_leftImg8bit",
    num_images=1525,
    size=(1024, 2048),
)
KITTI_SUBMISSION = Submission(
    title="KITTI's semantic segmentation",
    source="https://www.cvlibs.net/datasets/kitti/eval_semseg.php; its format is that of Cityscapes",
    classes=IDS,
    image_name=r"\d{6}_\d{2}",
    example="000000_10",
    num_images=200,
    folder="semantic",  # as in the archive of the training data
)


class Cityscapes(FileDataset):
    """Street scenes of fifty cities, recorded from a car.

    **Content**: 2975 train and 500 val images of 1024x2048, finely annotated; the labels of the test images are not
    public.

    **Layout** (of the two unpacked archives): `leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png`, masks
    `gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png`, or `..._labelTrainIds.png` beside them or instead.

    **Classes**: the 19 evaluated classes, in the order of their train ids; everything else is ignored.

    **Cite**: Cordts, Omran, Ramos, Rehfeld, Enzweiler, Benenson, Franke, Roth, Schiele: The Cityscapes dataset for
    semantic urban scene understanding, 2016.

    Args:
        split: `train` or `val`.
        root: The folder of leftImg8bit and gtFine; by default data/cityscapes. Downloading the data set needs a login.
        labels: The masks to read: `ids`, the published *_labelIds.png (7 is road); `train_ids`, the
            *_labelTrainIds.png that createTrainIdLabelImgs.py makes of them (0 is road); or `auto`, the kind that more
            images have, label ids if equal.
        exif: See `read_image`.
        max_pixels: Largest number of pixels of an image.

    Raises:
        UsageError: Files are missing, masks are of the other kind than their name states, or `split` is unknown.
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
                "the labels of Cityscapes' test images are not public; all pixels of gtFine/test are ignored - use val"
            )
        require_split(split, self.split_names)
        folder = Path(os.path.expanduser(DEFAULT_ROOT if root is None else root))
        for part in (IMAGES, MASKS):
            if not (folder / part / split).is_dir():
                raise UsageError(f"{folder} does not contain {part}/{split} - {_by_hand(folder)}")
        images = sorted((folder / IMAGES / split).glob(f"*/[!.]*{IMAGE_ENDING}"))
        if not images:
            raise UsageError(f"{folder / IMAGES / split} contains no CITY/NAME{IMAGE_ENDING} - {_by_hand(folder)}")
        names = [image.name.removesuffix(IMAGE_ENDING) for image in images]
        stems = [folder / MASKS / split / image.parent.name / name for image, name in zip(images, names, strict=True)]
        kinds = ENDINGS if labels == "auto" else (labels,)
        masks = {kind: [Path(f"{stem}{ENDINGS[kind]}") for stem in stems] for kind in kinds}
        counts = {kind: sum(mask.is_file() for mask in paths) for kind, paths in masks.items()}
        kind = max(counts, key=lambda kind: counts[kind])  # of equal counts the first: the published label ids
        if not counts[kind]:
            endings = " or ".join(f"*{ENDINGS[kind]}" for kind in masks)
            raise UsageError(f"{folder / MASKS / split} contains no {endings} for its images - {_by_hand(folder)}")
        _require_kind(next(mask for mask in masks[kind] if mask.is_file()), kind, max_pixels)
        pairs = [Pair(*files) for files in zip(images, masks[kind], names, strict=True)]
        super().__init__(split, CLASSES[kind], pairs, exif=exif, max_pixels=max_pixels)
        description = "label ids, of which 19 are classes" if kind == "ids" else "train ids"
        self.notes = (f"masks: *{ENDINGS[kind]}, {description}; everything else is ignored",)


def _require_kind(mask: Path, kind: str, max_pixels: int) -> None:
    """Raise UsageError if a mask is of the other kind; most values are valid in both.

    Train ids are 0..18 and 255; label ids are 0..33 and never 255.
    """
    values = np.unique(read_labels(mask, max_pixels=max_pixels)).tolist()
    labels = [label for label in values if label != 255]
    if kind == "ids" and 255 in values and max(labels, default=0) < len(TRAIN_IDS):
        raise UsageError(
            f"{mask} holds train ids (it has label 255, and none between 18 and 255) - restore the published label "
            f"ids, or name such masks *{ENDINGS['train_ids']}"
        )
    if kind == "train_ids" and any(label >= len(TRAIN_IDS) for label in labels):
        raise UsageError(
            f"{mask} holds label ids (up to {max(labels)}) - make train ids with createTrainIdLabelImgs.py, or name "
            f"such masks *{ENDINGS['ids']}"
        )


def _by_hand(folder: Path) -> str:
    return (
        "register at https://www.cityscapes-dataset.com/register, download leftImg8bit_trainvaltest.zip (11 GB) and "
        f"gtFine_trainvaltest.zip (241 MB) from its download page, unpack both into {folder.resolve()}, or give "
        "their folder as dataset.root=DIR"
    )
