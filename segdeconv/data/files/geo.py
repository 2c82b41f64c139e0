"""Georeferences: where the pixels of an image lie on the Earth, and the GeoTIFF files that keep it.

The tags of a TIFF and world files are read without further libraries. Coordinate reference systems (CRS), pixels
without data, rasters larger than memory and writing need rasterio, in the extra `geo`; only this module imports it.

GeoTIFF, OGC 19-008r4, https://docs.ogc.org/is/19-008r4/19-008r4.html; the tags GDAL_METADATA and GDAL_NODATA,
https://gdal.org/en/stable/drivers/raster/gtiff.html
"""

import html
import importlib.util
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from segdeconv.data.files.decoding import (
    ORIENTATION,
    TIFF,
    damaged,
    first_bytes,
    only_series,
    require_size,
    silenced,
    valid_orientation,
)
from segdeconv.data.files.stored_file import StoredFile
from segdeconv.errors import UsageError, warn
from segdeconv.system.files import replace_text, replacing_path

INSTALL = "pip install 'segdeconv[geo]'"
BLOCK = 256  # pixels of the sides of the tiles of the written files
ROWS = 4 * BLOCK  # rows that are read or written at once
SCALE, TIEPOINT, MATRIX = 33550, 33922, 34264  # TIFF tags of the transform
METADATA, NODATA = 42112, 42113  # GDAL's TIFF tags
READ_TAGS = (SCALE, TIEPOINT, MATRIX, METADATA, NODATA, ORIENTATION)
MAX_METADATA = 1 << 20  # characters of GDAL_METADATA that are searched for band names
MAX_TEXT = 1 << 16  # bytes of a world file or a .prj
PIXEL_IS_POINT = 2
USER_DEFINED = 32767
BAND_NAME = re.compile(r'<Item name="DESCRIPTION" sample="(\d{1,5})"[^>]*>([^<]{0,200})</Item>')
# GDAL reads and writes no files besides the one that is opened, and holds few of its tiles.
SETTINGS = {"GDAL_PAM_ENABLED": False, "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR", "GDAL_CACHEMAX": 256}  # MB
UNALIKE = 0.5  # pixels by which an image and its mask may be apart

# Map x = a * column + b * row + c, map y = d * column + e * row + f, of the corner of a pixel.
Transform = tuple[float, float, float, float, float, float]
Part = tuple[tuple[int, int], tuple[int, int]]  # rows, columns


class Tags(NamedTuple):
    """Georeference, nodata value and bands in the tags of a TIFF, read without rasterio.

    Attributes:
        transform: From pixel corners to map coordinates; None if the file has none.
        crs: A number that two files of one CRS share: its EPSG code; None if the file has no such code.
        nodata: The value of pixels without data; None if the file states none.
        bands: The name of each band that has one, by its index.
        orientation: EXIF orientation, 1..8.
        bits: Bits of each channel of a TIFF.
    """

    transform: Transform | None = None
    crs: int | None = None
    nodata: float | None = None
    bands: Mapping[int, str] = MappingProxyType({})
    orientation: int = 1
    bits: int = 8


@dataclass(frozen=True)
class Georeference:
    """Where an image lies on the Earth.

    Attributes:
        transform: From pixel corners to map coordinates.
        crs: The coordinate reference system as WKT; None if it is missing or unreadable.
        located: Whether it relates map coordinates to the Earth; a local one does not.
        authority: The name of the CRS in a register, such as ("EPSG", "25832"), if it has one.
        pixel_area: Area of a pixel in square metres; None if the CRS is not projected, has no known unit, or is a
            Mercator projection, whose scale depends on the latitude.
    """

    transform: Transform
    crs: str | None = None
    located: bool = False
    authority: tuple[str, str] | None = None
    pixel_area: float | None = None

    def to_map(self, corners: np.ndarray) -> np.ndarray:
        """Return the (n, 2) float64 map coordinates of (n, 2) pixel corners (x, y)."""
        a, b, c, d, e, f = self.transform
        x, y = np.asarray(corners, dtype=np.float64).T
        return np.stack([a * x + b * y + c, d * x + e * y + f], axis=1)

    def to_wgs84(self, points: np.ndarray) -> np.ndarray:
        """Return the (n, 2) longitudes and latitudes in degrees of (n, 2) map coordinates.

        Raises:
            UsageError: The CRS is not defined there.
        """
        from rasterio.crs import CRS
        from rasterio.warp import transform

        try:
            with _environment():
                source, target = CRS.from_wkt(self.crs), CRS.from_string("OGC:CRS84")
                longitudes, latitudes = transform(source, target, *points.T)
        except Exception as error:  # rasterio raises GDAL's errors, which have no public class
            raise UsageError(
                f"map coordinates cannot be converted to longitudes and latitudes ({error}) - write their polygons in "
                "the CRS of the image: --polygon-format gpkg"
            ) from error
        return np.stack([longitudes, latitudes], axis=1)


