"""What is kept of a prediction, and which images are shown."""

from __future__ import annotations

import numpy as np
import pytest

from segdeconv.classes import Classes, voc_colours
from segdeconv.drawing.thumbnails import SIDE, Gallery, choose, small, smaller

CLASSES = Classes(tuple("abc"), voc_colours(3))


@pytest.mark.parametrize("size", [(1, 1), (37, 61), (480, 480)])
def test_a_small_prediction_is_kept_as_it_is(size):
    random = np.random.default_rng(0)
    prediction = random.integers(0, 3, size).astype(np.uint8)
    gallery = Gallery(CLASSES, 1.0)
    gallery.update(prediction, np.zeros(size, np.float32))
    np.testing.assert_array_equal(gallery.prediction(0), prediction)
    assert gallery.uncertainty(0).max() == 0


def test_a_large_prediction_keeps_its_labels_and_proportions():
    prediction = np.kron(np.array([[0, 1], [2, 0]], np.uint8), np.ones((500, 700), np.uint8))
    gallery = Gallery(CLASSES, 1.0)
    gallery.update(prediction, np.zeros(prediction.shape, np.float32))
    kept = gallery.prediction(0)
    assert kept.shape == small(prediction.shape) == (343, SIDE)
    assert [kept[10, 10], kept[10, -10], kept[-10, 10], kept[-10, -10]] == [0, 1, 2, 0]


@pytest.mark.parametrize("value", [0.0001, 0.01, 0.3, 1.0])
def test_uncertainty_is_kept_to_a_hundredth_of_its_root(value):
    gallery = Gallery(CLASSES, 2.0)
    gallery.update(np.zeros((30, 40), np.uint8), np.full((30, 40), 2 * value, np.float32))
    assert np.sqrt(gallery.uncertainty(0) / 2) == pytest.approx(np.full((30, 40), np.sqrt(value)), abs=0.01)


def test_image_and_mask_shrink_to_the_same_size():
    image, mask = smaller(np.zeros((960, 720, 5), np.uint16), np.full((960, 720), 255, np.uint8))
    assert (image.shape, mask.shape) == ((480, 360, 3), (480, 360))
    assert (image.dtype, mask.min()) == (np.uint8, 255)


def test_the_worst_the_median_and_the_best_are_chosen():
    scores = np.random.default_rng(0).permutation(101) / 100
    chosen = choose(scores.tolist(), each=3)
    assert [(round(100 * scores[one.place]), one.kind, one.rank) for one in chosen] == [
        (0, "worst", 1), (1, "worst", 2), (2, "worst", 3),
        (49, "median", 50), (50, "median", 51), (51, "median", 52),
        (98, "best", 99), (99, "best", 100), (100, "best", 101),
    ]  # fmt: skip


def test_few_images_are_all_shown_those_without_a_score_last():
    assert [tuple(one) for one in choose([0.5, None, 0.2], each=1)] == [(2, "all", 1), (0, "all", 2), (1, "all", 3)]
    assert choose([], each=1) == []


def test_no_image_is_chosen_twice_where_few_have_a_score():
    scores = [0.3, 0.1, 0.2] + [None] * 20
    assert [(one.place, one.kind) for one in choose(scores, each=2)] == [(1, "worst"), (2, "worst"), (0, "best")]
