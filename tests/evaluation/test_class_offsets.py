"""Class offsets: the fit compared with trying every shift, what the record states, and what is refused."""

import itertools
import shutil

import fakes
import numpy as np
import pytest
import torch
from tiny_runs import config

from segdeconv.checkpoints import checkpoint
from segdeconv.errors import UsageError
from segdeconv.evaluation.class_offsets import GAIN, LIMIT, STEP, _miou_by_shift, fit_class_offsets, with_class_offsets
from segdeconv.evaluation.evaluate import evaluate, restore_dataset
from segdeconv.evaluation.metrics import scores
from segdeconv.inference.segmenter import Segmenter
from segdeconv.train import train

CPU = torch.device("cpu")
TRUST = ("fakes.Uneven",)


def noisy(num_classes=4, pixels=600, absent=None, seed=0):
    """Return logits that are right on most pixels, and labels of unequal frequency, of which one may be absent."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([1.0, 0.5, 0.1, 0.2])
    if absent is not None:
        weights[absent] = 0
    labels = torch.multinomial(weights, pixels, replacement=True, generator=generator)
    logits = torch.randn(num_classes, pixels, generator=generator) + torch.eye(num_classes)[:, labels]
    return logits, labels


def miou(logits, labels):
    """Mean IoU over the labelled classes, counted pixel by pixel."""
    prediction, counted = logits.argmax(dim=0), labels.unique()
    ious = [((prediction == c) & (labels == c)).sum() / ((prediction == c) | (labels == c)).sum() for c in counted]
    return float(torch.stack(ious).mean())


@pytest.mark.parametrize("absent", [None, 2])
def test_the_curve_of_a_class_is_that_of_trying_every_shift(absent):
    logits, labels = noisy(absent=absent)
    given = logits.clone()
    for index in labels.unique().tolist():
        curve = _miou_by_shift(logits, labels, index, reach=12)
        tried = [miou(logits + step * STEP * torch.eye(4)[:, [index]], labels) for step in range(-12, 13)]
        np.testing.assert_allclose(curve, tried, atol=1e-6)
    assert torch.equal(logits, given)


@pytest.mark.parametrize("seed", range(3))
def test_no_shift_of_one_class_improves_the_fitted_offsets(seed):
    logits, labels = noisy(seed=seed)
    offsets = fit_class_offsets(logits, labels)
    fitted = miou(logits + offsets[:, None], labels)
    assert fitted > miou(logits, labels) + GAIN
    assert offsets.abs().max() <= LIMIT
    for index, step in itertools.product(range(4), range(-20, 21)):
        shifted = offsets + step * STEP * torch.eye(4)[index]
        assert shifted.abs().max() > LIMIT or miou(logits + shifted[:, None], labels) < fitted + GAIN + 1e-6


def test_a_class_without_labels_keeps_its_logits():
    assert fit_class_offsets(*noisy(absent=2))[2] == 0


def test_offsets_stay_within_their_limit_where_one_class_is_never_right():
    logits = torch.stack([torch.full((100,), 50.0), torch.zeros(100)])
    labels = torch.ones(100, dtype=torch.int64)
    labels[0] = 0
    assert fit_class_offsets(logits, labels).abs().max() <= LIMIT


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offsets") / "run"
    train(config(trainer__max_epochs=4), folder)
    return checkpoint.read(folder / "best.ckpt", trust=TRUST)


@pytest.fixture(scope="module")
def result(original):
    lines = []
    network = with_class_offsets(original, device=CPU, report=lines.append)
    return network, lines


def ious(network):
    return scores(evaluate(Segmenter(network, device=CPU), restore_dataset(network, "val"))).iou


def test_the_record_has_the_scores_of_evaluate_before_and_after(original, result, tmp_path):
    network, lines = result
    recorded = network.facts["class_offsets"]
    assert (recorded["split"], recorded["checked_on"]) == ("train", "val")
    assert recorded["images"] == len(restore_dataset(original, "train"))
    assert any(recorded["values"].values())
    checkpoint.write(network.content, tmp_path / "offsets.ckpt")
    again = checkpoint.read(tmp_path / "offsets.ckpt", trust=TRUST)
    for state, source in (("before", original), ("after", again)):
        stated = [recorded[state].get(name, float("nan")) for name in source.classes.names]
        np.testing.assert_allclose(stated, ious(source), atol=1e-3)
    assert lines[0].startswith("class offsets fitted on train (")
    assert lines[1].startswith("mean IoU on val ")


def test_only_one_bias_changes(original, result):
    network = result[0]
    with torch.no_grad():
        image = torch.randn(2, 3, 64, 64)
        before, after = original.model()(image), network.model()(image)
    offsets = torch.tensor(list(network.facts["class_offsets"]["values"].values()), dtype=torch.float32)
    torch.testing.assert_close(after, before + offsets[:, None, None])
    changed = [name for name, value in network.weights.items() if not torch.equal(value, original.weights[name])]
    assert changed == ["decoder.classifier.bias"]


def test_offsets_are_not_fitted_twice(result, tmp_path):
    checkpoint.write(result[0].content, tmp_path / "offsets.ckpt")
    with pytest.raises(UsageError, match=r"offsets\.ckpt has class offsets already - fit them to the checkpoint"):
        with_class_offsets(checkpoint.read(tmp_path / "offsets.ckpt", trust=TRUST))


def test_a_warning_says_that_offsets_do_not_help_on_val(original, monkeypatch, capsys):
    worst = torch.zeros(len(original.classes), dtype=torch.double)
    worst[0] = 3.0
    monkeypatch.setattr("segdeconv.evaluation.class_offsets.fit_class_offsets", lambda *_: worst)
    with_class_offsets(original, device=CPU, report=lambda _: None)
    assert "the class offsets lower mean IoU on val" in capsys.readouterr().err


def test_the_command_writes_a_checkpoint_whose_report_names_the_offsets(original, commands, tmp_path):
    trusted = [f"--trust={TRUST[0]}"]
    shutil.copy(fakes.__file__, tmp_path)  # a class of the user's own
    done = commands("calibrate", str(original.path), "--class-offsets", "--out", "offsets.ckpt", *trusted, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "class offsets fitted on train (" in done.out
    done = commands("evaluate", "offsets.ckpt", "--out", "report", *trusted, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "class offsets fitted on train (" in done.out
    assert "The network has class offsets fitted on train (" in (tmp_path / "report" / "report.html").read_text()
