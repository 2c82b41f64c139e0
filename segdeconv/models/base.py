"""What every segmentation network here is."""

import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from segdeconv.config import TARGET, build, check, locate
from segdeconv.errors import UsageError


class SegmentationModel(nn.Module, ABC):
    """A network from images to class scores of the same height and width.

    num_classes: number of output channels. in_channels: of the images, 3 for RGB.
    heads: names of the modules whose first dimension is the classes: what another set of classes needs anew.
    square_heads: names of those that go from classes to classes, whose first two dimensions are the classes.
    minimum_size: the smallest side in pixels that the network takes; inference pads smaller images up to it.
    """

    heads: tuple[str, ...] = ("classifier",)
    square_heads: tuple[str, ...] = ()
    minimum_size: int = 32

    def __init__(self, num_classes: int, *, in_channels: int = 3) -> None:
        super().__init__()
        self.num_classes, self.in_channels = num_classes, in_channels

    def class_dimensions(self, name: str) -> int:
        """How many leading dimensions of a parameter of this name are the classes: 0 outside of the heads."""
        parts = set(name.split("."))
        return 2 if parts & set(self.square_heads) else int(bool(parts & set(self.heads)))

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """image: (N, in_channels, H, W), normalised -> logits: (N, num_classes, H, W), unbounded."""

    def supervised(self, image: Tensor) -> tuple[Tensor, ...]:
        """The maps that training holds against the mask, each as `forward` gives it, whose own comes first.

        A network that is trained at several places gives more than one; the loss is the mean over them. A method of its
        own, so that `forward` gives the same in training and in use.
        """
        return (self(image),)


def check_model(node: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` node of a config, held against the network's constructor."""
    return check(node, "model", [locate(node, "model")], supplied=["num_classes", "in_channels"])


def build_model(
    node: Mapping[str, Any], num_classes: int, in_channels: int, *, fresh: bool = False
) -> SegmentationModel:
    """The network that a checked `model` node names.

    fresh: without the trained weights that the node asks for, because others are about to be loaded.
    """
    arguments = {**node, "pretrained": "none"} if fresh and "pretrained" in node else node
    supplied = {"num_classes": num_classes}
    if "in_channels" in inspect.signature(locate(node, "model")).parameters:
        supplied["in_channels"] = in_channels
    elif in_channels != 3:
        raise UsageError(
            f"{node[TARGET]} takes images of 3 channels and the data has {in_channels} - give its constructor an "
            "argument in_channels, or choose another model"
        )
    return typing.cast(SegmentationModel, build(arguments, "model", **supplied))
