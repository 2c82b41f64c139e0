"""Colours of classes: measured distances under simulated colour blindness, and which class is the background."""

import itertools

import cv2
import numpy as np
import pytest

from segdeconv.classes import BLACK, DISTINCT, Classes, default_colours, distinct_colours, voc_colours
from segdeconv.errors import UsageError

# Viénot, Brettel and Mollon 1999, "Digital video colourmaps for checking the legibility of displays by dichromats";
# `DISTINCT` was chosen with another simulation.
TO_CONES = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
CONES = {
    "normal": np.eye(3),
    "protanopia": np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]]),
    "deuteranopia": np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]),
}
# Machado, Oliveira and Fernandes 2009; Viénot et al. have no tritanopia.
TRITANOPIA = np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]])


def lab(colours, vision):
    """Simulate how RGB colours, 0..255, are seen, and return them in CIELAB."""
    values = np.array(colours, dtype=np.float64) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    if vision == "tritanopia":
        seen = linear @ TRITANOPIA.T
    else:
        seen = linear @ (np.linalg.inv(TO_CONES) @ CONES[vision] @ TO_CONES).T
    return cv2.cvtColor(seen.clip(0, 1).astype(np.float32)[None], cv2.COLOR_LRGB2LAB)[0].astype(float)


def ciede2000(one, other):
    """Return the colour difference of two CIELAB colours, after Sharma, Wu and Dalal 2005."""
    (light, a, b), (light2, a2, b2) = one, other
    mean = ((a**2 + b**2) ** 0.5 + (a2**2 + b2**2) ** 0.5) / 2
    stretch = 1.5 - 0.5 * (mean**7 / (mean**7 + 25**7)) ** 0.5
    first, second = complex(a * stretch, b), complex(a2 * stretch, b2)
    chroma, chroma2 = abs(first), abs(second)
    hue, hue2 = (np.degrees(np.angle(value)) % 360 for value in (first, second))
    turn = (hue2 - hue + 180) % 360 - 180
    grey = chroma * chroma2 == 0
    middle = hue + hue2 if grey else (hue + turn / 2) % 360
    d_hue = 0 if grey else 2 * (chroma * chroma2) ** 0.5 * np.sin(np.radians(turn / 2))
    level, chromas = (light + light2) / 2, (chroma + chroma2) / 2
    weights = zip((-0.17, 0.24, 0.32, -0.2), (1, 2, 3, 4), (-30, 0, 6, -63), strict=True)
    t = 1 + sum(weight * np.cos(np.radians(times * middle + shift)) for weight, times, shift in weights)
    terms = (
        (light2 - light) / (1 + 0.015 * (level - 50) ** 2 / (20 + (level - 50) ** 2) ** 0.5),
        (chroma2 - chroma) / (1 + 0.045 * chromas),
        d_hue / (1 + 0.015 * chromas * t),
    )
    bend = 2 * (chromas**7 / (chromas**7 + 25**7)) ** 0.5
    rotation = -bend * np.sin(np.radians(60 * np.exp(-(((middle - 275) / 25) ** 2))))
    return (sum(term**2 for term in terms) + rotation * terms[1] * terms[2]) ** 0.5


@pytest.mark.parametrize(
    ("one", "other", "difference"),  # of the published test data
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.5, 0), (58, 24, 15), 19.4535),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((22.7233, 20.0904, -46.694), (23.0331, 14.973, -42.5619), 2.0373),
        ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_the_colour_difference_of_these_tests_is_ciede2000(one, other, difference):
    assert ciede2000(one, other) == pytest.approx(difference, abs=1e-4)


@pytest.mark.parametrize(("count", "least"), [(3, 30), (5, 15), (8, 15), (12, 14), (16, 9), (24, 8)])
def test_colours_can_be_told_apart_with_any_colour_vision(count, least):
    def smallest(colours, vision):
        return min(ciede2000(*pair) for pair in itertools.combinations(lab([BLACK, *colours], vision), 2))

    visions = [*CONES, "tritanopia"]
    assert min(smallest(distinct_colours(count), vision) for vision in visions) > least
    assert min(smallest(voc_colours(count + 1)[1:], vision) for vision in visions) < least / 2  # those used before


