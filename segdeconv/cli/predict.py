"""The command `predict`, which writes a folder of masks."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdeconv.cli.command import ArgumentParser
from segdeconv.cli.options import (
    add_checkpoint,
    add_distribution_options,
    add_labels_option,
    add_outlines_option,
    add_prediction_options,
    add_window_option,
    calibrated,
    display_window,
    is_override,
    prediction_settings,
    ray_settings,
    require_folder_of_parts,
    shard,
    split_overrides,
)
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import Interrupted, UsageError, command, warn

if TYPE_CHECKING:
    from segdeconv.checkpoints.checkpoint import Checkpoint
    from segdeconv.inference.progress_log import ProgressLog
    from segdeconv.inference.segmenter import Segmenter

SKIPPED = "skipped: "  # before the message about a file that cannot be read
POLYGON_FORMATS = ("coco", "geojson", "gpkg")
KIND = "predict"  # in the summary of a part
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# Arguments that do not affect the outputs; all others are part of the provenance of a folder of predictions.
NOT_RECORDED = {
    "checkpoint", "paths", "out", "overwrite", "memory", "tile", "verify_tiling", "trust", "submission", "parquet",
    "max_loss", "shard", "engine", "ray_address", "workers",
}  # fmt: skip


def parse(description: str) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser("predict.py", description=description)
    add_checkpoint(parser)
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="images, folders, patterns, lists, videos, -; then key=value")
    text = "folder, or its address in an object storage, s3://, gs:// or az:// (default: predictions)"
    add("--out", default="predictions", help=text)
    add("--overwrite", action="store_true", help="replace predictions in DIR that were made in another way")
    text = "georeferenced images get GeoTIFFs: .tif in place of .png, _probabilities.tif in place of .npy (docs/geo.md)"
    group = parser.add_argument_group("outputs besides masks and overlays", text)
    add = group.add_argument
    add("--no-overlay", action="store_true", help="write no overlays")
    add_outlines_option(group)
    add_window_option(group)
    add("--probabilities", action="store_true", help="DIR/<name>.npy: (classes, H, W) float16")
    add("--uncertainty", action="store_true", help="DIR/<name>_uncertainty.png: entropy, or variance with --samples")
    add("--class-masks", action="store_true", help="DIR/<name>_<class>.png: 255 where the class is")
    text = "DIR/regions.json: regions as polygons (COCO), and those of georeferenced images as GeoJSON"
    add("--polygons", action="store_const", const="auto", default=False, help=text)
    text = "coco (regions.json), geojson and gpkg (DIR/<name>_regions.geojson, .gpkg: map coordinates)"
    add("--polygon-format", dest="polygons", metavar="F,F", help=text)
    text = "polygons of the background class too, which overlays and polygons leave out"
    add("--keep-background", action="store_true", help=text)
    add("--parquet", action="store_true", help="DIR/statistics.parquet beside statistics.csv")
    add_labels_option(group, "DIR/<name>.png")
    text = "DIR/SERVER.zip or .tgz for cityscapes, ade20k, voc, kitti or mapillary, checked against the server's rules"
    add("--submission", metavar="SERVER", help=text)
    add("--frames", action="store_true", help="DIR/<name>/000001.png ...: the mask of each frame of a video")
    add = parser.add_argument_group("large images").add_argument
    add("--memory", metavar="SIZE", help="limit for feature maps, such as 500M (default: up to 4G)")
    add("--tile", default="auto", metavar="N|HxW", help="the largest tile, overlap included, instead of --memory")
    add("--verify-tiling", action="store_true", help="compare tiles with the whole image, and write nothing")
    add_prediction_options(parser)
    add_distribution_options(parser)
    return parser.parse_intermixed_args()


def run(description: str) -> None:
    """Run the command: predict all images and videos and write their outputs."""
    arguments = parse(description)
    overrides, crf_keys = split_overrides(path for path in arguments.paths if is_override(path))
    paths = [path for path in arguments.paths if not is_override(path)]
    if arguments.verify_tiling and (arguments.regions or arguments.ensemble or arguments.crf):
        raise UsageError("--verify-tiling checks the tiles of one network - leave out --regions, --ensemble and --crf")
    for option in ("outlines", "window"):
        if getattr(arguments, option) and arguments.no_overlay:
            raise UsageError(f"--{option} has no effect with --no-overlay - leave out one of them")
    window = display_window(arguments.window)
    if arguments.submission and arguments.labels != "index":
        raise UsageError("--submission writes the labels of the server by itself - leave out --labels")
    part, ray = shard(arguments), ray_settings(arguments)
    for option in ("submission", "parquet"):
        if part and getattr(arguments, option):
            way_out = (
                "leave it out, and give it to merge" if option == "parquet" else "run the command again after merge"
            )
            raise UsageError(f"--{option} needs the images of all parts, and --shard predicts one - {way_out}")
    if arguments.verify_tiling and (part or ray):
        raise UsageError("--verify-tiling runs in this process - leave out --shard and --engine")
    if arguments.keep_background and not arguments.polygons:
        raise UsageError("--keep-background has no effect without --polygons - add it")
    formats = polygon_formats(arguments.polygons)
    settings = prediction_settings(
        arguments,
        crf_keys,
        memory=byte_count(arguments.memory),
        tile=tile_size(arguments.tile),
        precision="32-true" if arguments.verify_tiling else None,
    )

    from tqdm import tqdm

    from segdeconv.data.files.geo import warn_without_georeference
    from segdeconv.drawing import draw
    from segdeconv.inference import distributed, parts
    from segdeconv.inference.batch import BatchPrediction
    from segdeconv.inference.distributed_batch import DistributedPrediction
    from segdeconv.inference.inputs import find_images, is_video
    from segdeconv.inference.output_folder import SECONDS_BETWEEN_COPIES, output_folder
    from segdeconv.inference.outputs import Outputs
    from segdeconv.inference.progress_log import INPUTS, ProgressLog, has_progress_log
    from segdeconv.inference.segmenter import Segmenter
    from segdeconv.inference.submission import SubmissionWriter
    from segdeconv.inference.tables import require_pyarrow, write_tables
    from segdeconv.inference.vectors import require_pyogrio
    from segdeconv.inference.video_writer import WITHOUT_FFMPEG, find_ffmpeg
    from segdeconv.system.output import reader_ended

    if "gpkg" in formats:
        require_pyogrio()
    if arguments.parquet:
        require_pyarrow()
    if ray:
        distributed.require_ray()

    require_storable(arguments)
    out = output_folder(arguments.out)
    if not arguments.verify_tiling:
        out.fetch_records()
    skipped: list[str] = []

    def report(message: str) -> None:
        tqdm.write(message, file=sys.stdout)
        if message.startswith(SKIPPED):
            skipped.append(message.removeprefix(SKIPPED))

    checkpoint = read_checkpoint(arguments.checkpoint, arguments.trust, overrides)
    outputs = Outputs(
        out,
        checkpoint.classes,
        overlay=not arguments.no_overlay,
        outlines=arguments.outlines,
        window=window,
        probabilities=arguments.probabilities,
        uncertainty=arguments.uncertainty or arguments.samples > 0,
        class_masks=arguments.class_masks,
        polygons=formats,
        keep_background=arguments.keep_background,
        parquet=arguments.parquet,
        frames=arguments.frames,
        labels=arguments.labels,
    )
    if window:
        draw.require_window(window, checkpoint.preprocessing.bits)
    if arguments.labels == "dataset":
        draw.label_table(checkpoint.classes)  # raises an error before the first image rather than after it
    submission = None
    if arguments.submission:
        submission = SubmissionWriter(arguments.submission, checkpoint.classes, out.path)
    missing: list[str] = []
    images = find_images(paths, out.path, outputs.endings(), missing=missing, address=out)
    if submission:
        submission.check_inputs(images)
    inputs = parts.fingerprint(f"{name} {path.as_posix()}" for name, path in images.items()) if part else None
    if part:
        images = dict(part.select(list(images.items())))
    settings = calibrated(arguments, checkpoint, settings)
    if outputs.overlay and not find_ffmpeg() and any(is_video(path) for path in images.values()):
        warn(WITHOUT_FFMPEG)
    out.require_separate(images.values(), "--out")
    own_files = []
    if not arguments.verify_tiling:
        warn_without_georeference(images.values())
        files, frame_folders = outputs.planned(images, tables=not part)
        files += [submission.path] if submission else []
        resumed = has_progress_log(out.path)
        if part and resumed:
            raise UsageError(f"{out} has a prediction in one part - leave out --shard, or choose another --out")
        if not part and parts.has_parts(out.path):
            raise UsageError(
                f"{out} has parts of a prediction - run {command('merge', [str(out)])} first, or choose another --out"
            )
        owner = f"-{part.index}-of-{part.count}" if part else ""
        own_files.append(out.own_files("--out", trusted=resumed, owner=owner))
        own_files[-1].add(files, frame_folders=frame_folders, inputs=images.values())
        if arguments.save_regions:
            regions = output_folder(str(arguments.save_regions))
            own_files.append(regions.own_files("--save-regions", trusted=resumed, owner=owner))
            own_files[-1].add(arguments.save_regions / f"{name}.npz" for name in images)
    segmenter = Segmenter(checkpoint, settings, report=report)
    if arguments.verify_tiling:
        verify(segmenter, images, missing)
        return
    if not ray and (note := segmenter.precision_note()):
        print(note)
    recorded = provenance(arguments, checkpoint, settings.second)
    folder = None
    if part:
        recorded |= {INPUTS: inputs}
        folder = part.folder(out.path)
        part.begin(out.path)
    with ExitStack() as stack:
        workers = stack.enter_context(distributed.cluster(ray)) if ray else 0
        log = ProgressLog(out, recorded, overwrite=arguments.overwrite, folder=folder)
        progress_log = stack.enter_context(closing(log))
        progress_log.require_names(images)
        for each in own_files:
            each.record()
        out.copy_records()
        stack.callback(out.copy_records)  # however the prediction ends
        if submission:
            submission.path.unlink(missing_ok=True)  # that of an earlier run, whose masks may have been others
        for message in missing:
            report(f"{SKIPPED}{message}")
        batch: BatchPrediction | DistributedPrediction
        if ray:
            batch = DistributedPrediction(segmenter, outputs, progress_log, report, workers)
        else:
            batch = BatchPrediction(segmenter, outputs, progress_log, report)
        done = sum(batch.is_done(name, path) for name, path in images.items())
        if done:
            print(f"{done} of {len(images)} {'is' if done == 1 else 'are'} already done and skipped")
        with tqdm(total=len(images), initial=done, unit="image", disable=None) as bar:
            for _ in batch.run(images):
                bar.update()
                out.copy_records(interval=SECONDS_BETWEEN_COPIES)
                if reader_ended():
                    break
        if not reader_ended():
            segmenter.resized.warn()
            if count := len(batch.without_crs):
                warn(
                    f"{count} of {len(images)} images {'has' if count == 1 else 'have'} no coordinate reference system "
                    f"that can be read, such as {batch.without_crs[0]}: polygons are in pixels - if they are maps, add "
                    "it, for example with gdal_edit.py -a_srs EPSG:25832"
                )
            if part:
                tables: list[str] = outputs.tables()
                content = {"kind": KIND, "tables": tables, "classes": list(checkpoint.classes.names)}
                part.finish(out.path, {**content, "images": len(images), "skipped": skipped, "failed": batch.failed})
                merge = command("merge", [str(out)])
                print(f"{summary(images, progress_log)} of part {part} in {out}; after all parts: {merge}")
            else:
                written = write_tables(progress_log, outputs.tables(), checkpoint.classes.names)
                out.deliver(written)
                print(f"{summary(images, progress_log)} in {out}, with {listed(written)}")
            if submission and (batch.failed or missing):
                print(f"no archive for {submission.submission.title}, since masks are missing")
            elif submission:
                entries = [
                    (path, outputs.mask_path(name, path), progress_log.entries[name]) for name, path in images.items()
                ]
                submission.write({path: (mask, tuple(entry["size"])) for path, mask, entry in entries})
                print(f"{len(images)} masks for {submission.submission.title} in {submission.path}")
            background = checkpoint.classes.background
            if formats and background is not None and not arguments.keep_background:
                name = checkpoint.classes.names[background]
                print(f"polygons leave out the background, class '{name}'; --keep-background adds it")
    stopped = "stopped because the reader of the output has ended" if reader_ended() else ""
    require_readable(batch.failed + len(missing), len(images) + len(missing), stopped)
    if stopped:
        raise Interrupted(f"{stopped} - run the same command again", 141)


def listed(paths: Sequence[Path]) -> str:
    """Return the names of files, such as `a, b and c`."""
    names = " and ".join(path.name for path in paths[-2:])
    return ", ".join([*(path.name for path in paths[:-2]), names])


def require_storable(arguments: argparse.Namespace) -> None:
    """Check that no option needs the output files in a folder, if --out is in an object storage.

    Raises:
        UsageError: An option does.
    """
    from segdeconv.data.files.object_folder import is_object_storage

    if not is_object_storage(arguments.out):
        return
    require_folder_of_parts(arguments, "out")
    way_out = "give --out a folder, and copy it to the storage afterwards"
    if arguments.submission:
        raise UsageError(f"--submission packs files of a folder, and --out={arguments.out} is an address - {way_out}")
    if arguments.polygons and not {"geojson", "gpkg"}.issuperset(polygon_formats(arguments.polygons)):
        raise UsageError(
            f"--polygons merges files of a folder into regions.json, and --out={arguments.out} is an address - "
            f"{way_out}, or give --polygon-format geojson"
        )


def require_readable(failed: int, total: int, stopped: str = "") -> None:
    """Raise UsageError if files could not be read; `stopped` says why the command ended before the last one."""
    if failed:
        raise UsageError(
            f"{stopped}{stopped and ', and '}{failed} of {total} files could not be read, see the messages above - "
            "repair them or leave them out"
        )


def summary(images: Mapping[str, Path], progress_log: ProgressLog) -> str:
    """Return the number of masks and of frames of videos that are done, such as `12 masks and 40 frames of 1 video`."""
    return counted([progress_log.entries[name] for name, path in images.items() if progress_log.has(name, path)])


def counted(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the number of masks and of frames of videos of entries of a progress log, as in `summary`."""
    frames = [entry["frames"] for entry in entries if "frames" in entry]
    masks = len(entries) - len(frames)
    parts = [f"{masks} mask{'s' if masks != 1 else ''}"] if masks or not frames else []
    if frames:
        parts.append(
            f"{sum(frames)} frame{'s' if sum(frames) != 1 else ''} of {len(frames)} video{'s' if frames[1:] else ''}"
        )
    return " and ".join(parts)


