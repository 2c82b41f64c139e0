"""A strict type checker accepts a program that uses the public functions, with the types of their results."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from PIL import Image
from torch import nn

import segdeconv
from segdeconv.inference.segmenter import Prediction, Segmenter
from segdeconv.models import SegmentationModel, SegNet, create_model, list_models
from segdeconv.switches import max_pool, unpool
from segdeconv.train import train
from segdeconv.training.result import TrainingResult


def predict(network: nn.Module) -> None:
    segmenter = segdeconv.load("camvid-small", flip=True)
    assert_type(segmenter, Segmenter)
    prediction = segmenter.predict(Path("photo.jpg"), uncertainty=True)
    assert_type(prediction, Prediction)
    assert_type(prediction.pixels(), dict[str, int])
    prediction.save("mask.png", labels="dataset")
    array: np.ndarray = prediction.mask
    segmenter.predict(array)
    segmenter.predict(Image.fromarray(array))
    segmenter.predict(torch.zeros(3, 8, 8))
    assert_type(segmenter.predict(["a.jpg", array]), list[Prediction])
    segdeconv.load(Path("best.ckpt"), model=network, trust=["mine.Net"], overrides=["dataset.size=null"])


def learn(network: nn.Module) -> float:
    result = train(dataset="folder", dataset__root="mine", model=network, trainer__max_epochs=5)
    assert_type(result, TrainingResult)
    assert_type(result.model, SegmentationModel)
    assert_type(result.best_checkpoint, Path)
    assert_type(result.segmenter, Segmenter)
    train({"dataset": {"_target_": "segdeconv.data.Shapes"}}, "runs/mine")
    return result.history[-1]["val/miou"]


def networks() -> str:
    assert_type(list_models(), list[str])
    assert_type(create_model("unet", num_classes=5, width=0.5), SegmentationModel)
    network = SegNet.from_pretrained("hf://owner/name@v1")
    assert_type(network, SegNet)
    assert_type(network.save_pretrained("folder", about={"licence": "CC0"}), Path)
    return network.push_to_hub("owner/name", private=True)


def switches(x: torch.Tensor) -> torch.Tensor:
    features, positions, size = max_pool(x)
    return unpool(features, positions, size)
"""


@pytest.mark.slow
def test_strict_mypy_accepts_a_program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    words = ["--strict", "--config-file=", "--ignore-missing-imports", "--follow-imports=silent", "program.py"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"MYPYPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
