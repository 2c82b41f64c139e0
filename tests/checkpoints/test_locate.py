"""CHECKPOINT arguments: files, run folders, `latest`, shipped networks."""

import os
from pathlib import Path

import pytest

from segdeconv.checkpoints import cards
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
