"""Write the images and masks of a data set in the format of a labelling tool, masks from annotations, or shards.

    python scripts/convert.py [DIR] --to FORMAT --out DIR [--simplify PIXELS] [--images copy|link|none] [key=value ...]
    python scripts/convert.py [DIR] --shards OUT [--shard-size MIB] [key=value ...]

DIR stands for dataset=folder dataset.root=DIR: images with masks, or with annotations of COCO, labelme, CVAT, YOLO,
Label Studio, Supervisely or VGG Image Annotator. FORMAT is masks, coco, labelme, cvat, yolo, label_studio, supervisely
or via. All splits are written; `dataset=folder dataset.root=OUT` reads each of the formats. The outlines of regions
follow the edges of pixels, so that reading them gives the same masks; --simplify removes corners, for editing, by
moving outlines by up to PIXELS.

--shards packs the images as they are stored and the masks into tar files of about 64 MiB with an index, for data sets
of many files, and for object storages: `dataset=shards dataset.root=OUT` reads the folder, or its copy at s3://, gs://
or https://.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from segdeconv.cli.command import run_command
from segdeconv.cli.options import is_override, pop_option, pop_path
from segdeconv.cli.own_code import compose
from segdeconv.errors import UsageError, command, did_you_mean, warn

if TYPE_CHECKING:
    from segdeconv.data.dataset import SegmentationDataset


def main() -> None:
    """Compose the config, read the data set and write it."""
    words = sys.argv[1:]
    shards, shard_size = pop_path(words, "--shards"), pop_option(words, "--shard-size")
    if shards is not None:
        options = [word.partition("=")[0] for word in words]
        if given := [option for option in options if option in ("--to", "--out", "--simplify", "--images")]:
            raise UsageError(f"{given[0]} has no effect on shards - leave it or --shards out")
        mebibytes = 64.0 if shard_size is None else _number(shard_size, "--shard-size", "MiB", 1 << 20)
        _write_shards(words, shards, mebibytes)
        return
    if shard_size is not None:
        raise UsageError("--shard-size has no effect without --shards - add --shards DIR, or leave it out")
    _write_annotations(words)


def _write_annotations(words: list[str]) -> None:
    from segdeconv.data.annotations.conversion import FORMATS, IMAGES, convert

    kind, out = pop_option(words, "--to"), pop_path(words, "--out")
    simplify, images = pop_option(words, "--simplify") or "0", pop_option(words, "--images") or "copy"
    if kind is None:
        raise UsageError(f"--to FORMAT is missing - give one of {', '.join(FORMATS)}")
    if kind not in FORMATS:
        raise UsageError(f"--to {kind} is not a format - {did_you_mean(kind, FORMATS)}")
    if not out:
        raise UsageError("--out DIR is missing - give the folder to write, which must not exist")
    if images not in IMAGES:
        raise UsageError(f"--images {images} is unknown - write {', '.join(IMAGES)}")
    splits, missing = _read(words)
    limit = _number(simplify, "--simplify", "pixels", 1000)
    written = convert(splits, Path(os.path.expanduser(out)), kind, simplify=limit, images=images)
    shapes = f", {sum(len(image.regions) for image in written)} regions" if kind != "masks" else ""
    if missing:
        warn(f"test: not written, since {missing}")
    counts = ", ".join(f"{split.split} {len(split)}" for split in splits)
    print(f"{out}: {len(written)} images ({counts}){shapes}")
    unlabelled = "" if kind == "masks" or "background" in splits[0].classes.names else "dataset.unlabelled=ignore"
    print(
        "train with: " + command("train", ["dataset=folder", f"dataset.root={out}", *([unlabelled] * bool(unlabelled))])
    )


def _write_shards(words: list[str], out: str, mebibytes: float) -> None:
    from segdeconv.data.shard_writer import write_shards

    if not out:
        raise UsageError("--shards has no folder - give the folder to write, which must not exist")
    splits, missing = _read(words)
    written = write_shards(splits, Path(os.path.expanduser(out)), shard_size=int(mebibytes * 2**20))
    if missing:
        warn(f"test: not written, since {missing}")
    for split, shards in zip(splits, written, strict=True):
        size = sum(shard.size for shard in shards) / 2**20
        number = f"{len(shards)} shard" + ("s" if shards[1:] else "")
        print(f"{split.split}: {len(split)} images in {number}, {size:.1f} MiB")
    print("train with: " + command("train", ["dataset=shards", f"dataset.root={out}"]))


def _read(words: list[str]) -> tuple[list[SegmentationDataset], str]:
    """Return the splits of the data set of a command line, and why test is missing although it should be there."""
    from segdeconv.data.module import build_splits, check_dataset

    folders = [word for word in words if not is_override(word) and not word.startswith("-")]
    if folders[1:]:
        raise UsageError(f"{' and '.join(folders)} are two data sets - convert one after the other")
    if folders:
        words = [word for word in words if word not in folders]
        words = ["dataset=folder", f"dataset.root={shlex.quote(folders[0])}", *words]
    config, _ = compose(words)
    splits, missing = build_splits(check_dataset(config["dataset"]))
    for note in splits[0].notes:
        print(note)
    for line in splits[0].unwrapped.warnings:
        warn(line)
    return splits, missing


def _number(text: str, option: str, unit: str, limit: int) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < limit:
        raise UsageError(f"{option} {text} is not a number of {unit} - write for example {option} 1.5")
    return number


if __name__ == "__main__":
    run_command(main, __doc__)
