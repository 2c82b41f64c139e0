"""Cityscapes: its folders, and its two kinds of masks, whose equal labels have different meanings."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import torchvision
from PIL import Image

from segdeconv.data import Cityscapes
from segdeconv.data.inspection import class_table, inspect
from segdeconv.errors import UsageError


def raises(message: str) -> Any:
    return pytest.raises(UsageError, match=message)


def rewrite(folder: Path, ending: str, change: Any) -> None:
    for path in folder.glob(f"gtFine/*/*/*{ending}"):
        Image.fromarray(change(np.array(fakes.opened(path)))).save(path)


def test_cityscapes_reads_images_masks_and_names_across_its_cities(tmp_path: Path) -> None:
    root = str(fakes.cityscapes(tmp_path))
    assert Cityscapes("val", root).names == ["frankfurt_000000_000019", "frankfurt_000001_000019"]
    data = Cityscapes("train", root)
    assert data.names == [f"{city}_00000{index}_000019" for city in ("aachen", "bochum") for index in range(2)]
    for index in range(4):
        image, mask, name = data[index]
        true_image, ids = fakes.cityscapes_image_and_ids(sum(map(ord, name)))
        np.testing.assert_array_equal(image, true_image)
        np.testing.assert_array_equal(mask, fakes.cityscapes_train_ids(ids))
        assert len(np.unique(mask)) > 5
        assert 255 in mask


def test_torchvision_reads_the_same_files_and_has_the_same_classes(tmp_path: Path) -> None:
    root = str(fakes.cityscapes(tmp_path))
    reference = torchvision.datasets.Cityscapes(root, "train", "fine", "semantic")
    dataset = Cityscapes("train", root)
    files = {Path(image).name: np.array(mask) for image, (_, mask) in zip(reference.images, reference, strict=True)}
    assert set(files) == {f"{name}_leftImg8bit.png" for name in dataset.names}
    table = np.array([row.train_id for row in reference.classes if row.id >= 0])
    for _, mask, name in (dataset[index] for index in range(len(dataset))):
        np.testing.assert_array_equal(mask, table[files[f"{name}_leftImg8bit.png"]])
    scored = sorted((row for row in reference.classes if not row.ignore_in_eval), key=lambda row: row.train_id)
    assert [row.name.replace(" ", "_") for row in scored] == list(dataset.classes.names)
    assert [row.color for row in scored] == list(dataset.classes.colours)


def test_cityscapes_has_the_nineteen_classes_of_the_benchmark_with_its_colours() -> None:
    """labels.py of cityscapesScripts lists (name, id, train id, colour) of the evaluated classes."""
    rows = """
        road 7 128,64,128 / sidewalk 8 244,35,232 / building 11 70,70,70 / wall 12 102,102,156 / fence 13 190,153,153 /
        pole 17 153,153,153 / traffic_light 19 250,170,30 / traffic_sign 20 220,220,0 / vegetation 21 107,142,35 /
        terrain 22 152,251,152 / sky 23 70,130,180 / person 24 220,20,60 / rider 25 255,0,0 / car 26 0,0,142 /
        truck 27 0,0,70 / bus 28 0,60,100 / train 31 0,80,100 / motorcycle 32 0,0,230 / bicycle 33 119,11,32
    """
    names, ids, colours = zip(*(row.split() for row in rows.split("/")), strict=True)
    from segdeconv.data.datasets.cityscapes import IDS, TRAIN_IDS

    for classes in (IDS, TRAIN_IDS):
        assert classes.names == names
        assert classes.colours == tuple(tuple(map(int, colour.split(","))) for colour in colours)
        assert classes.ignore_index == 255
    assert IDS.labels == tuple(map(int, ids))
    assert sorted(IDS.labels + IDS.ignored_labels) == list(range(34))
    assert (TRAIN_IDS.labels, TRAIN_IDS.ignored_labels) == (tuple(range(19)), (255,))


@pytest.mark.parametrize(
    ("kinds", "labels", "note"),
    [
        (("labelIds",), "auto", "*_gtFine_labelIds.png, label ids"),
        (("labelTrainIds",), "auto", "*_gtFine_labelTrainIds.png, train ids"),
        (("labelIds", "labelTrainIds"), "auto", "*_gtFine_labelIds.png, label ids"),
        (("labelIds", "labelTrainIds"), "train_ids", "*_gtFine_labelTrainIds.png, train ids"),
        (("labelIds", "labelTrainIds"), "ids", "*_gtFine_labelIds.png, label ids"),
    ],
)
def test_both_kinds_of_masks_give_the_same_classes_and_the_notes_name_the_kind(
    tmp_path: Path, kinds: tuple[str, ...], labels: Any, note: str
) -> None:
    data = Cityscapes("train", str(fakes.cityscapes(tmp_path, kinds)), labels=labels)
    assert data.notes[0].startswith(f"masks: {note}")
    for index in range(len(data)):
        _, mask, name = data[index]
        ids = fakes.cityscapes_image_and_ids(sum(map(ord, name)))[1]
        np.testing.assert_array_equal(mask, fakes.cityscapes_train_ids(ids))


def test_masks_under_the_name_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    root = fakes.cityscapes(tmp_path / "a", ("labelIds",))
    rewrite(root, "labelIds.png", fakes.cityscapes_train_ids)
    with raises(
        r"aachen_000000_000019_gtFine_labelIds\.png holds train ids .* - restore the published label ids, or name"
    ):
        Cityscapes("train", str(root))
    for path in tmp_path.rglob("*labelIds.png"):
        path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    assert inspect(Cityscapes("train", str(root)), use_cache=False).problems == []

    root = fakes.cityscapes(tmp_path / "b", ("labelTrainIds",))
    rewrite(root, "labelTrainIds.png", lambda mask: np.where(mask == 18, 33, mask))
    with raises(r"labelTrainIds\.png holds label ids \(up to 33\) - make train ids"):
        Cityscapes("val", str(root))


def test_a_single_mask_of_train_ids_among_label_ids_is_reported_by_the_inspection(tmp_path: Path) -> None:
    root = fakes.cityscapes(tmp_path)
    path = tmp_path / "gtFine/train/bochum/bochum_000001_000019_gtFine_labelIds.png"
    Image.fromarray(fakes.cityscapes_train_ids(np.array(fakes.opened(path)))).save(path)
    problems = inspect(Cityscapes("train", str(root)), use_cache=False).problems
    assert len(problems) == 1
    assert (
        "bochum_000001_000019_gtFine_labelIds.png has label 255; the classes have labels 7..8, 11..13, 17, 19..28, "
        in (problems[0])
    )


def test_the_test_split_is_refused_since_it_has_no_labels(tmp_path: Path) -> None:
    root = str(fakes.cityscapes(tmp_path))
    with raises("labels of Cityscapes' test images are not public; .* - use val"):
        Cityscapes("test", root)
    with raises("unknown split 'trainval' - the splits are train, val"):
        Cityscapes("trainval", root)


def test_missing_files_are_named_with_the_steps_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = (
        r" - register at https://www\.cityscapes-dataset\.com/register, download leftImg8bit_trainvaltest\.zip "
        r"\(11 GB\) and gtFine_trainvaltest\.zip \(241 MB\) .* unpack both into {}, or give their folder "
        r"as dataset\.root=DIR$"
    )
    monkeypatch.chdir(tmp_path)
    with raises(r"^data/cityscapes does not contain leftImg8bit/train" + steps.format(".*/data/cityscapes")):
        Cityscapes("train")
    root = fakes.cityscapes(tmp_path / "root")
    with raises(r"root/gtFine/train contains no \*_gtFine_labelTrainIds\.png for its images" + steps.format(".*/root")):
        Cityscapes("train", str(root), labels="train_ids")
    shutil.rmtree(root / "gtFine")
    with raises(r"root does not contain gtFine/val" + steps.format(".*/root")):
        Cityscapes("val", "root")
    (root / "leftImg8bit" / "val" / "frankfurt").rename(root / "leftImg8bit" / "frankfurt")
    (root / "gtFine" / "val").mkdir(parents=True)
    with raises(r"leftImg8bit/val contains no CITY/NAME_leftImg8bit\.png"):
        Cityscapes("val", "root")


def test_a_missing_mask_and_a_mask_of_another_size_are_named_as_problems(tmp_path: Path) -> None:
    root = fakes.cityscapes(tmp_path)
    masks = sorted((root / "gtFine/train").glob("*/*labelIds.png"))
    masks[0].unlink()
    Image.fromarray(np.full((10, 10), 7, np.uint8)).save(masks[1])
    problems = inspect(Cityscapes("train", str(root)), use_cache=False).problems
    assert len(problems) == 2
    assert f"{masks[0]} is missing" in problems[0]
    assert f"mask {masks[1]} is 10x10 and its image" in problems[1]


def test_the_table_shows_label_ids_and_that_several_are_ignored(tmp_path: Path) -> None:
    data = Cityscapes("train", str(fakes.cityscapes(tmp_path)))
    lines = class_table(inspect(data, use_cache=False), data.classes, None).splitlines()
    assert lines[2].split()[:3] == ["road", "7", "#804080"]
    assert lines[-1].split()[:3] == ["(ignored)", "other", "#000000"]
