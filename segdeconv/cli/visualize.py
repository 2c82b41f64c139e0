"""The command `visualize`, which draws figures of a network's switches, decoder and units, and explains predictions."""

from __future__ import annotations

import argparse
import html
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdeconv.cli.command import ArgumentParser, local_path
from segdeconv.cli.options import add_checkpoint, add_network_options, is_override, refuse_int8
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import SegdeconvError, UsageError, did_you_mean

if TYPE_CHECKING:
    from segdeconv.analysis.explanation import Explanation, Question
    from segdeconv.analysis.visualization import InputImage, Visualizer
    from segdeconv.checkpoints.checkpoint import Checkpoint

KINDS = "switches,flow,stages,stability,units"
FLOAT64 = "64-true"
EXPLANATION_PRECISIONS = ("auto", "32-true", FLOAT64)


def parse(description: str) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser("visualize.py", description=description)
    add_checkpoint(parser)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="images, folders, patterns, lists; then key=value")
    parser.add_argument("--out", type=local_path, default=Path("visualized"), help="folder (default: visualized)")
    text = f"kinds of figures to draw (default: {KINDS}; none with --explain)"
    parser.add_argument("--only", metavar="KIND,...", help=text)
    parser.add_argument("--images", type=int, default=3, help="number of images to draw figures of (default 3)")
    parser.add_argument("--class", dest="label", help="class shown in the stages of the decoder (default: the largest)")
    parser.add_argument("--layers", metavar="NAME,...", help="modules whose units are shown (default: encoder stages)")
    parser.add_argument("--maps", metavar="N,...", help="indices of the units (default: random)")
    parser.add_argument("--num-maps", type=int, default=6, help="number of random units (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice (default 0)")
    parser.add_argument("--search", type=int, default=200, help="most images to search for activations (default 200)")
    text = "docs/explanations.md; rows and columns count from 0 in the image as stored; --precision 64-true is possible"
    add = parser.add_argument_group("explanations", text).add_argument
    text = "explain the pixel in row Y and column X: contributions that add up to its logits; may be repeated"
    add("--explain", action="append", default=[], metavar="Y,X", help=text)
    text = "explain the predicted region that contains this pixel: the sum of its logits; may be repeated"
    add("--explain-region", action="append", default=[], metavar="Y,X", help=text)
    text = "explain why A and not B (default: the predicted class and the one with the next largest logit)"
    add("--classes", metavar="A,B", help=text)
    add_network_options(parser)
    return parser.parse_intermixed_args()


