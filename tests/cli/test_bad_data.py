"""Masks, lists and folders through the real commands: accepted, or refused in one line before the first step."""

import shutil
from pathlib import Path

import fakes
import numpy as np
import picture_files
import pytest
import tifffile
from command_results import require_refused, train, train_on_folder
from PIL import Image

MASK = fakes.image_and_mask(0, 3)[1]  # (48, 64), labels 0..2
COLOURED = np.array(fakes.COLOURS, dtype=np.uint8)[MASK]
NAMED = "ground: [0, 0, 0]\nthing: [255, 0, 0]\nother: [0, 128, 255]\n"


def labels(values, dtype=np.uint8):
    mask = MASK.astype(dtype)
    mask[:4, :4] = values
    return mask


def grey(values, dtype=np.uint8):
    return lambda path: Image.fromarray(labels(values, dtype)).save(path, format="PNG")


def array(content, **settings):
    return lambda path: np.save(path.with_suffix(".npy"), content, **settings) or path.unlink(missing_ok=True)


def coloured(path):
    Image.fromarray(COLOURED).save(path)


def coloured_with_alpha(path):
    Image.fromarray(np.dstack([COLOURED, np.full(MASK.shape, 255, np.uint8)])).save(path)


def unknown_colour(path):
    changed = COLOURED.copy()
    changed[5, 7] = (9, 9, 9)
    Image.fromarray(changed).save(path)


def int32(path):
    tifffile.imwrite(path.with_suffix(".tif"), MASK.astype(np.int32))
    path.unlink(missing_ok=True)


class Marked:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path(self.path).touch, ()


# The mask of one val image in a folder whose classes are inferred, or named by `classes.yaml`.
ACCEPTED = {
    "61 palette": (lambda path: fakes.mask_file(MASK, "palette").save(path), None),
    "62 grey labels": (grey(0), None),
    "63 16-bit labels": (grey(2, np.uint16), None),
    "64 int32 tiff": (int32, None),
    "65 known colours": (coloured, NAMED),
    "67 colours without a table": (coloured, None),  # inferred and shown, as labels are
    "68 known colours with alpha": (coloured_with_alpha, NAMED),
    "72 255 is ignored": (grey(255), None),
    "73 all ignored": (lambda path: Image.new("L", (64, 48), 255).save(path), None),
    "74 all background": (lambda path: Image.new("L", (64, 48), 0).save(path), None),
    "81 booleans": (lambda path: Image.fromarray(MASK > 0).save(path), None),
    "83 float array of integers": (array(labels(0, np.float32)), None),
    "83 int64 array": (array(labels(0, np.int64)), None),
}
REFUSED = {
    "66 unknown colour": (unknown_colour, NAMED, "has colour (9, 9, 9) at row 5, column 7"),
    "69 jpeg": (lambda path: Image.fromarray(MASK).save(path, format="JPEG"), None, "is JPEG, which changes labels"),
    "71 label 254": (grey(254), "a: 0\nb: 1\nc: 2\n", "has label 254; the classes have labels 0..2"),
    "72 label 255 where 250 is ignored": (grey(255), "a: 0\nb: 1\nc: 2\nignore: 250\n", "has label 255"),
    "75 smaller": (lambda path: Image.fromarray(MASK[:24, :32]).save(path), None, "is 24x32 and its image"),
    "76 transposed": (lambda path: Image.fromarray(MASK.T.copy()).save(path), None, "is 64x48 and its image"),
    "77 one pixel off": (lambda path: Image.fromarray(MASK[:, 1:].copy()).save(path), None, "is 48x63 and its image"),
    "78 empty": (picture_files.written(b""), None, "is not an image"),
    "79 missing": (lambda path: path.unlink(), None, "has no mask"),
    "80 text": (picture_files.written(b"labels"), None, "is not an image"),
    "83 float array": (array(labels(0.5, np.float32)), None, "holds float32, with 0.5 at row"),
    "83 array with NaN": (array(labels(np.nan, np.float64)), None, "holds float64, with nan at row"),
}


