"""Label images and videos with a checkpoint.

    python scripts/predict.py CHECKPOINT PATH [PATH ...] [--out DIR] [key=value ...]

PATH is a picture, a folder of pictures (with its sub-folders), a pattern such as 'photos/*.jpg', a list (.txt, one path
a line; - for stdin) or a video. For each image DIR/<name>.png is an indexed palette mask of exactly the image's size
and DIR/<name>_overlay.png shows it on the image with a legend; a video becomes DIR/<name>_overlay.mp4.
DIR/statistics.csv has the share of each class in each image.

Images of any size: what needs more memory than --memory is seen in tiles, with the same result. The same command again
goes on where it was interrupted. --samples N predicts the mean of N passes with dropout, and
DIR/<name>_uncertainty.png shows where they disagree. --regions N sees each image through its N likeliest object
proposals, --ensemble CHECKPOINT adds a second network and --crf refines the outlines. A file that cannot be read gets
one line and the rest goes on; the exit code is then 2.
"""

from segdeconv.cli.command import run_command
from segdeconv.cli.predict import run

if __name__ == "__main__":
    run_command(lambda: run(__doc__.splitlines()[0]))
