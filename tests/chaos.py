"""Runs that are killed anywhere and go on: one hash, or the trial is wrong.

    python tests/chaos.py [kills cuts full_disks signals one_hash faults] --trials 250 --seed 0

A fork for every run: what is slow is imported once. Where a kill landed is read from a byte of memory that the run
shares with this process and sets at the doors of the phases it goes through.
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

# Bayesian SegNet-Basic, slim: batch norm, dropout, pooling indices; 13 images, 3 steps an epoch, 3 epochs.
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
    """changes: group__key=value."""
    made: dict[str, Any] = {**CONFIG, "resume": resume}
    for name, value in changes.items():
        group, _, key = name.partition("__")
        made[group] = {**made[group], key: value}
    return made


def result_hash(run: Path) -> str:
    """One hash over all that both checkpoints hold, the metric history and the report, but for what may differ."""
    found = hashlib.sha256((run / "metrics.csv").read_bytes())

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for name in sorted(value, key=str):
                found.update(repr(name).encode())
                add(value[name])
        elif isinstance(value, list | tuple):
            found.update(str(len(value)).encode())
            for item in value:
                add(item)
        else:
            found.update(repr(value).encode())

    for name in ("last.ckpt", "best.ckpt"):
        content = checkpoint.load_plain(run / name)
        for key in ("num_workers", "cache", "timeout"):
            del content["hyper_parameters"]["config"]["dataset"][key]
        add(content)
    scored = json.loads((run / "report.json").read_text())
    add({name: value for name, value in scored.items() if name not in ("checkpoint", "command")})
    return found.hexdigest()


# One run in a process of its own


class Ended(NamedTuple):
    """code: as waitpid has it, negative for a signal. phase: where it was then. said: its stderr."""

    code: int
    phase: str
    said: str
    seconds: float

    @property
    def not_one_line(self) -> str:
        """What it said, unless that is the one line of the contract."""
        lines = self.said.replace("\0", "").splitlines()
        one = len(lines) == 1 and lines[0].startswith("segdeconv: error: ")
        return "" if one else f"not one line: {self.said[-2000:]}"


class Run:
    """A training process that was forked; everything that it starts is of its process group."""

    def __init__(self, wanted: Mapping[str, Any], folder: Path, *, before: Callable[[], object] = lambda: None) -> None:
        """before: called in the child, first."""
        self.marker = mmap.mmap(-1, 1)
        self.started = time.monotonic()
        self.err = tempfile.TemporaryFile()  # noqa: SIM115 - `end` closes it
        self.pid = os.fork()
        if self.pid == 0:
            self._become(wanted, folder, before)
        with contextlib.suppress(OSError):  # both sides: whoever is first
            os.setpgid(self.pid, self.pid)
        self._code: int | None = None

    def _become(self, wanted: Mapping[str, Any], folder: Path, before: Callable[[], object]) -> None:
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
            command.run_command(lambda: train.train(wanted, folder))
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
        """Until it has entered the phase so often; False if it ended before."""
        before, deadline = None, time.monotonic() + 60
        while self.poll() is None and time.monotonic() < deadline:
            now = self.phase
            if now != before and now == phase:
                times -= 1
                if times <= 0:
                    return True
            before = now
            time.sleep(0.0002)
        return False

    def end(self, timeout: float = 60.0) -> Ended:
        """Wait for its end; one that does not end is a failure, and is killed."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(f"a run did not end within {timeout:.0f} s, in phase {self.phase}")
            time.sleep(0.002)
        assert self._code is not None
        self.err.seek(0)
        said = self.err.read().decode(errors="replace")
        self.err.close()
        return Ended(self._code, self.phase, said, time.monotonic() - self.started)

    def remains(self, seconds: float = 10.0) -> str:
        """What is left of its group after so long, in words."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return ""
            time.sleep(0.01)
        return f"processes of it are left {seconds:.0f} s after its end"


def _mark_phases(marker: mmap.mmap) -> None:
    def marked(owner: Any, name: str, phase: str, *, back: bool = True) -> None:
        work, number = getattr(owner, name), PHASES.index(phase)

        @functools.wraps(work)
        def door(*arguments: Any, **named: Any) -> Any:
            outside, marker[0] = marker[0], number
            try:
                return work(*arguments, **named)
            finally:
                if back:
                    marker[0] = outside

        setattr(owner, name, door)

    marked(train, "train", "start", back=False)
    marked(task.SegmentationTask, "on_train_start", "training", back=False)
    marked(task.SegmentationTask, "on_train_batch_start", "training", back=False)
    marked(task.SegmentationTask, "on_validation_start", "validation", back=False)
    marked(task.SegmentationTask, "on_validation_end", "training", back=False)
    marked(callbacks.MetricsFile, "append", "metrics")
    marked(checkpointing.Checkpoints, "keep", "checkpoint")
    marked(train, "evaluate", "evaluation")
    marked(report, "write_json", "end", back=False)


def cut_at_file_operation(folder: Path, number: int) -> None:
    """SIGKILL just before the so-manieth file operation of this process in `folder`: open, rename, link, remove."""
    left = [number]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.link", "os.remove") and str(folder) in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def fill_disk(calls: int) -> None:
    """From the so-manieth fsync on, there is no space left."""
    left, sync = [calls], os.fsync

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    os.fsync = full


def limit_files(size: int) -> None:
    """No file may grow beyond so many bytes: a disk that fills up in the middle of a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# Trials: each gives the phases in which it struck, and what was wrong, or nothing


