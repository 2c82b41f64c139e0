"""Which signs of doubt find the errors: entropy, Monte Carlo variance, unsteady switches, each by its AUROC."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from segdeconv.analysis.switch_paths import recorded
from segdeconv.analysis.switch_stability import NOISE, instability
from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.preprocessing import Preprocessing
from segdeconv.errors import UsageError
from segdeconv.inference.dropout_sampling import sampler_of
from segdeconv.inference.scorers import ready, resized, scorer_of, scorer_on
from segdeconv.models import SegmentationModel
from segdeconv.switches.ops import Pooling
from segdeconv.system.devices import resolve_precision

# Values are put in order by the upper 20 of the 31 bits of a float32, which for numbers from 0 grow with the number:
# steps of less than 0.05 % at any magnitude.
RANKS = 1 << 20


class ErrorRanking:
    """How well a signal puts wrong pixels before right ones, over a data set, in histograms of fixed size (16 MiB)."""

    def __init__(self) -> None:
        self.counts = torch.zeros(2, RANKS, dtype=torch.int64)  # right, wrong

    def to(self, device: torch.device) -> Self:
        """Count there, where the signal is."""
        self.counts = self.counts.to(device)
        return self

    def update(self, signal: Tensor, wrong: Tensor, counted: Tensor) -> None:
        """All of one shape. signal: any number from 0, larger where there is more doubt; wrong, counted: bool."""
        ranks = (signal[counted].float().clamp(min=0).contiguous().view(torch.int32) >> 11).long()
        wrong = wrong[counted]
        for kind in (0, 1):
            self.counts[kind] += torch.bincount(ranks[wrong == bool(kind)], minlength=RANKS)

    @property
    def auroc(self) -> float:
        """The probability that the signal is larger at a wrong pixel than at a right one; equals count half.

        Two that differ by less than 0.05 % count as equal. NaN where all pixels are right, or all wrong.
        """
        right, wrong = self.counts.double().cpu().numpy()
        pairs = right.sum() * wrong.sum()
        below = np.concatenate([[0.0], right.cumsum()[:-1]])
        return float((wrong * (below + right / 2)).sum() / pairs) if pairs else math.nan


@contextmanager
def pools_of(
    model: SegmentationModel, device: torch.device, precision: str
) -> Iterator[Callable[[Tensor], list[Pooling]]]:
    """A trained network as a function from normalised images to the poolings of its encoder; uses a copy of it."""
    network = ready(model, device, precision)
    score = scorer_on(network, device, precision, network.minimum_size)
    with recorded(network) as pooled:

        def pools(image: Tensor) -> list[Pooling]:
            score(image)
            return list(pooled)

        yield pools


def noise_of(preprocessing: Preprocessing) -> Tensor:
    """(C,) the standard deviation of the noise of `stability.views`, in the units of normalised images."""
    noise = NOISE * (2**preprocessing.bits - 1) / torch.tensor(preprocessing.std)
    return noise.flip(0) if preprocessing.order == "bgr" else noise


def uncertainty(
    checkpoint: Checkpoint,
    dataset: SegmentationDataset,
    *,
    device: torch.device,
    precision: str = "auto",
    flip: bool = False,
    samples: int = 0,
) -> list[dict[str, Any]]:
    """The rows of report["uncertainty"]: signal, and the AUROC with which it finds wrong pixels, null for none.

    Predictions, and thus errors, are those of `scoring.evaluate` with the same arguments. Signals: `confidence`, 1 less
    the largest probability; `entropy` of the probabilities; with samples, `variance` over them, the mean over the
    classes, and `mutual information`; for a network whose pools keep switches, `switches`, how often they change
    (`Instability.changed`, the mean over the levels), and `moved`, how much they move; `switches k`, `moved k`: of
    level k alone.

    dataset: a split as `scoring.restore_dataset` gives it.
    """
    preprocessing = checkpoint.preprocessing
    precision = resolve_precision(precision, checkpoint.facts["precision"])
    model = checkpoint.model()
    score = scorer_of(model, device, precision, flip=flip)
    draw = sampler_of(model, device, precision, samples, flip=flip) if samples else None
    rankings: dict[str, ErrorRanking] = {}
    noise = noise_of(preprocessing)
    bar = tqdm(total=len(dataset), desc=f"looking for doubt in {dataset.split}", unit="image", disable=None)
    with bar, pools_of(model, device, precision) as pools:
        for place in range(len(dataset)):
            image, stored, name = dataset[place]
            ready_image = preprocessing(image, name)[None].to(device)
            mask = torch.from_numpy(stored).to(device)
            drawn = draw(ready_image) if draw else None
            scores = drawn.probabilities if drawn else score(ready_image)
            one = resized(scores, (mask.shape[0], mask.shape[1])).float()
            probabilities = one if flip or samples else one.softmax(dim=1)
            top, prediction = probabilities.max(dim=1)
            signals = {"confidence": 1 - top, "entropy": torch.special.entr(probabilities).sum(dim=1)}
            if drawn:
                signals |= {"variance": drawn.uncertainty, "mutual information": drawn.information}
            if pools(ready_image):
                found = instability(pools, ready_image, noise=noise)
                for kind, levels in (("switches", found.changed), ("moved", found.moved)):
                    signals[kind] = levels.mean(dim=0)
                    signals |= {f"{kind} {level}": one for level, one in enumerate(levels, start=1)}
            counted = mask != dataset.classes.ignore_index
            for signal, values in signals.items():
                ranking = rankings.setdefault(signal, ErrorRanking().to(device))
                ranking.update(resized(values[:, None], (mask.shape[0], mask.shape[1]))[0, 0],
                               prediction[0] != mask, counted)  # fmt: skip
            bar.update()
    return [
        {"signal": signal, "auroc": None if math.isnan(ranking.auroc) else ranking.auroc}
        for signal, ranking in rankings.items()
    ]


def require_plain(looks_more: bool) -> None:
    """Raise UsageError where predictions are more than one look at the whole image."""
    if looks_more:
        raise UsageError(
            "--uncertainty looks once, by one network - leave out --scales, --regions, --ensemble and --crf"
        )


def table(rows: list[dict[str, Any]]) -> str:
    """For reading: a line for each signal."""
    lines = ["which signs of doubt find wrong pixels (AUROC: 50 % by chance, 100 % all before the right ones)", ""]
    lines += [f"{row['signal']:<20}" + ("-" if row["auroc"] is None else f"{100 * row['auroc']:.1f}%") for row in rows]
    if not any(row["signal"] == "switches" for row in rows):
        lines.append("switches            none: the pools of this network keep none")
    return "\n".join(lines)
