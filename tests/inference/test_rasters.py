"""Predictions of georeferenced images, checked with rasterio, GDAL's rasterisation and pyogrio."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from test_batch import place  # noqa: F401

import segdeconv
from segdeconv.classes import Classes, voc_colours
from segdeconv.data.files.geo import Georeference, read_georeference, read_tags
from segdeconv.inference import rasters
from segdeconv.inference.output_folder import LocalFolder

pytestmark = pytest.mark.extras

SIZE = (66, 90)
CORNER = 20 * 30 + 1  # pixels without data
FOOT = 0.3048006096012192  # metres of a US survey foot
PLACES = {
    "utm": ("EPSG:25832", (0.2, 0, 500000, 0, -0.2, 5600000), 0.04),
    "feet": ("EPSG:2225", (2, 0, 6000000, 0, -3, 2000000), 6 * FOOT**2),
    "turned": ("EPSG:25832", (0.2, 0.1, 500000, 0.1, -0.2, 5600000), 0.05),
    "degrees": ("EPSG:4326", (1e-6, 0, 9, 0, -1e-6, 50), None),
    "mercator": ("EPSG:3857", (1, 0, 1000000, 0, -1, 6000000), None),
    "albers": ("+proj=aea +lat_1=20 +lat_2=50 +lat_0=40 +lon_0=-96 +datum=WGS84", (5, 0, 100, 0, -5, 100), 25),
    "unknown": (None, (0.2, 0, 500000, 0, -0.2, 5600000), None),
    "local": ('LOCAL_CS["a floor",UNIT["metre",1]]', (0.2, 0, 10, 0, -0.2, 20), None),
}
LOCATED = set(PLACES) - {"unknown", "local"}


def image_of(size: tuple[int, int] = SIZE, bands: int = 3, dtype: str = "uint8") -> np.ndarray:
    """Return (H, W, bands) with a corner and a pixel without data, 0 in every band."""
    random = np.random.default_rng(0)
    coarse = random.integers(1, 256, (size[0] // 9 + 1, size[1] // 9 + 1, bands)).astype(dtype)
    image = np.kron(coarse, np.ones((9, 9, 1), dtype))[: size[0], : size[1]]
    image[:20, :30] = 0
    image[-1, -1] = 0
    image[25:30, :, 0] = 0  # has data in the other bands
    return image


def write(path: Path, image: np.ndarray, crs: str | None, transform: tuple[float, ...], **options) -> Path:
    import rasterio

    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"nodata": 0, "tiled": True, "compress": "lzw", **options}
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=image.shape[2],
        height=image.shape[0],
        width=image.shape[1],
        dtype=image.dtype,
        crs=crs,
        transform=rasterio.Affine(*transform),
        **options,
    ) as file:
        file.write(np.moveaxis(image, -1, 0))
    return path


@pytest.fixture(scope="module")
def mapped(place, commands, tmp_path_factory):  # noqa: F811
    """The outputs of all kinds for an image in each place, and the message of the command."""
    folder = tmp_path_factory.mktemp("mapped")
    for name, (crs, transform, _) in PLACES.items():
        write(folder / "maps" / f"{name}.tif", image_of(), crs, transform)
    done = commands(
        "predict", place / "best.ckpt", "maps", "--out", "out", "--polygon-format", "coco,geojson,gpkg", "--parquet",
        "--probabilities", "--uncertainty", "--class-masks", cwd=folder,
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder, done.err


def read(path: Path):
    import rasterio

    with rasterio.open(path) as file:
        return file.read(), file.profile, file.descriptions


@pytest.mark.parametrize("name", PLACES)
def test_masks_and_maps_lie_where_their_image_lies(mapped, name):
    folder, _ = mapped
    image, source, _ = read(folder / "maps" / f"{name}.tif")
    mask, profile, _ = read(folder / "out" / f"{name}.tif")
    missing = (image == 0).all(axis=0)
    assert missing.sum() == CORNER
    assert np.array_equal(mask[0] == 255, missing)
    assert (profile["nodata"], profile["dtype"], profile["count"]) == (255, "uint8", 1)
    assert (profile["tiled"], profile["blockxsize"], profile["compress"]) == (True, 256, "deflate")
    probabilities, float_profile, names = read(folder / "out" / f"{name}_probabilities.tif")
    assert names == ("ground", "thing", "sky, high")
    assert np.isnan(probabilities[:, missing]).all()
    assert np.array_equal(probabilities.argmax(axis=0)[~missing], mask[0][~missing])
    assert np.allclose(probabilities.sum(axis=0)[~missing], 1, atol=1e-5)
    uncertainty, map_profile, _ = read(folder / "out" / f"{name}_uncertainty.tif")
    expected = -(probabilities * np.log(probabilities)).sum(axis=0) / np.log(3)
    assert np.allclose(uncertainty[0], expected, atol=2e-3, equal_nan=True)
    things, class_profile, _ = read(folder / "out" / f"{name}_thing.tif")
    assert np.array_equal(things[0], np.where(mask[0] == 1, 255, 0))
    for one in (profile, float_profile, map_profile, class_profile):
        assert (one["crs"], one["transform"]) == (source["crs"], source["transform"])
    import rasterio

    with rasterio.open(folder / "out" / f"{name}.tif") as opened:
        table = opened.colormap(1)
        assert [table[index][:3] for index in range(3)] == list(voc_colours(3))
        assert (table[1][3], table[255][3]) == (255, 0)
        assert f"{folder / 'out' / name}.tif.aux.xml" in opened.files
    names = (folder / "out" / f"{name}.tif.aux.xml").read_text()
    assert [line.strip() for line in names.splitlines() if "<Category>" in line] == [
        "<Category>ground</Category>", "<Category>thing</Category>", "<Category>sky, high</Category>",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["geojson", "gpkg"])
@pytest.mark.parametrize("name", PLACES)
def test_polygons_burnt_back_by_gdal_give_the_mask(mapped, name, suffix):
    import pyogrio
    from rasterio import Affine, features
    from rasterio.warp import transform_geom

    folder, err = mapped
    mask, profile, _ = read(folder / "out" / f"{name}.tif")
    meta, _, geometries, values = pyogrio.raw.read(folder / "out" / f"{name}_regions.{suffix}")
    columns = dict(zip(meta["fields"], values, strict=True))
    shapes = [polygon_of(bytes(geometry)) for geometry in geometries]
    crs, transform, pixel_area = PLACES[name]
    if name == "albers" and suffix == "geojson":  # a CRS without a code is converted
        assert meta["crs"] == "OGC:CRS84" or meta["crs"] == "EPSG:4326"
        shapes = [transform_geom("OGC:CRS84", profile["crs"], shape) for shape in shapes]
    elif name in LOCATED - {"albers"}:
        assert meta["crs"] == crs
    position = Affine(*transform) if name in LOCATED else Affine.identity()
    burnt = features.rasterize(
        [(shape, int(index)) for shape, index in zip(shapes, columns["class_index"], strict=True)],
        out_shape=SIZE, transform=position, fill=255, dtype="uint8",
    )  # fmt: skip
    assert np.array_equal(burnt, mask[0])
    assert columns["pixels"].sum() == (mask[0] != 255).sum()
    assert set(columns["class"]) <= {"ground", "thing", "sky, high"}
    assert set(columns["image"]) == {f"maps/{name}.tif"}
    areas = [area if area is not None else np.nan for area in columns["area_m2"]]
    if pixel_area is None:
        assert np.isnan(np.array(areas, float)).all()
    else:
        assert np.allclose(np.array(areas, float), columns["pixels"] * pixel_area, rtol=1e-6)
    for shape in shapes:  # RFC 7946: the outer ring is counterclockwise, holes are clockwise
        outer, *holes = (np.array(ring) - np.array(ring[0]) for ring in shape["coordinates"])
        assert turn(outer) > 0 > max([turn(hole) for hole in holes], default=-1)
    assert "2 of 8 images have no coordinate reference system that can be read, such as maps/local.tif: " in err


def turn(ring: np.ndarray) -> float:
    x, y = ring.T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())


def polygon_of(binary: bytes) -> dict:
    """Return the polygon of a well-known binary as GeoJSON."""
    assert int.from_bytes(binary[1:5], "little") == 3
    rings, at = [], 9
    for _ in range(int.from_bytes(binary[5:9], "little")):
        count = int.from_bytes(binary[at : at + 4], "little")
        rings.append(np.frombuffer(binary, "<f8", 2 * count, at + 4).reshape(count, 2).tolist())
        at += 4 + 16 * count
    return {"type": "Polygon", "coordinates": rings}


def test_the_tables_have_files_and_areas_and_parquet_equals_csv(mapped):
    import pyarrow.parquet

    folder, _ = mapped
    rows = list(csv.DictReader((folder / "out" / "statistics.csv").read_text().splitlines()))
    table = pyarrow.parquet.read_table(folder / "out" / "statistics.parquet").to_pylist()
    assert len(rows) == len(table) == 3 * len(PLACES)
    for row, typed in zip(rows, table, strict=True):
        area = PLACES[row["name"]][2]
        assert list(row) == list(typed) == ["name", "class", "pixels", "share", "file", "area_m2"]
        assert row["file"] == typed["file"] == f"maps/{row['name']}.tif"
        assert int(row["pixels"]) == typed["pixels"]
        assert float(row["share"]) == pytest.approx(typed["share"], abs=1e-6)
        if area is None:
            assert (row["area_m2"], typed["area_m2"]) == ("", None)
        else:
            assert typed["area_m2"] == pytest.approx(typed["pixels"] * area)
            assert float(row["area_m2"]) == pytest.approx(typed["area_m2"], rel=1e-8)
    assert sum(row["pixels"] for row in table if row["name"] == "utm") == SIZE[0] * SIZE[1] - CORNER
    coco = json.loads((folder / "out" / "regions.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == [f"maps/{name}.tif" for name in sorted(PLACES)]
    assert all(("area_m2" in region) == (PLACES[sorted(PLACES)[region["image_id"] - 1]][2] is not None)
               for region in coco["annotations"])  # fmt: skip


def test_a_world_file_and_its_prj_give_a_photograph_its_place(tmp_path):
    from PIL import Image
    from rasterio.crs import CRS

    Image.fromarray(image_of()).save(tmp_path / "a.jpg")
    (tmp_path / "a.jgw").write_text("0.2 0 0 -0.2 500000.1 5599999.9")
    (tmp_path / "a.prj").write_text(CRS.from_epsg(25832).to_wkt(version="WKT1_ESRI"))
    found = read_georeference(tmp_path / "a.jpg")
    assert found.transform == pytest.approx((0.2, 0, 500000, 0, -0.2, 5600000))
    assert CRS.from_wkt(found.crs).to_epsg() == 25832
    assert found.pixel_area == pytest.approx(0.04)
    (tmp_path / "a.prj").write_text("GARBAGE[")
    assert read_georeference(tmp_path / "a.jpg") == Georeference(found.transform)


@pytest.mark.parametrize("point", [False, True])
def test_the_transform_read_from_tags_is_that_of_gdal(tmp_path, point):
    import rasterio

    for name, (crs, transform, _) in PLACES.items():
        path = write(tmp_path / f"{name}.tif", image_of((8, 9)), crs, transform)
        if point:
            with rasterio.open(path, "r+") as file:
                file.update_tags(AREA_OR_POINT="Point")
        with rasterio.open(path) as file:
            assert read_tags(path).transform == pytest.approx(tuple(file.transform)[:6], rel=1e-12)
        assert read_tags(path).nodata == 0


ALPHA = {
    "transparent": (0, 0, True),
    "infrared on water": (90, 0, False),
    "opaque black": (0, 255, False),
}


@pytest.mark.parametrize("kind", ALPHA)
def test_transparent_pixels_have_no_data_but_infrared_is_no_transparency(place, tmp_path, kind):  # noqa: F811
    colour, alpha, missing = ALPHA[kind]
    image = np.full((40, 50, 4), 120, np.uint8)
    image[:, :, 3] = 255
    image[:10, :10] = (colour, colour, colour, alpha)
    path = write(tmp_path / "a.tif", image, *PLACES["utm"][:2], nodata=None, photometric="RGB", alpha="YES")
    prediction = segdeconv.load(place / "best.ckpt").predict(path)
    assert (prediction.mask == 255).sum() == (100 if missing else 0)
    prediction.save(tmp_path / "mask.tif")
    mask, profile, _ = read(tmp_path / "mask.tif")
    assert np.array_equal(mask[0], prediction.mask)
    assert profile["transform"][:6] == PLACES["utm"][1]


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_oriented_tiff_keeps_its_place(place, tmp_path, commands, orientation):  # noqa: F811
    import tifffile

    path = write(tmp_path / "maps" / "a.tif", image_of((60, 90)), *PLACES["utm"][:2], compress="deflate")
    upright = commands("predict", place / "best.ckpt", "maps", "--out", "upright", "--probabilities", cwd=tmp_path)
    expected, profile, _ = read(tmp_path / "upright" / "a.tif")
    with tifffile.TiffFile(path, mode="r+b") as file:
        extra = [(274, 3, 1, orientation, True)]
        tags = [
            (tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in file.pages[0].tags if tag.code > 30000
        ]
        image = file.asarray()
    tifffile.imwrite(path, image, photometric="rgb", extratags=[*extra, *tags])
    assert read_tags(path).orientation == orientation
    done = commands("predict", place / "best.ckpt", "maps", "--out", "turned", "--probabilities", cwd=tmp_path)
    assert (upright.code, done.code) == (0, 0), done.err
    mask, turned_profile, _ = read(tmp_path / "turned" / "a.tif")
    assert (turned_profile["transform"], mask.shape) == (profile["transform"], expected.shape)
    assert np.array_equal(mask == 255, expected == 255)
    probabilities, _, _ = read(tmp_path / "turned" / "a_probabilities.tif")
    assert np.array_equal(probabilities.argmax(axis=0)[mask[0] != 255], mask[0][mask[0] != 255])


@pytest.mark.parametrize(
    ("bands", "dtype", "channels"), [(3, "uint8", None), (1, "uint8", None), (3, "uint16", None), (1, "uint16", None),
                                     (4, "uint8", None), (2, "uint8", 2), (5, "uint16", 5)],
)  # fmt: skip
def test_a_raster_read_in_parts_equals_the_one_read_whole(tmp_path, monkeypatch, bands, dtype, channels):
    from segdeconv.data.files.reading import read_upright

    monkeypatch.setattr("segdeconv.data.files.geo.ROWS", 64)
    image = image_of(bands=bands, dtype=dtype) * (1 if dtype == "uint8" else 257)
    options = {"photometric": "RGB"} if bands == 3 else {}
    path = write(tmp_path / "a.tif", image, *PLACES["utm"][:2], compress="deflate", **options)
    whole, _ = read_upright(path, channels=channels)
    parts = rasters.read_large(path, channels, 1, image.size, tmp_path)
    assert isinstance(parts, np.memmap)
    assert parts.dtype == whole.dtype
    assert np.array_equal(parts, whole)
    assert [file.name for file in tmp_path.iterdir()] == ["a.tif"]
    assert rasters.read_large(path, channels, image.size + 1, image.size, tmp_path) is None


def test_a_large_raster_has_the_outputs_of_a_small_one(place, tmp_path, monkeypatch):  # noqa: F811
    from segdeconv.checkpoints import checkpoint
    from segdeconv.inference.batch import BatchPrediction
    from segdeconv.inference.outputs import Outputs
    from segdeconv.inference.predictors import PredictionSettings
    from segdeconv.inference.progress_log import ProgressLog
    from segdeconv.inference.segmenter import Segmenter

    content = checkpoint.read(place / "best.ckpt")
    path = write(tmp_path / "a.tif", image_of((300, 560)), *PLACES["utm"][:2])
    segmenter = Segmenter(content, PredictionSettings(precision="32-true", tile=(400, 400)))
    for limit in (1 << 26, 1000):
        monkeypatch.setattr("segdeconv.inference.segmenter.MEMORY_MAPPED", limit)
        folder = tmp_path / str(limit)
        outputs = Outputs(LocalFolder(folder), content.classes, probabilities=True, uncertainty=True, class_masks=True)
        log = ProgressLog(outputs.folder, {})
        assert list(BatchPrediction(segmenter, outputs, log).run({"a": path})) == ["a"]
        log.close()
        opened = segmenter.open(path, scratch=folder)
        assert isinstance(opened.image, np.memmap) == (limit == 1000)
        assert not [file for file in folder.iterdir() if file.name.startswith(".tmp")]
    for name in ("a.tif", "a_thing.tif", "a_probabilities.tif", "a_uncertainty.tif", "a_overlay.png"):
        assert (tmp_path / "1000" / name).read_bytes() == (folder.parent / str(1 << 26) / name).read_bytes()
    with open_tiff(tmp_path / "1000" / "a_probabilities.tif") as file:  # every tile was written once
        tiles = [count for page in file.pages for count in page.databytecounts]
    assert len(tiles) == 3 * 2 * 3
    assert sum(tiles) > (tmp_path / "1000" / "a_probabilities.tif").stat().st_size - 3000


def open_tiff(path: Path):
    import tifffile

    return tifffile.TiffFile(path)


def test_an_image_predicted_without_rasterio_is_predicted_again_with_it(place, tmp_path, monkeypatch):  # noqa: F811
    from segdeconv.checkpoints import checkpoint
    from segdeconv.inference.batch import BatchPrediction
    from segdeconv.inference.outputs import Outputs
    from segdeconv.inference.progress_log import ProgressLog
    from segdeconv.inference.segmenter import Segmenter

    images = {"a": write(tmp_path / "a.tif", image_of((40, 50)), *PLACES["utm"][:2])}
    content = checkpoint.read(place / "best.ckpt")
    segmenter, outputs = Segmenter(content), Outputs(LocalFolder(tmp_path / "out"), content.classes, polygons=("auto",))
    for installed, present in ((False, "a.png"), (True, "a.tif"), (True, "a.tif")):
        with monkeypatch.context() as patch:
            if not installed:
                patch.setattr("segdeconv.data.files.geo.has_rasterio", lambda: False)
            log = ProgressLog(outputs.folder, {})
            batch = BatchPrediction(segmenter, outputs, log)
            done = batch.is_done("a", images["a"])
            list(batch.run(images))
            log.close()
        assert (tmp_path / "out" / present).exists()
    assert done
    assert (tmp_path / "out" / "a_regions.geojson").exists()


@pytest.mark.parametrize("kind", ["labels", "large labels", "colours"])
def test_masks_have_the_labels_of_the_data_set(tmp_path, kind):
    labels = {"labels": (7, 26), "large labels": (7, 1026), "colours": (0, 1)}[kind]
    classes = Classes(("road", "car"), ((9, 9, 9), (0, 0, 200)), labels=labels, by_colour=kind == "colours")
    reference = Georeference(PLACES["utm"][1])
    mask = np.array([[0, 1, 255]], np.uint8)
    files = rasters.save_mask(mask, classes, tmp_path / "a.tif", reference, labels="dataset")
    values, profile, _ = read(tmp_path / "a.tif")
    if kind == "colours":
        assert np.moveaxis(values, 0, -1).tolist() == [[[9, 9, 9], [0, 0, 200], [0, 0, 0]]]
        assert files == [tmp_path / "a.tif"]
        return
    assert (values[0].tolist(), profile["nodata"]) == ([[*labels, 255]], 255)
    assert profile["dtype"] == ("uint16" if kind == "large labels" else "uint8")
    assert files == [tmp_path / "a.tif", tmp_path / "a.tif.aux.xml"]
    assert (tmp_path / "a.tif.aux.xml").read_text().count("<Category>") == 1 + labels[1]


@pytest.mark.parametrize("interleave", ["pixel", "band"])
@pytest.mark.parametrize("compress", ["lzw", "zstd", "lerc", "deflate"])
def test_bands_of_any_compression_are_read_as_gdal_reads_them(tmp_path, compress, interleave):
    from segdeconv.data.files.reading import read_image

    image = image_of(bands=5, dtype="uint16") * 257
    options = {"compress": compress, "interleave": interleave, "predictor": 1 if compress == "lerc" else 2}
    path = write(tmp_path / "a.tif", image, *PLACES["utm"][:2], **options)
    assert np.array_equal(np.moveaxis(read(path)[0], 0, -1), image)
    assert np.array_equal(read_image(path, channels=5), image)


def test_a_damaged_geotiff_is_one_line(place, commands, tmp_path):  # noqa: F811
    path = write(tmp_path / "maps" / "a.tif", image_of(), *PLACES["utm"][:2], compress="deflate")
    write(tmp_path / "maps" / "b.tif", image_of((40, 50)), *PLACES["utm"][:2])
    path.write_bytes(path.read_bytes()[:-2000])
    done = commands("predict", place / "best.ckpt", "maps", "--out", "out", cwd=tmp_path)
    assert done.code == 2
    assert len([line for line in done.out.splitlines() if "a.tif" in line]) == 1
    assert (tmp_path / "out" / "b.tif").exists()
    assert "Traceback" not in done.err
