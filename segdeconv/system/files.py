"""Files that are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".tmp-"  # what the names of files begin with that are being written


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
