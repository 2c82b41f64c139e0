"""What a user meets when something is wrong: one sentence and an exit code."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

# How a command is typed: as installed, where scripts/ is part of the package, or in a clone. `segdeconv` itself, in
# cli.py, knows better.
TYPED = "segdeconv {}" if (Path(__file__).parent / "scripts").is_dir() else "python scripts/{}.py"

# Of a disk that is full, read-only, broken or not this user's; anything else is a bug of ours.
OF_THE_DISK = (
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG, errno.ENOSPC, errno.EPERM, errno.EROFS,
)  # fmt: skip


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


def raised_elsewhere(text: str) -> SegdeconvError | None:
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


class ArgumentParser(argparse.ArgumentParser):
    """argparse for one of the scripts, with its errors as one sentence of ours."""

    def __init__(self, script: str, **settings: Any) -> None:
        super().__init__(command(Path(script).stem), **settings)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} - see {self.prog} --help")


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and leave with the exit code of the contract.

    0 done; 1 a bug of ours, with its traceback; 2 user, config or data; 3 diverged; 4 checkpoint;
    5 disk; 130 interrupted; 143 terminated.
    """
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup has it ignored
            signal.signal(number, _terminate)
    try:
        code = main() or 0
    except SegdeconvError as error:
        code = _report(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _report("interrupted - run the same command again", 130)
    except Terminated as error:
        code = _report(f"stopped by {error} - run the same command again", 143)
    except BrokenPipeError:
        # The reader of our output (`| head`) went away; point stdout elsewhere so that the
        # interpreter's last flush does not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except MemoryError:
        code = _report("memory ran out - close other programs, or give smaller images or batches", 2)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        what = f"{error.filename}: {(error.strerror or str(error)).lower()}"
        code = _report(f"{what}, so it cannot be written as asked - choose another name or folder", 2)
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        what = f"cannot read or write {error.filename or 'a file'}: {error.strerror}"
        code = _report(f"{what} - free some space, change the permissions or choose another folder", 5)
    sys.stdout.flush()
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(signal.Signals(number).name)


def _report(message: str, code: int) -> int:
    sys.stdout.flush()
    print(f"segdeconv: error: {' '.join(message.split())}", file=sys.stderr)
    return code
