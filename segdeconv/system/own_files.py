"""The record of the files that segdeconv writes to an output folder, without which no existing file is written over."""

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from segdeconv.errors import UsageError
from segdeconv.system.files import create_folder

RECORD = ".segdeconv-files"
FRAME = re.compile(r"\d{6,}\.png")  # in a folder of numbered files


def foreign_files(first: object, others: int, way_out: str) -> UsageError:
    """Return the error for outputs that exist and were not written by segdeconv.

    Args:
        first: The first of them.
        others: The number of others.
        way_out: The option that chooses another place.
    """
    more = f", nor were {others} more output files" if others else ""
    return UsageError(
        f"{first} exists and was not written by segdeconv{more}; it would be overwritten - choose another {way_out}, "
        "or move it away"
    )


def recorded_names(records: Iterable[bytes]) -> set[str]:
    """Return the paths in records, given by their contents; a line that was cut off is left out."""
    names = set()
    for line in (line for content in records for line in content.splitlines()):
        try:
            name = json.loads(line)
        except ValueError:
            continue
        if isinstance(name, str):
            names.add(name)
    return names


class RecordedOutputs:
    """The files in the sub-folders of a folder that segdeconv wrote, by the records in these sub-folders.

    The record of the folder itself does not count: whoever names a folder of outputs means them.

    Args:
        read_records: Returns the contents of the records in a folder, given by its path in the folder.
        unrecorded: Names of further files that segdeconv writes beside a record.
    """

    def __init__(
        self, read_records: Callable[[PurePosixPath], Iterable[bytes]], *, unrecorded: Iterable[str] = ()
    ) -> None:
        self.read_records, self.unrecorded = read_records, frozenset(unrecorded)
        self.known: dict[PurePosixPath, list[tuple[PurePosixPath, set[str]]]] = {}

    def folder_of(self, file: PurePosixPath) -> PurePosixPath | None:
        """Return the folder whose record lists a file, both by their paths in the folder; None if there is none."""
        for folder, names in self._records(file.parent):
            inside = file.relative_to(folder)
            if inside.as_posix() in names or (FRAME.fullmatch(file.name) and f"{inside.parent}/" in names):
                return folder
        return None

    def _records(self, folder: PurePosixPath) -> list[tuple[PurePosixPath, set[str]]]:
        """Return the records in a folder and those that contain it, as the folder of each and the paths in it."""
        if not folder.parts:
            return []
        if folder not in self.known:
            above = self._records(folder.parent)
            names = recorded_names(self.read_records(folder))
            self.known[folder] = [(folder, names | self.unrecorded), *above] if names else above
        return self.known[folder]


class OwnFiles:
    """The output files of one command in a folder.

    The folder's file `.segdeconv-files` has one line for each file that a command has written there, or was about to
    write when it was stopped: its path in the folder, as a JSON string. Any other existing file belongs to the user.

    Args:
        folder: The output folder.
        way_out: The option that chooses another folder, for error messages, such as `--out`.
        trusted: Take all existing files as written by segdeconv if the folder has no record: a folder of a release
            before 0.1.
        owner: Ending of the name of the record, where several processes write to the folder, also from machines on
            whose shared disk they cannot append to one file.
        exists: Returns whether an output file exists.
        address: What messages call the folder, if it is the local one of an object storage.
    """

    def __init__(
        self,
        folder: Path,
        way_out: str,
        *,
        trusted: bool = False,
        owner: str = "",
        exists: Callable[[Path], bool] = os.path.lexists,
        address: object = None,
    ) -> None:
        self.folder, self.way_out, self.exists = folder, way_out, exists
        self.address = address or folder
        self.record_path = folder / f"{RECORD}{owner}"
        recorded = self._read()
        self.trusted = trusted and recorded is None
        self.recorded = recorded or set()
        self.added: dict[str, None] = {}

    def _read(self) -> set[str] | None:
        """Return the paths in all records, or None without a record."""
        records = sorted(self.folder.glob(f"{RECORD}*")) if self.folder.is_dir() else []
        return recorded_names(path.read_bytes() for path in records) if records else None

    def add(self, files: Iterable[Path], *, frame_folders: Iterable[Path] = (), inputs: Iterable[Path] = ()) -> None:
        """Check that none of the output files exists, unless it is recorded, and remember them for `record`.

        Args:
            files: The output files, below the folder.
            frame_folders: Folders of numbered output files, 000001.png and so on.
            inputs: Files that must not be written over even if they are recorded.

        Raises:
            UsageError: An output file is an input, or exists and was not written by segdeconv.
        """
        real_inputs = {os.path.realpath(path) for path in inputs}
        foreign: list[Path] = []
        for path in files:
            if real_inputs and os.path.realpath(path) in real_inputs:
                raise UsageError(f"{path} is an input, which would be overwritten - choose another {self.way_out}")
            if not self._remember(path, "") and self.exists(path):
                foreign.append(path)
        for folder in frame_folders:
            if not self._remember(folder, "/") and folder.is_dir():
                foreign += sorted(path for path in folder.iterdir() if FRAME.fullmatch(path.name))
        if foreign and not self.trusted:
            first = f"{self.address}/{foreign[0].relative_to(self.folder).as_posix()}"
            raise foreign_files(first, len(foreign) - 1, self.way_out)

    def _remember(self, path: Path, ending: str) -> bool:
        """Return whether a path is recorded; otherwise it is going to be."""
        name = path.relative_to(self.folder).as_posix() + ending
        if name in self.recorded:
            return True
        self.added[name] = None
        return False

    def record(self) -> None:
        """Append the added files to the record and sync it, before the first of them is written."""
        if not self.added:
            return
        create_folder(self.folder, self.way_out)
        with self.record_path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the last line was cut off
                    file.write(b"\n")
            file.write(b"".join(json.dumps(name).encode() + b"\n" for name in self.added))
            file.flush()
            os.fsync(file.fileno())
        self.recorded |= set(self.added)
        self.added = {}
