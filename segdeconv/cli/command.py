"""The frame of every command: its argument parser, its exit code, and one line on stderr for an error."""

import argparse
import difflib
import errno
import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from segdeconv.errors import Interrupted, SegdeconvError, Terminated, UsageError, command, enter_command
from segdeconv.system import KEEP_FREED, interruption, output

# Errors of a disk that is full, read-only, broken or owned by another user; any other OSError is a bug in segdeconv.
DISK_ERRORS = (
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG, errno.ENOSPC, errno.EPERM, errno.EROFS,
)  # fmt: skip

HELP = {"-h", "--help"}
SCHEME = "://"  # in every address, as in s3://BUCKET/FOLDER
SIGPIPE = 141  # exit code: 128 + the number of the signal


if os.environ.get(KEEP_FREED):  # a process spawned by a command, which imports the command's script again
    enter_command()
    Image.MAX_IMAGE_PIXELS = None
    output.protect()


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
        reason, _, names = message.partition(": ")
        if reason == "the following arguments are required":  # parse_intermixed_args lists optional ones too
            optional = {action.metavar or action.dest for action in self._actions if action.nargs == "*"}
            message = f"{reason}: {', '.join(name for name in names.split(', ') if name not in optional)}"
        elif reason == "unrecognized arguments":
            options = {option.lstrip("-"): option for option in self._option_string_actions}
            close = difflib.get_close_matches(names.split()[0].partition("=")[0].lstrip("-"), options, n=1)
            message += f" - did you mean {options[close[0]]}?" if close else ""
        raise UsageError(f"{message} - see {self.prog} --help")


def local_path(text: str) -> Path:
    """Parse the value of an option of an `ArgumentParser` that names a file or folder to write.

    Raises:
        argparse.ArgumentTypeError: The text is an address, which would become a folder with such a name.
    """
    try:
        require_local("value", text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)


def require_local(option: str, text: str) -> None:
    """Raise UsageError if an option names an address instead of a path of this machine."""
    if SCHEME in text:
        raise UsageError(f"{option} {text} is an address, not a path of this machine - give a path")


def run_command(main: Callable[[], int | None], help_text: str = "", *, needs_reader: bool = False) -> NoReturn:
    """Run a script's `main` and exit the process with the documented exit code.

    0 success; 1 a bug in segdeconv, with its traceback; 2 error in usage, config or data; 3 training diverged;
    4 checkpoint; 5 disk; 6 verified in part; 130 interrupted; 141 the reader of stdout has ended; 143 terminated.

    Args:
        main: The script's function; it may return an exit code.
        help_text: Text that -h and --help print, for a script without an `ArgumentParser`.
        needs_reader: Exit with 141 instead of 0 if the reader of stdout has ended. Such a command stops early by
            itself, see `output.reader_ended`; all others complete their work.
    """
    enter_command()
    output.protect()
    Image.MAX_IMAGE_PIXELS = None  # dataset.max_pixels is checked from the header
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # silent: segdeconv reports errors of videos itself
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    os.environ.setdefault(KEEP_FREED, "1")
    if sys.platform == "linux":
        # Python 3.14 starts processes from a server instead. It notices the end of a worker only after dataset.timeout,
        # and the workers do not share the memory of the data set.
        multiprocessing.set_start_method("fork", force=True)
    interruption.install()
    try:
        code = _run(main, help_text)
    except (KeyboardInterrupt, Terminated):  # while another error was reported
        code = interruption.EXIT_CODES[interruption.INTERRUPTION.received]
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or _report_disk(error)
    if code == 0 and (failed_write := output.write_error()) is not None:  # argparse hides it
        code = _report_disk(failed_write)
    if code == 0 and needs_reader and output.reader_ended() and not HELP & set(sys.argv[1:]):
        code = SIGPIPE
    interruption.INTERRUPTION.finished = code  # a signal from now on ends the process at once
    sys.exit(code)


def _run(main: Callable[[], int | None], help_text: str) -> int:
    script = Path(sys.argv[0])
    try:
        if help_text and HELP & set(sys.argv[1:]):
            print(help_text.replace(f"python scripts/{script.name}", command(script.stem)), flush=True)
            return 0
        try:
            code = main() or 0
        except Exception as error:
            if not isinstance(error, Interrupted):
                interruption.raise_again()  # a library may replace the exception of a signal by its own
            raise
        interruption.raise_again()
        return code
    except SystemExit as ended:  # by argparse, after --help
        if ended.code not in (None, 0):
            raise
        return 0
    except SegdeconvError as error:
        return _report(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _report("interrupted - run the same command again", 130)
    except Terminated as error:
        return _report(f"stopped by {error} - run the same command again", 143)
    except BrokenPipeError:  # of Windows, or of another stream than stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _report("memory ran out - close other programs, or use smaller images or batches", 2)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        problem = f"{error.filename}: {(error.strerror or str(error)).lower()}"
        return _report(f"{problem}, so it cannot be written - choose another name or folder", 2)
    except UnicodeEncodeError as error:
        if error.encoding.replace("-", "").lower() == "utf8" or error.encoding != sys.getfilesystemencoding():
            raise
        problem = f"the file name {error.object} has characters that this system's encoding {error.encoding} lacks"
        return _report(f"{problem} - set PYTHONUTF8=1, or rename the file or class", 2)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return _report_disk(error)


def _report_disk(error: OSError) -> int:
    problem = f"cannot read or write {error.filename or 'a file'}: {error.strerror}"
    return _report(f"{problem} - free some space, change the permissions or choose another folder", 5)


def _report(message: str, code: int) -> int:
    with suppress(OSError):
        sys.stdout.flush()
    print(f"segdeconv: error: {' '.join(message.split())}", file=sys.stderr)
    return code
