"""Fit a temperature on the val split that makes the probabilities of a checkpoint right, and write the result.

    python scripts/calibrate.py CHECKPOINT [--out FILE] [dataset.root=DIR]

Divides the logits by the one number that minimises the negative log-likelihood of the labelled pixels of val, which
leaves the masks as they are. Writes <name>_calibrated.ckpt next to the checkpoint, for use like any other: every
command that reads or exports it has the calibrated probabilities.
"""

from pathlib import Path

from segdeconv.cli.command import ArgumentParser, local_path, run_command
from segdeconv.cli.options import add_checkpoint
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import UsageError, command

SUFFIX = ".ckpt"


def main() -> None:
    """Parse the command line, calibrate the checkpoint and write it."""
    parser = ArgumentParser("calibrate.py", description=__doc__.splitlines()[0])
    add_checkpoint(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.root=DIR")
    text = "file to write (default: <name>_calibrated.ckpt next to it; for a shipped network, in this folder)"
    parser.add_argument("--out", type=local_path, help=text)
    parser.add_argument("--trust", action="append", default=[], help="allow a class of your own that the config names")
    arguments = parser.parse_intermixed_args()

    from segdeconv.checkpoints import cards, checkpoint, hub

    source = read_checkpoint(arguments.checkpoint, arguments.trust, arguments.overrides)
    elsewhere = cards.SHIPPED in source.path.parents or hub.is_address(arguments.checkpoint)
    folder = Path() if elsewhere else source.path.parent
    out = arguments.out or folder / f"{source.path.stem}_calibrated{SUFFIX}"
    if out.suffix != SUFFIX:
        share = command("export", [f"{out.stem}{SUFFIX}", "--out", str(out)])
        raise UsageError(f"--out {out} does not end in {SUFFIX} - calibrate to such a file, and export that: {share}")
    if out.exists():
        raise UsageError(f"{out} exists - choose another --out, or remove it")

    from segdeconv.evaluation.temperature import calibrated

    content = calibrated(source).content
    if source.folder is not None:
        content[checkpoint.FOLDER] = checkpoint.relative_folder(source.folder, out.parent)
    checkpoint.write(content, out)
    print(f"written: {out}\nuse it:  {command('evaluate', [str(out), *arguments.overrides])}")


if __name__ == "__main__":
    run_command(main)
