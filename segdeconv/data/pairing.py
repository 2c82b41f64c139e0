"""Pairing of a person's images with their masks by name, and lists of the images of a split."""

import difflib
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from segdeconv.data.annotations.finding import FORMATS
from segdeconv.data.dataset import Pair
from segdeconv.data.files.decoding import MEDICAL_WAY_OUT, is_medical
from segdeconv.data.files.finding import describe_skipped, find_files
from segdeconv.data.files.reading import SUFFIXES, read_list
from segdeconv.errors import UsageError

MASK_ENDINGS = re.compile(r"[_-](mask|masks|label|labels|seg|segmentation|gt|annotation)$", re.IGNORECASE)
NAMED = 3  # files that a message names

Files = dict[str, Path]  # by their path relative to the folder, without the ending of the file


@dataclass(frozen=True)
class Folders:
    """The images and masks of one folder of each.

    Attributes:
        images: The images by name.
        masks: The masks by name.
        mask_name: The name of an image's mask, with {} for the name of the image; None to recognise it.
        where: The folders of images and of masks.
        skipped: A line for each kind of file that is left out.
    """

    images: Files
    masks: Files
    mask_name: str | None
    where: tuple[Path, Path]
    skipped: tuple[str, ...]

    @cached_property
    def pairing(self) -> "Pairing":
        """The mask of every image, by name.

        Raises:
            UsageError: An image has no mask, or two masks.
        """
        return _match(self.images, self.masks, self.mask_name, self.where[1])

    @property
    def pairs(self) -> list[Pair]:
        """All images with their masks, by name."""
        return [Pair(path, self.masks[self.pairing.masks[name]], name) for name, path in sorted(self.images.items())]


class Pairing(NamedTuple):
    """The name of each image's mask.

    Attributes:
        masks: The name of the mask by the name of the image.
        assumption: A line that says how names were matched that differ, or None.
    """

    masks: dict[str, str]
    assumption: str | None


def find_folders(images: Path, masks: Path, mask_name: str | None) -> Folders:
    """Find the images and masks in two folders and their sub-folders, or beside each other in one.

    Raises:
        UsageError: One of them is not a folder or holds no image, two files have one name, or `mask_name` has no {}.
    """
    if mask_name is not None and mask_name.count("{}") != 1:
        raise UsageError(
            f"dataset.mask_name={mask_name} has no single {{}} - write {{}} for the image's name: '{{}}_L'"
        )
    image_files, skipped = _files(images)
    if images == masks:
        beside = _masks_beside(image_files, mask_name)
        mask_files = {name: path for name, path in image_files.items() if name in beside}
        image_files = {name: path for name, path in image_files.items() if name not in beside}
        return Folders(image_files, mask_files, mask_name, (images, masks), tuple(skipped))
    mask_files, also_skipped = _files(masks)
    return Folders(image_files, mask_files, mask_name, (images, masks), (*skipped, *also_skipped))


def has_masks_beside(folder: Path, mask_name: str | None) -> bool:
    """Return whether a folder has masks beside their images, such as a.jpg and a_mask.png."""
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in find_files(folder).files]
    return bool(_masks_beside(names, mask_name))


def _masks_beside(files: Iterable[str], mask_name: str | None) -> set[str]:
    names = set(files)
    if mask_name is not None:
        return {mask for name in names if (mask := _name_of_mask(name, mask_name)) in names and mask != name}
    return {name for name in names if (stem := MASK_ENDINGS.sub("", name)) != name and stem in names}


def _name_of_mask(name: str, mask_name: str) -> str:
    path = PurePosixPath(name)
    return (path.parent / mask_name.replace("{}", path.name)).as_posix()


def _files(folder: Path) -> tuple[Files, list[str]]:
    if not folder.is_dir():
        parent = folder.parent
        beside = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
        raise UsageError(
            f"{folder} is not a folder; dataset.root should hold images/ and masks/, or images and annotations of "
            f"{FORMATS}, and {parent} holds "
            f"{', '.join(beside[:10]) or 'no folder'}{', ...' if beside[10:] else ''} - rename or move them, "
            "or set dataset.images and dataset.masks"
        )
    listing = find_files(folder)
    files: Files = {}
    for path in listing.files:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise UsageError(f"{path} and {files[name]} have the same name; a name identifies one image - rename one")
        files[name] = path
    by_folded_name: Files = {}
    for name, path in files.items():
        if (other := by_folded_name.setdefault(name.casefold(), path)) != path:
            raise UsageError(
                f"{path} and {other} differ only in upper and lower case, so other systems treat them as one file - "
                "rename one"
            )
    skipped = describe_skipped(listing, folder)
    if not files:
        if any(is_medical(path) for path in listing.others):
            raise UsageError(f"{folder} contains images of medical formats only - {MEDICAL_WAY_OUT}")
        left_out = f"; {skipped[0].partition(' - ')[0]}" if skipped else ""
        raise UsageError(
            f"{folder} contains no image{left_out} - the supported suffixes are {', '.join(sorted(SUFFIXES))}"
        )
    return files, skipped


