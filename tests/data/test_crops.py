"""Boxes, and the crops of objects and proposals for DeconvNet, checked against results computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from real_data import SHARED
from tiny_runs import config

from segdeconv.classes import Classes
from segdeconv.data import VOC, CamVid, Sample, SegmentationDataset, Shapes
from segdeconv.data.boxes import bounding_box, clipped, cut, expanded, iou, non_maximum_suppression, squared
from segdeconv.data.crops import Crops, objects_of
from segdeconv.data.inspection import inspect
from segdeconv.data.module import build_split, check_dataset
from segdeconv.data.relabelled import Relabelled
from segdeconv.errors import UsageError
from segdeconv.training.config_check import check_config
from segdeconv.training.prepare import prepare

REAL = SHARED / "VOCdevkit" / "VOC2012"
needs_voc = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real VOC images in {REAL}")
TRAIN, VAL = ("2007_000001", "2007_000002"), ("2008_000001",)


def boxes(*rows: tuple[int, int, int, int]) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


class Drawn(SegmentationDataset):
    """Rectangles (x1, y1, x2, y2, class) on images of 20x30, later ones on top; class 255 draws ignored pixels."""

    classes = Classes(("background", "a", "b"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)))

    def __init__(self, *images: list[tuple[int, int, int, int, int]], split: str = "train") -> None:
        self.split, self.images = split, images
        self.names = [f"{split}_{index}" for index in range(len(images))]

    def _paint(self, index: int, *, numbers: bool) -> np.ndarray:
        result = np.zeros((20, 30), dtype=np.uint8)
        for number, (x1, y1, x2, y2, label) in enumerate(self.images[index], start=1):
            result[y1:y2, x1:x2] = label if label == 255 or not numbers else number
        return result

    def __getitem__(self, index: int) -> Sample:
        rows, columns = np.mgrid[:20, :30]
        image = np.dstack([rows + 1, columns + 1, np.full_like(rows, 9)]).astype(np.uint8)  # encodes the position
        return Sample(image, self._paint(index, numbers=False), self.names[index])

    def instances(self, index: int) -> np.ndarray:
        return self._paint(index, numbers=True)

    @property
    def fingerprint(self) -> str:
        return f"{self.images}"


# Boxes


@pytest.mark.parametrize(
    ("box", "factor", "expected"),
    [
        ((10, 20, 20, 40), 1.2, (9, 18, 21, 42)),
        ((10, 20, 20, 40), 1.0, (10, 20, 20, 40)),
        ((0, 0, 5, 5), 1.2, (-1, -1, 6, 6)),  # half a pixel more on each side, rounded outwards
        ((100, 100, 155, 135), 1.2, (94, 96, 161, 139)),
        ((3, 3, 4, 4), 2.0, (2, 2, 5, 5)),
    ],
)
def test_a_box_is_enlarged_around_its_centre_and_rounded_outwards(box: Any, factor: float, expected: Any) -> None:
    assert expanded(boxes(box), factor).tolist() == [list(expected)]


def test_squares_have_the_longer_side_and_may_leave_the_image() -> None:
    corners = boxes((0, 10, 20, 15), (10, 0, 15, 20), (1, 2, 4, 5), (0, 0, 4, 7))
    assert squared(corners).tolist() == [[0, 3, 20, 23], [3, 0, 23, 20], [1, 2, 4, 5], [-1, 0, 6, 7]]
    assert clipped(squared(corners), (20, 30)).tolist()[0] == [0, 3, 20, 20]


def test_squares_in_the_authors_lists_are_unchanged() -> None:
    """The lines are from the authors' training files, whose corners are inclusive."""
    for x1, y1, x2, y2 in ((267, -20, 517, 230), (88, -24, 387, 275), (34, -116, 542, 392), (-30, -92, 548, 486)):
        box = boxes((x1, y1, x2 + 1, y2 + 1))
        assert squared(box).tolist() == box.tolist()


