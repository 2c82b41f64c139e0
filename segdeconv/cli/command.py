"""The frame of every command: its argument parser, its exit code, and one line on stderr for an error."""

import argparse
import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from PIL import Image

from segdeconv.errors import SegdeconvError, Terminated, UsageError, command
from segdeconv.system import KEEP_FREED

# Errors of a disk that is full, read-only, broken or owned by another user; any other OSError is a bug in segdeconv.
DISK_ERRORS = (
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG, errno.ENOSPC, errno.EPERM, errno.EROFS,
)  # fmt: skip

PACKAGE = Path(__file__).resolve().parent.parent
# An installed package contains scripts/ and configs/; in a clone they are next to the package.
HOME = PACKAGE if (PACKAGE / "scripts").is_dir() else PACKAGE.parent


def print_everything() -> None:
    """Let stdout and stderr escape the characters that the terminal's encoding does not have, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a test or a notebook replaced it
            stream.reconfigure(errors="backslashreplace")


if os.environ.get(KEEP_FREED):  # a process spawned by a command, which imports the command's script again
    Image.MAX_IMAGE_PIXELS = None
    print_everything()


# Renamed options: former name -> current name. Every command with the current name accepts both.
RENAMED_OPTIONS = {"--balancing": "--class-weighting", "--least-side": "--min-side", "--whole-too": "--with-whole"}


class ArgumentParser(argparse.ArgumentParser):
    """The argument parser of a script, which raises UsageError and accepts renamed options by both names.

    Args:
        script: File name of the script.
        **settings: Arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, script: str, **settings: Any) -> None:
        super().__init__(command(Path(script).stem), **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, with the current names of renamed options.

        Raises:
            UsageError: An option is given under both names.
        """
        words = [str(word) for word in (sys.argv[1:] if args is None else args)]
        options = [word.partition("=")[0] for word in words]
        for former, current in RENAMED_OPTIONS.items():
            if former not in options or current not in self._option_string_actions:
                continue
            if current in options:
                raise UsageError(f"{former} is the former name of {current}, and both are given - remove {former}")
            words = [
                current + word.removeprefix(former) if option == former else word
                for word, option in zip(words, options, strict=True)
            ]
            print(f"segdeconv: warning: {former} is deprecated: it is now {current}", file=sys.stderr)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} - see {self.prog} --help")


def run_command(main: Callable[[], int | None], help_text: str = "") -> NoReturn:
    """Run a script's `main` and exit the process with the documented exit code.

    0 success; 1 a bug in segdeconv, with its traceback; 2 error in usage, config or data; 3 training diverged;
    4 checkpoint; 5 disk; 130 interrupted; 143 terminated.

    Args:
        main: The script's function; it may return an exit code.
        help_text: Text that -h and --help print, for a script without an `ArgumentParser`.
    """
    print_everything()
    Image.MAX_IMAGE_PIXELS = None  # dataset.max_pixels is checked from the header
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # silent: segdeconv reports errors of videos itself
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    os.environ.setdefault(KEEP_FREED, "1")
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _terminate)
    script = Path(sys.argv[0])
    try:
        if help_text and {"-h", "--help"} & set(sys.argv[1:]):
            print(help_text.replace(f"python scripts/{script.name}", command(script.stem)), flush=True)
            sys.exit()
        code = main() or 0
    except SegdeconvError as error:
        code = _report(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _report("interrupted - run the same command again", 130)
    except Terminated as error:
        code = _report(f"stopped by {error} - run the same command again", 143)
    except BrokenPipeError:
        # The reader of the output (`| head`) closed the pipe; redirect stdout so that the interpreter's last flush
        # does not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except MemoryError:
        code = _report("memory ran out - close other programs, or use smaller images or batches", 2)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        problem = f"{error.filename}: {(error.strerror or str(error)).lower()}"
        code = _report(f"{problem}, so it cannot be written - choose another name or folder", 2)
    except UnicodeEncodeError as error:
        if error.encoding.replace("-", "").lower() == "utf8" or error.encoding != sys.getfilesystemencoding():
            raise
        problem = f"the file name {error.object} has characters that this system's encoding {error.encoding} lacks"
        code = _report(f"{problem} - set PYTHONUTF8=1, or rename the file or class", 2)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        problem = f"cannot read or write {error.filename or 'a file'}: {error.strerror}"
        code = _report(f"{problem} - free some space, change the permissions or choose another folder", 5)
    sys.stdout.flush()
    sys.exit(code)


@contextlib.contextmanager
def only_first_signal() -> Iterator[None]:
    """Let the first SIGINT, SIGTERM or SIGHUP raise in the body, and ignore others until the process has ended."""
    numbers = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]
    handled = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            return
        stopping = True
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        _terminate(number, frame)

    try:
        for number in handled:
            signal.signal(number, stop)
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_IGN)  # Python's own exit would restore SIG_DFL, which kills


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated(signal.Signals(number).name)


def _report(message: str, code: int) -> int:
    sys.stdout.flush()
    print(f"segdeconv: error: {' '.join(message.split())}", file=sys.stderr)
    return code
