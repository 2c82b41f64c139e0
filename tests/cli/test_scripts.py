"""The whole workflow with the real commands in fresh processes."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
import yaml
from fresh_commands import SLIM, command, iou_by_hand
from PIL import Image

from segdeconv.classes import Classes
from segdeconv.data.datasets.folder import Folder
from segdeconv.evaluation.boundary import Boundaries

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network trained by train.py on a folder of JPEG images and RGB-coloured PNG masks."""
    place = tmp_path_factory.mktemp("road")
    fakes.folder(place / "mine", "colours", layout="plain", image_suffix=".jpg", mask_ending="_mask")
    done = command(
        "train", "dataset=folder", "dataset.root=mine", "dataset.size=[32,40]", *SLIM, "hydra.run.dir=run", cwd=place
    )
    return place, done.stdout


def test_training_shows_the_colour_table_before_it_starts(trained):
    _, shown = trained
    header = shown.index("network:")
    for line in ("#ff0000", "colour_", "share"):
        assert 0 <= shown.index(line) < header


def test_the_checkpoint_alone_gives_the_scores_of_training(trained, tmp_path):
    place, _ = trained
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for name in ("best.ckpt", "best.ckpt.sha256"):
        (copy / name).write_bytes((place / "run" / name).read_bytes())
    root = f"dataset.root={place / 'mine'}"
    command("evaluate", copy / "best.ckpt", "--out", "out", "--masks", "masks", root, cwd=copy)
    report = json.loads((copy / "out" / "report.json").read_text())
    after_training = json.loads((place / "run" / "report.json").read_text())
    assert report["miou"] == pytest.approx(after_training["miou"], abs=1e-6)

    val = Folder("val", str(place / "mine"))
    truths = [val[index].mask for index in range(len(val))]
    masks = [np.array(fakes.opened(copy / "masks" / f"{name}.png")) for name in val.names]
    ious = iou_by_hand(truths, masks, len(val.classes), 255)
    assert [entry["iou"] for entry in report["classes"]] == pytest.approx(ious, abs=1e-6)
    assert report["miou"] == pytest.approx(np.mean([iou for iou in ious if iou is not None]), abs=1e-6)
    right = sum(int((truth == mask).sum()) for truth, mask in zip(truths, masks, strict=True))
    total = sum(int((truth != 255).sum()) for truth in truths)
    assert report["pixel_accuracy"] == pytest.approx(right / total, abs=1e-6)
    assert (report["num_images"], report["num_pixels"]) == (len(val), total)
    outlines = Boundaries(len(val.classes), 255)
    for truth, mask in zip(truths, masks, strict=True):
        outlines.update(mask, truth)
    assert report["boundary_f1"] == after_training["boundary_f1"] == pytest.approx(outlines.compute().f1, abs=1e-9)
    assert np.array(report["confusion"]).sum() == total


def test_predict_writes_palette_masks_of_the_inputs_size_and_skips_a_bad_file(trained, tmp_path):
    place, _ = trained
    photos = tmp_path / "photos"
    sizes = {"a": (37, 61), "deep/b": (1, 1), "deep/c": (200, 90)}
    for name, (height, width) in sizes.items():
        path = photos / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)
    (photos / "bad.jpg").write_text("no picture")
    done = command("predict", place / "run" / "best.ckpt", photos, "--out", "out", cwd=tmp_path, code=2)
    assert "skipped: " in done.stdout
    assert "bad.jpg is not an image" in done.stdout
    assert "1 of 4 files could not be read" in done.stderr
    classes = Folder("val", str(place / "mine")).classes
    for name, (height, width) in sizes.items():
        mask = fakes.opened(tmp_path / "out" / f"{name}.png")
        assert mask.mode == "P"
        assert mask.size == (width, height)
        assert np.array(mask).max() < len(classes)
        assert tuple(mask.getpalette()[:3]) == classes.colours[0]
        assert fakes.opened(tmp_path / "out" / f"{name}_overlay.png").mode == "RGB"


