"""Predictions as a notebook shows them."""

import base64
import io
from html import escape

import cv2
import numpy as np
from PIL import Image

from segdeconv.classes import Classes, hex_colour
from segdeconv.drawing import draw

MAX_SIDE = 1024  # pixels of a shown picture; the size of a notebook is that of its pictures


def png(image: np.ndarray, mask: np.ndarray, classes: Classes, *, legend: bool = True) -> bytes:
    """Return the overlay of a mask as a PNG file, reduced to at most 1024 pixels a side.

    Args:
        image: (H, W, C) image, as in `draw.to_rgb`.
        mask: (H, W) uint8 class indices.
        classes: The classes and their colours.
        legend: Draw the legend below.
    """
    factor = MAX_SIDE / max(mask.shape)
    if factor < 1:
        size = max(1, round(factor * mask.shape[1])), max(1, round(factor * mask.shape[0]))
        image = cv2.resize(np.ascontiguousarray(draw.to_rgb(image)), size, interpolation=cv2.INTER_AREA)
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT)
    picture = draw.overlay_with_legend(image, mask, classes) if legend else draw.overlay(image, mask, classes)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def html(image: np.ndarray, mask: np.ndarray, classes: Classes) -> str:
    """Return the overlay of a mask and a legend with the share of the pixels of each class, the largest first.

    Args:
        image: (H, W, C) image, as in `draw.to_rgb`.
        mask: (H, W) uint8 class indices.
        classes: The classes and their colours.
    """
    counts = draw.pixel_counts(mask)
    present = sorted((index for index in range(len(classes)) if counts[index]), key=lambda index: -counts[index])
    entries = "".join(
        f'<span style="white-space:nowrap;margin-right:1em"><span style="display:inline-block;width:.8em;height:.8em;'
        f'border:1px solid #777;background:{_patch(classes, index)}"></span> {escape(classes.names[index])} '
        f"{100 * counts[index] / mask.size:.1f}&nbsp;%</span> "
        for index in present
    )
    picture = base64.b64encode(png(image, mask, classes, legend=False)).decode()
    description = escape(", ".join(classes.names[index] for index in present), quote=True)
    return (
        f'<figure style="margin:0"><img style="max-width:100%" alt="{description}" '
        f'src="data:image/png;base64,{picture}"><figcaption>{entries}</figcaption></figure>'
    )


def _patch(classes: Classes, index: int) -> str:
    return "none" if index == classes.background else hex_colour(classes.display_colours[index])
