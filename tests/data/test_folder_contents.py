"""Folders as people bring them: what is read, what is said in a line, and what is refused."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from segdeconv.data import Folder, class_inference
from segdeconv.data.checks import review
from segdeconv.data.inspection import inspect
from segdeconv.errors import UsageError

SIZE = (24, 32)
NUM = 6
RED, GREEN, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 0)


def scene(seed: int, labels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return noise and a mask with a rectangle per label above 0."""
    random = np.random.default_rng(seed)
    mask = np.zeros(SIZE, np.uint8)
    for label in range(1, labels):
        mask[4 * label : 4 * label + 3, 2 + seed : 12 + seed] = label
    return random.integers(0, 255, (*SIZE, 3)).astype(np.uint8), mask


def folder(
    root: Path,
    mask: Callable[[np.ndarray, int], Image.Image] = lambda mask, _: Image.fromarray(mask),
    *,
    labels: int = 3,
    image_name: str = "images/{}.png",
    mask_name: str = "masks/{}.png",
    classes: str | None = None,
) -> str:
    for index in range(NUM):
        image, labels_ = scene(index, labels)
        for name, picture in ((image_name, Image.fromarray(image)), (mask_name, mask(labels_, index))):
            path = root / name.format(f"s{index:02d}")
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    if classes is not None:
        (root / "classes.yaml").write_text(classes)
    return str(root)


def levels(*values: int) -> Callable[[np.ndarray, int], Image.Image]:
    return lambda mask, _: Image.fromarray(np.array(values, np.uint8)[mask])


def with_palette(*palettes: tuple[tuple[int, int, int], ...]) -> Callable[[np.ndarray, int], Image.Image]:
    """Return a writer of palette masks, whose palettes take turns: red is label 1 of `scene`, green 2."""

    def make(mask: np.ndarray, index: int) -> Image.Image:
        palette = palettes[index % len(palettes)]
        table = np.array([palette.index(colour) for colour in (BLACK, RED, GREEN)], np.uint8)
        picture = Image.fromarray(table[mask]).convert("P")
        picture.putdata(table[mask].ravel().tolist())
        picture.putpalette([channel for colour in palette for channel in colour])
        return picture

    return make


def findings(root: str, **settings: object) -> list[tuple[str, bool]]:
    splits = [Folder(split, root, **settings) for split in ("train", "val")]
    inspections = [inspect(split, use_cache=False) for split in splits]
    assert not any(inspection.problems for inspection in inspections)
    return [(finding.message, finding.refused) for finding in review(splits, inspections)]


def by_name(root: str, **settings: object) -> dict[str, np.ndarray]:
    splits = [Folder(split, root, **settings) for split in ("train", "val")]
    return {split.names[index]: split[index].mask for split in splits for index in range(len(split))}


# Labels that are 255 by accident, and levels of grey


@pytest.mark.parametrize("classes", ["[ground, thing]", "ground: 0\nthing: 1\n", "ground: 0\nthing: 1\nignore: 255\n"])
def test_a_named_class_without_pixels_while_others_are_ignored_is_refused(tmp_path: Path, classes: str) -> None:
    root = folder(tmp_path, levels(0, 255), labels=2, classes=classes)
    (message, refused), *_ = findings(root)
    assert refused
    assert message.startswith("class thing has no pixel, while 180 pixels (3.9%) are 255, which is ignored")
    assert "write 'thing: 255' in classes.yaml" in message
    assert not any(refused for _, refused in findings(root, absent_classes="allow"))


def test_a_class_without_pixels_is_a_warning_if_nothing_is_ignored(tmp_path: Path) -> None:
    found = findings(folder(tmp_path, classes="[a, b, c, ghost]"))
    assert [refused for _, refused in found] == [False]
    assert found[0][0].startswith("class ghost has no pixel in train and val")


@pytest.mark.parametrize(
    ("values", "names", "line"),
    [
        ((0, 255, 255), ("background", "foreground"), None),
        ((0, 128, 255), ("class_0", "class_128", "class_255"), "the labels 0, 128, 255 are read as 3 classes"),
        ((0, 1, 255), ("class_0", "class_1"), "label 255 (180 pixels in 6 masks, 3.91% of all) is ignored"),
        ((7, 11, 26), ("class_7", "class_11", "class_26"), None),
    ],
)
def test_whether_255_is_a_class_is_decided_by_the_other_labels_and_said(
    tmp_path: Path, values: tuple[int, ...], names: tuple[str, ...], line: str | None
) -> None:
    root = folder(tmp_path, levels(*values))
    assert Folder("train", root).classes.names == names
    warnings = Folder("train", root).warnings
    assert [line in warning for warning in warnings] == [True] if line else not warnings


