"""Paths of files that no folder has: inside a shard, or in an object storage."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

RECENT = 3  # files that a thread keeps: those of one sample, each of which is opened several times

# A path that is no file of its own derives from the class of the system's paths.
if TYPE_CHECKING:
    _SystemPath = Path
else:
    _SystemPath = type(Path())


class StoredFile(_SystemPath):
    """The path of a file that is stored elsewhere, which the readers of images and masks open like any other file.

    It is a path so that all that reads, checks and names files does so here too. Only reading works; it has no
    neighbours: a path that is derived from it does not exist.

    Attributes:
        address: What messages call the file; None for a derived path.
        size: Its bytes.
        changed: Time of its last change in nanoseconds since 1970; 0 if it is unknown.
        stored: What the index or listing says of the file; its content is kept by this object, not by the address,
            which may have another content when it is looked up again.
    """

    address: str | None = None
    size: int = 0
    changed: int = 0
    stored: object = None
    _fetching: Future[bytes] | None = None
    _bytes_of_thread = threading.local()

    def fetch(self) -> bytes:
        """Return the content of the file, from where it is stored.

        Raises:
            UsageError: It cannot be read.
        """
        raise NotImplementedError

    def fetch_by(self, pool: Executor) -> None:
        """Fetch the content in the background, for the thread that reads it next."""
        self._fetching = pool.submit(self.fetch)

    def __str__(self) -> str:
        return self.address or super().__str__()  # a path would turn s3:// into s3:/

    def resolve(self, strict: bool = False) -> StoredFile:
        return self

    def read_bytes(self) -> bytes:
        if self.address is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        recent: list[tuple[object, bytes]] = self._bytes_of_thread.__dict__.setdefault("recent", [])
        for stored, content in recent:
            if stored is self.stored:
                return content
        fetching, self._fetching = self._fetching, None
        content = self.fetch() if fetching is None else fetching.result()
        recent.append((self.stored, content))
        del recent[:-RECENT]
        return content

    def open(self, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode != "rb":
            raise PermissionError(errno.EACCES, "a stored file can only be read, in binary", str(self))
        return io.BytesIO(self.read_bytes())

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        if self.address is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        seconds = self.changed // 10**9
        # mode, inode, device, links, user, group, size, and three times: in seconds, as floats, in nanoseconds
        times = (seconds,) * 3 + (self.changed / 1e9,) * 3 + (self.changed,) * 3
        return os.stat_result((stat.S_IFREG | 0o444, 0, 0, 1, 0, 0, self.size, *times))

    def exists(self, **_: Any) -> bool:
        return self.address is not None

    is_file = exists

    def is_symlink(self) -> bool:
        return False
