"""Evaluations of other folders: which images training has used, and whose class names count."""

import shutil

import fakes
import numpy as np
import pytest

from segdeconv.checkpoints import checkpoint
from segdeconv.data import Shapes, sample_digests
from segdeconv.data.inspection import inspect
from segdeconv.data.module import build_split, check_dataset
from segdeconv.errors import UsageError
from segdeconv.evaluation.evaluate import restore_dataset
from segdeconv.evaluation.overlap import overlap

NUM = 3


def run_of(folder, root, **keys):
    """Write an untrained network as a run on two sub-folders, with the hashes of its images, and return its path."""
    node = {"_target_": "segdeconv.data.Folder", "root": str(root), "size": [24, 32], **keys}
    path = fakes.untrained(folder / "best.ckpt", node)
    splits = [build_split(check_dataset(node), name) for name in ("train", "val")]
    hashes = {split.split: sample_digests.digests_of(inspect(split), split) for split in splits}
    sample_digests.write(hashes, folder / sample_digests.NAME)
    return path


@pytest.fixture
def roots(tmp_path):
    """Return the data set of a training, the same elsewhere, another one, and one that shares two images with it."""
    mine = fakes.folder(tmp_path / "mine", layout="subfolders", num=NUM)
    (tmp_path / "moved").mkdir()
    for name in ("moved", "mixed"):
        shutil.copytree(mine, tmp_path / name, dirs_exist_ok=True)
    other = fakes.folder(tmp_path / "other", layout="subfolders", num=NUM)
    for index in range(NUM):  # with the same names
        image, _ = fakes.image_and_mask(500 + index, 3)
        for split in ("train", "val"):
            fakes.Image.fromarray(image).save(other / split / "images" / f"{split}_{index}.png")
    for index in range(2):
        shutil.copy(
            mine / "train" / "images" / f"train_{index}.png", tmp_path / "mixed/val/images" / f"val_{index}.png"
        )
    return tmp_path


@pytest.mark.parametrize(
    ("root", "split", "keys", "expected"),
    [
        ("", "train", {}, (NUM, False)),
        ("", "val", {}, (0, True)),
        ("", "val", {"train_on_val": True}, (NUM, False)),
        ("moved", "train", {}, (NUM, False)),
        ("moved", "val", {}, (0, True)),
        ("moved", "val", {"train_on_val": True}, (NUM, False)),
        ("other", "train", {}, (0, False)),
        ("other", "val", {}, (0, False)),
        ("other", "val", {"train_on_val": True}, (0, False)),
        ("mixed", "val", {}, (2, False)),
    ],
)
def test_images_are_known_by_their_pixels(roots, tmp_path, root, split, keys, expected):
    (tmp_path / "run").mkdir()
    path = run_of(tmp_path / "run", roots / "mine", **keys)
    read = checkpoint.read(path, overrides=[f"dataset.root={roots / root}"] if root else [])
    used = overlap(read, restore_dataset(read, split))
    assert (used.num_images, used.trained_on, used.selected) == (NUM, *expected)


@pytest.mark.parametrize(("root", "known"), [("", True), ("moved", False)])
def test_without_hashes_nothing_is_said_about_other_folders(roots, tmp_path, root, known):
    (tmp_path / "run").mkdir()
    path = run_of(tmp_path / "run", roots / "mine")
    (path.parent / sample_digests.NAME).unlink()
    read = checkpoint.read(path, overrides=[f"dataset.root={roots / root}"] if root else [])
    used = overlap(read, restore_dataset(read, "train"))
    assert used.trained_on == (NUM if known else None)
    assert bool(used.sentence("train")) == known


def test_other_splits_of_the_same_images_are_counted(tmp_path):
    """Val of another fold consists of images that were trained on."""
    root = fakes.folder(tmp_path / "mine", num=5)
    (tmp_path / "run").mkdir()
    path = run_of(tmp_path / "run", root, folds=2, fold=0)
    read = checkpoint.read(path, overrides=["dataset.fold=1"])
    used = overlap(read, restore_dataset(read, "val"))
    assert used.trained_on == used.num_images == 5


