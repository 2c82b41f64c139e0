"""Instance statistics of a checkpoint: what the record states, which commands keep them, and what is refused."""

import shutil

import fakes
import numpy as np
import pytest
import torch
from tiny_runs import config

from segdeconv.checkpoints import checkpoint
from segdeconv.errors import UsageError
from segdeconv.evaluation.class_offsets import with_class_offsets
from segdeconv.evaluation.evaluate import evaluate, restore_dataset
from segdeconv.evaluation.instance_statistics import SHALLOW, read_weights, with_instance_statistics
from segdeconv.evaluation.metrics import scores
from segdeconv.inference.segmenter import Segmenter
from segdeconv.losses import CrossEntropy
from segdeconv.models import SegNet, SegNetBasic
from segdeconv.models.instance_batch_norm import InstanceBatchNorm2d
from segdeconv.optimization import Constant
from segdeconv.train import train
from segdeconv.training.batchnorm_recalibration import recalibrated
from segdeconv.training.task import SegmentationTask

CPU = torch.device("cpu")
TRUST = ("fakes.Uneven",)
WEIGHTS = {"encoder": 0.3}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instance") / "run"
    train(config(trainer__max_epochs=4), folder)
    return checkpoint.read(folder / "best.ckpt", trust=TRUST)


@pytest.fixture(scope="module")
def mixed(original, tmp_path_factory):
    """The checkpoint with instance statistics, as written and read again."""
    path = tmp_path_factory.mktemp("instance") / "mixed.ckpt"
    checkpoint.write(with_instance_statistics(original, WEIGHTS, device=CPU, report=lambda _: None).content, path)
    return checkpoint.read(path, trust=TRUST)


def miou(network):
    return scores(evaluate(Segmenter(network, device=CPU), restore_dataset(network, "val"))).miou


def instance_weights(model):
    return {module.instance_weight for module in model.modules() if isinstance(module, InstanceBatchNorm2d)}


def test_the_record_has_the_scores_of_evaluate_without_and_with_them(original, mixed):
    recorded = mixed.facts["instance_statistics"]
    assert (recorded["weights"], recorded["checked_on"]) == (WEIGHTS, "val")
    assert recorded["before"] == pytest.approx(miou(original))
    assert recorded["after"] == pytest.approx(miou(mixed))
    assert recorded["before"] != recorded["after"]
    assert all(torch.equal(value, original.weights[name]) for name, value in mixed.weights.items())


def test_a_warning_says_that_they_do_not_help_on_val(original, monkeypatch, capsys):
    classes = len(original.classes)
    matrices = iter([np.eye(classes, dtype=np.int64), np.ones((classes, classes), dtype=np.int64)])
    monkeypatch.setattr("segdeconv.evaluation.instance_statistics.evaluate", lambda *_: next(matrices))
    with_instance_statistics(original, WEIGHTS, device=CPU, report=lambda _: None)
    assert "the instance statistics lower mean IoU on val - keep the network without" in capsys.readouterr().err


def test_a_task_without_their_record_trains_without_them(mixed, capsys):
    network = mixed.model()
    task = SegmentationTask(
        network, CrossEntropy(), torch.optim.SGD(network.parameters(), 0.1), Constant(), mixed.classes
    )
    assert not instance_weights(task.model)
    assert "the instance statistics of the network are left out" in capsys.readouterr().err
    again = SegmentationTask.load_from_checkpoint(mixed.path, trust=TRUST)
    assert instance_weights(again.model) == {0.3}
    assert again.metadata["facts"]["instance_statistics"]["weights"] == WEIGHTS
    assert not capsys.readouterr().err


def test_other_weights_replace_them(original, mixed):
    again = with_instance_statistics(mixed, {"decoder": 0.1}, device=CPU, report=lambda _: None)
    assert instance_weights(again.model()) == {0.1}
    assert again.facts["instance_statistics"]["before"] == pytest.approx(miou(original))


def test_they_can_be_removed_once(original, mixed):
    plain = with_instance_statistics(mixed, {}, report=lambda _: None)
    assert miou(plain) == miou(original)
    with pytest.raises(UsageError, match="has no instance statistics to remove"):
        with_instance_statistics(plain, {})


@pytest.mark.parametrize("command", [recalibrated, with_class_offsets])
def test_what_changes_the_weights_keeps_them(mixed, command):
    found = command(mixed, device=CPU)
    assert found.facts["instance_statistics"] == mixed.facts["instance_statistics"]
    assert instance_weights(found.model()) == {0.3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.2", dict.fromkeys(SHALLOW, 0.2)),
        ("encoder=0.2, decoder=0.1", {"encoder": 0.2, "decoder": 0.1}),
        ("encoder=0.2,encoder.stages.3=0", {"encoder": 0.2, "encoder.stages.3": 0.0}),
        ("0", {}),
        ("encoder=0", {}),
    ],
)
@pytest.mark.parametrize("network", [SegNet, SegNetBasic])
def test_weights_as_given_on_the_command_line(text, expected, network):
    assert read_weights(text, network(3, width=0.125 if network is SegNet else 4)) == expected


@pytest.mark.parametrize("text", ["", "much", "encoder", "-0.1", "1.5", "nan", "=0.2", "encoder="])
def test_what_is_no_weight_is_refused(text):
    with pytest.raises(UsageError, match="give a number from 0 to 1"):
        read_weights(text, torch.nn.Module())


@pytest.mark.parametrize("text", ["0.1,0.2", "encoder=0.1,decoder=0.2,encoder=0.3"])
def test_two_weights_of_a_part_are_refused(text):
    with pytest.raises(UsageError, match=r"the instance weight of (the network|encoder) is given twice"):
        read_weights(text, torch.nn.Module())


def test_the_command_writes_a_checkpoint_whose_report_names_them(original, commands, tmp_path):
    trusted = [f"--trust={TRUST[0]}"]
    shutil.copy(fakes.__file__, tmp_path)  # a class of the user's own
    given = ["calibrate", str(original.path), *trusted, "--instance-statistics"]
    done = commands(*given, "encoder=0.3", "--out", "mixed.ckpt", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "instance statistics: encoder 0.3\nmean IoU on val " in done.out
    done = commands("evaluate", "mixed.ckpt", "--out", "report", *trusted, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "instance statistics: encoder 0.3; mean IoU on val " in done.out
    assert "The network has instance statistics: encoder 0.3" in (tmp_path / "report" / "report.html").read_text()
    done = commands("evaluate", "mixed.ckpt", "--precision", "int8", "--out", "int8", *trusted, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "int8 leaves out the instance statistics of mixed.ckpt" in done.err
    for words, reason in (
        (("encodr=0.3",), "did you mean 'encoder'"),
        (("0.3", "--class-offsets"), "not allowed with"),
    ):
        refused = commands(*given, *words, "--out", "other.ckpt", cwd=tmp_path)
        assert refused.code != 0
        assert reason in refused.err
