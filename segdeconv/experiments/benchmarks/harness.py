"""Contestants in turn: each lives in a process of its own, and they take turns, so that a busy machine hurts all alike.

A process of its own also gives each its own peak of memory, which nothing can reset on a CPU.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from segdeconv.errors import SegdeconvError
from segdeconv.system.memory import peak

Build = Callable[[], Callable[[], None]]  # makes a contestant ready; what it returns is one repetition


class Timing(NamedTuple):
    """Of one contestant: the median and all of its times in seconds, and the bytes that it held at most.

    memory: on a CPU the process's peak of resident memory above what it was before the network was built; on a GPU
        the peak that torch has allocated.
    """

    seconds: float
    times: tuple[float, ...]
    memory: int


def race(contestants: Mapping[str, Build], *, repeats: int) -> dict[str, Timing]:
    """Repeat each contestant so often, in turn; each is a function of a module or a partial of one, to be picklable."""
    context = get_context("spawn")
    lines: dict[str, Connection] = {}
    processes = []
    try:
        for name, build in contestants.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, build), daemon=True)
            process.start()
            theirs.close()
            lines[name] = ours
            processes.append(process)
            for _ in range(2):  # the first answer says that it is ready, the second warms up
                _ask(name, ours)
        times: dict[str, list[float]] = {name: [] for name in lines}
        memory: dict[str, int] = {}
        for _ in range(repeats):
            for name, line in lines.items():
                seconds, memory[name] = _ask(name, line)
                times[name].append(seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return {name: Timing(statistics.median(every), tuple(every), memory[name]) for name, every in times.items()}


def median_time(call: Callable[[], object], *, seconds: float, most: float = math.inf) -> float:
    """Seconds of a call, which has to wait for its result; not their mean, since machines do other things too.

    seconds, most: so long or so often it is repeated, three times at least, after one call that is not counted.
    """

    def timed() -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    timed()
    times: list[float] = []
    while len(times) < 3 or (len(times) < most and sum(times) < seconds):
        times.append(timed())
    return statistics.median(times)


def _ask(name: str, line: Connection) -> tuple[float, int]:
    try:
        line.send("go")
        answer: Any = line.recv()
    except (EOFError, BrokenPipeError):
        raise SegdeconvError(f"{name} died, perhaps of memory - lower --batch or --size") from None
    if isinstance(answer, str):
        raise SegdeconvError(f"{name}: {answer}")
    return answer


def _serve(line: Connection, build: Build) -> None:
    """In a contestant's process: build at the first request, repeat at every other one."""
    before = peak(anew=True)
    step: Callable[[], None] | None = None
    while line.recv():
        started = time.perf_counter()
        try:
            if step is None:
                step = build()
            else:
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:  # whatever it is, the others' process has to hear of it
            line.send(f"{type(error).__name__}: {error}")
            return
        seconds = time.perf_counter() - started
        line.send((seconds, peak() - before))
