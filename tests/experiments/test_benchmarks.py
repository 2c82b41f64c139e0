"""The benchmarks: what they count, their tables and plots, and the command."""

import json
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import cv2
import pytest
import torch

from segdeconv.errors import SegdeconvError
from segdeconv.experiments.benchmarks import contestants, harness, kernels, peak, plot
from segdeconv.experiments.benchmarks.contestants import Task
from segdeconv.experiments.benchmarks.parts import Table
from segdeconv.experiments.benchmarks.usual import UsualSegNet
from segdeconv.models import SegNet


def test_rows_name_the_operation_and_count_the_bytes_it_moves(monkeypatch):
    monkeypatch.setattr(kernels, "median_time", lambda call, seconds: call() or 0.001)  # calls each once
    rows = kernels.measure(shape=(1, 4, 5, 6), layouts=("channels_last",), dtypes=("fp16",), device="cpu")
    by_what = {row["what"]: row for row in rows}
    assert len(by_what) == len(rows) == 1 + 4 * 4 + 4  # the fused variants run only on a GPU
    # By hand: 1x4x5x6 values of two bytes, 1x4x3x3 maxima and as many switches; four packed switches take a byte.
    moved = {"copy": 480, "pool forward, segdeconv": 240 + 72 + 36, "unpool backward, torch's pair": 240 + 72 + 36}
    moved["pool backward, segdeconv, packed switches"] = 240 + 72 + 9
    moved["norm, ReLU and pool backward, separate steps"] = 2 * 240 + 72 + 36
    for what, nbytes in moved.items():
        row = by_what[f"{what}, channels_last fp16 1x4x5x6"]
        assert row["gb_per_s"] == pytest.approx(nbytes / 1e6)
        assert row["share_of_copy"] == pytest.approx(nbytes / 480)
        assert row["ms"] == 1


def test_times_are_measured():
    row = kernels.measure(shape=(1, 2, 4, 4), layouts=("contiguous",), dtypes=("fp32",), device="cpu", seconds=0)[-1]
    assert 0 < row["ms"] < 1000


def test_the_usual_segnet_computes_the_same_as_segdeconv():
    torch.manual_seed(0)
    network, usual = SegNet(5, switch_source="post_relu").eval(), UsualSegNet(5).eval()
    names = usual.state_dict()  # the layers have the same order
    usual.load_state_dict(dict(zip(names, network.state_dict().values(), strict=True)))
    image = torch.randn(1, 3, 45, 60)
    with torch.no_grad():
        assert torch.allclose(network(image), usual(image), atol=1e-4)
    assert len([layer for layer in usual.modules() if isinstance(layer, torch.nn.Conv2d)]) == 26


def test_operations_are_counted_for_the_convolutions():
    # 213 GFLOP for an image of 360x480, as the sum over the layer table of 2 * kernel * channels * pixels.
    size, pixels = (360, 480), [360 * 480, 180 * 240, 90 * 120, 45 * 60, 23 * 30]
    stages = [[3, 64, 64], [64, 128, 128], [128, 256, 256, 256], [256, 512, 512, 512], [512, 512, 512, 512]]
    back = [[64, 64, 11], [128, 128, 64], [256, 256, 256, 128], [512, 512, 512, 256], [512, 512, 512, 512]]
    by_hand = sum(
        2 * 9 * before * after * pixels[level]
        for table in (stages, back)
        for level, channels in enumerate(table)
        for before, after in pairwise(channels)
    )
    task = Task(1, size, 11, torch.device("cpu"))
    assert contestants.operations(SegNet(11), task, training=False) == by_hand == pytest.approx(213e9, rel=0.01)
    # Backward: twice as many, without the gradient of the image, which is not needed.
    twice = 3 * by_hand - 2 * 9 * 3 * 64 * pixels[0]
    assert contestants.operations(SegNet(11), task, training=True) == twice


def allocate(megabytes):
    buffers = []

    def step():
        buffers.clear()
        buffers.append(bytearray(megabytes << 20))

    return step


def fail():
    raise ValueError("no such network")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are exact only on Linux")
def test_a_race_returns_times_and_memory_of_each_contestant():
    timings = harness.race({"small": partial(allocate, 8), "large": partial(allocate, 200)}, repeats=3)
    assert list(timings) == ["small", "large"]
    assert all(len(timing.times) == 3 and timing.seconds == sorted(timing.times)[1] for timing in timings.values())
    assert 190 << 20 < timings["large"].memory - timings["small"].memory < 230 << 20


def test_the_error_message_names_the_contestant_that_fails():
    with pytest.raises(SegdeconvError, match=r"^broken: ValueError: no such network"):
        harness.race({"broken": fail}, repeats=1)


def test_a_table_in_markdown_has_dashes_for_missing_values():
    table = Table("Speed", [{"": "one", "seconds": 0.01234, "bytes": 2048}, {"": "two", "seconds": None, "bytes": 1}])
    assert table.markdown().splitlines() == [
        "## Speed", "", "|  | seconds | bytes |", "| --- | --- | --- |", "| one | 0.0123 | 2,048 |", "| two | – | 1 |",
    ]  # fmt: skip


def test_a_plot_has_a_panel_for_each_table_with_bars_or_lines(tmp_path):
    rows = [{"": "one", "seconds": 0.5, "images": 1}, {"": "one", "seconds": 1.5, "images": 2}]
    tables = [Table("a", rows, bar="seconds"), Table("b", rows, lines=("images", "seconds")), Table("c", rows)]
    plot.save(tables, tmp_path / "plot.png")
    assert cv2.imread(str(tmp_path / "plot.png")).shape == (520, 900, 3)


def test_the_matrix_peak_is_plausible(monkeypatch):
    monkeypatch.setattr(peak, "SIDES", (64,))
    assert 1e6 < peak.matrix_peak(torch.device("cpu"), torch.float32, seconds=0) < 1e14


@pytest.mark.slow
def test_the_command_writes_a_table_and_a_plot(tmp_path):
    script = Path(__file__).parents[2] / "scripts/benchmark.py"
    words = ["speed", "growth", "--size", "64,64", "--batch", "2", "--repeats", "1", "--minutes", "0.001"]
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    result = run([sys.executable, script, *words])
    assert result.returncode == 2
    assert "0.001 minutes are over before 'speed 1'" in result.stderr
    first = json.loads((tmp_path / "benchmark/benchmark.json").read_text())["tables"]
    words[-1] = "30"
    result = run([sys.executable, script, *words, "--resume"])
    assert result.returncode == 2
    assert "was measured with another command" in result.stderr
    text = (tmp_path / "benchmark/benchmark.json").read_text().replace("--minutes 0.001", "--minutes 30")
    (tmp_path / "benchmark/benchmark.json").write_text(text)
    result = run([sys.executable, script, *words, "--resume"])
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "benchmark/benchmark.json").read_text())["tables"][0] == first[0]
    assert {path.name for path in (tmp_path / "benchmark").iterdir()} == {
        "benchmark.json", "benchmark.md", "benchmark.png"
    }  # fmt: skip
    titles = [table["title"] for table in json.loads((tmp_path / "benchmark/benchmark.json").read_text())["tables"]]
    assert titles[0] == "Training step, 2 images of 64x64, 11 classes"
    assert len(titles) == 2 + 3
