"""Images whose scale or proportions change a lot are reported once, with the keys to change."""

import pytest

from segdeconv.data.resizing import ResizedImages, changes_scale


@pytest.mark.parametrize(
    ("size", "target", "changes"),
    [
        ((720, 960), (360, 480), False),  # exactly a half
        ((720, 960), (359, 479), True),
        ((100, 100), (200, 200), False),
        ((100, 100), (201, 201), True),
        ((360, 480), (352, 480), False),  # rounded to multiples of 32: 2.3 %
        ((303, 384), (112, 112), True),
        ((256, 320), (256, 256), True),  # no factor of 2, but stretched
        ((333, 500), (222, 333), False),
    ],
)
def test_a_factor_above_2_and_other_proportions_are_reported(size, target, changes):
    assert changes_scale(size, target) is changes


@pytest.mark.parametrize("at_once", [False, True])
def test_one_warning_counts_the_images_and_names_the_first(capsys, monkeypatch, at_once):
    monkeypatch.setattr("segdeconv.errors._warned", set())
    images = ResizedImages((112, 112), at_once=at_once)
    for name, size in (("a", (112, 112)), ("b", (303, 384)), ("c", (800, 600))):
        images.add(name, size)
    if not at_once:
        assert not capsys.readouterr().err
        images.warn()
    assert capsys.readouterr().err == (
        f"segdeconv: warning: dataset.size: {'images' if at_once else '2 of 3 images'} are resized by more than a "
        "factor of 2 or stretched, such as b from 303x384 to 112x112 (height x0.37, width x0.29) - dataset.size=null "
        "predicts images at their own scale, which suits a network trained on crops, or dataset.size=[99,126] keeps "
        "the proportions of b\n"
    )
    kept = ResizedImages(None)
    kept.add("b", (303, 384))
    kept.warn()
    assert not capsys.readouterr().err
