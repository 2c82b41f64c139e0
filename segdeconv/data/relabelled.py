"""Any data set with its classes merged, renamed or ignored."""

from collections.abc import Mapping

import numpy as np

from segdeconv.classes import Classes
from segdeconv.data.dataset import DatasetView, Sample, SegmentationDataset
from segdeconv.errors import UsageError, did_you_mean

IGNORE = "ignore"


class Relabelled(DatasetView):
    """A view of a data set through other classes; images, names and files stay.

    label_map: from a class's name to its new name, or to `ignore`. Classes that get one name become one class; a class
        that is not named stays. The new classes come in the order in which they first occur among the old ones, each in
        the colour of its first member.
    """

    def __init__(self, dataset: SegmentationDataset, label_map: dict[str, str] | None = None) -> None:
        super().__init__(dataset)
        self.label_map = label_map or {}
        self.classes, self._table = relabel(dataset.classes, self.label_map)
        changed = describe(dataset.classes, self.label_map)
        self.notes = (*dataset.notes, *([f"classes: {changed}"] if changed else []))

    def __getitem__(self, index: int) -> Sample:
        image, mask, name = self.dataset[index]
        return Sample(image, self._table[mask], name)

    @property
    def fingerprint(self) -> str:
        return f"{self.kind} {sorted(self.label_map.items())} {self.dataset.fingerprint}"


def in_order_of(dataset: SegmentationDataset, classes: Classes) -> SegmentationDataset:
    """A view of a data set through the same classes in another order, or with another index of ignored pixels."""
    view = Relabelled(dataset)
    view._table = np.full(256, classes.ignore_index, dtype=np.uint8)
    for index, name in enumerate(dataset.classes.names):
        view._table[index] = classes.names.index(name)
    view.classes, view.published = classes, dataset.published
    return view


def relabel(classes: Classes, label_map: Mapping[str, str]) -> tuple[Classes, np.ndarray]:
    """(the new classes, (256,) uint8: the new index of every old one)."""
    for name in label_map:
        if name not in classes.names:
            raise UsageError(f"dataset.label_map: there is no class '{name}' - {did_you_mean(name, classes.names)}")
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
    """What becomes of which classes, in words.

    >>> from segdeconv.data.datasets.camvid import CLASSES
    >>> describe(CLASSES, {"sky": "ignore", "pavement": "drivable", "road": "drivable"})
    'road, pavement -> drivable; sky -> ignored'
    """
    members: dict[str, list[str]] = {}
    for old in classes.names:
        members.setdefault(label_map.get(old, old), []).append(old)
    ignored = members.pop(IGNORE, [])
    lines = [f"{', '.join(old)} -> {new}" for new, old in members.items() if old != [new]]
    return "; ".join(lines + ([f"{', '.join(ignored)} -> ignored"] if ignored else []))
