"""Search of a folder for image files, with an account of every file that is passed over."""

import errno
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from segdeconv.data.files.decoding import MEDICAL_WAY_OUT, is_medical
from segdeconv.data.files.object_folder import ObjectFolder, StoredObject
from segdeconv.data.files.reading import SUFFIXES
from segdeconv.errors import UsageError

# Folders of thumbnails, deleted files and metadata that systems and programs create inside a person's folders. Names
# with a leading dot (.ipynb_checkpoints, .thumbnails, .Trashes) are passed over too.
SYSTEM_FOLDERS = frozenset(
    {
        "__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found",
        "system volume information",
    }
)  # fmt: skip
SYSTEM_FILES = frozenset({"desktop.ini", "ehthumbs.db", "thumbs.db"})
ENDINGS = tuple(SUFFIXES)
# Files of GIS that belong to the image of the same name: world files and its CRS, which `geo` reads, and statistics,
# overviews and masks of GDAL.
COMPANIONS = frozenset(
    {
        ".bpw", ".bmpw", ".gfw", ".gifw", ".jgw", ".jpgw", ".jpegw", ".jpw", ".pgw", ".pngw", ".prj", ".tfw", ".tifw",
        ".tiffw", ".wld",
    }
)  # fmt: skip
GDAL_COMPANIONS = (".aux.xml", ".msk", ".ovr")  # after the whole name of the image
MAX_KINDS = 8  # of folders or endings that one message names


class Listing(NamedTuple):
    """The files of a folder and its sub-folders, each list in the order of the paths relative to the folder.

    Attributes:
        files: Files with the ending of a supported format.
        hidden: Such files that are passed over because they are hidden or in a hidden or system folder.
        others: Visible files with another ending, which are passed over, without world files and the like.
        loops: Links to a folder that contains them, which are not followed.
    """

    files: list[Path]
    hidden: list[Path]
    others: list[Path]
    loops: list[Path]


class _Folder(NamedTuple):
    """A folder that is being searched: its real path, the folders that it was reached through, and its visibility."""

    path: str
    real: str
    parent: "_Folder | None"
    hidden: bool

    def is_inside(self, real: str) -> bool:
        """Return True if this folder, or one that it was reached through, is the folder `real` or lies in it."""
        start = os.path.join(real, "")
        folder: _Folder | None = self
        while folder is not None:
            if os.path.join(folder.real, "").startswith(start):
                return True
            folder = folder.parent
        return False


def find_files(folder: Path) -> Listing:
    """Find the image files of a folder and its sub-folders, following links to files and folders.

    The ending of a name decides, in upper or lower case. A dangling link with the ending of an image counts as a file,
    so that reading it gives the exact error, and so does an empty folder with such a name.

    Raises:
        UsageError: The folder, or a visible folder inside it, cannot be read; the message names it.
    """
    listing = Listing([], [], [], [])
    root = _Folder(str(folder), os.path.realpath(folder), None, hidden=False)
    stack = [(root, _entries(root))]  # not recursive, since a folder may be nested more deeply than Python's calls
    while stack:
        parent, entries = stack[-1]
        if not entries:
            stack.pop()
        elif inner := _sort_in(entries.pop(), parent, listing):
            stack.append((inner, _entries(inner)))
            if not stack[-1][1] and not inner.hidden and inner.path.lower().endswith(ENDINGS):
                listing.files.append(Path(inner.path))  # reading it says that it is a folder
    return _without_companions(listing)


def find_objects(folder: ObjectFolder, objects: Mapping[str, StoredObject]) -> Listing:
    """Find the image files of a folder of an object storage as `find_files` does those of a folder.

    Args:
        folder: The folder.
        objects: Its objects, see `ObjectFolder.list`.
    """
    listing = Listing([], [], [], [])
    for name, stored in objects.items():
        parts = name.lower().split("/")
        hidden = any(part.startswith(".") or part in SYSTEM_FOLDERS for part in parts[:-1])
        _add_file(folder.file(name, stored), parts[-1], hidden, listing)
    return _without_companions(listing)


def _without_companions(listing: Listing) -> Listing:
    names = {str(path) for path in listing.files}
    stems = {os.path.splitext(name)[0] for name in names}
    return listing._replace(others=[path for path in listing.others if not _is_companion(str(path), names, stems)])


def _is_companion(path: str, names: set[str], stems: set[str]) -> bool:
    stem, ending = os.path.splitext(path)
    if ending.lower() in COMPANIONS and stem in stems:
        return True
    return any(path.lower().endswith(part) and path[: -len(part)] in names for part in GDAL_COMPANIONS)


