"""A few fault-injection trials of each kind on training runs; `make chaos` runs hundreds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_commands import child_environment

CHAOS = Path(__file__).parents[1] / "chaos.py"


def injected_faults(tmp_path, *words, timeout=300):
    """Run suites of chaos.py, check that no trial failed, and return the number of injected faults of each suite."""
    done = subprocess.run(
        [sys.executable, str(CHAOS), *words],
        cwd=tmp_path,
        env=child_environment(CHAOS.parents[1], OMP_NUM_THREADS="1", TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = re.findall(r"(\w+): 0 of \d+ trials failed .*; (\d+) faults", done.stdout)
    assert results, done.stdout
    return {suite: int(count) for suite, count in results}


@pytest.mark.slow
def test_a_run_resumed_after_a_kill_a_signal_or_a_full_disk_equals_an_uninterrupted_one(tmp_path):
    """The signals come from `timeout`, a terminal closed before the first step, and Ctrl-C in the last validation."""
    counts = injected_faults(tmp_path, "kills=1", "cuts=1", "full_disks=1", "signals=3")
    assert counts["kills"] >= 1
    assert counts["cuts"] >= 1
    assert counts["signals"] == 3


@pytest.mark.slow
def test_workers_caches_and_resuming_change_no_bit_and_no_fault_hangs_a_run(tmp_path):
    assert set(injected_faults(tmp_path, "one_hash", "faults", "--trials", "30", timeout=900)) == {"one_hash", "faults"}
