"""From a checked config to the samples of training and validation: the `dataset` and `augment` nodes."""

import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from segdeconv.config import TARGET, build, check, deal, locate
from segdeconv.data.augmentation import Augmentation, Transform, mask_arguments
from segdeconv.data.cache import Cached, Kind, make_room, open_store
from segdeconv.data.checksums import verify
from segdeconv.data.crops import Crops
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.inspection import Inspection
from segdeconv.data.loading import EvaluationSamples, TrainingBatches
from segdeconv.data.mixing import Mix, Mixing
from segdeconv.data.preprocessing import Order, Preprocessing, resize_image, resize_mask
from segdeconv.data.relabelled import Relabelled
from segdeconv.errors import UsageError

Side = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class DataPipeline:
    """The train and val split of one data set, as samples of training and validation.

    size: (H, W) that the network sees, in training and prediction; None for each image's own.
    crop: (H, W) of training batches, cut at random after augmentation; None for `size`.
    mix, mix_probability: which part of another training image is pasted into an image, and how often; see
        `Mixing`.
    batch_size: images per process and step. num_workers: None for as many as suit the machine.
        More than the machine has cores for are not started.
    timeout: seconds after which a batch that does not come ends the run.
    cache: where decoded images stay after they were decoded once, see `cache.make_room`. cache_size: their bound in
        GiB; None for a quarter of the memory or disk that is free.
    mean, std: of each channel, in the units of the stored numbers. None is ImageNet's for 8-bit RGB, and what is
        measured on the train split for other images. The originals feed SegNet raw pixels: mean=[0,0,0], std=[1,1,1].
    order: of the channels as the network sees them. OpenCV, and so Caffe, reads `bgr`; mean and std stay those of the
        stored channels.
    """

    def __init__(
        self,
        train: SegmentationDataset,
        val: SegmentationDataset,
        transforms: Mapping[str, Transform],
        seed: int,
        *,
        size: tuple[Side, Side] | None = None,
        crop: tuple[Side, Side] | None = None,
        mix: Literal["none"] | Mix = "none",
        mix_probability: Annotated[float, Field(ge=0, le=1)] = 0.5,
        batch_size: Side = 4,
        num_workers: Annotated[int, Field(ge=0)] | None = None,
        timeout: Annotated[float, Field(ge=0)] = 120.0,
        cache: Kind = "auto",
        cache_size: Positive | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[Positive, ...] | None = None,
        order: Order = "rgb",
    ) -> None:
        self.train, self.val, self.seed, self.batch_size = train, val, seed, batch_size
        mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != train.channels:
                raise UsageError(
                    f"dataset.{name} has {len(values)} values and the images have {train.channels} channel(s) - give "
                    "one per channel, or leave it out"
                )
        if order == "bgr" and train.channels != 3:
            raise UsageError(
                f"dataset.order=bgr is an order of 3 channels and the images have {train.channels} - leave it out"
            )
        image, mask, _ = train[0]
        bits = 8 * image.dtype.itemsize
        self.preprocessing = Preprocessing(_size(size), tuple(mean), tuple(std), bits, train.as_stored, order)
        ignore_index = train.classes.ignore_index
        augmentation = Augmentation(
            transforms,
            crop=_size(crop) or _size(size),
            ignore_index=ignore_index,
            fill=self.preprocessing.mean,
            seed=seed,
        )
        seen_at = _size(size) or (image.shape[0], image.shape[1])
        augmentation.rehearse(resize_image(image, seen_at), resize_mask(mask, seen_at))
        self.workers: dict[str, Any] = {"num_workers": num_workers, "timeout": timeout}
        # Whole images are kept at the size that the network sees, unless they are still to be cut; val keeps its masks.
        splits = (train.whole, val.whole)
        sizes = tuple(_size(size) if split is split.whole else None for split in (train, val))
        self.room = make_room(cache, cache_size, splits, sizes)
        store = open_store(self.room, splits, sizes)
        if store is not None:
            train = train.through(lambda whole: Cached(whole, store, size=sizes[0]))
            val = val.through(lambda whole: Cached(whole, store, first=len(splits[0]), size=sizes[1], masks_too=False))
        mixing = None if mix == "none" else Mixing(mix, mix_probability, ignore_index=ignore_index, seed=seed)
        self.samples = TrainingBatches(train, self.preprocessing, augmentation, mixing)
        self.val_samples = EvaluationSamples(val, self.preprocessing)

    def batches_per_epoch(self, world_size: int) -> int:
        """Training batches of one epoch in one of so many processes."""
        return len(self.train) // (self.batch_size * world_size)


