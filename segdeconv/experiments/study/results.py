"""Tables that compare configs: scores over seeds and splits of the data, costs, curves and weights."""

import csv
import functools
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segdeconv.checkpoints import checkpoint
from segdeconv.errors import UsageError, did_you_mean
from segdeconv.evaluation.report import read_report, write_json
from segdeconv.experiments.study.series import averages, cost, mean_and_spread, percents, rows
from segdeconv.system.files import replace_text
from segdeconv.system.plain_data import PlainDataError, read_bytes, read_yaml
from segdeconv.training.resume import AnyName, finished

TABLES = Path(__file__).parent / "tables"
SCORES = {"mIoU": "miou", "G": "pixel_accuracy", "C": "mean_accuracy", "BF": "boundary_f1"}  # in report.json


@dataclass(frozen=True)
class Plan:
    """The runs of a table and their folder.

    If several arguments set the same key, the last one applies.

    Attributes:
        title: Title of the table.
        words: Arguments of train.py for all runs, such as `optimizer.lr=0.1`.
        rows: Name of a config -> its arguments.
        views: Name of a way to split the data -> its arguments. The table shows all scores of the first view and the
            mean IoU of the others.
        seeds: Seeds of the runs of every row and view.
        out: Folder of the table and the runs.
        added: Arguments for all runs that override the others.
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
        """All (row, view, seed), ordered by seed."""
        return [(row, view, seed) for seed in self.seeds for row in self.rows for view in self.views]

    def config(self, row: str, view: str, seed: int) -> list[str]:
        """Return the arguments of train.py for one run."""
        words = [*self.words, *self.rows[row], *self.views[view], *self.added, f"seed={seed}"]
        return list({word.partition("=")[0].lstrip("+"): word for word in words}.values())

    def run(self, row: str, view: str, seed: int) -> Path:
        """Return the folder of one run."""
        return self.out / slug(row) / slug(view) / f"seed{seed}"


def slug(name: str) -> str:
    """Return the folder name for a name.

    Examples:
        >>> slug("SegNet, balanced")
        'segnet-balanced'
    """
    return re.sub(r"(?:[^\w.]|_)+", "-", name.lower()).strip("-")


def table_path(name: str) -> Path:
    """Return the file of a table.

    Args:
        name: A path, or the name of a file in `TABLES` without its suffix.

    Raises:
        UsageError: There is neither.
    """
    for path in (Path(name), TABLES / f"{name}.yaml"):
        if path.is_file():
            return path
    names = sorted(path.stem for path in TABLES.glob("*.yaml"))
    raise UsageError(f"unknown table {name} - {did_you_mean(name, names)}")


def read_results(path: Path) -> dict[str, Any]:
    """Read the title, words, rows and views of a table from a YAML file like those in `TABLES`.

    Raises:
        UsageError: The file is not valid YAML or does not have this form.
    """
    try:
        content = read_yaml(path, as_text=True)  # a row may be called `no` or `1`
    except PlainDataError as error:
        raise UsageError(f"{path} {error} - see docs/results.md") from error
    content = content if isinstance(content, dict) else {}
    for part in ("rows", "views"):
        entries = content.get(part)
        if not isinstance(entries, dict) or not entries or not all(map(_are_words, entries.values())):
            raise UsageError(f"{path} must have {part}, each with a name and a list of key=value - see docs/results.md")
        if not all(isinstance(name, str) and slug(name) for name in entries):
            raise UsageError(f"{path}: {part} must have names with letters or digits - put numbers in quotes")
        if len({slug(name) for name in entries}) < len(entries):
            raise UsageError(f"{path}: two {part} have the same folder name - rename one of them")
    words = content.get("words", [])
    if not _are_words(words):
        raise UsageError(f"{path}: words must be a list of key=value - see docs/results.md")
    return {
        "title": str(content.get("title", path.stem)),
        "words": words,
        "rows": content["rows"],
        "views": content["views"],
    }


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) and "=" in word for word in value)


def content(plan: Plan, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of results.json.

    Args:
        plan: The runs.
        metadata: Further items to write.
    """
    table = []
    for row in plan.rows:
        views = {view: _scores([plan.run(row, view, seed) for seed in plan.seeds]) for view in plan.views}
        costs = [cost(plan.run(row, next(iter(plan.views)), seed)) for seed in plan.seeds]
        recorded = [entry for entry in costs if entry]
        table.append(
            {
                "name": row,
                "words": list(plan.rows[row]),
                "parameters": _parameters(plan, row),
                "views": views,
                "seconds": statistics.mean(entry["seconds"] for entry in recorded) if recorded else None,
                "memory": max((entry["memory"] for entry in recorded), default=None),
                "devices": sorted({entry["device"] for entry in recorded}),
                "commits": sorted({str(entry["commit"]) for entry in recorded}),
            }
        )
    return {**metadata, "title": plan.title, "words": list(plan.words), "seeds": list(plan.seeds), "rows": table}


