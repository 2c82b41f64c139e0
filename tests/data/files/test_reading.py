"""Image and mask files of every kind are read exactly, or refused with an error that names the file."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import fakes
import numpy as np
import pytest
from PIL import Image
from real_data import SHARED

from segdeconv.classes import Classes, voc_colours
from segdeconv.data.dataset import FileDataset, Pair
from segdeconv.data.files.decoding import ORIENTATION
from segdeconv.data.files.reading import (
    read_image,
    read_labels,
    read_mask,
    read_stored_mask,
    read_upright,
    turn_back,
)
from segdeconv.errors import UsageError

RGB = np.random.default_rng(0).integers(0, 256, size=(48, 64, 3), dtype=np.uint8)
GREY = RGB[:, :, 0]
SMOOTH = np.stack([np.add.outer(np.arange(48), np.arange(64)) + 40 * c for c in range(3)], axis=2).astype(np.uint8)
THREE = Classes(("a", "b", "c"), ((0, 0, 0), (255, 0, 0), (0, 0, 255)), ignore_colour=(255, 255, 255))
LABELS = np.random.default_rng(1).choice([0, 1, 2, 255], size=(48, 64)).astype(np.uint8)


@contextmanager
def refused(path: Path, message: str) -> Iterator[None]:
    """Expect a UsageError that names the file, matches `message` and, after a dash, suggests a way out."""
    with pytest.raises(UsageError, match=message) as caught:
        yield
    assert str(path) in str(caught.value)
    assert " - " in str(caught.value)


def saved(path: Path, array: np.ndarray, **settings: object) -> Path:
    Image.fromarray(array).save(path, **settings)
    return path


def read_or_refusal(path: Path, **settings: object) -> np.ndarray | str:
    """Return the image, or the message of the UsageError; any other exception is a bug."""
    try:
        return read_image(path, **settings)
    except UsageError as error:
        return str(error)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG whose header states this size and which holds one kilobyte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000), 0)) + chunk(b"IEND", b"")


# Images that are read


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "webp", "PNG"])
def test_lossless_formats_give_the_stored_pixels(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"x.{suffix}", RGB, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read_image(path), RGB)


@pytest.mark.parametrize(("name", "settings"), [("x.jpg", {}), ("X.JPG", {}), ("x.jpeg", {"progressive": True})])
def test_jpegs_give_nearly_the_stored_pixels(tmp_path: Path, name: str, settings: dict[str, object]) -> None:
    image = read_image(saved(tmp_path / name, SMOOTH, quality=95, **settings))
    assert abs(image.astype(int) - SMOOTH).max() <= 12


def test_the_content_decides_the_format_not_the_suffix(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(saved(tmp_path / "x.jpg", RGB, format="PNG")), RGB)


@pytest.mark.parametrize("name", ["ünï 🚗.png", "a b\nc.png", "n" * 240 + ".png"])
def test_unusual_file_names_are_read(tmp_path: Path, name: str) -> None:
    np.testing.assert_array_equal(read_image(saved(tmp_path / name, RGB)), RGB)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (7, 9)])
def test_tiny_and_odd_sizes_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    part = RGB[: size[0], : size[1]]
    np.testing.assert_array_equal(read_image(saved(tmp_path / "x.png", part)), part)


def test_grey_is_repeated_in_three_channels(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(saved(tmp_path / "x.png", GREY)), np.dstack([GREY] * 3))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_are_blended_with_black(tmp_path: Path, mode: str) -> None:
    colour = RGB if mode == "RGBA" else np.dstack([GREY] * 3)
    alpha = RGB[::-1, :, 1]
    path = saved(tmp_path / "x.png", np.dstack([RGB, alpha] if mode == "RGBA" else [GREY, alpha]))
    on_black = colour.astype(float) * alpha[:, :, None] / 255
    assert abs(read_image(path) - on_black).max() <= 1


def test_palette_images_give_their_colours_with_the_transparent_entry_black(tmp_path: Path) -> None:
    image = Image.fromarray(GREY // 128)  # entries 0 and 1
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=1)
    colours = np.array([[10, 20, 30], [200, 100, 50]], dtype=np.uint8)
    np.testing.assert_array_equal(read_image(tmp_path / "plain.png"), colours[GREY // 128])
    colours[1] = 0
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png"), colours[GREY // 128])


def test_one_bit_images_are_black_and_white(tmp_path: Path) -> None:
    image = read_image(saved(tmp_path / "x.png", GREY > 100))
    np.testing.assert_array_equal(image, np.dstack([(GREY > 100).astype(np.uint8) * 255] * 3))


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_gives_the_printed_colour(tmp_path: Path, suffix: str) -> None:
    for ink, colour in (((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 255), (0, 0, 0)), ((0, 0, 255, 0), (255, 255, 0))):
        Image.new("CMYK", (16, 16), ink).save(tmp_path / f"x.{suffix}")
        assert abs(read_image(tmp_path / f"x.{suffix}").astype(int) - colour).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    path = saved(tmp_path / f"x.{suffix}", GREY.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(path), np.dstack([GREY] * 3))


def test_big_endian_16_bit_grey_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    big = (GREY.astype(np.uint16) * 257).astype(">u2")
    Image.frombytes("I;16B", (64, 48), big.tobytes()).save(tmp_path / "x.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif"), np.dstack([GREY] * 3))


def test_16_bit_colour_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "x.png"), RGB[:, :, ::-1].astype(np.uint16) * 257)
    assert abs(read_image(tmp_path / "x.png").astype(int) - RGB).max() <= 1


def test_a_broken_colour_profile_is_ignored(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(saved(tmp_path / "x.png", RGB, icc_profile=b"not a profile")), RGB)


def test_a_jpeg_that_lacks_only_its_end_mark_is_read_whole_or_refused(tmp_path: Path) -> None:
    """Either can happen, depending on how far ahead Pillow's decoder reads; no pixel is invented."""
    for quality in range(60, 90):
        path = saved(tmp_path / "x.jpg", SMOOTH, quality=quality)
        whole = read_image(path)
        path.write_bytes(path.read_bytes()[:-2])
        image = read_or_refusal(path)
        assert "damaged" in image if isinstance(image, str) else np.array_equal(image, whole)


