"""An inspection equals a brute-force count, lists every problem, and is cached until a file changes."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import fakes
import numpy as np
import pytest
from PIL import Image

from segdeconv.classes import Classes
from segdeconv.data import CamVid, Folder, SegmentationDataset, Shapes, inspection
from segdeconv.data.inspection import class_table, inspect, inspect_all, overlaps
from segdeconv.errors import UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "segdeconv" / "inspections"


@pytest.fixture
def camvid(tmp_path: Path) -> CamVid:
    root = fakes.camvid(tmp_path / "camvid")
    for index in (0, 1):  # a class is missing from two images, and one image is smaller
        path = root / "trainannot" / f"train_{index:03d}.png"
        mask = np.array(fakes.opened(path))
        mask[mask == 4] = 3
        Image.fromarray(mask).save(path)
    Image.fromarray(np.zeros((16, 32, 3), dtype=np.uint8)).save(root / "train" / "train_003.png")
    Image.fromarray(np.full((16, 32), 2, dtype=np.uint8)).save(root / "trainannot" / "train_003.png")
    return CamVid("train", str(root))


def record_inspections(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the split of every uncached inspection is appended."""
    splits = []
    real = inspection._inspect

    def record(dataset: SegmentationDataset) -> inspection.Inspection:
        splits.append(dataset.split)
        return real(dataset)

    monkeypatch.setattr(inspection, "_inspect", record)
    return splits


# Counts


def test_counts_equal_a_brute_force_count(camvid: CamVid) -> None:
    pixels, image_pixels, images, sizes = [0] * 12, [0] * 12, [0] * 12, Counter()
    for pair in camvid.pairs:
        values = list(fakes.opened(pair.mask).tobytes())
        for label in range(12):
            pixels[label] += values.count(label)
            if label in values:
                image_pixels[label] += len(values)
                images[label] += 1
        sizes[fakes.opened(pair.mask).size[::-1]] += 1
    result = inspect(camvid)
    assert result.split == "train"
    assert result.num_images == 4
    assert (result.pixels, result.image_pixels, result.images) == (pixels, image_pixels, images)
    assert result.images[4] == 1
    assert result.sizes == [(48, 64, 3), (16, 32, 1)] == [(*size, count) for size, count in sizes.most_common()]
    assert result.problems == []


def test_ignored_pixels_are_counted_last() -> None:
    shapes = Shapes("val", num_val=5)
    masks = np.stack([shapes[index].mask for index in range(5)])
    assert inspect(shapes).pixels == [int((masks == label).sum()) for label in (*range(7), 255)]


def test_a_class_with_label_255_is_not_ignored(tmp_path: Path) -> None:
    result = inspect(Folder("train", str(fakes.folder(tmp_path / "data", "binary"))))
    assert result.pixels[2] == 0
    assert min(result.pixels[:2]) > 0


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_mean_and_deviation_are_those_of_all_pixels(tmp_path: Path, channels: int, dtype: type) -> None:
    root = fakes.folder(tmp_path / "data", layout="subfolders")
    images = []
    for index, path in enumerate(sorted((root / "train" / "images").iterdir())):
        size = (48, 64) if index else (48, 9)
        image = np.random.default_rng(index).integers(0, np.iinfo(dtype).max, (*size, channels), dtype)
        image[:, :, -1] = 77
        fakes.stored(path.with_suffix(".npy"), image)
        path.unlink()
        Image.new("L", size[::-1], 1).save(root / "train" / "masks" / path.name)
        images.append(image.reshape(-1, channels))
    result = inspect(Folder("train", str(root), channels=channels, classes=["a", "b", "c"]), use_cache=False)
    pixels = np.concatenate(images).astype(np.float64)
    assert result.bits == 8 * np.dtype(dtype).itemsize
    assert result.mean == pytest.approx(pixels.mean(axis=0), rel=1e-5)
    assert result.std == pytest.approx(pixels.std(axis=0), rel=1e-5)
    assert (result.mean[-1], result.std[-1]) == (77, 0)


# Problems


