"""Fault injection for training: a run that is killed anywhere and resumed must give the hash of an uninterrupted one.

    python tests/chaos.py [kills cuts full_disks signals one_hash faults] --trials 250 --seed 0

Every run is a fork of this process, so that slow imports happen only once. The run shares one byte of memory with this
process and writes its current phase into it, which shows where a kill hit.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import functools
import hashlib
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import albumentations  # noqa: E402, F401
import forked_commands  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from segdeconv import errors, train  # noqa: E402
from segdeconv.checkpoints import checkpoint  # noqa: E402
from segdeconv.cli import command  # noqa: E402
from segdeconv.evaluation import report  # noqa: E402
from segdeconv.system import files  # noqa: E402
from segdeconv.training import callbacks, checkpointing, task  # noqa: E402

PHASES = ("fork", "start", "training", "validation", "metrics", "checkpoint", "evaluation", "end")
STREET = yaml.safe_load((ROOT / "configs/augment/street.yaml").read_text())

# A narrow Bayesian SegNet-Basic with batch norm, dropout and pooling indices: 13 images, 3 steps per epoch, 3 epochs.
CONFIG: dict[str, dict[str, Any]] = {
    "dataset": {
        "_target_": "segdeconv.data.Shapes", "num_train": 13, "num_val": 4, "side": 32, "size": [32, 32],
        "batch_size": 4, "num_workers": 1,
    },
    "augment": STREET,
    "model": {"_target_": "segdeconv.models.SegNetBasic", "width": 8, "dropout_at": "central", "dropout": 0.5},
    "schedule": {"_target_": "segdeconv.optimization.Poly", "warmup_steps": 2},
    "trainer": {"max_epochs": 3, "precision": "32-true", "ema": 0.9, "patience": 3},
    "logger": {},
}  # fmt: skip


def config(resume: str | None = "auto", **changes: Any) -> dict[str, Any]:
    """Return a training config with changes, each written as group__key=value."""
    changed: dict[str, Any] = {**CONFIG, "resume": resume}
    for name, value in changes.items():
        group, _, key = name.partition("__")
        changed[group] = {**changed[group], key: value}
    return changed


def result_hash(run: Path) -> str:
    """Return one hash over both checkpoints, the metric history and the report, without the keys that may differ."""
    sha256 = hashlib.sha256((run / "metrics.csv").read_bytes())

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha256.update(f"{value.dtype} {tuple(value.shape)}".encode())
            sha256.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for name in sorted(value, key=str):
                sha256.update(repr(name).encode())
                add(value[name])
        elif isinstance(value, list | tuple):
            sha256.update(str(len(value)).encode())
            for item in value:
                add(item)
        else:
            sha256.update(repr(value).encode())

    for name in ("last.ckpt", "best.ckpt"):
        content = checkpoint.load_plain(run / name)
        for key in ("num_workers", "cache", "timeout"):
            del content["hyper_parameters"]["config"]["dataset"][key]
        add(content)
    scores = json.loads((run / "report.json").read_text())
    differing = ("checkpoint", "checkpoint_sha256", "command", "config")  # the config names the workers and the cache
    add({name: value for name, value in scores.items() if name not in differing})
    return sha256.hexdigest()


# One run in its own process


class Ended(NamedTuple):
    """The end of a run.

    Attributes:
        code: the exit code, or the negative number of the signal that killed it.
        phase: the phase in which it ended.
        stderr: its whole standard error.
        seconds: its duration.
    """

    code: int
    phase: str
    stderr: str
    seconds: float

    @property
    def unexpected_stderr(self) -> str:
        """A failure message, or "" if standard error is a single error line, after any warnings about the data."""
        lines = self.stderr.replace("\0", "").splitlines()
        lines = [line for line in lines if not line.startswith("segdeconv: warning: ")]
        if "resource_sharer.py" in self.stderr:  # Python's thread that passes tensors to a worker that was just killed
            lines = [line for line in lines if line.startswith("segdeconv: ")]
        as_required = len(lines) == 1 and lines[0].startswith("segdeconv: error: ")
        return "" if as_required else f"not one error line: {self.stderr[-2000:]}"


class Run:
    """A forked training process with its own process group.

    Args:
        run_config: the config to train.
        folder: the run folder.
        before: called in the child before training.
    """

    def __init__(
        self, run_config: Mapping[str, Any], folder: Path, *, before: Callable[[], object] = lambda: None
    ) -> None:
        self.marker = mmap.mmap(-1, 1)
        self.started = time.monotonic()
        self.err = tempfile.TemporaryFile()  # noqa: SIM115 - `end` closes it
        self.pid = os.fork()
        if self.pid == 0:
            self._train_in_child(run_config, folder, before)
        with contextlib.suppress(OSError):  # parent and child both call it, so that the order does not matter
            os.setpgid(self.pid, self.pid)
        self._code: int | None = None

    def _train_in_child(self, run_config: Mapping[str, Any], folder: Path, before: Callable[[], object]) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            os.dup2(self.err.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            _mark_phases(self.marker)
            before()

            def run() -> None:
                train.train(run_config, folder)

            command.run_command(run)
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    stream.flush()
            os._exit(code)

    @property
    def phase(self) -> str:
        return PHASES[self.marker[0]]

    def poll(self) -> int | None:
        if self._code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait_for(self, phase: str, times: int) -> bool:
        """Wait until the run has entered the phase `times` times; return False if it ended before that."""
        previous, deadline = None, time.monotonic() + 60
        while self.poll() is None and time.monotonic() < deadline:
            current = self.phase
            if current != previous and current == phase:
                times -= 1
                if times <= 0:
                    return True
            previous = current
            time.sleep(0.0002)
        return False

    def end(self, timeout: float = 60.0) -> Ended:
        """Wait for the end of the run, or kill it after `timeout` seconds and raise TimeoutError."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(f"a run did not end within {timeout:.0f} s, in phase {self.phase}")
            time.sleep(0.002)
        assert self._code is not None
        self.err.seek(0)
        stderr = self.err.read().decode(errors="replace")
        self.err.close()
        return Ended(self._code, self.phase, stderr, time.monotonic() - self.started)

    def remaining_processes(self, seconds: float = 10.0) -> str:
        """Return a failure message if processes of the group still exist after `seconds`, or ""."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return ""
            time.sleep(0.01)
        return f"some of its processes still exist {seconds:.0f} s after its end"


def _mark_phases(marker: mmap.mmap) -> None:
    """Patch the functions that begin a phase so that they write its number into the marker."""

    def marked(owner: Any, name: str, phase: str, *, restore: bool = True) -> None:
        original, number = getattr(owner, name), PHASES.index(phase)

        @functools.wraps(original)
        def call(*arguments: Any, **keywords: Any) -> Any:
            previous, marker[0] = marker[0], number
            try:
                return original(*arguments, **keywords)
            finally:
                if restore:
                    marker[0] = previous

        setattr(owner, name, call)

    marked(train, "train", "start", restore=False)
    marked(task.SegmentationTask, "on_train_start", "training", restore=False)
    marked(task.SegmentationTask, "on_train_batch_start", "training", restore=False)
    marked(task.SegmentationTask, "on_validation_start", "validation", restore=False)
    marked(task.SegmentationTask, "on_validation_end", "training", restore=False)
    marked(callbacks.MetricsFile, "append", "metrics")
    marked(checkpointing.Checkpoints, "keep", "checkpoint")
    marked(train.Evaluation, "of", "evaluation")
    marked(report, "write_json", "end", restore=False)


def cut_at_file_operation(folder: Path, number: int) -> None:
    """Kill this process just before its file operation `number` in `folder`: open, rename, link or remove."""
    left = [number]

    def count_operation(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.link", "os.remove") and str(folder) in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_operation)


def fill_disk(calls: int) -> None:
    """Let fsync fail with ENOSPC from call number `calls` on."""
    left, sync = [calls], os.fsync

    def failing_fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    os.fsync = failing_fsync


def limit_files(size: int) -> None:
    """Limit every file to `size` bytes, like a disk that fills up in the middle of a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# Trials


