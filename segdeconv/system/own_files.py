"""The record of the files that segdeconv writes to an output folder, without which no existing file is written over."""

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from segdeconv.errors import UsageError
from segdeconv.system.files import create_folder

RECORD = ".segdeconv-files"
FRAME = re.compile(r"\d{6,}\.png")  # in a folder of numbered files


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
        """Return the paths in all records, or None without a record; a line that was cut off is left out."""
        records = sorted(self.folder.glob(f"{RECORD}*")) if self.folder.is_dir() else []
        if not records:
            return None
        lines = [line for path in records for line in path.read_bytes().splitlines()]
        names = set()
        for line in lines:
            try:
                name = json.loads(line)
            except ValueError:
                continue
            if isinstance(name, str):
                names.add(name)
        return names

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
            others = f", nor were {len(foreign) - 1} more output files" if len(foreign) > 1 else ""
            raise UsageError(
                f"{first} exists and was not written by segdeconv{others}; it would be overwritten - choose another "
                f"{self.way_out}, or move it away"
            )

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
