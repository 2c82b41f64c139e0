"""Shapes, CamVid and Folder read their files and classes, and report what is wrong with them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from real_data import PIXEL_COUNTS, REAL_CAMVID, needs_camvid

from segdeconv.classes import distinct_colours, voc_colours
from segdeconv.data import CamVid, Folder, Shapes
from segdeconv.data.datasets.camvid import CLASSES, hashes
from segdeconv.data.inspection import inspect
from segdeconv.errors import UsageError
from segdeconv.evaluation.metrics import ConfusionMatrix, scores


def raises(message: str) -> Any:
    return pytest.raises(UsageError, match=message)


# Shapes


def test_shapes_are_the_same_on_every_machine() -> None:
    image, mask, name = Shapes("train")[3]
    assert name == "train_00003"
    assert hashlib.sha256(mask).hexdigest() == "a6f5c4c5b5982b23d14529e1e3285445682e94235d37ea6cbc24d2e09598fc8c"
    assert hashlib.sha256(image).hexdigest() == "72b630e329685d5f391d4512fc2caf190c0209b2863cb41c46bb57efbcdfa089"


def test_shapes_depend_on_seed_split_and_index_alone() -> None:
    first = Shapes("train", num_train=9)
    [first[index] for index in (5, 0)]
    np.random.seed(1)  # noqa: NPY002 - the global state must not matter
    np.testing.assert_array_equal(first[4].image, Shapes("train", num_train=50)[4].image)
    others = (Shapes("val")[4], Shapes("test")[4], Shapes("train")[5], Shapes("train", data_seed=1)[4])
    images = [first[4].image.tobytes(), *(other.image.tobytes() for other in others)]
    assert len(set(images)) == len(images)


def test_shapes_have_every_class_and_nothing_else() -> None:
    masks = [Shapes("val", side=48)[index].mask for index in range(64)]
    assert {*range(7), 255} == set(np.unique(masks).tolist())


def test_every_edge_between_two_classes_of_shapes_is_ignored() -> None:
    for index in range(16):
        mask = Shapes("train")[index].mask.astype(int)
        for first, second in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            assert not ((first != second) & (first != 255) & (second != 255)).any()


def test_shapes_have_the_requested_sizes() -> None:
    assert [len(Shapes(split, num_train=5, num_val=3)) for split in ("train", "val", "test")] == [5, 3, 3]
    image, mask, _ = Shapes("train", side=32)[0]
    assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((32, 32, 3), np.uint8, (32, 32), np.uint8)


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_beyond_shapes_is_refused(index: int) -> None:
    with raises(f"index {index} is out of range; shapes has 5 images in 'train'"):
        Shapes("train", num_train=5)[index]


@pytest.mark.parametrize("make", [Shapes, lambda split: CamVid(split, "nowhere")])
def test_an_unknown_split_is_refused(make: Callable[[str], Any]) -> None:
    with raises("unknown split 'valid' - the splits are train, val, test"):
        make("valid")


# CamVid


def test_camvid_reads_images_masks_and_names_in_the_order_of_its_list(tmp_path: Path) -> None:
    data = CamVid("val", str(fakes.camvid(tmp_path)))
    assert data.names == [f"val_{index:03d}" for index in range(fakes.NUM)]
    for index, sample in enumerate(data[i] for i in range(len(data))):
        image, mask = fakes.image_and_mask(100 + index, 12)
        np.testing.assert_array_equal(sample.image, image)
        np.testing.assert_array_equal(sample.mask, mask)


def test_camvid_has_the_papers_eleven_classes_and_void_11() -> None:
    table = "808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0"
    assert CLASSES.colours == tuple(tuple(bytes.fromhex(colour)) for colour in table.split())
    assert (len(CLASSES), CLASSES.ignore_index) == (11, 11)


def test_lists_may_have_blank_lines_crlf_and_a_byte_order_mark(tmp_path: Path) -> None:
    lines = (fakes.camvid(tmp_path) / "train.txt").read_text().splitlines()
    (tmp_path / "train.txt").write_bytes(("\ufeff\r\n" + "\r\n\r\n".join(lines) + "\r\n \r\n").encode())
    assert CamVid("train", str(tmp_path)).names == [f"train_{index:03d}" for index in range(fakes.NUM)]


def test_camvid_without_its_folder_or_list_is_refused(tmp_path: Path) -> None:
    with raises(r"dataset\.root=.*nowhere is not a folder; it should hold train\.txt, train/, trainannot/ .* - give"):
        CamVid("train", str(tmp_path / "nowhere"))
    with raises(r"val\.txt is missing - dataset\.root=.* should be CamVid's folder"):
        CamVid("val", str(fakes.camvid(tmp_path, splits=("train",))))


def test_a_drive_of_camvid_becomes_val_and_leaves_train(tmp_path: Path) -> None:
    fakes.camvid(tmp_path)
    split = {name: CamVid(name, str(tmp_path), drive="train_002") for name in ("train", "val")}
    assert split["train"].names == ["train_000", "train_001", "train_003"]
    assert split["val"].names == ["train_002"]
    np.testing.assert_array_equal(split["val"][0].image, CamVid("train", str(tmp_path))[2].image)
    assert "begin with train_002" in split["val"].notes[0]
    assert split["val"].fingerprint != CamVid("val", str(tmp_path)).fingerprint


@pytest.mark.parametrize(("drive", "count"), [("0002", 0), ("train", 4)])
def test_a_drive_of_camvid_with_no_or_every_train_image_is_refused(tmp_path: Path, drive: str, count: int) -> None:
    with raises(
        rf"dataset\.drive={drive} is the prefix of {count} of the 4 images of .*train\.txt - give one drive of"
    ):
        CamVid("val", str(fakes.camvid(tmp_path)), drive=drive)


@needs_camvid
def test_the_three_drives_of_the_real_train_split_have_the_known_frames() -> None:
    counts = {drive: len(CamVid("val", str(REAL_CAMVID), drive=drive)) for drive in ("0001TP", "0006R0", "0016E5")}
    assert counts == {"0001TP": 62, "0006R0": 101, "0016E5": 204}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"train\.txt lists no image - restore the list"),
        ("\n \n", r"train\.txt lists no image - restore the list"),
        ("train/a.png trainannot/a.png\ntrain/b.png\n", r"train\.txt, line 2: 'train/b.png' is not 'image mask'"),
        ("a b c\n", r"train\.txt, line 1: 'a b c' is not 'image mask'"),
        ("train/a.png trainannot/a.png\n" * 2, r"train\.txt, line 2: .*twice"),
        ("../a.png ../b.png\n", r"train\.txt, line 1: "),
        ("/a.png /b.png\n", r"train\.txt, line 1: "),
    ],
    ids=["empty", "blank", "one path", "three paths", "twice", "parent", "absolute"],
)
def test_a_bad_list_of_camvid_is_refused_by_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    (fakes.camvid(tmp_path) / "train.txt").write_text(content)
    with raises(message):
        CamVid("train", str(tmp_path))


@pytest.mark.parametrize("dataset", ["camvid", "folder"])
def test_a_list_that_is_not_utf_8_is_refused_by_name(tmp_path: Path, dataset: str) -> None:
    """PowerShell's `>` writes UTF-16, for example."""
    if dataset == "camvid":
        fakes.camvid(tmp_path)
    else:
        fakes.folder(tmp_path, layout="lists")
    (tmp_path / "train.txt").write_text("train_0\n", encoding="utf-16")
    with raises(r"train\.txt .*UTF-8"):
        (CamVid if dataset == "camvid" else Folder)("train", str(tmp_path))


