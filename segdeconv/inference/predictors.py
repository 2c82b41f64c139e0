"""Predictors, which map an image to its class scores: in tiles, by regions, with an ensemble, refined by a CRF."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.classes import match_classes
from segdeconv.config import check
from segdeconv.data.files.geo import BLOCK
from segdeconv.data.preprocessing import Preprocessing
from segdeconv.data.proposals import source
from segdeconv.drawing import draw
from segdeconv.errors import UsageError, for_caller
from segdeconv.inference.crf import CRF, refine
from segdeconv.inference.dropout_sampling import sampled
from segdeconv.inference.network import Network
from segdeconv.inference.quantization import INT8, Ranges
from segdeconv.inference.regions import Mode, by_regions
from segdeconv.inference.scorers import ClassScores, Predictor, resized
from segdeconv.inference.tiling import Part, Size, parts, whole
from segdeconv.inference.views import ImageView, Tiler, resized_part
from segdeconv.system.files import replacing
from segdeconv.system.memory import available

UNLIMITED = 1 << 30  # pixels of a side
MIN_MEMORY = 1 << 28  # a lower bound, since smaller tiles consist mostly of overlap
MAX_MEMORY = 4 << 30  # bytes of feature maps, unless `memory` asks for more
AVAILABLE_MEMORY_DIVISOR = 4  # feature maps may take a quarter of the available memory
BYTES_PER_SCORE = 16  # of the result, for each class and pixel: scores, their softmax, and copies

SIMPLE = ("flip", "scales", "samples", "memory", "tile", "ensemble_mode", "min_area")  # settings that are plain values

EnsembleMode = Literal["paper", "released"]


@dataclass(frozen=True, kw_only=True)
class RegionSettings:
    """Settings of prediction by object proposals, see `regions.by_regions`.

    Attributes:
        num: Regions per image, 1 or more.
        proposals: `windows`, `selective_search`, `edge_boxes`, or a file of boxes.
        mode: Rule for overlapping regions: `paper`, `mean` or `released`.
        min_side: Smallest side of a region in pixels; None for the default of the mode.
        with_whole: Use the whole image as an additional region.
        save_to: Folder for NAME.npz of every image: boxes (N, 4), scores (N, C, h, w) float32.
    """

    num: int
    proposals: str = "windows"
    mode: Mode = "paper"
    min_side: int | None = None
    with_whole: bool = False
    save_to: Path | None = None


def _option(name: str) -> str:
    """Return how a setting is called by the caller."""
    option = "ensemble" if name == "second" else name.replace("_", "-")
    return for_caller(name, f"--{option}")


@dataclass(frozen=True, kw_only=True)
class PredictionSettings:
    """Prediction settings of a checkpoint.

    Attributes:
        precision: `auto`, `32-true`, `bf16-mixed`, `16-mixed` or, on a CPU, `int8`.
        ranges: The ranges of the maps for `int8`, see `evaluation.quantization.calibrate`; None for those of the
            checkpoint.
        flip: Average the probabilities of the image and its mirror image.
        scales: Average the probabilities over the image at these multiples of the input size, each in (0, 16].
        samples: Average this many forward passes with dropout; 0 for one without.
        memory: Bytes of the network's feature maps; None for a quarter of the available memory, but 256 MiB to 4
            GiB. An image that needs more is predicted in tiles, with the same result.
        tile: (H, W) of the largest tile, overlap included, in place of `memory`.
        regions: Predict by object proposals, as DeconvNet does.
        second: A second network of the same classes, whose probabilities are averaged with those of the first.
        ensemble_mode: `paper` is the mean of both softmaxes; `released` is the softmax of the product of both scores,
            each clamped at 0 from below.
        crf: Refine the result by a CRF.
        min_area: Merge regions of fewer pixels into those around them; see `small_regions.merge_small_regions`.

    Raises:
        UsageError: A setting is out of range, or settings exclude each other_scores.
    """

    precision: str = "auto"
    ranges: Ranges | None = None
    flip: bool = False
    scales: Sequence[float] = (1.0,)
    samples: int = 0
    memory: int | None = None
    tile: Size | None = None
    regions: RegionSettings | None = None
    second: Checkpoint | None = None
    ensemble_mode: EnsembleMode = "paper"
    crf: CRF | None = None
    min_area: int = 1

    def __post_init__(self) -> None:
        for name, value in check_settings(self).items():
            object.__setattr__(self, name, value)
        several = self.regions is not None or self.second is not None
        if self.precision == INT8 and (self.samples or self.second is not None):
            option = _option("samples") if self.samples else _option("second")
            raise UsageError(f"{option} is not supported in {_option('precision')} {INT8} - leave out one of them")
        if not self.scales or any(not 0 < scale <= 16 for scale in self.scales):
            raise UsageError(
                f"scales={list(self.scales)} are not valid scales; each must be above 0 and at most 16 - "
                "give numbers such as 0.75,1,1.25"
            )
        if self.samples and len(self.scales) > 1:
            raise UsageError(
                f"{_option('samples')} and {_option('scales')} cannot be combined: both average forward passes - leave "
                "one out"
            )
        if (several or self.crf) and (self.samples or (self.flip and several)):
            raise UsageError(
                f"{_option('samples')} and {_option('flip')} average probabilities, but {_option('regions')} and "
                f"{_option('second')} need scores before the softmax - leave one of them out ({_option('crf')} can be "
                f"combined with {_option('flip')})"
            )
        if (several or self.crf) and (self.tile or tuple(self.scales) != (1.0,)):
            raise UsageError(
                f"{_option('regions')}, {_option('second')} and {_option('crf')} cannot be combined with "
                f"{_option('scales')} or {_option('tile')} - leave out {_option('scales')} and {_option('tile')}"
            )
        if self.regions and self.regions.num < 1:
            raise UsageError(
                f"{_option('regions')}={self.regions.num} is not a valid number of regions - give 1 or more"
            )
        if self.min_area < 1:
            raise UsageError(f"{_option('min_area')}={self.min_area} is not a valid number of pixels - give 1 or more")

    @property
    def single_pass(self) -> bool:
        """True if one forward pass over the whole image gives its prediction, so that images can be batched."""
        return not (self.regions or self.second or self.crf or self.tile) and tuple(self.scales) == (1.0,)


def check_settings(settings: PredictionSettings) -> dict[str, Any]:
    """Return the settings that have a simple value, with lists as tuples; one number serves as `scales` and `tile`.

    Raises:
        UsageError: A value has the wrong type.
    """
    values = {name: getattr(settings, name) for name in SIMPLE}
    values["scales"], values["tile"] = (
        value.tolist() if isinstance(value, np.ndarray) else value for value in (values["scales"], values["tile"])
    )
    if isinstance(values["scales"], int | float):
        values["scales"] = (values["scales"],)
    if isinstance(values["tile"], int):
        values["tile"] = (values["tile"], values["tile"])
    checked = check(values, "", [PredictionSettings])
    for name, kind in (("regions", RegionSettings), ("second", Checkpoint), ("crf", CRF)):
        value = getattr(settings, name)
        if value is not None and not isinstance(value, kind):
            raise UsageError(f"{name} is of type {type(value).__name__} - give a {kind.__name__}")
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in checked.items() if name in SIMPLE
    }


def build_predictor(
    checkpoint: Checkpoint, network: Network, settings: PredictionSettings, *, report: Callable[[str], None] = print
) -> Predictor:
    """Build the predictor for the given settings.

    Args:
        checkpoint: The checkpoint of `network`.
        report: Called with a message when prediction deviates from the settings, for example with smaller tiles.

    Raises:
        UsageError: The checkpoint does not support the settings.
    """
    predictor: Predictor = (
        _region_predictor(checkpoint, network, settings.regions)
        if settings.regions
        else TiledPredictor(
            network,
            checkpoint.preprocessing,
            scales=settings.scales,
            memory=settings.memory,
            tile=settings.tile,
            report=report,
        )
    )
    if settings.second is not None:
        second = Network.of(settings.second, device=network.device, precision=settings.precision)
        order = match_classes(
            checkpoint.classes,
            settings.second.classes,
            owners=(str(checkpoint.path), str(settings.second.path)),
            way_out="an ensemble needs networks with the same classes",
        )
        other = TiledPredictor(second, settings.second.preprocessing, report=report)
        predictor = ensemble(predictor, other, settings.ensemble_mode, order)
    return refined(predictor, settings.crf) if settings.crf else predictor


def whole_image(predictor: Predictor, image: np.ndarray, name: str) -> ClassScores:
    """Compute the scores of a whole image, (1, C, H, W) float32, and assemble them from their parts."""
    canvas: ClassScores | None = None
    for (rows, columns), scores in predictor(image, name):
        if scores.values.shape[-2:] == image.shape[:2]:
            return scores
        if canvas is None:
            empty = scores.values.new_empty((1, scores.values.shape[1], *image.shape[:2]))
            maps = (None if map_ is None else empty.new_empty((1, *image.shape[:2])) for map_ in scores[2:])
            canvas = ClassScores(empty, scores.is_probability, *maps)
        for map_, part in zip(canvas, scores, strict=True):
            if isinstance(map_, Tensor) and isinstance(part, Tensor):
                map_[..., slice(*rows), slice(*columns)] = part
    assert canvas is not None
    return canvas


class TiledPredictor:
    """A predictor that processes an image whole, or in tiles if it needs too much memory, at one or more scales.

    Args:
        network: The network; its `flip` and `samples` apply.
        preprocessing: Its size is the network's input size at scale 1; None for the size of each image.
        scales: See `PredictionSettings`.
        memory: See `PredictionSettings`.
        tile: See `PredictionSettings`.
        report: Called with a message when memory runs out and tiles become smaller.

    Raises:
        UsageError: The tile is smaller than the network's receptive field allows.
    """

    def __init__(
        self,
        network: Network,
        preprocessing: Preprocessing,
        *,
        scales: Sequence[float] = (1.0,),
        memory: int | None = None,
        tile: Size | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        self.network, self.preprocessing, self.scales = network, preprocessing, scales
        free = available(network.device)
        part = MAX_MEMORY if free is None else free // AVAILABLE_MEMORY_DIVISOR
        self.memory = memory or max(MIN_MEMORY, min(MAX_MEMORY, part))
        self.tiler = Tiler(network.source, memory=self.memory, tile=tile, report=report)
        if tile is not None:
            self.tiler.geometry.steps(tile, (UNLIMITED, UNLIMITED))  # raises UsageError now if the tile is too small

    def __call__(self, image: np.ndarray, name: str) -> Iterator[tuple[Part, ClassScores]]:
        size = (image.shape[0], image.shape[1])
        views = [
            ImageView(image, self._input_size(size, scale), self.network, self.preprocessing, self.tiler, name)
            for scale in self.scales
        ]
        if self.network.samples:
            yield from self._sampled(views[0], size)
            return
        several = len(views) > 1
        complete = {view: view.scores() for view in views if self.tiler.step(view.size) is None}
        sources = [partial(_crop, complete[view]) if view in complete else view.scores for view in views]
        for part in parts(size, self._step(views, size)):
            total: Tensor | None = None
            for view, scores in zip(views, sources, strict=True):
                if part == whole(size) and view in complete:
                    values = resized(complete[view], size).float()
                else:
                    values = resized_part(scores, view.size, size, part)
                if several and not self.network.flip:
                    values = values.softmax(dim=1)
                total = values if total is None else total + values
            assert total is not None
            yield part, ClassScores(total / len(views) if several else total, self.network.flip or several)

    def _sampled(self, view: ImageView, size: Size) -> Iterator[tuple[Part, ClassScores]]:
        def probabilities(part: Part) -> Tensor:
            return ClassScores(view.scores(part).float(), self.network.flip).probabilities()

        draw_samples = sampled(probabilities, self.network.model, self.network.samples)

        def sampled_maps(part: Part) -> Tensor:
            samples = draw_samples(part)
            maps = [samples.probabilities, samples.uncertainty[:, None], samples.information[:, None]]
            return torch.cat(maps, dim=1)

        complete = sampled_maps(whole(view.size)) if self.tiler.step(view.size) is None else None
        source = sampled_maps if complete is None else partial(_crop, complete)
        for part in parts(size, self._step([view], size)):
            if complete is not None and part == whole(size):
                maps = resized(complete, size)
            else:
                maps = resized_part(source, view.size, size, part)
            yield part, ClassScores(maps[:, :-2], True, maps[:, -2], maps[:, -1])

    def _input_size(self, size: Size, scale: float) -> Size:
        base = self.preprocessing.size or size
        return max(1, round(scale * base[0])), max(1, round(scale * base[1]))

    def _step(self, views: Sequence[ImageView], size: Size) -> Size:
        """Return the size of the parts of the result: no larger than the views' tiles, and within the memory limit.

        They are aligned to the tiles of a GeoTIFF, each of which is then compressed and written once.
        """
        height, width = size
        for view in views:
            step = self.tiler.step(view.size)
            if step is not None:
                height = min(height, max(1, step[0] * size[0] // view.size[0]))
                width = min(width, max(1, step[1] * size[1] // view.size[1]))
        if height == size[0] and width == size[1]:
            height = max(1, min(height, self.memory // (BYTES_PER_SCORE * self.network.source.num_classes * width)))
        return _aligned(height, size[0]), _aligned(width, size[1])


def _aligned(step: int, length: int) -> int:
    return step // BLOCK * BLOCK if BLOCK < step < length else step


def _crop(scores: Tensor, part: Part) -> Tensor:
    return scores[..., slice(*part[0]), slice(*part[1])]


def _region_predictor(checkpoint: Checkpoint, network: Network, regions: RegionSettings) -> Predictor:
    settings = checkpoint.config["dataset"]
    input_size = settings["crop"] or settings["size"]  # the crop is what the network was trained on
    if not input_size:
        raise UsageError("--regions needs a size for every region - set it, for example dataset.crop=[224,224]")
    first = checkpoint.classes.names[0]
    if first != "background" and not regions.with_whole:
        raise UsageError(f"pixels outside all regions would become '{first}', the first class - add --with-whole")
    propose = source(regions.proposals)
    return by_regions(
        lambda images: network(images).values,
        replace(checkpoint.preprocessing, size=(input_size[0], input_size[1])),
        lambda image, name: propose(draw.to_rgb(image), name),
        num=regions.num,
        mode=regions.mode,
        context=settings.get("context", 1.2),
        min_side=regions.min_side,
        with_whole=regions.with_whole,
        batch_size=settings["batch_size"],
        on_scores=_saver(regions.save_to) if regions.save_to else None,
    )


def _saver(folder: Path) -> Callable[[str, np.ndarray, Tensor], None]:
    """Return a function that writes each image's regions to DIR/NAME.npz: boxes (N, 4), scores (N, C, h, w) float32."""
    batches: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}  # of the current image only

    def save(name: str, boxes: np.ndarray, scores: Tensor) -> None:
        if name not in batches:
            batches.clear()
        batches.setdefault(name, []).append((boxes, scores.cpu().numpy()))
        with replacing(folder / f"{name}.npz") as file:
            np.savez(
                file,
                boxes=np.concatenate([boxes for boxes, _ in batches[name]]),
                scores=np.concatenate([scores for _, scores in batches[name]]),
            )

    return save


