"""SegNet-Basic, FCN-Basic and their variants: one small encoder with eight decoders, for comparing decoders.

Badrinarayanan, Kendall, Cipolla 2017, section 3.1, figure 3 and table 1, https://arxiv.org/abs/1511.00561. The encoder
repeats [7x7 convolution, batch norm, ReLU, pool] four times with 64 channels. The decoders differ in how each of their
four steps doubles the map, and in what the encoder has to keep for the step (K: number of classes):

    step of the decoder                                        kept
    unpool, 7x7 convolution 64 -> 64                           switches           SegNet-Basic
    unpool, 7x7 convolution 64 -> 64, + encoder map            switches, 64 maps  SegNet-Basic-EncoderAddition
    unpool, 7x7 convolution of each map separately             switches           SegNet-Basic-SingleChannelDecoder
    8x8 deconvolution K -> K, + 1x1 convolved encoder map      K maps             FCN-Basic
    8x8 deconvolution K -> K                                   nothing            FCN-Basic-NoAddition
    8x8 deconvolution 64 -> 64, + encoder map                  64 maps            FCN-Basic-NoDimReduction
    8x8 deconvolution 64 -> 64                                 nothing            FCN-Basic-NoAddition-NoDimReduction
    fixed bilinear interpolation of K maps                     nothing            Bilinear-Interpolation

The encoder map of a step is the pooled map that has the size of the step's output (figure 3), so the last step, at the
size of the image, has none. The authors did not release their files for these networks; the choices that the paper
leaves open are marked "our choice".
"""

from abc import abstractmethod
from itertools import zip_longest
from typing import Annotated, Literal, NamedTuple

import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from segdeconv.models.activation_checkpointing import Checkpointable
from segdeconv.models.base import SegmentationModel
from segdeconv.models.dropout import DropoutAt, dropout_places
from segdeconv.models.encoders import Encoder, HardSource, SwitchSource
from segdeconv.models.layers import BilinearDeconv, ConvBlock, Dropouts, cut, init_he
from segdeconv.switches.modules import Unpool

DEPTH = 4  # stages of the encoder and of the decoder


class Level(NamedTuple):
    """Data that the encoder keeps for one step of the decoder; None where the decoder does not use it.

    Attributes:
        size: (H, W) before the pool, which the step restores.
        switches: Switches of the pool, (N, C, ceil(H/2), ceil(W/2)) uint8, or packed.
        features: Map to add to the output of the step, (N, C or K, H, W).
    """

    size: tuple[int, int]
    switches: Tensor | None = None
    features: Tensor | None = None


class BasicModel(SegmentationModel):
    """Base class with the encoder that all these networks share.

    The input passes local response normalisation, which the released training file of SegNet-Basic has and the paper
    leaves out (meant for raw pixels 0..255: `dataset.mean=[0,0,0] dataset.std=[1,1,1]`).

    Args:
        num_classes: Number of output channels.
        in_channels: Number of channels of the images.
        width: Channels of every map; 64 in the paper.
        bias: Give the convolutions biases. The released file has them and the paper has none; before a batch norm they
            have no effect.
        switch_source: See `Encoder`.
        packed_switches: See `Encoder`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        width: PositiveInt = 64,
        bias: bool = True,
        switch_source: SwitchSource = "pre_relu",
        packed_switches: bool = False,
    ) -> None:
        super().__init__(num_classes, in_channels=in_channels)
        self.normalise = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)
        self.encoder = Encoder(
            ((width,),) * DEPTH, in_channels=in_channels, kernel=7, bias=bias, switch_source=switch_source,
            packed_switches=packed_switches,
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        return self.decode(*self.encode(image))

    @abstractmethod
    def encode(self, image: Tensor) -> tuple[Tensor, list[Level]]:
        """Encode images, (N, C, H, W).

        Returns:
            The deepest map, (N, C or K, ceil(H/16), ceil(W/16)), and the levels, the deepest first.
        """

    @abstractmethod
    def decode(self, x: Tensor, levels: list[Level]) -> Tensor:
        """Decode the output of `encode` to logits, (N, K, H, W)."""


class SegNetBasic(BasicModel):
    """SegNet-Basic: four encoder and four decoder stages of one 7x7 convolution each, for small data sets.

    The decoder has no ReLU, and a 1x1 classifier follows it.

    Args:
        num_classes: Number of output channels.
        in_channels: Number of channels of the images.
        width: See `BasicModel`.
        bias: See `BasicModel`.
        switch_source: See `Encoder`.
        decoder: `dense` filters use all maps; `single_channel` filters use one map each.
        encoder_addition: Add the encoder's maps to the decoder's, after its batch norm (our choice).
        dropout: Dropout probability.
        dropout_at: Places of dropout, see `dropout_places`; `central` gives Bayesian SegNet-Basic.
        packed_switches: See `Encoder`.

    Examples:
        >>> import torch
        >>> SegNetBasic(num_classes=11)(torch.zeros(1, 3, 45, 60)).shape
        torch.Size([1, 11, 45, 60])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        width: PositiveInt = 64,
        bias: bool = True,
        switch_source: SwitchSource = "pre_relu",
        decoder: Literal["dense", "single_channel"] = "dense",
        encoder_addition: bool = False,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        dropout_at: DropoutAt = "none",
        packed_switches: bool = False,
    ) -> None:
        super().__init__(
            num_classes, in_channels=in_channels, width=width, bias=bias, switch_source=switch_source,
            packed_switches=packed_switches,
        )  # fmt: skip
        groups = width if decoder == "single_channel" else 1
        self.encoder_addition = encoder_addition
        self.dropouts = self.encoder.dropouts = Dropouts(dropout_places(dropout_at, DEPTH), dropout)
        self.decoder = nn.ModuleList(
            UnpoolBlock(level, width, bias=bias, groups=groups) for level in range(DEPTH, 0, -1)
        )
        self.classifier = nn.Conv2d(width, num_classes, 1, bias=bias)
        init_he(self)

    def encode(self, image: Tensor) -> tuple[Tensor, list[Level]]:
        x, pooled, _ = self.encoder(self.normalise(image))
        added = [pooling.features for pooling in pooled[-2::-1]] if self.encoder_addition else []
        return x, [Level(p.size, p.switches, features) for p, features in zip_longest(reversed(pooled), added)]

    def decode(self, x: Tensor, levels: list[Level]) -> Tensor:
        for index, (block, level) in enumerate(zip(self.decoder, levels, strict=True)):
            x = block(x, level.switches, level.size)
            x = self.dropouts.at(f"decoder{DEPTH - index}", x)
            x = x if level.features is None else x + level.features
        return self.classifier(x)


