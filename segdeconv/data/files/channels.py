"""Images of any number of channels, 8 or 16 bit, exactly as a file stores them."""

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
    open_picture,
    read_array,
    require_size,
    valid_orientation,
)
from segdeconv.errors import UsageError

PNG = b"\x89PNG\r\n\x1a\n"
MODES = ("L", "LA", "RGB", "RGBA", "CMYK", "I;16")  # in which Pillow gives what is stored
STACKED = "SCQI"  # what tifffile calls an axis of samples, of channels, of nothing said, of pages
DEFLATE = (8, 32946)


def read_stored(path: Path, channels: int, *, max_pixels: int) -> tuple[np.ndarray, int]:
    """((H, W, channels) uint8 or uint16 as stored, neither scaled nor converted; the EXIF orientation).

    JPEG, PNG, BMP and WEBP; TIFF of any number of channels, interleaved, in planes or in pages; .npy of (H, W) or
    (H, W, channels). Raises UsageError naming the file, also if it has another number of channels.
    """
    start = first_bytes(path)
    if start.startswith(NPY):
        image, stored = read_array(path, max_pixels), 1
        if image.ndim == 3 and image.shape[0] == channels != image.shape[2]:
            raise UsageError(f"{path} has shape {image.shape}, channels first - save np.moveaxis(array, 0, -1)")
        _require_channels(path, image.shape[2] if image.ndim == 3 else 1, image.dtype, channels)
    elif start[:4] in TIFF:
        image, stored = _read_tiff(path, channels, max_pixels)
    else:
        image, stored = _read_picture(path, start, max_pixels)
        _require_channels(path, image.shape[2] if image.ndim == 3 else 1, image.dtype, channels)
    return image.reshape(*image.shape[:2], channels), stored


def _require_channels(path: Path, found: int, dtype: np.dtype[Any], channels: int) -> None:
    if found != channels:
        raise UsageError(
            f"{path} has {found} channel{'s' if found > 1 else ''} of {8 * dtype.itemsize} bit and dataset.channels is "
            f"{channels} - give the number that all images have; nothing is converted"
        )


def _read_picture(path: Path, start: bytes, max_pixels: int) -> tuple[np.ndarray, int]:
    """What Pillow opens. It also decodes, and so checks, the one kind it cannot give: PNG colour of 16 bit."""
    image, stored = open_picture(path, max_pixels)
    depth, colour = (start[24], start[25]) if start.startswith(PNG) else (8, 0)
    if image.mode not in MODES or depth < 8:
        what = {"P": "a palette, whose numbers measure nothing", "1": "1 bit"}.get(image.mode, f"mode {image.mode}")
        raise UsageError(
            f"{path} has {what if depth >= 8 else f'{depth} bit'} - save it with channels of 8 or 16 bit, or leave "
            "dataset.channels out to read it as RGB"
        )
    if depth == 16 and colour:
        return _read_16_bit_colour(path, grey=colour == 4), stored
    return np.array(image), stored


def _read_16_bit_colour(path: Path, *, grey: bool) -> np.ndarray:
    """(H, W, C) uint16; of grey with alpha, OpenCV repeats the grey."""
    image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16 or image.ndim != 3:
        raise damaged(path, "16-bit colour that OpenCV does not read")
    return np.ascontiguousarray(image[:, :, [0, 3] if grey else [2, 1, 0, 3][: image.shape[2]]])


# TIFF


