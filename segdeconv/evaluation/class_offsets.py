"""Class offsets: one number per class, added to its logits, with which the predicted classes have the highest mean IoU.

The most probable class is the best prediction for pixel accuracy. For the IoU it is not: a class of IoU J gains from
every pixel that belongs to it with a probability above J / (1 + J), which is below a half (Lipton, Elkan, Naryanaswamy
2014, theorem 1, https://arxiv.org/abs/1402.1892, for F1 = 2 J / (1 + J)). Poles and signs, whose pixels are uncertain,
are therefore missed. The offsets are post-hoc logit adjustment (Menon et al. 2021, section 4.1,
https://arxiv.org/abs/2007.07314) with numbers that are fitted instead of computed from the classes' frequencies.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from segdeconv.checkpoints.checkpoint import Checkpoint, without_measurements
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.errors import UsageError, warn
from segdeconv.evaluation.evaluate import finite_scores, restore_dataset, sampled_per_image
from segdeconv.evaluation.metrics import ConfusionMatrix, scores
from segdeconv.evaluation.overlap import overlap
from segdeconv.evaluation.report import describe_class_offsets, mean_iou
from segdeconv.inference.predictors import PredictionSettings
from segdeconv.inference.segmenter import Segmenter
from segdeconv.models.logits import logit_bias, shift_logits

STEP, REACH, LIMIT = 0.05, 1.0, 3.0  # of the search: between offsets, around the current one, and of their size
ROUNDS = 20
GAIN = 1e-4  # of mean IoU; an offset moves for no less, and no further than it needs to be within this of the best


@dataclass(frozen=True)
class ClassOffsets:
    """The class offsets of a network, and what they do to its scores on images that they were not fitted on.

    Attributes:
        values: One per class, by its name, added to its logits.
        split: The split they were fitted on.
        images: Number of its images.
        checked_on: The split of the following scores.
        before: IoU of each class before, 0..1, without classes in neither ground truth nor prediction.
        after: The same with the offsets.
    """

    values: dict[str, float]
    split: str
    images: int
    checked_on: str
    before: dict[str, float]
    after: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the content as plain data, as the metadata of a checkpoint holds it under `class_offsets`."""
        return asdict(self)


def with_class_offsets(
    checkpoint: Checkpoint,
    dataset: SegmentationDataset | None = None,
    check: SegmentationDataset | None = None,
    *,
    device: torch.device | None = None,
    report: Callable[[str], None] = print,
) -> Checkpoint:
    """Return a checkpoint whose logits are shifted by the class offsets that are the best for a split.

    One pass over its images keeps the logits of randomly chosen pixels of each, up to 16 million numbers, on which the
    offsets are fitted; one pass over other images scores the network without and with them. The network predicts as
    `evaluate` does, in the precision that is fast on the device.

    Args:
        checkpoint: The checkpoint.
        dataset: The split to fit on, with the classes in the order of the network; None for the train split of the
            checkpoint, so that val remains for evaluation.
        check: The split to score; None for the val split of the checkpoint.
        device: The device; None for the best one.
        report: Called with lines for the user.

    Returns:
        The checkpoint, without the state of training and of averaged weights, and without the ranges of 8-bit maps and
        the temperature. `ClassOffsets.to_dict` is in its metadata, under `class_offsets`.

    Raises:
        UsageError: The checkpoint has class offsets already, the split has no two labelled classes, or the network has
            no bias that can hold them.
        DivergedError: The network's scores are not finite.
    """
    if checkpoint.facts.get("class_offsets"):
        raise UsageError(
            f"{checkpoint.path} has class offsets already - fit them to the checkpoint from which it was made"
        )
    model, names = checkpoint.model(), checkpoint.classes.names
    size = checkpoint.preprocessing.size or (model.minimum_size, model.minimum_size)
    logit_bias(model, size=size)  # raises an error before the first pass rather than after it
    dataset = dataset or restore_dataset(checkpoint, "train")
    check = check or restore_dataset(checkpoint, "val")
    segmenter = Segmenter(checkpoint, PredictionSettings(), device=device)
    logits, labels = _sampled(segmenter, dataset)
    present = int((labels.bincount(minlength=len(names)) > 0).sum())
    if present < 2:
        raise UsageError(
            f"split {dataset.split} ({len(dataset)} images) has labelled pixels of {present} class(es), so that no "
            "offsets can be fitted - add images with other classes"
        )
    offsets = fit_class_offsets(logits, labels)
    before, after = _ious(segmenter, check, offsets)
    values = {name: round(value, 4) for name, value in zip(names, offsets.tolist(), strict=True)}
    fitted = ClassOffsets(values, dataset.split, len(dataset), check.split, before, after)
    for line in describe_class_offsets(fitted.to_dict()).split("; "):
        report(line)
    used = overlap(checkpoint, check)
    if used.trained_on:
        part = used.part_of(check.split)
        warn(f"the network was trained on {part}, so mean IoU there does not show whether the offsets help")
    if mean_iou(after) < mean_iou(before):
        warn(
            f"the class offsets lower mean IoU on {check.split}: what holds for the images of "
            f"{dataset.split} does not hold there - keep the network without them"
        )
    shift_logits(model, offsets, size=size)
    return checkpoint.with_model(model, {**without_measurements(checkpoint.facts), "class_offsets": fitted.to_dict()})


