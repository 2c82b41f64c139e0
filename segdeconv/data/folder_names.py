"""Names of the folders of images and masks of a user's own data: ours, and those of other programs and challenges."""

import re
from collections.abc import Iterable
from pathlib import Path

from segdeconv.data.files.finding import find_files
from segdeconv.errors import UsageError

# Ours first; without spaces, dashes and underscores and in lower case, as `_folded` returns them.
IMAGES = (
    "images", "image", "img", "imgs", "imagedir", "imagesdir", "imgdir", "jpegimages", "leftimg8bit", "frame", "frames",
    "photo", "photos", "picture", "pictures", "input", "inputs", "x",
)  # fmt: skip
MASKS = (
    "masks", "mask", "maskdir", "masksdir", "label", "labels", "labeldir", "labelsdir", "ann", "anns", "annot",
    "annots", "annotation", "annotations", "anndir", "gt", "gts", "groundtruth", "seg", "segmentation",
    "segmentations", "segmentationclass", "segmentationclasspng", "target", "targets", "y",
)  # fmt: skip


def _folded(name: str) -> str:
    return re.sub("[ _-]", "", name.casefold())


def candidates(parent: Path | None, names: Iterable[str]) -> list[Path]:
    """Return the folder with the first of the names, or else every folder with one of them that holds images.

    Args:
        parent: The folder to search; None has no folders.
        names: Names as above; case, spaces, dashes and underscores in the names of folders are ignored.
    """
    first, *_ = names = tuple(names)
    if parent is None or not parent.is_dir():
        return []
    if (parent / first).is_dir():
        return [parent / first]
    named = [path for path in sorted(parent.iterdir()) if _folded(path.name) in names]
    return [path for path in named if not path.name.startswith(".") and path.is_dir() and find_files(path).files]


def find_folder(parent: Path | None, names: Iterable[str]) -> Path | None:
    """Return the only one of the `candidates`, or None.

    Raises:
        UsageError: There are several.
    """
    first, *_ = names = tuple(names)
    folders = candidates(parent, names)
    if folders[1:]:
        raise UsageError(
            f"{parent} has both {folders[0].name} and {folders[1].name}, and each may hold the {first} - name the one "
            f"to use {first}, or move the other elsewhere"
        )
    return folders[0] if folders else None
