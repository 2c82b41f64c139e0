"""No command opens a connection unless requested: checked in a namespace without network, and by a system trace."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import fakes
import pytest
from fresh_commands import child_environment

ROOT = Path(__file__).parents[2]
SLIM = (
    "dataset=folder", "dataset.root=mine", "dataset.size=[32,32]", "dataset.batch_size=2", "model.stages=[[4],[8]]",
    "trainer.max_epochs=1", "trainer.precision=32-true", "auto=[]",
)  # fmt: skip
WORKFLOW = (
    ("train", *SLIM, "dataset.num_workers=1", "hydra.run.dir=run"),
    ("train", *SLIM, "dataset.num_workers=1", "hydra.run.dir=run", "resume=auto"),
    ("evaluate", "run/best.ckpt"),
    ("predict", "run/best.ckpt", "mine/images"),
    ("rank", "run/best.ckpt", "mine/images"),
    ("rank", "run/best.ckpt", "--suspects"),
    ("inspect_data", "dataset=folder", "dataset.root=mine"),
    ("describe", "model=segnet"),
)


@pytest.mark.slow
def test_the_whole_workflow_needs_no_network(tmp_path, commands):
    fakes.folder(tmp_path / "mine")
    for words in WORKFLOW:
        done = commands(*words, cwd=tmp_path, limits={"no_network": True})
        assert done.code == 0, (words, done.err)


@pytest.mark.slow
def test_two_processes_need_only_the_loopback(tmp_path, commands):
    fakes.folder(tmp_path / "mine")
    words = ("train", *SLIM, "dataset.num_workers=0", "trainer.accelerator=cpu", "trainer.devices=2")
    done = commands(*words, "hydra.run.dir=run", cwd=tmp_path, limits={"no_network": True}, timeout=120)
    assert done.code == 0, done.err


def test_a_download_without_network_is_an_error_message(tmp_path, commands):
    for words in (("dataset=camvid",), ("dataset=voc",)):
        done = commands("train", *words, "hydra.run.dir=run", cwd=tmp_path, limits={"no_network": True})
        assert done.code == 2, done.err
        assert "could not download" in done.error_message
        assert "dataset.root=DIR" in done.error_message


AUDIT = """
import sys
requests = []
sys.addaudithook(lambda event, arguments: requests.append(event) if event in
    ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request") else None)
import segdeconv.train, segdeconv.evaluation.evaluate, segdeconv.export.export, segdeconv.training.tuning
import segdeconv.cli, segdeconv.serving.server, segdeconv.summary.summary
import albumentations, torchvision, pytorch_lightning, tensorboard
print(requests)
"""


@pytest.mark.slow
def test_importing_opens_no_connection(tmp_path):
    """The audit hook records connections even if a library ignores their failure, as albumentations' check does."""
    environment = child_environment(ROOT)
    environment.pop("NO_ALBUMENTATIONS_UPDATE", None)
    done = subprocess.run([sys.executable, "-c", AUDIT], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(WORKFLOW)))
def test_a_trace_of_every_command_shows_no_connection(tmp_path, commands, index):
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    fakes.folder(tmp_path / "mine")
    if index:
        assert commands(*WORKFLOW[0], cwd=tmp_path).code == 0
    script, *words = WORKFLOW[index]
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words]
    traced = [strace, "-f", "-qq", "-e", "trace=connect,sendto", "-o", "trace.txt", *command]
    done = subprocess.run(
        traced, cwd=tmp_path, capture_output=True, text=True, env=child_environment(ROOT), check=False
    )
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip("the kernel does not permit tracing")
    assert done.returncode == 0, done.stderr
    assert not re.findall(r".*AF_INET.*", (tmp_path / "trace.txt").read_text())