def test_levels_between_two_others_come_from_interpolation_and_are_refused(tmp_path: Path) -> None:
    def smoothed(mask: np.ndarray, _: int) -> Image.Image:
        grey = mask.astype(int) * 255
        grey[:-1] = (grey[:-1] + grey[1:]) // 2
        return Image.fromarray(grey.astype(np.uint8))

    with pytest.raises(UsageError, match=r"\.png has label 127 \(.*\) only where a smaller value meets a larger"):
        Folder("train", folder(tmp_path, smoothed, labels=2))


@pytest.mark.parametrize(("nodata", "dtype"), [(-9999, np.int32), (-1, np.int32), (65535, np.uint16), (9999, np.int32)])
def test_labels_without_data_are_refused_with_their_way_out(tmp_path: Path, nodata: int, dtype: type) -> None:
    root = folder(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        mask = np.array(Image.open(path)).astype(dtype)
        path.unlink()
        tifffile.imwrite(path.with_suffix(".tif"), np.where(mask == 2, dtype(nodata), mask))
    message = rf"has label {nodata} \(180 pixels in 6 masks\).* write a classes.yaml with .* and 'ignore: {nodata}'"
    with pytest.raises(UsageError, match=message):
        Folder("train", root)
    (tmp_path / "classes.yaml").write_text(f"a: 0\nb: 1\nignore: {nodata}\n")
    assert {int(value) for mask in by_name(root).values() for value in np.unique(mask)} == {0, 1, 255}


# Colours


def test_inferred_classes_are_cached_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path)
    expected = Folder("train", root).classes
    reads: list[Path] = []
    read = class_inference.read_stored_mask

    def counted(path: Path) -> object:
        reads.append(path)
        return read(path)

    monkeypatch.setattr(class_inference, "read_stored_mask", counted)
    class_inference._infer.cache_clear()  # as in a new process
    assert Folder("train", root).classes == expected
    assert reads == []
    mask = tmp_path / "masks" / next((tmp_path / "masks").iterdir()).name
    status = mask.stat()
    other = tmp_path / "other.png"  # of the same size and time, moved over the mask
    other.write_bytes(mask.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(mask)
    class_inference._infer.cache_clear()
    assert Folder("train", root).classes == expected
    assert len(reads) == NUM


def test_palettes_that_differ_are_read_through_their_colours(tmp_path: Path) -> None:
    root = folder(tmp_path, with_palette((BLACK, RED, GREEN), (BLACK, GREEN, RED)))
    assert Folder("train", root).classes.colours == (BLACK, GREEN, RED)
    assert "their palettes give label 1 different colours" in Folder("train", root).warnings[0]
    for name, mask in by_name(root).items():
        np.testing.assert_array_equal(mask, np.array([0, 2, 1])[scene(int(name[1:]))[1]])


def test_the_colours_of_a_table_decide_for_palette_masks(tmp_path: Path) -> None:
    table = "ground: [0, 0, 0]\ngreen: [0, 255, 0]\nred: [255, 0, 0]\n"
    root = folder(tmp_path, with_palette((BLACK, RED, GREEN)), classes=table)
    for name, mask in by_name(root).items():
        np.testing.assert_array_equal(mask, np.array([0, 2, 1])[scene(int(name[1:]))[1]])
    (tmp_path / "classes.yaml").write_text("ground: 0\nred: 1\ngreen: 2\n")  # labels decide if the table has labels
    for name, mask in by_name(root).items():
        np.testing.assert_array_equal(mask, scene(int(name[1:]))[1])


TABLES = [
    ("class_dict.csv", "name,r,g,b\nground,0,0,0\ngreen,0,255,0\nred,255,0,0\n"),
    ("label_colors.txt", "0 0 0 ground\n0 255 0 green\n255 0 0 red\n"),
    ("labelmap.txt", "# label:color_rgb:parts:actions\nground:0,0,0::\ngreen:0,255,0::\nred:255,0,0::\n"),
]


@pytest.mark.parametrize("kind", ["colours", "palette", "labels"])
@pytest.mark.parametrize(("name", "text"), TABLES)
def test_tables_of_other_programs_are_read_where_the_masks_have_their_colours(
    tmp_path: Path, name: str, text: str, kind: str
) -> None:
    def coloured(mask: np.ndarray, _: int) -> Image.Image:
        return Image.fromarray(np.array([BLACK, RED, GREEN], np.uint8)[mask])

    writers = {"colours": coloured, "palette": with_palette((BLACK, RED, GREEN)), "labels": levels(0, 1, 2)}
    root = folder(tmp_path, writers[kind])
    (tmp_path / name).write_text(text)
    data = Folder("train", root)
    if kind == "labels":
        assert data.classes.names == ("class_0", "class_1", "class_2")
        (line,) = data.warnings
        assert re.match(f"{tmp_path / name}: not read, since mask .* has label 1, but .* - write a classes.yaml", line)
    else:
        assert data.classes.names == ("ground", "green", "red")
        assert not data.warnings
        for number, mask in by_name(root).items():
            np.testing.assert_array_equal(mask, np.array([0, 2, 1])[scene(int(number[1:]))[1]])
    (tmp_path / "classes.yaml").write_text(
        "[a, b, c]" if kind == "labels" else "a: [0, 0, 0]\nb: '#00ff00'\nc: '#ff0000'"
    )
    data = Folder("train", root)
    assert data.classes.names == ("a", "b", "c")
    assert data.warnings == (f"{tmp_path / name}: not read, since classes.yaml names the classes - remove one of them",)


def test_labels_are_not_called_colours_where_the_table_has_colours(tmp_path: Path) -> None:
    root = folder(tmp_path, classes="a: [0, 0, 0]\nb: [255, 0, 0]\nc: [0, 255, 0]\n")
    with pytest.raises(UsageError, match=r"has label 1, but the classes are given by colour: .*; give them labels"):
        Folder("train", root)[0]
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray(np.array([0, 128, 255], np.uint8)[np.array(Image.open(path))]).save(path)
    (tmp_path / "classes.yaml").write_text("a: [0, 0, 0]\nb: [255, 255, 255]\nc: [128, 128, 128]\n")
    for name, mask in by_name(root).items():
        np.testing.assert_array_equal(mask, np.array([0, 2, 1])[scene(int(name[1:]))[1]])


def test_palettes_that_differ_without_telling_labels_apart_are_refused(tmp_path: Path) -> None:
    def make(mask: np.ndarray, index: int) -> Image.Image:
        picture = Image.fromarray(mask).convert("P")
        picture.putdata(mask.ravel().tolist())
        picture.putpalette([0, 0, 0, 255, 0, 0, 255 * (index % 2), 0, 0])
        return picture

    with pytest.raises(UsageError, match=r"masks .*\.png and .*\.png have different colours for label 2"):
        Folder("train", folder(tmp_path, make))


def test_labels_stored_as_three_equal_channels_are_labels(tmp_path: Path) -> None:
    root = folder(tmp_path, lambda mask, _: Image.fromarray(np.dstack([mask] * 3)))
    assert Folder("train", root).classes.names == ("class_0", "class_1", "class_2")
    assert "three equal channels, which are read as labels" in Folder("train", root).warnings[0]
    (tmp_path / "classes.yaml").write_text("[a, b, c]")
    for name, mask in by_name(root).items():
        np.testing.assert_array_equal(mask, scene(int(name[1:]))[1])


def test_labels_in_the_alpha_channel_are_named(tmp_path: Path) -> None:
    def make(mask: np.ndarray, _: int) -> Image.Image:
        return Image.fromarray(np.dstack([np.zeros((*SIZE, 3), np.uint8), mask * 100]))

    with pytest.raises(UsageError, match=r"its alpha channel has the values 0, 100, 200; .* - save the alpha channel"):
        Folder("train", folder(tmp_path, make))


def test_many_rare_colours_are_refused_as_interpolation(tmp_path: Path) -> None:
    def make(mask: np.ndarray, index: int) -> Image.Image:
        colours = np.array([BLACK, RED, GREEN], np.uint8)[mask]
        colours[0, : 2 + index] = [(254, index, shade) for shade in range(2 + index)]
        return Image.fromarray(colours)

    with pytest.raises(UsageError, match=r"has colour \(254, 2, 1\) \(1 pixel in 1 mask\), like 14 others,"):
        Folder("train", folder(tmp_path, make))


@pytest.mark.parametrize("channels", [1, 3])
def test_masks_resized_with_interpolation_are_refused(tmp_path: Path, channels: int) -> None:
    def make(mask: np.ndarray, _: int) -> Image.Image:
        colours = np.array([BLACK, RED, GREEN], np.uint8)[mask]
        picture = Image.fromarray(colours if channels == 3 else mask * np.uint8(120))
        return picture.resize((40, 30), Image.Resampling.BILINEAR).resize(SIZE[::-1], Image.Resampling.BILINEAR)

    with pytest.raises(UsageError, match=r"only where a smaller value meets a larger one|too many to be classes"):
        Folder("train", folder(tmp_path, make))


# Names, splits and lists


@pytest.mark.parametrize(
    ("image_name", "mask_name", "said"),
    [
        ("images/{}.jpg", "masks/{}.jpg.png", False),
        ("images/{}.png", "masks/{}_mask.png", False),
        ("images/img_{}.png", "masks/mask_{}.png", True),
        ("images/{}.png", "masks/{}_L.png", True),
        ("images/a/x_{}_rgb.png", "masks/a/x_{}_ids.png", True),
    ],
)
def test_masks_are_matched_where_their_names_are_unambiguous(
    tmp_path: Path, image_name: str, mask_name: str, said: bool
) -> None:
    root = folder(tmp_path, image_name=image_name, mask_name=mask_name)
    data = Folder("train", root)
    assert ["matched to images by the part in which" in line for line in data.warnings] == [True] * said
    for pair in data.pairs:
        number = int(pair.image.name.replace("s", "").removeprefix("img_").removeprefix("x_")[:2])
        np.testing.assert_array_equal(np.array(Image.open(pair.mask)), scene(number)[1])


def test_names_that_differ_in_a_number_are_not_matched(tmp_path: Path) -> None:
    folder(tmp_path)
    for index, path in enumerate(sorted((tmp_path / "masks").iterdir())):
        path.rename(path.with_name(f"t2{index}_seg2.png"))
    with pytest.raises(
        UsageError, match=r"s00\.png has no mask \(and 5 more .* nearest names are t2._seg2\.png, .*mask_name"
    ):
        Folder("train", str(tmp_path))


def test_mask_name_names_the_mask_of_an_image(tmp_path: Path) -> None:
    root = folder(tmp_path, mask_name="masks/9{}_L.png")
    Image.new("L", SIZE[::-1]).save(tmp_path / "masks" / "s00.png")
    data = Folder("train", root, mask_name="9{}_L")
    assert all(pair.mask.name == f"9{pair.name}_L.png" for pair in data.pairs)
    assert data.warnings == (
        f"{tmp_path / 'masks'}: left out 1 mask (s00.png) without an image - add the images, or remove them",
    )
    with pytest.raises(UsageError, match=r"dataset\.mask_name=_L has no single {}"):
        Folder("train", root, mask_name="_L")


@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("training", "validation"), ("train", "valid")])
@pytest.mark.parametrize("inside", [True, False])
def test_folders_of_splits_are_honoured_in_both_orders(tmp_path: Path, inside: bool, train: str, val: str) -> None:
    root = folder(tmp_path)
    for kind in ("images", "masks"):
        for path in list((tmp_path / kind).iterdir()):
            split = train if path.stem < "s04" else val
            target = tmp_path / (f"{kind}/{split}" if inside else f"{split}/{kind}")
            target.mkdir(parents=True, exist_ok=True)
            path.rename(target / path.name)
        if not inside:
            (tmp_path / kind).rmdir()
    assert [Folder(split, root).names for split in ("train", "val")] == [["s00", "s01", "s02", "s03"], ["s04", "s05"]]
    if inside:
        Image.new("RGB", SIZE[::-1]).save(tmp_path / "images" / "loose.png")
        unused = f"left out 1 image (loose.png) in none of the folders {train}, {val} - move"
        assert unused in Folder("train", root).warnings[0]


