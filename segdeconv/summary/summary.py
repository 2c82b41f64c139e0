"""Summary of a network as a table of layers: shapes, kernels, receptive fields, parameters, operations and memory."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from segdeconv.summary.tracing import Layer, Trace

# Receptive fields are measured on an image that is larger than the requested size by these margins, tried in turn until
# only those fields reach an end of the image that always do. Multiples of 2^11 keep the same sides odd. The smallest
# margin that suffices is used, because where maps are resized by a fractional ratio, paths drift apart along the image.
MARGINS = (2048, 8192)


class Paper(NamedTuple):
    """Published numbers of a network.

    They come from the SegNet paper (https://arxiv.org/abs/1511.00561, tables 1 and 6: 11 classes, 360x480, forward
    passes of Caffe on a Titan), and for the size of DeconvNet from its own paper.

    Attributes:
        network: Name of the class in `segdeconv.models`.
        name: Name in the paper.
        parameters: Number of parameters in millions.
        weight_layers: Number of layers with weights.
        model: Size of the weights in MB.
        inference: GPU memory in inference in MB.
        time: Time of a forward pass in ms.
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
    """Layers and totals of a network for one image, with memory in bytes of float32.

    Attributes:
        network: Name of the class.
        size: (H, W) of the image.
        num_classes: Number of output channels.
        layers: Rows of the table.
        parameters: Number of parameters of the network.
        multiply_adds: Sum over all layers.
        weight_layers: Number of convolutions, deconvolutions and fully connected layers that have weights.
        maps: Memory of all outputs, which training keeps at least for the backward pass.
        switches: Memory of the switches that pools keep for the decoder.
        peak: Largest memory of all maps that exist at the same time in inference.
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
        """The published numbers of this class whose number of parameters differs by less than a twentieth, if any."""
        matching = (
            paper
            for paper in PAPERS
            if paper.network == self.network and abs(self.parameters / 1e6 - paper.parameters) < paper.parameters / 20
        )
        return next(matching, None)

    def to_dict(self) -> dict[str, Any]:
        """Return the description as plain data for a JSON file."""
        return {**asdict(self), "paper": self.paper._asdict() if self.paper else None}


def describe(build: Callable[[], nn.Module], size: tuple[int, int]) -> Description:
    """Describe a network layer by layer for one image.

    Args:
        build: Builds the network. It is called on torch's meta device, so that weights take no memory, and again
            without it if the constructor needs the values of tensors.
        size: (H, W) of the image.
    """
    try:
        with torch.device("meta"):
            model = build()
    except (NotImplementedError, RuntimeError):
        model = build()
    model = model.to("meta").eval()
    trace = Trace(model)
    num_classes = trace.run(size).shape[1]
    _measure_fields(model, trace, size)
    return Description(
        network=type(model).__name__,
        size=size,
        num_classes=num_classes,
        layers=trace.layers,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        multiply_adds=sum(layer.multiply_adds for layer in trace.layers),
        weight_layers=sum(layer.filter_depth is not None and layer.parameters > 0 for layer in trace.layers),
        maps=sum(layer.memory for layer in trace.layers),
        switches=sum(layer.kept for layer in trace.layers),
        peak=trace.peak,
    )


def _measure_fields(model: nn.Module, trace: Trace, size: tuple[int, int]) -> None:
    """Fill in the receptive fields, measured on an image so large that its ends do not cut them off."""
    for margin in MARGINS:
        large = Trace(model)
        height, width = size[0] + margin, size[1] + margin
        try:
            large.run((height, width))
        except (RuntimeError, ValueError):  # the network accepts one size only
            return
        if [layer.name for layer in large.layers] != [layer.name for layer in trace.layers]:
            return
        for layer, spans in zip(trace.layers, large.spans, strict=True):
            if spans is not None:
                layer.field = (spans[0].largest(height), spans[1].largest(width))
        if all(None not in layer.field for layer in trace.layers if layer.field):
            return


# Text output.


def layer_table(description: Description, width: int = 200) -> str:
    """Format a description as text, with one line per layer and then the totals.

    Args:
        description: Made by `describe`.
        width: Number of columns of the terminal. Columns of the table that do not fit are left out and named below it.
    """
    rows = [_row(number, layer) for number, layer in enumerate(description.layers, 1)]
    left_out = []
    for name in ("input", "then", "MB", "mult-adds"):
        if max(map(len, _aligned(rows))) <= width:
            break
        rows = [{column: text for column, text in row.items() if column != name} for row in rows]
        left_out.append(name)
    lines = _aligned(rows)
    if left_out:
        lines += ["", f"without {', '.join(left_out)}: {width} columns are too few - use --json FILE for all columns"]
    return "\n".join([*lines, "", *_totals(description)])


def _row(number: int, layer: Layer) -> dict[str, str]:
    operation = [layer.kind]
    if layer.kernel:
        depth = [layer.filter_depth] if layer.filter_depth else []
        operation.append("x".join(map(str, (*layer.kernel, *depth))))
    if layer.stride and set(layer.stride) != {1}:
        operation.append(f"/{_short(layer.stride)}")
    if layer.dilation and set(layer.dilation) != {1}:
        operation.append(f"dilated {_short(layer.dilation)}")
    kept = [f"keeps {layer.kept / 1e6:.2f} MB of switches"] if layer.kept else []
    return {
        "#": str(number),
        "layer": layer.name or "forward",
        "operation": " ".join(operation),
        "input": "x".join(map(str, layer.input)),
        "output": "x".join(map(str, layer.output)),
        "field": "?" if layer.field is None else "x".join("all" if side is None else str(side) for side in layer.field),
        "parameters": f"{layer.parameters:,}" if layer.parameters else "",
        "mult-adds": f"{layer.multiply_adds / 1e6:,.0f}M" if layer.multiply_adds else "",
        "MB": f"{layer.memory / 1e6:.1f}",
        "then": ", ".join([*layer.then, *kept]),
    }


def _rounded(value: float) -> str:
    """Format a number with three digits, or as an integer from 100.

    Examples:
        >>> _rounded(1052.4), _rounded(5.281), _rounded(0.03333)
        ('1,052', '5.28', '0.0333')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _short(sides: Sequence[int]) -> str:
    return str(sides[0]) if len(set(sides)) == 1 else "x".join(map(str, sides))


def _aligned(rows: list[dict[str, str]]) -> list[str]:
    """Format rows as lines under a header, with numbers aligned to the right."""
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
        "peak maps in inference": (
            f"{_rounded(description.peak / 1e6)} MB",
            paper and paper.inference and f"{paper.inference:.0f} MB on the GPU, including the weights",
        ),
        "all maps, for training": (f"{_rounded(description.maps / 1e6)} MB", None),
        "switches": (f"{_rounded(description.switches / 1e6)} MB" if description.switches else "none", None),
        "time": ("not measured", paper and paper.time and f"{paper.time:.4g} ms on a Titan"),
    }
    size = "x".join(map(str, description.size))
    head = f"{description.network}, {description.num_classes} classes, one image of {size}, float32"
    column = max(len(here) for here, _ in rows.values())
    lines = [head, ""]
    if paper:
        lines.append(f"{'':<24}{'here':<{column}}  published for {paper.name}")
    for name, (here, published) in rows.items():
        if name != "time" or published:
            lines.append(f"{name:<24}{here:<{column}}  {published or ''}".rstrip())
    return lines
