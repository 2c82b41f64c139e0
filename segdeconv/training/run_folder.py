"""The folder of a run: of one run at a time, and with room for its checkpoints."""

import shutil
from pathlib import Path

from torch import nn

from segdeconv.errors import DiskError, UsageError
from segdeconv.system.files import PARTIAL, lock_folder
from segdeconv.system.memory import readable
from segdeconv.training.processes import rank_from_outside

COPIES = 4  # of the weights that a run has on the disk at its fullest; what the optimizer keeps comes on top

_claimed: dict[Path, object] = {}  # the locks of this process, which keeps them until it ends


def lock_run(run: Path) -> None:
    """Make the folder and lock it for this process, until it ends: two runs in one folder would mix their files.

    Of several processes that torchrun or SLURM started for one run the first holds it.
    """
    if run.exists() and not run.is_dir():
        raise UsageError(f"{run} is a file and should be the folder of a run - choose another hydra.run.dir")
    if rank_from_outside() > 0 or run.resolve() in _claimed:
        return
    lock = lock_folder(run, "hydra.run.dir")
    if lock is not None:
        _claimed[run.resolve()] = lock
        for left in run.glob(f"{PARTIAL}*"):  # of a writer that was killed, for whoever holds the lock is alone here
            left.unlink(missing_ok=True)


def require_run_folder(run: Path) -> None:
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
