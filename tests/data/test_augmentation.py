"""Augmentation depends only on (seed, epoch, index) and invents no labels; the order of batches resumes exactly."""

from __future__ import annotations

import inspect
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import albumentations
import cv2
import numpy as np
import pytest
import torch

from segdeconv.checkpoints.checkpoint import ADMITTED
from segdeconv.data import Shapes
from segdeconv.data.augmentation import Augmentation
from segdeconv.data.loading import TrainingBatches, for_network, training_loader, worker_settings
from segdeconv.data.module import IMAGENET_MEAN, IMAGENET_STD
from segdeconv.data.preprocessing import Preprocessing, resize_image, resize_mask, stacked
from segdeconv.data.sampler import StatelessBatches
from segdeconv.data.transforms import build_transforms, check_augment, transform_node
from segdeconv.errors import UsageError

IMAGE = np.random.default_rng(0).integers(0, 256, size=(48, 64, 3), dtype=np.uint8)
SEVEN = np.full((48, 64), 7, dtype=np.uint8)
BLOCKS = (np.add.outer(np.arange(48) // 6, np.arange(64) // 6) % 2 * 200).astype(np.uint8)  # labels 0 and 200

INNER = {
    "transforms": [
        {"_target_": "albumentations.Rotate", "limit": [40, 90], "p": 1.0},
        {"_target_": "albumentations.RandomScale", "scale_limit": [-0.6, -0.4], "p": 1.0},
    ]
}

# Arguments that move pixels far enough to create a border; the other admitted transforms use their defaults.
FAR: dict[str, dict[str, Any]] = {
    "Affine": {"rotate": [-90, 90], "scale": [0.5, 0.7], "translate_percent": [-0.3, 0.3], "shear": [-20, 20]},
    "CenterCrop": {"height": 30, "width": 50},
    "CoarseDropout": {},
    "ConstrainedCoarseDropout": {"mask_indices": [7, 200]},
    "Crop": {"x_min": 5, "y_min": 3, "x_max": 60, "y_max": 44},
    "CropAndPad": {"percent": [-0.3, 0.4]},
    "CropNonEmptyMaskIfExists": {"height": 30, "width": 50},
    "ElasticTransform": {"alpha": 300, "sigma": 8},
    "GridDistortion": {"distort_limit": [-0.9, 0.9], "normalized": False},
    "LongestMaxSize": {"max_size": 50},
    "OneOf": INNER,
    "OneOrOther": INNER,
    "OpticalDistortion": {"distort_limit": [-0.9, 0.9]},
    "Pad": {"padding": [3, 5]},
    "PadIfNeeded": {"min_height": 60, "min_width": 90},
    "Perspective": {"scale": [0.2, 0.3], "fit_output": True},
    "RandomCrop": {"height": 70, "width": 30, "pad_if_needed": True},
    "RandomOrder": INNER,
    "RandomResizedCrop": {"size": [40, 56]},
    "RandomScale": {"scale_limit": [-0.7, 0.7]},
    "RandomSizedCrop": {"min_max_height": [20, 40], "size": [40, 56]},
    "Resize": {"height": 37, "width": 61},
    "Rotate": {"limit": [-90, 90]},
    "SafeRotate": {"limit": [-90, 90]},
    "SelectiveChannelTransform": {"transforms": [{"_target_": "albumentations.Blur"}]},
    "Sequential": INNER,
    "ShiftScaleRotate": {"scale_limit": [-0.5, 0], "rotate_limit": [-45, 45]},
    "SmallestMaxSize": {"max_size": 40},
    "SomeOf": {**INNER, "n": 2},
    "XYMasking": {"num_masks_x": 2, "num_masks_y": 2, "mask_x_length": 5, "mask_y_length": 5},
}
FAR["Compose"] = INNER
NAMES = sorted(name.removeprefix("albumentations.") for name in ADMITTED if name.startswith("albumentations."))
BORDERED = (
    "Affine",
    "CropAndPad",
    "OpticalDistortion",
    "PadIfNeeded",
    "Perspective",
    "Rotate",
    "SafeRotate",
    "ShiftScaleRotate",
    "ElasticTransform",
    "RandomCrop",
)


def built(name: str, **arguments: Any) -> list[Any]:
    node = {"_target_": f"albumentations.{name}", "p": 1.0, **FAR.get(name, {}), **arguments}
    return list(build_transforms(check_augment({"it": node}), ignore_index=255, mean=IMAGENET_MEAN).values())


def augmentation(*transforms: Any, seed: int = 0, crop: tuple[int, int] | None = (40, 72)) -> Augmentation:
    named = {str(number): transform for number, transform in enumerate(transforms)}
    return Augmentation(named, crop=crop, ignore_index=255, fill=IMAGENET_MEAN, seed=seed)


def varied(**settings: Any) -> Augmentation:
    names = (
        "Affine",
        "ElasticTransform",
        "RandomScale",
        "ColorJitter",
        "GaussNoise",
        "CoarseDropout",
        "HorizontalFlip",
    )
    return augmentation(*(transform for name in names for transform in built(name, p=0.8)), **settings)


def as_bytes(result: tuple[np.ndarray, np.ndarray]) -> bytes:
    return b"".join(array.tobytes() for array in result)


# Randomness


def test_the_result_does_not_depend_on_global_generators_or_earlier_draws() -> None:
    first, second = varied(), varied()
    expected = as_bytes(first(IMAGE, BLOCKS, 3, 5))
    for seed in range(3):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the state that must not matter
        torch.manual_seed(seed)
        first(IMAGE, BLOCKS, seed, 0)
        assert as_bytes(first(IMAGE, BLOCKS, 3, 5)) == as_bytes(second(IMAGE, BLOCKS, 3, 5)) == expected


def test_another_seed_epoch_or_index_gives_another_result() -> None:
    keys = [(seed, epoch, index) for seed in range(2) for epoch in range(3) for index in range(3)]
    results = {as_bytes(varied(seed=seed)(IMAGE, BLOCKS, epoch, index)) for seed, epoch, index in keys}
    assert len(results) == len(keys)


def test_transforms_are_applied_independently() -> None:
    """With equal seeds, as from Compose.set_random_seed, either all flips or none would be applied."""
    corner = np.arange(16, dtype=np.uint8).reshape(4, 4)
    outcomes = {}
    for flips in itertools.product((False, True), repeat=3):
        mask = corner[:, ::-1] if flips[0] else corner
        mask = mask[::-1] if flips[1] else mask
        outcomes[(mask.T if flips[2] else mask).tobytes()] = flips
    names = ("HorizontalFlip", "VerticalFlip", "Transpose")
    augment = augmentation(*(t for name in names for t in built(name, p=0.5)), crop=None)
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    counts = Counter(outcomes[augment(image, corner, 0, index)[1].tobytes()] for index in range(800))
    assert len(counts) == 8
    assert all(60 < count < 140 for count in counts.values())  # expected 100 each, standard deviation 9.4


def test_the_global_generators_are_unchanged() -> None:
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # noqa: NPY002
    varied()(IMAGE, BLOCKS, 0, 0)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before  # noqa: NPY002


def epochs(num_workers: int, num: int = 2) -> Iterator[dict[str, Any]]:
    preprocessing = Preprocessing((32, 32), IMAGENET_MEAN, IMAGENET_STD)
    samples = TrainingBatches(Shapes("train", num_train=9, side=40), preprocessing, varied(crop=(24, 24)))
    epoch = [0]
    loader = training_loader(
        samples, batch_size=2, seed=1, position=lambda: (epoch[0], 0), num_workers=num_workers, timeout=60
    )
    for epoch[0] in range(num):
        yield from loader


def test_0_1_and_2_workers_give_the_same_bits_over_two_epochs() -> None:
    alone = list(epochs(0))
    assert len(alone) == 8
    assert not torch.equal(alone[0]["image"], alone[4]["image"])
    for num_workers in (1, 2):
        for expected, batch in zip(alone, epochs(num_workers), strict=True):
            assert batch["name"] == expected["name"]
            assert torch.equal(batch["image"], expected["image"])
            assert torch.equal(batch["mask"], expected["mask"])


def test_batches_have_the_types_the_network_expects() -> None:
    stored = next(epochs(0))
    assert (stored["image"].dtype, stored["mask"].dtype) == (torch.uint8, torch.uint8)  # a quarter of float32 to copy
    preprocessing = Preprocessing((32, 32), IMAGENET_MEAN, IMAGENET_STD)
    batch = for_network(stored, preprocessing)
    assert (batch["image"].shape, batch["image"].dtype) == ((2, 3, 24, 24), torch.float32)
    assert (batch["mask"].shape, batch["mask"].dtype) == ((2, 24, 24), torch.int64)
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    rows = stored["image"].numpy().transpose(0, 2, 3, 1)
    expected = (rows - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)
    np.testing.assert_array_equal(batch["image"].numpy(), expected.transpose(0, 3, 1, 2))  # bit by bit
    np.testing.assert_array_equal(batch["mask"], stored["mask"])


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_16_bit_images_are_normalised_on_the_device_exactly(order) -> None:
    image = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    mean, std = np.array([30000.0, 100.5, 7.25], np.float32), np.array([9000.0, 3.0, 0.7], np.float32)
    preprocessing = Preprocessing(None, tuple(mean.tolist()), tuple(std.tolist()), 16, order=order)
    expected = (image.astype(np.float32) - mean) / std
    expected = expected[:, :, ::-1] if order == "bgr" else expected
    batch = stacked([image, image])
    before = batch.clone()
    np.testing.assert_array_equal(preprocessing.normalised(batch)[1].permute(1, 2, 0), expected)
    assert torch.equal(batch, before)


@pytest.mark.parametrize(("workers", "expected"), [(0, 0), (3, 3), (None, 2)])
def test_there_are_as_many_workers_as_requested_or_at_most_as_many_as_cores(monkeypatch, workers, expected) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert worker_settings(num_workers=workers, timeout=9, world_size=2)["num_workers"] == expected


def test_fewer_images_than_a_batch_are_refused() -> None:
    samples = TrainingBatches(Shapes("train", num_train=3), Preprocessing(None, (0, 0, 0), (1, 1, 1)), varied())
    with pytest.raises(
        UsageError, match=r"3 images, fewer than one batch of 2 x 2 - set dataset\.batch_size=1 or less"
    ):
        training_loader(samples, batch_size=2, world_size=2, seed=0, position=lambda: (0, 0), num_workers=0, timeout=0)


# Labels


@pytest.mark.parametrize("name", NAMES)
def test_no_admitted_transform_invents_a_label(name: str) -> None:
    augment = augmentation(*built(name))
    for index in range(12):
        image, mask = augment(IMAGE, SEVEN, 0, index)
        assert image.shape == (40, 72, 3)
        assert mask.shape == (40, 72)
        assert set(np.unique(mask)) <= {7, 255}
        assert set(np.unique(augment(IMAGE, BLOCKS, 0, index)[1])) <= {0, 200, 255}


@pytest.mark.parametrize("name", BORDERED)
def test_a_border_is_ignored_where_albumentations_alone_makes_it_class_0(name: str) -> None:
    """This validates the test above: with albumentations' defaults, the transform does invent a label."""
    bare = getattr(albumentations, name)(p=1.0, **FAR[name])
    bare.set_random_seed(1)
    results = [
        (bare(image=IMAGE, mask=SEVEN)["mask"], augmentation(*built(name), crop=None)(IMAGE, SEVEN, 0, i)[1])
        for i in range(9)
    ]
    assert {0, 7} <= {int(v) for mask, _ in results for v in np.unique(mask)}
    assert {int(v) for _, mask in results for v in np.unique(mask)} == {7, 255}


def test_a_crop_pads_with_the_mean_colour_and_the_ignored_label() -> None:
    image, mask = augmentation(crop=(60, 64))(IMAGE, SEVEN, 0, 0)
    border = mask == 255
    assert border.sum() == 12 * 64
    assert (image[border] == np.round(IMAGENET_MEAN)).all()
    np.testing.assert_array_equal(image[~border].reshape(48, 64, 3), IMAGE)


def test_image_and_mask_move_together() -> None:
    ramp = (np.add.outer(np.arange(48) * 3, np.arange(64))).astype(np.uint8)
    flips = augmentation(
        *built("HorizontalFlip", p=0.5), *built("RandomRotate90"), *built("Transpose", p=0.5), crop=(40, 40)
    )
    for index in range(8):
        image, mask = flips(np.dstack([ramp] * 3), ramp, 0, index)
        np.testing.assert_array_equal(image[:, :, 0], mask)


# Any number of channels

CHANNELS = [(count, dtype) for count in (1, 2, 4, 5, 9) for dtype in (np.uint8, np.uint16)] + [(3, np.uint16)]


def image_of(channels: int, dtype: Any) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, np.iinfo(dtype).max, (48, 64, channels), dtype, endpoint=True)


@pytest.mark.parametrize(("channels", "dtype"), CHANNELS)
@pytest.mark.parametrize("size", [(20, 30), (96, 128), (60, 10), (1, 1)])
def test_every_channel_is_resized_independently(channels: int, dtype: Any, size: tuple[int, int]) -> None:
    image = image_of(channels, dtype)
    resized = resize_image(image, size)
    assert (resized.shape, resized.dtype) == ((*size, channels), dtype)
    shrinks = size[0] < 48 and size[1] < 64
    for channel in range(channels):
        alone = cv2.resize(
            image[:, :, channel].copy(), size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        )
        assert abs(resized[:, :, channel].astype(int) - alone).max() <= 1


@pytest.mark.parametrize(("channels", "dtype"), CHANNELS)
def test_a_crop_pads_every_channel_with_its_own_mean(channels: int, dtype: Any) -> None:
    image, means = image_of(channels, dtype), [3.6 + 7 * channel for channel in range(channels)]
    augment = Augmentation({}, crop=(60, 70), ignore_index=255, fill=means, seed=0)
    padded, mask = augment(image, SEVEN, 0, 0)
    assert (padded.shape, padded.dtype) == ((60, 70, channels), dtype)
    assert (padded[mask == 255] == np.round(means)).all()
    np.testing.assert_array_equal(padded[mask == 7].reshape(image.shape), image)


@pytest.mark.parametrize(("channels", "dtype"), CHANNELS)
def test_geometric_transforms_support_any_number_of_channels(channels: int, dtype: Any) -> None:
    image, means = image_of(channels, dtype), [99.0] * channels
    names = ("HorizontalFlip", "RandomRotate90", "RandomScale", "Affine", "Perspective", "CoarseDropout")
    nodes = check_augment({name: {"_target_": f"albumentations.{name}", **FAR.get(name, {})} for name in names})
    transforms = build_transforms(nodes, ignore_index=255, mean=means)
    augment = Augmentation(transforms, crop=(40, 72), ignore_index=255, fill=means, seed=0)
    augment.dry_run(image, SEVEN)
    for index in range(12):
        moved, mask = augment(image, SEVEN, 0, index)
        assert (moved.shape, moved.dtype, mask.shape) == ((40, 72, channels), dtype, (40, 72))
        assert set(np.unique(mask)) <= {7, 255}


@pytest.mark.parametrize(
    ("name", "channels", "dtype", "message"),
    [
        ("ColorJitter", 2, np.uint8, "cannot process images of 2 channel(s) of 8 bit and size (48, 64)"),
        ("ColorJitter", 3, np.uint16, "cannot process images of 3 channel(s) of 16 bit"),
        ("GaussNoise", 1, np.uint16, "cannot process images of 1 channel(s) of 16 bit"),
        ("RandomCrop", 3, np.uint8, "cannot process images of 3 channel(s) of 8 bit and size (48, 64)"),
        ("ToFloat", 3, np.uint8, "changes uint8 images of 3 channels to float32"),
        ("Normalize", 3, np.uint8, "changes uint8 images of 3 channels to float32"),
        ("Morphological", 3, np.uint8, "does not keep the labels of masks"),
        ("GridElasticDeform", 3, np.uint8, "does not keep the labels of masks"),
    ],
)
def test_a_transform_that_cannot_process_the_images_is_named_before_training(
    name: str, channels: int, dtype: Any, message: str
) -> None:
    arguments = {
        "GridElasticDeform": {"num_grid_xy": [4, 4], "magnitude": 9},
        "RandomCrop": {"height": 70, "width": 30},
    }
    node = {"_target_": f"albumentations.{name}", "p": 0.01, **arguments.get(name, {})}
    flip = {"_target_": "albumentations.HorizontalFlip"}
    transforms = build_transforms(check_augment({"flip": flip, "it": node}), ignore_index=255, mean=[0.0] * channels)
    augment = Augmentation(transforms, crop=None, ignore_index=255, fill=[0.0] * channels, seed=0)
    with pytest.raises(UsageError, match=re.escape(f"augment.it ({name}) {message}")) as caught:
        augment.dry_run(image_of(channels, dtype), SEVEN)
    assert "leave it out with augment.it=null, or choose another" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dry_run_does_not_change_the_augmentation() -> None:
    first, second = varied(), varied()
    first.dry_run(IMAGE, BLOCKS)
    assert as_bytes(first(IMAGE, BLOCKS, 1, 2)) == as_bytes(second(IMAGE, BLOCKS, 1, 2))


@pytest.mark.parametrize(("channels", "dtype"), CHANNELS)
def test_every_channel_is_normalised_with_its_own_mean_and_std(channels: int, dtype: Any) -> None:
    image = image_of(channels, dtype)
    mean, std = [10.0 + channel for channel in range(channels)], [2.0 + channel for channel in range(channels)]
    preprocessing = Preprocessing(None, tuple(mean), tuple(std), 8 * image.itemsize, as_stored=True)
    expected = (image.astype(np.float64) - mean) / std
    np.testing.assert_allclose(preprocessing(image).permute(1, 2, 0), expected, rtol=1e-5, atol=1e-3)
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing


@pytest.mark.parametrize(
    "image", [image_of(1, np.uint8), image_of(2, np.uint8), image_of(3, np.uint16), IMAGE[:, :, 0]]
)
def test_an_image_that_does_not_fit_the_network_is_refused(image: np.ndarray) -> None:
    """A single channel would silently broadcast over the three means."""
    with pytest.raises(
        UsageError, match=r"x\.png has . channel\(s\) of \d+ bit, but the network needs 3 of 8 bit - give"
    ):
        Preprocessing(None, IMAGENET_MEAN, IMAGENET_STD)(image, "x.png")


def test_the_preprocessing_of_an_older_checkpoint_is_8_bit_rgb() -> None:
    older = {"size": [4, 5], "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    assert Preprocessing.from_dict(older) == Preprocessing((4, 5), IMAGENET_MEAN, IMAGENET_STD, 8, as_stored=False)


INTERPOLATING = [
    name for name in NAMES if "mask_interpolation" in inspect.signature(getattr(albumentations, name)).parameters
]


@pytest.mark.parametrize("name", INTERPOLATING)
@pytest.mark.parametrize("axis", [0, 1])
def test_masks_stay_aligned_with_their_images(name: str, axis: int) -> None:
    """With OpenCV's INTER_NEAREST, albumentations' default, resized masks would be shifted."""
    positions = np.indices((120, 160), dtype=np.float32)[axis]
    image, mask = np.repeat(positions[..., None], 3, axis=2), positions.astype(np.uint8)
    inside = np.pad(np.ones((110, 150), dtype=bool), 5)  # near a border, images are blended with the fill value
    differences = []
    for seed in range(10):
        compose = albumentations.Compose(built(name), additional_targets={"inside": "mask"}, seed=seed)
        result = compose(image=image, mask=mask, inside=inside.astype(np.uint8))
        valid = result["inside"] == 1
        assert valid.sum() > 100
        differences.append((result["mask"][valid] - result["image"][valid, 0]).mean())
    assert np.abs(differences).mean() < 0.1  # pixels of the original image


# Invalid arguments


@pytest.mark.parametrize("value", [0, None, 254])
def test_a_fill_mask_that_is_a_class_is_refused(value: int | None) -> None:
    message = f"albumentations.Affine has fill_mask={value}; borders must be ignored pixels, 255 - leave out fill_mask"
    with pytest.raises(UsageError, match=re.escape(message)):
        build_transforms(
            {"it": {"_target_": "albumentations.Affine", "fill_mask": value}}, ignore_index=255, mean=(0,) * 3
        )


def test_a_fill_mask_that_is_the_ignored_label_is_accepted() -> None:
    assert built("Affine", fill_mask=255)[0].fill_mask == 255


@pytest.mark.parametrize("value", [cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA])
def test_interpolated_masks_are_refused(value: int) -> None:
    with pytest.raises(
        UsageError, match=r"albumentations\.Rotate interpolates masks; .* - leave out mask_interpolation"
    ):
        built("Rotate", mask_interpolation=value)


def test_nearest_masks_are_accepted() -> None:
    assert built("Rotate", mask_interpolation=cv2.INTER_NEAREST)[0].mask_interpolation == cv2.INTER_NEAREST


def test_a_misspelt_argument_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"unknown key augment\.it\.scale_limits - did you mean 'scale_limit'\?"):
        built("RandomScale", scale_limits=0.5)


@pytest.mark.parametrize(("name", "arguments"), [("HorizontalFlip", {"p": 2}), ("Rotate", {"limit": "far"})])
def test_a_value_that_albumentations_refuses_is_an_error_message(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"augment\.it") as caught:
        built(name, **arguments)
    assert "correct" in str(caught.value)


def test_a_transform_set_to_null_is_left_out() -> None:
    flip = {"_target_": "albumentations.HorizontalFlip", "p": 1.0}
    assert check_augment({"flip": None, "other": flip}) == {"other": flip}


# Sizes and normalisation


@pytest.mark.parametrize("size", [(20, 30), (96, 128), (48, 31), (50, 10), (1, 1)])
def test_a_resized_mask_takes_every_pixel_from_the_nearest(size: tuple[int, int]) -> None:
    for axis in (0, 1):
        positions = np.arange(SEVEN.shape[axis], dtype=np.uint8)  # every pixel has its position as label
        mask = np.broadcast_to(positions[:, None] if axis == 0 else positions, SEVEN.shape)
        resized = resize_mask(np.ascontiguousarray(mask), size)
        assert resized.shape == size
        centres = (np.arange(size[axis]) + 0.5) * SEVEN.shape[axis] / size[axis]
        assert abs(resized + 0.5 - (centres[:, None] if axis == 0 else centres)).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("size", [(20, 30), (96, 128), (60, 10)])
def test_a_resized_image_has_the_size_and_keeps_a_uniform_colour(size: tuple[int, int]) -> None:
    image = np.full((48, 64, 3), (10, 20, 30), dtype=np.uint8)
    assert (resize_image(image, size) == np.full((*size, 3), (10, 20, 30))).all()


def test_a_shrunk_image_is_the_mean_of_its_blocks() -> None:
    blocks = IMAGE.reshape(12, 4, 16, 4, 3).mean(axis=(1, 3))
    assert abs(resize_image(IMAGE, (12, 16)) - blocks).max() <= 0.51


def test_preprocessing_subtracts_the_mean_and_divides_by_the_deviation() -> None:
    result = Preprocessing(None, IMAGENET_MEAN, IMAGENET_STD)(IMAGE)
    expected = (IMAGE.astype(np.float64) - IMAGENET_MEAN) / IMAGENET_STD
    assert (result.shape, result.dtype) == ((3, 48, 64), torch.float32)
    np.testing.assert_allclose(result.permute(1, 2, 0), expected, rtol=1e-5, atol=1e-6)
    assert Preprocessing((20, 30), (0, 0, 0), (1, 1, 1))(IMAGE).shape == (3, 20, 30)


@pytest.mark.parametrize("size", [None, (20, 30)])
def test_preprocessing_is_restored_from_plain_data(size: tuple[int, int] | None) -> None:
    preprocessing = Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD)
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing


