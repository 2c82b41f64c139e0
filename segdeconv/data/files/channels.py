"""Reading of images with any number of channels, of 8 or 16 bits, exactly as they are stored."""

import logging
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from segdeconv.data.files.decoding import (
    NPY,
    ORIENTATION,
    TIFF,
    damaged,
    first_bytes,
    open_image,
    read_array,
    require_size,
    valid_orientation,
)
from segdeconv.errors import UsageError

PNG = b"\x89PNG\r\n\x1a\n"
MODES = ("L", "LA", "RGB", "RGBA", "CMYK", "I;16")  # the modes in which Pillow returns the stored numbers
STACKED = "SCQI"  # tifffile's axis names: samples, channels, unknown, pages
DEFLATE = (8, 32946)


def read_stored(path: Path, channels: int, *, max_pixels: int) -> tuple[np.ndarray, int]:
    """Read an image as it is stored, neither scaled nor converted.

    Formats are JPEG, PNG, BMP and WEBP; TIFF with any number of channels, interleaved, in planes or in pages; and .npy
    of shape (H, W) or (H, W, channels).

    Returns:
        (H, W, channels) uint8 or uint16, and the EXIF orientation, 1..8.

    Raises:
        UsageError: The file cannot be read or has another number of channels; the message names the file.
    """
    start = first_bytes(path)
    if start.startswith(NPY):
        image, orientation = read_array(path, max_pixels), 1
        if image.ndim == 3 and image.shape[0] == channels != image.shape[2]:
            raise UsageError(f"{path} has shape {image.shape}, channels first - save np.moveaxis(array, 0, -1)")
        _require_channels(path, image.shape[2] if image.ndim == 3 else 1, image.dtype, channels)
    elif start[:4] in TIFF:
        image, orientation = _read_tiff(path, channels, max_pixels)
    else:
        image, orientation = _read_with_pillow(path, start, max_pixels)
        _require_channels(path, image.shape[2] if image.ndim == 3 else 1, image.dtype, channels)
    return image.reshape(*image.shape[:2], channels), orientation


def _require_channels(path: Path, actual: int, dtype: np.dtype[Any], channels: int) -> None:
    if actual != channels:
        raise UsageError(
            f"{path} has {actual} channel{'s' if actual > 1 else ''} of {8 * dtype.itemsize} bit and "
            f"dataset.channels is {channels} - set it to the number that all images have; channels are never converted"
        )


def _read_with_pillow(path: Path, start: bytes, max_pixels: int) -> tuple[np.ndarray, int]:
    """Read an image with Pillow. It also decodes, and so checks, the one kind it cannot return: 16-bit colour PNG."""
    image, orientation = open_image(path, max_pixels)
    depth, colour = (start[24], start[25]) if start.startswith(PNG) else (8, 0)
    if image.mode not in MODES or depth < 8:
        kind = {"P": "a palette, whose indices are not intensities", "1": "1 bit"}.get(image.mode, f"mode {image.mode}")
        raise UsageError(
            f"{path} has {kind if depth >= 8 else f'{depth} bit'} - save it with channels of 8 or 16 bit, or leave "
            "out dataset.channels to read it as RGB"
        )
    if depth == 16 and colour:
        return _read_16_bit_colour(path, grey=colour == 4), orientation
    return np.array(image), orientation


def _read_16_bit_colour(path: Path, *, grey: bool) -> np.ndarray:
    """Return (H, W, C) uint16. OpenCV repeats the grey channel of grey with alpha, so only one is kept."""
    image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16 or image.ndim != 3:
        raise damaged(path, "OpenCV cannot read its 16-bit colour")
    return np.ascontiguousarray(image[:, :, [0, 3] if grey else [2, 1, 0, 3][: image.shape[2]]])


# TIFF


