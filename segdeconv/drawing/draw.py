"""Figures of images and masks, as arrays and as PNG files."""

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segdeconv.classes import Classes
from segdeconv.drawing.png import Png
from segdeconv.errors import UsageError
from segdeconv.system.files import replacing

RIGHT, WRONG = (70, 160, 90), (220, 50, 47)
MIN_LEGEND_WIDTH = 256  # pixels; narrower images are enlarged so that their legend is legible
MAX_SAMPLE = 1 << 24  # pixels whose percentiles are computed
BAND = 1024  # rows of a large figure that are drawn at once
GAP = 4  # pixels between the tiles of a grid


class Window(NamedTuple):
    """The values of an image that are shown as black and as white, in the units of its file; others are clipped.

    In the terms of radiology, the level is their mean and the window width their difference.
    """

    low: float
    high: float


Labels = Literal["index", "dataset"]  # values of mask files: class indices, or as the data set's own masks have them


def save_mask(mask: np.ndarray, classes: Classes, path: Path, *, labels: Labels = "index") -> None:
    """Write a mask as a palette PNG, whose pixels are the class indices and whose palette is the class colours.

    Args:
        mask: (H, W) uint8 class indices.
        classes: The classes and their colours.
        path: The PNG file.
        labels: Write class indices, or the labels or colours of the data set's own masks; see `save_labels`.
    """
    if labels == "dataset":
        save_labels(mask, classes, path)
        return
    with replacing(path) as file:
        png = Png(file, (mask.shape[0], mask.shape[1]), palette=classes.palette)
        png.write(mask)
        png.close()


def save_labels(mask: np.ndarray, classes: Classes, path: Path) -> None:
    """Write a mask as the data set stores its own: with its labels or, if its classes are given by colours, as RGB.

    Labels up to 255 are a palette PNG in the class colours, larger ones a 16-bit grey PNG.

    Args:
        mask: (H, W) uint8 class indices.
        classes: The classes, their labels and their colours.
        path: The PNG file.

    Raises:
        UsageError: A label cannot be stored in a PNG.
    """
    if classes.by_colour:
        save_image(classes.palette[mask], path)
        return
    table = label_table(classes)
    with replacing(path) as file:
        if table.max() > 255:
            Image.fromarray(table[mask]).save(file, format="PNG")
            return
        palette = np.zeros((256, 3), dtype=np.uint8)
        palette[table] = classes.palette  # first the ignored values, all with one label, then the classes
        palette[table[: len(classes)]] = classes.palette[: len(classes)]
        png = Png(file, (mask.shape[0], mask.shape[1]), palette=palette)
        png.write(table.astype(np.uint8)[mask])
        png.close()


def label_table(classes: Classes) -> np.ndarray:
    """Return the data set's label of every mask value, (256,) uint16; values without a class have an ignored label.

    Raises:
        UsageError: A label cannot be stored in a PNG.
    """
    for name, label in zip(classes.names, classes.labels, strict=True):
        if not 0 <= label <= 65535:
            raise UsageError(
                f"class {name} has label {label}, and a PNG stores 0..65535 - use --labels index, or another label"
            )
    # A data set of labels 0 and 255 has no ignored label; a prediction never needs one there.
    free = [label for label in range(255, -1, -1) if label not in classes.labels]
    ignored = [
        label
        for label in (classes.ignore_index, *classes.ignored_labels)
        if label in classes.ignored_labels and label not in classes.labels and 0 <= label <= 65535
    ]
    table = np.full(256, [*ignored, *free, 0][0], dtype=np.uint16)
    table[: len(classes)] = classes.labels
    return table


def save_image(image: np.ndarray, path: Path) -> None:
    """Write a uint8 image as a PNG: (H, W, 3) in RGB, or (H, W) in grey."""
    with replacing(path) as file:
        png = Png(file, (image.shape[0], image.shape[1]), channels=image.shape[2] if image.ndim == 3 else 1)
        png.write(image)
        png.close()


