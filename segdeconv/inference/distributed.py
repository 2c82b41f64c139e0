"""Work on many images by stateful workers of a Ray cluster, with `--engine ray`.

Ray Data gives each worker, an actor that has loaded the network once, one chunk of images after another. The process
that started the command is the only one that writes progress logs and tables. A worker that dies is replaced, and its
chunks are computed again; the result of each chunk is returned once.
"""

import importlib.util
import io
import logging
import os
import pickle
import platform
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image

from segdeconv.checkpoints.checkpoint import PARTS, Checkpoint
from segdeconv.errors import SegdeconvError, UsageError, enter_command, first_line, warn
from segdeconv.system.interruption import EXIT_CODES, raise_again

MAX_CHUNK = 32  # images: a worker that dies computes at most so many again, and a chunk costs milliseconds
CHUNKS_PER_WORKER = 4  # at least, so that all workers end at about the same time
MAX_ATTEMPTS = 4  # at a chunk, whose workers died
CONNECTION_TIMEOUT = 10.0  # seconds
WARNING = "segdeconv: warning: "
IN_CHARGE = {
    "RAY_USAGE_STATS_ENABLED": "0",  # or else Ray reports to its makers
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DEDUP_LOGS": "0",  # or else Ray keeps what its thread prints, and the end of the command prints it
    "RAY_worker_niceness": "0",  # Ray's 15 would leave workers without a core beside any other busy process
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class RaySettings:
    """The Ray cluster that computes.

    Attributes:
        address: Its address, such as `10.0.0.1:6379` or `auto`; None starts one on this machine for this command.
        workers: The number of workers; None for one per GPU or, without GPUs, one per core.
    """

    address: str | None = None
    workers: int | None = None


class Work(Protocol):
    """Work that is sent to each worker once, pickled."""

    def start(self, report: Callable[[str], None]) -> Callable[[Any], Any]:
        """Load the network and return the function that computes the result of a chunk.

        Args:
            report: Called with messages for the user.
        """
        ...

    def describe(self, chunk: Any) -> str:
        """Return the name of a chunk for a message."""
        ...


class _Result(NamedTuple):
    """What a worker returns for a chunk: the result or the error, messages for the user, and which worker it is."""

    chunk: int
    value: Any
    error: BaseException | None
    messages: list[str]
    warnings: list[str]
    worker: tuple[str, int]
    replaced: bool


def require_ray() -> None:
    """Raise UsageError unless Ray Data is installed."""
    for library in ("ray", "pyarrow", "pandas"):
        if importlib.util.find_spec(library) is None:
            raise UsageError(f"--engine ray needs {library}, which is not installed - pip install 'segdeconv[ray]'")


def chunks_of(items: Sequence[Any], workers: int) -> list[list[Any]]:
    """Divide items into chunks for a number of workers."""
    size = max(1, min(MAX_CHUNK, len(items) // (workers * CHUNKS_PER_WORKER)))
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


class _Attempts:
    """The actor that counts the attempts at each chunk: Ray would try one that kills its worker forever."""

    def __init__(self) -> None:
        self.begun: Counter[int] = Counter()

    def begin(self, chunk: int) -> int:
        """Return how often the chunk has been begun, with this time."""
        self.begun[chunk] += 1
        return self.begun[chunk]


class _Worker:
    """The actor. Errors that have a message for the user are returned, so that they arrive as they are."""

    def __init__(self, work: Any, attempts: Any, folder: str) -> None:
        import ray

        self.attempts = attempts

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # of the actor: Ray sets it to its cores
        Image.MAX_IMAGE_PIXELS = None  # as in a command: dataset.max_pixels is checked from the header
        enter_command()
        self.messages: list[str] = []
        self.process: Callable[[Any], Any] | None = None
        self.error: BaseException | None = None
        self.stderr = io.StringIO()
        self.worker = (platform.node(), os.getpid())
        self.replaced = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        with self._errors():
            try:
                os.chdir(folder)  # that of the command, to which relative paths refer
            except OSError as error:
                raise UsageError(
                    f"{folder}: not found on {platform.node()}, a machine of the cluster - run the command in a "
                    "folder on a disk that all machines share"
                ) from error
            self.work: Work = ray.get(work)
            self.process = self.work.start(self.messages.append)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with redirect_stderr(self.stderr):
                yield
        except (SegdeconvError, OSError, MemoryError) as error:
            self.error = error

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        index, chunk = pickle.loads(row["chunk"])
        value = None
        if self.process is not None:
            with self._errors():
                self._require_survivable(index, chunk)
                value = self.process(chunk)
        lines = self.stderr.getvalue().splitlines()
        warnings = [line.removeprefix(WARNING) for line in lines if line.startswith(WARNING)]
        result = _Result(index, value, self.error, list(self.messages), warnings, self.worker, self.replaced)
        self.stderr.seek(0)
        self.stderr.truncate()
        self.messages.clear()
        return {"result": pickle.dumps(result)}

    def _require_survivable(self, index: int, chunk: Any) -> None:
        import ray

        if ray.get(self.attempts.begin.remote(index)) > MAX_ATTEMPTS:
            raise UsageError(
                f"{MAX_ATTEMPTS} workers died one after another with the same images ({self.work.describe(chunk)}), "
                "probably because memory ran out - give fewer --workers, or leave out the image that ends them, and "
                "run the same command again"
            )


@contextmanager
def cluster(settings: RaySettings) -> Iterator[int]:
    """Connect to a Ray cluster, or start one on this machine, and yield the number of workers.

    Raises:
        UsageError: Ray is missing, there is no cluster at the address, or it has too few cores for the workers.
    """
    require_ray()
    os.environ.update(IN_CHARGE)
    with _quiet():
        import ray

    handlers = {number: signal.getsignal(number) for number in EXIT_CODES}
    try:
        if settings.address:
            _require_reachable(settings.address)
        with _quiet():
            ray.init(
                address=settings.address or "local",
                include_dashboard=None if settings.address else False,
                log_to_driver=False,
                logging_level="ERROR",
            )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise_again()
        raise UsageError(
            f"--ray-address: no Ray cluster that can be used at {settings.address} ({first_line(error)}) - start one "
            "with `ray start --head` there, or leave it out to use this machine"
            if settings.address
            else f"--engine ray: Ray does not start on this machine ({first_line(error)}) - see `ray start --head`"
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray ends the process by SIGTERM in its own way
    try:
        _silence()
        if settings.workers is not None and settings.workers > _resources("CPU"):
            raise UsageError(
                f"--workers={settings.workers} is more than the {_resources('CPU')} cores of the cluster - give fewer"
            )
        with redirect_stdout(_WithoutRay(sys.stdout)):
            yield settings.workers or _resources("GPU") or _resources("CPU")
    finally:
        ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard what Ray's C++ part logs to stderr while it starts; its errors are exceptions too."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class _WithoutRay:
    """A stream without what Ray's thread prints about tasks that it tries again; `run` reports lost workers itself."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith("ray_"):
            return len(text)
        return int(self.stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _require_reachable(address: str) -> None:
    """Raise ConnectionError unless something listens at HOST:PORT, since Ray would wait for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdigit():
        return  # `auto`, which Ray resolves at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECTION_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(str(error)) from error


def _silence() -> None:
    """Leave out Ray's own progress bars and logs; its errors are raised."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _nodes() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _resources(kind: str) -> int:
    return int(sum(node.get(kind, 0) for node in _nodes()))


def _shares(workers: int) -> dict[str, float]:
    """Return the cores and GPUs of each worker, of which as many as wanted fit on the machines."""
    cpus = [int(node.get("CPU", 0)) for node in _nodes()]
    most = next(share for share in range(max(cpus), 0, -1) if sum(count // share for count in cpus) >= workers)
    gpus = _resources("GPU")
    return {"num_cpus": most, **({"num_gpus": min(1.0, gpus / workers)} if gpus else {})}


def run(work: Work, chunks: Sequence[Any], workers: int, report: Callable[[str], None]) -> Iterator[tuple[int, Any]]:
    """Compute chunks by the workers of the `cluster`.

    Args:
        work: The work, with all that a worker needs.
        chunks: What the function of the work is called with.
        workers: The number of workers.
        report: Called with the messages of the workers.

    Yields:
        The index and the result of each chunk, once.

    Raises:
        UsageError: A chunk ended its worker several times.
    """
    if not chunks:
        return
    import ray
    import ray.data

    workers = min(workers, len(chunks))
    rows = [{"chunk": pickle.dumps((index, chunk))} for index, chunk in enumerate(chunks)]
    shares = _shares(workers)
    attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Attempts).remote()
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Worker,
        fn_constructor_args=(ray.put(work), attempts, os.getcwd()),
        compute=ray.data.ActorPoolStrategy(size=workers),
        **shares,
    )
    done: set[int] = set()
    replaced: set[tuple[str, int]] = set()
    reported: set[str] = set()
    for row in data.iter_rows():
        raise_again()
        result: _Result = pickle.loads(row["result"])
        if result.error is not None:
            raise result.error
        if result.replaced and result.worker not in replaced:
            replaced.add(result.worker)
            report("a worker was lost and replaced; what it was computing is computed again")
        for message in result.messages:
            if message not in reported:
                reported.add(message)
                report(message)
        for message in result.warnings:
            warn(message)
        if result.chunk not in done:
            done.add(result.chunk)
            yield result.chunk, result.value


def described(names: Sequence[str]) -> str:
    """Return the first name and the number of the others."""
    return names[0] + (f" and {len(names) - 1} more" if names[1:] else "")


def sendable(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint without the state of training, which workers do not need."""
    content = {key: value for key, value in checkpoint.content.items() if key in PARTS}
    return replace(checkpoint, content=content)
