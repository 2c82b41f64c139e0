"""A trained network in use: any image, of any size, to its mask. What predict does, and two lines of Python do."""

import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from segdeconv.checkpoints import checkpoint
from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.classes import Classes
from segdeconv.data.files.decoding import header_pixels
from segdeconv.data.files.reading import MAX_PIXELS, read_upright, turn_back
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.inference.network import Network
from segdeconv.inference.predictors import PredictionSettings, build_predictor
from segdeconv.inference.scorers import entropy_of, labels, labels_and_confidence
from segdeconv.inference.tiling import Part
from segdeconv.system.memory import keep_freed, release_memory

LARGE = 1 << 24  # pixels of an image with which memory is given back as soon as it is free

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

    Args:
        checkpoint: As `checkpoint.read` gives it.
        settings: How it predicts; by default one forward pass, in tiles where an image needs more memory than is free.
        device: None for the best one.
        report: Called with a message where something continues otherwise than asked.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: PredictionSettings | None = None,
        *,
        device: torch.device | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        self.checkpoint, self.settings = checkpoint, settings or PredictionSettings()
        self.classes, self.preprocessing = checkpoint.classes, checkpoint.preprocessing
        self.max_pixels = checkpoint.config["dataset"].get("max_pixels") or MAX_PIXELS
        self.network = Network.of(
            checkpoint,
            device=device,
            precision=self.settings.precision,
            flip=self.settings.flip,
            samples=self.settings.samples,
        )
        self.predictor = build_predictor(checkpoint, self.network, self.settings, report=report)
        self._turn = threading.Lock()

    def open(self, path: Path) -> tuple[np.ndarray, int]:
        """(the image of a file, upright, as the network takes it; the EXIF orientation it is stored in)."""
        if header_pixels(path) >= LARGE:
            release_memory()
        channels = self.preprocessing.channels if self.preprocessing.as_stored else None
        image, stored = read_upright(path, channels=channels, max_pixels=self.max_pixels)
        return self.preprocessing.checked(image, path), stored

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
        """Label one image.

        Args:
            image: A file, a PIL image as it is, or (H, W, 3) uint8 RGB (what the network was trained on, if other).
            name: Of the image, in messages and for what is read or written of it.
            stored: EXIF orientation of the file, 1 to 8, that `Prediction.save` turns the mask back to.
            uncertainty, confidence: Keep these maps too.
            sink: Called with the probabilities, part by part; they are never held whole.

        Raises:
            UsageError: The image cannot be read, or is of another kind than the network takes.
        """
        if isinstance(image, str | Path):
            image, name = Path(image), str(image)
            array, stored = self.open(image)
        else:
            array = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else np.asarray(image)
        if array.ndim != 3 or 0 in array.shape:
            raise UsageError(f"{name} has shape {array.shape} - give (H, W, {self.preprocessing.channels})")
        size = (array.shape[0], array.shape[1])
        self.preprocessing.checked(array, name)
        if size[0] * size[1] < LARGE:
            keep_freed(self.network.device)
        else:
            release_memory()
        mask = np.empty(size, dtype=np.uint8)
        confidences = np.empty(size, dtype=np.float16) if confidence else None
        uncertainties = np.empty(size, dtype=np.float16) if uncertainty or self.settings.samples else None
        with self._turn:
            for part, scores in self.predictor(array, name):
                place = slice(*part[0]), slice(*part[1])
                if confidences is None:
                    index = labels(scores.values, (scores.values.shape[-2], scores.values.shape[-1]))
                else:
                    index, top = labels_and_confidence(scores)
                    confidences[place] = top[0].cpu().numpy()
                mask[place] = index[0].cpu().numpy()
                if uncertainties is not None and scores.uncertainty is not None:
                    uncertainties[place] = scores.uncertainty[0].cpu().numpy()
                if sink is None and (uncertainties is None or scores.uncertainty is not None):
                    continue
                probabilities = scores.probabilities()
                if uncertainties is not None and scores.uncertainty is None:
                    entropy = entropy_of(probabilities) / np.log(max(2, len(self.classes)))
                    uncertainties[place] = entropy[0].cpu().numpy()
                if sink is not None:
                    sink(part, probabilities[0].cpu().numpy())
        again = partial(self._predict_again, array, name)
        return Prediction(array, mask, self.classes, uncertainties, confidences, stored, again)

    def _predict_again(self, image: np.ndarray, name: str, sink: Sink) -> None:
        self.predict(image, name=name, sink=sink)


def load(path: str | Path, *, trust: Collection[str] = (), overrides: Iterable[str] = (), **settings: Any) -> Segmenter:
    """Load a network to predict with; `segdeconv.load`.

    Args:
        path: A .ckpt, a .safetensors with its card, or the name of a shipped network.
        trust, overrides: See `checkpoint.read`; `overrides=["dataset.size=null"]` keeps every image at its own size.
        **settings: See `PredictionSettings`, for example `precision="32-true"`, `flip=True` or `tile=(512, 512)`.
    """
    return Segmenter(checkpoint.read(path, trust=trust, overrides=overrides), PredictionSettings(**settings))