class TrialRandom(random.Random):
    """The random numbers of trial `number` of a suite, a function of the seed, the suite and the number."""

    def __init__(self, seed: int, suite: str, number: int) -> None:
        super().__init__(f"{seed} {suite} {number}")
        self.number = number


class Trial(NamedTuple):
    """The result of a trial.

    Attributes:
        injected: the phases in which faults were injected.
        failure: a failure message, or "".
    """

    injected: list[str]
    failure: str


class Setup(NamedTuple):
    """The run folder and the expected result of all trials.

    Attributes:
        folder: the run folder of every trial.
        expected: the hash of an uninterrupted run.
        seconds: the duration of an uninterrupted run.
        variant_hashes: the expected hashes of the variants in `one_hash`, filled in there.
    """

    folder: Path
    expected: str
    seconds: float
    variant_hashes: dict[str, str]

    def finish_and_check(self, injected: list[str], **changes: Any) -> Trial:
        """Resume the run until it is finished and check its hash."""
        ended = Run(config(**changes), self.folder).end()
        if ended.code != 0:
            return Trial(injected, f"exit {ended.code}: {ended.stderr[-2000:]}")
        if left := [path.name for path in self.folder.glob(f"{files.PARTIAL}*")]:
            return Trial(injected, f"temporary files left behind: {left}")
        return Trial(injected, "" if result_hash(self.folder) == self.expected else "the hash differs")

    def lost_checkpoint(self) -> str:
        """Return a failure message if a checkpoint under a final name does not match its sidecar, or ""."""
        for name in ("last.ckpt", "best.ckpt", "previous.ckpt"):
            if (self.folder / name).is_file():
                try:
                    checkpoint.verify(self.folder / name)
                except errors.CheckpointError as error:
                    return f"a checkpoint is lost: {error}"
        return ""