TRAIN_IMAGES = [366, 365, 366, 367, 349, 319, 351, 173, 360, 317, 201, 367]


@needs_camvid
@pytest.mark.parametrize(("split", "num"), [("train", 367), ("val", 101)])
def test_the_real_camvid_has_the_counted_pixels_of_every_class(split: str, num: int) -> None:
    inspection = inspect(CamVid(split, str(REAL_CAMVID)), use_cache=False)
    assert inspection.problems == []
    assert inspection.num_images == num
    assert inspection.sizes == [(360, 480, num)]
    assert inspection.pixels == PIXEL_COUNTS[split]
    assert sum(inspection.pixels) == num * 360 * 480
    if split == "train":
        assert inspection.images == TRAIN_IMAGES


def test_the_hash_table_of_camvid_names_every_public_file() -> None:
    table = hashes()
    for split, num in (("train", 367), ("val", 101), ("test", 233)):
        for sub in (split, f"{split}annot"):
            assert sum(path.startswith(f"CamVid/{sub}/") for path in table) == num
        assert f"CamVid/{split}.txt" in table
    assert len(table) == 2 * (367 + 101 + 233) + 3
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in table.values())


@needs_camvid
def test_the_hash_table_of_camvid_matches_the_real_files() -> None:
    available = sorted(path for path in hashes() if (REAL_CAMVID.parent / path).is_file())
    sample = np.random.default_rng(0).choice(available, size=20, replace=False)
    for path in (*sample, "CamVid/train.txt", "CamVid/val.txt"):
        assert hashlib.sha256((REAL_CAMVID.parent / path).read_bytes()).hexdigest() == hashes()[path]


