"""The unit every network here is made of, and how its weights start."""

from __future__ import annotations

from torch import Tensor, nn


class ConvBlock(nn.Module):
    """Convolution, then batch norm, then ReLU; the size of the map does not change.

    The order of SegNet and DeconvNet (originals: `conv`, `bn`, `relu`). The convolution keeps its bias although a
    batch norm after it makes it idle, because the published networks and their parameter counts have it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 3,
        norm: bool = True,
        activation: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()
        self.activation = nn.ReLU(inplace=True) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, out_channels, H, W)
        return self.activation(self.norm(self.conv(x)))


def init_he(network: nn.Module) -> None:
    """Gaussian weights of standard deviation sqrt(2 / fan_in), zero biases: Caffe's `msra` filler.

    He et al. 2015, section 2.2, https://arxiv.org/abs/1502.01852; what SegNet's training files ask for.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
