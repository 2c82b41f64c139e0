"""Reading of files inside shards, which lie in a folder or in an object storage, through a bounded local cache."""

from __future__ import annotations

import hashlib
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from segdeconv.data.files import object_folder, object_storage
from segdeconv.data.files.download import fetch
from segdeconv.data.files.stored_file import StoredFile
from segdeconv.data.shard_index import WAY_OUT, Member, Shard
from segdeconv.errors import UsageError
from segdeconv.system.files import cache_root, hash_file, remove_partial_files, replacing_path, waiting_for_lock

WEB = re.compile(r"https?://")
SHARE = 0.25  # fraction of the free disk that is the default limit of the cache
TRIES = 3
PAUSE = 0.5  # seconds before the next try; twice as long before the one after it
READ_TIMEOUT = 30  # seconds without a byte


def is_remote(root: str) -> bool:
    """Return whether `dataset.root` is an address rather than a folder."""
    return object_folder.is_object_storage(root) or bool(WEB.match(root))


class _WrongBytesError(Exception):
    """A fetched file is not the one in the index; the message says how it differs."""


class ShardFolder:
    """The place of the shards of a data set: a folder, or an address and a local folder of fetched shards.

    Fetched shards are named after their hash, so that data sets, runs and processes share them. They are verified once,
    after they were fetched; every file that is read from a shard is verified too. The least recently used shards are
    removed before the limit would be exceeded.

    Args:
        root: A folder, or an address `s3://`, `gs://`, `az://` or `https://`.
        cache: The local folder of fetched shards; None for one in the user's cache.
        cache_size: Its limit in GiB; None for a quarter of the free disk.

    Raises:
        UsageError: `root` is another kind of address.
    """

    def __init__(self, root: str, cache: str | None = None, cache_size: float | None = None) -> None:
        self.remote = is_remote(root)
        if not self.remote and "://" in root:
            raise UsageError(
                f"dataset.root={root} is no supported address - give a folder, s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, "
                "az://CONTAINER/FOLDER or https://HOST/FOLDER"
            )
        self.root = root.rstrip("/") if self.remote else os.path.expanduser(root)
        self.cache = Path(os.path.expanduser(cache)) if cache else cache_root() / "segdeconv" / "shards"
        self.limit = 0
        if self.remote:
            self.cache.mkdir(parents=True, exist_ok=True)
            remove_partial_files(self.cache)
            stored = sum(size for _, size, _ in self._cached())
            free = shutil.disk_usage(self.cache).free
            self.limit = int(cache_size * 2**30 if cache_size is not None else SHARE * (free + stored))
        self._prefetching: _Prefetching | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prefetching": None}

    def address(self, file: str) -> str:
        """Return what messages call a file of the folder."""
        return f"{self.root}/{file}" if self.remote else os.path.join(self.root, file)

    def head(self, file: str) -> Path:
        """Return a local copy of a file whose hash is not known: `index.json`, fetched every time."""
        if not self.remote:
            return Path(self.root, file)
        path = self.cache / f"{hashlib.sha256(self.address(file).encode()).hexdigest()[:32]}-{file}"
        with waiting_for_lock(self.cache / ".lock-index"), replacing_path(path) as partial:
            self._download(file, partial)
        return path

    def path(self, file: str, size: int, sha256: str) -> Path:
        """Return a local copy of a file, fetched and verified if it is not there.

        Raises:
            UsageError: The file cannot be fetched, or has another hash.
        """
        if not self.remote:
            return Path(self.root, file)
        path = self._place(file, sha256)
        with suppress(FileNotFoundError):
            os.utime(path)  # the least recently used shard is removed first
            return path
        if size > self.limit:
            raise UsageError(
                f"{self.address(file)} has {size} bytes, more than dataset.shard_cache_size={self.limit / 2**30:.3g} "
                "(GiB) - raise it"
            )
        with waiting_for_lock(self.cache / f".lock-{sha256[:2]}"):
            if not path.is_file():
                self._fetch(file, size, sha256, path)
        return path

    def holds(self, shard: Shard) -> bool:
        """Return whether a shard can be read without fetching it."""
        return not self.remote or self._place(shard.file, shard.sha256).is_file()

    def _place(self, file: str, sha256: str) -> Path:
        return self.cache / f"{sha256[:32]}-{file}"

    def _cached(self) -> list[tuple[int, int, Path]]:
        """Return (time of the last use, bytes, path) of each fetched shard, the least recently used first."""
        found = []
        for path in self.cache.glob("*.tar"):
            with suppress(FileNotFoundError):  # another process removed it
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        return sorted(found)

    def _make_room(self, size: int) -> None:
        """Remove the least recently used shards until there is room for a number of bytes."""
        with waiting_for_lock(self.cache / ".lock-room"):
            cached = self._cached()
            total = sum(stored for _, stored, _ in cached)
            for _, stored, old in cached:
                if total + size <= self.limit:
                    break
                old.unlink(missing_ok=True)  # a process that reads from it can do so until it closes it
                total -= stored

    def _fetch(self, file: str, size: int, sha256: str, path: Path) -> None:
        self._make_room(size)
        for tries_left in reversed(range(TRIES)):
            try:
                with replacing_path(path) as partial:
                    self._download(file, partial)
                    found = partial.stat().st_size
                    if found != size:
                        raise _WrongBytesError(f"has {found} of {size} bytes")
                    if hash_file(partial) != sha256:
                        raise _WrongBytesError("does not have the hash in the index")
                self._make_room(0)  # again, since others may have been fetched at the same time
                return
            except _WrongBytesError as error:
                if not tries_left:
                    raise UsageError(f"{self.address(file)} {error} - {WAY_OUT}") from None

    def _download(self, file: str, path: Path) -> None:
        """Copy a file to a path, with several tries; nothing is verified."""
        address = self.address(file)
        if WEB.match(address):
            fetch([address], path, way_out=WAY_OUT, timeout=READ_TIMEOUT, name=address)
            return
        program = [sys.executable, "-P", object_storage.__file__, address, str(path), str(READ_TIMEOUT)]
        for number in range(TRIES):
            # In a session of its own, so that a signal to the run does not end it: the run may still need the batch.
            done = subprocess.run(program, capture_output=True, text=True, errors="replace", start_new_session=True)
            if done.returncode == 0:
                return
            if done.returncode == object_storage.MISSING:
                raise UsageError(f"{address} needs obstore, which is not installed - pip install 'segdeconv[shards]'")
            if done.returncode == object_storage.ABSENT:
                raise UsageError(f"{address} is missing - check dataset.root, or {WAY_OUT}")
            time.sleep(PAUSE * 2**number)
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UsageError(f"{address} cannot be read after {TRIES} tries ({reason}) - {object_folder.WAY_OUT}")

    def read(self, shard: Shard, member: Member, file: str) -> bytes:
        """Return the verified bytes of a file inside a shard.

        Args:
            shard: The shard.
            member: The file.
            file: Its path in the shard, for messages.

        Raises:
            UsageError: The shard is missing, cut or changed; the message names it.
        """
        for tries_left in (1, 0):
            path = self.path(shard.file, shard.size, shard.sha256)
            try:
                with path.open("rb") as stream:
                    stream.seek(member.offset)
                    content = stream.read(member.size)
            except FileNotFoundError:
                if self.remote and tries_left:
                    continue  # another process has just removed it
                raise UsageError(f"{self.address(shard.file)} is missing - {WAY_OUT}") from None
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise UsageError(f"{self.address(shard.file)} cannot be read: {reason} - {WAY_OUT}") from None
            if hashlib.sha256(content).hexdigest() == member.sha256:
                return content
            if not self.remote:
                break
            path.unlink(missing_ok=True)  # the disk changed what was verified: fetch it again
        state = "is cut" if len(content) < member.size else "was changed"
        raise UsageError(
            f"{self.address(shard.file)} {state}: its file {file} does not have the hash in the index - {WAY_OUT}"
        )

    def prefetch(self, shards: Iterable[Shard]) -> None:
        """Fetch shards in the background, in order; errors are those of the process that reads them."""
        if not self.remote:
            return
        for shard in shards:
            if not self.holds(shard):
                if self._prefetching is None or self._prefetching.process != os.getpid():
                    self._prefetching = _Prefetching(self)
                self._prefetching.add(shard)


