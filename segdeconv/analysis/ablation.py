"""What switches are worth: a trained network scored with something else in their place.

The network and its weights stay as they are; only the way from a pooled map to the map before the pool changes, in all
levels together and in each alone:

    switches   as trained: a value goes into the cell that won, zeros into the other three
    shuffled   as many values in each of the four cells as before, of every map by itself, but in other windows
    corner     every value goes into the first cell of its window
    bilinear   maps are enlarged bilinearly, a quarter of each value to a pixel, so that their sums stay

`shuffled` keeps how often each cell is named and how empty the map is, and takes away the places: what it loses against
`switches` is what the places say. `corner` adds a shift by half a pixel, `bilinear` a smoothness that no filter of the
decoder has seen in training.
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
    """How many levels a network unpools. Raises UsageError for one without `Unpool` modules."""
    levels = len({module.level for module in model.modules() if isinstance(module, Unpool)})
    if not levels:
        raise UsageError(
            f"{type(model).__name__} does not unpool, so it has no switches that could be replaced - leave out "
            "--ablate, or use segdeconv.switches.Unpool, as SegNet and DeconvNet do"
        )
    return levels


@contextmanager
def unpooling_by(
    network: nn.Module, upsampling: Upsampling, level: int | Literal["all"], *, seed: int = 0
) -> Iterator[None]:
    """While this is open, the `Unpool` modules of a network do it in another way, those of one level or all.

    level: see `Unpool`.
    seed: of `shuffled`. One permutation for each map of a level, drawn by (seed, level, channels and size) and thus the
        same for every image, however they are batched. Windows that the image's end cuts keep what is left of theirs.
    """

    def replacement(here: int, x: Tensor, switches: Tensor, size: tuple[int, int]) -> Tensor:
        if upsampling == "bilinear":
            # Twice the size and then cut, so that windows that reach over an odd edge stay where they are.
            large = F.interpolate(x / 4, scale_factor=2, mode="bilinear", align_corners=False)
            return large[..., : size[0], : size[1]]
        other = torch.zeros_like(switches)
        if upsampling == "shuffled":
            other = shuffled(Pooling(x, switches, size).codes, size, key(seed, "shuffled", here))
        return unpool(x, other, size)

    def replace(module: Unpool, given: Any, named: Any, output: Tensor) -> Tensor:
        return replacement(module.level, *given, **named)

    with ExitStack() as hooks:
        for module in network.modules():
            if isinstance(module, Unpool) and level in ("all", module.level):
                hooks.enter_context(module.register_forward_hook(replace, with_kwargs=True))
        yield


def shuffled(codes: Tensor, size: tuple[int, int], seed: int) -> Tensor:
    """The switches of every map in another order of its windows, the same for every image of the batch.

    codes: (N, C, h, w) uint8, one to a byte; size: the (H, W) that was pooled.
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
    """The rows of report["ablation"]: upsampling, level ("all", or from 1), miou and boundary_f1, null for none.

    evaluation: of the network as it is; the same images are evaluated again with every other upsampling.
    """
    segmenter, boundaries = evaluation.segmenter, evaluation.boundaries
    levels = require_unpooling(segmenter.network.model)
    rows = [_row("switches", "all", evaluation.confusion, boundaries)]
    for upsampling in UPSAMPLINGS:
        for level in ("all", *range(1, levels + 1)) if levels > 1 else ("all",):
            outlines = Boundaries(boundaries.num_classes, boundaries.ignore_index) if boundaries else None
            with unpooling_by(segmenter.network.model, upsampling, level):
                confusion = evaluate(segmenter, evaluation.dataset, boundaries=outlines)
            rows.append(_row(upsampling, level, confusion, outlines))
    return rows


def _row(upsampling: str, level: int | str, confusion: np.ndarray, boundaries: Boundaries | None) -> dict[str, Any]:
    f1 = number(boundaries.compute().f1) if boundaries else None
    return {"upsampling": upsampling, "level": level, "miou": number(scores(confusion).miou), "boundary_f1": f1}


def ablation_table(rows: list[dict[str, Any]]) -> str:
    """For reading: a line for each kind of upsampling, a column for each level, mean IoU / boundary F1 in percent."""
    levels = list(dict.fromkeys(row["level"] for row in rows))
    cells = {
        (row["upsampling"], row["level"]): f"{_percent(row['miou'])}/{_percent(row['boundary_f1'])}" for row in rows
    }
    lines = ["mean IoU / boundary F1 with something else in place of the switches, by level (1 is the finest)", ""]
    lines.append(f"{'':<10}" + "".join(f"{level:>12}" for level in levels))
    for upsampling in dict.fromkeys(row["upsampling"] for row in rows):
        lines.append(f"{upsampling:<10}" + "".join(f"{cells.get((upsampling, level), ''):>12}" for level in levels))
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
