"""A network as it leaves this package: with what comes before and after it inside the graph, if that is wished.

What stands here is traced by torch.export, so it is written without a question about sizes: they are free.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeconv.data.preprocessing import Preprocessing, Size
from segdeconv.inference.scorers import with_padding
from segdeconv.models import SegmentationModel

Layout = Literal["nhwc", "nchw"]


class Exported(nn.Module):
    """From an image batch to logits or labels.

    pixels: None for images as the network takes them, (N, C, H, W) float32, resized and normalised. Otherwise the axes
        of images as they are stored, uint8 or uint16, RGB, of any size: they are resized to the preprocessing's size
        and normalised, and the scores are resized back to the images' size, as `predict` does.
    argmax: (N, H, W) uint8 class indices in place of (N, classes, H, W) float32 logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: SegmentationModel, preprocessing: Preprocessing, *, pixels: Layout | None, argmax: bool
    ) -> None:
        super().__init__()
        self.network, self.preprocessing, self.pixels, self.argmax = network, preprocessing, pixels, argmax
        self.size = preprocessing.size if pixels else None
        self.bgr = preprocessing.order == "bgr"
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(preprocessing, name))[:, None, None], persistent=False)

    @property
    def axes(self) -> str:
        """Of what goes in, by letters."""
        return self.pixels.upper() if self.pixels else "NCHW"

    @property
    def output(self) -> str:
        """What comes out, by name."""
        return "labels" if self.argmax else "logits"

    def forward(self, image: Tensor) -> Tensor:
        if self.pixels == "nhwc":
            image = image.permute(0, 3, 1, 2)
        size = image.shape[-2:]
        if self.pixels:
            image = image.float()
            if self.size:
                image = resized_as_stored(image, self.size)
            image = (image - self.mean) / self.std
            if self.bgr:
                image = image.flip(1)
        scores = with_padding(self.network, self.network.minimum_size)(image)
        if self.size:
            scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        return scores.argmax(dim=1).to(torch.uint8) if self.argmax else scores


def resized_as_stored(image: Tensor, size: Size) -> Tensor:
    """`data.preprocessing.resize_image` for (N, C, H, W) whole numbers in float32: area average where both sides
    shrink, else bilinear, rounded to whole numbers.

    As two matrix products, since no resizing that graphs know averages areas. Differs from OpenCV by at most one grey
    level, where that rounds in between.
    """
    height, width = image.shape[-2:]
    shrinks = (torch.scalar_tensor(height) > size[0]) & (torch.scalar_tensor(width) > size[1])
    rows, columns = _shares(height, size[0], shrinks), _shares(width, size[1], shrinks)
    return torch.floor(rows @ image @ columns.T + 0.5)


def _shares(before: int, after: int, shrinks: Tensor) -> Tensor:
    """(after, before): how much of each old cell is in each new one."""
    scale = torch.scalar_tensor(before) / after
    old, new = torch.arange(before, dtype=torch.float32), torch.arange(after, dtype=torch.float32)[:, None]
    overlap = torch.minimum(old + 1, (new + 1) * scale) - torch.maximum(old, new * scale)
    centre = ((new + 0.5) * scale - 0.5).clamp(min=0).minimum(torch.scalar_tensor(before) - 1)
    return torch.where(shrinks, overlap.clamp(min=0) / scale, (1 - (centre - old).abs()).clamp(min=0))