def in_splits(
    root: Path,
    layout: str,
    splits: tuple[str, ...] = ("train", "val", "test"),
    *,
    kinds: dict[str, str] | None = None,
    only: str | None = None,
) -> str:
    """Write two images of each split, or of one only, and their masks; {kind} and {split} stand for the folders."""
    for number, split in enumerate(splits):
        for index in (2 * number, 2 * number + 1) if only in (None, split) else ():
            for kind, pixels in zip(("images", "masks"), scene(index), strict=True):
                path = root / layout.format(kind=(kinds or {}).get(kind, kind), split=split) / f"s{index:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return str(root)


@pytest.mark.parametrize("emptied", [True, False])
@pytest.mark.parametrize("layout", ["{split}/{kind}", "{kind}/{split}"])
def test_test_images_without_masks_are_not_scored_and_counted(tmp_path: Path, layout: str, emptied: bool) -> None:
    root = in_splits(tmp_path, layout)
    masks = tmp_path / layout.format(kind="masks", split="test")
    for path in masks.iterdir():
        path.unlink()
    if not emptied:
        masks.rmdir()
    for split, names in (("train", ["s00", "s01"]), ("val", ["s02", "s03"])):
        data = Folder(split, root)
        assert (data.names, data.split_names) == (names, ("train", "val"))
        assert [line.partition(": ")[2] for line in data.warnings] == [
            f"test has 2 images (s04.png, s05.png) without masks, so it is not scored - add {masks}"
        ]
    with pytest.raises(UsageError, match=f"{masks} holds no masks of the test images, so .* - add the masks"):
        Folder("test", root)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("layout", ["{split}/{kind}", "{kind}/{split}"])
