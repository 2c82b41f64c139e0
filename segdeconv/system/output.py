"""The standard streams of a command: they outlive their reader, a full disk and being closed."""

import io
import os
import sys

_kept: list[object] = []  # the replaced streams, which would close their descriptors when they are deleted


class _Descriptor(io.FileIO):
    """A descriptor whose writes fail at most once, so that no further message or flush fails after the error.

    Attributes:
        reader_ended: The reader of the pipe has ended.
        error: The first other error.
        strict: Raise that error, instead of discarding it.
    """

    reader_ended = False
    error: OSError | None = None
    strict = True

    def write(self, data: object) -> int:
        if self.reader_ended or self.error is not None:
            return memoryview(data).nbytes  # type: ignore[arg-type]
        try:
            return super().write(data)  # type: ignore[arg-type]
        except BrokenPipeError:
            self.reader_ended = True
        except OSError as error:
            self.error = error
            error.filename = "standard output"
            if self.strict:
                raise
        return memoryview(data).nbytes  # type: ignore[arg-type]


def protect() -> None:
    """Replace stdout and stderr by streams that discard what their reader no longer reads, and open closed ones.

    They write each line at once, and escape characters that the terminal's encoding does not have. A stream that a
    test or a notebook has replaced is left alone.
    """
    for number in range(3):  # a closed descriptor would be given to the next file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115 - until exit
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until exit
            setattr(sys, name, stream)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="backslashreplace")
        # Not the console of Windows, which is not a file.
        if os.name == "nt" or type(stream) is not io.TextIOWrapper or _descriptor(stream) is not None:
            continue
        if stream.fileno() != number:
            continue
        descriptor = _Descriptor(number, "w", closefd=False)
        descriptor.strict = name == "stdout"
        _kept.append(stream)
        buffer = io.BufferedWriter(descriptor)
        replaced = io.TextIOWrapper(buffer, stream.encoding, "backslashreplace", newline=None, line_buffering=True)
        setattr(sys, name, replaced)


def _descriptor(stream: object) -> _Descriptor | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Descriptor) else None


def reader_ended() -> bool:
    """Return whether the reader of stdout, such as `head -1`, has ended."""
    descriptor = _descriptor(sys.stdout)
    return descriptor is not None and descriptor.reader_ended


def write_error() -> OSError | None:
    """Return the error of the disk with which a write to stdout failed, or None."""
    descriptor = _descriptor(sys.stdout)
    return None if descriptor is None else descriptor.error
