"""Speed of the input: decoding, augmentation, the cache and the loader, each alone, in images per second."""

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
from segdeconv.data.datasets.shards import Shards
from segdeconv.data.loading import TrainingBatches, collate_training, for_network, training_loader
from segdeconv.data.module import IMAGENET_MEAN, IMAGENET_STD
from segdeconv.data.preprocessing import Preprocessing, Size
from segdeconv.data.shard_writer import write_shards
from segdeconv.data.transforms import build_transforms

SHARD_SIZE = 16 << 20  # bytes; CamVid's train images are 93 MiB
EPOCHS = 4  # of the loaders of files and of shards, the first of which is not timed

# Every image is scaled, cropped and recoloured; every other one is flipped.
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
    """Measure each part of the input, one after another, in this process and with one thread.

    Args:
        root: CamVid's folder; None to write PNG files of `shapes` with the same number of pixels into a temporary
            folder.
        size: Input size (H, W).
        batch_size: Images per batch.
        num_images: Maximum number of images.
        augment: A node as in configs/augment; None for scale, flip and colour.
        workers: Numbers of worker processes of the loader.

    Returns:
        Rows with `what`, `images_per_s` in wall-clock time, and `per_core`: images per second of this process's
        processor time, or for the loader images per second divided by the number of workers.
    """
    torch_threads, cv_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            dataset = CamVid("train", root) if root is not None else _shapes_as_files(Path(folder), size, num_images)
            rows = _rows(dataset, size, batch_size, num_images, augment or CONFIG, workers)
            write_shards([dataset], Path(folder, "shards"), shard_size=SHARD_SIZE)
            return [*rows, *_shards(dataset, Shards("train", str(Path(folder, "shards"))), size, batch_size)]
    finally:
        torch.set_num_threads(torch_threads)
        cv2.setNumThreads(cv_threads)


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
    cache_plan = plan_cache("memory", None, [dataset], [size])
    store = open_store(cache_plan, [dataset], [size])
    assert store is not None
    cached = Cached(dataset, store, size=size)
    decoding, caching = (TrainingBatches(source, preprocessing, augmentation) for source in (dataset, cached))

    rows = [_row("decode", lambda index: dataset[index], count)]
    rows.append(_row("decode and augment", lambda index: decoding[1, index], count))
    for index in range(count):
        cached[index]
    rows.append(_row("from the cache", lambda index: cached[index], count))
    rows.append(_row("from the cache and augment", lambda index: caching[1, index], count))
    samples = [caching[1, index] for index in range(batch_size)]
    batch = collate_training(samples)
    rows.append(_row("collate", lambda _: collate_training(samples), count // batch_size, batch_size))
    rows.append(
        _row("normalise on the CPU", lambda _: for_network(batch, preprocessing), count // batch_size, batch_size)
    )

    def collate_batch(index: int) -> None:
        if index % batch_size == batch_size - 1:
            collate_training([caching[1, position] for position in range(index - batch_size + 1, index + 1)])

    rows.append(_row("from the cache, augment and collate", collate_batch, count))
    for name, batches in (("decoding", decoding), ("from the cache", caching)):
        rows += [_loader(f"loader, {name}, {number} workers", batches, batch_size, number) for number in workers]
    return rows


def _row(what: str, call: Callable[[int], object], count: int, images: int = 1) -> dict[str, Any]:
    call(0)
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    for index in range(count):
        call(index)
    wall_seconds, cpu_seconds = time.perf_counter() - wall_start, time.process_time() - cpu_start
    return {"what": what, "images_per_s": count * images / wall_seconds, "per_core": count * images / cpu_seconds}


def _loader(what: str, samples: TrainingBatches, batch_size: int, num_workers: int) -> dict[str, Any]:
    """Time the second epoch of a loader, when its workers are already running."""
    epoch = 0
    loader = training_loader(
        samples, batch_size=batch_size, seed=0, position=lambda: (epoch, 0), num_workers=num_workers, timeout=120
    )
    for _ in loader:
        pass
    epoch = 1
    start, images = time.perf_counter(), 0
    for batch in loader:
        images += len(batch["mask"])
    per_second = images / (time.perf_counter() - start)
    return {"what": what, "images_per_s": per_second, "per_core": per_second / max(1, loader.num_workers)}


def _shards(
    files: SegmentationDataset, shards: SegmentationDataset, size: Size, batch_size: int
) -> list[dict[str, Any]]:
    """Time the loader without augmentation, from files and from shards: batch by batch in turns, in this process."""
    preprocessing = Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD)
    none = Augmentation({}, crop=size, ignore_index=files.classes.ignore_index, fill=IMAGENET_MEAN, seed=0)
    loaders = {
        name: training_loader(
            TrainingBatches(dataset, preprocessing, none),
            batch_size=batch_size,
            seed=0,
            position=lambda: (0, 0),
            num_workers=0,
            timeout=0,
        )
        for name, dataset in (("files", files), ("shards", shards))
    }
    wall, cpu, images = dict.fromkeys(loaders, 0.0), dict.fromkeys(loaders, 0.0), 0
    for epoch in range(EPOCHS):
        batches = {name: iter(loader) for name, loader in loaders.items()}
        for number in range(len(loaders["files"])):
            for name in sorted(batches, reverse=bool(number % 2)):
                wall_start, cpu_start = time.perf_counter(), time.process_time()
                next(batches[name])
                if epoch:  # the first reads the files into memory
                    wall[name] += time.perf_counter() - wall_start
                    cpu[name] += time.process_time() - cpu_start
            images += batch_size if epoch else 0
    return [
        {
            "what": f"loader without augmentation, from {name}",
            "images_per_s": images / wall[name],
            "per_core": images / cpu[name],
        }
        for name in loaders
    ]


def _shapes_as_files(folder: Path, size: Size, num_images: int) -> Folder:
    """Write `shapes` as PNG files, `num_images` of them in train, each with about as many pixels as `size`."""
    side = max(32, round((size[0] * size[1]) ** 0.5))
    for split, number in (("train", num_images), ("val", 1)):
        shapes = Shapes(split, num_train=number, num_val=number, side=side)
        for sub in ("images", "masks"):
            (folder / split / sub).mkdir(parents=True)
        for image, mask, name in (shapes[index] for index in range(number)):
            Image.fromarray(image).save(folder / split / "images" / f"{name}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{name}.png")
    return Folder("train", str(folder), classes=list(shapes.classes.names))
