"""Georeferenced rasters: pixels without data, rasters larger than memory, and masks as GeoTIFF."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from segdeconv.classes import Classes
from segdeconv.data.files.geo import (
    Georeference,
    Part,
    geotiff,
    layout_for_parts,
    read_nodata,
    read_parts,
    row_parts,
    write_category_names,
    write_raster,
)
from segdeconv.data.files.reading import turned_view
from segdeconv.drawing import draw
from segdeconv.system.files import scratch_array

NAMES = ".aux.xml"  # ending of the file of class names beside a GeoTIFF


def save_mask(
    mask: np.ndarray, classes: Classes, path: Path, reference: Georeference, *, labels: draw.Labels = "index"
) -> list[Path]:
    """Write a mask as a GeoTIFF with the class colours, and the class names beside it.

    Args:
        mask: (H, W) uint8 class indices; `classes.ignore_index` where there is no data.
        classes: The classes and their colours.
        path: The file.
        reference: Where it lies.
        labels: See `draw.save_mask`.

    Returns:
        The files written.
    """
    if labels == "dataset" and classes.by_colour:
        write_raster(path, mask, reference, lookup=classes.palette)
        return [path]
    table = draw.label_table(classes) if labels == "dataset" else np.arange(256, dtype=np.uint16)
    table = table.astype(np.uint8) if table.max() <= 255 else table
    colours = None
    if table.dtype == np.uint8:
        colours = np.zeros((256, 3), dtype=np.uint8)
        colours[table] = classes.palette
        colours[table[: len(classes)]] = classes.palette[: len(classes)]
    nodata = int(table[classes.ignore_index])
    write_raster(path, mask, reference, lookup=table, nodata=nodata, bands=("class",), colours=colours)
    names = [""] * (1 + int(table[: len(classes)].max()))
    for index, name in enumerate(classes.names):
        names[table[index]] = name
    names_path = path.with_name(f"{path.name}{NAMES}")
    write_category_names(names_path, names)
    return [path, names_path]


def read_large(path: Path, channels: int | None, limit: int, max_pixels: int, scratch: Path) -> np.ndarray | None:
    """Read a GeoTIFF of at least `limit` pixels part by part into a file that is mapped into memory.

    Args:
        path: The image file.
        channels: See `reading.read_image`, with which the pixels agree.
        limit: The smallest number of pixels that is read so.
        max_pixels: Largest number of pixels.
        scratch: Folder of the file.

    Returns:
        (H, W, channels); None for another image, which is to be read as usual.

    Raises:
        UsageError: The file is damaged, or has more than `max_pixels` pixels.
    """
    layout = layout_for_parts(path, max_pixels)
    if layout is None or layout.size[0] * layout.size[1] < limit:
        return None
    if channels is None:
        if layout.bands > 4 or (layout.bands != 1 and not layout.rgb):
            return None
        bands = 3 if layout.rgb else 1
        image = scratch_array((*layout.size, 3), np.uint8, scratch)
    else:
        if layout.bands != channels:
            return None
        bands = channels
        image = scratch_array((*layout.size, channels), layout.dtype, scratch)
    for (rows, columns), part in read_parts(path, bands):
        if channels is None and layout.dtype == np.uint16:
            part = part // 257 if bands == 1 else part >> 8  # as the other images are scaled
        image[slice(*rows), slice(*columns)] = part
    return image


def find_nodata(path: Path, size: tuple[int, int], *, all_bands: bool, scratch: Path | None) -> np.ndarray | None:
    """Return the pixels of a georeferenced image that have no data, (H, W) bool as stored; None if all have.

    Args:
        path: The image file.
        size: (H, W) as stored.
        all_bands: See `geo.read_nodata`.
        scratch: Folder for the result of a raster too large for the memory.
    """
    nodata = np.zeros(size, dtype=bool) if scratch is None else scratch_array(size, bool, scratch)
    return nodata if read_nodata(path, nodata, all_bands=all_bands) else None


def save_map(values: np.ndarray, nodata: np.ndarray, path: Path, reference: Georeference) -> None:
    """Write (H, W) values as a float32 GeoTIFF, NaN where (H, W) bool `nodata` is True."""
    with geotiff(path, (1, *values.shape), "float32", reference, nodata=np.nan) as write:
        for rows, columns in row_parts(values.shape):
            part = slice(*rows), slice(*columns)
            write(rows, columns, np.where(nodata[part], np.float32(np.nan), values[part])[None])


@contextmanager
def probabilities(
    path: Path,
    shape: tuple[int, int, int],
    reference: Georeference,
    *,
    names: Sequence[str],
    nodata: np.ndarray | None,
    orientation: int,
) -> Iterator[Callable[[Part, np.ndarray], None]]:
    """Open a float32 GeoTIFF of the probabilities of an image and yield a function that writes those of one part.

    Args:
        path: The file.
        shape: (classes, H, W) of the image as stored.
        reference: Where it lies.
        names: Names of the classes.
        nodata: (H, W) bool, the pixels of the upright image without data, which become NaN; None if there are none.
        orientation: EXIF orientation of the image.
    """

    def without_nodata(part: Part, values: np.ndarray) -> np.ndarray:
        if nodata is None:
            return values
        return np.where(nodata[slice(*part[0]), slice(*part[1])], np.float32(np.nan), values)

    with geotiff(path, shape, "float32", reference, nodata=np.nan, bands=names) as write:
        if orientation == 1:
            yield lambda part, values: write(*part, without_nodata(part, values))
            return
        array = scratch_array(shape, np.float32, path.parent)
        write_part = part_writer(array, orientation)
        yield lambda part, values: write_part(part, without_nodata(part, values))
        for rows, columns in row_parts(shape[1:]):
            write(rows, columns, array[:, slice(*rows), slice(*columns)])


def part_writer(array: np.ndarray, orientation: int) -> Callable[[Part, np.ndarray], None]:
    """Return a function that writes (C, h, w) values of a part of the upright image into a (C, H, W) array as stored.

    Args:
        array: The array.
        orientation: EXIF orientation of the image.
    """

    def write_part(part: Part, values: np.ndarray) -> None:
        for channel, class_values in zip(array, values, strict=True):
            turned_view(channel, orientation)[slice(*part[0]), slice(*part[1])] = class_values

    return write_part
