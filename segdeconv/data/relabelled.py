"""Data sets with merged, renamed or ignored classes."""

from collections.abc import Mapping

import numpy as np

from segdeconv.classes import Classes
from segdeconv.data.dataset import DatasetView, ImageContents, Sample, SegmentationDataset
from segdeconv.errors import UsageError, did_you_mean

IGNORE = "ignore"


class Relabelled(DatasetView):
    """A data set with merged, renamed or ignored classes; images, names and files are unchanged.

    Args:
        dataset: The data set to wrap.
        label_map: Maps the name of a class to its new name, or to `ignore`. Classes with the same new name are merged;
            unlisted classes are kept. The new classes are in the order of their first members, whose colours they have.

    Raises:
        UsageError: `label_map` has an unknown class, or fewer than two classes are left.
    """

    def __init__(self, dataset: SegmentationDataset, label_map: dict[str, str] | None = None) -> None:
        super().__init__(dataset)
        self.label_map = label_map or {}
        self.classes, self._table = relabel(dataset.classes, self.label_map)
        changes = describe(dataset.classes, self.label_map)
        self.notes = (*dataset.notes, *([f"classes: {changes}"] if changes else []))

    def __getitem__(self, index: int) -> Sample:
        image, mask, name = self.dataset[index]
        return Sample(image, self._table[mask], name)

    def contents(self, index: int) -> ImageContents | None:
        stored = self.dataset.contents(index)
        if stored is None:
            return None
        counts = np.zeros(256, dtype=np.int64)
        np.add.at(counts, self._table[: len(stored.counts) - 1], stored.counts[:-1])
        ignored = int(counts[self.classes.ignore_index]) + stored.counts[-1]
        return stored._replace(counts=(*counts[: len(self.classes)].tolist(), ignored))

    @property
    def fingerprint(self) -> str:
        return f"{self.kind} {sorted(self.label_map.items())} {self.dataset.fingerprint}"


def in_order_of(dataset: SegmentationDataset, classes: Classes) -> SegmentationDataset:
    """Return a data set with the same classes in the order and with the ignore_index of `classes`."""
    view = Relabelled(dataset)
    view._table = np.full(256, classes.ignore_index, dtype=np.uint8)
    for index, name in enumerate(dataset.classes.names):
        view._table[index] = classes.names.index(name)
    view.classes, view.published = classes, dataset.published
    return view


def relabel(classes: Classes, label_map: Mapping[str, str]) -> tuple[Classes, np.ndarray]:
    """Apply a `label_map` to classes.

    Returns:
        The new classes, and a (256,) uint8 table of the new index of every old one.

    Raises:
        UsageError: `label_map` has an unknown class.
    """
    for name in label_map:
        if name not in classes.names:
            raise UsageError(f"dataset.label_map: unknown class '{name}' - {did_you_mean(name, classes.names)}")
    table = np.full(256, classes.ignore_index, dtype=np.uint8)
    colours: dict[str, tuple[int, int, int]] = {}
    for index, (old, colour) in enumerate(zip(classes.names, classes.colours, strict=True)):
        new = label_map.get(old, old)
        if new != IGNORE:
            colours.setdefault(new, colour)
            table[index] = list(colours).index(new)
    new_classes = Classes(
        tuple(colours), tuple(colours.values()), classes.ignore_index, ignore_colour=classes.ignore_colour
    )
    return new_classes, table


def describe(classes: Classes, label_map: Mapping[str, str]) -> str:
    """Describe the effect of a `label_map` in a line.

    Examples:
        >>> from segdeconv.data.datasets.camvid import CLASSES
        >>> describe(CLASSES, {"sky": "ignore", "pavement": "drivable", "road": "drivable"})
        'road, pavement -> drivable; sky -> ignored'
    """
    members: dict[str, list[str]] = {}
    for old in classes.names:
        members.setdefault(label_map.get(old, old), []).append(old)
    ignored = members.pop(IGNORE, [])
    changes = [f"{', '.join(old)} -> {new}" for new, old in members.items() if old != [new]]
    return "; ".join(changes + ([f"{', '.join(ignored)} -> ignored"] if ignored else []))
