"""A trained network in use: any image, of any size, to its mask. What predict.py does, and two lines of Python do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from segdeconv.checkpoints import checkpoint
from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.classes import Classes
from segdeconv.data.files.decoding import header_pixels
from segdeconv.data.files.reading import MAX_PIXELS, read_upright, turn_back
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.inference.dropout_sampling import Samples, sampled
from segdeconv.inference.regions import Predictor
from segdeconv.inference.scorers import labels, labels_and_confidence, ready, resized, scorer_on
from segdeconv.inference.tiling import Part, Size, parts
from segdeconv.inference.views import Tiler, View, enlarged
from segdeconv.system.devices import best_device, resolve_precision
from segdeconv.system.memory import available, hand_back, keep_freed

LARGE = 1 << 24  # pixels of an image with which memory is given back as soon as it is free
ENDLESS = 1 << 30  # pixels of a side
LEAST_MEMORY = 1 << 30  # since what the system calls free leaves out what it uses as a cache
MOST_MEMORY = 4 << 30  # bytes that maps take at most unless more is said
SHARE = 4  # of the memory that is free, one part is for maps
NUMBERS = 16  # bytes for each class and pixel of the result that is being made: scores, their softmax, and copies

# (part of the image, (C, h, w) float32 probabilities of it)
Sink = Callable[[Part, np.ndarray], None]


@dataclass(frozen=True)
class Prediction:
    """What a network says of one image, upright.

    image: (H, W, channels) as it was read. mask: (H, W) uint8 class indices.
    uncertainty: (H, W) float16 if it was asked for: with samples the mean variance over classes, otherwise the entropy
        of the probabilities, divided by the largest there can be, so 0..1.
    confidence: (H, W) float16 if it was asked for: the probability of the class in `mask`.
    stored: the EXIF orientation of the file that it was read from.
    """

    image: np.ndarray
    mask: np.ndarray
    classes: Classes
    uncertainty: np.ndarray | None
    confidence: np.ndarray | None
    stored: int
    again: Callable[[Sink], None]

    def probabilities(self) -> np.ndarray:
        """(C, H, W) float32, computed now: the network looks again."""
        found = np.empty((len(self.classes), *self.mask.shape), dtype=np.float32)

        def keep(part: Part, values: np.ndarray) -> None:
            found[:, slice(*part[0]), slice(*part[1])] = values

        self.again(keep)
        return found

    def pixels(self) -> dict[str, int]:
        """How many pixels each class has."""
        return dict(zip(self.classes.names, draw.pixel_counts(self.mask), strict=False))

    def overlay(self) -> np.ndarray:
        """(H', W', 3) uint8: the mask on the image, with a legend below; small images are enlarged."""
        return draw.overlay_with_legend(self.image, self.mask, self.classes)

    def save(self, path: str | Path) -> None:
        """The mask as a palette PNG, in the orientation of the image's file."""
        draw.save_mask(turn_back(self.mask, self.stored), self.classes, Path(path))


