"""Available memory, and the freed memory that commands keep where networks run on the CPU."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from segdeconv.system import KEEP_FREED
from segdeconv.system.memory import available

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
import threading
import torch
from segdeconv.system.memory import keep_freed, peak, release_memory, resident
torch.empty(30 << 20, dtype=torch.uint8).fill_(1)  # glibc then takes up to 30 MiB from heaps, as in any long program
keep_freed(torch.device("cpu"))
start = peak(reset=True)
def fill():
    large = [torch.empty(4 << 20, dtype=torch.uint8).fill_(1) for _ in range(64)]
fill()
kept = peak(reset=True) - start
release_memory()
left = peak(reset=True) - start
thread = threading.Thread(target=fill)
thread.start()
thread.join()
print(kept, left, resident() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is tuned")
def test_kept_memory_can_be_released_and_is_not_kept_again():
    # With a GPU, its memory would be measured instead.
    cpu = {**os.environ, KEEP_FREED: "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True, env=cpu)
    kept, left, left_by_thread = map(int, done.stdout.split())
    assert kept > 250 << 20  # of the 256 MiB that were freed
    assert left < 32 << 20
    assert left_by_thread < 32 << 20


GIB = 1 << 30
MEMINFO = {"proc/meminfo": f"MemTotal:  {64 << 20} kB\nMemFree:  {1 << 20} kB\nMemAvailable:  {40 << 20} kB\n"}
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


def limits(folder, limit, used, dropped, *, v1=False):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    prefix = "total_" if v1 else ""
    stat = f"anon 7\nactive_file 5\n{prefix}active_file {dropped // 2}\n{prefix}inactive_file {dropped // 2}\nname\n"
    return {f"{folder}/{names[0]}": f"{limit}\n", f"{folder}/{names[1]}": f"{used}\n", f"{folder}/memory.stat": stat}


@pytest.mark.parametrize(
    ("files", "expected"),
    {
        "no limit": (MEMINFO, 40),
        "v2 in a container": (MEMINFO | limits(V2, 16 * GIB, 12 * GIB, 8 * GIB), 12),
        "v2 without a limit": (MEMINFO | limits(V2, "max", 12 * GIB, 0), 40),
        "v2, looser than the machine": (MEMINFO | limits(V2, 60 * GIB, GIB, 0), 40),
        "v2, of an outer group": (
            MEMINFO | {"proc/self/cgroup": "0::/job/step\n"} | limits(f"{V2}/job", 8 * GIB, 2 * GIB, 0)
            | limits(f"{V2}/job/step", "max", GIB, 0) | limits(f"{V2}/other", GIB, 0, 0), 6,
        ),
        "v1 in a container": (
            MEMINFO | {"proc/self/cgroup": "3:cpu,memory:/docker/1\n"}
            | limits(V1, 4 * GIB, 3 * GIB, 2 * GIB, v1=True), 3,
        ),
        "v1 on a cluster": (
            MEMINFO | {"proc/self/cgroup": "3:memory:/slurm/1\n0::/\n"} | limits(V1, (1 << 63) - 4096, GIB, 0, v1=True)
            | limits(f"{V1}/slurm/1", 8 * GIB, GIB, 0, v1=True), 7,
        ),
        "over the limit": (MEMINFO | limits(V2, GIB, 2 * GIB, 0), 0),
        "no statistics": (MEMINFO | {f"{V2}/memory.max": str(2 * GIB), f"{V2}/memory.current": str(GIB)}, 1),
        "no usage": (MEMINFO | {f"{V2}/memory.max": str(2 * GIB)}, 40),
        "outside of what is seen": (MEMINFO | {"proc/self/cgroup": "0::/../../x\n"} | limits("sys/x", GIB, 0, 0), 40),
        "another system": ({}, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 / GIB),
    }.values(),
)  # fmt: skip
def test_available_memory_includes_the_file_cache_and_respects_limits(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available(torch.device("cpu"), root=tmp_path) == expected * GIB


def test_available_memory_of_this_machine():
    assert 0 < available(torch.device("cpu")) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert available(torch.device("meta")) is None
