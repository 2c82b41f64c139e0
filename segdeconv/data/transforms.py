"""From a stored image and mask to what the network sees, in training and in prediction."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import albumentations
import cv2
import numpy as np
import torch
from torch import Tensor

from segdeconv.errors import UsageError
from segdeconv.seeding import key

NEAREST = (cv2.INTER_NEAREST, cv2.INTER_NEAREST_EXACT)

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

    def plain(self) -> dict[str, Any]:
        """As plain data, for a checkpoint."""
        return {
            "size": list(self.size) if self.size else None,
            "mean": list(self.mean),
            "std": list(self.std),
            "bits": self.bits,
            "as_stored": self.as_stored,
            "order": self.order,
        }

    @classmethod
    def restore(cls, data: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `plain`."""
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


class Transform(Protocol):
    """An albumentations transform: takes image= and mask=, gives a dict of both."""

    def __call__(self, *, image: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]: ...


class Augmentation:
    """albumentations behind one door: keyed randomness, ignored borders, labels never interpolated.

    Every sample draws from (seed, epoch, index) alone: albumentations' own seeding gives every worker and every
    epoch the same augmentations (measured on 2.0.8).

    transforms: by their names in the recipe, in order.
    crop: (H, W) of the result: padded where smaller (image with the mean colour, mask with ignore_index), cropped at
        random where larger; None leaves the size as it is. It happens after the last transform that moves pixels.
    """

    def __init__(
        self,
        transforms: Mapping[str, Transform],
        *,
        crop: Size | None,
        ignore_index: int,
        fill: Sequence[float],
        seed: int,
    ) -> None:
        self.seed, self.ignore_index = seed, ignore_index
        self.transforms = dict(transforms)
        steps = list(transforms.values())
        if crop is not None:
            # Light and noise come after it, where they are last: what is cut away needs none.
            moving = [not isinstance(step, albumentations.ImageOnlyTransform) for step in steps]
            place = max((number for number, moves in enumerate(moving, start=1) if moves), default=0)
            steps[place:place] = [
                _Pad(*crop, fill=_rounded(fill), fill_mask=ignore_index),
                albumentations.RandomCrop(*crop),
            ]
        self.compose = albumentations.Compose(steps)

    def rehearse(self, image: np.ndarray, mask: np.ndarray) -> None:
        """Do every transform once, so that one which cannot do such images is named before training starts."""
        channels, dtype = image.shape[2], image.dtype
        for name, transform in self.transforms.items():
            where = f"augment.{name} ({type(transform).__name__})"
            way_out = f"leave it out with augment.{name}=null, or choose another"
            once: Any = copy.deepcopy(transform)
            once.p = 1.0
            compose = albumentations.Compose([once])
            compose.set_random_state(np.random.default_rng(self.seed), random.Random(self.seed))
            try:
                result = compose(image=image, mask=mask)
            except Exception as error:  # OpenCV and albumentations raise many types
                said = " ".join(str(error).split())[:160]
                raise UsageError(
                    f"{where} cannot do images of {channels} channel(s) of {8 * dtype.itemsize} bit and size "
                    f"{image.shape[:2]} ({said}) - {way_out}"
                ) from error
            image, mask = result["image"], result["mask"]
            if image.dtype != dtype or image.shape[2:] != (channels,):
                raise UsageError(
                    f"{where} makes {dtype} images of {channels} channels into {image.dtype} of shape {image.shape}, "
                    f"and normalising comes after it - {way_out}"
                )

    def __call__(self, image: np.ndarray, mask: np.ndarray, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """image: (H, W, C) uint8 or uint16; mask: (H, W) uint8 -> the same, augmented as (seed, epoch, index) says."""
        seed = key(self.seed, "augment", epoch, index)
        # One generator for all: set_random_seed would give each its own, seeded alike, so that they draw alike.
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        result = self.compose(image=image, mask=mask)
        return result["image"], result["mask"]


class _Pad(albumentations.PadIfNeeded):  # type: ignore[misc]  # albumentations has no types
    """Fills any number of channels with a value each, where OpenCV fills four."""

    def apply(
        self, img: np.ndarray, pad_top: int, pad_bottom: int, pad_left: int, pad_right: int, **_: Any
    ) -> np.ndarray:
        if not (pad_top or pad_bottom or pad_left or pad_right):
            return img  # albumentations asks all the same
        height, width, channels = img.shape
        padded = np.empty((pad_top + height + pad_bottom, pad_left + width + pad_right, channels), dtype=img.dtype)
        inner = padded[pad_top : pad_top + height]
        fill = np.array(self.fill).astype(img.dtype)
        for border in (padded[:pad_top], padded[pad_top + height :], inner[:, :pad_left], inner[:, pad_left + width :]):
            border[:] = fill
        inner[:, pad_left : pad_left + width] = img
        return padded


def _rounded(fill: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(round(value)) for value in fill)


def mask_arguments(
    transform: Any, node: Mapping[str, Any], *, ignore_index: int, fill: Sequence[float]
) -> dict[str, Any]:
    """What a transform is told beside what its recipe says, so that borders are no class and masks stay in place.

    albumentations fills masks with 0, which is class 0, unless told otherwise, and resizes them with OpenCV's
    INTER_NEAREST, which takes the pixel before the nearest: they end up 0.4 pixels below and right of their images.

    fill: of each channel. More than four, which OpenCV cannot fill apart, get their mean.
    """
    parameters = inspect.signature(transform).parameters
    told: dict[str, Any] = {}
    if "fill_mask" in parameters:
        if node.get("fill_mask", ignore_index) != ignore_index:
            raise UsageError(
                f"augment: {node['_target_']} has fill_mask={node['fill_mask']}; borders are ignored, {ignore_index} - "
                "leave fill_mask out"
            )
        told["fill_mask"] = ignore_index
        if "fill" in parameters and "fill" not in node:
            told["fill"] = _rounded(fill) if len(fill) <= MOST else float(round(np.mean(fill)))
    if node.get("mask_interpolation", cv2.INTER_NEAREST) not in NEAREST:
        raise UsageError(
            f"augment: {node['_target_']} interpolates masks; labels have no in-between - leave mask_interpolation out"
        )
    schema = getattr(transform, "InitSchema", None)
    choice = schema.model_fields.get("mask_interpolation") if schema else None
    if choice and "mask_interpolation" not in node and cv2.INTER_NEAREST_EXACT in get_args(choice.annotation):
        told["mask_interpolation"] = cv2.INTER_NEAREST_EXACT
    return told
