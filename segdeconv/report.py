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

from segdeconv.checkpoint import Checkpoint
from segdeconv.classes import Classes
from segdeconv.config import TARGET
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.loading import EvaluationSamples, evaluation_loader
from segdeconv.data.transforms import Preprocessing
from segdeconv.errors import UsageError
from segdeconv.inference import Scorer, autocast, flipped, labels, padded, resolve_precision
from segdeconv.metrics import ConfusionMatrix, Scores, scores
from segdeconv.models import SegmentationModel


def scorer_of(model: SegmentationModel, device: torch.device, precision: str, *, flip: bool = False) -> Scorer:
    """A trained network as a function from normalised images of any size to class scores."""
    network = model.to(device).to(memory_format=torch.channels_last)

    def score(image: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), autocast(precision, device):
            return network(image.to(device).contiguous(memory_format=torch.channels_last))

    whole = padded(score, model.minimum_size)
    return flipped(whole) if flip else whole


def restore_dataset(checkpoint: Checkpoint, split_name: str) -> SegmentationDataset:
    """The split of the data set that a checkpoint's recipe names, whose classes must be the network's."""
    from segdeconv.data.module import build_split, check_dataset  # late: Lightning takes 3 s to import

    node = check_dataset(checkpoint.config["dataset"])
    dataset = build_split(node, split_name)
    if dataset.classes.names != checkpoint.classes.names:
        raise UsageError(
            f"{checkpoint.path} was trained for {len(checkpoint.classes)} classes ({_some(checkpoint.classes)}) and "
            f"{node[TARGET]} has {len(dataset.classes)} ({_some(dataset.classes)}) - use its own data set"
        )
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
    on_prediction: Callable[[SegmentationDataset, int, np.ndarray], None] | None = None,
) -> tuple[np.ndarray, int]:
    """Predict every image of a split and count against its mask at the mask's own size.

    on_prediction: called with the data set, each image's index and its (H, W) uint8 mask, exactly as counted.
    Returns the (C, C) int64 confusion matrix, rows = truth, and the number of images.
    """
    dataset = restore_dataset(checkpoint, split_name)
    settings = checkpoint.config["dataset"]
    loader = evaluation_loader(
        EvaluationSamples(
            dataset, Preprocessing.restore({**checkpoint.facts["preprocessing"], "size": settings["size"]})
        ),
        batch_size=settings["batch_size"],
        num_workers=settings["num_workers"],
        timeout=settings["timeout"],
    )
    precision = resolve_precision(precision, checkpoint.facts["precision"])
    score = scorer_of(checkpoint.model(), device, precision, flip=flip)
    matrix = ConfusionMatrix(len(dataset.classes), dataset.classes.ignore_index).to(device)
    index = 0
    with tqdm(total=len(dataset), desc=f"evaluating {split_name}", unit="image", disable=None) as bar:
        for batch in loader:
            logits = score(batch["image"])
            for position, mask in enumerate(batch["mask"]):
                prediction = labels(logits[position : position + 1], (mask.shape[0], mask.shape[1]))[0]
                matrix.update(prediction, mask.to(device))
                if on_prediction is not None:
                    on_prediction(dataset, index, prediction.cpu().numpy())
                index += 1
                bar.update()
    return matrix.compute(), len(dataset)


def report(confusion: np.ndarray, num_images: int, classes: Classes, **facts: Any) -> dict[str, Any]:
    """The content of report.json: fractions in 0..1, null where there is nothing to score.

    facts: what else to note: the command, the checkpoint, versions.
    """
    result = scores(confusion)
    return {
        "miou": _number(result.miou),
        "pixel_accuracy": _number(result.pixel_accuracy),
        "mean_accuracy": _number(result.mean_accuracy),
        "frequency_weighted_iou": _number(result.frequency_weighted),
        "boundary_f1": None,
        "num_images": num_images,
        "num_pixels": int(confusion.sum()),
        "classes": [
            {
                "name": name,
                "iou": _number(result.iou[index]),
                "accuracy": _number(result.accuracy[index]),
                "precision": _number(result.precision[index]),
                "pixels": int(result.pixels[index]),
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
    partial = path.with_name(f".tmp-{path.name}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def table(confusion: np.ndarray, classes: Classes) -> str:
    """The scores for reading: one line per class, then the means; what was left out is said."""
    result = scores(confusion)
    width = max(len(name) for name in (*classes.names, "frequency-weighted IoU"))
    lines = [f"{'class':<{width}}     IoU  accuracy  precision      pixels"]
    for index, name in enumerate(classes.names):
        lines.append(
            f"{name:<{width}}  {_percent(result.iou[index])}   {_percent(result.accuracy[index])}    "
            f"{_percent(result.precision[index])}  {int(result.pixels[index]):>10}"
        )
    lines.append("")
    lines += [f"{name:<{width}}  {_percent(value)}" for name, value in summary(result)]
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
