"""Write a network as a file that other programs run.

    python scripts/export.py CHECKPOINT --out FILE.onnx|FILE.pt2|FILE.safetensors [--preprocess] [--argmax] [--half]

FILE.onnx runs in ONNX Runtime, OpenVINO, TensorRT and others, FILE.pt2 in torch without this package; FILE.safetensors
is weights to share, which every command here takes as a CHECKPOINT. Beside each stands FILE.json: classes, colours,
preprocessing, names and shapes. Images may have any size and number. A file is run beside the network and compared
before it gets its name.
"""

import json
from pathlib import Path
from typing import Any

from segdeconv.cli.command import ArgumentParser, run_command
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import UsageError


def main() -> None:
    """Parse, read, export."""
    parser = ArgumentParser("export.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a .ckpt that train.py wrote, a .safetensors, or a shipped network")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.size=[360,480]")
    parser.add_argument("--out", type=Path, required=True, help="a file that ends in .onnx, .pt2 or .safetensors")
    parser.add_argument("--preprocess", action="store_true", help="take images as they are stored, of any size")
    parser.add_argument("--layout", choices=("nhwc", "nchw"), help="their axes, with --preprocess (default nhwc)")
    parser.add_argument("--argmax", action="store_true", help="give class indices, not logits")
    parser.add_argument("--half", action="store_true", help="keep weights in 16 bits: half the file")
    parser.add_argument("--about", type=Path, help="a YAML file of what a card shall say too: scores, licence, limits")
    parser.add_argument("--trust", action="append", default=[], help="a class of your own that the config names")
    arguments = parser.parse_intermixed_args()
    if arguments.layout and not arguments.preprocess:
        raise UsageError(f"--layout {arguments.layout} is for images as they are stored - add --preprocess")

    from segdeconv.checkpoints import cards, checkpoint

    if arguments.about and arguments.out.suffix != cards.SUFFIX:
        raise UsageError(f"--about is for {cards.SUFFIX} - leave it out")
    about = read_about(arguments.about) if arguments.about else None
    read = read_checkpoint(arguments.checkpoint, arguments.trust, arguments.overrides)
    out: Path = arguments.out
    if out.suffix == cards.SUFFIX:
        if arguments.preprocess or arguments.argmax:
            raise UsageError(f"--preprocess and --argmax are of graphs, and {out} holds weights - leave them out")
        checkpoint.write_weights(read, out, half=arguments.half, about=about)
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; config, classes and preprocessing in {cards.card_of(out)}")
        return

    from segdeconv.export.export import export
    from segdeconv.export.module import Layout

    pixels: Layout | None = (arguments.layout or "nhwc") if arguments.preprocess else None
    card = export(read, out, pixels=pixels, argmax=arguments.argmax, half=arguments.half)
    agreed, given, gives = card["verified"], card["input"], card["output"]
    shapes = " and ".join("x".join(map(str, shape)) for shape in agreed["shapes"])
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; how to use it in {cards.card_of(out)}")
    for what, it in (("input", given), ("output", gives)):
        print(f"{what}: {it['name']}, {it['dtype']}, ({', '.join(map(str, it['shape']))})")
    largest = f", scores within {agreed['largest']:.1e} of their standard deviation" if agreed["largest"] else ""
    print(f"compared on {shapes}: {100 * agreed['same_class']:.2f} % of the pixels have the same class{largest}")
    if agreed["same_class_as_full"] is not None:
        print(f"weights of 16 bits: {100 * agreed['same_class_as_full']:.2f} % have the same class as with 32")


def read_about(path: Path) -> dict[str, Any]:
    """What a YAML file says, as a card can hold it."""
    import yaml

    try:
        about = yaml.safe_load(path.read_text(encoding="utf-8"))
        json.dumps(about)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
        raise UsageError(
            f"--about {path} cannot be read as plain YAML ({type(error).__name__}) - write lines such as 'licence: "
            "CC-BY-4.0'; quote dates"
        ) from error
    if not isinstance(about, dict) or {"format", "config", "facts", "sha256"} & set(about):
        raise UsageError(
            f"--about {path} should hold names of its own and what they say - 'format', 'config', 'facts' and 'sha256' "
            "are the card's"
        )
    return about


if __name__ == "__main__":
    run_command(main)
