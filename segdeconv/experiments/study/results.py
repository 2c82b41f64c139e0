"""Recipes side by side: their scores over seeds and ways of splitting the data, costs, curves and weights."""

import csv
import functools
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from segdeconv.checkpoints import checkpoint
from segdeconv.errors import UsageError, did_you_mean
from segdeconv.evaluation.report import write_json
from segdeconv.experiments.study.series import around, averages, cost, percents, rows
from segdeconv.system.files import replace_text
from segdeconv.training.resume import AnyName, finished

TABLES = Path(__file__).parent / "tables"
SCORES = {"mIoU": "miou", "G": "pixel_accuracy", "C": "mean_accuracy", "BF": "boundary_f1"}  # in report.json


@dataclass(frozen=True)
class Plan:
    """What is trained and where it goes.

    words: of train.py's command line, for all. rows: configs by the names that the table has for them, each the words
        that make it. views: ways to split the data, alike; the table shows all scores of the first, and the mean IoU of
        the others. added: words for all, that come last. Of two words for one key the later counts.
    """

    title: str
    words: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    views: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    out: Path
    added: Sequence[str] = ()

    @property
    def jobs(self) -> list[tuple[str, str, int]]:
        """All (row, view, seed), one seed after the other."""
        return [(row, view, seed) for seed in self.seeds for row in self.rows for view in self.views]

    def config(self, row: str, view: str, seed: int) -> list[str]:
        """The words of one run."""
        words = [*self.words, *self.rows[row], *self.views[view], *self.added, f"seed={seed}"]
        return list({word.partition("=")[0].lstrip("+"): word for word in words}.values())

    def run(self, row: str, view: str, seed: int) -> Path:
        """The folder of one run."""
        return self.out / slug(row) / slug(view) / f"seed{seed}"


def slug(name: str) -> str:
    """A name as that of a folder.

    >>> slug("SegNet, balanced")
    'segnet-balanced'
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def table_path(given: str) -> Path:
    """The file that the name of a table, or the path of one, means."""
    for path in (Path(given), TABLES / f"{given}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in TABLES.glob("*.yaml"))
    raise UsageError(f"there is no table {given} - {did_you_mean(given, known)}")


def read_results(path: Path) -> dict[str, Any]:
    """title, words, rows and views of a table: of a YAML file like those in TABLES."""
    try:
        content = yaml.safe_load(path.read_text())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}," if mark else ""
        said = getattr(error, "problem", None) or type(error).__name__
        raise UsageError(f"{path}{where} is no YAML ({said}) - see docs/results.md") from error
    content = content if isinstance(content, dict) else {}
    for part in ("rows", "views"):
        named = content.get(part)
        if not isinstance(named, dict) or not named or not all(map(_are_words, named.values())):
            raise UsageError(f"{path} should have {part}, each a name and a list of key=value - see docs/results.md")
        if len({slug(name) for name in named}) < len(named):
            raise UsageError(f"{path}: two {part} would share a folder - name them apart")
    words = content.get("words", [])
    if not _are_words(words):
        raise UsageError(f"{path}: words should be a list of key=value - see docs/results.md")
    return {
        "title": str(content.get("title", path.stem)),
        "words": words,
        "rows": content["rows"],
        "views": content["views"],
    }


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) and "=" in word for word in value)


def content(plan: Plan, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What results.json holds. facts: what else to note."""
    found = []
    for row in plan.rows:
        views = {view: _scores([plan.run(row, view, seed) for seed in plan.seeds]) for view in plan.views}
        costs = [cost(plan.run(row, next(iter(plan.views)), seed)) for seed in plan.seeds]
        known = [one for one in costs if one]
        found.append(
            {
                "name": row,
                "words": list(plan.rows[row]),
                "parameters": _parameters(plan, row),
                "views": views,
                "seconds": statistics.mean(one["seconds"] for one in known) if known else None,
                "memory": max((one["memory"] for one in known), default=None),
                "devices": sorted({one["device"] for one in known}),
                "commits": sorted({str(one["commit"]) for one in known}),
            }
        )
    return {**facts, "title": plan.title, "words": list(plan.words), "seeds": list(plan.seeds), "rows": found}


def _scores(runs: Sequence[Path]) -> dict[str, Any]:
    """Percents of every finished run by its folder's name, their mean and standard deviation."""
    found = {run.name: percents(run / "report.json", SCORES) for run in runs if finished(run)}
    known = {score: [one[score] for one in found.values() if one[score] is not None] for score in SCORES}
    return {"runs": found, **averages(known)}


def _parameters(plan: Plan, row: str) -> int | None:
    paths = (plan.run(row, view, seed) / "best.ckpt" for view in plan.views for seed in plan.seeds)
    return next((_count(path) for path in paths if path.is_file()), None)


