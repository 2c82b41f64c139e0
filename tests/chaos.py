"""Runs that are killed anywhere and go on: one hash, or the trial is wrong.

    python tests/chaos.py --trials 500 --seed 0

A fork for every run: what is slow is imported once. Where a kill landed is read from a byte of memory that the run
shares with this process and sets at the doors of the phases it goes through.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import albumentations  # noqa: E402, F401
import torch  # noqa: E402
import yaml  # noqa: E402

from segdeconv import callbacks, checkpoint, durable, errors, report, task, train, training  # noqa: E402

PHASES = ("start", "training", "validation", "metrics", "checkpoint", "evaluation", "end")
STREET = yaml.safe_load((ROOT / "configs/augment/street.yaml").read_text())

# Bayesian SegNet-Basic, slim: batch norm, dropout, pooling indices; 13 images, 3 steps an epoch, 3 epochs.
RECIPE: dict[str, dict[str, Any]] = {
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


def recipe(resume: str | None = "auto", **changes: Any) -> dict[str, Any]:
    """changes: group__key=value."""
    made: dict[str, Any] = {**RECIPE, "resume": resume}
    for name, value in changes.items():
        group, _, key = name.partition("__")
        made[group] = {**made[group], key: value}
    return made


def learnt(run: Path) -> str:
    """One hash over all that both checkpoints hold, the metric history and the report, but for clocks and paths."""
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
        add(checkpoint.load_plain(run / name))
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
    def sentence(self) -> str:
        """The one line of the contract, and nothing else on stderr."""
        lines = self.said.replace("\0", "").splitlines()
        assert len(lines) == 1, self.said
        assert lines[0].startswith("segdeconv: error: "), self.said
        return lines[0]


class Run:
    """A training process that was forked; everything that it starts is of its process group."""

    def __init__(
        self, wanted: Mapping[str, Any], folder: Path, *, before: Callable[[], object] = lambda: None
    ) -> None:
        """before: called in the child, first."""
        self.marker = mmap.mmap(-1, 1)
        self.started = time.monotonic()
        self.err = tempfile.TemporaryFile()
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
            errors.run_command(lambda: train.train(wanted, folder))
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

    def wait_for(self, phase: str, times: int, deadline: float) -> bool:
        """Until it has entered the phase so often; False if it ended before."""
        before = None
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

    def kill(self) -> Ended:
        """SIGKILL to the process alone, as a machine's memory killer does; its workers notice by themselves."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.end()


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

    marked(task.SegmentationTask, "on_train_start", "training", back=False)
    marked(task.SegmentationTask, "on_train_batch_start", "training", back=False)
    marked(task.SegmentationTask, "on_validation_start", "validation", back=False)
    marked(task.SegmentationTask, "on_validation_end", "training", back=False)
    marked(callbacks.MetricsFile, "append", "metrics")
    marked(training.Checkpoints, "keep", "checkpoint")
    marked(report, "evaluate", "evaluation")
    marked(report, "write_json", "end", back=False)


@contextlib.contextmanager
def cut_at_file_operation(folder: Path, number: int) -> Iterator[None]:
    """SIGKILL just before the so-manieth file operation in `folder`: open, rename, link, remove."""
    left = [number]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.link", "os.remove") and str(folder) in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    yield


# Trials


class Trial(NamedTuple):
    """landed: the phase of every kill, in order. wrong: what is not as it should be, or nothing."""

    landed: list[str]
    wrong: str


def trial(chance: random.Random, folder: Path, expected: str, seconds: float, **changes: Any) -> Trial:
    """Kill a run, perhaps several times, let it come to its end, and look at what is left.

    seconds: how long an undisturbed run takes. Four kills in ten are aimed at validation or a checkpoint's writing.
    """
    landed: list[str] = []
    for _ in range(chance.choice((1, 1, 2, 3))):
        run = Run(recipe(**changes), folder)
        aim = chance.random()
        if aim < 0.4:
            phase = chance.choice(("validation", "checkpoint"))
            run.wait_for(phase, chance.choice((1, 1, 2, 3)), time.monotonic() + 60)
            time.sleep(chance.uniform(0, 0.012))
        else:
            time.sleep(chance.uniform(0.02, seconds))
        running = run.poll() is None
        ended = run.kill()
        if ended.code == -signal.SIGKILL:
            landed.append(ended.phase)
        elif ended.code != 0 or running:
            if ended.code != 0:
                return Trial(landed, f"exit {ended.code}: {ended.said[-2000:]}")
        try:
            _require_whole(folder)
        except errors.CheckpointError as error:
            return Trial(landed, f"a checkpoint is lost: {error}")
    ended = Run(recipe(**changes), folder).end()
    if ended.code != 0:
        return Trial(landed, f"exit {ended.code}: {ended.said[-2000:]}")
    left = [path.name for path in folder.glob(f"{durable.PARTIAL}*")]
    if left:
        return Trial(landed, f"left behind: {left}")
    return Trial(landed, "" if learnt(folder) == expected else "another hash")


def _require_whole(folder: Path) -> None:
    """Every checkpoint under a final name is one that its sidecar knows; nothing here may be lost to a kill."""
    for name in ("last.ckpt", "best.ckpt", "previous.ckpt"):
        if (folder / name).is_file():
            checkpoint.verify(folder / name)


def main() -> int:
    """Print kills, where they landed, and every trial that was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first trial, to repeat one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        whole = Path(place) / "whole"
        ended = Run(recipe(), whole).end()
        assert ended.code == 0, ended.said
        expected = learnt(whole)
        print(f"an undisturbed run takes {ended.seconds:.2f} s and has the hash {expected[:16]}", flush=True)
        landed: collections.Counter[str] = collections.Counter()
        wrong = 0
        for number in range(arguments.first, arguments.first + arguments.trials):
            chance = random.Random(f"{arguments.seed} {number}")
            folder = Path(place) / "run"
            done = trial(chance, folder, expected, ended.seconds)
            landed.update(done.landed)
            if done.wrong:
                wrong += 1
                kept = Path(tempfile.gettempdir()) / f"chaos-wrong-{arguments.seed}-{number}"
                shutil.copytree(folder, kept, dirs_exist_ok=True)
                print(f"WRONG trial {number}, killed in {done.landed}: {done.wrong} - see {kept}", flush=True)
            shutil.rmtree(folder)
            if (number + 1) % 50 == 0:
                print(f"{number + 1} trials, {landed.total()} kills, {wrong} wrong", flush=True)
    kills = landed.total()
    aimed = landed["validation"] + landed["checkpoint"] + landed["metrics"]
    where = ", ".join(f"{phase} {landed[phase]}" for phase in PHASES if landed[phase])
    print(f"{kills} kills in {arguments.trials} trials (seed {arguments.seed}): {where}")
    print(f"{100 * aimed / max(1, kills):.0f} % of them in validation or while metrics or a checkpoint were written")
    print(f"{wrong} of {arguments.trials} trials wrong; {time.monotonic() - started:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