def test_a_crop_fills_the_part_outside_the_array() -> None:
    array = np.arange(12).reshape(3, 4)
    assert cut(array, np.array([-1, -1, 2, 2]), 99).tolist() == [[99, 99, 99], [99, 0, 1], [99, 4, 5]]
    assert cut(array, np.array([3, 1, 6, 4]), 99).tolist() == [[7, 99, 99], [11, 99, 99], [99, 99, 99]]
    assert cut(array, np.array([-5, -5, -1, -2]), 99).tolist() == [[99] * 4] * 3
    inside = cut(array, np.array([1, 1, 3, 3]), 99)
    assert inside.tolist() == [[5, 6], [9, 10]]
    inside[:] = -1
    assert array.min() == 0
    assert cut(np.ones((3, 4, 2)), np.array([-2, 0, 1, 1]), 0).tolist() == [[[0, 0], [0, 0], [1, 1]]]


def test_iou_equals_that_of_painted_boxes() -> None:
    random = np.random.default_rng(0)
    low = random.integers(0, 20, (2, 30, 2))
    first, second = np.concatenate([low, low + random.integers(1, 20, (2, 30, 2))], axis=2)
    ious = iou(first, second)
    for i, j in np.ndindex(30, 30):
        painted = np.zeros((2, 40, 40), dtype=bool)
        for canvas, (x1, y1, x2, y2) in zip(painted, (first[i], second[j]), strict=True):
            canvas[y1:y2, x1:x2] = True
        assert ious[i, j] == pytest.approx((painted[0] & painted[1]).sum() / (painted[0] | painted[1]).sum())


def test_non_maximum_suppression_equals_a_slow_one() -> None:
    random = np.random.default_rng(1)
    low = random.integers(0, 50, (300, 2))
    candidates = np.concatenate([low, low + random.integers(1, 50, (300, 2))], axis=1)
    selected: list[int] = []
    for index in range(300):
        if all(iou(candidates[[index]], candidates[[other]])[0, 0] <= 0.4 for other in selected):
            selected.append(index)
    assert non_maximum_suppression(candidates, 0.4, 1000).tolist() == selected
    assert non_maximum_suppression(candidates, 0.4, 7).tolist() == selected[:7]
    assert non_maximum_suppression(boxes(), 0.4, 7).tolist() == []


# Objects


def test_objects_have_tight_boxes_and_the_class_of_most_of_their_pixels() -> None:
    mask, instances = np.zeros((2, 6, 8), dtype=np.uint8)
    instances[1:3, 2:7] = 4
    mask[1:3, 2:7] = 2
    mask[1, 2] = 1  # a pixel of another class
    instances[5, 0], mask[5, 0] = 9, 1
    instances[4, 4:6] = 7  # an object without a class
    instances[0, 0], mask[0, 0] = 8, 255
    instances[3], mask[3] = 255, 255
    objects = objects_of(mask, instances, Drawn.classes, "x")
    assert objects.boxes.tolist() == [[2, 1, 7, 3], [0, 5, 1, 6]]
    assert (objects.numbers.tolist(), objects.classes.tolist()) == ([4, 9], [2, 1])
    assert bounding_box(instances == 4).tolist() == [2, 1, 7, 3]
    with pytest.raises(UsageError, match=r"the mask of x has shape \(6, 8\) and its object numbers \(6, 7\)"):
        objects_of(mask, instances[:, 1:], Drawn.classes, "x")


@pytest.mark.parametrize("index", range(4))
def test_objects_of_shapes_have_one_class_each_and_cover_all_labelled_pixels(index: int) -> None:
    data = Shapes("train", num_train=4)
    mask, instances = data[index].mask, data.instances(index)
    np.testing.assert_array_equal(instances == 0, mask == 0)
    np.testing.assert_array_equal(instances == 255, mask == 255)
    for number in set(np.unique(instances)) - {0, 255}:
        assert len(np.unique(mask[instances == number])) == 1


