"""The prediction of one picture, with all that the page asks about it afterwards."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from segdeconv.analysis import switch_paths
from segdeconv.data.preprocessing import Size, resize_image
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.inference.scorers import ClassScores, entropy_of, labels_and_confidence
from segdeconv.inference.segmenter import Segmenter
from segdeconv.switches.ops import Pooling

LARGEST = 2_000_000  # pixels that are shown and labelled; larger pictures are reduced


@dataclass(frozen=True)
class PicturePrediction:
    """What a network says of a picture.

    picture: (H, W, 3) uint8, upright, as it is shown. reduced_from: the (H, W) that the file has, if that is more.
    probabilities: (C, H, W) float32, on the network's device.
    labels: (H, W) uint8; confidence: (H, W) float32, the probability of that class.
    uncertainty: (H, W) float32 in 0..1: the entropy of the probabilities as a share of the most that it can be.
    pooled: of the encoder, for the paths of pixels; empty if its pools keep no switches. network_size: (H, W) of the
        network's input. seconds: that it took.
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


class PicturePredictor:
    """A segmenter and all that the page shows of a picture."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter, self.classes = segmenter, segmenter.classes
        self.name = type(segmenter.network.model).__name__

    def predict(self, content: bytes) -> PicturePrediction:
        """Predict the picture that a file holds; raises UsageError, about `this file`, if it cannot be read."""
        with tempfile.TemporaryDirectory(prefix="segdeconv-") as folder:
            path = Path(folder) / "picture"
            path.write_bytes(content)
            try:
                image, _ = self.segmenter.open(path)
            except UsageError as error:
                raise UsageError(str(error).replace(str(path), "this file")) from None
        started = time.monotonic()
        whole = (image.shape[0], image.shape[1])
        shrink = (LARGEST / (whole[0] * whole[1])) ** 0.5
        if shrink < 1:
            image = resize_image(image, (max(1, int(shrink * whole[0])), max(1, int(shrink * whole[1]))))
        size = (image.shape[0], image.shape[1])
        network, normalised = self.segmenter.network, self.segmenter.preprocessing(image, "this file")
        with switch_paths.recorded(network.model) as pooled:
            probabilities = network(normalised[None]).of_image(0, size).probabilities()
        index, confidence = labels_and_confidence(ClassScores(probabilities, True))
        entropy = entropy_of(probabilities)[0] / np.log(len(self.classes))
        return PicturePrediction(
            draw.shown(image),
            whole if shrink < 1 else None,
            probabilities[0],
            index[0].cpu().numpy(),
            confidence[0].cpu().numpy(),
            entropy.clamp(0, 1).cpu().numpy(),
            pooled,
            (normalised.shape[-2], normalised.shape[-1]),
            time.monotonic() - started,
        )


def pixel(seen: PicturePrediction, y: int, x: int) -> dict[str, Any]:
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
