"""Image files of every kind through the real commands: read correctly, or refused in one line before the first step."""

import subprocess
import sys
from pathlib import Path

import fakes
import numpy as np
import picture_files
import pytest
from PIL import Image

SLIM = (
    "model.stages=[[4],[8]]", "dataset.batch_size=2", "dataset.num_workers=0", "trainer.max_epochs=1",
    "trainer.precision=32-true", "logger=none", "auto=[]",
)  # fmt: skip


def mask_beside(image, masks):
    """Write a mask of an image's stored size, with three labels if it is large enough."""
    with Image.open(image) as stored:
        size = stored.size[::-1]
    labels = (np.arange(size[0] * size[1]) % 3).reshape(size).astype(np.uint8)
    Image.fromarray(labels).save(masks / f"{image.stem}.png")


def pairs(folder, makers):
    """Create a data folder with the given images in val and good images in train."""
    for sub in ("train/images", "train/masks", "val/images", "val/masks"):
        (folder / sub).mkdir(parents=True)
    for number in range(2):
        path = folder / "train" / "images" / f"train_{number}.png"
        picture_files.saved("PNG")(path)
        mask_beside(path, folder / "train" / "masks")
    for name, make in makers.items():
        make(folder / "val" / "images" / name)
        mask_beside(folder / "val" / "images" / name, folder / "val" / "masks")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, commands):
    """A network trained and validated on every good image at its own size."""
    place = tmp_path_factory.mktemp("pictures")
    pairs(place / "mine", picture_files.GOOD)
    for image in (place / "mine" / "val" / "images").iterdir():  # under other names: an image is in one split only
        copy = place / "mine" / "train" / "images" / f"{image.stem[:-1]}~{image.suffix}"
        copy.write_bytes(image.read_bytes())
        mask_beside(copy, place / "mine" / "train" / "masks")
    done = commands(
        "train", "dataset=folder", "dataset.root=mine", "dataset.size=null", "dataset.crop=[32,32]", *SLIM,
        "hydra.run.dir=run", cwd=place,
    )  # fmt: skip
    assert done.code == 0, done.err
    return place


@pytest.fixture(scope="module")
def predicted(trained, commands):
    photos = trained / "photos"
    photos.mkdir()
    for name, make in {**picture_files.GOOD, **picture_files.ORIENTED}.items():
        make(photos / name)
    done = commands("predict", "run/best.ckpt", "photos", "--out", "out", cwd=trained)
    assert done.code == 0, done.out + done.err
    return trained / "out"


@pytest.mark.parametrize("name", [*picture_files.GOOD, *picture_files.ORIENTED])
def test_a_readable_image_gets_a_mask_of_its_own_size(trained, predicted, name):
    with Image.open(trained / "photos" / name) as image:
        size = image.size
    mask = fakes.opened(predicted / f"{(trained / 'photos' / name).stem}.png")
    assert mask.mode == "P"
    assert mask.size == size  # as stored, also if the EXIF orientation was applied and reverted
    assert np.array(mask).max() < 3
    start = name.rpartition(".")[0][:40]
    assert [path for path in predicted.iterdir() if path.name.startswith(start) and "_overlay" in path.name]


@pytest.mark.parametrize("name", picture_files.ORIENTED)
def test_a_turned_image_is_used_for_training_only_if_the_config_says_how(tmp_path, commands, name):
    pairs(tmp_path / "mine", {name: picture_files.ORIENTED[name]})
    words = ("inspect_data", "dataset=folder", "dataset.root=mine")
    done = commands(*words, cwd=tmp_path)
    if name.endswith(" 1.jpg"):
        assert done.code == 0
        return
    assert done.code == 2
    assert f"{name} is stored rotated" in done.out
    assert "set dataset.exif=apply or dataset.exif=ignore" in done.out
    assert commands(*words, "dataset.exif=ignore", cwd=tmp_path).code == 0
    # The mask was drawn as stored, so applying the orientation to the image works if it keeps the size.
    applied = commands(*words, "dataset.exif=apply", cwd=tmp_path)
    assert applied.code == (0 if name[-5] in "234" else 2)


@pytest.mark.parametrize("name", picture_files.BAD)
def test_an_unreadable_image_ends_training_in_one_line_before_the_first_step(tmp_path, commands, name):
    make, words = picture_files.BAD[name]
    pairs(tmp_path / "mine", {"good.png": picture_files.saved("PNG")})
    make(tmp_path / "mine" / "val" / "images" / name)
    Image.fromarray(np.zeros(picture_files.SIZE, np.uint8)).save(
        tmp_path / "mine" / "val" / "masks" / f"{name.rpartition('.')[0]}.png"
    )
    done = commands(
        "train", "dataset=folder", "dataset.root=mine", "dataset.size=[32,32]", *SLIM, "hydra.run.dir=run",
        cwd=tmp_path, timeout=20,
    )  # fmt: skip
    assert done.code == 2, done.err
    assert f"{name} {words}" in done.error_message
    assert " - " in done.error_message.partition(words)[2] or " - " in words
    assert "network:" not in done.out
    assert not list((tmp_path / "run").glob("*.ckpt"))


