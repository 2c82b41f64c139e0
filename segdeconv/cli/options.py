"""The options that several commands share. Light: it is there before torch is."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import UsageError

if TYPE_CHECKING:
    from segdeconv.inference.crf import CRF
    from segdeconv.inference.predictors import PredictionSettings

CRF_KEYS = "crf."
OF_REGIONS = {
    "proposals": "windows", "region_mode": "paper", "min_side": None, "with_whole": False, "save_regions": None,
}  # fmt: skip


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """What every command takes that runs a checkpoint's network."""
    add = parser.add_argument
    add("--samples", type=int, default=0, help="average over this many passes with dropout (default 0)")
    add("--precision", default="auto", help="auto (default), 32-true, bf16-mixed or 16-mixed")
    add("--trust", action="append", default=[], help="a class of your own that the config names")


def add_prediction_options(parser: argparse.ArgumentParser) -> None:
    """How images are predicted; `prediction_settings` reads it."""
    add_network_options(parser)
    parser.add_argument("--flip", action="store_true", help="average over each image and its mirror image")
    text = "average over these multiples of the size, such as 0.75,1,1.25"
    parser.add_argument("--scales", default="1", metavar="S,S", help=text)
    add = parser.add_argument_group("more than one look at the whole image").add_argument
    add("--regions", type=int, default=0, metavar="N", help="see each image through its N likeliest proposals")
    add("--proposals", default="windows", help="windows (default), selective_search, edge_boxes, or a file of boxes")
    modes: dict[str, Any] = {"choices": ("paper", "mean", "released"), "default": "paper"}
    add("--region-mode", **modes, help="where regions overlap: maximum (paper, and as the code of it), or mean")
    add("--min-side", type=int, metavar="PIXELS", help="skip smaller regions (default: 1; released: 112 of 224)")
    add("--with-whole", action="store_true", help="the whole image is a region too")
    add("--save-regions", type=Path, metavar="DIR", help="folder for the boxes and raw scores of every region")
    add("--ensemble", metavar="CHECKPOINT", help="a second network of the same classes, which sees each image whole")
    modes = {"choices": ("paper", "released"), "default": "paper"}
    add("--ensemble-mode", **modes, help="mean of both softmaxes (paper), or softmax of the scores' product")
    add("--crf", action="store_true", help="refine by a CRF at last; its settings are keys such as crf.colour_std=3")


def prediction_settings(
    arguments: argparse.Namespace,
    crf_keys: list[str],
    *,
    memory: int | None = None,
    tile: tuple[int, int] | None = None,
    precision: str | None = None,
) -> PredictionSettings:
    """What `add_prediction_options` was told; raises UsageError for what would do nothing.

    crf_keys: `crf.NAME=VALUE` arguments. precision: in place of --precision.
    """
    if crf_keys and not arguments.crf:
        raise UsageError(f"{crf_keys[0]} does nothing without --crf - add it")
    if not arguments.regions:
        for option, usual in OF_REGIONS.items():
            if getattr(arguments, option) != usual:
                raise UsageError(f"--{option.replace('_', '-')} does nothing without --regions N - add it")
    if arguments.ensemble_mode != "paper" and not arguments.ensemble:
        raise UsageError("--ensemble-mode does nothing without --ensemble CHECKPOINT - add it")
    try:
        scales = [float(part) for part in arguments.scales.split(",")]
    except ValueError:
        raise UsageError(f"--scales={arguments.scales} are no numbers - write for example 0.75,1,1.25") from None

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
    )


def crf_settings(keys: Iterable[str]) -> CRF:
    """What `crf.NAME=VALUE` arguments say.

    >>> crf_settings(["crf.iterations=5"]).iterations
    5
    """
    from segdeconv.config import check, override
    from segdeconv.inference.crf import CRF

    return CRF(**check(override({"crf": {}}, keys)["crf"], "crf", [CRF]))


def refuse_keys(overrides: Iterable[str], options: Mapping[str, str], whose: str) -> None:
    """Raise UsageError for a `key=value` whose key is set by an option. options: by key. whose: `the study's`."""
    for word in overrides:
        key = word.partition("=")[0].lstrip("+")
        if key in options:
            raise UsageError(f"{word} is {whose} to say - use {options[key]}")


def is_override(argument: str) -> bool:
    """Whether an argument is `key=value`, and not a path that happens to have an equals sign in it."""
    key, equals, _ = argument.partition("=")
    return bool(equals) and key.replace(".", "").replace("_", "").isalnum() and not Path(argument).exists()


def split_overrides(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """`key=value` arguments for the config, and those for the CRF.

    >>> split_overrides(["dataset.root=here", "crf.iterations=5"])
    (['dataset.root=here'], ['crf.iterations=5'])
    """
    of_crf: list[str] = []
    others: list[str] = []
    for override in overrides:
        (of_crf if override.startswith(CRF_KEYS) else others).append(override)
    return others, of_crf


def pop_option(words: list[str], key: str) -> str | None:
    """The value of `key=VALUE` or `--key VALUE`, taken out of the words of a command line."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == key and (equals or key.startswith("--")):
            del words[index]
            if not equals:
                if index == len(words):
                    raise UsageError(f"{key} names nothing - write {key} FILE")
                value = words.pop(index)
            return value
    return None
