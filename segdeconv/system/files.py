"""Files that are whole or not there, whatever happens while they are written, and folders that one process holds."""

import errno
import hashlib
import os
import platform
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from segdeconv.errors import UsageError

PARTIAL = ".tmp-"  # what the names of files begin with that are being written
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without locks answers


@contextmanager
def replacing_path(path: Path) -> Iterator[Path]:
    """A name to write a file under, which takes the name `path` when it is complete and on the disk.

    For libraries that open files themselves. The name lies in the same folder, which is made if it is missing, because
    a rename is atomic only there. No other writer has it, in this process or another. A writer that fails leaves
    nothing; one that is killed leaves a file whose name begins with PARTIAL.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{secrets.token_hex(4)}-{path.name[-40:]}")
    try:
        yield partial
        with partial.open("r+b") as file:  # Windows syncs only what is open for writing
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        error.filename = str(path)  # the name that a person knows it by; a failed write says none
        raise
    finally:
        partial.unlink(missing_ok=True)  # a rename from one name of a file to another of the same does nothing


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, by the way of `replacing_path`."""
    with replacing_path(path) as partial, partial.open("wb") as file:
        yield file


def replace_text(path: Path, text: str) -> None:
    """Write a small file, UTF-8, in one piece."""
    with replacing(path) as file:
        file.write(text.encode())


def replace_link(path: Path, source: Path) -> None:
    """Give the file `source` a second name, in place of what had it."""
    with replacing_path(path) as partial:
        os.link(source, partial)


def lock_folder(folder: Path, way_out: str) -> FileLock | None:
    """Make a folder and lock it for this process, until the lock is released or the process ends.

    The kernel holds the lock: a killed process leaves none behind, and neither forked nor spawned children have it.

    Args:
        way_out: what the error message says to choose another of: `--out`.

    Returns:
        The lock, or None where the file system has no locks.

    Raises:
        UsageError: another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"

    def sign(descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())

    lock = FileLock(path, blocking=False, thread_local=False, on_acquired=sign)
    try:
        lock.acquire()
    except Timeout:
        holder = ""
        with suppress(OSError):  # Windows lets nobody read a locked file
            holder = path.read_text(errors="replace").strip()
        holder = holder or "another process"
        raise UsageError(f"{folder} is in use by {holder} - wait for it, or choose another {way_out}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return lock


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path, kind: str = "sha256") -> str:
    """sha256 or md5 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()
