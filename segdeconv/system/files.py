"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".tmp-"  # what the names of files begin with that are being written


@contextmanager
def replacing(path: Path, *, before: Callable[[Path], None] | None = None) -> Iterator[BinaryIO]:
    """A file to write into that takes the name `path` when it is whole and on the disk, in place of an older one.

    It lies in the same folder, since only there a rename is one step. Nothing is left of one that fails; one whose
    writer is killed stays under a name that begins with PARTIAL.
    before: called with that name when everything is on the disk, just before the rename.
    """
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name[-40:]}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            before(partial)
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        error.filename = str(path)  # the name that a person knows it by; a failed write says none
        raise
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a small file, UTF-8, in one piece."""
    with replacing(path) as file:
        file.write(text.encode())


def replace_link(path: Path, source: Path) -> None:
    """Give the file `source` a second name, in place of what had it."""
    partial = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name[-40:]}")
    partial.unlink(missing_ok=True)
    os.link(source, partial)
    try:
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # a rename from one name of a file to another of the same does nothing


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
