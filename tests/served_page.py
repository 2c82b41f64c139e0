"""The served page: a small checkpoint for it, the real command, and requests to it."""

import contextlib
import http.client
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import fakes
import torch
from checkpoint_files import content
from fresh_commands import child_environment
from PIL import Image

from segdeconv.checkpoints import checkpoint
from segdeconv.models import SegNet

ROOT = Path(__file__).parents[1]
EVIL = "<img src=x onerror=alert(1)>"
NAMES = ("sky", EVIL, "car")
STAGES = [[4], [8], [8]]


def write_checkpoint(folder):
    """Write the checkpoint of a random network with input size 40x56 and HTML in a class name; return its path."""
    torch.manual_seed(0)
    model = SegNet(len(NAMES), stages=tuple(map(tuple, STAGES)), dropout_at="central")
    written = content()
    metadata, config = written["hyper_parameters"]["facts"], written["hyper_parameters"]["config"]
    metadata["classes"] |= {
        "names": list(NAMES),
        "colours": [[250, 0, 0], [0, 250, 0], [0, 0, 250]],
        "labels": [0, 1, 2],
    }
    metadata["preprocessing"] = {"size": None, "mean": [120.0, 110.0, 100.0], "std": [60.0, 61.0, 62.0]}
    metadata["precision"] = "32-true"
    config["model"] = {"_target_": "segdeconv.models.SegNet", "stages": STAGES, "dropout_at": "central"}
    config["dataset"] = {"size": [40, 56], "crop": None, "max_pixels": 1_000_000}
    written["state_dict"] = {f"model.{name}": value for name, value in model.state_dict().items()}
    path = folder / "best.ckpt"
    checkpoint.write(written, path)
    return path


@contextlib.contextmanager
def running(path, *words):
    """Run the real command and yield its address and process."""
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), str(path), "--port", "0", *words]
    environment = child_environment(ROOT, OMP_NUM_THREADS="1")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline()
            assert "http://" in line, process.stderr.read()
            yield re.search(r"http://(\S+)/", line)[1], process
        finally:
            process.kill()


def image_file(seed=3, size=(83, 121), kind="PNG", **settings):
    """Encode a random image and return the bytes of the file."""
    file = io.BytesIO()
    Image.fromarray(fakes.image_and_mask(seed, 3, size)[0]).save(file, format=kind, **settings)
    return file.getvalue()


def request(address, method, target, body=None, **headers):
    """Send a request and return status, headers and body of the response; a header of None is left out."""
    connection = http.client.HTTPConnection(address, timeout=30)
    sent = {"Content-Type": "application/octet-stream", "Host": address} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    if body is not None and "Content-Length" not in sent:
        sent["Content-Length"] = str(len(body))
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    result = response.status, response.headers, response.read()
    connection.close()
    return result


def error_message(result):
    return json.loads(result[2])["error"]
