"""Ablation of switches: scores of a trained network with another upsampling in their place.

The network and its weights stay unchanged. Only the upsampling from a pooled map to the size before the pool is
replaced, at all levels together and at each level alone:

    switches   as trained: a value goes to the winning cell, zeros to the other three
    shuffled   the switches of each map are permuted among its windows
    corner     every value goes to the first cell of its window
    bilinear   maps are enlarged bilinearly, with a quarter of each value per pixel, so that sums are preserved

`shuffled` preserves the frequency of each cell and the sparsity of the map, and removes only the positions: its loss
against `switches` measures the information in the positions. `corner` adds a shift by half a pixel, `bilinear` a
smoothness that the filters of the decoder never had as input in training.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeconv.errors import UsageError
from segdeconv.evaluation.boundary import Boundaries
from segdeconv.evaluation.evaluate import Evaluation, evaluate
from segdeconv.evaluation.metrics import number, scores
from segdeconv.models import SegmentationModel
from segdeconv.switches import Pooling, Unpool, unpool
from segdeconv.system.seeding import key

Upsampling = Literal["shuffled", "corner", "bilinear"]
UPSAMPLINGS: tuple[Upsampling, ...] = ("shuffled", "corner", "bilinear")


def require_unpooling(model: SegmentationModel) -> int:
    """Return the number of levels that a network unpools.

    Raises:
        UsageError: The network has no `Unpool` modules.
    """
    levels = len({module.level for module in model.modules() if isinstance(module, Unpool)})
    if not levels:
        raise UsageError(
            f"{type(model).__name__} does not unpool, so it has no switches to replace - leave out "
            "--ablate, or use segdeconv.switches.Unpool, as SegNet and DeconvNet do"
        )
    return levels


@contextmanager
def unpooling_by(
    network: nn.Module, upsampling: Upsampling, level: int | Literal["all"], *, seed: int = 0
) -> Iterator[None]:
    """Replace the upsampling of a network's `Unpool` modules, at one level or all, within a `with` block.

    Args:
        network: The network.
        upsampling: The replacement; see the module docstring.
        level: The level of `Unpool`, or `all`.
        seed: Seed of `shuffled`. One permutation per map of a level is keyed by (seed, level, channels and size), so
            that it is the same for every image in any batch. Codes are clipped to the cells of incomplete windows at
            the end of the image.
    """

    def upsample(module_level: int, x: Tensor, switches: Tensor, size: tuple[int, int]) -> Tensor:
        if upsampling == "bilinear":
            # Enlarge to twice the size and crop, so that windows at an odd edge are not shifted.
            enlarged = F.interpolate(x / 4, scale_factor=2, mode="bilinear", align_corners=False)
            return enlarged[..., : size[0], : size[1]]
        replacement = torch.zeros_like(switches)
        if upsampling == "shuffled":
            codes = Pooling(x, switches, size).codes
            replacement = shuffled(codes, size, key(seed, "shuffled", module_level))
        return unpool(x, replacement, size)

    def replace(module: Unpool, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return upsample(module.level, *args, **kwargs)

    with ExitStack() as hooks:
        for module in network.modules():
            if isinstance(module, Unpool) and level in ("all", module.level):
                hooks.enter_context(module.register_forward_hook(replace, with_kwargs=True))
        yield


def shuffled(codes: Tensor, size: tuple[int, int], seed: int) -> Tensor:
    """Permute the switches of each map among its windows, in the same way for every image of the batch.

    Args:
        codes: (N, C, h, w) uint8, one switch per byte.
        size: The (H, W) of the maps before the pool.
        seed: Seed of the permutations.

    Returns:
        (N, C, h, w) uint8.
    """
    count, channels, height, width = codes.shape
    generator = torch.Generator().manual_seed(key(seed, channels, height, width))
    order = torch.rand(channels, height * width, generator=generator).argsort(dim=1).to(codes.device)
    moved = codes.flatten(2).gather(2, order.expand(count, -1, -1)).view_as(codes)
    if size[0] % 2:
        moved[:, :, -1] &= 1
    if size[1] % 2:
        moved[..., -1] &= 2
    return moved


def ablate(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Evaluate a network again with every replacement of its switches.

    Args:
        evaluation: The evaluation of the unchanged network, whose images are evaluated again.

    Returns:
        The rows of report["ablation"]: upsampling, level (`all`, or from 1), miou and boundary_f1, None without score.

    Raises:
        UsageError: The network does not unpool.
    """
    segmenter, boundaries = evaluation.segmenter, evaluation.boundaries
    levels = require_unpooling(segmenter.network.model)
    rows = [_row("switches", "all", evaluation.confusion, boundaries)]
    for upsampling in UPSAMPLINGS:
        for level in ("all", *range(1, levels + 1)) if levels > 1 else ("all",):
            row_boundaries = Boundaries(boundaries.num_classes, boundaries.ignore_index) if boundaries else None
            with unpooling_by(segmenter.network.model, upsampling, level):
                confusion = evaluate(segmenter, evaluation.dataset, boundaries=row_boundaries)
            rows.append(_row(upsampling, level, confusion, row_boundaries))
    return rows


def _row(upsampling: str, level: int | str, confusion: np.ndarray, boundaries: Boundaries | None) -> dict[str, Any]:
    f1 = number(boundaries.compute().f1) if boundaries else None
    return {"upsampling": upsampling, "level": level, "miou": number(scores(confusion).miou), "boundary_f1": f1}


def ablation_table(rows: list[dict[str, Any]]) -> str:
    """Return a text table of mean IoU / boundary F1 in percent: one line per upsampling, one column per level."""
    levels = list(dict.fromkeys(row["level"] for row in rows))
    cells = {
        (row["upsampling"], row["level"]): f"{_percent(row['miou'])}/{_percent(row['boundary_f1'])}" for row in rows
    }
    lines = ["mean IoU / boundary F1 with another upsampling in place of the switches, by level (1 is the finest)", ""]
    lines.append(f"{'':<10}" + "".join(f"{level:>12}" for level in levels))
    for upsampling in dict.fromkeys(row["upsampling"] for row in rows):
        lines.append(f"{upsampling:<10}" + "".join(f"{cells.get((upsampling, level), ''):>12}" for level in levels))
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