def run(description: str) -> None:
    """Run the command: read the checkpoint, draw the figures of images and layers, and explain predictions."""
    arguments = parse(description)
    refuse_int8(arguments.precision)
    overrides = [path for path in arguments.paths if is_override(path)]
    questions = parse_questions(arguments)
    only = arguments.only if arguments.only is not None else "" if questions else KINDS
    kinds = only.split(",") if only or not questions else []
    for kind in kinds:
        if kind not in KINDS.split(","):
            raise UsageError(f"--only {kind} is not a kind of figure - {did_you_mean(kind, KINDS.split(','))}")
    maps = numbers(arguments.maps, "--maps", "--maps 0,5,9") if arguments.maps else None
    for name in ("images", "num_maps", "search"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}={getattr(arguments, name)} is too few - give 1 or more")
    paths = [path for path in arguments.paths if not is_override(path)]

    from segdeconv.analysis.visualization import Visualizer, of_dataset, of_files
    from segdeconv.drawing import draw
    from segdeconv.evaluation.evaluate import restore_dataset
    from segdeconv.inference.inputs import find_images
    from segdeconv.inference.predictors import PredictionSettings
    from segdeconv.inference.segmenter import Segmenter

    endings = [f"_{kind}.png" for kind in kinds] + [f"_{question.name}.png" for question in questions]
    files = find_images(paths, arguments.out, endings) if paths else {}
    checkpoint = read_checkpoint(arguments.checkpoint, arguments.trust, overrides)
    label = None if arguments.label is None else class_index(checkpoint, "--class", arguments.label)
    classes = None if arguments.classes is None else two_classes(checkpoint, arguments.classes)
    precision = "32-true" if questions and arguments.precision == FLOAT64 else arguments.precision
    visualizer = Visualizer(Segmenter(checkpoint, PredictionSettings(precision=precision, samples=arguments.samples)))
    images = of_files(files, checkpoint.preprocessing) if files else of_dataset(restore_dataset(checkpoint, "val"))
    written: list[str] = []

    def write(name: str, figure: Any) -> None:
        draw.save_image(figure, arguments.out / f"{name}.png")
        written.append(f"{name}.png")

    lacking = {kind: visualizer.lacking(kind) for kind in kinds}
    for reason in dict.fromkeys(filter(None, lacking.values())):
        print(f"without {', '.join(kind for kind in kinds if lacking[kind] == reason)}: {reason}")
    inexact: list[Explanation] = []
    if questions:
        float64 = arguments.precision == FLOAT64
        inexact = explain(visualizer, images[: arguments.images], questions, classes, arguments.out, write, float64)
    if set(kinds) - {"units"}:
        from tqdm import tqdm

        for image in tqdm(images[: arguments.images], unit="image", disable=None):
            for kind, figure in visualizer.figures(image, kinds, label=label).items():
                write(f"{image.name}_{kind}", figure)
    if "units" in kinds:
        draw_units(visualizer, images, arguments, maps, write)
    if written:
        write_index(arguments.out, checkpoint.path.name, written)
        figures = f"{len(written)} figure{'s' if written[1:] else ''}"
        print(f"{figures} in {arguments.out}; see {arguments.out / 'index.html'}")
    if inexact:
        operations = dict.fromkeys(operation for each in inexact for operation in each.non_affine)
        raise SegdeconvError(
            f"{len(inexact)} explanation(s) do not add up to the logits, so no figure of them is drawn: the network "
            f"has operations that are not affine ({', '.join(operations) or 'which could not be determined'}) - "
            "explain a network of convolutions, batch norms, ReLUs, pools and linear resizing"
        )
    if not written:
        raise UsageError(
            f"{checkpoint.path} has no figures for --only {arguments.only}, for the reasons above - try --only units"
        )


