"""CHECKPOINT arguments: files, run folders, `latest`, shipped networks; and the folder of a checkpoint's data."""

import json
import os
from pathlib import Path

import pytest
from checkpoint_files import content

from segdeconv.checkpoints import cards, checkpoint
from segdeconv.checkpoints.locate import resolve_path
from segdeconv.errors import UsageError


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Four runs, the newest one last, of which `c` has no best.ckpt, and one without a checkpoint."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("mine", "folder-segnet/b", "folder-segnet/c", "multirun/time/0")):
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        for file in ("best.ckpt", "last.ckpt")[name.endswith("c") :]:
            (folder / file).touch()
            os.utime(folder / file, (1000 + age, 1000 + age))
    Path("runs/started").mkdir()
    Path("runs/started/config.yaml").touch()


@pytest.mark.parametrize(
    ("typed", "file", "said"),
    [
        ("runs/mine/last.ckpt", "runs/mine/last.ckpt", ""),
        ("runs/mine", "runs/mine/best.ckpt", ""),
        ("runs/folder-segnet/c", "runs/folder-segnet/c/last.ckpt", ", since the run has no best.ckpt yet"),
        ("latest", "runs/multirun/time/0/best.ckpt", "runs/multirun/time/0/best.ckpt"),
        ("runs/folder-segnet/latest", "runs/folder-segnet/c/last.ckpt", ", since the run has no best.ckpt yet"),
        ("runs/multirun", "runs/multirun/time/0/best.ckpt", "runs/multirun/time/0/best.ckpt"),
        ("camvid-small", cards.SHIPPED / "camvid-small.safetensors", ""),
    ],
)
def test_an_argument_refers_to_one_file(runs, capsys, typed, file, said):
    assert resolve_path(typed) == Path(file)
    out = capsys.readouterr().out
    assert out.count("\n") == bool(said)
    assert said in out


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            "runs/folder-segnet",
            "runs/folder-segnet contains 2 runs, newest first: runs/folder-segnet/c, runs/folder-segnet/b - give one "
            "of them, or runs/folder-segnet/latest for the newest",
        ),
        ("runs", "runs contains 4 runs, newest first: runs/multirun/time/0, "),
        ("runs/started", "runs/started has no best.ckpt or last.ckpt yet"),
        ("empty/latest", "empty/latest: no run with a checkpoint in "),
        ("nothing/here", "checkpoint nothing/here not found - give a run folder"),
    ],
)
def test_an_argument_without_one_file_is_refused(runs, typed, message):
    with pytest.raises(UsageError) as error:
        resolve_path(typed)
    assert str(error.value).startswith(message)


def test_a_file_or_run_hides_latest_and_a_shipped_name_and_an_empty_folder_does_not(runs):
    Path("camvid-small").mkdir()
    assert resolve_path("camvid-small").parent == cards.SHIPPED
    Path("camvid-small/best.ckpt").touch()
    assert resolve_path("camvid-small") == Path("camvid-small/best.ckpt")
    Path("latest").touch()
    assert resolve_path("latest") == Path("latest")


def trained(run, root, folder):
    """Write a checkpoint that was trained in `folder` with a dataset.root, and read it."""
    written = content()
    written["hyper_parameters"]["config"]["dataset"] = {"root": root}
    run.mkdir(parents=True, exist_ok=True)
    checkpoint.write({**written, checkpoint.FOLDER: checkpoint.relative_folder(folder, run)}, run / "best.ckpt")
    return checkpoint.read(run)


def test_a_relative_root_is_found_from_another_folder_and_after_the_project_was_moved(tmp_path, monkeypatch, capsys):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "mine").mkdir(parents=True)
    elsewhere.mkdir()
    monkeypatch.chdir(project)
    loaded = trained(project / "runs" / "mine", "mine", project)
    assert loaded.dataset_node() == loaded.config["dataset"]  # unchanged where it was typed
    assert not capsys.readouterr().out
    monkeypatch.chdir(elsewhere)
    assert loaded.dataset_node()["root"] == str(project / "mine")
    assert capsys.readouterr().out == f"data set:   {project}/mine, the dataset.root=mine of the training\n"
    moved = tmp_path / "deep" / "moved"
    moved.parent.mkdir()
    project.rename(moved)
    assert checkpoint.read(moved / "runs" / "mine").dataset_node()["root"] == str(moved / "mine")
    (moved / "mine").rename(tmp_path / "gone")
    with pytest.raises(UsageError) as error:
        checkpoint.read(moved / "runs" / "mine").dataset_node()
    assert f"tried {moved}/mine and {elsewhere}/mine - give its folder as dataset.root=DIR" in str(error.value)
    (elsewhere / "mine").mkdir()  # then the folder of the same name here is the data
    assert checkpoint.read(moved / "runs" / "mine").dataset_node()["root"] == "mine"


def test_a_root_on_the_command_line_refers_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "project" / "mine").mkdir(parents=True)
    trained(tmp_path / "run", "mine", tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    loaded = checkpoint.read("run", overrides=["dataset.root=mine"])
    assert loaded.dataset_node()["root"] == "mine"


@pytest.mark.parametrize("recorded", [3, "a\0b", ["x"], "../" * 999])
def test_a_strange_record_of_the_folder_changes_nothing(tmp_path, monkeypatch, recorded):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    written = content()
    written["hyper_parameters"]["config"]["dataset"] = {"root": "mine"}
    checkpoint.write({**written, checkpoint.FOLDER: recorded}, tmp_path / "best.ckpt")
    assert checkpoint.read("best.ckpt").dataset_node()["root"] == "mine"


def test_shared_weights_do_not_contain_the_path_of_the_data(tmp_path):
    data = tmp_path / "home" / "name" / "mine"
    loaded = trained(tmp_path / "run", str(data), tmp_path)
    checkpoint.write_weights(loaded, tmp_path / "shared.safetensors")
    text = (tmp_path / "shared.json").read_text()
    assert json.loads(text)["config"]["dataset"]["root"] == "mine"
    assert str(tmp_path) not in text
    assert loaded.config["dataset"]["root"] == str(data)