def _scores(runs: Sequence[Path]) -> dict[str, Any]:
    """Return the scores of every finished run in percent, by its folder name, and their mean and spread."""
    scores = {run.name: percents(run / "report.json", SCORES) for run in runs if finished(run)}
    present = {name: [run[name] for run in scores.values() if run[name] is not None] for name in SCORES}
    return {"runs": scores, **averages(present)}


def _parameters(plan: Plan, row: str) -> int | None:
    paths = (plan.run(row, view, seed) / "best.ckpt" for view in plan.views for seed in plan.seeds)
    return next((_count(path) for path in paths if path.is_file()), None)


@functools.cache  # the number does not change, and the table is written after every run
def _count(path: Path) -> int:
    return sum(parameter.numel() for parameter in checkpoint.read(path, trust=AnyName()).model().parameters())


def markdown(results: Mapping[str, Any]) -> str:
    """Format the return value of `content` as Markdown."""
    first, *others = next(iter(results["rows"]))["views"]
    header = ["config", *SCORES, *(f"mIoU, {view}" for view in others), "seeds", "parameters", "minutes", "memory"]
    lines = [f"# {results['title']}", "", f"Scores of {first}, in percent, mean ± standard deviation over seeds.", ""]
    lines += [f"* {name}: {results[name]}" for name in ("command", "data") if name in results]
    lines += [f"* {name}: {', '.join(values)}" for name in ("devices", "commits") if (values := _all(results, name))]
    table = []
    for row in results["rows"]:
        views = row["views"]
        cells = [row["name"], *(mean_and_spread(views[first], score) for score in SCORES)]
        cells += [mean_and_spread(views[view], "mIoU") for view in others]
        cells += [str(len(views[first]["runs"])), "–" if row["parameters"] is None else f"{row['parameters']:,}"]
        cells.append("–" if row["seconds"] is None else f"{row['seconds'] / 60:.1f}")
        cells.append("–" if row["memory"] is None else f"{row['memory'] / 2**20:,.0f} MiB")
        table.append(cells)
    lines += ["", *rows(header, table)]
    lines += ["", *([f"All with `{' '.join(results['words'])}`.", ""] if results["words"] else [])]
    lines += ["| config | words |", "|---|---|"]
    lines += [f"| {row['name']} | {_code(row['words'])} |" for row in results["rows"]]
    return "\n".join(lines) + "\n"


def _all(results: Mapping[str, Any], name: str) -> list[str]:
    return sorted({value for row in results["rows"] for value in row[name]})


def _code(words: Sequence[str]) -> str:
    return f"`{' '.join(words)}`" if words else ""


def curves(plan: Plan) -> dict[str, list[list[tuple[int, float]]]]:
    """Return the learning curves of the first view.

    Returns:
        Row -> a list of (number of epochs, mean IoU on val in percent) for every seed that has a curve.
    """
    view = next(iter(plan.views))
    by_row = {row: [_curve(plan.run(row, view, seed) / "metrics.csv") for seed in plan.seeds] for row in plan.rows}
    return {row: present for row, seeds in by_row.items() if (present := [points for points in seeds if points])}


def _curve(path: Path) -> list[tuple[int, float]]:
    if not path.is_file():
        return []
    try:
        lines = csv.DictReader(read_bytes(path).decode().splitlines())
        points = [(int(line["epoch"]) + 1, float(line["val/miou"])) for line in lines]
    except (csv.Error, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not the table of metrics of a run ({type(error).__name__}) - remove it, which leaves out its "
            "curve"
        ) from error
    return [(epoch, 100 * miou) for epoch, miou in points if miou == miou]  # NaN: an epoch without validation


def draw(plan: Plan, path: Path) -> bool:
    """Write the curves as a PNG, and return False without matplotlib or without curves to draw."""
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
        style = ("-", "--", ":")[number // 10 % 3]  # there are ten colours
        for turn, points in enumerate(seeds):  # all in the same colour, the first one opaque
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
    """Write the best weights of every finished run of the first view, in half precision, with cards.

    Returns:
        The files of the weights.
    """
    written = []
    view = next(iter(plan.views))
    for row in plan.rows:
        for seed in plan.seeds:
            run, path = plan.run(row, view, seed), plan.out / "weights" / f"{slug(row)}-seed{seed}.safetensors"
            if finished(run) and (run / "best.ckpt").is_file():
                report = read_report(run / "report.json")
                about = {
                    "command": report.get("command"),
                    "scores": {"split": report.get("split"), **{name: report.get(key) for name, key in SCORES.items()}},
                    "cost": cost(run),
                }
                best = checkpoint.read(run / "best.ckpt", trust=AnyName())
                checkpoint.write_weights(best, path, half=True, about=about)
                written.append(path)
    return written


def write(plan: Plan, metadata: Mapping[str, Any]) -> str:
    """Write results.json, results.md and curves.png into the table's folder, and return the Markdown."""
    results = content(plan, metadata)
    plan.out.mkdir(parents=True, exist_ok=True)
    write_json(results, plan.out / "results.json")
    text = markdown(results)
    replace_text(plan.out / "results.md", text)
    draw(plan, plan.out / "curves.png")
    return text