def with_mask(place, make, classes, masks="colours"):
    kind = "colours" if make in (coloured, coloured_with_alpha, unknown_colour) else "labels"
    fakes.folder(place / "mine", kind, layout="lists")
    path = place / "mine" / "masks" / "val_0.png"
    make(path)
    if classes:
        (place / "mine" / "classes.yaml").write_text(classes)


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_valid_mask_is_used_for_training_and_scores(tmp_path, commands, name):
    with_mask(tmp_path, *ACCEPTED[name])
    done = train_on_folder(commands, tmp_path)
    assert done.code == 0, done.err
    assert "  3: " in done.out or "3: " in done.out.partition("classes:")[2]
    assert "nan" not in (tmp_path / "run" / "metrics.csv").read_text().lower()


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_mask_is_named_before_the_first_step(tmp_path, commands, name):
    make, classes, words = REFUSED[name]
    with_mask(tmp_path, make, classes)
    done = train_on_folder(commands, tmp_path)
    require_refused(done, tmp_path, words)
    assert "val_0" in done.error_message or name.startswith("72")  # there, the first mask is already refused


def test_an_array_of_pickles_is_refused_and_runs_no_code(tmp_path, commands):
    marker = tmp_path / "marker"
    array(np.array([Marked(str(marker))], dtype=object))(tmp_path / "x.png")
    np.load(tmp_path / "x.npy", allow_pickle=True)
    assert marker.exists(), "the payload must run in an unsafe load, otherwise this test proves nothing"
    marker.unlink()
    fakes.folder(tmp_path / "mine", layout="lists")
    (tmp_path / "mine" / "masks" / "val_0.png").unlink()
    shutil.copy(tmp_path / "x.npy", tmp_path / "mine" / "masks" / "val_0.npy")
    require_refused(train_on_folder(commands, tmp_path), tmp_path, "val_0.npy holds object")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("70 label of the number of classes", "has label 12; the classes have labels 0..10 and 11 for ignored pixels"),
        ("82 binary mask of a named set", "has label 255; the classes have labels 0..10 and 11 for ignored pixels"),
    ],
)
def test_a_label_unknown_to_a_published_data_set_is_named(tmp_path, commands, name, message):
    fakes.camvid(tmp_path / "camvid")
    mask = np.full((48, 64), 12 if name.startswith("70") else 255, np.uint8)
    Image.fromarray(mask).save(tmp_path / "camvid" / "valannot" / "val_000.png")
    done = train(commands, tmp_path, "dataset=camvid", "dataset.root=camvid")
    require_refused(done, tmp_path, message)
    assert "val_000.png" in done.error_message


def test_masks_of_0_and_255_are_two_classes_which_are_shown_before_training(tmp_path, commands):
    fakes.folder(tmp_path / "mine", "binary", layout="lists")
    done = train_on_folder(commands, tmp_path)
    assert done.code == 0, done.err
    assert "2: background, foreground" in done.out
    assert done.out.index("foreground") < done.out.index("network:")


def test_a_class_without_pixels_is_named_in_the_table(tmp_path, commands):
    fakes.folder(tmp_path / "mine", layout="lists")
    (tmp_path / "mine" / "classes.yaml").write_text("[a, b, c, ghost]")
    done = train_on_folder(commands, tmp_path, "dataset.absent_classes=allow")
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.strip().startswith("ghost"))
    assert line.endswith("<- no pixel in this split")


def test_a_split_of_ignored_pixels_only_is_refused_and_leaves_no_run_folder(tmp_path, commands):
    fakes.folder(tmp_path / "mine", layout="lists")
    (tmp_path / "mine" / "classes.yaml").write_text("[a, b, c]")
    for mask in (tmp_path / "mine" / "masks").glob("val_*"):
        Image.new("L", (64, 48), 255).save(mask)
    done = train_on_folder(commands, tmp_path)
    require_refused(done, tmp_path, "val: every pixel of its 4 masks is ignored, so there is nothing to score")
    assert not (tmp_path / "run").exists()


# Lists and data sets


def lists(**texts):
    def make(mine):
        for name, text in texts.items():
            (mine / f"{name}.txt").write_bytes(text.encode())

    return make


def case_clash(mine):
    for sub in ("images", "masks"):
        shutil.copy(mine / sub / "val_0.png", mine / sub / "VAL_0.png")