def test_train_and_val_need_masks(tmp_path: Path, layout: str, split: str) -> None:
    root = in_splits(tmp_path, layout)
    masks = tmp_path / layout.format(kind="masks", split=split)
    masks.rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=f"{masks} is not a folder"):
        Folder("train", root)


KINDS = [
    ("Images", "Masks"), ("image", "mask"), ("img", "label"), ("imgs", "labels"), ("JPEGImages", "SegmentationClass"),
    ("JPEGImages", "SegmentationClassPNG"), ("img_dir", "ann_dir"), ("leftImg8bit", "gt"), ("X", "Y"),
    ("frames", "Ground truth"), ("photos", "annotations"), ("images", "labels"), ("Image", "masks"),
]  # fmt: skip
LAYOUTS = ["{kind}", "{split}/{kind}", "{kind}/{split}", "{split}_{kind}"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("images", "masks"), KINDS)
def test_folders_of_other_names_are_read_with_a_note(tmp_path: Path, layout: str, images: str, masks: str) -> None:
    kinds = {"images": images, "masks": masks}
    root = in_splits(tmp_path, layout, kinds=kinds)
    splits = {
        name: Folder(name, root) for name in (("train", "val") if layout == "{kind}" else ("train", "val", "test"))
    }
    names = {name: data.names for name, data in splits.items()}
    if layout == "{kind}":
        assert sorted(name for names_ in names.values() for name in names_) == [f"s{index:02d}" for index in range(NUM)]
    else:
        assert names == {"train": ["s00", "s01"], "val": ["s02", "s03"], "test": ["s04", "s05"]}
    for data in splits.values():
        for pair, sample in zip(data.pairs, data, strict=True):
            np.testing.assert_array_equal(sample.mask, scene(int(pair.name[1:]))[1])
        assert not data.warnings
        (note,) = data.notes
        assert f"{tmp_path / layout.format(kind=images, split='train')} and " in note
        assert str(tmp_path / layout.format(kind=masks, split="train")) in note


