"""Training on all labelled images: the train and the val split as one data set."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from segdeconv.data.dataset import DatasetView, Locality, Sample, SegmentationDataset


class Joined(DatasetView):
    """The samples of two splits of whole images, in order; everything else is that of the first split.

    Args:
        dataset: The first split.
        other: The second split of the same data set.
    """

    def __init__(self, dataset: SegmentationDataset, other: SegmentationDataset) -> None:
        super().__init__(dataset)
        self.other, self.names = other, [*dataset.names, *other.names]
        if dataset.locality is not None and other.locality is not None:
            groups, more = dataset.locality.groups, other.locality.groups
            self.locality = Locality(np.concatenate([groups, more + groups.max() + 1]), dataset.locality.window)

    def _place(self, index: int) -> tuple[SegmentationDataset, int]:
        size = len(self.dataset)
        return (self.dataset, index) if index < size else (self.other, index - size)

    def __getitem__(self, index: int) -> Sample:
        dataset, index = self._place(index)
        return dataset[index]

    def stamp(self, index: int) -> str:
        dataset, index = self._place(index)
        return dataset.stamp(index)

    def instances(self, index: int) -> np.ndarray:
        dataset, index = self._place(index)
        return dataset.instances(index)

    def prefetch(self, indices: Iterable[int]) -> None:
        size, indices = len(self.dataset), list(indices)
        self.dataset.prefetch(index for index in indices if index < size)
        self.other.prefetch(index - size for index in indices if index >= size)

    @property
    def image_files(self) -> list[Path]:
        return self.dataset.image_files + self.other.image_files

    @property
    def files(self) -> list[Path]:
        return self.dataset.files + self.other.files

    @property
    def fingerprint(self) -> str:
        return f"{self.dataset.fingerprint}\n{self.other.fingerprint}"
