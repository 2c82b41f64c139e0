"""From many images to a folder of masks: reading, the network and writing at the same time, to go on where it was."""

import json
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from segdeconv.classes import Classes
from segdeconv.data.files.decoding import header_pixels
from segdeconv.data.files.reading import turn_back, turned_view
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.inference.inputs import VIDEOS, output
from segdeconv.inference.polygons import regions
from segdeconv.inference.progress_log import ProgressLog
from segdeconv.inference.segmenter import Prediction, Segmenter
from segdeconv.inference.tiling import Part
from segdeconv.inference.video import VideoWriter, open_video
from segdeconv.system.files import replacing, replacing_path

AHEAD = 4  # images that are read before the network has seen the one before them
BEHIND = 8  # images that are written while the network goes on
WRITERS = 2  # threads
HELD_PIXELS = 1 << 26  # pixels that are held at once, unless one image has more


@dataclass(frozen=True)
class Outputs:
    """What is written for each image NAME, beside NAME.png, into a folder.

    overlay: NAME_overlay.png. probabilities: NAME.npy, (classes, H, W) float16. uncertainty: NAME_uncertainty.png.
    class_masks: NAME_CLASS.png for each class, 255 where it is. polygons: NAME_regions.json, of `least_area` pixels
    or more. frames: of a video, NAME/000001.png and so on. Videos become NAME_overlay.mp4.
    """

    out: Path
    classes: Classes
    overlay: bool = True
    probabilities: bool = False
    uncertainty: bool = False
    class_masks: bool = False
    polygons: bool = False
    least_area: int = 1
    frames: bool = False

    def endings(self) -> list[str]:
        """How the names of everything end that may be written for an image or a video."""
        found = [".png"]
        found += ["_overlay.png", "_overlay.mp4"] if self.overlay else []
        found += [".npy"] if self.probabilities else []
        found += ["_uncertainty.png"] if self.uncertainty else []
        found += [f"_{_plain(name)}.png" for name in self.classes.names] if self.class_masks else []
        return found + (["_regions.json"] if self.polygons else [])

    def path(self, name: str, ending: str) -> Path:
        """Of one output."""
        return output(self.out, name, ending)

    def write(self, name: str, prediction: Prediction, certain: bool) -> list[Path]:
        """All pictures and polygons of an image; the files. certain: whether `uncertainty` is from 0 to 1."""
        mask = turn_back(prediction.mask, prediction.stored)  # to the orientation of the file
        files = [self.path(name, ".png")]
        draw.save_mask(mask, self.classes, files[0])
        if self.overlay:
            files.append(self.path(name, "_overlay.png"))
            draw.save_overlay(prediction.image, prediction.mask, self.classes, files[-1])
        if prediction.uncertainty is not None:
            files.append(self.path(name, "_uncertainty.png"))
            top = 1.0 if certain else float(prediction.uncertainty.max())
            draw.save_image(draw.heat(prediction.uncertainty, top), files[-1])
        if self.class_masks:
            for index, known in enumerate(self.classes.names):
                files.append(self.path(name, f"_{_plain(known)}.png"))
                draw.save_image(np.where(mask == index, np.uint8(255), np.uint8(0)), files[-1])
        if self.polygons:
            files.append(self.path(name, "_regions.json"))
            confidence = prediction.confidence
            sure = None if confidence is None else turn_back(confidence, prediction.stored)
            found = regions(mask, least=self.least_area, confidence=sure)
            content = {
                "image": {"file_name": name, "height": mask.shape[0], "width": mask.shape[1]},
                "annotations": [region.annotation(number, 1) for number, region in enumerate(found, start=1)],
            }
            with replacing(files[-1]) as file:
                file.write(json.dumps(content).encode())
        return files

    @contextmanager
    def sink(self, name: str, size: tuple[int, int], stored: int) -> Iterator[Callable[[Part, np.ndarray], None]]:
        """Takes the probabilities of an image, a part at a time, into NAME.npy, which is on the disk, not in memory."""
        path = self.path(name, ".npy")
        stored_size = size if stored < 5 else size[::-1]
        with replacing_path(path) as partial:
            shape = (len(self.classes), *stored_size)
            array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)

            def keep(part: Part, values: np.ndarray) -> None:
                for channel, one in zip(array, values, strict=True):
                    turned_view(channel, stored)[slice(*part[0]), slice(*part[1])] = one

            yield keep
            array.flush()


