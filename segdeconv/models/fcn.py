"""FCN: fully convolutional VGG whose class scores at up to three strides are upsampled and added.

Long, Shelhamer, Darrell 2015, sections 3.1, 3.3 and 4 and figure 3, https://arxiv.org/abs/1411.4038; layers, crops,
padding and initial weights as in the authors' voc-fcn32s, voc-fcn16s and voc-fcn8s/net.py and surgery.py. FCN-8s:

    image -> [.. pool1] -> [.. pool2] -> [.. pool3] -> [.. pool4] -> [.. pool5] -> fc6 -> fc7     7x7, 1x1
                                             |             |                           |
                                        skips.pool3   skips.pool4                    score        1x1
                                             |             |                           |
              logits <- upscore (x8) <------ + <-- (x2) -- + <--------- (x2) ----------+
                                               ups.pool3           ups.pool4

FCN-16s ends after the first sum (upscore x16), FCN-32s has none (upscore x32).
"""

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from segdeconv.models.base import SegmentationModel
from segdeconv.models.layers import ConvBlock, bilinear_kernel, cut, init_he
from segdeconv.models.vgg import load_fully_connected, load_vgg, vgg_encoder, vgg_weights

# Maps that are scored in addition to the deepest one, from coarse to fine.
SKIPS: dict[int, tuple[str, ...]] = {32: (), 16: ("pool4",), 8: ("pool4", "pool3")}
# Offsets of the crops in the original networks, in pixels from the top and left: of skips before the addition, and of
# the scores to the image.
SKIP_CROPS = {"pool4": 5, "pool3": 9}
SCORE_CROPS = {32: 19, 16: 27, 8: 31}


class FCN(SegmentationModel):
    """FCN-32s, FCN-16s or FCN-8s on a VGG encoder.

    It differs from the original in its padding, unless `padding` is 100, and in that fixed upsampling layers process
    each map separately, where the original multiplies by zeros.

    Args:
        num_classes: Number of output channels.
        in_channels: Number of channels of the images.
        stride: Stride of the finest scores: 32, 16 or 8. The paper trains them in this order, each from the one before:
            `init_from=` loads all weights that they have in common, and a new skip starts at zero, so that only the
            last upsampling differs.
        depth: See `vgg_encoder`.
        norm: Use batch norm; the original has none.
        width: See `vgg_encoder`.
        fc_width: Channels of fc6 and fc7. Their pretrained weights are used if the file has them in this width.
        dropout: Dropout probability after fc6 and fc7.
        learnt: Upsampling layers that are learned; all layers start as bilinear interpolation. `inner`: all but the
            last, as in the paper. `none`: as in the authors' files; they report no difference. `all`: the "learnt
            deconv" that the SegNet paper compares with "fixed bilinear". Fixed layers are not in the state dict.
        padding: `same` pads every convolution with zeros, so that maps of n and ceil(n / 2) are aligned exactly at any
            size. `100` pads the image by 100 pixels and crops the results, as the original does, which is exact at any
            size too; near the edge fc6 then sees features of the padded zeros instead of zeros, at the cost of
            processing (H + 198) x (W + 198) pixels.
        pretrained: See `vgg_encoder`.

    Examples:
        >>> import torch
        >>> FCN(num_classes=21, width=0.125, fc_width=32).eval()(torch.zeros(1, 3, 37, 50)).shape
        torch.Size([1, 21, 37, 50])
    """

    heads = ("score", "skips")
    square_heads = ("ups", "upscore")

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        stride: Literal[8, 16, 32] = 8,
        depth: Literal[11, 13, 16, 19] = 16,
        norm: bool = False,
        width: Annotated[float, Field(gt=0, le=4)] = 1.0,
        fc_width: PositiveInt = 4096,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        learnt: Literal["none", "inner", "all"] = "inner",
        padding: Literal["same", 100] = "same",
        pretrained: str = "none",
    ) -> None:
        super().__init__(num_classes, in_channels=in_channels)
        self.stride, self.padding = stride, padding
        state = vgg_weights(pretrained, depth=depth, norm=norm, width=width)
        self.encoder = vgg_encoder(depth, in_channels=in_channels, norm=norm, width=width)
        channels = {f"pool{number}": stage[-1] for number, stage in enumerate(self.encoder.channels, start=1)}
        self.fc6 = ConvBlock(channels["pool5"], fc_width, kernel=7, padding=3 if padding == "same" else 0, norm=norm)
        self.fc7 = ConvBlock(fc_width, fc_width, kernel=1, norm=norm)
        self.dropout = nn.Dropout(dropout)
        self.score = _score(fc_width, num_classes)
        self.skips = nn.ModuleDict({name: _score(channels[name], num_classes) for name in SKIPS[stride]})
        self.ups = nn.ModuleDict(
            {name: Enlarge(num_classes, 2, padding=padding, learned=learnt != "none") for name in SKIPS[stride]}
        )
        self.upscore = Enlarge(num_classes, stride, padding=padding, learned=learnt == "all")
        init_he(self.fc6, self.fc7)
        if state is not None:
            load_vgg(self.encoder, state, source=pretrained)
            load_fully_connected(self.fc6.conv, self.fc7.conv, state)

    def forward(self, image: Tensor) -> Tensor:
        size = image.shape[-2:]
        if self.padding == 100:
            image = F.pad(image, (99, 99, 99, 99))  # the first convolution pads the last pixel
        pooled = {f"pool{number}": pooling.features for number, pooling in enumerate(self.encoder(image).pooled, 1)}
        x = self.dropout(self.fc6(pooled["pool5"]))
        x = self.score(self.dropout(self.fc7(x)))
        for name in SKIPS[self.stride]:
            x = self._add_skip(self.ups[name](x), self.skips[name](pooled[name]), SKIP_CROPS[name])
        return cut(self.upscore(x), size, 0 if self.padding == "same" else SCORE_CROPS[self.stride])

    def _add_skip(self, x: Tensor, skip: Tensor, crop: int) -> Tensor:
        """Add upsampled scores and those of a finer map; crops the scores, or with padding 100 the finer map."""
        if self.padding == "same":
            return skip + cut(x, skip.shape[-2:])
        return x + cut(skip, x.shape[-2:], crop)


class Enlarge(nn.Module):
    """Upsampling of score maps by a transposed convolution that starts as bilinear interpolation.

    Args:
        channels: Number of maps.
        factor: Factor on both sides.
        padding: `same` crops the result to `factor` times the map; 100 keeps the margin, as the original does.
        learned: Learn a kernel from every map to every map; otherwise each map is interpolated separately.
    """

    weight: Tensor

    def __init__(self, channels: int, factor: int, *, padding: Literal["same", 100], learned: bool) -> None:
        super().__init__()
        self.factor, self.padding = factor, factor // 2 if padding == "same" else 0
        if learned:
            self.groups = 1
            self.weight = nn.Parameter(bilinear_kernel(channels, 2 * factor))
        else:
            self.groups = channels
            kernel = bilinear_kernel(1, 2 * factor).repeat(channels, 1, 1, 1)
            self.register_buffer("weight", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, factor * H, factor * W), or with 100 factor more
        return F.conv_transpose2d(x, self.weight, stride=self.factor, padding=self.padding, groups=self.groups)


def _score(channels: int, num_classes: int) -> nn.Conv2d:
    """Return a 1x1 convolution to class scores whose weights and biases are zero."""
    score = nn.Conv2d(channels, num_classes, 1)
    nn.init.zeros_(score.weight)
    nn.init.zeros_(score.bias)  # type: ignore[arg-type]
    return score