def test_only_crops_need_the_object_files_of_voc(tmp_path: Path) -> None:
    root = fakes.voc(tmp_path, TRAIN, VAL)
    data = VOC("train", str(root))
    np.testing.assert_array_equal(data.instances(1), fakes.voc_objects(fakes.voc_image_and_mask(1)[1]))
    for file in (root / "SegmentationObject").iterdir():
        file.unlink()
    data = VOC("train", str(root))
    assert data[0].mask.shape == (64, 80)
    with pytest.raises(
        UsageError, match=r"Object/2007_000001\.png, .*, is missing - unpack this folder of VOC's archive"
    ):
        Crops(data, examples="objects")


def test_unconverted_objects_of_sbd_are_named_with_a_way_out(tmp_path: Path) -> None:
    root = fakes.voc(tmp_path, TRAIN, VAL)
    aug = root / "SegmentationClassAug"
    aug.mkdir()
    for part, suffix in (("SegmentationClass", "png"), ("JPEGImages", "jpg")):
        target = aug if suffix == "png" else root / part
        (target / f"2009_000001.{suffix}").write_bytes((root / part / f"2007_000001.{suffix}").read_bytes())
    data = VOC("trainaug", str(root))
    assert data.names[-1] == "2009_000001"
    with pytest.raises(
        UsageError, match=r"ObjectAug/2009_000001\.png, .*, is missing - delete SegmentationClassAug, so"
    ):
        data.instances(2)


def test_a_data_set_without_object_numbers_is_refused(tmp_path: Path) -> None:
    data = CamVid("train", str(fakes.camvid(tmp_path)))
    with pytest.raises(UsageError, match="CamVid has no masks of single objects"):
        data.instances(0)
    with pytest.raises(UsageError, match=r"examples=objects needs a class 'background' .* CamVid has sky"):
        Crops(data, examples="objects")


# Crops of objects


def test_a_crop_shows_an_object_in_its_context_clipped_to_the_image_with_the_rest_as_background() -> None:
    # b covers part of a, a touches the left border, and a row of ignored pixels lies below both.
    data = Drawn([(0, 4, 10, 9, 1), (8, 2, 13, 12, 2), (0, 12, 30, 13, 255)])
    crops = Crops(data, examples="objects")
    # The visible part of a is 8x5, enlarged to 9.6x6: half of 1.6 and of 1, rounded outwards, and clipped at x = 0.
    assert crops.table[:, 1:5].tolist() == [[0, 3, 9, 10], [7, 1, 14, 13]]
    image, mask, name = crops[0]
    np.testing.assert_array_equal(image, data[0].image[3:10, 0:9])
    expected = np.zeros((7, 9), dtype=np.uint8)
    expected[1:6, 0:8] = 1  # without the column of b beside it
    np.testing.assert_array_equal(mask, expected)
    assert (mask.dtype, name) == (np.uint8, "train_0_0000")
    mask = crops[1].mask
    expected = np.zeros((12, 7), dtype=np.uint8)
    expected[1:11, 1:6] = 2
    expected[11] = 255  # ignored pixels stay ignored
    np.testing.assert_array_equal(mask, expected)


def test_a_larger_context_gives_a_larger_crop() -> None:
    data = Drawn([(10, 5, 20, 15, 1)])
    assert Crops(data, examples="objects", context=1.0).table[0, 1:5].tolist() == [10, 5, 20, 15]
    assert Crops(data, examples="objects", context=3.0).table[0, 1:5].tolist() == [0, 0, 30, 20]


def test_crops_of_merged_classes_have_the_merged_class() -> None:
    data = Relabelled(Drawn([(2, 2, 6, 6, 1), (10, 2, 16, 6, 2)]), {"b": "ignore"})
    crops = Crops(data, examples="objects")
    assert len(crops) == 1  # an ignored object gives no crop
    assert crops.classes.names == ("background", "a")


# Crops of proposals


