"""Training runs and their resumption after an interruption at any step, with bitwise equal results."""

import csv
import gc
import hashlib
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from segdeconv.checkpoints import checkpoint
from segdeconv.cli.overrides import compose
from segdeconv.config import rename_keys
from segdeconv.errors import DivergedError, Interrupted, UsageError
from segdeconv.train import train
from segdeconv.training import checkpointing, config_check
from segdeconv.training import resume as resuming
from segdeconv.training.callbacks import MetricsFile
from segdeconv.training.lightning_internals import canonical_loops
from segdeconv.training.resume import differing_keys, find_run, usable_checkpoint
from segdeconv.training.stopping import Stopping

ROOT = Path(__file__).parents[2]
STEPS_PER_EPOCH, EPOCHS = 3, 3
ARGUMENTS = (
    "augment=street",
    "model.stages=[[4],[8],[8]]",
    "dataset.num_train=13",
    "dataset.num_val=6",
    "dataset.batch_size=4",
    "dataset.num_workers=0",
    f"trainer.max_epochs={EPOCHS}",
    "trainer.precision=32-true",
    "schedule.warmup_steps=2",
)


def run(folder, *arguments, resume=None, runs=None):
    values = dict(argument.split("=", 1) for argument in (*ARGUMENTS, *arguments))
    config, _ = compose([f"{key}={value}" for key, value in values.items()], ROOT / "configs")
    train({**config, "resume": resume}, folder, runs=runs)


def digest(folder):
    """Return one hash over the training state: weights, optimizer, counters, best score and metric history."""
    content = checkpoint.load_plain(folder / "last.ckpt")
    sha256 = hashlib.sha256((folder / "metrics.csv").read_bytes())
    for stretch in content["callbacks"]["StepRecord"]["stretches"]:
        del stretch["conditions"]["total_steps"], stretch["open"]  # a run that is continued was shorter before

    def add(value):
        if isinstance(value, torch.Tensor):
            sha256.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else str(value).encode())
        elif isinstance(value, dict):
            for name in sorted(value, key=str):
                sha256.update(str(name).encode())
                add(value[name])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            sha256.update(repr(value).encode())

    for part in ("state_dict", "optimizer_states", "loops", "global_step", "epoch", "callbacks", "segdeconv"):
        add(content[part])
    return sha256.hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder)
    return digest(folder)


def test_a_run_writes_its_documented_files_and_header(tmp_path, uninterrupted, capsys):
    run(tmp_path)
    assert digest(tmp_path) == uninterrupted
    names = {path.name for path in tmp_path.iterdir()}
    assert {"best.ckpt", "last.ckpt", "previous.ckpt", "config.yaml", "metrics.csv", "report.json"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if name.startswith(".tmp")]
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + EPOCHS
    assert [int(row.split(",")[0]) for row in rows[1:]] == [3, 6, 9]
    assert "val/miou" in rows[0]
    assert "val/iou/disc" in rows[0]
    output = capsys.readouterr().out
    for text in (
        "Shapes: 13 train, 6 val images",
        "7: background, disc",
        "parameters",
        "precision 32-true",
        "best.ckpt",
    ):
        assert text in output
    with pytest.raises(UsageError, match="already contains a run - resume it with resume=auto"):
        run(tmp_path)


def test_tensorboard_gets_scalars_images_the_confusion_matrix_and_the_config(tmp_path):
    run(tmp_path, "trainer.max_epochs=1")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert {"lr", "train/loss", "val/loss", "val/miou", "val/iou/disc", "train/iou/ring"} <= set(tags["scalars"])
    assert "confusion" in tags["images"]
    assert sum(name.startswith("image, truth, prediction, error/val_") for name in tags["images"]) == 4
    assert tags["tensors"] == ["configuration/text_summary"]


