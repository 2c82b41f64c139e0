"""Instance statistics: a network's batch norms look at each image, and the scores of val show what that does."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.errors import UsageError, warn
from segdeconv.evaluation.evaluate import evaluate, restore_dataset
from segdeconv.evaluation.metrics import scores
from segdeconv.evaluation.overlap import overlap
from segdeconv.evaluation.report import describe_instance_statistics
from segdeconv.inference.predictors import PredictionSettings
from segdeconv.inference.segmenter import Segmenter
from segdeconv.models.instance_batch_norm import set_instance_statistics

SHALLOW = tuple(f"encoder.stages.{index}" for index in range(3))  # where they help most, see the lab notes


@dataclass(frozen=True)
class InstanceStatistics:
    """The instance weights of a network's batch norms, and what they do to its mean IoU.

    Attributes:
        weights: By the name of a part, "" for the whole network; see `set_instance_statistics`.
        checked_on: The split of the following scores.
        before: Mean IoU without, 0..1.
        after: Mean IoU with them.
    """

    weights: dict[str, float]
    checked_on: str
    before: float
    after: float

    def to_dict(self) -> dict[str, Any]:
        """Return the content as plain data, as the metadata of a checkpoint holds it under `instance_statistics`."""
        return asdict(self)


def read_weights(text: str, network: nn.Module) -> dict[str, float]:
    """Read instance weights as they are given on the command line.

    Args:
        text: `PART=WEIGHT,...`; or one weight, for the first three stages of the encoder, or the whole of a network
            without such stages. 0 stands for none.
        network: The network.

    Raises:
        UsageError: A weight is not a number from 0 to 1, or a part has two.

    Examples:
        >>> read_weights("encoder=0.2,encoder.stages.4=0", nn.Module()), read_weights("0.1", nn.Module())
        ({'encoder': 0.2, 'encoder.stages.4': 0.0}, {'': 0.1})
    """
    weights = {}
    for item in text.split(","):
        name, equals, number = item.rpartition("=")
        part = name.strip()
        if part in weights:
            raise UsageError(f"the instance weight of {part or 'the network'} is given twice - give it once")
        try:
            weights[part] = float(number)
        except ValueError:
            weights[part] = math.nan
        if not 0 <= weights[part] <= 1 or (equals and not part):
            raise UsageError(
                f"instance weight '{item}' - give a number from 0 to 1, such as 0.2, or one for each part, such as "
                "encoder=0.2"
            )
    if not any(weights.values()):
        return {}
    parts = {name for name, _ in network.named_modules()}
    if set(weights) == {""} and set(SHALLOW) < parts:
        return dict.fromkeys(SHALLOW, weights[""])
    return weights


def with_instance_statistics(
    checkpoint: Checkpoint,
    weights: Mapping[str, float],
    check: SegmentationDataset | None = None,
    *,
    device: torch.device | None = None,
    report: Callable[[str], None] = print,
) -> Checkpoint:
    """Return a checkpoint whose batch norms mix the statistics of each image into those of training.

    The weights of the network stay as they are. Its scores are measured without and with the mixing.

    Args:
        checkpoint: The checkpoint. Instance statistics that it has already are replaced.
        weights: See `set_instance_statistics`; none to remove them.
        check: The split to score; None for the val split of the checkpoint.
        device: The device; None for the best one.
        report: Called with lines for the user.

    Returns:
        The checkpoint, without the state of training and of averaged weights. `InstanceStatistics.to_dict` is in its
        metadata, under `instance_statistics`. Class offsets, the temperature and the ranges of 8-bit maps stay.

    Raises:
        UsageError: A part has no batch norm, or there are no instance statistics to remove.
    """
    if not weights and not checkpoint.facts.get("instance_statistics"):
        raise UsageError(f"{checkpoint.path} has no instance statistics to remove - use it as it is, or give a weight")
    plain = checkpoint.without_instance_statistics()
    model = plain.model()
    if not weights:
        report("instance statistics: removed")
        return plain.with_model(model, plain.facts)
    set_instance_statistics(model, weights)  # raises an error before the first pass rather than after it
    check = check or restore_dataset(checkpoint, "val")
    draft = InstanceStatistics(dict(weights), check.split, 0.0, 0.0)
    after = checkpoint.with_model(model, {**plain.facts, "instance_statistics": draft.to_dict()})
    mious = [
        float(scores(evaluate(Segmenter(each, PredictionSettings(), device=device), check)).miou)
        for each in (plain, after)
    ]
    measured = InstanceStatistics(draft.weights, check.split, *mious)
    for line in describe_instance_statistics(measured.to_dict()).split("; "):
        report(line)
    used = overlap(checkpoint, check)
    if used.trained_on:
        warn(
            f"the network was trained on {used.part_of(check.split)}, so mean IoU there does not show whether they help"
        )
    elif measured.after < measured.before:
        warn(
            f"the instance statistics lower mean IoU on {check.split} - keep the network without them, or give a "
            "smaller weight, unless your images are of other light than those"
        )
    return checkpoint.with_model(model, {**plain.facts, "instance_statistics": measured.to_dict()})
