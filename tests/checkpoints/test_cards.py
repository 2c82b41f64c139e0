"""Weights with a card: the same network back, refused where anything is not as it was written."""

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
def read(tmp_path):
    made = content()
    made["state_dict"] = {name: value + 0.25 * value.ndim for name, value in made["state_dict"].items()}
    checkpoint.write(made, tmp_path / "best.ckpt")
    return checkpoint.read(tmp_path / "best.ckpt")


@pytest.mark.parametrize("half", [False, True])
def test_shared_weights_build_the_network_that_was_shared(tmp_path, read, half):
    path = tmp_path / "sub" / "mine.safetensors"
    checkpoint.write_weights(read, path, half=half, about={"licence": "Apache-2.0"})
    assert sorted(os.listdir(path.parent)) == ["mine.json", "mine.safetensors"]
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - it is no mapping
    assert {dtype for name, dtype in stored.items() if name.endswith("conv.weight")} == {
        torch.float16 if half else torch.float32
    }
    assert {dtype for name, dtype in stored.items() if name.endswith("running_var")} == {torch.float32}
    again = checkpoint.read(path)
    assert (again.classes, again.config, again.facts) == (CLASSES, read.config, read.facts)
    before, after = read.model().state_dict(), again.model().state_dict()
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        expected = tensor.half().float() if half and tensor.ndim > 1 else tensor
        assert torch.equal(after[name], expected)
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["licence"] == "Apache-2.0"
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_weights_that_are_not_those_of_the_card_are_refused_before_they_are_read(tmp_path, read, damage, monkeypatch):
    path = tmp_path / "mine.safetensors"
    checkpoint.write_weights(read, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": bytes(data[:99]), "empty": b"", "other": b"{}"}[damage])
    monkeypatch.setattr("safetensors.torch.load", lambda _: pytest.fail("damaged weights were handed on"))
    with pytest.raises(CheckpointError, match=r"mine.safetensors is damaged or not what mine.json was written for"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"mine.safetensors is without its card, mine.json - put the .json beside it"),
        ("{", r"mine.json is no card \(JSONDecodeError\)"),
        ("\xff", r"mine.json is no card"),
        ("[" * 100_000, r"mine.json is no card \(RecursionError\)"),
        ("[]", "its sha256 is another"),
    ],
)
def test_a_card_that_is_missing_or_no_card_is_refused(tmp_path, read, text, message):
    path = tmp_path / "mine.safetensors"
    checkpoint.write_weights(read, path)
    card = path.with_suffix(".json")
    card.unlink() if text is None else card.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda card: card["config"]["model"].update(_target_="os.system"),
            "names os.system, which is not of segdeconv",
        ),
        (lambda card: card["facts"].update(more={"_target_": "torch.load"}), "names torch.load, which is not of"),
        (lambda card: card.update(format=9), "has format 9 and this version reads 1"),
        (lambda card: card.pop("facts"), "is not a checkpoint of segdeconv"),
        (lambda card: card["facts"].pop("classes"), "does not say its classes and preprocessing"),
        (lambda card: card["config"]["model"].update(stages=[[4], [6]]), "does not hold the weights its config names"),
    ],
)
def test_what_a_card_says_is_held_to_what_a_checkpoint_is_held_to(tmp_path, read, change, message):
    path = tmp_path / "mine.safetensors"
    checkpoint.write_weights(read, path)
    card = json.loads(path.with_suffix(".json").read_text())
    change(card)
    path.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(path).model()


def test_a_pickle_under_the_name_of_shared_weights_does_not_run(tmp_path, read):
    path, marker = tmp_path / "evil.safetensors", tmp_path / "marker"
    checkpoint.write_weights(read, path)
    torch.save({"x": Touch(marker)}, path)
    card = json.loads(path.with_suffix(".json").read_text())
    card["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"evil.safetensors is not a .safetensors file that can be read"):
        checkpoint.read(path)
    assert not marker.exists()


def test_numbers_that_half_precision_does_not_hold_are_refused_by_name(tmp_path, read):
    name = next(name for name in read.content["state_dict"] if name.endswith("conv.weight"))
    read.content["state_dict"][name].view(-1)[0] = 70_000
    with pytest.raises(UsageError, match=f"{name.removeprefix('model.')} holds numbers beyond what float16 does"):
        checkpoint.write_weights(read, tmp_path / "mine.safetensors", half=True)
    assert not list(tmp_path.glob("mine.*"))


def test_a_writer_that_is_cut_leaves_no_weights_with_the_card_of_others(tmp_path, read, monkeypatch):
    path = tmp_path / "mine.safetensors"
    checkpoint.write_weights(read, path)
    monkeypatch.setattr(cards, "replace_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_weights(read, path, half=True)
    with pytest.raises(CheckpointError, match="is without its card"):
        checkpoint.read(path)


def test_a_shipped_network_is_found_by_its_name_and_a_local_file_of_that_name_wins(tmp_path, read, monkeypatch):
    shelf = tmp_path / "weights"
    checkpoint.write_weights(read, shelf / "segnet_camvid.safetensors")
    checkpoint.write_weights(read, shelf / "segnet_voc.safetensors")
    monkeypatch.setattr(cards, "SHIPPED", shelf)
    monkeypatch.chdir(tmp_path)
    assert checkpoint.read("segnet_camvid").path == shelf / "segnet_camvid.safetensors"
    with pytest.raises(
        UsageError,
        match=r"there is no checkpoint segnet_camvit and no shipped network of this name - did you mean "
        r"'segnet_camvid'\? Available: segnet_camvid, segnet_voc",
    ):
        checkpoint.read("segnet_camvit")
    with pytest.raises(UsageError, match=r"there is no checkpoint runs/best.ckpt - give a file such as"):
        checkpoint.read("runs/best.ckpt")
    (tmp_path / "best.ckpt").rename("segnet_camvid")
    assert str(checkpoint.read("segnet_camvid").path) == "segnet_camvid"
