"""Recompute a checkpoint's batch norm statistics over the whole train split.

    python scripts/recalibrate.py CHECKPOINT [--out FILE] [key=value ...]

The authors of SegNet do this before testing; it replaces the running averages, which reflect the last steps of
training. Writes <name>_recalibrated.ckpt next to the checkpoint, for use like any other. dataset.batch_size=N sets the
batch size (default: that of training).
"""

import os

from segdeconv.cli.command import ArgumentParser, local_path, run_command
from segdeconv.cli.options import add_checkpoint
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import UsageError, command


def main() -> None:
    """Parse the command line, recalibrate the checkpoint and write it."""
    parser = ArgumentParser("recalibrate.py", description=__doc__.splitlines()[0])
    add_checkpoint(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.root=DIR")
    parser.add_argument("--out", type=local_path, help="file to write (default: <name>_recalibrated.ckpt next to it)")
    parser.add_argument("--trust", action="append", default=[], help="allow a class of your own that the config names")
    arguments = parser.parse_intermixed_args()

    from segdeconv.checkpoints import checkpoint
    from segdeconv.system.devices import best_device
    from segdeconv.training.batchnorm_recalibration import recalibrated

    source = read_checkpoint(arguments.checkpoint, arguments.trust, arguments.overrides)
    out = arguments.out or source.path.with_name(f"{source.path.stem}_recalibrated.ckpt")
    if out.resolve() == source.path.resolve():
        raise UsageError(f"--out {out} is the checkpoint itself - give it another name")
    if os.path.lexists(out):
        raise UsageError(f"{out} exists - choose another --out, or remove it")
    content = recalibrated(source, device=best_device()).content
    if source.folder is not None:
        content[checkpoint.FOLDER] = checkpoint.relative_folder(source.folder, out.parent)
    checkpoint.write(content, out)
    print(f"written: {out}\nuse it:  {command('evaluate', [str(out)])}")


if __name__ == "__main__":
    run_command(main)
