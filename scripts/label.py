"""Teach a network by painting: a local web page that learns from a few strokes and proposes masks of all your photos.

    python scripts/label.py PHOTOS [CHECKPOINT] [--classes road,sky,...] [--out DIR] [--port 8000] [--host 127.0.0.1]
                            [--seconds 5] [--learn decoder|all]

Open the printed address in a browser, name the classes, and paint a little of each. Everything is saved in DIR as it
happens: images/, masks/ and classes.yaml, which `train dataset=folder dataset.root=DIR` reads, and session/, from which
the same command resumes. CHECKPOINT is what the network starts from: a run, a .ckpt or camvid-small-286e5fc (the
default), imagenet, or nothing. Ctrl-C stops the server.
"""

from segdeconv.cli.command import run_command
from segdeconv.cli.label import run

if __name__ == "__main__":
    run_command(lambda: run(__doc__.splitlines()[0]))
