"""Class weights checked against the table of CamVid's pixel counts and the published lists."""

import pytest

from segdeconv.losses.class_weights import PRESETS, class_weights, inverse_frequency, median_frequency

IMAGE = 360 * 480
# CamVid train: class, pixels, images with the class, weight with the median over 11 classes, and over 12 with void.
CAMVID = [
    ("Sky", 10_682_767, 366, 0.2793, 0.2565),
    ("DecoderTrace", 14_750_079, 365, 0.2017, 0.1853),
    ("Pole", 623_349, 366, 4.7865, 4.3963),
    ("Road", 20_076_880, 367, 0.1490, 0.1369),
    ("Pavement", 2_845_085, 349, 1.0000, 0.9185),
    ("Tree", 6_166_762, 319, 0.4217, 0.3873),
    ("SignSymbol", 743_859, 351, 3.8467, 3.5331),
    ("Fence", 714_595, 173, 1.9736, 1.8127),
    ("Car", 3_719_877, 360, 0.7889, 0.7246),
    ("Pedestrian", 405_385, 317, 6.3747, 5.8550),
    ("Bicyclist", 184_967, 201, 8.8587, 8.1365),
]
VOID = ("void", 2_503_995, 367, None, 1.0974)

PIXELS = [row[1] for row in CAMVID]
IMAGE_PIXELS = [row[2] * IMAGE for row in CAMVID]


def test_median_frequency_gives_the_weights_of_the_table_over_11_classes():
    weights = median_frequency(PIXELS, IMAGE_PIXELS)
    assert [round(weight, 4) for weight in weights] == [row[3] for row in CAMVID]


def test_median_frequency_gives_the_weights_of_the_table_with_void_in_the_median():
    weights = median_frequency([*PIXELS, VOID[1]], [*IMAGE_PIXELS, VOID[2] * IMAGE])
    assert [round(weight, 4) for weight in weights] == [row[4] for row in (*CAMVID, VOID)]


def test_median_frequency_leaves_absent_classes_out_of_the_median_and_gives_them_weight_zero():
    # Frequencies 0.5, 0.1, 0.2: median 0.2.
    assert median_frequency([50, 0, 10, 20], [100, 0, 100, 100]) == pytest.approx([0.4, 0, 2, 1])
    assert median_frequency([0, 0], [0, 0]) == [0.0, 0.0]


def test_the_median_of_two_frequencies_is_their_mean():
    # Frequencies 0.75 and 0.25: median 0.5.
    assert median_frequency([75, 25], [100, 100]) == pytest.approx([2 / 3, 2])


def test_inverse_frequency_gives_every_present_class_the_same_total():
    weights = inverse_frequency([*PIXELS, 0], [*IMAGE_PIXELS, 0])
    totals = [weight * count for weight, count in zip(weights, PIXELS, strict=False)]
    assert totals == pytest.approx([sum(PIXELS) / 11] * 11)
    assert weights[-1] == 0


def test_camvid_preset_is_the_published_list():
    published = "0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826, 9.6446, 1.8418, 0.6823, 6.2478, 7.3614"
    assert class_weights(PIXELS, IMAGE_PIXELS, class_weighting="camvid") == [float(x) for x in published.split(", ")]


def test_sunrgbd_preset_is_the_published_list_without_void():
    published = (
        "0.351185, 0.382592, 0.447844, 0.634237, 0.375678, 0.582794, 0.476692, 0.776787, 0.980661, 1.020118, "
        "0.623396, 2.596563, 0.974491, 0.920240, 0.663878, 1.173357, 0.861062, 0.919955, 2.147320, 1.190958, "
        "1.164314, 1.854754, 1.446550, 2.853078, 0.768276, 1.651721, 4.456313, 2.205633, 1.116695, 2.781543, "
        "0.705917, 4.005834, 2.208329, 0.967071, 1.475710, 5.347752, 0.745528, 4.017548"
    )
    assert list(PRESETS["sunrgbd"]) == [float(x) for x in published.split(", ")][1:]
    # The median of 38 frequencies is the mean of the middle two, so the inverses of their weights have mean 1.
    middle = 1 / 0.980661, 1 / 1.020118
    assert sum(middle) == pytest.approx(2, abs=1e-5)


def test_without_class_weighting_the_weights_are_none():
    assert class_weights(PIXELS, IMAGE_PIXELS) is None


def test_class_weighting_by_name_applies_the_formula():
    for name, formula in {"median_frequency": median_frequency, "inverse_frequency": inverse_frequency}.items():
        assert class_weights(PIXELS, IMAGE_PIXELS, class_weighting=name) == formula(PIXELS, IMAGE_PIXELS)


def test_the_power_is_an_exponent_and_keeps_absent_classes_at_zero():
    weights = class_weights(
        [50, 0, 10, 20], [100, 0, 100, 100], class_weighting="median_frequency", class_weighting_power=0.5
    )
    assert weights == pytest.approx([0.4**0.5, 0, 2**0.5, 1])


def test_an_unknown_class_weighting_is_refused_with_a_suggestion():
    with pytest.raises(
        ValueError, match=r"loss\.class_weighting=median_freqency is unknown - did you mean 'median_freq"
    ):
        class_weights(PIXELS, IMAGE_PIXELS, class_weighting="median_freqency")


def test_the_preset_of_another_data_set_is_refused():
    with pytest.raises(
        ValueError, match=r"loss\.class_weighting=camvid has 11 weights, but the data set has 2 classes"
    ):
        class_weights([1, 1], [2, 2], class_weighting="camvid")
