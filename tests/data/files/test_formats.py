"""Less usual forms of the supported formats: GIF, Netpbm, TIFF with further pages or channels, and large metadata."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from test_reading import GREY, RGB, SMOOTH, refused, saved

from segdeconv.data.files.decoding import header_pixels
from segdeconv.data.files.reading import (
    StoredFormat,
    read_image,
    read_labels,
    read_stored_mask,
    read_upright,
    stored_format,
)

LABELS = np.random.default_rng(1).choice([0, 1, 2, 255], size=(48, 64)).astype(np.uint8)
INDICES = (GREY // 64).astype(np.uint8)
COLOURS = [(0, 0, 0), (200, 10, 0), (0, 250, 3), (9, 9, 9)]


def with_palette(indices: np.ndarray = INDICES) -> Image.Image:
    image = Image.fromarray(indices)
    image.putpalette([value for colour in COLOURS for value in colour])
    return image


# Endings and formats


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "jif", "jfi", "pjpeg", "pjp", "JFIF"])
def test_jpegs_are_read_under_each_of_their_endings(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"x.{suffix}", SMOOTH, format="JPEG", quality=95)
    assert abs(read_image(path).astype(int) - SMOOTH).max() <= 12
    with refused(path, "is JPEG, which changes labels"):
        read_labels(path)


@pytest.mark.parametrize(("suffix", "form"), [("dib", "BMP"), ("apng", "PNG"), ("ppm", "PPM"), ("pnm", "PPM")])
def test_lossless_images_are_read_under_each_of_their_endings(tmp_path: Path, suffix: str, form: str) -> None:
    path = saved(tmp_path / f"x.{suffix}", RGB, format=form)
    np.testing.assert_array_equal(read_image(path), RGB)
    np.testing.assert_array_equal(read_labels(path), RGB)


@pytest.mark.parametrize("transparent", [None, 1])
def test_a_gif_is_an_image_of_its_colours_and_a_mask_of_its_indices(tmp_path: Path, transparent: int | None) -> None:
    path = tmp_path / "x.gif"
    with_palette().save(path, optimize=False, **({} if transparent is None else {"transparency": transparent}))
    table = np.array(COLOURS, np.uint8)
    mask = read_stored_mask(path)
    np.testing.assert_array_equal(mask.values, INDICES)
    np.testing.assert_array_equal(mask.palette[:4], table)
    if transparent is not None:
        table[transparent] = 0
    np.testing.assert_array_equal(read_image(path), table[INDICES])


@pytest.mark.parametrize("optimize", [False, True])
def test_a_gif_of_greys_is_a_mask_of_its_grey_values(tmp_path: Path, optimize: bool) -> None:
    """GIF has only palettes, and Pillow stores the greys that occur as the indices 0, 1, 2, ..."""
    path = saved(tmp_path / "x.gif", LABELS, optimize=optimize)
    mask = read_stored_mask(path)
    np.testing.assert_array_equal(mask.values, LABELS)
    assert mask.palette is None


def netpbm(path: Path, kind: str, maximum: int, values: np.ndarray) -> Path:
    stored = values.astype(">u2" if maximum > 255 else np.uint8)
    path.write_bytes(
        f"{kind}\n# a comment\n{values.shape[1]} {values.shape[0]}\n{maximum}\n".encode() + stored.tobytes()
    )
    return path


@pytest.mark.parametrize("maximum", [1, 3, 255, 300, 4095, 65535])
def test_the_labels_of_a_pgm_are_the_stored_numbers_whatever_its_maximum(tmp_path: Path, maximum: int) -> None:
    values = np.random.default_rng(0).integers(0, maximum + 1, (48, 64))
    path = netpbm(tmp_path / "x.pgm", "P5", maximum, values)
    np.testing.assert_array_equal(read_labels(path), values)
    np.testing.assert_array_equal(read_image(path, channels=1)[:, :, 0], values)
    assert abs(read_image(path)[:, :, 0] / 255 - values / maximum).max() < 0.01
    assert stored_format(path) == StoredFormat(16 if maximum > 255 else 8, 1, alpha=False)


def test_netpbm_of_one_bit_and_of_16_bit_colours(tmp_path: Path) -> None:
    Image.fromarray(GREY > 100).save(tmp_path / "x.pbm")
    np.testing.assert_array_equal(read_labels(tmp_path / "x.pbm"), GREY > 100)
    np.testing.assert_array_equal(read_image(tmp_path / "x.pbm")[:, :, 0], (GREY > 100) * 255)
    path = netpbm(tmp_path / "x.ppm", "P6", 65535, RGB.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(path), RGB)
    for read in (read_labels, lambda path: read_image(path, channels=3)):
        with refused(path, r"has colours of 0\.\.65535 - save them as PNG or TIFF"):
            read(path)


@pytest.mark.parametrize(
    "content", [b"P2\n2 1\n9\n1 2\n", b"Pf\n1 1\n1.0\n0000", b"P5\n-3 -3\n255\n123456789", b"P5\n"]
)
def test_other_netpbm_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pgm"
    path.write_bytes(content)
    with refused(path, "is not an image|is damaged"):
        read_image(path)


# Pages of a TIFF


def pages(*others: tuple[np.ndarray, dict[str, Any]], first: bool = True, **settings: Any) -> Callable[..., Path]:
    """Return a function that writes an image and other pages, before or after it."""

    def write(path: Path, image: np.ndarray, **more: Any) -> Path:
        all_pages = [(image, {**settings, **more})]
        all_pages = all_pages + list(others) if first else list(others) + all_pages
        with tifffile.TiffWriter(path) as file:
            for page, page_settings in all_pages:
                file.write(page, metadata=None, **page_settings)
        return path

    return write


OVERVIEW = (RGB[::2, ::2], {"subfiletype": 1, "photometric": "rgb"})
GREY_OVERVIEW = (GREY[::2, ::2], {"subfiletype": 1, "photometric": "minisblack"})
INTERNAL_MASK = (GREY > 9, {"subfiletype": 4, "photometric": "mask"})
SAME_SIZE = (GREY, {"subfiletype": 1, "photometric": "minisblack"})
MASK_OVERVIEW = ((GREY > 9)[::2, ::2], {"subfiletype": 5, "photometric": "mask"})
PAGES = {
    "overviews": pages(OVERVIEW, (RGB[::4, ::4], OVERVIEW[1])),
    "grey overview": pages(GREY_OVERVIEW),
    "mask of GDAL": pages(INTERNAL_MASK, OVERVIEW, MASK_OVERVIEW),
    "copy that is stored like labels": pages(SAME_SIZE),
    "overview first": pages(OVERVIEW, first=False),
    "tiles": pages(OVERVIEW, tile=(16, 16)),
    "in sub-IFDs": pages(OVERVIEW, subifds=1),
    "marked as a copy, alone": pages(subfiletype=1),
}


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("name", PAGES)
def test_overviews_and_masks_of_a_tiff_are_not_images(tmp_path: Path, name: str, compression: str | None) -> None:
    path = PAGES[name](tmp_path / "x.tif", RGB, photometric="rgb", compression=compression)
    np.testing.assert_array_equal(read_image(path), RGB)
    np.testing.assert_array_equal(read_image(path, channels=3), RGB)
    np.testing.assert_array_equal(read_labels(path), RGB)
    path = PAGES[name](tmp_path / "y.tif", LABELS.astype(np.uint8), photometric="minisblack", compression=compression)
    np.testing.assert_array_equal(read_labels(path), LABELS)


def test_overviews_of_a_tiff_that_pillow_decodes_are_not_images(tmp_path: Path) -> None:
    frames = [Image.fromarray(RGB[::step, ::step]) for step in (1, 2, 4)]
    for frame, kind in zip(frames, (0, 1, 5), strict=True):
        frame.encoderinfo = {"tiffinfo": {254: kind}}
    path = tmp_path / "x.tif"
    frames[0].save(path, save_all=True, append_images=frames[1:], compression="tiff_lzw", tiffinfo={254: 0})
    with tifffile.TiffFile(path) as file:
        assert [page.subfiletype for page in file.pages] == [0, 1, 5]
    np.testing.assert_array_equal(read_image(path), RGB)


@pytest.mark.parametrize("same", [True, False], ids=["of one size", "of two sizes"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_several_full_pages_of_a_tiff_are_refused_with_their_number(
    tmp_path: Path, compression: str | None, same: bool
) -> None:
    path = tmp_path / "x.tif"
    others = [Image.fromarray(GREY if same else GREY[:9])] * 2
    Image.fromarray(GREY).save(path, save_all=True, append_images=others, compression=compression)
    for read in (read_image, read_labels):
        with refused(path, r"holds 3 images - save the intended one as a file of its own"):
            read(path)


def test_a_tiff_of_very_many_pages_is_refused_at_once(tmp_path: Path) -> None:
    """Examining them takes time that grows with the square of their number: 35 seconds for 20,000."""
    content = bytearray(struct.pack("<2sHI", b"II", 42, 8))
    for number in range(20_000):
        tags = {256: 1 + number % 2, 257: 1, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 2}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
        end = len(content) + 2 + len(entries) + 4
        content += struct.pack("<H", len(tags)) + entries + struct.pack("<I", end if number < 19_999 else 0)
    (tmp_path / "x.tif").write_bytes(content)
    for read in (read_image, read_labels, stored_format):
        with refused(tmp_path / "x.tif", "holds 20000 images"):
            read(tmp_path / "x.tif")


def test_of_a_thumbnail_with_its_image_inside_the_image_is_read(tmp_path: Path) -> None:
    path = pages((RGB, {}), subifds=1, subfiletype=1)(tmp_path / "x.tif", RGB[::4, ::4], photometric="rgb")
    np.testing.assert_array_equal(read_image(path), RGB)
    np.testing.assert_array_equal(read_labels(path), RGB)
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags["PhotometricInterpretation"].overwrite(6)  # YCbCr, which Pillow converts
        file.pages[0].pages[0].tags["PhotometricInterpretation"].overwrite(6)
    with refused(path, "holds only smaller copies of an image - save the image as a file of its own"):
        read_image(path)


# Channels of a TIFF


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("extra", ["unassalpha", "assocalpha", "unspecified", None])
@pytest.mark.parametrize("bits", [8, 16])
def test_the_fourth_channel_of_a_tiff_is_not_applied_as_alpha(
    tmp_path: Path, bits: int, extra: str | None, planar: str, compression: str | None
) -> None:
    """It is often infrared; blending it gives black images (PlanetaryComputer#82)."""
    path = tmp_path / "x.tif"
    stored = np.dstack([RGB, (GREY < 50) * 200]).astype(np.uint8)
    array = stored.astype(np.uint16) * 257 if bits == 16 else stored
    array = np.moveaxis(array, 2, 0) if planar == "separate" else array
    settings = {} if extra is None else {"extrasamples": [extra]}
    tifffile.imwrite(path, array, photometric="rgb", planarconfig=planar, compression=compression, **settings)
    np.testing.assert_array_equal(read_image(path), RGB)
    assert stored_format(path) == StoredFormat(bits, 4, alpha=False)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_the_fourth_channel_of_a_tiff_that_pillow_decompresses_is_not_applied_as_alpha(
    tmp_path: Path, kind: int
) -> None:
    stored = np.dstack([RGB, (GREY < 50) * 200]).astype(np.uint8)
    Image.fromarray(stored).save(tmp_path / "x.tif", compression="tiff_lzw", tiffinfo={338: kind})
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif"), RGB)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [5, 13])
def test_more_channels_of_a_tiff_are_refused_with_their_number(
    tmp_path: Path, channels: int, dtype: Any, planar: str
) -> None:
    shape = (48, 64, channels) if planar == "contig" else (channels, 48, 64)
    tifffile.imwrite(tmp_path / "x.tif", np.zeros(shape, dtype), photometric="rgb", planarconfig=planar)
    with refused(tmp_path / "x.tif", f"has {channels} channels - set dataset.channels={channels} to read them"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_grey_channels_of_a_tiff_are_not_a_colour_image(tmp_path: Path, channels: int, planar: str) -> None:
    """GDAL writes bands in this way unless it is told which are red, green and blue."""
    shape = (48, 64, channels) if planar == "contig" else (channels, 48, 64)
    tifffile.imwrite(tmp_path / "x.tif", np.zeros(shape, np.uint8), photometric="minisblack", planarconfig=planar)
    with refused(tmp_path / "x.tif", rf"has {channels} channels but is not a colour image - set dataset\.channels="):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("shape", [(48, 64), (48, 64, 3), (48, 64, 4)])
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint32, np.int32, np.float32, np.float64])
def test_images_of_other_types_are_refused_and_not_clipped(tmp_path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    photometric = "rgb" if len(shape) == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "x.tif", np.zeros(shape, dtype), photometric=photometric)
    kind = "is a float image" if np.dtype(dtype).kind == "f" else f"holds {np.dtype(dtype)}"
    with refused(tmp_path / "x.tif", f"{kind} - convert it to 8 or 16 bit"):
        read_image(tmp_path / "x.tif")