def test_evaluate_at_several_scales_counts_what_predict_writes(trained, tmp_path, commands):
    place, _ = trained
    best, options = place / "run" / "best.ckpt", ("--scales", "0.75,1.25", "--flip")
    done = commands("evaluate", best, *options, "--out", tmp_path / "there", "--masks", tmp_path / "counted", cwd=place)
    assert done.code == 0, done.err
    val = Folder("val", str(place / "mine"))
    files = [val.image_files[place] for place in range(len(val))]
    assert commands("predict", best, *files, *options, "--out", tmp_path / "predicted", cwd=place).code == 0
    truths, masks = [], []
    for index, name in enumerate(val.names):
        truths.append(np.asarray(val[index].mask))
        masks.append(np.array(fakes.opened(tmp_path / "counted" / f"{name}.png")))
        assert np.array_equal(masks[-1], np.array(fakes.opened(tmp_path / "predicted" / f"{files[index].stem}.png")))
    ious = iou_by_hand(truths, masks, len(val.classes), 255)
    report = json.loads((tmp_path / "there" / "report.json").read_text())
    assert [entry["iou"] for entry in report["classes"]] == pytest.approx(ious, abs=1e-6)
    done = commands("evaluate", best, "--scales", "1,x", cwd=place)
    assert "--scales=1,x: expected numbers" in done.error_message
    done = commands("evaluate", best, "--scales", "1,2", "--crf", cwd=place)
    assert "leave out --scales" in done.error_message


def test_predict_accepts_patterns_and_writes_the_mask_in_the_files_orientation(trained, tmp_path, commands):
    place, _ = trained
    image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    done = commands("predict", place / "run" / "best.ckpt", "*.jpg", "--out", "out", "--flip", cwd=tmp_path)
    assert done.code == 0, done.err
    assert fakes.opened(tmp_path / "out" / "turned.png").size == (30, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.jpg",), "nothing.jpg not found - give images, folders, or a quoted pattern"),
        (("one/x.png", "two/x.png"), "have the same output file out/x.png"),
        (("one", "--out", "one"), "is the folder of the input images"),
        (("empty",), "empty contains no images"),
        (("dataset.size=[8,8]",), "no images given"),
    ],
)
def test_predict_refuses_bad_arguments(trained, tmp_path, commands, arguments, message):
    place, _ = trained
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / folder / "x.png")
    (tmp_path / "empty").mkdir()
    out = () if "--out" in arguments else ("--out", "out")
    done = commands("predict", place / "run" / "best.ckpt", *arguments, *out, cwd=tmp_path)
    assert done.code == 2
    assert message in done.error_message


def test_inspect_prints_classes_and_names_every_bad_file(tmp_path, commands):
    fakes.camvid(tmp_path / "good")
    done = command("inspect_data", "dataset=camvid", "dataset.root=good", "dataset.size=null", cwd=tmp_path)
    assert "Fit to train: nothing conspicuous was found." in done.stdout
    assert "sign_symbol" in done.stdout
    masks = sorted((tmp_path / "good" / "trainannot").glob("*.png"))
    Image.fromarray(np.full((48, 64), 77, np.uint8)).save(masks[0])
    Image.fromarray(np.zeros((48, 63), np.uint8)).save(masks[1])
    done = commands("inspect_data", "dataset=camvid", "dataset.root=good", cwd=tmp_path)
    assert done.code == 2
    assert f"{masks[0].name} has label 77; the classes have labels 0..10 and 11 for ignored pixels" in done.out
    assert f"{masks[1].name} is 48x63 and its image" in done.out
    assert "camvid has 2 problems" in done.error_message


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, commands):
    done = commands("train", "model.widht=3", cwd=tmp_path)
    assert done.code == 2
    assert done.err.splitlines() == [
        "segdeconv: error: unknown key model.widht - did you mean 'width'? Available: depth, dropout, "
        "dropout_at, encoder_addition, encoder_concatenation, norm, packed_switches, pretrained, stages, "
        "switch_source, width"
    ]
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("config.yaml"))
    done = commands("train", "dataset=camvid", "dataset.root=/nope", cwd=tmp_path)
    assert done.code == 2
    assert "dataset.root=/nope is not a folder; it should hold train.txt" in done.error_message


