"""Reading of videos, one frame at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from segdeconv.data.files.decoding import first_bytes, require_size
from segdeconv.errors import UsageError

DEFAULT_RATE = 25.0  # frames per second of a file that does not specify them

# Container formats by FFmpeg's name of their demuxer, and what their files begin with. A file is opened as the format
# that it begins with, and never as a playlist, which could name other files and addresses.
CONTAINERS: dict[str, Callable[[bytes], bool]] = {
    "mov": lambda start: start[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"),  # also MP4
    "avi": lambda start: start[:4] == b"RIFF" and start[8:11] == b"AVI",
    "matroska": lambda start: start[:4] == b"\x1a\x45\xdf\xa3",  # also WebM
    "mpeg": lambda start: start[:4] == b"\0\0\1\xba",
    "mpegts": lambda start: len(start) > 188 and start[0] == start[188] == 0x47,
    "mpegvideo": lambda start: start[:4] == b"\0\0\1\xb3",
    "m4v": lambda start: start[:4] == b"\0\0\1\xb0",
    "asf": lambda start: start[:4] == b"\x30\x26\xb2\x75",  # WMV
    "flv": lambda start: start[:3] == b"FLV",
    "ogg": lambda start: start[:4] == b"OggS",
}
COUNTED = ("mov", "avi")  # formats whose header has the number of frames; of others, FFmpeg estimates it
SLACK = 1.0  # seconds by which the sound may be longer than the frames without a warning


class Frame(NamedTuple):
    """A frame of a video.

    Attributes:
        image: (H, W, 3) uint8 RGB, upright.
        seconds: Time at which it is shown, from the first frame.
    """

    image: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Video:
    """A video file.

    Attributes:
        rate: Frames per second, the mean if it varies.
        frame_count: Number of frames according to the file's header, or an estimate; 0 if unknown.
        container: The format of the file, a key of CONTAINERS.
    """

    path: Path
    rate: float
    frame_count: int
    container: str

    def frames(self) -> Iterator[Frame]:
        """Iterate over the frames; stop where the file becomes unreadable."""
        capture = cv2.VideoCapture(os.path.abspath(self.path))
        seconds = -1.0
        try:
            while True:
                success, image = capture.read()
                if not success:
                    return
                stored = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                # A file without times has the same for all frames.
                seconds = stored if stored > seconds else seconds + 1 / self.rate
                yield Frame(np.ascontiguousarray(image[:, :, ::-1]), seconds)
        finally:
            capture.release()

    def describe_missing(self, count: int, seconds: float) -> str | None:
        """Return a message if the file should have more frames than can be read, or None.

        Args:
            count: Number of frames that were read.
            seconds: Time of the last one.
        """
        if self.container in COUNTED:
            if count >= self.frame_count:
                return None
            return (
                f"{self.path}: only {count} of {self.frame_count} frames can be read, the file is truncated or damaged "
                "- those frames were processed"
            )
        end, duration = seconds + 1 / self.rate, self.frame_count / self.rate
        if end + SLACK >= duration:
            return None
        return (
            f"{self.path}: its frames end after {end:.1f} of {duration:.1f} seconds; unless only its sound is longer, "
            "the file is truncated or damaged - those frames were processed"
        )


def open_video(path: Path, max_pixels: int) -> Video:
    """Open a video file and read its rate and number of frames.

    Raises:
        UsageError: The file is not a readable video, has no readable frame, or has frames of more than `max_pixels`.
    """
    start = first_bytes(path, 189)
    container = next((name for name, begins in CONTAINERS.items() if begins(start)), None)
    not_readable = f"{path} is not a readable video - convert it to MP4, or leave it out"
    if container is None:
        raise UsageError(not_readable)
    # An absolute path cannot begin with the name of one of FFmpeg's protocols.
    capture = cv2.VideoCapture(os.path.abspath(path))
    try:
        if not capture.isOpened():
            raise UsageError(not_readable)
        width, height = (int(capture.get(number)) for number in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        require_size(path, width, height, max_pixels)
        rate, frame_count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        if not capture.read()[0]:
            raise UsageError(
                f"{path} has no readable frame: it is damaged, or in a codec that OpenCV does not decode, such as AV1 "
                "- restore it, convert it to H.264 or VP9, or leave it out"
            )
    finally:
        capture.release()
    return Video(path, rate if 0 < rate < 1000 else DEFAULT_RATE, max(0, round(frame_count)), container)
