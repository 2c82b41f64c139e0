"""report.html: one evaluation, or two side by side, for a person with a browser."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import yaml

from segdeconv.classes import Classes
from segdeconv.config import TARGET
from segdeconv.data.dataset import PublishedScores, SegmentationDataset
from segdeconv.drawing import draw, html, thumbnails
from segdeconv.drawing.thumbnails import Gallery

MOST_CELLS = 40  # classes of a confusion matrix that is shown in numbers
MOST_CONFUSIONS = 16
BINS = 20  # of the histogram of images by their IoU
SCORES = {
    "miou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "frequency_weighted_iou": "frequency-weighted IoU",
    "boundary_f1": "boundary F1",
}


class Evaluated(NamedTuple):
    """One network's evaluation: what report.json holds, and the pictures."""

    report: Mapping[str, Any]
    gallery: Gallery


class Shown(NamedTuple):
    """An image in the page. scores: its entry in report.json, and of the second network's if there is one."""

    name: str
    kind: str
    rank: int
    scores: Sequence[Mapping[str, Any]]
    pictures: Sequence[tuple[str, html.Picture]]


def build_page(first: Evaluated, dataset: SegmentationDataset, *, second: Evaluated | None = None) -> str:
    """The page of an evaluation; of a comparison where there is a second one, of the same split.

    dataset: what was scored, from which the shown images are read again.
    """
    classes = dataset.classes
    evaluated = [first, *([second] if second else [])]
    reports = [one.report for one in evaluated]
    confusion = np.array(first.report["confusion"])
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    ious = [image["miou"] for image in first.report["images"]]
    return html.render(
        "report.html",
        reports=reports,
        letters=["A", "B"][: len(reports)] if second else [""],
        score_names=SCORES,
        networks=[_named(one, "model") for one in reports],
        data=_named(first.report, "dataset"),
        configurations=[yaml.safe_dump(dict(one["config"]), sort_keys=False, width=1000) for one in reports],
        classes=classes,
        percentiles=_percentiles(first.report),
        published=dataset.published,
        printed=_printed(dataset.published, classes),
        confusion=confusion,
        shares=shares,
        confusion_map=_confusion_map(shares) if len(classes) > MOST_CELLS else None,
        confusion_cells=_cells(confusion, classes),
        confusions=_most_confused(confusion, shares, classes),
        histogram=np.histogram([iou for iou in ious if iou is not None], BINS, (0, 1))[0].tolist(),
        shown=_shown(first, dataset, classes),
        differing=_differing(first, second, dataset, classes) if second else [],
        heat=[html.colour(rgb) for rgb in draw.heat(np.linspace(0, 1, 9)[None], 1)[0]],
    )


def _named(report: Mapping[str, Any], node: str) -> str:
    return str(report["config"][node][TARGET]).rpartition(".")[2]


def _printed(
    published: Sequence[PublishedScores], classes: Classes
) -> tuple[PublishedScores, list[float | None]] | None:
    """The first published scores by class, and its fractions in the order of the classes."""
    for one in published:
        if one.accuracy:
            return one, [one.accuracy[name] / 100 if name in one.accuracy else None for name in classes.names]
    return None


def _percentiles(report: Mapping[str, Any]) -> list[str]:
    kinds = list(report["calibration"]["accuracy_at_coverage"].values())
    return list(kinds[0]) if kinds else []


# The confusion matrix.


def _confusion_map(shares: np.ndarray) -> html.Picture:
    """A pixel for each cell, right in blue, wrong in red, the darker the larger the root of its share."""
    right = np.eye(len(shares), dtype=bool)[:, :, None]
    full = np.where(right, (47, 109, 179), (194, 84, 61))
    strength = np.sqrt(shares)[:, :, None]
    return html.picture((245 * (1 - strength) + full * strength).round().astype(np.uint8), few_colours=True)


def _cells(confusion: np.ndarray, classes: Classes) -> str:
    """For the script: what is not zero."""
    cells = [[int(row), int(column), int(confusion[row, column])] for row, column in np.argwhere(confusion)]
    return json.dumps({"names": classes.names, "cells": cells}, separators=(",", ":"))


def _most_confused(confusion: np.ndarray, shares: np.ndarray, classes: Classes) -> list[dict[str, Any]]:
    wrong = confusion * ~np.eye(len(confusion), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    return [
        {"truth": int(row), "predicted": int(column), "pixels": int(wrong[row, column]), "share": shares[row, column]}
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[row, column]
    ]


# Pictures.


def _shown(one: Evaluated, dataset: SegmentationDataset, classes: Classes) -> list[Shown]:
    entries = one.report["images"]
    chosen = thumbnails.choose([entry["miou"] for entry in entries])
    top = max((float(one.gallery.uncertainty(choice.place).max()) for choice in chosen), default=1.0)
    return [
        Shown(
            entries[choice.place]["name"],
            choice.kind,
            choice.rank,
            [entries[choice.place]],
            _pictures([one], dataset, choice.place, classes, top),
        )
        for choice in chosen
    ]


def _differing(first: Evaluated, second: Evaluated, dataset: SegmentationDataset, classes: Classes) -> list[Shown]:
    """The images whose IoUs differ most, the largest difference first; those with none are left out."""
    pairs = list(zip(first.report["images"], second.report["images"], strict=True))
    gaps = [abs((one["miou"] or 0) - (other["miou"] or 0)) for one, other in pairs]
    order = [int(index) for index in np.argsort(-np.array(gaps), kind="stable") if gaps[index]][: 2 * thumbnails.EACH]
    return [
        Shown(
            pairs[index][0]["name"],
            "differing",
            place + 1,
            pairs[index],
            _pictures([first, second], dataset, index, classes, None),
        )
        for place, index in enumerate(order)
    ]


def _pictures(
    evaluated: Sequence[Evaluated], dataset: SegmentationDataset, index: int, classes: Classes, top: float | None
) -> list[tuple[str, html.Picture]]:
    """Image and truth, then prediction and error of each network, then the uncertainty if its largest is given."""
    image, mask, _ = dataset[index]
    small, truth = thumbnails.smaller(image, mask)
    pictures = [("image", html.picture(small)), ("truth", _map(truth, classes))]
    for letter, one in zip(("",) if len(evaluated) == 1 else (" of A", " of B"), evaluated, strict=True):
        prediction = one.gallery.prediction(index)
        wrong = draw.error(truth, prediction, classes.ignore_index)
        pictures += [
            (f"prediction{letter}", _map(prediction, classes)),
            (f"error{letter}", html.picture(wrong, few_colours=True)),
        ]
        if top is not None:
            heat = draw.heat(one.gallery.uncertainty(index), top)
            pictures.append((f"uncertainty{letter}", html.picture(np.ascontiguousarray(heat))))
    return pictures


def _map(labels: np.ndarray, classes: Classes) -> html.Picture:
    return html.picture(draw.colourise(labels, classes), few_colours=True)