class UnpoolBlock(Checkpointable, ConvBlock):
    """Unpooling, then a 7x7 convolution and batch norm: a step of SegNet-Basic's decoder."""

    def __init__(self, level: int, width: int, *, bias: bool, groups: int) -> None:
        super().__init__(width, width, kernel=7, activation=False, bias=bias, groups=groups)
        self.unpool = Unpool(level)

    def forward(self, x: Tensor, switches: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        return super().forward(self.unpool(x, switches, size))


class FCNBasic(BasicModel):
    """FCN-Basic: learned upsampling by 8x8 deconvolutions that start as bilinear interpolation, without other filters.

    With reduction the last deconvolution gives the logits; without it a 1x1 classifier follows, as in SegNet-Basic.
    Our choice: the deconvolutions have no bias, and each is followed by a batch norm unless it gives the logits.
    Without batch norm the loss becomes NaN after 13 steps with the paper's learning rate.

    Args:
        num_classes: Number of output channels.
        in_channels: Number of channels of the images.
        width: See `BasicModel`.
        bias: See `BasicModel`.
        switch_source: See `Encoder`.
        addition: Add the encoder's maps to the upsampled maps.
        reduction: Reduce all maps of the encoder, including the deepest, to one per class by 1x1 convolutions.

    Examples:
        >>> import torch
        >>> FCNBasic(num_classes=11)(torch.zeros(1, 3, 45, 60)).shape
        torch.Size([1, 11, 45, 60])
    """

    heads = ("classifier", "reduction")

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        width: PositiveInt = 64,
        bias: bool = True,
        switch_source: HardSource = "pre_relu",
        addition: bool = True,
        reduction: bool = True,
    ) -> None:
        super().__init__(num_classes, in_channels=in_channels, width=width, bias=bias, switch_source=switch_source)
        channels = num_classes if reduction else width
        self.addition = addition
        # One per map that the encoder passes to the decoder, the deepest first.
        self.reduction = nn.ModuleList(
            nn.Conv2d(width, num_classes, 1, bias=bias) if reduction else nn.Identity()
            for _ in range(DEPTH if addition else 1)
        )
        self.classifier = nn.Identity() if reduction else nn.Conv2d(width, num_classes, 1, bias=bias)
        init_he(self)
        self.decoder = nn.ModuleList(BilinearDeconv(channels, kernel=8) for _ in range(DEPTH))
        normed = DEPTH - 1 if reduction else DEPTH
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(channels) if step < normed else nn.Identity() for step in range(DEPTH)
        )

    def encode(self, image: Tensor) -> tuple[Tensor, list[Level]]:
        x, pooled, _ = self.encoder(self.normalise(image))
        deepest, *others = self.reduction
        added = [reduce(pooling.features) for reduce, pooling in zip(others, pooled[-2::-1], strict=False)]
        return deepest(x), [Level(p.size, features=features) for p, features in zip_longest(reversed(pooled), added)]

    def decode(self, x: Tensor, levels: list[Level]) -> Tensor:
        for deconv, norm, level in zip(self.decoder, self.norms, levels, strict=True):
            x = norm(deconv(x, level.size))
            x = x if level.features is None else x + level.features
        return self.classifier(x)


class BilinearBasic(BasicModel):
    """Bilinear-Interpolation: class scores of the deepest map, upsampled by a decoder without parameters.

    Our choice: the class scores are interpolated rather than the 64 maps (the time in the paper equals that of
    FCN-Basic), in four steps of factor two.

    Args:
        num_classes: Number of output channels.
        in_channels: Number of channels of the images.
        width: See `BasicModel`.
        bias: See `BasicModel`.
        switch_source: See `Encoder`.

    Examples:
        >>> import torch
        >>> BilinearBasic(num_classes=11)(torch.zeros(1, 3, 45, 60)).shape
        torch.Size([1, 11, 45, 60])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 3,
        width: PositiveInt = 64,
        bias: bool = True,
        switch_source: HardSource = "pre_relu",
    ) -> None:
        super().__init__(num_classes, in_channels=in_channels, width=width, bias=bias, switch_source=switch_source)
        self.classifier = nn.Conv2d(width, num_classes, 1, bias=bias)
        init_he(self)

    def encode(self, image: Tensor) -> tuple[Tensor, list[Level]]:
        x, pooled, _ = self.encoder(self.normalise(image))
        return self.classifier(x), [Level(pooling.size) for pooling in reversed(pooled)]

    def decode(self, x: Tensor, levels: list[Level]) -> Tensor:
        for size, *_ in levels:
            # Doubled and then cropped, so that windows that extended beyond an odd edge keep their position.
            x = cut(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False), size)
        return x
