"""The removal of small regions, compared with doing it one region at a time on the whole mask."""

import numpy as np
import pytest
from scipy import ndimage

from segdeconv.inference.small_regions import merge_small_regions


def regions_of(mask):
    """Return the 4-connected regions of a mask as (H, W) bool."""
    found = []
    for index in np.unique(mask):
        numbered, count = ndimage.label(mask == index)
        found += [numbered == number for number in range(1, count + 1)]
    return found


def one_at_a_time(mask, min_area):
    """Give the smallest region the class of most of the edges around it, until no region is too small."""
    mask = mask.copy()
    while True:
        small = [region for region in regions_of(mask) if region.sum() < min(min_area, mask.size)]
        if not small:
            return mask
        region = min(small, key=lambda region: (region.sum(), np.flatnonzero(region)[0]))
        votes = np.zeros(256, dtype=int)
        for y, x in np.argwhere(region):
            for beside in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= beside[0] < mask.shape[0] and 0 <= beside[1] < mask.shape[1] and not region[beside]:
                    votes[mask[beside]] += 1
        mask[region] = votes.argmax()


@pytest.mark.parametrize("min_area", [2, 5, 30, 1000])
@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("share", [0.05, 1.0])  # of pixels with a random class
def test_small_regions_are_merged_as_one_at_a_time(min_area, classes, share):
    random = np.random.default_rng(int(1000 * share) + 10 * classes + min_area)
    mask = np.kron(random.integers(0, classes, (3, 4)), np.ones((4, 3))).astype(np.uint8)
    mask = np.where(random.random(mask.shape) < share, random.integers(0, classes, mask.shape), mask).astype(np.uint8)
    before = mask.copy()
    merged = merge_small_regions(mask, min_area)
    assert merged.dtype == np.uint8
    assert np.array_equal(merged, one_at_a_time(mask, min_area))
    assert np.array_equal(mask, before)
    assert min(region.sum() for region in regions_of(merged)) >= min(min_area, mask.size)
    assert np.array_equal(merge_small_regions(merged, min_area), merged)


def test_a_region_takes_the_class_around_it_by_hand():
    mask = np.uint8([[0, 0, 0, 7, 7], [0, 3, 0, 7, 7], [0, 0, 0, 7, 7], [5, 5, 0, 7, 9]])
    # 3 and 9 are surrounded by 0 and 7. The two pixels of 5 border on 0 along three edges.
    expected = np.uint8([[0, 0, 0, 7, 7]] * 3 + [[0, 0, 0, 7, 7]])
    assert np.array_equal(merge_small_regions(mask, 3), expected)
    assert np.array_equal(merge_small_regions(mask, 2), np.where(mask == 5, np.uint8(5), expected))


def test_a_mask_without_small_regions_or_of_one_region_is_returned_as_it_is():
    mask = np.zeros((2, 3), dtype=np.uint8)
    assert (merge_small_regions(mask, 100) == 0).all()
    mask[1] = 1
    assert merge_small_regions(mask, 1) is mask
    assert merge_small_regions(mask, 3) is mask
