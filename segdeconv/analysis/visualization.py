"""One checkpoint and images of any source: the figures that `scripts/visualize.py` writes about them."""

import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segdeconv.analysis import figures
from segdeconv.analysis.decoder_stages import trace_decoder
from segdeconv.analysis.switch_paths import recorded
from segdeconv.analysis.switch_stability import instability
from segdeconv.analysis.switch_statistics import ties_counted
from segdeconv.analysis.uncertainty import noise_of
from segdeconv.analysis.unit_projection import METHODS, Method, StrongestActivations, on_grey, project, receptive_fields
from segdeconv.data.dataset import SegmentationDataset
from segdeconv.data.files.reading import MAX_PIXELS, read_upright
from segdeconv.data.preprocessing import Preprocessing, resize_image, resize_mask
from segdeconv.drawing import draw
from segdeconv.errors import UsageError
from segdeconv.inference.network import Network
from segdeconv.inference.scorers import entropy_of
from segdeconv.inference.segmenter import Segmenter
from segdeconv.models import SegmentationModel
from segdeconv.models.layers import DeconvBlock
from segdeconv.switches import Pooling
from segdeconv.system.seeding import key

OUTSIDE = 235  # the grey of what is not in the image


class InputImage(NamedTuple):
    """An image to visualize. load: gives it as it is stored, (H, W, C), and its mask where it has one."""

    name: str
    load: Callable[[], tuple[np.ndarray, np.ndarray | None]]


def of_dataset(dataset: SegmentationDataset) -> list[InputImage]:
    """The images of a split."""

    def loader(place: int) -> Callable[[], tuple[np.ndarray, np.ndarray | None]]:
        return lambda: (dataset[place].image, dataset[place].mask)

    return [InputImage(name, loader(place)) for place, name in enumerate(dataset.names)]


def of_files(files: dict[str, Path], preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS) -> list[InputImage]:
    """Picture files by their names, upright."""
    channels = preprocessing.channels if preprocessing.as_stored else None

    def loader(path: Path) -> Callable[[], tuple[np.ndarray, np.ndarray | None]]:
        return lambda: (read_upright(path, channels=channels, max_pixels=max_pixels)[0], None)

    return [InputImage(name, loader(path)) for name, path in files.items()]


