"""The command `evaluate`, which writes report.json, report.html, masks and pictures."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdeconv.cli.command import ArgumentParser
from segdeconv.cli.options import (
    add_checkpoint,
    add_distribution_options,
    add_labels_option,
    add_outlines_option,
    add_prediction_options,
    add_window_option,
    calibrated,
    display_window,
    pop_option,
    prediction_settings,
    ray_settings,
    shard,
    split_overrides,
)
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import UsageError, command, warn

if TYPE_CHECKING:
    from segdeconv.classes import Classes
    from segdeconv.data.dataset import SegmentationDataset
    from segdeconv.drawing.draw import Labels, Window
    from segdeconv.evaluation.evaluate import Predicted
    from segdeconv.inference.parts import Part

KIND = "evaluate"  # in the summary of a part
DIFFERENCES = {"checkpoint": "a different checkpoint", "data": "other images", "arguments": "other settings"}
PACKED, COMPARED = "evaluation.npz", "compared.npz"  # in the folder of a part


@dataclass(frozen=True)
class Saver:
    """Writes the mask and the picture of a prediction; sent to the workers of a cluster.

    Attributes:
        pictured: The indices of the images of which there are pictures.
    """

    classes: Classes
    masks: Path | None
    pictures: Path | None
    pictured: frozenset[int]
    labels: Labels
    outlines: bool
    window: Window | None

    def __call__(self, predicted: Predicted) -> None:
        """Write the files of one image."""
        import numpy as np

        from segdeconv.drawing import draw

        dataset, place = predicted.dataset, predicted.place
        if self.masks:
            path = self.masks / f"{dataset.names[place]}.png"
            draw.save_mask(predicted.prediction, self.classes, path, labels=self.labels)
        if self.pictures and place in self.pictured:
            image, mask, name = dataset[place]
            image = draw.windowed(image, self.window)
            figure = draw.comparison(image, mask, predicted.prediction, self.classes, outlines=self.outlines)
            figure = draw.enlarged(figure, 128)
            strip = draw.legend(self.classes, range(len(self.classes)), figure.shape[1])
            draw.save_image(np.concatenate([figure, strip]), self.pictures / f"{name}.png")


def parse(description: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or that of a part of an evaluation in `words`."""
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
    add_distribution_options(parser)
    return parser.parse_intermixed_args(words)


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
    evaluate(parse(description), sys.argv[1:])


def merge(out: Path, summaries: Mapping[Part, Mapping[str, Any]], trust: Sequence[str]) -> None:
    """Write the report of an evaluation whose parts are complete, and remove the parts.

    Args:
        out: The folder of the report.
        summaries: The summary of each part.
        trust: Classes of the user's own that the config may name.

    Raises:
        UsageError: The parts are damaged, or of different networks, settings or data.
    """
    from segdeconv.inference import parts

    first, *others = summaries
    recorded = {part: _recorded(part, summary) for part, summary in summaries.items()}
    for part in others:
        for key, kind in (
            ("checkpoint", "a different checkpoint"),
            ("data", "other data"),
            ("arguments", "other settings"),
        ):
            if recorded[part][key] != recorded[first][key]:
                raise UsageError(
                    f"{out}: part {part} was evaluated with {kind} than part {first} - run the same command for all "
                    "parts"
                )
    words = recorded[first]["arguments"]
    arguments = parse("", [*words, *(f"--trust={name}" for name in trust)])
    arguments.out = out
    evaluate(arguments, words, merged=dict.fromkeys(summaries, recorded[first]))
    parts.remove_parts(out)


