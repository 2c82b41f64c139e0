"""SUN RGB-D: its colour images and 37 classes, with the masks that Ankur Handa published as PNGs."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field

from segdeconv.classes import Classes
from segdeconv.data.dataset import FileDataset, Pair, PublishedScores, require_split
from segdeconv.data.files.reading import MAX_PIXELS, Exif
from segdeconv.data.splits import draw_share
from segdeconv.errors import UsageError

DEFAULT_ROOT = "data/SUNRGBD"
IMAGES = {"train": "SUNRGBD-train_images", "test": "SUNRGBD-test_images"}
MASKS = "sunrgbd_train_test_labels"
FIRST_TRAIN = 5051  # mask numbers 1..5050 belong to test images, 5051..10335 to train images 1, 2, ...
RECORDING = 20  # consecutive train images that are kept in the same split

# Order and names: seg37list.mat of the SUNRGBDtoolbox, as the README of ankurhanda/sunrgbd-meta-data prints it.
# Colours: alexgkendall/SegNet-Tutorial, Scripts/sun.png.
CLASSES = Classes(
    names=(
        "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture",
        "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor_mat", "clothes",
        "ceiling", "books", "fridge", "tv", "paper", "towel", "shower_curtain", "box", "whiteboard", "person",
        "night_stand", "toilet", "sink", "lamp", "bathtub", "bag",
    ),
    colours=(
        (153, 112, 72), (91, 134, 83), (153, 91, 90), (118, 106, 128), (118, 94, 89), (148, 109, 126), (119, 119, 119),
        (131, 131, 85), (95, 131, 137), (153, 153, 107), (151, 77, 68), (152, 108, 59), (151, 123, 137), (113, 77, 113),
        (153, 142, 67), (33, 76, 110), (91, 47, 98), (153, 153, 31), (148, 77, 115), (59, 18, 13), (11, 85, 123),
        (60, 118, 145), (9, 69, 63), (32, 56, 90), (71, 91, 37), (32, 80, 95), (77, 91, 118), (103, 118, 79),
        (27, 53, 83), (140, 96, 41), (68, 37, 71), (94, 95, 133), (44, 51, 79), (109, 124, 64), (59, 73, 34),
        (139, 112, 49), (84, 65, 29),
    ),
    ignore_colour=(0, 0, 0),
    labels=tuple(range(1, 38)),
    ignored_labels=(0,),
)  # fmt: skip

_TABLE_4 = ("SegNet paper, table 4", "https://arxiv.org/abs/1511.00561")
_BAYESIAN = ("Bayesian SegNet paper", "https://arxiv.org/abs/1511.02680")
_TABLE_5 = (
    83.42, 93.43, 63.37, 73.18, 75.92, 59.57, 64.18, 52.50, 57.51, 42.05, 56.17, 37.66, 40.29, 11.92, 11.45, 66.56,
    52.73, 43.80, 26.30, 0.00, 34.31, 74.11, 53.77, 29.85, 33.76, 22.73, 19.83, 0.03, 23.14, 60.25, 27.27, 29.88,
    76.00, 58.10, 35.27, 48.86, 16.76,
)  # fmt: skip
_BY_CLASS = dict(zip(CLASSES.names, _TABLE_5, strict=True))
PUBLISHED = (
    PublishedScores("SegNet", *_TABLE_4, "test", 31.84, 72.63, 44.76, 12.66, accuracy=_BY_CLASS),
    PublishedScores("DeepLab-LargeFOV", *_TABLE_4, "test", 32.08, 71.90, 42.21, 8.26),
    PublishedScores("DeepLab-LargeFOV, dense CRF", *_TABLE_4, "test", 24.13, 66.96, 33.06, 9.41),
    PublishedScores("FCN, learned deconvolution", *_TABLE_4, "test", 27.39, 68.18, 38.41, 9.68),
    PublishedScores("DeconvNet", *_TABLE_4, "test", 22.57, 66.13, 32.28, 10.47),
    PublishedScores("SegNet", *_BAYESIAN, "test", 22.1, 70.3, 35.6),
    PublishedScores("Bayesian SegNet", *_BAYESIAN, "test", 30.7, 71.2, 45.9),
)


class SUNRGBD(FileDataset):
    """Indoor scenes recorded with four kinds of depth cameras, of which only the colour images are read.

    **Content**: 5285 train and 5050 test images of several sizes. No val split is published: a fraction of train
    becomes val, and `--split test` gives the scores that compare with the paper's. Consecutive images are often frames
    of one recording, so val is drawn in runs of 20 images; its scores are still optimistic.

    **Layout** (github.com/ankurhanda/sunrgbd-meta-data): `SUNRGBD-train_images/img-000001.jpg` and
    `SUNRGBD-test_images/img-000001.jpg`, numbered from 1 each, and one folder of masks,
    `sunrgbd_train_test_labels/img-000001.png`: 1..5050 for the test images, 5051..10335 for the train images.

    **Classes**: 37. Label 0, unlabelled, is ignored and label 1, wall, is class 0.

    **Cite**: Song, Lichtenberg, Xiao: SUN RGB-D: a RGB-D scene understanding benchmark suite, 2015.

    Args:
        split: `train`, `val` or `test`.
        root: The folder of the three; by default data/SUNRGBD. No hashes of the files are published, so they are not
            downloaded.
        val_share: Fraction of the train images that becomes val, 0..1. The paper trained on all of them; 0.004 leaves
            one run of images to val.
        split_seed: Seed of the random split.
        exif: See `read_image`.
        max_pixels: Largest number of pixels of an image.

    Raises:
        UsageError: Files are missing or have other names, or `split` is unknown.
    """

    published = PUBLISHED

    def __init__(
        self,
        split: str,
        root: str | None = None,
        *,
        val_share: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        split_seed: int = 0,
        exif: Exif = "refuse",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        require_split(split, self.split_names)
        folder = Path(os.path.expanduser(DEFAULT_ROOT if root is None else root))
        published = "test" if split == "test" else "train"
        for needed in (IMAGES[published], MASKS):
            if not (folder / needed).is_dir():
                raise UsageError(f"{folder} does not contain {needed} - {_by_hand(folder)}")
        pairs = _pairs(folder, published)
        if split != "test":
            run = max(1, min(RECORDING, len(pairs) // RECORDING))
            names = [pair.name for pair in pairs]
            runs = {names[first]: names[first : first + run] for first in range(0, len(names), run)}
            val = draw_share(runs, val_share, split_seed)
            pairs = [pair for pair in pairs if (pair.name in val) == (split == "val")]
            part = f"about {val_share:g} of the train images, in runs of {run}"
            self.notes = (f"val: {part}, drawn with dataset.split_seed={split_seed}",)
        super().__init__(split, CLASSES, pairs, exif=exif, max_pixels=max_pixels)


def _pairs(folder: Path, part: str) -> list[Pair]:
    images = sorted((folder / IMAGES[part]).glob("[!.]*.jpg"))
    if not images:
        raise UsageError(f"{folder / IMAGES[part]} contains no .jpg - {_by_hand(folder)}")
    pairs = []
    for image in images:
        digits = image.stem.removeprefix("img-")
        if not (digits.isascii() and digits.isdigit()):
            raise UsageError(f"{image} is not named like img-000001.jpg - restore its name, or remove it")
        number = int(digits) + (FIRST_TRAIN - 1 if part == "train" else 0)
        pairs.append(Pair(image, folder / MASKS / f"img-{number:06d}.png", f"{part}-{image.stem.removeprefix('img-')}"))
    return pairs


def _by_hand(folder: Path) -> str:
    return (
        "download SUNRGBD-train_images.tgz, SUNRGBD-test_images.tgz and sunrgbd_train_test_labels.tar.gz as described "
        "at https://github.com/ankurhanda/sunrgbd-meta-data, unpack each into a folder of its name in "
        f"{folder.resolve()}, or give the folder of {IMAGES['train']}, {IMAGES['test']} and {MASKS} as "
        "dataset.root=DIR"
    )
