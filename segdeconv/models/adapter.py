"""Networks of other libraries as a `SegmentationModel`."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeconv.config import OBJECT, TARGET, stand_in, type_name
from segdeconv.errors import UsageError, first_line
from segdeconv.models.base import SegmentationModel

MULTIPLE = 32  # encoders of other libraries halve the image up to five times, and some refuse other sizes
AUXILIARY = "aux"
OUTPUTS = ("out", "logits")  # names of the scores in torchvision's and transformers' outputs


class Adapter(SegmentationModel):
    """A network of another library, whose scores are those of a `SegmentationModel`.

    Images are extended on the right and at the bottom to multiples of 32 pixels, which many encoders require, and
    scores of a lower resolution are resized to the image. Of a network that returns several outputs, as those of
    torchvision and transformers, the scores `out` or `logits` are used, of a list the first map with a channel per
    class. Training compares the auxiliary scores `aux` of torchvision too.

    Args:
        network: Maps normalised images, (N, in_channels, H, W), to scores, (N, num_classes, h, w).
        num_classes: The number of classes of the data set.
        in_channels: The number of channels of the images.
    """

    heads = ()
    size_multiple = MULTIPLE

    def __init__(self, network: nn.Module, num_classes: int, *, in_channels: int = 3) -> None:
        super().__init__(num_classes, in_channels=in_channels)
        self.network, self._works = network, False

    def check_input(self, image: Tensor) -> None:
        """Raise UsageError if the network cannot take the first images."""
        if self._works:
            return
        modes = [(module, module.training) for module in self.modules()]
        try:
            with torch.no_grad():
                self.eval()(image[:1])
        except (UsageError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # another library may raise anything
            raise UsageError(
                f"model ({type(self.network).__name__}) fails: {first_line(error)} - it is called with images of shape "
                f"{tuple(image.shape)}, normalised float32"
            ) from error
        finally:
            for module, training in modes:
                module.training = training
        self._works = True

    def forward(self, image: Tensor) -> Tensor:
        return self._resized(_scores(self._output(image), self.num_classes), image)

    def supervised(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the scores, and the auxiliary ones if there are any."""
        output = self._output(image)
        maps = [_scores(output, self.num_classes)]
        if isinstance(output, Mapping) and isinstance(output.get(AUXILIARY), Tensor):
            maps.append(output[AUXILIARY])
        return tuple(self._resized(scores, image) for scores in maps)

    def _output(self, image: Tensor) -> Any:
        height, width = image.shape[-2:]
        bottom, right = -height % MULTIPLE, -width % MULTIPLE
        return self.network(F.pad(image, (0, right, 0, bottom), mode="replicate") if bottom or right else image)

    def _resized(self, scores: Tensor | None, image: Tensor) -> Tensor:
        """Check scores and resize them to the image that was extended; the extension is removed."""
        height, width = image.shape[-2:]
        size = (height + -height % MULTIPLE, width + -width % MULTIPLE)
        name = type(self.network).__name__
        if scores is None or scores.ndim != 4:
            timm = "set model.features_only=true, or " if hasattr(self.network, "feature_info") else ""
            raise UsageError(
                f"model ({name}) returns no (N, classes, H, W) scores - {timm}wrap it in a module that does"
            )
        if scores.shape[1] != self.num_classes:
            raise UsageError(
                f"model ({name}) has scores for {scores.shape[1]} classes, but the data set has "
                f"{self.num_classes} - build it for {self.num_classes}"
            )
        if scores.shape[-2:] != size:
            scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
        return scores[..., :height, :width]


class FeatureScores(nn.Module):
    """Scores of a network that returns feature maps, as those of timm with `features_only=True`.

    As in FCN, a 1x1 convolution scores each map, and the scores are added, here at the resolution of the finest map.
    Long et al. 2015, section 4.2, https://arxiv.org/abs/1411.4038.

    Args:
        network: Maps images to a list of feature maps, the finest first.
        channels: The number of channels of each map.
        num_classes: The number of classes.
    """

    def __init__(self, network: nn.Module, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.network = network
        self.classifier = nn.ModuleList(nn.Conv2d(count, num_classes, 1) for count in channels)

    def forward(self, image: Tensor) -> Tensor:
        maps = [score(features) for score, features in zip(self.classifier, self.network(image), strict=True)]
        size = maps[0].shape[-2:]
        resized = [F.interpolate(scores, size, mode="bilinear", align_corners=False) for scores in maps[1:]]
        return torch.stack([maps[0], *resized]).sum(dim=0)


def _scores(output: Any, num_classes: int) -> Tensor | None:
    if isinstance(output, list | tuple) and not hasattr(output, OUTPUTS[-1]):
        maps = [scores for scores in output if isinstance(scores, Tensor) and scores.ndim == 4]
        return next((scores for scores in maps if scores.shape[1] == num_classes), None)
    for name in OUTPUTS:
        if isinstance(output, Mapping) and name in output:
            output = output[name]
        elif not isinstance(output, Tensor):
            output = getattr(output, name, output)
    return output if isinstance(output, Tensor) else None


def adapted(network: nn.Module, num_classes: int, in_channels: int) -> SegmentationModel:
    """Return a network as a `SegmentationModel`: itself if it is one, otherwise in an `Adapter`.

    Raises:
        UsageError: The network is for another number of classes or channels.
    """
    if not isinstance(network, SegmentationModel):
        channels = getattr(getattr(network, "feature_info", None), "channels", None)  # timm's, of feature maps
        if callable(channels):
            network = FeatureScores(network, channels(), num_classes)
        return Adapter(network, num_classes, in_channels=in_channels)
    for what, own, needed in (
        ("classes", network.num_classes, num_classes),
        ("channels", network.in_channels, in_channels),
    ):
        if own != needed:
            raise UsageError(
                f"model ({type(network).__name__}) is for {own} {what}, but the data set has {needed} - build it for "
                f"{needed}"
            )
    return network


def network_stand_in(network: nn.Module) -> Callable[..., SegmentationModel]:
    """Return the function that stands for a network in a config; each call returns a copy of the network."""

    def network_given(*, num_classes: int, in_channels: int = 3, **described: Any) -> SegmentationModel:
        return adapted(copy.deepcopy(network), num_classes, in_channels)

    node = network.node if isinstance(network, SegmentationModel) else None
    return stand_in(network_given, node[TARGET] if node else None)


def network_node(network: nn.Module) -> dict[str, Any]:
    """Return the `model` node of a network, of which a copy is trained.

    It describes a network of segdeconv in full. For other networks it holds only the name of the class.
    """
    node = network.node if isinstance(network, SegmentationModel) else None
    return {**(node or {OBJECT: type_name(network)}), TARGET: network_stand_in(network)}
