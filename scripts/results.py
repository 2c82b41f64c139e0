"""Train configs side by side, over seeds and ways of splitting the data, and bring back what came of them.

    python scripts/results.py TABLE [--seeds 0,1,2] [--rows a,b] [--views a,b] [--out DIR] [--table] [--weights]
                              [key=value ...]

TABLE is a file of segdeconv/experiments/study/tables, by its name, or any YAML file of that form: rows and views, each
a name and words of train.py's command line. Every key=value is for all of them, and stronger: dataset.root=DIR.
Writes DIR/<row>/<view>/seed<n>/ for every run, and DIR/results.md, results.json and curves.png after each; --weights
writes DIR/weights/ at the end, in half precision. What is finished is not run again, and what was cut goes on, when
the same command is typed again.
"""

import sys
from pathlib import Path
from typing import Any

from segdeconv.cli.command import ArgumentParser, run_command
from segdeconv.cli.options import refuse_keys
from segdeconv.cli.own_code import compose
from segdeconv.errors import command

GIVEN = {"seed": "--seeds", "hydra.run.dir": "--out"}


def main() -> None:
    """Check every config, train what is not trained, write the table after each."""
    parser = ArgumentParser("results.py", description=__doc__.splitlines()[0])
    parser.add_argument("table", help="camvid, camvid_slim, camvid_small, camvid_steps, or a YAML file of that form")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.root=DIR")
    parser.add_argument("--seeds", default="0", help="comma-separated (default 0)")
    parser.add_argument("--rows", help="comma-separated, as folders are named (default: all)")
    parser.add_argument("--views", help="alike (default: all)")
    parser.add_argument("--out", type=Path, help="folder (default: runs/results/TABLE)")
    parser.add_argument("--table", action="store_true", dest="only_table", help="train nothing, only write the table")
    parser.add_argument("--weights", action="store_true", help="write the best weights of every run of the first view")
    arguments = parser.parse_intermixed_args()
    refuse_keys(arguments.overrides, GIVEN, "the table's")

    from segdeconv.experiments.study import results, series
    from segdeconv.training.config_check import check_config
    from segdeconv.training.resume import finished

    path = results.table_path(arguments.table)
    parts: dict[str, Any] = results.read_results(path)
    for part in ("rows", "views"):
        wanted = getattr(arguments, part)
        if wanted:
            slugs = {results.slug(name): name for name in parts[part]}
            picked = [slugs[name] for name in series.chosen(wanted, slugs, f"--{part}")]
            parts[part] = {name: parts[part][name] for name in picked}
    out = arguments.out or Path("runs") / "results" / path.stem
    plan = results.Plan(**parts, seeds=series.seeds(arguments.seeds), out=out, added=arguments.overrides)
    # Before anything is trained: a mistake in any of them.
    configs = {}
    for job in plan.jobs:
        words = plan.config(*job)
        configs[job] = words, check_config(compose(words)[0])
        series.check_same(plan.run(*job), configs[job][1])
    facts = {"command": command("results", sys.argv[1:])}

    for number, (job, (words, config)) in enumerate(configs.items(), start=1):
        run, name = plan.run(*job), f"{job[0]}, {job[1]}, seed {job[2]}"
        if not arguments.only_table and not finished(run):
            print(f"\n=== {number} of {len(configs)}: {name}\n", flush=True)
            series.resume_run(config, run, name=name, typed=command("train", [*words, f"hydra.run.dir={run}"]))
            results.write(plan, facts)
    print("\n" + results.write(plan, facts))
    written = [plan.out / name for name in ("results.md", "results.json", "curves.png")]
    print("\n".join(str(path) for path in written if path.is_file()))
    if arguments.weights:
        print("\n".join(map(str, results.write_weights(plan))))


if __name__ == "__main__":
    run_command(main)
