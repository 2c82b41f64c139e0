"""Check a finished run against its own record: files, data, scores, and steps repeated to the bit.

    python scripts/verify.py RUN [--steps 5] [--images 20] [--sums SHA256] [--partial] [key=value ...]

Repeats a few steps from the seed and from every checkpoint that the run kept, and compares losses and weights to the
bit; predicts a few images again and compares every count; derives the scores of report.json from its counts; and
compares files, images, masks and config with their recorded hashes. Set dataset.root=DIR if the data is elsewhere.
Writes RUN/verification/verify.html and verify.json.

Exits with 4 if something differs, which the last line names, and with 6 if a check could not be made, unless --partial.
"""

from segdeconv.cli.command import run_command
from segdeconv.cli.verify import run

if __name__ == "__main__":
    run_command(lambda: run(__doc__.splitlines()[0]))
