"""dataset.train_on_val trains on both splits, weighs classes by both, and says what scores on val are worth then."""

import json

import fakes
import numpy as np
import pytest
from PIL import Image
from tiny_runs import config

from segdeconv.data import CamVid
from segdeconv.data.dataset import Locality
from segdeconv.data.joined import Joined
from segdeconv.data.module import build_pipeline, build_split, check_dataset
from segdeconv.errors import UsageError
from segdeconv.train import train
from segdeconv.training.config_check import check_config
from segdeconv.training.prepare import prepare
from segdeconv.training.verification import verify


def pipeline(**keys):
    node = check_dataset({"num_workers": 0, "mean": [0, 0, 0], "std": [1, 1, 1], "train_on_val": True, **keys})
    return build_pipeline(node, {}, *(build_split(node, split) for split in ("train", "val")), seed=0)


@pytest.mark.parametrize("keys", [{"cache": "none"}, {"cache": "memory"}, {"cache": "memory", "size": [24, 32]}])
def test_the_samples_are_those_of_both_splits_in_order(tmp_path, keys):
    root = str(fakes.camvid(tmp_path))
    data = pipeline(_target_="segdeconv.data.CamVid", root=root, **keys)
    splits = [CamVid("train", root), CamVid("val", root)]
    uncached = pipeline(_target_="segdeconv.data.CamVid", root=root, **{**keys, "cache": "none"})
    stored = [split[index] for split in splits for index in range(len(split))]
    assert len(data.samples) == len(data.train) == len(stored) == 2 * fakes.NUM
    for _ in range(2):  # the second time from the cache
        for index, (image, mask, name) in enumerate(stored):
            sample = data.samples[0, index]
            assert (sample["name"], sample["image"].shape[:2]) == (name, sample["mask"].shape)
            for part in ("image", "mask"):
                np.testing.assert_array_equal(sample[part], uncached.samples[0, index][part])
            if "size" not in keys:
                np.testing.assert_array_equal(sample["image"], image)
                np.testing.assert_array_equal(sample["mask"], mask)
        for index, (_, mask, name) in enumerate(splits[1][index] for index in range(fakes.NUM)):
            assert data.val_samples[index].name == name
            np.testing.assert_array_equal(data.val_samples[index].mask, mask)


def test_what_is_stored_together_and_announced_stays_with_its_split(tmp_path):
    root, asked = str(fakes.camvid(tmp_path)), {}
    first, second = CamVid("train", root), CamVid("val", root)
    for split in (first, second):
        split.locality = Locality(np.arange(fakes.NUM) // 2, 3)
        split.prefetch = lambda indices, name=split.split: asked.setdefault(name, list(indices))
    joined = Joined(first, second)
    assert fakes.NUM % 2 == 0
    np.testing.assert_array_equal(joined.locality.groups, np.arange(2 * fakes.NUM) // 2)
    joined.prefetch(iter([1, fakes.NUM, fakes.NUM + 1]))
    assert asked == {"train": [1], "val": [0, 1]}
    assert joined.files == first.files + second.files
    assert joined.stamp(fakes.NUM) == second.stamp(0)


def own_data(root, train_names, val_names, **keys):
    """Return the node of a folder that lists these images."""
    for split, names in (("train", train_names), ("val", val_names)):
        (root / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return {"_target_": "segdeconv.data.Folder", "root": str(root), "batch_size": 2, "num_workers": 0, **keys}


def test_classes_are_weighed_by_the_pixels_of_both_splits(tmp_path):
    def weights(*names, **keys):
        loss = {"_target_": "segdeconv.losses.CrossEntropy", "class_weighting": "median_frequency"}
        data = own_data(tmp_path, *names, **keys)
        return prepare(check_config(config(dataset=data, loss=loss))).metadata["class_weights"]

    fakes.folder(tmp_path, num=4)
    Image.fromarray(np.ones(fakes.SIZE, dtype=np.uint8)).save(tmp_path / "masks" / "val_0.png")
    first, second = ["train_0", "train_1", "train_2"], ["val_0", "val_1", "val_2"]
    both = weights(first, second, train_on_val=True)
    assert both == weights(first + second, ["val_3"])
    assert both != weights(first, second)


@pytest.mark.parametrize(("both", "batch_size"), [(False, 5), (True, 4)])
def test_the_chosen_batch_divides_the_images_that_are_trained_on(tmp_path, both, batch_size):
    names = [f"{split}_{index}" for split in ("train", "val") for index in range(4)]
    data = own_data(fakes.folder(tmp_path, num=4), names[:5], names[5:], train_on_val=both)
    chosen = prepare(check_config({**config(dataset=data), "auto": ["dataset.batch_size"]})).config
    assert chosen["dataset"]["batch_size"] == batch_size


def test_a_run_says_what_its_val_scores_are_worth_and_verifies(tmp_path, capsys):
    fakes.folder(tmp_path / "mine", layout="lists", num=6)
    data = {"_target_": "segdeconv.data.Folder", "root": str(tmp_path / "mine"), "batch_size": 2, "num_workers": 0}
    train(config(dataset={**data, "train_on_val": True}, trainer__max_epochs=2), tmp_path / "run")
    output = capsys.readouterr()
    assert "so their scores say nothing about other images - use last.ckpt" in output.err
    assert "The network was trained on them, so new images score lower." in output.out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["split"], report["trained_on"]) == ("val", True)
    assert verify(tmp_path / "run", steps=2, images=2, seed=0).verdict == "same bits"


def test_crops_of_objects_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"train_on_val=true needs whole images"):
        pipeline(_target_="segdeconv.data.VOC", root=str(fakes.voc(tmp_path)), examples="objects", size=[16, 16])
