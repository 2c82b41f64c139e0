"""Figures of a checkpoint on images of any source, for `scripts/visualize.py`."""

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segdeconv.analysis import figures
from segdeconv.analysis.decoder_stages import trace_decoder
from segdeconv.analysis.explanation import Explainer
from segdeconv.analysis.switch_paths import recorded
from segdeconv.analysis.switch_stability import instability
from segdeconv.analysis.switch_statistics import ties_counted
from segdeconv.analysis.uncertainty import noise_of
from segdeconv.analysis.unit_projection import (
    METHODS,
    Method,
    StrongestActivations,
    project,
    receptive_fields,
    scale_to_grey,
)
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.files.reading import MAX_PIXELS, read_upright
from segdeconv.data.preprocessing import Preprocessing, resize_image, resize_mask
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.inference.scorers import entropy_of
from segdeconv.inference.segmenter import Segmenter
from segdeconv.models import SegmentationModel
from segdeconv.models.layers import DeconvBlock
from segdeconv.switches import Pooling
from segdeconv.system.seeding import key

OUTSIDE = 235  # the grey level outside the image


class InputImage(NamedTuple):
    """An image to visualize.

    Attributes:
        name: The name of the image.
        load: Returns the image as stored, (H, W, C), and its mask if it has one.
    """

    name: str
    load: Callable[[], tuple[np.ndarray, np.ndarray | None]]


def of_dataset(dataset: SegmentationDataset) -> list[InputImage]:
    """Return the images of a split."""

    def loader(index: int) -> Callable[[], tuple[np.ndarray, np.ndarray | None]]:
        return lambda: (dataset[index].image, dataset[index].mask)

    return [InputImage(name, loader(index)) for index, name in enumerate(dataset.names)]


def of_files(files: dict[str, Path], preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS) -> list[InputImage]:
    """Return the images of files, rotated upright by their EXIF orientation.

    Args:
        files: The paths by name.
        preprocessing: The preprocessing of the network.
        max_pixels: Largest number of pixels of an image.
    """
    channels = preprocessing.channels if preprocessing.as_stored else None

    def loader(path: Path) -> Callable[[], tuple[np.ndarray, np.ndarray | None]]:
        return lambda: (read_upright(path, channels=channels, max_pixels=max_pixels)[0], None)

    return [InputImage(name, loader(path)) for name, path in files.items()]


