"""The commands of docs/own-code.md, with a data set, a network and a loss of the user's own."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from segdeconv.checkpoints.checkpoint import foreign
from segdeconv.cli import own_code
from segdeconv.cli.overrides import compose
from segdeconv.config import check, locate
from segdeconv.errors import UsageError
from segdeconv.training.config_check import DEFAULTS, check_config

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
PAGE = (ROOT / "docs" / "own-code.md").read_text()
QUICK = ("trainer.max_epochs=1", "dataset.count=32", "dataset.num_workers=0")
OWN = ("dataset._target_=mine.Stripes", "model._target_=mine.TinyNet", "loss._target_=mine.Poly")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A copy of docs/own_code as the current folder."""
    folder = shutil.copytree(ROOT / "docs" / "own_code", tmp_path / "own")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place).resolve() != folder])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield folder
    sys.modules.pop("mine", None)


def run(*words, cwd, code=0):
    words = [sys.executable, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def config(*arguments):
    return check_config(own_code.compose(arguments)[0])


def test_a_config_names_classes_of_the_current_folder(own):
    composed = config(*OWN, "model.width=8", "loss.epsilon=2")
    assert composed["dataset"]["count"] == 256  # the default of mine.Stripes
    assert composed["dataset"]["batch_size"] == 16  # from configs/dataset/shapes.yaml, replaced only in part
    assert (composed["model"]["width"], composed["loss"]["epsilon"]) == (8, 2.0)
    assert {"mine.Poly", "mine.Stripes", "mine.TinyNet"} <= set(foreign(composed))
    assert sys.path[-1] == os.getcwd()  # after all installed packages


def test_the_current_folder_is_importable_only_if_a_config_names_something_in_it(own):
    config()
    assert os.getcwd() not in sys.path  # a file among the images of a prediction is never imported


def test_from_python_sys_path_is_unchanged(own):
    before = list(sys.path)
    with pytest.raises(UsageError, match=r"correct the name, or run the command in the folder that contains mine\.py"):
        locate({"_target_": "mine.Poly"}, "loss")
    assert sys.path == before


def test_trusted_classes_are_found_in_the_current_folder_and_installed_modules_take_precedence(own):
    (own / "yaml.py").write_text("raise AssertionError")
    own_code.find_own_code(["yaml.Loader", "albumentations.Resize", "", ".Poly"])
    assert os.getcwd() not in sys.path
    own_code.find_own_code(["mine.Poly", "mine.TinyNet"])
    assert sys.path.count(os.getcwd()) == 1
    assert locate({"_target_": "mine.Poly"}, "loss").__name__ == "Poly"


def test_a_config_folder_adds_its_files_to_the_shipped_ones(own):
    composed = config("--config-dir=configs", "experiment=stripes")
    assert {"mine.Poly", "mine.Stripes", "mine.TinyNet"} <= set(foreign(composed))
    assert composed["optimizer"]["lr"] == 0.01
    assert "num_train" not in composed["dataset"]
    assert (
        config("--config-dir", "configs", "+experiment=stripes")
        == composed
        == config("experiment=stripes", "-cd", "configs")
    )
    _, choices = compose(["--config-dir=configs", "dataset=stripes", "model=tinynet"], CONFIGS)
    assert (choices["dataset"], choices["model"], choices["augment"]) == ("stripes", "tinynet", "flip")


def test_a_config_folder_can_have_any_name(own):
    folder = own / "it's, my [own] dir"
    shutil.copytree(own / "configs", folder)
    assert config(f"--config-dir={folder}", "dataset=stripes")["dataset"]["_target_"] == "mine.Stripes"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model._target_=mine.TinyNett"], "model._target_=mine.TinyNett cannot be imported"),
        (["model._target_=yours.TinyNet"], "correct the name, or run the command in the folder that contains yours.py"),
        (["dataset._target_=broken.Stripes"], "dataset._target_=broken.Stripes cannot be imported (no luck)"),
        (
            ["dataset._target_=mine.Stripes", "dataset.num_train=4"],
            "mine.Stripes takes no num_train: if a YAML file sets it, remove it with ~dataset.num_train",
        ),
        (["--config-dir=configs", "dataset=stripe"], "unknown dataset 'stripe' - did you mean 'stripes'?"),
        (["dataset=stripes"], "unknown dataset 'stripes'"),
        (["--config-dir=nowhere"], "--config-dir=nowhere does not name a folder - write --config-dir DIR"),
        (["--config-dir", "nowhere"], "--config-dir=nowhere does not name a folder - write --config-dir DIR"),
        (["-cd", "configs", "--config-dir=same"], "--config-dir is given twice - give it once"),
        (["--config-dir=same", "dataset=shapes"], "same/dataset/shapes.yaml has the name of a shipped file"),
    ],
)
def test_a_mistake_in_own_code_is_named_with_the_way_out(own, arguments, message):
    (own / "broken.py").write_text("raise RuntimeError('no luck')")
    (own / "same" / "dataset").mkdir(parents=True)
    (own / "same" / "dataset" / "shapes.yaml").write_text("_target_: mine.Stripes\n")
    with pytest.raises(UsageError) as caught:
        config(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_of_a_yaml_file_that_a_class_does_not_accept_can_be_removed(own):
    assert (
        "num_train" not in config("experiment=demo", OWN[0], OWN[1], "~dataset.num_train", "~model.stages")["dataset"]
    )


def test_a_callable_that_accepts_any_argument_validates_it_itself():
    def schema(*, lr: float = 1.0, **rest): ...

    node = {"_target_": "somewhere.schema", "lr": 2, "momentum": 0.9}
    assert check(node, "optimizer", [schema]) == {**node, "lr": 2.0}
    with pytest.raises(UsageError, match=r"unknown key optimizer\.model"):
        check({**node, "model": 1}, "optimizer", [schema], supplied=["model"])


def test_the_poly_loss_of_the_page_is_cross_entropy_for_epsilon_0_and_the_published_loss_otherwise(own):
    own_code.find_own_code(["mine.Poly"])
    poly = locate({"_target_": "mine.Poly"}, "loss")
    logits, mask = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    mask[0, 0] = 255
    plain = poly(epsilon=0.0, class_weights=None, ignore_index=255)(logits, mask)
    assert torch.allclose(plain, F.cross_entropy(logits, mask, ignore_index=255))
    weights = [1.0, 2.0, 0.5]
    expected = []
    for image in range(2):
        for row, column in np.ndindex(4, 5):
            label = int(mask[image, row, column])
            if label != 255:
                probability = float(logits[image, :, row, column].softmax(0)[label])
                expected.append(weights[label] * (2 * (1 - probability) - np.log(probability)))
    loss = poly(epsilon=2.0, class_weights=weights, ignore_index=255)(logits, mask)
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-5)