@pytest.mark.parametrize("step", range(1, STEPS_PER_EPOCH * EPOCHS + 1))
def test_a_run_resumed_after_a_signal_at_any_step_equals_an_uninterrupted_one(
    tmp_path, monkeypatch, uninterrupted, step
):
    original = Stopping.on_train_batch_end

    def at_step(self, trainer, *arguments):
        if trainer.global_step == step:
            self.received = signal.SIGTERM
        original(self, trainer, *arguments)

    monkeypatch.setattr(Stopping, "on_train_batch_end", at_step)
    with pytest.raises(Interrupted, match=f"stopped by SIGTERM at step {step}, saved in") as caught:
        run(tmp_path)
    assert caught.value.exit_code == 143
    monkeypatch.setattr(Stopping, "on_train_batch_end", original)
    run(tmp_path, resume="auto")
    assert digest(tmp_path) == uninterrupted


def test_a_slow_write_is_left_out_between_validations_and_loses_no_exactness(tmp_path, monkeypatch):
    words = ("trainer.max_epochs=5", "trainer.check_val_every_n_epoch=2", "trainer.keep=0")
    run(tmp_path / "every", *words)
    expected = digest(tmp_path / "every")
    monkeypatch.setattr(checkpointing, "QUICK", -1.0)
    monkeypatch.setattr(checkpointing, "INTERVAL", 1e9)
    keep, written = checkpointing.Checkpoints.keep, []

    def recorded(self, trainer, miou):
        written.append(trainer.global_step)
        keep(self, trainer, miou)

    monkeypatch.setattr(checkpointing.Checkpoints, "keep", recorded)
    run(tmp_path / "few", *words)
    assert written == [3, 6, 12, 15]  # the first epoch, two validations and the end, but not the third epoch
    assert digest(tmp_path / "few") == expected
    written.clear()
    run(tmp_path / "kept", *words[:2])
    assert written == [3, 6, 9, 12, 15]  # the third epoch too, whose checkpoint is kept

    original, raised = Stopping.on_train_batch_end, {9: None, 11: ArithmeticError("crash")}

    def at_step(self, trainer, *arguments):
        if trainer.global_step in raised:
            error = raised.pop(trainer.global_step)
            if error:
                raise error
            self.received = signal.SIGTERM
        original(self, trainer, *arguments)

    monkeypatch.setattr(Stopping, "on_train_batch_end", at_step)
    written.clear()
    with pytest.raises(Interrupted, match="stopped by SIGTERM at step 9, saved in"):
        run(tmp_path / "stopped", *words)
    assert written == [3, 6, 9]
    with pytest.raises(ArithmeticError, match="crash"):
        run(tmp_path / "stopped", *words, resume="auto")
    run(tmp_path / "stopped", *words, resume="auto")
    assert digest(tmp_path / "stopped") == expected
    raised[11] = ArithmeticError("crash")
    with pytest.raises(ArithmeticError, match="crash"):
        run(tmp_path / "crashed", *words)  # resumes from the validation after step 6
    run(tmp_path / "crashed", *words, resume="auto")
    assert digest(tmp_path / "crashed") == expected


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_a_run_resumed_after_a_crash_at_any_step_equals_an_uninterrupted_one(
    tmp_path, monkeypatch, uninterrupted, step
):
    original = Stopping.on_train_batch_end

    def at_step(self, trainer, *arguments):
        if trainer.global_step == step:
            raise ArithmeticError("crash")
        original(self, trainer, *arguments)

    monkeypatch.setattr(Stopping, "on_train_batch_end", at_step)
    with pytest.raises(ArithmeticError):
        run(tmp_path)
    monkeypatch.setattr(Stopping, "on_train_batch_end", original)
    run(tmp_path, resume="auto")
    assert digest(tmp_path) == uninterrupted


def test_a_run_with_recalibrated_norms_resumes_to_the_same_bits(tmp_path):
    words = ("trainer.recalibration_batches=2",)
    run(tmp_path / "once", *words)
    run(tmp_path / "cut", *words, "max_time=0s")
    run(tmp_path / "cut", *words, resume="auto")
    assert digest(tmp_path / "cut") == digest(tmp_path / "once")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_does_not_change_the_result(tmp_path, uninterrupted, workers):
    run(tmp_path, f"dataset.num_workers={workers}")
    assert digest(tmp_path) == uninterrupted


def test_another_seed_gives_another_result(tmp_path, uninterrupted):
    run(tmp_path, "seed=1")
    assert digest(tmp_path) != uninterrupted


