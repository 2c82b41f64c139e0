"""The network module that is exported, optionally with preprocessing and resizing inside the graph.

torch.export traces this module with dynamic sizes, so the code must not branch on sizes.
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
    """A network that maps an image batch to logits or labels.

    Args:
        network: The network.
        preprocessing: The preprocessing of the network.
        pixels: None for resized and normalised images, (N, C, H, W) float32. Otherwise the axes of images as stored,
            uint8 or uint16, RGB, of any size: they are resized to the input size and normalised, and the scores are
            resized back to the size of the images, as `predict` does.
        argmax: Whether to return (N, H, W) uint8 class indices instead of (N, classes, H, W) float32 logits.
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
        """The axes of the input, such as `NCHW`."""
        return self.pixels.upper() if self.pixels else "NCHW"

    @property
    def output(self) -> str:
        """The name of the output."""
        return "labels" if self.argmax else "logits"

    def forward(self, image: Tensor) -> Tensor:
        """Return logits or labels of a batch; see the class for shapes."""
        if self.pixels == "nhwc":
            image = image.permute(0, 3, 1, 2)
        size = image.shape[-2:]
        if self.pixels:
            image = image.float()
            if self.size:
                image = resize_stored_image(image, self.size)
            image = (image - self.mean) / self.std
            if self.bgr:
                image = image.flip(1)
        scores = with_padding(self.network, self.network.minimum_size)(image)
        if self.size:
            scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        return scores.argmax(dim=1).to(torch.uint8) if self.argmax else scores


def resize_stored_image(image: Tensor, size: Size) -> Tensor:
    """Resize images as `data.preprocessing.resize_image` does, with traceable operations.

    Averages areas where both sides shrink, else interpolates bilinearly; rounds to integers. Uses two matrix products,
    since no resize operator of ONNX averages areas. Differs from OpenCV by at most one grey level, because OpenCV
    rounds intermediate values.

    Args:
        image: (N, C, H, W) float32 with integer values.
        size: The (H, W) to resize to.

    Returns:
        (N, C, *size) float32 with integer values.
    """
    height, width = image.shape[-2:]
    shrinks = (torch.scalar_tensor(height) > size[0]) & (torch.scalar_tensor(width) > size[1])
    rows, columns = _resize_matrix(height, size[0], shrinks), _resize_matrix(width, size[1], shrinks)
    return torch.floor(rows @ image @ columns.T + 0.5)


def _resize_matrix(before: int, after: int, shrinks: Tensor) -> Tensor:
    """Return (after, before): the weight of each old pixel in each new pixel."""
    scale = torch.scalar_tensor(before) / after
    old, new = torch.arange(before, dtype=torch.float32), torch.arange(after, dtype=torch.float32)[:, None]
    overlap = torch.minimum(old + 1, (new + 1) * scale) - torch.maximum(old, new * scale)
    centre = ((new + 0.5) * scale - 0.5).clamp(min=0).minimum(torch.scalar_tensor(before) - 1)
    return torch.where(shrinks, overlap.clamp(min=0) / scale, (1 - (centre - old).abs()).clamp(min=0))