def _recorded(part: Part, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a part records of its evaluation: `arguments`, a list of words, `checkpoint` and `data`."""
    words = summary.get("arguments")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UsageError(f"part {part} does not have the arguments of its evaluation - evaluate it again")
    return {"arguments": words, "checkpoint": summary.get("checkpoint"), "data": summary.get("data")}


def evaluate(
    arguments: argparse.Namespace, words: Sequence[str], merged: Mapping[Part, Mapping[str, Any]] | None = None
) -> None:
    """Evaluate the checkpoint, or one part of the images, or put parts together; write the report.

    Args:
        arguments: The command line.
        words: The same in words, for the report.
        merged: What each part records, if parts are put together.

    Raises:
        UsageError: An option is invalid or would have no effect, or the data cannot be read.
    """
    part, ray = shard(arguments), ray_settings(arguments)
    for option in ("ablate", "uncertainty"):
        if getattr(arguments, option) and (part or ray):
            raise UsageError(f"--{option} needs all images in one process - leave out --shard and --engine")
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
    from segdeconv.evaluation.evaluate import Evaluation, batches, class_order, restore_dataset
    from segdeconv.evaluation.learning_curve import curve_beside
    from segdeconv.evaluation.parts import combine, evaluate_distributed, pack
    from segdeconv.inference import distributed, parts
    from segdeconv.inference.segmenter import Segmenter
    from segdeconv.system.files import replacing
    from segdeconv.system.own_files import OwnFiles

    if ray:
        distributed.require_ray()
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
    shown = [place for batch in part.select(batches(segmenter, dataset)) for place in batch] if part else None
    places = range(len(dataset)) if shown is None else shown
    for option, folder, indices, ending in (
        ("--masks", arguments.masks, places, ".png"),
        ("--pictures", arguments.pictures, sorted(pictured & set(places)), ".png"),
        ("--save-regions", arguments.save_regions, places, ".npz"),
    ):
        if folder is not None:
            planned = planned_files(folder, dataset, indices, ending)
            if twice := outputs & {os.path.realpath(path) for path in planned}:
                raise UsageError(f"--masks and --pictures would both write {min(twice)} - choose another {option}")
            outputs |= {os.path.realpath(path) for path in planned}
            own_files.append(OwnFiles(folder, option, owner=f"-{part.index}-of-{part.count}" if part else ""))
            own_files[-1].add(planned, inputs=dataset.files)
    for each in own_files:
        each.record()

    save = Saver(
        checkpoint.classes,
        arguments.masks,
        arguments.pictures,
        frozenset(pictured),
        arguments.labels,
        arguments.outlines,
        window,
    )
    boundary = not arguments.no_boundary
    folder = Path() if cards.SHIPPED in checkpoint.path.parents else checkpoint.path.parent
    out = arguments.out or folder / "evaluation"
    networks = {PACKED: segmenter}
    if other:
        networks[COMPARED] = Segmenter(other, calibrated(arguments, other, settings))
    savers = {PACKED: save, COMPARED: None}
    recorded = {
        "arguments": _words(words),
        "checkpoint": [network.checkpoint.sha256 for network in networks.values()],
        "data": parts.fingerprint(dataset.names),
    }
    if part:
        part.begin(out)
        for name, network in networks.items():
            of_part = Evaluation.of(network, dataset, outlines=boundary, on_prediction=savers[name], places=places)
            with replacing(part.folder(out) / name) as file:
                file.write(pack(of_part, places))
        segmenter.resized.warn()
        part.finish(out, {"kind": KIND, **recorded})
        print(f"part {part}: {len(places)} images in {out}; after all parts: {command('merge', [str(out)])}")
        return
    if merged is not None:
        for one, of_one in merged.items():
            for key, kind in (("checkpoint", "a checkpoint that has changed"), ("data", "other images")):
                if of_one[key] != recorded[key]:
                    raise UsageError(f"part {one} was evaluated with {kind} - evaluate all parts again")
        evaluations = [
            combine(
                {f"{one.folder(out) / name}": _read(one.folder(out) / name) for one in merged},
                network,
                dataset,
                outlines=boundary,
            )
            for name, network in networks.items()
        ]
    elif ray:
        with distributed.cluster(ray) as workers:
            evaluations = [
                evaluate_distributed(network, dataset, workers, outlines=boundary, on_prediction=savers[name])
                for name, network in networks.items()
            ]
    else:
        evaluations = [
            Evaluation.of(network, dataset, outlines=boundary, on_prediction=savers[name])
            for name, network in networks.items()
        ]
    evaluation, compared = evaluations[0], evaluations[-1]
    segmenter.resized.warn()
    if not evaluation.confusion.any():
        warn(f"{arguments.split}: every pixel of its masks is ignored, so there are no scores - correct the masks")
    metadata: dict[str, Any] = {"command": command("evaluate", words)}
    if arguments.ablate:
        metadata["ablation"] = ablation.ablate(evaluation)
    if arguments.uncertainty:
        metadata["uncertainty"] = uncertainty.uncertainty(segmenter, dataset)
    content = evaluation.report(**metadata)
    second = None
    if other:
        content["compared"] = compared.report()
        second = report_page.Evaluated(content["compared"], compared.gallery, curve_beside(other.path))
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


def _words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line without --shard, and without --trust, which a file must not grant."""
    kept = list(words)
    for option in ("--shard", "--trust"):
        while pop_option(kept, option) is not None:
            pass
    return kept


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise UsageError(f"{path} is missing - evaluate this part again")
    return path.read_bytes()
