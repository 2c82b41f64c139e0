"""Prediction from and to a local stand-in of S3, compared with folders."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import fakes
import numpy as np
import pytest
from fresh_commands import child_environment
from PIL import Image
from stand_in_s3 import Bucket, stand_in

from segdeconv.data import Folder
from segdeconv.data.shard_writer import write_shards

ROOT = Path(__file__).parents[2]
DATA = {"_target_": "segdeconv.data.Shapes", "num_train": 2, "num_val": 2, "side": 64, "size": [64, 64]}
FROM_DISK = ("--split", "train", "dataset.root=packed")
LOGS = ("predictions.jsonl", ".segdeconv-files")


@pytest.fixture(scope="module")
def server():
    with stand_in() as server:
        yield server


@pytest.fixture(scope="module")
def bucket(server, place):
    bucket = Bucket(server.endpoint)
    bucket.upload(place / "photos", "photos")
    bucket.upload(place / "packed", "packed")
    return bucket


@pytest.fixture(scope="module")
def place(tmp_path_factory, commands):
    """A folder with a network, photos, shards of the same images, and the masks that a folder of them gives."""
    folder = tmp_path_factory.mktemp("place")
    fakes.untrained(folder / "a.ckpt", DATA)
    fakes.folder(folder / "own", num=5)
    splits = [Folder(split, str(folder / "own"), val_share=0.2) for split in ("train", "val")]
    write_shards(splits, folder / "packed", shard_size=8 << 10)
    for split in splits:
        (folder / "photos" / split.split).mkdir(parents=True)
        for name, pair in zip(split.names, split.pairs, strict=True):
            shutil.copy(pair.image, folder / "photos" / split.split / f"{name}{pair.image.suffix}")
    done = commands("predict", "a.ckpt", "photos", "--out", "expected", cwd=folder)
    assert done.code == 0, done.err
    data = {"_target_": "segdeconv.data.Shards", "root": str(folder / "packed"), "size": [64, 64], "batch_size": 1}
    fakes.untrained(folder / "b.ckpt", data)
    done = commands("evaluate", "b.ckpt", *FROM_DISK, *evaluation_folders(folder / "scores"), cwd=folder)
    assert done.code == 0, done.err
    return folder


def start(folder, script, *words, **environment):
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = child_environment(ROOT, OMP_NUM_THREADS="1", **environment)
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def run(folder, script, *words, **environment):
    with start(folder, script, *words, **environment) as process:
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def predict(folder, *words, **environment):
    return run(folder, "predict", "a.ckpt", *words, **environment)


def kill_when_held(server, after, folder, *words, **environment):
    """Start a command and kill it when the storage holds the PNG after so many."""
    with server.held(after) as is_held, start(folder, *words, **environment) as process:
        held = is_held(process)
        process.kill()
        assert held, process.communicate()


def outputs(folder):
    """Return the content of the masks and overlays in a folder by their paths."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


def evaluation_folders(folder):
    return ("--out", f"{folder}/report", "--masks", f"{folder}/masks", "--pictures", f"{folder}/pictures")


def report_of(content):
    """Return the content of report.json without where its inputs and outputs are."""
    report = json.loads(content)
    del report["command"], report["config"]["dataset"]["root"]
    return report


def images_of(objects):
    return {name: content for name, content in objects.items() if name.endswith(".png")}


def test_an_address_without_obstore_says_what_to_install(tmp_path, commands):
    if importlib.util.find_spec("obstore"):
        pytest.skip("obstore is installed")
    fakes.untrained(tmp_path / "a.ckpt", DATA)
    for words in (("s3://bucket/photos",), (tmp_path, "--out", "s3://bucket/masks")):
        done = commands("predict", "a.ckpt", *words, cwd=tmp_path)
        assert done.code == 2
        assert "needs obstore, which is not installed - pip install 'segdeconv[shards]'" in done.error_message


def test_local_shards_give_the_masks_of_their_images(place, tmp_path, commands):
    done = commands("predict", "a.ckpt", "packed", "--out", tmp_path / "out", cwd=place)
    assert done.code == 0, done.err
    assert outputs(tmp_path / "out") == outputs(place / "expected")


@pytest.mark.extras
@pytest.mark.parametrize("source", ["folder", "shards", "list", "object"])
def test_sources_in_a_storage_give_the_masks_of_a_folder(place, bucket, tmp_path, source):
    expected = outputs(place / "expected")
    if source == "list":
        names = sorted(path.relative_to(place / "photos").as_posix() for path in (place / "photos").rglob("*.png"))
        (tmp_path / "list.txt").write_text("\n".join(bucket.address(f"photos/{name}") for name in names))
        expected = {Path(name).name: content for name, content in expected.items()}
    elif source == "object":
        name = next(path.name for path in sorted((place / "photos/val").iterdir()))
        stem = Path(name).stem
        expected = {f"{stem}{end}": expected[f"val/{stem}{end}"] for end in (".png", "_overlay.png")}
    words = {
        "folder": bucket.address("photos"),
        "shards": bucket.address("packed"),
        "list": tmp_path / "list.txt",
        "object": bucket.address(f"photos/val/{name}") if source == "object" else "",
    }
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = predict(place, words[source], "--out", tmp_path / "out", **bucket.environment, **cache)
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path / "out") == expected
    again = predict(place, words[source], "--out", tmp_path / "out", **bucket.environment, **cache)
    count = len(expected) // 2
    assert f"{count} of {count} {'is' if count == 1 else 'are'} already done and skipped" in again.stdout


