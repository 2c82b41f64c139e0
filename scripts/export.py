"""Export a network to a file that other programs can run.

    python scripts/export.py CHECKPOINT --out FILE.onnx|FILE.pt2|FILE.safetensors [--preprocess] [--argmax] [--half]

FILE.onnx runs in ONNX Runtime, OpenVINO, TensorRT and others, FILE.pt2 in torch without this package. FILE.safetensors
contains weights for sharing, which every command here accepts as a CHECKPOINT. Each comes with a card, FILE.json:
classes, colours, preprocessing, names and shapes. Batch and image size are free. An exported graph is run and compared
with the network before the file is written.
"""

from pathlib import Path
from typing import Any

from segdeconv.cli.command import ArgumentParser, run_command
from segdeconv.cli.options import add_checkpoint
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import UsageError
from segdeconv.system.plain_data import PlainDataError, read_yaml


def main() -> None:
    """Parse the command line, read the checkpoint and export it."""
    parser = ArgumentParser("export.py", description=__doc__.splitlines()[0])
    add_checkpoint(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.size=[360,480]")
    parser.add_argument("--out", type=Path, required=True, help="a file that ends in .onnx, .pt2 or .safetensors")
    parser.add_argument("--preprocess", action="store_true", help="include preprocessing: input is stored images")
    parser.add_argument("--layout", choices=("nhwc", "nchw"), help="axes of stored images (default nhwc)")
    parser.add_argument("--argmax", action="store_true", help="output class indices instead of logits")
    parser.add_argument("--half", action="store_true", help="store weights in 16 bits, for half the file size")
    parser.add_argument(
        "--about", type=Path, help="a YAML file of further entries of the card: scores, licence, limits"
    )
    parser.add_argument("--trust", action="append", default=[], help="allow a class of your own that the config names")
    arguments = parser.parse_intermixed_args()
    if arguments.layout and not arguments.preprocess:
        raise UsageError(f"--layout {arguments.layout} has no effect without --preprocess - add it")

    from segdeconv.checkpoints import cards, checkpoint

    if arguments.about and arguments.out.suffix != cards.SUFFIX:
        raise UsageError(f"--about is only for {cards.SUFFIX} files - leave it out")
    about = read_about(arguments.about) if arguments.about else None
    source = read_checkpoint(arguments.checkpoint, arguments.trust, arguments.overrides)
    out: Path = arguments.out
    if out.suffix == cards.SUFFIX:
        if arguments.preprocess or arguments.argmax:
            raise UsageError(f"--preprocess and --argmax are for graphs, but {out} holds weights - leave them out")
        checkpoint.write_weights(source, out, half=arguments.half, about=about)
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; config, classes and preprocessing in {cards.card_of(out)}")
        return

    from segdeconv.export.export import export
    from segdeconv.export.module import Layout
    from segdeconv.system.devices import resolve_precision

    pixels: Layout | None = (arguments.layout or "nhwc") if arguments.preprocess else None
    card = export(source, out, pixels=pixels, argmax=arguments.argmax, half=arguments.half)
    agreement = card["verified"]
    shapes = " and ".join("x".join(map(str, shape)) for shape in agreement["shapes"])
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; usage is described in {cards.card_of(out)}")
    for side in ("input", "output"):
        print(f"{side}: {card[side]['name']}, {card[side]['dtype']}, ({', '.join(map(str, card[side]['shape']))})")
    print(f"scale: {describe_scale(source.preprocessing.size, in_graph=arguments.preprocess)}")
    precision = resolve_precision("auto", source.facts["precision"])
    if precision != "32-true":
        print(
            f"precision: the file computes in float32 and predict, on this machine, in {precision}, so some pixels get "
            "other classes; predict --precision 32-true gives those of the file"
        )
    largest = f", scores within {agreement['largest']:.1e} standard deviations" if agreement["largest"] else ""
    print(f"compared on {shapes}: {100 * agreement['same_class']:.2f} % of the pixels have the same class{largest}")
    if agreement["same_class_as_full"] is not None:
        print(f"16-bit weights: {100 * agreement['same_class_as_full']:.2f} % have the same class as with 32 bits")


def describe_scale(size: tuple[int, int] | None, *, in_graph: bool) -> str:
    """Return what the input size of the network means for the images given to an exported file."""
    if size is None:
        return "images of any size, at their own scale, as in training"
    target = f"{size[0]}x{size[1]} (height x width), the network's input size"
    if in_graph:
        return f"images of any size, which the graph resizes to {target}"
    return f"resize images to {target}, before you give them to the file"


def read_about(path: Path) -> dict[str, Any]:
    """Read a YAML file of entries for the card.

    Raises:
        UsageError: The file is not plain YAML that JSON can represent, or sets an entry of the card itself.
    """
    try:
        about = read_yaml(path)
    except PlainDataError as error:
        raise UsageError(f"--about {path} {error} - write lines such as 'licence: CC-BY-4.0'") from error
    except OSError as error:
        raise UsageError(f"--about {path} cannot be read ({type(error).__name__}) - give a YAML file") from error
    if not isinstance(about, dict) or {"format", "config", "facts", "sha256"} & set(about):
        raise UsageError(
            f"--about {path} must be a mapping without the keys 'format', 'config', 'facts' and 'sha256', which the "
            "card sets itself - rename them"
        )
    return about


if __name__ == "__main__":
    run_command(main)