class Chance(random.Random):
    """What decides in trial `number` of a suite; the same for the same seed."""

    def __init__(self, seed: int, suite: str, number: int) -> None:
        super().__init__(f"{seed} {suite} {number}")
        self.number = number


class Trial(NamedTuple):
    landed: list[str]
    wrong: str


class Place(NamedTuple):
    """Where trials run, what they have to come to, and how long an undisturbed run takes. of_ways: see `one_hash`."""

    folder: Path
    expected: str
    seconds: float
    of_ways: dict[str, str]

    def judge(self, landed: list[str], **changes: Any) -> Trial:
        """Let the run come to its end and hold what it leaves against what it should."""
        ended = Run(config(**changes), self.folder).end()
        if ended.code != 0:
            return Trial(landed, f"exit {ended.code}: {ended.said[-2000:]}")
        if left := [path.name for path in self.folder.glob(f"{files.PARTIAL}*")]:
            return Trial(landed, f"left behind: {left}")
        return Trial(landed, "" if result_hash(self.folder) == self.expected else "another hash")

    def lost(self) -> str:
        """Every checkpoint under a final name is one that its sidecar knows, or it is lost."""
        for name in ("last.ckpt", "best.ckpt", "previous.ckpt"):
            if (self.folder / name).is_file():
                try:
                    checkpoint.verify(self.folder / name)
                except errors.CheckpointError as error:
                    return f"a checkpoint is lost: {error}"
        return ""


def kills(place: Place, chance: Chance) -> Trial:
    """SIGKILL at any time, up to three times on the way. Four in ten are aimed at validation or a checkpoint's writing.

    To the process alone, as the killer of a machine without memory does it: its workers notice by themselves.
    """
    landed: list[str] = []
    for _ in range(chance.choice((1, 1, 2, 3))):
        run = Run(config(), place.folder)
        if chance.random() < 0.4:
            run.wait_for(chance.choice(("validation", "checkpoint")), chance.choice((1, 1, 2, 3)))
            time.sleep(chance.uniform(0, 0.012))
        else:
            time.sleep(chance.uniform(0.02, place.seconds))
        if run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
        ended = run.end()
        if ended.code == -signal.SIGKILL:
            landed.append(ended.phase)
        elif ended.code != 0:
            return Trial(landed, f"exit {ended.code}: {ended.said[-2000:]}")
        if lost := place.lost():
            return Trial(landed, lost)
    return place.judge(landed)


def cuts(place: Place, chance: Chance, operations: int = 90) -> Trial:
    """SIGKILL just before a file operation in the run's folder, twice in a row: at the doors between which all lies."""
    landed = []
    for _ in range(2):
        number = chance.randint(1, operations)
        before = functools.partial(cut_at_file_operation, place.folder, number)
        ended = Run(config(), place.folder, before=before).end()
        if ended.code not in (0, -signal.SIGKILL):
            return Trial(landed, f"exit {ended.code} at operation {number}: {ended.said[-2000:]}")
        landed += [ended.phase] * (ended.code != 0)
        if lost := place.lost():
            return Trial(landed, f"{lost} (operation {number})")
    return place.judge(landed)


