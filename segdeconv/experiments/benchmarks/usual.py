"""SegNet as it is usually written in PyTorch, the reference of the benchmarks.

It shares nothing with segdeconv/models: it uses torch's layers, torch's default memory format, float32 throughout and
the int64 indices of max_pool2d. Its convolutions are the same as those of `SegNet(num_classes)`.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def unit(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a 3x3 convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
    )


def chain(*channels: int) -> nn.Sequential:
    """Return a sequence of units, one from each number of channels to the next."""
    return nn.Sequential(*(unit(before, after) for before, after in pairwise(channels)))


class UsualSegNet(nn.Module):
    """SegNet on VGG16 as in most repositories, but with ceil_mode in pooling, as in the original."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        ends = [3, *(stage[-1] for stage in STAGES)]
        self.encoder = nn.ModuleList(chain(before, *stage) for before, stage in zip(ends, STAGES, strict=False))
        above = [64, *(stage[-1] for stage in STAGES[:-1])]
        deeper = [chain(*stage[::-1], end) for stage, end in zip(STAGES[1:], above[1:], strict=True)]
        self.decoder = nn.ModuleList([*deeper[::-1], chain(64, 64)])
        self.classifier = nn.Conv2d(64, num_classes, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, num_classes, H, W)
        x, pooled = image, []
        for stage in self.encoder:
            x = stage(x)
            size = x.shape[-2:]
            x, indices = F.max_pool2d(x, 2, 2, ceil_mode=True, return_indices=True)
            pooled.append((indices, size))
        for stage in self.decoder:
            indices, size = pooled.pop()
            x = stage(F.max_unpool2d(x, indices, [2, 2], [2, 2], output_size=list(size)))
        return self.classifier(x)
