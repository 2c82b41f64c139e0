"""The prediction of one image, with everything that the page needs to explain its pixels."""

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from segdeconv.analysis import switch_paths
from segdeconv.analysis.explanation import Explainer, Question, shown
from segdeconv.data.preprocessing import Size, resize_image
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.inference.scorers import ClassScores, entropy_of, labels_and_confidence
from segdeconv.inference.segmenter import Segmenter
from segdeconv.switches.ops import Pooling

MAX_PIXELS = 2_000_000  # larger images are reduced to this size before they are predicted and shown


@dataclass(frozen=True)
class ImagePrediction:
    """The prediction of one image.

    Attributes:
        source: (H, W, channels), upright, as read; reduced like `image`.
        image: (H, W, 3) uint8, as shown on the page.
        reduced_from: (H, W) of the file, if the image was reduced.
        probabilities: (C, H, W) float32, on the network's device.
        labels: (H, W) uint8 class indices.
        confidence: (H, W) float32, the probability of the class in `labels`.
        uncertainty: (H, W) float32 in 0..1, the entropy of the probabilities divided by its maximum.
        pooled: Outputs of the encoder's pools, for the paths of pixels; empty if the pools store no switches.
        network_size: (H, W) of the network's input.
        seconds: Time of the prediction.
    """

    source: np.ndarray
    image: np.ndarray
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
        """(H, W) of the image as shown on the page."""
        return self.image.shape[0], self.image.shape[1]


class ImagePredictor:
    """The predictor of the page.

    Args:
        segmenter: Reads the images; its network predicts them.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter, self.classes = segmenter, segmenter.classes
        self.name = type(segmenter.network.model).__name__

    @cached_property
    def explainer(self) -> Explainer:
        """The explainer of one pass without dropout, in float32."""
        return Explainer(self.segmenter.float32_model, self.segmenter.preprocessing, self.classes.names)

    def explain(self, prediction: ImagePrediction, y: int, x: int) -> tuple[dict[str, Any], np.ndarray]:
        """Explain why a pixel of the shown image has its class and not the next one.

        Returns:
            The numbers of the explanation, and (2, h, w) float32 in -1..1 at the size of the network's input: the
            contributions of the pixels to the logit of the class and to its difference from that of the next class, as
            they are shown.

        Raises:
            UsageError: The pixel lies outside the image, or memory runs out.
        """
        answer = self.explainer.explain(prediction.source, Question(y, x))
        maps = [shown(each.pixels, sigma=max(1.0, each.pixels.shape[-1] / 240))[0] for each in answer.named.values()]
        numbers = [
            {"name": name, "logit": each.value, "sum": each.total, "levels": each.by_level()}
            for name, each in answer.named.items()
        ]
        about = {"exact": answer.exact, "limits": answer.limits, "explained": numbers}
        return about, np.stack(maps)

    def predict(self, content: bytes) -> ImagePrediction:
        """Predict an image.

        Args:
            content: The bytes of an image file.

        Raises:
            UsageError: The image cannot be read; the message calls it `this file`.
        """
        image = self.segmenter.open_bytes(content, "this file").image
        started = time.monotonic()
        original = (image.shape[0], image.shape[1])
        scale = (MAX_PIXELS / (original[0] * original[1])) ** 0.5
        if scale < 1:
            image = resize_image(image, (max(1, int(scale * original[0])), max(1, int(scale * original[1]))))
        size = (image.shape[0], image.shape[1])
        network, normalised = self.segmenter.network, self.segmenter.preprocessing(image, "this file")
        self.segmenter.resized.add("this file", original)
        with switch_paths.recorded(network.model) as pooled:
            probabilities = network(normalised[None]).of_image(0, size).probabilities()
        index, confidence = labels_and_confidence(ClassScores(probabilities, True))
        entropy = entropy_of(probabilities)[0] / np.log(len(self.classes))
        return ImagePrediction(
            image,
            draw.to_rgb(image),
            original if scale < 1 else None,
            probabilities[0],
            index[0].cpu().numpy(),
            confidence[0].cpu().numpy(),
            entropy.clamp(0, 1).cpu().numpy(),
            pooled,
            (normalised.shape[-2], normalised.shape[-1]),
            time.monotonic() - started,
        )


def pixel(prediction: ImagePrediction, y: int, x: int) -> dict[str, Any]:
    """Explain a pixel of the shown image: the probability of every class, and the path of its switches.

    Returns:
        `probabilities` of the classes, and `path`, a list of one entry for each pool. Positions and boxes are in
        pixels of the shown image; a box is left, top, right, bottom.

    Raises:
        UsageError: The pixel lies outside the image.
    """
    height, width = prediction.size
    if not (0 <= y < height and 0 <= x < width):
        raise UsageError(f"pixel x={x}, y={y} is outside the image of {width}x{height} pixels")
    down, across = height / prediction.network_size[0], width / prediction.network_size[1]
    steps = []
    if prediction.pooled:
        for step in switch_paths.path(prediction.pooled, (int((y + 0.5) / down), int((x + 0.5) / across))):
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
    return {"probabilities": prediction.probabilities[:, y, x].tolist(), "path": steps}