def test_folders_of_exact_names_are_read_without_a_note_and_others_beside_them_are_not(tmp_path: Path) -> None:
    root = in_splits(tmp_path, "{kind}")
    in_splits(tmp_path, "{kind}", ("train",), kinds={"images": "imgs", "masks": "labels"})
    assert len(Folder("train", root)) + len(Folder("val", root)) == NUM
    assert not Folder("train", root).notes


@pytest.mark.parametrize("images", ["{x}", "images (1)", ".images", "my_images"])
def test_folders_that_only_resemble_the_names_are_not_read(tmp_path: Path, images: str) -> None:
    root = folder(tmp_path, image_name=f"{images.replace('{', '{{').replace('}', '}}')}/{{}}.png")
    with pytest.raises(UsageError, match=f"{tmp_path / 'images'} is not a folder; dataset.root should hold images/"):
        Folder("train", root)


@pytest.mark.parametrize(("one", "other"), [("img", "photos"), ("labels", "SegmentationClass")])
@pytest.mark.parametrize("layout", ["{kind}", "{split}/{kind}", "{kind}/{split}"])
def test_two_folders_that_may_be_meant_are_refused(tmp_path: Path, layout: str, one: str, other: str) -> None:
    kind, rest = ("images", {"masks": "mask"}) if one == "img" else ("masks", {"images": "image"})
    for name in (one, other):
        root = in_splits(tmp_path, layout, kinds={kind: name, **rest})
    with pytest.raises(
        UsageError, match=f"has both .*, and each may hold the {kind} - name the one to use {kind}"
    ) as error:
        Folder("train", root)
    assert one in str(error.value)
    assert other in str(error.value)


