"""Image and mask files -> the arrays that a data set gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from segdeconv.classes import Classes
from segdeconv.data.files.channels import read_stored
from segdeconv.data.files.decoding import is_array, open_picture, read_array
from segdeconv.errors import UsageError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".npy"})
BAND = 1024  # rows of a large picture that are converted at once
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs

Exif = Literal["refuse", "apply", "ignore"]


def read_image(
    path: Path, *, channels: int | None = None, exif: Exif = "refuse", max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a picture in any colour mode; transparency is laid on black, 16 bit scaled to 8.

    channels: if given, (H, W, channels) uint8 or uint16 instead, exactly as the file stores it.
    exif: a camera's turn of the picture. `apply` it, `ignore` it, or `refuse` such a file, since masks drawn in a
        viewer that turns and masks drawn in one that does not both exist.
    """
    image, stored = _read(path, channels, max_pixels)
    if stored != 1 and exif == "refuse":
        raise UsageError(
            f"{path} is stored turned (EXIF orientation {stored}) and its mask may or may "
            "not be - say dataset.exif=apply or dataset.exif=ignore"
        )
    return turn_upright(image, stored) if exif == "apply" else image


def read_upright(path: Path, *, channels: int | None = None, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, int]:
    """(the picture as `read_image` gives it, upright; the EXIF orientation it is stored in, for `turn_back`)."""
    image, stored = _read(path, channels, max_pixels)
    return turn_upright(image, stored), stored


def _read(path: Path, channels: int | None, max_pixels: int) -> tuple[np.ndarray, int]:
    if channels is not None:
        return read_stored(path, channels, max_pixels=max_pixels)
    if is_array(path):
        raise UsageError(f"{path} is an array, not a picture - say dataset.channels=N to read it as it is")
    image, stored = open_picture(path, max_pixels)
    return _rgb(image, path), stored


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
    """(H, W, 3) uint8; a large picture some rows at a time, since Pillow's way to an array takes three more of it."""
    if image.height <= BAND:
        return np.asarray(image.convert("RGB"))
    array = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for top in range(0, image.height, BAND):
        below = min(image.height, top + BAND)
        array[top:below] = np.asarray(image.crop((0, top, image.width, below)).convert("RGB"))
    return array


# What makes the upright picture of a stored one, by its EXIF orientation.
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


def turn_upright(image: np.ndarray, stored: int) -> np.ndarray:
    """A picture as its file stores it -> upright."""
    return np.ascontiguousarray(turned_view(image, stored))


def turned_view(image: np.ndarray, stored: int) -> np.ndarray:
    """The upright view of a picture as its file stores it; what is written into one is in the other."""
    return _TURNS[stored](image)


def turn_back(mask: np.ndarray, stored: int) -> np.ndarray:
    """A mask of the upright picture -> the mask of the picture as its file stores it."""
    return turn_upright(mask, {6: 8, 8: 6}.get(stored, stored))  # the other turns are their own inverses


def read_labels(path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A mask file as it is: (H, W) integer labels, or (H, W, 3) uint8 if it is coloured. Never grey values.

    Palette images give their indices: `convert("L")` would turn VOC's {0, 1, 15, 255} into {0, 38, 147, 220}.
    """
    if is_array(path):
        array = read_array(path, max_pixels)
        if array.ndim != 2:
            raise UsageError(f"mask {path} has shape {array.shape} - save masks as (H, W) labels")
        return array
    image, _ = open_picture(path, max_pixels)
    if image.format in ("JPEG", "MPO", "WEBP"):
        raise UsageError(f"mask {path} is {image.format}, which changes labels - save masks as PNG")
    if image.mode in ("RGB", "RGBA"):
        return np.asarray(image)[:, :, :3]
    if image.mode in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        return np.asarray(image).astype(np.uint8) if image.mode == "1" else np.asarray(image)
    raise UsageError(
        f"mask {path} has colour mode {image.mode} - save masks as one channel of labels or as RGB colours"
    )


def read_mask(path: Path, classes: Classes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """(H, W) uint8 class indices or ignore_index of a label or RGB-coloured mask file."""
    labels = read_labels(path, max_pixels=max_pixels)
    try:
        return classes.from_labels(labels) if labels.ndim == 2 else classes.from_colours(labels)
    except UsageError as error:
        raise UsageError(f"mask {path} {error} - is it a mask of this data set?") from None


def read_list(path: Path) -> list[tuple[int, str]]:
    """(line number, text) of the lines of a list file that are not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text - save the list as UTF-8") from None
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


def palette(path: Path) -> list[tuple[int, int, int]] | None:
    """The 256 colours of a palette picture, or None for another picture."""
    if is_array(path):
        return None
    image, _ = open_picture(path, MAX_PIXELS)
    if image.mode != "P":
        return None
    flat = image.getpalette("RGB") or []
    flat = flat + [0] * (768 - len(flat))
    return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, 768, 3)]
