"""A network, layer by layer, as a table: shapes, kernels, receptive fields, parameters, operations, memory."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from segdeconv.summary.tracing import Layer, Trace

# Larger than the size asked for, until fields meet an end of the image only if they always do. Multiples of 2^11, so
# that the same sides are odd. The first that is enough, since where maps are stretched by a ratio that is not whole,
# two paths drift apart along the image.
BEYOND = (2048, 8192)


class Paper(NamedTuple):
    """What is printed about a network: in the SegNet paper (https://arxiv.org/abs/1511.00561, tables 1 and 6: 11
    classes, 360x480, forward passes of Caffe on a Titan), and of DeconvNet's size in its own.

    parameters: in millions; model, inference: in MB, of the weights and of the card while it infers; time: in ms.
    """

    network: str
    name: str
    parameters: float
    weight_layers: int | None = None
    model: float | None = None
    inference: float | None = None
    time: float | None = None


PAPERS = (
    Paper("SegNet", "SegNet", 29.5, 26, 117, 1052, 422.5),
    Paper("SegNetBasic", "SegNet-Basic", 1.425, 9, time=52.6),
    Paper("SegNetBasic", "SegNet-Basic-SingleChannelDecoder", 0.625, 9, time=33.1),
    Paper("FCNBasic", "FCN-Basic", 0.65, time=24.2),
    Paper("FCNBasic", "FCN-Basic-NoDimReduction", 1.625, time=44.8),
    Paper("BilinearBasic", "Bilinear-Interpolation", 0.625, time=24.2),
    Paper("DeconvNet", "DeconvNet", 252, 30),
    Paper("DeepLabLargeFOV", "DeepLab-LargeFOV", 83 / 4, model=83, inference=1993, time=110.1),
    Paper("FCN", "FCN (learnt deconv)", 539 / 4, model=539, inference=1806, time=317.1),
)


@dataclass(frozen=True)
class Description:
    """The layers and totals of a network, for one image; memory in bytes of float32.

    parameters: of the whole network. multiply_adds: of all layers. weight_layers: convolutions, deconvolutions and
        fully connected layers with weights of their own.
    maps: of all outputs, what training keeps for its backward pass at least. switches: what pools keep for the
        decoder. peak: the most of all maps alive at once in inference.
    """

    network: str
    size: tuple[int, int]
    num_classes: int
    layers: list[Layer]
    parameters: int
    multiply_adds: int
    weight_layers: int
    maps: int
    switches: int
    peak: int

    @property
    def paper(self) -> Paper | None:
        """What is printed about this network: of this class and, but for a twentieth, of as many parameters."""
        near = (
            paper
            for paper in PAPERS
            if paper.network == self.network and abs(self.parameters / 1e6 - paper.parameters) < paper.parameters / 20
        )
        return next(near, None)

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {**asdict(self), "paper": self.paper._asdict() if self.paper else None}


def describe(build: Callable[[], nn.Module], size: tuple[int, int]) -> Description:
    """A network as it sees one image of size (H, W).

    build: makes the network. It is called on the meta device, so that weights take no memory, and again without if
        its constructor needs to see values.
    """
    try:
        with torch.device("meta"):
            model = build()
    except (NotImplementedError, RuntimeError):
        model = build()
    model = model.to("meta").eval()
    seen = Trace(model)
    num_classes = seen.run(size).shape[1]
    _measure_fields(model, seen, size)
    return Description(
        network=type(model).__name__,
        size=size,
        num_classes=num_classes,
        layers=seen.layers,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds=sum(layer.multiply_adds for layer in seen.layers),
        weight_layers=sum(layer.filter_depth is not None and layer.parameters > 0 for layer in seen.layers),
        maps=sum(layer.memory for layer in seen.layers),
        switches=sum(layer.kept for layer in seen.layers),
        peak=seen.peak,
    )


def _measure_fields(model: nn.Module, seen: Trace, size: tuple[int, int]) -> None:
    """Fill in the receptive fields, from a run on an image so large that its ends do not cut them."""
    for beyond in BEYOND:
        far = Trace(model)
        height, width = size[0] + beyond, size[1] + beyond
        try:
            far.run((height, width))
        except (RuntimeError, ValueError):  # it takes images of one size only
            return
        if [layer.name for layer in far.layers] != [layer.name for layer in seen.layers]:
            return
        for layer, spans in zip(seen.layers, far.spans, strict=True):
            if spans is not None:
                layer.field = (spans[0].largest(height), spans[1].largest(width))
        if all(None not in layer.field for layer in seen.layers if layer.field):
            return


# For reading.


def layer_table(description: Description, width: int = 200) -> str:
    """One line a layer, then the totals; columns that a width has no room for are left out, and named."""
    rows = [_row(number, layer) for number, layer in enumerate(description.layers, 1)]
    left_out = []
    for name in ("input", "then", "MB", "mult-adds"):
        if max(map(len, _lined(rows))) <= width:
            break
        rows = [{column: text for column, text in row.items() if column != name} for row in rows]
        left_out.append(name)
    lines = _lined(rows)
    if left_out:
        lines += ["", f"without {', '.join(left_out)}: {width} columns are too narrow; --json FILE holds everything"]
    return "\n".join([*lines, "", *_totals(description)])


def _row(number: int, layer: Layer) -> dict[str, str]:
    what = [layer.kind]
    if layer.kernel:
        depth = [layer.filter_depth] if layer.filter_depth else []
        what.append("x".join(map(str, (*layer.kernel, *depth))))
    if layer.stride and set(layer.stride) != {1}:
        what.append(f"/{_short(layer.stride)}")
    if layer.dilation and set(layer.dilation) != {1}:
        what.append(f"dilated {_short(layer.dilation)}")
    kept = [f"keeps {layer.kept / 1e6:.2f} MB of switches"] if layer.kept else []
    return {
        "#": str(number),
        "layer": layer.name or "forward",
        "what": " ".join(what),
        "input": "x".join(map(str, layer.input)),
        "output": "x".join(map(str, layer.output)),
        "field": "?" if layer.field is None else "x".join("all" if side is None else str(side) for side in layer.field),
        "parameters": f"{layer.parameters:,}" if layer.parameters else "",
        "mult-adds": f"{layer.multiply_adds / 1e6:,.0f}M" if layer.multiply_adds else "",
        "MB": f"{layer.memory / 1e6:.1f}",
        "then": ", ".join([*layer.then, *kept]),
    }


def _rounded(value: float) -> str:
    """To three digits, or whole.

    >>> _rounded(1052.4), _rounded(5.281), _rounded(0.03333)
    ('1,052', '5.28', '0.0333')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _short(sides: Sequence[int]) -> str:
    return str(sides[0]) if len(set(sides)) == 1 else "x".join(map(str, sides))


