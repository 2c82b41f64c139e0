"""Training and validation samples from the `dataset` and `augment` nodes of a config."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from segdeconv.config import (
    TARGET,
    build,
    check,
    choice,
    locate,
    parameters_of,
    split_arguments,
    suggest_key,
)
from segdeconv.data.augmentation import Augmentation, Transform
from segdeconv.data.cache import Cached, Kind, open_store, plan_cache
from segdeconv.data.checksums import verify
from segdeconv.data.crops import Crops
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.inspection import Inspection
from segdeconv.data.joined import Joined
from segdeconv.data.loading import EvaluationSamples, TrainingBatches
from segdeconv.data.mixing import Mix, Mixing
from segdeconv.data.preprocessing import Order, Preprocessing, resize_image, resize_mask
from segdeconv.data.relabelled import Relabelled
from segdeconv.data.transforms import build_transforms
from segdeconv.errors import UsageError

Side = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class DataPipeline:
    """The train and val split of one data set as training and validation samples.

    Args:
        train: The train split.
        val: The val split.
        transforms: The augmentation, by name.
        seed: Seed of the augmentation, the mixing and the order of samples.
        train_on_val: Train on the val images too, which then say nothing about other images: for the last training,
            after all choices, and scores on test.
        size: (H, W) of the network's input in training and prediction; None for the size of each image.
        crop: (H, W) of training batches, cropped at random after augmentation; None for `size`.
        mix: The part of another training image that is pasted into an image, see `Mixing`.
        mix_probability: Probability that an image is mixed, 0..1.
        batch_size: Images per process and step.
        num_workers: Number of worker processes, limited by the number of cores; None chooses it for the machine.
        timeout: Seconds to wait for a batch before the run is stopped.
        cache: Where decoded images are cached, see `cache.plan_cache`.
        cache_size: Limit of the cache in GiB; None for a quarter of the available memory or free disk.
        mean: Mean of each channel, in the units of the stored numbers. None is ImageNet's for 8-bit RGB, and measured
            on the train split for other images. The original SegNet is fed raw pixels: mean=[0,0,0], std=[1,1,1].
        std: Standard deviation of each channel, like `mean`.
        order: Order of the channels of the network's input. OpenCV, and so Caffe, reads `bgr`; mean and std are those
            of the stored channels.

    Raises:
        UsageError: The images do not fit `mean`, `std`, `order`, a transform or the cache.
    """

    def __init__(
        self,
        train: SegmentationDataset,
        val: SegmentationDataset,
        transforms: Mapping[str, Transform],
        seed: int,
        *,
        train_on_val: bool = False,
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
        if train_on_val and train.whole is not train:
            raise UsageError("dataset.train_on_val=true needs whole images - use dataset.examples=images")
        self.seed, self.batch_size = seed, batch_size
        mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != train.channels:
                raise UsageError(
                    f"dataset.{name} has {len(values)} values, but the images have {train.channels} channel(s) - give "
                    "one value per channel, or leave it out"
                )
        if order == "bgr" and train.channels != 3:
            raise UsageError(
                f"dataset.order=bgr needs images of 3 channels, but they have {train.channels} - leave it out"
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
        input_size = _size(size) or (image.shape[0], image.shape[1])
        augmentation.dry_run(resize_image(image, input_size), resize_mask(mask, input_size))
        self.workers: dict[str, Any] = {"num_workers": num_workers, "timeout": timeout}
        # Whole images are cached at the input size unless crops are taken from them; val masks keep their stored size.
        splits = (train.whole, val.whole)
        sizes = tuple(_size(size) if split is split.whole else None for split in (train, val))
        self.cache_plan = plan_cache(cache, cache_size, splits, sizes)
        store = open_store(self.cache_plan, splits, sizes)
        if store is not None:
            train = train.wrap(lambda whole: Cached(whole, store, size=sizes[0]))
            val = val.wrap(lambda whole: Cached(whole, store, first=len(splits[0]), size=sizes[1], resize_masks=False))
        if train_on_val:
            train = Joined(train, val)
        if mix != "none" and train.locality is not None and train.locality.window <= train.locality.groups.max():
            raise UsageError(
                f"dataset.mix={mix} pastes from any image, but only dataset.window={train.locality.window} of the "
                f"{train.locality.groups.max() + 1} shards are read at a time - set dataset.window to their number, "
                "if the disk holds them all, or dataset.mix=none"
            )
        mixing = None if mix == "none" else Mixing(mix, mix_probability, ignore_index=ignore_index, seed=seed)
        self.train, self.val = train, val
        self.samples = TrainingBatches(train, self.preprocessing, augmentation, mixing)
        self.val_samples = EvaluationSamples(val, self.preprocessing)

    def batches_per_epoch(self, world_size: int) -> int:
        """Return the number of training batches of one epoch in each of `world_size` processes.

        Raises:
            UsageError: There are fewer val images than processes.
        """
        if len(self.val) < world_size:
            raise UsageError(
                f"the val split has {len(self.val)} images, fewer than the {world_size} processes that share them - "
                f"set trainer.devices={len(self.val)} or less, or make val larger"
            )
        return len(self.train) // (self.batch_size * world_size)


def _size(size: Sequence[int] | None) -> tuple[int, int] | None:
    return (size[0], size[1]) if size else None


def normalisation(node: Mapping[str, Any], dataset: SegmentationDataset, inspection: Inspection) -> dict[str, Any]:
    """Return a `dataset` node in which a missing mean or std is filled in.

    Args:
        node: A checked `dataset` node.
        dataset: The train split.
        inspection: The statistics of the train split. A constant channel gets a std of 1.
    """
    rgb = dataset.channels == 3 and inspection.bits == 8
    defaults = {
        "mean": list(IMAGENET_MEAN) if rgb else inspection.mean,
        "std": list(IMAGENET_STD) if rgb else [value or 1.0 for value in inspection.std],
    }
    return {**node, **{name: value for name, value in defaults.items() if node[name] is None}}


# The callables that, besides the data set, take the keys of a `dataset` node; SUPPLIED are their other arguments.
SCHEMAS = (verify, Relabelled, Crops, DataPipeline)
SUPPLIED = ("train", "val", "transforms", "seed", "dataset", "split")


def check_dataset(node: dict[str, Any]) -> dict[str, Any]:
    """Check the `dataset` node of a config: arguments of the data set, of its views and of the pipeline.

    Returns:
        The node with all defaults filled in.

    Raises:
        UsageError: A key is unknown, or a value is invalid.
    """
    schema = locate(node, "dataset")
    _require_dataset(node, not inspect.isclass(schema) or issubclass(schema, SegmentationDataset))
    return check(node, "dataset", [schema, *SCHEMAS], supplied=SUPPLIED)


def with_dataset(node: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a `dataset` node of another data set, a file in configs/dataset, with the pipeline's keys of this one."""
    chosen = choice("dataset", name)
    keys, _, _ = parameters_of([locate(chosen, "dataset")], "dataset", supplied=SUPPLIED)
    own = {key: value for key, value in chosen.items() if key == TARGET or key in keys}
    return {**own, **{key: node[key] for key in _pipeline_keys() & node.keys()}}


