"""Data sets in shards: what is packed, read, inspected, ordered, fetched and refused."""

import dataclasses
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import fakes
import numpy as np
import pytest
import tifffile
from http_server import in_pieces, serving, whole
from PIL import Image

from segdeconv.classes import Classes
from segdeconv.data import Folder, Sample, SegmentationDataset, Shapes, Shards
from segdeconv.data import shard_files as files
from segdeconv.data.dataset import Locality
from segdeconv.data.inspection import inspect
from segdeconv.data.loading import EvaluationSamples, evaluation_loader
from segdeconv.data.module import DataPipeline
from segdeconv.data.preprocessing import Preprocessing
from segdeconv.data.relabelled import Relabelled
from segdeconv.data.sampler import StatelessBatches, shuffle
from segdeconv.data.shard_files import PackedFile, ShardFolder
from segdeconv.data.shard_index import read_contents, read_head, read_shards
from segdeconv.data.shard_writer import write_shards
from segdeconv.errors import UsageError

NO_READING = "a shard was read"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of 6 train and 2 val images, and the same in shards of 2 images, as wide/ and shards/."""
    root = tmp_path_factory.mktemp("shards")
    fakes.folder(root / "own", "palette", image_suffix=".jpg")
    splits = [Folder(split, str(root / "own")) for split in ("train", "val")]
    write_shards(splits, root / "shards", shard_size=6 << 10)
    return root


def test_every_sample_is_that_of_the_folder_and_images_keep_their_bytes(place):
    for split in ("train", "val"):
        own, packed = Folder(split, str(place / "own")), Shards(split, str(place / "shards"))
        assert packed.names == own.names
        assert (packed.classes.names, packed.classes.colours) == (own.classes.names, own.classes.colours)
        for index, pair in enumerate(own.pairs):
            assert packed.pairs[index].image.read_bytes() == pair.image.read_bytes()
            for mine, theirs in zip(own[index], packed[index], strict=True):
                np.testing.assert_array_equal(mine, theirs)
    assert len(Shards("train", str(place / "shards")).shards) == 3


def test_the_shards_unpack_to_a_folder_of_the_same_samples(place, tmp_path):
    for shard in sorted((place / "shards").glob("*.tar")):
        subprocess.run(["tar", "-xf", str(shard), "-C", str(tmp_path)], check=True)
    own, unpacked = Folder("train", str(place / "own")), Folder("train", str(tmp_path))
    assert unpacked.names == own.names
    for index in range(len(own)):
        np.testing.assert_array_equal(unpacked[index].image, own[index].image)


def test_a_data_set_gives_the_same_bytes_again(place, tmp_path):
    splits = [Folder(split, str(place / "own")) for split in ("train", "val")]
    write_shards(splits, tmp_path / "again", shard_size=6 << 10)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == {
        path.name: path.read_bytes() for path in (place / "shards").iterdir()
    }


@pytest.mark.parametrize("label_map", [{}, {"class_1": "class_2"}, {"class_1": "ignore"}])
def test_an_inspection_needs_the_index_only(place, monkeypatch, label_map):
    def view(dataset: SegmentationDataset) -> SegmentationDataset:
        return Relabelled(dataset, label_map) if label_map else dataset

    expected = inspect(view(Folder("train", str(place / "own"))), use_cache=False)
    monkeypatch.setattr(ShardFolder, "read", lambda *_: pytest.fail(NO_READING))
    found = inspect(view(Shards("train", str(place / "shards"))), use_cache=False)
    differing = [name for name, value in dataclasses.asdict(expected).items() if value != getattr(found, name)]
    assert differing == ["values"] or differing == []  # labels of the mask files, which are the class indices now


def test_a_file_in_a_shard_reads_like_a_file_and_survives_pickling(place):
    path = Shards("train", str(place / "shards")).pairs[0].image
    assert str(path) == f"{place}/shards/train-00000.tar/train/images/{path.name}"
    assert path.exists()
    assert path.is_file()
    assert path.stat().st_size == len(path.read_bytes())
    assert not path.with_suffix(".jgw").exists()
    with pytest.raises(FileNotFoundError):
        path.with_suffix(".jgw").open("rb")
    with pytest.raises(PermissionError):
        path.open("wb")
    again = pickle.loads(pickle.dumps(path))
    assert isinstance(again, PackedFile)
    assert again.read_bytes() == path.read_bytes()


class _Deep(SegmentationDataset):
    """A user's own data set of 5-channel arrays of 16 bits, which are no files."""

    channels, as_stored, classes = 5, True, Classes(("a", "b"), ((0, 0, 0), (255, 0, 0)))

    def __init__(self, split: str) -> None:
        self.split, self.names = split, ["one", "sub/two"]

    def __getitem__(self, index: int) -> Sample:
        image, mask = fakes.image_and_mask(index, 2)
        return Sample(np.repeat(image[:, :, :1].astype(np.uint16) * 200, 5, axis=2), mask, self.names[index])

    fingerprint = "deep"


