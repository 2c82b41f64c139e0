"""Shards in a local stand-in of S3: training that is killed, and a storage that cuts, hangs, lies and refuses."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
from fresh_commands import child_environment
from http_server import serving, whole
from stand_in_s3 import KEYS, stand_in

from segdeconv.checkpoints import checkpoint
from segdeconv.data import Folder, Shards
from segdeconv.data import shard_files as files
from segdeconv.data.shard_writer import write_shards
from segdeconv.errors import UsageError

pytestmark = pytest.mark.extras

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of 24 images, with the same in 9 shards of train and 3 of val beside it."""
    root = tmp_path_factory.mktemp("remote")
    fakes.folder(root / "own", num=12)
    splits = [Folder(split, str(root / "own"), val_share=0.25) for split in ("train", "val")]
    write_shards(splits, root / "shards", shard_size=14 << 10)
    return root


@pytest.fixture(scope="module")
def endpoint():
    with stand_in() as server:
        yield server.endpoint


@pytest.fixture
def address(own, endpoint, monkeypatch):
    """The address of the shards in a bucket, with the credentials in the environment."""
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    request = urllib.request.Request(f"{endpoint}/bucket", method="PUT", headers={"Authorization": "AWS someone:x"})
    urllib.request.urlopen(request).close()
    # In a process of its own, since obstore's threads do not survive the forks of other tests.
    code = "import sys, pathlib, obstore\nfrom obstore.store import S3Store\nstore = S3Store('bucket')\n"
    code += "for p in pathlib.Path(sys.argv[1]).iterdir(): obstore.put(store, f'some/set/{p.name}', p)"
    subprocess.run([sys.executable, "-c", code, str(own / "shards")], check=True)
    return "s3://bucket/some/set"


def test_samples_come_from_the_storage(own, address, tmp_path):
    expected = Folder("train", str(own / "own"), val_share=0.25)
    dataset = Shards("train", address, shard_cache=str(tmp_path))
    assert dataset.names == expected.names
    assert len(dataset.shards) > 5
    for index in (0, 11, 5):
        np.testing.assert_array_equal(dataset[index].image, expected[index].image)
        np.testing.assert_array_equal(dataset[index].mask, expected[index].mask)


