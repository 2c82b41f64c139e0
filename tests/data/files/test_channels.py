"""Images of any number of channels are read exactly as they were written, or refused with an error."""

from __future__ import annotations

import importlib.util
import io
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import fakes
import numpy as np
import pytest
import tifffile
from PIL import Image
from test_reading import UPRIGHT, read_or_refusal

from segdeconv.classes import Classes
from segdeconv.data.files.reading import read_image, read_mask, read_upright
from segdeconv.errors import UsageError

LIMIT = 100_000  # pixels


def image_of(channels: int, dtype: Any, size: tuple[int, int] = (24, 32)) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, np.iinfo(dtype).max, (*size, channels), dtype, endpoint=True)


@contextmanager
def refused(path: Path, message: str) -> Iterator[None]:
    with pytest.raises(UsageError, match=message) as caught:
        yield
    assert str(path) in str(caught.value)
    assert " - " in str(caught.value)
    assert "\n" not in str(caught.value)


def png(path: Path, image: np.ndarray) -> None:
    """Write an unfiltered PNG, following its specification: grey, grey with alpha, RGB or RGBA of 8 or 16 bits."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = image.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8 * image.dtype.itemsize, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in image)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def tif(**settings: Any) -> Callable[[Path, np.ndarray], None]:
    return lambda path, image: fakes.stored(path, image, **settings) and None


def planes(**settings: Any) -> Callable[[Path, np.ndarray], None]:
    return lambda path, image: tifffile.imwrite(path, np.moveaxis(image, 2, 0), photometric="minisblack", **settings)


def with_overview(path: Path, image: np.ndarray) -> None:
    """Write a TIFF in the layout of GeoTIFF: the image in tiles, followed by a smaller copy."""
    settings = {"photometric": "minisblack", "planarconfig": "contig", "tile": (16, 16), "metadata": None}
    with tifffile.TiffWriter(path) as file:
        file.write(image, **settings)
        file.write(image[::2, ::2], subfiletype=1, **settings)


def npy(order: str = "C", byteorder: str = "=", version: tuple[int, int] | None = None) -> Callable[..., None]:
    def write(path: Path, image: np.ndarray) -> None:
        array = np.array(image, dtype=image.dtype.newbyteorder(byteorder), order=order)
        with path.open("wb") as file:
            np.lib.format.write_array(file, array, version=version)

    return write


def pillow(path: Path, image: np.ndarray) -> None:
    Image.fromarray(image if image.shape[2] > 1 else image[:, :, 0]).save(path, lossless=True, exact=True)


WRITERS: dict[str, tuple[Callable[[Path, np.ndarray], Any], str, tuple[int, ...], tuple[Any, ...]]] = {
    "png": (png, ".png", (1, 2, 3, 4), (np.uint8, np.uint16)),
    "bmp": (pillow, ".bmp", (1, 3), (np.uint8,)),
    "webp": (pillow, ".webp", (3, 4), (np.uint8,)),
    "interleaved": (tif(), ".tif", (1, 2, 3, 4, 5, 13), (np.uint8, np.uint16)),
    "big endian": (tif(byteorder=">"), ".tif", (1, 2, 5), (np.uint16,)),
    "big tiff": (tif(bigtiff=True), ".tif", (5,), (np.uint16,)),
    "deflate": (tif(compression="zlib", rowsperstrip=7), ".tif", (1, 2, 5), (np.uint8, np.uint16)),
    "differences": (tif(compression="zlib", predictor=True), ".tif", (1, 2, 5), (np.uint8, np.uint16)),
    "tiles": (tif(tile=(16, 16)), ".tif", (2, 5), (np.uint8, np.uint16)),
    "deflated tiles": (tif(tile=(16, 16), compression="zlib"), ".tif", (2, 5), (np.uint16,)),
    "in planes": (planes(planarconfig="separate"), ".tif", (2, 3, 5), (np.uint8, np.uint16)),
    "deflated planes": (planes(planarconfig="separate", compression="zlib"), ".tif", (2, 5), (np.uint16,)),
    "in pages": (planes(), ".tif", (2, 5), (np.uint8, np.uint16)),
    "deflated pages": (planes(compression="zlib"), ".tif", (2, 5), (np.uint16,)),
    "named channels": (planes(metadata={"axes": "CYX"}), ".tif", (2, 3, 5), (np.uint16,)),
    "ImageJ": (planes(imagej=True), ".tif", (2, 5), (np.uint16,)),
    "OME": (planes(ome=True, metadata={"axes": "CYX"}), ".tif", (2, 5), (np.uint16,)),
    "no axes stated": (tifffile.imwrite, ".tif", (2, 3, 4, 5), (np.uint8, np.uint16)),
    "with an overview": (with_overview, ".tif", (2, 3), (np.uint16,)),
    "npy": (npy(), ".npy", (1, 2, 3, 7), (np.uint8, np.uint16)),
    "npy in Fortran's order": (npy("F"), ".npy", (2,), (np.uint16,)),
    "npy big endian": (npy(byteorder=">"), ".npy", (2,), (np.uint16,)),
    "npy version 2": (npy(version=(2, 0)), ".npy", (2,), (np.uint16,)),
}  # fmt: skip
CASES = [
    pytest.param(write, suffix, channels, dtype, id=f"{name} {channels}x{8 * np.dtype(dtype).itemsize}")
    for name, (write, suffix, counts, dtypes) in WRITERS.items()
    for channels in counts
    for dtype in dtypes
]


@pytest.mark.parametrize(("write", "suffix", "channels", "dtype"), CASES)
def test_an_image_is_read_as_it_was_written(tmp_path: Path, write: Any, suffix: str, channels: int, dtype: Any) -> None:
    image, path = image_of(channels, dtype), tmp_path / f"x{suffix}"
    write(path, image)
    stored = read_image(path, channels=channels)
    assert (stored.dtype, stored.dtype.isnative, stored.flags.c_contiguous) == (dtype, True, True)
    np.testing.assert_array_equal(stored, image)
    # An array without stated axes is recognised as (H, W, C) only by its number of channels.
    count = r"\d+" if write is tifffile.imwrite else channels
    with refused(path, rf"has {count} channels? of {image.itemsize * 8} bit and dataset\.channels is {channels + 1} -"):
        read_image(path, channels=channels + 1)


def test_opencv_reads_the_same_from_our_16_bit_png(tmp_path: Path) -> None:
    """Check the PNG writer of these tests against another reader."""
    for channels in (1, 3, 4):
        image = image_of(channels, np.uint16)
        png(tmp_path / "x.png", image)
        stored = np.atleast_3d(cv2.imread(str(tmp_path / "x.png"), cv2.IMREAD_UNCHANGED))
        np.testing.assert_array_equal(stored[:, :, [2, 1, 0, 3][:channels] if channels > 1 else [0]], image)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("name", ["interleaved", "deflate", "npy"])
def test_tiny_sizes_are_read(tmp_path: Path, size: tuple[int, int], channels: int, name: str) -> None:
    image = image_of(channels, np.uint16, size)
    write, suffix, *_ = WRITERS[name]
    write(tmp_path / f"x{suffix}", image)
    np.testing.assert_array_equal(read_image(tmp_path / f"x{suffix}", channels=channels), image)


def test_an_array_of_two_axes_is_one_channel(tmp_path: Path) -> None:
    image = image_of(1, np.uint16)
    np.save(tmp_path / "x.npy", image[:, :, 0])
    np.testing.assert_array_equal(read_image(tmp_path / "x.npy", channels=1), image)


def test_an_array_with_its_channels_first_is_refused_with_a_way_out(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.moveaxis(image_of(2, np.uint16), 2, 0))
    with refused(tmp_path / "x.npy", r"has shape \(2, 24, 32\), channels first - save np\.moveaxis"):
        read_image(tmp_path / "x.npy", channels=2)


def test_a_grey_jpeg_is_one_channel_and_a_colour_one_three(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(48), np.arange(64)).astype(np.uint8)
    for channels, array in ((1, smooth), (3, np.dstack([smooth] * 3))):
        Image.fromarray(array).save(tmp_path / "x.jpg", quality=95)
        image = read_image(tmp_path / "x.jpg", channels=channels)
        assert image.shape == (48, 64, channels)
        assert abs(image.astype(int) - smooth[:, :, None]).max() <= 4


@pytest.mark.skipif(importlib.util.find_spec("imagecodecs") is not None, reason="imagecodecs is installed")
def test_a_tiff_whose_compression_needs_imagecodecs_is_read_by_pillow_or_refused(tmp_path: Path) -> None:
    for channels, dtype in ((1, np.uint8), (3, np.uint8), (4, np.uint8), (1, np.uint16)):
        image, path = image_of(channels, dtype), tmp_path / "x.tif"
        Image.fromarray(image if channels > 1 else image[:, :, 0]).save(path, compression="tiff_lzw")
        np.testing.assert_array_equal(read_image(path, channels=channels), image)
    fakes.stored(path, image_of(2, np.uint16))
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags["Compression"].overwrite(5)
    with refused(path, r"is compressed with LZW - pip install imagecodecs, or save it uncompressed or with deflate"):
        read_image(path, channels=2)


@pytest.mark.parametrize("stored", range(2, 9))
@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_a_rotated_image_follows_dataset_exif(tmp_path: Path, stored: int, suffix: str) -> None:
    image, path = image_of(3, np.uint8), tmp_path / f"x{suffix}"
    if suffix == ".tif":
        fakes.stored(path, image, extratags=[(274, "H", 1, stored, True)])
    else:
        exif = Image.Exif()
        exif[274] = stored
        Image.fromarray(image).save(path, exif=exif)
    with refused(path, rf"stored rotated \(EXIF orientation {stored}\).*dataset\.exif=apply or dataset\.exif=ignore"):
        read_image(path, channels=3)
    np.testing.assert_array_equal(read_image(path, channels=3, exif="ignore"), image)
    np.testing.assert_array_equal(read_image(path, channels=3, exif="apply"), UPRIGHT[stored](image))
    upright, orientation = read_upright(path, channels=3)
    assert orientation == stored
    np.testing.assert_array_equal(upright, UPRIGHT[stored](image))


# Files that are refused


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint32, np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_other_types_are_refused(tmp_path: Path, dtype: Any, suffix: str) -> None:
    path = fakes.stored(tmp_path / f"x{suffix}", image_of(2, np.uint8).astype(dtype))
    with refused(path, f"holds {np.dtype(dtype)} - save it as uint8 or uint16"):
        read_image(path, channels=2)


def test_images_whose_numbers_are_not_intensities_are_refused(tmp_path: Path) -> None:
    grey = Image.fromarray(image_of(1, np.uint8)[:, :, 0])
    for name, image, message in (
        ("palette.png", grey.convert("P"), "has a palette, whose indices are not intensities"),
        ("palette.tif", grey.convert("P"), "has a palette, whose indices are not intensities"),
        ("bits.png", grey.convert("1"), "has 1 bit - save it with channels of 8 or 16 bit"),
        ("bits.bmp", grey.convert("1"), "has 1 bit"),
    ):
        image.save(tmp_path / name)
        with refused(tmp_path / name, message):
            read_image(tmp_path / name, channels=1)
    (tmp_path / "four.png").write_bytes(png_of_4_bit())
    with refused(tmp_path / "four.png", "has 4 bit"):
        read_image(tmp_path / "four.png", channels=1)


def png_of_4_bit() -> bytes:
    image, file = Image.new("P", (8, 8)), io.BytesIO()
    image.putpalette([0, 0, 0, 255, 255, 255] + [9, 9, 9] * 14)
    image.save(file, "PNG", bits=4)
    return file.getvalue()


def test_several_images_and_other_axes_are_refused(tmp_path: Path) -> None:
    image = image_of(1, np.uint16)[:, :, 0]
    tifffile.imwrite(tmp_path / "two.tif", image)
    tifffile.imwrite(tmp_path / "two.tif", image[:9], append=True)
    with refused(tmp_path / "two.tif", "holds 2 images - save the intended one as a file of its own"):
        read_image(tmp_path / "two.tif", channels=1)
    pages = [Image.fromarray(image_of(3, np.uint8)) for _ in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with refused(tmp_path / "pages.tif", "holds 3 images - save the intended one as a file of its own"):
        read_image(tmp_path / "pages.tif", channels=3)
    for axes in ("ZYX", "TYX"):
        path = tmp_path / f"{axes}.tif"
        tifffile.imwrite(path, np.stack([image] * 3), photometric="minisblack", metadata={"axes": axes})
        with refused(path, f"has axes {axes} of .* - save it as rows, columns and channels"):
            read_image(path, channels=3)


def test_without_channels_no_channel_is_dropped_silently(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", image_of(3, np.uint8))
    with refused(tmp_path / "x.npy", r"is an array, not an image - set dataset\.channels=N"):
        read_image(tmp_path / "x.npy")
    for number, write in enumerate((tif(), planes(planarconfig="separate"))):
        write(tmp_path / f"{number}.tif", image_of(2, np.uint16))
        with refused(tmp_path / f"{number}.tif", r"- set dataset\.channels=2 to read"):
            read_image(tmp_path / f"{number}.tif")


def test_paths_that_are_not_regular_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.npy").mkdir()
    for name, message in (("folder.npy", "is a folder"), ("nothing.tif", "is missing")):
        with refused(tmp_path / name, message):
            read_image(tmp_path / name, channels=2)


@pytest.mark.parametrize("suffix", [".tif", ".npy", ".png"])
def test_max_pixels_is_the_largest_size_that_is_read(tmp_path: Path, suffix: str) -> None:
    path, image = tmp_path / f"x{suffix}", image_of(1, np.uint16)
    if suffix == ".png":
        png(path, image)
    else:
        fakes.stored(path, image)
    assert read_image(path, channels=1, max_pixels=24 * 32).shape == (24, 32, 1)
    with refused(path, r"32x24 pixels, more than 767 - .*dataset\.max_pixels"):
        read_image(path, channels=1, max_pixels=24 * 32 - 1)


# Hostile and damaged arrays


class CreatesAFile:
    """Object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_an_array_of_pickles_is_refused_and_not_run(tmp_path: Path) -> None:
    path, proof = tmp_path / "x.npy", tmp_path / "run"
    np.save(path, np.array([[CreatesAFile(proof)]], dtype=object), allow_pickle=True)
    with refused(path, "holds object - save it as uint8 or uint16"):
        read_image(path, channels=1)
    path.write_bytes(pickle.dumps(CreatesAFile(proof)))
    with refused(path, "is not an image"):
        read_image(path, channels=1)
    assert not proof.exists()


