"""FPN: a feature pyramid that adds coarse maps to finer ones, with one head shared by all levels.

Lin, Dollar, Girshick, He, Hariharan, Belongie 2017, section 3 and figure 3, https://arxiv.org/abs/1612.03144; for
segmentation as in Kirillov, Girshick, He, Dollar 2019, section 3 and figure 3, https://arxiv.org/abs/1901.02446.

    image -> [.. pool2]   ->  [.. pool3]   ->  [.. pool4]   ->  [.. pool5]
                 |                |                |                |
              lateral          lateral          lateral          lateral                1x1 convolutions
                 |                |                |                |
                 + <- x2, nearest + <- x2, nearest + <- x2, nearest |
                 |                |                |                |
              smooth           smooth           smooth           smooth                 3x3 convolutions
                 |                |                |                |
               head             head             head             head                  the same one
                 |                |                |                |
              levels[0]  + x2, bilinear  + x4, bilinear   + x8, bilinear: their mean -> x4, bilinear -> logits
"""

import math
from collections import OrderedDict
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from segdeconv.errors import UsageError
from segdeconv.models.base import SegmentationModel
from segdeconv.models.encoders import StagesArgument
from segdeconv.models.layers import cut, init_he
from segdeconv.models.vgg import vgg_encoder


class FPN(SegmentationModel):
    """Feature pyramid network on a VGG encoder, with one fully convolutional head shared by its levels.

    The levels differ in size. `combine` upsamples each to the finest level, averages them there, and upsamples the
    mean to the image. Maps are upsampled by powers of two and then cropped, so that cell i of a map stays aligned with
    cells 2 i and 2 i + 1 of the next finer map even where an odd side was pooled.

    It differs from Kirillov et al. in that one head including the classifier is applied to every level, as in the
    region proposals of Lin et al.; their branches have separate convolutions, and the classifier comes after the sum.
    VGG's pooled maps take the place of ResNet's stages.

    Args:
        num_classes: Number of output channels.
        in_channels: Number of channels of the images.
        depth: See `vgg_encoder`.
        norm: See `vgg_encoder`.
        width: See `vgg_encoder`.
        channels: Channels of the pyramid; the head has half as many.
        num_levels: Number of levels, which use the deepest pooled maps.
        supervise_levels: Also train the logits of each level, upsampled to the image. The loss is then the mean over
            them and the combined logits. Predictions always use the combined logits.
        pretrained: See `vgg_encoder`.
        stages: See `vgg_encoder`.

    Examples:
        >>> import torch
        >>> network, image = FPN(num_classes=11, width=0.125, channels=16), torch.zeros(1, 3, 360, 480)
        >>> [tuple(level.shape) for level in network.levels(image)]
        [(1, 11, 90, 120), (1, 11, 45, 60), (1, 11, 23, 30), (1, 11, 12, 15)]
        >>> network(image).shape
        torch.Size([1, 11, 360, 480])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        depth: Literal[11, 13, 16, 19] = 16,
        norm: bool = True,
        width: Annotated[float, Field(gt=0, le=4)] = 1.0,
        channels: Annotated[int, Field(ge=16, multiple_of=16)] = 256,
        num_levels: PositiveInt = 4,
        supervise_levels: bool = False,
        pretrained: str = "none",
        stages: StagesArgument | None = None,
    ) -> None:
        super().__init__(num_classes, in_channels=in_channels)
        self.supervise_levels = supervise_levels
        self.encoder = vgg_encoder(
            depth, in_channels=in_channels, norm=norm, width=width, pretrained=pretrained, stages=stages
        )
        num_stages = len(self.encoder.channels)
        if num_levels > num_stages:
            raise UsageError(
                f"model.num_levels={num_levels}: the encoder has only {num_stages} stages - use {num_stages} or less"
            )
        self.num_levels = num_levels
        self.strides = [2**stage for stage in range(num_stages - num_levels + 1, num_stages + 1)]
        self.laterals = nn.ModuleList(
            nn.Conv2d(stage[-1], channels, 1) for stage in self.encoder.channels[-num_levels:]
        )
        self.smooths = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_levels))
        inner = channels // 2
        # Group norm, as in Kirillov et al., because batch statistics would mix the levels, which differ.
        self.head = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(channels, inner, 3, padding=1),
                norm=nn.GroupNorm(math.gcd(32, inner // 4), inner),
                activation=nn.ReLU(inplace=True),
                classifier=nn.Conv2d(inner, num_classes, 1),
            )
        )
        init_he(self.laterals, self.smooths, self.head)

    def forward(self, image: Tensor) -> Tensor:
        return self.combine(self.levels(image), image)

    def supervised(self, image: Tensor) -> tuple[Tensor, ...]:
        if not self.supervise_levels:
            return super().supervised(image)
        levels = self.levels(image)
        upsampled = (_upsampled(level, stride, image) for level, stride in zip(levels, self.strides, strict=True))
        return (self.combine(levels, image), *upsampled)

    def levels(self, image: Tensor) -> list[Tensor]:
        """Compute the logits of every level at its own size, the finest first."""
        pooled = self.encoder(image).pooled[-self.num_levels :]
        levels: list[Tensor] = []
        merged: Tensor | None = None
        for pooling, lateral, smooth in reversed(list(zip(pooled, self.laterals, self.smooths, strict=True))):
            x = lateral(pooling.features)
            if merged is not None:
                above = F.interpolate(merged, scale_factor=2.0, mode="nearest")
                x = x + cut(above, x.shape[-2:])
            merged = x
            levels.append(self.head(smooth(merged)))
        return levels[::-1]

    def combine(self, levels: list[Tensor], image: Tensor) -> Tensor:
        """Combine the logits of the levels, the finest first, into one map of the image's size."""
        finest = levels[0]
        total = finest
        for level, stride in zip(levels[1:], self.strides[1:], strict=True):
            total = total + _upsampled(level, stride // self.strides[0], finest)
        return _upsampled(total / len(levels), self.strides[0], image)


def _upsampled(x: Tensor, factor: int, like: Tensor) -> Tensor:
    """Upsample x, (N, C, h, w), by `factor` and crop it to the height and width of `like`."""
    x = F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)
    return cut(x, like.shape[-2:])
