"""From a checked config to the objects that learn: data module, network, loss, optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from segdeconv import config
from segdeconv.checkpoints import checkpoint, transfer
from segdeconv.classes import Classes
from segdeconv.data.inspection import inspect_all, table
from segdeconv.data.module import DataModule, build_split, build_transforms, normalisation
from segdeconv.losses import build_loss, class_weights
from segdeconv.models import SegmentationModel, build_model
from segdeconv.training import resume


class Prepared(NamedTuple):
    """What a recipe's nodes become.

    dataset: the `dataset` node as a checkpoint keeps it; facts: what the data is, plain.
    """

    data: DataModule
    classes: Classes
    model: SegmentationModel
    loss: nn.Module
    optimizer: Optimizer
    dataset: dict[str, Any]
    facts: dict[str, Any]


def prepare(recipe: Mapping[str, Any], *, fresh: bool = False) -> Prepared:
    """Look at the data, say what is in it, and build what learns from it; from a checked recipe.

    fresh: without trained weights, because the checkpoint of a run that goes on is about to be loaded.
    """
    start = None
    if recipe["init_from"] is not None and not fresh:
        start = checkpoint.read(recipe["init_from"], trust=resume.AnyName())
    settings, source = config.split(recipe["dataset"], DataModule)
    train_split, val_split = (build_split(recipe["dataset"], split) for split in ("train", "val"))
    classes = train_split.classes
    seen, _ = inspect_all([train_split, val_split])
    loss_settings, loss_node = config.split(recipe["loss"], class_weights.class_weights)
    weights = class_weights.class_weights(seen.pixels[:-1], seen.image_pixels[:-1], **loss_settings)
    for note in train_split.notes:
        print(note)
    print(table(seen, classes, weights), end="\n\n")
    settings = normalisation(settings, train_split, seen)
    transforms = build_transforms(recipe["augment"], ignore_index=classes.ignore_index, mean=settings["mean"])
    data = DataModule(train_split, val_split, transforms, recipe["seed"], **settings)

    torch.manual_seed(recipe["seed"])
    channels = data.preprocessing.channels
    model = build_model(recipe["model"], len(classes), channels, fresh=fresh or start is not None)
    if start is not None:
        print(transfer.take_over(model, classes, start), end="\n\n")
    if "classes" in source:  # found in the masks: from here on they are a choice, so that a new mask cannot change them
        source = {**source, "classes": train_split.stored_classes.plain()}
    fingerprints = {
        split.split: hashlib.sha256(split.fingerprint.encode()).hexdigest() for split in (train_split, val_split)
    }
    return Prepared(
        data,
        classes,
        model,
        build_loss(loss_node, class_weights=weights, ignore_index=classes.ignore_index),
        config.build(recipe["optimizer"], "optimizer", model=model),
        {**source, **settings},
        {
            "classes": classes.plain(),
            "preprocessing": data.preprocessing.plain(),
            "class_weights": weights,
            "fingerprints": fingerprints,
        },
    )
