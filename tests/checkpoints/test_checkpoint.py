"""Checkpoint files: written atomically, verified, and unable to run code."""

import contextlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import CLASSES, Touch, content

from segdeconv.checkpoints import checkpoint
from segdeconv.errors import CheckpointError, UsageError


def written(tmp_path, **changes):
    path = tmp_path / "best.ckpt"
    checkpoint.write(content(**changes), path)
    return path


def test_a_checkpoint_builds_the_network_that_was_written(tmp_path):
    data = content()
    path = tmp_path / "best.ckpt"
    checkpoint.write(data, path)
    loaded = checkpoint.read(path)
    assert loaded.classes == CLASSES
    weights = loaded.model().state_dict()
    assert all(torch.equal(value, weights[name.removeprefix("model.")]) for name, value in data["state_dict"].items())
    assert not torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "best.ckpt.sha256"]


def test_sha256sum_accepts_the_sidecar(tmp_path):
    path = written(tmp_path)
    done = subprocess.run(["sha256sum", "-c", "best.ckpt.sha256"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + str(path)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "html"])
def test_a_damaged_file_is_refused_before_it_is_read(tmp_path, damage):
    path = written(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:1000]), "empty": b"", "html": b"<html>"}[damage])
    with pytest.raises(CheckpointError, match=r"best.ckpt is damaged: its sha256 is not the one in best.ckpt.sha256"):
        checkpoint.read(path)


def test_a_missing_sidecar_prints_a_warning(tmp_path, capsys):
    path = written(tmp_path)
    path.with_name("best.ckpt.sha256").unlink()
    checkpoint.read(path)
    assert "best.ckpt.sha256 is missing" in capsys.readouterr().err


def test_a_pickled_command_is_refused_and_does_not_run(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    path = tmp_path / "evil.ckpt"
    torch.save(content(payload=Touch(marker)), path)
    torch.load(path, weights_only=False)
    assert marker.exists(), "the payload must run in an unsafe load, or this test proves nothing"
    marker.unlink()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match=r"evil.ckpt cannot be read safely"):
        checkpoint.read(path)
    path.write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(CheckpointError, match=r"cannot be read safely"):
        checkpoint.read(path)
    assert not marker.exists()


@pytest.mark.parametrize("target", ["os.system", "torch.load", "segdeconv.models.base.Thing", "builtins.eval"])
@pytest.mark.parametrize("place", ["model", "augment", "facts"])
def test_a_config_that_names_foreign_code_anywhere_is_refused(tmp_path, target, place):
    data = content()
    hyper_parameters = data["hyper_parameters"]
    node = hyper_parameters if place == "facts" else hyper_parameters["config"]
    node[place] = {**node.get(place, {}), "x": {"_target_": target}}
    path = tmp_path / "evil.ckpt"
    checkpoint.write(data, path)
    with pytest.raises(CheckpointError, match=f"names {target}, which is not part of segdeconv"):
        checkpoint.read(path)
    if place != "facts":
        checkpoint.read(path, trust=[target])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hyper_parameters": {}}, "is not a segdeconv checkpoint"),
        ({"segdeconv": {"format": 999}}, "has format 999, but this version reads format 1 - upgrade"),
        ({"segdeconv": {}}, "has format None"),
    ],
)
def test_a_foreign_or_newer_file_is_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(written(tmp_path, **changes))


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    data = content()
    data["state_dict"].popitem()
    checkpoint.write(data, tmp_path / "best.ckpt")
    with pytest.raises(CheckpointError, match="does not contain the weights that its config describes"):
        checkpoint.read(tmp_path / "best.ckpt").model()


def test_a_url_and_a_missing_file_are_refused():
    with pytest.raises(UsageError, match="is a URL - download"):
        checkpoint.read("https://example.org/best.ckpt")
    with pytest.raises(UsageError, match=r"checkpoint nowhere.ckpt not found"):
        checkpoint.read("nowhere.ckpt")


@pytest.mark.slow
def test_a_killed_writer_leaves_a_complete_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.write(content(), path)
    writer = (
        "import torch, itertools\n"
        "from pathlib import Path\n"
        "from segdeconv.checkpoints import checkpoint\n"
        f"path = Path({str(path)!r})\n"
        "data = checkpoint.load_plain(path)\n"
        "data['ballast'] = torch.zeros(400_000)\n"
        "print('ready', flush=True)\n"
        "for count in itertools.count():\n"
        "    data['count'] = count\n"
        "    checkpoint.write(data, path)\n"
    )
    counts = []
    for delay in (0.03, 0.11, 0.2):
        command = [sys.executable, "-c", writer]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        counts.append(checkpoint.load_plain(path).get("count", -1))
    assert max(counts) > 0, "the writer must have written at least once"