# Folder: files and inferred classes


def masks_of(data: Folder) -> list[np.ndarray]:
    return [data[index].mask for index in range(len(data))]


@pytest.mark.parametrize("layout", ["lists", "subfolders"])
@pytest.mark.parametrize("kind", ["labels", "palette", "binary", "colours"])
def test_every_kind_of_mask_is_read_in_every_layout(tmp_path: Path, kind: str, layout: str) -> None:
    data = Folder("val", str(fakes.folder(tmp_path, kind, layout=layout)))
    assert data.names == [f"val_{index}" for index in range(fakes.NUM)]
    # Inferred colours are sorted, which puts the classes of fakes.COLOURS in the order 0, 2, 1.
    order = np.array([0, 2, 1] if kind == "colours" else [0, 1, 2], dtype=np.uint8)
    for index, (image, mask, _) in enumerate(data[i] for i in range(len(data))):
        true_image, true_mask = fakes.image_and_mask(100 + index, 2 if kind == "binary" else 3)
        true_mask = order[true_mask]
        if kind in ("labels", "palette"):
            true_mask[:4, :4] = 255
        np.testing.assert_array_equal(image, true_image)
        np.testing.assert_array_equal(mask, true_mask)


@pytest.mark.parametrize(
    ("kind", "names", "colours"),
    [
        ("labels", ("class_0", "class_1", "class_2"), ((0, 0, 0), *distinct_colours(2))),
        ("palette", ("class_0", "class_1", "class_2"), voc_colours(3)),
        ("binary", ("background", "foreground"), ((0, 0, 0), (255, 255, 255))),
        ("colours", ("colour_000000", "colour_0080ff", "colour_ff0000"), ((0, 0, 0), (0, 128, 255), (255, 0, 0))),
    ],
)
def test_classes_are_inferred_from_the_masks(tmp_path: Path, kind: str, names: tuple[str, ...], colours: Any) -> None:
    classes = Folder("train", str(fakes.folder(tmp_path, kind))).classes
    assert (classes.names, classes.colours, classes.ignore_index) == (names, colours, 255)


def test_classes_are_inferred_from_the_masks_of_all_splits(tmp_path: Path) -> None:
    fakes.folder(tmp_path, layout="subfolders")
    Image.new("L", (64, 48), 7).save(tmp_path / "val" / "masks" / "val_0.png")
    for split in ("train", "val"):
        assert Folder(split, str(tmp_path)).classes.labels == (0, 1, 2, 7)
    assert (Folder("val", str(tmp_path))[0].mask == 3).all()


