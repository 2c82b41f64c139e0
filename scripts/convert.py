"""Write the images and masks of a data set in the format of a labelling tool, or masks from annotations.

    python scripts/convert.py [DIR] --to FORMAT --out DIR [--simplify PIXELS] [--images copy|link|none] [key=value ...]

DIR stands for dataset=folder dataset.root=DIR: images with masks, or with annotations of COCO, labelme, CVAT, YOLO,
Label Studio, Supervisely or VGG Image Annotator. FORMAT is masks, coco, labelme, cvat, yolo, label_studio, supervisely
or via. All splits are written; `dataset=folder dataset.root=OUT` reads each of the formats. The outlines of regions
follow the edges of pixels, so that reading them gives the same masks; --simplify removes corners, for editing, by
moving outlines by up to PIXELS.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from segdeconv.cli.command import run_command
from segdeconv.cli.options import is_override, pop_option
from segdeconv.cli.own_code import compose
from segdeconv.errors import UsageError, command, did_you_mean, warn


def main() -> None:
    """Compose the config, read the data set and write it."""
    words = sys.argv[1:]
    from segdeconv.data.annotations.conversion import FORMATS, IMAGES, convert
    from segdeconv.data.module import build_splits, check_dataset

    kind, out = pop_option(words, "--to"), pop_option(words, "--out")
    simplify, images = pop_option(words, "--simplify") or "0", pop_option(words, "--images") or "copy"
    if kind is None:
        raise UsageError(f"--to FORMAT is missing - give one of {', '.join(FORMATS)}")
    if kind not in FORMATS:
        raise UsageError(f"--to {kind} is not a format - {did_you_mean(kind, FORMATS)}")
    if not out:
        raise UsageError("--out DIR is missing - give the folder to write, which must not exist")
    if images not in IMAGES:
        raise UsageError(f"--images {images} is unknown - write {', '.join(IMAGES)}")
    folders = [word for word in words if not is_override(word) and not word.startswith("-")]
    if folders[1:]:
        raise UsageError(f"{' and '.join(folders)} are two data sets - convert one after the other")
    if folders:
        words = [word for word in words if word not in folders]
        words = ["dataset=folder", f"dataset.root={shlex.quote(folders[0])}", *words]
    config, _ = compose(words)
    node = check_dataset(config["dataset"])
    splits, missing = build_splits(node)
    for note in splits[0].notes:
        print(note)
    for line in splits[0].unwrapped.warnings:
        warn(line)
    written = convert(splits, Path(os.path.expanduser(out)), kind, simplify=_pixels(simplify), images=images)
    shapes = f", {sum(len(image.regions) for image in written)} regions" if kind != "masks" else ""
    if missing:
        warn(f"test: not written, since {missing}")
    counts = ", ".join(f"{split.split} {len(split)}" for split in splits)
    print(f"{out}: {len(written)} images ({counts}){shapes}")
    unlabelled = "" if kind == "masks" or "background" in splits[0].classes.names else "dataset.unlabelled=ignore"
    print(
        "train with: " + command("train", ["dataset=folder", f"dataset.root={out}", *([unlabelled] * bool(unlabelled))])
    )


def _pixels(text: str) -> float:
    try:
        pixels = float(text)
    except ValueError:
        pixels = -1.0
    if not 0 <= pixels < 1000:
        raise UsageError(f"--simplify {text} is not a number of pixels - write for example --simplify 1.5")
    return pixels


if __name__ == "__main__":
    run_command(main, __doc__)