def _tiffs(folder: Path) -> Folder:
    """A folder of 4-channel TIFFs of 16 bits."""
    for index in range(4):
        image, mask = fakes.image_and_mask(index, 2)
        for sub in ("images", "masks"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        deep = np.repeat(image[:, :, :1].astype(np.uint16) * 99, 4, axis=2)
        tifffile.imwrite(folder / f"images/{index}.tif", deep, photometric="minisblack", planarconfig="contig")
        Image.fromarray(mask).save(folder / f"masks/{index}.png")
    return Folder("train", str(folder), channels=4)


@pytest.mark.parametrize("kind", ["generated", "arrays", "tiff"])
def test_any_data_set_can_be_packed(tmp_path, kind):
    source = {"generated": lambda: Shapes("train", num_train=3), "arrays": lambda: _Deep("train")}.get(
        kind, lambda: _tiffs(tmp_path / "own")
    )()
    write_shards([source], tmp_path / "shards")
    packed = Shards("train", str(tmp_path / "shards"))
    assert (packed.channels, packed.as_stored) == (source.channels, source.as_stored)
    assert packed.names == source.names
    for index in range(len(source)):
        np.testing.assert_array_equal(packed[index].image, source[index].image)
        np.testing.assert_array_equal(packed[index].mask, source[index].mask)


# Damage


def _copy(place: Path, tmp_path: Path) -> Path:
    (tmp_path / "copy").mkdir()
    for path in (place / "shards").iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "copy"


def test_a_shard_that_is_missing_cut_or_changed_is_named(place, tmp_path):
    folder = _copy(place, tmp_path)
    shard = folder / "train-00001.tar"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UsageError, match=r"copy/train-00001\.tar is missing - restore it"):
        Shards("train", str(folder))
    shard.write_bytes(content[:-100])
    with pytest.raises(UsageError, match=rf"copy/train-00001\.tar has {len(content) - 100} of {len(content)} bytes"):
        Shards("train", str(folder))
    dataset = Shards("val", str(folder))  # which does not need it
    assert len(dataset) == 2
    shard.write_bytes(content)
    dataset = Shards("train", str(folder))
    offset = dataset.shards[1].samples[0].image.offset
    shard.write_bytes(content[: offset + 9] + b"?" + content[offset + 10 :])
    with pytest.raises(UsageError, match=r"copy/train-00001\.tar was changed: its file train/images/\w+\.jpg does not"):
        dataset[2]
    shard.write_bytes(content[: offset + 9])
    with pytest.raises(UsageError, match=r"copy/train-00001\.tar is cut: its file"):
        dataset[2]
    shard.unlink()
    with pytest.raises(UsageError, match=r"copy/train-00001\.tar is missing"):
        dataset[2]
    assert dataset[0].name == dataset.names[0]