def test_the_colours_of_a_palette_are_the_colours_of_the_classes(tmp_path: Path) -> None:
    fakes.folder(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        mask = fakes.opened(path)
        mask.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7] + 249 * [0, 0, 1] + 4 * [0, 0, 0])
        mask.save(path)
    assert Folder("train", str(tmp_path)).classes.colours == ((9, 9, 9), (8, 8, 8), (7, 7, 7))


@pytest.mark.parametrize(("suffix", "ending"), [(".jpg", ""), (".jpg", "_mask"), (".tif", "-labels"), (".JPG", "_GT")])
def test_images_and_masks_are_paired_by_name(tmp_path: Path, suffix: str, ending: str) -> None:
    root = fakes.folder(tmp_path, layout="subfolders", image_suffix=suffix, mask_ending=ending)
    data = Folder("train", str(root))
    assert [(pair.image.name, pair.mask.name) for pair in data.pairs] == [
        (f"train_{index}{suffix}", f"train_{index}{ending}.png") for index in range(fakes.NUM)
    ]


def test_sub_folders_are_part_of_the_name_and_masks_without_an_image_are_left_out(tmp_path: Path) -> None:
    fakes.folder(tmp_path)
    for sub in ("images", "masks"):
        (tmp_path / sub / "town").mkdir()
        (tmp_path / sub / "train_0.png").rename(tmp_path / sub / "town" / "train_0.png")
    (tmp_path / "images" / "train_1.png").unlink()
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    names = [name for split in ("train", "val") for name in Folder(split, str(tmp_path)).names]
    assert sorted(names) == ["town/train_0", "train_2", "train_3", "val_0", "val_1", "val_2", "val_3"]


def test_a_list_may_name_files_with_their_suffix(tmp_path: Path) -> None:
    fakes.folder(tmp_path, layout="lists")
    (tmp_path / "test.txt").write_bytes(b"\xef\xbb\xbfval_2.png\r\n\r\ntrain_1\r\n")
    data = Folder("test", str(tmp_path))
    assert data.names == ["val_2", "train_1"]
    assert data.split_names == ("train", "val", "test")


def test_a_seeded_split_is_stable_disjoint_and_independent_of_the_order_of_files(tmp_path: Path) -> None:
    fakes.folder(tmp_path / "a", num=10)
    fakes.folder(tmp_path / "b", num=10)
    for sub in ("images", "masks"):  # written again in another order
        contents = {path.name: path.read_bytes() for path in (tmp_path / "b" / sub).iterdir()}
        for name in contents:
            (tmp_path / "b" / sub / name).unlink()
        for name in sorted(contents, reverse=True):
            (tmp_path / "b" / sub / name).write_bytes(contents[name])

    def val(root: str, **settings: Any) -> list[str]:
        train, val = (Folder(split, str(tmp_path / root), **settings).names for split in ("train", "val"))
        assert set(train).isdisjoint(val)
        assert len(train) + len(val) == 20
        return val

    assert val("a") == val("b")
    assert len(val("a")) == 4
    assert len(val("a", val_share=0.5)) == 10
    assert val("a") != val("a", split_seed=1)


def test_a_larger_val_share_keeps_the_val_images_of_a_smaller_one(tmp_path: Path) -> None:
    root = str(fakes.folder(tmp_path))
    assert set(Folder("val", root, val_share=0.25).names) < set(Folder("val", root, val_share=0.5).names)


# Folder: classes.yaml