@pytest.mark.extras
def test_masks_in_a_storage_are_those_of_a_folder_and_are_resumed_on_another_machine(place, bucket, tmp_path):
    count = len(outputs(place / "expected")) // 2
    words = ("photos", "--out", bucket.address("masks"), "--probabilities")
    done = predict(place, *words, **bucket.environment, XDG_CACHE_HOME=str(tmp_path / "first"))
    assert done.returncode == 0, done.stderr
    assert f"{count} masks in {bucket.address('masks')}, with statistics.csv" in done.stdout
    stored = bucket.objects("masks")
    assert images_of(stored) == outputs(place / "expected")
    assert sum(name.endswith(".npy") for name in stored) == count
    assert stored["statistics.csv"] == (place / "expected/statistics.csv").read_bytes()
    left = {path.name for path in (tmp_path / "first/segdeconv/predictions").rglob("*") if path.is_file()}
    assert left == set(LOGS)
    again = predict(place, *words, **bucket.environment, XDG_CACHE_HOME=str(tmp_path / "second"))
    assert f"{count} of {count} are already done and skipped" in again.stdout
    assert {name: content for name, content in bucket.objects("masks").items() if name not in LOGS} == {
        name: content for name, content in stored.items() if name not in LOGS
    }


@pytest.mark.extras
@pytest.mark.parametrize("same_machine", [True, False])
def test_a_killed_prediction_is_resumed_and_counts_each_image_once(place, server, bucket, tmp_path, same_machine):
    prefix = f"killed-{same_machine}"
    words = (bucket.address("photos"), "--out", bucket.address(prefix))
    for attempt in range(2):
        cache = str(tmp_path / ("one" if same_machine else f"{attempt}"))
        environment = {**bucket.environment, "XDG_CACHE_HOME": cache}
        kill_when_held(server, 5, place, "predict", "a.ckpt", *words, **environment)
        assert 5 <= len(images_of(bucket.objects(prefix))) < len(outputs(place / "expected"))
    cache = str(tmp_path / ("one" if same_machine else "last"))
    done = predict(place, *words, **bucket.environment, XDG_CACHE_HOME=cache)
    assert done.returncode == 0, done.stderr
    stored = bucket.objects(prefix)
    assert images_of(stored) == outputs(place / "expected")
    names = [json.loads(line)["name"] for line in stored["predictions.jsonl"].splitlines()[1:]]
    assert sorted(names) == sorted(set(names))
    assert len(stored["statistics.csv"].splitlines()) == len((place / "expected/statistics.csv").read_text().split())


