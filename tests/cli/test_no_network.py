"""No command opens a connection that was not asked for: in a network namespace without a network, and in a trace."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fakes
import pytest

ROOT = Path(__file__).parents[2]
SLIM = (
    "dataset=folder", "dataset.root=mine", "dataset.size=[32,32]", "dataset.batch_size=2", "model.stages=[[4],[8]]",
    "trainer.max_epochs=1", "trainer.precision=32-true",
)  # fmt: skip
ROAD = (
    ("train", *SLIM, "dataset.num_workers=1", "hydra.run.dir=run"),
    ("train", *SLIM, "dataset.num_workers=1", "hydra.run.dir=run", "resume=auto"),
    ("evaluate", "run/best.ckpt"),
    ("predict", "run/best.ckpt", "mine/images"),
    ("inspect_data", "dataset=folder", "dataset.root=mine"),
    ("describe", "model=segnet"),
)


def test_the_whole_road_needs_no_network(tmp_path, commands):
    fakes.folder(tmp_path / "mine")
    for words in ROAD:
        done = commands(*words, cwd=tmp_path, limits={"no_network": True})
        assert done.code == 0, (words, done.err)


@pytest.mark.slow
def test_two_processes_need_only_the_loopback(tmp_path, commands):
    fakes.folder(tmp_path / "mine")
    words = ("train", *SLIM, "dataset.num_workers=0", "trainer.accelerator=cpu", "trainer.devices=2")
    done = commands(*words, "hydra.run.dir=run", cwd=tmp_path, limits={"no_network": True}, timeout=120)
    assert done.code == 0, done.err


def test_what_asks_for_the_network_says_in_one_line_that_there_is_none(tmp_path, commands):
    for words in (("dataset=camvid",), ("dataset=voc",)):
        done = commands("train", *words, "hydra.run.dir=run", cwd=tmp_path, limits={"no_network": True})
        assert done.code == 2, done.err
        assert "could not download" in done.sentence
        assert "dataset.root=DIR" in done.sentence


WATCH = """
import sys
asked = []
sys.addaudithook(lambda event, arguments: asked.append(event) if event in
    ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request") else None)
import segdeconv.train, segdeconv.evaluation.evaluate, segdeconv.export.export, segdeconv.training.tuning
import segdeconv.cli, segdeconv.serving.server, segdeconv.summary.summary
import albumentations, torchvision, pytorch_lightning, tensorboard
print(asked)
"""


def test_importing_asks_nobody_anything(tmp_path):
    """An audit hook sees a connection even where a library swallows that it failed, as albumentations' check does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("NO_ALBUMENTATIONS_UPDATE", None)
    done = subprocess.run([sys.executable, "-c", WATCH], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(ROAD)))
def test_a_trace_of_every_command_shows_no_connection(tmp_path, commands, index):
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    fakes.folder(tmp_path / "mine")
    if index:
        assert commands(*ROAD[0], cwd=tmp_path).code == 0
    script, *words = ROAD[index]
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words]
    traced = [strace, "-f", "-qq", "-e", "trace=connect,sendto", "-o", "trace.txt", *command]
    done = subprocess.run(
        traced, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip("the kernel does not permit tracing")
    assert done.returncode == 0, done.stderr
    assert not re.findall(r".*AF_INET.*", (tmp_path / "trace.txt").read_text())
