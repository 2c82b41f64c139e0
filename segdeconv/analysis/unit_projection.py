"""What a unit sees: its strongest activations, projected back to pixels through the switches.

Zeiler & Fergus 2014, section 2.1, https://arxiv.org/abs/1311.2901. All activations of a layer but one are set to zero,
and the rest of the network below is walked backwards: values are unpooled with the switches of this image, rectified,
and convolved with the transposed filters. But for the rectification these are the steps of the backward pass, whose
gradient of a max-pool is an unpooling and of a convolution the transposed one. So a projection here is a backward pass
in which ReLUs have another rule, and works for every network whose nonlinearities are ReLUs and max-pools:

    deconvnet   what comes back is rectified; where the ReLU was open does not matter
    guided      rectified, and only where the ReLU was open: Springenberg et al. 2015, https://arxiv.org/abs/1412.6806
    gradient    only where the ReLU was open: the gradient itself, of Simonyan et al. 2014, arXiv 1312.6034

What the paper does not say: no bias is used. Batch norm multiplies by scale / standard deviation, as if folded into the
convolution before it, and its shift is ignored. SegNet-Basic's normalisation of the input counts with its derivative.
In a decoder, an unpooling reads the cells that its switches name. Where a map is copied past others both ways add up. A
network that pools first and then rectifies (`switch_source=pre_relu`) has other switches than the paper's where nothing
in a window is above zero: the least negative cell and not the first.
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
    """One activation: number of the map (channel), and (row, column) in it."""

    map: int
    row: int
    column: int


class Activation(NamedTuple):
    """A unit in one image of a set, and how strong it is there."""

    value: float
    image: int
    unit: Unit


def project(
    network: nn.Module, image: Tensor, layer: str, units: Sequence[Unit], *, methods: Sequence[Method] = ("deconvnet",)
) -> dict[Method, Tensor]:
    """Project activations of one layer to pixels, each by itself, multiplied by its value.

    network: in evaluation mode. image: (1, C, H, W), normalised, on the network's device. layer: the name of a module,
        such as `encoder.stages.2`, whose output is (1, K, h, w).
    Returns (len(units), C, H, W) of each method, in the units of the image.
    """
    image = image.detach().clone().requires_grad_()
    rectifying = _Rectifying()
    with torch.enable_grad(), rectifying:
        maps = _run_to(network, image, [layer])[layer]
    found: dict[Method, Tensor] = {}
    for method in methods:
        rectifying.method = method
        projections = []
        for unit in units:
            value = maps[0, unit.map, unit.row, unit.column]
            (gradient,) = torch.autograd.grad(value, image, retain_graph=True)
            projections.append(gradient * value.detach())
        found[method] = torch.cat(projections)
    return found


class _Rectifying(TorchFunctionMode):
    """Every ReLU that torch is asked for, by a module or a function, goes backwards by the rule of `method`."""

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
        (opened,) = ctx.saved_tensors
        method = ctx.rectifying.method
        if method != "gradient":
            signal = signal.clamp(min=0)
        return (signal if method == "deconvnet" else signal * opened), None


class _Seen(Exception):
    """All that was asked for has been seen."""


def _run_to(network: nn.Module, image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """The outputs of the modules named, each as it was when it came out; the network runs no further than the last."""
    modules = dict(network.named_modules())
    found: dict[str, Tensor] = {}

    def keep(layer: str) -> Callable[..., None]:
        def hear(module: nn.Module, given: Any, output: Any) -> None:
            found[layer] = output if len(layers) == 1 else output.clone()  # what follows may write into it
            if len(found) == len(layers):
                raise _Seen

        return hear

    with ExitStack() as hooks, suppress(_Seen):
        for layer in layers:
            if layer not in modules:
                raise UsageError(f"the network has no layer '{layer}' - {did_you_mean(layer, modules)}")
            hooks.enter_context(modules[layer].register_forward_hook(keep(layer)))
        network(image)
    for layer in layers:
        if not isinstance(found.get(layer), Tensor) or found[layer].ndim != 4:
            raise UsageError(
                f"'{layer}' gives no maps of (1, channels, rows, columns) - choose a convolution or a stage"
            )
    return found


@dataclass
class StrongestActivations:
    """The strongest activations of every map of some layers over a set of images, as they come by.

    num: how many of each map. per_image: the most that one image gives, at places whose fields do not overlap by half.
    kept: of each layer, (K, n) values and (K, n, 3) int64 of image, row and column, the strongest first.
    """

    network: nn.Module
    layers: Sequence[str]
    num: int = 9
    per_image: int = 1

    def __post_init__(self) -> None:
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}
        self.reach: dict[tuple[str, tuple[int, int]], tuple[int, int]] = {}

    def update(self, image: Tensor, number: int) -> None:
        """image: (1, C, H, W), normalised; number: its own in the set."""
        with torch.inference_mode():
            maps = _run_to(self.network, image, self.layers)
        size = (image.shape[-2], image.shape[-1])
        for layer, output in maps.items():
            values, places = self._of_one(output[0].float().cpu(), layer, size)
            numbered = torch.cat([torch.full((*places.shape[:2], 1), number), places], dim=2)
            if layer in self.kept:
                values = torch.cat([self.kept[layer][0], values], dim=1)
                numbered = torch.cat([self.kept[layer][1], numbered], dim=1)
            values, order = values.sort(dim=1, descending=True, stable=True)
            numbered = numbered.gather(1, order[..., None].expand_as(numbered))
            self.kept[layer] = values[:, : self.num], numbered[:, : self.num]

    def _of_one(self, maps: Tensor, layer: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(K, h, w) -> the (K, per_image) strongest values and their (K, per_image, 2) places."""
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

    def of(self, layer: str, map: int) -> list[Activation]:
        """The strongest of a map, those that are above zero."""
        values, places = self.kept[layer]
        return [
            Activation(value, image, Unit(map, row, column))
            for value, (image, row, column) in zip(values[map].tolist(), places[map].tolist(), strict=True)
            if value > 0
        ]

    def alive(self, layer: str) -> list[int]:
        """Numbers of the maps of a layer that were above zero anywhere."""
        return torch.nonzero(self.kept[layer][0][:, 0] > 0)[:, 0].tolist()


def receptive_fields(
    network: nn.Module, layer: str, size: tuple[int, int]
) -> Callable[[int, int], tuple[int, int, int, int]]:
    """What a layer's units can see of images of size (H, W), exactly: (row, column) -> (top, left, bottom, right).

    In pixels of the image, bottom and right excluded. All of it where that is not known.
    """
    seen = traced(network, size)
    rows = [index for index, row in enumerate(seen.layers) if f"{row.name}.".startswith(f"{layer}.")]
    spans = seen.spans[rows[-1]] if rows else None

    def box(row: int, column: int) -> tuple[int, int, int, int]:
        if spans is None:
            return 0, 0, size[0], size[1]
        down, across = spans
        return int(down.first[row]), int(across.first[column]), int(down.last[row]) + 1, int(across.last[column]) + 1

    return box


def on_grey(projection: Tensor, std: Tensor) -> Tensor:
    """(C, H, W) in the units of the image -> 0..1: zero is middle grey, and what exceeds the 99.5th percentile of all
    sizes is black or white.

    std: (C,), that the image was divided by, so that the colours are those of pixels.
    """
    pixels = projection * std[:, None, None].to(projection)
    top = torch.quantile(pixels.abs().flatten(), 0.995)
    top = top if top > 0 else pixels.abs().amax().clamp(min=1e-12)
    return (0.5 + 0.5 * pixels / top).clamp(0, 1)