def _set(data, keys, value):
    for key in keys[:-1]:
        data = data[key]
    data[keys[-1]] = value


SAMPLE = (0, "samples", 0)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ((0, "file"), "../train-00000.tar", "0.file: String should match pattern"),
        ((0, "file"), "/etc/passwd", "0.file: String should match pattern"),
        ((*SAMPLE, "name"), "../../x", "'../../x' is not a path inside a folder"),
        ((*SAMPLE, "name"), "/x", "'/x' is not a path inside a folder"),
        ((*SAMPLE, "name"), "a\x1b[2J", "is not a path inside a folder"),
        ((*SAMPLE, "image", "suffix"), "/../x", "image.suffix: String should match pattern"),
        ((*SAMPLE, "mask", "offset"), -1, "mask.offset: Input should be greater than or equal to 0"),
        ((*SAMPLE, "mask", "size"), 1 << 40, "a file of 'train_0' ends after its shard train-00000.tar"),
        ((*SAMPLE, "mask", "sha256"), "0", "mask.sha256: String should match pattern"),
        ((1, "samples", 0, "name"), "train_0", "it has 6 samples of 5 names, but the index states 6"),
        ((0, "samples"), "many", "0.samples: Input should be a valid array"),
        ((0, "samples"), [], "train-00000.tar has no samples"),
    ],
)
def test_a_list_that_is_not_valid_is_refused(place, tmp_path, keys, value, message):
    shards = json.loads((place / "shards/train.json").read_text())
    shards[0]["samples"][0]["name"] = "train_0"
    shards[1]["samples"][0]["name"] = "train_1"
    _set(shards, keys, value)
    (tmp_path / "train.json").write_text(json.dumps(shards))
    with pytest.raises(UsageError) as caught:
        read_shards(tmp_path / "train.json", "train.json", 6)
    assert str(caught.value).startswith("train.json is damaged (")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "value"), [((0, 0), [1, 2]), ((0, 0), [-1, 1, 3072, 0]), ((0, 3), [[1.0], [1.0]]), ((0, 1), [1, 1])]
)
def test_contents_that_do_not_fit_are_refused(place, tmp_path, keys, value):
    head, _ = read_head(place / "shards/index.json", "index.json")
    contents = json.loads((place / "shards/train-contents.json").read_text())
    _set(contents, keys, value)
    (tmp_path / "c.json").write_text(json.dumps(contents))
    with pytest.raises(UsageError, match="the counts of image 0 do not fit its size, the classes or the channels"):
        read_contents(tmp_path / "c.json", "c.json", head, 6)


def test_a_list_that_was_changed_is_refused(place, tmp_path):
    folder = _copy(place, tmp_path)
    with (folder / "train.json").open("a") as file:
        file.write(" ")
    with pytest.raises(UsageError, match=r"copy/train\.json does not have the hash in index\.json - restore it"):
        Shards("train", str(folder))
    (folder / "train.json").unlink()
    with pytest.raises(UsageError, match=r"copy/train\.json is missing - restore it"):
        Shards("train", str(folder))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("format",), "other", "is not the index of shards - give the folder that convert --shards wrote"),
        (("version",), 2, "has version 2, but this segdeconv reads version 1"),
        (("classes", "names"), ["one"], "is damaged (1 class(es) ['one']"),
        (("classes", "colours", 0), [0, 0, 256], "is damaged (colours.0.2: "),
        (("splits", "train", "shards", "file"), "../train.json", "is damaged (splits.train.shards.file: "),
        (("splits",), {"../train": {}}, "is damaged (splits.../train"),
        (("exif",), "guess", "is damaged (exif: "),
    ],
)
def test_an_index_that_is_not_valid_is_refused(place, tmp_path, keys, value, message):
    folder = _copy(place, tmp_path)
    head = json.loads((folder / "index.json").read_text())
    _set(head, keys, value)
    (folder / "index.json").write_text(json.dumps(head))
    with pytest.raises(UsageError) as caught:
        Shards("train", str(folder))
    assert f"{folder}/index.json {message}" in str(caught.value)


