"""Commands whose standard streams fail, that are interrupted more than once, or that lose their folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fakes
import numpy as np
import pytest
from fresh_commands import child_environment
from PIL import Image

ROOT = Path(__file__).parents[2]
SLIM = (
    "dataset=folder", "dataset.root=mine", "model.stages=[[4],[8]]", "dataset.batch_size=2", "dataset.num_workers=0",
    "trainer.precision=32-true", "logger=none", "dataset.size=[32,32]", "hydra.run.dir=run", "auto=[]",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, commands):
    place = tmp_path_factory.mktemp("streams")
    fakes.folder(place / "mine", layout="lists")
    done = commands("train", *SLIM, "trainer.max_epochs=1", cwd=place)
    assert done.code == 0, done.err
    return place


@pytest.fixture
def place(trained, tmp_path):
    shutil.copytree(trained / "mine", tmp_path / "mine")
    shutil.copyfile(trained / "run" / "best.ckpt", tmp_path / "best.ckpt")
    shutil.copyfile(trained / "run" / "best.ckpt.sha256", tmp_path / "best.ckpt.sha256")
    (tmp_path / "photos").mkdir()
    random = np.random.default_rng(0)
    for number in range(60):
        image = random.integers(0, 256, (96, 96, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "photos" / f"{number:02d}.png")
    return tmp_path


def checked(outcome):
    """Return the exit code and standard error of a command, which must have no traceback."""
    assert "Traceback" not in outcome.err, outcome.err
    assert "Exception" not in outcome.err, outcome.err
    return outcome.code, outcome.err


LIMITS = {
    "pipe": {"stdout": "closed pipe"},
    "full": {"stdout": "full device"},
    "closed": {"closed": (1,)},
    "stderr closed": {"closed": (2,)},
}


PRINTING = {
    "describe": ("describe", "model=segnet_basic", "classes=3"),
    "help": ("predict", "--help"),
    "script's help": ("train", "--help"),
    "inspect_data": ("inspect_data", "dataset=folder", "dataset.root=mine"),
    "evaluate": ("evaluate", "best.ckpt", "--no-boundary", "--out", "scores"),
}


@pytest.mark.parametrize("name", PRINTING)
@pytest.mark.parametrize("stdout", ["pipe", "full", "closed"])
def test_a_command_that_prints_completes_without_its_reader(commands, place, name, stdout):
    code, err = checked(commands(*PRINTING[name], cwd=place, limits=LIMITS[stdout]))
    expected = {"pipe": (0,), "full": (5,), "closed": (0,)}[stdout]
    assert code in expected, err
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == (stdout == "full"), err
    if stdout == "full":
        assert "cannot read or write standard output: No space left on device" in err
    elif name == "inspect_data":
        assert (place / "inspection" / "inspect.html").is_file()
    elif name == "evaluate":
        assert (place / "scores" / "report.json").is_file()


def test_predict_stops_without_its_reader_and_resumes(commands, place):
    words = ("predict", "best.ckpt", "photos", "--no-overlay", "--out", "out")
    assert checked(commands(*words, cwd=place))[0] == 0
    (place / "out" / "05.png").unlink()
    code, err = checked(commands(*words, cwd=place, limits=LIMITS["pipe"]))
    assert code == 141, err
    assert err == "segdeconv: error: stopped because the reader of the output has ended - run the same command again\n"
    assert checked(commands(*words, cwd=place)) == (0, "")
    assert len(list((place / "out").glob("*.png"))) == 60


def test_predict_reports_files_that_were_passed_over_without_its_reader(commands, place):
    (place / "photos" / "00.png").write_text("no image")
    words = ("predict", "best.ckpt", "photos", "--no-overlay", "--out", "out")
    code, err = checked(commands(*words, cwd=place, limits=LIMITS["pipe"]))
    assert code == 2
    assert "stopped because the reader of the output has ended, and 1 of 60 files could not be read" in err


@pytest.mark.parametrize("stdout", ["pipe", "full", "closed", "stderr closed"])
def test_train_saves_without_its_reader_and_resumes(commands, place, stdout):
    words = ("train", *SLIM, "trainer.max_epochs=3", "resume=auto")
    code, err = checked(commands(*words, cwd=place, limits=LIMITS[stdout]))
    if stdout == "pipe":
        assert code == 141, err
        (line,) = error_lines(err)
        assert "stopped because the reader of the output has ended at step 1, saved in run/last.ckpt - resume" in line
    elif stdout == "full":
        assert code == 5, err
        assert len(error_lines(err)) == 1
    else:
        assert code == 0, err
    code, err = checked(commands(*words, cwd=place))
    assert code == 0, err
    assert json.loads((place / "run" / "report.json").read_text())["complete"]


def error_lines(err):
    return [line for line in err.splitlines() if not line.startswith("segdeconv: warning: ")]


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


INTERRUPTED = {
    "predict": (("predict", "best.ckpt", "photos", "--out", "out"), "out/03.png"),
    "predict at the start": (("predict", "best.ckpt", "photos", "--out", "out"), ""),
    "evaluate": (("evaluate", "best.ckpt", "--scales", "1,2,3,4", "--flip", "--masks", "out"), "out"),
    "inspect_data": (("inspect_data", "dataset=folder", "dataset.root=mine"), ""),
    "train": (("train", *SLIM, "trainer.max_epochs=500"), "run/last.ckpt"),
    "train before": (("train", *SLIM, "trainer.max_epochs=500"), "run"),
    "train before anything": (("train", *SLIM, "trainer.max_epochs=500"), ""),
}


@pytest.mark.parametrize("name", INTERRUPTED)
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("gap", [0.02, *(pytest.param(gap, marks=pytest.mark.slow) for gap in (0.0005, 0.004, 0.1))])
def test_a_second_signal_changes_nothing(commands, place, name, number, code, gap):
    words, file = INTERRUPTED[name]
    begun = place / "begun"
    started = commands.start(*words, cwd=place, begun=begun)
    wait_for(begun.exists)
    if file:
        wait_for((place / file).exists)
    else:
        time.sleep(0.05)
    for _ in range(2):
        os.kill(started.pid, number)
        time.sleep(gap)
    ended, err = checked(started.end())
    lines = error_lines(err)
    assert (ended, len(lines)) == (code, 1), err
    assert lines[0].startswith("segdeconv: error: ")
    if name == "train":
        assert "saved in run/last.ckpt" in lines[0]


REPLACING = """
import os, signal, sys
from segdeconv.cli.command import run_command
from segdeconv.errors import UsageError
def main():
    try:
        os.kill(os.getpid(), signal.{name})
        signal.pause()
    except BaseException:
        raise {error}("replaced")
