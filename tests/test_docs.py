"""Every command of the README and of docs/ is typed, page by page, where tiny true-format data lies in its place."""

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
from PIL import Image
from test_readme import PAGES, ROOT

from segdeconv.config import compose
from segdeconv.training.config_check import check_config

pytestmark = pytest.mark.slow
OWN_CODE = ROOT / "docs" / "own_code"

# Left out: other tests run these scripts, which take hours, or do not end by themselves.
ELSEWHERE = {
    "study": "experiments/test_study.py", "results": "experiments/test_results.py",
    "benchmark": "experiments/test_benchmarks.py", "serve": "serving/test_server.py",
}  # fmt: skip
PROGRAMS = ("logger=wandb", "logger=mlflow")  # test_loggers.py has stand-ins for what they need

# What makes a training command a matter of seconds, unless it says the key itself.
SLIM = {
    "trainer.max_steps": "2", "trainer.check_val_every_n_epoch": "1", "trainer.precision": "32-true", "logger": "none",
    "dataset.size": "[32,32]", "dataset.batch_size": "2", "dataset.num_workers": "0", "dataset.cache": "none",
}  # fmt: skip

# Checkpoints that a page has from another run, by their path or its beginning, and a command that makes one.
MADE_BY = {
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
    """A folder in which the pages' data lies where they say that it lies, /data/... under data/."""
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
    pictures = [fakes.image_and_mask(index, 3)[0] for index in range(3)]
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(place / "photos" / f"{index}.jpg")
    (place / "images.txt").write_text("scan.tif\n")
    Image.fromarray(np.tile(pictures[0], (9, 9, 1))).save(place / "scan.tif")
    film = cv2.VideoWriter(str(place / "film.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 25.0, pictures[0].shape[1::-1])
    for picture in pictures:
        film.write(picture)
    film.release()
    return place


def own_data(folder: Path) -> None:
    """Images of four channels, so that dataset.channels=4 can be asked for, with a class table."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for index in range(10):
        image, mask = fakes.image_and_mask(index, 4)
        Image.fromarray(np.dstack([image, image[:, :, 0]])).save(folder / "images" / f"{index}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    (folder / "classes.yaml").write_text("sky: 0\nroad: 1\ngrass: 2\nhouse: 3\nignore: 255\n")


def slim(words: list[str]) -> list[str]:
    """The words of a training command with what makes it short: two steps of a narrow network."""
    keys = [word for word in words if "=" in word]
    several = any(word.startswith("model=") and "," in word for word in keys)  # which may share no key of a width
    given = {word.split("=")[0] for word in keys}
    if "--multirun" in words:  # its first job
        keys = [word if "[" in word else word.split(",")[0] for word in keys]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(OWN_CODE))
        config, _ = compose(keys, ROOT / "configs")
        model = check_config(config)["model"]
    narrow = {"width": "0.0625" if isinstance(model.get("width"), float) else "4", "fc_width": "16"}
    wanted = SLIM | {
        f"model.{key}": value
        for key, value in (narrow | {"pretrained": "none"}).items()
        if key in model and not several
    }
    return [*words, *(f"{key}={value}" for key, value in wanted.items() if key not in given)]


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
        if script in ELSEWHERE:
            assert (ROOT / "tests" / ELSEWHERE[script]).is_file()
        elif not any(word in PROGRAMS for word in words):
            words = [re.sub(r"^(trainer\.devices)=\d+$", r"\1=1", word) for word in words]
            words = [word for word in words if word != "model.pretrained=imagenet"]  # models/test_vgg.py, from a file
            words = [there(word, place, commands) for word in words]
            if script == "train":
                time.sleep(1)  # the folder of a run is named by its second
            if script in ("train", "find") and "--config-dir=configs" not in words:
                words = slim(words)
            done = commands(script, *words, cwd=place, env={"PYTHONPATH": str(place)}, timeout=300)
            assert done.code == 0, f"{line}\n{words}\n{done.out[-2000:]}\n{done.err}"


def there(word: str, place: Path, commands: Callable) -> str:
    """A word with its pattern matched, as a shell does; a checkpoint that the page has from elsewhere is made."""
    key, _, path = word.rpartition("=")
    if not path.endswith(".ckpt"):
        return word
    if not list(place.glob(path)):
        config = next(config for start, config in MADE_BY.items() if path.startswith(start))
        made = commands("train", *slim(config.split()), "hydra.run.dir=made", cwd=place, timeout=300)
        assert made.code == 0, made.err
        file = place / path.replace("*", "made")
        shutil.copytree(place / "made", file.parent, dirs_exist_ok=True)
        file.exists() or shutil.copy(file.parent / "best.ckpt", file)
        shutil.rmtree(place / "made")
    found = sorted(place.glob(path))[-1].relative_to(place)
    return f"{key}={found}" if key else str(found)
