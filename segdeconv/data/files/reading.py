"""Reading of image and mask files as the arrays of a data set."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from segdeconv.classes import Classes
from segdeconv.data.files.channels import (
    read_16_bit_colour,
    read_stored,
    read_stored_tiff,
    read_tiff_image,
    unscaled_netpbm,
)
from segdeconv.data.files.decoding import (
    NPY,
    PNG,
    TIFF,
    array_header,
    explain_damage,
    first_bytes,
    open_image,
    read_array,
    tiff_header,
)
from segdeconv.data.files.geo import read_tags
from segdeconv.errors import UsageError

SUFFIXES = frozenset(
    {
        ".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".jfi", ".pjpeg", ".pjp", ".png", ".apng", ".bmp", ".dib", ".gif",
        ".tif", ".tiff", ".webp", ".npy", ".ppm", ".pgm", ".pbm", ".pnm",
    }
)  # fmt: skip
BAND = 1024  # rows of a large image that are converted at once
NODATA = -9999  # label of pixels without data whose value is no integer
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs

PNG_CHANNELS = {b"\0": 1, b"\2": 3, b"\3": 1, b"\4": 2, b"\6": 4}  # by the colour type of the header

Exif = Literal["refuse", "apply", "ignore"]


def read_image(
    path: Path, *, channels: int | None = None, exif: Exif = "refuse", max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Read an image of any colour mode as (H, W, 3) uint8 RGB.

    Transparent pixels are blended with black, and 16 bits are scaled to 8. The fourth channel of a TIFF, which is often
    infrared although it is marked as alpha, is left out.

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


def image_size(path: Path, *, exif: Exif = "refuse", max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return (H, W) of an image from its header, as `read_image` would return it.

    Raises:
        UsageError: The header cannot be read; the message names the file.
    """
    if first_bytes(path).startswith(NPY):
        with path.open("rb") as file:
            shape, _, _ = array_header(path, file)
        return shape[0], shape[1]
    image, orientation = open_image(path, max_pixels, decode=False)
    turned = exif == "apply" and orientation >= 5  # orientations 5 to 8 swap rows and columns
    return (image.width, image.height) if turned else (image.height, image.width)


def _read(path: Path, channels: int | None, max_pixels: int) -> tuple[np.ndarray, int]:
    if channels is not None:
        return read_stored(path, channels, max_pixels=max_pixels)
    start = first_bytes(path)
    if start.startswith(NPY):
        raise UsageError(f"{path} is an array, not an image - set dataset.channels=N to read it as it is stored")
    if start[:4] in TIFF and (tiff := read_tiff_image(path, max_pixels=max_pixels)):
        return _from_tiff(tiff[0]), tiff[1]
    image, orientation = open_image(path, max_pixels)
    with explain_damage(path):  # a palette image without a palette, for one, is decoded but not converted
        return rgb(image, path), orientation


