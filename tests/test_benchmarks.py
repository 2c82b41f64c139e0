"""The benchmarks run, and count what they say."""

import pytest

from segdeconv.benchmarks import kernels


def test_rows_say_what_was_timed_and_how_many_bytes_moved(monkeypatch):
    monkeypatch.setattr(kernels, "_median", lambda call, device, seconds: call() is None or 0.001)  # calls each once
    rows = kernels.measure(shape=(1, 4, 5, 6), layouts=("channels_last",), dtypes=("fp16",), device="cpu")
    by_what = {row["what"]: row for row in rows}
    assert len(by_what) == len(rows) == 1 + 4 * 4
    # By hand: 1x4x5x6 values of two bytes, 1x4x3x3 maxima and as many switches; four packed ones take a byte.
    moved = {"copy": 480, "pool forward, segdeconv": 240 + 72 + 36, "unpool backward, torch's pair": 240 + 72 + 36}
    moved["pool backward, segdeconv, packed switches"] = 240 + 72 + 9
    for what, nbytes in moved.items():
        row = by_what[f"{what}, channels_last fp16 1x4x5x6"]
        assert row["gb_per_s"] == pytest.approx(nbytes / 1e6)
        assert row["share_of_copy"] == pytest.approx(nbytes / 480)
        assert row["ms"] == 1


def test_times_are_measured():
    row = kernels.measure(shape=(1, 2, 4, 4), layouts=("contiguous",), dtypes=("fp32",), device="cpu", seconds=0)[-1]
    assert 0 < row["ms"] < 1000
