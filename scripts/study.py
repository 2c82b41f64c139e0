"""Train the SegNet paper's eight decoders with one config, and reproduce its table 1.

    python scripts/study.py [--quick] [--seeds 0,1,2] [--models a,b] [--class-weighting median_frequency,none]
                            [--split val] [--out DIR] [--table] [key=value ...]

Each key=value is an argument of train.py and applies to all runs: dataset.root=DIR, dataset=shapes,
trainer.max_steps=1000. --quick trains slim networks at 90x120, in minutes on two CPU cores; --table only writes the
table of the existing runs. Writes DIR/<class_weighting>/<model>/seed<n>/ for every run, and DIR/study.md, study.csv and
study.json after each run. Running the same command again skips finished runs and resumes interrupted ones.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from segdeconv.cli.command import ArgumentParser, local_path, run_command
from segdeconv.cli.options import refuse_keys
from segdeconv.cli.own_code import compose
from segdeconv.errors import SegdeconvError, UsageError, command

RESERVED_KEYS = {
    "model": "--models",
    "seed": "--seeds",
    "loss.class_weighting": "--class-weighting",
    "hydra.run.dir": "--out",
}


def main() -> None:
    """Check every config, measure every network, train the missing runs and write the table after each."""
    parser = ArgumentParser("study.py", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.root=DIR")
    parser.add_argument("--quick", action="store_true", help="slim networks at 90x120: minutes on two CPU cores")
    parser.add_argument("--seeds", default="0", help="comma-separated (default 0)")
    parser.add_argument("--models", help="comma-separated files of configs/model (default: all eight)")
    parser.add_argument("--class-weighting", default="median_frequency", help="comma-separated: median_frequency, none")
    parser.add_argument("--split", default="val", help="the split whose scores the table shows (default val)")
    parser.add_argument("--out", type=local_path, help="folder (default: runs/decoder-study, or -quick)")
    parser.add_argument("--table", action="store_true", help="only write the table, without training")
    arguments = parser.parse_intermixed_args()

    import torch

    from segdeconv.data.module import build_split
    from segdeconv.experiments.study import costs, paper, series, table
    from segdeconv.system.devices import best_device
    from segdeconv.training.config_check import check_config
    from segdeconv.training.resume import finished

    refuse_keys(arguments.overrides, RESERVED_KEYS, "the study")
    experiment = "decoder_study_quick" if arguments.quick else "decoder_study"
    plan = table.Plan(
        arguments.out or Path("runs") / experiment.replace("_", "-"),
        series.parse_names(arguments.models, paper.BY_MODEL, "--models") if arguments.models else tuple(paper.BY_MODEL),
        series.parse_names(arguments.class_weighting, paper.CLASS_WEIGHTINGS, "--class-weighting"),
        series.seeds(arguments.seeds),
        arguments.split,
    )
    if not any(word.startswith("experiment=") for word in arguments.overrides):
        arguments.overrides.insert(0, f"experiment={experiment}")

    def words(model: str, class_weighting: str, seed: int) -> list[str]:
        return [*arguments.overrides, f"model={model}", f"loss.class_weighting={class_weighting}", f"seed={seed}"]

    def config(model: str, class_weighting: str, seed: int) -> dict[str, Any]:
        return check_config(compose(words(model, class_weighting, seed))[0])

    # Check all configs and measure all networks first, so that errors are reported before anything is trained.
    nodes = {model: config(model, plan.class_weightings[0], plan.seeds[0]) for model in paper.BY_MODEL}
    jobs = [(seed, key) for seed in plan.seeds for key in plan.keys]
    for seed, (class_weighting, model) in jobs:
        series.check_same(plan.run((class_weighting, model), seed), config(model, class_weighting, seed))
    dataset = nodes["segnet_basic"]["dataset"]
    split, _ = build_split(dataset, "train"), build_split(dataset, plan.split)
    size, device = dataset["size"] or dataset["crop"], best_device()
    if size is None:
        raise UsageError("the study compares the networks at one input size - set dataset.size=[H,W]")
    measured = {
        model: costs.measure(node["model"], len(split.classes), split.channels, tuple(size), device)
        for model, node in nodes.items()
    }
    metadata = {
        "command": command("study", sys.argv[1:]),
        "data": f"{split.kind}, {len(split)} train images at {size[0]}x{size[1]}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
    }

    for number, (seed, (class_weighting, model)) in enumerate(jobs, start=1):
        run, name = plan.run((class_weighting, model), seed), paper.BY_MODEL[model].name
        if not arguments.table and not finished(run):
            print(f"\n=== {number} of {len(jobs)}: {name}, {class_weighting}, seed {seed}\n", flush=True)
            typed = command("train", [*words(model, class_weighting, seed), f"hydra.run.dir={run}"])
            series.resume_run(config(model, class_weighting, seed), run, name=name, typed=typed)
        if finished(run) and not plan.report((class_weighting, model), seed).is_file():
            score(run, plan.split)
        table.write(plan, measured, metadata)
    print("\n" + table.write(plan, measured, metadata))
    print("\n".join(f"{plan.out / name}" for name in ("study.md", "study.csv", "study.json")))


def score(run: Path, split: str) -> None:
    """Evaluate the best checkpoint of a run on a split that training did not evaluate.

    Raises:
        SegdeconvError: The evaluation fails.
    """
    script = Path(__file__).with_name("evaluate.py")
    words = [str(run / "best.ckpt"), "--split", split, "--out", str(run / split)]
    done = subprocess.run([sys.executable, str(script), *words], check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SegdeconvError(done.stderr.strip().splitlines()[-1].removeprefix("segdeconv: error: "))


if __name__ == "__main__":
    run_command(main)
