"""Lightning's callbacks and the user's own in a run: what they see, which work, and exact resumption with them."""

import csv
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from fakes import Uneven
from pytorch_lightning import callbacks
from pytorch_lightning.loggers import Logger
from test_resume import digest
from tiny_runs import config, state
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from segdeconv.checkpoints import checkpoint
from segdeconv.cli.own_code import compose
from segdeconv.errors import UsageError
from segdeconv.train import train
from segdeconv.training.arguments import read_arguments
from segdeconv.training.config_check import check_callbacks, check_config
from segdeconv.training.own_callbacks import REFUSED, require_suitable
from segdeconv.training.resume import AnyName
from segdeconv.training.stopping import Stopping

EARLY = {"_target_": "pytorch_lightning.callbacks.EarlyStopping", "monitor": "val/miou", "mode": "max"}
BEST = {"_target_": "pytorch_lightning.callbacks.ModelCheckpoint", "monitor": "val/miou", "mode": "max"}
UNSAFE = {"_target_": "test_callbacks.Unsafe"}
RATES = {"_target_": "pytorch_lightning.callbacks.LearningRateMonitor", "logging_interval": "step"}
EPOCHS, STEPS = 4, 6


class Rates(Logger):
    """A logger that stores the learning rates in a file."""

    name = version = "rates"

    def __init__(self, file: str):
        super().__init__()
        self.file = Path(file)

    def log_metrics(self, metrics, step=None):
        with self.file.open("a") as file:
            file.write(json.dumps({**metrics, "step": step}) + "\n")

    def log_hyperparams(self, *arguments):
        pass


class Unsafe(pl.Callback):
    def __init__(self, value: str):
        self.value = value

    def state_dict(self):
        return {"seen": {"set": {1}, "array": np.zeros(2), "number": np.float64(1)}[self.value]}


class NotInstalled(pl.Callback):
    def setup(self, trainer, pl_module, stage):
        raise ModuleNotFoundError("`NotInstalled` requires `gauge`. Install it by running `pip install -U gauge`.")


class Adding(pl.Callback):
    def on_save_checkpoint(self, trainer, pl_module, content):
        content["mine"] = Path("here")


