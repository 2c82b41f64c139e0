"""Georeferences, nodata values and band names of GeoTIFFs and world files, as read without rasterio."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from segdeconv.classes import Classes, voc_colours
from segdeconv.data import Folder
from segdeconv.data.checks import review
from segdeconv.data.files.finding import find_files
from segdeconv.data.files.geo import (
    MATRIX,
    METADATA,
    NODATA,
    SCALE,
    TIEPOINT,
    describe_shift,
    read_tags,
    read_transform,
    warn_without_georeference,
)
from segdeconv.data.files.reading import read_mask
from segdeconv.data.inspection import class_table, inspect, inspect_all
from segdeconv.errors import UsageError

KEYS = 34735  # the tag of the GeoTIFF keys: version, then (key, place, count, value) of each
UTM_32 = (1, 1, 0, 2, 1025, 0, 1, 1, 3072, 0, 1, 25832)
POINT = (1, 1, 0, 2, 1025, 0, 1, 2, 3072, 0, 1, 25832)
CORNER = (0.0, 0.0, 0.0, 500000.0, 5600000.0, 0.0)
CLASSES = Classes(("ground", "tree"), voc_colours(2))


def geotiff(path: Path, values: np.ndarray, tags: dict[int, Any]) -> Path:
    """Write a TIFF with tags of GeoTIFF and GDAL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {code: 2 if isinstance(value, str) else 3 if code == KEYS else 12 for code, value in tags.items()}
    extra = [
        (code, kinds[code], 0 if isinstance(value, str) else len(value), value, True) for code, value in tags.items()
    ]
    tifffile.imwrite(path, values, extratags=extra, photometric="rgb" if values.shape[2:] == (3,) else "minisblack")
    return path


def located(column: float = 0, row: float = 0, side: float = 0.2, keys: tuple[int, ...] = UTM_32) -> dict[int, Any]:
    """Return tags of a place, shifted by columns and rows of 0.2 m."""
    tiepoint = (0.0, 0.0, 0.0, 500000.0 + 0.2 * column, 5600000.0 - 0.2 * row, 0.0)
    return {SCALE: (side, side, 0.0), TIEPOINT: tiepoint, KEYS: keys}


@pytest.mark.parametrize(
    ("tags", "transform"),
    [
        ({SCALE: (0.2, 0.5, 0.0), TIEPOINT: CORNER}, (0.2, 0, 500000, 0, -0.5, 5600000)),
        ({SCALE: (2.0, 2.0, 0.0), TIEPOINT: (10.0, 5.0, 0.0, 100.0, 50.0, 0.0)}, (2, 0, 80, 0, -2, 60)),
        ({SCALE: (2.0, 2.0, 0.0), TIEPOINT: CORNER, KEYS: POINT}, (2, 0, 499999, 0, -2, 5600001)),
        (
            {MATRIX: (1.0, 2.0, 0.0, 30.0, 4.0, 5.0, 0.0, 60.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)},
            (1, 2, 30, 4, 5, 60),
        ),
        ({SCALE: (0.2, 0.2, 0.0), TIEPOINT: 2 * CORNER}, None),  # ground control points
        ({SCALE: (0.0, 0.0, 0.0), TIEPOINT: CORNER}, None),
        ({}, None),
    ],
)
def test_the_transform_of_a_geotiff_is_that_of_the_standard(tmp_path, tags, transform):
    path = geotiff(tmp_path / "a.tif", np.zeros((4, 5, 3), np.uint8), tags)
    assert read_tags(path).transform == (None if transform is None else pytest.approx(transform))


@pytest.mark.parametrize("names", [("a.tif", "a.tfw"), ("b.jpg", "b.jgw"), ("c.PNG", "c.pgw"), ("d.jpg", "d.WLD")])
def test_a_world_file_states_the_centre_of_the_first_pixel(tmp_path, names):
    image, world = (tmp_path / name for name in names)
    Image.new("RGB", (5, 4)).save(image)
    assert read_transform(image) is None
    world.write_text("0.2\n0.0\n0.0\n-0.2\n500000.1\n5599999.9\n")
    assert read_transform(image) == pytest.approx((0.2, 0, 500000, 0, -0.2, 5600000))
    (tmp_path / "unrelated.prj").touch()
    (tmp_path / f"{image.stem}.prj").touch()
    assert [path.name for path in find_files(tmp_path).others] == ["unrelated.prj"]