def kills(setup: Setup, rng: TrialRandom) -> Trial:
    """SIGKILL at any time, up to three times per run; four in ten are aimed at validation or a checkpoint write.

    Only the main process is killed, as the kernel's out-of-memory killer does it; its workers must end by themselves.
    """
    injected: list[str] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        run = Run(config(), setup.folder)
        if rng.random() < 0.4:
            run.wait_for(rng.choice(("validation", "checkpoint")), rng.choice((1, 1, 2, 3)))
            time.sleep(rng.uniform(0, 0.012))
        else:
            time.sleep(rng.uniform(0.02, setup.seconds))
        if run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
        ended = run.end()
        if ended.code == -signal.SIGKILL:
            injected.append(ended.phase)
        elif ended.code != 0:
            return Trial(injected, f"exit {ended.code}: {ended.stderr[-2000:]}")
        if lost := setup.lost_checkpoint():
            return Trial(injected, lost)
    return setup.finish_and_check(injected)


def cuts(setup: Setup, rng: TrialRandom, operations: int = 90) -> Trial:
    """SIGKILL just before a file operation in the run folder, in two attempts in a row."""
    injected = []
    for _ in range(2):
        number = rng.randint(1, operations)
        before = functools.partial(cut_at_file_operation, setup.folder, number)
        ended = Run(config(), setup.folder, before=before).end()
        if ended.code not in (0, -signal.SIGKILL):
            return Trial(injected, f"exit {ended.code} at operation {number}: {ended.stderr[-2000:]}")
        injected += [ended.phase] * (ended.code != 0)
        if lost := setup.lost_checkpoint():
            return Trial(injected, f"{lost} (operation {number})")
    return setup.finish_and_check(injected)


def full_disks(setup: Setup, rng: TrialRandom) -> Trial:
    """A disk that fills up at any write: exit code 5, one error line, and existing checkpoints stay intact."""
    changes = {}
    before = functools.partial(fill_disk, rng.randint(1, 20))
    if rng.random() < 0.5:
        before = functools.partial(limit_files, rng.randint(2_000, 160_000))
        changes = {"dataset__num_workers": 0}  # the batches of workers are files too and would hit the limit
    ended = Run(config(**changes), setup.folder, before=before).end()
    failure = setup.lost_checkpoint()
    if ended.code not in (0, 5):
        failure = failure or f"exit {ended.code}: {ended.stderr[-2000:]}"
    if not failure and ended.code == 5:
        failure = ended.unexpected_stderr
    return Trial([ended.phase], failure) if failure else setup.finish_and_check([ended.phase] * (ended.code != 0))


STOPS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 143}
MOMENTS = ("start", "training", "validation", "last validation", "metrics", "checkpoint", "evaluation")

FIRST_STOPS = (  # as `timeout`, a closed terminal and Ctrl-C send them
    (signal.SIGTERM, "group", "training"),
    (signal.SIGHUP, "group", "start"),
    (signal.SIGINT, "process", "last validation"),
)


