"""Prediction by regions, as DeconvNet predicts.

Noh, Hong, Han 2015, sections 3.3 and 4.3, https://arxiv.org/abs/1505.04366. Paper and released code differ, and both
are here: `paper` and `released`.
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
    keep: Callable[[str, np.ndarray, Tensor], None] | None = None,
) -> Predictor:
    """The scores of an image from up to `num` of its regions, the most likely proposals first.

    Each proposal is enlarged by `context` and extended to a square, which may leave the image (black there), and seen
    at the network's size; its scores, before any softmax, are resized back, and laid over those of the others.

    scorer: gives logits. preprocessing: its size is what a region is resized to.
    mode: where regions overlap. `paper` is the maximum over all regions, each of which is 0 outside itself
        (equation 1); so a negative score counts only where every region covers a pixel. `mean` is equation 2, divided
        by the number of regions that cover a pixel, which changes no label. `released` is the maximum over regions
        and 0. What no region covers is 0 for every class, which is the first class, in all three.
    min_side: regions with a smaller side in pixels are skipped and do not count. None is half the network's side in
        the released code (112 of 224), and 1 otherwise.
    with_whole: the whole image is a region too, resized as it is, beyond `num`.
    keep: is given the name, the regions (N, 4) and their raw scores, (n, C, h, w) a batch, for whoever wants to check.

    Takes the memory of one batch of regions and of one array of scores, whatever `num` is.
    """
    assert preprocessing.size is not None, "regions are resized to a size"
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
            if keep is not None:
                keep(name, batch, scores)
            if canvas is None:
                start = -torch.inf if mode == "paper" else 0.0
                canvas = scores.new_full((scores.shape[1], height, width), start)
                covered = covered.to(scores.device)
            for box, one in zip(batch.tolist(), scores, strict=True):
                rows, columns, seen = _laid_out(one, box, height, width)
                here = canvas[:, rows, columns]
                if mode == "mean":
                    here += seen
                else:
                    torch.maximum(here, seen, out=here)
                covered[rows, columns] += 1
        if canvas is None:  # nothing was proposed, or all of it was too small
            logits = scorer(preprocessing(image, name)[None])  # says how many classes there are
            canvas = logits.float().new_zeros(logits.shape[1], height, width)
        elif mode == "paper":
            canvas = torch.where(covered < len(regions), canvas.clamp(min=0), canvas)
        elif mode == "mean":
            canvas = canvas / covered.clamp(min=1)
        yield whole((height, width)), ClassScores(canvas[None], False)

    return predict


def _laid_out(scores: Tensor, box: Sequence[int], height: int, width: int) -> tuple[slice, slice, Tensor]:
    """(C, h, w) scores of a region -> the rows and columns of the image that it covers, and its scores there."""
    x1, y1, x2, y2 = box
    rows, columns = slice(max(0, y1), min(height, y2)), slice(max(0, x1), min(width, x2))
    full = resized(scores[None], (y2 - y1, x2 - x1))[0]
    return rows, columns, full[:, rows.start - y1 : rows.stop - y1, columns.start - x1 : columns.stop - x1]
