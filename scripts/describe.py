"""Summarise a network layer by layer: shapes, kernels, receptive fields, parameters, operations, memory.

    python scripts/describe.py [model=NAME] [size=[H,W]] [classes=N] [--json FILE] [key=value ...]

The network is traced without computing anything, so any size is fast and needs no memory. The number of classes and of
channels is that of the data set (dataset=NAME), the size its input size (dataset.crop or dataset.size), or 360x480.
"""

import os
import shutil
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from segdeconv.cli.command import run_command
from segdeconv.cli.options import pop_option, pop_path
from segdeconv.cli.own_code import compose
from segdeconv.errors import UsageError, did_you_mean
from segdeconv.system import CONFIGS
from segdeconv.system.plain_data import PlainDataError, parse_yaml, read_json


def main() -> None:
    """Compose the config, trace the network and print the table."""
    words = sys.argv[1:]
    from segdeconv.config import list_groups
    from segdeconv.evaluation import report
    from segdeconv.models import build_model, check_model
    from segdeconv.summary.summary import describe, layer_table

    path = pop_path(words, "--json")
    if path:
        require_own_summary(Path(path))
    size, num_classes = _value(pop_option(words, "size")), _value(pop_option(words, "classes"))
    config, _ = compose(words)
    known = {*list_groups(CONFIGS), "size", "classes"}
    if unknown := sorted(set(config) - known - {"seed", "resume", "resume_force", "init_from", "max_time"}):
        raise UsageError(f"unknown key {unknown[0]} - {did_you_mean(unknown[0], known)}")
    model, dataset = check_model(config["model"]), config["dataset"]
    size = size or dataset.get("crop") or dataset.get("size") or [360, 480]
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
        raise UsageError(f"size={size} is not a height and width - write for example size=[360,480]")
    if num_classes is None:
        num_classes = class_count(dataset)
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UsageError(f"classes={num_classes} is not a number of classes - write for example classes=21")
    channels = dataset.get("channels") or 3
    summary = describe(lambda: build_model(model, num_classes, channels, fresh=True), (size[0], size[1]))
    print(layer_table(summary, shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 1000))
    if path:
        report.write_json(summary.to_dict(), Path(path))
        print(f"\nfull summary: {path}")


def require_own_summary(path: Path) -> None:
    """Raise UsageError if a file exists and is not the summary of a network."""
    from segdeconv.summary.summary import Description
    from segdeconv.system.own_files import foreign_files

    summary = None
    with suppress(PlainDataError, OSError):
        summary = read_json(path)
    names = {field.name for field in fields(Description)}
    if os.path.lexists(path) and not (isinstance(summary, dict) and summary.keys() >= names):
        raise foreign_files(path, 0, "--json")


def class_count(dataset: dict[str, Any]) -> int:
    """Return the number of classes of a data set, without reading its files if its code defines them.

    Raises:
        UsageError: The classes are defined by files, and dataset.root is not set.
    """
    from segdeconv.classes import Classes
    from segdeconv.config import TARGET, locate
    from segdeconv.data.relabelled import relabel

    schema = locate(dataset, "dataset")
    classes = getattr(schema, "classes", None) or getattr(sys.modules[schema.__module__], "CLASSES", None)
    if isinstance(classes, Classes):
        return len(relabel(classes, dataset.get("label_map") or {})[0])
    if dataset.get("root") is None:
        raise UsageError(f"the classes of {dataset[TARGET]} are read from its files - set dataset.root or classes=N")
    from segdeconv.data.module import build_split, check_dataset  # a late import, since albumentations takes a second

    return len(build_split(check_dataset(dataset), "train").classes)


def _value(text: str | None) -> Any:
    try:
        return parse_yaml(text) if text else None
    except PlainDataError as error:
        raise UsageError(f"'{text}' {error} - write for example size=[360,480]") from None


if __name__ == "__main__":
    run_command(main, __doc__)
