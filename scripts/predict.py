"""Predict the masks of images and videos with a checkpoint.

    python scripts/predict.py CHECKPOINT PATH [PATH ...] [--out DIR] [key=value ...]

PATH is an image, a folder of images (with its sub-folders), a pattern such as 'photos/*.jpg', a list (.txt, one path a
line; - for stdin) or a video. For each image, DIR/<name>.png is a palette mask of exactly the image's size, and
DIR/<name>_overlay.png shows the mask over the image, with a legend; a video becomes DIR/<name>_overlay.webm.
DIR/statistics.csv lists the fraction of each class in each image. A georeferenced image becomes DIR/<name>.tif, a
GeoTIFF, and so do its other outputs.

Images may have any size: an image that needs more memory than --memory is predicted in tiles, with the same result.
Running an interrupted command again resumes it. --samples N predicts the mean of N passes with dropout, and
DIR/<name>_uncertainty.png shows where they disagree. --regions N predicts each image from its N best object proposals,
--ensemble CHECKPOINT adds a second network and --crf refines the result. A file that cannot be read is reported and
skipped; the exit code is then 2.
"""

from segdeconv.cli.command import run_command
from segdeconv.cli.predict import run

if __name__ == "__main__":
    run_command(lambda: run(__doc__.splitlines()[0]), needs_reader=True)
