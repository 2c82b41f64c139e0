"""Draw figures of a network: its switches and their paths, the stages of the decoder, and the responses of units.

    python scripts/visualize.py CHECKPOINT [IMAGE_OR_FOLDER ...] [--out DIR] [key=value ...]

Without images, the validation split of the checkpoint's data set is used. Writes PNG figures: NAME_switches, NAME_flow,
NAME_stages and NAME_stability for the first images, and units_LAYER for each layer; index.html shows all of them. A
network without unpooling has no stages, and one whose pools store no switches has only units; missing figures are
reported.
"""

import html
import os
from pathlib import Path
from typing import Any

from segdeconv.cli.command import ArgumentParser, run_command
from segdeconv.cli.options import add_checkpoint, add_network_options, is_override, refuse_int8
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import UsageError, did_you_mean

KINDS = "switches,flow,stages,stability,units"


def main() -> int:
    """Parse the command line, read the checkpoint and draw the figures of images and layers."""
    parser = ArgumentParser("visualize.py", description=__doc__.splitlines()[0])
    add_checkpoint(parser)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="images, folders, patterns, lists; then key=value")
    parser.add_argument("--out", type=Path, default=Path("visualized"), help="folder (default: visualized)")
    parser.add_argument(
        "--only", default=KINDS, metavar="KIND,...", help=f"kinds of figures to draw (default: {KINDS})"
    )
    parser.add_argument("--images", type=int, default=3, help="number of images to draw figures of (default 3)")
    parser.add_argument("--class", dest="label", help="class shown in the stages of the decoder (default: the largest)")
    parser.add_argument("--layers", metavar="NAME,...", help="modules whose units are shown (default: encoder stages)")
    parser.add_argument("--maps", metavar="N,...", help="indices of the units (default: random)")
    parser.add_argument("--num-maps", type=int, default=6, help="number of random units (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice (default 0)")
    parser.add_argument("--search", type=int, default=200, help="most images to search for activations (default 200)")
    add_network_options(parser)
    arguments = parser.parse_intermixed_args()
    refuse_int8(arguments.precision)
    overrides = [path for path in arguments.paths if is_override(path)]
    kinds = arguments.only.split(",")
    for kind in kinds:
        if kind not in KINDS.split(","):
            raise UsageError(f"--only {kind} is not a kind of figure - {did_you_mean(kind, KINDS.split(','))}")
    maps = numbers(arguments.maps) if arguments.maps else None
    for name in ("images", "num_maps", "search"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}={getattr(arguments, name)} is too few - give 1 or more")
    paths = [path for path in arguments.paths if not is_override(path)]

    from tqdm import tqdm

    from segdeconv.analysis.visualization import Visualizer, of_dataset, of_files
    from segdeconv.drawing import draw
    from segdeconv.evaluation.evaluate import restore_dataset
    from segdeconv.inference.inputs import find_images
    from segdeconv.inference.predictors import PredictionSettings
    from segdeconv.inference.segmenter import Segmenter

    files = find_images(paths, arguments.out, [f"_{kind}.png" for kind in kinds]) if paths else {}
    checkpoint = read_checkpoint(arguments.checkpoint, arguments.trust, overrides)
    names = checkpoint.classes.names
    if arguments.label is not None and arguments.label not in names:
        raise UsageError(
            f"--class {arguments.label} is not a class of {checkpoint.path} - {did_you_mean(arguments.label, names)}"
        )
    label = names.index(arguments.label) if arguments.label is not None else None
    settings = PredictionSettings(precision=arguments.precision, samples=arguments.samples)
    visualizer = Visualizer(Segmenter(checkpoint, settings))
    images = of_files(files, checkpoint.preprocessing) if files else of_dataset(restore_dataset(checkpoint, "val"))
    written: list[str] = []

    def write(name: str, figure: Any) -> None:
        draw.save_image(figure, arguments.out / f"{name}.png")
        written.append(f"{name}.png")

    lacking = {kind: visualizer.lacking(kind) for kind in kinds}
    for reason in dict.fromkeys(filter(None, lacking.values())):
        print(f"without {', '.join(kind for kind in kinds if lacking[kind] == reason)}: {reason}")
    if set(kinds) - {"units"}:
        for image in tqdm(images[: arguments.images], unit="image", disable=None):
            for kind, figure in visualizer.figures(image, kinds, label=label).items():
                write(f"{image.name}_{kind}", figure)
    if "units" in kinds:
        layers = arguments.layers.split(",") if arguments.layers else visualizer.layers()
        if not layers:
            raise UsageError(f"{checkpoint.path} has no encoder with stages - name its modules with --layers")
        step = max(1, len(images) // arguments.search)
        searched = images[::step][: arguments.search]
        strongest = visualizer.strongest(searched, layers)
        for layer in tqdm(layers, unit="layer", disable=None):
            figure = visualizer.units_figure(
                searched, strongest, layer, maps=maps, num=arguments.num_maps, seed=arguments.seed
            )
            write(f"units_{layer}", figure)
    if not written:
        raise UsageError(
            f"{checkpoint.path} has no figures for --only {arguments.only}, for the reasons above - try --only units"
        )
    write_index(arguments.out, checkpoint.path.name, written)
    print(f"{len(written)} figures in {arguments.out}; {arguments.out / 'index.html'} shows them all")
    return 0


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


def numbers(text: str) -> list[int]:
    """Parse a list of integers such as `0,5,9`.

    Raises:
        UsageError: The text is not a list of integers.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--maps {text} is not a list of numbers - give for example --maps 0,5,9") from error


if __name__ == "__main__":
    run_command(main)