def test_images_of_8_and_of_16_bit_in_one_data_set_are_refused(tmp_path: Path) -> None:
    root = fakes.folder(tmp_path / "data", layout="subfolders")
    for split in ("train", "val"):
        for path in (root / split / "images").iterdir():
            bits = np.uint16 if path.stem == "train_2" or split == "val" else np.uint8
            Image.fromarray(np.zeros((48, 64), dtype=bits)).save(path)
    datasets = [Folder(split, str(root), channels=1) for split in ("train", "val")]
    assert inspect(datasets[0]).problems == [
        "train_0 has 8 bit and train_2 16 bit per channel - save all images with the same bits"
    ]
    Image.fromarray(np.zeros((48, 64), dtype=np.uint8)).save(root / "train/images/train_2.png")
    with pytest.raises(UsageError, match="the splits differ: train 8 bit, val 16 bit per channel - save"):
        inspect_all(datasets)


def test_images_with_another_number_of_channels_than_their_data_set_are_refused() -> None:
    class Grey(Shapes):
        channels = 1

    assert inspect(Grey("val", num_val=1)).problems == [
        "val_00000 has 3 channels, but its data set has 1 - make them equal"
    ]


def damage(root: Path) -> list[str]:
    """Damage each of the four train images in another way and return the expected messages, in order."""
    image = root / "train" / "train_000.png"
    image.write_bytes(image.read_bytes()[:200])
    mask = fakes.opened(root / "trainannot" / "train_001.png")
    mask.putpixel((3, 4), 77)
    mask.save(root / "trainannot" / "train_001.png")
    Image.new("L", (64, 47)).save(root / "trainannot" / "train_002.png")
    (root / "train" / "train_003.png").unlink()
    return [
        r"train/train_000\.png is damaged and cannot be decoded",
        r"trainannot/train_001\.png has label 77; the classes have labels 0\.\.10 and 11",
        r"trainannot/train_002\.png is 47x64 and its image .*train_002\.png 48x64",
        r"train/train_003\.png is missing",
    ]


def test_every_problem_is_listed_with_the_name_of_the_file(tmp_path: Path) -> None:
    expected = damage(fakes.camvid(tmp_path / "camvid"))
    result = inspect(CamVid("train", str(tmp_path / "camvid")))
    for problem, message in zip(result.problems, expected, strict=True):
        assert re.search(message, problem)
        assert "\n" not in problem
    assert sum(result.pixels) == 0


def test_the_first_problem_is_raised_with_the_number_of_others(tmp_path: Path) -> None:
    root = fakes.camvid(tmp_path / "camvid")
    first = damage(root)[0]
    datasets = [CamVid(split, str(root)) for split in ("train", "val")]
    with pytest.raises(UsageError, match=rf"{first}.* \(and 3 more: python scripts/inspect_data\.py lists them\)"):
        inspect_all(datasets)


def test_inspections_with_problems_are_not_cached(tmp_path: Path, cache: Path) -> None:
    root = fakes.camvid(tmp_path / "camvid")
    damage(root)
    inspect(CamVid("train", str(root)))
    assert not cache.exists()


def test_an_image_in_two_splits_is_named(tmp_path: Path) -> None:
    root = fakes.folder(tmp_path / "data", layout="lists")
    (root / "val.txt").write_text("val_0\ntrain_2\n")
    datasets = [Folder(split, str(root)) for split in ("train", "val")]
    message = r"images/train_2\.png is in train and in val, so its score would be meaningless - list it once"
    assert len(overlaps(datasets)) == 1
    assert re.search(message, overlaps(datasets)[0])
    with pytest.raises(UsageError, match=message):
        inspect_all(datasets)


def test_a_link_to_an_image_of_another_split_is_an_overlap(tmp_path: Path) -> None:
    root = fakes.folder(tmp_path / "data", layout="subfolders")
    (root / "val/images/val_0.png").unlink()
    (root / "val/images/val_0.png").symlink_to(root / "train/images/train_1.png")
    assert len(overlaps(Folder(split, str(root)) for split in ("train", "val"))) == 1


def test_splits_that_share_nothing_pass(tmp_path: Path) -> None:
    root = str(fakes.camvid(tmp_path / "camvid"))
    train, val = inspect_all([CamVid("train", root), CamVid("val", root)])
    assert (train.split, val.split) == ("train", "val")


# Cache


