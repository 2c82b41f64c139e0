"""SUN RGB-D: the pairs of images and masks, the classes in the order of the paper's weights, and the val split."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from PIL import Image

from segdeconv.data import SUNRGBD
from segdeconv.data.datasets import sunrgbd
from segdeconv.data.inspection import inspect, inspect_all
from segdeconv.errors import UsageError
from segdeconv.losses.class_weights import PRESETS, class_weights

# Table 5 of the SegNet paper, in its order.
TABLE_5 = """
    Wall, Floor, Cabinet, Bed, Chair, Sofa, Table, Door, Window, Bookshelf, Picture, Counter, Blinds, Desk, Shelves,
    Curtain, Dresser, Pillow, Mirror, Floor mat, Clothes, Ceiling, Books, Fridge, TV, Paper, Towel, Shower curtain, Box,
    Whiteboard, Person, Night stand, Toilet, Sink, Lamp, Bathtub, Bag
"""


def raises(message: str) -> Any:
    return pytest.raises(UsageError, match=message)


def test_test_masks_come_first_and_train_masks_after_5050(tmp_path: Path) -> None:
    root = str(fakes.sunrgbd(tmp_path))
    num_samples = 0
    for split, first in (("test", 1), ("train", 5051), ("val", 5051)):
        data = SUNRGBD(split, root)
        for image, mask, name in (data[index] for index in range(len(data))):
            number = first - 1 + int(name.split("-")[1])
            true_image, labels = fakes.sunrgbd_image_and_labels(number)
            assert np.abs(image.astype(int) - true_image).mean() < 6  # a JPEG
            np.testing.assert_array_equal(mask == 255, labels == 0)
            np.testing.assert_array_equal(mask[labels > 0], labels[labels > 0] - 1)
            num_samples += 1
    assert num_samples == 13
    assert SUNRGBD("test", root).names == ["test-000001", "test-000002", "test-000003"]


def test_sunrgbd_has_the_papers_37_classes_and_label_0_is_ignored() -> None:
    names = tuple(name.strip().lower().replace(" ", "_") for name in TABLE_5.split(","))
    assert sunrgbd.CLASSES.names == names
    assert sunrgbd.CLASSES.labels == tuple(range(1, 38))
    assert sunrgbd.CLASSES.ignored_labels == (0,)
    # From the palette sun.png, by label.
    colours = {1: (153, 112, 72), 4: (118, 106, 128), 20: (59, 18, 13), 33: (44, 51, 79), 37: (84, 65, 29)}
    assert {label: sunrgbd.CLASSES.colours[label - 1] for label in colours} == colours


def test_the_papers_weights_fit_the_order_of_the_classes() -> None:
    """Weights fall with frequency: large objects have the smallest weights, small or rare ones the largest."""
    weights = dict(zip(sunrgbd.CLASSES.names, PRESETS["sunrgbd"], strict=True))
    ordered = sorted(weights, key=lambda name: weights[name])
    assert set(ordered[:4]) == {"bed", "wall", "floor", "sofa"}
    assert set(ordered[-4:]) == {"lamp", "paper", "person", "bag"}
    # The published file starts with a 38th weight, 0.351185 of label 0; the others follow the labels 1..37.
    assert (weights["wall"], weights["floor_mat"], weights["bag"]) == (0.382592, 1.164314, 4.017548)
    assert class_weights([1] * 37, [1] * 37, class_weighting="sunrgbd") == list(PRESETS["sunrgbd"])


def test_val_is_a_seeded_fraction_of_train_that_keeps_neighbours_together(tmp_path: Path) -> None:
    root = tmp_path
    for sub in ("SUNRGBD-train_images", "sunrgbd_train_test_labels"):
        (root / sub).mkdir()
    for number in range(1, 801):
        (root / "SUNRGBD-train_images" / f"img-{number:06d}.jpg").touch()
    splits = {split: SUNRGBD(split, str(root)) for split in ("train", "val")}
    train, val = (set(splits[split].names) for split in ("train", "val"))
    assert not train & val
    assert (len(train), len(val)) == (720, 80)
    runs = {(int(name.split("-")[1]) - 1) // 20 for name in val}
    assert val == {f"train-{20 * run + number:06d}" for run in runs for number in range(1, 21)}
    assert splits["train"].notes == (
        "val: about 0.1 of the train images, in runs of 20, drawn with dataset.split_seed=0",
    )
    assert set(SUNRGBD("val", str(root), split_seed=1).names) != val
    assert len(SUNRGBD("val", str(root), val_share=0.004)) == 20


def test_the_splits_share_no_image(tmp_path: Path) -> None:
    root = str(fakes.sunrgbd(tmp_path))
    inspections = inspect_all([SUNRGBD(split, root) for split in ("train", "val", "test")], use_cache=False)
    assert [inspection.num_images for inspection in inspections] == [9, 1, 3]


def test_missing_files_are_named_with_the_steps_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    steps = (
        r" - download SUNRGBD-train_images\.tgz, SUNRGBD-test_images\.tgz and sunrgbd_train_test_labels\.tar\.gz as "
        r"described at https://github\.com/ankurhanda/sunrgbd-meta-data, unpack each into a folder of its name in {}, "
        r"or give the folder of SUNRGBD-train_images, .* as dataset\.root=DIR$"
    )
    with raises(r"^data/SUNRGBD does not contain SUNRGBD-train_images" + steps.format(".*/data/SUNRGBD")):
        SUNRGBD("train")
    root = fakes.sunrgbd(tmp_path / "root")
    shutil.rmtree(root / "SUNRGBD-test_images")
    assert len(SUNRGBD("train", str(root))) == 9
    with raises("root does not contain SUNRGBD-test_images" + steps.format(".*/root")):
        SUNRGBD("test", str(root))
    with raises("unknown split 'validation' - the splits are train, val, test"):
        SUNRGBD("validation", str(root))
    shutil.rmtree(root / "sunrgbd_train_test_labels")
    with raises("root does not contain sunrgbd_train_test_labels"):
        SUNRGBD("val", str(root))


def test_invalid_files_are_named(tmp_path: Path) -> None:
    root = fakes.sunrgbd(tmp_path)
    masks = root / "sunrgbd_train_test_labels"
    (masks / "img-000002.png").unlink()
    labels = np.array(fakes.opened(masks / "img-000003.png"))
    labels[0, 0] = 38
    Image.fromarray(labels).save(masks / "img-000003.png")
    problems = inspect(SUNRGBD("test", str(root)), use_cache=False).problems
    assert len(problems) == 2
    assert "img-000002.png is missing" in problems[0]
    assert "img-000003.png has label 38; the classes have labels 1..37 and 0 for ignored pixels" in problems[1]
    (root / "SUNRGBD-test_images" / "0000103.jpg").touch()
    (root / "SUNRGBD-test_images" / "IMG_1.jpg").touch()
    with raises(r"IMG_1\.jpg is not named like img-000001\.jpg"):
        SUNRGBD("test", str(root))
