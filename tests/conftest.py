"""Fixtures of all tests: a separate cache folder, and one thread, which makes results independent of the load."""

import gc
import os
import signal

import forked_commands
import pytest

from segdeconv.system import KEEP_FREED

# A third of the collection's time was that of the garbage collector, which went through all imported modules 30 times.
gc.disable()

# A shell lets background jobs ignore SIGINT, and the commands that tests start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """Exempt what the collection has made from garbage collection, in the tests and in the processes that they fork."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    """Let the interpreter free these objects at its end; what is left then, nanobind reports as leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch  # here, because xdist's main process reads this file and runs no test

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _environment(tmp_path_factory, monkeypatch):
    """Give every test the cache folder of this session, and undo what a command run in this process sets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("segdeconv.errors._in_command", False)
    monkeypatch.setattr("segdeconv.errors._warned", set())  # a warning is printed once per process
    yield
    os.environ.pop(KEEP_FREED, None)


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    """Run the real commands in forked processes; see forked_commands.py."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.getbasetemp() / "cache")
    server = forked_commands.Commands()
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before
    yield server
    server.close()
