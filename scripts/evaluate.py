"""Evaluate a checkpoint on a split of the data set it was trained on.

    python scripts/evaluate.py CHECKPOINT [--split val] [--out DIR] [--masks DIR] [--pictures DIR] [key=value ...]

The checkpoint contains the config of its data; set dataset.root=DIR if the data has moved. Predictions are scored at
the size of the stored masks, over all pixels that are not ignored. Prints a table and writes DIR/report.json and
DIR/report.html, a page with the scores, their breakdown, and the best, median and worst images. --compare OTHER adds
another network to the page.

--regions N predicts each image from its N best object proposals, as DeconvNet does; --ensemble CHECKPOINT adds a second
network, as EDeconvNet does with FCN-8s; --crf refines the result. --ablate measures how much the switches contribute,
--uncertainty how well measures of uncertainty detect errors.
"""

from segdeconv.cli.command import run_command
from segdeconv.cli.evaluate import run

if __name__ == "__main__":
    run_command(lambda: run(__doc__.splitlines()[0]))
