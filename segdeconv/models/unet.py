"""U-Net: every stage of the encoder is concatenated with the decoder's map of the same size.

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
from pydantic import Field
from torch import Tensor, nn

from segdeconv.models.activation_checkpointing import Checkpointable
from segdeconv.models.base import SegmentationModel
from segdeconv.models.encoders import StagesArgument
from segdeconv.models.layers import ConvBlock, cut, init_he
from segdeconv.models.vgg import vgg_encoder


class UNet(SegmentationModel):
    """U-Net on a VGG encoder, whose five stages are the five levels of the paper's figure.

    It differs from the paper in that convolutions are padded, so that the result has the size of the image and the
    copies need no cropping. The half of an odd side is rounded up in pooling, and the up-convolution is cropped to the
    copy.

    Args:
        num_classes: Number of output channels.
        in_channels: Number of channels of the images.
        depth: See `vgg_encoder`.
        norm: Use batch norm after every 3x3 convolution; the paper has none.
        width: See `vgg_encoder`.
        dropout: Dropout probability at the end of the two deepest stages of the encoder, before the copy.
        pretrained: See `vgg_encoder`.
        stages: See `vgg_encoder`. [[64,64],[128,128],[256,256],[512,512],[1024,1024]] gives the paper's network of 23
            convolutions.

    Examples:
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
        stages: StagesArgument | None = None,
    ) -> None:
        super().__init__(num_classes, in_channels=in_channels)
        # The stages end with the ReLU, because the maps before the pools are copied.
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
    """Sequence of blocks applied to a map concatenated with the encoder's copy."""

    def forward(self, x: Tensor, copy: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat([x, copy], dim=1))  # type: ignore[no-untyped-call]
