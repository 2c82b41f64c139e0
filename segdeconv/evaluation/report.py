"""The evaluation report as a printed table and as report.json."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from segdeconv.classes import Classes
from segdeconv.evaluation.boundary import Boundaries
from segdeconv.evaluation.breakdown import Breakdown
from segdeconv.evaluation.calibration import Calibration
from segdeconv.evaluation.metrics import Scores, number, scores
from segdeconv.evaluation.verdict import Overlap, constant_prediction, verdict
from segdeconv.system.files import replace_text
from segdeconv.system.plain_data import Limits, PlainDataError, parse_json, read_json

REPORT_LIMITS = Limits(size=1 << 28, nodes=4_000_000)  # a report may have rows for every image


class _Report(BaseModel):
    """The entries of a report that are read again; reports of earlier versions lack some."""

    model_config = ConfigDict(strict=True, extra="ignore")

    complete: bool = True
    split: str | None = None
    command: str | None = None
    miou: float | None = None
    pixel_accuracy: float | None = None
    mean_accuracy: float | None = None
    boundary_f1: float | None = None


def report(
    confusion: np.ndarray,
    num_images: int,
    classes: Classes,
    *,
    boundaries: Boundaries | None = None,
    breakdown: Breakdown | None = None,
    split: str | None = None,
    overlap: Overlap | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Return the content of report.json: fractions in 0..1, null where there is nothing to score.

    Args:
        confusion: (C, C) pixel counts, rows = ground truth, columns = prediction.
        num_images: The number of images.
        classes: The classes of the confusion matrix.
        boundaries: The boundary counts, None to leave out boundary scores.
        breakdown: The counts by image and distance, None to leave them out.
        split: The name of the split.
        overlap: Which of the images training has used, if known.
        facts: Further entries: the command, the checkpoint, versions.
    """
    result = scores(confusion)
    boundary = boundaries.compute() if boundaries is not None else None
    better, sentence, details = verdict(confusion, classes, num_images=num_images, split=split, overlap=overlap)
    commonest, baseline = constant_prediction(confusion)
    images = breakdown.images_by_class if breakdown is not None else [None] * len(classes)
    return {
        "verdict": {"better_than_baseline": better, "sentence": sentence, "details": list(details)},
        "baseline": {"class": classes.names[commonest], **_means(baseline)} if confusion.any() else None,
        **_means(result),
        "boundary_f1": number(boundary.f1) if boundary else None,
        "boundary_f1_dilated": number(boundary.f1_dilated) if boundary else None,
        "boundary_iou": number(boundary.iou) if boundary else None,
        "split": split,
        **_used_in_training(overlap),
        "num_images": num_images,
        "num_pixels": int(confusion.sum()),
        "classes": [
            {
                "name": name,
                "iou": number(result.iou[index]),
                "dice": number(result.dice[index]),
                "accuracy": number(result.accuracy[index]),
                "precision": number(result.precision[index]),
                "pixels": int(result.pixels[index]),
                "images": images[index],
                "boundary_f1": number(boundary.f1_by_class[index]) if boundary else None,
                "boundary_f1_dilated": number(boundary.f1_dilated_by_class[index]) if boundary else None,
                "boundary_iou": number(boundary.iou_by_class[index]) if boundary else None,
            }
            for index, name in enumerate(classes.names)
        ],
        "absent": [classes.names[index] for index in result.absent],
        "ignore_index": classes.ignore_index,
        "confusion": confusion.tolist(),
        **(breakdown.report() if breakdown is not None else {}),
        **facts,
    }


def _used_in_training(overlap: Overlap | None) -> dict[str, Any]:
    number = None if overlap is None else overlap.trained_on
    return {
        "trained_on": None if number is None else number > 0,
        "images_trained_on": number,
        "selected_on": None if overlap is None else overlap.selected,
    }