def npy_with_header(header: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (8, 8)}", b"x" * 63),
            "64 bytes and the file holds 63",
        ),
        (
            npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (8, 8)}", b"x" * 65),
            "64 bytes and the file holds 65",
        ),
        (
            npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (9, 9, 1000000000000)}", b"x"),
            "81000000000000 bytes and the file holds 1",
        ),
        (
            npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000)}", b"x"),
            "1000000x1000000 pixels, more than",
        ),
        (npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (-8, -8)}", b"x" * 64), "has shape"),
        (npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (0, 8)}"), "has shape"),
        (npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (64,)}", b"x" * 64), "has shape"),
        (npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2, 4, 8)}", b"x" * 64), "has shape"),
        (npy_with_header("{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (8, 8)}", b"x" * 64), "holds"),
        (npy_with_header("{'descr': '|S9', 'fortran_order': False, 'shape': (8, 8)}", b"x" * 576), "holds"),
        (npy_with_header("__import__('os').getcwd()"), "damaged"),
        (npy_with_header("[" * 9000), "damaged"),
        (npy_with_header("{" + " " * 100_000 + "}", version=b"\2\0"), "damaged"),
        (npy_with_header("{}"), "damaged"),
        (b"\x93NUMPY", "damaged"),
        (b"\x93NUMPY\x09\x09" + bytes(99), "damaged"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff{", "damaged"),
    ],
)
def test_a_hostile_array_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with refused(path, message):
        read_image(path, channels=1)


