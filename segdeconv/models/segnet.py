"""SegNet: a VGG encoder, and a mirrored decoder that unpools with the encoder's switches.

Badrinarayanan, Kendall, Cipolla 2017, section 3 and figure 2, https://arxiv.org/abs/1511.00561; layer tables as in the
authors' training files.

    image -> [conv conv pool] ... [conv conv conv pool]      five stages, each pool keeps its switches
                  |switches            |switches
    logits <- [conv conv unpool] ... [conv conv conv unpool] the same stages in reverse order
"""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from segdeconv.models.base import SegmentationModel
from segdeconv.models.dropout import DropoutAt, dropout_places
from segdeconv.models.encoders import Encoding, Stages, StagesArgument, SwitchSource
from segdeconv.models.layers import ConvBlock, Dropouts, UnpoolStage, init_he
from segdeconv.models.vgg import vgg_encoder


class SegNet(SegmentationModel):
    """SegNet on a VGG encoder; with VGG16 the published network of 26 convolutions.

    It differs from the paper in two ways: switches are taken before the ReLU unless `switch_source=post_relu`, and
    batch norm keeps running averages instead of making a second pass over the training set.

    Args:
        num_classes: Number of output channels.
        in_channels: Number of channels of the images.
        depth: See `vgg_encoder`.
        norm: See `vgg_encoder`.
        width: See `vgg_encoder`.
        pretrained: See `vgg_encoder`.
        switch_source: See `vgg_encoder`.
        stages: See `vgg_encoder`.
        dropout: Dropout probability.
        dropout_at: Places of dropout, see `dropout_places`; `central` gives Bayesian SegNet.
        encoder_addition: Add each pooled map of the encoder to the decoder's map of its size, as in the paper's
            SegNet-Basic-EncoderAddition (section 3.1 and figure 3): for thin structures and few images, at the price
            of keeping these maps in inference.
        encoder_concatenation: Concatenate the map before each pool of the encoder, rectified, to the unpooled map of
            its size, as U-Net does (Ronneberger et al. 2015, section 2, https://arxiv.org/abs/1505.04597), so that the
            first convolution of each decoder stage sees the values that were no maxima too.
        packed_switches: See `vgg_encoder`.

    Examples:
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
        stages: StagesArgument | None = None,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        dropout_at: DropoutAt = "none",
        encoder_addition: bool = False,
        encoder_concatenation: bool = False,
        packed_switches: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels=in_channels)
        self.encoder = vgg_encoder(
            depth, in_channels=in_channels, norm=norm, width=width, pretrained=pretrained, stages=stages,
            switch_source=switch_source, packed_switches=packed_switches,
        )  # fmt: skip
        self.encoder.keep_copies = encoder_concatenation
        self.decoder = SegNetDecoder(
            self.encoder.channels, num_classes, norm=norm, encoder_addition=encoder_addition,
            encoder_concatenation=encoder_concatenation,
        )  # fmt: skip
        dropouts = Dropouts(dropout_places(dropout_at, len(self.encoder.channels)), dropout)
        self.encoder.dropouts = self.decoder.dropouts = dropouts

    def forward(self, image: Tensor) -> Tensor:
        return self.decoder(self.encoder(image))


class SegNetDecoder(nn.Module):
    """Decoder of SegNet: the encoder's table in reverse order, with an unpooling at the start of each stage.

    A stage has as many convolutions as the encoder's stage; the last one reduces the channels to those of the stage
    above (conv4_1_D: 512 -> 256). The last convolution of the decoder is the classifier, which has no norm and no ReLU,
    so that logits can be negative.

    Args:
        stages: Output channels of the encoder's convolutions, stage by stage.
        num_classes: Number of output channels.
        norm: Use batch norm.
        encoder_addition: See `SegNet`.
        encoder_concatenation: See `SegNet`.
    """

    def __init__(
        self,
        stages: Stages,
        num_classes: int,
        *,
        norm: bool = True,
        encoder_addition: bool = False,
        encoder_concatenation: bool = False,
    ) -> None:
        super().__init__()
        self.encoder_addition, self.encoder_concatenation = encoder_addition, encoder_concatenation
        self.dropouts = Dropouts()
        self.stages = nn.ModuleList()
        for position in reversed(range(len(stages))):
            first, *others = stages[position][::-1]
            above = [stages[position - 1][-1]] if position > 0 else []
            channels = [2 * first if encoder_concatenation else first, *others, *above]
            blocks = [ConvBlock(before, after, norm=norm) for before, after in pairwise(channels)]
            self.stages.append(UnpoolStage(position + 1, blocks))
        self.classifier = nn.Conv2d(channels[-1], num_classes, 3, padding=1)
        init_he(self)

    def forward(self, encoding: Encoding) -> Tensor:
        x = encoding.features
        for index, (stage, pooling) in enumerate(zip(self.stages, reversed(encoding.pooled), strict=True)):
            copy = encoding.copies[-index - 1] if self.encoder_concatenation else None
            x = stage(x, pooling.switches, pooling.size, copy)
            if self.encoder_addition and index + 1 < len(self.stages):
                x = x + encoding.pooled[-index - 2].features
            x = self.dropouts.at(f"decoder{len(self.stages) - index}", x)
        return self.classifier(x)
