"""Label images and videos with a checkpoint.

    python scripts/predict.py CHECKPOINT PATH [PATH ...] [--out DIR] [key=value ...]

PATH is a picture, a folder of pictures (with its sub-folders), a pattern such as 'photos/*.jpg', a list (.txt, one path
a line; - for stdin) or a video. For each image DIR/<name>.png is an indexed palette mask of exactly the image's size
and DIR/<name>_overlay.png shows it on the image with a legend; a video becomes DIR/<name>_overlay.mp4.
DIR/statistics.csv has the share of each class in each image.

Images of any size: what needs more memory than --memory is seen in tiles, with the same result. The same command again
goes on where it was interrupted. --samples N predicts the mean of N passes with dropout, and
DIR/<name>_uncertainty.png shows where they disagree. --regions N sees each image through its N likeliest object
proposals, --ensemble CHECKPOINT adds a second network and --crf refines the outlines. A file that cannot be read gets
one line and the rest goes on; the exit code is then 2.
"""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from segdeconv.cli.command import ArgumentParser, run_command
from segdeconv.cli.options import add_looks, add_scales, looks_more, parted, scales_of
from segdeconv.errors import UsageError

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# What does not change what is written; all other arguments are part of what a folder was made by.
NOT_MADE_BY = {"checkpoint", "paths", "out", "overwrite", "memory", "tile", "verify_tiling", "trust"}


def main() -> int:
    """Parse, restore, predict each image."""
    parser = ArgumentParser("predict.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "checkpoint", help="a .ckpt that train.py wrote, a .safetensors with its card, or the name of a shipped network"
    )
    add("paths", nargs="+", metavar="PATH", help="pictures, folders, patterns, lists, videos, -; then key=value")
    add("--out", type=Path, default=Path("predictions"), help="folder (default: predictions)")
    add("--samples", type=int, default=0, help="average over this many passes with dropout (default 0)")
    add("--flip", action="store_true", help="average over each image and its mirror image")
    add_scales(parser)
    add("--precision", default="auto", help="auto (default), 32-true, bf16-mixed or 16-mixed")
    add("--trust", action="append", default=[], help="a class of your own that the recipe names")
    add("--overwrite", action="store_true", help="begin anew where DIR holds predictions made by something else")
    group = parser.add_argument_group("what is written beside masks and overlays")
    add = group.add_argument
    add("--no-overlay", action="store_true", help="masks alone")
    add("--probabilities", action="store_true", help="DIR/<name>.npy: (classes, H, W) float16")
    add("--uncertainty", action="store_true", help="DIR/<name>_uncertainty.png: entropy, or variance with --samples")
    add("--class-masks", action="store_true", help="DIR/<name>_<class>.png: 255 where the class is")
    add("--polygons", action="store_true", help="DIR/regions.json: regions as polygons, in COCO's format")
    add("--min-area", type=int, default=1, metavar="PIXELS", help="leave out smaller regions (default: 1)")
    add("--frames", action="store_true", help="DIR/<name>/000001.png ...: the mask of each frame of a video")
    group = parser.add_argument_group("large images")
    add = group.add_argument
    add("--memory", metavar="SIZE", help="what the network's maps may take, such as 500M (default: 1G to 4G)")
    add("--tile", default="auto", metavar="N|HxW", help="the largest tile, overlap included, in place of --memory")
    add("--verify-tiling", action="store_true", help="compare tiles with the whole image, and write nothing")
    add_looks(parser)
    arguments = parser.parse_intermixed_args()
    overrides, crf_keys = parted(path for path in arguments.paths if is_override(path))
    tile, memory, scales = tile_size(arguments.tile), byte_count(arguments.memory), scales_of(arguments)
    if arguments.min_area != 1 and not arguments.polygons:
        raise UsageError("--min-area does nothing without --polygons - add it")
    looking = looks_more(arguments, crf_keys)
    if looking and (tile or len(scales) > 1 or arguments.verify_tiling):
        raise UsageError(
            "--regions, --ensemble and --crf see images in a way of their own - leave out --tile, --scales"
        )
    paths = [path for path in arguments.paths if not is_override(path)]

    from tqdm import tqdm

    from segdeconv.checkpoints import checkpoint
    from segdeconv.inference.batch import Labelling, Outputs, write_tables
    from segdeconv.inference.inputs import find_images
    from segdeconv.inference.predictors import predictor_of
    from segdeconv.inference.progress_log import Journal
    from segdeconv.inference.segmenter import Segmenter
    from segdeconv.system.devices import best_device

    def told(said: str) -> None:
        tqdm.write(said, file=sys.stdout)

    read = checkpoint.read(arguments.checkpoint, trust=arguments.trust, overrides=overrides)
    outputs = Outputs(
        arguments.out,
        read.classes,
        overlay=not arguments.no_overlay,
        probabilities=arguments.probabilities,
        uncertainty=arguments.uncertainty or arguments.samples > 0,
        class_masks=arguments.class_masks,
        polygons=arguments.polygons,
        least_area=arguments.min_area,
        frames=arguments.frames,
    )
    images = find_images(paths, arguments.out, outputs.endings())
    device = best_device()
    segmenter = Segmenter(
        read,
        device=device,
        precision="32-true" if arguments.verify_tiling else arguments.precision,
        flip=arguments.flip,
        scales=scales,
        samples=arguments.samples,
        memory=memory,
        tile=tile,
        look=predictor_of(read, read.model(), arguments, crf_keys, device) if looking else None,
        told=told,
    )
    if arguments.verify_tiling:
        return verify(segmenter, images)
    with closing(Journal(arguments.out, made_by(arguments, read), overwrite=arguments.overwrite)) as journal:
        labelling = Labelling(segmenter, outputs, journal, told)
        done = sum(journal.has(name, path) for name, path in images.items())
        if done:
            print(f"{done} of {len(images)} were done before and are left as they are")
        with tqdm(total=len(images), initial=done, unit="image", disable=None) as bar:
            for _ in labelling.run(images):
                bar.update()
        tables = write_tables(journal, outputs)
    print(
        f"{len(images) - labelling.failed} masks in {arguments.out}, with {' and '.join(path.name for path in tables)}"
    )
    if labelling.failed:
        raise UsageError(
            f"{labelling.failed} of {len(images)} files could not be read, named above - mend or leave them out"
        )
    return 0


