"""The user's own data: folds and groups, classes merged and ignored by name, and any channels from file to mask."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import yaml
from fresh_commands import iou_by_hand
from PIL import Image
from real_data import PIXEL_COUNTS, REAL_CAMVID, needs_camvid

from segdeconv.checkpoints import checkpoint
from segdeconv.data import CamVid, Folder, SegmentationDataset, Shapes
from segdeconv.data.inspection import inspect, overlaps
from segdeconv.data.module import build_split, check_dataset
from segdeconv.data.relabelled import Relabelled, describe
from segdeconv.data.splits import choose_val, group
from segdeconv.errors import UsageError
from segdeconv.evaluation.evaluate import restore_dataset
from segdeconv.train import train
from segdeconv.training.config_check import check_config
from segdeconv.training.prepare import prepare


def raises(message: str) -> Any:
    return pytest.raises(UsageError, match=message)


# Folds and groups


def folds_of(names: list[str], count: int, pattern: str | None = None, seed: int = 0) -> list[set[str]]:
    return [choose_val(names, 0.2, count, fold, pattern=pattern, seed=seed)[0] for fold in range(count)]


@pytest.mark.parametrize("num", [2, 3, 10, 23])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_image_is_val_in_exactly_one_fold_and_folds_are_of_equal_size(num: int, count: int) -> None:
    names = [f"image_{index}" for index in range(num)]
    if count > num:
        with raises(f"dataset.folds={count} is larger than the number of images or groups, {num} - set at most {num}"):
            folds_of(names, count)
        return
    parts = folds_of(names, count)
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == folds_of(names[::-1], count)
    assert num < 10 or parts != folds_of(names, count, seed=1)


@pytest.mark.parametrize("seed", range(8))
def test_groups_stay_together_in_folds_of_about_equal_size(seed: int) -> None:
    random = np.random.default_rng(seed)
    names = [f"p{patient}/{index}" for patient in range(9) for index in range(random.integers(1, 12))]
    for count in (2, 3, 5):
        parts = folds_of(names, count, r"^(p\d+)/", seed)
        assert sorted(name for part in parts for name in part) == sorted(names)
        owners = [{name.split("/")[0] for name in part} for part in parts]
        assert sum(map(len, owners)) == 9
        # The greedy split makes no fold larger than the smallest by more than one group.
        largest = max(len(members) for members in group(names, "^(p.)").values())
        assert max(map(len, parts)) - min(map(len, parts)) <= largest
        assert parts == folds_of(names[::-1], count, r"^(p\d+)/", seed)


@pytest.mark.parametrize("seed", range(8))
def test_a_fraction_takes_whole_groups_and_leaves_some_to_train(seed: int) -> None:
    random = np.random.default_rng(seed)
    names = [f"p{patient}/{index}" for patient in range(7) for index in range(random.integers(1, 12))]
    for part in (0.05, 0.3, 0.95):
        val, _ = choose_val(names, part, None, 0, pattern="^(p.)", seed=seed)
        train = set(names) - val
        assert {name[:2] for name in val}.isdisjoint(name[:2] for name in train)
        assert val
        assert train
        largest = max(len(members) for members in group(names, "^(p.)").values())
        assert abs(len(val) - part * len(names)) <= largest


def test_without_groups_the_val_images_are_those_of_older_versions(tmp_path: Path) -> None:
    """Older checkpoints must be evaluated on the val images that they were not trained on."""
    names = [f"image_{index}" for index in range(20)]
    val, notes = choose_val(names, 0.2, None, 0, pattern=None, seed=0)
    assert sorted(val) == ["image_0", "image_1", "image_10", "image_11"]
    assert notes == ()


def test_folds_of_a_folder_are_its_splits(tmp_path: Path) -> None:
    root = str(fakes.two_channels(tmp_path))
    val_names: list[str] = []
    for fold in range(3):
        train, val = (Folder(split, root, folds=3, fold=fold, group="^(site.)_") for split in ("train", "val"))
        assert sorted(train.names + val.names) == sorted(path.stem for path in (tmp_path / "masks").iterdir())
        assert {name[:5] for name in train.names}.isdisjoint(name[:5] for name in val.names)
        assert train.notes == (
            f"val: fold {fold} of 3, drawn with dataset.split_seed=0; 5 groups by '^(site.)_', none of them in both",
        )
        val_names += val.names
    assert len(val_names) == len(set(val_names)) == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"folds": 5, "fold": 5},
            r"dataset\.fold=5 is out of range for dataset\.folds=5; folds are numbered from 0 - set 0\.\.4",
        ),
        ({"fold": 1}, r"dataset\.fold=1 needs the number of folds - set dataset\.folds too"),
        ({"folds": 9}, r"dataset\.folds=9 is larger than the number of images or groups, 8 - set at most 8"),
        ({"folds": 3, "group": "^(train|val)"}, r"dataset\.folds=3 is larger than .*, 2 - set at most 2"),
        (
            {"group": "train"},
            r"dataset\.group=train has no parentheses - put the part that identifies a group in parentheses",
        ),
        ({"group": "(train)"}, r"dataset\.group=\(train\) does not match the image name 'val_0' - put"),
        ({"group": "(x)?_"}, r"does not match the image name 'train_0' - put"),
        ({"group": "("}, r"dataset\.group=\( is not a regular expression \(.*\) - put"),
        ({"group": "(_)"}, r"all images are in one group, \['_'\] - train and val need at least one each"),
    ],
)
def test_invalid_folds_and_groups_are_refused(tmp_path: Path, settings: Any, message: str) -> None:
    with raises(message):
        Folder("train", str(fakes.folder(tmp_path)), **settings)


@pytest.mark.parametrize("layout", ["lists", "subfolders"])
def test_given_splits_are_not_split_again_but_checked_against_the_groups(tmp_path: Path, layout: str) -> None:
    root = str(fakes.folder(tmp_path, layout=layout))
    with raises(
        r"dataset\.folds=2 has no effect, since .* defines its own train and val - leave out dataset\.folds and"
    ):
        Folder("train", root, folds=2)
    assert len(Folder("train", root, group="^(train|val)")) == fakes.NUM
    with raises(r"'0' \(dataset\.group=_\(\[0-9\]\)\) is in train and in val, .* - put all its images into one"):
        Folder("train", root, group="_([0-9])")


# Classes by name

MAP = {"road": "drivable", "pavement": "drivable", "sky": "ignore", "tree": "nature"}
NEW_NAMES = ("building", "pole", "drivable", "nature", "sign_symbol", "fence", "car", "pedestrian", "bicyclist")


def camvid_view(root: Path, split: str = "train", **settings: Any) -> SegmentationDataset:
    node = {"_target_": "segdeconv.data.CamVid", "root": str(root), "label_map": MAP, **settings}
    return build_split(check_dataset(node), split)


def test_classes_are_merged_renamed_and_ignored_pixel_by_pixel(tmp_path: Path) -> None:
    view, plain = camvid_view(fakes.camvid(tmp_path)), CamVid("train", str(tmp_path))
    assert view.classes.names == NEW_NAMES
    assert view.classes.ignore_index == 11
    old = plain.classes
    colour = dict(zip(old.names, old.colours, strict=True))
    assert view.classes.colours[:4] == (colour["building"], colour["pole"], colour["road"], colour["tree"])
    # Classes: sky building pole road pavement tree sign_symbol fence car pedestrian bicyclist void
    table = [11, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 11]
    for index in range(len(plain)):
        image, mask, name = plain[index]
        sample = view[index]
        np.testing.assert_array_equal(sample.image, image)
        assert sample.name == name
        assert sample.mask.dtype == np.uint8
        assert sample.mask.tolist() == [[table[label] for label in row] for row in mask.tolist()]


@needs_camvid
def test_the_merged_classes_of_the_real_camvid_have_the_sums_of_their_members() -> None:
    sky, building, pole, road, pavement, tree, *others, void = PIXEL_COUNTS["val"]
    inspection = inspect(camvid_view(REAL_CAMVID, "val"), use_cache=False)
    assert inspection.pixels == [building, pole, road + pavement, tree, *others, sky + void]


def test_a_relabelled_data_set_is_inspected_separately_and_keeps_files_kind_and_overlaps(tmp_path: Path) -> None:
    root = fakes.folder(tmp_path, layout="lists")
    (root / "val.txt").write_text("val_0\ntrain_2\n")
    plain = [Folder(split, str(root)) for split in ("train", "val")]
    views = [Relabelled(dataset, {"class_1": "class_0"}) for dataset in plain]
    assert views[0].split_names == ("train", "val")
    assert [view.kind for view in views] == ["Folder", "Folder"]
    assert len(overlaps(views)) == len(overlaps(plain)) == 1
    (old, new) = (inspect(dataset).pixels for dataset in (plain[0], views[0]))
    assert new == [old[0] + old[1], *old[2:]]
    assert views[0].stored_classes == plain[0].classes
    other = Relabelled(plain[0], {"class_2": "class_0"})
    assert len({plain[0].fingerprint, views[0].fingerprint, other.fingerprint}) == 3


def test_a_data_set_without_files_can_be_relabelled_too() -> None:
    view = Relabelled(Shapes("val", num_val=3), {"disc": "background", "ring": "ignore"})
    for index in range(3):
        old, new = Shapes("val", num_val=3)[index].mask, view[index].mask
        np.testing.assert_array_equal(new == 255, (old == 2) | (old == 255))
        np.testing.assert_array_equal(new == 0, old < 2)


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        ({"raod": "x"}, r"dataset\.label_map: unknown class 'raod' - did you mean 'road'\?"),
        ({"road": 3}, r"dataset\.label_map=.*: input should be a valid string"),
    ],
)
def test_an_invalid_label_map_is_refused(tmp_path: Path, label_map: Any, message: str) -> None:
    with raises(message):
        camvid_view(fakes.camvid(tmp_path), label_map=label_map)


def test_fewer_than_two_classes_left_are_refused(tmp_path: Path) -> None:
    data = Folder("train", str(fakes.folder(tmp_path)))
    for label_map in (dict.fromkeys(data.classes.names, "one"), {"class_0": "ignore", "class_1": "ignore"}):
        with raises(r"1 class\(es\) .*: a network needs at least two"):
            Relabelled(data, label_map)


def test_merged_classes_are_described_in_a_note() -> None:
    view = Relabelled(
        Shapes("val", num_val=1), {"ring": "round", "disc": "round", "cross": "plus", "checker": "ignore"}
    )
    assert view.notes == ("classes: disc, ring -> round; cross -> plus; checker -> ignored",)
    assert describe(Shapes("val").classes, {"disc": "disc"}) == ""


SLIM = {
    "model": {"_target_": "segdeconv.models.SegNet", "stages": [[4], [8]]},
    "trainer": {"max_epochs": 1},
    "augment": {},
}


def test_a_checkpoint_stores_the_label_map_and_the_inferred_classes(tmp_path: Path) -> None:
    root = fakes.folder(tmp_path / "data", num=6)
    label_map = {"class_2": "class_0"}
    dataset = {"_target_": "segdeconv.data.Folder", "root": str(root), "label_map": label_map}
    train({**SLIM, "dataset": {**dataset, "size": [32, 32], "num_workers": 0}}, tmp_path / "run")
    trained = checkpoint.read(tmp_path / "run" / "best.ckpt")
    assert trained.classes.names == ("class_0", "class_1")
    assert trained.config["dataset"]["classes"]["names"] == ["class_0", "class_1", "class_2"]
    # The classes are not inferred again: a new label in a mask is an error, not another class.
    restored = build_split(check_dataset(trained.config["dataset"]), "val")
    assert restored.classes == trained.classes
    assert set(np.unique(restored[0].mask)) <= {0, 1, 255}


HINT = "no file names these classes - to get one to edit: "


@pytest.mark.parametrize("kind", ["labels", "colours", "binary"])
def test_classes_without_names_come_with_the_commands_that_name_them(
    tmp_path: Path, commands: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    root = fakes.folder(tmp_path / "my data", kind)
    dataset = {"_target_": "segdeconv.data.Folder", "root": "my data", "size": [32, 32], "num_workers": 0}
    config = check_config({"dataset": dataset, "model": {"_target_": "segdeconv.models.SegNet", "stages": [[4]]}})
    prepare(config)
    output = capsys.readouterr().out
    if kind == "binary":  # background and foreground are names
        assert HINT not in output
        return
    _, _, typed = output.partition(HINT)
    _, script, *words = shlex.split(typed.splitlines()[0])
    done = commands(Path(script).stem, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    table = tmp_path / "inspection" / "classes.yaml"
    table.write_text(table.read_text().replace("class_1:", "tree:").replace("colour_", "shade "))
    subprocess.run(shlex.split(done.out.partition("name them there, then: ")[2].splitlines()[0]), check=True)
    assert Folder("train", str(root)).classes.names == prepare(config).classes.names
    assert {"tree", "shade 000000"} & set(Folder("train", str(root)).classes.names)
    assert HINT not in capsys.readouterr().out


# Channels, from file to mask


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, commands: Any) -> tuple[Path, str]:
    """Train a network with train.py on 16-bit TIFFs of two channels, neither of which suffices alone."""
    folder = tmp_path_factory.mktemp("channels")
    fakes.two_channels(folder / "tif")
    fakes.two_channels(folder / "npy", ".npy")
    settings = ("size=[48,64]", "crop=[48,48]", "channels=2", "batch_size=4", "num_workers=0", "group='^(site.)_'")
    done = commands(
        "train", "dataset=folder", "dataset.root=tif", *(f"dataset.{setting}" for setting in settings),
        "model.stages=[[16],[16]]", "trainer.max_epochs=12", "optimizer.lr=0.01", "augment=turns", "auto=[]",
        "hydra.run.dir=run", cwd=folder,
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder, done.out


@pytest.mark.slow
def test_a_network_learns_from_both_of_two_16_bit_channels(trained: tuple[Path, str]) -> None:
    folder, output = trained
    # A single channel determines at most half of the pixels, which is a mean IoU of at most a third.
    assert json.loads((folder / "run" / "report.json").read_text())["miou"] > 0.8
    assert "2 channel(s) of 16 bit, mean 2" in output
    assert "5 groups by '^(site.)_', none of them in both" in output
    facts = checkpoint.read(folder / "run" / "best.ckpt").facts["preprocessing"]
    assert (len(facts["mean"]), facts["bits"], facts["as_stored"]) == (2, 16, True)
    train_split = Folder("train", str(folder / "tif"), channels=2, group="^(site.)_")
    pixels = np.concatenate([train_split[index].image.reshape(-1, 2) for index in range(len(train_split))])
    assert facts["mean"] == pytest.approx(pixels.mean(axis=0), rel=1e-5)
    assert facts["std"] == pytest.approx(pixels.std(axis=0), rel=1e-5)


def white_pictures(page: Path) -> int:
    """Return the number of pictures on a page of which nearly all pixels are white."""
    contents = re.findall(r"data:image/webp;base64,([^\"')]+)", page.read_text())
    pictures = [np.array(Image.open(io.BytesIO(base64.b64decode(content))).convert("L")) for content in contents]
    return sum((picture > 250).mean() > 0.9 for picture in pictures)


def test_a_window_is_for_display_only(trained: tuple[Path, str], tmp_path: Path, commands: Any) -> None:
    folder, _ = trained
    image = next((folder / "npy" / "images").glob("*.npy"))
    written = {}
    for number, words in enumerate(((), ("--window=-10,0.5",), ("--window=0,65535",))):
        done = commands("predict", folder / "run", image, *words, "--out", f"{number}", cwd=tmp_path)
        assert done.code == 0, done.err
        written[number] = [(tmp_path / f"{number}" / f"{image.stem}{end}.png").read_bytes() for end in ("", "_overlay")]
    assert len({mask for mask, _ in written.values()}) == 1
    assert len({overlay for _, overlay in written.values()}) == 3
    done = commands("predict", folder / "run", image, "--window=0,65536", "--out", "x", cwd=tmp_path)
    assert done.error_message.startswith(
        "--window=0,65536 is outside the values 0 to 65535 of images that are read as 16"
    )
    settings = ("dataset=folder", f"dataset.root={folder / 'npy'}", "dataset.channels=2", "dataset.group='^(site.)_'")
    for words in ((), ("--window=-10,0.5",)):
        assert commands("inspect_data", *settings, *words, cwd=tmp_path).code == 0
        assert bool(white_pictures(tmp_path / "inspection" / "inspect.html")) == bool(words)


def test_a_checkpoint_alone_suffices_to_read_two_channels_from_tiff_and_npy(
    trained: tuple[Path, str], tmp_path: Path, commands: Any
) -> None:
    folder, _ = trained
    for name in ("best.ckpt", "best.ckpt.sha256"):
        (tmp_path / name).write_bytes((folder / "run" / name).read_bytes())
    root = f"dataset.root={folder / 'npy'}"
    arguments = ("--out", "out", "--masks", "masks", "--pictures", "pictures", "--window=-10,0.5", root)
    assert commands("evaluate", "best.ckpt", *arguments, cwd=tmp_path).code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["miou"] == json.loads((folder / "run" / "report.json").read_text())["miou"]
    val = Folder("val", str(folder / "npy"), channels=2, group="^(site.)_")
    masks = [np.array(fakes.opened(tmp_path / "masks" / f"{name}.png")) for name in val.names]
    ious = iou_by_hand([val[index].mask for index in range(len(val))], masks, 3, 255)
    assert [entry["iou"] for entry in report["classes"]] == pytest.approx(ious, abs=1e-6)

    panel = np.array(fakes.opened(tmp_path / "pictures" / f"{val.names[0]}.png"))[:48, :64]
    assert np.array_equal(panel == 255, val[0].image[:, :, [0, 1, 1]] > 0)  # in this window, 1 and more are white
    assert white_pictures(tmp_path / "out" / "report.html")

    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "photo.png")
    fakes.stored(tmp_path / "dark.npy", np.zeros((20, 20, 2), np.uint8))
    paths = (folder / "tif" / "images", "photo.png", "dark.npy")
    done = commands("predict", "best.ckpt", *paths, "--out", "seen", cwd=tmp_path)
    assert done.code == 2
    for message in (
        "photo.png has 3 channels of 8 bit and dataset.channels is 2 - ",
        "dark.npy has 2 channel(s) of 8 bit, but the network needs 2 of 16 bit - ",
        "20 masks in seen",
    ):
        assert message in done.out
    for name, mask in zip(val.names, masks, strict=True):
        np.testing.assert_array_equal(np.array(fakes.opened(tmp_path / "seen" / f"{name}.png")), mask)
        assert fakes.opened(tmp_path / "seen" / f"{name}_overlay.png").mode == "RGB"


def test_a_number_of_channels_that_does_not_fit_the_network_is_refused(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    overrides = [f"dataset.root={folder / 'tif'}", "dataset.channels=3"]
    loaded = checkpoint.read(folder / "run" / "best.ckpt", overrides=overrides)
    with raises(r"was trained on images with 2 channel\(s\), but segdeconv\.data\.Folder has 3 - keep"):
        restore_dataset(loaded, "val")


def test_16_bit_grey_is_trained_on_as_stored(tmp_path: Path) -> None:
    """Converted to 8-bit RGB, the 4096 values of 12 bits in a 16-bit file would become 16."""
    root = fakes.folder(tmp_path / "data", num=8)
    for path in (root / "images").iterdir():
        grey = np.array(fakes.opened(path))[:, :, 0].astype(np.uint16)
        Image.fromarray(1000 + grey).save(path)
    dataset = {
        "_target_": "segdeconv.data.Folder",
        "root": str(root),
        "channels": 1,
        "size": [48, 64],
        "num_workers": 0,
    }
    config = {
        "dataset": dataset, "augment": {}, "model": {"_target_": "segdeconv.models.SegNet", "stages": [[8], [8]]},
        "optimizer": {"_target_": "segdeconv.optimization.adamw", "lr": 0.02}, "trainer": {"max_epochs": 8},
    }  # fmt: skip
    train(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "report.json").read_text())["miou"] > 0.7
    trained = checkpoint.read(tmp_path / "run" / "best.ckpt")
    assert trained.model().in_channels == 1
    preprocessing = trained.facts["preprocessing"]
    assert (preprocessing["bits"], 1000 < preprocessing["mean"][0] < 1255) == (16, True)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["dataset"]["mean"] is None  # it was not set, so a resumed run measures it again


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mean": [1, 2, 3]},
            r"dataset\.mean has 3 values, but the images have 2 channel\(s\) - give one value per channel",
        ),
        ({"std": [1.0]}, r"dataset\.std has 1 values, but the images have 2 channel\(s\)"),
        ({"channels": 1}, r"site0_.*\.tif has 2 channels of 16 bit and dataset\.channels is 1 - "),
        ({"channels": None}, r"site0_.*\.tif has 2 channels but is not a colour image - set dataset\.channels=2"),
    ],
)
def test_settings_that_do_not_fit_the_channels_are_refused_before_training(
    tmp_path: Path, settings: Any, message: str
) -> None:
    root = fakes.two_channels(tmp_path / "data", num=5)
    dataset = {"_target_": "segdeconv.data.Folder", "root": str(root), "channels": 2, "batch_size": 2, "num_workers": 0}
    with raises(message):
        train({**SLIM, "dataset": {**dataset, **settings}}, tmp_path / "run")


@pytest.mark.parametrize("kind", ["edited", "of another data set", "of a stranger", "binary"])
def test_inspect_data_keeps_a_table_of_classes_that_it_would_not_write(
    kind: str, tmp_path: Path, commands: Any
) -> None:
    fakes.folder(tmp_path / "mine", "labels")
    fakes.folder(tmp_path / "other", "binary")
    words = ("inspect_data", "dataset=folder", "dataset.root=mine", "--out", "ins")
    table = tmp_path / "ins" / "classes.yaml"
    if kind == "of another data set":
        assert commands(*words[:2], "dataset.root=other", *words[3:], cwd=tmp_path).code == 0
    elif kind == "of a stranger":
        table.parent.mkdir()
        table.write_text("[MINE]")
    else:
        for _ in range(2):  # the second writes the same
            done = commands(*words, cwd=tmp_path)
            assert (done.code, "name them there, then: mv ins/classes.yaml mine/" in done.out) == (0, True)
        table.write_bytes(table.read_bytes() + b"road: 77\n" if kind == "edited" else b"\xff")
    content = table.read_bytes()
    done = commands(*words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert table.read_bytes() == content
    assert f"classes: {Path('ins/classes.yaml')} exists and is kept" in done.out
    assert "name them there" not in done.out


@pytest.mark.parametrize("root", ["mine", "absent"])
def test_inspect_data_does_not_write_over_a_page_of_others(root: str, tmp_path: Path, commands: Any) -> None:
    fakes.folder(tmp_path / "mine", "labels")
    (tmp_path / "ins").mkdir()
    (tmp_path / "ins" / "inspect.html").write_text("MINE")
    done = commands("inspect_data", "dataset=folder", f"dataset.root={root}", "--out", "ins", cwd=tmp_path)
    assert done.code == 2
    message = "ins/inspect.html exists and was not written by segdeconv; it would be overwritten - choose another --out"
    assert message in done.error_message
    assert (tmp_path / "ins" / "inspect.html").read_text() == "MINE"
