"""Every data set has a YAML file and a documented class, and can be inspected, trained on, scored and predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import yaml
from fresh_commands import SLIM, command

from segdeconv import data
from segdeconv.checkpoints import checkpoint
from segdeconv.classes import Classes
from segdeconv.data.datasets import ade20k, camvid, cityscapes, sunrgbd, voc
from segdeconv.errors import UsageError

ROOT = Path(__file__).parents[3]
CONFIGS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs/dataset").glob("*.yaml"))}
ALL_CLASSES = [ade20k.CLASSES, camvid.CLASSES, cityscapes.IDS, cityscapes.TRAIN_IDS, sunrgbd.CLASSES, voc.CLASSES]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_data_set_is_a_documented_class(name: str) -> None:
    target = CONFIGS[name]["_target_"]
    assert target in checkpoint.ADMITTED
    class_name = target.rsplit(".", 1)[1]
    assert class_name in data.__all__
    docstring = getattr(data, class_name).__doc__
    assert [part for part in ("Content", "Layout", "Classes", "Cite") if f"**{part}**" not in docstring] == []
    assert f"`{name}`" in (ROOT / "docs/datasets.md").read_text()


@pytest.mark.parametrize("classes", ALL_CLASSES, ids=lambda classes: classes.names[0])
def test_classes_survive_a_round_trip_through_a_checkpoint(classes: Classes) -> None:
    plain = json.loads(json.dumps(classes.to_dict()))
    assert Classes.from_dict(plain) == classes
    del plain["ignored_labels"]  # older versions did not write it
    assert Classes.from_dict(plain).ignored_labels == (classes.ignore_index,)


@pytest.mark.parametrize("classes", ALL_CLASSES, ids=lambda classes: classes.names[0])
def test_every_label_is_a_class_or_ignored_or_refused(classes: Classes) -> None:
    for label in range(256):
        mask = np.full((1, 1), label, np.uint8)
        if label in classes.labels:
            assert classes.from_labels(mask)[0, 0] == classes.labels.index(label)
        elif label in classes.ignored_labels:
            assert classes.from_labels(mask)[0, 0] == classes.ignore_index
        else:
            with pytest.raises(UsageError, match=f"^has label {label}; the classes have labels "):
                classes.from_labels(mask)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make", "size", "image"),
    [
        ("ade20k", fakes.ade20k, "dataset.crop=[48,48]", "images/validation/ADE_val_00000002.jpg"),
        ("cityscapes", fakes.cityscapes, "dataset.size=[48,96]", "leftImg8bit/test/berlin"),
        ("oxford_pets", fakes.oxford_pets, "dataset.size=[48,64]", "images/Abyssinian_201.jpg"),
        ("sunrgbd", fakes.sunrgbd, "dataset.size=[48,64]", "SUNRGBD-test_images/img-000001.jpg"),
    ],
)
def test_a_data_set_is_inspected_trained_on_scored_and_predicted(
    tmp_path: Path, name: str, make: Any, size: str, image: str
) -> None:
    make(tmp_path / "root")
    options = (f"dataset={name}", "dataset.root=root", size)
    assert "Fit to train" in command("inspect_data", *options, cwd=tmp_path).stdout
    class_weighting = ("loss.class_weighting=sunrgbd",) if name == "sunrgbd" else ()
    command("train", *options, *SLIM, *class_weighting, "trainer.max_steps=3", "hydra.run.dir=run", cwd=tmp_path)
    command("evaluate", "run/best.ckpt", "--masks", "masks", cwd=tmp_path)
    names = [entry["name"] for entry in json.loads((tmp_path / "run/evaluation/report.json").read_text())["classes"]]
    assert names == list(checkpoint.read(tmp_path / "run/best.ckpt").classes.names)
    command("predict", "run/best.ckpt", f"root/{image}", "--out", "out", cwd=tmp_path)
    masks = [path for path in (tmp_path / "out").rglob("*.png") if not path.stem.endswith("_overlay")]
    images = [tmp_path / "root" / image]
    if images[0].is_dir():
        images = sorted(images[0].iterdir())
    assert len(masks) == len(images)
    for path in masks:
        mask = fakes.opened(path)
        assert mask.size == fakes.opened(next(p for p in images if p.stem == path.stem)).size
        assert np.array(mask).max() < len(names)
