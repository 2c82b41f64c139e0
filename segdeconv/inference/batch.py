"""Batch prediction: many images and videos to a folder of masks.

Reading, the network and writing run at the same time. An interrupted batch prediction resumes where it stopped.
"""

import io
import json
import math
import os
import re
import sys
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from segdeconv.classes import Classes
from segdeconv.data.files.decoding import header_pixels
from segdeconv.data.files.reading import turn_back, turned_view
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.inference.inputs import VIDEOS, FileNames, output_path
from segdeconv.inference.polygons import regions
from segdeconv.inference.progress_log import ProgressLog
from segdeconv.inference.segmenter import Prediction, Segmenter
from segdeconv.inference.tiling import Part
from segdeconv.inference.video import VideoWriter, open_video
from segdeconv.system.files import allocate, encode, hash_text, replacing, replacing_path
from segdeconv.system.interruption import raise_again
from segdeconv.system.own_files import FRAME
from segdeconv.system.plain_data import Limits, read_json, require_mapping

MAX_READ_AHEAD = 4  # images read before the network has processed the current one
MAX_PENDING_WRITES = 8  # images being written while the network processes the next
WRITER_THREADS = 2
MAX_CLASS_LENGTH = 100  # bytes of a class in a file name
REGION_LIMITS = Limits(size=1 << 28, nodes=20_000_000)
MAX_PIXELS_IN_MEMORY = 1 << 26  # of all images together, unless a single one has more


