"""Folders of an object storage: listed, read and written by obstore, with the credentials of the environment."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from segdeconv.data.files.object_storage import client_options, described
from segdeconv.data.files.stored_file import StoredFile
from segdeconv.errors import UsageError

SCHEMES = re.compile(r"(s3|gs|az)://[^/]+(/|$)")
TIMEOUT = 30  # seconds without a byte
RETRIES = 3
WAY_OUT = (
    "check the address, the network and the credentials in the environment (AWS_ACCESS_KEY_ID, "
    "GOOGLE_APPLICATION_CREDENTIALS, ...)"
)


def is_object_storage(address: str) -> bool:
    """Return whether a text is an address s3://, gs:// or az://."""
    return bool(SCHEMES.match(address))


class StoredObject(NamedTuple):
    """An object as a listing has it: its bytes, and the time of its last change in nanoseconds since 1970."""

    size: int
    changed: int


class ObjectFolder:
    """A folder of an object storage.

    Args:
        address: Such as `s3://BUCKET/FOLDER`, `gs://BUCKET/FOLDER` or `az://CONTAINER/FOLDER`.

    Raises:
        UsageError: obstore is not installed, or the address is not one of a storage.
    """

    def __init__(self, address: str) -> None:
        if importlib.util.find_spec("obstore") is None:
            raise UsageError(f"{address} needs obstore, which is not installed - pip install 'segdeconv[shards]'")
        self.address = address.rstrip("/")
        self._opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def _store(self) -> Any:
        if self._opened is None:
            from obstore.store import from_url

            retries: Any = {"max_retries": RETRIES}
            self._opened = from_url(self.address, client_options=client_options(TIMEOUT), retry_config=retries)
        return self._opened

    def url(self, name: str) -> str:
        """Return what messages call an object of the folder."""
        return f"{self.address}/{name}"

    def list(self, *, below: bool = True) -> dict[str, StoredObject]:
        """Return the objects by their names relative to the folder, in order.

        Args:
            below: Whether those of sub-folders are among them.

        Raises:
            UsageError: The storage does not answer.
        """
        import obstore

        found = {}
        with self._explained(self.address, "cannot be listed"):
            if below:
                entries = [entry for chunk in obstore.list(self._store, chunk_size=1000) for entry in chunk]
            else:
                entries = list(obstore.list_with_delimiter(self._store)["objects"])
            for entry in entries:
                changed = round(entry["last_modified"].timestamp() * 1e9)
                found[entry["path"]] = StoredObject(entry["size"], changed)
        return dict(sorted(found.items()))

    def file(self, name: str, stored: StoredObject) -> ObjectFile:
        """Return the path of an object of the listing."""
        return ObjectFile.of(self, name, stored)

    def read(self, name: str) -> bytes:
        """Return the content of an object.

        Raises:
            UsageError: It cannot be read.
        """
        import obstore

        with self._explained(self.url(name), "cannot be read"):
            return bytes(obstore.get(self._store, name).bytes())

    def write(self, name: str, path: Path) -> None:
        """Copy a file to an object, which becomes visible when it is complete.

        Raises:
            UsageError: It cannot be written.
        """
        import obstore

        with self._explained(self.url(name), "cannot be written"):
            obstore.put(self._store, name, path)

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects, those that do not exist too.

        Raises:
            UsageError: They cannot be removed.
        """
        import obstore

        if names:
            with self._explained(self.address, "has objects that cannot be removed"):
                obstore.delete(self._store, names)

    @contextmanager
    def _explained(self, shown: str, what: str) -> Iterator[None]:
        from obstore.exceptions import NotFoundError

        try:
            yield
        except (NotFoundError, FileNotFoundError):
            raise UsageError(f"{shown} is missing - check the address") from None
        except Exception as error:  # obstore has an exception for each service and cause, with texts of many lines
            raise UsageError(f"{shown} {what} ({described(error)}) - {WAY_OUT}") from error


class ObjectFile(StoredFile):
    """The path of an object of an object storage."""

    folder: ObjectFolder
    object_name: str

    @classmethod
    def of(cls, folder: ObjectFolder, name: str, stored: StoredObject) -> ObjectFile:
        """Return the path of an object, of its name relative to the folder."""
        path = cls(folder.url(name))
        path.folder, path.object_name, path.stored = folder, name, stored
        path.address, path.size, path.changed = folder.url(name), *stored
        return path

    def __reduce__(self) -> Any:
        if self.address is None:
            return super().__reduce__()
        return ObjectFile.of, (self.folder, self.object_name, StoredObject(self.size, self.changed))

    def fetch(self) -> bytes:
        content = self.folder.read(self.object_name)
        if len(content) != self.size:
            raise UsageError(f"{self} has {len(content)} bytes, not {self.size} as when it was listed - try again")
        return content
