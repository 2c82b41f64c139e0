"""Reading of images with any number of channels, of 8 or 16 bits, exactly as they are stored."""

import importlib.util
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from segdeconv.data.files.decoding import (
    MAX_COLOUR_CHANNELS,
    NPY,
    ORIENTATION,
    PNG,
    TIFF,
    damaged,
    first_bytes,
    netpbm_maximum,
    only_series,
    open_image,
    read_array,
    require_size,
    several_images,
    silenced,
    valid_orientation,
)
from segdeconv.errors import UsageError

MODES = ("L", "LA", "RGB", "RGBA", "CMYK", "I;16")  # the modes in which Pillow returns the stored numbers
STACKED = "SCQI"  # tifffile's axis names: samples, channels, unknown, pages
DEFLATE = (8, 32946)
LOSSY = (6, 7, 34892, 50001)  # JPEG in three forms, WEBP
MIN_IS_WHITE, MIN_IS_BLACK, RGB, PALETTE = 0, 1, 2, 3  # photometric interpretations
ASSOCIATED = 1  # a kind of extra sample: alpha by which the colours are multiplied
ALPHA = (ASSOCIATED, 2)
IN_PLANES = 2  # planar configuration


def read_stored(path: Path, channels: int, *, max_pixels: int) -> tuple[np.ndarray, int]:
    """Read an image as it is stored, neither scaled nor converted.

    Formats are JPEG, PNG, BMP, WEBP and Netpbm; TIFF with any number of channels, interleaved, in planes or in pages;
    and .npy of shape (H, W) or (H, W, channels).

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
        tiff = _read_tiff(path, channels, max_pixels)
        image, orientation = tiff.image, tiff.orientation
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
    if (image.mode not in MODES and not (image.format == "PPM" and image.mode == "I")) or depth < 8:
        kind = {"P": "a palette, whose indices are not intensities", "1": "1 bit"}.get(image.mode, f"mode {image.mode}")
        raise UsageError(
            f"{path} has {kind if depth >= 8 else f'{depth} bit'} - save it with channels of 8 or 16 bit, or leave "
            "out dataset.channels to read it as RGB"
        )
    if depth == 16 and colour:
        return read_16_bit_colour(path, grey=colour == 4), orientation
    return unscaled_netpbm(path, image) if image.format == "PPM" else np.array(image), orientation


def unscaled_netpbm(path: Path, image: Image.Image) -> np.ndarray:
    """Return the stored numbers of a Netpbm image, which Pillow scales from 0..maximum to 0..255 or 0..65535.

    Raises:
        UsageError: They cannot be restored.
    """
    stored = np.array(image)
    maximum = netpbm_maximum(path)
    scale = 65535 if image.mode == "I" else 255
    if image.mode == "RGB" and maximum > 255:
        raise UsageError(f"{path} has colours of 0..{maximum} - save them as PNG or TIFF")
    if image.mode == "1":
        return stored
    if maximum != scale:
        stored = np.rint(stored * (maximum / scale))
    return stored.astype(np.uint8 if maximum < 256 else np.uint16)


def read_16_bit_colour(path: Path, *, grey: bool) -> np.ndarray:
    """Return (H, W, C) uint16. OpenCV repeats the grey channel of grey with alpha, so only one is kept."""
    image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16 or image.ndim != 3:
        raise damaged(path, "OpenCV cannot read its 16-bit colour")
    return np.ascontiguousarray(image[:, :, [0, 3] if grey else [2, 1, 0, 3][: image.shape[2]]])


# TIFF


class StoredTiff(NamedTuple):
    """A TIFF as it is stored.

    Attributes:
        image: (H, W, C) of the stored type.
        orientation: EXIF orientation, 1..8.
        palette: (256, 3) uint8, or None.
        alpha: True if the last channel is marked as alpha, or is the fourth of a colour image.
    """

    image: np.ndarray
    orientation: int
    palette: np.ndarray | None = None
    alpha: bool = False


def read_stored_tiff(path: Path, *, max_pixels: int) -> StoredTiff:
    """Read a mask from a TIFF: any integer or float type, of 1 bit or with a palette too.

    Raises:
        UsageError: The file cannot be read, or cannot hold labels; the message names the file.
    """
    return _read_tiff(path, None, max_pixels)


def read_tiff_image(path: Path, *, max_pixels: int) -> tuple[np.ndarray, int] | None:
    """Read a grey or RGB image from a TIFF, without the fourth channel.

    Returns:
        (H, W, 1 or 3) uint8 or uint16, and the EXIF orientation, 1..8; or None if the colours have to be converted, or
        the file is one that only Pillow may be able to read.

    Raises:
        UsageError: The image is too large, or has a type or a number of channels that no image has.
    """
    import tifffile

    try:
        with silenced("tifffile"), path.open("rb") as stream, tifffile.TiffFile(stream) as file:
            series = only_series(path, file)
            page = series.keyframe
            if series.dtype is not None and series.dtype.kind in "iuf" and series.dtype not in (np.uint8, np.uint16):
                kind = "is a float image" if series.dtype.kind == "f" else f"holds {series.dtype}"
                raise UsageError(f"{path} {kind} - convert it to 8 or 16 bit, unsigned")
            grey = page.photometric == MIN_IS_BLACK
            if not (grey or page.photometric == RGB) or page.bitspersample not in (8, 16):
                return None
            axes, shape = _layout(path, series, 1)
            require_size(path, shape[1], shape[0], max_pixels)
            _require_colour(path, page, shape[2])
            in_planes = page.planarconfig == IN_PLANES and shape[2] > 1
            if missing := _missing_codec(tifffile, page):
                if in_planes and page.extrasamples[:1] == (ASSOCIATED,):  # Pillow would divide by this channel
                    raise _needs_codec(path, missing)
                return None
            if in_planes:  # Pillow would read some of them wrongly
                _require_whole(path, series)
            elif not _is_whole(path, series):
                return None
            image = series.asarray(squeeze=False, maxworkers=1).transpose(axes).reshape(shape)
            return image[:, :, : 1 if grey else 3], valid_orientation(page.tags.valueof(ORIENTATION))
    except (UsageError, MemoryError):
        raise
    except Exception:  # tifffile raises many types for a damaged file, and Pillow says what is wrong with it
        return None


def _is_whole(path: Path, series: Any) -> bool:
    try:
        _require_whole(path, series)
    except UsageError:
        return False
    return True


def _require_colour(path: Path, page: Any, channels: int) -> None:
    if channels != page.samplesperpixel and channels > 1:
        raise several_images(path, channels)
    grey = page.photometric == MIN_IS_BLACK
    if channels > MAX_COLOUR_CHANNELS or (grey and channels > 1 and not _has_alpha(page, channels)):
        rule = " but is not a colour image" if channels <= MAX_COLOUR_CHANNELS else ""
        raise UsageError(
            f"{path} has {channels} channels{rule} - set dataset.channels={channels} to read them as they are stored"
        )


def _has_alpha(page: Any, channels: int) -> bool:
    """Return True if the last channel is the fourth of a colour image, or marked as the alpha of a grey one."""
    if page.photometric == RGB:
        return channels == 4
    return channels == 2 and tuple(page.extrasamples)[-1:] in [(kind,) for kind in ALPHA]


def _read_tiff(path: Path, channels: int | None, max_pixels: int) -> StoredTiff:
    """Read a TIFF of a number of channels, or a mask if that is None."""
    import tifffile

    try:
        with silenced("tifffile"), path.open("rb") as stream, tifffile.TiffFile(stream) as file:
            series = only_series(path, file)
            page = series.keyframe
            if channels is None:
                _require_mask(path, series)
            else:
                _require_intensities(path, series)
            axes, shape = _layout(path, series, 1 if channels is None else channels)
            require_size(path, shape[1], shape[0], max_pixels)
            if channels is not None:
                _require_channels(path, shape[2], series.dtype, channels)
            elif shape[2] != page.samplesperpixel:
                raise several_images(path, shape[2])
            missing = _missing_codec(tifffile, page)
            if not missing:
                _require_whole(path, series)
                try:
                    image = series.asarray(squeeze=False, maxworkers=1).transpose(axes)
                    image = np.ascontiguousarray(image).reshape(shape)
                except ImportError:  # of compression.zstd, which Python has since 3.14
                    missing = page.compression.name
            if missing:
                image = _read_tiff_with_pillow(path, shape, page, missing, max_pixels)
            orientation = valid_orientation(page.tags.valueof(ORIENTATION))
            if channels is not None:
                return StoredTiff(image, orientation)
            if page.photometric == MIN_IS_WHITE and page.bitspersample <= 8 and page.dtype.kind in "bu":
                image = ((1 << page.bitspersample) - 1 - image).astype(np.uint8)  # as viewers and Pillow show it
            return StoredTiff(image, orientation, _tiff_palette(page), _has_alpha(page, shape[2]))
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # tifffile raises many types for a damaged file
        raise damaged(path, error) from error


def _require_intensities(path: Path, series: Any) -> None:
    if series.dtype not in (np.uint8, np.uint16):
        raise UsageError(f"{path} holds {series.dtype} - save it as uint8 or uint16")
    if series.keyframe.photometric == PALETTE:
        raise UsageError(f"{path} has a palette, whose indices are not intensities - save it as channels")


def _require_mask(path: Path, series: Any) -> None:
    if series.keyframe.compression in LOSSY:
        kind = series.keyframe.compression.name
        raise UsageError(f"mask {path} is compressed with {kind}, which changes labels - save masks as PNG")
    if series.dtype is None or series.dtype.kind not in "biuf":
        raise UsageError(f"mask {path} holds {series.dtype} - save integer labels")
    if series.keyframe.photometric > PALETTE:  # CMYK, YCbCr, Lab
        raise UsageError(
            f"mask {path} has colour mode {series.keyframe.photometric.name} - save masks as one channel of labels or "
            "as RGB colours"
        )


def _tiff_palette(page: Any) -> np.ndarray | None:
    """Return the (256, 3) uint8 colours of a palette, which TIFF stores in 16 bits."""
    if page.photometric != PALETTE or page.colormap is None:
        return None
    stored = np.asarray(page.colormap)[:, :256]  # (3, 2 to the number of bits)
    colours = np.zeros((256, 3), np.uint8)
    colours[: stored.shape[1]] = (stored if stored.max() < 256 else stored >> 8).T
    return colours


def _layout(path: Path, series: Any, channels: int) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """Return the order of axes that puts rows first, then columns, then channels, and the resulting (H, W, C)."""
    axes, lengths = series.get_axes(squeeze=False), series.get_shape(squeeze=False)
    long = [axis for axis, name in enumerate(axes) if name not in "YX" and lengths[axis] > 1]
    flat = axes.count("Y") == axes.count("X") == 1
    if len(long) > 1 and (pages := lengths[axes.index("I")] if "I" in axes else 1) > 1:
        raise several_images(path, pages)
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
    """Return the compression, predictor or number of bits for which the package imagecodecs is missing, or None."""
    if page.bitspersample not in (1, 8, 16, 32, 64) and importlib.util.find_spec("imagecodecs") is None:
        return f"{page.bitspersample} bits a channel"
    for kinds, kind in (
        (tifffile.TIFF.DECOMPRESSORS, page.compression),
        (tifffile.TIFF.UNPREDICTORS, page.predictor),
    ):
        try:
            kinds[kind]
        except KeyError:
            return str(getattr(kind, "name", kind))
    return None


def _needs_codec(path: Path, codec: str) -> UsageError:
    return UsageError(
        f"{path} is compressed with {codec} - pip install imagecodecs, or save it uncompressed or with deflate"
    )


def _read_tiff_with_pillow(
    path: Path, shape: tuple[int, int, int], page: Any, codec: str, max_pixels: int
) -> np.ndarray:
    """Read (H, W, C) of a TIFF with Pillow, which supports more compressions but fewer layouts."""
    try:
        image, _ = open_image(path, max_pixels)
    except UsageError as error:
        raise _needs_codec(path, codec) from error
    array, bits, dtype = np.array(image), page.bitspersample, page.dtype
    if image.mode not in (*MODES, "1", "P", "PA", "I", "I;16B", "F") or array.size != np.prod(shape):
        raise _needs_codec(path, codec)
    if array.dtype.itemsize < dtype.itemsize or (array.dtype.kind == "f") != (dtype.kind == "f"):
        raise _needs_codec(path, codec)
    if page.photometric == MIN_IS_WHITE and image.mode in ("1", "L"):
        array = ~array  # Pillow inverts these two modes
    if image.mode == "L" and bits < 8:
        array //= 255 // ((1 << bits) - 1)  # Pillow scales them to 8 bits
    same = array.dtype.itemsize == dtype.itemsize  # Pillow reads uint32 as the same bits of int32
    return (array.view(dtype) if same and array.dtype.isnative else array.astype(dtype)).reshape(shape)


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
    samples = page.samplesperpixel // planes
    if page.is_tiled:
        tile = page.tilelength * _row_size(page, page.tilewidth * samples)
        count = -(-page.imagelength // page.tilelength) * -(-page.imagewidth // page.tilewidth)
        yield from [(tile, tile)] * (count * planes)
        return
    rows, size = min(page.rowsperstrip, page.imagelength), _row_size(page, page.imagewidth * samples)
    for _ in range(planes):
        for first in range(0, page.imagelength, rows):
            yield min(rows, page.imagelength - first) * size, rows * size


def _row_size(page: Any, samples: int) -> int:
    """Return the number of bytes of one row of a strip or tile; rows of less than 8 bits a sample are padded."""
    return -(-samples * page.bitspersample // 8) if page.bitspersample < 8 else samples * int(page.dtype.itemsize)
