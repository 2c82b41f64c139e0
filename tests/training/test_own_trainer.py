"""SegmentationTask in a Trainer of the user: fit, validate, test, predict, checkpoints, and messages about data."""

import csv
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from fakes import Uneven
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.loggers import CSVLogger
from tiny_runs import config, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import segdeconv
from segdeconv.checkpoints import checkpoint
from segdeconv.errors import CheckpointError, SegdeconvError, UsageError
from segdeconv.losses import Dice, build_loss, check_loss
from segdeconv.models import SegNet
from segdeconv.optimization import Constant, Poly
from segdeconv.train import train
from segdeconv.training.checkpointing import VerifiedCheckpoints
from segdeconv.training.config_check import check_config
from segdeconv.training.data_module import DataModule
from segdeconv.training.prepare import prepare
from segdeconv.training.task import SegmentationTask

# Lightning advises on workers, loggers and devices that these tests choose on purpose.
pytestmark = pytest.mark.filterwarnings("ignore")
MODEL = {"_target_": "segdeconv.models.SegNet", "stages": [[4], [8]]}
CE = "segdeconv.losses.CrossEntropy"
NAMES = Uneven.classes.names
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


def trainer(folder, **settings):
    defaults = {**QUIET, "default_root_dir": folder, "max_epochs": 1, "enable_checkpointing": False}
    return pl.Trainer(**{**defaults, **settings})


def tensors(split, count=8):
    """Return images as stored, (N, 3, 32, 32) uint8, and masks, (N, 32, 32)."""
    data = Uneven(split)
    samples = [data[index] for index in range(count)]
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)
    return images, torch.from_numpy(np.stack([sample.mask for sample in samples]))


def loader(split="train", count=8):
    return DataLoader(TensorDataset(*tensors(split, count)), batch_size=4)


def task(**changes):
    return SegmentationTask.from_config({"model": MODEL, **changes}, NAMES)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "run"
    train(config(trainer__max_epochs=2), folder)
    return folder


