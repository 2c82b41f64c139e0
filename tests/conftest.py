"""What every test gets: an own cache folder and one thread, so that results do not depend on the machine's load."""

import os
import signal

import forked_commands
import pytest
import torch

torch.set_num_threads(1)

# A shell starts what it runs in the background deaf to Ctrl-C, and so would be every command that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    """The real commands, at the price of a fork: see forked_commands.py."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.getbasetemp() / "cache")
    server = forked_commands.Commands()
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before
    yield server
    server.close()
