"""Boundary scores, checked against exhaustive matching, definitions and values computed by hand."""

import itertools
import math

import cv2
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from segdeconv.classes import Classes
from segdeconv.evaluation import boundary
from segdeconv.evaluation.boundary import Boundaries, BoundaryPixels, boundary_f1
from segdeconv.evaluation.report import report, score_table


def pixels(places):
    return tuple(np.array(places, dtype=np.int64).reshape(-1, 2).T)


def largest_matching(pixels, others, distance):
    """Return the size of the largest matching, by trying each partner, or none, for the first pixel."""
    if not pixels:
        return 0
    best = largest_matching(pixels[1:], others, distance)
    for partner in others:
        if math.dist(pixels[0], partner) <= distance:
            remaining = [other for other in others if other != partner]
            best = max(best, 1 + largest_matching(pixels[1:], remaining, distance))
    return best


def f1_of(precision, recall):
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def by_definition(prediction, mask, num_classes, ignore_index):
    """Return (F1, dilated F1) of one image, with the boundary of each class computed pixel by pixel."""
    height, width = mask.shape
    distance = 0.0075 * math.hypot(height, width)

    def boundary_of(labels, label):
        boundary_pixels = []
        for y, x in np.ndindex(height, width):
            block = labels[y : y + 2, x : x + 2] == label
            if block.any() and not block.all():
                boundary_pixels.append((y, x))
        return boundary_pixels

    one_to_one, dilated = [], []
    for label in range(num_classes):
        predicted, true = boundary_of(prediction, label), boundary_of(mask, label)
        if label == ignore_index or not true:
            continue
        if not predicted:
            one_to_one.append(0.0)
            dilated.append(0.0)
            continue
        distances = np.array([[math.dist(a, b) for b in true] for a in predicted])
        rows, columns = linear_sum_assignment(distances <= distance, maximize=True)
        matched = (distances[rows, columns] <= distance).sum()
        one_to_one.append(f1_of(matched / len(predicted), matched / len(true)))
        near = distances <= distance
        dilated.append(f1_of(near.any(axis=1).mean(), near.any(axis=0).mean()))
    return np.mean(one_to_one), np.mean(dilated)


def scene(random, height, width, num_classes=4):
    """Return a mask of random blobs, and as prediction a shifted copy with some noise."""
    coarse = random.integers(num_classes, size=(6, 8)).astype(np.uint8)
    mask = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)
    moved = np.roll(mask, random.integers(-2, 3, size=2), axis=(0, 1))
    noise = random.random(mask.shape) < 0.02
    return np.where(noise, random.integers(num_classes, size=mask.shape), moved).astype(np.uint8), mask


def test_a_boundary_pixel_is_one_whose_two_by_two_block_is_mixed():
    labels = np.zeros((5, 6), np.uint8)
    labels[2:4, 2:4] = 1
    rows, columns = BoundaryPixels(labels).of(1)
    # A 3x3 ring, half a pixel above and to the left of the edge of the square.
    ring = {(1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2), (3, 3)}
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == ring
    assert [len(axis) for axis in BoundaryPixels(labels).of(0)] == [8, 8]
    assert len(BoundaryPixels(labels).of(7)[0]) == 0


def test_a_boundary_reaches_the_image_edge_which_is_not_itself_a_boundary():
    labels = np.zeros((4, 4), np.uint8)
    labels[:, 2:] = 1
    rows, columns = BoundaryPixels(labels).of(1)
    assert rows.tolist() == [0, 1, 2, 3]
    assert columns.tolist() == [1, 1, 1, 1]


def test_the_tolerance_at_360x480_is_four_and_a_half_pixels():
    size = (360, 480)
    true = pixels([(100, 100)])
    assert boundary_f1(pixels([(104, 102)]), true, size) == (1.0, 1.0)  # sqrt(20) = 4.47
    assert boundary_f1(pixels([(103, 104)]), true, size) == (0.0, 0.0)  # 5
    assert boundary_f1(pixels([(100, 104)]), true, size) == (1.0, 1.0)
    assert boundary_f1(pixels([(100, 105)]), true, size) == (0.0, 0.0)


def test_a_pixel_at_exactly_the_tolerance_is_near():
    # A diagonal of 400: 3 pixels.
    size = (240, 320)
    assert boundary_f1(pixels([(10, 13)]), pixels([(10, 10)]), size) == (1.0, 1.0)


def test_one_pixel_matches_only_one_other():
    # Three predicted pixels near the same true one: precision 1/3 one-to-one, 1 dilated; recall 1.
    predicted, true = pixels([(10, 9), (10, 10), (10, 11)]), pixels([(10, 10)])
    assert boundary_f1(predicted, true, (360, 480)) == (pytest.approx(0.5), 1.0)