LISTS = {
    "87 empty train": (lists(train=""), "train.txt lists no image"),
    "88 empty val": (lists(val="\n \n"), "val.txt lists no image"),
    "90 listed twice": (lists(train="train_0\ntrain_1\ntrain_0\n"), "train.txt, line 3: 'train_0' is listed twice"),
    "91 in train and val": (lists(val="val_0\ntrain_1\n"), "train_1.png is in train and in val"),
    "92 names that differ in case": (case_clash, "differ only in upper and lower case"),
    "93 fewer images than a batch": (lists(train="train_0\n"), "the train split has 1 images, fewer than one batch"),
    "not text": (lambda mine: (mine / "val.txt").write_bytes(b"\xff\xfe\0v"), "val.txt is not UTF-8 text"),
}


@pytest.mark.parametrize("name", LISTS)
def test_an_invalid_list_is_named(tmp_path, commands, name):
    make, words = LISTS[name]
    fakes.folder(tmp_path / "mine", layout="lists")
    make(tmp_path / "mine")
    require_refused(train_on_folder(commands, tmp_path), tmp_path, words)


def test_lists_can_have_blank_lines_crlf_and_a_byte_order_mark_and_a_last_batch_of_one(tmp_path, commands):
    fakes.folder(tmp_path / "mine", layout="lists")
    lists(train="\ufefftrain_0\r\n\r\ntrain_1\r\ntrain_2", val="\r\nval_0\r\n\r\n")(tmp_path / "mine")
    done = train_on_folder(commands, tmp_path)
    assert done.code == 0, done.err
    assert "3 train, 1 val images" in done.out
    assert "1 epoch, 1 step of" in done.out  # the incomplete last batch of one image is dropped


ROOTS = {
    "95 a folder": (("dataset=empty",), "for your own images and masks in it, dataset=folder dataset.root=empty"),
    "95 unknown data set": (("dataset=camvit",), "unknown dataset 'camvit' - did you mean 'camvid'?"),
    "96 missing root": (("dataset=folder", "dataset.root=nope"), "nope is not a folder; it should hold images/"),
    "96 no root": (("dataset=folder",), "dataset.root: missing mandatory value"),
    "96 empty root": (("dataset=folder", "dataset.root=empty"), "empty/images is not a folder"),
    "96 root is an address": (
        ("dataset=folder", "dataset.root=s3://b/own"),
        "only dataset=shards reads from addresses",
    ),
    "96 root is a file": (("dataset=camvid", "dataset.root=file"), "file is not a folder; it should hold train.txt"),
    "97 half of camvid": (("dataset=camvid", "dataset.root=half"), "half/train/train_002.png is missing"),
    "97 half of voc": (("dataset=voc", "dataset.root=halfvoc"), "2007_000002.png is missing"),
}


@pytest.mark.parametrize("name", ROOTS)
def test_a_missing_or_incomplete_data_set_is_named_with_the_expected_files(tmp_path, commands, name):
    words, message = ROOTS[name]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    fakes.camvid(tmp_path / "half")
    (tmp_path / "half" / "train" / "train_002.png").unlink()
    fakes.voc(tmp_path / "halfvoc")
    (tmp_path / "halfvoc" / "SegmentationClass" / "2007_000002.png").unlink()
    require_refused(train(commands, tmp_path, *words), tmp_path, message)


@pytest.mark.parametrize("kind", ["classes", "table"])
@pytest.mark.parametrize(
    "content",
    [
        "!!python/object/apply:os.system ['touch marker']",
        "!!python/object/new:os.system ['touch marker']",
        "a: !!python/object/apply:builtins.open [marker, w]",
        "a: &a [*a]",
        "a: [b\n",
        "\x00\x01",
        "- a\n- b\n---\n- c\n",
        "{a: 0, b: 0}",
        "{a: 0, b: -1}",
        "{a: 0, b: 1.5}",
        "{a: 0, b: true}",
        "{a: 0}",
        "[]",
        "",
        "3",
        "{? [x] : 0, b: 1}",
    ],
)
def test_an_invalid_class_table_is_named_and_runs_no_code(tmp_path, commands, kind, content):
    fakes.folder(tmp_path / "mine", layout="lists")
    path = tmp_path / ("mine/classes.yaml" if kind == "classes" else "table.yaml")
    path.write_text(content)
    words = () if kind == "classes" else ("dataset.classes=table.yaml",)
    done = commands("inspect_data", "dataset=folder", "dataset.root=mine", *words, cwd=tmp_path)
    assert done.code == 2, done.out + done.err
    assert " - " in done.error_message
    assert not list(tmp_path.rglob("marker"))