@dataclass(frozen=True)
class Outputs:
    """The files written for each image NAME, in addition to its mask NAME.png.

    Attributes:
        out: Output folder.
        overlay: Write NAME_overlay.png; for a video, NAME_overlay.mp4.
        outlines: Overlays show only the outlines of the regions.
        probabilities: Write NAME.npy, (classes, H, W) float16.
        uncertainty: Write NAME_uncertainty.png.
        class_masks: Write NAME_CLASS.png for each class: 255 where the class is, 0 elsewhere.
        polygons: Write NAME_regions.json.
        frames: Write the mask of each frame of a video, NAME/000001.png and so on.
        labels: Values of the masks: class indices, or the labels or colours of the data set's own masks.
    """

    out: Path
    classes: Classes
    overlay: bool = True
    outlines: bool = False
    probabilities: bool = False
    uncertainty: bool = False
    class_masks: bool = False
    polygons: bool = False
    frames: bool = False
    labels: draw.Labels = "index"

    def endings(self) -> list[str]:
        """Return the file name endings of all outputs of an image or a video.

        Raises:
            UsageError: Two outputs of an image would be one file.
        """
        owners = {".png": "the mask"}
        if self.overlay:
            owners |= dict.fromkeys(("_overlay.png", "_overlay.mp4"), "the overlay")
        if self.probabilities:
            owners[".npy"] = "the probabilities"
        if self.uncertainty:
            owners["_uncertainty.png"] = "the uncertainty"
        if self.polygons:
            owners["_regions.json"] = "the polygons"
        names = FileNames("--class-masks: ", "leave out --class-masks and take the classes from the masks")
        for ending, owner in owners.items():
            names.add(f"NAME{ending}", owner)
        for name in self.classes.names if self.class_masks else ():
            ending = f"_{_file_name(name)}.png"
            names.add(f"NAME{ending}", f"class '{name}'")
            owners[ending] = name
        names.warn()
        return list(owners)

    def planned(self, images: Mapping[str, Path]) -> tuple[list[Path], list[Path]]:
        """Return all files that a batch prediction writes, and the folders of the frames of videos.

        Args:
            images: Path of each image or video by the name of its outputs.

        Raises:
            UsageError: A file would be a folder of another output, or a frame of a video.
        """
        endings = self.endings()
        files = [self.out / name for name in ("statistics.csv", *(["regions.json"] if self.polygons else []))]
        frame_folders = []
        for name, path in images.items():
            video = path.suffix.lower() in VIDEOS
            files += [self.path(name, ending) for ending in endings if ending.endswith(".mp4") == video]
            if video and self.frames:
                frame_folders.append(self.out / name)
        way_out = "use two --out folders"
        folders = {folder for path in files for folder in path.parents} | set(frame_folders)
        frames = set(frame_folders)
        for path in files:
            if path in folders:
                raise UsageError(f"{path} would be an output file and a folder of other outputs - {way_out}")
            if path.parent in frames and FRAME.fullmatch(path.name):
                raise UsageError(f"{path} would be the output of an image and a frame of a video - {way_out}")
        return files, frame_folders

    def path(self, name: str, ending: str) -> Path:
        """Return the path of one output file."""
        return output_path(self.out, name, ending)

    def write(self, name: str, prediction: Prediction, bounded: bool) -> list[Path]:
        """Write the mask, figures and polygons of an image, and return the files written.

        Args:
            bounded: The uncertainty is in 0..1; otherwise its figure is scaled to its maximum.
        """
        mask = turn_back(prediction.mask, prediction.orientation)  # as the image is stored in its file
        files = [self.path(name, ".png")]
        draw.save_mask(mask, self.classes, files[0], labels=self.labels)
        if self.overlay:
            files.append(self.path(name, "_overlay.png"))
            draw.save_overlay(prediction.image, prediction.mask, self.classes, files[-1], outlines=self.outlines)
        if prediction.uncertainty is not None:
            files.append(self.path(name, "_uncertainty.png"))
            top = 1.0 if bounded else float(prediction.uncertainty.max())
            draw.save_image(draw.heat(prediction.uncertainty, top), files[-1])
        if self.class_masks:
            for index, class_name in enumerate(self.classes.names):
                files.append(self.path(name, f"_{_file_name(class_name)}.png"))
                draw.save_image(np.where(mask == index, np.uint8(255), np.uint8(0)), files[-1])
        if self.polygons:
            files.append(self.path(name, "_regions.json"))
            confidence = prediction.confidence
            if confidence is not None:
                confidence = turn_back(confidence, prediction.orientation)
            numbered_regions = enumerate(regions(mask, confidence=confidence), start=1)
            content = {
                "image": {"file_name": name, "height": mask.shape[0], "width": mask.shape[1]},
                "annotations": [region.annotation(number, 1) for number, region in numbered_regions],
            }
            with replacing(files[-1]) as file:
                file.write(json.dumps(content).encode())
        return files

    @contextmanager
    def sink(self, name: str, size: tuple[int, int], orientation: int) -> Iterator[Callable[[Part, np.ndarray], None]]:
        """Open NAME.npy and yield a function that writes the probabilities of one part of the image to it.

        The array is memory-mapped, so the probabilities of the whole image are never held in memory.
        """
        path = self.path(name, ".npy")
        stored_size = size if orientation < 5 else size[::-1]  # EXIF orientations 5 to 8 swap rows and columns
        with replacing_path(path) as partial:
            shape = (len(self.classes), *stored_size)
            header = io.BytesIO()
            description = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False}
            np.lib.format.write_array_header_1_0(header, {**description, "shape": shape})
            allocate(partial, header.tell() + math.prod(shape) * np.dtype(np.float16).itemsize)
            with partial.open("r+b") as file:
                file.write(header.getvalue())
            array = np.lib.format.open_memmap(partial, mode="r+")

            def write_part(part: Part, values: np.ndarray) -> None:
                for channel, class_values in zip(array, values, strict=True):
                    turned_view(channel, orientation)[slice(*part[0]), slice(*part[1])] = class_values

            yield write_part
            array.flush()


def _file_name(class_name: str) -> str:
    """Replace the characters of a class name that may be unsafe in a file name, and truncate a long one."""
    # \w has no combining marks, without which words of many scripts become the same.
    kept = [letter if unicodedata.category(letter)[0] in "LMN" or letter in "_.-" else " " for letter in class_name]
    name = re.sub(" +", "_", "".join(kept))
    encoding = sys.getfilesystemencoding()
    name = name.encode(encoding, errors="replace").decode(encoding).replace("?", "_")
    if len(os.fsencode(name)) <= MAX_CLASS_LENGTH:
        return name
    return f"{os.fsencode(name)[:MAX_CLASS_LENGTH].decode(encoding, errors='ignore')}~{hash_text(class_name)[:8]}"


