"""Show a network layer by layer: shapes, kernels, receptive fields, parameters, operations, memory.

    python scripts/describe.py [model=NAME] [size=[H,W]] [classes=N] [--json FILE] [key=value ...]

Nothing is computed: the network needs no memory and any size is quick. The number of classes and of channels is that
of the data set (dataset=NAME), the size what it is seen at (dataset.size), or 360x480.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from segdeconv.cli.command import run_command
from segdeconv.cli.options import pop_option
from segdeconv.cli.own_code import CONFIGS, compose
from segdeconv.errors import UsageError, did_you_mean


def main() -> None:
    """Compose the config, trace the network, print the table."""
    words = sys.argv[1:]
    from segdeconv.config import list_groups
    from segdeconv.evaluation import report
    from segdeconv.models import build_model, check_model
    from segdeconv.summary.summary import describe, layer_table

    path = pop_option(words, "--json")
    asked = _value(pop_option(words, "size")), _value(pop_option(words, "classes"))
    config, _ = compose(words)
    known = {*list_groups(CONFIGS), "size", "classes"}
    if unknown := sorted(set(config) - known - {"seed", "resume", "resume_force", "init_from", "max_time"}):
        raise UsageError(f"there is no key {unknown[0]} - {did_you_mean(unknown[0], known)}")
    model, dataset = check_model(config["model"]), config["dataset"]
    size = asked[0] or dataset.get("crop") or dataset.get("size") or [360, 480]
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
        raise UsageError(f"size={size} is no height and width - write for example size=[360,480]")
    num_classes = asked[1] if asked[1] is not None else class_count(dataset)
    if not isinstance(num_classes, int) or num_classes < 1:
        raise UsageError(f"classes={num_classes} is no number of classes - write for example classes=21")
    channels = dataset.get("channels") or 3
    found = describe(lambda: build_model(model, num_classes, channels, fresh=True), (size[0], size[1]))
    print(layer_table(found, shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 1000))
    if path:
        report.write_json(found.to_dict(), Path(path))
        print(f"\neverything: {path}")


def class_count(dataset: dict[str, Any]) -> int:
    """How many classes a data set has, without its files where its code says so."""
    from segdeconv.classes import Classes
    from segdeconv.config import TARGET, locate
    from segdeconv.data.relabelled import relabel

    schema = locate(dataset, "dataset")
    known = getattr(schema, "classes", None) or getattr(sys.modules[schema.__module__], "CLASSES", None)
    if isinstance(known, Classes):
        return len(relabel(known, dataset.get("label_map") or {})[0])
    if dataset.get("root") is None:
        raise UsageError(f"{dataset[TARGET]} says its classes when its files are read - give dataset.root or classes=N")
    from segdeconv.data.module import build_split, check_dataset  # late: albumentations takes a second to import

    return len(build_split(check_dataset(dataset), "train").classes)


def _value(text: str | None) -> Any:
    try:
        return yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise UsageError(f"'{text}' cannot be read - write for example size=[360,480]") from None


if __name__ == "__main__":
    run_command(main, __doc__)
