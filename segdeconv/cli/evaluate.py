"""The command `evaluate`: from its arguments to report.json, report.html, masks and pictures."""

import argparse
import sys
from pathlib import Path
from typing import Any

from segdeconv.cli.command import ArgumentParser
from segdeconv.cli.options import add_prediction_options, prediction_settings, split_overrides
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import command


def parse(description: str) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = ArgumentParser("evaluate.py", description=description)
    add = parser.add_argument
    add("checkpoint", help="a .ckpt that train.py wrote")
    add("overrides", nargs="*", metavar="key=value", help="for example dataset.root=DIR")
    add("--split", default="val", help="train, val (default) or test")
    text = "folder for the report (default: evaluation/ beside the checkpoint, or here if shipped)"
    add("--out", type=Path, help=text)
    add("--compare", metavar="CHECKPOINT", help="a second network of the same classes, put beside it")
    add("--masks", type=Path, help="folder for the predicted masks, exactly as counted")
    add("--pictures", type=Path, help="folder for image, truth, prediction and error of 12 images")
    add("--no-boundary", action="store_true", help="without boundary scores (20 ms an image of 360x480)")
    add("--ablate", action="store_true", help="score it too with something else in place of the switches")
    add("--uncertainty", action="store_true", help="say which signs of doubt find its errors")
    add_prediction_options(parser)
    return parser.parse_intermixed_args()


def run(description: str) -> None:
    """Restore, evaluate, report."""
    arguments = parse(description)
    overrides, crf_keys = split_overrides(arguments.overrides)
    if arguments.regions and not any(override.startswith("dataset.examples=") for override in overrides):
        overrides.append("dataset.examples=images")  # what was trained on crops is scored on whole images
    settings = prediction_settings(arguments, crf_keys)

    import numpy as np

    from segdeconv.analysis import ablation, uncertainty
    from segdeconv.checkpoints import cards
    from segdeconv.drawing import draw, html
    from segdeconv.evaluation import report, report_page
    from segdeconv.evaluation.evaluate import Evaluation, Predicted, class_order, restore_dataset
    from segdeconv.inference.segmenter import Segmenter

    if arguments.uncertainty:
        uncertainty.require_plain(settings)
    read = read_checkpoint(arguments.checkpoint, arguments.trust, overrides)
    other = arguments.compare and read_checkpoint(arguments.compare, arguments.trust, overrides)
    dataset = restore_dataset(read, arguments.split)
    if other:
        class_order(other, dataset)  # refused before the first of two evaluations
    segmenter = Segmenter(read, settings)
    if arguments.ablate:
        ablation.require_unpooling(segmenter.network.model)

    def save(one: Predicted) -> None:
        if arguments.masks:
            draw.save_mask(one.prediction, read.classes, arguments.masks / f"{dataset.names[one.place]}.png")
        if arguments.pictures and one.place in {int(chosen) for chosen in np.linspace(0, len(dataset) - 1, 12)}:
            image, mask, name = dataset[one.place]
            picture = draw.enlarged(draw.comparison(image, mask, one.prediction, read.classes), 128)
            strip = draw.legend(read.classes, range(len(read.classes)), picture.shape[1])
            draw.save_image(np.concatenate([picture, strip]), arguments.pictures / f"{name}.png")

    outlines = not arguments.no_boundary
    evaluation = Evaluation.of(segmenter, dataset, outlines=outlines, on_prediction=save)
    facts: dict[str, Any] = {"command": command("evaluate", sys.argv[1:])}
    if arguments.ablate:
        facts["ablation"] = ablation.ablate(evaluation)
    if arguments.uncertainty:
        facts["uncertainty"] = uncertainty.uncertainty(segmenter, dataset)
    content = evaluation.report(**facts)
    second = None
    if other:
        compared = Evaluation.of(Segmenter(other, settings), dataset, outlines=outlines)
        content["compared"] = compared.report()
        second = report_page.Evaluated(content["compared"], compared.gallery)
    place = Path() if cards.SHIPPED in read.path.parents else read.path.parent
    out = arguments.out or place / "evaluation"
    report.write_json(content, out / "report.json")
    first = report_page.Evaluated(content, evaluation.gallery)
    html.write(report_page.build_page(first, dataset, second=second), out / "report.html")
    print(f"{len(dataset)} images of {arguments.split}\n")
    print(evaluation.score_table())
    if other:
        print(f"\n{other.path}:\n\n{compared.score_table()}")
    if arguments.ablate:
        print(f"\n{ablation.ablation_table(facts['ablation'])}")
    if arguments.uncertainty:
        print(f"\n{uncertainty.uncertainty_table(facts['uncertainty'])}")
    print(f"\nreport:   {out / 'report.json'}, {out / 'report.html'}")
    for what in ("masks", "pictures"):
        if getattr(arguments, what):
            print(f"{what + ':':<10}{getattr(arguments, what)}")
