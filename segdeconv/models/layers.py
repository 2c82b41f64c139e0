"""Layers that the networks are made of, and their initialisation."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from segdeconv.models.activation_checkpointing import Checkpointable
from segdeconv.models.instance_batch_norm import InstanceBatchNorm2d
from segdeconv.switches.modules import Unpool

Module = TypeVar("Module", bound=nn.Module)


class ConvBlock(nn.Module):
    """Convolution, then batch norm, then ReLU.

    This is the order of SegNet and DeconvNet (`conv`, `bn`, `relu` in their files). The convolution has a bias although
    the batch norm after it cancels it, because the published networks and their parameter counts include it.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Side of the kernel.
        padding: Zeros on each side in pixels; None to keep the size of the map.
        norm: Use batch norm.
        activation: Use the ReLU.
        bias: Give the convolution a bias.
        dilation: Distance in pixels between the inputs of neighbouring weights.
        groups: Number of groups of channels that are convolved separately.
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
    """Transposed convolution, then batch norm, then ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Side of the kernel.
        padding: Pixels cropped from each side of the result; None to keep the size of the map.
        norm: Use batch norm.
        mirrored: A convolution from `out_channels` to `in_channels` whose filters and padding are used, transposed,
            instead of separate ones.
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
    """Sequence of blocks that can be checkpointed."""


class UnpoolStage(Checkpointable, nn.Sequential):
    """Stage of a decoder: unpooling, perhaps a copy of the encoder's map, then blocks, named by their numbers.

    Args:
        level: See `Unpool`.
        blocks: Applied in order after the unpooling.
    """

    def __init__(self, level: int, blocks: Iterable[nn.Module]) -> None:
        super().__init__(*blocks)
        self.unpool = Unpool(level)

    def forward(  # type: ignore[override]
        self, x: Tensor, switches: Tensor, size: tuple[int, int], copy: Tensor | None = None
    ) -> Tensor:
        """Decode x, (N, C, h, w), to (N, C', H, W), with the switches of the pool from size (H, W) to (h, w).

        A copy, (N, C, H, W), is concatenated to the unpooled map.
        """
        x = self.unpool(x, switches, size)
        if copy is not None:
            x = torch.cat([x, copy], dim=1)
        *blocks, _ = self  # the last module is the unpooling
        for block in blocks:
            x = block(x)
        return x


class BilinearDeconv(nn.ConvTranspose2d):
    """Transposed convolution that upsamples a map by `stride` and starts as bilinear interpolation, without bias.

    It connects every channel to every channel, but at the start the weights between different channels are zero.

    Args:
        channels: Channels of input and output.
        kernel: Side of the kernel.
        stride: Upsampling factor.

    Examples:
        >>> import torch
        >>> BilinearDeconv(11, kernel=8)(torch.zeros(1, 11, 23, 30), (45, 60)).shape
        torch.Size([1, 11, 45, 60])
    """

    def __init__(self, channels: int, *, kernel: int, stride: int = 2) -> None:
        # Cropping (kernel - stride) / 2 pixels from each side leaves exactly `stride` times the size.
        super().__init__(channels, channels, kernel, stride=stride, padding=(kernel - stride) // 2, bias=False)
        with torch.no_grad():
            self.weight.copy_(bilinear_kernel(channels, kernel, stride=stride))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """Upsample x, (N, channels, h, w), to (N, channels, *size), which is at most `stride` times its size."""
        return cut(super().forward(x), size)


def cut(x: Tensor, size: Sequence[int], start: int = 0) -> Tensor:
    """Crop x, (N, C, h, w), to (N, C, *size), from row and column `start` on."""
    # By negative padding: for a slice, torch.export asks whether it is the whole map, which dynamic sizes leave open.
    height, width = size
    return F.pad(x, (-start, start + width - x.shape[-1], -start, start + height - x.shape[-2]))


def bilinear_kernel(channels: int, kernel: int, *, stride: int | None = None) -> Tensor:
    """Return the weight of a transposed convolution that interpolates each map bilinearly by the factor `stride`.

    As in `surgery.py` of FCN's authors.

    Args:
        channels: Channels of input and output.
        kernel: Side of the kernel.
        stride: Stride of the convolution; None for half the kernel, which then just fits the triangle filter. A larger
            kernel has the same filter surrounded by zeros: 8x8 with stride 2 starts as the 4x4 kernel. (Caffe's filler
            would stretch the filter to the kernel; 8x8 with stride 2 then blurs, and multiplies by four.)

    Returns:
        (channels, channels, kernel, kernel), zero between different maps.

    Examples:
        >>> 16 * bilinear_kernel(1, 4)[0, 0, :2]
        tensor([[1., 3., 3., 1.],
                [3., 9., 9., 3.]])
    """
    stride = (kernel + 1) // 2 if stride is None else stride
    triangle = (1 - (torch.arange(kernel) - (kernel - 1) / 2).abs() / stride).clamp(min=0)
    return torch.eye(channels)[:, :, None, None] * triangle[:, None] * triangle


class Dropouts(nn.ModuleDict):
    """Dropout at named places of a network, and the identity at all other places.

    It has no state, so that a network has the same checkpoints with and without it. It drops elements, not whole maps,
    and multiplies the others by 1 / (1 - p), as in the authors' version of Caffe.

    Args:
        places: Names of the places with dropout, see `dropout_places`.
        p: Dropout probability.

    Examples:
        >>> import torch
        >>> Dropouts(["pool3"], 0.5).at("pool2", torch.ones(3))
        tensor([1., 1., 1.])
    """

    def __init__(self, places: Iterable[str] = (), p: float = 0.5) -> None:
        super().__init__({place: nn.Dropout(p) for place in places})

    def at(self, place: str, x: Tensor) -> Tensor:
        """Apply the dropout of a place to x, or return x unchanged if the place has none."""
        return self[place](x) if place in self else x


def fold_norms(network: Module) -> Module:
    """Return a copy of a trained network with the batch norms folded into the convolutions before them, for inference.

    The weights become W * scale / sqrt(var + eps) and the biases (b - mean) * scale / sqrt(var + eps) + shift. The
    authors' scripts do the same before testing. Results differ by rounding only, which changes a switch where the two
    largest values of its window are almost equal. Norms with statistics of each image stay.
    """
    folded = copy.deepcopy(network).eval()
    for block in folded.modules():
        if isinstance(block, DeconvBlock) and isinstance(block.deconv, TiedDeconv):
            block.deconv = block.deconv.untied()  # before the shared filters are scaled by the convolution's norm
    for block in folded.modules():
        if isinstance(block, ConvBlock):
            block.norm = _folded(block.conv, block.norm)
        elif isinstance(block, DeconvBlock) and isinstance(block.deconv, nn.ConvTranspose2d):
            block.norm = _folded(block.deconv, block.norm)
    return folded


def _folded(layer: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d | nn.Identity) -> nn.BatchNorm2d | nn.Identity:
    """Fold a norm into the layer before it and return its replacement."""
    if isinstance(norm, nn.Identity | InstanceBatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        return norm
    layer.weight, layer.bias = fuse_conv_bn_weights(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias,
        transpose=layer.transposed,
    )  # fmt: skip
    return nn.Identity()


class TiedDeconv(nn.Module):
    """Transposed convolution that shares the filters of a convolution and has a separate bias.

    Zeiler & Fergus 2014, section 2.1, https://arxiv.org/abs/1311.2901: "transposed versions of the same filters".

    Args:
        conv: The convolution whose filters and padding are used.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.mirrored = (conv,)  # in a tuple, so that its filters do not become parameters of this module too
        self.bias = nn.Parameter(torch.zeros(conv.in_channels))

    def forward(self, x: Tensor) -> Tensor:  # (N, conv.out_channels, H, W) -> (N, conv.in_channels, H', W')
        (conv,) = self.mirrored
        return F.conv_transpose2d(x, conv.weight, self.bias, padding=int(conv.padding[0]))

    def untied(self) -> nn.ConvTranspose2d:
        """Return an equal transposed convolution with a copy of the filters."""
        (conv,) = self.mirrored
        kernel, padding = conv.kernel_size[0], int(conv.padding[0])
        deconv = nn.ConvTranspose2d(conv.out_channels, conv.in_channels, kernel, padding=padding).to(conv.weight)
        deconv.load_state_dict({"weight": conv.weight, "bias": self.bias})
        return deconv


def init_he(*parts: nn.Module) -> None:
    """Initialise all convolutions with Gaussian weights of standard deviation sqrt(2 / fan_in) and zero biases.

    He et al. 2015, section 2.2, https://arxiv.org/abs/1502.01852; Caffe's `msra` filler, which SegNet's training files
    use. fan_in is the number of products that are summed into one output. The weight of a transposed convolution has
    its inputs in dimension 0, where torch expects the outputs, so its fan_in is torch's fan_out.
    """
    for layer in _with_zero_biases(parts):
        mode: Literal["fan_in", "fan_out"] = "fan_out" if isinstance(layer, nn.ConvTranspose2d) else "fan_in"
        nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")


def init_gaussian(*parts: nn.Module, std: float) -> None:
    """Initialise all convolutions with Gaussian weights of standard deviation `std` and zero biases.

    Caffe's `gaussian` filler, which DeconvNet's decoder uses.
    """
    for layer in _with_zero_biases(parts):
        nn.init.normal_(layer.weight, std=std)


def _with_zero_biases(parts: Iterable[nn.Module]) -> Iterator[nn.Conv2d | nn.ConvTranspose2d]:
    """Set the biases of all convolutions to zero and yield the convolutions in order."""
    for part in parts:
        for layer in part.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
                yield layer
