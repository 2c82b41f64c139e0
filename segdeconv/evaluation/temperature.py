"""Temperature scaling: one number, fitted on a split, that makes a network's probabilities agree with its accuracy.

Guo et al. 2017, section 4.2, https://arxiv.org/abs/1706.04599: the probabilities are the softmax of the logits divided
by a temperature T, which minimises the negative log-likelihood (NLL) of labelled pixels. T > 1 makes an overconfident
network less confident; the most probable class stays the same.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.classes import Classes
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.errors import UsageError, warn
from segdeconv.evaluation.calibration import Calibration
from segdeconv.evaluation.evaluate import finite_scores, restore_dataset, sampled_per_image
from segdeconv.evaluation.overlap import overlap
from segdeconv.evaluation.report import describe_temperature
from segdeconv.inference.predictors import PredictionSettings
from segdeconv.inference.scorers import ClassScores, labels_and_confidence
from segdeconv.inference.segmenter import Segmenter
from segdeconv.models.logits import divide_logits, logit_parameters

TOLERANCE = 1e-3  # relative; the standard error over the images of a data set is larger
MAX_PASSES = 5
LIMIT = 100.0  # largest temperature, and the inverse of the smallest one
FEW_IMAGES = 10


@dataclass(frozen=True)
class Probabilities:
    """How well class probabilities agree with labels.

    Attributes:
        nll: Mean negative log-likelihood of the labelled pixels, in nats.
        expected_calibration_error: See `Calibration.error`, 0..1.
    """

    nll: float
    expected_calibration_error: float


@dataclass(frozen=True)
class Temperature:
    """The temperature of a network, and what it does to the probabilities.

    Attributes:
        value: The logits of the network as it was trained were divided by this number.
        standard_error: Of the value as an estimate for other images of this kind; None for a single image.
        split: The split it was fitted on.
        images: Number of its images.
        pixels: Number of their labelled pixels.
        before: The probabilities of the network that was given.
        after: Those of the calibrated network.
    """

    value: float
    standard_error: float | None
    split: str
    images: int
    pixels: int
    before: Probabilities
    after: Probabilities

    def __str__(self) -> str:
        return describe_temperature(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the content as plain data, as the metadata of a checkpoint holds it under `temperature`."""
        return asdict(self)


def calibrated(
    checkpoint: Checkpoint,
    dataset: SegmentationDataset | None = None,
    *,
    device: torch.device | None = None,
    report: Callable[[str], None] = print,
) -> Checkpoint:
    """Return a checkpoint whose logits are divided by the temperature that is the best for a split.

    The first pass over the images keeps the logits of randomly chosen pixels of each, up to 16 million numbers, whose
    optimum is computed in float64. A further pass measures the calibrated network on all labelled pixels, and the
    distance of its temperature from their optimum; passes are repeated until that is below 0.1 %. The network predicts
    as `evaluate` does, in the precision that is fast on the device.

    Args:
        checkpoint: The checkpoint.
        dataset: The split, with the classes in the order of the network; None for the val split of the checkpoint.
        device: The device; None for the best one.
        report: Called with lines for the user.

    Returns:
        The checkpoint, without the state of training and of averaged weights, and without the ranges of 8-bit maps.
        `Temperature.to_dict` is in its metadata, under `temperature`.

    Raises:
        UsageError: The labelled pixels do not determine a temperature, or the network has no linear last layer.
        DivergedError: The network's scores are not finite.
    """
    if dataset is None:
        dataset = restore_dataset(checkpoint, "val")
    original, model = Segmenter(checkpoint, PredictionSettings(), device=device), checkpoint.model()
    size = checkpoint.preprocessing.size or (model.minimum_size, model.minimum_size)
    logit_parameters(model, size=size)  # raises an error before the first pass rather than after it
    before = _measure(original, dataset, sampled=sampled_per_image(dataset))
    _require_labels(before, dataset)
    temperature = _optimum(before, checkpoint)
    for _ in range(MAX_PASSES):
        model = checkpoint.model()
        divide_logits(model, temperature, size=size)
        network = checkpoint.with_model(model, checkpoint.facts)
        after = _measure(Segmenter(network, PredictionSettings(), device=device), dataset)
        if abs(after.step) < TOLERANCE:
            break
        temperature *= math.exp(after.step)
    else:
        raise UsageError(
            f"the temperature did not settle in {MAX_PASSES} passes, since the precision of this device is too low for "
            "the network - calibrate it on another device"
        )
    recorded = checkpoint.facts.get("temperature")
    total = temperature * (recorded["value"] if recorded else 1)
    if recorded:
        report(f"{checkpoint.path} was calibrated before, by {recorded['value']:.4f}; on top of that {temperature:.4f}")
    used = overlap(checkpoint, dataset)
    if used.trained_on:
        part = used.part_of(dataset.split)
        warn(f"the network was trained on {part}, so for other images it stays too certain of its predictions")
    if len(dataset) < FEW_IMAGES:
        warn(f"{dataset.split} has {len(dataset)} images, too few for a temperature that holds for others")
    if checkpoint.facts.get("int8"):
        report("the ranges of 8-bit maps are left out: export --int8 and predict --precision int8 measure them again")
    fitted = Temperature(
        total,
        after.standard_error(total),
        dataset.split,
        len(dataset),
        before.pixels,
        before.probabilities,
        after.probabilities,
    )
    facts = {name: value for name, value in checkpoint.facts.items() if name != "int8"}
    report(str(fitted))
    return checkpoint.with_model(model, {**facts, "temperature": fitted.to_dict()})


