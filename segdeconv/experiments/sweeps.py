"""The jobs of a multirun: a line and a record for each, and a table of their scores at the end.

Every job appends its record to `jobs.jsonl` in the folder of the sweep, since a launcher may run it in another process
or on another machine. `summary.csv` beside it has a row for all jobs that differ only in their seed or fold.
"""

import csv
import io
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from hydra.experimental.callback import Callback

from segdeconv.checkpoints import locate
from segdeconv.evaluation.learning_curve import curve_beside
from segdeconv.system.files import replace_text
from segdeconv.system.plain_data import PlainDataError

BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
JOBS, SUMMARY = "jobs.jsonl", "summary.csv"
REPEATS = ("seed", "dataset.fold")  # keys that repeat a training


@dataclass(frozen=True)
class Job:
    """A job of a multirun.

    Attributes:
        job: Its number.
        overrides: The `key=value` arguments in which it may differ from other jobs.
        folder: The run folder.
        score: Best validation mIoU, 0..1; None if the job failed or nothing could be scored.
        seconds: Its duration.
        error: The error message of a failed job.
    """

    job: int
    overrides: list[str]
    folder: str
    score: float | None = None
    seconds: float = 0.0
    error: str | None = None

    def line(self) -> str:
        """Return the line that is printed when the job ends."""
        score = "no val/miou" if self.score is None else f"val/miou {self.score:.4f}"
        ended = f"failed: {self.error}" if self.error else f"{score}  {self.folder}"
        return f"job {self.job}: {' '.join([*self.overrides, '-'])} {ended}"


class Recorder:
    """Prints and records the end of a job.

    Args:
        folder: The folder of the sweep.
        job: The job, without its score.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder, self.job, self.started = folder, job, time.monotonic()

    @classmethod
    def of(cls, hydra: Any, run: Path, fixed: Iterable[str]) -> Self:
        """Create the recorder of the running job.

        Args:
            hydra: Hydra's own config, in the job.
            run: The run folder.
            fixed: The overrides that all jobs share.
        """
        shared = set(fixed)
        overrides = [word.lstrip("+") for word in hydra.overrides.task if word not in shared]
        return cls(Path(hydra.sweep.dir), Job(int(hydra.job.num), overrides, str(run)))

    def end(self, folder: Path, score: float | None, error: str | None = None) -> None:
        """Print and record the end of the job, in one write, since jobs may end at the same time."""
        job = Job(
            self.job.job, self.job.overrides, str(folder), score, round(time.monotonic() - self.started, 1), error
        )
        print(f"\n{job.line()}", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / JOBS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(job)) + "\n")


class FolderOfSweep(Callback):
    """A callback of Hydra that keeps the folder of the sweep, for the table at its end.

    Attributes:
        folder: The folder of the last sweep that this process started; None before.
    """

    folder: Path | None = None

    def on_multirun_start(self, config: Any, **arguments: Any) -> None:
        """Keep the folder."""
        type(self).folder = Path(config.hydra.sweep.dir)


def best_score(run: Path) -> float | None:
    """Return the highest validation mIoU of a finished run, 0..1: that of its metrics.csv, else of its report.json.

    None if nothing could be scored.
    """
    from segdeconv.evaluation.report import read_report  # imported late, since it imports torch

    curve = curve_beside(run / locate.BEST)
    if curve is not None and curve.best is not None:
        return curve.values["val/miou"][curve.best]
    try:
        score: float | None = read_report(run / "report.json")["miou"]
    except (FileNotFoundError, PlainDataError):
        return None
    return score


class Row(NamedTuple):
    """The jobs that differ only in their seed or fold.

    Attributes:
        overrides: What they share.
        jobs: The number of those with a score.
        failed: The number of those without one.
        mean: Mean of their scores; nan if all failed.
        deviation: Standard deviation of their scores (n - 1); nan for fewer than two.
    """

    overrides: str
    jobs: int
    failed: int
    mean: float
    deviation: float


def rows(jobs: Sequence[Job]) -> list[Row]:
    """Return the rows of the table, the best first; of jobs with the same overrides the last one counts."""
    groups: dict[str, list[float | None]] = {}
    for job in {tuple(job.overrides): job for job in jobs}.values():
        shared = [word for word in job.overrides if word.partition("=")[0] not in REPEATS]
        groups.setdefault(" ".join(shared), []).append(job.score)
    table = []
    for overrides, values in groups.items():
        scores = [value for value in values if value is not None]
        mean = statistics.fmean(scores) if scores else math.nan
        deviation = statistics.stdev(scores) if len(scores) > 1 else math.nan
        table.append(Row(overrides, len(scores), len(values) - len(scores), mean, deviation))
    return sorted(table, key=lambda row: (math.isnan(row.mean), -row.mean))


def read_jobs(folder: Path) -> list[Job]:
    """Read the records in the folder of a sweep; a line that a kill has truncated is left out."""
    path = folder / JOBS
    jobs = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            jobs.append(Job(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return jobs


def summarise(folder: Path) -> None:
    """Print the table of a sweep and write it to summary.csv; nothing if no job has ended."""
    table = rows(read_jobs(folder))
    if not table:
        return
    width = max(len("all jobs"), *(len(row.overrides) for row in table))
    print(f"\n{'':<{width}}  jobs  failed  mean val/miou  deviation")
    for row in table:
        mean, deviation = ("-" if math.isnan(value) else f"{value:.4f}" for value in (row.mean, row.deviation))
        name = row.overrides or "all jobs"
        print(f"{name:<{width}}  {row.jobs:>4}  {row.failed:>6}  {mean:>13}  {deviation:>9}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows(["" if value != value else value for value in row] for row in table)
    replace_text(folder / SUMMARY, text.getvalue())
    print(f"\nwritten to {folder / SUMMARY}; every job is in {folder / JOBS}")
