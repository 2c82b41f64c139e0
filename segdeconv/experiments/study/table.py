"""The table of the decoder study, from the reports of its runs, as Markdown, CSV and JSON."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segdeconv.evaluation.report import write_json
from segdeconv.experiments.study.costs import Costs
from segdeconv.experiments.study.paper import BY_MODEL, SCORES, Key, Ordering, Variant, judge, orderings, published
from segdeconv.experiments.study.series import Scores, averages, mean, mean_and_spread, percents, rows
from segdeconv.system.files import replace_text
from segdeconv.training.resume import finished


@dataclass(frozen=True)
class Plan:
    """The runs of a study and their folder.

    Attributes:
        out: Folder of the study.
        models: Names of files in configs/model.
        class_weightings: Class weightings of the loss.
        seeds: Seeds of the runs of every network.
        split: Split whose scores the table shows.
    """

    out: Path
    models: tuple[str, ...]
    class_weightings: tuple[str, ...]
    seeds: tuple[int, ...]
    split: str = "val"

    @property
    def keys(self) -> list[Key]:
        """All networks, each as (class weighting, model)."""
        return [(class_weighting, model) for class_weighting in self.class_weightings for model in self.models]

    def run(self, key: Key, seed: int) -> Path:
        """Return the folder of one run."""
        return self.out / key[0] / key[1] / f"seed{seed}"

    def report(self, key: Key, seed: int) -> Path:
        """Return the file with the scores of one run; training writes those of val, scripts/study.py the others."""
        run = self.run(key, seed)
        return run / "report.json" if self.split == "val" else run / self.split / "report.json"


def collect(plan: Plan) -> dict[Key, dict[int, Scores]]:
    """Return the scores of every finished run, by network and seed."""
    scores: dict[Key, dict[int, Scores]] = {key: {} for key in plan.keys}
    for key in plan.keys:
        for seed in plan.seeds:
            if finished(plan.run(key, seed)) and plan.report(key, seed).is_file():
                scores[key][seed] = percents(plan.report(key, seed), SCORES)
    return scores


def content(plan: Plan, costs: Mapping[str, Costs], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of study.json.

    Args:
        plan: The runs.
        costs: Model -> its costs, for all networks of the paper.
        metadata: Further items to write.
    """
    scores = collect(plan)
    return {
        **metadata,
        "split": plan.split,
        "seeds": list(plan.seeds),
        "complete": all(len(runs) == len(plan.seeds) for runs in scores.values()),
        "networks": [_network(BY_MODEL[key[1]], key[0], scores[key], costs) for key in plan.keys],
        "orderings": [_ordering(ordering, plan, scores) for ordering in orderings(plan.class_weightings)],
    }


def _network(
    variant: Variant, class_weighting: str, runs: Mapping[int, Scores], costs: Mapping[str, Costs]
) -> dict[str, Any]:
    own_costs = costs[variant.model]
    return {
        "name": variant.name,
        "model": variant.model,
        "class_weighting": class_weighting,
        "seeds": list(runs),
        **averages({score: [run[score] for run in runs.values()] for score in SCORES}),
        "runs": {str(seed): scores for seed, scores in runs.items()},
        **asdict(own_costs),
        "storage": own_costs.packed / costs["segnet_basic"].packed,
        "paper": {
            "scores": dict(zip(SCORES, variant.scores[class_weighting], strict=True)),
            "parameters": variant.parameters,
            "forward_ms": variant.milliseconds,
            "storage": variant.storage,
        },
    }


def _ordering(ordering: Ordering, plan: Plan, scores: Mapping[Key, Mapping[int, Scores]]) -> dict[str, Any]:
    verdict = judge(ordering, lambda key, score: mean([run[score] for run in scores.get(key, {}).values()]))
    by_seed = [
        judge(ordering, lambda key, score, seed=seed: scores.get(key, {}).get(seed, {}).get(score)).holds  # type: ignore[misc]
        for seed in plan.seeds
    ]
    known = [margin for margin in verdict.margins if margin is not None]
    return {
        "claim": ordering.claim,
        "class_weighting": ordering.class_weighting,
        "score": ordering.score,
        "holds": verdict.holds,
        "holds_in_paper": judge(ordering, published).holds,
        "comparisons": [
            {"above": _names(comparison.above), "below": _names(comparison.below), "margin": margin}
            for comparison, margin in zip(ordering.comparisons, verdict.margins, strict=True)
        ],
        "held": sum(margin > 0 for margin in known) if len(known) == len(verdict.margins) else None,
        "seeds_held": sum(holds is True for holds in by_seed),
        "seeds_judged": sum(holds is not None for holds in by_seed),
    }


