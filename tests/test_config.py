"""Configs: all shipped ones can be composed and built, and every error in a config gives an error message."""

import copy
import re
from pathlib import Path

import pytest
import torch
import yaml

import segdeconv.config
from segdeconv.checkpoints import checkpoint
from segdeconv.cli import own_code
from segdeconv.cli.command import RENAMED_OPTIONS, ArgumentParser
from segdeconv.cli.overrides import compose, hydra_overrides
from segdeconv.config import RENAMED_KEYS, build, override, rename_keys, targets
from segdeconv.errors import UsageError
from segdeconv.training.config_check import SCHEMAS, check_config
from segdeconv.training.resume import NOT_IN_CHECKPOINTS, differing_keys, without_keys

CONFIGS = Path(__file__).parents[1] / "configs"
GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in CONFIGS.iterdir() if folder.is_dir()
}


def compose_and_check(*arguments):
    return check_config(compose(arguments, CONFIGS)[0])


@pytest.mark.parametrize("choice", [f"{group}={name}" for group, names in GROUPS.items() for name in names])
def test_every_shipped_file_composes_and_names_only_admitted_classes(choice):
    mandatory = {
        "dataset=folder": "dataset.root=somewhere",
        "dataset=shards": "dataset.root=somewhere",
        "experiment=deconvnet_voc_stage2_paper": "init_from=stage1.ckpt",
        "experiment=fcn16s_voc": "init_from=fcn32s.ckpt",
        "experiment=fcn8s_voc": "init_from=fcn16s.ckpt",
    }
    config = compose_and_check(choice, *([mandatory[choice]] if choice in mandatory else []))
    assert set(targets(without_keys(config, NOT_IN_CHECKPOINTS))) <= checkpoint.ADMITTED


@pytest.mark.parametrize("name", GROUPS["model"])
def test_every_model_builds_from_its_file(name):
    node = compose_and_check(f"model={name}")["model"]
    with torch.device("meta"):  # shapes without memory: DeconvNet takes 1 GB
        model = build(node, "model", num_classes=3)
        side = model.minimum_size
        assert model.eval()(torch.zeros(1, 3, side, side)).shape == (1, 3, side, side)


def test_defaults_of_constructors_are_filled_into_the_config():
    config = compose_and_check()
    assert config["model"]["depth"] == 16
    assert config["dataset"]["timeout"] == 120.0
    assert config["trainer"]["precision"] == "auto"


