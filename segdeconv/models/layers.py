"""The unit every network here is made of, and how its weights start."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from segdeconv.models.activation_checkpointing import Checkpointable
from segdeconv.switches.modules import Unpool

Module = TypeVar("Module", bound=nn.Module)


class ConvBlock(nn.Module):
    """Convolution, then batch norm, then ReLU.

    The order of SegNet and DeconvNet (originals: `conv`, `bn`, `relu`). The convolution keeps its bias although a
    batch norm after it makes it idle, because the published networks and their parameter counts have it.

    padding: pixels of zeros on each side; None for as many as keep the size of the map.
    dilation: distance in pixels between what neighbouring weights see.
    groups: the channels fall into so many parts, each of which is convolved by itself.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 3,
        padding: int | None = None,
        norm: bool = True,
        activation: bool = True,
        bias: bool = True,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel // 2) if padding is None else padding
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=bias, groups=groups
        )
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.activation = nn.ReLU(inplace=True) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, out_channels, H, W)
        return self.activation(self.norm(self.conv(x)))


class DeconvBlock(nn.Module):
    """Transposed convolution, then batch norm, then ReLU: a ConvBlock that spreads where the other gathers.

    padding: pixels cut off each side of the result; None for as many as keep the size of the map.
    mirrored: a convolution from `out_channels` to `in_channels` whose filters and padding are used, transposed, in
        place of own ones.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 3,
        padding: int | None = None,
        norm: bool = True,
        mirrored: nn.Conv2d | None = None,
    ) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.deconv = (
            TiedDeconv(mirrored)
            if mirrored is not None
            else nn.ConvTranspose2d(in_channels, out_channels, kernel, padding=padding)
        )
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, out_channels, H, W)
        return self.activation(self.norm(self.deconv(x)))


class Blocks(Checkpointable, nn.Sequential):
    """Blocks in a row."""


class UnpoolStage(Checkpointable, nn.Sequential):
    """Unpooling, then blocks in a row, named by their numbers: a stage of a decoder. level: see `Unpool`."""

    def __init__(self, level: int, blocks: Iterable[nn.Module]) -> None:
        super().__init__(*blocks)
        self.unpool = Unpool(level)

    def forward(self, x: Tensor, switches: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """(N, C, h, w) and the switches of the pool from (H, W) = size to (h, w) -> (N, C', H, W)."""
        x = self.unpool(x, switches, size)
        *blocks, _ = self  # the last of its modules is the unpooling
        for block in blocks:
            x = block(x)
        return x


class BilinearDeconv(nn.ConvTranspose2d):
    """A transposed convolution that makes a map `stride` times as large, and starts as bilinear interpolation.

    From every channel to every channel, though at the start each goes to its own alone; no bias.

    >>> import torch
    >>> BilinearDeconv(11, kernel=8)(torch.zeros(1, 11, 23, 30), (45, 60)).shape
    torch.Size([1, 11, 45, 60])
    """

    def __init__(self, channels: int, *, kernel: int, stride: int = 2) -> None:
        # (kernel - stride) / 2 pixels less on each side leave exactly `stride` times the size.
        super().__init__(channels, channels, kernel, stride=stride, padding=(kernel - stride) // 2, bias=False)
        with torch.no_grad():
            self.weight.copy_(bilinear_kernel(channels, kernel, stride=stride))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """(N, channels, h, w) -> (N, channels, *size): up to `stride` times the size, cut below and right."""
        return cut(super().forward(x), size)


def cut(x: Tensor, size: Sequence[int], start: int = 0) -> Tensor:
    """(N, C, h, w) -> (N, C, *size), from row and column `start` on.

    By a negative padding: of a slice torch.export asks whether it is the whole, which free sizes do not say.
    """
    height, width = size
    return F.pad(x, (-start, start + width - x.shape[-1], -start, start + height - x.shape[-2]))


def bilinear_kernel(channels: int, kernel: int, *, stride: int | None = None) -> Tensor:
    """The weight of a transposed convolution that enlarges each map by itself, bilinearly, `stride` times.

    Returns (channels, channels, kernel, kernel), zero between different maps. `surgery.py` of FCN's authors.

    stride: of that convolution; None for half the kernel, which then just holds the tent. A larger kernel holds the
        same tent within zeros: an 8x8 of stride 2 starts as the 4x4. (Caffe's filler would widen the tent to the
        kernel: an 8x8 of stride 2 then blurs, and multiplies by four.)

    >>> 16 * bilinear_kernel(1, 4)[0, 0, :2]
    tensor([[1., 3., 3., 1.],
            [3., 9., 9., 3.]])
    """
    stride = (kernel + 1) // 2 if stride is None else stride
    tent = (1 - (torch.arange(kernel) - (kernel - 1) / 2).abs() / stride).clamp(min=0)
    return torch.eye(channels)[:, :, None, None] * tent[:, None] * tent


class Dropouts(nn.ModuleDict):
    """Dropout at the named places of a network, and nothing at its other places.

    Without a state, so that a network has the same checkpoints with and without it. Elements are dropped, not whole
    maps, and the others multiplied by 1 / (1 - p), as in the originals' Caffe.

    >>> import torch
    >>> Dropouts(["pool3"], 0.5).at("pool2", torch.ones(3))
    tensor([1., 1., 1.])
    """

    def __init__(self, places: Iterable[str] = (), p: float = 0.5) -> None:
        super().__init__({place: nn.Dropout(p) for place in places})

    def at(self, place: str, x: Tensor) -> Tensor:
        return self[place](x) if place in self else x


def fold_norms(network: Module) -> Module:
    """A copy of a trained network whose batch norms are part of the convolutions before them, for inference.

    The running statistics become weights: W * scale / sqrt(var + eps), b' = (b - mean) * scale / sqrt(var + eps) +
    shift. The authors' scripts do the same before testing. Results differ by rounding alone, which moves a switch where
    two of its four values are as good as equal.
    """
    folded = copy.deepcopy(network).eval()
    for block in folded.modules():
        if isinstance(block, DeconvBlock) and isinstance(block.deconv, TiedDeconv):
            block.deconv = block.deconv.untied()  # before the filters that it shares are scaled by another's norm
    for block in folded.modules():
        if isinstance(block, ConvBlock):
            block.norm = _folded(block.conv, block.norm)
        elif isinstance(block, DeconvBlock) and isinstance(block.deconv, nn.ConvTranspose2d):
            block.norm = _folded(block.deconv, block.norm)
    return folded


def _folded(layer: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d | nn.Identity) -> nn.BatchNorm2d | nn.Identity:
    """Take a norm into the layer before it; what is left of the norm."""
    if isinstance(norm, nn.Identity) or norm.running_mean is None or norm.running_var is None:
        return norm
    layer.weight, layer.bias = fuse_conv_bn_weights(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias,
        transpose=layer.transposed,
    )  # fmt: skip
    return nn.Identity()


class TiedDeconv(nn.Module):
    """The transpose of a convolution, with that convolution's own filters and a bias of its own.

    Zeiler & Fergus 2014, section 2.1, https://arxiv.org/abs/1311.2901: "transposed versions of the same filters".
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.mirrored = (conv,)  # in a tuple, so that its filters are not parameters of this module too
        self.bias = nn.Parameter(torch.zeros(conv.in_channels))

    def forward(self, x: Tensor) -> Tensor:  # (N, conv.out_channels, H, W) -> (N, conv.in_channels, H', W')
        (conv,) = self.mirrored
        return F.conv_transpose2d(x, conv.weight, self.bias, padding=int(conv.padding[0]))

    def untied(self) -> nn.ConvTranspose2d:
        """The same function with filters of its own."""
        (conv,) = self.mirrored
        kernel, padding = conv.kernel_size[0], int(conv.padding[0])
        deconv = nn.ConvTranspose2d(conv.out_channels, conv.in_channels, kernel, padding=padding).to(conv.weight)
        deconv.load_state_dict({"weight": conv.weight, "bias": self.bias})
        return deconv


def init_he(*parts: nn.Module) -> None:
    """Gaussian weights of standard deviation sqrt(2 / fan_in), zero biases: Caffe's `msra` filler.

    fan_in is how many products are summed into one output. A transposed convolution has its inputs in dimension 0 of
    the weight, where torch looks for the outputs: its fan_in is what torch calls fan_out.

    He et al. 2015, section 2.2, https://arxiv.org/abs/1502.01852; what SegNet's training files ask for.
    """
    for layer in _with_zero_biases(parts):
        mode: Literal["fan_in", "fan_out"] = "fan_out" if isinstance(layer, nn.ConvTranspose2d) else "fan_in"
        nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")


def init_gaussian(*parts: nn.Module, std: float) -> None:
    """Gaussian weights of one standard deviation, zero biases: Caffe's `gaussian` filler, for DeconvNet's decoder."""
    for layer in _with_zero_biases(parts):
        nn.init.normal_(layer.weight, std=std)


def _with_zero_biases(parts: Iterable[nn.Module]) -> Iterator[nn.Conv2d | nn.ConvTranspose2d]:
    """The convolutions of all parts, in order, each once its bias is set to zero."""
    for part in parts:
        for layer in part.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
                yield layer