@pytest.mark.parametrize("seed", range(40))
def test_the_matching_is_the_largest_possible(seed):
    random = np.random.default_rng(seed)
    places = list(itertools.product(range(6), range(6)))
    predicted, true = (
        [places[index] for index in sorted(random.choice(36, size=random.integers(1, 8), replace=False))]
        for _ in range(2)
    )
    size = (180, 240) if seed % 2 else (120, 160)  # 2.25 and 1.5 pixels
    distance = 0.0075 * math.hypot(*size)
    matched = largest_matching(predicted, true, distance)
    f1, _ = boundary_f1(pixels(predicted), pixels(true), size)
    assert f1 == pytest.approx(f1_of(matched / len(predicted), matched / len(true)))


@pytest.mark.parametrize("seed", range(6))
def test_the_scores_of_an_image_equal_the_definition(seed):
    random = np.random.default_rng(seed)
    prediction, mask = scene(random, 60 + seed, 160)  # 1.3 pixels
    mask[20:30, 40:80] = 255
    boundaries = Boundaries(4, 255)
    boundaries.update(prediction, mask)
    expected = by_definition(prediction, mask, 4, 255)
    assert (boundaries.compute().f1, boundaries.compute().f1_dilated) == pytest.approx(expected)


def test_a_perfect_prediction_scores_one_and_an_empty_one_zero():
    mask = np.zeros((100, 100), np.uint8)
    mask[20:50, 20:50] = 1
    for prediction, score in ((mask, 1.0), (np.zeros_like(mask), 0.0), (np.roll(mask, 10, 1), None)):
        boundaries = Boundaries(2, 255)
        boundaries.update(prediction, mask)
        result = boundaries.compute()
        if score is None:  # shifted by ten pixels: parts of the horizontal sides still match
            assert 0.2 < result.f1 < 0.8
        else:
            assert (result.f1, result.f1_dilated) == (score, score)


def test_a_shift_lowers_the_score_only_beyond_the_tolerance():
    mask = np.zeros((360, 480), np.uint8)
    mask[100:200, 100:200] = 1
    scores = []
    for step in (0, 2, 3, 4, 6):  # diagonally: 0, 2.8, 4.2, 5.7, 8.5 pixels
        boundaries = Boundaries(2, 255)
        boundaries.update(np.roll(mask, (step, step), axis=(0, 1)), mask)
        scores.append(boundaries.compute().f1)
    assert scores[0] == scores[1] == scores[2] == 1.0
    assert scores[2] > scores[3] > scores[4]


def test_dilated_f1_is_never_lower_than_f1():
    random = np.random.default_rng(0)
    boundaries = Boundaries(4, 255)
    for _ in range(10):
        boundaries.update(*scene(random, 120, 160))
    assert (np.array(boundaries.f1_dilated) >= np.array(boundaries.f1) - 1e-12).all()
    assert boundaries.compute().f1_dilated > boundaries.compute().f1


def test_means_are_over_the_classes_in_the_ground_truth_and_then_over_images():
    # First image: classes 0 and 1 match exactly; class 2, only predicted, does not count. Second: class 2 is missed
    # (0), class 0 matches in part. Third: no boundary, no score.
    first = np.zeros((40, 40), np.uint8)
    first[10:20, 10:20] = 1
    second = np.zeros((40, 40), np.uint8)
    second[10:20, 10:20] = 2
    boundaries = Boundaries(3, 255)
    boundaries.update(first, first)
    boundaries.update(np.zeros_like(second), second)
    boundaries.update(np.ones_like(first), np.zeros_like(first))
    result = boundaries.compute()
    assert result.f1 == pytest.approx((1 + 0) / 2)
    assert result.f1_by_class.tolist() == [0.5, 1.0, 0.0]
    only_predicted = Boundaries(3, 255)
    with_a_third = first.copy()
    with_a_third[35:, 35:] = 2
    only_predicted.update(with_a_third, first)
    true = len(BoundaryPixels(first).of(0)[0])
    predicted = len(BoundaryPixels(with_a_third).of(0)[0])
    assert only_predicted.compute().f1 == pytest.approx((1 + f1_of(true / predicted, 1)) / 2)
    assert math.isnan(only_predicted.compute().f1_by_class[2])


def test_a_class_has_a_boundary_at_ignored_pixels_as_published():
    mask = np.zeros((60, 60), np.uint8)
    mask[:, 30:] = 255
    boundaries = Boundaries(2, 255)
    boundaries.update(np.zeros_like(mask), mask)  # all pixels that are not ignored are correct
    assert boundaries.compute().f1 == 0.0
    boundaries = Boundaries(2, 255)
    boundaries.update(np.where(mask == 255, 1, 0).astype(np.uint8), mask)
    assert boundaries.compute().f1 == 1.0


