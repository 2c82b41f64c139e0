"""Masks of every integer type and layout are read as they are stored, with their palette and alpha channel."""

from __future__ import annotations

import contextlib
import re
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from test_reading import RGB, refused

from segdeconv.data.files.reading import read_labels, read_stored_mask
from segdeconv.errors import UsageError

INTEGERS = [np.dtype(kind) for kind in ("?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")]
LABELS = np.random.default_rng(1).choice([0, 1, 2, 255], size=(48, 64))
TABLE = np.random.default_rng(2).integers(0, 256, (256, 3), dtype=np.uint8)


def extremes(dtype: np.dtype[Any]) -> np.ndarray:
    """Return labels with the smallest and the largest number of a type."""
    if dtype.kind == "b":
        return LABELS > 1
    labels = (LABELS % 100).astype(dtype)
    labels[0, :2] = np.iinfo(dtype).min, np.iinfo(dtype).max
    return labels


def assert_read(path: Path, expected: np.ndarray) -> None:
    mask = read_stored_mask(path)
    np.testing.assert_array_equal(mask.values, expected)
    assert mask.values.dtype.kind in "iu"
    assert mask.values.dtype.isnative
    assert mask.alpha is None


TIFFS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deflate": {"compression": "zlib", "rowsperstrip": 7},
    "differences": {"compression": "zlib", "predictor": True},
    "tiles": {"tile": (16, 16)},
    "deflated tiles": {"tile": (16, 16), "compression": "zlib"},
    "big endian": {"byteorder": ">"},
    "big tiff": {"bigtiff": True},
    "no metadata": {"metadata": None},
}


@pytest.mark.parametrize("name", TIFFS)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_a_tiff_of_any_integer_type_is_read(tmp_path: Path, dtype: np.dtype[Any], name: str) -> None:
    if name == "differences" and dtype not in ("u1", "i2", "u4"):
        return  # tifffile does not write it
    labels = extremes(dtype)
    tifffile.imwrite(tmp_path / "x.tif", labels, photometric="minisblack", **TIFFS[name])
    assert_read(tmp_path / "x.tif", labels)


@pytest.mark.parametrize(("order", "byteorder"), [("C", "<"), ("F", "<"), ("C", ">"), ("F", ">")])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_an_array_of_any_integer_type_is_read(tmp_path: Path, dtype: np.dtype[Any], order: str, byteorder: str) -> None:
    labels = extremes(dtype)
    np.save(tmp_path / "x.npy", np.array(labels, dtype.newbyteorder(byteorder), order=order))
    assert_read(tmp_path / "x.npy", labels)


@pytest.mark.parametrize("shape", [(48, 64, 1), (1, 48, 64)])
@pytest.mark.parametrize("suffix", ["tif", "npy"])
def test_an_axis_of_length_one_is_dropped(tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    labels = LABELS.astype(np.int32).reshape(shape)
    for path, write in ((tmp_path / f"x.{suffix}", tifffile.imwrite if suffix == "tif" else np.save),):
        write(path, labels)
        assert_read(path, LABELS)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 3), (1, 3)])
@pytest.mark.parametrize("suffix", ["tif", "npy", "png"])
def test_tiny_masks_are_read(tmp_path: Path, suffix: str, shape: tuple[int, int]) -> None:
    labels = LABELS[: shape[0], : shape[1]].astype(np.uint8)
    if suffix == "npy":
        np.save(tmp_path / "x.npy", labels)
    else:
        Image.fromarray(labels).save(tmp_path / f"x.{suffix}")
    assert_read(tmp_path / f"x.{suffix}", labels)


