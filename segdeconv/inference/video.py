"""Videos: frames one at a time, in and out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from segdeconv.data.files.decoding import first_bytes, require_size
from segdeconv.errors import UsageError
from segdeconv.system.files import replacing_path

USUAL_RATE = 25.0  # frames in a second, of a file that does not say


@dataclass(frozen=True)
class Video:
    """rate: frames in a second. promised: how many frames the file says that it has, 0 if it does not."""

    path: Path
    rate: float
    promised: int

    def frames(self) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 RGB, upright as the file says. Ends where the file cannot be read on."""
        capture = cv2.VideoCapture(str(self.path))
        try:
            while True:
                there, frame = capture.read()
                if not there:
                    return
                yield np.ascontiguousarray(frame[:, :, ::-1])
        finally:
            capture.release()


def open_video(path: Path, max_pixels: int) -> Video:
    """What a file says of itself; raises UsageError for one that gives no frame."""
    first_bytes(path)
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise UsageError(f"{path} is no video that can be read - convert it to MP4, or leave it out")
        width, height = (int(capture.get(number)) for number in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        require_size(path, width, height, max_pixels)
        rate, promised = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        if not capture.read()[0]:
            raise UsageError(f"{path} is a video without a frame that can be read - restore it, or leave it out")
    finally:
        capture.release()
    return Video(path, rate if 0 < rate < 1000 else USUAL_RATE, max(0, round(promised)))


class VideoWriter:
    """An MP4 that takes its name when it is whole; frames of one size, whose odd last row and column are left out.

    MPEG-4 part 2, which the FFmpeg inside OpenCV always has, and whose sides are even.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate, self.file = path, rate, ExitStack()
        self.writer: cv2.VideoWriter | None = None

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, frame: np.ndarray) -> None:
        """(H, W, 3) uint8 RGB."""
        height, width = (side // 2 * 2 for side in frame.shape[:2])
        if self.writer is None:
            code = cv2.VideoWriter.fourcc(*"mp4v")
            partial = self.file.enter_context(replacing_path(self.path))
            self.writer = cv2.VideoWriter(str(partial), code, self.rate, (width, height))
            if not self.writer.isOpened():
                raise UsageError(
                    f"{self.path} cannot be written as MP4 - this OpenCV has no encoder; install opencv-python-headless"
                )
        self.writer.write(np.ascontiguousarray(frame[:height, :width, ::-1]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writer is not None:
            self.writer.release()
        self.file.__exit__(kind, error, trace)
