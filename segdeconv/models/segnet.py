"""SegNet: a VGG encoder, and its mirror image that unpools with the encoder's switches.

Badrinarayanan, Kendall, Cipolla 2017, section 3 and figure 2, https://arxiv.org/abs/1511.00561; layer tables as in the
authors' training files.

    image -> [conv conv pool] ... [conv conv conv pool]      five stages, each pool keeps its switches
                  |switches            |switches
    logits <- [conv conv unpool] ... [conv conv conv unpool] the same stages, read backwards
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from segdeconv.encoders import Encoder, Encoding, Stages, SwitchSource, vgg_encoder
from segdeconv.layers import ConvBlock, init_he
from segdeconv.models.base import SegmentationModel
from segdeconv.switches import unpool

BASIC_STAGES: Stages = ((64,), (64,), (64,), (64,))


class SegNet(SegmentationModel):
    """SegNet on a VGG encoder; with VGG16 the published network of 26 convolutions.

    Differences from the paper, both choices of ours: switches are taken before the ReLU unless
    `switch_source=post_relu`, and batch norm keeps running averages instead of a second pass over the training set.

    depth, width, pretrained: see `vgg_encoder`. stages: a table of your own in place of VGG's, the output channels of
    every convolution, stage by stage; depth, width and pretrained then say nothing.

    >>> import torch
    >>> SegNet(num_classes=11, width=0.25)(torch.zeros(1, 3, 37, 50)).shape
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
        pretrained: str = "none",
        switch_source: SwitchSource = "pre_relu",
        stages: tuple[tuple[PositiveInt, ...], ...] | None = None,
    ) -> None:
        super().__init__(num_classes, in_channels=in_channels)
        self.encoder = (
            Encoder(tuple(map(tuple, stages)), in_channels=in_channels, norm=norm, switch_source=switch_source)
            if stages
            else vgg_encoder(
                depth, in_channels=in_channels, norm=norm, width=width, pretrained=pretrained,
                switch_source=switch_source,
            )
        )  # fmt: skip
        self.decoder = SegNetDecoder(self.encoder.channels, num_classes, norm=norm)

    def forward(self, image: Tensor) -> Tensor:
        return self.decoder(self.encoder(image))


class SegNetDecoder(nn.Module):
    """The encoder's table read backwards: unpool, then as many convolutions as the encoder's stage has.

    The last convolution of a stage narrows to the channels of the stage above it (conv4_1_D: 512 -> 256). The last
    convolution of all is the classifier: no norm and no ReLU, so logits can be negative.
    """

    def __init__(self, stages: Stages, num_classes: int, *, norm: bool = True) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for position in reversed(range(len(stages))):
            channels = stages[position][::-1]
            blocks = [ConvBlock(before, after, norm=norm) for before, after in pairwise(channels)]
            if position > 0:
                blocks.append(ConvBlock(channels[-1], stages[position - 1][-1], norm=norm))
            self.stages.append(nn.Sequential(*blocks))
        self.classifier = nn.Conv2d(stages[0][0], num_classes, 3, padding=1)
        init_he(self)

    def forward(self, encoding: Encoding) -> Tensor:
        x = encoding.features
        for stage, pooling in zip(self.stages, reversed(encoding.pooled), strict=True):
            x = stage(unpool(x, pooling.switches, pooling.size))
        return self.classifier(x)


class SegNetBasic(SegmentationModel):
    """SegNet-Basic: four stages of one 7x7 convolution each way, for small data sets.

    The paper, section 3.1, with what the released training file has and the text leaves out: local response
    normalisation of the input (meant for raw pixels 0..255: `dataset.mean=[0,0,0] dataset.std=[1,1,1]`), biases in
    the convolutions (the text says none: `bias=false`), no ReLU in the decoder, and a 1x1 classifier.

    >>> import torch
    >>> SegNetBasic(num_classes=11)(torch.zeros(1, 3, 45, 60)).shape
    torch.Size([1, 11, 45, 60])
    """

    def __init__(
        self, num_classes: int, *, in_channels: int = 3, bias: bool = True, switch_source: SwitchSource = "pre_relu"
    ) -> None:
        super().__init__(num_classes, in_channels=in_channels)
        self.normalise = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        self.encoder = Encoder(BASIC_STAGES, in_channels=in_channels, kernel=7, bias=bias, switch_source=switch_source)
        self.decoder = nn.ModuleList(
            ConvBlock(64, 64, kernel=7, activation=False, bias=bias) for _ in reversed(BASIC_STAGES)
        )
        self.classifier = nn.Conv2d(64, num_classes, 1, bias=bias)
        init_he(self)

    def forward(self, image: Tensor) -> Tensor:
        x, pooled = self.encoder(self.normalise(image))
        for block, pooling in zip(self.decoder, reversed(pooled), strict=True):
            x = block(unpool(x, pooling.switches, pooling.size))
        return self.classifier(x)