def provenance(arguments: argparse.Namespace, checkpoint: Checkpoint, second: Checkpoint | None) -> dict[str, Any]:
    """Return the checkpoint and settings that determine the outputs, as recorded in the progress log."""
    settings = {key: value for key, value in vars(arguments).items() if key not in NOT_RECORDED}
    for name, default in (("labels", "index"), ("outlines", False), ("window", None), ("keep_background", False)):
        if settings[name] == default:
            del settings[name]  # not recorded by earlier versions, which had no other values
    if settings["min_area"] > 1:
        settings["min_area_of"] = "masks"  # earlier versions only left regions out of the polygons
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    if second is not None:
        settings["ensemble"] = second.sha256
    keys = sorted(path for path in arguments.paths if is_override(path))
    return {"checkpoint": checkpoint.sha256, **settings, "keys": keys}


def verify(segmenter: Segmenter, images: dict[str, Path], missing: list[str]) -> None:
    """Print the agreement of prediction in tiles with prediction of the whole image.

    Raises:
        UsageError: A line of a list names no file, or the predictions of an image differ.
    """
    if missing:
        raise UsageError(missing[0])
    from segdeconv.inference.tiling_check import compare_tiling

    wrong = 0
    for path in images.values():
        comparison = compare_tiling(segmenter, path)
        print(comparison.summary)
        wrong += not comparison.same
    if wrong:
        raise UsageError(
            f"{wrong} of {len(images)} images have other predictions in tiles - give more --memory or a larger --tile"
        )


