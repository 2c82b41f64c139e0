"""Shared weights with a card: they build the same network, and are refused after any change."""

import hashlib
import json
import os

import pytest
import torch
from checkpoint_files import CLASSES, Touch, content
from safetensors import safe_open

from segdeconv.checkpoints import cards, checkpoint
from segdeconv.errors import CheckpointError, UsageError


@pytest.fixture
def source(tmp_path):
    data = content()
    data["state_dict"] = {name: value + 0.25 * value.ndim for name, value in data["state_dict"].items()}
    checkpoint.write(data, tmp_path / "best.ckpt")
    return checkpoint.read(tmp_path / "best.ckpt")


@pytest.mark.parametrize("half", [False, True])
def test_shared_weights_build_the_same_network(tmp_path, source, half):
    path = tmp_path / "sub" / "mine.safetensors"
    checkpoint.write_weights(source, path, half=half, about={"licence": "Apache-2.0"})
    assert sorted(os.listdir(path.parent)) == ["mine.json", "mine.safetensors"]
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - the file is not a mapping
    assert {dtype for name, dtype in stored.items() if name.endswith("conv.weight")} == {
        torch.float16 if half else torch.float32
    }
    assert {dtype for name, dtype in stored.items() if name.endswith("running_var")} == {torch.float32}
    shared = checkpoint.read(path)
    assert (shared.classes, shared.config, shared.facts) == (CLASSES, source.config, source.facts)
    before, after = source.model().state_dict(), shared.model().state_dict()
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        expected = tensor.half().float() if half and tensor.ndim > 1 else tensor
        assert torch.equal(after[name], expected)
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["licence"] == "Apache-2.0"
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_weights_that_do_not_match_the_card_are_refused_before_they_are_read(tmp_path, source, damage, monkeypatch):
    path = tmp_path / "mine.safetensors"
    checkpoint.write_weights(source, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:99]), "empty": b"", "other": b"{}"}[damage])
    monkeypatch.setattr("safetensors.torch.load", lambda _: pytest.fail("damaged weights were passed to safetensors"))
    with pytest.raises(CheckpointError, match=r"mine.safetensors is damaged or does not belong to mine.json"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"mine.safetensors has no card mine.json beside it - copy the .json file"),
        ("{", r"mine.json is not a valid card: it is not JSON"),
        ("\xff", r"mine.json is not a valid card"),
        ("[" * 100_000, r"mine.json is not a valid card: it is nested deeper"),
        ("[]", "mine.json is not a valid card: it is not a mapping"),
    ],
)
def test_a_missing_or_invalid_card_is_refused(tmp_path, source, text, message):
    path = tmp_path / "mine.safetensors"
    checkpoint.write_weights(source, path)
    card = path.with_suffix(".json")
    card.unlink() if text is None else card.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda card: card["config"]["model"].update(_target_="os.system"),
            "names os.system, which is not part of segdeconv",
        ),
        (lambda card: card["facts"].update(more={"_target_": "torch.load"}), "names torch.load, which is not part of"),
        (lambda card: card.update(format=9), "has format 9, but this version reads format 1"),
        (lambda card: card.pop("facts"), "is not a segdeconv checkpoint"),
        (
            lambda card: card["facts"].pop("classes"),
            "does not contain its config and metadata .*facts.classes: field required",
        ),
        (
            lambda card: card["config"]["model"].update(stages=[[4], [6]]),
            "does not contain the weights that its config describes",
        ),
    ],
)
def test_a_card_is_checked_as_strictly_as_a_checkpoint(tmp_path, source, change, message):
    path = tmp_path / "mine.safetensors"
    checkpoint.write_weights(source, path)
    card = json.loads(path.with_suffix(".json").read_text())
    change(card)
    path.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(path).model()


def test_a_pickle_named_as_shared_weights_does_not_run(tmp_path, source):
    path, marker = tmp_path / "evil.safetensors", tmp_path / "marker"
    checkpoint.write_weights(source, path)
    torch.save({"x": Touch(marker)}, path)
    card = json.loads(path.with_suffix(".json").read_text())
    card["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"evil.safetensors is not a readable .safetensors file"):
        checkpoint.read(path)
    assert not marker.exists()


def test_values_beyond_the_range_of_half_precision_are_refused_by_name(tmp_path, source):
    name = next(name for name in source.content["state_dict"] if name.endswith("conv.weight"))
    source.content["state_dict"][name].view(-1)[0] = 70_000
    with pytest.raises(UsageError, match=f"{name.removeprefix('model.')} contains values beyond the range of float16"):
        checkpoint.write_weights(source, tmp_path / "mine.safetensors", half=True)
    assert not list(tmp_path.glob("mine.*"))


def test_an_interrupted_write_never_leaves_weights_with_the_wrong_card(tmp_path, source, monkeypatch):
    path = tmp_path / "mine.safetensors"
    checkpoint.write_weights(source, path)
    monkeypatch.setattr(cards, "replace_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_weights(source, path, half=True)
    with pytest.raises(CheckpointError, match=r"has no card mine.json beside it"):
        checkpoint.read(path)


def test_a_shipped_network_is_read_by_name_unless_a_local_file_has_that_name(tmp_path, source, monkeypatch):
    weights_folder = tmp_path / "weights"
    checkpoint.write_weights(source, weights_folder / "segnet_camvid.safetensors")
    checkpoint.write_weights(source, weights_folder / "segnet_voc.safetensors")
    monkeypatch.setattr(cards, "SHIPPED", weights_folder)
    monkeypatch.chdir(tmp_path)
    assert checkpoint.read("segnet_camvid").path == weights_folder / "segnet_camvid.safetensors"
    with pytest.raises(
        UsageError,
        match=r"checkpoint segnet_camvit not found, and no shipped network has this name - did you mean "
        r"'segnet_camvid'\? Available: segnet_camvid, segnet_voc",
    ):
        checkpoint.read("segnet_camvit")
    with pytest.raises(UsageError, match=r"checkpoint runs/best.ckpt not found - give a run folder such as"):
        checkpoint.read("runs/best.ckpt")
    (tmp_path / "best.ckpt").rename("segnet_camvid")
    assert str(checkpoint.read("segnet_camvid").path) == "segnet_camvid"
