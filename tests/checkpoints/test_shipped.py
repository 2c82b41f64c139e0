"""The networks in the package: small, described, usable at once, and what their cards say they are."""

import json
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
from PIL import Image

import segdeconv
from segdeconv.checkpoints import cards, checkpoint
from segdeconv.classes import Classes
from segdeconv.config import compose
from segdeconv.data import CamVid
from segdeconv.data.datasets.camvid import CLASSES
from segdeconv.evaluation.evaluate import evaluate, restore_dataset
from segdeconv.evaluation.metrics import scores
from segdeconv.inference.segmenter import Segmenter
from segdeconv.training.config_check import check_config

ROOT = Path(__file__).parents[2]
REAL_CAMVID = ROOT.parent / "shared" / "data" / "CamVid"
needs_camvid = pytest.mark.skipif(not REAL_CAMVID.is_dir(), reason=f"no real CamVid in {REAL_CAMVID}")


@pytest.mark.parametrize("name", cards.shipped())
def test_a_shipped_network_is_small_and_its_card_says_what_it_is(name):
    path = cards.SHIPPED / f"{name}.safetensors"
    assert path.stat().st_size <= 8 << 20
    card = json.loads(cards.card_of(path).read_text())
    for part in ("data", "command", "commit", "machine", "scores", "licence", "limits"):
        assert card[part], part
    assert checkpoint.read(name).path == path  # verified by its sha256


def test_camvid_small_is_there_and_is_what_its_experiment_trains():
    read = checkpoint.read("camvid-small")
    assert read.classes == CLASSES
    composed, _ = compose(["experiment=segnet_camvid_small"], ROOT / "configs")
    config = check_config(composed)
    for part in ("model", "loss", "optimizer", "schedule", "augment"):
        assert read.config[part] == config[part], part
    for key in ("size", "crop", "batch_size"):
        assert read.config["dataset"][key] == config["dataset"][key]
    assert read.config["trainer"]["max_epochs"] == config["trainer"]["max_epochs"]


def test_camvid_small_labels_a_picture_by_its_name_alone(tmp_path, commands):
    image, _ = fakes.image_and_mask(0, 5, (90, 120))
    Image.fromarray(image).save(tmp_path / "street.jpg")
    done = commands("predict", "camvid-small", "street.jpg", "--out", "labelled", cwd=tmp_path)
    assert done.code == 0, done.err
    mask = fakes.opened(tmp_path / "labelled" / "street.png")
    assert mask.size == (120, 90)
    prediction = segdeconv.load("camvid-small").predict(tmp_path / "street.jpg")
    assert isinstance(prediction.classes, Classes)
    np.testing.assert_array_equal(prediction.mask, np.array(mask))


@needs_camvid
def test_camvid_small_knows_streets_of_val():
    network, val = segdeconv.load("camvid-small"), CamVid("val", str(REAL_CAMVID))
    right = counted = 0
    for place in range(0, len(val), 25):
        image, mask, name = val[place]
        known = mask != CLASSES.ignore_index
        right += int((network.predict(image, name=name).mask == mask)[known].sum())
        counted += int(known.sum())
    assert right / counted > 0.85


@needs_camvid
@pytest.mark.slow
def test_camvid_small_scores_what_its_card_says():
    read = checkpoint.read("camvid-small", overrides=[f"dataset.root={REAL_CAMVID}", "dataset.num_workers=0"])
    dataset = restore_dataset(read, "val")
    confusion = evaluate(Segmenter(read, device=torch.device("cpu")), dataset)
    said = json.loads(cards.card_of(read.path).read_text())["scores"]["val"]
    found = scores(confusion)
    assert len(dataset) == 101
    assert 100 * found.miou == pytest.approx(said["mIoU"], abs=0.2)
    assert 100 * found.pixel_accuracy == pytest.approx(said["G"], abs=0.2)
    assert 100 * found.mean_accuracy == pytest.approx(said["C"], abs=0.3)
