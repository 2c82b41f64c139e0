"""Reading of image and mask files as the arrays of a data set."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from segdeconv.classes import Classes
from segdeconv.data.files.channels import read_stored
from segdeconv.data.files.decoding import is_array, open_image, read_array
from segdeconv.errors import UsageError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".npy"})
BAND = 1024  # rows of a large image that are converted at once
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs

Exif = Literal["refuse", "apply", "ignore"]


def read_image(
    path: Path, *, channels: int | None = None, exif: Exif = "refuse", max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Read an image of any colour mode as (H, W, 3) uint8 RGB.

    Transparent pixels are blended with black, and 16 bits are scaled to 8.

    Args:
        path: The image file.
        channels: If given, return (H, W, channels) uint8 or uint16 instead, exactly as stored.
        exif: How to treat the rotation that a camera wrote into EXIF: `apply` it, `ignore` it, or `refuse` the file.
            Some viewers apply it and others do not, so the masks drawn in them can have either orientation.
        max_pixels: Largest number of pixels that is decoded.

    Raises:
        UsageError: The file cannot be read, or is rotated and `exif` is `refuse`; the message names the file.
    """
    image, orientation = _read(path, channels, max_pixels)
    if orientation != 1 and exif == "refuse":
        raise UsageError(
            f"{path} is stored rotated (EXIF orientation {orientation}) and its mask may or may not be - "
            "set dataset.exif=apply or dataset.exif=ignore"
        )
    return turn_upright(image, orientation) if exif == "apply" else image


def read_upright(path: Path, *, channels: int | None = None, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, int]:
    """Read an image like `read_image`, upright.

    Returns:
        The upright image, and the EXIF orientation of the stored one, for `turn_back`.
    """
    image, orientation = _read(path, channels, max_pixels)
    return turn_upright(image, orientation), orientation


def _read(path: Path, channels: int | None, max_pixels: int) -> tuple[np.ndarray, int]:
    if channels is not None:
        return read_stored(path, channels, max_pixels=max_pixels)
    if is_array(path):
        raise UsageError(f"{path} is an array, not an image - set dataset.channels=N to read it as it is stored")
    image, orientation = open_image(path, max_pixels)
    return _rgb(image, path), orientation


def _rgb(image: Image.Image, path: Path) -> np.ndarray:
    if image.mode == "F":
        raise UsageError(f"{path} is a float image - convert it to 8 or 16 bit")
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # Pillow's own conversion clips 16 bit at 255 instead of scaling it.
        grey = (np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return _in_bands(image)


def _in_bands(image: Image.Image) -> np.ndarray:
    """Return (H, W, 3) uint8, converted in bands, since Pillow needs three more copies of what it converts at once."""
    if image.height <= BAND:
        return np.asarray(image.convert("RGB"))
    array = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for top in range(0, image.height, BAND):
        below = min(image.height, top + BAND)
        array[top:below] = np.asarray(image.crop((0, top, image.width, below)).convert("RGB"))
    return array


# The transform from the stored image to the upright one, by EXIF orientation.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image),
}