def has_rasterio() -> bool:
    """Return whether rasterio is installed."""
    return importlib.util.find_spec("rasterio") is not None


def is_raster(path: Path) -> bool:
    """Return whether the predictions of an image are written as GeoTIFFs: it is georeferenced, and rasterio there."""
    return has_rasterio() and read_transform(path) is not None


def warn_without_georeference(paths: Iterable[Path]) -> None:
    """Print a warning that counts the images whose georeference is lost.

    It is lost if rasterio is not installed, and for stored files, of which all TIFFs are counted.
    """
    paths = list(paths)
    stored = [path for path in paths if isinstance(path, StoredFile) and path.suffix.lower() in (".tif", ".tiff")]
    if stored:
        warn(
            f"{len(stored)} image{'s are TIFFs' if stored[1:] else ' is a TIFF'} in an object storage or in shards, "
            f"such as {stored[0]}: a georeference is not read there, and masks become PNG files - copy the images to "
            "this machine if they are georeferenced"
        )
    if has_rasterio():
        return
    located = [path for path in paths if read_transform(path) is not None]
    if located:
        warn(
            f"{len(located)} image{'s are' if located[1:] else ' is'} georeferenced, such as {located[0]}, and "
            "rasterio is not installed: masks become PNG files without CRS, transform and nodata, and polygons are in "
            f"pixels - {INSTALL}, and run the same command again"
        )


# Reading without rasterio


def read_tags(path: Path) -> Tags:
    """Return what the tags of a TIFF say about its pixels; nothing for another file, or one that cannot be read."""
    try:
        state = path.stat()
        return _read_tags(path, state.st_mtime_ns, state.st_size)
    except (OSError, UsageError):
        return Tags()


@lru_cache(maxsize=4096)
def _read_tags(path: Path, changed: int, size: int) -> Tags:
    return _tiff_tags(path) if first_bytes(path)[:4] in TIFF else Tags()


def read_transform(path: Path) -> Transform | None:
    """Return the transform of an image file, or that of the world file beside it; None for a stored file."""
    if isinstance(path, StoredFile):  # every one of them would be fetched before the first is predicted
        return None
    return read_tags(path).transform or _world_file(path)


def _tiff_tags(path: Path) -> Tags:
    import tifffile

    try:
        with silenced("tifffile"), path.open("rb") as stream, tifffile.TiffFile(stream) as file:
            page = only_series(path, file).keyframe
            values = {
                code: page.tags.valueof(code) for code in (SCALE, TIEPOINT, MATRIX, METADATA, NODATA, ORIENTATION)
            }
            bits, keys = int(page.bitspersample), page.geotiff_tags or {}
            codes = [int(keys.get(key, 0)) for key in ("ProjectedCSTypeGeoKey", "GeographicTypeGeoKey")]
            transform = _tag_transform(values, int(keys.get("GTRasterTypeGeoKey", 1)) == PIXEL_IS_POINT)
    except Exception:  # tifffile raises many types for a damaged file, and reading the pixels says what is wrong
        return Tags()
    return Tags(
        transform,
        next((code for code in codes if 0 < code < USER_DEFINED), None),
        _number(values[NODATA]),
        {
            int(index): " ".join(html.unescape(name).split())
            for index, name in BAND_NAME.findall(str(values[METADATA] or "")[:MAX_METADATA])
        },
        valid_orientation(values[ORIENTATION]),
        bits,
    )


def _tag_transform(values: Mapping[int, Any], pixel_is_point: bool) -> Transform | None:
    """Return the transform of GeoTIFF tags; None without, and for ground control points, which need warping."""
    scale, tiepoint, matrix = (
        tuple(map(float, values[code])) if isinstance(values[code], tuple) else () for code in (SCALE, TIEPOINT, MATRIX)
    )
    if len(matrix) == 16:
        a, b, _, c, d, e, _, f = matrix[:8]
    elif len(scale) >= 2 and len(tiepoint) == 6:
        (a, e), b, d = (scale[0], -scale[1]), 0.0, 0.0
        c, f = tiepoint[3] - tiepoint[0] * a, tiepoint[4] - tiepoint[1] * e
    else:
        return None
    half = 0.5 if pixel_is_point else 0
    return _valid((a, b, c - half * (a + b), d, e, f - half * (d + e)))


