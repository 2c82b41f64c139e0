"""Draw what a network sees: its switches, where they lead, how the decoder builds a mask, what units respond to.

    python scripts/visualize.py CHECKPOINT [IMAGE_OR_FOLDER ...] [--out DIR] [key=value ...]

Without pictures it takes the validation split of the checkpoint's data set. Writes PNG figures, for the first images
NAME_switches, NAME_flow, NAME_stages and NAME_stability, for each layer units_LAYER, and index.html with all of them.
A network without unpooling has no stages, and one whose pools keep no switches only units; that is said.
"""

import html
from pathlib import Path
from typing import Any

from segdeconv.cli.command import ArgumentParser, run_command
from segdeconv.cli.options import add_network_options, is_override
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import UsageError, did_you_mean

KINDS = "switches,flow,stages,stability,units"


def main() -> int:
    """Parse, restore, draw each image and each layer."""
    parser = ArgumentParser("visualize.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a .ckpt that train.py wrote")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="pictures, folders, patterns, lists; then key=value")
    parser.add_argument("--out", type=Path, default=Path("visualized"), help="folder (default: visualized)")
    parser.add_argument("--only", default=KINDS, metavar="KIND,...", help=f"which sheets (default: {KINDS})")
    parser.add_argument("--images", type=int, default=3, help="how many images have sheets of their own (default 3)")
    parser.add_argument("--class", dest="label", help="whose way through the decoder is shown (default: the largest)")
    parser.add_argument("--layers", metavar="NAME,...", help="modules whose units are shown (default: encoder stages)")
    parser.add_argument("--maps", metavar="N,...", help="numbers of the units (default: some at random)")
    parser.add_argument("--num-maps", type=int, default=6, help="how many at random (default 6)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice at random (default 0)")
    parser.add_argument("--search", type=int, default=200, help="most images to search for activations (default 200)")
    add_network_options(parser)
    arguments = parser.parse_intermixed_args()
    overrides = [path for path in arguments.paths if is_override(path)]
    kinds = arguments.only.split(",")
    for kind in kinds:
        if kind not in KINDS.split(","):
            raise UsageError(f"--only {kind} is no kind of sheet - {did_you_mean(kind, KINDS.split(','))}")
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
    read = read_checkpoint(arguments.checkpoint, arguments.trust, overrides)
    names = read.classes.names
    if arguments.label is not None and arguments.label not in names:
        raise UsageError(
            f"--class {arguments.label} is no class of {read.path} - {did_you_mean(arguments.label, names)}"
        )
    label = names.index(arguments.label) if arguments.label is not None else None
    settings = PredictionSettings(precision=arguments.precision, samples=arguments.samples)
    visualizer = Visualizer(Segmenter(read, settings))
    pictures = of_files(files, read.preprocessing) if files else of_dataset(restore_dataset(read, "val"))
    written: list[str] = []

    def write(name: str, figure: Any) -> None:
        draw.save_image(figure, arguments.out / f"{name}.png")
        written.append(f"{name}.png")

    lacking = {kind: visualizer.lacking(kind) for kind in kinds}
    for reason in dict.fromkeys(filter(None, lacking.values())):
        print(f"without {', '.join(kind for kind in kinds if lacking[kind] == reason)}: {reason}")
    if set(kinds) - {"units"}:
        for picture in tqdm(pictures[: arguments.images], unit="image", disable=None):
            for kind, figure in visualizer.figures(picture, kinds, label=label).items():
                write(f"{picture.name}_{kind}", figure)
    if "units" in kinds:
        layers = arguments.layers.split(",") if arguments.layers else visualizer.layers()
        if not layers:
            raise UsageError(f"{read.path} has no encoder with stages - name modules of it with --layers")
        step = max(1, len(pictures) // arguments.search)
        searched = pictures[::step][: arguments.search]
        strongest = visualizer.strongest(searched, layers)
        for layer in tqdm(layers, unit="layer", disable=None):
            sheet = visualizer.units_figure(
                searched, strongest, layer, maps=maps, num=arguments.num_maps, seed=arguments.seed
            )
            write(f"units_{layer}", sheet)
    if not written:
        raise UsageError(
            f"{read.path} has nothing to show of --only {arguments.only}, as said above - try --only units"
        )
    write_index(arguments.out, read.path.name, written)
    print(f"{len(written)} sheets in {arguments.out}; {arguments.out / 'index.html'} shows them all")
    return 0


def write_index(out: Path, title: str, names: list[str]) -> None:
    """One page with all sheets."""
    from urllib.parse import quote

    from segdeconv.system.files import replace_text

    shown = "\n".join(
        f'<figure><img src="{quote(name)}" alt="{html.escape(name)}" style="max-width:100%"></figure>' for name in names
    )
    head = f'<!doctype html>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
    replace_text(out / "index.html", f"{head}{shown}\n")


def numbers(text: str) -> list[int]:
    """`0,5,9` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--maps {text} is no list of numbers - give for example --maps 0,5,9") from error


if __name__ == "__main__":
    run_command(main)