def signals(setup: Setup, rng: TrialRandom) -> Trial:
    """A signal to the process, its group or every process, at any time: one error line and the documented exit code."""
    number, target, moment = (
        rng.choice(list(STOPS)),
        rng.choice(("process", "group", "everyone")),
        rng.choice(MOMENTS),
    )
    if rng.number < len(FIRST_STOPS):
        number, target, moment = FIRST_STOPS[rng.number]
    changes = {"dataset__num_workers": 2}
    run = Run(config(**changes), setup.folder)
    run.wait_for(moment.removeprefix("last "), 3 if moment == "last validation" else 1)
    time.sleep(rng.uniform(0, 0.05) if moment in ("start", "training") else 0)
    everyone = [*descendants(run.pid), run.pid]  # workers first, which is the harder case
    phase = run.phase
    for pid in {"process": [run.pid], "group": [-run.pid], "everyone": everyone}[target]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    ended = run.end()
    label = f"{signal.Signals(number).name} to {target} in {moment}"
    injected = [phase]
    if ended.code == 0 and phase == "end":
        return setup.finish_and_check([], **changes)
    if ended.code != STOPS[number]:
        return Trial(injected, f"{label}: exit {ended.code}: {ended.stderr[-2000:]}")
    failure = ended.unexpected_stderr or setup.lost_checkpoint() or run.remaining_processes()
    return Trial(injected, f"{label}: {failure}") if failure else setup.finish_and_check(injected, **changes)