def test_a_finished_run_is_reported_and_left_unchanged(tmp_path, capsys):
    run(tmp_path)
    before = digest(tmp_path)
    capsys.readouterr()
    run(tmp_path, resume="auto")
    assert "is finished" in capsys.readouterr().out
    assert digest(tmp_path) == before


@pytest.mark.parametrize(("named", "shorter"), [(False, "trainer.max_epochs=1"), (True, "trainer.max_steps=4")])
def test_a_finished_run_goes_on_to_more_epochs_and_equals_an_uninterrupted_one(tmp_path, capsys, named, shorter):
    constant = ("schedule=constant", "seed=1")
    run(tmp_path / "runs" / "1", *constant, shorter)
    run(tmp_path / "once", *constant)
    target = (tmp_path / "runs" / ("1" if named else "2"), *constant)
    run(*target, resume="auto", runs=None if named else tmp_path / "runs")
    if shorter == "trainer.max_epochs=1":  # max_steps also validates in the middle of an epoch
        assert digest(tmp_path / "runs" / "1") == digest(tmp_path / "once")
    else:
        assert_same_weights(tmp_path / "runs" / "1", tmp_path / "once")
    assert not (tmp_path / "runs" / "2").exists()
    assert resuming.finished(tmp_path / "runs" / "1")
    assert yaml.safe_load((tmp_path / "runs" / "1" / "config.yaml").read_text())["trainer"]["max_epochs"] == EPOCHS
    assert "learning rate at the restart" not in capsys.readouterr().err
    run(tmp_path / "runs" / "1", *constant, resume="auto")
    assert "is finished; its scores are in" in capsys.readouterr().out


def assert_same_weights(first, second):
    states = [checkpoint.load_plain(folder / "last.ckpt")["state_dict"] for folder in (first, second)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_schedule_over_more_epochs_is_reported_with_the_jump_of_the_learning_rate(tmp_path, capsys):
    run(tmp_path, "trainer.max_epochs=2", "optimizer.lr=0.01")
    capsys.readouterr()
    run(tmp_path, "optimizer.lr=0.01", resume="auto")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("segdeconv: warning: ")]
    # Poly after 2 steps of warm-up: (1 - 3/4) ** 0.9 at step 5 of 6, and (1 - 4/7) ** 0.9 at step 6 of 9.
    assert line == (
        "segdeconv: warning: trainer.max_epochs: the run ends at step 9 instead of 6, and the schedule now covers all "
        "9 steps, so the learning rate at the restart jumps from 0.00287 to 0.00466 - start a new run for an unbroken "
        "schedule"
    )
    assert resuming.finished(tmp_path)


def test_fewer_epochs_than_a_run_has_trained_change_nothing(tmp_path, capsys):
    run(tmp_path, "trainer.max_epochs=2")
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    run(tmp_path, "trainer.max_epochs=1", resume="auto")
    assert "is finished, after no fewer epochs and steps than these, and left as it is; its" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"choose another run folder; to train further with these, set"):
        run(tmp_path, "trainer.max_epochs=2", "optimizer.lr=0.5", resume="auto")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    (tmp_path / "report.json").unlink()
    with pytest.raises(UsageError, match=r"has already trained 6 steps, and trainer\.max_epochs and trainer"):
        run(tmp_path, "trainer.max_epochs=1", resume="auto")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["trainer"]["max_epochs"] == 2


