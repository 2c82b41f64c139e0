"""Published archives: downloaded and verified, or read from the folder where the user put them."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from segdeconv.data.files.download import fetch
from segdeconv.errors import UsageError


class Archive(NamedTuple):
    """A published archive.

    Attributes:
        name: File name.
        content: Short description for messages.
        urls: The addresses that serve it.
        sha256: Its hash, or None if only an md5 is published.
        lists: Number of names in each of its list files.
        md5: Its hash if no sha256 is published.
    """

    name: str
    content: str
    urls: tuple[str, ...]
    sha256: str | None
    lists: Mapping[str, int] = MappingProxyType({})
    md5: str | None = None


def obtain(
    archives: Sequence[Archive], folder: Path, root: str | None, *, lacking: str, instead: str
) -> Iterator[tuple[Archive, Path]]:
    """Yield each archive with its verified file in `folder`.

    A downloaded file is deleted when the next archive is requested; a file that was there before stays.

    Args:
        archives: The archives to obtain.
        folder: The folder of the archives.
        root: `dataset.root`. Archives are downloaded only if it is None.
        lacking: For messages, the files that `root` lacks.
        instead: For messages, the unpacked folder that can be given as `dataset.root`.

    Raises:
        UsageError: An archive is missing from `root`, or cannot be downloaded.
    """
    absent = [archive for archive in archives if not (folder / archive.name).exists()]
    if root is not None and absent:
        raise UsageError(
            f"dataset.root={root} does not contain {lacking} - {_by_hand(absent, folder)}, or leave out dataset.root "
            "to download it into data"
        )
    for done, archive in enumerate(archives):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / archive.name
        was_there = path.exists()
        way_out = f"{_by_hand(archives[done:], folder)}, or give {instead} as dataset.root=DIR"
        fetch(archive.urls if root is None else (), path, way_out=way_out, sha256=archive.sha256, md5=archive.md5)
        if was_there:
            yield archive, path
        else:
            path = path.rename(f"{path}.part")  # if this run is stopped, the next one treats it as a download
            yield archive, path
            path.unlink()


@contextmanager
def unpacked(unpack: Callable[..., None], archive: Path, target: Path, only: str | tuple[str, ...]) -> Iterator[Path]:
    """Unpack the selected files of an archive into a temporary folder, from which the caller moves them."""
    folder = target.with_name(f"{target.name}.unpacking")
    shutil.rmtree(folder, ignore_errors=True)
    unpack(archive, folder, only=only)
    yield folder
    shutil.rmtree(folder)


def _by_hand(archives: Sequence[Archive], folder: Path) -> str:
    files = " and ".join(f"{archive.name} ({archive.content}, from {archive.urls[0]})" for archive in archives)
    return f"put {files} into {folder.resolve()}"
