"""Hydra's flags, shell completion and the list of keys, as people know them from other programs that use Hydra."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fresh_commands import child_environment

from segdeconv.cli.overrides import compose, hydra_overrides, keys_set, parse_flags
from segdeconv.config import OTHER_NAMES, list_groups
from segdeconv.errors import UsageError
from segdeconv.system import CONFIGS
from segdeconv.training.keys import keys, type_name

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "normalised"),
    [
        (["--cfg", "job"], ["--cfg=job"]),
        (["seed=1", "-c", "all", "-p", "x", "model=unet"], ["--cfg=all", "--package=x", "++seed=1", "model=unet"]),
        (["--info"], ["--info=all"]),
        (["-i", "defaults"], ["--info=defaults"]),
        (["--info", "seed=1"], ["--info=all", "++seed=1"]),
        (["-m", "seed=1,2"], ["--multirun", "++seed=1,2"]),
        (["+experiment=demo"], ["experiment=demo"]),
        (["-cn", "mine"], ["--config-name=mine"]),
        (["--config-name=mine"], ["--config-name=mine"]),
        (["-cd", str(ROOT / "docs")], [f"--config-dir={ROOT / 'docs'}"]),
        (["~model.stages", "-cd=docs"], ["--config-dir=docs", "~model.stages"]),
        (["~logger", "~callbacks", "~augment"], ["logger=none", "callbacks=none", "augment=none"]),
        (["hydra.job.chdir=false", "hydra.run.dir=a"], ["hydra.job.chdir=false", "hydra.run.dir=a"]),
        (["--keys"], ["--keys="]),
        (["--keys", "model=unet"], ["--keys=", "model=unet"]),
        (["--keys", "model", "model=unet"], ["--keys=model", "model=unet"]),
    ],
)  # fmt: skip
def test_flags_of_hydra_are_accepted_anywhere_in_one_or_two_words(words, normalised, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert hydra_overrides(words, CONFIGS) == normalised
    assert hydra_overrides(normalised, CONFIGS) == normalised


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "5"], "unknown option --epochs - write trainer.max_epochs=5, without dashes"),
        (["--lr=0.1"], "unknown option --lr - write optimizer.lr=0.1"),
        (["--batch-size", "4", "seed=1"], "unknown option --batch-size - write dataset.batch_size=4"),
        (["--workers"], "unknown option --workers - write dataset.num_workers=VALUE"),
        (["--img_size", "--seed"], "unknown option --img_size - write dataset.size=VALUE"),
        (["--model", "unet"], "unknown option --model - write model=unet"),
        (["--zzz"], "unknown option --zzz - write zzz=VALUE, without dashes, or see --keys"),
        (["--cfg", "jobs"], "argument --cfg/-c: invalid choice: 'jobs'"),
        (["--cfg"], "argument --cfg/-c: expected one argument"),
        (["-m", "--cfg", "job"], "--multirun and --cfg exclude each other"),
        (["--resolve"], "--resolve belongs to --cfg - add --cfg job"),
        (["-p", "model"], "--package belongs to --cfg"),
        (["--config-path", "x"], "--config-path is not supported: it would replace"),
        (["--experimental-rerun", "x"], "--experimental-rerun is not supported: it would unpickle a file"),
        (["5"], "'5' is not key=value"),
    ],
)
def test_a_wrong_flag_is_one_line_with_the_right_key(words, message):
    with pytest.raises(UsageError) as caught:
        hydra_overrides(words, CONFIGS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        *((f"~{group}", f"~{group} leaves a run without its {group}") for group in ("dataset", "model", "optimizer")),
        ("hydra.run.dir=", "'hydra.run.dir=' is not supported - give the folder of the run"),
        ("hydra.job.chdir=true", "paths are those of this folder"),
    ],
)
def test_what_would_train_something_else_or_elsewhere_is_refused(word, message):
    with pytest.raises(UsageError, match=message):
        hydra_overrides([word], CONFIGS)


def test_only_train_takes_flags_that_run_or_show_jobs():
    with pytest.raises(UsageError, match=r"--multirun is an option of python scripts/train\.py - leave it out"):
        compose(["-m", "seed=1,2"], CONFIGS)


@pytest.mark.slow
def test_an_own_main_file_starts_from_the_shipped_one(tmp_path, commands):
    (tmp_path / "own.yaml").write_text(
        "defaults: [train, override model: unet, override hydra/sweeper: optuna, _self_]\nseed: 7\n"
    )
    words = ["-cd", str(tmp_path), "-cn", "own", "optimizer.lr=0.5"]
    config, choices = compose(words, CONFIGS)
    assert (config["seed"], choices["model"], config["optimizer"]["lr"]) == (7, "unet", 0.5)
    assert keys_set(hydra_overrides(words, CONFIGS), CONFIGS) == {"model", "hydra/sweeper", "seed", "optimizer.lr"}
    done = commands("train", *words, "--cfg", "job", cwd=tmp_path)
    assert {**yaml.safe_load(done.out), "optimizer": config["optimizer"]} == config


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("--cfg", "job", "-p", "trainer"), 0, "# @package trainer\nmax_epochs: 20\n"),
        (("-c", "job", "-p", "trainer", "trainer.x=${seed}", "--resolve"), 0, "max_epochs: 20\nx: 0\n"),
        (("--info", "searchpath"), 0, "main"),
        (("--version",), 0, "Hydra 1."),
        (("--cfg", "job", "--package", "nothing"), 2, "package 'nothing' not found in config"),
        (("--cfg", "job", "epochs=3"), 2, "unknown key epochs - did you mean 'trainer.max_epochs'?"),
        (("--cfg", "job", "-cn", "nothing"), 2, "Cannot find primary config 'nothing'"),
        (("--cfg", "job", "seed=1,2", "model=unet,fpn"), 2, "the config cannot be composed"),
        (("--keys", "nothing"), 2, "unknown group 'nothing' - Available: augment, callbacks"),
        (("-m", "optimizer.lr=interval(0.1,1)"), 2, "add hydra/sweeper=optuna"),
        (("-m", "seed=1,2", "hydra/sweeper=nothing"), 2, "Could not find 'hydra/sweeper/nothing'"),
        (("-sc", "install=tcsh"), 2, "write -sc and install=bash or install=zsh or install=fish"),
        (("-sc",), 2, "write -sc and install=bash"),
    ],
)  # fmt: skip
def test_nothing_trains_for_flags_that_show_something(words, code, text, tmp_path, commands):
    done = commands("train", *words, cwd=tmp_path)
    assert done.code == code, done.err
    assert text in (done.error_message if code else done.out)
    assert not list(tmp_path.iterdir())


# Completion


QUERIES = [
    ("python scripts/train.py model=fcn_b", ["model=fcn_basic", "model=fcn_basic_no_addition"]),
    ("python scripts/train.py sch", ["schedule.", "schedule="]),
    ("python scripts/train.py experiment=demo model.width=2 trainer.", ["trainer.max_epochs="]),
    ("python scripts/train.py --config-dir docs/own_code/configs -m seed=1,2 dataset=st", ["dataset=stripes"]),
    ("python scripts/train.py nonsense model=", []),
    ("segdeconv tr", ["benchmark", "describe", "train", "visualize"]),
    ("segdeconv train optimizer=", ["optimizer=adamw", "optimizer=muon", "optimizer=sgd"]),
    ("segdeconv find lr optimizer=s", ["optimizer=sgd"]),
    ("segdeconv predict mod", []),
]  # fmt: skip


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(("line", "expected"), QUERIES)
def test_a_completion_query_is_answered(line, expected, shell, commands):
    done = commands("train", "-sc", f"query={shell}", cwd=ROOT, env={"COMP_LINE": line})
    assert (done.code, done.err) == (0, "")
    assert done.out.count("\n") <= 1 or shell == "fish"
    assert set(expected) <= set(done.out.split())
    assert expected or not done.out.strip()


@pytest.mark.parametrize(
    ("install", "line", "reply"),
    [
        (f"{sys.executable} scripts/train.py -sc install=bash", "python scripts/train.py loss=d", "loss=dice"),
        ("segdeconv train -sc install=bash", "segdeconv train loss=d", "loss=dice"),
        ("segdeconv -sc install=bash", "segdeconv insp", "inspect_data"),
    ],
)
def test_bash_completes_with_the_installed_script(install, line, reply, tmp_path):
    for name, words in (("segdeconv", "-m segdeconv"), ("python", "")):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (tmp_path / name).chmod(0o755)
    program = (
        f'eval "$({install})"; COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; COMP_CWORD={len(line.split()) - 1}; '
        'hydra_bash_completion; echo "${COMPREPLY[@]}"'
    )
    environment = child_environment(ROOT, PATH=f"{tmp_path}:{os.environ['PATH']}", OMP_NUM_THREADS="1")
    done = subprocess.run(
        ["bash", "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert (done.stdout.strip(), done.stderr) == (reply, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_names_the_program_that_was_typed(shell, commands):
    script = commands("train", "-sc", f"install={shell}", cwd=ROOT).out
    assert "python" in script
    assert f"query={'fish' if shell == 'fish' else 'bash'}" in script
    # The script for fish completes only files in which it finds this text.
    assert "@hydra.main" in (ROOT / "scripts" / "train.py").read_text()


# Keys


CHOICES = [
    f"{group}={name}"
    for group, names in list_groups(CONFIGS).items()
    if group not in ("experiment", "logger")  # loggers are classes of other libraries, which may not be installed
    for name in names
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_key_has_a_default_a_type_and_an_explanation(choice):
    group = choice.partition("=")[0]
    config, _ = compose([choice], CONFIGS, incomplete=True)
    for listed in keys(config, group).values():
        for key in listed:
            assert key.name.startswith(f"{group}.")
            assert key.default
            assert key.type
            assert key.text, key
            assert not key.text.startswith("See `"), key


def test_the_keys_are_those_of_the_schemas_with_their_ranges():
    config, _ = compose(["trainer.patience=3"], CONFIGS)
    found = {key.name: key for listed in keys(config).values() for key in listed}
    assert found["trainer.patience"][1:3] == ("3", "int >= 1 | null")
    assert found["trainer.norm"][1:3] == ("batch", "batch | sync | frozen")
    assert found["optimizer.betas"][1:3] == ("[0.9,0.999]", "[float >= 0 < 1, float >= 0 < 1]")
    assert found["dataset.batch_size"][1:] == ("16", "int >= 1", "Images per process and step.")
    assert (found["augment.flip.p"].default, found["model.width"].default) == ("0.5", "1.0")
    assert {"seed", "resume", "loss.logit_adjustment", "schedule.power"} <= set(found)
    assert not {"model.num_classes", "dataset.split", "optimizer.model", "loss.class_weights"} & set(found)


def test_every_suggested_key_exists():
    config, choices = compose(["optimizer=sgd"], CONFIGS)
    found = {key.name for listed in keys(config).values() for key in listed}
    folder = {
        key.name for listed in keys(compose(["dataset=folder"], CONFIGS, incomplete=True)[0]).values() for key in listed
    }
    assert set(OTHER_NAMES.values()) <= found | folder | set(choices) | {"hydra.run.dir"}


def test_a_type_that_is_a_class_has_its_name():
    assert (type_name(Path), type_name(bool | None), type_name(tuple[int, ...])) == ("path", "bool | null", "[...]")


def test_the_list_is_printed_without_the_values_that_have_to_be_given(tmp_path, commands):
    done = commands("train", "--keys", "dataset", "dataset=folder", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.startswith("dataset (segdeconv.data.Folder)\n  dataset.root=???  ")
    assert "dataset=NAME chooses another file: ade20k, camvid" in done.out


def test_a_group_or_key_of_a_flag_is_parsed_by_hydra_itself():
    assert parse_flags(["seed=1", "--multirun", "a=b"]).overrides == ["seed=1", "a=b"]
