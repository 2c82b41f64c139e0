"""The file that a CHECKPOINT argument refers to: a file, a run folder, `latest`, or a network shipped or on the Hub."""

import os
from collections.abc import Iterator
from pathlib import Path

from segdeconv.checkpoints import cards, hub
from segdeconv.errors import UsageError, did_you_mean

BEST, LAST = "best.ckpt", "last.ckpt"  # of a run folder, in the order of preference
LATEST = "latest"
RUNS = Path("runs")
DEPTH = 3  # of run folders below the folder of all runs: runs/multirun/<time>/<number>
LISTED = 5  # run folders in an error message


def resolve_path(path: str | Path) -> Path:
    """Return the checkpoint file that a CHECKPOINT argument refers to.

    A run folder stands for its best.ckpt, or for its last.ckpt if it has no best one yet; `latest` for the newest run
    below ./runs, and DIR/latest for the newest below DIR. A line is printed where the file is not the obvious one.

    Args:
        path: A file, a run folder, `latest`, the name of a shipped network, a folder that `save_pretrained` wrote, or
            hf://OWNER/NAME[@REVISION], which is downloaded. `~` is the home folder.

    Raises:
        CheckpointError: A repository of the Hub has no network of segdeconv.
        UsageError: It is none of these, a folder contains several runs, or a run has no checkpoint.
    """
    if hub.is_address(path):
        return hub.fetch(path)
    path = Path(os.path.expanduser(path))
    if path.is_file():
        return path
    if (path / hub.WEIGHTS).is_file():
        return path / hub.WEIGHTS
    names = cards.shipped()
    if str(path) in names and not _has_checkpoint(path):
        return cards.SHIPPED / f"{path}{cards.SUFFIX}"
    if path.is_dir() or path.name == LATEST:
        run = find_run(path)
        file = run / BEST if (run / BEST).is_file() else run / LAST
        if run != path or file.name != BEST:
            print(f"checkpoint: {file}{'' if file.name == BEST else f', since the run has no {BEST} yet'}")
        return file
    if names and path.parent == Path() and not path.suffix:
        raise UsageError(
            f"checkpoint {path} not found, and no shipped network has this name - {did_you_mean(str(path), names)}; "
            f"or {LATEST}, for the newest run"
        )
    raise UsageError(f"checkpoint {path} not found - give a run folder such as runs/mine, or {LATEST} for the newest")


def find_run(path: Path) -> Path:
    """Return the run folder that a path refers to.

    Args:
        path: A run folder, a folder with one run in it, `latest` for the newest run below ./runs, or DIR/latest.

    Raises:
        UsageError: There is no run with a checkpoint, or there are several.
    """
    if _has_checkpoint(path):
        return path
    newest = path.name == LATEST and not path.is_dir()
    folder = path if not newest else RUNS if path == Path(LATEST) else path.parent
    runs = sorted(_runs_in(folder), key=_time, reverse=True)
    if not runs:
        if (folder / "config.yaml").is_file():
            raise UsageError(f"{folder} has no {BEST} or {LAST} yet - wait for the first epoch, or give another run")
        tried = f"{folder if folder.is_absolute() else Path.cwd() / folder}"
        raise UsageError(f"{path}: no run with a checkpoint in {tried} - give a checkpoint or the folder of a run")
    if len(runs) > 1 and not newest:
        more = f" and {len(runs) - LISTED} more" if len(runs) > LISTED else ""
        raise UsageError(
            f"{path} contains {len(runs)} runs, newest first: {', '.join(map(str, runs[:LISTED]))}{more} - give one of "
            f"them, or {path / LATEST} for the newest"
        )
    return runs[0]


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (BEST, LAST))


def _runs_in(folder: Path) -> Iterator[Path]:
    for depth in range(1, DEPTH + 1):
        yield from filter(_has_checkpoint, folder.glob("/".join("*" * depth)))


def _time(run: Path) -> tuple[int, str]:
    """Return the time at which the newest checkpoint of a run was written, in nanoseconds, and its name for ties."""
    files = [run / name for name in (BEST, LAST)]
    return max(file.stat().st_mtime_ns for file in files if file.is_file()), str(run)
