"""The photos as the page shows them: thumbnails, and tiles at several scales, so that no large photo is sent whole."""

import io
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from segdeconv.data.files.reading import MAX_PIXELS, read_upright
from segdeconv.drawing.thumbnails import thumbnail_size
from segdeconv.errors import UsageError

TILE = 512  # side in pixels
THUMBNAIL_SIDE = 128
MAX_LEVEL = 12
MAX_THUMBNAILS = 20_000
PIXELS_IN_MEMORY = 60_000_000  # of photos at full size; the last one stays whatever its size


class Photos:
    """Thumbnails and tiles of photos, for any thread.

    Args:
        files: The file of each photo by name.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files
        self.guard = threading.Lock()
        self.levels: OrderedDict[str, dict[int, np.ndarray]] = OrderedDict()
        self.thumbnails: OrderedDict[str, bytes] = OrderedDict()

    def read(self, name: str) -> np.ndarray:
        """Return a photo, (H, W, 3) uint8, upright; the last ones stay in memory.

        Raises:
            UsageError: It cannot be read.
        """
        with self.guard:
            return self._levels(name)[0]

    def tile(self, name: str, level: int, row: int, column: int) -> bytes:
        """Return a tile as JPEG: of the photo reduced by 2**level, the square of side TILE in this row and column.

        Raises:
            UsageError: There is no such tile, or the photo cannot be read.
        """
        if not 0 <= level <= MAX_LEVEL:
            raise UsageError(f"level {level} does not exist - give 0..{MAX_LEVEL}")
        with self.guard:
            levels = self._levels(name)
            if level not in levels:
                factor = 2**level
                height, width = (-(-side // factor) for side in levels[0].shape[:2])
                levels[level] = cv2.resize(levels[0], (width, height), interpolation=cv2.INTER_AREA)
            image = levels[level]
        part = image[max(0, row) * TILE : (row + 1) * TILE, max(0, column) * TILE : (column + 1) * TILE]
        if row < 0 or column < 0 or not part.size:
            raise UsageError(f"tile {row}, {column} is outside the photo")
        return _jpeg(part, 90)

    def thumbnail(self, name: str) -> bytes:
        """Return the thumbnail of a photo as JPEG.

        Raises:
            UsageError: The photo cannot be read.
        """
        if name not in self.thumbnails:
            with self.guard:
                loaded = self.levels.get(name)
            image = loaded[0] if loaded else read_upright(self.files[name], max_pixels=MAX_PIXELS)[0]
            size = thumbnail_size(image.shape, THUMBNAIL_SIDE)
            self.thumbnails[name] = _jpeg(cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA), 85)
            while len(self.thumbnails) > MAX_THUMBNAILS:
                self.thumbnails.popitem(last=False)
        return self.thumbnails[name]

    def _levels(self, name: str) -> dict[int, np.ndarray]:
        if name not in self.levels:
            self.levels[name] = {0: read_upright(self.files[name], max_pixels=MAX_PIXELS)[0]}
        self.levels.move_to_end(name)
        while len(self.levels) > 1 and sum(each[0].size // 3 for each in self.levels.values()) > PIXELS_IN_MEMORY:
            self.levels.popitem(last=False)
        return self.levels[name]


def _jpeg(image: np.ndarray, quality: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality)
    return file.getvalue()
