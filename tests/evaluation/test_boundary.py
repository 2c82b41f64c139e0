"""Boundary scores against exhaustive matching, distances by their definition, and numbers worked by hand."""

import itertools
import math

import cv2
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from segdeconv.classes import Classes
from segdeconv.evaluation import boundary
from segdeconv.evaluation.boundary import Boundaries, Outlines, boundary_f1
from segdeconv.evaluation.report import report, score_table


def pixels(places):
    return tuple(np.array(places, dtype=np.int64).reshape(-1, 2).T)


def largest_matching(one, other, distance):
    """By trying: the first pixel goes to each of its partners in turn, or to none."""
    if not one:
        return 0
    best = largest_matching(one[1:], other, distance)
    for partner in other:
        if math.dist(one[0], partner) <= distance:
            best = max(best, 1 + largest_matching(one[1:], [left for left in other if left != partner], distance))
    return best


def f1_of(precision, recall):
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def by_definition(prediction, mask, num_classes, ignore_index):
    """(F1, F1 dilated) of one image, with the boundary of each class looked up pixel by pixel."""
    height, width = mask.shape
    distance = 0.0075 * math.hypot(height, width)

    def outline(labels, label):
        found = []
        for y, x in np.ndindex(height, width):
            block = labels[y : y + 2, x : x + 2] == label
            if block.any() and not block.all():
                found.append((y, x))
        return found

    one_to_one, dilated = [], []
    for label in range(num_classes):
        predicted, true = outline(prediction, label), outline(mask, label)
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
    """Random blobs of classes, and a prediction that is the same a little elsewhere, with some noise."""
    coarse = random.integers(num_classes, size=(6, 8)).astype(np.uint8)
    mask = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)
    moved = np.roll(mask, random.integers(-2, 3, size=2), axis=(0, 1))
    noise = random.random(mask.shape) < 0.02
    return np.where(noise, random.integers(num_classes, size=mask.shape), moved).astype(np.uint8), mask