@pytest.mark.parametrize("mode", ["L", "I;16", "I", "I;16B"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_a_tiff_of_pillow_is_read_whatever_its_compression(tmp_path: Path, mode: str, compression: str | None) -> None:
    dtype = {"L": "u1", "I;16": "<u2", "I": "<i4", "I;16B": ">u2"}[mode]
    labels = extremes(np.dtype(dtype).newbyteorder("="))
    image = Image.frombytes(mode, (64, 48), labels.astype(dtype).tobytes())
    image.save(tmp_path / "x.tif", compression=compression)
    assert_read(tmp_path / "x.tif", labels)


def write_tiff(path: Path, rows: bytes, *, bits: int, kind: int = 1, lzw: bool) -> None:
    """Write a grey TIFF of 5x7 pixels, following its specification; LZW is compressed by Pillow."""
    if lzw:
        Image.frombytes("L", (len(rows), 1), rows).save(path, compression="tiff_lzw")
        with tifffile.TiffFile(path) as file:
            (start,), (length,) = file.pages[0].dataoffsets, file.pages[0].databytecounts
        rows = path.read_bytes()[start : start + length]
    tags = {256: 7, 257: 5, 258: bits, 259: 5 if lzw else 1, 262: 1, 273: 8, 277: 1, 278: 5, 279: len(rows), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    body = rows + bytes(len(rows) % 2)
    header = struct.pack("<2sHI", b"II", 42, 8 + len(body))
    path.write_bytes(header + body + struct.pack("<H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize("lzw", [False, True])
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "f4"])
def test_a_tiff_that_pillow_decompresses_keeps_its_type(tmp_path: Path, dtype: str, lzw: bool) -> None:
    """GDAL writes LZW; Pillow returns some types as another one, int8 as uint8 and uint32 as int32."""
    kind = np.dtype(dtype)
    labels = (extremes(kind) if kind.kind != "f" else LABELS.astype(kind))[:5, :7]
    code = {"u": 1, "i": 2, "f": 3}[kind.kind]
    write_tiff(tmp_path / "x.tif", labels.tobytes(), bits=8 * kind.itemsize, kind=code, lzw=lzw)
    assert_read(tmp_path / "x.tif", labels)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("lzw", [False, True])
def test_a_tiff_of_few_bits_gives_the_stored_numbers(tmp_path: Path, bits: int, lzw: bool) -> None:
    """GDAL writes it with NBITS; Pillow scales the numbers to 0..255."""
    labels = np.random.default_rng(0).integers(0, 1 << bits, (5, 7))
    padded = np.pad(labels, ((0, 0), (0, -(-7 * bits // 8) * 8 // bits - 7)))
    packed = (padded.reshape(5, -1, 8 // bits) << np.arange(8 - bits, -1, -bits)).sum(axis=2).astype(np.uint8)
    write_tiff(tmp_path / "x.tif", packed.tobytes(), bits=bits, lzw=lzw)
    assert_read(tmp_path / "x.tif", labels)


@pytest.mark.parametrize("compression", [None, "group4", "tiff_lzw"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_a_bilevel_tiff_is_0_and_1_as_viewers_show_it(
    tmp_path: Path, photometric: int, compression: str | None
) -> None:
    path = tmp_path / "x.tif"
    Image.fromarray(LABELS > 1).save(path, compression=compression, tiffinfo={262: photometric})
    with Image.open(path) as image:
        shown = np.array(image)
    assert_read(path, shown)


# Palettes


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "gif"])
@pytest.mark.parametrize("colours", [2, 5, 256])
def test_the_palette_of_a_mask_is_given_beside_its_indices(tmp_path: Path, suffix: str, colours: int) -> None:
    indices = np.random.default_rng(0).integers(0, colours, (48, 64), dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(TABLE[:colours].tobytes())
    image.save(tmp_path / f"x.{suffix}", **({"optimize": False} if suffix == "gif" else {}))
    mask = read_stored_mask(tmp_path / f"x.{suffix}")
    np.testing.assert_array_equal(mask.values, indices)
    assert (mask.palette.shape, mask.palette.dtype) == ((256, 3), np.uint8)
    np.testing.assert_array_equal(mask.palette[:colours], TABLE[:colours])


@pytest.mark.parametrize("compression", [None, "zlib", "tiff_lzw"])
@pytest.mark.parametrize("scale", [1, 257])
def test_the_colour_map_of_a_tiff_is_its_palette(tmp_path: Path, scale: int, compression: str | None) -> None:
    path, indices = tmp_path / "x.tif", LABELS.astype(np.uint8)
    if compression == "tiff_lzw":
        image = Image.fromarray(indices)
        image.putpalette(TABLE.tobytes())
        image.save(path, compression=compression)
    else:
        colour_map = TABLE.T.astype(np.uint16) * scale
        tifffile.imwrite(path, indices, photometric="palette", colormap=colour_map, compression=compression)
    mask = read_stored_mask(path)
    np.testing.assert_array_equal(mask.values, indices)
    np.testing.assert_array_equal(mask.palette, TABLE)


# Alpha


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_the_alpha_channel_is_given_beside_the_values(tmp_path: Path, mode: str, suffix: str) -> None:
    colours = RGB if mode == "RGBA" else RGB[:, :, 0]
    alpha = LABELS.astype(np.uint8)
    for transparency in (alpha, np.full_like(alpha, 255)):
        Image.fromarray(np.dstack([colours, transparency])).save(tmp_path / f"x.{suffix}")
        mask = read_stored_mask(tmp_path / f"x.{suffix}")
        np.testing.assert_array_equal(mask.values, colours)
        assert mask.palette is None
        if transparency is alpha:
            np.testing.assert_array_equal(mask.alpha, alpha)
        else:
            assert mask.alpha is None


def test_the_alpha_channel_of_a_palette_tiff_and_of_an_array(tmp_path: Path) -> None:
    alpha = LABELS.astype(np.uint8)
    image = Image.fromarray(np.dstack([alpha % 3, alpha]))
    Image.frombytes("PA", image.size, image.tobytes()).save(tmp_path / "x.tif")
    mask = read_stored_mask(tmp_path / "x.tif")
    np.testing.assert_array_equal(mask.values, alpha % 3)
    np.testing.assert_array_equal(mask.alpha, alpha)
    np.save(tmp_path / "x.npy", np.dstack([RGB, alpha]))
    mask = read_stored_mask(tmp_path / "x.npy")
    np.testing.assert_array_equal(mask.values, RGB)
    np.testing.assert_array_equal(mask.alpha, alpha)


# Colours


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_colours_in_an_array_are_read(tmp_path: Path, dtype: Any) -> None:
    np.save(tmp_path / "x.npy", RGB.astype(dtype))
    mask = read_stored_mask(tmp_path / "x.npy")
    assert mask.values.dtype == np.uint8
    np.testing.assert_array_equal(mask.values, RGB)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_colours_of_16_bit_are_read_if_8_bit_hold_them_and_refused_otherwise(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    for colours in (RGB.astype(np.uint16) * 257, RGB.astype(np.uint16) * 256):
        if suffix == "png":
            cv2.imwrite(str(path), colours[:, :, ::-1])
        else:
            tifffile.imwrite(path, colours, photometric="rgb")
        if colours[0, 0, 0] % 257 == 0:
            np.testing.assert_array_equal(read_labels(path), RGB)
        else:
            with refused(path, r"has colours of uint16 that are not 0\.\.255 - save masks as one channel of labels or"):
                read_labels(path)


# Floats


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("suffix", ["tif", "npy"])
def test_floats_are_read_if_all_are_integers(tmp_path: Path, suffix: str, dtype: Any) -> None:
    """gdal_rasterize writes float64 and QGIS float32 unless another type is chosen."""
    path = tmp_path / f"x.{suffix}"
    write = tifffile.imwrite if suffix == "tif" else np.save
    labels = np.where(LABELS == 2, -999, LABELS)
    write(path, labels.astype(dtype))
    assert_read(path, labels)
    for value in (0.5, np.nan, np.inf, np.finfo(np.dtype(dtype)).max):
        wrong = labels.astype(dtype)
        if float(value).is_integer() and float(value) < 2**63:
            continue  # the largest number of float16 is a label
        wrong[3, 4] = value
        write(path, wrong)
        name = np.dtype(dtype)
        number = re.escape(str(wrong[3, 4]))
        with refused(path, f"mask .* holds {name}, with {number} at row 3, column 4 - save integer labels"):
            read_labels(path)


# Masks that are refused


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((48, 64), np.complex64), "holds complex64 - save integer labels"),
        (np.zeros((48, 64), "S3"), r"holds \|S3 - save integer labels"),
        (np.zeros((48, 64), "M8[s]"), "holds datetime64.* - save integer labels"),
        (np.zeros((5, 48, 64), np.uint8), r"has shape \(5, 48, 64\) - save"),
        (np.zeros((48, 64, 2), np.uint8), r"has shape \(48, 64, 2\) - save"),
        (np.zeros((2, 48, 64, 1), np.uint8), r"has shape \(2, 48, 64, 1\) - save"),
        (np.full((48, 64, 3), 256), r"has colours of int64 that are not 0\.\.255 - save"),
        (np.zeros((48, 64, 3), bool), r"has colours of bool that are not 0\.\.255 - save"),
    ],
    ids=lambda value: f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else "",
)
def test_arrays_that_are_not_masks_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "x.npy", array)
    with refused(tmp_path / "x.npy", message):
        read_labels(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("array", "settings", "message"),
    [
        (np.zeros((48, 64), np.complex64), {}, "holds complex64 - save integer labels"),
        (np.zeros((3, 48, 64), np.int32), {"photometric": "minisblack"}, "holds 3 images - save the intended one"),
        (np.zeros((48, 64, 5), np.uint8), {"photometric": "rgb"}, "has 4 channels|has 5 channels - save masks"),
        (np.zeros((48, 64, 2), np.uint8), {"planarconfig": "contig", "photometric": "minisblack"}, "has 2 channels"),
    ],
    ids=lambda value: f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else "",
)
def test_tiffs_that_are_not_masks_are_refused(
    tmp_path: Path, array: np.ndarray, settings: dict[str, Any], message: str
) -> None:
    tifffile.imwrite(tmp_path / "x.tif", array, **settings)
    with refused(tmp_path / "x.tif", message):
        read_labels(tmp_path / "x.tif")


def test_a_tiff_compressed_as_jpeg_is_refused_as_a_mask(tmp_path: Path) -> None:
    Image.fromarray(LABELS.astype(np.uint8)).save(tmp_path / "x.tif", compression="jpeg")
    with refused(tmp_path / "x.tif", "is compressed with JPEG, which changes labels - save masks as PNG"):
        read_labels(tmp_path / "x.tif")


def test_damaged_masks_are_read_or_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, LABELS.astype(np.int16), compression="zlib")
    content = path.read_bytes()
    random = np.random.default_rng(7)
    for _ in range(150):
        damaged = bytearray(content)
        for position in random.integers(0, min(len(content), 300), size=3):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(UsageError):  # the only error that may occur
            assert read_labels(path, max_pixels=100_000).dtype.kind in "iu"