run_command(main)
"""


@pytest.mark.parametrize("error", ["UsageError", "ValueError"])
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_library_that_replaces_the_exception_of_a_signal_changes_nothing(name, code, error):
    script = REPLACING.format(name=name, error=error)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=child_environment(ROOT), check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert "run the same command again" in done.stderr


@pytest.mark.parametrize("logger", ["tensorboard", "none"])
def test_a_run_folder_that_is_removed_is_one_line(commands, place, logger):
    words = [word for word in SLIM if not word.startswith("logger=")]
    started = commands.start("train", *words, "trainer.max_epochs=500", f"logger={logger}", cwd=place)
    wait_for((place / "run" / "last.ckpt").exists)
    while (place / "run").exists():
        shutil.rmtree(place / "run", ignore_errors=True)
    code, err = checked(started.end())
    assert (code, len(error_lines(err))) == (5, 1), err
    assert "run was removed during the run" in err or "its folder was removed" in err


@pytest.mark.slow
def test_a_real_pipeline_ends_with_the_documented_codes(place):
    def shell(line):
        script = f"set -o pipefail; {line}"
        done = subprocess.run(
            ["bash", "-c", script], cwd=place, capture_output=True, text=True, env=child_environment(ROOT), check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode

    scripts = f"{sys.executable} {ROOT}/scripts"
    assert shell(f"{scripts}/describe.py model=segnet | head -1") == 0
    assert shell(f"{scripts}/describe.py --help | true") == 0
    assert shell(f"{scripts}/describe.py model=segnet > /dev/full") == 5
    assert shell(f"{scripts}/describe.py model=segnet >&-") == 0
    assert shell(f"{scripts}/predict.py best.ckpt photos --out out | true") == 141
    assert shell(f"{scripts}/predict.py best.ckpt photos --out out >&- 2>&-") == 0
    assert shell(f"{scripts}/train.py {' '.join(SLIM)} trainer.max_epochs=3 | head -1") == 141
    assert shell(f"{scripts}/train.py {' '.join(SLIM)} trainer.max_epochs=3 resume=auto 2>&-") == 0
