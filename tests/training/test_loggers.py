"""The metrics, images and configs that each logger gets, and the independence of training from the logger."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from pytorch_lightning.loggers import Logger
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from segdeconv.checkpoints import checkpoint
from segdeconv.cli.overrides import compose
from segdeconv.data import Shapes
from segdeconv.data.dataset import Sample, SegmentationDataset
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.train import train
from segdeconv.training.callbacks import ImageLogging
from segdeconv.training.config_check import check_config, check_logger
from segdeconv.training.loggers import TensorBoard, build_logger, images_are_due, log_config

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = {
    "dataset": {
        "_target_": "segdeconv.data.Shapes",
        "num_train": 4, "num_val": 2, "size": [32, 32], "batch_size": 2, "num_workers": 0,
    },
    "model": {"_target_": "segdeconv.models.SegNet", "stages": [[4], [8]]},
    "trainer": {"max_epochs": 1, "precision": "32-true", "accelerator": "cpu"},
}  # fmt: skip


class Recording(Logger):
    """A logger that stores its calls."""

    instances: ClassVar[list["Recording"]] = []

    def __init__(self, save_dir, *, colour="blue", **others):
        super().__init__()
        self.folder, self.colour, self.others = save_dir, colour, others
        self.metrics, self.parameters, self.images = [], None, []
        self.instances.append(self)

    name = version = "recording"

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_hyperparams(self, params):
        self.parameters = params

    def log_image(self, key, images, step=None):
        self.images += [(key, step, image) for image in images]


class NotInstalled(Recording):
    def __init__(self, save_dir):
        raise ModuleNotFoundError("Requirement 'curves>=1.2' not met. HINT: Try running `pip install -U 'curves>=1.2'`")


class NotLoggedIn(Recording):
    def log_hyperparams(self, params):
        raise RuntimeError("not logged in.\nUse the login command.")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    run = tmp_path_factory.mktemp("recorded") / "run"
    train({**CONFIG, "logger": {"_target_": "test_loggers.Recording", "colour": "red", "team": "ours"}}, run)
    sys.modules["test_loggers"].Recording.instances[-1].run = run
    return sys.modules["test_loggers"].Recording.instances[-1]


def test_a_logger_gets_scalars_images_and_the_config(recorded):
    assert recorded.folder == str(recorded.run)
    assert (recorded.colour, recorded.others) == ("red", {"team": "ours"})
    (step_of_switches, switches), (step, numbers) = recorded.metrics
    assert step_of_switches == step == 2
    assert set(switches) == {"switches/tie_rate/level 1", "switches/tie_rate/level 2"}
    assert {"train/loss", "val/miou", "val/iou/disc", "lr"} <= set(numbers)
    names = [name for name, _, _ in recorded.images]
    assert {"confusion", "switches"} <= set(names)
    assert "image, truth, prediction, error/val_00001" in names
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for _, _, image in recorded.images)
    assert recorded.parameters["model"]["stages"] == [[4], [8]]
    assert recorded.parameters["run"] == str(recorded.run)
    assert not {"logger", "resume"} & set(recorded.parameters)


def test_keys_that_may_change_on_resume_are_not_logged_as_parameters(recorded):
    """MLflow refuses to change a parameter, and a run may be resumed with more workers."""
    assert not {"num_workers", "cache", "timeout"} & set(recorded.parameters["dataset"])
    assert "activation_checkpointing" not in recorded.parameters["trainer"]
    assert {"batch_size", "size"} <= set(recorded.parameters["dataset"])


@pytest.mark.parametrize("name", ["segdeconv.loggers.TensorBoard", "segdeconv.training.loggers.TensorBoard"])
def test_the_former_name_of_the_logger_is_converted(tmp_path, name):
    node = compose([f"logger._target_={name}"], CONFIGS)[0]["logger"]
    assert node["_target_"] == name
    checked = check_logger(node)
    assert checked == {"_target_": "segdeconv.training.loggers.TensorBoard"}
    assert type(build_logger(node, tmp_path)) is type(build_logger(checked, tmp_path)) is TensorBoard


@pytest.mark.slow
def test_no_environment_variable_is_set_before_a_logger_is_built():
    probe = (
        "import os; before = dict(os.environ); import segdeconv.training.loggers as loggers;"
        "print([n for n in os.environ if n.startswith(('MLFLOW', 'WANDB')) and n not in before]);"
        "loggers.build_logger({'_target_': 'segdeconv.training.loggers.TensorBoard'}, __import__('pathlib').Path('.'));"
        "print(os.environ['MLFLOW_DISABLE_TELEMETRY'], os.environ['WANDB_ERROR_REPORTING'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "WANDB"))}
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment)
    assert done.stdout.split("\n")[:2] == ["[]", "true false"], done.stderr


def test_only_the_chosen_logger_writes_files(recorded):
    assert not list(recorded.run.glob("events.*"))


def test_a_checkpoint_does_not_contain_the_logger(recorded):
    source = checkpoint.read(recorded.run / "best.ckpt")  # without --trust
    assert "logger" not in source.config
    assert checkpoint.foreign(source.content["hyper_parameters"]) == []


def test_a_run_can_be_resumed_with_another_logger(recorded, capsys):
    report = recorded.run / "report.json"
    before = json.loads(report.read_text())
    assert ">None<" not in (recorded.run / "report.html").read_text()  # there is no command line
    report.unlink()  # as if the run had been interrupted
    train({**CONFIG, "logger": {}, "resume": "auto", "trainer": {**CONFIG["trainer"]}}, recorded.run)
    assert "resumed from last.ckpt" in capsys.readouterr().out
    assert json.loads(report.read_text())["miou"] == before["miou"]


@pytest.mark.parametrize(("choice", "events"), [("none", 0), ("tensorboard", 1)])
def test_a_run_contains_event_files_only_if_tensorboard_is_chosen(tmp_path, choice, events, capsys):
    config, _ = compose([f"logger={choice}"], CONFIGS)
    train({**CONFIG, "logger": config["logger"]}, tmp_path / "run")
    assert len(list((tmp_path / "run").glob("events.*"))) == events
    assert not list((tmp_path / "run").glob("hparams.yaml"))
    assert ("tensorboard --logdir" in capsys.readouterr().out) == bool(events)


class Noise(SegmentationDataset):
    """Noise, which PNG cannot compress."""

    split, names, classes, fingerprint = "val", ["a", "b", "c", "d", "e"], Shapes.classes, "noise"

    def __getitem__(self, index):
        generator = np.random.default_rng(index)
        noise = generator.integers(0, 256, (800, 1000, 3), dtype=np.uint8)
        return Sample(noise, generator.integers(0, 7, (800, 1000), dtype=np.uint8), self.names[index])


def trainer_of(loggers, epochs, every):
    return SimpleNamespace(
        is_global_zero=True, world_size=1, loggers=loggers, should_stop=False, current_epoch=0,
        max_epochs=epochs, check_val_every_n_epoch=every,
    )  # fmt: skip


@pytest.mark.parametrize(("epochs", "every", "logged"), [(11, 1, [1, 2, 3, 4, 6, 8, 11]), (30, 5, [5, 10, 15, 20, 30])])
def test_tensorboard_files_stay_small_in_a_run_of_many_validations(tmp_path, epochs, every, logged):
    logger = TensorBoard(str(tmp_path))
    dataset = Noise()
    callback = ImageLogging(dataset, count=2)
    trainer = trainer_of([logger], epochs, every)
    predictions = [dataset[index].mask for index in range(len(dataset))]
    for epoch in range(every, epochs + 1, every):
        trainer.current_epoch = epoch - 1
        trainer.global_step = epoch
        callback.on_validation_start(trainer, None)
        for prediction in predictions:
            callback.on_validation_batch_end(trainer, None, {"predictions": [prediction]}, None, 0)
    logger.experiment.close()
    (file,) = tmp_path.glob("events.*")
    images = [
        (event.step, value.tensor.string_val)
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    ]
    assert sorted(step for step, _ in images) == sorted(2 * logged)
    assert {(int(width), int(height)) for _, (width, height, *_) in images} == {(4 * 256 + 3 * draw.GAP, 205)}
    assert file.stat().st_size < len(images) * 700_000


def test_a_run_of_a_thousand_validations_logs_images_at_twenty():
    trainer, due = trainer_of([], 1000, 1), 0
    for trainer.current_epoch in range(1000):
        due += images_are_due(trainer)
    assert due == 20  # 1 to 512: ten powers of two; 3 to 768: nine; and the last


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "test_loggers.NotInstalled"}, "needs the package curves - pip install curves"),
        (
            {"_target_": "test_loggers.NotLoggedIn"},
            "logger=NotLoggedIn cannot start: not logged in. - fix this or choose",
        ),
        ({"_target_": "test_loggers.NotInstalled", "x": 1}, "unknown key logger.x"),
        ({"_target_": "test_loggers.Recording", "save_dir": "/"}, "unknown key logger.save_dir"),
        ({"project": "mine"}, "logger._target_ is None - use the dotted name of a class"),
    ],
)
def test_an_unusable_logger_gives_an_error_message(tmp_path, node, message):
    with pytest.raises(UsageError) as caught:
        log_config(build_logger(check_logger(node), tmp_path), {}, tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("library", ["wandb", "mlflow"])
def test_a_missing_library_is_named_with_its_pip_command(tmp_path, library):
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed")
    config = check_config(compose([f"logger={library}"], CONFIGS)[0])
    with pytest.raises(UsageError, match=f"needs the package {library} - pip install {library}"):
        build_logger(config["logger"], tmp_path)


def test_wandb_and_mlflow_are_not_imported_unless_they_are_chosen():
    probe = "import sys, segdeconv.train; print([name for name in ('wandb', 'mlflow') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.slow
def test_wandb_writes_an_offline_run_into_the_run_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train({**CONFIG, "logger": compose(["logger=wandb"], CONFIGS)[0]["logger"]}, tmp_path / "run")
    assert len(list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))) == 1
    images = {path.name.split("_")[0] for path in tmp_path.glob("run/wandb/offline-run-*/files/media/**/*.png")}
    assert images == {"confusion", "val"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # from dependencies of MLflow
def test_mlflow_stores_scalars_parameters_and_images(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    train({**CONFIG, "logger": compose(["logger=mlflow"], CONFIGS)[0]["logger"]}, "run")
    database = sqlite3.connect(tmp_path / "mlflow.db")
    assert database.execute("select count(*) from metrics where key = 'val/miou'").fetchone() == (1,)
    assert database.execute("select value from params where key = 'model/stages'").fetchone() == ("[[4], [8]]",)
    database.close()
    assert list(tmp_path.glob("mlruns/**/configuration.yaml"))
    assert list(tmp_path.glob("mlruns/**/confusion*.png"))
