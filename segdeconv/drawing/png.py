"""Writer of PNG files that takes some rows at a time, so that a large image need not be in memory as a whole.

Portable Network Graphics, second edition, https://www.w3.org/TR/PNG/
"""

import struct
import zlib
from typing import BinaryIO

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE = 0, 2, 3  # colour types
NONE, SUB, UP = 0, 1, 2  # filter types
FAST = 1  # zlib level; on photographs, level 4 is 3 % to 6 % smaller but takes twice as long
STEP = 1 << 22  # bytes that are filtered at once


class Png:
    """A PNG file that is written row by row: call `write` with the rows from the top, then `close`.

    Args:
        file: Binary file.
        size: Size (H, W).
        channels: 1 for grey or indices, 3 for RGB.
        palette: (n, 3) uint8 colours of the indices; None for grey or RGB.
    """

    def __init__(
        self, file: BinaryIO, size: tuple[int, int], *, channels: int = 1, palette: np.ndarray | None = None
    ) -> None:
        self.file, self.size, self.channels, self.rows = file, size, channels, 0
        self.photo = channels == 3
        self.deflate = zlib.compressobj(FAST if self.photo else 6, zlib.DEFLATED, 15, 9)
        self.above = np.zeros((1, size[1] * channels), dtype=np.uint8)
        colour = PALETTE if palette is not None else RGB if self.photo else GREY
        file.write(SIGNATURE)
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], 8, colour, 0, 0, 0))
        if palette is not None:
            self._chunk(b"PLTE", palette.astype(np.uint8).tobytes())

    def write(self, rows: np.ndarray) -> None:
        """Write the next n rows, (n, W) or (n, W, 3) uint8."""
        step = max(1, STEP // (self.size[1] * self.channels))
        for start in range(0, len(rows), step):
            self._write(np.ascontiguousarray(rows[start : start + step]).reshape(-1, self.size[1] * self.channels))

    def _write(self, flat: np.ndarray) -> None:
        lines = np.empty((len(flat), flat.shape[1] + 1), dtype=np.uint8)
        if self.photo:
            # Differences from the pixel above or on the left are small numbers, which compress better than colours.
            up = flat - np.concatenate([self.above, flat[:-1]])
            left = flat.copy()
            left[:, 3:] -= flat[:, :-3]
            smaller = _weight(up) <= _weight(left)
            lines[:, 0] = np.where(smaller, UP, SUB)
            lines[:, 1:] = np.where(smaller[:, None], up, left)
            self.above = flat[-1:].copy()
        else:
            lines[:, 0], lines[:, 1:] = NONE, flat  # differences between labels have no meaning
        self.rows += len(flat)
        packed = self.deflate.compress(lines.data)
        if packed:
            self._chunk(b"IDAT", packed)

    def close(self) -> None:
        """Write the end of the file; all rows must have been written."""
        assert self.rows == self.size[0], f"{self.rows} of {self.size[0]} rows were written"
        self._chunk(b"IDAT", self.deflate.flush())
        self._chunk(b"IEND", b"")

    def _chunk(self, kind: bytes, content: bytes) -> None:
        self.file.write(struct.pack(">I", len(content)) + kind + content)
        self.file.write(struct.pack(">I", zlib.crc32(content, zlib.crc32(kind))))


def _weight(differences: np.ndarray) -> np.ndarray:
    """Return the sum of the absolute values of each row's bytes, read as signed."""
    return np.minimum(differences, 0 - differences).sum(axis=1, dtype=np.int64)