def _from_tiff(image: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) uint8 of (H, W, 1 or 3) uint8 or uint16."""
    if image.dtype == np.uint16:
        image = (image // 257 if image.shape[2] == 1 else image >> 8).astype(np.uint8)  # as Pillow scales them
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else np.ascontiguousarray(image)


def rgb(image: Image.Image, path: Path | str) -> np.ndarray:
    """Convert a decoded image to (H, W, 3) uint8; transparent pixels are blended with black.

    Args:
        image: The image.
        path: Its file or name, for messages.

    Raises:
        UsageError: Its pixels are floats.
    """
    if image.mode == "F":
        raise UsageError(f"{path} is a float image - convert it to 8 or 16 bit")
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # Pillow's own conversion clips 16 bit at 255 instead of scaling it.
        grey = (np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.format == "TIFF":
        if image.mode in ("RGBA", "LA"):
            return _in_bands(image.getchannel("L") if image.mode == "LA" else image)
    elif image.has_transparency_data:
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
        nodata: The label of pixels without data, as a GeoTIFF states it, or None.
    """

    values: np.ndarray
    palette: np.ndarray | None
    alpha: np.ndarray | None
    nodata: int | None = None


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
    Floats are read if all are integers, since gdal_rasterize, QGIS and NumPy write labels as floats by default. A
    nodata value that is no integer, such as NaN, becomes the label -9999.

    Raises:
        UsageError: The file cannot be read, or cannot hold labels; the message names the file.
    """
    with explain_damage(path):
        return _read_stored_mask(path, max_pixels)


def _read_stored_mask(path: Path, max_pixels: int) -> StoredMask:
    start = first_bytes(path)
    colours, alpha = None, False
    if start.startswith(NPY):
        stored = read_array(path, max_pixels, labels=True)
        stored = stored.reshape(stored.shape[1:]) if stored.ndim == 3 and stored.shape[0] == 1 else stored
        stored = stored[:, :, None] if stored.ndim == 2 else stored
        alpha = stored.shape[2] == 4
    elif start[:4] in TIFF:
        tiff = read_stored_tiff(path, max_pixels=max_pixels)
        stored, colours, alpha = tiff.image, tiff.palette, tiff.alpha
    else:
        stored, colours, alpha = _read_mask_with_pillow(path, start, max_pixels)
    values, transparency = (stored[:, :, :-1], stored[:, :, -1]) if alpha else (stored, None)
    if values.shape[2] not in (1, 3):
        raise UsageError(
            f"mask {path} has {values.shape[2]} channels - save masks as one channel of labels or as RGB colours"
        )
    if values.shape[2] == 1:
        nodata = read_tags(path).nodata if start[:4] in TIFF else None
        labels, label = _with_integer_nodata(values[:, :, 0], nodata)
        return StoredMask(_integers(path, labels), colours, _translucent(transparency), label)
    return StoredMask(_eight_bits(path, values), colours, _translucent(transparency))


def _read_mask_with_pillow(path: Path, start: bytes, max_pixels: int) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """Return the stored (H, W, C), the palette, and whether the last channel is alpha."""
    image, _ = open_image(path, max_pixels)
    if image.format in ("JPEG", "MPO", "WEBP"):
        raise UsageError(f"mask {path} is {image.format}, which changes labels - save masks as PNG")
    if image.mode not in ("1", "L", "P", "I", "I;16", "RGB", "LA", "PA", "RGBA"):
        raise UsageError(
            f"mask {path} has colour mode {image.mode} - save masks as one channel of labels or as RGB colours"
        )
    if start.startswith(PNG) and start[24] == 16 and start[25]:
        stored = read_16_bit_colour(path, grey=start[25] == 4)  # Pillow returns only 8 of the 16 bits
    else:
        stored = np.asarray(image)
        if image.format == "PPM":
            stored = unscaled_netpbm(path, image)
    colours = _palette(image)
    if image.format == "GIF" and colours is not None and (colours == colours[:, :1]).all():
        # GIF stores grey as a palette too, often of the occurring greys only, so that the indices mean nothing.
        stored, colours = colours[:, 0][stored], None
    return stored if stored.ndim == 3 else stored[:, :, None], colours, image.mode in ("LA", "PA", "RGBA")


def _integers(path: Path, values: np.ndarray) -> np.ndarray:
    """Return labels as integers of their stored type, and floats that are integers as int64."""
    if values.dtype.kind == "b":
        return values.astype(np.uint8)
    if values.dtype.kind != "f":
        return values
    with np.errstate(invalid="ignore"):
        labels = values.astype(np.int64)
    wrong = labels != values
    if wrong.any():
        row, column = (int(place[0]) for place in wrong.nonzero())
        raise UsageError(
            f"mask {path} holds {values.dtype}, with {values[row, column]!s} at row {row}, column {column} - save "
            "integer labels"
        )
    return labels


def _with_integer_nodata(values: np.ndarray, nodata: float | None) -> tuple[np.ndarray, int | None]:
    """Return labels, and the label of pixels without data, which is NODATA if `nodata` cannot be a label."""
    if nodata is None or values.dtype.kind == "b":
        return values, None
    if nodata.is_integer() and abs(nodata) < 1 << 53:
        return values, int(nodata)
    if values.dtype.kind != "f":
        return values, None
    with np.errstate(over="ignore"):
        missing = np.isnan(values) if np.isnan(nodata) else values == values.dtype.type(nodata)
    return np.where(missing, values.dtype.type(NODATA), values), NODATA


def _eight_bits(path: Path, colours: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) uint8 of colours that another type stores exactly."""
    if colours.dtype == np.uint8:
        return colours
    if colours.dtype == np.uint16 and not (colours % 257).any():
        return (colours // 257).astype(np.uint8)
    with np.errstate(invalid="ignore"):
        exact = colours.astype(np.uint8)
    if colours.dtype.kind == "b" or (exact != colours).any():
        raise UsageError(
            f"mask {path} has colours of {colours.dtype} that are not 0..255 - save masks as one channel of labels or "
            "as 8-bit RGB colours"
        )
    return exact


def _translucent(alpha: np.ndarray | None) -> np.ndarray | None:
    """Return an alpha channel as uint8, or None if every pixel is opaque."""
    if alpha is None:
        return None
    if alpha.dtype != np.uint8:
        alpha = (alpha >> 8 if alpha.dtype == np.uint16 else alpha.clip(0, 255)).astype(np.uint8)
    return None if (alpha == 255).all() else alpha


def _palette(image: Image.Image) -> np.ndarray | None:
    """Return the (256, 3) uint8 colours of a palette image, or None for any other image."""
    flat = image.getpalette("RGB") if image.mode in ("P", "PA") else None
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
    start = first_bytes(path)
    if start.startswith(NPY):
        with path.open("rb") as file:
            shape, _, dtype = array_header(path, file)
        return StoredFormat(8 * dtype.itemsize, shape[2] if len(shape) == 3 else 1, alpha=False)
    if start[:4] in TIFF:
        tiff = tiff_header(path)
        return StoredFormat(tiff.bits, tiff.channels, alpha=False)
    if start.startswith(PNG) and start[12:16] == b"IHDR" and start[25:26] in PNG_CHANNELS:
        return StoredFormat(start[24], PNG_CHANNELS[start[25:26]], alpha=start[25] in (4, 6))
    image, _ = open_image(path, MAX_PIXELS, decode=False)
    bits = {"1": 1, "I": 16}.get(image.mode, 8)
    return StoredFormat(bits, len(image.getbands()), alpha=image.mode in ("LA", "PA", "RGBA"))


def read_mask(path: Path, classes: Classes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a mask file of labels or RGB colours as (H, W) uint8 class indices or ignore_index.

    Pixels of the file's nodata value are ignored, unless it is the label of a class.

    Raises:
        UsageError: The file cannot be read, or has a label or colour that is not in `classes`.
    """
    stored = read_stored_mask(path, max_pixels=max_pixels)
    require_opaque(path, stored)
    values, missing = stored.values, None
    if stored.nodata is not None and not is_class(stored, classes):
        missing = values == stored.nodata
        known = values[~missing]
        if not known.size:
            return np.full(values.shape, classes.ignore_index, dtype=np.uint8)
        values = np.where(missing, known[0], values)
    try:
        mask = classes.from_mask(values, stored.palette)
    except UsageError as error:
        raise UsageError(
            f"mask {path} {error} - correct the mask, or add the class (in classes.yaml, for your own images)"
        ) from None
    if missing is not None:
        mask[missing] = classes.ignore_index
    return mask


def is_class(mask: StoredMask, classes: Classes) -> bool:
    """Return whether the nodata value of a mask file is the label of a class, or has the colour of one."""
    if classes.by_colour and mask.palette is not None:
        in_palette = mask.nodata is not None and 0 <= mask.nodata < len(mask.palette)
        return in_palette and tuple(mask.palette[mask.nodata].tolist()) in classes.colours
    return mask.nodata in classes.labels and not classes.by_colour


def read_list(path: Path) -> list[tuple[int, str]]:
    """Return (line number, text) of each line of a list file that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text - save the list as UTF-8") from None
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