def test_an_argument_that_no_yaml_file_has_can_be_set():
    assert compose_and_check("model.switch_source=post_relu")["model"]["switch_source"] == "post_relu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["datset=camvid"], "unknown key datset - did you mean 'dataset'?"),
        (["lr=0.1"], "unknown key lr - did you mean 'optimizer.lr'?"),
        (["epochs=5"], "unknown key epochs - did you mean 'trainer.max_epochs'?"),
        (["trainer.epochs=5"], "unknown key trainer.epochs - did you mean 'max_epochs'?"),
        (["batch_size=4"], "unknown key batch_size - did you mean 'dataset.batch_size'?"),
        (["trainer.batch_size=4"], "unknown key trainer.batch_size - did you mean 'dataset.batch_size'?"),
        (["model.lr=1"], "unknown key model.lr - did you mean 'optimizer.lr'?"),
        (["gpus=2"], "unknown key gpus - did you mean 'trainer.devices'?"),
        (["dataset=canvid"], "unknown dataset 'canvid' - did you mean 'camvid'? Available: ade20k, camvid, city"),
        (
            ["dataset.root=mine"],
            "unknown key dataset.root - dataset=ade20k, camvid, cityscapes, folder, oxford_pets, sh",
        ),
        (
            ["optimizer.momentum=0.9"],
            "unknown key optimizer.momentum - optimizer=muon and sgd have it. Available here: b",
        ),
        (
            ["model=unet", "model.switch_source=soft"],
            "unknown key model.switch_source - model=bayesian_segnet, bayesian",
        ),
        (["schedule=cosine", "schedule.power=2"], "unknown key schedule.power - schedule=poly has it"),
        (["loss.gamma=2"], "unknown key loss.gamma - loss=focal has it. Available here: class_weighting"),
        (
            [f"dataset={CONFIGS}"],
            f"is a folder - for your own images and masks in it, dataset='folder', dataset__root='{CONFIGS}'",
        ),
        (["model=segnt"], "unknown model 'segnt' - did you mean 'segnet'?"),
        (["model.widht=0.5"], "unknown key model.widht - did you mean 'width'?"),
        (["trainer.device=2"], "unknown key trainer.device - did you mean 'devices'?"),
        (["dataset.batchsize=2"], "unknown key dataset.batchsize - did you mean 'batch_size'?"),
        (["augment.flip.prob=1"], "unknown key augment.flip.prob"),
        (["optimizer.lr=abc"], "optimizer.lr=abc: input should be a valid number"),
        (["optimizer.lr="], "optimizer.lr=: input should be a valid number"),
        (["trainer.max_epochs=-5"], "trainer.max_epochs=-5: input should be greater than or equal to 1"),
        (["trainer.precision=bf16"], "trainer.precision=bf16: input should be 'auto'"),
        (["model.depth=17"], "model.depth=17: input should be 11, 13, 16 or 19"),
        (["dataset.size=12"], "dataset.size=12: input should be a valid tuple"),
        (["seed=-1"], "seed=-1: input should be greater than or equal to 0"),
        (["seed=1", "seed=2"], "seed is given twice"),
        (["lr"], "'lr' is not key=value"),
        (["dataset.root=a\nb"], r"'dataset.root=a\nb' has a line break or control character - rename"),
        (["dataset.root=${x}"], r"interpolation key 'x' not found - give dataset.root=VALUE, in which \${ stands for"),
        (["dataset=folder"], "dataset.root: missing mandatory value: root - give dataset.root=VALUE"),
        (["model._target_=segdeconv.models.Segnet"], "model._target_=segdeconv.models.Segnet cannot be imported"),
    ],
)
def test_an_error_on_the_command_line_is_reported_with_the_way_out(arguments, message):
    with pytest.raises(UsageError) as caught:
        compose_and_check(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sweep_checks_each_of_its_choices():
    words = ["-m", "dataset=shapes,camvid", "seed=1,2", "dataset.root=a,b"]
    expected = ["--multirun", "dataset=shapes,camvid", "++seed=1,2", "++dataset.root=a,b"]
    assert hydra_overrides(words, CONFIGS) == expected
    with pytest.raises(UsageError, match="unknown dataset 'canvid'"):
        hydra_overrides(["dataset=shapes,canvid"], CONFIGS)


def test_values_of_a_restored_config_can_be_changed_but_not_its_classes():
    config = {"dataset": {"_target_": "segdeconv.data.Shapes", "batch_size": 4}}
    assert override(config, ["dataset.batch_size=2"])["dataset"]["batch_size"] == 2
    assert config["dataset"]["batch_size"] == 4
    with pytest.raises(UsageError, match=r"cannot be changed, .* - leave it out"):
        override(config, ["dataset._target_=os.system"])
    with pytest.raises(UsageError, match="unknown key dat - did you mean 'dataset'"):
        override(config, ["dat=3"])
    with pytest.raises(UsageError, match="is not key=value"):
        override(config, ["dataset"])


def test_only_keys_that_change_the_training_count_as_differences():
    before = {"seed": 0, "dataset": {"num_workers": 2, "size": [1, 2]}}
    assert differing_keys(before, {"seed": 0, "dataset": {"num_workers": 0, "size": [1, 2]}}) == []
    assert differing_keys(before, {"seed": 1, "dataset": {"num_workers": 2, "size": [1, 3]}}) == [
        "dataset.size",
        "seed",
    ]


def test_targets_are_found_in_nested_mappings_and_lists():
    nested = {"a": [{"b": {"_target_": "x.y", "c": ({"_target_": "z.w"},)}}]}
    assert list(targets(nested)) == ["x.y", "z.w"]


VALUES = {
    "dataset.mix_share": 0.25, "loss.adjustment": 0.5, "loss.balancing": "inverse_frequency", "loss.temper": 0.75,
    "trainer.accumulate": 3, "trainer.gradient_clip": 2.0, "trainer.recompute": True, "trainer.validate_every": 7,
}  # fmt: skip


@pytest.fixture
def warnings_of_keys(monkeypatch, capsys):
    """Return a function that returns the deprecation warnings so far, in a process that has not warned before."""
    monkeypatch.setattr(segdeconv.config, "_warned_keys", set())
    return lambda: [line for line in capsys.readouterr().err.splitlines() if "deprecated" in line]


def value_of(config, key):
    group, _, name = key.partition(".")
    return config[group][name] if name else config[group]


@pytest.mark.parametrize(("former", "key"), RENAMED_KEYS.items())
def test_a_renamed_key_is_read_under_both_names_and_written_under_the_new_one(former, key, tmp_path, warnings_of_keys):
    value = VALUES[former]
    config = compose_and_check(f"{former}={value}")
    assert value_of(config, key) == value
    assert former.partition(".")[2] not in config[former.partition(".")[0]]
    (line,) = warnings_of_keys()
    assert line == (
        f"segdeconv: warning: the command line uses former key names, which are deprecated: {former} is now {key}"
    )
    assert compose_and_check(f"{key}={value}") == config
    assert value_of(override(config, [f"{former}={value}"]), key) == value
    old = copy.deepcopy(config)
    node = old[former.partition(".")[0]]
    node[former.partition(".")[2]] = node.pop(key.partition(".")[2])
    assert check_config(old) == config
    assert warnings_of_keys() == []
    for both in ([f"{former}={value}", f"{key}={value}"], [f"{key}={value}", f"+{former}={value}"]):
        with pytest.raises(UsageError, match=f"{key} is given twice"):
            compose_and_check(*both)
        with pytest.raises(UsageError, match=f"{key} is given twice"):
            override(config, [word.lstrip("+") for word in both])
    with pytest.raises(UsageError, match=rf"^x\.yaml sets {key} and its former name {former} - remove {former}$"):
        rename_keys({key.partition(".")[0]: dict.fromkeys((key.partition(".")[2], former.partition(".")[2]))}, "x.yaml")


def test_a_former_name_in_a_users_file_overrides_a_shipped_file_but_not_the_command_line(tmp_path, warnings_of_keys):
    folder = tmp_path / "own" / "experiment"
    folder.mkdir(parents=True)
    text = "# @package _global_\ndefaults: [segnet_camvid, _self_]\ntrainer: {validate_every: 7}\n"
    (folder / "mine.yaml").write_text(text)
    arguments = [f"--config-dir={tmp_path}/own", "experiment=mine", "dataset.root=x"]
    assert compose_and_check(*arguments)["trainer"]["check_val_every_n_epoch"] == 7
    (line,) = warnings_of_keys()
    assert f"a file in {tmp_path}/own uses former key names" in line
    for key in ("validate_every", "check_val_every_n_epoch"):
        assert compose_and_check(*arguments, f"trainer.{key}=5")["trainer"]["check_val_every_n_epoch"] == 5
    (folder / "mine.yaml").write_text(text.replace("{", "{check_val_every_n_epoch: 2, "))
    with pytest.raises(UsageError, match=r"own sets trainer\.check_val_every_n_epoch and its former name"):
        compose_and_check(*arguments)


@pytest.mark.parametrize(("former", "option"), RENAMED_OPTIONS.items())
def test_a_renamed_option_is_read_under_both_names(former, option, capsys):
    parser = ArgumentParser("predict.py")
    parser.add_argument(option, dest="value")
    for words in ([option, "1"], [former, "1"], [f"{former}=1"]):
        assert parser.parse_args(words).value == "1"
    assert capsys.readouterr().err == f"segdeconv: warning: {former} is deprecated: it is now {option}\n" * 2
    with pytest.raises(UsageError, match=f"^{former} is the former name of {option}, and both are given"):
        parser.parse_args([option, "1", former, "1"])
    with pytest.raises(UsageError, match="unrecognized arguments"):
        ArgumentParser("predict.py").parse_args([former, "1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: checkpoint - see python scripts/evaluate.py --help"),
        (["a", "--output", "x"], "unrecognized arguments: --output x - did you mean --out? - see"),
        (["a", "--outt=x"], "unrecognized arguments: --outt=x - did you mean --out? - see"),
        (["a", "--gpu"], "unrecognized arguments: --gpu - see"),
    ],
)
def test_a_wrong_command_line_names_what_is_meant(words, message):
    parser = ArgumentParser("evaluate.py")
    parser.add_argument("checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out")
    with pytest.raises(UsageError) as caught:
        parser.parse_intermixed_args(words)
    assert str(caught.value).startswith(message)