def _match(images: Files, masks: Files, mask_name: str | None, folder: Path) -> Pairing:
    by_stem: dict[str, str] = {}
    for name in masks:
        stem = MASK_ENDINGS.sub("", name)
        if mask_name is None and stem in by_stem and stem in images:
            raise UsageError(f"{masks[by_stem[stem]]} and {masks[name]} are both masks of '{stem}' - keep one")
        by_stem[stem] = name
    matches: dict[str, str] = {}
    for name, path in images.items():
        if mask_name is not None:
            candidates = [_name_of_mask(name, mask_name)]
        else:
            candidates = [name, by_stem.get(name, ""), f"{name}{path.suffix}"]  # image.jpg.png is a mask of image.jpg
        match = next((candidate for candidate in candidates if candidate in masks), None)
        if match is not None:
            matches[name] = match
    if len(matches) == len(images):
        return Pairing(matches, None)
    if mask_name is None and (parts := _match_common_parts(images, masks)):
        example = next(iter(parts.items()))
        line = (
            f"{folder}: masks are matched to images by the part in which their names differ, such as "
            f"{masks[example[1]].name} to {images[example[0]].name} - if that is wrong, set dataset.mask_name"
        )
        return Pairing(parts, line)
    missing = sorted(name for name in images if name not in matches)
    others = f" (and {len(missing) - 1} more images have none)" if missing[1:] else ""
    nearest = [masks[name].relative_to(folder).as_posix() for name in _nearest(missing[0], masks)]
    rule = f"dataset.mask_name={mask_name}" if mask_name else f"a mask has its image's name in {folder}"
    raise UsageError(
        f"{images[missing[0]]} has no mask{others}; {rule}, where the nearest names are {', '.join(nearest)} - add the "
        f"mask, remove the image, or set dataset.mask_name, such as '{_suggested(missing[0], nearest)}'"
    )


def _match_common_parts(images: Files, masks: Files) -> dict[str, str] | None:
    """Match names such as img_001 and mask_001 by what is left without the common prefix and suffix of each list.

    Returns:
        The mask of every image; None if that is not unambiguous: a name is left without partner, or the common parts
        differ in a digit, since then img_10 and img_11 would match mask_20 and mask_21.
    """
    if len(images) < 2 or len(masks) < len(images):
        return None
    (image_start, image_end), (mask_start, mask_end) = _common_parts(images), _common_parts(masks)
    for one, other in ((image_start, mask_start), (image_end, mask_end)):
        start = len(common_start([one, other]))
        end = len(common_start([one[start:][::-1], other[start:][::-1]]))
        if re.search(r"\d", one[start : len(one) - end] + other[start : len(other) - end]):
            return None
    cores = {_core(name, mask_start, mask_end): name for name in masks}
    matches = {name: cores.get(_core(name, image_start, image_end)) for name in images}
    if len(cores) < len(masks) or None in matches.values():
        return None
    return {name: match for name, match in matches.items() if match is not None}


def _common_parts(names: Iterable[str]) -> tuple[str, str]:
    stems = [PurePosixPath(name).name for name in names]
    start = common_start(stems)
    return start, common_start([stem[len(start) :][::-1] for stem in stems])[::-1]


def common_start(texts: Sequence[str]) -> str:
    """Return the longest text with which all texts start.

    Examples:
        >>> common_start(["img_01", "img_02"])
        'img_0'
    """
    first, last = min(texts), max(texts)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return first[: sum(1 for _ in shared)]


