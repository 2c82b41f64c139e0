"""The unit every network here is made of, and how its weights start."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn


class ConvBlock(nn.Module):
    """Convolution, then batch norm, then ReLU.

    The order of SegNet and DeconvNet (originals: `conv`, `bn`, `relu`). The convolution keeps its bias although a
    batch norm after it makes it idle, because the published networks and their parameter counts have it.

    padding: pixels of zeros on each side; None for as many as keep the size of the map.
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
    ) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, bias=bias)
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.activation = nn.ReLU(inplace=True) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, out_channels, H, W)
        return self.activation(self.norm(self.conv(x)))


class DeconvBlock(nn.Module):
    """Transposed convolution, then batch norm, then ReLU: a ConvBlock that spreads where the other gathers.

    padding: pixels cut off each side of the result; None for as many as keep the size of the map.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: int = 3, padding: int | None = None, norm: bool = True
    ) -> None:
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.deconv = nn.ConvTranspose2d(in_channels, out_channels, kernel, padding=padding)
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, out_channels, H, W)
        return self.activation(self.norm(self.deconv(x)))


def init_he(network: nn.Module) -> None:
    """Gaussian weights of standard deviation sqrt(2 / fan_in), zero biases: Caffe's `msra` filler.

    fan_in is how many products are summed into one output. A transposed convolution has its inputs in dimension 0 of
    the weight, where torch looks for the outputs: its fan_in is what torch calls fan_out.

    He et al. 2015, section 2.2, https://arxiv.org/abs/1502.01852; what SegNet's training files ask for.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            mode: Literal["fan_in", "fan_out"] = "fan_out" if isinstance(module, nn.ConvTranspose2d) else "fan_in"
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_gaussian(network: nn.Module, std: float) -> None:
    """Gaussian weights of one standard deviation, zero biases: Caffe's `gaussian` filler, for DeconvNet's decoder."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