def _valid(transform: Transform) -> Transform | None:
    a, b, _, d, e, _ = transform
    return transform if all(map(math.isfinite, transform)) and a * e - b * d else None


def _number(text: object) -> float | None:
    try:
        return float(str(text).strip("\0 "))
    except ValueError:
        return None


def _world_file(path: Path) -> Transform | None:
    """Return the transform of the world file beside an image, https://en.wikipedia.org/wiki/World_file"""
    suffix = path.suffix[1:]
    endings = (f"{suffix[:1]}{suffix[-1:]}w", f"{suffix}w", "wld")
    text = _text_beside(path, [form for ending in endings for form in (ending, ending.upper(), ending.lower())])
    try:
        a, d, b, e, x, y = map(float, (text or "").replace(",", ".").split())
    except ValueError:
        return None
    return _valid((a, b, x - (a + b) / 2, d, e, y - (d + e) / 2))  # it states the centre of the first pixel


def _text_beside(path: Path, endings: Sequence[str]) -> str | None:
    for ending in endings:
        try:
            with path.with_suffix(f".{ending}").open("rb") as file:
                return file.read(MAX_TEXT).decode("utf-8-sig")
        except (OSError, ValueError):
            continue
    return None


def band_names(path: Path, channels: int) -> tuple[str, ...]:
    """Return the names of the channels of an image; none if its file names none of them."""
    names = read_tags(path).bands
    return tuple(names.get(index, f"band {index + 1}") for index in range(channels)) if names else ()


def describe_shift(image: Path, mask: Path) -> str | None:
    """Return how the georeferences of an image and its mask differ; None if they agree or one has none.

    Both have the same number of rows and columns.
    """
    ours, theirs = read_transform(image), read_transform(mask)
    if ours is None or theirs is None or ours == theirs:
        return None
    codes = read_tags(image).crs, read_tags(mask).crs
    if all(codes) and codes[0] != codes[1]:
        return f"mask {mask} is in EPSG:{codes[1]} and its image {image} in EPSG:{codes[0]}"
    a, b, c, d, e, f = ours
    determinant = a * e - b * d
    x, y = theirs[2] - c, theirs[5] - f
    columns, rows = (e * x - b * y) / determinant, (a * y - d * x) / determinant
    if math.hypot(columns, rows) > UNALIKE:
        shift = f"{round(columns, 2) + 0:g} columns and {round(rows, 2) + 0:g} rows"  # + 0 turns -0 into 0
        return f"mask {mask} is shifted by {shift} against its image {image}"
    sides = [(math.hypot(t[0], t[3]), math.hypot(t[1], t[4])) for t in (ours, theirs)]
    if any(abs(one / other - 1) > 1e-3 for one, other in zip(*sides, strict=True)):
        pixels = [f"{across:.6g} x {down:.6g}" for across, down in sides]
        return f"mask {mask} has pixels of {pixels[1]} map units and its image {image} of {pixels[0]}"
    return None


def nodata_pixels(path: Path, image: np.ndarray) -> np.ndarray | None:
    """Return the pixels of an image that have its nodata value in every channel.

    Args:
        path: The file.
        image: (H, W, C), as read.

    Returns:
        (H, W) bool; None if there are none, the file states no nodata value, or its numbers were converted.
    """
    tags = read_tags(path)
    if tags.nodata is None or tags.bits != 8 * image.dtype.itemsize or not tags.nodata.is_integer():
        return None
    if not 0 <= tags.nodata <= np.iinfo(image.dtype).max:
        return None
    pixels = (image == image.dtype.type(tags.nodata)).all(axis=2)
    return pixels if pixels.any() else None


# Reading with rasterio


