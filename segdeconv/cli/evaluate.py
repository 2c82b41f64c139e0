"""The command `evaluate`, which writes report.json, report.html, masks and pictures."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
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
    require_folder_of_parts,
    shard,
    split_overrides,
)
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import UsageError, command, warn

if TYPE_CHECKING:
    from segdeconv.checkpoints.checkpoint import Checkpoint
    from segdeconv.classes import Classes
    from segdeconv.data.dataset import SegmentationDataset
    from segdeconv.drawing.draw import Labels, Window
    from segdeconv.evaluation.evaluate import Evaluation, Predicted
    from segdeconv.inference.output_folder import OutputFolder
    from segdeconv.inference.parts import Part
    from segdeconv.inference.predictors import PredictionSettings
    from segdeconv.inference.segmenter import Segmenter
    from segdeconv.system.own_files import OwnFiles

KIND = "evaluate"  # in the summary of a part
DIFFERENCES = {"checkpoint": "a different checkpoint", "data": "other images", "arguments": "other settings"}
PACKED, COMPARED = "evaluation.npz", "compared.npz"  # in the folder of a part


@dataclass(frozen=True)
class Saver:
    """Writes the mask and the picture of a prediction; sent to the workers of a cluster.

    Attributes:
        pictured: The indices of the images of which there are pictures.
        written: The files that are not delivered yet, with their folders.
    """

    classes: Classes
    masks: OutputFolder | None
    pictures: OutputFolder | None
    pictured: frozenset[int]
    labels: Labels
    outlines: bool
    window: Window | None
    written: list[tuple[OutputFolder, Path]] = field(default_factory=list)

    def __call__(self, predicted: Predicted) -> None:
        """Write the files of one image."""
        import numpy as np

        from segdeconv.drawing import draw

        dataset, place = predicted.dataset, predicted.place
        if self.masks:
            path = self.masks.path / f"{dataset.names[place]}.png"
            draw.save_mask(predicted.prediction, self.classes, path, labels=self.labels)
            self.written.append((self.masks, path))
        if self.pictures and place in self.pictured:
            image, mask, name = dataset[place]
            image = draw.windowed(image, self.window)
            figure = draw.comparison(image, mask, predicted.prediction, self.classes, outlines=self.outlines)
            figure = draw.enlarged(figure, 128)
            strip = draw.legend(self.classes, range(len(self.classes)), figure.shape[1])
            path = self.pictures.path / f"{name}.png"
            draw.save_image(np.concatenate([figure, strip]), path)
            self.written.append((self.pictures, path))

    def flush(self) -> None:
        """Deliver the files."""
        for folder in filter(None, (self.masks, self.pictures)):
            folder.deliver(path for owner, path in self.written if owner is folder)
        self.written.clear()


def parse(description: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, or that of a part of an evaluation in `words`."""
    parser = ArgumentParser("evaluate.py", description=description)
    add_checkpoint(parser)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="for example dataset.root=DIR")
    add("--split", default="val", help="train, val (default) or test")
    text = "folder for the report (default: evaluation/ next to the checkpoint; for a shipped network, in this folder)"
    add("--out", help=f"{text}, or its address in an object storage, s3://, gs:// or az://")
    add("--compare", metavar="CHECKPOINT", help="a second network with the same classes to compare it with")
    add("--masks", help="folder, or address, for the predicted masks, exactly as scored")
    add("--pictures", help="folder, or address, for figures of image, truth, prediction and error of 12 images")
    add_labels_option(parser, "these masks")
    add_outlines_option(parser)
    add_window_option(parser)
    add("--no-boundary", action="store_true", help="skip boundary scores (20 ms per image of 360x480)")
    add("--ablate", action="store_true", help="also score the network with its switches replaced")
    add("--uncertainty", action="store_true", help="report how well measures of uncertainty detect errors")
    add_prediction_options(parser)
    add_distribution_options(parser)
    return parser.parse_intermixed_args(words)