def _means(result: Scores) -> dict[str, float | None]:
    return {
        "miou": number(result.miou),
        "mean_dice": number(result.mean_dice),
        "pixel_accuracy": number(result.pixel_accuracy),
        "mean_accuracy": number(result.mean_accuracy),
        "frequency_weighted_iou": number(result.frequency_weighted),
    }


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a report as JSON, atomically."""
    replace_text(path, as_json(content))


def as_json(content: dict[str, Any]) -> str:
    """Return a report as the JSON that `write_json` writes."""
    return json.dumps(content, indent=1) + "\n"


def read_report(path: Path) -> dict[str, Any]:
    """Read a report.json.

    Raises:
        PlainDataError: The file does not have the form of a report.
        FileNotFoundError: There is no such file.
    """
    report = read_json(path, REPORT_LIMITS, finite=False)
    try:
        TypeAdapter(_Report).validate_python(report)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise PlainDataError(f"is not a report ({'.'.join(map(str, first['loc']))}: {first['msg']})") from error
    return report


def parse_report(content: bytes) -> dict[str, Any] | None:
    """Return the content of a report.json as plain data, or None if it is not a report."""
    try:
        report = parse_json(content, REPORT_LIMITS, finite=False)
    except PlainDataError:
        return None
    return report if isinstance(report, dict) and report.keys() >= {"classes", "confusion", "miou", "split"} else None


def score_table(
    confusion: np.ndarray,
    classes: Classes,
    calibration: Calibration | None = None,
    boundaries: Boundaries | None = None,
) -> str:
    """Return the scores as a text table: one line per class, the means, and the classes left out of them.

    Args:
        confusion: (C, C) pixel counts, rows = ground truth, columns = prediction.
        classes: The classes of the confusion matrix.
        calibration: The calibration, None to leave it out.
        boundaries: The boundary counts, None to leave out boundary scores.
    """
    result = scores(confusion)
    boundary = boundaries.compute() if boundaries is not None else None
    width = max(len(name) for name in (*classes.names, "frequency-weighted IoU"))
    head = f"{'class':<{width}}     IoU    Dice  accuracy  precision      pixels"
    lines = [head + ("  boundary F1" if boundary else "")]
    for index, name in enumerate(classes.names):
        lines.append(
            f"{name:<{width}}  {_percent(result.iou[index])}  {_percent(result.dice[index])}   "
            f"{_percent(result.accuracy[index])}    {_percent(result.precision[index])}  "
            f"{int(result.pixels[index]):>10}" + (f"       {_percent(boundary.f1_by_class[index])}" if boundary else "")
        )
    means = {
        "mean IoU": result.miou,
        "mean Dice": result.mean_dice,
        "pixel accuracy": result.pixel_accuracy,
        "mean accuracy": result.mean_accuracy,
        "frequency-weighted IoU": result.frequency_weighted,
        **({"boundary F1": boundary.f1, "boundary IoU": boundary.iou} if boundary else {}),
    }
    lines += ["", *(f"{name:<{width}}  {_percent(value)}" for name, value in means.items())]
    if calibration is not None and confusion.any():
        lines.append(calibration.summary())
    if result.absent:
        names = ", ".join(classes.names[index] for index in result.absent)
        lines.append(f"left out of the means (in neither ground truth nor prediction): {names}")
    return "\n".join(lines)


def describe_temperature(recorded: Mapping[str, Any]) -> str:
    """Return a line about the temperature in a checkpoint's metadata; see `temperature.Temperature.to_dict`.

    Examples:
        >>> before, after = ({"nll": nll, "expected_calibration_error": nll / 10} for nll in (0.5, 0.25))
        >>> fitted = {"value": 1.5, "standard_error": 0.04, "split": "val", "images": 101}
        >>> print(describe_temperature({**fitted, "before": before, "after": after}).replace("; ", "\\n"))
        temperature 1.500 ± 0.040, fitted on val (101 images)
        NLL 0.5000 before, 0.2500 after
        calibration error 5.00 % before, 2.50 % after
    """
    before, after, spread = recorded["before"], recorded["after"], recorded["standard_error"]
    value = f"{recorded['value']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
    errors = [100 * state["expected_calibration_error"] for state in (before, after)]
    return (
        f"temperature {value}, fitted on {recorded['split']} ({recorded['images']} images); NLL {before['nll']:.4f} "
        f"before, {after['nll']:.4f} after; calibration error {errors[0]:.2f} % before, {errors[1]:.2f} % after"
    )


def describe_class_offsets(recorded: Mapping[str, Any]) -> str:
    """Return a line about the class offsets in a checkpoint's metadata; see `class_offsets.ClassOffsets.to_dict`.

    Examples:
        >>> fitted = {"values": {"road": 0.0, "pole": 0.5}, "split": "train", "images": 367, "checked_on": "val"}
        >>> fitted |= {"before": {"road": 0.8, "pole": 0.2}, "after": {"road": 0.79, "pole": 0.25}}
        >>> print(describe_class_offsets(fitted).replace("; ", "\\n"))
        class offsets fitted on train (367 images): pole +0.50
        mean IoU on val 50.00 % before, 52.00 % after: pole +5.0, road -1.0
    """
    before, after = recorded["before"], recorded["after"]
    moved = ", ".join(f"{name} {value:+.2f}" for name, value in recorded["values"].items() if value)
    changes = {name: 100 * (after[name] - before[name]) for name in before if name in after}
    shown = [f"{name} {changes[name]:+.1f}" for name in sorted(changes, key=changes.__getitem__, reverse=True)]
    shown = [change for change in shown if not change.endswith((" +0.0", " -0.0"))]
    means = [100 * mean_iou(ious) for ious in (before, after)]
    return (
        f"class offsets fitted on {recorded['split']} ({recorded['images']} images): {moved or 'none'}; "
        f"mean IoU on {recorded['checked_on']} {means[0]:.2f} % before, {means[1]:.2f} % after"
        + (f": {', '.join(shown)}" if shown else "")
    )


def describe_instance_statistics(recorded: Mapping[str, Any]) -> str:
    """Return a line about the instance statistics in a checkpoint's metadata; see `InstanceStatistics.to_dict`.

    Examples:
        >>> measured = {"weights": {"encoder": 0.2}, "checked_on": "val", "before": 0.777, "after": 0.78}
        >>> print(describe_instance_statistics(measured).replace("; ", "\\n"))
        instance statistics: encoder 0.2
        mean IoU on val 77.70 % without, 78.00 % with them
    """
    weights = ", ".join(f"{part or 'whole network'} {weight:g}" for part, weight in recorded["weights"].items())
    without, with_them = 100 * recorded["before"], 100 * recorded["after"]
    return (
        f"instance statistics: {weights}; "
        f"mean IoU on {recorded['checked_on']} {without:.2f} % without, {with_them:.2f} % with them"
    )


def mean_iou(ious: Mapping[str, float]) -> float:
    """Return the mean of the IoUs of the classes, NaN if there are none."""
    return sum(ious.values()) / len(ious) if ious else float("nan")


def _percent(value: float) -> str:
    return "   -  " if math.isnan(value) else f"{100 * value:5.1f}%"
