"""Exceptions with a message for the user and an exit code, and parts of such messages."""

import difflib
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

# Format of a command as the user types it: in an installed package, which contains scripts/, or in a clone. The
# `segdeconv` command overwrites it.
COMMAND_FORMAT = "segdeconv {}" if (Path(__file__).parent / "scripts").is_dir() else "python scripts/{}.py"


class SegdeconvError(Exception):
    """Error whose message explains it in full: the file or key, what is wrong, and the way out.

    Attributes:
        exit_code: Exit code of a command that ends with this error.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        # An error of a DataLoader worker arrives as the text of its traceback, with the message in the last line.
        if "Original Traceback" in message:
            message = message.rstrip().splitlines()[-1].partition(": ")[2]
        super().__init__(message)


class UsageError(SegdeconvError, ValueError):
    """Error in a command line, a config or a data set."""

    exit_code = 2


class DivergedError(SegdeconvError):
    """Training diverged: the loss is not finite."""

    exit_code = 3


class CheckpointError(SegdeconvError):
    """A checkpoint is damaged, not from segdeconv, or names code that it may not name."""

    exit_code = 4


class MismatchError(CheckpointError):
    """A run does not repeat what it recorded."""


class IncompleteError(SegdeconvError):
    """Some checks of a run could not be made; those that were made succeeded."""

    exit_code = 6


class DiskError(SegdeconvError):
    """The disk is full or cannot be written."""

    exit_code = 5


class Interrupted(SegdeconvError):
    """A signal stopped training, which has saved its state."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Terminated(BaseException):
    """A signal asked the process to end; like KeyboardInterrupt, it passes through `except Exception`."""


class TimeUp(SegdeconvError):
    """The time limit of training has passed, and it has saved its state; this is not a failure."""

    exit_code = 0


_warned: set[str] = set()
_in_command = False  # whether a command runs, rather than a program of the user's


def warn(message: str) -> None:
    """Print a warning to stderr, once per process: the file or key, what is wrong with counts, and the way out."""
    if message not in _warned:
        _warned.add(message)
        sys.stdout.flush()
        print(f"segdeconv: warning: {' '.join(message.split())}", file=sys.stderr)


def error_from_traceback(text: str) -> SegdeconvError | None:
    """Return the SegdeconvError that ended another process, restored from its traceback, or None for other errors."""
    for line in reversed(text.rstrip().splitlines()):
        name, colon, message = line.partition(": ")
        package, _, class_name = name.rpartition(".")
        error = globals().get(class_name)
        if colon and package == __name__ and isinstance(error, type) and issubclass(error, SegdeconvError):
            if error is not Interrupted:
                return error(message)
            return Interrupted(message, 141 if "reader of the output" in message else 143)
    return None


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return the part of an error message that suggests existing names for a misspelt one.

    Examples:
        >>> did_you_mean("vco", ["voc", "camvid"])
        "did you mean 'voc'? Available: camvid, voc"
    """
    choices = sorted(options)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}Available: {', '.join(choices)}"


def for_caller(python: str, typed: str) -> str:
    """Return the part of a message that names an argument: of a function in Python, or of a command line.

    Examples:
        >>> for_caller("trust=['mine.Net']", "--trust mine.Net")
        "trust=['mine.Net']"
    """
    return typed if _in_command else python


def run_folder_argument() -> str:
    """Return what names the run folder: an argument of `segdeconv.train.train`, or a key of the command line."""
    return for_caller("run folder", "hydra.run.dir")


def enter_command() -> None:
    """Let messages name the arguments of a command line from now on."""
    global _in_command
    _in_command = True


def first_line(error: BaseException) -> str:
    """Return the first line of the message of another library's error, or the name of its class if it has none.

    Examples:
        >>> first_line(ValueError("too wide\\nat layer 3")), first_line(KeyError())
        ('too wide', 'KeyError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def command(name: str, arguments: Sequence[str] = ()) -> str:
    """Return a command line as the user types it.

    Examples:
        >>> command("predict", ["best.ckpt", "my photos"])
        "python scripts/predict.py best.ckpt 'my photos'"
    """
    return shlex.join([*COMMAND_FORMAT.format(name).split(), *arguments])
