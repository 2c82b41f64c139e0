"""The shipped networks: small files, complete cards, usable by name, and scores as their cards state."""

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
from segdeconv.cli.overrides import compose
from segdeconv.data import CamVid
from segdeconv.data.datasets.camvid import CLASSES
from segdeconv.evaluation.evaluate import evaluate, restore_dataset
from segdeconv.evaluation.metrics import scores
from segdeconv.inference.segmenter import Segmenter
from segdeconv.training.config_check import check_config
from segdeconv.training.resume import with_new_keys

ROOT = Path(__file__).parents[2]
REAL_CAMVID = ROOT.parent / "shared" / "data" / "CamVid"
needs_camvid = pytest.mark.skipif(not REAL_CAMVID.is_dir(), reason=f"no real CamVid in {REAL_CAMVID}")


@pytest.mark.parametrize("name", cards.shipped())
def test_a_shipped_network_is_small_and_has_a_complete_card(name):
    path = cards.SHIPPED / f"{name}.safetensors"
    assert path.stat().st_size <= 8 << 20
    card = json.loads(cards.card_of(path).read_text())
    for part in ("data", "command", "commit", "machine", "scores", "licence", "limits"):
        assert card[part], part
    assert checkpoint.read(name).path == path  # verified by its sha256


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("camvid-small", ["experiment=segnet_camvid_small"]),
        (
            "camvid-small-trainval",
            ["experiment=segnet_camvid_small", "dataset.train_on_val=true", "trainer.max_epochs=46"],
        ),
        (
            "camvid-bayesian",
            [
                "experiment=segnet_camvid_small",
                "model.dropout_at=central",
                "model.dropout=0.5",
                "optimizer.lr=0.001",
                "trainer.max_epochs=15",
            ],
        ),
        ("camvid-basic", ["experiment=segnet_basic_camvid_small"]),
        ("camvid-unet-small", ["experiment=unet_camvid_small"]),
        (
            "camvid-unet-small-trainval",
            ["experiment=unet_camvid_small", "dataset.train_on_val=true", "trainer.max_epochs=86"],
        ),
    ],
)
def test_a_shipped_network_has_the_config_of_its_experiment(name, words):
    loaded = checkpoint.read(name)
    assert loaded.classes == CLASSES
    composed, _ = compose(words, ROOT / "configs")
    config = check_config(composed)
    written = with_new_keys(loaded.config, config)  # keys that are newer than the file have their defaults
    for part in ("model", "loss", "optimizer", "schedule", "augment"):
        assert written[part] == config[part], part
    for key in ("size", "crop", "batch_size", "train_on_val"):
        assert written["dataset"][key] == config["dataset"][key]
    assert loaded.config["trainer"]["max_epochs"] == config["trainer"]["max_epochs"]


def test_predict_accepts_camvid_small_by_name(tmp_path, commands):
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
def test_camvid_small_is_accurate_on_val():
    network, val = segdeconv.load("camvid-small"), CamVid("val", str(REAL_CAMVID))
    correct = total = 0
    for place in range(0, len(val), 25):
        image, mask, name = val[place]
        labelled = mask != CLASSES.ignore_index
        correct += int((network.predict(image, name=name).mask == mask)[labelled].sum())
        total += int(labelled.sum())
    assert correct / total > 0.85


@needs_camvid
@pytest.mark.slow
@pytest.mark.parametrize("name", ["camvid-small", "camvid-basic", "camvid-unet-small"])
def test_a_shipped_network_reaches_the_scores_on_its_card(name):
    loaded = checkpoint.read(name, overrides=[f"dataset.root={REAL_CAMVID}", "dataset.num_workers=0"])
    dataset = restore_dataset(loaded, "val")
    confusion = evaluate(Segmenter(loaded, device=torch.device("cpu")), dataset)
    stated = json.loads(cards.card_of(loaded.path).read_text())["scores"]["val"]
    measured = scores(confusion)
    assert len(dataset) == 101
    assert 100 * measured.miou == pytest.approx(stated["mIoU"], abs=0.2)
    assert 100 * measured.pixel_accuracy == pytest.approx(stated["G"], abs=0.2)
    assert 100 * measured.mean_accuracy == pytest.approx(stated["C"], abs=0.3)
