"""The folder that a command writes its outputs to: on a disk, or in an object storage."""

from __future__ import annotations

import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from segdeconv.data.files.object_folder import ObjectFolder, is_object_storage
from segdeconv.errors import UsageError
from segdeconv.system.files import cache_root, hash_text, replacing
from segdeconv.system.own_files import RECORD, OwnFiles

PROGRESS_LOG = "predictions.jsonl"
CONNECTIONS = 8
SECONDS_BETWEEN_COPIES = 60.0  # of the records; a prediction that is resumed elsewhere computes at most so much again


class OutputFolder(ABC):
    """A folder of outputs. Files are written to `path`, on a disk of this machine, and delivered when complete.

    Its text is what messages call the folder.

    Attributes:
        on_disk: Whether `path` is the folder itself, which the machines of a cluster share.
    """

    on_disk: bool

    @property
    @abstractmethod
    def path(self) -> Path:
        """The folder on a disk; without `on_disk`, another one on each machine of a cluster."""

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def shown(self, file: Path) -> str:
        """Return what messages call an output, given by its path in `path`."""

    @abstractmethod
    def exists(self, file: Path) -> bool:
        """Return whether an output, given by its path in `path`, is in the folder."""

    @abstractmethod
    def size(self, file: Path) -> int | None:
        """Return the bytes of an output, given by its path in `path`; None if it is not in the folder."""

    @abstractmethod
    def read(self, file: Path) -> bytes:
        """Return the content of an output, given by its path in `path`."""

    @abstractmethod
    def note(self, sizes: Mapping[str, int]) -> None:
        """Note the bytes of outputs that another process has delivered, by their names relative to the folder."""

    @abstractmethod
    def delivered(self, files: Iterable[Path]) -> AbstractContextManager[None]:
        """Deliver outputs, and keep them in `path` until the end of the `with` statement.

        Raises:
            UsageError: The storage does not take them.
        """

    def deliver(self, files: Iterable[Path]) -> None:
        """Deliver outputs, see `delivered`."""
        with self.delivered(files):
            pass

    @abstractmethod
    def fetch_records(self) -> None:
        """Bring the progress log and the record of own files to `path`, unless those there are a continuation."""

    @abstractmethod
    def copy_records(self, *, interval: float = 0.0) -> None:
        """Deliver the progress log and the record, and keep them in `path`; not if done within `interval` seconds."""

    @abstractmethod
    def fetch_folder(self, folder: Path) -> None:
        """Bring the outputs of a folder, given by its path in `path`, there."""

    @abstractmethod
    def remove_folder(self, folder: Path) -> None:
        """Remove a folder, given by its path in `path`, and all outputs in it."""

    @abstractmethod
    def require_separate(self, inputs: Iterable[Path], way_out: str) -> None:
        """Check that no input of an object storage lies in this folder.

        Args:
            inputs: The inputs.
            way_out: The option that chooses another folder.

        Raises:
            UsageError: An input does.
        """

    def own_files(self, way_out: str, *, trusted: bool = False, owner: str = "") -> OwnFiles:
        """Return the record of the files that segdeconv has written to the folder; see `OwnFiles`."""
        return OwnFiles(self.path, way_out, trusted=trusted, owner=owner, exists=self.exists, address=self)


