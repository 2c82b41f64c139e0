"""Augmentation by albumentations: keyed randomness, ignored borders, labels never interpolated."""

import copy
import inspect
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, get_args

import albumentations
import cv2
import numpy as np

from segdeconv.data.preprocessing import MOST, Size
from segdeconv.errors import UsageError
from segdeconv.system.seeding import key

NEAREST = (cv2.INTER_NEAREST, cv2.INTER_NEAREST_EXACT)


class Transform(Protocol):
    """An albumentations transform: takes image= and mask=, gives a dict of both."""

    def __call__(self, *, image: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]: ...


class Augmentation:
    """albumentations behind one door: keyed randomness, ignored borders, labels never interpolated.

    Every sample draws from (seed, epoch, index) alone: albumentations' own seeding gives every worker and every
    epoch the same augmentations (measured on 2.0.8).

    transforms: by their names in the config, in order.
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
    """What a transform is told beside what its config says, so that borders are no class and masks stay in place.

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