def test_of_a_photo_with_a_second_image_in_its_file_the_first_is_read(tmp_path: Path) -> None:
    """Phones append a depth or brightness map (MPO); their files have the suffix .jpg and are not animations."""
    first = Image.fromarray(SMOOTH)
    first.save(tmp_path / "plain.jpg")
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    np.testing.assert_array_equal(read_image(tmp_path / "phone.jpg"), read_image(tmp_path / "plain.jpg"))


# EXIF: the NumPy expression for the upright image of a stored one, by orientation

UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.swapaxes(a[::-1, ::-1], 0, 1),
    8: lambda a: np.rot90(a, 1),
}


def turned(path: Path, stored: int) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = stored
    return saved(path, RGB, exif=exif)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("stored", range(1, 9))
def test_exif_apply_turns_upright_and_ignore_leaves_as_stored(tmp_path: Path, stored: int, suffix: str) -> None:
    path = turned(tmp_path / f"x.{suffix}", stored)
    upright, orientation = read_upright(path)
    assert orientation == stored
    assert np.array_equal(upright, read_image(path, exif="apply"))
    with refused(path, "more than 1 - shrink it"):
        read_upright(path, max_pixels=1)
    plain = read_image(saved(tmp_path / f"plain.{suffix}", RGB))
    np.testing.assert_array_equal(read_image(path, exif="ignore"), plain)
    np.testing.assert_array_equal(read_image(path, exif="apply"), UPRIGHT[stored](plain))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
@pytest.mark.parametrize("stored", range(2, 9))
def test_a_rotated_image_is_refused_without_dataset_exif(tmp_path: Path, stored: int, suffix: str) -> None:
    path = turned(tmp_path / f"x.{suffix}", stored)
    with refused(path, rf"EXIF orientation {stored}.*dataset\.exif=apply or dataset\.exif=ignore"):
        read_image(path)


@pytest.mark.parametrize("stored", range(1, 9))
def test_turn_back_is_the_exact_inverse_of_apply(stored: int) -> None:
    np.testing.assert_array_equal(turn_back(np.ascontiguousarray(UPRIGHT[stored](GREY)), stored), GREY)


# Images that are refused


@pytest.mark.parametrize("suffix", ["png", "apng", "webp", "gif"])
def test_animations_are_refused(tmp_path: Path, suffix: str) -> None:
    others = {"format": "PNG"} if suffix == "apng" else {}
    path = saved(tmp_path / f"x.{suffix}", RGB, save_all=True, append_images=[Image.fromarray(RGB[::-1])], **others)
    with refused(path, "animation of 2 frames"):
        read_image(path)


@pytest.mark.parametrize("fmt", ["ICO", "EPS", "TGA", "JPEG2000"])
def test_other_formats_are_refused_whatever_their_suffix(tmp_path: Path, fmt: str) -> None:
    path = saved(tmp_path / "x.png", RGB, format=fmt)
    with refused(path, "formats are JPEG, PNG, BMP, TIFF, WEBP, GIF, PPM"):
        read_image(path)


