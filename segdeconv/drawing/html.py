"""Self-contained HTML pages: each is a single file that a browser opens from disk. All content is escaped."""

import base64
import hashlib
import io
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from segdeconv.classes import hex_colour
from segdeconv.system.files import replace_text

MAX_BYTES = 40_000  # of one picture
MISSING = "–"  # shown instead of a number that is None


class Picture(NamedTuple):
    """A picture in a page.

    Attributes:
        uri: The encoded picture as a data URI.
        width: Width of the encoded picture in pixels.
        height: Height of the encoded picture in pixels.
        few_colours: The picture has few colours, such as a mask.
    """

    uri: str
    width: int
    height: int
    few_colours: bool


def picture(image: np.ndarray, *, few_colours: bool = False) -> Picture:
    """Encode a picture as WebP, reduced in size until it has at most `MAX_BYTES`.

    Args:
        image: (H, W, 3) uint8.
        few_colours: Use lossless compression and nearest-neighbour resizing, for example for a mask.
    """
    resized = Image.fromarray(image)
    while True:
        content = io.BytesIO()
        resized.save(content, format="WEBP", lossless=few_colours, quality=80, method=2)
        if content.tell() <= MAX_BYTES or max(resized.size) <= 32:
            break
        size = (max(1, resized.width * 3 // 4), max(1, resized.height * 3 // 4))
        resized = resized.resize(size, Image.Resampling.NEAREST if few_colours else Image.Resampling.BILINEAR)
    uri = f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
    return Picture(uri, *resized.size, few_colours)


def render(template: str, **content: Any) -> str:
    """Render a template of segdeconv/drawing/pages.

    Args:
        template: Name of the template.
        content: Variables of the template; they are escaped.
    """
    style, script = (Markup(_part(name)) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _pages().get_template(template).render(style=style, script=script, script_digest=digest, **content)


def write(html: str, path: Path) -> None:
    """Write a page atomically.

    File names in it may contain bytes that are not valid Unicode; each becomes a question mark.
    """
    replace_text(path, html)


@cache
def _pages() -> Environment:
    pages = Environment(
        loader=PackageLoader("segdeconv.drawing", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(percent=percent, points=points, count=count, number=number, colour=hex_colour)
    return pages


def _part(name: str) -> str:
    return resources.files("segdeconv.drawing").joinpath("pages", name).read_text(encoding="utf-8")


# Formatting of numbers.


def percent(value: float | None, digits: int = 1) -> str:
    """Format a fraction in percent.

    Examples:
        >>> percent(0.5407), percent(None)
        ('54.1', '–')
    """
    return MISSING if value is None else f"{100 * value:.{digits}f}"


def points(value: float | None) -> str:
    """Format a difference of fractions in percentage points.

    Examples:
        >>> points(0.0312), points(-0.002), points(0.0), points(None)
        ('+3.1', '−0.2', '0.0', '–')
    """
    if value is None:
        return MISSING
    text = f"{abs(100 * value):.1f}"
    return text if text == "0.0" else f"{'+' if value > 0 else '−'}{text}"


def count(value: float | None) -> str:
    """Format a whole number with commas.

    Examples:
        >>> count(1601620), count(None)
        ('1,601,620', '–')
    """
    return MISSING if value is None else f"{value:,}"


def number(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` significant digits.

    Examples:
        >>> number(0.012345), number(2.0), number(None)
        ('0.0123', '2', '–')
    """
    return MISSING if value is None else f"{value:.{digits}g}"
