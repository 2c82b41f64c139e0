"""A custom data set, network and loss; docs/own-code.md trains them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from segdeconv.classes import Classes
from segdeconv.data import Sample, SegmentationDataset
from segdeconv.losses import PixelLoss
from segdeconv.models import SegmentationModel


class Stripes(SegmentationDataset):
    """Images of a disc with vertical stripes on horizontal stripes, in two random greys."""

    classes = Classes(names=("horizontal", "vertical"), colours=((40, 40, 40), (255, 160, 0)))

    def __init__(self, split: str, *, count: int = 256, side: int = 48) -> None:
        self.split, self.side = split, side
        self.names = [f"{split}_{index:03d}" for index in range(count)]

    def __getitem__(self, index: int) -> Sample:
        random = np.random.default_rng([self.split_names.index(self.split), index])
        centre, greys = random.uniform(12, self.side - 12, size=2), random.integers(256, size=2)
        rows, columns = np.mgrid[: self.side, : self.side]
        mask = np.hypot(rows - centre[0], columns - centre[1]) < 12
        image = greys[np.where(mask, columns, rows) // 3 % 2]
        return Sample(
            np.repeat(image[:, :, None], 3, axis=2).astype(np.uint8), mask.astype(np.uint8), self.names[index]
        )

    @property
    def fingerprint(self) -> str:
        return f"stripes 1 {self.split} {len(self)} {self.side}"


class TinyNet(SegmentationModel):
    """A network of three convolutions."""

    minimum_size = 1

    def __init__(self, num_classes: int, *, in_channels: int = 3, width: int = 16) -> None:
        super().__init__(num_classes, in_channels=in_channels)
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, width, 7, padding=3), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 5, padding=2), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(image))


class Poly(PixelLoss):
    """PolyLoss: cross entropy + epsilon * (1 - p). Leng et al. 2022, arXiv:2204.12511."""

    def __init__(
        self, *, epsilon: float = 1.0, class_weights: list[float] | None = None, ignore_index: int = 255
    ) -> None:
        super().__init__()
        self.epsilon, self.ignore_index = epsilon, ignore_index
        self.register_buffer("weights", torch.tensor(class_weights) if class_weights else None, persistent=False)

    def sums(self, logits: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counted = mask != self.ignore_index
        logits, mask = logits.float().movedim(1, -1)[counted], mask[counted]
        surprise = F.cross_entropy(logits, mask, reduction="none")
        weights = 1 if self.weights is None else self.weights[mask]
        return (weights * (surprise + self.epsilon * (1 - torch.exp(-surprise)))).sum(), counted.sum()
