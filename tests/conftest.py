"""Fixtures of all tests: a separate cache folder, and one thread, which makes results independent of the load."""

import os
import signal

import forked_commands
import pytest
import torch

from segdeconv.system import KEEP_FREED

torch.set_num_threads(1)

# A shell lets background jobs ignore SIGINT, and the commands that tests start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _environment(tmp_path_factory, monkeypatch):
    """Give every test the cache folder of this session, and undo what a command run in this process sets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("segdeconv.errors._in_command", False)
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
