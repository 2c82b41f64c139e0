"""Scoring a network on a split of the data set that it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.classes import Classes
from segdeconv.config import TARGET
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.loading import EvaluationSamples, evaluation_loader, for_network, loader_failures_in_words
from segdeconv.data.relabelled import in_order_of
from segdeconv.errors import UsageError
from segdeconv.evaluation.boundary import Boundaries
from segdeconv.evaluation.calibration import Calibration
from segdeconv.evaluation.metrics import ConfusionMatrix
from segdeconv.inference.dropout_sampling import entropy, sampler_of
from segdeconv.inference.regions import Predictor
from segdeconv.inference.scorers import (
    labels_and_confidence,
    resized,
    scorer_of,
)
from segdeconv.system.devices import resolve_precision


def restore_dataset(checkpoint: Checkpoint, split_name: str) -> SegmentationDataset:
    """The split of the data set that a checkpoint's recipe names, whose classes must be the network's."""
    from segdeconv.data.module import build_split, check_dataset  # late: Lightning takes 3 s to import

    node = check_dataset(checkpoint.config["dataset"])
    dataset = build_split(node, split_name)
    ours, theirs = checkpoint.classes, dataset.classes
    if set(theirs.names) != set(ours.names):
        first = next(name for name in (*theirs.names, *ours.names) if (name in theirs.names) != (name in ours.names))
        raise UsageError(
            f"{checkpoint.path} was trained for {len(ours)} classes ({_some(ours)}) and {node[TARGET]} has "
            f"{len(theirs)} ({_some(theirs)}); '{first}' is in one only - use its own data set, or rename, merge and "
            "ignore classes with dataset.label_map={theirs: its, other: ignore}"
        )
    if (theirs.names, theirs.ignore_index) != (ours.names, ours.ignore_index):
        dataset = in_order_of(dataset, ours)
    channels = len(checkpoint.facts["preprocessing"]["mean"])
    if dataset.channels != channels:
        raise UsageError(
            f"{checkpoint.path} was trained on images of {channels} channel(s) and {node[TARGET]} gives "
            f"{dataset.channels} - leave dataset.channels as it was"
        )
    return dataset


def _some(classes: Classes) -> str:
    return ", ".join(classes.names[:3]) + (", ..." if len(classes) > 3 else "")


def class_order(checkpoint: Checkpoint, classes: Classes) -> list[int] | None:
    """The network's index of each class, by name; None where that is the class's own."""
    names = checkpoint.classes.names
    if different := sorted(set(names) ^ set(classes.names)):
        raise UsageError(
            f"{checkpoint.path} was trained for {len(names)} classes and the data has {len(classes)}; "
            f"'{different[0]}' is in one only - compare networks of the same classes, which are matched by their names"
        )
    return None if names == classes.names else [names.index(name) for name in classes.names]


class Predicted(NamedTuple):
    """What a network says of one image of a data set.

    mask, prediction: (H, W) uint8, exactly as counted. uncertainty: (H, W) float32, the variance of its samples if
    there are some, averaged over the classes, otherwise the entropy of its class probabilities, in nats.
    """

    dataset: SegmentationDataset
    place: int
    mask: np.ndarray
    prediction: np.ndarray
    uncertainty: np.ndarray


OnPrediction = Callable[[Predicted], None]


def evaluate(
    checkpoint: Checkpoint,
    split_name: str,
    *,
    device: torch.device,
    precision: str = "auto",
    flip: bool = False,
    samples: int = 0,
    calibration: Calibration | None = None,
    boundaries: Boundaries | None = None,
    look: Predictor | None = None,
    on: SegmentationDataset | None = None,
    on_prediction: OnPrediction | None = None,
) -> tuple[np.ndarray, int]:
    """Predict every image of a split and count against its mask at the mask's own size.

    samples: passes with dropout whose mean is scored (`sampled`); 0 for one pass without, the average of the weights.
    calibration: counts the pixels too. boundaries: compares the outlines.
    look: gives an image's probabilities in place of one pass over the whole of it (`prediction.predictor_of`).
    on: a data set in place of the checkpoint's own, of the same classes, in whose order is counted.
    on_prediction: called with each image.
    Returns the (C, C) int64 confusion matrix, rows = truth, and the number of images.
    """
    dataset = restore_dataset(checkpoint, split_name) if on is None else on
    order = class_order(checkpoint, dataset.classes)
    settings = checkpoint.config["dataset"]
    batches: Iterable[dict[str, Any]]
    draw = None
    if look is None:
        preprocessing = checkpoint.preprocessing
        loaded = evaluation_loader(
            EvaluationSamples(dataset, preprocessing),
            batch_size=settings["batch_size"],
            num_workers=settings["num_workers"],
            timeout=settings["timeout"],
        )
        moved = ({**batch, "image": batch["image"].to(device)} for batch in loaded)
        batches = (for_network(batch, preprocessing) for batch in moved)
        precision = resolve_precision(precision, checkpoint.facts["precision"])
        model = checkpoint.model()
        score = scorer_of(model, device, precision, flip=flip)
        draw = sampler_of(model, device, precision, samples, flip=flip) if samples else None
    else:
        whole_ones = (dataset[place] for place in range(len(dataset)))
        batches = ({"image": image, "mask": [torch.tensor(mask)], "name": name} for image, mask, name in whole_ones)
    if calibration is not None:
        calibration.to(device)
    matrix = ConfusionMatrix(len(dataset.classes), dataset.classes.ignore_index).to(device)
    index = 0
    bar = tqdm(total=len(dataset), desc=f"evaluating {split_name}", unit="image", disable=None)
    with loader_failures_in_words(), bar:
        for batch in batches:
            drawn = draw(batch["image"]) if draw else None
            if look is not None:
                scores = look(batch["image"], batch["name"])
            else:
                scores = drawn.probabilities if drawn else score(batch["image"])
            scores = scores if order is None else scores[:, order]
            for position, stored in enumerate(batch["mask"]):
                mask, size = stored.to(device), (stored.shape[0], stored.shape[1])
                one = resized(scores[position : position + 1], size)
                known = flip or samples > 0 or look is not None
                (prediction,), (confidence,) = labels_and_confidence(one, probabilities=known)
                matrix.update(prediction, mask)
                uncertainty = resized(drawn.uncertainty[position, None, None], size)[0, 0] if drawn else None
                if calibration is not None:
                    calibration.update(prediction, confidence, mask, uncertainty)
                found = prediction.cpu().numpy()
                if boundaries is not None:
                    boundaries.update(found, stored.numpy())
                if on_prediction is not None:
                    spread = entropy(one, probabilities=known)[0] if uncertainty is None else uncertainty
                    on_prediction(Predicted(dataset, index, stored.numpy(), found, spread.float().cpu().numpy()))
                index += 1
                bar.update()
    return matrix.compute(), len(dataset)
