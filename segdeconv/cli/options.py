"""The options that several commands share. The module does not import torch, so that --help is fast."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdeconv.cli.command import SCHEME, local_path, require_local
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import UsageError

if TYPE_CHECKING:
    from segdeconv.checkpoints.checkpoint import Checkpoint
    from segdeconv.drawing.draw import Window
    from segdeconv.inference.crf import CRF
    from segdeconv.inference.distributed import RaySettings
    from segdeconv.inference.parts import Part
    from segdeconv.inference.predictors import PredictionSettings

CRF_KEYS = "crf."
REGION_DEFAULTS = {  # options that need --regions
    "proposals": "windows", "region_mode": "paper", "min_side": None, "with_whole": False, "save_regions": None,
}  # fmt: skip


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the argument CHECKPOINT, which `checkpoints.locate` resolves."""
    text = "a run folder, latest (the newest run), a .ckpt, a .safetensors with its card, a shipped network, or hf://OWNER/NAME"
    parser.add_argument("checkpoint", help=text)


def add_network_options(parser: argparse.ArgumentParser, *, int8: bool = False) -> None:
    """Add the options of every command that runs a checkpoint's network.

    Args:
        parser: The parser.
        int8: Whether the command can run networks in 8-bit integers.
    """
    add = parser.add_argument
    kinds = "auto (default), 32-true, bf16-mixed" + (", 16-mixed, or int8 on a CPU" if int8 else " or 16-mixed")
    add("--samples", type=int, default=0, help="average over this many passes with dropout (default 0)")
    add("--precision", default="auto", help=kinds)
    add("--trust", action="append", default=[], help="allow a class of your own that the config names")


def add_labels_option(parser: Any, files: str) -> None:
    """Add --labels, the values of the masks in `files`."""
    parser.add_argument(
        "--labels",
        choices=("index", "dataset"),
        default="index",
        help=f"values in {files}: class indices (default), or the labels or colours of the data set's own masks",
    )