def _names(keys: Sequence[Key]) -> list[str]:
    return [BY_MODEL[model].name for _, model in keys]


# Output for people.


def markdown(study: Mapping[str, Any]) -> str:
    """Format the return value of `content` as Markdown."""
    lines = ["# Decoder study", ""]
    lines += [f"* {name}: {study[name]}" for name in ("command", "data", "device") if name in study]
    lines += [
        f"* scores: on {study['split']}, in percent, mean ± standard deviation over seeds; the paper's are on test"
    ]
    for class_weighting in dict.fromkeys(network["class_weighting"] for network in study["networks"]):
        networks = [network for network in study["networks"] if network["class_weighting"] == class_weighting]
        loss = "unweighted loss" if class_weighting == "none" else f"loss weighted by {class_weighting}"
        lines += ["", f"## Scores, {loss}", ""]
        lines += rows(["network", *SCORES, f"paper: {' / '.join(SCORES)}", "seeds"], map(_score_cells, networks))
    networks = list({network["model"]: network for network in study["networks"]}.values())
    header = [
        "network", "parameters", "at 64 channels", "paper", "forward", "paper", "kept for the decoder",
        "× SegNet-Basic", "paper",
    ]  # fmt: skip
    lines += ["", "## Costs", "", *rows(header, map(_cost_cells, networks))]
    lines += ["", "## The paper's orderings", ""]
    lines += rows(
        ["claim of the paper", "loss", "score", "here", "smallest margin", "by seed", "in its own table"],
        map(_ordering_cells, study["orderings"]),
    )
    return "\n".join(lines) + "\n"


def _score_cells(network: Mapping[str, Any]) -> list[str]:
    paper = " / ".join(
        f"{value:.2f}" if score == "BF" else f"{value:.1f}" for score, value in network["paper"]["scores"].items()
    )
    return [network["name"], *(mean_and_spread(network, score) for score in SCORES), paper, str(len(network["seeds"]))]


def _cost_cells(network: Mapping[str, Any]) -> list[str]:
    paper = network["paper"]
    packed = f" ({network['packed'] / 1024:,.0f} packed)" if network["packed"] != network["kept"] else ""
    return [
        network["name"],
        f"{network['parameters']:,}",
        f"{network['full_parameters']:,}",
        f"{paper['parameters']:g} M",
        f"{network['forward_ms']:.1f} ms",
        f"{paper['forward_ms']:.1f} ms",
        f"{network['kept'] / 1024:,.0f} KiB{packed}",
        f"{network['storage']:.1f}",
        "n/a" if paper["storage"] is None else str(paper["storage"]),
    ]


def _ordering_cells(ordering: Mapping[str, Any]) -> list[str]:
    comparisons = ordering["comparisons"]
    margins = [comparison["margin"] for comparison in comparisons]
    here = _yes(ordering["holds"])
    if len(comparisons) > 1 and ordering["held"] is not None:
        here += f" ({ordering['held']} of {len(comparisons)})"
    return [
        ordering["claim"],
        ordering["class_weighting"],
        ordering["score"],
        here,
        "–" if None in margins else f"{min(margins):+.1f}",
        f"{ordering['seeds_held']} of {ordering['seeds_judged']}",
        _yes(ordering["holds_in_paper"]),
    ]


def _yes(holds: bool | None) -> str:
    return "–" if holds is None else "holds" if holds else "does not hold"


def as_csv(study: Mapping[str, Any]) -> str:
    """Return one CSV line per network; missing values are empty."""
    text = io.StringIO()
    fields = ("parameters", "full_parameters", "forward_ms", "kept", "packed", "storage")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["network", "class_weighting", "split", "seeds", *fields]
        + [f"{score}{suffix}" for score in SCORES for suffix in ("", "_spread", "_paper")]
        + ["parameters_paper_millions", "forward_ms_paper", "storage_paper"]
    )
    for network in study["networks"]:
        paper = network["paper"]
        cells = [network["name"], network["class_weighting"], study["split"], len(network["seeds"])]
        cells += [network[field] for field in fields]
        for score in SCORES:
            cells += [network["mean"][score], network["spread"][score], paper["scores"][score]]
        writer.writerow([*cells, paper["parameters"], paper["forward_ms"], paper["storage"]])
    return text.getvalue()


def write(plan: Plan, costs: Mapping[str, Costs], metadata: Mapping[str, Any]) -> str:
    """Write study.json, study.md and study.csv into the study's folder, and return the Markdown."""
    study = content(plan, costs, metadata)
    text = markdown(study)
    write_json(study, plan.out / "study.json")
    replace_text(plan.out / "study.md", text)
    replace_text(plan.out / "study.csv", as_csv(study))
    return text
