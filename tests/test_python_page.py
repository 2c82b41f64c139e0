"""The code of docs/python.md runs; the run of own objects is a real one, and other runs are only checked."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from segdeconv.train import train
from segdeconv.training.arguments import read_arguments
from segdeconv.training.config_check import check_config

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((90, 120, 3), np.uint8)).save("photo.jpg")
    trained = []

    def train_tiny(**keywords):
        assert check_config(read_arguments({}, keywords).config)
        if isinstance(keywords["dataset"], str):
            keywords = {"dataset": "shapes", "model__width": 0.0625, "dataset__num_train": 8, "dataset__num_val": 2}
            keywords |= {"dataset__batch_size": 8, "trainer__max_epochs": 1}
        trained.append(train(**keywords, dataset__num_workers=0, logger=None))
        return trained[-1]

    monkeypatch.setattr("segdeconv.train.train", train_tiny)
    names = {}
    for block in BLOCKS:
        if "hf://me" not in block:  # checkpoints/test_hub.py
            exec(compile(block, str(PAGE), "exec"), names)
    assert len(trained) == 2
    assert np.asarray(Image.open("mask.png")).shape == (90, 120)
    assert names["segmenter"].classes.names == ("road", "grass", "sky")
    assert {path.name for path in Path("shared").iterdir()} == {"model.safetensors", "model.json"}
