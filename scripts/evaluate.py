"""Score a checkpoint on a split of the data set it was trained on.

    python scripts/evaluate.py CHECKPOINT [--split val] [--out DIR] [--masks DIR] [--pictures DIR] [key=value ...]

The checkpoint is enough; dataset.root=DIR says where the data lies if it has moved. Every stored pixel that is not
ignored counts, at the mask's own size. Prints a table and writes DIR/report.json and DIR/report.html, one page with the
scores, where they come from, and the best, the median and the worst images; --compare OTHER puts another network beside
it.

--regions N sees each image through its N likeliest object proposals, as DeconvNet does; --ensemble CHECKPOINT adds a
second network, as EDeconvNet does with FCN-8s; --crf refines the outlines. --ablate says what the switches are worth,
--uncertainty which signs of doubt find the errors.
"""

from segdeconv.cli.command import run_command
from segdeconv.cli.evaluate import run

if __name__ == "__main__":
    run_command(lambda: run(__doc__.splitlines()[0]))
