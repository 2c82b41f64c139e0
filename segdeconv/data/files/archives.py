"""Safe unpacking of untrusted archives: only regular files, into one new folder, within limits of number and size."""

import errno
import gzip
import io
import lzma
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
MAX_RATIO = 200  # unpacked size to packed size; images are below 10
MAX_READ = 16 << 20  # bytes of one read: tarfile reads each header at the length that the archive states
MAX_NAME = 1024

Entry = TypeVar("Entry")

# The exceptions that zipfile and tarfile raise for damaged archives.
DAMAGE = (
    EOFError, FileExistsError, IndexError, NotADirectoryError, OverflowError, RuntimeError, UnicodeError,
    gzip.BadGzipFile, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def unpack_zip(archive: Path, folder: Path, *, strip: int = 0, only: str | tuple[str, ...] = "") -> None:
    """Unpack the regular files of a zip archive into a new folder.

    Args:
        archive: The zip file.
        folder: The folder to create. It is removed again if unpacking fails.
        strip: Number of leading path parts to drop.
        only: Prefix, or several, that a path must have after stripping to be unpacked.

    Raises:
        UsageError: The archive is damaged, or a selected entry is a link or device, has a path outside the folder, is
            compressed more than MAX_RATIO times, or exceeds the limits of MAX_FILES files and MAX_BYTES bytes.
    """
    with _new_folder(archive, folder, "zip"), zipfile.ZipFile(archive) as file:
        selected, budget = [], _Budget(archive)
        for entry in file.infolist():
            path = _target_path(archive, entry.filename, strip, only)
            if path is None:
                continue
            kind = stat.S_IFMT(entry.external_attr >> 16)
            _require_regular(archive, entry.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            if entry.is_dir():
                continue
            if entry.file_size > MAX_RATIO * max(entry.compress_size, 1024):
                raise UsageError(
                    f"{archive} holds '{entry.filename}', compressed over {MAX_RATIO} times - "
                    "it may be a decompression bomb"
                )
            budget.take(entry.file_size)
            selected.append((entry, path))
        for entry, path in _progress(selected, archive):
            _store(file.open(entry), folder / path)


def unpack_tar(archive: Path, folder: Path, *, strip: int = 0, only: str | tuple[str, ...] = "") -> None:
    """Unpack the regular files of a tar archive, plain or gzipped, into a new folder, reading it once.

    Skipped entries count towards the limits too, since a gzipped tar must be decompressed to be skipped.

    Args:
        archive: The tar file.
        folder: The folder to create. It is removed again if unpacking fails.
        strip: Number of leading path parts to drop.
        only: Prefix, or several, that a path must have after stripping to be unpacked.

    Raises:
        UsageError: See `unpack_zip`.
    """
    with (
        _new_folder(archive, folder, "tar"),
        closing(_Bounded(archive)) as stream,
        tarfile.open(fileobj=stream, mode="r:") as file,
    ):
        budget = _Budget(archive)
        for entry in _progress(file, archive):
            budget.take(entry.size)
            path = _target_path(archive, entry.name, strip, only)
            if path is None or entry.isdir():
                continue
            # entry.isreg() also accepts sparse files, whose few bytes unpack to any number of zeros.
            _require_regular(
                archive, entry.name, entry.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not entry.sparse
            )
            source = file.extractfile(entry)
            assert source is not None, "a regular file has content"
            _store(source, folder / path)
        # tarfile treats a damaged header as the end. Some writers omit the zeros that the format requires at the end.
        stream.seek(file.offset)
        if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no entry at byte {file.offset}")
        while stream.read(CHUNK):  # gzip checks its checksum at the end
            pass


@contextmanager
def _new_folder(archive: Path, folder: Path, kind: str) -> Iterator[None]:
    """Create the folder, and remove it again if an exception is raised."""
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(folder)  # the error of a full disk names no file
        # EINVAL: a seek before 0; bz2 raises an OSError without a number.
        if isinstance(error, DAMAGE) or (isinstance(error, OSError) and error.errno in (errno.EINVAL, None)):
            raise UsageError(f"{archive} is not a complete {kind} file ({error}) - delete it and try again") from error
        raise


def _target_path(archive: Path, name: str, strip: int, only: str | tuple[str, ...]) -> PurePosixPath | None:
    """Return the path of an entry inside the folder, or None if the entry is not selected."""
    whole = PurePosixPath(name)
    path = PurePosixPath(*whole.parts[strip:])
    if not str(path).startswith(only):
        return None
    if whole.is_absolute() or ".." in whole.parts or any(sign in name for sign in "\\:\0"):
        raise UsageError(f"{archive} holds '{name}', a path outside its folder - do not trust this archive")
    if len(os.fsencode(name)) > MAX_NAME or any(len(os.fsencode(part)) > 255 for part in whole.parts):
        raise UsageError(
            f"{archive} holds '{name[:40]}...', a name too long for a file system - do not trust this archive"
        )
    return path


def _require_regular(archive: Path, name: str, regular: bool) -> None:
    if not regular:
        raise UsageError(f"{archive} holds '{name}', a link or device - do not trust this archive")


def _store(source: IO[bytes], target: Path) -> None:
    with source:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as sink:
            shutil.copyfileobj(source, sink, CHUNK)


def _progress(entries: Iterable[Entry], archive: Path) -> Iterable[Entry]:
    return tqdm(entries, desc=f"unpacking {archive.name}", unit=" files", leave=False, disable=None)


class _Budget:
    """Limit on the number and total size of the files that an archive unpacks to."""

    def __init__(self, archive: Path) -> None:
        self.archive, self.files, self.bytes = archive, 0, 0

    def take(self, size: int) -> None:
        if size < 0:  # tarfile would seek backwards and never end
            raise tarfile.ReadError(f"an entry of {size} bytes")
        self.files += 1
        self.bytes += size
        if self.files > MAX_FILES or self.bytes > MAX_BYTES:
            raise UsageError(
                f"{self.archive} unpacks to more than {MAX_FILES} files or {MAX_BYTES} bytes - "
                "it may be a decompression bomb"
            )


class _Bounded(io.BufferedIOBase):
    """A tar stream, gunzipped if necessary, of at most MAX_RATIO times the size of its file."""

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
        assert whence == 0, "tarfile seeks only from the start"
        self._check(offset)
        return self.stream.seek(offset)

    def _check(self, position: int) -> None:
        if position > self.limit:
            raise UsageError(
                f"{self.archive} unpacks to more than {self.limit} bytes, {MAX_RATIO} times its own size - "
                "it may be a decompression bomb"
            )

    def tell(self) -> int:
        return self.stream.tell()

    def close(self) -> None:
        self.packed.close()
        super().close()
