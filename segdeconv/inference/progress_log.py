"""The progress log predictions.jsonl of a folder of predictions, with which an interrupted batch prediction resumes.

The first line records the checkpoint and settings. Each further line records the outputs of one image and is appended
once all of them are complete. A last line that was cut off is removed when the folder is opened again. The tables
statistics.csv, statistics.parquet and regions.json are built from the log.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

from segdeconv.errors import DiskError, UsageError
from segdeconv.inference.inputs import with_suffix
from segdeconv.inference.output_folder import PROGRESS_LOG, OutputFolder
from segdeconv.system.files import lock_folder, remove_partial_files, unlock_folder
from segdeconv.system.plain_data import Limits, parse_json, require_mapping

START = b'{"checkpoint": '  # of every progress log
INPUTS = "inputs"  # the key of the images of which a part was predicted
LINE_LIMITS = Limits(size=1 << 20)


class _Source(BaseModel):
    """See `stamp`."""

    model_config = ConfigDict(strict=True)

    path: str
    bytes: int
    changed: int


class _Entry(BaseModel):
    """The line of an image, see `ProgressLog.add`."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    source: _Source
    files: dict[str, Annotated[int, Field(ge=0)]]
    pixels: dict[str, Annotated[int, Field(ge=0)]]
    size: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]
    file: str | None = None  # the path as the user gave it; earlier versions did not record it
    pixel_area: Annotated[float, Field(ge=0)] | None = None  # square metres

    @field_validator("files")
    @classmethod
    def _require_inside(cls, files: dict[str, int]) -> dict[str, int]:
        for name in files:
            if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
                raise ValueError(f"{name!r} is not in the folder")
        return files


_ENTRY = TypeAdapter(_Entry)


class OutputLog(Protocol):
    """What a batch prediction needs of the log of its outputs: that of `ProgressLog`, or `EntriesOfWorker`."""

    def has(self, name: str, source: Path, *, includes: Path | None = None) -> bool:
        """See `ProgressLog.has`."""
        ...

    def add(self, name: str, source: Path, files: list[Path], **metadata: Any) -> None:
        """See `ProgressLog.add`."""
        ...

    def require_folder(self) -> None:
        """See `ProgressLog.require_folder`."""
        ...


class ProgressLog:
    """The progress log of a folder, locked for this process until `close`.

    Args:
        out: The folder of predictions.
        provenance: JSON data that determines the outputs: checkpoint and settings.
        overwrite: Discard the predictions in the folder and start again.
        folder: The folder of the log and its lock; None for that of `out`. Several processes that each predict a part
            of the images into one folder have their own.

    Raises:
        UsageError: The predictions in the folder were made by another checkpoint or with other settings, or another
            process is writing to the folder.
    """

    def __init__(
        self,
        out: OutputFolder,
        provenance: Mapping[str, Any],
        *,
        overwrite: bool = False,
        folder: Path | None = None,
    ) -> None:
        self.out, self.entries = out, {}  # type: OutputFolder, dict[str, dict[str, Any]]
        self.path = (folder or out.path) / PROGRESS_LOG
        self.lock = lock_folder(self.path.parent, "--out")
        self.file = self.path.open("r+b") if self.path.exists() else self.path.open("x+b")
        if folder is None:  # or else other processes, also of other machines, may be writing to `out`
            self.remove_partial_files()
        first, length = self._read()
        same = first == _as_json(provenance)
        if overwrite or not (same or self.entries):
            self.entries, length = {}, 0
        elif not same:
            self.close()
            raise UsageError(
                f"{out} contains predictions {difference(first or {}, _as_json(provenance))} - choose another --out, "
                "or add --overwrite"
            )
        self.file.truncate(length)
        self.file.seek(length)
        if not length:
            self._add(provenance)

    def remove_partial_files(self) -> None:
        """Remove the files that killed processes were writing to in the folder."""
        # A sub-folder with a progress log belongs to another batch prediction, which may be running.
        remove_partial_files(self.out.path, belongs_elsewhere=lambda folder: (folder / PROGRESS_LOG).exists())

    def _read(self) -> tuple[dict[str, Any] | None, int]:
        """Read the log; return its first line and the number of bytes up to the end of the last complete line."""
        first, length = None, 0
        while (line := self.file.readline(LINE_LIMITS.size + 1)).endswith(b"\n"):
            try:
                entry = dict(require_mapping(parse_json(line, LINE_LIMITS)))
                if first is not None:
                    _ENTRY.validate_python(entry)
            except ValueError:  # not a line that `add` writes: it and those after it are written again
                break
            length += len(line)
            if first is None:
                first = entry
            else:
                self.entries[entry["name"]] = entry
        return first, length

    def has(self, name: str, source: Path, *, includes: Path | None = None) -> bool:
        """Return True if all outputs of an image exist with their recorded sizes and the image has not changed.

        Args:
            name: Name of the outputs.
            source: Path of the image.
            includes: A file that must be one of the outputs.
        """
        entry = self.entries.get(name)
        try:
            if entry is None or entry["source"] != stamp(source):
                return False
            if includes is not None and os.path.relpath(includes, self.out.path) not in entry["files"]:
                return False
            return self.missing(entry) is None
        except OSError:
            return False

    def missing(self, entry: Mapping[str, Any]) -> Path | None:
        """Return the first output file of an entry that is missing or has another size; None if all are complete."""
        for file, size in entry["files"].items():
            path = self.out.path / file
            if self.out.size(path) != size:
                return path
        return None

    def require_names(self, images: Mapping[str, Path]) -> None:
        """Check that no image is in the log under its other name, with or without the suffix of its file.

        The name of an image's outputs changes when an image that differs only in the suffix is added or removed.

        Args:
            images: The path of each image by the name of its outputs.

        Raises:
            UsageError: An image is; its outputs would be in the folder twice.
        """
        renamed = []
        for name, path in images.items():
            other = name.removesuffix(path.suffix) if name.endswith(path.suffix) else with_suffix(name, path)
            entry = self.entries.get(other)
            if entry is not None and entry["source"]["path"] == str(path.resolve()) and images.get(other) != path:
                renamed.append((path, other, name))
        if renamed:
            path, other, name = renamed[0]
            others = f" (and {len(renamed) - 1} more)" if renamed[1:] else ""
            raise UsageError(
                f"{self.out} has the mask of {path} as {other}.png, which is now called {name}.png{others}, since a "
                "file with the same name and another suffix was added or removed - undo that, choose another --out, or "
                "add --overwrite"
            )

    def add(self, name: str, source: Path, files: list[Path], **metadata: Any) -> None:
        """Record an image whose outputs are all complete.

        Args:
            name: Name of the outputs.
            source: Path of the image.
            files: The output files.
            **metadata: Further entries of the line, such as `pixels`.
        """
        self.append(_as_json(entry_of(self.out.path, name, source, files, **metadata)))

    def append(self, entry: dict[str, Any]) -> None:
        """Record an image by its entry, which `entry_of` returned here or in another process."""
        self._add(entry)
        self.entries[entry["name"]] = entry
        self.out.note(entry["files"])

    def require_folder(self) -> None:
        """Check that the folder still has this log; recreating a folder that was removed would hide the loss.

        Raises:
            DiskError: The folder or the log was removed or replaced.
        """
        try:
            if os.path.samestat(os.fstat(self.file.fileno()), self.path.stat()):
                return
        except OSError:
            pass
        raise DiskError(_removed(self.out.path))

    def _add(self, entry: Mapping[str, Any]) -> None:
        self.require_folder()
        self.file.write(json.dumps(entry).encode() + b"\n")
        self.file.flush()

    def sorted(self) -> Iterator[dict[str, Any]]:
        """Iterate over the entries of all images in the folder, ordered by name."""
        return (self.entries[name] for name in sorted(self.entries))

    def close(self) -> None:
        """Close the file and unlock the folder."""
        self.file.close()
        unlock_folder(self.lock)