def test_a_file_that_is_not_a_checkpoint_is_exit_code_4(tmp_path, commands):
    torch.save({"model": 3}, tmp_path / "other.ckpt")
    done = commands("evaluate", "other.ckpt", cwd=tmp_path)
    assert done.code == 4
    assert done.error_message.startswith("other.ckpt is not a segdeconv checkpoint")


def test_a_bad_mask_in_a_worker_is_still_one_line(tmp_path, commands):
    fakes.camvid(tmp_path / "camvid")
    mask = min((tmp_path / "camvid" / "valannot").glob("*.png"))
    arguments = ("dataset=camvid", "dataset.root=camvid", "dataset.size=[32,32]", *SLIM[:3], "hydra.run.dir=run")
    assert commands("train", *arguments, "dataset.num_workers=1", cwd=tmp_path).code == 0
    Image.fromarray(np.full((48, 64), 99, np.uint8)).save(mask)
    done = commands("evaluate", "run/best.ckpt", cwd=tmp_path)
    assert done.code == 2
    assert f"{mask.name} has label 99" in done.error_message


def test_a_class_table_is_restored_from_a_checkpoint():
    classes = Classes(("a", "b"), ((1, 2, 3), (4, 5, 6)), 255, (0, 255), (9, 9, 9))
    assert Classes.from_dict(json.loads(json.dumps(classes.to_dict()))) == classes


def test_a_sweep_gives_every_job_its_own_folder(tmp_path, commands):
    words = ("--multirun", "seed=1,2", "dataset.num_train=4", "dataset.num_val=2", *SLIM)
    done = commands("train", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    configs = sorted(tmp_path.glob("runs/multirun/*/*/config.yaml"))
    assert [yaml.safe_load(path.read_text())["seed"] for path in configs] == [1, 2]
    scores = [json.loads((path.parent / "report.json").read_text())["miou"] for path in configs]
    for number, score in enumerate(scores):
        folder = configs[number].parent.relative_to(tmp_path)
        assert f"job {number}: seed={number + 1} - val/miou {score:.4f}  {folder}\n" in done.out
    (summary,) = tmp_path.glob("runs/multirun/*/summary.csv")
    *_, mean, deviation = summary.read_text().splitlines()[1].split(",")
    assert [float(mean), float(deviation)] == pytest.approx([np.mean(scores), np.std(scores, ddof=1)], abs=1e-6)


@pytest.mark.slow
def test_a_run_stopped_by_a_signal_resumes_with_resume_auto(tmp_path):
    words = [sys.executable, str(ROOT / "scripts" / "train.py"), "dataset.num_train=200", "dataset.num_val=2", *SLIM]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.rglob("last.ckpt")) and process.poll() is None:  # one of two epochs is done
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
    assert process.returncode == 143, err
    assert re.search(r"segdeconv: error: stopped by SIGTERM at step \d+, saved in runs/.*last.ckpt - resume with", err)
    done = command("train", *words[2:], "resume=auto", cwd=tmp_path)
    assert "resumed from last.ckpt" in done.stdout
    assert len(list(tmp_path.glob("runs/*/*"))) == 1
    assert list(tmp_path.glob("runs/*/*/report.json"))


@pytest.mark.slow
def test_the_demo_reaches_the_score_in_the_readme(tmp_path):
    command("train", "experiment=demo", "hydra.run.dir=demo", cwd=tmp_path)
    assert json.loads((tmp_path / "demo" / "report.json").read_text())["miou"] >= 0.85