def _read_tiff(path: Path, channels: int, max_pixels: int) -> tuple[np.ndarray, int]:
    import tifffile

    try:
        with _silenced("tifffile"), tifffile.TiffFile(path) as file:
            pictures = [series for series in file.series if not series.keyframe.is_reduced]  # overviews are
            if len(pictures) != 1:
                raise UsageError(f"{path} holds {len(pictures)} pictures - extract the one that is meant")
            series, page = pictures[0], pictures[0].keyframe
            places, shape = _layout(path, series, channels)
            require_size(path, shape[1], shape[0], max_pixels)
            _require_channels(path, shape[2], series.dtype, channels)
            stored = valid_orientation(page.tags.valueof(ORIENTATION))
            missing = _missing_codec(tifffile, page)
            if missing:
                return _read_with_pillow(path, channels, missing, max_pixels)
            _require_whole(path, series)
            image = series.asarray(squeeze=False, maxworkers=1).transpose(places)
            return np.ascontiguousarray(image).reshape(shape), stored
    except UsageError:
        raise
    except Exception as error:  # tifffile raises many types for a damaged file
        raise damaged(path, error) from error


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Drop what this thread logs meanwhile: what is wrong with a file our own error says."""
    logger, thread = logging.getLogger(name), threading.get_ident()

    def of_another(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(of_another)
    try:
        yield
    finally:
        logger.removeFilter(of_another)


def _layout(path: Path, series: Any, channels: int) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """(where each axis goes so that rows come first, then columns, then channels; the (H, W, C) that this gives)."""
    axes, lengths = series.get_axes(squeeze=False), series.get_shape(squeeze=False)
    if series.dtype not in (np.uint8, np.uint16):
        raise UsageError(f"{path} holds {series.dtype} - save it as uint8 or uint16")
    if series.keyframe.photometric == 3:
        raise UsageError(f"{path} has a palette, whose numbers measure nothing - save it as channels")
    long = [place for place, name in enumerate(axes) if name not in "YX" and lengths[place] > 1]
    flat = axes.count("Y") == axes.count("X") == 1
    if not flat or len(long) > 1 or not {axes[place] for place in long} <= set(STACKED):
        raise UsageError(f"{path} has axes {axes} of {lengths} - save it as rows, columns and channels")
    row, column = axes.index("Y"), axes.index("X")
    if long and axes[long[0]] == "Q" and lengths[long[0]] != channels == lengths[column]:
        # An (H, W, C) array that was saved with nothing said: tifffile has taken its rows for pages.
        row, column, long = long[0], row, [column]
    others = [place for place in range(len(axes)) if place not in (row, column, *long)]
    return (
        (*others, row, column, *long),
        (lengths[row], lengths[column], lengths[long[0]] if long else 1),
    )


def _missing_codec(tifffile: Any, page: Any) -> str | None:
    """The compression or predictor that needs the package imagecodecs, which is not installed."""
    for kinds, kind in (
        (tifffile.TIFF.DECOMPRESSORS, page.compression),
        (tifffile.TIFF.UNPREDICTORS, page.predictor),
    ):
        try:
            kinds[kind]
        except KeyError:
            return str(getattr(kind, "name", kind))
    return None


def _read_with_pillow(path: Path, channels: int, codec: str, max_pixels: int) -> tuple[np.ndarray, int]:
    """Pillow knows more compressions and fewer kinds of picture."""
    way_out = f"{path} is packed with {codec} - pip install imagecodecs, or save it uncompressed or with deflate"
    try:
        image, stored = open_picture(path, max_pixels)
    except UsageError as error:
        raise UsageError(way_out) from error
    array = np.array(image)
    if image.mode not in MODES or array.size != array.shape[0] * array.shape[1] * channels:
        raise UsageError(way_out)
    return array, stored


def _require_whole(path: Path, series: Any) -> None:
    """Every piece of the picture lies in the file and is as long as it must be.

    tifffile fills what is missing with zeros, and unpacks whatever length a piece turns out to have.
    """
    size = path.stat().st_size
    if series.dataoffset is not None:
        if series.dataoffset + series.nbytes > size:
            raise damaged(path, f"{series.nbytes} bytes of pixels should follow byte {series.dataoffset} of {size}")
        return
    with path.open("rb") as file:
        page = series.keyframe
        for plane in series.pages:
            pieces = zip(plane.dataoffsets, plane.databytecounts, _needed(page), strict=True)
            for offset, length, (least, most) in pieces:
                if not 0 < offset <= size - length:
                    raise damaged(path, "a part of it lies beyond its end")
                if page.compression in DEFLATE:
                    file.seek(offset)
                    length = len(zlib.decompressobj().decompress(file.read(length), most + 1))
                    if length > most:
                        raise damaged(path, "a part of it is longer than it says")
                if page.compression in (1, *DEFLATE) and length < least:
                    raise damaged(path, f"a part of it has {length} of {least} bytes")


def _needed(page: Any) -> Iterator[tuple[int, int]]:
    """(least, most) bytes of each strip or tile when it is unpacked."""
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
            least = min(rows, page.imagelength - first) * page.imagewidth * pixel
            yield least, rows * page.imagewidth * pixel