def test_an_error_before_training_leaves_a_finished_run_finished(tmp_path, monkeypatch):
    run(tmp_path, "trainer.max_epochs=1")

    def fail(*arguments, **settings):
        raise UsageError("before")

    with monkeypatch.context() as patch:
        patch.setattr("segdeconv.training.run_folder.require_space", fail)
        with pytest.raises(UsageError, match="before"):
            run(tmp_path, resume="auto")
        assert resuming.finished(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("segdeconv.training.trainer.fit", fail)
        with pytest.raises(UsageError, match="before"):
            run(tmp_path, resume="auto")
    assert not resuming.finished(tmp_path)
    run(tmp_path, resume="auto")
    assert resuming.finished(tmp_path)


def test_resuming_with_another_config_is_refused_and_the_keys_are_named(tmp_path):
    run(tmp_path)
    with pytest.raises(UsageError, match=r"started with other values of optimizer.lr - use those"):
        run(tmp_path, "optimizer.lr=0.5", resume="auto")


def test_a_run_that_failed_before_its_first_step_does_not_block_its_folder(tmp_path):
    with pytest.raises(UsageError, match="fewer than one batch"):
        run(tmp_path, "dataset.batch_size=16")
    run(tmp_path, "trainer.max_epochs=1")
    assert (tmp_path / "best.ckpt").is_file()


def test_a_damaged_last_checkpoint_is_reported_and_the_previous_one_used(tmp_path, capsys):
    run(tmp_path)
    (tmp_path / "last.ckpt").write_bytes(b"cut short")
    assert usable_checkpoint(tmp_path).path == tmp_path / "previous.ckpt"
    assert "skipped: " in capsys.readouterr().out


GOLDEN = Path(__file__).parents[1] / "golden" / "config-before-packages.yaml"


# Since that version.
NEW_KEYS = {
    "auto", "time_budget", "callbacks",
    "trainer.recalibration_batches", "model.encoder_addition", "model.encoder_concatenation", "dataset.train_on_val",
} | {
    f"trainer.{name}"
    for name in (
        "limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches", "fast_dev_run",
        "log_every_n_steps", "enable_progress_bar", "profiler", "plugins", "keep",
    )
}  # fmt: skip


def test_a_run_of_the_previous_version_is_found_and_resumed(tmp_path, uninterrupted):
    """Its config.yaml contains the former name of the TensorBoard logger."""
    text = GOLDEN.read_text()
    assert "_target_: segdeconv.loggers.TensorBoard" in text
    run(tmp_path / "old", "max_time=0s")
    (tmp_path / "old" / "config.yaml").write_text(text)
    run(tmp_path / "new", resume="auto", runs=tmp_path)
    assert not (tmp_path / "new").exists()
    assert digest(tmp_path / "old") == uninterrupted
    after = yaml.safe_load((tmp_path / "old" / "config.yaml").read_text())
    assert after["logger"] == {"_target_": "segdeconv.training.loggers.TensorBoard"}
    before = yaml.safe_load(text)
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed - NEW_KEYS == {"logger", "resume", "dataset", "loss", "trainer", "model"}
    for group in ("dataset", "loss", "trainer", "model"):
        old = {name: value for name, value in after[group].items() if f"{group}.{name}" not in NEW_KEYS}
        assert old == rename_keys(before, GOLDEN)[group]
    train(before, tmp_path / "again", runs=None)  # the old config passed from Python
    assert digest(tmp_path / "again") == uninterrupted


def test_the_former_name_of_a_class_is_not_a_difference():
    old, new = ({"x": {"_target_": f"segdeconv.{place}loggers.TensorBoard"}} for place in ("", "training."))
    assert differing_keys(old, new) == []
    assert differing_keys(old, {"x": {"_target_": "mine.Logger"}}) == ["x._target_"]


def test_a_resumed_run_reads_its_checkpoint_once_and_then_frees_it(tmp_path, monkeypatch):
    run(tmp_path, "max_time=0s")
    last, calls = tmp_path / "last.ckpt", []

    def count_calls(owner, name):
        real = getattr(owner, name)

        def call(path, *arguments, **settings):
            if name == "check_config" or path == last:
                calls.append(name)
            return real(path, *arguments, **settings)

        monkeypatch.setattr(owner, name, call)

    count_calls(checkpoint, "hash_file")
    count_calls(torch, "load")
    count_calls(config_check, "check_config")
    original = Stopping.on_train_batch_end

    def require_freed(self, trainer, *arguments):
        checkpoints = [item for item in gc.get_objects() if type(item) is checkpoint.Checkpoint and item.path == last]
        assert not checkpoints
        original(self, trainer, *arguments)

    monkeypatch.setattr(Stopping, "on_train_batch_end", require_freed)
    run(tmp_path, resume="auto")
    assert calls == ["check_config", "hash_file", "load"]


def test_resume_auto_finds_the_newest_unfinished_run_of_the_same_config(tmp_path):
    config, new = {"seed": 0, "resume": "auto"}, Path("new")
    for name, seed, finished in (("1", 0, False), ("2", 0, False), ("3", 1, False), ("4", 0, True)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "resume": None}))
        (folder / "last.ckpt").touch()
        if finished:
            (folder / "report.json").write_text("{}")
    assert find_run(config, new, tmp_path) == tmp_path / "2"
    assert find_run(config, new, None) == new
    assert find_run({**config, "resume": None}, new, tmp_path) == new
    assert find_run({**config, "seed": 9}, new, tmp_path) == new
    assert find_run({**config, "resume": str(tmp_path / "1" / "last.ckpt")}, new, tmp_path) == tmp_path / "1"
    assert find_run({**config, "resume": str(tmp_path / "2")}, new, tmp_path) == tmp_path / "2"
    os.utime(tmp_path / "3" / "last.ckpt", (9e9, 9e9))
    assert find_run({**config, "resume": str(tmp_path / "latest")}, new, tmp_path) == tmp_path / "3"
    with pytest.raises(UsageError, match=f"{tmp_path} contains 4 runs, newest first: {tmp_path / '3'}, "):
        find_run({**config, "resume": str(tmp_path)}, new, tmp_path)
    with pytest.raises(UsageError, match="is not a run folder - give resume=auto or a folder"):
        find_run({**config, "resume": str(tmp_path / "9")}, new, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step_and_images(tmp_path):
    with pytest.raises(
        DivergedError, match=r"the loss is (nan|inf) at step \d+ with learning rate .* on train_000"
    ) as caught:
        run(tmp_path, "optimizer=sgd", "optimizer.lr=1e25", "trainer.max_epochs=5")
    assert caught.value.exit_code == 3


def test_max_steps_stops_in_the_middle_of_an_epoch_and_still_validates(tmp_path):
    run(tmp_path, "trainer.max_steps=4")
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [int(row.split(",")[0]) for row in rows[1:]] == [3, 4]
    assert (tmp_path / "best.ckpt").is_file()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("trainer.check_val_every_n_epoch=2",), [6, 9]),
        (("trainer.check_val_every_n_epoch=9",), [9]),
        (("trainer.check_val_every_n_epoch=2", "trainer.max_steps=8"), [6, 8]),
        (("trainer.check_val_every_n_epoch=2", "trainer.accumulate_grad_batches=2"), [4, 6]),
        (("trainer.check_val_every_n_epoch=3",), [9]),
    ],
)
def test_the_last_epoch_is_validated(tmp_path, words, expected):
    run(tmp_path, *words)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["val/miou"] not in ("", "nan")] == expected