class _Prefetching:
    """A thread that fetches shards."""

    def __init__(self, folder: ShardFolder) -> None:
        self.folder, self.process = folder, os.getpid()
        self.waiting: queue.SimpleQueue[Shard] = queue.SimpleQueue()
        self.known: set[str] = set()
        threading.Thread(target=self._run, name="prefetch shards", daemon=True).start()

    def add(self, shard: Shard) -> None:
        if shard.file not in self.known:
            self.known.add(shard.file)
            self.waiting.put(shard)

    def _run(self) -> None:
        while True:
            shard = self.waiting.get()
            with suppress(UsageError, OSError):
                self.folder.path(shard.file, shard.size, shard.sha256)
            self.known.discard(shard.file)


class PackedFile(StoredFile):
    """The path of a file inside a shard."""

    shard: Shard
    member: Member
    file: str
    folder: ShardFolder

    @classmethod
    def of(cls, folder: ShardFolder, shard: Shard, member: Member, file: str) -> PackedFile:
        """Return the path of a file inside a shard, of its path in it."""
        shown = folder.address(shard.file)
        path = cls(shown, *file.split("/"))
        path.folder, path.shard, path.member, path.file = folder, shard, member, file
        path.address, path.size, path.stored = f"{shown}/{file}", member.size, member
        return path

    def __reduce__(self) -> Any:
        if self.address is None:
            return super().__reduce__()
        return PackedFile.of, (self.folder, self.shard, self.member, self.file)

    def fetch(self) -> bytes:
        return self.folder.read(self.shard, self.member, self.file)
