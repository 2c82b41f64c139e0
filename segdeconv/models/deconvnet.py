"""DeconvNet: VGG with its fully connected layers as encoder, and a mirrored decoder of transposed convolutions.

Noh, Hong, Han 2015, sections 3 and 4.1 and figure 2, https://arxiv.org/abs/1505.04366; layer table and initial weights
as in the authors' training files. Batch norm and ReLU follow every layer but the last; sizes are for a 224x224 image:

    image -> [conv conv pool] ... [conv conv conv pool] -> 7x7x512 -> fc6, fc7 (7x7 and 1x1 convolutions): 1x1x4096
                   |switches            |switches                         |
    [deconv deconv unpool] ... [deconv deconv deconv unpool] <- 7x7x512 <- fc6_deconv (7x7, transposed)
        |
    classifier (1x1 convolution) -> logits
"""

from itertools import pairwise, repeat
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from segdeconv.errors import UsageError
from segdeconv.models.base import SegmentationModel
from segdeconv.models.encoders import SwitchSource
from segdeconv.models.layers import ConvBlock, DeconvBlock, UnpoolStage, init_gaussian, init_he
from segdeconv.models.vgg import load_fully_connected, load_vgg, vgg_encoder, vgg_weights


class DeconvNet(SegmentationModel):
    """DeconvNet on a VGG encoder; with VGG16 the published network of 30 layers with weights.

    It differs from the original in three ways: it takes any size from 193x193 (the original takes only 224x224),
    switches are taken before the ReLU unless `switch_source=post_relu`, and batch norm keeps running averages.

    Args:
        num_classes: Number of output channels.
        in_channels: Number of channels of the images.
        depth: See `vgg_encoder`.
        norm: Use batch norm; according to the paper, the network without it ends in a poor optimum.
        width: See `vgg_encoder`.
        fc_width: Channels of fc6 and fc7; the SegNet paper compares with 1024. Pretrained weights of fc6 and fc7 are
            used, as in the original, if the file has them in this width.
        pretrained: See `vgg_encoder`.
        switch_source: See `vgg_encoder`.
        tied: Use the transposed filters of the encoder in the decoder, as Zeiler & Fergus 2014 projected activations
            back to pixels (section 2.1, https://arxiv.org/abs/1311.2901). Biases and norms remain separate. fc6_deconv
            mirrors fc6, and the k-th deconvolution of a stage mirrors the k-th convolution from the end of the
            encoder's stage. The last deconvolution keeps its own filters: mirroring the first convolution would give
            it as many maps as the image has channels, where the published network has 64. fc7 and the classifier have
            no counterpart. Freezing a part of the encoder freezes its filters in the decoder too.
        packed_switches: See `vgg_encoder`.

    Examples:
        >>> import torch
        >>> DeconvNet(num_classes=21, width=0.125, fc_width=32).eval()(torch.zeros(1, 3, 193, 210)).shape
        torch.Size([1, 21, 193, 210])
    """

    minimum_size = 193  # five pools make 7 of it, the kernel size of fc6; of 192 they make 6

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        depth: Literal[11, 13, 16, 19] = 16,
        norm: bool = True,
        width: Annotated[float, Field(gt=0, le=4)] = 1.0,
        fc_width: PositiveInt = 4096,
        pretrained: str = "none",
        switch_source: SwitchSource = "pre_relu",
        tied: bool = False,
        packed_switches: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels=in_channels)
        state = vgg_weights(pretrained, depth=depth, norm=norm, width=width)
        self.encoder = vgg_encoder(
            depth, in_channels=in_channels, norm=norm, width=width, switch_source=switch_source,
            packed_switches=packed_switches,
        )  # fmt: skip
        stages = self.encoder.channels
        deepest = stages[-1][-1]
        self.fc6 = ConvBlock(deepest, fc_width, kernel=7, padding=0, norm=norm)
        self.fc7 = ConvBlock(fc_width, fc_width, kernel=1, norm=norm)
        self.fc6_deconv = DeconvBlock(
            fc_width, deepest, kernel=7, padding=0, norm=norm, mirrored=self.fc6.conv if tied else None
        )
        # From the last convolution to the second; the first has no mirrored deconvolution.
        convs = [block.conv for block in self.encoder.modules() if isinstance(block, ConvBlock)]
        mirrored = iter([*reversed(convs[1:]), None]) if tied else repeat(None)
        # Each stage has as many deconvolutions as the encoder's stage has convolutions; the last one reduces the
        # channels to those of the stage above.
        self.decoder = nn.ModuleList()
        for position in reversed(range(len(stages))):
            above = stages[max(0, position - 1)][-1]
            channels = (*reversed(stages[position]), above)
            blocks = (
                DeconvBlock(before, after, norm=norm, mirrored=next(mirrored)) for before, after in pairwise(channels)
            )
            self.decoder.append(UnpoolStage(position + 1, blocks))
        self.classifier = nn.Conv2d(stages[0][0], num_classes, 1)
        self._init(norm)
        if state is not None:
            load_vgg(self.encoder, state, source=pretrained)
            load_fully_connected(self.fc6.conv, self.fc7.conv, state)

    def _init(self, norm: bool) -> None:
        """Initialise the weights as in the training files, or without batch norm by He's method.

        Without batch norm, weights of standard deviation 0.01 let no signal through 15 layers. fc6 and fc7 had VGG's
        weights in the original and no filler; here they are initialised like the encoder.
        """
        init_he(self.fc6, self.fc7)
        deconvolutions = (self.fc6_deconv, self.decoder, self.classifier)
        if norm:
            init_gaussian(*deconvolutions, std=0.01)
        else:
            init_he(*deconvolutions)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, 0.001)

    def forward(self, image: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.check_input(image)
        x, pooled, _ = self.encoder(image)  # at 224x224: 7x7
        x = self.fc7(self.fc6(x))  # 1x1
        x = self.fc6_deconv(x)  # 7x7
        for stage, pooling in zip(self.decoder, reversed(pooled), strict=True):
            x = stage(x, pooling.switches, pooling.size)
        return self.classifier(x)

    def check_input(self, image: Tensor) -> None:
        batch, _, height, width = image.shape
        if height < self.minimum_size or width < self.minimum_size:
            raise UsageError(
                f"an image of {height}x{width} (HxW) is too small for DeconvNet, whose fc6 needs sides of at least "
                f"{self.minimum_size} - increase dataset.size or dataset.crop, for example to [224,224]"
            )
        normalises = isinstance(self.fc6.norm, nn.BatchNorm2d) and self.fc6.norm.training
        if normalises and batch == 1 and height <= 224 and width <= 224:  # fc6 reduces these to one pixel
            raise UsageError(
                f"a batch of one image of {height}x{width} gives the batch norm of DeconvNet's fc6 a single value per "
                "channel - use dataset.batch_size=2 or more, or a side above 224 in dataset.crop"
            )
