"""From a checked config to the objects that learn: data module, network, loss, optimizer."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from segdeconv.checkpoints import checkpoint, transfer
from segdeconv.classes import Classes
from segdeconv.config import build
from segdeconv.data.inspection import class_table, inspect_all
from segdeconv.data.module import DataPipeline, build_pipeline, build_split, normalisation
from segdeconv.losses import balance, build_loss
from segdeconv.models import SegmentationModel, build_model
from segdeconv.training import resume


class Prepared(NamedTuple):
    """What a config's nodes become.

    dataset: the `dataset` node as a checkpoint keeps it; facts: what the data is, plain.
    """

    data: DataPipeline
    classes: Classes
    model: SegmentationModel
    loss: nn.Module
    optimizer: Optimizer
    dataset: dict[str, Any]
    facts: dict[str, Any]


def prepare(config: Mapping[str, Any], *, fresh: bool = False) -> Prepared:
    """Look at the data, say what is in it, and build what learns from it; from a checked config.

    fresh: without trained weights, because the checkpoint of a run that goes on is about to be loaded.
    """
    start = None
    if config["init_from"] is not None and not fresh:
        start = checkpoint.read(config["init_from"], trust=resume.AnyName())
    train_split, val_split = (build_split(config["dataset"], split) for split in ("train", "val"))
    classes = train_split.classes
    seen, _ = inspect_all([train_split, val_split])
    weights = balance(config["loss"], seen.pixels[:-1], seen.image_pixels[:-1])
    for note in train_split.notes:
        print(note)
    print(class_table(seen, classes, weights), end="\n\n")
    dataset = normalisation(config["dataset"], train_split, seen)
    data = build_pipeline(dataset, config["augment"], train_split, val_split, seed=config["seed"])

    torch.manual_seed(config["seed"])
    channels = data.preprocessing.channels
    model = build_model(config["model"], len(classes), channels, fresh=fresh or start is not None)
    if start is not None:
        print(transfer.transfer_weights(model, classes, start), end="\n\n")
    if "classes" in dataset:  # found in the masks: from here on a choice, so that a new mask cannot change them
        dataset = {**dataset, "classes": train_split.stored_classes.to_dict()}
    fingerprints = {
        split.split: hashlib.sha256(split.fingerprint.encode()).hexdigest() for split in (train_split, val_split)
    }
    return Prepared(
        data,
        classes,
        model,
        build_loss(config["loss"], class_weights=weights, ignore_index=classes.ignore_index),
        build(config["optimizer"], "optimizer", model=model),
        dataset,
        {
            "classes": classes.to_dict(),
            "preprocessing": data.preprocessing.to_dict(),
            "class_weights": weights,
            "fingerprints": fingerprints,
        },
    )
