"""The command `verify`, which checks a finished run against its own record."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from segdeconv.cli.command import ArgumentParser, local_path
from segdeconv.errors import IncompleteError, MismatchError, UsageError, command

MARKS = {"passed": "ok", "failed": "DIFFERS", "not checked": "not checked", "note": "note"}


def parse(description: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser("verify.py", description=description)
    add = parser.add_argument
    add("run", metavar="RUN", help="the folder of a finished run, or latest (the newest run)")
    add("overrides", nargs="*", metavar="key=value", help="of the data set, for example dataset.root=DIR")
    add("--steps", type=int, default=5, help="steps to repeat from the seed and from each kept checkpoint (default 5)")
    add("--images", default="20", metavar="N|all", help="images to predict and count again (default 20)")
    add("--seed", type=int, help="of the choice of images (default: a new one, which is printed)")
    add("--sums", metavar="SHA256", help="the published sha256 of RUN/SHA256SUMS, which the end of the run prints")
    add("--partial", action="store_true", help="exit with 0, not 6, although some checks could not be made")
    add("--out", type=local_path, help="folder for verify.json and verify.html (default: verification/ in the run)")
    add("--trust", action="append", default=[], help="allow a class of your own that the config names")
    return parser.parse_intermixed_args(words)


def run(description: str) -> None:
    """Run the command: verify the run, print the checks and write them.

    Raises:
        MismatchError: A check failed.
        IncompleteError: A check could not be made.
    """
    arguments = parse(description)
    images = _count(arguments.images)
    for name, value in (("steps", arguments.steps), ("seed", arguments.seed)):
        if value is not None and value < 0:
            raise UsageError(f"--{name}={value} is negative - give 0 or more")

    from segdeconv.checkpoints import locate
    from segdeconv.cli.own_code import find_own_code
    from segdeconv.drawing import html
    from segdeconv.evaluation import report
    from segdeconv.system.files import create_folder
    from segdeconv.training.verification import verify

    find_own_code(arguments.trust)
    folder = locate.find_run(Path(arguments.run).expanduser())
    result = verify(
        folder,
        steps=arguments.steps,
        images=images,
        seed=arguments.seed,
        trust=arguments.trust,
        overrides=arguments.overrides,
        sums=arguments.sums,
    )
    content = {**result.as_plain_data(), "command": command("verify", sys.argv[1:])}
    out = arguments.out or folder / "verification"
    create_folder(out, "--out")
    report.write_json(content, out / "verify.json")
    html.write(html.render("verify.html", **content), out / "verify.html")
    print(f"\n{folder}, seed {result.seed}\n")
    width = max(len(check.name) for check in result.checks)
    for check in result.checks:
        print(f"  {check.name:<{width}}  {MARKS[check.status]:<11}  {check.detail}")
    print(f"\nverdict: {result.verdict}")
    print(f"written: {out / 'verify.html'} (and verify.json), in {result.seconds:.1f} s", flush=True)
    if result.of("failed"):
        raise MismatchError(
            f"{folder}: {result.verdict} - it was changed after training, or the machine computes otherwise; see "
            f"{out / 'verify.html'}"
        )
    if (unmade := result.of("not checked")) and not arguments.partial:
        names = ", ".join(check.name for check in unmade)
        raise IncompleteError(f"{folder}: not checked: {names} - to accept the other checks, add --partial")


def _count(text: str) -> int | None:
    """Return the number of images that --images names, None for all."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise UsageError(f"--images={text} is not a number of images - give one, or all")
    return int(text)
