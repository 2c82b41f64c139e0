"""The command `rank`, which orders images by the expected gain from labelling them, or finds suspect masks."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdeconv.cli.command import ArgumentParser, local_path
from segdeconv.cli.options import add_checkpoint, add_network_options, is_override
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import UsageError, command, warn

if TYPE_CHECKING:
    from segdeconv.analysis.ranking import Measured
    from segdeconv.checkpoints.checkpoint import Checkpoint
    from segdeconv.inference.predictors import PredictionSettings

PRINTED = 10  # lines of the ranking on the terminal
DEFAULTS: dict[str, dict[str, Any]] = {  # of the options that only one of the two tasks has
    "ranking": {"labelled": [], "diversity": None, "copy": None},
    "suspects": {"split": None, "min_area": None},
}


def parse(description: str) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser("rank.py", description=description)
    add_checkpoint(parser)
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", help="images, folders, patterns, lists, -; then key=value")
    add("--out", type=local_path, help="folder (default: ranking, or suspects with --suspects)")
    add("--first", type=int, default=24, metavar="N", help="images on the page, and for --copy (default 24)")
    add = parser.add_argument_group("ranking of images without labels").add_argument
    text = "images that are labelled already, so that similar ones come later; may be repeated"
    add("--labelled", action="append", default=[], metavar="PATH", help=text)
    text = "weight of being unlike the images labelled or ranked before; 0 ranks by uncertainty alone (default 1)"
    add("--diversity", type=float, metavar="X", help=text)
    add("--copy", type=local_path, metavar="DIR", help="copy the first N images to this new folder")
    add = parser.add_argument_group("suspect masks of a labelled data set").add_argument
    text = "find masks that disagree with a confident network, in the data set of the checkpoint"
    add("--suspects", action="store_true", help=text)
    add("--split", help="train, val (default) or test")
    text = "smallest region (default: a thousandth of the image)"
    add("--min-area", type=int, metavar="PIXELS", help=text)
    add_network_options(parser)
    return parser.parse_intermixed_args()


def run(description: str) -> None:
    """Run the command: rank images or find suspects, and write a table and a page."""
    arguments = parse(description)
    overrides = [path for path in arguments.paths if is_override(path)]
    paths = [path for path in arguments.paths if not is_override(path)]
    task, other = ("suspects", "ranking") if arguments.suspects else ("ranking", "suspects")
    for option, default in DEFAULTS[other].items():
        if getattr(arguments, option) != default:
            relation = "with" if arguments.suspects else "without"
            raise UsageError(f"--{option.replace('_', '-')} has no effect {relation} --suspects - leave it out")
    if arguments.first < 1:
        raise UsageError(f"--first={arguments.first} is not a number of images - give 1 or more")
    out = arguments.out or Path(task)

    from segdeconv.inference.predictors import PredictionSettings

    settings = PredictionSettings(precision=arguments.precision, samples=arguments.samples)
    if arguments.suspects:
        if paths:
            text = "--suspects checks the data set of the checkpoint - give it by keys such as dataset.root=DIR"
            raise UsageError(f"{paths[0]}: {text}")
        checkpoint = read_checkpoint(arguments.checkpoint, arguments.trust, overrides)
        write_suspects(checkpoint, settings, arguments, out)
    else:
        checkpoint = read_checkpoint(arguments.checkpoint, arguments.trust, overrides)
        write_ranking(checkpoint, settings, arguments, out, paths)


def write_ranking(
    checkpoint: Checkpoint, settings: PredictionSettings, arguments: argparse.Namespace, out: Path, paths: list[str]
) -> None:
    """Rank images and write ranking.csv, ranking.html and copies.

    Raises:
        UsageError: An argument is invalid, or an image cannot be read.
    """
    diversity = 1.0 if arguments.diversity is None else arguments.diversity
    if not 0 <= diversity < float("inf"):
        raise UsageError(f"--diversity={diversity:g} is not a weight - give 0 or more")

    from tqdm import tqdm

    from segdeconv.analysis import ranking, ranking_page
    from segdeconv.drawing import html
    from segdeconv.inference.inputs import find_image_files
    from segdeconv.inference.segmenter import Segmenter
    from segdeconv.system.files import replace_text
    from segdeconv.system.own_files import OwnFiles

    images = find_image_files(paths, out)
    labelled = find_image_files(arguments.labelled, out) if arguments.labelled else []
    known = {path.resolve() for path in labelled}
    remaining = [path for path in images if path.resolve() not in known]
    if len(remaining) < len(images):
        warn(f"--labelled: {len(images) - len(remaining)} of {len(images)} images are labelled, so they are not ranked")
    if not remaining:
        raise UsageError("all images are in --labelled - give images that are not labelled")
    if arguments.copy is not None and arguments.copy.is_dir() and any(arguments.copy.iterdir()):
        raise UsageError(f"--copy {arguments.copy} is not empty - choose a new folder")
    tables = out / "ranking.csv", out / "ranking.html"
    own_files = OwnFiles(out, "--out")
    own_files.add(tables, inputs=[*images, *labelled])
    segmenter = Segmenter(checkpoint, settings)
    own_files.record()

    failed = 0

    def measure(paths: list[Path], what: str) -> list[Measured]:
        bar = tqdm(total=len(paths), desc=what, unit="image", disable=None)

        def report(message: str) -> None:
            nonlocal failed
            failed += 1
            tqdm.write(message, file=sys.stdout)
            bar.update()

        measured = []
        with bar:
            for image in ranking.measure(segmenter, paths, report=report):
                measured.append(image)
                bar.update()
        return measured

    measured = measure(remaining, "ranking")
    if not measured:
        raise UsageError(f"none of the {len(remaining)} images could be read - see the messages above")
    ranked = ranking.rank(measured, measure(labelled, "comparing with labelled images"), diversity=diversity)
    segmenter.resized.warn()
    replace_text(tables[0], ranking_page.ranking_table(ranked))
    first = ranked[: arguments.first]
    page = ranking_page.build_ranking(
        segmenter,
        first,
        total=len(ranked),
        labelled=len(labelled),
        diversity=diversity,
        typed=command("rank", sys.argv[1:]),
    )
    html.write(page, tables[1])
    width = max(len(str(image.path)) for image in ranked[:PRINTED])
    print(f"{'':>4}  {'image':<{width}}  score  uncertainty  novelty")
    for place, image in enumerate(ranked[:PRINTED], start=1):
        numbers = f"{image.score:5.2f}  {image.uncertainty:11.2f}  {image.novelty:7.2f}"
        print(f"{place:>4}  {image.path!s:<{width}}  {numbers}")
    print(f"\nranking: {tables[0]} ({len(ranked)} images)\npage:    {tables[1]} (the first {len(first)})")
    if arguments.copy is not None:
        copy_files([image.path for image in first], arguments.copy)
        print(f"copies:  {arguments.copy} (the first {len(first)})")
    if failed:
        raise UsageError(f"{failed} files could not be read, see the messages above - repair or leave them out")


def copy_files(paths: Sequence[Path], folder: Path) -> None:
    """Copy files to a folder with their names, in subfolders if they are from several folders.

    Raises:
        UsageError: The folder cannot be created.
    """
    from segdeconv.system.files import create_folder

    absolute = [Path(os.path.abspath(path)) for path in paths]
    common = Path(os.path.commonpath([path.parent for path in absolute]))
    for path in absolute:
        target = folder / path.relative_to(common)
        create_folder(target.parent, "--copy")
        shutil.copy2(path, target)


def write_suspects(
    checkpoint: Checkpoint, settings: PredictionSettings, arguments: argparse.Namespace, out: Path
) -> None:
    """Find suspect regions and write suspects.csv and suspects.html.

    Raises:
        UsageError: An argument is invalid, or the data set cannot be read.
    """
    if arguments.min_area is not None and arguments.min_area < 1:
        raise UsageError(f"--min-area={arguments.min_area} is not a number of pixels - give 1 or more")

    from segdeconv.analysis import ranking_page
    from segdeconv.analysis.suspects import find_suspects
    from segdeconv.drawing import html
    from segdeconv.evaluation.evaluate import restore_dataset
    from segdeconv.inference.segmenter import Segmenter
    from segdeconv.system.files import replace_text
    from segdeconv.system.own_files import OwnFiles

    dataset = restore_dataset(checkpoint, arguments.split or "val")
    tables = out / "suspects.csv", out / "suspects.html"
    own_files = OwnFiles(out, "--out")
    own_files.add(tables, inputs=dataset.files)
    segmenter = Segmenter(checkpoint, settings)
    own_files.record()
    suspects = find_suspects(segmenter, dataset, min_area=arguments.min_area)
    segmenter.resized.warn()
    replace_text(tables[0], ranking_page.suspects_table(suspects, dataset))
    page = ranking_page.build_suspects(
        segmenter, dataset, suspects, first=arguments.first, typed=command("rank", sys.argv[1:])
    )
    html.write(page, tables[1])
    print(ranking_page.suspects_summary(suspects, dataset, lines=PRINTED))
    print(f"\nsuspects: {tables[0]} ({len(suspects)} regions)\npage:     {tables[1]}")
