"""Tables of classes: names are text, repeated names are refused, and any integer can be ignored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segdeconv.data.class_file import class_file, find_class_file, indexed_classes, read_class_file
from segdeconv.errors import UsageError


def read(folder: Path, text: str, name: str = "classes.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_class_file(path)


NAMES = ["no", "yes", "on", "off", "true", "null", "~", "12", "1e3", "2020-01-01", "0x1F", "é"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_whatever_yaml_takes_them_for(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, f"{name}: 0\nother: 1\n").names == (name, "other")
    assert read(tmp_path, f"- {name}\n- other\n").names == (name, "other")


def test_a_table_from_labels_to_names_is_read_too(tmp_path: Path) -> None:
    classes = read(tmp_path, "0: road\n7: sky\n255: ignore\n")
    assert (classes.names, classes.labels, classes.ignored_labels) == (("road", "sky"), (0, 7), (255,))
    with pytest.raises(UsageError, match="the class names are not all different"):
        read(tmp_path, "0: road\n1: road\n")


@pytest.mark.parametrize(
    "value",
    [
        ["sky", "road"], ("sky", "road"), {"sky": 0, "road": 1}, {"road": 1, "sky": 0}, {0: "sky", 1: "road"},
        {1: "road", 0: "sky"}, {"1": "road", "0": "sky"}, indexed_classes(["sky", "road"]),
    ],
)  # fmt: skip
def test_classes_of_a_network_are_named_in_every_form(value) -> None:
    classes = indexed_classes(value)
    assert (classes.names, classes.labels, classes.ignore_index) == (("sky", "road"), (0, 1), 255)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ab", "classes is 'ab' - give the names in the order of their indices"),
        ({"sky", "road"}, r"- give the names in the order of their indices, or \{index: name\}"),
        (2, "classes is 2 - give the names"),
        ({"sky": 0, "road": 2}, "give each name its index in the masks, 0, 1, 2, ..."),
        ({"sky": "#0000ff", "road": "#ff0000"}, "give each name its index in the masks"),
    ],
)
def test_what_does_not_name_the_classes_of_a_network_is_refused(value, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        indexed_classes(value)


@pytest.mark.parametrize("name", ["ignore", "Ignore", "IGNORE"])
def test_ignore_is_no_class_in_any_case(tmp_path: Path, name: str) -> None:
    classes = read(tmp_path, f"a: 0\nb: 1\n{name}: 7\n")
    assert classes.names == ("a", "b")
    assert classes.ignored_labels == (7,)


def test_labels_are_decimal_and_may_be_quoted(tmp_path: Path) -> None:
    assert read(tmp_path, "a: 010\nb: '7'\nc: 300\n").labels == (10, 7, 300)  # YAML 1.1 reads 010 as 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "road: 1\nsky: 0\nroad: 2\n",
            r"classes\.yaml has the key 'road' in line 1 and again in line 3 - write one",
        ),
        ("a: #ff0000\nb: 1\n", "class 'a' has no value - give a label, or a colour in quotes: '#rrggbb'"),
        ("a: 0\nb: 1\nignore:\n", "ignore is '' - give a label, such as 255 or -9999, a list of labels, or a colour"),
        ("a: 0\nb: 1\nignore: [1, 255]\n", "1 is both a class and ignore"),
        ("a: !!python/object/apply:os.getcwd []\n", "is not YAML"),
    ],
)
def test_what_is_probably_not_meant_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("ignore", "values"),
    [("-9999", [-9999]), ("65535", [65535]), ("[-1, 255]", [-1, 255]), ("99999999", [99999999])],
)
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int32, np.int64])
def test_any_integer_can_mark_ignored_pixels(tmp_path: Path, ignore: str, values: list[int], dtype: type) -> None:
    limits = np.iinfo(dtype)
    if not all(limits.min <= value <= limits.max for value in values):
        pytest.skip("this type has no such number")
    classes = read(tmp_path, f"a: 0\nb: 300\nignore: {ignore}\n")
    mask = np.array([[0, 300, *values]], dtype)
    assert classes.from_mask(mask).tolist() == [[0, 1, *[255] * len(values)]]
    with pytest.raises(UsageError, match="has label 7"):
        classes.from_mask(np.array([[7]], dtype))


def test_a_text_file_has_one_name_per_line_and_a_second_table_is_not_read_in_silence(tmp_path: Path) -> None:
    assert read(tmp_path, "# names\nroad\n\nsky blue\n", "classes.txt").names == ("road", "sky blue")
    (tmp_path / "classes.yaml").write_text("a: 0\nb: 1\n")
    path, lines = find_class_file(tmp_path)
    assert path == tmp_path / "classes.yaml"
    assert lines == [f"{tmp_path / 'classes.txt'}: not read, since classes.yaml names the classes - remove one of them"]


@pytest.mark.parametrize(
    "text", ["no: 0\n'a: b': 7\nignore: [-1, 255]\n", "'#1': [1, 2, 3]\n'it''s': [4, 5, 6]\nignore: [0, 0, 0]\n"]
)
def test_a_written_table_is_read_as_the_same_classes(tmp_path: Path, text: str) -> None:
    classes = read(tmp_path, text)
    assert read(tmp_path, class_file(classes, {classes.names[0]: "12 pixels"})) == classes


COLOUR_TABLES = [
    ("class_dict.csv", 'name,r,g,b\nRoad, 0,0,0\n"Sky",255,0,0\nTree top,0,255,0\n'),
    ("class_dict_seg.csv", "name, r, g, b\r\nRoad, 0, 0, 0\r\nSky, 255, 0, 0\r\nTree top, 0, 255, 0\r\n"),
    ("label_colors.txt", "0 0 0\tRoad\n255 0 0\t\tSky\n0 255 0 Tree top\n"),
    ("labelmap.txt", "# label:color_rgb:parts:actions\nRoad:0,0,0::\nSky:255,0,0::\nTree top:0,255,0::\n"),
]


@pytest.mark.parametrize(("name", "text"), COLOUR_TABLES)
def test_tables_of_colours_of_other_programs_are_read(tmp_path: Path, name: str, text: str) -> None:
    classes = read(tmp_path, text, name)
    assert classes.names == ("Road", "Sky", "Tree top")
    assert (classes.colours, classes.by_colour) == (((0, 0, 0), (255, 0, 0), (0, 255, 0)), True)
    assert find_class_file(tmp_path) == (tmp_path / name, [])
    with pytest.raises(UsageError, match=f"{name}: the class names .* are not all different"):
        read(tmp_path, text.replace("Sky", "Road"), name)
    with pytest.raises(UsageError, match=f"{name}: class 'Sky' is .* - give a label"):
        read(tmp_path, text.replace("255", "256"), name)
    (tmp_path / name).write_text("Road\nSky\n")
    assert find_class_file(tmp_path) == (None, [])
