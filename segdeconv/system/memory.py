"""Available and peak memory, and the way glibc handles freed memory."""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from segdeconv.system import KEEP_FREED


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of an accelerator or of the machine ran out."""
    cpu_allocation_failed = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or cpu_allocation_failed


def available(device: torch.device, *, root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that are available on a device, or None where the system does not report them.

    For the CPU, this is what the kernel can provide without swapping (MemAvailable): the free memory and the file cache
    that it would drop. In a container or a job of a scheduler it is at most what the limits of its control groups (v1
    or v2) leave, where the file cache does not count as used either. Without /proc/meminfo, as on macOS, it is half of
    the physical memory.

    Args:
        device: The device.
        root: The folder that contains proc/ and sys/.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = _numbers(root / "proc" / "meminfo").get("MemAvailable:")
    if free is not None:
        return min(1024 * free, *_left_by_limits(root), sys.maxsize)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return None


def _left_by_limits(root: Path) -> Iterator[int]:
    """Yield the bytes that the memory limit of each control group of this process leaves."""
    groups = root / "sys" / "fs" / "cgroup"
    folders = {groups: "", groups / "memory": "total_"}  # of v2 and v1, with the prefix of their sums in memory.stat
    for line in _lines(root / "proc" / "self" / "cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        parts = Path(path.lstrip("/")).parts
        if ".." in parts:  # outside the part of the tree that this process sees
            continue
        for depth in range(1, len(parts) + 1):
            if number == "0" and not controllers:
                folders[groups.joinpath(*parts[:depth])] = ""
            elif "memory" in controllers.split(","):
                folders[groups.joinpath("memory", *parts[:depth])] = "total_"
    for folder, prefix in folders.items():
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if prefix else ("memory.max", "memory.current")
        limit, used = (next(iter(_lines(folder / name)), "") for name in names)
        if limit.isdecimal() and used.isdecimal():  # without a limit, v2 has the word max
            numbers = _numbers(folder / "memory.stat")
            dropped = sum(numbers.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
            yield max(0, int(limit) - max(0, int(used) - dropped))


def _numbers(path: Path) -> dict[str, int]:
    """Return the number after the name in each line of a file of the kernel."""
    rows = [line.split() for line in _lines(path)]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _lines(path: Path) -> list[str]:
    """Return the lines of a file; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


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
    return 1024 * _numbers(Path("/proc/self/status"))["VmHWM:"]


def resident() -> int:
    """Return the bytes of this process in the machine's memory now, or 0 where the system does not report them."""
    return 1024 * _numbers(Path("/proc/self/status")).get("VmRSS:", 0)


def readable(count: int) -> str:
    """Return a number of bytes in readable form.

    Examples:
        >>> readable(3 << 29), readable(3 << 20)
        ('1.5 GiB', '3 MiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # constants from glibc's malloc.h


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
    # glibc raises this threshold while a program runs, and what a thread then frees below it is kept.
    _call("mallopt", M_MMAP_THRESHOLD, 128 << 10)
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
