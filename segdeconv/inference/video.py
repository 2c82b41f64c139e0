"""Reading and writing of videos, one frame at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from segdeconv.data.files.decoding import first_bytes, require_size
from segdeconv.errors import DiskError, UsageError
from segdeconv.system.files import replacing_path

DEFAULT_RATE = 25.0  # frames per second of a file that does not specify them


@dataclass(frozen=True)
class Video:
    """A video file.

    Attributes:
        rate: Frames per second.
        frame_count: Number of frames according to the file's header; 0 if unknown.
    """

    path: Path
    rate: float
    frame_count: int

    def frames(self) -> Iterator[np.ndarray]:
        """Iterate over the frames, (H, W, 3) uint8 RGB, turned upright; stop where the file becomes unreadable."""
        capture = cv2.VideoCapture(str(self.path))
        try:
            while True:
                success, frame = capture.read()
                if not success:
                    return
                yield np.ascontiguousarray(frame[:, :, ::-1])
        finally:
            capture.release()


def open_video(path: Path, max_pixels: int) -> Video:
    """Open a video file and read its rate and number of frames.

    Raises:
        UsageError: The file is not a readable video, has no readable frame, or has frames of more than `max_pixels`.
    """
    first_bytes(path)
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise UsageError(f"{path} is not a readable video - convert it to MP4, or leave it out")
        width, height = (int(capture.get(number)) for number in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        require_size(path, width, height, max_pixels)
        rate, frame_count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        if not capture.read()[0]:
            raise UsageError(f"{path} has no readable frame - restore the video, or leave it out")
    finally:
        capture.release()
    return Video(path, rate if 0 < rate < 1000 else DEFAULT_RATE, max(0, round(frame_count)))


class VideoWriter:
    """A writer of MP4 files, which appear under their final name once they are complete and verified.

    OpenCV does not report a failed write, such as on a full disk, so the file is opened again at the end.

    All frames have one size. The codec is MPEG-4 part 2, which the FFmpeg in OpenCV always includes. It requires even
    sides, so an odd last row or column is dropped.

    Args:
        rate: Frames per second.

    Raises:
        UsageError: OpenCV has no MP4 encoder.
        DiskError: The file is incomplete at the end.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate, self.file = path, rate, ExitStack()
        self.writer: cv2.VideoWriter | None = None
        self.partial: Path | None = None
        self.num_frames = 0

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, frame: np.ndarray) -> None:
        """Append a frame, (H, W, 3) uint8 RGB."""
        height, width = (side // 2 * 2 for side in frame.shape[:2])
        if self.writer is None:
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self.partial = self.file.enter_context(replacing_path(self.path))
            self.partial.touch()  # an error of the disk is raised here rather than hidden by OpenCV
            self.writer = cv2.VideoWriter(str(self.partial), code, self.rate, (width, height))
            if not self.writer.isOpened():
                raise UsageError(
                    f"{self.path} cannot be written; this OpenCV has no MP4 encoder - install opencv-python-headless"
                )
        self.writer.write(np.ascontiguousarray(frame[:height, :width, ::-1]))
        self.num_frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writer is not None:
            self.writer.release()
        if error is None and self.partial is not None:
            try:
                self._verify(self.partial)
            except DiskError as incomplete:
                self.file.__exit__(DiskError, incomplete, incomplete.__traceback__)
                raise
        self.file.__exit__(kind, error, trace)

    def _verify(self, partial: Path) -> None:
        """Check that the written file has all frames and that its last one can be read.

        Raises:
            DiskError: It has not.
        """
        capture = cv2.VideoCapture(str(partial))
        try:
            count = max(0, round(capture.get(cv2.CAP_PROP_FRAME_COUNT))) if capture.isOpened() else 0
            capture.set(cv2.CAP_PROP_POS_FRAMES, self.num_frames - 1)
            complete = count == self.num_frames and capture.read()[0]
        finally:
            capture.release()
        if not complete:
            raise DiskError(
                f"{self.path} could not be written: it has {count} of {self.num_frames} frames, or they cannot be "
                "read back - free some space, or choose another folder, and run the same command again"
            )
