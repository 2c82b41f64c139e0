"""Check every file of a data set and say what is in it.

    python scripts/inspect_data.py [dataset=NAME] [key=value ...]

Reads each image and mask once: are they readable, of one size, with known labels, and in one split only? Prints the
classes with their pixel shares and class weights. Training does the same before its first step.
"""

from __future__ import annotations

import sys
from pathlib import Path

from segdeconv.errors import UsageError, command, run_command

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def main() -> None:
    """Compose the recipe, inspect each split."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.replace("python scripts/inspect_data.py", command("inspect_data")))
        return
    from segdeconv import balancing, config
    from segdeconv.data.inspection import MOST_SHOWN, inspect, overlaps, table
    from segdeconv.data.module import build_split, check_dataset

    recipe, choices = config.compose(sys.argv[1:], CONFIGS)
    node = check_dataset(recipe["dataset"])
    splits = [build_split(node, split) for split in ("train", "val")]
    try:
        splits.append(build_split(node, "test"))
    except UsageError as error:
        print(f"no test split: {error}\n")
    classes = splits[0].classes
    for note in splits[0].notes:
        print(note)
    problems = overlaps(splits)
    for dataset in splits:
        seen = inspect(dataset)
        problems += seen.problems
        weights = balancing.median_frequency(seen.pixels[:-1], seen.image_pixels[:-1])
        print(table(seen, classes, weights if dataset.split == "train" else None), end="\n\n")
    print("weight: median frequency balancing (loss.balancing=median_frequency)")
    for problem in problems[:MOST_SHOWN]:
        print(f"problem: {problem}")
    if problems:
        more = f", of which {MOST_SHOWN} are shown" if len(problems) > MOST_SHOWN else ""
        raise UsageError(f"{choices['dataset']} has {len(problems)} problems{more} - mend the files named above")
    print(f"no problem in {sum(map(len, splits))} images and masks")


if __name__ == "__main__":
    run_command(main)