@pytest.mark.parametrize(
    ("kind", "content", "names", "labels", "colours"),
    [
        ("labels", ["sky", "road", "car"], ("sky", "road", "car"), (0, 1, 2), distinct_colours(3)),
        ("labels", {"car": 2, "sky": 0, "road": 1}, ("car", "sky", "road"), (2, 0, 1), distinct_colours(3)),
        (
            "colours",
            {"sky": [0, 0, 0], "car": "#FF0000", "road": "#0080ff"},
            ("sky", "car", "road"),
            (0, 1, 2),
            fakes.COLOURS,
        ),
    ],
    ids=["list", "labels", "colours"],
)
@pytest.mark.parametrize("source", ["classes.yaml", "file", "content"])
def test_classes_are_named_by_a_list_labels_or_colours(
    tmp_path: Path, kind: str, content: Any, names: Any, labels: Any, colours: Any, source: str
) -> None:
    fakes.folder(tmp_path, kind)
    path = tmp_path / ("names.yaml" if source == "file" else "classes.yaml")
    if source != "content":
        path.write_text(yaml.safe_dump(content, sort_keys=False))
    data = Folder("train", str(tmp_path), classes={"file": str(path), "content": content}.get(source))
    assert (data.classes.names, data.classes.labels, data.classes.colours) == (names, labels, colours)
    index = int(data.names[0].split("_")[1]) + 100 * data.names[0].startswith("val")
    stored = fakes.image_and_mask(index, 3)[1]
    if kind == "labels":
        stored[:4, :4] = 255
    expected = np.array([*(labels.index(label) for label in range(3)), *[255] * 253])[stored]
    np.testing.assert_array_equal(data[0].mask, expected)


def test_ignore_names_the_label_of_ignored_pixels(tmp_path: Path) -> None:
    fakes.folder(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        mask = np.array(fakes.opened(path))
        Image.fromarray(np.where(mask == 255, 2, mask).astype(np.uint8)).save(path)
    data = Folder("train", str(tmp_path), classes={"sky": 0, "road": 1, "ignore": 2})
    assert (data.classes.names, data.classes.ignore_index) == (("sky", "road"), 2)
    assert {int(value) for mask in masks_of(data) for value in np.unique(mask)} == {0, 1, 2}


def test_ignore_names_the_colour_of_ignored_pixels(tmp_path: Path) -> None:
    fakes.folder(tmp_path, "colours")
    classes = {"ignore": [0, 0, 0], "car": [255, 0, 0], "road": [0, 128, 255]}
    data = Folder("train", str(tmp_path), classes=classes)
    assert data.classes.names == ("car", "road")
    assert {int(value) for mask in masks_of(data) for value in np.unique(mask)} == {0, 1, 255}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 0, "b": [1, 2, 3]}, "mixes labels and colours - give every class a label, or every class a colour"),
        ({"a": 0, "b": 1, "ignore": "#000000"}, "mixes labels and colours"),
        ({"a": 0, "b": "red"}, r"class 'b' is 'red' - give a label 0\.\.65535, a colour"),
        ({"a": 0, "b": 65536}, "class 'b' is 65536 - give a label"),
        ({"a": 0, "b": -1}, "class 'b' is -1 - give a label"),
        ({"a": 0, "b": 1, "ignore": "void"}, "ignore is 'void' - give a label, such as 255 or -9999"),
        ({"ignore": 0}, "contains no classes"),
        ({"a": 0, "b": [1, 2, 300]}, r"class 'b' is \[1, 2, 300\] - give a label"),
        ({"a": 0, "b": True}, "class 'b' is True - give a label"),
        ({"a": 0, "b": 0}, "the class labels .* are not all different"),
        ({"a": 0}, r"1 class\(es\) \['a'\]: a network needs at least two"),
        ([], "contains no classes - write one class per line"),
        ({"a": 0, "b": 5, "ignore": 5}, "5.* ignore"),
        ({"a": [1, 1, 1], "b": "#010101"}, "not all different"),
        ({"a": [1, 1, 1], "b": [2, 2, 2], "ignore": [2, 2, 2]}, "ignore"),
        (["sky", "road", "road"], "not all different"),
    ],
)
def test_invalid_classes_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    with raises(message):
        Folder("train", str(fakes.folder(tmp_path)), classes=content)


