"""Available and peak memory, and the way glibc handles freed memory."""

import ctypes
import os
import sys
from pathlib import Path

import torch

from segdeconv.system import KEEP_FREED


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of an accelerator or of the machine ran out."""
    cpu_allocation_failed = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or cpu_allocation_failed


def available(device: torch.device) -> int | None:
    """Return the bytes that are free on a device, or None where the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def peak(*, reset: bool = False) -> int:
    """Return the peak memory of this process in bytes, on the GPU if there is one.

    Args:
        reset: Whether to restart from the current memory use. Has no effect on macOS and Windows without a GPU.
    """
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if not sys.platform.startswith("linux"):
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:  # getrusage would start with the memory of the parent process
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def readable(count: int) -> str:
    """Return a number of bytes in readable form.

    >>> readable(3 << 29), readable(3 << 20)
    ('1.5 GiB', '3 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # constants from glibc's malloc.h


def keep_freed(device: torch.device) -> None:
    """Let this process keep freed memory for its next step, where networks run on the CPU.

    By default, glibc returns every large tensor to the system and requests the memory again, and the system zeroes each
    page first: a fifth of a training step of SegNet. The process then stays at its peak memory. Other C libraries are
    not changed. Takes effect only in commands, which set KEEP_FREED; the Python interface changes nothing.

    Args:
        device: The device that networks run on. Devices other than the CPU change nothing.
    """
    if device.type == "cpu":
        _set(mappings=0, trim=2**31 - 1)


def release_memory() -> None:
    """Undo `keep_freed`: restore glibc's defaults and return all free memory to the system at once.

    For images so large that one fills much of the memory: otherwise fragmentation would keep all of it. Also for
    measurements of memory, which would otherwise start with the kept memory.
    """
    _set(mappings=65_536, trim=128 << 10)
    _call("malloc_trim", 0)


def _set(*, mappings: int, trim: int) -> None:
    _call("mallopt", M_MMAP_MAX, mappings)
    _call("mallopt", M_TRIM_THRESHOLD, trim)


def _call(name: str, *values: int) -> None:
    """Call a function of glibc if it exists and KEEP_FREED is set."""
    if sys.platform.startswith("linux") and os.environ.get(KEEP_FREED):
        function = getattr(ctypes.CDLL(None), name, None)
        if function is not None:
            function(*values)
