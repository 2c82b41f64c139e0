"""Projection of the strongest activations of units back to pixels, through the switches.

Zeiler & Fergus 2014, section 2.1, https://arxiv.org/abs/1311.2901. All activations of a layer but one are set to zero,
and the layers below are traversed backwards: values are unpooled with the switches of this image, rectified, and
convolved with the transposed filters. Apart from the rectification, these are the steps of the backward pass, since the
gradient of a max pool is an unpooling and that of a convolution the transposed convolution. A projection is therefore
computed as a backward pass with another rule for ReLUs. It works for every network whose nonlinearities are ReLUs and
max pools:

    deconvnet   the signal is rectified, regardless of the activations in the forward pass
    guided      the signal is rectified, and zero where the ReLU was inactive: Springenberg et al. 2015,
                https://arxiv.org/abs/1412.6806
    gradient    the signal is zero where the ReLU was inactive: the gradient, Simonyan et al. 2014, arXiv 1312.6034

Details that the paper leaves open: no bias is used. Batch norm multiplies by scale / standard deviation, as if folded
into the convolution before it, and its shift is ignored. SegNet-Basic's normalisation of the input enters with its
derivative. In a decoder, unpooling passes the signal back from the cells that its switches select. Where a map is
copied by a skip connection, the signals of both paths add up. A network that pools before it rectifies
(`switch_source=pre_relu`) has other switches than the paper's in windows without a value above zero: the least negative
cell instead of the first.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from segdeconv.errors import UsageError, did_you_mean
from segdeconv.summary.tracing import traced

Method = Literal["deconvnet", "guided", "gradient"]
METHODS: tuple[Method, ...] = ("deconvnet", "guided", "gradient")


class Unit(NamedTuple):
    """The position of an activation: the index of the map (channel), and the row and column in it."""

    map: int
    row: int
    column: int


class Activation(NamedTuple):
    """The value of a unit in one image of a set."""

    value: float
    image: int
    unit: Unit


def project(
    network: nn.Module, image: Tensor, layer: str, units: Sequence[Unit], *, methods: Sequence[Method] = ("deconvnet",)
) -> dict[Method, Tensor]:
    """Project activations of one layer to pixels, each separately, multiplied by its value.

    Args:
        network: The network, in evaluation mode.
        image: (1, C, H, W), normalised, on the network's device.
        layer: The name of a module, such as `encoder.stages.2`, whose output is (1, K, h, w).
        units: The activations.
        methods: The methods; see the module docstring.

    Returns:
        (len(units), C, H, W) by method, in the units of the image.

    Raises:
        UsageError: The layer does not exist, or its output has another shape.
    """
    image = image.detach().clone().requires_grad_()
    rectifying = _Rectifying()
    with torch.enable_grad(), rectifying:
        maps = _run_to(network, image, [layer])[layer]
    projected: dict[Method, Tensor] = {}
    for method in methods:
        rectifying.method = method
        projections = []
        for unit in units:
            value = maps[0, unit.map, unit.row, unit.column]
            (gradient,) = torch.autograd.grad(value, image, retain_graph=True)
            projections.append(gradient * value.detach())
        projected[method] = torch.cat(projections)
    return projected


class _Rectifying(TorchFunctionMode):
    """Mode in which the backward pass of every ReLU, module or function, follows the rule of `method`."""

    RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
    method: Method = "deconvnet"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.RELUS:
            return _Rectification.apply(args[0], self)
        return func(*args, **(kwargs or {}))


class _Rectification(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rectifying: _Rectifying) -> Tensor:
        ctx.rectifying = rectifying
        ctx.save_for_backward(x > 0)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, signal: Tensor) -> tuple[Tensor, None]:
        (active,) = ctx.saved_tensors
        method = ctx.rectifying.method
        if method != "gradient":
            signal = signal.clamp(min=0)
        return (signal if method == "deconvnet" else signal * active), None


class _AllRecorded(Exception):
    """The outputs of all layers have been recorded."""


def _run_to(network: nn.Module, image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Return the outputs of the named modules, unmodified by later ones; the forward pass stops after the last."""
    modules = dict(network.named_modules())
    outputs: dict[str, Tensor] = {}

    def recorder(layer: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            outputs[layer] = output if len(layers) == 1 else output.clone()  # later modules may write into it
            if len(outputs) == len(layers):
                raise _AllRecorded

        return record

    with ExitStack() as hooks, suppress(_AllRecorded):
        for layer in layers:
            if layer not in modules:
                raise UsageError(f"the network has no layer '{layer}' - {did_you_mean(layer, modules)}")
            hooks.enter_context(modules[layer].register_forward_hook(recorder(layer)))
        network(image)
    for layer in layers:
        if not isinstance(outputs.get(layer), Tensor) or outputs[layer].ndim != 4:
            raise UsageError(
                f"the output of layer '{layer}' does not have the shape (1, channels, rows, columns) - choose a "
                "convolution or a stage"
            )
    return outputs


@dataclass
class StrongestActivations:
    """Accumulator of the strongest activations of every map of some layers over a set of images.

    Args:
        network: The network, in evaluation mode.
        layers: The names of the layers.
        num: The number of activations per map.
        per_image: The largest number from one image, at positions whose receptive fields overlap by less than half.

    Attributes:
        kept: By layer, (K, n) values and (K, n, 3) int64 with image, row and column, the strongest first.
        reach: By layer and image size, half the receptive field, in rows and columns of the layer.
    """

    network: nn.Module
    layers: Sequence[str]
    num: int = 9
    per_image: int = 1

    def __post_init__(self) -> None:
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}
        self.reach: dict[tuple[str, tuple[int, int]], tuple[int, int]] = {}

    def update(self, image: Tensor, number: int) -> None:
        """Add an image.

        Args:
            image: (1, C, H, W), normalised.
            number: The index of the image in the set.
        """
        with torch.inference_mode():
            maps = _run_to(self.network, image, self.layers)
        size = (image.shape[-2], image.shape[-1])
        for layer, output in maps.items():
            values, places = self._strongest_in_image(output[0].float().cpu(), layer, size)
            numbered = torch.cat([torch.full((*places.shape[:2], 1), number), places], dim=2)
            if layer in self.kept:
                values = torch.cat([self.kept[layer][0], values], dim=1)
                numbered = torch.cat([self.kept[layer][1], numbered], dim=1)
            values, order = values.sort(dim=1, descending=True, stable=True)
            numbered = numbered.gather(1, order[..., None].expand_as(numbered))
            self.kept[layer] = values[:, : self.num], numbered[:, : self.num]

    def _strongest_in_image(self, maps: Tensor, layer: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the (K, per_image) strongest values of maps (K, h, w) and their (K, per_image, 2) positions."""
        height, width = maps.shape[1:]
        if self.per_image > 1 and (layer, size) not in self.reach:
            boxes = receptive_fields(self.network, layer, size)
            top, left, bottom, right = boxes(height // 2, width // 2)
            rows, columns = (bottom - top) * height / size[0] / 2, (right - left) * width / size[1] / 2
            self.reach[layer, size] = int(rows), int(columns)
        values, places = [], []
        maps = maps.clone()
        for _ in range(self.per_image):
            value, place = maps.flatten(1).max(dim=1)
            row, column = place // width, place % width
            values.append(value)
            places.append(torch.stack([row, column], dim=1))
            if self.per_image > 1:
                near_rows, near_columns = self.reach[layer, size]
                near = (torch.arange(height) - row[:, None]).abs()[:, :, None] <= near_rows
                near = near & ((torch.arange(width) - column[:, None]).abs()[:, None] <= near_columns)
                maps.masked_fill_(near, float("-inf"))
        return torch.stack(values, dim=1), torch.stack(places, dim=1)

    def strongest(self, layer: str, map: int) -> list[Activation]:
        """Return the strongest activations of a map that are above zero."""
        values, places = self.kept[layer]
        return [
            Activation(value, image, Unit(map, row, column))
            for value, (image, row, column) in zip(values[map].tolist(), places[map].tolist(), strict=True)
            if value > 0
        ]

    def active_maps(self, layer: str) -> list[int]:
        """Return the indices of the maps of a layer that were above zero anywhere."""
        return torch.nonzero(self.kept[layer][0][:, 0] > 0)[:, 0].tolist()


def receptive_fields(
    network: nn.Module, layer: str, size: tuple[int, int]
) -> Callable[[int, int], tuple[int, int, int, int]]:
    """Return a function that computes the exact receptive field of a layer's units in images of one size.

    Args:
        network: The network.
        layer: The name of the layer.
        size: (H, W) of the images.

    Returns:
        A function (row, column) -> (top, left, bottom, right), in pixels of the image, bottom and right excluded. It
        returns the whole image if the receptive field is unknown.
    """
    trace = traced(network, size)
    rows = [index for index, row in enumerate(trace.layers) if f"{row.name}.".startswith(f"{layer}.")]
    spans = trace.spans[rows[-1]] if rows else None

    def box(row: int, column: int) -> tuple[int, int, int, int]:
        if spans is None:
            return 0, 0, size[0], size[1]
        down, across = spans
        return int(down.first[row]), int(across.first[column]), int(down.last[row]) + 1, int(across.last[column]) + 1

    return box


def scale_to_grey(projection: Tensor, std: Tensor) -> Tensor:
    """Scale a projection to 0..1, with zero at middle grey.

    Values whose magnitude exceeds the 99.5th percentile become black or white.

    Args:
        projection: (C, H, W), in the units of the normalised image.
        std: (C,), the standard deviations of the preprocessing, which restore the colours of pixels.

    Returns:
        (C, H, W) in 0..1.
    """
    pixels = projection * std[:, None, None].to(projection)
    top = torch.quantile(pixels.abs().flatten(), 0.995)
    top = top if top > 0 else pixels.abs().amax().clamp(min=1e-12)
    return (0.5 + 0.5 * pixels / top).clamp(0, 1)
