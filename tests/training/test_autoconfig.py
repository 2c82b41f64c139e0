"""Choice of settings from the data: what is measured, what is left alone, and that choices are an ordinary config."""

import cv2
import numpy as np
import pytest
import yaml
from tiny_runs import state

from segdeconv.cli.overrides import hydra_overrides, keys_set
from segdeconv.cli.own_code import compose
from segdeconv.data.datasets.folder import Folder
from segdeconv.data.inspection import inspect
from segdeconv.errors import UsageError
from segdeconv.models import SegNet, UNet
from segdeconv.system import CONFIGS
from segdeconv.train import train
from segdeconv.training import autoconfig
from segdeconv.training.autoconfig import KEYS, Measured, measure, unset_keys
from segdeconv.training.config_check import check_config
from segdeconv.training.memory import Memory
from segdeconv.training.prepare import prepare
from segdeconv.training.resume import read_config


def write_folder(folder, masks):
    for number, mask in enumerate(masks):
        image = np.random.default_rng(number).integers(0, 100, mask.shape) + 100 * (mask > 0)
        for kind, pixels in (("images", image), ("masks", mask)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / kind / f"{number}.png"), pixels.astype(np.uint8))
    return folder


def line(width, side=96, row=40):
    mask = np.zeros((side, side), np.uint8)
    mask[row : row + width] = 255
    return mask


def disc(radius, side=96):
    rows, columns = np.mgrid[:side, :side] - side // 2
    return np.where(rows**2 + columns**2 <= radius**2, 255, 0).astype(np.uint8)


def measured(folder, masks):
    dataset = Folder("train", root=str(write_folder(folder, masks)))
    return measure(dataset, inspect(dataset, use_cache=False))


@pytest.mark.parametrize("width", [1, 3, 10])
def test_the_thickness_of_a_line_is_its_width(tmp_path, width):
    found = measured(tmp_path, [line(width)] * 10)
    assert found.thickness[1] == pytest.approx(width, rel=0.01)
    assert found.shares[1] == pytest.approx(width / 96)


def test_the_thickness_of_a_disc_is_about_its_radius(tmp_path):
    # The boundary is counted along rows and columns, so that of a disc is 8 r instead of 2 pi r.
    assert measured(tmp_path, [disc(30)] * 10).thickness[1] == pytest.approx(30 * 2 * np.pi / 8, rel=0.05)


