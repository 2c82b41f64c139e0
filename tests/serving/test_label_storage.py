"""What a labelling session stores: masks drawn from strokes, in the layout of `dataset=folder`, whatever stops it."""

import json
import os
import time

import cv2
import numpy as np
import pytest
from PIL import Image

from segdeconv.data.datasets.folder import Folder
from segdeconv.data.files.reading import image_size
from segdeconv.errors import UsageError
from segdeconv.serving.label.storage import Storage
from segdeconv.serving.label.strokes import IGNORE, checked_stroke, draw_stroke, flood

BRUSH = {"tool": "brush", "class": 0, "radius": 3, "points": [[10.5, 20.5], [30.5, 20.5]]}
SQUARE = {"tool": "polygon", "class": 1, "rings": [[[5, 5], [20, 5], [20, 15], [5, 15]]]}


@pytest.fixture
def photos(tmp_path):
    """Three photos, of which one is turned by EXIF and one lies in a sub-folder."""
    random = np.random.default_rng(0)
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    paths = {}
    for name, size in (("a", (40, 60)), ("turned", (40, 60)), ("sub/b", (60, 40))):
        path = tmp_path / "photos" / f"{name}.jpg"
        exif = Image.Exif()
        if name == "turned":
            exif[0x0112] = 6
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path, exif=exif)
        paths[name] = path
    return paths


def opened(tmp_path, photos, names=("road", "sky")):
    storage = Storage(tmp_path / "out", photos)
    for name in names:
        if name not in storage.classes.names.values():
            storage.change_classes(lambda classes, name=name: classes.add(name))
    return storage


def stored(tmp_path, name):
    return np.array(Image.open(tmp_path / "out" / "masks" / f"{name}.png"))


def test_a_brush_paints_the_pixels_within_its_radius():
    mask = np.full((40, 60), IGNORE, dtype=np.uint8)
    draw_stroke(mask, checked_stroke({**BRUSH, "radius": 6}, [0]), (40, 60))
    y, x = np.mgrid[:40, :60] + 0.5
    distance = np.hypot(x - np.clip(x, 10.5, 30.5), y - 20.5)
    assert (mask[distance < 5] == 0).all()
    assert (mask[distance > 7.5] == IGNORE).all()


def test_a_thin_stroke_is_drawn_at_any_scale_and_the_eraser_takes_it_away():
    mask = np.full((100, 150), IGNORE, dtype=np.uint8)
    stroke = checked_stroke({"tool": "brush", "class": 0, "radius": 1, "points": [[200, 2000], [5000, 2000]]}, [0])
    draw_stroke(mask, stroke, (4000, 6000))
    assert 115 < (mask == 0).sum() < 250
    draw_stroke(mask, {**stroke, "class": None, "radius": 100.0}, (4000, 6000))
    assert (mask == IGNORE).all()


def test_a_flood_is_the_connected_region_of_like_colour():
    image = np.full((80, 100, 3), 50, dtype=np.uint8)
    image[20:60, 10:90] = 120
    image[30:50, 30:70] = 200  # a hole
    image[5:10, 5:10] = 120  # not connected
    stroke = checked_stroke({"tool": "flood", "class": 1, "point": [15, 25], "tolerance": 20}, [1])
    mask = np.full((80, 100), IGNORE, dtype=np.uint8)
    draw_stroke(mask, flood(image, stroke), (80, 100))
    expected = (cv2.medianBlur(image, 3)[..., 0] == 120).astype(np.uint8)
    expected[:15] = 0
    assert ((mask == 1) != (expected == 1)).mean() < 0.03
    with pytest.raises(UsageError, match="the point x=100, y=3 is outside the photo of 100x80 pixels"):
        flood(image, {**stroke, "point": [100.0, 3.0]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": 7}, "class 7 does not exist"), ({"class": True}, "does not exist"),
        ({"points": []}, "needs 1 to"), ({"points": [[1, 2, 3]]}, "not a pair"),
        ({"points": [[float("nan"), 1]]}, "not a number"), ({"points": [["1", 2]]}, "not a number"),
        ({"radius": 1e9}, "not a number up to"), ({"radius": -5}, "too small"), ({"tool": "../x"}, "is unknown"),
        ({"points": [[0, 0]] * 20_001}, "needs 1 to"),
    ],
)  # fmt: skip
def test_a_stroke_that_the_page_would_not_send_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        checked_stroke({**BRUSH, **change}, [0, 1])


def test_what_is_stored_is_a_data_set(tmp_path, photos):
    storage = opened(tmp_path, photos)
    for name in photos:
        storage.add_stroke(name, checked_stroke(BRUSH, [0, 1]))
        storage.add_stroke(name, checked_stroke(SQUARE, [0, 1]))
    storage.close()
    dataset = Folder("train", str(tmp_path / "out"))
    assert dataset.classes.names == ("road", "sky")
    assert (dataset.warnings, len(dataset) + len(Folder("val", str(tmp_path / "out")))) == ((), 3)
    for index in range(len(dataset)):
        mask = dataset.read_mask(index)
        assert mask.shape == image_size(dataset.pairs[index].image)
        assert set(np.unique(mask)) == {0, 1, 255}
    assert stored(tmp_path, "turned").shape == (60, 40)
    assert (tmp_path / "out" / "images" / "a.jpg").samefile(photos["a"])