def _read_tiff(path: Path, channels: int, max_pixels: int) -> tuple[np.ndarray, int]:
    import tifffile

    try:
        with _silenced("tifffile"), tifffile.TiffFile(path) as file:
            images = [series for series in file.series if not series.keyframe.is_reduced]  # overviews are reduced
            if len(images) != 1:
                raise UsageError(f"{path} holds {len(images)} images - save the intended one as a file of its own")
            series, page = images[0], images[0].keyframe
            axes, shape = _layout(path, series, channels)
            require_size(path, shape[1], shape[0], max_pixels)
            _require_channels(path, shape[2], series.dtype, channels)
            orientation = valid_orientation(page.tags.valueof(ORIENTATION))
            missing = _missing_codec(tifffile, page)
            if missing:
                return _read_tiff_with_pillow(path, channels, missing, max_pixels)
            _require_whole(path, series)
            image = series.asarray(squeeze=False, maxworkers=1).transpose(axes)
            return np.ascontiguousarray(image).reshape(shape), orientation
    except UsageError:
        raise
    except Exception as error:  # tifffile raises many types for a damaged file
        raise damaged(path, error) from error


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Drop this thread's messages of a logger, since our own error reports what is wrong with the file."""
    logger, thread = logging.getLogger(name), threading.get_ident()

    def from_another_thread(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(from_another_thread)
    try:
        yield
    finally:
        logger.removeFilter(from_another_thread)


def _layout(path: Path, series: Any, channels: int) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """Return the order of axes that puts rows first, then columns, then channels, and the resulting (H, W, C)."""
    axes, lengths = series.get_axes(squeeze=False), series.get_shape(squeeze=False)
    if series.dtype not in (np.uint8, np.uint16):
        raise UsageError(f"{path} holds {series.dtype} - save it as uint8 or uint16")
    if series.keyframe.photometric == 3:
        raise UsageError(f"{path} has a palette, whose indices are not intensities - save it as channels")
    long = [axis for axis, name in enumerate(axes) if name not in "YX" and lengths[axis] > 1]
    flat = axes.count("Y") == axes.count("X") == 1
    if not flat or len(long) > 1 or not {axes[axis] for axis in long} <= set(STACKED):
        raise UsageError(f"{path} has axes {axes} of lengths {lengths} - save it as rows, columns and channels")
    row, column = axes.index("Y"), axes.index("X")
    if long and axes[long[0]] == "Q" and lengths[long[0]] != channels == lengths[column]:
        # An (H, W, C) array saved without a description of its axes: tifffile treats its rows as pages.
        row, column, long = long[0], row, [column]
    others = [axis for axis in range(len(axes)) if axis not in (row, column, *long)]
    return (
        (*others, row, column, *long),
        (lengths[row], lengths[column], lengths[long[0]] if long else 1),
    )


def _missing_codec(tifffile: Any, page: Any) -> str | None:
    """Return the compression or predictor for which the package imagecodecs is missing, or None."""
    for kinds, kind in (
        (tifffile.TIFF.DECOMPRESSORS, page.compression),
        (tifffile.TIFF.UNPREDICTORS, page.predictor),
    ):
        try:
            kinds[kind]
        except KeyError:
            return str(getattr(kind, "name", kind))
    return None


def _read_tiff_with_pillow(path: Path, channels: int, codec: str, max_pixels: int) -> tuple[np.ndarray, int]:
    """Read a TIFF with Pillow, which supports more compressions but fewer layouts."""
    message = f"{path} is compressed with {codec} - pip install imagecodecs, or save it uncompressed or with deflate"
    try:
        image, orientation = open_image(path, max_pixels)
    except UsageError as error:
        raise UsageError(message) from error
    array = np.array(image)
    if image.mode not in MODES or array.size != array.shape[0] * array.shape[1] * channels:
        raise UsageError(message)
    return array, orientation


def _require_whole(path: Path, series: Any) -> None:
    """Check that every strip or tile lies in the file and has the right length.

    tifffile fills missing parts with zeros, and decompresses a strip to any length.
    """
    size = path.stat().st_size
    if series.dataoffset is not None:
        if series.dataoffset + series.nbytes > size:
            raise damaged(path, f"{series.nbytes} bytes of pixels should follow byte {series.dataoffset} of {size}")
        return
    with path.open("rb") as file:
        page = series.keyframe
        for plane in series.pages:
            parts = zip(plane.dataoffsets, plane.databytecounts, _part_sizes(page), strict=True)
            for offset, length, (minimum, maximum) in parts:
                if not 0 < offset <= size - length:
                    raise damaged(path, "a part of it lies beyond its end")
                if page.compression in DEFLATE:
                    file.seek(offset)
                    length = len(zlib.decompressobj().decompress(file.read(length), maximum + 1))
                    if length > maximum:
                        raise damaged(path, "a part of it is longer than its header states")
                if page.compression in (1, *DEFLATE) and length < minimum:
                    raise damaged(path, f"a part of it has {length} of {minimum} bytes")


def _part_sizes(page: Any) -> Iterator[tuple[int, int]]:
    """Yield the (minimum, maximum) number of bytes of each decompressed strip or tile."""
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    pixel = page.dtype.itemsize * (page.samplesperpixel // planes)
    if page.is_tiled:
        tile = page.tilelength * page.tilewidth * pixel
        count = -(-page.imagelength // page.tilelength) * -(-page.imagewidth // page.tilewidth)
        yield from [(tile, tile)] * (count * planes)
        return
    rows = min(page.rowsperstrip, page.imagelength)
    for _ in range(planes):
        for first in range(0, page.imagelength, rows):
            minimum = min(rows, page.imagelength - first) * page.imagewidth * pixel
            yield minimum, rows * page.imagewidth * pixel
