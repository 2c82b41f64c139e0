"""The page report.html: one evaluation, or two side by side."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import yaml

from segdeconv.classes import Classes, hex_colour
from segdeconv.config import TARGET
from segdeconv.data.dataset import PublishedScores, SegmentationDataset
from segdeconv.drawing import draw, html, thumbnails
from segdeconv.drawing.thumbnails import Gallery
from segdeconv.evaluation.learning_curve import HEIGHT, WIDTH, LearningCurve, charts
from segdeconv.evaluation.report import describe_class_offsets, describe_instance_statistics, describe_temperature
from segdeconv.evaluation.verdict import foreground

MAX_CELL_CLASSES = 40  # a confusion matrix of more classes is shown as a map
MAX_CONFUSIONS = 16
BINS = 20  # of the histogram of the mean IoUs of images
SCORES = {
    "miou": "mean IoU",
    "mean_dice": "mean Dice",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "frequency_weighted_iou": "frequency-weighted IoU",
    "boundary_f1": "boundary F1",
}


class Evaluated(NamedTuple):
    """The evaluation of one network, as shown on the page.

    Attributes:
        report: The content of report.json.
        gallery: The pictures.
        curve: The learning curve of its run, if there is one.
    """

    report: Mapping[str, Any]
    gallery: Gallery
    curve: LearningCurve | None = None


class ImageEntry(NamedTuple):
    """An image on the page.

    Attributes:
        name: The name of the image.
        kind: The reason it is shown: `worst`, `median`, `best`, `all` or `differing`.
        rank: Its rank among the images of its kind, from 1.
        scores: Its entry in report.json, and that of the second network if there is one.
        pictures: The captions and pictures.
    """

    name: str
    kind: str
    rank: int
    scores: Sequence[Mapping[str, Any]]
    pictures: Sequence[tuple[str, html.Picture]]


def build_page(
    first: Evaluated,
    dataset: SegmentationDataset,
    *,
    second: Evaluated | None = None,
    window: draw.Window | None = None,
) -> str:
    """Return the HTML of the page of an evaluation, or of a comparison of two.

    Args:
        first: The evaluation.
        dataset: The evaluated split, from which the images on the page are read again.
        second: The evaluation of a second network on the same split, None for a page without comparison.
        window: The window in which images are shown; None for `draw.to_rgb`.
    """
    classes = dataset.classes
    evaluated = [first, *([second] if second else [])]
    reports = [evaluation.report for evaluation in evaluated]
    confusion = np.array(first.report["confusion"])
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    ious = [image["miou"] for image in first.report["images"]]
    return html.render(
        "report.html",
        reports=reports,
        letters=["A", "B"][: len(reports)] if second else [""],
        score_names=SCORES,
        networks=[_class_name(report, "model") for report in reports],
        data=_class_name(first.report, "dataset"),
        configs=[yaml.safe_dump(dict(report["config"]), sort_keys=False, width=1000) for report in reports],
        classes=classes,
        foreground=foreground(classes),
        curves=[(evaluation.curve, charts(evaluation.curve) if evaluation.curve else []) for evaluation in evaluated],
        chart_size=(WIDTH, HEIGHT),
        percentiles=_percentiles(first.report),
        temperatures=[describe_temperature(each["temperature"]) if each["temperature"] else None for each in reports],
        class_offsets=[
            describe_class_offsets(each["class_offsets"]) if each["class_offsets"] else None for each in reports
        ],
        instance_statistics=[
            describe_instance_statistics(each["instance_statistics"]) if each["instance_statistics"] else None
            for each in reports
        ],
        published=dataset.published,
        published_by_class=_published_by_class(dataset.published, classes),
        confusion=confusion,
        shares=shares,
        confusion_map=_confusion_map(shares) if len(classes) > MAX_CELL_CLASSES else None,
        confusion_cells=_cells(confusion, classes),
        confusions=_most_confused(confusion, shares, classes),
        histogram=np.histogram([iou for iou in ious if iou is not None], BINS, (0, 1))[0].tolist(),
        shown=_shown_images(first, dataset, classes, window),
        differing=_differing_images(first, second, dataset, classes, window) if second else [],
        heat=[hex_colour(rgb) for rgb in draw.heat(np.linspace(0, 1, 9)[None], 1)[0]],
    )


def _class_name(report: Mapping[str, Any], node: str) -> str:
    return str(report["config"][node][TARGET]).rpartition(".")[2]


def _published_by_class(
    published: Sequence[PublishedScores], classes: Classes
) -> tuple[PublishedScores, list[float | None]] | None:
    """Return the first published scores that are given by class, and the accuracies in the order of the classes."""
    for scores in published:
        if scores.accuracy:
            return scores, [scores.accuracy[name] / 100 if name in scores.accuracy else None for name in classes.names]
    return None


def _percentiles(report: Mapping[str, Any]) -> list[str]:
    kinds = list(report["calibration"]["accuracy_at_coverage"].values())
    return list(kinds[0]) if kinds else []


def _confusion_map(shares: np.ndarray) -> html.Picture:
    """Draw a pixel per cell: correct blue, wrong red, the darker the larger the square root of its fraction."""
    correct = np.eye(len(shares), dtype=bool)[:, :, None]
    full = np.where(correct, (47, 109, 179), (194, 84, 61))
    strength = np.sqrt(shares)[:, :, None]
    return html.picture((245 * (1 - strength) + full * strength).round().astype(np.uint8), few_colours=True)


def _cells(confusion: np.ndarray, classes: Classes) -> str:
    """Return the nonzero cells as JSON for the script of the page."""
    cells = [[int(row), int(column), int(confusion[row, column])] for row, column in np.argwhere(confusion)]
    return json.dumps({"names": classes.names, "cells": cells}, separators=(",", ":"))


def _most_confused(confusion: np.ndarray, shares: np.ndarray, classes: Classes) -> list[dict[str, Any]]:
    wrong = confusion * ~np.eye(len(confusion), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_CONFUSIONS]
    return [
        {"truth": int(row), "predicted": int(column), "pixels": int(wrong[row, column]), "share": shares[row, column]}
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[row, column]
    ]


def _shown_images(
    evaluated: Evaluated, dataset: SegmentationDataset, classes: Classes, window: draw.Window | None
) -> list[ImageEntry]:
    entries = evaluated.report["images"]
    chosen = thumbnails.choose([entry["miou"] for entry in entries])
    top = max((float(evaluated.gallery.uncertainty(choice.place).max()) for choice in chosen), default=1.0)
    return [
        ImageEntry(
            entries[choice.place]["name"],
            choice.kind,
            choice.rank,
            [entries[choice.place]],
            _pictures([evaluated], dataset, choice.place, classes, top, window),
        )
        for choice in chosen
    ]


def _differing_images(
    first: Evaluated,
    second: Evaluated,
    dataset: SegmentationDataset,
    classes: Classes,
    window: draw.Window | None,
) -> list[ImageEntry]:
    """Return the images whose mean IoUs differ most, the largest difference first, without those that are equal."""
    pairs = list(zip(first.report["images"], second.report["images"], strict=True))
    gaps = [abs((scores["miou"] or 0) - (other["miou"] or 0)) for scores, other in pairs]
    order = [int(index) for index in np.argsort(-np.array(gaps), kind="stable") if gaps[index]][: 2 * thumbnails.EACH]
    return [
        ImageEntry(
            pairs[index][0]["name"],
            "differing",
            rank,
            pairs[index],
            _pictures([first, second], dataset, index, classes, None, window),
        )
        for rank, index in enumerate(order, start=1)
    ]


def _pictures(
    evaluated: Sequence[Evaluated],
    dataset: SegmentationDataset,
    index: int,
    classes: Classes,
    top: float | None,
    window: draw.Window | None,
) -> list[tuple[str, html.Picture]]:
    """Return image and ground truth, then prediction, error and, unless `top` is None, uncertainty per network.

    `top` is the uncertainty that is drawn brightest.
    """
    image, mask, _ = dataset[index]
    small, truth = thumbnails.smaller(draw.windowed(image, window), mask)
    pictures = [("image", html.picture(small)), ("truth", _map(truth, classes))]
    for letter, evaluation in zip(("",) if len(evaluated) == 1 else (" of A", " of B"), evaluated, strict=True):
        prediction = evaluation.gallery.prediction(index)
        wrong = draw.error(truth, prediction, classes.ignore_index)
        pictures += [
            (f"prediction{letter}", _map(prediction, classes)),
            (f"error{letter}", html.picture(wrong, few_colours=True)),
        ]
        if top is not None:
            heat = draw.heat(evaluation.gallery.uncertainty(index), top)
            pictures.append((f"uncertainty{letter}", html.picture(np.ascontiguousarray(heat))))
    return pictures


def _map(labels: np.ndarray, classes: Classes) -> html.Picture:
    return html.picture(draw.colourise(labels, classes), few_colours=True)