class LocalFolder(OutputFolder):
    """A folder of outputs on a disk, which are delivered when they are written."""

    on_disk = True

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def path(self) -> Path:
        return self._path

    def __str__(self) -> str:
        return str(self._path)

    def shown(self, file: Path) -> str:
        return str(file)

    def exists(self, file: Path) -> bool:
        return os.path.lexists(file)

    def size(self, file: Path) -> int | None:
        return file.stat().st_size if file.exists() else None

    def read(self, file: Path) -> bytes:
        return file.read_bytes()

    def note(self, sizes: Mapping[str, int]) -> None: ...

    def delivered(self, files: Iterable[Path]) -> AbstractContextManager[None]:
        return nullcontext()

    def fetch_records(self) -> None: ...

    def copy_records(self, *, interval: float = 0.0) -> None: ...

    def fetch_folder(self, folder: Path) -> None: ...

    def remove_folder(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def require_separate(self, inputs: Iterable[Path], way_out: str) -> None: ...


class StoredFolder(OutputFolder):
    """A folder of an object storage, to which outputs are copied from a folder of the cache, where they are removed.

    The progress log and the record of own files stay in the cache and are copied too, so that a prediction can be
    resumed on another machine.

    Args:
        address: Such as `s3://BUCKET/FOLDER`.

    Raises:
        UsageError: The storage does not answer.
    """

    on_disk = False

    def __init__(self, address: str) -> None:
        self.folder = ObjectFolder(address)
        self._sizes = {name: stored.size for name, stored in self.folder.list().items()}
        self._last_copy = time.monotonic()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_sizes": {}}  # a worker that is sent this asks for none, and millions are many

    @property
    def path(self) -> Path:
        return cache_root() / "segdeconv" / "predictions" / hash_text(self.folder.address)[:32]

    def __str__(self) -> str:
        return self.folder.address

    def _name(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix()

    def shown(self, file: Path) -> str:
        return self.folder.url(self._name(file))

    def exists(self, file: Path) -> bool:
        return self.size(file) is not None

    def size(self, file: Path) -> int | None:
        return self._sizes.get(self._name(file))

    def read(self, file: Path) -> bytes:
        return self.folder.read(self._name(file))

    def note(self, sizes: Mapping[str, int]) -> None:
        self._sizes.update(sizes)

    @contextmanager
    def delivered(self, files: Iterable[Path]) -> Iterator[None]:
        files = list(files)
        self._copy(files)
        yield
        for file in files:
            file.unlink()

    def _copy(self, files: Iterable[Path]) -> None:
        sizes = {file: file.stat().st_size for file in files}
        with ThreadPoolExecutor(CONNECTIONS) as pool:  # a storage takes its time for each object, however small
            for _ in pool.map(lambda file: self.folder.write(self._name(file), file), sizes):
                pass
        self._sizes.update({self._name(file): size for file, size in sizes.items()})

    def fetch_records(self) -> None:
        for name in (PROGRESS_LOG, RECORD):
            path = self.path / name
            if name not in self._sizes:
                path.unlink(missing_ok=True)  # of a folder that was removed from the storage
                continue
            content = self.folder.read(name)
            if not (path.is_file() and path.read_bytes().startswith(content)):
                _write(path, content)

    def copy_records(self, *, interval: float = 0.0) -> None:
        if time.monotonic() - self._last_copy >= interval:
            self._copy(path for name in (PROGRESS_LOG, RECORD) if (path := self.path / name).is_file())
            self._last_copy = time.monotonic()

    def fetch_folder(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for _ in pool.map(lambda name: _write(self.path / name, self.folder.read(name)), self._names_in(folder)):
                pass

    def remove_folder(self, folder: Path) -> None:
        names = self._names_in(folder)
        self.folder.remove(names)
        for name in names:
            del self._sizes[name]
        shutil.rmtree(folder, ignore_errors=True)

    def _names_in(self, folder: Path) -> list[str]:
        return [name for name in self._sizes if name.startswith(f"{self._name(folder)}/")]

    def require_separate(self, inputs: Iterable[Path], way_out: str) -> None:
        for path in inputs:
            if str(path).startswith(f"{self}/"):
                raise UsageError(f"{way_out} {self} is a folder of the input images, such as {path} - choose another")


def output_folder(address: str) -> OutputFolder:
    """Return the folder of outputs that an option names.

    Args:
        address: A path, or an address such as `s3://BUCKET/FOLDER`.

    Raises:
        UsageError: The storage does not answer, or outputs cannot be written to such an address.
    """
    if is_object_storage(address):
        return StoredFolder(address)
    if "://" in address:
        raise UsageError(f"{address} is not an address for outputs - give a folder, or one at s3://, gs:// or az://")
    return LocalFolder(Path(address))


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)