NAMES = (
    "café", "李明", "my set (final)", "it's", 'a "b"', "fold=1", "#1", "no #2", "[a]", "{x}", "{x: 1}", "100%", "a,b",
    "a;b", "$HOME", "${seed", "it's ${seed}", "~tilde", " lead", "trail ", "20", "007", "1e3", "1_0", "inf", "null",
    "true", "yes", "a\\", "a\\'b", "C:\\new", "key: value", "2020-01-01", "\U0001f600", "na\udcefve", "glob(x)",
    "range(1,3)", "'x", "!x", "@x", "<a|b>", "a&b", "- a", "*",
)  # fmt: skip
PATH_KEYS = ("dataset.classes", "dataset.checksums", "init_from", "resume", "model.pretrained")


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_taken_as_typed(name, tmp_path):
    paths = dict.fromkeys(PATH_KEYS, f"{tmp_path}/{name}") | {"dataset.root": name}
    words = [f"{key}={path}" for key, path in paths.items()]
    config = check_config(own_code.compose(["dataset=folder", "model=deconvnet", *words])[0])
    assert {key: value_of(config, key) for key in paths} == paths
    assert yaml.safe_load(yaml.safe_dump(config)) == config
    assert override(config, words, SCHEMAS) == config


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("dataset.root='my set'", "my set"),
        ('dataset.root="20"', "20"),
        (r"dataset.root=my\ set\ \(final\)", "my set (final)"),
        (r"dataset.root=\${x}", "${x}"),
        ("dataset.checksums=a-${seed}", "a-0"),
        ("dataset.checksums=${seed}", "0"),
        ("dataset.split_seed=${seed}", 0),
        ("dataset.classes=[road, sky]", ["road", "sky"]),
        ("dataset.classes={road: 0, sky: 1}", {"road": 0, "sky": 1}),
        ("dataset.classes={straße: 0, Himmel (blau): 1}", {"straße": 0, "Himmel (blau)": 1}),
        ("dataset.classes=null", None),
        ("dataset.label_map={straße: weg, no: it's 20}", {"straße": "weg", "no": "it's 20"}),
        ("dataset.label_map={1: 20}", {"1": "20"}),
        ("dataset.label_map.car=20", {"car": "20"}),
        ("dataset.label_map.car=my (car)", {"car": "my (car)"}),
        ("dataset.fold=1", 1),
        ("dataset.size=[20,30]", [20, 30]),
        ("dataset.cache_size=1e-3", 0.001),
        ("dataset.checksums=null", None),
        ("max_time=5400", 5400),
        ("trainer.devices=0,1", "0,1"),
        ("trainer.deterministic=true", True),
    ],
)
def test_a_value_has_the_type_that_its_key_declares(word, value):
    key = ".".join(word.partition("=")[0].split(".")[:2])
    base = ["dataset=folder"] if key == "dataset.root" else ["dataset=folder", "dataset.root=x"]
    config = check_config(own_code.compose([*base, word])[0])
    assert value_of(config, key) == value
    if "${seed}" not in word:  # a restored config has no interpolations
        assert value_of(override(config, [word], SCHEMAS), key) == value


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed=1,2", "seed=1,2 is a sweep - add -m to train with each value, or give one value"),
        ("dataset.size=[1,2", r"dataset.size=[1,2: input should be a valid tuple"),
        ("dataset.timeout=it's", "dataset.timeout=it's: input should be a valid number"),
        ("dataset=it's", "unknown dataset 'it's' - Available: ade20k"),
    ],
)
def test_text_for_a_key_of_another_type_is_refused(word, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        check_config(own_code.compose([word])[0])


def test_a_number_of_a_file_or_of_python_for_a_key_of_text_is_refused():
    dataset = {"_target_": "segdeconv.data.Folder", "root": 20}
    with pytest.raises(UsageError, match=r"^dataset\.root=20: .* - correct the value or put it in quotes$"):
        check_config({"dataset": dataset})


def test_an_experiment_of_the_user_sets_keys_without_a_group_too(tmp_path):
    (tmp_path / "it's" / "experiment").mkdir(parents=True)
    (tmp_path / "it's" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\nmodel: {depth: 13}\n")
    arguments = [f"--config-dir={tmp_path}/it's", "experiment=mine"]
    config = compose_and_check(*arguments)
    assert (config["seed"], config["model"]["depth"]) == (7, 13)
    assert compose_and_check(*arguments, "seed=3")["seed"] == 3
