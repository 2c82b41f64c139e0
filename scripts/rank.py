"""Rank images by the expected gain from labelling them, or find suspect masks.

    python scripts/rank.py CHECKPOINT PATH [PATH ...] [--labelled PATH] [--diversity X] [--first N] [--copy DIR]
                           [--samples N] [--out DIR] [key=value ...]
    python scripts/rank.py CHECKPOINT --suspects [--split val] [--min-area PIXELS] [--first N] [--out DIR]
                           [key=value ...]

The first form orders images without labels: those come first of whose regions the network is uncertain and that are
unlike the images before them. Writes DIR/ranking.csv, and DIR/ranking.html with the first N images. --labelled names
images that are labelled already, --copy copies the first N.

The second form lists regions of a labelled data set, that of the checkpoint, where a confident network predicts another
class than the mask has. Writes DIR/suspects.csv, and DIR/suspects.html with the first N images.
"""

from segdeconv.cli.command import run_command
from segdeconv.cli.rank import run

if __name__ == "__main__":
    run_command(lambda: run(__doc__.splitlines()[0]))