def add_distribution_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of work that several machines share, which `shard` and `ray_settings` parse."""
    text = "docs/distributed.md; without these options, one process does all the work"
    add = parser.add_argument_group("several machines", text).add_argument
    add("--shard", metavar="K/N", help="the K-th of N parts, for N jobs that know nothing of each other; then merge")
    add("--engine", choices=("ray",), help="ray: workers of a Ray cluster share the images")
    add("--ray-address", metavar="HOST:PORT", help="of the cluster (default: start one on this machine)")
    add("--workers", type=int, metavar="N", help="Ray workers (default: one per GPU or, without GPUs, per core)")


def shard(arguments: argparse.Namespace) -> Part | None:
    """Return the part that --shard names.

    Raises:
        UsageError: The option is invalid, or combined with --engine.
    """
    from segdeconv.inference.parts import Part

    if arguments.shard is None:
        return None
    if arguments.engine:
        raise UsageError("--shard divides the work without --engine ray - leave out one of them")
    return Part.parse(arguments.shard)


def require_folder_of_parts(arguments: argparse.Namespace, option: str) -> None:
    """Check that an output folder is not in an object storage if jobs share it.

    Raises:
        UsageError: It is.
    """
    address = getattr(arguments, option)
    if arguments.shard and address is not None and SCHEME in str(address):
        raise UsageError(
            f"--shard: the parts share a folder, and --{option}={address} is an address - give --engine ray, or "
            f"--{option} a folder on a disk that all machines share"
        )


def ray_settings(arguments: argparse.Namespace) -> RaySettings | None:
    """Return the settings of --engine ray, None without it.

    Raises:
        UsageError: An option is invalid, or has no effect.
    """
    if not arguments.engine:
        for option in ("ray_address", "workers"):
            if getattr(arguments, option) is not None:
                raise UsageError(f"--{option.replace('_', '-')} has no effect without --engine ray - add it")
        return None
    if arguments.workers is not None and arguments.workers < 1:
        raise UsageError(f"--workers={arguments.workers} is not a number of workers - give 1 or more, or leave it out")
    from segdeconv.inference.distributed import RaySettings

    return RaySettings(arguments.ray_address, arguments.workers)


def add_outlines_option(parser: Any) -> None:
    """Add --outlines, the way in which overlays are drawn."""
    text = "overlays show the outlines of the regions instead of filling them"
    parser.add_argument("--outlines", action="store_true", help=text)


def add_window_option(parser: Any) -> None:
    """Add --window, the values that pictures show as black and as white."""
    text = "values shown as black and white (default for 16 bits: the 1st and 99th percentile of each image)"
    parser.add_argument("--window", metavar="LOW,HIGH", help=text)


def display_window(text: str | None) -> Window | None:
    """Parse the value of --window.

    Raises:
        UsageError: The text is not two increasing numbers.
    """
    from segdeconv.drawing.draw import Window

    if text is None:
        return None
    try:
        window = Window(*map(float, text.split(",")))
    except (TypeError, ValueError):
        window = Window(0, 0)
    if not -math.inf < window.low < window.high < math.inf:
        raise UsageError(f"--window={text} is not two increasing numbers - write for example --window=400,2000")
    return window


def add_prediction_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of prediction, from which `prediction_settings` builds the settings."""
    add_network_options(parser, int8=True)
    parser.add_argument("--flip", action="store_true", help="average over each image and its mirror image")
    text = "average over these multiples of the input size, such as 0.75,1,1.25"
    parser.add_argument("--scales", default="1", metavar="S,S", help=text)
    text = "merge smaller regions of the mask into those around them (default: 1, which keeps all)"
    parser.add_argument("--min-area", type=int, default=1, metavar="PIXELS", help=text)
    add_max_loss_option(parser)
    add = parser.add_argument_group("regions, ensemble and CRF").add_argument
    add("--regions", type=int, default=0, metavar="N", help="predict each image from its N best object proposals")
    add("--proposals", default="windows", help="windows (default), selective_search, edge_boxes, or a file of boxes")
    modes: dict[str, Any] = {"choices": ("paper", "mean", "released"), "default": "paper"}
    add(
        "--region-mode",
        **modes,
        help="rule where regions overlap: maximum (as in the paper, or as in its released code) or mean",
    )
    add("--min-side", type=int, metavar="PIXELS", help="skip smaller regions (default: 1; released: 112 of 224)")
    add("--with-whole", action="store_true", help="use the whole image as an additional region")
    add("--save-regions", type=local_path, metavar="DIR", help="folder for the boxes and raw scores of every region")
    add("--ensemble", metavar="CHECKPOINT", help="a second network with the same classes, which predicts whole images")
    modes = {"choices": ("paper", "released"), "default": "paper"}
    add("--ensemble-mode", **modes, help="mean of both softmaxes (paper), or softmax of the scores' product")
    add("--crf", action="store_true", help="refine the result by a CRF; its settings are keys such as crf.colour_std=3")


def prediction_settings(
    arguments: argparse.Namespace,
    crf_keys: list[str],
    *,
    memory: int | None = None,
    tile: tuple[int, int] | None = None,
    precision: str | None = None,
) -> PredictionSettings:
    """Build prediction settings from the options of `add_prediction_options`.

    Args:
        arguments: The parsed command line.
        crf_keys: Its `crf.NAME=VALUE` arguments.
        memory: See `PredictionSettings`.
        tile: See `PredictionSettings`.
        precision: Overrides --precision.

    Raises:
        UsageError: An option is invalid or would have no effect.
    """
    if crf_keys and not arguments.crf:
        raise UsageError(f"{crf_keys[0]} has no effect without --crf - add it")
    if not arguments.regions:
        for option, default in REGION_DEFAULTS.items():
            if getattr(arguments, option) != default:
                raise UsageError(f"--{option.replace('_', '-')} has no effect without --regions N - add it")
    if arguments.ensemble_mode != "paper" and not arguments.ensemble:
        raise UsageError("--ensemble-mode has no effect without --ensemble CHECKPOINT - add it")
    try:
        scales = [float(part) for part in arguments.scales.split(",")]
    except ValueError:
        raise UsageError(f"--scales={arguments.scales}: expected numbers - write for example 0.75,1,1.25") from None

    from segdeconv.inference.predictors import PredictionSettings, RegionSettings

    regions = None
    if arguments.regions:
        regions = RegionSettings(
            num=arguments.regions,
            proposals=arguments.proposals,
            mode=arguments.region_mode,
            min_side=arguments.min_side,
            with_whole=arguments.with_whole,
            save_to=arguments.save_regions,
        )
    return PredictionSettings(
        precision=precision or arguments.precision,
        flip=arguments.flip,
        scales=scales,
        samples=arguments.samples,
        memory=memory,
        tile=tile,
        regions=regions,
        second=read_checkpoint(arguments.ensemble, arguments.trust) if arguments.ensemble else None,
        ensemble_mode=arguments.ensemble_mode,
        crf=crf_settings(crf_keys) if arguments.crf else None,
        min_area=arguments.min_area,
    )


