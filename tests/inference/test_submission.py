"""Submissions are read back with zipfile, tarfile and Pillow, and compared with the labels of the servers' rules."""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segdeconv.classes import Classes, voc_colours
from segdeconv.data.datasets import ade20k, cityscapes, voc
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.inference import submission as module
from segdeconv.inference.submission import SubmissionWriter

VISTAS = Classes(("bird", "ground", "curb"), voc_colours(3), labels=(0, 1, 2))
SPARSE = Classes(("bird", "curb"), voc_colours(2), labels=(0, 2))
SIZE = (6, 8)
CASES: dict[str, tuple[str, Classes, str, dict[int, int]]] = {  # server, classes, name of an image, labels of indices
    "cityscapes": ("cityscapes", cityscapes.IDS, "berlin_000000_{:06}_leftImg8bit", {0: 7, 13: 26, 18: 33}),
    "train ids": ("cityscapes", cityscapes.TRAIN_IDS, "berlin_000000_{:06}_leftImg8bit", {0: 7, 13: 26, 18: 33}),
    "kitti": ("kitti", cityscapes.TRAIN_IDS, "{:06}_10", {0: 7, 10: 23, 18: 33}),
    "ade20k": ("ade20k", ade20k.CLASSES, "ADE_test_{:08}", {0: 1, 20: 21, 149: 150}),
    "voc": ("voc", voc.CLASSES, "2008_{:06}", {0: 0, 15: 15, 20: 20}),
    "mapillary": ("mapillary", VISTAS, "0035fkbjWljhaftp_M{:02}-g", {0: 0, 1: 1, 2: 2}),
    "part of mapillary": ("mapillary", SPARSE, "0035fkbjWljhaftp_M{:02}-g", {0: 0, 1: 2}),
}
PLACES = {
    "cityscapes": ("cityscapes.zip", ""),
    "kitti": ("kitti.zip", "semantic/"),
    "ade20k": ("ade20k.zip", ""),
    "voc": ("voc.tgz", "results/VOC2012/Segmentation/comp6_test_cls/"),
    "mapillary": ("mapillary.zip", ""),
}


@pytest.fixture(autouse=True)
def two_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every benchmark have two test images, which are small."""
    for server, rules in module.SERVERS.items():
        changed = rules._replace(num_images=2, size=rules.size and SIZE)
        monkeypatch.setitem(module.SERVERS, server, changed)


def predicted(folder: Path, case: str, names: list[str] | None = None) -> tuple[SubmissionWriter, dict[str, Path]]:
    """Write images and their masks, in the class indices of a case, and return a writer and the images by name."""
    server, classes, pattern, labels = CASES[case]
    random = np.random.default_rng(0)
    images = {}
    for name in names or [pattern.format(number) for number in (1, 2)]:
        images[name] = folder / "test" / f"{name}.png"
        images[name].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(images[name])
        mask = random.choice(np.array(list(labels), dtype=np.uint8), SIZE)
        draw.save_mask(mask, classes, folder / "out" / f"{name}.png")
    return SubmissionWriter(server, classes, folder / "out"), images


def write(folder: Path, writer: SubmissionWriter, images: dict[str, Path]) -> None:
    writer.check_inputs(images)
    writer.write({path: (folder / "out" / f"{name}.png", SIZE) for name, path in images.items()})


def contents(path: Path) -> dict[str, Image.Image]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            files = {name: archive.read(name) for name in archive.namelist()}
    else:
        with tarfile.open(path, "r:gz") as tar:
            files = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
    return {name: Image.open(io.BytesIO(content)) for name, content in files.items()}


@pytest.mark.parametrize("case", CASES)
def test_an_archive_has_the_layout_and_the_labels_of_the_server(case: str, tmp_path: Path) -> None:
    server, _, _, labels = CASES[case]
    writer, images = predicted(tmp_path, case)
    write(tmp_path, writer, images)
    archive, folder = PLACES[server]
    found = contents(tmp_path / "out" / archive)
    assert list(found) == [f"{folder}{name}.png" for name in sorted(images)]
    for name in images:
        image = found[f"{folder}{name}.png"]
        indices = np.asarray(Image.open(tmp_path / "out" / f"{name}.png"))
        assert image.mode == ("P" if server == "voc" else "L")
        assert np.array_equal(np.asarray(image), np.vectorize(labels.__getitem__)(indices))
        if server == "voc":
            colours = image.getpalette()
            assert colours is not None
            assert colours[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    first = (tmp_path / "out" / archive).read_bytes()
    write(tmp_path, writer, dict(reversed(images.items())))
    assert (tmp_path / "out" / archive).read_bytes() == first


@pytest.mark.parametrize(
    ("case", "names", "message"),
    [
        (
            "cityscapes",
            ["a", "b"],
            "2 images with a name unlike berlin_000000_000019_leftImg8bit (test/a.png, test/b.png);",
        ),
        ("kitti", ["000000_10"], "1 image instead of 2;"),
        (
            "voc",
            ["2008_000001", "x/2008_000001"],
            "2 images whose name is not its own (test/2008_000001.png, test/x/2008_000001",
        ),
    ],
)
def test_images_of_another_set_are_refused_before_prediction(
    case: str, names: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    writer, images = predicted(Path(), case, names)
    with pytest.raises(UsageError, match=re.escape(f"--submission {case}: {message}")):
        writer.check_inputs(images)


def test_sizes_and_values_are_checked_and_no_archive_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writer, images = predicted(Path(), "cityscapes")
    first, second = images
    Image.new("RGB", (SIZE[0], SIZE[1])).save(images[first])
    with pytest.raises(UsageError, match=rf"1 image of another size than 6x8 \(HxW\) \(test/{first}\.png\);"):
        writer.check_inputs(images)
    Image.new("L", (3, 3)).save(f"out/{first}.png")
    Image.new("L", SIZE[::-1], 19).save(f"out/{second}.png")
    with pytest.raises(UsageError, match=rf"1 mask of another size than its image \(out/{first}\.png\); 1 mask with"):
        writer.write({path: (Path(f"out/{name}.png"), SIZE) for name, path in images.items()})
    assert sorted(path.name for path in Path("out").iterdir()) == [f"{first}.png", f"{second}.png"]


@pytest.mark.parametrize(
    ("server", "classes", "message"),
    [
        ("cityscape", voc.CLASSES, "--submission cityscape is not an evaluation server - did you mean 'cityscapes'?"),
        (
            "ade20k",
            voc.CLASSES,
            "the checkpoint has 21 classes (background, aeroplane, bicycle, ...) and the server of ADE20K's scene "
            "parsing has 150 classes (wall, building, sky, ...); 'background' is in only one of them - submit a",
        ),
        ("mapillary", Classes(("a", "b"), voc_colours(2), by_colour=True), "without labels of 0 to 255"),
        ("mapillary", Classes(("a", "b"), voc_colours(2), labels=(0, 300)), "without labels of 0 to 255"),
    ],
)
def test_other_classes_are_refused_by_name(server: str, classes: Classes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        SubmissionWriter(server, classes, tmp_path)


def test_the_order_of_the_classes_does_not_matter(tmp_path: Path) -> None:
    backwards = Classes(voc.CLASSES.names[::-1], voc.CLASSES.colours[::-1])
    assert module.label_table("voc", backwards)[:21].tolist() == list(range(20, -1, -1))
