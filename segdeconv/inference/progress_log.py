"""predictions.jsonl: what a folder of predictions holds, so that one that was interrupted goes on where it was.

Its first line says what the predictions were made by, each further one what was written for an image, when all of it
was. Lines are only ever added; what a cut left of the last one is taken away when the folder is opened again. The
tables for reading are made from it in the end.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from segdeconv.errors import UsageError
from segdeconv.system.files import PARTIAL, lock_folder

NAME = "predictions.jsonl"


class ProgressLog:
    """The progress_log of a folder, for this process alone until `close`.

    made_by: plain data that decides what is written: checkpoint and settings.
    overwrite: begin anew where the folder holds predictions, of whatever origin.
    Raises UsageError for a folder whose predictions were made by something else, or that another process writes to.
    """

    def __init__(self, out: Path, made_by: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.out, self.entries = out, {}  # type: Path, dict[str, dict[str, Any]]
        self.lock = lock_folder(out, "--out")
        self.file = (out / NAME).open("r+b") if (out / NAME).exists() else (out / NAME).open("x+b")
        for left in out.rglob(f"{PARTIAL}*"):  # of a writer that was killed, for we are alone here
            left.unlink(missing_ok=True)
        first, whole = self._read()
        same = first == _plain(made_by)
        if overwrite or not (same or self.entries):
            self.entries, whole = {}, 0
        elif not same:
            self.close()
            raise UsageError(
                f"{out} holds predictions {_difference(first or {}, _plain(made_by))} - choose another --out, or say "
                "--overwrite"
            )
        self.file.truncate(whole)
        self.file.seek(whole)
        if not whole:
            self._add(made_by)

    def _read(self) -> tuple[dict[str, Any] | None, int]:
        """(the first line, bytes up to the end of the last whole line)."""
        first, whole = None, 0
        for line in self.file:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(entry, dict):
                break
            whole += len(line)
            if first is None:
                first = entry
            elif isinstance(entry.get("name"), str):
                self.entries[entry["name"]] = entry
        return first, whole

    def has(self, name: str, source: Path) -> bool:
        """Whether all outputs of an image are there, whole, and the image is still the one that they were made of."""
        entry = self.entries.get(name)
        if entry is None or entry["source"] != stamp(source):
            return False
        try:
            return all((self.out / file).stat().st_size == size for file, size in entry["files"].items())
        except OSError:
            return False

    def add(self, name: str, source: Path, files: list[Path], **facts: Any) -> None:
        """An image whose outputs are all there."""
        sizes = {os.path.relpath(file, self.out): file.stat().st_size for file in files}
        entry = {"name": name, "source": stamp(source), "files": sizes, **facts}
        self._add(entry)
        self.entries[name] = _plain(entry)

    def _add(self, entry: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(entry).encode() + b"\n")
        self.file.flush()

    def sorted(self) -> Iterator[dict[str, Any]]:
        """Every image in the folder, by name."""
        return (self.entries[name] for name in sorted(self.entries))

    def close(self) -> None:
        """Let others have the folder."""
        self.file.close()
        if self.lock is not None:
            if os.name != "nt":  # where the lock's file goes with its release
                Path(self.lock.lock_file).unlink(missing_ok=True)  # while it is held, so that it is nobody else's yet
            self.lock.release()


def stamp(path: Path) -> dict[str, Any]:
    """What tells a file from another, or from itself after a change, without reading it."""
    state = path.stat()
    return {"path": str(path.resolve()), "bytes": state.st_size, "changed": state.st_mtime_ns}


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(data))


def _difference(first: dict[str, Any], now: dict[str, Any]) -> str:
    if first.get("checkpoint") != now.get("checkpoint"):
        return "of another checkpoint"
    keys = [key for key in now if first.get(key) != now[key]]
    keys += [key for key in first if key not in now]
    return f"made with {keys[0]}={first.get(keys[0])}, not {now.get(keys[0])}" if keys else "of another version"