@pytest.mark.parametrize("objects", [False, True])
def test_a_fit_on_plain_loaders_equals_a_plain_loop(tmp_path, objects):
    """The loop averages the loss over the pixels of each batch, of which the images have different numbers."""
    torch.manual_seed(0)
    model, expected = SegNet(3, stages=((4,), (8,))), SegNet(3, stages=((4,), (8,)))
    if objects:
        fitted = SegmentationTask(
            model, nn.CrossEntropyLoss(ignore_index=255), torch.optim.SGD(model.parameters(), 0.1), Constant(), NAMES
        )
    else:
        sgd = {"_target_": "segdeconv.optimization.sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
        fitted = task(optimizer=sgd, schedule={"_target_": "segdeconv.optimization.Constant"})
    expected.load_state_dict(fitted.model.state_dict())
    mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
    std = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    images, masks = tensors("train")
    images = (images - mean) / std
    data = DataLoader(TensorDataset(images, masks), batch_size=4)
    trainer(tmp_path, max_epochs=2).fit(fitted, data if objects else loader())
    optimizer = torch.optim.SGD(expected.parameters(), 0.1)
    for _ in range(2):
        for first in (0, 4):
            logits = expected(images[first : first + 4])
            optimizer.zero_grad()
            F.cross_entropy(logits, masks[first : first + 4].long(), ignore_index=255).backward()
            optimizer.step()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(fitted.model.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_a_fit_with_our_data_module_equals_a_run_to_the_bit(run, tmp_path):
    checked = check_config(config(trainer__max_epochs=2))
    prepared = prepare(checked)
    fitted = SegmentationTask(
        prepared.model, prepared.loss, prepared.optimizer, Constant(), prepared.classes, total_steps=12
    )
    own = trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0, use_distributed_sampler=False)
    own.fit(fitted, datamodule=DataModule(prepared.data))
    expected = state(run)
    assert all(torch.equal(value, expected[name]) for name, value in fitted.state_dict().items())
    with (run / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    names = [name for name in last if "/" in name]
    assert {name: float(own.callback_metrics[name]) for name in names} == {name: float(last[name]) for name in names}


def test_a_checkpoint_of_a_run_validates_tests_and_predicts_with_the_scores_of_the_run(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"names fakes\.Uneven, which is not part of segdeconv"):
        SegmentationTask.load_from_checkpoint(run / "last.ckpt")
    loaded = SegmentationTask.load_from_checkpoint(run / "last.ckpt", trust=["fakes.Uneven"])
    with (run / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    own, data = trainer(tmp_path), loader("val", 7)
    (validated,), (tested,) = own.validate(loaded, data), own.test(loaded, data)
    for name in ("loss", "miou", "iou/dark", "pixel_accuracy"):
        assert validated[f"val/{name}"] == tested[f"test/{name}"] == pytest.approx(float(last[f"val/{name}"]), abs=1e-6)
    predictions = torch.cat(own.predict(loaded, DataLoader(tensors("val", 7)[0], batch_size=3)))
    loaded.eval()
    with torch.no_grad():
        logits = loaded(loaded.preprocessing.normalised(tensors("val", 7)[0]))
    assert predictions.dtype == torch.uint8
    assert predictions.shape == (7, 32, 32)
    assert (predictions == logits.argmax(dim=1)).float().mean() > 0.999  # folded norms round differently


def test_an_average_of_the_weights_is_restored_beside_them(tmp_path):
    train(config(trainer__max_epochs=1, trainer__ema=0.9), tmp_path / "run")
    loaded = SegmentationTask.load_from_checkpoint(tmp_path / "run", trust={"fakes.Uneven"})
    expected = state(tmp_path / "run", "best")
    assert {name.partition(".")[0] for name in expected} == {"model", "averaged"}
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_the_shipped_network_is_a_task():
    loaded = SegmentationTask.load_from_checkpoint("camvid-small", map_location="cpu")
    assert len(loaded.classes) == 11
    assert loaded(torch.zeros(1, 3, 64, 96)).shape == (1, 11, 64, 96)


def test_checkpoints_of_an_own_trainer_are_those_of_segdeconv(tmp_path):
    best = ModelCheckpoint(tmp_path / "kept", monitor="val/miou", mode="max")
    stop = EarlyStopping("val/miou", mode="max")
    writing = {"enable_checkpointing": True, "logger": CSVLogger(tmp_path), "plugins": [VerifiedCheckpoints()]}
    own = trainer(tmp_path, callbacks=[best, stop], **writing)
    own.fit(task(trainer={"ema": 0.5}), loader(), loader("val", 7))
    assert float(best.best_model_score) == float(own.callback_metrics["val/miou"])
    own.logger.save()
    assert "val/iou/dark" in Path(own.logger.log_dir, "metrics.csv").read_text()
    assert Path(f"{best.best_model_path}.sha256").is_file()
    loaded = SegmentationTask.load_from_checkpoint(best.best_model_path)
    (scores,) = trainer(tmp_path).validate(loaded, loader("val", 7))
    assert scores["val/miou"] == pytest.approx(float(best.best_model_score), abs=1e-9)
    segmenter = segdeconv.load(best.best_model_path)
    prediction = np.asarray(segmenter.predict(Uneven("val")[0].image).mask)
    assert prediction.shape == (32, 32)


@pytest.mark.parametrize("own_checkpoint", [True, False])
def test_a_task_takes_names_classes_and_networks_of_other_libraries(tmp_path, own_checkpoint):
    model = "segnet_basic" if own_checkpoint else nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
    fitted = SegmentationTask.from_config({"model": model, "loss": Dice, "optimizer": "sgd"}, NAMES)
    own = trainer(tmp_path)
    own.fit(fitted, loader())
    own.save_checkpoint(tmp_path / "own.ckpt")
    if own_checkpoint:
        loaded = SegmentationTask.load_from_checkpoint(tmp_path / "own.ckpt")
        assert all(torch.equal(value, fitted.state_dict()[name]) for name, value in loaded.state_dict().items())
    else:
        with pytest.raises(SegdeconvError, match=r"was trained from a network object \(torch.*\), which it does"):
            SegmentationTask.load_from_checkpoint(tmp_path / "own.ckpt")


def test_a_loss_and_an_optimizer_that_were_objects_are_replaced_with_a_warning(tmp_path, capsys):
    model = SegNet(3, stages=((4,), (8,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fitted = SegmentationTask.from_config(
        {"model": model, "loss": nn.CrossEntropyLoss(), "optimizer": optimizer}, NAMES
    )
    own = trainer(tmp_path)
    own.fit(fitted, loader())
    assert not torch.equal(fitted.model.decoder.classifier.weight, model.decoder.classifier.weight)  # a copy is trained
    own.save_checkpoint(tmp_path / "own.ckpt")
    loaded = SegmentationTask.load_from_checkpoint(tmp_path / "own.ckpt")
    assert all(torch.equal(value, fitted.state_dict()[name]) for name, value in loaded.state_dict().items())
    text = capsys.readouterr().err
    for group in ("loss", "optimizer"):
        assert f"own.ckpt has no {group}, which was an object of a program; the task has the default one" in text


@pytest.mark.parametrize("objects", [False, True])
def test_an_own_trainer_resumes_from_its_checkpoint(tmp_path, objects):
    def fresh():
        if not objects:
            return SegmentationTask.from_config({"model": MODEL, "seed": 3}, NAMES, total_steps=8)
        torch.manual_seed(0)
        model, loss = SegNet(3, stages=((4,), (8,))), nn.CrossEntropyLoss(ignore_index=255)
        return SegmentationTask(model, loss, torch.optim.Adam(model.parameters()), Constant(), NAMES, total_steps=8)

    images, masks = tensors("train")
    data = DataLoader(TensorDataset(images.float() / 255, masks), batch_size=4)
    whole, first, second = fresh(), fresh(), fresh()
    trainer(tmp_path, max_epochs=4).fit(whole, data, data)
    own = trainer(tmp_path, max_epochs=2)
    own.fit(first, data, data)
    own.save_checkpoint(tmp_path / "own.ckpt")
    trainer(tmp_path, max_epochs=4).fit(second, data, data, ckpt_path=tmp_path / "own.ckpt")
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in second.state_dict().items())


@pytest.mark.parametrize("schedule", [{"every_n_train_steps": 8}, {"every_n_epochs": 1}])
def test_our_data_module_resumes_in_an_own_trainer_to_the_same_bits(tmp_path, schedule):
    def fit(epochs, **settings):
        prepared = prepare(check_config(config()))
        fitted = SegmentationTask(
            prepared.model, prepared.loss, prepared.optimizer, Poly(), prepared.classes, total_steps=18
        )
        own = trainer(tmp_path, max_epochs=epochs, num_sanity_val_steps=0, callbacks=settings.pop("callbacks", []),
                      enable_checkpointing="ckpt_path" not in settings)  # fmt: skip
        own.fit(fitted, datamodule=DataModule(prepared.data), **settings)
        return fitted.state_dict(), {name: float(value) for name, value in own.callback_metrics.items()}

    expected, metrics = fit(3, callbacks=[ModelCheckpoint(tmp_path / "kept", save_top_k=-1, **schedule)])
    path = min((tmp_path / "kept").glob("*.ckpt"))  # in the middle or at the end of an epoch
    resumed, resumed_metrics = fit(3, ckpt_path=path)
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())
    assert resumed_metrics == metrics


# Messages


class WithoutDimension(nn.Module):
    """A third party's network."""

    def forward(self, image):
        return {"out": image}


IMAGE, MASK = torch.zeros(4, 3, 32, 32), torch.zeros(4, 32, 32, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((IMAGE,), "a batch (tuple) has no mask - SegmentationTask takes batches (image, mask)"),
        ({"image": IMAGE, "label": MASK}, "a batch (dict) has no mask - SegmentationTask takes"),
        ("image.png", "a batch is a str - SegmentationTask takes"),
        ((IMAGE.numpy(), MASK), "the images of a batch are a ndarray - SegmentationTask takes"),
        ((IMAGE[:, 0], MASK), "the images of a batch are a tensor of shape (4, 32, 32) and torch.float32 - "),
        ((IMAGE.permute(0, 2, 3, 1), MASK), "takes 3 channels: the channels are the second dimension"),
        ((IMAGE[:, :1], MASK), "have shape (4, 1, 32, 32), but the network takes 3 channels"),
        ((IMAGE.to(torch.int64), MASK), "have dtype torch.int64 - return normalised float32 or uint8"),
        ((IMAGE, MASK[:, None]), "a mask of shape (4, 1, 32, 32) belongs to images of (4, 3, 32, 32) - remove its"),
        ((IMAGE, MASK[:, :16]), "a mask of shape (4, 16, 32) belongs to images of (4, 3, 32, 32) - SegmentationTask"),
        ((IMAGE, MASK.float()), "a mask has dtype torch.float32, not an integer type"),
        ((IMAGE, MASK + 3), "a mask has label 3, but there are classes 0..2 and the ignored label 255"),
        ((IMAGE, MASK - 1), "a mask has label -1, but there are classes 0..2"),
    ],
)
@pytest.mark.parametrize("method", ["fit", "validate"])
def test_a_batch_of_another_form_is_one_line(tmp_path, batch, message, method):
    with pytest.raises(UsageError) as caught:
        getattr(trainer(tmp_path), method)(task(), DataLoader(range(4), batch_size=4, collate_fn=lambda _: batch))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("precision", "dtype", "loss"), [
    ("bf16-true", torch.uint8, CE),
    ("16-true", torch.uint8, CE),
    ("64-true", torch.uint8, CE),
    ("bf16-true", torch.uint8, "torch.nn.CrossEntropyLoss"),
    ("32-true", torch.float64, CE),
    ("32-true", torch.float16, CE),
])  # fmt: skip
def test_images_have_the_type_of_the_network(tmp_path, precision, dtype, loss):
    images, masks = tensors("train", 4)
    images = images if dtype == torch.uint8 else (images / 255).to(dtype)
    data = DataLoader(TensorDataset(images, masks), batch_size=4)
    own = task()
    own.loss = build_loss(check_loss({"_target_": loss}), class_weights=[1.0] * len(NAMES), ignore_index=255)
    fit = trainer(tmp_path, precision=precision, max_steps=1)
    fit.fit(own, data, data)
    loss_value = fit.validate(own, data, verbose=False)[0]["val/loss"]
    assert math.isfinite(loss_value) or precision == "16-true"  # float16 overflows
    assert fit.predict(own, data)[0].shape == masks.shape


def test_a_data_set_in_place_of_a_loader_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"the images of a batch are a ndarray - SegmentationTask takes batches"):
        trainer(tmp_path).fit(task(), Uneven("train"))


def build(**changes):
    model = SegNet(3, stages=((4,),))
    given = {
        "model": model, "loss": nn.CrossEntropyLoss(), "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "schedule": Constant(), "classes": NAMES, **changes,
    }  # fmt: skip
    return SegmentationTask(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": WithoutDimension()},
            "model is a WithoutDimension, not a segdeconv.models.SegmentationModel - give",
        ),
        ({"optimizer": torch.optim.SGD}, "optimizer is a type - give an optimizer of model.parameters()"),
        ({"classes": ["one", "two"]}, "2 classes are given, but the network has 3"),
    ],
)
def test_objects_that_do_not_fit_are_one_line(changes, message):
    with pytest.raises(UsageError) as caught:
        build(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dataset": {}}, "unknown key dataset of a task - "),
        ({"optimiser": {}}, "unknown key optimiser of a task - did you mean 'optimizer'?"),
        ({"model": {**MODEL, "widht": 1}}, "unknown key model.widht - did you mean 'width'?"),
    ],
)
def test_a_mistake_in_the_config_of_a_task_is_one_line(config, message):
    with pytest.raises(UsageError) as caught:
        SegmentationTask.from_config({"model": MODEL, **config}, NAMES)
    assert message in str(caught.value)


