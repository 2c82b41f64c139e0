"""What a user meets when something is wrong: one sentence and an exit code."""

import difflib
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

# How a command is typed: as installed, where scripts/ is part of the package, or in a clone. `segdeconv` itself, in
# cli.py, knows better.
TYPED = "segdeconv {}" if (Path(__file__).parent / "scripts").is_dir() else "python scripts/{}.py"


class SegdeconvError(Exception):
    """A fault that its message explains in full: what, which file or key, and the way out."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        # What a DataLoader worker raises arrives as the text of its traceback, with our sentence as the last line.
        if "Original Traceback" in message:
            message = message.rstrip().splitlines()[-1].partition(": ")[2]
        super().__init__(message)


class UsageError(SegdeconvError, ValueError):
    """A wrong command line, configuration or data set."""

    exit_code = 2


class DivergedError(SegdeconvError):
    """Training produced a loss that is not finite."""

    exit_code = 3


class CheckpointError(SegdeconvError):
    """A checkpoint that is damaged, foreign, or names code it may not name."""

    exit_code = 4


class DiskError(SegdeconvError):
    """The disk is full or cannot be written."""

    exit_code = 5


class Interrupted(SegdeconvError):
    """Training was asked to stop by a signal and has saved its state."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Terminated(BaseException):
    """A signal that asks to end; like KeyboardInterrupt, nothing that an `except Exception` may take for its own."""


class TimeUp(SegdeconvError):
    """Training has had the time it was given and has saved its state: not a fault."""

    exit_code = 0


def error_from_traceback(text: str) -> SegdeconvError | None:
    """The error of ours that ended another process, from the traceback that it left; None if it was none of ours."""
    for line in reversed(text.rstrip().splitlines()):
        name, colon, message = line.partition(": ")
        package, _, kind = name.rpartition(".")
        found = globals().get(kind)
        if colon and package == __name__ and isinstance(found, type) and issubclass(found, SegdeconvError):
            return found(message, 143) if found is Interrupted else found(message)
    return None


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The way out for a misspelt name.

    >>> did_you_mean("vco", ["voc", "camvid"])
    "did you mean 'voc'? Available: camvid, voc"
    """
    choices = sorted(options)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}Available: {', '.join(choices)}"


def command(name: str, arguments: Sequence[str] = ()) -> str:
    """One of the commands as its user types it.

    >>> command("predict", ["best.ckpt", "my photos"])
    "python scripts/predict.py best.ckpt 'my photos'"
    """
    return shlex.join([*TYPED.format(name).split(), *arguments])