def fit_class_offsets(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the offsets with which the largest logits have the highest mean IoU, by exact coordinate ascent on a grid.

    Classes without a label keep 0 and do not count.

    Args:
        logits: (C, P) float32.
        labels: (P,) int64, class indices.

    Returns:
        (C,) float64, multiples of STEP within ±LIMIT.

    Examples:
        >>> logits = torch.tensor([[0.22, 0.22, 1.0], [0.0, 0.0, 0.0]])
        >>> fit_class_offsets(logits, torch.tensor([1, 1, 0])).tolist()  # all three are right with 0.25 less
        [-0.25, 0.0]
    """
    shifted, reach = logits.clone(), round(REACH / STEP)
    steps = torch.zeros(len(logits), dtype=torch.int64)
    present = (labels.bincount(minlength=len(logits)) > 0).nonzero().flatten().tolist()
    for _ in range(ROUNDS):
        moved = False
        for index in present:
            curve = _miou_by_shift(shifted, labels, index, reach)
            candidates = torch.arange(-reach, reach + 1)
            curve[(steps[index] + candidates).abs() > round(LIMIT / STEP)] = 0.0
            best = float(curve.max())
            if best < float(curve[reach]) + GAIN:
                continue
            near = candidates[curve > best - GAIN]
            step = int(near[near.abs().argmin()])
            steps[index] += step
            shifted[index] = logits[index] + float(steps[index]) * STEP
            moved = True
        if not moved:
            break
    return steps.double() * STEP


def _miou_by_shift(logits: Tensor, labels: Tensor, index: int, reach: int) -> Tensor:
    """Return mean IoU over the labelled classes for each shift of one class by -reach..reach steps, (2 * reach + 1,).

    A pixel is predicted as the class as soon as the shift exceeds the gap to the largest other logit. One histogram of
    these gaps, by the class that loses the pixel, gives the counts for all shifts.
    """
    num_classes, num_shifts = len(logits), 2 * reach + 1
    own = logits[index].clone()
    logits[index] = -torch.inf
    other, loser = logits.max(dim=0)
    logits[index] = own
    first = torch.ceil((other - own) / STEP + reach).clamp_(0, num_shifts).long()  # the shift that wins the pixel
    cell = first * num_classes + loser

    def won(cells: Tensor) -> Tensor:
        """The (num_shifts, C) numbers of pixels that each class has lost at each shift."""
        counts = cells.bincount(minlength=(num_shifts + 1) * num_classes).view(num_shifts + 1, num_classes)
        return counts[:num_shifts].cumsum(dim=0)

    lost, lost_correct = won(cell), won(cell[loser == labels])
    predicted = loser.bincount(minlength=num_classes) - lost
    correct = loser[loser == labels].bincount(minlength=num_classes) - lost_correct
    predicted[:, index] = lost.sum(dim=1)
    correct[:, index] = won(cell[labels == index]).sum(dim=1)
    truth = labels.bincount(minlength=num_classes)
    labelled = truth > 0
    union = truth + predicted - correct
    return (correct[:, labelled] / union[:, labelled].double()).mean(dim=1)


def _sampled(segmenter: Segmenter, dataset: SegmentationDataset) -> tuple[Tensor, Tensor]:
    """Return the logits, (C, P), and labels, (P,), of randomly chosen labelled pixels of each image."""
    per_image = sampled_per_image(dataset)
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    for index, (predicted, mask) in enumerate(finite_scores(segmenter, dataset)):
        labelled = (mask != dataset.classes.ignore_index).flatten().nonzero().flatten()
        generator = torch.Generator().manual_seed(index)
        chosen = labelled[torch.randperm(len(labelled), generator=generator)[:per_image]]
        logits.append(predicted.values[0].flatten(1)[:, chosen.to(predicted.values.device)].float().cpu())
        labels.append(mask.flatten()[chosen].long())
    if not labels:
        raise UsageError(f"split {dataset.split} has no images, so that no class offsets can be fitted")
    return torch.cat(logits, dim=1), torch.cat(labels)


def _ious(
    segmenter: Segmenter, dataset: SegmentationDataset, offsets: Tensor
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the IoU of each class before and after the offsets, without classes that cannot be scored."""
    classes = dataset.classes
    matrices = [ConfusionMatrix(len(classes), classes.ignore_index) for _ in range(2)]
    for predicted, mask in finite_scores(segmenter, dataset):
        values = predicted.values[0].float()
        shifted = values + offsets.to(values)[:, None, None]
        for matrix, logits in zip(matrices, (values, shifted), strict=True):
            matrix.update(logits.max(dim=0).indices.cpu(), mask)
    before, after = (
        {
            name: iou
            for name, iou in zip(classes.names, scores(matrix.counts.numpy()).iou.tolist(), strict=True)
            if not math.isnan(iou)
        }
        for matrix in matrices
    )
    return before, after
