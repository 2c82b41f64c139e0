"""What every segmentation network here is."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class SegmentationModel(nn.Module, ABC):
    """A network from images to class scores of the same height and width.

    num_classes: number of output channels.
    minimum_size: the smallest side in pixels that the network takes; inference pads smaller images up to it.
    """

    minimum_size: int = 32

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """image: (N, 3, H, W), normalised -> logits: (N, num_classes, H, W), unbounded."""
