"""The real commands in forked processes of a server that has imported torch and Lightning already.

As a script, this file is the server. It reads each request as a line of JSON from stdin and writes its answer as a line
of JSON to stdout. The server has one thread and runs nothing itself: a process forked from one that has used the
threads of a library can wait for them forever.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import pkgutil
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
from typing import IO, Any, NamedTuple

from fresh_commands import child_environment

ROOT = Path(__file__).parents[1]
NOT_PERMITTED = 99  # the child's exit code where the kernel refuses a restriction
STREAMS = ("stdin", "stdout", "stderr")


class Outcome(NamedTuple):
    """The outcome of a command.

    Attributes:
        code: the exit code, or the negative number of the signal that killed it.
        out: its whole standard output.
        err: its whole standard error.
        seconds: the duration of the forked process.
    """

    code: int
    out: str
    err: str
    seconds: float

    @property
    def error_message(self) -> str:
        """The error message, which must be the last line of stderr and the only one, without a traceback."""
        assert "Traceback" not in self.err, self.err
        text = self.err.replace("\0", "")  # torch's signal handler in a worker writes one
        lines = [line for line in text.splitlines() if line.startswith("segdeconv: error: ")]
        assert len(lines) == 1, (self.code, self.err, self.out)
        assert text.rstrip().splitlines()[-1] == lines[0], self.err
        return lines[0].removeprefix("segdeconv: error: ")


class Commands:
    """A client of the server: runs `scripts/NAME.py` as a new process would, from any folder."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(ROOT, OMP_NUM_THREADS="1"),
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
        """Run a command and return its outcome; see `start` and `Started.end`."""
        return self.start(script, *words, cwd=cwd, env=env, limits=limits).end(timeout)

    def start(
        self,
        script: str,
        *words: object,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        limits: Mapping[str, Any] | None = None,
        begun: Path | None = None,
    ) -> Started:
        """Start a command in a process group of its own.

        Args:
            script: the name of a file in scripts/ without its suffix.
            words: the arguments of the command.
            cwd: the working directory.
            env: additional environment variables.
            limits: restrictions of the process; see `restrict` and `open_streams`.
            begun: a file that the command creates as soon as it handles signals.
        """
        name = None if begun is None else str(begun)
        job = [script, [str(word) for word in words], str(cwd), dict(env or {}), dict(limits or {}), name]
        return Started(self, self._answer("start", job))

    def _answer(self, request: str, values: Sequence[Any]) -> Any:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps([request, *values]) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def close(self) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait(300)  # a loaded machine takes a minute to free all modules
        self.server.stdout.close()


class Started(NamedTuple):
    """A command that has been started.

    Attributes:
        commands: the client that has started it.
        pid: its process id, which is that of its process group.
    """

    commands: Commands
    pid: int

    def end(self, timeout: float = 120) -> Outcome:
        """Wait for the end of the command, or kill its process group after `timeout` seconds."""
        outcome = Outcome(*self.commands._answer("end", [self.pid, timeout]))
        if outcome.code == NOT_PERMITTED:
            import pytest

            pytest.skip(f"this kernel does not allow the restriction: {outcome.err.strip()}")
        return outcome


# Restrictions of a process


def restrict(limits: Mapping[str, Any]) -> None:
    """Restrict this process.

    Args:
        limits: any of these keys:
            plain_user: drop the capabilities with which root ignores file permissions.
            file_size: the maximum size of a written file in bytes.
            memory: the maximum size of the address space in bytes.
            tmpfs: {folder: size}, small disks that are mounted for this process only.
            read_only: folders that become read-only for this process.
            no_network: leave only the loopback device.
    """
    private = {"tmpfs", "read_only"} & set(limits)
    if private:
        _unshare(0x00020000)  # CLONE_NEWNS
        _mount("none", "/", None, 0x44000)  # MS_REC | MS_PRIVATE: hides the following mounts from other processes
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


def open_streams(limits: Mapping[str, Any], encoding: str | None) -> None:
    """Open sys.stdin, sys.stdout and sys.stderr.

    Args:
        limits: any of these keys:
            stdout: "closed pipe", a pipe whose reader has ended, or "full device".
            closed: the numbers of the standard streams that are closed.
        encoding: that of the output; None: the default.
    """
    if limits.get("stdout") == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    elif limits.get("stdout") == "full device":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), *(os.fdopen(n, "w", encoding=encoding) for n in (1, 2))
    for number in limits.get("closed", ()):
        os.close(number)
        setattr(sys, STREAMS[number], None)


