"""Networks as Python programs load and share them: `from_pretrained`, `save_pretrained` and `push_to_hub`."""

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from segdeconv.checkpoints import cards, checkpoint, hub
from segdeconv.classes import Classes
from segdeconv.config import ABSENT, TARGET
from segdeconv.errors import UsageError
from segdeconv.models import SegmentationModel

IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # mean and std of train(), for 8-bit RGB


def load_network(path: str | Path, trust: Collection[str]) -> SegmentationModel:
    """Return the network of a checkpoint; see `SegmentationModel.from_pretrained`."""
    return checkpoint.read(path, trust=trust).model()


def save_network(
    network: SegmentationModel,
    folder: Path,
    *,
    classes: Sequence[str] | Mapping[Any, Any] | Classes | None,
    half: bool,
    about: Mapping[str, Any] | None,
) -> Path:
    """Write weights and card into a folder; see `SegmentationModel.save_pretrained`."""
    card = network.card if classes is None else _new_card(network, classes)
    name = type(network).__name__
    if card is None:
        raise UsageError(f"this {name} was not loaded or trained, so its classes are unknown - give classes=[...]")
    if card["config"]["model"][TARGET] == ABSENT:
        raise UsageError(f"this {name} holds a network of another library, which no card describes - save that instead")
    path = folder / hub.WEIGHTS
    cards.write(path, network.state_dict(), {**(about or {}), **card}, half=half)
    checkpoint.read(path, trust=checkpoint.foreign(card))  # so that no file is shared that would be refused
    return path


def push_network(
    network: SegmentationModel,
    name: str,
    *,
    classes: Sequence[str] | Mapping[Any, Any] | Classes | None,
    half: bool,
    about: Mapping[str, Any] | None,
    private: bool | None,
    revision: str | None,
    message: str,
    token: Any,
) -> str:
    """Upload weights and card; see `SegmentationModel.push_to_hub`."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_network(network, Path(folder), classes=classes, half=half, about=about)
        return hub.push(path, name, private=private, revision=revision, message=message, token=token)


def _new_card(network: SegmentationModel, classes: Sequence[str] | Mapping[Any, Any] | Classes) -> dict[str, Any]:
    """Return the card of a network that has none: normalised like ImageNet, images at their own size."""
    from segdeconv.data.class_file import indexed_classes
    from segdeconv.data.preprocessing import Preprocessing

    classes = indexed_classes(classes)
    name = type(network).__name__
    if len(classes) != network.num_classes:
        raise UsageError(f"this {name} has {network.num_classes} classes, and classes names {len(classes)} - name all")
    if network.node is None:
        raise UsageError(f"this {name} has arguments that are not plain data, which no card holds - train it first")
    if network.card is None and network.in_channels != 3:
        raise UsageError(
            f"this {name} takes {network.in_channels} channels, whose mean and std are unknown - train it with train()"
        )
    old = network.card or {"config": {}, "facts": {}}
    facts = {
        "preprocessing": Preprocessing(None, *IMAGENET).to_dict(),
        "precision": "32-true",
        **old["facts"],
        "classes": classes.to_dict(),
    }
    config = {"dataset": {"size": None}, **old["config"], "model": network.node}
    return {"format": checkpoint.FORMAT, "config": config, "facts": facts}