def test_float_images_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.tif", GREY.astype(np.float32))
    with refused(path, "float image - convert it to 8 or 16 bit"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5, 0.8, 0.97])
def test_truncated_images_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = saved(tmp_path / f"x.{suffix}", RGB)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with refused(path, "is damaged|is not an image"):
        read_image(path)


def test_a_png_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.png", RGB)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    path.write_bytes(content)
    with refused(path, "damaged"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp", "gif", "ppm"])
def test_random_damage_is_read_or_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    path = saved(path, RGB) if suffix in ("bmp", "gif", "ppm") else turned(path, 6)
    content = path.read_bytes()
    random = np.random.default_rng(5)
    for _ in range(150):
        damaged = bytearray(content)
        reach = len(content) if random.random() < 0.3 else 200  # mostly where the headers are
        for position in random.integers(0, min(reach, len(content)), size=3):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        image = read_or_refusal(path, exif="apply", max_pixels=100_000)
        if isinstance(image, str):
            assert str(path) in image
        else:
            assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)


@pytest.mark.parametrize(
    "content", [b"", b"hello\n", b"<html><body></body></html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_files_that_are_not_images_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with refused(path, r"is not an image \(empty, truncated or another format\)"):
        read_image(path)


def test_paths_that_are_not_regular_files_are_refused(tmp_path: Path) -> None:
    cases = {
        "is a folder": lambda path: path.mkdir(),
        "is missing": lambda path: None,
        "is a dangling link": lambda path: path.symlink_to(tmp_path / "nowhere.jpg"),
        "link": lambda path: path.symlink_to(path),  # to itself
        "x4.jpg": lambda path: os.mkfifo(path),  # a pipe must not block the test
    }
    for number, (message, make) in enumerate(cases.items()):
        path = tmp_path / f"x{number}.jpg"
        make(path)
        with refused(path, message):
            read_image(path)


def test_a_header_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png_header(100_000, 100_000))
    with refused(path, r"100000x100000 pixels, more than 178956970 - .*dataset\.max_pixels"):
        read_image(path)


def test_max_pixels_is_the_largest_size_that_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.png", RGB)
    assert read_image(path, max_pixels=48 * 64).shape == (48, 64, 3)
    with refused(path, "64x48 pixels, more than 3071"):
        read_image(path, max_pixels=48 * 64 - 1)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp"])
def test_pillows_process_wide_limit_is_unchanged_and_applies_only_to_plugins_that_check_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    path = saved(tmp_path / f"x.{suffix}", RGB)
    if suffix == "webp":  # its plugin checks the limit when it allocates memory
        with refused(path, r"exceeds limit of 20 pixels.* - shrink it, or raise PIL's Image\.MAX_IMAGE_PIXELS"):
            read_image(path)
    else:
        assert read_image(path).shape == (48, 64, 3)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("size", [(4000, 4000), (0, 10), (10, 0)])
def test_a_header_with_a_false_size_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png_header(*size))
    with refused(path, "damaged|is not an image"):
        read_image(path)


# Masks that are read


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_label_masks_of_every_integer_type_are_read_as_stored(tmp_path: Path, dtype: type, suffix: str) -> None:
    if (dtype, suffix) == (np.int32, "png"):
        dtype = np.uint16  # PNG has no 32 bit
    path = saved(tmp_path / f"x.{suffix}", LABELS.astype(dtype))
    mask = read_mask(path, THREE)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, LABELS)


@pytest.mark.parametrize("transparency", [b"", b"\0\1"])
def test_a_palette_image_without_palette_is_refused_as_an_image_and_read_as_labels(
    tmp_path: Path, transparency: bytes
) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path = tmp_path / "x.png"
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 72)) + chunk(b"IEND", b"")
    path.write_bytes(start + (chunk(b"tRNS", transparency) if transparency else b"") + pixels)
    assert "is damaged" in read_or_refusal(path) or transparency
    assert not read_stored_mask(path).values.any()


