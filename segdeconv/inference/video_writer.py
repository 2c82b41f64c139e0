"""Writing of videos: VP9 in WebM, which browsers play, with the sound of another video, by the program ffmpeg.

Without ffmpeg, OpenCV writes MPEG-4 part 2 without sound. PyAV is not used: its wheels contain x264 and x265, whose
licence is the GPL.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import IO, NamedTuple

import cv2
import numpy as np

from segdeconv.errors import DiskError, SegdeconvError, UsageError, warn
from segdeconv.inference.video import Video
from segdeconv.system.files import replacing_path

ENCODER = "libvpx-vp9"
# Its mode "realtime" is three times as fast as "good", with the same size and the same difference from the frames.
OPTIONS = ("-c:v", ENCODER, "-crf", "31", "-b:v", "0", "-deadline", "realtime", "-cpu-used", "6", "-row-mt", "1")
SOUND_ENCODERS = ("libopus", "libvorbis")
IN_WEBM = frozenset({"opus", "vorbis"})  # sound that is copied instead of encoded
SILENT = ("-nostdin", "-hide_banner", "-loglevel", "error")
# RGB to YUV as in high-definition television, which the file states, since players guess otherwise.
COLOURS = (
    *("-vf", "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p", "-colorspace", "bt709"),
    *("-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"),
)
PACKETS = ("-c", "copy", "-f", "framecrc", "pipe:1")  # a line for each packet: stream, time of decoding, time, ...
REPRODUCIBLE = ("-map_metadata", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-flags:a", "+bitexact")
DISK_PROBLEMS = tuple(
    os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS)
)
WITHOUT_FFMPEG = (
    "no program ffmpeg that encodes VP9 is on PATH, so the overlays of videos are MP4 files without sound, that "
    "browsers do not play - install it (Debian, Ubuntu: apt install ffmpeg), or add --no-overlay"
)


class FFmpeg(NamedTuple):
    """A program ffmpeg that encodes VP9.

    Attributes:
        program: Path of the program.
        sound_encoder: One of SOUND_ENCODERS; None if it has none of them.
    """

    program: str
    sound_encoder: str | None


@functools.cache
def find_ffmpeg() -> FFmpeg | None:
    """Return the program ffmpeg on PATH; None if there is none, or if it does not encode VP9."""
    program = shutil.which("ffmpeg")
    if program is None:
        return None
    try:
        listing = subprocess.run([program, *SILENT, "-encoders"], stdin=subprocess.DEVNULL, capture_output=True)
    except OSError:
        return None
    names = {
        words[1] for line in listing.stdout.decode(errors="replace").splitlines() if len(words := line.split()) > 1
    }
    sound = next((name for name in SOUND_ENCODERS if name in names), None)
    return FFmpeg(program, sound) if ENCODER in names else None


def video_suffix() -> str:
    """Return the suffix of the files that `video_writer` writes on this machine."""
    return ".webm" if find_ffmpeg() else ".mp4"


@contextmanager
def video_writer(path: Path, source: Video) -> Iterator[VideoWriter]:
    """Open a writer of a video, whose file appears under its name once it is complete and verified.

    Args:
        path: The file to write, with the suffix `video_suffix()`.
        source: The video whose frame rate and sound are kept.

    Raises:
        UsageError: The frames cannot be encoded.
        DiskError: The file could not be written.
    """
    ffmpeg = find_ffmpeg()
    with replacing_path(path) as partial, tempfile.TemporaryFile() as messages:
        partial.touch()  # an error of the disk is raised here rather than hidden by the encoder
        writer = (
            MP4Writer(partial, path, source) if ffmpeg is None else WebMWriter(partial, path, source, ffmpeg, messages)
        )
        try:
            yield writer
            if problem := writer.finish():
                raise DiskError(
                    f"{path} could not be written: {problem} - free some space, or choose another folder, and run the "
                    "same command again"
                )
        finally:
            writer.close()


class VideoWriter(ABC):
    """A writer of a video file, whose sides are even: at an odd one, the last row or column is repeated.

    The colours have half the resolution of the brightness, and MPEG-4 part 2 does not allow odd sides.

    Args:
        partial: The file to write.
        path: The name that it gets at the end, for error messages.
        source: The video whose frame rate is kept.
    """

    def __init__(self, partial: Path, path: Path, source: Video) -> None:
        self.partial, self.path, self.source, self.num_frames = partial, path, source, 0
        self.size: tuple[int, ...] = ()

    def write(self, image: np.ndarray, seconds: float) -> None:
        """Append a frame.

        Args:
            image: (H, W, 3) uint8 RGB; all frames have one size.
            seconds: Time of the frame, greater than that of the frame before it.

        Raises:
            UsageError: The frame has another size than the first.
        """
        odd = (image.shape[0] % 2, image.shape[1] % 2)
        if not self.size:
            self.size = image.shape
            self._open(image.shape[0] + odd[0], image.shape[1] + odd[1])
        if image.shape != self.size:
            first, other = (f"{height}x{width}" for height, width, _ in (self.size, image.shape))
            raise UsageError(
                f"{self.source.path} has frames of several sizes: its overlay would change from {first} to {other} "
                "(HxW) - convert it to one size"
            )
        self._append(cv2.copyMakeBorder(image, 0, odd[0], 0, odd[1], cv2.BORDER_REPLICATE), seconds)
        self.num_frames += 1

    @abstractmethod
    def finish(self) -> str | None:
        """Complete and verify the file; return what is wrong with it, or None.

        Raises:
            UsageError: The frames cannot be encoded.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop the encoder, if it still runs."""

    @abstractmethod
    def _open(self, height: int, width: int) -> None:
        """Start the encoder."""

    @abstractmethod
    def _append(self, image: np.ndarray, seconds: float) -> None:
        """Encode a frame."""


class WebMWriter(VideoWriter):
    """A writer of WebM files with VP9, and Opus or Vorbis, by the program ffmpeg.

    The frames reach it through a pipe as an uncompressed Matroska file, which has the time of each frame, so that a
    varying frame rate is kept to the millisecond.
    """

    def __init__(self, partial: Path, path: Path, source: Video, ffmpeg: FFmpeg, messages: IO[bytes]) -> None:
        super().__init__(partial, path, source)
        self.ffmpeg = ffmpeg
        self.process: subprocess.Popen[bytes] | None = None
        self.messages = messages

    def _open(self, height: int, width: int) -> None:
        start, source, sound = self._sound()
        command = [self.ffmpeg.program, "-y", *SILENT, "-itsoffset", f"{start:.6f}", "-f", "matroska", "-i", "pipe:0"]
        command += [*source, "-map", "0:v:0", *COLOURS, *OPTIONS, "-enc_time_base", "1/1000", *sound]
        command += [*REPRODUCIBLE, "-f", "webm", _url(self.partial)]
        # In a session of its own, since an interruption from the keyboard is for the command, which ends it.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self.messages, start_new_session=True
        )
        self._send(matroska_header(height, width, self.source.rate))

    def _append(self, image: np.ndarray, seconds: float) -> None:
        self._send(matroska_frame_header(seconds, image.nbytes))
        self._send(np.ascontiguousarray(image).data)

    def _send(self, data: bytes | memoryview) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(data)
        except BrokenPipeError:
            raise self._failure() from None

    def finish(self) -> str | None:
        if self.process is None:
            return "it has no frames"
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        if self.process.wait():
            raise self._failure()
        packets = subprocess.run(
            [self.ffmpeg.program, *SILENT, "-f", "matroska", "-i", _url(self.partial), "-map", "0:v:0", *PACKETS],
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        count = sum(not line.startswith(b"#") for line in packets.stdout.splitlines())
        return None if count == self.num_frames else f"it has {count} of {self.num_frames} frames"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdin is not None
            with suppress(BrokenPipeError):
                self.process.stdin.close()

    def _failure(self) -> SegdeconvError:
        """Return the error for an ffmpeg that has stopped, or is about to."""
        assert self.process is not None
        code = self.process.wait()
        self.messages.seek(0)
        lines = self.messages.read().decode(errors="replace").split("\n")
        reason = next((line for line in reversed(lines) if line.strip()), f"exit code {code}").strip()
        if code == -getattr(signal, "SIGXFSZ", 0) or any(problem in "\n".join(lines) for problem in DISK_PROBLEMS):
            reason = os.strerror(errno.EFBIG) if code < 0 else reason
            return DiskError(
                f"{self.path} could not be written: {reason} - free some space, or choose another folder, and run the "
                "same command again"
            )
        return UsageError(
            f"the overlay of {self.source.path} could not be encoded by {self.ffmpeg.program}: {reason} - update "
            "ffmpeg, or add --no-overlay"
        )

    def _sound(self) -> tuple[float, list[str], list[str]]:
        """Return the time of the first frame in the source, and the options of input and output for its sound."""
        program, encoder = self.ffmpeg
        # Reads no other file than the source, and only as the format that it begins with.
        source = ["-protocol_whitelist", "file,pipe", "-f", self.source.container, "-i", _url(self.source.path)]
        selected = ["-map", "0:V:0", "-frames:v", "1", "-map", "0:a?", "-frames:a", "1"]
        found = subprocess.run(
            [program, *SILENT, *source, *selected, *PACKETS], stdin=subprocess.DEVNULL, capture_output=True
        ).stdout.decode(errors="replace")
        codecs = dict(re.findall(r"^#codec_id (\d+): (\S+)$", found, re.MULTILINE))
        base = re.search(r"^#tb 0: (\d+/\d+)$", found, re.MULTILINE)
        first = re.search(r"^0, *-?\d+, *(-?\d+),", found, re.MULTILINE)
        sounds = {name for number, name in codecs.items() if number != "0"}
        copied = sounds <= IN_WEBM
        if base is None or first is None:
            start, lacking = 0.0, "cannot read it"
        else:
            start = max(0.0, int(first[1]) * float(Fraction(base[1])))
            lacking = "" if copied or encoder else "encodes neither Opus nor Vorbis"
        if lacking:
            warn(f"{self.source.path}: the overlay has no sound, since {program} {lacking} - install another ffmpeg")
        if lacking or not sounds:
            return start, [], []
        if copied:
            return start, source, ["-map", "1:a", "-c:a", "copy"]
        return (
            start,
            source,
            ["-map", "1:a", "-c:a", str(encoder), "-af", "aformat=channel_layouts=7.1|5.1|stereo|mono"],
        )


class MP4Writer(VideoWriter):
    """A writer of MP4 files with MPEG-4 part 2, which the FFmpeg in OpenCV always includes.

    The frame rate is constant.
    OpenCV does not report a failed write, such as on a full disk, so the file is opened again at the end.
    """

    writer: cv2.VideoWriter | None = None

    def _open(self, height: int, width: int) -> None:
        code = cv2.VideoWriter.fourcc(*"mp4v")
        self.writer = cv2.VideoWriter(str(self.partial), code, self.source.rate, (width, height))
        if not self.writer.isOpened():
            raise UsageError(
                f"the overlay of {self.source.path} cannot be encoded: this OpenCV has no MP4 encoder - install "
                "opencv-python-headless, or ffmpeg"
            )

    def _append(self, image: np.ndarray, seconds: float) -> None:
        assert self.writer is not None
        self.writer.write(np.ascontiguousarray(image[:, :, ::-1]))

    def finish(self) -> str | None:
        self.close()
        capture = cv2.VideoCapture(str(self.partial))
        try:
            count = max(0, round(capture.get(cv2.CAP_PROP_FRAME_COUNT))) if capture.isOpened() else 0
            capture.set(cv2.CAP_PROP_POS_FRAMES, self.num_frames - 1)
            if count == self.num_frames and capture.read()[0]:
                return None
        finally:
            capture.release()
        return f"it has {count} of {self.num_frames} frames, or they cannot be read back"

    def close(self) -> None:
        if self.writer is not None:
            self.writer.release()


def _url(path: Path) -> str:
    """Return the name of a file for ffmpeg, which takes other names as options or protocols."""
    return f"file:{os.path.abspath(path)}"


# Matroska, RFC 9559, with the elements that an uncompressed video needs.


def matroska_header(height: int, width: int, rate: float) -> bytes:
    """Return the beginning of an endless Matroska file of RGB frames, with times in microseconds.

    Args:
        height: Height of the frames.
        width: Width of the frames.
        rate: Mean number of frames per second.
    """
    document = _number("4287", 4) + _number("4285", 2) + _element("4282", b"matroska")
    video = _number("b0", width) + _number("ba", height) + _element("2eb524", b"RGB\x18")
    track = _number("d7", 1) + _number("73c5", 1) + _number("83", 1) + _element("86", b"V_UNCOMPRESSED")
    track += _number("23e383", round(1e9 / rate))
    endless_segment = bytes.fromhex("18538067") + b"\x01" + 7 * b"\xff"
    return (
        _element("1a45dfa3", document)
        + endless_segment
        + _element("1549a966", _number("2ad7b1", 1000))  # nanoseconds of a unit of time
        + _element("1654ae6b", _element("ae", track + _element("e0", video)))
    )


def matroska_frame_header(seconds: float, length: int) -> bytes:
    """Return what precedes the `length` bytes of a frame: the beginning of a cluster of one block."""
    block_header = b"\x81\0\0\x80"  # track 1, at the time of the cluster, a key frame
    time = _number("e7", round(1e6 * seconds))
    block = bytes.fromhex("a3") + _length(len(block_header) + length) + block_header
    return bytes.fromhex("1f43b675") + _length(len(time) + len(block) + length) + time + block


def _element(name: str, content: bytes) -> bytes:
    return bytes.fromhex(name) + _length(len(content)) + content


def _number(name: str, value: int) -> bytes:
    return _element(name, value.to_bytes(8, "big"))


def _length(value: int) -> bytes:
    return b"\x01" + value.to_bytes(7, "big")
