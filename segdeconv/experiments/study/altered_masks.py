"""The share of labelling errors that suspects find: regions of CamVid's val masks with another class are searched for.

    python -c "from segdeconv.experiments.study import altered_masks; altered_masks.run('camvid-small', '/data/CamVid')"

In each of some masks, one connected region gets the class of a region that touches it, as if an object had not been
labelled (`touching`), or any other class (`any`). The errors that the masks have already count as false alarms.
"""

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from segdeconv.analysis.suspects import Suspect, find_suspects
from segdeconv.checkpoints import checkpoint
from segdeconv.data.dataset import DatasetView, Sample, SegmentationDataset
from segdeconv.evaluation.evaluate import restore_dataset
from segdeconv.inference.segmenter import Segmenter

KINDS = ("touching", "any")
MIN_AREA = 250  # pixels of an altered region


class Alteration(NamedTuple):
    """A region of a mask that was given another class.

    Attributes:
        inside: (H, W) bool, its pixels.
        class_: Index of the class it was given.
    """

    inside: np.ndarray
    class_: int


class AlteredMasks(DatasetView):
    """A data set of which some masks have one region of another class.

    Args:
        dataset: The data set.
        kind: One of KINDS.
        num: Number of altered masks.
        seed: Seed of the choice of images, regions and classes.
    """

    def __init__(self, dataset: SegmentationDataset, kind: str, *, num: int, seed: int) -> None:
        super().__init__(dataset)
        random = np.random.default_rng(seed)
        self.alterations: dict[int, Alteration] = {}
        for place in sorted(random.choice(len(dataset), num, replace=False).tolist()):
            options = _options(dataset[place].mask, len(dataset.classes), kind)
            inside, classes = options[random.integers(len(options))]
            self.alterations[place] = Alteration(inside, int(random.choice(classes)))

    def __getitem__(self, index: int) -> Sample:
        image, mask, name = self.dataset[index]
        if index in self.alterations:
            mask = mask.copy()
            mask[self.alterations[index].inside] = self.alterations[index].class_
        return Sample(image, mask, name)

    @property
    def fingerprint(self) -> str:
        changes = [(place, each.class_, int(each.inside.sum())) for place, each in self.alterations.items()]
        return f"{self.dataset.fingerprint}\n{changes}"

    def altered(self, suspect: Suspect) -> bool:
        """Return whether a suspect consists mostly of an altered region."""
        alteration = self.alterations.get(suspect.place)
        if alteration is None or suspect.region.mask_class != alteration.class_:
            return False
        top, left, bottom, right = suspect.region.box
        common = alteration.inside[top:bottom, left:right] & suspect.region.inside
        return bool(common.sum() > suspect.pixels / 2)


def _options(mask: np.ndarray, num_classes: int, kind: str) -> list[tuple[np.ndarray, list[int]]]:
    """Return the regions of a mask with the classes that each may be given."""
    options = []
    for own in range(num_classes):
        count, numbers, statistics, _ = cv2.connectedComponentsWithStats((mask == own).astype(np.uint8), connectivity=4)
        for number in range(1, count):
            inside = numbers == number
            ring = cv2.dilate(inside.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool) & ~inside
            values = np.unique(mask[ring]).tolist() if kind == "touching" else range(num_classes)
            classes = [value for value in values if value < num_classes and value != own]
            if statistics[number, cv2.CC_STAT_AREA] >= MIN_AREA and classes:
                options.append((inside, classes))
    return options


def run(network: str | Path, camvid: str | Path, *, num: int = 25, seed: int = 0) -> None:
    """Alter `num` masks of val in both ways, and print how many are found, and how early."""
    loaded = checkpoint.read(network, overrides=[f"dataset.root={camvid}"])
    segmenter = Segmenter(loaded)
    for kind in KINDS:
        dataset = AlteredMasks(restore_dataset(loaded, "val"), kind, num=num, seed=seed)
        suspects = find_suspects(segmenter, dataset)
        found = [suspect.place if dataset.altered(suspect) else None for suspect in suspects]
        counts = {first: len(set(found[:first]) - {None}) for first in (num, 2 * num, len(found))}
        listed = ", ".join(f"{count} in the first {first}" for first, count in counts.items())
        print(f"{kind}: {num} of {len(dataset)} masks altered, {len(suspects)} suspects, altered ones: {listed}")
