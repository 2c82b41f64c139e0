"""Figures of images and masks: files that are read back, shapes, and single pixels worked out by hand."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from segdeconv.classes import Classes
from segdeconv.data.datasets import ade20k, camvid, cityscapes, sunrgbd, voc
from segdeconv.data.files.reading import read_labels
from segdeconv.drawing import draw
from segdeconv.errors import UsageError

CLASSES = Classes(
    names=("sky", "road", "a rather long name"),
    colours=((10, 20, 30), (200, 100, 0), (0, 0, 250)),
    ignore_colour=(1, 2, 3),
)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


@pytest.fixture
def mask():
    mask = np.zeros((12, 20), dtype=np.uint8)
    mask[4:, 6:], mask[8:, 12:], mask[:2, :2] = 1, 2, 255
    return mask


def test_a_mask_png_has_class_indices_as_pixels_and_class_colours_as_palette(tmp_path, mask):
    path = tmp_path / "sub" / "mask.png"
    draw.save_mask(mask, CLASSES, path)
    with Image.open(path) as stored:
        assert (stored.format, stored.mode, stored.size) == ("PNG", "P", (20, 12))
        assert np.array_equal(np.asarray(stored), mask)
        colours = np.asarray(stored.convert("RGB"))
    for index, colour in [*enumerate(CLASSES.colours), (255, CLASSES.ignore_colour)]:
        assert (colours[mask == index] == colour).all()
    assert [file.name for file in path.parent.iterdir()] == ["mask.png"]


@pytest.mark.parametrize(
    ("labels", "ignored", "values", "mode"),
    [
        ((0, 1, 2), (), (0, 1, 2, 255), "P"),
        ((7, 11, 26), (), (7, 11, 26, 255), "P"),
        ((1, 2, 3), (0,), (1, 2, 3, 0), "P"),
        ((0, 1, 255), (), (0, 1, 255, 254), "P"),  # ignored pixels need a label of their own
        ((7, 11, 255), (3, 255), (7, 11, 255, 3), "P"),
        ((1, 300, 65535), (-1, 0), (1, 300, 65535, 0), "I;16"),
    ],
)
def test_a_mask_can_be_written_with_the_labels_of_the_data_set(labels, ignored, values, mode, mask, tmp_path):
    classes = dataclasses.replace(CLASSES, labels=labels, ignored_labels=ignored)
    draw.save_labels(mask, classes, tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as stored:
        assert stored.mode == mode
        expected = np.select([mask == value for value in (0, 1, 2, 255)], values)
        assert np.array_equal(np.asarray(stored), expected)
        if mode == "P":
            assert np.array_equal(np.asarray(stored.convert("RGB")), draw.colourise(mask, classes))


def test_a_mask_of_classes_given_by_colours_is_written_in_colours(mask, tmp_path):
    classes = dataclasses.replace(CLASSES)
    object.__setattr__(classes, "by_colour", True)
    draw.save_labels(mask, classes, tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as stored:
        assert stored.mode == "RGB"
        assert np.array_equal(classes.from_colours(np.asarray(stored)), mask)


def test_a_label_that_a_png_cannot_store_is_refused(mask, tmp_path):
    classes = dataclasses.replace(CLASSES, labels=(0, 1, 70000))
    with pytest.raises(UsageError, match=r"^class a rather long name has label 70000, and a PNG stores 0..65535 - use"):
        draw.save_labels(mask, classes, tmp_path / "mask.png")
    assert not list(tmp_path.iterdir())


def test_the_colours_of_a_mask_png_convert_back_to_the_mask(tmp_path, mask):
    draw.save_mask(mask, CLASSES, tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as stored:
        assert np.array_equal(CLASSES.from_colours(np.asarray(stored.convert("RGB"))), mask)


def test_an_image_png_is_lossless(tmp_path, image):
    draw.save_image(image, tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as stored:
        assert np.array_equal(np.asarray(stored), image)


def test_colourise_replaces_every_class_index_by_its_colour(mask):
    colours = {0: (10, 20, 30), 1: (200, 100, 0), 2: (0, 0, 250), 255: (1, 2, 3)}
    by_hand = [[colours[int(index)] for index in row] for row in mask]
    assert np.array_equal(draw.colourise(mask, CLASSES), np.uint8(by_hand))


def test_overlay_blends_the_classes_and_shows_the_image_where_ignored(image, mask):
    result = draw.overlay(image, mask, CLASSES, strength=0.25)
    assert result.shape == image.shape
    assert result.dtype == np.uint8
    assert np.array_equal(result[0, 0], image[0, 0])  # ignored
    expected = 0.75 * image[6, 9].astype(float) + 0.25 * np.array(CLASSES.colours[1])
    assert np.abs(result[6, 9] - expected).max() <= 1


PAIR = Classes(("background", "foreground"), ((0, 0, 0), (255, 255, 255)), labels=(0, 255), by_colour=False)
FOUND = Classes(("class_0", "class_1", "class_2"), ((0, 0, 0), (255, 96, 0), (64, 208, 255)))


def around(mask, y, x, reach):
    """Return the labels in the square around a pixel."""
    return mask[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]


@pytest.mark.parametrize("classes", [CLASSES, PAIR, FOUND], ids=["no background", "pair", "found"])
def test_overlay_fills_regions_and_leaves_the_background_clear(image, mask, classes):
    mask = np.where((mask < 255) & (mask >= len(classes)), np.uint8(1), mask)
    clear = {255} if classes.background is None else {255, classes.background}
    result = draw.overlay(image, mask, classes)
    for y, x in np.ndindex(mask.shape):
        label, (left, top) = mask[y, x], (mask[y, max(0, x - 1)], mask[max(0, y - 1), x])
        beside = {left, top, mask[y, min(19, x + 1)], mask[min(11, y + 1), x]}
        colour = np.array(classes.display_colours[label]) if label < 255 else None
        blend = image[y, x] * 0.45 + 0.55 * colour if label not in clear else None
        if label in clear:
            assert np.array_equal(result[y, x], image[y, x])
        elif beside & clear:
            assert np.array_equal(result[y, x], colour)
        else:
            expected = blend / 2 + 127 if {left, top} != {label} else blend
            assert np.abs(result[y, x] - expected).max() <= 1


@pytest.mark.parametrize("thickness", [1, 3])
@pytest.mark.parametrize("classes", [CLASSES, PAIR, FOUND], ids=["no background", "pair", "found"])
def test_outlines_are_inside_their_regions_and_the_rest_is_the_image(image, mask, classes, thickness):
    mask = np.where((mask < 255) & (mask >= len(classes)), np.uint8(1), mask)
    result = draw.overlay(image, mask, classes, outlines=True, thickness=thickness)
    for y, x in np.ndindex(mask.shape):
        drawn = mask[y, x] not in (255, classes.background) and len(np.unique(around(mask, y, x, thickness))) > 1
        expected = classes.display_colours[mask[y, x]] if drawn else image[y, x]
        assert np.array_equal(result[y, x], expected)


@pytest.mark.parametrize("outlines", [False, True])
def test_a_large_overlay_drawn_in_bands_is_the_whole_overlay(outlines, tmp_path, monkeypatch):
    random = np.random.default_rng(1)
    image = random.integers(0, 256, (1000, 300, 3), dtype=np.uint8)
    mask = np.kron(random.integers(0, 3, (100, 30)), np.ones((10, 10))).astype(np.uint8)
    whole = draw.overlay_with_legend(image, mask, FOUND, outlines=outlines)
    monkeypatch.setattr(draw, "BAND", 170)
    draw.save_overlay(image, mask, FOUND, tmp_path / "overlay.png", outlines=outlines)
    with Image.open(tmp_path / "overlay.png") as stored:
        assert np.array_equal(np.asarray(stored), whole)


def test_the_legend_of_the_background_has_no_colour():
    def patch(picture, place):
        return picture[6, place + 4]  # above the line that crosses it out

    picture = draw.legend(PAIR, [0, 1], 400)
    assert patch(picture, 6).tolist() == [255, 255, 255]
    assert (picture == (255, 96, 0)).all(axis=2).any()
    assert not (picture == (0, 0, 0)).all(axis=2).any()


def test_the_mask_of_a_black_and_white_pair_keeps_its_values_and_colours(tmp_path):
    mask = np.eye(8, dtype=np.uint8)
    for labels, values in (("index", mask), ("dataset", 255 * mask)):
        draw.save_mask(mask, PAIR, tmp_path / "mask.png", labels=labels)
        with Image.open(tmp_path / "mask.png") as stored:
            assert np.array_equal(np.asarray(stored), values)
            assert np.array_equal(np.asarray(stored.convert("L")), 255 * mask)


def test_overlay_does_not_change_its_arguments(image, mask):
    copies = image.copy(), mask.copy()
    draw.overlay(image, mask, CLASSES)
    assert np.array_equal(image, copies[0])
    assert np.array_equal(mask, copies[1])


@pytest.mark.parametrize(("channels", "order"), [(1, [0, 0, 0]), (2, [0, 1, 1]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_an_image_with_any_number_of_channels_is_converted_to_three(channels, order):
    image = np.random.default_rng(0).integers(0, 256, (12, 20, channels), dtype=np.uint8)
    assert np.array_equal(draw.to_rgb(image), np.dstack([image[:, :, channel] for channel in order]))


@pytest.mark.parametrize(
    ("dtype", "window", "values", "shown"),
    [
        (np.uint16, (1000, 3000), (0, 1000, 2000, 3000, 65535), (0, 0, 128, 255, 255)),
        (np.uint16, (-100, 100), (0, 50, 100), (128, 191, 255)),
        (np.uint8, (50, 100), (0, 60, 255), (0, 51, 255)),
        (np.uint8, (99.5, 100.5), (99, 100, 101), (0, 128, 255)),
    ],
)
def test_a_window_maps_its_ends_to_black_and_white(dtype, window, values, shown):
    image = np.tile(np.array(values, dtype)[None, :, None], (draw.BAND + 1, 1, 2))
    result = draw.windowed(image, draw.Window(*window))
    assert result.dtype == np.uint8
    assert np.array_equal(result, np.tile(np.array(shown)[None, :, None], (draw.BAND + 1, 1, 2)))


@pytest.mark.parametrize(
    ("dtype", "window"), [(np.uint8, (100, 256)), (np.uint8, (-9, 0)), (np.uint16, (65535, 65536))]
)
def test_a_window_outside_the_values_is_refused(dtype, window):
    with pytest.raises(UsageError, match=r"^--window=.* is outside the values 0 to (255|65535) of images"):
        draw.windowed(np.zeros((2, 2, 1), dtype), draw.Window(*window))


def test_a_16_bit_image_is_stretched_between_the_percentiles_of_each_channel():
    image = np.dstack([np.arange(101), 3 * np.arange(101), np.full(101, 7)]).astype(np.uint16) * 100
    image[0, 0, 0] = 0
    picture = draw.to_rgb(image)
    assert picture.dtype == np.uint8
    # The percentiles of 0..100 are 1 and 99: values below are black, values above white, and 50 is in the middle.
    for channel in (0, 1):
        assert picture[0, [0, 1, 50, 99, 100], channel].tolist() == [0, 0, 127, 255, 255]
    assert not picture[:, :, 2].any()  # a constant channel
    mask = np.zeros((1, 101), dtype=np.uint8)
    assert draw.overlay(image, mask, CLASSES).shape == (1, 101, 3)
    assert draw.comparison(image[:, :, :2], mask, mask, CLASSES).dtype == np.uint8


def test_error_is_green_red_and_dark():
    picture = draw.error(np.uint8([[0, 1, 255]]), np.uint8([[0, 0, 1]]), ignore_index=255)
    assert picture.tolist() == [[list(draw.RIGHT), list(draw.WRONG), [30, 30, 30]]]
    assert picture.dtype == np.uint8


def test_a_legend_has_the_given_width_and_as_many_rows_as_needed():
    wide, narrow = draw.legend(CLASSES, [0, 1, 2], 400), draw.legend(CLASSES, [0, 1, 2], 80)
    assert wide.shape[1:] == (400, 3)
    assert narrow.shape[1:] == (80, 3)
    assert narrow.shape[0] > wide.shape[0]


def test_a_legend_only_has_the_colours_of_the_classes_present():
    def contains(index, picture):
        return (picture == CLASSES.colours[index]).all(axis=2).any()

    picture = draw.legend(CLASSES, [0, 2], 400)
    assert [contains(index, picture) for index in range(3)] == [True, False, True]


def test_a_legend_without_classes_is_blank():
    assert (draw.legend(CLASSES, [], 50) == 255).all()


@pytest.mark.parametrize(("width", "factor"), [(20, 13), (256, 1), (255, 2), (300, 1)])
def test_overlay_with_legend_enlarges_small_images_by_a_whole_factor(width, factor):
    image, mask = np.zeros((10, width, 3), dtype=np.uint8), np.full((10, width), 1, dtype=np.uint8)
    picture = draw.overlay_with_legend(image, mask, CLASSES)
    legend = draw.legend(CLASSES, [1], width * factor)
    assert picture.shape == (10 * factor + legend.shape[0], width * factor, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture[10 * factor :], legend)


def test_row_joins_tiles_with_white_gaps(image):
    picture = draw.row([image, image[:, :5], image])
    assert picture.shape == (12, 20 + draw.GAP + 5 + draw.GAP + 20, 3)
    assert np.array_equal(picture[:, :20], image)
    assert (picture[:, 20 : 20 + draw.GAP] == 255).all()
    assert np.array_equal(picture[:, -20:], image)
    assert np.array_equal(draw.row([image]), image)


def test_confusion_picture_is_square_and_darker_for_larger_shares():
    picture = draw.confusion_picture(np.array([[90, 10, 0], [50, 50, 0], [0, 0, 0]]), CLASSES)
    assert picture.dtype == np.uint8
    assert picture.shape[0] == picture.shape[1]
    margin = picture.shape[0] - 34 * 3 - 8

    def shade(row, column):
        return int(picture[margin + 34 * row + 2, margin + 34 * column + 2].astype(int).sum())

    assert shade(0, 0) < shade(1, 1) < 3 * 255  # 90 % correct is darker than 50 %
    assert shade(1, 0) < shade(0, 1) < 3 * 255
    assert shade(2, 2) == 3 * 255  # a class that never occurs stays white


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (cityscapes.IDS, {0: 7, 13: 26, 18: 33}),
        (cityscapes.TRAIN_IDS, {0: 0, 13: 13, 18: 18}),
        (ade20k.CLASSES, {0: 1, 149: 150}),
        (voc.CLASSES, {0: 0, 20: 20}),
        (camvid.CLASSES, {0: 0, 10: 10}),
        (sunrgbd.CLASSES, {0: 1, 36: 37}),
    ],
)
def test_predictions_have_the_labels_of_each_data_set_on_request(classes, labels, tmp_path):
    indices = np.arange(len(classes), dtype=np.uint8)[None]
    draw.save_mask(indices, classes, tmp_path / "mask.png", labels="dataset")
    stored = read_labels(tmp_path / "mask.png")
    assert {index: int(stored[0, index]) for index in labels} == labels
    assert np.array_equal(classes.from_mask(stored), indices)