def _entries(folder: _Folder) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, the last name first."""
    try:
        with os.scandir(folder.path) as entries:
            return sorted(entries, key=lambda entry: entry.name, reverse=True)
    except OSError as error:
        if folder.hidden:  # its files are passed over in any case
            return []
        raise _unreadable(folder.path, error) from None


def _sort_in(entry: os.DirEntry[str], parent: _Folder, listing: Listing) -> _Folder | None:
    """Add a file to the list where it belongs; return a folder that is to be searched."""
    name = entry.name
    lower = name.lower()
    hidden = parent.hidden or name.startswith(".")
    if _is_folder(entry, lenient=hidden or lower.endswith(ENDINGS)):
        hidden = hidden or lower in SYSTEM_FOLDERS
        linked = entry.is_symlink()
        if linked and hidden:
            return None
        real = os.path.realpath(entry.path) if linked else os.path.join(parent.real, name)
        if linked and parent.is_inside(real):
            listing.loops.append(Path(entry.path))
            return None
        return _Folder(entry.path, real, parent, hidden)
    _add_file(Path(entry.path), lower, parent.hidden, listing)
    return None


def _add_file(path: Path, lower: str, hidden: bool, listing: Listing) -> None:
    """Add a file to the list where it belongs, by its name in lower case and whether its folder is hidden."""
    hidden = hidden or lower.startswith(".")
    if os.path.splitext(lower)[1] in SUFFIXES:
        (listing.hidden if hidden else listing.files).append(path)
    elif not hidden and lower not in SYSTEM_FILES:
        listing.others.append(path)


def _is_folder(entry: os.DirEntry[str], *, lenient: bool) -> bool:
    """Return True for a folder or a link to one; `lenient` says that an unreadable link is reported elsewhere."""
    try:
        return entry.is_dir()
    except OSError as error:  # a link whose target cannot be examined
        if lenient or error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise _unreadable(entry.path, error) from None


def _unreadable(path: str, error: OSError) -> UsageError:
    reason = (error.strerror or str(error)).lower()
    return UsageError(f"{path} cannot be read: {reason} - make the folder readable, or move it elsewhere")


def describe_skipped(listing: Listing, folder: Path) -> list[str]:
    """Return one line, with counts and a way out, for each kind of file that `find_files` passed over in `folder`."""
    lines = []
    if listing.hidden:
        counts = Counter(_hidden_part(path.relative_to(folder)) for path in listing.hidden)
        lines.append(
            f"{folder}: {_files(listing.hidden)} with hidden names or in hidden or system folders "
            f"{_are(listing.hidden)} left out ({listed(counts)}) - rename or move them to use them"
        )
    medical = [path for path in listing.others if is_medical(path)]
    if medical:
        lines.append(
            f"{folder}: {_files(medical)} of medical formats {_are(medical)} left out ({count_endings(medical)}) - "
            f"{MEDICAL_WAY_OUT}"
        )
    if others := [path for path in listing.others if not is_medical(path)]:
        lines.append(
            f"{folder}: {_files(others)} with other endings {_are(others)} left out ({count_endings(others)}) - "
            f"the supported endings are {', '.join(sorted(SUFFIXES))}"
        )
    lines += [f"{link}: a link to a folder that contains it is left out - remove the link" for link in listing.loops]
    return lines


def count_endings(paths: list[Path]) -> str:
    """Return the endings of files with their numbers, the most frequent first, for a message.

    Examples:
        >>> count_endings([Path("a.heic"), Path("b.HEIC"), Path("notes")])
        '.heic: 2, without ending: 1'
    """
    endings = (".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower() for path in paths)
    return listed(Counter(ending or "without ending" for ending in endings))


def _hidden_part(path: Path) -> str:
    """Return the hidden or system folder of a path, or the kind of a hidden file."""
    for part in path.parts[:-1]:
        if part.startswith(".") or part.lower() in SYSTEM_FOLDERS:
            return part
    return "._*" if path.name.startswith("._") else ".*"  # ._x.jpg: macOS's metadata of x.jpg


def _files(paths: list[Path]) -> str:
    return f"{len(paths)} file{'s' if len(paths) != 1 else ''}"


def _are(paths: list[Path]) -> str:
    return "are" if len(paths) != 1 else "is"


def listed(counts: Counter[str]) -> str:
    """Return names with their numbers, the most frequent first, for a message."""
    names = sorted(counts, key=lambda name: (-counts[name], name))
    more = f", {len(names) - MAX_KINDS} more" if len(names) > MAX_KINDS else ""
    return ", ".join(f"{name}: {counts[name]}" for name in names[:MAX_KINDS]) + more