def read_georeference(path: Path) -> Georeference | None:
    """Return where an image lies; None if it has no georeference, or rasterio is not installed."""
    transform = read_transform(path)
    if transform is None or not has_rasterio():
        return None
    import rasterio
    from rasterio.crs import CRS

    with _environment():
        crs = None
        try:
            if first_bytes(path)[:4] in TIFF:
                with rasterio.open(path, driver="GTiff") as file:
                    crs = file.crs
            if not crs and (text := _text_beside(path, ["prj", "PRJ"])):
                crs = CRS.from_wkt(text)
            if not crs:
                return Georeference(transform)
            a, b, _, d, e, _ = transform
            area = None
            if crs.is_projected and "+proj=merc" not in crs.to_proj4():
                unit = crs.linear_units_factor[1]
                area = abs(a * e - b * d) * unit**2 if unit else None
            located = crs.is_projected or crs.is_geographic
            return Georeference(transform, crs.to_wkt(), located, crs.to_authority(), area)
        except (rasterio.errors.RasterioError, rasterio.errors.CRSError):  # no CRS that GDAL understands
            return Georeference(transform)


def read_nodata(path: Path, nodata: np.ndarray, *, all_bands: bool) -> bool:
    """Find the pixels of a GeoTIFF that have no data.

    These are the pixels outside its transparency mask, those with its nodata value in every band, and those that are
    fully transparent and also black or white: an infrared band is often marked as alpha, and is 0 on water.

    Args:
        path: The file.
        nodata: (H, W) bool, False, in which they are set.
        all_bands: Every band is an image's; none is transparency, whatever the file says.

    Returns:
        Whether there are such pixels.
    """
    import rasterio
    from rasterio.enums import MaskFlags

    found = False
    if first_bytes(path)[:4] not in TIFF:
        return found
    with _environment(), rasterio.open(path, driver="GTiff") as file:
        flags = {flag for band in file.mask_flag_enums for flag in band}
        if flags == {MaskFlags.all_valid} or nodata.shape != file.shape:
            return found
        alpha = MaskFlags.alpha in flags
        if alpha and all_bands:
            return found
        for part in row_parts(file.shape):
            if alpha:
                pixels = file.read(window=_window(part))
                colours = pixels[:-1].reshape(len(pixels) - 1, -1)
                plain = ((colours == 0).all(axis=0)) | (colours == np.iinfo(pixels.dtype).max).all(axis=0)
                missing = (pixels[-1] == 0) & plain.reshape(pixels.shape[1:])
            else:
                missing = file.dataset_mask(window=_window(part)) == 0
            nodata[slice(*part[0]), slice(*part[1])] = missing
            found = found or bool(missing.any())
    return found


class RasterLayout(NamedTuple):
    """The pixels of a GeoTIFF that is read part by part.

    Attributes:
        size: (H, W).
        bands: Number of bands.
        rgb: Whether the first three bands are red, green and blue.
        dtype: uint8 or uint16.
    """

    size: tuple[int, int]
    bands: int
    rgb: bool
    dtype: np.dtype[Any]