def _plain(name: str) -> str:
    """A class's name as part of a file's."""
    return re.sub(r"[^\w.-]+", "_", name)


class PixelBudget:
    """How many pixels may be held at once; whoever wants more waits, but a single image always has its turn."""

    def __init__(self, pixels: int) -> None:
        self.pixels, self.used, self.closed = pixels, 0, False
        self.changed = threading.Condition()

    def take(self, pixels: int) -> None:
        """Wait until there is room for so many more."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or not self.used or self.used + pixels <= self.pixels)
            if self.closed:
                raise InterruptedError
            self.used += pixels

    def give(self, pixels: int) -> None:
        """They are held no longer."""
        with self.changed:
            self.used -= pixels
            self.changed.notify_all()

    def close(self) -> None:
        """Nobody needs any more."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


@dataclass
class BatchPrediction:
    """Labels images and videos one after another and writes their outputs, with a line in the progress_log for each.

    told: called with a sentence about each file that is skipped or cut. failed: how many were skipped.
    """

    segmenter: Segmenter
    outputs: Outputs
    progress_log: ProgressLog
    told: Callable[[str], None] = print
    failed: int = 0
    budget: PixelBudget = field(default_factory=lambda: PixelBudget(HELD_PIXELS))

    def run(self, images: Mapping[str, Path]) -> Iterator[str]:
        """Label what the progress_log does not have; the name of each image, when the network has seen it."""
        waiting = iter([(name, path) for name, path in images.items() if not self.progress_log.has(name, path)])
        reader, writers = ThreadPoolExecutor(1), ThreadPoolExecutor(WRITERS)
        read: deque[tuple[str, Path, Future[Any]]] = deque()
        written: deque[Future[None]] = deque()
        try:
            while True:
                for name, path in waiting:
                    read.append((name, path, reader.submit(self._read, path)))
                    if len(read) >= AHEAD:
                        break
                if not read:
                    break
                name, path, future = read.popleft()
                try:
                    if path.suffix.lower() in VIDEOS:
                        future.result()
                        self._video(name, path)
                    else:
                        image, stored, pixels = future.result()
                        prediction, files = self._predict(name, image, stored)
                        written.append(writers.submit(self._write, name, path, prediction, files, pixels))
                        del image, prediction
                except UsageError as error:
                    self.failed += 1
                    self.told(f"skipped: {error}")
                while len(written) > BEHIND or (written and written[0].done()):
                    written.popleft().result()
                yield name
            while written:
                written.popleft().result()
        finally:
            self.budget.close()
            for pool in (reader, writers):
                pool.shutdown(cancel_futures=True)

    def _read(self, path: Path) -> tuple[np.ndarray, int, int] | None:
        if path.suffix.lower() in VIDEOS:
            return None
        pixels = header_pixels(path)
        self.budget.take(pixels)
        try:
            image, stored = self.segmenter.open(path)
        except BaseException:
            self.budget.give(pixels)
            raise
        return image, stored, pixels

    def _predict(self, name: str, image: np.ndarray, stored: int) -> tuple[Prediction, list[Path]]:
        predict = partial(
            self.segmenter.predict,
            image,
            name=name,
            stored=stored,
            uncertainty=self.outputs.uncertainty,
            confidence=self.outputs.polygons,
        )
        if not self.outputs.probabilities:
            return predict(), []
        with self.outputs.sink(name, (image.shape[0], image.shape[1]), stored) as sink:
            prediction = predict(sink=sink)
        return prediction, [self.outputs.path(name, ".npy")]

    def _write(self, name: str, path: Path, prediction: Prediction, files: list[Path], pixels: int) -> None:
        files = files + self.outputs.write(name, prediction, not self.segmenter.settings.samples)
        size = list(turn_back(prediction.mask, prediction.stored).shape)
        self.progress_log.add(name, path, files, size=size, pixels=prediction.pixels())
        self.budget.give(pixels)

    def _video(self, name: str, path: Path) -> None:
        video = open_video(path, self.segmenter.max_pixels)
        files, count = [], 0
        totals = np.zeros(len(self.outputs.classes), dtype=np.int64)
        size: tuple[int, ...] = ()
        with VideoWriter(self.outputs.path(name, "_overlay.mp4"), video.rate) as writer:
            for count, frame in enumerate(video.frames(), start=1):
                prediction = self.segmenter.predict(frame, name=f"{path}, frame {count}")
                size = prediction.mask.shape
                totals += np.array(list(prediction.pixels().values()))
                if self.outputs.overlay:
                    writer.write(
                        draw.overlay_with_legend(frame, prediction.mask, self.outputs.classes, everything=True)
                    )
                if self.outputs.frames:
                    files.append(self.outputs.path(f"{name}/{count:06d}", ".png"))
                    draw.save_mask(prediction.mask, self.outputs.classes, files[-1])
        if self.outputs.overlay:
            files.append(self.outputs.path(name, "_overlay.mp4"))
        if count < video.promised:
            self.told(f"{path} gave {count} of {video.promised} frames - it is cut or damaged; those are done")
        pixels = {known: int(total) for known, total in zip(self.outputs.classes.names, totals, strict=True)}
        self.progress_log.add(name, path, files, size=list(size), pixels=pixels, frames=count)