class Visualizer:
    """Figures of a network on images.

    With `settings.samples`, the stability figures show the variance over forward passes with dropout. Figures that use
    gradients or single activations are computed in float32.

    Args:
        segmenter: The network with its prediction settings.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter
        self.classes, self.network = segmenter.classes, segmenter.network
        self.preprocessing, self.checkpoint = segmenter.preprocessing, segmenter.checkpoint

    @property
    def float32_model(self) -> SegmentationModel:
        """The network in float32, prepared for inference."""
        return self.segmenter.float32_model

    def explainer(self, *, float64: bool = False) -> Explainer:
        """Return the explainer of the network in float32, or in float64."""
        model = copy.deepcopy(self.float32_model).double() if float64 else self.float32_model
        return Explainer(model, self.preprocessing, self.classes.names)

    def prepare(self, source: InputImage) -> tuple[np.ndarray, Tensor, np.ndarray | None]:
        """Load and preprocess an image.

        Args:
            source: The image.

        Returns:
            The image (H, W, C) at the input size, padded to the network's minimum size; the same, normalised, as a
            batch of one; and its mask at that size, None if it has no mask or was padded.
        """
        stored, mask = source.load()
        image = stored if self.preprocessing.size is None else resize_image(stored, self.preprocessing.size)
        normalised = self.preprocessing.normalise(image, source.name)[None].to(self.network.device)
        min_size = self.network.model.minimum_size
        below, right = max(0, min_size - image.shape[0]), max(0, min_size - image.shape[1])
        if below or right:
            image = np.pad(image, ((0, below), (0, right), (0, 0)))
            normalised = F.pad(normalised, (0, right, 0, below))
            mask = None
        if mask is not None:
            mask = resize_mask(mask, (image.shape[0], image.shape[1]))
        return image, normalised, mask

    def figures(self, source: InputImage, kinds: Sequence[str], *, label: int | None) -> dict[str, np.ndarray]:
        """Draw the figures of one image.

        Args:
            source: The image.
            kinds: Any of `switches`, `flow`, `stages` and `stability`; other kinds are ignored.
            label: The index of the class for `stages`, None for the class with the most pixels.

        Returns:
            The figures by kind, without those that the network does not support; see `lacking`.
        """
        image, normalised, mask = self.prepare(source)
        network = self.network
        with recorded(network.model) as pooled, ties_counted(network.model) as ties:
            probabilities = network.logits(normalised).float().softmax(dim=1)
        prediction = probabilities[0].argmax(dim=0).byte().cpu().numpy()
        drawn = {}
        if "switches" in kinds and pooled:
            drawn["switches"] = figures.switches_figure(source.name, image, pooled, ties)
        if "flow" in kinds and pooled:
            drawn["flow"] = figures.switch_paths_figure(source.name, image, pooled)
        if "stages" in kinds and not self.lacking("stages"):
            traced_label = self._largest_class(prediction) if label is None else label
            deconv = any(isinstance(module, DeconvBlock) for module in network.model.modules())
            filters = "deconvolutions" if deconv else "convolutions"
            trace = trace_decoder(self.float32_model, normalised, traced_label)
            drawn["stages"] = figures.decoder_stages_figure(
                source.name, image, trace, self.classes, traced_label, filters
            )
        if "stability" in kinds and pooled:
            variance = network(normalised).uncertainty if network.samples else None
            with recorded(network.model) as view_pooled:

                def pools(batch: Tensor) -> list[Pooling]:
                    network.logits(batch)
                    return list(view_pooled)

                measures = instability(pools, normalised, noise=noise_of(self.preprocessing))
            drawn["stability"] = figures.stability_figure(
                source.name, image, prediction, entropy_of(probabilities)[0].cpu().numpy(), measures, self.classes,
                mask=mask, variance=None if variance is None else variance[0].cpu().numpy(),
            )  # fmt: skip
        return drawn

    def lacking(self, kind: str) -> str:
        """Return the reason why the network does not support a kind of figure, or an empty string if it does."""
        model = self.network.model
        side = max(64, model.minimum_size)
        image = torch.zeros(1, model.in_channels, side, side, device=self.network.device)
        if kind in ("switches", "flow", "stability"):
            with recorded(model) as pooled:
                self.network.logits(image)
            return "" if pooled else f"the pools of {type(model).__name__} keep no switches"
        if kind == "stages":
            try:
                trace_decoder(self.float32_model, image, 0)
            except UsageError as error:
                return str(error)
        return ""

    def _largest_class(self, prediction: np.ndarray) -> int:
        """Return the class with the most pixels, other than background if possible."""
        counts = np.bincount(prediction.ravel(), minlength=len(self.classes))
        if self.classes.names[0] == "background" and counts[1:].any():
            counts[0] = 0
        return int(counts.argmax())

    def layers(self) -> list[str]:
        """Return the names of the encoder's stages, the default layers for figures of units."""
        encoder = getattr(self.network.model, "encoder", None)
        count = len(encoder.stages) if encoder is not None and hasattr(encoder, "stages") else 0
        return [f"encoder.stages.{index}" for index in range(count)]

    def strongest(self, sources: Sequence[InputImage], layers: Sequence[str]) -> StrongestActivations:
        """Return the strongest activations of all units of some layers.

        Args:
            sources: The images to search.
            layers: The names of the layers.

        Raises:
            UsageError: A layer does not exist, or its output is not a batch of maps.
        """
        num = figures.NUM_ACTIVATIONS
        activations = StrongestActivations(self.float32_model, layers, num=num, per_image=-(-num // len(sources)))
        for index, source in enumerate(sources):
            activations.update(self.prepare(source)[1], index)
        return activations

    def units_figure(
        self,
        sources: Sequence[InputImage],
        activations: StrongestActivations,
        layer: str,
        *,
        maps: Sequence[int] | None,
        num: int,
        seed: int,
    ) -> np.ndarray:
        """Draw the strongest activations of some units of a layer and their projections.

        Args:
            sources: The images that were searched.
            activations: Their strongest activations; see `strongest`.
            layer: The name of the layer.
            maps: The indices of the units, None for a random selection of those that were above zero anywhere.
            num: The number of units to select.
            seed: Seed of the selection.

        Raises:
            UsageError: The layer has no map of an index, or none of the units was above zero.
        """
        count = len(activations.kept[layer][0])
        if maps is None:
            active = activations.active_maps(layer)
            maps = sorted(random.Random(key(seed, layer)).sample(active, min(num, len(active))))
        elif unknown := [index for index in maps if not 0 <= index < count]:
            raise UsageError(f"--maps {unknown[0]}: {layer} has the maps 0 to {count - 1} - choose among these")
        if not any(activations.strongest(layer, index) for index in maps):
            raise UsageError(
                f"none of the selected units of {layer} is above zero in any image - choose other units or images"
            )
        std = torch.tensor(self.preprocessing.std)
        examples = []
        sizes, boxes = [], dict[tuple[int, int], Callable[[int, int], tuple[int, int, int, int]]]()
        for index in maps:
            for activation in activations.strongest(layer, index):
                image, normalised, _ = self.prepare(sources[activation.image])
                size = (image.shape[0], image.shape[1])
                if size not in boxes:
                    boxes[size] = receptive_fields(self.float32_model, layer, size)
                box = boxes[size]
                top, left, bottom, right = box(activation.unit.row, activation.unit.column)
                sizes.append((bottom - top, right - left))
                pictures = {}
                position = FieldPosition((top, left, bottom, right), size)
                projections = project(self.float32_model, normalised, layer, [activation.unit], methods=METHODS)
                for method, (projection,) in projections.items():
                    if self.preprocessing.order == "bgr":
                        projection = projection.flip(0)
                    grey = scale_to_grey(projection[:, top:bottom, left:right], std).permute(1, 2, 0).cpu().numpy()
                    pictures[method] = draw.to_rgb((255 * grey).round().astype(np.uint8))
                crop = draw.to_rgb(image)[top:bottom, left:right]
                examples.append((index, activation.value, position, crop, pictures))
        field = (max(height for height, _ in sizes), max(width for _, width in sizes))
        units: dict[int, list[tuple[float, np.ndarray, dict[Method, np.ndarray]]]] = {index: [] for index in maps}
        for index, value, position, crop, pictures in examples:
            padded = {method: position.pad_to_field(picture, field) for method, picture in pictures.items()}
            units[index].append((value, position.pad_to_field(crop, field), padded))
        network = type(self.float32_model).__name__
        return figures.units_figure(layer, network, units, images=len(sources), field=field)


class FieldPosition(NamedTuple):
    """The position of a receptive field in an image.

    Attributes:
        box: (top, left, bottom, right) of the part of the field inside the image.
        size: (H, W) of the image.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]

    def pad_to_field(self, picture: np.ndarray, field: tuple[int, int]) -> np.ndarray:
        """Pad a picture of the box to the whole field, at the sides where the image ends."""
        canvas = np.full((*field, 3), OUTSIDE, dtype=np.uint8)
        starts = []
        for axis in (0, 1):
            missing = field[axis] - picture.shape[axis]
            cut_before, cut_after = self.box[axis] == 0, self.box[axis + 2] == self.size[axis]
            starts.append(
                missing if cut_before and not cut_after else 0 if cut_after and not cut_before else missing // 2
            )
        top, left = starts
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        return canvas