@pytest.fixture(scope="module")
def skipped(trained, commands):
    photos = trained / "bad photos"
    photos.mkdir()
    for name, (make, _) in picture_files.BAD.items():
        make(photos / name)
    picture_files.saved("PNG")(photos / "z good.png")
    return commands("predict", "run/best.ckpt", "bad photos", "--out", "some", cwd=trained, timeout=30)


def test_prediction_continues_after_bad_files_and_exits_with_2(trained, skipped):
    assert skipped.code == 2
    count = len(picture_files.BAD)
    assert f"{count} of {count + 1} files could not be read, see the messages above" in skipped.error_message
    assert (trained / "some" / "z good.png").is_file()
    written = [".segdeconv-files", "predictions.jsonl", "statistics.csv", "z good.png", "z good_overlay.png"]
    assert sorted(path.name for path in (trained / "some").iterdir()) == written


@pytest.mark.parametrize("name", picture_files.BAD)
def test_prediction_prints_one_line_for_a_bad_file(skipped, name):
    lines = [line for line in skipped.out.splitlines() if f"/{name} " in line]
    assert len(lines) == 1
    assert lines[0].startswith("skipped: ")
    assert picture_files.BAD[name][1] in lines[0]


def test_a_file_without_read_permission_is_named(tmp_path, trained, commands):
    pairs(tmp_path / "mine", {"secret.png": picture_files.saved("PNG")})
    secret = tmp_path / "mine" / "val" / "images" / "secret.png"
    secret.chmod(0)
    words = ("dataset=folder", "dataset.root=mine", *SLIM, "hydra.run.dir=run")
    done = commands("train", *words, cwd=tmp_path, limits={"plain_user": True})
    assert done.code == 2
    assert "secret.png cannot be read: permission denied - " in done.error_message
    words = (trained / "run" / "best.ckpt", secret, "--out", "out")
    done = commands("predict", *words, cwd=tmp_path, limits={"plain_user": True})
    assert done.code == 2
    assert "secret.png cannot be read: permission denied - " in done.out


@pytest.mark.parametrize("entry", ["../outside", "/etc/hostname", "nobody"])
def test_a_list_entry_outside_its_folder_or_missing_is_named_with_its_line(tmp_path, commands, entry):
    fakes.folder(tmp_path / "mine", layout="lists")
    picture_files.saved("PNG")(tmp_path / "outside.png")
    (tmp_path / "mine" / "val.txt").write_text(f"val_0\n{entry}\n")
    done = commands("inspect_data", "dataset=folder", "dataset.root=mine", cwd=tmp_path)
    assert done.code == 2
    assert f"mine/val.txt, line 2: image '{entry}' not found - " in done.error_message


@pytest.mark.parametrize("entry", ["../../x.png", "/x.png", "train/../../x.png"])
def test_a_list_entry_outside_a_published_data_set_is_named(tmp_path, commands, entry):
    fakes.camvid(tmp_path / "camvid")
    with (tmp_path / "camvid" / "train.txt").open("a") as file:
        file.write(f"{entry} trainannot/train_000.png\n")
    done = commands("inspect_data", "dataset=camvid", "dataset.root=camvid", cwd=tmp_path)
    assert done.code == 2
    assert "train.txt, line 5: " in done.error_message or "x.png is missing" in done.out


def test_a_jpeg_with_flipped_bits_is_read_or_named(tmp_path, trained, commands):
    """Most flips in the coded pixels give another valid image, which only a checksum could detect."""
    whole = picture_files.encoded("JPEG", quality=95)
    random = np.random.default_rng(0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(40):
        content = bytearray(whole)
        content[random.integers(len(content))] ^= 1 << random.integers(8)
        (photos / f"{number}.jpg").write_bytes(content)
    done = commands("predict", trained / "run" / "best.ckpt", "photos", "--out", "out", cwd=tmp_path)
    refused = [line for line in done.out.splitlines() if line.startswith("skipped: ")]
    assert done.code == (2 if refused else 0), done.err
    assert len(list((tmp_path / "out").glob("*_overlay.png"))) + len(refused) == 40


@pytest.mark.slow
def test_an_image_of_144_million_pixels_is_predicted_in_less_than_2_gb(tmp_path, trained, monkeypatch):
    coarse = np.random.default_rng(0).integers(0, 256, (120, 120, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((12_000, 12_000), Image.Resampling.BILINEAR).save(tmp_path / "large.jpg")
    words = ("--memory", "300M", "dataset.size=null", "--out", "out")
    probe = (
        "import resource, runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    script = Path(__file__).parents[2] / "scripts" / "predict.py"
    done = subprocess.run(
        [sys.executable, "-c", probe, script, trained / "run" / "best.ckpt", "large.jpg", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout.splitlines()[-1]) * 1024 < 2e9
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # commands lift the limit only for their own process
    mask = Image.open(tmp_path / "out" / "large.png")
    assert (mask.size, mask.mode) == ((12_000, 12_000), "P")
    mask.close()


def test_an_image_with_too_many_pixels_names_the_config_key(tmp_path, trained, commands):
    picture_files.saved("PNG")(tmp_path / "x.png")
    done = commands("predict", trained / "run" / "best.ckpt", "x.png", "dataset.max_pixels=100", cwd=tmp_path)
    assert done.code == 2
    assert "more than 100 - shrink it or raise dataset.max_pixels" in done.out
