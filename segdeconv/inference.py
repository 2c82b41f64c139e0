"""From a network to labels: functions of one type, image batch -> class scores, that wrap each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from segdeconv.errors import UsageError

# (N, 3, H, W) normalised images -> (N, C, H, W) scores: logits, or anything whose largest channel wins.
Scorer = Callable[[Tensor], Tensor]


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


def resized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) scores -> (N, C, *size), bilinear; as they are where the size is theirs."""
    if tuple(scores.shape[-2:]) == tuple(size):
        return scores
    return F.interpolate(scores.float(), size=size, mode="bilinear", align_corners=False)


def labels(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, h, w) scores -> (N, *size) uint8 class indices; scores are resized, labels never."""
    return resized(scores, size).argmax(dim=1).to(torch.uint8)


def best_device() -> torch.device:
    """An accelerator if there is one."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def fast_precision() -> str:
    """`bf16-mixed` where this machine multiplies bfloat16 faster than float32, else `32-true`."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    fast = any(getattr(torch.cpu, probe, bool)() for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16-mixed" if fast else "32-true"


def resolve_precision(wanted: str, trained: str | None = None) -> str:
    """What `precision=auto` means here: the one trained with if it is fast on this machine, else float32."""
    if wanted not in ("auto", *PRECISIONS):
        raise UsageError(f"precision={wanted} is unknown - it is auto, {', '.join(PRECISIONS)}")
    if wanted != "auto":
        return wanted
    fast = fast_precision()
    return fast if trained in (None, fast) else "32-true"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a network of this precision runs."""
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision.endswith("mixed"))