def refuse_int8(precision: str) -> None:
    """Raise UsageError for int8, in commands that need float maps."""
    if precision == "int8":
        raise UsageError("--precision int8 is for predict and evaluate, since this command needs float maps")


def add_max_loss_option(parser: Any) -> None:
    """Add --max-loss, the loss that is accepted for int8."""
    text = "largest loss of mIoU that is accepted for int8 (default: 0.5)"
    parser.add_argument("--max-loss", type=float, metavar="POINTS", help=text)


def calibrated(
    arguments: argparse.Namespace, checkpoint: Checkpoint, settings: PredictionSettings
) -> PredictionSettings:
    """Return settings with the ranges that --precision int8 needs; other settings are returned as they are.

    Raises:
        UsageError: int8 costs more than --max-loss, or --max-loss is set for another precision.
    """
    if settings.precision != "int8":
        if arguments.max_loss is not None:
            raise UsageError("--max-loss has no effect without --precision int8 - add it")
        return settings
    from segdeconv.evaluation.quantization import MAX_LOSS, calibrate

    max_loss = MAX_LOSS if arguments.max_loss is None else arguments.max_loss
    return dataclasses.replace(settings, ranges=calibrate(checkpoint, max_loss=max_loss).ranges)


def crf_settings(keys: Iterable[str]) -> CRF:
    """Parse `crf.NAME=VALUE` arguments.

    Examples:
        >>> crf_settings(["crf.iterations=5"]).iterations
        5
    """
    from segdeconv.config import check, override
    from segdeconv.inference.crf import CRF

    return CRF(**check(override({"crf": {}}, keys)["crf"], "crf", [CRF]))


def refuse_keys(overrides: Iterable[str], options: Mapping[str, str], owner: str) -> None:
    """Check that no `key=value` sets a key that the command sets itself.

    Args:
        overrides: The `key=value` arguments.
        options: The option to use instead, by key.
        owner: The subject of the message, such as `the study`.

    Raises:
        UsageError: An override sets such a key.
    """
    for word in overrides:
        key = word.partition("=")[0].lstrip("+")
        if key in options:
            raise UsageError(f"{word} is not allowed: {owner} sets this key - use {options[key]}")


def is_override(argument: str) -> bool:
    """Return True if an argument is `key=value` rather than an existing path that contains an equals sign."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and key.replace(".", "").replace("_", "").isalnum() and not Path(argument).exists()


def split_overrides(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Separate the `key=value` arguments for the config from those for the CRF.

    Examples:
        >>> split_overrides(["dataset.root=here", "crf.iterations=5"])
        (['dataset.root=here'], ['crf.iterations=5'])
    """
    crf_keys: list[str] = []
    others: list[str] = []
    for override in overrides:
        (crf_keys if override.startswith(CRF_KEYS) else others).append(override)
    return others, crf_keys


def pop_option(words: list[str], key: str) -> str | None:
    """Remove `key=VALUE` or `--key VALUE` from the words of a command line and return the value; None if absent.

    Raises:
        UsageError: The key has no value.
    """
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == key and (equals or key.startswith("--")):
            del words[index]
            if not equals:
                if index == len(words):
                    raise UsageError(f"{key} has no value - write {key} FILE")
                value = words.pop(index)
            return value
    return None


def pop_path(words: list[str], key: str) -> str | None:
    """Remove an option that names a file or folder to write, see `pop_option`, and return its value.

    Raises:
        UsageError: The option has no value, or an address, which would become a folder with such a name.
    """
    value = pop_option(words, key)
    if value is not None:
        require_local(key, value)
    return value
