"""Six small data sets as people bring them, to choose the defaults of `dataset=folder` on.

    python -c "from segdeconv.experiments.study import small_sets; small_sets.write_all('DIR', '/data/CamVid')"

writes DIR/NAME/{train,val}/{images,masks}:

    camvid24    24 frames of CamVid, 11 classes
    poles       30 frames, two classes: poles and signs, and everything else
    cars        30 frames, two classes
    roads       30 frames, two classes
    membranes   30 drawn images: thin dark membranes between cells, in grey noise; masks of 0 and 255
    cells       29 tiles of images of scikit-image (coins, galaxies), with masks by a local threshold
"""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from segdeconv.data.datasets.camvid import CLASSES, CamVid
from segdeconv.errors import UsageError

BINARY = {"poles": ("pole", "sign_symbol"), "cars": ("car",), "roads": ("road",)}
IGNORED = 255


def write_all(folder: str | Path, camvid: str | Path) -> None:
    """Write the six data sets into new folders.

    Args:
        folder: The folder for them.
        camvid: CamVid's folder.
    """
    folder, val = Path(folder), CamVid("val", root=str(camvid))
    for name in ("camvid24", *BINARY):
        train = CamVid("train", root=str(camvid))
        for split, dataset, count in (("train", train, 24 if name == "camvid24" else 30), ("val", val, 34)):
            for index in np.linspace(0, len(dataset) - 1, count).round().astype(int):
                image, mask, _ = dataset[int(index)]
                write(folder / name / split, dataset.pairs[index].image.stem, image, _relabelled(mask, name))
    for split, seed in (("train", 0), ("val", 1)):
        random = np.random.default_rng(seed)
        for number in range(30):
            write(folder / "membranes" / split, f"{number:02}", *draw_membranes(random))
    for number, (image, mask) in enumerate(cells()):
        write(folder / "cells" / ("val" if number % 3 == 1 else "train"), f"{number:02}", image, mask)


def write(folder: Path, name: str, image: np.ndarray, mask: np.ndarray) -> None:
    """Write an (H, W) or RGB (H, W, 3) image and its (H, W) mask, all uint8, as PNG files."""
    for kind, pixels in (("images", image), ("masks", mask)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(folder / kind / f"{name}.png"), pixels[..., ::-1] if pixels.ndim == 3 else pixels):
            raise UsageError(f"{folder / kind / name}.png cannot be written - choose another folder")


def _relabelled(mask: np.ndarray, name: str) -> np.ndarray:
    """Return a mask of CamVid with its two classes as 0 and 1, or unchanged."""
    if name not in BINARY:
        return mask
    foreground = np.isin(mask, [CLASSES.names.index(part) for part in BINARY[name]])
    return np.where(mask == CLASSES.ignore_index, IGNORED, foreground).astype(np.uint8)


def draw_membranes(random: np.random.Generator, side: int = 256, cells: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Draw membranes, 3 pixels wide, between the cells of a Voronoi diagram with warped borders, in noise.

    Returns:
        The image and the mask, (side, side) uint8; membranes are 255 in the mask.
    """
    warp = cv2.GaussianBlur(random.normal(size=(side, side, 2)), (0, 0), 12) * 160
    positions = np.moveaxis(np.mgrid[:side, :side], 0, -1) + warp
    centres = random.uniform(-20, side + 20, (cells, 2))
    nearest = np.argmin(((positions[:, :, None] - centres) ** 2).sum(-1), axis=-1).astype(np.float32)
    edges = (cv2.dilate(nearest, np.ones((3, 3))) != nearest).astype(np.uint8)
    brightness = random.uniform(120, 170) + 60 * cv2.GaussianBlur(random.normal(size=(side, side)), (0, 0), 20) * 20
    depth = random.uniform(40, 80)
    # Vesicles: dark spots that are not membranes.
    spots = np.zeros((side, side), np.uint8)
    for x, y in random.integers(0, side, (40, 2)).tolist():
        cv2.circle(spots, (x, y), int(random.integers(1, 4)), 1, -1)
    dark = cv2.GaussianBlur(np.maximum(edges, spots).astype(float), (0, 0), 1.0)
    image = brightness - depth * dark + random.normal(0, 18, (side, side))
    return image.clip(0, 255).astype(np.uint8), edges * 255


def cells() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield grey tiles of scikit-image's bundled images and their masks, 0 and 255, by a local threshold.

    Raises:
        UsageError: scikit-image is not installed.
    """
    try:
        from skimage import data  # type: ignore[import-not-found]
    except ImportError:
        raise UsageError("the set `cells` needs scikit-image - pip install scikit-image") from None
    for name, grid in (("coins", (3, 3)), ("hubble_deep_field", (4, 5))):
        image = getattr(data, name)()
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.ndim == 3 else image
        smooth = cv2.GaussianBlur(image, (0, 0), 2)
        mask = cv2.adaptiveThreshold(smooth, 255, cv2.ADAPTIVE_THRESH_MEAN_C, cv2.THRESH_BINARY, 151, -12)
        height, width = image.shape[0] // grid[0], image.shape[1] // grid[1]
        for row in range(grid[0]):
            for column in range(grid[1]):
                tile = np.s_[row * height : (row + 1) * height, column * width : (column + 1) * width]
                yield image[tile], mask[tile]
