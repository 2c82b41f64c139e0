"""How fast images come: decoding, augmentation, the cache and the loader, each alone, in images a second."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
from PIL import Image

from segdeconv.data.augmentation import Augmentation
from segdeconv.data.cache import Cached, open_store, plan_cache
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.datasets.camvid import CamVid
from segdeconv.data.datasets.folder import Folder
from segdeconv.data.datasets.shapes import Shapes
from segdeconv.data.loading import TrainingBatches, collate_training, for_network, training_loader
from segdeconv.data.module import IMAGENET_MEAN, IMAGENET_STD, build_transforms
from segdeconv.data.preprocessing import Preprocessing, Size

# Every image is scaled, cropped and coloured, every other one flipped.
CONFIG: dict[str, dict[str, Any]] = {
    "scale": {"_target_": "albumentations.RandomScale", "scale_limit": [-0.25, 0.75], "p": 1.0},
    "flip": {"_target_": "albumentations.HorizontalFlip", "p": 0.5},
    "light": {
        "_target_": "albumentations.ColorJitter",
        "brightness": [0.7, 1.3],
        "contrast": [0.7, 1.3],
        "saturation": [0.6, 1.4],
        "hue": [-0.05, 0.05],
        "p": 1.0,
    },
}


def measure(
    root: str | None = None,
    *,
    size: Size = (360, 480),
    batch_size: int = 4,
    num_images: int = 96,
    augment: Mapping[str, Mapping[str, Any]] | None = None,
    workers: Sequence[int] = (0, 1, 2),
) -> list[dict[str, Any]]:
    """What each part of the input gives, one after another in this process and with one thread.

    root: of CamVid; None for `shapes` of the same number of pixels, written as PNG files into a folder that is removed.
    num_images: that are gone through, at most. augment: a node as in configs/augment; None for scale, flip and colour.
    Returns rows of `what`, `images_per_s` by the clock, and `per_core`: by the processor time of this process, for the
    loader the first divided by its workers.
    """
    threads, threads_of_cv = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            dataset = CamVid("train", root) if root is not None else _written(Path(folder), size, num_images)
            return _rows(dataset, size, batch_size, num_images, augment or CONFIG, workers)
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads_of_cv)


def _rows(
    dataset: SegmentationDataset,
    size: Size,
    batch_size: int,
    num_images: int,
    augment: Mapping[str, Mapping[str, Any]],
    workers: Sequence[int],
) -> list[dict[str, Any]]:
    count = min(num_images, len(dataset)) // batch_size * batch_size
    ignore_index = dataset.classes.ignore_index
    preprocessing = Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD)
    augmentation = Augmentation(
        build_transforms(dict(augment), ignore_index=ignore_index, mean=IMAGENET_MEAN),
        crop=size,
        ignore_index=ignore_index,
        fill=IMAGENET_MEAN,
        seed=0,
    )
    room = plan_cache("memory", None, [dataset], [size])
    store = open_store(room, [dataset], [size])
    assert store is not None
    cached = Cached(dataset, store, size=size)
    plain, kept = (TrainingBatches(source, preprocessing, augmentation) for source in (dataset, cached))

    rows = [_row("decode", lambda index: dataset[index], count)]
    rows.append(_row("decode and augment", lambda index: plain[1, index], count))
    for index in range(count):
        cached[index]
    rows.append(_row("from the cache", lambda index: cached[index], count))
    rows.append(_row("from the cache and augment", lambda index: kept[1, index], count))
    samples = [kept[1, index] for index in range(batch_size)]
    batch = collate_training(samples)
    rows.append(_row("collate", lambda _: collate_training(samples), count // batch_size, batch_size))
    rows.append(
        _row("normalise on the CPU", lambda _: for_network(batch, preprocessing), count // batch_size, batch_size)
    )

    def whole(index: int) -> None:
        if index % batch_size == batch_size - 1:
            collate_training([kept[1, place] for place in range(index - batch_size + 1, index + 1)])

    rows.append(_row("from the cache, augment and collate", whole, count))
    for name, batches in (("decoding", plain), ("from the cache", kept)):
        rows += [_loader(f"loader, {name}, {number} workers", batches, batch_size, number) for number in workers]
    return rows


def _row(what: str, once: Callable[[int], object], count: int, images: int = 1) -> dict[str, Any]:
    once(0)
    begun, used = time.perf_counter(), time.process_time()
    for index in range(count):
        once(index)
    seconds, of_core = time.perf_counter() - begun, time.process_time() - used
    return {"what": what, "images_per_s": count * images / seconds, "per_core": count * images / of_core}


def _loader(what: str, samples: TrainingBatches, batch_size: int, num_workers: int) -> dict[str, Any]:
    """The second epoch of a loader, whose workers are running by then."""
    epoch = 0
    loader = training_loader(
        samples, batch_size=batch_size, seed=0, position=lambda: (epoch, 0), num_workers=num_workers, timeout=120
    )
    for _ in loader:
        pass
    epoch = 1
    begun, images = time.perf_counter(), 0
    for batch in loader:
        images += len(batch["mask"])
    per_second = images / (time.perf_counter() - begun)
    return {"what": what, "images_per_s": per_second, "per_core": per_second / max(1, loader.num_workers)}


def _written(folder: Path, size: Size, num_images: int) -> Folder:
    """`shapes` as somebody's PNG files, as many in train as are wanted, of about the area of `size` each."""
    side = max(32, round((size[0] * size[1]) ** 0.5))
    for split, number in (("train", num_images), ("val", 1)):
        drawn = Shapes(split, num_train=number, num_val=number, side=side)
        for sub in ("images", "masks"):
            (folder / split / sub).mkdir(parents=True)
        for image, mask, name in (drawn[index] for index in range(number)):
            Image.fromarray(image).save(folder / split / "images" / f"{name}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{name}.png")
    return Folder("train", str(folder), classes=list(drawn.classes.names))
