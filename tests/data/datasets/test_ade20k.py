"""ADE20K: labels 1..150 as classes 0..149, label 0 ignored, and the download of the archive."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from http_server import Server, serving, whole
from PIL import Image

from segdeconv.data import ADE20K
from segdeconv.data.datasets import ade20k
from segdeconv.data.inspection import class_table, inspect
from segdeconv.errors import UsageError

# Class names of another library (open-mmlab/mmsegmentation, mmseg/datasets/ade.py).
NAMES = """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair,
    seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
    counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
    countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
    light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel,
    pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
    canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven,
    ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture,
    hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower,
    radiator, glass, clock, flag
"""


def raises(message: str) -> Any:
    return pytest.raises(UsageError, match=message)


def relabel(path: Path, change: Any) -> None:
    Image.fromarray(change(np.array(fakes.opened(path))).astype(np.uint8)).save(path)


def test_ade20k_reads_published_masks_with_wall_as_class_0_and_label_0_ignored(tmp_path: Path) -> None:
    root = str(fakes.ade20k(tmp_path))
    for split, prefix, first in (("train", "ADE_train", 1), ("val", "ADE_val", 101)):
        data = ADE20K(split, root)
        assert data.names == [f"{prefix}_0000000{index}" for index in (1, 2, 3)]
        for index, (image, mask, _) in enumerate(data[index] for index in range(3)):
            true_image, labels = fakes.ade20k_image_and_labels(first + index)
            assert np.abs(image.astype(int) - true_image).mean() < 6  # a JPEG
            np.testing.assert_array_equal(mask == 255, labels == 0)
            np.testing.assert_array_equal(mask[labels > 0], labels[labels > 0] - 1)


def test_ade20k_has_the_150_classes_of_the_benchmark() -> None:
    names = [name.strip().replace(" ", "_") for name in NAMES.split(",")]
    names[89] = "television"  # the first of the synonyms in objectInfo150.txt
    assert list(ade20k.CLASSES.names) == names
    assert ade20k.CLASSES.labels == tuple(range(1, 151))
    # From color150.mat, by label.
    colours = {
        1: (120, 120, 120), 3: (6, 230, 230), 7: (140, 140, 140), 13: (150, 5, 61), 21: (0, 102, 200),
        48: (0, 163, 255), 50: (250, 10, 15), 67: (255, 0, 0), 85: (255, 184, 184), 105: (8, 184, 170),
        116: (70, 184, 160), 129: (10, 190, 212), 137: (41, 0, 255), 148: (25, 194, 194), 150: (92, 0, 255),
    }  # fmt: skip
    assert {label: ade20k.CLASSES.colours[label - 1] for label in colours} == colours
    assert ade20k.CLASSES.colours[48] == (140, 140, 141)  # (140, 140, 140) there, the colour of road
    assert len(set(ade20k.CLASSES.colours)) == 150


def test_masks_with_labels_reduced_by_1_are_refused(tmp_path: Path) -> None:
    root = fakes.ade20k(tmp_path)
    path = root / "annotations/training/ADE_train_00000002.png"
    relabel(path, lambda labels: labels - np.uint8(1))
    problems = inspect(ADE20K("train", str(root)), use_cache=False).problems
    assert len(problems) == 1
    assert problems[0].startswith(f"mask {path} has label 255; the classes have labels 1..150 and 0 for ignored pixels")


def test_a_mask_of_the_full_ade20k_is_refused(tmp_path: Path) -> None:
    """The full data set encodes classes in the red and green channels of its masks."""
    root = fakes.ade20k(tmp_path)
    path = root / "annotations/validation/ADE_val_00000001.png"
    shape = np.array(fakes.opened(path)).shape
    Image.fromarray(np.full((*shape, 3), (30, 180, 7), np.uint8)).save(path)
    assert "has colour (30, 180, 7) at row 0" in inspect(ADE20K("val", str(root)), use_cache=False).problems[0]


def test_the_table_shows_the_labels_of_the_files(tmp_path: Path) -> None:
    data = ADE20K("train", str(fakes.ade20k(tmp_path)))
    lines = class_table(inspect(data, use_cache=False), data.classes, None).splitlines()
    assert lines[2].split()[:2] == ["wall", "1"]
    assert lines[151].split()[:2] == ["flag", "150"]
    assert lines[152].split()[:3] == ["(ignored)", "0", "#000000"]


@pytest.mark.parametrize("above", ["", "ADEChallengeData2016"])
def test_the_root_may_be_the_folder_or_the_one_above_it(tmp_path: Path, above: str) -> None:
    fakes.ade20k(tmp_path / "root" / above)
    assert len(ADE20K("val", str(tmp_path / "root"))) == 3


def test_missing_files_are_named(tmp_path: Path) -> None:
    with raises(r"dataset\.root=nowhere is not a folder; it should hold an ADEChallengeData2016 with images/ and"):
        ADE20K("train", "nowhere")
    root = fakes.ade20k(tmp_path / "ADEChallengeData2016")
    with raises("ADE20K's test images have no public labels - use val"):
        ADE20K("test", str(root))
    (root / "annotations/training/ADE_train_00000003.png").unlink()
    assert "ADE_train_00000003.png is missing" in inspect(ADE20K("train", str(root)), use_cache=False).problems[0]
    for path in (root / "images/validation").iterdir():
        path.unlink()
    with raises(r"images/validation contains no \.jpg - restore it"):
        ADE20K("val", str(root))
    (root / "annotations/training").rename(root / "annotations/train")
    with raises(r"ADEChallengeData2016 has no annotations/training - complete it, or move it away"):
        ADE20K("val", str(tmp_path))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, bytes]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    root = fakes.ade20k(tmp_path / "published" / "ADEChallengeData2016")
    with zipfile.ZipFile(tmp_path / "ade.zip", "w") as file:
        for path in sorted(root.rglob("*")):
            file.write(path, path.relative_to(root.parent))
    content = (tmp_path / "ade.zip").read_bytes()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with serving() as server:
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        archive = ade20k.ARCHIVE._replace(urls=(server.serve("/ade", whole(content)),), md5=md5)
        monkeypatch.setattr(ade20k, "ARCHIVE", archive)
        yield server, content


def test_ade20k_is_fetched_verified_by_md5_and_unpacked_once(published: tuple[Server, bytes]) -> None:
    server, _ = published
    assert len(ADE20K("train")) == len(ADE20K("val")) == 3
    assert [path for path, _ in server.requests] == ["/ade"]
    assert sorted(path.name for path in Path("data").iterdir()) == ["ADEChallengeData2016"]
    assert sorted(path.name for path in Path("data/ADEChallengeData2016").iterdir()) == ["annotations", "images"]
    np.testing.assert_array_equal(ADE20K("val")[0].mask == 255, fakes.ade20k_image_and_labels(101)[1] == 0)


def test_an_archive_with_the_wrong_md5_is_not_unpacked(
    published: tuple[Server, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, content = published
    changed = content[:3000] + bytes([content[3000] ^ 1]) + content[3001:]
    monkeypatch.setattr(ade20k, "ARCHIVE", ade20k.ARCHIVE._replace(urls=(server.serve("/bad", whole(changed)),)))
    with raises(
        r"^could not download ADEChallengeData2016\.zip \(.*it is not the published file, its md5 is [0-9a-f]{32} .*\)"
        r" - put ADEChallengeData2016\.zip \(images and masks, 1 GB, from http\S+\) into .*/data, or give an unpacked"
    ):
        ADE20K("train")
    assert not Path("data/ADEChallengeData2016").exists()
    Path("given").mkdir()
    Path("given/ADEChallengeData2016.zip").write_bytes(content)
    assert len(ADE20K("train", "given")) == 3
    assert Path("given/ADEChallengeData2016.zip").exists()  # it was not downloaded


def test_the_hash_is_that_of_other_libraries() -> None:
    assert ade20k.ARCHIVE.md5 == "7328b3957e407ddae1d3cbf487f149ef"
    assert ade20k.ARCHIVE.urls == ("https://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",)