# Hostile and damaged TIFFs


def forged(path: Path, **tags: Any) -> Path:
    """Write a deflated TIFF of two channels and overwrite tags of its header."""
    fakes.stored(path, image_of(2, np.uint16), compression="zlib", metadata=None)
    with tifffile.TiffFile(path, mode="r+") as file:
        for name, value in tags.items():
            file.pages[0].tags[name].overwrite(value)
    return path


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"ImageLength": 40_000, "ImageWidth": 40_000}, "40000x40000 pixels, more than"),
        ({"ImageLength": 25}, "damaged"),
        ({"ImageWidth": 33}, "damaged"),
        ({"ImageLength": 20, "RowsPerStrip": 20}, "longer than its header states"),
        ({"StripOffsets": 2**31}, "beyond its end"),
        ({"StripByteCounts": 2**31}, "beyond its end"),
        ({"StripByteCounts": 50}, "bytes"),
        ({"SamplesPerPixel": 60_000}, "channels|damaged"),
        ({"BitsPerSample": (64, 64)}, "holds uint64|damaged"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_tiff_with_a_false_header_is_refused(tmp_path: Path, tags: dict[str, Any], message: str) -> None:
    path = forged(tmp_path / "x.tif", **tags)
    with refused(path, message):
        read_image(path, channels=2)


def test_a_strip_that_would_decompress_to_far_more_than_stated_is_refused_first(tmp_path: Path) -> None:
    path = forged(tmp_path / "x.tif")
    compressor = zlib.compressobj()
    bomb = b"".join(compressor.compress(bytes(1 << 24)) for _ in range(16)) + compressor.flush()
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(bomb)
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags["StripOffsets"].overwrite(size)
        file.pages[0].tags["StripByteCounts"].overwrite(len(bomb))
    with refused(path, "longer than its header states"):
        read_image(path, channels=2)


@pytest.mark.parametrize("name", ["interleaved", "deflate", "tiles", "in planes", "in pages", "npy"])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.97])
def test_truncated_files_are_refused(tmp_path: Path, name: str, share: float) -> None:
    write, suffix, *_ = WRITERS[name]
    path = tmp_path / f"x{suffix}"
    write(path, image_of(2, np.uint16))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with refused(path, "damaged|is not an image|has 1 channel"):
        read_image(path, channels=2)