def descendants(pid: int) -> list[int]:
    """Return all descendants of a process, children before their parents."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [process for child in children for process in (*descendants(int(child)), int(child))]
    return []


def one_hash(setup: Setup, rng: TrialRandom) -> Trial:
    """One hash per training variant for any number of workers and any cache, also if a resumed run changes them."""
    variants = [
        {},
        {"trainer__ema": None},
        {"trainer__accumulate_grad_batches": 2},
        {"trainer__accumulate_grad_batches": 2, "trainer__ema": None},
    ]
    variant: dict[str, Any] = rng.choice(variants)
    expected = setup.variant_hashes.get(str(variant))
    if expected is None:
        ended = Run(config(**variant, dataset__num_workers=0), setup.folder).end()
        assert ended.code == 0, ended.stderr
        expected = setup.variant_hashes[str(variant)] = result_hash(setup.folder)
        shutil.rmtree(setup.folder)
    halves = []
    for _ in range(rng.choice((1, 2))):
        workers, cache = rng.choice((0, 1, 2, 4)), rng.choice(("none", "memory", "disk"))
        halves.append({**variant, "dataset__num_workers": workers, "dataset__cache": cache})
    if len(halves) == 2:
        run = Run(config(**halves[0]), setup.folder)
        run.wait_for("training", 2)
        if run.poll() is None:
            os.kill(run.pid, signal.SIGTERM)
        if (ended := run.end()).code not in (0, 143):
            return Trial([], f"exit {ended.code}: {ended.stderr[-2000:]}")
    trial = setup._replace(expected=expected).finish_and_check([], **halves[-1])
    return Trial([], trial.failure and f"{halves}: {trial.failure}")


FAULTS = {  # exit code, seconds within which all processes must have ended
    "folder removed": (5, 30),
    "folder read-only": (5, 30),
    "worker killed": (2, 30),
    "worker stopped": (2, 32),
    "worker stopped, then SIGTERM": (143, 32),
    "interrupted twice": (130, 30),
}


def faults(setup: Setup, rng: TrialRandom) -> Trial:
    """Other faults: the run ends soon with one error line and all its processes, and can be resumed.

    A hanging worker is simulated with SIGSTOP, so that only SIGKILL can end it.
    """
    fault = rng.choice(list(FAULTS))
    code, seconds = FAULTS[fault]
    changes = {"dataset__num_workers": 2, "dataset__timeout": 2}
    run = Run(config(**changes), setup.folder, before=functools.partial(_remove_or_lock, fault, setup.folder))
    worker = 0
    if "worker" in fault:
        run.wait_for("validation", 2)
        worker = next(iter(descendants(run.pid)), 0)
        os.kill(worker, signal.SIGKILL if fault == "worker killed" else signal.SIGSTOP)
    if fault == "worker stopped, then SIGTERM":
        os.kill(run.pid, signal.SIGTERM)
    if fault == "interrupted twice":
        run.wait_for("validation", 1)
        for _ in range(2):
            os.kill(run.pid, signal.SIGINT)
            time.sleep(0.02)
    try:
        ended = run.end(seconds)
    except TimeoutError as error:
        return Trial([fault], f"{fault}: {error}")
    if setup.folder.exists():
        setup.folder.chmod(0o755)
    if ended.code != code:
        return Trial([fault], f"{fault}: exit {ended.code}: {ended.stderr[-2000:]}")
    failure = ended.unexpected_stderr or setup.lost_checkpoint() or run.remaining_processes(seconds=10)
    return Trial([fault], f"{fault}: {failure}") if failure else setup.finish_and_check([fault])


def _remove_or_lock(fault: str, folder: Path) -> None:
    """For the two faults of a folder, remove it or make it read-only after the second validation."""
    if not fault.startswith("folder"):
        return
    forked_commands.restrict({"plain_user": True})
    original, left = task.SegmentationTask.on_validation_end, [2]

    def on_validation_end(self: Any) -> None:
        original(self)
        left[0] -= 1
        if left[0] == 0:
            shutil.rmtree(folder) if fault == "folder removed" else folder.chmod(0o555)

    task.SegmentationTask.on_validation_end = on_validation_end  # type: ignore[method-assign]


SUITES: dict[str, Callable[[Setup, TrialRandom], Trial]] = {
    "kills": kills, "cuts": cuts, "full_disks": full_disks, "signals": signals, "one_hash": one_hash, "faults": faults,
}  # fmt: skip


def main() -> int:
    """Run suites of trials, print the injected faults and failed trials, and return the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", default=list(SUITES), help=f"{', '.join(SUITES)}, or NAME=TRIALS")
    parser.add_argument("--trials", type=int, default=250, help="number of trials per suite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial, to repeat one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="chaos-") as root:
        os.environ["XDG_CACHE_HOME"] = str(Path(root) / "cache")
        uninterrupted = Path(root) / "uninterrupted"
        ended = Run(config(), uninterrupted).end()
        assert ended.code == 0, ended.stderr
        setup = Setup(Path(root) / "run", result_hash(uninterrupted), ended.seconds, {})
        print(f"an uninterrupted run takes {ended.seconds:.2f} s and has the hash {setup.expected[:16]}", flush=True)
        failures = 0
        for word in arguments.suites:
            name, _, trials = word.partition("=")
            failures += _run_suite(name, setup, int(trials or arguments.trials), arguments.seed, arguments.first)
        return failures


def _run_suite(name: str, setup: Setup, trials: int, seed: int, first: int) -> int:
    """Run the trials of a suite and return the number of failures."""
    injected: collections.Counter[str] = collections.Counter()
    failures, started = 0, time.monotonic()
    for number in range(first, first + trials):
        shutil.rmtree(setup.folder, ignore_errors=True)
        trial = SUITES[name](setup, TrialRandom(seed, name, number))
        injected.update(trial.injected)
        if trial.failure:
            failures += 1
            copy = Path(tempfile.gettempdir()) / f"chaos-{name}-{seed}-{number}"
            if setup.folder.exists():
                shutil.copytree(setup.folder, copy, dirs_exist_ok=True)
            print(f"FAILED {name} trial {number}, faults in {trial.injected}: {trial.failure} - see {copy}", flush=True)
        if (number + 1) % 50 == 0:
            print(f"{name}: {number + 1} trials, {injected.total()} faults, {failures} failures", flush=True)
    phases = ", ".join(f"{phase} {injected[phase]}" for phase in (*PHASES, *FAULTS) if injected[phase])
    writing = sum(injected[phase] for phase in ("validation", "metrics", "checkpoint"))
    print(
        f"{name}: {failures} of {trials} trials failed (seed {seed}, {time.monotonic() - started:.0f} s); "
        f"{injected.total()} faults: {phases}; "
        f"{100 * writing / max(1, injected.total()):.0f} % in validation or a write",
        flush=True,
    )
    return failures


if __name__ == "__main__":
    sys.exit(min(1, main()))
