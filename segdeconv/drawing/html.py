"""Pages that a browser opens from disk: one file with everything inside, whatever the names in it are."""

import base64
import hashlib
import io
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from segdeconv.system.files import replace_text

MOST_BYTES = 40_000  # of one picture
NOTHING = "–"  # where there is no number


class Picture(NamedTuple):
    """A picture inside a page. width, height: in pixels, as it lies there. few: whether it is a map of few colours."""

    uri: str
    width: int
    height: int
    few: bool


def picture(image: np.ndarray, *, few: bool = False) -> Picture:
    """(H, W, 3) uint8 -> a WebP of at most MOST_BYTES, smaller if it must be.

    few: kept without loss, for a map of classes.
    """
    made = Image.fromarray(image)
    while True:
        content = io.BytesIO()
        made.save(content, format="WEBP", lossless=few, quality=80, method=2)
        if content.tell() <= MOST_BYTES or max(made.size) <= 32:
            break
        half = (max(1, made.width * 3 // 4), max(1, made.height * 3 // 4))
        made = made.resize(half, Image.Resampling.NEAREST if few else Image.Resampling.BILINEAR)
    return Picture(f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}", *made.size, few)


def render(template: str, **content: Any) -> str:
    """A page from segdeconv/drawing/pages. All that is put in is text, unless the template made it."""
    style, script = (Markup(_part(name)) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _pages().get_template(template).render(style=style, script=script, script_digest=digest, **content)


def write(html: str, path: Path) -> None:
    """Whole or not at all; what of a file's name is no Unicode becomes a question mark."""
    replace_text(path, html.encode(errors="replace").decode())


@cache
def _pages() -> Environment:
    pages = Environment(
        loader=PackageLoader("segdeconv.drawing", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(percent=percent, points=points, count=count, number=number, colour=colour)
    return pages


def _part(name: str) -> str:
    return resources.files("segdeconv.drawing").joinpath("pages", name).read_text()


# Numbers for reading.


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent.

    >>> percent(0.5407), percent(None)
    ('54.1', '–')
    """
    return NOTHING if value is None else f"{100 * value:.{digits}f}"


def points(value: float | None) -> str:
    """A difference of fractions, in percentage points.

    >>> points(0.0312), points(-0.002), points(0.0), points(None)
    ('+3.1', '−0.2', '0.0', '–')
    """
    if value is None:
        return NOTHING
    text = f"{abs(100 * value):.1f}"
    return text if text == "0.0" else f"{'+' if value > 0 else '−'}{text}"


def count(value: float | None) -> str:
    """A whole number.

    >>> count(1601620), count(None)
    ('1,601,620', '–')
    """
    return NOTHING if value is None else f"{value:,}"


def number(value: float | None, digits: int = 3) -> str:
    """Any number to three digits.

    >>> number(0.012345), number(2.0), number(None)
    ('0.0123', '2', '–')
    """
    return NOTHING if value is None else f"{value:.{digits}g}"


def colour(value: Iterable[int]) -> str:
    """RGB as CSS writes it.

    >>> colour((255, 0, 16))
    '#ff0010'
    """
    return "#{:02x}{:02x}{:02x}".format(*value)