class _Measured:
    """Sums over the labelled pixels of a split, in float64.

    With z the logits of a pixel, y its class and p their softmax, the derivative of its NLL by the logarithm of the
    factor of z is the mean of z under p minus z_y, and the second derivative at the optimum the variance of z under p.

    Args:
        classes: The classes.
        sampled: Number of pixels of each image whose logits are kept.
    """

    def __init__(self, classes: Classes, sampled: int) -> None:
        self.calibration = Calibration(classes.ignore_index)
        self.sampled, self.num_classes = sampled, len(classes)
        self.nll, self.curvature = 0.0, 0.0
        self.gradients: list[float] = []  # of each image
        self.pixels_of_class = torch.zeros(len(classes), dtype=torch.int64)
        self.logits: list[Tensor] = []  # (C, P) float32 of each image
        self.labels: list[Tensor] = []  # (P,) int64 of each image

    def update(self, scores: ClassScores, mask: Tensor) -> None:
        """Add an image: scores with N = 1 at the size of its mask, (H, W)."""
        (prediction,), (confidence,) = labels_and_confidence(scores)
        self.calibration.update(prediction, confidence, mask)
        labelled = mask != self.calibration.ignore_index
        logits, labels = scores.values[0][:, labelled].float().cpu(), mask[labelled].long().cpu()
        self.pixels_of_class += torch.bincount(labels, minlength=self.num_classes)
        if 0 < self.sampled < len(labels):
            chosen = torch.randint(
                len(labels), (self.sampled,), generator=torch.Generator().manual_seed(len(self.gradients))
            )
            self.logits.append(logits[:, chosen])
            self.labels.append(labels[chosen])
        elif self.sampled:
            self.logits.append(logits)
            self.labels.append(labels)
        nll, gradient, curvature = _derivatives(logits.double(), labels)
        self.nll += nll
        self.gradients.append(gradient)
        self.curvature += curvature

    @property
    def pixels(self) -> int:
        """The number of labelled pixels."""
        return int(self.pixels_of_class.sum())

    @property
    def probabilities(self) -> Probabilities:
        """The scores of the probabilities."""
        return Probabilities(self.nll / self.pixels, self.calibration.error)

    @property
    def step(self) -> float:
        """The logarithm of the temperature that is the best for these logits, by one step of Newton's method."""
        return math.fsum(self.gradients) / self.curvature

    def standard_error(self, temperature: float) -> float | None:
        """Return the standard error of the best temperature, the images being independent; None for a single one.

        The sandwich estimator for clustered data: pixels of an image are not independent.
        """
        count = len(self.gradients)
        if count < 2:
            return None
        squares = math.fsum(gradient**2 for gradient in self.gradients)
        return temperature * math.sqrt(squares * count / (count - 1)) / self.curvature


def _derivatives(logits: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Return the sums over pixels of the NLL, of its derivative by the logarithm of the factor of the logits, and of
    the second derivative.

    Args:
        logits: (C, P) float64.
        labels: (P,) int64, class indices.
    """
    log_probabilities = logits.log_softmax(dim=0)
    probabilities = log_probabilities.exp()
    of_label = log_probabilities.gather(0, labels[None])[0]
    mean = (probabilities * log_probabilities).sum(dim=0)
    variance = (probabilities * (log_probabilities - mean).square()).sum(dim=0)
    return float(-of_label.sum()), float((mean - of_label).sum()), float(variance.sum())


def _measure(segmenter: Segmenter, dataset: SegmentationDataset, *, sampled: int = 0) -> _Measured:
    """Measure the probabilities of a network at the size of the masks; see `_Measured`."""
    measured, device = _Measured(dataset.classes, sampled), segmenter.network.device
    measured.calibration.to(device)
    with torch.inference_mode():
        for scores, mask in finite_scores(segmenter, dataset):
            measured.update(scores, mask.to(device))
    return measured


def _require_labels(measured: _Measured, dataset: SegmentationDataset) -> None:
    """Raise UsageError if the labelled pixels cannot determine a temperature."""
    present = measured.pixels_of_class.nonzero().flatten().tolist()
    split = f"split {dataset.split} ({len(dataset)} images)"
    if not present:
        raise UsageError(f"{split} has no labelled pixel, so that no temperature can be fitted - correct its masks")
    if len(present) == 1:
        raise UsageError(
            f"all labelled pixels of {split} are {dataset.classes.names[present[0]]}, so that no temperature can be "
            "fitted - add images with other classes"
        )


def _optimum(measured: _Measured, checkpoint: Checkpoint) -> float:
    """Return the temperature that minimises the NLL of the sampled pixels.

    Raises:
        UsageError: There is none between 1 / LIMIT and LIMIT.
    """
    from scipy.optimize import brentq  # type: ignore[import-untyped]  # imported late: only this command needs it

    logits, labels = torch.cat(measured.logits, dim=1).double(), torch.cat(measured.labels)

    def gradient(log_temperature: float) -> float:
        return _derivatives(logits / math.exp(log_temperature), labels)[1]

    low, high = -math.log(LIMIT), math.log(LIMIT)
    if gradient(low) <= 0:
        raise UsageError(
            f"{checkpoint.path} is right on all sampled pixels, so that no probability is too high - calibrate it on "
            "images that it was not trained on"
        )
    if gradient(high) >= 0:
        raise UsageError(
            f"{checkpoint.path} gives the right classes no higher scores than others, so that no temperature helps - "
            "train it first"
        )
    return math.exp(brentq(gradient, low, high, xtol=1e-9))