@pytest.mark.slow
@pytest.mark.parametrize("room", [100, 3_000, 9_000])
def test_a_full_disk_is_reported_and_the_old_file_stays(tmp_path, room):
    """torch fails twice on a full disk, and its second error is about its own archive."""
    path = written(tmp_path)
    before = path.read_bytes()
    assert len(before) > 10_000
    writer = (
        "import resource, sys\nfrom pathlib import Path\nfrom segdeconv.checkpoints import checkpoint\n"
        f"path = Path({str(path)!r})\ndata = checkpoint.load_plain(path)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "try:\n    checkpoint.write(data, path)\nexcept OSError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", writer], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert "File too large" in done.stdout, done.stderr
    assert "best.ckpt" in done.stdout
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "best.ckpt.sha256"]


@pytest.mark.parametrize("nth", [1, 2, 7])
@pytest.mark.parametrize(
    "error", [RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "), SystemExit(143)]
)
def test_an_error_during_a_write_is_not_hidden_by_the_archive(tmp_path, monkeypatch, nth, error):
    """torch raises the death of a worker wherever the program is, and then fails to close its archive."""

    class FailingFile(io.BytesIO):
        writes = 0

        def open(self, mode):
            return self

        def write(self, content):
            self.writes += 1
            if self.writes == nth:
                raise error
            return super().write(content)

    @contextlib.contextmanager
    def replacing_path(path):
        yield FailingFile()

    path = written(tmp_path)
    monkeypatch.setattr(checkpoint, "replacing_path", replacing_path)
    with pytest.raises(type(error), match=r"is killed by signal|143"):
        checkpoint.write({"weights": torch.ones(5000)}, path)


def test_a_checkpoint_matches_its_sidecar_after_several_interrupted_writes(tmp_path, monkeypatch):
    """The sidecar is written first and must keep listing the hash of the file that is still there."""
    path = written(tmp_path)
    replace = Path.replace

    def cut(source, target):
        if Path(target) == path:
            raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", cut)
    for count in range(2):
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write(content(count=count), path)
        checkpoint.verify(path)
    for _ in range(9):  # repeatedly the same step
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write({**checkpoint.load_plain(path), "count": 1}, path)
        checkpoint.verify(path)


def test_every_flipped_bit_and_truncation_is_detected_before_a_tensor_is_read(tmp_path, monkeypatch):
    """torch.load alone accepts most flipped bits silently."""
    path = written(tmp_path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)

    def read_too_early(*_, **__):
        raise AssertionError("a damaged file was passed to torch")

    monkeypatch.setattr(torch, "load", read_too_early)
    for trial in range(400):
        data = bytearray(whole)
        if trial % 10:
            data[random.integers(len(data))] ^= 1 << random.integers(8)
        else:
            del data[random.integers(len(data)) :]
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"best.ckpt is damaged: its sha256"):
            checkpoint.read(path)
    path.write_bytes(whole)
    monkeypatch.undo()
    checkpoint.read(path)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, number):
    data = content()
    name, value = next((name, value) for name, value in data["state_dict"].items() if value.is_floating_point())
    value.view(-1)[0] = number
    with pytest.raises(CheckpointError, match=rf"contains weights that are not finite \({name}\)"):
        checkpoint.read(written(tmp_path, state_dict=data["state_dict"]))


GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.ckpt")), ids=lambda path: path.stem)
def test_checkpoints_of_earlier_versions_are_read_and_score_as_they_did(path, commands, tmp_path):
    """The files were trained on Shapes with the version in their names; the .json holds the scores of that version."""
    loaded = checkpoint.read(path)
    assert not torch.serialization.get_unsafe_globals_in_checkpoint(path)
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        logits = loaded.model()(image)
    then = json.loads(path.with_suffix(".json").read_text())
    assert logits.sum(dim=(0, 2, 3)).tolist() == pytest.approx(then["logits"], rel=1e-4)
    done = commands("evaluate", path, "--out", "out", cwd=tmp_path)
    assert done.code == 0, done.err
    now = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["name"] for entry in now["classes"]] == then["classes"]
    assert now["miou"] == pytest.approx(then["miou"], abs=1e-4)


def test_shared_weights_of_an_earlier_version_score_as_the_checkpoint_they_were_exported_from():
    loaded = checkpoint.read(GOLDEN / "shared-0.1.0" / "format-1-shared.safetensors")
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        logits = loaded.model()(image)
    then = json.loads((GOLDEN / "format-1-averaged.json").read_text())
    assert logits.sum(dim=(0, 2, 3)).tolist() == pytest.approx(then["logits"], rel=1e-4)
    assert list(loaded.classes.names) == then["classes"]
