"""Score a checkpoint on a split of the data set it was trained on.

    python scripts/evaluate.py CHECKPOINT [--split val] [--out DIR] [--masks DIR] [--pictures DIR] [key=value ...]

The checkpoint is enough; dataset.root=DIR says where the data lies if it has moved. Every stored pixel that is not
ignored counts, at the mask's own size. Prints a table and writes DIR/report.json.

--regions N sees each image through its N likeliest object proposals, as DeconvNet does; --ensemble CHECKPOINT adds a
second network, as EDeconvNet does with FCN-8s; --crf refines the outlines.
"""

from __future__ import annotations

import sys
from pathlib import Path

from segdeconv.errors import ArgumentParser, command, run_command
from segdeconv.options import add_looks, looks_more, parted


def main() -> None:
    """Parse, restore, evaluate, report."""
    parser = ArgumentParser("evaluate.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a .ckpt that train.py wrote")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.root=DIR")
    parser.add_argument("--split", default="val", help="train, val (default) or test")
    parser.add_argument("--out", type=Path, help="folder for report.json (default: evaluation/ beside the checkpoint)")
    parser.add_argument("--masks", type=Path, help="folder for the predicted masks, exactly as counted")
    parser.add_argument("--pictures", type=Path, help="folder for image, truth, prediction and error of 12 images")
    parser.add_argument("--samples", type=int, default=0, help="average over this many passes with dropout (default 0)")
    parser.add_argument(
        "--no-boundary", action="store_true", help="without boundary scores (20 ms an image of 360x480)"
    )
    parser.add_argument("--flip", action="store_true", help="average over each image and its mirror image")
    parser.add_argument("--precision", default="auto", help="auto (default), 32-true, bf16-mixed or 16-mixed")
    parser.add_argument("--trust", action="append", default=[], help="a class of your own that the recipe names")
    add_looks(parser)
    arguments = parser.parse_intermixed_args()
    overrides, crf_keys = parted(arguments.overrides)
    if arguments.regions and not any(override.startswith("dataset.examples=") for override in overrides):
        overrides.append("dataset.examples=images")  # what was trained on crops is scored on whole images

    import numpy as np

    from segdeconv import checkpoint, draw, report, scoring
    from segdeconv.boundary import Boundaries
    from segdeconv.calibration import Calibration
    from segdeconv.data.dataset import SegmentationDataset
    from segdeconv.inference import best_device
    from segdeconv.prediction import predictor_of

    read = checkpoint.read(arguments.checkpoint, trust=arguments.trust, overrides=overrides)
    device = best_device()

    def save(dataset: SegmentationDataset, index: int, prediction: np.ndarray) -> None:
        if arguments.masks:
            draw.save_mask(prediction, read.classes, arguments.masks / f"{dataset.names[index]}.png")
        if arguments.pictures and index in {int(chosen) for chosen in np.linspace(0, len(dataset) - 1, 12)}:
            image, mask, name = dataset[index]
            picture = draw.enlarged(draw.comparison(image, mask, prediction, read.classes), 128)
            strip = draw.legend(read.classes, range(len(read.classes)), picture.shape[1])
            draw.save_image(np.concatenate([picture, strip]), arguments.pictures / f"{name}.png")

    calibration = Calibration(read.classes.ignore_index)
    boundaries = None if arguments.no_boundary else Boundaries(len(read.classes), read.classes.ignore_index)
    confusion, num_images = scoring.evaluate(
        read,
        arguments.split,
        device=device,
        precision=arguments.precision,
        flip=arguments.flip,
        samples=arguments.samples,
        calibration=calibration,
        boundaries=boundaries,
        look=predictor_of(read, read.model(), arguments, crf_keys, device) if looks_more(arguments, crf_keys) else None,
        on_prediction=save if arguments.masks or arguments.pictures else None,
    )
    out = arguments.out or read.path.parent / "evaluation"
    typed = command("evaluate", sys.argv[1:])
    facts = {"command": typed, "checkpoint": str(read.path), "split": arguments.split, "samples": arguments.samples}
    facts["calibration"] = calibration.report()
    report.write_json(
        report.report(confusion, num_images, read.classes, boundaries=boundaries, **facts), out / "report.json"
    )
    print(f"{num_images} images of {arguments.split}\n")
    print(report.table(confusion, read.classes, calibration, boundaries))
    print(f"\nreport:   {out / 'report.json'}")
    for what in ("masks", "pictures"):
        if getattr(arguments, what):
            print(f"{what + ':':<10}{getattr(arguments, what)}")


if __name__ == "__main__":
    run_command(main)
