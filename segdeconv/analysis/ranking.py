"""Ranking of unlabelled images by the expected gain from labelling them: uncertainty of regions times novelty.

The uncertainty of a pixel is the entropy of its class probabilities or, with dropout samples, their mutual information
with the weights (BALD; Houlsby et al. 2011, https://arxiv.org/abs/1112.5745; Gal et al. 2017,
https://arxiv.org/abs/1703.02910). The uncertainty of an image is the mean over its most uncertain regions.

The best single images are often almost the same image. So images are chosen one after the other, each by its
uncertainty times its distance, in the features of the encoder, from the nearest image that is labelled or chosen: the
greedy choice of a core-set (Sener & Savarese 2018, https://arxiv.org/abs/1708.00489) weighted by uncertainty, in the
sense of BADGE (Ash et al. 2020, https://arxiv.org/abs/1906.03671) and BatchBALD (Kirsch et al. 2019,
https://arxiv.org/abs/1906.08158), without their cost for each class or joint distribution.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from segdeconv.drawing.thumbnails import thumbnail_size
from segdeconv.errors import DivergedError, UsageError
from segdeconv.inference.batch import MAX_PIXELS_IN_MEMORY, MAX_READ_AHEAD, PixelBudget, read_within
from segdeconv.inference.network import Network
from segdeconv.inference.scorers import entropy, labels
from segdeconv.inference.segmenter import OpenedImage, Segmenter
from segdeconv.system.interruption import raise_again

CELLS = 16  # cells along the longer side of an image
TOP = 0.1  # the share of cells, the most uncertain ones, that make up the uncertainty of an image
MAX_STRIDE = 64  # maps that are smaller than the image by more are global statistics rather than features
PROBE = 256  # side in pixels of the image in which the deepest map is searched
DIVERSITY = 1.0


class Measured(NamedTuple):
    """Measurements of an image for the ranking.

    Attributes:
        path: The file.
        uncertainty: Its `region_uncertainty` in nats.
        features: (D,) float32, the mean over the image of the encoder's deepest feature map, of length 1.
    """

    path: Path
    uncertainty: float
    features: np.ndarray


class Ranked(NamedTuple):
    """A place in the ranking.

    Attributes:
        path: The file.
        score: `uncertainty` times `novelty` to the power of the diversity; images are ordered by it.
        uncertainty: Its `region_uncertainty` in nats.
        novelty: The distance of its features from those of `nearest`, as a share of the typical distance of two images,
            at most 1; 1 without an earlier image.
        nearest: The most similar image among those that are labelled or ranked before; None for the first one if no
            labelled images are given.
    """

    path: Path
    score: float
    uncertainty: float
    novelty: float
    nearest: Path | None


class EncoderFeatures:
    """The mean of a network's deepest feature map over an image, recorded by a forward hook.

    The deepest map is the smallest that any module returns, of at least a 64th of the image's side; of several, one
    with the most channels, then the last. For SegNet, that is the output of its encoder.

    Args:
        network: The network.
    """

    def __init__(self, network: Network) -> None:
        self.module = _deepest_module(network)
        self.handle = self.module.register_forward_hook(self._add)
        self.reset()

    def reset(self) -> None:
        """Forget the features of the image before."""
        self.total: Tensor | None = None
        self.cells = 0

    def mean(self) -> np.ndarray:
        """Return the features of all forward passes since `reset`, such as those of tiles: (D,) float32, of length 1.

        Features that are all zero stay so.
        """
        assert self.total is not None, "no forward pass since reset"
        mean = (self.total / self.cells).cpu().numpy()
        return (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)

    def close(self) -> None:
        """Remove the hook."""
        self.handle.remove()

    def _add(self, module: nn.Module, inputs: Any, output: Any) -> None:
        map_ = _map_of(output)
        assert map_ is not None, "it returned a map for the probe"
        total = map_.double().sum(dim=(0, 2, 3))
        self.total = total if self.total is None else self.total + total
        self.cells += map_.shape[0] * map_.shape[2] * map_.shape[3]


def _map_of(output: Any) -> Tensor | None:
    """Return the (N, C, h, w) map that a module returns, also as a field `features`."""
    features = getattr(output, "features", output)
    return features if isinstance(features, Tensor) and features.ndim == 4 else None


def _deepest_module(network: Network) -> nn.Module:
    side = max(PROBE, network.source.minimum_size)
    found: list[tuple[int, int, int, nn.Module]] = []
    calls = Counter[nn.Module]()

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        calls[module] += 1
        map_ = _map_of(output)
        if map_ is not None and min(map_.shape[2:]) * MAX_STRIDE >= side:
            found.append((map_.shape[2] * map_.shape[3], -map_.shape[1], -len(found), module))

    with ExitStack() as hooks:
        for module in network.model.modules():
            hooks.enter_context(module.register_forward_hook(record))
        network.logits(torch.zeros(1, network.source.in_channels, side, side))
    once = [entry for entry in found if calls[entry[3]] == 1]  # others, such as a shared ReLU, return several maps
    return min(once, key=lambda entry: entry[:3])[3]


def pixel_uncertainty(segmenter: Segmenter, image: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Predict an image and the uncertainty of every pixel.

    Args:
        segmenter: The network; with `samples`, the uncertainty is the mutual information, otherwise the entropy.
        image: (H, W, C) as `Segmenter.open` reads it.
        name: Its name, for messages.

    Returns:
        (H, W) uint8 class indices, and (H, W) float32 uncertainty in nats.

    Raises:
        DivergedError: The network's scores are not finite.
    """
    size = (image.shape[0], image.shape[1])
    segmenter.resized.add(name, size)
    mask, uncertainty = np.empty(size, dtype=np.uint8), np.empty(size, dtype=np.float32)
    for (rows, columns), scores in segmenter.predictor(image, name):
        area = slice(*rows), slice(*columns)
        mask[area] = labels(scores.values, (scores.values.shape[-2], scores.values.shape[-1]))[0].cpu().numpy()
        values = entropy(scores) if scores.information is None else scores.information
        uncertainty[area] = values[0].float().cpu().numpy()
    if not np.isfinite(uncertainty).all():
        raise DivergedError(
            f"the network's scores of {name} are not finite, since its weights are too large - use an earlier "
            "checkpoint, or train again with a lower optimizer.lr"
        )
    return mask, uncertainty