def full_disks(place: Place, chance: Chance) -> Trial:
    """A disk that fills up at any write: exit code 5, one line, and the checkpoints that were there are there."""
    changes = {}
    before = functools.partial(fill_disk, chance.randint(1, 20))
    if chance.random() < 0.5:
        before = functools.partial(limit_files, chance.randint(2_000, 160_000))
        changes = {"dataset__num_workers": 0}  # whose batches would be files that may not grow, too
    ended = Run(config(**changes), place.folder, before=before).end()
    wrong = place.lost()
    if ended.code not in (0, 5):
        wrong = wrong or f"exit {ended.code}: {ended.said[-2000:]}"
    if not wrong and ended.code == 5:
        wrong = ended.not_one_line
    return Trial([ended.phase], wrong) if wrong else place.judge([ended.phase] * (ended.code != 0))


STOPS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 143}
MOMENTS = ("start", "training", "validation", "last validation", "metrics", "checkpoint", "evaluation")

FIRST_STOPS = (  # what `timeout`, a closed terminal and Ctrl-C do
    (signal.SIGTERM, "group", "training"),
    (signal.SIGHUP, "group", "start"),
    (signal.SIGINT, "process", "last validation"),
)


def signals(place: Place, chance: Chance) -> Trial:
    """A signal to the process, its group or every process, at any time: one line, the exit code of the contract."""
    number, to, moment = (
        chance.choice(list(STOPS)),
        chance.choice(("process", "group", "everyone")),
        chance.choice(MOMENTS),
    )
    if chance.number < len(FIRST_STOPS):
        number, to, moment = FIRST_STOPS[chance.number]
    changes = {"dataset__num_workers": 2}
    run = Run(config(**changes), place.folder)
    run.wait_for(moment.removeprefix("last "), 3 if moment == "last validation" else 1)
    time.sleep(chance.uniform(0, 0.05) if moment in ("start", "training") else 0)
    everyone = [*descendants(run.pid), run.pid]  # workers first, which is harder
    phase = run.phase
    for pid in {"process": [run.pid], "group": [-run.pid], "everyone": everyone}[to]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    ended = run.end()
    what = f"{signal.Signals(number).name} to {to} in {moment}"
    landed = [phase]
    if ended.code == 0 and phase == "end":
        return place.judge([], **changes)
    if ended.code != STOPS[number]:
        return Trial(landed, f"{what}: exit {ended.code}: {ended.said[-2000:]}")
    wrong = ended.not_one_line or place.lost() or run.remains()
    return Trial(landed, f"{what}: {wrong}") if wrong else place.judge(landed, **changes)


