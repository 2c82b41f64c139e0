"""Byte strings by number, in memory or in a file, shared by all processes that hold it and bounded in bytes."""

import errno
import multiprocessing.context
import os
import struct
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

STAMP = 16  # bytes

_USED = struct.Struct("<Q")  # first in the file: where the next new entry goes
_FIELDS = struct.Struct(f"<QQQI{STAMP}s")
_CHECK = struct.Struct("<I")
_RECORD = _FIELDS.size + _CHECK.size

IN_MEMORY = fcntl is not None and hasattr(os, "memfd_create")  # Linux
ON_DISK = fcntl is not None


class _Entry(NamedTuple):
    """offset, room: the bytes that belong to it. length: of what is in them, with this checksum and stamp."""

    offset: int
    room: int
    length: int
    checksum: int
    stamp: bytes


class Store:
    """`count` places for byte strings, in at most `capacity` bytes: what does not fit is not kept.

    path: the file they lie in, for the next run too; None for memory that has no name, which the system takes back with
        the last process that holds it, however that ends.

    Forked processes share it, and so do spawned ones. Whoever writes holds a lock, which the system takes from a
    process that dies; whoever reads holds none: a checksum tells an entry that is half written, damaged or just being
    replaced, and such an entry is none. Nothing is ever evicted: the order of training is random, so what came first is
    as likely to be wanted as what comes last.
    """

    def __init__(self, count: int, capacity: int, path: Path | None = None) -> None:
        self.count, self.capacity, self.path = count, capacity, path
        self._open(os.memfd_create("segdeconv") if path is None else _opened(path))
        start = _USED.size + count * _RECORD
        with self._locked():
            size = os.fstat(self._file).st_size
            if size < start:
                os.ftruncate(self._file, 0)
                os.ftruncate(self._file, start)
                size = start
            elif size > capacity:  # a bound that was higher once; the entries beyond it are none from now on
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
        # Memory without a name can be handed to a process that is being started, and to nobody else.
        if self.path is None and self._file is not None and multiprocessing.context.get_spawning_popen() is not None:
            state["handed"] = reduction.DupFd(self._file)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        handed = state.pop("handed", None)
        self.__dict__.update(state)
        if handed is not None:
            self._open(handed.detach())
        else:
            self._open(None if self.path is None else _opened(self.path))

    def get(self, number: int, stamp: bytes) -> bytes | None:
        """What was put there under the same stamp, if it is whole."""
        entry = self._entry(number) if self._file is not None else None
        if entry is None or entry.stamp != stamp:
            return None
        content = os.pread(self._file, entry.length, entry.offset)
        return content if len(content) == entry.length and zlib.crc32(content) == entry.checksum else None

    def put(self, number: int, stamp: bytes, content: bytes) -> None:
        """Keep it, if there is room. stamp: STAMP bytes that say of what."""
        if self._full:
            return
        try:
            self._put(number, stamp, content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._full = True
            print(f"cache: no space is left for {self.path}; images that are not in it are decoded every time")

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
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)


def _opened(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
