"""Augmentation with albumentations: reproducible draws, ignored borders, and labels that are never interpolated."""

import copy
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from segdeconv.data.preprocessing import Size
from segdeconv.errors import UsageError
from segdeconv.system.installed import albumentations_version
from segdeconv.system.seeding import key

albumentations_version()  # of two that are mixed, the import below would fail with anything
import albumentations  # noqa: E402

GENERATED = frozenset(vars(albumentations.NoOp())) - {"p"}  # attributes of every transform that are no arguments
# Two labels that no transform takes for the background, and that differ from their means.
LABELS = (40, 200)


class Transform(Protocol):
    """An albumentations transform, which takes image= and mask= and returns a dict of both."""

    def __call__(self, *, image: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]: ...


def is_transform(value: object) -> bool:
    """Return whether an object is an albumentations transform."""
    return isinstance(value, albumentations.BasicTransform | albumentations.BaseCompose)


def is_composition(target: object) -> bool:
    """Return whether a class is one of albumentations' compositions, such as OneOf."""
    return isinstance(target, type) and issubclass(target, albumentations.BaseCompose)


def _moves(transform: Any) -> bool:
    """Return whether a transform may move pixels."""
    if is_composition(type(transform)):
        return any(_moves(inner) for inner in transform.transforms)
    return not isinstance(transform, albumentations.ImageOnlyTransform)


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
            position = max((number for number, step in enumerate(steps, start=1) if _moves(step)), default=0)
            steps[position:position] = [
                _Pad(*crop, fill=rounded(fill), fill_mask=ignore_index),
                albumentations.RandomCrop(*crop),
            ]
        self.compose = albumentations.Compose(steps)

    def dry_run(self, image: np.ndarray, mask: np.ndarray) -> None:
        """Apply every transform once, so that one which cannot process such images is reported before training.

        Args:
            image: (H, W, C) uint8 or uint16 at the input size.
            mask: (H, W) uint8.

        Raises:
            UsageError: A transform fails, changes the dtype or the number of channels, or does not keep labels, as
                interpolation and morphology; the message names it.
        """
        for name, transform in self.transforms.items():
            image, mask = self._try(transform, image, mask, f"augment.{name}", name)

    def _try(
        self, transform: Any, image: np.ndarray, mask: np.ndarray, where: str, name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Apply a transform, and each one inside it, and return the last result."""
        if is_composition(type(transform)):
            result = image, mask
            for index, inner in enumerate(transform.transforms):
                # Compose and Sequential apply all; of OneOf, SomeOf and RandomOrder, any may be the first.
                chained = isinstance(transform, albumentations.Compose | albumentations.Sequential)
                before = result if chained else (image, mask)
                result = self._try(inner, *before, f"{where}.transforms[{index}]", name)
            return result
        where = f"{where} ({type(transform).__name__})"
        way_out = f"leave it out with augment.{name}=null, or choose another"
        channels, dtype = image.shape[2], image.dtype
        once = copy.deepcopy(transform)
        once.p = 1.0
        compose = albumentations.Compose([once])

        def apply(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            compose.set_random_state(np.random.default_rng(self.seed), random.Random(self.seed))
            result = compose(image=image, mask=mask)
            return result["image"], result["mask"]

        try:
            moved, moved_mask = apply(mask)
            keeps_labels = self._keeps_labels(apply, mask.shape)
        except Exception as error:  # OpenCV and albumentations raise many types
            reason = " ".join(str(error).split())[:160]
            raise UsageError(
                f"{where} cannot process images of {channels} channel(s) of {8 * dtype.itemsize} bit and size "
                f"{image.shape[:2]} ({reason}) - {way_out}"
            ) from error
        if moved.dtype != dtype or moved.shape[2:] != (channels,):
            raise UsageError(
                f"{where} changes {dtype} images of {channels} channels to {moved.dtype} of shape {moved.shape}, "
                f"but dataset.mean and dataset.std normalise them after it - {way_out}"
            )
        if not keeps_labels:
            raise UsageError(
                f"{where} does not keep the labels of masks: it computes with them, or fills borders with a class - "
                f"{way_out}"
            )
        return moved, moved_mask

    def _keeps_labels(self, apply: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], shape: Size) -> bool:
        """Return whether a transform of a mask commutes with an exchange of two labels, and invents none."""
        first, second = (label if label != self.ignore_index else label + 1 for label in LABELS)
        exchange = np.arange(256, dtype=np.uint8)
        exchange[[first, second]] = second, first
        rows, columns = np.ogrid[: shape[0], : shape[1]]
        blocks = np.where((rows // 8 + columns // 8) % 2 == 0, first, second).astype(np.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as that of a transform for labels that are not among these
            (_, one), (_, other) = apply(blocks), apply(exchange[blocks])
        return np.array_equal(exchange[one], other) and set(np.unique(one)) <= {first, second, self.ignore_index}

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


def rounded(fill: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(round(value)) for value in fill)