@pytest.mark.parametrize("masks", ["train_masks", "train_labels", "trainannot", "Train Masks"])
@pytest.mark.parametrize("images", ["train", "train_images", "Train"])
def test_images_and_masks_of_a_split_may_be_neighbours(tmp_path: Path, images: str, masks: str) -> None:
    kinds = {"images": images, "masks": masks}
    for split in ("train", "val", "test"):
        swapped = {kind: name.replace("train", split).replace("Train", split.title()) for kind, name in kinds.items()}
        in_splits(tmp_path, "{kind}", ("train", "val", "test"), kinds=swapped, only=split)
    root = str(tmp_path)
    assert [Folder(split, root).names[0] for split in ("train", "val", "test")] == ["s00", "s02", "s04"]
    (tmp_path / masks.replace("train", "val").replace("Train", "Val")).rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"val_masks is not a folder"):
        Folder("train", root)


def test_train_and_its_masks_alone_are_split_and_other_folders_are_counted(tmp_path: Path) -> None:
    root = in_splits(tmp_path, "{kind}", kinds={"images": "train", "masks": "train_masks"})
    in_splits(tmp_path, "{kind}", ("train",), kinds={"images": "test", "masks": "train_hq"})
    data = Folder("train", root)
    assert len(data) + len(Folder("val", root)) == NUM
    assert [line.removeprefix(str(tmp_path)) for line in data.warnings] == [
        f"/test: test has 2 images (s00.png, s01.png) without masks, so it is not scored - add {tmp_path}/test_masks",
        ": left out the images in train_hq, which are not read - move them elsewhere",
    ]


@pytest.mark.parametrize("layout", ["", "{split}"])
def test_masks_may_lie_beside_their_images(tmp_path: Path, layout: str) -> None:
    for kind in ("images", "masks"):
        in_splits(tmp_path, f"{kind}/{layout}")
    for path in sorted((tmp_path / "masks").rglob("*.png")):
        target = tmp_path / path.relative_to(tmp_path / "masks")
        target.parent.mkdir(exist_ok=True)
        path.rename(target.with_name(f"{path.stem}_mask.png"))
        (tmp_path / "images" / path.relative_to(tmp_path / "masks")).rename(target.with_suffix(".png"))
    shutil.rmtree(tmp_path / "masks")
    shutil.rmtree(tmp_path / "images")
    masks = by_name(str(tmp_path))
    assert len(masks) == (4 if layout else NUM)
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask, scene(int(name[-2:]))[1])
    assert not Folder("train", str(tmp_path)).warnings


def test_lists_name_images_in_folders_of_other_names(tmp_path: Path) -> None:
    root = folder(tmp_path, image_name="JPEGImages/{}.png", mask_name="SegmentationClass/{}.png")
    (tmp_path / "train.txt").write_text("s00\nJPEGImages/s01.png\n/other/JPEGImages/s02.png\n")
    (tmp_path / "val.txt").write_text("/other/JPEGImages/s03.png /other/SegmentationClass/s03.png\ns04\n")
    assert Folder("train", root).names == ["s00", "s01", "s02"]
    assert Folder("val", root).names == ["s03", "s04"]


@pytest.mark.parametrize(
    ("layout", "images", "masks"),
    [
        ("data/{kind}", "data/rgb", "data/truth"),
        ("data/{kind}/{split}", "data/rgb", "data/truth"),
        ("{split}/{kind}/x", "{}/rgb/x", "{}/truth/x"),
        ("{kind}-of-{split}", "rgb-of-{}", "truth-of-{}"),
    ],
)
def test_keys_name_the_folders_of_any_other_layout(tmp_path: Path, layout: str, images: str, masks: str) -> None:
    root = in_splits(tmp_path, layout, kinds={"images": "rgb", "masks": "truth"})
    with pytest.raises(UsageError, match=r"rename or move them, or set dataset\.images and dataset\.masks"):
        Folder("train", root)
    for name, mask in by_name(root, images=images, masks=masks).items():
        np.testing.assert_array_equal(mask, scene(int(name[1:]))[1])
    data = Folder("train", root, images=images, masks=masks)
    assert ("test" in data.split_names) == ("{split}" in layout)
    if "{split}" in layout:
        assert data.names == ["s00", "s01"]
    assert not data.warnings


