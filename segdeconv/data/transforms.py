"""From a stored image and mask to what the network sees, in training and in prediction."""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import albumentations
import cv2
import numpy as np
import torch
from torch import Tensor

from segdeconv.errors import UsageError
from segdeconv.seeding import key

NEAREST = (cv2.INTER_NEAREST, cv2.INTER_NEAREST_EXACT)

Size = tuple[int, int]  # (H, W)


def resize_image(image: np.ndarray, size: Size) -> np.ndarray:
    """(H, W, 3) uint8 -> (*size, 3) uint8; bilinear, with the area average of bilinear shrinking where it shrinks."""
    if image.shape[:2] == size:
        return image
    shrinks = size[0] < image.shape[0] and size[1] < image.shape[1]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def resize_mask(mask: np.ndarray, size: Size) -> np.ndarray:
    """(H, W) uint8 -> size; nearest, so that no label is invented."""
    if mask.shape == size:
        return mask
    return cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


@dataclass(frozen=True)
class Preprocessing:
    """What happens to every image before the network, in training and in prediction alike.

    size: (H, W) that the network sees, or None for each image's own.
    mean, std: per channel, in the units of pixels 0..255.
    """

    size: Size | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def channels(self) -> int:
        """Of every image."""
        return len(self.mean)

    def __call__(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 RGB -> (3, *size) float32, normalised."""
        return self.normalise(image if self.size is None else resize_image(image, self.size))

    def normalise(self, image: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 RGB -> (3, H, W) float32, in channels-last memory."""
        mean, std = np.array(self.mean, dtype=np.float32), np.array(self.std, dtype=np.float32)
        return torch.from_numpy((image - mean) / std).permute(2, 0, 1)

    def plain(self) -> dict[str, Any]:
        """As plain data, for a checkpoint."""
        return {"size": list(self.size) if self.size else None, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def restore(cls, data: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `plain`."""
        size = (data["size"][0], data["size"][1]) if data["size"] else None
        return cls(size, tuple(data["mean"]), tuple(data["std"]))


class Transform(Protocol):
    """An albumentations transform: takes image= and mask=, gives a dict of both."""

    def __call__(self, *, image: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]: ...


class Augmentation:
    """albumentations behind one door: keyed randomness, ignored borders, labels never interpolated.

    Every sample draws from (seed, epoch, index) alone: albumentations' own seeding gives every worker and every
    epoch the same augmentations (measured on 2.0.8).

    crop: (H, W) of the result: padded where smaller (image with the mean colour, mask with ignore_index), cropped at
        random where larger; None leaves the size as it is.
    """

    def __init__(
        self, transforms: Sequence[Transform], *, crop: Size | None, ignore_index: int, fill: Sequence[float], seed: int
    ) -> None:
        self.seed, self.ignore_index = seed, ignore_index
        self.fill = tuple(float(round(value)) for value in fill)
        steps = list(transforms)
        if crop is not None:
            steps += [
                albumentations.PadIfNeeded(*crop, fill=self.fill, fill_mask=ignore_index),
                albumentations.RandomCrop(*crop),
            ]
        self.compose = albumentations.Compose(steps)

    def __call__(self, image: np.ndarray, mask: np.ndarray, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """image: (H, W, 3) uint8; mask: (H, W) uint8 -> the same, augmented as (seed, epoch, index) says."""
        seed = key(self.seed, "augment", epoch, index)
        # One generator for all: set_random_seed would give each its own, seeded alike, so that they draw alike.
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        result = self.compose(image=image, mask=mask)
        return result["image"], result["mask"]


def border_arguments(
    transform: Any, node: Mapping[str, Any], *, ignore_index: int, fill: Sequence[float]
) -> dict[str, Any]:
    """What a transform must be told beside what its recipe says, so that its border is no class.

    albumentations fills masks with 0, which is class 0, unless told otherwise.
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
            told["fill"] = tuple(float(round(value)) for value in fill)
    if node.get("mask_interpolation", cv2.INTER_NEAREST) not in NEAREST:
        raise UsageError(
            f"augment: {node['_target_']} interpolates masks; labels have no in-between - leave mask_interpolation out"
        )
    return told
