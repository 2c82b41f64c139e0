"""From the arguments of evaluate and predict to the function that labels an image by more than one look at it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from segdeconv.checkpoints import checkpoint
from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.config import check, override
from segdeconv.data.proposals import source
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.inference.crf import CRF, refine
from segdeconv.inference.regions import Predictor, by_regions, ensemble, softmaxed, whole
from segdeconv.inference.scorers import Scorer, scorer_of
from segdeconv.models import SegmentationModel
from segdeconv.system.devices import resolve_precision


def predictor_of(
    read: Checkpoint,
    model: SegmentationModel,
    arguments: argparse.Namespace,
    crf_keys: Iterable[str],
    device: torch.device,
) -> Predictor:
    """What `options.add_looks` was told, for a checkpoint's network: an image and its name -> (1, C, H, W)
    probabilities.
    """
    if arguments.samples or (arguments.flip and (arguments.regions or arguments.ensemble)):
        raise UsageError(
            "--samples and --flip give mean probabilities, and --regions and --ensemble take the scores before them - "
            "leave one of them out (--crf goes with --flip)"
        )
    precision = resolve_precision(arguments.precision, read.facts["precision"])
    score = scorer_of(model, device, precision, flip=arguments.flip)
    predict = _by_regions(read, score, arguments) if arguments.regions else whole(score, read.preprocessing)
    if arguments.ensemble:
        other = checkpoint.read(arguments.ensemble, trust=arguments.trust)
        order = _order(read, other)
        second = scorer_of(other.model(), device, resolve_precision(arguments.precision, other.facts["precision"]))
        predict = ensemble(predict, whole(second, other.preprocessing), arguments.ensemble_mode, order)
    elif not arguments.flip:
        predict = softmaxed(predict)
    return _refined(predict, crf_settings(crf_keys)) if arguments.crf else predict


def _by_regions(read: Checkpoint, score: Scorer, arguments: argparse.Namespace) -> Predictor:
    settings = read.config["dataset"]
    seen_at = settings["crop"] or settings["size"]  # the crop is what the network was trained on
    if not seen_at:
        raise UsageError("--regions resizes every region to one size - say which, for example dataset.crop=[224,224]")
    if arguments.regions < 0:
        raise UsageError(f"--regions={arguments.regions} is no number of regions - give 1 or more")
    first = read.classes.names[0]
    if first != "background" and not arguments.whole_too:
        raise UsageError(f"what no region covers would become '{first}', the first class - add --whole-too")
    propose = source(arguments.proposals)
    return by_regions(
        score,
        replace(read.preprocessing, size=(seen_at[0], seen_at[1])),
        lambda image, name: propose(draw.shown(image), name),
        num=arguments.regions,
        mode=arguments.region_mode,
        context=settings.get("context", 1.2),
        least_side=arguments.least_side,
        with_whole=arguments.whole_too,
        batch_size=settings["batch_size"],
        keep=_keeper(arguments.save_regions) if arguments.save_regions else None,
    )


def _order(read: Checkpoint, other: Checkpoint) -> list[int]:
    """For each class of a checkpoint, its index in another's."""
    names, others = read.classes.names, other.classes.names
    if different := sorted(set(names) ^ set(others)):
        raise UsageError(
            f"{read.path} and {other.path} were trained for different classes ({', '.join(different[:3])}"
            f"{', ...' if different[3:] else ''} in one alone) - an ensemble needs the same ones"
        )
    return [others.index(name) for name in names]


def _keeper(folder: Path) -> Callable[[str, np.ndarray, Tensor], None]:
    """Writes each image's regions into DIR/NAME.npz: boxes (N, 4), scores (N, C, h, w) float32."""
    kept: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def keep(name: str, boxes: np.ndarray, scores: Tensor) -> None:
        if name not in kept:
            kept.clear()
        kept.setdefault(name, []).append((boxes, scores.cpu().numpy()))
        path = folder / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            boxes=np.concatenate([boxes for boxes, _ in kept[name]]),
            scores=np.concatenate([scores for _, scores in kept[name]]),
        )

    return keep


def crf_settings(keys: Iterable[str]) -> CRF:
    """What `crf.NAME=VALUE` arguments say.

    >>> crf_settings(["crf.iterations=5"]).iterations
    5
    """
    return CRF(**check(override({"crf": {}}, keys)["crf"], "crf", [CRF]))


def _refined(predictor: Predictor, settings: CRF) -> Predictor:
    def predict(image: np.ndarray, name: str) -> Tensor:
        return refine(predictor(image, name)[0], draw.shown(image), settings=settings)[None]

    return predict
