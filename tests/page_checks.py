"""Checks of HTML pages: rows of tables, contrast, and names that contain markup."""

from __future__ import annotations

from pathlib import Path

import fakes
from PIL import Image
from playwright.sync_api import Page

NAMES = ("<script>window.hit=1</script>", "a\"b'c & <b>bold</b>", "שלום 🙂")

FILES = ("<img src=x onerror='window.hit=1'>", '\u202egnp.exe & "x"', "صورة 🚲", "plain")

IGNORED = 255

SIZES = ((24, 33), (20, 31), (1, 1), (32, 27), (24, 33), (17, 20), (25, 25), (30, 30))


def hostile(folder: Path) -> Path:
    """Write a data set of images of many sizes whose file names a page must not interpret as HTML."""
    for index in range(16):
        size = SIZES[index % len(SIZES)]
        image, mask = fakes.image_and_mask(index, 3, size)
        mask[: size[0] // 4, : size[1] // 3] = IGNORED
        split = "train" if index < 8 else "val"
        name = FILES[index - 8] if 8 <= index < 8 + len(FILES) else f"{split}_{index}"
        for sub, array in (("images", image), ("masks", mask)):
            (folder / split / sub).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / split / sub / f"{name}.png")
    return folder


def rows(browser: Page, section: str, table: int = 0) -> list[list[str]]:
    """Return the text of each cell in a table's body, as the browser renders it."""
    body = browser.locator(f"#{section} table").nth(table).locator("tbody")
    return body.evaluate("(body) => [...body.rows].map((row) => [...row.cells].map((cell) => cell.innerText.trim()))")


def contrasts(browser: Page) -> list[list[object]]:
    """Return texts whose contrast with their background is below 4.5, the minimum of WCAG 2, each with its contrast."""
    return browser.evaluate(
        """() => {
          const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          const rgba = (colour) => {
            context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
            return context.getImageData(0, 0, 1, 1).data;
          };
          const luminance = ([r, g, b]) => {
            const linear = (v) => v / 255 <= 0.04045 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4;
            const [x, y, z] = [r, g, b].map(linear);
            return 0.2126 * x + 0.7152 * y + 0.0722 * z;
          };
          const background = (element) => {
            for (; element; element = element.parentElement) {
              const colour = rgba(getComputedStyle(element).backgroundColor);
              if (colour[3] > 250) return colour;
            }
          };
          const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), low = [];
          for (let node; (node = texts.nextNode()); ) {
            const element = node.parentElement, box = element.getBoundingClientRect();
            if (!node.data.trim() || !box.width || element.closest("dialog, script, template")) continue;
            const style = getComputedStyle(element);
            const front = luminance(rgba(element.closest("svg") ? style.fill : style.color));
            const back = luminance(background(element));
            const contrast = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
            if (contrast < 4.5) low.push([node.data.trim(), contrast]);
          }
          return low;
        }"""
    )
