"""Explanations of a predicted pixel, region or error: what each pixel and each bias contributes to the logits.

The explained numbers are those that decide the prediction: the logit of a class, and its difference to the logit of
another class, both resized to the image's own size as `predict` resizes them. Contributions are those of the normalised
image at the network's input size: a pixel of the mean colour contributes nothing. See `contributions` for the method.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeconv.analysis.contributions import AffineGraph, Contributions, non_affine_operations
from segdeconv.data.preprocessing import Preprocessing
from segdeconv.errors import UsageError
from segdeconv.models import SegmentationModel
from segdeconv.system.memory import ran_out_of_memory


class Question(NamedTuple):
    """A question about the prediction of an image.

    Attributes:
        y: The row of a pixel of the image as stored, 0 at the top.
        x: Its column, 0 on the left.
        region: Ask about all pixels of the predicted region that contains the pixel: the 4-connected pixels of the same
            predicted class.
    """

    y: int
    x: int
    region: bool = False

    @property
    def name(self) -> str:
        """Ending of file names."""
        return f"{'region' if self.region else 'pixel'}_{self.y}_{self.x}"


@dataclass(frozen=True)
class Explanation:
    """The answer to a question.

    Attributes:
        question: The question.
        size: (H, W) of the image.
        network_size: (H, W) of the network's input.
        classes: The names of all classes.
        class_: Index of the explained class: the predicted one, unless another one was asked for.
        other: Index of the class it is compared with: the one with the next largest logit, unless asked for.
        predicted: Index of the predicted class.
        logits: (K,) the logits of all classes at the pixel, or their sums over the region.
        prediction: (H, W) uint8, the predicted class of every pixel.
        inside: (H, W) bool, the explained pixels.
        of_class: The contributions to the logit of `class_`.
        of_difference: The contributions to the logit of `class_` minus that of `other`.
        start: The module whose output the contributions of pixels are those of; "" for the normalised image.
        non_affine: Operations because of which the contributions do not add up, or do so only from `start` on.
    """

    question: Question
    size: tuple[int, int]
    network_size: tuple[int, int]
    classes: tuple[str, ...]
    class_: int
    other: int
    predicted: int
    logits: tuple[float, ...]
    prediction: np.ndarray
    inside: np.ndarray
    of_class: Contributions
    of_difference: Contributions
    start: str
    non_affine: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """True if the contributions add up to both numbers."""
        return self.of_class.exact and self.of_difference.exact

    @property
    def named(self) -> dict[str, Contributions]:
        """Both contributions by the names of the numbers."""
        name, other = self.classes[self.class_], self.classes[self.other]
        return {name: self.of_class, f"{name} - {other}": self.of_difference}

    @property
    def limits(self) -> str:
        """The sentence that says how far the explanation is exact, "" if it is so for every pixel of the image."""
        operations = ", ".join(self.non_affine) or "an operation that could not be determined"
        if not self.exact:
            return f"not an exact explanation: {operations} is not affine, so the contributions do not add up"
        if self.start:
            return f"exact from the output of {operations} on, which is not affine: pixels are those of its output"
        return ""

    def text(self) -> str:
        """Return the lines that the command prints."""
        question, counted = self.question, int(self.inside.sum())
        place = f"y {question.y}, x {question.x}"
        where = f"region of {counted} pixels at {place}" if question.region else f"pixel at {place}"
        predicted = self.classes[self.predicted]
        lines = [f"{where}: predicted {predicted}"]
        for name, contributions in self.named.items():
            lines.append(
                f"  {name}: sum {contributions.total:.6g}, logit {contributions.value:.6g}; they differ by "
                f"{abs(contributions.total - contributions.value):.1e}, allowed {contributions.allowed:.1e}"
            )
            (_, pixels), *levels = contributions.by_level().items()
            biases = ", ".join(f"{level} {value:+.3g}" for level, value in levels)
            lines.append(f"    pixels {pixels:+.3g}; biases: {biases or 'none'}")
        if self.limits:
            lines.append(f"  {self.limits}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain data."""
        return {
            "y": self.question.y,
            "x": self.question.x,
            "region": self.question.region,
            "pixels": int(self.inside.sum()),
            "size": list(self.size),
            "network_size": list(self.network_size),
            "predicted": self.classes[self.predicted],
            "class": self.classes[self.class_],
            "other": self.classes[self.other],
            "logits": dict(zip(self.classes, self.logits, strict=True)),
            "start": self.start,
            "non_affine": list(self.non_affine),
            "explained": {name: _numbers(contributions) for name, contributions in self.named.items()},
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the maps of contributions: of pixels (C, h, w), and of each pool and unpooling (h, w)."""
        found = {"inside": self.inside}
        for name, contributions in (("class", self.of_class), ("difference", self.of_difference)):
            found[f"{name}/pixels"] = contributions.pixels.numpy()
            for map_ in contributions.maps:
                found[f"{name}/{map_.name}"] = map_.values.numpy()
        return found


def _numbers(contributions: Contributions) -> dict[str, Any]:
    return {
        "value": contributions.value,
        "sum": contributions.total,
        "allowed": contributions.allowed,
        "exact": contributions.exact,
        "from_pixels": contributions.from_pixels,
        "from_biases": contributions.from_biases,
        "levels": contributions.by_level(),
        "biases": [
            {"operation": bias.operation, "level": bias.level, "contribution": bias.total}
            for bias in contributions.biases
        ],
        "maps": [
            {"name": map_.name, "through": map_.total, "later_biases": map_.later, "whole": map_.whole}
            for map_ in contributions.maps
        ],
    }


class Explainer:
    """Explains predictions of a network, in its own precision.

    Args:
        model: The network prepared for inference, in float32 or float64.
        preprocessing: Its preprocessing.
        classes: The names of its classes.
    """

    def __init__(self, model: SegmentationModel, preprocessing: Preprocessing, classes: Sequence[str]) -> None:
        self.model, self.preprocessing, self.classes = model, preprocessing, tuple(classes)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def explain(
        self, image: np.ndarray, question: Question, *, name: str = "the image", classes: tuple[int, int] | None = None
    ) -> Explanation:
        """Answer a question about an image.

        Args:
            image: (H, W, C) as stored.
            question: The question.
            name: The name of the image, for error messages.
            classes: The class to explain and the one to compare it with; None for the predicted one and the one with
                the next largest logit.

        Raises:
            UsageError: The pixel lies outside the image, there is only one class, or memory runs out.
        """
        return self.explain_all(image, [question], name=name, classes=classes)[0]

    def explain_all(
        self,
        image: np.ndarray,
        questions: Sequence[Question],
        *,
        name: str = "the image",
        classes: tuple[int, int] | None = None,
    ) -> list[Explanation]:
        """Answer several questions about an image from one forward pass, see `explain`."""
        height, width = size = (image.shape[0], image.shape[1])
        for question in questions:
            if not (0 <= question.y < height and 0 <= question.x < width):
                raise UsageError(
                    f"pixel y {question.y}, x {question.x} is outside {name} of {height}x{width} pixels (HxW) - give a "
                    "pixel of the image as stored"
                )
        if len(self.classes) < 2:
            raise UsageError("the network has a single class - explanations compare classes")
        normalised = self.preprocessing(image, name)[None].to(self.device, self.dtype)
        normalised = normalised.contiguous(memory_format=torch.channels_last)
        try:
            return self._answers(normalised, size, questions, classes)
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        raise UsageError(
            f"memory ran out on {name} of {height}x{width}, whose maps an explanation keeps - set a smaller "
            "dataset.size=[H,W]"
        )

    def _answers(
        self,
        image: Tensor,
        size: tuple[int, int],
        questions: Sequence[Question],
        classes: tuple[int, int] | None,
        *,
        start: str = "",
        non_affine: tuple[str, ...] = (),
    ) -> list[Explanation]:
        graph = AffineGraph(self.model, image, minimum_size=self.model.minimum_size, start=start)
        scores = graph.logits
        if scores.shape[-2:] != size:
            scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        prediction = scores.detach()[0].max(dim=0).indices.byte().cpu().numpy()
        answers = []
        for question in questions:
            inside = region(prediction, question)
            # On the CPU, because a sum over a region in float32 is not accurate, and some devices have no float64.
            logits = scores[0][:, torch.from_numpy(inside).to(self.device)].cpu().double().sum(dim=1)
            predicted = int(prediction[question.y, question.x])
            class_, other = classes or (predicted, _best(logits.detach(), without=predicted))
            of_class, of_difference = map(graph.contributions, (logits[class_], logits[class_] - logits[other]))
            answers.append(
                Explanation(
                    question, size, (image.shape[-2], image.shape[-1]), self.classes, class_, other, predicted,
                    tuple(logits.tolist()), prediction, inside, of_class, of_difference, start, non_affine,
                )
            )  # fmt: skip
        if all(answer.exact for answer in answers) or non_affine:
            return answers
        del graph, scores
        non_affine = tuple(non_affine_operations(self.model, image, minimum_size=self.model.minimum_size))
        start = self._module_before_all_others(non_affine, image)
        if start or non_affine:
            return self._answers(image, size, questions, classes, start=start, non_affine=non_affine)
        return answers

    def _module_before_all_others(self, operations: Sequence[str], image: Tensor) -> str:
        """Return the module to start from if it is the only operation that is not affine, and keeps the image's size.

        Such is the normalisation of the input by SegNet-Basic.
        """
        name = operations[0].partition(" (")[0] if len(operations) == 1 else ""
        modules = dict(self.model.named_modules())
        padded = min(image.shape[-2:]) < self.model.minimum_size
        if padded or name not in modules or any(True for _ in modules[name].children()):
            return ""
        shapes: list[torch.Size] = []

        def record(module: nn.Module, args: Any, output: Any) -> None:
            shapes.append(output.shape if isinstance(output, Tensor) else torch.Size())

        with torch.inference_mode(), modules[name].register_forward_hook(record):
            self.model(image)
        return name if shapes == [image.shape] else ""


def region(prediction: np.ndarray, question: Question) -> np.ndarray:
    """Return the pixels that a question is about, (H, W) bool.

    Args:
        prediction: (H, W) uint8 class indices.
        question: The question.
    """
    inside = np.zeros(prediction.shape, dtype=bool)
    inside[question.y, question.x] = True
    if not question.region:
        return inside
    same = (prediction == prediction[question.y, question.x]).astype(np.uint8)
    _, numbers = cv2.connectedComponents(same, connectivity=4)
    return np.asarray(numbers == numbers[question.y, question.x])


def _best(logits: Tensor, *, without: int) -> int:
    others = logits.clone()
    others[without] = -torch.inf
    return int(others.argmax())


def shown(values: np.ndarray | Tensor, *, sigma: float) -> tuple[np.ndarray, float]:
    """Prepare contributions for display.

    Single pixels are too fine to see, and neighbours of opposite signs cancel, so the sum over channels is blurred,
    which keeps sums.

    Args:
        values: (C, h, w) or (h, w) contributions.
        sigma: Standard deviation of the blur in positions of the map; 0 for none.

    Returns:
        (h, w) float32 in -1..1, and the contribution of a position that is shown as 1. Larger ones are clipped: a
        hundredth of the positions that contribute most.
    """
    plane: np.ndarray = np.asarray(values, dtype=np.float64)
    plane = plane.sum(axis=0) if plane.ndim == 3 else plane
    if sigma > 0:
        plane = cv2.GaussianBlur(plane, (0, 0), sigma, borderType=cv2.BORDER_CONSTANT)
    magnitude = np.abs(plane)
    largest = float(magnitude.max())
    considered = magnitude[magnitude > largest / 1000]
    top = float(np.quantile(considered, 0.99)) if considered.size else 0.0
    return (plane / top if top > 0 else plane).clip(-1, 1).astype(np.float32), top
