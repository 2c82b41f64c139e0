"""One evaluation of a network on a split: the scores, as a table and as report.json."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from segdeconv.allocation import keep_freed
from segdeconv.boundary import Boundaries
from segdeconv.calibration import Calibration
from segdeconv.checkpoint import Checkpoint
from segdeconv.classes import Classes
from segdeconv.config import TARGET
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.loading import EvaluationSamples, evaluation_loader, for_network, loader_failures_in_words
from segdeconv.data.relabelled import in_order_of
from segdeconv.data.transforms import Preprocessing
from segdeconv.durable import replace_text
from segdeconv.errors import UsageError
from segdeconv.inference import (
    Samples,
    Scorer,
    flipped,
    labels_and_confidence,
    ready,
    resized,
    resolve_precision,
    sampled,
    scorer_on,
    softmaxed,
    thrifty,
)
from segdeconv.metrics import ConfusionMatrix, Scores, scores
from segdeconv.models import SegmentationModel
from segdeconv.regions import Predictor


def scorer_of(
    model: SegmentationModel,
    device: torch.device,
    precision: str,
    *,
    flip: bool = False,
) -> Scorer:
    """A trained network as a function from normalised images of any size to class scores; uses a copy of it."""
    return _scorer(ready(model, device, precision), device, precision, flip=flip)


def _scorer(
    network: SegmentationModel,
    device: torch.device,
    precision: str,
    *,
    flip: bool,
) -> Scorer:
    keep_freed(device)
    whole = thrifty(scorer_on(network, device, precision, network.minimum_size))
    return flipped(whole) if flip else whole


def sampler_of(
    model: SegmentationModel, device: torch.device, precision: str, samples: int, *, flip: bool = False
) -> Callable[[torch.Tensor], Samples]:
    """A trained network with dropout as a function from normalised images of any size to what its samples say."""
    network = ready(model, device, precision)
    score = _scorer(network, device, precision, flip=flip)
    return sampled(score if flip else softmaxed(score), network, samples)


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
    on_prediction: Callable[[SegmentationDataset, int, np.ndarray], None] | None = None,
) -> tuple[np.ndarray, int]:
    """Predict every image of a split and count against its mask at the mask's own size.

    samples: passes with dropout whose mean is scored (`sampled`); 0 for one pass without, the average of the weights.
    calibration: counts the pixels too. boundaries: compares the outlines.
    look: gives an image's probabilities in place of one pass over the whole of it (`prediction.predictor_of`).
    on_prediction: called with the data set, each image's index and its (H, W) uint8 mask, exactly as counted.
    Returns the (C, C) int64 confusion matrix, rows = truth, and the number of images.
    """
    dataset = restore_dataset(checkpoint, split_name)
    settings = checkpoint.config["dataset"]
    batches: Iterable[dict[str, Any]]
    draw = None
    if look is None:
        preprocessing = Preprocessing.restore({**checkpoint.facts["preprocessing"], "size": settings["size"]})
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
            for position, stored in enumerate(batch["mask"]):
                mask, size = stored.to(device), (stored.shape[0], stored.shape[1])
                one = resized(scores[position : position + 1], size)
                known = flip or samples > 0 or look is not None
                (prediction,), (confidence,) = labels_and_confidence(one, probabilities=known)
                matrix.update(prediction, mask)
                if calibration is not None:
                    uncertainty = resized(drawn.uncertainty[position, None, None], size) if drawn else None
                    calibration.update(prediction, confidence, mask, uncertainty)
                found = prediction.cpu().numpy()
                if boundaries is not None:
                    boundaries.update(found, stored.numpy())
                if on_prediction is not None:
                    on_prediction(dataset, index, found)
                index += 1
                bar.update()
    return matrix.compute(), len(dataset)


def report(
    confusion: np.ndarray,
    num_images: int,
    classes: Classes,
    *,
    boundaries: Boundaries | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """The content of report.json: fractions in 0..1, null where there is nothing to score.

    facts: what else to note: the command, the checkpoint, versions.
    """
    result = scores(confusion)
    outlines = boundaries.compute() if boundaries is not None else None
    return {
        "miou": _number(result.miou),
        "pixel_accuracy": _number(result.pixel_accuracy),
        "mean_accuracy": _number(result.mean_accuracy),
        "frequency_weighted_iou": _number(result.frequency_weighted),
        "boundary_f1": _number(outlines.f1) if outlines else None,
        "boundary_f1_dilated": _number(outlines.f1_dilated) if outlines else None,
        "boundary_iou": _number(outlines.iou) if outlines else None,
        "num_images": num_images,
        "num_pixels": int(confusion.sum()),
        "classes": [
            {
                "name": name,
                "iou": _number(result.iou[index]),
                "accuracy": _number(result.accuracy[index]),
                "precision": _number(result.precision[index]),
                "pixels": int(result.pixels[index]),
                "boundary_f1": _number(outlines.f1_by_class[index]) if outlines else None,
                "boundary_f1_dilated": _number(outlines.f1_dilated_by_class[index]) if outlines else None,
                "boundary_iou": _number(outlines.iou_by_class[index]) if outlines else None,
            }
            for index, name in enumerate(classes.names)
        ],
        "absent": [classes.names[index] for index in result.absent],
        "ignore_index": classes.ignore_index,
        "confusion": confusion.tolist(),
        **facts,
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=1) + "\n")


def table(
    confusion: np.ndarray,
    classes: Classes,
    calibration: Calibration | None = None,
    boundaries: Boundaries | None = None,
) -> str:
    """The scores for reading: one line per class, then the means; what was left out is said."""
    result = scores(confusion)
    outlines = boundaries.compute() if boundaries is not None else None
    width = max(len(name) for name in (*classes.names, "frequency-weighted IoU"))
    lines = [f"{'class':<{width}}     IoU  accuracy  precision      pixels" + ("  boundary F1" if outlines else "")]
    for index, name in enumerate(classes.names):
        lines.append(
            f"{name:<{width}}  {_percent(result.iou[index])}   {_percent(result.accuracy[index])}    "
            f"{_percent(result.precision[index])}  {int(result.pixels[index]):>10}"
            + (f"       {_percent(outlines.f1_by_class[index])}" if outlines else "")
        )
    lines.append("")
    lines += [f"{name:<{width}}  {_percent(value)}" for name, value in summary(result)]
    if outlines:
        lines += [
            f"{'boundary F1':<{width}}  {_percent(outlines.f1)}",
            f"{'boundary IoU':<{width}}  {_percent(outlines.iou)}",
        ]
    if calibration is not None and confusion.any():
        lines.append(calibration.sentence())
    if result.absent:
        names = ", ".join(classes.names[index] for index in result.absent)
        lines.append(f"left out of the means, in neither truth nor prediction: {names}")
    return "\n".join(lines)


def summary(result: Scores) -> Iterable[tuple[str, float]]:
    """The four numbers of a split, by their names."""
    yield "mean IoU", result.miou
    yield "pixel accuracy", result.pixel_accuracy
    yield "mean accuracy", result.mean_accuracy
    yield "frequency-weighted IoU", result.frequency_weighted


def _percent(value: float) -> str:
    return "   -  " if math.isnan(value) else f"{100 * value:5.1f}%"