def test_the_outline_is_where_a_two_by_two_block_is_mixed():
    labels = np.zeros((5, 6), np.uint8)
    labels[2:4, 2:4] = 1
    rows, columns = Outlines(labels).of(1)
    # From half a pixel above and to the left of the square: a ring of 3x3 around its middle.
    ring = {(1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (3, 1), (3, 2), (3, 3)}
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == ring
    assert [len(found) for found in Outlines(labels).of(0)] == [8, 8]
    assert len(Outlines(labels).of(7)[0]) == 0


def test_the_edge_of_the_image_is_no_boundary_but_a_boundary_reaches_it():
    labels = np.zeros((4, 4), np.uint8)
    labels[:, 2:] = 1
    rows, columns = Outlines(labels).of(1)
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


def test_one_pixel_vouches_for_one_other_only():
    # Three predicted pixels near the same true one: precision 1/3 of one-to-one, 1 dilated; recall 1.
    predicted, true = pixels([(10, 9), (10, 10), (10, 11)]), pixels([(10, 10)])
    assert boundary_f1(predicted, true, (360, 480)) == (pytest.approx(0.5), 1.0)


@pytest.mark.parametrize("seed", range(40))
def test_the_matching_is_the_largest_there_is(seed):
    random = np.random.default_rng(seed)
    places = list(itertools.product(range(6), range(6)))
    one, other = (
        [places[index] for index in sorted(random.choice(36, size=random.integers(1, 8), replace=False))]
        for _ in range(2)
    )
    size = (180, 240) if seed % 2 else (120, 160)  # 2.25 and 1.5 pixels
    distance = 0.0075 * math.hypot(*size)
    matched = largest_matching(one, other, distance)
    found, _ = boundary_f1(pixels(one), pixels(other), size)
    assert found == pytest.approx(f1_of(matched / len(one), matched / len(other)))


@pytest.mark.parametrize("seed", range(6))
def test_scores_of_an_image_are_those_of_the_definition(seed):
    random = np.random.default_rng(seed)
    prediction, mask = scene(random, 60 + seed, 160)  # 1.3 pixels
    mask[20:30, 40:80] = 255
    found = Boundaries(4, 255)
    found.update(prediction, mask)
    expected = by_definition(prediction, mask, 4, 255)
    assert (found.compute().f1, found.compute().f1_dilated) == pytest.approx(expected)


def test_a_perfect_prediction_scores_one_and_a_hopeless_one_zero():
    mask = np.zeros((100, 100), np.uint8)
    mask[20:50, 20:50] = 1
    for prediction, score in ((mask, 1.0), (np.zeros_like(mask), 0.0), (np.roll(mask, 10, 1), None)):
        found = Boundaries(2, 255)
        found.update(prediction, mask)
        result = found.compute()
        if score is None:  # ten pixels to the side: parts of the long sides of the square remain
            assert 0.2 < result.f1 < 0.8
        else:
            assert (result.f1, result.f1_dilated) == (score, score)


def test_moving_an_outline_within_the_tolerance_costs_little_and_beyond_it_much():
    mask = np.zeros((360, 480), np.uint8)
    mask[100:200, 100:200] = 1
    scores = []
    for step in (0, 2, 3, 4, 6):  # diagonally: 0, 2.8, 4.2, 5.7, 8.5 pixels
        found = Boundaries(2, 255)
        found.update(np.roll(mask, (step, step), axis=(0, 1)), mask)
        scores.append(found.compute().f1)
    assert scores[0] == scores[1] == scores[2] == 1.0
    assert scores[2] > scores[3] > scores[4]


def test_dilated_is_never_the_lower_of_the_two():
    random = np.random.default_rng(0)
    found = Boundaries(4, 255)
    for _ in range(10):
        found.update(*scene(random, 120, 160))
    assert (np.array(found.f1_dilated) >= np.array(found.f1) - 1e-12).all()
    assert found.compute().f1_dilated > found.compute().f1


def test_means_are_over_the_classes_of_an_images_truth_and_then_over_images():
    # First image: classes 0 and 1 met exactly; a class 2 that is only predicted is no class of it. Second: class 2
    # missed (0), class 0 met in part. Third: no boundary, no score.
    first = np.zeros((40, 40), np.uint8)
    first[10:20, 10:20] = 1
    second = np.zeros((40, 40), np.uint8)
    second[10:20, 10:20] = 2
    found = Boundaries(3, 255)
    found.update(first, first)
    found.update(np.zeros_like(second), second)
    found.update(np.ones_like(first), np.zeros_like(first))
    result = found.compute()
    assert result.f1 == pytest.approx((1 + 0) / 2)
    assert result.f1_by_class.tolist() == [0.5, 1.0, 0.0]
    only_predicted = Boundaries(3, 255)
    with_a_third = first.copy()
    with_a_third[35:, 35:] = 2
    only_predicted.update(with_a_third, first)
    true = len(Outlines(first).of(0)[0])
    predicted = len(Outlines(with_a_third).of(0)[0])
    assert only_predicted.compute().f1 == pytest.approx((1 + f1_of(true / predicted, 1)) / 2)
    assert math.isnan(only_predicted.compute().f1_by_class[2])


def test_a_class_ends_at_ignored_pixels_as_published():
    mask = np.zeros((60, 60), np.uint8)
    mask[:, 30:] = 255
    found = Boundaries(2, 255)
    found.update(np.zeros_like(mask), mask)  # no pixel that counts is wrong
    assert found.compute().f1 == 0.0
    found = Boundaries(2, 255)
    found.update(np.where(mask == 255, 1, 0).astype(np.uint8), mask)
    assert found.compute().f1 == 1.0


def band_by_definition(member, width):
    """Cheng et al.'s program: what 3x3 erosions, with nothing outside the image, take away."""
    padded = np.pad(member.astype(np.uint8), 1)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1]
    return member & (eroded == 0)


