"""The command `evaluate`, which writes report.json, report.html, masks and pictures."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdeconv.cli.command import ArgumentParser
from segdeconv.cli.options import (
    add_checkpoint,
    add_labels_option,
    add_outlines_option,
    add_prediction_options,
    add_window_option,
    calibrated,
    display_window,
    prediction_settings,
    split_overrides,
)
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import UsageError, command, warn

if TYPE_CHECKING:
    from segdeconv.data.dataset import SegmentationDataset


def parse(description: str) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser("evaluate.py", description=description)
    add_checkpoint(parser)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="for example dataset.root=DIR")
    add("--split", default="val", help="train, val (default) or test")
    text = "folder for the report (default: evaluation/ next to the checkpoint; for a shipped network, in this folder)"
    add("--out", type=Path, help=text)
    add("--compare", metavar="CHECKPOINT", help="a second network with the same classes to compare it with")
    add("--masks", type=Path, help="folder for the predicted masks, exactly as scored")
    add("--pictures", type=Path, help="folder for figures of image, truth, prediction and error of 12 images")
    add_labels_option(parser, "these masks")
    add_outlines_option(parser)
    add_window_option(parser)
    add("--no-boundary", action="store_true", help="skip boundary scores (20 ms per image of 360x480)")
    add("--ablate", action="store_true", help="also score the network with its switches replaced")
    add("--uncertainty", action="store_true", help="report how well measures of uncertainty detect errors")
    add_prediction_options(parser)
    return parser.parse_intermixed_args()


def planned_files(folder: Path, dataset: SegmentationDataset, places: Iterable[int], ending: str) -> list[Path]:
    """Return the output file of each image, after a check that no two images have the same one.

    Args:
        folder: The output folder.
        dataset: The data set.
        places: Indices of the images with an output.
        ending: File name ending of the outputs.

    Raises:
        UsageError: Two images have the same name.
    """
    from segdeconv.inference.inputs import FileNames

    way_out = "leave out --masks, --pictures and --save-regions, or give the images other names"
    names = FileNames(f"--split {dataset.split}: ", way_out)
    for index, name in enumerate(dataset.names):
        names.add(f"{folder / name}{ending}", f"image {index} ({name})")
    names.warn()
    return [folder / f"{dataset.names[place]}{ending}" for place in places]


def run(description: str) -> None:
    """Run the command: evaluate the checkpoint and write the report."""
    arguments = parse(description)
    overrides, crf_keys = split_overrides(arguments.overrides)
    if arguments.regions and not any(override.startswith("dataset.examples=") for override in overrides):
        overrides.append("dataset.examples=images")  # a network trained on crops is scored on whole images
    if arguments.labels != "index" and not arguments.masks:
        raise UsageError(f"--labels={arguments.labels} has no effect without --masks DIR - add it")
    if arguments.outlines and not arguments.pictures:
        raise UsageError("--outlines has no effect without --pictures DIR - add it")
    settings = prediction_settings(arguments, crf_keys)
    if settings.precision == "int8" and (arguments.ablate or arguments.uncertainty):
        raise UsageError("--ablate and --uncertainty need float maps - leave out --precision int8")
    window = display_window(arguments.window)

    import numpy as np

    from segdeconv.analysis import ablation, uncertainty
    from segdeconv.checkpoints import cards
    from segdeconv.drawing import draw, html
    from segdeconv.evaluation import report, report_page
    from segdeconv.evaluation.evaluate import Evaluation, Predicted, class_order, restore_dataset
    from segdeconv.evaluation.learning_curve import curve_beside
    from segdeconv.inference.segmenter import Segmenter
    from segdeconv.system.own_files import OwnFiles

    if arguments.uncertainty:
        uncertainty.require_plain(settings)
    checkpoint = read_checkpoint(arguments.checkpoint, arguments.trust, overrides)
    other = arguments.compare and read_checkpoint(arguments.compare, arguments.trust, overrides)
    dataset = restore_dataset(checkpoint, arguments.split)
    if other:
        class_order(other, dataset)  # raises an error before the first evaluation rather than after it
    settings = calibrated(arguments, checkpoint, settings)
    segmenter = Segmenter(checkpoint, settings)
    if arguments.ablate:
        ablation.require_unpooling(segmenter.network.model)

    if window:
        draw.require_window(window, checkpoint.preprocessing.bits)
    if arguments.labels == "dataset":
        draw.label_table(checkpoint.classes)  # raises an error before the first image rather than after it
    pictured = {int(index) for index in np.linspace(0, len(dataset) - 1, 12)}
    outputs: set[str] = set()
    own_files = []
    everything = range(len(dataset))
    for option, folder, places, ending in (
        ("--masks", arguments.masks, everything, ".png"),
        ("--pictures", arguments.pictures, sorted(pictured), ".png"),
        ("--save-regions", arguments.save_regions, everything, ".npz"),
    ):
        if folder is not None:
            planned = planned_files(folder, dataset, places, ending)
            if twice := outputs & {os.path.realpath(path) for path in planned}:
                raise UsageError(f"--masks and --pictures would both write {min(twice)} - choose another {option}")
            outputs |= {os.path.realpath(path) for path in planned}
            own_files.append(OwnFiles(folder, option))
            own_files[-1].add(planned, inputs=dataset.files)
    for each in own_files:
        each.record()

    def save(predicted: Predicted) -> None:
        if arguments.masks:
            path = arguments.masks / f"{dataset.names[predicted.place]}.png"
            draw.save_mask(predicted.prediction, checkpoint.classes, path, labels=arguments.labels)
        if arguments.pictures and predicted.place in pictured:
            image, mask, name = dataset[predicted.place]
            image = draw.windowed(image, window)
            figure = draw.comparison(image, mask, predicted.prediction, checkpoint.classes, outlines=arguments.outlines)
            figure = draw.enlarged(figure, 128)
            strip = draw.legend(checkpoint.classes, range(len(checkpoint.classes)), figure.shape[1])
            draw.save_image(np.concatenate([figure, strip]), arguments.pictures / f"{name}.png")

    boundary = not arguments.no_boundary
    evaluation = Evaluation.of(segmenter, dataset, outlines=boundary, on_prediction=save)
    segmenter.resized.warn()
    if not evaluation.confusion.any():
        warn(f"{arguments.split}: every pixel of its masks is ignored, so there are no scores - correct the masks")
    metadata: dict[str, Any] = {"command": command("evaluate", sys.argv[1:])}
    if arguments.ablate:
        metadata["ablation"] = ablation.ablate(evaluation)
    if arguments.uncertainty:
        metadata["uncertainty"] = uncertainty.uncertainty(segmenter, dataset)
    content = evaluation.report(**metadata)
    second = None
    if other:
        compared = Evaluation.of(Segmenter(other, calibrated(arguments, other, settings)), dataset, outlines=boundary)
        content["compared"] = compared.report()
        second = report_page.Evaluated(content["compared"], compared.gallery, curve_beside(other.path))
    folder = Path() if cards.SHIPPED in checkpoint.path.parents else checkpoint.path.parent
    out = arguments.out or folder / "evaluation"
    report.write_json(content, out / "report.json")
    first = report_page.Evaluated(content, evaluation.gallery, curve_beside(checkpoint.path))
    html.write(report_page.build_page(first, dataset, second=second, window=window), out / "report.html")
    print(f"{evaluation.verdict()}\n\n{evaluation.score_table()}")
    if other:
        print(f"\n{other.path}:\n{compared.verdict()}\n\n{compared.score_table()}")
    if arguments.ablate:
        print(f"\n{ablation.ablation_table(metadata['ablation'])}")
    if arguments.uncertainty:
        print(f"\n{uncertainty.uncertainty_table(metadata['uncertainty'])}")
    print(f"\nreport:   {out / 'report.html'} (and report.json)")
    for output in ("masks", "pictures"):
        if getattr(arguments, output):
            print(f"{output + ':':<10}{getattr(arguments, output)}")
