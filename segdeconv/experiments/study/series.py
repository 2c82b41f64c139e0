"""Many runs under one command: what is finished is not run again, what was cut goes on when it is typed again."""

import json
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from segdeconv.errors import DivergedError, Interrupted, UsageError, did_you_mean
from segdeconv.system import memory
from segdeconv.system.files import replace_text
from segdeconv.system.memory import release_memory
from segdeconv.train import train
from segdeconv.training.resume import differing_keys, finished, read_config

Scored = dict[str, float | None]  # a score's name -> percent, None where a report has none


def chosen(text: str, options: Iterable[str], flag: str) -> tuple[str, ...]:
    """The names in a comma-separated list, in the order of the options."""
    names, known = text.split(","), list(options)
    for name in names:
        if name not in known:
            raise UsageError(f"{flag}: there is no '{name}' - {did_you_mean(name, known)}")
    return tuple(name for name in known if name in names)


def seeds(text: str) -> tuple[int, ...]:
    """The numbers in a comma-separated list."""
    try:
        return tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise UsageError(f"--seeds {text} are no numbers - write for example --seeds 0,1,2") from None


def check_same(run: Path, config: Mapping[str, Any]) -> None:
    """Refuse a run that is there and was trained by another config: a table has one."""
    if any(run.glob("*.ckpt")):
        differing = differing_keys(read_config(run), config)
        if differing:
            raise UsageError(
                f"{run} was trained with other values of {', '.join(differing)} - give those, or choose another --out"
            )


def resume_run(config: Mapping[str, Any], run: Path, *, name: str, typed: str) -> None:
    """Train a run to its end, unless it is there, and note in cost.json what that took.

    A loss that is not finite is said, and leaves the run without scores. name: of the run, for that sentence.
    """
    if finished(run):
        return
    started = time.perf_counter()
    release_memory()  # what the run before has kept would count
    memory.peak(anew=True)
    try:
        train({**config, "resume": "auto"}, run, typed=typed)
    except DivergedError as error:
        print(f"{name} has no scores: {error}", flush=True)
    except Interrupted as error:
        said = str(error).partition(" - ")[0]
        raise Interrupted(f"{said} - go on with the same command", error.exit_code) from error
    finally:
        if run.is_dir():
            _note_cost(run, time.perf_counter() - started)


def cost(run: Path) -> dict[str, Any]:
    """What a run took: seconds of all its parts, bytes of memory at its peak, the device and the commit of the last."""
    path = run / "cost.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _note_cost(run: Path, seconds: float) -> None:
    before = cost(run)
    noted = {
        "seconds": before.get("seconds", 0.0) + seconds,
        "memory": max(before.get("memory", 0), memory.peak()),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "commit": _commit(),
    }
    replace_text(run / "cost.json", json.dumps(noted, indent=1) + "\n")


def percents(report: Path, names: Mapping[str, str]) -> Scored:
    """The scores in a report.json. names: what a score is called there, by its name here."""
    values = json.loads(report.read_text())
    found = {score: values.get(name) for score, name in names.items()}
    return {score: None if value is None else 100 * value for score, value in found.items()}


def mean(values: Sequence[float | None]) -> float | None:
    """None if there is no value, or one of them is missing."""
    present = [value for value in values if value is not None]
    return statistics.mean(present) if present and len(present) == len(values) else None


def spread(values: Sequence[float | None]) -> float | None:
    """Standard deviation, the runs being a sample; None for fewer than two."""
    present = [value for value in values if value is not None]
    return statistics.stdev(present) if len(present) > 1 else None


def averages(columns: Mapping[str, Sequence[float | None]]) -> dict[str, dict[str, float | None]]:
    """`mean` and `spread` of every score."""
    return {
        "mean": {score: mean(values) for score, values in columns.items()},
        "spread": {score: spread(values) for score, values in columns.items()},
    }


def around(found: Mapping[str, Any], score: str) -> str:
    """The mean of a score and its standard deviation, of what holds `averages`, as a cell of a table."""
    middle, deviation = found["mean"][score], found["spread"][score]
    if middle is None:
        return "–"
    return f"{middle:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def rows(header: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    """A table's lines in Markdown."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *cells)]


def _commit() -> str | None:
    """Of the checkout that this code lies in, with a + where files differ from it; None for an installed package."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    try:
        done = subprocess.run(git, check=False, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