# Metadata

TEXT = "x" * 40 + "é" * 3_000_000


def png_with(*chunks: tuple[bytes, bytes], after: bool = False) -> bytes:
    """Return a PNG with further chunks, before or after its pixels."""

    stream = io.BytesIO()
    Image.fromarray(RGB).save(stream, "PNG")
    content = stream.getvalue()
    more = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    place = len(content) - 12 if after else 33
    return content[:place] + more + content[place:]


def xmp(text: bytes) -> tuple[bytes, bytes]:
    return b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(text)


METADATA: dict[str, Callable[[Path], object]] = {
    "compressed XMP.png": lambda path: path.write_bytes(png_with(xmp(TEXT.encode()))),
    "XMP at the end.png": lambda path: path.write_bytes(png_with(xmp(TEXT.encode()), after=True)),
    "plain XMP.png": lambda path: path.write_bytes(png_with((b"iTXt", b"k\0\0\0\0\0" + TEXT.encode()))),
    "zTXt.png": lambda path: path.write_bytes(png_with((b"zTXt", b"k\0\0" + zlib.compress(TEXT.encode())))),
    "tEXt.png": lambda path: path.write_bytes(png_with(*[(b"tEXt", b"k\0" + b"x" * 7_000_000)] * 10)),
    "many zTXt.png": lambda path: path.write_bytes(png_with(*[(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 10**6))] * 80)),
    "profile.png": lambda path: saved(path, RGB, icc_profile=bytes(30_000_000)),
    "webp.webp": lambda path: saved(path, RGB, lossless=True, xmp=TEXT.encode(), icc_profile=bytes(3_000_000)),
    "tags.tif": lambda path: tifffile.imwrite(
        path, RGB, photometric="rgb", extratags=[(700, "B", 6_000_000, bytes(6_000_000), True)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA)
def test_large_metadata_does_not_keep_an_image_from_being_read(tmp_path: Path, name: str) -> None:
    METADATA[name](tmp_path / name)
    np.testing.assert_array_equal(read_image(tmp_path / name), RGB)
    assert header_pixels(tmp_path / name) == 48 * 64
    assert stored_format(tmp_path / name) == StoredFormat(8, 3, alpha=False)


def test_a_jpeg_may_have_many_large_segments(tmp_path: Path) -> None:
    content = saved(tmp_path / "plain.jpg", SMOOTH, icc_profile=bytes(9_000_000)).read_bytes()
    segment = b"\xff\xe1" + struct.pack(">H", 65535) + b"http://ns.adobe.com/xap/1.0/\0".ljust(65533, b"x")
    (tmp_path / "x.jpg").write_bytes(content[:2] + segment * 200 + content[2:])
    np.testing.assert_array_equal(read_image(tmp_path / "x.jpg"), read_image(tmp_path / "plain.jpg"))


@pytest.mark.parametrize("place", [0, 2_500_000])
def test_the_orientation_in_large_xmp_is_kept(tmp_path: Path, place: int) -> None:
    text = b"x" * place + b'tiff:Orientation="6"' + b"x" * (3_000_000 - place)
    (tmp_path / "x.png").write_bytes(png_with(xmp(text)))
    assert read_upright(tmp_path / "x.png")[1] == 6


def test_a_bomb_in_metadata_is_not_decompressed(tmp_path: Path) -> None:
    compressor = zlib.compressobj(9)
    bomb = b"".join(compressor.compress(bytes(1 << 24)) for _ in range(16)) + compressor.flush()  # 256 MiB
    (tmp_path / "x.png").write_bytes(
        png_with((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb), (b"zTXt", b"k\0\0" + bomb))
    )
    read_image(tmp_path / "x.png")
    tracemalloc.start()
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), RGB)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20


