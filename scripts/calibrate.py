"""Fit what makes a checkpoint's probabilities right, raises its mean IoU, or fits it to images from elsewhere.

    python scripts/calibrate.py CHECKPOINT [--class-offsets | --instance-statistics 0.2] [--out FILE] [dataset.root=DIR]

Divides the logits by the one number that minimises the negative log-likelihood of the labelled pixels of val, which
leaves the masks as they are. Writes <name>_calibrated.ckpt next to the checkpoint, for use like any other: every
command that reads or exports it has the calibrated probabilities.

With --class-offsets, adds one number per class to the logits instead, with which the predicted classes have the highest
mean IoU on train, prints the scores of val before and after, and writes <name>_offsets.ckpt.

With --instance-statistics WEIGHT, lets the batch norms of the encoder's first three stages mix the mean and variance
of each image into those of training, for images of other light, weather or cameras, prints mean IoU on val without and
with it, and writes <name>_instance.ckpt. PART=WEIGHT,... names other parts of the network; 0 removes the mixing.
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
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--class-offsets", action="store_true", help="raise mean IoU by one number per class, fitted on train"
    )
    kinds.add_argument(
        "--instance-statistics",
        metavar="WEIGHT",
        help="mix the statistics of each image into the batch norms: 0.2, or PART=WEIGHT,... for parts of the network",
    )
    parser.add_argument(
        "--out",
        type=local_path,
        help="file to write (default: <name>_calibrated.ckpt, <name>_offsets.ckpt or <name>_instance.ckpt next to it; "
        "for a shipped network, in this folder)",
    )
    parser.add_argument("--trust", action="append", default=[], help="allow a class of your own that the config names")
    arguments = parser.parse_intermixed_args()

    from segdeconv.checkpoints import cards, checkpoint, hub

    source = read_checkpoint(arguments.checkpoint, arguments.trust, arguments.overrides)
    elsewhere = cards.SHIPPED in source.path.parents or hub.is_address(arguments.checkpoint)
    folder = Path() if elsewhere else source.path.parent
    if arguments.class_offsets:
        ending = "offsets"
    elif arguments.instance_statistics is not None:
        ending = "instance"
    else:
        ending = "calibrated"
    out = arguments.out or folder / f"{source.path.stem}_{ending}{SUFFIX}"
    if out.suffix != SUFFIX:
        share = command("export", [f"{out.stem}{SUFFIX}", "--out", str(out)])
        raise UsageError(f"--out {out} does not end in {SUFFIX} - calibrate to such a file, and export that: {share}")
    if out.exists():
        raise UsageError(f"{out} exists - choose another --out, or remove it")

    from segdeconv.evaluation.class_offsets import with_class_offsets
    from segdeconv.evaluation.instance_statistics import read_weights, with_instance_statistics
    from segdeconv.evaluation.temperature import calibrated

    if arguments.class_offsets:
        content = with_class_offsets(source).content
    elif arguments.instance_statistics is not None:
        weights = read_weights(arguments.instance_statistics, source.model())
        content = with_instance_statistics(source, weights).content
    else:
        content = calibrated(source).content
    if source.folder is not None:
        content[checkpoint.FOLDER] = checkpoint.relative_folder(source.folder, out.parent)
    checkpoint.write(content, out)
    print(f"written: {out}\nuse it:  {command('evaluate', [str(out), *arguments.overrides])}")


if __name__ == "__main__":
    run_command(main)