def made_by(arguments: argparse.Namespace, read: Any) -> dict[str, Any]:
    """What decides the content of every output: another one would write others under the same names."""
    from segdeconv.checkpoints import cards

    settings = {key: value for key, value in vars(arguments).items() if key not in NOT_MADE_BY}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    if arguments.ensemble:
        settings["ensemble"] = cards.digest(cards.located(Path(arguments.ensemble)))
    keys = sorted(path for path in arguments.paths if is_override(path))
    return {"checkpoint": read.sha256, **settings, "keys": keys}


def verify(segmenter: Any, images: dict[str, Path]) -> int:
    """Print how near the scores by tiles are to those of the whole; exit code 2 where they are not the same."""
    from segdeconv.inference.tiling_check import compare_tiling

    wrong = 0
    for path in images.values():
        found = compare_tiling(segmenter, path)
        print(found.sentence)
        wrong += not found.same
    if wrong:
        raise UsageError(f"{wrong} of {len(images)} images come out otherwise in tiles - give them more --memory")
    return 0


def tile_size(text: str) -> tuple[int, int] | None:
    """(H, W) of `N`, `HxW` or `auto`."""
    if text == "auto":
        return None
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found or not all(int(side) for side in found.groups(text) if side):
        raise UsageError(f"--tile={text} is no size - write for example 1024, 768x1024 or auto")
    return int(found[1]), int(found[2] or found[1])


def byte_count(text: str | None) -> int | None:
    """Bytes of `500M`, `2G`, `2GB`, `1.5GiB`."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)(?:i?B)?", text, re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise UsageError(f"--memory={text} is no amount of memory - write for example 500M or 2G")
    return int(float(found[1]) * UNITS[found[2].upper()])


def is_override(argument: str) -> bool:
    """A `key=value`, and not a path that happens to have an equals sign in it."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and key.replace(".", "").replace("_", "").isalnum() and not Path(argument).exists()


if __name__ == "__main__":
    run_command(main)