def test_palette_masks_are_read_as_indices_not_as_grey(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    image = Image.fromarray(LABELS)
    image.putpalette([channel for colour in voc_colours(256) for channel in colour])
    image.save(path)
    np.testing.assert_array_equal(read_mask(path, THREE), LABELS)
    assert read_stored_mask(path).palette.tolist() == [list(colour) for colour in voc_colours(256)]
    assert read_stored_mask(saved(tmp_path / "grey.png", LABELS)).palette is None


def test_boolean_masks_are_classes_0_and_1(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_mask(saved(tmp_path / "x.png", GREY > 100), THREE), GREY > 100)


@pytest.mark.parametrize("alpha", [False, True])
def test_colour_masks_are_read_with_the_palette_of_the_classes(tmp_path: Path, alpha: bool) -> None:
    coloured = THREE.palette[LABELS]
    if alpha:
        coloured = np.dstack([coloured, GREY])
    np.testing.assert_array_equal(read_mask(saved(tmp_path / "x.png", coloured), THREE), LABELS)


def test_labels_that_are_not_consecutive_become_class_indices(tmp_path: Path) -> None:
    classes = Classes(("a", "b", "c"), THREE.colours, labels=(7, 24, 1000))
    stored = np.array([[7, 24], [1000, 255]], dtype=np.uint16)
    np.testing.assert_array_equal(read_mask(saved(tmp_path / "x.png", stored), classes), [[0, 1], [2, 255]])


VOC = sorted((SHARED / "VOCdevkit" / "VOC2012" / "SegmentationClass").glob("*.png"))


def test_real_voc_masks_are_read_as_labels() -> None:
    if not VOC:
        pytest.skip(f"no real VOC masks in {SHARED / 'VOCdevkit'}")
    classes = Classes(tuple(f"class_{i}" for i in range(21)), voc_colours(21))
    for path in VOC:
        stored = np.array(fakes.opened(path))
        assert set(np.unique(stored)) <= {*range(21), 255}
        np.testing.assert_array_equal(read_mask(path, classes), stored)
        assert read_stored_mask(path).palette[:21].tolist() == [list(colour) for colour in classes.colours]


# Masks that are refused


@pytest.mark.parametrize("fmt", ["JPEG", "WEBP"])
def test_masks_in_formats_that_change_labels_are_refused(tmp_path: Path, fmt: str) -> None:
    path = saved(tmp_path / "x.png", LABELS, format=fmt)
    with refused(path, f"is {fmt}, which changes labels - save masks as PNG"):
        read_mask(path, THREE)


@pytest.mark.parametrize(
    ("dtype", "label"), [(np.uint8, 3), (np.uint8, 254), (np.uint16, 60000), (np.int32, 70000), (np.int32, -1)]
)
def test_a_label_without_a_class_is_named(tmp_path: Path, dtype: type, label: int) -> None:
    stored = LABELS.astype(dtype)
    stored[5, 6] = label
    path = saved(tmp_path / "x.tif", stored)
    with refused(path, f"has label {label}; the classes have labels 0..2 and 255 for ignored pixels"):
        read_mask(path, THREE)


def test_the_number_of_further_labels_without_a_class_is_reported(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.png", np.array([[0, 9, 11, 10]], dtype=np.uint8))
    with refused(path, re.escape("has label 9 (and 2 more);")):
        read_mask(path, THREE)


def test_an_unknown_colour_is_named_with_its_position(tmp_path: Path) -> None:
    coloured = THREE.palette[LABELS]
    coloured[7, 11] = (1, 2, 3)
    path = saved(tmp_path / "x.png", coloured)
    with refused(path, re.escape("has colour (1, 2, 3) at row 7, column 11")):
        read_mask(path, THREE)


@pytest.mark.parametrize(("mode", "name"), [("CMYK", "SEPARATED"), ("LAB", "CIELAB"), ("YCbCr", "YCBCR")])
def test_masks_in_other_colour_modes_are_refused(tmp_path: Path, mode: str, name: str) -> None:
    path = tmp_path / "x.tif"
    Image.new(mode, (64, 48)).save(path)
    with refused(path, f"colour mode {name}"):
        read_mask(path, THREE)


@pytest.mark.parametrize("content", [None, b"", b"text"])
def test_missing_empty_and_text_masks_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with refused(path, "is missing|is not an image"):
        read_labels(path)


@pytest.mark.parametrize("shape", [(24, 32), (64, 48), (48, 63)])
def test_a_mask_of_another_size_than_its_image_is_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    pair = Pair(saved(tmp_path / "i.png", RGB), saved(tmp_path / "m.png", np.zeros(shape, dtype=np.uint8)), "x")
    with refused(pair.mask, f"is {shape[0]}x{shape[1]} and its image .*i.png 48x64"):
        dataset_of(pair)[0]


def test_max_pixels_of_a_data_set_applies_to_its_masks_too(tmp_path: Path) -> None:
    pair = Pair(saved(tmp_path / "i.png", RGB[:10, :10]), saved(tmp_path / "m.png", LABELS), "x")
    with refused(pair.mask, "64x48 pixels, more than 1000"):
        dataset_of(pair, max_pixels=1000)[0]


def dataset_of(pair: Pair, **settings: int) -> FileDataset:
    return FileDataset("train", THREE, [pair], **settings)