def test_callbacks_that_do_not_fit_are_refused_in_an_own_trainer_too(tmp_path):
    with pytest.raises(UsageError, match=r"StochasticWeightAveraging does not work with SegmentationTask: .*ema"):
        trainer(tmp_path, callbacks=[StochasticWeightAveraging(0.1)]).fit(task(), loader())


def test_a_score_whose_lowest_value_counts_as_best_gives_a_warning(tmp_path, capsys):
    trainer(tmp_path, callbacks=[EarlyStopping("val/miou")], limit_train_batches=1).fit(task(), loader(), loader())
    assert "EarlyStopping takes the lowest val/miou for the best, since its mode is min" in capsys.readouterr().err


class Attack:
    def __reduce__(self):
        return (Path.touch, (Path("attacked"),))


@pytest.mark.parametrize("kind", ["attack", "module", "state", "lightning", "text", "config"])
def test_a_file_that_is_not_ours_is_refused_and_runs_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    content = {
        "attack": Attack(),
        "module": SegNet(3, stages=((4,),)),
        "state": SegNet(3, stages=((4,),)).state_dict(),
        "lightning": {"state_dict": {}, "hyper_parameters": {"_instantiator": "os.system"}, "epoch": 1},
        "text": "text",
    }
    if kind == "config":  # a valid file whose optimizer has been edited
        own = trainer(tmp_path)
        own.fit(task(), loader())
        own.save_checkpoint("own.ckpt")
        edited = torch.load("own.ckpt", weights_only=True)
        edited["hyper_parameters"]["config"]["optimizer"]["lr"] = "fast"
        content["config"] = edited
    torch.save(content[kind], "file.ckpt")
    with pytest.raises(CheckpointError) as caught:
        SegmentationTask.load_from_checkpoint("file.ckpt")
    assert "\n" not in str(caught.value)
    assert not Path("attacked").exists()


