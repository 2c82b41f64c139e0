"""Timing of several contestants in turn, so that a busy machine slows all of them alike.

Each contestant runs in its own process, which also gives it its own peak memory.
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

Build = Callable[[], Callable[[], None]]  # sets up a contestant and returns the function to repeat


class Timing(NamedTuple):
    """Time and memory of one contestant.

    Attributes:
        seconds: Median of the times.
        times: Time of every repetition in seconds.
        memory: Peak memory in bytes. On a CPU, the increase of the peak resident memory of the process since before
            the network was built; on a GPU, the increase of the peak memory that torch has allocated.
    """

    seconds: float
    times: tuple[float, ...]
    memory: int


def race(contestants: Mapping[str, Build], *, repeats: int, warm_up: bool = True) -> dict[str, Timing]:
    """Time contestants in turn.

    All processes start at once, because each imports torch for seconds; they are set up one after the other.

    Args:
        contestants: Name -> a function that sets up the contestant and returns the function to repeat. It must be
            picklable: a function of a module, or a partial of one.
        repeats: Number of timed repetitions of each.
        warm_up: Run each once before; False if its repetitions are long, and its setup has run a part of one.

    Raises:
        SegdeconvError: A contestant fails.
    """
    context = get_context("spawn")
    connections: dict[str, Connection] = {}
    processes = []
    try:
        for name, build in contestants.items():
            connection, child_connection = context.Pipe()
            process = context.Process(target=_serve, args=(child_connection, build), daemon=True)
            process.start()
            child_connection.close()
            connections[name] = connection
            processes.append(process)
        for name, connection in connections.items():
            for _ in range(1 + warm_up):  # the first request sets the contestant up, the second warms it up
                _ask(name, connection)
        times: dict[str, list[float]] = {name: [] for name in connections}
        memory: dict[str, int] = {}
        for _ in range(repeats):
            for name, connection in connections.items():
                seconds, memory[name] = _ask(name, connection)
                times[name].append(seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return {name: Timing(statistics.median(seconds), tuple(seconds), memory[name]) for name, seconds in times.items()}


def median_time(call: Callable[[], object], *, seconds: float, max_calls: float = math.inf) -> float:
    """Return the median time of a call in seconds, after one warm-up call.

    The median is used because other work on the machine distorts a mean.

    Args:
        call: Function to time. It must wait for its result.
        seconds: Total time after which the repetition ends.
        max_calls: Number of calls after which it ends. At least three calls are timed.
    """

    def timed() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    timed()
    times: list[float] = []
    while len(times) < 3 or (len(times) < max_calls and sum(times) < seconds):
        times.append(timed())
    return statistics.median(times)


def _ask(name: str, connection: Connection) -> tuple[float, int]:
    try:
        connection.send("go")
        answer: Any = connection.recv()
    except (EOFError, BrokenPipeError):
        raise SegdeconvError(f"{name} ended, perhaps for lack of memory - reduce --batch or --size") from None
    if isinstance(answer, str):
        raise SegdeconvError(f"{name}: {answer}")
    return answer


def _serve(connection: Connection, build: Build) -> None:
    """Run in a contestant's process: build at the first request, repeat at every later one."""
    before = peak(reset=True)
    step: Callable[[], None] | None = None
    while connection.recv():
        started = time.perf_counter()
        try:
            if step is None:
                step = build()
            else:
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as error:  # the parent process reports any error
            connection.send(f"{type(error).__name__}: {error}")
            return
        seconds = time.perf_counter() - started
        connection.send((seconds, peak() - before))
