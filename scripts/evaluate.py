"""Score a checkpoint on a split of the data set it was trained on.

    python scripts/evaluate.py CHECKPOINT [--split val] [--out DIR] [--masks DIR] [--pictures DIR] [key=value ...]

The checkpoint is enough; dataset.root=DIR says where the data lies if it has moved. Every stored pixel that is not
ignored counts, at the mask's own size. Prints a table and writes DIR/report.json and DIR/report.html, one page with the
scores, where they come from, and the best, the median and the worst images; --compare OTHER puts another network beside
it.

--regions N sees each image through its N likeliest object proposals, as DeconvNet does; --ensemble CHECKPOINT adds a
second network, as EDeconvNet does with FCN-8s; --crf refines the outlines. --ablate says what the switches are worth,
--uncertainty which signs of doubt find the errors.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from segdeconv.cli.command import ArgumentParser, run_command
from segdeconv.cli.options import add_looks, add_scales, looks_more, parted, scales_of
from segdeconv.errors import UsageError, command


def main() -> None:
    """Parse, restore, evaluate, report."""
    parser = ArgumentParser("evaluate.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a .ckpt that train.py wrote")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.root=DIR")
    parser.add_argument("--split", default="val", help="train, val (default) or test")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the report (default: evaluation/ beside the checkpoint, or here if shipped)",
    )
    parser.add_argument("--compare", metavar="CHECKPOINT", help="a second network of the same classes, put beside it")
    parser.add_argument("--masks", type=Path, help="folder for the predicted masks, exactly as counted")
    parser.add_argument("--pictures", type=Path, help="folder for image, truth, prediction and error of 12 images")
    parser.add_argument("--samples", type=int, default=0, help="average over this many passes with dropout (default 0)")
    parser.add_argument(
        "--no-boundary", action="store_true", help="without boundary scores (20 ms an image of 360x480)"
    )
    parser.add_argument("--flip", action="store_true", help="average over each image and its mirror image")
    add_scales(parser)
    parser.add_argument(
        "--ablate", action="store_true", help="score it too with something else in place of the switches"
    )
    parser.add_argument("--uncertainty", action="store_true", help="say which signs of doubt find its errors")
    parser.add_argument("--precision", default="auto", help="auto (default), 32-true, bf16-mixed or 16-mixed")
    parser.add_argument("--trust", action="append", default=[], help="a class of your own that the recipe names")
    add_looks(parser)
    arguments = parser.parse_intermixed_args()
    overrides, crf_keys = parted(arguments.overrides)
    scales, looking = scales_of(arguments), looks_more(arguments, crf_keys)
    if looking and scales != [1.0]:
        raise UsageError("--regions, --ensemble and --crf see images in a way of their own - leave out --scales")
    if arguments.regions and not any(override.startswith("dataset.examples=") for override in overrides):
        overrides.append("dataset.examples=images")  # what was trained on crops is scored on whole images

    import numpy as np

    from segdeconv.analysis import ablation, uncertainty
    from segdeconv.checkpoints import cards, checkpoint
    from segdeconv.drawing import draw, html
    from segdeconv.evaluation import evaluate, report, report_page
    from segdeconv.evaluation.boundary import Boundaries
    from segdeconv.evaluation.evaluation import Evaluation
    from segdeconv.inference.predictors import predictor_of
    from segdeconv.inference.regions import Predictor
    from segdeconv.inference.segmenter import Segmenter
    from segdeconv.system.devices import best_device

    device = best_device()
    read = checkpoint.read(arguments.checkpoint, trust=arguments.trust, overrides=overrides)
    other = arguments.compare and checkpoint.read(arguments.compare, trust=arguments.trust, overrides=overrides)
    dataset = evaluate.restore_dataset(read, arguments.split)
    if other:
        evaluate.class_order(other, dataset.classes)  # refused before the first of two evaluations
    levels = ablation.require_unpooling(read.model()) if arguments.ablate else 0
    if arguments.uncertainty:
        uncertainty.require_plain(looking or scales != [1.0])

    def save(one: evaluate.Predicted) -> None:
        if arguments.masks:
            draw.save_mask(one.prediction, read.classes, arguments.masks / f"{dataset.names[one.place]}.png")
        if arguments.pictures and one.place in {int(chosen) for chosen in np.linspace(0, len(dataset) - 1, 12)}:
            image, mask, name = dataset[one.place]
            picture = draw.enlarged(draw.comparison(image, mask, one.prediction, read.classes), 128)
            strip = draw.legend(read.classes, range(len(read.classes)), picture.shape[1])
            draw.save_image(np.concatenate([picture, strip]), arguments.pictures / f"{name}.png")

    settings: dict[str, Any] = {
        "device": device,
        "precision": arguments.precision,
        "flip": arguments.flip,
        "samples": arguments.samples,
    }

    def look_of(network: checkpoint.Checkpoint) -> Predictor | None:
        if looking:
            return predictor_of(network, network.model(), arguments, crf_keys, device)
        if scales == [1.0]:
            return None
        return Segmenter(network, scales=scales, **settings).probabilities

    def evaluated(network: checkpoint.Checkpoint) -> Evaluation:
        return Evaluation.of(
            network,
            dataset,
            outlines=not arguments.no_boundary,
            look=look_of(network),
            on_prediction=save if network is read else None,
            **settings,
        )

    def counted(outlines: Boundaries | None) -> np.ndarray:
        look = look_of(read)
        return evaluate.evaluate(read, arguments.split, on=dataset, boundaries=outlines, look=look, **settings)[0]

    done = evaluated(read)
    place = Path() if cards.SHIPPED in read.path.parents else read.path.parent
    out = arguments.out or place / "evaluation"
    facts: dict[str, Any] = {"command": command("evaluate", sys.argv[1:])}
    if arguments.ablate:
        facts["ablation"] = ablation.ablate(counted, done.confusion, done.boundaries, levels)
    if arguments.uncertainty:
        facts["uncertainty"] = uncertainty.uncertainty(read, dataset, **settings)
    found = done.report(**facts)
    shown = {}
    if other:
        beside = evaluated(other)
        found["compared"] = beside.report()
        shown["second"] = report_page.Evaluated(found["compared"], beside.gallery)
    report.write_json(found, out / "report.json")
    html.write(
        report_page.build_page(report_page.Evaluated(found, done.gallery), dataset, **shown), out / "report.html"
    )
    print(f"{len(dataset)} images of {arguments.split}\n")
    print(done.table())
    if other:
        print(f"\n{other.path}:\n\n{beside.table()}")
    if arguments.ablate:
        print(f"\n{ablation.table(facts['ablation'])}")
    if arguments.uncertainty:
        print(f"\n{uncertainty.table(facts['uncertainty'])}")
    print(f"\nreport:   {out / 'report.json'}, {out / 'report.html'}")
    for what in ("masks", "pictures"):
        if getattr(arguments, what):
            print(f"{what + ':':<10}{getattr(arguments, what)}")


if __name__ == "__main__":
    run_command(main)
