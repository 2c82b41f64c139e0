"""The command convert."""

import fakes
import pytest


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    fakes.folder(folder / "mine", "binary")
    return folder


def test_a_folder_becomes_annotations_that_inspect_data_reads(place, commands):
    done = commands("convert", "mine", "--to", "cvat", "--out", "given/for cvat", "--images", "link", cwd=place)
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        "given/for cvat: 8 images (train 6, val 2), 12 regions",
        "train with: python scripts/train.py dataset=folder 'dataset.root=given/for cvat'",
    ]
    done = commands("inspect_data", "dataset=folder", "dataset.root=given/for cvat", cwd=place)
    assert done.code == 0, done.err
    assert "annotations: CVAT XML, 8 images, 12 regions" in done.out
    assert "foreground     1  #ffffff           6          9216  50.00%" in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mine", "--out", "x"), "--to FORMAT is missing"),
        (("mine", "--to", "coc", "--out", "x"), "--to coc is not a format - did you mean 'coco'?"),
        (("mine", "--to", "coco"), "--out DIR is missing"),
        (("mine", "--to", "coco", "--out", "mine"), "mine exists and is not an empty folder"),
        (("nothing", "--to", "coco", "--out", "x"), "dataset.root=nothing is not a folder"),
        (("mine", "--to", "coco", "--out", "x", "--simplify", "some"), "--simplify some is not a number of pixels"),
        (("mine", "--to", "coco", "--out", "x", "--images", "move"), "--images move is unknown"),
        (("mine", "other", "--to", "coco", "--out", "x"), "mine and other are two data sets"),
    ],
)
def test_what_is_wrong_is_refused_and_leaves_nothing(place, commands, words, message):
    done = commands("convert", *words, cwd=place)
    assert done.code == 2
    assert message in done.error_message
    assert not (place / "x").exists()