def test_a_folder_without_an_index_and_other_roots_are_refused(place, tmp_path):
    with pytest.raises(UsageError, match=r"index\.json is missing - give the folder that convert --shards wrote"):
        Shards("train", str(tmp_path))
    with pytest.raises(UsageError, match=r"dataset\.root=.*none is not a folder; it should hold index\.json"):
        Shards("train", str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"dataset\.root=ftp://x/y is no supported address - give a folder, s3://"):
        Shards("train", "ftp://x/y")
    with pytest.raises(UsageError, match=r"http://example\.com/index\.json is not an https address"):
        Shards("train", "http://example.com")
    with pytest.raises(UsageError, match="unknown split 'test' - the splits are train, val"):
        Shards("test", str(place / "shards"))


# Order


def _order(locality, **settings):
    batches = StatelessBatches(60, 5, seed=3, locality=locality, **{"position": lambda: (2, 0), **settings})
    return [index for batch in batches for _, index in batch]


def test_with_few_shards_the_order_is_that_of_any_data_set():
    groups = np.repeat(np.arange(6), 10)
    assert _order(Locality(groups, 6)) == _order(None)
    assert _order(Locality(groups, 5)) != _order(None)


def test_samples_are_shuffled_within_a_window_of_shards():
    groups = np.repeat(np.arange(40), 25)
    order = shuffle(groups, 4, np.random.default_rng(0))
    assert sorted(order) == list(range(1000))
    positions = [np.flatnonzero(groups[order] == group) for group in range(40)]
    # At each position, count the shards that have begun and not ended: about the window.
    open_shards = sum((np.arange(1000) >= at.min()) & (np.arange(1000) <= at.max()) for at in positions)
    assert open_shards.max() <= 6
    starts = sorted(range(40), key=lambda group: positions[group].min())
    assert starts != list(range(40))  # the shards are shuffled
    inside = order[groups[order] == starts[7]]
    assert list(inside) != sorted(inside)  # and so are the samples of one


def test_processes_read_disjoint_samples_of_nearly_disjoint_shards():
    groups = np.repeat(np.arange(30), 2)
    locality = Locality(groups, 4)
    parts = [_order(locality, rank=rank, world_size=3) for rank in range(3)]
    assert [len(part) for part in parts] == [20, 20, 20]
    assert len({index for part in parts for index in part}) == 60
    assert all(len({groups[index] for index in part}) <= 12 for part in parts)  # 10 of their own
    resumed = _order(locality, rank=1, world_size=3, position=lambda: (2, 3))
    assert resumed == parts[1][15:]


def test_mixing_needs_all_shards_in_the_window(place):
    train, val = (Shards(split, str(place / "shards"), window=2) for split in ("train", "val"))
    with pytest.raises(UsageError, match=r"dataset\.mix=box pastes .* only dataset\.window=2 of the 3 shards"):
        DataPipeline(train, val, {}, 0, mix="box", size=(48, 64))


# Addresses


@pytest.fixture
def served(place):
    """The server of the shards, and their address."""
    with serving() as server:
        for path in (place / "shards").iterdir():
            address = server.serve(f"/set/{path.name}", whole(path.read_bytes()))
        yield server, address.rpartition("/")[0]


def _fetched(server) -> list[str]:
    return [path.rpartition("/")[2] for path, _ in server.requests if path.endswith(".tar")]


