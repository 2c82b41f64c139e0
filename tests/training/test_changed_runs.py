"""resume_force=true: new values of an optimizer's options apply, and a state that does not fit changes nothing."""

import csv

import pytest
import torch
from tiny_runs import config

from segdeconv.checkpoints import checkpoint
from segdeconv.errors import UsageError
from segdeconv.train import train

OPTIMIZERS = {
    "sgd": {"_target_": "segdeconv.optimization.sgd", "lr": 0.05},
    "adamw": {"_target_": "segdeconv.optimization.adamw", "lr": 0.01},
    "muon": {"_target_": "segdeconv.optimization.muon", "lr": 0.01},
    "Adam": {"_target_": "torch.optim.Adam", "lr": 0.01},
}


def go(run, name="adamw", epochs=1, force=False, **changes):
    """Train, or resume, for some epochs."""
    node = {**OPTIMIZERS[name], **changes.pop("optimizer", {})}
    settings = config(**{"optimizer": node, "trainer__max_epochs": epochs, **changes})
    return train({**settings, "resume": "auto", "resume_force": force}, run)


def state(run):
    return checkpoint.load_plain(run / "last.ckpt")


def options(run):
    (optimizer,) = state(run)["optimizer_states"]
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer["param_groups"]]


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        ("sgd", {"lr": 0.002, "momentum": 0.5, "weight_decay": 0.1}),
        ("adamw", {"lr": 0.002, "weight_decay": 0.1}),
        ("muon", {"lr": 0.002, "momentum": 0.5}),
        ("Adam", {"lr": 0.002, "betas": [0.5, 0.9]}),
    ],
)
def test_new_options_of_the_optimizer_apply(tmp_path, optimizer, changes):
    go(tmp_path / "run", optimizer)
    go(tmp_path / "run", optimizer, 2, force=True, optimizer=changes)
    go(tmp_path / "fresh", optimizer, optimizer=changes)
    assert options(tmp_path / "run") == options(tmp_path / "fresh")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates == [OPTIMIZERS[optimizer]["lr"], changes["lr"]]


def test_a_learning_rate_of_nearly_nothing_leaves_the_weights(tmp_path):
    go(tmp_path)
    before = {name: value.clone() for name, value in state(tmp_path)["state_dict"].items() if name.endswith("weight")}
    go(tmp_path, epochs=2, force=True, optimizer={"lr": 1e-12})
    after = state(tmp_path)["state_dict"]
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-9)


def test_the_state_of_the_optimizer_is_kept(tmp_path):
    """Two epochs, of which the second has a learning rate that is the same in float32, equal two epochs in one go."""
    go(tmp_path / "run")
    go(tmp_path / "run", epochs=2, force=True, optimizer={"lr": 0.01 + 1e-12})
    go(tmp_path / "whole", epochs=2)
    for name, value in state(tmp_path / "whole")["state_dict"].items():
        torch.testing.assert_close(state(tmp_path / "run")["state_dict"][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("optimizer", "now", "changes", "key"),
    [
        ("sgd", "adamw", {}, "optimizer._target_"),
        ("adamw", "muon", {}, "optimizer._target_"),
        ("muon", "adamw", {}, "optimizer._target_"),
        ("Adam", "Adam", {"optimizer": {"amsgrad": True}}, "optimizer.amsgrad"),
        ("adamw", "adamw", {"optimizer": {"part_lr": {"encoder": 0.1}}}, "optimizer.part_lr"),
        ("adamw", "adamw", {"optimizer": {"part_lr": {"encoder": 0}}}, "optimizer.part_lr"),
        ("sgd", "sgd", {"optimizer": {"bias_lr": 3.0}}, "optimizer.bias_lr"),
        ("adamw", "adamw", {"model__stages": [[4], [4]]}, "model.stages"),
        ("adamw", "adamw", {"model": {"_target_": "segdeconv.models.UNet", "stages": [[4], [8]]}}, "model._target_"),
        ("adamw", "adamw", {"trainer__ema": 0.9}, "trainer.ema"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(tmp_path, optimizer, now, changes, key):
    go(tmp_path, optimizer)
    files = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
    with pytest.raises(UsageError, match=r"cannot be continued with other values of .*nothing was changed") as error:
        go(tmp_path, now, 2, force=True, **changes)
    assert key in str(error.value)
    assert "init_from=" in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"} == files
    go(tmp_path, optimizer, 2)  # with the values of the run
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("epochs", [1, 2])
def test_new_values_for_a_finished_run_that_gets_no_longer_are_refused(tmp_path, epochs):
    go(tmp_path, epochs=2)
    with pytest.raises(UsageError, match=r"is finished, so other values of optimizer\.lr have no effect - give more"):
        go(tmp_path, epochs=epochs, force=True, optimizer={"lr": 0.5})
