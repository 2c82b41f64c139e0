"""A trained network as one file that other programs run: ONNX or torch.export, and a JSON file that says how.

A file gets its name only after it was run beside the network that it came from and gave the same.
"""

import json
from collections.abc import Iterator
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
from segdeconv.export import onnx
from segdeconv.export.module import Exported, Layout
from segdeconv.inference.scorers import labels, resized, with_padding
from segdeconv.models import SegmentationModel
from segdeconv.models.layers import fold_norms
from segdeconv.system.files import hash_file, replace_text, replacing_path
from segdeconv.system.seeding import key

ONNX, PT2 = ".onnx", ".pt2"
# Of pixels, of whose class file and network agree: what an equal prediction is (docs/robustness.md).
FEWEST_SAME = 0.999
LARGEST_MEAN = 1e-3  # of the differences of scores, in standard deviations of the scores
# Of files that resize, on pictures of noise, up to an eighth of whose numbers they make one grey level brighter.
FEWEST_SAME_RESIZED, LARGEST_MEAN_RESIZED = 0.99, 0.05
FEWEST_SAME_HALF = 0.98  # of networks with weights of 16 and of 32 bits; rounding moves switches


@dataclass(frozen=True)
class Agreement:
    """How a file and its network agreed on random images.

    shapes: of the inputs. same_class: share of the pixels. largest, mean: difference of scores, in standard deviations
        of the scores; None where the file gives labels. same_class_as_full: share of the pixels to which weights of 16
        and of 32 bits give the same class; None where they have 32.
    """

    shapes: list[list[int]]
    same_class: float
    largest: float | None
    mean: float | None
    same_class_as_full: float | None


def export(
    read: Checkpoint,
    path: Path,
    *,
    pixels: Layout | None = None,
    argmax: bool = False,
    half: bool = False,
) -> dict[str, Any]:
    """Write `path`, .onnx or .pt2, and the JSON beside it; returns what that says.

    pixels, argmax: see `Exported`. half: weights in 16 bits, for ONNX; what is computed stays float32.
    Raises UsageError, and leaves no file, where the file would not give what the network gives.
    """
    if path.suffix not in (ONNX, PT2):
        raise UsageError(f"--out {path} is no form to export to - end it in {ONNX}, {PT2} or {SUFFIX}")
    if half and path.suffix == PT2:
        raise UsageError(f"--half is for {ONNX} and {SUFFIX} - leave it out")
    for suffix in {ONNX, PT2, SUFFIX} - {path.suffix}:
        if path.with_suffix(suffix).exists():
            raise UsageError(
                f"{path.with_suffix(suffix)} is there, and {card_of(path).name} speaks of it - choose another name"
            )
    run, versions = (onnx.runner, onnx.require_libraries()) if path.suffix == ONNX else (_pt2_runner, {})
    network, full = read.model(), None
    folded = fold_norms(network)
    if half:
        full, folded = network, onnx.rounded(folded, path)
        network = folded
    exported = Exported(folded, read.preprocessing, pixels=pixels, argmax=argmax).eval()
    least = _least_traced(exported)
    smallest = least if path.suffix == PT2 else 1 if exported.size else folded.minimum_size  # side that the file takes
    program = _traced(exported, least)
    operators: list[str] = []
    with replacing_path(path) as partial:
        if path.suffix == ONNX:
            graph = onnx.convert(program, axes=exported.axes, output=exported.output, half=half, path=path)
            operators = sorted({node.op_type for node in graph.graph.node})
            partial.write_bytes(graph.SerializeToString())
        else:
            with partial.open("wb") as file:
                torch.export.save(program, file)
        agreement = _compared(run(partial), network, full, exported, _images(exported, smallest), path)
        card_of(path).unlink(missing_ok=True)  # and written last, so that it never speaks of another file
    card = {
        "file": path.name,
        "sha256": hash_file(path),
        "format": {ONNX: "ONNX", PT2: "torch.export"}[path.suffix],
        "network": type(network).__name__,
        "checkpoint": {"file": read.path.name, "sha256": read.sha256},
        **_interface(exported, read.classes, smallest),
        "weights": "float16, computed in float32" if half else "float32",
        "verified": asdict(agreement),
        **({"opset": onnx.OPSET, "operators": operators} if operators else {}),
        "versions": {"segdeconv": __version__, "torch": torch.__version__, **versions},
    }
    replace_text(card_of(path), json.dumps(card, indent=1) + "\n")
    return card


def _interface(exported: Exported, classes: Classes, smallest: int) -> dict[str, Any]:
    """What a program has to know to use the file."""
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
            "minimum_size": smallest,  # a smaller side is padded below or right with `fill`
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


