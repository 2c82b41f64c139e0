"""What a labelling session keeps on the disk: a data set that `dataset=folder` reads, and the log of every stroke.

    DIR/images/NAME.jpg          each photo that has a stroke, a hard link where the file system allows one
    DIR/masks/NAME.png           its mask: labels, and 255 where nobody painted
    DIR/classes.yaml             names and labels
    DIR/session/session.json     the classes with their colours
    DIR/session/strokes/         NAME.jsonl: a line for each thing that a person did to this photo, synced at once
    DIR/session/accepted/        the masks that a person accepted, which nothing writes over
    DIR/session/network/         the network, which every command reads

The log is the truth: the mask is drawn from it, and drawn again at the start where a killed process left an older one.
"""

import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image

from segdeconv.data.files.reading import MAX_PIXELS, image_size, read_upright
from segdeconv.data.preprocessing import Size, resize_mask
from segdeconv.drawing.draw import save_image
from segdeconv.drawing.png import Png
from segdeconv.errors import UsageError, warn
from segdeconv.inference.inputs import output_path
from segdeconv.serving.label.classes import LabelClasses
from segdeconv.serving.label.strokes import IGNORE, Stroke, checked_stroke, draw_stroke
from segdeconv.system.files import lock_folder, remove_partial_files, replace_text, replacing
from segdeconv.system.plain_data import PlainDataError, parse_json, read_json, require_mapping

FORMAT = 1
WAY_OUT = "--out"

Status = Literal["none", "strokes", "accepted"]


class PhotoLog(NamedTuple):
    """What a person did to a photo and has not undone.

    Attributes:
        entries: Strokes, and entries whose tool is `accept` (with `file`) or `reopen`, in order.
        status: `accepted` if a mask was accepted and not reopened since; else `strokes` if there is any, or `none`.
    """

    entries: tuple[Stroke, ...] = ()
    status: Status = "none"