def polygon_formats(text: str | bool) -> tuple[str, ...]:
    """Parse a list of formats such as `geojson,gpkg`.

    Returns:
        The formats of `Outputs.polygons`; none for False.

    Raises:
        UsageError: A format is unknown.
    """
    formats = tuple(dict.fromkeys(text.split(","))) if isinstance(text, str) else ()
    if unknown := [name for name in formats if name not in POLYGON_FORMATS] if text != "auto" else []:
        raise UsageError(
            f"--polygon-format={text}: '{unknown[0]}' is not a format - write some of {','.join(POLYGON_FORMATS)}"
        )
    return formats


def tile_size(text: str) -> tuple[int, int] | None:
    """Parse `N`, `HxW` or `auto`.

    Returns:
        (H, W); None for `auto`.

    Raises:
        UsageError: The text is none of these.
    """
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match or not all(int(side) for side in match.groups(text) if side):
        raise UsageError(f"--tile={text} is not a size - write for example 1024, 768x1024 or auto")
    return int(match[1]), int(match[2] or match[1])


def byte_count(text: str | None) -> int | None:
    """Parse an amount of memory such as `500M`, `2G`, `2GB` or `1.5GiB` into bytes.

    Raises:
        UsageError: The text is not an amount of memory.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)(?:i?B)?", text, re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise UsageError(f"--memory={text} is not an amount of memory - write for example 500M or 2G")
    return int(float(match[1]) * UNITS[match[2].upper()])
