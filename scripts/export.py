"""Export a network to a file that other programs can run.

    python scripts/export.py CHECKPOINT --out FILE.onnx|FILE.pt2|FILE.safetensors [--preprocess] [--argmax] [--half]

FILE.onnx runs in ONNX Runtime, OpenVINO, TensorRT and others, FILE.pt2 in torch without this package. FILE.safetensors
contains weights for sharing, which every command here accepts as a CHECKPOINT. Each comes with a card, FILE.json:
classes, colours, preprocessing, names and shapes. Batch and image size are free. An exported graph is run and compared
with the network before the file is written. --int8 computes convolutions in 8 bits, if the scores on val allow it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdeconv.cli.command import ArgumentParser, local_path, run_command
from segdeconv.cli.options import add_checkpoint, add_max_loss_option
from segdeconv.cli.own_code import read_checkpoint
from segdeconv.errors import UsageError
from segdeconv.system.plain_data import PlainDataError, read_yaml

if TYPE_CHECKING:
    import numpy as np

    from segdeconv.checkpoints.checkpoint import Checkpoint
    from segdeconv.export.export import Int8


def main() -> None:
    """Parse the command line, read the checkpoint and export it."""
    parser = ArgumentParser("export.py", description=__doc__.splitlines()[0])
    add_checkpoint(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example dataset.size=[360,480]")
    parser.add_argument("--out", type=local_path, required=True, help="a file that ends in .onnx, .pt2 or .safetensors")
    parser.add_argument("--preprocess", action="store_true", help="include preprocessing: input is stored images")
    parser.add_argument("--layout", choices=("nhwc", "nchw"), help="axes of stored images (default nhwc)")
    parser.add_argument("--argmax", action="store_true", help="output class indices instead of logits")
    parser.add_argument("--half", action="store_true", help="store weights in 16 bits, for half the file size")
    parser.add_argument("--int8", action="store_true", help="8-bit convolutions, if the scores stay what they are")
    add_max_loss_option(parser)
    parser.add_argument(
        "--about", type=local_path, help="a YAML file of further entries of the card: scores, licence, limits"
    )
    parser.add_argument("--trust", action="append", default=[], help="allow a class of your own that the config names")
    arguments = parser.parse_intermixed_args()
    if arguments.layout and not arguments.preprocess:
        raise UsageError(f"--layout {arguments.layout} has no effect without --preprocess - add it")
    if arguments.max_loss is not None and not arguments.int8:
        raise UsageError("--max-loss has no effect without --int8 - add it")

    from segdeconv.checkpoints import cards, checkpoint
    from segdeconv.export.export import describe_replaced, export, read_replaced, require_own_card

    if arguments.about and arguments.out.suffix != cards.SUFFIX:
        raise UsageError(f"--about is only for {cards.SUFFIX} files - leave it out")
    about = read_about(arguments.about) if arguments.about else None
    source = read_checkpoint(arguments.checkpoint, arguments.trust, arguments.overrides)
    out: Path = arguments.out
    require_own_card(out)
    replaced = read_replaced(out)
    quantization = None
    if arguments.int8:
        from segdeconv.evaluation.quantization import MAX_LOSS, calibrate

        max_loss = MAX_LOSS if arguments.max_loss is None else arguments.max_loss
        quantization = calibrate(source, max_loss=max_loss)
    if out.suffix == cards.SUFFIX:
        if arguments.preprocess or arguments.argmax:
            raise UsageError(f"--preprocess and --argmax are for graphs, but {out} holds weights - leave them out")
        if quantization:
            source = dataclasses.replace(source, facts={**source.facts, "int8": quantization.to_dict()})
        checkpoint.write_weights(source, out, half=arguments.half, about=about)
        print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; config, classes and preprocessing in {cards.card_of(out)}")
        if line := describe_replaced(replaced, out):
            print(line)
        return

    from segdeconv.export.module import Layout
    from segdeconv.system.devices import resolve_precision

    int8 = judged_by_scores(source, quantization.float32, max_loss) if quantization else None
    pixels: Layout | None = (arguments.layout or "nhwc") if arguments.preprocess else None
    card = export(source, out, pixels=pixels, argmax=arguments.argmax, half=arguments.half, int8=int8)
    agreement = card["verified"]
    shapes = " and ".join("x".join(map(str, shape)) for shape in agreement["shapes"])
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; usage is described in {cards.card_of(out)}")
    if line := describe_replaced(replaced, out):
        print(line)
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


def judged_by_scores(source: Checkpoint, float32: float, max_loss: float) -> Int8:
    """Return how a file of 8 bits is calibrated on train and judged on val, as `predict --precision int8` is.

    Args:
        source: The checkpoint.
        float32: mIoU on val in float32.
        max_loss: Largest loss in points of mIoU.
    """
    from segdeconv.evaluation import quantization
    from segdeconv.evaluation.evaluate import restore_dataset
    from segdeconv.export.export import Int8

    train, val = restore_dataset(source, "train"), restore_dataset(source, "val")

    def judge(predict: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
        miou = quantization.miou_of(predict, val)
        judged = quantization.Quantization({}, val.split, len(val), float32, miou)
        print(f"{judged} (this file, in ONNX Runtime)")
        quantization.require_loss(judged, max_loss)
        return {"int8": {key: value for key, value in judged.to_dict().items() if key != "ranges"}}

    return Int8(quantization.calibration_images(train), judge)


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