class Storage:
    """The folder of a session; every method may be called from any thread.

    Args:
        folder: The folder DIR, created and locked until `close`.
        photos: The file of each photo by its name, as `find_images` returns them.

    Raises:
        UsageError: The folder is in use, belongs to something else, or holds a damaged session.
    """

    def __init__(self, folder: Path, photos: Mapping[str, Path]) -> None:
        self.folder, self.photos = folder, dict(photos)
        self.session = folder / "session"
        state = self.session / "session.json"
        if not state.is_file() and folder.is_dir():
            occupied = [name for name in ("images", "masks", "classes.yaml", "session") if (folder / name).exists()]
            if occupied:
                raise UsageError(
                    f"{folder / occupied[0]} was not written by label, which would change it - choose another {WAY_OUT}"
                )
        self.lock = lock_folder(folder, WAY_OUT)
        self.guard = threading.RLock()
        remove_partial_files(folder, belongs_elsewhere=lambda _: False)
        self.classes = LabelClasses(self._read_state(state) if state.is_file() else [])
        self.logs: dict[str, PhotoLog] = {}
        self.sizes: dict[str, Size] = {}
        self.labels_of: dict[str, set[int]] = {}  # of accepted masks, by file
        self.save_classes()
        self._resume()

    def close(self) -> None:
        """Release the lock."""
        if self.lock is not None:
            self.lock.release()

    def log(self, name: str) -> PhotoLog:
        """Return what a person did to a photo."""
        return self.logs.get(name, PhotoLog())

    def size(self, name: str) -> Size:
        """Return (H, W) of a photo, upright.

        Raises:
            UsageError: Its header cannot be read.
        """
        if name not in self.sizes:
            self.sizes[name] = image_size(self.photos[name], exif="apply", max_pixels=MAX_PIXELS)
        return self.sizes[name]

    def mask(self, name: str, size: Size | None = None) -> np.ndarray:
        """Draw the mask of a photo.

        Args:
            name: The photo.
            size: (h, w) of the mask; None for the size of the photo.

        Returns:
            (h, w) uint8 labels, and 255 where nobody painted.
        """
        photo = self.size(name)
        mask = np.full(size or photo, IGNORE, dtype=np.uint8)
        for entry in self.log(name).entries:
            if entry["tool"] == "accept":
                mask[:] = resize_mask(self._read_accepted(entry["file"]), (mask.shape[0], mask.shape[1]))
            elif entry["tool"] == "reopen":
                mask = self._without_accepted(name, entry, mask)
            else:
                draw_stroke(mask, entry, photo)
        return mask

    def _without_accepted(self, name: str, reopen: Stroke, mask: np.ndarray) -> np.ndarray:
        """Draw the strokes alone, up to a `reopen`."""
        mask = np.full(mask.shape, IGNORE, dtype=np.uint8)
        for entry in self.log(name).entries:
            if entry is reopen:
                break
            if entry["tool"] not in ("accept", "reopen"):
                draw_stroke(mask, entry, self.size(name))
        return mask

    def add_stroke(self, name: str, stroke: Stroke) -> None:
        """Append a stroke to the log of a photo and update its mask."""
        with self.guard:
            self.size(name)  # of a photo that cannot be read, nothing is written
            self._append(name, stroke)

    def undo(self, name: str) -> None:
        """Undo the last thing that was done to a photo, also that its mask was accepted.

        Raises:
            UsageError: Nothing is left to undo.
        """
        with self.guard:
            if not self.log(name).entries:
                raise UsageError("nothing is left to undo")
            self._append(name, {"tool": "undo"})

    def accept(self, name: str, mask: np.ndarray) -> None:
        """Accept a proposal as the mask of a photo; pixels that a person painted keep their label.

        Args:
            name: The photo.
            mask: (H, W) uint8 labels.

        Raises:
            UsageError: A mask is accepted already.
        """
        with self.guard:
            if self.log(name).status == "accepted":
                raise UsageError(f"the mask of {name} is accepted already - reopen it first")
            painted = self.mask(name)
            files = (self._accepted_path(f"{name}.{number}") for number in itertools.count())
            file = next(file for file in files if not file.exists())
            np.copyto(painted, mask, where=painted == IGNORE)
            self._write_mask(file, painted)
            relative = file.relative_to(self.session / "accepted").as_posix()
            self._append(name, {"tool": "accept", "file": relative, "labels": _labels_in(painted)}, mask=file)

    def reopen(self, name: str) -> None:
        """Go back from an accepted mask to the strokes; the accepted mask stays in session/accepted.

        Raises:
            UsageError: No mask is accepted.
        """
        with self.guard:
            if self.log(name).status != "accepted":
                raise UsageError(f"the mask of {name} is not accepted, so it is open")
            self._append(name, {"tool": "reopen"})

    def used_labels(self) -> set[int]:
        """Return the labels that any stroke or accepted mask of the session has."""
        used: set[int] = set()
        with self.guard:
            for log in self.logs.values():
                for entry in log.entries:
                    if entry["tool"] == "accept":
                        used |= self._accepted_labels(entry)
                    elif entry.get("class") is not None:
                        used.add(entry["class"])
        return used - {IGNORE}

    def _accepted_labels(self, accept: Stroke) -> set[int]:
        file, labels = accept["file"], accept.get("labels")
        if isinstance(labels, list):
            return {label for label in labels if isinstance(label, int)}
        if file not in self.labels_of:  # an entry of a version that did not store them
            self.labels_of[file] = set(_labels_in(self._read_accepted(file)))
        return self.labels_of[file]

    def change_classes(self, change: Callable[[LabelClasses], object]) -> None:
        """Change the classes, and write them."""
        with self.guard:
            change(self.classes)
            self.save_classes()

    def save_classes(self) -> None:
        """Write session.json, and classes.yaml once there are two classes."""
        state = {"format": FORMAT, "classes": self.classes.to_list()}
        replace_text(self.session / "session.json", json.dumps(state, indent=1) + "\n")
        table, text = self.folder / "classes.yaml", self.classes.table()
        if text is None:
            table.unlink(missing_ok=True)
        elif not table.is_file() or table.read_text(encoding="utf-8") != text:
            replace_text(table, text)

    # The log

    def _append(self, name: str, entry: Stroke, *, mask: Path | None = None) -> None:
        path = self._log_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the process was killed between the line and its end
                    file.write(b"\n")
            file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.logs[name] = _with(self.log(name), entry)
        if mask is None:
            self._update_files(name)
            return
        with replacing(self._mask_path(name)) as copy, mask.open("rb") as original:
            shutil.copyfileobj(original, copy)
        if self._image_path(name) is None:
            self._write_image(name)

    def _resume(self) -> None:
        """Read the logs, and draw the masks again that are older than their log."""
        missing = 0
        for path in sorted((self.session / "strokes").rglob("*.jsonl")):
            name = self._name_of(path)
            if name is None:
                missing += 1
                continue
            self.logs[name] = self._read_log(path)
            mask = self._mask_path(name)
            up_to_date = mask.is_file() and mask.stat().st_mtime_ns >= path.stat().st_mtime_ns
            if not up_to_date or self._image_path(name) is None:
                self._update_files(name)
        if missing:
            warn(f"{missing} photo(s) with strokes are no longer among the photos; their images and masks are kept")

    def _read_log(self, path: Path) -> PhotoLog:
        log = PhotoLog()
        lines = path.read_bytes().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                entry = parse_json(line)
                known = isinstance(entry, dict) and entry.get("tool") in ("accept", "reopen", "undo")
                # Of any class: a stroke that was undone may have one that was removed afterwards.
                log = _with(log, entry if known else checked_stroke(entry, range(IGNORE)))
            except (PlainDataError, UsageError) as error:
                if number < len(lines):
                    warn(f"{path}, line {number}: left out, since it is no stroke ({error})")
                else:  # it was cut off, when nobody had been told yet that the stroke was stored
                    os.truncate(path, len(b"".join(line + b"\n" for line in lines[:-1])))
        valid = {None, *self.classes.labels}
        for entry in log.entries:
            if entry.get("class") not in valid:
                warn(f"{path}: a stroke is left out, since session.json has no class {entry['class']}")
        return _of_entries(tuple(entry for entry in log.entries if entry.get("class") in valid))

    def _name_of(self, path: Path) -> str | None:
        first = path.with_suffix("").relative_to(self.session / "strokes").as_posix()
        if first in self.photos:
            return first
        return next((name for name in self.photos if self._log_path(name) == path), None)  # a name that was too long

    # Files

    def _update_files(self, name: str) -> None:
        """Write image and mask of a photo, or remove them if it has no stroke."""
        path, image = self._mask_path(name), self._image_path(name)
        mask = self.mask(name)
        if (mask == IGNORE).all():
            if image is not None:  # first, since every image needs a mask
                image.unlink()
            path.unlink(missing_ok=True)
            return
        self._write_mask(path, mask)
        if image is None:
            self._write_image(name)

    def _write_image(self, name: str) -> None:
        """Put a photo into images/: a hard link or copy, or a PNG if EXIF turns it, which `dataset=folder` refuses."""
        source = Path(os.path.realpath(self.photos[name]))
        with suppress(UsageError):
            image_size(source, exif="refuse", max_pixels=MAX_PIXELS)
            target = output_path(self.folder / "images", name, source.suffix)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:
                with replacing(target) as file, source.open("rb") as original:
                    shutil.copyfileobj(original, file)
            return
        image = read_upright(source, max_pixels=MAX_PIXELS)[0]
        save_image(image, output_path(self.folder / "images", name, ".png"))

    def _write_mask(self, path: Path, mask: np.ndarray) -> None:
        with replacing(path) as file:
            png = Png(file, (mask.shape[0], mask.shape[1]), palette=self.classes.palette())
            png.write(mask)
            png.close()

    def _read_accepted(self, file: str) -> np.ndarray:
        path = self.session / "accepted" / file
        if not path.resolve().is_relative_to((self.session / "accepted").resolve()):
            raise UsageError(f"{file} is outside {self.session / 'accepted'} - the session was changed by hand")
        try:
            with Image.open(path) as image:
                return np.array(image)
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error}) - restore it from a copy") from error

    def _image_path(self, name: str) -> Path | None:
        suffixes = {self.photos[name].suffix, ".png"}
        paths = [output_path(self.folder / "images", name, suffix) for suffix in suffixes]
        return next((path for path in paths if path.is_file()), None)

    def _mask_path(self, name: str) -> Path:
        return output_path(self.folder / "masks", name, ".png")

    def _accepted_path(self, name: str) -> Path:
        return output_path(self.session / "accepted", name, ".png")

    def _log_path(self, name: str) -> Path:
        return output_path(self.session / "strokes", name, ".jsonl")

    def _read_state(self, path: Path) -> list[Any]:
        try:
            state = require_mapping(read_json(path))
        except PlainDataError as error:
            raise UsageError(f"{path} {error} - restore it from a copy, or choose another {WAY_OUT}") from error
        if state.get("format") != FORMAT or not isinstance(state.get("classes"), list):
            raise UsageError(f"{path} is not a session of this version of label - choose another {WAY_OUT}")
        return list(state["classes"])


def _with(log: PhotoLog, entry: Stroke) -> PhotoLog:
    return _of_entries(log.entries[:-1] if entry["tool"] == "undo" else (*log.entries, entry))


def _labels_in(mask: np.ndarray) -> list[int]:
    counts = cv2.calcHist([np.ascontiguousarray(mask)], [0], None, [256], [0, 256])
    return np.flatnonzero(counts).tolist()


def _of_entries(entries: tuple[Stroke, ...]) -> PhotoLog:
    status: Status = "strokes" if any(entry["tool"] not in ("accept", "reopen") for entry in entries) else "none"
    for past in entries:
        if past["tool"] == "accept":
            status = "accepted"
        elif past["tool"] == "reopen":
            status = "strokes"
    return PhotoLog(entries, status)
