"""Suspects: regions of masks that disagree with a confident network, which may be labelling errors.

As in confident learning (Northcutt, Jiang, Chuang 2021, https://arxiv.org/abs/1911.00068), a region is suspect if the
network is about as certain of another class there as it is, on average, where the masks do have that class (equation
2). So the threshold follows the network's confidence in each class, which need not be calibrated. Suspects are ordered
by how unlikely the mask's class is to the network (the paper's self-confidence), and by size.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
import torch
from tqdm import tqdm

from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.loading import explain_loader_errors
from segdeconv.errors import DivergedError
from segdeconv.evaluation.evaluate import class_scores
from segdeconv.inference.scorers import labels_and_confidence
from segdeconv.inference.segmenter import Segmenter

MIN_SHARE = 0.001  # of the pixels of an image; smaller regions are left out by default
CERTAIN = 0.9  # of the mean confidence; with 1, fewer of the masks that were altered for a test are found
LEAST = 1e-6  # probability below which classes are equally unlikely
BAND = 250  # a boundary band is as wide as the longer side of the image divided by this, on either side


class Region(NamedTuple):
    """A connected region in which a mask and a prediction disagree in the same way.

    Attributes:
        box: (top, left, bottom, right) in pixels, bottom and right excluded.
        inside: (bottom - top, right - left) bool, the pixels of the box that belong to the region.
        mask_class: Index of the class in the mask.
        network_class: Index of the predicted class.
    """

    box: tuple[int, int, int, int]
    inside: np.ndarray
    mask_class: int
    network_class: int


class Suspect(NamedTuple):
    """A region that may be labelled wrongly.

    Attributes:
        place: Index of the image in the data set.
        region: The region.
        pixels: Its number of pixels.
        confidence: The mean probability of the network's class in it.
        mask_probability: The mean probability of the mask's class in it.
        score: The mean of -log of the probability of the mask's class, in nats, times log(pixels); suspects are ordered
            by it.
    """

    place: int
    region: Region
    pixels: int
    confidence: float
    mask_probability: float
    score: float


def disagreements(mask: np.ndarray, prediction: np.ndarray, ignore_index: int, *, min_area: int) -> Iterator[Region]:
    """Yield the regions in which a mask and a prediction differ, without the bands along boundaries.

    Bands are removed by an opening: a region remains where a square fits into it whose side is 1/125 of the longer side
    of the image. What is thinner, also a pole, is not found.

    Args:
        mask: (H, W) uint8 class indices or ignore_index.
        prediction: (H, W) uint8 class indices.
        ignore_index: The value of ignored pixels.
        min_area: Smallest number of pixels of a region.
    """
    radius = max(1, round(max(mask.shape) / BAND))
    square = np.ones((2 * radius + 1, 2 * radius + 1), dtype=np.uint8)
    pairs = np.where((mask != prediction) & (mask != ignore_index), 256 * mask.astype(np.int32) + prediction, -1)
    values, counts = np.unique(pairs, return_counts=True)
    for value in values[(values >= 0) & (counts >= min_area)].tolist():
        opened = cv2.morphologyEx((pairs == value).astype(np.uint8), cv2.MORPH_OPEN, square)
        count, numbers, statistics, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
        for number in range(1, count):
            left, top, width, height, pixels = statistics[number].tolist()
            if pixels >= min_area:
                box = (top, left, top + height, left + width)
                yield Region(box, numbers[box[0] : box[2], box[1] : box[3]] == number, *divmod(value, 256))


def find_suspects(segmenter: Segmenter, dataset: SegmentationDataset, *, min_area: int | None = None) -> list[Suspect]:
    """Find the regions of a labelled split whose masks disagree with a confident network.

    Args:
        segmenter: The network with its prediction settings.
        dataset: A split as `restore_dataset` returns it.
        min_area: Smallest number of pixels of a region; None for a thousandth of each image.

    Returns:
        The suspects, the most suspect first.

    Raises:
        DivergedError: The network's scores are not finite.
    """
    ignore_index, count = dataset.classes.ignore_index, len(dataset.classes)
    sums, pixels = np.zeros(count), np.zeros(count)  # of the probability of the mask's class
    found: list[Suspect] = []
    bar = tqdm(total=len(dataset), desc=f"checking {dataset.split}", unit="image", disable=None)
    with explain_loader_errors(), bar:
        for place, (scores, stored) in enumerate(class_scores(segmenter, dataset)):
            probabilities = scores.probabilities()[0].float()
            (prediction,), (confidence,) = labels_and_confidence(scores)
            if not bool(torch.isfinite(confidence).all()):
                raise DivergedError(
                    f"the network's scores of {dataset.names[place]} are not finite, since its weights are too large - "
                    "use an earlier checkpoint, or train again with a lower optimizer.lr"
                )
            mask, valid = stored.numpy(), stored.numpy() != ignore_index
            index = torch.from_numpy(np.where(valid, mask, 0)).long().to(probabilities.device)
            given = probabilities.gather(0, index[None])[0].cpu().numpy()
            sums += np.bincount(mask[valid], given[valid], minlength=count)
            pixels += np.bincount(mask[valid], minlength=count)
            least = min_area or max(1, round(MIN_SHARE * mask.size))
            for region in disagreements(mask, prediction.cpu().numpy(), ignore_index, min_area=least):
                found.append(_suspect(place, region, confidence.cpu().numpy(), given))
            bar.update()
    thresholds = np.divide(sums, pixels, out=np.ones(count), where=pixels > 0)
    suspects = [entry for entry in found if entry.confidence >= CERTAIN * thresholds[entry.region.network_class]]
    return sorted(suspects, key=lambda suspect: -suspect.score)


def _suspect(place: int, region: Region, confidence: np.ndarray, given: np.ndarray) -> Suspect:
    """Return the suspect for a region; both maps are (H, W), of the predicted class and of the mask's class."""
    top, left, bottom, right = region.box
    own, masks = (map_[top:bottom, left:right][region.inside] for map_ in (confidence, given))
    loss = float(-np.log(np.maximum(masks, LEAST)).mean())
    return Suspect(place, region, masks.size, float(own.mean()), float(masks.mean()), loss * math.log(masks.size))