class PixelBudget:
    """A limit on the pixels in memory, shared by threads. An image larger than the limit is admitted alone."""

    def __init__(self, pixels: int) -> None:
        self.pixels, self.used, self.closed = pixels, 0, False
        self.changed = threading.Condition()

    def acquire(self, pixels: int) -> None:
        """Wait until the pixels fit.

        Raises:
            InterruptedError: The budget was closed.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.closed or not self.used or self.used + pixels <= self.pixels)
            if self.closed:
                raise InterruptedError
            self.used += pixels

    def release(self, pixels: int) -> None:
        """Return pixels to the budget."""
        with self.changed:
            self.used -= pixels
            self.changed.notify_all()

    def close(self) -> None:
        """Interrupt every thread that waits in `acquire`."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


@dataclass
class BatchPrediction:
    """Prediction of many images and videos, with their outputs and one line each in the progress log.

    Attributes:
        report: Called with a message about each file that is skipped or truncated.
        failed: Number of files skipped so far.
        budget: Limit on the pixels of the images in memory.
    """

    segmenter: Segmenter
    outputs: Outputs
    progress_log: ProgressLog
    report: Callable[[str], None] = print
    failed: int = 0
    budget: PixelBudget = field(default_factory=lambda: PixelBudget(MAX_PIXELS_IN_MEMORY))

    def run(self, images: Mapping[str, Path]) -> Iterator[str]:
        """Predict the images and videos missing from the progress log.

        Args:
            images: Path of each image by the name of its outputs.

        Yields:
            The name of each image once its prediction has been computed or skipped.
        """
        waiting = iter([(name, path) for name, path in images.items() if not self.progress_log.has(name, path)])
        reader, writers = ThreadPoolExecutor(1), ThreadPoolExecutor(WRITER_THREADS)
        reads: deque[tuple[str, Path, Future[Any]]] = deque()
        writes: deque[Future[None]] = deque()
        try:
            while True:
                for name, path in waiting:
                    reads.append((name, path, reader.submit(self._read, path)))
                    if len(reads) >= MAX_READ_AHEAD:
                        break
                if not reads:
                    break
                raise_again()
                name, path, future = reads.popleft()
                try:
                    if path.suffix.lower() in VIDEOS:
                        future.result()
                        self._video(name, path)
                    else:
                        image, orientation, pixels = future.result()
                        prediction, files = self._predict(name, image, orientation)
                        writes.append(writers.submit(self._write, name, path, prediction, files, pixels))
                        del image, prediction
                except UsageError as error:
                    self.failed += 1
                    self.report(f"skipped: {error}")
                while len(writes) > MAX_PENDING_WRITES or (writes and writes[0].done()):
                    writes.popleft().result()
                yield name
            while writes:
                writes.popleft().result()
        except FileNotFoundError:
            self.progress_log.require_folder()  # the error to report, if the folder was removed
            raise
        finally:
            self.budget.close()
            for pool in (reader, writers):
                pool.shutdown(cancel_futures=True)

    def _read(self, path: Path) -> tuple[np.ndarray, int, int] | None:
        if path.suffix.lower() in VIDEOS:
            return None
        pixels = header_pixels(path)
        self.budget.acquire(pixels)
        try:
            image, orientation = self.segmenter.open(path)
        except BaseException:
            self.budget.release(pixels)
            raise
        return image, orientation, pixels

    def _predict(self, name: str, image: np.ndarray, orientation: int) -> tuple[Prediction, list[Path]]:
        predict = partial(
            self.segmenter.predict,
            image,
            name=name,
            orientation=orientation,
            uncertainty=self.outputs.uncertainty,
            confidence=self.outputs.polygons,
        )
        if not self.outputs.probabilities:
            return predict(), []
        self.progress_log.require_folder()
        with self.outputs.sink(name, (image.shape[0], image.shape[1]), orientation) as sink:
            prediction = predict(sink=sink)
        return prediction, [self.outputs.path(name, ".npy")]

    def _write(self, name: str, path: Path, prediction: Prediction, files: list[Path], pixels: int) -> None:
        self.progress_log.require_folder()
        files = files + self.outputs.write(name, prediction, not self.segmenter.settings.samples)
        size = list(turn_back(prediction.mask, prediction.orientation).shape)
        self.progress_log.add(name, path, files, size=size, pixels=prediction.pixels())
        self.budget.release(pixels)

    def _video(self, name: str, path: Path) -> None:
        video = open_video(path, self.segmenter.max_pixels)
        files, count = [], 0
        totals = np.zeros(len(self.outputs.classes), dtype=np.int64)
        size: tuple[int, ...] = ()
        with VideoWriter(self.outputs.path(name, "_overlay.mp4"), video.rate) as writer:
            for count, frame in enumerate(video.frames(), start=1):
                prediction = self.segmenter.predict(frame, name=f"{path}, frame {count}")
                self.progress_log.require_folder()
                size = prediction.mask.shape
                totals += np.array(list(prediction.pixels().values()))
                if self.outputs.overlay:
                    writer.write(
                        draw.overlay_with_legend(
                            frame,
                            prediction.mask,
                            self.outputs.classes,
                            everything=True,
                            outlines=self.outputs.outlines,
                        )
                    )
                if self.outputs.frames:
                    files.append(self.outputs.path(f"{name}/{count:06d}", ".png"))
                    draw.save_mask(prediction.mask, self.outputs.classes, files[-1], labels=self.outputs.labels)
        if self.outputs.overlay:
            files.append(self.outputs.path(name, "_overlay.mp4"))
        if count < video.frame_count:
            self.report(
                f"{path}: only {count} of {video.frame_count} frames can be read, the file is truncated or damaged - "
                "those frames were processed"
            )
        pixels = {name: int(total) for name, total in zip(self.outputs.classes.names, totals, strict=True)}
        self.progress_log.add(name, path, files, size=list(size), pixels=pixels, frames=count)


