"""DeepLab-LargeFOV: VGG that keeps an eighth of the resolution and uses dilated convolutions instead of more pools.

Chen, Papandreou, Kokkinos, Murphy, Yuille 2015, section 3 and table 2, https://arxiv.org/abs/1412.7062; pools,
dilations and upsampling as in the authors' DeepLab-LargeFOV/train.prototxt.

    image -> [conv conv pool] x3 -> [conv x3, pool of stride 1] -> [conv x3 of dilation 2, pool of stride 1]: an eighth
        -> 3x3 average -> fc6 (3x3 of dilation 12) -> fc7 (1x1) -> classifier (1x1) -> x8, bilinear -> logits
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from segdeconv.models.base import SegmentationModel
from segdeconv.models.layers import ConvBlock, cut, init_gaussian, init_he
from segdeconv.models.vgg import load_vgg, vgg_encoder, vgg_weights

STRIDES = (2, 2, 2, 1, 1)  # of the pools, stage by stage
DILATIONS = (1, 1, 1, 1, 2)  # of the convolutions, stage by stage


class DeepLabLargeFOV(SegmentationModel):
    """DeepLab-LargeFOV on a VGG encoder; with VGG16 the published network of 20.5 million parameters.

    Pools are 3x3, so that pixel i of a map lies on pixel 8 i of the image; the upsampling preserves this for any size.

    It differs from the original in that the loss is computed on the upsampled scores, where the original shrinks the
    mask to an eighth. If the file has them, fc6 and fc7 are initialised from VGG by "simple decimation": every fourth
    channel, and the taps 0, 3 and 6 of 7x7 (the authors did not publish which ones they took). The CRF of the paper is
    a separate step, `segdeconv.inference.crf`.

    Args:
        num_classes: Number of output channels.
        in_channels: Number of channels of the images.
        depth: See `vgg_encoder`.
        norm: Use batch norm; the original has none.
        width: See `vgg_encoder`.
        fc_width: Channels of fc6 and fc7.
        dilation: Dilation of fc6, "input stride" in table 2 of the paper.
        dropout: Dropout probability after fc6 and fc7.
        pretrained: See `vgg_encoder`.

    Examples:
        >>> import torch
        >>> DeepLabLargeFOV(num_classes=21, width=0.125, fc_width=32).eval()(torch.zeros(1, 3, 37, 50)).shape
        torch.Size([1, 21, 37, 50])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        depth: Literal[11, 13, 16, 19] = 16,
        norm: bool = False,
        width: Annotated[float, Field(gt=0, le=4)] = 1.0,
        fc_width: PositiveInt = 1024,
        dilation: PositiveInt = 12,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        pretrained: str = "none",
    ) -> None:
        super().__init__(num_classes, in_channels=in_channels)
        state = vgg_weights(pretrained, depth=depth, norm=norm, width=width)
        # The stages end with the ReLU, because the network does its own pooling.
        self.encoder = vgg_encoder(
            depth, in_channels=in_channels, norm=norm, width=width, dilations=DILATIONS, switch_source="post_relu"
        )
        self.fc6 = ConvBlock(self.encoder.channels[-1][-1], fc_width, dilation=dilation, norm=norm)
        self.fc7 = ConvBlock(fc_width, fc_width, kernel=1, norm=norm)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(fc_width, num_classes, 1)
        init_he(self.fc6, self.fc7)
        init_gaussian(self.classifier, std=0.01)
        if state is not None:
            load_vgg(self.encoder, state, source=pretrained)
            _load_subsampled(self.fc6.conv, state, "classifier.0", side=7)
            _load_subsampled(self.fc7.conv, state, "classifier.3", side=1)

    def forward(self, image: Tensor) -> Tensor:
        x = image
        for stage, stride in zip(self.encoder.stages, STRIDES, strict=True):
            x = F.max_pool2d(stage(x), 3, stride, padding=1, ceil_mode=True)
        x = F.avg_pool2d(x, 3, 1, padding=1)
        x = self.dropout(self.fc6(x))
        x = self.classifier(self.dropout(self.fc7(x)))
        size = (8 * (x.shape[-2] - 1) + 1, 8 * (x.shape[-1] - 1) + 1)  # at least the size of the image
        return cut(F.interpolate(x, size=size, mode="bilinear", align_corners=True), image.shape[-2:])


def _load_subsampled(convolution: nn.Conv2d, state: Mapping[str, Tensor], name: str, *, side: int) -> None:
    """Load every n-th filter of a fully connected layer of VGG, with every m-th channel (after fc6) and third tap."""
    weight = state.get(f"{name}.weight")
    if weight is None:
        return
    shape = convolution.weight.shape
    weight = weight.view(len(weight), -1, side, side)[:, :, ::3, ::3]
    n, m = (available // needed for available, needed in zip(weight.shape[:2], shape[:2], strict=True))
    if n and m and weight[::n, ::m].shape == shape:
        bias = state[f"{name}.bias"][::n]
        convolution.load_state_dict({"weight": weight[::n, ::m], "bias": bias})
