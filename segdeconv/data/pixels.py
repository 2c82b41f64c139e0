"""Images of Python programs, in any common form, as the arrays that data sets and predictors use."""

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from segdeconv.data.files.reading import rgb
from segdeconv.errors import UsageError

GREY, FEW = 1, (1, 2, 3, 4)  # channels


def as_image(
    value: Any,
    name: str,
    *,
    channels: int | None = None,
    size: tuple[int, ...] | None = None,
    bits: int = 8,
    grey_as_rgb: bool = False,
) -> np.ndarray:
    """Return an image as an array of pixels.

    An array or tensor is (H, W), (H, W, C) or (C, H, W); `size` decides which, or the side that is `channels` or 1.
    If both fit or neither, an array is (H, W, C), and a tensor (C, H, W) if its first side is `channels` or 1, or if
    that is not given or no side fits, 1 to 4. Pixels are uint8, or uint16 for 16 bits; floats are fractions of the
    largest pixel, in 0..1, and rounded.

    Args:
        value: A PIL image, an array or a tensor.
        name: The name of the image, for messages.
        channels: The number of channels that are needed; None for those that the image has.
        size: (H, W) of the image, as its mask has it; None if it is unknown.
        bits: Bits of the channels that floats become, 8 or 16.
        grey_as_rgb: Repeat the channel of a grey image three times.

    Returns:
        (H, W, C) uint8 or uint16; C is not checked.

    Raises:
        UsageError: The value is not an image.
    """
    if isinstance(value, Image.Image):
        pixels = _from_pillow(value, name, channels, bits)
    elif isinstance(value, Tensor):
        pixels = _channels_last(from_tensor(value), channels, size, first=True)
    elif isinstance(value, np.ndarray):
        pixels = _channels_last(value, channels, size, first=False)
    else:
        raise UsageError(
            f"{name} is of type {type(value).__name__}, not an image - give a path, a PIL image, an array (H, W, C) "
            "or a tensor (C, H, W)"
        )
    if pixels.ndim == 4:
        raise UsageError(f"{name} has shape {pixels.shape}, a batch - give a list of its images")
    if pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise UsageError(f"{name} has shape {pixels.shape} - give (H, W), (H, W, C) or a tensor (C, H, W)")
    if pixels.dtype.kind == "f":
        pixels = _from_fractions(pixels, name, bits)
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if pixels.dtype not in (np.uint8, np.uint16):
        raise UsageError(
            f"{name} has {pixels.dtype} values - give pixels as uint8, or as uint16 to a network of 16 bit, or floats "
            "in 0..1"
        )
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if grey_as_rgb and pixels.shape[2] == GREY:
        pixels = np.repeat(pixels, 3, axis=2)
    return pixels


def from_tensor(value: Tensor) -> np.ndarray:
    """Return a tensor as an array; floats of 8 and 16 bits, some of which NumPy lacks, as float32."""
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() and value.element_size() < 4 else value).numpy()


def _from_pillow(image: Image.Image, name: str, channels: int | None, bits: int) -> np.ndarray:
    if image.mode != "I" or image.format == "PPM":  # the only format whose 16 bits Pillow opens as I
        is_rgb = channels in (None, 3) or image.mode == "P"
        pixels = rgb(image, name) if is_rgb else np.asarray(image)
        return pixels.astype(np.uint16) if pixels.dtype == np.int32 else pixels
    pixels = np.asarray(image)
    if bits != 16 or not ((pixels >= 0) & (pixels <= 65535)).all():
        raise UsageError(
            f"{name} is a PIL image of mode I, whose range is unknown - give its array as uint8 if its values are "
            "0..255, or as uint16 if they are 0..65535: np.asarray(image).astype(np.uint8)"
        )
    return pixels.astype(np.uint16)


def _channels_last(image: np.ndarray, channels: int | None, size: tuple[int, ...] | None, *, first: bool) -> np.ndarray:
    """Return an image as (H, W, C) if it is (C, H, W). If its shape has both meanings, `first` prefers (C, H, W)."""
    if image.ndim != 3:
        return image
    counts = FEW if channels is None else (channels, GREY)
    is_first, is_last = image.shape[0] in counts, image.shape[2] in (counts if first else (*counts, *FEW))
    if size is not None:
        is_first, is_last = image.shape[1:] == size, image.shape[:2] == size
    if is_first == is_last:
        is_first = first and image.shape[0] in (counts if is_last else FEW)
    return image.transpose(1, 2, 0) if is_first else image


def _from_fractions(values: np.ndarray, name: str, bits: int) -> np.ndarray:
    values = values.astype(np.result_type(values, np.float32), copy=False)  # float16 cannot hold 65535
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # not finite ones either
        raise UsageError(
            f"{name} has float values in {low:.3g}..{high:.3g}, but floats must be in 0..1 - give pixels that are not "
            "normalised, since segdeconv does that, or 0..255 as uint8"
        )
    return np.rint(values * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)
