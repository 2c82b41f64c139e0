"""Counts by image, by size and by distance from a boundary, checked against loops over every pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest

from segdeconv.evaluation.breakdown import BANDS, Breakdown, boundary_distance
from segdeconv.evaluation.metrics import scores

IGNORED = 255


def distance_by_hand(labels: np.ndarray) -> np.ndarray:
    """Return the chessboard distance to the nearest pixel next to another label, by exhaustive search."""
    height, width = labels.shape
    neighbours = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    at_boundary = [
        (y, x)
        for y in range(height)
        for x in range(width)
        if any(
            0 <= y + dy < height and 0 <= x + dx < width and labels[y + dy, x + dx] != labels[y, x]
            for dy, dx in neighbours
        )
    ]
    return np.array(
        [
            [min((max(abs(y - v), abs(x - u)) for v, u in at_boundary), default=math.inf) for x in range(width)]
            for y in range(height)
        ]
    )


def truth(seed: int, size: tuple[int, int]) -> np.ndarray:
    """Return a mask with rectangles of three classes and of ignored pixels."""
    random = np.random.default_rng(seed)
    mask = np.zeros(size, dtype=np.uint8)
    for label in (1, 2, IGNORED):
        y, x = random.integers(0, size[0]), random.integers(0, size[1])
        mask[y : y + 5, x : x + 7] = label
    return mask


def images() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return (prediction, mask, uncertainty) of five images of four sizes; the third is one pixel, the last ignored."""
    samples = []
    for seed, size in enumerate([(12, 15), (40, 20), (1, 1), (40, 20), (3, 4)]):
        random = np.random.default_rng(100 + seed)
        mask = {2: np.zeros(size, np.uint8), 4: np.full(size, IGNORED, np.uint8)}.get(seed, truth(seed, size))
        wrong = random.random(size) < 0.3
        prediction = np.where(wrong | (mask == IGNORED), random.integers(0, 3, size), mask).astype(np.uint8)
        samples.append((prediction, mask, random.random(size).astype(np.float32)))
    return samples


@pytest.fixture(scope="module")
def breakdown() -> Breakdown:
    breakdown = Breakdown(3, IGNORED)
    for number, (prediction, mask, uncertainty) in enumerate(images()):
        breakdown.update(f"image {number}", prediction, mask, uncertainty)
    return breakdown


def expected(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float | None]:
    """Return the mean IoU and accuracy of (truth, prediction) label arrays, counted in a loop."""
    confusion = np.zeros((3, 3), dtype=np.int64)
    for true, predicted in pairs:
        for row, column in zip(true.tolist(), predicted.tolist(), strict=True):
            confusion[row, column] += 1
    result = scores(confusion)
    if not confusion.sum():
        return {"miou": None, "pixel_accuracy": None}
    return {"miou": pytest.approx(result.miou), "pixel_accuracy": pytest.approx(result.pixel_accuracy)}


@pytest.mark.parametrize("seed", range(4))
def test_distances_equal_an_exhaustive_search(seed):
    mask = truth(seed, (17, 23))
    np.testing.assert_array_equal(boundary_distance(mask), distance_by_hand(mask))


def test_distances_are_infinite_without_a_boundary():
    assert np.isinf(boundary_distance(np.full((3, 2), 7, np.uint8))).all()
    assert np.isinf(boundary_distance(np.zeros((1, 1), np.uint8))).all()


def test_each_image_is_scored_separately(breakdown):
    for (prediction, mask, uncertainty), entry in zip(images(), breakdown.report()["images"], strict=True):
        valid = mask != IGNORED
        assert entry["pixels"] == valid.sum()
        assert entry["size"] == list(mask.shape)
        assert {key: entry[key] for key in ("miou", "pixel_accuracy")} == expected([(mask[valid], prediction[valid])])
        assert entry["uncertainty"] == (pytest.approx(uncertainty[valid].mean()) if valid.any() else None)


def test_each_band_is_scored_on_its_pixels_alone(breakdown):
    bands = breakdown.report()["by_boundary_distance"]
    ends = [*BANDS[1:], math.inf]
    for band, first, end in zip(bands, BANDS, ends, strict=True):
        pairs = []
        for prediction, mask, _ in images():
            distance = distance_by_hand(mask)
            last = end == math.inf
            inside = (mask != IGNORED) & (distance >= first) & ((distance < end) | last)
            pairs.append((mask[inside], prediction[inside]))
        assert (band["from"], band["to"]) == (first, None if end == math.inf else end - 1)
        assert band["pixels"] == sum(len(true) for true, _ in pairs)
        assert {key: band[key] for key in ("miou", "pixel_accuracy")} == expected(pairs)
    assert bands[-1]["pixels"] == 1  # the pixel of the image without a boundary


def test_few_sizes_are_scored_separately_in_ascending_order(breakdown):
    groups = breakdown.report()["by_size"]
    assert [group["smallest"] for group in groups] == [[1, 1], [3, 4], [12, 15], [40, 20]]
    assert [group["num_images"] for group in groups] == [1, 1, 1, 2]
    pairs = [(mask[mask != IGNORED], prediction[mask != IGNORED]) for prediction, mask, _ in images()]
    assert {key: groups[3][key] for key in ("miou", "pixel_accuracy")} == expected([pairs[1], pairs[3]])
    assert groups[1]["miou"] is None


def test_many_sizes_form_five_groups_of_equally_many_images():
    breakdown = Breakdown(2, IGNORED)
    for side in range(1, 21):
        blank = np.zeros((side, 3), np.uint8)
        breakdown.update(str(side), blank, blank, blank.astype(np.float32))
    groups = breakdown.report()["by_size"]
    assert [group["num_images"] for group in groups] == [4] * 5
    assert [(group["smallest"], group["largest"]) for group in groups[:2]] == [([1, 3], [4, 3]), ([5, 3], [8, 3])]
    assert sum(group["pixels"] for group in groups) == 3 * sum(range(1, 21))


def test_images_by_class_counts_the_images_whose_mask_contains_the_class(breakdown):
    expected_counts = [sum(bool((mask == label).any()) for _, mask, _ in images()) for label in range(3)]
    assert breakdown.images_by_class == expected_counts


def test_the_digest_depends_on_the_ground_truth_alone():
    def digest(name="a", prediction=0, mask=1, shape=(2, 3)):
        breakdown = Breakdown(2, IGNORED)
        filled = (np.full(shape, value, np.uint8) for value in (prediction, mask))
        breakdown.update(name, *filled, np.zeros(shape, np.float32))
        return breakdown.report()["truth_sha256"]

    assert digest() == digest(prediction=1)
    assert len({digest(), digest(name="b"), digest(mask=0), digest(shape=(3, 2))}) == 4


def test_an_empty_split_has_no_scores():
    report = Breakdown(2, IGNORED).report()
    assert (report["images"], report["by_size"]) == ([], [])
    assert {band["miou"] for band in report["by_boundary_distance"]} == {None}
