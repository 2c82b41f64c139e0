"""The run folder: its lock, and the disk space for its checkpoints."""

import itertools
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from torch import nn

from segdeconv.errors import DiskError, UsageError, run_folder_argument
from segdeconv.system.files import lock_folder, remove_partial_files
from segdeconv.system.memory import readable
from segdeconv.training.processes import rank_from_outside

BEFORE_TRAINING = (
    ".lock",
    "config.yaml",
    "data.csv",
    "events.out.tfevents.*",
)  # files that are written before the first step
COPIES = 4  # of the weights on disk at most, beside those that are kept; optimizer state comes on top

_locks: dict[Path, object] = {}  # held by this process until it ends


def new_folder(runs: Path) -> Path:
    """Return the path of a new run in a folder of runs, named by the time."""
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    paths = (runs / (f"{name}-{number}" if number else name) for number in itertools.count())
    return next(path for path in paths if not path.exists())


def claim_folder(run: Path) -> Path:
    """Create and lock the folder of a new run; one with a number if a run that began in the same second has it."""
    for path in (run, *(run.with_name(f"{run.name}-{number}") for number in range(1, 100))):
        try:
            lock_run(path)
        except UsageError:  # another process has it
            continue
        if not (path / "config.yaml").exists():
            return path
    return run


def lock_run(run: Path) -> None:
    """Create the run folder and lock it until this process ends, so that no two runs share it.

    If torchrun or SLURM started several processes for the run, the first one holds the lock.

    Raises:
        UsageError: The path is a file, or another process uses the folder.
    """
    if run.exists() and not run.is_dir():
        raise UsageError(f"{run} is a file, not a run folder - choose another {run_folder_argument()}")
    if rank_from_outside() > 0 or run.resolve() in _locks:
        return
    lock = lock_folder(run, run_folder_argument())
    if lock is not None:
        _locks[run.resolve()] = lock
        remove_partial_files(run)


@contextmanager
def discard_if_unused(run: Path, *, trial: bool = False) -> Iterator[None]:
    """Remove the run folder if an exception ends a run that has written nothing but its config and its log.

    Args:
        run: The run folder.
        trial: Whether to remove it also after a run that succeeds.
    """
    try:
        yield
    except BaseException:
        _discard(run)
        raise
    if trial:
        _discard(run)


def _discard(run: Path) -> None:
    files = list(run.iterdir()) if run.is_dir() else []
    if (
        rank_from_outside() == 0
        and files
        and all(any(fnmatch(path.name, pattern) for pattern in BEFORE_TRAINING) for path in files)
    ):
        _locks.pop(run.resolve(), None)
        shutil.rmtree(run, ignore_errors=True)


def require_run_folder(run: Path) -> None:
    """Raise DiskError if the folder of a running run was removed; recreating it would hide the loss."""
    if not run.is_dir():
        raise DiskError(f"{run} was removed during the run - restore the folder, or start the run again")


@contextmanager
def explain_removed_folder(run: Path) -> Iterator[None]:
    """Raise DiskError instead of any error that is due to the removal of the run folder.

    TensorBoard writes in a thread. Its error is raised again by the next call of the logger, so that the thread need
    not print it.
    """
    before = threading.excepthook

    def print_unless_raised_again(thread_error: threading.ExceptHookArgs) -> None:
        if not issubclass(thread_error.exc_type, OSError):
            before(thread_error)

    threading.excepthook = print_unless_raised_again
    try:
        yield
    except OSError:
        require_run_folder(run)
        raise
    finally:
        threading.excepthook = before


def require_space(run: Path, task: nn.Module, kept: int) -> None:
    """Raise DiskError if the disk is too small for the checkpoints: best, last, previous, a partial one and `kept`."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in task.state_dict().values())
    needed, free = (COPIES + kept) * weights, shutil.disk_usage(run).free
    if needed > free:
        raise DiskError(
            f"the checkpoints in {run} need at least {readable(needed)} and {readable(free)} are free - free some "
            f"space or choose another {run_folder_argument()}"
        )
