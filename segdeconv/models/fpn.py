"""FPN: a pyramid of maps of one width, coarse ones handed down to fine ones, and one head that reads them all.

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
from segdeconv.models.layers import cut, init_he
from segdeconv.models.vgg import vgg_encoder


class FPN(SegmentationModel):
    """A feature pyramid on a VGG encoder, with one fully convolutional head shared by its levels.

    depth, width, pretrained, norm, stages: see `vgg_encoder`.
    num_levels: how many of the deepest pooled maps the pyramid has.
    channels: of the pyramid; the head has half as many.
    supervise_levels: train the logits of every level too, each enlarged to the image. The loss is then the mean over
        them and the combined ones. What predicts are the combined ones.

    The levels differ in size. Each is enlarged to the finest one, all are averaged there, and the mean is enlarged to
    the image; `combine` is that. Enlargements are by whole powers of two and cut, so that cell i of a map stays on
    cells 2 i and 2 i + 1 of the one before also where an odd side was pooled to one more than its half:

    >>> import torch
    >>> network, image = FPN(num_classes=11, width=0.125, channels=16), torch.zeros(1, 3, 360, 480)
    >>> [tuple(level.shape) for level in network.levels(image)]
    [(1, 11, 90, 120), (1, 11, 45, 60), (1, 11, 23, 30), (1, 11, 12, 15)]
    >>> network(image).shape
    torch.Size([1, 11, 360, 480])

    Differences from Kirillov et al.: their branches have own convolutions and the classifier comes after the sum; here
    one head, classifier and all, reads every level, as Lin et al.'s region proposals do. VGG's pooled maps stand for
    ResNet's stages.
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
        stages: tuple[tuple[PositiveInt, ...], ...] | None = None,
    ) -> None:
        super().__init__(num_classes, in_channels=in_channels)
        self.supervise_levels = supervise_levels
        self.encoder = vgg_encoder(
            depth, in_channels=in_channels, norm=norm, width=width, pretrained=pretrained, stages=stages
        )
        num_stages = len(self.encoder.channels)
        if num_levels > num_stages:
            raise UsageError(
                f"model.num_levels={num_levels}: the encoder has {num_stages} stages - give as many or less"
            )
        self.num_levels = num_levels
        self.strides = [2**stage for stage in range(num_stages - num_levels + 1, num_stages + 1)]
        self.laterals = nn.ModuleList(
            nn.Conv2d(stage[-1], channels, 1) for stage in self.encoder.channels[-num_levels:]
        )
        self.smooths = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_levels))
        inner = channels // 2
        # Group norm, as Kirillov et al.: statistics of a batch would mix the levels, which differ.
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
        singles = (_enlarged(level, stride, image) for level, stride in zip(levels, self.strides, strict=True))
        return (self.combine(levels, image), *singles)

    def levels(self, image: Tensor) -> list[Tensor]:
        """The logits of every level, each of its own size, the finest first."""
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
        """The levels' logits, the finest first, as one map of the image's size."""
        finest = levels[0]
        total = finest
        for level, stride in zip(levels[1:], self.strides[1:], strict=True):
            total = total + _enlarged(level, stride // self.strides[0], finest)
        return _enlarged(total / len(levels), self.strides[0], image)


def _enlarged(x: Tensor, factor: int, like: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, C, H, W) of another map, which this one is `factor` times smaller than, rounded up."""
    x = F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)
    return cut(x, like.shape[-2:])
