"""Freed memory stays with the process where networks run on the CPU."""

import os
import platform
import subprocess
import sys

import pytest

from segdeconv.system import KEEP_FREED

PROBE = """
import resource, sys, torch
from segdeconv.system.memory import keep_freed
if sys.argv[1] != "given back":
    keep_freed(torch.device("cpu"))
else:
    keep_freed(torch.device("meta"))  # another device: nothing is changed
def step():
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
for _ in range(40):  # small tensors settle in what was freed, for up to 11 steps; then the heap keeps its shape
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    environment = {name: value for name, value in os.environ.items() if name != KEEP_FREED}
    if how != "from Python":
        environment[KEEP_FREED] = "1"
    done = subprocess.run(
        [sys.executable, "-c", PROBE, how], capture_output=True, text=True, check=True, env=environment
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library decides by itself")
def test_a_tensor_of_the_next_step_takes_the_memory_of_the_last_one():
    pages = (64 << 20) // 4096
    assert faults("kept") < pages / 10
    assert faults("from Python") > pages  # whose process it is not to change
    assert faults("given back") > pages  # four times over, or a quarter of that in larger pages


HELD = """
import torch
from segdeconv.system.memory import release_memory, keep_freed
from segdeconv.system.memory import peak
keep_freed(torch.device("cpu"))
start = peak(anew=True)
large = [torch.empty(4 << 20, dtype=torch.uint8).fill_(1) for _ in range(64)]
del large
kept = peak(anew=True) - start
release_memory()
print(kept, peak(anew=True) - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library decides by itself")
def test_what_was_kept_can_be_handed_back_before_memory_is_measured():
    # Where there is a GPU its memory would be measured.
    cpu = {**os.environ, KEEP_FREED: "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True, env=cpu)
    kept, left = map(int, done.stdout.split())
    assert kept > 250 << 20  # of 256 MiB that are free
    assert left < 32 << 20