def write_tables(progress_log: ProgressLog, outputs: Outputs) -> list[Path]:
    """Write the tables of all predictions in the folder and return their paths.

    statistics.csv has one line for each image and class. regions.json (COCO) merges the NAME_regions.json files; it is
    written only if `outputs.polygons`. An existing table is replaced atomically.
    """
    progress_log.require_folder()
    files = [progress_log.out / "statistics.csv"]
    with replacing(files[0]) as file:
        file.write(b"name,class,pixels,share\n")
        for entry in progress_log.sorted():
            total = max(1, sum(entry["pixels"].values()))
            for class_name, count in entry["pixels"].items():
                file.write(encode(f"{_cell(entry['name'])},{_cell(class_name)},{count},{count / total:.6f}\n"))
    if outputs.polygons:
        files.append(progress_log.out / "regions.json")
        with replacing(files[1]) as file:
            file.write(b'{"images": [')
            entries = [
                entry
                for entry in progress_log.sorted()
                if any(name.endswith("_regions.json") for name in entry["files"])
            ]
            for number, entry in enumerate(entries, start=1):
                image = {
                    "id": number,
                    "file_name": entry["source"]["path"],
                    "height": entry["size"][0],
                    "width": entry["size"][1],
                }
                file.write(_separated(number, image))
            file.write(b'],\n"annotations": [')
            count = 0
            for number, entry in enumerate(entries, start=1):
                for annotation in _annotations(progress_log.out, entry["files"]):
                    count += 1
                    file.write(_separated(count, {**annotation, "id": count, "image_id": number}))
            categories = [{"id": index, "name": name} for index, name in enumerate(outputs.classes.names, start=1)]
            file.write(b'],\n"categories": ' + json.dumps(categories).encode() + b"}\n")
    return files


def _annotations(out: Path, files: Iterable[str]) -> Iterable[dict[str, Any]]:
    path = next(out / name for name in files if name.endswith("_regions.json"))
    try:
        annotations = require_mapping(read_json(path, REGION_LIMITS)).get("annotations")
        return TypeAdapter(list[dict[str, Any]]).validate_python(annotations)
    except ValueError as error:
        raise UsageError(f"{path} does not contain the regions that predict writes - add --overwrite") from error


def _separated(number: int, entry: dict[str, Any]) -> bytes:
    return (b"" if number == 1 else b",\n") + json.dumps(entry).encode()


def _cell(text: str) -> str:
    """Quote a CSV field where RFC 4180 requires it."""
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\r\n') else text
