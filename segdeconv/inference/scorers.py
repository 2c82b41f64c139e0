"""From a network to labels: functions of one type, image batch -> class scores, that wrap each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeconv.errors import UsageError
from segdeconv.models import SegmentationModel
from segdeconv.models.layers import fold_norms
from segdeconv.system.devices import _half, autocast
from segdeconv.system.memory import keep_freed, ran_out_of_memory

Model = TypeVar("Model", bound=nn.Module)


# (N, 3, H, W) normalised images -> (N, C, H, W) scores: logits, or anything whose largest channel wins.
Scorer = Callable[[Tensor], Tensor]


def ready(model: Model, device: torch.device, precision: str) -> Model:
    """A copy of a network as it is fastest to use: batch norms folded, on the device, channels last.

    The weights of convolutions are kept in the type that they are computed in (`autocast` would convert them in every
    pass). The running statistics are part of the copy: make a new one after they have changed.
    """
    network = fold_norms(model).to(device).to(memory_format=torch.channels_last)
    if precision.endswith("mixed"):
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                module.to(_half(precision))
    return network


def scorer_on(network: nn.Module, device: torch.device, precision: str, minimum: int) -> Scorer:
    """A network that was made `ready`, as a function of images of any size, on any device.

    minimum: the smallest side in pixels that it takes.
    """

    def score(image: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(precision, device):
            return network(image.to(device).contiguous(memory_format=torch.channels_last))

    return padded(score, minimum)


def padded(scorer: Scorer, minimum: int) -> Scorer:
    """Images smaller than the network takes are padded below and right, and the scores cut back."""

    def score(image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        below, right = max(0, minimum - height), max(0, minimum - width)
        if below or right:
            # Zeros are the mean colour after normalisation.
            image = F.pad(image, (0, right, 0, below))
        return scorer(image)[..., :height, :width]

    return score


def flipped(scorer: Scorer) -> Scorer:
    """Mean softmax over the image and its mirror image, turned back."""

    def score(image: Tensor) -> Tensor:
        straight = scorer(image).float().softmax(dim=1)
        mirrored = scorer(image.flip(-1)).float().softmax(dim=1).flip(-1)
        return (straight + mirrored) / 2

    return score


def softmaxed(scorer: Scorer) -> Scorer:
    """Probabilities for logits."""
    return lambda image: scorer(image).float().softmax(dim=1)


def thrifty(scorer: Scorer) -> Scorer:
    """Where memory runs out a batch is scored in halves."""

    def score(image: Tensor) -> Tensor:
        try:
            return scorer(image)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        # Out here, since the error holds what was computed until then.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(image) > 1:
            return torch.cat([score(half) for half in image.chunk(2)])
        height, width = image.shape[-2:]
        raise UsageError(
            f"memory ran out on one image of {height}x{width} - give a smaller dataset.size=[H,W], or a machine with "
            "more"
        )

    return score


def resized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) scores -> (N, C, *size), bilinear; as they are where the size is theirs."""
    if tuple(scores.shape[-2:]) == tuple(size):
        return scores
    return F.interpolate(scores.float(), size=size, mode="bilinear", align_corners=False)


def labels(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) scores -> (N, *size) uint8 class indices; scores are resized, labels never."""
    # Not argmax, which takes up to 4 times as long on a CPU; of equal scores both take the first.
    return resized(scores, size).max(dim=1).indices.to(torch.uint8)


def labels_and_confidence(scores: Tensor, *, probabilities: bool = False) -> tuple[Tensor, Tensor]:
    """(N, C, H, W) logits, or probabilities -> (N, H, W) uint8 class indices, and float32 their probabilities."""
    top, index = scores.float().max(dim=1)
    if not probabilities:
        top = 1 / (scores - top[:, None]).exp_().sum(dim=1)
    return index.to(torch.uint8), top


def scorer_of(
    model: SegmentationModel,
    device: torch.device,
    precision: str,
    *,
    flip: bool = False,
) -> Scorer:
    """A trained network as a function from normalised images of any size to class scores; uses a copy of it."""
    return _scorer(ready(model, device, precision), device, precision, flip=flip)


def _scorer(
    network: SegmentationModel,
    device: torch.device,
    precision: str,
    *,
    flip: bool,
) -> Scorer:
    keep_freed(device)
    whole = thrifty(scorer_on(network, device, precision, network.minimum_size))
    return flipped(whole) if flip else whole
