"""Suspect regions of masks: the regions by hand, and altered masks of a network that knows the classes."""

import csv
import shutil

import fakes
import numpy as np
import pytest
from PIL import Image

from segdeconv.analysis.suspects import disagreements, find_suspects
from segdeconv.checkpoints import checkpoint
from segdeconv.evaluation.evaluate import restore_dataset
from segdeconv.experiments.study import altered_masks
from segdeconv.inference.predictors import PredictionSettings
from segdeconv.inference.segmenter import Segmenter

IGNORED = 255


def found(mask, prediction, min_area=1):
    regions = list(disagreements(mask, prediction, IGNORED, min_area=min_area))
    return sorted((region.box, int(region.inside.sum()), region.mask_class, region.network_class) for region in regions)


def test_regions_are_connected_and_have_one_class_in_mask_and_prediction():
    mask, prediction = np.zeros((60, 80), np.uint8), np.zeros((60, 80), np.uint8)
    prediction[10:20, 10:20] = 1
    prediction[10:20, 20:30] = 2  # touches it, but is another class
    prediction[40:50, 10:14] = prediction[40:44, 10:20] = 1  # an L
    mask[30:36, 60:70] = 3
    mask[0:5, 70:80] = IGNORED
    prediction[0:10, 70:80] = 1
    assert found(mask, prediction) == [
        ((5, 70, 10, 80), 50, 0, 1),
        ((10, 10, 20, 20), 100, 0, 1),
        ((10, 20, 20, 30), 100, 0, 2),
        ((30, 60, 36, 70), 60, 3, 0),
        ((40, 10, 50, 20), 64, 0, 1),
    ]
    assert len(found(mask, prediction, min_area=64)) == 3


@pytest.mark.parametrize(("factor", "width"), [(1, 2), (4, 4)])
def test_thin_bands_along_boundaries_are_left_out(factor, width):
    mask, prediction = (np.zeros((100 * factor, 150 * factor), np.uint8) for _ in range(2))
    mask[:, 75 * factor :] = 1
    prediction[:, 75 * factor - width :] = 1  # the boundary is shifted
    prediction[20 * factor : 30 * factor, 10 * factor : 20 * factor] = 1
    (region,) = disagreements(mask, prediction, IGNORED, min_area=1)
    assert region.box == (20 * factor, 10 * factor, 30 * factor, 20 * factor)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data set with a network that knows its classes; one object of val_1 has another class, val_2 and val_3 swap."""
    folder = tmp_path_factory.mktemp("labelled")
    fakes.folder(folder / "mine", layout="lists", num=8)
    dataset = {"_target_": "segdeconv.data.Folder", "root": str(folder / "mine"), "size": None}
    unchanged = {"mean": [0.0] * 3, "std": [1.0] * 3}
    fakes.untrained(folder / "good.ckpt", {**dataset, **unchanged}, _target_="fakes.Brightness")
    shutil.copy(fakes.__file__, folder)  # the module of the network, for the command
    shutil.copytree(folder / "mine", folder / "altered")
    masks = folder / "altered" / "masks"
    mask = np.array(fakes.opened(masks / "val_1.png"))
    assert (mask[16:32, 16:32] == 2).all()
    mask[16:32, 16:32] = 1
    Image.fromarray(mask).save(masks / "val_1.png")
    (masks / "val_2.png").rename(masks / "other.png")
    (masks / "val_3.png").rename(masks / "val_2.png")
    (masks / "other.png").rename(masks / "val_3.png")
    return folder


def suspects(place, root):
    loaded = checkpoint.read(
        place / "good.ckpt", trust=["fakes.Brightness"], overrides=[f"dataset.root={place / root}"]
    )
    dataset = restore_dataset(loaded, "val")
    return dataset, find_suspects(Segmenter(loaded, PredictionSettings()), dataset)


def test_correct_masks_have_no_suspects(place):
    assert suspects(place, "mine")[1] == []


def test_altered_masks_are_suspect_and_no_others(place):
    dataset, regions = suspects(place, "altered")
    assert {dataset.names[region.place] for region in regions} == {"val_1", "val_2", "val_3"}
    (object_,) = [suspect for suspect in regions if dataset.names[suspect.place] == "val_1"]
    assert object_.region.mask_class == 1
    assert object_.region.network_class == 2
    top, left, bottom, right = object_.region.box
    assert (abs(top - 16), abs(left - 16), abs(bottom - 32), abs(right - 32)) <= (1, 1, 1, 1)
    assert object_.confidence > 0.9 > 0.1 > object_.mask_probability
    assert [each.score for each in regions] == sorted((each.score for each in regions), reverse=True)
    for suspect in regions:
        _, mask, _ = dataset[suspect.place]
        top, left, bottom, right = suspect.region.box
        assert (mask[top:bottom, left:right][suspect.region.inside] == suspect.region.mask_class).all()
        assert suspect.pixels == suspect.region.inside.sum()


def test_the_command_writes_a_table_and_a_page(place, commands):
    root = "dataset.root=altered"
    words = ("rank", "good.ckpt", "--trust", "fakes.Brightness", "--suspects", root, "--first", 2, "--out", "out")
    done = commands(*words, cwd=place)
    assert done.code == 0, done.err
    with (place / "out" / "suspects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {f"altered/masks/val_{number}.png" for number in (1, 2, 3)}
    page = (place / "out" / "suspects.html").read_text()
    assert f"{len(rows)} suspect regions in 3 of 8 images; the 2 images" in page
    assert page.count("<figure>") == 6


@pytest.mark.parametrize("kind", altered_masks.KINDS)
def test_regions_altered_for_the_study_are_found(place, kind):
    original, _ = suspects(place, "mine")
    dataset = altered_masks.AlteredMasks(original, kind, num=4, seed=0)
    assert len(dataset.alterations) == 4
    for index in range(len(dataset)):
        before, after = original[index].mask, dataset[index].mask
        changed = before != after
        assert changed.any() == (index in dataset.alterations)
        if changed.any():
            assert len(np.unique(before[changed])) == len(np.unique(after[changed])) == 1
    segmenter = Segmenter(checkpoint.read(place / "good.ckpt", trust=["fakes.Brightness"]))
    regions = find_suspects(segmenter, dataset)
    assert {region.place for region in regions} == set(dataset.alterations)
    assert all(dataset.altered(region) for region in regions)