def write_proposals(tmp_path: Path, **images: list[list[float]]) -> str:
    import json

    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(images))
    return str(path)


def test_a_proposal_becomes_a_square_with_all_classes_that_is_ignored_outside_the_image(tmp_path: Path) -> None:
    data = Drawn([(0, 4, 10, 9, 1), (8, 2, 13, 12, 2)])
    # The first is the box of a; the second has an IoU of 20 / 40 with a, too little; the third has 50 / 60 with b.
    path = write_proposals(tmp_path, train_0=[[0, 4, 8, 9, 0.9], [0, 4, 4, 9, 0.8], [8, 1, 13, 13, 0.7]])
    crops = Crops(data, examples="proposals", proposals=path, overlap=0.6)
    # 8x5 -> 9.6x6 -> (-1, 3, 9, 10) -> a square of 10 with 3 more rows, one above and two below. The other:
    # 5x12 -> 6x14.4 -> (7, -1, 14, 15) -> a square of 16 with 4 more columns before and 5 after.
    assert crops.table[:, 1:6].tolist() == [[-1, 2, 9, 12, 1], [3, -1, 19, 15, 2]]
    image, mask, _ = crops[0]
    assert image.shape == (10, 10, 3)
    assert (image[:, 0] == 0).all()  # black
    np.testing.assert_array_equal(image[:, 1:], data[0].image[2:12, 0:9])
    assert (mask[:, 0] == 255).all()
    np.testing.assert_array_equal(mask[:, 1:], data[0].mask[2:12, 0:9])
    assert set(np.unique(mask)) == {0, 1, 2, 255}
    assert len(Crops(data, examples="proposals", proposals=path, overlap=0.4)) == 3


def test_an_object_has_its_highest_scored_proposals_in_train_and_its_best_one_elsewhere(tmp_path: Path) -> None:
    proposals = [[1, 4, 11, 9, 0.9], [0, 4, 10, 9, 0.5], [0, 4, 9, 9, 0.7]]
    path = write_proposals(tmp_path, train_0=proposals, val_0=proposals)
    image = [(0, 4, 10, 9, 1)]

    def boxes_of(split: str, **settings: Any) -> list[list[int]]:
        crops = Crops(Drawn(image, split=split), examples="proposals", proposals=path, context=1.0, **settings)
        return crops.table[:, 1:5].tolist()

    by_score = [[1, 2, 11, 12], [0, 2, 9, 11], [0, 2, 10, 12]]
    assert boxes_of("train") == by_score
    assert boxes_of("train", most=2) == by_score[:2]
    assert boxes_of("val") == [by_score[2]]


def test_rare_classes_are_repeated_in_train_up_to_the_median() -> None:
    left, right = (2, 2, 6, 6), (10, 2, 16, 6)
    images = [[(*left, 1), (*right, 1)]] * 4 + [[(*left, 2)]]  # eight of a, one of b: the median is 4.5

    def classes(split: str, repeats: int) -> list[int]:
        crops = Crops(Drawn(*images, split=split), examples="objects", repeats=repeats)
        assert len(set(crops.names)) == len(crops)
        return crops.table[:, 6].tolist()

    assert classes("train", 1) == [1] * 8 + [2]
    assert classes("train", 3) == [1] * 8 + [2] * 3
    assert classes("train", 100) == [1] * 8 + [2] * 4
    assert classes("val", 100) == [1] * 8 + [2]


def test_proposals_of_shapes_are_reproducible_squares() -> None:
    data = Shapes("train", num_train=4, side=96)
    crops = [Crops(data, examples="proposals", most=3)._find() for _ in range(2)]
    np.testing.assert_array_equal(*crops)
    sides = crops[0][:, 3:5] - crops[0][:, 1:3]
    assert (sides[:, 0] == sides[:, 1]).all()
    assert np.bincount(crops[0][:, 0] * 8 + crops[0][:, 5]).max() <= 3


# As a data set