def test_undo_goes_back_one_thing_at_a_time_until_nothing_is_left(tmp_path, photos):
    storage = opened(tmp_path, photos)
    storage.add_stroke("a", BRUSH)
    first = stored(tmp_path, "a")
    storage.add_stroke("a", SQUARE)
    storage.undo("a")
    assert (stored(tmp_path, "a") == first).all()
    storage.undo("a")
    assert not (tmp_path / "out" / "masks" / "a.png").exists()
    assert not (tmp_path / "out" / "images" / "a.jpg").exists()
    assert photos["a"].exists()
    with pytest.raises(UsageError, match="nothing is left to undo"):
        storage.undo("a")
    storage.close()


def test_an_accepted_mask_stays_and_what_was_painted_keeps_its_label(tmp_path, photos):
    storage = opened(tmp_path, photos)
    storage.add_stroke("a", BRUSH)
    storage.accept("a", np.ones((40, 60), dtype=np.uint8))
    mask = stored(tmp_path, "a")
    assert set(np.unique(mask)) == {0, 1}
    assert mask[20, 20] == 0
    with pytest.raises(UsageError, match="the mask of a is accepted already - reopen it first"):
        storage.accept("a", np.zeros((40, 60), dtype=np.uint8))
    (file,) = (tmp_path / "out" / "session" / "accepted").iterdir()
    before = file.read_bytes()
    storage.reopen("a")
    assert set(np.unique(stored(tmp_path, "a"))) == {0, 255}
    storage.accept("a", np.zeros((40, 60), dtype=np.uint8))
    assert file.read_bytes() == before
    storage.undo("a")
    storage.undo("a")
    assert (stored(tmp_path, "a") == mask).all()
    storage.close()


def test_a_session_that_was_killed_resumes_with_every_stroke(tmp_path, photos):
    storage = opened(tmp_path, photos)
    storage.add_stroke("sub/b", BRUSH)
    storage.accept("sub/b", np.ones((60, 40), dtype=np.uint8))
    storage.add_stroke("a", BRUSH)
    before = {name: stored(tmp_path, name) for name in ("a", "sub/b")}
    storage.close()
    log = tmp_path / "out" / "session" / "strokes" / "a.jsonl"
    with log.open("a") as file:
        file.write(json.dumps(SQUARE) + "\n" + json.dumps(BRUSH)[:20])  # cut off; and the mask is older
    os.utime(log, ns=(time.time_ns() + 10**9,) * 2)
    (tmp_path / "out" / "masks" / "sub" / "b.png").unlink()
    storage = opened(tmp_path, photos)
    assert [entry["tool"] for entry in storage.log("a").entries] == ["brush", "polygon"]
    assert stored(tmp_path, "a")[10, 10] == 1
    assert (stored(tmp_path, "sub/b") == before["sub/b"]).all()
    storage.add_stroke("a", BRUSH)
    storage.close()
    assert len(opened(tmp_path, photos).log("a").entries) == 3


def test_a_stroke_that_was_undone_takes_nothing_with_it_when_its_class_is_removed(tmp_path, photos):
    storage = opened(tmp_path, photos, ("road", "sky", "mistake"))
    storage.add_stroke("a", BRUSH)
    storage.add_stroke("a", {**SQUARE, "class": 2})
    storage.undo("a")
    storage.change_classes(lambda classes: classes.remove(2, storage.used_labels()))
    storage.close()
    resumed = Storage(tmp_path / "out", photos)
    assert [(entry["tool"], entry["class"]) for entry in resumed.log("a").entries] == [("brush", 0)]
    resumed.close()


def test_a_session_with_accepted_masks_resumes_without_reading_them(tmp_path, photos, monkeypatch):
    storage = opened(tmp_path, photos)
    storage.accept("a", np.ones((40, 60), dtype=np.uint8))
    storage.close()
    monkeypatch.setattr(Storage, "_read_accepted", lambda *_: pytest.fail("thousands of large masks take minutes"))
    resumed = opened(tmp_path, photos)
    assert resumed.used_labels() == {1}
    resumed.close()


def test_a_folder_of_something_else_and_one_in_use_are_refused(tmp_path, photos):
    storage = opened(tmp_path, photos)
    with pytest.raises(UsageError, match="is in use by"):
        opened(tmp_path, photos)
    storage.close()
    (tmp_path / "mine" / "masks").mkdir(parents=True)
    with pytest.raises(UsageError, match="mine/masks was not written by label, which would change it - choose another"):
        Storage(tmp_path / "mine", photos)


@pytest.mark.parametrize("name", ["", "ignore", "a\nb", "x" * 61, 5, "Road", "\u202eabc"])
def test_a_class_name_that_no_table_could_hold_is_refused(tmp_path, photos, name):
    storage = opened(tmp_path, photos)
    with pytest.raises(UsageError):
        storage.change_classes(lambda classes: classes.add(name))
    storage.close()


def test_labels_stay_when_classes_change(tmp_path, photos):
    storage = opened(tmp_path, photos, ("road", "sky", "it's: a 'car' #1"))
    storage.add_stroke("a", {**BRUSH, "class": 2})
    with pytest.raises(UsageError, match="has strokes - undo or erase them first, or rename the class"):
        storage.change_classes(lambda classes: classes.remove(2, storage.used_labels()))
    storage.change_classes(lambda classes: classes.remove(0, storage.used_labels()))
    storage.change_classes(lambda classes: classes.change(1, name="air", colour="#010203"))
    storage.close()
    resumed = Storage(tmp_path / "out", photos)
    assert resumed.classes.names == {1: "air", 2: "it's: a 'car' #1"}
    assert resumed.classes.colours[1] == (1, 2, 3)
    storage.close()
    for name in ("turned", "sub/b"):
        resumed.add_stroke(name, {**SQUARE, "class": 1})
    resumed.close()
    assert Folder("train", str(tmp_path / "out")).classes.labels == (1, 2)
