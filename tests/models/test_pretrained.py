"""Networks by name, and networks that are saved and loaded as Python programs do it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import segdeconv
from segdeconv.checkpoints import cards
from segdeconv.errors import CheckpointError, UsageError
from segdeconv.models import FCN, SegmentationModel, SegNet, UNet, create_model, list_models
from segdeconv.models.adapter import Adapter
from segdeconv.models.base import WithoutMemory

CONFIGS = Path(__file__).parents[2] / "configs"
NARROW = {
    "bayesian_segnet": {"width": 0.125}, "bayesian_segnet_basic": {"width": 4}, "bilinear_interpolation": {"width": 4},
    "deconvnet": {"width": 0.0625, "fc_width": 16}, "deeplab_largefov": {"width": 0.0625, "fc_width": 16},
    "fcn": {"width": 0.0625, "fc_width": 16}, "fpn": {"width": 0.0625}, "segnet": {"stages": [[4], [8]]},
    "unet": {"width": 0.0625},
}  # fmt: skip


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_names_of_networks_are_those_of_the_config_files():
    assert list_models() == sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))


@pytest.mark.parametrize("name", list_models())
def test_every_network_is_created_by_its_name(name):
    with WithoutMemory():
        network = create_model(name, num_classes=5, in_channels=4)
    assert (network.num_classes, network.in_channels) == (5, 4)
    assert network.node["_target_"] == f"segdeconv.models.{type(network).__name__}"


@pytest.mark.parametrize("name", sorted(NARROW))
def test_every_network_is_the_same_after_saving_and_loading(name, tmp_path):
    network = create_model(name, 3, **NARROW[name])
    path = network.save_pretrained(tmp_path / "net", classes=["a", "b", "c"], about={"licence": "CC0"})
    assert path == tmp_path / "net" / "model.safetensors"
    loaded = type(network).from_pretrained(tmp_path / "net")
    assert same(network, loaded)
    assert not loaded.training
    assert loaded.node == network.node
    assert cards.read_weights(path)[0]["licence"] == "CC0"


def test_a_loaded_network_is_saved_with_its_classes_and_preprocessing(tmp_path):
    network = SegNet.from_pretrained("camvid-small")
    with torch.no_grad():
        network.decoder.classifier.bias += 1  # as further training does
    network.save_pretrained(tmp_path)
    again = segdeconv.load(tmp_path, precision="32-true")  # in bfloat16 the common bias changes the rounding
    assert again.classes.names[:3] == ("sky", "building", "pole")
    image = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    direct = segdeconv.load("camvid-small", precision="32-true")
    assert again.preprocessing == direct.preprocessing
    assert same(SegmentationModel.from_pretrained(tmp_path), network)
    assert np.array_equal(again.predict(image).mask, direct.predict(image).mask)  # softmax ignores a common bias


class Own(SegmentationModel):
    def __init__(self, num_classes, *, layer=nn.ReLU()):  # noqa: B008
        super().__init__(num_classes)
        self.layer = layer

    def forward(self, image):
        return image


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_model("unett", 3), "unknown model 'unett' - did you mean 'unet'?"),
        (lambda: create_model("unet", 3, widht=2), "unknown key model.widht - did you mean 'width'?"),
        (lambda: create_model("unet", 3, width="wide"), "model.width=wide"),
        (lambda: UNet.from_pretrained("camvid-small"), "is a SegNet, not a UNet - use SegNet.from_pretrained"),
        (lambda: UNet.from_pretrained("camvid-smal"), "checkpoint camvid-smal not found"),
        (lambda: FCN.from_pretrained("https://host/file"), "is a URL"),
        (lambda: FCN.from_pretrained("hf://owner"), "not an address of the Hub - write hf://OWNER/NAME"),
        (lambda: FCN.from_pretrained("hf://owner/../name"), "not an address of the Hub"),
        (lambda: SegNet(3, stages=[[4]]).save_pretrained("x"), "its classes are unknown - give classes="),
        (
            lambda: SegNet(3, stages=[[4]]).save_pretrained("x", classes=["a", "b"]),
            "has 3 classes, and classes names 2",
        ),
        (lambda: SegNet(2, in_channels=4, stages=[[4]]).save_pretrained("x", classes=["a", "b"]), "takes 4 channels"),
        (lambda: Own(2, layer=nn.Tanh()).save_pretrained("x", classes=["a", "b"]), "arguments that are not plain data"),
        (lambda: Adapter(nn.Conv2d(3, 2, 1), 2).save_pretrained("x", classes=["a", "b"]), "not plain data"),
    ],
)
def test_a_mistake_gets_one_line(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_refused(tmp_path):
    path = SegNet(2, stages=[[4]]).save_pretrained(tmp_path, classes=["a", "b"])
    path.write_bytes(path.read_bytes()[:-1] + b"\0\1"[-1:])
    with pytest.raises(CheckpointError, match="is damaged or does not belong"):
        SegNet.from_pretrained(tmp_path)