def write_tables(progress_log: ProgressLog, outputs: Outputs) -> list[Path]:
    """The tables of everything in the folder, each made anew and in one piece: statistics.csv, regions.json."""
    files = [progress_log.out / "statistics.csv"]
    with replacing(files[0]) as file:
        file.write(b"name,class,pixels,share\n")
        for entry in progress_log.sorted():
            total = max(1, sum(entry["pixels"].values()))
            for known, count in entry["pixels"].items():
                file.write(f"{_cell(entry['name'])},{_cell(known)},{count},{count / total:.6f}\n".encode())
    if outputs.polygons:
        files.append(progress_log.out / "regions.json")
        with replacing(files[1]) as file:
            file.write(b'{"images": [')
            described = [
                entry
                for entry in progress_log.sorted()
                if any(name.endswith("_regions.json") for name in entry["files"])
            ]
            for number, entry in enumerate(described, start=1):
                image = {
                    "id": number,
                    "file_name": entry["source"]["path"],
                    "height": entry["size"][0],
                    "width": entry["size"][1],
                }
                file.write(_separated(number, image))
            file.write(b'],\n"annotations": [')
            count = 0
            for number, entry in enumerate(described, start=1):
                for annotation in _annotations(progress_log.out, entry["files"]):
                    count += 1
                    file.write(_separated(count, {**annotation, "id": count, "image_id": number}))
            categories = [{"id": index, "name": known} for index, known in enumerate(outputs.classes.names, start=1)]
            file.write(b'],\n"categories": ' + json.dumps(categories).encode() + b"}\n")
    return files


def _annotations(out: Path, files: Iterable[str]) -> Iterable[dict[str, Any]]:
    path = next(out / name for name in files if name.endswith("_regions.json"))
    return json.loads(path.read_bytes())["annotations"]


def _separated(number: int, entry: dict[str, Any]) -> bytes:
    return (b"" if number == 1 else b",\n") + json.dumps(entry).encode()


def _cell(text: str) -> str:
    """A field of CSV, RFC 4180."""
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\r\n') else text