def band_by_definition(member, width):
    """Return the pixels that 3x3 erosions remove, with zeros outside the image, as in Cheng et al.'s program."""
    padded = np.pad(member.astype(np.uint8), 1)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1]
    return member & (eroded == 0)


@pytest.mark.parametrize("size", [(60, 80), (90, 61), (9, 7)])
def test_boundary_iou_equals_the_authors_program_over_the_data_set(size):
    random = np.random.default_rng(1)
    boundaries, intersections, unions = Boundaries(4, 255), np.zeros(4), np.zeros(4)
    for _ in range(5):
        prediction, mask = scene(random, *size)
        boundaries.update(prediction, mask)
        width = max(1, round(0.02 * math.hypot(*size)))
        for label in range(4):
            first, second = (band_by_definition(labels == label, width) for labels in (prediction, mask))
            intersections[label] += (first & second).sum()
            unions[label] += (first | second).sum()
    result = boundaries.compute()
    assert result.iou_by_class == pytest.approx(intersections / unions)
    assert result.iou == pytest.approx(np.mean(intersections / unions))


def test_boundary_iou_by_hand():
    # 10x10, band of width 1. The 4x4 square has 12 pixels in its band; the prediction is shifted by one column.
    mask = np.zeros((10, 10), np.uint8)
    mask[3:7, 3:7] = 1
    boundaries = Boundaries(2, 255)
    boundaries.update(np.roll(mask, 1, axis=1), mask)
    common = 2 * 3  # the horizontal sides overlap in three pixels each, the vertical ones not at all
    assert boundaries.compute().iou_by_class[1] == pytest.approx(common / (12 + 12 - common))


def test_boundary_iou_does_not_depend_on_predictions_at_ignored_pixels():
    random = np.random.default_rng(2)
    prediction, mask = scene(random, 60, 80)
    mask[10:40, 20:50] = 255
    other = np.where(mask == 255, random.integers(4, size=mask.shape), prediction).astype(np.uint8)
    results = []
    for predicted in (prediction, other):
        boundaries = Boundaries(4, 255)
        boundaries.update(predicted, mask)
        results.append(boundaries.compute())
    assert results[0].iou == results[1].iou
    assert results[0].f1 != results[1].f1  # which depends on them, as published


def test_a_fully_ignored_mask_has_no_scores_and_no_warning(recwarn):
    boundaries = Boundaries(3, 255)
    assert math.isnan(boundaries.compute().f1)
    boundaries.update(np.zeros((5, 5), np.uint8), np.full((5, 5), 255, np.uint8))
    result = boundaries.compute()
    assert math.isnan(result.f1)
    assert math.isnan(result.iou)
    assert not recwarn.list


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2), (200, 1)])
def test_images_of_every_size_are_scored(size):
    random = np.random.default_rng(0)
    mask = random.integers(2, size=size).astype(np.uint8)
    mask.flat[0] = 0
    boundaries = Boundaries(2, 255)
    boundaries.update(mask, mask)
    assert boundaries.compute().f1 == 1.0 or mask.size == 1
    assert boundaries.compute().iou == 1.0


def test_the_report_and_the_table_contain_the_boundary_scores():
    mask = np.zeros((50, 50), np.uint8)
    mask[10:30, 10:30] = 1
    classes = Classes(("ground", "square", "moon"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)))
    boundaries = Boundaries(3, 255)
    boundaries.update(mask, mask)
    confusion = np.diag([2100, 400, 0])
    content = report(confusion, 1, classes, boundaries=boundaries)
    assert (content["boundary_f1"], content["boundary_f1_dilated"], content["boundary_iou"]) == (1.0, 1.0, 1.0)
    assert [entry["boundary_f1"] for entry in content["classes"]] == [1.0, 1.0, None]
    assert [entry["dice"] for entry in content["classes"]] == [1.0, 1.0, None]
    assert report(confusion, 1, classes)["boundary_f1"] is None
    table = score_table(confusion, classes, boundaries=boundaries).splitlines()
    assert table[0].endswith("boundary F1")
    assert table[2].endswith("100.0%")
    assert any(line.split() == ["boundary", "F1", "100.0%"] for line in table)
    assert "boundary" not in score_table(confusion, classes)


def test_the_tolerances_equal_the_published_ones():
    assert (boundary.TOLERANCE, boundary.BAND) == (0.0075, 0.02)