@functools.cache  # the table is written after every run, and the number does not change
def _count(path: Path) -> int:
    return sum(parameter.numel() for parameter in checkpoint.read(path, trust=AnyName()).model().parameters())


def markdown(found: Mapping[str, Any]) -> str:
    """found: what `content` gives."""
    first, *others = next(iter(found["rows"]))["views"]
    header = ["config", *SCORES, *(f"mIoU, {view}" for view in others), "seeds", "parameters", "minutes", "memory"]
    lines = [f"# {found['title']}", "", f"Scores of {first}, in percent, mean ± standard deviation over seeds.", ""]
    lines += [f"* {name}: {found[name]}" for name in ("command", "data") if name in found]
    lines += [f"* {name}: {', '.join(values)}" for name in ("devices", "commits") if (values := _all(found, name))]
    table = []
    for row in found["rows"]:
        views = row["views"]
        cells = [row["name"], *(around(views[first], score) for score in SCORES)]
        cells += [around(views[view], "mIoU") for view in others]
        cells += [str(len(views[first]["runs"])), "–" if row["parameters"] is None else f"{row['parameters']:,}"]
        cells.append("–" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}")
        cells.append("–" if row["memory"] is None else f"{row['memory'] / 2**20:,.0f} MiB")
        table.append(cells)
    lines += ["", *rows(header, table)]
    lines += ["", *([f"All with `{' '.join(found['words'])}`.", ""] if found["words"] else [])]
    lines += ["| config | words |", "|---|---|"]
    lines += [f"| {row['name']} | {_code(row['words'])} |" for row in found["rows"]]
    return "\n".join(lines) + "\n"


def _all(found: Mapping[str, Any], name: str) -> list[str]:
    return sorted({value for row in found["rows"] for value in row[name]})


def _code(words: Sequence[str]) -> str:
    return f"`{' '.join(words)}`" if words else ""


def curves(plan: Plan) -> dict[str, list[list[tuple[int, float]]]]:
    """By row, a list of (epochs done, mean IoU on val in percent) for each seed of the first view that has them."""
    view = next(iter(plan.views))
    found = {row: [_curve(plan.run(row, view, seed) / "metrics.csv") for seed in plan.seeds] for row in plan.rows}
    return {row: known for row, seeds in found.items() if (known := [points for points in seeds if points])}


def _curve(path: Path) -> list[tuple[int, float]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        read = [(int(line["epoch"]) + 1, float(line["val/miou"])) for line in csv.DictReader(file)]
    return [(epoch, 100 * miou) for epoch, miou in read if miou == miou]  # not the epochs without validation


def draw(plan: Plan, path: Path) -> bool:
    """Write the curves as a PNG; False where matplotlib is not installed or there is none to draw."""
    lines = curves(plan)
    try:
        import matplotlib
    except ImportError:
        return False
    if not lines:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for number, (row, seeds) in enumerate(lines.items()):
        style = ("-", "--", ":")[number // 10 % 3]  # ten colours
        for turn, points in enumerate(seeds):  # of one colour, the first in full
            axis.plot(
                *zip(*points, strict=True), style, color=f"C{number % 10}", alpha=0.4 if turn else 1, linewidth=1.5,
                label=None if turn else row, marker="." if len(points) < 3 else None,
            )  # fmt: skip
    axis.set(xlabel="epoch", ylabel=f"mean IoU on {next(iter(plan.views))}, %", ylim=(0, None), title=plan.title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True


def write_weights(plan: Plan) -> list[Path]:
    """The best weights of every finished run of the first view, in half precision; the cards have their scores."""
    written = []
    view = next(iter(plan.views))
    for row in plan.rows:
        for seed in plan.seeds:
            run, path = plan.run(row, view, seed), plan.out / "weights" / f"{slug(row)}-seed{seed}.safetensors"
            if finished(run) and (run / "best.ckpt").is_file():
                report = json.loads((run / "report.json").read_text())
                about = {
                    "command": report.get("command"),
                    "scores": {"split": report["split"], **{name: report.get(key) for name, key in SCORES.items()}},
                    "cost": cost(run),
                }
                best = checkpoint.read(run / "best.ckpt", trust=AnyName())
                checkpoint.write_weights(best, path, half=True, about=about)
                written.append(path)
    return written


def write(plan: Plan, facts: Mapping[str, Any]) -> str:
    """Write results.json, results.md and curves.png into the folder; returns the Markdown."""
    found = content(plan, facts)
    plan.out.mkdir(parents=True, exist_ok=True)
    write_json(found, plan.out / "results.json")
    text = markdown(found)
    replace_text(plan.out / "results.md", text)
    draw(plan, plan.out / "curves.png")
    return text
