"""Pictures of masks: arrays in, arrays out."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segdeconv.classes import Classes
from segdeconv.drawing.png import Png
from segdeconv.system.files import replacing

RIGHT, WRONG = (70, 160, 90), (220, 50, 47)
LEGIBLE = 256  # pixels that a legend needs; narrower pictures are enlarged
BAND = 1024  # rows of a large picture that are drawn at once
GAP = 4  # pixels between the tiles of a grid


def save_mask(mask: np.ndarray, classes: Classes, path: Path) -> None:
    """(H, W) uint8 class indices -> a palette PNG: its pixels are the indices, its palette the class colours."""
    with replacing(path) as file:
        picture = Png(file, (mask.shape[0], mask.shape[1]), palette=classes.palette)
        picture.write(mask)
        picture.close()


def save_image(image: np.ndarray, path: Path) -> None:
    """(H, W, 3) uint8, or (H, W) for shades of grey -> PNG."""
    with replacing(path) as file:
        picture = Png(file, (image.shape[0], image.shape[1]), channels=image.shape[2] if image.ndim == 3 else 1)
        picture.write(image)
        picture.close()


def save_overlay(image: np.ndarray, mask: np.ndarray, classes: Classes, path: Path) -> None:
    """What `overlay_with_legend` shows -> PNG, made some rows at a time where it is large."""
    height, width = mask.shape
    if height <= BAND or width < LEGIBLE or image.dtype != np.uint8:
        save_image(overlay_with_legend(image, mask, classes), path)
        return
    present = [index for index, count in enumerate(pixel_counts(mask)[: len(classes)]) if count]
    strip = legend(classes, present, width)
    with replacing(path) as file:
        picture = Png(file, (height + len(strip), width), channels=3)
        for top in range(0, height, BAND):
            above = max(0, top - 1)  # an outline lies below the row that differs
            rows = slice(above, top + BAND)
            picture.write(overlay(image[rows], mask[rows], classes)[top - above :])
        picture.write(strip)
        picture.close()


def pixel_counts(mask: np.ndarray) -> list[int]:
    """How many pixels of a (H, W) uint8 mask have each of the values 0 to 255."""
    counts = np.zeros(256, dtype=np.int64)
    for top in range(0, len(mask), BAND):  # since NumPy makes 8 bytes of each that it counts
        counts += np.bincount(mask[top : top + BAND].ravel(), minlength=256)
    return [int(count) for count in counts]


def shown(image: np.ndarray) -> np.ndarray:
    """Any (H, W, C) uint8 or uint16 image as (H, W, 3) uint8.

    One channel is grey, two are red and cyan, more show the first three; 16 bit is stretched between the 1st and the
    99th percentile of each channel.
    """
    image = image[:, :, [0, 0, 0] if image.shape[2] == 1 else [0, 1, 1] if image.shape[2] == 2 else [0, 1, 2]]
    if image.dtype == np.uint8:
        return image
    low, high = np.percentile(image, (1, 99), axis=(0, 1))
    return ((image - low) / np.maximum(high - low, 1) * 255).clip(0, 255).astype(np.uint8)


def colourise(mask: np.ndarray, classes: Classes) -> np.ndarray:
    """(H, W) class indices -> (H, W, 3) uint8 class colours."""
    return classes.palette[mask]


def overlay(image: np.ndarray, mask: np.ndarray, classes: Classes, *, strength: float = 0.55) -> np.ndarray:
    """The class colours laid over the image, with outlines between classes; ignored pixels show the image."""
    image = shown(image)
    result = cv2.addWeighted(np.ascontiguousarray(image), 1 - strength, colourise(mask, classes), strength, 0)
    ignored = mask == classes.ignore_index
    if ignored.any():
        result[ignored] = image[ignored]
    edge = np.zeros(mask.shape, dtype=bool)
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edge[1:] |= mask[1:] != mask[:-1]
    result[edge] = result[edge] // 2 + 127
    return result


def error(mask: np.ndarray, prediction: np.ndarray, ignore_index: int) -> np.ndarray:
    """(H, W, 3) uint8: green where the prediction is right, red where it is wrong, dark where the truth is ignored."""
    picture = np.where((mask == prediction)[:, :, None], RIGHT, WRONG).astype(np.uint8)
    picture[mask == ignore_index] = 30
    return picture


def heat(values: np.ndarray, top: float) -> np.ndarray:
    """(H, W) numbers from 0 to `top` -> (H, W, 3) uint8, from black through red to pale yellow."""
    scaled = (255 * values / (top or 1)).clip(0, 255).astype(np.uint8)
    return cv2.applyColorMap(scaled, cv2.COLORMAP_INFERNO)[:, :, ::-1]


def legend(classes: Classes, present: Sequence[int], width: int) -> np.ndarray:
    """A strip of the given width with a colour patch and a name for each class present, in as many rows as it takes."""
    letters = font(12)
    rows: list[list[tuple[int, int]]] = [[]]  # (x, class index) per row
    x = 6
    for index in present:
        length = 20 + int(letters.getlength(classes.names[index])) + 12
        if x + length > width and rows[-1]:
            rows.append([])
            x = 6
        rows[-1].append((x, index))
        x += length
    strip = Image.new("RGB", (width, 20 * len(rows) + 4), (255, 255, 255))
    draw = ImageDraw.Draw(strip)
    for row, entries in enumerate(rows):
        for x, index in entries:
            y = 20 * row + 4
            draw.rectangle((x, y, x + 14, y + 14), fill=classes.colours[index], outline=(90, 90, 90))
            draw.text((x + 20, y), classes.names[index], fill=(20, 20, 20), font=letters)
    return np.asarray(strip)


def overlay_with_legend(
    image: np.ndarray, mask: np.ndarray, classes: Classes, *, everything: bool = False
) -> np.ndarray:
    """The overlay with a legend below; small images are enlarged by a whole factor so that the legend is legible.

    everything: all classes are in the legend, also those that are not in the mask.
    """
    factor = max(1, -(-LEGIBLE // image.shape[1]))
    picture = enlarged(overlay(image, mask, classes), factor * image.shape[0])
    present = range(len(classes)) if everything else [int(one) for one in np.unique(mask) if one < len(classes)]
    return np.concatenate([picture, legend(classes, present, picture.shape[1])])


def row(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """(H, W, 3) tiles of one height, side by side."""
    gap = np.full((tiles[0].shape[0], GAP, 3), 255, dtype=np.uint8)
    parts: list[np.ndarray] = []
    for tile in tiles:
        parts += [tile, gap]
    return np.concatenate(parts[:-1], axis=1)


def comparison(image: np.ndarray, mask: np.ndarray, prediction: np.ndarray, classes: Classes) -> np.ndarray:
    """Image, truth, prediction and error, side by side. image: as `shown` takes it."""
    image = shown(image)
    truth, found = overlay(image, mask, classes), overlay(image, prediction, classes)
    return row([image, truth, found, error(mask, prediction, classes.ignore_index)])


def enlarged(picture: np.ndarray, least: int) -> np.ndarray:
    """A small picture by the whole factor that makes it at least `least` pixels high."""
    factor = max(1, -(-least // picture.shape[0]))
    return np.kron(picture, np.ones((factor, factor, 1), dtype=np.uint8))


def confusion_picture(confusion: np.ndarray, classes: Classes) -> np.ndarray:
    """The confusion matrix as a picture: rows are the truth, each row's shares of the predictions as shades."""
    cell, letters = 34, font(11)
    margin = 10 + int(max(letters.getlength(name) for name in classes.names))
    side = margin + cell * len(classes) + 8
    picture = Image.new("RGB", (side, side), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    for truth, name in enumerate(classes.names):
        start = margin + truth * cell
        draw.text((margin - 6 - letters.getlength(name), start + 10), name, fill=(20, 20, 20), font=letters)
        turned = Image.new("RGB", (margin, 16), (255, 255, 255))
        ImageDraw.Draw(turned).text((6, 2), name, fill=(20, 20, 20), font=letters)
        picture.paste(turned.rotate(90, expand=True), (start + 8, 0))
        for prediction in range(len(classes)):
            share = float(shares[truth, prediction])
            shade = colorsys.hls_to_rgb(0.38 if truth == prediction else 0.02, 1 - 0.55 * share**0.5, 0.6)
            x = margin + prediction * cell
            fill = tuple(int(255 * channel) for channel in shade)
            draw.rectangle((x, start, x + cell - 2, start + cell - 2), fill=fill)
            if share >= 0.005:
                draw.text((x + 6, start + 10), f"{100 * share:.0f}", fill=(20, 20, 20), font=letters)
    return np.asarray(picture)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow."""
    return ImageFont.load_default(size)
