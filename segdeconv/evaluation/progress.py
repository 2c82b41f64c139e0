"""The counts of the images that an evaluation has scored, with which an interrupted evaluation resumes."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segdeconv.data.dataset import SegmentationDataset
from segdeconv.errors import warn
from segdeconv.inference.output_folder import OutputFolder
from segdeconv.system.files import lock_folder, replace_text, replacing, unlock_folder
from segdeconv.system.plain_data import Limits, read_json

FOLDER = ".segdeconv-evaluation"  # in the output folder, or in that of a part
COUNTS = "counts"  # in it, beside its lock
IDENTITY = "evaluation.json"
IDENTITY_LIMITS = Limits(size=1 << 20)
DAMAGED = (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile, zlib.error)


class EvaluationLog:
    """The counts of a running evaluation, one .npz file for each chunk of images, in a folder that is locked.

    A file that is damaged, or of an image that has changed or whose other outputs are missing, is left out, so that its
    images are scored again. The counts of another evaluation that was interrupted are removed, with a warning.

    Args:
        out: The output folder of the evaluation.
        folder: The folder of the log: `out.path`, or a folder below it for one of several processes that each evaluate
            a part.
        identity: JSON data that determines the counts: the checkpoints, the settings and the names of the images.
        is_complete: Returns whether an image, given by its index in the data set and its `stamp_digest` when it was
            scored, has not changed and has its other outputs.

    Attributes:
        contents: The content of each file by its name, `NETWORK-FIRST.npz`, where FIRST is the index of an image.
        places: The indices of the images of each file by its name.

    Raises:
        UsageError: Another process is evaluating into the folder, or the storage does not answer.
    """

    def __init__(
        self,
        out: OutputFolder,
        folder: Path,
        identity: Mapping[str, Any],
        is_complete: Callable[[int, bytes], bool],
    ) -> None:
        self.out, self.folder = out, folder / FOLDER
        self.counts = self.folder / COUNTS
        self.contents: dict[str, bytes] = {}
        self.places: dict[str, list[int]] = {}
        self.lock = lock_folder(self.folder, "--out")
        out.fetch_folder(self.counts)
        path = self.counts / IDENTITY
        wanted = json.loads(json.dumps(identity))
        if _read(path) == wanted:
            for file in sorted(self.counts.glob("*.npz")):
                content = file.read_bytes()
                stamps = _stamps_of(content)
                if stamps and all(is_complete(place, stamp) for place, stamp in stamps.items()):
                    self.contents[file.name], self.places[file.name] = content, list(stamps)
            return
        if path.exists():
            warn(
                f"{out}: an evaluation of another checkpoint or data, or with other settings, was interrupted there; "
                "its counts are removed - choose another --out to keep such counts"
            )
        out.remove_folder(self.counts)
        replace_text(path, json.dumps(wanted, indent=1) + "\n")
        out.deliver([path])

    def of(self, network: str) -> dict[str, bytes]:
        """Return the files of a network by their names for messages."""
        return {
            self.out.shown(self.counts / name): content
            for name, content in self.contents.items()
            if name.startswith(f"{network}-")
        }

    def scored(self, network: str) -> set[int]:
        """Return the indices of the images whose counts the log has for a network."""
        return {place for name, places in self.places.items() if name.startswith(f"{network}-") for place in places}

    def add(self, network: str, places: Sequence[int], content: bytes) -> None:
        """Record the counts of some images, whose other outputs are complete."""
        path = self.counts / f"{network}-{places[0]:09d}.npz"
        with replacing(path) as file:
            file.write(content)
        self.out.deliver([path])
        self.contents[path.name], self.places[path.name] = content, list(places)

    def remove(self) -> None:
        """Remove the log of an evaluation whose results are written."""
        self.out.remove_folder(self.counts)

    def close(self) -> None:
        """Unlock the folder, and remove it if it is empty."""
        unlock_folder(self.lock)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def stamp_digest(dataset: SegmentationDataset, place: int) -> bytes:
    """Return the sha256 of the stamp of an image, which changes when its files do."""
    return hashlib.sha256(dataset.stamp(place).encode(errors="surrogateescape")).digest()


def _stamps_of(content: bytes) -> dict[int, bytes]:
    """Return the `stamp_digest` of each image of a file of counts by its index; none if the file is damaged."""
    try:
        arrays = dict(np.load(io.BytesIO(content), allow_pickle=False))  # reads all, and checks their CRCs
        return {int(place): stamp.tobytes() for place, stamp in zip(arrays["places"], arrays["stamps"], strict=True)}
    except DAMAGED:
        return {}


def _read(path: Path) -> Any:
    try:
        return read_json(path, IDENTITY_LIMITS)
    except (ValueError, OSError):
        return None
