"""Every command in the README and in docs/ runs, page by page, on tiny data sets in the formats of the real ones."""

from __future__ import annotations

import re
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import fakes
import numpy as np
import pytest
from fresh_commands import child_environment
from PIL import Image
from test_readme import PAGES, ROOT

from segdeconv.cli.own_code import compose
from segdeconv.training.config_check import check_config

pytestmark = pytest.mark.slow
OWN_CODE = ROOT / "docs" / "own_code"

# Scripts that take hours, do not end by themselves, or need a trained network. Other tests cover them.
TESTED_ELSEWHERE = {
    "study": "experiments/test_study.py", "results": "experiments/test_results.py",
    "benchmark": "experiments/test_benchmarks.py", "serve": "serving/test_server.py",
    "calibrate": "evaluation/test_temperature.py", "label": "serving/test_label_page.py",
    "merge": "inference/test_parts.py",
}  # fmt: skip
# Words of commands that need a service, a cluster, an object storage or a person. training/test_loggers.py,
# inference/test_distributed.py, inference/test_object_storage.py, data/datasets/test_remote_shards.py and
# serving/test_label_page.py cover them.
UNAVAILABLE = (
    "logger=wandb", "logger=mlflow", "--engine", "dataset.root=s3://bucket/camvid", "s3://bucket/photos",
    "stored.txt", "dataset.root=photos-labels",
)  # fmt: skip

# Keys that make a training command take seconds, unless the command sets them.
SLIM = {
    "trainer.max_steps": "2", "trainer.check_val_every_n_epoch": "1", "trainer.precision": "32-true", "logger": "none",
    "dataset.size": "[32,32]", "dataset.batch_size": "2", "dataset.num_workers": "0", "dataset.cache": "none",
    "auto": "[]",
}  # fmt: skip

# Checkpoints that a page uses but does not train: the beginning of their path, and the arguments that train them.
TRAINED_BY = {
    "best.ckpt": "dataset=camvid model=segnet model.width=0.25",
    "demo/": "experiment=demo dataset.num_train=8 dataset.num_val=4",
    "runs/camvid-segnet/": "dataset=camvid model=segnet",
    "runs/camvid-unet/": "dataset=camvid model=unet",
    "runs/camvid-bayesian_segnet/": "dataset=camvid model=bayesian_segnet",
    "fcn8s.ckpt": "dataset=voc model=fcn",
    "RUN/": "experiment=segnet_basic_camvid_paper model=bayesian_segnet_basic",
}


