"""A folder of predictions in an object storage."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from segdeconv.data.files.object_folder import ObjectFolder
from segdeconv.errors import UsageError
from segdeconv.inference.progress_log import NAME
from segdeconv.system.files import cache_root, hash_text, replacing
from segdeconv.system.own_files import RECORD

SECONDS_BETWEEN_LOGS = 60.0  # a prediction that is resumed elsewhere computes at most so much again


class OutputStore:
    """A folder of an object storage, to which outputs are copied from a local folder, where they are then removed.

    Only the progress log and the record of own files stay in the local folder. They are copied to the storage too, so
    that a prediction can be resumed on another machine.

    Args:
        address: Such as `s3://BUCKET/FOLDER`.

    Attributes:
        sizes: The bytes of each object by its name relative to the folder; those that other processes copy are added.

    Raises:
        UsageError: The storage does not answer.
    """

    def __init__(self, address: str) -> None:
        self.folder = ObjectFolder(address)
        self.sizes = {name: stored.size for name, stored in self.folder.list().items()}
        self._last_log = time.monotonic()

    def __str__(self) -> str:
        return self.folder.address

    @property
    def local(self) -> Path:
        """The local folder, which may be another on each machine of a cluster."""
        return cache_root() / "segdeconv" / "predictions" / hash_text(self.folder.address)[:32]

    def fetch_log(self) -> None:
        """Copy the progress log and the record to the local folder, unless the ones there are a continuation."""
        self.local.mkdir(parents=True, exist_ok=True)
        for name in (NAME, RECORD):
            path = self.local / name
            if name not in self.sizes:
                path.unlink(missing_ok=True)  # of a folder that was removed from the storage
                continue
            content = self.folder.read(name)
            if not (path.is_file() and path.read_bytes().startswith(content)):
                with replacing(path) as file:
                    file.write(content)

    def require_separate(self, inputs: Iterable[Path]) -> None:
        """Check that no input lies in this folder.

        Raises:
            UsageError: An input does.
        """
        for path in inputs:
            if str(path).startswith(f"{self}/"):
                raise UsageError(f"--out {self} is a folder of the input images, such as {path} - choose another")

    def exists(self, path: Path) -> bool:
        """Return whether an output file, given by its path in the local folder, is in the storage."""
        return path.relative_to(self.local).as_posix() in self.sizes

    def copy(self, files: Iterable[Path]) -> None:
        """Copy files from the local folder to the storage.

        Raises:
            UsageError: The storage does not take them.
        """
        for path in files:
            name = path.relative_to(self.local).as_posix()
            self.folder.write(name, path)
            self.sizes[name] = path.stat().st_size

    def move(self, files: Iterable[Path]) -> None:
        """Copy files to the storage, and remove them from the local folder; see `copy`."""
        for path in files:
            self.copy([path])
            path.unlink()

    def copy_log(self) -> None:
        """Copy the progress log and the record, where they exist."""
        self.copy(path for name in (NAME, RECORD) if (path := self.local / name).is_file())
        self._last_log = time.monotonic()

    def copy_log_at_times(self) -> None:
        """Copy the progress log and the record if it has not been done for a minute."""
        if time.monotonic() - self._last_log > SECONDS_BETWEEN_LOGS:
            self.copy_log()
