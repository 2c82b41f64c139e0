"""The folder of a run: of one run at a time, and with room for its checkpoints."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from torch import nn

from segdeconv.errors import DiskError, UsageError
from segdeconv.system.files import PARTIAL
from segdeconv.system.memory import readable
from segdeconv.training.processes import rank_from_outside

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

COPIES = 4  # of the weights that a run has on the disk at its fullest; what the optimizer keeps comes on top

_claimed: dict[Path, int] = {}  # the open lock files of this process; closing one would give it up


def claim(run: Path) -> None:
    """Make the folder and lock it for this process, until it ends: two runs in one folder would mix their files.

    A lock of the kernel's (fcntl), which a killed process cannot leave behind and a loader worker does not inherit. Of
    several processes that torchrun or SLURM started for one run the first holds it.
    """
    if run.exists() and not run.is_dir():
        raise UsageError(f"{run} is a file and should be the folder of a run - choose another hydra.run.dir")
    run.mkdir(parents=True, exist_ok=True)
    path = run / ".lock"
    if fcntl is None or rank_from_outside() > 0 or path.resolve() in _claimed:
        return
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = os.read(lock, 200).decode(errors="replace").strip() or "another process"
        os.close(lock)
        raise UsageError(f"{run} is in use by {holder} - wait for it, or choose another hydra.run.dir") from error
    except OSError:  # a file system without locks
        os.close(lock)
        return
    for path_left in run.glob(f"{PARTIAL}*"):  # of a writer that was killed, for whoever holds the lock is alone here
        path_left.unlink(missing_ok=True)
    os.truncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {platform.node()}\n".encode())
    _claimed[path.resolve()] = lock


def require_there(run: Path) -> None:
    """Raise DiskError where the folder of a run that is under way is gone: made anew, it would hide what was lost."""
    if not run.is_dir():
        raise DiskError(f"{run} is gone while a run writes to it - start the run again, or restore the folder")


def require_space(run: Path, task: nn.Module) -> None:
    """Raise DiskError where the checkpoints of a run cannot fit: best, last, previous and the one being written."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in task.state_dict().values())
    needed, free = COPIES * weights, shutil.disk_usage(run).free
    if needed > free:
        raise DiskError(
            f"the checkpoints in {run} take {readable(needed)} or more and {readable(free)} are free - free some space "
            "or choose another hydra.run.dir"
        )