def test_fewer_images_than_a_batch_give_an_error_message(tmp_path):
    with pytest.raises(UsageError, match="the train split has 13 images, fewer than one batch of 16"):
        run(tmp_path, "dataset.batch_size=16")


def test_fewer_val_images_than_processes_give_an_error_message_before_they_start(tmp_path):
    with pytest.raises(
        UsageError, match=r"val split has 1 images, fewer than the 2 processes .* trainer\.devices=1 or l"
    ):
        run(tmp_path, "dataset.num_val=1", "trainer.accelerator=cpu", "trainer.devices=2")


def test_loop_counters_are_a_function_of_the_step_alone():
    epoch, loops = canonical_loops({"fit_loop": {"epoch_progress": "anything"}}, 7, 5, 2)  # 3 steps an epoch
    assert epoch == 2
    assert loops["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] == 2
    assert loops["fit_loop"]["epoch_progress"]["current"] == {"ready": 3, "started": 3, "processed": 2, "completed": 2}


def test_metrics_after_the_resumed_step_are_removed(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.csv")
    for step in (3, 6, 9):
        metrics.append({"step": step, "val/miou": step / 10})
    with metrics.path.open("a") as file:
        file.write("12")  # an incomplete row, as a kill leaves it
    metrics.cut_back(6)
    assert metrics.path.read_text() == "step,val/miou\n3,0.3\n6,0.6\n"