def test_a_cached_inspection_is_the_same_and_reads_the_files_once(
    camvid: CamVid, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspected = record_inspections(monkeypatch)
    first = inspect(camvid)
    assert inspect(CamVid("train", str(camvid.pairs[0].image.parents[1]))) == first
    assert inspected == ["train"]


def test_without_the_cache_files_are_read_again_and_nothing_is_written(
    camvid: CamVid, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    inspected = record_inspections(monkeypatch)
    inspect(camvid, use_cache=False)
    assert not cache.exists()
    inspect(camvid)
    inspect(camvid, use_cache=False)
    assert len(inspected) == 3


@pytest.mark.parametrize("change", ["content", "time", "list"])
def test_a_cached_inspection_is_invalid_when_a_file_changes(
    camvid: CamVid, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    inspected = record_inspections(monkeypatch)
    inspect(camvid)
    mask = camvid.pairs[2].mask
    root = mask.parents[1]
    if change == "content":
        Image.fromarray(np.full((48, 64), 9, dtype=np.uint8)).save(mask)
    elif change == "time":
        os.utime(mask, ns=(0, 1))
    else:
        (root / "train.txt").write_text("".join((root / "train.txt").read_text().splitlines(keepends=True)[:3]))
    again = inspect(CamVid("train", str(root)))
    assert inspected == ["train", "train"]
    if change == "content":
        assert again.pixels[9] >= 48 * 64
    assert again.num_images == (3 if change == "list" else 4)


def test_splits_seeds_and_classes_are_cached_separately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inspected = record_inspections(monkeypatch)
    root = str(fakes.folder(tmp_path / "data", layout="lists"))
    swapped = {"a": 2, "b": 1, "c": 0}
    datasets = [Shapes("train", num_train=2), Shapes("val", num_val=2), Shapes("train", num_train=2, data_seed=1)]
    datasets += [Folder("train", root), Folder("train", root, classes=swapped)]
    inspections = [inspect(dataset) for dataset in datasets]
    assert len(inspected) == 5
    assert inspections[3].pixels[0] == inspections[4].pixels[2]


@pytest.mark.parametrize("content", ["", '{"split": "tr', "[]", "{}"])
def test_a_truncated_cache_file_is_replaced(
    camvid: CamVid, monkeypatch: pytest.MonkeyPatch, cache: Path, content: str
) -> None:
    first = inspect(camvid)
    (path,) = cache.iterdir()
    path.write_text(content)
    inspected = record_inspections(monkeypatch)
    assert inspect(camvid) == first
    assert inspected == ["train"]
    assert path.read_text() != content


def test_an_unwritable_cache_is_ignored(camvid: CamVid, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    assert inspect(camvid).num_images == 4


# Text


def test_the_table_shows_classes_labels_colours_counts_and_weights() -> None:
    result = inspection.Inspection(
        "val",
        2,
        [75, 0, 25],
        [100, 0, 100],
        [2, 0, 1],
        [(5, 10, 1), (5, 9, 1), (5, 8, 1), (5, 7, 1)],
        8,
        [0] * 3,
        [1] * 3,
        [],
    )
    classes = Classes(("sky", "pavement"), ((128, 0, 255), (1, 2, 3)), labels=(3, 40))
    assert class_table(result, classes, [1.5, 0.25]).splitlines() == [
        "val: 2 images (1 of 5x10, 1 of 5x9, 1 of 5x8 and 1 other sizes)",
        "  class     label  colour       images        pixels   share  weight",
        "  sky           3  #8000ff           2            75  75.00%  1.5000",
        "  pavement     40  #010203           0             0   0.00%  0.2500   <- no pixel in this split",
        "  (ignored)   255  -                 1            25  25.00%       -",
    ]
    masks = Classes(("background", "foreground"), ((0, 0, 0), (255, 255, 255)), labels=(0, 255))
    assert class_table(result, masks, None).splitlines()[-1].split()[:2] == ["(ignored)", "-"]  # 255 is a class


def test_the_table_shows_channels_that_are_not_8_bit_rgb() -> None:
    result = inspection.Inspection(
        "train", 1, [9, 1, 0], [9, 9, 0], [1, 1, 0], [(1, 9, 1)], 16, [1234.5, 6], [70.25, 8], []
    )
    classes = Classes(("sky", "road"), ((0, 0, 0), (1, 2, 3)))
    assert (
        class_table(result, classes, None).splitlines()[1] == "  2 channel(s) of 16 bit, mean 1234.5, 6, std 70.25, 8"
    )


def test_a_table_without_weights_has_no_column_of_them(camvid: CamVid) -> None:
    lines = class_table(inspect(camvid), camvid.classes, None).splitlines()
    assert lines[0] == "train: 4 images (3 of 48x64, 1 of 16x32)"
    assert len(lines) == 2 + 12
    assert lines[1].endswith("share")
    assert all(line.endswith("%") for line in lines[2:])
