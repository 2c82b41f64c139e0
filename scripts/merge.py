"""Put the parts of a prediction or an evaluation together.

    python scripts/predict.py CHECKPOINT PATH [PATH ...] --out DIR --shard K/N     for every K from 1 to N, in any order
    python scripts/merge.py DIR

The parts of `predict` become one progress log and one statistics.csv, those of `evaluate` report.json and report.html,
the same as those of one process. Parts that are missing, unfinished or of other checkpoints, settings or images are
named, and nothing is written.
"""

from segdeconv.cli.command import run_command
from segdeconv.cli.merge import run

if __name__ == "__main__":
    run_command(lambda: run(__doc__.splitlines()[0]))
