"""Prediction and evaluation by the workers of a Ray cluster, compared with one process."""

import json
import os
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
from test_parts import contents

pytestmark = pytest.mark.extras
ROOT = Path(__file__).parents[2]
DATA = {"_target_": "segdeconv.data.Shapes", "num_train": 2, "num_val": 23, "side": 128, "batch_size": 2}
NUM_IMAGES = 120
WORKERS = ("--engine", "ray", "--workers", "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a network, images of which one is damaged, and their prediction in one process."""
    folder = tmp_path_factory.mktemp("place")
    fakes.untrained(folder / "a.ckpt", {**DATA, "size": None})
    random = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for index in range(NUM_IMAGES):
        coarse = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((320, 240)).save(folder / "photos" / f"{index:03d}.png")
    (folder / "photos" / "broken.png").write_bytes(b"no image")
    done = finished(start(folder, "predict", *predict_words("one")))
    assert done.returncode == 2, done.stderr
    return folder


def predict_words(out):
    return ("a.ckpt", "photos", "--out", out)


def start(folder, script, *words):
    path = ROOT / "scripts" / f"{script}.py"
    command = [sys.executable, str(path), *map(str, words)]
    environment = child_environment(ROOT, OMP_NUM_THREADS="1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def finished(process):
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(folder, script, *words):
    return finished(start(folder, script, *words))


def wait_for_images(process, out):
    """Wait until some images are recorded, and fail if all are."""
    log = out / "predictions.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    assert log.read_bytes().count(b"\n") <= NUM_IMAGES


def processes_below(process):
    """Return the ids and names of all processes that a process has started, directly or not."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(folder.name)] = (folder / "cmdline").read_text()
            except OSError:
                continue
    below = {process}
    for _ in range(8):
        below |= {child for child, parent in parents.items() if parent in below}
    return {child: names[child] for child in below - {process}}


def is_worker(name):
    return name.startswith("ray::MapWorker")


def test_a_killed_worker_is_replaced_and_everything_is_as_of_one_process(place):
    process = start(place, "predict", *predict_words("killed"), *WORKERS)
    wait_for_images(process, place / "killed")
    workers = [child for child, name in processes_below(process.pid).items() if is_worker(name)]
    assert len(workers) == 2
    # Ray would give them the lowest of priorities, so that they stand still beside any other busy process.
    assert {os.getpriority(os.PRIO_PROCESS, each) for each in workers} == {os.getpriority(os.PRIO_PROCESS, process.pid)}
    os.kill(workers[0], signal.SIGKILL)
    done = finished(process)
    assert done.returncode == 2, done.stderr
    assert "a worker was lost and replaced" in done.stdout
    assert done.stdout.count("skipped: photos/broken.png") == 1
    assert f"{NUM_IMAGES} masks in killed, with statistics.csv" in done.stdout
    assert "ray" not in (done.stdout + done.stderr).lower()
    assert done.stderr.splitlines()[-1].startswith(f"segdeconv: error: 1 of {NUM_IMAGES + 1} files could not be read")
    assert contents(place / "killed") == contents(place / "one")


def test_a_killed_command_leaves_no_worker_and_is_resumed(place):
    process = start(place, "predict", *predict_words("resumed"), *WORKERS)
    wait_for_images(process, place / "resumed")
    started = processes_below(process.pid)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while any(is_worker(_name(child)) for child in started):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    done = run(place, "predict", *predict_words("resumed"), *WORKERS)
    assert "already done and skipped" in done.stdout
    assert contents(place / "resumed") == contents(place / "one")


def _name(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def test_an_evaluation_has_the_report_of_one_process(place):
    words = ("a.ckpt", "--out", "report", "--masks", "masks")
    reports = []
    for engine in ((), WORKERS):
        done = run(place, "evaluate", *words, *engine)
        assert done.returncode == 0, done.stderr
        report = json.loads((place / "report" / "report.json").read_text())
        del report["command"]
        reports.append((report, done.stdout, contents(place / "masks")))
    assert reports[0] == reports[1]


def test_messages_name_the_cluster_and_the_workers(place):
    for words, message in (
        (
            ("--engine", "ray", "--ray-address", "127.0.0.1:1"),
            "--ray-address: no Ray cluster that can",
        ),
        (("--engine", "ray", "--workers", "99999"), "--workers=99999 is more than the"),
    ):
        done = run(place, "predict", *predict_words("refused"), *words)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(f"segdeconv: error: {message}"), done.stderr


class Deadly:
    """Work of which one chunk ends every worker."""

    def start(self, report):
        def process(chunk):
            if chunk == [3]:
                os.kill(os.getpid(), signal.SIGKILL)
            return chunk

        return process

    def describe(self, chunk):
        return f"image {chunk[0]}"


class Failing(Deadly):
    """Work that fails with an error for the user, or one of ours."""

    def __init__(self, error):
        self.error = error

    def start(self, report):
        raise self.error


CASES = {
    "Deadly()": "UsageError: 4 workers died one after another with the same images (image 3)",
    "Failing(UsageError('photo - way out'))": "UsageError: photo - way out",
    "Failing(OSError(28, 'No space left', 'mask.png'))": "OSError: [Errno 28] No space left: 'mask.png'",
    "Failing(ZeroDivisionError('a bug'))": "ZeroDivisionError: a bug",
}


@pytest.mark.parametrize("work", CASES)
def test_no_error_is_swallowed(work):
    code = f"""
from test_distributed import Deadly, Failing
from segdeconv.errors import UsageError
from segdeconv.inference import distributed
with distributed.cluster(distributed.RaySettings(workers=1)) as workers:
    try:
        list(distributed.run({work}, [[index] for index in range(6)], workers, print))
    except Exception as error:
        print(type(error).__name__, error, sep=": ")
"""
    environment = child_environment(ROOT, ROOT / "tests", ROOT / "tests" / "inference", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert CASES[work] in done.stdout, done.stdout + done.stderr