def test_shards_of_an_address_are_fetched_once_and_kept_within_the_limit(place, served, tmp_path):
    server, root = served
    own = Folder("train", str(place / "own"))
    dataset = Shards("train", root, window=1, shard_cache=str(tmp_path), shard_cache_size=1)
    assert _fetched(server) == []
    assert dataset.files == []
    for index in (0, 1, 2, 0):
        np.testing.assert_array_equal(dataset[index].image, own[index].image)
    assert _fetched(server) == ["train-00000.tar", "train-00001.tar"]
    again = Shards("train", root, window=1, shard_cache=str(tmp_path), shard_cache_size=1)
    assert again[3].name == own[3].name
    assert len(_fetched(server)) == 2
    size = dataset.shards[0].size
    again.folder.limit = 2 * size + 100
    again[0]  # makes the second shard the least recently used one
    again[4]
    left = sorted(path.name.partition("-")[2] for path in tmp_path.glob("*.tar"))
    assert left == ["train-00000.tar", "train-00002.tar"]
    assert again[2].name == own[2].name  # fetched again


def test_a_window_that_does_not_fit_into_the_cache_is_refused(served, tmp_path):
    _, root = served
    message = r"dataset\.shard_cache_size=9\.54e-06 \(GiB\) is less than the .* of the dataset\.window=16 shards"
    with pytest.raises(UsageError, match=r"train\.json has \d+ bytes, more than dataset\.shard_cache_size"):
        Shards("train", root, shard_cache=str(tmp_path), shard_cache_size=1e-9)
    with pytest.raises(UsageError, match=message):
        Shards("train", root, shard_cache=str(tmp_path), shard_cache_size=10240 / 2**30)


def test_a_loader_announces_what_it_reads_next(served, tmp_path):
    server, root = served
    dataset = Shards("train", root, shard_cache=str(tmp_path), shard_cache_size=1)
    samples = EvaluationSamples(dataset, Preprocessing((48, 64), (0.0,) * 3, (1.0,) * 3))
    loader = evaluation_loader(samples, batch_size=1, num_workers=0, timeout=0)
    assert [batch["name"][0] for batch in loader] == dataset.names
    assert sorted(_fetched(server)) == [f"train-0000{number}.tar" for number in range(3)]


def test_a_connection_that_is_cut_is_resumed(place, served, tmp_path):
    server, root = served
    server.serve("/set/train-00000.tar", in_pieces((place / "shards/train-00000.tar").read_bytes(), 4000))
    assert Shards("train", root, shard_cache=str(tmp_path))[0].image.shape == (48, 64, 3)
    assert len(_fetched(server)) > 1


def test_a_shard_with_other_bytes_is_refused_by_name(place, served, tmp_path):
    server, root = served
    content = (place / "shards/train-00000.tar").read_bytes()
    dataset = Shards("train", root, shard_cache=str(tmp_path))
    server.serve("/set/train-00000.tar", whole(content[:-1] + b"?"))
    with pytest.raises(UsageError, match=rf"{root}/train-00000\.tar does not have the hash in the index - restore it"):
        dataset[0]
    assert len(_fetched(server)) == files.TRIES
    server.serve("/set/train-00000.tar", whole(content[:2000]))
    with pytest.raises(UsageError, match=rf"{root}/train-00000\.tar has 2000 of {len(content)} bytes"):
        dataset[0]
    server.answers["/set/train-00000.tar"] = lambda handler: handler.head(404, Content_Length=0)
    with pytest.raises(UsageError, match=rf"could not download {root}/train-00000\.tar \(.*404"):
        dataset[0]
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == []
    server.serve("/set/train-00000.tar", whole(content))
    assert dataset[0].name == dataset.names[0]


def test_a_fetched_shard_that_the_disk_changed_is_fetched_again(place, served, tmp_path):
    server, root = served
    dataset = Shards("train", root, shard_cache=str(tmp_path))
    expected = dataset[0].image
    (path,) = tmp_path.glob("*.tar")
    path.write_bytes(path.read_bytes()[:1000])
    np.testing.assert_array_equal(Shards("train", root, shard_cache=str(tmp_path))[0].image, expected)
    assert _fetched(server) == ["train-00000.tar"] * 2


