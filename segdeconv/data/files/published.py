"""Archives that others publish: fetched and verified, or taken from where a person put them."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from segdeconv.data.files.download import fetch
from segdeconv.errors import UsageError


class Archive(NamedTuple):
    """A published file: its name, what it is for, where it is served, its hash, and how many names its lists hold."""

    name: str
    what: str
    urls: tuple[str, ...]
    sha256: str | None
    lists: Mapping[str, int] = MappingProxyType({})
    md5: str | None = None  # where nobody publishes a sha256


def take(
    archives: Sequence[Archive], place: Path, root: str | None, *, lacking: str, instead: str
) -> Iterator[tuple[Archive, Path]]:
    """Each archive with its verified file in `place`, in turn. A file that is fetched is gone when the next is asked
    for, one that a person put there stays.

    root: `dataset.root`; only without one is anything fetched.
    lacking: what root does not hold. instead: what may be given as dataset.root, unpacked.
    """
    absent = [archive for archive in archives if not (place / archive.name).exists()]
    if root is not None and absent:
        raise UsageError(
            f"dataset.root={root} does not hold {lacking} - {_by_hand(absent, place)}, or leave dataset.root out to "
            "have it fetched into data"
        )
    for done, archive in enumerate(archives):
        place.mkdir(parents=True, exist_ok=True)
        path = place / archive.name
        was_there = path.exists()
        way_out = f"{_by_hand(archives[done:], place)}, or give {instead} as dataset.root=DIR"
        fetch(archive.urls if root is None else (), path, way_out=way_out, sha256=archive.sha256, md5=archive.md5)
        if was_there:
            yield archive, path
        else:
            path = path.rename(f"{path}.part")  # a run that is stopped now leaves what the next one knows to be fetched
            yield archive, path
            path.unlink()


@contextmanager
def unpacked(unpack: Callable[..., None], archive: Path, place: Path, only: str | tuple[str, ...]) -> Iterator[Path]:
    """A folder of what is wanted of an archive, from which parts are moved to their places; gone afterwards."""
    folder = place.with_name(f"{place.name}.unpacking")
    shutil.rmtree(folder, ignore_errors=True)
    unpack(archive, folder, only=only)
    yield folder
    shutil.rmtree(folder)


def _by_hand(archives: Sequence[Archive], place: Path) -> str:
    files = " and ".join(f"{archive.name} ({archive.what}, from {archive.urls[0]})" for archive in archives)
    return f"put {files} into {place.resolve()}"
