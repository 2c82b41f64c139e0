"""Unpacking what strangers packed: regular files into one new folder, of bounded number and size, or nothing at all."""

import errno
import gzip
import io
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TypeVar

from tqdm import tqdm

from segdeconv.errors import UsageError

CHUNK = 1 << 20
MAX_FILES = 100_000
MAX_BYTES = 50 << 30
MAX_RATIO = 200  # unpacked size to packed size; pictures are below 10
MAX_READ = 16 << 20  # of one read: tarfile reads the headers of an entry whole, as long as they say they are
MAX_NAME = 1024

Entry = TypeVar("Entry")

# What zipfile and tarfile raise for archives that are not what they should be.
DAMAGE = (
    EOFError, FileExistsError, IndexError, NotADirectoryError, OverflowError, RuntimeError, UnicodeError,
    gzip.BadGzipFile, tarfile.TarError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def unpack_zip(archive: Path, folder: Path, *, strip: int = 0, only: str | tuple[str, ...] = "") -> None:
    """Unpack regular files of a zip into a new folder; anything else that is asked for is refused.

    strip: leading path parts to drop. only: prefix, after stripping, of the files to unpack; or several.
    No links, no devices, no path that leaves the folder, no more than MAX_FILES files and MAX_BYTES bytes, and no file
    packed more than MAX_RATIO times: each raises UsageError and nothing is left behind.
    """
    with _new_folder(archive, folder, "zip"), zipfile.ZipFile(archive) as file:
        chosen, budget = [], _Budget(archive)
        for entry in file.infolist():
            path = _place(archive, entry.filename, strip, only)
            if path is None:
                continue
            kind = stat.S_IFMT(entry.external_attr >> 16)
            _require_plain(archive, entry.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            if entry.is_dir():
                continue
            if entry.file_size > MAX_RATIO * max(entry.compress_size, 1024):
                raise UsageError(
                    f"{archive} holds '{entry.filename}', packed over {MAX_RATIO} times - it may be a bomb"
                )
            budget.take(entry.file_size)
            chosen.append((entry, path))
        for entry, path in _progress(chosen, archive):
            _store(file.open(entry), folder / path)


def unpack_tar(archive: Path, folder: Path, *, strip: int = 0, only: str | tuple[str, ...] = "") -> None:
    """The same for a tar, plain or gzipped, read once from front to back.

    What is not asked for counts too: a gzipped tar must be unpacked to be passed over.
    """
    with (
        _new_folder(archive, folder, "tar"),
        closing(_Bounded(archive)) as stream,
        tarfile.open(fileobj=stream, mode="r:") as file,
    ):
        budget = _Budget(archive)
        for entry in _progress(file, archive):
            budget.take(entry.size)
            path = _place(archive, entry.name, strip, only)
            if path is None or entry.isdir():
                continue
            # Not entry.isreg(), which a sparse file is too: a few bytes that unpack to any number of zeros.
            _require_plain(archive, entry.name, entry.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not entry.sparse)
            source = file.extractfile(entry)
            assert source is not None, "a regular file has content"
            _store(source, folder / path)
        # tarfile takes a damaged header for the end. Some writers end without the zeros that the format asks for.
        stream.seek(file.offset)
        if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no entry at byte {file.offset}")
        while stream.read(CHUNK):  # gzip's checksum stands at its end
            pass


@contextmanager
def _new_folder(archive: Path, folder: Path, kind: str) -> Iterator[None]:
    """Makes the folder, and takes it away again if anything goes wrong in it."""
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(folder)  # a full disk does not say which file it was
        if isinstance(error, DAMAGE) or (isinstance(error, OSError) and error.errno == errno.EINVAL):  # a seek before 0
            raise UsageError(f"{archive} is not a whole {kind} file ({error}) - delete it and try again") from error
        raise


def _place(archive: Path, name: str, strip: int, only: str | tuple[str, ...]) -> PurePosixPath | None:
    """Where in the folder an entry belongs; None if it is not asked for."""
    whole = PurePosixPath(name)
    path = PurePosixPath(*whole.parts[strip:])
    if not str(path).startswith(only):
        return None
    if whole.is_absolute() or ".." in whole.parts or any(sign in name for sign in "\\:\0"):
        raise UsageError(f"{archive} holds '{name}', which leaves its folder - do not trust this archive")
    if len(os.fsencode(name)) > MAX_NAME or any(len(os.fsencode(part)) > 255 for part in whole.parts):
        raise UsageError(f"{archive} holds '{name[:40]}...', a name too long for a file - do not trust this archive")
    return path


def _require_plain(archive: Path, name: str, plain: bool) -> None:
    if not plain:
        raise UsageError(f"{archive} holds '{name}', a link or device - do not trust this archive")


def _store(source: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source, target.open("xb") as sink:
        shutil.copyfileobj(source, sink, CHUNK)


def _progress(entries: Iterable[Entry], archive: Path) -> Iterable[Entry]:
    return tqdm(entries, desc=f"unpacking {archive.name}", unit=" files", leave=False, disable=None)


class _Budget:
    """Counts what an archive unpacks to, until it is too much."""

    def __init__(self, archive: Path) -> None:
        self.archive, self.files, self.bytes = archive, 0, 0

    def take(self, size: int) -> None:
        if size < 0:  # which would send tarfile back to where it has been
            raise tarfile.ReadError(f"an entry of {size} bytes")
        self.files += 1
        self.bytes += size
        if self.files > MAX_FILES or self.bytes > MAX_BYTES:
            raise UsageError(
                f"{self.archive} unpacks to more than {MAX_FILES} files or {MAX_BYTES} bytes - it may be a bomb"
            )


class _Bounded(io.BufferedIOBase):
    """A tar as a stream, gunzipped if need be, that gives no more than MAX_RATIO times what it is packed in."""

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        self.packed = archive.open("rb")
        zipped = self.packed.read(2) == b"\x1f\x8b"
        self.packed.seek(0)
        self.stream = gzip.GzipFile(fileobj=self.packed) if zipped else self.packed
        self.limit = min(MAX_BYTES, MAX_RATIO * max(archive.stat().st_size, 1024))

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_READ:
            raise tarfile.ReadError(f"a header of {size} bytes")
        content = self.stream.read(size)
        self._check(self.stream.tell())
        return content

    def seek(self, offset: int, whence: int = 0, /) -> int:
        assert whence == 0, "tarfile only says how far from the start"
        self._check(offset)
        return self.stream.seek(offset)

    def _check(self, position: int) -> None:
        if position > self.limit:
            raise UsageError(
                f"{self.archive} unpacks to more than {self.limit} bytes, {MAX_RATIO} times its own size - "
                "it may be a bomb"
            )

    def tell(self) -> int:
        return self.stream.tell()

    def close(self) -> None:
        self.packed.close()
        super().close()