def test_object_storage_needs_the_extra(tmp_path, monkeypatch):
    stub = tmp_path / "no_obstore.py"
    stub.write_text("import sys\nsys.exit(3)\n")
    monkeypatch.setattr(files.object_storage, "__file__", str(stub))
    with pytest.raises(UsageError, match=r"s3://b/x/index\.json needs obstore, .* - pip install 'segdeconv\[shards\]'"):
        Shards("train", "s3://b/x", shard_cache=str(tmp_path))


# Commands


def test_shards_are_written_and_inspected(tmp_path, commands):
    fakes.folder(tmp_path / "mine")
    done = commands("convert", "mine", "--shards", "packed", "--shard-size", "0.02", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-3:] == [
        "train: 6 images in 2 shards, 0.1 MiB",
        "val: 2 images in 1 shard, 0.0 MiB",
        "train with: python scripts/train.py dataset=shards dataset.root=packed",
    ]
    with tarfile.open(tmp_path / "packed/val-00000.tar") as tar:
        assert all(name.startswith(("val/images/", "val/masks/")) for name in tar.getnames())
    done = commands("inspect_data", "dataset=shards", "dataset.root=packed", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "data: Folder in shards, train in 2 of" in done.out
    for words, message in (
        (("mine", "--shards", "packed"), "packed exists and is not an empty folder - choose another --shards"),
        (("mine", "--shards", "x", "--to", "coco"), "--to has no effect on shards - leave it or --shards out"),
        (("mine", "--shards", "x", "--shard-size", "big"), "--shard-size big is not a number of MiB"),
        (("mine", "--to", "coco", "--out", "x", "--shard-size", "1"), "--shard-size has no effect without --shards"),
        (("nothing", "--shards", "x"), "dataset.root=nothing is not a folder"),
    ):
        done = commands("convert", *words, cwd=tmp_path)
        assert done.code == 2
        assert message in done.error_message
        assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_training_on_shards_gives_the_bits_of_the_folder(tmp_path, commands):
    """Also for label_map and evaluation, and from a copy in another folder."""
    fakes.folder(tmp_path / "mine")
    done = commands("convert", "mine", "--shards", "packed", "--shard-size", "0.02", cwd=tmp_path)
    assert done.code == 0, done.err
    options = (
        "dataset.size=[32,32]", "dataset.batch_size=2", "model.stages=[[4],[8]]", "trainer.max_epochs=2",
        "trainer.precision=32-true", "auto=[]", "dataset.label_map={class_1: class_2}",
    )  # fmt: skip
    weights, reports = [], []
    for name, root in (("folder", "mine"), ("shards", "packed")):
        words = (f"dataset={name}", f"dataset.root={root}", *options, f"hydra.run.dir={name}")
        done = commands("train", *words, "dataset.num_workers=1", cwd=tmp_path)
        assert done.code == 0, done.err
        weights.append((tmp_path / name / "metrics.csv").read_text())
        done = commands("evaluate", f"{name}/best.ckpt", "--out", f"{name}/report", cwd=tmp_path)
        assert done.code == 0, done.err
        reports.append(json.loads((tmp_path / name / "report/report.json").read_text())["confusion"])
    assert weights[0] == weights[1]
    assert reports[0] == reports[1]


def test_the_program_that_copies_objects_starts_without_segdeconv():
    """Its arguments are positional, and without obstore its exit code says so."""
    path = files.object_storage.__file__
    code = f"import runpy, sys; sys.argv = [{path!r}, 's3://b/x', 'f', '1']; sys.modules['obstore'] = None\n"
    code += f"try: runpy.run_path({path!r}, run_name='__main__')\nexcept SystemExit as e: code = e.code\n"
    code += "print(code, [m for m in sys.modules if m.startswith(('segdeconv', 'torch'))])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3 []", done.stdout + done.stderr
