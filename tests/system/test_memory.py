"""Commands keep freed memory where networks run on the CPU."""

import os
import platform
import subprocess
import sys

import pytest

from segdeconv.system import KEEP_FREED

PROBE = """
import resource, sys, torch
from segdeconv.system.memory import keep_freed
if sys.argv[1] != "released":
    keep_freed(torch.device("cpu"))
else:
    keep_freed(torch.device("meta"))  # another device, which changes nothing
def step():
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
for _ in range(40):  # small tensors fill freed memory for up to 11 steps; then the heap is stable
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode):
    environment = {name: value for name, value in os.environ.items() if name != KEEP_FREED}
    if mode != "from Python":
        environment[KEEP_FREED] = "1"
    done = subprocess.run(
        [sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True, env=environment
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is tuned")
def test_the_next_step_reuses_the_memory_of_the_last_one():
    pages = (64 << 20) // 4096
    assert page_faults("kept") < pages / 10
    assert page_faults("from Python") > pages  # the process of another program is not changed
    assert page_faults("released") > pages  # four times over, or a quarter of that in larger pages


HELD = """
import torch
from segdeconv.system.memory import release_memory, keep_freed
from segdeconv.system.memory import peak
keep_freed(torch.device("cpu"))
start = peak(reset=True)
large = [torch.empty(4 << 20, dtype=torch.uint8).fill_(1) for _ in range(64)]
del large
kept = peak(reset=True) - start
release_memory()
print(kept, peak(reset=True) - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is tuned")
def test_kept_memory_can_be_released_before_memory_is_measured():
    # With a GPU, its memory would be measured instead.
    cpu = {**os.environ, KEEP_FREED: "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True, env=cpu)
    kept, left = map(int, done.stdout.split())
    assert kept > 250 << 20  # of the 256 MiB that were freed
    assert left < 32 << 20
