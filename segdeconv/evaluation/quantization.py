"""Calibration of 8-bit inference, which is accepted only if the scores stay what they were."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from segdeconv import __version__
from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.preprocessing import resize_image, stacked
from segdeconv.errors import UsageError
from segdeconv.evaluation.evaluate import evaluate, restore_dataset
from segdeconv.evaluation.metrics import ConfusionMatrix, scores
from segdeconv.inference.network import prepare_for_inference
from segdeconv.inference.predictors import PredictionSettings
from segdeconv.inference.quantization import INT8, Ranges, measure_ranges
from segdeconv.inference.scorers import with_padding
from segdeconv.inference.segmenter import Segmenter
from segdeconv.system.files import cache_root, hash_text, replace_text
from segdeconv.system.plain_data import PlainDataError, read_json

MAX_LOSS = 0.5  # points of mIoU
NUM_IMAGES = 16  # of the train split, on which ranges are measured
VERSION = 2  # of the rounding to 8 bits; a new number invalidates cached scores


@dataclass(frozen=True)
class Quantization:
    """The ranges of the maps of a network, and what 8 bits cost it.

    Attributes:
        ranges: The ranges, see `quantization.measure_ranges`.
        split: The split that was scored.
        images: Number of its images.
        float32: mIoU in float32, 0..1.
        int8: mIoU in 8 bits, 0..1.
    """

    ranges: Ranges
    split: str
    images: int
    float32: float
    int8: float

    @property
    def loss(self) -> float:
        """The points of mIoU that are lost; negative if it is better."""
        return 100 * (self.float32 - self.int8)

    def __str__(self) -> str:
        return (
            f"int8: mIoU {100 * self.int8:.2f} % on {self.split} ({self.images} images), {100 * self.float32:.2f} % in "
            f"float32: {abs(self.loss):.2f} points {'lost' if self.loss >= 0 else 'gained'}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the content as plain data, as the metadata of a checkpoint holds it under `int8`."""
        return asdict(self)


def calibrate(
    checkpoint: Checkpoint, *, max_loss: float = MAX_LOSS, report: Callable[[str], None] = print
) -> Quantization:
    """Measure the ranges of a network's maps on its train split, and its scores on val in float32 and in 8 bits.

    What a checkpoint holds is used as it is; what was measured before for the same weights and data is read from the
    user's cache.

    Args:
        checkpoint: The checkpoint.
        max_loss: Largest acceptable loss, in points of mIoU.
        report: Called with the scores.

    Raises:
        UsageError: The data set is not there, or the loss is larger.
    """
    stored = checkpoint.facts.get("int8")
    quantization = Quantization(**stored) if stored else _from_cache_or_data(checkpoint, report)
    report(str(quantization))
    require_loss(quantization, max_loss)
    return quantization


def require_loss(quantization: Quantization, max_loss: float) -> None:
    """Raise UsageError if 8 bits cost more than `max_loss` points of mIoU."""
    if not quantization.loss <= max_loss:
        raise UsageError(
            f"8 bits cost {quantization.loss:.2f} points of mIoU, more than {max_loss:g} - leave out int8, or "
            "accept the loss with --max-loss POINTS"
        )


def miou_of(predict: Callable[[np.ndarray], np.ndarray], dataset: SegmentationDataset) -> float:
    """Return the mIoU, 0..1, of a function that predicts the (H, W) class indices of images as stored."""
    matrix = ConfusionMatrix(len(dataset.classes), dataset.classes.ignore_index)
    for index in tqdm(range(len(dataset)), desc=f"evaluating {dataset.split}", unit="image", disable=None):
        image, mask, _ = dataset[index]
        matrix.update(torch.as_tensor(predict(image)), torch.as_tensor(mask))
    return float(scores(matrix.compute()).miou)


def calibration_images(train: SegmentationDataset) -> Iterator[np.ndarray]:
    """Yield evenly spaced images of a split as stored, (H, W, C)."""
    for index in np.linspace(0, len(train) - 1, min(NUM_IMAGES, len(train))).astype(int).tolist():
        yield train[index].image


def _from_cache_or_data(checkpoint: Checkpoint, report: Callable[[str], None]) -> Quantization:
    try:
        train, val = restore_dataset(checkpoint, "train"), restore_dataset(checkpoint, "val")
    except UsageError as error:
        raise UsageError(f"int8 is calibrated on the images of training: {error}") from error
    state = [
        VERSION,
        checkpoint.sha256,
        train.fingerprint,
        val.fingerprint,
        checkpoint.preprocessing.to_dict(),
        __version__,
    ]
    path = cache_root() / "segdeconv" / "int8" / f"{hash_text(repr([*state, torch.__version__]))}.json"
    try:
        return Quantization(**read_json(path))
    except (OSError, PlainDataError, TypeError):
        pass  # measured again
    report(f"int8: measuring ranges on {min(NUM_IMAGES, len(train))} images of train, and scores on val, once")
    plain = checkpoint.without_instance_statistics()
    network = prepare_for_inference(plain.model(), torch.device("cpu"), "32-true")
    forward = with_padding(network, network.minimum_size)
    size, normalised = checkpoint.preprocessing.size, checkpoint.preprocessing.normalised
    images = (image if size is None else resize_image(image, size) for image in calibration_images(train))
    ranges = measure_ranges(network, (normalised(stacked([image])) for image in images), forward=forward)
    found = []
    for settings in (PredictionSettings(precision="32-true"), PredictionSettings(precision=INT8, ranges=ranges)):
        segmenter = Segmenter(plain, settings, device=torch.device("cpu"))
        found.append(float(scores(evaluate(segmenter, val)).miou))
    quantization = Quantization(ranges, val.split, len(val), *found)
    replace_text(path, json.dumps(quantization.to_dict()))
    return quantization