def _core(name: str, start: str, end: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    return path.parent.as_posix(), path.name[len(start) : len(path.name) - len(end)]


def _nearest(name: str, masks: Files) -> list[str]:
    """Return the masks whose names are nearest to that of an image, those that contain it first."""
    stem = PurePosixPath(name).name
    stems = {PurePosixPath(mask).name: mask for mask in sorted(masks)[:5000]}
    near = difflib.get_close_matches(stem, stems, n=NAMED, cutoff=0)
    containing = [other for other in stems if stem in other]
    return [stems[other] for other in dict.fromkeys([*containing, *near])][:NAMED]


def _suggested(name: str, nearest: list[str]) -> str:
    stem = PurePosixPath(name).name
    containing = [PurePosixPath(mask).stem for mask in nearest if stem in mask]
    return containing[0].replace(stem, "{}", 1) if containing and containing[0] != stem else "{}_L"


# Lists


def read_split_list(listing: Path, root: Path, folders: Folders | None) -> list[Pair]:
    """Read the list of a split: in each line an image, or an image and its mask.

    An image is its name, or a path relative to the root or to images/, with or without the ending of the file. The
    parts of a line are separated by spaces, a comma, a semicolon or a tab.

    Args:
        listing: The list.
        root: `dataset.root`.
        folders: The images and masks of the root; None if it has no such folders, so that every line names both files.

    Raises:
        UsageError: A line names no image, or an image is listed twice; the message names the list and the line.
    """
    listed: dict[str, Pair] = {}
    for number, entry in read_list(listing):
        pair = _listed_pair(entry, root, folders)
        if pair is None:
            raise UsageError(
                f"{listing}, line {number}: image '{entry}' not found - it should be in images/ with its mask"
            )
        if pair.name in listed:
            raise UsageError(f"{listing}, line {number}: '{entry}' is listed twice - list every image once")
        listed[pair.name] = pair
    if not listed:
        raise UsageError(f"{listing} lists no image - fill it, or delete all lists for a random split")
    return list(listed.values())


def _listed_pair(entry: str, root: Path, folders: Folders | None) -> Pair | None:
    if folders is not None and (name := _image_name(entry, folders)) is not None:
        return Pair(folders.images[name], folders.masks[folders.pairing.masks[name]], name)
    for separator in (r"[,;\t]", r"\s+"):
        parts = [part.strip().strip("\"'") for part in re.split(separator, entry)]
        if len(parts) == 2 and all(parts):
            mask = _file(parts[1], root, None if folders is None else folders.where[1])
            if mask is None:
                continue
            if folders is not None and (name := _image_name(parts[0], folders)) is not None:
                return Pair(folders.images[name], mask, name)
            if (image := _file(parts[0], root, None)) is not None:
                inside = image.relative_to(root) if image.is_relative_to(root) else Path(image.name)
                return Pair(image, mask, inside.with_suffix("").as_posix())
    return None


def _image_name(entry: str, folders: Folders) -> str | None:
    """Return the name of the image that an entry of a list means, or None."""
    images = folders.images
    path = PurePosixPath(entry.replace("\\", "/"))
    # A path of another machine means the file below images/.
    for candidate in (path, *(_below(name, path) for name in dict.fromkeys(["images", folders.where[0].name]))):
        if candidate.name:
            for name in (candidate.as_posix(), candidate.with_suffix("").as_posix()):
                if name in images:
                    return name
    return next((name for name, file in images.items() if file == Path(entry)), None) if path.is_absolute() else None


def _below(folder: str, path: PurePosixPath) -> PurePosixPath:
    """Return the part of a path below the last folder of this name, or the empty path without one.

    Examples:
        >>> _below("images", PurePosixPath("/SegNet/mine/images/a/x.png"))
        PurePosixPath('a/x.png')
    """
    places = [place for place, part in enumerate(path.parts) if part == folder]
    return PurePosixPath(*path.parts[places[-1] + 1 :]) if places else PurePosixPath()


def _file(entry: str, root: Path, folder: Path | None) -> Path | None:
    """Return the file in the root that an entry of a list means, or None."""
    path = PurePosixPath(entry.replace("\\", "/"))
    candidates = [root / path]
    if folder is not None:
        candidates += [folder / path, folder / _below("masks", path), folder / _below(folder.name, path)]
    for candidate in candidates:
        file = Path(os.path.normpath(candidate))
        if file.is_file() and Path(os.path.abspath(file)).is_relative_to(os.path.abspath(root)):
            return file
    return None


def count(paths: Iterable[Path], kind: str) -> str:
    """Return a number of files with the names of the first.

    Examples:
        >>> count([Path("a/x.png")], "mask")
        '1 mask (x.png)'
    """
    names = sorted(path.name for path in paths)
    more = ", ..." if names[NAMED:] else ""
    return f"{len(names)} {kind}{'s' if names[1:] else ''} ({', '.join(names[:NAMED])}{more})"
