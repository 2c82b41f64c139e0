"""Decoding of untrusted image and array files. No other module opens them."""

import errno
import io
import logging
import os
import re
import stat
import struct
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import (  # noqa: F401
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from segdeconv.errors import UsageError, first_line

# Pillow's other formats (EPS, PSD, FITS, ...) would add parsers for hostile files, but no data sets. The modules
# imported above register these formats.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
ORIENTATION = 0x0112  # EXIF tag; value 1 is upright
SAMPLES, BITS, PLANES = 0x0115, 0x0102, 0x011C  # TIFF tags: channels, bits of each, planar configuration
SUBFILE = 0x00FE  # TIFF tag: the kind of a page
REDUCED, MASK = 1, 4  # bits of SUBFILE: a smaller copy (overview), a transparency mask
SUBPAGES = 0x014A  # TIFF tag: pages inside a page
MAX_COLOUR_CHANNELS = 4
MAX_PAGES = 4096  # of a TIFF that are examined; the time grows with the square of their number
NPY = b"\x93NUMPY"
PNG = b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NETPBM = (b"P4", b"P5", b"P6")  # not the formats of text and of floats, which Pillow's plugin would read too
DICOM = b"DICM"  # after 128 bytes
MEDICAL = (".dcm", ".nii", ".nii.gz")
MEDICAL_WAY_OUT = (
    "DICOM and NIfTI are not supported; convert slices to 16-bit PNG or TIFF and set dataset.channels=1, or use MONAI "
    "(https://monai.io)"
)
METADATA = (b"iTXt", b"tEXt", b"zTXt", b"iCCP")  # PNG chunks
MAX_FLAGS = 1 << 28  # pixels of a mask inside an annotation file
MAX_XMP = 4 << 20  # bytes of XMP that are searched for the orientation


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


def is_medical(path: Path) -> bool:
    """Return True if the ending of a file is that of DICOM or NIfTI."""
    return path.name.lower().endswith(MEDICAL)


def is_array(path: Path) -> bool:
    """Return True if the content of a file, not its name, is NumPy's .npy format."""
    return first_bytes(path).startswith(NPY)


def require_size(path: Path, width: int, height: int, max_pixels: int) -> None:
    """Check the size in a header against `dataset.max_pixels` before the pixels are decoded.

    Raises:
        UsageError: The image has more than `max_pixels` pixels.
    """
    if width < 1 or height < 1:
        raise damaged(path, f"a size of {width}x{height} pixels")
    if width * height > max_pixels:
        raise UsageError(
            f"{path} has {width}x{height} pixels, more than {max_pixels} - shrink it or raise dataset.max_pixels "
            f"to {width * height}"
        )


def _opened(file: IO[bytes]) -> Image.Image:
    """Open an image without Pillow's process-wide pixel limit; `require_size` checks the limit of this call."""
    start = file.read(16)
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if name == "PPM" and not start.startswith(NETPBM):
            continue
        if accept is None or accept(start) is True:
            file.seek(0)
            with suppress(SyntaxError, IndexError, TypeError, struct.error):  # not of this format
                return factory(file, "")
    raise UnidentifiedImageError


def header_pixels(path: Path) -> int:
    """Return the number of pixels that an image's header states, or 0 if the header cannot be read."""
    try:
        if (start := first_bytes(path)).startswith(PNG):
            width, height = struct.unpack(">II", start[16:24])
            return int(width * height)
        with path.open("rb") as file:
            image = _opened(file)
            return image.width * image.height
    except Exception:  # Pillow raises many types for a damaged file
        return 0


def decode_flags(content: bytes, max_pixels: int = MAX_FLAGS) -> np.ndarray:
    """Decode a mask that an annotation file holds as a PNG.

    Returns:
        (H, W) bool: where the alpha channel, or without one any channel, is not 0.

    Raises:
        ValueError: The content is not a PNG of at most `max_pixels` pixels, or is damaged.
    """
    if not content.startswith(PNG):
        raise ValueError("a mask is not a PNG")
    try:
        image = _opened(io.BytesIO(content))
        if image.width * image.height > max_pixels:
            raise ValueError(f"a mask has {image.width}x{image.height} pixels")
        values: Any = np.asarray(image)
    except ValueError:
        raise
    except Exception as error:  # Pillow raises many types for a damaged file
        raise ValueError(f"a mask is damaged ({first_line(error)})") from error
    if values.ndim == 3:
        values = values[:, :, -1] if values.shape[2] in (2, 4) else values.any(axis=2)
    return values > 0


def damaged(path: Path, error: object) -> UsageError:
    """Return the error for a file that cannot be decoded."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return UsageError(f"{path} is damaged and cannot be decoded ({reason}) - restore or remove it")


@contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Turn what Pillow, NumPy and tifffile raise for a damaged file, which may be any exception, into a UsageError."""
    try:
        yield
    except (UsageError, MemoryError):
        raise
    except Exception as error:
        raise damaged(path, error) from error


def open_image(path: Path, max_pixels: int, *, decode: bool = True) -> tuple[Image.Image, int]:
    """Decode an image as it is stored.

    Args:
        path: The image file.
        max_pixels: Largest number of pixels that is decoded.
        decode: Whether to decode the pixels, or to read the header only.

    Returns:
        The image and its EXIF orientation, 1..8.

    Raises:
        UsageError: The file cannot be read or decoded, holds several images, has more than `max_pixels` pixels, or has
            channels that Pillow would drop.
    """
    start = first_bytes(path)
    with explain_damage(path), path.open("rb") as file:
        try:
            try:
                return _decoded(path, file, max_pixels, decode)
            except ValueError as error:
                if not (start.startswith(PNG) and "MAX_TEXT" in str(error)):
                    raise
            return _decoded(path, _without_metadata(file), max_pixels, decode)
        except UnidentifiedImageError:
            if start[:4] in TIFF:
                raise _unsupported_tiff(path) from None
            if is_medical(path) or first_bytes(path, 132)[128:] == DICOM:
                raise UsageError(f"{path} is a medical image - {MEDICAL_WAY_OUT}") from None
            raise UsageError(
                f"{path} is not an image (empty, truncated or another format) - supported formats are "
                f"{', '.join(FORMATS)}"
            ) from None
        except Image.DecompressionBombError as error:  # WebP and TIFF plugins check this limit too
            raise UsageError(f"{path}: {error} - shrink it, or raise PIL's Image.MAX_IMAGE_PIXELS") from error


def _decoded(path: Path, file: IO[bytes], max_pixels: int, decode: bool) -> tuple[Image.Image, int]:
    image = _opened(file)
    require_size(path, image.width, image.height, max_pixels)
    _require_one_image(path, image)
    require_size(path, image.width, image.height, max_pixels)  # of the page of a TIFF that is read
    stored = valid_orientation(image.getexif().get(ORIENTATION, 1))
    if stored != 1:
        image.getexif()[ORIENTATION] = 1  # otherwise Pillow rotates TIFFs, and no other format, while loading
    if image.format == "TIFF":
        _require_channels_of_tiff(path, image)
    if decode:
        image.load()
    return image, stored


def _require_one_image(path: Path, image: Any) -> None:
    """Go to the only image of a file; a TIFF may hold smaller copies and transparency masks of it too."""
    if image.format == "TIFF":
        _seek_only_page(path, image)
    elif image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
        # MPO: a phone's photo with its depth map
        raise UsageError(f"{path} is an animation of {frames} frames - save the intended frame as an image")


def _seek_only_page(path: Path, image: Any) -> None:
    pages, number = [], 0
    while image.is_animated or number == 0:
        try:
            image.seek(number)
        except EOFError:
            break
        except (SyntaxError, TypeError, ValueError, KeyError):  # Pillow cannot decode this page, but has read its tags
            if image.tell() != number:
                raise
        if is_image_page(image.tag_v2.get(SUBFILE, 0), image.tag_v2.get(SUBPAGES), alone=not image.is_animated):
            pages.append(number)
        number += 1
    if len(pages) != 1:
        raise several_images(path, len(pages))
    image.seek(pages[0])


def is_image_page(kind: int, inner: object, *, alone: bool) -> bool:
    """Return True if a page of a TIFF is an image, and not a smaller copy (overview) or a transparency mask.

    Args:
        kind: The tag SUBFILE.
        inner: The tag SUBPAGES. A smaller copy with pages inside it is a camera's thumbnail.
        alone: Whether the file has no other page, so that the mark of a copy has no meaning.
    """
    return not kind & (REDUCED | MASK) or (alone and not inner)


def several_images(path: Path, count: int) -> UsageError:
    """Return the error for a TIFF with several images, or with smaller copies only."""
    what = f"{count} images - save the intended one" if count else "only smaller copies of an image - save the image"
    return UsageError(f"{path} holds {what} as a file of its own")


def _require_channels_of_tiff(path: Path, image: Any) -> None:
    """Refuse channels that Pillow would drop silently, and let it return the others as they are stored."""
    samples = image.tag_v2.get(SAMPLES, 1)
    if len(image.getbands()) == 1 < samples:
        raise UsageError(
            f"{path} has {samples} channels but is not a colour image - set dataset.channels=N to read them as "
            "they are stored"
        )
    if samples > MAX_COLOUR_CHANNELS:
        raise UsageError(f"{path} has {samples} channels - set dataset.channels={samples} to read them as stored")
    bits = image.tag_v2.get(BITS, (8,))
    if samples > 1 and image.tag_v2.get(PLANES) == 2 and max(bits) > 8:  # Pillow would read every second byte
        raise UsageError(f"{path} has channels of {max(bits)} bit in planes - save them interleaved, or as RGB")
    # Pillow divides the colours by an associated alpha, which is often no alpha but a band of infrared.
    image.tile = [
        tile._replace(args=(tile.args[0].replace("a", "A"), *tile.args[1:]))
        if isinstance(tile.args, tuple) and isinstance(tile.args[0], str)
        else tile
        for tile in image.tile
    ]


def _without_metadata(file: IO[bytes]) -> IO[bytes]:
    """Return a PNG without its texts and colour profile, for which Pillow has limits that no pixel depends on.

    The orientation in XMP is kept. No more is copied than the pixels of the header's size need.
    """
    file.seek(0)
    start = file.read(len(PNG))
    size = os.fstat(file.fileno()).st_size
    limit, copy = 1 << 20, io.BytesIO()
    copy.write(start)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if length > size - file.tell():
            raise ValueError(f"its chunk {kind!r} ends after the file")
        if kind in METADATA:
            orientation = _xmp_orientation(file.read(min(length, MAX_XMP))) if kind == b"iTXt" else b""
            file.seek(max(0, length - MAX_XMP) + 4 if kind == b"iTXt" else length + 4, os.SEEK_CUR)
            if orientation:
                text = b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + orientation
                copy.write(struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text)))
            continue
        if copy.tell() + length > limit:
            raise ValueError(f"its chunk {kind!r} is longer than its pixels can be")
        body = file.read(length + 4)
        if kind == b"IHDR":
            width, height = struct.unpack(">II", body[:8])
            limit += 2 * height * (8 * width + 1)
        copy.write(head + body)
    copy.seek(0)
    return copy


