"""Figures of titled panels: arrays in, arrays out. A picture is (H, W, 3) uint8 RGB."""

import colorsys
import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw

from segdeconv.drawing.draw import enlarged, font, heat

Colour = tuple[int, int, int]
INK, FAINT, WHITE = (25, 25, 25), (110, 110, 110), (255, 255, 255)
MARGIN, GAP, LINE = 16, 10, 17


class Panel(NamedTuple):
    """A picture and the words below it."""

    picture: np.ndarray
    caption: str = ""


def figure(title: str, rows: Sequence[Sequence[Panel]], *, note: str = "", least: int = 0) -> np.ndarray:
    """Rows of panels under a title, and a note in full width below.

    least: pictures lower than this are enlarged by a whole factor. Captions and note are broken into lines.
    """
    grown = [[panel._replace(picture=enlarged(panel.picture, least)) for panel in row] for row in rows if row]
    width = max(sum(panel.picture.shape[1] for panel in row) + GAP * (len(row) - 1) for row in grown)
    pieces = [*broken(title, width, size=17)]
    heights, captions = [], []
    for row in grown:
        texts = [broken(panel.caption, panel.picture.shape[1], size=12) if panel.caption else [] for panel in row]
        captions.append(texts)
        heights.append(max(panel.picture.shape[0] for panel in row) + LINE * max(map(len, texts)) + GAP)
    notes = broken(note, width, size=12) if note else []
    head = 24 * len(pieces) + 6
    canvas = Image.new("RGB", (width + 2 * MARGIN, head + sum(heights) + LINE * len(notes) + 2 * MARGIN), WHITE)
    pen = ImageDraw.Draw(canvas)
    for index, piece in enumerate(pieces):
        pen.text((MARGIN, MARGIN + 24 * index), piece, fill=INK, font=font(17))
    y = MARGIN + head
    for row, texts, height in zip(grown, captions, heights, strict=True):
        x = MARGIN
        for panel, lines in zip(row, texts, strict=True):
            canvas.paste(Image.fromarray(panel.picture), (x, y))
            for index, line in enumerate(lines):
                pen.text((x, y + panel.picture.shape[0] + 3 + LINE * index), line, fill=INK, font=font(12))
            x += panel.picture.shape[1] + GAP
        y += height
    for index, line in enumerate(notes):
        pen.text((MARGIN, y + LINE * index), line, fill=FAINT, font=font(12))
    return np.asarray(canvas)


def broken(text: str, width: int, *, size: int) -> list[str]:
    """Text in lines no wider than so many pixels, broken between words."""
    lines: list[str] = []
    for word in text.split():
        if lines and font(size).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def swatches(entries: Sequence[tuple[Colour, str]]) -> np.ndarray:
    """A legend: a line for each colour."""
    width = 30 + int(max(font(12).getlength(text) for _, text in entries))
    picture = Image.new("RGB", (width, 20 * len(entries) + 2), WHITE)
    pen = ImageDraw.Draw(picture)
    for index, (colour, text) in enumerate(entries):
        pen.rectangle((1, 20 * index + 2, 15, 20 * index + 16), fill=colour, outline=FAINT)
        pen.text((22, 20 * index + 2), text, fill=INK, font=font(12))
    return np.asarray(picture)


def bars(values: Sequence[float], colours: Sequence[Colour], *, top: float, size: tuple[int, int]) -> np.ndarray:
    """A bar for each value, from 0 to `top`, its value above it in percent. size: (H, W)."""
    picture = Image.new("RGB", size[::-1], WHITE)
    pen = ImageDraw.Draw(picture)
    step = size[1] / len(values)
    room = size[0] - 20
    for index, (value, colour) in enumerate(zip(values, colours, strict=True)):
        left, y = step * index + 4, size[0] - 1 - room * min(1.0, value / top)
        pen.rectangle((left, y, left + step - 9, size[0] - 1), fill=colour)
        pen.text((left, y - 16), f"{100 * value:.0f} %", fill=INK, font=font(11))
    return np.asarray(picture)


def arrows(displacement: np.ndarray, longest: float) -> np.ndarray:
    """(H, W, 2) displacements (dy, dx) -> a picture: hue says the direction, saturation the length; white for none.

    longest: the length that is fully saturated.
    """
    dy, dx = displacement[..., 0].astype(np.float32), displacement[..., 1].astype(np.float32)
    angle = np.degrees(np.arctan2(dy, dx)) % 360
    strength = np.hypot(dy, dx) / (longest or 1)
    hsv = np.stack([angle, strength.clip(0, 1), np.full_like(angle, 1.0)], axis=-1).astype(np.float32)
    return (255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)).round().astype(np.uint8)


def wheel(side: int, longest: float) -> np.ndarray:
    """The legend of `arrows`: the colour at a place is that of an arrow from the middle to it."""
    places = np.mgrid[:side, :side].transpose(1, 2, 0) - (side - 1) / 2
    picture = arrows(places * (2 * longest / side), longest)
    picture[np.hypot(*places.transpose(2, 0, 1)) > side / 2] = 255
    return picture


def scale(top: float, width: int, text: str) -> np.ndarray:
    """The legend of `draw.heat`: a strip from 0 to `top`."""
    strip = np.repeat(heat(np.linspace(0, 1, width)[None], 1.0), 12, axis=0)
    picture = Image.new("RGB", (width, 32), WHITE)
    picture.paste(Image.fromarray(np.ascontiguousarray(strip)), (0, 0))
    pen = ImageDraw.Draw(picture)
    pen.text((0, 14), "0", fill=INK, font=font(11))
    end = f"{top:.3g} {text}"
    pen.text((width - font(11).getlength(end), 14), end, fill=INK, font=font(11))
    return np.asarray(picture)


def grid(pictures: Sequence[np.ndarray], columns: int, side: int) -> np.ndarray:
    """Pictures fitted into squares of `side` pixels, row by row; missing ones are light grey."""
    lines = math.ceil(len(pictures) / columns)
    canvas = np.full((lines * (side + 2) - 2, columns * (side + 2) - 2, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        y, x = (side + 2) * (index // columns), (side + 2) * (index % columns)
        canvas[y : y + side, x : x + side] = fitted(picture, side)
    return canvas


def fitted(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture in the middle of a light grey square, as large as fits; pixels stay sharp where it is enlarged."""
    factor = side / max(picture.shape[:2])
    height, width = (max(1, round(length * factor)) for length in picture.shape[:2])
    interpolation = cv2.INTER_NEAREST_EXACT if factor > 1 else cv2.INTER_AREA
    resized = cv2.resize(picture, (width, height), interpolation=interpolation)
    canvas = np.full((side, side, 3), 235, dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = resized
    return canvas


def hues(count: int) -> list[Colour]:
    """So many colours that are told apart."""
    made = [colorsys.hsv_to_rgb((0.07 + 0.618 * index) % 1, 0.75, 0.95) for index in range(count)]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in made]
