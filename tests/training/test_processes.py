"""Accumulated batches and several processes, compared with a plain torch loop over the same global batches."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from fakes import Uneven
from torch.multiprocessing.spawn import ProcessRaisedException

from segdeconv.checkpoints import checkpoint
from segdeconv.data.module import IMAGENET_MEAN, IMAGENET_STD
from segdeconv.data.sampler import StatelessBatches
from segdeconv.errors import CheckpointError, Interrupted, SegdeconvError, UsageError, error_from_traceback
from segdeconv.evaluation import report
from segdeconv.evaluation.evaluate import evaluate, restore_dataset
from segdeconv.inference.predictors import PredictionSettings
from segdeconv.inference.segmenter import Segmenter
from segdeconv.models import SegNet
from segdeconv.train import train
from segdeconv.training import trainer as training
from segdeconv.training.resume import AnyName
from segdeconv.training.trainer import count_processes

ROOT = Path(__file__).parents[2]
TRUST = AnyName()
STEPS, BATCH, LR = 20, 8, 0.05


def config(**changes):
    """Return a config; with its changes, batch_size x accumulate x devices must stay 8."""
    nodes = {
        "dataset": {"_target_": "fakes.Uneven", "batch_size": BATCH, "num_workers": 0},
        "augment": {},
        "model": {"_target_": "segdeconv.models.SegNet", "stages": [[4], [8]]},
        "optimizer": {"_target_": "segdeconv.optimization.sgd", "lr": LR, "weight_decay": 0.001},
        "schedule": {"_target_": "segdeconv.optimization.Constant"},
        "trainer": {"max_epochs": 99, "max_steps": STEPS, "precision": "32-true", "norm": "frozen"},
        "logger": {},
    }
    for key, value in changes.items():
        group, _, name = key.partition("__")
        nodes[group] = {**nodes[group], name: value}
    return nodes


def weights(run):
    return checkpoint.read(run / "last.ckpt", trust=TRUST).model().state_dict()


@pytest.fixture(scope="module")
def expected_weights():
    """Return the weights after 20 steps of a plain loop over batches of 8, with the loss averaged over all pixels."""
    torch.manual_seed(0)
    model = SegNet(3, stages=((4,), (8,))).eval()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": 0.001}, {"params": others}], lr=LR, momentum=0.9)
    data, step = Uneven("train"), 0
    while step < STEPS:
        for batch in StatelessBatches(len(data), BATCH, seed=0, position=lambda epoch=step // 3: (epoch, 0)):
            samples = [data[index] for _, index in batch]
            image = np.stack([(sample.image - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD) for sample in samples])
            mask = torch.from_numpy(np.stack([sample.mask for sample in samples])).long()
            logits = model(torch.from_numpy(image).float().permute(0, 3, 1, 2))
            optimizer.zero_grad()
            F.cross_entropy(logits, mask, ignore_index=255).backward()
            optimizer.step()
            step += 1
            if step == STEPS:
                break
    return model.state_dict()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    run = tmp_path_factory.mktemp("two") / "run"
    probe = {"_target_": "tiny_runs.Probe", "file": str(tmp_path_factory.mktemp("seen") / "rank")}
    train({**config(dataset__batch_size=BATCH // 2, trainer__devices=2), "callbacks": [probe]}, run)
    return run


def assert_close(state, expected):
    assert set(state) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            state[name], value, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_accumulated_batches_equal_one_large_batch_though_void_is_uneven(
    tmp_path, expected_weights, batch_size, accumulate
):
    train(config(dataset__batch_size=batch_size, trainer__accumulate_grad_batches=accumulate), tmp_path)
    assert_close(weights(tmp_path), expected_weights)


@pytest.mark.slow
def test_two_processes_equal_one_large_batch_though_void_is_uneven(two_processes, expected_weights):
    assert_close(weights(two_processes), expected_weights)


def test_a_mean_of_means_would_fail_the_comparison(expected_weights):
    """The halves of a batch differ in their fraction of void, so that averaging their means gives other weights."""
    data = Uneven("train")
    masks = [data[index].mask != 255 for index in range(BATCH)]
    halves = [np.mean(masks[:4]), np.mean(masks[4:])]
    order = next(iter(StatelessBatches(len(data), BATCH, seed=0, position=lambda: (0, 0))))
    fractions = [np.mean([data[index].mask != 255 for _, index in half]) for half in (order[:4], order[4:])]
    assert halves[0] == halves[1]  # in file order, the halves are equal
    assert abs(fractions[0] - fractions[1]) > 0.1


def test_two_processes_score_every_image_once_and_equal_one_process(two_processes):
    with (two_processes / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    source = checkpoint.read(two_processes / "last.ckpt", trust=TRUST)
    dataset = restore_dataset(source, "val")
    settings = PredictionSettings(precision="32-true")
    confusion = evaluate(Segmenter(source, settings, device=torch.device("cpu")), dataset)
    val = Uneven("val")
    assert len(dataset) == 7
    assert confusion.sum() == sum((val[index].mask != 255).sum() for index in range(7))
    scores = report.report(confusion, len(dataset), source.classes)
    assert float(last["val/miou"]) == pytest.approx(scores["miou"], abs=1e-12)
    assert float(last["val/pixel_accuracy"]) == pytest.approx(scores["pixel_accuracy"], abs=1e-12)


def test_two_processes_report_the_training_metrics_of_one_process(two_processes, tmp_path):
    train(config(), tmp_path)
    with (two_processes / "metrics.csv").open() as two, (tmp_path / "metrics.csv").open() as one:
        for row, expected in zip(csv.DictReader(two), csv.DictReader(one), strict=True):
            for name in ("train/loss", "train/miou", "train/pixel_accuracy", "val/loss", "val/miou"):
                assert float(row[name]) == pytest.approx(float(expected[name]), abs=2e-4), name


def test_callbacks_of_all_processes_see_the_numbers_of_metrics_csv(two_processes):
    probe = yaml.safe_load((two_processes / "config.yaml").read_text())["callbacks"]["Probe"]
    first, second = (json.loads(Path(f"{probe['file']}{rank}").read_text()) for rank in (0, 1))
    assert first == second
    with (two_processes / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if "/" in name]
    assert [{name: epoch[name] for name in names} for epoch in first] == [
        {name: float(row[name]) for name in names} for row in rows
    ]


def test_two_processes_write_one_run_folder(two_processes):
    assert {path.name for path in two_processes.parent.iterdir()} == {"run"}
    names = {path.name for path in two_processes.iterdir()}
    assert {"best.ckpt", "last.ckpt", "metrics.csv", "report.json", "config.yaml"} <= names
    with (two_processes / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [3, 6, 9, 12, 15, 18, 20]


def test_synchronised_batch_norm_on_a_cpu_gives_an_error_message(tmp_path):
    with pytest.raises(UsageError, match=r"trainer.norm=sync works on accelerators only"):
        train(config(trainer__norm="sync", trainer__accelerator="cpu"), tmp_path)


@pytest.mark.parametrize(("devices", "count"), [("auto", 1), (1, 1), (2, 2), ("3", 3)])
def test_processes_are_counted_without_a_trainer(devices, count):
    assert count_processes("cpu", devices, 1) == count


def test_an_invalid_number_of_processes_is_refused():
    with pytest.raises(UsageError, match=r"trainer.devices=many is not a number of CPU processes - give"):
        count_processes("cpu", "many", 1)


def test_an_error_of_another_process_is_raised_with_its_class_and_message():
    text = (
        "\n\n-- Process 1 terminated with the following error:\nTraceback (most recent call last):\n  ...\n"
        "segdeconv.errors.CheckpointError: last.ckpt is damaged: its sha256 is not - use another\n"
    )
    error = error_from_traceback(text)
    assert type(error) is CheckpointError
    assert str(error) == "last.ckpt is damaged: its sha256 is not - use another"
    stopped = error_from_traceback("segdeconv.errors.Interrupted: stopped by SIGTERM")
    assert type(stopped) is Interrupted
    assert stopped.exit_code == 143
    assert error_from_traceback("Traceback\nRuntimeError: Connection closed by peer") is None
    assert error_from_traceback("segdeconv.errors.os: a name that is not an error class") is None
    assert issubclass(CheckpointError, SegdeconvError)


# The real command. Each test starts three interpreters.

COMMAND = (
    "augment=street",
    "dataset.num_train=26",
    "dataset.num_val=5",
    "dataset.batch_size=2",
    "dataset.num_workers=0",
    "model.stages=[[4],[8]]",
    "trainer.devices=2",
    "trainer.precision=32-true",
    "trainer.ema=0.9",
)


def start(cwd, *arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *COMMAND, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks(process):
    """Return the process ids of the training processes of a command."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def wait_for(path, process):
    while not path.exists() and process.poll() is None:
        time.sleep(0.05)


