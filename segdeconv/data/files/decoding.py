"""Files -> what is stored in them, or one sentence. The only place that opens a stranger's picture or array."""

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

# What the rest of Pillow can open (EPS, PSD, FITS, ...) are more parsers for hostile files, not more data sets. The
# modules imported above register these.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
ORIENTATION = 0x0112  # EXIF tag; 1 is upright
SAMPLES = 0x0115  # TIFF tag: channels
NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def first_bytes(path: Path, count: int = 32) -> bytes:
    """The beginning of a file; raises UsageError if it is none, and never waits for one that gives nothing."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            what = "is a folder" if path.is_dir() else "is a pipe or device"
            raise UsageError(f"{path} {what} - put a file in its place, or take it away or off the list")
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise UsageError(f"{path} {_why(path, error)} - restore the file, or take it away or off the list") from None


def _why(path: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "is a link that leads to itself"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "is a dangling link" if path.is_symlink() else "is missing"
    return f"cannot be read: {(error.strerror or str(error)).lower()}"


def is_array(path: Path) -> bool:
    """Whether a file is one of NumPy's .npy, whatever its name."""
    return first_bytes(path).startswith(NPY)


def require_size(path: Path, width: int, height: int, max_pixels: int) -> None:
    """One sentence if a header promises more than `dataset.max_pixels`; asked before anything is decoded."""
    if width * height > max_pixels:
        raise UsageError(
            f"{path} has {width}x{height} pixels, more than {max_pixels} - shrink it or raise dataset.max_pixels"
        )


def _opened(file: IO[bytes]) -> Image.Image:
    """`Image.open` without Pillow's limit of pixels, which is one for the process; `require_size` has ours."""
    start = file.read(16)
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(start) is True:
            file.seek(0)
            with suppress(SyntaxError, IndexError, TypeError, struct.error):  # not of this format
                return factory(file, "")
    raise UnidentifiedImageError


def header_pixels(path: Path) -> int:
    """How many pixels a picture has, by its header; 0 where that cannot be told, which is said when it is read."""
    try:
        first_bytes(path, 0)
        with path.open("rb") as file:
            image = _opened(file)
            return image.width * image.height
    except Exception:  # Pillow raises many types for a damaged file
        return 0


def damaged(path: Path, error: object) -> UsageError:
    """What is said of a file that no reader gets through."""
    said = " ".join(str(error).split())
    return UsageError(f"{path} cannot be decoded ({said}) - it is damaged; restore or remove it")


def open_picture(path: Path, max_pixels: int) -> tuple[Image.Image, int]:
    """(the picture decoded as stored, its EXIF orientation); raises UsageError naming the file whatever is wrong."""
    start = first_bytes(path)
    try:
        with path.open("rb") as file:
            image = _opened(file)
            require_size(path, image.width, image.height, max_pixels)
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a telephone's photo with its depth map is one
                raise UsageError(f"{path} is an animation of {frames} frames - extract the frame that is meant")
            stored = valid_orientation(image.getexif().get(ORIENTATION, 1))
            if stored != 1:
                image.getexif()[ORIENTATION] = 1  # or Pillow turns TIFFs, and only them, while it loads them
            samples = getattr(image, "tag_v2", {}).get(SAMPLES, 1)
            if len(image.getbands()) == 1 < samples:  # of which Pillow would give the first, and say nothing
                raise UsageError(
                    f"{path} has {samples} channels and is no colour picture - say dataset.channels=N to read them as "
                    "they are stored"
                )
            image.load()
    except UnidentifiedImageError:
        if start[:4] in TIFF:
            raise UsageError(
                f"{path} is a TIFF that is cut or no 8-bit colour picture - say dataset.channels=N to read its "
                "channels as they are stored"
            ) from None
        raise UsageError(
            f"{path} is not a picture (empty, cut or another format) - formats are {', '.join(FORMATS)}"
        ) from None
    except Image.DecompressionBombError as error:  # which WebP and TIFF ask for too
        raise UsageError(f"{path}: {error} - shrink it, or raise PIL's Image.MAX_IMAGE_PIXELS") from error
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # Pillow raises many types for a damaged file
        raise damaged(path, error) from error
    return image, stored


def valid_orientation(value: object) -> int:
    """1..8; 1, upright, for what means nothing."""
    return value if isinstance(value, int) and 1 < value <= 8 else 1


def read_array(path: Path, max_pixels: int) -> np.ndarray:
    """(H, W) or (H, W, C) uint8 or uint16 of a .npy file. Its header is judged before anything else of it is read.

    Arrays of objects are pickles, which run code when they are read: they are refused like every other type.
    """
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            # Version 3 differs from 2 in how it writes the names of fields, of which a picture has none.
            form = np.lib.format
            read_header = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
            shape, fortran, dtype = read_header(file)
        except Exception as error:  # NumPy parses the header as Python, and raises what that raises
            raise damaged(path, error) from error
        if dtype.kind != "u" or dtype.itemsize > 2:
            raise UsageError(f"{path} holds {dtype} - save it as uint8 or uint16")
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise UsageError(f"{path} has shape {shape} - save it as (H, W) or (H, W, channels)")
        require_size(path, shape[1], shape[0], max_pixels)
        said, there = int(np.prod(shape, dtype=object)) * dtype.itemsize, path.stat().st_size - file.tell()
        if said != there:
            raise damaged(path, f"shape {shape} is {said} bytes and {there} follow")
        array = np.frombuffer(file.read(said), dtype).reshape(shape, order="F" if fortran else "C")
    return np.array(array, dtype=dtype.newbyteorder("="), order="C")