def _xmp_orientation(text: bytes) -> bytes:
    """Return the statement of the orientation in an iTXt chunk of XMP, or nothing."""
    keyword, _, rest = text.partition(b"\0")
    if keyword != b"XML:com.adobe.xmp" or len(rest) < 2:
        return b""
    xmp = rest[2:].split(b"\0", 2)[-1]
    if rest[0]:
        with suppress(zlib.error):
            xmp = zlib.decompressobj().decompress(xmp, MAX_XMP)
    match = re.search(rb'tiff:Orientation(="|>)([0-9])', xmp)
    return match.group() if match else b""


def netpbm_maximum(path: Path) -> int:
    """Return the number that stands for the full intensity in a Netpbm image of grey or colours."""
    image: Any = open_image(path, sys.maxsize, decode=False)[0]
    arguments = image.tile[0].args  # a raw mode, or the raw mode and the maximum
    if isinstance(arguments, tuple):
        return int(arguments[1])
    return 65535 if arguments == "I;16B" else 255


class TiffHeader(NamedTuple):
    """The layout of the only image of a TIFF, and the number of bits of each channel."""

    dtype: np.dtype[Any]
    bits: int
    channels: int


def tiff_header(path: Path) -> TiffHeader:
    """Read the layout of a TIFF, without its pixels.

    Raises:
        UsageError: The file is damaged or holds several images; the message names it.
    """
    import tifffile

    try:
        with silenced("tifffile"), path.open("rb") as stream, tifffile.TiffFile(stream) as file:
            series = only_series(path, file)
            page = series.keyframe
            pixels = page.imagelength * page.imagewidth
            return TiffHeader(np.dtype(series.dtype), page.bitspersample, series.size // pixels)
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # tifffile raises many types for a damaged file
        raise damaged(path, error) from error


def only_series(path: Path, file: Any) -> Any:
    """Return the only image of a TIFF that tifffile has opened. It may be in several pages, one for each channel.

    Raises:
        UsageError: The file holds several images, or only smaller copies.
    """
    import tifffile

    count = len(file.pages)
    if count > MAX_PAGES:
        raise several_images(path, count)
    if count > 1:  # tifffile would take an image and its mask for two channels if they are stored alike
        pages = [page for page in file.pages if is_image_page(page.subfiletype, page.subifds, alone=False)]
        if len(pages) == 1:
            return tifffile.TiffPageSeries(pages)
        count = len(pages)
    alone = len(file.series) == 1
    images = [
        series
        for series in file.series
        if is_image_page(series.keyframe.subfiletype, series.keyframe.subifds, alone=alone)
    ]
    if len(images) != 1:
        raise several_images(path, max(count, len(images)) if images else 0)
    return images[0]


def _unsupported_tiff(path: Path) -> UsageError:
    """Return the error for a TIFF that Pillow cannot open."""
    try:
        dtype, bits, channels = tiff_header(path)
    except UsageError:
        return UsageError(f"{path} is a TIFF that is truncated or damaged - restore or remove it")
    what = f"{path} holds {channels} channel{'s' if channels != 1 else ''} of {bits} bit ({dtype})"
    if dtype in (np.uint8, np.uint16) and bits in (8, 16):
        return UsageError(f"{what} - set dataset.channels={channels} to read them as they are stored")
    return UsageError(f"{what}, which is not an image of intensities - convert it to uint8 or uint16")


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """Drop this thread's messages of a logger, since our own error reports what is wrong with the file."""
    logger, thread = logging.getLogger(name), threading.get_ident()

    def from_another_thread(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(from_another_thread)
    try:
        yield
    finally:
        logger.removeFilter(from_another_thread)


def valid_orientation(value: object) -> int:
    """Return an EXIF orientation 1..8; invalid values become 1, upright."""
    return value if isinstance(value, int) and 1 < value <= 8 else 1


def read_array(path: Path, max_pixels: int, *, labels: bool = False) -> np.ndarray:
    """Read the (H, W) or (H, W, C) array of a .npy file.

    The header is checked before any data is read. Object arrays are pickles, which can run code when they are read;
    they are refused like every other type.

    Args:
        path: The file.
        max_pixels: Largest number of pixels that is read.
        labels: Read booleans, integers and floats of up to 64 bits, and not only uint8 and uint16.

    Raises:
        UsageError: The file is damaged, or has another type or shape, or more than `max_pixels` pixels.
    """
    with path.open("rb") as file:
        shape, fortran, dtype = array_header(path, file)
        if dtype.kind not in ("biuf" if labels else "u") or dtype.itemsize > (8 if labels else 2):
            rule = "save integer labels" if labels else "save it as uint8 or uint16"
            raise UsageError(f"{path} holds {dtype} - {rule}")
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise UsageError(f"{path} has shape {shape} - save it as (H, W){'' if labels else ' or (H, W, channels)'}")
        rows, columns = shape[1:] if labels and len(shape) == 3 and shape[0] == 1 else shape[:2]
        require_size(path, columns, rows, max_pixels)
        expected, actual = int(np.prod(shape, dtype=object)) * dtype.itemsize, path.stat().st_size - file.tell()
        if expected != actual:
            raise damaged(path, f"shape {shape} needs {expected} bytes and the file holds {actual}")
        if labels and len(shape) == 3 and not (rows, columns) == shape[1:] and shape[2] not in (1, 3, 4):
            raise UsageError(f"mask {path} has shape {shape} - save masks as (H, W) labels")
        array = np.frombuffer(file.read(expected), dtype).reshape(shape, order="F" if fortran else "C")
    return np.array(array, dtype=dtype.newbyteorder("="), order="C")


def array_header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the shape, Fortran order and type of a .npy file.

    Raises:
        UsageError: The header is damaged.
    """
    try:
        version = np.lib.format.read_magic(file)
        # Version 3 differs from 2 only in the encoding of field names, which images do not have.
        npy = np.lib.format
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return read_header(file)
    except Exception as error:  # NumPy parses the header as Python and raises many types
        raise damaged(path, error) from error
