"""From a stored image and mask to what the network sees, in training and in prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from segdeconv.errors import UsageError

MOST = 4  # channels that OpenCV averages, or fills with a value each

Size = tuple[int, int]  # (H, W)
Order = Literal["rgb", "bgr"]


def resize_image(image: np.ndarray, size: Size) -> np.ndarray:
    """(H, W, C) -> (*size, C), the type kept; bilinear, with bilinear shrinking's area average where it shrinks."""
    if image.shape[:2] == size:
        return image
    shrinks = size[0] < image.shape[0] and size[1] < image.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    parts = [
        cv2.resize(np.ascontiguousarray(image[:, :, first : first + MOST]), size[::-1], interpolation=interpolation)
        for first in range(0, image.shape[2], MOST)
    ]
    return np.dstack(parts) if len(parts) > 1 else parts[0].reshape(*size, -1)  # OpenCV drops the axis of one channel


def resize_mask(mask: np.ndarray, size: Size) -> np.ndarray:
    """(H, W) uint8 -> size; nearest, so that no label is invented."""
    if mask.shape == size:
        return mask
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


@dataclass(frozen=True)
class Preprocessing:
    """What happens to every image before the network, in training and in prediction alike.

    size: (H, W) that the network sees, or None for each image's own.
    mean, std: per channel, in the units of the stored numbers: 0..255, or 0..65535 of 16 bit.
    bits: of every channel, 8 or 16.
    as_stored: whether images are what their files hold; otherwise any picture becomes 8-bit RGB.
    order: of the channels as the network sees them; `bgr` turns them round, last of all.
    """

    size: Size | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bits: int = 8
    as_stored: bool = False
    order: Order = "rgb"

    @property
    def channels(self) -> int:
        """Of every image."""
        return len(self.mean)

    def __call__(self, image: np.ndarray, name: str | Path = "the image") -> Tensor:
        """(H, W, C) uint8 or uint16 -> (C, *size) float32, normalised. name: for the sentence if it is another kind."""
        return self.normalise(image if self.size is None else resize_image(image, self.size), name)

    def normalise(self, image: np.ndarray, name: str | Path = "the image") -> Tensor:
        """(H, W, C) uint8 or uint16 -> (C, H, W) float32, in channels-last memory."""
        return self.normalised(stacked([self.required(image, name)]))[0]

    def required(self, image: np.ndarray, name: str | Path) -> np.ndarray:
        """The (H, W, C) image, if it is of the kind that the network takes; otherwise one sentence about `name`."""
        found = (image.shape[2] if image.ndim == 3 else 1, 8 * image.dtype.itemsize)
        if image.ndim != 3 or found != (self.channels, self.bits):
            raise UsageError(
                f"{name} has {found[0]} channel(s) of {found[1]} bit and the network takes {self.channels} of "
                f"{self.bits} bit - give images like those it is trained on"
            )
        return image

    def normalised(self, images: Tensor) -> Tensor:
        """(N, C, H, W) numbers as stored, uint8 or float32, on any device -> float32, in channels-last memory."""
        rows = images.permute(0, 2, 3, 1)
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32, device=images.device)
        if self.order == "bgr":
            rows, mean, std = rows.flip(-1), mean.flip(0), std.flip(0)
        count, height, width, channels = rows.shape
        # A row of pixels at a time: three numbers are too few for a processor to work on at once.
        flat = rows.reshape(count * height, width * channels) - mean.repeat(width)
        return flat.div_(std.repeat(width)).view(count, height, width, channels).permute(0, 3, 1, 2)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for a checkpoint."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`."""
        size = (data["size"][0], data["size"][1]) if data["size"] else None
        mean, std = tuple(data["mean"]), tuple(data["std"])
        # Checkpoints of 0.1 lack these.
        return cls(size, mean, std, data.get("bits", 8), data.get("as_stored", False), data.get("order", "rgb"))


def stacked(images: Sequence[np.ndarray]) -> Tensor:
    """(H, W, C) uint8 or uint16 each -> (N, C, H, W) uint8 or float32, in channels-last memory, with no number changed.

    uint8 is a quarter of what the network sees, and what crosses to the device; uint16 not every device knows.
    """
    rows = np.stack(images)
    return torch.from_numpy(rows if rows.dtype == np.uint8 else rows.astype(np.float32)).permute(0, 3, 1, 2)