@pytest.mark.parametrize(
    ("mask", "upright"),
    [(line(30, row=60), True), (line(30, row=0), True), (line(30, row=60).T, False), (disc(20), False)],
    ids=["ground", "sky", "left and right", "centre"],
)
def test_images_are_upright_if_a_class_lies_high_or_low(tmp_path, mask, upright):
    assert measured(tmp_path, [mask] * 10).upright is upright


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ([], set()),
        (["model.width=0.5", "augment=flip"], {"model.width", "augment"}),
        (["augment.flip.p=0.2"], {"augment"}),
        (["~augment.flip"], {"augment"}),
        (["optimizer.lr=0.1"], {"optimizer"}),
        (["model=unet", "loss=dice"], set()),
        (["model.stages=[[4],[8]]"], {"model.width"}),
        (["trainer.max_steps=10"], {"trainer.max_epochs"}),
        (
            ["experiment=segnet_camvid_small"],
            {"dataset.size", "dataset.crop", "dataset.batch_size", "augment", "loss.class_weighting", "optimizer"}
            | {"loss.class_weighting_power", "schedule", "trainer.gradient_clip_val"}
            | {"trainer.max_epochs", "trainer.check_val_every_n_epoch"},
        ),
    ],
)
def test_what_the_command_line_or_an_experiment_sets_is_not_chosen(words, left):
    typed = hydra_overrides(["dataset=folder", "dataset.root=x", *words], CONFIGS)
    assert set(KEYS) - set(unset_keys(keys_set(typed, CONFIGS))) == left


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of twelve images, and a config whose settings are all to be chosen in a moment of time."""
    monkeypatch.setattr(autoconfig, "MIN_STEPS", 6)
    monkeypatch.setattr(autoconfig, "WIDTHS", (0.0625,))
    write_folder(tmp_path / "mine", [line(4, side=40, row=3 * row) for row in range(12)])
    words = ["dataset=folder", f"dataset.root={tmp_path / 'mine'}", "dataset.num_workers=0", "logger=none"]
    words += ["trainer.precision=32-true", "time_budget=1s"]
    return words, check_config({**compose(words)[0], "auto": list(KEYS)})


def test_the_printed_words_give_the_same_config(own, capsys):
    words, config = own
    assert tuple(config["dataset"]["size"]) == (256, 256)  # to which images of 40x40 would be enlarged
    chosen = prepare(config).config
    assert chosen["dataset"]["size"] is None
    output = capsys.readouterr()
    assert "resized" not in output.err
    printed = output.out.partition("chosen for")[2].partition("\n\n")[0].splitlines()[1:]
    typed = [word for row in printed for word in row.split("  ")[1].split()]
    assert {word.partition("=")[0].partition(".")[0] for word in typed} >= {"dataset", "model", "optimizer", "trainer"}
    again = check_config(compose([*words, *typed])[0])
    assert {key: value for key, value in again.items() if key != "auto"} == {
        key: value for key, value in chosen.items() if key != "auto"
    }


def test_a_resumed_run_has_the_choices_of_its_beginning(tmp_path, own, monkeypatch, capsys):
    _, config = own
    train({**config, "max_time": "0s"}, tmp_path / "cut")
    begun = read_config(tmp_path / "cut")
    assert begun["trainer"]["max_epochs"] > 1
    assert "trainer.max_epochs" in begun["auto"]
    train({**begun, "auto": [], "max_time": None}, tmp_path / "once")  # the chosen values as keys
    monkeypatch.setattr(autoconfig, "choose", None)  # a resumed run measures nothing
    train({**config, "resume": "auto"}, tmp_path / "cut")
    once, resumed = state(tmp_path / "once"), state(tmp_path / "cut")
    assert all((once[name] == resumed[name]).all() for name in once)
    assert yaml.safe_load((tmp_path / "cut" / "config.yaml").read_text())["model"]["width"] == 0.0625
    typed = {"auto": [key for key in KEYS if key != "model.width"], "model": {**config["model"], "width": 0.5}}
    (tmp_path / "cut" / "report.json").unlink()
    with pytest.raises(UsageError, match=r"was started with other values of model\.width"):
        train({**config, **typed, "resume": "auto"}, tmp_path / "cut")


def test_processes_that_start_together_measure_no_times(own, monkeypatch):
    monkeypatch.setattr(autoconfig, "launched_from_outside", lambda: True)
    monkeypatch.setattr(autoconfig, "step_seconds", None)
    _, config = own
    assert prepare(config).config["trainer"]["max_epochs"] == autoconfig.UNMEASURED_STEPS // 2


@pytest.mark.parametrize(("start", "added"), [(None, True), ("camvid-small", True), ("camvid-small-286e5fc", False)])
def test_a_network_that_starts_from_weights_adds_what_they_were_trained_with(own, monkeypatch, start, added):
    monkeypatch.setattr(autoconfig, "launched_from_outside", lambda: True)
    _, config = own
    assert prepare({**config, "init_from": start}).config["model"]["encoder_addition"] is added


def test_a_network_that_starts_from_weights_concatenates_what_they_were_trained_with(own, monkeypatch, tmp_path):
    monkeypatch.setattr(autoconfig, "launched_from_outside", lambda: True)
    _, config = own
    start = SegNet(2, stages=((4,), (8,)), encoder_concatenation=True)
    start.save_pretrained(tmp_path / "start", classes=["a", "b"])
    chosen = prepare({**config, "init_from": str(tmp_path / "start")}).config["model"]
    assert (chosen["encoder_addition"], chosen["encoder_concatenation"]) == (False, True)


def test_weights_of_another_kind_of_network_do_not_choose_the_addition(own, monkeypatch, tmp_path):
    monkeypatch.setattr(autoconfig, "launched_from_outside", lambda: True)
    _, config = own
    UNet(2, width=0.0625).save_pretrained(tmp_path / "unet", classes=["a", "b"])
    assert prepare({**config, "init_from": str(tmp_path / "unet")}).config["model"]["encoder_addition"] is True


@pytest.mark.parametrize(
    ("thickness", "equal_sizes", "size"),
    [((90.0, 60.0), True, [500, 1000]), ((90.0, 3.0), True, None), ((90.0, 60.0), False, None)],
    ids=["thick", "thin", "of several sizes"],
)
def test_only_large_images_of_thick_structures_are_reduced_and_in_proportion(thickness, equal_sizes, size):
    draft = autoconfig._Draft({"auto": list(KEYS), "dataset": {"size": [256, 256]}}, {})
    large = Measured(10, (1500, 3000), equal_sizes, (0.5, 0.5), thickness, upright=False)
    autoconfig._choose_input(draft, large, 160 * 160, 32)
    assert draft.config["dataset"]["size"] == size


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model=deconvnet", "model.width=0.0625", "model.fc_width=8", "model.depth=11"], {"crop": (224, 224)}),
        (["dataset.channels=1"], {"augment": {"flip", "turn"}}),
        (["dataset.size=[40,40]"], {"crop": None}),
    ],
    ids=["least input", "grey as stored", "a typed size"],
)
def test_choices_fit_the_network_and_the_images(own, words, expected):
    base, _ = own
    typed = hydra_overrides([*base, *words], CONFIGS)
    config = check_config({**compose([*base, *words])[0], "auto": unset_keys(keys_set(typed, CONFIGS))})
    chosen = prepare(config).config
    crop = chosen["dataset"]["crop"]
    assert {"crop": crop and tuple(crop), "augment": set(chosen["augment"])}.items() >= expected.items()


def test_where_memory_is_short_crops_are_smaller(own, monkeypatch):
    _, config = own
    sizes = []

    def estimate(model, loss, optimizer, size, **_):
        sizes.append(tuple(size))
        return Memory(weights=0, batch=5 * size[0] * size[1], batch_size=5)

    monkeypatch.setattr(autoconfig, "estimate", estimate)
    monkeypatch.setattr(autoconfig, "available", lambda device: 5 * 40 * 40 / 0.7)  # five images of the batch
    monkeypatch.setattr(autoconfig, "LEAST_AREA", 32 * 32)
    chosen = prepare(config).config
    assert tuple(chosen["dataset"]["crop"]) == (32, 32)
    assert sizes[0] == (64, 64)


def test_an_unknown_key_is_refused(own):
    _, config = own
    with pytest.raises(UsageError, match=r"auto: model.widht cannot be chosen from the data - did you mean"):
        check_config({**config, "auto": ["model.widht"]})


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"time_budget": "5m"}, True),
        ({"time_budget": "5m", "auto": ["dataset.batch_size"]}, True),
        ({"time_budget": "5m", "auto": ["trainer.max_epochs"]}, False),
        ({}, False),
    ],
)
def test_a_time_budget_without_effect_is_reported(changes, warned, capsys):
    data = {"_target_": "segdeconv.data.Shapes", "num_train": 4, "num_val": 2, "side": 32, "size": [32, 32]}
    model = {"_target_": "segdeconv.models.SegNet", "stages": [[4], [8]]}
    prepare(check_config({"dataset": {**data, "num_workers": 0}, "model": model, **changes}))
    assert ("time_budget has no effect" in capsys.readouterr().err) == warned


def test_find_measures_the_training_of_train(tmp_path, commands):
    write_folder(tmp_path / "mine", [disc(20)] * 8)
    words = ("dataset=folder", "dataset.root=mine", "model=segnet_small", "model.width=0.125", "time_budget=5")
    done = commands("find", "batch_size", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "optimizer=muon" in done.out
    assert "the largest batch that fits is dataset.batch_size=" in done.out
