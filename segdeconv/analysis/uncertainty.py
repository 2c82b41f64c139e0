"""Error detection by uncertainty: the AUROC of entropy, Monte Carlo variance and unstable switches."""

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

# Values are ranked by the upper 20 of the 31 bits of a float32, which increase with the value for values >= 0. The
# steps are below 0.05 % at any magnitude.
RANKS = 1 << 20


class ErrorRanking:
    """Ranking of wrong and correct pixels of a data set by a signal, in histograms of fixed size (16 MiB)."""

    def __init__(self) -> None:
        self.counts = torch.zeros(2, RANKS, dtype=torch.int64)  # correct, wrong

    def to(self, device: torch.device) -> Self:
        """Move the counts to a device, that of the signal, and return self."""
        self.counts = self.counts.to(device)
        return self

    def update(self, signal: Tensor, wrong: Tensor, valid: Tensor) -> None:
        """Add pixels; all tensors have the same shape.

        Args:
            signal: Any numbers >= 0 that are larger where the prediction is less certain.
            wrong: Bool, whether the prediction is wrong.
            valid: Bool, whether the pixel counts.
        """
        ranks = (signal[valid].float().clamp(min=0).contiguous().view(torch.int32) >> 11).long()
        wrong = wrong[valid]
        for kind in (0, 1):
            self.counts[kind] += torch.bincount(ranks[wrong == bool(kind)], minlength=RANKS)

    @property
    def auroc(self) -> float:
        """The probability that the signal is larger at a wrong pixel than at a correct one; equal values count half.

        Values that differ by less than 0.05 % count as equal. NaN if all pixels are correct, or all wrong.
        """
        correct, wrong = self.counts.double().cpu().numpy()
        pairs = correct.sum() * wrong.sum()
        below = np.concatenate([[0.0], correct.cumsum()[:-1]])
        return float((wrong * (below + correct / 2)).sum() / pairs) if pairs else math.nan


def noise_of(preprocessing: Preprocessing) -> Tensor:
    """Return (C,): the standard deviation of the noise in `switch_stability.views`, in units of normalised images."""
    noise = NOISE * (2**preprocessing.bits - 1) / torch.tensor(preprocessing.std)
    return noise.flip(0) if preprocessing.order == "bgr" else noise


def uncertainty(segmenter: Segmenter, dataset: SegmentationDataset) -> list[dict[str, Any]]:
    """Measure how well uncertainty signals detect wrong pixels.

    Predictions, and thus errors, are those of `evaluate` with the same segmenter. The signals are `confidence` (1 minus
    the largest probability) and `entropy` of the probabilities; with samples also `variance`, averaged over the
    classes, and `mutual information`; for a network whose pools keep switches also `switches` (`Instability.changed`,
    averaged over the levels) and `moved` (`Instability.moved`), and both as `switches k` and `moved k` at level k.

    Args:
        segmenter: The network with its prediction settings.
        dataset: A split as `restore_dataset` returns it.

    Returns:
        The rows of report["uncertainty"]: signal, and its AUROC for wrong pixels, None if it is undefined.
    """
    network, preprocessing = segmenter.network, segmenter.preprocessing
    rankings: dict[str, ErrorRanking] = {}
    noise = noise_of(preprocessing)
    bar = tqdm(total=len(dataset), desc=f"measuring uncertainty in {dataset.split}", unit="image", disable=None)
    with bar, recorded(network.model) as pooled:

        def pools(image: Tensor) -> list[Pooling]:
            network.logits(image)
            return list(pooled)

        for stored_image, stored_mask, name in (dataset[index] for index in range(len(dataset))):
            image = preprocessing(stored_image, name)[None].to(network.device)
            mask = torch.from_numpy(stored_mask).to(network.device)
            size = (mask.shape[0], mask.shape[1])
            output = network(image)
            scores = output.of_image(0, size)
            probabilities = scores.probabilities().float()
            top, prediction = probabilities.max(dim=1)
            signals = {"confidence": 1 - top, "entropy": entropy_of(probabilities)}
            if output.uncertainty is not None and output.information is not None:
                signals |= {"variance": output.uncertainty, "mutual information": output.information}
            if pools(image):
                measures = instability(pools, image, noise=noise)
                for kind, levels in (("switches", measures.changed), ("moved", measures.moved)):
                    signals[kind] = levels.mean(dim=0)
                    signals |= {f"{kind} {level}": values for level, values in enumerate(levels, start=1)}
            valid = mask != dataset.classes.ignore_index
            for signal, values in signals.items():
                ranking = rankings.setdefault(signal, ErrorRanking().to(network.device))
                ranking.update(resized(values[:, None], size)[0, 0], prediction[0] != mask, valid)
            bar.update()
    return [{"signal": signal, "auroc": number(ranking.auroc)} for signal, ranking in rankings.items()]


def require_plain(settings: PredictionSettings) -> None:
    """Check that a prediction is a single forward pass over the whole image.

    Raises:
        UsageError: The settings combine several forward passes or post-process them.
    """
    if not settings.single_pass or settings.min_area > 1:
        raise UsageError(
            "--uncertainty needs a single forward pass of one network - leave out --scales, --regions, --ensemble, "
            "--crf and --min-area"
        )


def uncertainty_table(rows: list[dict[str, Any]]) -> str:
    """Return a text table with one line per signal."""
    lines = ["error detection by uncertainty (AUROC: 50 % is chance, 100 % ranks all wrong pixels first)", ""]
    lines += [f"{row['signal']:<20}" + ("-" if row["auroc"] is None else f"{100 * row['auroc']:.1f}%") for row in rows]
    if not any(row["signal"] == "switches" for row in rows):
        lines.append("switches            -  (the pools of this network keep no switches)")
    return "\n".join(lines)
