"""Resizing and normalisation of images and masks for the network, in training and prediction."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from segdeconv.errors import UsageError

OPENCV_CHANNELS = 4  # maximum number of channels that OpenCV averages, or fills separately

Size = tuple[int, int]  # (H, W)
Order = Literal["rgb", "bgr"]


def resize_image(image: np.ndarray, size: Size) -> np.ndarray:
    """Resize (H, W, C) to (*size, C) of the same dtype: bilinear, or area average if both sides shrink."""
    if image.shape[:2] == size:
        return image
    shrinks = size[0] < image.shape[0] and size[1] < image.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    parts = [
        cv2.resize(
            np.ascontiguousarray(image[:, :, first : first + OPENCV_CHANNELS]), size[::-1], interpolation=interpolation
        )
        for first in range(0, image.shape[2], OPENCV_CHANNELS)
    ]
    return (
        np.dstack(parts) if len(parts) > 1 else parts[0].reshape(*size, -1)
    )  # OpenCV drops the axis of a single channel


def resize_mask(mask: np.ndarray, size: Size) -> np.ndarray:
    """Resize a (H, W) uint8 mask with nearest-neighbour interpolation, which invents no labels."""
    if mask.shape == size:
        return mask
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of every image for the network, the same in training and prediction.

    Attributes:
        size: (H, W) of the network's input, or None for the size of each image.
        mean: Mean of each channel, in the units of the stored numbers: 0..255, or 0..65535 for 16 bits.
        std: Standard deviation of each channel, like `mean`.
        bits: Bits of every channel, 8 or 16.
        as_stored: True if images are read exactly as stored; otherwise every image is read as 8-bit RGB.
        order: Order of the channels of the network's input; `bgr` reverses them after normalisation.
    """

    size: Size | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bits: int = 8
    as_stored: bool = False
    order: Order = "rgb"

    @property
    def channels(self) -> int:
        """Number of channels of every image."""
        return len(self.mean)

    def __call__(self, image: np.ndarray, name: str | Path = "the image") -> Tensor:
        """Resize and normalise an image.

        Args:
            image: (H, W, C) uint8 or uint16.
            name: Name of the image, for the error message.

        Returns:
            (C, *size) float32.

        Raises:
            UsageError: The image has other channels or bits than the network.
        """
        return self.normalise(image if self.size is None else resize_image(image, self.size), name)

    def normalise(self, image: np.ndarray, name: str | Path = "the image") -> Tensor:
        """Normalise an image, (H, W, C) uint8 or uint16, to (C, H, W) float32 in channels-last memory."""
        return self.normalised(stacked([self.checked(image, name)]))[0]

    def checked(self, image: np.ndarray, name: str | Path) -> np.ndarray:
        """Return an (H, W, C) image after checking its channels and bits.

        Raises:
            UsageError: The image has other channels or bits than the network; the message starts with `name`.
        """
        channels, bits = image.shape[2] if image.ndim == 3 else 1, 8 * image.dtype.itemsize
        if image.ndim != 3 or (channels, bits) != (self.channels, self.bits):
            raise UsageError(
                f"{name} has {channels} channel(s) of {bits} bit, but the network needs {self.channels} of "
                f"{self.bits} bit - give images like those it was trained on"
            )
        return image

    def normalised(self, images: Tensor) -> Tensor:
        """Normalise a batch of `stacked` images, (N, C, H, W) uint8 or float32, to float32 in channels-last memory."""
        rows = images.permute(0, 2, 3, 1)
        mean, std = _statistics(tuple(self.mean), tuple(self.std), images.device)
        if self.order == "bgr":
            rows, mean, std = rows.flip(-1), mean.flip(0), std.flip(0)
        count, height, width, channels = rows.shape
        # Whole rows are processed at once, since three channels are too few for vector instructions.
        flat = rows.reshape(count * height, width * channels) - mean.repeat(width)
        return flat.div_(std.repeat(width)).view(count, height, width, channels).permute(0, 3, 1, 2)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for a checkpoint."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Restore a preprocessing from `to_dict`."""
        size = (data["size"][0], data["size"][1]) if data["size"] else None
        mean, std = tuple(data["mean"]), tuple(data["std"])
        # Checkpoints of version 0.1 lack the last three.
        return cls(size, mean, std, data.get("bits", 8), data.get("as_stored", False), data.get("order", "rgb"))


@functools.lru_cache(maxsize=16)
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and std as float32 tensors, which stay on the device.

    Copying them for every batch would make the host wait until a GPU has finished all work launched before.
    """
    with torch.inference_mode(False):  # a tensor of inference mode could not be used everywhere
        return tuple(torch.tensor([mean, std], dtype=torch.float32, device=device))


def stacked(images: Sequence[np.ndarray]) -> Tensor:
    """Stack images without changing their values, in channels-last memory.

    uint8 is kept, since it is a quarter of float32 to copy to the device; uint16 is not supported by every device.

    Args:
        images: (H, W, C) uint8 or uint16 each, of one size.

    Returns:
        (N, C, H, W) uint8 or float32.
    """
    rows = np.stack(images)
    return torch.from_numpy(rows if rows.dtype == np.uint8 else rows.astype(np.float32)).permute(0, 3, 1, 2)