# The order of samples


def order(
    position: tuple[int, int] = (0, 0), num: int = 23, batch: int = 4, **settings: Any
) -> list[list[tuple[int, int]]]:
    return list(StatelessBatches(num, batch, **{"seed": 0, "position": lambda: position, **settings}))


def test_an_epoch_is_a_permutation_without_its_incomplete_last_batch() -> None:
    batches = order((6, 0))
    assert [len(batch) for batch in batches] == [4] * 5
    assert {epoch for batch in batches for epoch, _ in batch} == {6}
    assert len({index for batch in batches for _, index in batch} & set(range(23))) == 20
    assert sorted(index for batch in order(num=20) for _, index in batch) == list(range(20))


def test_every_epoch_and_seed_has_its_own_order() -> None:
    assert order() == order()
    plain = [[index for batch in o for _, index in batch] for o in (order(), order((1, 0)), order(seed=1))]
    assert plain[0] != plain[1] != plain[2] != plain[0]


def test_every_image_occurs_in_some_epoch() -> None:
    assert {index for epoch in range(9) for batch in order((epoch, 0)) for _, index in batch} == set(range(23))


@pytest.mark.parametrize("done", range(6))
def test_resuming_gives_the_rest_of_the_same_epoch(done: int) -> None:
    assert order((2, done)) == order((2, 0))[done:]


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_split_the_global_batch_in_the_order_of_one_process(world_size: int) -> None:
    ranks = [order(batch=2, num=43, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [list(itertools.chain(*shares)) for shares in zip(*ranks, strict=True)]
    assert together == order(batch=2 * world_size, num=43)


# Compositions and objects

# Transforms that no checkpoint may name without the user's consent, and why.
NOT_ADMITTED = {
    "a function": {"Lambda"},
    "a font's file": {"TextImage"},
    "other images": {"FDA", "HistogramMatching", "Mosaic", "OverlayElements", "PixelDistributionAdaptation"},
    "boxes": {"AtLeastOneBBoxRandomCrop", "BBoxSafeRandomCrop", "RandomCropNearBBox", "RandomSizedBBoxSafeCrop"},
    "another type of image": {"FromFloat", "Normalize", "ToFloat", "ToRGB", "ToTensorV2"},
    "labels as numbers": {"Morphological"},
    "borders of class 0": {"GridElasticDeform"},
    "volumes": {
        "CenterCrop3D", "CoarseDropout3D", "CubicSymmetry", "Pad3D", "PadIfNeeded3D", "RandomCrop3D", "ToTensor3D",
        "Transform3D",
    },
    "spectrograms": {"FrequencyMasking", "TimeMasking", "TimeReverse"},
    "fails with its defaults": {"MaskDropout"},
    "warns that it is slow": {"PiecewiseAffine"},
    "abstract": {"BaseCompose", "BasicTransform", "DualTransform", "ImageOnlyTransform"},
    "keeps what it draws": {"ReplayCompose"},
}  # fmt: skip


def test_every_transform_of_an_image_and_its_mask_is_admitted() -> None:
    kinds = (albumentations.BasicTransform, albumentations.BaseCompose)
    exported = {name for name, value in vars(albumentations).items() if isinstance(value, type)}
    transforms = {name for name in exported if issubclass(getattr(albumentations, name), kinds)}
    assert transforms - set(NAMES) == set().union(*NOT_ADMITTED.values()) & transforms


def one_of(*nodes: Any, name: str = "OneOf", **arguments: Any) -> dict[str, Any]:
    return {"it": {"_target_": f"albumentations.{name}", "transforms": list(nodes), "p": 1.0, **arguments}}


BLUR = {"_target_": "albumentations.Blur"}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (one_of(), "augment.it.transforms=[] is not a list of transforms with a _target_ each - give at least one"),
        ({"it": {"_target_": "albumentations.OneOf"}}, "augment.it.transforms=None is not a list of transforms"),
        (one_of("Blur"), "augment.it.transforms[0]=Blur is not a transform, which has a _target_"),
        (one_of(BLUR, {**BLUR, "blur": 3}), "unknown key augment.it.transforms[1].blur - did you mean 'blur_limit'"),
        (one_of(BLUR, chance=0.5), "unknown key augment.it.chance"),
        (one_of({"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 1, "kernel_size": 1}),
         "augment.it.transforms[0] (torch.nn.Conv2d) is not an albumentations transform"),
        (one_of(one_of({"_target_": "albumentations.RandomScale", "mask_interpolation": 1})["it"]),
         "albumentations.RandomScale interpolates masks"),
        (one_of(BLUR, {"_target_": "albumentations.Affine", "fill_mask": 0}), "albumentations.Affine has fill_mask=0"),
        (one_of(BLUR, name="Compose", seed=3), "augment.it.seed has no effect: the seed of the run determines"),
        (one_of(BLUR, {"_target_": "albumentations.ToFloat", "p": 0.01}),
         "augment.it.transforms[1] (ToFloat) changes uint8 images of 3 channels to float32"),
        (one_of(BLUR, {"_target_": "albumentations.Morphological"}, name="SomeOf", n=1),
         "augment.it.transforms[1] (Morphological) does not keep the labels of masks"),
        ({"it": 3}, "augment.it=3 is not a transform, which has a _target_ - give one, or null to leave it out"),
    ],
)  # fmt: skip
def test_a_mistake_inside_a_composition_is_named_with_its_place(nodes: dict[str, Any], message: str) -> None:
    def prepare() -> None:
        transforms = build_transforms(check_augment(nodes), ignore_index=255, mean=IMAGENET_MEAN)
        Augmentation(transforms, crop=None, ignore_index=255, fill=IMAGENET_MEAN, seed=0).dry_run(IMAGE, BLOCKS)

    with pytest.raises(UsageError, match=re.escape(message)):
        prepare()


def test_a_dry_run_tries_each_alternative_on_the_image_itself() -> None:
    """The second crop would not fit into the result of the first."""
    crops = [{"_target_": "albumentations.RandomCrop", "height": side, "width": side} for side in (20, 40)]
    alternatives = build_transforms(check_augment(one_of(*crops)), ignore_index=255, mean=IMAGENET_MEAN)
    augment = augmentation(*alternatives.values(), crop=None)
    augment.dry_run(IMAGE, BLOCKS)
    assert {augment(IMAGE, BLOCKS, 0, index)[1].shape for index in range(20)} == {(20, 20), (40, 40)}


def test_one_of_several_transforms_is_drawn_for_each_sample() -> None:
    flips = [{"_target_": f"albumentations.{name}Flip", "p": 1.0} for name in ("Horizontal", "Vertical")]
    augment = augmentation(*build_transforms(check_augment(one_of(*flips)), ignore_index=255, mean=(0,)).values(),
                           crop=None)  # fmt: skip
    corner = np.arange(16, dtype=np.uint8).reshape(4, 4)
    results = [augment(np.dstack([corner] * 3), corner, 0, index)[1] for index in range(400)]
    horizontal = sum(np.array_equal(result, corner[:, ::-1]) for result in results)
    assert horizontal + sum(np.array_equal(result, corner[::-1]) for result in results) == 400
    assert 160 < horizontal < 240  # expected 200, standard deviation 10


@pytest.mark.parametrize("name", NAMES)
def test_an_object_and_the_node_that_describes_it_give_the_same_bits(name: str) -> None:
    (transform,) = built(name)
    node = transform_node(transform)
    (again,) = build_transforms(check_augment({"it": node}), ignore_index=255, mean=IMAGENET_MEAN).values()
    for index in range(6):
        expected = augmentation(transform)(IMAGE, BLOCKS, 0, index)
        assert as_bytes(augmentation(again)(IMAGE, BLOCKS, 0, index)) == as_bytes(expected)