def test_missing_keys_of_a_config_have_the_defaults_of_train_yaml():
    assert check_config({}) == config()
    groups = yaml.safe_load((CONFIGS / "train.yaml").read_text())["defaults"]
    assert set(DEFAULTS) == {name for entry in groups if isinstance(entry, dict) for name in entry} - {
        "experiment",
    }


@pytest.mark.slow
def test_training_from_python_needs_no_hydra(own):
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (snippet,) = [snippet for snippet in snippets if "from mine import" in snippet]
    snippet = snippet.replace("size=[48, 48]", "size=[48, 48], dataset__count=16, dataset__num_workers=0")
    (own / "script.py").write_text(snippet + '\nimport sys\n\nassert "hydra" not in sys.modules\n')
    output = run("script.py", cwd=own).stdout
    assert "mine.TinyNet" in (own / "runs" / "mine" / "config.yaml").read_text()
    trust = "trust=['mine.Stripes', 'mine.TinyNet']"
    assert f"use it:          segdeconv.load('runs/mine/best.ckpt', {trust}).predict(IMAGE)" in output


@pytest.mark.slow
def test_every_command_of_the_page_works(own):
    (own / "photos").mkdir()
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(own / "photos" / "photo.png")
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if "logger=" not in line]
    assert len(lines) == 8
    for line in lines:
        program, name, *words = shlex.split(line, comments=True)
        assert program == "segdeconv"
        quick = {"train": QUICK, "inspect_data": ("dataset.count=8",)}.get(name, ())
        run("-m", program, name, *words, *quick, cwd=own)
    assert (own / "labelled" / "photo_overlay.png").is_file()
    assert len(list(own.glob("runs/stripes-tinynet/*/report.json"))) == 2
    without = run("-m", "segdeconv", "evaluate", "stripes/best.ckpt", cwd=own, code=4)
    assert without.stderr.splitlines()[-1].endswith("--trust mine.Poly --trust mine.Stripes --trust mine.TinyNet")