def test_a_classes_file_that_is_missing_or_not_yaml_is_refused(tmp_path: Path) -> None:
    fakes.folder(tmp_path)
    with raises(r"dataset\.classes=nowhere\.yaml is not a file"):
        Folder("train", str(tmp_path), classes="nowhere.yaml")
    for content, message in ((b"a: [", "is not YAML"), (b"\xff\xfe\x00", "is not YAML"), (b"", "contains no classes")):
        (tmp_path / "classes.yaml").write_bytes(content)
        with raises(rf"classes\.yaml {message}"):
            Folder("train", str(tmp_path))


def test_a_mask_with_a_label_outside_the_classes_is_refused_by_name(tmp_path: Path) -> None:
    data = Folder("train", str(fakes.folder(tmp_path, layout="subfolders")), classes=["a", "b"])
    with raises(rf"mask {data.pairs[0].mask} has label 2; the classes have labels 0\.\.1 and 255 for ignored"):
        data[0]


@pytest.mark.parametrize("kind", ["labels", "palette", "binary", "colours"])
def test_classes_are_restored_from_a_checkpoint(tmp_path: Path, kind: str) -> None:
    root = str(fakes.folder(tmp_path, kind))
    original = Folder("val", root)
    (tmp_path / "classes.yaml").write_text("{other: 0, names: 1}")  # of another data set
    restored = Folder("val", root, classes=original.classes.to_dict())
    assert restored.classes == original.classes
    for restored_mask, mask in zip(masks_of(restored), masks_of(original), strict=True):
        np.testing.assert_array_equal(restored_mask, mask)


# Folder: what is refused


def test_an_image_without_a_mask_is_refused(tmp_path: Path) -> None:
    fakes.folder(tmp_path)
    (tmp_path / "masks" / "train_1.png").unlink()
    with raises(
        r"images/train_1\.png has no mask; a mask has its image's name in .*masks, where the nearest names are .* - add"
    ):
        Folder("train", str(tmp_path))
    (tmp_path / "masks" / "train_2.png").unlink()
    with raises(r"images/train_1\.png has no mask \(and 1 more images have none\)"):
        Folder("train", str(tmp_path))


@pytest.mark.parametrize(("sub", "name"), [("images", "train_1.jpg"), ("masks", "train_1.tif")])
def test_two_files_of_one_name_are_refused(tmp_path: Path, sub: str, name: str) -> None:
    fakes.folder(tmp_path)
    Image.new("L", (64, 48)).save(tmp_path / sub / name)
    with raises(r"train_1\.\w+ and .*train_1\.\w+ have the same name; a name identifies one image - rename one"):
        Folder("train", str(tmp_path))


def test_two_masks_for_one_image_are_refused(tmp_path: Path) -> None:
    fakes.folder(tmp_path, mask_ending="_mask")
    Image.new("L", (64, 48)).save(tmp_path / "masks" / "train_1_label.png")
    with raises(r"train_1_(label|mask)\.png and .*train_1_(label|mask)\.png"):
        Folder("train", str(tmp_path))


def test_masks_of_labels_beside_masks_of_colours_are_refused(tmp_path: Path) -> None:
    fakes.folder(tmp_path)
    Image.new("RGB", (64, 48), "red").save(tmp_path / "masks" / "train_1.png")
    with raises(r"mask .* holds labels and mask .*train_1\.png colours - save all masks in the same way"):
        Folder("train", str(tmp_path))


@pytest.mark.parametrize(("channels", "kind"), [(1, "labels"), (3, "colours")])
def test_masks_of_too_many_labels_are_refused(tmp_path: Path, channels: int, kind: str) -> None:
    fakes.folder(tmp_path)
    ramp = np.arange(48 * 64).reshape(48, 64) % 200
    mask = (ramp if channels == 1 else np.dstack([ramp, ramp, 0 * ramp])).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "masks" / "train_0.png")
    with raises(rf"mask .*train_0\.png has 200 different {kind}, too many to be classes - it seems to be a photograph"):
        Folder("train", str(tmp_path))