def rows(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """A run with callbacks of all kinds and a logger; the folder beside it has what they saw."""
    folder = tmp_path_factory.mktemp("observed")
    group = {
        "early": {**EARLY, "patience": 99},
        "best": {**BEST, "save_top_k": 2},
        "rates": RATES,
        "probe": {"_target_": "tiny_runs.Probe", "file": str(folder / "seen")},
    }
    logger = {"_target_": "test_callbacks.Rates", "file": str(folder / "rates")}
    settings = {"max_epochs": EPOCHS, "precision": "32-true", "log_every_n_steps": 1}
    schedule = {"_target_": "segdeconv.optimization.Poly", "power": 1.0}
    train(config(callbacks=group, logger=logger, trainer=settings, schedule=schedule), folder / "run")
    return folder


def test_callbacks_see_the_numbers_of_metrics_csv_in_every_epoch(observed):
    seen = json.loads((observed / "seen0").read_text())
    table = rows(observed / "run")
    assert len(seen) == len(table) == EPOCHS
    names = [name for name in table[0] if "/" in name]
    assert {"train/loss", "val/loss", "val/miou", "val/iou/dark"} <= set(names)
    for epoch, row in zip(seen, table, strict=True):
        assert {name: epoch[name] for name in names} == {name: float(row[name]) for name in names}


def test_the_scores_that_callbacks_see_are_those_of_torchmetrics(observed):
    source = checkpoint.read(observed / "run" / "last.ckpt", trust=AnyName())
    model, preprocessing, data = source.model(), source.preprocessing, Uneven("val")
    iou = MulticlassJaccardIndex(3, average=None, ignore_index=255)
    accuracy = MulticlassAccuracy(3, average="micro", ignore_index=255)
    for index in range(len(data)):
        sample = data[index]
        with torch.no_grad():
            prediction = model(preprocessing.normalise(sample.image)[None]).argmax(dim=1)
        for metric in (iou, accuracy):
            metric.update(prediction, torch.from_numpy(sample.mask)[None].long())
    last = json.loads((observed / "seen0").read_text())[-1]
    assert last["val/miou"] == pytest.approx(float(iou.compute().mean()), abs=1e-6)
    assert last["val/pixel_accuracy"] == pytest.approx(float(accuracy.compute()), abs=1e-6)
    for value, name in zip(iou.compute(), Uneven.classes.names, strict=True):
        assert last[f"val/iou/{name}"] == pytest.approx(float(value), abs=1e-6)


def test_the_learning_rate_monitor_logs_the_rate_of_each_step(observed):
    lines = [json.loads(line) for line in (observed / "rates").read_text().splitlines()]
    rates = {line["step"]: line for line in lines if any(name.startswith("lr-AdamW") for name in line)}
    total = EPOCHS * STEPS
    assert set(rates) == set(range(total))
    for step, line in rates.items():
        assert line["lr-AdamW/pg1"] == pytest.approx(0.01 * (1 - step / total), abs=1e-9)
    for row in rows(observed / "run"):  # metrics.csv has the rate of the last step of the epoch
        assert float(row["lr"]) == pytest.approx(0.01 * (1 - (int(row["step"]) - 1) / total), abs=1e-9)


def test_every_score_is_logged_once(observed):
    lines = [json.loads(line) for line in (observed / "rates").read_text().splitlines()]
    assert [line["step"] for line in lines if "val/miou" in line] == [STEPS * epoch for epoch in range(1, EPOCHS + 1)]


def test_model_checkpoint_keeps_the_best_epochs_which_other_commands_read(observed):
    scores = {int(row["step"]): float(row["val/miou"]) for row in rows(observed / "run")}
    best = sorted(scores, key=scores.get, reverse=True)[:2]
    files = {int(re.findall(r"step=(\d+)", path.name)[0]): path for path in observed.glob("**/checkpoints/*.ckpt")}
    assert set(files) == set(best)
    assert {path.name for path in next(iter(files.values())).parent.glob("*.sha256")} == {
        f"{path.name}.sha256" for path in files.values()
    }
    ours = checkpoint.read(observed / "run" / "best.ckpt", trust=AnyName()).weights
    theirs = checkpoint.read(files[best[0]], trust={"fakes.Uneven"}).weights  # names none of the callbacks
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_callbacks_change_no_bit_of_a_run(observed, tmp_path):
    schedule = {"_target_": "segdeconv.optimization.Poly", "power": 1.0}
    train(config(trainer__max_epochs=EPOCHS, schedule=schedule), tmp_path)
    expected, weights = state(tmp_path), state(observed / "run")
    assert all(torch.equal(value, weights[name]) for name, value in expected.items())
    assert (tmp_path / "metrics.csv").read_text() == (observed / "run" / "metrics.csv").read_text()


# Resumption

GROUP = {
    "early": {**EARLY, "patience": 1, "min_delta": 1.0},  # ends training after the second epoch
    "probe": {"_target_": "tiny_runs.Probe"},
}


def stopped_early(run, file, **changes):
    group = {**GROUP, "probe": {**GROUP["probe"], "file": str(file)}}
    train({**config(trainer__max_epochs=9, callbacks=group), **changes}, run)


@pytest.mark.parametrize("step", [2, STEPS + 2])
def test_a_run_with_callbacks_resumes_to_the_same_bits(tmp_path, monkeypatch, step):
    stopped_early(tmp_path / "once", tmp_path / "seen")
    original = Stopping.on_train_batch_end

    def crash(self, trainer, *arguments):
        if trainer.global_step == step:
            self.deadline = 0.0
        original(self, trainer, *arguments)

    monkeypatch.setattr(Stopping, "on_train_batch_end", crash)
    stopped_early(tmp_path / "cut", tmp_path / "seen")
    monkeypatch.setattr(Stopping, "on_train_batch_end", original)
    stopped_early(tmp_path / "cut", tmp_path / "seen", resume="auto")
    assert checkpoint.load_plain(tmp_path / "cut" / "last.ckpt")["global_step"] == 2 * STEPS
    assert digest(tmp_path / "cut") == digest(tmp_path / "once")  # includes the states of the callbacks
    (saved,) = [
        value
        for name, value in checkpoint.load_plain(tmp_path / "cut" / "last.ckpt")["callbacks"].items()
        if name.startswith("EarlyStopping")
    ]
    assert saved["wait_count"] == 1


def test_a_run_that_a_callback_has_ended_stays_ended_when_it_resumes(tmp_path, capsys):
    stopped_early(tmp_path / "run", tmp_path / "seen")
    assert "training ends: a callback stopped it at step 12 (Monitored metric val/miou did" in capsys.readouterr().out
    before = digest(tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()  # as if it had been killed during the evaluation
    stopped_early(tmp_path / "run", tmp_path / "seen", resume="auto")
    assert "training ends: a callback stopped it here" in capsys.readouterr().out
    assert digest(tmp_path / "run") == before
    with pytest.raises(UsageError, match=r"started with other values of callbacks"):
        train({**config(trainer__max_epochs=9), "resume": "auto"}, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    train({**config(trainer__max_epochs=3), "resume": "auto", "resume_force": True}, tmp_path / "run")
    assert checkpoint.load_plain(tmp_path / "run" / "last.ckpt")["global_step"] == 3 * STEPS


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({**UNSAFE, "value": "set"}, "the state of Unsafe contains a value of type set, which a checkpoint cannot"),
        ({**UNSAFE, "value": "array"}, "the state of Unsafe contains a value of type ndarray"),
        ({**UNSAFE, "value": "number"}, "the state of Unsafe contains a value of type float64"),
        ({"_target_": "test_callbacks.Adding"}, "mine, which a callback adds to the checkpoint, contains a value of"),
        (RATES, "callbacks: Cannot use `LearningRateMonitor` callback with `Trainer` that has no logger - change"),
        ({**EARLY, "monitor": "val/mIoU"}, r"callbacks.EarlyStopping.monitor=val/mIoU is not logged - did you mean"),
        ({**BEST, "dirpath": "RUN"}, "is the run folder, whose checkpoints it could replace - leave it out"),
        ({**EARLY, "mode": "most"}, "(pytorch_lightning.callbacks.EarlyStopping) fails: `mode` can be "),
        ({**EARLY, "patiense": 3}, "unknown key callbacks.EarlyStopping.patiense - did you mean 'patience'?"),
        ({"_target_": "test_callbacks.NotInstalled"}, "callbacks needs the package gauge - pip install gauge"),
        ({"_target_": "fakes.Uneven", "split": "val"}, "is not a pytorch_lightning.Callback - inherit from it"),
    ],
)  # fmt: skip
def test_a_callback_that_cannot_work_is_one_line_before_training(tmp_path, node, message):
    node = {key: str(tmp_path / "run") if value == "RUN" else value for key, value in node.items()}
    with pytest.raises(UsageError) as caught:
        train(config(callbacks=[node], trainer__max_epochs=1), tmp_path / "run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("callback", "way_out"),
    [
        (callbacks.StochasticWeightAveraging(0.01), "trainer.ema=0.999"),
        (callbacks.EMAWeightAveraging(), "trainer.ema=0.999"),
        (callbacks.GradientAccumulationScheduler({0: 2}), "trainer.accumulate_grad_batches"),
        (callbacks.BackboneFinetuning(), "optimizer.part_lr="),
        (callbacks.ModelPruning("l1_unstructured"), "no command could read"),
        (callbacks.LearningRateFinder(), "find lr"),
        (callbacks.BatchSizeFinder(), "find batch_size"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_callbacks_that_change_what_a_step_is_are_refused_with_the_way_out(callback, way_out):
    with pytest.raises(
        UsageError, match=rf"{type(callback).__name__} does not work with SegmentationTask: .*"
    ) as caught:
        require_suitable([callback])
    assert way_out in str(caught.value)


def test_all_refused_callbacks_are_in_the_table_of_the_page():
    page = (Path(__file__).parents[2] / "docs" / "lightning.md").read_text()
    assert [kind.__name__ for kind in REFUSED if f"`{kind.__name__}" not in page] == []


# Python


def test_a_program_gives_objects_classes_and_names_and_reads_the_objects_afterwards(tmp_path, capsys):
    early, best = callbacks.EarlyStopping("val/miou", mode="max"), callbacks.ModelCheckpoint(monitor="val/loss")
    given = [early, best, functools.partial(callbacks.Timer, duration="01:00:00:00"), "learning_rate_monitor"]
    nodes = config(trainer__max_epochs=1)
    del nodes["logger"]
    result = train(nodes, tmp_path / "run", callbacks=given)
    assert float(early.best_score) == result.history[0]["val/miou"]
    assert Path(best.best_model_path).is_file()
    assert "not in the checkpoint" not in capsys.readouterr().out  # which needs none of them
    group = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["callbacks"]
    assert list(group) == ["EarlyStopping", "ModelCheckpoint", "Timer", "learning_rate_monitor"]  # as given
    assert group["EarlyStopping"]["object"] == "pytorch_lightning.callbacks.early_stopping.EarlyStopping"
    (tmp_path / "run" / "report.json").unlink()
    train({**nodes, "resume": "auto"}, tmp_path / "run", callbacks=given)
    with pytest.raises(UsageError, match=r"callbacks.object \(builtins.object\) is not a pytorch_lightning.Callback"):
        train(nodes, tmp_path / "other", callbacks=object())


def test_a_key_of_a_file_can_be_a_keyword(tmp_path):
    read = read_arguments({}, {"callbacks": "early_stopping", "callbacks__early_stopping__patience": 3})
    assert check_config(read.config)["callbacks"] == {"early_stopping": {**EARLY, "patience": 3}}


# The config


def test_the_group_accepts_names_lists_and_one_node():
    early = {**EARLY, "patience": 2}
    assert check_callbacks({"mine": early, "none": None}) == {"mine": early}
    assert check_callbacks([early, early]) == {"EarlyStopping": early, "EarlyStopping_1": early}
    assert check_callbacks(early) == {"EarlyStopping": early}
    assert check_config({})["callbacks"] == {}


def test_files_of_the_group_combine_on_the_command_line():
    words = ["callbacks=[early_stopping,learning_rate_monitor]", "callbacks.early_stopping.patience=7"]
    group = check_config(compose(words)[0])["callbacks"]
    assert group["early_stopping"] == {**EARLY, "patience": 7}
    assert group["learning_rate_monitor"]["_target_"] == RATES["_target_"]
    assert compose([])[0]["callbacks"] == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["callbacks=early"], "unknown callbacks 'early' - did you mean 'early_stopping'?"),
        (["callbacks=[early_stopping,nothing]"], "unknown callbacks 'nothing' - "),
        (["loss=[dice,lovasz]"], "unknown loss '"),
        (
            ["callbacks=early_stopping", "callbacks.patience=5"],
            "callbacks.patience=5 is not a callback, which has a _target_ - write callbacks.early_stopping.patience=5",
        ),
        (["callbacks.patience=5"], "callbacks.patience=5 is not a callback, which has a _target_ - choose one in"),
        (["callbacks._target_=fakes.Callbak"], "callbacks.Callbak._target_=fakes.Callbak cannot be imported"),
        (
            [
                "callbacks._target_=pytorch_lightning.callbacks.ModelCheckpoint",
                "callbacks.train_time_interval=00:10:00",
            ],
            "callbacks.ModelCheckpoint contains a value of type timedelta, which config.yaml cannot hold",
        ),
        (["trainer.strategy=ddp"], "trainer.strategy is an argument of Lightning's Trainer, not of a run - set"),
        (["trainer.limit_train_batches=0"], "trainer.limit_train_batches=0: "),
        (["trainer.limit_val_batches=1.5"], "trainer.limit_val_batches=1.5: "),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(words, message):
    with pytest.raises(UsageError) as caught:
        check_config(compose(words)[0])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# Keys of Lightning's Trainer


def test_a_limited_run_resumes_to_the_same_bits_and_counts_its_batches(tmp_path):
    limits = {"trainer__limit_train_batches": 0.5, "trainer__limit_val_batches": 2, "dataset__size": (32, 32)}
    train(config(**limits), tmp_path / "once")
    assert [int(row["step"]) for row in rows(tmp_path / "once")] == [3, 6, 9]
    train({**config(**limits), "max_time": "0s"}, tmp_path / "cut")
    train({**config(**limits), "resume": "auto"}, tmp_path / "cut")
    assert digest(tmp_path / "cut") == digest(tmp_path / "once")
    report = json.loads((tmp_path / "once" / "report.json").read_text())
    assert report["num_images"] == 7  # the final scores are those of the whole split


def test_overfit_batches_repeat_the_same_pixels_in_every_epoch(tmp_path, monkeypatch):
    seen = []
    get = Uneven.__getitem__

    def record(self, index):
        if self.split == "train":
            seen.append(index)
        return get(self, index)

    train(config(trainer__max_epochs=1), tmp_path / "warm")  # other reads of the samples come first, in every run
    monkeypatch.setattr(Uneven, "__getitem__", record)
    train(config(trainer__overfit_batches=2, trainer__max_epochs=3, dataset__cache="none"), tmp_path / "run")
    assert seen[-24:-16] == seen[-16:-8] == seen[-8:]
    assert len(set(seen[-8:])) == 8


def test_a_fast_dev_run_runs_every_step_and_leaves_nothing(tmp_path, capsys):
    changes = {"trainer__fast_dev_run": 2, "logger": {"_target_": "segdeconv.training.loggers.TensorBoard"}}
    train(config(**changes, callbacks=[BEST]), tmp_path / "run")
    assert "fast_dev_run: training (2 steps) and validation succeeded" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_profile_is_written_into_the_run_folder_and_the_progress_can_be_hidden(tmp_path, capsys):
    train(config(trainer__profiler="simple", trainer__enable_progress_bar=False, trainer__max_epochs=1), tmp_path)
    assert "run_training_batch" in (tmp_path / "fit-profile.txt").read_text()
    assert "train loss" not in capsys.readouterr().out
