"""Check every file of a data set and summarise its contents.

    python scripts/inspect_data.py [dataset=NAME] [--out DIR] [--window LOW,HIGH] [key=value ...]

Checks that every image and mask is readable, that their sizes match, that masks contain only known labels and that no
image is in two splits, and looks for what is probably not meant: files that are left out, classes without pixels,
copies, images without contrast. Prints the classes with their fractions of the pixels and their class weights, and
writes DIR/inspect.html (default: inspection/) with all of this, the labels found in the mask files, samples before and
after augmentation, and the files with problems; and DIR/classes.yaml to edit, if the classes were inferred from the
masks. Training also checks every file before its first step. --window gives the values of images that the page shows
as black and white; by default, images of 16 bits are stretched between the 1st and 99th percentile of each.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdeconv.cli.command import run_command
from segdeconv.cli.options import display_window, pop_option, pop_path
from segdeconv.cli.own_code import compose, with_chosen_keys
from segdeconv.errors import UsageError, command, warn
from segdeconv.system import CONFIGS
from segdeconv.system.files import replace_text
from segdeconv.system.own_files import OwnFiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from segdeconv.data.dataset import SegmentationDataset


def main() -> None:
    """Compose the config, inspect each split and write the page."""
    words = sys.argv[1:]
    from segdeconv.cli.overrides import hydra_overrides
    from segdeconv.data import inspection_page
    from segdeconv.data.module import build_splits, check_dataset
    from segdeconv.data.transforms import check_augment
    from segdeconv.drawing import html

    out = Path(pop_path(words, "--out") or "inspection")
    window = display_window(pop_option(words, "--window"))
    config, choices = compose(words)
    chosen = with_chosen_keys(config, choices, hydra_overrides(words, CONFIGS)).get("auto", [])
    node, augment = check_dataset(config["dataset"]), check_augment(config["augment"])
    page = out / "inspect.html"
    own_files = OwnFiles(out, "--out")
    own_files.add([page])
    own_files.record()
    shown: dict[str, Any] = {
        "command": command("inspect_data", sys.argv[1:]),
        "config": {"dataset": node, "augment": augment},
    }
    try:
        splits, missing = build_splits(node)
    except UsageError as error:
        html.write(inspection_page.build_failure_page(str(error), node.get("root"), **shown), page)
        print(f"page:   {page}")
        raise
    shown["window"] = window
    # A chosen size keeps the scale of most images, and only a typed one can be a mistake.
    size = None if "dataset.size" in chosen else node["size"]
    _inspect(splits, missing, node, size, augment, config["seed"], page, choices["dataset"], shown)


def _inspect(
    splits: list[SegmentationDataset],
    missing: str,
    node: dict[str, Any],
    size: Sequence[int] | None,
    augment: dict[str, Any],
    seed: int,
    page: Path,
    name: str,
    shown: dict[str, Any],
) -> None:
    """Inspect the splits, print their contents and write the page and, if the classes were inferred, a table of them.

    Raises:
        UsageError: A file cannot be used.
    """
    from segdeconv.data import checks, class_file, inspection_page
    from segdeconv.data.inspection import MAX_SHOWN, class_table, inspect, overlaps
    from segdeconv.data.module import build_pipeline, normalisation
    from segdeconv.drawing import html
    from segdeconv.losses import class_weights

    classes = splits[0].classes
    for note in splits[0].notes:
        print(note)
    inspections = [inspect(dataset) for dataset in splits]
    problems = [*overlaps(splits), *(problem for inspection in inspections for problem in inspection.problems)]
    findings = checks.review(splits, inspections, size)
    weights = class_weights.median_frequency(inspections[0].pixels[:-1], inspections[0].image_pixels[:-1])
    for inspection in inspections:
        print(class_table(inspection, classes, weights if inspection.split == "train" else None), end="\n\n")
    print("weight: median frequency balancing (loss.class_weighting=median_frequency)")

    training = None
    if not inspections[0].problems:
        dataset = {**normalisation(node, splits[0], inspections[0]), "cache": "none"}
        try:
            training = build_pipeline(dataset, augment, splits[0], splits[1], seed=seed).samples
        except UsageError as error:
            findings.insert(0, checks.Finding(str(error), refused=True))
    text = inspection_page.build_page(splits, inspections, problems, findings, weights, training, seed=seed, **shown)
    html.write(text, page)
    if missing:
        print(f"test:    not inspected, since {missing}")
    print(f"page:    {page}")
    if splits[0].unwrapped.inferred_classes:
        content = class_file.class_file(splits[0].stored_classes, checks.describe_classes(inspections, splits))
        write_table(page.with_name("classes.yaml"), content, Path(os.path.expanduser(node["root"])))
    for finding in findings:
        warn(f"{'prevents training: ' if finding.refused else ''}{finding.message}")
    for problem in problems[:MAX_SHOWN]:
        print(f"problem: {problem}")
    _, verdict = inspection_page.verdict(problems, findings)
    print(verdict)
    if problems:
        more = f", of which {MAX_SHOWN} are shown" if len(problems) > MAX_SHOWN else ""
        raise UsageError(f"{name} has {len(problems)} problems{more} - repair the files named above")


def write_table(table: Path, content: str, root: Path) -> None:
    """Write the table of the inferred classes, unless one with other content exists, and print what to do with it."""
    move = shlex.join(["mv", str(table), os.path.join(root, "")])
    if not os.path.lexists(table):
        replace_text(table, content)
    elif not (table.is_file() and table.read_bytes() == content.encode()):
        print(
            f"classes: {table} exists and is kept, since it was edited or is of other masks - if it names these "
            f"classes: {move}; otherwise remove it and inspect again"
        )
        return
    print(f"classes: {table} lists the classes that the masks have - name them there, then: {move}")


if __name__ == "__main__":
    run_command(main, __doc__)
