"""Annotations of labelling tools: their pixels, each tool's format, what is left out, and writing them from masks."""

from __future__ import annotations

import base64
import csv
import json
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import shapely
from PIL import Image
from pycocotools import mask as coco_mask
from scipy.spatial import Delaunay

from segdeconv.data import Folder
from segdeconv.data.annotations import label_studio
from segdeconv.data.annotations.coco import parse_counts
from segdeconv.data.annotations.conversion import FORMATS, convert
from segdeconv.data.annotations.shapes import AnnotatedImage, Ellipse, RunLengths, Shape, polygon, rectangle
from segdeconv.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
SIZE = (24, 32)
IGNORED = 255


def drawn(shape: Shape, size: tuple[int, int]) -> np.ndarray:
    return AnnotatedImage("", (shape,), Path()).draw({shape.label: 1}, size, 0).astype(bool)


def star(random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Return a ring without self-intersections that reaches over the edges of an image."""
    count = random.integers(3, 30)
    angle = np.sort(random.uniform(0, 2 * np.pi, count))
    radius = random.uniform(0.2, 1, count) * min(size) * 0.7
    return random.uniform(0, 1, 2) * size[::-1] + np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]


# Pixels


@pytest.mark.parametrize("seed", range(40))
def test_the_pixels_of_a_polygon_are_those_whose_centres_shapely_finds_inside(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = tuple(random.integers(20, 90, 2).tolist())
    ring = star(random, size)
    centre = ring.mean(axis=0)
    hole = centre + (ring - centre) * 0.4
    outline = shapely.Polygon(ring)
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    np.testing.assert_array_equal(drawn(polygon("a", ring), size), shapely.contains_xy(outline, x, y))
    if outline.is_valid and outline.contains(shapely.Polygon(hole)):
        expected = shapely.contains_xy(shapely.Polygon(ring, [hole]), x, y)
        np.testing.assert_array_equal(drawn(polygon("a", ring, hole), size), expected)


@pytest.mark.parametrize("seed", range(20))
def test_pycocotools_differs_only_in_centres_within_a_fifth_of_a_pixel_of_an_edge(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = tuple(random.integers(20, 90, 2).tolist())
    ring = star(random, size)
    theirs = coco_mask.decode(coco_mask.frPyObjects([ring.ravel().tolist()], *size))[:, :, 0].astype(bool)
    y, x = (values + 0.5 for values in np.nonzero(theirs != drawn(polygon("a", ring), size)))
    assert shapely.distance(shapely.points(x, y), shapely.Polygon(ring).exterior).max(initial=0) < 0.21


@pytest.mark.parametrize("seed", range(10))
def test_polygons_with_common_edges_share_no_pixel_and_leave_none_out(seed: int) -> None:
    points = np.random.default_rng(seed).integers(0, 41, (30, 2)) / 2  # many centres lie on edges
    points[:4] = [(0, 0), (20, 0), (0, 20), (20, 20)]
    triangles = points[Delaunay(points).simplices]
    count = sum(drawn(polygon("a", triangle), (20, 20)).astype(int) for triangle in triangles)
    np.testing.assert_array_equal(count, 1)


@pytest.mark.parametrize("seed", range(10))
def test_run_lengths_are_read_as_pycocotools_writes_them(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = tuple(random.integers(1, 60, 2).tolist())
    mask = random.random(size) < random.choice([0, 0.02, 0.5, 1])
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    np.testing.assert_array_equal(drawn(RunLengths("a", parse_counts(code), size, by_column=True), size), mask)
    np.testing.assert_array_equal(drawn(RunLengths.of("a", mask), size), mask)


@pytest.mark.parametrize("corner", [(-2, -1), (30, 22), (3, 4), (50, 50)])
def test_run_lengths_are_clipped_to_the_image(corner: tuple[int, int]) -> None:
    expected = np.zeros((60, 60), dtype=bool)
    expected[corner[1] + 5 : corner[1] + 10, corner[0] + 5 : corner[0] + 12] = True
    block = RunLengths.of("a", np.ones((5, 7), dtype=bool), corner)
    np.testing.assert_array_equal(drawn(block, SIZE), expected[5 : 5 + SIZE[0], 5 : 5 + SIZE[1]])


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0])
def test_ellipses_and_turned_rectangles_have_the_pixels_of_shapely(angle: float) -> None:
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    circle = shapely.affinity.scale(shapely.Point(15.2, 11.7).buffer(1, quad_segs=4096), 9.3, 4.1)
    expected = shapely.contains_xy(shapely.affinity.rotate(circle, angle, origin=(15.2, 11.7)), x, y)
    np.testing.assert_array_equal(drawn(Ellipse("a", (15.2, 11.7), (9.3, 4.1), angle), SIZE), expected)
    box = shapely.affinity.rotate(shapely.box(4.2, 3.1, 17.7, 9.9), angle)
    np.testing.assert_array_equal(
        drawn(rectangle("a", 4.2, 3.1, 17.7, 9.9, angle=angle), SIZE), shapely.contains_xy(box, x, y)
    )


def brush_code(rgba: np.ndarray) -> list[int]:
    """Encode as rle-pack does, with one repeated block for each run of at least three bytes, else single bytes."""
    values, lengths = rgba.ravel(), (2, 3, 7, 15)
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{length:04b}" for length in lengths)
    starts = np.flatnonzero(np.diff(values, prepend=-1 - int(values[0])))
    for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
        count = int(end - start)
        for first in range(0, count, 65536):
            part = min(65536, count - first)
            which = next(index for index, length in enumerate(lengths) if part <= 2 ** (length + 1))
            one = part >= 3
            bits += f"{int(one)}{which:02b}{part - 1:0{lengths[which] + 1}b}"
            bits += f"{values[start]:08b}" * (1 if one else part)
    bits += "0" * (-len(bits) % 8)
    return [int(bits[place : place + 8], 2) for place in range(0, len(bits), 8)]


def brush(mask: np.ndarray) -> list[int]:
    return brush_code(np.repeat(np.where(mask, np.uint8(255), np.uint8(0))[:, :, None], 4, axis=2))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_brush_strokes_are_decoded(share: float) -> None:
    mask = np.random.default_rng(0).random(SIZE) < share
    code = brush(mask)
    np.testing.assert_array_equal(label_studio.decode_brush(bytes(code), SIZE), mask)
    for wrong in (code[: len(code) // 2], code[:3], [1, *code[1:]]):
        with pytest.raises(ValueError, match="a mask of brush strokes"):
            label_studio.decode_brush(bytes(wrong), SIZE)


# Formats. Every tool annotates the same scene: a tree, a car that covers a part of it, and a car with a hole.

TREE = [(4, 2), (20, 2), (20, 18), (4, 18)]
CAR = [(10, 6), (28, 6), (28, 12), (10, 12)]
RING = [(22, 14), (30, 14), (30, 22), (22, 22)]
HOLE = [(24, 16), (28, 16), (28, 20), (24, 20)]
# The hole is joined to the outline by a line that is followed in both directions.
KEYHOLE = [*RING, RING[0], *HOLE, HOLE[0]]


def scene(background: int = 0, car: int = 1, tree: int = 2) -> np.ndarray:
    mask = np.full(SIZE, background, dtype=np.uint8)
    mask[2:18, 4:20] = tree
    mask[6:12, 10:28] = car
    mask[14:22, 22:30] = car
    mask[16:20, 24:28] = background
    return mask


def flat(ring: list[tuple[int, int]]) -> list[float]:
    return [float(number) for point in ring for number in point]


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def png(mask: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def ring_flags() -> np.ndarray:
    flags = np.ones((8, 8), dtype=bool)
    flags[2:6, 2:6] = False
    return flags


def as_coco(root: Path, names: list[str]) -> None:
    inside = np.zeros(SIZE, dtype=bool)
    inside[14:22, 22:30] = ring_flags()
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], inside.T.ravel(), [0]]))), prepend=0).tolist()
    crowd = {"counts": [*runs, inside.size - sum(runs)], "size": list(SIZE)}
    regions = [(3, [flat(TREE)], 0), (7, [flat(CAR)], 0), (7, crowd, 1)]
    annotations = [
        {"id": 10 * image + number, "image_id": image, "category_id": category, "segmentation": shape, "iscrowd": crowd}
        for image in range(len(names))
        for number, (category, shape, crowd) in enumerate(regions)
    ]
    annotations.append({"id": 999, "image_id": 0, "category_id": 3, "bbox": [1, 1, 5, 5], "segmentation": []})
    images = [
        {"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]} for number, name in enumerate(names)
    ]
    categories = [{"id": 7, "name": "car"}, {"id": 3, "name": "tree"}]  # the order is that of the ids
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(root / "annotations" / "instances_default.json", content)


def as_labelme(root: Path, names: list[str]) -> None:
    shapes = [
        {"label": "tree", "points": [TREE[0], TREE[2]], "shape_type": "rectangle"},
        {"label": "car", "points": CAR, "shape_type": "polygon"},
        {
            "label": "car",
            "points": [RING[0], [29, 21]],
            "shape_type": "mask",
            "mask": base64.b64encode(png(ring_flags())).decode(),
        },
        {"label": "car", "points": [[1, 1], [9, 9]], "shape_type": "line"},
    ]
    for name in names:
        content = {"shapes": shapes, "imagePath": name, "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
        write_json(root / "images" / Path(name).with_suffix(".json"), content | {"imageData": None})


def as_cvat(root: Path, names: list[str]) -> None:
    points = ";".join(f"{x}.00,{y}.00" for x, y in CAR)
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], ring_flags().ravel(), [0]]))), prepend=0).tolist()
    # The car comes first but has the higher z_order.
    shapes = (
        f'<polygon label="car" points="{points}" z_order="1"></polygon>'
        f'<box label="tree" xtl="4" ytl="2" xbr="20" ybr="18" z_order="0"></box>'
        f'<mask label="car" rle="{", ".join(map(str, runs))}" left="22" top="14" width="8" height="8"></mask>'
        f'<polyline label="car" points="1,1;9,9" z_order="0"></polyline>'
    )
    images = "".join(
        f'<image id="{number}" name="{name}" width="{SIZE[1]}" height="{SIZE[0]}">{shapes}</image>'
        for number, name in enumerate(names)
    )
    labels = "".join(
        f"<label><name>{name}</name><color>{colour}</color></label>"
        for name, colour in (("tree", "#00ff00"), ("car", "#0000ff"))
    )
    meta = f"<meta><task><labels>{labels}</labels></task></meta>"
    (root / "annotations.xml").write_text(f'<?xml version="1.0"?><annotations>{meta}{images}</annotations>')


def as_yolo(root: Path, names: list[str]) -> None:
    def line(label: int, ring: list[tuple[int, int]]) -> str:
        return f"{label} " + " ".join(f"{x / SIZE[1]} {y / SIZE[0]}" for x, y in ring)

    # Small polygons are on top, in whichever order they are written.
    lines = [line(1, CAR), line(1, KEYHOLE), line(0, TREE), "1 0.5 0.5 0.2 0.2"]
    for name in names:
        path = (root / "labels" / name).with_suffix(".txt")
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines))
    (root / "data.yaml").write_text("path: .\ntrain: images\nnames:\n  0: tree\n  1: car\n")


def as_label_studio(root: Path, names: list[str]) -> None:
    inside = np.zeros(SIZE, dtype=bool)
    inside[14:22, 22:30] = ring_flags()

    def percent(ring: list[tuple[int, int]]) -> list[list[float]]:
        return [[100 * x / SIZE[1], 100 * y / SIZE[0]] for x, y in ring]

    box = {"x": 400 / SIZE[1], "y": 200 / SIZE[0], "width": 1600 / SIZE[1], "height": 1600 / SIZE[0], "rotation": 0}
    values: list[tuple[str, str, dict[str, Any]]] = [
        ("r1", "rectanglelabels", box | {"rectanglelabels": ["tree"]}),
        ("r2", "polygon", {"points": percent(CAR)}),  # shape and label as two entries
        ("r2", "labels", {"points": percent(CAR), "labels": ["car"]}),
        ("r3", "brushlabels", {"format": "rle", "rle": brush(inside), "brushlabels": ["car"]}),
        ("r4", "keypointlabels", {"x": 1, "y": 1, "keypointlabels": ["car"]}),
    ]
    extra = {"original_width": SIZE[1], "original_height": SIZE[0], "image_rotation": 0}
    result = [{"id": identity, "type": kind, "value": value} | extra for identity, kind, value in values]
    tasks = [
        {
            "id": number,
            "data": {"image": f"/data/upload/1/{number:08x}-{name}"},
            "annotations": [{"result": [], "was_cancelled": True}, {"result": result}],
        }
        for number, name in enumerate(names)
    ]
    write_json(root / "project-1-at-2026-01-01.json", tasks)


def as_supervisely(root: Path, names: list[str]) -> None:
    (root / "images").rename(root / "ds")
    (root / "ds" / "img").mkdir()
    classes = [
        {"title": "tree", "shape": "any", "color": "#00FF00"},
        {"title": "car", "shape": "any", "color": "#0000FF"},
    ]
    write_json(root / "meta.json", {"classes": classes, "tags": []})
    bitmap = {"data": base64.b64encode(zlib.compress(png(ring_flags()))).decode(), "origin": [22, 14]}

    def polygon_of_pixels(ring: list[tuple[int, int]]) -> dict[str, Any]:
        # The corner pixels themselves: the last ones are one less than the edge.
        (left, top), (right, bottom) = ring[0], ring[2]
        corners = [[left, top], [right - 1, top], [right - 1, bottom - 1], [left, bottom - 1]]
        return {"exterior": corners, "interior": []}

    objects = [
        {"classTitle": "tree", "geometryType": "polygon", "points": polygon_of_pixels(TREE)},
        {"classTitle": "car", "geometryType": "polygon", "points": polygon_of_pixels(CAR)},
        {"classTitle": "car", "geometryType": "bitmap", "bitmap": bitmap},
        {"classTitle": "car", "geometryType": "point", "points": {"exterior": [[1, 1]], "interior": []}},
    ]
    for name in names:
        (root / "ds" / name).rename(root / "ds" / "img" / name)
        content = {"size": {"height": SIZE[0], "width": SIZE[1]}, "objects": objects, "tags": []}
        write_json(root / "ds" / "ann" / f"{name}.json", content)


def as_via(root: Path, names: list[str]) -> None:
    def region(label: str, shape: dict[str, Any]) -> dict[str, Any]:
        return {"shape_attributes": shape, "region_attributes": {"kind": "seen", "class": label}}

    def outline(ring: list[tuple[int, int]]) -> dict[str, Any]:
        return {"name": "polygon", "all_points_x": [x for x, _ in ring], "all_points_y": [y for _, y in ring]}

    regions = [
        region("tree", {"name": "rect", "x": 4, "y": 2, "width": 16, "height": 16}),
        region("car", outline(CAR)),
        region("car", outline(KEYHOLE)),
        region("car", {"name": "point", "cx": 1, "cy": 1}),
    ]
    images = {
        f"{name}123": {"filename": name, "size": 123, "regions": regions, "file_attributes": {}} for name in names
    }
    options = {"tree": "", "car": ""}
    attributes = {"region": {"class": {"type": "dropdown", "options": options}}}
    write_json(root / "via_project.json", {"_via_img_metadata": images, "_via_attributes": attributes})


TOOLS: dict[str, tuple[Callable[[Path, list[str]], None], str]] = {
    "COCO JSON": (as_coco, "boxes without a segmentation"),
    "labelme JSON": (as_labelme, "lines"),
    "CVAT XML": (as_cvat, "lines"),
    "YOLO text files": (as_yolo, "boxes without a polygon"),
    "Label Studio JSON": (as_label_studio, "points"),
    "Supervisely project": (as_supervisely, "points"),
    "VGG Image Annotator JSON": (as_via, "points"),
}


def images_in(root: Path, count: int = 5) -> list[str]:
    names = [f"photo {number}.png" for number in range(count)]
    (root / "images").mkdir(parents=True)
    for number, name in enumerate(names):
        Image.fromarray(fakes.image_and_mask(number, 3, SIZE)[0]).save(root / "images" / name)
    return names


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_gives_the_masks_and_classes_that_were_drawn(tmp_path: Path, tool: str) -> None:
    write, left_out = TOOLS[tool]
    write(tmp_path, images_in(tmp_path))
    train, val = Folder("train", str(tmp_path)), Folder("val", str(tmp_path))
    assert (len(train), len(val)) == (4, 1)
    # The classes are in the order of the tool, or sorted where it has none.
    order = ["car", "tree"] if tool in ("labelme JSON", "Label Studio JSON") else ["tree", "car"]
    assert train.classes.names == ("background", *order)
    if tool in ("CVAT XML", "Supervisely project"):
        assert train.classes.colours == ((0, 0, 0), (0, 255, 0), (0, 0, 255))
    for dataset in (train, val):
        for index in range(len(dataset)):
            expected = scene(0, 1 + order.index("car"), 1 + order.index("tree"))
            np.testing.assert_array_equal(dataset[index].mask, expected)
            np.testing.assert_array_equal(dataset.stored_mask(index).values, expected)
    assert train.notes[-1] == f"annotations: {tool}, 5 images, 15 regions"
    count = 1 if tool == "COCO JSON" else 5
    assert [line for line in train.warnings if "without an area" in line and f": {count} {left_out}" in line]
    assert len(train.warnings) == 1, train.warnings


def as_via_csv(root: Path, names: list[str]) -> None:
    as_via(root, names)
    content = json.loads((root / "via_project.json").read_text())
    (root / "via_project.json").unlink()
    with (root / "via_export.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        head = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes"
        rows.writerow(head.split(","))
        for image in content["_via_img_metadata"].values():
            for number, region in enumerate(image["regions"]):
                values = [json.dumps(region["shape_attributes"]), json.dumps(region["region_attributes"])]
                rows.writerow([image["filename"], 123, "{}", 4, number, *values])


def as_via_export(root: Path, names: list[str]) -> None:
    """Write the export of version 1, which numbers regions as the keys of a mapping."""
    as_via(root, names)
    content = json.loads((root / "via_project.json").read_text())["_via_img_metadata"]
    for image in content.values():
        image["regions"] = {str(number): region for number, region in enumerate(image["regions"])}
    write_json(root / "via_project.json", content)


def as_json_min(root: Path, names: list[str]) -> None:
    as_label_studio(root, names)
    path = next(root.glob("project*.json"))
    tasks = []
    for task in json.loads(path.read_text()):
        regions = [entry | entry.pop("value") for entry in task["annotations"][1]["result"]]
        del regions[1]  # the outline without a label, which JSON-MIN does not have
        tasks.append({"image": task["data"]["image"], "id": task["id"], "annotator": 1, "label": regions})
    write_json(path, tasks)


def as_compressed_coco(root: Path, names: list[str]) -> None:
    as_coco(root, names)
    path = root / "annotations" / "instances_default.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        if annotation["segmentation"]:
            part = annotation["segmentation"]
            codes = coco_mask.frPyObjects(part, *SIZE)
            code = coco_mask.merge(codes) if isinstance(codes, list) else codes
            annotation["segmentation"] = {"size": list(SIZE), "counts": code["counts"].decode()}
    categories = [{"id": 0, "name": "parts", "supercategory": "none"}]  # as Roboflow adds it
    content["categories"] = categories + [entry | {"supercategory": "parts"} for entry in content["categories"]]
    write_json(path, content)


VARIANTS = (as_via_csv, as_via_export, as_json_min, as_compressed_coco)


@pytest.mark.parametrize("write", VARIANTS)
def test_other_exports_of_a_tool_give_the_same_masks(tmp_path: Path, write: Callable[[Path, list[str]], None]) -> None:
    write(tmp_path, images_in(tmp_path))
    dataset = Folder("train", str(tmp_path))
    order = ["tree", "car"] if write == as_compressed_coco else ["car", "tree"]  # the others list no classes
    assert dataset.classes.names == ("background", *order)
    expected = scene(0, 1 + order.index("car"), 1 + order.index("tree"))
    np.testing.assert_array_equal(dataset[0].mask, expected)


def test_pixels_without_annotation_can_be_ignored(tmp_path: Path) -> None:
    as_cvat(tmp_path, images_in(tmp_path))
    dataset = Folder("train", str(tmp_path), unlabelled="ignore")
    assert dataset.classes.names == ("tree", "car")
    np.testing.assert_array_equal(dataset[0].mask, scene(IGNORED, 1, 0))
    np.testing.assert_array_equal(dataset.stored_mask(0).values, scene(IGNORED, 1, 0))
    assert dataset.fingerprint != Folder("train", str(tmp_path)).fingerprint


def test_a_table_gives_the_order_and_labels_of_the_classes(tmp_path: Path) -> None:
    as_cvat(tmp_path, images_in(tmp_path))
    (tmp_path / "classes.yaml").write_text("car: 7\nbackground: 1\ntree: 9\n")
    dataset = Folder("train", str(tmp_path))
    np.testing.assert_array_equal(dataset[0].mask, scene(1, 0, 2))
    np.testing.assert_array_equal(dataset.stored_mask(0).values, scene(1, 7, 9))


def test_labels_named_ignore_and_background_have_their_meaning(tmp_path: Path) -> None:
    names = images_in(tmp_path)
    as_labelme(tmp_path, names)
    for path in (tmp_path / "images").glob("*.json"):
        text = path.read_text().replace('"tree"', '"__ignore__"', 1)
        content = json.loads(text)
        content["shapes"].append({"label": "_background_", "points": CAR, "shape_type": "polygon"})
        path.write_text(json.dumps(content))
    dataset = Folder("train", str(tmp_path))
    assert dataset.classes.names == ("background", "car")
    expected = scene(0, 1, IGNORED)
    expected[6:12, 10:28] = 0
    np.testing.assert_array_equal(dataset[0].mask, expected)


@pytest.mark.parametrize("stated", ["files", "folders", "lists", "subsets", "mapping"])
def test_stated_splits_are_kept(tmp_path: Path, stated: str) -> None:
    names = images_in(tmp_path)
    given: dict[str, Any] = {}
    if stated == "folders":
        as_yolo(tmp_path, names)
        for kind in ("images", "labels"):
            for split, moved in (("train", names[1:]), ("valid", names[:1])):
                (tmp_path / kind / split).mkdir()
                for name in moved:
                    file = Path(name).with_suffix(".png" if kind == "images" else ".txt").name
                    (tmp_path / kind / file).rename(tmp_path / kind / split / file)
    elif stated == "subsets":
        as_cvat(tmp_path, names)
        text = (tmp_path / "annotations.xml").read_text().replace("<image ", '<image subset="Train" ')
        text = text.replace('subset="Train" id="0"', 'subset="Validation" id="0"')
        (tmp_path / "annotations.xml").write_text(text)
    elif stated == "lists":
        as_coco(tmp_path, names)
        (tmp_path / "train.txt").write_text("\n".join(names[1:]))
        (tmp_path / "val.txt").write_text(names[0])
    else:
        for split, members in (("train", names[1:]), ("val", names[:1])):
            as_coco(tmp_path, members)
            name = f"instances_{split}2017.json" if stated == "files" else f"{'ab'[split == 'val']}.json"
            (tmp_path / "annotations" / "instances_default.json").rename(tmp_path / "annotations" / name)
        if stated == "mapping":
            given["annotations"] = {"train": "annotations/a.json", "val": "annotations/b.json"}
    for split, members in (("train", names[1:]), ("val", names[:1])):
        dataset = Folder(split, str(tmp_path), **given)
        assert sorted(pair.image.name for pair in dataset.pairs) == members
        np.testing.assert_array_equal(dataset[0].mask, scene(0, 2, 1))


def test_images_and_entries_without_each_other_are_counted(tmp_path: Path) -> None:
    names = images_in(tmp_path)
    as_coco(tmp_path, [*names[1:], "gone.png"])
    dataset = Folder("train", str(tmp_path))
    lines = "\n".join(dataset.warnings)
    assert "1 of 5 annotated images, such as gone.png, are not in" in lines
    assert "1 images that the annotations do not list are left out, such as images/photo 0.png" in lines


def test_masks_of_other_names_beside_annotations_are_said_not_to_be_read(tmp_path: Path) -> None:
    fakes.folder(tmp_path, "binary")
    as_coco(tmp_path, [path.name for path in sorted((tmp_path / "images").iterdir())])
    (tmp_path / "masks").rename(tmp_path / "labels")
    (line,) = (line for line in Folder("train", str(tmp_path)).warnings if "not read" in line)
    assert line == f"{tmp_path / 'labels'}: not read, since there are annotations (COCO JSON) - remove one of them"


def test_masks_are_used_if_there_are_both_and_annotations_if_they_are_given(tmp_path: Path) -> None:
    fakes.folder(tmp_path, "binary")
    as_coco(tmp_path, [path.name for path in sorted((tmp_path / "images").iterdir())])
    assert Folder("train", str(tmp_path)).classes.names == ("background", "foreground")
    dataset = Folder("train", str(tmp_path), annotations="annotations")
    assert dataset.classes.names == ("background", "tree", "car")
    assert any("masks: not read, since dataset.annotations is set" in line for line in dataset.warnings)
    with pytest.raises(UsageError, match=r"the annotation of train_0.png is 24x32 and its image .* 48x64"):
        dataset[dataset.names.index("train_0")]


def edit(path: str, old: str, new: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        file = next(root.rglob(path))
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return apply


BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "cut off": ("COCO JSON", lambda root: (root / "annotations/instances_default.json").write_text("{"), "is not JSON"),
    "no category": ("COCO JSON", edit("*.json", '"category_id": 7', '"category_id": 8'), "has the category 8"),
    "no image": ("COCO JSON", edit("*.json", '"image_id": 2', '"image_id": 77'), "is of image 77"),
    "odd": ("COCO JSON", edit("*.json", "[[4.0, 2.0, ", "[[4.0, "), "annotation 0: a list of x and y has 7 numbers"),
    "other size": ("COCO JSON", edit("*.json", '"size": [24', '"size": [23'), "of 23x32 pixels and the image"),
    "sum": ("COCO JSON", edit("*.json", '"counts": [', '"counts": [1, '), "add up to 769 pixels instead of 24x32"),
    "unknown shape": ("labelme JSON", edit("*.json", '"rectangle"', '"cube"'), "the shape type 'cube' of 'tree'"),
    "not base64": ("labelme JSON", edit("*.json", '"mask": "', '"mask": "AAAA'), "a mask is not a PNG"),
    "entities": ("CVAT XML", edit("*.xml", "<annotations>", "<!DOCTYPE a><annotations>"), "has a document type"),
    "video": ("CVAT XML", edit("*.xml", "</meta>", "</meta><track/>"), "export it as 'CVAT for images'"),
    "no attribute": ("CVAT XML", edit("*.xml", 'label="tree"', ""), "lacks 'label'"),
    "class": ("YOLO text files", edit("photo 0.txt", "0 0.125", "5 0.125"), "line 3 has class 5"),
    "two points": ("YOLO text files", edit("photo 0.txt", "1 0.5 0.5", "1 0.5 0.5 0.1\n1 0.5 0.5"), "line 4"),
    "not finite": ("YOLO text files", edit("photo 0.txt", "0 0.125", "0 nan"), "not a finite number"),
    "two labels": ("Label Studio JSON", edit("*.json", '["tree"]', '["tree", "car"]'), "has the labels tree, car"),
    "rotated": ("Label Studio JSON", edit("*.json", 'image_rotation": 0', 'image_rotation": 90'), "was rotated in"),
    "no class": ("VGG Image Annotator JSON", edit("*.json", '"class"', '"thing"'), "attributes kind, thing"),
    "bitmap": ("Supervisely project", edit("photo 0*.json", '"origin": [22', '"origin": ["a"'), "invalid annotations"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_invalid_annotations_are_refused_with_the_file_and_the_reason(tmp_path: Path, case: str) -> None:
    tool, damage, message = BAD[case]
    TOOLS[tool][0](tmp_path, images_in(tmp_path))
    damage(tmp_path)
    with pytest.raises(UsageError) as raised:
        Folder("train", str(tmp_path))
    assert message in str(raised.value)
    assert str(tmp_path) in str(raised.value)
    assert " - " in str(raised.value)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: as_cvat(root, ["elsewhere.png"]), "none of the 1 annotated images, such as elsewhere.png,"),
        (lambda root: (as_cvat(root, images_in(root)), as_via(root, ["photo 0.png"])), "annotations of several tools"),
        (
            lambda root: (as_coco(root, images_in(root)), as_cvat(root / "annotations", [])),
            "annotations of several tools",
        ),
        (lambda root: (as_coco(root, images_in(root)), second_coco(root)), "are both annotations of all images"),
        (lambda root: (as_coco(root, images_in(root)), add_table(root)), "have the class 'tree'"),
        (lambda root: images_in(root), "masks is not a folder"),
    ],
    ids=["elsewhere", "two tools", "two tools nested", "two files", "table", "none"],
)
def test_what_is_mistakable_is_refused(tmp_path: Path, prepare: Callable[[Path], Any], message: str) -> None:
    prepare(tmp_path)
    with pytest.raises(UsageError, match=message):
        Folder("train", str(tmp_path))


def second_coco(root: Path) -> None:
    path = root / "annotations" / "instances_default.json"
    path.with_name("person_keypoints.json").write_text(path.read_text())


def add_table(root: Path) -> None:
    (root / "classes.yaml").write_text("background: 0\ncar: 1\n")


# Writing


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("masks", ["labels", "binary"])
def test_written_annotations_give_the_same_masks(tmp_path: Path, kind: str, masks: str) -> None:
    fakes.folder(tmp_path / "set", masks, layout="subfolders")
    splits = [Folder(split, str(tmp_path / "set")) for split in ("train", "val")]
    written = convert(splits, tmp_path / "out", kind)
    assert len(written) == 8
    unlabelled = "background" if masks == "binary" or kind == "masks" else "ignore"
    for split in splits:
        again = Folder(split.split, str(tmp_path / "out"), unlabelled=unlabelled)
        assert [name.split("/")[-1] for name in again.names] == split.names
        assert again.classes.names == split.classes.names
        for index in range(len(split)):
            np.testing.assert_array_equal(again[index].mask, split[index].mask)
            np.testing.assert_array_equal(again[index].image, split[index].image)
    assert not list(tmp_path.glob(".tmp-*"))


def test_pycocotools_decodes_what_is_written(tmp_path: Path) -> None:
    fakes.folder(tmp_path / "set", "binary", layout="subfolders")
    dataset = Folder("train", str(tmp_path / "set"))
    convert([dataset], tmp_path / "out", "coco", images="none")
    content = json.loads((tmp_path / "out/annotations/instances_train.json").read_text())
    for image in content["images"]:
        mask = np.zeros((image["height"], image["width"]), dtype=bool)
        for entry in content["annotations"]:
            if entry["image_id"] == image["id"]:
                codes = coco_mask.frPyObjects(entry["segmentation"], *mask.shape)
                mask |= coco_mask.decode(codes)[:, :, 0].astype(bool)
                assert entry["area"] == coco_mask.area(codes)[0]
        truth = dataset[dataset.names.index(Path(image["file_name"]).stem)].mask
        np.testing.assert_array_equal(mask, truth == 1)


def test_simplified_outlines_stay_within_the_distance(tmp_path: Path) -> None:
    fakes.folder(tmp_path / "set", "binary", layout="subfolders")
    dataset = Folder("train", str(tmp_path / "set"))
    exact = convert([dataset], tmp_path / "exact", "coco", images="none")
    short = convert([dataset], tmp_path / "short", "coco", images="none", simplify=1.5)
    for one, other in zip(exact, short, strict=True):
        for region, simplified in zip(one.regions, other.regions, strict=True):
            assert len(simplified.ring) <= len(region.ring)
            distances = shapely.distance(shapely.points(region.ring), shapely.LinearRing(simplified.ring))
            assert distances.max() <= 1.5


def test_an_output_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    fakes.folder(tmp_path / "set", "binary", layout="subfolders")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not an empty folder"):
        convert([Folder("train", str(tmp_path / "set"))], tmp_path / "out", "coco")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