def test_arguments_of_lightnings_loader_that_do_not_apply_are_named():
    with pytest.raises(UsageError, match=r"load_from_checkpoint takes no strict, weights_only: the checkpoint"):
        SegmentationTask.load_from_checkpoint("camvid-small", strict=False, weights_only=False)


def test_a_checkpoint_of_another_program_does_not_resume(tmp_path):
    torch.save(
        {"state_dict": {}, "pytorch-lightning_version": "2.0", "epoch": 0, "global_step": 0}, tmp_path / "x.ckpt"
    )
    with pytest.raises(CheckpointError, match="was not written by a SegmentationTask"):
        trainer(tmp_path).validate(task(), loader(), ckpt_path=tmp_path / "x.ckpt")


def test_the_script_of_the_page_runs_as_written(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "lightning.md").read_text()
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "__main__"}
    torch.manual_seed(0)
    exec(compile(script, "script.py", "exec"), space)
    (score,) = re.findall(r"^0\.\d+$", capsys.readouterr().out, re.MULTILINE)
    assert float(score) > 0.6
    assert [batch.shape for batch in space["masks"]] == 4 * [(8, 48, 48)]
    (file,) = tmp_path.rglob("*.ckpt")
    assert checkpoint.read(file).classes.names == ("background", "disc")  # without trust
    shutil.rmtree(tmp_path / "lightning_logs")
    assert list(tmp_path.iterdir()) == []
