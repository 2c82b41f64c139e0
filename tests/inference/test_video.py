"""Overlays of videos: their frames, times and sound are compared with those of the source, as ffmpeg reads both."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import browser_page, needs_chromium

from segdeconv.errors import DiskError, UsageError
from segdeconv.inference import video_writer as module
from segdeconv.inference.video import Video, open_video
from segdeconv.inference.video_writer import video_writer

FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="ffmpeg is not installed: install Debian's package ffmpeg")
RED, BLUE = (200, 40, 90), (30, 160, 220)


def ffmpeg(*words: str) -> str:
    done = subprocess.run([str(FFMPEG), "-hide_banner", "-loglevel", "error", "-y", *words], capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def packets(path: Path) -> tuple[dict[int, str], dict[int, list[tuple[float, str]]]]:
    """Return the codec of each stream, and the time in seconds and the checksum of each of its packets."""
    text = ffmpeg("-i", str(path), "-map", "0:v", "-map", "0:a?", "-c", "copy", "-f", "framecrc", "-")
    codecs = {int(number): name for number, name in re.findall(r"#codec_id (\d+): (\S+)", text)}
    bases = {int(number): int(a) / int(b) for number, a, b in re.findall(r"#tb (\d+): (\d+)/(\d+)", text)}
    found: dict[int, list[tuple[float, str]]] = {number: [] for number in codecs}
    for line in text.splitlines():
        if not line.startswith("#"):
            number, _, time, _, _, crc, *_ = (part.strip() for part in line.split(","))
            found[int(number)].append((int(time) * bases[int(number)], crc))
    return codecs, found


def write_copy(source: Path, out: Path) -> Video:
    video = open_video(source, 1_000_000)
    with video_writer(out, video) as writer:
        for image, seconds in video.frames():
            writer.write(image, seconds)
    return video


FRAMES = ("-f", "lavfi", "-i", "testsrc2=size=64x48:rate={}:duration=1")
SOUND = ("-f", "lavfi", "-i", "sine=frequency=440:duration=1")
VARYING = ("-vf", "select='lt(n,9)+not(mod(n,7))'", "-vsync", "vfr")
SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "constant.mp4": ("30000/1001", (*SOUND, "-c:v", "mpeg4", "-c:a", "aac")),
    "varying.mkv": ("30", (*SOUND, *VARYING, "-c:v", "mpeg4", "-c:a", "libopus")),
    "late.mkv": ("10", ("-itsoffset", "-0.3", *SOUND, "-c:v", "mpeg4", "-c:a", "libvorbis")),
    "surround.avi": ("25", (*SOUND, "-af", "pan=5.1(side)|FL=c0|FR=c0", "-c:v", "mpeg4", "-c:a", "ac3")),
    "silent.mp4": ("24000/1001", ("-c:v", "mpeg4")),
}


@needs_ffmpeg
@pytest.mark.parametrize("name", SOURCES)
def test_an_overlay_keeps_the_times_of_the_frames_and_the_sound(name: str, tmp_path: Path) -> None:
    rate, words = SOURCES[name]
    source, out = tmp_path / name, tmp_path / "out.webm"
    ffmpeg(*(word.format(rate) for word in FRAMES), *words, str(source))
    write_copy(source, out)
    before, stored = packets(source)
    after, written = packets(out)
    assert after == ({0: "vp9"} if len(before) == 1 else {0: "vp9", 1: "vorbis" if name == "late.mkv" else "opus"})
    sounds = written.get(1, [(0.0, "")])
    begin = sounds[0][0] - stored.get(1, [(0.0, "")])[0][0]  # an encoder of sound begins up to 10 ms earlier
    assert abs(begin) < 0.025
    difference = np.subtract([time for time, _ in written[0]], [time for time, _ in stored[0]])
    assert len(written[0]) == len(stored[0])
    assert np.abs(difference - (difference.mean() if name == "silent.mp4" else 0)).max() < 0.016
    assert difference.max() - difference.min() <= 0.0021  # WebM counts in milliseconds
    if before.get(1) in ("opus", "vorbis"):
        assert [crc for _, crc in sounds] == [crc for _, crc in stored[1]]
    elif name != "silent.mp4":
        assert sounds[-1][0] == pytest.approx(1, abs=0.06)


def flat_video(path: Path, num_frames: int, size: tuple[int, int]) -> None:
    """Write a video whose left half turns from red to blue."""
    video = Video(path.with_name("none.mp4"), 30000 / 1001, num_frames, "mov")
    with video_writer(path, video) as writer:
        for number in range(num_frames):
            image = np.full((*size, 3), RED, np.uint8)
            image[:, : size[1] // 2] = RED if number < num_frames // 2 else BLUE
            writer.write(image, number * 1001 / 30000)


PLAY = """async () => {
    const video = document.querySelector("video");
    await new Promise((resolve, reject) => {
        video.onloadeddata = resolve;
        video.onerror = () => reject(video.error.message);
        if (video.readyState > 1) resolve();
    });
    video.playbackRate = 4;
    await video.play();
    await new Promise(resolve => { video.onended = resolve; });
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
    const context = canvas.getContext("2d", {willReadFrequently: true});
    context.drawImage(video, 0, 0);
    const colour = x => Array.from(context.getImageData(x, 20, 1, 1).data).slice(0, 3);
    return {
        size: [video.videoHeight, video.videoWidth], duration: video.duration, time: video.currentTime,
        colours: [colour(10), colour(50)],
    };
}"""


@needs_ffmpeg
@needs_chromium
def test_a_browser_plays_an_overlay_of_odd_size_in_its_colours(tmp_path: Path) -> None:
    flat_video(tmp_path / "out.webm", 30, (47, 61))
    content = base64.b64encode((tmp_path / "out.webm").read_bytes()).decode()
    with browser_page() as page:
        page.set_content(f'<video muted src="data:video/webm;base64,{content}"></video>')
        played: dict[str, Any] = page.evaluate(PLAY)
    assert played["size"] == [48, 62]
    assert played["duration"] == played["time"] == pytest.approx(1.001, abs=0.002)
    assert np.abs(np.subtract(played["colours"], [BLUE, RED])).max() <= 6


@pytest.mark.parametrize("num_frames", [1, 2, 40])
@pytest.mark.parametrize("found", [pytest.param(True, marks=needs_ffmpeg), False])
def test_a_complete_video_is_accepted(
    found: bool, num_frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not found:
        monkeypatch.setattr(module, "find_ffmpeg", lambda: None)
    path = tmp_path / f"a{module.video_suffix()}"
    flat_video(path, num_frames, (37, 51))
    images = [frame.image for frame in open_video(path, 10_000).frames()]
    assert len(images) == num_frames
    assert images[0].shape == (38, 52, 3)  # the last row and column are repeated
    assert np.abs(images[-1][-1, -1].astype(int) - np.array(RED)).max() < 12
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@needs_ffmpeg
@pytest.mark.parametrize(
    ("failing", "error", "message"),
    [
        ("cat >/dev/null; echo 'out.webm: No space left on device' >&2; exit 1", DiskError, "No space left on device"),
        ("echo 'Unknown option' >&2; exit 1", UsageError, "could not be encoded by .*: Unknown option - update ffmpeg"),
        ("head -c 100 >/dev/null; kill -9 $$", UsageError, "exit code -9"),
        ("cat >/dev/null", DiskError, "it has 0 of 3 frames"),
    ],
)
def test_a_failing_encoder_is_one_message_and_leaves_no_file(
    failing: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text(f'#!/bin/sh\ncase "$*" in *pipe:0*) {failing};; esac\n')
    program.chmod(0o755)
    monkeypatch.setattr(module, "find_ffmpeg", lambda: module.FFmpeg(str(program), "libopus"))
    (tmp_path / "out").mkdir()
    with pytest.raises(error, match=message):
        flat_video(tmp_path / "out" / "a.webm", 3, (480, 640))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("start", ["#EXTM3U\n#EXTINF:1,\nb.mp4\n", "ffconcat version 1.0\nfile b.mp4\n", "v=0\r\no=-"])
def test_a_playlist_is_not_a_video(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_ffmpeg", lambda: None)
    flat_video(tmp_path / "b.mp4", 3, (32, 32))
    (tmp_path / "a.mp4").write_text(start)
    with pytest.raises(UsageError, match="is not a readable video"):
        open_video(tmp_path / "a.mp4", 10_000)


@needs_ffmpeg
@pytest.mark.parametrize("name", ["-i.mp4", "concat:b.mp4", "%03d.mp4", "it's \\ a film.mp4"])
def test_a_file_name_is_neither_an_option_nor_an_address(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=32x32:duration=0.2", *SOUND, "-c:a", "aac", "-f", "mp4", f"file:{name}")
    write_copy(Path(name), Path(f"{name}.webm"))
    assert packets(tmp_path / f"{name}.webm")[0] == {0: "vp9", 1: "opus"}


def test_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    video = Video(tmp_path / "none.mp4", 25, 2, "mov")
    with video_writer(tmp_path / f"a{module.video_suffix()}", video) as writer:
        writer.write(np.zeros((32, 32, 3), np.uint8), 0.0)
        with pytest.raises(UsageError, match=r"frames of several sizes: .* from 32x32 to 16x32 \(HxW\)"):
            writer.write(np.zeros((16, 32, 3), np.uint8), 0.04)


@pytest.mark.parametrize(
    ("container", "count", "seconds", "expected"),
    [
        ("mov", 12, 0.44, None),
        ("mov", 11, 0.40, "only 11 of 12 frames can be read"),
        ("matroska", 5, 0.44, None),  # a varying rate
        ("matroska", 12, 0.44, None),
        ("matroska", 5, 0.16, None),  # the sound may be a little longer
        ("matroska", 250, 9.96, None),
    ],
)
def test_a_truncated_video_is_told_from_a_varying_rate(
    container: str, count: int, seconds: float, expected: str | None
) -> None:
    message = Video(Path("a.mkv"), 25, 12, container).describe_missing(count, seconds)
    assert message is None if expected is None else expected in str(message)
    long = Video(Path("a.mkv"), 25, 250, "matroska").describe_missing(100, 3.96)
    assert long is not None
    assert "its frames end after 4.0 of 10.0 seconds" in long
