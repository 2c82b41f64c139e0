"""Construction of the data pipeline, network, loss and optimizer from a checked config."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from segdeconv.checkpoints import checkpoint, transfer
from segdeconv.classes import Classes
from segdeconv.config import with_objects
from segdeconv.data import checks, sample_digests
from segdeconv.data.class_inference import BINARY
from segdeconv.data.inspection import class_table, inspect_all
from segdeconv.data.module import DataPipeline, build_pipeline, build_split, normalisation
from segdeconv.data.sample_digests import SampleDigest
from segdeconv.errors import command, warn
from segdeconv.losses import build_loss, compute_class_weights
from segdeconv.losses.class_weights import FORMULAS
from segdeconv.models import SegmentationModel, build_model
from segdeconv.optimization import build_optimizer
from segdeconv.system.files import hash_text
from segdeconv.training import autoconfig, resume
from segdeconv.training.config_check import TIME_BUDGET, check_config, seconds


class Prepared(NamedTuple):
    """The objects that a config describes.

    Attributes:
        config: The config, with the keys of `auto` chosen.
        data: The data pipeline.
        classes: The classes of the data set.
        model: The network.
        loss: The loss.
        optimizer: The optimizer of the network's parameters.
        dataset: The `dataset` node as it is saved in checkpoints.
        metadata: Classes, preprocessing, class weights and fingerprints of the data, as plain data.
        digests: The hashes of the images and masks of both splits.
    """

    config: dict[str, Any]
    data: DataPipeline
    classes: Classes
    model: SegmentationModel
    loss: nn.Module
    optimizer: Optimizer
    dataset: dict[str, Any]
    metadata: dict[str, Any]
    digests: dict[str, list[SampleDigest]]


def prepare(
    config: Mapping[str, Any], objects: Mapping[str, Callable[..., Any]] | None = None, *, fresh: bool = False
) -> Prepared:
    """Inspect the data, print its classes, and build the objects of a checked config.

    Args:
        config: The checked config, as it is written.
        objects: The functions that stand in it for objects of the program, by group; see `config.stand_in`.
        fresh: Build without pretrained weights, because the checkpoint of a resumed run will be loaded.

    Raises:
        UsageError: The data or a checkpoint named by the config is invalid.
    """
    start = None
    if config["init_from"] is not None and not fresh:
        start = checkpoint.read(config["init_from"], trust=resume.AnyName())
    source = with_objects(config, objects or {})["dataset"]
    train_split, val_split = (build_split(source, split) for split in ("train", "val"))
    classes = train_split.classes
    inspections = inspect_all([train_split, val_split])
    statistics = inspections[0]
    choosing = config["auto"] and not fresh
    if config["time_budget"] != TIME_BUDGET and not {"trainer.max_epochs", "model.width"} & set(config["auto"]):
        warn(
            "time_budget has no effect, since nothing is chosen by it: steps and width are given, or have the defaults "
            "of this data set - leave it out, set auto=[trainer.max_epochs], or stop after a time with max_time"
        )
    # A chosen size is printed with its reason; only a typed one can be a mistake.
    size = None if choosing and "dataset.size" in config["auto"] else config["dataset"]["size"]
    findings = checks.review([train_split, val_split], inspections, size)
    checks.refuse(findings)
    for finding in findings:
        warn(finding.message)
    choices: list[autoconfig.Choice] = []
    if choosing:
        config, choices = autoconfig.choose(
            config,
            (train_split, val_split),
            inspections,
            check=check_config,
            seconds=seconds(config["time_budget"]),
            start=None if start is None else start.config["model"],
        )
    train_on_val = config["dataset"]["train_on_val"]
    trained = inspections if train_on_val else [statistics]
    weights = compute_class_weights(
        config["loss"],
        np.sum([inspection.pixels for inspection in trained], axis=0)[:-1].tolist(),
        np.sum([inspection.image_pixels for inspection in trained], axis=0)[:-1].tolist(),
    )
    if config["loss"].get("class_weighting") in FORMULAS and train_split.whole is not train_split:
        warn(
            "class weights count the pixels of whole images, in which objects are rarer than in the crops that are "
            "trained on - leave out loss.class_weighting, or train on whole images"
        )
    if train_on_val:
        warn(
            f"dataset.train_on_val=true trains on the {len(val_split)} val images too, so their scores say nothing "
            "about other images - use last.ckpt, which no score has chosen"
        )
    for note in train_split.notes:
        print(note)
    print(class_table(statistics, classes, weights))
    if train_split.unwrapped.inferred_classes and train_split.stored_classes.names != BINARY:
        folder = f"dataset.root={config['dataset']['root']}"
        inspect_data = command("inspect_data", ["dataset=folder", folder])
        print(f"  no file names these classes - to get one to edit: {inspect_data}")
    print()
    if choices:
        print(autoconfig.table(choices), end="\n\n")
    dataset = normalisation(config["dataset"], train_split, statistics)
    data = build_pipeline(dataset, config["augment"], train_split, val_split, seed=config["seed"])

    torch.manual_seed(config["seed"])
    channels = data.preprocessing.channels
    nodes = with_objects(config, objects or {})
    model = build_model(nodes["model"], len(classes), channels, fresh=fresh or start is not None)
    if start is not None:
        print(transfer.transfer_weights(model, classes, start), end="\n\n")
    if "classes" in dataset:  # inferred from the masks; saved, so that new masks cannot change them
        dataset = {**dataset, "classes": train_split.stored_classes.to_dict()}
    fingerprints = {split.split: hash_text(split.fingerprint) for split in (train_split, val_split)}
    digests = {
        split.split: sample_digests.digests_of(inspection, split)
        for split, inspection in zip((train_split, val_split), inspections, strict=True)
    }
    return Prepared(
        dict(config),
        data,
        classes,
        model,
        build_loss(nodes["loss"], class_weights=weights, ignore_index=classes.ignore_index),
        build_optimizer(nodes["optimizer"], model),
        dataset,
        {
            "classes": classes.to_dict(),
            "preprocessing": data.preprocessing.to_dict(),
            "class_weights": weights,
            "fingerprints": fingerprints,
            "data": {split: sample_digests.combined(samples) for split, samples in digests.items()},
        },
        digests,
    )