def turn_upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Return an upright copy of an image stored in the given EXIF orientation."""
    return np.ascontiguousarray(turned_view(image, orientation))


def turned_view(image: np.ndarray, orientation: int) -> np.ndarray:
    """Return an upright view of a stored image; the two share memory."""
    return _TURNS[orientation](image)


def turn_back(mask: np.ndarray, orientation: int) -> np.ndarray:
    """Turn a mask of the upright image into the orientation of the stored image."""
    return turn_upright(mask, {6: 8, 8: 6}.get(orientation, orientation))  # the others are their own inverses


class StoredMask(NamedTuple):
    """A mask file as it is stored.

    Attributes:
        values: (H, W) integers of any type, or (H, W, 3) uint8 colours.
        palette: (256, 3) uint8, the colours of the indices in `values`, or None if the file has no palette.
        alpha: (H, W) uint8, the alpha channel, or None if the file has none or it is 255 everywhere.
    """

    values: np.ndarray
    palette: np.ndarray | None
    alpha: np.ndarray | None


def require_opaque(path: Path, mask: StoredMask) -> None:
    """Raise UsageError if only the alpha channel of a mask varies, since its labels are probably there."""
    if mask.alpha is None or (mask.values != mask.values[:1, :1]).any() or (mask.alpha == mask.alpha[0, 0]).all():
        return
    levels = np.unique(mask.alpha).tolist()
    shown = ", ".join(map(str, levels[:5])) + (", ..." if levels[5:] else "")
    raise UsageError(
        f"mask {path} has one colour everywhere, while its alpha channel has the values {shown}; alpha is not read, "
        "but the labels seem to be there - save the alpha channel as a grey image"
    )


class StoredFormat(NamedTuple):
    """The channels of an image file as they are stored.

    Attributes:
        bits: Number of bits of each channel, 1..64.
        channels: Number of channels, with the alpha channel.
        alpha: True if the last channel is transparency, which `read_image` applies.
    """

    bits: int
    channels: int
    alpha: bool


def read_stored_mask(path: Path, *, max_pixels: int = MAX_PIXELS) -> StoredMask:
    """Read a mask file as it is stored.

    Palette images return their indices: `convert("L")` would turn VOC's {0, 1, 15, 255} into {0, 38, 147, 220}.

    Raises:
        UsageError: The file cannot be read, or cannot hold labels; the message names the file.
    """
    if is_array(path):
        labels = read_array(path, max_pixels)
        if labels.ndim != 2:
            raise UsageError(f"mask {path} has shape {labels.shape} - save masks as (H, W) labels")
        return StoredMask(labels, None, None)
    image, _ = open_image(path, max_pixels)
    if image.format in ("JPEG", "MPO", "WEBP"):
        raise UsageError(f"mask {path} is {image.format}, which changes labels - save masks as PNG")
    values, alpha = np.asarray(image), None
    if image.mode in ("LA", "RGBA"):
        values, alpha = values[:, :, :-1], values[:, :, -1]
        values, alpha = values[:, :, 0] if image.mode == "LA" else values, None if (alpha == 255).all() else alpha
    elif image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "RGB"):
        raise UsageError(
            f"mask {path} has colour mode {image.mode} - save masks as one channel of labels or as RGB colours"
        )
    return StoredMask(values.astype(np.uint8) if image.mode == "1" else values, _palette(image), alpha)


def _palette(image: Image.Image) -> np.ndarray | None:
    """Return the (256, 3) uint8 colours of a palette image, or None for any other image."""
    flat = image.getpalette("RGB") if image.mode == "P" else None
    if flat is None:
        return None
    colours = np.zeros((256, 3), np.uint8)
    colours.reshape(-1)[: len(flat)] = flat[:768]
    return colours


def read_labels(path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read the values of a mask file: (H, W) integer labels, or (H, W, 3) uint8 colours. See `read_stored_mask`."""
    return read_stored_mask(path, max_pixels=max_pixels).values


def stored_format(path: Path) -> StoredFormat:
    """Return the channels of an image file from its header, without decoding it.

    Raises:
        UsageError: The file cannot be read or is not an image; the message names the file.
    """
    image, _ = open_image(path, MAX_PIXELS)
    bits = {"1": 1, "I;16": 16, "I;16B": 16, "I;16L": 16, "I": 32, "F": 32}.get(image.mode, 8)
    return StoredFormat(bits, len(image.getbands()), image.mode in ("LA", "RGBA"))


def read_mask(path: Path, classes: Classes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a mask file of labels or RGB colours as (H, W) uint8 class indices or ignore_index.

    Raises:
        UsageError: The file cannot be read, or has a label or colour that is not in `classes`.
    """
    stored = read_stored_mask(path, max_pixels=max_pixels)
    require_opaque(path, stored)
    try:
        return classes.from_mask(stored.values, stored.palette)
    except UsageError as error:
        raise UsageError(
            f"mask {path} {error} - correct the mask, or add the class (in classes.yaml, for your own images)"
        ) from None


def read_list(path: Path) -> list[tuple[int, str]]:
    """Return (line number, text) of each line of a list file that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text - save the list as UTF-8") from None
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def palette(path: Path) -> list[tuple[int, int, int]] | None:
    """Return the 256 colours of a palette image, or None for any other image."""
    colours = read_stored_mask(path).palette
    return None if colours is None else [(int(r), int(g), int(b)) for r, g, b in colours]
