"""Check every file of a data set and summarise its contents.

    python scripts/inspect_data.py [dataset=NAME] [--out DIR] [key=value ...]

Checks that every image and mask is readable, that their sizes match, that masks contain only known labels and that no
image is in two splits. Prints the classes with their fractions of the pixels and their class weights, and writes
DIR/inspect.html (default: inspection/) with the classes, the sizes, samples before and after augmentation, and the
files with problems. Training also checks every file before its first step.
"""

import sys
from pathlib import Path

from segdeconv.cli.command import run_command
from segdeconv.cli.options import pop_option
from segdeconv.cli.own_code import compose
from segdeconv.errors import UsageError, command


def main() -> None:
    """Compose the config, inspect each split and write the page."""
    words = sys.argv[1:]
    from segdeconv.data import inspection_page
    from segdeconv.data.inspection import MAX_SHOWN, class_table, inspect, overlaps
    from segdeconv.data.module import build_pipeline, build_split, check_augment, check_dataset, normalisation
    from segdeconv.drawing import html
    from segdeconv.losses import class_weights

    out = Path(pop_option(words, "--out") or "inspection")
    config, choices = compose(words)
    node, augment = check_dataset(config["dataset"]), check_augment(config["augment"])
    splits = [build_split(node, split) for split in ("train", "val")]
    try:
        build_split({**node, "checksums": None}, "test")
    except UsageError as error:
        print(f"no test split: {error}\n")
    else:
        splits.append(build_split(node, "test"))  # this time with its checksums, if the config has any
    classes = splits[0].classes
    for note in splits[0].notes:
        print(note)
    inspections = [inspect(dataset) for dataset in splits]
    problems = [*overlaps(splits), *(problem for inspection in inspections for problem in inspection.problems)]
    weights = class_weights.median_frequency(inspections[0].pixels[:-1], inspections[0].image_pixels[:-1])
    for inspection in inspections:
        print(class_table(inspection, classes, weights if inspection.split == "train" else None), end="\n\n")
    print("weight: median frequency balancing (loss.class_weighting=median_frequency)")

    training = None
    if not inspections[0].problems:
        dataset = {**normalisation(node, splits[0], inspections[0]), "cache": "none"}
        training = build_pipeline(dataset, augment, splits[0], splits[1], seed=config["seed"]).samples
    page = inspection_page.build_page(
        splits,
        inspections,
        problems,
        weights,
        training,
        seed=config["seed"],
        command=command("inspect_data", sys.argv[1:]),
        config={"dataset": node, "augment": augment},
    )
    html.write(page, out / "inspect.html")
    print(f"page:   {out / 'inspect.html'}")
    for problem in problems[:MAX_SHOWN]:
        print(f"problem: {problem}")
    if problems:
        more = f", of which {MAX_SHOWN} are shown" if len(problems) > MAX_SHOWN else ""
        raise UsageError(f"{choices['dataset']} has {len(problems)} problems{more} - repair the files named above")
    print(f"no problems in {sum(map(len, splits))} images and masks")


if __name__ == "__main__":
    run_command(main, __doc__)
