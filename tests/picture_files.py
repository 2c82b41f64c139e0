"""Image files of every kind, valid and damaged, as they occur in users' folders and as an attacker may write them."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image

SIZE = (24, 40)  # height, width
Writer = Callable[[Path], object]


def pixels(size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    """Return (H, W, 3) uint8, a gradient with noise, which no codec compresses to almost nothing."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    plane = (rows * 5 + columns * 3)[:, :, None] + np.array([0, 40, 80])
    return ((plane + np.random.default_rng(seed).integers(0, 30, (*size, 3))) % 256).astype(np.uint8)


def image(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(pixels(size)).convert(mode)


def saved(form: str, mode: str = "RGB", size: tuple[int, int] = SIZE, **settings: object) -> Writer:
    """Return a function that writes an image in this format, regardless of the path's suffix."""
    return lambda path: image(mode, size).save(path, format=form, **settings)


def encoded(form: str, **settings: object) -> bytes:
    stream = io.BytesIO()
    image().save(stream, format=form, **settings)
    return stream.getvalue()


def written(content: bytes) -> Writer:
    return lambda path: path.write_bytes(content)


def palette(path: Path) -> None:
    image().quantize(16).save(path, format="PNG")


def grey_16(path: Path) -> None:
    Image.fromarray(np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE).astype(np.uint16)).save(path, format="PNG")


def colour_16(path: Path) -> None:
    path.write_bytes(cv2.imencode(".png", pixels().astype(np.uint16) * 257)[1].tobytes())


def with_orientation(orientation: int) -> Writer:
    def write(path: Path) -> None:
        upright = image()
        exif = upright.getexif()
        exif[0x0112] = orientation
        upright.save(path, format="JPEG", exif=exif)

    return write


def constant(value: int) -> Writer:
    return lambda path: Image.fromarray(np.full((*SIZE, 3), value, np.uint8)).save(path, format="PNG")


def animated(form: str) -> Writer:
    def write(path: Path) -> None:
        frames = [Image.fromarray(pixels(seed=seed)) for seed in range(3)]
        frames[0].save(path, format=form, save_all=True, append_images=frames[1:])

    return write


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with_header_size(width: int, height: int) -> bytes:
    """Return a PNG of about 100 bytes whose header has this size."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")


def damaged_crc() -> bytes:
    content = bytearray(encoded("PNG"))
    content[content.index(b"IDAT") + 20] ^= 255
    return bytes(content)


def float_tiff(path: Path) -> None:
    tifffile.imwrite(path, np.random.default_rng(0).random(SIZE, dtype=np.float32))


# Files that can be read, by name; a name begins with the number of the case.
GOOD: dict[str, Writer] = {
    "1 ok.jpg": saved("JPEG"),
    "2 ok.png": saved("PNG"),
    "3 ok.bmp": saved("BMP"),
    "4 ok.webp": saved("WEBP", lossless=True),
    "5 ok.tif": saved("TIFF"),
    "6 progressive.jpg": saved("JPEG", progressive=True),
    "7 UPPER.JPG": saved("JPEG"),
    "8 png named.jpg": saved("PNG"),
    "9 grey.jpg": saved("JPEG", "L"),
    "10 grey.png": saved("PNG", "L"),
    "11 grey and alpha.png": saved("PNG", "LA"),
    "12 alpha.png": saved("PNG", "RGBA"),
    "13 palette.png": palette,
    "14 one bit.png": saved("PNG", "1"),
    "15 cmyk.jpg": saved("JPEG", "CMYK"),
    "16 grey of 16 bit.png": grey_16,
    "17 colour of 16 bit.png": colour_16,
    "18 old.gif": saved("GIF", "P"),
    "18 portable.ppm": saved("PPM"),
    "18 infrared.tif": saved("TIFF", "RGBA"),
    "18 web.jfif": saved("JPEG"),
    "19 broken profile.png": saved("PNG", icc_profile=b"no colour profile"),
    "30 1x1.png": saved("PNG", size=(1, 1)),
    "31 1x50.png": saved("PNG", size=(1, 50)),
    "32 50x1.png": saved("PNG", size=(50, 1)),
    "33 7x9.png": saved("PNG", size=(7, 9)),
    "54 ünï çödé 🦔.png": saved("PNG"),
    "55 space and\nnewline.png": saved("PNG"),
    "56 " + "n" * 243 + ".png": saved("PNG"),  # 250 bytes
    "60 black.png": constant(0),
    "60 white.png": constant(255),
    "60 grey.png": constant(128),
}
ORIENTED: dict[str, Writer] = {
    f"{19 + orientation} orientation {orientation}.jpg": with_orientation(orientation) for orientation in range(1, 9)
}

# Files that are refused: the function that writes the file, and a part of the error message.
BAD: dict[str, tuple[Writer, str]] = {
    "18 float.tif": (float_tiff, "is a float image - convert it to 8 or 16 bit"),
    "28 animated.gif.png": (animated("GIF"), "is an animation of 3 frames"),
    "29 animated.png": (animated("PNG"), "is an animation of 3 frames"),
    "35 bomb.png": (written(png_with_header_size(100_000, 100_000)), "has 100000x100000 pixels, more than"),
    "36 lying.png": (written(png_with_header_size(4000, 4000)), "is damaged and cannot be decoded"),
    "37 no width.png": (written(png_with_header_size(0, 10)), "is not an image"),
    "38 half.jpg": (written(encoded("JPEG", quality=95)[:900]), "is damaged and cannot be decoded"),
    "40 header.jpg": (written(encoded("JPEG")[:60]), "is damaged and cannot be decoded"),
    "41 half.png": (written(encoded("PNG")[:900]), "is damaged and cannot be decoded"),
    "42 checksum.png": (written(damaged_crc()), "is damaged and cannot be decoded"),
    "44 empty.jpg": (written(b""), "is not an image (empty, truncated or another format)"),
    "45 text.jpg": (written(b"plain text\n"), "is not an image"),
    "46 page.png": (written(b"<!DOCTYPE html><html>404</html>"), "is not an image"),
    "47 drawing.jpg": (written(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), "is not an image"),
    "48 layers.jpg": (written(b"8BPS\0\1" + bytes(200)), "is not an image"),
    "48 postscript.jpg": (written(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "is not an image"),
    "48 stars.jpg": (written(b"SIMPLE  =                    T" + b" " * 3000), "is not an image"),
    "50 folder.jpg": (lambda path: path.mkdir(), "is a folder"),
    "51 dangling.jpg": (lambda path: path.symlink_to("nothing.jpg"), "is a dangling link"),
    "52 loop.jpg": (lambda path: path.symlink_to(path.name), "is a link to itself"),
    "57 pipe.jpg": (os.mkfifo, "is a pipe or device"),
}