class Segmenter:
    """A checkpoint's network, ready to label images. Several threads may share one; they take turns.

    flip: mean probabilities of the image and its mirror image. scales: mean probabilities over the image at these
        multiples of the size that it is seen at. samples: the mean of so many passes with dropout.
    memory: bytes that the network's maps may take; None for a quarter of what is free, between 1 and 4 GiB. What needs
        more is seen in tiles, with the same result. tile: (H, W) of the largest tile, overlap included, in place of it.
    look: gives an image's probabilities in place of all that (`prediction.predictor_of`).
    told: called with a sentence where something goes on otherwise than asked.
    """

    def __init__(
        self,
        read: Checkpoint,
        *,
        device: torch.device | None = None,
        precision: str = "auto",
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        samples: int = 0,
        memory: int | None = None,
        tile: Size | None = None,
        look: Predictor | None = None,
        told: Callable[[str], None] = print,
    ) -> None:
        if not scales or any(not 0 < scale <= 16 for scale in scales):
            raise UsageError(f"scales={list(scales)} are no scales - give numbers such as 0.75,1,1.25")
        if samples and len(scales) > 1:
            raise UsageError("--samples and --scales are both means over looks - leave one of them out")
        self.read, self.classes, self.flip, self.scales, self.look = read, read.classes, flip, tuple(scales), look
        self.preprocess = read.preprocessing
        self.max_pixels = read.config["dataset"].get("max_pixels") or MAX_PIXELS
        self.device = device or best_device()
        free = available(self.device)
        self.memory = memory or max(LEAST_MEMORY, min(MOST_MEMORY, free // SHARE if free else MOST_MEMORY))
        model = read.model()
        precision = resolve_precision(precision, read.facts["precision"])
        network, minimum = ready(model, self.device, precision), model.minimum_size
        score = scorer_on(network, self.device, precision, minimum)
        # What is known of its fields comes from the same network without its weights.
        self.tiler = Tiler(score, model.to("meta"), minimum, memory=self.memory, tile=tile, told=told)
        if tile is not None:
            self.tiler.geometry.steps(tile, (ENDLESS, ENDLESS))  # says now if it is too small
        self.network, self.samples, self.turn = network, samples, threading.Lock()
        if samples:
            sampled(_nothing, network, samples)  # says now if there is no dropout

    def open(self, path: Path) -> tuple[np.ndarray, int]:
        """(the image of a file, upright, as the network takes it; the EXIF orientation it is stored in)."""
        if (header_pixels(path)) >= LARGE:
            hand_back()
        channels = self.preprocess.channels if self.preprocess.as_stored else None
        image, stored = read_upright(path, channels=channels, max_pixels=self.max_pixels)
        return self.preprocess.required(image, path), stored

    def predict(
        self,
        image: str | Path | Image.Image | np.ndarray,
        *,
        name: str = "the image",
        stored: int = 1,
        uncertainty: bool = False,
        confidence: bool = False,
        sink: Sink | None = None,
    ) -> Prediction:
        """image: a file, a PIL image as it is, or (H, W, 3) uint8 RGB (what the network was trained on, if other).

        name: what the image is called, in sentences about it and by what `look` reads or writes of it.
        sink: is given the probabilities, part by part; they are never held whole.
        """
        if isinstance(image, str | Path):
            image, name = Path(image), str(image)
            array, stored = self.open(image)
        else:
            array = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else np.asarray(image)
        if array.ndim != 3 or 0 in array.shape:
            raise UsageError(f"{name} has shape {array.shape} - give (H, W, {self.preprocess.channels})")
        size = (array.shape[0], array.shape[1])
        self.preprocess.required(array, name)
        if size[0] * size[1] < LARGE:
            keep_freed(self.device)
        else:
            hand_back()
        mask = np.empty(size, dtype=np.uint8)
        doubt = np.empty(size, dtype=np.float16) if uncertainty or self.samples else None
        sure = np.empty(size, dtype=np.float16) if confidence else None
        needs_all = sink is not None or (doubt is not None and not self.samples)
        with self.turn:
            for part, scores, likely, variance in self._parts(array, name):
                place = slice(*part[0]), slice(*part[1])
                if sure is None:
                    found = labels(scores, (scores.shape[-2], scores.shape[-1]))
                else:
                    found, top = labels_and_confidence(scores, probabilities=likely)
                    sure[place] = top[0].cpu().numpy()
                mask[place] = found[0].cpu().numpy()
                if variance is not None and doubt is not None:
                    doubt[place] = variance.cpu().numpy()
                if not needs_all:
                    continue
                probabilities = scores if likely else scores.softmax(dim=1)
                if doubt is not None and variance is None:
                    entropy = torch.special.entr(probabilities).sum(dim=1) / np.log(max(2, len(self.classes)))
                    doubt[place] = entropy[0].cpu().numpy()
                if sink is not None:
                    sink(part, probabilities[0].cpu().numpy())
        return Prediction(array, mask, self.classes, doubt, sure, stored, partial(self._again, array, name))

    def probabilities(self, image: np.ndarray, name: str) -> Tensor:
        """(1, C, H, W) float32 class probabilities of an image, (H, W, C) as `predict` takes it, held whole."""
        found: Tensor | None = None
        with self.turn:
            for part, scores, likely, _ in self._parts(image, name):
                one = scores if likely else scores.softmax(dim=1)
                if found is None:
                    found = one.new_empty((1, one.shape[1], *image.shape[:2]))
                found[..., slice(*part[0]), slice(*part[1])] = one
        assert found is not None
        return found

    def _again(self, image: np.ndarray, name: str, sink: Sink) -> None:
        self.predict(image, name=name, sink=sink)

    def _parts(self, image: np.ndarray, name: str) -> Iterable[tuple[Part, Tensor, bool, Tensor | None]]:
        """(a part of the image, its (1, C, h, w) float32 scores, whether they are probabilities, the (h, w) variance of
        samples).
        """
        size = (image.shape[0], image.shape[1])
        whole = ((0, size[0]), (0, size[1]))
        if self.look is not None:
            yield whole, self.look(image, name).float(), True, None
            return
        views = [
            View(image, self._seen_at(size, scale), self.preprocess, self.tiler, flip=self.flip, name=name)
            for scale in self.scales
        ]
        if self.samples:
            yield from self._sampled(views[0], size)
            return
        likely = self.flip or len(views) > 1
        known = {view: view.scores() for view in views if self.tiler.step(view.size) is None}
        given = [partial(_cut, known[view]) if view in known else view.scores for view in views]
        for part in parts(size, self._step(views, size)):
            mean: Tensor | None = None
            for view, scores in zip(views, given, strict=True):
                if part == whole and view in known:
                    one = resized(known[view], size).float()
                else:
                    one = enlarged(scores, view.size, size, part)
                if len(views) > 1:
                    one = one if self.flip else one.softmax(dim=1)
                    mean = one if mean is None else mean + one
                else:
                    mean = one
            assert mean is not None
            yield part, mean / len(views) if len(views) > 1 else mean, likely, None

    def _sampled(self, view: View, size: Size) -> Iterable[tuple[Part, Tensor, bool, Tensor | None]]:
        def score(part: Part) -> Tensor:
            scores = view.scores(part).float()
            return scores if self.flip else scores.softmax(dim=1)

        draw_samples: Callable[[Part], Samples] = sampled(score, self.network, self.samples)
        seen = ((0, view.size[0]), (0, view.size[1]))
        known = draw_samples(seen) if self.tiler.step(view.size) is None else None
        for part in parts(size, self._step([view], size)):
            if known is not None and part == ((0, size[0]), (0, size[1])):
                yield part, resized(known.probabilities, size), True, resized(known.uncertainty[None], size)[0, 0]
                continue
            drawn: list[Samples] = [known] if known is not None else []

            def both(wanted: Part, drawn: list[Samples] = drawn) -> Tensor:
                one = drawn[0] if drawn else draw_samples(wanted)
                found = torch.cat([one.probabilities, one.uncertainty[:, None]], dim=1)
                return _cut(found, wanted) if drawn else found

            found = enlarged(both, view.size, size, part)
            yield part, found[:, :-1], True, found[0, -1]

    def _seen_at(self, size: Size, scale: float) -> Size:
        base = self.preprocess.size or size
        return max(1, round(scale * base[0])), max(1, round(scale * base[1]))

    def _step(self, views: Sequence[View], size: Size) -> Size:
        """The size of the parts that the result is made in: those that the views are seen in, and of few numbers."""
        height, width = size
        for view in views:
            step = self.tiler.step(view.size)
            if step is not None:
                height = min(height, max(1, step[0] * size[0] // view.size[0]))
                width = min(width, max(1, step[1] * size[1] // view.size[1]))
        if height == size[0] and width == size[1]:
            height = max(1, min(height, self.memory // (NUMBERS * len(self.classes) * width)))
        return height, width


def _cut(scores: Tensor, part: Part) -> Tensor:
    return scores[..., slice(*part[0]), slice(*part[1])]


def _nothing(part: Part) -> Tensor:
    raise AssertionError(part)


def load(
    path: str | Path,
    *,
    trust: Collection[str] = (),
    overrides: Iterable[str] = (),
    precision: str = "auto",
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    samples: int = 0,
    memory: int | None = None,
    tile: Size | None = None,
) -> Segmenter:
    """A network from a .ckpt, a .safetensors with its card, or the name of a shipped one; `segdeconv.load`.

    trust, overrides: see `checkpoint.read`; `overrides=["dataset.size=null"]` lets it see every image at its own size.
    The rest: see `Segmenter`.
    """
    return Segmenter(
        checkpoint.read(path, trust=trust, overrides=overrides),
        precision=precision,
        flip=flip,
        scales=scales,
        samples=samples,
        memory=memory,
        tile=tile,
    )
