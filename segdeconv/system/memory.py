"""Memory: how much is free, the peak of a process, and what glibc does with what was freed."""

import ctypes
import os
import sys
from pathlib import Path

import torch

from segdeconv.system import KEEP_FREED


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of memory that is not there, of an accelerator or of the machine."""
    of_the_machine = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or of_the_machine


def available(device: torch.device) -> int | None:
    """Bytes that are free for training on a device, None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def peak(*, anew: bool = False) -> int:
    """Bytes held at most by this process so far, `anew` counting from now: on a GPU there, else in memory."""
    if torch.cuda.is_available():
        if anew:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if not sys.platform.startswith("linux"):
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if anew:  # getrusage would begin with what the parent held
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def readable(count: int) -> str:
    """Bytes, for reading.

    >>> readable(3 << 29), readable(3 << 20)
    ('1.5 GiB', '3 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed(device: torch.device) -> None:
    """Have this process keep freed memory for its next step, where networks run on the CPU.

    Left to itself, glibc hands every large tensor back to the system and asks for it anew, and the system fills each
    page with zeros first: a fifth of a training step of SegNet. Of other C libraries nothing is asked. What the process
    holds is then what it held at its peak. Only in a command, which sets KEEP_FREED: from Python nothing is changed.
    """
    if device.type == "cpu":
        _set(mappings=0, trim=2**31 - 1)


def release_memory() -> None:
    """Have this process give memory back again, as a process does that was told nothing, and what is free at once.

    For images of which one alone fills a good part of the memory: what lies between the holes that they leave would
    keep all of it. And before memory is measured, which would begin with what was kept.
    """
    _set(mappings=65_536, trim=128 << 10)
    _call("malloc_trim", 0)


def _set(*, mappings: int, trim: int) -> None:
    _call("mallopt", M_MMAP_MAX, mappings)
    _call("mallopt", M_TRIM_THRESHOLD, trim)


def _call(name: str, *values: int) -> None:
    """A function of glibc's, where there is one, in a process that may tune it."""
    if sys.platform.startswith("linux") and os.environ.get(KEEP_FREED):
        function = getattr(ctypes.CDLL(None), name, None)
        if function is not None:
            function(*values)
