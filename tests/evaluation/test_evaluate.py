"""Scores do not depend on batch size or workers, and equal a count of every pixel."""

import json

import fakes
import numpy as np
import pytest

from segdeconv.data.datasets.folder import Folder
from segdeconv.drawing import draw
from segdeconv.inference.small_regions import merge_small_regions

SLIM = (
    "dataset=folder", "dataset.root=mine", "dataset.size=[32,40]", "model.stages=[[4],[8]]", "trainer.max_epochs=2",
    "trainer.precision=32-true", "dataset.batch_size=2", "dataset.num_workers=0", "logger=none", "auto=[]",
)  # fmt: skip


@pytest.fixture(scope="module")
def scored(tmp_path_factory, commands):
    """Evaluate one network with several batch sizes and numbers of workers; {(batch size, workers): report}."""
    place = tmp_path_factory.mktemp("truth")
    fakes.folder(place / "mine", num=7, layout="lists")
    assert commands("train", *SLIM, "hydra.run.dir=run", cwd=place).code == 0
    reports = {}
    for batch_size, workers in ((1, 0), (2, 0), (3, 1), (7, 2), (16, 0)):
        out = f"{batch_size}-{workers}"
        keys = (f"dataset.batch_size={batch_size}", f"dataset.num_workers={workers}")
        done = commands("evaluate", "run/best.ckpt", *keys, "--out", out, "--masks", f"{out}/masks", cwd=place)
        assert done.code == 0, done.err
        reports[batch_size, workers] = json.loads((place / out / "report.json").read_text())
    return place, reports


def test_batch_size_and_workers_do_not_change_a_count(scored):
    _, reports = scored
    first = reports[1, 0]
    for report in reports.values():
        for key in ("confusion", "miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou", "boundary_f1"):
            assert report[key] == first[key], key


def test_the_scores_equal_a_count_of_every_pixel_of_the_written_masks(scored):
    place, reports = scored
    val = Folder("val", str(place / "mine"))
    for (batch_size, workers), report in reports.items():
        counts = np.zeros((3, 3), dtype=int)
        for index, name in enumerate(val.names):
            predicted = np.array(fakes.opened(place / f"{batch_size}-{workers}" / "masks" / f"{name}.png"))
            for truth, prediction in zip(val[index].mask.ravel().tolist(), predicted.ravel().tolist(), strict=True):
                if truth != 255:
                    counts[truth][prediction] += 1
        assert report["confusion"] == counts.tolist()
        ious = [counts[c, c] / (counts[c].sum() + counts[:, c].sum() - counts[c, c]) for c in range(3)]
        assert report["miou"] == pytest.approx(float(np.mean(ious)), abs=1e-12)
        assert report["pixel_accuracy"] == pytest.approx(float(np.trace(counts) / counts.sum()), abs=1e-12)


def test_small_regions_are_merged_before_anything_is_counted(scored, commands):
    place, reports = scored
    words = ("evaluate", "run/best.ckpt", "--out", "merged", "--masks", "merged/masks")
    done = commands(*words, "--min-area", "30", "--pictures", "merged/pictures", "--outlines", cwd=place)
    assert done.code == 0, done.err
    report = json.loads((place / "merged" / "report.json").read_text())
    val, counts, changed = Folder("val", str(place / "mine")), np.zeros((3, 3), dtype=int), False
    for index, name in enumerate(val.names):
        raw, predicted = (np.array(fakes.opened(place / out / "masks" / f"{name}.png")) for out in ("2-0", "merged"))
        assert np.array_equal(predicted, merge_small_regions(raw, 30))
        changed |= (predicted != raw).any()
        truth = val[index].mask
        np.add.at(counts, (truth[truth < 255], predicted[truth < 255]), 1)
        picture = np.asarray(fakes.opened(place / "merged" / "pictures" / f"{name}.png"))
        panels = draw.comparison(val[index].image, truth, predicted, val.classes, outlines=True)
        figure = draw.enlarged(panels, 128)
        assert np.array_equal(picture[: len(figure)], figure)
    assert changed
    assert (report["confusion"], report["min_area"]) == (counts.tolist(), 30)
    # Calibration is about the probabilities of the network, which do not change.
    assert report["calibration"] == reports[2, 0]["calibration"]


def test_the_scores_after_training_equal_those_of_the_checkpoint(scored):
    place, reports = scored
    assert json.loads((place / "run" / "report.json").read_text())["confusion"] == reports[2, 0]["confusion"]