def descendants(pid: int) -> list[int]:
    """Children and theirs, those first."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [found for child in children for found in (*descendants(int(child)), int(child))]
    return []


def one_hash(place: Place, chance: Chance) -> Trial:
    """Any number of workers, any cache, stopped on the way and gone on with others: one hash for each way to learn."""
    ways = [
        {},
        {"trainer__ema": None},
        {"trainer__accumulate_grad_batches": 2},
        {"trainer__accumulate_grad_batches": 2, "trainer__ema": None},
    ]
    way: dict[str, Any] = chance.choice(ways)
    expected = place.of_ways.get(str(way))
    if expected is None:
        ended = Run(config(**way, dataset__num_workers=0), place.folder).end()
        assert ended.code == 0, ended.said
        expected = place.of_ways[str(way)] = result_hash(place.folder)
        shutil.rmtree(place.folder)
    halves = []
    for _ in range(chance.choice((1, 2))):
        workers, cache = chance.choice((0, 1, 2, 4)), chance.choice(("none", "memory", "disk"))
        halves.append({**way, "dataset__num_workers": workers, "dataset__cache": cache})
    if len(halves) == 2:
        run = Run(config(**halves[0]), place.folder)
        run.wait_for("training", 2)
        if run.poll() is None:
            os.kill(run.pid, signal.SIGTERM)
        if (ended := run.end()).code not in (0, 143):
            return Trial([], f"exit {ended.code}: {ended.said[-2000:]}")
    done = place._replace(expected=expected).judge([], **halves[-1])
    return Trial([], done.wrong and f"{halves}: {done.wrong}")


FAULTS = {  # exit code, seconds within which all of its processes are gone
    "folder removed": (5, 30),
    "folder read-only": (5, 30),
    "worker killed": (2, 30),
    "worker stopped": (2, 32),
    "stopped and asked to end": (143, 32),
    "interrupted twice": (130, 30),
}


def faults(place: Place, chance: Chance) -> Trial:
    """What else may happen to a run: it ends in one line and soon, with all of its processes, and can be gone on with.

    A worker is stopped rather than put to sleep: nothing but SIGKILL ends it.
    """
    fault = chance.choice(list(FAULTS))
    code, seconds = FAULTS[fault]
    changes = {"dataset__num_workers": 2, "dataset__timeout": 2}
    run = Run(config(**changes), place.folder, before=functools.partial(_meet, fault, place.folder))
    worker = 0
    if "worker" in fault or "stopped" in fault:
        run.wait_for("validation", 2)
        worker = next(iter(descendants(run.pid)), 0)
        os.kill(worker, signal.SIGKILL if fault == "worker killed" else signal.SIGSTOP)
    if fault == "stopped and asked to end":
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
    if place.folder.exists():
        place.folder.chmod(0o755)
    if ended.code != code:
        return Trial([fault], f"{fault}: exit {ended.code}: {ended.said[-2000:]}")
    wrong = ended.not_one_line or place.lost() or run.remains(seconds=10)
    return Trial([fault], f"{fault}: {wrong}") if wrong else place.judge([fault])


def _meet(fault: str, folder: Path) -> None:
    """What a child does to itself after its second validation."""
    if not fault.startswith("folder"):
        return
    forked_commands.restrict({"plain_user": True})
    done, left = task.SegmentationTask.on_validation_end, [2]

    def spoil(of: Any) -> None:
        done(of)
        left[0] -= 1
        if left[0] == 0:
            shutil.rmtree(folder) if fault == "folder removed" else folder.chmod(0o555)

    task.SegmentationTask.on_validation_end = spoil  # type: ignore[method-assign]


SUITES: dict[str, Callable[[Place, Chance], Trial]] = {
    "kills": kills, "cuts": cuts, "full_disks": full_disks, "signals": signals, "one_hash": one_hash, "faults": faults,
}  # fmt: skip


def main() -> int:
    """Print how often it struck, where that was, and every trial that was wrong; the exit code says whether any was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", default=list(SUITES), help=f"{', '.join(SUITES)}, or NAME=TRIALS")
    parser.add_argument("--trials", type=int, default=250, help="of each suite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first trial, to repeat one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="chaos-") as root:
        os.environ["XDG_CACHE_HOME"] = str(Path(root) / "cache")
        whole = Path(root) / "whole"
        ended = Run(config(), whole).end()
        assert ended.code == 0, ended.said
        place = Place(Path(root) / "run", result_hash(whole), ended.seconds, {})
        print(f"an undisturbed run takes {ended.seconds:.2f} s and has the hash {place.expected[:16]}", flush=True)
        wrong = 0
        for word in arguments.suites:
            name, _, trials = word.partition("=")
            wrong += _suite(name, place, int(trials or arguments.trials), arguments.seed, arguments.first)
        return wrong


def _suite(name: str, place: Place, trials: int, seed: int, first: int) -> int:
    landed: collections.Counter[str] = collections.Counter()
    wrong, started = 0, time.monotonic()
    for number in range(first, first + trials):
        shutil.rmtree(place.folder, ignore_errors=True)
        done = SUITES[name](place, Chance(seed, name, number))
        landed.update(done.landed)
        if done.wrong:
            wrong += 1
            kept = Path(tempfile.gettempdir()) / f"chaos-{name}-{seed}-{number}"
            if place.folder.exists():
                shutil.copytree(place.folder, kept, dirs_exist_ok=True)
            print(f"WRONG {name} trial {number}, struck in {done.landed}: {done.wrong} - see {kept}", flush=True)
        if (number + 1) % 50 == 0:
            print(f"{name}: {number + 1} trials, {landed.total()} struck, {wrong} wrong", flush=True)
    where = ", ".join(f"{phase} {landed[phase]}" for phase in (*PHASES, *FAULTS) if landed[phase])
    aimed = sum(landed[phase] for phase in ("validation", "metrics", "checkpoint"))
    print(
        f"{name}: {wrong} of {trials} trials wrong (seed {seed}, {time.monotonic() - started:.0f} s); "
        f"{landed.total()} struck: {where}; {100 * aimed / max(1, landed.total()):.0f} % in validation or a write",
        flush=True,
    )
    return wrong


if __name__ == "__main__":
    sys.exit(min(1, main()))
