"""Runs that are killed, filled up, stopped or robbed, a few of each kind; `make chaos` does it by the hundred."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parents[1] / "chaos.py"


def struck(tmp_path, *words, timeout=300):
    """How often a suite of chaos.py struck, when none of its trials was wrong."""
    done = subprocess.run(
        [sys.executable, str(CHAOS), *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHAOS.parents[1]), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"(\w+): 0 of \d+ trials wrong .*; (\d+) struck", done.stdout)
    assert found, done.stdout
    return {suite: int(times) for suite, times in found}


def test_a_run_that_is_killed_or_stopped_anywhere_or_finds_its_disk_full_goes_on_to_the_same_bits(tmp_path):
    """The signals are those of `timeout`, of a terminal closed before the first step, of Ctrl-C at the end."""
    times = struck(tmp_path, "kills=1", "cuts=1", "full_disks=1", "signals=3")
    assert times["kills"] >= 1
    assert times["cuts"] >= 1
    assert times["signals"] == 3


@pytest.mark.slow
def test_workers_caches_and_stops_change_no_bit_and_no_fault_hangs_a_run(tmp_path):
    assert set(struck(tmp_path, "one_hash", "faults", "--trials", "30", timeout=900)) == {"one_hash", "faults"}