def region_uncertainty(uncertainty: np.ndarray) -> float:
    """Return the uncertainty of an image: the mean over the most uncertain tenth of its regions.

    Regions are the cells of a grid with 16 cells along the longer side, whatever the number of pixels. An object that
    the network does not know thus counts more than a little uncertainty everywhere.

    Args:
        uncertainty: (H, W) float32, of every pixel.

    Examples:
        >>> object_, haze = np.zeros((64, 64), np.float32), np.full((64, 64), 0.1, np.float32)
        >>> object_[:16, :16] = 1.0
        >>> round(region_uncertainty(object_), 2), round(region_uncertainty(haze), 2)
        (0.62, 0.1)
    """
    size = thumbnail_size(uncertainty.shape, CELLS)
    cells = np.sort(cv2.resize(uncertainty, size[::-1], interpolation=cv2.INTER_AREA), axis=None)
    return float(cells[-max(1, round(TOP * cells.size)) :].mean())


def measure(
    segmenter: Segmenter, paths: Sequence[Path], *, report: Callable[[str], None] = print
) -> Iterator[Measured]:
    """Measure images one after the other, while the next ones are read.

    Args:
        segmenter: The network with its prediction settings.
        paths: The files.
        report: Called with a message about each file that cannot be read.

    Yields:
        The measurements of each image that can be read, in order.
    """
    features = EncoderFeatures(segmenter.network)
    try:
        for path, image in _read_ahead(segmenter, paths):
            if isinstance(image, UsageError):
                report(f"skipped: {image}")
                continue
            features.reset()
            _, uncertainty = pixel_uncertainty(segmenter, image, str(path))
            yield Measured(path, region_uncertainty(uncertainty), features.mean())
    finally:
        features.close()


def _read_ahead(segmenter: Segmenter, paths: Sequence[Path]) -> Iterator[tuple[Path, np.ndarray | UsageError]]:
    """Yield each image, or the error that its reading raises; a thread reads the next ones meanwhile."""
    budget = PixelBudget(MAX_PIXELS_IN_MEMORY)

    waiting, reader = iter(paths), ThreadPoolExecutor(1)
    reads: deque[tuple[Path, Future[tuple[OpenedImage, int]]]] = deque()
    try:
        while True:
            for path in islice(waiting, MAX_READ_AHEAD - len(reads)):
                reads.append((path, reader.submit(read_within, budget, segmenter, path)))
            if not reads:
                return
            raise_again()
            path, future = reads.popleft()
            try:
                opened, pixels = future.result()
            except UsageError as error:
                yield path, error
                continue
            yield path, opened.image
            budget.release(pixels)
    finally:
        budget.close()
        reader.shutdown(cancel_futures=True)


def rank(
    images: Sequence[Measured], labelled: Sequence[Measured] = (), *, diversity: float = DIVERSITY
) -> list[Ranked]:
    """Order images by the expected gain from labelling them, each given those before it.

    Args:
        images: The images without labels.
        labelled: Images that have labels already, whose surroundings are less worth labelling.
        diversity: The weight of novelty: its exponent in the score. 0 ranks by uncertainty alone.

    Returns:
        All images, the first to label first. Of equal ones, the first given.
    """
    if not images:
        return []
    uncertainty = np.array([image.uncertainty for image in images])
    features = np.stack([image.features for image in images])
    typical = typical_distance(features)
    distance, nearest = np.full(len(images), np.inf), np.full(len(images), -1)

    def approach(other: np.ndarray, number: int) -> None:
        """Lower the distances to the nearest earlier image where the new one is nearer."""
        new = np.sqrt(np.maximum(0, 2 - 2 * (features @ other)))  # of vectors of length 1
        nearer = new < distance
        distance[nearer], nearest[nearer] = new[nearer], number

    for number, image in enumerate(labelled):
        approach(image.features, len(images) + number)
    remaining = np.ones(len(images), dtype=bool)
    paths = [image.path for image in [*images, *labelled]]
    ranked = []
    for _ in images:
        novelty = np.minimum(1, distance / typical) if typical > 0 else np.ones(len(images))
        scores = uncertainty * novelty**diversity
        index = int(np.where(remaining, scores, -1).argmax())
        earlier = paths[nearest[index]] if nearest[index] >= 0 else None
        entry = Ranked(paths[index], float(scores[index]), float(uncertainty[index]), float(novelty[index]), earlier)
        ranked.append(entry)
        remaining[index] = False
        approach(features[index], index)
    return ranked


def typical_distance(features: np.ndarray) -> float:
    """Return the root mean square of the distance of two images.

    Args:
        features: (N, D), of length 1.

    Examples:
        >>> round(typical_distance(np.array([[1.0, 0.0], [0.0, 1.0]])) ** 2, 3)  # half of the pairs are of equal images
        1.0
    """
    mean = features.astype(np.float64).mean(axis=0)
    return float(np.sqrt(max(0.0, 2 - 2 * float(mean @ mean))))