class EntriesOfWorker:
    """The entries of the images that a worker has predicted, for the one process that writes the progress log.

    Args:
        out: The folder of predictions.
        path: The progress log; None if this machine does not have it.
    """

    def __init__(self, out: OutputFolder, path: Path | None) -> None:
        self.out, self.path = out, path
        self.entries: list[dict[str, Any]] = []

    def has(self, name: str, source: Path, *, includes: Path | None = None) -> bool:
        """Return False: a worker is given only images that the progress log lacks."""
        return False

    def add(self, name: str, source: Path, files: list[Path], **metadata: Any) -> None:
        """Remember an image whose outputs are all complete; see `ProgressLog.add`."""
        self.entries.append(_as_json(entry_of(self.out.path, name, source, files, **metadata)))

    def require_folder(self) -> None:
        """Check that the folder still has the progress log.

        Raises:
            DiskError: The folder or the log was removed.
        """
        if self.path is not None and not self.path.exists():
            raise DiskError(_removed(self.out.path))


def entry_of(out: Path, name: str, source: Path, files: list[Path], **metadata: Any) -> dict[str, Any]:
    """Return the line of an image in the progress log; see `ProgressLog.add`."""
    sizes = {os.path.relpath(file, out): file.stat().st_size for file in files}
    return {"name": name, "source": stamp(source), "files": sizes, **metadata}


def read_provenance(path: Path) -> dict[str, Any]:
    """Return the first line of a progress log.

    Raises:
        UsageError: The file is not a progress log.
    """
    with path.open("rb") as file:
        line = file.readline(LINE_LIMITS.size + 1)
    try:
        return dict(require_mapping(parse_json(line, LINE_LIMITS)))
    except ValueError as error:
        raise UsageError(f"{path} is not a progress log of segdeconv - predict its part again") from error


def has_progress_log(out: Path) -> bool:
    """Return whether a folder has a progress log.

    Raises:
        UsageError: Its file predictions.jsonl is a file of another program.
    """
    try:
        with (out / PROGRESS_LOG).open("rb") as file:
            start = file.read(len(START))
    except (FileNotFoundError, NotADirectoryError):
        return False
    if start != START[: len(start)]:
        raise UsageError(f"{out / PROGRESS_LOG} was not written by segdeconv - choose another --out, or move it away")
    return True


def stamp(path: Path) -> dict[str, Any]:
    """Return path, size and modification time of a file, by which a changed or different file is detected."""
    state = path.stat()
    return {"path": str(path.resolve()), "bytes": state.st_size, "changed": state.st_mtime_ns}


def _removed(out: Path) -> str:
    return f"{out} was removed during the run - restore the folder, or run the same command again"


def _as_json(data: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(data))


def difference(first: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in which way predictions of one provenance differ from those of another, such as `of other images`."""
    if first.get("checkpoint") != now.get("checkpoint"):
        return "of a different checkpoint"
    keys = [key for key in now if first.get(key) != now[key]]
    keys += [key for key in first if key not in now]
    if not keys:
        return "of a different version"
    if keys[0] == INPUTS:
        return "of other images"
    before, after = (settings.get(keys[0], "the default") for settings in (first, now))
    return f"made with {keys[0]}={before}, not {after}"
