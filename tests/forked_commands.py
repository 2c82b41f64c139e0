"""The real commands in processes that cost a fork: torch and Lightning are imported once, by a server that forks.

Run as a script this file is the server: a job is a line of JSON on stdin, its outcome a line of JSON on stdout.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
NOT_PERMITTED = 99  # the child's exit code where the kernel refuses a restriction


class Outcome(NamedTuple):
    """How a command ended. code: its exit code, or the negative signal; seconds: of the forked process alone."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def sentence(self) -> str:
        """The one line of the contract: the last of stderr, and the only one of its kind, with no traceback."""
        assert "Traceback" not in self.err, self.err
        said = self.err.replace("\0", "")  # torch's handler of a worker's signals writes one
        lines = [line for line in said.splitlines() if line.startswith("segdeconv: error: ")]
        assert len(lines) == 1, (self.code, self.err, self.out)
        assert said.rstrip().splitlines()[-1] == lines[0], self.err
        return lines[0].removeprefix("segdeconv: error: ")


class Commands:
    """Runs `scripts/NAME.py` with arguments as a fresh process would, from any folder."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )

    def __call__(
        self,
        script: str,
        *words: object,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        limits: Mapping[str, Any] | None = None,
        timeout: float = 120,
    ) -> Outcome:
        """limits: what is taken from the process before it starts; see `restrict`."""
        job = [script, [str(word) for word in words], str(cwd), dict(env or {}), dict(limits or {}), timeout]
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        outcome = Outcome(*json.loads(self.server.stdout.readline()))
        if outcome.code == NOT_PERMITTED:
            import pytest

            pytest.skip(f"this kernel does not permit it: {outcome.err.strip()}")
        return outcome

    def close(self) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait(30)
        self.server.stdout.close()


# What a process can be deprived of


def restrict(limits: Mapping[str, Any]) -> None:
    """plain_user: root no longer reads and writes what its permissions forbid. file_size, memory: in bytes, of any file
    that is written and of all addresses. tmpfs: {folder: size}, small disks, seen by this process alone. read_only:
    folders that become so. no_network: nothing but the loopback.
    """
    private = {"tmpfs", "read_only"} & set(limits)
    if private:
        _unshare(0x00020000)  # CLONE_NEWNS
        _mount("none", "/", None, 0x44000)  # MS_REC | MS_PRIVATE: nobody else sees what follows
    for folder, size in limits.get("tmpfs", {}).items():
        _mount("tmpfs", folder, f"size={size}", 0)
    for folder in limits.get("read_only", ()):
        _mount(folder, folder, None, 4096)  # MS_BIND
        _mount("none", folder, None, 4096 | 32 | 1)  # MS_BIND | MS_REMOUNT | MS_RDONLY
    if limits.get("no_network"):
        _unshare(0x40000000)  # CLONE_NEWNET
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:  # SIOCSIFFLAGS: IFF_UP | IFF_RUNNING
            fcntl.ioctl(any_socket, 0x8914, b"lo".ljust(16, b"\0") + (0x41).to_bytes(2, "little").ljust(24, b"\0"))
    if "file_size" in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_size"],) * 2)
    if "memory" in limits:
        resource.setrlimit(resource.RLIMIT_AS, (limits["memory"],) * 2)
    if limits.get("plain_user"):
        _drop_capabilities()


def _checked(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise PermissionError(number, f"{what}: {os.strerror(number)}")


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _unshare(flag: int) -> None:
    _checked(_libc().unshare(flag), "unshare")


def _mount(source: str, target: str, options: str | None, flags: int) -> None:
    kind = b"tmpfs" if source == "tmpfs" else None
    words = options.encode() if options else None
    _checked(_libc().mount(source.encode(), target.encode(), kind, ctypes.c_ulong(flags), words), f"mount {target}")


def _drop_capabilities() -> None:
    """Root without CAP_DAC_OVERRIDE and the rest; for others there is nothing to drop."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    _checked(_libc().capset(header, none), "capset")


# The server


def serve() -> None:
    """Import what is slow, then fork for every line."""
    import albumentations  # noqa: F401
    import hydra
    import hydra.core.override_parser.overrides_parser  # noqa: F401
    import torch

    import segdeconv.evaluation.evaluate
    import segdeconv.inference.predictors
    import segdeconv.train  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(_run(*json.loads(line))), flush=True)


def _run(
    script: str, words: Sequence[str], cwd: str, env: Mapping[str, str], limits: Mapping[str, Any], timeout: float
) -> tuple[int, str, str, float]:
    started = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _become(script, words, cwd, env, limits, out.fileno(), err.fileno())
        code = _wait(child, started + timeout)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
    return code, said[0], said[1], time.monotonic() - started


def _wait(child: int, deadline: float) -> int:
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)  # the child is its group's leader
        time.sleep(0.01)


def _become(
    script: str, words: Sequence[str], cwd: str, env: Mapping[str, str], limits: Mapping[str, Any], out: int, err: int
) -> None:
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.update(env)
        os.chdir(cwd)
        try:
            restrict(limits)
        except OSError as error:
            print(error, file=sys.stderr)
            code = NOT_PERMITTED
            return
        path = ROOT / "scripts" / f"{script}.py"
        sys.argv = [str(path), *words]
        sys.path[0] = str(path.parent)
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