def ensemble(first: Predictor, second: Predictor, mode: EnsembleMode, order: Sequence[int]) -> Predictor:
    """Combine the probabilities of two networks, such as EDeconvNet: DeconvNet and FCN-8s.

    Noh, Hong, Han 2015, section 4.4, https://arxiv.org/abs/1505.04366.

    Args:
        mode: See `PredictionSettings.ensemble_mode`.
        order: The index in the second network of each class of the first.
    """

    def predict(image: np.ndarray, name: str) -> Iterator[tuple[Part, ClassScores]]:
        scores = whole_image(first, image, name)
        other_scores = whole_image(second, image, name)
        other_scores = other_scores._replace(values=other_scores.values[:, list(order)].to(scores.values.device))
        if mode == "paper":
            combined = (scores.probabilities() + other_scores.probabilities()) / 2
        else:
            combined = (scores.values.clamp(min=0) * other_scores.values.clamp(min=0)).softmax(dim=1)
        yield whole((image.shape[0], image.shape[1])), ClassScores(combined, True)

    return predict


def refined(predictor: Predictor, settings: CRF) -> Predictor:
    """Return a predictor whose probabilities are those of another, refined by a fully connected CRF."""

    def predict(image: np.ndarray, name: str) -> Iterator[tuple[Part, ClassScores]]:
        probabilities = whole_image(predictor, image, name).probabilities()[0]
        values = refine(probabilities, draw.to_rgb(image), settings=settings)[None]
        yield whole((image.shape[0], image.shape[1])), ClassScores(values, True)

    return predict