def _pipeline_keys() -> set[str]:
    return inspect.signature(DataPipeline).parameters.keys() - set(SUPPLIED)


def check_pipeline(node: Mapping[str, Any]) -> None:
    """Raise UsageError if a `dataset` node has a value of the pipeline, such as `size`, that is invalid."""
    given = {name: node[name] for name in _pipeline_keys() & node.keys()}
    check(given, "dataset", [DataPipeline], supplied=SUPPLIED)


def require_key(node: Mapping[str, Any], name: str) -> None:
    """Raise UsageError if neither the data set of a `dataset` node nor its views and pipeline take a key."""
    parameters, _, takes_any = parameters_of([locate(node, "dataset"), *SCHEMAS], "dataset", supplied=SUPPLIED)
    if name not in (*parameters, TARGET) and not takes_any:
        raise UsageError(f"unknown key dataset.{name} - {suggest_key(name, parameters, 'dataset')}")


def _require_dataset(node: Mapping[str, Any], fits: bool) -> None:
    if not fits:
        raise UsageError(
            f"dataset ({node[TARGET]}) is not a segdeconv.data.SegmentationDataset - derive it from that, or in Python "
            "give two objects of it: train(dataset=(train_set, val_set))"
        )


def build_split(node: Mapping[str, Any], split_name: str) -> SegmentationDataset:
    """Build one split of the data set of a checked `dataset` node, with its label_map and crops applied.

    Raises:
        UsageError: The data set cannot be read, or its files do not match `dataset.checksums`.
    """
    checksums, view, crops, _, source = split_arguments(node, SCHEMAS)
    dataset = build(source, "dataset", split=split_name)
    _require_dataset(node, isinstance(dataset, SegmentationDataset))
    for name in ("classes", "names"):
        if not hasattr(dataset, name):
            raise UsageError(f"dataset ({node[TARGET]}) has no attribute {name} - set it in the constructor")
    verify(dataset, **checksums)
    if view.get("label_map"):
        dataset = Relabelled(dataset, **view)
    return Crops(dataset, **crops) if crops.get("examples", "images") != "images" else dataset


def build_splits(node: Mapping[str, Any]) -> tuple[list[SegmentationDataset], str]:
    """Build train, val, and test if the data set has it.

    Returns:
        The splits, and why test is missing although the data set should have it, or nothing.

    Raises:
        UsageError: See `build_split`; for the test split only if its files do not match `dataset.checksums`.
    """
    splits = [build_split(node, split) for split in ("train", "val")]
    if "test" in splits[0].split_names:
        try:
            build_split({**node, "checksums": None}, "test")
        except UsageError as error:
            return splits, str(error)
        splits.append(build_split(node, "test"))
    return splits, ""


def build_pipeline(
    node: Mapping[str, Any],
    augment: dict[str, Any],
    train: SegmentationDataset,
    val: SegmentationDataset,
    *,
    seed: int,
) -> DataPipeline:
    """Build the pipeline of checked `dataset` and `augment` nodes.

    Args:
        node: A `dataset` node, completed by `normalisation`.
        augment: An `augment` node.
        train: The train split.
        val: The val split.
        seed: Seed of the config.
    """
    transforms = build_transforms(augment, ignore_index=train.classes.ignore_index, mean=node["mean"])
    _, _, _, settings, _ = split_arguments(node, SCHEMAS)
    return DataPipeline(train, val, transforms, seed, **settings)
