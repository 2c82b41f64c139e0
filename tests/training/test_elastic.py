"""Training on nodes that are lost: two agents of torchrun on this machine, one of which is killed with its process."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fresh_commands import child_environment

from segdeconv.checkpoints import checkpoint

ROOT = Path(__file__).parents[2]
CONFIG = (
    "dataset=shapes", "dataset.num_train=128", "dataset.num_val=8", "dataset.batch_size=2", "dataset.num_workers=0",
    "model.stages=[[4],[8]]", "trainer.max_epochs=6", "trainer.accelerator=cpu", "trainer.devices=1",
    "trainer.num_nodes=2", "trainer.precision=32-true", "resume=auto", "auto=[]",
)  # fmt: skip


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def agent(folder, run, port):
    """Start an agent in a session of its own, as on a machine of its own; it is found by the port of its run."""
    words = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3",
        "--rdzv-backend", "c10d", "--rdzv-id", run, "--rdzv-endpoint", f"127.0.0.1:{port}",
        "--rdzv-conf", "keep_alive_interval=1,keep_alive_max_attempt=3,timeout=240",
        str(ROOT / "scripts" / "train.py"), *CONFIG, f"hydra.run.dir={run}",
    ]  # fmt: skip
    environment = child_environment(ROOT, OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    with (folder / f"{run}-{time.monotonic_ns()}.log").open("w") as log:
        return subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def children(process):
    done = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in done.stdout.split()]


def wait(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def train(folder, run, *, lose_a_node):
    port = free_port()
    first = agent(folder, run, port)
    wait(lambda: listens(port))
    agents = [first, agent(folder, run, port)]
    metrics = folder / run / "metrics.csv"
    try:
        if lose_a_node:
            wait(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3)
            for process in (agents[1].pid, *children(agents[1])):
                os.kill(process, signal.SIGKILL)
            agents.append(agent(folder, run, port))
            agents.pop(1).wait()
        logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
        assert [process.wait(300) for process in agents] == [0, 0], logs
    finally:
        for process in agents:
            for number in (process.pid, *children(process)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
    return metrics.read_bytes(), checkpoint.load_plain(folder / run / "last.ckpt")["state_dict"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="agents are started for Linux")
def test_a_lost_node_that_is_replaced_changes_no_bit(tmp_path):
    metrics, weights = train(tmp_path, "whole", lose_a_node=False)
    disturbed, others = train(tmp_path, "disturbed", lose_a_node=True)
    assert disturbed == metrics
    assert len(metrics.splitlines()) == 7
    assert all(torch.equal(weights[name], others[name]) for name in weights)