def save_overlay(image: np.ndarray, mask: np.ndarray, classes: Classes, path: Path, *, outlines: bool = False) -> None:
    """Write `overlay_with_legend` as a PNG; a large one is drawn in bands to save memory.

    Args:
        image: (H, W, C) image, as in `to_rgb`.
        mask: (H, W) uint8 class indices.
        classes: The classes and their colours.
        path: The PNG file.
        outlines: As in `overlay`.
    """
    height, width = mask.shape
    if height <= BAND or width < MIN_LEGEND_WIDTH:
        save_image(overlay_with_legend(image, mask, classes, outlines=outlines), path)
        return
    limits = None if image.dtype == np.uint8 else stretch_limits(image)
    thickness = outline_thickness(mask.shape)
    present = [index for index, count in enumerate(pixel_counts(mask)[: len(classes)]) if count]
    strip = legend(classes, present, width)
    with replacing(path) as file:
        png = Png(file, (height + len(strip), width), channels=3)
        for top in range(0, height, BAND):
            above = max(0, top - thickness)  # the outlines of a row depend on the rows around it
            rows = slice(above, top + BAND + thickness)
            shown = to_rgb(image[rows], limits)
            drawn = overlay(shown, mask[rows], classes, outlines=outlines, thickness=thickness)
            png.write(drawn[top - above :][:BAND])
        png.write(strip)
        png.close()


def pixel_counts(mask: np.ndarray) -> list[int]:
    """Count the pixels of an (H, W) uint8 mask for each of the values 0 to 255."""
    counts = np.zeros(256, dtype=np.int64)
    for top in range(0, len(mask), BAND):  # in bands, because NumPy converts every pixel to 8 bytes
        counts += np.bincount(mask[top : top + BAND].ravel(), minlength=256)
    return [int(count) for count in counts]


def windowed(image: np.ndarray, window: Window | None) -> np.ndarray:
    """Convert an (H, W, C) uint8 or uint16 image to uint8 for display by a window; unchanged if that is None.

    Raises:
        UsageError: See `require_window`.
    """
    if window is None:
        return image
    bits = 8 * image.dtype.itemsize
    require_window(window, bits)
    values = np.arange(1 << bits, dtype=np.float64)
    table = (255 * (values - window.low) / (window.high - window.low)).clip(0, 255).round().astype(np.uint8)
    result = np.empty(image.shape, dtype=np.uint8)
    for top in range(0, len(image), BAND):  # in bands, because NumPy converts every index to 8 bytes
        result[top : top + BAND] = table[image[top : top + BAND]]
    return result


def require_window(window: Window, bits: int) -> None:
    """Check a window for images of 8 or 16 bits.

    Raises:
        UsageError: Images of so few bits have no such values.
    """
    largest = (1 << bits) - 1
    if window.high > largest or window.low >= largest or window.high <= 0:
        raise UsageError(
            f"--window={window.low:g},{window.high:g} is outside the values 0 to {largest} of images that are read as "
            f"{bits} bits - give two of them"
            + (", or train with dataset.channels to keep 16 bits" if bits == 8 else "")
        )


Limits = tuple[np.ndarray, np.ndarray]  # (3,) each: what becomes black, and what becomes white


def to_rgb(image: np.ndarray, limits: Limits | None = None) -> np.ndarray:
    """Convert an (H, W, C) uint8 or uint16 image to (H, W, 3) uint8 for display.

    One channel becomes grey, two become red and cyan; of more than three, the first three are used. The values of a
    16-bit image are stretched between `limits`; by default its `stretch_limits`.
    """
    if image.dtype == np.uint8:
        return image[:, :, _shown(image)]
    low, high = limits or stretch_limits(image)
    image = image[:, :, _shown(image)]
    return ((image - low) / np.maximum(high - low, 1) * 255).clip(0, 255).astype(np.uint8)


