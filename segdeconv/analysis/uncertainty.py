"""Which uncertainty signals find the errors: entropy, Monte Carlo variance, unstable switches, each by its AUROC."""

import math
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from segdeconv.analysis.switch_paths import recorded
from segdeconv.analysis.switch_stability import NOISE, instability
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.preprocessing import Preprocessing
from segdeconv.errors import UsageError
from segdeconv.evaluation.metrics import number
from segdeconv.inference.predictors import PredictionSettings
from segdeconv.inference.scorers import entropy_of, resized
from segdeconv.inference.segmenter import Segmenter
from segdeconv.switches import Pooling

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


def noise_of(preprocessing: Preprocessing) -> Tensor:
    """(C,) the standard deviation of the noise of `stability.views`, in the units of normalised images."""
    noise = NOISE * (2**preprocessing.bits - 1) / torch.tensor(preprocessing.std)
    return noise.flip(0) if preprocessing.order == "bgr" else noise


def uncertainty(segmenter: Segmenter, dataset: SegmentationDataset) -> list[dict[str, Any]]:
    """The rows of report["uncertainty"]: signal, and the AUROC with which it finds wrong pixels, null for none.

    Predictions, and thus errors, are those of `evaluate` with the same segmenter. Signals: `confidence`, 1 less the
    largest probability; `entropy` of the probabilities; with samples, `variance` over them, the mean over the classes,
    and `mutual information`; for a network whose pools keep switches, `switches`, how often they change
    (`Instability.changed`, the mean over the levels), and `moved`, how much they move; `switches k`, `moved k`: of
    level k alone.

    dataset: a split as `restore_dataset` gives it.
    """
    network, preprocessing = segmenter.network, segmenter.preprocessing
    rankings: dict[str, ErrorRanking] = {}
    noise = noise_of(preprocessing)
    bar = tqdm(total=len(dataset), desc=f"measuring uncertainty in {dataset.split}", unit="image", disable=None)
    with bar, recorded(network.model) as pooled:

        def pools(image: Tensor) -> list[Pooling]:
            network.logits(image)
            return list(pooled)

        for stored_image, stored_mask, name in (dataset[place] for place in range(len(dataset))):
            image = preprocessing(stored_image, name)[None].to(network.device)
            mask = torch.from_numpy(stored_mask).to(network.device)
            size = (mask.shape[0], mask.shape[1])
            drawn = network(image)
            scores = drawn.of_image(0, size)
            probabilities = scores.probabilities().float()
            top, prediction = probabilities.max(dim=1)
            signals = {"confidence": 1 - top, "entropy": entropy_of(probabilities)}
            if drawn.uncertainty is not None and drawn.information is not None:
                signals |= {"variance": drawn.uncertainty, "mutual information": drawn.information}
            if pools(image):
                unstable = instability(pools, image, noise=noise)
                for kind, levels in (("switches", unstable.changed), ("moved", unstable.moved)):
                    signals[kind] = levels.mean(dim=0)
                    signals |= {f"{kind} {level}": one for level, one in enumerate(levels, start=1)}
            counted = mask != dataset.classes.ignore_index
            for signal, values in signals.items():
                ranking = rankings.setdefault(signal, ErrorRanking().to(network.device))
                ranking.update(resized(values[:, None], size)[0, 0], prediction[0] != mask, counted)
            bar.update()
    return [{"signal": signal, "auroc": number(ranking.auroc)} for signal, ranking in rankings.items()]


def require_plain(settings: PredictionSettings) -> None:
    """Raise UsageError where a prediction is more than a forward pass over the whole image."""
    if not settings.single_pass:
        raise UsageError(
            "--uncertainty looks once, by one network - leave out --scales, --regions, --ensemble and --crf"
        )


def uncertainty_table(rows: list[dict[str, Any]]) -> str:
    """For reading: a line for each signal."""
    lines = ["which signs of doubt find wrong pixels (AUROC: 50 % by chance, 100 % all before the right ones)", ""]
    lines += [f"{row['signal']:<20}" + ("-" if row["auroc"] is None else f"{100 * row['auroc']:.1f}%") for row in rows]
    if not any(row["signal"] == "switches" for row in rows):
        lines.append("switches            none: the pools of this network keep none")
    return "\n".join(lines)
