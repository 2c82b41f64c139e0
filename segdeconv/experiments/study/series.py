"""Many training runs in one command: running it again skips finished runs and resumes interrupted ones."""

import json
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from segdeconv.errors import DivergedError, Interrupted, UsageError, did_you_mean
from segdeconv.evaluation.report import read_report
from segdeconv.system import memory
from segdeconv.system.files import replace_text
from segdeconv.system.memory import release_memory
from segdeconv.system.plain_data import read_json
from segdeconv.train import train
from segdeconv.training.resume import differing_keys, finished, read_config


class _Cost(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    seconds: Annotated[float, Field(ge=0)]
    memory: Annotated[int, Field(ge=0)]
    device: str
    commit: str | None = None


Scores = dict[str, float | None]  # name of a score -> percent, None if the report does not have it


def parse_names(text: str, options: Iterable[str], flag: str) -> tuple[str, ...]:
    """Parse a comma-separated list of names.

    Args:
        text: The list.
        options: The names that are allowed.
        flag: The command-line option, for error messages.

    Returns:
        The names in the order of the options.

    Raises:
        UsageError: A name is not one of the options.
    """
    names, allowed = text.split(","), list(options)
    for name in names:
        if name not in allowed:
            raise UsageError(f"{flag}: unknown name '{name}' - {did_you_mean(name, allowed)}")
    return tuple(name for name in allowed if name in names)


def seeds(text: str) -> tuple[int, ...]:
    """Parse a comma-separated list of seeds and return them sorted, without duplicates.

    Raises:
        UsageError: A seed is not an integer.
    """
    try:
        return tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise UsageError(f"--seeds {text}: expected integers - write for example --seeds 0,1,2") from None


def check_same(run: Path, config: Mapping[str, Any]) -> None:
    """Check that an existing run was trained with this config, because a table must not mix configs.

    Raises:
        UsageError: The run was trained with another config.
    """
    if any(run.glob("*.ckpt")):
        differing = differing_keys(read_config(run), config)
        if differing:
            raise UsageError(
                f"{run} was trained with different values of {', '.join(differing)} - use those values or another --out"
            )


def resume_run(config: Mapping[str, Any], run: Path, *, name: str, typed: str) -> None:
    """Train a run to its end, unless it is finished, and add the time and memory it took to cost.json.

    If the loss is not finite, print a message and leave the run without scores.

    Args:
        config: Checked config.
        run: Run folder.
        name: Name of the run, for messages.
        typed: The equivalent command of train.py, which the run records.

    Raises:
        Interrupted: The training was interrupted; the message asks to repeat the command.
    """
    if finished(run):
        return
    started = time.perf_counter()
    release_memory()  # otherwise the peak would include memory of the previous run
    memory.peak(reset=True)
    try:
        train({**config, "resume": "auto"}, run, typed=typed)
    except DivergedError as error:
        print(f"{name} has no scores: {error}", flush=True)
    except Interrupted as error:
        reason = str(error).partition(" - ")[0]
        raise Interrupted(f"{reason} - resume it with the same command", error.exit_code) from error
    finally:
        if run.is_dir():
            _add_cost(run, time.perf_counter() - started)


def cost(run: Path) -> dict[str, Any]:
    """Return the contents of a run's cost.json, or an empty dict if there is none or it is damaged.

    Keys: `seconds` of all parts of the run, `memory` at its peak in bytes, and the `device` and `commit` of the last
    part.
    """
    path = run / "cost.json"
    try:
        recorded = read_json(path)
        TypeAdapter(_Cost).validate_python(recorded)
    except (FileNotFoundError, ValueError):  # a damaged one is written again
        return {}
    return recorded


def _add_cost(run: Path, seconds: float) -> None:
    previous = cost(run)
    total = {
        "seconds": previous.get("seconds", 0.0) + seconds,
        "memory": max(previous.get("memory", 0), memory.peak()),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "commit": _commit(),
    }
    replace_text(run / "cost.json", json.dumps(total, indent=1) + "\n")


def percents(report: Path, keys: Mapping[str, str]) -> Scores:
    """Read scores from a report.json and return them in percent.

    Args:
        report: The file.
        keys: Name of a score -> its key in the file.
    """
    content = read_report(report)
    values = {score: content.get(key) for score, key in keys.items()}
    return {score: None if value is None else 100 * value for score, value in values.items()}


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if a value is missing or the sequence is empty."""
    present = [value for value in values if value is not None]
    return statistics.mean(present) if present and len(present) == len(values) else None


def spread(values: Sequence[float | None]) -> float | None:
    """Return the sample standard deviation of the values that are not None, or None for fewer than two."""
    present = [value for value in values if value is not None]
    return statistics.stdev(present) if len(present) > 1 else None


def averages(columns: Mapping[str, Sequence[float | None]]) -> dict[str, dict[str, float | None]]:
    """Return the `mean` and the `spread` of every score."""
    return {
        "mean": {score: mean(values) for score, values in columns.items()},
        "spread": {score: spread(values) for score, values in columns.items()},
    }


def mean_and_spread(summary: Mapping[str, Any], score: str) -> str:
    """Format a score as a table cell: `mean ± standard deviation`.

    Args:
        summary: A mapping with the items of `averages`.
        score: Name of the score.
    """
    average, deviation = summary["mean"][score], summary["spread"][score]
    if average is None:
        return "–"
    return f"{average:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def rows(header: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *cells)]


def _commit() -> str | None:
    """Return the commit of the repository that contains this file, or None for an installed package.

    A + follows it if files differ from the commit.
    """
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    try:
        result = subprocess.run(git, check=False, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
