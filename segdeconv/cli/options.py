"""The arguments that several commands share. Light: it is there before torch is."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from segdeconv.errors import UsageError

CRF_KEYS = "crf."
OF_REGIONS = {
    "proposals": "windows", "region_mode": "paper", "least_side": None, "whole_too": False, "save_regions": None,
}  # fmt: skip


def add_looks(parser: argparse.ArgumentParser) -> None:
    """Regions, two networks, a CRF: what DeconvNet predicts with."""
    add = parser.add_argument_group("more than one look at the whole image").add_argument
    add("--regions", type=int, default=0, metavar="N", help="see each image through its N likeliest proposals")
    add("--proposals", default="windows", help="windows (default), selective_search, edge_boxes, or a file of boxes")
    modes: dict[str, Any] = {"choices": ("paper", "mean", "released"), "default": "paper"}
    add("--region-mode", **modes, help="where regions overlap: maximum (paper, and as the code of it), or mean")
    add("--least-side", type=int, metavar="PIXELS", help="skip smaller regions (default: 1; released: 112 of 224)")
    add("--whole-too", action="store_true", help="the whole image is a region too")
    add("--save-regions", type=Path, metavar="DIR", help="folder for the boxes and raw scores of every region")
    add("--ensemble", metavar="CHECKPOINT", help="a second network of the same classes, which sees each image whole")
    modes = {"choices": ("paper", "released"), "default": "paper"}
    add("--ensemble-mode", **modes, help="mean of both softmaxes (paper), or softmax of the scores' product")
    add("--crf", action="store_true", help="refine by a CRF at last; its settings are keys such as crf.colour_std=3")


def add_scales(parser: argparse.ArgumentParser) -> None:
    """Several sizes of the image."""
    text = "average over these multiples of the size, such as 0.75,1,1.25"
    parser.add_argument("--scales", default="1", metavar="S,S", help=text)


def scales_of(arguments: argparse.Namespace) -> list[float]:
    """What `add_scales` was told."""
    try:
        return [float(part) for part in arguments.scales.split(",")]
    except ValueError:
        raise UsageError(f"--scales={arguments.scales} are no numbers - write for example 0.75,1,1.25") from None


def looks_more(arguments: argparse.Namespace, crf_keys: Sequence[str]) -> bool:
    """Whether any of it was asked for; raises UsageError for what would do nothing."""
    if crf_keys and not arguments.crf:
        raise UsageError(f"{crf_keys[0]} does nothing without --crf - add it")
    if not arguments.regions:
        for option, usual in OF_REGIONS.items():
            if getattr(arguments, option) != usual:
                raise UsageError(f"--{option.replace('_', '-')} does nothing without --regions N - add it")
    if arguments.ensemble_mode != "paper" and not arguments.ensemble:
        raise UsageError("--ensemble-mode does nothing without --ensemble CHECKPOINT - add it")
    return bool(arguments.regions or arguments.ensemble or arguments.crf)


def refuse_keys(overrides: Iterable[str], options: Mapping[str, str], whose: str) -> None:
    """Raise UsageError for a `key=value` whose key is set by an option. options: by key. whose: `the study's`."""
    for word in overrides:
        key = word.partition("=")[0].lstrip("+")
        if key in options:
            raise UsageError(f"{word} is {whose} to say - use {options[key]}")


def parted(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """`key=value` arguments for the recipe, and those for the CRF.

    >>> parted(["dataset.root=here", "crf.iterations=5"])
    (['dataset.root=here'], ['crf.iterations=5'])
    """
    found = list(overrides)
    return [one for one in found if not one.startswith(CRF_KEYS)], [one for one in found if one.startswith(CRF_KEYS)]


def taken(words: list[str], key: str) -> str | None:
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