def layout_for_parts(path: Path, max_pixels: int) -> RasterLayout | None:
    """Return the layout of a GeoTIFF whose stored numbers rasterio can read part by part.

    Returns:
        None if rasterio is not installed, or the file is of another kind: with a palette, rotated, or not of 8 or 16
        bit.

    Raises:
        UsageError: It has more than `max_pixels` pixels.
    """
    if not has_rasterio() or first_bytes(path)[:4] not in TIFF:
        return None
    import rasterio
    from rasterio.enums import ColorInterp

    try:
        with _environment(), rasterio.open(path, driver="GTiff") as file:
            require_size(path, file.width, file.height, max_pixels)
            inverted = file.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") is not None
            plain = (ColorInterp.gray, ColorInterp.red, ColorInterp.undefined)
            if inverted or file.colorinterp[0] not in plain or read_tags(path).orientation != 1:
                return None
            if len(set(file.dtypes)) > 1 or file.dtypes[0] not in ("uint8", "uint16"):
                return None
            rgb = file.colorinterp[:3] == (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
            return RasterLayout((file.height, file.width), file.count, rgb, np.dtype(file.dtypes[0]))
    except rasterio.errors.RasterioError:
        return None


def read_parts(path: Path, bands: int) -> Iterator[tuple[Part, np.ndarray]]:
    """Read the first bands of a GeoTIFF.

    Yields:
        Rows and columns of a part, and its (h, w, bands) stored numbers.

    Raises:
        UsageError: The file is damaged.
    """
    import rasterio

    try:
        with _environment(), rasterio.open(path, driver="GTiff") as file:
            for part in row_parts(file.shape):
                yield part, np.moveaxis(file.read(list(range(1, bands + 1)), window=_window(part)), 0, -1)
    except rasterio.errors.RasterioError as error:
        raise damaged(path, error) from error


# Writing with rasterio


@contextmanager
def geotiff(
    path: Path,
    shape: tuple[int, int, int],
    dtype: str,
    reference: Georeference,
    *,
    nodata: float | None = None,
    bands: Sequence[str] = (),
    colours: np.ndarray | None = None,
) -> Iterator[Any]:
    """Open a GeoTIFF in tiles of 256x256, compressed without loss, which appears once it is complete.

    Args:
        path: The file, ending in .tif.
        shape: (bands, H, W).
        dtype: Its type, such as "uint8".
        reference: Where it lies.
        nodata: The value of pixels without data.
        bands: Names of the bands.
        colours: (256, 3) uint8, the colour of each value; that of `nodata` is transparent.

    Yields:
        A function of the rows and columns of a part and its (bands, h, w) values. A part that is not aligned to the
        tiles is written correctly, but its tiles may be compressed twice and leave gaps in the file.
    """
    import rasterio
    from rasterio.crs import CRS

    count, height, width = shape
    options = {
        "compress": "deflate",
        "predictor": 3 if dtype.startswith("float") else 1,  # differences between labels have no meaning
        "tiled": True,
        "blockxsize": BLOCK,
        "blockysize": BLOCK,
        "interleave": "band",
        "BIGTIFF": "IF_SAFER",
        "transform": rasterio.Affine(*reference.transform),
        "nodata": nodata,
    }
    layout = {"count": count, "height": height, "width": width, "dtype": dtype}
    if count == 3 and dtype == "uint8":
        layout["photometric"] = "RGB"
    with replacing_path(path) as partial, _environment(), ExitStack() as stack:
        crs = CRS.from_wkt(reference.crs) if reference.crs else None
        file = stack.enter_context(rasterio.open(partial, "w", driver="GTiff", crs=crs, **layout, **options))
        if colours is not None:
            table = {index: (*map(int, colour), 255) for index, colour in enumerate(colours)}
            if nodata is not None:
                table[int(nodata)] = (*table[int(nodata)][:3], 0)
            file.write_colormap(1, table)
        for number, name in enumerate(bands, start=1):
            file.set_band_description(number, name)

        def write(rows: tuple[int, int], columns: tuple[int, int], values: np.ndarray) -> None:
            file.write(values.astype(dtype, copy=False), window=_window((rows, columns)))

        yield write


def write_raster(
    path: Path, values: np.ndarray, reference: Georeference, *, lookup: np.ndarray | None = None, **options: Any
) -> None:
    """Write an array as a GeoTIFF, one row of tiles at a time.

    Args:
        path: The file.
        values: (H, W) or (bands, H, W).
        reference: Where it lies.
        lookup: (256,) numbers or (256, 3) colours that are written in place of the uint8 values.
        **options: See `geotiff`.
    """
    bands = values if values.ndim == 3 else values[None]
    count = lookup.shape[1] if lookup is not None and lookup.ndim == 2 else len(bands)
    dtype = (values if lookup is None else lookup).dtype.name
    with geotiff(path, (count, bands.shape[1], bands.shape[2]), dtype, reference, **options) as write:
        for rows, columns in row_parts(bands.shape[1:]):
            part = bands[:, slice(*rows), slice(*columns)]
            if lookup is not None:
                part = lookup[part[0]][None] if lookup.ndim == 1 else np.moveaxis(lookup[part[0]], -1, 0)
            write(rows, columns, part)


def write_category_names(path: Path, names: Sequence[str]) -> None:
    """Write the names of the values 0, 1, 2, ... of a GeoTIFF as GDAL keeps them: beside it, in NAME.tif.aux.xml."""
    categories = "".join(f"      <Category>{escape(name)}</Category>\n" for name in names)
    replace_text(
        path,
        f'<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>\n{categories}    </CategoryNames>\n'
        "  </PAMRasterBand>\n</PAMDataset>\n",
    )


@contextmanager
def _environment() -> Iterator[None]:
    """Apply SETTINGS to GDAL, whose messages are those of its exceptions."""
    import rasterio

    with silenced("rasterio._env"), rasterio.Env(**SETTINGS):
        yield


def row_parts(size: tuple[int, ...]) -> Iterator[Part]:
    """Divide a raster into rows of tiles."""
    for top in range(0, size[0], ROWS):
        yield (top, min(size[0], top + ROWS)), (0, size[1])


def _window(part: Part) -> Any:
    from rasterio.windows import Window

    (top, bottom), (left, right) = part
    return Window(left, top, right - left, bottom - top)
