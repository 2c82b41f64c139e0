"""Mixed training images, checked with images whose pixels encode their source."""

import numpy as np
import pytest

from segdeconv.data import Shapes
from segdeconv.data.augmentation import Augmentation
from segdeconv.data.loading import TrainingBatches
from segdeconv.data.mixing import Mixing
from segdeconv.data.preprocessing import Preprocessing
from segdeconv.errors import UsageError

kinds = pytest.mark.parametrize("mix", ["classes", "box"])


def mixing(mix, share=1.0, seed=0):
    return Mixing(mix, share, ignore_index=255, seed=seed)


@pytest.fixture
def labels():
    """Eight bands of classes 0 to 4 and of ignored pixels, 40 pixels wide."""
    return np.repeat(np.array([0, 1, 2, 3, 4, 255, 0, 4], dtype=np.uint8), 5)[:, None].repeat(40, axis=1)


@kinds
def test_every_pixel_and_its_label_come_from_the_same_image(mix, labels):
    mask = np.full((40, 40), 7, dtype=np.uint8)
    image = np.dstack([np.full_like(mask, 10), mask, mask])
    other = np.dstack([np.full_like(labels, 20), labels, labels])
    for epoch in range(20):
        mixed, mixed_mask = mixing(mix)(image, mask, other, labels, epoch, index=3)
        assert mixed.dtype == mixed_mask.dtype == np.uint8
        assert (mixed[:, :, 1] == mixed_mask).all(), "a pixel has the label of another"
        assert ((mixed[:, :, 0] == 20) == (mixed_mask != 7)).all()
        assert {10, 20} == set(np.unique(mixed[:, :, 0])), "one image is missing from the result"


def test_half_of_the_classes_are_pasted_whole_and_ignored_pixels_never(labels):
    all_classes = []
    for index in range(60):
        pasted = mixing("classes").pasted(labels, 0, index)
        pasted_classes = set(np.unique(labels[pasted]))
        assert len(pasted_classes) == 3, "not three of five classes"
        assert 255 not in pasted_classes
        assert (pasted == np.isin(labels, list(pasted_classes))).all(), "only a part of a class is pasted"
        all_classes += pasted_classes
    assert set(all_classes) == {0, 1, 2, 3, 4}


def test_nothing_is_pasted_from_a_fully_ignored_image():
    assert not mixing("classes").pasted(np.full((4, 4), 255, dtype=np.uint8), 0, 0).any()


def test_a_box_is_a_rectangle_of_a_tenth_to_half_of_the_image_at_any_position():
    covered = np.zeros((60, 90), dtype=int)
    for index in range(300):
        pasted = mixing("box").pasted(np.zeros((60, 90), dtype=np.uint8), 0, index)
        rows, columns = pasted.any(axis=1).nonzero()[0], pasted.any(axis=0).nonzero()[0]
        assert pasted.sum() == len(rows) * len(columns) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert 0.09 < pasted.mean() < 0.51
        covered += pasted
    assert all(edge.any() for edge in (covered[0], covered[-1], covered[:, 0], covered[:, -1], covered[30, 45]))


def test_the_draws_depend_only_on_seed_epoch_and_index(labels):
    def draw(seed, epoch, index):
        box_mixing = mixing("box", seed=seed)
        return box_mixing.partner(epoch, index, 1000), box_mixing.pasted(labels, epoch, index).tobytes()

    keys = [(seed, epoch, index) for seed in range(3) for epoch in range(3) for index in range(3)]
    assert [draw(*key) for key in keys] == [draw(*key) for key in reversed(keys)][::-1]
    assert len({draw(*key) for key in keys}) == len(keys)


def test_the_given_fraction_of_images_is_mixed_with_any_other_image():
    partners = [mixing("box", share=0.3).partner(0, index, 10) for index in range(2000)]
    mixed = [partner for partner in partners if partner is not None]
    assert 0.27 < len(mixed) / len(partners) < 0.33
    assert np.bincount(mixed, minlength=10).min() > 30
    assert all(mixing("box", share=0).partner(0, index, 10) is None for index in range(100))


@kinds
def test_a_training_sample_mixes_two_augmented_ones(mix):
    dataset = Shapes("train", num_train=6, side=32)
    augmentation = Augmentation({}, crop=None, ignore_index=255, fill=[0.0] * 3, seed=0)
    samples = TrainingBatches(dataset, Preprocessing(None, (0.0,) * 3, (1.0,) * 3), augmentation, mixing(mix))
    for index in range(6):
        sample, own = samples[2, index], dataset[index]
        other = dataset[samples.mixing.partner(2, index, 6)]
        pasted = samples.mixing.pasted(other.mask, 2, index)
        assert sample["name"] == own.name
        np.testing.assert_array_equal(sample["image"], np.where(pasted[..., None], other.image, own.image))
        np.testing.assert_array_equal(sample["mask"], np.where(pasted, other.mask, own.mask))


def test_images_of_two_sizes_are_refused_with_a_way_out():
    small, large = (np.zeros((side, side, 3), dtype=np.uint8) for side in (8, 9))
    with pytest.raises(UsageError, match=r"mix=box needs training images of the same size.*\(8, 8\).*\(9, 9\).*crop"):
        mixing("box")(small, small[:, :, 0], large, large[:, :, 0], 0, 0)
