"""Object proposals: windows are checked against a slow computation, files against their contents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from segdeconv.data import Shapes, proposals
from segdeconv.data.boxes import bounding_box, iou
from segdeconv.errors import UsageError

IMAGE = np.zeros((40, 60, 3), dtype=np.uint8)


def objects(data: Shapes, index: int) -> np.ndarray:
    instances = data.instances(index)
    return np.array([bounding_box(instances == number) for number in set(np.unique(instances)) - {0, 255}])


# Windows


def test_the_grid_lies_inside_the_image_and_its_neighbours_overlap_by_half() -> None:
    boxes = proposals.grid(120, 90)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [90, 120]).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 2).all()
    assert [0, 0, 90, 120] in boxes.tolist()
    sizes = boxes[:, 2:] - boxes[:, :2]
    same_size = boxes[(sizes == sizes[1000]).all(axis=1)]
    best = np.sort(iou(same_size, same_size), axis=1)[:, -2]
    assert (best >= 0.45).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (17, 19)])
def test_an_image_of_any_size_has_windows(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    boxes = proposals.windows(random)
    assert len(boxes)
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= size[::-1]).all()


def test_the_contrast_equals_that_of_histograms_of_single_boxes() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    boxes = np.array([[5, 6, 25, 26], [0, 0, 10, 30], [0, 0, 50, 40], [40, 30, 50, 40]])
    lab = cv2.cvtColor(cv2.GaussianBlur(image, (0, 0), 1.0), cv2.COLOR_RGB2Lab)
    colour = np.zeros((40, 50), dtype=int)
    for channel, levels in enumerate(proposals.LEVELS):
        for cut in range(1, levels):
            edge = np.quantile(lab[:, :, channel], cut / levels)
            colour += (lab[:, :, channel] >= edge) * int(np.prod(proposals.LEVELS[channel + 1 :]))
    expected = []
    for x1, y1, x2, y2 in boxes:
        inside, outside = np.zeros((2, 40, 50), dtype=bool)
        dx, dy = round(0.2 * (x2 - x1)), round(0.2 * (y2 - y1))
        outside[max(0, y1 - dy) : y2 + dy, max(0, x1 - dx) : x2 + dx] = True
        inside[y1:y2, x1:x2] = True
        outside &= ~inside
        if not outside.any():
            expected.append(0.0)
            continue
        p, q = (np.bincount(colour[where], minlength=16) / where.sum() for where in (inside, outside))
        both = (p + q) > 0
        expected.append(float(((p - q)[both] ** 2 / (p + q)[both]).sum() / 2 * np.sqrt(inside.sum())))
    np.testing.assert_allclose(proposals.contrast(image, boxes), expected, rtol=1e-4)


def test_an_object_with_high_contrast_is_proposed_first() -> None:
    image = np.full((120, 160, 3), (40, 90, 40), dtype=np.uint8)
    image[40:80, 60:110] = (220, 60, 50)
    boxes = proposals.windows(image)
    assert iou(boxes[:1], np.array([[60, 40, 110, 80]]))[0, 0] > 0.5


def test_windows_are_reproducible_and_fifty_of_them_overlap_most_objects() -> None:
    data = Shapes("val", num_val=12, side=128)
    overlapped: list[bool] = []
    for index in range(len(data)):
        image = data[index].image
        boxes = proposals.windows(image)
        np.testing.assert_array_equal(boxes, proposals.source("windows")(image, "any"))
        overlapped += (iou(objects(data, index), boxes[:50]) >= 0.5).any(axis=1).tolist()
        ious = iou(boxes, boxes) - np.eye(len(boxes))
        assert ious.max() <= proposals.OVERLAP + 0.1  # boxes are rounded to pixels after the suppression
    assert np.mean(overlapped) >= 0.75
    assert proposals.windows(image, max_boxes=5).tolist() == boxes[:5].tolist()


def test_sixteen_bits_and_many_channels_have_windows_too() -> None:
    image = np.random.default_rng(0).integers(0, 60000, (64, 64, 5)).astype(np.uint16)
    assert len(proposals.windows(image))


# OpenCV's proposals


@pytest.mark.parametrize("name", ["selective_search", "edge_boxes"])
def test_a_missing_module_of_opencv_is_reported_before_the_first_image(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(cv2, "ximgproc", raising=False)
    with pytest.raises(
        UsageError, match="need OpenCV's module ximgproc - install opencv-contrib-python-headless in place"
    ):
        proposals.source(name)


@pytest.mark.skipif(not hasattr(cv2, "ximgproc"), reason="OpenCV's module ximgproc is not installed")
@pytest.mark.parametrize("name", ["selective_search", "edge_boxes"])
def test_opencvs_proposals_overlap_most_objects(name: str) -> None:
    data = Shapes("val", num_val=6, side=128)
    overlapped: list[bool] = []
    for index in range(len(data)):
        boxes = proposals.source(name)(data[index].image, "any")
        assert (boxes[:, 2:] <= 128).all()
        overlapped += (iou(objects(data, index), boxes) >= 0.5).any(axis=1).tolist()
    assert np.mean(overlapped) >= 0.6


# Files


ROWS = [[1, 2, 30, 20, 0.1], [-5, 0, 10.4, 10, 0.9], [0, 0, 60, 40, 0.5]]
BY_SCORE = [[-5, 0, 10, 10], [0, 0, 60, 40], [1, 2, 30, 20]]
IN_ORDER = [[1, 2, 30, 20], [-5, 0, 10, 10], [0, 0, 60, 40]]


def written(folder: Path, kind: str, rows: Any, name: str = "a/b") -> Path:
    if kind == "npy":
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{name}.npy", np.array(rows))
        return folder
    path = folder / f"boxes.{kind}"
    if kind == "json":
        path.write_text(json.dumps({name: rows, "other": []}))
    else:
        columns = ["name", "x1", "y1", "x2", "y2", "score"][: len(rows[0]) + 1]
        path.write_text("\n".join([",".join(columns), *(",".join(map(str, [name, *row])) for row in rows)]) + "\n")
    return path


@pytest.mark.parametrize("kind", ["csv", "json", "npy"])
def test_boxes_of_a_file_are_sorted_by_score_or_kept_in_order_without_one(tmp_path: Path, kind: str) -> None:
    find = proposals.source(str(written(tmp_path, kind, ROWS)))
    assert find(IMAGE, "a/b").tolist() == BY_SCORE
    find = proposals.source(str(written(tmp_path, kind, [row[:4] for row in ROWS])))
    assert find(IMAGE, "a/b").tolist() == IN_ORDER


def test_an_image_may_have_no_boxes_but_must_be_listed(tmp_path: Path) -> None:
    find = proposals.source(str(written(tmp_path, "json", ROWS)))
    assert find(IMAGE, "other").shape == (0, 4)
    with pytest.raises(UsageError, match=r"boxes\.json has no boxes of c - add them"):
        find(IMAGE, "c")
    with pytest.raises(UsageError, match=r"c\.npy is missing - add the boxes of every image"):
        proposals.source(str(written(tmp_path / "folder", "npy", ROWS)))(IMAGE, "c")


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("json", [[1, 2, 3]], "the boxes are not rows of 4 or 5 finite numbers"),
        ("json", [1, 2, 3, 4], "the boxes are not rows of 4 or 5 finite numbers"),
        ("json", "all of them", "the boxes are not rows of 4 or 5 finite numbers"),
        ("json", 7, "the boxes are not rows of 4 or 5 finite numbers"),
        ("json", [[1, 2, 3, None]], "the boxes are not rows of 4 or 5 finite numbers"),
        ("npy", [[1, 2, np.nan, 4]], "the boxes are not rows of 4 or 5 finite numbers"),
        ("csv", [[5, 5, 5, 9]], r"the box \(5, 5, 5, 9\) is empty or outside the image of 40x60"),
        ("npy", [[9, 9, 3, 3]], r"the box \(9, 9, 3, 3\) is empty or outside the image of 40x60"),
        ("npy", [[0, 0, 1, 1], [60, 0, 70, 9]], r"the box \(60, 0, 70, 9\) is empty or outside"),
        ("npy", [[0, 0, 1e12, 9]], r"the box \(0, 0, 1e\+12, 9\) is empty or outside"),
    ],
)
def test_invalid_boxes_are_refused(tmp_path: Path, kind: str, rows: Any, message: str) -> None:
    find = proposals.source(str(written(tmp_path, kind, rows)))
    with pytest.raises(UsageError, match=message) as caught:
        find(IMAGE, "a/b")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("boxes.csv", b"name,x1,y1\na,1,2\n", "has no column x2, y2 - give"),
        ("boxes.csv", b"", "has no column name, x1, x2, y1, y2 - give"),
        ("boxes.csv", b"name,x1,y1,x2,y2\na,1,2,3,4\na,1,2,x,4\n", "line 3: not a number"),
        ("boxes.csv", b"name,x1,y1,x2,y2\na,1,2\n", "line 2: not a number"),
        ("boxes.csv", b"\xff\xfe\x00", "is not a text table"),
        ("boxes.json", b"{", "is not JSON"),
        ("boxes.json", b"[1]", "contains a list - give"),
        ("boxes.txt", b"", "has an unknown suffix - give a .csv"),
        ("a.npy", b"nonsense", "is not a .npy file of numbers"),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        proposals.source(str(tmp_path if name == "a.npy" else tmp_path / name))(IMAGE, "a")
    assert "\n" not in str(caught.value)


def test_an_array_of_objects_is_refused_without_unpickling(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"is not a \.npy file of numbers"):
        proposals.source(str(tmp_path))(IMAGE, "a")


def test_a_source_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="proposals widnows: file not found - give windows, selective_search"):
        proposals.source("widnows")
