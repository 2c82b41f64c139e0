"""Compute a checkpoint's batch norm statistics anew, over the whole train split.

    python scripts/recalibrate.py CHECKPOINT [--out FILE] [key=value ...]

As the authors of SegNet do before they test, in place of running averages, which remember the last steps of training.
Writes <name>_recalibrated.ckpt beside the checkpoint, to use like any other. dataset.batch_size=N sets how many images
make a batch (default: as many as in training).
"""

from pathlib import Path

from segdeconv.cli.command import ArgumentParser, run_command
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import UsageError, command


def main() -> None:
    """Parse, read, recalibrate, write."""
    parser = ArgumentParser("recalibrate.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a .ckpt that train.py wrote")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.root=DIR")
    parser.add_argument("--out", type=Path, help="file to write (default: <name>_recalibrated.ckpt beside it)")
    parser.add_argument("--trust", action="append", default=[], help="a class of your own that the config names")
    arguments = parser.parse_intermixed_args()

    from segdeconv.checkpoints import checkpoint
    from segdeconv.system.devices import best_device
    from segdeconv.training.batchnorm_recalibration import recalibrated

    read = read_checkpoint(arguments.checkpoint, arguments.trust, arguments.overrides)
    out = arguments.out or read.path.with_name(f"{read.path.stem}_recalibrated.ckpt")
    if out.resolve() == read.path.resolve():
        raise UsageError(f"--out {out} is the checkpoint itself - give it another name")
    checkpoint.write(recalibrated(read, device=best_device()).content, out)
    print(f"written: {out}\nuse it:  {command('evaluate', [str(out)])}")


if __name__ == "__main__":
    run_command(main)