@pytest.mark.slow
def test_two_processes_resumed_after_a_signal_equal_uninterrupted_ones(tmp_path):
    words = ("trainer.max_epochs=12", "hydra.run.dir=run")
    with start(tmp_path, *words, "seed=0") as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    (tmp_path / "run").rename(tmp_path / "uninterrupted")
    with start(tmp_path, *words, "seed=0") as process:
        wait_for(tmp_path / "run" / "last.ckpt", process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
    assert process.returncode == 143, err
    assert err.count("segdeconv: error:") == 1
    assert "segdeconv: error: stopped by SIGTERM at step" in err
    with start(tmp_path, *words, "seed=0", "resume=auto") as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert "resumed from last.ckpt" in out
    assert (tmp_path / "run" / "metrics.csv").read_text() == (tmp_path / "uninterrupted" / "metrics.csv").read_text()
    resumed, expected = (checkpoint.load_plain(tmp_path / name / "last.ckpt") for name in ("run", "uninterrupted"))
    assert resumed["global_step"] == expected["global_step"]
    for name, value in expected["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name


@pytest.mark.slow
def test_a_killed_process_ends_all_others_within_seconds(tmp_path):
    with start(tmp_path, "trainer.max_epochs=4000", "hydra.run.dir=run") as process:
        wait_for(tmp_path / "run" / "last.ckpt", process)
        first, second = ranks(process)
        os.kill(second, signal.SIGKILL)
        killed_at = time.monotonic()
        _, err = process.communicate(timeout=60)
    assert time.monotonic() - killed_at < 30
    assert process.returncode == 2, err
    assert err.count("segdeconv: error:") == 1
    assert "a training process was killed" in err
    assert not Path(f"/proc/{first}").exists()


@pytest.mark.slow
def test_a_multirun_with_two_processes_runs_each_job_once(tmp_path):
    with start(tmp_path, "--multirun", "seed=0,1", "trainer.max_epochs=1", "hydra.sweep.dir=sweep") as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()) == ["0", "1"]
    assert out.count("best checkpoint: ") == 2
    assert len(list(tmp_path.rglob("metrics.csv"))) == 2
    scores = [json.loads((tmp_path / "sweep" / job / "report.json").read_text())["num_pixels"] for job in "01"]
    assert scores[0] == scores[1] > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_of_the_averaged_loss_is_clipped(tmp_path, accumulate):
    """A step of plain SGD with the gradient clipped to norm 0.01 changes the vector of all weights by lr * 0.01."""
    plain = {"optimizer__momentum": 0.0, "optimizer__weight_decay": 0.0, "trainer__max_steps": 1}
    train(config(trainer__gradient_clip_val=0.01, trainer__accumulate_grad_batches=accumulate, **plain), tmp_path)
    torch.manual_seed(0)
    start, after = SegNet(3, stages=((4,), (8,))).state_dict(), weights(tmp_path)
    change = sum(float((after[name] - value).double().square().sum()) for name, value in start.items()) ** 0.5
    assert change == pytest.approx(LR * 0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:83] Timed out waiting 120000ms for recv", "120 s"),
        (
            "torch.distributed.DistBackendError: [Rank 0] Watchdog caught collective operation timeout: WorkNCCL",
            "120 s",
        ),
        ("ZeroDivisionError: division by zero", None),
    ],
)
def test_a_process_that_does_not_answer_is_one_line(monkeypatch, tmp_path, error, message):
    """The text of a gloo error is from a run of which one process received SIGSTOP."""

    class Trainer:
        def fit(self, *arguments, **settings):
            raise ProcessRaisedException(f"\n\n-- Process 1 terminated with the following error:\n{error}", 1, 2)

    monkeypatch.setattr(training, "spawning_launcher", lambda trainer: types.SimpleNamespace(kill=None))
    with pytest.raises(UsageError if message else ProcessRaisedException, match=message or "ZeroDivisionError"):
        training.fit(Trainer(), None, None, resumed=None)
