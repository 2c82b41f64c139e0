"""A synthetic data set without files: overlapping shapes and textures in random colours."""

from typing import Annotated

import numpy as np
from pydantic import Field

from segdeconv.classes import Classes
from segdeconv.data.dataset import Sample, SegmentationDataset, require_split
from segdeconv.errors import UsageError
from segdeconv.system.seeding import key

CLASSES = Classes(
    names=("background", "disc", "ring", "cross", "stripes", "checker", "speckle"),
    colours=((0, 0, 0), (230, 80, 60), (60, 160, 230), (240, 190, 40), (90, 190, 90), (170, 90, 200), (240, 130, 180)),
)
NUM_OBJECTS = (1, 3)  # per image, inclusive
MAX_CACHE_BYTES = 128 << 20  # largest size of a split that is cached in memory


class Shapes(SegmentationDataset):
    """Images of one to three objects on a mottled background.

    **Content**: discs, rings and crosses, each filled with fine grain of a random colour, which differ by outline;
    stripes, checkers and speckles of any outline, which differ by texture; and a background mottled in two random
    colours. Colours are drawn independently for every object and background, so neither a colour nor a single pixel
    determines a class. Later objects hide earlier ones. A border of one to two pixels around every object is ignored,
    as in PASCAL VOC.

    **Layout**: none. Image i of a split is a function of (seed, split, i) alone, the same on every machine.

    **Classes**: seven, including the background; 255 is ignored.

    **Cite**: this project.

    Args:
        split: `train`, `val` or `test`.
        num_train: Number of train images.
        num_val: Number of val images, and of test images.
        side: Height and width of the images in pixels.
        data_seed: Seed of the images.

    Raises:
        UsageError: `split` is unknown.
    """

    classes = CLASSES
    split_names = ("train", "val", "test")

    def __init__(
        self,
        split: str,
        *,
        num_train: Annotated[int, Field(ge=1)] = 512,
        num_val: Annotated[int, Field(ge=1)] = 128,
        side: Annotated[int, Field(ge=32, le=4096)] = 64,
        data_seed: int = 0,
    ) -> None:
        require_split(split, self.split_names)
        self.split, self.side, self.data_seed = split, side, data_seed
        self.names = [f"{split}_{index:05d}" for index in range(num_train if split == "train" else num_val)]
        # Drawing an image takes 2 ms, as long as a small network trains on it, so a split that fits is cached.
        fits = len(self) * side**2 * 5 <= MAX_CACHE_BYTES
        self._cache: dict[int, tuple[Sample, np.ndarray]] | None = {} if fits else None

    def __getitem__(self, index: int) -> Sample:
        image, mask, name = self._drawn(index)[0]
        return Sample(image.copy(), mask.copy(), name)

    def instances(self, index: int) -> np.ndarray:
        return self._drawn(index)[1].copy()

    def _drawn(self, index: int) -> tuple[Sample, np.ndarray]:
        if not 0 <= index < len(self):
            raise UsageError(f"index {index} is out of range; shapes has {len(self)} images in '{self.split}'")
        if self._cache is None:
            return self._draw_sample(index)
        if index not in self._cache:
            self._cache[index] = self._draw_sample(index)
        return self._cache[index]

    def _draw_sample(self, index: int) -> tuple[Sample, np.ndarray]:
        """Draw a sample and its (H, W) object numbers, which follow the order of drawing."""
        random = np.random.Generator(np.random.Philox(key=key(self.data_seed, "shapes", self.split, index)))
        side = self.side
        image = _background(random, side)
        mask, instances = np.zeros((2, side, side), dtype=np.uint8)
        for number in range(1, 1 + random.integers(NUM_OBJECTS[0], NUM_OBJECTS[1] + 1)):
            label = int(random.integers(1, len(CLASSES)))
            inside, texture = _draw_object(random, side, CLASSES.names[label])
            border = _border(inside)
            image = np.where(inside[:, :, None], texture, image)
            mask[inside], instances[inside] = label, number
            mask[border], instances[border] = CLASSES.ignore_index, CLASSES.ignore_index
        return Sample(image.clip(0, 255).astype(np.uint8), mask, self.names[index]), instances

    @property
    def fingerprint(self) -> str:
        return f"shapes 3 {self.split} {len(self)} {self.side} {self.data_seed}"


def _noise(random: np.random.Generator, side: int) -> np.ndarray:
    """Return (side, side, 3) float: one random colour with grain."""
    return random.uniform(30, 225, size=3) + random.normal(0, 14, size=(side, side, 3))


def _background(random: np.random.Generator, side: int) -> np.ndarray:
    """Return (side, side, 3) float: patches about 4 pixels wide that blend two random colours."""
    coarse = random.uniform(0, 1, size=(side // 4 + 2, side // 4 + 2))
    position = np.arange(side) / 4
    lower = position.astype(int)
    share = position - lower
    rows = coarse[lower] * (1 - share)[:, None] + coarse[lower + 1] * share[:, None]
    patches = rows[:, lower] * (1 - share) + rows[:, lower + 1] * share
    mix = (3 * patches - 1).clip(0, 1)[:, :, None]
    return _noise(random, side) * mix + _noise(random, side) * (1 - mix)


def _draw_object(random: np.random.Generator, side: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw an object: its pixels, (side, side) bool, and their colours, (side, side, 3) float."""
    radius = random.uniform(0.18, 0.3) * side
    centre = random.uniform(0.2, 0.8, size=2) * side
    angle = random.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[0:side, 0:side] + 0.5
    y, x = rows - centre[0], columns - centre[1]
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x  # the object's own axes
    texture = _noise(random, side)
    outline = name
    if name in ("stripes", "checker", "speckle"):
        turn = 2 * np.pi / random.uniform(5, 7)  # period in pixels
        across, along = np.cos(turn * u), np.cos(turn * v)
        speckle = random.uniform(-1, 1, size=(side, side))
        wave = {"stripes": across, "checker": across * along, "speckle": speckle}[name]
        texture = np.where((wave > 0)[:, :, None], texture, 255 - texture)
        outline = ("disc", "square", "triangle", "cross")[random.integers(4)]
    if outline == "disc":
        inside = u**2 + v**2 < (0.95 * radius) ** 2
    elif outline == "ring":
        inside = (u**2 + v**2 < radius**2) & (u**2 + v**2 > (0.5 * radius) ** 2)
    elif outline == "square":
        inside = np.maximum(abs(u), abs(v)) < 0.84 * radius
    elif outline == "triangle":  # three sides, each 0.6 radius from the centre
        sides = [np.cos(turn) * u + np.sin(turn) * v for turn in (0, 2 * np.pi / 3, 4 * np.pi / 3)]
        inside = np.max(sides, axis=0) < 0.6 * radius
    else:
        inside = (np.maximum(abs(u), abs(v)) < 1.15 * radius) & (np.minimum(abs(u), abs(v)) < 0.32 * radius)
    return inside, texture


def _border(inside: np.ndarray) -> np.ndarray:
    """Return the pixels on either side of the outline, one pixel wide each."""
    border, down, across = np.zeros_like(inside), np.diff(inside, axis=0), np.diff(inside, axis=1)
    border[:-1] |= down
    border[1:] |= down
    border[:, :-1] |= across
    border[:, 1:] |= across
    return border