class Visualizer:
    """A segmenter's network, and figures of what it does with images.

    With `settings.samples` the figures of the switches' stability show the variance over forward passes with dropout.
    Figures that follow gradients or single activations are of the network in float32.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        self.classes, self.network = segmenter.classes, segmenter.network
        self.preprocessing, self.checkpoint = segmenter.preprocessing, segmenter.checkpoint

    @cached_property
    def exact(self) -> SegmentationModel:
        """The network in float32, prepared for inference."""
        if self.network.precision == "32-true":
            return self.network.model
        return Network.of(self.checkpoint, device=self.network.device, precision="32-true").model

    def prepared(self, picture: InputImage) -> tuple[np.ndarray, Tensor, np.ndarray | None]:
        """(image (H, W, C) at the input size, the same normalised as a batch of one, its mask); small ones padded."""
        stored, mask = picture.load()
        image = stored if self.preprocessing.size is None else resize_image(stored, self.preprocessing.size)
        normalised = self.preprocessing.normalise(image, picture.name)[None].to(self.network.device)
        least = self.network.model.minimum_size
        below, right = max(0, least - image.shape[0]), max(0, least - image.shape[1])
        if below or right:
            image = np.pad(image, ((0, below), (0, right), (0, 0)))
            normalised = F.pad(normalised, (0, right, 0, below))
            mask = None
        if mask is not None:
            mask = resize_mask(mask, (image.shape[0], image.shape[1]))
        return image, normalised, mask

    def figures(self, picture: InputImage, kinds: Sequence[str], *, label: int | None) -> dict[str, np.ndarray]:
        """The figures of one image, by kind; those that the network cannot have are left out, see `lacking`."""
        image, normalised, mask = self.prepared(picture)
        network = self.network
        with recorded(network.model) as pooled, ties_counted(network.model) as ties:
            probabilities = network.logits(normalised).float().softmax(dim=1)
        prediction = probabilities[0].argmax(dim=0).byte().cpu().numpy()
        made = {}
        if "switches" in kinds and pooled:
            made["switches"] = figures.switches_figure(picture.name, image, pooled, ties)
        if "flow" in kinds and pooled:
            made["flow"] = figures.switch_paths_figure(picture.name, image, pooled)
        if "stages" in kinds and not self.lacking("stages"):
            chosen = self._most_of(prediction) if label is None else label
            deconv = any(isinstance(module, DeconvBlock) for module in network.model.modules())
            filters = "deconvolutions" if deconv else "convolutions"
            building = trace_decoder(self.exact, normalised, chosen)
            made["stages"] = figures.decoder_stages_figure(picture.name, image, building, self.classes, chosen, filters)
        if "stability" in kinds and pooled:
            variance = network(normalised).uncertainty if network.samples else None
            with recorded(network.model) as again:

                def pools(batch: Tensor) -> list[Pooling]:
                    network.logits(batch)
                    return list(again)

                unstable = instability(pools, normalised, noise=noise_of(self.preprocessing))
            made["stability"] = figures.stability_figure(
                picture.name, image, prediction, entropy_of(probabilities)[0].cpu().numpy(), unstable, self.classes,
                mask=mask, variance=None if variance is None else variance[0].cpu().numpy(),
            )  # fmt: skip
        return made

    def lacking(self, kind: str) -> str:
        """Why the network has no figure of a kind; empty where it has."""
        model = self.network.model
        side = max(64, model.minimum_size)
        image = torch.zeros(1, model.in_channels, side, side, device=self.network.device)
        if kind in ("switches", "flow", "stability"):
            with recorded(model) as pooled:
                self.network.logits(image)
            return "" if pooled else f"the pools of {type(model).__name__} keep no switches"
        if kind == "stages":
            try:
                trace_decoder(self.exact, image, 0)
            except UsageError as error:
                return str(error)
        return ""

    def _most_of(self, prediction: np.ndarray) -> int:
        """The class with the most pixels, the background left out where there is another."""
        counts = np.bincount(prediction.ravel(), minlength=len(self.classes))
        if self.classes.names[0] == "background" and counts[1:].any():
            counts[0] = 0
        return int(counts.argmax())

    def layers(self) -> list[str]:
        """The stages of the encoder, whose units are shown unless others are named."""
        encoder = getattr(self.network.model, "encoder", None)
        count = len(encoder.stages) if encoder is not None and hasattr(encoder, "stages") else 0
        return [f"encoder.stages.{index}" for index in range(count)]

    def strongest(self, pictures: Sequence[InputImage], layers: Sequence[str]) -> StrongestActivations:
        """The strongest activations of all units of some layers."""
        per_image = -(-figures.NUM // len(pictures))
        found = StrongestActivations(self.exact, layers, num=figures.NUM, per_image=per_image)
        for number, picture in enumerate(pictures):
            found.update(self.prepared(picture)[1], number)
        return found

    def units_figure(
        self,
        pictures: Sequence[InputImage],
        found: StrongestActivations,
        layer: str,
        *,
        maps: Sequence[int] | None,
        num: int,
        seed: int,
    ) -> np.ndarray:
        """What some units of a layer see: those numbered, or so many at random of those that were ever above zero."""
        count = len(found.kept[layer][0])
        if maps is None:
            alive = found.alive(layer)
            maps = sorted(random.Random(key(seed, layer)).sample(alive, min(num, len(alive))))
        elif wrong := [number for number in maps if not 0 <= number < count]:
            raise UsageError(f"--maps {wrong[0]}: {layer} has the maps 0 to {count - 1} - name some of these")
        if not any(found.of(layer, number) for number in maps):
            raise UsageError(f"no such unit of {layer} is above zero in any of the images - give others of either")
        std = torch.tensor(self.preprocessing.std)
        shown = []
        sizes, boxes = [], dict[tuple[int, int], Callable[[int, int], tuple[int, int, int, int]]]()
        for number in maps:
            for activation in found.of(layer, number):
                image, normalised, _ = self.prepared(pictures[activation.image])
                size = (image.shape[0], image.shape[1])
                if size not in boxes:
                    boxes[size] = receptive_fields(self.exact, layer, size)
                box = boxes[size]
                top, left, bottom, right = box(activation.unit.row, activation.unit.column)
                sizes.append((bottom - top, right - left))
                made = {}
                place = Place((top, left, bottom, right), size)
                projections = project(self.exact, normalised, layer, [activation.unit], methods=METHODS)
                for method, (projection,) in projections.items():
                    if self.preprocessing.order == "bgr":
                        projection = projection.flip(0)
                    grey = on_grey(projection[:, top:bottom, left:right], std).permute(1, 2, 0).cpu().numpy()
                    made[method] = draw.to_rgb((255 * grey).round().astype(np.uint8))
                crop = draw.to_rgb(image)[top:bottom, left:right]
                shown.append((number, activation.value, place, crop, made))
        field = (max(height for height, _ in sizes), max(width for _, width in sizes))
        units: dict[int, list[tuple[float, np.ndarray, dict[Method, np.ndarray]]]] = {number: [] for number in maps}
        for number, value, place, crop, made in shown:
            whole = {method: place.in_field(picture, field) for method, picture in made.items()}
            units[number].append((value, place.in_field(crop, field), whole))
        return figures.units_figure(layer, type(self.exact).__name__, units, images=len(pictures), field=field)


class Place(NamedTuple):
    """Where a unit looks: box, (top, left, bottom, right) of its field in an image of size (H, W)."""

    box: tuple[int, int, int, int]
    size: tuple[int, int]

    def in_field(self, picture: np.ndarray, field: tuple[int, int]) -> np.ndarray:
        """A picture of the box, on a canvas as large as the whole field, at the side where the image did not cut it."""
        canvas = np.full((*field, 3), OUTSIDE, dtype=np.uint8)
        starts = []
        for axis in (0, 1):
            missing = field[axis] - picture.shape[axis]
            cut_before, cut_behind = self.box[axis] == 0, self.box[axis + 2] == self.size[axis]
            starts.append(
                missing if cut_before and not cut_behind else 0 if cut_behind and not cut_before else missing // 2
            )
        top, left = starts
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        return canvas