def test_band_names_nodata_and_crs_are_read(tmp_path):
    metadata = (
        '<GDALMetadata>\n  <Item name="DESCRIPTION" sample="1" role="description">near &amp; far</Item>\n'
        '  <Item name="OTHER" sample="0">no</Item>\n</GDALMetadata>'
    )
    tags = {**located(), METADATA: metadata, NODATA: "-9999"}
    path = geotiff(tmp_path / "a.tif", np.zeros((4, 5, 3), np.uint8), tags)
    found = read_tags(path)
    assert (found.crs, found.nodata, dict(found.bands)) == (25832, -9999, {1: "near & far"})
    assert read_tags(tmp_path / "missing.tif").transform is None
    path.write_bytes(path.read_bytes()[:60])
    assert read_tags(path).transform is None


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (located(), None),
        (located(0.2, 0.3), None),
        ({}, None),
        (located(3, -2), "is shifted by 3 columns and -2 rows against its image"),
        (located(keys=POINT), "is shifted by -0.5 columns and -0.5 rows"),
        (located(side=0.25), "has pixels of 0.25 x 0.25 map units and its image"),
        (located(1, keys=(1, 1, 0, 1, 3072, 0, 1, 32632)), "is in EPSG:32632 and its image"),
    ],
)
def test_a_mask_that_lies_elsewhere_than_its_image_is_refused(tmp_path, tags, message):
    for name, shown in (("a", located()), ("b", located())):
        geotiff(tmp_path / "images" / f"{name}.tif", np.full((4, 5, 3), 9, np.uint8), shown)
    geotiff(tmp_path / "masks" / "a.tif", np.eye(4, 5, dtype=np.uint8), located())
    mask = geotiff(tmp_path / "masks" / "b.tif", np.eye(4, 5, dtype=np.uint8), tags)
    splits = [Folder(split, str(tmp_path), val_share=0.5) for split in ("train", "val")]
    if message is None:
        assert describe_shift(tmp_path / "images" / "b.tif", mask) is None
        assert inspect_all(splits, use_cache=False)
        return
    with pytest.raises(UsageError, match=message) as caught:
        inspect_all(splits, use_cache=False)
    assert str(mask) in str(caught.value)
    assert " - resample the mask" in str(caught.value)


NODATA_MASKS = {
    "integer": (np.array([[0, 1, -9999]], np.int16), "-9999", [[0, 1, 255]]),
    "256 and more": (np.array([[0, 1, 65535]], np.uint16), "65535", [[0, 1, 255]]),
    "not a number": (np.array([[0, 1, np.nan]], np.float32), "nan", [[0, 1, 255]]),
    "the smallest float": (np.array([[0, 1, -3.4028235e38]], np.float32), "-3.4028234663852886e+38", [[0, 1, 255]]),
    "nothing else": (np.full((1, 3), 7, np.uint8), "7", [[255, 255, 255]]),
    "a class": (np.array([[0, 1, 1]], np.uint8), "1", [[0, 1, 1]]),
    "absent": (np.array([[0, 1, 1]], np.uint8), "200", [[0, 1, 1]]),
}


@pytest.mark.parametrize("kind", NODATA_MASKS)
def test_the_nodata_value_of_a_mask_is_an_ignored_label_unless_it_is_a_class(tmp_path, kind):
    values, nodata, expected = NODATA_MASKS[kind]
    path = geotiff(tmp_path / "a.tif", values, {NODATA: nodata})
    assert read_mask(path, CLASSES).tolist() == expected
    plain = geotiff(tmp_path / "b.tif", values, {})
    if (np.array(expected) == 255).any():
        with pytest.raises(UsageError):
            read_mask(plain, CLASSES)