@pytest.mark.parametrize(
    ("root", "environment", "message"),
    [
        ("s3://bucket/other", {}, r"s3://bucket/other/index\.json is missing - check dataset\.root"),
        ("s3://nothing/set", {}, r"s3://nothing/set/index\.json is missing - check dataset\.root"),
        ("s3://bucket/some/set", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
         r"s3://bucket/some/set/index\.json cannot be read after 3 tries \(.+\) - check the address"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(address, tmp_path, monkeypatch, root, environment, message):
    monkeypatch.setattr(files, "PAUSE", 0.01)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        Shards("train", root, shard_cache=str(tmp_path))


class _Storage:
    """A storage with the good answers of S3, and bad ones for the next requests of one shard."""

    def __init__(self, server, folder: Path) -> None:
        self.server, self.bad = server, []
        for path in folder.iterdir():
            server.answers[f"/bucket/set/{path.name}"] = self._answer(path.name, path.read_bytes())

    def _answer(self, name, content):
        def answer(handler):
            bad = self.bad.pop(0) if self.bad and name == "train-00000.tar" else whole
            bad(content)(handler)

        return answer


def _cut(content):
    def answer(handler):
        handler.head(200, Content_Length=len(content), ETag='"a"', Last_Modified="Mon, 01 Jan 2024 00:00:00 GMT")
        handler.wfile.write(content[: len(content) // 2])

    return answer


def _hang(content):
    def answer(handler):
        handler.head(200, Content_Length=len(content))
        handler.wfile.write(content[:1000])
        handler.wfile.flush()
        time.sleep(3)

    return answer


def _slow(content):
    def answer(handler):
        handler.head(200, Content_Length=len(content))
        for start in range(0, len(content), 1 + len(content) // 8):
            handler.wfile.write(content[start : start + 1 + len(content) // 8])
            handler.wfile.flush()
            time.sleep(0.3)

    return answer


def _changed(content):
    return whole(content[:-1] + b"?")


def _shorter(content):
    return whole(content[:-512])


def _denied(_):
    return lambda handler: handler.head(403, Content_Length=0)


@pytest.fixture
def storage(own, monkeypatch):
    monkeypatch.setattr(files, "PAUSE", 0.01)
    monkeypatch.setattr(files, "READ_TIMEOUT", 1)
    with serving() as server:
        url = f"http://127.0.0.1:{server.server_port}"
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": url, "AWS_SKIP_SIGNATURE": "true"}.items():
            monkeypatch.setenv(name, value)
        yield _Storage(server, own / "shards")


@pytest.mark.parametrize("bad", [_cut, _hang, _slow, _changed, _shorter, _denied])
def test_an_answer_that_is_bad_once_is_asked_for_again(own, storage, tmp_path, bad):
    storage.bad = [bad]
    dataset = Shards("train", "s3://bucket/set", shard_cache=str(tmp_path))
    np.testing.assert_array_equal(dataset[0].image, Folder("train", str(own / "own"), val_share=0.25)[0].image)
    assert not storage.bad


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (_changed, r"does not have the hash in the index - restore it"),
        (_shorter, r"has \d+ of \d+ bytes - restore it"),
        (_denied, r"cannot be read after 3 tries \(.+\) - check the address"),
    ],
)
def test_answers_that_stay_bad_name_the_shard(storage, tmp_path, bad, message):
    dataset = Shards("train", "s3://bucket/set", shard_cache=str(tmp_path))
    storage.bad = [bad] * 100
    with pytest.raises(UsageError, match=rf"^s3://bucket/set/train-00000\.tar {message}"):
        dataset[0]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith("train-00000.tar")]


def test_processes_fetch_a_shard_once(own, storage, tmp_path):
    dataset = Shards("train", "s3://bucket/set", shard_cache=str(tmp_path))
    threads = [threading.Thread(target=lambda: dataset[0]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    paths = [path for path, _ in storage.server.requests]
    assert paths.count("/bucket/set/train-00000.tar") == 1


# Killed and resumed


def test_shards_that_are_fetched_at_once_stay_below_the_limit(tmp_path):
    contents = {f"train-{number}.tar": bytes([number]) * 10 for number in range(4)}
    together = threading.Barrier(len(contents))

    class AtOnce(files.ShardFolder):
        def _download(self, file, path):
            together.wait(20)
            path.write_bytes(contents[file])

    folder = AtOnce("https://localhost/set", str(tmp_path), 20 / 2**30)
    fetches = [
        threading.Thread(target=folder.path, args=(name, 10, hashlib.sha256(content).hexdigest()))
        for name, content in contents.items()
    ]
    for fetch in fetches:
        fetch.start()
    for fetch in fetches:
        fetch.join()
    assert sorted(path.stat().st_size for path in tmp_path.glob("*.tar")) == [10, 10]


def _command(address, run, cache):
    options = (
        "dataset=shards", f"dataset.root={address}", "dataset.window=3", f"dataset.shard_cache={cache}",
        f"dataset.shard_cache_size={110e3 / 2**30}", "dataset.size=[32,32]", "dataset.batch_size=2", "auto=[]",
        "dataset.num_workers=2", "dataset.cache=none", "model.stages=[[4],[8]]", "trainer.max_epochs=8",
        "trainer.precision=32-true", f"hydra.run.dir={run}",
    )  # fmt: skip
    return [sys.executable, str(ROOT / "scripts/train.py"), *options]


def _lines(run: Path) -> int:
    path = run / "metrics.csv"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(address, tmp_path):
    environment = child_environment(ROOT, OMP_NUM_THREADS="1")
    whole_run = _command(address, tmp_path / "whole", tmp_path / "cache1")
    done = subprocess.run(whole_run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    killed, log = 0, (tmp_path / "log.txt").open("w")
    for rows in (2, 4, 6):  # rows of metrics.csv after which the run is killed
        words = [*_command(address, tmp_path / "killed", tmp_path / "cache2"), "resume=auto"]
        process = subprocess.Popen(
            words, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and _lines(tmp_path / "killed") < rows:
            time.sleep(0.005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    log.close()
    assert killed == 3, (tmp_path / "log.txt").read_text()
    words = [*_command(address, tmp_path / "killed", tmp_path / "cache2"), "resume=auto"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "whole/metrics.csv").read_text() == (tmp_path / "killed/metrics.csv").read_text()
    first, second = (checkpoint.load_plain(tmp_path / name / "last.ckpt")["state_dict"] for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # The cache never held all shards, and holds nothing that a killed process had not finished.
    assert len(list((tmp_path / "cache2").glob("*-train-*.tar"))) < 9
    assert sum(path.stat().st_size for path in (tmp_path / "cache2").glob("*.tar")) <= 110e3