def _least_traced(exported: Exported) -> int:
    """The smallest side that a trace is right for: torch.export takes a map of one cell for one that never has two."""
    return 2 if exported.size else 32 * -(-exported.network.minimum_size // 32) + 1


def _traced(exported: Exported, least: int) -> ExportedProgram:
    lengths = {"N": 2, "H": least + 31, "W": least + 63, "C": exported.preprocessing.channels}
    dtype = getattr(torch, f"uint{exported.preprocessing.bits}") if exported.pixels else torch.float32
    image = torch.zeros([lengths[axis] for axis in exported.axes], dtype=dtype)
    height = exported.axes.index("H")
    free = {0: Dim.DYNAMIC, height: Dim.DYNAMIC(min=least), height + 1: Dim.DYNAMIC(min=least)}
    try:
        with torch.no_grad():
            return torch.export.export(exported, (image,), dynamic_shapes=(free,))
    except Exception as error:  # of many types, of networks of a user's own
        said = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{type(exported.network).__name__} cannot be exported, since torch.export does not follow it with free "
            f"sizes ({said}) - share its weights as {SUFFIX}"
        ) from error


# Verification.


def _images(exported: Exported, smallest: int) -> Iterator[np.ndarray]:
    """Two batches (N, H, W, C) of random pictures: one, as small as may be; two larger ones, of odd sides."""
    random = np.random.default_rng(key(0, "export"))
    least = 33 if exported.size else smallest
    bits, channels = exported.preprocessing.bits, exported.preprocessing.channels
    larger = (2 * exported.size[0] + 1, 2 * exported.size[1] + 7) if exported.size else (least + 32, least + 21)
    for count, height, width in ((1, least, least + 14), (2, *larger)):
        blocks = random.integers(0, 2**bits, (count, -(-height // 8), -(-width // 8), channels))
        blocks = blocks.repeat(8, 1).repeat(8, 2)[:, :height, :width]
        noise = random.integers(0, 2**bits // 4, blocks.shape)
        yield (blocks * 3 // 4 + noise).astype(f"uint{bits}")


def _compared(
    run: onnx.Runner,
    network: SegmentationModel,
    full: SegmentationModel | None,
    exported: Exported,
    images: Iterator[np.ndarray],
    path: Path,
) -> Agreement:
    """Run the file and the network, as `predict` uses it, on the same pictures; raises UsageError if they differ.

    full: the network as it was before its weights were rounded, if they were.
    """
    score = with_padding(network, network.minimum_size)
    shapes: list[list[int]] = []
    same = same_as_full = pixels = 0
    differences: list[Tensor] = []
    deviations: list[Tensor] = []
    for batch in images:
        size = (batch.shape[1], batch.shape[2])
        seen = [resize_image(image, exported.size or size) for image in batch]
        ready = exported.preprocessing.normalised(stacked(seen))
        with torch.no_grad():
            expected = resized(score(ready), size)
            wanted = labels(expected, size)
            if full is not None:
                before = resized(with_padding(full, full.minimum_size)(ready), size)
                same_as_full += int((labels(before, size) == wanted).sum())
        given = {None: ready.contiguous().numpy(), "nhwc": batch, "nchw": batch.transpose(0, 3, 1, 2)}[exported.pixels]
        try:
            result = torch.from_numpy(run(np.ascontiguousarray(given)))
        except Exception as error:  # of whatever runs it
            said = " ".join(str(error).split())[:200]
            raise UsageError(
                f"{path} was not written: it does not run on an input of {tuple(given.shape)} ({said}) - export to "
                "another form"
            ) from error
        shapes.append(list(given.shape))
        shape = expected[:, 0].shape if exported.argmax else expected.shape
        if result.shape != shape or result.dtype != (torch.uint8 if exported.argmax else torch.float32):
            raise UsageError(
                f"{path} was not written: it gives {result.dtype} of {tuple(result.shape)} and should give "
                f"{tuple(shape)} - report this with the checkpoint's config.yaml"
            )
        found = result if exported.argmax else labels(result, size)
        same += int((found == wanted).sum())
        pixels += found.numel()
        if not exported.argmax:
            differences.append((result - expected).abs().flatten())
            deviations.append(expected.std())
    largest = mean = None
    if differences:
        spread = max(float(torch.stack(deviations).mean()), torch.finfo(torch.float32).tiny)
        every = torch.cat(differences) / spread
        largest, mean = float(every.max()), float(every.mean())
    agreement = Agreement(shapes, same / pixels, largest, mean, None if full is None else same_as_full / pixels)
    fewest, most = (FEWEST_SAME_RESIZED, LARGEST_MEAN_RESIZED) if exported.size else (FEWEST_SAME, LARGEST_MEAN)
    if agreement.same_class < fewest or (agreement.mean or 0) > most:
        raise UsageError(
            f"{path} was not written: {100 * agreement.same_class:.2f} % of the pixels have the class that the network "
            f"gives them, and {100 * fewest:g} % should - export to another form, or without --preprocess"
        )
    if agreement.same_class_as_full is not None and agreement.same_class_as_full < FEWEST_SAME_HALF:
        raise UsageError(
            f"{path} was not written: weights of 16 bits give {100 * (1 - agreement.same_class_as_full):.1f} % of the "
            f"pixels of random pictures another class, and {100 * (1 - FEWEST_SAME_HALF):g} % may have one - leave out "
            "--half"
        )
    return agreement


def _pt2_runner(path: Path) -> onnx.Runner:
    program = torch.export.load(path).module()

    def run(image: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return program(torch.from_numpy(image)).numpy()

    return run
