"""Thumbnails of predictions, and the choice of the images that are shown."""

from __future__ import annotations

import numpy as np
import pytest

from segdeconv.classes import Classes, voc_colours
from segdeconv.drawing.thumbnails import SIDE, Gallery, choose, smaller, thumbnail_size

CLASSES = Classes(tuple("abc"), voc_colours(3))


@pytest.mark.parametrize("size", [(1, 1), (37, 61), (480, 480)])
def test_a_small_prediction_is_stored_unchanged(size):
    random = np.random.default_rng(0)
    prediction = random.integers(0, 3, size).astype(np.uint8)
    gallery = Gallery(CLASSES, 1.0)
    gallery.update(prediction, np.zeros(size, np.float32))
    np.testing.assert_array_equal(gallery.prediction(0), prediction)
    assert gallery.uncertainty(0).max() == 0


def test_a_large_prediction_keeps_its_classes_and_proportions():
    prediction = np.kron(np.array([[0, 1], [2, 0]], np.uint8), np.ones((500, 700), np.uint8))
    gallery = Gallery(CLASSES, 1.0)
    gallery.update(prediction, np.zeros(prediction.shape, np.float32))
    thumbnail = gallery.prediction(0)
    assert thumbnail.shape == thumbnail_size(prediction.shape) == (343, SIDE)
    assert [thumbnail[y, x] for y in (10, -10) for x in (10, -10)] == [0, 1, 2, 0]


@pytest.mark.parametrize("value", [0.0001, 0.01, 0.3, 1.0])
def test_the_root_of_the_uncertainty_is_stored_to_a_hundredth(value):
    gallery = Gallery(CLASSES, 2.0)
    gallery.update(np.zeros((30, 40), np.uint8), np.full((30, 40), 2 * value, np.float32))
    assert np.sqrt(gallery.uncertainty(0) / 2) == pytest.approx(np.full((30, 40), np.sqrt(value)), abs=0.01)


def test_an_image_and_its_mask_are_reduced_to_the_same_size():
    image, mask = smaller(np.zeros((960, 720, 5), np.uint16), np.full((960, 720), 255, np.uint8))
    assert (image.shape, mask.shape) == ((480, 360, 3), (480, 360))
    assert (image.dtype, mask.min()) == (np.uint8, 255)


def test_the_worst_the_median_and_the_best_are_chosen():
    scores = np.random.default_rng(0).permutation(101) / 100
    chosen = choose(scores.tolist(), each=3)
    assert [(round(100 * scores[choice.place]), choice.kind, choice.rank) for choice in chosen] == [
        (0, "worst", 1), (1, "worst", 2), (2, "worst", 3),
        (49, "median", 50), (50, "median", 51), (51, "median", 52),
        (98, "best", 99), (99, "best", 100), (100, "best", 101),
    ]  # fmt: skip


def test_few_images_are_all_chosen_those_without_a_score_last():
    assert [tuple(choice) for choice in choose([0.5, None, 0.2], each=1)] == [
        (2, "all", 1),
        (0, "all", 2),
        (1, "all", 3),
    ]
    assert choose([], each=1) == []


def test_no_image_is_chosen_twice_if_few_have_a_score():
    scores = [0.3, 0.1, 0.2] + [None] * 20
    chosen = choose(scores, each=2)
    assert [(choice.place, choice.kind) for choice in chosen] == [
        (1, "worst"),
        (2, "worst"),
        (0, "best"),
    ]