def test_colours_beyond_those_measured_are_all_different():
    colours = distinct_colours(255)
    assert (len(colours), len(set(colours)), colours[:24]) == (255, 255, DISTINCT)
    levels = np.array([*colours, BLACK])
    gaps = np.abs(levels[:, None] - levels).max(axis=2) + 255 * np.eye(256, dtype=int)
    assert gaps[24:, :].min() >= 32


ORANGE, CYAN, BLUE = DISTINCT[:3]
WHITE, RED = (255, 255, 255), (255, 0, 0)


@pytest.mark.parametrize(
    ("names", "labels", "colours"),
    [
        (("class_0", "class_1"), (0, 1), (BLACK, ORANGE)),
        (("class_0", "class_128", "class_255"), (0, 128, 255), (BLACK, ORANGE, CYAN)),
        (("class_1", "class_2", "class_7"), (1, 2, 7), (ORANGE, CYAN, BLUE)),
        (("cell", "rest"), (255, 0), (ORANGE, BLACK)),  # of two classes, label 0
        (("cell", "Background"), (0, 1), (ORANGE, BLACK)),
        (("cell", "background", "wall"), (0, 1, 2), (ORANGE, BLACK, CYAN)),
        (("sky", "road", "car"), (0, 1, 2), (ORANGE, CYAN, BLUE)),
    ],
)
def test_classes_without_colours_get_black_for_the_background_and_distinct_ones(names, labels, colours):
    assert default_colours(names, labels) == colours
    classes = Classes(names, colours, labels=labels, by_colour=False)
    assert classes.background == (colours.index(BLACK) if BLACK in colours else None)
    assert classes.display_colours == colours


@pytest.mark.parametrize(
    ("names", "labels", "colours", "by_colour", "background", "shown"),
    [
        (("background", "foreground"), (0, 255), (BLACK, WHITE), False, 0, (BLACK, ORANGE)),
        (("foreground", "background"), (), (WHITE, BLACK), True, 1, (ORANGE, BLACK)),
        (("cell", "rest"), (), (WHITE, BLACK), True, 1, (ORANGE, BLACK)),  # the darker one
        (("a", "b"), (1, 0), (BLACK, WHITE), False, 1, (ORANGE, BLACK)),  # the lower label
        (("a", "b"), (), ((9, 9, 9), RED), None, 0, ((9, 9, 9), RED)),
        (("cat", "dog"), (), (CYAN, RED), None, None, (CYAN, RED)),  # somebody chose two colours: both are drawn
        (("a", "b", "c"), (), (BLACK, (128, 128, 128), WHITE), True, None, (ORANGE, CYAN, BLUE)),
        (("a", "b", "c"), (), (BLACK, (128, 128, 128), RED), True, None, (BLACK, (128, 128, 128), RED)),
        (("colour_000000", "colour_00ff00", "colour_ff0000"), (), (BLACK, (0, 255, 0), RED), True, 0, None),
        (("class_0", "class_1", "class_2"), (), ((0, 0, 0), (1, 1, 1), (2, 2, 2)), False, 0, (BLACK, ORANGE, CYAN)),
        (("class_0", "class_1", "class_2"), (), ((128, 64, 128), RED, CYAN), False, None, None),  # of a palette
        (("background", "b", "c"), (), voc_colours(3), None, 0, None),
        (("background", "b", "c"), (), (CYAN, RED, BLACK), None, 0, None),
    ],
)
def test_the_background_and_the_colours_in_pictures(names, labels, colours, by_colour, background, shown):
    classes = Classes(names, colours, labels=labels, by_colour=by_colour)
    assert classes.background == background
    assert classes.display_colours == (shown or colours)
    assert classes.palette[: len(names)].tolist() == [list(colour) for colour in colours]  # of mask files
    assert classes.display_palette[: len(names)].tolist() == [list(colour) for colour in shown or colours]


@pytest.mark.parametrize("letter", ["\n", "\r", "\t", "\x1b[31m", "\x1f", "\x7f", "\x85", "\u2028", "\ud800"])
def test_a_name_is_one_line_of_text(letter):
    with pytest.raises(UsageError, match=r"the class name 'a.+b' has a control character - use one line"):
        Classes(("road", f"a{letter}b"), voc_colours(2))


@pytest.mark.parametrize("name", ["Straße", "empty\u00a0space", "道路", "👩🏽‍🌾", "a/b: c#"])
def test_a_name_may_have_letters_of_any_language(name):
    assert Classes(("road", name), voc_colours(2)).names == ("road", name)
