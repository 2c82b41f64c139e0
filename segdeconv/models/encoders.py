"""Encoders: stages of convolutions, each followed by a max-pool that records its switches.

Their tables of channels, such as VGG's, follow Simonyan & Zisserman 2015, table 1, https://arxiv.org/abs/1409.1556.
"""

from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from segdeconv.models.activation_checkpointing import Checkpointable
from segdeconv.models.layers import Blocks, ConvBlock, Dropouts, init_he
from segdeconv.switches.fused import fuses, norm_relu_pool
from segdeconv.switches.modules import MaxPool, SoftMaxPool
from segdeconv.switches.ops import Pooling

Stages = tuple[tuple[int, ...], ...]
# As an argument of a network: at least one stage, and at least one convolution in each.
StagesArgument = Annotated[tuple[Annotated[tuple[PositiveInt, ...], Field(min_length=1)], ...], Field(min_length=1)]


HardSource = Literal["pre_relu", "post_relu"]
SwitchSource = Literal["pre_relu", "post_relu", "soft"]


class Encoding(NamedTuple):
    """Output of an encoder.

    Attributes:
        features: The last pooled map of n stages, (N, C, ceil(H/2^n), ceil(W/2^n)).
        pooled: One Pooling per stage, the first stage first.
        copies: With `Encoder.keep_copies`, the map before each pool, rectified, (N, C, H, W) for the first stage.
    """

    features: Tensor
    pooled: tuple[Pooling, ...]
    copies: tuple[Tensor, ...] = ()


class Encoder(nn.Module):
    """Stages of ConvBlocks, each followed by a max-pool that records its switches.

    Args:
        stages: Output channels of every convolution, stage by stage.
        in_channels: Number of channels of the images.
        kernel: Side of the kernels.
        norm: Use batch norm.
        bias: Give the convolutions biases.
        dilations: Dilation of the convolutions, stage by stage; None for 1.
        switch_source: Values whose maxima set the switches. `post_relu` pools after the ReLU, as in the original
            networks. `pre_relu` pools first and rectifies the maxima: pooled values and gradients are the same, the
            ReLU runs on a quarter of the data, and no window of four zeros can tie, as 8 to 38 % of the windows of an
            untrained VGG16 do with `post_relu`; those ties go to the top left cell. `soft` is `pre_relu` with switches
            that are soft at the beginning of training, see `SoftMaxPool`; inference is the same.
        packed_switches: Keep the switches in two bits instead of eight, for the decoder and for the backward pass;
            slightly slower on a CPU.

    Attributes:
        dropouts: Dropout at `stage3`, before the pool of the third stage, at `pool3`, after it, and so on. It is empty
            until a network with dropout replaces it. Switches are never dropped.
        keep_copies: Whether `Encoding.copies` are kept, for networks that copy them to their decoder.
    """

    keep_copies = False

    def __init__(
        self,
        stages: Stages,
        *,
        in_channels: int = 3,
        kernel: int = 3,
        norm: bool = True,
        bias: bool = True,
        dilations: tuple[int, ...] | None = None,
        switch_source: SwitchSource = "pre_relu",
        packed_switches: bool = False,
    ) -> None:
        super().__init__()
        self.channels = stages
        self.switch_source, self.packed_switches = switch_source, packed_switches
        self.dropouts = Dropouts()
        self.stages = nn.ModuleList()
        for stage, dilation in zip(stages, dilations or (1,) * len(stages), strict=True):
            blocks = []
            for position, channels in enumerate(stage):
                before_pool = position == len(stage) - 1
                activation = not (before_pool and switch_source != "post_relu")
                blocks.append(
                    ConvBlock(
                        in_channels, channels, kernel=kernel, dilation=dilation, norm=norm, activation=activation,
                        bias=bias,
                    )
                )  # fmt: skip
                in_channels = channels
            self.stages.append(Blocks(*blocks))
        kind = SoftMaxPool if switch_source == "soft" else MaxPool
        self.pools = nn.ModuleList(kind(level, packed=packed_switches) for level in range(1, len(stages) + 1))
        self.fused = FusedStage()
        init_he(self)

    def forward(self, x: Tensor) -> Encoding:  # (N, 3, H, W)
        pooled, copies = [], []
        for number, (stage, pool) in enumerate(zip(self.stages, self.pools, strict=True), start=1):
            if not self.keep_copies and f"stage{number}" not in self.dropouts and fuses(stage, pool, x):
                pooling = self.fused(stage, pool, x)
            else:
                before = self.dropouts.at(f"stage{number}", stage(x))
                pooling = pool(before)
                if self.switch_source != "post_relu":
                    pooling = pooling._replace(features=torch.relu(pooling.features))
                if self.keep_copies:
                    copies.append(before if self.switch_source == "post_relu" else torch.relu(before))
            pooled.append(pooling)
            x = self.dropouts.at(f"pool{number}", pooling.features)
        return Encoding(x, tuple(pooled), tuple(copies))


class FusedStage(Checkpointable):
    """A stage and its pool, with the last norm, the ReLU and the pool fused; used only where `fuses` returns True."""

    def forward(self, stage: Any, pool: MaxPool, x: Tensor) -> Pooling:  # stage: nn.Sequential of ConvBlocks
        *blocks, last = stage
        for block in blocks:
            x = block(x)
        relu_before = isinstance(last.activation, nn.ReLU)
        return norm_relu_pool(last.conv(x), last.norm, relu_before=relu_before, packed=pool.packed)
