"""Checkpoint files: whole or not at all, verified, and unable to run code."""

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


def test_what_is_written_is_read_back_and_builds_the_same_network(tmp_path):
    made = content()
    path = tmp_path / "best.ckpt"
    checkpoint.write(made, path)
    read = checkpoint.read(path)
    assert read.classes == CLASSES
    weights = read.model().state_dict()
    assert all(torch.equal(value, weights[name.removeprefix("model.")]) for name, value in made["state_dict"].items())
    assert not torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "best.ckpt.sha256"]


def test_the_sidecar_is_what_sha256sum_checks(tmp_path):
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


def test_a_missing_sidecar_is_a_warning(tmp_path, capsys):
    path = written(tmp_path)
    path.with_name("best.ckpt.sha256").unlink()
    checkpoint.read(path)
    assert "best.ckpt.sha256 is missing" in capsys.readouterr().err


def test_a_pickled_command_is_refused_and_does_not_run(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    path = tmp_path / "evil.ckpt"
    torch.save(content(payload=Touch(marker)), path)
    torch.load(path, weights_only=False)
    assert marker.exists(), "the payload must fire under a careless load, or this test shows nothing"
    marker.unlink()
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match=r"evil.ckpt is not a checkpoint that can be read safely"):
        checkpoint.read(path)
    path.write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(CheckpointError, match=r"can be read safely"):
        checkpoint.read(path)
    assert not marker.exists()


@pytest.mark.parametrize("target", ["os.system", "torch.load", "segdeconv.models.base.Thing", "builtins.eval"])
@pytest.mark.parametrize("place", ["model", "augment", "facts"])
def test_a_config_that_names_foreign_code_is_refused_wherever_it_stands(tmp_path, target, place):
    made = content()
    remembered = made["hyper_parameters"]
    (remembered if place == "facts" else remembered["config"])[place] = {"x": {"_target_": target}}
    if place == "facts":
        remembered["facts"]["classes"] = CLASSES.to_dict()
    path = tmp_path / "evil.ckpt"
    checkpoint.write(made, path)
    with pytest.raises(CheckpointError, match=f"names {target}, which is not of segdeconv"):
        checkpoint.read(path)
    if place != "facts":
        checkpoint.read(path, trust=[target])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hyper_parameters": {}}, "is not a checkpoint of segdeconv"),
        ({"segdeconv": {"format": 999}}, "has format 999 and this version reads 1 - upgrade"),
        ({"segdeconv": {}}, "has format None"),
    ],
)
def test_a_foreign_or_newer_file_is_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(written(tmp_path, **changes))


def test_weights_that_are_not_the_configs_are_refused(tmp_path):
    made = content()
    made["state_dict"].popitem()
    checkpoint.write(made, tmp_path / "best.ckpt")
    with pytest.raises(CheckpointError, match="does not hold the weights its config names"):
        checkpoint.read(tmp_path / "best.ckpt").model()


def test_an_address_and_a_missing_file_are_refused():
    with pytest.raises(UsageError, match="is an address - download"):
        checkpoint.read("https://example.org/best.ckpt")
    with pytest.raises(UsageError, match=r"there is no checkpoint nowhere.ckpt"):
        checkpoint.read("nowhere.ckpt")


def test_a_writer_that_is_killed_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.write(content(), path)
    writer = (
        "import torch, itertools\n"
        "from pathlib import Path\n"
        "from segdeconv.checkpoints import checkpoint\n"
        f"path = Path({str(path)!r})\n"
        "made = checkpoint.load_plain(path)\n"
        "made['ballast'] = torch.zeros(400_000)\n"
        "print('ready', flush=True)\n"
        "for count in itertools.count():\n"
        "    made['count'] = count\n"
        "    checkpoint.write(made, path)\n"
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


@pytest.mark.parametrize("room", [100, 3_000, 9_000])
def test_a_disk_that_is_full_at_any_byte_is_said_as_such_and_the_old_file_stays(tmp_path, room):
    """torch meets the full disk twice, and what it says the second time is of its own archive."""
    path = written(tmp_path)
    before = path.read_bytes()
    assert len(before) > 10_000
    writer = (
        "import resource, sys\nfrom pathlib import Path\nfrom segdeconv.checkpoints import checkpoint\n"
        f"path = Path({str(path)!r})\nmade = checkpoint.load_plain(path)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "try:\n    checkpoint.write(made, path)\nexcept OSError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", writer], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert "File too large" in done.stdout, done.stderr
    assert "best.ckpt" in done.stdout
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "best.ckpt.sha256"]


@pytest.mark.parametrize("nth", [1, 2, 7])
@pytest.mark.parametrize(
    "struck", [RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "), SystemExit(143)]
)
def test_what_a_signal_says_in_the_midst_of_a_write_is_what_is_heard(tmp_path, monkeypatch, nth, struck):
    """torch raises the death of a worker wherever the program is, and then cannot close its archive either."""

    class Struck(io.BytesIO):
        writes = 0

        def open(self, mode):
            return self

        def write(self, content):
            self.writes += 1
            if self.writes == nth:
                raise struck
            return super().write(content)

    @contextlib.contextmanager
    def replacing_path(path):
        yield Struck()

    path = written(tmp_path)
    monkeypatch.setattr(checkpoint, "replacing_path", replacing_path)
    with pytest.raises(type(struck), match=r"is killed by signal|143"):
        checkpoint.write({"weights": torch.ones(5000)}, path)


def test_a_writer_that_is_cut_twice_before_its_rename_leaves_a_checkpoint_that_its_sidecar_knows(tmp_path, monkeypatch):
    """The sidecar is renewed first; the second cut must not make it forget the file that is still there."""
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
    for _ in range(9):  # the same step again and again
        with pytest.raises(KeyboardInterrupt):
            checkpoint.write({**checkpoint.load_plain(path), "count": 1}, path)
        checkpoint.verify(path)


def test_every_flipped_bit_and_every_cut_is_noticed_before_a_tensor_is_read(tmp_path, monkeypatch):
    """400 of 400; torch.load alone takes most flips without a word."""
    path = written(tmp_path)
    whole = path.read_bytes()
    random = np.random.default_rng(0)

    def read_too_early(*_, **__):
        raise AssertionError("a damaged file was handed to torch")

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
    made = content()
    name, value = next((name, value) for name, value in made["state_dict"].items() if value.is_floating_point())
    value.view(-1)[0] = number
    with pytest.raises(CheckpointError, match=rf"holds weights that are not finite \({name}\)"):
        checkpoint.read(written(tmp_path, state_dict=made["state_dict"]))


GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.ckpt")), ids=lambda path: path.stem)
def test_checkpoints_of_earlier_versions_are_read_and_score_as_they_did(path, commands, tmp_path):
    """Written by the versions that their names say, on Shapes; the numbers beside them are of then."""
    read = checkpoint.read(path)
    assert not torch.serialization.get_unsafe_globals_in_checkpoint(path)
    image = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    with torch.no_grad():
        logits = read.model()(image)
    then = json.loads(path.with_suffix(".json").read_text())
    assert logits.sum(dim=(0, 2, 3)).tolist() == pytest.approx(then["logits"], rel=1e-4)
    done = commands("evaluate", path, "--out", "out", cwd=tmp_path)
    assert done.code == 0, done.err
    now = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [entry["name"] for entry in now["classes"]] == then["classes"]
    assert now["miou"] == pytest.approx(then["miou"], abs=1e-4)