def stretch_limits(image: np.ndarray) -> Limits:
    """Return the 1st and the 99th percentile of each shown channel; of a large image, those of a regular sample."""
    step = max(1, math.isqrt(image.shape[0] * image.shape[1] // MAX_SAMPLE))
    low, high = np.percentile(image[::step, ::step, _shown(image)], (1, 99), axis=(0, 1))
    return low, high


def _shown(image: np.ndarray) -> list[int]:
    return [0, 0, 0] if image.shape[2] == 1 else [0, 1, 1] if image.shape[2] == 2 else [0, 1, 2]


def colourise(mask: np.ndarray, classes: Classes) -> np.ndarray:
    """Convert (H, W) class indices to (H, W, 3) uint8 colours; see `Classes.display_colours`."""
    return classes.display_palette[mask]


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    classes: Classes,
    *,
    outlines: bool = False,
    strength: float = 0.55,
    thickness: int | None = None,
) -> np.ndarray:
    """Draw the classes over an image; the background (`Classes.background`) and ignored pixels show the image.

    Args:
        image: (H, W, C) image, as in `to_rgb`.
        mask: (H, W) uint8 class indices.
        classes: The classes and their colours.
        outlines: Draw only the outlines of the regions, each inside its region and in the colour of its class.
            Otherwise the regions are filled, with a pale line between them and a line of full colour towards pixels
            that show the image.
        strength: Weight of the colours of filled regions, 0..1.
        thickness: Thickness of `outlines` in pixels; None for `outline_thickness`.

    Returns:
        (H, W, 3) uint8.
    """
    image, colours = np.ascontiguousarray(to_rgb(image)), colourise(mask, classes)
    shown = np.zeros(256, dtype=bool)  # values whose pixels show the image
    shown[[classes.ignore_index] if classes.background is None else [classes.ignore_index, classes.background]] = True
    clear = shown[mask]
    if outlines:
        thickness = thickness or outline_thickness(mask.shape)
        square = np.ones((2 * thickness + 1, 2 * thickness + 1), dtype=np.uint8)
        line = (cv2.dilate(mask, square) != cv2.erode(mask, square)) & ~clear
        return np.where(line[:, :, None], colours, image)
    result = cv2.addWeighted(image, 1 - strength, colours, strength, 0)
    pale, full = np.zeros(mask.shape, dtype=bool), np.zeros(mask.shape, dtype=bool)
    for before, after in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        pale[after] |= mask[after] != mask[before]
        full[after] |= clear[before]
        full[before] |= clear[after]
    result[pale] = result[pale] // 2 + 127
    np.copyto(result, colours, where=full[:, :, None])
    np.copyto(result, image, where=clear[:, :, None])
    return result


def outline_thickness(size: tuple[int, ...]) -> int:
    """Return the thickness in pixels of the outlines in an (H, W) image.

    Examples:
        >>> outline_thickness((360, 480)), outline_thickness((1024, 2048))
        (1, 4)
    """
    return max(1, (max(size[:2]) + 250) // 500)


def error(mask: np.ndarray, prediction: np.ndarray, ignore_index: int) -> np.ndarray:
    """Draw where a prediction is correct and where it is wrong.

    Args:
        mask: (H, W) uint8 class indices.
        prediction: (H, W) uint8 class indices.
        ignore_index: Value of ignored pixels in the mask.

    Returns:
        (H, W, 3) uint8: green for correct, red for wrong and dark for ignored pixels.
    """
    picture = np.where((mask == prediction)[:, :, None], RIGHT, WRONG).astype(np.uint8)
    picture[mask == ignore_index] = 30
    return picture


def heat(values: np.ndarray, top: float) -> np.ndarray:
    """Map (H, W) values from 0 to `top` to (H, W, 3) uint8 colours, from black through red to pale yellow."""
    scaled = (255 * values / (top or 1)).clip(0, 255).astype(np.uint8)
    return cv2.applyColorMap(scaled, cv2.COLORMAP_INFERNO)[:, :, ::-1]


FOR, AGAINST = (179, 69, 31), (33, 94, 168)  # the colours of values above and below zero, also for the colour-blind


def diverging(values: np.ndarray, image: np.ndarray | None = None) -> np.ndarray:
    """Map (H, W) values from -1 to 1 to (H, W, 3) uint8 colours: blue below zero, red above.

    Args:
        values: The values.
        image: (H, W, 3) uint8, shown pale and in grey where values are zero; None for white.
    """
    ground = np.full((*values.shape, 3), 255.0)
    if image is not None:
        ground = np.repeat(170 + image.mean(axis=2, keepdims=True) / 3, 3, axis=2)
    strength = np.abs(values).clip(0, 1)[:, :, None]
    colours = np.where(values[:, :, None] > 0, np.array(FOR, float), np.array(AGAINST, float))
    return np.asarray((ground + strength * (colours - ground)).round().astype(np.uint8))


def legend(classes: Classes, present: Sequence[int], width: int) -> np.ndarray:
    """Draw the legend of overlays: a strip with a colour patch and a name for each class, in as many rows as needed.

    The patch of the background, which overlays leave clear, is crossed out.

    Args:
        classes: The classes and their colours.
        present: Class indices in the legend.
        width: Width of the strip in pixels.
    """
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
            clear = index == classes.background
            fill = (255, 255, 255) if clear else classes.display_colours[index]
            draw.rectangle((x, y, x + 14, y + 14), fill=fill, outline=(90, 90, 90))
            if clear:
                draw.line((x, y + 14, x + 14, y), fill=(90, 90, 90))
            draw.text((x + 20, y), classes.names[index], fill=(20, 20, 20), font=letters)
    return np.asarray(strip)


def overlay_with_legend(
    image: np.ndarray, mask: np.ndarray, classes: Classes, *, everything: bool = False, outlines: bool = False
) -> np.ndarray:
    """Draw the overlay with a legend below it; a narrow image is enlarged by a whole factor for a legible legend.

    Args:
        image: (H, W, C) image, as in `to_rgb`.
        mask: (H, W) uint8 class indices.
        classes: The classes and their colours.
        everything: Include all classes in the legend, also those that the mask does not contain.
        outlines: As in `overlay`.
    """
    factor = max(1, -(-MIN_LEGEND_WIDTH // image.shape[1]))
    picture = enlarged(overlay(image, mask, classes, outlines=outlines), factor * image.shape[0])
    present = range(len(classes)) if everything else [int(value) for value in np.unique(mask) if value < len(classes)]
    return np.concatenate([picture, legend(classes, present, picture.shape[1])])


def row(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Join (H, W, 3) tiles of the same height side by side."""
    gap = np.full((tiles[0].shape[0], GAP, 3), 255, dtype=np.uint8)
    parts: list[np.ndarray] = []
    for tile in tiles:
        parts += [tile, gap]
    return np.concatenate(parts[:-1], axis=1)


def comparison(
    image: np.ndarray, mask: np.ndarray, prediction: np.ndarray, classes: Classes, *, outlines: bool = False
) -> np.ndarray:
    """Draw image, truth, prediction and error side by side.

    Args:
        image: (H, W, C) image, as in `to_rgb`.
        mask: (H, W) uint8 class indices.
        prediction: (H, W) uint8 class indices.
        classes: The classes and their colours.
        outlines: As in `overlay`.
    """
    image = to_rgb(image)
    truth, predicted = (overlay(image, labels, classes, outlines=outlines) for labels in (mask, prediction))
    return row([image, truth, predicted, error(mask, prediction, classes.ignore_index)])


def enlarged(picture: np.ndarray, min_height: int) -> np.ndarray:
    """Enlarge a picture by the smallest whole factor that makes it at least `min_height` pixels high."""
    factor = max(1, -(-min_height // picture.shape[0]))
    return np.kron(picture, np.ones((factor, factor, 1), dtype=np.uint8))


def confusion_picture(confusion: np.ndarray, classes: Classes) -> np.ndarray:
    """Draw a confusion matrix.

    Args:
        confusion: (C, C) pixel counts; rows are true classes, columns are predicted classes.
        classes: The classes.

    Returns:
        (S, S, 3) uint8. Cells with larger shares of their row are darker; the share is also written in percent.
    """
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
    """Return the default font of Pillow in the given size."""
    return ImageFont.load_default(size)