def _size(size: Sequence[int] | None) -> tuple[int, int] | None:
    return (size[0], size[1]) if size else None


def normalisation(node: Mapping[str, Any], dataset: SegmentationDataset, seen: Inspection) -> dict[str, Any]:
    """A `dataset` node with the mean and std that nobody chose.

    seen: what was measured on the train split. A channel that is the same everywhere is left as it is.
    """
    rgb = dataset.channels == 3 and seen.bits == 8
    usual = {
        "mean": list(IMAGENET_MEAN) if rgb else seen.mean,
        "std": list(IMAGENET_STD) if rgb else [value or 1.0 for value in seen.std],
    }
    return {**node, **{name: value for name, value in usual.items() if node[name] is None}}


# Who takes the keys of a `dataset` node beside the data set itself, and what the program supplies to them.
SCHEMAS = (verify, Relabelled, Crops, DataPipeline)
SUPPLIED = ("train", "val", "transforms", "seed", "dataset", "split")


def check_dataset(node: dict[str, Any]) -> dict[str, Any]:
    """The `dataset` node of a config: arguments of the data set, of the views of it, of the pipeline."""
    return check(node, "dataset", [locate(node, "dataset"), *SCHEMAS], supplied=SUPPLIED)


def build_split(node: Mapping[str, Any], split_name: str) -> SegmentationDataset:
    """One split of the data set that a checked `dataset` node names, its files held against their list if there is one;
    through its label_map, whole or in crops.
    """
    listed, view, crops, _, source = deal(node, SCHEMAS)
    dataset = typing.cast(SegmentationDataset, build(source, "dataset", split=split_name))
    verify(dataset, **listed)
    if view.get("label_map"):
        dataset = Relabelled(dataset, **view)
    return Crops(dataset, **crops) if crops.get("examples", "images") != "images" else dataset


def check_augment(nodes: dict[str, Any]) -> dict[str, Any]:
    """The `augment` node: transforms by name, in order; a name set to null is left out."""
    checked = {}
    for name, node in nodes.items():
        if node is not None:
            where = f"augment.{name}"
            # Against the signature, since albumentations only warns of arguments it does not know. Its own
            # defaults are not written in: they change with its version and this is the user's choice.
            defaults = check(node, where, [locate(node, where)])
            checked[name] = {key: defaults[key] for key in (TARGET, *node) if key in defaults}
    return checked


def build_pipeline(
    node: Mapping[str, Any],
    augment: dict[str, Any],
    train: SegmentationDataset,
    val: SegmentationDataset,
    *,
    seed: int,
) -> DataPipeline:
    """The pipeline of a checked `dataset` node that `normalisation` has completed, and of a checked `augment` node."""
    transforms = build_transforms(augment, ignore_index=train.classes.ignore_index, mean=node["mean"])
    _, _, _, settings, _ = deal(node, SCHEMAS)
    return DataPipeline(train, val, transforms, seed, **settings)


def build_transforms(nodes: dict[str, Any], *, ignore_index: int, mean: Sequence[float]) -> dict[str, Transform]:
    """The transforms of a checked `augment` node by name, told to fill masks with ignore_index."""
    transforms = {}
    for name, node in nodes.items():
        where = f"augment.{name}"
        told = mask_arguments(locate(node, where), node, ignore_index=ignore_index, fill=mean)
        transforms[name] = build({key: node[key] for key in node if key not in told}, where, **told)
    return transforms
