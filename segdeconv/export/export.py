"""Export of a trained network as one file for other programs, ONNX or torch.export, and a JSON card that describes it.

An exported file is written only after its outputs were compared with those of the network.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from segdeconv import __version__
from segdeconv.checkpoints.cards import SUFFIX, card_of
from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.classes import Classes
from segdeconv.data.preprocessing import resize_image, stacked
from segdeconv.errors import UsageError
from segdeconv.export import onnx, quantization
from segdeconv.export.module import Exported, Layout
from segdeconv.inference.network import for_int8
from segdeconv.inference.scorers import labels, resized, with_padding
from segdeconv.models import SegmentationModel
from segdeconv.models.layers import fold_norms
from segdeconv.system.files import hash_file, replace_text, replacing_path
from segdeconv.system.own_files import foreign_files
from segdeconv.system.plain_data import PlainDataError, read_json
from segdeconv.system.seeding import key

ONNX, PT2 = ".onnx", ".pt2"
# The fraction of pixels with the same class in file and network: the definition of equal predictions in
# docs/robustness.md.
MIN_SAME = 0.999
MAX_MEAN = 1e-3  # mean difference of scores, in standard deviations of the scores
# For files that resize, on images of noise: resizing in the graph may raise up to an eighth of the values by one.
MIN_SAME_RESIZED, MAX_MEAN_RESIZED = 0.99, 0.05
MIN_SAME_HALF = 0.98  # between weights of 16 and of 32 bits, since rounding changes switches


@dataclass(frozen=True)
class Agreement:
    """Agreement of an exported file and its network on random images.

    Attributes:
        shapes: The shapes of the inputs.
        same_class: Fraction of the pixels with the same class.
        largest: Largest difference of scores, in standard deviations of the scores; None if the file returns labels.
        mean: Mean difference of scores, in the same units; None if the file returns labels.
        same_class_as_full: Fraction of the pixels with the same class for weights of 16 and of 32 bits; None if the
            file has weights of 32 bits.
    """

    shapes: list[list[int]]
    same_class: float
    largest: float | None
    mean: float | None
    same_class_as_full: float | None


@dataclass(frozen=True)
class Int8:
    """Calibration and acceptance of a file of 8 bits.

    Attributes:
        images: Images as stored, (H, W, C), on which the ranges of the maps are measured.
        judge: Gets a function that predicts the (H, W) class indices of an image with the file; returns entries of the
            card, or raises UsageError to refuse the file.
    """

    images: Iterable[np.ndarray]
    judge: Callable[[Callable[[np.ndarray], np.ndarray]], dict[str, Any]]


def export(
    checkpoint: Checkpoint,
    path: Path,
    *,
    pixels: Layout | None = None,
    argmax: bool = False,
    half: bool = False,
    int8: Int8 | None = None,
) -> dict[str, Any]:
    """Export a network to a file, with a JSON card beside it.

    Args:
        checkpoint: The checkpoint of the network.
        path: The file to write; its suffix, .onnx or .pt2, selects the format.
        pixels: See `Exported`.
        argmax: See `Exported`.
        half: Whether to store weights in 16 bits, for ONNX; computations stay float32.
        int8: Compute convolutions in 8 bits, for ONNX.

    Returns:
        The content of the card.

    Raises:
        UsageError: The path is not usable, the network cannot be exported, or the outputs of the file differ from
            those of the network. No file is written.
    """
    if path.suffix not in (ONNX, PT2):
        raise UsageError(f"--out {path} has an unknown format - use {ONNX}, {PT2} or {SUFFIX}")
    if half and path.suffix == PT2:
        raise UsageError(f"--half applies only to {ONNX} and {SUFFIX} - leave it out")
    if int8 and (half or path.suffix == PT2):
        raise UsageError(f"--int8 applies only to {ONNX} and {SUFFIX}, without --half - leave it out")
    require_own_card(path)
    run_file, versions = (onnx.runner, onnx.require_libraries()) if path.suffix == ONNX else (_pt2_runner, {})
    if int8:
        checkpoint = for_int8(checkpoint)
    network, full = checkpoint.model(), None
    folded = fold_norms(network)
    if half:
        full, folded = network, onnx.round_to_half(folded, path)
        network = folded
    exported = Exported(folded, checkpoint.preprocessing, pixels=pixels, argmax=argmax).eval()
    min_traced = _min_traced_size(exported)
    # The smallest side of an input that the file accepts.
    min_size = min_traced if path.suffix == PT2 else 1 if exported.size else folded.minimum_size
    program = _trace(exported, min_traced)
    operators: list[str] = []
    with replacing_path(path) as partial:
        if path.suffix == ONNX:
            graph = onnx.convert(program, axes=exported.axes, output=exported.output, half=half, path=path)
            operators = sorted({node.op_type for node in graph.graph.node})
            partial.write_bytes(graph.SerializeToString())
        else:
            with partial.open("wb") as file:
                torch.export.save(program, file)
        if int8:
            quantization.quantize_file(partial, exported, int8.images)
        runner, images = run_file(partial), _random_images(exported, min_size)
        agreement = _compare(runner, network, full, exported, images, path, judged=int8 is not None)
        judgement = int8.judge(quantization.predictor(runner, exported)) if int8 else {}
        card_of(path).unlink(missing_ok=True)  # the new card is written last, so that it never describes another file
    card = {
        "file": path.name,
        "sha256": hash_file(path),
        "format": {ONNX: "ONNX", PT2: "torch.export"}[path.suffix],
        "network": type(network).__name__,
        "checkpoint": {"file": checkpoint.path.name, "sha256": checkpoint.sha256},
        **_interface(exported, checkpoint.classes, min_size),
        "weights": "float16, computed in float32"
        if half
        else "int8, convolutions computed in 8 bits"
        if int8
        else "float32",
        **judgement,
        "verified": asdict(agreement),
        **({"opset": onnx.OPSET, "operators": operators} if operators else {}),
        "versions": {"segdeconv": __version__, "torch": torch.__version__, **versions},
    }
    replace_text(card_of(path), json.dumps(card, indent=1) + "\n")
    return card


def require_own_card(path: Path) -> None:
    """Raise UsageError if the card of a file would replace that of a file of another format."""
    for suffix in {ONNX, PT2, SUFFIX} - {path.suffix}:
        if path.with_suffix(suffix).exists():
            raise UsageError(
                f"{path.with_suffix(suffix)} already exists, and {card_of(path).name} describes it - choose "
                "another name"
            )


def read_replaced(path: Path) -> dict[str, Any]:
    """Return the card of the exported file that an export replaces, empty if there is none.

    Raises:
        UsageError: The export would be written over a file, or a card, that segdeconv did not export.
    """
    card = {}
    with suppress(PlainDataError, OSError):
        card = read_json(card_of(path))
    if not (isinstance(card, dict) and isinstance(card.get("sha256"), str)):
        card = {}
    if os.path.lexists(path) and not (card and path.is_file() and hash_file(path) == card["sha256"]):
        raise foreign_files(path, 0, "--out")
    if os.path.lexists(card_of(path)) and not card:
        raise foreign_files(card_of(path), 0, "--out")
    return card


def describe_replaced(replaced: Mapping[str, Any], path: Path) -> str:
    """Return a line that names the entries in which the card of an exported file differs from the previous one.

    Args:
        replaced: The previous card, see `read_replaced`.
        path: The exported file.

    Returns:
        The line, empty if no entry differs.
    """
    card = read_json(card_of(path))
    measured = {"sha256", "verified", "versions"}
    differing = sorted(key for key in {*replaced, *card} - measured if replaced.get(key) != card.get(key))
    if path.suffix == SUFFIX and replaced.get("sha256") != card["sha256"]:
        differing.append("weights")
    return f"replaced: {path}, which differed in {', '.join(differing)}" if replaced and differing else ""


def _interface(exported: Exported, classes: Classes, min_size: int) -> dict[str, Any]:
    """Return the entries of the card that describe how to use the file."""
    preprocessing, pixels, argmax = exported.preprocessing, exported.pixels, exported.argmax
    size = preprocessing.size
    resize = "area average where both sides shrink, else bilinear with half-pixel centres; rounded to whole numbers"
    return {
        "classes": [
            {"name": name, "colour": list(colour)} for name, colour in zip(classes.names, classes.colours, strict=True)
        ],
        "ignore_index": classes.ignore_index,
        "input": {
            "name": "image",
            "dtype": f"uint{preprocessing.bits}" if pixels else "float32",
            "axes": exported.axes,
            "shape": [preprocessing.channels if axis == "C" else axis for axis in exported.axes],
            "channels": "as stored" if preprocessing.as_stored else "rgb" if pixels else preprocessing.order,
            "minimum_size": min_size,  # the user pads smaller images at the bottom and right with `fill`
            "fill": [round(value) for value in preprocessing.mean] if pixels else 0,
        },
        "output": {
            "name": exported.output,
            "dtype": "uint8" if argmax else "float32",
            "shape": ["N", "H", "W"] if argmax else ["N", len(classes), "H", "W"],
            "size": "that of the input; if you resized the image, resize the logits back to its size (bilinear, "
            "half-pixel centres) and take the largest"
            if size and not pixels
            else "that of the input",
        },
        "preprocessing": {
            "done_by": "the graph" if pixels else "you",
            "steps": [
                f"resize to {size[0]}x{size[1]} (HxW): {resize}" if size else "keep the size",
                "subtract mean and divide by std, channel by channel, in the units of the stored numbers",
                *(["reverse the channels, RGB to BGR"] if preprocessing.order == "bgr" else []),
            ],
            **preprocessing.to_dict(),
        },
    }


def _min_traced_size(exported: Exported) -> int:
    """Return the smallest side for which a trace is valid: torch.export specialises on maps of size 1."""
    return 2 if exported.size else 32 * -(-exported.network.minimum_size // 32) + 1


def _trace(exported: Exported, min_size: int) -> ExportedProgram:
    lengths = {"N": 2, "H": min_size + 31, "W": min_size + 63, "C": exported.preprocessing.channels}
    dtype = getattr(torch, f"uint{exported.preprocessing.bits}") if exported.pixels else torch.float32
    image = torch.zeros([lengths[axis] for axis in exported.axes], dtype=dtype)
    height = exported.axes.index("H")
    dynamic = {0: Dim.DYNAMIC, height: Dim.DYNAMIC(min=min_size), height + 1: Dim.DYNAMIC(min=min_size)}
    try:
        with torch.no_grad():
            return torch.export.export(exported, (image,), dynamic_shapes=(dynamic,))
    except Exception as error:  # a user's own network can raise any type
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{type(exported.network).__name__} cannot be exported, since torch.export cannot trace it with dynamic "
            f"sizes ({reason}) - share its weights as {SUFFIX}"
        ) from error


def _random_images(exported: Exported, min_size: int) -> Iterator[np.ndarray]:
    """Yield two batches (N, H, W, C) of random images: one as small as possible, and two larger ones of odd size."""
    random = np.random.default_rng(key(0, "export"))
    side = 33 if exported.size else min_size
    bits, channels = exported.preprocessing.bits, exported.preprocessing.channels
    larger = (2 * exported.size[0] + 1, 2 * exported.size[1] + 7) if exported.size else (side + 32, side + 21)
    for count, height, width in ((1, side, side + 14), (2, *larger)):
        blocks = random.integers(0, 2**bits, (count, -(-height // 8), -(-width // 8), channels))
        blocks = blocks.repeat(8, 1).repeat(8, 2)[:, :height, :width]
        noise = random.integers(0, 2**bits // 4, blocks.shape)
        yield (blocks * 3 // 4 + noise).astype(f"uint{bits}")


def _compare(
    run_file: onnx.Runner,
    network: SegmentationModel,
    full: SegmentationModel | None,
    exported: Exported,
    images: Iterator[np.ndarray],
    path: Path,
    *,
    judged: bool,
) -> Agreement:
    """Run the file and the network, as `predict` uses it, on the same images; raise UsageError if they differ.

    `full` is the network before its weights were rounded, if they were. A file that is `judged` by its scores may
    differ: on images of noise, rounding to 8 bits changes many classes.
    """
    score = with_padding(network, network.minimum_size)
    shapes: list[list[int]] = []
    same = same_as_full = pixels = 0
    differences: list[Tensor] = []
    deviations: list[Tensor] = []
    for batch in images:
        size = (batch.shape[1], batch.shape[2])
        images_at_size = [resize_image(image, exported.size or size) for image in batch]
        normalised = exported.preprocessing.normalised(stacked(images_at_size))
        with torch.no_grad():
            expected = resized(score(normalised), size)
            expected_labels = labels(expected, size)
            if full is not None:
                full_scores = resized(with_padding(full, full.minimum_size)(normalised), size)
                same_as_full += int((labels(full_scores, size) == expected_labels).sum())
        inputs = {None: normalised.contiguous().numpy(), "nhwc": batch, "nchw": batch.transpose(0, 3, 1, 2)}
        image = inputs[exported.pixels]
        try:
            result = torch.from_numpy(run_file(np.ascontiguousarray(image)))
        except Exception as error:  # the runtime raises its own types
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{path} was not written: the graph does not run on an input of shape {tuple(image.shape)} ({reason}) "
                "- export to another format"
            ) from error
        shapes.append(list(image.shape))
        shape = expected[:, 0].shape if exported.argmax else expected.shape
        if result.shape != shape or result.dtype != (torch.uint8 if exported.argmax else torch.float32):
            raise UsageError(
                f"{path} was not written: the graph returns {result.dtype} of shape {tuple(result.shape)} instead of "
                f"{tuple(shape)} - report this with the checkpoint's config.yaml"
            )
        result_labels = result if exported.argmax else labels(result, size)
        same += int((result_labels == expected_labels).sum())
        pixels += result_labels.numel()
        if not exported.argmax:
            differences.append((result - expected).abs().flatten())
            deviations.append(expected.std())
    largest = mean = None
    if differences:
        spread = max(float(torch.stack(deviations).mean()), torch.finfo(torch.float32).tiny)
        relative = torch.cat(differences) / spread
        largest, mean = float(relative.max()), float(relative.mean())
    agreement = Agreement(shapes, same / pixels, largest, mean, None if full is None else same_as_full / pixels)
    min_same, max_mean = (MIN_SAME_RESIZED, MAX_MEAN_RESIZED) if exported.size else (MIN_SAME, MAX_MEAN)
    if not judged and (agreement.same_class < min_same or (agreement.mean or 0) > max_mean):
        raise UsageError(
            f"{path} was not written: only {100 * agreement.same_class:.2f} % of the pixels have the same class as in "
            f"the network, but {100 * min_same:g} % are required - export to another format, or without --preprocess"
        )
    if agreement.same_class_as_full is not None and agreement.same_class_as_full < MIN_SAME_HALF:
        raise UsageError(
            f"{path} was not written: weights of 16 bits change the class of "
            f"{100 * (1 - agreement.same_class_as_full):.1f} % of the pixels of random images, but at most "
            f"{100 * (1 - MIN_SAME_HALF):g} % are allowed - leave out --half"
        )
    return agreement


def _pt2_runner(path: Path) -> onnx.Runner:
    program = torch.export.load(path).module()

    def run(image: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return program(torch.from_numpy(image)).numpy()

    return run