@pytest.mark.parametrize("size", [(60, 80), (90, 61), (9, 7)])
def test_boundary_iou_is_that_of_the_authors_program_counted_over_the_data_set(size):
    random = np.random.default_rng(1)
    found, intersections, unions = Boundaries(4, 255), np.zeros(4), np.zeros(4)
    for _ in range(5):
        prediction, mask = scene(random, *size)
        found.update(prediction, mask)
        width = max(1, round(0.02 * math.hypot(*size)))
        for label in range(4):
            one, other = (band_by_definition(labels == label, width) for labels in (prediction, mask))
            intersections[label] += (one & other).sum()
            unions[label] += (one | other).sum()
    result = found.compute()
    assert result.iou_by_class == pytest.approx(intersections / unions)
    assert result.iou == pytest.approx(np.mean(intersections / unions))


def test_boundary_iou_by_hand():
    # 10x10, band of 1. The square of 4x4 has 12 pixels in its band; a column to the right, 2x4 + 2 are common.
    mask = np.zeros((10, 10), np.uint8)
    mask[3:7, 3:7] = 1
    found = Boundaries(2, 255)
    found.update(np.roll(mask, 1, axis=1), mask)
    common = 2 * 3  # the upper and lower sides overlap in three pixels each, the upright ones not at all
    assert found.compute().iou_by_class[1] == pytest.approx(common / (12 + 12 - common))


def test_boundary_iou_does_not_look_at_what_is_predicted_where_the_mask_is_ignored():
    random = np.random.default_rng(2)
    prediction, mask = scene(random, 60, 80)
    mask[10:40, 20:50] = 255
    other = np.where(mask == 255, random.integers(4, size=mask.shape), prediction).astype(np.uint8)
    results = []
    for predicted in (prediction, other):
        found = Boundaries(4, 255)
        found.update(predicted, mask)
        results.append(found.compute())
    assert results[0].iou == results[1].iou
    assert results[0].f1 != results[1].f1  # as published, which does


def test_a_mask_without_a_class_scores_nothing_without_a_warning(recwarn):
    found = Boundaries(3, 255)
    assert math.isnan(found.compute().f1)
    found.update(np.zeros((5, 5), np.uint8), np.full((5, 5), 255, np.uint8))
    result = found.compute()
    assert math.isnan(result.f1)
    assert math.isnan(result.iou)
    assert not recwarn.list


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2), (200, 1)])
def test_images_of_any_size_are_scored(size):
    random = np.random.default_rng(0)
    mask = random.integers(2, size=size).astype(np.uint8)
    mask.flat[0] = 0
    found = Boundaries(2, 255)
    found.update(mask, mask)
    assert found.compute().f1 == 1.0 or mask.size == 1
    assert found.compute().iou == 1.0


def test_the_report_and_the_table_hold_the_boundary_scores():
    mask = np.zeros((50, 50), np.uint8)
    mask[10:30, 10:30] = 1
    classes = Classes(("ground", "square", "moon"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)))
    found = Boundaries(3, 255)
    found.update(mask, mask)
    confusion = np.diag([2100, 400, 0])
    content = report(confusion, 1, classes, boundaries=found)
    assert (content["boundary_f1"], content["boundary_f1_dilated"], content["boundary_iou"]) == (1.0, 1.0, 1.0)
    assert [entry["boundary_f1"] for entry in content["classes"]] == [1.0, 1.0, None]
    assert report(confusion, 1, classes)["boundary_f1"] is None
    shown = score_table(confusion, classes, boundaries=found).splitlines()
    assert shown[0].endswith("boundary F1")
    assert shown[2].endswith("100.0%")
    assert any(line.split() == ["boundary", "F1", "100.0%"] for line in shown)
    assert "boundary" not in score_table(confusion, classes)


def test_the_tolerances_are_the_published_ones():
    assert (boundary.TOLERANCE, boundary.BAND) == (0.0075, 0.02)
