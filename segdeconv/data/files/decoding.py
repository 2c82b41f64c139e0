"""Decoding of untrusted image and array files. No other module opens them."""

import errno
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
from PIL import (  # noqa: F401
    BmpImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from segdeconv.errors import UsageError

# Pillow's other formats (EPS, PSD, FITS, ...) would add parsers for hostile files, but no data sets. The modules
# imported above register these formats.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
ORIENTATION = 0x0112  # EXIF tag; value 1 is upright
SAMPLES = 0x0115  # TIFF tag: channels
NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def first_bytes(path: Path, count: int = 32) -> bytes:
    """Return the first bytes of a regular file; never blocks on a pipe or device.

    Raises:
        UsageError: The path is not a readable regular file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "folder" if path.is_dir() else "pipe or device"
            raise UsageError(f"{path} is a {kind} - replace it with a file, or remove it or its entry in the list")
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise UsageError(f"{path} {_reason(path, error)} - restore the file, or remove its entry in the list") from None


def _reason(path: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "is a link to itself"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "is a dangling link" if path.is_symlink() else "is missing"
    return f"cannot be read: {(error.strerror or str(error)).lower()}"


def is_array(path: Path) -> bool:
    """Return True if the content of a file, not its name, is NumPy's .npy format."""
    return first_bytes(path).startswith(NPY)


def require_size(path: Path, width: int, height: int, max_pixels: int) -> None:
    """Check the size in a header against `dataset.max_pixels` before the pixels are decoded.

    Raises:
        UsageError: The image has more than `max_pixels` pixels.
    """
    if width * height > max_pixels:
        raise UsageError(
            f"{path} has {width}x{height} pixels, more than {max_pixels} - shrink it or raise dataset.max_pixels"
        )


def _opened(file: IO[bytes]) -> Image.Image:
    """Open an image without Pillow's process-wide pixel limit; `require_size` checks the limit of this call."""
    start = file.read(16)
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(start) is True:
            file.seek(0)
            with suppress(SyntaxError, IndexError, TypeError, struct.error):  # not of this format
                return factory(file, "")
    raise UnidentifiedImageError


def header_pixels(path: Path) -> int:
    """Return the number of pixels that an image's header states, or 0 if the header cannot be read."""
    try:
        first_bytes(path, 0)
        with path.open("rb") as file:
            image = _opened(file)
            return image.width * image.height
    except Exception:  # Pillow raises many types for a damaged file
        return 0


def damaged(path: Path, error: object) -> UsageError:
    """Return the error for a file that cannot be decoded."""
    reason = " ".join(str(error).split())
    return UsageError(f"{path} is damaged and cannot be decoded ({reason}) - restore or remove it")


def open_image(path: Path, max_pixels: int) -> tuple[Image.Image, int]:
    """Decode an image as it is stored.

    Returns:
        The image and its EXIF orientation, 1..8.

    Raises:
        UsageError: The file cannot be read or decoded, is an animation, has more than `max_pixels` pixels, or has
            channels that Pillow would drop.
    """
    start = first_bytes(path)
    try:
        with path.open("rb") as file:
            image = _opened(file)
            require_size(path, image.width, image.height, max_pixels)
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # MPO: a phone's photo with its depth map
                raise UsageError(f"{path} is an animation of {frames} frames - save the intended frame as an image")
            stored = valid_orientation(image.getexif().get(ORIENTATION, 1))
            if stored != 1:
                image.getexif()[ORIENTATION] = 1  # otherwise Pillow rotates TIFFs, and no other format, while loading
            samples = getattr(image, "tag_v2", {}).get(SAMPLES, 1)
            if len(image.getbands()) == 1 < samples:  # Pillow would silently return only the first
                raise UsageError(
                    f"{path} has {samples} channels but is not a colour image - set dataset.channels=N to read them as "
                    "they are stored"
                )
            image.load()
    except UnidentifiedImageError:
        if start[:4] in TIFF:
            raise UsageError(
                f"{path} is a TIFF that is truncated or not an 8-bit colour image - set dataset.channels=N to read its "
                "channels as they are stored"
            ) from None
        raise UsageError(
            f"{path} is not an image (empty, truncated or another format) - supported formats are {', '.join(FORMATS)}"
        ) from None
    except Image.DecompressionBombError as error:  # WebP and TIFF plugins check this limit too
        raise UsageError(f"{path}: {error} - shrink it, or raise PIL's Image.MAX_IMAGE_PIXELS") from error
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many types for a damaged file
        raise damaged(path, error) from error
    return image, stored


def valid_orientation(value: object) -> int:
    """Return an EXIF orientation 1..8; invalid values become 1, upright."""
    return value if isinstance(value, int) and 1 < value <= 8 else 1


def read_array(path: Path, max_pixels: int) -> np.ndarray:
    """Read the (H, W) or (H, W, C) uint8 or uint16 array of a .npy file.

    The header is checked before any data is read. Object arrays are pickles, which can run code when they are read;
    they are refused like every other type.

    Raises:
        UsageError: The file is damaged, or has another type or shape, or more than `max_pixels` pixels.
    """
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            # Version 3 differs from 2 only in the encoding of field names, which images do not have.
            npy = np.lib.format
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read_header(file)
        except Exception as error:  # NumPy parses the header as Python and raises many types
            raise damaged(path, error) from error
        if dtype.kind != "u" or dtype.itemsize > 2:
            raise UsageError(f"{path} holds {dtype} - save it as uint8 or uint16")
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise UsageError(f"{path} has shape {shape} - save it as (H, W) or (H, W, channels)")
        require_size(path, shape[1], shape[0], max_pixels)
        expected, actual = int(np.prod(shape, dtype=object)) * dtype.itemsize, path.stat().st_size - file.tell()
        if expected != actual:
            raise damaged(path, f"shape {shape} needs {expected} bytes and the file holds {actual}")
        array = np.frombuffer(file.read(expected), dtype).reshape(shape, order="F" if fortran else "C")
    return np.array(array, dtype=dtype.newbyteorder("="), order="C")