@pytest.mark.extras
def test_ray_workers_read_and_write_the_storage(place, bucket, tmp_path):
    words = (bucket.address("photos"), "--out", bucket.address("ray"), "--engine", "ray", "--workers", "2")
    done = predict(place, *words, **bucket.environment, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert images_of(bucket.objects("ray")) == outputs(place / "expected")


@pytest.mark.extras
@pytest.mark.parametrize("engine", [(), ("--engine", "ray", "--workers", "2")], ids=["one process", "ray"])
def test_an_evaluation_from_and_to_a_storage_is_that_of_folders(place, bucket, tmp_path, engine):
    prefix = f"scores{len(engine)}"
    words = (*FROM_DISK[:2], f"dataset.root={bucket.address('packed')}", *evaluation_folders(bucket.address(prefix)))
    environment = {**bucket.environment, "XDG_CACHE_HOME": str(tmp_path)}
    done = run(place, "evaluate", "b.ckpt", *words, *engine, **environment)
    assert done.returncode == 0, done.stderr
    assert f"report:   {bucket.address(prefix)}/report/report.html (and report.json)" in done.stdout
    assert f"masks:    {bucket.address(prefix)}/masks" in done.stdout
    stored = bucket.objects(prefix)
    assert images_of(stored) == outputs(place / "scores")
    records = {f"{folder}/.segdeconv-files" for folder in ("masks", "pictures")}
    assert stored.keys() - images_of(stored).keys() - records == {"report/report.json", "report/report.html"}
    assert report_of(stored["report/report.json"]) == report_of((place / "scores/report/report.json").read_bytes())
    assert {path.name for path in (tmp_path / "segdeconv/predictions").rglob("*") if path.is_file()} == {LOGS[1]}


@pytest.mark.extras
@pytest.mark.parametrize("same_machine", [True, False])
def test_a_killed_evaluation_is_resumed(place, server, bucket, tmp_path, same_machine):
    prefix = f"scores-killed-{same_machine}"
    words = ("evaluate", "b.ckpt", *FROM_DISK, *evaluation_folders(bucket.address(prefix))[:4])
    environment = [
        {**bucket.environment, "XDG_CACHE_HOME": str(tmp_path / ("one" if same_machine else f"{attempt}"))}
        for attempt in range(2)
    ]
    kill_when_held(server, 5, place, *words, **environment[0])
    assert any(name.endswith(".npz") for name in bucket.objects(prefix))
    done = run(place, *words, **environment[1])
    assert done.returncode == 0, done.stderr
    assert "4 of 8 are already evaluated and skipped" in done.stdout
    stored = bucket.objects(prefix)
    assert images_of(stored).keys() == {f"masks/{path.name}" for path in (place / "scores/masks").glob("*.png")}
    assert stored.keys() - images_of(stored).keys() == {
        "masks/.segdeconv-files", "report/report.json", "report/report.html"
    }  # fmt: skip
    assert report_of(stored["report/report.json"]) == report_of((place / "scores/report/report.json").read_bytes())


@pytest.mark.extras
def test_an_object_of_someone_else_is_not_written_over_by_an_evaluation(place, bucket, tmp_path):
    name = next(path.name for path in (place / "scores/masks").glob("*.png"))
    bucket.put(f"their-masks/masks/{name}", b"a year of work")
    words = (*FROM_DISK, *evaluation_folders(bucket.address("their-masks")))
    environment = {**bucket.environment, "XDG_CACHE_HOME": str(tmp_path)}
    done = run(place, "evaluate", "b.ckpt", *words, **environment)
    assert done.returncode == 2
    assert f"{bucket.address('their-masks')}/masks/{name} exists and was not written by segdeconv" in done.stderr
    assert bucket.objects("their-masks") == {f"masks/{name}": b"a year of work"}


@pytest.mark.extras
def test_an_object_of_someone_else_is_not_written_over(place, bucket, tmp_path):
    name = next(iter(outputs(place / "expected")))
    bucket.put(f"theirs/{name}", b"a year of work")
    words = ("photos", "--out", bucket.address("theirs"))
    done = predict(place, *words, **bucket.environment, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 2
    assert f"{bucket.address('theirs')}/{name} exists and was not written by segdeconv" in done.stderr
    assert bucket.objects("theirs") == {name: b"a year of work"}


@pytest.mark.extras
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("photos", "--out", "s3://B/x", "--shard", "1/2"), "--shard: the parts share a folder"),
        (("photos", "--out", "s3://B/x", "--submission", "voc"), "--submission packs files of a folder"),
        (("photos", "--out", "s3://B/x", "--polygons"), "--polygons merges files of a folder into regions.json"),
        (("s3://B/photos", "--out", "s3://B/photos"), "is a folder of the input images"),
        (("s3://B/nothing",), "s3://B/nothing not found"),
        (("s3://nowhere/photos",), "s3://nowhere/photos"),
        (("s3://B/photos", "AWS_ENDPOINT_URL=http://127.0.0.1:9"), "cannot be listed ("),
        (("photos", "--out", "s3://B/x", "AWS_ENDPOINT_URL=http://127.0.0.1:9"), "cannot be listed ("),
    ],
)
def test_what_a_storage_cannot_do_is_one_message(place, bucket, tmp_path, words, message):
    environment = {**bucket.environment, "XDG_CACHE_HOME": str(tmp_path)}
    environment |= dict(word.split("=", 1) for word in words if word.startswith("AWS"))
    words = [word.replace("s3://B/", bucket.address("")) for word in words if not word.startswith("AWS")]
    if "--out" not in words:
        words += ["--out", tmp_path / "out"]
    done = predict(place, *words, **environment)
    assert done.returncode == 2
    assert message.replace("s3://B/", bucket.address("")) in done.stderr
    assert done.stderr.count("segdeconv: error:") == 1
    assert not bucket.objects("x")


@pytest.mark.extras
def test_what_is_damaged_changed_or_left_out_is_named(place, bucket, tmp_path):
    bucket.put("mixed/broken.png", b"no image")
    bucket.put("mixed/film.mp4", b"film")
    bucket.put("mixed/.hidden/a.png", b"x")
    bucket.put("mixed/map.tif", b"II*\0")
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "good.png")
    bucket.put("mixed/good.png", (tmp_path / "good.png").read_bytes())
    address = bucket.address("mixed")
    done = predict(place, address, "--out", tmp_path / "out", **bucket.environment)
    assert done.returncode == 2
    assert f"skipped: {address}/broken.png" in done.stdout
    assert f"{address}: 1 video is left out (.mp4: 1) - copy them to this machine" in done.stderr
    assert f"{address}: 1 file with hidden names" in done.stderr
    assert f"1 image is a TIFF in an object storage or in shards, such as {address}/map.tif" in done.stderr
    assert set(outputs(tmp_path / "out")) == {"good.png", "good_overlay.png"}