def commands_of(page: Path) -> list[str]:
    blocks = re.findall(r"```(?:bash|console)\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith(("python scripts/", "segdeconv "))]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the data that the commands use; its subfolder data replaces /data in the commands."""
    place = tmp_path_factory.mktemp("site")
    data = place / "data"
    fakes.camvid(data / "CamVid", ("train", "val", "test"))
    voc = fakes.voc(data / "VOCdevkit" / "VOC2012", tuple(f"2007_{index:06}" for index in range(8)))
    shutil.copytree(voc / "SegmentationClass", voc / "SegmentationClassAug")
    shutil.copytree(voc / "SegmentationObject", voc / "SegmentationObjectAug")
    shutil.copy(voc / "ImageSets/Segmentation/train.txt", voc / "ImageSets/Segmentation/trainaug.txt")
    fakes.cityscapes(data / "cityscapes", ("labelIds", "labelTrainIds"))
    fakes.ade20k(data / "ADEChallengeData2016")
    fakes.sunrgbd(data / "SUNRGBD")
    fakes.oxford_pets(data / "oxford-iiit-pet")
    own_data(place / "mine")
    (place / "photos").mkdir()
    images = [fakes.image_and_mask(index, 3)[0] for index in range(3)]
    for index, image in enumerate(images):
        Image.fromarray(image).save(place / "photos" / f"{index}.jpg")
    (place / "images.txt").write_text("scan.tif\n")
    Image.fromarray(np.tile(images[0], (9, 9, 1))).save(place / "scan.tif")
    video = cv2.VideoWriter(str(place / "film.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 25.0, images[0].shape[1::-1])
    for image in images:
        video.write(image)
    video.release()
    return place


def own_data(folder: Path) -> None:
    """Write a user's own data set with a class table and images of four channels, for dataset.channels=4."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for index in range(10):
        image, mask = fakes.image_and_mask(index, 4)
        Image.fromarray(np.dstack([image, image[:, :, 0]])).save(folder / "images" / f"{index}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    (folder / "classes.yaml").write_text("sky: 0\nroad: 1\ngrass: 2\nhouse: 3\nignore: 255\n")


def shorten(words: list[str]) -> list[str]:
    """Return the arguments of a training command with those that shorten it: two steps of a narrow network."""
    keys = [word for word in words if "=" in word]
    several = any(word.startswith("model=") and "," in word for word in keys)  # they may have different keys
    present = {word.split("=")[0] for word in keys}
    if "--multirun" in words:  # checks the first job only
        keys = [word if "[" in word else word.split(",")[0] for word in keys]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(OWN_CODE))
        config, _ = compose(keys)
        model = check_config(config)["model"]
    narrow = {"width": "0.0625" if isinstance(model.get("width"), float) else "4", "fc_width": "16"}
    added = SLIM | {
        f"model.{key}": value
        for key, value in (narrow | {"pretrained": "none"}).items()
        if key in model and not several
    }
    return [*words, *(f"{key}={value}" for key, value in added.items() if key not in present)]


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=lambda page: page.name)
def test_every_command_of_a_page_runs(page: Path, site: Path, tmp_path: Path, commands: Callable) -> None:
    place = tmp_path
    if page.name == "own-code.md":
        shutil.copytree(OWN_CODE, place, dirs_exist_ok=True)
    else:
        (place / "mine").symlink_to(site / "mine")
    for name in ("data", "photos", "images.txt", "scan.tif", "film.mp4"):
        (place / name).symlink_to(site / name)
    for line in commands_of(page):
        program, *words = shlex.split(line.replace("/data/", "data/"), comments=True)
        script = words.pop(0) if program == "segdeconv" else Path(words.pop(0)).stem
        if script in TESTED_ELSEWHERE:
            assert (ROOT / "tests" / TESTED_ELSEWHERE[script]).is_file()
        elif not any(word in UNAVAILABLE for word in words):
            words = [re.sub(r"^(trainer\.devices)=\d+$", r"\1=1", word) for word in words]
            words = [word for word in words if word != "model.pretrained=imagenet"]  # models/test_vgg.py covers it
            words = [resolve_path(word, place, commands) for word in words]
            if script == "train":
                time.sleep(1)  # a run folder is named by the time in seconds
            if script in ("train", "find") and "--config-dir=configs" not in words:
                words = shorten(words)
            done = commands(
                script, *words, cwd=place, env={"PYTHONPATH": child_environment(place)["PYTHONPATH"]}, timeout=300
            )
            assert done.code == 0, f"{line}\n{words}\n{done.out[-2000:]}\n{done.err}"


def resolve_path(word: str, place: Path, commands: Callable) -> str:
    """Expand the pattern of a checkpoint as a shell does, and train the checkpoint first if it does not exist."""
    key, _, path = word.rpartition("=")
    if path.endswith("/latest"):
        resolve_path(path.replace("latest", "*/best.ckpt"), place, commands)
        return word
    if not path.endswith(".ckpt"):
        return word
    if not list(place.glob(path)):
        config = next(config for start, config in TRAINED_BY.items() if path.startswith(start))
        done = commands("train", *shorten(config.split()), "hydra.run.dir=trained", cwd=place, timeout=300)
        assert done.code == 0, done.err
        file = place / path.replace("*", "trained")
        shutil.copytree(place / "trained", file.parent, dirs_exist_ok=True)
        file.exists() or shutil.copy(file.parent / "best.ckpt", file)
        shutil.rmtree(place / "trained")
    match = sorted(place.glob(path))[-1].relative_to(place)
    return f"{key}={match}" if key else str(match)