@pytest.mark.parametrize(("layout", "splits"), [("plain", "train, val"), ("lists", "train, val")])
def test_an_unknown_split_of_a_folder_is_refused(tmp_path: Path, layout: str, splits: str) -> None:
    with raises(f"unknown split 'test' - the splits are {splits}"):
        Folder("test", str(fakes.folder(tmp_path, layout=layout)))


def test_a_missing_or_empty_folder_is_refused(tmp_path: Path) -> None:
    with raises(r"dataset\.root=.*nowhere is not a folder; it should hold images/ and masks/"):
        Folder("train", str(tmp_path / "nowhere"))
    with raises(r"images is not a folder; dataset\.root should hold images/ and masks/"):
        Folder("train", str(tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with raises(r"images contains no image - the supported suffixes are \.apng, \.bmp"):
        Folder("train", str(tmp_path))
    for sub in ("images", "masks"):
        Image.new("L", (8, 8)).save(tmp_path / sub / "only.png")
    with raises("holds 1 image with a mask - train and val need at least one each"):
        Folder("train", str(tmp_path))


def test_a_folder_of_train_without_val_is_refused(tmp_path: Path) -> None:
    fakes.folder(tmp_path, layout="subfolders")
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    with raises("has train but no val/images - add"):
        Folder("train", str(tmp_path))
    fakes.folder(tmp_path / "listed", layout="lists")
    (tmp_path / "listed" / "val.txt").unlink()
    with raises(r"has train\.txt but no val\.txt - add it, or remove all lists"):
        Folder("train", str(tmp_path / "listed"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train_0\nnobody\n", r"line 2: image 'nobody' not found - it should be in images/"),
        ("../train_0\n", r"line 1: image '\.\./train_0' not found"),
        ("/etc/passwd.png\n", r"line 1: image '/etc/passwd\.png' not found"),
        (".\n", r"line 1: image '\.' not found"),
        ("images\n", r"line 1: image 'images' not found"),
        ("train_0\n\ntrain_0.png\n", r"line 3: 'train_0\.png' is listed twice - list every image once"),
        ("\n", "lists no image - fill it, or delete all lists for a random split"),
    ],
    ids=["unknown", "parent", "absolute", "dot", "folder", "twice", "empty"],
)
def test_a_bad_list_of_a_folder_is_refused_by_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    fakes.folder(tmp_path, layout="lists")
    (tmp_path / "train.txt").write_text(content)
    with raises(rf"train\.txt,? {message}"):
        Folder("train", str(tmp_path))


def test_colour_alone_does_not_distinguish_the_classes_of_shapes() -> None:
    """A network that sees the colour of one pixel stays far below an mIoU of 0.5."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(3, 32),
        torch.nn.ReLU(),
        torch.nn.Linear(32, 32),
        torch.nn.ReLU(),
        torch.nn.Linear(32, 7),
    )
    splits = {}
    for split in ("train", "val"):
        samples = [Shapes(split, num_train=96, num_val=48)[index] for index in range(96 if split == "train" else 48)]
        colours = torch.from_numpy(np.concatenate([sample.image.reshape(-1, 3) for sample in samples])) / 128 - 1
        splits[split] = colours, torch.from_numpy(np.concatenate([sample.mask.ravel() for sample in samples])).long()
    colours, labels = splits["train"]
    weights = torch.bincount(labels[labels < 255]).float().rsqrt()  # otherwise it would predict background everywhere
    optimizer = torch.optim.Adam(layers.parameters(), 0.01)
    for _ in range(300):
        pixels = torch.randint(len(labels), (8192,))
        loss = torch.nn.functional.cross_entropy(layers(colours[pixels]), labels[pixels], weights, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    colours, labels = splits["val"]
    matrix = ConfusionMatrix(7, 255)
    matrix.update(layers(colours).argmax(dim=1), labels)
    assert 0.05 < scores(matrix.compute()).miou < 0.3