def test_crops_are_cached_until_something_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    real = Crops._find
    monkeypatch.setattr(Crops, "_find", lambda self: searches.append(self.split) or real(self))
    first = [(2, 2, 6, 6, 1)]
    for images in ([first], [first], [first, first]):
        assert len(Crops(Drawn(*images), examples="objects")) == len(images)
    assert len(searches) == 2
    Crops(Drawn(first), examples="objects", context=2.0)
    assert len(searches) == 3


def test_a_config_selects_crops_by_a_key_and_whole_images_are_inspected() -> None:
    node = {"_target_": "segdeconv.data.Shapes", "num_train": 3, "examples": "objects", "label_map": {"ring": "disc"}}
    checked = check_dataset(node)
    assert (checked["context"], checked["overlap"]) == (1.2, 0.5)
    data = build_split(checked, "train")
    assert "ring" not in data.classes.names
    assert "crops of objects" in data.notes[-1]
    inspection = inspect(data, use_cache=False)
    assert (inspection.num_images, inspection.sizes) == (3, [(64, 64, 3)])
    whole = build_split({**checked, "examples": "images"}, "train")
    assert inspection == inspect(whole, use_cache=False)
    with pytest.raises(
        UsageError, match=r"dataset\.examples=crops: input should be 'images', 'objects' or 'proposals'"
    ):
        check_dataset({**node, "examples": "crops"})


def test_a_split_without_objects_is_refused() -> None:
    with pytest.raises(UsageError, match="train of Drawn has no objects"):
        Crops(Drawn([]), examples="objects")


def test_voc_has_crops_of_both_kinds(tmp_path: Path) -> None:
    root = str(fakes.voc(tmp_path, TRAIN, VAL))
    data = VOC("train", root)
    crops = Crops(data, examples="objects")
    labels = [set(np.unique(data[index].mask).tolist()) - {0, 255} for index in range(2)]
    assert len(crops) == sum(map(len, labels))
    for index in range(len(crops)):
        image, mask, _ = crops[index]
        assert image.shape[:2] == mask.shape
        assert set(np.unique(mask).tolist()) - {0, 255} == {int(crops.table[index, 6])}
        assert crops.table[index, 5] == 21 - crops.table[index, 6]
    assert (np.unique(Crops(data, examples="proposals", overlap=0.1).table[:, 6]) > 0).all()


@needs_voc
def test_windows_overlap_most_objects_in_real_photographs() -> None:
    """Boxes are those of the 12 connected parts of classes, since the masks of objects are not available here."""
    import cv2

    from segdeconv.data.proposals import windows

    overlapped: list[bool] = []
    data = VOC("trainval", str(REAL))
    for index in range(len(data)):
        image, mask, _ = data[index]
        parts = []
        for label in set(np.unique(mask).tolist()) - {0, 255}:
            _, _, stats, _ = cv2.connectedComponentsWithStats((mask == label).astype(np.uint8))
            parts += [[x, y, x + w, y + h] for x, y, w, h, area in stats[1:] if area >= 50]
        overlapped += (iou(np.array(parts), windows(image)) >= 0.5).any(axis=1).tolist()
    assert len(overlapped) == 12
    assert np.mean(overlapped) >= 0.9


@pytest.mark.parametrize(
    ("examples", "weighting"), [("objects", "median_frequency"), ("objects", "none"), ("images", "median_frequency")]
)
def test_class_weights_of_whole_images_are_reported_for_crops(examples, weighting, capsys):
    data = {"_target_": "segdeconv.data.Shapes", "num_train": 4, "num_val": 2, "side": 32, "size": [32, 32]}
    loss = {"_target_": "segdeconv.losses.CrossEntropy", "class_weighting": weighting}
    prepare(check_config(config(dataset={**data, "examples": examples, "num_workers": 0}, loss=loss)))
    warned = "class weights count the pixels of whole images" in capsys.readouterr().err
    assert warned == (examples == "objects" and weighting != "none")