def draw_units(
    visualizer: Visualizer,
    images: Sequence[InputImage],
    arguments: argparse.Namespace,
    maps: Sequence[int] | None,
    write: Callable[[str, Any], None],
) -> None:
    """Draw the figures of the units of layers.

    Raises:
        UsageError: No layers are named, and the network has no encoder with stages.
    """
    from tqdm import tqdm

    layers = arguments.layers.split(",") if arguments.layers else visualizer.layers()
    if not layers:
        path = visualizer.checkpoint.path
        raise UsageError(f"{path} has no encoder with stages - name its modules with --layers")
    step = max(1, len(images) // arguments.search)
    searched = images[::step][: arguments.search]
    strongest = visualizer.strongest(searched, layers)
    for layer in tqdm(layers, unit="layer", disable=None):
        figure = visualizer.units_figure(
            searched, strongest, layer, maps=maps, num=arguments.num_maps, seed=arguments.seed
        )
        write(f"units_{layer}", figure)


def explain(
    visualizer: Visualizer,
    images: Sequence[InputImage],
    questions: Sequence[Question],
    classes: tuple[int, int] | None,
    out: Path,
    write: Callable[[str, Any], None],
    float64: bool,
) -> list[Explanation]:
    """Answer questions about images: print the sums, and write figures, numbers (.json) and maps (.npz).

    Returns:
        The explanations that do not add up, of which no figure is drawn.
    """
    import json

    import numpy as np

    from segdeconv.analysis.figures import explanation_figure
    from segdeconv.system.files import replace_text, replacing

    explainer = visualizer.explainer(float64=float64)
    inexact = []
    for source in images:
        image, _ = source.load()
        for answer in explainer.explain_all(image, questions, name=source.name, classes=classes):
            print(f"{source.name}, {answer.text()}")
            name = f"{source.name}_{answer.question.name}"
            replace_text(out / f"{name}.json", json.dumps(answer.to_dict(), indent=1) + "\n")
            with replacing(out / f"{name}.npz") as file:
                np.savez_compressed(file, allow_pickle=False, **answer.arrays())
            if answer.exact:
                write(name, explanation_figure(source.name, image, answer, visualizer.classes))
            else:
                inexact.append(answer)
    return inexact


def parse_questions(arguments: argparse.Namespace) -> list[Question]:
    """Return the questions of --explain and --explain-region.

    Raises:
        UsageError: An option is invalid, or has no effect.
    """
    given = [("--explain", text) for text in arguments.explain]
    given += [("--explain-region", text) for text in arguments.explain_region]
    if not given:
        if arguments.classes is not None:
            raise UsageError("--classes has no effect without --explain Y,X or --explain-region Y,X - add one")
        return []
    if arguments.precision not in EXPLANATION_PRECISIONS:
        raise UsageError(
            f"--precision {arguments.precision}: explanations add up to rounding in float32 or float64 only - use "
            f"{' or '.join(EXPLANATION_PRECISIONS[1:])}"
        )
    if arguments.samples and not arguments.only:
        raise UsageError("--samples has no effect on explanations, which are of a pass without dropout - leave it out")
    from segdeconv.analysis.explanation import Question

    questions = []
    for option, text in given:
        place = numbers(text, option, f"{option} 120,300 for row 120 and column 300")
        if len(place) != 2 or min(place) < 0:
            raise UsageError(f"{option} {text} is not a row and a column - give for example {option} 120,300")
        questions.append(Question(place[0], place[1], option == "--explain-region"))
    return list(dict.fromkeys(questions))


def two_classes(checkpoint: Checkpoint, text: str) -> tuple[int, int]:
    """Return the indices of the classes of --classes.

    Raises:
        UsageError: They are not two different classes.
    """
    names = checkpoint.classes.names
    # A name may contain a comma.
    pairs = [(text[:at], text[at + 1 :]) for at, letter in enumerate(text) if letter == ","]
    if not pairs:
        raise UsageError(f"--classes {text} is not two classes - give for example --classes {names[0]},{names[-1]}")
    class_, other = next((pair for pair in pairs if set(pair) <= set(names)), pairs[0])
    found = class_index(checkpoint, "--classes", class_), class_index(checkpoint, "--classes", other)
    if found[0] == found[1]:
        raise UsageError(f"--classes {text} names one class twice - give two different ones")
    return found


def class_index(checkpoint: Checkpoint, option: str, name: str) -> int:
    """Return the index of a class.

    Raises:
        UsageError: The checkpoint has no such class.
    """
    names = checkpoint.classes.names
    if name not in names:
        raise UsageError(f"{option} {name} is not a class of {checkpoint.path} - {did_you_mean(name, names)}")
    return names.index(name)


def write_index(out: Path, title: str, names: list[str]) -> None:
    """Write a page with all figures."""
    from urllib.parse import quote

    from segdeconv.system.files import replace_text

    figures = "\n".join(
        f'<figure><img src="{quote(os.fsencode(name))}" alt="{html.escape(name)}" style="max-width:100%"></figure>'
        for name in names
    )
    head = f'<!doctype html>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
    replace_text(out / "index.html", f"{head}{figures}\n")


def numbers(text: str, option: str, example: str) -> list[int]:
    """Parse a list of integers such as `0,5,9`.

    Raises:
        UsageError: The text is not a list of integers.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {text} is not a list of numbers - give for example {example}") from error
