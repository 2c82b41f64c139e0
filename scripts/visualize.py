"""Draw figures of a network: its switches and their paths, the decoder, and units; explain predicted pixels.

    python scripts/visualize.py CHECKPOINT [IMAGE_OR_FOLDER ...] [--out DIR] [--explain Y,X] [key=value ...]

Without images, the validation split of the checkpoint's data set is used. Writes PNG figures: NAME_switches, NAME_flow,
NAME_stages and NAME_stability for the first images, and units_LAYER for each layer; index.html shows all of them. A
network without unpooling has no stages, and one whose pools store no switches has only units; missing figures are
reported.

--explain Y,X writes NAME_pixel_Y_X instead: what every pixel and every level of the network contributes to the logit of
the predicted class in row Y and column X, and to its difference from the next class, as a figure, JSON and NumPy file.
--explain-region Y,X explains the predicted region that contains the pixel, --classes A,B why A and not B. Prints the
sums beside the logits, and exits with 1 where they differ by more than rounding.
"""

from segdeconv.cli.command import run_command
from segdeconv.cli.visualize import run

if __name__ == "__main__":
    run_command(lambda: run(__doc__.splitlines()[0]))