def test_a_published_data_set_may_lie_anywhere(tmp_path):
    path = fakes.untrained(
        tmp_path / "a.ckpt", {"_target_": "segdeconv.data.CamVid", "root": str(fakes.camvid(tmp_path))}
    )
    read = checkpoint.read(path, overrides=[f"dataset.root={tmp_path}"])
    assert overlap(read, restore_dataset(read, "train")).trained_on == fakes.NUM


def with_classes(root, table):
    (root / "classes.yaml").write_text(table)
    return root


@pytest.mark.parametrize("swapped", [False, True])
def test_the_classes_of_another_folder_are_those_of_its_own_table(tmp_path, swapped, capsys):
    """Masks and table of the other folder have labels 0 and 2 exchanged, which is the same truth."""
    (tmp_path / "run").mkdir()
    root = with_classes(fakes.folder(tmp_path / "mine", layout="subfolders"), "a: 0\nb: 1\nc: 2\n")
    other = tmp_path / "other"
    shutil.copytree(root, other)
    if swapped:
        with_classes(other, "a: 2\nb: 1\nc: 0\n")
        for path in other.glob("*/masks/*.png"):
            mask = np.asarray(fakes.Image.open(path))
            fakes.Image.fromarray(np.where(mask < 3, 2 - mask, mask).astype(np.uint8)).save(path)
    path = run_of(tmp_path / "run", root)
    classes = build_split(check_dataset({"_target_": "segdeconv.data.Folder", "root": str(root)}), "val").stored_classes
    content = checkpoint.load_plain(path)
    config = content["hyper_parameters"]["config"]
    config["dataset"]["classes"] = classes.to_dict()  # as training writes it
    checkpoint.write(content, path)
    first, second = (
        restore_dataset(checkpoint.read(path, overrides=overrides), "val")
        for overrides in ([], [f"dataset.root={other}"])
    )
    assert all(np.array_equal(first[index].mask, second[index].mask) for index in range(len(first)))
    assert f"classes:    those of {other / 'classes.yaml'}, matched" in capsys.readouterr().out


def test_other_classes_of_another_folder_are_refused(tmp_path):
    (tmp_path / "run").mkdir()
    root = fakes.folder(tmp_path / "mine", layout="subfolders")
    path = run_of(tmp_path / "run", root, classes={"a": 0, "b": 1, "c": 2})
    with_classes(root, "a: 0\nb: 1\nd: 2\n")
    restore_dataset(checkpoint.read(path), "val")
    with pytest.raises(UsageError, match=r"'c' is in only one of them|'d' is in only one of them"):
        restore_dataset(checkpoint.read(path, overrides=[f"dataset.root={root}"]), "val")


def test_a_network_is_scored_on_another_data_set_by_the_names_of_its_classes(tmp_path):
    (tmp_path / "run").mkdir()
    root = with_classes(fakes.folder(tmp_path / "mine", layout="subfolders"), "c: 2\nb: 1\na: 0\n")
    node = {"_target_": "segdeconv.data.Shapes", "num_train": 2, "num_val": 2, "side": 32, "size": [24, 32]}
    names = {name: name for name in Shapes("train", num_train=1, num_val=1, side=32).classes.names}
    merged = {**dict.fromkeys(list(names)[2:], "c"), **dict(zip(names, "ab", strict=False))}
    path = fakes.untrained(tmp_path / "run" / "best.ckpt", {**node, "label_map": merged})
    read = checkpoint.read(path, overrides=["dataset=folder", f"dataset.root={root}", "dataset.num_workers=0"])
    dataset = restore_dataset(read, "val")
    assert dataset.classes.names == read.classes.names
    assert len(dataset) == fakes.NUM
    assert read.preprocessing.size == (24, 32)
    assert overlap(read, dataset).trained_on is None
