"""Prediction by regions, as DeconvNet predicts.

Noh, Hong, Han 2015, sections 3.3 and 4.3, https://arxiv.org/abs/1505.04366. The paper and its released code differ;
both rules are implemented, as `paper` and `released`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from segdeconv.data.boxes import cut, expanded, squared
from segdeconv.data.preprocessing import Preprocessing
from segdeconv.data.proposals import Source
from segdeconv.inference.scorers import ClassScores, Predictor, Scorer, resized
from segdeconv.inference.tiling import Part, whole

Mode = Literal["paper", "mean", "released"]
BLACK = 0


def by_regions(
    scorer: Scorer,
    preprocessing: Preprocessing,
    propose: Source,
    *,
    num: int = 50,
    mode: Mode = "paper",
    context: float = 1.2,
    min_side: int | None = None,
    with_whole: bool = False,
    batch_size: int = 8,
    on_scores: Callable[[str, np.ndarray, Tensor], None] | None = None,
) -> Predictor:
    """Return a predictor that aggregates the scores of up to `num` regions, the best proposals first.

    Each proposal is enlarged by `context`, extended to a square, which may extend beyond the image (black there), and
    resized to the network's input size. Its scores before the softmax are resized back and aggregated over the regions.
    Memory is that of one batch of regions and one array of scores, independent of `num`.

    Args:
        scorer: Computes logits.
        preprocessing: Its size is the input size that regions are resized to.
        propose: Returns the proposals of an image, the best first.
        num: Maximum number of regions.
        mode: Rule for overlapping regions. `paper` is the maximum over all regions, each of which is 0 outside itself
            (equation 1), so a negative score is kept only where every region covers a pixel. `mean` is equation 2,
            divided by the number of regions that cover a pixel, which does not change the prediction. `released` is
            the maximum over regions and 0. With all three, pixels outside all regions have score 0 for every class
            and are predicted as the first class.
        context: Factor by which each proposal is enlarged.
        min_side: Regions with a smaller side in pixels are skipped and do not count towards `num`. None is half the
            network's input size with `released` (112 of 224), and 1 otherwise.
        with_whole: Add the whole image as a region, resized without padding, in addition to `num`.
        batch_size: Regions in one forward pass.
        on_scores: Called for each batch with the image's name, the regions (n, 4) and their raw scores (n, C, h, w).
    """
    assert preprocessing.size is not None, "regions need an input size"
    if min_side is None:
        min_side = min(preprocessing.size) // 2 if mode == "released" else 1

    def predict(image: np.ndarray, name: str) -> Iterator[tuple[Part, ClassScores]]:
        height, width = image.shape[:2]
        regions = squared(expanded(propose(image, name), context))
        regions = regions[regions[:, 2] - regions[:, 0] >= min_side][:num]
        if with_whole:
            regions = np.concatenate([[[0, 0, width, height]], regions])
        canvas: Tensor | None = None
        covered = torch.zeros(height, width)
        for first in range(0, len(regions), batch_size):
            batch = regions[first : first + batch_size]
            scores = scorer(torch.stack([preprocessing(cut(image, box, BLACK), name) for box in batch])).float()
            if on_scores is not None:
                on_scores(name, batch, scores)
            if canvas is None:
                start = -torch.inf if mode == "paper" else 0.0
                canvas = scores.new_full((scores.shape[1], height, width), start)
                covered = covered.to(scores.device)
            for box, region_scores in zip(batch.tolist(), scores, strict=True):
                rows, columns, values = _clip_to_image(region_scores, box, height, width)
                target = canvas[:, rows, columns]
                if mode == "mean":
                    target += values
                else:
                    torch.maximum(target, values, out=target)
                covered[rows, columns] += 1
        if canvas is None:  # no proposals, or all of them too small
            logits = scorer(preprocessing(image, name)[None])  # only for the number of classes
            canvas = logits.float().new_zeros(logits.shape[1], height, width)
        elif mode == "paper":
            canvas = torch.where(covered < len(regions), canvas.clamp(min=0), canvas)
        elif mode == "mean":
            canvas = canvas / covered.clamp(min=1)
        yield whole((height, width)), ClassScores(canvas[None], False)

    return predict


def _clip_to_image(scores: Tensor, box: Sequence[int], height: int, width: int) -> tuple[slice, slice, Tensor]:
    """Resize a region's (C, h, w) scores; return the rows and columns of the image it covers and the scores there."""
    x1, y1, x2, y2 = box
    rows, columns = slice(max(0, y1), min(height, y2)), slice(max(0, x1), min(width, x2))
    full = resized(scores[None], (y2 - y1, x2 - x1))[0]
    return rows, columns, full[:, rows.start - y1 : rows.stop - y1, columns.start - x1 : columns.stop - x1]