def _require_success(result: int, call: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise PermissionError(number, f"{call}: {os.strerror(number)}")


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _unshare(flag: int) -> None:
    _require_success(_libc().unshare(flag), "unshare")


def _mount(source: str, target: str, options: str | None, flags: int) -> None:
    kind = b"tmpfs" if source == "tmpfs" else None
    data = options.encode() if options else None
    _require_success(
        _libc().mount(source.encode(), target.encode(), kind, ctypes.c_ulong(flags), data), f"mount {target}"
    )


def _drop_capabilities() -> None:
    """Drop all capabilities, CAP_DAC_OVERRIDE among them; without root this changes nothing."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    _require_success(_libc().capset(header, none), "capset")


# The server


def serve() -> None:
    """Import the slow modules and fill caches, then fork for every job."""
    gc.disable()
    import albumentations  # noqa: F401
    import hydra
    import hydra.core.override_parser.overrides_parser
    import torch

    import segdeconv
    from segdeconv.drawing import html

    for module in pkgutil.walk_packages(segdeconv.__path__, "segdeconv."):
        if not module.name.endswith("__main__") and "triton" not in module.name:
            importlib.import_module(module.name)  # Lightning too, which takes longer than a tiny run

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        # Lightning has torch search for the driver at each operation on fake tensors, unless no device is visible.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        hydra.compose(
            "train", ["dataset=folder", "hydra.run.dir=run", "dataset.size=[32,32]"], return_hydra_config=True
        )
    for template in html._pages().list_templates(["html"]):
        html._pages().get_template(template)
    # A child whose garbage collector went through all these objects would copy their memory, in a third of its time.
    gc.freeze()
    gc.enable()
    running: dict[int, Running] = {}
    for line in sys.stdin:
        request, *values = json.loads(line)
        answer: Any
        if request == "start":
            started = _start(*values)
            running[started.pid] = started
            answer = started.pid
        else:
            pid, timeout = values
            answer = _end(running.pop(pid), timeout)
        print(json.dumps(answer), flush=True)
    for pid in running:  # of tests that failed before they waited
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


class Running(NamedTuple):
    """A child of the server; `out` and `err` are files with what it prints."""

    pid: int
    out: IO[bytes]
    err: IO[bytes]
    started: float


def _start(
    script: str, words: Sequence[str], cwd: str, env: Mapping[str, str], limits: Mapping[str, Any], begun: str | None
) -> Running:
    started = time.monotonic()
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - `_end` closes them
    child = os.fork()
    if child == 0:
        _run_in_child(script, words, cwd, env, limits, begun, out.fileno(), err.fileno())
    return Running(child, out, err, started)


def _end(running: Running, timeout: float) -> tuple[int, str, str, float]:
    code = _wait(running.pid, time.monotonic() + timeout)
    texts = []
    for file in (running.out, running.err):
        with file:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return code, texts[0], texts[1], time.monotonic() - running.started


def _wait(child: int, deadline: float) -> int:
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)  # the child leads its process group
        time.sleep(0.002)


def _run_in_child(
    script: str,
    words: Sequence[str],
    cwd: str,
    env: Mapping[str, str],
    limits: Mapping[str, Any],
    begun: str | None,
    out: int,
    err: int,
) -> None:
    code = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        os.environ.update(env)
        os.chdir(cwd)
        try:
            restrict(limits)
            open_streams(limits, env.get("PYTHONIOENCODING"))
        except OSError as error:
            os.write(2, str(error).encode())
            code = NOT_PERMITTED
            return
        if begun is not None:
            _create_once_signals_are_handled(Path(begun))
        path = ROOT / "scripts" / f"{script}.py"
        sys.argv = [str(path), *words]
        sys.path[0] = str(path.parent)
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except Exception as error:  # as at the end of an interpreter
                code = 120
                if stream is sys.stdout and sys.stderr is not None:
                    print(f"Exception ignored in the last flush: {error!r}", file=sys.stderr)
        os._exit(code)


def _create_once_signals_are_handled(file: Path) -> None:
    from segdeconv.cli import command

    install = command.interruption.install

    def installed() -> None:
        install()
        file.touch()

    command.interruption.install = installed


if __name__ == "__main__":
    serve()
