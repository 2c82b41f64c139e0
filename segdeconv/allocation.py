"""What becomes of memory that a network on a CPU has given back."""

from __future__ import annotations

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed(device: torch.device) -> None:
    """Have this process keep freed memory for its next step, where networks run on the CPU.

    Left to itself, glibc hands every large tensor back to the system and asks for it anew, and the system fills each
    page with zeros first: a fifth of a training step of SegNet. Of other C libraries nothing is asked. What the process
    holds is then what it held at its peak.
    """
    if device.type == "cpu":
        _set(mappings=0, trim=2**31 - 1)


def hand_back() -> None:
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
    """A function of glibc's, where there is one."""
    if sys.platform.startswith("linux"):
        function = getattr(ctypes.CDLL(None), name, None)
        if function is not None:
            function(*values)
