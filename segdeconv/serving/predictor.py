"""One look of a network at a picture, with all that the page asks about it afterwards."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segdeconv.analysis import switch_paths
from segdeconv.checkpoints.checkpoint import Checkpoint
from segdeconv.data.files.reading import MAX_PIXELS, read_upright
from segdeconv.data.preprocessing import Size, resize_image
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.inference.dropout_sampling import sampled
from segdeconv.inference.scorers import labels_and_confidence, ready, resized, scorer_on, softmaxed, thrifty
from segdeconv.models import SegmentationModel
from segdeconv.switches.ops import Pooling
from segdeconv.system.devices import best_device, resolve_precision

LARGEST = 2_000_000  # pixels that are shown and labelled; larger pictures are reduced


@dataclass(frozen=True)
class Seen:
    """What a network made of a picture.

    picture: (H, W, 3) uint8, upright, as it is shown. reduced_from: the (H, W) that the file has, if that is more.
    probabilities: (C, H, W) float32, on the network's device.
    labels: (H, W) uint8; confidence: (H, W) float32, the probability of that class.
    uncertainty: (H, W) float32 in 0..1: the entropy of the probabilities as a share of the most that it can be.
    pooled: of the encoder, for the paths of pixels; empty if its pools keep no switches. network_size: (H, W) that was
        looked at. seconds: that it took.
    """

    picture: np.ndarray
    reduced_from: Size | None
    probabilities: Tensor
    labels: np.ndarray
    confidence: np.ndarray
    uncertainty: np.ndarray
    pooled: list[Pooling]
    network_size: Size
    seconds: float

    @property
    def size(self) -> Size:
        """(H, W) of the picture as it is shown."""
        return self.picture.shape[0], self.picture.shape[1]


class Looker:
    """A checkpoint's network, ready to look at pictures as `predict` does.

    samples: average over so many passes with dropout; 0 for one without.
    """

    def __init__(self, read: Checkpoint, *, precision: str = "auto", samples: int = 0) -> None:
        self.classes = read.classes
        self.preprocess = read.preprocessing
        self.max_pixels = read.config["dataset"].get("max_pixels") or MAX_PIXELS
        self.device = best_device()
        self.precision = resolve_precision(precision, read.facts["precision"])
        self.network: SegmentationModel = ready(read.model(), self.device, self.precision)
        self.name = type(self.network).__name__
        self.score = thrifty(scorer_on(self.network, self.device, self.precision, self.network.minimum_size))
        self.draw = sampled(softmaxed(self.score), self.network, samples) if samples else None

    def _probabilities(self, image: Tensor, size: Size) -> Tensor:
        """(1, C, *size); the scores of a single pass are resized before their softmax, as in `predict`."""
        if self.draw:
            return resized(self.draw(image).probabilities, size)
        return resized(self.score(image), size).float().softmax(dim=1)

    def look(self, content: bytes) -> Seen:
        """Look at the picture that a file holds; raises UsageError, about `this file`, for what is none."""
        with tempfile.TemporaryDirectory(prefix="segdeconv-") as folder:
            path = Path(folder) / "picture"
            path.write_bytes(content)
            try:
                channels = self.preprocess.channels if self.preprocess.as_stored else None
                image, _ = read_upright(path, channels=channels, max_pixels=self.max_pixels)
            except UsageError as error:
                raise UsageError(str(error).replace(str(path), "this file")) from None
        started = time.monotonic()
        whole = (image.shape[0], image.shape[1])
        shrink = (LARGEST / (whole[0] * whole[1])) ** 0.5
        if shrink < 1:
            image = resize_image(image, (max(1, int(shrink * whole[0])), max(1, int(shrink * whole[1]))))
        size = (image.shape[0], image.shape[1])
        given = self.preprocess(image, "this file")
        with switch_paths.recorded(self.network) as pooled:
            probabilities = self._probabilities(given[None], size)
        index, confidence = labels_and_confidence(probabilities, probabilities=True)
        entropy = torch.special.entr(probabilities[0]).sum(dim=0) / np.log(len(self.classes))
        return Seen(
            draw.shown(image),
            whole if shrink < 1 else None,
            probabilities[0],
            index[0].cpu().numpy(),
            confidence[0].cpu().numpy(),
            entropy.clamp(0, 1).cpu().numpy(),
            pooled,
            (given.shape[-2], given.shape[-1]),
            time.monotonic() - started,
        )


def pixel(seen: Seen, y: int, x: int) -> dict[str, Any]:
    """What is known of a pixel of the shown picture: every class's probability, and where its switches lead.

    Places and boxes are in pixels of the shown picture; box is left, top, right, bottom.
    """
    height, width = seen.size
    if not (0 <= y < height and 0 <= x < width):
        raise UsageError(f"pixel x={x}, y={y} is not in a picture of {width}x{height}")
    down, across = height / seen.network_size[0], width / seen.network_size[1]
    steps = []
    if seen.pooled:
        for step in switch_paths.path(seen.pooled, (int((y + 0.5) / down), int((x + 0.5) / across))):
            top, left, bottom, right = step.box
            side = 2**step.level
            window = (step.window[1] * side, step.window[0] * side)
            steps.append(
                {
                    "pool": step.level,
                    "cell": step.cell,
                    "share": step.share,
                    "window": [
                        window[0] * across, window[1] * down, (window[0] + side) * across, (window[1] + side) * down,
                    ],
                    "box": [left * across, top * down, right * across, bottom * down],
                    "place": [(step.place[1] + 0.5) * across, (step.place[0] + 0.5) * down],
                }
            )  # fmt: skip
    return {"probabilities": seen.probabilities[:, y, x].tolist(), "path": steps}
