"""Batch prediction: many images and videos to a folder of masks.

Reading, the network and writing run at the same time. An interrupted batch prediction resumes where it stopped.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from segdeconv.data.files.decoding import header_pixels
from segdeconv.data.files.reading import turn_back
from segdeconv.data.files.stored_file import StoredFile
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.inference.inputs import is_video
from segdeconv.inference.outputs import Outputs
from segdeconv.inference.progress_log import OutputLog
from segdeconv.inference.segmenter import OpenedImage, Prediction, Segmenter
from segdeconv.inference.video import open_video
from segdeconv.inference.video_writer import video_writer
from segdeconv.system.interruption import raise_again

MAX_READ_AHEAD = 4  # images read before the network has processed the current one
MAX_PENDING_WRITES = 8  # images being written while the network processes the next
WRITER_THREADS = 2
MAX_PIXELS_IN_MEMORY = 1 << 26  # of all images together, unless a single one has more


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


def read_within(
    budget: PixelBudget, segmenter: Segmenter, path: Path, *, scratch: Path | None = None
) -> tuple[OpenedImage, int]:
    """Read an image once its pixels fit into a budget, to which the caller returns them.

    Args:
        budget: The budget.
        segmenter: The network that the image is for.
        path: The image.
        scratch: See `Segmenter.open`.

    Returns:
        The image and the pixels taken from the budget.

    Raises:
        UsageError: The image cannot be read; its pixels have been returned.
    """
    pixels = header_pixels(path)
    budget.acquire(pixels)
    try:
        return segmenter.open(path, scratch=scratch), pixels
    except BaseException:
        budget.release(pixels)
        raise


@dataclass
class BatchPrediction:
    """Prediction of many images and videos, with their outputs and one line each in the progress log.

    Attributes:
        report: Called with a message about each file that is skipped or truncated.
        failed: Number of files skipped so far.
        without_crs: The images whose polygons are map features, but in pixels, since they have no CRS.
        budget: Limit on the pixels of the images in memory.
    """

    segmenter: Segmenter
    outputs: Outputs
    progress_log: OutputLog
    report: Callable[[str], None] = print
    failed: int = 0
    without_crs: list[Path] = field(default_factory=list)
    budget: PixelBudget = field(default_factory=lambda: PixelBudget(MAX_PIXELS_IN_MEMORY))

    def run(self, images: Mapping[str, Path]) -> Iterator[str]:
        """Predict the images and videos missing from the progress log.

        Args:
            images: Path of each image by the name of its outputs.

        Yields:
            The name of each image once its prediction has been computed or skipped.
        """
        waiting = iter([(name, path) for name, path in images.items() if not self.is_done(name, path)])
        reader, writers = ThreadPoolExecutor(1), ThreadPoolExecutor(WRITER_THREADS)
        fetchers = ThreadPoolExecutor(MAX_READ_AHEAD)
        reads: deque[tuple[str, Path, Future[Any]]] = deque()
        writes: deque[Future[None]] = deque()
        try:
            while True:
                for name, path in waiting:
                    if isinstance(path, StoredFile):
                        path.fetch_by(fetchers)
                    reads.append((name, path, reader.submit(self._read, path)))
                    if len(reads) >= MAX_READ_AHEAD:
                        break
                if not reads:
                    break
                raise_again()
                name, path, future = reads.popleft()
                try:
                    if is_video(path):
                        future.result()
                        self._video(name, path)
                    else:
                        opened, pixels = future.result()
                        prediction, files = self._predict(name, opened)
                        writes.append(writers.submit(self._write, name, path, prediction, files, pixels))
                        del opened, prediction
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
            for pool in (fetchers, reader, writers):
                pool.shutdown(cancel_futures=True)

    def is_done(self, name: str, path: Path) -> bool:
        """Return whether the progress log has the outputs of an image.

        A georeferenced image that was predicted without rasterio has another mask and is predicted again.
        """
        video = is_video(path)
        return self.progress_log.has(name, path, includes=None if video else self.outputs.mask_path(name, path))

    def _read(self, path: Path) -> tuple[OpenedImage, int] | None:
        if is_video(path):
            return None
        return read_within(self.budget, self.segmenter, path, scratch=self.outputs.out)

    def _predict(self, name: str, opened: OpenedImage) -> tuple[Prediction, list[Path]]:
        predict = partial(
            self.segmenter.predict,
            opened,
            name=name,
            uncertainty=self.outputs.uncertainty,
            confidence=bool(self.outputs.polygons),
        )
        if not self.outputs.probabilities:
            return predict(), []
        self.progress_log.require_folder()
        with self.outputs.sink(name, opened) as (path, sink):
            prediction = predict(sink=sink)
        return prediction, [path]

    def _write(self, name: str, path: Path, prediction: Prediction, files: list[Path], pixels: int) -> None:
        self.progress_log.require_folder()
        files = files + self.outputs.write(name, path, prediction, not self.segmenter.settings.samples)
        size = list(turn_back(prediction.mask, prediction.orientation).shape)
        reference = prediction.reference
        self._record(
            name,
            path,
            files,
            size=size,
            pixels=prediction.pixels(),
            file=path.as_posix(),
            pixel_area=None if reference is None else reference.pixel_area,
        )
        located = reference is not None and reference.located
        if not located and {"geojson", "gpkg"} & set(self.outputs.region_formats(reference is not None)):
            self.without_crs.append(path)
        self.budget.release(pixels)

    def _video(self, name: str, path: Path) -> None:
        video = open_video(path, self.segmenter.max_pixels)
        outputs, files, count, seconds = self.outputs, [], 0, 0.0
        totals = np.zeros(len(outputs.classes), dtype=np.int64)
        size: tuple[int, ...] = ()
        overlay = outputs.path(name, outputs.video_ending)
        with video_writer(overlay, video) if outputs.overlay else nullcontext() as writer:
            for count, (image, seconds) in enumerate(video.frames(), start=1):
                prediction = self.segmenter.predict(image, name=f"{path}, frame {count}")
                self.progress_log.require_folder()
                size = prediction.mask.shape
                totals += np.array(list(prediction.pixels().values()))
                if writer is not None:
                    drawn = draw.overlay_with_legend(
                        draw.windowed(image, outputs.window),
                        prediction.mask,
                        outputs.classes,
                        everything=True,
                        outlines=outputs.outlines,
                    )
                    writer.write(drawn, seconds)
                if outputs.frames:
                    files.append(outputs.path(f"{name}/{count:06d}", ".png"))
                    draw.save_mask(prediction.mask, outputs.classes, files[-1], labels=outputs.labels)
        if outputs.overlay:
            files.append(overlay)
        if message := video.describe_missing(count, seconds):
            self.report(message)
        pixels = {name: int(total) for name, total in zip(outputs.classes.names, totals, strict=True)}
        self._record(name, path, files, size=list(size), pixels=pixels, frames=count, file=path.as_posix())

    def _record(self, name: str, path: Path, files: list[Path], **metadata: Any) -> None:
        """Deliver the files of an image, and add it to the progress log."""
        with self.outputs.folder.delivered(files):
            self.progress_log.add(name, path, files, **metadata)
