"""The signals that end a command, received once: the first is an exception, a second may arrive while it cleans up."""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from segdeconv.errors import Terminated

EXIT_CODES: dict[int, int] = {
    getattr(signal, name): code
    for name, code in (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 143))
    if hasattr(signal, name)  # Windows has no SIGHUP
}
DOUBLE = 1.0  # seconds within which a second signal counts as the first: a wrapper and the terminal may both send it


class Interruption:
    """The signal that ends this process, how often it was received, and whether its exception was raised."""

    def __init__(self) -> None:
        self.raised = False
        self.received = 0
        self.count = 0
        self.time = 0.0
        self.finished: int | None = None

    def again(self, number: int) -> bool:
        """Record a signal; return True if the process should end at once.

        That is so for the third signal, and for a second SIGINT that is not the same key stroke.
        """
        self.count += 1
        if self.count == 1:
            self.received, self.time = number, time.monotonic()
            return False
        late = time.monotonic() - self.time > DOUBLE
        return self.count > 2 or (number == signal.SIGINT == self.received and late)


INTERRUPTION = Interruption()


def handle(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt or Terminated for the first signal; ignore a second one, since the command cleans up."""
    if INTERRUPTION.finished is not None:
        os._exit(INTERRUPTION.finished)
    first = INTERRUPTION.count == 0
    if INTERRUPTION.again(number):
        exit_at_once(number, "interrupted again, before the end was clean - run the same command again")
    if not first:
        return
    INTERRUPTION.raised = True
    raise exception(number)


def raise_again() -> None:
    """Raise the exception of the first signal once more, if a library has swallowed it; called between images."""
    if INTERRUPTION.raised:
        raise exception(INTERRUPTION.received)


def exception(number: int) -> BaseException:
    """Return the exception of a signal: KeyboardInterrupt or Terminated."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(signal.Signals(number).name)


def exit_at_once(number: int, message: str) -> None:
    """End this process with one line, without any further clean-up."""
    with suppress(OSError):
        os.write(2, f"segdeconv: error: {message}\n".encode())
    os._exit(EXIT_CODES[INTERRUPTION.received or number])


def install() -> None:
    """Handle the signals by `handle`, unless they are ignored (as by nohup) or the application handles them itself."""
    if threading.current_thread() is not threading.main_thread():
        return
    defaults: tuple[Any, ...] = (signal.SIG_DFL, signal.default_int_handler)
    for number in EXIT_CODES:
        if signal.getsignal(number) in defaults:
            signal.signal(number, handle)
