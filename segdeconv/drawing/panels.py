"""Figures that consist of titled panels. Every picture is an (H, W, 3) uint8 RGB array."""

import colorsys
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw

from segdeconv.drawing.draw import AGAINST, FOR, diverging, enlarged, font, heat

Colour = tuple[int, int, int]
INK, FAINT, WHITE = (25, 25, 25), (110, 110, 110), (255, 255, 255)
MARGIN, GAP, LINE = 16, 10, 17


class Panel(NamedTuple):
    """A picture with a caption below it."""

    picture: np.ndarray
    caption: str = ""


def figure(title: str, rows: Sequence[Sequence[Panel]], *, note: str = "", min_height: int = 0) -> np.ndarray:
    """Draw a figure: a title, rows of panels, and a note in full width below them.

    Args:
        title: Title; like captions and the note, it is broken into lines.
        rows: Panels of each row; empty rows are skipped.
        note: Text below the panels.
        min_height: Pictures lower than this are enlarged by a whole factor.
    """
    enlarged_rows = [
        [panel._replace(picture=enlarged(panel.picture, min_height)) for panel in row] for row in rows if row
    ]
    width = max(sum(panel.picture.shape[1] for panel in row) + GAP * (len(row) - 1) for row in enlarged_rows)
    title_lines = wrap_text(title, width, size=17)
    heights, captions = [], []
    for row in enlarged_rows:
        texts = [wrap_text(panel.caption, panel.picture.shape[1], size=12) if panel.caption else [] for panel in row]
        captions.append(texts)
        heights.append(max(panel.picture.shape[0] for panel in row) + LINE * max(map(len, texts)) + GAP)
    notes = wrap_text(note, width, size=12) if note else []
    head = 24 * len(title_lines) + 6
    canvas = Image.new("RGB", (width + 2 * MARGIN, head + sum(heights) + LINE * len(notes) + 2 * MARGIN), WHITE)
    pen = ImageDraw.Draw(canvas)
    for index, line in enumerate(title_lines):
        pen.text((MARGIN, MARGIN + 24 * index), line, fill=INK, font=font(17))
    y = MARGIN + head
    for row, texts, height in zip(enlarged_rows, captions, heights, strict=True):
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


def wrap_text(text: str, width: int, *, size: int) -> list[str]:
    """Break text between words into lines of at most `width` pixels; `size` is the font size."""
    lines: list[str] = []
    for word in text.split():
        if lines and font(size).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def swatches(entries: Sequence[tuple[Colour, str]]) -> np.ndarray:
    """Draw a legend with one line for each colour."""
    width = 30 + int(max(font(12).getlength(text) for _, text in entries))
    picture = Image.new("RGB", (width, 20 * len(entries) + 2), WHITE)
    pen = ImageDraw.Draw(picture)
    for index, (colour, text) in enumerate(entries):
        pen.rectangle((1, 20 * index + 2, 15, 20 * index + 16), fill=colour, outline=FAINT)
        pen.text((22, 20 * index + 2), text, fill=INK, font=font(12))
    return np.asarray(picture)


def bars(values: Sequence[float], colours: Sequence[Colour], *, top: float, size: tuple[int, int]) -> np.ndarray:
    """Draw a bar chart with the value of each bar in percent.

    Args:
        values: Heights of the bars, 0..top.
        colours: Colours of the bars.
        top: Value of a bar of full height.
        size: Size (H, W) of the picture.
    """
    picture = Image.new("RGB", size[::-1], WHITE)
    pen = ImageDraw.Draw(picture)
    step = size[1] / len(values)
    room = size[0] - 20
    for index, (value, colour) in enumerate(zip(values, colours, strict=True)):
        left, y = step * index + 4, size[0] - 1 - room * min(1.0, value / top)
        pen.rectangle((left, y, left + step - 9, size[0] - 1), fill=colour)
        pen.text((left, y - 16), f"{100 * value:.0f} %", fill=INK, font=font(11))
    return np.asarray(picture)


def arrows(displacement: np.ndarray, max_length: float) -> np.ndarray:
    """Draw displacements as colours: the hue is the direction, the saturation the length; white is zero.

    Args:
        displacement: (H, W, 2) displacements (dy, dx).
        max_length: Length that is fully saturated.
    """
    dy, dx = displacement[..., 0].astype(np.float32), displacement[..., 1].astype(np.float32)
    angle = np.degrees(np.arctan2(dy, dx)) % 360
    strength = np.hypot(dy, dx) / (max_length or 1)
    hsv = np.stack([angle, strength.clip(0, 1), np.full_like(angle, 1.0)], axis=-1).astype(np.float32)
    return (255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)).round().astype(np.uint8)


