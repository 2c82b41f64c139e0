"""Atomic file writes, folder locks and hashes of files."""

from __future__ import annotations

import errno
import functools
import hashlib
import math
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

from filelock import FileLock, Timeout

from segdeconv.errors import DiskError, UsageError, warn

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PARTIAL = ".tmp-"  # prefix of the names of files that are being written
PARTIAL_NAME = re.compile(rf"{re.escape(PARTIAL)}(\d+)-[0-9a-f]{{8}}-.")  # process id, random number, end of the name
LOCK = ".lock"
LOCK_HOLDER = b"process "  # the beginning of every lock file of ours
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # the errors of a file system without locks


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` once it is complete and synced to the disk.

    For libraries that open files themselves. The temporary file lies in the same folder, which is created if missing,
    because a rename is atomic only within a folder. Its name is unique across threads and processes. A writer that
    fails leaves nothing behind; one that is killed leaves a file that `remove_partial_files` removes.

    Raises:
        DiskError: The folder cannot be created, or was removed.
    """
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{secrets.token_hex(4)}-{path.name[-40:]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("r+b") as file:  # Windows syncs only files that are open for writing
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        removed = not path.parent.is_dir() or str(partial) in (error.filename, error.filename2)
        if isinstance(error, FileNotFoundError) and removed:
            raise DiskError(
                f"{path} cannot be written: its folder was removed or cannot be created - choose another folder, or "
                "run the same command again"
            ) from error
        error.filename = str(path)  # name the target, not the temporary file
        raise
    finally:
        with suppress(NotADirectoryError):
            partial.unlink(missing_ok=True)  # renaming a hard link onto the same file does nothing


def remove_partial_files(folder: Path, *, belongs_elsewhere: Callable[[Path], bool] | None = None) -> None:
    """Remove the files of killed processes that `replacing_path` was writing to, and no others.

    A file whose process still runs is left alone, as is every file and folder with another name.

    Args:
        folder: The folder, locked by the caller.
        belongs_elsewhere: Whether a sub-folder is left out, with all in it; None to leave out all sub-folders.
    """
    for path in list(folder.iterdir()):
        if path.is_symlink():
            continue
        if path.is_dir():
            if belongs_elsewhere is not None and not belongs_elsewhere(path):
                remove_partial_files(path, belongs_elsewhere=belongs_elsewhere)
        elif (match := PARTIAL_NAME.match(path.name)) and path.is_file() and not _is_running(int(match[1])):
            with suppress(OSError):
                path.unlink()


def _is_running(process: int) -> bool:
    """Return whether another process with this id runs; False on Windows, where open files cannot be removed anyway."""
    if os.name == "nt" or process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file to write to, which replaces `path` as `replacing_path` does."""
    with replacing_path(path) as partial, partial.open("wb") as file:
        yield file


def create_folder(folder: Path, way_out: str) -> None:
    """Create an output folder and its parents, if missing.

    Args:
        folder: The folder.
        way_out: The option that chooses another folder, for the error message, such as `--out`.

    Raises:
        UsageError: No folder can be created there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # in /proc, for example
        raise UsageError(f"{folder} cannot be created: {error.strerror} - choose another {way_out}") from error


def allocate(path: Path, size: int) -> None:
    """Reserve the disk blocks of a new file of `size` bytes, which reads as zeros.

    A process that writes to a memory-mapped file without blocks on a full disk is killed by SIGBUS.

    Raises:
        OSError: The disk is full, for example.
    """
    with path.open("wb") as file:
        _allocate(file, size)


def _allocate(file: IO[bytes], size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    zeros = bytes(min(size, 1 << 20))
    for start in range(0, size, len(zeros) or 1):
        file.write(zeros[: size - start])
    file.flush()
    os.fsync(file.fileno())


def scratch_array(shape: tuple[int, ...], dtype: npt.DTypeLike, folder: Path) -> np.ndarray:
    """Create an array of zeros in a temporary file of a folder, for data that may exceed the memory.

    The file has no name (on Windows it is deleted when the process ends), so that nothing is left behind, however the
    process ends.

    Raises:
        OSError: The disk is full, for example.
    """
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder, prefix=PARTIAL) as file:
        _allocate(file, math.prod(shape) * np.dtype(dtype).itemsize)
        return np.memmap(file, dtype, "r+", shape=shape)


def replace_text(path: Path, text: str) -> None:
    """Write a small UTF-8 file atomically, with file names that are not UTF-8 as in `encode`."""
    with replacing(path) as file:
        file.write(encode(text))


def encode(text: str) -> bytes:
    """Encode a text as UTF-8. Bytes of a file name that are not UTF-8 are written as `\\udcXX`, as in JSON.

    Examples:
        >>> encode("caf\\udce9.png")
        b'caf\\\\udce9.png'
    """
    return text.encode(errors="backslashreplace")


def replace_link(path: Path, source: Path) -> None:
    """Create or replace `path` with a hard link to the file `source`."""
    with replacing_path(path) as partial:
        os.link(source, partial)


def cache_root() -> Path:
    """Return the user's cache folder: XDG_CACHE_HOME, or .cache in the home folder.

    A user id without an account has no home folder unless HOME is set; then the folder is a temporary one, which is
    removed when the process ends.
    """
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(_temporary_cache().name)


@functools.cache
def _temporary_cache() -> tempfile.TemporaryDirectory[str]:
    warn(
        "HOME: not set, and the user has no account, so nothing is cached between runs - set HOME or XDG_CACHE_HOME to "
        "a folder"
    )
    return tempfile.TemporaryDirectory(prefix="segdeconv-", ignore_cleanup_errors=True)


def is_utf8(name: str) -> bool:
    """Return whether a file name, which may hold bytes of any encoding, is valid UTF-8."""
    return encode(name) == name.encode(errors="replace")


def lock_folder(folder: Path, way_out: str) -> FileLock | None:
    """Create a folder and lock it for this process, until the lock is released or the process ends.

    The kernel holds the lock: a killed process leaves none behind, and neither forked nor spawned children inherit it.

    Args:
        folder: The folder, created if missing.
        way_out: The option that chooses another folder, for the error message, such as `--out`.

    Returns:
        The lock, or None where the file system has no locks.

    Raises:
        UsageError: Another process has locked the folder, its lock file is a file of someone else, or it cannot be
            created.
    """
    create_folder(folder, way_out)
    path = folder / LOCK
    with suppress(PermissionError):  # Windows does not let anyone read a locked file
        if path.is_file() and (start := path.read_bytes()[: len(LOCK_HOLDER)]) and start != LOCK_HOLDER:
            raise UsageError(f"{path} is not a lock file of segdeconv - remove it, or choose another {way_out}")

    def sign(descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())

    lock = FileLock(path, blocking=False, thread_local=False, on_acquired=sign)
    try:
        lock.acquire()
    except Timeout:
        holder = ""
        with suppress(OSError):  # Windows does not let anyone read a locked file
            holder = path.read_text(errors="replace").strip()
        holder = holder or "another process"
        raise UsageError(f"{folder} is in use by {holder} - wait for it, or choose another {way_out}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return lock


def unlock_folder(lock: FileLock | None) -> None:
    """Release a lock of `lock_folder`, and remove its file."""
    if lock is None:
        return
    if os.name != "nt":  # on Windows, releasing the lock deletes its file
        # Deleted while the lock is still held, so that it cannot be another process's lock.
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


@contextmanager
def waiting_for_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a lock file, once no other process or thread does; without a lock where there are none.

    Args:
        path: The lock file, which is left behind, in a folder that exists.
    """
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()


@contextmanager
def creating_folder(folder: Path, way_out: str) -> Iterator[Path]:
    """Yield a temporary folder to write to, which appears as `folder` when it is complete.

    Args:
        folder: The folder to create; it must not exist, or be empty.
        way_out: The option that chooses another folder, for the error message, such as `--out`.

    Raises:
        UsageError: The folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder - choose another {way_out}, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{PARTIAL}{os.getpid()}-{secrets.token_hex(4)}-{folder.name}")
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_identity(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file does: size, time and inode; zeros for a file that is not there."""
    status = path.stat() if path.exists() else None
    return (status.st_size, status.st_mtime_ns, status.st_ino) if status else (0, 0, 0)


def hash_text(text: str) -> str:
    """Return the sha256 of a text, which may have file names that are not UTF-8, in hex."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def hash_file(path: Path, kind: str = "sha256") -> str:
    """Return the hex digest of a file; `kind` is the name of a hashlib algorithm, such as `sha256` or `md5`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
