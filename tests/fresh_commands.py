"""The real commands in new processes, and an independent computation of their scores."""

import os
import subprocess
import sys
from pathlib import Path

SLIM = ("model.stages=[[4],[8]]", "trainer.max_epochs=2", "dataset.batch_size=2", "dataset.num_workers=0")

ROOT = Path(__file__).parents[1]


def child_environment(*folders, **variables):
    """Return the environment of a child process: this one's, with folders to import from first on PYTHONPATH.

    xdist's variables are left out: plugins of a pytest in the child would take it for a worker of this run.

    Args:
        folders: Folders that are searched before those on this process's PYTHONPATH.
        variables: Additional environment variables.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
    path = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**inherited, "PYTHONPATH": os.pathsep.join(path), **variables}


def command(script, *arguments, cwd, code=0):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=900,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    if code == 2:
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("segdeconv: error: ")
        assert done.stderr.count("segdeconv: error:") == 1
    return done


def iou_by_hand(truths, predictions, num_classes, ignore_index):
    """Return the dataset-level IoU of each class, computed class by class from sets of pixels."""
    ious = []
    for index in range(num_classes):
        both = either = 0
        for truth, prediction in zip(truths, predictions, strict=True):
            counted = truth != ignore_index
            both += int(((truth == index) & (prediction == index) & counted).sum())
            either += int((((truth == index) | (prediction == index)) & counted).sum())
        ious.append(both / either if either else None)
    return ious