def wheel(side: int, max_length: float) -> np.ndarray:
    """Draw the legend of `arrows`: each pixel has the colour of the arrow from the middle to that pixel."""
    offsets = np.mgrid[:side, :side].transpose(1, 2, 0) - (side - 1) / 2
    picture = arrows(offsets * (2 * max_length / side), max_length)
    picture[np.hypot(*offsets.transpose(2, 0, 1)) > side / 2] = 255
    return picture


def scale(top: float, width: int, text: str) -> np.ndarray:
    """Draw the legend of `draw.heat`: a strip from 0 to `top`, with `text` as the unit."""
    strip = np.repeat(heat(np.linspace(0, 1, width)[None], 1.0), 12, axis=0)
    picture = Image.new("RGB", (width, 32), WHITE)
    picture.paste(Image.fromarray(np.ascontiguousarray(strip)), (0, 0))
    pen = ImageDraw.Draw(picture)
    pen.text((0, 14), "0", fill=INK, font=font(11))
    end = f"{top:.3g} {text}"
    pen.text((width - font(11).getlength(end), 14), end, fill=INK, font=font(11))
    return np.asarray(picture)


def diverging_scale(top: float, width: int) -> np.ndarray:
    """Draw the legend of `draw.diverging`: a strip from -`top` to `top`."""
    strip = np.repeat(diverging(np.linspace(-1, 1, width)[None]), 12, axis=0)
    picture = Image.new("RGB", (width, 32), WHITE)
    picture.paste(Image.fromarray(strip), (0, 0))
    pen = ImageDraw.Draw(picture)
    for place, text in ((0.0, f"{-top:.2g}"), (0.5, "0"), (1.0, f"{top:+.2g}")):
        pen.text((place * (width - font(11).getlength(text)), 14), text, fill=INK, font=font(11))
    return np.asarray(picture)


def signed_bars(values: Mapping[str, float], width: int) -> np.ndarray:
    """Draw horizontal bars from a common zero, red to the right for values above it, blue to the left for those below.

    Args:
        values: The length of each bar by its label.
        width: Width of the picture in pixels.
    """
    line, letters = 20, font(12)
    picture = Image.new("RGB", (width, line * len(values) + 4), WHITE)
    pen = ImageDraw.Draw(picture)
    texts = [f"{value:+.3g}" for value in values.values()]
    left = 12 + int(max(letters.getlength(label) for label in values))
    room = width - left - 24 - 2 * int(max(letters.getlength(text) for text in texts))
    zero = left + (width - left) // 2
    longest = max(abs(value) for value in values.values()) or 1.0
    for index, (label, value) in enumerate(values.items()):
        y, length = line * index + 2, round(room / 2 * value / longest)
        pen.text((0, y), label, fill=INK, font=letters)
        fill = FOR if value > 0 else AGAINST
        pen.rectangle((min(zero, zero + length), y + 1, max(zero, zero + length), y + 14), fill=fill)
        start = zero + length + 5 if value > 0 else zero + length - 5 - letters.getlength(texts[index])
        pen.text((start, y), texts[index], fill=INK, font=letters)
    pen.line((zero, 0, zero, picture.height), fill=FAINT)
    return np.asarray(picture)


def grid(pictures: Sequence[np.ndarray], columns: int, side: int) -> np.ndarray:
    """Arrange pictures in a grid, each fitted into a square, row by row.

    Args:
        pictures: The pictures, of any sizes.
        columns: Number of columns.
        side: Side of a square in pixels.
    """
    lines = math.ceil(len(pictures) / columns)
    canvas = np.full((lines * (side + 2) - 2, columns * (side + 2) - 2, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        y, x = (side + 2) * (index // columns), (side + 2) * (index % columns)
        canvas[y : y + side, x : x + side] = fitted(picture, side)
    return canvas


def fitted(picture: np.ndarray, side: int) -> np.ndarray:
    """Fit a picture into a light grey square of `side` pixels; an enlarged picture keeps sharp pixels."""
    factor = side / max(picture.shape[:2])
    height, width = (max(1, round(length * factor)) for length in picture.shape[:2])
    interpolation = cv2.INTER_NEAREST_EXACT if factor > 1 else cv2.INTER_AREA
    resized = cv2.resize(picture, (width, height), interpolation=interpolation)
    canvas = np.full((side, side, 3), 235, dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = resized
    return canvas


def hues(count: int) -> list[Colour]:
    """Return `count` distinguishable colours."""
    colours = [colorsys.hsv_to_rgb((0.07 + 0.618 * index) % 1, 0.75, 0.95) for index in range(count)]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colours]