def _lined(rows: list[dict[str, str]]) -> list[str]:
    """Columns under their names; numbers to the right."""
    right = {"#", "input", "output", "field", "parameters", "mult-adds", "MB"}
    rows = [{name: name for name in rows[0]}, *rows]
    widths = {name: max(len(row[name]) for row in rows) for name in rows[0]}
    return [
        "  ".join(
            text.rjust(widths[name]) if name in right else text.ljust(widths[name]) for name, text in row.items()
        ).rstrip()
        for row in rows
    ]


def _totals(description: Description) -> list[str]:
    paper = description.paper
    rows = {
        "parameters": (f"{description.parameters:,}", paper and f"{paper.parameters:.4g}M"),
        "layers with weights": (str(description.weight_layers), paper and paper.weight_layers),
        "multiply-adds": (f"{_rounded(description.multiply_adds / 1e9)}G", None),
        "weights": (
            f"{_rounded(description.parameters * 4 / 1e6)} MB",
            paper and paper.model and f"{paper.model:.0f} MB",
        ),
        "maps at once, to infer": (
            f"{_rounded(description.peak / 1e6)} MB",
            paper and paper.inference and f"{paper.inference:.0f} MB on the card, with the weights",
        ),
        "maps in all, to train": (f"{_rounded(description.maps / 1e6)} MB", None),
        "switches": (f"{_rounded(description.switches / 1e6)} MB" if description.switches else "none", None),
        "time": ("not run", paper and paper.time and f"{paper.time:.4g} ms on a Titan"),
    }
    size = "x".join(map(str, description.size))
    head = f"{description.network}, {description.num_classes} classes, one image of {size}, float32"
    wide = max(len(here) for here, _ in rows.values())
    lines = [head, ""]
    if paper:
        lines.append(f"{'':<24}{'here':<{wide}}  printed of {paper.name}")
    for name, (here, printed) in rows.items():
        if name != "time" or printed:
            lines.append(f"{name:<24}{here:<{wide}}  {printed or ''}".rstrip())
    return lines
