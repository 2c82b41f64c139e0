"""Batches of the user's own data loaders, in the form of those of `segdeconv.data.loading`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from segdeconv.classes import Classes
from segdeconv.data.preprocessing import Preprocessing
from segdeconv.errors import UsageError
from segdeconv.losses.base import check_labels

FORM = (
    "SegmentationTask takes batches (image, mask), or mappings with image and mask: image (N, C, H, W), normalised "
    "float32 or uint8 as stored, and mask (N, H, W), class indices or ignore_index"
)


def as_batch(batch: Any, number: int, *, masks: bool = True) -> dict[str, Any]:
    """Return a batch as a dictionary of image, mask and name.

    Args:
        batch: (image, mask, ...), a mapping with `image` and `mask`, or a batch of segdeconv's loaders, which is
            returned unchanged.
        number: Index of the batch in its epoch, for the names of images in messages.
        masks: Whether the batch needs masks; otherwise it may be the images alone.

    Raises:
        UsageError: The batch has another form.
    """
    if isinstance(batch, Mapping):
        parts = dict(batch)
    elif isinstance(batch, Tensor):
        parts = {"image": batch}
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and batch:
        parts = dict(zip(("image", "mask"), batch, strict=False))
    else:
        raise UsageError(f"a batch is a {type(batch).__name__} - {FORM}")
    for name in ("image", "mask") if masks else ("image",):
        if name not in parts:
            raise UsageError(f"a batch ({type(batch).__name__}) has no {name} - {FORM}")
    image = parts["image"]
    if not isinstance(image, Tensor) or image.ndim != 4:
        raise UsageError(f"the images of a batch are {_described(image)} - {FORM}")
    if "name" not in parts:
        parts["name"] = [f"image {index} of batch {number}" for index in range(len(image))]
    return parts


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return f"a {type(value).__name__}"


def check_batch(
    batch: Mapping[str, Any],
    classes: Classes,
    channels: int,
    preprocessing: Preprocessing | None,
    *,
    values: bool = True,
) -> None:
    """Check a batch of the user's own loader.

    Args:
        batch: See `as_batch`.
        classes: The classes of the network.
        channels: Number of channels that the network takes.
        preprocessing: Normalises images of integers; None if there must be none.
        values: Whether to check the labels of masks too.

    Raises:
        UsageError: Shapes, dtypes, labels or the number of channels are not those that the network takes.
    """
    image, mask = batch["image"], batch.get("mask")
    if image.shape[1] != channels:
        last = ": the channels are the second dimension" if image.shape[-1] == channels else ""
        raise UsageError(
            f"the images of a batch have shape {tuple(image.shape)}, but the network takes {channels} channels{last}"
        )
    if not image.is_floating_point() and (preprocessing is None or image.dtype != torch.uint8):
        raise UsageError(
            f"the images of a batch have dtype {image.dtype} - return normalised float32"
            + (" or uint8" if preprocessing else ", or give the task a preprocessing")
        )
    if mask is None or not isinstance(mask, Tensor):  # masks of their stored sizes are a list
        return
    if mask.shape != (len(image), *image.shape[2:]):
        hint = " - remove its dimension of channels" if mask.ndim == 4 and mask.shape[1] == 1 else f" - {FORM}"
        raise UsageError(f"a mask of shape {tuple(mask.shape)} belongs to images of {tuple(image.shape)}{hint}")
    if mask.is_floating_point() or mask.is_complex():
        raise UsageError(
            f"a mask has dtype {mask.dtype}, not an integer type - return its class indices, without scaling"
        )
    if values:
        check_labels(mask, len(classes), classes.ignore_index)
