"""Augmentation with albumentations: reproducible draws, ignored borders, and labels that are never interpolated."""

import copy
import inspect
import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, get_args

import cv2
import numpy as np

from segdeconv.data.preprocessing import OPENCV_CHANNELS, Size
from segdeconv.errors import UsageError
from segdeconv.system.installed import albumentations_version
from segdeconv.system.seeding import key

albumentations_version()  # of two that are mixed, the import below would fail with anything
import albumentations  # noqa: E402

NEAREST = (cv2.INTER_NEAREST, cv2.INTER_NEAREST_EXACT)


class Transform(Protocol):
    """An albumentations transform, which takes image= and mask= and returns a dict of both."""

    def __call__(self, *, image: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]: ...


def is_transform(value: object) -> bool:
    """Return whether an object is an albumentations transform."""
    return isinstance(value, albumentations.BasicTransform | albumentations.BaseCompose)


class Augmentation:
    """Random augmentation of an image and its mask, which depends only on (seed, epoch, index).

    albumentations' own seeding gives every worker and every epoch the same augmentations (measured on 2.0.8).

    Args:
        transforms: The transforms by their names in the config, in order.
        crop: (H, W) of the result, or None to keep the size. Smaller images are padded (image with the mean colour,
            mask with ignore_index), larger ones are cropped at random, after the last transform that moves pixels.
        ignore_index: Index of ignored pixels.
        fill: Colour of the padding, for each channel.
        seed: Seed of the augmentation.
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
            # Trailing transforms of colour and noise come after the crop, so that they only process what is left.
            moving = [not isinstance(step, albumentations.ImageOnlyTransform) for step in steps]
            position = max((number for number, moves in enumerate(moving, start=1) if moves), default=0)
            steps[position:position] = [
                _Pad(*crop, fill=_rounded(fill), fill_mask=ignore_index),
                albumentations.RandomCrop(*crop),
            ]
        self.compose = albumentations.Compose(steps)

    def dry_run(self, image: np.ndarray, mask: np.ndarray) -> None:
        """Apply every transform once, so that one which cannot process such images is reported before training.

        Args:
            image: (H, W, C) uint8 or uint16 at the input size.
            mask: (H, W) uint8.

        Raises:
            UsageError: A transform fails, or changes the dtype or the number of channels; the message names it.
        """
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
                reason = " ".join(str(error).split())[:160]
                raise UsageError(
                    f"{where} cannot process images of {channels} channel(s) of {8 * dtype.itemsize} bit and size "
                    f"{image.shape[:2]} ({reason}) - {way_out}"
                ) from error
            image, mask = result["image"], result["mask"]
            if image.dtype != dtype or image.shape[2:] != (channels,):
                raise UsageError(
                    f"{where} changes {dtype} images of {channels} channels to {image.dtype} of shape {image.shape}, "
                    f"but normalisation comes after it - {way_out}"
                )

    def __call__(self, image: np.ndarray, mask: np.ndarray, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Augment a sample.

        Args:
            image: (H, W, C) uint8 or uint16.
            mask: (H, W) uint8.
            epoch: Index of the epoch.
            index: Index of the sample, which with the epoch and the seed determines the result.

        Returns:
            The augmented image and mask.
        """
        seed = key(self.seed, "augment", epoch, index)
        # One generator is shared by all transforms: set_random_seed would give each its own, all with the same seed.
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        result = self.compose(image=image, mask=mask)
        return result["image"], result["mask"]


class _Pad(albumentations.PadIfNeeded):  # type: ignore[misc]  # albumentations has no types
    """Padding with a value per channel for any number of channels; OpenCV supports at most four."""

    def apply(
        self, img: np.ndarray, pad_top: int, pad_bottom: int, pad_left: int, pad_right: int, **_: Any
    ) -> np.ndarray:
        if not (pad_top or pad_bottom or pad_left or pad_right):
            return img  # albumentations calls this even without padding
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
    """Return the arguments to add to a transform's config, so that borders are ignored and masks stay aligned.

    By default, albumentations fills masks with 0, which is a class, and resizes them with OpenCV's INTER_NEAREST, which
    takes the pixel before the nearest, so that masks are shifted by 0.4 pixels to the lower right of their images.

    Args:
        transform: The class of the transform.
        node: Its node in the config.
        ignore_index: Index of ignored pixels.
        fill: Fill value of each channel. More than four channels, which OpenCV cannot fill separately, are filled with
            their mean.

    Raises:
        UsageError: The node fills masks with a class, or interpolates them.
    """
    parameters = inspect.signature(transform).parameters
    arguments: dict[str, Any] = {}
    if "fill_mask" in parameters:
        if node.get("fill_mask", ignore_index) != ignore_index:
            raise UsageError(
                f"augment: {node['_target_']} has fill_mask={node['fill_mask']}; borders must be ignored pixels, "
                f"{ignore_index} - leave out fill_mask"
            )
        arguments["fill_mask"] = ignore_index
        if "fill" in parameters and "fill" not in node:
            arguments["fill"] = _rounded(fill) if len(fill) <= OPENCV_CHANNELS else float(round(np.mean(fill)))
    if node.get("mask_interpolation", cv2.INTER_NEAREST) not in NEAREST:
        raise UsageError(
            f"augment: {node['_target_']} interpolates masks; labels cannot be interpolated - "
            "leave out mask_interpolation"
        )
    schema = getattr(transform, "InitSchema", None)
    choice = schema.model_fields.get("mask_interpolation") if schema else None
    if choice and "mask_interpolation" not in node and cv2.INTER_NEAREST_EXACT in get_args(choice.annotation):
        arguments["mask_interpolation"] = cv2.INTER_NEAREST_EXACT
    return arguments
