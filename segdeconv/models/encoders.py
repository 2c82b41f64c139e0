"""Encoders: convolutions and max-pools that remember their switches. VGG is a table.

Simonyan & Zisserman 2015, table 1, https://arxiv.org/abs/1409.1556.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from segdeconv.models.activation_checkpointing import Checkpointable
from segdeconv.models.layers import Blocks, ConvBlock, Dropouts, init_he
from segdeconv.switches.fused import fuses, norm_relu_pool
from segdeconv.switches.modules import MaxPool
from segdeconv.switches.ops import Pooling

Stages = tuple[tuple[int, ...], ...]


SwitchSource = Literal["pre_relu", "post_relu"]


class Encoding(NamedTuple):
    """What the decoder gets.

    features: (N, C, ceil(H/2^n), ceil(W/2^n)), the last pooled map of n stages.
    pooled: one Pooling per stage, the first stage first.
    """

    features: Tensor
    pooled: tuple[Pooling, ...]


class Encoder(nn.Module):
    """Stages of ConvBlocks, each ended by a max-pool that keeps its switches.

    stages: output channels of every convolution, stage by stage.
    dilations: of the convolutions, stage by stage; None for 1.
    switch_source: where the maxima are looked for. `post_relu` as in the originals; `pre_relu` pools first and
        rectifies the maxima: the same pooled values and gradients, ReLU on a quarter of the data, and no window of
        four zeros whose tie goes to the top-left cell (8 to 38 % of the windows of a fresh VGG16).
    packed_switches: keep them in two bits each and not in eight, for the decoder and for the backward pass; a little
        slower where there is no GPU.

    dropouts: at `stage3`, before the pool of the third stage, and `pool3`, after it; whoever builds a network that
        drops puts his in place of these, which drop nothing. Switches are never dropped.
    """

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
                activation = not (before_pool and switch_source == "pre_relu")
                blocks.append(
                    ConvBlock(
                        in_channels, channels, kernel=kernel, dilation=dilation, norm=norm, activation=activation,
                        bias=bias,
                    )
                )  # fmt: skip
                in_channels = channels
            self.stages.append(Blocks(*blocks))
        self.pools = nn.ModuleList(MaxPool(level, packed=packed_switches) for level in range(1, len(stages) + 1))
        self.fused = FusedStage()
        init_he(self)

    def forward(self, x: Tensor) -> Encoding:  # (N, 3, H, W)
        pooled = []
        for number, (stage, pool) in enumerate(zip(self.stages, self.pools, strict=True), start=1):
            if f"stage{number}" not in self.dropouts and fuses(stage, pool, x):
                pooling = self.fused(stage, pool, x)
            else:
                pooling = pool(self.dropouts.at(f"stage{number}", stage(x)))
                if self.switch_source == "pre_relu":
                    pooling = pooling._replace(features=torch.relu(pooling.features))
            pooled.append(pooling)
            x = self.dropouts.at(f"pool{number}", pooling.features)
        return Encoding(x, tuple(pooled))


class FusedStage(Checkpointable):
    """A stage and its pool, with the last norm, the ReLU and the pool in one pass over memory, where `fuses` allows."""

    def forward(self, stage: Any, pool: MaxPool, x: Tensor) -> Pooling:  # stage: ConvBlocks in an nn.Sequential
        *blocks, last = stage
        for block in blocks:
            x = block(x)
        relu_before = isinstance(last.activation, nn.ReLU)
        return norm_relu_pool(last.conv(x), last.norm, relu_before=relu_before, packed=pool.packed)
