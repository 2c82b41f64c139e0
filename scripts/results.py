"""Train the configs of a table over seeds and splits of the data, and write a table of their scores.

    python scripts/results.py TABLE [--seeds 0,1,2] [--rows a,b] [--views a,b] [--out DIR] [--table] [--weights]
                              [key=value ...]

TABLE is the name of a file in segdeconv/experiments/study/tables, or any YAML file of that form: rows and views, each
with a name and arguments of train.py. Each key=value, such as dataset.root=DIR, applies to all runs and overrides the
table. Writes DIR/<row>/<view>/seed<n>/ for every run, and DIR/results.md, results.json and curves.png after each run;
--weights writes DIR/weights/ at the end, in half precision. Running the same command again skips finished runs and
resumes interrupted ones.
"""

import sys
from pathlib import Path
from typing import Any

from segdeconv.cli.command import ArgumentParser, local_path, run_command
from segdeconv.cli.options import refuse_keys
from segdeconv.cli.own_code import compose
from segdeconv.errors import command

RESERVED_KEYS = {"seed": "--seeds", "hydra.run.dir": "--out"}


def main() -> None:
    """Check every config, train the missing runs and write the table after each."""
    parser = ArgumentParser("results.py", description=__doc__.splitlines()[0])
    parser.add_argument("table", help="a file in segdeconv/experiments/study/tables, or any YAML file of that form")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.root=DIR")
    parser.add_argument("--seeds", default="0", help="comma-separated (default 0)")
    parser.add_argument("--rows", help="comma-separated, by their folder names (default: all)")
    parser.add_argument("--views", help="likewise (default: all)")
    parser.add_argument("--out", type=local_path, help="folder (default: runs/results/TABLE)")
    parser.add_argument(
        "--table", action="store_true", dest="only_table", help="only write the table, without training"
    )
    parser.add_argument("--weights", action="store_true", help="write the best weights of every run of the first view")
    arguments = parser.parse_intermixed_args()
    refuse_keys(arguments.overrides, RESERVED_KEYS, "the results table")

    from segdeconv.experiments.study import results, series
    from segdeconv.training.config_check import check_config
    from segdeconv.training.resume import finished

    path = results.table_path(arguments.table)
    parts: dict[str, Any] = results.read_results(path)
    for part in ("rows", "views"):
        names = getattr(arguments, part)
        if names:
            slugs = {results.slug(name): name for name in parts[part]}
            selected = [slugs[name] for name in series.parse_names(names, slugs, f"--{part}")]
            parts[part] = {name: parts[part][name] for name in selected}
    out = arguments.out or Path("runs") / "results" / path.stem
    plan = results.Plan(**parts, seeds=series.seeds(arguments.seeds), out=out, added=arguments.overrides)
    # Check all configs first, so that an error in the last is reported before anything is trained.
    configs = {}
    for job in plan.jobs:
        words = plan.config(*job)
        configs[job] = words, check_config(compose(words)[0])
        series.check_same(plan.run(*job), configs[job][1])
    metadata = {"command": command("results", sys.argv[1:])}

    for number, (job, (words, config)) in enumerate(configs.items(), start=1):
        run, name = plan.run(*job), f"{job[0]}, {job[1]}, seed {job[2]}"
        if not arguments.only_table and not finished(run):
            print(f"\n=== {number} of {len(configs)}: {name}\n", flush=True)
            series.resume_run(config, run, name=name, typed=command("train", [*words, f"hydra.run.dir={run}"]))
            results.write(plan, metadata)
    print("\n" + results.write(plan, metadata))
    written = [plan.out / name for name in ("results.md", "results.json", "curves.png")]
    print("\n".join(str(path) for path in written if path.is_file()))
    if arguments.weights:
        print("\n".join(map(str, results.write_weights(plan))))


if __name__ == "__main__":
    run_command(main)
