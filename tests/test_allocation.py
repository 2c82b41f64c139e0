"""Freed memory stays with the process where networks run on the CPU."""

import platform
import subprocess
import sys

import pytest

PROBE = """
import resource, sys, torch
from segdeconv.allocation import keep_freed
if sys.argv[1] == "kept":
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
    done = subprocess.run([sys.executable, "-c", PROBE, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library decides by itself")
def test_a_tensor_of_the_next_step_takes_the_memory_of_the_last_one():
    pages = (64 << 20) // 4096
    assert faults("kept") < pages / 10
    assert faults("given back") > pages  # four times over, or a quarter of that in larger pages