@pytest.mark.parametrize(
    ("labels", "nodata", "names", "line"),
    [
        (
            [0, 1, 2],
            "0",
            ("class_1", "class_2"),
            "label 0 (40 pixels in 2 masks, 33.33% of all), their nodata value, is",
        ),
        ([0, 1, -1], "-1", ("class_0", "class_1"), "nodata value, is ignored - if it is a class, name it"),
        ([0, 1, 1], "0", ("class_0", "class_1"), "is read as a class, since only label 1 would remain"),
        ([0, 1, 2], "9", ("class_0", "class_1", "class_2"), None),
    ],
)
def test_inferred_classes_leave_out_the_nodata_value_with_a_line(tmp_path, labels, nodata, names, line):
    values = np.repeat(np.array(labels, np.int16), 20).reshape(3, 20)
    for name in ("a", "b"):
        geotiff(tmp_path / "images" / f"{name}.tif", np.full((3, 20, 3), 9, np.uint8), {})
        geotiff(tmp_path / "masks" / f"{name}.tif", values, {NODATA: nodata})
    train = Folder("train", str(tmp_path), val_share=0.5)
    assert train.classes.names == names
    lines = [warning for warning in train.warnings if "nodata" in warning]
    assert lines == [] if line is None else line in lines[0]
    assert (train[0].mask == 255).sum() == (20 if "ignored" in str(lines) else 0)


@pytest.mark.parametrize(("dtype", "channels"), [("uint8", None), ("uint8", 3), ("uint16", 3), ("uint16", None)])
def test_image_pixels_without_data_are_ignored(tmp_path, dtype, channels):
    image = np.full((4, 5, 3), 9, dtype)
    image[0, :3] = 0
    image[1, 1, 1] = 0  # in one channel only
    metadata = '<Item name="DESCRIPTION" sample="0">red</Item>'
    for name in ("a", "b"):
        geotiff(tmp_path / "images" / f"{name}.tif", image, {NODATA: "0", METADATA: metadata})
        geotiff(tmp_path / "masks" / f"{name}.tif", np.tile(np.arange(5) % 2, (4, 1)).astype(np.uint8), {})
    splits = [Folder(split, str(tmp_path), val_share=0.5, channels=channels) for split in ("train", "val")]
    inspections = [inspect(split, use_cache=False) for split in splits]
    converted = dtype == "uint16" and channels is None  # small numbers become 0 too
    assert (splits[0][0].mask == 255).sum() == (0 if converted else 3)
    found = [finding.message for finding in review(splits, inspections) if "nodata" in finding.message]
    assert len(found) == (0 if converted else 2)
    assert converted or found[0].startswith("train: 3 pixels of 1 images have the nodata value")
    table = class_table(inspections[0], splits[0].classes, None)
    assert ("3 channel(s) of 16 bit (red, band 2, band 3)" in table) == (dtype == "uint16" and channels == 3)
    assert splits[0].band_names == (("red", "band 2", "band 3") if channels else ())


def test_bands_in_another_order_are_a_finding(tmp_path):
    for name, first in (("a", "red"), ("b", "blue"), ("c", "red")):
        metadata = f'<Item name="DESCRIPTION" sample="0">{first}</Item>'
        image = np.random.default_rng(ord(name)).integers(0, 99, (4, 5, 2), dtype=np.uint16)
        geotiff(tmp_path / "images" / f"{name}.tif", image, {METADATA: metadata})
        geotiff(tmp_path / "masks" / f"{name}.tif", np.eye(4, 5, dtype=np.uint8), {})
    (tmp_path / "train.txt").write_text("a\nb\n")
    (tmp_path / "val.txt").write_text("c\n")
    splits = [Folder(split, str(tmp_path), channels=2) for split in ("train", "val")]
    found = review(splits, [inspect(split, use_cache=False) for split in splits])
    assert [finding.message for finding in found if "bands" in finding.message] == [
        "the bands of 1 images are not called red, band 2, such as those of b: blue, band 2; bands are matched by "
        "their place - give all images the same bands in the same order"
    ]


def test_without_rasterio_one_line_counts_what_is_lost(tmp_path, monkeypatch, capsys):
    paths = [geotiff(tmp_path / f"{name}.tif", np.zeros((4, 5, 3), np.uint8), located()) for name in "ab"]
    plain = geotiff(tmp_path / "plain.tif", np.zeros((4, 5, 3), np.uint8), {})
    monkeypatch.setattr("segdeconv.data.files.geo.has_rasterio", lambda: False)
    warn_without_georeference([*paths, plain])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"segdeconv: warning: 2 images are georeferenced, such as {paths[0]}, and rasterio is not")
    assert "pip install 'segdeconv[geo]'" in line
    warn_without_georeference([plain])
    assert capsys.readouterr().err == ""
