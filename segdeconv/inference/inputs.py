"""The inputs of predict: the images and videos that its arguments name, and the names of their output files."""

import functools
import glob
import hashlib
import os
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from segdeconv.data.datasets.shards import packed_images
from segdeconv.data.files.finding import Listing, count_endings, describe_skipped, find_files, find_objects, listed
from segdeconv.data.files.object_folder import ObjectFolder, StoredObject, is_object_storage
from segdeconv.data.files.reading import SUFFIXES, read_list
from segdeconv.data.files.stored_file import StoredFile
from segdeconv.data.shard_index import INDEX, is_index
from segdeconv.errors import UsageError, warn
from segdeconv.inference.output_folder import PROGRESS_LOG
from segdeconv.system.own_files import RECORD, RecordedOutputs

VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".mpeg", ".webm"})
MAX_NAME_LENGTH = 255  # bytes of a file name
STDIN = "-"


def is_video(path: Path) -> bool:
    """Return True if the suffix of a file is that of a video."""
    return path.suffix.lower() in VIDEOS


class FileNames:
    """The names of output files, of which no two may be one file.

    Names that differ only in upper and lower case, or in the Unicode form of an accent, are one file on macOS and
    Windows. There they are refused, and elsewhere a warning counts them.

    Args:
        source: Start of a message, such as `--class-masks: `.
        way_out: End of a message.
    """

    def __init__(self, source: str, way_out: str) -> None:
        self.source, self.way_out = source, way_out
        self.owners: dict[str, tuple[str, object]] = {}
        self.alike: list[tuple[object, object]] = []

    def add(self, name: str, owner: object) -> None:
        """Add the name of a file that `owner` is written to.

        Raises:
            UsageError: Another owner has the file.
        """
        other_name, other = self.owners.setdefault(_folded(name), (name, owner))
        if other == owner:
            return
        if name == other_name or sys.platform in ("win32", "darwin"):
            raise UsageError(f"{self.source}{owner} and {other} have the same output file {name} - {self.way_out}")
        self.alike.append((owner, other))

    def warn(self) -> None:
        """Print a warning about the names that are one file on other systems."""
        if self.alike:
            first, second = self.alike[0]
            warn(
                f"{self.source}{len(self.alike)} output file(s) differ from another only in case or accents, such as "
                f"those of {second} and {first}, so macOS and Windows mix them up - {self.way_out}"
            )


def find_images(
    arguments: Sequence[str],
    out: Path,
    endings: Sequence[str],
    *,
    missing: list[str] | None = None,
    address: object = None,
) -> dict[str, Path]:
    """Find the images and videos that command-line arguments name, and warn of files in folders that are left out.

    Args:
        arguments: Files, folders (searched by `find_files`), folders of shards, glob patterns, and lists (.txt files
            with one path a line, relative to the working folder; `-` reads such a list from stdin). Also addresses of
            files and folders in an object storage, such as `s3://BUCKET/FOLDER`, in lists too.
        out: Output folder.
        endings: File name endings of the outputs written for each image.
        address: What messages call the output folder, if it is the local one of an object storage.
        missing: Receives a message for each line of a list that names no file; None to raise an error for the first.

    Returns:
        The path of each image or video, by the name of its outputs in `out`: its own without suffix, or with it if
        another one differs only in the suffix.

    Raises:
        UsageError: An argument names no image, or two images would have the same output file.
    """
    images: dict[str, Path] = {}
    names = FileNames("", "use two --out folders")
    absent: list[str] = []
    found = [entry for argument in arguments for entry in _resolve(argument, out, absent)]
    for path, name in _named_apart(found, endings[0]):
        for ending in endings:
            names.add(f"{address or out}/{name}{ending}", path)
        images[name] = path
    if absent and (missing is None or not images):
        raise UsageError(absent[0])
    names.warn()
    if missing is not None:
        missing += absent
    if not images:
        raise UsageError("no images given - list images, folders, or a quoted pattern after the checkpoint")
    return images