def planned_files(
    folder: OutputFolder, dataset: SegmentationDataset, places: Iterable[int], ending: str
) -> dict[int, Path]:
    """Return the output file of each image by its index, after a check that no two images have the same one.

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
        names.add(f"{folder}/{name}{ending}", f"image {index} ({name})")
    names.warn()
    return {place: folder.path / f"{dataset.names[place]}{ending}" for place in places}


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
    arguments.out = str(out)
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
    overrides, crf_keys = split_overrides(arguments.overrides)
    if arguments.regions and not any(override.startswith("dataset.examples=") for override in overrides):
        overrides.append("dataset.examples=images")  # a network trained on crops is scored on whole images
    settings = prediction_settings(arguments, crf_keys)
    _require_effect(arguments, settings, whole=not (part or ray))
    window = display_window(arguments.window)

    import numpy as np

    from segdeconv import __version__
    from segdeconv.analysis import ablation, uncertainty
    from segdeconv.checkpoints import cards
    from segdeconv.drawing import draw
    from segdeconv.evaluation.evaluate import batches, class_order, restore_dataset
    from segdeconv.evaluation.parts import combine, evaluate_logged, pack
    from segdeconv.evaluation.progress import EvaluationLog, stamp_digest
    from segdeconv.inference import distributed, parts
    from segdeconv.inference.output_folder import output_folder
    from segdeconv.inference.segmenter import Segmenter
    from segdeconv.system.files import replacing

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
    pictured = frozenset(int(index) for index in np.linspace(0, len(dataset) - 1, 12))
    chosen = batches(segmenter, dataset)
    if part:
        chosen = part.select(chosen)
    places = [place for batch in chosen for place in batch]
    outputs = _plan_outputs(arguments, dataset, places, pictured, part, resumable=merged is None)
    masks, pictures = outputs.folders.get("masks"), outputs.folders.get("pictures")
    save = Saver(checkpoint.classes, masks, pictures, pictured, arguments.labels, arguments.outlines, window)
    boundary = not arguments.no_boundary
    beside = Path() if cards.SHIPPED in checkpoint.path.parents else checkpoint.path.parent
    out = output_folder(arguments.out or str(beside / "evaluation"))
    replaced = read_replaced(out)
    networks = {PACKED: segmenter}
    if other:
        networks[COMPARED] = Segmenter(other, calibrated(arguments, other, settings))
    savers = {PACKED: save, COMPARED: None}
    recorded = {
        "arguments": _words(words),
        "checkpoint": [network.checkpoint.sha256 for network in networks.values()],
        "data": parts.fingerprint(dataset.names),
    }
    report = Report(arguments, words, out, replaced, outputs.folders, dataset, segmenter, other or None, window)

    if merged is not None:
        for one, of_one in merged.items():
            for key, kind in (("checkpoint", "a checkpoint that has changed"), ("data", "other images")):
                if of_one[key] != recorded[key]:
                    raise UsageError(f"part {one} was evaluated with {kind} - evaluate all parts again")
        packed = {name: [one.folder(out.path) / name for one in merged] for name in networks}
        report.write(
            [
                combine({str(path): _read(path) for path in packed[name]}, network, dataset, outlines=boundary)
                for name, network in networks.items()
            ]
        )
        return
    identity = {
        **recorded,
        "version": __version__,
        "arguments": _words(words, "--out", "--engine", "--ray-address", "--workers"),
        "second": settings.second and settings.second.sha256,
    }

    def is_complete(place: int, stamp: bytes) -> bool:
        return (
            place in outputs.files
            and stamp == stamp_digest(dataset, place)
            and all(folder.exists(path) for folder, path in outputs.files[place])
        )

    with ExitStack() as stack:
        if part:
            part.begin(out.path)
        log = EvaluationLog(out, part.folder(out.path) if part else out.path, identity, is_complete)
        stack.enter_context(closing(log))
        for folder, files in outputs.own.items():
            files.record()
            folder.copy_records()
        workers = stack.enter_context(distributed.cluster(ray)) if ray else 0
        evaluations = {
            name: evaluate_logged(
                network,
                dataset,
                log,
                Path(name).stem,
                outlines=boundary,
                chosen=chosen if part else None,  # or else the batches of each network
                save=savers[name],
                workers=workers,
            )
            for name, network in networks.items()
        }
        segmenter.resized.warn()
        if part:
            for name, evaluation in evaluations.items():
                with replacing(part.folder(out.path) / name) as file:
                    file.write(pack(evaluation, places))
            part.finish(out.path, {"kind": KIND, **recorded})
            print(f"part {part}: {len(places)} images in {out}; after all parts: {command('merge', [str(out)])}")
        else:
            report.write(list(evaluations.values()))
        log.remove()


def read_replaced(out: OutputFolder) -> dict[str, Any]:
    """Return the content of the report.json that the report of an evaluation replaces, empty if there is none.

    Raises:
        UsageError: The report would be written over a file that segdeconv did not write.
    """
    from segdeconv.evaluation.report import parse_report
    from segdeconv.system.own_files import foreign_files

    data, page = out.path / "report.json", out.path / "report.html"
    try:
        replaced = parse_report(out.read(data)) if out.exists(data) else None
    except OSError:  # a folder, or a dangling link
        replaced = None
    if replaced is None and (foreign := [path for path in (data, page) if out.exists(path)]):
        raise foreign_files(out.shown(foreign[0]), len(foreign) - 1, "--out")
    return replaced or {}


def _require_effect(arguments: argparse.Namespace, settings: PredictionSettings, *, whole: bool) -> None:
    """Raise UsageError for options that exclude each other or would have no effect.

    Args:
        arguments: The command line.
        settings: The settings of the prediction.
        whole: Whether one process predicts all images.
    """
    for option in ("out", "masks", "pictures"):
        require_folder_of_parts(arguments, option)
    for option in ("ablate", "uncertainty"):
        if getattr(arguments, option) and not whole:
            raise UsageError(f"--{option} needs all images in one process - leave out --shard and --engine")
    if arguments.labels != "index" and not arguments.masks:
        raise UsageError(f"--labels={arguments.labels} has no effect without --masks DIR - add it")
    if arguments.outlines and not arguments.pictures:
        raise UsageError("--outlines has no effect without --pictures DIR - add it")
    if settings.precision == "int8" and (arguments.ablate or arguments.uncertainty):
        raise UsageError("--ablate and --uncertainty need float maps - leave out --precision int8")


@dataclass(frozen=True)
class Outputs:
    """The files that an evaluation writes beside its report.

    Attributes:
        folders: The folder of each option that names one.
        files: The files of each image by its index, with their folders.
        own: What each folder records of the files that are the command's own.
    """

    folders: dict[str, OutputFolder]
    files: dict[int, list[tuple[OutputFolder, Path]]]
    own: dict[OutputFolder, OwnFiles]


def _plan_outputs(
    arguments: argparse.Namespace,
    dataset: SegmentationDataset,
    places: Sequence[int],
    pictured: frozenset[int],
    part: Part | None,
    *,
    resumable: bool,
) -> Outputs:
    """Plan the outputs of the images `places`, of which those that are `pictured` have a picture.

    Raises:
        UsageError: Two images or two options have the same file, or a file would be written over.
    """
    from segdeconv.inference.output_folder import output_folder

    outputs = Outputs({}, {place: [] for place in places}, {})
    taken: set[str] = set()
    for option in ("masks", "pictures", "save_regions"):
        if not getattr(arguments, option):
            continue
        folder = outputs.folders[option] = output_folder(str(getattr(arguments, option)))
        if resumable:
            folder.fetch_records()
        shown = sorted(pictured & set(places)) if option == "pictures" else places
        planned = planned_files(folder, dataset, shown, ".npz" if option == "save_regions" else ".png")
        name = f"--{option.replace('_', '-')}"
        real = {os.path.realpath(path) if folder.on_disk else folder.shown(path) for path in planned.values()}
        if twice := taken & real:
            raise UsageError(f"--masks and --pictures would both write {min(twice)} - choose another {name}")
        taken |= real
        for place, path in planned.items():
            outputs.files[place].append((folder, path))
        owner = f"-{part.index}-of-{part.count}" if part else ""
        outputs.own[folder] = folder.own_files(name, owner=owner)
        outputs.own[folder].add(planned.values(), inputs=dataset.files)
    return outputs


@dataclass(frozen=True)
class Report:
    """The report of an evaluation: what is written, and what is printed.

    Attributes:
        arguments: The command line.
        words: The command line as a list of strings, for the report.
        out: The folder of the report.
        replaced: The content of the report.json that is there; empty if there is none.
        folders: The other output folders by option.
        dataset: The data set.
        segmenter: The network.
        other: The checkpoint that it is compared with.
        window: The display window of images that are no photos.
    """

    arguments: argparse.Namespace
    words: Sequence[str]
    out: OutputFolder
    replaced: Mapping[str, Any]
    folders: Mapping[str, OutputFolder]
    dataset: SegmentationDataset
    segmenter: Segmenter
    other: Checkpoint | None
    window: Window | None

    def write(self, evaluations: Sequence[Evaluation]) -> None:
        """Write report.json and report.html, and print the scores.

        Args:
            evaluations: Of the network and, if there is one, of the other.
        """
        from segdeconv.analysis import ablation, uncertainty
        from segdeconv.drawing import html
        from segdeconv.evaluation import report, report_page
        from segdeconv.evaluation.learning_curve import curve_beside

        evaluation, compared = evaluations[0], evaluations[-1]
        if not evaluation.confusion.any():
            split = self.arguments.split
            warn(f"{split}: every pixel of its masks is ignored, so there are no scores - correct the masks")
        metadata: dict[str, Any] = {"command": command("evaluate", self.words)}
        if self.arguments.ablate:
            metadata["ablation"] = ablation.ablate(evaluation)
        if self.arguments.uncertainty:
            metadata["uncertainty"] = uncertainty.uncertainty(self.segmenter, self.dataset)
        content = evaluation.report(**metadata)
        second = None
        if self.other:
            content["compared"] = compared.report()
            second = report_page.Evaluated(content["compared"], compared.gallery, curve_beside(self.other.path))
        data, page = self.out.path / "report.json", self.out.path / "report.html"
        report.write_json(content, data)
        curve = curve_beside(self.segmenter.checkpoint.path)
        first = report_page.Evaluated(content, evaluation.gallery, curve)
        html.write(report_page.build_page(first, self.dataset, second=second, window=self.window), page)
        self.out.deliver([data, page])
        print(f"{evaluation.verdict()}\n\n{evaluation.score_table()}")
        if self.other:
            print(f"\n{self.other.path}:\n{compared.verdict()}\n\n{compared.score_table()}")
        if self.arguments.ablate:
            print(f"\n{ablation.ablation_table(metadata['ablation'])}")
        if self.arguments.uncertainty:
            print(f"\n{uncertainty.uncertainty_table(metadata['uncertainty'])}")
        print(f"\nreport:   {self.out.shown(page)} (and report.json)")
        if self.replaced and any(self.replaced.get(key) != content.get(key) for key in ("checkpoint_sha256", "split")):
            print(f"replaced: the report of {self.replaced.get('checkpoint')}, split {self.replaced['split']}")
        for option in ("masks", "pictures"):
            if option in self.folders:
                print(f"{option + ':':<10}{self.folders[option]}")


def _words(words: Sequence[str], *without: str) -> list[str]:
    """Return the words of a command line without --shard, --trust, which a file must not grant, and other options."""
    kept = list(words)
    for option in ("--shard", "--trust", *without):
        while pop_option(kept, option) is not None:
            pass
    return kept


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise UsageError(f"{path} is missing - evaluate this part again")
    return path.read_bytes()
