"""The network of a labelling session, which learns from strokes within seconds on a CPU.

A switch network makes this possible: all that its decoder needs to know of an image are the encoder's deepest map and
two bits for each pooling window. They are computed once for each photo and kept, and while the encoder is frozen a
step of learning runs the decoder alone, on squares around strokes, cut from what is kept.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeconv.data.preprocessing import Preprocessing, Size
from segdeconv.models.encoders import Encoding
from segdeconv.models.layers import init_he
from segdeconv.models.segnet import SegNet
from segdeconv.serving.label.strokes import IGNORE
from segdeconv.switches import Pooling, pack
from segdeconv.system.devices import autocast

Scope = Literal["decoder", "all"]

PIXELS = 360 * 480  # of a photo as the network sees it
CELLS = 5  # side of the squares, in cells of the deepest map
BATCH = 4  # squares of a step
MIN_STEPS = 16  # of a round; on a slow or busy machine, the steps become smaller
LEARNING_RATE = 1e-3  # of the decoder's stages
HEAD_FACTOR = 4.0  # on the learning rate of the classifier, which may be new
ENCODER_FACTOR = 0.1  # on the learning rate of the encoder, which has learned from more than strokes
CALIBRATION_IMAGES = 4


class Kept(NamedTuple):
    """What is kept of a photo.

    Attributes:
        encoding: Deepest map float32 and packed switches, of a batch of one, on the CPU. The maps between have no
            elements, since only the sizes are needed.
        features: (D,) float32, the mean of the deepest map, of length 1.
    """

    encoding: Encoding
    features: np.ndarray

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        tensors = [self.encoding.features, *(pooling.switches for pooling in self.encoding.pooled)]
        return sum(tensor.nbytes for tensor in tensors)


class Example(NamedTuple):
    """A photo with strokes, as the network sees it.

    Attributes:
        kept: What is kept of it.
        image: (h, w, 3) uint8.
        target: (h, w) uint8 class indices, and 255 where nobody painted.
    """

    kept: Kept
    image: np.ndarray
    target: np.ndarray


class Learned(NamedTuple):
    """Outcome of learning.

    Attributes:
        steps: Number of steps.
        seconds: Their time.
        loss: Mean of the loss over the last steps.
    """

    steps: int
    seconds: float
    loss: float


class Learner:
    """A network that learns from strokes. It belongs to one thread.

    Args:
        network: The network, changed in place.
        names: The names of its classes, matched with those of the strokes.
        preprocessing: Normalises the photos; its size is not used.
        device: Where it runs.
        precision: One of `devices.PRECISIONS`.
        pixels: Pixels of a photo as the network sees it.
        pretrained_decoder: False if the decoder's weights are random.
        pretrained_encoder: False if the encoder's weights are random; the first photo then sets its norms.
    """

    def __init__(
        self,
        network: SegNet,
        names: Sequence[str],
        preprocessing: Preprocessing,
        *,
        device: torch.device,
        precision: str = "32-true",
        pixels: int = PIXELS,
        pretrained_decoder: bool = True,
        pretrained_encoder: bool = True,
    ) -> None:
        self.network = network.to(device).to(memory_format=torch.channels_last).eval()
        self.names, self.preprocessing, self.pixels = list(names), preprocessing, pixels
        self.device, self.precision = device, precision
        self.stride = 2 ** len(network.encoder.channels)
        self.calibrated, self.encoder_calibrated = pretrained_decoder, pretrained_encoder
        self.encoder_version = 0
        self.random = np.random.default_rng(0)
        self._rows: dict[str, list[Tensor]] = {}  # of the classifier, of classes that it has or had
        self._optimizer: tuple[Scope, torch.optim.Optimizer] | None = None

    def size(self, photo: Size) -> Size:
        """Return the (h, w) at which the network sees a photo: its proportions, in whole cells of the deepest map."""
        scale = min(1.0, (self.pixels / (photo[0] * photo[1])) ** 0.5)
        height, width = (max(1, round(scale * side / self.stride)) * self.stride for side in photo)
        return height, width

    def set_classes(self, names: Sequence[str], *, renamed: Mapping[str, str] | None = None) -> None:
        """Give the network a row of its classifier for each class; classes that it has or had keep their weights.

        Args:
            names: Names of the classes.
            renamed: New names by old ones.
        """
        changed = {before: after for before, after in (renamed or {}).items() if before != after}
        for name in changed:
            self._rows.pop(name, None)  # another class may get this name
        self.names = [changed.get(name, name) for name in self.names]
        if list(names) == self.names:
            return
        old = self.network.decoder.classifier
        new = nn.Conv2d(old.in_channels, len(names), 3, padding=1)
        init_he(new)
        for index, name in enumerate(self.names):
            self._rows[name] = [tensor[index].detach().cpu().clone() for tensor in old.parameters()]
        with torch.no_grad():
            for index, name in enumerate(names):
                if name in self._rows:
                    for tensor, row in zip(new.parameters(), self._rows[name], strict=True):
                        tensor[index] = row
        self.network.decoder.classifier = new.to(self.device).to(memory_format=torch.channels_last)
        self.network.num_classes, self.names = len(names), list(names)
        self._optimizer = None

    def keep(self, image: np.ndarray) -> Kept:
        """Run the encoder on a photo.

        Args:
            image: (h, w, 3) uint8, of the size that `size` returns.
        """
        if not self.encoder_calibrated:
            self.encoder_calibrated = True
            _measure_norms(self.network.encoder, [self._input([image])])
        with torch.no_grad(), autocast(self.precision, self.device):
            encoding = self.network.encoder(self._input([image]))
        pooled = tuple(
            Pooling(pooling.features.new_empty(0), pack(pooling.codes).cpu(), pooling.size)
            for pooling in encoding.pooled
        )
        features = encoding.features.float().cpu()
        mean = features.mean(dim=(0, 2, 3)).numpy()
        return Kept(Encoding(features, pooled), mean / max(float(np.linalg.norm(mean)), 1e-12))

    @torch.no_grad()
    def probabilities(self, kept: Kept) -> Tensor:
        """Return the class probabilities of a photo, (C, h, w) float32 on the CPU."""
        self._calibrate([kept])
        with autocast(self.precision, self.device):
            logits = self.network.decoder(self._moved(kept.encoding))
        return logits.float().softmax(dim=1)[0].cpu()

    def learn(
        self,
        examples: Callable[[], Sequence[Example]],
        *,
        seconds: float,
        scope: Scope = "decoder",
        max_steps: int | None = None,
    ) -> Learned:
        """Learn for a while.

        Args:
            examples: Called before each step, so that strokes that arrive meanwhile count.
            seconds: Time to learn.
            scope: Learn the decoder from what is kept, or the encoder too.
            max_steps: Steps after which to stop earlier.
        """

        def painted() -> list[Example]:
            return [example for example in examples() if (example.target != IGNORE).any()]

        optimizer = self._optimizer_of(scope)  # the first one takes a second, in which torch is still loading
        usable = painted()  # not within the time to learn: photos are read here that were not seen before
        self._calibrate([example.kept for example in usable])
        started, losses, batch = time.monotonic(), list[float](), BATCH
        while usable:
            step_started = time.monotonic()
            done = max((step_started - started) / seconds, len(losses) / max_steps if max_steps else 0.0)
            if losses and done >= 1:
                break
            for group in optimizer.param_groups:  # falls to nothing in each round, so that its last steps settle
                group["lr"] = group["initial_lr"] * (1 - done if losses else 1.0)
            losses.append(self._step(usable, batch, scope, optimizer))
            if time.monotonic() - step_started > seconds / MIN_STEPS:  # small steps teach more in the same time
                batch = max(1, batch // 2)
            usable = painted()
        if losses and scope == "all":
            self.encoder_version += 1
        recent = losses[-10:]
        return Learned(len(losses), time.monotonic() - started, float(np.mean(recent)) if recent else float("nan"))

    def _step(
        self,
        examples: Sequence[Example],
        batch: int,
        scope: Scope,
        optimizer: torch.optim.Optimizer,
    ) -> float:
        squares = [self._square(examples) for _ in range(batch)]
        side = (min(area[0][1] for _, area in squares), min(area[1][1] for _, area in squares))
        areas = [(example, (area[0][0], side[0]), (area[1][0], side[1])) for example, area in squares]
        pixels = [
            (slice(y * self.stride, (y + h) * self.stride), slice(x * self.stride, (x + w) * self.stride))
            for _, (y, h), (x, w) in areas
        ]
        images = [example.image[part] for (example, _, _), part in zip(areas, pixels, strict=True)]
        target = torch.from_numpy(
            np.stack([example.target[part] for (example, _, _), part in zip(areas, pixels, strict=True)])
        ).to(self.device, torch.int64)
        counts = torch.bincount(target[target != IGNORE], minlength=self.network.num_classes).float()
        present = counts > 0
        weights = torch.where(present, counts.clamp(min=1) ** -0.5, 0.0)  # between pixels and classes
        with torch.enable_grad(), autocast(self.precision, self.device):
            if scope == "all":
                logits = self.network(self._input(images))
            else:
                parts = [self._cut(example.kept.encoding, rows, columns) for example, rows, columns in areas]
                logits = self.network.decoder(self._moved(_stacked(parts)))
        with torch.enable_grad():
            loss = F.cross_entropy(logits.float(), target, weights, ignore_index=IGNORE)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 5.0)
        optimizer.step()
        return float(loss.detach())

    def _square(self, examples: Sequence[Example]) -> tuple[Example, tuple[tuple[int, int], tuple[int, int]]]:
        """Choose a square around a painted pixel: an example and (first cell, number of cells) of rows and columns.

        First the class is drawn, then a photo that has it, then a pixel of it, so that no class is left out.
        """
        owners: dict[int, list[Example]] = {}
        for example in examples:
            for label in np.unique(example.target):
                if label != IGNORE:
                    owners.setdefault(int(label), []).append(example)
        label = list(owners)[self.random.integers(len(owners))]
        example = owners[label][self.random.integers(len(owners[label]))]
        rows, columns = np.nonzero(example.target == label)
        chosen = self.random.integers(len(rows))
        area = []
        for pixel, length in zip((rows[chosen], columns[chosen]), example.target.shape, strict=True):
            cells = length // self.stride
            size = min(CELLS, cells)
            first = int(pixel) // self.stride - int(self.random.integers(size))
            area.append((min(max(first, 0), cells - size), size))
        return example, (area[0], area[1])

    def _cut(self, encoding: Encoding, rows: tuple[int, int], columns: tuple[int, int]) -> Encoding:
        (y, height), (x, width) = rows, columns
        pooled = []
        for level, pooling in enumerate(encoding.pooled, start=1):
            cells = self.stride >> level
            part = pooling.switches[:, :, y * cells : (y + height) * cells, x * cells : (x + width) * cells]
            pooled.append(Pooling(pooling.features, part, (2 * height * cells, 2 * width * cells)))
        return Encoding(encoding.features[:, :, y : y + height, x : x + width], tuple(pooled))

    def _input(self, images: Sequence[np.ndarray]) -> Tensor:
        normalised = torch.stack([self.preprocessing.normalise(np.ascontiguousarray(image)) for image in images])
        return normalised.to(self.device).contiguous(memory_format=torch.channels_last)

    def _moved(self, encoding: Encoding) -> Encoding:
        pooled = tuple(
            pooling._replace(switches=pooling.switches.to(self.device).contiguous()) for pooling in encoding.pooled
        )
        features = encoding.features.to(self.device).contiguous(memory_format=torch.channels_last)
        return Encoding(features, pooled)

    def _calibrate(self, kept: Sequence[Kept]) -> None:
        """Give the norms of a random decoder the statistics of some photos, once; they stay fixed afterwards.

        Statistics that moved with batches of a few squares would lag behind the few steps that there are.
        """
        if self.calibrated or not kept:
            return
        self.calibrated = True
        encodings = [self._moved(each.encoding) for each in kept[:CALIBRATION_IMAGES]]
        _measure_norms(self.network.decoder, encodings)

    def _optimizer_of(self, scope: Scope) -> torch.optim.Optimizer:
        if self._optimizer is None or self._optimizer[0] != scope:
            parts = [(self.network.decoder.classifier, HEAD_FACTOR), (self.network.decoder.stages, 1.0)]
            if scope == "all":
                parts.append((self.network.encoder, ENCODER_FACTOR))
            groups = [
                {"params": list(module.parameters()), "lr": 0.0, "initial_lr": factor * LEARNING_RATE}
                for module, factor in parts
            ]
            self._optimizer = (scope, torch.optim.AdamW(groups, weight_decay=1e-4))
        return self._optimizer[1]


def _measure_norms(part: nn.Module, inputs: Sequence[Any]) -> None:
    """Set the statistics of the norms of a part to the mean over inputs."""
    norms = [module for module in part.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all inputs
        norm.train()
    with torch.no_grad():
        for each in inputs:
            part(each)
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()


def _stacked(encodings: Sequence[Encoding]) -> Encoding:
    pooled = tuple(
        poolings[0]._replace(switches=torch.cat([pooling.switches for pooling in poolings]))
        for poolings in zip(*(encoding.pooled for encoding in encodings), strict=True)
    )
    return Encoding(torch.cat([encoding.features for encoding in encodings]), pooled)
