"""Networks in 8-bit integers on a CPU: convolutions by oneDNN's kernels in torch, and what lies between them on codes.

Static quantisation, Jacob et al. 2018, sections 2.1 and 3, https://arxiv.org/abs/1712.05877. `measure_ranges` measures
the values of every map on a few images. A quantised network is the float network with other modules, those of
`codes.py`: the same class, whose `forward` passes `Codes` around.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from segdeconv.errors import UsageError
from segdeconv.inference.codes import (
    Codes,
    QuantizedConv,
    QuantizedEnlarge,
    QuantizedMaxPool,
    QuantizedUnpool,
    Unequal,
)
from segdeconv.models import SegmentationModel
from segdeconv.switches.modules import MaxPool, Unpool

Model = TypeVar("Model", bound=SegmentationModel)
Ranges = Mapping[str, Mapping[str, Sequence[float]]]  # by the name of a convolution: `input` and `output`

INT8 = "int8"  # the precision
LINK_SIZE = 64  # side of the image with which the scales are propagated


def is_supported() -> bool:
    """Return whether this build of torch has oneDNN's integer convolutions, which exist for x86 only."""
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.onednn, "qconv2d_pointwise")


def _as_conv(layer: nn.Module) -> nn.Conv2d | None:
    """Return a convolution that computes the same as a layer, or None if there is none of integers."""
    if isinstance(layer, nn.Conv2d):
        usable = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return layer if usable else None
    if not isinstance(layer, nn.ConvTranspose2d) or layer.groups != 1 or any(layer.output_padding):
        return None
    kernel, bias, weight = layer.kernel_size, layer.bias, layer.weight.detach()  # (in, out, kernel, kernel)
    conv: nn.Conv2d | None = None
    if layer.stride == kernel and kernel[0] == kernel[1] and layer.padding == (0, 0) and layer.dilation == (1, 1):
        cells = kernel[0] * kernel[1]
        conv = nn.Conv2d(layer.in_channels, layer.out_channels * cells, 1, bias=bias is not None)
        filters = weight.permute(1, 2, 3, 0).reshape(-1, layer.in_channels, 1, 1)
        bias = None if bias is None else bias.detach().repeat_interleave(cells)
    elif layer.stride == (1, 1) and kernel[0] == kernel[1]:
        # Cropping by p is padding by (kernel - 1) * dilation - p.
        dilation: Any = layer.dilation
        cropped: Any = layer.padding
        geometry = zip(dilation, kernel, cropped, strict=True)
        padding: Any = tuple(step * (side - 1) - cut for step, side, cut in geometry)
        if min(padding) < 0:
            return None
        conv = nn.Conv2d(
            layer.in_channels, layer.out_channels, kernel[0], padding=padding, dilation=dilation, bias=bias is not None
        )
        filters = weight.transpose(0, 1).flip(2, 3)
    if conv is not None:
        with torch.no_grad():
            conv.weight.copy_(filters)
            if conv.bias is not None and bias is not None:
                conv.bias.copy_(bias)
    return conv


def _convolutions(model: nn.Module) -> Iterable[tuple[str, nn.Module, nn.Module, str | None]]:
    """Yield (name, layer, parent, name of the ReLU after it in the parent, or None) of every convolution."""
    for path, parent in model.named_modules():
        children = [(name, child) for name, child in parent.named_children() if not isinstance(child, nn.Identity)]
        for position, (name, child) in enumerate(children):
            if not isinstance(child, nn.Conv2d | nn.ConvTranspose2d):
                continue
            following = children[position + 1] if position + 1 < len(children) else (None, None)
            sequential = isinstance(parent, nn.Sequential) or name in ("conv", "deconv")  # the blocks of models/layers
            relu = following[0] if sequential and isinstance(following[1], nn.ReLU) else None
            yield f"{path}.{name}".lstrip("."), child, parent, relu


def measure_ranges(
    model: SegmentationModel, images: Iterable[Tensor], *, forward: Callable[[Tensor], Any] | None = None
) -> dict[str, dict[str, list[float]]]:
    """Measure the smallest and the largest value of the input and the output of every convolution.

    They are means over the batches: a single extreme value would make the steps of all others coarser.

    Args:
        model: A network prepared for inference in float32, with norms folded.
        images: Batches of normalised images, (N, C, H, W).
        forward: Computes the scores of a batch; by default `model` itself.

    Returns:
        For each convolution `input` and `output`, [smallest, largest]; the output after its ReLU.
    """
    extremes: dict[str, dict[str, list[Tensor]]] = {}

    def record(name: str, kind: str, values: Tensor) -> None:
        extremes.setdefault(name, {}).setdefault(kind, []).append(torch.stack(values.aminmax()))

    def hook(name: str, relu: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def measure(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            record(name, "input", inputs[0])
            record(name, "output", output.clamp(min=0) if relu else output)

        return measure

    handles = [
        layer.register_forward_hook(hook(name, relu is not None)) for name, layer, _, relu in _convolutions(model)
    ]
    try:
        with torch.inference_mode():
            for batch in images:
                (forward or model)(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: {
            kind: [float(f"{value:.6g}") for value in torch.stack(values).mean(dim=0).tolist()]
            for kind, values in kinds.items()
        }
        for name, kinds in extremes.items()
    }


def quantize(model: Model, ranges: Ranges) -> Model:
    """Return a copy of a network that computes in 8-bit integers wherever it can.

    Args:
        model: A network prepared for inference in float32 on the CPU, with norms folded.
        ranges: From `measure_ranges`.

    Raises:
        UsageError: torch has no integer convolutions for this machine, the ranges are those of another network, or the
            network does something with its maps that codes do not support.
    """
    if not is_supported():
        raise UsageError("precision=int8 needs torch with oneDNN on an x86 CPU - leave it out")
    network = copy.deepcopy(model)
    for name, layer, parent, relu in list(_convolutions(network)):
        if (conv := _as_conv(layer)) is None:
            continue
        if name not in ranges:
            raise UsageError(f"precision={INT8}: the ranges lack {name}, so they are of another network - calibrate it")
        quantized = QuantizedConv(conv, ranges[name], relu=relu is not None)
        replacement: nn.Module = quantized
        if isinstance(layer, nn.ConvTranspose2d) and layer.stride != (1, 1):
            replacement = QuantizedEnlarge(quantized, layer.stride[0])
        setattr(parent, name.rpartition(".")[2], replacement)
        if relu is not None:
            setattr(parent, relu, nn.Identity())
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MaxPool):
                setattr(parent, name, QuantizedMaxPool(child))
            elif isinstance(child, Unpool):
                setattr(parent, name, QuantizedUnpool(child))
    _link(network)
    return network


def _link(network: SegmentationModel) -> None:
    """Pass an image through the network: propagate the scales, find a common one for maps that are joined, and let the
    last convolution return float values.
    """
    side = max(LINK_SIZE, network.minimum_size)
    image = torch.zeros(1, network.in_channels, side, side)
    try:
        with torch.inference_mode():
            for _ in range(sum(isinstance(module, QuantizedConv) for module in network.modules()) + 2):
                with suppress(Unequal):
                    scores: Any = network(image)
                    if not isinstance(scores, Codes):
                        return
                    for maker in scores.makers:
                        maker.as_float = True
    except (AttributeError, TypeError, RuntimeError) as error:
        name = type(network).__name__
        raise UsageError(f"precision=int8 does not support {name}: {error} - leave it out") from error