@pytest.mark.parametrize("name", ["png", "interleaved", "differences", "tiles", "in planes", "in pages", "OME", "npy"])
def test_random_damage_is_read_or_refused_by_name(tmp_path: Path, name: str) -> None:
    write, suffix, *_ = WRITERS[name]
    path = tmp_path / f"x{suffix}"
    write(path, image_of(2, np.uint16))
    content = path.read_bytes()
    random = np.random.default_rng(7)
    for _ in range(150):
        damaged = bytearray(content)
        reach = len(content) if random.random() < 0.3 else 300  # mostly where the headers are
        for position in random.integers(0, min(reach, len(content)), size=3):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        image = read_or_refusal(path, channels=2, exif="ignore", max_pixels=LIMIT)
        if isinstance(image, str):
            assert str(path) in image
        else:
            assert image.dtype in (np.uint8, np.uint16)
            assert (image.ndim, image.shape[2]) == (3, 2)


# Masks


def test_a_mask_may_be_an_array_of_labels(tmp_path: Path) -> None:
    classes = Classes(("a", "b"), ((0, 0, 0), (9, 9, 9)))
    labels = np.random.default_rng(0).choice([0, 1, 255], (9, 7))
    np.save(tmp_path / "x.npy", labels.astype(np.uint16))
    np.testing.assert_array_equal(read_mask(tmp_path / "x.npy", classes), labels)