def _named_apart(found: Sequence[tuple[Path, str]], ending: str) -> list[tuple[Path, str]]:
    """Give the outputs of images that differ only in the suffix, such as a.png and a.jpg, their names with suffix.

    Args:
        found: Path and name without suffix of each image.
        ending: File name ending of an output, for the warning.

    Returns:
        Path and name of each image. Images that differ in nothing else, such as x/a.png and y/a.png, keep one name.
    """
    suffixes: defaultdict[str, set[str]] = defaultdict(set)
    for path, name in found:
        suffixes[_folded(name)].add(path.suffix)
    alike = [(path, name) for path, name in found if len(suffixes[_folded(name)]) > 1]
    if alike:
        first, name = alike[0]
        second = next(path for path, other in alike if _folded(other) == _folded(name) and path.suffix != first.suffix)
        warn(
            f"{len({path for path, _ in alike})} files differ only in the suffix, such as {first} and {second} - it is "
            f"kept in the names of their outputs: {with_suffix(name, first)}{ending}"
        )
    return [(path, with_suffix(name, path) if len(suffixes[_folded(name)]) > 1 else name) for path, name in found]


def with_suffix(name: str, path: Path) -> str:
    """Return the name of an image's outputs with the suffix of its file: `a` becomes `a.png`."""
    return f"{name}{path.suffix}"


def _folded(name: str) -> str:
    """Return the name that is the same for all names that are one file on macOS or Windows."""
    return unicodedata.normalize("NFC", name).casefold()


def find_image_files(arguments: Sequence[str], out: Path) -> list[Path]:
    """Find the images that command-line arguments name, each once, for a command without an output file for each.

    Args:
        arguments: As in `find_images`.
        out: Output folder.

    Raises:
        UsageError: An argument names no image, a line of a list no file, or a file is a video.
    """
    missing: list[str] = []
    paths: dict[str, Path] = {}
    for argument in arguments:
        for path, _ in _resolve(argument, out, missing):
            if path.suffix.lower() in VIDEOS:
                raise UsageError(f"{path} is a video, and only images are accepted here - extract its frames first")
            paths.setdefault(os.path.realpath(path), path)
    if missing:
        raise UsageError(missing[0])
    if not paths:
        raise UsageError("no images given - list images, folders, or a quoted pattern")
    return list(paths.values())


def _resolve(argument: str, out: Path, missing: list[str]) -> Iterator[tuple[Path, str]]:
    """Yield the path and the output name of each image or video that one argument names."""
    if argument == STDIN and not Path(argument).exists():
        yield from _resolve_list(
            [(number, line.strip()) for number, line in enumerate(sys.stdin, 1) if line.strip()], "stdin", missing
        )
        return
    if is_object_storage(argument):
        yield from _resolve_address(argument)
        return
    if is_index(Path(argument) / INDEX):
        yield from packed_images(argument)
        return
    paths = [Path(argument)] if Path(argument).exists() else [Path(path) for path in sorted(glob.glob(argument))]
    if not paths and Path(argument).is_symlink():
        paths = [Path(argument)]  # a dangling link, for which reading gives the precise error
    if not paths:
        raise UsageError(f"{argument} not found - give images, folders, or a quoted pattern")
    out_folder = Path(os.path.realpath(out))
    for path in paths:
        if out_folder in (Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))):
            raise UsageError(f"--out {out} is the folder of the input images - choose another folder for the outputs")
        if path.suffix.lower() == ".txt" and path.is_file():
            yield from _resolve_list(read_list(path), str(path), missing)
        elif not path.is_dir():
            yield path, path.stem
        else:
            for file in _images_in(path, out_folder):
                yield file, file.relative_to(path).with_suffix("").as_posix()


def _resolve_address(address: str) -> Iterator[tuple[Path, str]]:
    """Yield the path and the output name of each image of a folder, or folder of shards, of an object storage."""
    folder = ObjectFolder(address)
    objects = folder.list()
    if INDEX in objects and is_index(folder.file(INDEX, objects[INDEX])):
        yield from packed_images(address)
    elif objects:
        root = StoredFile(folder.address)
        root.address = folder.address
        way_out = "copy them to this machine, where each can be named"
        records: defaultdict[PurePosixPath, list[bytes]] = defaultdict(list)
        for name in map(PurePosixPath, objects):
            if name.name.startswith(RECORD):
                records[name.parent].append(folder.read(str(name)))
        outputs = RecordedOutputs(lambda inner: records.get(inner, []), unrecorded={PROGRESS_LOG})
        for path in _require_images(find_objects(folder, objects), root, outputs, way_out):
            yield path, path.relative_to(root).with_suffix("").as_posix()
    elif found := _Listings().find(address):
        yield found, found.stem
    else:
        raise UsageError(f"{address} not found - give images or folders that the storage has")