@pytest.mark.parametrize(
    ("chunk", "message"),
    [((b"IDAT", bytes(4_000_000)), "longer than its pixels can be"), ((b"abCd", bytes(4_000_000)), "longer than")],
)
def test_no_more_of_a_png_is_copied_than_its_pixels_need(
    tmp_path: Path, chunk: tuple[bytes, bytes], message: str
) -> None:
    (tmp_path / "x.png").write_bytes(png_with(xmp(TEXT.encode()), chunk))
    with refused(tmp_path / "x.png", message):
        read_image(tmp_path / "x.png")


def test_a_png_with_large_texts_that_is_damaged_is_refused(tmp_path: Path) -> None:
    content = png_with(xmp(TEXT.encode()))
    for share in (0.5, 0.9, 0.99):
        (tmp_path / "x.png").write_bytes(content[: int(len(content) * share)])
        with refused(tmp_path / "x.png", "damaged|is not an image"):
            read_image(tmp_path / "x.png")


# The stored format


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"),
    [
        ("1", "png", (1, 1, False)), ("L", "png", (8, 1, False)), ("LA", "png", (8, 2, True)),
        ("P", "png", (1, 1, False)), ("RGB", "png", (8, 3, False)), ("RGBA", "png", (8, 4, True)),
        ("I;16", "png", (16, 1, False)), ("RGB", "jpg", (8, 3, False)), ("CMYK", "jpg", (8, 4, False)),
        ("L", "jpg", (8, 1, False)), ("RGBA", "webp", (8, 4, True)), ("RGB", "webp", (8, 3, False)),
        ("1", "bmp", (1, 1, False)), ("RGB", "bmp", (8, 3, False)), ("P", "gif", (8, 1, False)),
        ("1", "tif", (1, 1, False)), ("LA", "tif", (8, 2, False)), ("RGBA", "tif", (8, 4, False)),
        ("I;16", "tif", (16, 1, False)), ("F", "tif", (32, 1, False)), ("CMYK", "tif", (8, 4, False)),
    ],
)  # fmt: skip
def test_the_stored_format_is_read_from_the_header(
    tmp_path: Path, mode: str, suffix: str, expected: tuple[int, int, bool]
) -> None:
    Image.new(mode, (64, 48)).save(tmp_path / f"x.{suffix}")
    assert stored_format(tmp_path / f"x.{suffix}") == expected


@pytest.mark.parametrize(("shape", "dtype", "expected"), [((9, 7), bool, (8, 1)), ((9, 7, 5), np.uint16, (16, 5))])
def test_the_stored_format_of_an_array(tmp_path: Path, shape: Any, dtype: Any, expected: tuple[int, int]) -> None:
    np.save(tmp_path / "x.npy", np.zeros(shape, dtype))
    assert stored_format(tmp_path / "x.npy") == (*expected, False)


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY", b"II*\0", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_the_stored_format_of_another_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with refused(tmp_path / "x.png", "is not an image|is damaged"):
        stored_format(tmp_path / "x.png")
