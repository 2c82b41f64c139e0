"""U-Net: every stage of the encoder is copied beside the decoder's map of its size.

Ronneberger, Fischer, Brox 2015, section 2 and figure 1, https://arxiv.org/abs/1505.04597; dropout and the ReLU after
an up-convolution as in the authors' released phseg_v5 network.

    image -> [conv conv] ----------------------- copy -----------------------> [+ conv conv] -> classifier -> logits
                  | pool                                                            ^ up-conv (2x2, stride 2)
             [conv conv] ------------------- copy -----------------> [+ conv conv] -+
                  | pool                                                  ^ up-conv
                 ...                                                     ...
                  | pool                                                  |
             [conv conv] -------------------------------------------------+          the last stage is not pooled
"""

from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from segdeconv.models.activation_checkpointing import Checkpointable
from segdeconv.models.base import SegmentationModel
from segdeconv.models.layers import ConvBlock, cut, init_he
from segdeconv.models.vgg import vgg_encoder


class UNet(SegmentationModel):
    """U-Net on a VGG encoder, whose five stages are the five levels of the paper's figure.

    depth, width, pretrained, stages: see `vgg_encoder`. With [[64,64],[128,128],[256,256],[512,512],[1024,1024]] as
    stages this is the paper's network of 23 convolutions.
    norm: batch norm after every 3x3 convolution; false for the paper's.
    dropout: at the end of the two deepest stages of the encoder, before the copy.

    Differences from the paper: convolutions are padded, so that the result has the image's size and nothing is cropped
    away from the copies; an odd map is pooled to one more than its half, and the up-convolution cut back to its size.

    >>> UNet(num_classes=11, width=0.125).eval()(torch.zeros(1, 3, 37, 50)).shape
    torch.Size([1, 11, 37, 50])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        depth: Literal[11, 13, 16, 19] = 16,
        norm: bool = True,
        width: Annotated[float, Field(gt=0, le=4)] = 1.0,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        pretrained: str = "none",
        stages: tuple[tuple[PositiveInt, ...], ...] | None = None,
    ) -> None:
        super().__init__(num_classes, in_channels=in_channels)
        # Rectified before the pool, since it is the maps before the pools that are copied.
        self.encoder = vgg_encoder(
            depth, in_channels=in_channels, norm=norm, width=width, pretrained=pretrained, stages=stages,
            switch_source="post_relu",
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout)
        outputs = [stage[-1] for stage in self.encoder.channels]
        self.ups, self.decoder = nn.ModuleList(), nn.ModuleList()
        for below, here in pairwise(reversed(outputs)):
            self.ups.append(nn.Sequential(nn.ConvTranspose2d(below, here, 2, stride=2), nn.ReLU(inplace=True)))
            self.decoder.append(JoinedStage(ConvBlock(2 * here, here, norm=norm), ConvBlock(here, here, norm=norm)))
        self.classifier = nn.Conv2d(outputs[0], num_classes, 1)
        init_he(self.ups, self.decoder, self.classifier)

    def forward(self, image: Tensor) -> Tensor:
        x = image
        copies = []
        last = len(self.encoder.stages) - 1
        for level, stage in enumerate(self.encoder.stages):
            if level > 0:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            x = stage(x)
            if level >= last - 1:
                x = self.dropout(x)
            copies.append(x)
        copies.pop()
        for up, convolutions in zip(self.ups, self.decoder, strict=True):
            copy = copies.pop()
            x = convolutions(cut(up(x), copy.shape[-2:]), copy)
        return self.classifier(x)


class JoinedStage(Checkpointable, nn.Sequential):
    """Blocks in a row, of a map and the encoder's copy beside it."""

    def forward(self, x: Tensor, copy: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat([x, copy], dim=1))  # type: ignore[no-untyped-call]