def test_keys_win_over_folders_of_exact_names_and_one_may_suffice(tmp_path: Path) -> None:
    root = in_splits(tmp_path, "{kind}", ("train",))
    in_splits(tmp_path, "{kind}", kinds={"images": "images", "masks": "truth"})
    assert len(by_name(root, masks="truth")) == NUM
    in_splits(tmp_path, "{split}/{kind}", kinds={"images": "images", "masks": "masks"})
    assert len(by_name(root, images="images", masks="truth")) == NUM
    (line,) = Folder("train", root, masks="truth").warnings
    assert line == f"{root}: left out the images in masks, test, train, val, which are not read - move them elsewhere"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"images": "rgb"},
            r"dataset\.images=rgb is not a folder in .*, which holds images, masks - give a folder below",
        ),
        ({"masks": "../masks"}, r"dataset\.masks=\.\./masks is not a folder in .* - give a folder below dataset\.root"),
        (
            {"images": "{}/a"},
            r"dataset\.images={}/a and dataset\.masks=None do not both have {}, .* - write it in both",
        ),
        ({"images": "{}/a", "masks": "b"}, r"dataset\.masks=b do not both have {}"),
        ({"images": "{}/a", "masks": "{}/b"}, r"dataset\.images=train/a is not a folder in"),
        ({"images": "images", "annotations": "x.json"}, r"dataset\.images has no effect with dataset\.annotations"),
    ],
)
def test_keys_that_name_no_folder_are_refused(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    root = folder(tmp_path / "mine")
    (tmp_path / "masks").mkdir()
    with pytest.raises(UsageError, match=message):
        Folder("train", root, **settings)


PATHS = ["{0}", "{0}.png", "images/{0}.png", "{root}/images/{0}.png", "/SegNet/set/images/{0}.png", "images\\{0}.png"]
PAIRS = ["images/{0}.png masks/{0}.png", "images/{0}.png,masks/{0}.png", "/other/images/{0}.png /other/masks/{0}.png"]
LINES = [*PATHS, *PAIRS]


@pytest.mark.parametrize("line", LINES)
def test_lists_name_images_or_pairs_and_unlisted_images_are_counted(tmp_path: Path, line: str) -> None:
    root = folder(tmp_path)
    for split, numbers in (("train", range(3)), ("val", (4, 5))):
        text = "".join(line.format(f"s{number:02d}", root=tmp_path) + "\n" for number in numbers)
        (tmp_path / f"{split}.txt").write_text(text)
    assert Folder("train", root).names == ["s00", "s01", "s02"]
    assert Folder("val", root).names == ["s04", "s05"]
    assert "left out 1 image (s03.png) in no list - add them to a list" in Folder("val", root).warnings[0]


@pytest.mark.parametrize("name", ["train_list.txt", "train.csv", "trainval.txt", "labelmap.txt", "_classes.csv"])
def test_files_like_lists_and_tables_are_read_or_said_to_be_left_out(tmp_path: Path, name: str) -> None:
    root = folder(tmp_path)
    (tmp_path / name).write_text("s00\ns01\ns02\ns03\n")
    if name == "train_list.txt":
        (tmp_path / "val_list.txt").write_text("s04\ns05\n")
        assert Folder("train", root).names == ["s00", "s01", "s02", "s03"]
        assert not Folder("train", root).warnings
    else:
        assert f"left out 1 file ({name}), since lists are named train.txt" in Folder("train", root).warnings[0]


def test_lists_of_pairs_need_no_names_in_common_nor_an_images_folder(tmp_path: Path) -> None:
    root = folder(tmp_path, image_name="photos/{}.png", mask_name="truth/t_{}.png")
    for split, numbers in (("train", range(4)), ("val", (4, 5))):
        lines = [f"photos/s{number:02d}.png truth/t_s{number:02d}.png\n" for number in numbers]
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    for name, mask in by_name(root).items():
        np.testing.assert_array_equal(mask, scene(int(name[-2:]))[1])


@pytest.mark.parametrize("outside", ["../{}", "{}"])
def test_lists_of_pairs_name_no_files_outside_the_folder(tmp_path: Path, outside: str) -> None:
    root = tmp_path / "mine"
    folder(root)
    Image.new("L", SIZE[::-1]).save(tmp_path / "other.png")
    other = outside.format(tmp_path / "other.png" if outside == "{}" else "other.png")
    (root / "train.txt").write_text(f"images/s00.png {other}\n")
    (root / "val.txt").write_text("s01\n")
    with pytest.raises(UsageError, match=r"train\.txt, line 1: image '.*' not found"):
        Folder("train", str(root))


def test_links_are_followed_and_hidden_folders_and_other_files_are_counted(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    folder(elsewhere)
    root = tmp_path / "mine"
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
        os.symlink(elsewhere / kind, root / kind / "sequence")
    (root / "images" / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", SIZE[::-1]).save(root / "images" / ".ipynb_checkpoints" / "s00-checkpoint.png")
    (root / "images" / "notes.docx").touch()
    data = Folder("train", str(root))
    assert len(data) + len(Folder("val", str(root))) == NUM
    assert data.names[0].startswith("sequence/")
    hidden, other = data.warnings
    assert "1 file with hidden names or in hidden or system folders is left out (.ipynb_checkpoints: 1)" in hidden
    assert "1 file with other endings is left out (.docx: 1)" in other


# Images


def test_copies_of_train_images_in_val_are_counted(tmp_path: Path) -> None:
    root = folder(tmp_path)
    for kind in ("images", "masks"):
        Image.open(tmp_path / kind / "s00.png").save(tmp_path / kind / "copy.bmp")
    (tmp_path / "train.txt").write_text("s00\ns01\ns02\ns03\n")
    (tmp_path / "val.txt").write_text("copy\ns04\n")
    messages = [message for message, _ in findings(root)]
    assert "val: 1 of 2 images are pixel for pixel in train too (copy)" in messages[-1]
    (tmp_path / "masks" / "copy.bmp").write_bytes(b"")  # the names of copies do not shift after an unusable file
    (tmp_path / "val.txt").write_text("copy\ns04\ns05\n")
    for kind in ("images", "masks"):
        Image.open(tmp_path / kind / "s01.png").save(tmp_path / kind / "s05.png")
    splits = [Folder(split, root, classes={"a": 0, "b": 1, "c": 2}) for split in ("train", "val")]
    inspections = [inspect(split, use_cache=False) for split in splits]
    assert len(inspections[1].problems) == 1
    assert "val: 1 of 3 images are pixel for pixel in train too (s05)" in review(splits, inspections)[-1].message


def test_images_without_contrast_and_deeper_images_are_counted(tmp_path: Path) -> None:
    root = folder(tmp_path)
    for index in range(NUM):
        twelve_bit = (scene(index)[0][..., 0].astype(np.uint16) * 16) >> (index == 0)
        Image.fromarray(twelve_bit).save(tmp_path / "images" / f"s{index:02d}.png")
    text = "\n".join(message for message, refused in findings(root) if not refused)
    assert "hardly any contrast in" in text
    assert "images of more than 8 bit, of which the upper 8 are read: 5 of train, 1 of val - dataset.channels=1" in text
    assert not findings(root, channels=1)


def test_channels_that_are_not_read_are_counted(tmp_path: Path) -> None:
    root = folder(tmp_path)
    for index in range(NUM):
        path = tmp_path / "images" / f"s{index:02d}.png"
        bands = np.dstack([scene(index)[0], scene(index)[0][..., :1]])
        path.unlink()
        tifffile.imwrite(path.with_suffix(".tif"), bands, photometric="rgb", extrasamples=["unassalpha"])
    line = "images of 4 channels, of which 3 are read: 5 of train, 1 of val - dataset.channels=4 reads all"
    assert findings(root) == [(line, False)]
    assert not findings(root, channels=4)


def test_ignored_pixels_are_a_finding_if_they_are_many_or_all(tmp_path: Path) -> None:
    def make(mask: np.ndarray, index: int) -> Image.Image:
        return Image.fromarray(np.where((mask == 0) & (index > 3), 255, mask).astype(np.uint8))

    root = folder(tmp_path, make)
    (tmp_path / "train.txt").write_text("s00\ns01\ns04\ns05\n")
    (tmp_path / "val.txt").write_text("s02\ns03\n")
    assert any("train: 1416 pixels (46.1%) are ignored - check" in message for message, _ in findings(root))
    for name in ("s02", "s03", "s04"):
        Image.new("L", SIZE[::-1], 255).save(tmp_path / "masks" / f"{name}.png")
    found = findings(root)
    assert found[0][1]
    assert found[0][0].startswith("val: every pixel of its 2 masks is ignored, so there is nothing to score")
    assert any("train: every pixel is ignored in 1 of 4 images (s04)" in message for message, _ in found)
