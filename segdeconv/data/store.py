"""Store of numbered byte strings, in memory or in a file, shared between processes and limited in size."""

import errno
import multiprocessing.context
import os
import struct
import threading
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Locks of a file are those of a process and do not exclude its threads. A fork waits for the thread that is writing, so
# that a child never inherits a lock that nobody releases.
_THREADS = threading.Lock()
if fcntl is not None:
    os.register_at_fork(before=_THREADS.acquire, after_in_parent=_THREADS.release, after_in_child=_THREADS.release)

STAMP = 16  # bytes of a stamp

_USED = struct.Struct("<Q")  # at the start of the file: the offset of the next new entry
_FIELDS = struct.Struct(f"<QQQI{STAMP}s")
_CHECK = struct.Struct("<I")
_RECORD = _FIELDS.size + _CHECK.size

IN_MEMORY = fcntl is not None and hasattr(os, "memfd_create")  # Linux
ON_DISK = fcntl is not None


class _Entry(NamedTuple):
    """Position and contents of an entry.

    Attributes:
        offset: First byte.
        room: Bytes that belong to the entry.
        length: Bytes of its content.
        checksum: CRC-32 of the content.
        stamp: Version of the content.
    """

    offset: int
    room: int
    length: int
    checksum: int
    stamp: bytes


class Store:
    """Store of byte strings by number, shared between forked and spawned processes.

    Writers, threads and processes, hold a lock, which the system releases if the process dies. Readers need no lock: a
    checksum detects incomplete or damaged entries, which are treated as missing. Entries are never evicted: since
    training reads in random order, the first ones are as useful as later ones.

    Args:
        count: Number of entries.
        capacity: Limit in bytes; entries that do not fit are not stored.
        path: File of the store, which later runs can use too. None uses anonymous memory, which the system frees when
            the last process ends.
    """

    def __init__(self, count: int, capacity: int, path: Path | None = None) -> None:
        self.count, self.capacity, self.path = count, capacity, path
        self._open(os.memfd_create("segdeconv") if path is None else _open_file(path))
        start = _USED.size + count * _RECORD
        with self._locked():
            size = os.fstat(self._file).st_size
            if size < start:
                os.ftruncate(self._file, 0)
                os.ftruncate(self._file, start)
                size = start
            elif size > capacity:  # the limit was lowered; entries beyond it become invalid
                size = max(start, capacity)
                os.ftruncate(self._file, size)
            (used,) = _USED.unpack(os.pread(self._file, _USED.size, 0))
            self._write(_USED.pack(max(start, min(used, size))), 0)

    def _open(self, file: int | None) -> None:
        self._file: Any = file
        self._full = file is None
        if file is not None:
            weakref.finalize(self, os.close, file)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("_file", "_full")}
        # Anonymous memory can only be passed to a process that is being spawned.
        if self.path is None and self._file is not None and multiprocessing.context.get_spawning_popen() is not None:
            state["descriptor"] = reduction.DupFd(self._file)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        descriptor = state.pop("descriptor", None)
        self.__dict__.update(state)
        if descriptor is not None:
            self._open(descriptor.detach())
        else:
            self._open(None if self.path is None else _open_file(self.path))

    def get(self, number: int, stamp: bytes) -> bytes | None:
        """Return the content stored under a number with the same stamp, or None if it is missing or damaged."""
        entry = self._entry(number) if self._file is not None else None
        if entry is None or entry.stamp != stamp:
            return None
        content = os.pread(self._file, entry.length, entry.offset)
        return content if len(content) == entry.length and zlib.crc32(content) == entry.checksum else None

    def holds(self, number: int, stamp: bytes) -> bool:
        """Return whether there is content under a number with the same stamp, without reading it."""
        entry = self._entry(number) if self._file is not None else None
        return entry is not None and entry.stamp == stamp

    def put(self, number: int, stamp: bytes, content: bytes) -> None:
        """Store content under a number, if it fits.

        Args:
            number: Number of the entry, below `count`.
            stamp: STAMP bytes that identify the version of the content.
            content: The bytes to store.
        """
        if self._full:
            return
        try:
            self._put(number, stamp, content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._full = True
            print(
                f"warning: no disk space is left for the cache {self.path}; images that are not in it are decoded "
                "every time"
            )

    def _put(self, number: int, stamp: bytes, content: bytes) -> None:
        with self._locked():
            entry = self._entry(number)
            (end,) = _USED.unpack(os.pread(self._file, _USED.size, 0))
            reused = entry is not None and entry.room >= len(content) and entry.offset + entry.room <= self.capacity
            if entry is not None and reused:
                offset, room = entry.offset, entry.room
            elif end + len(content) <= self.capacity:
                offset, room = end, len(content)
                self._write(_USED.pack(end + room), 0)
            else:
                return
            self._write(content, offset)
            fields = _FIELDS.pack(offset, room, len(content), zlib.crc32(content), stamp)
            self._write(fields + _CHECK.pack(zlib.crc32(fields)), _USED.size + number * _RECORD)

    def _entry(self, number: int) -> _Entry | None:
        record = os.pread(self._file, _RECORD, _USED.size + number * _RECORD)
        fields = record[: _FIELDS.size]
        if len(record) < _RECORD or _CHECK.unpack(record[_FIELDS.size :]) != (zlib.crc32(fields),):
            return None
        return _Entry(*_FIELDS.unpack(fields))

    def _write(self, content: bytes, offset: int) -> None:
        rest = memoryview(content)
        while rest:
            written = os.pwrite(self._file, rest, offset)
            rest, offset = rest[written:], offset + written

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with _THREADS:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)


def _open_file(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