class _Listings:
    """The listings of the folders of an object storage that the lines of a list name, each asked for once."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[ObjectFolder, dict[str, StoredObject]]] = {}

    def find(self, address: str) -> Path | None:
        """Return the path of an object, or None if there is none.

        Raises:
            UsageError: It is a video.
        """
        parent, _, name = address.rstrip("/").rpartition("/")
        if parent not in self.known:
            folder = ObjectFolder(parent)
            self.known[parent] = folder, folder.list(below=False)
        folder, objects = self.known[parent]
        if name not in objects:
            return None
        path = folder.file(name, objects[name])
        if is_video(path):
            raise UsageError(f"{path} is a video, which is read from a disk only - copy it to this machine")
        return path


def _images_in(folder: Path, out_folder: Path) -> list[Path]:
    """Return the images of a folder, without those of the output folder, and warn of what else is left out."""

    @functools.cache
    def is_output(parent: Path) -> bool:
        real = Path(os.path.realpath(parent))
        return out_folder == real or out_folder in real.parents

    listing = find_files(folder)
    files, hidden, others = (
        [path for path in paths if not is_output(path.parent)]
        for paths in (listing.files, listing.hidden, listing.others)
    )
    listing = listing._replace(files=files, hidden=hidden, others=others)

    def read_records(inner: PurePosixPath) -> list[bytes]:
        return [path.read_bytes() for path in sorted((folder / inner).glob(f"{RECORD}*"))]

    outputs = RecordedOutputs(read_records, unrecorded={PROGRESS_LOG})
    return _require_images(listing, folder, outputs, "name each video to predict it")


def _require_images(listing: Listing, folder: Path, outputs: RecordedOutputs, way_out: str) -> list[Path]:
    """Return the images of a listing that are not outputs of segdeconv, and warn of what else is left out.

    Args:
        listing: The files of the folder.
        folder: The folder.
        outputs: The outputs of segdeconv in it.
        way_out: What to do with videos.

    Raises:
        UsageError: There are none.
    """
    listing, counts = _without_outputs(listing, folder, outputs)
    if counts:
        number = f"{counts.total()} outputs of segdeconv are" if counts.total() > 1 else "1 output of segdeconv is"
        warn(f"{folder}: {number} left out ({listed(counts)}) - name them or their folder to use them")
    videos = [path for path in listing.others if is_video(path)]
    if videos:
        count = f"{len(videos)} video{'s are' if len(videos) > 1 else ' is'}"
        warn(f"{folder}: {count} left out ({count_endings(videos)}) - {way_out}")
    others = [path for path in listing.others if not is_video(path)]
    for line in describe_skipped(listing._replace(others=others), folder):
        warn(line)
    if not listing.files:
        raise UsageError(f"{folder} contains no images - supported suffixes: {', '.join(sorted(SUFFIXES))}")
    return listing.files


def _without_outputs(listing: Listing, folder: Path, outputs: RecordedOutputs) -> tuple[Listing, Counter[str]]:
    """Return a listing without the outputs of segdeconv, and their number by the folder of their record."""
    counts: Counter[str] = Counter()

    def keep(path: Path) -> bool:
        recorded_in = outputs.folder_of(PurePosixPath(path.relative_to(folder).as_posix()))
        if recorded_in is not None:
            counts[str(recorded_in)] += 1
        return recorded_in is None

    files, hidden, others = (
        [path for path in paths if keep(path)] for paths in (listing.files, listing.hidden, listing.others)
    )
    return listing._replace(files=files, hidden=hidden, others=others), counts


def _resolve_list(lines: list[tuple[int, str]], where: str, missing: list[str]) -> Iterator[tuple[Path, str]]:
    listings = _Listings()
    for number, line in lines:
        stored = listings.find(line) if is_object_storage(line) else None
        path = Path(line) if stored is None else stored
        if not path.exists():
            missing.append(f"{where}, line {number}: {line} not found - give paths relative to the current folder")
            continue
        inside = stored is None and not path.is_absolute() and ".." not in path.parts
        yield path, (path.with_suffix("") if inside else Path(path.stem)).as_posix()


def output_path(out: Path, name: str, ending: str) -> Path:
    """Return the path of an output file; a file name that would be too long is truncated and ends in its hash."""
    path = out / f"{name}{ending}"
    if len(os.fsencode(path.name)) > MAX_NAME_LENGTH:
        stem = os.fsencode(Path(name).name)
        digest = hashlib.sha256(stem).hexdigest()[:8]
        start = stem[: MAX_NAME_LENGTH - len(os.fsencode(ending)) - len(digest) - 1].decode(errors="ignore")
        path = path.with_name(f"{start}~{digest}{ending}")
    return path
