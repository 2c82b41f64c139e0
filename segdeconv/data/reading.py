"""Image and mask files -> arrays. The only place that decodes pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from segdeconv.classes import Classes
from segdeconv.errors import UsageError

# What the rest of Pillow can open (EPS, PSD, FITS, ...) are more parsers for hostile files, not more data sets.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
ORIENTATION = 0x0112  # EXIF tag; 1 is upright

Exif = Literal["refuse", "apply", "ignore"]

Image.MAX_IMAGE_PIXELS = None  # ours is checked from the header, with a message of ours


def _open(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, int]:
    """(the picture decoded as stored, its EXIF orientation); raises UsageError naming the file whatever is wrong."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is missing" if not path.is_symlink() else "is a dangling link"
        raise UsageError(f"{path} {what} - restore the file or take it off the list")
    try:
        with path.open("rb") as file:
            image = Image.open(file, formats=FORMATS)
            if image.width * image.height > max_pixels:
                raise UsageError(
                    f"{path} has {image.width}x{image.height} pixels, more than {max_pixels} - shrink it or raise "
                    "dataset.max_pixels"
                )
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a telephone's photo with its depth map is one
                raise UsageError(f"{path} is an animation of {frames} frames - extract the frame that is meant")
            stored = int(image.getexif().get(ORIENTATION, 1))
            stored = stored if stored in _TURN_BACK else 1  # 0 and 9.. mean nothing
            if stored != 1:
                image.getexif()[ORIENTATION] = 1  # or Pillow turns TIFFs, and only them, while it loads them
            image.load()
    except UnidentifiedImageError:
        raise UsageError(
            f"{path} is not a picture (empty, cut or another format) - formats are {', '.join(FORMATS)}"
        ) from None
    except UsageError:
        raise
    except Exception as error:  # Pillow raises many types for a damaged file
        raise UsageError(f"{path} cannot be decoded ({error}) - it is damaged; restore or remove it") from error
    return image, stored


def read_image(path: Path, *, exif: Exif = "refuse", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a picture in any colour mode; transparency is laid on black, 16 bit scaled to 8.

    exif: a camera's turn of the picture. `apply` it, `ignore` it, or `refuse` such a file, since masks drawn in a
        viewer that turns and masks drawn in one that does not both exist.
    """
    image, stored = _open(path, max_pixels)
    if stored != 1:
        if exif == "refuse":
            raise UsageError(
                f"{path} is stored turned (EXIF orientation {stored}) and its mask may or may "
                "not be - say dataset.exif=apply or dataset.exif=ignore"
            )
        if exif == "apply":
            image = image.transpose(_TURN_UPRIGHT[stored])
    return _rgb(image, path)


def read_upright(path: Path, *, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, int]:
    """(the picture as `read_image` gives it, upright; the EXIF orientation it is stored in, for `turn_back`)."""
    image, stored = _open(path, max_pixels)
    if stored != 1:
        image = image.transpose(_TURN_UPRIGHT[stored])
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
    return np.asarray(image.convert("RGB"))


# What turns an upright picture back into the orientation its file is stored in.
_TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


_TURN_UPRIGHT = {**_TURN_BACK, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}


def turn_back(mask: np.ndarray, stored: int) -> np.ndarray:
    """A mask of the upright picture -> the mask of the picture as its file stores it."""
    if stored not in _TURN_BACK:
        return mask
    return np.asarray(Image.fromarray(mask).transpose(_TURN_BACK[stored]))


def read_labels(path: Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A mask file as it is: (H, W) integer labels, or (H, W, 3) uint8 if it is coloured. Never grey values.

    Palette images give their indices: `convert("L")` would turn VOC's {0, 1, 15, 255} into {0, 38, 147, 220}.
    """
    image, _ = _open(path, max_pixels)
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
    image, _ = _open(path)
    if image.mode != "P":
        return None
    flat = image.getpalette("RGB") or []
    flat = flat + [0] * (768 - len(flat))
    return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, 768, 3)]
